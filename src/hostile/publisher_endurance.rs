//! What hostile subscribers do again and again, or never: floods, silence, scribbling. A publisher's other subscribers go
//! on, and where there is nothing to do, nothing is done.

use std::collections::VecDeque;

use rustix::process::Resource;

use super::publisher::Attacked;
use super::subscriber::DEPTH;
use super::*;
use crate::OnFull;
use crate::link::{InFlight, LinkTx};
use crate::proto::wire::RefusedReason;
use crate::publisher::links::{ACCEPT_MAX, SILENT_MAX};
use crate::sys::socket::pair;
use crate::sys::testing::{drop_capabilities, is_alone, open_descriptors, run_alone, set_limit};
use crate::{RecvError, ShmPoolConfig, TryRecvError};

#[test]
fn hostile_subscribers_by_the_thousand_that_say_nothing_are_few_at_a_time_and_cost_nothing() {
    run_alone("hostile::publisher_endurance::child_silent");
}

#[test]
#[ignore = "the child half of hostile_subscribers_by_the_thousand_…"]
fn child_silent() {
    if !is_alone() {
        return;
    }
    set_limit(Resource::Nofile, 4096);
    let mut this = Attacked::new();
    this.exchange();
    // What it makes at its first sleep.
    assert!(this.bystander.blocking_recv_timeout(Duration::from_millis(1)).is_err());
    let before = open_descriptors();
    let mut silent = Vec::new();
    for _ in 0..1_000 {
        silent.push(Guest::connect(&this.place, &this.publisher));
        this.exchange();
    }
    // With the publisher in this process, both ends are counted.
    let settled = || open_descriptors() <= before + silent.len() + SILENT_MAX;
    wait_until("most are turned away", settled);
    assert!(open_descriptors() >= before + silent.len() + SILENT_MAX, "more than need be");
    let mut honest = this.place.subscriber().connect().unwrap();
    this.exchange();
    assert_eq!(honest.blocking_recv_timeout(LIMIT).unwrap().seq(), 1_001);
    assert_idle("a publisher with silent connections", std::thread::sleep);
    // The first came too early, and the last is still free to speak.
    assert_eq!(silent[0].hear_out(), Some(Frame::Refused(RefusedReason::OutOfResources)));
    let last = silent.pop().unwrap();
    assert!(last.say(hello(1, OnFullWire::DropNewest), &[]));
    assert!(matches!(last.hear(), Some((Frame::Welcome(_), _))));
    drop((silent, last, honest));
    wait_until("all are gone", || open_descriptors() <= before);
    this.exchange();
    this.finish();
}

#[test]
fn hostile_subscribers_that_connect_and_go_without_end_hold_up_nobody() {
    run_alone("hostile::publisher_endurance::child_flood");
}

#[test]
#[ignore = "the child half of hostile_subscribers_that_connect_and_…"]
fn child_flood() {
    if !is_alone() {
        return;
    }
    set_limit(Resource::Nofile, 16_384);
    let mut this = Attacked::new();
    let (path, id) = (this.place.0.path().to_owned(), this.publisher.id());
    let runtime = RuntimeDir::resolve(Some(&path), crate::access::Access::default()).unwrap();
    let topic = TopicDir::open(&runtime, &TopicName::new("t").unwrap()).unwrap();
    let flood = Again::and_again(move |turn| {
        // Fails where too many are in line.
        if let Ok(connection) = topic.connect(id)
            && turn.is_multiple_of(16)
        {
            Wire(connection).say(hello(64, OnFullWire::Wait), &[]);
        }
    });
    let turns = flood.times();
    this.exchange_some(500);
    wait_until("the flood goes on", || flood.times() > turns + 500);
    drop(flood);
    wait_until("they are gone", || this.publisher.subscriber_count() == 1);
    this.exchange();
    this.finish();
}

/// Whoever sends accepts some of those in line, and leaves the rest to the tx task: there may be no end to them.
#[test]
fn hostile_line_of_subscribers_is_accepted_in_more_than_one_go() {
    run_alone("hostile::publisher_endurance::child_line");
}

#[test]
#[ignore = "the child half of hostile_line_of_subscribers_…"]
fn child_line() {
    if !is_alone() {
        return;
    }
    set_limit(Resource::Nofile, 4096);
    let place = Place::new();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let builder = place.publisher().max_subscribers(1_000).runtime(runtime.handle().clone());
    let publisher = builder.bind().unwrap();
    let line: Vec<_> = (0..2 * ACCEPT_MAX + 1).map(|_| Guest::connect(&place, &publisher)).collect();
    for wire in &line {
        assert!(wire.say(hello(1, OnFullWire::Wait), &[]));
    }
    publisher.try_send([1]).unwrap();
    assert_eq!(publisher.subscriber_count(), ACCEPT_MAX);
    let all = publisher.wait_for_subscribers(line.len());
    runtime.block_on(async { tokio::time::timeout(LIMIT, all).await }).expect("the rest");
}

