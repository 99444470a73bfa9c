//! How many samples of the subscriber's process share a ticket.
//!
//! It does not release the ticket: it says who has to.

use crate::sync::atomic::{AtomicU32, Ordering};

/// How many samples in this process share one ticket: 0 while the publisher has it.
///
/// The receiver sets it from 0 to 1, clones add one, drops take one away; whoever takes the last sets it to 0 and then
/// releases the ticket.
#[derive(Debug, Default)]
pub(crate) struct Hold(AtomicU32);

impl Hold {
    /// Begins to hold a ticket that the publisher has issued; `false` if it is held already, which is a lie of his.
    #[inline]
    pub(crate) fn begin(&self) -> bool {
        // Acquire: pairs with the end of the last hold, by way of the publisher, which re-issued the ticket.
        if self.0.load(Ordering::Acquire) != 0 {
            return false;
        }
        self.0.store(1, Ordering::Relaxed);
        true
    }

    /// Whether there is a share at present.
    pub(crate) fn is_held(&self) -> bool {
        // Relaxed: nothing is read on the strength of it.
        self.0.load(Ordering::Relaxed) != 0
    }

    /// Adds a share to one that exists.
    #[inline]
    pub(crate) fn share(&self) {
        // As for `Arc`: a clone is made from one that exists, nothing has to be ordered.
        let before = self.0.fetch_add(1, Ordering::Relaxed);
        assert!(before < u32::MAX / 2, "one sample cloned two thousand million times");
    }

    /// Gives up one share; `true` if it was the last.
    #[inline]
    pub(crate) fn end(&self) -> bool {
        // SYNC POINT: last clone (Acquire: what was read through the other shares was read before the release that
        // follows; Release: the same for this one, if it is not the last). With one share left it is ours, and nobody can
        // clone what only we have.
        //
        // Tried: with `Relaxed` for both, loom reports the slot's reuse as a data race (`loom_sample_…`).
        if self.0.load(Ordering::Acquire) == 1 || self.0.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.0.store(0, Ordering::Release);
            return true;
        }
        false
    }
}

#[cfg(all(test, tokio_shm_loom))]
#[allow(unsafe_code)]
mod loom_tests {
    use super::*;
    use crate::proto::bell::Wake;
    use crate::proto::layout::HeapPage;
    use crate::proto::release::{Collector, Released, release};
    use loom::cell::UnsafeCell;
    use loom::sync::Arc;
    use loom::thread;

    struct Shared {
        heap: HeapPage,
        hold: Hold,
        payload: UnsafeCell<()>,
    }

    // SAFETY: the cell is never dereferenced: it only lets loom see who reads and writes when, and fail the model if a write is
    // concurrent with anything.
    unsafe impl Sync for Shared {}

    impl Shared {
        fn read_and_drop(&self) {
            self.payload.with(|_read| ());
            if self.hold.end() {
                assert_eq!(release(self.heap.page(), 0), Wake::Nothing);
            }
        }
    }

    #[test]
    fn loom_sample_cloned_and_dropped_by_three_is_released_once_and_after_the_last_read() {
        loom::model(|| {
            let shared = Arc::new(Shared {
                heap: HeapPage::new(1),
                hold: Hold::default(),
                payload: UnsafeCell::new(()),
            });
            assert!(shared.hold.begin());
            shared.hold.share();
            let clone = thread::spawn({
                let shared = shared.clone();
                move || shared.read_and_drop()
            });
            shared.hold.share();
            let other = thread::spawn({
                let shared = shared.clone();
                move || shared.read_and_drop()
            });
            shared.read_and_drop();

            // The publisher, which writes the next message where this one was, and the subscriber that receives it.
            let mut collector = Collector::new();
            let mut times = 0;
            for _ in 0..2 {
                let reuse = |released: Released| {
                    released.for_each(|_| {
                        shared.payload.with_mut(|_written| ());
                        times += 1;
                    });
                    Ok(())
                };
                collector.collect(shared.heap.page(), usize::MAX, reuse).unwrap();
            }
            clone.join().unwrap();
            other.join().unwrap();
            let reuse = |released: Released| {
                times += released.count();
                Ok(())
            };
            collector.collect(shared.heap.page(), usize::MAX, reuse).unwrap();
            assert_eq!(times, 1);
            assert!(shared.hold.begin(), "the ticket can be used again");
        });
    }
}
