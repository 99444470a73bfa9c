//! How a publisher ends: what was accepted arrives, and subscribers are told that nothing is missing only where that is so.

mod support;

use std::process::exit;
use std::time::Duration;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use support::{Dir, LIMIT, Peer, Role, skipped, wait_until};
use tokio::runtime::{Builder, Runtime};
use tokio_shm::{OnFull, RecvError, ShmSubscriber};

fn runtimes() -> [Runtime; 2] {
    [Builder::new_current_thread(), Builder::new_multi_thread()]
        .map(|mut builder| builder.worker_threads(2).enable_all().build().unwrap())
}

/// What comes until the end: the numbers of messages, how many were missed, and what the end was.
fn read_all(subscriber: &mut ShmSubscriber) -> (Vec<u64>, u64, RecvError) {
    let (mut numbers, mut missed) = (Vec::new(), 0);
    loop {
        match subscriber.blocking_recv_timeout(LIMIT) {
            Ok(sample) => numbers.push(u64::from_le_bytes(sample[..8].try_into().unwrap())),
            Err(RecvError::Lagged { missed: count, .. }) => missed += count,
            Err(end) => return (numbers, missed, end),
        }
    }
}

const MESSAGES: u64 = 500;

/// As a program that knows nothing of `close`.
#[test]
fn child_sends_and_returns_from_main() {
    let Some(role) = Role::of("child_sends_and_returns_from_main") else { return };
    let [current_thread, multi_thread] = runtimes();
    let runtime = if role.hear().unwrap() == "current" { current_thread } else { multi_thread };
    runtime.block_on(async {
        let publisher = role.publisher("t").bind().unwrap();
        role.say("bound");
        publisher.wait_for_subscribers(1).await;
        for number in 0..MESSAGES {
            publisher.send(number.to_le_bytes()).await.unwrap();
        }
    });
    drop(runtime);
    exit(0);
}

#[test]
fn messages_accepted_before_the_end_of_main_arrive() {
    let mut lost = 0;
    for flavor in ["current", "multi"].into_iter().cycle().take(12) {
        let dir = Dir::new();
        let mut child = Peer::start("child_sends_and_returns_from_main", &dir);
        child.tell(flavor);
        assert_eq!(child.hear(), "bound");
        let mut subscriber = dir.subscriber("t").end_with_last_publisher(true).connect().unwrap();
        let (numbers, missed, end) = read_all(&mut subscriber);
        assert_eq!(missed, 0);
        child.finish();
        match end {
            RecvError::Closed => assert!(numbers.iter().copied().eq(0..MESSAGES), "{}", numbers.len()),
            // The end waits for a tenth of a second only: this process may not have had a processor for so long.
            RecvError::PublisherLost { .. } => lost += 1,
            end => panic!("{end:?}"),
        }
    }
    assert!(lost <= 3, "it waits for those that read");
}

#[test]
fn idle_publisher_gone_with_its_runtime_has_ended_in_order() {
    for runtime in runtimes() {
        let dir = Dir::new();
        let publisher = dir.publisher("t").runtime(runtime.handle().clone()).bind().unwrap();
        let mut subscriber = dir.subscriber("t").end_with_last_publisher(true).connect().unwrap();
        runtime.block_on(publisher.send(7_u64.to_le_bytes())).unwrap();
        drop(runtime);
        let (numbers, missed, end) = read_all(&mut subscriber);
        assert!(numbers == [7] && missed == 0 && matches!(end, RecvError::Closed), "{end:?}");
        assert!(publisher.try_send([1]).unwrap_err().is_closed());
        let other = Builder::new_current_thread().build().unwrap();
        other.block_on(publisher.flush()).unwrap();
        other.block_on(publisher.close()).unwrap();
        drop(subscriber);
        dir.assert_empties();
    }
}

/// A subscriber that does not read keeps the end from being one in order, and nobody for long.
#[test]
fn publisher_gone_with_its_runtime_is_lost_where_something_is_missing() {
    for runtime in runtimes() {
        let dir = Dir::new();
        let publisher = dir.publisher("t").runtime(runtime.handle().clone()).bind().unwrap();
        let mut subscriber = dir.subscriber("t").depth(1).end_with_last_publisher(true).connect().unwrap();
        for number in 0..3_u64 {
            publisher.try_send(number.to_le_bytes()).unwrap();
        }
        drop(runtime);
        let (numbers, missed, end) = read_all(&mut subscriber);
        assert!(numbers == [0] && missed == 0, "{numbers:?}, {missed}");
        assert!(matches!(end, RecvError::PublisherLost { .. }), "{end:?}");
        drop((publisher, subscriber));
        dir.assert_empties();
    }
}

