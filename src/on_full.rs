//! [`OnFull`]: what happens to a message for which a subscriber has no room.

use crate::proto::wire::OnFullWire;

/// What happens to a message for which a subscriber has no room: as many as its `depth` are queued for it or held, or as many bytes as
/// its share of the pool ([`link_bytes`](crate::ShmPublisherBuilder::link_bytes)).
///
/// What is dropped is counted exactly, and told to that subscriber by [`RecvError::Lagged`](crate::RecvError::Lagged).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum OnFull {
    /// Senders wait until it has room. Nothing is lost.
    #[default]
    Wait,
    /// The oldest message that it has not received yet is taken back; if it holds them all, the new one is dropped.
    DropOldest,
    /// The new message is dropped.
    DropNewest,
}

impl From<OnFull> for OnFullWire {
    fn from(on_full: OnFull) -> Self {
        match on_full {
            OnFull::Wait => Self::Wait,
            OnFull::DropOldest => Self::DropOldest,
            OnFull::DropNewest => Self::DropNewest,
        }
    }
}

impl From<OnFullWire> for OnFull {
    fn from(on_full: OnFullWire) -> Self {
        match on_full {
            OnFullWire::Wait => Self::Wait,
            OnFullWire::DropOldest => Self::DropOldest,
            OnFullWire::DropNewest => Self::DropNewest,
        }
    }
}
