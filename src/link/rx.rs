//! The subscriber's half of a link: checks everything that comes, and makes samples of it.

use std::cell::Cell;
use std::collections::HashMap;
use std::fmt;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::recent::Recent;
use super::{Fault, Kind, LinkError, LinkPage, LinkShared, SEGMENTS_MAX};
use crate::OnFull;
use crate::access::Access;
use crate::buffer::{RemoteSegment, ShmSample};
use crate::prefetch;
use crate::proto::Misbehaved;
use crate::proto::bell;
use crate::proto::layout::Geometry;
use crate::proto::ring::{CLAIM_MAX, Consumer, Descriptor, Popped};
use crate::proto::wire::{self, BackingWire, Frame, Hello, RefusedReason, Welcome};
use crate::sys::bell::Bell;
use crate::sys::clock::monotonic_ns;
use crate::sys::memory::{self, Backing, Foreign, MemoryError};
use crate::sys::process::Process;
use crate::sys::socket::{Connection, Received};
use crate::text::{Called, Hex, chain};

/// Frames read from one publisher before others have their turn.
const FRAMES: usize = 64;
/// Cache lines fetched at most for the messages of one claim. After so many the processor knows by itself what comes next.
const LINES_MAX: usize = 64;

/// Addresses that a publisher may announce, for each byte that the host has and in all: what it has not allocated costs no more than
/// these, and a process has 128 TiB of them.
const ADDRESSES_PER_BYTE: u64 = 64;
const ADDRESSES_MAX: u64 = 1 << 43;

/// Why a link is over.
#[derive(Debug)]
pub(crate) enum Ended {
    /// The publisher delivered everything and said so.
    Closed,
    /// The publisher is gone without a word: killed, most likely.
    Lost,
    /// It would not have us, or not any longer.
    Refused(RefusedReason),
    Fault(Fault),
    Io(std::io::Error),
}

impl fmt::Display for Ended {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Closed => f.write_str("it has closed"),
            Self::Lost => f.write_str("it is gone"),
            Self::Refused(reason) => write!(f, "refused: {reason}"),
            Self::Fault(fault) => write!(f, "it {}", chain(fault)),
            Self::Io(error) => fmt::Display::fmt(&chain(error), f),
        }
    }
}

/// What a look at a link found.
#[must_use]
#[derive(Debug)]
pub(crate) enum Next {
    Sample(ShmSample),
    /// So many messages were dropped before the next one.
    Lagged(u64),
    /// This process has no room for what the publisher sent; it stays where it is, and is tried again.
    Short(MemoryError),
    Empty,
    /// There may be something, but the publisher is just taking it back: look again soon, and do not sleep on it.
    Contended,
    Ended(Ended),
}

/// What keeps every message from a link.
#[derive(Debug, Clone, Copy)]
pub(crate) struct AllHeld {
    /// Messages of which this process has samples.
    pub(crate) samples: u64,
    /// They are as many as the link's depth; else its share of the pool in bytes.
    pub(crate) by_depth: bool,
}

/// The state after the publisher's welcome.
#[derive(Debug)]
struct Established {
    shared: Arc<LinkShared>,
    consumer: Consumer,
    bell: Arc<Bell>,
    /// The message number due next.
    expect: u64,
    segments: HashMap<u64, Announced>,
    /// The bytes of all of them, as addresses and as memory.
    addresses: u64,
    allocated: u64,
    /// Of those the ones used lately, sparse ones left out: most messages need no look into the map.
    recent: Recent<Arc<RemoteSegment>>,
    aside: Option<Aside>,
    armed: bool,
}

/// A segment that the publisher has announced.
#[derive(Debug)]
struct Announced {
    segment: Arc<RemoteSegment>,
    /// Bytes that had been allocated then.
    allocated: u64,
    /// So much of it, from its beginning, can be read without a look: all, save for one that is sparse.
    readable: usize,
}

/// What was taken from the ring and not handed out yet.
#[derive(Debug)]
enum Aside {
    /// Found behind a gap: the gap is told first.
    BehindGap(ShmSample),
    /// It is not simply the next one in a segment used lately, and has to be looked at; or its segment is one that this process has no
    /// room for at present.
    Popped(Descriptor),
    Fault(Fault),
}

