//! [`ShmLoan`]: a message that is still being written.

use std::ops::{Deref, DerefMut};

use crate::pool::PooledSegment;

/// An exclusive, writable message in shared memory, from [`ShmPublisher::loan`](crate::ShmPublisher::loan).
///
/// Sending it copies nothing. Its first byte is aligned to [`ALIGN`](crate::ALIGN). Dropping it unsent gives the memory back. Its content is unspecified at first: bytes of
/// earlier messages of this publisher's pool, or zeros. All of it becomes readable by subscribers, the rest of the
/// slot beyond `len()` included; overwrite what they must not see.
///
/// # Panics
///
/// In a child made by `fork`, reading or writing a loan of its parent's.
#[derive(Debug)]
#[must_use = "a loan that is not sent goes back to the pool"]
pub struct ShmLoan {
    segment: PooledSegment,
}

impl ShmLoan {
    #[inline]
    pub(crate) fn new(segment: PooledSegment) -> Self {
        kill_point!("loan: taken");
        Self { segment }
    }

    #[inline]
    pub(crate) fn segment(&self) -> &PooledSegment {
        &self.segment
    }

    #[inline]
    pub(crate) fn into_segment(self) -> PooledSegment {
        self.segment
    }

    /// How long the message may become by [`set_len`](Self::set_len), in bytes.
    pub fn capacity(&self) -> usize {
        self.segment.capacity()
    }

    /// Makes the message `len` bytes long; bytes that come in keep their unspecified content.
    ///
    /// # Panics
    ///
    /// If `len` is more than [`capacity`](Self::capacity).
    pub fn set_len(&mut self, len: usize) {
        self.segment.set_len(len);
    }
}

impl From<PooledSegment> for ShmLoan {
    /// What was taken from a pool, to be sent as a message. A publisher of the same pool sends it without a copy; any other copies it, as
    /// [`Payload`](crate::Payload) says.
    #[inline]
    fn from(segment: PooledSegment) -> Self {
        Self { segment }
    }
}

impl Deref for ShmLoan {
    type Target = [u8];

    #[inline]
    fn deref(&self) -> &[u8] {
        &self.segment
    }
}

impl DerefMut for ShmLoan {
    #[inline]
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.segment
    }
}

impl AsRef<[u8]> for ShmLoan {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl AsMut<[u8]> for ShmLoan {
    fn as_mut(&mut self) -> &mut [u8] {
        self
    }
}
