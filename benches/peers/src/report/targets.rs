//! What this crate set out to reach, each beside what it is measured by, and whether it did in this run.

use std::fmt::Write as _;

use super::table::Table;
use super::unit::digits;

/// A cell: table, row, column.
type Place = (&'static str, &'static str, &'static str);

struct Target {
    what: &'static str,
    goal: Goal,
    /// The measured cell, and what it is divided by.
    cell: Place,
    by: Option<Place>,
    /// `by` counts so many times.
    times: f64,
    /// A cell that nothing could beat, divided in the same way.
    floor: Option<Place>,
}

#[derive(Clone, Copy)]
enum Goal {
    AtMost(f64),
    AtLeast(f64),
}
use Goal::{AtLeast, AtMost};

const QUEUE: Place = ("micro", "ArrayQueue, pop and push", "time");
const CAS: Place = ("micro", "swap and compare-exchange", "time");
const LISTENER: Place = ("micro", "event-listener, notify and wait", "time");
const SMALL: &str = "64 B";

#[rustfmt::skip]
const TARGETS: &[Target] = &[
    target("pool, take and drop, 64 B ÷ `ArrayQueue`", AtMost(1.4), ("micro", "pool, take and drop, 64 B", "time"), QUEUE),
    target("pool, take and drop, 1 MiB ÷ `ArrayQueue`", AtMost(1.4), ("micro", "pool, take and drop, 1 MiB", "time"), QUEUE),
    target("pool, 1 MiB, cold ÷ warm", AtLeast(20_000.0), ("micro", "pool, take and drop, 1 MiB, cold", "time"), ("micro", "pool, take and drop, 1 MiB", "time")),
    target("pool, two threads ÷ `ArrayQueue`", AtMost(1.5), ("micro", "pool, take and drop, two threads", "time"), ("micro", "ArrayQueue, two threads", "time")),
    target("event set, notify and wait ÷ swap and CAS", AtMost(1.3), ("micro", "event, notify and wait", "time"), CAS),
    target("event set, notify and `wait_async` ÷ swap and CAS", AtMost(1.3), ("micro", "event, notify and wait_async", "time"), CAS),
    target("event set, notify and wait ÷ event-listener", AtMost(0.6), ("micro", "event, notify and wait", "time"), LISTENER),
    target("event across threads, sync ÷ raw futex", AtMost(1.1), ("micro", "event across threads, wait", "time"), ("micro", "futex across threads", "time")),
    target("event across threads, async ÷ `Notify`", AtMost(1.1), ("micro", "event across threads, wait_async", "time"), ("micro", "Notify across threads", "time")),
    target("hop awake, 64 B ÷ iceoryx2", AtMost(0.5), ("awake", "tokio-shm", SMALL), ("awake", "iceoryx2", SMALL)).above(("awake", "floor: spin", SMALL)),
    target("hop awake, 4 KiB ÷ iceoryx2", AtMost(0.5), ("awake", "tokio-shm", "4 KiB"), ("awake", "iceoryx2", "4 KiB")).above(("awake", "floor: spin", "4 KiB")),
    target("hop awake, 64 KiB ÷ iceoryx2", AtMost(0.5), ("awake", "tokio-shm", "64 KiB"), ("awake", "iceoryx2", "64 KiB")).above(("awake", "floor: spin", "64 KiB")),
    target("hop awake, 1 MiB ÷ iceoryx2", AtMost(0.5), ("awake", "tokio-shm", "1 MiB"), ("awake", "iceoryx2", "1 MiB")).above(("awake", "floor: spin", "1 MiB")),
    target("hop parked, one core ÷ eventfd + AsyncFd", AtMost(1.15), ("parked-one-core", "tokio-shm", SMALL), ("parked-one-core", "floor: eventfd + AsyncFd", SMALL)),
    target("hop parked, one core ÷ Unix stream", AtMost(1.0), ("parked-one-core", "tokio-shm", SMALL), ("parked-one-core", "Unix stream", SMALL)),
    target("hop parked, one core ÷ Unix seqpacket", AtMost(1.0), ("parked-one-core", "tokio-shm", SMALL), ("parked-one-core", "Unix seqpacket", SMALL)),
    target("stream of 64 B ÷ iceoryx2", AtLeast(4.0), ("stream", "tokio-shm", SMALL), ("stream", "iceoryx2", SMALL)).above(("stream", "floor: spin", SMALL)),
    target("stream of 64 B, `feed` and `flush` ÷ iceoryx2", AtLeast(8.0), ("stream", "tokio-shm, feed and flush", SMALL), ("stream", "iceoryx2", SMALL)).above(("stream", "floor: spin", SMALL)),
    target("stream of 1 MiB ÷ written and read in a bare ring", AtLeast(0.95), ("stream", "tokio-shm", "1 MiB"), ("stream", "floor: spin", "1 MiB")),
    target("blocked sender goes on ÷ hop parked, one core", AtMost(1.2), ("blocked", "tokio-shm", "one core, after 1 ms"), ("parked-one-core", "tokio-shm", SMALL)).above(("blocked", "floor: eventfd + AsyncFd", "one core, after 1 ms")),
    target("blocked sender goes on ÷ hop parked, two cores", AtMost(1.2), ("blocked", "tokio-shm", "two cores, after 1 ms"), ("parked-two-cores", "tokio-shm", SMALL)).above(("blocked", "floor: eventfd + AsyncFd", "two cores, after 1 ms")),
    // 40 ns and 80 ns where the queue takes 11 ns.
    target("loan and send, no subscriber ÷ `ArrayQueue`", AtMost(3.6), ("micro", "loan and send, no subscriber", "time"), QUEUE),
    target("loan and send, one awake subscriber ÷ `ArrayQueue`", AtMost(7.3), ("micro", "loan and send, one awake subscriber", "time"), QUEUE),
    Target { by: None, ..target("idle topic, publisher, % of a core", AtMost(0.005), ("cpu", "tokio-shm", "idle, publisher"), QUEUE) },
    Target { by: None, ..target("idle topic, subscriber, % of a core", AtMost(0.005), ("cpu", "tokio-shm", "idle, subscriber"), QUEUE) },
    Target { by: None, ..target("60 Hz topic, publisher, % of a core", AtMost(2.0), ("cpu", "tokio-shm", "60 Hz, publisher"), QUEUE) },
    Target { by: None, ..target("60 Hz topic, subscriber, % of a core", AtMost(2.0), ("cpu", "tokio-shm", "60 Hz, subscriber"), QUEUE) },
    Target { times: 16.0, ..target("16 subscribers ÷ 16 × one", AtMost(0.6), ("fan-out", "tokio-shm", "16 subscribers"), ("fan-out", "tokio-shm", "1 subscriber")) }
        .above(("fan-out", "floor: eventfd + AsyncFd, a ring each", "16 subscribers")),
];

const fn target(what: &'static str, goal: Goal, cell: Place, by: Place) -> Target {
    Target { what, goal, cell, by: Some(by), times: 1.0, floor: None }
}

impl Target {
    const fn above(self, floor: Place) -> Self {
        Self { floor: Some(floor), ..self }
    }
}

/// In Markdown; those that were not measured are left out.
pub(crate) fn markdown(tables: &[Table]) -> String {
    let mut text = "| | goal | measured | | the floor's |\n|---|---|---|---|---|\n".to_owned();
    for target in TARGETS {
        let Some(measured) = quotient(tables, target.cell, target.by) else { continue };
        let measured = measured / target.times;
        let (goal, reached) = match target.goal {
            AtMost(most) => (format!("≤ {most}"), measured <= most),
            AtLeast(least) => (format!("≥ {least}"), measured >= least),
        };
        let floor = target
            .floor
            .and_then(|floor| quotient(tables, floor, target.by))
            .map(|floor| floor / target.times);
        let _ = writeln!(
            text,
            "| {} | {goal} | {} | {} | {} |",
            target.what,
            digits(measured),
            if reached { "reached" } else { "**missed**" },
            floor.map_or(String::new(), digits),
        );
    }
    text
}

/// Round by round where both are of one table.
fn quotient(tables: &[Table], cell: Place, by: Option<Place>) -> Option<f64> {
    let find = |name: &str| tables.iter().find(|table| table.name == name);
    let table = find(cell.0)?;
    match by {
        None => table.median(cell.1, cell.2),
        Some(by) if by.0 == cell.0 => table.ratio(cell.1, cell.2, (by.1, by.2)),
        Some(by) => Some(table.median(cell.1, cell.2)? / find(by.0)?.median(by.1, by.2)?),
    }
}
