//! Where each word of a link's page stands, and who writes it.
//!
//! The page is [`Control`], then the ring's [`Entry`]s, then the release bitmap. Its size follows from the link's depth
//! alone ([`Geometry`]), which both sides know from the handshake and never from the page.
//!
//! This file does not say in which order the words are used: see [`ring`](super::ring), [`release`](super::release)
//! and [`bell`](super::bell). It does not make or map memory either.

#![allow(unsafe_code)]

#[cfg(not(tokio_shm_loom))]
use core::ptr::NonNull;

use crate::apart::Apart;
use crate::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// The first word of every link page.
pub(crate) const MAGIC: u64 = u64::from_le_bytes(*b"shm-link");

/// Changes with every change of this layout or of what its words mean.
pub(crate) const VERSION: u32 = 3;

/// The most tickets a link can have: a ticket has 16 bits in a descriptor.
pub(crate) const DEPTH_MAX: u32 = 1 << 16;

const CONTROL_LEN: usize = 5 * APART;
pub(crate) const ENTRY_LEN: usize = 32;
const APART: usize = align_of::<Apart<u8>>();
/// The length is a multiple of this, so that it does not depend on who maps the page. It is not the host's page size.
const PAGE: usize = 4096;

/// How many tickets a link has, and thereby how large its page is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Geometry {
    depth: u32,
    capacity: u32,
}

impl Geometry {
    /// `None` unless `depth` is 1 to [`DEPTH_MAX`].
    pub(crate) const fn new(depth: u32) -> Option<Self> {
        match depth {
            1..=DEPTH_MAX => Some(Self { depth, capacity: depth.next_power_of_two() }),
            _ => None,
        }
    }

    /// Tickets: messages queued plus messages held.
    #[inline]
    pub(crate) const fn depth(self) -> u32 {
        self.depth
    }

    /// Entries of the ring: a power of two, and never fewer than tickets.
    #[cfg(any(test, fuzzing))]
    #[inline]
    pub(crate) const fn capacity(self) -> u32 {
        self.capacity
    }

    /// Bytes of the whole page.
    pub(crate) const fn page_len(self) -> usize {
        (self.released_offset() + self.released_words() * size_of::<u64>()).next_multiple_of(PAGE)
    }

    /// Bytes before the ring's first entry.
    #[inline]
    pub(crate) const fn entries_offset(self) -> usize {
        CONTROL_LEN
    }

    /// Bytes before the first word of the release bitmap.
    #[inline]
    pub(crate) const fn released_offset(self) -> usize {
        (CONTROL_LEN + self.capacity as usize * ENTRY_LEN).next_multiple_of(APART)
    }

    /// Words of the release bitmap, one bit a ticket.
    #[inline]
    pub(crate) const fn released_words(self) -> usize {
        self.depth.div_ceil(u64::BITS) as usize
    }
}

/// The words at the start of the page.
///
/// "Publisher" and "subscriber" say who writes a word when both keep to the protocol. Either may write anything.
#[repr(C, align(128))]
pub(crate) struct Control {
    /// [`MAGIC`]; the publisher stores it once, after everything else.
    magic: AtomicU64,
    /// [`VERSION`]; the publisher, once.
    version: AtomicU32,
    /// The link's depth; the publisher, once. Read only to be compared with what the handshake said.
    depth: AtomicU32,
    /// 1: the next message waits for this link alone to give back bytes: it has its share of the pool. The publisher, where senders wait
    /// already; the subscriber looks at it where it would sleep.
    pub(crate) at_share: AtomicU32,
    /// Each message with a sequence number below this one was either queued here or dropped. Only grows; the publisher.
    pub(crate) offered: Apart<AtomicU64>,
    /// Ring position of the oldest entry that is not claimed. Grows by compare-and-swap: from the subscriber, which claims one
    /// entry or some, or from the publisher, which takes one back.
    pub(crate) head: Apart<AtomicU64>,
    /// 1: the subscriber is about to sleep, or sleeps, until its doorbell rings. It swaps in 1 before it looks a last
    /// time; whoever swaps 1 for 0 has either found something (the subscriber) or owes a ring (the publisher).
    pub(crate) data_armed: Apart<AtomicU32>,
    /// 1: the publisher has run out of tickets and sleeps until one is released. As `data_armed`, roles exchanged.
    pub(crate) credit_armed: Apart<AtomicU32>,
}

