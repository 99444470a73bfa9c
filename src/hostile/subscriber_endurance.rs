//! What hostile publishers do again and again, or never, and a subscriber that goes on with an honest one.

use rustix::process::Resource;

use super::subscriber::{Between, DEPTH, LEN, announce, segment_fd};
use super::*;
use crate::RecvError;
use crate::link::{Ended, LinkRx, Next, SEGMENTS_MAX};
use crate::proto::ring::{CLAIM_MAX, Descriptor};
use crate::proto::wire::{BackingWire, RefusedReason};
use crate::sys::testing::{is_alone, run_alone, set_limit};

#[test]
fn hostile_publisher_that_refuses_is_named_with_its_reason() {
    for (reason, expected) in [
        (RefusedReason::OutOfResources, "it is out of memory or file descriptors"),
        (RefusedReason::Full, "raise max_subscribers there, or close some"),
        (RefusedReason::Keeping, "keeps too many samples from before it was disconnected"),
        (RefusedReason::NotPermitted, "this user may not subscribe"),
        (RefusedReason::NotUnderstood, "it did not understand this subscriber"),
        (RefusedReason::Stuck, "disconnected us for being stuck"),
    ] {
        let mut this = Between::new();
        assert!(this.wire.say(Frame::Refused(reason), &[]));
        let error = this.receive().expect_err("refused");
        assert!(whole(&error).contains(expected), "{error}");
        this.exchange().unwrap();
    }
}

#[test]
fn hostile_publisher_that_announces_without_end_is_stopped() {
    let (this, _gifts) = Between::welcomed();
    let Between { mut subscriber, wire, .. } = this;
    let announcer = std::thread::spawn(move || {
        let fd = segment_fd();
        let deadline = Instant::now() + LIMIT;
        let mut id = 0;
        while id <= SEGMENTS_MAX as u64 {
            assert!(Instant::now() < deadline, "nobody reads");
            if wire.say(announce(id, LEN, BackingWire::Memfd), &[fd.as_fd()]) {
                id += 1;
            } else {
                std::thread::yield_now();
            }
        }
        wire
    });
    let error = subscriber.blocking_recv_timeout(LIMIT).expect_err("too many");
    assert!(whole(&error).contains("announced more than 8192 segments at a time"), "{error}");
    drop(announcer.join().unwrap());
}

/// Two of them, so that the counts cannot even be added up.
#[test]
fn hostile_publishers_that_count_to_the_end_are_believed_and_harm_nothing() {
    let (mut this, gifts) = Between::welcomed();
    gifts.scribble(OFFERED, u64::MAX);
    assert!(matches!(this.receive(), Err(RecvError::Lagged { missed: u64::MAX, .. })));
    let (other, gifts) = (Host::new(&this.place), Gifts::new(DEPTH));
    this.notice(&other);
    let (wire, _) = other.accept();
    assert!(wire.say(other.welcome(DEPTH), &gifts.fds()));
    gifts.scribble(OFFERED, u64::MAX);
    assert!(matches!(this.receive(), Err(RecvError::Lagged { missed: u64::MAX, .. })));
    assert_eq!(this.subscriber.stats().lagged, u64::MAX);
    this.exchange().unwrap();
}

/// Announces and retires as fast as it is read, which never ends.
#[test]
fn hostile_publisher_that_floods_the_socket_holds_up_nobody() {
    let (this, _gifts) = Between::welcomed();
    let Between { mut subscriber, honest, wire, .. } = this;
    let fd = segment_fd();
    let mut next = announce(1, LEN, BackingWire::Memfd);
    let flood = Again::and_again(move |_| {
        let announces = matches!(next, Frame::Segment(_));
        let fds = [fd.as_fd()];
        if wire.say(next, if announces { &fds } else { &[] }) {
            next = if announces { Frame::Retire { id: 1 } } else { announce(1, LEN, BackingWire::Memfd) };
        }
    });
    let turns = flood.times();
    for number in 0..300_u32 {
        honest.try_send(number.to_le_bytes()).unwrap();
        assert_eq!(*subscriber.blocking_recv_timeout(LIMIT).unwrap(), number.to_le_bytes());
    }
    let short = Duration::from_millis(10);
    assert!(matches!(subscriber.blocking_recv_timeout(short), Err(RecvError::TimedOut)));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        for number in 0..300_u32 {
            honest.try_send(number.to_le_bytes()).unwrap();
            let received = tokio::time::timeout(LIMIT, subscriber.recv()).await;
            assert_eq!(*received.expect("in time").unwrap(), number.to_le_bytes());
        }
        assert!(tokio::time::timeout(short, subscriber.recv()).await.is_err());
        tokio::time::timeout(LIMIT, subscriber.wait_for_publishers(2)).await.unwrap().unwrap();
        assert!(tokio::time::timeout(short, subscriber.wait_for_publishers(3)).await.is_err());
    });
    assert!(flood.times() > turns);
}

