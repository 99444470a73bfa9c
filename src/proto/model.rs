//! A publisher's half of a link without system calls, for tests and for fuzzing.

use super::Misbehaved;
use super::layout::HeapPage;
use super::release::Collector;
use super::ring::{Descriptor, Producer};
use super::ticket::Tickets;

/// What a publisher keeps of a link, put together the way it is meant to be.
pub(crate) struct Publisher {
    pub(crate) producer: Producer,
    pub(crate) tickets: Tickets<u64>,
    collector: Collector,
    pub(crate) next_seq: u64,
}

impl Publisher {
    pub(crate) fn new(depth: u32) -> Self {
        Self {
            producer: Producer::new(),
            tickets: Tickets::new(depth),
            collector: Collector::new(),
            next_seq: 0,
        }
    }

    /// `Ok(false)`: no ticket left.
    pub(crate) fn publish(&mut self, heap: &HeapPage) -> Result<bool, Misbehaved> {
        let seq = self.next_seq;
        let Ok(ticket) = self.tickets.issue(self.producer.position(), seq) else { return Ok(false) };
        let descriptor = Descriptor { seq, segment: seq ^ 0xabcd, offset: seq * 64, len: seq ^ 0x5a, ticket };
        self.producer.push(heap.page(), descriptor);
        self.next_seq += 1;
        self.producer.offer(heap.page(), self.next_seq);
        Ok(true)
    }

    pub(crate) fn collect(&mut self, heap: &HeapPage) -> Result<Vec<u64>, Misbehaved> {
        let mut values = Vec::new();
        let free = self.tickets.free();
        let collected = self.collector.collect(heap.page(), usize::MAX, |mut released| {
            released.try_for_each(|ticket| {
                values.push(self.tickets.reclaim(ticket).ok_or(Misbehaved::TicketNotHeld { ticket })?);
                Ok(())
            })
        });
        self.producer.fetch(heap.page(), free..self.tickets.free());
        collected.map(|_| values)
    }

    pub(crate) fn take_back(&mut self, heap: &HeapPage) -> Result<Option<u64>, Misbehaved> {
        let Some(position) = self.producer.take_back(heap.page())? else { return Ok(None) };
        let ticket = self.tickets.at_position(position).ok_or(Misbehaved::PositionReleased { position })?;
        Ok(self.tickets.reclaim(ticket))
    }
}
