//! What can go wrong with an event: the other end is gone, or the time is up.

use thiserror::Error;

/// Every [`Waiter`](super::Waiter) was dropped, so the notify reaches nobody and never will.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("every waiter of this event was dropped: nobody is left to notify, so stop notifying")]
#[non_exhaustive]
pub struct NotifyError;

/// Every [`Notifier`](super::Notifier) was dropped and no notify is pending, so a wait would never end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("every notifier of this event was dropped: it will never be set again, so stop waiting")]
#[non_exhaustive]
pub struct WaitError;

/// Why a wait with a time limit ended without the event having been set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum WaitTimeoutError {
    /// The time ran out first. The event is untouched: waiting again is fine.
    #[error("the event was not set in time: wait again, or allow more time")]
    Timeout,
    /// Every [`Notifier`](super::Notifier) was dropped and no notify is pending.
    #[error(transparent)]
    Closed(#[from] WaitError),
}