#[test]
fn hostile_publishers_that_say_nothing_or_ring_for_ever_cost_nothing() {
    run_alone("hostile::subscriber_endurance::child_idle");
}

#[test]
#[ignore = "the child half of hostile_publishers_that_say_nothing_…"]
fn child_idle() {
    if !is_alone() {
        return;
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let idle = |what: &str, mut this: Between| {
        this.exchange().unwrap();
        assert_idle(what, |time| {
            assert!(matches!(this.subscriber.blocking_recv_timeout(time), Err(RecvError::TimedOut)));
        });
        assert_idle(what, |time| {
            assert!(
                runtime.block_on(async { tokio::time::timeout(time, this.subscriber.recv()).await }).is_err()
            );
        });
        this.exchange().unwrap();
    };
    idle("a publisher that says nothing", Between::new());
    idle("a publisher that has nothing to say", {
        let (this, gifts) = Between::welcomed();
        std::mem::forget(gifts);
        this
    });
    // By level it can be written to, for ever.
    let (this, gifts) = (Between::new(), Gifts::new(DEPTH));
    let ready = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap();
    let [page, _, credit] = gifts.fds();
    assert!(this.wire.say(this.hostile.welcome(DEPTH), &[page, ready.as_fd(), credit]));
    idle("a bell that is ready for ever", this);
}

#[test]
fn hostile_publishers_that_scribble_harm_only_their_links() {
    let mut this = Between::new();
    for seed in 1..=200_u64 {
        let (host, mut gifts) = (Host::new(&this.place), Gifts::new(DEPTH));
        this.notice(&host);
        let (wire, _) = host.accept();
        assert!(wire.say(host.welcome(DEPTH), &gifts.fds()));
        assert!(wire.say(announce(1, LEN, BackingWire::Memfd), &[segment_fd().as_fd()]));
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let scribbler = Again::and_again(move |_| {
            let ticket = random(&mut state) as u32 % DEPTH;
            let seq = gifts.producer.position();
            match random(&mut state) % 8 {
                0 => gifts.scribble(random(&mut state) as usize % gifts.page.view().words(), lie(&mut state)),
                1 => gifts.scribble(OFFERED + random(&mut state) as usize % 2, lie(&mut state)),
                // A message as it should be, or nearly.
                _ => {
                    let descriptor =
                        Descriptor { seq, segment: 1, offset: 64 * (seq % 130), len: seq % 60, ticket };
                    gifts.producer.push(gifts.page.view(), descriptor);
                    gifts.bell.ring();
                }
            }
        });
        let mut honest = 0;
        while honest < 10 {
            if this.take_any() {
                honest += 1;
            }
        }
        drop(scribbler);
    }
}

/// A bell is an eventfd, and whether one waits when it is empty or full belongs to the open file, not to the descriptor.
#[test]
fn hostile_publisher_whose_bell_blocks_keeps_no_release_waiting() {
    for value in [0, u64::MAX - 1] {
        let (this, mut gifts) = (Between::new(), Gifts::new(DEPTH));
        let Between { mut subscriber, wire, hostile, .. } = this;
        let jammed = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap();
        rustix::io::write(&jammed, &value.to_ne_bytes()).unwrap();
        let [page, bell, _] = gifts.fds();
        assert!(wire.say(hostile.welcome(DEPTH), &[page, bell, jammed.as_fd()]));
        assert!(wire.say(announce(1, LEN, BackingWire::Memfd), &[segment_fd().as_fd()]));
        let descriptor = Descriptor { seq: 0, segment: 1, offset: 0, len: 8, ticket: 0 };
        gifts.producer.push(gifts.page.view(), descriptor);
        gifts.bell.ring();
        let sample = subscriber.blocking_recv_timeout(LIMIT).unwrap();
        gifts.page.view().control.credit_armed.store(1, Ordering::Relaxed);
        let (released, has_released) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            drop(sample);
            let _ = released.send(());
        });
        has_released.recv_timeout(LIMIT).expect("it rings, and goes on");
        assert_eq!(gifts.page.view().control.credit_armed.load(Ordering::Relaxed), 0, "it has rung");
    }
}

