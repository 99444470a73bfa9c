//! [`ShmSample`]: a received message, read where the publisher wrote it.
#![allow(unsafe_code)]

use std::fmt;
use std::ops::{Deref, Range};
use std::sync::Arc;

use bytes::Bytes;

use crate::link::LinkShared;
use crate::sys::fork::Origin;
use crate::sys::memory::Mapping;

/// A publisher's segment as a subscriber sees it: read-only, and with it the link that its tickets go back on.
#[derive(Debug)]
pub(crate) struct RemoteSegment {
    pub(crate) mapping: Mapping,
    pub(crate) link: Arc<LinkShared>,
}

/// A received message: read-only bytes in the publisher's shared memory.
///
/// It stays unchanged and readable for as long as it or a clone is held, whatever happens to the publisher, and it
/// counts against the subscriber's `depth` for that long. Its first byte is aligned to [`ALIGN`](crate::ALIGN). It may be dropped on any thread. (One trust remains: a
/// publisher that breaks its own rules can change the bytes while they are read.)
///
/// # Panics
///
/// In a child made by `fork`, reading a sample that its parent received: only the parent holds it.
///
/// # Examples
///
/// ```
/// # fn look_at(sample: tokio_shm::ShmSample) {
/// println!("message {}: {} bytes", sample.seq(), sample.len());
/// let bytes: bytes::Bytes = sample.into(); // no copy
/// # }
/// ```
#[must_use = "dropping a sample gives its memory back to the publisher"]
pub struct ShmSample {
    segment: Arc<RemoteSegment>,
    offset: usize,
    len: usize,
    ticket: u32,
    /// Who holds it: a child's copy is not known to the publisher.
    origin: Origin,
    seq: u64,
}

impl ShmSample {
    /// The bytes at `range` of `segment`, held by `ticket`, whose hold the caller has begun.
    ///
    /// `range` must lie inside the mapping: a wrong one is refused.
    #[inline]
    pub(crate) fn new(
        segment: Arc<RemoteSegment>,
        range: Range<usize>,
        ticket: u32,
        seq: u64,
    ) -> Option<Self> {
        if range.start > range.end || range.end > segment.mapping.len() {
            return None;
        }
        Some(Self {
            offset: range.start,
            len: range.end - range.start,
            segment,
            ticket,
            origin: Origin::now(),
            seq,
        })
    }

    /// The message's number at its publisher: 0 for the first, one more for each that it accepted.
    pub fn seq(&self) -> u64 {
        self.seq
    }

    /// The publisher's id, random and new for each `bind`.
    pub fn publisher(&self) -> u128 {
        self.segment.link.publisher()
    }
}

impl Deref for ShmSample {
    type Target = [u8];

    #[inline]
    fn deref(&self) -> &[u8] {
        if !self.origin.is_here() {
            inherited();
        }
        // SAFETY: `new` checked that the range lies in the mapping.
        let start = unsafe { self.segment.mapping.as_ptr().add(self.offset) };
        // SAFETY: the range is mapped and initialised for as long as `segment` lives, which this sample keeps, and
        // can neither shrink nor lose its pages: `map_read_only` checked the seals. Nobody changes the bytes while a
        // ticket is out on them, by the publisher's word (documented trust; see DESIGN.md).
        unsafe { std::slice::from_raw_parts(start.as_ptr(), self.len) }
    }
}

#[cold]
#[inline(never)]
fn inherited() -> ! {
    panic!(
        "this sample was received before this process was forked and is held by the parent alone: copy its bytes before the fork, \
         or receive in the child"
    );
}

impl AsRef<[u8]> for ShmSample {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl Clone for ShmSample {
    fn clone(&self) -> Self {
        self.segment.link.hold(self.ticket).share();
        Self { segment: Arc::clone(&self.segment), ..*self }
    }
}

impl Drop for ShmSample {
    #[inline]
    fn drop(&mut self) {
        let link = &self.segment.link;
        if link.hold(self.ticket).end() {
            kill_point!("release: hold ended");
            link.release(self.ticket);
        }
    }
}

impl fmt::Debug for ShmSample {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ShmSample").field("seq", &self.seq).field("len", &self.len).finish_non_exhaustive()
    }
}

impl From<ShmSample> for Bytes {
    /// Shares the memory; the sample is released when the last clone or slice of the `Bytes` is dropped.
    ///
    /// In a child made by `fork` that is the parent's last: copy what is to outlive it there.
    fn from(sample: ShmSample) -> Self {
        Bytes::from_owner(sample)
    }
}
