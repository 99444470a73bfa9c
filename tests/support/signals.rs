//! Signals to one thread of this process.

use std::os::unix::thread::JoinHandleExt;
use std::thread::JoinHandle;

/// A thread that is not joined yet.
pub(crate) struct Target<'a, T>(&'a JoinHandle<T>);

impl<'a, T> Target<'a, T> {
    pub(crate) fn of(thread: &'a JoinHandle<T>) -> Self {
        Self(thread)
    }

    /// Sends SIGUSR1, for which the process must have a handler.
    pub(crate) fn send_user_defined1(&self) {
        // SAFETY: the handle is borrowed, so the thread has not been joined, and its id stays valid even after it has ended.
        let sent = unsafe { libc::pthread_kill(self.0.as_pthread_t() as libc::pthread_t, libc::SIGUSR1) };
        assert!(sent == 0 || sent == libc::ESRCH, "{sent}");
    }
}