#[derive(Debug)]
pub(crate) struct LinkRx {
    /// The publisher's id as its socket's name says it.
    pub(crate) publisher: u128,
    connection: Arc<Connection>,
    /// Becomes readable when the publisher's process ends, even if a child of it holds the socket.
    process: Option<Arc<OwnedFd>>,
    established: Option<Box<Established>>,
    /// What was asked for.
    depth: u32,
    /// There may be frames left in the socket that its readiness does not tell of.
    unread: bool,
    /// There was no room for what lies on the socket: to be tried again, as nothing is going to wake us for it.
    no_room: bool,
    /// Why there was none; told once for each try.
    shortage: Option<MemoryError>,
    /// The publisher's process is gone: the end, once the socket is read.
    process_gone: bool,
    /// Why nothing more will come; told once what has come is read.
    ended: Option<Ended>,
}

/// Why a frame was not read.
enum Unread {
    Ended(Ended),
    /// It is still there.
    Short(MemoryError),
}

impl LinkRx {
    /// Introduces the subscriber on a fresh connection. From `wanted_at` on, or from now on, every message must arrive or be counted.
    pub(crate) fn begin(
        publisher: u128,
        connection: Connection,
        depth: u32,
        on_full: Option<OnFull>,
        subscriber: u128,
        access: &Access,
        wanted_at: Option<u64>,
    ) -> Result<Self, LinkError> {
        let mut link = Self {
            publisher,
            connection: Arc::new(connection),
            process: None,
            established: None,
            depth,
            unread: false,
            no_room: false,
            shortage: None,
            process_gone: false,
            ended: None,
        };
        match super::identify(&link.connection, access) {
            // A child that it forked holds the socket.
            Ok(Process::Ended) => return Err(LinkError::Ended),
            Ok(process) => link.process = process.into_fd().map(Arc::new),
            // A stranger is told nothing; the subscriber is told of him.
            Err(LinkError::Fault(kind)) => {
                link.ended = Some(kind.into());
                return Ok(link);
            }
            Err(error) => return Err(error),
        }
        kill_point!("connect: connected");
        // Now that the connection stands.
        let connected_at_ns = monotonic_ns();
        let waited_ns = wanted_at.map_or(0, |wanted_at| connected_at_ns.saturating_sub(wanted_at));
        let on_full = on_full.map(Into::into);
        let hello = Frame::Hello(Hello { depth, on_full, connected_at_ns, waited_ns, subscriber });
        link.connection.send(hello.encode(&mut [0; wire::FRAME_MAX]), &[])?;
        kill_point!("connect: hello sent");
        Ok(link)
    }

    pub(crate) fn is_established(&self) -> bool {
        self.established.is_some()
    }

    pub(crate) fn connection(&self) -> &Arc<Connection> {
        &self.connection
    }

    pub(crate) fn process(&self) -> Option<&Arc<OwnedFd>> {
        self.process.as_ref()
    }

    /// The publisher's process has ended: what it sent is still read.
    pub(crate) fn process_ended(&mut self) {
        self.process_gone = true;
        // Bounded, because a child of that process may hold the socket and go on. A socket does not hold so many.
        self.read_frames(SEGMENTS_MAX, |_| false);
        if !self.no_room {
            self.ended.get_or_insert(Ended::Lost);
        }
    }

    /// Looks whether the publisher's process has ended, which costs a system call: for who waits on no descriptor of its.
    pub(crate) fn look_for_death(&mut self) {
        if !self.process_gone && self.process.as_ref().is_some_and(|process| has_ended(process)) {
            self.process_ended();
        }
    }

    /// Whether the publisher would not have us, or not any longer, which is not told yet.
    pub(crate) fn was_refused(&self) -> bool {
        matches!(self.ended, Some(Ended::Refused(_)))
    }

