//! Who has to ring whose doorbell: one flag for each direction of a link.
//!
//! A system call for every message would cost more than the message. So a side that is about to sleep says so in a
//! flag, and the other side rings only if it finds the flag set. Both do two things to two words in opposite order:
//!
//! | sleeper | waker |
//! | --- | --- |
//! | sets the flag | publishes what it has |
//! | fence | fence |
//! | looks for something | looks at the flag |
//!
//! The two fences are sequentially consistent: one comes first, and what stands above it is visible below the other.
//! So at least one side sees what the other did, and "nothing there" together with "nobody sleeps" cannot happen.
//! Release and acquire do not give that: they order no store before a later load.
//!
//! This file does not ring: it says that somebody must. A ring too many is harmless, and does happen: a sleeper that
//! finds something in its last look may already have been rung for. A peer that lies in its flag makes its own
//! doorbell ring for nothing, or misses its own wake-ups.

use crate::sync::atomic::{AtomicU32, Ordering, fence};
use crate::sync::fence_after_rmw;

/// Whether the peer's doorbell has to be rung.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use = "a peer that sleeps is not woken unless its doorbell is rung"]
pub(crate) enum Wake {
    /// The peer sleeps: ring.
    Ring,
    /// The peer is awake and will look by itself.
    Nothing,
}

/// Says that this side is about to sleep. The caller must look for something once more after this, and only sleep if
/// there is nothing.
pub(crate) fn arm(flag: &AtomicU32) {
    // A read-modify-write rather than a store, for the cheaper fence after it.
    flag.swap(1, Ordering::Relaxed);
    // SYNC POINT: armed, then looked
    fence_after_rmw();
}

/// Says that this side is awake, to save the peer a ring. Not needed for correctness.
pub(crate) fn disarm(flag: &AtomicU32) {
    // Mostly the peer's ring has done it, and then its cache line is left alone.
    if flag.load(Ordering::Relaxed) != 0 {
        flag.swap(0, Ordering::Relaxed);
    }
}

/// Whether the peer sleeps on `flag`. To be called after the caller published what the peer may be waiting for.
#[inline]
pub(crate) fn must_ring(flag: &AtomicU32) -> Wake {
    fence_before_looking();
    must_ring_after_fence(flag)
}

/// What stands between publishing something, on any number of links, and [`must_ring_after_fence`].
#[inline]
pub(crate) fn fence_before_looking() {
    // SYNC POINT: armed, then looked
    //
    // Tried: with `AcqRel` here, loom finds the lost wake-up within milliseconds (`loom_data_bell_…`).
    fence(Ordering::SeqCst);
}

/// Whether the peer sleeps on `flag`, for callers that have passed [`fence_before_looking`] since they published.
#[inline]
pub(crate) fn must_ring_after_fence(flag: &AtomicU32) -> Wake {
    // The load keeps the line shared while nobody sleeps. The swap lets one ring stand for all messages until the
    // sleeper arms again. The doorbell itself, a system call, orders what the woken side sees.
    if flag.load(Ordering::Relaxed) != 0 && flag.swap(0, Ordering::Relaxed) != 0 {
        Wake::Ring
    } else {
        Wake::Nothing
    }
}

#[cfg(all(test, not(tokio_shm_loom)))]
mod tests {
    use super::*;

    #[test]
    fn armed_flag_asks_for_one_ring_and_then_for_none() {
        let flag = AtomicU32::new(0);
        assert_eq!(must_ring(&flag), Wake::Nothing);
        arm(&flag);
        arm(&flag);
        assert_eq!(must_ring(&flag), Wake::Ring);
        assert_eq!(must_ring(&flag), Wake::Nothing);
    }

    #[test]
    fn disarmed_flag_asks_for_no_ring() {
        let flag = AtomicU32::new(0);
        arm(&flag);
        disarm(&flag);
        assert_eq!(must_ring(&flag), Wake::Nothing);
    }

    #[test]
    fn flag_with_any_bit_set_counts_as_armed() {
        let flag = AtomicU32::new(0x8000_0000);
        assert_eq!(must_ring(&flag), Wake::Ring);
        assert_eq!(flag.load(Ordering::Relaxed), 0);
    }
}

#[cfg(all(test, tokio_shm_loom))]
mod loom_tests {
    use super::*;
    use crate::proto::layout::HeapPage;
    use crate::proto::release::{Collector, release};
    use crate::proto::ring::{CLAIM_MAX, Consumer, Descriptor, Popped, Producer};
    use loom::sync::Arc;
    use loom::thread;

    fn descriptor(seq: u64) -> Descriptor {
        Descriptor { seq, segment: 0, offset: 0, len: 0, ticket: seq as u32 }
    }

    #[test]
    fn loom_data_bell_subscriber_asleep_with_a_message_was_rung_for() {
        loom::model(|| {
            let heap = Arc::new(HeapPage::new(2));
            let publisher = thread::spawn({
                let heap = heap.clone();
                move || {
                    let mut producer = Producer::new();
                    let mut rings = 0;
                    for seq in 0..2 {
                        producer.push(heap.page(), descriptor(seq));
                        rings += usize::from(must_ring(&heap.page().control.data_armed) == Wake::Ring);
                    }
                    rings
                }
            });

            let page = heap.page();
            let mut consumer = Consumer::new(CLAIM_MAX);
            let mut received = 0;
            while let Popped::Message(_) = consumer.pop(page).unwrap() {
                received += 1;
            }
            arm(&page.control.data_armed);
            let asleep = consumer.is_empty(page);

            let rings = publisher.join().unwrap();
            if asleep && received < 2 {
                assert_eq!(rings, 1, "asleep after {received} of 2 messages");
            }
        });
    }

    #[test]
    fn loom_credit_bell_publisher_asleep_with_a_free_ticket_was_rung_for() {
        loom::model(|| {
            let heap = Arc::new(HeapPage::new(2));
            let subscriber = thread::spawn({
                let heap = heap.clone();
                move || (0..2).filter(|ticket| release(heap.page(), *ticket) == Wake::Ring).count()
            });

            let page = heap.page();
            let mut collector = Collector::new();
            let first = collector.collect(page, usize::MAX, |_| Ok(())).unwrap();
            arm(&page.control.credit_armed);
            let second = collector.collect(page, usize::MAX, |_| Ok(())).unwrap();

            let rings = subscriber.join().unwrap();
            if second == 0 && first < 2 {
                assert_eq!(rings, 1, "asleep after {first} of 2 tickets");
            }
        });
    }
}
