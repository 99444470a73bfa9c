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

    fn take(&self, n: usize) -> Option<()> {
        self.0
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |items| items.checked_sub(n))
            .ok()
            .map(|_| ())
    }
}

fn limit() -> Option<Instant> {
    Some(Instant::now() + LIMIT)
}

fn never<T>() -> Option<T> {
    None
}

async fn take(gate: &FairGate, shelf: &Shelf, n: usize) {
    gate.wait_until(Lane::Main, never, |_| shelf.take(n)).await;
}

#[test]
fn condition_already_true_does_not_join_the_line() {
    let gate = FairGate::new();
    assert_ready_eq!(task::spawn(gate.wait_until(Lane::Main, never, |_| Some(3))).poll(), 3);
    assert_eq!(gate.blocking_wait_until(Lane::Main, None, never, |_| Some(4)), Some(4));
    assert!(!gate.has_waiters());
}

#[test]
fn tasks_are_served_in_the_order_in_which_they_came() {
    let (gate, shelf) = (FairGate::new(), Shelf::default());
    let mut tasks: Vec<_> = (0..3).map(|_| task::spawn(take(&gate, &shelf, 1))).collect();
    for task in &mut tasks {
        assert_pending!(task.poll());
    }
    assert_eq!(gate.waiters(), 3);
    shelf.put(2);
    // Not the first: whatever there is, it does not look.
    assert_pending!(tasks[2].poll());
    gate.wake();
    let woken: Vec<_> = tasks.iter().map(|task| task.is_woken()).collect();
    assert_eq!(woken, [true, false, false]);
    assert_ready_eq!(tasks[0].poll(), ());
    assert!(tasks[1].is_woken(), "the turn goes on");
    assert_ready_eq!(tasks[1].poll(), ());
    assert!(tasks[2].is_woken());
    assert_pending!(tasks[2].poll());
    drop(tasks);
    assert!(!gate.has_waiters());
}

#[test]
fn newcomer_does_not_look_before_those_who_wait() {
    let (gate, shelf) = (FairGate::new(), Shelf::default());
    let mut first = task::spawn(take(&gate, &shelf, 2));
    assert_pending!(first.poll());
    shelf.put(1);
    gate.wake();
    let mut newcomer = task::spawn(take(&gate, &shelf, 1));
    assert_pending!(newcomer.poll());
    let blocked = gate.blocking_wait_until(Lane::Main, Some(Instant::now()), never, |_| shelf.take(1));
    assert_eq!(blocked, None, "a thread neither");
    assert_pending!(first.poll());
    shelf.put(1);
    gate.wake();
    assert_ready_eq!(first.poll(), ());
    assert_pending!(newcomer.poll());
}

#[test]
fn waiter_dropped_passes_its_turn_on() {
    let (gate, shelf) = (FairGate::new(), Shelf::default());
    let mut first = task::spawn(take(&gate, &shelf, 2));
    let mut second = task::spawn(take(&gate, &shelf, 1));
    let mut third = task::spawn(take(&gate, &shelf, 1));
    for task in [&mut first, &mut second, &mut third] {
        assert_pending!(task.poll());
    }
    shelf.put(1);
    gate.wake();
    assert!(first.is_woken() && !second.is_woken());
    drop(second);
    assert!(!third.is_woken(), "it was not the second's turn");
    drop(first);
    assert!(third.is_woken());
    assert_ready_eq!(third.poll(), ());
}

#[test]
fn urgent_waiter_comes_first_and_the_side_lane_looks_beside() {
    let (gate, shelf) = (FairGate::new(), Shelf::default());
    let turns = std::cell::RefCell::new(Vec::new());
    let look = |name: &'static str| {
        let (shelf, turns) = (&shelf, &turns);
        move |turn| {
            turns.borrow_mut().push((name, turn));
            shelf.take(1)
        }
    };
    let mut main = task::spawn(gate.wait_until(Lane::Main, never, look("main")));
    let mut side = task::spawn(gate.wait_until(Lane::Side, never, look("side")));
    let mut behind = task::spawn(gate.wait_until(Lane::Side, never, look("behind")));
    let mut urgent = task::spawn(gate.wait_until(Lane::Urgent, never, look("urgent")));
    for task in [&mut main, &mut side, &mut behind, &mut urgent] {
        assert_pending!(task.poll());
    }
    turns.borrow_mut().clear();
    gate.wake();
    let woken = [&main, &side, &behind, &urgent].map(|task| task.is_woken());
    assert_eq!(woken, [false, true, false, true]);
    for task in [&mut main, &mut side, &mut behind, &mut urgent] {
        assert_pending!(task.poll());
    }
    assert_eq!(*turns.borrow(), [("side", Turn::Beside), ("urgent", Turn::First)]);
    shelf.put(1);
    assert_ready_eq!(urgent.poll(), ());
    drop((urgent, main));
    assert_pending!(side.poll());
    assert_eq!(turns.borrow().last(), Some(&("side", Turn::First)));
}

