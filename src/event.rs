//! A sticky, one-at-a-time wake-up, awaited from tasks and waited for by threads alike.
//!
//! [`event()`] makes a pair: a [`Notifier`] sets the event, a [`Waiter`] waits until it is set and clears it. Both are
//! cheap to clone. An event carries no data and counts nothing:
//!
//! - *Sticky*: a [`notify`](Notifier::notify) that finds nobody waiting makes the next wait return at once.
//! - *Collapsing*: several notifies that nobody has taken yet are one.
//! - *One at a time*: one notify lets exactly one wait return `Ok`, however many are waiting, in threads or in tasks.
//! - *Closing*: with the last [`Notifier`] gone every wait ends with an error, but a notify still pending is delivered
//!   first. With the last [`Waiter`] gone, `notify` is an error.
//!
//! What was written before a `notify` is visible after the wait that took it, or took a later one it collapsed into.
//!
//! An event does not reach across processes, and it is not fair: a wait that comes just in time may be served before
//! older ones. No tokio runtime is needed for any of it.
//!
//! # Examples
//! ```
//! use tokio_shm::event::event;
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let (notifier, waiter) = event();
//! let worker = std::thread::spawn(move || notifier.notify());
//! waiter.wait_async().await?;
//! # worker.join().unwrap()?;
//! # Ok(())
//! # }
//! ```

mod error;
mod state;

#[cfg(all(test, tokio_shm_loom))]
mod loom_tests;

use std::fmt;
use std::time::{Duration, Instant};

pub use self::error::{NotifyError, WaitError, WaitTimeoutError};
use self::state::Shared;
use crate::sync::Arc;

/// Makes an event that is not set.
///
/// # Examples
/// ```
/// let (notifier, waiter) = tokio_shm::event::event();
/// notifier.notify()?;
/// waiter.wait()?; // returns at once
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[must_use = "an event without both of its ends is closed"]
pub fn event() -> (Notifier, Waiter) {
    let shared = Arc::new(Shared::new());
    (Notifier { shared: shared.clone() }, Waiter { shared })
}

/// The end of an event that sets it. Cloning gives another handle to the same event.
///
/// Dropping the last one closes the event for its waiters.
pub struct Notifier {
    shared: Arc<Shared>,
}

impl Notifier {
    /// Sets the event, and wakes one waiter if any is waiting.
    ///
    /// Exactly one wait returns `Ok` for it: one that is waiting, or else the next to come. If the event is set already,
    /// nothing changes. Never blocks for longer than a waiter needs to go to sleep, so it may be called from async code.
    ///
    /// # Errors
    /// [`NotifyError`] if every [`Waiter`] was dropped. A waiter may still be dropped afterwards without having waited:
    /// `Ok` does not promise that somebody was told.
    ///
    /// # Examples
    /// ```
    /// use tokio_shm::event::event;
    ///
    /// let (notifier, waiter) = event();
    /// notifier.notify()?;
    /// notifier.notify()?; // collapses into the first
    /// assert!(waiter.try_wait()?);
    /// assert!(!waiter.try_wait()?);
    ///
    /// drop(waiter);
    /// assert!(notifier.notify().is_err());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[inline]
    pub fn notify(&self) -> Result<(), NotifyError> {
        self.shared.set()
    }
}

impl Clone for Notifier {
    fn clone(&self) -> Self {
        self.shared.add_notifier();
        Self { shared: self.shared.clone() }
    }
}

impl Drop for Notifier {
    fn drop(&mut self) {
        self.shared.remove_notifier();
    }
}

impl fmt::Debug for Notifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Notifier").field("event", &self.shared).finish()
    }
}

/// The end of an event that waits for it. Cloning gives another handle to the same event.
///
/// A handle may wait several times at once, in threads and in tasks, mixed as they come: one of them is woken for each
/// notify. Dropping the last handle closes the event for its notifiers.
pub struct Waiter {
    shared: Arc<Shared>,
}

impl Waiter {
    /// Clears the event if it is set, without waiting: `true` if it was.
    ///
    /// # Errors
    /// [`WaitError`] if every [`Notifier`] was dropped and no notify is pending any more.
    ///
    /// # Examples
    /// ```
    /// # let (notifier, waiter) = tokio_shm::event::event();
    /// assert!(!waiter.try_wait()?);
    /// notifier.notify()?;
    /// assert!(waiter.try_wait()?);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[inline]
    pub fn try_wait(&self) -> Result<bool, WaitError> {
        self.shared.try_take()
    }