/// A publisher that goes on as fast as its messages are taken, which never ends either.
#[test]
fn hostile_publisher_that_goes_on_does_not_keep_a_subscriber_from_leaving() {
    let (place, depth) = (Place::new(), 1 << 16);
    let host = Host::new(&place);
    let mut subscriber = place.subscriber().depth(depth).connect().unwrap();
    let (wire, _) = host.accept();
    let gifts = Arc::new(Gifts::new(depth));
    assert!(wire.say(host.welcome(depth), &gifts.fds()));
    assert!(subscriber.blocking_recv_timeout(Duration::ZERO).is_err());
    assert_eq!(subscriber.publisher_count(), 1);
    let publisher = Arc::clone(&gifts);
    let mut producer = Producer::new();
    let _going_on = Again::and_again(move |_| {
        let page = publisher.page.view();
        while producer.position() < page.control.head.load(Ordering::Acquire) + u64::from(depth) {
            let seq = producer.position();
            producer
                .push(page, Descriptor { seq, segment: 1, offset: 0, len: 8, ticket: seq as u32 % depth });
        }
    });
    let (left, has_left) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        drop(subscriber);
        let _ = left.send(());
    });
    has_left.recv_timeout(LIMIT).expect("it has left");
    let taken = gifts.page.view().control.head.load(Ordering::Acquire);
    assert!(taken < u64::from(depth) + CLAIM_MAX as u64, "took {taken} messages before it left");
}

#[test]
fn hostile_frames_by_the_hundred_are_not_all_read_in_one_go() {
    let (ours, theirs) = crate::sys::socket::pair().unwrap();
    let (wire, gifts, fd) = (Wire(theirs), Gifts::new(DEPTH), segment_fd());
    let mut link = LinkRx::begin(1, ours, DEPTH, None, 1, &crate::access::Access::default(), None).unwrap();
    let on_full = OnFullWire::Wait;
    let welcome = Welcome { publisher: 1, expect_seq: 0, next_seq: 0, depth: DEPTH, on_full };
    assert!(wire.say(Frame::Welcome(welcome), &gifts.fds()));
    for _ in 0..50 {
        assert!(wire.say(announce(1, LEN, BackingWire::Memfd), &[fd.as_fd()]));
        assert!(wire.say(Frame::Retire { id: 1 }, &[]));
    }
    link.read_socket();
    // It has to be read again, though its readiness has been taken.
    assert!(link.is_unread() && link.has_something());
    link.read_socket();
    assert!(!link.is_unread() && !link.has_something());
}

/// A subscriber's link that is welcomed, and that has met two segments, of which the first `messages` have one, without a
/// descriptor to take them. For a child half.
fn short_of_descriptors(messages: u64) -> (LinkRx, Wire, Gifts) {
    let (ours, theirs) = crate::sys::socket::pair().unwrap();
    let (wire, mut gifts, fd) = (Wire(theirs), Gifts::new(DEPTH), segment_fd());
    let mut link = LinkRx::begin(1, ours, DEPTH, None, 1, &crate::access::Access::default(), None).unwrap();
    let on_full = OnFullWire::Wait;
    let welcome = Welcome { publisher: 1, expect_seq: 0, next_seq: 0, depth: DEPTH, on_full };
    assert!(wire.say(Frame::Welcome(welcome), &gifts.fds()));
    link.read_socket();
    assert!(link.is_established());
    for seq in 0..2 {
        let descriptor = Descriptor { seq, segment: seq + 1, offset: 0, len: 8, ticket: seq as u32 };
        assert!(wire.say(announce(seq + 1, LEN, BackingWire::Memfd), &[fd.as_fd()]));
        if seq < messages {
            gifts.producer.push(gifts.page.view(), descriptor);
        }
    }
    set_limit(Resource::Nofile, 3);
    link.read_socket();
    assert!(matches!(link.next(), Next::Short(_)));
    (link, wire, gifts)
}

#[test]
fn limit_descriptors_when_the_publisher_dies_keep_the_end_until_all_is_read() {
    run_alone("hostile::subscriber_endurance::child_dies_while_short");
}

#[test]
#[ignore = "the child half of limit_descriptors_when_the_publisher_dies_…"]
fn child_dies_while_short() {
    if !is_alone() {
        return;
    }
    let (mut link, _wire, _gifts) = short_of_descriptors(2);
    link.process_ended();
    for _ in 0..3 {
        assert!(matches!(link.next(), Next::Short(_)) && link.is_unread());
        link.read_socket();
    }
    set_limit(Resource::Nofile, 1024);
    for seq in 0..2 {
        let next = link.next();
        assert!(matches!(&next, Next::Sample(sample) if sample.seq() == seq), "{next:?}");
    }
    // Its socket is open, as a child of that process may have it.
    link.read_socket();
    assert!(matches!(link.next(), Next::Ended(Ended::Lost)));
}
