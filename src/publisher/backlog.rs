//! How much memory the messages in the tx queue take: a queue is bounded in messages and in bytes.
//!
//! It counts; who waits is told by the gates beside the queue.

use crate::pool::core::Slot;
use crate::sync::atomic::{AtomicU64, Ordering};

/// The queue may take one part in so many of the publisher's part of its pool.
const PART: u64 = 8;

/// Bytes in the tx queue, in units of `GRAIN`.
#[derive(Debug)]
pub(crate) struct Backlog {
    /// Only messages of so much or more are counted, so that small ones cost nothing: a whole queue of smaller ones takes a part in
    /// eight of [`most`](Self::most) at the most.
    counted_from: u64,
    /// Added by the sender after it has joined the queue and before its message can be taken out of it; subtracted by the delivery.
    queued: AtomicU64,
    /// With more than this in the queue there is no room. Written by the delivery.
    most: AtomicU64,
}

impl Backlog {
    /// For a queue of `messages`, of a publisher whose part of its pool is `part`. `None`: bounded in messages alone.
    pub(crate) fn new(part: Option<u64>, messages: u32) -> Self {
        let most = part.map_or(u64::MAX, |part| part / PART);
        Self {
            counted_from: part.map_or(u64::MAX, |_| most / PART / u64::from(messages)),
            queued: AtomicU64::new(0),
            most: AtomicU64::new(most),
        }
    }

    /// Follows the publisher's part of its pool.
    pub(crate) fn set_part(&self, part: u64) {
        self.most.store(part / PART, Ordering::Relaxed);
    }

    /// Whether another message may join, whatever its length: the queue may go beyond its bound by one message a sender.
    #[inline]
    pub(crate) fn has_room(&self) -> bool {
        // SYNC POINT: taken from the queue, then woken who waits (Acquire). A sender that sees no room is woken by a later take.
        self.queued.load(Ordering::Acquire) <= self.most.load(Ordering::Relaxed)
    }

    /// Counts a message that joins.
    #[inline]
    pub(crate) fn add(&self, slot: &Slot) {
        if u64::from(slot.charge()) >= self.counted_from {
            self.queued.fetch_add(u64::from(slot.charge()), Ordering::AcqRel);
        }
    }

    /// Counts a message off that was taken from the queue.
    #[inline]
    pub(crate) fn remove(&self, slot: &Slot) {
        if u64::from(slot.charge()) >= self.counted_from {
            // SYNC POINT: taken from the queue, then woken who waits (Release).
            self.queued.fetch_sub(u64::from(slot.charge()), Ordering::AcqRel);
        }
    }
}
