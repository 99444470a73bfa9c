//! A place for one thing that is shared by pointer: the one put there last, which the caches still know.
//!
//! Taking and putting are one read-modify-write each, less than half of what a queue takes. What does not fit is the caller's
//! to put elsewhere.
#![allow(unsafe_code)]

use std::fmt;
use std::ptr;

use crate::sync::Arc;
use crate::sync::atomic::{AtomicPtr, Ordering};

/// Holds an `Arc` or nothing.
pub(crate) struct Hot<T> {
    /// Null, or from `Arc::into_raw`: then the count that it stands for belongs to this place. Changed by read-modify-write only:
    /// from null to a pointer by `try_put`, from a pointer to null by `take`.
    thing: AtomicPtr<T>,
}

impl<T> Hot<T> {
    pub(crate) fn new() -> Self {
        Self { thing: AtomicPtr::new(ptr::null_mut()) }
    }

    #[inline]
    pub(crate) fn take(&self) -> Option<Arc<T>> {
        // SYNC POINT: thing put (Acquire).
        let thing = self.thing.swap(ptr::null_mut(), Ordering::Acquire);
        if thing.is_null() {
            return None;
        }
        // SAFETY: it came from `Arc::into_raw` in `try_put`, which left its count to this place; the swap that took it out is the
        // only one to have seen it since it was put in, so the count is taken over once.
        Some(unsafe { Arc::from_raw(thing) })
    }

    /// Puts it there, or hands it back if there is something already.
    #[inline]
    pub(crate) fn try_put(&self, thing: Arc<T>) -> Result<(), Arc<T>> {
        let thing = Arc::into_raw(thing).cast_mut();
        // SYNC POINT: thing put (Release).
        //
        // Tried: with `Relaxed` here, loom reports what the taker does with it as a data race (`loom_thing_…`).
        match self.thing.compare_exchange(ptr::null_mut(), thing, Ordering::Release, Ordering::Relaxed) {
            Ok(_) => Ok(()),
            // SAFETY: from `into_raw` above, and not put anywhere.
            Err(_) => Err(unsafe { Arc::from_raw(thing) }),
        }
    }

    /// Whether there is something, for statistics.
    #[cfg(not(tokio_shm_loom))]
    pub(crate) fn is_full(&self) -> bool {
        !self.thing.load(Ordering::Relaxed).is_null()
    }
}

impl<T> fmt::Debug for Hot<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Hot").finish_non_exhaustive()
    }
}

impl<T> Drop for Hot<T> {
    fn drop(&mut self) {
        drop(self.take());
    }
}

// An `Arc<T>` is what goes through the pointer, from any thread to any other.
// SAFETY: as for `Arc<T>` itself, which may be sent to another thread where `T` is `Send` and `Sync`; the pointer stands for
// nothing else.
unsafe impl<T: Send + Sync> Sync for Hot<T> {}
// SAFETY: as above.
unsafe impl<T: Send + Sync> Send for Hot<T> {}

#[cfg(all(test, not(tokio_shm_loom)))]
mod tests {
    use super::*;

    #[test]
    fn place_holds_one_and_gives_it_back() {
        let (hot, thing) = (Hot::new(), Arc::new(1));
        assert!(hot.take().is_none());
        hot.try_put(thing.clone()).unwrap();
        assert!(hot.is_full());
        assert_eq!(*hot.try_put(Arc::new(2)).unwrap_err(), 2);
        assert!(Arc::ptr_eq(&hot.take().unwrap(), &thing));
        assert!(!hot.is_full() && hot.take().is_none());
    }

    #[test]
    fn place_dropped_drops_what_it_holds() {
        let (hot, thing) = (Hot::new(), Arc::new(()));
        hot.try_put(thing.clone()).unwrap();
        drop(hot);
        assert_eq!(Arc::strong_count(&thing), 1);
    }
}

#[cfg(all(test, tokio_shm_loom))]
mod loom_tests {
    use super::*;
    use crate::sync::atomic::AtomicU32;
    use crate::sync::fence_after_rmw;
    use loom::cell::UnsafeCell;
    use loom::thread;

    struct Thing(UnsafeCell<u32>);

    // SAFETY: loom's cell reports an access that is not exclusive, which is what the model is for.
    unsafe impl Sync for Thing {}
    // SAFETY: as above.
    unsafe impl Send for Thing {}

    /// Takes it, uses it as its only owner, and puts it back.
    fn turn(hot: &Hot<Thing>) -> bool {
        let Some(thing) = hot.take() else { return false };
        // SAFETY: the cell checks.
        thing.0.with_mut(|count| unsafe { *count += 1 });
        assert!(hot.try_put(thing).is_ok(), "there is only one");
        true
    }

    #[test]
    fn loom_thing_taken_and_put_by_several_is_used_by_one_at_a_time() {
        loom::model(|| {
            let hot = Arc::new(Hot::new());
            assert!(hot.try_put(Arc::new(Thing(UnsafeCell::new(0)))).is_ok());
            let others = [(); 2].map(|()| {
                let hot = hot.clone();
                thread::spawn(move || turn(&hot))
            });
            let mut turns = u32::from(turn(&hot));
            for other in others {
                turns += u32::from(other.join().unwrap());
            }
            assert!(turns > 0);
            let thing = hot.take().unwrap();
            // SAFETY: the cell checks.
            assert_eq!(thing.0.with(|count| unsafe { *count }), turns);
        });
    }

    /// What of a pool sees to it that nothing stays in one that is closed.
    struct Shelf {
        hot: Hot<u32>,
        closed: AtomicU32,
    }

    impl Shelf {
        fn keep(&self, thing: Arc<u32>) {
            assert!(self.hot.try_put(thing).is_ok(), "there is only one");
            fence_after_rmw();
            if self.closed.load(Ordering::Relaxed) != 0 {
                drop(self.hot.take());
            }
        }

        fn close(&self) {
            self.closed.swap(1, Ordering::Relaxed);
            fence_after_rmw();
            drop(self.hot.take());
        }
    }

    // Tried: without the fence in `close`, loom finds the thing that stays.
    #[test]
    fn loom_thing_kept_while_the_pool_closes_does_not_stay() {
        loom::model(|| {
            let shelf = Arc::new(Shelf { hot: Hot::new(), closed: AtomicU32::new(0) });
            let closer = thread::spawn({
                let shelf = shelf.clone();
                move || shelf.close()
            });
            shelf.keep(Arc::new(7));
            closer.join().unwrap();
            assert!(shelf.hot.take().is_none());
        });
    }
}
