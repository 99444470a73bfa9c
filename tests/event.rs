//! The promises of an event: sticky, collapsing, one at a time, closing, cancel safe. And each fault that earlier
//! designs had.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Barrier, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use tokio_shm::event::{Notifier, WaitTimeoutError, Waiter, event};
use tokio_test::{assert_pending, assert_ready, assert_ready_err, assert_ready_ok, task};

/// Long enough that only a hang gets there.
const LIMIT: Duration = Duration::from_secs(if cfg!(miri) { 600 } else { 20 });

/// Runs `body` in a thread, and fails if it does not end.
fn spawn_bounded<T: Send + 'static>(body: impl FnOnce() -> T + Send + 'static) -> impl FnOnce() -> T {
    let (done, outcome) = mpsc::channel();
    thread::spawn(move || done.send(body()));
    move || outcome.recv_timeout(LIMIT).expect("the thread hangs or has panicked")
}

fn is_closed<T>(outcome: Result<T, WaitTimeoutError>) -> bool {
    matches!(outcome, Err(WaitTimeoutError::Closed(_)))
}

#[test]
fn handles_and_futures_cross_threads() {
    fn send_and_sync<T: Send + Sync + Clone + 'static>() {}
    fn send<T: Send>(_: &T) {}
    send_and_sync::<Notifier>();
    send_and_sync::<Waiter>();
    let (_notifier, waiter) = event();
    send(&waiter.wait_async());
}

#[test]
fn notify_without_waiter_makes_the_next_wait_return_at_once() {
    let (notifier, waiter) = event();
    notifier.notify().unwrap();
    waiter.wait().unwrap();
    notifier.notify().unwrap();
    waiter.wait_timeout(Duration::ZERO).unwrap();
    notifier.notify().unwrap();
    waiter.wait_deadline(Instant::now()).unwrap();
    notifier.notify().unwrap();
    assert_ready_ok!(task::spawn(waiter.wait_async()).poll());
    notifier.notify().unwrap();
    assert_eq!(waiter.try_wait(), Ok(true));
    assert_eq!(waiter.try_wait(), Ok(false));
}

#[test]
fn several_notifies_collapse_into_one() {
    let (notifier, waiter) = event();
    for _ in 0..3 {
        notifier.notify().unwrap();
    }
    waiter.wait().unwrap();
    assert_eq!(waiter.wait_timeout(Duration::ZERO), Err(WaitTimeoutError::Timeout));
    assert_pending!(task::spawn(waiter.wait_async()).poll());
}

#[test]
fn time_out_too_long_for_the_clock_waits_for_ever() {
    let (notifier, waiter) = event();
    let waiting = spawn_bounded(move || waiter.wait_timeout(Duration::MAX));
    notifier.notify().unwrap();
    waiting().unwrap();
}

#[test]
fn async_wait_needs_no_runtime() {
    let (notifier, waiter) = event();
    let mut waiting = task::spawn(waiter.wait_async());
    assert_pending!(waiting.poll());
    notifier.notify().unwrap();
    assert!(waiting.is_woken());
    assert_ready_ok!(waiting.poll());
}

#[test]
fn closing_keeps_a_pending_notify_for_one_wait() {
    let (notifier, waiter) = event();
    notifier.notify().unwrap();
    drop(notifier);
    waiter.wait().unwrap();
    assert!(waiter.wait().is_err());
    assert!(waiter.try_wait().is_err());
    assert!(is_closed(waiter.wait_timeout(LIMIT)));
    assert_ready_err!(task::spawn(waiter.wait_async()).poll());
}

#[test]
fn closing_keeps_a_pending_notify_for_one_async_wait() {
    let (notifier, waiter) = event();
    let mut first = task::spawn(waiter.wait_async());
    let mut second = task::spawn(waiter.wait_async());
    assert_pending!(first.poll());
    assert_pending!(second.poll());
    notifier.notify().unwrap();
    drop(notifier);
    assert!(first.is_woken() && second.is_woken());
    // Whichever comes first: here the one that the notify did not choose.
    assert_ready_ok!(second.poll());
    assert_ready_err!(first.poll());
}

#[test]
fn closing_after_a_clone_is_gone_takes_the_last_one() {
    let (notifier, waiter) = event();
    let clone = notifier.clone();
    drop(notifier);
    assert_eq!(waiter.try_wait(), Ok(false));
    clone.notify().unwrap();
    drop(clone);
    assert_eq!(waiter.try_wait(), Ok(true));
    assert!(waiter.try_wait().is_err());
}