    /// Whether this process's samples hold the link's whole depth: no message can come before one of them is dropped.
    pub(crate) fn holds_all(&self) -> bool {
        self.established.as_ref().is_some_and(|link| link.shared.holds_all())
    }

    /// What this process holds, if no message can come before it drops some of it.
    pub(crate) fn all_held(&self) -> Option<AllHeld> {
        let link = self.established.as_deref()?;
        let page = link.shared.page();
        let by_depth = link.shared.holds_all();
        // What the publisher counts is held where nothing waits to be received.
        let is_blocked = || page.control.at_share.load(Ordering::Relaxed) != 0 && !self.has_something();
        if !by_depth && !is_blocked() {
            return None;
        }
        let samples = link.shared.held();
        (samples > 0).then_some(AllHeld { samples, by_depth })
    }

    /// Whether the last thing told was a gap with a message behind it, which comes next.
    pub(crate) fn is_behind_gap(&self) -> bool {
        self.established.as_ref().is_some_and(|link| matches!(link.aside, Some(Aside::BehindGap(_))))
    }

    /// Why there was no room for what lies on the socket, if that was not told yet.
    pub(crate) fn take_shortage(&mut self) -> Option<MemoryError> {
        self.shortage.take()
    }

    /// The doorbell that the publisher rings, once it has sent it.
    pub(crate) fn bell(&self) -> Option<&Arc<Bell>> {
        self.established.as_ref().map(|established| &established.bell)
    }

    /// Whether a look is worthwhile; cheap enough to be done in a loop.
    #[inline]
    pub(crate) fn has_something(&self) -> bool {
        self.ended.is_some()
            || self.unread
            || self.shortage.is_some()
            || self
                .established
                .as_ref()
                .is_some_and(|link| link.aside.is_some() || !link.consumer.is_empty(link.shared.page()))
    }

    /// The next message, if it is there and just the next one in a segment used lately, as most are. `None`: see what
    /// [`next`](Self::next) says.
    // Short, and it makes the sample where the caller wants it: to hand it up by way of `Next` costs as much again.
    #[inline(always)]
    pub(crate) fn next_sample(&mut self) -> Option<ShmSample> {
        let link = self.established.as_deref_mut()?;
        if link.aside.is_some() {
            return None;
        }
        let descriptor = match link.pop() {
            Ok(Popped::Message(descriptor)) => descriptor,
            Ok(_) => return None,
            Err(fault) => {
                link.aside = Some(Aside::Fault(Kind::from(fault).into()));
                return None;
            }
        };
        if let Some(segment) = link.recent.get(descriptor.segment)
            && descriptor.seq == link.expect
            && let Ok(sample) = Self::sample(segment, descriptor)
        {
            link.expect = descriptor.seq.saturating_add(1);
            return Some(sample);
        }
        link.aside = Some(Aside::Popped(descriptor));
        None
    }

    /// The next thing that this link has to tell.
    #[inline]
    pub(crate) fn next(&mut self) -> Next {
        match self.try_next() {
            // No end is there while something on the socket has no room, save for one that makes it worthless.
            Ok(Next::Empty) => match self.shortage.take() {
                Some(shortage) => Next::Short(shortage),
                None => self.ended.take().map_or(Next::Empty, Next::Ended),
            },
            Ok(next) => next,
            Err(ended) => Next::Ended(ended),
        }
    }

    /// Asks the publisher to ring from now on. The caller must look once more afterwards.
    pub(crate) fn arm(&mut self) {
        if let Some(link) = &mut self.established {
            bell::arm(&link.shared.page().control.data_armed);
            kill_point!("sleep: data bell armed");
            link.armed = true;
        }
    }

    pub(crate) fn disarm(&mut self) {
        if let Some(link) = &mut self.established
            && std::mem::take(&mut link.armed)
        {
            bell::disarm(&link.shared.page().control.data_armed);
        }
    }

    /// Reads what the publisher has sent over the socket, until there is nothing more or too much for one go: then
    /// [`is_unread`](Self::is_unread). What it amounts to is told by the next look.
    pub(crate) fn read_socket(&mut self) {
        self.read_frames(FRAMES, |_| false);
    }

