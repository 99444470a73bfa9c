//! The real primitives behind the facade.

pub(crate) use std::sync::Arc;

pub(crate) use crossbeam_queue::ArrayQueue;
pub(crate) use parking_lot::{Condvar, Mutex};
pub(crate) use tokio::sync::Notify;

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
