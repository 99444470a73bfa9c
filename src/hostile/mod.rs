//! Peers that break the protocol, against the real thing: a publisher and a subscriber that speak the wire themselves.
//!
//! Whoever is attacked must say what was done to him, go on serving the others, and keep nothing. What the kernel or
//! honest peers do is tested elsewhere.

mod publisher;
mod publisher_endurance;
mod rate;
mod subscriber;
mod subscriber_endurance;

use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::IoSlice;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

use crate::link::LinkPage;
use crate::proto::layout::{CONTROL_WORDS, Geometry, Page};
use crate::proto::ring::Producer;
use crate::proto::wire::{FRAME_MAX, Frame, Hello, OnFullWire, Welcome};
use crate::sys::bell::Bell;
use crate::sys::clock::monotonic_ns;
use crate::sys::socket::{Connection, Listener, Received};
use crate::topic::{RuntimeDir, TopicDir, TopicName};
use crate::{ShmPublisher, ShmPublisherBuilder, ShmSubscriber, ShmSubscriberBuilder};

/// Where [`Page::scribble`] has them.
const OFFERED: usize = 3;
const HEAD: usize = 4;
const DATA_ARMED: usize = 5;
const CREDIT_ARMED: usize = 6;

/// No wait in any test is longer.
const LIMIT: Duration = Duration::from_secs(30);

/// A runtime directory of a test's own.
struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::set_permissions(&dir, std::os::unix::fs::PermissionsExt::from_mode(0o700)).unwrap();
        Self(dir)
    }

    fn publisher(&self) -> ShmPublisherBuilder {
        ShmPublisher::builder("t").runtime_dir(self.0.path())
    }

    /// One whose tasks run only while somebody drives its runtime.
    fn idle_publisher(&self) -> (tokio::runtime::Runtime, ShmPublisher) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let publisher = self.publisher().runtime(runtime.handle().clone()).bind().unwrap();
        (runtime, publisher)
    }

    fn subscriber(&self) -> ShmSubscriberBuilder {
        ShmSubscriber::builder("t").runtime_dir(self.0.path())
    }

    fn topic(&self) -> TopicDir {
        let runtime = RuntimeDir::resolve(Some(self.0.path()), crate::access::Access::default()).unwrap();
        TopicDir::open(&runtime, &TopicName::new("t").unwrap()).unwrap()
    }
}

/// One end of a link's socket, for saying anything at all.
struct Wire(Connection);

