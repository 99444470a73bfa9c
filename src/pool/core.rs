//! The pool's mechanism: idle slots by class, making segments, giving up idle ones.
//!
//! It never waits and runs on the caller's thread; who waits and how is [`ShmSegmentPool`](super::ShmSegmentPool)'s.

use std::cell::RefCell;
use std::hash::{BuildHasher, BuildHasherDefault, DefaultHasher};
use std::ops::RangeInclusive;
use std::sync::{Arc, OnceLock, Weak};

use super::packed::Packed;
use super::{PoolStats, ShmPoolConfig, SizeStats, TakeError};
use crate::budget::{Budget, Holder, Reservation};
use crate::gate::{Lane, Turn};
use crate::hot::HotPlaces;
use crate::idle::Idle;
use crate::proto::class::{self, ClassIndex};
use crate::segment::Segment;
use crate::sync::Mutex;
use crate::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use crate::sync::fence_after_rmw;
use crate::sys::fork::Origin;

/// Idle slots of a small class that can be popped without a lock.
const SMALL_QUEUE: usize = 1_024;

/// Idle slots of a large class at most that can be popped without a lock; no more are kept.
const LARGE_QUEUE: usize = 1 << 16;

/// Messages so large that the caches of one core have no room for two of them, and for a good part of one.
const ALTERNATING: RangeInclusive<usize> = 512 << 10..=4 << 20;

/// Messages of this size may have larger slots where there is no room to make one.
const REUSED_MIN: usize = 512 << 10;

/// One piece of a segment. Whoever holds the only `Arc` of it may write it.
// Aligned, so that two threads with a slot each do not share a cache line (nor its neighbour, which processors fetch too).
#[derive(Debug)]
#[repr(align(128))]
pub(crate) struct Slot {
    segment: Arc<Segment>,
    /// Where it goes when it is idle.
    shelf: Arc<Class>,
    /// Where the slot begins in its segment, in bytes; a multiple of 64.
    offset: usize,
    /// What it takes of its segment, in units of [`class::GRAIN`].
    charge: u32,
    /// How many of its bytes are in use, by the word of whoever holds it.
    len: AtomicUsize,
    /// Whose memory it is: in a child it is another's.
    origin: Origin,
    /// How often it was taken: written by its only holder, so a plain load and store will do.
    takes: AtomicU64,
    /// Where it goes back to. A circle while the slot is idle; [`PoolCore::close`] breaks it.
    pool: Arc<PoolCore>,
}

thread_local! {
    /// The pool that this thread gave something back to last. It has to outlive the giving back, and the slot does not see to
    /// that: once it is idle another thread may take and free it, and with it the last reference to the pool. A reference
    /// taken and dropped each time would cost as much as the queue does.
    static LAST: RefCell<Option<Arc<PoolCore>>> = const { RefCell::new(None) };
}

/// The end of a schedule: the next one begins without the pool of this one.
#[cfg(tokio_shm_shuttle)]
pub(crate) fn forget_last() {
    drop(LAST.take());
}

impl Slot {
    /// Goes back to its pool.
    #[inline]
    pub(crate) fn give_back(self: Arc<Self>) {
        let mut this = Some(self);
        // Not to be had for a thread that ends, or is just about to keep another pool.
        let _ = LAST.try_with(|last| {
            if let Ok(last) = last.try_borrow()
                && let Some(pool) = &*last
                && let Some(slot) = this.take_if(|slot| Arc::ptr_eq(pool, &slot.pool))
            {
                pool.give_back(slot);
            }
        });
        if let Some(slot) = this {
            slot.give_back_to_another();
        }
    }

    /// Goes back to a pool that is not the one that this thread gave something back to last.
    #[cold]
    fn give_back_to_another(self: Arc<Self>) {
        let pool = Arc::clone(&self.pool);
        pool.give_back(self);
        let _ = LAST.try_with(|last| {
            // Borrowed where a waker gives something back as well. The old one is dropped when the new one is in its place.
            let old = last.try_borrow_mut().map(|mut last| last.replace(pool));
            drop(old);
        });
    }

