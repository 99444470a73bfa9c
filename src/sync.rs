//! The one door to atomics, locks, cells, futexes and `Notify`: the real ones, or loom's under `--cfg tokio_shm_loom`.
//!
//! It adds no behaviour of its own: code written against it reads as if written against `std`, `parking_lot`,
//! `crossbeam-queue` and `tokio`, except that cells are reached through closures, as loom wants it, and that a futex brings its
//! word along.

#[cfg(not(tokio_shm_loom))]
pub(crate) mod atomic {
    pub(crate) use std::sync::atomic::{AtomicPtr, AtomicU32, AtomicU64, AtomicUsize, Ordering, fence};
}
#[cfg(tokio_shm_loom)]
pub(crate) mod atomic {
    pub(crate) use loom::sync::atomic::{AtomicPtr, AtomicU32, AtomicU64, AtomicUsize, Ordering, fence};
}

#[cfg(tokio_shm_loom)]
mod loom;
mod parker;
#[cfg(not(tokio_shm_loom))]
mod real;

// For models only.
#[cfg(tokio_shm_loom)]
pub(crate) use self::loom::Condvar;
#[cfg(tokio_shm_loom)]
pub(crate) use self::loom::{Arc, ArrayQueue, Futex, Mutex, Notify, UnsafeCell};
pub(crate) use self::parker::Parker;
#[cfg(not(tokio_shm_loom))]
pub(crate) use self::real::{Arc, ArrayQueue, Futex, Mutex, Notify, UnsafeCell};

/// A full fence for a thread whose last access to shared memory was a read-modify-write.
///
/// On x86-64 a locked read-modify-write already is one, so only the compiler has to be held back.
#[inline]
pub(crate) fn fence_after_rmw() {
    #[cfg(all(target_arch = "x86_64", not(tokio_shm_loom), not(miri)))]
    std::sync::atomic::compiler_fence(std::sync::atomic::Ordering::SeqCst);
    #[cfg(not(all(target_arch = "x86_64", not(tokio_shm_loom), not(miri))))]
    atomic::fence(atomic::Ordering::SeqCst);
}
