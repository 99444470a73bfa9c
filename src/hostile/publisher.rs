//! A hostile subscriber, and what a publisher makes of it while an honest one goes on.

use parking_lot::Mutex;

use super::*;
use crate::proto::wire::{BackingWire, RefusedReason, Segment};
use crate::sys::testing::{is_alone, run_alone};

const DEPTH: u32 = 3;

/// A publisher with an honest subscriber.
pub(super) struct Attacked {
    pub(super) publisher: ShmPublisher,
    pub(super) bystander: ShmSubscriber,
    sent: u32,
    _runtime: tokio::runtime::Runtime,
    pub(super) place: Place,
}

impl Attacked {
    pub(super) fn new() -> Self {
        Self::with(|builder| builder)
    }

    pub(super) fn with(settings: impl FnOnce(ShmPublisherBuilder) -> ShmPublisherBuilder) -> Self {
        let place = Place::new();
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let builder = settings(place.publisher().runtime(runtime.handle().clone()));
        let publisher = builder.bind().unwrap();
        let bystander = place.subscriber().connect().unwrap();
        Self { publisher, bystander, sent: 0, _runtime: runtime, place }
    }

    fn guest(&self) -> Guest {
        Guest::of(&self.place, &self.publisher, DEPTH, OnFullWire::DropOldest)
    }

    /// A message goes through to the bystander, without a gap.
    pub(super) fn exchange(&mut self) {
        self.publisher.blocking_send_timeout(self.sent.to_le_bytes(), LIMIT).unwrap();
        let sample = self.bystander.blocking_recv_timeout(LIMIT).unwrap();
        assert_eq!((&*sample, sample.seq()), (&self.sent.to_le_bytes()[..], self.sent.into()));
        self.sent += 1;
    }

    pub(super) fn exchange_some(&mut self, messages: u32) {
        for _ in 0..messages {
            self.exchange();
        }
    }

    /// Nobody is linked but the bystander, who goes on.
    fn assert_rid_of(&mut self, case: &str, wire: &Wire) {
        let last = wire.hear_out();
        assert!(matches!(last, None | Some(Frame::Segment(_))), "{case}: hung up after {last:?}");
        wait_until(case, || self.publisher.subscriber_count() == 1);
        self.exchange_some(2 * DEPTH);
    }

    pub(super) fn finish(self) {
        drop(self.bystander);
        wait_until("the slots are back", || self.publisher.pool().stats().in_use() == 0);
    }
}

/// What the publisher has logged: it has nobody else to tell what a subscriber did.
static LOG: Mutex<String> = Mutex::new(String::new());

struct Log;

impl tracing::Subscriber for Log {
    fn enabled(&self, metadata: &tracing::Metadata<'_>) -> bool {
        metadata.target().starts_with("tokio_shm")
    }

    fn new_span(&self, _: &tracing::span::Attributes<'_>) -> tracing::span::Id {
        tracing::span::Id::from_u64(1)
    }

