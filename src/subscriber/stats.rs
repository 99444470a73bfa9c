//! What a subscriber tells about itself.

/// A reading of a subscriber's counters.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct SubscriberStats {
    /// Messages received.
    pub received: u64,
    /// Payload bytes of the messages received; none of them copied.
    pub bytes: u64,
    /// Messages missed: the sum of all [`Lagged`](crate::RecvError::Lagged).
    pub lagged: u64,
    /// Publishers connected now.
    pub publishers: usize,
    /// Publishers that were lost without closing.
    pub publishers_lost: u64,
}
