//! Frames in any order, with any descriptors, and a page that changes under everybody's hands: against either side of the
//! real thing.

use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::LazyLock;

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use rustix::io::IoSlice;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

use super::page::Lie;
use crate::access::Access;
use crate::link::{LinkPage, LinkRx, Next};
use crate::proto::layout::{CONTROL_WORDS, Geometry, Page};
use crate::proto::ring::{Descriptor, Producer};
use crate::proto::wire::{BackingWire, FRAME_MAX, Frame, Hello, OnFullWire, RefusedReason, Segment, Welcome};
use crate::publisher::shared::Shared;
use crate::sys::bell::Bell;
use crate::sys::clock::monotonic_ns;
use crate::sys::memory::{self, Backing, CreateOptions};
use crate::sys::socket::{Connection, Received, pair};
use crate::topic::{RuntimeDir, TopicDir, TopicName};
use crate::{OnFull, ShmPublisher};

/// How deep a link the subscriber asks for.
const DEPTH: u32 = 5;
/// Who the publisher is that it connects to.
const PUBLISHER: u128 = 77;
const LEN: usize = 8192;

/// What a hostile peer does next, or lets the honest one do.
#[derive(Debug, Clone, arbitrary::Arbitrary)]
pub enum Step {
    /// Says something, with descriptors.
    Say(Said, [Option<Gift>; 4]),
    /// Spoils the page: the first words, the cursors among them, or any.
    Scribble(u16, bool, Lie),
    /// Queues a message that looks good, or nearly.
    Push(u8, Place, u8),
    /// The honest one reads its socket, or lets its tasks run.
    Read,
    /// It looks for a message, or sends one.
    Look,
    /// It lets go of one.
    Drop(u8),
    /// It says that it sleeps.
    Arm,
}

/// Where a message is said to lie.
#[derive(Debug, Clone, Copy, arbitrary::Arbitrary)]
pub enum Place {
    /// Where there is something.
    Within(u8),
    /// Perhaps nowhere.
    Anywhere(u8, u32, Lie),
}

/// A packet.
#[derive(Debug, Clone, arbitrary::Arbitrary)]
pub enum Said {
    /// Any bytes.
    Raw(Vec<u8>),
    /// A frame with some of its bytes changed.
    Spoiled(Box<Said>, u8, u8),
    /// As a subscriber begins.
    Hello(u8, u8),
    /// As a publisher does.
    Welcome(u8, u8, u8, bool),
    /// Its descriptors are those that there must be.
    GoodWelcome,
    /// A segment.
    Segment(u8, Lie, bool),
    /// A segment that is.
    GoodSegment(u8),
    /// No more of it.
    Retire(u8),
    /// A publisher's no.
    Refused(u8),
    /// A subscriber's last.
    Leave,
    /// A publisher's last.
    Bye,
}

/// A descriptor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, arbitrary::Arbitrary)]
pub enum Gift {
    /// A link page, of which there is one in each run.
    Page,
    /// A segment.
    Segment,
    /// A memfd without seals.
    Unsealed,
    /// A sealed memfd that is too small for anything.
    Small,
    /// An eventfd.
    Bell,
    /// A device.
    Null,
}

/// What can be given away again and again.
struct Stock {
    segment: OwnedFd,
    unsealed: OwnedFd,
    small: OwnedFd,
    bell: Bell,
    null: OwnedFd,
}

static STOCK: LazyLock<Stock> = LazyLock::new(|| {
    let memfd = |len: u64, seals| {
        let fd = memfd_create(c"fuzz", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).expect("a memfd");
        ftruncate(&fd, len).expect("its length");
        fcntl_add_seals(&fd, seals).expect("its seals");
        fd
    };
    let options = CreateOptions { backing: Backing::Memfd, populate: true, lock: false, huge_pages: false };
    Stock {
        segment: memory::create(LEN, &options).expect("a segment").0,
        unsealed: memfd(LEN as u64, SealFlags::empty()),
        small: memfd(1, SealFlags::SHRINK | SealFlags::GROW | SealFlags::FUTURE_WRITE | SealFlags::SEAL),
        bell: Bell::new().expect("a bell"),
        null: std::fs::File::open("/dev/null").expect("a device").into(),
    }
});

impl Gift {
    fn fd(self, page: &OwnedFd) -> BorrowedFd<'_> {
        let fd = match self {
            Self::Page => page,
            Self::Segment => &STOCK.segment,
            Self::Unsealed => &STOCK.unsealed,
            Self::Small => &STOCK.small,
            Self::Bell => return STOCK.bell.as_fd(),
            Self::Null => &STOCK.null,
        };
        fd.as_fd()
    }
}

