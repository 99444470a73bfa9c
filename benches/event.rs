//! What an event costs: `already_set`, one notify and one wait on the same thread with nobody asleep, and `across_threads`,
//! a round trip between two threads that both fall asleep, each beside what one might have used instead.
//!
//! Left out: handles made and dropped, more than one waiter, contention for the state word, and the time that an idle core
//! takes to wake up. Both threads of a round trip run on one core, so that the scheduler's choice of core does not drown
//! the difference; across cores the same trip is ruled by the machine, not by the primitive.
#![allow(missing_docs)] // `criterion_group!` makes public items

use std::hint::black_box;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::task::{Context, Poll, Waker};
use std::thread;

use criterion::{Criterion, criterion_group, criterion_main};
use event_listener::{Event, Listener, listener};
use parking_lot::{Condvar, Mutex};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use tokio::sync::Notify;
use tokio_shm::event::event;

fn already_set(c: &mut Criterion) {
    let mut group = c.benchmark_group("already_set");
    group.bench_function("tokio_shm_sync", |b| {
        let (notifier, waiter) = event();
        b.iter(|| {
            notifier.notify().unwrap();
            waiter.wait().unwrap();
        });
    });
    group.bench_function("tokio_shm_async", |b| {
        let (notifier, waiter) = event();
        b.iter(|| {
            notifier.notify().unwrap();
            ready(pin!(waiter.wait_async())).unwrap();
        });
    });
    // Not sticky: a listener has to be there first. On the stack, which is its fastest way.
    group.bench_function("event_listener", |b| {
        let event = Event::new();
        b.iter(|| {
            listener!(event => listener);
            event.notify(1);
            listener.wait();
        });
    });
    group.bench_function("notify", |b| {
        let notify = Notify::new();
        b.iter(|| {
            notify.notify_one();
            ready(pin!(notify.notified()));
        });
    });
    // The floor: two read-modify-writes.
    group.bench_function("swap_cas", |b| {
        let state = AtomicU32::new(0);
        b.iter(|| {
            black_box(state.swap(1, Ordering::AcqRel));
            black_box(state.compare_exchange(1, 0, Ordering::AcqRel, Ordering::Relaxed)).unwrap();
        });
    });
    group.finish();
}

fn across_threads(c: &mut Criterion) {
    let everywhere = pin_to_first_core();
    let mut group = c.benchmark_group("across_threads");
    group.bench_function("tokio_shm_sync", |b| {
        let (ping, pinged) = event();
        let (pong, ponged) = event();
        let echo = thread::spawn(move || {
            while pinged.wait().is_ok() {
                pong.notify().unwrap();
            }
        });
        b.iter(|| {
            ping.notify().unwrap();
            ponged.wait().unwrap();
        });
        drop(ping);
        echo.join().unwrap();
    });
    group.bench_function("tokio_shm_async", |b| {
        let (ping, pinged) = event();
        let (pong, ponged) = event();
        let echo = thread::spawn(move || {
            runtime().block_on(async {
                while pinged.wait_async().await.is_ok() {
                    pong.notify().unwrap();
                }
            });
        });
        let runtime = runtime();
        b.iter(|| {
            runtime.block_on(async {
                ping.notify().unwrap();
                ponged.wait_async().await.unwrap();
            });
        });
        drop(ping);
        echo.join().unwrap();
    });
    group.bench_function("event_listener", |b| {
        let shared = Arc::new((Event::new(), Event::new(), AtomicBool::new(false)));
        let mut pinged = shared.0.listen();
        let echo = thread::spawn({
            let shared = shared.clone();
            move || {
                let (ping, pong, over) = &*shared;
                loop {
                    pinged.wait();
                    if over.load(Ordering::Acquire) {
                        return;
                    }
                    pinged = ping.listen();
                    pong.notify(1);
                }
            }
        });
        let (ping, pong, over) = &*shared;
        b.iter(|| {
            let ponged = pong.listen();
            ping.notify(1);
            ponged.wait();
        });
        over.store(true, Ordering::Release);
        ping.notify(1);
        echo.join().unwrap();
    });
    group.bench_function("notify", |b| {
        let shared = Arc::new((Notify::new(), Notify::new(), AtomicBool::new(false)));
        let echo = thread::spawn({
            let shared = shared.clone();
            move || {
                let (ping, pong, over) = &*shared;
                runtime().block_on(async {
                    loop {
                        ping.notified().await;
                        if over.load(Ordering::Acquire) {
                            return;
                        }
                        pong.notify_one();
                    }
                });
            }
        });
        let (ping, pong, over) = &*shared;
        let runtime = runtime();
        b.iter(|| {
            runtime.block_on(async {
                ping.notify_one();
                pong.notified().await;
            });
        });
        over.store(true, Ordering::Release);
        ping.notify_one();
        echo.join().unwrap();
    });
    group.bench_function("parking_lot_condvar", |b| {
        let (ping, pong) = (Arc::new(Flag::default()), Arc::new(Flag::default()));
        let over = Arc::new(AtomicBool::new(false));
        let echo = thread::spawn({
            let (ping, pong, over) = (ping.clone(), pong.clone(), over.clone());
            move || {
                loop {
                    ping.wait();
                    if over.load(Ordering::Acquire) {
                        return;
                    }
                    pong.set();
                }
            }
        });
        b.iter(|| {
            ping.set();
            pong.wait();
        });
        over.store(true, Ordering::Release);
        ping.set();
        echo.join().unwrap();
    });
    group.finish();
    sched_setaffinity(None, &everywhere).expect("these cores were allowed before");
}

/// The least that a condvar can be used for as an event.
#[derive(Default)]
struct Flag {
    set: Mutex<bool>,
    condvar: Condvar,
}

impl Flag {
    fn set(&self) {
        *self.set.lock() = true;
        self.condvar.notify_one();
    }

    fn wait(&self) {
        let mut set = self.set.lock();
        while !*set {
            self.condvar.wait(&mut set);
        }
        *set = false;
    }
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().build().expect("a runtime without drivers needs nothing")
}

/// Polls in place, as an `await` would: a future by value would be copied first.
#[inline]
fn ready<T>(future: Pin<&mut impl Future<Output = T>>) -> T {
    match future.poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(value) => value,
        Poll::Pending => panic!("the event was set"),
    }
}

/// Pins this thread, and those it spawns from now on, to one of the cores it may run on. Returns all of them.
fn pin_to_first_core() -> CpuSet {
    let allowed = sched_getaffinity(None).expect("a thread may ask for its own cores");
    let first = (0..CpuSet::MAX_CPU).find(|core| allowed.is_set(*core)).expect("it runs somewhere");
    let mut one = CpuSet::new();
    one.set(first);
    sched_setaffinity(None, &one).expect("this core is allowed");
    allowed
}

criterion_group!(benches, already_set, across_threads);
criterion_main!(benches);
