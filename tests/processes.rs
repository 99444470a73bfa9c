//! What holds between processes: each test starts this binary again, as the other side.

mod support;

use std::time::Duration;

use bytes::Bytes;
use support::{Dir, Peer, Role, within};
use tokio_shm::{Backing, OnFull, RecvError, ShmPoolConfig, ShmSample};

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

/// Receives the next message; errors are failures.
fn next(subscriber: &mut tokio_shm::ShmSubscriber) -> ShmSample {
    subscriber.blocking_recv_timeout(support::LIMIT).unwrap()
}

/// Holds the first sample until the parent has sent thousands, and says whether it is still what it was.
#[test]
fn role_holds_a_sample() {
    let Some(role) = Role::of("role_holds_a_sample") else { return };
    let mut subscriber = role.subscriber("t").depth(4).connect().unwrap();
    role.say("connected");
    let held = next(&mut subscriber);
    let copy = held.to_vec();
    role.say("held");
    let mut last = 0;
    while last + 1 < 3_000 {
        last = u64::from_le_bytes(next(&mut subscriber)[..8].try_into().unwrap());
    }
    assert_eq!(&*held, &*copy, "the bytes of a held sample changed");
    role.say("unchanged");
}

async fn sample_held_elsewhere_stays_unchanged(backing: Backing, len: usize) {
    let dir = Dir::new();
    let publisher = dir.publisher("t").pool(ShmPoolConfig::new().backing(backing)).bind().unwrap();
    let mut peer = Peer::start("role_holds_a_sample", &dir);
    assert_eq!(peer.hear(), "connected");
    within("subscriber", publisher.wait_for_subscribers(1)).await;
    for number in 0..3_000_u64 {
        let mut loan = within("loan", publisher.loan(len)).await.unwrap();
        loan.fill(number as u8);
        loan[..8].copy_from_slice(&number.to_le_bytes());
        within("send", publisher.send(loan)).await.unwrap();
    }
    // Listening to the peer blocks this runtime, and with it the tx task.
    within("flush", publisher.flush()).await.unwrap();
    assert_eq!((peer.hear(), peer.hear()), ("held".into(), "unchanged".into()));
    peer.finish();
}

#[tokio::test]
async fn small_sample_held_elsewhere_stays_unchanged() {
    sample_held_elsewhere_stays_unchanged(Backing::Memfd, 64).await;
}

#[tokio::test]
async fn large_sample_held_elsewhere_stays_unchanged() {
    sample_held_elsewhere_stays_unchanged(Backing::Memfd, 1 << 20).await;
}

#[tokio::test]
async fn posix_sample_held_elsewhere_stays_unchanged() {
    sample_held_elsewhere_stays_unchanged(Backing::PosixShm, 100_000).await;
}

/// Receives what it is told to, and drops one sample for each line from the parent.
#[test]
fn role_drops_on_command() {
    let Some(role) = Role::of("role_drops_on_command") else { return };
    let mut subscriber = role.subscriber("t").connect().unwrap();
    role.say("connected");
    let count: usize = role.hear().unwrap().parse().unwrap();
    let mut held: Vec<_> = (0..count).map(|_| next(&mut subscriber)).collect();
    role.say("holding");
    while role.hear().is_some() {
        held.pop();
    }
}

#[tokio::test]
async fn loan_at_the_cap_wakes_when_a_sample_is_dropped_elsewhere() {
    const MIB: usize = 1 << 20;
    let dir = Dir::new();
    let publisher = dir.publisher("t").pool(ShmPoolConfig::new().max_bytes(4 << 20)).bind().unwrap();
    let mut peer = Peer::start("role_drops_on_command", &dir);
    assert_eq!(peer.hear(), "connected");
    within("subscriber", publisher.wait_for_subscribers(1)).await;
    for _ in 0..4 {
        let loan = publisher.try_loan(MIB).unwrap();
        publisher.send(loan).await.unwrap();
    }
    peer.tell("4");
    assert_eq!(peer.hear(), "holding");
    for _ in 0..4 {
        assert!(publisher.try_loan(MIB).is_err(), "all of it is held by the other process");
        let waiting = tokio::spawn({
            let publisher = publisher.clone();
            async move { publisher.loan(MIB).await }
        });
        support::until("the loan waits", || publisher.pool().stats().waiters == 1).await;
        peer.tell("drop");
        let loan = within("loan", waiting).await.unwrap().unwrap();
        assert!(publisher.pool().stats().bytes <= 4 << 20);
        // Kept from the pool, so that the next round waits too.
        std::mem::forget(loan);
    }
    peer.finish();
}

