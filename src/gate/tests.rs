use std::sync::atomic::AtomicUsize;
use std::time::Duration;

use tokio_test::{assert_pending, assert_ready_eq, task};

use super::*;

/// Long enough that only a hang gets there.
const LIMIT: Duration = Duration::from_secs(if cfg!(miri) { 600 } else { 20 });

#[derive(Default)]
struct Shelf(AtomicUsize);

impl Shelf {
    fn put(&self, n: usize) {
        self.0.fetch_add(n, Ordering::AcqRel);
    }

    fn take(&self) -> Option<()> {
        self.0
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |items| items.checked_sub(1))
            .ok()
            .map(|_| ())
    }
}

fn limit() -> Option<Instant> {
    Some(Instant::now() + LIMIT)
}

#[test]
fn condition_already_true_does_not_register() {
    let gate = Gate::new();
    assert_ready_eq!(task::spawn(gate.wait_until(|| Some(3))).poll(), 3);
    assert_eq!(gate.blocking_wait_until(None, || Some(4)), Some(4));
    assert!(!gate.has_waiters());
}

#[test]
fn wake_of_n_wakes_n_tasks() {
    let (gate, shelf) = (Gate::new(), Shelf::default());
    let mut tasks: Vec<_> = (0..3).map(|_| task::spawn(gate.wait_until(|| shelf.take()))).collect();
    for task in &mut tasks {
        assert_pending!(task.poll());
    }
    assert!(gate.has_waiters());
    shelf.put(2);
    gate.wake(2);
    let woken: Vec<_> = tasks.iter().map(|task| task.is_woken()).collect();
    assert_eq!(woken, [true, true, false]);
    assert_ready_eq!(tasks[0].poll(), ());
    assert_ready_eq!(tasks[1].poll(), ());
    assert_pending!(tasks[2].poll());
    drop(tasks);
    assert!(!gate.has_waiters());
}

#[test]
fn wake_in_vain_keeps_the_task_waiting() {
    let (gate, shelf) = (Gate::new(), Shelf::default());
    let mut waiting = task::spawn(gate.wait_until(|| shelf.take()));
    assert_pending!(waiting.poll());
    gate.wake(1);
    assert!(waiting.is_woken());
    assert_pending!(waiting.poll());
    shelf.put(1);
    gate.wake(1);
    assert!(waiting.is_woken());
    assert_ready_eq!(waiting.poll(), ());
}

#[test]
fn cancelled_task_passes_its_wake_up_on() {
    let (gate, shelf) = (Gate::new(), Shelf::default());
    let mut first = task::spawn(gate.wait_until(|| shelf.take()));
    let mut second = task::spawn(gate.wait_until(|| shelf.take()));
    assert_pending!(first.poll());
    assert_pending!(second.poll());
    shelf.put(1);
    gate.wake(1);
    assert!(first.is_woken() && !second.is_woken());
    drop(first);
    assert!(second.is_woken());
    assert_ready_eq!(second.poll(), ());
}

#[test]
fn wake_all_wakes_every_task() {
    let (gate, shelf) = (Gate::new(), Shelf::default());
    let mut first = task::spawn(gate.wait_until(|| None::<()>));
    let mut second = task::spawn(gate.wait_until(|| shelf.take()));
    assert_pending!(first.poll());
    assert_pending!(second.poll());
    shelf.put(1);
    gate.wake_all();
    assert!(first.is_woken() && second.is_woken());
    assert_pending!(first.poll());
    assert_ready_eq!(second.poll(), ());
}

#[test]
fn deadline_in_the_past_still_makes_an_attempt_after_registering() {
    let gate = Gate::new();
    let mut attempts = 0;
    let outcome = gate.blocking_wait_until(Some(Instant::now()), || {
        attempts += 1;
        (attempts == 3).then_some(attempts)
    });
    // At once, registered, and after the time-out.
    assert_eq!(outcome, Some(3));
    assert_eq!(gate.blocking_wait_until(Some(Instant::now()), || None::<()>), None);
    assert!(!gate.has_waiters());
}

#[test]
fn attempt_may_wake_the_same_gate() {
    let (gate, shelf) = (Gate::new(), Shelf::default());
    shelf.put(1);
    let mut attempts = 0;
    let outcome = gate.blocking_wait_until(limit(), || {
        attempts += 1;
        gate.wake(1);
        (attempts == 4).then(|| shelf.take()).flatten()
    });
    assert_eq!(outcome, Some(()));
}

#[test]
fn future_is_send() {
    fn send<T: Send>(_: &T) {}
    let (gate, shelf) = (Gate::new(), Shelf::default());
    send(&gate.wait_until(|| shelf.take()));
}

#[test]
fn items_through_a_crowd_of_threads_and_tasks_all_arrive() {
    const ITEMS: usize = if cfg!(miri) { 50 } else { 10_000 };
    const TAKERS: usize = 3;

    let (gate, shelf, taken) = (Gate::new(), Shelf::default(), AtomicUsize::new(0));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    // A taker claims the number of its item, and ends when all are claimed.
    let claim = || {
        shelf.take()?;
        Some(taken.fetch_add(1, Ordering::AcqRel) + 1)
    };
    let ended = || (taken.load(Ordering::Acquire) >= ITEMS).then_some(usize::MAX);
    let attempt = || ended().or_else(claim);
    std::thread::scope(|scope| {
        for _ in 0..TAKERS {
            scope.spawn(|| {
                while gate.blocking_wait_until(limit(), attempt).expect("a wake-up was lost") < ITEMS {}
                gate.wake_all();
            });
        }
        scope.spawn(|| {
            for _ in 0..ITEMS {
                shelf.put(1);
                gate.wake(1);
            }
        });
        runtime.block_on(async {
            let takers = std::iter::repeat_with(|| async {
                loop {
                    // A time-out of zero cancels a wait that is not over at once, now and then after it was chosen.
                    let cancelled = tokio::time::timeout(Duration::ZERO, gate.wait_until(attempt)).await;
                    let taken = match cancelled {
                        Ok(taken) => taken,
                        Err(_) => tokio::time::timeout(LIMIT, gate.wait_until(attempt))
                            .await
                            .expect("a wake-up was lost"),
                    };
                    if taken >= ITEMS {
                        return gate.wake_all();
                    }
                }
            });
            futures::future::join_all(takers.take(TAKERS)).await;
        });
    });
    assert_eq!(taken.load(Ordering::Relaxed), ITEMS);
}