#[test]
fn hostile_subscriber_that_never_reads_loses_its_own_messages_only() {
    run_alone("hostile::publisher_endurance::child_never_reads");
}

#[test]
#[ignore = "the child half of hostile_subscriber_that_never_reads_…"]
fn child_never_reads() {
    if !is_alone() {
        return;
    }
    set_limit(Resource::Nofile, 16_384);
    let pool = ShmPoolConfig::new().pooling(false);
    let mut this = Attacked::with(|builder| builder.pool(pool));
    let deep = Guest::of(&this.place, &this.publisher, 5_000, OnFullWire::DropNewest);
    // Each message is announced, until its socket is full.
    this.exchange_some(2_000);
    assert!(this.publisher.stats().dropped > 0);
    drop(deep);
    this.exchange();
    this.finish();
}

#[test]
fn hostile_subscriber_that_never_takes_is_evicted_and_the_others_go_on() {
    let mut this = Attacked::with(|builder| builder.evict_after(Duration::from_millis(20)));
    let guest = Guest::of(&this.place, &this.publisher, 1, OnFullWire::Wait);
    this.exchange_some(100);
    let mut last = guest.wire.hear_out();
    assert_eq!(last.take(), Some(Frame::Refused(RefusedReason::Stuck)));
    this.finish();
}

#[test]
fn hostile_subscriber_that_fills_and_rings_what_it_was_given_hinders_nobody() {
    let mut this = Attacked::new();
    let guest = Guest::of(&this.place, &this.publisher, DEPTH, OnFullWire::DropOldest);
    for bell in [&guest.bell, &guest.credit] {
        // The flag belongs to the open file, and so to the publisher's end as well.
        rustix::fs::fcntl_setfl(bell, rustix::fs::OFlags::empty()).unwrap();
        // It was rung once when it was made: there is room, and this does not wait itself.
        rustix::io::write(bell, &1_u64.to_ne_bytes()).unwrap();
    }
    this.exchange_some(100);
    let rings = Again::and_again(move |_| {
        for bell in [&guest.bell, &guest.credit] {
            bell.ring();
            rustix::io::write(bell, &1_u64.to_ne_bytes()).unwrap();
        }
        guest.view().scribble(DATA_ARMED, 1);
        guest.view().scribble(CREDIT_ARMED, u64::MAX);
    });
    this.exchange_some(500);
    wait_until("it goes on", || rings.times() > 500);
    drop(rings);
    this.exchange();
    this.finish();
}

#[test]
fn hostile_subscribers_that_scribble_harm_only_their_links() {
    let mut this = Attacked::new();
    for seed in 1..=200_u64 {
        let depth = (seed % 9 + 1) as u32;
        let policy = [OnFullWire::DropOldest, OnFullWire::DropNewest][seed as usize % 2];
        let guest = Guest::of(&this.place, &this.publisher, depth, policy);
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let scribbler = Again::and_again(move |turn| {
            let view = guest.view();
            // Mostly what it may write, and mostly often.
            let at = match random(&mut state) % 4 {
                0 => HEAD,
                1 => {
                    CONTROL_WORDS + view.entries.len() * 4 + random(&mut state) as usize % view.released.len()
                }
                _ => random(&mut state) as usize % view.words(),
            };
            view.scribble(at, lie(&mut state));
            if turn == 5_000 {
                guest.wire.say(Frame::Leave, &[]);
            }
        });
        this.exchange_some(10);
        drop(scribbler);
    }
    wait_until("all are gone", || this.publisher.subscriber_count() == 1);
    this.exchange();
    this.finish();
}

/// Where nobody says that descriptors have come free, time must.
#[test]
fn hostile_shortage_of_descriptors_ends_and_who_was_in_line_is_welcomed() {
    run_alone("hostile::publisher_endurance::child_shortage");
}

#[test]
#[ignore = "the child half of hostile_shortage_of_descriptors_…"]
fn child_shortage() {
    if !is_alone() {
        return;
    }
    let place = Place::new();
    let (runtime, publisher) = place.idle_publisher();
    runtime.block_on(tokio::task::yield_now());
    let wire = Guest::connect(&place, &publisher);
    assert!(wire.say(hello(1, OnFullWire::Wait), &[]));
    set_limit(Resource::Nofile, 3);
    assert_idle("a publisher that cannot accept", |time| {
        runtime.block_on(async { tokio::time::sleep(time).await })
    });
    assert_eq!(publisher.subscriber_count(), 0);
    set_limit(Resource::Nofile, 1024);
    let welcomed =
        runtime.block_on(async { tokio::time::timeout(LIMIT, publisher.wait_for_subscribers(1)).await });
    welcomed.expect("welcomed");
}

