//! Many are killed at once, or in line, or after a sender, and not the publisher's own task, has read their greetings.
//!
//! Each round has a publisher of its own. What it is about happens while the publisher's runtime does nothing, so that it is certain
//! which thread does a step.

use std::future::Future;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use rustix::process::{Resource, getrlimit};
use tokio::runtime::{Builder, Runtime};

use super::roles::{CROWD, DEPTH, FILES, LINE, QUEUE};
use super::victim::Victim;
use super::{
    AT_ONCE, CROWDS, Case, Fallible, POOL, SIZES, Tally, at_once, end_if_it_hangs, footprint, goal, left_in,
    message, publisher_in, random_below, run, runtime_dir, since, sleep_for_a_random_time, subscriber_in,
};
use crate::sys::clock::monotonic_ns;
use crate::sys::testing::{is_alone, open_descriptors, set_limit};
use crate::{OnFull, RecvError, ShmPoolConfig, ShmPublisher};

/// Of so many kills that the other tests do one is done here: a crowd takes its time.
const SHARE: usize = 20;
/// More tasks than tokio polls between two looks at its I/O.
const TASKS: usize = 100;
/// Processes with a crowd each.
const CROWDED: usize = 4;

#[test]
#[ignore = "the survivors of kill_of_hundreds_of_those_in_line_or_greeted_by_a_sender_harms_nobody_else"]
#[allow(clippy::print_stdout)] // The parent reads it.
fn child_crowds_killed() {
    if !is_alone() {
        return;
    }
    end_if_it_hangs();
    let mut cases = CROWDS;
    if getrlimit(Resource::Nofile).maximum.is_none_or(|maximum| maximum >= FILES) {
        set_limit(Resource::Nofile, FILES);
    } else {
        println!(
            "\nkills: crowds: SKIPPED: hundreds at once, because RLIMIT_NOFILE cannot be raised to {FILES}"
        );
        cases = cases.split_last().expect("the crowd is the last").1;
    }
    // With all that is made only once.
    let (dir, runtime) = (runtime_dir(), quiet());
    let publisher = bind(&runtime, OnFull::Wait, dir.path()).unwrap();
    drop(subscriber_in(dir.path()).connect().unwrap());
    go_on(&runtime, publisher).unwrap();
    drop(runtime);
    run("crowds", goal().div_ceil(SHARE), cases, |case, on_full, victim, tally| {
        let before = footprint();
        let dir = runtime_dir();
        match case.script {
            "greets" => greeted_by_a_sender(on_full, victim, tally, dir.path()),
            "line" => in_line(on_full, victim, tally, dir.path()),
            "naps" => with_others_in_line(on_full, victim, dir.path()),
            _ => crowd(case, on_full, victim, tally, dir.path()),
        }?;
        // No process is left to remove anything.
        drop(subscriber_in(dir.path()).connect().map_err(|error| error.to_string())?);
        at_once("descriptors and mappings are what they were", || footprint() == before)
            .map_err(|fault| format!("{fault}: {before:?}, {:?}", footprint()))?;
        match left_in(dir.path()) {
            left if left.is_empty() => Ok(()),
            left => Err(format!("left in the directory: {left:?}")),
        }
    });
}

/// A runtime that does nothing but when it is driven.
fn quiet() -> Runtime {
    Builder::new_current_thread().enable_all().build().expect("a runtime")
}

fn bind(runtime: &Runtime, on_full: OnFull, dir: &Path) -> Fallible<ShmPublisher> {
    let builder = publisher_in(dir).pool(ShmPoolConfig::new().max_bytes(POOL)).max_subscribers(1_000);
    let builder = builder.on_full(on_full).queue(QUEUE).runtime(runtime.handle().clone());
    builder.bind().map_err(|error| error.to_string())
}

/// Has the runtime do what there is to do.
fn drive(runtime: &Runtime) {
    runtime.block_on(async {
        for _ in 0..20 {
            tokio::task::yield_now().await;
        }
    });
}