/// A descriptor on the ring; [`ring`](super::ring) says what is in which word.
///
/// The words are atomics because the publisher may write an entry while the subscriber still reads it: that one then
/// loses the race for the head and throws away what it read.
#[repr(C, align(32))]
pub(crate) struct Entry(pub(crate) [AtomicU64; 4]);

// The words of another process's build stand where this one expects them.
#[cfg(not(tokio_shm_loom))]
const _: () = {
    use core::mem::offset_of;
    assert!(size_of::<Control>() == CONTROL_LEN);
    assert!(align_of::<Control>() == APART);
    assert!(offset_of!(Control, magic) == 0);
    assert!(offset_of!(Control, version) == 8);
    assert!(offset_of!(Control, depth) == 12);
    assert!(offset_of!(Control, at_share) == 16);
    assert!(offset_of!(Control, offered) == APART);
    assert!(offset_of!(Control, head) == 2 * APART);
    assert!(offset_of!(Control, data_armed) == 3 * APART);
    assert!(offset_of!(Control, credit_armed) == 4 * APART);
    assert!(size_of::<Entry>() == ENTRY_LEN);
    assert!(align_of::<Entry>() == ENTRY_LEN);
    assert!(CONTROL_LEN.is_multiple_of(align_of::<Entry>()));
    assert!(PAGE.is_multiple_of(APART));
};

/// What the subscriber finds wrong with a page before it uses it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum LayoutError {
    /// No publisher finished preparing this page.
    #[error("not a link page: it starts with {actual:#018x}")]
    Magic { actual: u64 },
    /// The publisher was built with another layout.
    #[error("the link page has layout version {actual}, this build knows version {expected}")]
    Version { expected: u32, actual: u32 },
    /// The page and the handshake contradict each other.
    #[error("the link page is for a depth of {actual}, the handshake said {expected}")]
    Depth { expected: u32, actual: u32 },
}

/// A view of a link's page. The lengths of the slices are this process's own knowledge.
#[derive(Clone, Copy)]
pub(crate) struct Page<'a> {
    pub(crate) control: &'a Control,
    pub(crate) entries: &'a [Entry],
    pub(crate) released: &'a [AtomicU64],
    geometry: Geometry,
}

impl<'a> Page<'a> {
    /// Views mapped memory as a link's page.
    ///
    /// # Safety
    /// For the whole of `'a`, `start` must point to [`Geometry::page_len`] readable and writable bytes, aligned to
    /// 128, which stay mapped and cannot shrink, and which everyone, in this process or another, accesses only
    /// through atomics. Their content does not matter.
    #[cfg(not(tokio_shm_loom))]
    #[inline]
    pub(crate) unsafe fn from_raw(start: NonNull<u8>, geometry: Geometry) -> Self {
        debug_assert_eq!(start.as_ptr() as usize % APART, 0);
        // SAFETY: the caller vouches for mapping, alignment and lifetime; `Control` is atomics only, for which every
        // content is valid, and it ends before `page_len`.
        let control = unsafe { start.cast::<Control>().as_ref() };
        // SAFETY: the offset is within `page_len`, for which the caller vouches.
        let entries = unsafe { start.add(geometry.entries_offset()) }.cast::<Entry>();
        // SAFETY: as for `control`; `capacity` entries end before the bitmap does, and the offset keeps the alignment
        // (asserted above).
        let entries = unsafe { core::slice::from_raw_parts(entries.as_ptr(), geometry.capacity as usize) };
        // SAFETY: the offset is within `page_len`, for which the caller vouches.
        let released = unsafe { start.add(geometry.released_offset()) }.cast::<AtomicU64>();
        // SAFETY: as for `control`; `page_len` counts in all the words of the bitmap, which starts on a multiple of 128.
        let released = unsafe { core::slice::from_raw_parts(released.as_ptr(), geometry.released_words()) };
        Self { control, entries, released, geometry }
    }