#[test]
fn hostile_crowd_of_descriptors_under_way_delays_a_segment_and_ends_no_link() {
    run_alone("hostile::publisher_endurance::child_crowd");
}

#[test]
#[ignore = "the child half of hostile_crowd_of_descriptors_…"]
fn child_crowd() {
    if !is_alone() {
        return;
    }
    let place = Place::new();
    let (runtime, publisher) = place.idle_publisher();
    let mut subscriber = place.subscriber().connect().unwrap();
    publisher.try_send([1]).unwrap();
    let received = runtime.block_on(async { tokio::time::timeout(LIMIT, subscriber.recv()).await });
    assert_eq!(*received.expect("the first").unwrap(), [1]);

    drop_capabilities();
    let most = rustix::process::getrlimit(Resource::Nofile).maximum.unwrap_or(u64::MAX);
    set_limit(Resource::Nofile, most);
    let ((crowd, crowded), null) = (pair().unwrap(), std::fs::File::open("/dev/null").unwrap());
    let crowd = Wire(crowd);
    // More than the limit will be, whatever others of this user have under way.
    for _ in 0..3 {
        assert!(crowd.say_raw(b"x", &[null.as_fd(); 100]));
    }
    set_limit(Resource::Nofile, 128);
    publisher.try_send(vec![2; 100_000]).unwrap();
    assert_idle("a publisher in a crowd", |time| runtime.block_on(async { tokio::time::sleep(time).await }));
    assert!(matches!(subscriber.try_recv(), Err(TryRecvError::Empty)));
    drop((crowd, crowded));
    set_limit(Resource::Nofile, most);
    let received = runtime.block_on(async { tokio::time::timeout(LIMIT, subscriber.recv()).await });
    assert_eq!(received.expect("the crowd has gone").unwrap().len(), 100_000);
}

#[test]
fn hostile_crowd_of_descriptors_under_way_has_a_newcomer_refused_instead_of_kept_waiting() {
    run_alone("hostile::publisher_endurance::child_unwelcome");
}

#[test]
#[ignore = "the child half of hostile_crowd_of_descriptors_under_way_has_…"]
fn child_unwelcome() {
    if !is_alone() {
        return;
    }
    let place = Place::new();
    let (runtime, publisher) = place.idle_publisher();
    drop_capabilities();
    let most = rustix::process::getrlimit(Resource::Nofile).maximum.unwrap_or(u64::MAX);
    set_limit(Resource::Nofile, most);
    let ((crowd, crowded), null) = (pair().unwrap(), std::fs::File::open("/dev/null").unwrap());
    let crowd = Wire(crowd);
    for _ in 0..3 {
        assert!(crowd.say_raw(b"x", &[null.as_fd(); 100]));
    }
    set_limit(Resource::Nofile, 128);
    let wire = Guest::connect(&place, &publisher);
    assert!(wire.say(hello(1, OnFullWire::Wait), &[]));
    publisher.try_send([1]).unwrap();
    assert_eq!(wire.hear_out(), Some(Frame::Refused(RefusedReason::OutOfResources)));
    assert_eq!(publisher.subscriber_count(), 0);
    drop((crowd, crowded));
    set_limit(Resource::Nofile, most);
    let wire = Guest::connect(&place, &publisher);
    assert!(wire.say(hello(1, OnFullWire::Wait), &[]));
    runtime.block_on(async { tokio::time::timeout(LIMIT, publisher.wait_for_subscribers(1)).await.unwrap() });
    assert!(matches!(wire.hear(), Some((Frame::Welcome(_), _))));
}

/// Then there is no room to refuse either, and the end has to do.
#[test]
fn hostile_socket_without_room_for_a_welcome_is_closed() {
    let place = Place::new();
    let (_runtime, publisher) = place.idle_publisher();
    let (ours, theirs) = pair().unwrap();
    let (ours, theirs) = (Arc::new(ours), Wire(theirs));
    let retire = encoded(Frame::Retire { id: 1 });
    while ours.send(&retire, &[]).unwrap() {}
    let geometry = Geometry::new(1).unwrap();
    let (seed, _) =
        LinkTx::prepare(1, Arc::clone(&ours), geometry, OnFull::Wait, 0, Arc::default(), Arc::default())
            .unwrap();
    let mut in_flight = InFlight::new(Arc::clone(publisher.pool().core()));
    let welcomed = seed.welcome(1, 0, 0, &VecDeque::new(), &mut in_flight);
    assert!(welcomed.is_err());
    // Open still on our side, and yet at its end.
    assert_eq!(theirs.hear_out(), Some(Frame::Retire { id: 1 }));
    drop(ours);
}

