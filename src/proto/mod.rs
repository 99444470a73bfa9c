//! What a publisher and a subscriber say to each other, as pure code.
//!
//! A *link* is one publisher–subscriber connection: a socket over which [`wire`] frames are exchanged, and one page
//! of memory that both sides may write ([`layout`]), which carries the [`ring`] of queued messages, the [`release`]
//! bitmap of those given back, and the flags behind which either side sleeps ([`bell`]). A *ticket* is the right to
//! have one message queued or held on a link. Which message a ticket stands for is known to the publisher's private
//! table alone ([`ticket`]). Beside the link, [`class`] says how large a slot a message gets, [`share`] how much of
//! the pool a link may have, and [`joinlog`] from which message on a subscriber that joins late is owed.
//!
//! Either side may be hostile. Whatever stands in the page or in a frame is a claim of the peer: it is loaded once,
//! checked against private memory, then used; a claim that cannot be true is a [`Misbehaved`], and never a panic, an
//! access out of bounds or a loop that the peer can prolong. A cursor that this process owns is never read back.
//!
//! Nothing here makes a system call, reads a clock, allocates after construction, or knows tokio. What has to be done
//! (ring a doorbell, disconnect the peer) is returned as a value to the layer above.

pub(crate) mod bell;
pub(crate) mod class;
pub(crate) mod hold;
pub(crate) mod joinlog;
pub(crate) mod layout;
#[cfg(all(any(test, fuzzing), not(tokio_shm_loom)))]
pub(crate) mod model;
pub(crate) mod release;
pub(crate) mod ring;
pub(crate) mod share;
pub(crate) mod ticket;
pub(crate) mod wire;

#[cfg(all(test, tokio_shm_loom))]
mod loom_tests;
#[cfg(all(test, not(tokio_shm_loom)))]
mod tests;

/// What the peer did that no peer following the protocol does; the link is to be torn down.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum Misbehaved {
    /// The ring's head only ever grows.
    #[error("moved the ring's head back from {seen} to {now}")]
    HeadWentBack { seen: u64, now: u64 },
    /// Only what was queued can have been taken from the ring.
    #[error("moved the ring's head to {head}, past its tail {tail}")]
    HeadPastTail { head: u64, tail: u64 },
    /// The subscriber gave back tickets of messages that it has not taken from the ring.
    #[error(
        "gave back messages that it had not received, so that {queued} are queued on a ring for {capacity}"
    )]
    ReleasedUnread { queued: u64, capacity: u64 },
    /// The message at the ring's head is no longer the one that was queued there.
    #[error("gave back the message at ring position {position} without having received it")]
    PositionReleased { position: u64 },
    /// A descriptor named, or a release bit stands for, a ticket that the link does not have.
    #[error("used ticket {ticket} on a link that has {depth}")]
    TicketOutOfRange { ticket: u32, depth: u32 },
    /// A ticket can be given back once only.
    #[error("gave back ticket {ticket}, which it did not hold")]
    TicketNotHeld { ticket: u32 },
    /// The count of offered messages only ever grows.
    #[error("moved the count of offered messages back from {seen} to {now}")]
    OfferedWentBack { seen: u64, now: u64 },
}
