//! A timer as a descriptor: for waits that go through the kernel, and for a tokio runtime whose own timer may not be enabled.

use super::clock::monotonic_ns;
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};

/// Readable once it has run out.
#[derive(Debug)]
pub(crate) struct Timer {
    fd: OwnedFd,
    /// When it runs out, or did, in clock nanoseconds. Only one task or thread at a time sets it.
    due: AtomicU64,
}

impl Timer {
    pub(crate) fn new() -> io::Result<Self> {
        let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
        Ok(Self { fd: timerfd_create(TimerfdClockId::Monotonic, flags)?, due: AtomicU64::new(0) })
    }

    /// Has it run out in so many nanoseconds, or sooner: who is woken too soon sets it again.
    pub(crate) fn set(&self, nanoseconds: u64) -> io::Result<()> {
        let now = monotonic_ns();
        let due = now.saturating_add(nanoseconds);
        let set = self.due.load(Ordering::Relaxed);
        if now < set && set <= due {
            return Ok(());
        }
        self.due.store(due, Ordering::Relaxed);
        let zero = Timespec { tv_sec: 0, tv_nsec: 0 };
        let value = Timespec {
            tv_sec: i64::try_from(nanoseconds / 1_000_000_000).unwrap_or(i64::MAX),
            tv_nsec: (nanoseconds % 1_000_000_000) as _,
        };
        let timer = Itimerspec { it_interval: zero, it_value: value };
        Ok(timerfd_settime(&self.fd, TimerfdTimerFlags::empty(), &timer).map(drop)?)
    }

    /// Whether it has run out since it was set; says so once.
    pub(crate) fn take(&self) -> bool {
        let due = self.due.load(Ordering::Relaxed);
        let out = due != 0 && due <= monotonic_ns();
        if out {
            self.due.store(0, Ordering::Relaxed);
        }
        out
    }
}

impl AsFd for Timer {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
