//! A room for one, with a bell at the door: exclusive access to a value without anybody ever waiting for it.
//!
//! Whoever finds the room taken leaves a knock and goes on; whoever is inside hears of it on leaving and sees to it that
//! the room is entered again. So work that was left in front of the door is done by somebody, without a lock that blocks
//! and without a task hop when nobody is inside.
//!
//! It does not hand over work, only the duty to look for it, and it wakes nobody.
#![allow(unsafe_code)]

#[cfg(all(test, tokio_shm_loom))]
mod loom_tests;
#[cfg(all(test, not(tokio_shm_loom)))]
mod tests;

use std::fmt;
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};
use std::thread;

use crate::sync::UnsafeCell;
use crate::sync::atomic::{AtomicU32, Ordering};

// The states, and who leads from one to the next. Each step is a read-modify-write.
//
// IDLE            -> INSIDE            whoever enters
// INSIDE          -> INSIDE | KNOCKED  whoever finds it taken (again and again)
// INSIDE [| KNOCKED] -> IDLE           the one inside, by `leave`
// INSIDE [| KNOCKED] -> [KNOCKED]      the one inside, dropped without `leave`
// KNOCKED         -> INSIDE | KNOCKED  whoever enters
// INSIDE [| KNOCKED] -> POISONED       the one inside, dropped by a panic
// POISONED        -> POISONED | INSIDE whoever salvages what is left, once; the end
// any             -> POISONED | INSIDE `poison`, in a child of this process: the one inside may not be there any more
const IDLE: u32 = 0;
const INSIDE: u32 = 1 << 0;
const KNOCKED: u32 = 1 << 1;
const POISONED: u32 = 1 << 2;

/// A value that one at a time may use; see the module.
pub(crate) struct Turnstile<T> {
    state: AtomicU32,
    value: UnsafeCell<T>,
    /// Called once it is poisoned, on the thread that panics.
    alarm: Option<Box<dyn Fn() + Send + Sync>>,
}

// SAFETY: a shared turnstile gives access to its value to one thread at a time (`INSIDE` has one owner) and orders one
// access before the next, as a mutex does. So `T: Send` is enough.
unsafe impl<T: Send> Sync for Turnstile<T> {}

impl<T> Turnstile<T> {
    pub(crate) fn new(value: T) -> Self {
        Self { state: AtomicU32::new(IDLE), value: UnsafeCell::new(value), alarm: None }
    }

    /// One that calls `alarm` when it is poisoned. It must not panic.
    pub(crate) fn with_alarm(self, alarm: impl Fn() + Send + Sync + 'static) -> Self {
        Self { alarm: Some(Box::new(alarm)), ..self }
    }

    /// Enters if nobody is inside; else leaves a knock, and `None`.
    ///
    /// After `None` whoever is inside will be told, and what the caller wrote before is visible to the next one to
    /// enter. Never waits. A poisoned turnstile is never entered again, see [`is_poisoned`](Self::is_poisoned).
    #[inline]
    pub(crate) fn enter(&self) -> Option<Inside<'_, T>> {
        let mut seen = IDLE;
        loop {
            if seen & POISONED != 0 {
                return None;
            }
            // A knock on top of another is written all the same: as a read-modify-write it publishes what this caller wrote.
            let next = if seen & INSIDE == 0 { seen | INSIDE } else { seen | KNOCKED };
            // SYNC POINT: room left (Acquire: entering sees what was done inside before, and what was written before any
            // knock). SYNC POINT: knocked (Release).
            match self.state.compare_exchange_weak(seen, next, Ordering::AcqRel, Ordering::Relaxed) {
                Ok(_) if seen & INSIDE == 0 => return Some(Inside::new(self)),
                Ok(_) => return None,
                Err(now) => seen = now,
            }
        }
    }

    /// Lets nobody in any more, whoever is inside, and leaves nothing to salvage.
    pub(crate) fn poison(&self) {
        self.state.swap(POISONED | INSIDE, Ordering::AcqRel);
    }

    /// Whether somebody panicked inside. The value may be half changed, and no knock is answered any more, not even one
    /// from before the panic.
    pub(crate) fn is_poisoned(&self) -> bool {
        self.state.load(Ordering::Relaxed) & POISONED != 0
    }

    /// Access to what a panic has left, for the first to ask; it may be half changed. `None` while not poisoned, and later.
    pub(crate) fn salvage<R>(&self, use_it: impl FnOnce(&mut T) -> R) -> Option<R> {
        // SYNC POINT: room left (Acquire).
        self.state
            .compare_exchange(POISONED, POISONED | INSIDE, Ordering::AcqRel, Ordering::Relaxed)
            .is_ok()
            .then(|| {
                self.value.with_mut(|value| {
                    // SAFETY: this thread alone took the state from `POISONED` to `POISONED | INSIDE`, which nothing leads out of:
                    // `enter` gives nothing away when poisoned, and the one that panicked inside is out (`Inside::drop`).
                    use_it(unsafe { &mut *value })
                })
            })
    }

    /// The value, for an owner that needs no turnstile. Also when poisoned.
    #[cfg(test)]
    pub(crate) fn get_mut(&mut self) -> &mut T {
        self.value.with_mut(|value| {
            // SAFETY: `&mut self` is exclusive, so nobody is inside, and the borrow is passed on with its lifetime.
            unsafe { &mut *value }
        })
    }
}

