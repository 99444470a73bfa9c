//! One publisher–subscriber connection: the page both sides write, and each side's own half.
//!
//! The publisher's half is [`LinkTx`], the subscriber's [`LinkRx`]. Neither waits; what to wait for is the business
//! of the handles above.

mod in_flight;
mod page;
mod recent;
mod rx;
mod shared;
mod tx;

pub(crate) use self::in_flight::{Flight, InFlight};
pub(crate) use self::page::LinkPage;
pub(crate) use self::rx::{AllHeld, Ended, LinkRx, Next};
pub(crate) use self::shared::LinkShared;
pub(crate) use self::tx::{Holding, LinkError, LinkSeed, LinkTx, Message, Offer, Seat};

use crate::access::Access;
use crate::proto::Misbehaved;
use crate::proto::layout::LayoutError;
use crate::proto::wire::{Frame, WireError};
use crate::sys::ids::Shown;
use crate::sys::memory::MemoryError;
use crate::sys::process::Process;
use crate::sys::socket::Connection;
use crate::text::Hex;

/// What a peer did against the protocol; its link was ended for it.
///
/// Its text says what; there is nothing to match on, because nothing else can be done about it.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
pub struct Fault(#[from] Kind);

#[derive(Debug, thiserror::Error)]
pub(crate) enum Kind {
    #[error(transparent)]
    Page(#[from] Misbehaved),
    #[error(transparent)]
    Layout(#[from] LayoutError),
    #[error(transparent)]
    Wire(#[from] WireError),
    #[error("sent unusable shared memory")]
    Memory(#[source] MemoryError),
    #[error("sent a {0} frame out of turn")]
    OutOfTurn(&'static str),
    #[error("announced segment {0} twice")]
    AnnouncedTwice(u64),
    #[error("announced more than {SEGMENTS_MAX} segments at a time")]
    TooManySegments,
    #[error("announced {announced} bytes of shared memory, where {most} is the most for this host")]
    TooMuchMemory { announced: u64, most: u64 },
    #[error("retired segment {0}, which it had not announced")]
    NotAnnounced(u64),
    #[error("granted a depth of {granted} where {asked} was asked for")]
    TooDeep { asked: u32, granted: u32 },
    #[error("calls itself publisher {said}, and its socket is that of {socket}")]
    Impostor { said: Hex, socket: Hex },
    /// One more than the receiver has room for stands for any number.
    #[error("sent {actual} file descriptors with a frame that takes {expected}")]
    Descriptors { expected: usize, actual: usize },
    #[error("sent a file descriptor of the wrong sort")]
    Descriptor(#[source] std::io::Error),
    #[error(
        "runs as user {theirs} with group {group}, and this process as user {ours}; let it in by `allow_uid` or `allow_gid` \
         if it is to take part"
    )]
    Stranger { theirs: Shown, group: Shown, ours: u32 },
    #[error("named bytes {offset}..{offset}+{len} of segment {segment}, which are not there")]
    OutOfBounds { segment: u64, offset: u64, len: u64 },
    #[error("used ticket {0} again while its last message was still held")]
    TicketReused(u32),
    #[error("sent message {actual} where {expected} or a later one was due")]
    Backwards { expected: u64, actual: u64 },
}

/// How many segments a publisher may have announced on a link, and not retired, at any time: each is a mapping of the
/// subscriber's process, which can have 65,530 by default. A publisher whose pool has more retires what is not in use.
pub(crate) const SEGMENTS_MAX: usize = 8_192;

/// What is wrong with a packet that was longer than any frame, or had more descriptors than any takes.
pub(crate) fn truncated(buffer: &[u8], len: usize, fds: usize) -> Kind {
    let Some(packet) = buffer.get(..len) else { return WireError::TooLong { len }.into() };
    match Frame::decode(packet) {
        Ok(frame) => Kind::Descriptors { expected: frame.fds(), actual: fds + 1 },
        Err(error) => error.into(),
    }
}

/// Checks, by the kernel's word, that the peer may take part, and finds out how to hear of its end.
pub(crate) fn identify(peer: &Connection, access: &Access) -> Result<Process, LinkError> {
    let theirs = peer.peer_credentials()?;
    if !access.admits(theirs) {
        let ours = rustix::process::geteuid().as_raw();
        return Err(Kind::Stranger { theirs: Shown(theirs.uid), group: Shown(theirs.gid), ours }.into());
    }
    Ok(Process::watch(peer)?)
}
