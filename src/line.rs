//! The line in front of a turnstile: what was left for whoever is inside, in order; who may join it, and when nobody may any more.
//!
//! Anybody joins at the end. Only the owner of the [`Front`] takes away, without a read-modify-write.
//!
//! The end of the line, how many places are reserved and whether it is closed are one word: so "it is open", "there is a place" and
//! "this is the n-th" are one question with one answer.
#![allow(unsafe_code)]

#[cfg(all(test, tokio_shm_loom))]
mod loom_tests;
#[cfg(all(test, not(tokio_shm_loom)))]
mod tests;

use std::fmt;

use crate::apart::Apart;
use crate::sync::atomic::{AtomicU64, Ordering};
use crate::sync::{Arc, UnsafeCell, fence_after_rmw};

/// Bits 0..42: the position of the next to join. Bits 42..63: places reserved by who has not joined yet. Bit 63: closed.
const CLOSED: u64 = 1 << 63;
const RESERVED: u64 = 1 << 42;
const POSITION: u64 = RESERVED - 1;

/// Bit of a stamp: the front came to this place when its thing had joined and was not there yet.
const MISSED: u64 = 1 << 63;

/// Why there is no place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum NoPlace {
    Full,
    Closed,
}

/// What came of joining.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use = "a front that was turned away relies on another look"]
pub(crate) struct Joined {
    /// The front came by between this thread's counting and its putting, and left this thing and all behind it: it must be
    /// brought here again.
    pub(crate) missed: bool,
    /// Another place is reserved in place of the one that was used.
    pub(crate) kept: bool,
}

/// A place in the line, used again and again.
struct Place<T> {
    /// The position of what was put here last, plus one; 0 for nothing yet. With [`MISSED`] until the next thing is put.
    stamp: AtomicU64,
    thing: UnsafeCell<Option<T>>,
}

/// See the module.
pub(crate) struct Line<T> {
    word: Apart<AtomicU64>,
    /// Below this position places have been given back.
    given_back: Apart<AtomicU64>,
    /// A power of two, no fewer than `capacity`.
    places: Box<[Place<T>]>,
    capacity: u64,
}

// SAFETY: a thing is put in by one thread and taken out by another, never looked at by two: `T: Send` is enough. Who may touch a
// place when is said at `put` and `pop`.
unsafe impl<T: Send> Sync for Line<T> {}

impl<T> Line<T> {
    /// A line of `capacity` places, from 1 to 2^20.
    pub(crate) fn new(capacity: u32) -> (Arc<Self>, Front<T>) {
        let places = (0..capacity.next_power_of_two())
            .map(|_| Place { stamp: AtomicU64::new(0), thing: UnsafeCell::new(None) })
            .collect();
        let (word, given_back) = (Apart(AtomicU64::new(0)), Apart(AtomicU64::new(0)));
        let line = Arc::new(Self { word, given_back, places, capacity: u64::from(capacity) });
        let front = Front { line: Arc::clone(&line), next: 0 };
        (line, front)
    }

    /// Joins with what `thing` returns, which is called only if there is a place. It must not panic: nothing behind would ever be
    /// reached.
    pub(crate) fn join(&self, thing: impl FnOnce() -> T) -> Result<Joined, NoPlace> {
        let word = self.word.load(Ordering::Acquire);
        let joined =
            self.change(word, |word, free| if free == 0 { Err(NoPlace::Full) } else { Ok(next(word)) })?;
        Ok(Joined { missed: self.put(joined, thing()), kept: false })
    }

    /// Keeps a place for later. `guess` is the word as the caller saw it last, and is brought up to date.
    #[inline]
    pub(crate) fn reserve(&self, guess: &mut u64) -> Result<(), NoPlace> {
        let reserve =
            |word: u64, free| if free == 0 { Err(NoPlace::Full) } else { Ok(word.wrapping_add(RESERVED)) };
        *guess = self.change(*guess, reserve)?;
        Ok(())
    }