/// More than one round of delivery, and nothing runs any more when the last handle is dropped.
#[test]
fn last_handle_dropped_delivers_all_there_is_room_for() {
    for on_full in [OnFull::Wait, OnFull::DropOldest, OnFull::DropNewest] {
        let dir = Dir::new();
        let [runtime, _] = runtimes();
        let publisher = dir.publisher("t").queue(2_000).runtime(runtime.handle().clone()).bind().unwrap();
        let subscriber = dir.subscriber("t").depth(1_000).on_full(on_full).end_with_last_publisher(true);
        let mut subscriber = subscriber.connect().unwrap();
        let mut sinks: Vec<_> = (0..30).map(|_| publisher.clone()).collect();
        drop(publisher);
        for number in 0..900_u64 {
            use futures::{FutureExt, SinkExt};
            let at = number as usize % sinks.len();
            sinks[at].feed(number.to_le_bytes()).now_or_never().expect("there is a place").unwrap();
        }
        drop(sinks);
        let (numbers, missed, end) = read_all(&mut subscriber);
        assert!(numbers.iter().copied().eq(0..900), "{} of them", numbers.len());
        assert!(missed == 0 && matches!(end, RecvError::Closed), "{end:?}");
        drop((runtime, subscriber));
        dir.assert_empties();
    }
}

const SUBSCRIBERS: usize = 400;
const FILES: u64 = 4_096;

fn raise_files() {
    let maximum = getrlimit(Resource::Nofile).maximum;
    setrlimit(Resource::Nofile, Rlimit { current: Some(FILES), maximum }).unwrap();
}

#[test]
fn child_many_that_have_connected() {
    let Some(role) = Role::of("child_many_that_have_connected") else { return };
    raise_files();
    let connect = |_| role.subscriber("t").depth(2).end_with_last_publisher(true).connect().unwrap();
    let mut subscribers: Vec<_> = (0..SUBSCRIBERS).map(connect).collect();
    role.say("connected");
    if role.hear().as_deref() == Some("killed") {
        let ends = subscribers.iter_mut().map(|subscriber| read_all(subscriber).2);
        let lost = ends.filter(|end| matches!(end, RecvError::PublisherLost { .. })).count();
        return role.say(&format!("lost {lost}"));
    }
    let (mut told, mut silent) = (0, 0);
    for subscriber in &mut subscribers {
        let (numbers, missed, end) = read_all(subscriber);
        assert!(matches!(end, RecvError::Closed), "{end:?}");
        match numbers.len() as u64 + missed {
            0 => silent += 1,
            1 => told += 1,
            more => panic!("{more} where one was sent"),
        }
    }
    role.say(&format!("told {told}, silent {silent}"));
}

#[test]
fn subscribers_in_line_when_the_publisher_ends_are_told_what_they_missed() {
    if getrlimit(Resource::Nofile).maximum.is_some_and(|maximum| maximum < FILES) {
        return skipped(&format!("RLIMIT_NOFILE cannot be raised to {FILES}"));
    }
    raise_files();
    for dropped in [false, true] {
        let dir = Dir::new();
        let [runtime, _] = runtimes();
        let builder = dir.publisher("t").max_subscribers(1_000).runtime(runtime.handle().clone());
        let publisher = builder.bind().unwrap();
        let mut child = Peer::start("child_many_that_have_connected", &dir);
        assert_eq!(child.hear(), "connected");
        // The publisher's runtime has been busy all the time.
        publisher.try_send(0_u64.to_le_bytes()).unwrap();
        if dropped {
            drop(publisher);
        } else {
            runtime.block_on(publisher.close()).unwrap();
        }
        assert_eq!(child.ask("ended"), format!("told {SUBSCRIBERS}, silent 0"));
        child.finish();
        drop(runtime);
    }
}

/// Each `connect` has returned, and what was sent since is missing: a death is no clean end.
#[test]
fn child_busy_until_it_is_killed() {
    let Some(role) = Role::of("child_busy_until_it_is_killed") else { return };
    raise_files();
    let [runtime, _] = runtimes();
    let builder = role.publisher("t").max_subscribers(1_000).runtime(runtime.handle().clone());
    let publisher = builder.bind().unwrap();
    role.say("bound");
    // In a rush, or else it is not looked for new subscribers.
    if role.hear().as_deref() == Some("rush") {
        loop {
            publisher.try_send(0_u64.to_le_bytes()).unwrap();
        }
    }
    role.hear();
}

