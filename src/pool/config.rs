//! What a pool may use and how it makes its segments.

use crate::sys::memory::{Backing, CreateOptions};

/// Settings of a [`ShmSegmentPool`](crate::ShmSegmentPool).
///
/// # Examples
///
/// ```
/// use tokio_shm::ShmPoolConfig;
///
/// let config = ShmPoolConfig::new().max_bytes(64 << 20).max_idle_per_size(4);
/// # let _ = config;
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
#[must_use = "a configuration does nothing until a pool or publisher is built from it"]
pub struct ShmPoolConfig {
    pub(crate) max_idle_per_size: usize,
    pub(crate) max_bytes: u64,
    pub(crate) backing: Backing,
    pub(crate) populate: bool,
    pub(crate) lock_memory: bool,
    pub(crate) huge_pages: bool,
    pub(crate) pooling: bool,
}

impl ShmPoolConfig {
    /// The defaults: 64 idle segments a size, at most 256 MiB, sealed memfds, populated, not locked.
    pub fn new() -> Self {
        Self {
            max_idle_per_size: 64,
            max_bytes: 256 << 20,
            backing: Backing::Memfd,
            populate: true,
            lock_memory: false,
            huge_pages: false,
            pooling: true,
        }
    }

    /// How many idle segments of one size above 16 KiB are kept for reuse; more are freed. Default 64, at least 1.
    ///
    /// A stream that its subscribers keep up with goes round a few; one that they do not has as many under way as they are deep
    /// (64 by default), which come back in bursts. With fewer kept, each burst would free some and make them anew, at a
    /// millisecond for a MiB. What is kept counts towards [`max_bytes`](Self::max_bytes), and is given up for other sizes.
    ///
    /// Of sizes from 512 KiB to 4 MiB, messages that are read one by one go round two segments, if two are kept and the cap has room:
    /// one that was just read is slow to write, because it lies in its reader's cache.
    ///
    /// Sizes up to 16 KiB share segments: those stay until another size needs their bytes or
    /// [`trim`](crate::ShmSegmentPool::trim) is called, and the most that was in use at once bounds them. Of a size below 704
    /// bytes the first 512 take 704 bytes each where the cap is 2 MiB or more: they are read faster that far apart.
    pub fn max_idle_per_size(mut self, segments: usize) -> Self {
        self.max_idle_per_size = segments.max(1);
        self
    }

    /// The cap: bytes of all segments, in use and idle, together. Default 256 MiB.
    ///
    /// At the cap idle segments of other sizes are used or given up first: a message of 512 KiB or more may have a larger slot, as long as
    /// that leaves no more than a quarter of the cap unused. Then a take waits, or fails at once if it is a
    /// `try_` one.
    pub fn max_bytes(mut self, bytes: u64) -> Self {
        self.max_bytes = bytes;
        self
    }

    /// What segments are made of. Default [`Backing::Memfd`].
    pub fn backing(mut self, backing: Backing) -> Self {
        self.backing = backing;
        self
    }

    /// Whether memory is allocated and mapped when a segment is made. Default `true`.
    ///
    /// Off, the first touch of each page allocates it, and a machine (or a control group) out of memory answers that touch with SIGBUS
    /// or its OOM killer instead of an error here. What is never touched takes no memory, neither here nor at a subscriber, so that a
    /// loan may be far longer than what is sent of it. A subscriber makes one system call for each message in such a segment of more
    /// than 1 MiB that reaches beyond what it has read before, to be sure that the message can be read.
    pub fn populate(mut self, populate: bool) -> Self {
        self.populate = populate;
        self
    }

    /// Whether segments are locked into memory (`mlock`). Default `false`.
    ///
    /// The usual limit is 8 MiB a process; a segment beyond it is an error that names the limit.
    pub fn lock_memory(mut self, lock: bool) -> Self {
        self.lock_memory = lock;
        self
    }

    /// Advises the kernel to back segments with huge pages. Default `false`. Where it cannot, nothing changes.
    pub fn huge_pages(mut self, advise: bool) -> Self {
        self.huge_pages = advise;
        self
    }

    /// Whether segments are used again. Default `true`; `false` makes and frees one each time, for comparison.
    pub fn pooling(mut self, pooling: bool) -> Self {
        self.pooling = pooling;
        self
    }

    pub(crate) fn create_options(&self) -> CreateOptions {
        CreateOptions {
            backing: self.backing,
            populate: self.populate,
            lock: self.lock_memory,
            huge_pages: self.huge_pages,
        }
    }
}

impl Default for ShmPoolConfig {
    fn default() -> Self {
        Self::new()
    }
}
