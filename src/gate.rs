//! Waiting for a condition that the caller tests: an empty queue, a subscriber, the end.
//!
//! The condition lives elsewhere, in somebody's atomics; the gate only knows which tasks want to look at it again. What makes it true
//! calls [`wake_all`](Gate::wake_all), which costs one plain load while nothing waits.
//!
//! A gate remembers nothing: a wake-up that finds no waiter leaves no trace. All look at once and in no order: where there is less than
//! all wait for, or threads wait as well, [`FairGate`] keeps the order.
//!
//! # Why no wake-up is lost
//! Two words are involved, the condition and the gate's count, so it takes two fences: the waker makes the condition true,
//! *fence*, looks at the count; a waiter raises the count, *fence*, looks at the condition. Whichever fence comes first, at
//! least one of them sees the other.

mod fair;

#[cfg(all(test, tokio_shm_loom))]
mod loom_tests;
#[cfg(all(test, not(tokio_shm_loom)))]
mod tests;

use std::fmt;
use std::pin::pin;

#[cfg(not(tokio_shm_loom))]
pub(crate) use self::fair::Turn;
pub(crate) use self::fair::{FairGate, Lane};
use crate::sync::atomic::{AtomicUsize, Ordering, fence};
use crate::sync::{Notify, fence_after_rmw};

/// Where tasks wait until a condition is worth another look; see the module.
pub(crate) struct Gate {
    /// Waiting tasks. Each adds itself before it looks at the condition, and takes itself off on leaving; nothing
    /// else writes it. Too many is at worst a wake-up in vain.
    waiting: AtomicUsize,
    tasks: Notify,
}

impl Gate {
    pub(crate) fn new() -> Self {
        Self { waiting: AtomicUsize::new(0), tasks: Notify::new() }
    }

    /// Makes all that wait look again.
    ///
    /// The caller's last access to memory that others look at must have been a read-modify-write: the one that
    /// made the condition true.
    #[inline]
    pub(crate) fn wake_all(&self) {
        if self.has_waiters() {
            self.tasks.notify_waiters();
        }
    }

    /// Whether a task waits. The same contract as for [`wake_all`](Self::wake_all): after `false`, one that comes sees the condition.
    #[inline]
    pub(crate) fn has_waiters(&self) -> bool {
        // SYNC POINT: condition made true, gate read.
        fence_after_rmw();
        self.waiting.load(Ordering::Relaxed) != 0
    }

    /// Waits until `attempt` returns something.
    ///
    /// `attempt` is called at once, and again whenever the condition may have changed, always without any lock: it may wake
    /// this gate or others.
    ///
    /// # Cancel safety
    /// Cancel safe: dropped before completion, `attempt` has not succeeded.
    pub(crate) async fn wait_until<T>(&self, mut attempt: impl FnMut() -> Option<T>) -> T {
        if let Some(value) = attempt() {
            return value;
        }
        let _counted = self.count();
        loop {
            let mut notified = pin!(self.tasks.notified());
            // From here on a wake-up finds this task in the queue.
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

    fn count(&self) -> Counted<'_> {
        // Relaxed: the fence after it is what orders it.
        self.waiting.fetch_add(1, Ordering::Relaxed);
        Counted(self)
    }
}

impl fmt::Debug for Gate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Gate").field("waiting", &self.waiting.load(Ordering::Relaxed)).finish()
    }
}

/// A waiter's place in the count, taken back when it leaves in whatever way.
struct Counted<'a>(&'a Gate);

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(1, Ordering::Relaxed);
    }
}