    /// Whether the socket is to be read again, ready or not: a publisher that sends as fast as it is read must not keep
    /// us from everybody else.
    pub(crate) fn is_unread(&self) -> bool {
        self.unread || self.no_room
    }

    /// Reads `most` frames, or until there are none, or `enough`.
    fn read_frames(&mut self, most: usize, enough: impl Fn(&Self) -> bool) {
        let mut any = false;
        for read in 0.. {
            // What is left where it was enough is told by the socket's readiness, as before.
            if self.ended.is_some() || enough(self) {
                break;
            }
            self.unread = read == most;
            if self.unread {
                break;
            }
            let frame = self.read_frame();
            self.no_room = matches!(frame, Err(Unread::Short(_)));
            match frame {
                Ok(true) => {
                    any = true;
                    // What there was no room for has been read.
                    self.shortage = None;
                }
                Ok(false) => {
                    if self.process_gone {
                        self.ended = Some(Ended::Lost);
                    }
                    break;
                }
                Err(Unread::Ended(ended)) => self.ended = Some(ended),
                Err(Unread::Short(shortage)) => {
                    self.shortage = Some(shortage);
                    break;
                }
            }
        }
        if any && let Some(link) = &self.established {
            kill_point!("socket: read");
            // A publisher may be waiting for room in the socket as well.
            link.shared.ring_if_starved();
        }
    }

    /// Says good-bye: what was not received goes back, and once the last sample is dropped the socket closes.
    pub(crate) fn leave(mut self) {
        let Some(link) = self.established.as_deref_mut() else { return };
        let give_back = |ticket| {
            if link.shared.has_ticket(ticket)
                && link.shared.hold(ticket).begin()
                && link.shared.hold(ticket).end()
            {
                link.shared.release(ticket);
            }
        };
        if let Some(Aside::Popped(Descriptor { ticket, .. })) = link.aside.take() {
            give_back(ticket);
        }
        let view = link.shared.page();
        // No more than there can be: the publisher may go on as fast as we take them.
        for _ in 0..view.geometry().depth() {
            let Ok(Popped::Message(Descriptor { ticket, .. })) = link.consumer.pop(view) else { break };
            kill_point!("leave: one popped");
            give_back(ticket);
        }
        // The last of them may have been claimed with others that came meanwhile.
        link.consumer.take_claimed().for_each(|message| give_back(message.ticket));
        kill_point!("leave: all popped");
        // If it cannot be sent the publisher is gone, or finds out when the socket closes.
        let _ = self.connection.send(Frame::Leave.encode(&mut [0; wire::FRAME_MAX]), &[]);
        kill_point!("leave: said");
    }

    #[inline]
    fn try_next(&mut self) -> Result<Next, Ended> {
        let Some(link) = self.established.as_deref_mut() else { return Ok(Next::Empty) };
        let descriptor = match link.aside.take() {
            None => match link.pop()? {
                Popped::Message(descriptor) => descriptor,
                Popped::Empty => return self.gap_at_the_end(),
                // The publisher is dropping faster than we take: it is at it right now, and will ring or be seen again.
                Popped::Contended => return Ok(Next::Contended),
            },
            Some(Aside::BehindGap(sample)) => return Ok(Next::Sample(sample)),
            Some(Aside::Fault(fault)) => return Err(Ended::Fault(fault)),
            Some(Aside::Popped(descriptor)) => descriptor,
        };
        if descriptor.seq < link.expect {
            return Err(Kind::Backwards { expected: link.expect, actual: descriptor.seq }.into());
        }
        let segment = self.segment(&descriptor)?;
        let link = self.established.as_deref_mut().ok_or(Kind::OutOfTurn("message"))?;
        let Some(segment) = segment else {
            link.aside = Some(Aside::Popped(descriptor));
            return Ok(Next::Empty);
        };
        let missed = descriptor.seq - link.expect;
        link.expect = descriptor.seq.saturating_add(1);
        let sample = Self::sample(&segment, descriptor)?;
        if missed == 0 {
            return Ok(Next::Sample(sample));
        }
        link.aside = Some(Aside::BehindGap(sample));
        Ok(Next::Lagged(missed))
    }

