//! What receiving tells beside messages: notices, after which it goes on, and ends, after which it does not.

#![allow(unsafe_code, reason = "fork")]

mod support;

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures::StreamExt as _;
use futures::stream::FusedStream as _;
use support::{Dir, Peer, Role, take_next, until, wait_until, within};
use tokio_shm::{BusyPoll, OnFull, RecvError, ShmPoolConfig, TryRecvError};
use tokio_test::{assert_ready, task};

fn text(error: &RecvError) -> String {
    error.to_string()
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

/// It is told once, and then taken as soon as there is room, however it waits, without any news in the directory.
#[test]
fn refused_subscriber_is_taken_when_a_seat_comes_free() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    for way in 0..4 {
        let dir = Dir::new();
        let builder = dir.publisher("t").max_subscribers(1).runtime(runtime.handle().clone());
        let publisher = builder.bind().unwrap();
        let mut first = dir.subscriber("t").connect().unwrap();
        publisher.try_send([0]).unwrap();
        assert_eq!(*first.blocking_recv_timeout(support::LIMIT).unwrap(), [0]);
        let mut second = dir.subscriber("t").end_with_last_publisher(true).connect().unwrap();
        let refused = take_next(&mut second);
        assert!(matches!(refused, Err(RecvError::Refused { .. })), "{refused:?}");
        let waited = second.blocking_recv_timeout(Duration::from_millis(400));
        assert!(matches!(waited, Err(RecvError::TimedOut)), "it is not told again: {waited:?}");
        drop(first);
        wait_until("the first has left", || publisher.subscriber_count() == 0);
        match way {
            0 => runtime.block_on(async { within("wait", second.wait_for_publishers(1)).await.unwrap() }),
            1 => wait_until("a seat", || {
                let waited = second.blocking_recv_timeout(Duration::from_millis(10));
                assert!(matches!(waited, Err(RecvError::TimedOut)), "{waited:?}");
                publisher.subscriber_count() == 1
            }),
            2 => wait_until("a seat", || {
                assert!(matches!(second.try_recv(), Err(TryRecvError::Empty)));
                publisher.subscriber_count() == 1
            }),
            _ => runtime.block_on(async {
                tokio::select! {
                    received = second.recv() => panic!("{received:?}"),
                    () = within("a seat", publisher.wait_for_subscribers(1)) => {}
                }
            }),
        }
        publisher.try_send([1]).unwrap();
        assert_eq!(*take_next(&mut second).unwrap(), [1]);
        runtime.block_on(publisher.close()).unwrap();
        assert!(matches!(take_next(&mut second), Err(RecvError::Closed)));
        drop(second);
        dir.assert_empties();
    }
}

/// One that is gone before it had room ends the wait.
#[tokio::test]
async fn refused_subscriber_is_at_its_end_when_the_publisher_closes() {
    let dir = Dir::new();
    let publisher = dir.publisher("t").max_subscribers(1).bind().unwrap();
    let _first = dir.subscriber("t").connect().unwrap();
    within("first", publisher.wait_for_subscribers(1)).await;
    let mut second = dir.subscriber("t").end_with_last_publisher(true).connect().unwrap();
    let refused = within("refusal", second.recv()).await;
    assert!(matches!(refused, Err(RecvError::Refused { .. })), "{refused:?}");
    let end = tokio::spawn(async move { within("end", second.recv()).await });
    within("close", publisher.close()).await.unwrap();
    let end = end.await.unwrap();
    assert!(matches!(end, Err(RecvError::Closed)), "{end:?}");
}

/// A publisher that loses what it is sent has as much to tell as another has to deliver: they take turns.
#[test]
fn publisher_that_only_has_losses_to_tell_leaves_others_their_turn() {
    let dir = Dir::new();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let bind = || dir.publisher("t").on_full(OnFull::DropNewest).runtime(runtime.handle().clone()).bind();
    let (flooding, other) = (bind().unwrap(), bind().unwrap());
    let mut subscriber = dir.subscriber("t").depth(8).connect().unwrap();
    (0..8).for_each(|_| flooding.try_send([0]).unwrap());
    let _held: Vec<_> = (0..8).map(|_| subscriber.blocking_recv_timeout(support::LIMIT).unwrap()).collect();
    (0..8).for_each(|number| other.try_send([number]).unwrap());
    let mut from_other = Vec::new();
    for turn in 0..20 {
        flooding.try_send([1]).unwrap();
        match take_next(&mut subscriber) {
            Ok(sample) => from_other.push(sample[0]),
            Err(RecvError::Lagged { publisher, .. }) => assert_eq!(publisher, flooding.id()),
            Err(error) => panic!("{error}"),
        }
        if from_other.len() == 8 {
            assert!(turn < 18, "{turn}");
            break;
        }
    }
    assert_eq!(from_other, [0, 1, 2, 3, 4, 5, 6, 7]);
}

