//! What a subscriber's link and the samples received on it have in common.

use std::sync::Arc;

use super::LinkPage;
use crate::proto::bell::{self, Wake};
use crate::proto::hold::Hold;
use crate::proto::layout::Page;
use crate::proto::release;
use crate::sys::bell::Bell;
use crate::sys::socket::Connection;

/// What samples need of their link: it lives until the last of them is dropped, and with it the socket, so that the
/// publisher does not take a dropped subscriber for one that holds nothing any more.
#[derive(Debug)]
pub(crate) struct LinkShared {
    publisher: u128,
    /// Kept open, no more.
    _connection: Arc<Connection>,
    page: LinkPage,
    holds: Box<[Hold]>,
    /// Rings for a publisher that is out of tickets or memory.
    credit: Bell,
}

impl LinkShared {
    pub(super) fn new(
        publisher: u128,
        connection: Arc<Connection>,
        page: LinkPage,
        depth: u32,
        credit: Bell,
    ) -> Self {
        let holds = (0..depth).map(|_| Hold::default()).collect();
        Self { publisher, _connection: connection, page, holds, credit }
    }

    #[inline]
    pub(super) fn page(&self) -> Page<'_> {
        self.page.view()
    }

    /// Whether the link has such a ticket.
    #[inline]
    pub(super) fn has_ticket(&self, ticket: u32) -> bool {
        (ticket as usize) < self.holds.len()
    }

    /// Whether samples of this process hold every ticket. What they release meanwhile need not be seen.
    pub(super) fn holds_all(&self) -> bool {
        // From one free ticket on it is not looked further: among messages that wait to be read that is the first or second.
        self.holds.iter().all(Hold::is_held)
    }

    /// How many tickets samples of this process hold.
    pub(super) fn held(&self) -> u64 {
        self.holds.iter().filter(|hold| hold.is_held()).count() as u64
    }

    pub(crate) fn publisher(&self) -> u128 {
        self.publisher
    }

    #[inline]
    pub(crate) fn hold(&self, ticket: u32) -> &Hold {
        &self.holds[ticket as usize]
    }

    /// Rings for a publisher that waits for something, be it room in the socket that was just read.
    pub(super) fn ring_if_starved(&self) {
        if bell::must_ring(&self.page.view().control.credit_armed) == Wake::Ring {
            self.credit.ring();
        }
    }

    /// Gives a ticket back to the publisher, from any thread.
    #[inline]
    pub(crate) fn release(&self, ticket: u32) {
        if release::release(self.page.view(), ticket) == Wake::Ring {
            kill_point!("credit bell: disarmed");
            self.credit.ring();
        }
    }
}
