//! The messages that are under way: in which slot each lies, and how many of a publisher's links and lists still have it.
//!
//! One publisher's delivery counts here, and only one thread at a time is in it: so the counts are plain numbers, where an
//! `Arc` a link would cost two atomic operations for each message. It knows nothing of subscribers.

use std::sync::Arc;

use crate::budget::Holder;
use crate::pool::PooledSegment;
use crate::pool::core::{PoolCore, Slot};
use crate::prefetch;
use crate::proto::share::Shares;

/// Larger messages are not fetched before they are written: the writes to their lines wait all at once by themselves, with no
/// locked instruction between them.
const FETCHED_MAX: usize = 256;

/// Names a message under way; whoever keeps one has a share of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Flight(u32);

#[derive(Debug)]
struct Entry {
    /// `None` while the entry is free.
    slot: Option<Arc<Slot>>,
    shares: u32,
    /// What the slot takes, in units of `GRAIN`.
    charge: u32,
}

/// A publisher's messages under way. As many as its links are deep together, and its history long, at most.
#[derive(Debug)]
pub(crate) struct InFlight {
    pool: Arc<PoolCore>,
    entries: Vec<Entry>,
    /// Last in, first out, for the sake of the caches.
    free: Vec<u32>,
    /// What all of them take, in units of `GRAIN`.
    used: u64,
    /// How much they may take, in the same units.
    pub(crate) shares: Shares,
}

impl InFlight {
    pub(crate) fn new(pool: Arc<PoolCore>) -> Self {
        Self { pool, entries: Vec::new(), free: Vec::new(), used: 0, shares: Shares::divide(0, 1) }
    }

    pub(crate) fn pool(&self) -> &PoolCore {
        &self.pool
    }

    /// A message in `slot`, with one share of it.
    #[inline]
    pub(crate) fn begin(&mut self, slot: Arc<Slot>) -> Flight {
        let charge = slot.charge();
        self.used += u64::from(charge);
        let entry = Entry { slot: Some(slot), shares: 1, charge };
        match self.free.pop() {
            Some(index) => {
                self.entries[index as usize] = entry;
                Flight(index)
            }
            None => self.grow(entry),
        }
    }

    #[inline]
    pub(crate) fn slot(&self, flight: Flight) -> &Arc<Slot> {
        self.entries[flight.0 as usize].slot.as_ref().expect("whoever names a message has a share of it")
    }

    /// What a message takes, in units of `GRAIN`.
    #[inline]
    pub(crate) fn charge(&self, flight: Flight) -> u64 {
        u64::from(self.entries[flight.0 as usize].charge)
    }

    /// Whether links are bound by their shares of the pool.
    #[inline]
    pub(crate) fn is_scarce(&self) -> bool {
        self.shares.is_scarce(self.used)
    }

    /// Whether the messages take more than they may all together.
    pub(crate) fn is_exceeded(&self) -> bool {
        self.shares.is_exceeded(self.used)
    }

    /// Whether the messages have most of what a loan may be waiting for.
    pub(crate) fn is_half(&self) -> bool {
        self.shares.is_half(self.used)
    }

    /// Whether a link that has `held` may have this message as well.
    pub(crate) fn admits(&self, flight: Flight, held: u64) -> bool {
        self.shares.admits(self.used, held, self.charge(flight))
    }

    /// Takes another share.
    #[inline]
    pub(crate) fn share(&mut self, flight: Flight) {
        self.entries[flight.0 as usize].shares += 1;
    }

    /// Whether there is one share only.
    pub(crate) fn is_unshared(&self, flight: Flight) -> bool {
        self.entries[flight.0 as usize].shares == 1
    }

    /// Gives up a share; with the last one the slot goes back to the pool: `true`.
    #[inline]
    pub(crate) fn release(&mut self, flight: Flight) -> bool {
        self.take_if_last(flight).map(|slot| self.pool.give_back(slot)).is_some()
    }

    /// As [`release`](Self::release), of a share that a subscriber had; with the last one the slot is left in `returned`.
    #[inline]
    pub(crate) fn reclaim(&mut self, flight: Flight, returned: &mut Vec<PooledSegment>) {
        returned.extend(self.take_if_last(flight).map(PooledSegment::from_slot));
    }

