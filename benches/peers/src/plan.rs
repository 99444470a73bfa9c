//! Which tables there are, who takes part in each, and why somebody does not.

use std::error::Error;

use crate::case::{Case, Mode, Work};
use crate::options::Options;
use crate::report::table::Table;
use crate::report::unit::{Unit, size};

const KIB: usize = 1 << 10;
const MIB: usize = 1 << 20;

const SHARED_MEMORY: [&str; 4] = ["tokio-shm", "iceoryx2", "ringfire", "zenoh SHM"];
const SOCKETS: [&str; 2] = ["Unix stream", "Unix seqpacket"];

const ALWAYS_SLEEPS: &str = "It always sleeps: see the hop parked";
const BLOB_POLLS: &str =
    "ringfire's blob ring can only be polled, and its typed ring is for small records of one type";
const NO_DEPTH: &str =
    "Its room is a socket buffer in bytes, or none that can be set: there is no full subscriber to wait for";

/// Those that were asked for.
///
/// # Errors
///
/// One that was asked for is not there.
pub(crate) fn tables(options: &Options) -> Result<Vec<Table>, Box<dyn Error>> {
    let all = [awake, parked_one_core, parked_two_cores, stream, fan_out, blocked, cpu, first, memory, micro];
    let mut tables: Vec<_> = all.iter().map(|table| table()).collect();
    let names: Vec<_> = tables.iter().map(|table| table.name).collect();
    if let Some(unknown) = options.only.iter().find(|only| !names.contains(&only.as_str())) {
        return Err(format!("no table is called {unknown}; there are {}", names.join(", ")).into());
    }
    tables.retain(|table| options.wants(table.name));
    if options.quick {
        for job in tables.iter_mut().flat_map(|table| &mut table.jobs) {
            job.case.effort_ms /= 3;
        }
    }
    Ok(tables)
}

/// One hop, both sides never sleeping.
fn awake() -> Table {
    let mut table = Table::new("awake", "One hop, two processes on two cores, both awake", Unit::Time);
    for bytes in [64, 4 * KIB, 64 * KIB, MIB, 16 * MIB] {
        for peer in ["tokio-shm", "iceoryx2", "ringfire", "floor: spin"] {
            let case = Case { depth: 2, ..Case::new(Work::Hop, peer, Mode::Awake, bytes) };
            table.add(peer, &size(bytes), case);
        }
        for peer in ["zenoh SHM", "ipc-channel", "Unix stream", "Unix seqpacket"] {
            table.missing(peer, &size(bytes), ALWAYS_SLEEPS);
        }
    }
    table
}

fn parked_one_core() -> Table {
    parked("parked-one-core", "One hop, two processes on one core, both asleep", 0)
}

fn parked_two_cores() -> Table {
    parked("parked-two-cores", "One hop, two processes on two cores, both asleep", 1)
}

fn parked(name: &'static str, title: &'static str, far_core: usize) -> Table {
    let mut table = Table::new(name, title, Unit::Time);
    let floors = ["floor: futex", "floor: eventfd", "floor: eventfd + AsyncFd"];
    let everyone = SHARED_MEMORY.into_iter().chain(["ipc-channel"]).chain(SOCKETS).chain(floors);
    for peer in everyone {
        for bytes in [64, MIB] {
            if peer == "ringfire" && bytes > 64 {
                table.missing(peer, &size(bytes), BLOB_POLLS);
                continue;
            }
            let case = Case { far_core, depth: 2, ..Case::new(Work::Hop, peer, Mode::Parked, bytes) };
            table.add(peer, &size(bytes), case);
        }
    }
    table
}

fn stream() -> Table {
    let mut table =
        Table::new("stream", "One way, as fast as it goes, two processes on two cores", Unit::Rate);
    for (bytes, depth) in [(64, 256), (4 * KIB, 64), (MIB, 8)] {
        let column = size(bytes);
        let rows = SHARED_MEMORY.into_iter().chain(["ipc-channel"]).chain(SOCKETS).chain(["floor: spin"]);
        for peer in rows {
            let case = Case { depth, ..Case::new(Work::Stream, peer, Mode::Awake, bytes) };
            let batched = Case { batched: true, ..case.clone() };
            table.add(peer, &column, case);
            match peer {
                "tokio-shm" => {
                    table.add("tokio-shm, feed and flush", &column, batched.clone());
                    let alone = "tokio-shm, settings left alone";
                    table.add(alone, &column, Case { peer: alone.to_owned(), batched: false, ..batched });
                }
                "ringfire" if bytes == 64 => table.add("ringfire, push_batch", &column, batched),
                _ => {}
            }
        }
    }
    table
}