    /// With the ring empty: messages that were dropped after the last one received.
    fn gap_at_the_end(&mut self) -> Result<Next, Ended> {
        let Some(link) = self.established.as_deref_mut() else { return Ok(Next::Empty) };
        let view = link.shared.page();
        // SYNC POINT: offered. Read before the ring is looked at again: every message below it that was not dropped
        // is then visible in the ring.
        let offered = link.consumer.offered(view)?;
        if offered <= link.expect || !link.consumer.is_empty(view) {
            return Ok(Next::Empty);
        }
        let missed = offered - link.expect;
        link.expect = offered;
        Ok(Next::Lagged(missed))
    }

    // Always: its result would come by way of memory, for a tenth of what a message costs.
    #[inline(always)]
    fn sample(segment: &Arc<RemoteSegment>, descriptor: Descriptor) -> Result<ShmSample, Ended> {
        let Descriptor { seq, segment: id, offset, len, ticket } = descriptor;
        let range = usize::try_from(offset)
            .ok()
            .zip(usize::try_from(len).ok())
            .and_then(|(offset, len)| Some(offset..offset.checked_add(len)?));
        let Some(range) = range.filter(|range| range.end <= segment.mapping.len()) else {
            return Err(Kind::OutOfBounds { segment: id, offset, len }.into());
        };
        if !segment.link.has_ticket(ticket) || !segment.link.hold(ticket).begin() {
            return Err(Kind::TicketReused(ticket).into());
        }
        kill_point!("receive: hold begun");
        let sample = ShmSample::new(Arc::clone(segment), range, ticket, seq);
        Ok(sample.ok_or(Kind::OutOfBounds { segment: id, offset, len })?)
    }

    /// The mapping of the message's segment, which was announced before it, and in which the message can be read. `None`: it is
    /// announced in what there is no room for.
    #[inline]
    fn segment(&mut self, descriptor: &Descriptor) -> Result<Option<Arc<RemoteSegment>>, Ended> {
        if let Some(link) = self.established.as_deref()
            && let Some(segment) = link.recent.get(descriptor.segment)
        {
            return Ok(Some(Arc::clone(segment)));
        }
        self.find_segment(descriptor)
    }

    fn find_segment(&mut self, descriptor: &Descriptor) -> Result<Option<Arc<RemoteSegment>>, Ended> {
        let id = descriptor.segment;
        if !self.knows_segment(id) {
            // It came before the message, so it is in the socket, which does not hold more frames than this.
            self.read_frames(SEGMENTS_MAX, |link| link.knows_segment(id));
        }
        let unknown = Kind::OutOfBounds { segment: id, offset: 0, len: 0 };
        let link = self.established.as_deref_mut().ok_or(Kind::OutOfTurn("message"))?;
        let Some(announced) = link.segments.get_mut(&id) else {
            return match self.ended.take() {
                // It may be that we could not take the segment: no fault of the publisher's.
                Some(ended @ (Ended::Fault(_) | Ended::Io(_))) => Err(ended),
                None if self.no_room => Ok(None),
                _ => Err(unknown.into()),
            };
        };
        announced.make_readable(descriptor)?;
        let segment = Arc::clone(&announced.segment);
        if announced.readable == segment.mapping.len() {
            link.recent.put(id, Arc::clone(&segment));
        }
        Ok(Some(segment))
    }

    fn knows_segment(&self, id: u64) -> bool {
        self.established.as_ref().is_some_and(|link| link.segments.contains_key(&id))
    }