    /// Gives back to the pool what has `returned`, small ones fetched to be written next; how many there were.
    #[inline]
    pub(crate) fn give_back(&self, returned: &mut Vec<PooledSegment>) -> usize {
        let count = returned.len();
        fetch(returned);
        returned.drain(..).for_each(|segment| self.pool.give_back(segment.into_slot()));
        count
    }

    #[inline]
    fn take_if_last(&mut self, flight: Flight) -> Option<Arc<Slot>> {
        let entry = &mut self.entries[flight.0 as usize];
        entry.shares -= 1;
        if entry.shares > 0 {
            return None;
        }
        self.used -= u64::from(entry.charge);
        // There is room: no more are free than there are entries.
        self.free.push(flight.0);
        entry.slot.take()
    }

    /// Gives up a share of a message that somebody out of reach may go on reading: its slot is never written again.
    pub(crate) fn abandon(&mut self, flight: Flight, holder: &Arc<dyn Holder>) {
        self.pool.abandon(self.slot(flight), Some(holder));
        self.release(flight);
    }

    #[cold]
    fn grow(&mut self, entry: Entry) -> Flight {
        let index = u32::try_from(self.entries.len()).expect("tickets of all links are fewer");
        self.entries.push(entry);
        self.free.reserve(self.entries.len());
        Flight(index)
    }
}

/// Fetches small ones to be written. To be done for all of them before the first is given back: see `prefetch`.
#[inline]
fn fetch(returned: &mut [PooledSegment]) {
    for segment in returned {
        // What is abandoned somebody who has parted may go on reading.
        if segment.len() <= FETCHED_MAX && !segment.is_abandoned() {
            prefetch::for_writing(segment);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ShmSegmentPool;

    #[derive(Debug)]
    struct Gone;

    impl Holder for Gone {
        fn is_gone(&self) -> bool {
            true
        }

        fn is_subscriber(&self, _: u128) -> bool {
            false
        }
    }

    fn gone() -> Arc<dyn Holder> {
        Arc::new(Gone)
    }

    #[test]
    fn slot_goes_back_with_the_last_share_and_its_entry_is_used_again() {
        let pool = ShmSegmentPool::new(crate::ShmPoolConfig::new());
        let mut in_flight = InFlight::new(Arc::clone(pool.core()));
        let first = in_flight.begin(pool.try_take(1).unwrap().into_slot());
        let other = in_flight.begin(pool.try_take(1).unwrap().into_slot());
        assert_ne!(first, other);
        in_flight.share(first);
        assert!(!in_flight.is_unshared(first));
        assert!(!in_flight.release(first));
        assert!(in_flight.is_unshared(first));
        assert_eq!(pool.stats().in_use(), 2);
        assert!(in_flight.release(first));
        assert_eq!(pool.stats().in_use(), 1);
        assert_eq!(in_flight.begin(pool.try_take(1).unwrap().into_slot()), first);
        for flight in [first, other] {
            assert!(in_flight.release(flight));
        }
        assert_eq!(pool.stats().in_use(), 0);
    }

    #[test]
    fn slot_abandoned_is_not_used_again() {
        let pool = ShmSegmentPool::new(crate::ShmPoolConfig::new());
        let mut in_flight = InFlight::new(Arc::clone(pool.core()));
        let flight = in_flight.begin(pool.try_take(1 << 20).unwrap().into_slot());
        in_flight.share(flight);
        in_flight.abandon(flight, &gone());
        assert_eq!(pool.stats().segments, 1);
        assert!(in_flight.release(flight));
        assert_eq!(pool.stats().segments, 0);
    }

    #[test]
    fn slot_that_somebody_may_go_on_reading_is_not_written_to_when_it_comes_back() {
        let pool = ShmSegmentPool::new(crate::ShmPoolConfig::new());
        for abandoned in [false, true] {
            let mut in_flight = InFlight::new(Arc::clone(pool.core()));
            let mut segment = pool.try_take(64).unwrap();
            segment.fill(1);
            let flight = in_flight.begin(segment.into_slot());
            in_flight.share(flight);
            if abandoned {
                in_flight.abandon(flight, &gone());
            } else {
                in_flight.release(flight);
            }
            let mut returned = Vec::new();
            in_flight.reclaim(flight, &mut returned);
            fetch(&mut returned);
            assert_eq!(returned[0][0], u8::from(abandoned));
            assert_eq!(in_flight.give_back(&mut returned), 1);
            assert!(returned.is_empty());
        }
        assert_eq!(pool.stats().in_use(), 0);
    }
}