    /// Joins in a reserved place. Where the caller wants to `keep` one and half of all are free, another is reserved in its stead.
    /// After an error, which can only be that the line is closed, it is given up.
    ///
    /// A full fence at its end stands before the looks for somebody who waits, and for a close.
    #[inline]
    pub(crate) fn join_reserved(
        &self,
        guess: &mut u64,
        keep: bool,
        thing: impl FnOnce() -> T,
    ) -> Result<Joined, NoPlace> {
        let mut kept = false;
        let joined = self.change(*guess, |word, free| {
            kept = keep && free > self.capacity / 2;
            // A guess may know nothing of the reserved place; what comes of that is compared with the word, and thrown away.
            Ok(if kept { next(word) } else { next(word).wrapping_sub(RESERVED) })
        });
        match joined {
            Ok(joined) => {
                *guess = joined;
                Ok(Joined { missed: self.put(joined, thing()), kept })
            }
            Err(closed) => {
                self.cancel_reserved();
                Err(closed)
            }
        }
    }

    /// Gives up a reserved place unused.
    pub(crate) fn cancel_reserved(&self) {
        self.word.fetch_sub(RESERVED, Ordering::AcqRel);
    }

    /// Closes the line for good. Whoever joined before is seen by a look after this, or sees after joining that it is closed.
    pub(crate) fn close(&self) {
        self.word.fetch_or(CLOSED, Ordering::AcqRel);
        // SYNC POINT: joined, then looked whether closed.
        fence_after_rmw();
    }

    #[inline]
    pub(crate) fn is_closed(&self) -> bool {
        self.word.load(Ordering::Acquire) & CLOSED != 0
    }

    /// Whether all who joined have given their places back: once closed, that is for good.
    pub(crate) fn all_back(&self) -> bool {
        self.len() == 0
    }

    /// How many have joined and not given back their places.
    pub(crate) fn len(&self) -> usize {
        // In this order: whoever gives a place back has joined before.
        let given_back = self.given_back.load(Ordering::Acquire);
        (self.joined().wrapping_sub(given_back) & POSITION) as usize
    }

    /// How many have joined, to be compared by [`is_reached`].
    #[inline]
    pub(crate) fn joined(&self) -> u64 {
        self.word.load(Ordering::Acquire) & POSITION
    }

    /// Changes the word by `step`, which is told how many places are free, and returns the new one.
    // A guess saves a load, which the read-modify-write would have to wait for.
    #[inline]
    fn change(
        &self,
        guess: u64,
        mut step: impl FnMut(u64, u64) -> Result<u64, NoPlace>,
    ) -> Result<u64, NoPlace> {
        let (mut word, mut guessed) = (guess, true);
        loop {
            let next = match self.free(word) {
                _ if word & CLOSED != 0 => Err(NoPlace::Closed),
                Some(free) => step(word, free),
                // Some have joined since, and are gone already.
                None => Err(NoPlace::Full),
            };
            let now = match next {
                // AcqRel: one who reserves or joins sees what was done before a close that it does not see, and the other way round.
                Ok(next) => {
                    match self.word.compare_exchange(word, next, Ordering::AcqRel, Ordering::Acquire) {
                        Ok(_) => return Ok(next),
                        Err(now) => now,
                    }
                }
                Err(error) => {
                    let now = self.word.load(Ordering::Acquire);
                    if now == word && !guessed {
                        return Err(error);
                    }
                    now
                }
            };
            (word, guessed) = (now, false);
        }
    }

    /// Free places if the word is `word`; `None` where it cannot be any more.
    ///
    /// To be called after the word was read: no fewer than these are free at the time of a compare-exchange that finds it unchanged.
    #[inline]
    fn free(&self, word: u64) -> Option<u64> {
        // SYNC POINT: place given back (Acquire).
        let joined = word.wrapping_sub(self.given_back.load(Ordering::Acquire)) & POSITION;
        self.capacity.checked_sub(joined + (word & !CLOSED) / RESERVED)
    }

    #[inline]
    fn place(&self, position: u64) -> &Place<T> {
        &self.places[position as usize & (self.places.len() - 1)]
    }

