//! Models of the event: two or three threads, one or two notifies.
//!
//! A wake-up that is lost shows as a deadlock, which loom reports.
#![allow(unsafe_code)]

use std::pin::pin;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use loom::future::block_on;
use loom::thread;

use super::{WaitTimeoutError, event};
use crate::sync::atomic::{AtomicU32, Ordering};
use crate::sync::{Arc, UnsafeCell};

/// Three threads with locks in them are too many interleavings without a bound; most faults need two preemptions.
fn model(preemptions: usize, body: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.check(body);
}

/// A plain value that the event alone orders. Tried: `Relaxed` instead of `AcqRel` in `Shared::set`, and loom reports a
/// causality violation.
struct Handover(UnsafeCell<u32>);

// SAFETY: for the model to find out.
unsafe impl Sync for Handover {}

impl Handover {
    fn write(&self, value: u32) {
        self.0.with_mut(|cell| {
            // SAFETY: loom checks that nobody else accesses it.
            unsafe { *cell = value }
        });
    }

    fn read(&self) -> u32 {
        self.0.with(|cell| {
            // SAFETY: as above.
            unsafe { *cell }
        })
    }
}

#[test]
fn loom_wait_sees_what_was_written_before_notify() {
    model(3, || {
        let (notifier, waiter) = event();
        let data = Arc::new(Handover(UnsafeCell::new(0)));
        let thread = thread::spawn({
            let data = data.clone();
            move || {
                data.write(7);
                notifier.notify().unwrap();
            }
        });
        waiter.wait().unwrap();
        assert_eq!(data.read(), 7);
        thread.join().unwrap();
    });
}

#[test]
fn loom_wait_sees_what_was_written_before_close() {
    model(3, || {
        let (notifier, waiter) = event();
        let data = Arc::new(Handover(UnsafeCell::new(0)));
        let thread = thread::spawn({
            let data = data.clone();
            move || {
                data.write(7);
                drop(notifier);
            }
        });
        assert!(waiter.wait().is_err());
        assert_eq!(data.read(), 7);
        thread.join().unwrap();
    });
}

/// The second notify may come between the look at the word and the clearing of it. Tried: `Relaxed` for the clearing in
/// `Shared::try_take`, and loom finds a value that was missed.
#[test]
fn loom_one_wait_sees_what_came_before_both_of_its_notifies() {
    model(3, || {
        let (notifier, waiter) = event();
        let data = Arc::new([AtomicU32::new(0), AtomicU32::new(0)]);
        let threads = [0, 1].map(|mine| {
            let (notifier, data) = (notifier.clone(), data.clone());
            thread::spawn(move || {
                data[mine].store(1, Ordering::Relaxed);
                notifier.notify().unwrap();
            })
        });
        waiter.wait().unwrap();
        let seen = data.each_ref().map(|value| value.load(Ordering::Relaxed));
        for thread in threads {
            thread.join().unwrap();
        }
        if waiter.try_wait() == Ok(false) {
            assert_eq!(seen, [1, 1], "the one wait took both");
        }
        drop(notifier);
    });
}

#[test]
fn loom_every_collapsed_notify_is_seen_by_the_close() {
    model(2, || {
        let (notifier, waiter) = event();
        let data = Arc::new([Handover(UnsafeCell::new(0)), Handover(UnsafeCell::new(0))]);
        let threads = [0, 1].map(|mine| {
            let (notifier, data) = (notifier.clone(), data.clone());
            thread::spawn(move || {
                data[mine].write(1);
                notifier.notify().unwrap();
            })
        });
        drop(notifier);
        // However they collapse: once the event is closed, both were taken.
        while waiter.wait().is_ok() {}
        assert_eq!(data[0].read() + data[1].read(), 2);
        for thread in threads {
            thread.join().unwrap();
        }
    });
}

#[test]
fn loom_pending_notify_survives_close() {
    model(3, || {
        let (notifier, waiter) = event();
        let thread = thread::spawn(move || notifier.notify().unwrap());
        assert!(waiter.wait().is_ok());
        assert!(waiter.wait().is_err());
        thread.join().unwrap();
    });
}

#[test]
fn loom_pending_notify_survives_close_for_a_task() {
    model(3, || {
        let (notifier, waiter) = event();
        let thread = thread::spawn(move || notifier.notify().unwrap());
        assert!(block_on(waiter.wait_async()).is_ok());
        assert!(block_on(waiter.wait_async()).is_err());
        thread.join().unwrap();
    });
}

#[test]
fn loom_one_notify_lets_one_of_thread_and_task_through() {
    model(2, || {
        let (notifier, waiter) = event();
        let through = Arc::new(AtomicU32::new(0));
        let sleeper = thread::spawn({
            let (waiter, through) = (waiter.clone(), through.clone());
            move || {
                if waiter.wait().is_ok() {
                    through.fetch_add(1, Ordering::Relaxed);
                }
            }
        });
        let task = thread::spawn({
            let through = through.clone();
            move || {
                if block_on(waiter.wait_async()).is_ok() {
                    through.fetch_add(1, Ordering::Relaxed);
                }
            }
        });
        notifier.notify().unwrap();
        drop(notifier);
        sleeper.join().unwrap();
        task.join().unwrap();
        assert_eq!(through.load(Ordering::Relaxed), 1);
    });
}

