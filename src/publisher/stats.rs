//! What a publisher tells about itself.

/// A reading of a publisher's counters; each is exact, but they are not read at one instant.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct PublisherStats {
    /// Messages that were given a number.
    pub published: u64,
    /// Messages that did not reach a subscriber because it was full, counted once for each such subscriber.
    pub dropped: u64,
    /// Payload bytes copied into shared memory by this publisher; sending a loan copies none.
    pub copied_bytes: u64,
    /// Subscribers now.
    pub subscribers: usize,
    /// Messages accepted but not yet on their links.
    pub queued: usize,
}
