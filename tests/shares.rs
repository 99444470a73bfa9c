//! A link has a share of the pool in bytes, as it has a depth in messages: no subscriber, nor all of a topic, can bring others to a stop
//! by what it keeps.

mod support;

use std::collections::VecDeque;
use std::fmt::{self, Write as _};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use futures::SinkExt;
use support::{Dir, LIMIT, Peer, Random, Role, until, within};
use tokio_shm::{OnFull, RecvError, ShmPoolConfig, ShmPublisher, ShmSegmentPool, ShmSubscriber};
use tracing::field::{Field, Visit};

const MIB: usize = 1 << 20;

fn pool(mib: u64) -> ShmPoolConfig {
    ShmPoolConfig::new().max_bytes(mib * MIB as u64)
}

/// Sends `count` messages of `len` bytes that begin with their number.
async fn send(publisher: &ShmPublisher, count: u64, len: usize) {
    for seq in 0..count {
        let mut loan = within("loan", publisher.loan(len)).await.unwrap();
        loan[..8].copy_from_slice(&seq.to_le_bytes());
        within("send", publisher.send(loan)).await.unwrap();
    }
}

/// Receives until the publisher has sent `count` messages, and returns how many came and how many are told as missed.
async fn receive(mut subscriber: ShmSubscriber, count: u64) -> (u64, u64) {
    let (mut received, mut missed) = (0, 0);
    while received + missed < count {
        match within("recv", subscriber.recv()).await {
            Ok(sample) => {
                let seq = u64::from_le_bytes(sample[..8].try_into().unwrap());
                assert_eq!(seq, received + missed);
                received += 1;
            }
            Err(error) => missed += lagged(&error),
        }
    }
    (received, missed)
}

fn lagged(error: &RecvError) -> u64 {
    match error {
        RecvError::Lagged { missed: count, .. } => *count,
        error => panic!("{error}"),
    }
}

/// A process that keeps every message it gets, until it is told to drop them.
#[test]
fn hoarder() {
    const ROLE: &str = "hoarder";
    let Some(role) = Role::of(ROLE) else { return };
    let mut subscriber = role.subscriber("t").connect().unwrap();
    role.say("connected");
    let mut kept = Vec::new();
    while let Some(word) = role.hear() {
        match word.as_str() {
            "keep" => {
                while let Ok(sample) = subscriber.blocking_recv_timeout(Duration::ZERO) {
                    kept.push(sample);
                }
                role.say(&kept.len().to_string());
            }
            "drop" => {
                kept.clear();
                role.say("dropped");
            }
            word => panic!("{word}"),
        }
    }
}