    /// Blocks the calling thread until the event is set, and clears it.
    ///
    /// Meant for plain threads: in async code it holds up a thread of the runtime, and
    /// [`wait_async`](Self::wait_async) is what you want.
    ///
    /// # Errors
    /// [`WaitError`] if every [`Notifier`] was dropped and no notify is pending any more.
    ///
    /// # Examples
    /// ```
    /// let (notifier, waiter) = tokio_shm::event::event();
    /// let thread = std::thread::spawn(move || waiter.wait());
    /// notifier.notify()?;
    /// thread.join().unwrap()?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[inline]
    pub fn wait(&self) -> Result<(), WaitError> {
        if self.shared.take_guessing()? {
            return Ok(());
        }
        self.shared.sleep(None).map(|_taken| ())
    }

    /// Blocks the calling thread until the event is set and clears it, but for no longer than `timeout`.
    ///
    /// A time-out loses nothing: a notify that arrives at the same moment is either returned as `Ok`, or left for the
    /// next wait. With a `timeout` of zero an event that is set is still taken. One too long to be a point in time
    /// waits for ever.
    ///
    /// # Errors
    /// [`WaitTimeoutError::Timeout`] if the time ran out; [`WaitTimeoutError::Closed`] if every [`Notifier`] was dropped
    /// and no notify is pending any more.
    ///
    /// # Examples
    /// ```
    /// use std::time::Duration;
    /// use tokio_shm::event::{WaitTimeoutError, event};
    ///
    /// let (notifier, waiter) = event();
    /// let nothing = waiter.wait_timeout(Duration::from_millis(1));
    /// assert_eq!(nothing, Err(WaitTimeoutError::Timeout));
    /// notifier.notify()?;
    /// waiter.wait_timeout(Duration::from_millis(1))?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[inline]
    pub fn wait_timeout(&self, timeout: Duration) -> Result<(), WaitTimeoutError> {
        // Before the clock is read, which costs more than taking an event that is set.
        if self.shared.take_guessing()? {
            return Ok(());
        }
        self.sleep_until(Instant::now().checked_add(timeout))
    }

    /// Blocks the calling thread until the event is set and clears it, but not beyond `deadline`.
    ///
    /// As [`wait_timeout`](Self::wait_timeout), for waits that share one deadline. An event that is set is taken even
    /// when the deadline has passed.
    ///
    /// # Errors
    /// [`WaitTimeoutError::Timeout`] if the deadline passed; [`WaitTimeoutError::Closed`] if every [`Notifier`] was
    /// dropped and no notify is pending any more.
    ///
    /// # Examples
    /// ```
    /// use std::time::{Duration, Instant};
    ///
    /// let (notifier, waiter) = tokio_shm::event::event();
    /// drop(notifier);
    /// let deadline = Instant::now() + Duration::from_secs(60);
    /// assert!(waiter.wait_deadline(deadline).is_err()); // at once: nobody is left to notify
    /// ```
    #[inline]
    pub fn wait_deadline(&self, deadline: Instant) -> Result<(), WaitTimeoutError> {
        if self.shared.take_guessing()? {
            return Ok(());
        }
        self.sleep_until(Some(deadline))
    }

    /// Waits until the event is set, and clears it.
    ///
    /// Runs in any executor.
    ///
    /// # Errors
    /// [`WaitError`] if every [`Notifier`] was dropped and no notify is pending any more.
    ///
    /// # Cancel safety
    /// Cancel safe: dropped before completion, it has taken nothing. If it had been chosen to be woken, another waiter is
    /// woken in its place, or the event stays set for the next wait.
    ///
    /// # Examples
    /// ```
    /// use std::time::Duration;
    /// use tokio::time::timeout;
    ///
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let (notifier, waiter) = tokio_shm::event::event();
    /// assert!(timeout(Duration::from_millis(1), waiter.wait_async()).await.is_err());
    /// notifier.notify()?;
    /// waiter.wait_async().await?;
    /// # Ok(())
    /// # }
    /// ```
    #[inline]
    pub async fn wait_async(&self) -> Result<(), WaitError> {
        if self.shared.take_guessing()? {
            return Ok(());
        }
        self.shared.wait_async().await
    }

    #[inline]
    fn sleep_until(&self, deadline: Option<Instant>) -> Result<(), WaitTimeoutError> {
        if self.shared.sleep(deadline)? { Ok(()) } else { Err(WaitTimeoutError::Timeout) }
    }
}

impl Clone for Waiter {
    fn clone(&self) -> Self {
        self.shared.add_waiter();
        Self { shared: self.shared.clone() }
    }
}

impl Drop for Waiter {
    fn drop(&mut self) {
        self.shared.remove_waiter();
    }
}

impl fmt::Debug for Waiter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Waiter").field("event", &self.shared).finish()
    }
}