#[test]
fn loom_one_notify_lets_one_of_two_threads_through() {
    model(2, || {
        let (notifier, waiter) = event();
        let other = thread::spawn({
            let waiter = waiter.clone();
            move || waiter.wait().is_ok()
        });
        let closer = thread::spawn(move || notifier.notify().unwrap());
        let here = waiter.wait().is_ok();
        assert_ne!(here, other.join().unwrap());
        closer.join().unwrap();
    });
}

#[test]
fn loom_cancelled_task_passes_its_wake_up_on_to_a_task() {
    model(2, || {
        let (notifier, waiter) = event();
        let other = thread::spawn({
            let waiter = waiter.clone();
            move || block_on(waiter.wait_async()).is_ok()
        });
        let notifying = thread::spawn(move || {
            notifier.notify().unwrap();
            // The other one must hear of it although the event is not closed yet.
            notifier
        });
        let taken_here = poll_once_and_drop(&waiter);
        let notifier = notifying.join().unwrap();
        if taken_here {
            drop(notifier);
            assert!(!other.join().unwrap());
        } else {
            assert!(other.join().unwrap());
        }
    });
}

#[test]
fn loom_cancelled_task_leaves_its_wake_up_to_a_thread() {
    model(2, || {
        let (notifier, waiter) = event();
        let other = thread::spawn({
            let waiter = waiter.clone();
            move || waiter.wait().is_ok()
        });
        let notifying = thread::spawn(move || {
            notifier.notify().unwrap();
            notifier
        });
        let taken_here = poll_once_and_drop(&waiter);
        let notifier = notifying.join().unwrap();
        if taken_here {
            drop(notifier);
            assert!(!other.join().unwrap());
        } else {
            assert!(other.join().unwrap());
        }
    });
}

#[test]
fn loom_timed_out_thread_loses_no_notify() {
    model(3, || {
        let (notifier, waiter) = event();
        let thread = thread::spawn(move || {
            notifier.notify().unwrap();
            notifier
        });
        match waiter.wait_timeout(Duration::from_secs(1)) {
            Ok(()) => {}
            Err(WaitTimeoutError::Timeout) => waiter.wait().unwrap(),
            Err(WaitTimeoutError::Closed(_)) => unreachable!("the notifier is not dropped"),
        }
        assert_eq!(waiter.try_wait(), Ok(false));
        drop(thread.join().unwrap());
    });
}

/// Why a notify wakes one of each kind: the thread that is counted may have tried for the last time already.
#[test]
fn loom_timed_out_thread_leaves_the_notify_to_a_task() {
    model(2, || {
        let (notifier, waiter) = event();
        let task = thread::spawn({
            let waiter = waiter.clone();
            move || block_on(waiter.wait_async()).is_ok()
        });
        let notifying = thread::spawn(move || {
            notifier.notify().unwrap();
            notifier
        });
        let taken_here = waiter.wait_timeout(Duration::from_secs(1)).is_ok();
        let notifier = notifying.join().unwrap();
        if taken_here {
            drop(notifier);
        }
        assert_ne!(taken_here, task.join().unwrap());
    });
}

#[test]
fn loom_timed_out_thread_leaves_the_notify_to_another() {
    model(2, || {
        let (notifier, waiter) = event();
        let other = thread::spawn({
            let waiter = waiter.clone();
            move || waiter.wait().is_ok()
        });
        let notifying = thread::spawn(move || {
            notifier.notify().unwrap();
            notifier
        });
        let taken_here = waiter.wait_timeout(Duration::from_secs(1)).is_ok();
        let notifier = notifying.join().unwrap();
        if taken_here {
            drop(notifier);
        }
        assert_ne!(taken_here, other.join().unwrap());
    });
}

#[test]
fn loom_close_wakes_threads_and_tasks() {
    model(2, || {
        let (notifier, waiter) = event();
        let sleeper = thread::spawn({
            let waiter = waiter.clone();
            move || waiter.wait()
        });
        let closer = thread::spawn(move || drop(notifier));
        assert!(block_on(waiter.wait_async()).is_err());
        assert!(sleeper.join().unwrap().is_err());
        closer.join().unwrap();
    });
}

#[test]
fn loom_last_waiter_gone_is_told_to_notifiers() {
    model(3, || {
        let (notifier, waiter) = event();
        let other = thread::spawn({
            let waiter = waiter.clone();
            move || drop(waiter)
        });
        drop(waiter);
        // Either answer will do while the other may still be there, but afterwards only one.
        let _ = notifier.notify();
        other.join().unwrap();
        assert!(notifier.notify().is_err());
    });
}

fn poll_once_and_drop(waiter: &super::Waiter) -> bool {
    let mut wait = pin!(waiter.wait_async());
    match wait.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(outcome) => outcome.is_ok(),
        Poll::Pending => false,
    }
}