/// Connects again and again while the parent sends, and checks that each time nothing is missing.
#[test]
fn role_joins_again_and_again() {
    let Some(role) = Role::of("role_joins_again_and_again") else { return };
    for _ in 0..300 {
        let mut subscriber = role.subscriber("t").on_full(OnFull::DropNewest).connect().unwrap();
        // From here on everything has to be received or counted.
        role.say("connected");
        let begun: u64 = role.hear().unwrap().parse().unwrap();
        let mut lagged = 0;
        let first = loop {
            match subscriber.blocking_recv_timeout(support::LIMIT) {
                Ok(sample) => break u64::from_le_bytes(sample[..8].try_into().unwrap()),
                Err(RecvError::Lagged(missed)) => lagged += missed,
                Err(error) => panic!("{error}"),
            }
        };
        // The first one that it accounts for must be one that was not sent before the parent heard of us.
        assert!(first - lagged <= begun, "{first} came after {lagged} missed, {begun} had been begun");
        role.say("accounted for");
    }
}

#[test]
fn messages_sent_while_a_link_is_made_are_received_or_counted() {
    let dir = Dir::new();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let publisher =
        dir.publisher("t").on_full(OnFull::DropNewest).runtime(runtime.handle().clone()).bind().unwrap();
    let begun = std::sync::atomic::AtomicU64::new(0);
    let done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for number in 0_u64.. {
                if done.load(std::sync::atomic::Ordering::Relaxed) {
                    break;
                }
                // Before it is sent: one under way when the subscriber connects may have been sent before that.
                begun.store(number + 1, std::sync::atomic::Ordering::SeqCst);
                publisher.blocking_send(number.to_le_bytes()).unwrap();
                // A stream with pauses and bursts.
                for _ in 0..number % 1_000 {
                    std::hint::spin_loop();
                }
            }
        });
        let mut peer = Peer::start("role_joins_again_and_again", &dir);
        for _ in 0..300 {
            assert_eq!(peer.hear(), "connected");
            peer.tell(&begun.load(std::sync::atomic::Ordering::SeqCst).to_string());
            assert_eq!(peer.hear(), "accounted for");
        }
        done.store(true, std::sync::atomic::Ordering::Relaxed);
        peer.finish();
    });
}

/// Publishes numbers until it is killed.
#[test]
fn role_publishes() {
    let Some(role) = Role::of("role_publishes") else { return };
    runtime().block_on(async {
        let pool = ShmPoolConfig::new().backing(Backing::PosixShm);
        let publisher = role.publisher("t").pool(pool).bind().unwrap();
        role.say("bound");
        within("subscriber", publisher.wait_for_subscribers(1)).await;
        for number in 0_u64.. {
            if publisher.send(number.to_le_bytes()).await.is_err() {
                return;
            }
        }
    });
}

fn shared_memory_files() -> Vec<std::ffi::OsString> {
    let entries = std::fs::read_dir("/dev/shm").unwrap();
    let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name()).collect();
    names.retain(|name| name.to_string_lossy().starts_with("tokio-shm"));
    names
}

#[tokio::test]
async fn publisher_killed_is_told_and_its_successor_is_found() {
    let dir = Dir::new();
    let mut subscriber = dir.subscriber("t").connect().unwrap();
    for _ in 0..5 {
        let mut peer = Peer::start("role_publishes", &dir);
        let mut due = 0_u64;
        while due < 1_000 {
            let sample = within("recv", subscriber.recv()).await.unwrap();
            assert_eq!(&*sample, due.to_le_bytes());
            due += 1;
        }
        peer.kill();
        // What was delivered can still be read, in order; then the loss is told, once.
        loop {
            match within("recv", subscriber.recv()).await {
                Ok(sample) => {
                    assert_eq!(&*sample, due.to_le_bytes());
                    due += 1;
                }
                Err(RecvError::PublisherLost { .. }) => break,
                Err(error) => panic!("{error}"),
            }
        }
    }
    assert_eq!(subscriber.stats().publishers_lost, 5);
    assert_eq!(shared_memory_files(), Vec::<std::ffi::OsString>::new());
    let sockets = || std::fs::read_dir(dir.path().join("t")).map_or(0, Iterator::count);
    assert!(sockets() >= 1, "the last one killed left its socket");
    drop(dir.subscriber("t").connect().unwrap());
    assert_eq!(sockets(), 0, "the next connect removes it");
}

/// Takes two samples and then does nothing.
#[test]
fn role_is_stuck() {
    let Some(role) = Role::of("role_is_stuck") else { return };
    let mut subscriber = role.subscriber("t").depth(4).connect().unwrap();
    role.say("connected");
    let _held = (next(&mut subscriber), next(&mut subscriber));
    role.say("stuck");
    while role.hear().is_some() {}
    match subscriber.blocking_recv_timeout(support::LIMIT) {
        Err(RecvError::Evicted { .. }) => role.say("evicted"),
        // What was on the link comes first.
        Ok(_) => role.say("more"),
        Err(error) => role.say(&error.to_string()),
    }
}

