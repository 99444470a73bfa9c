//! What both ends of an event share: one state word, and the two places where waiters sleep.
//!
//! # The state word
//! The truth is in [`Shared::state`] alone; the futex and the `Notify` only make somebody look at it again.
//!
//! | bits   | meaning         | set by                                  | cleared by              |
//! | ------ | --------------- | --------------------------------------- | ----------------------- |
//! | 0      | `SET`           | any notify                              | the one wait that takes it |
//! | 1      | `NOTIFIERS_GONE`| the drop of the last notifier           | never                   |
//! | 2      | `WAITERS_GONE`  | the drop of the last waiter             | never                   |
//! | 3..32  | sleeping threads| each, `+1` before it sleeps             | the same one, on leaving |
//! | 32..64 | waiting tasks   | each, `+1` before it waits              | the same one, on leaving |
//!
//! Every change is a read-modify-write. A plain store would overwrite what came between it and the load before it: a
//! close was lost that way once, and its waiters hung.
//!
//! Everything being in one word, its modification order decides who looks after whom, and no fence is needed. A notify
//! that comes after a waiter's `+1` sees it and wakes; one that comes before is seen by the waiter, which looks at the word
//! again after its `+1`. A thread that is woken between that look and its sleep does not sleep: it reads how often threads were
//! woken before it looks, and the kernel compares.
//!
//! # Why no wake-up is lost
//! A notify that finds the word unset wakes one sleeper *of each kind* that is there; only one of them can clear `SET`. One
//! kind would not do: a thread may be counted still after it has tried for the last time.
//! One that finds it set leaves the waking to whoever set it. So it is enough that nobody who was woken goes away, or
//! back to sleep, without having tried to clear `SET`:
//! - A thread tries before each sleep, and once more after a time-out.
//! - A task tries after each `enable()`. If it is dropped between having been chosen and having tried, `Notify` chooses
//!   the next task or stores a permit for the next `enable()`. The threads had one of their own woken meanwhile.
//! - A permit left over from an earlier notify costs whoever enables next one more turn of the loop, and the permit
//!   being lost with a dropped future costs nothing.

use std::fmt;
use std::pin::pin;
use std::time::Instant;

use super::{NotifyError, WaitError};
use crate::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use crate::sync::{Futex, Notify};

const SET: u64 = 1 << 0;
const NOTIFIERS_GONE: u64 = 1 << 1;
const WAITERS_GONE: u64 = 1 << 2;

/// One sleeping thread. 29 bits of them: Linux stops at 22.
const THREAD: u64 = 1 << 3;
const THREADS: u64 = TASK - THREAD;

/// One waiting task. 32 bits of them: each has a future of more than a hundred bytes somewhere.
const TASK: u64 = 1 << 32;
const TASKS: u64 = !(TASK - 1);

pub(super) struct Shared {
    state: AtomicU64,
    threads: Futex,
    tasks: Notify,
    /// Handles alive. Whoever takes one to zero closes its side; there is no way back up, for only a handle makes another.
    /// They cannot overflow: the `Arc` that each handle holds would abort long before.
    notifiers: AtomicUsize,
    waiters: AtomicUsize,
}

impl Shared {
    /// With one notifier and one waiter.
    pub(super) fn new() -> Self {
        Self {
            state: AtomicU64::new(0),
            threads: Futex::new(),
            tasks: Notify::new(),
            notifiers: AtomicUsize::new(1),
            waiters: AtomicUsize::new(1),
        }
    }

    #[inline]
    pub(super) fn set(&self) -> Result<(), NotifyError> {
        // A guess first: not set, neither waiters nor a close. To load what is there, as `fetch_or` does on x86-64, takes as long again
        // as half of the locked instruction.
        let mut before = 0;
        // SYNC POINT: event set (Release, read by `try_take` and `take_guessing`). Acquire, so that whoever learns that the waiters are gone
        // sees what they did.
        while let Err(now) =
            self.state.compare_exchange(before, before | SET, Ordering::AcqRel, Ordering::Relaxed)
        {
            before = now;
        }
        if before <= SET { Ok(()) } else { self.set_observed(before) }
    }

    #[inline]
    fn set_observed(&self, before: u64) -> Result<(), NotifyError> {
        if before & WAITERS_GONE != 0 {
            return Err(NotifyError);
        }
        // Whoever set it first does the waking. The wait that it leads to is this notify's, too.
        if before & SET == 0 {
            if before & THREADS != 0 {
                self.threads.wake(1);
            }
            if before & TASKS != 0 {
                self.tasks.notify_one();
            }
        }
        Ok(())
    }

