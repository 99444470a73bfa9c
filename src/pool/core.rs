//! The pool's mechanism: idle slots by class, making segments, giving up idle ones.
//!
//! It never waits and runs on the caller's thread; who waits and how is [`ShmSegmentPool`](super::ShmSegmentPool)'s.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, Weak};

use parking_lot::Mutex;

use super::{PoolStats, ShmPoolConfig, SizeStats, TakeError};
use crate::budget::{Budget, Reservation};
use crate::idle::Idle;
use crate::proto::class::{self, ClassIndex};
use crate::segment::Segment;

/// Idle slots of a small class that can be popped without a lock.
const SMALL_QUEUE: usize = 4_096;

/// One piece of a segment. Whoever holds the only `Arc` of it may write it.
#[derive(Debug)]
pub(crate) struct Slot {
    segment: Arc<Segment>,
    index: usize,
    class: ClassIndex,
}

impl Slot {
    #[inline]
    pub(crate) fn segment(&self) -> &Arc<Segment> {
        &self.segment
    }

    #[inline]
    pub(crate) fn capacity(&self) -> usize {
        class::size_of(self.class)
    }

    /// Where the slot begins in its segment, in bytes; a multiple of 64.
    #[inline]
    pub(crate) fn offset(&self) -> usize {
        self.index * self.capacity()
    }
}

/// Somebody who can get slots back from where the pool cannot see them: a publisher, from its links.
pub(crate) trait Collect: Send + Sync {
    /// Returns to the pool what subscribers have released, and while the pool has waiters sees to it that further
    /// releases are noticed.
    fn collect(&self);
}

/// What one look for a slot came to.
pub(crate) enum Found {
    Slot(Arc<Slot>),
    /// There is room: [`PoolCore::create`] makes the slot.
    Room(Reservation),
    /// The cap is reached and nothing is idle.
    Nothing,
}

#[derive(Debug)]
struct Class {
    idle: Idle<Arc<Slot>>,
    misses: AtomicU64,
    past_takes: Arc<AtomicU64>,
    /// For the statistics, and to know how many slots exist.
    segments: Mutex<Vec<Weak<Segment>>>,
}

pub(crate) struct PoolCore {
    pub(crate) config: ShmPoolConfig,
    pub(crate) budget: Arc<Budget>,
    /// Made when first used; there are over a hundred sizes and few are ever seen.
    classes: Box<[OnceLock<Class>]>,
    /// Held while idle slots are sorted into those to free and those to keep, and during the last look of `find`: under
    /// it none is in somebody's hands. So nobody has to be woken when the kept ones are put back. Nobody must be: the
    /// waiter that looks would wake all others and itself, and they would keep each other looking for ever.
    sweep: Mutex<()>,
    collectors: Mutex<Vec<Weak<dyn Collect>>>,
}

impl PoolCore {
    pub(crate) fn new(config: ShmPoolConfig) -> Self {
        Self {
            budget: Arc::new(Budget::new(config.max_bytes)),
            classes: (0..class::COUNT).map(|_| OnceLock::new()).collect(),
            sweep: Mutex::new(()),
            collectors: Mutex::new(Vec::new()),
            config,
        }
    }

    pub(crate) fn add_collector(&self, collector: Weak<dyn Collect>) {
        let mut collectors = self.collectors.lock();
        collectors.retain(|known| known.strong_count() > 0);
        collectors.push(collector);
    }

    /// The class for `len` bytes, if the pool could ever hold one.
    pub(crate) fn class_for(&self, len: usize) -> Result<ClassIndex, TakeError> {
        class::class_of(len)
            .filter(|&class| self.segment_len(class) <= self.config.max_bytes)
            .ok_or(TakeError::TooLarge { len, max_bytes: self.config.max_bytes })
    }

    /// An idle slot for `len` bytes. Whether the pool could ever hold one need not be asked first: where it could not,
    /// none is idle.
    #[inline]
    pub(crate) fn take_idle_for(&self, len: usize) -> Option<Arc<Slot>> {
        self.take_idle(class::class_of(len)?)
    }

