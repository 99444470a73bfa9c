//! Messages that a sink accepted while the pool was at its cap: they wait in the heap, in order, until there are slots for them.

use std::sync::Arc;

use super::{Queued, Shared};
use crate::pool::PooledSegment;
use crate::pool::core::Slot;
use crate::publisher::delivery::Delivery;
use crate::sync::atomic::Ordering;

impl Shared {
    /// How long the pool has to look for the message that waits in the heap, if any does.
    pub(crate) fn starved_for(&self) -> Option<usize> {
        self.starved.load(Ordering::Acquire).checked_sub(1)
    }

    /// How long a slot is still to be found, if any: one that was left here for the first message in the heap is enough, for as long as
    /// that cannot be delivered.
    pub(crate) fn slot_wanted(&self) -> Option<usize> {
        let len = self.starved_for()?;
        let suffices = self.fed.lock().as_ref().is_some_and(|segment| segment.capacity() >= len);
        (!suffices).then_some(len)
    }

    /// The next queued message, in a slot; `None` too while one waits for a slot. Counts in `popped` what left the queue.
    #[inline]
    pub(super) fn next_queued(&self, delivery: &mut Delivery, popped: &mut usize) -> Option<Arc<Slot>> {
        if delivery.waiting.is_empty() {
            let queued = self.pop(delivery)?;
            *popped += 1;
            match queued {
                Queued::Slot(slot) => return Some(slot),
                Queued::Heap(bytes) => delivery.waiting.push_back(*bytes),
            }
        }
        self.seat(delivery, popped)
    }

    /// Moves the first message from the heap into a slot, or has the tx task look for one.
    #[cold]
    fn seat(&self, delivery: &mut Delivery, popped: &mut usize) -> Option<Arc<Slot>> {
        let len = delivery.waiting.front()?.len();
        let fed = self.fed.lock().take().filter(|segment| segment.capacity() >= len);
        let Some(mut segment) = fed.or_else(|| self.swap_out(delivery, len, popped)) else {
            if self.starved.swap(len + 1, Ordering::AcqRel) != len + 1 {
                self.notify();
            }
            return None;
        };
        let bytes = delivery.waiting.pop_front()?;
        segment.set_len(len);
        segment.copy_from_slice(&bytes);
        if let Some(next) = delivery.waiting.front() {
            // It may be as long as this one: the tx task is told that another slot is wanted.
            self.starved.swap(next.len() + 1, Ordering::AcqRel);
            self.notify();
        } else {
            self.starved.swap(0, Ordering::AcqRel);
            // What the tx task has got by now comes too late.
            drop(self.fed.lock().take());
            self.sinks.wake_all();
        }
        Some(segment.into_slot())
    }

    /// A slot for the first message in the heap from a message further back, whose bytes wait in the heap instead.
    ///
    /// Only where no subscriber has any to release: with all memory in messages behind the one that waits for some, it
    /// would wait for ever.
    fn swap_out(&self, delivery: &mut Delivery, len: usize, popped: &mut usize) -> Option<PooledSegment> {
        self.reclaim(delivery);
        if let Some(idle) = self.pool.take_idle_first(len) {
            return Some(idle);
        }
        // No more of them than the queue is long: each has given its place to another.
        while !delivery.has_tickets_out() && delivery.waiting.len() <= self.config.queue as usize {
            let queued = self.pop(delivery)?;
            *popped += 1;
            match queued {
                Queued::Heap(bytes) => delivery.waiting.push_back(*bytes),
                Queued::Slot(slot) => {
                    let segment = PooledSegment::from_slot(slot);
                    delivery.waiting.push_back(segment[..].into());
                    if segment.capacity() >= len {
                        return Some(segment);
                    }
                    // Too small; but what it frees may make room for one that is not.
                }
            }
        }
        None
    }

    /// Leaves a slot for the message that waits for one, if it still does.
    pub(crate) fn feed(&self, segment: PooledSegment) {
        let mut fed = self.fed.lock();
        if self.starved_for().is_some() {
            *fed = Some(segment);
        }
    }
}
