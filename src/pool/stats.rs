//! What a pool tells about itself.

/// A reading of a pool's counters; each is exact, but they are not read at one instant.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct PoolStats {
    /// Takes served from an idle slot.
    pub hits: u64,
    /// Takes that had to make a segment.
    pub misses: u64,
    /// Bytes of all segments, in use and idle.
    pub bytes: u64,
    /// The cap on `bytes`.
    pub max_bytes: u64,
    /// Bytes of segments that the pool has given up and that subscribers still have: they were disconnected, by `evict_after` or because
    /// their publisher closed, and keep their samples. Up to `max_bytes` of these count apart from `bytes`, beyond that they count in it
    /// as well: the pool never takes more than twice `max_bytes`.
    pub abandoned_bytes: u64,
    /// Segments that exist.
    pub segments: usize,
    /// Callers waiting for a segment now.
    pub waiters: usize,
    /// The sizes in use so far, smallest first.
    pub sizes: Vec<SizeStats>,
}

impl PoolStats {
    /// Idle slots of all sizes.
    pub fn idle(&self) -> usize {
        self.sizes.iter().map(|size| size.idle).sum()
    }

    /// Slots of all sizes that somebody holds.
    pub fn in_use(&self) -> usize {
        self.sizes.iter().map(|size| size.slots - size.idle.min(size.slots)).sum()
    }
}

/// One size class of a pool.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct SizeStats {
    /// The capacity of each slot, in bytes.
    pub size: usize,
    /// Slots that exist.
    pub slots: usize,
    /// Slots that are idle.
    pub idle: usize,
}