    /// Clears the event: `true` if it was set, an error if it is not and never will be again.
    #[inline]
    pub(super) fn try_take(&self) -> Result<bool, WaitError> {
        loop {
            // SYNC POINT: event closed (Acquire, written by `remove_notifier`).
            let state = self.state.load(Ordering::Acquire);
            if state & SET == 0 {
                // Closed and not set, seen in one look: with no notifier left it stays that way.
                return if state & NOTIFIERS_GONE == 0 { Ok(false) } else { Err(WaitError) };
            }
            // SYNC POINT: event set (Acquire, written by `set`). Later notifies that collapsed into the first, and waiters'
            // counts, continue its release sequence: they are read-modify-writes.
            if self.state.fetch_and(!SET, Ordering::Acquire) & SET != 0 {
                return Ok(true);
            }
        }
    }

    /// As [`try_take`](Self::try_take), for who is going to sleep where it is not set: it guesses that it is, as `set` does. (Who looks
    /// again and again must not take the word from those who change it.)
    #[inline]
    pub(super) fn take_guessing(&self) -> Result<bool, WaitError> {
        // SYNC POINT: event set (Acquire, written by `set`).
        match self.state.compare_exchange(SET, 0, Ordering::Acquire, Ordering::Relaxed) {
            Ok(_) => Ok(true),
            Err(_) => self.try_take(),
        }
    }

    /// Blocks until the event could be cleared; `false` if `deadline` came first.
    // Inlined down to the system call, as the waking is: out of line a round trip of two threads on one core takes a fifth longer. (To
    // return from a call made before a switch seems to be slow.)
    #[inline]
    pub(super) fn sleep(&self, deadline: Option<Instant>) -> Result<bool, WaitError> {
        let _counted = self.count(THREAD);
        let mut timed_out = false;
        loop {
            let wakes = self.threads.wakes();
            // Also after a time-out: a notify just before it found nobody asleep any more.
            if self.try_take()? {
                return Ok(true);
            }
            if timed_out {
                return Ok(false);
            }
            timed_out = self.threads.sleep(wakes, deadline);
        }
    }

    pub(super) async fn wait_async(&self) -> Result<(), WaitError> {
        let _counted = self.count(TASK);
        loop {
            let mut notified = pin!(self.tasks.notified());
            // Before the look at the state, so that a notify in between finds this task in the queue. It is `true` for a
            // permit, perhaps a stale one: then the `await` below comes back at once.
            notified.as_mut().enable();
            if self.try_take()? {
                return Ok(());
            }
            notified.await;
        }
    }

    pub(super) fn add_notifier(&self) {
        self.notifiers.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn add_waiter(&self) {
        self.waiters.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn remove_notifier(&self) {
        // SYNC POINT: handle dropped (both ways). What the other handles did comes before the close, their notifies first
        // of all.
        if self.notifiers.fetch_sub(1, Ordering::AcqRel) != 1 {
            return;
        }
        // SYNC POINT: event closed (Release, read by `try_take`).
        let before = self.state.fetch_or(NOTIFIERS_GONE, Ordering::AcqRel);
        if before & THREADS != 0 {
            self.threads.wake_all();
        }
        if before & TASKS != 0 {
            self.tasks.notify_waiters();
        }
    }

    pub(super) fn remove_waiter(&self) {
        // SYNC POINT: handle dropped (both ways).
        if self.waiters.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.state.fetch_or(WAITERS_GONE, Ordering::AcqRel);
        }
    }

    #[inline]
    fn count(&self, unit: u64) -> Counted<'_> {
        // Ordered by the word's own modification order, see above.
        self.state.fetch_add(unit, Ordering::Relaxed);
        Counted { shared: self, unit }
    }
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.state.load(Ordering::Relaxed);
        f.debug_struct("Event")
            .field("set", &(state & SET != 0))
            .field("notifiers_gone", &(state & NOTIFIERS_GONE != 0))
            .field("waiters_gone", &(state & WAITERS_GONE != 0))
            .field("sleeping_threads", &((state & THREADS) / THREAD))
            .field("waiting_tasks", &((state & TASKS) / TASK))
            .finish()
    }
}

/// A waiter's mark in the state word, taken back when it leaves in whatever way.
struct Counted<'a> {
    shared: &'a Shared,
    unit: u64,
}

impl Drop for Counted<'_> {
    #[inline]
    fn drop(&mut self) {
        self.shared.state.fetch_sub(self.unit, Ordering::Relaxed);
    }
}
