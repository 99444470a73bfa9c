//! How a subscriber gives messages back: one bit a ticket.
//!
//! A single `fetch_or` sets the bit, from whichever thread drops the last clone of a sample, so there is no half-done
//! state for a process to be killed in. The publisher swaps whole words for zero and knows from its own table what the
//! bits stand for.
//!
//! Whether the subscriber held these tickets at all is not known here, but to [`Tickets`](super::ticket::Tickets).

use super::Misbehaved;
use super::bell::{Wake, must_ring_after_fence};
use super::layout::Page;
use crate::sync::atomic::Ordering;
use crate::sync::fence_after_rmw;

/// The subscriber gives back the message that it got with `ticket`, having read it for the last time.
///
/// `ticket` comes from a [`Descriptor`](super::ring::Descriptor) popped from the same page: that it is in range was
/// checked there.
#[inline]
pub(crate) fn release(page: Page<'_>, ticket: u32) -> Wake {
    let word = &page.released[(ticket / u64::BITS) as usize];
    // SYNC POINT: message released
    //
    // Release: what this thread (and those that dropped clones before it) read of the payload was read before the
    // publisher, which acquires the word, writes there again. Several threads may set bits of one word: each
    // read-modify-write carries on the release sequences of those before it, so that one swap acquires from all.
    // Tried: with `Relaxed` here, loom reports the reuse as a data race (`loom_released_tickets_…`).
    word.fetch_or(1 << (ticket % u64::BITS), Ordering::Release);
    kill_point!("release: bit set");
    // SYNC POINT: armed, then looked
    fence_after_rmw();
    must_ring_after_fence(&page.control.credit_armed)
}

/// The publisher's side of the bitmap.
#[derive(Debug)]
pub(crate) struct Collector {
    /// The word to begin with, so that a publisher that takes few tickets at a time does not always pass over the same
    /// ones, nor scan the whole bitmap of a deep link for each.
    next_word: usize,
}

impl Collector {
    pub(crate) const fn new() -> Self {
        Self { next_word: 0 }
    }

    /// Passes released tickets to `some`, those of one word at a time, until there are `wanted` of them or no more, and returns how
    /// many.
    ///
    /// It looks at each word of the bitmap once at most, and always finishes a word: so there may be up to 63 more than
    /// wanted. After an error, from the bitmap or from `some`, some tickets may have been taken from the bitmap
    /// without being passed on: the link is to be torn down, which returns all of them.
    pub(crate) fn collect(
        &mut self,
        page: Page<'_>,
        wanted: usize,
        mut some: impl FnMut(Released) -> Result<(), Misbehaved>,
    ) -> Result<usize, Misbehaved> {
        let depth = page.geometry().depth();
        let mut collected = 0;
        for _ in 0..page.released.len() {
            if collected >= wanted {
                break;
            }
            let index = self.next_word;
            self.next_word = if index + 1 < page.released.len() { index + 1 } else { 0 };
            let word = &page.released[index];
            // Only a look, which leaves the cache line shared when there is nothing.
            if word.load(Ordering::Relaxed) == 0 {
                continue;
            }
            // SYNC POINT: message released
            let released =
                Released { bits: word.swap(0, Ordering::Acquire), first: index as u32 * u64::BITS };
            kill_point!("reclaim: word swapped");
            if let Some(ticket) = released.highest().filter(|&ticket| ticket >= depth) {
                return Err(Misbehaved::TicketOutOfRange { ticket, depth });
            }
            collected += released.bits.count_ones() as usize;
            some(released)?;
        }
        Ok(collected)
    }
}

/// The tickets that one word of the bitmap had, lowest first.
#[derive(Debug)]
pub(crate) struct Released {
    bits: u64,
    /// The ticket of the lowest bit.
    first: u32,
}

impl Released {
    fn highest(&self) -> Option<u32> {
        Some(self.first + self.bits.checked_ilog2()?)
    }
}

impl Iterator for Released {
    type Item = u32;

    #[inline]
    fn next(&mut self) -> Option<u32> {
        if self.bits == 0 {
            return None;
        }
        let ticket = self.first + self.bits.trailing_zeros();
        self.bits &= self.bits - 1;
        Some(ticket)
    }
}