fn fan_out() -> Table {
    let mut table = Table::new("fan-out", "Until every subscriber has read a message of 4 KiB", Unit::Time);
    for fars in [1, 4, 16] {
        let column = if fars == 1 { "1 subscriber".to_owned() } else { format!("{fars} subscribers") };
        let floors = ["floor: futex, a ring each", "floor: eventfd + AsyncFd, a ring each"];
        let peers = ["tokio-shm", "iceoryx2", "zenoh SHM", "ipc-channel"];
        for peer in peers.into_iter().chain(SOCKETS).chain(floors) {
            let case = Case { fars, depth: 8, ..Case::new(Work::FanOut, peer, Mode::Parked, 4 * KIB) };
            table.add(peer, &column, case);
        }
        table.missing("ringfire", &column, BLOB_POLLS);
    }
    table
}

fn blocked() -> Table {
    let mut table = Table::new("blocked", "A blocked sender goes on, 64 B", Unit::Time);
    let columns = [
        ("one core, after 1 ms", 0, 1),
        ("two cores, after 1 ms", 1, 1),
        ("one core, after 50 ms", 0, 50),
        ("two cores, after 50 ms", 1, 50),
    ];
    for (column, far_core, rest_ms) in columns {
        for peer in ["tokio-shm", "iceoryx2", "ringfire", "floor: futex", "floor: eventfd + AsyncFd"] {
            let depth = if peer == "ringfire" { 2 } else { 1 };
            let effort_ms = if rest_ms == 1 { 300 } else { 1_500 };
            let case = Case::new(Work::Blocked, peer, Mode::Parked, 64);
            table.add(peer, column, Case { depth, far_core, rest_ms, effort_ms, ..case });
        }
        for peer in ["zenoh SHM", "ipc-channel", "Unix stream", "Unix seqpacket"] {
            table.missing(peer, column, NO_DEPTH);
        }
    }
    table
}

fn cpu() -> Table {
    let mut table = Table::new("cpu", "Processor time with default settings, 64 B", Unit::Percent);
    for peer in SHARED_MEMORY.into_iter().chain(["ipc-channel"]).chain(SOCKETS) {
        let case = Case { effort_ms: 3_000, ..Case::new(Work::Cpu, peer, Mode::Default, 64) };
        let figures = [
            (peer, "idle, publisher", "idle_near"),
            (peer, "idle, subscriber", "idle_far"),
            (peer, "60 Hz, publisher", "frames_near"),
            (peer, "60 Hz, subscriber", "frames_far"),
        ];
        table.add_figures(case, &figures);
    }
    table
}

fn first() -> Table {
    let mut table = Table::new("first", "From nothing to the first message, 64 B", Unit::Time);
    for peer in SHARED_MEMORY.into_iter().chain(["ipc-channel"]).chain(SOCKETS) {
        let case = Case::new(Work::First, peer, Mode::Default, 64);
        table.add_figures(case, &[(peer, "bind, connect, first message", "ns")]);
    }
    table
}

fn memory() -> Table {
    let mut table = Table::new("memory", "Memory that a topic of 8 messages of 1 MiB adds", Unit::Bytes);
    for peer in SHARED_MEMORY {
        let mode = if peer == "ringfire" { Mode::Awake } else { Mode::Default };
        let case = Case { depth: 8, ..Case::new(Work::Memory, peer, mode, MIB) };
        let figures = [
            (peer, "both, PSS", "pss"),
            (peer, "publisher, PSS", "pss_near"),
            (peer, "subscriber, PSS", "pss_far"),
            (peer, "publisher, RSS", "rss_near"),
            (peer, "subscriber, RSS", "rss_far"),
        ];
        table.add_figures(case, &figures);
    }
    table
}

fn micro() -> Table {
    let mut table = Table::new("micro", "Parts of this crate beside what they are made of", Unit::Time);
    let rows = [
        ("pool, take and drop, 64 B", "pool_small"),
        ("pool, take and drop, 1 MiB", "pool_large"),
        ("pool, take and drop, 1 MiB, cold", "pool_cold"),
        ("ArrayQueue, pop and push", "queue"),
        ("pool, take and drop, two threads", "pool_two"),
        ("ArrayQueue, two threads", "queue_two"),
        ("event, notify and wait", "event"),
        ("event, notify and wait_async", "event_async"),
        ("event-listener, notify and wait", "event_listener"),
        ("Notify, notify_one and notified", "notify"),
        ("swap and compare-exchange", "swap_cas"),
        ("event across threads, wait", "across_event"),
        ("futex across threads", "across_futex"),
        ("event across threads, wait_async", "across_event_async"),
        ("Notify across threads", "across_notify"),
        ("1 MiB written and read in one thread", "write_read"),
    ];
    let figures = rows.map(|(row, figure)| (row, "time", figure));
    let case = Case { fars: 0, effort_ms: 3_000, ..Case::new(Work::Micro, "tokio-shm", Mode::Default, 64) };
    table.add_figures(case, &figures);
    for (row, fars, outrun) in [
        ("loan and send, no subscriber", 0, false),
        ("loan and send, one awake subscriber", 1, false),
        ("loan and send, one awake subscriber that is outrun", 1, true),
    ] {
        let case = Case { fars, outrun, ..Case::new(Work::PublisherSide, "tokio-shm", Mode::Awake, 64) };
        table.add_figures(case, &[(row, "time", "ns")]);
    }
    table
}
