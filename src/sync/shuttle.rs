//! Real primitives at whose uses a model's scheduler may change threads.
//!
//! Shuttle runs a model's threads one at a time, on one thread of the system. So the real atomics, queue and `Notify` will do, each step of
//! them as one; atomics stay what they are in memory, and may lie in a mapping. All is as if sequentially consistent: what orderings
//! are needed is for loom to say. Outside of a model nothing but locks and futexes differs from the real ones.

use std::collections::VecDeque;
use std::fmt;
pub(crate) use std::sync::Arc;
use std::time::Instant;

use ::shuttle::rand::{Rng, thread_rng};
use ::shuttle::sync as mock;
pub(crate) use ::shuttle::thread::yield_now as spin_loop;
use shuttle_engine::runtime::thread::switch_if_not_stopping as step;

use self::atomic::{AtomicU32, Ordering};

/// How often a sleep with a deadline looks before that has come, at most.
const LOOKS_BEFORE_DEADLINE: u32 = 20;

pub(crate) mod atomic {
    use std::sync::atomic as real;
    pub(crate) use std::sync::atomic::Ordering;

    use super::step;

    /// As `std`'s.
    pub(crate) fn fence(order: Ordering) {
        step();
        real::fence(order);
    }

    macro_rules! atomic {
        ($name:ident $(<$parameter:ident>)?, $value:ty) => {
            /// As `std`'s, and of the same layout.
            #[derive(Debug, Default)]
            #[repr(transparent)]
            pub(crate) struct $name $(<$parameter>)? (real::$name $(<$parameter>)?);

            #[allow(dead_code)]
            impl $(<$parameter>)? $name $(<$parameter>)? {
                pub(crate) const fn new(value: $value) -> Self {
                    Self(real::$name::new(value))
                }

                pub(crate) fn get_mut(&mut self) -> &mut $value {
                    self.0.get_mut()
                }

                pub(crate) fn load(&self, order: Ordering) -> $value {
                    step();
                    self.0.load(order)
                }

                pub(crate) fn store(&self, value: $value, order: Ordering) {
                    step();
                    self.0.store(value, order);
                }

                pub(crate) fn swap(&self, value: $value, order: Ordering) -> $value {
                    step();
                    self.0.swap(value, order)
                }

                pub(crate) fn compare_exchange(
                    &self,
                    current: $value,
                    new: $value,
                    success: Ordering,
                    failure: Ordering,
                ) -> Result<$value, $value> {
                    step();
                    self.0.compare_exchange(current, new, success, failure)
                }

                pub(crate) fn compare_exchange_weak(
                    &self,
                    current: $value,
                    new: $value,
                    success: Ordering,
                    failure: Ordering,
                ) -> Result<$value, $value> {
                    self.compare_exchange(current, new, success, failure)
                }

                pub(crate) fn fetch_update(
                    &self,
                    set: Ordering,
                    fetch: Ordering,
                    update: impl FnMut($value) -> Option<$value>,
                ) -> Result<$value, $value> {
                    step();
                    self.0.fetch_update(set, fetch, update)
                }
            }
        };
    }

    macro_rules! arithmetic {
        ($name:ident, $value:ty, $($method:ident)*) => {
            #[allow(dead_code)]
            impl $name {
                $(pub(crate) fn $method(&self, value: $value, order: Ordering) -> $value {
                    step();
                    self.0.$method(value, order)
                })*
            }
        };
    }

    atomic!(AtomicBool, bool);
    atomic!(AtomicU32, u32);
    atomic!(AtomicU64, u64);
    atomic!(AtomicUsize, usize);
    atomic!(AtomicPtr<T>, *mut T);
    arithmetic!(AtomicU32, u32, fetch_add fetch_sub fetch_and fetch_or fetch_max);
    arithmetic!(AtomicU64, u64, fetch_add fetch_sub fetch_and fetch_or fetch_max);
    arithmetic!(AtomicUsize, usize, fetch_add fetch_sub fetch_and fetch_or fetch_max);
}

/// `parking_lot::Mutex`: no poisoning.
#[derive(Default)]
pub(crate) struct Mutex<T: ?Sized>(mock::Mutex<T>);