#[test]
fn last_waiter_gone_makes_notify_an_error() {
    let (notifier, waiter) = event();
    let clone = waiter.clone();
    drop(waiter);
    notifier.notify().unwrap();
    drop(clone);
    let error = notifier.notify().unwrap_err();
    assert!(error.to_string().contains("every waiter"), "{error}");
    assert!(notifier.notify().is_err());
}

#[test]
fn one_notify_wakes_one_of_many_threads() {
    for _ in 0..200 {
        let (notifier, waiter) = event();
        let waiting: Vec<_> = (0..4)
            .map(|_| {
                let waiter = waiter.clone();
                spawn_bounded(move || waiter.wait().is_ok())
            })
            .collect();
        notifier.notify().unwrap();
        drop(notifier);
        assert_eq!(waiting.into_iter().filter_map(|join| join().then_some(())).count(), 1);
    }
}

#[test]
fn one_notify_wakes_one_of_many_tasks() {
    let (notifier, waiter) = event();
    let mut tasks: Vec<_> = (0..4).map(|_| task::spawn(waiter.wait_async())).collect();
    for task in &mut tasks {
        assert_pending!(task.poll());
    }
    notifier.notify().unwrap();
    assert_eq!(tasks.iter().filter(|task| task.is_woken()).count(), 1);
    assert_ready_ok!(tasks[0].poll());
    for task in &mut tasks[1..] {
        assert_pending!(task.poll());
    }
}

#[test]
fn one_notify_lets_one_of_threads_and_tasks_through() {
    for _ in 0..200 {
        let (notifier, waiter) = event();
        let mut task = task::spawn(waiter.wait_async());
        assert_pending!(task.poll());
        let thread = spawn_bounded({
            let waiter = waiter.clone();
            move || waiter.wait().is_ok()
        });
        notifier.notify().unwrap();
        drop(notifier);
        let task = assert_ready!(task.poll()).is_ok();
        assert_ne!(task, thread());
    }
}

/// A plain store once overwrote a close that had come between its load and itself; waiters hung.
#[test]
fn close_during_a_wait_is_not_overwritten() {
    for _ in 0..if cfg!(miri) { 20 } else { 2_000 } {
        let (notifier, waiter) = event();
        let start = Arc::new(Barrier::new(2));
        let waiting = spawn_bounded({
            let start = start.clone();
            move || {
                start.wait();
                let mut taken = 0;
                while waiter.wait().is_ok() {
                    taken += 1;
                }
                taken
            }
        });
        start.wait();
        notifier.notify().unwrap();
        notifier.notify().unwrap();
        drop(notifier);
        assert!((1..=2).contains(&waiting()));
    }
}

/// A wait on a detached thread once outlived its cancelled future, and took the notify meant for the next wait.
#[tokio::test(start_paused = true)]
async fn async_wait_cancelled_by_a_time_out_does_not_take_the_next_notify() {
    let (notifier, waiter) = event();
    for _ in 0..100 {
        let timed_out = tokio::time::timeout(Duration::from_millis(1), waiter.wait_async()).await;
        assert!(timed_out.is_err());
        notifier.notify().unwrap();
        tokio::time::timeout(LIMIT, waiter.wait_async()).await.unwrap().unwrap();
    }
}

#[test]
fn chosen_task_dropped_passes_its_wake_up_on_to_a_task() {
    let (notifier, waiter) = event();
    let mut first = task::spawn(waiter.wait_async());
    let mut second = task::spawn(waiter.wait_async());
    assert_pending!(first.poll());
    assert_pending!(second.poll());
    notifier.notify().unwrap();
    assert!(first.is_woken() && !second.is_woken());
    drop(first);
    assert!(second.is_woken());
    assert_ready_ok!(second.poll());
}

#[test]
fn chosen_task_dropped_leaves_the_notify_to_a_thread() {
    for _ in 0..200 {
        let (notifier, waiter) = event();
        let mut first = task::spawn(waiter.wait_async());
        assert_pending!(first.poll());
        let thread = spawn_bounded({
            let waiter = waiter.clone();
            move || waiter.wait()
        });
        notifier.notify().unwrap();
        drop(first);
        thread().unwrap();
    }
}

