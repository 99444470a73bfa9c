//! The one door to atomics, locks, cells, futexes and `Notify`: the real ones, loom's under `--cfg tokio_shm_loom`, or under
//! `--cfg tokio_shm_shuttle` real ones at which a model's scheduler may change threads.
//!
//! It adds no behaviour of its own: code written against it reads as if written against `std`, `parking_lot`,
//! `crossbeam-queue` and `tokio`, except that cells are reached through closures, as loom wants it, and that a futex brings its
//! word along.

#[cfg(not(any(tokio_shm_loom, tokio_shm_shuttle)))]
pub(crate) mod atomic {
    pub(crate) use std::sync::atomic::{
        AtomicBool, AtomicPtr, AtomicU32, AtomicU64, AtomicUsize, Ordering, fence,
    };
}
#[cfg(tokio_shm_shuttle)]
pub(crate) use self::shuttle::atomic;
#[cfg(tokio_shm_loom)]
pub(crate) mod atomic {
    pub(crate) use loom::sync::atomic::{AtomicPtr, AtomicU32, AtomicU64, AtomicUsize, Ordering, fence};
}

#[cfg(tokio_shm_loom)]
mod loom;
mod parker;
#[cfg(not(any(tokio_shm_loom, tokio_shm_shuttle)))]
mod real;
#[cfg(tokio_shm_shuttle)]
mod shuttle;

// For models only.
#[cfg(tokio_shm_loom)]
pub(crate) use self::loom::Condvar;
#[cfg(tokio_shm_loom)]
pub(crate) use self::loom::{Arc, ArrayQueue, Futex, Mutex, Notify, UnsafeCell};
pub(crate) use self::parker::Parker;
#[cfg(not(any(tokio_shm_loom, tokio_shm_shuttle)))]
pub(crate) use self::real::{Arc, ArrayQueue, Futex, Mutex, Notify, UnsafeCell, spin_loop};
#[cfg(tokio_shm_shuttle)]
pub(crate) use self::shuttle::{Arc, ArrayQueue, Futex, Mutex, Notify, UnsafeCell, spin_loop};

/// A full fence for a thread whose last access to shared memory was a read-modify-write.
///
/// On x86-64 a locked read-modify-write already is one, so only the compiler has to be held back.
#[inline]
pub(crate) fn fence_after_rmw() {
    #[cfg(all(target_arch = "x86_64", not(tokio_shm_loom), not(tokio_shm_shuttle), not(miri)))]
    std::sync::atomic::compiler_fence(std::sync::atomic::Ordering::SeqCst);
    #[cfg(not(all(target_arch = "x86_64", not(tokio_shm_loom), not(tokio_shm_shuttle), not(miri))))]
    atomic::fence(atomic::Ordering::SeqCst);
}
