//! What receiving tells beside messages: notices, after which it goes on, and ends, after which it does not.

#![allow(unsafe_code, reason = "fork")]

mod support;

use std::time::Duration;

use futures::StreamExt as _;
use futures::stream::FusedStream as _;
use support::{Dir, Peer, Role, until, wait_until, within};
use tokio_shm::{BusyPoll, OnFull, RecvError, ShmSample, ShmSubscriber, TryRecvError};
use tokio_test::{assert_ready, task};

fn text(error: &RecvError) -> String {
    error.to_string()
}

/// Takes what is there now, without a runtime.
fn take_next(subscriber: &mut ShmSubscriber) -> Result<ShmSample, RecvError> {
    let mut next = None;
    wait_until("something comes", || {
        next = match subscriber.try_recv() {
            Err(TryRecvError::Empty) => None,
            Err(TryRecvError::Recv(error)) => Some(Err(error)),
            Err(other) => panic!("{other}"),
            Ok(sample) => Some(Ok(sample)),
        };
        next.is_some()
    });
    next.unwrap()
}

#[test]
fn role_publisher() {
    let Some(role) = Role::of("role_publisher") else { return };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let publisher = role.publisher("t").bind().unwrap();
        within("subscribers", publisher.wait_for_subscribers(2)).await;
        for number in 0..10_u8 {
            publisher.send([number]).await.unwrap();
        }
        role.say(&format!("{:032x}", publisher.id()));
        assert_eq!(role.hear().as_deref(), Some("close"));
        publisher.close().await.unwrap();
        role.say("closed");
    });
}

#[tokio::test]
async fn close_of_a_publisher_is_told_after_its_last_message_where_asked_for() {
    let dir = Dir::new();
    let mut asked = dir.subscriber("t").publisher_events(true).connect().unwrap();
    let mut other = dir.subscriber("t").end_with_last_publisher(true).connect().unwrap();
    let mut peer = Peer::start("role_publisher", &dir);
    let reader = tokio::spawn(async move {
        let mut told = Vec::new();
        for _ in 0..11 {
            told.push(within("next", asked.recv()).await.map(|sample| sample[0]));
        }
        (asked, told)
    });
    let other = tokio::spawn(async move {
        // Who did not ask is told the end alone.
        for number in 0..10_u8 {
            assert_eq!(*within("recv", other.recv()).await.unwrap(), [number]);
        }
        assert!(matches!(within("end", other.recv()).await, Err(RecvError::Closed)));
    });
    let id = tokio::task::spawn_blocking(move || {
        let id = peer.hear();
        assert_eq!(peer.ask("close"), "closed");
        peer.finish();
        id
    });
    let id = id.await.unwrap();
    let (mut asked, told) = reader.await.unwrap();
    for (number, told) in (0..10_u8).zip(&told) {
        assert_eq!(*told.as_ref().unwrap(), number);
    }
    let closed = told.last().unwrap().as_ref().unwrap_err();
    assert!(!closed.is_terminal());
    assert!(matches!(closed, RecvError::PublisherClosed { publisher } if format!("{publisher:032x}") == id));
    assert!(text(closed).contains(&id), "{closed}");
    other.await.unwrap();
    // And receiving goes on.
    let next = dir.publisher("t").bind().unwrap();
    within("publisher", asked.wait_for_publishers(1)).await.unwrap();
    next.send([7]).await.unwrap();
    assert_eq!(*within("recv", asked.recv()).await.unwrap(), [7]);
}

