//! The publisher's half of a link: tickets, announced segments, what to do when the subscriber is full.

use std::collections::{HashMap, HashSet, VecDeque};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Weak};

use rustix::process::Pid;

use super::recent::Recent;
use super::{Flight, InFlight, Kind, LinkPage, SEGMENTS_MAX};
use crate::OnFull;
use crate::budget::Holder;
use crate::pool::PooledSegment;
use crate::proto::Misbehaved;
use crate::proto::bell::{Wake, arm, must_ring_after_fence};
use crate::proto::class::GRAIN;
use crate::proto::layout::Geometry;
use crate::proto::release::Collector;
use crate::proto::ring::{Descriptor, Producer};
use crate::proto::ticket::Tickets;
use crate::proto::wire::{self, BackingWire, Frame, RefusedReason, Welcome};
use crate::segment::Segment;
use crate::sync::atomic::{AtomicU64, Ordering};
use crate::sys::bell::Bell;
use crate::sys::memory::{Backing, MemoryError};
use crate::sys::socket::Connection;

/// Tickets at most that a sender looks for before it goes on: each time that it has none a cache line goes to and fro.
const MUCH_ROOM: u32 = 32;

/// Room in the socket that is left for a link's last frames, `Bye` or `Refused`, in the kernel's bytes: each takes less than a thousand.
const RESERVE: usize = 4 << 10;

/// How much a subscriber's socket has of frames that were not read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Filling {
    Little,
    /// More than half of what it takes.
    Much,
    /// There is room for the last frames only.
    All,
}