    /// Puts the thing of who has just joined where the owner of the front looks for it: `true` if it has looked already.
    #[inline]
    fn put(&self, joined: u64, thing: T) -> bool {
        kill_point!("join: counted");
        let position = joined.wrapping_sub(1) & POSITION;
        let place = self.place(position);
        place.thing.with_mut(|there| {
            // SAFETY: `joined` is the result of a compare-exchange that counted the position up, so it is this thread's alone. The one
            // who had the place before it was gone by then (`free`: no more than `capacity` are in line, and there are as many places),
            // and had been taken out before that was said (`give_back`, read with Acquire).
            unsafe { *there = Some(thing) };
        });
        // SYNC POINT: thing put (Release). A swap, because it is most of a full fence as well, and because it says whether the front
        // was here before: of the two read-modify-writes on the stamp the later one sees the other.
        let before = place.stamp.swap(position + 1, Ordering::AcqRel);
        // SYNC POINT: joined, then looked whether closed, or who waits.
        fence_after_rmw();
        before & MISSED != 0
    }
}

/// The word after one more has joined.
#[inline]
fn next(word: u64) -> u64 {
    (word & !POSITION) | (word.wrapping_add(1) & POSITION)
}

/// Whether `count`, of things that have joined, has come to `target`; both may have gone round, and are no further apart than half of
/// that.
pub(crate) fn is_reached(count: u64, target: u64) -> bool {
    count.wrapping_sub(target) & POSITION <= POSITION / 2
}

/// The right to take things out of a line, of which there is one.
pub(crate) struct Front<T> {
    line: Arc<Line<T>>,
    /// The position of the next to be taken.
    next: u64,
}

impl<T> Front<T> {
    /// Takes the first, which keeps its place until that is given back. `None` also where it has joined but is not there yet: then
    /// the one that puts it there is told ([`Joined::missed`]), and has it taken with all behind it.
    #[inline]
    pub(crate) fn pop(&mut self) -> Option<T> {
        let position = self.next & POSITION;
        let place = self.line.place(position);
        // SYNC POINT: thing put (Acquire).
        let stamp = place.stamp.load(Ordering::Acquire);
        if stamp != position + 1 && (self.is_empty() || self.misses(place, stamp)) {
            return None;
        }
        self.next += 1;
        place.thing.with_mut(|there| {
            // SAFETY: the stamp says that what was put here for this position is complete; nobody puts another thing here until this
            // one's place is given back, which only `self` does; and there is one `Front`, borrowed mutably.
            unsafe { (*there).take() }
        })
    }

    /// Marks a place whose thing has joined and was not there when `stamp` was read; `false` if it is there by now.
    #[cold]
    fn misses(&self, place: &Place<T>, stamp: u64) -> bool {
        // A mark from an earlier look is still to be found by the one that puts the thing there.
        stamp & MISSED != 0
            // SYNC POINT: thing put (Acquire on failure). Only the one that puts the thing there changes the stamp meanwhile.
            || place.stamp.compare_exchange(stamp, stamp | MISSED, Ordering::AcqRel, Ordering::Acquire).is_ok()
    }

    /// Whether everything that has joined was taken.
    #[inline]
    pub(crate) fn is_empty(&self) -> bool {
        (self.line.joined() ^ self.next) & POSITION == 0
    }

    /// Gives back the places of `count` that were taken. A read-modify-write, so that the caller may look right after it who waits for some.
    pub(crate) fn give_back(&mut self, count: usize) {
        // SYNC POINT: place given back (Release).
        let before = self.line.given_back.fetch_add(count as u64, Ordering::AcqRel);
        debug_assert!(
            before + count as u64 <= self.next,
            "only places of things that were taken are given back"
        );
    }
}

impl<T> fmt::Debug for Line<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Line").finish_non_exhaustive()
    }
}

impl<T> fmt::Debug for Front<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Front").field("next", &self.next).finish_non_exhaustive()
    }
}
