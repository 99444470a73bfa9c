//! Models of the fair gate: items in a counter, takers that wait for some. A lost wake-up shows as a deadlock.

use std::pin::pin;
use std::task::{Context, Poll, Waker};
use std::time::Instant;

use loom::future::block_on;
use loom::thread;

use super::{FairGate, Lane};
use crate::sync::Arc;
use crate::sync::atomic::{AtomicU32, Ordering};

struct Shelf {
    gate: FairGate,
    items: AtomicU32,
}

impl Shelf {
    /// Relaxed on purpose, here and in `take`: what keeps wake-ups from being lost is the gate's pair of fences.
    /// Tried: without the fence in `has_waiters`, or without the one in `look`, loom finds the deadlock.
    fn put(&self, n: u32) {
        self.items.fetch_add(n, Ordering::Relaxed);
        self.gate.wake();
    }

    fn take(&self, n: u32) -> Option<()> {
        let mut items = self.items.load(Ordering::Relaxed);
        while items >= n {
            match self.items.compare_exchange(items, items - n, Ordering::Relaxed, Ordering::Relaxed) {
                Ok(_) => return Some(()),
                Err(now) => items = now,
            }
        }
        None
    }

    async fn wait(&self, n: u32) {
        self.gate.wait_until(Lane::Main, || None, |_| self.take(n)).await;
    }

    fn block(&self, n: u32, deadline: Option<Instant>) -> Option<()> {
        self.gate.blocking_wait_until(Lane::Main, deadline, || None, |_| self.take(n))
    }
}

fn model(preemptions: usize, body: impl Fn(Arc<Shelf>) + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.check(move || body(Arc::new(Shelf { gate: FairGate::new(), items: AtomicU32::new(0) })));
}

fn run(shelf: &Arc<Shelf>, body: impl FnOnce(&Shelf) + 'static) -> thread::JoinHandle<()> {
    let shelf = shelf.clone();
    thread::spawn(move || body(&shelf))
}

#[test]
fn loom_task_that_joins_during_a_wake_is_not_forgotten() {
    model(3, |shelf| {
        let putter = run(&shelf, |shelf| shelf.put(1));
        block_on(shelf.wait(1));
        putter.join().unwrap();
    });
}

#[test]
fn loom_thread_that_joins_during_a_wake_is_not_forgotten() {
    model(3, |shelf| {
        let putter = run(&shelf, |shelf| shelf.put(1));
        shelf.block(1, None).unwrap();
        putter.join().unwrap();
    });
}

#[test]
fn loom_thread_and_task_both_get_theirs_of_one_wake() {
    model(2, |shelf| {
        let putter = run(&shelf, |shelf| shelf.put(2));
        let task = run(&shelf, |shelf| block_on(shelf.wait(1)));
        shelf.block(1, None).unwrap();
        task.join().unwrap();
        putter.join().unwrap();
    });
}

#[test]
fn loom_pieces_add_up_for_the_first_and_the_next_gets_the_rest() {
    model(2, |shelf| {
        let putter = run(&shelf, |shelf| (0..3).for_each(|_| shelf.put(1)));
        let small = run(&shelf, |shelf| block_on(shelf.wait(1)));
        shelf.block(2, None).unwrap();
        small.join().unwrap();
        putter.join().unwrap();
    });
}

#[test]
fn loom_cancelled_task_passes_its_turn_on() {
    model(2, |shelf| {
        let other = run(&shelf, |shelf| block_on(shelf.wait(1)));
        let putter = run(&shelf, |shelf| shelf.put(1));
        let taken = {
            let mut wait = pin!(shelf.wait(1));
            matches!(wait.as_mut().poll(&mut Context::from_waker(Waker::noop())), Poll::Ready(()))
        };
        if taken {
            shelf.put(1);
        }
        other.join().unwrap();
        putter.join().unwrap();
    });
}

#[test]
fn loom_thread_that_timed_out_passes_its_turn_on() {
    model(2, |shelf| {
        let other = run(&shelf, |shelf| shelf.block(1, None).unwrap());
        let putter = run(&shelf, |shelf| shelf.put(1));
        if shelf.block(1, Some(Instant::now())).is_some() {
            shelf.put(1);
        }
        other.join().unwrap();
        putter.join().unwrap();
    });
}

#[test]
fn loom_urgent_waiter_that_pushes_in_leaves_the_turn_to_the_first() {
    model(2, |shelf| {
        let urgent = run(&shelf, |shelf| {
            block_on(shelf.gate.wait_until(Lane::Urgent, || None, |_| shelf.take(1)));
        });
        let putter = run(&shelf, |shelf| shelf.put(2));
        block_on(shelf.gate.wait_until(Lane::Side, || None, |_| shelf.take(1)));
        urgent.join().unwrap();
        putter.join().unwrap();
    });
}

#[test]
fn loom_end_reaches_the_second_in_line() {
    model(2, |shelf| {
        let over = Arc::new(AtomicU32::new(0));
        let wait = |shelf: &Shelf, over: &AtomicU32| {
            let ended = || (over.load(Ordering::Relaxed) != 0).then_some(());
            block_on(shelf.gate.wait_until(Lane::Main, ended, |_| None));
        };
        let other = run(&shelf, {
            let over = over.clone();
            move |shelf| wait(shelf, &over)
        });
        let ender = run(&shelf, {
            let over = over.clone();
            move |shelf| {
                over.fetch_add(1, Ordering::Relaxed);
                shelf.gate.wake_all();
            }
        });
        wait(&shelf, &over);
        other.join().unwrap();
        ender.join().unwrap();
    });
}
