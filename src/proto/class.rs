//! Slot sizes, by arithmetic.
//!
//! Sizes are multiples of 64 bytes: 64, 128, 192, 256, and from there on four steps to each power of two. So a slot is
//! larger than its message by at most a quarter of the message, or 63 bytes if that is more.
//!
//! This file does not decide how much memory a pool has; it says how much a segment of a class takes.

/// The smallest slot, and what every slot's size and offset is a multiple of: a cache line, and what a descriptor counts
/// offsets in.
pub(crate) const GRAIN: usize = 64;

/// The largest slot, and so the largest message.
pub(crate) const LARGEST: usize = 1 << if usize::BITS >= 64 { 40 } else { 30 };

// What `ALIGN` promises of slots: offsets and sizes are multiples of it, and segments begin at a page.
const _: () = assert!(GRAIN.is_multiple_of(crate::ALIGN) && PITCH_MIN.is_multiple_of(crate::ALIGN));

/// How many classes there are.
pub(crate) const COUNT: usize = index_of(LARGEST) + 1;

/// Slots up to this size share a segment; a larger one has a segment of its own.
pub(crate) const SMALL_MAX: usize = 16 << 10;

/// Most bytes of a segment shared by small slots.
pub(crate) const SHARED_SEGMENT: usize = 256 << 10;

/// How far apart small slots begin at least, as long as there are fewer than [`SPREAD`] and the cap leaves room for that. A processor that
/// reads one has lines beside it fetched as well, and so would take away those that the publisher is just about to write. An odd number of
/// lines, so that slots are found in all parts of a cache.
pub(crate) const PITCH_MIN: usize = 11 * GRAIN;

/// With so many slots there is a backlog, and what lies beside a message is another that was sent.
const SPREAD: usize = 512;

/// Slots of the first segment of a small class. Idle slots are used in turn, so that with more of them than are needed all would
/// go through the caches; where more are needed, each further segment has as many as there are already.
pub(crate) const FIRST_SLOTS: usize = 128;

/// A small class's first segment takes no more than one part of so many of what a shared segment may: of 64 sizes each has some.
const FIRST_SHARE: usize = 8;

/// What a segment's length is a multiple of. Where the host's pages are larger, the memory object is rounded up by it.
const PAGE: usize = 4096;

const STEPS_LOG2: u32 = 2;
const STEPS: usize = 1 << STEPS_LOG2;

/// One of the slot sizes; in the order of size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct ClassIndex(u8);

impl ClassIndex {
    /// All classes, smallest first.
    pub(crate) fn all() -> impl ExactSizeIterator<Item = Self> + DoubleEndedIterator {
        (0..COUNT as u8).map(Self)
    }

    /// 0 to [`COUNT`] − 1.
    pub(crate) const fn index(self) -> usize {
        self.0 as usize
    }
}

/// The class of the smallest slots that hold `len` bytes. `None` above [`LARGEST`].
#[inline]
pub(crate) const fn class_of(len: usize) -> Option<ClassIndex> {
    if len <= LARGEST { Some(ClassIndex(index_of(len) as u8)) } else { None }
}

/// Whether slots of `class` may share a segment; those of a larger one have each its own.
#[inline]
pub(crate) const fn is_small(class: ClassIndex) -> bool {
    class.0 as usize <= index_of(SMALL_MAX)
}

/// Bytes of one slot.
#[inline]
pub(crate) const fn size_of(class: ClassIndex) -> usize {
    let index = class.index();
    let grains = if index < STEPS { index + 1 } else { (STEPS + 1 + index % STEPS) << (index / STEPS - 1) };
    grains * GRAIN
}

/// From the beginning of one slot to that of the next, in a segment made when there are `existing` slots.
pub(crate) const fn pitch(class: ClassIndex, max_segment_bytes: usize, existing: usize) -> usize {
    let (size, spread) = (size_of(class), existing < SPREAD && max_segment_bytes >= SHARED_SEGMENT);
    if spread && size < PITCH_MIN { PITCH_MIN } else { size }
}

/// How many slots the next segment of `class` has when there are `existing` ones: one of a large class, else [`FIRST_SLOTS`] (fewer where
/// that is more than a [`FIRST_SHARE`] of `max_segment_bytes`) or as many as there are, but no more than fit into [`SHARED_SEGMENT`] and
/// `max_segment_bytes`, and one at least.
pub(crate) const fn slots_per_segment(class: ClassIndex, max_segment_bytes: usize, existing: usize) -> usize {
    let size = pitch(class, max_segment_bytes, existing);
    let room = if max_segment_bytes < SHARED_SEGMENT { max_segment_bytes } else { SHARED_SEGMENT };
    if size > SMALL_MAX || room < size {
        return 1;
    }
    // Where the cap is low many sizes are to have their first slots.
    let first = most_of(FIRST_SLOTS, max_segment_bytes / FIRST_SHARE / size);
    let wanted = if existing > first { existing } else { first };
    let (fit, wanted) = (room / size, if wanted == 0 { 1 } else { wanted });
    most_of(fit, wanted)
}