impl Wire {
    /// Sends bytes with any number of descriptors; `false` if there is no room, or nobody to send it to.
    fn say_raw(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> bool {
        let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(fds.is_empty() || control.push(SendAncillaryMessage::ScmRights(fds)));
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        sendmsg(&self.0, &[IoSlice::new(bytes)], &mut control, flags).is_ok()
    }

    fn say(&self, frame: Frame, fds: &[BorrowedFd<'_>]) -> bool {
        self.say_raw(frame.encode(&mut [0; FRAME_MAX]), fds)
    }

    /// The next frame; `None` once the other side has hung up.
    fn hear(&self) -> Option<(Frame, Vec<OwnedFd>)> {
        let mut bytes = [0; FRAME_MAX];
        match self.0.recv(&mut bytes).unwrap() {
            Received::Packet { len, fds, truncated: false } => {
                Some((Frame::decode(&bytes[..len]).unwrap(), fds))
            }
            Received::Packet { .. } => panic!("an honest peer sent too much"),
            Received::Eof => None,
            Received::WouldBlock => {
                let mut fds = [PollFd::new(&self.0, PollFlags::IN)];
                assert_eq!(poll(&mut fds, Some(&Timespec::try_from(LIMIT).unwrap())), Ok(1), "says nothing");
                self.hear()
            }
        }
    }

    /// Reads what is left until the other side hangs up, and returns the last frame.
    fn hear_out(&self) -> Option<Frame> {
        std::iter::from_fn(|| self.hear()).last().map(|(frame, _)| frame)
    }
}

/// What a subscriber says first.
fn hello(depth: u32, on_full: OnFullWire) -> Frame {
    let (connected_at_ns, on_full) = (monotonic_ns(), Some(on_full));
    Frame::Hello(Hello { subscriber: 7, connected_at_ns, waited_ns: 0, depth, on_full })
}

/// The bytes of a frame, to be spoiled.
fn encoded(frame: Frame) -> Vec<u8> {
    frame.encode(&mut [0; FRAME_MAX]).to_vec()
}

/// Packets that are no frame, or not one that a peer can begin with, and what is said of them.
fn bad_packets(good: Frame) -> Vec<(Vec<u8>, &'static str)> {
    let good = encoded(good);
    let with = |at: usize, byte: u8| {
        let mut bytes = good.clone();
        bytes[at] = byte;
        bytes
    };
    let longer = |by: usize| [&good[..], &vec![0; by]].concat();
    let mut packets = vec![
        (b"garbage!garbage!".to_vec(), "not a frame of this protocol"),
        (vec![0xff; FRAME_MAX], "not a frame of this protocol"),
        (with(0, b'T'), "not a frame of this protocol"),
        (with(4, 99), "speaks protocol version 99, this build speaks 2"),
        (with(6, 200), "unknown kind 200"),
        (with(7, 1), "reserved byte cannot be 1"),
        (longer(1), "too long for its kind"),
        (longer(FRAME_MAX), "too long for its kind"),
        (longer(60_000), "too long for its kind"),
    ];
    packets.extend((1..good.len()).map(|len| (good[..len].to_vec(), "too short for its kind")));
    packets
}

/// A subscriber that has been welcomed and may do anything with what it got.
struct Guest {
    wire: Wire,
    page: LinkPage,
    bell: Bell,
    credit: Bell,
}

impl Guest {
    /// Connects to a publisher, in three steps of which each may be left out.
    fn connect(place: &Place, publisher: &ShmPublisher) -> Wire {
        Wire(place.topic().connect(publisher.id()).unwrap())
    }

    fn of(place: &Place, publisher: &ShmPublisher, depth: u32, on_full: OnFullWire) -> Self {
        Self::on(Self::connect(place, publisher), depth, on_full)
    }

    fn on(wire: Wire, depth: u32, on_full: OnFullWire) -> Self {
        assert!(wire.say(hello(depth, on_full), &[]));
        let (frame, fds) = wire.hear().expect("welcomed");
        assert!(matches!(frame, Frame::Welcome(Welcome { depth: granted, .. }) if granted == depth));
        let [page, bell, credit] = <[OwnedFd; 3]>::try_from(fds).unwrap();
        Self {
            page: LinkPage::open(page.as_fd(), Geometry::new(depth).unwrap()).unwrap(),
            bell: Bell::from_fd(bell).unwrap(),
            credit: Bell::from_fd(credit).unwrap(),
            wire,
        }
    }

    fn view(&self) -> Page<'_> {
        self.page.view()
    }
}

/// A publisher that subscribers find, and that may welcome them or do anything else.
struct Host {
    id: u128,
    topic: TopicDir,
    listener: Listener,
}

impl Host {
    fn new(place: &Place) -> Self {
        let id = crate::sys::random::random_id().unwrap();
        let mut topic = place.topic();
        let listener = topic.publish(id).unwrap();
        Self { id, topic, listener }
    }

    /// The next subscriber, and how deep a link it wants.
    fn accept(&self) -> (Wire, u32) {
        let mut fds = [PollFd::new(&self.listener, PollFlags::IN)];
        assert_eq!(poll(&mut fds, Some(&Timespec::try_from(LIMIT).unwrap())), Ok(1), "nobody connects");
        let wire = Wire(self.listener.accept().unwrap().expect("somebody in line"));
        match wire.hear() {
            Some((Frame::Hello(hello), _)) => (wire, hello.depth),
            other => panic!("{other:?}"),
        }
    }