    /// Reads one frame; `false` if there is none. It is taken off the socket only when there was room for all it brings.
    fn read_frame(&mut self) -> Result<bool, Unread> {
        let mut bytes = [0; wire::FRAME_MAX + 1];
        let (len, fds) = match self.connection.peek(&mut bytes) {
            Ok(Received::WouldBlock) => return Ok(false),
            Ok(Received::Eof) => return Err(Ended::Lost.into()),
            Ok(Received::Packet { len, fds, truncated: false }) => (len, fds),
            Ok(Received::Packet { len, fds, .. }) => {
                return Err(super::truncated(&bytes, len, fds.len()).into());
            }
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => {
                return Err(Ended::Lost.into());
            }
            Err(error) => {
                return Err(MemoryError::receiving(error).map_or_else(|e| Ended::Io(e).into(), Unread::Short));
            }
        };
        let frame = Frame::decode(&bytes[..len])?;
        if frame.fds() != fds.len() {
            return Err(Kind::Descriptors { expected: frame.fds(), actual: fds.len() }.into());
        }
        let mut fds = fds.into_iter();
        match (frame, self.established.as_deref_mut()) {
            (Frame::Welcome(welcome), None) => {
                let (Some(page), Some(bell), Some(credit)) = (fds.next(), fds.next(), fds.next()) else {
                    return Err(Kind::Descriptors { expected: 3, actual: 0 }.into());
                };
                kill_point!("welcome: received");
                self.established = Some(self.establish(welcome, page, bell, credit)?);
                self.tell_up();
                kill_point!("welcome: established");
            }
            (Frame::Segment(segment), Some(link)) => {
                let Some(fd) = fds.next() else {
                    return Err(Kind::Descriptors { expected: 1, actual: 0 }.into());
                };
                link.map_segment(segment, fd)?;
            }
            (Frame::Retire { id }, Some(link)) => {
                let retired = link.segments.remove(&id).ok_or(Kind::NotAnnounced(id))?;
                link.addresses -= retired.segment.mapping.len() as u64;
                link.allocated -= retired.allocated;
                link.recent.forget(id);
            }
            (Frame::Bye, Some(_)) => return Err(Ended::Closed.into()),
            (Frame::Refused(reason), _) => return Err(Ended::Refused(reason).into()),
            (frame, _) => return Err(Kind::OutOfTurn(frame.name()).into()),
        }
        self.connection.discard();
        Ok(true)
    }

    fn tell_up(&self) {
        // Its name costs a system call or three.
        if tracing::enabled!(tracing::Level::DEBUG) {
            let process = Called::of(self.connection.peer_credentials().ok().and_then(|peer| peer.pid));
            tracing::debug!(publisher = %Hex(self.publisher), %process, "link to a publisher is up");
        }
    }

    fn establish(
        &self,
        welcome: Welcome,
        page: OwnedFd,
        bell: OwnedFd,
        credit: OwnedFd,
    ) -> Result<Box<Established>, Unread> {
        let Welcome { depth, publisher, .. } = welcome;
        if publisher != self.publisher {
            return Err(Kind::Impostor { said: Hex(publisher), socket: Hex(self.publisher) }.into());
        }
        if depth > self.depth {
            return Err(Kind::TooDeep { asked: self.depth, granted: depth }.into());
        }
        let geometry = Geometry::new(depth).ok_or(Kind::OutOfTurn("Welcome"))?;
        let page = LinkPage::open(page.as_fd(), geometry).map_err(unusable)?;
        kill_point!("welcome: page mapped");
        page.view().validate()?;
        let bell = Arc::new(Bell::from_fd(bell).map_err(Kind::Descriptor)?);
        let credit = Bell::from_fd(credit).map_err(Kind::Descriptor)?;
        let shared = LinkShared::new(publisher, Arc::clone(&self.connection), page, depth, credit);
        // Where the oldest may be dropped for newer ones, none is claimed before its turn.
        let claim = if welcome.on_full == OnFull::DropOldest.into() { 1 } else { CLAIM_MAX };
        Ok(Box::new(Established {
            shared: Arc::new(shared),
            consumer: Consumer::new(claim),
            bell,
            expect: welcome.expect_seq,
            segments: HashMap::new(),
            addresses: 0,
            allocated: 0,
            recent: Recent::new(),
            aside: None,
            armed: false,
        }))
    }
}