const fn most_of(most: usize, wanted: usize) -> usize {
    if wanted < most { wanted } else { most }
}

/// The least that a segment of `class` can be: one slot, rounded up to whole pages.
pub(crate) const fn least_segment_len(class: ClassIndex) -> usize {
    size_of(class).next_multiple_of(PAGE)
}

/// Bytes of that segment: its slots, rounded up to whole pages.
pub(crate) const fn segment_len(class: ClassIndex, max_segment_bytes: usize, existing: usize) -> usize {
    let slots = slots_per_segment(class, max_segment_bytes, existing);
    (slots * pitch(class, max_segment_bytes, existing)).next_multiple_of(PAGE)
}

/// How many slots of `class` a segment of `len` bytes has, made as long as [`segment_len`] says, that lie `pitch` apart.
pub(crate) const fn slots_in(class: ClassIndex, pitch: usize, len: u64) -> usize {
    let slots = len as usize / pitch;
    if size_of(class) > SMALL_MAX || slots == 0 { 1 } else { slots }
}

#[inline]
const fn index_of(len: usize) -> usize {
    // The number, from 0, of the last grain that is used: a class ends where this number is about to grow past it.
    let last = len.saturating_sub(1) / GRAIN;
    if last < STEPS {
        return last;
    }
    let octave = last.ilog2() - STEPS_LOG2;
    // `last >> octave` is 4 to 7: the step within the octave, with the leading bit still on.
    octave as usize * STEPS + (last >> octave)
}

// A large slot fills its pages: no rounding is lost.
const _: () = assert!(SMALL_MAX / STEPS == PAGE);
const _: () = assert!(COUNT <= u8::MAX as usize);

#[cfg(all(test, not(tokio_shm_loom)))]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn first_classes_are_as_documented() {
        let sizes: Vec<_> = ClassIndex::all().take(14).map(size_of).collect();
        assert_eq!(sizes, [64, 128, 192, 256, 320, 384, 448, 512, 640, 768, 896, 1024, 1280, 1536]);
    }

    #[test]
    fn every_class_is_the_class_of_its_own_size_and_the_next_one_is_larger() {
        let mut previous = 0;
        for (index, class) in ClassIndex::all().enumerate() {
            let size = size_of(class);
            assert_eq!(class.index(), index);
            assert_eq!(class_of(size), Some(class));
            assert_eq!(class_of(previous + 1), Some(class));
            assert!(size > previous && size.is_multiple_of(GRAIN));
            assert!(size <= SMALL_MAX || size.is_multiple_of(PAGE));
            previous = size;
        }
        assert_eq!(previous, LARGEST);
    }

    #[test]
    fn lengths_at_the_ends_have_the_classes_at_the_ends() {
        assert_eq!(class_of(0).map(size_of), Some(GRAIN));
        assert_eq!(class_of(LARGEST).map(ClassIndex::index), Some(COUNT - 1));
        assert_eq!(class_of(LARGEST + 1), None);
        assert_eq!(class_of(usize::MAX), None);
    }

    fn len() -> impl Strategy<Value = usize> {
        // Evenly over the magnitudes, not over the numbers.
        (0u32..=LARGEST.ilog2(), any::<usize>())
            .prop_map(|(bits, noise)| ((1usize << bits) | (noise & ((1 << bits) - 1))).min(LARGEST))
    }

    proptest! {
        #[test]
        fn slot_holds_its_message_and_wastes_little(len in len()) {
            let size = size_of(class_of(len).unwrap());
            prop_assert!(size >= len);
            prop_assert!(size - len <= (len / 4).max(GRAIN - 1), "{len} in {size}");
        }

        #[test]
        fn class_never_falls_as_length_grows(a in len(), b in len()) {
            prop_assert!(class_of(a.min(b)) <= class_of(a.max(b)));
        }

        #[test]
        fn segment_has_room_for_its_slots(len in len(), most in 0usize..1 << 20, existing in 0usize..1 << 14) {
            let class = class_of(len).unwrap();
            let slots = slots_per_segment(class, most, existing);
            let bytes = segment_len(class, most, existing);
            prop_assert!(slots <= existing.max(FIRST_SLOTS));
            let pitch = pitch(class, most, existing);
            prop_assert!(slots >= 1 && slots * pitch <= bytes && pitch >= size_of(class));
            prop_assert!(slots_in(class, pitch, bytes as u64) >= slots);
            prop_assert_eq!(bytes % PAGE, 0);
            prop_assert!(slots == 1 || bytes <= most.min(SHARED_SEGMENT).next_multiple_of(PAGE));
            prop_assert!(slots == 1 || size_of(class) <= SMALL_MAX);
        }
    }
}