#[tokio::test]
async fn subscriber_killed_releases_a_sender_that_waits_for_it() {
    let dir = Dir::new();
    let publisher = dir.publisher("t").queue(1).bind().unwrap();
    let mut other = dir.subscriber("t").depth(1_000).connect().unwrap();
    let mut peer = Peer::start("role_is_stuck", &dir);
    assert_eq!(peer.hear(), "connected");
    within("subscribers", publisher.wait_for_subscribers(2)).await;
    let mut sent = 0_u32;
    while publisher.try_send(sent.to_le_bytes()).is_ok() {
        sent += 1;
    }
    assert_eq!(peer.hear(), "stuck");
    let blocked = tokio::spawn({
        let publisher = publisher.clone();
        async move { publisher.send(sent.to_le_bytes()).await }
    });
    tokio::task::yield_now().await;
    assert!(!blocked.is_finished());
    peer.kill();
    within("the sender goes on", blocked).await.unwrap().unwrap();
    for due in 0..=sent {
        assert_eq!(&*within("recv", other.recv()).await.unwrap(), due.to_le_bytes());
    }
    drop(other);
    support::until("every slot is back", || publisher.pool().stats().in_use() == 0).await;
}

#[tokio::test]
async fn subscriber_that_is_stuck_is_evicted_and_told() {
    let dir = Dir::new();
    let publisher = dir.publisher("t").queue(1).evict_after(Duration::from_millis(50)).bind().unwrap();
    let mut peer = Peer::start("role_is_stuck", &dir);
    assert_eq!(peer.hear(), "connected");
    within("subscriber", publisher.wait_for_subscribers(1)).await;
    for number in 0..20_u32 {
        within("send", publisher.send(number.to_le_bytes())).await.unwrap();
    }
    within("flush", publisher.flush()).await.unwrap();
    support::until("evicted", || publisher.subscriber_count() == 0).await;
    assert_eq!(peer.hear(), "stuck");
    peer.close_stdin();
    assert!(["evicted", "more"].contains(&&*peer.hear()));
    peer.finish();
}

#[tokio::test]
async fn sample_outlives_its_subscriber_and_becomes_bytes_without_a_copy() {
    let dir = Dir::new();
    let publisher = dir.publisher("t").bind().unwrap();
    let mut subscriber = dir.subscriber("t").depth(2).connect().unwrap();
    publisher.send(vec![7; 1_000]).await.unwrap();
    let sample = within("recv", subscriber.recv()).await.unwrap();
    let address = sample.as_ptr();
    drop(subscriber);
    let bytes = Bytes::from(sample);
    assert_eq!(bytes.as_ptr(), address);
    let mut second = dir.subscriber("t").connect().unwrap();
    for number in 0..3_000_u32 {
        within("send", publisher.send(vec![number as u8; 1_000])).await.unwrap();
        drop(within("recv", second.recv()).await.unwrap());
    }
    let slice = bytes.slice(10..20);
    drop(bytes);
    assert!(std::thread::spawn(move || slice.iter().all(|byte| *byte == 7)).join().unwrap());
}

#[tokio::test]
async fn late_joiner_gets_the_history() {
    let dir = Dir::new();
    let publisher = dir.publisher("t").history(3).bind().unwrap();
    for number in 0..10_u8 {
        publisher.send([number]).await.unwrap();
    }
    let mut subscriber = dir.subscriber("t").connect().unwrap();
    publisher.send([10]).await.unwrap();
    for due in 7..=10_u8 {
        assert_eq!(&*within("recv", subscriber.recv()).await.unwrap(), [due]);
    }
}

#[tokio::test]
async fn many_publishers_and_subscribers_share_a_topic() {
    let dir = Dir::new();
    let publishers: Vec<_> = (0..3).map(|_| dir.publisher("a/b/c").bind().unwrap()).collect();
    let subscribers: Vec<_> =
        (0..3).map(|_| dir.subscriber("a/b/c").end_with_last_publisher(true).connect().unwrap()).collect();
    let receiving: Vec<_> = subscribers
        .into_iter()
        .map(|mut subscriber| {
            tokio::spawn(async move {
                let mut due = std::collections::HashMap::<u128, u64>::new();
                loop {
                    match subscriber.recv().await {
                        Ok(sample) => {
                            let due = due.entry(sample.publisher()).or_default();
                            assert_eq!(sample.seq(), *due);
                            *due += 1;
                        }
                        Err(RecvError::Closed) => break due.into_values().collect::<Vec<_>>(),
                        Err(error) => panic!("{error}"),
                    }
                }
            })
        })
        .collect();
    let sending = publishers.into_iter().map(|publisher| {
        tokio::spawn(async move {
            for number in 0..1_000_u64 {
                publisher.send(number.to_le_bytes()).await.unwrap();
            }
        })
    });
    for task in sending.collect::<Vec<_>>() {
        within("sending", task).await.unwrap();
    }
    for task in receiving {
        assert_eq!(within("receiving", task).await.unwrap(), [1_000; 3]);
    }
    support::until("directory", || std::fs::read_dir(dir.path()).unwrap().next().is_none()).await;
}
