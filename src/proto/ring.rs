//! The queue of a link: one producer, one consumer, and a producer that may take back what has not been read.
//!
//! Both cursors count ring positions and never wrap. The producer's own, `tail`, is known to nobody else: an entry says by
//! itself, by its *stamp*, which position was written there last, so that a consumer that waits looks at the very cache
//! line that will bring the message, and fetches no other one first. `head` moves by compare-and-swap, because both
//! sides may move it: the consumer to claim the oldest entries, the producer to take the oldest back. Whoever moves `head`
//! past a position owns the message there; there is no third case.
//!
//! A stamp has the low bits of a position only. It need do no more than tell a position from the one a lap before: a consumer
//! that is further behind, because entries were taken back, finds `head` moved, or fails to claim what it read.
//!
//! The consumer reads entries *before* it claims them, and keeps what it read: while `head` stands still, none from it on is
//! taken back, so that what was read is whole if they can be claimed. The other order would be wrong: once claimed, a slow consumer's
//! entry could be overwritten before it is read, because the producer can take back everything after it and come round
//! to the same place. What the consumer reads and fails to claim may be torn, and is thrown away.
//!
//! The ring is never overfull, because each entry in it has a ticket and there are no more tickets than entries: see
//! [`Tickets`](super::ticket::Tickets). It does not know what a descriptor's segment is, nor whether its bytes exist.
//!
//! # Orderings
//! - *descriptor published*: the producer stores the words of an entry, the one with the stamp last (Release); the consumer
//!   loads that one (Acquire), then the others.
//! - *entry claimed*: the consumer loads an entry, then moves `head` (Release). The producer acquires that before it
//!   writes to the entry's place again: either by taking back a later entry (Acquire), or by collecting a ticket
//!   released later, whose release bitmap has a sync point of its own.
//! - *entry taken back*: the producer moves `head` before it stores a later stamp in that place (Release): a consumer that
//!   finds the later stamp (Acquire) and then loads `head` finds it moved.
//! - *messages offered*: the producer queues, then stores `offered` (Release); a consumer that loads `offered` (Acquire)
//!   and then finds the ring empty knows that what it misses below `offered` was dropped.

use std::ops::Range;

use super::Misbehaved;
use super::layout::{Entry, Page};
use crate::sync::atomic::Ordering;

#[cfg(all(test, tokio_shm_loom))]
mod loom_tests;
#[cfg(all(test, not(tokio_shm_loom)))]
mod tests;

/// How often [`Consumer::pop`] lets the producer take an entry from under its hands before it gives up for now.
const LOST_RACES_MAX: u32 = 64;

/// How many messages a consumer claims at a time, at most: four cache lines of entries.
pub(crate) const CLAIM_MAX: usize = 8;
const ENTRIES_A_LINE: usize = 64 / super::layout::ENTRY_LEN;

const TICKET_BITS: u32 = 16;
const LEN_BITS: u32 = 41;
const _: () = assert!((super::class::LARGEST as u64) < 1 << LEN_BITS);
/// A stamp tells a lap from the one before: it has more bits than a position within the longest ring.
const _: () = assert!((super::layout::DEPTH_MAX as u64) < 1 << (u64::BITS - LEN_BITS));

/// The stamp of an entry at `position`, where it stands in the last word. That of no position in the first lap is 0, which a new
/// page is full of.
#[inline]
const fn stamp_of(position: u64) -> u64 {
    position.wrapping_add(1) << LEN_BITS
}

/// The last word of the entry for `position`, if that is what was written there last.
#[inline]
fn published(page: Page<'_>, position: u64) -> Option<u64> {
    // SYNC POINT: descriptor published
    let last = entry_at(page, position).0[3].load(Ordering::Acquire);
    ((last ^ stamp_of(position)) >> LEN_BITS == 0).then_some(last)
}

/// What names a message on a link.
///
/// Four words: `seq`; `segment`; `offset / 64` above 16 bits of `ticket`; the stamp above 41 bits of `len`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Descriptor {
    /// The publisher's number of the message.
    pub(crate) seq: u64,
    /// Which segment the payload lies in.
    pub(crate) segment: u64,
    /// Where in the segment it starts: a multiple of 64, below 2^54.
    pub(crate) offset: u64,
    /// Bytes of payload: no more than [`LARGEST`](super::class::LARGEST).
    pub(crate) len: u64,
    /// With what the message is given back.
    pub(crate) ticket: u32,
}