/// Why a link could not be set up or go on.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LinkError {
    #[error("it {0}")]
    Fault(#[source] Kind),
    #[error("cannot make the link's page: {0}")]
    Page(#[source] MemoryError),
    #[error("cannot talk to it: {0}")]
    Io(#[source] std::io::Error),
    #[error("its process has ended")]
    Ended,
    #[error("there are as many subscribers as max_subscribers allows")]
    Full,
    #[error("it keeps too many samples from before it was disconnected")]
    Keeping,
}

impl From<std::io::Error> for LinkError {
    fn from(error: std::io::Error) -> Self {
        Self::Io(error)
    }
}

impl<K: Into<Kind>> From<K> for LinkError {
    fn from(kind: K) -> Self {
        Self::Fault(kind.into())
    }
}

/// A subscriber whose link is over, and that may still read what it has. It keeps its seat, so that they are no more than
/// `max_subscribers` together with those that have a link.
#[derive(Debug)]
struct Parted {
    connection: Arc<Connection>,
    subscriber: u128,
    _seat: Seat,
}

impl Holder for Parted {
    fn is_gone(&self) -> bool {
        self.connection.is_closed_by_peer()
    }

    fn is_subscriber(&self, id: u128) -> bool {
        self.subscriber == id
    }
}

/// A message with its number, on its way to the links.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Message {
    pub(crate) flight: Flight,
    pub(crate) seq: u64,
}

/// What became of a message offered to a link.
#[must_use]
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Offer {
    /// It is on the link, or counted as dropped.
    Done,
    /// The subscriber has no room and wants the sender to wait.
    Blocked,
    /// The link is over: `LinkTx::fault` says why.
    Broken,
}

/// What one subscriber has of a publisher's messages.
pub(crate) struct Holding {
    pub(crate) peer: Arc<Connection>,
    /// Queued or held.
    pub(crate) messages: u32,
    pub(crate) bytes: u64,
    pub(crate) depth: u32,
}

/// Counts a publisher's links, by being held by each.
pub(crate) type Seat = Arc<()>;

/// A link that is ready to be welcomed into a publisher's deliveries.
pub(crate) struct LinkSeed {
    pub(crate) link: LinkTx,
    /// When the subscriber connected, by its own word.
    pub(crate) connected_at: u64,
    page_fd: OwnedFd,
    credit: Arc<Bell>,
}

pub(crate) struct LinkTx {
    pub(crate) id: u64,
    /// The subscriber's id, by its own word; set before the link is welcomed.
    pub(crate) subscriber: u128,
    connection: Arc<Connection>,
    page: LinkPage,
    depth: u32,
    producer: Producer,
    collector: Collector,
    tickets: Tickets<Flight>,
    /// On their way to the pool. Never more than a word of the bitmap has.
    returned: Vec<PooledSegment>,
    /// What the messages take that have a ticket, in units of `GRAIN`.
    held: u64,
    /// Rung when there is something for the subscriber.
    bell: Bell,
    on_full: OnFull,
    /// Segments that the subscriber was told of.
    announced: HashMap<u64, Weak<Segment>>,
    /// Of those the ones used lately: most messages need no look into the map.
    recent: Recent<()>,
    /// The last announcement met with too many descriptors under way in all sockets of this user: nobody rings when there
    /// are fewer.
    pub(crate) crowded: bool,
    /// So many free tickets are not given out without one coming back: none, or all of them, while the socket of a subscriber that is to
    /// lose the oldest has [`Filling::Much`] in it.
    withheld: u32,
    /// The lowest message number not yet offered.
    next_seq: u64,
    /// The subscriber takes nothing more, but may still hold some.
    leaving: bool,
    /// Since when it has been keeping senders waiting, in clock nanoseconds.
    pub(crate) blocked_since: Option<u64>,
    /// When a warning was given that it does, in clock nanoseconds.
    pub(crate) warned_at: Option<u64>,
    /// The subscriber was told that senders wait for bytes that it has.
    at_share: bool,
    /// Messages that did not reach a subscriber, of all links of the publisher.
    dropped: Arc<AtomicU64>,
    /// One of those that the publisher has to give; free again with the link.
    _seat: Seat,
    /// Why the link has to end. Set once; whoever sees it removes the link.
    pub(crate) fault: Option<LinkError>,
}

impl LinkTx {
    /// Makes the page and the doorbells for a subscriber; the bell returned is the one that it will ring.
    pub(crate) fn prepare(
        id: u64,
        connection: Arc<Connection>,
        geometry: Geometry,
        on_full: OnFull,
        connected_at: u64,
        dropped: Arc<AtomicU64>,
        seat: Seat,
    ) -> Result<(LinkSeed, Arc<Bell>), LinkError> {
        let (page_fd, page) = LinkPage::create(geometry).map_err(LinkError::Page)?;
        let (bell, credit) = (Bell::new()?, Arc::new(Bell::new()?));
        let depth = geometry.depth();
        let link = Self {
            id,
            subscriber: 0,
            connection,
            page,
            depth,
            producer: Producer::new(),
            collector: Collector::new(),
            tickets: Tickets::new(depth),
            returned: Vec::with_capacity(u64::BITS as usize),
            held: 0,
            bell,
            on_full,
            announced: HashMap::new(),
            recent: Recent::new(),
            crowded: false,
            withheld: 0,
            next_seq: 0,
            leaving: false,
            blocked_since: None,
            warned_at: None,
            at_share: false,
            dropped,
            _seat: seat,
            fault: None,
        };
        Ok((LinkSeed { link, connected_at, page_fd, credit: Arc::clone(&credit) }, credit))
    }

    pub(crate) fn is_leaving(&self) -> bool {
        self.leaving
    }

    /// Whether the subscriber has something queued or held, as far as was collected.
    pub(crate) fn has_tickets_out(&self) -> bool {
        self.tickets.outstanding() > 0
    }

    /// Whether there is a ticket left, as far as was collected.
    pub(crate) fn has_room(&self) -> bool {
        self.tickets.free() > 0
    }

    /// Whether the message would fit into the link's share of the pool, as far as was collected.
    pub(crate) fn fits(&self, flight: Flight, in_flight: &InFlight) -> bool {
        self.leaving || in_flight.admits(flight, self.held)
    }

    /// Whether only its share of the pool keeps the message from it.
    pub(crate) fn is_short(&self, message: Message, in_flight: &InFlight) -> bool {
        self.is_behind(message.seq) && self.has_room() && !self.fits(message.flight, in_flight)
    }

    /// What the messages take that are queued or held, in bytes, as far as was collected.
    pub(crate) fn held_bytes(&self) -> u64 {
        self.held * GRAIN as u64
    }

    /// Whether there is room for so many that it is worthwhile to go on where none was left.
    pub(crate) fn has_much_room(&self) -> bool {
        self.tickets.free() >= (self.depth / 4).clamp(1, MUCH_ROOM)
    }

    /// Tells the subscriber whether senders wait for it because it has its share of the pool in bytes.
    pub(crate) fn tell_at_share(&mut self, at_share: bool) {
        if self.at_share != at_share {
            self.at_share = at_share;
            // Relaxed: a hint that is believed only once it has stood for a second.
            self.page.view().control.at_share.store(at_share.into(), Ordering::Relaxed);
        }
    }

    /// What the subscriber has, as far as was collected.
    pub(crate) fn holding(&self) -> Holding {
        let (peer, messages) = (Arc::clone(&self.connection), self.tickets.outstanding());
        Holding { peer, messages, bytes: self.held_bytes(), depth: self.depth }
    }

    /// Whether it has not been offered message `seq` yet.
    pub(crate) fn is_behind(&self, seq: u64) -> bool {
        self.next_seq <= seq
    }

    /// Offers one message; what the subscriber released is collected only when there is no ticket left.
    #[inline]
    pub(crate) fn offer(&mut self, message: Message, in_flight: &mut InFlight) -> Offer {
        match self.try_offer(message, in_flight) {
            Ok(offer) => offer,
            Err(fault) => {
                self.fault = Some(fault);
                Offer::Broken
            }
        }
    }

    #[inline]
    fn try_offer(&mut self, message: Message, in_flight: &mut InFlight) -> Result<Offer, LinkError> {
        if message.seq < self.next_seq {
            return Ok(Offer::Done);
        }
        if self.leaving {
            self.next_seq = message.seq + 1;
            return Ok(Offer::Done);
        }
        if self.tickets.free() <= self.withheld && !self.make_room(in_flight)? {
            return self.refuse(message);
        }
        if in_flight.is_scarce() && !self.make_bytes(message, in_flight)? {
            return self.refuse(message);
        }
        let slot = in_flight.slot(message.flight);
        let segment = slot.segment();
        if self.recent.get(segment.id()).is_none() && !self.announce(segment, in_flight)? {
            return self.refuse(message);
        }
        let Ok(ticket) = self.tickets.issue(self.producer.position(), message.flight) else {
            return self.refuse(message);
        };
        kill_point!("offer: ticket issued");
        let descriptor = Descriptor {
            seq: message.seq,
            segment: segment.id(),
            offset: slot.offset() as u64,
            len: slot.len() as u64,
            ticket,
        };
        in_flight.share(message.flight);
        self.held += in_flight.charge(message.flight);
        self.producer.push(self.page.view(), descriptor);
        self.next_seq = message.seq + 1;
        self.blocked_since = None;
        Ok(Offer::Done)
    }

    /// Whether the subscriber has to be woken for what was pushed; the caller has made a full fence since.
    #[inline]
    pub(crate) fn ring_if_armed(&self) {
        if must_ring_after_fence(&self.page.view().control.data_armed) == Wake::Ring {
            kill_point!("data bell: disarmed");
            self.bell.ring();
        }
    }

    /// Returns to the pool what the subscriber has released, and says how many slots came free by it: not those that
    /// others have as well.
    pub(crate) fn reclaim(&mut self, in_flight: &mut InFlight) -> usize {
        let mut freed = 0;
        let reclaimed = self.try_reclaim(in_flight, &mut freed);
        self.note(reclaimed);
        freed
    }

    /// Takes back the oldest message that was not received yet, if the subscriber agreed to lose such. `None`: there is
    /// none; else whether its slot came free.
    pub(crate) fn take_back_oldest(&mut self, in_flight: &mut InFlight) -> Option<bool> {
        match self.try_take_back(in_flight) {
            Ok(taken) => taken,
            Err(fault) => {
                self.note(Err(fault));
                None
            }
        }
    }

    /// The subscriber has dropped its handle: nothing more goes to it, what it holds stays its own until released.
    pub(crate) fn leave(&mut self, in_flight: &mut InFlight) {
        self.leaving = true;
        // It keeps no sender waiting any more.
        self.blocked_since = None;
        kill_point!("leave: heard");
        let left = loop {
            match self.try_take_back(in_flight) {
                Ok(Some(_)) => {}
                Ok(None) => break self.try_reclaim(in_flight, &mut 0),
                Err(fault) => break Err(fault),
            }
        };
        self.note(left);
    }

    /// The subscriber's process, where it has a number here.
    pub(crate) fn process(&self) -> Option<Pid> {
        self.connection.peer_credentials().ok()?.pid
    }

    /// Tells the subscriber which of its segments are gone, as far as its socket takes it.
    pub(crate) fn retire_segments(&mut self) {
        let retired = self.try_retire();
        self.note(retired);
    }

    fn note(&mut self, result: Result<(), LinkError>) {
        if let Err(fault) = result {
            self.fault.get_or_insert(fault);
        }
    }

    /// Adds to `freed` the slots that came free.
    fn try_reclaim(&mut self, in_flight: &mut InFlight, freed: &mut usize) -> Result<(), LinkError> {
        if self.tickets.outstanding() == 0 {
            return Ok(());
        }
        let Self { page, tickets, collector, producer, returned, held, .. } = self;
        let free = tickets.free();
        let collected = collector.collect(page.view(), usize::MAX, |mut released| {
            let all = released.try_for_each(|ticket| {
                let flight = tickets.reclaim(ticket).ok_or(Misbehaved::TicketNotHeld { ticket })?;
                kill_point!("reclaim: one ticket");
                *held -= in_flight.charge(flight);
                in_flight.reclaim(flight, returned);
                Ok(())
            });
            *freed += in_flight.give_back(returned);
            all
        });
        producer.fetch(page.view(), free..tickets.free());
        collected?;
        Ok(())
    }

    /// Asks the subscriber to ring at its next release. The caller must reclaim once more afterwards.
    pub(crate) fn arm_credit(&self) {
        arm(&self.page.view().control.credit_armed);
    }

    fn try_take_back(&mut self, in_flight: &mut InFlight) -> Result<Option<bool>, LinkError> {
        if self.on_full != OnFull::DropOldest && !self.leaving {
            return Ok(None);
        }
        // First: it may be the last on the link, and no other may ever come that would tell of it.
        self.producer.offer(self.page.view(), self.next_seq);
        let Some(position) = self.producer.take_back(self.page.view())? else {
            return Ok(None);
        };
        kill_point!("take back: head moved");
        let ticket = self.tickets.at_position(position).ok_or(Misbehaved::PositionReleased { position })?;
        let Some(flight) = self.tickets.reclaim(ticket) else { return Ok(Some(false)) };
        self.held -= in_flight.charge(flight);
        self.dropped.fetch_add(1, Ordering::Relaxed);
        kill_point!("take back: ticket reclaimed");
        Ok(Some(in_flight.release(flight)))
    }

    fn try_retire(&mut self) -> Result<(), LinkError> {
        let gone: Vec<u64> = self
            .announced
            .iter()
            .filter(|(_, segment)| segment.strong_count() == 0)
            .map(|(id, _)| *id)
            .collect();
        for id in gone {
            if !self.send_waiting(&Frame::Retire { id }, &[])? {
                // It does not read; it will be told when the next segment goes.
                return Ok(());
            }
            self.announced.remove(&id);
            kill_point!("retire: sent");
            // The subscriber may be asleep, and holds the memory for as long as it is.
            self.bell.ring();
        }
        Ok(())
    }

    /// Ends the link after everything was delivered: the subscriber is told the final count.
    pub(crate) fn bye(&mut self, next_seq: u64) {
        self.producer.offer(self.page.view(), next_seq);
        kill_point!("bye: offered");
        // There is room: see `RESERVE`.
        let _ = send(&self.connection, &Frame::Bye, &[]);
        kill_point!("bye: sent");
        self.bell.ring();
    }

    /// Ends the link because the subscriber was stuck for too long. It may keep what it holds, and no more.
    pub(crate) fn evict(mut self, in_flight: &mut InFlight) {
        // First: what is taken back is counted, and told before the end.
        self.leave(in_flight);
        let _ = send(&self.connection, &Frame::Refused(RefusedReason::Stuck), &[]);
        self.bell.ring();
        if self.fault.is_some() { self.end(in_flight) } else { self.part(in_flight) }
    }

    /// Ends the link of a subscriber that lives on, and may read what it has for as long as it likes: only what it has
    /// released goes back.
    pub(crate) fn part(mut self, in_flight: &mut InFlight) {
        if self.try_reclaim(in_flight, &mut 0).is_err() || self.tickets.outstanding() == 0 {
            return self.end(in_flight);
        }
        // Half open, so that its end can be told: its socket closes with its last sample.
        self.connection.finish();
        let (connection, subscriber, _seat) = (self.connection, self.subscriber, self._seat);
        let holder: Arc<dyn Holder> = Arc::new(Parted { connection, subscriber, _seat });
        for flight in self.tickets.drain() {
            in_flight.abandon(flight, &holder);
        }
    }

    /// Hands back every slot that the subscriber had: it is gone, or has broken the protocol. The link is over.
    pub(crate) fn end(mut self, in_flight: &mut InFlight) {
        for flight in self.tickets.drain() {
            in_flight.release(flight);
        }
        self.connection.shutdown();
    }

    fn make_room(&mut self, in_flight: &mut InFlight) -> Result<bool, LinkError> {
        self.try_reclaim(in_flight, &mut 0)?;
        if self.withheld > 0 && self.filling() == Filling::Little {
            self.withheld = 0;
        }
        if self.tickets.free() > self.withheld {
            return Ok(true);
        }
        // With nothing to take back what was withheld is there.
        Ok(self.try_take_back(in_flight)?.is_some() || self.tickets.free() > 0)
    }

    /// How full of frames that the subscriber has not read its socket is.
    fn filling(&self) -> Filling {
        let Some((queued, size)) = self.connection.unreceived() else { return Filling::Little };
        if queued + RESERVE.min(size / 4) > size {
            Filling::All
        } else if queued > size / 2 {
            Filling::Much
        } else {
            Filling::Little
        }
    }

    /// Sends a frame that can wait: `false` if there is no room for it and for the last frame of a link as well.
    fn send_waiting(&self, frame: &Frame, fds: &[BorrowedFd<'_>]) -> std::io::Result<bool> {
        Ok(self.filling() != Filling::All && send(&self.connection, frame, fds)?)
    }

    /// Makes room for the message in the link's share of the pool: `false` if there is none.
    #[cold]
    fn make_bytes(&mut self, message: Message, in_flight: &mut InFlight) -> Result<bool, LinkError> {
        if self.fits(message.flight, in_flight) {
            return Ok(true);
        }
        self.try_reclaim(in_flight, &mut 0)?;
        while !self.fits(message.flight, in_flight) {
            if self.try_take_back(in_flight)?.is_none() {
                return Ok(false);
            }
        }
        Ok(true)
    }

    #[cold]
    fn refuse(&mut self, message: Message) -> Result<Offer, LinkError> {
        if self.on_full == OnFull::Wait {
            return Ok(Offer::Blocked);
        }
        self.dropped.fetch_add(1, Ordering::Relaxed);
        self.next_seq = message.seq + 1;
        kill_point!("drop: counted");
        self.producer.offer(self.page.view(), self.next_seq);
        Ok(Offer::Done)
    }

    /// Sends a segment's descriptor before the first message that lies in it; `false` if the socket is full, or the
    /// system has too many descriptors under way.
    #[cold]
    fn announce(&mut self, segment: &Arc<Segment>, in_flight: &InFlight) -> Result<bool, LinkError> {
        if !self.announced.contains_key(&segment.id()) {
            self.try_retire()?;
            if self.announced.len() >= SEGMENTS_MAX && !self.forget_unused(in_flight)? {
                return Ok(false);
            }
            let backing = match segment.backing() {
                Backing::PosixShm => BackingWire::Posix,
                Backing::Memfd => BackingWire::Memfd,
            };
            let frame = Frame::Segment(wire::Segment { id: segment.id(), len: segment.len(), backing });
            kill_point!("announce: due");
            let sent = self.send_waiting(&frame, &[segment.as_fd()]);
            self.crowded = sent.as_ref().is_err_and(is_crowded);
            if self.crowded || !sent? {
                return Ok(false);
            }
            kill_point!("announce: sent");
            self.announced.insert(segment.id(), Arc::downgrade(segment));
            if self.on_full == OnFull::DropOldest && self.filling() != Filling::Little {
                // Before there is no room for any: the oldest message makes room for each further one from now on, so that those are put
                // where announced ones were. A message in what cannot be announced would have to be dropped, the newest of all.
                self.withheld = u32::MAX;
            }
        }
        self.recent.put(segment.id(), ());
        Ok(true)
    }
}

impl LinkTx {
    /// Retires segments that the subscriber has nothing of, to be announced again when they are used again; `false` if
    /// it has some of all.
    fn forget_unused(&mut self, in_flight: &InFlight) -> Result<bool, LinkError> {
        let used: HashSet<u64> =
            self.tickets.values().map(|flight| in_flight.slot(*flight).segment().id()).collect();
        let unused: Vec<u64> = self.announced.keys().filter(|id| !used.contains(id)).copied().collect();
        for id in unused {
            if !self.send_waiting(&Frame::Retire { id }, &[])? {
                break;
            }
            self.announced.remove(&id);
        }
        self.recent = Recent::new();
        self.bell.ring();
        Ok(self.announced.len() < SEGMENTS_MAX)
    }
}

/// Whether descriptors cannot be sent because of those that wait in sockets, whoever sent them.
fn is_crowded(error: &std::io::Error) -> bool {
    error.raw_os_error() == Some(rustix::io::Errno::TOOMANYREFS.raw_os_error())
}

impl LinkSeed {
    /// What its subscriber has of it: the page, and where it hears its bell.
    #[cfg(tokio_shm_shuttle)]
    pub(crate) fn other_end(&self) -> (LinkPage, Arc<crate::sync::Notify>) {
        let geometry = Geometry::new(self.link.depth).expect("the link's own");
        let page = LinkPage::open(self.page_fd.as_fd(), geometry).expect("it was made just now");
        (page, Arc::clone(&self.link.bell.model))
    }

    /// Welcomes the subscriber. From `expect` on it gets every message or is told how many it did not get; the ones in
    /// `history`, all below `next_seq`, go to it first.
    pub(crate) fn welcome(
        self,
        publisher: u128,
        expect: u64,
        next_seq: u64,
        history: &VecDeque<Message>,
        in_flight: &mut InFlight,
    ) -> Result<LinkTx, LinkError> {
        let mut link = self.link;
        // A message from before the connection that has yet to come out of the line is one of the history.
        let room = link.depth - u32::from(next_seq < expect);
        let skip = history.len() - fitting(history, room, in_flight);
        let skip = skip.max(unbroken_from(history, expect, next_seq));
        let first = history.get(skip).map_or(next_seq, |message| message.seq);
        let frame = Frame::Welcome(Welcome {
            publisher,
            depth: link.depth,
            on_full: link.on_full.into(),
            expect_seq: expect.min(first),
            next_seq: first,
        });
        let fds = [self.page_fd.as_fd(), link.bell.as_fd(), self.credit.as_fd()];
        let welcomed = match send(&link.connection, &frame, &fds) {
            Ok(false) => Err(std::io::ErrorKind::WouldBlock.into()),
            sent => sent,
        };
        if let Err(error) = welcomed {
            // It must not wait for a welcome that never comes.
            let _ = send(&link.connection, &Frame::Refused(RefusedReason::OutOfResources), &[]);
            link.connection.shutdown();
            return Err(error.into());
        }
        kill_point!("welcome: sent");
        for message in history.iter().skip(skip) {
            match link.try_offer(*message, in_flight) {
                Ok(Offer::Done) => {}
                Ok(_) => break,
                Err(fault @ LinkError::Fault(_)) => {
                    link.end(in_flight);
                    return Err(fault);
                }
                Err(error) => {
                    link.part(in_flight);
                    return Err(error);
                }
            }
        }
        link.next_seq = next_seq;
        link.producer.offer(link.page.view(), next_seq);
        kill_point!("welcome: offered");
        // The subscriber may already be asleep on its socket alone.
        link.bell.ring();
        Ok(link)
    }
}

/// How many of the newest messages a link has room for, in messages and in its share of the pool.
fn fitting(history: &VecDeque<Message>, depth: u32, in_flight: &InFlight) -> usize {
    let mut held = 0;
    let fits = |message: &&Message| {
        let fits = in_flight.admits(message.flight, held);
        held += in_flight.charge(message.flight);
        fits
    };
    history.iter().rev().take(depth as usize).take_while(fits).count()
}

/// From where on the history has all messages up to `next_seq`, save such as the subscriber is owed from `expect` on: one from before
/// that is missing in the middle would count as missed.
fn unbroken_from(history: &VecDeque<Message>, expect: u64, next_seq: u64) -> usize {
    let mut follows = next_seq;
    for (at, message) in history.iter().enumerate().rev() {
        let first_missing = message.seq + 1;
        if first_missing < follows.min(expect) {
            return at + 1;
        }
        follows = message.seq;
    }
    0
}

fn send(connection: &Connection, frame: &Frame, fds: &[BorrowedFd<'_>]) -> std::io::Result<bool> {
    let mut bytes = [0; wire::FRAME_MAX];
    connection.send(frame.encode(&mut bytes), fds)
}