#[test]
fn chosen_task_dropped_leaves_the_event_set() {
    let (notifier, waiter) = event();
    let mut first = task::spawn(waiter.wait_async());
    assert_pending!(first.poll());
    notifier.notify().unwrap();
    drop(first);
    assert_eq!(waiter.try_wait(), Ok(true));
}

/// `Notify` keeps a permit for nobody; `enable()` takes it, and it is gone if that future is dropped. Here such a permit
/// is left over on purpose, and lost on purpose: the event must notice neither.
#[test]
fn permit_taken_by_enable_and_dropped_loses_no_notify() {
    let (notifier, waiter) = event();
    let mut chosen = task::spawn(waiter.wait_async());
    assert_pending!(chosen.poll());
    notifier.notify().unwrap();
    drop(chosen); // chosen, and nobody to pass it on to: a permit stays behind
    let mut takes_permit = task::spawn(waiter.wait_async());
    assert_eq!(waiter.try_wait(), Ok(true));
    assert_pending!(takes_permit.poll());
    drop(takes_permit);

    let mut next = task::spawn(waiter.wait_async());
    assert_pending!(next.poll());
    notifier.notify().unwrap();
    assert!(next.is_woken());
    assert_ready_ok!(next.poll());
}

/// The same permit, when the event is set again before it is taken: it must not be worth a second `Ok`.
#[test]
fn left_over_permit_is_not_worth_a_notify() {
    let (notifier, waiter) = event();
    let mut chosen = task::spawn(waiter.wait_async());
    assert_pending!(chosen.poll());
    notifier.notify().unwrap();
    assert_eq!(waiter.try_wait(), Ok(true));
    drop(chosen);
    let mut waiting = task::spawn(waiter.wait_async());
    assert_pending!(waiting.poll());
    notifier.notify().unwrap();
    assert_ready_ok!(waiting.poll());
    assert_pending!(task::spawn(waiter.wait_async()).poll());
}

/// `Notify` promises a `notify_one` only to a future that was polled or enabled.
#[test]
fn future_not_polled_yet_gets_the_notify_all_the_same() {
    let (notifier, waiter) = event();
    let mut waiting = task::spawn(waiter.wait_async());
    notifier.notify().unwrap();
    assert_ready_ok!(waiting.poll());
}

#[test]
fn task_woken_too_late_waits_on() {
    let (notifier, waiter) = event();
    let mut slow = task::spawn(waiter.wait_async());
    assert_pending!(slow.poll());
    notifier.notify().unwrap();
    waiter.wait().unwrap();
    assert_pending!(slow.poll());
    notifier.notify().unwrap();
    assert!(slow.is_woken());
    assert_ready_ok!(slow.poll());
}

/// Each notify waits until the one before was taken, so one that is lost between a time-out and the next wait stops
/// everything.
#[test]
fn time_out_at_the_moment_of_a_notify_loses_nothing() {
    const ROUNDS: usize = if cfg!(miri) { 50 } else { 5_000 };

    let (ping, pinged) = event();
    let (pong, ponged) = event();
    let waiting = spawn_bounded(move || {
        let mut taken = 0;
        loop {
            let timeout = Duration::from_nanos((taken % 64) as u64 * 500);
            match pinged.wait_timeout(timeout) {
                Ok(()) => {
                    taken += 1;
                    pong.notify().unwrap();
                }
                Err(WaitTimeoutError::Timeout) => {}
                Err(_) => return taken,
            }
        }
    });
    for _ in 0..ROUNDS {
        ping.notify().unwrap();
        ponged.wait_timeout(LIMIT).expect("the notify was lost");
    }
    drop(ping);
    assert_eq!(waiting(), ROUNDS);
}

