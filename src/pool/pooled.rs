//! [`PooledSegment`]: exclusive use of a piece of shared memory, given back on drop.
#![allow(unsafe_code)]

use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::Arc;

use super::core::{PoolCore, Slot};

/// A writable piece of shared memory from a [`ShmSegmentPool`](crate::ShmSegmentPool); dropping it gives it back.
///
/// Derefs to the bytes asked for; [`capacity`](Self::capacity) tells how many there are. The content is unspecified
/// at first: what the last user left, or zeros.
#[derive(Debug)]
#[must_use = "a segment that is not used goes back to the pool at once"]
pub struct PooledSegment {
    /// `None` only after `into_slot` has taken it.
    slot: Option<Arc<Slot>>,
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: `start` points into the mapping that `slot` keeps alive, memory that any thread may use; who may read or
// write it is decided by `&self` and `&mut self`, as for a `Vec<u8>`.
unsafe impl Send for PooledSegment {}
// SAFETY: as above; a shared reference only reads.
unsafe impl Sync for PooledSegment {}

impl PooledSegment {
    /// The first `len` bytes of `slot`, of which the caller holds the only `Arc`.
    #[inline]
    pub(crate) fn new(slot: Arc<Slot>, len: usize) -> Self {
        debug_assert!(len <= slot.capacity());
        let mapping = slot.segment().mapping();
        debug_assert!(slot.offset() + slot.capacity() <= mapping.len());
        // SAFETY: the pool cut the mapping into `slots` pieces of `capacity` bytes and `offset` is where one of them
        // begins, so the result stays inside the mapping.
        let start = unsafe { mapping.as_ptr().add(slot.offset()) };
        Self { slot: Some(slot), start, len }
    }

    /// How many bytes there are, of which the first `len()` are in use.
    pub fn capacity(&self) -> usize {
        self.slot().capacity()
    }

    /// Uses `len` bytes from now on; they keep their content.
    ///
    /// # Panics
    ///
    /// If `len` is more than [`capacity`](Self::capacity).
    pub fn set_len(&mut self, len: usize) {
        assert!(len <= self.capacity(), "{len} bytes do not fit into a segment of {}", self.capacity());
        self.len = len;
    }

    #[inline]
    pub(crate) fn is_of(&self, pool: &Arc<PoolCore>) -> bool {
        Arc::ptr_eq(self.slot().pool(), pool)
    }

    #[inline]
    pub(crate) fn into_slot(mut self) -> Arc<Slot> {
        self.slot.take().expect("taken only here, and self is gone afterwards")
    }

    #[inline]
    pub(super) fn slot(&self) -> &Arc<Slot> {
        self.slot.as_ref().expect("taken only by into_slot, which consumes self")
    }
}

impl Deref for PooledSegment {
    type Target = [u8];

    #[inline]
    fn deref(&self) -> &[u8] {
        // SAFETY: `start..start + len` lies in the slot (`new`, `set_len`), in a mapping that `slot` keeps alive and
        // whose bytes are always initialised. No other process can write it: a memfd is sealed, and the publisher's
        // documentation says what POSIX backing trusts. No other holder in this process exists: the pool hands out
        // only slots whose `Arc` is unique.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl DerefMut for PooledSegment {
    #[inline]
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`; `&mut self` makes this the only reference. Remote processes read a slot only after
        // it has been sent, which consumes this value, and not any more once they have released it.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

impl AsRef<[u8]> for PooledSegment {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl Drop for PooledSegment {
    #[inline]
    fn drop(&mut self) {
        if let Some(slot) = self.slot.take() {
            slot.give_back();
        }
    }
}