#[tokio::test]
async fn lost_messages_are_told_with_their_publisher_before_its_close() {
    let dir = Dir::new();
    let one = dir.publisher("t").on_full(OnFull::DropNewest).bind().unwrap();
    let mut subscriber = dir.subscriber("t").depth(2).publisher_events(true).connect().unwrap();
    for number in 0..5_u8 {
        one.send([number]).await.unwrap();
    }
    let id = one.id();
    within("close", one.close()).await.unwrap();
    for number in 0..2_u8 {
        assert_eq!(*within("recv", subscriber.recv()).await.unwrap(), [number]);
    }
    let lagged = within("lag", subscriber.recv()).await.unwrap_err();
    assert!(
        matches!(lagged, RecvError::Lagged { publisher, missed: 3, all_held: false, .. } if publisher == id),
        "{lagged:?}"
    );
    assert!(text(&lagged).contains(&format!("{id:032x}")) && text(&lagged).contains("faster"), "{lagged}");
    let closed = within("close", subscriber.recv()).await;
    assert!(matches!(closed, Err(RecvError::PublisherClosed { publisher }) if publisher == id), "{closed:?}");
}

#[tokio::test]
async fn lag_of_a_reader_that_holds_its_whole_depth_does_not_blame_its_speed() {
    let dir = Dir::new();
    let publisher = dir.publisher("t").on_full(OnFull::DropOldest).bind().unwrap();
    let mut subscriber = dir.subscriber("t").depth(2).connect().unwrap();
    let mut held = Vec::new();
    for number in 0..2_u8 {
        publisher.send([number]).await.unwrap();
        held.push(within("recv", subscriber.recv()).await.unwrap());
    }
    publisher.send([2]).await.unwrap();
    let lagged = within("lag", subscriber.recv()).await.unwrap_err();
    assert!(matches!(lagged, RecvError::Lagged { missed: 1, all_held: true, .. }), "{lagged:?}");
    assert!(text(&lagged).contains("holds") && !text(&lagged).contains("faster"), "{lagged}");
    held.clear();
    publisher.send([3]).await.unwrap();
    assert_eq!(*within("recv", subscriber.recv()).await.unwrap(), [3]);
}

#[tokio::test]
async fn stream_goes_on_after_notices_and_stays_at_its_end() {
    let dir = Dir::new();
    let publisher = dir.publisher("t").on_full(OnFull::DropOldest).bind().unwrap();
    let builder = dir.subscriber("t").depth(2).end_with_last_publisher(true);
    let mut subscriber = builder.connect().unwrap();
    for number in 0..5_u8 {
        publisher.send([number]).await.unwrap();
    }
    within("close", publisher.close()).await.unwrap();
    let (mut got, mut notices) = (Vec::new(), 0);
    while let Some(item) = within("next", subscriber.next()).await {
        assert!(!subscriber.is_terminated());
        match item {
            Ok(sample) => got.push(sample[0]),
            Err(notice) => {
                assert!(!notice.is_terminal(), "{notice}");
                notices += 1;
            }
        }
    }
    assert_eq!((got, notices), (vec![3, 4], 1));
    assert!(subscriber.is_terminated());
    // Whatever is called, and whoever comes.
    let _next = dir.publisher("t").bind().unwrap();
    assert!(within("next", subscriber.next()).await.is_none());
    assert!(matches!(within("recv", subscriber.recv()).await, Err(RecvError::Closed)));
    assert!(matches!(subscriber.try_recv(), Err(TryRecvError::Recv(RecvError::Closed))));
    assert!(matches!(within("wait", subscriber.wait_for_publishers(1)).await, Err(RecvError::Closed)));
}

