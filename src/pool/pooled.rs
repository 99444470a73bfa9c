//! [`PooledSegment`]: exclusive use of a piece of shared memory, given back on drop.
#![allow(unsafe_code)]

use std::fmt;
use std::mem::ManuallyDrop;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::Arc;

use super::core::{PoolCore, Slot};

/// A writable piece of shared memory from a [`ShmSegmentPool`](crate::ShmSegmentPool); dropping it gives it back.
///
/// Derefs to the bytes asked for; [`capacity`](Self::capacity) tells how many there are. The content is unspecified
/// at first: what the last user left, or zeros. The first byte is aligned to [`ALIGN`](crate::ALIGN).
///
/// A publisher that shares the pool sends it without a copy as a loan: [`ShmLoan::from`](crate::ShmLoan#impl-From<PooledSegment>-for-ShmLoan).
///
/// # Panics
///
/// In a child made by `fork`, reading or writing a segment of its parent's.
// One pointer, all else is in the slot: it is moved several times on its way, which is by register then. (Two words stored one
// by one and loaded as one stall the processor each time: five times ten nanoseconds of a message's way.)
#[must_use = "a segment that is not used goes back to the pool at once"]
pub struct PooledSegment {
    /// Taken out once: by `into_slot`, or by the drop.
    slot: ManuallyDrop<Arc<Slot>>,
}

impl PooledSegment {
    /// The first `len` bytes of `slot`, of which the caller holds the only `Arc`.
    #[inline]
    pub(crate) fn new(slot: Arc<Slot>, len: usize) -> Self {
        slot.set_len(len);
        Self::from_slot(slot)
    }

    /// What of `slot` was last said to be in use; the caller holds the only `Arc`.
    #[inline]
    pub(crate) fn from_slot(slot: Arc<Slot>) -> Self {
        Self { slot: ManuallyDrop::new(slot) }
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
        self.slot().set_len(len);
    }

    #[inline]
    pub(crate) fn is_of(&self, pool: &Arc<PoolCore>) -> bool {
        Arc::ptr_eq(self.slot().pool(), pool)
    }

    /// Whether somebody may go on reading this segment: then it is not to be written.
    #[inline]
    pub(crate) fn is_abandoned(&self) -> bool {
        self.slot().segment().is_abandoned()
    }

    #[inline]
    pub(crate) fn into_slot(self) -> Arc<Slot> {
        let mut this = ManuallyDrop::new(self);
        // SAFETY: `this` is neither used nor dropped any more.
        unsafe { ManuallyDrop::take(&mut this.slot) }
    }

    #[inline]
    pub(super) fn slot(&self) -> &Arc<Slot> {
        &self.slot
    }

    /// Where the bytes are.
    #[inline]
    fn start(&self) -> NonNull<u8> {
        let slot = self.slot();
        if !slot.is_ours() {
            inherited();
        }
        // SAFETY: the pool cut the mapping into pieces of `capacity` bytes, and `offset` is where one of them begins
        // (`PoolCore::slot`), so the result stays inside the mapping.
        unsafe { slot.segment().mapping().as_ptr().add(slot.offset()) }
    }
}

#[cold]
#[inline(never)]
fn inherited() -> ! {
    panic!(
        "this memory was taken before this process was forked and belongs to the parent, which may send it at any time"
    );
}

impl Deref for PooledSegment {
    type Target = [u8];

    #[inline]
    fn deref(&self) -> &[u8] {
        // SAFETY: these bytes lie in the slot (`len` is at most `capacity`: `new`'s callers, `set_len`), in a mapping that
        // `slot` keeps alive and whose bytes are always initialised. No other process can write it: a memfd is sealed, and the
        // publisher's documentation says what POSIX backing trusts. No other holder in this process exists: the pool hands
        // out only slots whose `Arc` is unique.
        unsafe { std::slice::from_raw_parts(self.start().as_ptr(), self.slot().len()) }
    }
}

impl DerefMut for PooledSegment {
    #[inline]
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`; `&mut self` makes this the only reference. Remote processes read a slot only after
        // it has been sent, which consumes this value, and not any more once they have released it.
        unsafe { std::slice::from_raw_parts_mut(self.start().as_ptr(), self.slot().len()) }
    }
}

impl AsRef<[u8]> for PooledSegment {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl fmt::Debug for PooledSegment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PooledSegment").field("len", &self.len()).field("capacity", &self.capacity()).finish()
    }
}

impl Drop for PooledSegment {
    #[inline]
    fn drop(&mut self) {
        // SAFETY: `self` is not used any more: it is being dropped.
        let slot = unsafe { ManuallyDrop::take(&mut self.slot) };
        slot.give_back();
    }
}