#[cfg(all(test, not(tokio_shm_loom)))]
mod tests {
    use super::*;
    use crate::proto::layout::HeapPage;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    #[derive(Debug, Clone)]
    enum Op {
        Release(u32),
        Collect(usize),
    }

    proptest! {
        #[test]
        fn bitmap_gives_each_released_ticket_once(
            depth in 1u32..=300,
            ops in prop::collection::vec(
                prop_oneof![
                    4 => any::<u32>().prop_map(Op::Release),
                    1 => prop_oneof![0usize..5, Just(usize::MAX)].prop_map(Op::Collect),
                ],
                0..200,
            ),
        ) {
            let heap = HeapPage::new(depth);
            let page = heap.page();
            let mut collector = Collector::new();
            let mut oracle = BTreeSet::new();
            for op in ops {
                match op {
                    Op::Release(ticket) => {
                        let ticket = ticket % depth;
                        prop_assert_eq!(release(page, ticket), Wake::Nothing);
                        oracle.insert(ticket);
                    }
                    Op::Collect(wanted) => {
                        let before = oracle.len();
                        let mut absent = None;
                        let collected = collector
                            .collect(page, wanted, |mut released| {
                                absent = absent.or(released.find(|ticket| !oracle.remove(ticket)));
                                Ok(())
                            })
                            .unwrap();
                        prop_assert_eq!(absent, None);
                        prop_assert_eq!(collected, before - oracle.len());
                        prop_assert!(collected >= wanted.min(before));
                        prop_assert!(collected < wanted.saturating_add(64));
                    }
                }
            }
        }
    }

    #[test]
    fn bit_beyond_the_depth_is_misbehaviour() {
        let heap = HeapPage::new(3);
        heap.page().released[0].store(0b1000, Ordering::Relaxed);
        assert_eq!(
            Collector::new().collect(heap.page(), usize::MAX, |_| Ok(())),
            Err(Misbehaved::TicketOutOfRange { ticket: 3, depth: 3 }),
        );
    }

    #[test]
    fn release_rings_for_a_publisher_that_armed() {
        let heap = HeapPage::new(3);
        super::super::bell::arm(&heap.page().control.credit_armed);
        assert_eq!(release(heap.page(), 0), Wake::Ring);
        assert_eq!(release(heap.page(), 1), Wake::Nothing);
    }
}

#[cfg(all(test, tokio_shm_loom))]
#[allow(unsafe_code)]
mod loom_tests {
    use super::*;
    use crate::proto::layout::HeapPage;
    use loom::cell::UnsafeCell;
    use loom::sync::Arc;
    use loom::thread;

    struct Shared {
        heap: HeapPage,
        payload: [UnsafeCell<()>; 2],
    }

    // SAFETY: the cells are never dereferenced: they only let loom see who reads and writes when, and fail the model
    // if a write is concurrent with anything.
    unsafe impl Sync for Shared {}

    #[test]
    fn loom_released_tickets_are_collected_once_and_reused_after_the_last_read() {
        loom::model(|| {
            let shared = Arc::new(Shared {
                heap: HeapPage::new(2),
                payload: [UnsafeCell::new(()), UnsafeCell::new(())],
            });
            let readers = [0, 1].map(|ticket| {
                let shared = shared.clone();
                thread::spawn(move || {
                    shared.payload[ticket as usize].with(|_read| ());
                    let _ = release(shared.heap.page(), ticket);
                })
            });

            let mut collector = Collector::new();
            let mut times = [0; 2];
            let mut collect = || {
                collector
                    .collect(shared.heap.page(), usize::MAX, |released| {
                        for ticket in released {
                            times[ticket as usize] += 1;
                            shared.payload[ticket as usize].with_mut(|_written| ());
                        }
                        Ok(())
                    })
                    .unwrap()
            };
            collect();
            collect();
            for reader in readers {
                reader.join().unwrap();
            }
            collect();
            assert_eq!(times, [1, 1]);
        });
    }
}