#[test]
fn subscribers_in_line_when_the_publisher_is_killed_are_told_so() {
    if getrlimit(Resource::Nofile).maximum.is_some_and(|maximum| maximum < FILES) {
        return skipped(&format!("RLIMIT_NOFILE cannot be raised to {FILES}"));
    }
    let dir = Dir::new();
    let mut publisher = Peer::start("child_busy_until_it_is_killed", &dir);
    assert_eq!(publisher.hear(), "bound");
    publisher.tell("sleep");
    let mut child = Peer::start("child_many_that_have_connected", &dir);
    assert_eq!(child.hear(), "connected");
    publisher.kill();
    assert_eq!(child.ask("killed"), format!("lost {SUBSCRIBERS}"));
    child.finish();
    dir.assert_empties();
}

/// At every moment of a connection in a rush: between any two steps of the publisher's.
#[test]
fn subscriber_of_a_rush_whose_publisher_is_killed_is_told_so() {
    for round in 0..20 {
        let dir = Dir::new();
        let mut publisher = Peer::start("child_busy_until_it_is_killed", &dir);
        assert_eq!(publisher.hear(), "bound");
        publisher.tell("rush");
        let builder = dir.subscriber("t").on_full(OnFull::DropOldest).depth(4).end_with_last_publisher(true);
        let mut subscriber = builder.connect().unwrap();
        // The time that passes is what is varied.
        std::thread::sleep(Duration::from_millis(round % 10));
        publisher.kill();
        let (_, _, end) = read_all(&mut subscriber);
        assert!(matches!(end, RecvError::PublisherLost { .. }), "round {round}: {end:?}");
        assert!(matches!(read_all(&mut subscriber).2, RecvError::Closed));
        drop(subscriber);
        dir.assert_empties();
    }
}

/// Death is told to them as well, by what they count and by name.
#[test]
fn subscriber_in_line_when_the_publisher_dies_is_told_so() {
    let dir = Dir::new();
    let [runtime, _] = runtimes();
    let publisher = dir.publisher("t").runtime(runtime.handle().clone()).bind().unwrap();
    let _stuck = dir.subscriber("t").depth(1).connect().unwrap();
    let mut child = Peer::start("child_one_that_has_connected", &dir);
    assert_eq!(child.hear(), "connected");
    for number in 0..3_u64 {
        publisher.try_send(number.to_le_bytes()).unwrap();
    }
    drop(runtime);
    assert_eq!(child.ask("ended"), "lost");
    child.finish();
    wait_until("closed", || publisher.is_closed());
}

#[test]
fn child_one_that_has_connected() {
    let Some(role) = Role::of("child_one_that_has_connected") else { return };
    let mut subscriber = role.subscriber("t").end_with_last_publisher(true).connect().unwrap();
    role.say("connected");
    assert_eq!(role.hear().as_deref(), Some("ended"));
    let (_, _, end) = read_all(&mut subscriber);
    role.say(if matches!(end, RecvError::PublisherLost { .. }) { "lost" } else { "closed" });
}

/// Messages with a segment each, which has to be announced, and a subscriber that reads nothing before the end: its socket has room for
/// fewer announcements than the link has for messages.
#[test]
fn policy_of_a_link_and_its_end_are_the_same_with_a_full_socket() {
    const LEN: usize = 20_000;
    const SENT: u64 = 2_000;
    for (on_full, depth) in
        [(OnFull::DropOldest, 512), (OnFull::DropOldest, 2_000), (OnFull::DropNewest, 2_000)]
    {
        let dir = Dir::new();
        let [runtime, _] = runtimes();
        let publisher = dir.publisher("t").on_full(on_full).runtime(runtime.handle().clone()).bind().unwrap();
        let stalled = dir.subscriber("t").depth(depth).end_with_last_publisher(true);
        let mut stalled = stalled.connect().unwrap();
        for number in 0..SENT {
            let mut loan = publisher.try_loan(LEN).unwrap();
            loan[..8].copy_from_slice(&number.to_le_bytes());
            publisher.try_send(loan).unwrap();
        }
        drop(publisher);
        let (numbers, missed, end) = read_all(&mut stalled);
        let count = numbers.len() as u64;
        assert!(matches!(end, RecvError::Closed), "{end:?}");
        assert_eq!(count + missed, SENT, "each is told of");
        assert!(count >= 100, "{count}");
        let kept = if on_full == OnFull::DropOldest { SENT - count..SENT } else { 0..count };
        assert!(numbers.iter().copied().eq(kept), "{on_full:?}: {numbers:?}");
        drop((runtime, stalled));
        dir.assert_empties();
    }
}
