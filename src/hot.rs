//! Places for things that are shared by pointer: the ones put there last, which the caches still know.
//!
//! Taking and putting are one read-modify-write each, less than half of what a queue takes, and threads that each have a place of
//! their own do not get in each other's way. What does not fit is the caller's to put elsewhere.
#![allow(unsafe_code)]

use std::cell::Cell;
use std::fmt;
use std::ops::Deref;
use std::ptr;

use crate::apart::Apart;
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
    pub(crate) fn try_put(&self, thing: Arc<T>) -> Result<(), Arc<T>> {
        let thing = Arc::into_raw(thing).cast_mut();
        if self.try_put_raw(thing) {
            return Ok(());
        }
        // SAFETY: from `into_raw` above, and not put anywhere.
        Err(unsafe { Arc::from_raw(thing) })
    }

    /// Puts it there, with the count that it stands for; `false` if there is something already.
    #[inline]
    fn try_put_raw(&self, thing: *mut T) -> bool {
        // SYNC POINT: thing put (Release).
        //
        // Tried: with `Relaxed` here, loom reports what the taker does with it as a data race (`loom_thing_…`).
        self.thing.compare_exchange(ptr::null_mut(), thing, Ordering::Release, Ordering::Relaxed).is_ok()
    }

    /// A look at whether there is nothing, which fetches no more of what others have than that.
    #[inline]
    pub(crate) fn looks_empty(&self) -> bool {
        self.thing.load(Ordering::Relaxed).is_null()
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

/// How many places there are at most.
const PLACES: usize = 8;

/// Places with their own cache lines. Each thread has one of them that it looks at first: all the same one, so that what one thread
/// puts there another finds, until two are there at once; then one of them moves on.
#[derive(Debug)]
pub(crate) struct HotPlaces<T> {
    /// Only those up to `last` are used.
    places: [Apart<Hot<T>>; PLACES],
    /// One less than a power of two.
    last: usize,
}

thread_local! {
    /// Which place is the thread's own, of however many there are: how often another got in its way.
    static OWN: Cell<usize> = const { Cell::new(0) };
    /// The last take found nothing in the thread's own place, as all do in a stream whose slots come back many at a time.
    static IN_VAIN: Cell<bool> = const { Cell::new(false) };
}

impl<T> HotPlaces<T> {
    /// With at most `count` places, and one at least.
    pub(crate) fn new(count: usize) -> Self {
        let count = 1 << count.clamp(1, PLACES).ilog2();
        Self { places: [(); PLACES].map(|()| Apart(Hot::new())), last: count - 1 }
    }

    pub(crate) fn count(&self) -> usize {
        self.last + 1
    }

    #[inline]
    fn own(&self) -> &Hot<T> {
        let own = OWN.get() % PLACES;
        // A branch that is foreseen: where the place is does not have to wait for how many there are.
        if own <= self.last { &self.places[own] } else { self.shared(own) }
    }

    /// The place of a thread for which there is none of its own.
    // Out of line, or the compiler makes one way of both, which waits.
    #[cold]
    #[inline(never)]
    fn shared(&self, own: usize) -> &Hot<T> {
        // `last` is less than `PLACES`; this says so to the compiler.
        &self.places[own & self.last & (PLACES - 1)]
    }

    /// Takes what is in this thread's own place.
    // A look before the swap costs more than it saves where there is something, and saves the swap where there is nothing.
    #[inline]
    pub(crate) fn take(&self) -> Option<Arc<T>> {
        let own = self.own();
        if IN_VAIN.get() && own.looks_empty() {
            return None;
        }
        let taken = own.take();
        IN_VAIN.set(taken.is_none());
        taken
    }

    /// Takes something from whosever place.
    pub(crate) fn take_any(&self) -> Option<Arc<T>> {
        self.used().filter(|place| !place.looks_empty()).find_map(Hot::take)
    }

    /// Puts it into this thread's own one of the places to which `places` leads, or hands it back.
    // Not a method of theirs: the thing knows the way there, which is a shorter one than its giver's.
    #[inline]
    pub(crate) fn try_put(thing: Arc<T>, places: impl FnOnce(&T) -> &Self) -> Result<(), Arc<T>> {
        let thing = Arc::into_raw(thing).cast_mut();
        // SAFETY: from `into_raw` above, and put nowhere before the last access to it and to where it leads.
        let own = places(unsafe { &*thing }).own();
        // Often not so: many are put back in a row.
        if own.looks_empty() {
            if own.try_put_raw(thing) {
                return Ok(());
            }
            move_on();
        }
        // SAFETY: as above, and not put anywhere.
        Err(unsafe { Arc::from_raw(thing) })
    }

    /// Puts it into whosever place, or hands it back if all are full.
    pub(crate) fn try_put_any(&self, thing: Arc<T>) -> Result<(), Arc<T>> {
        self.used().try_fold(thing, |thing, place| place.try_put(thing).err().ok_or(())).map_or(Ok(()), Err)
    }

    fn used(&self) -> impl Iterator<Item = &Hot<T>> {
        self.places.iter().take(self.count()).map(Deref::deref)
    }

    /// How many are full, for statistics.
    #[cfg(not(tokio_shm_loom))]
    pub(crate) fn len(&self) -> usize {
        self.used().filter(|place| !place.looks_empty()).count()
    }
}

/// Gives this thread another place of its own: somebody else was in this one.
#[cold]
fn move_on() {
    OWN.set(OWN.get().wrapping_add(1));
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
        assert!(!hot.looks_empty());
        assert_eq!(*hot.try_put(Arc::new(2)).unwrap_err(), 2);
        assert!(Arc::ptr_eq(&hot.take().unwrap(), &thing));
        assert!(hot.looks_empty() && hot.take().is_none());
    }

    /// A number that knows to which places it belongs.
    struct Numbered(usize, Arc<HotPlaces<Numbered>>);

    impl Numbered {
        fn new(number: usize, places: &Arc<HotPlaces<Self>>) -> Arc<Self> {
            Arc::new(Self(number, Arc::clone(places)))
        }

        fn try_put(number: usize, places: &Arc<HotPlaces<Self>>) -> Result<(), Arc<Self>> {
            HotPlaces::try_put(Self::new(number, places), |this| &this.1)
        }
    }

    #[test]
    fn places_keep_as_many_as_there_are_whosever_they_are() {
        let places = Arc::new(HotPlaces::new(7));
        assert_eq!(places.count(), 4);
        for thing in 0..4 {
            assert_eq!(places.len(), thing);
            assert!(places.try_put_any(Numbered::new(thing, &places)).is_ok());
        }
        assert!(places.try_put_any(Numbered::new(4, &places)).is_err_and(|thing| thing.0 == 4));
        assert!(Numbered::try_put(4, &places).is_err());
        let mut taken = vec![places.take().unwrap().0];
        assert!(places.take().is_none(), "another's is not this thread's own");
        taken.extend(std::iter::from_fn(|| places.take_any()).map(|thing| thing.0));
        taken.sort_unstable();
        assert_eq!(taken, [0, 1, 2, 3]);
        assert_eq!(HotPlaces::<()>::new(0).count(), 1);
    }

    #[test]
    fn places_of_one_thread_and_of_one_that_moved_on_differ() {
        let places = Arc::new(HotPlaces::new(2));
        assert!(Numbered::try_put(0, &places).is_ok());
        let other = std::thread::spawn({
            let places = Arc::clone(&places);
            move || {
                assert!(Numbered::try_put(1, &places).is_err(), "the same for all at first");
                move_on();
                assert!(Numbered::try_put(1, &places).is_ok());
            }
        });
        other.join().unwrap();
        assert_eq!(places.len(), 2);
        assert_eq!(places.take().unwrap().0, 0);
        drop(places.take_any());
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