impl Descriptor {
    #[inline]
    fn publish(self, entry: &Entry, position: u64) {
        debug_assert!(self.offset.is_multiple_of(64) && self.offset < 1 << 54);
        debug_assert!(self.ticket < 1 << TICKET_BITS && self.len < 1 << LEN_BITS);
        let [seq, segment, place, last] = &entry.0;
        seq.store(self.seq, Ordering::Relaxed);
        segment.store(self.segment, Ordering::Relaxed);
        place.store(((self.offset / 64) << TICKET_BITS) | u64::from(self.ticket), Ordering::Relaxed);
        kill_point!("push: entry written");
        // SYNC POINT: descriptor published
        //
        // Tried: with `Relaxed` here, loom has the consumer read the zeros, or the message, that was there before
        // (`loom_message_…`).
        last.store(stamp_of(position) | self.len, Ordering::Release);
    }

    /// What stands in an entry, whose `last` word was loaded with Acquire.
    #[inline]
    fn load(entry: &Entry, last: u64) -> Self {
        let [seq, segment, place, _] = &entry.0;
        let place = place.load(Ordering::Relaxed);
        Self {
            seq: seq.load(Ordering::Relaxed),
            segment: segment.load(Ordering::Relaxed),
            offset: (place >> TICKET_BITS) * 64,
            len: last & ((1 << LEN_BITS) - 1),
            ticket: (place & ((1 << TICKET_BITS) - 1)) as u32,
        }
    }
}

/// The publisher's end of one link's ring.
#[derive(Debug)]
pub(crate) struct Producer {
    /// The position of the next entry.
    tail: u64,
    /// The furthest that `head` was ever seen.
    head_seen: u64,
}

impl Producer {
    /// For a page that was just prepared.
    pub(crate) const fn new() -> Self {
        Self { tail: 0, head_seen: 0 }
    }

    /// The position that the next [`push`](Self::push) uses.
    #[inline]
    pub(crate) fn position(&self) -> u64 {
        self.tail
    }

    /// Queues a message whose ticket was free until now. The subscriber is then to be rung for.
    #[inline]
    pub(crate) fn push(&mut self, page: Page<'_>, descriptor: Descriptor) {
        descriptor.publish(entry_at(page, self.tail), self.tail);
        self.tail += 1;
        kill_point!("push: published");
    }

    /// Has the entries that are so many positions `ahead` of the next one to be used fetched, to be written, by writing to them. There must
    /// be at least as many free tickets as the end of `ahead` says.
    ///
    /// Then this may write there: of the positions from an entry's last one on there are more than tickets out, so that some later
    /// ticket, or its own, has come back: see *entry claimed*. An entry whose stamp is of another lap means nothing, whatever its `seq`.
    #[inline]
    pub(crate) fn fetch(&self, page: Page<'_>, ahead: Range<u32>) {
        for position in ahead {
            let [seq, ..] = &entry_at(page, self.tail + u64::from(position)).0;
            seq.store(0, Ordering::Relaxed);
        }
    }

    /// Takes back the oldest message that the subscriber has not received, and returns its ring position.
    ///
    /// `None`: the subscriber has received everything.
    pub(crate) fn take_back(&mut self, page: Page<'_>) -> Result<Option<u64>, Misbehaved> {
        let mut head = page.control.head.load(Ordering::Relaxed);
        // Each turn but the last finds `head` further on, and never past `tail`: no more turns than entries queued.
        loop {
            self.see_head(page, head)?;
            if head == self.tail {
                return Ok(None);
            }
            // SYNC POINT: entry claimed (Acquire), entry taken back (Release)
            match page.control.head.compare_exchange(head, head + 1, Ordering::AcqRel, Ordering::Relaxed) {
                Ok(_) => {
                    self.head_seen = head + 1;
                    return Ok(Some(head));
                }
                Err(now) => head = now,
            }
        }
    }