#[test]
fn end_is_seen_by_all_and_the_condition_by_the_first() {
    let (gate, shelf, over) = (FairGate::new(), Shelf::default(), AtomicUsize::new(0));
    let ended = || (over.load(Ordering::Acquire) != 0).then_some(false);
    let mut tasks: Vec<_> = (0..2)
        .map(|_| task::spawn(gate.wait_until(Lane::Main, ended, |_| shelf.take(1).map(|()| true))))
        .collect();
    for task in &mut tasks {
        assert_pending!(task.poll());
    }
    gate.wake_all();
    assert!(tasks.iter().all(|task| task.is_woken()));
    over.fetch_add(1, Ordering::AcqRel);
    for task in tasks.iter_mut().rev() {
        assert_ready_eq!(task.poll(), false);
    }
}

#[test]
fn deadline_in_the_past_still_makes_a_look_after_joining() {
    let gate = FairGate::new();
    let mut looks = 0;
    let outcome = gate.blocking_wait_until(Lane::Main, Some(Instant::now()), never, |_| {
        looks += 1;
        (looks == 3).then_some(looks)
    });
    // At once, in line, and after the time-out.
    assert_eq!(outcome, Some(3));
    assert_eq!(gate.blocking_wait_until(Lane::Main, Some(Instant::now()), never, |_| None::<()>), None);
    assert!(!gate.has_waiters());
}

#[test]
fn attempt_may_wake_the_same_gate_and_what_a_waker_drops_may_come_back_to_it() {
    struct Waking(std::sync::Arc<FairGate>);
    impl std::task::Wake for Waking {
        fn wake(self: std::sync::Arc<Self>) {}
    }
    impl Drop for Waking {
        fn drop(&mut self) {
            self.0.wake();
        }
    }
    let (gate, shelf) = (std::sync::Arc::new(FairGate::new()), Shelf::default());
    let mut wait = std::pin::pin!(gate.wait_until(Lane::Main, never, |_| {
        gate.wake();
        shelf.take(1)
    }));
    for _ in 0..3 {
        let waker = Waker::from(std::sync::Arc::new(Waking(std::sync::Arc::clone(&gate))));
        assert!(wait.as_mut().poll(&mut std::task::Context::from_waker(&waker)).is_pending());
    }
    shelf.put(1);
    let outcome = gate.blocking_wait_until(Lane::Main, Some(Instant::now()), never, |_| shelf.take(1));
    assert_eq!(outcome, None, "it is not this thread's turn");
}

#[test]
fn future_is_send() {
    fn send<T: Send>(_: &T) {}
    let (gate, shelf) = (FairGate::new(), Shelf::default());
    send(&take(&gate, &shelf, 1));
}

#[test]
fn large_wish_is_served_beside_a_crowd_of_threads_and_tasks_with_small_ones() {
    const LARGE: usize = 8;
    let (gate, shelf) = (FairGate::new(), Shelf::default());
    let over = AtomicUsize::new(0);
    let is_over = || over.load(Ordering::Acquire) != 0;
    shelf.put(LARGE);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while !is_over() {
                    gate.blocking_wait_until(Lane::Main, limit(), never, |_| shelf.take(1))
                        .expect("a wake-up was lost");
                    shelf.put(1);
                    gate.wake();
                }
            });
        }
        runtime.block_on(async {
            let small = std::iter::repeat_with(|| async {
                while !is_over() {
                    // A time-out of zero cancels a wait that is not over at once, now and then after it was chosen.
                    if tokio::time::timeout(Duration::ZERO, take(&gate, &shelf, 1)).await.is_err() {
                        tokio::time::timeout(LIMIT, take(&gate, &shelf, 1))
                            .await
                            .expect("a wake-up was lost");
                    }
                    tokio::task::yield_now().await;
                    shelf.put(1);
                    gate.wake();
                }
            });
            let large = async {
                for _ in 0..if cfg!(miri) { 5 } else { 500 } {
                    tokio::time::timeout(LIMIT, take(&gate, &shelf, LARGE)).await.expect("starved");
                    shelf.put(LARGE);
                    gate.wake();
                }
                over.fetch_add(1, Ordering::AcqRel);
            };
            futures::future::join(futures::future::join_all(small.take(3)), large).await;
        });
    });
    assert_eq!((shelf.0.load(Ordering::Relaxed), gate.waiters()), (LARGE, 0));
}
