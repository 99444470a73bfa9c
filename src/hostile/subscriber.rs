//! A hostile publisher, and what a subscriber makes of it while an honest one goes on.

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};

use super::*;
use crate::proto::ring::Descriptor;
use crate::proto::wire::{BackingWire, Segment};
use crate::sys::memory::{self, Backing, CreateOptions};
use crate::sys::testing::{is_alone, run_alone};
use crate::{BusyPoll, RecvError, ShmSample};

pub(super) const DEPTH: u32 = 3;

/// A subscriber between an honest publisher and a hostile one.
pub(super) struct Between {
    pub(super) subscriber: ShmSubscriber,
    pub(super) honest: ShmPublisher,
    pub(super) hostile: Host,
    pub(super) wire: Wire,
    sent: u8,
    held: Option<ShmSample>,
    /// An honest message that is still to come.
    under_way: bool,
    _runtime: tokio::runtime::Runtime,
    pub(super) place: Place,
}

impl Between {
    pub(super) fn new() -> Self {
        let place = Place::new();
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let honest = place.publisher().runtime(runtime.handle().clone()).bind().unwrap();
        let hostile = Host::new(&place);
        let subscriber = place.subscriber().depth(DEPTH).busy_poll(BusyPoll::Off).connect().unwrap();
        let (wire, depth) = hostile.accept();
        assert_eq!(depth, DEPTH);
        Self {
            subscriber,
            honest,
            hostile,
            wire,
            sent: 0,
            held: None,
            under_way: false,
            _runtime: runtime,
            place,
        }
    }

    /// The same, and welcomed.
    pub(super) fn welcomed() -> (Self, Gifts) {
        let this = Self::new();
        let gifts = Gifts::new(DEPTH);
        assert!(this.wire.say(this.hostile.welcome(DEPTH), &gifts.fds()));
        (this, gifts)
    }

    /// An honest message goes through.
    pub(super) fn exchange(&mut self) -> Result<(), RecvError> {
        self.sent = self.sent.wrapping_add(1);
        self.honest.try_send([self.sent]).unwrap();
        let sample = self.receive()?;
        assert_eq!((&*sample, sample.publisher()), (&[self.sent][..], self.honest.id()));
        Ok(())
    }

    /// Receives whatever comes: `true` if it is the honest publisher's next message, of which there is always one.
    pub(super) fn take_any(&mut self) -> bool {
        if !self.under_way {
            self.under_way = true;
            self.sent = self.sent.wrapping_add(1);
            self.honest.try_send([self.sent]).unwrap();
        }
        match self.receive() {
            Ok(sample) if sample.publisher() == self.honest.id() => {
                assert_eq!(*sample, [self.sent]);
                self.under_way = false;
                true
            }
            Ok(_)
            | Err(
                RecvError::Lagged { .. } | RecvError::PeerMisbehaved { .. } | RecvError::PublisherLost { .. },
            ) => false,
            Err(error) => panic!("{error}"),
        }
    }

    /// Has the subscriber look into the topic's directory until it has found this publisher. (Who looks while another thread reads
    /// events may find none for an instant.)
    pub(super) fn notice(&mut self, host: &Host) {
        let deadline = std::time::Instant::now() + LIMIT;
        while !crate::sys::testing::is_readable(&host.listener) && std::time::Instant::now() < deadline {
            let _ = self.subscriber.blocking_recv_timeout(Duration::ZERO);
        }
    }

    pub(super) fn receive(&mut self) -> Result<ShmSample, RecvError> {
        self.subscriber.blocking_recv_timeout(LIMIT)
    }

