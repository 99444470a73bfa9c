//! Waiting for a condition that the caller tests: room in a pool, a free ticket, an empty queue.
//!
//! The condition lives elsewhere, in somebody's atomics; the gate only knows who wants to look at it again, threads or
//! tasks. Whoever makes it true calls [`wake`](Gate::wake), which costs one plain load while nobody waits.
//!
//! A gate remembers nothing: a wake-up that finds nobody leaves no trace. It is not fair either.
//!
//! # Why no wake-up is lost
//! Two words are involved, the condition and the gate's count, so it takes two fences: the waker makes the condition true,
//! *fence*, looks at the count; a waiter raises the count, *fence*, looks at the condition. Whichever fence comes first, at
//! least one of them sees the other.
//!
//! A waiter that was chosen either looks at the condition again, or passes its wake-up on:
//! - A thread always looks, after a time-out for a last time.
//! - A task may be dropped between having been chosen and looking. Then `Notify` chooses the next task, or stores a permit
//!   that makes the next one to come look twice.
//! - Nothing is passed on between the kinds, and need not be: `wake` wakes as many threads *and* as many tasks as there is
//!   to be had. So if what a dropped task was chosen for is left over, then either a thread was woken for it as
//!   well and looks, or no thread was counted then, and one that came later looked for itself.

#[cfg(all(test, tokio_shm_loom))]
mod loom_tests;
#[cfg(all(test, not(tokio_shm_loom)))]
mod tests;

use std::fmt;
use std::pin::pin;
use std::time::Instant;

use crate::sync::atomic::{AtomicU64, Ordering, fence};
use crate::sync::{Futex, Notify, fence_after_rmw};

/// One waiting thread, in the lower half of the count.
const THREAD: u64 = 1;
/// One waiting task, in the upper half.
const TASK: u64 = 1 << 32;

/// Where threads and tasks wait until a condition is worth another look; see the module.
pub(crate) struct Gate {
    /// Waiting threads and tasks. Each adds itself before it looks at the condition, and takes itself off on leaving; nobody
    /// else writes it. Too many is at worst a wake-up for nobody.
    waiters: AtomicU64,
    threads: Futex,
    tasks: Notify,
}

impl Gate {
    pub(crate) fn new() -> Self {
        Self { waiters: AtomicU64::new(0), threads: Futex::new(), tasks: Notify::new() }
    }

    /// Makes up to `n` threads and up to `n` tasks look again.
    ///
    /// For when the condition came true for `n` of the waiters, any of them: if they wait for different things, use
    /// [`wake_all`](Self::wake_all).
    ///
    /// The caller's last access to memory that others look at must have been a read-modify-write: the one that
    /// made the condition true.
    #[inline]
    pub(crate) fn wake(&self, n: usize) {
        let waiters = self.waiters_now();
        if waiters != 0 {
            self.wake_some(waiters, n);
        }
    }

    /// Makes everybody look again. The same contract as for [`wake`](Self::wake).
    #[inline]
    pub(crate) fn wake_all(&self) {
        let waiters = self.waiters_now();
        if waiters != 0 {
            self.wake_everybody(waiters);
        }
    }

    /// Whether anybody waits. The same contract as for [`wake`](Self::wake): after `false`, whoever comes sees the condition.
    #[inline]
    pub(crate) fn has_waiters(&self) -> bool {
        self.waiters_now() != 0
    }

    /// How many wait, for statistics.
    #[cfg(not(tokio_shm_loom))]
    pub(crate) fn waiters(&self) -> usize {
        let waiters = self.waiters.load(Ordering::Relaxed);
        ((waiters % TASK) + (waiters / TASK)) as usize
    }

    /// Waits until `attempt` returns something.
    ///
    /// `attempt` is called at once, and again whenever the condition may have changed, always without any lock: it may wake
    /// this gate or others. It must not panic: a wake-up it was called for would be lost.
    ///
    /// # Cancel safety
    /// Cancel safe: dropped before completion, `attempt` has not succeeded, and a wake-up meant for it went to another.
    pub(crate) async fn wait_until<T>(&self, mut attempt: impl FnMut() -> Option<T>) -> T {
        if let Some(value) = attempt() {
            return value;
        }
        let _counted = self.count(TASK);
        loop {
            let mut notified = pin!(self.tasks.notified());
            // From here on a wake-up finds this task in the queue. `true` for a permit: then the `await` comes back at once.
            notified.as_mut().enable();
            // SYNC POINT: gate counted, condition read. Each turn, not only the first: it is what orders `enable` before the
            // look as well.
            fence(Ordering::SeqCst);
            if let Some(value) = attempt() {
                return value;
            }
            notified.await;
        }
    }

    /// Blocks the calling thread until `attempt` returns something; `None` if `deadline` came first.
    ///
    /// As [`wait_until`](Self::wait_until), with one last attempt after the deadline.
    pub(crate) fn blocking_wait_until<T>(
        &self,
        deadline: Option<Instant>,
        mut attempt: impl FnMut() -> Option<T>,
    ) -> Option<T> {
        if let Some(value) = attempt() {
            return Some(value);
        }
        let _counted = self.count(THREAD);
        let mut timed_out = false;
        loop {
            // Before the look: a wake-up after it keeps this thread from sleeping.
            let wakes = self.threads.wakes();
            // SYNC POINT: gate counted, condition read.
            fence(Ordering::SeqCst);
            if let Some(value) = attempt() {
                return Some(value);
            }
            if timed_out {
                return None;
            }
            timed_out = self.threads.sleep(wakes, deadline);
        }
    }

    /// Threads and tasks waiting, after everything the caller did before.
    #[inline]
    fn waiters_now(&self) -> u64 {
        // SYNC POINT: condition made true, gate read.
        fence_after_rmw();
        self.waiters.load(Ordering::Relaxed)
    }

    #[inline(never)]
    fn wake_some(&self, waiters: u64, n: usize) {
        let (threads, tasks) = split(waiters);
        if threads != 0 {
            self.threads.wake(threads.min(n));
        }
        for _ in 0..tasks.min(n) {
            self.tasks.notify_one();
        }
    }

    #[inline(never)]
    fn wake_everybody(&self, waiters: u64) {
        let (threads, tasks) = split(waiters);
        if threads != 0 {
            self.threads.wake_all();
        }
        if tasks != 0 {
            self.tasks.notify_waiters();
        }
    }

    fn count(&self, unit: u64) -> Counted<'_> {
        // Relaxed: the fence after it is what orders it.
        self.waiters.fetch_add(unit, Ordering::Relaxed);
        Counted { gate: self, unit }
    }
}

impl fmt::Debug for Gate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (threads, tasks) = split(self.waiters.load(Ordering::Relaxed));
        f.debug_struct("Gate").field("threads", &threads).field("tasks", &tasks).finish()
    }
}

fn split(waiters: u64) -> (usize, usize) {
    // Each half fits in a `usize` wherever tokio runs.
    ((waiters & (TASK - 1)) as usize, (waiters / TASK) as usize)
}

/// A waiter's place in the count, taken back when it leaves in whatever way.
struct Counted<'a> {
    gate: &'a Gate,
    unit: u64,
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.gate.waiters.fetch_sub(self.unit, Ordering::Relaxed);
    }
}