impl<T> Mutex<T> {
    pub(crate) fn new(value: T) -> Self {
        Self(mock::Mutex::new(value))
    }

    pub(crate) fn lock(&self) -> mock::MutexGuard<'_, T> {
        self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    pub(crate) fn try_lock(&self) -> Option<mock::MutexGuard<'_, T>> {
        self.0.try_lock().ok()
    }

    pub(crate) fn get_mut(&mut self) -> &mut T {
        self.0.get_mut().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

impl<T> fmt::Debug for Mutex<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mutex").finish_non_exhaustive()
    }
}

/// `crossbeam_queue::ArrayQueue`.
#[derive(Debug)]
pub(crate) struct ArrayQueue<T>(crossbeam_queue::ArrayQueue<T>);

impl<T> ArrayQueue<T> {
    pub(crate) fn new(capacity: usize) -> Self {
        Self(crossbeam_queue::ArrayQueue::new(capacity))
    }

    pub(crate) fn push(&self, thing: T) -> Result<(), T> {
        step();
        self.0.push(thing)
    }

    pub(crate) fn pop(&self) -> Option<T> {
        step();
        self.0.pop()
    }

    pub(crate) fn len(&self) -> usize {
        step();
        self.0.len()
    }

    pub(crate) fn capacity(&self) -> usize {
        self.0.capacity()
    }
}

/// The facade's own futex. A deadline comes after any number of looks.
#[derive(Debug)]
pub(crate) struct Futex {
    word: AtomicU32,
    sleepers: mock::Mutex<VecDeque<::shuttle::thread::Thread>>,
}

impl Futex {
    pub(crate) fn new() -> Self {
        Self { word: AtomicU32::new(0), sleepers: mock::Mutex::new(VecDeque::new()) }
    }

    pub(crate) fn wakes(&self) -> u32 {
        self.word.load(Ordering::Acquire)
    }

    pub(crate) fn sleep(&self, wakes: u32, deadline: Option<Instant>) -> bool {
        if deadline.is_some() {
            for _ in 0..thread_rng().gen_range(0..LOOKS_BEFORE_DEADLINE) {
                if self.wakes() != wakes {
                    return false;
                }
                ::shuttle::thread::yield_now();
            }
            return true;
        }
        let mut sleepers = self.lock();
        if self.wakes() != wakes {
            return false;
        }
        sleepers.push_back(::shuttle::thread::current());
        drop(sleepers);
        ::shuttle::thread::park();
        false
    }

    /// Wakes `count` threads at most.
    pub(crate) fn wake(&self, count: usize) {
        self.word.fetch_add(1, Ordering::Release);
        let woken: Vec<_> = {
            let mut sleepers = self.lock();
            let count = count.min(sleepers.len());
            sleepers.drain(..count).collect()
        };
        woken.iter().for_each(::shuttle::thread::Thread::unpark);
    }

    pub(crate) fn wake_all(&self) {
        self.wake(usize::MAX);
    }

    fn lock(&self) -> mock::MutexGuard<'_, VecDeque<::shuttle::thread::Thread>> {
        self.sleepers.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

/// `tokio::sync::Notify`.
#[derive(Debug)]
pub(crate) struct Notify(tokio::sync::Notify);

impl Notify {
    pub(crate) fn new() -> Self {
        Self(tokio::sync::Notify::new())
    }

    pub(crate) fn notified(&self) -> tokio::sync::futures::Notified<'_> {
        step();
        self.0.notified()
    }

    pub(crate) fn notify_one(&self) {
        step();
        self.0.notify_one();
    }

    pub(crate) fn notify_waiters(&self) {
        step();
        self.0.notify_waiters();
    }
}

/// `std`'s cell, reached through closures.
#[derive(Debug)]
pub(crate) struct UnsafeCell<T>(std::cell::UnsafeCell<T>);

impl<T> UnsafeCell<T> {
    pub(crate) const fn new(value: T) -> Self {
        Self(std::cell::UnsafeCell::new(value))
    }

    pub(crate) fn with<R>(&self, f: impl FnOnce(*const T) -> R) -> R {
        f(self.0.get())
    }

    pub(crate) fn with_mut<R>(&self, f: impl FnOnce(*mut T) -> R) -> R {
        f(self.0.get())
    }
}
