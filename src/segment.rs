//! One shared-memory object of the pool: its mapping, its descriptor, its number, and the bytes it is charged with.
//!
//! It does not know who uses its slots; the pool hands those out, and the last one to go frees the object.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::budget::Reservation;
use crate::sys::memory::{self, Backing, CreateOptions, Mapping, MemoryError};

/// Ids are never used twice in a process, so that a receiver can never mistake a new segment for an old one.
static NEXT_ID: AtomicU64 = AtomicU64::new(1);

/// A mapped shared-memory object that the pool cuts into slots.
#[derive(Debug)]
pub(crate) struct Segment {
    id: u64,
    mapping: Mapping,
    fd: OwnedFd,
    backing: Backing,
    slots: usize,
    /// Somebody may read one of the slots for ever: none is used again, so that the object can go when the others are back.
    abandoned: AtomicBool,
    // Last, so that the bytes are free again only after the mapping is gone.
    reservation: Reservation,
}

impl Segment {
    /// Makes an object of the reservation's length, mapped for writing.
    pub(crate) fn create(
        reservation: Reservation,
        slots: usize,
        options: &CreateOptions,
    ) -> Result<Self, MemoryError> {
        let len = usize::try_from(reservation.len()).unwrap_or(usize::MAX);
        let (fd, mapping) = memory::create(len, options)?;
        let id = NEXT_ID.fetch_add(1, Ordering::Relaxed);
        Ok(Self {
            id,
            mapping,
            fd,
            backing: options.backing,
            slots,
            abandoned: AtomicBool::new(false),
            reservation,
        })
    }

    #[inline]
    pub(crate) fn id(&self) -> u64 {
        self.id
    }

    pub(crate) fn len(&self) -> u64 {
        self.reservation.len()
    }

    pub(crate) fn backing(&self) -> Backing {
        self.backing
    }

    #[inline]
    pub(crate) fn slots(&self) -> usize {
        self.slots
    }

    #[inline]
    pub(crate) fn mapping(&self) -> &Mapping {
        &self.mapping
    }

    /// Has every slot dropped instead of used again, from the next time that it comes back.
    pub(crate) fn abandon(&self) {
        // Relaxed, as its look: the slot that it is about never comes back, the others may as well be used once more.
        self.abandoned.store(true, Ordering::Relaxed);
    }

    #[inline]
    pub(crate) fn is_abandoned(&self) -> bool {
        self.abandoned.load(Ordering::Relaxed)
    }
}

impl AsFd for Segment {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Drop for Segment {
    fn drop(&mut self) {
        self.reservation.budget().count_retired();
    }
}