/// Items are counted beside the event, and each producer notifies after its item. So when the last wait ends with the
/// close, every item must have been seen: one left over is a lost notify, and a hang is a lost wake-up.
#[test]
fn crowd_of_threads_and_tasks_loses_nothing() {
    const PRODUCERS: usize = 3;
    const WAITERS: usize = 2; // of each kind
    const ITEMS: usize = if cfg!(miri) { 20 } else { 3_000 }; // of each producer

    struct Counts {
        items: AtomicUsize,
        seen: AtomicUsize,
        woken: AtomicUsize,
    }

    impl Counts {
        fn take(&self) {
            self.woken.fetch_add(1, Ordering::Relaxed);
            // Relaxed: the event orders it.
            self.seen.fetch_add(self.items.swap(0, Ordering::Relaxed), Ordering::Relaxed);
        }
    }

    let counts = Arc::new(Counts {
        items: AtomicUsize::new(0),
        seen: AtomicUsize::new(0),
        woken: AtomicUsize::new(0),
    });
    let (notifier, waiter) = event();
    let mut joins: Vec<Box<dyn FnOnce()>> = Vec::new();
    for _ in 0..WAITERS {
        let (patient, hasty) = (waiter.clone(), waiter.clone());
        let (for_patient, for_hasty) = (counts.clone(), counts.clone());
        joins.push(Box::new(spawn_bounded(move || {
            while patient.wait().is_ok() {
                for_patient.take();
            }
        })));
        joins.push(Box::new(spawn_bounded(move || {
            loop {
                match hasty.wait_timeout(Duration::from_micros(20)) {
                    Ok(()) => for_hasty.take(),
                    Err(WaitTimeoutError::Timeout) => {}
                    Err(_) => break,
                }
            }
        })));
    }
    let for_tasks = counts.clone();
    joins.push(Box::new(spawn_bounded(move || {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_time().build().unwrap();
        runtime.block_on(async {
            let mut tasks = tokio::task::JoinSet::new();
            for _ in 0..WAITERS {
                let (patient, hasty) = (waiter.clone(), waiter.clone());
                let (for_patient, for_hasty) = (for_tasks.clone(), for_tasks.clone());
                tasks.spawn(async move {
                    while patient.wait_async().await.is_ok() {
                        for_patient.take();
                    }
                });
                tasks.spawn(async move {
                    loop {
                        // Cancelled after one turn of the scheduler: sometimes chosen in between.
                        let outcome = tokio::select! {
                            biased;
                            outcome = hasty.wait_async() => outcome,
                            () = tokio::task::yield_now() => continue,
                        };
                        match outcome {
                            Ok(()) => for_hasty.take(),
                            Err(_) => break,
                        }
                    }
                });
            }
            drop(waiter);
            while let Some(outcome) = tasks.join_next().await {
                outcome.unwrap();
            }
        });
    })));
    for _ in 0..PRODUCERS {
        let (notifier, counts) = (notifier.clone(), counts.clone());
        joins.push(Box::new(spawn_bounded(move || {
            for _ in 0..ITEMS {
                counts.items.fetch_add(1, Ordering::Relaxed);
                notifier.notify().unwrap();
            }
        })));
    }
    drop(notifier);
    for join in joins {
        join();
    }
    assert_eq!(counts.seen.load(Ordering::Relaxed), PRODUCERS * ITEMS, "a notify was lost");
    assert!(counts.woken.load(Ordering::Relaxed) <= PRODUCERS * ITEMS, "a notify was taken twice");
}

/// Without the close at the end to help: two threads and two tasks hand one notify around, and each turn depends on it.
#[test]
fn single_notify_handed_around_threads_and_tasks_keeps_going() {
    const TURNS: usize = if cfg!(miri) { 100 } else { 10_000 };

    let (notifier, waiter) = event();
    let turns = Arc::new(AtomicUsize::new(0));
    let (over, ended) = event();
    let mut joins = Vec::new();
    for kind in 0..4 {
        let (waiter, turns, over, notifier) = (waiter.clone(), turns.clone(), over.clone(), notifier.clone());
        joins.push(spawn_bounded(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            loop {
                let outcome =
                    if kind % 2 == 0 { waiter.wait() } else { runtime.block_on(waiter.wait_async()) };
                if outcome.is_err() {
                    return;
                }
                if turns.fetch_add(1, Ordering::AcqRel) + 1 >= TURNS {
                    return over.notify().unwrap();
                }
                notifier.notify().unwrap();
            }
        }));
    }
    notifier.notify().unwrap();
    ended.wait_timeout(LIMIT).expect("the notify was lost on its way");
    assert_eq!(turns.load(Ordering::Relaxed), TURNS);
    // The others still wait: one more notify each lets them see that it is over.
    for _ in 0..joins.len() - 1 {
        notifier.notify().unwrap();
        ended.wait_timeout(LIMIT).expect("the notify was lost on its way");
    }
    for join in joins {
        join();
    }
}
