//! Models of the gate: items in a counter, takers that wait for one. A lost wake-up shows as a deadlock.

use std::pin::pin;
use std::task::{Context, Poll, Waker};
use std::time::Instant;

use loom::future::block_on;
use loom::thread;

use super::Gate;
use crate::sync::Arc;
use crate::sync::atomic::{AtomicU32, Ordering};

#[derive(Default)]
struct Shelf {
    items: AtomicU32,
}

impl Shelf {
    /// Relaxed on purpose, here and in `take`: what keeps wake-ups from being lost is the gate's pair of fences.
    /// Tried: without the fence in `waiters_now`, or without the one before `attempt`, loom finds the deadlock.
    fn put(&self, n: u32) {
        self.items.fetch_add(n, Ordering::Relaxed);
    }

    fn take(&self) -> Option<()> {
        let mut items = self.items.load(Ordering::Relaxed);
        while items > 0 {
            match self.items.compare_exchange(items, items - 1, Ordering::Relaxed, Ordering::Relaxed) {
                Ok(_) => return Some(()),
                Err(now) => items = now,
            }
        }
        None
    }
}

fn model(preemptions: usize, body: impl Fn(Arc<Gate>, Arc<Shelf>) + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.check(move || body(Arc::new(Gate::new()), Arc::new(Shelf::default())));
}

fn put_and_wake(gate: &Arc<Gate>, shelf: &Arc<Shelf>, n: u32) -> thread::JoinHandle<()> {
    let (gate, shelf) = (gate.clone(), shelf.clone());
    thread::spawn(move || {
        shelf.put(n);
        gate.wake(n as usize);
    })
}

#[test]
fn loom_task_that_registers_during_a_wake_is_not_forgotten() {
    model(3, |gate, shelf| {
        let waker = put_and_wake(&gate, &shelf, 1);
        block_on(gate.wait_until(|| shelf.take()));
        waker.join().unwrap();
    });
}

#[test]
fn loom_thread_that_registers_during_a_wake_is_not_forgotten() {
    model(3, |gate, shelf| {
        let waker = put_and_wake(&gate, &shelf, 1);
        gate.blocking_wait_until(None, || shelf.take()).unwrap();
        waker.join().unwrap();
    });
}

#[test]
fn loom_thread_and_task_both_get_theirs() {
    model(2, |gate, shelf| {
        let waker = put_and_wake(&gate, &shelf, 2);
        let task = thread::spawn({
            let (gate, shelf) = (gate.clone(), shelf.clone());
            move || block_on(gate.wait_until(|| shelf.take()))
        });
        gate.blocking_wait_until(None, || shelf.take()).unwrap();
        task.join().unwrap();
        waker.join().unwrap();
    });
}

#[test]
fn loom_two_tasks_and_two_wakes_of_one() {
    model(2, |gate, shelf| {
        let task = thread::spawn({
            let (gate, shelf) = (gate.clone(), shelf.clone());
            move || block_on(gate.wait_until(|| shelf.take()))
        });
        let waker = thread::spawn({
            let (gate, shelf) = (gate.clone(), shelf.clone());
            move || {
                for _ in 0..2 {
                    shelf.put(1);
                    gate.wake(1);
                }
            }
        });
        block_on(gate.wait_until(|| shelf.take()));
        task.join().unwrap();
        waker.join().unwrap();
    });
}

#[test]
fn loom_cancelled_task_passes_its_wake_up_on() {
    model(2, |gate, shelf| {
        let other = thread::spawn({
            let (gate, shelf) = (gate.clone(), shelf.clone());
            move || block_on(gate.wait_until(|| shelf.take()))
        });
        let waker = put_and_wake(&gate, &shelf, 1);
        if poll_once_and_drop(&gate, &shelf) {
            shelf.put(1);
            gate.wake(1);
        }
        other.join().unwrap();
        waker.join().unwrap();
    });
}

#[test]
fn loom_cancelled_task_leaves_the_item_to_a_thread() {
    model(2, |gate, shelf| {
        let other = thread::spawn({
            let (gate, shelf) = (gate.clone(), shelf.clone());
            move || gate.blocking_wait_until(None, || shelf.take()).unwrap()
        });
        let waker = put_and_wake(&gate, &shelf, 1);
        if poll_once_and_drop(&gate, &shelf) {
            shelf.put(1);
            gate.wake(1);
        }
        other.join().unwrap();
        waker.join().unwrap();
    });
}

#[test]
fn loom_timed_out_thread_leaves_the_item_to_a_task() {
    model(2, |gate, shelf| {
        let other = thread::spawn({
            let (gate, shelf) = (gate.clone(), shelf.clone());
            move || block_on(gate.wait_until(|| shelf.take()))
        });
        let waker = put_and_wake(&gate, &shelf, 1);
        if gate.blocking_wait_until(Some(Instant::now()), || shelf.take()).is_some() {
            shelf.put(1);
            gate.wake(1);
        }
        other.join().unwrap();
        waker.join().unwrap();
    });
}

#[test]
fn loom_wake_all_reaches_those_that_wait_for_something_else() {
    model(2, |gate, shelf| {
        // Each waits for a shelf of its own, and only the one in this thread may have to be told first.
        let other_shelf = Arc::new(Shelf::default());
        let other = thread::spawn({
            let (gate, shelf) = (gate.clone(), other_shelf.clone());
            move || gate.blocking_wait_until(None, || shelf.take()).unwrap()
        });
        let waker = thread::spawn({
            let (gate, shelf) = (gate.clone(), shelf.clone());
            move || {
                other_shelf.put(1);
                shelf.put(1);
                gate.wake_all();
            }
        });
        block_on(gate.wait_until(|| shelf.take()));
        other.join().unwrap();
        waker.join().unwrap();
    });
}

fn poll_once_and_drop(gate: &Gate, shelf: &Shelf) -> bool {
    let mut wait = pin!(gate.wait_until(|| shelf.take()));
    matches!(wait.as_mut().poll(&mut Context::from_waker(Waker::noop())), Poll::Ready(()))
}