    fn welcome(&self, depth: u32) -> Frame {
        let on_full = OnFullWire::Wait;
        Frame::Welcome(Welcome { publisher: self.id, expect_seq: 0, next_seq: 0, depth, on_full })
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        let _ = self.topic.withdraw(self.id);
    }
}

/// What goes with a welcome.
struct Gifts {
    page: LinkPage,
    producer: Producer,
    bell: Bell,
    credit: Bell,
    page_fd: OwnedFd,
}

impl Gifts {
    fn new(depth: u32) -> Self {
        let (page_fd, page) = LinkPage::create(Geometry::new(depth).unwrap()).unwrap();
        let (bell, credit) = (Bell::new().unwrap(), Bell::new().unwrap());
        Self { page, producer: Producer::new(), bell, credit, page_fd }
    }

    /// Stores something in the page, and wakes who looks at it.
    fn scribble(&self, at: usize, value: u64) {
        self.page.view().scribble(at, value);
        self.bell.ring();
    }

    fn fds(&self) -> [BorrowedFd<'_>; 3] {
        [self.page_fd.as_fd(), self.bell.as_fd(), self.credit.as_fd()]
    }
}

/// What a process could leak.
#[derive(Debug, PartialEq, Eq)]
struct Footprint {
    descriptors: usize,
    mappings: usize,
}

impl Footprint {
    fn now() -> Self {
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        // Only what is shared: the allocator and thread stacks come and go as they like.
        let mappings = maps.lines().filter(|line| line.contains("memfd:tokio-shm")).count();
        Self { descriptors: crate::sys::testing::open_descriptors(), mappings }
    }

    /// Waits until nothing is left of what has come since.
    fn assert_back(&self) {
        wait_until("everything is given back", || {
            let now = Self::now();
            now.descriptors <= self.descriptors && now.mappings <= self.mappings
        });
    }
}

/// Runs for a while in which this process has nothing to do, and sees that it does nothing: no other test may be running.
fn assert_idle(what: &str, idle: impl FnOnce(Duration)) {
    let cpu =
        || Duration::try_from(rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime)).unwrap();
    let (before, began) = (cpu(), Instant::now());
    idle(Duration::from_millis(400));
    let (used, lasted) = (cpu() - before, began.elapsed());
    assert!(used < lasted / 4, "{what}: {used:?} of {lasted:?} used, to do nothing");
}

/// Looks until `condition` holds.
fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + LIMIT;
    while !condition() {
        assert!(Instant::now() < deadline, "{what}: not within {LIMIT:?}");
        std::thread::sleep(Duration::from_micros(200));
    }
}

/// An error with all that is behind it, as a user's log shows it.
fn whole(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text = format!("{text}: {error}");
        source = error.source();
    }
    text
}

/// Does something again and again on a thread of its own, until dropped.
struct Again {
    stop: Arc<AtomicBool>,
    times: Arc<AtomicU64>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Again {
    fn and_again(mut act: impl FnMut(u64) + Send + 'static) -> Self {
        let (stop, times) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (stopped, counted) = (Arc::clone(&stop), Arc::clone(&times));
        let thread = std::thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                act(counted.fetch_add(1, Ordering::Relaxed));
            }
        });
        wait_until("it has begun", || times.load(Ordering::Relaxed) > 0);
        Self { stop, times, thread: Some(thread) }
    }

    fn times(&self) -> u64 {
        self.times.load(Ordering::Relaxed)
    }
}

impl Drop for Again {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let joined = self.thread.take().map(std::thread::JoinHandle::join);
        assert!(std::thread::panicking() || matches!(joined, Some(Ok(()))));
    }
}

/// Random enough; the same in each run.
fn random(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}

/// Something to store: small numbers, very large ones, and any.
fn lie(state: &mut u64) -> u64 {
    match random(state) % 4 {
        0 | 1 => random(state) % 20,
        2 => u64::MAX - random(state) % 20,
        _ => random(state),
    }
}
