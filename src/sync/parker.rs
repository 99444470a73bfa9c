//! [`Parker`]: how a thread waits to be woken by a [`Waker`].

use std::sync::Arc;
use std::task::{Wake, Waker};
use std::time::Instant;

use super::Futex;

/// Puts one thread to sleep, and its waker ends that.
#[derive(Clone)]
pub(crate) struct Parker {
    sleep: Arc<Sleep>,
    waker: Waker,
}

struct Sleep(Futex);

impl Wake for Sleep {
    fn wake(self: Arc<Self>) {
        self.0.wake(1);
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.0.wake(1);
    }
}

impl Parker {
    pub(crate) fn new() -> Self {
        let sleep = Arc::new(Sleep(Futex::new()));
        Self { waker: Waker::from(Arc::clone(&sleep)), sleep }
    }

    /// The calling thread's own, made once. (In a model each time: a thread there ends with it.)
    pub(crate) fn of_this_thread() -> Self {
        #[cfg(not(any(tokio_shm_loom, tokio_shm_shuttle)))]
        {
            thread_local! {
                static OWN: Parker = Parker::new();
            }
            // Gone while the thread ends.
            OWN.try_with(Self::clone).unwrap_or_else(|_| Self::new())
        }
        #[cfg(any(tokio_shm_loom, tokio_shm_shuttle))]
        Self::new()
    }

    pub(crate) fn waker(&self) -> &Waker {
        &self.waker
    }

    /// How often it was woken; to be read before the look that leads to sleeping.
    pub(crate) fn wakes(&self) -> u32 {
        self.sleep.0.wakes()
    }

    /// Sleeps until it is woken, or `deadline`, or for no reason; not at all if it was woken more often than `wakes`. `true` if the
    /// deadline has come.
    pub(crate) fn sleep(&self, wakes: u32, deadline: Option<Instant>) -> bool {
        self.sleep.0.sleep(wakes, deadline)
    }
}