impl<T> fmt::Debug for Turnstile<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Turnstile").finish_non_exhaustive()
    }
}

/// Exclusive access to the value of a [`Turnstile`].
///
/// End it by [`leave`](Self::leave). A mere drop opens the turnstile, too, but has no way to tell of a knock: the knock
/// stays for the next one to enter and leave, which may be never. A drop by a panic poisons the turnstile.
#[must_use = "the turnstile stays taken until `leave`, and a mere drop leaves knocks unanswered"]
pub(crate) struct Inside<'a, T> {
    turnstile: &'a Turnstile<T>,
    /// A panic that was under way before is not one of ours.
    entered_panicking: bool,
    /// `Send` and `Sync` as the access that this is: `&Turnstile` alone would be `Sync` without `T: Sync`.
    access: PhantomData<&'a mut T>,
}

impl<'a, T> Inside<'a, T> {
    fn new(turnstile: &'a Turnstile<T>) -> Self {
        Self { turnstile, entered_panicking: thread::panicking(), access: PhantomData }
    }

    /// Opens the turnstile: `true` if somebody knocked in the meantime.
    ///
    /// Then it is the caller who must see to it that [`Turnstile::enter`] is tried again, by itself or by another.
    #[inline]
    #[must_use = "`true` means that somebody was turned away and relies on another look"]
    pub(crate) fn leave(self) -> bool {
        let this = std::mem::ManuallyDrop::new(self);
        // SYNC POINT: room left (Release). SYNC POINT: knocked (Acquire: a caller that looks before it enters again sees what
        // the knocker wrote).
        this.turnstile.state.swap(IDLE, Ordering::AcqRel) & KNOCKED != 0
    }
}

impl<T> Deref for Inside<'_, T> {
    type Target = T;

    #[inline]
    fn deref(&self) -> &T {
        self.turnstile.value.with(|value| {
            // SAFETY: `self` is the only `Inside` (`enter` makes one per `INSIDE` bit, which only it clears), and `&self`
            // excludes `deref_mut` for as long as the borrow lives.
            unsafe { &*value }
        })
    }
}

impl<T> DerefMut for Inside<'_, T> {
    #[inline]
    fn deref_mut(&mut self) -> &mut T {
        self.turnstile.value.with_mut(|value| {
            // SAFETY: `self` is the only `Inside`, as above, and `&mut self` excludes any other borrow from it.
            unsafe { &mut *value }
        })
    }
}

impl<T> Drop for Inside<'_, T> {
    fn drop(&mut self) {
        let state = &self.turnstile.state;
        // SYNC POINT: room left (Release).
        if thread::panicking() && !self.entered_panicking {
            state.swap(POISONED, Ordering::AcqRel);
            if let Some(alarm) = &self.turnstile.alarm {
                alarm();
            }
        } else {
            state.fetch_and(!INSIDE, Ordering::AcqRel);
        }
    }
}