/// Connects and greets until there is a seat.
fn seated(this: &Attacked) -> Wire {
    let deadline = Instant::now() + LIMIT;
    loop {
        let wire = Guest::connect(&this.place, &this.publisher);
        assert!(wire.say(hello(1, OnFullWire::DropNewest), &[]));
        match wire.hear() {
            Some((Frame::Welcome(_), _)) => return wire,
            Some((Frame::Refused(RefusedReason::Full), _)) => {}
            other => panic!("{other:?}"),
        }
        assert!(Instant::now() < deadline, "no seat comes free");
    }
}

fn assert_full(this: &Attacked) {
    let wire = Guest::connect(&this.place, &this.publisher);
    assert!(wire.say(hello(1, OnFullWire::DropNewest), &[]));
    assert_eq!(wire.hear_out(), Some(Frame::Refused(RefusedReason::Full)));
}

#[test]
fn hostile_crowd_of_greeters_is_refused_beyond_the_cap_and_hinders_nobody() {
    run_alone("hostile::publisher_endurance::child_greeters");
}

#[test]
#[ignore = "the child half of hostile_crowd_of_greeters_…"]
fn child_greeters() {
    if !is_alone() {
        return;
    }
    let mut this = Attacked::with(|builder| builder.max_subscribers(3));
    this.exchange();
    // What it makes at its first sleep.
    assert!(this.bystander.blocking_recv_timeout(Duration::from_millis(1)).is_err());
    let before = open_descriptors();
    let (first, second) = (seated(&this), seated(&this));
    let full = open_descriptors();
    let mut crowd = Vec::new();
    for _ in 0..500 {
        let wire = Guest::connect(&this.place, &this.publisher);
        assert!(wire.say(hello(64, OnFullWire::Wait), &[]));
        crowd.push(wire);
        this.exchange();
    }
    for wire in &crowd {
        assert_eq!(wire.hear_out(), Some(Frame::Refused(RefusedReason::Full)));
    }
    assert_eq!(this.publisher.subscriber_count(), 3);
    wait_until("the refused cost nothing", || open_descriptors() <= full + crowd.len());
    drop(crowd);
    // Who is leaving, and may hold something, is here still.
    assert!(second.say(Frame::Leave, &[]));
    wait_until("it is leaving", || this.publisher.subscriber_count() == 2);
    assert_full(&this);
    drop(first);
    let third = seated(&this);
    assert_full(&this);
    drop(second);
    let fourth = seated(&this);
    assert_full(&this);
    this.exchange_some(100);
    drop((third, fourth));
    wait_until("all are gone", || open_descriptors() <= before);
    this.exchange();
    this.finish();
}

#[test]
fn limit_of_subscribers_says_so_and_a_seat_that_came_free_is_taken_when_a_publisher_comes() {
    let place = Place::new();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let _entered = runtime.enter();
    let publisher = place.publisher().max_subscribers(1).bind().unwrap();
    let mut first = place.subscriber().connect().unwrap();
    let mut second = place.subscriber().connect().unwrap();
    publisher.try_send([1]).unwrap();
    let on_a_thread = |subscriber: &mut ShmSubscriber| {
        std::thread::scope(|scope| scope.spawn(|| subscriber.blocking_recv_timeout(LIMIT)).join().unwrap())
    };
    match on_a_thread(&mut second) {
        Err(error @ RecvError::Refused { publisher: by, .. }) if by == publisher.id() => {
            assert!(
                error.to_string().contains("as many subscribers as it may; raise max_subscribers"),
                "{error}"
            );
        }
        other => panic!("{other:?}"),
    }
    let sample = on_a_thread(&mut first).unwrap();
    assert_eq!(*sample, [1]);
    drop((sample, first));
    wait_until("the first has left", || publisher.subscriber_count() == 0);
    let mut other = None;
    wait_until("it has looked again", || {
        other = Some(place.publisher().bind().unwrap());
        let _ = second.try_recv();
        publisher.subscriber_count() == 1
    });
    publisher.try_send([2]).unwrap();
    drop(other);
    assert_eq!(*on_a_thread(&mut second).unwrap(), [2]);
}

#[test]
fn limit_of_subscribers_out_of_bounds_says_so() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    for most in [0, 65_537] {
        let place = Place::new();
        let builder = place.publisher().runtime(runtime.handle().clone());
        let error = builder.max_subscribers(most).bind().unwrap_err();
        assert_eq!(error.to_string(), format!("max_subscribers must be between 1 and 65536, not {most}"));
    }
}