    /// How many messages are queued that the subscriber has not received.
    #[cfg(any(test, fuzzing))]
    pub(crate) fn queued(&mut self, page: Page<'_>) -> Result<u64, Misbehaved> {
        self.see_head(page, page.control.head.load(Ordering::Relaxed))?;
        Ok(self.tail - self.head_seen)
    }

    /// Tells the subscriber that all messages numbered below `seq` were queued on this link, or dropped.
    pub(crate) fn offer(&self, page: Page<'_>, seq: u64) {
        // SYNC POINT: messages offered
        page.control.offered.store(seq, Ordering::Release);
    }

    /// Checks a `head` that the subscriber may have made up.
    ///
    /// Relaxed loads suffice for the last check too: a message's ticket is collected, with Acquire, before it is used
    /// for another one, and `head` had passed the message when the subscriber released it.
    fn see_head(&mut self, page: Page<'_>, head: u64) -> Result<(), Misbehaved> {
        if head < self.head_seen {
            return Err(Misbehaved::HeadWentBack { seen: self.head_seen, now: head });
        }
        if head > self.tail {
            return Err(Misbehaved::HeadPastTail { head, tail: self.tail });
        }
        let (queued, capacity) = (self.tail - head, page.entries.len() as u64);
        if queued > capacity {
            return Err(Misbehaved::ReleasedUnread { queued, capacity });
        }
        self.head_seen = head;
        Ok(())
    }
}

/// What [`Consumer::pop`] found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use = "a popped message keeps its ticket until it is released"]
pub(crate) enum Popped {
    /// The oldest message; its ticket is in range and now held.
    Message(Descriptor),
    /// Nothing is queued.
    Empty,
    /// The publisher took back each message that was about to be popped, too often in a row: there may be more. Look
    /// again, but let others run first, and do not sleep on it.
    Contended,
}

/// The subscriber's end of one link's ring.
#[derive(Debug)]
pub(crate) struct Consumer {
    /// The position to be claimed next, unless the publisher has taken it back.
    head: u64,
    /// The furthest that `offered` was ever seen.
    offered_seen: u64,
    /// Claimed with the one before, and not popped yet: from `next` up to `claimed`.
    ahead: [Descriptor; CLAIM_MAX - 1],
    next: usize,
    claimed: usize,
    /// How many to claim at a time.
    most: usize,
    /// The last claim found all that it looked for: it is worthwhile to look at lines of which nothing is known yet.
    backlog: bool,
}

impl Consumer {
    /// For a page whose publisher just prepared it. Claims up to `most` messages at a time, [`CLAIM_MAX`] at most; from a publisher that
    /// takes back what was not received it should be one, because what is claimed cannot be taken back.
    pub(crate) fn new(most: usize) -> Self {
        const NONE: Descriptor = Descriptor { seq: 0, segment: 0, offset: 0, len: 0, ticket: 0 };
        let most = most.clamp(1, CLAIM_MAX);
        Self {
            head: 0,
            offered_seen: 0,
            ahead: [NONE; CLAIM_MAX - 1],
            next: 0,
            claimed: 0,
            most,
            backlog: false,
        }
    }

    /// Takes the oldest message from the ring.
    pub(crate) fn pop(&mut self, page: Page<'_>) -> Result<Popped, Misbehaved> {
        self.pop_with(page, |_| ())
    }

    /// As [`pop`](Self::pop); `soon` is told of each message that this or a later call may return, when it is first seen. It is not
    /// claimed then, and what is said of it not checked: good for a hint and no more.
    #[inline]
    pub(crate) fn pop_with(
        &mut self,
        page: Page<'_>,
        soon: impl Fn(&Descriptor),
    ) -> Result<Popped, Misbehaved> {
        if let Some(descriptor) = self.ahead[..self.claimed].get(self.next) {
            self.next += 1;
            return Self::check(page, *descriptor);
        }
        self.claim(page, soon)
    }

    /// Takes what was claimed and not popped, and claims nothing more.
    pub(crate) fn take_claimed(&mut self) -> impl Iterator<Item = Descriptor> {
        let claimed = self.next..self.claimed;
        self.next = self.claimed;
        self.ahead[claimed].iter().copied()
    }

