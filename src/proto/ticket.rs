//! Which message each ticket of a link stands for: the publisher's private truth.
//!
//! Everything a subscriber claims about what it holds is checked against this table, which no other process can see.
//! It does not touch the page, and does not know what a value is: dropping one is up to the caller.

/// The tickets of one link, each free or standing for a `T`.
///
/// Allocates in [`new`](Self::new) only; every operation is O(1), but [`values`](Self::values) and
/// [`drain`](Self::drain).
#[derive(Debug)]
pub(crate) struct Tickets<T> {
    /// By ticket.
    issued: Box<[Option<Issued<T>>]>,
    /// Last in, first out, for the sake of the caches. Never longer than `issued`.
    free: Vec<u32>,
    /// The ticket last used at each place of the ring. A power of two of them.
    at: Box<[u32]>,
}

#[derive(Debug)]
struct Issued<T> {
    /// Where on the ring the message was queued.
    position: u64,
    value: T,
}

impl<T> Tickets<T> {
    /// `depth` free tickets.
    pub(crate) fn new(depth: u32) -> Self {
        Self {
            issued: (0..depth).map(|_| None).collect(),
            free: (0..depth).rev().collect(),
            at: vec![0; depth.next_power_of_two() as usize].into_boxed_slice(),
        }
    }

    /// Gives out a ticket for `value`, to be queued at ring position `position`.
    ///
    /// With no ticket left, `value` comes back.
    #[inline]
    pub(crate) fn issue(&mut self, position: u64, value: T) -> Result<u32, T> {
        let Some(ticket) = self.free.pop() else { return Err(value) };
        self.issued[ticket as usize] = Some(Issued { position, value });
        let place = self.place(position);
        self.at[place] = ticket;
        Ok(ticket)
    }

    /// Takes a ticket back that the subscriber gave back.
    ///
    /// `None`: it had not been given out, or there is no such ticket; the subscriber
    /// [misbehaved](super::Misbehaved::TicketNotHeld).
    #[inline]
    pub(crate) fn reclaim(&mut self, ticket: u32) -> Option<T> {
        let issued = self.issued.get_mut(ticket as usize)?.take()?;
        self.free.push(ticket);
        Some(issued.value)
    }

    /// The ticket of the message queued at `position`.
    ///
    /// `None`: it was given back, though it was never received; the subscriber
    /// [misbehaved](super::Misbehaved::PositionReleased).
    pub(crate) fn at_position(&self, position: u64) -> Option<u32> {
        let ticket = self.at[self.place(position)];
        let issued = self.issued[ticket as usize].as_ref()?;
        (issued.position == position).then_some(ticket)
    }

    /// How many tickets stand for a message.
    #[inline]
    pub(crate) fn outstanding(&self) -> u32 {
        (self.issued.len() - self.free.len()) as u32
    }

    /// How many tickets are left.
    #[inline]
    pub(crate) fn free(&self) -> u32 {
        self.free.len() as u32
    }

    /// What the tickets that are out stand for. O(depth).
    pub(crate) fn values(&self) -> impl Iterator<Item = &T> {
        self.issued.iter().flatten().map(|issued| &issued.value)
    }

    /// Takes back all tickets, as when the subscriber has died. What the iterator has not come to stays given out.
    pub(crate) fn drain(&mut self) -> impl Iterator<Item = T> {
        let free = &mut self.free;
        self.issued.iter_mut().zip(0..).filter_map(move |(issued, ticket)| {
            let issued = issued.take()?;
            free.push(ticket);
            Some(issued.value)
        })
    }

    #[inline]
    fn place(&self, position: u64) -> usize {
        position as usize & (self.at.len() - 1)
    }
}

#[cfg(all(test, not(tokio_shm_loom)))]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    #[derive(Debug, Clone)]
    enum Op {
        Issue,
        Reclaim(u32),
        Look(u64),
        Drain(usize),
    }

    fn op() -> impl Strategy<Value = Op> {
        prop_oneof![
            8 => Just(Op::Issue),
            8 => (0u32..40).prop_map(Op::Reclaim),
            4 => (0u64..50).prop_map(Op::Look),
            1 => (0usize..40).prop_map(Op::Drain),
        ]
    }

    proptest! {
        #[test]
        fn table_agrees_with_a_map(depth in 1u32..=33, ops in prop::collection::vec(op(), 0..300)) {
            let mut tickets = Tickets::new(depth);
            let mut oracle = BTreeMap::new();
            let mut position = 0;
            for op in ops {
                match op {
                    Op::Issue => match tickets.issue(position, position) {
                        Ok(ticket) => {
                            prop_assert!(ticket < depth);
                            prop_assert_eq!(tickets.at_position(position), Some(ticket));
                            prop_assert_eq!(oracle.insert(ticket, position), None);
                            position += 1;
                        }
                        Err(value) => {
                            prop_assert_eq!(value, position);
                            prop_assert_eq!(oracle.len(), depth as usize);
                        }
                    },
                    Op::Reclaim(ticket) => {
                        prop_assert_eq!(tickets.reclaim(ticket), oracle.remove(&ticket));
                    }
                    Op::Look(back) => {
                        // Further back than the ring is long, what was there may have been overwritten.
                        let asked = position.wrapping_sub(back);
                        let there = oracle.iter().find(|(_, at)| **at == asked).map(|(ticket, _)| *ticket);
                        let found = tickets.at_position(asked);
                        if back <= u64::from(depth.next_power_of_two()) {
                            prop_assert_eq!(found, there);
                        } else {
                            prop_assert!(found.is_none() || found == there);
                        }
                    }
                    Op::Drain(most) => {
                        for value in tickets.drain().take(most) {
                            let (ticket, _) = oracle.iter().find(|(_, at)| **at == value).unwrap();
                            let ticket = *ticket;
                            oracle.remove(&ticket);
                        }
                    }
                }
                prop_assert_eq!(tickets.outstanding() as usize, oracle.len());
                prop_assert_eq!(tickets.free(), depth - tickets.outstanding());
            }
            prop_assert_eq!(tickets.drain().count(), oracle.len());
            prop_assert_eq!(tickets.free(), depth);
        }
    }

    #[test]
    fn ticket_given_back_last_is_issued_first() {
        let mut tickets = Tickets::new(3);
        assert_eq!([0, 1, 2].map(|position| tickets.issue(position, ()).unwrap()), [0, 1, 2]);
        tickets.reclaim(2).unwrap();
        tickets.reclaim(0).unwrap();
        assert_eq!(tickets.issue(3, ()), Ok(0));
    }
}