    /// An idle slot, by one pop: no lock, no look at anything shared with other sizes.
    #[inline]
    pub(crate) fn take_idle(&self, class: ClassIndex) -> Option<Arc<Slot>> {
        let state = self.classes[class.index()].get()?;
        loop {
            let slot = state.idle.take()?;
            if !slot.segment.is_abandoned() {
                slot.segment.count_take(slot.index);
                return Some(slot);
            }
        }
    }

    /// Whether a slot for `len` bytes is idle just now.
    #[cfg(feature = "zenoh")]
    pub(crate) fn has_idle_for(&self, len: usize) -> bool {
        class::class_of(len)
            .and_then(|class| self.classes[class.index()].get())
            .is_some_and(|state| state.idle.len() > 0)
    }

    /// Looks everywhere for a slot: idle, released by subscribers, below the cap, or in the place of idle ones of
    /// other sizes.
    pub(crate) fn find(&self, class: ClassIndex) -> Found {
        if let Some(slot) = self.take_idle(class) {
            return Found::Slot(slot);
        }
        self.collect();
        if let Some(slot) = self.take_idle(class) {
            return Found::Slot(slot);
        }
        let len = self.segment_len(class);
        if let Some(reservation) = Budget::reserve(&self.budget, len) {
            return Found::Room(reservation);
        }
        let _sweeping = self.sweep.lock();
        for other in ClassIndex::all().rev().filter(|&other| other != class) {
            self.give_up_idle(other);
            if let Some(reservation) = Budget::reserve(&self.budget, len) {
                return Found::Room(reservation);
            }
        }
        // Somebody may have put one back while we looked at the other sizes, or had it in hand for a sweep.
        self.take_idle(class).map_or(Found::Nothing, Found::Slot)
    }

    /// Makes a segment in reserved room; its first slot is the caller's, the others become idle.
    ///
    /// Where the system refuses what the cap allows, idle segments are given up for it.
    pub(crate) fn create(&self, class: ClassIndex, room: Reservation) -> Result<Arc<Slot>, TakeError> {
        let len = room.len();
        let refused = match self.try_create(class, room) {
            Ok(slot) => return Ok(slot),
            Err(refused) => refused,
        };
        let before = self.budget.used();
        self.trim();
        if self.budget.used() < before
            && let Some(room) = Budget::reserve(&self.budget, len)
        {
            return self.try_create(class, room);
        }
        Err(refused)
    }

    fn try_create(&self, class: ClassIndex, room: Reservation) -> Result<Arc<Slot>, TakeError> {
        let state = self.class(class);
        let slots = self.slots_per_segment(class);
        let segment =
            Segment::create(room, slots, &self.config.create_options(), Arc::clone(&state.past_takes))?;
        let segment = Arc::new(segment);
        kill_point!("segment: made");
        state.misses.fetch_add(1, Ordering::Relaxed);
        {
            let mut segments = state.segments.lock();
            segments.retain(|known| known.strong_count() > 0);
            segments.push(Arc::downgrade(&segment));
            if slots > 1 {
                state.idle.expect_at_most(segments.len() * slots);
            }
        }
        for index in 1..slots {
            self.give_back(Arc::new(Slot { segment: Arc::clone(&segment), index, class }));
        }
        segment.count_take(0);
        Ok(Arc::new(Slot { segment, index: 0, class }))
    }

    /// Takes back a slot that nobody else holds.
    #[inline]
    pub(crate) fn give_back(&self, slot: Arc<Slot>) {
        debug_assert_eq!(Arc::strong_count(&slot), 1, "a slot came back while somebody still held it");
        self.keep(slot);
        // Where the slot was not kept, its segment's reservation has woken the waiters already.
        self.budget.gate.wake_all();
    }