    /// Takes some messages from the ring, and returns the oldest.
    #[inline]
    fn claim(&mut self, page: Page<'_>, soon: impl Fn(&Descriptor)) -> Result<Popped, Misbehaved> {
        for _ in 0..LOST_RACES_MAX {
            let Some(last) = published(page, self.head) else {
                // SYNC POINT: entry taken back
                let now = page.control.head.load(Ordering::Acquire);
                if now == self.head {
                    return Ok(Popped::Empty);
                }
                self.see_head(now)?;
                continue;
            };
            let first = Descriptor::load(entry_at(page, self.head), last);
            soon(&first);
            let more = self.look_ahead(page, &soon);
            kill_point!("pop: entry read");
            // SYNC POINT: entry claimed (Release), entry taken back (Acquire)
            let next = self.head.wrapping_add(1 + more as u64);
            match page.control.head.compare_exchange(self.head, next, Ordering::Release, Ordering::Acquire) {
                Ok(_) => {
                    kill_point!("pop: entry claimed");
                    self.head = next;
                    (self.next, self.claimed) = (0, more);
                    return Self::check(page, first);
                }
                Err(now) => self.see_head(now)?,
            }
        }
        Ok(Popped::Contended)
    }

    /// Reads what is published after the message at `head`: how many there are.
    ///
    /// Those in the same cache line cost nothing to look at. Of the lines after it the publisher may be about to write one, and would
    /// have to fetch it back: they are looked at only while there is a backlog.
    #[inline]
    fn look_ahead(&mut self, page: Page<'_>, soon: impl Fn(&Descriptor)) -> usize {
        let line = ENTRIES_A_LINE - self.head as usize % ENTRIES_A_LINE;
        let most = if self.backlog { self.most } else { self.most.min(line) } - 1;
        let mut more = 0;
        while more < most {
            let position = self.head.wrapping_add(1 + more as u64);
            let Some(last) = published(page, position) else { break };
            self.ahead[more] = Descriptor::load(entry_at(page, position), last);
            soon(&self.ahead[more]);
            more += 1;
        }
        if most > 0 {
            self.backlog = more == most;
        }
        more
    }

    /// A cheap look that takes nothing: whether [`pop`](Self::pop) would say [`Popped::Empty`].
    ///
    /// May say no when the publisher has just taken back everything, or misbehaves; `pop` then finds out. To be used
    /// for the last look after arming the doorbell.
    #[inline]
    pub(crate) fn is_empty(&self, page: Page<'_>) -> bool {
        // SYNC POINT: entry taken back
        self.next == self.claimed
            && published(page, self.head).is_none()
            && page.control.head.load(Ordering::Relaxed) == self.head
    }

    /// The number below which the publisher has queued or dropped all messages.
    ///
    /// Once a [`pop`](Self::pop) *after* this says [`Popped::Empty`], what was not received below it was dropped.
    #[inline]
    pub(crate) fn offered(&mut self, page: Page<'_>) -> Result<u64, Misbehaved> {
        // SYNC POINT: messages offered
        let now = page.control.offered.load(Ordering::Acquire);
        if now < self.offered_seen {
            return Err(Misbehaved::OfferedWentBack { seen: self.offered_seen, now });
        }
        self.offered_seen = now;
        Ok(now)
    }

    /// Follows a `head` that the publisher has moved, or made up.
    fn see_head(&mut self, now: u64) -> Result<(), Misbehaved> {
        if now < self.head {
            return Err(Misbehaved::HeadWentBack { seen: self.head, now });
        }
        self.head = now;
        Ok(())
    }

    #[inline]
    fn check(page: Page<'_>, descriptor: Descriptor) -> Result<Popped, Misbehaved> {
        let (ticket, depth) = (descriptor.ticket, page.geometry().depth());
        if ticket < depth {
            Ok(Popped::Message(descriptor))
        } else {
            Err(Misbehaved::TicketOutOfRange { ticket, depth })
        }
    }
}

/// The ring's length is a power of two, and known to this process alone.
#[inline]
fn entry_at<'a>(page: Page<'a>, position: u64) -> &'a Entry {
    &page.entries[position as usize & (page.entries.len() - 1)]
}