    fn record(&self, _: &tracing::span::Id, _: &tracing::span::Record<'_>) {}

    fn record_follows_from(&self, _: &tracing::span::Id, _: &tracing::span::Id) {}

    fn event(&self, event: &tracing::Event<'_>) {
        event.record(&mut |_: &tracing::field::Field, value: &dyn std::fmt::Debug| {
            LOG.lock().push_str(&format!("{value:?}\n"));
        });
    }

    fn enter(&self, _: &tracing::span::Id) {}

    fn exit(&self, _: &tracing::span::Id) {}
}

fn assert_logged(case: &str, expected: &str) {
    let deadline = Instant::now() + LIMIT;
    while !LOG.lock().contains(expected) {
        assert!(Instant::now() < deadline, "{case}: {:?} does not say {expected:?}", LOG.lock());
        std::thread::sleep(Duration::from_micros(200));
    }
    LOG.lock().clear();
}

fn null() -> OwnedFd {
    std::fs::File::open("/dev/null").unwrap().into()
}

/// What nobody who subscribes says, as first frame or later.
fn others_frames() -> Vec<Frame> {
    let (publisher, on_full) = (1, OnFullWire::Wait);
    vec![
        Frame::Welcome(Welcome { publisher, expect_seq: 0, next_seq: 0, depth: 1, on_full }),
        Frame::Refused(RefusedReason::Stuck),
        Frame::Segment(Segment { id: 1, len: 4096, backing: BackingWire::Memfd }),
        Frame::Retire { id: 1 },
        Frame::Bye,
    ]
}

/// What a hostile subscriber does on a link that stands.
type Deed = (&'static str, fn(&mut Attacked, &Guest), &'static str);

/// Where [`Page::scribble`] has the release bitmap behind four entries.
const RELEASED: usize = CONTROL_WORDS + 4 * 4;

const DEEDS: &[Deed] = &[
    (
        "leave twice",
        |_, guest| {
            assert!(guest.wire.say(Frame::Leave, &[]));
            assert!(guest.wire.say(Frame::Leave, &[]));
        },
        "sent a Leave frame out of turn",
    ),
    (
        "leave with a descriptor",
        |_, guest| assert!(guest.wire.say(Frame::Leave, &[null().as_fd()])),
        "sent 1 file descriptors with a frame that takes 0",
    ),
    (
        "leave with many",
        |_, guest| {
            let null = null();
            assert!(guest.wire.say(Frame::Leave, &vec![null.as_fd(); 200]));
        },
        "sent 5 file descriptors with a frame that takes 0",
    ),
    (
        "greet again",
        |_, guest| assert!(guest.wire.say(hello(1, OnFullWire::Wait), &[])),
        "sent a Hello frame out of turn",
    ),
    (
        "a ticket that is not",
        |this, guest| {
            this.exchange_some(DEPTH);
            guest.view().scribble(RELEASED, 1 << 5);
            this.exchange();
        },
        "used ticket 5 on a link that has 3",
    ),
    (
        "a ticket not held",
        |this, guest| {
            this.exchange();
            guest.view().scribble(HEAD, 1);
            guest.view().scribble(RELEASED, 0b11);
            assert!(guest.wire.say(Frame::Leave, &[]));
        },
        "gave back ticket 1, which it did not hold",
    ),
    (
        "a head past the tail",
        |this, guest| {
            this.exchange_some(DEPTH);
            guest.view().scribble(HEAD, 100);
            this.exchange();
        },
        "moved the ring's head to 100, past its tail 3",
    ),
    (
        "a head at the end of numbers",
        |this, guest| {
            this.exchange_some(DEPTH);
            guest.view().scribble(HEAD, u64::MAX);
            this.exchange();
        },
        "moved the ring's head to 18446744073709551615, past its tail 3",
    ),
    (
        "a head that goes back",
        |this, guest| {
            this.exchange_some(DEPTH);
            guest.view().scribble(HEAD, 2);
            this.exchange();
            guest.view().scribble(HEAD, 0);
            this.exchange();
        },
        "moved the ring's head back from 3 to 0",
    ),
    (
        "messages given back unread",
        |this, guest| {
            this.exchange_some(DEPTH);
            guest.view().scribble(RELEASED, 0b111);
            this.exchange_some(DEPTH + 1);
        },
        "had not received, so that 6 are queued on a ring for 4",
    ),
    (
        "one message given back unread",
        |this, guest| {
            this.exchange_some(DEPTH);
            guest.view().scribble(RELEASED, 0b001);
            this.exchange_some(2);
        },
        "gave back the message at ring position 0 without having received it",
    ),
];

#[test]
fn hostile_subscriber_is_told_off_by_name_and_leaves_nothing() {
    run_alone("hostile::publisher::child_faults");
}

#[test]
#[ignore = "the child half of hostile_subscriber_is_told_off_by_name_and_leaves_nothing"]
fn child_faults() {
    if !is_alone() {
        return;
    }
    tracing::subscriber::set_global_default(Log).unwrap();
    // What a process makes once and keeps.
    let mut this = Attacked::new();
    this.exchange();
    this.finish();
    let before = Footprint::now();

    let mut this = Attacked::new();
    this.exchange();
    let refused = |this: &mut Attacked, case: &str, packet: &[u8], fds: usize, expected: &str| {
        let (wire, null) = (Guest::connect(&this.place, &this.publisher), null());
        assert!(wire.say_raw(packet, &vec![null.as_fd(); fds]));
        assert_eq!(wire.hear_out(), Some(Frame::Refused(RefusedReason::NotUnderstood)), "{case}");
        assert_logged(case, expected);
        this.exchange();
    };
    let good = hello(DEPTH, OnFullWire::Wait);
    for (packet, expected) in bad_packets(good) {
        refused(&mut this, "a bad packet first", &packet, 0, expected);
        let guest = this.guest();
        assert!(guest.wire.say_raw(&packet, &[]));
        this.assert_rid_of(expected, &guest.wire);
        assert_logged("a bad packet later", expected);
    }
    for frame in others_frames() {
        let expected = format!("sent a {} frame out of turn", frame.name());
        refused(&mut this, "another's frame", &encoded(frame), 0, &expected);
        let guest = this.guest();
        assert!(guest.wire.say(frame, &[]));
        this.assert_rid_of(&expected, &guest.wire);
        assert_logged("another's frame later", &expected);
    }
    for (fds, said) in [(1, 1), (4, 4), (5, 5), (253, 5)] {
        let expected = format!("sent {said} file descriptors with a frame that takes 0");
        refused(&mut this, "descriptors", &encoded(good), fds, &expected);
    }
    for (at, value, expected) in
        [(40, [0; 4], "depth cannot be 0"), (40, [1, 0, 1, 0], "depth cannot be 65537")]
    {
        let mut packet = encoded(good);
        packet[at..at + 4].copy_from_slice(&value);
        refused(&mut this, "a depth", &packet, 0, expected);
    }
    let mut packet = encoded(good);
    packet[44] = 9;
    refused(&mut this, "a policy", &packet, 0, "policy cannot be 9");
    for (case, act, expected) in DEEDS {
        let guest = this.guest();
        wait_until(case, || this.publisher.subscriber_count() == 2);
        LOG.lock().clear();
        act(&mut this, &guest);
        this.assert_rid_of(case, &guest.wire);
        assert_logged(case, expected);
    }
    this.finish();
    before.assert_back();
}