/// Runs `future`, for no longer than a survivor may take.
fn within<T>(
    runtime: &Runtime,
    what: &str,
    future: impl Future<Output = Result<T, impl ToString>>,
) -> Fallible<T> {
    match runtime.block_on(async { tokio::time::timeout(AT_ONCE, future).await }) {
        Ok(done) => done.map_err(|error| error.to_string()),
        Err(_) => Err(format!("{what}: not within {AT_ONCE:?}")),
    }
}

/// Sends more than any link takes.
fn send(runtime: &Runtime, publisher: &ShmPublisher) -> Fallible<()> {
    within(runtime, "senders go on", async {
        for seq in 0..u64::from(3 * DEPTH) {
            publisher.send(message(seq, SIZES[0])).await.map_err(|error| error.to_string())?;
        }
        publisher.flush().await.map_err(|error| error.to_string())
    })
}

/// One look of a sender, which may accept who has connected and read greetings.
fn look(publisher: &ShmPublisher) {
    let _ = tokio_test::task::spawn(publisher.flush()).poll();
}

/// Nothing waits for the dead: more is sent than any link takes, and all of it comes back.
fn go_on(runtime: &Runtime, publisher: ShmPublisher) -> Fallible<()> {
    send(runtime, &publisher)?;
    at_once("everything is back", || {
        drive(runtime);
        publisher.pool().stats().in_use() == 0
    })?;
    within(runtime, "close", publisher.close())
}

/// A sender reads the greeting, and so adds the link; its subscriber is killed before the task that watches it knows.
fn greeted_by_a_sender(on_full: OnFull, victim: &mut Victim, tally: &mut Tally, dir: &Path) -> Fallible<()> {
    let runtime = quiet();
    let publisher = bind(&runtime, on_full, dir)?;
    victim.order("subscriber", "greets", on_full, None, dir)?;
    victim.hear("connected")?;
    // Else the sender accepts it as well.
    if random_below(4) > 0 {
        let before = open_descriptors();
        at_once("it is accepted", || {
            drive(&runtime);
            open_descriptors() > before
        })?;
        // Its task waits for the greeting.
        drive(&runtime);
    }
    victim.tell("greet")?;
    victim.hear("greeted")?;
    // So many come first that the runtime has looked at its I/O, and seen the death, before that task hears of the greeting.
    (0..TASKS).for_each(|_| drop(runtime.spawn(async {})));
    at_once("a sender has read its greeting", || {
        look(&publisher);
        publisher.subscriber_count() == 1
    })?;
    let died_at = victim.kill();
    victim.see_die(|_| ())?;
    at_once("its link is gone", || {
        drive(&runtime);
        publisher.subscriber_count() == 0
    })?;
    tally.time("link gone after", since(died_at));
    go_on(&runtime, publisher)
}

/// Some are killed that have not been served, others wait behind them.
fn in_line(on_full: OnFull, victim: &mut Victim, tally: &mut Tally, dir: &Path) -> Fallible<()> {
    let runtime = quiet();
    let publisher = bind(&runtime, on_full, dir)?;
    victim.order("subscriber", "line", on_full, None, dir)?;
    victim.hear("ready")?;
    let mut next = Victim::start();
    next.order("subscriber", "awaits", on_full, None, dir)?;
    // Else some have their links, by a sender, and no task that watches them yet.
    if random_below(2) == 0 {
        look(&publisher);
    }
    let died_at = victim.kill();
    victim.see_die(|_| ())?;
    at_once("the living alone are served", || {
        drive(&runtime);
        publisher.subscriber_count() == 1
    })?;
    tally.time("links gone after", since(died_at));
    send(&runtime, &publisher)?;
    next.hear("ready")?;
    next.kill();
    next.see_die(|_| ())?;
    at_once("its link is gone", || {
        drive(&runtime);
        publisher.subscriber_count() == 0
    })?;
    go_on(&runtime, publisher)
}