impl Established {
    /// Takes the oldest message, and has the payloads of those that come soon fetched meanwhile.
    #[inline]
    fn pop(&mut self) -> Result<Popped, Misbehaved> {
        let Self { shared, consumer, recent, .. } = self;
        let lines = Cell::new(LINES_MAX);
        consumer.pop_with(shared.page(), |soon| {
            if let Some(segment) = recent.get(soon.segment) {
                let start = segment.mapping.as_ptr().as_ptr().wrapping_add(soon.offset as usize);
                lines.set(lines.get() - prefetch::for_reading(start, soon.len as usize, lines.get()));
            }
        })
    }

    fn map_segment(&mut self, segment: wire::Segment, fd: OwnedFd) -> Result<(), Unread> {
        let wire::Segment { id, len, backing } = segment;
        let backing = match backing {
            BackingWire::Memfd => Backing::Memfd,
            BackingWire::Posix => Backing::PosixShm,
        };
        if self.segments.contains_key(&id) {
            return Err(Kind::AnnouncedTwice(id).into());
        }
        if self.segments.len() >= SEGMENTS_MAX {
            return Err(Kind::TooManySegments.into());
        }
        let host = memory::host_memory();
        let addresses =
            within(self.addresses, len, host.saturating_mul(ADDRESSES_PER_BYTE).min(ADDRESSES_MAX))?;
        let len = usize::try_from(len).map_err(|_| Kind::OutOfBounds { segment: id, offset: 0, len })?;
        kill_point!("segment: received");
        let Foreign { mapping, allocated, sparse } =
            memory::map_read_only(fd.as_fd(), len, backing).map_err(unusable)?;
        kill_point!("segment: mapped");
        let sum = within(self.allocated, allocated, host)?;
        let segment = Arc::new(RemoteSegment { mapping, link: Arc::clone(&self.shared) });
        let readable = if sparse { 0 } else { len };
        self.segments.insert(id, Announced { segment, allocated, readable });
        (self.addresses, self.allocated) = (addresses, sum);
        Ok(())
    }
}

impl Announced {
    /// Has what a message's bytes lack of memory allocated, if the segment is sparse.
    #[inline]
    fn make_readable(&mut self, message: &Descriptor) -> Result<(), Kind> {
        let end = message.offset.saturating_add(message.len);
        if end <= self.readable as u64 { Ok(()) } else { self.make_more_readable(message.offset, end) }
    }

    #[cold]
    fn make_more_readable(&mut self, start: u64, end: u64) -> Result<(), Kind> {
        let mapping = &self.segment.mapping;
        let inside = |at: u64| usize::try_from(at).ok().filter(|at| *at <= mapping.len());
        // What lies outside is refused where the sample is made.
        let (Some(start), Some(end)) = (inside(start), inside(end)) else { return Ok(()) };
        mapping.make_readable(start..end).map_err(Kind::Memory)?;
        if start <= self.readable {
            self.readable = end;
        }
        Ok(())
    }
}

/// `sum` and `more`, if they are no more than `most`.
fn within(sum: u64, more: u64, most: u64) -> Result<u64, Kind> {
    let announced = sum.saturating_add(more);
    if announced > most { Err(Kind::TooMuchMemory { announced, most }) } else { Ok(announced) }
}

/// Whether the process of this pidfd has ended; `false` where that cannot be asked.
fn has_ended(process: &OwnedFd) -> bool {
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    matches!(poll(&mut [PollFd::new(process, PollFlags::IN)], Some(&now)), Ok(1..))
}

/// Shared memory that could not be mapped, for want of room or by the publisher's fault.
fn unusable(error: MemoryError) -> Unread {
    if error.is_shortage() { Unread::Short(error) } else { Kind::Memory(error).into() }
}

impl From<Ended> for Unread {
    fn from(ended: Ended) -> Self {
        Self::Ended(ended)
    }
}

impl<K: Into<Kind>> From<K> for Unread {
    fn from(kind: K) -> Self {
        Self::Ended(Ended::from(kind))
    }
}

impl<K: Into<Kind>> From<K> for Ended {
    fn from(kind: K) -> Self {
        Self::Fault(Fault::from(kind.into()))
    }
}

impl AsFd for LinkRx {
    /// The socket.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.connection.as_fd()
    }
}
