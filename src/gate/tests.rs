use std::cell::Cell;

use tokio_test::{assert_pending, assert_ready_eq, task};

use super::*;

#[test]
fn condition_already_true_does_not_register() {
    let gate = Gate::new();
    assert_ready_eq!(task::spawn(gate.wait_until(|| Some(3))).poll(), 3);
    assert!(!gate.has_waiters());
}

#[test]
fn wake_all_wakes_every_task() {
    let (gate, open) = (Gate::new(), Cell::new(false));
    let mut first = task::spawn(gate.wait_until(|| None::<()>));
    let mut second = task::spawn(gate.wait_until(|| open.get().then_some(())));
    assert_pending!(first.poll());
    assert_pending!(second.poll());
    assert!(gate.has_waiters());
    open.set(true);
    gate.wake_all();
    assert!(first.is_woken() && second.is_woken());
    assert_pending!(first.poll());
    assert_ready_eq!(second.poll(), ());
    drop((first, second));
    assert!(!gate.has_waiters());
}

#[test]
fn wake_in_vain_keeps_the_task_waiting() {
    let (gate, open) = (Gate::new(), Cell::new(false));
    let mut waiting = task::spawn(gate.wait_until(|| open.get().then_some(())));
    assert_pending!(waiting.poll());
    gate.wake_all();
    assert!(waiting.is_woken());
    assert_pending!(waiting.poll());
    open.set(true);
    gate.wake_all();
    assert!(waiting.is_woken());
    assert_ready_eq!(waiting.poll(), ());
}