    /// What this process knows the page's size to be.
    #[inline]
    pub(crate) fn geometry(self) -> Geometry {
        self.geometry
    }

    /// The publisher's preparation of a page that is still all zeros, as a new memory object is.
    ///
    /// `offered` is the sequence number below which the subscriber is owed nothing by this link.
    pub(crate) fn init(self, offered: u64) {
        let control = self.control;
        control.version.store(VERSION, Ordering::Relaxed);
        control.depth.store(self.geometry.depth, Ordering::Relaxed);
        control.offered.store(offered, Ordering::Relaxed);
        // SYNC POINT: page prepared
        control.magic.store(MAGIC, Ordering::Release);
    }

    /// The subscriber's look at a page before it uses it.
    pub(crate) fn validate(self) -> Result<(), LayoutError> {
        // SYNC POINT: page prepared
        let magic = self.control.magic.load(Ordering::Acquire);
        if magic != MAGIC {
            return Err(LayoutError::Magic { actual: magic });
        }
        let version = self.control.version.load(Ordering::Relaxed);
        if version != VERSION {
            return Err(LayoutError::Version { expected: VERSION, actual: version });
        }
        let depth = self.control.depth.load(Ordering::Relaxed);
        if depth != self.geometry.depth {
            return Err(LayoutError::Depth { expected: self.geometry.depth, actual: depth });
        }
        Ok(())
    }
}

/// A page on the heap, for tests and for loom, whose atomics cannot lie in mapped memory.
#[cfg(any(test, fuzzing))]
pub(crate) struct HeapPage {
    control: Control,
    entries: Box<[Entry]>,
    released: Box<[AtomicU64]>,
    geometry: Geometry,
}

#[cfg(any(test, fuzzing))]
impl HeapPage {
    /// A page of zeros, not prepared yet.
    pub(crate) fn new(depth: u32) -> Self {
        let geometry = Geometry::new(depth).expect("a test's depth");
        let word = || AtomicU64::new(0);
        let flag = || AtomicU32::new(0);
        Self {
            control: Control {
                magic: word(),
                version: flag(),
                depth: flag(),
                at_share: flag(),
                offered: Apart(word()),
                head: Apart(word()),
                data_armed: Apart(flag()),
                credit_armed: Apart(flag()),
            },
            entries: (0..geometry.capacity).map(|_| Entry([word(), word(), word(), word()])).collect(),
            released: (0..geometry.released_words()).map(|_| word()).collect(),
            geometry,
        }
    }

    /// The view that a mapping would give.
    pub(crate) fn page(&self) -> Page<'_> {
        Page {
            control: &self.control,
            entries: &self.entries,
            released: &self.released,
            geometry: self.geometry,
        }
    }

    #[cfg(not(tokio_shm_loom))]
    pub(crate) fn words(&self) -> usize {
        self.page().words()
    }

    #[cfg(not(tokio_shm_loom))]
    pub(crate) fn scribble(&self, at: usize, value: u64) {
        self.page().scribble(at, value);
    }
}

/// How many words [`Page::scribble`] can reach before the first entry.
#[cfg(all(any(test, fuzzing), not(tokio_shm_loom)))]
pub(crate) const CONTROL_WORDS: usize = 7;

#[cfg(all(any(test, fuzzing), not(tokio_shm_loom)))]
impl Page<'_> {
    /// How many words [`scribble`](Self::scribble) can reach.
    pub(crate) fn words(self) -> usize {
        CONTROL_WORDS + self.entries.len() * 4 + self.released.len()
    }

    /// What a hostile peer does: stores `value` in the `at`-th word, whatever that word is.
    pub(crate) fn scribble(self, at: usize, value: u64) {
        let control = self.control;
        let narrow = value as u32;
        match at {
            0 => control.magic.store(value, Ordering::Relaxed),
            1 => control.version.store(narrow, Ordering::Relaxed),
            2 => control.depth.store(narrow, Ordering::Relaxed),
            3 => control.offered.store(value, Ordering::Relaxed),
            4 => control.head.store(value, Ordering::Relaxed),
            5 => control.data_armed.store(narrow, Ordering::Relaxed),
            6 => control.credit_armed.store(narrow, Ordering::Relaxed),
            _ => {
                let at = at - CONTROL_WORDS;
                match self.entries.get(at / 4) {
                    Some(entry) => entry.0[at % 4].store(value, Ordering::Relaxed),
                    None => self.released[at - self.entries.len() * 4].store(value, Ordering::Relaxed),
                }
            }
        }
    }
}

