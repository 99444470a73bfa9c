//! What a taker finds while a sweep has idle slots in its hands.

use std::thread::{JoinHandle, sleep, spawn};
use std::time::{Duration, Instant};

use super::*;
use crate::{PooledSegment, ShmSegmentPool};

const LIMIT: Duration = Duration::from_secs(20);

/// A take on a thread of its own, once that thread sleeps: in line, or at a lock.
///
/// A wait that is not woken finds what it waited for when it times out: that is none of it.
fn sleeping_take(pool: &ShmSegmentPool, len: usize) -> JoinHandle<Option<PooledSegment>> {
    let pool = pool.clone();
    let (tell, told) = std::sync::mpsc::channel();
    let taker = spawn(move || {
        tell.send(rustix::thread::gettid()).unwrap();
        let begun = Instant::now();
        pool.blocking_take_timeout(len, LIMIT).ok().filter(|_| begun.elapsed() < LIMIT)
    });
    let stat = format!("/proc/self/task/{}/stat", told.recv().unwrap().as_raw_nonzero());
    let begun = Instant::now();
    let sleeps = || std::fs::read_to_string(&stat).is_ok_and(|stat| stat.contains(") S "));
    // Seen a few times in a row: what is asleep on the way to the take goes on at once.
    let mut seen = 0;
    while seen < 20 && !taker.is_finished() && begun.elapsed() < LIMIT {
        seen = if sleeps() { seen + 1 } else { 0 };
        sleep(Duration::from_millis(1));
    }
    taker
}

/// One idle segment of small slots, all of which a sweep has in its hands during the take.
fn take_during_a_sweep(beside: bool) -> (Option<PooledSegment>, PoolStats) {
    let pool = ShmSegmentPool::new(ShmPoolConfig::new().max_bytes(4 << 20));
    drop(pool.try_take(100).unwrap());
    let core = pool.core();
    let waiter = beside.then(|| core.budget.gate.join(Lane::Main));
    let sweeping = core.sweep.lock();
    let in_hand = core.class(class::class_of(100).unwrap()).take_all();
    assert!(in_hand.len() > 1);
    let taker = sleeping_take(&pool, 100);
    in_hand.into_iter().for_each(|slot| core.keep(slot));
    drop(sweeping);
    let taken = taker.join().unwrap();
    drop(waiter);
    (taken, pool.stats())
}

#[test]
fn take_beside_a_waiter_during_a_sweep_gets_what_the_sweep_puts_back() {
    let (taken, stats) = take_during_a_sweep(true);
    assert!(taken.is_some(), "{stats:?}");
    assert_eq!((stats.segments, stats.waiters, stats.in_use()), (1, 0, 1));
}

#[test]
fn take_during_a_sweep_makes_no_segment_while_slots_of_its_size_are_idle() {
    let (taken, stats) = take_during_a_sweep(false);
    assert!(taken.is_some(), "{stats:?}");
    assert_eq!((stats.segments, stats.in_use()), (1, 1), "{stats:?}");
}
