//! Models of the gate. A lost wake-up shows as a deadlock.

use loom::future::block_on;
use loom::thread;

use super::Gate;
use crate::sync::Arc;
use crate::sync::atomic::{AtomicU32, Ordering};

/// Relaxed on purpose, here and in the looks: what keeps wake-ups from being lost is the gate's pair of fences.
/// Tried: without the fence in `has_waiters`, or without the one before `attempt`, loom finds the deadlock.
fn open(gate: &Gate, door: &AtomicU32) {
    door.fetch_add(1, Ordering::Relaxed);
    gate.wake_all();
}

async fn pass(gate: &Gate, door: &AtomicU32) {
    gate.wait_until(|| (door.load(Ordering::Relaxed) != 0).then_some(())).await;
}

fn model(body: impl Fn(Arc<(Gate, AtomicU32, AtomicU32)>) + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(3);
    builder.check(move || body(Arc::new((Gate::new(), AtomicU32::new(0), AtomicU32::new(0)))));
}

#[test]
fn loom_task_that_registers_during_a_wake_is_not_forgotten() {
    model(|all| {
        let opener = thread::spawn({
            let all = all.clone();
            move || open(&all.0, &all.1)
        });
        block_on(pass(&all.0, &all.1));
        opener.join().unwrap();
    });
}

#[test]
fn loom_tasks_that_wait_for_different_things_are_both_woken() {
    model(|all| {
        let other = thread::spawn({
            let all = all.clone();
            move || block_on(pass(&all.0, &all.2))
        });
        let opener = thread::spawn({
            let all = all.clone();
            move || {
                all.2.fetch_add(1, Ordering::Relaxed);
                open(&all.0, &all.1);
            }
        });
        block_on(pass(&all.0, &all.1));
        other.join().unwrap();
        opener.join().unwrap();
    });
}