#[cfg(all(test, not(tokio_shm_loom)))]
mod tests {
    use super::*;

    #[test]
    fn geometry_of_a_depth_out_of_range_is_none() {
        assert_eq!(Geometry::new(0), None);
        assert_eq!(Geometry::new(DEPTH_MAX + 1), None);
        assert!(Geometry::new(DEPTH_MAX).is_some());
    }

    #[test]
    fn parts_of_every_page_are_aligned_and_do_not_overlap() {
        for depth in (1..=DEPTH_MAX).step_by(if cfg!(miri) { 997 } else { 1 }) {
            let geometry = Geometry::new(depth).unwrap();
            assert!(geometry.capacity() >= depth && geometry.capacity() < 2 * depth);
            assert!(geometry.capacity().is_power_of_two());
            assert!(geometry.released_words() * 64 >= depth as usize);
            let entries_end = geometry.entries_offset() + geometry.capacity() as usize * size_of::<Entry>();
            assert!(geometry.entries_offset() >= size_of::<Control>());
            assert!(geometry.released_offset() >= entries_end);
            assert_eq!(geometry.released_offset() % APART, 0);
            assert!(geometry.page_len() >= geometry.released_offset() + geometry.released_words() * 8);
            assert_eq!(geometry.page_len() % PAGE, 0);
        }
    }

    /// Memory as `mmap` gives it.
    #[repr(align(4096))]
    struct Mapped([AtomicU64; 2 * PAGE / 8]);

    #[test]
    fn page_over_raw_memory_has_every_word_where_the_offsets_say() {
        let geometry = Geometry::new(65).unwrap();
        let mapped = Box::new(Mapped([const { AtomicU64::new(0) }; 2 * PAGE / 8]));
        assert!(geometry.page_len() <= size_of::<Mapped>());
        // SAFETY: `mapped` is that long, so aligned, atomics only, and outlives the view.
        let page = unsafe { Page::from_raw(NonNull::from(&*mapped).cast(), geometry) };
        assert_eq!((page.entries.len(), page.released.len()), (128, 2));

        page.init(7);
        page.control.head.store(3, Ordering::Relaxed);
        page.entries[127].0[3].store(5, Ordering::Relaxed);
        page.released[1].store(9, Ordering::Relaxed);

        let word = |offset: usize| mapped.0[offset / 8].load(Ordering::Relaxed);
        assert_eq!(word(0), MAGIC);
        assert_eq!(word(8), u64::from(VERSION) | 65 << 32);
        assert_eq!(word(128), 7);
        assert_eq!(word(256), 3);
        assert_eq!(word(geometry.entries_offset() + 128 * 32 - 8), 5);
        assert_eq!(word(geometry.released_offset() + 8), 9);
        assert_eq!(page.validate(), Ok(()));
    }

    #[test]
    fn page_that_is_not_as_agreed_is_refused_with_what_it_holds() {
        let heap = HeapPage::new(4);
        assert_eq!(heap.page().validate(), Err(LayoutError::Magic { actual: 0 }));
        heap.page().init(0);
        assert_eq!(heap.page().validate(), Ok(()));
        heap.scribble(2, 5);
        assert_eq!(heap.page().validate(), Err(LayoutError::Depth { expected: 4, actual: 5 }));
        heap.scribble(1, 99);
        assert_eq!(heap.page().validate(), Err(LayoutError::Version { expected: VERSION, actual: 99 }));
    }
}