#[test]
fn stream_is_over_after_an_error_that_is_final() {
    let dir = Dir::new();
    let mut subscriber = dir.subscriber("t").connect().unwrap();
    let gone = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let handle = gone.handle().clone();
    gone.shutdown_background();
    // What waiting needs cannot be had from a runtime that is gone.
    let entered = handle.enter();
    let mut items = Vec::new();
    while let Some(item) = assert_ready!(task::spawn(subscriber.next()).poll()) {
        items.push(item);
        assert!(items.len() < 10, "it ends");
    }
    drop(entered);
    assert_eq!(items.len(), 1);
    let error = items[0].as_ref().unwrap_err();
    assert!(error.is_terminal() && matches!(error, RecvError::Io(_)), "{error:?}");
    assert!(subscriber.is_terminated());
    assert!(matches!(subscriber.try_recv(), Err(TryRecvError::Recv(RecvError::Closed))));
    assert!(matches!(subscriber.blocking_recv(), Err(RecvError::Closed)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn evicted_subscriber_that_receives_again_is_connected_again() {
    let dir = Dir::new();
    let builder = dir.publisher("t").queue(1).evict_after(Duration::from_millis(50));
    let publisher = builder.bind().unwrap();
    let mut subscriber = dir.subscriber("t").depth(1).connect().unwrap();
    within("subscriber", publisher.wait_for_subscribers(1)).await;
    for round in 0..3_u8 {
        for _ in 0..4 {
            within("send", publisher.send([round])).await.unwrap();
        }
        until("it is evicted", || publisher.subscriber_count() == 0).await;
        loop {
            match within("recv", subscriber.recv()).await {
                Err(RecvError::Evicted { publisher: id }) if id == publisher.id() => break,
                Err(RecvError::Lagged { .. }) | Ok(_) => {}
                Err(other) => panic!("{other}"),
            }
        }
        let numbers = async {
            within("subscriber", publisher.wait_for_subscribers(1)).await;
            publisher.send([100 + round]).await.unwrap();
        };
        let ((), received) = tokio::join!(numbers, subscriber.recv());
        assert_eq!(*received.unwrap(), [100 + round]);
    }
}

#[tokio::test]
async fn wait_for_a_publisher_that_refuses_says_so() {
    let dir = Dir::new();
    let publisher = dir.publisher("t").max_subscribers(1).bind().unwrap();
    let first = dir.subscriber("t").connect().unwrap();
    within("first", publisher.wait_for_subscribers(1)).await;
    let mut second = dir.subscriber("t").connect().unwrap();
    let refused = within("refusal", second.wait_for_publishers(1)).await;
    assert!(
        matches!(&refused, Err(RecvError::Refused { publisher: id, .. }) if *id == publisher.id()),
        "{refused:?}"
    );
    drop(first);
}

/// Has a child that holds its sockets, so that its death is told by its process alone.
#[test]
fn role_publisher_with_a_child() {
    let Some(role) = Role::of("role_publisher_with_a_child") else { return };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let publisher = role.publisher("t").bind().unwrap();
        role.say(&format!("{:032x}", publisher.id()));
        within("subscriber", publisher.wait_for_subscribers(1)).await;
        // SAFETY: the child makes no other calls than such as are allowed after a fork.
        if unsafe { libc::fork() } == 0 {
            // Until the test is over, be the parent dead or not.
            let mut byte = 0_u8;
            // SAFETY: reads into a byte of its own.
            while unsafe { libc::read(0, (&raw mut byte).cast(), 1) } > 0 {}
            // SAFETY: ends the process without the destructors of what is its parent's.
            unsafe { libc::_exit(0) }
        }
        role.say("forked");
        std::future::pending().await
    })
}

#[test]
fn death_is_heard_by_one_that_only_tries_and_by_one_that_never_sleeps() {
    for never_sleeps in [false, true] {
        let dir = Dir::new();
        let mut peer = Peer::start("role_publisher_with_a_child", &dir);
        let id = peer.hear();
        let mut subscriber = dir.subscriber("t").busy_poll(BusyPoll::Always).connect().unwrap();
        wait_until("it is accepted", || {
            let _ = subscriber.try_recv();
            subscriber.publisher_count() == 1
        });
        assert_eq!(peer.hear(), "forked");
        peer.kill();
        let lost = match never_sleeps {
            true => subscriber.blocking_recv_timeout(support::LIMIT),
            false => take_next(&mut subscriber),
        };
        assert!(
            matches!(&lost, Err(RecvError::PublisherLost { publisher }) if format!("{publisher:032x}") == id),
            "{lost:?}"
        );
    }
}
