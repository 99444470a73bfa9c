//! Idle slots of a small class in order of their segments, while a large size is waited for.
//!
//! Small slots share segments, and only a segment that is wholly idle is of use to another size. Taken in any order, the few that are in
//! use lie in all segments, and each moves on to another slot before its segment is whole. From here the slots of the first segment are
//! taken first, so that those that come back to later segments stay until these are whole.
//!
//! It decides neither when slots come here nor when they go back to where they are taken without a lock.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::core::Slot;
use crate::sync::Mutex;
use crate::sync::atomic::{AtomicUsize, Ordering};

/// Idle slots by how many slots their segment has, the smallest first, which leaves most to others; then by its age.
type Segments = BTreeMap<(usize, u64), Vec<Arc<Slot>>>;

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Packed {
    segments: Mutex<Segments>,
    /// How many slots there are, written under the lock: for statistics, and to pass by without the lock.
    len: AtomicUsize,
}

impl Packed {
    pub(super) fn len(&self) -> usize {
        self.len.load(Ordering::Relaxed)
    }

    /// Adds `slots`, and returns those of segments that are wholly idle with them.
    pub(super) fn put(&self, slots: Vec<Arc<Slot>>) -> Vec<Arc<Slot>> {
        let mut whole = Vec::new();
        let mut segments = self.segments.lock();
        self.len.fetch_add(slots.len(), Ordering::Relaxed);
        for slot in slots {
            let key = (slot.segment().slots(), slot.segment().id());
            let idle = segments.entry(key).or_default();
            idle.push(slot);
            if idle.len() == key.0 {
                whole.extend(segments.remove(&key).into_iter().flatten());
            }
        }
        self.len.fetch_sub(whole.len(), Ordering::Relaxed);
        whole
    }

    /// One of the first segment that has any.
    pub(super) fn take(&self) -> Option<Arc<Slot>> {
        if self.len() == 0 {
            return None;
        }
        let mut segments = self.segments.lock();
        let mut first = segments.first_entry()?;
        let slot = first.get_mut().pop();
        if first.get().is_empty() {
            first.remove();
        }
        self.len.fetch_sub(1, Ordering::Relaxed);
        slot
    }

    pub(super) fn take_all(&self) -> Vec<Arc<Slot>> {
        let mut segments = self.segments.lock();
        self.len.store(0, Ordering::Relaxed);
        let all = std::mem::take(&mut *segments);
        drop(segments);
        all.into_values().flatten().collect()
    }
}
