//! Parts of this crate beside what one would otherwise use, in one process; on one core where not said otherwise.
//!
//! Each is run for some milliseconds, all of them in turn, several times; the figure is the median.

mod across;

use std::hint::black_box;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::task::{Context, Poll, Waker};
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_queue::ArrayQueue;
use event_listener::{Event, Listener, listener};
use tokio::sync::Notify;
use tokio_shm::event::event;
use tokio_shm::{ShmPoolConfig, ShmSegmentPool};

use crate::case::Case;
use crate::payload;
use crate::process::pin as pin_to;
use crate::report::Measured;
use crate::stats::median;

const TURNS: usize = 11;
const MIB: usize = 1 << 20;

/// Does it so many times; how long that took.
type Timed = Box<dyn FnMut(u64) -> Duration>;

pub(super) fn near(case: &Case) -> Vec<Measured> {
    let mut items = items();
    let span = Duration::from_millis(case.effort_ms) / TURNS as u32 / items.len() as u32;
    let mut counts = Vec::new();
    for (_, item) in &mut items {
        let mut count = 1;
        while item(count) < span / 2 {
            count *= 2;
        }
        counts.push(count);
    }
    let mut times = vec![Vec::new(); items.len()];
    for _ in 0..TURNS {
        for (((_, item), count), times) in items.iter_mut().zip(&counts).zip(&mut times) {
            times.push(item(*count).as_nanos() as f64 / *count as f64);
        }
    }
    items.iter().zip(&mut times).map(|((name, _), times)| Measured::new(name, median(times))).collect()
}

fn items() -> Vec<(&'static str, Timed)> {
    let mut items: Vec<(&'static str, Timed)> = vec![
        ("pool_small", pool(64, true)),
        ("pool_large", pool(MIB, true)),
        ("pool_cold", pool(MIB, false)),
        ("queue", queue()),
        ("pool_two", two_threads(pool_operation(64))),
        ("queue_two", two_threads(queue_operation())),
        ("write_read", write_read()),
    ];
    items.extend(already_set());
    items.extend(across::items());
    items
}

/// Times a loop around `operation`.
fn timed(mut operation: impl FnMut() + 'static) -> Timed {
    Box::new(move |count| {
        let start = Instant::now();
        for _ in 0..count {
            operation();
        }
        start.elapsed()
    })
}

fn pool(len: usize, warm: bool) -> Timed {
    let pool = ShmSegmentPool::new(ShmPoolConfig::new().pooling(warm));
    timed(move || drop(black_box(pool.try_take(len).expect("take"))))
}

fn queue() -> Timed {
    timed(queue_operation())
}

fn pool_operation(len: usize) -> impl Fn() + Send + Sync + 'static {
    let pool = ShmSegmentPool::new(ShmPoolConfig::new());
    // Two, so that each thread finds one.
    drop([pool.try_take(len).expect("take"), pool.try_take(len).expect("take")]);
    move || drop(black_box(pool.try_take(len).expect("take")))
}

/// What the pool is built on, bare.
fn queue_operation() -> impl Fn() + Send + Sync + 'static {
    let queue = ArrayQueue::new(8);
    for value in 0..2_usize {
        queue.push(Box::new(value)).expect("room");
    }
    move || {
        // With two threads it may look empty or full for a moment.
        let value = loop {
            if let Some(value) = queue.pop() {
                break value;
            }
        };
        let mut value = black_box(value);
        while let Err(back) = queue.push(value) {
            value = back;
        }
    }
}

/// Two threads on two cores, each doing it so many times.
fn two_threads(operation: impl Fn() + Send + Sync + 'static) -> Timed {
    let operation = Arc::new(operation);
    Box::new(move |count| {
        let barrier = Arc::new(std::sync::Barrier::new(2));
        let other = thread::spawn({
            let (operation, barrier) = (Arc::clone(&operation), Arc::clone(&barrier));
            move || {
                pin_to(1);
                barrier.wait();
                (0..count).for_each(|_| operation());
            }
        });
        barrier.wait();
        let start = Instant::now();
        (0..count).for_each(|_| operation());
        other.join().expect("no panic");
        start.elapsed()
    })
}

/// The payload's part of a message of 1 MiB that need not cross to another core.
fn write_read() -> Timed {
    let mut bytes = vec![0; MIB];
    let mut number = 0;
    timed(move || {
        number += 1;
        payload::write(black_box(&mut bytes), number);
        black_box(payload::read(black_box(&bytes)));
    })
}

/// One notify and one wait on the same thread, with nobody asleep.
fn already_set() -> [(&'static str, Timed); 5] {
    let (notifier, waiter) = event();
    let (async_notifier, async_waiter) = event();
    let (listened, notify, state) = (Event::new(), Notify::new(), AtomicU32::new(0));
    [
        (
            "event",
            timed(move || {
                notifier.notify().expect("a waiter");
                waiter.wait().expect("a notifier");
            }),
        ),
        (
            "event_async",
            timed(move || {
                async_notifier.notify().expect("a waiter");
                ready(pin!(async_waiter.wait_async())).expect("a notifier");
            }),
        ),
        (
            "event_listener",
            timed(move || {
                listener!(listened => listener);
                listened.notify(1);
                listener.wait();
            }),
        ),
        (
            "notify",
            timed(move || {
                notify.notify_one();
                ready(pin!(notify.notified()));
            }),
        ),
        (
            "swap_cas",
            timed(move || {
                black_box(state.swap(1, Ordering::AcqRel));
                let _ = black_box(state.compare_exchange(1, 0, Ordering::AcqRel, Ordering::Relaxed));
            }),
        ),
    ]
}

/// Polls in place, as an `await` would.
#[inline]
fn ready<T>(future: Pin<&mut impl Future<Output = T>>) -> T {
    match future.poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(value) => value,
        Poll::Pending => panic!("it was set"),
    }
}