    /// Gives up a share of a slot that somebody out of reach may go on reading: it is never written again. What its
    /// segment takes is free for others once the other slots of it are back; the reader keeps his own mapping.
    pub(crate) fn abandon(&self, slot: Arc<Slot>) {
        slot.segment.abandon();
        let class = slot.class;
        drop(slot);
        let _sweeping = self.sweep.lock();
        if let Some(state) = self.classes[class.index()].get() {
            state.idle.take_all().into_iter().for_each(|idle| self.keep(idle));
        }
    }

    /// Makes a slot idle, or frees it beyond `max_idle_per_size`.
    #[inline]
    fn keep(&self, slot: Arc<Slot>) {
        if self.config.pooling
            && !slot.segment.is_abandoned()
            && let Some(state) = self.classes[slot.class.index()].get()
        {
            if slot.segment.slots() > 1 {
                state.idle.put(slot);
            } else {
                drop(state.idle.try_put(slot));
            }
        }
    }

    /// Frees every segment that is wholly idle.
    pub(crate) fn trim(&self) {
        let _sweeping = self.sweep.lock();
        for class in ClassIndex::all() {
            self.give_up_idle(class);
        }
    }

    pub(crate) fn collect(&self) {
        // Upgraded first: a collector may itself come back to the pool.
        let collectors: Vec<_> = self.collectors.lock().iter().filter_map(Weak::upgrade).collect();
        for collector in collectors {
            collector.collect();
        }
    }

    pub(crate) fn stats(&self) -> PoolStats {
        let mut stats = PoolStats {
            bytes: self.budget.used(),
            max_bytes: self.config.max_bytes,
            waiters: self.budget.gate.waiters(),
            ..PoolStats::default()
        };
        for (class, state) in ClassIndex::all().zip(&self.classes) {
            let Some(state) = state.get() else { continue };
            let segments: Vec<_> = state.segments.lock().iter().filter_map(Weak::upgrade).collect();
            let takes = segments.iter().map(|segment| segment.takes()).sum::<u64>()
                + state.past_takes.load(Ordering::Relaxed);
            let misses = state.misses.load(Ordering::Relaxed);
            stats.misses += misses;
            stats.hits += takes.saturating_sub(misses);
            stats.segments += segments.len();
            stats.sizes.push(SizeStats {
                size: class::size_of(class),
                slots: segments.iter().map(|segment| segment.slots()).sum(),
                idle: state.idle.len(),
            });
        }
        stats
    }

    /// Frees the wholly idle segments of one class. The caller holds `sweep`.
    fn give_up_idle(&self, class: ClassIndex) {
        let Some(state) = self.classes[class.index()].get() else { return };
        let idle = state.idle.take_all();
        let mut found: HashMap<u64, usize> = HashMap::new();
        for slot in &idle {
            *found.entry(slot.segment.id()).or_default() += 1;
        }
        let (free, kept): (Vec<_>, Vec<_>) =
            idle.into_iter().partition(|slot| found[&slot.segment.id()] == slot.segment.slots());
        drop(free);
        for slot in kept {
            self.keep(slot);
        }
    }

    fn class(&self, class: ClassIndex) -> &Class {
        self.classes[class.index()].get_or_init(|| {
            let small = self.slots_per_segment(class) > 1;
            Class {
                idle: Idle::new(if small { SMALL_QUEUE } else { self.config.max_idle_per_size }),
                misses: AtomicU64::new(0),
                past_takes: Arc::new(AtomicU64::new(0)),
                segments: Mutex::new(Vec::new()),
            }
        })
    }

    /// The length of this class's segments: a page or more, and no more than an eighth of the cap for those that
    /// many small slots share.
    fn segment_len(&self, class: ClassIndex) -> u64 {
        class::segment_len(class, self.shared_segment_len()) as u64
    }

    fn slots_per_segment(&self, class: ClassIndex) -> usize {
        class::slots_per_segment(class, self.shared_segment_len())
    }

    fn shared_segment_len(&self) -> usize {
        usize::try_from(self.config.max_bytes / 8).unwrap_or(usize::MAX)
    }
}

impl std::fmt::Debug for PoolCore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PoolCore")
            .field("config", &self.config)
            .field("budget", &self.budget)
            .finish_non_exhaustive()
    }
}