    /// What the hostile publisher is told off for, once; then the honest one's messages come as before.
    pub(super) fn expect_fault(mut self, case: &str, expected: &str) {
        // Its fault may be found before or after an honest message, of which none is lost.
        let error = match self.exchange() {
            Err(error) => {
                let sample = self.receive().unwrap();
                assert_eq!(*sample, [self.sent]);
                error
            }
            Ok(()) => self.receive().expect_err("a fault"),
        };
        let text = whole(&error);
        assert!(text.contains(expected), "{case}: {text:?} does not say {expected:?}");
        let told =
            matches!(error, RecvError::PeerMisbehaved { publisher, .. } if publisher == self.hostile.id);
        assert!(told, "{case}: {error:?}");
        // The link's socket lives for as long as a sample.
        drop(self.held.take());
        assert!(matches!(self.wire.hear_out(), None | Some(Frame::Leave)), "{case}: hung up");
        for _ in 0..2 * DEPTH {
            self.exchange().unwrap();
        }
        assert_eq!(self.subscriber.publisher_count(), 1, "{case}");
        drop(self.subscriber);
        wait_until("the slots are back", || self.honest.pool().stats().in_use() == 0);
    }

    /// Announces a segment and pushes a message that is said to lie in it.
    fn push(&mut self, gifts: &mut Gifts, descriptor: Descriptor) {
        gifts.producer.push(gifts.page.view(), descriptor);
        gifts.bell.ring();
    }

    fn announce(&self) {
        assert!(self.wire.say(announce(1, LEN, BackingWire::Memfd), &[segment_fd().as_fd()]));
    }
}

fn segment_options() -> CreateOptions {
    CreateOptions { backing: Backing::Memfd, populate: true, lock: false, huge_pages: false }
}

pub(super) const LEN: u64 = 8192;

pub(super) fn segment_fd() -> OwnedFd {
    memory::create(LEN as usize, &segment_options()).unwrap().0
}

