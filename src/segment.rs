//! One shared-memory object of the pool: its mapping, its descriptor, its number, and the bytes it is charged with.
//!
//! It does not know who uses its slots; the pool hands those out, and the last one to go frees the object.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
#[cfg(feature = "zenoh")]
use std::sync::OnceLock;

use crate::budget::{Holder, Reservation};
use crate::sync::Mutex;
use crate::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use crate::sys::memory::{self, Backing, CreateOptions, Mapping, MemoryError};
#[cfg(feature = "zenoh")]
use crate::sys::named::{Given, Name, Scheme};

/// Ids are never used twice in a process, so that a receiver can never mistake a new segment for an old one.
static NEXT_ID: AtomicU64 = AtomicU64::new(1);

/// A mapped shared-memory object that the pool cuts into slots.
#[derive(Debug)]
pub(crate) struct Segment {
    id: u64,
    /// Given where receivers can find it in no other way. Before `fd`, whose lock says that the name is in use.
    #[cfg(feature = "zenoh")]
    name: OnceLock<Name>,
    mapping: Mapping,
    fd: OwnedFd,
    backing: Backing,
    slots: usize,
    /// Somebody may read one of the slots for ever: none is used again, so that the object can go when the others are back.
    abandoned: AtomicBool,
    /// By whom.
    holders: Mutex<Vec<Arc<dyn Holder>>>,
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
            #[cfg(feature = "zenoh")]
            name: OnceLock::new(),
            mapping,
            fd,
            backing: options.backing,
            slots,
            abandoned: AtomicBool::new(false),
            holders: Mutex::default(),
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

    /// The object's name in `/dev/shm`, given at the first call and taken away with the object.
    ///
    /// # Errors
    /// If it cannot have one: see [`Name::give`].
    #[cfg(feature = "zenoh")]
    pub(crate) fn name(&self, scheme: Scheme, given: &Arc<Given>) -> std::io::Result<&Name> {
        if let Some(name) = self.name.get() {
            return Ok(name);
        }
        // Two at once give two; the second goes again before anybody could have heard of it.
        let name = Name::give(self.fd.as_fd(), scheme, given)?;
        Ok(self.name.get_or_init(|| name))
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

    /// Has every slot dropped instead of used again, from the next time that it comes back. (Of a pool that keeps none, from the first.)
    pub(crate) fn abandon(&self) {
        // Relaxed, as its look: the slot that it is about never comes back, the others may as well be used once more.
        self.abandoned.store(true, Ordering::Relaxed);
    }

    /// The same for `holder`, which is known to go on reading until it says otherwise.
    pub(crate) fn abandon_to(&self, holder: &Arc<dyn Holder>) {
        let mut holders = self.holders.lock();
        // Those of one link come one after the other.
        if !holders.last().is_some_and(|last| Arc::ptr_eq(last, holder)) {
            holders.push(Arc::clone(holder));
        }
        drop(holders);
        self.abandon();
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
        let holders = std::mem::take(self.holders.get_mut());
        if !holders.is_empty() {
            let budget = Arc::clone(self.reservation.shared_budget());
            budget.abandoned.add(holders, &mut self.reservation);
        }
        self.reservation.budget().count_retired();
    }
}
