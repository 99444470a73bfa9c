//! The real primitives behind the facade.

pub(crate) use std::hint::spin_loop;
pub(crate) use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;

pub(crate) use crossbeam_queue::ArrayQueue;
pub(crate) use parking_lot::Mutex;
use rustix::io::Errno;
use rustix::thread::futex;
use rustix::time::Timespec;
pub(crate) use tokio::sync::Notify;

/// Where threads sleep: a word that each wake-up counts up, so that who decides to sleep while others wake is not missed.
#[derive(Debug)]
pub(crate) struct Futex(AtomicU32);

impl Futex {
    pub(crate) const fn new() -> Self {
        Self(AtomicU32::new(0))
    }

    /// How many wake-ups there were. To be read before the look that leads to sleeping.
    #[inline]
    pub(crate) fn wakes(&self) -> u32 {
        // SYNC POINT: woken (Acquire: whoever sees the wake-up sees what it was for).
        self.0.load(Ordering::Acquire)
    }

    /// Sleeps until it is woken, or `deadline`, or for no reason; not at all if there were more wake-ups than `wakes`. `true` if the
    /// deadline has come.
    #[inline]
    pub(crate) fn sleep(&self, wakes: u32, deadline: Option<Instant>) -> bool {
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        if left.is_some_and(|left| left.is_zero()) {
            return true;
        }
        // One beyond what the kernel can count in is no deadline.
        let left = left.and_then(|left| Timespec::try_from(left).ok());
        futex::wait(&self.0, futex::Flags::PRIVATE, wakes, left.as_ref()) == Err(Errno::TIMEDOUT)
    }

    /// Wakes `count` threads at most.
    #[inline]
    pub(crate) fn wake(&self, count: usize) {
        // SYNC POINT: woken (Release).
        self.0.fetch_add(1, Ordering::Release);
        let count = count.min(i32::MAX as usize) as u32;
        let woken = futex::wake(&self.0, futex::Flags::PRIVATE, count);
        debug_assert!(woken.is_ok(), "a futex of this process can be woken: {woken:?}");
    }

    /// Wakes all threads.
    pub(crate) fn wake_all(&self) {
        self.wake(usize::MAX);
    }
}

/// `std`'s cell with loom's shape: access through a closure, so that loom can see where it begins and ends.
#[derive(Debug)]
pub(crate) struct UnsafeCell<T>(std::cell::UnsafeCell<T>);

impl<T> UnsafeCell<T> {
    pub(crate) const fn new(value: T) -> Self {
        Self(std::cell::UnsafeCell::new(value))
    }

    /// Hands `f` a pointer to read from. Following it is the caller's unsafe operation.
    #[inline]
    pub(crate) fn with<R>(&self, f: impl FnOnce(*const T) -> R) -> R {
        f(self.0.get())
    }

    /// Hands `f` a pointer to write to. Following it is the caller's unsafe operation.
    #[inline]
    pub(crate) fn with_mut<R>(&self, f: impl FnOnce(*mut T) -> R) -> R {
        f(self.0.get())
    }
}