fn memfd(len: u64, seals: SealFlags) -> OwnedFd {
    let fd = memfd_create(c"hostile", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    ftruncate(&fd, len).unwrap();
    fcntl_add_seals(&fd, seals).unwrap();
    fd
}

pub(super) fn announce(id: u64, len: u64, backing: BackingWire) -> Frame {
    Frame::Segment(Segment { id, len, backing })
}

fn descriptor(seq: u64, ticket: u32) -> Descriptor {
    Descriptor { seq, segment: 1, offset: 0, len: 8, ticket }
}

/// What a test of a hostile handshake says: the whole of it, and what the subscriber is to make of it.
type Handshake = (&'static str, fn(&Between), &'static str);

fn with_fds(this: &Between, change: impl FnOnce(&mut Vec<OwnedFd>)) {
    let mut fds = Gifts::new(DEPTH).fds().map(|fd| fd.try_clone_to_owned().unwrap()).into();
    change(&mut fds);
    let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
    assert!(this.wire.say(this.hostile.welcome(DEPTH), &fds));
}

fn with_page(this: &Between, page: OwnedFd) {
    with_fds(this, |fds| fds[0] = page);
}

fn epoll() -> OwnedFd {
    rustix::event::epoll::create(rustix::event::epoll::CreateFlags::CLOEXEC).unwrap()
}

fn null() -> OwnedFd {
    std::fs::File::open("/dev/null").unwrap().into()
}

const PAGE_SEALS: SealFlags = SealFlags::SHRINK.union(SealFlags::GROW).union(SealFlags::SEAL);

const HANDSHAKES: &[Handshake] = &[
    (
        "a segment first",
        |this| assert!(this.wire.say(announce(1, LEN, BackingWire::Memfd), &[segment_fd().as_fd()])),
        "sent a Segment frame out of turn",
    ),
    (
        "a retirement first",
        |this| assert!(this.wire.say(Frame::Retire { id: 1 }, &[])),
        "sent a Retire frame out of turn",
    ),
    ("good-bye first", |this| assert!(this.wire.say(Frame::Bye, &[])), "sent a Bye frame out of turn"),
    (
        "a subscriber's greeting",
        |this| assert!(this.wire.say(hello(1, OnFullWire::Wait), &[])),
        "sent a Hello frame out of turn",
    ),
    (
        "a subscriber's leave",
        |this| assert!(this.wire.say(Frame::Leave, &[])),
        "sent a Leave frame out of turn",
    ),
    (
        "no descriptors",
        |this| with_fds(this, Vec::clear),
        "sent 0 file descriptors with a frame that takes 3",
    ),
    (
        "two descriptors",
        |this| with_fds(this, |fds| drop(fds.pop())),
        "sent 2 file descriptors with a frame that takes 3",
    ),
    (
        "four descriptors",
        |this| with_fds(this, |fds| fds.push(null())),
        "sent 4 file descriptors with a frame that takes 3",
    ),
    (
        "many descriptors",
        |this| with_fds(this, |fds| fds.extend((0..200).map(|_| null()))),
        "sent 5 file descriptors with a frame that takes 3",
    ),
    ("a page that is a device", |this| with_page(this, null()), "not shared memory"),
    (
        "a page that is a directory",
        |this| with_page(this, std::fs::File::open("/").unwrap().into()),
        "not shared memory",
    ),
    (
        "a page that is a socket",
        |this| with_page(this, std::os::unix::net::UnixStream::pair().unwrap().0.into()),
        "not shared memory",
    ),
    ("a page that is an epoll instance", |this| with_page(this, epoll()), "not shared memory"),
    (
        "a page without seals",
        |this| with_page(this, memfd(4096, SealFlags::empty())),
        "missing: SHRINK, GROW",
    ),
    ("a page that may shrink", |this| with_page(this, memfd(4096, SealFlags::GROW)), "missing: SHRINK"),
    (
        "a page that is too small",
        |this| with_page(this, memfd(4095, PAGE_SEALS)),
        "of 4095 bytes where 4096 were announced",
    ),
    (
        "a page that is empty",
        |this| with_page(this, memfd(0, PAGE_SEALS)),
        "of 0 bytes where 4096 were announced",
    ),
    (
        "a page that is too large",
        |this| with_page(this, memfd(8192, PAGE_SEALS)),
        "of 8192 bytes where 4096 were announced",
    ),
    (
        "a page that cannot be written",
        |this| with_page(this, memfd(4096, PAGE_SEALS | SealFlags::WRITE)),
        "mapping shared memory failed",
    ),
    ("a page of nothing", |this| with_page(this, memfd(4096, PAGE_SEALS)), "not a link page"),
    (
        "a page of another version",
        |this| {
            let gifts = Gifts::new(DEPTH);
            gifts.page.view().scribble(1, 9);
            assert!(this.wire.say(this.hostile.welcome(DEPTH), &gifts.fds()));
        },
        "layout version 9, this build knows version 3",
    ),
    (
        "a page of another depth",
        |this| {
            let gifts = Gifts::new(DEPTH);
            gifts.page.view().scribble(2, 9);
            assert!(this.wire.say(this.hostile.welcome(DEPTH), &gifts.fds()));
        },
        "for a depth of 9, the handshake said 3",
    ),
    ("a bell that is a file", |this| with_fds(this, |fds| fds[1] = null()), "not an eventfd"),
    ("a bell that is an epoll instance", |this| with_fds(this, |fds| fds[1] = epoll()), "not an eventfd"),
    ("a credit bell that is a file", |this| with_fds(this, |fds| fds[2] = null()), "not an eventfd"),
    (
        "a credit bell that is a page",
        |this| with_fds(this, |fds| fds[2] = memfd(9, SealFlags::empty())),
        "not an eventfd",
    ),
    (
        "a depth that nobody asked for",
        |this| {
            assert!(this.wire.say(this.hostile.welcome(4), &Gifts::new(4).fds()));
        },
        "granted a depth of 4 where 3 was asked for",
    ),
    (
        "another's name",
        |this| {
            let Frame::Welcome(welcome) = this.hostile.welcome(DEPTH) else { unreachable!() };
            let frame = Frame::Welcome(Welcome { publisher: this.honest.id(), ..welcome });
            assert!(this.wire.say(frame, &Gifts::new(DEPTH).fds()));
        },
        "calls itself publisher",
    ),
    (
        "messages that are due but not sent",
        |this| {
            let mut bytes = encoded(this.hostile.welcome(DEPTH));
            bytes[24] = 9;
            assert!(this.wire.say_raw(&bytes, &Gifts::new(DEPTH).fds()));
        },
        "first expected message cannot be 9",
    ),
    (
        "two welcomes",
        |this| {
            for _ in 0..2 {
                assert!(this.wire.say(this.hostile.welcome(DEPTH), &Gifts::new(DEPTH).fds()));
            }
        },
        "sent a Welcome frame out of turn",
    ),
];

/// What a hostile publisher does on a link that stands.
type Deed = (&'static str, fn(&mut Between, &mut Gifts), &'static str);

fn announce_as(this: &Between, fd: OwnedFd, len: u64, backing: BackingWire) {
    assert!(this.wire.say(announce(1, len, backing), &[fd.as_fd()]));
}

fn announce_memfd(this: &Between, fd: OwnedFd) {
    announce_as(this, fd, LEN, BackingWire::Memfd);
}

fn push_into_segment(this: &mut Between, gifts: &mut Gifts, descriptor: Descriptor) {
    this.announce();
    this.push(gifts, descriptor);
}

const SEGMENT_SEALS: SealFlags = PAGE_SEALS.union(SealFlags::FUTURE_WRITE);

const DEEDS: &[Deed] = &[
    (
        "a segment without a descriptor",
        |this, _| assert!(this.wire.say(announce(1, LEN, BackingWire::Memfd), &[])),
        "sent 0 file descriptors with a frame that takes 1",
    ),
    (
        "a segment with two",
        |this, _| {
            let fd = segment_fd();
            assert!(this.wire.say(announce(1, LEN, BackingWire::Memfd), &[fd.as_fd(), fd.as_fd()]));
        },
        "sent 2 file descriptors with a frame that takes 1",
    ),
    (
        "a descriptor too many elsewhere",
        |this, _| assert!(this.wire.say(Frame::Bye, &[null().as_fd()])),
        "sent 1 file descriptors with a frame that takes 0",
    ),
    (
        "a segment twice",
        |this, _| {
            this.announce();
            this.announce();
        },
        "announced segment 1 twice",
    ),
    (
        "a segment that others can write",
        |this, _| announce_memfd(this, memfd(LEN, PAGE_SEALS)),
        "missing: FUTURE_WRITE",
    ),
    (
        "a segment without seals",
        |this, _| announce_memfd(this, memfd(LEN, SealFlags::empty())),
        "without the seals",
    ),
    (
        "a segment that is too small",
        |this, _| announce_memfd(this, memfd(4096, SEGMENT_SEALS)),
        "of 4096 bytes where 8192 were announced",
    ),
    (
        "a segment that is too large",
        |this, _| announce_memfd(this, memfd(16384, SEGMENT_SEALS)),
        "of 16384 bytes where 8192 were announced",
    ),
    ("a segment that is a device", |this, _| announce_memfd(this, null()), "not shared memory"),
    (
        "a POSIX segment that is a device",
        |this, _| announce_as(this, null(), LEN, BackingWire::Posix),
        "not shared memory",
    ),
    (
        "a POSIX segment that is too small",
        |this, _| announce_as(this, memfd(4096, SealFlags::empty()), LEN, BackingWire::Posix),
        "of 4096 bytes where 8192 were announced",
    ),
    (
        "a segment of nothing",
        |this, _| {
            let mut bytes = encoded(announce(1, LEN, BackingWire::Memfd));
            bytes[16..24].fill(0);
            assert!(this.wire.say_raw(&bytes, &[segment_fd().as_fd()]));
        },
        "segment length cannot be 0",
    ),
    (
        "a segment of everything",
        |this, _| announce_as(this, segment_fd(), u64::MAX, BackingWire::Memfd),
        "announced 18446744073709551615 bytes of shared memory",
    ),
    (
        "a message that nobody has allocated",
        |this, gifts| {
            let len = memory::host_memory();
            announce_as(this, memfd(len, SEGMENT_SEALS), len, BackingWire::Memfd);
            this.push(gifts, Descriptor { len, ..descriptor(0, 0) });
        },
        "never allocated by who made it",
    ),
    (
        "addresses without end",
        |this, _| {
            let len = memory::host_memory();
            for id in 1..=65 {
                let fd = memfd(len, SEGMENT_SEALS);
                let segment = Segment { id, len, backing: BackingWire::Memfd };
                assert!(this.wire.say(Frame::Segment(segment), &[fd.as_fd()]));
            }
        },
        "is the most for this host",
    ),
    (
        "a segment retired that never was",
        |this, _| assert!(this.wire.say(Frame::Retire { id: 4 }, &[])),
        "retired segment 4, which it had not announced",
    ),
    (
        "a message in no segment",
        |this, gifts| this.push(gifts, descriptor(0, 0)),
        "named bytes 0..0+0 of segment 1, which are not there",
    ),
    (
        "a message behind its segment",
        |this, gifts| push_into_segment(this, gifts, Descriptor { offset: LEN, ..descriptor(0, 0) }),
        "named bytes 8192..8192+8 of segment 1, which are not there",
    ),
    (
        "a message longer than its segment",
        |this, gifts| push_into_segment(this, gifts, Descriptor { offset: 64, len: LEN, ..descriptor(0, 0) }),
        "named bytes 64..64+8192 of segment 1, which are not there",
    ),
    (
        "a message as long as can be",
        |this, gifts| {
            push_into_segment(this, gifts, Descriptor { offset: 64, len: (1 << 41) - 1, ..descriptor(0, 0) })
        },
        "named bytes 64..64+2199023255551 of segment 1",
    ),
    (
        "a ticket that is not",
        |this, gifts| push_into_segment(this, gifts, descriptor(0, DEPTH)),
        "used ticket 3 on a link that has 3",
    ),
    (
        "a ticket that is held",
        |this, gifts| {
            push_into_segment(this, gifts, descriptor(0, 1));
            this.held = this.receive().ok();
            assert!(this.held.is_some());
            this.push(gifts, descriptor(1, 1));
        },
        "used ticket 1 again while its last message was still held",
    ),
    (
        "a message of the past",
        |this, gifts| {
            push_into_segment(this, gifts, descriptor(5, 1));
            assert!(matches!(this.receive(), Err(RecvError::Lagged { missed: 5, .. })));
            assert_eq!(this.receive().unwrap().seq(), 5);
            this.push(gifts, descriptor(4, 1));
        },
        "sent message 4 where 6 or a later one was due",
    ),
    (
        "a stamp on nothing",
        |_, gifts| gifts.scribble(CONTROL_WORDS + 3, 1 << 41),
        "named bytes 0..0+0 of segment 0, which are not there",
    ),
    (
        "a head that goes back",
        |this, gifts| {
            push_into_segment(this, gifts, descriptor(0, 0));
            drop(this.receive().unwrap());
            gifts.page.view().scribble(HEAD, 0);
            this.push(gifts, descriptor(1, 0));
        },
        "moved the ring's head back from 1 to 0",
    ),
    (
        "a count that goes back",
        |this, gifts| {
            gifts.scribble(OFFERED, 5);
            assert!(matches!(this.receive(), Err(RecvError::Lagged { missed: 5, .. })));
            gifts.scribble(OFFERED, 2);
        },
        "moved the count of offered messages back from 5 to 2",
    ),
];

#[test]
fn hostile_publisher_is_told_off_by_name_and_leaves_nothing() {
    run_alone("hostile::subscriber::child_faults");
}

#[test]
#[ignore = "the child half of hostile_publisher_is_told_off_by_name_and_leaves_nothing"]
fn child_faults() {
    if !is_alone() {
        return;
    }
    // What a process makes once and keeps.
    Between::new().exchange().unwrap();
    let before = Footprint::now();
    for (packet, expected) in bad_packets(Between::new().hostile.welcome(DEPTH)) {
        let this = Between::new();
        assert!(this.wire.say_raw(&packet, &[]));
        this.expect_fault("a bad packet first", expected);
        let (this, _gifts) = Between::welcomed();
        assert!(this.wire.say_raw(&packet, &[]));
        this.expect_fault("a bad packet later", expected);
    }
    for (case, act, expected) in HANDSHAKES {
        let this = Between::new();
        act(&this);
        this.expect_fault(case, expected);
    }
    for (case, act, expected) in DEEDS {
        let (mut this, mut gifts) = Between::welcomed();
        act(&mut this, &mut gifts);
        this.expect_fault(case, expected);
    }
    before.assert_back();
}
