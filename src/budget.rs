//! The cap of a pool in bytes, and who waits for some of them.
//!
//! It counts; it neither makes nor frees memory.

#[cfg(not(tokio_shm_loom))]
mod abandoned;
#[cfg(all(test, tokio_shm_loom))]
mod loom_tests;

#[cfg(not(tokio_shm_loom))]
pub(crate) use self::abandoned::{Abandoned, Holder};

use crate::gate::FairGate;
use crate::sync::Arc;
use crate::sync::atomic::{AtomicU64, Ordering};

/// What all segments of one pool may take together, and who waits for some of it.
#[derive(Debug)]
pub(crate) struct Budget {
    max: u64,
    /// Bytes of all segments that exist or are being made. Changed by read-modify-write only; never above `max`.
    used: AtomicU64,
    /// Segments dropped so far, and publishers that came or went: tells publishers that there is something to retire, or another part
    /// of the cap for them.
    retired: AtomicU64,
    /// Waiters for a slot or for bytes, in the order in which they came.
    pub(crate) gate: FairGate,
    /// What others still have of it that the pool has given up.
    #[cfg(not(tokio_shm_loom))]
    pub(crate) abandoned: Abandoned,
}

impl Budget {
    pub(crate) fn new(max: u64) -> Self {
        Self {
            max,
            used: AtomicU64::new(0),
            retired: AtomicU64::new(0),
            gate: FairGate::new(),
            #[cfg(not(tokio_shm_loom))]
            abandoned: Abandoned::default(),
        }
    }

    /// Looks who has let go of what was given up.
    #[cfg(not(tokio_shm_loom))]
    pub(crate) fn sweep_abandoned(&self) {
        self.abandoned.sweep(self.max);
    }

    /// Whether subscriber `id` is to drop what it keeps of what was given up before it has more.
    #[cfg(not(tokio_shm_loom))]
    pub(crate) fn is_kept_by(&self, id: u128) -> bool {
        self.abandoned.is_kept_by(id, self.max)
    }

    pub(crate) fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    #[inline]
    pub(crate) fn retired(&self) -> u64 {
        self.retired.load(Ordering::Relaxed)
    }

    /// Notes that a segment is gone, or that the cap is divided anew.
    pub(crate) fn count_retired(&self) {
        self.retired.fetch_add(1, Ordering::Release);
    }

    /// Sets `len` bytes aside, or `None` where that would exceed the cap.
    // Not a method: loom's `Arc` cannot be a `self`.
    pub(crate) fn reserve(this: &Arc<Self>, len: u64) -> Option<Reservation> {
        let fits = |used: u64| used.checked_add(len).filter(|sum| *sum <= this.max);
        this.used.fetch_update(Ordering::AcqRel, Ordering::Relaxed, fits).ok()?;
        Some(Reservation { budget: Arc::clone(this), len })
    }
}

/// Bytes set aside; given back on drop, which lets the first waiter try again.
#[derive(Debug)]
pub(crate) struct Reservation {
    budget: Arc<Budget>,
    len: u64,
}

impl Reservation {
    #[cfg(not(tokio_shm_loom))]
    pub(crate) fn budget(&self) -> &Budget {
        &self.budget
    }

    #[cfg(not(tokio_shm_loom))]
    pub(crate) fn shared_budget(&self) -> &Arc<Budget> {
        &self.budget
    }

    pub(crate) fn len(&self) -> u64 {
        self.len
    }

    /// All of it, so that nothing is left here.
    #[cfg(not(tokio_shm_loom))]
    fn take(&mut self) -> Self {
        Self { budget: Arc::clone(&self.budget), len: std::mem::take(&mut self.len) }
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.budget.used.fetch_sub(self.len, Ordering::AcqRel);
        self.budget.gate.wake();
    }
}