/// A publisher is killed that has served none of those who have connected.
fn with_others_in_line(on_full: OnFull, victim: &mut Victim, dir: &Path) -> Fallible<()> {
    victim.order("publisher", "naps", on_full, None, dir)?;
    victim.hear("bound")?;
    let connect = |ends| subscriber_in(dir).end_with_last_publisher(ends).connect();
    let line: Result<Vec<_>, _> = (0..LINE).map(|number| connect(number % 2 == 0)).collect();
    let mut line = line.map_err(|error| error.to_string())?;
    victim.kill();
    victim.see_die(|_| ())?;
    for subscriber in line.iter_mut().step_by(2) {
        let end = loop {
            match subscriber.blocking_recv_timeout(AT_ONCE) {
                Err(RecvError::PublisherLost { .. }) => {}
                end => break end,
            }
        };
        if !matches!(end, Err(RecvError::Closed)) {
            return Err(format!("the end of one in line: {end:?}"));
        }
    }
    let runtime = quiet();
    let publisher = bind(&runtime, on_full, dir)?;
    for mut subscriber in line.into_iter().skip(1).step_by(2) {
        within(&runtime, "the next publisher", async {
            match subscriber.wait_for_publishers(1).await {
                Err(RecvError::PublisherLost { .. }) => subscriber.wait_for_publishers(1).await,
                found => found,
            }
        })?;
    }
    at_once("they are gone", || {
        drive(&runtime);
        publisher.subscriber_count() == 0
    })?;
    go_on(&runtime, publisher)
}

/// Some hundreds of subscribers, of which some are killed, then all.
fn crowd(case: &Case, on_full: OnFull, victim: &mut Victim, tally: &mut Tally, dir: &Path) -> Fallible<()> {
    let runtime = Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("a runtime");
    let publisher = bind(&runtime, on_full, dir)?;
    let mut others: Vec<_> = (1..CROWDED).map(|_| Victim::start()).collect();
    let mut crowds: Vec<_> = others.iter_mut().chain([victim]).collect();
    for crowd in &mut crowds {
        crowd.order("subscriber", "crowd", on_full, None, dir)?;
    }
    for crowd in &mut crowds {
        crowd.hear("ready")?;
    }
    at_once("all have their links", || publisher.subscriber_count() == CROWDED * CROWD)?;
    let (sent, stop) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
    let sending = {
        let (publisher, sent, stop) = (publisher.clone(), Arc::clone(&sent), Arc::clone(&stop));
        runtime.spawn(async move {
            while !stop.load(Ordering::SeqCst) {
                let seq = sent.load(Ordering::SeqCst);
                publisher.send(message(seq, SIZES[0])).await.expect("send");
                sent.store(seq + 1, Ordering::SeqCst);
                // Others have to run, here and there.
                tokio::time::sleep(Duration::from_micros(100)).await;
            }
        })
    };
    let goes_on = || {
        let before = sent.load(Ordering::SeqCst);
        at_once("senders go on", || sent.load(Ordering::SeqCst) > before + 2)
    };
    goes_on()?;
    let some = 1 + random_below(CROWDED as u64 - 1) as usize;
    for (dead, living) in [(0..some, CROWDED - some), (some..CROWDED, 0)] {
        sleep_for_a_random_time(5_000);
        for crowd in &mut crowds[dead.clone()] {
            crowd.kill();
        }
        let died_at = monotonic_ns();
        for crowd in &mut crowds[dead] {
            crowd.see_die(|_| ())?;
        }
        at_once("their links are gone", || publisher.subscriber_count() == living * CROWD)?;
        tally.time("hundreds of links gone after", since(died_at));
        goes_on()?;
    }
    (1..CROWDED).for_each(|_| tally.count(case));
    stop.store(true, Ordering::SeqCst);
    runtime.block_on(sending).map_err(|error| error.to_string())?;
    go_on(&runtime, publisher)
}