/// What the history has lost, because memory was short, is from before the connection: nothing is missed.
#[tokio::test]
async fn hole_in_the_history_is_no_loss_of_one_that_comes_later() {
    const MIB: usize = 1 << 20;
    let dir = Dir::new();
    let pool = ShmPoolConfig::new().max_bytes(4 * MIB as u64);
    let publisher = dir.publisher("t").history(8).pool(pool).bind().unwrap();
    let mut keeps = dir.subscriber("t").connect().unwrap();
    let mut kept = None;
    for number in 0..3_u8 {
        within("send", publisher.send([number])).await.unwrap();
        let sample = within("recv", keeps.recv()).await.unwrap();
        kept.get_or_insert(sample);
    }
    let mut loans = Vec::new();
    while let Ok(loan) = publisher.try_loan(MIB / 2) {
        loans.push(loan);
    }
    // Who waits for memory gets what no subscriber has: all of the history but the oldest.
    let mut waiting = task::spawn(publisher.loan(MIB / 2));
    until("it is given up", || {
        waiting.poll().is_ready() || publisher.pool().stats().in_use() <= loans.len() + 1
    })
    .await;
    drop((waiting, loans));
    assert_eq!(kept.as_ref().unwrap().seq(), 0);
    let mut late = dir.subscriber("t").connect().unwrap();
    within("late", publisher.wait_for_subscribers(2)).await;
    within("send", publisher.send([3])).await.unwrap();
    let sample = within("recv", late.recv()).await.unwrap();
    assert_eq!((sample.seq(), &*sample), (3, &[3][..]));
}

/// A message that waits for another subscriber belongs to the history of one that comes meanwhile.
#[tokio::test]
async fn first_messages_of_a_publisher_that_comes_later_are_received_or_counted() {
    let dir = Dir::new();
    let mut early = dir.subscriber("t").connect().unwrap();
    let publisher = dir.publisher("t").history(1).bind().unwrap();
    for number in 0..3_u8 {
        publisher.send([number]).await.unwrap();
    }
    let mut late = dir.subscriber("t").connect().unwrap();
    publisher.flush().await.unwrap();
    // It was there before the publisher, and has not looked since.
    match within("the loss", early.recv()).await {
        Err(RecvError::Lagged { publisher: of, missed: 2, .. }) => assert_eq!(of, publisher.id()),
        other => panic!("{other:?}"),
    }
    for subscriber in [&mut early, &mut late] {
        assert_eq!(within("the history", subscriber.recv()).await.unwrap().seq(), 2);
    }
    publisher.send([3]).await.unwrap();
    for subscriber in [&mut early, &mut late] {
        assert_eq!(within("a message", subscriber.recv()).await.unwrap().seq(), 3);
    }
}

#[tokio::test]
async fn message_under_way_is_no_loss_of_one_that_comes_later() {
    for depth in [1, 8] {
        let dir = Dir::new();
        let publisher = dir.publisher("t").history(3).bind().unwrap();
        let mut slow = dir.subscriber("t").depth(1).connect().unwrap();
        publisher.try_send([0]).unwrap();
        publisher.try_send([1]).unwrap();
        let late = dir.subscriber("t").depth(depth).on_full(OnFull::DropNewest);
        let mut late = late.connect().unwrap();
        within("late", publisher.wait_for_subscribers(2)).await;
        assert_eq!(*within("recv", slow.recv()).await.unwrap(), [0]);
        assert_eq!(*within("recv", slow.recv()).await.unwrap(), [1]);
        for number in u8::from(depth == 1)..2 {
            assert_eq!(*within("recv", late.recv()).await.unwrap(), [number]);
        }
        publisher.send([2]).await.unwrap();
        assert_eq!(*within("recv", late.recv()).await.unwrap(), [2]);
    }
}

/// Of what a subscriber leaves behind only the sample stays that is held, whatever it was dropped in the middle of.
#[test]
fn subscriber_dropped_in_a_stream_gives_back_all_but_the_sample_that_is_held() {
    let dir = Dir::new();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let publisher = dir.publisher("t").runtime(runtime.handle().clone()).bind().unwrap();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                let _ = publisher.try_send([1]);
            }
        });
        for round in 0..400 {
            let mut subscriber =
                dir.subscriber("t").depth(2 + round % 8).on_full(OnFull::DropNewest).connect().unwrap();
            let held = subscriber.blocking_recv_timeout(support::LIMIT);
            let _ = (0..round % 13).map(|_| subscriber.try_recv()).filter(Result::is_ok).count();
            drop(subscriber);
            wait_until("the rest is back", || publisher.pool().stats().in_use() <= 2);
            drop(held);
        }
        stop.store(true, Ordering::Relaxed);
    });
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