fn hoarder_of(dir: &Dir) -> Peer {
    let mut peer = Peer::start("hoarder", dir);
    assert_eq!(peer.hear(), "connected");
    peer
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn subscriber_that_keeps_its_samples_stops_nobody_who_may_lose_messages() {
    for on_full in [OnFull::DropOldest, OnFull::DropNewest] {
        let dir = Dir::new();
        let publisher = dir.publisher("t").pool(pool(16)).on_full(on_full).bind().unwrap();
        let mut hoarder = hoarder_of(&dir);
        let reader = dir.subscriber("t").connect().unwrap();
        within("subscribers", publisher.wait_for_subscribers(2)).await;
        let reader = tokio::spawn(receive(reader, 200));
        for _ in 0..20 {
            send_from(&publisher, &mut hoarder).await;
        }
        let (received, missed) = within("reader", reader).await.unwrap();
        assert_eq!(received + missed, 200);
        // How many depends on when the machine lets it run.
        assert!(received >= 4, "{received}");
        within("flush", publisher.flush()).await.unwrap();
        assert!(publisher.stats().dropped >= 180, "{:?}", publisher.stats());
        hoarder.finish();
    }
}

/// Ten messages, and the hoarder keeps what it gets of them.
async fn send_from(publisher: &ShmPublisher, hoarder: &mut Peer) {
    let before = publisher.stats().published;
    for seq in before..before + 10 {
        let mut loan = within("loan", publisher.loan(MIB)).await.unwrap();
        loan[..8].copy_from_slice(&seq.to_le_bytes());
        within("send", publisher.send(loan)).await.unwrap();
    }
    let kept: u64 = hoarder.ask("keep").parse().unwrap();
    // Two links of a pool of 16 MiB: a share is 4 MiB, and 8 MiB can be had before memory is scarce.
    assert!(kept <= 8, "{kept}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn subscriber_that_keeps_its_samples_is_evicted_and_the_others_get_everything() {
    let dir = Dir::new();
    let evict_after = Duration::from_millis(300);
    let publisher = dir.publisher("t").pool(pool(16)).evict_after(evict_after).bind().unwrap();
    let mut hoarder = hoarder_of(&dir);
    let reader = dir.subscriber("t").connect().unwrap();
    within("subscribers", publisher.wait_for_subscribers(2)).await;
    let reader = tokio::spawn(receive(reader, 100));
    send(&publisher, 6, MIB).await;
    assert_eq!(hoarder.ask("keep"), "6");
    send(&publisher, 0, MIB).await;
    for seq in 6u64..100 {
        let mut loan = within("loan", publisher.loan(MIB)).await.unwrap();
        loan[..8].copy_from_slice(&seq.to_le_bytes());
        within("send", publisher.send(loan)).await.unwrap();
    }
    assert_eq!(within("reader", reader).await.unwrap(), (100, 0));
    // The reader has left.
    until("only the hoarder was there", || publisher.subscriber_count() == 0).await;
    assert_eq!(hoarder.ask("keep"), "6");
    hoarder.finish();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn loan_that_waits_for_what_a_subscriber_keeps_has_it_evicted() {
    let dir = Dir::new();
    let evict_after = Duration::from_millis(100);
    // A share of all there is: senders wait for memory before the link is full.
    let publisher = dir.publisher("t").pool(pool(16)).link_bytes(16 << 20).evict_after(evict_after);
    let publisher = publisher.bind().unwrap();
    let mut hoarder = hoarder_of(&dir);
    within("subscriber", publisher.wait_for_subscribers(1)).await;
    send(&publisher, 16, MIB).await;
    assert_eq!(hoarder.ask("keep"), "16");
    send(&publisher, 50, MIB).await;
    assert_eq!(publisher.subscriber_count(), 0);
    hoarder.finish();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn topic_whose_subscriber_keeps_its_samples_leaves_memory_to_another_topic() {
    let dir = Dir::new();
    let shared = ShmSegmentPool::new(pool(16));
    let publisher = dir.publisher("t").shared_pool(&shared).bind().unwrap();
    let other = dir.publisher("other").shared_pool(&shared).bind().unwrap();
    let mut subscriber = dir.subscriber("other").connect().unwrap();
    let mut hoarder = hoarder_of(&dir);
    within("subscriber", publisher.wait_for_subscribers(1)).await;
    within("subscriber", other.wait_for_subscribers(1)).await;
    let mut sent = 0;
    while tokio::time::timeout(Duration::from_millis(200), publisher.send(vec![0; MIB])).await.is_ok() {
        sent += 1;
        assert!(sent <= 16);
    }
    // Its part is 8 MiB: 6 on the link, one that waits for room on it, and one and a little more in the queue.
    assert!((6..=10).contains(&sent), "{sent}");
    hoarder.ask("keep");
    within("send", other.send(b"8 bytes.")).await.unwrap();
    assert_eq!(&*within("recv", subscriber.recv()).await.unwrap(), b"8 bytes.");
    for _ in 0..20 {
        within("send", other.send(vec![1; MIB])).await.unwrap();
        assert_eq!(within("recv", subscriber.recv()).await.unwrap().len(), MIB);
    }
    hoarder.finish();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn newest_is_dropped_where_a_subscriber_that_does_not_read_has_its_share() {
    let dir = Dir::new();
    let publisher = dir.publisher("t").on_full(OnFull::DropNewest).bind().unwrap();
    let mut subscriber = dir.subscriber("t").connect().unwrap();
    within("subscriber", publisher.wait_for_subscribers(1)).await;
    for _ in 0..40 {
        within("send", publisher.send(publisher.loan(8 * MIB).await.unwrap())).await.unwrap();
    }
    // What found another inside is delivered, or dropped, by that one.
    within("flush", publisher.flush()).await.unwrap();
    // Three quarters of 256 MiB.
    assert_eq!(publisher.stats().dropped, 40 - 24);
    let mut received = 0;
    loop {
        match within("recv", subscriber.recv()).await {
            Ok(_) => received += 1,
            Err(error) => break assert_eq!((received, lagged(&error)), (24, 16)),
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sender_goes_on_when_any_subscriber_makes_room_in_the_pool() {
    let dir = Dir::new();
    let publisher = dir.publisher("t").pool(pool(16)).bind().unwrap();
    let mut two = [(); 2].map(|()| dir.subscriber("t").connect().unwrap());
    within("subscribers", publisher.wait_for_subscribers(2)).await;
    // Each keeps four messages that the other does not: eight MiB, and all of both shares.
    let mut kept = [Vec::new(), Vec::new()];
    for seq in 0..8 {
        within("send", publisher.send(vec![0; MIB])).await.unwrap();
        for (index, subscriber) in two.iter_mut().enumerate() {
            let sample = within("recv", subscriber.recv()).await.unwrap();
            if seq % 2 == index {
                kept[index].push(sample);
            }
        }
    }
    let sender = tokio::spawn(async move {
        for _ in 0..4 {
            publisher.send(vec![0; MIB]).await.unwrap();
        }
        publisher
    });
    // The first is full, and keeps what it has; the second's releases are enough.
    let [first, second] = &mut two;
    kept[1].clear();
    for _ in 0..4 {
        drop(within("recv", first.recv()).await.unwrap());
        drop(within("recv", second.recv()).await.unwrap());
    }
    within("send", sender).await.unwrap();
}

/// The head waits for one subscriber alone, and the other, which has it already, has what that one lacks.
#[tokio::test]
async fn sender_goes_on_when_a_subscriber_that_has_the_message_makes_room() {
    let mut quickest = Duration::MAX;
    for _ in 0..5 {
        let dir = Dir::new();
        let publisher = dir.publisher("t").pool(pool(16)).history(1).bind().unwrap();
        let mut two = [(); 2].map(|()| dir.subscriber("t").connect().unwrap());
        within("subscribers", publisher.wait_for_subscribers(2)).await;
        // A share is four MiB, and eight can be had before memory is scarce: the first keeps four, the second three, the history one.
        let mut kept = [Vec::new(), Vec::new()];
        for seq in 0..8 {
            within("send", publisher.send(vec![0; MIB])).await.unwrap();
            for (index, subscriber) in two.iter_mut().enumerate() {
                let sample = within("recv", subscriber.recv()).await.unwrap();
                if seq < 7 && seq % 2 == index {
                    kept[index].push(sample);
                }
            }
        }
        within("send", publisher.send(vec![0; MIB])).await.unwrap();
        let mut flush = tokio_test::task::spawn(publisher.flush());
        assert!(flush.poll().is_pending(), "the first has its share");
        drop(within("recv", two[1].recv()).await.unwrap());
        // What there is to do besides is done.
        for _ in 0..200 {
            tokio::task::yield_now().await;
        }
        assert!(flush.poll().is_pending(), "nothing was given back");
        let begun = Instant::now();
        kept[1].clear();
        within("flush", flush).await.unwrap();
        quickest = quickest.min(begun.elapsed());
        drop(within("recv", two[0].recv()).await.unwrap());
    }
    // By the release, and not when the publisher looks how long senders have been waiting: after a second.
    assert!(quickest < Duration::from_millis(500), "{quickest:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn link_bytes_bounds_what_a_link_has_and_one_message_is_always_let_through() {
    let dir = Dir::new();
    let bind = |bytes| dir.publisher("t").link_bytes(bytes).on_full(OnFull::DropNewest).bind();
    assert!(bind(0).unwrap_err().to_string().contains("link_bytes"));
    for (bytes, len, most) in [(10 * MIB, MIB, 10), (1, MIB, 1), (100 * 704, 64, 100)] {
        let publisher = bind(bytes as u64).unwrap();
        let subscriber = dir.subscriber("t").depth(1_000).connect().unwrap();
        within("subscriber", publisher.wait_for_subscribers(1)).await;
        for _ in 0..200 {
            publisher.send(vec![0; len]).await.unwrap();
        }
        within("flush", publisher.flush()).await.unwrap();
        assert_eq!(publisher.stats().dropped, 200 - most);
        drop(subscriber);
        publisher.close().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn history_gives_way_before_links_go_without() {
    let dir = Dir::new();
    let builder = dir.publisher("t").pool(pool(16)).history(100).on_full(OnFull::DropNewest);
    let publisher = builder.bind().unwrap();
    send(&publisher, 50, MIB).await;
    let mut subscriber = dir.subscriber("t").connect().unwrap();
    within("subscriber", publisher.wait_for_subscribers(1)).await;
    let mut replayed = 0;
    while replayed < 49 {
        let sample = within("recv", subscriber.recv()).await.unwrap();
        replayed = u64::from_le_bytes(sample[..8].try_into().unwrap());
    }
    for seq in 50..100 {
        within("send", publisher.send(vec![seq; MIB])).await.unwrap();
        assert_eq!(within("recv", subscriber.recv()).await.unwrap()[0], seq);
    }
}

/// A message longer than a link's share needs room beside all others.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn history_gives_way_before_messages_longer_than_a_share_are_dropped() {
    let dir = Dir::new();
    let builder = dir.publisher("t").pool(pool(16)).history(100).on_full(OnFull::DropNewest);
    let publisher = builder.bind().unwrap();
    let mut two = [(); 2].map(|()| dir.subscriber("t").connect().unwrap());
    within("subscribers", publisher.wait_for_subscribers(2)).await;
    for number in 0..20 {
        within("send", publisher.send(vec![number; 5 * MIB])).await.unwrap();
        for subscriber in &mut two {
            assert_eq!(within("recv", subscriber.recv()).await.unwrap()[0], number);
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn history_for_a_newcomer_is_the_newest_that_its_share_has_room_for() {
    let dir = Dir::new();
    let builder = dir.publisher("t").pool(pool(16)).history(100).on_full(OnFull::DropNewest);
    let publisher = builder.bind().unwrap();
    // Has all of it, and reads nothing.
    let _first = dir.subscriber("t").connect().unwrap();
    within("subscriber", publisher.wait_for_subscribers(1)).await;
    send(&publisher, 12, MIB).await;
    within("flush", publisher.flush()).await.unwrap();
    let mut newcomer = dir.subscriber("t").connect().unwrap();
    within("subscriber", publisher.wait_for_subscribers(2)).await;
    // A share of two is four MiB.
    for expected in 8..12_u64 {
        let sample = within("recv", newcomer.recv()).await.unwrap();
        assert_eq!(sample[..8], expected.to_le_bytes());
    }
    within("send", publisher.send(b"the next".as_slice())).await.unwrap();
    assert_eq!(&*within("recv", newcomer.recv()).await.unwrap(), b"the next");
}

/// It left with a sample held, and what it keeps counts as before.
#[test]
fn subscriber_that_has_left_is_not_evicted_for_having_kept_senders_waiting() {
    let warnings = Warnings::default();
    let _guard = tracing::subscriber::set_default(warnings.clone());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let dir = Dir::new();
        let evict_after = Duration::from_secs(1);
        let publisher = dir.publisher("t").evict_after(evict_after).bind().unwrap();
        let mut subscriber = dir.subscriber("t").depth(1).connect().unwrap();
        // Keeps the next message from being delivered for as long as it takes.
        let mut other = dir.subscriber("t").depth(1).connect().unwrap();
        within("subscribers", publisher.wait_for_subscribers(2)).await;
        within("send", publisher.send([0])).await.unwrap();
        let held = within("recv", subscriber.recv()).await.unwrap();
        publisher.try_send([1]).unwrap();
        drop(subscriber);
        until("it has left", || publisher.subscriber_count() == 1).await;
        assert_eq!(*within("recv", other.recv()).await.unwrap(), [0]);
        let late = Instant::now() + 2 * evict_after;
        while Instant::now() < late {
            assert_eq!(*within("recv", other.recv()).await.unwrap(), [1]);
            within("send", publisher.send([1])).await.unwrap();
        }
        assert_eq!(publisher.pool().stats().abandoned_bytes, 0);
        assert_eq!(*warnings.0.lock().unwrap(), [""; 0]);
        assert_eq!(*held, [0]);
        drop((held, other));
        until("everything is back", || publisher.pool().stats().in_use() == 0).await;
    });
}

/// Keeps the warnings of this crate.
#[derive(Clone, Default)]
struct Warnings(Arc<Mutex<Vec<String>>>);

struct Words<'a>(&'a mut String);

impl Visit for Words<'_> {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        write!(self.0, " {}={value:?}", field.name()).unwrap();
    }
}

impl tracing::Subscriber for Warnings {
    fn enabled(&self, metadata: &tracing::Metadata<'_>) -> bool {
        *metadata.level() <= tracing::Level::WARN && metadata.target().starts_with("tokio_shm")
    }

    fn new_span(&self, _: &tracing::span::Attributes<'_>) -> tracing::span::Id {
        tracing::span::Id::from_u64(1)
    }

    fn record(&self, _: &tracing::span::Id, _: &tracing::span::Record<'_>) {}
    fn record_follows_from(&self, _: &tracing::span::Id, _: &tracing::span::Id) {}
    fn enter(&self, _: &tracing::span::Id) {}
    fn exit(&self, _: &tracing::span::Id) {}

    fn event(&self, event: &tracing::Event<'_>) {
        let mut words = String::new();
        event.record(&mut Words(&mut words));
        self.0.lock().unwrap().push(words);
    }
}

#[test]
fn wait_for_a_subscriber_is_told_once_with_its_name_and_what_it_holds() {
    for link_bytes in [None, Some(16 << 20)] {
        let warnings = Warnings::default();
        let _guard = tracing::subscriber::set_default(warnings.clone());
        // One thread, so that all of it is seen by this subscriber of events.
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let dir = Dir::new();
            let mut builder = dir.publisher("t").pool(pool(16));
            if let Some(bytes) = link_bytes {
                builder = builder.link_bytes(bytes);
            }
            let publisher = builder.bind().unwrap();
            let mut hoarder = hoarder_of(&dir);
            within("subscriber", publisher.wait_for_subscribers(1)).await;
            let sender = async {
                for _ in 0..40 {
                    publisher.send(vec![0; MIB]).await.unwrap();
                }
            };
            let told = async {
                until("a warning", || !warnings.0.lock().unwrap().is_empty()).await;
            };
            tokio::pin!(sender);
            tokio::time::timeout(LIMIT, async {
                tokio::select! {
                    () = &mut sender => panic!("nothing has been read"),
                    () = told => {}
                }
            })
            .await
            .unwrap();
            // It goes on waiting, and is not told again.
            assert!(tokio::time::timeout(Duration::from_secs(2), &mut sender).await.is_err());
            let told = warnings.0.lock().unwrap().clone();
            assert_eq!(told.len(), 1, "{told:?}");
            let bytes = if link_bytes.is_some() { 16 * MIB } else { 12 * MIB };
            for word in [
                "topic=\"t\"",
                &format!("process={} (", hoarder.pid()),
                &format!("bytes={bytes}"),
                "max_bytes",
            ] {
                assert!(told[0].contains(word), "{word} in {}", told[0]);
            }
            hoarder.kill();
            tokio::time::timeout(LIMIT, sender).await.unwrap();
        });
    }
}

/// Holds up to `most` samples, lets one go when nothing comes for a while, and returns how many messages came or are told as missed.
async fn hold_some(mut subscriber: ShmSubscriber, most: usize) -> u64 {
    let mut held = VecDeque::new();
    let mut seen = 0;
    loop {
        match tokio::time::timeout(Duration::from_millis(2), subscriber.recv()).await {
            Ok(Ok(sample)) => {
                seen += 1;
                held.push_back(sample);
                if held.len() > most {
                    held.pop_front();
                }
            }
            Ok(Err(RecvError::Closed)) => return seen,
            // After a second, on a slow machine.
            Ok(Err(RecvError::AllHeld { .. })) => drop(held.pop_front()),
            Ok(Err(error)) => seen += lagged(&error),
            Err(_) => drop(held.pop_front()),
        }
    }
}

/// Sends messages of random lengths in random ways, some of them given up; returns how many were accepted.
async fn send_some(mut publisher: ShmPublisher, seed: u64) -> u64 {
    let mut random = Random::new(seed);
    let mut accepted = 0;
    for _ in 0..150 {
        let len = 1 << (6 + random.below(16));
        let patience = if random.below(4) == 0 { Duration::from_micros(random.below(300)) } else { LIMIT };
        let sent = match random.below(3) {
            0 => {
                let loan = publisher.loan(len);
                match tokio::time::timeout(patience, loan).await {
                    Ok(loan) => {
                        within("send", publisher.send(loan.unwrap())).await.unwrap();
                        Ok(())
                    }
                    Err(elapsed) => Err(elapsed),
                }
            }
            1 => tokio::time::timeout(patience, publisher.send(&vec![0; len][..]))
                .await
                .map(|sent| sent.unwrap()),
            _ => {
                within("feed", publisher.feed(vec![0; len])).await.unwrap();
                if random.below(2) == 0 {
                    within("flush", SinkExt::<Vec<u8>>::flush(&mut publisher)).await.unwrap();
                }
                Ok(())
            }
        };
        match sent {
            Ok(()) => accepted += 1,
            Err(_) => assert!(patience < LIMIT, "a sender is stuck"),
        }
    }
    accepted
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn storm_of_sizes_and_holders_in_a_shared_pool_goes_on_to_its_end() {
    let dir = Dir::new();
    let shared = ShmSegmentPool::new(pool(16));
    let mut topics = Vec::new();
    for (topic, seed) in [("a", 1), ("b", 2)] {
        let publisher = dir.publisher(topic).shared_pool(&shared).queue(8).history(2).bind().unwrap();
        let mut readers = Vec::new();
        for (most, on_full) in
            [(0, None), (3, Some(OnFull::DropOldest)), (5, None), (9, Some(OnFull::DropNewest))]
        {
            let mut subscriber = dir.subscriber(topic).depth(8).end_with_last_publisher(true);
            if let Some(on_full) = on_full {
                subscriber = subscriber.on_full(on_full);
            }
            readers.push(tokio::spawn(hold_some(subscriber.connect().unwrap(), most)));
        }
        within("subscribers", publisher.wait_for_subscribers(4)).await;
        let senders = [0, 1, 2].map(|n| tokio::spawn(send_some(publisher.clone(), seed * 10 + n)));
        topics.push((publisher, readers, senders));
    }
    for (publisher, readers, senders) in topics {
        let mut accepted = 0;
        for sender in senders {
            accepted += within("sender", sender).await.unwrap();
        }
        within("close", publisher.close()).await.unwrap();
        for reader in readers {
            assert_eq!(within("reader", reader).await.unwrap(), accepted);
        }
    }
    until("everything is back", || shared.stats().in_use() == 0).await;
}