    /// Counts one take, by the slot's only holder.
    #[inline]
    fn count_take(&self) {
        self.takes.store(self.takes.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
    }

    #[inline]
    pub(crate) fn pool(&self) -> &Arc<PoolCore> {
        &self.pool
    }

    #[inline]
    pub(crate) fn segment(&self) -> &Arc<Segment> {
        &self.segment
    }

    #[inline]
    pub(crate) fn capacity(&self) -> usize {
        class::size_of(self.shelf.class)
    }

    /// Where the slot begins in its segment, in bytes; a multiple of 64.
    #[inline]
    pub(crate) fn offset(&self) -> usize {
        self.offset
    }

    /// Whether it is this process's, and may be read and written.
    #[inline]
    pub(crate) fn is_ours(&self) -> bool {
        self.origin.is_here()
    }

    /// What it takes of its segment, in units of [`class::GRAIN`]; beyond 256 GiB it says 256 GiB.
    #[inline]
    pub(crate) fn charge(&self) -> u32 {
        self.charge
    }

    /// How many bytes are in use.
    #[inline]
    pub(crate) fn len(&self) -> usize {
        // Relaxed, as the store: the only holder's, who hands it on with the slot.
        self.len.load(Ordering::Relaxed)
    }

    /// Uses `len` bytes, of which the caller knows that they fit. Only for the slot's only holder.
    #[inline]
    pub(crate) fn set_len(&self, len: usize) {
        debug_assert!(len <= self.capacity());
        self.len.store(len, Ordering::Relaxed);
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.shelf.past_takes.fetch_add(*self.takes.get_mut(), Ordering::Relaxed);
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
    class: ClassIndex,
    /// The slots put back last, by thread.
    hot: HotPlaces<Slot>,
    /// All others. Of a large class both together have room for as many as are to be kept.
    idle: Option<Idle<Arc<Slot>>>,
    /// Those of a small class that were idle while a large size was waited for, out of the way of takers without a lock. Changed under
    /// [`PoolCore::sweep`], or else emptied.
    packed: Packed,
    misses: AtomicU64,
    /// Takes of slots that are gone.
    past_takes: AtomicU64,
    /// For the statistics, and to know how many slots exist.
    slots: Mutex<Vec<Weak<Slot>>>,
    /// How many of these there were when some were made or freed last.
    existing: AtomicUsize,
}

impl Class {
    fn new(class: ClassIndex, small: bool, max_idle: usize) -> Self {
        // Where few are kept most are to be where everybody looks first.
        let hot = HotPlaces::new(if small { usize::MAX } else { max_idle / 8 });
        // Of a small class all are kept, also where each has a segment of its own, because the cap is low.
        let queued = if small { SMALL_QUEUE } else { max_idle.min(LARGE_QUEUE) - hot.count() };
        Self {
            class,
            hot,
            idle: (queued > 0).then(|| Idle::new(queued)),
            packed: Packed::default(),
            misses: AtomicU64::new(0),
            past_takes: AtomicU64::new(0),
            slots: Mutex::new(Vec::new()),
            existing: AtomicUsize::new(0),
        }
    }

    #[inline]
    fn take(&self) -> Option<Arc<Slot>> {
        self.hot.take().or_else(|| self.take_elsewhere())
    }

    #[inline(never)]
    fn take_elsewhere(&self) -> Option<Arc<Slot>> {
        self.idle.as_ref().and_then(Idle::take).or_else(|| self.hot.take_any())
    }

    /// How many slots are idle.
    fn idle_len(&self) -> usize {
        self.idle.as_ref().map_or(0, Idle::len) + self.hot.len() + self.packed.len()
    }

    /// Knows of `made` from now on, and of those that are gone no more; how many slots there are then.
    fn know(&self, made: &[Arc<Slot>]) -> usize {
        let mut slots = self.slots.lock();
        slots.retain(|slot| slot.strong_count() > 0);
        slots.extend(made.iter().map(Arc::downgrade));
        self.existing.store(slots.len(), Ordering::Relaxed);
        slots.len()
    }

    /// Every idle slot.
    fn take_all(&self) -> Vec<Arc<Slot>> {
        let mut all = self.take_queued();
        all.extend(self.packed.take_all());
        all
    }

    /// Every idle slot that can be taken without a lock.
    fn take_queued(&self) -> Vec<Arc<Slot>> {
        let mut all = self.idle.as_ref().map_or_else(Vec::new, Idle::take_all);
        all.extend(std::iter::from_fn(|| self.hot.take_any()).take(self.hot.count()));
        all
    }
}

pub(crate) struct PoolCore {
    /// A child has a copy of the books, of memory that its parent goes on using.
    origin: Origin,
    pub(crate) config: ShmPoolConfig,
    pub(crate) budget: Arc<Budget>,
    /// Made when first used, and apart: there are over a hundred sizes and few are ever seen.
    classes: [OnceLock<Arc<Class>>; class::COUNT],
    /// Held while idle slots are sorted into those to free and those to keep, and during the last look of a taker that finds nothing
    /// else (`find`, `take_settled`): under it none is in another's hands. So no waiter need be woken when the kept ones are put back. None
    /// must be: the one that sweeps would keep itself looking for ever.
    sweep: Mutex<()>,
    collectors: Mutex<Vec<Weak<dyn Collect>>>,
    /// Publishers among which the cap is divided.
    publishers: AtomicUsize,
}

impl PoolCore {
    pub(crate) fn new(config: ShmPoolConfig) -> Self {
        Self {
            origin: Origin::here(),
            budget: Arc::new(Budget::new(config.max_bytes)),
            classes: [const { OnceLock::new() }; class::COUNT],
            sweep: Mutex::new(()),
            collectors: Mutex::new(Vec::new()),
            publishers: AtomicUsize::new(0),
            config,
        }
    }

    /// Each publisher's part of the cap, in units of [`class::GRAIN`].
    pub(crate) fn part(&self) -> u64 {
        // Relaxed, as the counts: publishers that share a pool are told to look again by `retired`.
        let publishers = self.publishers.load(Ordering::Relaxed).max(1);
        self.config.max_bytes / class::GRAIN as u64 / publishers as u64
    }

    /// One more publisher has a part of the cap.
    pub(crate) fn add_publisher(&self) {
        self.publishers.fetch_add(1, Ordering::Relaxed);
        self.budget.count_retired();
    }

    /// A publisher gives up its part.
    pub(crate) fn remove_publisher(&self) {
        self.publishers.fetch_sub(1, Ordering::Relaxed);
        self.budget.count_retired();
    }

    pub(crate) fn add_collector(&self, collector: Weak<dyn Collect>) {
        let mut collectors = self.collectors.lock();
        collectors.retain(|known| known.strong_count() > 0);
        collectors.push(collector);
    }

    /// Whether it is another process's, which this one was forked from.
    #[inline]
    pub(crate) fn is_inherited(&self) -> bool {
        !self.origin.is_here()
    }

    /// The class for `len` bytes, if the pool could ever hold one.
    pub(crate) fn class_for(&self, len: usize) -> Result<ClassIndex, TakeError> {
        if self.is_inherited() {
            return Err(TakeError::Forked);
        }
        class::class_of(len)
            .filter(|&class| self.segment_len(class, 0) <= self.config.max_bytes)
            .ok_or(TakeError::TooLarge { len, max_bytes: self.config.max_bytes })
    }

    /// An idle slot for `len` bytes, unless others wait for it. Whether the pool could ever hold one need not be asked first: where it
    /// could not, none is idle.
    #[inline]
    pub(crate) fn take_idle_for(&self, len: usize) -> Option<Arc<Slot>> {
        let class = class::class_of(len)?;
        if self.budget.gate.is_taken(lane(class)) { None } else { self.take_idle(class) }
    }

    /// An idle slot, by one pop: no lock, no look at anything shared with other sizes.
    #[inline]
    pub(crate) fn take_idle(&self, class: ClassIndex) -> Option<Arc<Slot>> {
        let state = self.classes[class.index()].get()?;
        let slot = state.take()?;
        slot.count_take();
        Some(slot)
    }

    /// Whether a slot for `len` bytes is idle just now.
    #[cfg(feature = "zenoh")]
    pub(crate) fn has_idle_for(&self, len: usize) -> bool {
        class::class_of(len)
            .and_then(|class| self.classes[class.index()].get())
            .is_some_and(|state| state.idle_len() > 0)
    }

    /// Looks for a slot on behalf of one who does not wait, or has not yet.
    pub(crate) fn find_now(&self, class: ClassIndex) -> Found {
        let turn = self.budget.gate.newcomers_turn(lane(class));
        turn.map_or(Found::Nothing, |turn| self.find(class, turn))
    }

    /// Looks for a slot that is idle, or for room below the cap, and nowhere else.
    pub(crate) fn find_new(&self, class: ClassIndex) -> Found {
        if self.budget.gate.is_taken(lane(class)) {
            return Found::Nothing;
        }
        let existing = self.class(class).existing.load(Ordering::Relaxed);
        if let Some(slot) = self.take_idle(class).or_else(|| self.take_settled(class, existing)) {
            return Found::Slot(slot);
        }
        Budget::reserve(&self.budget, self.segment_len(class, existing)).map_or(Found::Nothing, Found::Room)
    }

    /// Looks for a slot: idle, or released by subscribers; and in the first's turn everywhere else: below the cap, or in the place of
    /// idle ones of other sizes.
    ///
    /// Beside the first waiter small messages may have what is idle of their size. A segment that they share is seldom wholly idle, and so of
    /// no use to the first; and one who holds some small ones and needs another does not wait for the large one that waits for it.
    pub(crate) fn find(&self, class: ClassIndex, turn: Turn) -> Found {
        if let Some(slot) = self.take_idle(class) {
            return Found::Slot(slot);
        }
        self.collect();
        let existing = self.class(class).existing.load(Ordering::Relaxed);
        if let Some(slot) = self.take_settled(class, existing) {
            return Found::Slot(slot);
        }
        if turn == Turn::Beside {
            let _sweeping = self.sweep.lock();
            return self.take_larger_small(class).map_or(Found::Nothing, Found::Slot);
        }
        let alternate = existing == 1 && self.alternates(class);
        if !alternate && let Some(slot) = self.take_idle(class) {
            return Found::Slot(slot);
        }
        let len = self.segment_len(class, existing);
        if let Some(reservation) = Budget::reserve(&self.budget, len) {
            return Found::Room(reservation);
        }
        if alternate && let Some(slot) = self.take_idle(class) {
            return Found::Slot(slot);
        }
        self.budget.sweep_abandoned();
        let _sweeping = self.sweep.lock();
        if let Some(slot) = self.take_larger(class) {
            return Found::Slot(slot);
        }
        if let Some(reservation) = self.make_room(class, len) {
            return Found::Room(reservation);
        }
        // One may have been put back while this looked at the other sizes, or another had it in hand for a sweep.
        if let Some(slot) = self.take_swept(class) {
            return Found::Slot(slot);
        }
        // Of a small size a few slots will do, or a larger one.
        if class::is_small(class) {
            let least = class::least_segment_len(class) as u64;
            let smaller =
                std::iter::successors(Some(len / 2), |len| Some(len / 2)).take_while(|len| *len > least);
            for len in smaller.chain([least]) {
                if let Some(reservation) = Budget::reserve(&self.budget, len) {
                    return Found::Room(reservation);
                }
            }
            if let Some(slot) = self.take_larger_small(class) {
                return Found::Slot(slot);
            }
        }
        Found::Nothing
    }

    /// An idle slot of a small class that is larger than this one. The caller holds `sweep`.
    fn take_larger_small(&self, class: ClassIndex) -> Option<Arc<Slot>> {
        let larger = ClassIndex::all().filter(|&larger| larger > class && class::is_small(larger));
        { larger }.find_map(|larger| self.take_swept(larger))
    }

    /// An idle slot, also of those that lie apart. The caller holds `sweep`.
    fn take_swept(&self, class: ClassIndex) -> Option<Arc<Slot>> {
        self.take_idle(class).or_else(|| {
            let slot = self.classes[class.index()].get()?.packed.take()?;
            slot.count_take();
            Some(slot)
        })
    }

    /// An idle slot of a small class with `existing` ones, while none is in another's hands.
    ///
    /// A sweep puts back what it cannot use and wakes no waiter for it. So one who found nothing during a sweep looks again after it:
    /// before it sleeps, and before it makes a segment as large as all that it did not find.
    #[cold]
    fn take_settled(&self, class: ClassIndex, existing: usize) -> Option<Arc<Slot>> {
        if existing == 0 || !class::is_small(class) {
            return None;
        }
        let _sweeping = self.sweep.lock();
        if !self.budget.gate.waits_in_main() {
            // The others are to be had without a lock again.
            self.class(class).packed.take_all().into_iter().for_each(|slot| self.keep(slot));
        }
        self.take_swept(class)
    }

    /// An idle slot of a larger class than this large one, where the cap leaves no room for another: to make a segment of a MiB takes some
    /// 300 µs. The smallest that there is, as long as no more than a quarter of the cap is lost to messages that are smaller than their slots. The caller
    /// holds `sweep`.
    fn take_larger(&self, class: ClassIndex) -> Option<Arc<Slot>> {
        if class::size_of(class) < REUSED_MIN || !self.config.pooling {
            return None;
        }
        let larger = ClassIndex::all().filter(|&larger| larger > class);
        let slot = { larger }.find_map(|larger| self.take_idle(larger))?;
        let lost = |size: usize, used: ClassIndex| size.saturating_sub(class::size_of(used)) as u64;
        let others = ClassIndex::all().filter(|&other| class::size_of(other) > REUSED_MIN);
        let others = others.filter_map(|other| self.classes[other.index()].get());
        let others =
            others.flat_map(|state| state.slots.lock().iter().filter_map(Weak::upgrade).collect::<Vec<_>>());
        let sum: u64 = others
            .filter(|other| !Arc::ptr_eq(other, &slot))
            .map(|other| class::class_of(other.len()).map_or(0, |used| lost(other.capacity(), used)))
            .sum();
        if sum + lost(slot.capacity(), class) <= self.config.max_bytes / 4 {
            return Some(slot);
        }
        self.keep(slot);
        None
    }

    /// Gives up idle segments of other sizes until there is room for `len` bytes: first the smaller ones, which could not be used for this
    /// size, and of larger ones the smallest. The caller holds `sweep`.
    fn make_room(&self, class: ClassIndex, len: u64) -> Option<Reservation> {
        let smaller = ClassIndex::all().rev().filter(|&other| other < class);
        for other in smaller.chain(ClassIndex::all().filter(|&other| other > class)) {
            if class::is_small(other) {
                self.give_up_idle(other);
            } else if let Some(state) = self.classes[other.index()].get() {
                // No more of them than it takes.
                while let Some(slot) = state.take_elsewhere() {
                    free(slot);
                    if let Some(reservation) = Budget::reserve(&self.budget, len) {
                        state.know(&[]);
                        return Some(reservation);
                    }
                }
                state.know(&[]);
            }
            if let Some(reservation) = Budget::reserve(&self.budget, len) {
                return Some(reservation);
            }
        }
        None
    }

    /// Whether the second segment is made although the first has come back.
    ///
    /// What a subscriber has just read lies in his core's cache, from which each line has to be taken back before it is written; by the
    /// time that one more message has been read it has gone from there.
    fn alternates(&self, class: ClassIndex) -> bool {
        let keeps_two = self.config.pooling && self.config.max_idle_per_size > 1;
        keeps_two && ALTERNATING.contains(&class::size_of(class))
    }

    /// Makes a segment in reserved room; its first slot is the caller's, the others become idle.
    ///
    /// Where the system refuses what the cap allows, idle segments are given up for it.
    pub(crate) fn create(
        self: &Arc<Self>,
        class: ClassIndex,
        room: Reservation,
    ) -> Result<Arc<Slot>, TakeError> {
        let len = room.len();
        let refused = match self.try_create(class, room) {
            Ok(slot) => return Ok(slot),
            Err(refused) => refused,
        };
        // There may be one where it was not the first wanted.
        if let Some(slot) = self.take_idle(class) {
            return Ok(slot);
        }
        let before = self.budget.used();
        self.trim();
        if self.budget.used() < before
            && let Some(room) = Budget::reserve(&self.budget, len)
        {
            return self.try_create(class, room);
        }
        Err(refused)
    }

    fn try_create(self: &Arc<Self>, class: ClassIndex, room: Reservation) -> Result<Arc<Slot>, TakeError> {
        let state = self.class(class);
        // Where others are made since the length was chosen it may be another, and some of the segment is left over: no matter.
        let pitch = class::pitch(class, self.shared_segment_len(), state.existing.load(Ordering::Relaxed));
        let slots = class::slots_in(class, pitch, room.len());
        let segment = Arc::new(Segment::create(room, slots, &self.config.create_options())?);
        kill_point!("segment: made");
        if !self.config.pooling {
            segment.abandon();
        }
        state.misses.fetch_add(1, Ordering::Relaxed);
        let made: Vec<_> =
            out_of_order(slots).into_iter().map(|index| self.slot(&segment, state, index * pitch)).collect();
        let existing = state.know(&made);
        if let Some(idle) = state.idle.as_ref().filter(|_| class::is_small(class)) {
            idle.expect_at_most(existing);
        }
        let mut made = made.into_iter();
        let first = made.next().expect("a segment has a slot at least");
        made.for_each(|slot| self.give_back(slot));
        first.count_take();
        Ok(first)
    }

    fn slot(self: &Arc<Self>, segment: &Arc<Segment>, shelf: &Arc<Class>, offset: usize) -> Arc<Slot> {
        let (segment, shelf, pool) = (Arc::clone(segment), Arc::clone(shelf), Arc::clone(self));
        let (len, takes) = (AtomicUsize::new(0), AtomicU64::new(0));
        let grains = segment.len() / segment.slots() as u64 / class::GRAIN as u64;
        let charge = u32::try_from(grains).unwrap_or(u32::MAX);
        Arc::new(Slot { segment, shelf, offset, charge, len, origin: self.origin, takes, pool })
    }

    /// Takes back a slot that nobody else holds.
    #[inline]
    pub(crate) fn give_back(&self, slot: Arc<Slot>) {
        self.put(slot);
        // SYNC POINT: closed, then drained. Either the drain finds what was just put, or this sees the close.
        if self.budget.gate.has_waiters() {
            self.attend();
        }
    }

    /// Waiters look again, where there are some. (Where a slot was not kept, its segment's reservation has woken them already.)
    #[cold]
    #[inline(never)]
    fn attend(&self) {
        if self.budget.gate.is_closed() {
            self.drain();
        }
        if self.budget.gate.waits_in_main() {
            self.pack();
        }
        self.budget.gate.wake();
    }

    /// Gives up the small segments that are wholly idle, and sets the other idle slots in order, for the large size that is waited for.
    ///
    /// By the one that gives back: until the first waiter looks another may have taken a slot of that segment.
    fn pack(&self) {
        // During a sweep it is left to the sweep. And it may be this thread's: what is freed wakes, and a waker may drop a slot.
        let Some(_sweeping) = self.sweep.try_lock() else { return };
        for class in ClassIndex::all().take_while(|&class| class::is_small(class)) {
            self.give_up_idle(class);
        }
    }

    /// Marks a slot that somebody out of reach may go on reading: it is never written again once it has come back. What its
    /// segment takes is free for others when all slots of it are back; the reader keeps his own mapping.
    ///
    /// What a `holder` has is counted until it says that it has let go.
    pub(crate) fn abandon(&self, slot: &Slot, holder: Option<&Arc<dyn Holder>>) {
        // The first time only: the idle slots of the segment are freed then, and none becomes idle afterwards.
        let is_first = !slot.segment.is_abandoned();
        match holder {
            Some(holder) => slot.segment.abandon_to(holder),
            None => slot.segment.abandon(),
        }
        if !is_first {
            return;
        }
        let _sweeping = self.sweep.lock();
        slot.shelf.take_all().into_iter().for_each(|idle| self.keep(idle));
    }

    /// Puts a slot back that was taken to be looked at; it wakes no waiter.
    fn keep(&self, slot: Arc<Slot>) {
        self.put(slot);
        // SYNC POINT: closed, then drained.
        if self.budget.gate.is_closed() {
            self.drain();
        }
    }

    /// Makes a slot idle, or frees it beyond `max_idle_per_size`.
    #[inline]
    fn put(&self, slot: Arc<Slot>) {
        if slot.segment.is_abandoned() {
            return free(slot);
        }
        if let Err(slot) = HotPlaces::try_put(slot, |slot| &slot.shelf.hot) {
            self.put_elsewhere(slot);
        }
    }

    /// Where this thread's own place is full: a slot of a large class for which there is no room is dropped.
    #[inline(never)]
    fn put_elsewhere(&self, slot: Arc<Slot>) {
        let shelf = self.class(slot.shelf.class);
        match &shelf.idle {
            Some(idle) if class::is_small(shelf.class) => idle.put(slot),
            Some(idle) => drop(idle.try_put(slot).or_else(|slot| shelf.hot.try_put_any(slot))),
            None => drop(shelf.hot.try_put_any(slot)),
        }
    }

    /// Keeps nothing from now on, and frees what is idle: whatever is in use is freed when it comes back.
    pub(crate) fn close(&self) {
        if self.is_inherited() {
            return;
        }
        self.budget.gate.close();
        // SYNC POINT: closed, then drained.
        fence_after_rmw();
        // Some of it may hold a reservation, and with it the budget that it lies in.
        self.budget.abandoned.close();
        self.drain();
    }

    /// Frees every idle slot.
    #[cold]
    fn drain(&self) {
        for state in self.classes.iter().filter_map(OnceLock::get) {
            drop(state.take_all());
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
        self.budget.sweep_abandoned();
        let mut stats = PoolStats {
            bytes: self.budget.used(),
            abandoned_bytes: self.budget.abandoned.bytes(),
            max_bytes: self.config.max_bytes,
            waiters: self.budget.gate.waiters(),
            ..PoolStats::default()
        };
        for (class, state) in ClassIndex::all().zip(&self.classes) {
            let Some(state) = state.get() else { continue };
            let (mut takes, mut slots, mut last) = (state.past_takes.load(Ordering::Relaxed), 0, None);
            // All first: whoever is the last to drop one must not hold the lock.
            let existing: Vec<_> = state.slots.lock().iter().filter_map(Weak::upgrade).collect();
            for slot in &existing {
                takes += slot.takes.load(Ordering::Relaxed);
                // Those of one segment follow each other.
                if last.replace(slot.segment.id()) != Some(slot.segment.id()) {
                    slots += slot.segment.slots();
                    stats.segments += 1;
                }
            }
            let misses = state.misses.load(Ordering::Relaxed);
            stats.misses += misses;
            stats.hits += takes.saturating_sub(misses);
            stats.sizes.push(SizeStats { size: class::size_of(class), slots, idle: state.idle_len() });
        }
        stats
    }

    /// Frees the wholly idle segments of one class. Its other idle slots lie apart while a large size is waited for. The caller holds `sweep`.
    fn give_up_idle(&self, class: ClassIndex) {
        let Some(state) = self.classes[class.index()].get() else { return };
        let whole = state.packed.put(state.take_queued());
        if !whole.is_empty() {
            drop(whole);
            state.know(&[]);
        }
        if !self.budget.gate.waits_in_main() {
            state.packed.take_all().into_iter().for_each(|slot| self.keep(slot));
        } else if self.budget.gate.is_closed() {
            // SYNC POINT: closed, then drained.
            self.drain();
        }
    }

    fn class(&self, class: ClassIndex) -> &Arc<Class> {
        self.classes[class.index()].get_or_init(|| {
            // No more than can exist.
            let most =
                usize::try_from(self.config.max_bytes / class::size_of(class) as u64).unwrap_or(usize::MAX);
            let max_idle = self.config.max_idle_per_size.min(most).max(1);
            Arc::new(Class::new(class, class::is_small(class), max_idle))
        })
    }

    /// The length of this class's segments: a page or more, and no more than an eighth of the cap for those that
    /// many small slots share.
    fn segment_len(&self, class: ClassIndex, existing: usize) -> u64 {
        class::segment_len(class, self.shared_segment_len(), existing) as u64
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

/// Where one waits for a slot of `class`.
#[inline]
pub(super) fn lane(class: ClassIndex) -> Lane {
    if class::is_small(class) { Lane::Side } else { Lane::Main }
}

/// Lets a slot go that is not to be used again.
#[cold]
fn free(slot: Arc<Slot>) {
    drop(slot);
}

/// The numbers below `count` without any order.
///
/// Slots are used in the order in which they were made. Were that the order in memory, the processor of a subscriber that reads one
/// would fetch the next ones as well, from the publisher's, which is just about to write them.
fn out_of_order(count: usize) -> Vec<usize> {
    let mut numbers: Vec<_> = (0..count).collect();
    let hasher = BuildHasherDefault::<DefaultHasher>::new();
    numbers.sort_by_cached_key(|number| hasher.hash_one(number));
    numbers
}

#[cfg(test)]
mod sweep_tests;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ShmSegmentPool;

    #[test]
    fn pool_without_handles_frees_what_is_idle_and_the_rest_when_it_comes_back() {
        // A thread of its own, which ends: it keeps the pool that it used last.
        let core = std::thread::spawn(|| {
            let pool = ShmSegmentPool::new(ShmPoolConfig::new());
            let core = Arc::downgrade(pool.core());
            let (held, idle) = (pool.try_take(1 << 20).unwrap(), pool.try_take(1 << 20).unwrap());
            let small = pool.try_take(100).unwrap();
            let segments = [&held, &idle, &small].map(|segment| Arc::downgrade(segment.slot().segment()));
            drop(idle);
            let alive = || segments.each_ref().map(|segment| segment.strong_count() > 0);
            assert_eq!(alive(), [true; 3]);
            drop(pool);
            assert_eq!(alive(), [true, false, true]);
            drop((held, small));
            assert_eq!(alive(), [false; 3]);
            core
        });
        assert_eq!(core.join().unwrap().strong_count(), 0);
    }

    #[test]
    fn slots_of_one_segment_are_looked_through_once_when_all_are_abandoned() {
        fn processor_time() -> i64 {
            let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
            time.tv_sec * 1_000_000_000 + time.tv_nsec
        }
        const SLOTS: usize = 8_192;
        let pool = ShmSegmentPool::new(ShmPoolConfig::new());
        let take = || -> Vec<_> { (0..SLOTS).map(|_| pool.try_take(1).unwrap()).collect() };
        let (held, others) = (take(), take());
        drop(others);
        let begun = processor_time();
        held.iter().for_each(|segment| pool.core().abandon(segment.slot(), None));
        drop(held);
        // For each slot anew it is a hundred times as much.
        assert!(processor_time() - begun < 2_000_000_000, "{} ns", processor_time() - begun);
        assert!(pool.stats().in_use() < SLOTS);
    }

    #[test]
    fn pool_closed_while_others_give_back_keeps_nothing() {
        for _ in 0..200 {
            let pool = ShmSegmentPool::new(ShmPoolConfig::new());
            let core = Arc::downgrade(pool.core());
            let taken = [(); 4].map(|()| pool.try_take(100_000).unwrap());
            let threads = taken.map(|segment| std::thread::spawn(|| drop(segment)));
            std::thread::spawn(|| drop(pool)).join().unwrap();
            for thread in threads {
                thread.join().unwrap();
            }
            assert_eq!(core.strong_count(), 0);
        }
    }
}