impl Said {
    fn bytes(&self) -> Vec<u8> {
        let encoded = |frame: Frame| frame.encode(&mut [0; FRAME_MAX]).to_vec();
        let policy = |code: u8| match code % 4 {
            0 => None,
            1 => Some(OnFullWire::Wait),
            2 => Some(OnFullWire::DropOldest),
            _ => Some(OnFullWire::DropNewest),
        };
        let backing = |memfd| if memfd { BackingWire::Memfd } else { BackingWire::Posix };
        match self {
            Self::Raw(bytes) => bytes.clone(),
            Self::Spoiled(said, at, byte) => {
                let mut bytes = said.bytes();
                let at = usize::from(*at) % bytes.len().max(1);
                if let Some(spoiled) = bytes.get_mut(at) {
                    *spoiled = *byte;
                }
                bytes
            }
            Self::Hello(depth, code) => encoded(Frame::Hello(Hello {
                subscriber: 1,
                connected_at_ns: monotonic_ns(),
                waited_ns: 0,
                depth: (*depth).into(),
                on_full: policy(*code),
            })),
            Self::Welcome(depth, expect, next, named) => encoded(Frame::Welcome(Welcome {
                publisher: if *named { PUBLISHER } else { 0 },
                expect_seq: (*expect).into(),
                next_seq: (*next).into(),
                depth: (*depth).into(),
                on_full: OnFullWire::Wait,
            })),
            Self::GoodWelcome => Self::Welcome(DEPTH as u8, 0, 0, true).bytes(),
            Self::Segment(id, len, memfd) => {
                let (id, len) = ((*id).into(), len.value());
                encoded(Frame::Segment(Segment { id, len, backing: backing(*memfd) }))
            }
            Self::GoodSegment(id) => {
                let (id, len) = ((id % 4).into(), LEN as u64);
                encoded(Frame::Segment(Segment { id, len, backing: backing(true) }))
            }
            Self::Retire(id) => encoded(Frame::Retire { id: (id % 8).into() }),
            Self::Refused(code) => encoded(Frame::Refused(match code % 5 {
                0 => RefusedReason::OutOfResources,
                1 => RefusedReason::NotPermitted,
                2 => RefusedReason::NotUnderstood,
                3 => RefusedReason::Full,
                4 => RefusedReason::Keeping,
                _ => RefusedReason::Stuck,
            })),
            Self::Leave => encoded(Frame::Leave),
            Self::Bye => encoded(Frame::Bye),
        }
    }

    fn gifts(&self, given: [Option<Gift>; 4]) -> Vec<Gift> {
        match self {
            Self::GoodWelcome => vec![Gift::Page, Gift::Bell, Gift::Bell],
            Self::GoodSegment(_) => vec![Gift::Segment],
            _ => given.into_iter().flatten().collect(),
        }
    }
}

impl Place {
    fn descriptor(self, seq: u64, ticket: u32) -> Descriptor {
        let (segment, offset, len) = match self {
            Self::Within(at) => (u64::from(at % 4), 64 * u64::from(at % 64), u64::from(at)),
            Self::Anywhere(segment, offset, len) => {
                (segment.into(), 64 * u64::from(offset), len.value() >> 23)
            }
        };
        Descriptor { seq, segment, offset, len, ticket }
    }
}

fn say(connection: &Connection, said: &Said, given: [Option<Gift>; 4], page: &OwnedFd) {
    let fds: Vec<_> = said.gifts(given).iter().map(|gift| gift.fd(page)).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    assert!(fds.is_empty() || control.push(SendAncillaryMessage::ScmRights(&fds)));
    // Whoever has had enough hangs up.
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    let _ = sendmsg(connection, &[IoSlice::new(&said.bytes())], &mut control, flags);
}

fn scribble(page: Page<'_>, at: u16, anywhere: bool, lie: Lie) {
    let among = if anywhere { page.words() } else { CONTROL_WORDS + 4 };
    page.scribble(usize::from(at) % among, lie.value());
}

/// Has a subscriber's link hear a hostile publisher. What it hands out as a message can be read, and there are never more
/// of them than it has asked for.
pub fn subscriber(steps: &[Step]) {
    let (ours, theirs) = pair().expect("a connection");
    let (page_fd, page) = LinkPage::create(Geometry::new(DEPTH).expect("a depth")).expect("a page");
    let mut producer = Producer::new();
    let mut link =
        LinkRx::begin(PUBLISHER, ours, DEPTH, None, 1, &Access::default(), None).expect("a beginning");
    let mut held = Vec::new();
    for step in steps {
        match step {
            Step::Say(said, given) => say(&theirs, said, *given, &page_fd),
            Step::Scribble(at, anywhere, lie) => scribble(page.view(), *at, *anywhere, *lie),
            Step::Push(seq, place, ticket) => {
                let seq = producer.position().saturating_add(u64::from(*seq % 4));
                producer.push(page.view(), place.descriptor(seq, u32::from(ticket % 8)));
            }
            Step::Read => link.read_socket(),
            Step::Look => match link.next() {
                Next::Sample(sample) => {
                    assert!(
                        sample.len() <= LEN
                            && sample.iter().map(|byte| usize::from(*byte)).sum::<usize>() == 0
                    );
                    held.push(sample);
                    assert!(held.len() <= DEPTH as usize, "more than it has tickets");
                }
                Next::Lagged(missed) => assert_ne!(missed, 0),
                // Short: a segment said to be larger than the address space has room for.
                Next::Empty | Next::Contended | Next::Short(_) => {}
                Next::Ended(ended) => {
                    assert!(!format!("{ended:?}").is_empty());
                    break;
                }
            },
            Step::Drop(at) if !held.is_empty() => drop(held.swap_remove(usize::from(*at) % held.len())),
            Step::Drop(_) => {}
            Step::Arm => link.arm(),
        }
    }
    link.leave();
}

/// A publisher to be attacked again and again.
pub struct Stage {
    publisher: ShmPublisher,
    topic: TopicDir,
    runtime: tokio::runtime::Runtime,
}

impl Stage {
    /// In this runtime directory.
    pub fn new(path: &Path) -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build().expect("a runtime");
        let builder = ShmPublisher::builder("t").runtime_dir(path).on_full(OnFull::DropOldest).history(2);
        let publisher = builder.runtime(runtime.handle().clone()).bind().expect("a publisher");
        let directory = RuntimeDir::resolve(Some(path), Access::default()).expect("a directory");
        let topic = TopicDir::open(&directory, &TopicName::new("t").expect("a name")).expect("a topic");
        Self { publisher, topic, runtime }
    }

    fn run(&self) {
        self.runtime.block_on(async {
            for _ in 0..4 {
                tokio::task::yield_now().await;
            }
        });
    }

    /// Has the publisher hear a hostile subscriber. When that one has gone, everything that it had is back.
    pub fn publisher(&self, steps: &[Step]) {
        let theirs = self.topic.connect(self.publisher.id()).expect("a connection");
        let (page_fd, _page) = LinkPage::create(Geometry::new(DEPTH).expect("a depth")).expect("a page");
        let mut page: Option<LinkPage> = None;
        for step in steps {
            match step {
                Step::Say(said, given) => say(&theirs, said, *given, &page_fd),
                Step::Scribble(at, anywhere, lie) => {
                    if let Some(page) = &page {
                        scribble(page.view(), *at, *anywhere, *lie);
                    }
                }
                Step::Read => {
                    self.run();
                    page = page.take().or_else(|| welcomed(&theirs));
                }
                Step::Arm => Shared::local(self.publisher.id()).expect("a local publisher").accept_now(),
                Step::Look | Step::Push(..) | Step::Drop(_) => {
                    self.publisher.try_send([1; 100]).expect("nobody keeps it waiting");
                }
            }
        }
        drop(theirs);
        for _ in 0..1_000 {
            self.run();
            // The history has two.
            if self.publisher.subscriber_count() == 0 && self.publisher.pool().stats().in_use() <= 2 {
                return;
            }
        }
        panic!("{:?} is left, {:?}", self.publisher, self.publisher.pool().stats());
    }
}

/// The page that came with the welcome, if it did.
fn welcomed(connection: &Connection) -> Option<LinkPage> {
    let mut bytes = [0; FRAME_MAX];
    while let Ok(Received::Packet { len, fds, truncated: false }) = connection.recv(&mut bytes) {
        if let Ok(Frame::Welcome(welcome)) = Frame::decode(&bytes[..len]) {
            return LinkPage::open(fds.first()?.as_fd(), Geometry::new(welcome.depth)?).ok();
        }
    }
    None
}
