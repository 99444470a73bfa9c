//! Publishers and subscribers in several processes: what is held stays, what is sent arrives or is counted, and whoever
//! is killed harms nobody.

mod support;

use std::collections::{HashMap, VecDeque};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use support::numbered::{assert_intact, write};
use support::{Dir, LIMIT, Peer, Role, until, within};
use tokio_shm::{
    Backing, OnFull, RecvError, ShmLoan, ShmPoolConfig, ShmPublisher, ShmSample, ShmSegmentPool,
    ShmSubscriber, TryRecvError,
};
use tokio_test::assert_pending;

const MIB: usize = 1 << 20;

/// What another process has to do is done in far less, on a machine that does other things as well.
const AT_ONCE: Duration = Duration::from_secs(5);

const BACKINGS: [Backing; 2] = [Backing::Memfd, Backing::PosixShm];

async fn loan(publisher: &ShmPublisher, len: usize, seq: u64) -> ShmLoan {
    let mut loan = within("loan", publisher.loan(len)).await.expect("loan");
    write(&mut loan, seq);
    loan
}

/// Sends the messages numbered `seqs`, of `len` bytes each.
async fn send(publisher: &ShmPublisher, seqs: std::ops::Range<u64>, len: usize) {
    for seq in seqs {
        let loan = loan(publisher, len, seq).await;
        within("send", publisher.send(loan)).await.expect("send");
        let pool = publisher.pool().stats();
        assert!(pool.bytes <= pool.max_bytes, "{pool:?}");
    }
}

fn subscriber(dir: &Dir, line: &str) -> Peer {
    let mut peer = Peer::start("role_subscriber", dir);
    assert_eq!(peer.ask(line), "connected");
    peer
}

fn publisher(dir: &Dir, line: &str) -> Peer {
    let mut peer = Peer::start("role_publisher", dir);
    assert_eq!(peer.ask(line), "bound");
    peer
}

/// A subscriber that does what it is told, one line after the other.
#[test]
fn role_subscriber() {
    let Some(role) = Role::of("role_subscriber") else { return };
    let mut subscriber: Option<ShmSubscriber> = None;
    let mut held: VecDeque<ShmSample> = VecDeque::new();
    while let Some(line) = role.hear() {
        let mut words = line.split(' ');
        let verb = words.next().expect("a verb");
        let number: u64 = words.next().map_or(0, |word| word.parse().expect("a number"));
        let mut receive = || {
            let subscriber = subscriber.as_mut().expect("connected");
            let sample = subscriber.blocking_recv_timeout(LIMIT).expect("a message");
            assert_intact(&sample, sample.seq());
            sample
        };
        match verb {
            "connect" => {
                let mut builder = role.subscriber("t").depth(number as u32);
                for option in words {
                    builder = match option {
                        "drop-oldest" => builder.on_full(OnFull::DropOldest),
                        "end" => builder.end_with_last_publisher(true),
                        other => panic!("{other}"),
                    };
                }
                subscriber = Some(builder.connect().expect("connect"));
                role.say("connected");
            }
            "hold" => {
                held.extend((0..number).map(|_| receive()));
                role.say("held");
            }
            "recv" => {
                let first = receive().seq();
                let last = (1..number).fold(first, |last, _| {
                    let seq = receive().seq();
                    assert_eq!(seq, last + 1);
                    seq
                });
                role.say(&format!("{first}..={last}"));
            }
            "check" => {
                held.iter().for_each(|sample| assert_intact(sample, sample.seq()));
                role.say("unchanged");
            }
            "drop" => {
                drop(held.drain(..number as usize));
                role.say("dropped");
            }
            "next" => {
                let subscriber = subscriber.as_mut().expect("connected");
                role.say(&match subscriber.blocking_recv_timeout(LIMIT) {
                    Ok(sample) => format!("message {}", sample.seq()),
                    Err(RecvError::Lagged { missed, .. }) => format!("lagged {missed}"),
                    Err(RecvError::PublisherLost { .. }) => "lost".to_owned(),
                    Err(RecvError::Evicted { .. }) => "evicted".to_owned(),
                    Err(RecvError::Closed) => "closed".to_owned(),
                    Err(error) => panic!("{error}"),
                });
            }
            "leave" => {
                drop(subscriber.take());
                role.say("left");
            }
            other => panic!("{other}"),
        }
    }
}

/// A publisher that does what it is told.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn role_publisher() {
    let Some(role) = Role::of("role_publisher") else { return };
    let mut publisher: Option<ShmPublisher> = None;
    let mut sent = 0;
    while let Some(line) = role.hear() {
        let mut words = line.split(' ');
        let verb = words.next().expect("a verb");
        let number = words.next().map_or(0, |word| word.parse().expect("a number"));
        match verb {
            "bind" => {
                let backing = BACKINGS[usize::try_from(number).expect("an index")];
                let pool = ShmPoolConfig::new().backing(backing);
                publisher = Some(role.publisher("t").pool(pool).bind().expect("bind"));
                role.say("bound");
            }
            "subscribers" => {
                let publisher = publisher.as_ref().expect("bound");
                within("subscribers", publisher.wait_for_subscribers(number as usize)).await;
                role.say("here");
            }
            "send" => {
                let publisher = publisher.as_ref().expect("bound");
                send(publisher, sent..sent + number, 5_000).await;
                // Whoever kills it next is to find them on their links: on a busy machine they may still be in the queue.
                within("flush", publisher.flush()).await.expect("flush");
                sent += number;
                role.say("sent");
            }
            "close" => {
                within("close", publisher.take().expect("bound").close()).await.expect("close");
                role.say("closed");
            }
            other => panic!("{other}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sample_held_in_another_process_stays_unchanged() {
    for backing in BACKINGS {
        for (len, more) in [(8, 20_000), (1_000, 5_000), (20_000, 3_000), (MIB, 1_000)] {
            let dir = Dir::new();
            let pool = ShmPoolConfig::new().backing(backing).max_bytes(12 * MIB as u64);
            let publisher = dir.publisher("t").pool(pool).bind().unwrap();
            let mut reader = subscriber(&dir, "connect 8");
            within("subscriber", publisher.wait_for_subscribers(1)).await;
            send(&publisher, 0..4, len).await;
            assert_eq!(reader.ask("hold 4"), "held");
            reader.tell(&format!("recv {more}"));
            send(&publisher, 4..4 + more, len).await;
            assert_eq!(reader.hear(), format!("4..={}", 3 + more));
            assert_eq!(reader.ask("check"), "unchanged");
            assert_eq!(publisher.stats().copied_bytes, 0);
            reader.finish();
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sample_held_stays_unchanged_after_its_subscriber_is_dropped() {
    for len in [8, 1_000, MIB] {
        let dir = Dir::new();
        let pool = ShmPoolConfig::new().max_bytes(8 * MIB as u64);
        let publisher = dir.publisher("t").pool(pool).bind().unwrap();
        let mut held = dir.subscriber("t").connect().unwrap();
        let mut reader = subscriber(&dir, "connect 8");
        within("subscribers", publisher.wait_for_subscribers(2)).await;
        send(&publisher, 0..3, len).await;
        let sample = within("recv", held.recv()).await.unwrap();
        let bytes = Bytes::from(within("recv", held.recv()).await.unwrap());
        let elsewhere = within("recv", held.recv()).await.unwrap();
        let (check, checked) = std::sync::mpsc::channel();
        let thread = std::thread::spawn(move || {
            let clone = elsewhere.clone();
            drop(elsewhere);
            checked.recv_timeout(LIMIT).unwrap();
            assert_intact(&clone, 2);
        });
        drop(held);
        // In another process too.
        assert_eq!(reader.ask("hold 3"), "held");
        assert_eq!(reader.ask("leave"), "left");
        until("both have left", || publisher.subscriber_count() == 0).await;
        let mut live = dir.subscriber("t").connect().unwrap();
        within("subscriber", publisher.wait_for_subscribers(1)).await;
        for seq in 3..2_003 {
            send(&publisher, seq..seq + 1, len).await;
            assert_intact(&within("recv", live.recv()).await.unwrap(), seq);
        }
        assert_intact(&sample, 0);
        assert_intact(&bytes, 1);
        assert_eq!(reader.ask("check"), "unchanged");
        check.send(()).unwrap();
        thread.join().unwrap();
        assert!(publisher.pool().stats().in_use() >= 3);
        drop((sample, bytes, live));
        reader.finish();
        // What they held is there for others again.
        until("everything is back", || publisher.pool().stats().in_use() == 0).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sample_held_stays_unchanged_after_its_publisher_has_closed() {
    for len in [8, MIB] {
        let dir = Dir::new();
        // The pool goes on without the publisher.
        let pool = ShmSegmentPool::new(ShmPoolConfig::new().max_bytes(8 * MIB as u64));
        let publisher = dir.publisher("t").shared_pool(&pool).bind().unwrap();
        let mut reader = subscriber(&dir, "connect 8 end");
        within("subscriber", publisher.wait_for_subscribers(1)).await;
        send(&publisher, 0..5, len).await;
        assert_eq!(reader.ask("hold 2"), "held");
        within("close", publisher.close()).await.unwrap();
        for seq in 100..1_100 {
            let mut segments: Vec<_> = (0..3).map(|_| pool.try_take(len).unwrap()).collect();
            segments.iter_mut().for_each(|segment| write(segment, seq));
        }
        assert_eq!(reader.ask("check"), "unchanged");
        // Not received by then, and intact all the same.
        assert_eq!(reader.ask("recv 3"), "2..=4");
        assert_eq!(reader.ask("next"), "closed");
        reader.finish();
        assert_eq!(pool.stats().in_use(), 0);
        pool.trim();
        assert_eq!(pool.stats().bytes, 0);
    }
}

#[test]
fn loan_at_the_cap_waits_for_a_sample_dropped_in_another_process() {
    // Without tokio's clock: nothing in it can depend on a timer.
    let (done, finished) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_io().build().unwrap();
        runtime.block_on(async {
            let dir = Dir::new();
            let pool = ShmPoolConfig::new().max_bytes(4 * MIB as u64);
            let publisher = dir.publisher("t").pool(pool).link_bytes(u64::MAX).bind().unwrap();
            let mut reader = subscriber(&dir, "connect 64");
            publisher.wait_for_subscribers(1).await;
            let never_above = || assert!(publisher.pool().stats().bytes <= 4 * MIB as u64);
            for seq in 0..4 {
                let mut loan = publisher.loan(MIB).await.unwrap();
                write(&mut loan, seq);
                publisher.send(loan).await.unwrap();
            }
            assert_eq!(reader.ask("hold 4"), "held");
            for seq in 4..100 {
                let full = publisher.try_loan(MIB).unwrap_err();
                assert!(full.is_full(), "{full}");
                let mut waiting = tokio_test::task::spawn(publisher.loan(MIB));
                assert_pending!(waiting.poll());
                assert_eq!(publisher.pool().stats().waiters, 1);
                reader.tell("drop 1");
                let begun = Instant::now();
                let mut loan = waiting.await.unwrap();
                assert!(begun.elapsed() < AT_ONCE, "{:?}", begun.elapsed());
                assert_eq!(reader.hear(), "dropped");
                write(&mut loan, seq);
                never_above();
                publisher.send(loan).await.unwrap();
                assert_eq!(reader.ask("hold 1"), "held");
                never_above();
            }
            // And a thread, which must not be one of the runtime's.
            std::thread::scope(|scope| {
                let waiting = scope.spawn(|| publisher.blocking_loan_timeout(MIB, LIMIT).map(drop));
                support::wait_until("a thread waits", || publisher.pool().stats().waiters == 1);
                assert_eq!(reader.ask("drop 1"), "dropped");
                waiting.join().unwrap().unwrap();
            });
            assert_eq!(reader.ask("check"), "unchanged");
            reader.finish();
        });
        done.send(()).unwrap();
    });
    finished.recv_timeout(2 * LIMIT).expect("the loan was not woken");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stuck_reader_that_agreed_to_lose_messages_does_not_starve_the_publisher_at_the_cap() {
    let dir = Dir::new();
    let pool = ShmPoolConfig::new().max_bytes(4 * MIB as u64);
    let publisher = dir.publisher("t").pool(pool).bind().unwrap();
    // Room for more than the pool has, so that it is not their tickets that run out.
    let mut stuck = [subscriber(&dir, "connect 64 drop-oldest"), subscriber(&dir, "connect 100 drop-oldest")];
    let mut reader = subscriber(&dir, "connect 64");
    within("subscribers", publisher.wait_for_subscribers(3)).await;
    let count = 2_000;
    reader.tell(&format!("recv {count}"));
    send(&publisher, 0..count, MIB).await;
    assert_eq!(reader.hear(), format!("0..={}", count - 1));
    for stuck in &mut stuck {
        let lagged = stuck.ask("next");
        let lost: u64 = lagged.strip_prefix("lagged ").expect("a gap").parse().unwrap();
        assert!((count - 4..count).contains(&lost), "{lost}");
        assert_eq!(stuck.ask(&format!("recv {}", count - lost)), format!("{lost}..={}", count - 1));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn message_still_held_elsewhere_does_not_keep_the_publisher_from_taking_back_others() {
    let dir = Dir::new();
    let pool = ShmPoolConfig::new().max_bytes(4 * MIB as u64);
    let publisher = dir.publisher("t").pool(pool).bind().unwrap();
    let mut stuck = dir.subscriber("t").on_full(OnFull::DropOldest).connect().unwrap();
    let mut holder = dir.subscriber("t").on_full(OnFull::DropOldest).connect().unwrap();
    within("subscribers", publisher.wait_for_subscribers(2)).await;
    send(&publisher, 0..1, MIB).await;
    // The oldest, which the stuck one has not received, would free nothing.
    let held = within("recv", holder.recv()).await.unwrap();
    send(&publisher, 1..100, MIB).await;
    assert_intact(&held, 0);
    let missed = match within("gap", stuck.recv()).await {
        Err(RecvError::Lagged { missed, .. }) => missed,
        other => panic!("{other:?}"),
    };
    for seq in missed..100 {
        assert_intact(&within("recv", stuck.recv()).await.unwrap(), seq);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn message_sent_the_instant_after_connect_is_received_or_counted() {
    let dir = Dir::new();
    let publisher = dir.publisher("t").bind().unwrap();
    let mut peer = Peer::start("role_subscriber", &dir);
    let (mut received, mut counted) = (0, 0);
    for seq in 0..300 {
        peer.tell("connect 4");
        // Nothing between its word and the message.
        assert_eq!(peer.hear(), "connected");
        let mut bytes = [0; 8];
        write(&mut bytes, seq);
        within("send", publisher.send(bytes)).await.unwrap();
        let told = peer.ask("next");
        if told == format!("message {seq}") {
            received += 1;
        } else {
            assert_eq!(told, "lagged 1");
            counted += 1;
        }
    }
    assert_eq!(received + counted, 300);
    peer.finish();
}

/// Sends as fast as it can until told to stop; its counters say which messages exist.
struct Stream {
    begun: AtomicU64,
    accepted: AtomicU64,
    stop: AtomicBool,
}

impl Stream {
    async fn run(&self, publisher: &ShmPublisher) {
        while !self.stop.load(Ordering::SeqCst) {
            let mut bytes = [0; 64];
            write(&mut bytes, self.begun.fetch_add(1, Ordering::SeqCst));
            within("send", publisher.send(bytes)).await.expect("send");
            self.accepted.fetch_add(1, Ordering::SeqCst);
            if self.accepted.load(Ordering::Relaxed).is_multiple_of(64) {
                tokio::task::yield_now().await;
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn link_set_up_during_a_stream_accounts_for_every_message() {
    for on_full in [OnFull::Wait, OnFull::DropOldest, OnFull::DropNewest] {
        let dir = Dir::new();
        let publisher = dir.publisher("t").on_full(on_full).bind().unwrap();
        let stream = Arc::new(Stream {
            begun: AtomicU64::new(0),
            accepted: AtomicU64::new(0),
            stop: AtomicBool::new(false),
        });
        let sender = tokio::spawn({
            let (stream, publisher) = (Arc::clone(&stream), publisher.clone());
            async move { stream.run(&publisher).await }
        });
        let mut peers = [Peer::start("role_joins", &dir), Peer::start("role_joins", &dir)];
        for round in 0..200 {
            let peer = &mut peers[round % 2];
            let before = stream.accepted.load(Ordering::SeqCst);
            assert_eq!(peer.ask("go"), "connected");
            // What is begun to be sent from here on is sent after `connect` returned.
            let after = stream.begun.load(Ordering::SeqCst);
            let told = peer.ask("count");
            let mut numbers = told.split(' ').map(|number| number.parse::<u64>().unwrap());
            let (expect, first) = (numbers.next().unwrap(), numbers.next().unwrap());
            assert!(expect <= after, "messages {after}..{expect} are unaccounted for");
            // What was sent before it connected is no business of its own, give or take what the log of a stream that
            // has gone on for long has forgotten.
            let slack = 1_024 + first.saturating_sub(before) / 8;
            assert!(expect + slack >= before, "told of {expect}.., but connected after {before}");
        }
        stream.stop.store(true, Ordering::SeqCst);
        within("sender", sender).await.unwrap();
        peers.into_iter().for_each(Peer::finish);
    }
}

/// Connects again and again, and says which message it was owed first, and which came first.
#[test]
fn role_joins() {
    let Some(role) = Role::of("role_joins") else { return };
    while role.hear().is_some() {
        let mut subscriber = role.subscriber("t").depth(32).connect().unwrap();
        role.say("connected");
        role.hear();
        let (mut missed, mut first, mut next) = (0, None, None);
        for _ in 0..100 {
            match subscriber.blocking_recv_timeout(LIMIT) {
                Ok(sample) => {
                    assert_intact(&sample, sample.seq());
                    if let Some(next) = next {
                        assert_eq!(sample.seq(), next);
                    }
                    first.get_or_insert(sample.seq());
                    next = Some(sample.seq() + 1);
                }
                Err(RecvError::Lagged { missed: count, .. }) => match &mut next {
                    Some(next) => *next += count,
                    None => missed += count,
                },
                Err(error) => panic!("{error}"),
            }
        }
        let first = first.expect("a message among so many items");
        role.say(&format!("{} {first}", first - missed));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn subscriber_finds_publishers_that_come_late_and_come_back() {
    let dir = Dir::new();
    let mut waiting = dir.subscriber("t").connect().unwrap();
    let mut elsewhere = subscriber(&dir, "connect 64");
    assert!(matches!(waiting.try_recv(), Err(TryRecvError::Empty)));
    let mut ids = Vec::new();
    for _ in 0..3 {
        let mut sender = publisher(&dir, "bind 0");
        within("publisher", waiting.wait_for_publishers(1)).await.unwrap();
        assert_eq!(waiting.publisher_count(), 1);
        // A subscriber that nobody asks for messages does not look for publishers.
        elsewhere.tell("recv 3");
        assert_eq!(sender.ask("subscribers 2"), "here");
        assert_eq!(sender.ask("send 3"), "sent");
        for seq in 0..3 {
            let sample = within("recv", waiting.recv()).await.unwrap();
            assert_eq!(sample.seq(), seq);
            ids.push(sample.publisher());
        }
        assert_eq!(elsewhere.hear(), "0..=2");
        assert_eq!(sender.ask("send 2"), "sent");
        sender.kill();
        // What was delivered can still be read, and then it is told.
        let begun = Instant::now();
        for seq in 3..5 {
            assert_eq!(within("recv", waiting.recv()).await.unwrap().seq(), seq);
        }
        let lost = within("loss", waiting.recv()).await.unwrap_err();
        assert!(matches!(lost, RecvError::PublisherLost { publisher } if publisher == ids[ids.len() - 1]));
        assert!(begun.elapsed() < AT_ONCE, "{:?}", begun.elapsed());
        assert_eq!(waiting.publisher_count(), 0);
        assert_eq!(elsewhere.ask("recv 2"), "3..=4");
        assert_eq!(elsewhere.ask("next"), "lost");
    }
    ids.dedup();
    assert_eq!(ids.len(), 3, "a publisher that comes back is another one");
    assert_eq!(waiting.stats().publishers_lost, 3);
    elsewhere.finish();
    drop(waiting);
    dir_empties_after_a_visit(&dir);
}

/// Whoever connects next removes what killed publishers left.
fn dir_empties_after_a_visit(dir: &Dir) {
    drop(dir.subscriber("t").connect().unwrap());
    dir.assert_empties();
}

fn names_in(path: impl AsRef<Path>) -> Vec<String> {
    let entries = std::fs::read_dir(path).expect("directory");
    entries.map(|entry| entry.expect("entry").file_name().to_string_lossy().into_owned()).collect()
}

fn left_in_dev_shm() -> Vec<String> {
    names_in("/dev/shm").into_iter().filter(|name| name.starts_with("tokio-shm")).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn publisher_killed_leaves_nothing_behind_after_the_next_bind_or_connect() {
    for (index, _) in BACKINGS.iter().enumerate() {
        let dir = Dir::new();
        let mut reader = subscriber(&dir, "connect 64");
        for _ in 0..3 {
            let mut sender = publisher(&dir, &format!("bind {index}"));
            reader.tell("hold 10");
            assert_eq!(sender.ask("subscribers 1"), "here");
            assert_eq!(sender.ask("send 20"), "sent");
            assert_eq!(reader.hear(), "held");
            sender.kill();
            assert_eq!(reader.ask("recv 10"), "10..=19");
            assert_eq!(reader.ask("next"), "lost");
            assert_eq!(reader.ask("check"), "unchanged");
            // The next publisher takes away what the last one left.
            let next = dir.publisher("t").bind().unwrap();
            assert_eq!(names_in(dir.path().join("t")).len(), 1);
            within("close", next.close()).await.unwrap();
        }
        let mut sender = publisher(&dir, &format!("bind {index}"));
        reader.tell("next");
        assert_eq!(sender.ask("subscribers 1"), "here");
        sender.kill();
        assert_eq!(reader.hear(), "lost");
        // So does a subscriber, which needs no directory.
        let next = dir.subscriber("t").connect().unwrap();
        assert_eq!(names_in(dir.path()), Vec::<String>::new());
        drop(next);
        reader.finish();
        dir.assert_empties();
        assert_eq!(left_in_dev_shm(), Vec::<String>::new());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn subscriber_killed_frees_a_publisher_that_waits_for_it() {
    for len in [8, MIB] {
        let dir = Dir::new();
        let publisher = dir.publisher("t").queue(1).bind().unwrap();
        for round in 0..5_u64 {
            let mut reader = subscriber(&dir, "connect 4");
            within("subscriber", publisher.wait_for_subscribers(1)).await;
            // Two held, two not received, one at the head of the line, one in the queue.
            let base = round * 7;
            send(&publisher, base..base + 2, len).await;
            assert_eq!(reader.ask("hold 2"), "held");
            send(&publisher, base + 2..base + 6, len).await;
            let one_more = loan(&publisher, len, base + 6).await;
            let mut blocked = tokio_test::task::spawn(publisher.send(one_more));
            assert_pending!(blocked.poll());
            assert_eq!(publisher.pool().stats().in_use(), 7);
            let begun = Instant::now();
            reader.kill();
            within("send", blocked).await.unwrap();
            within("flush", publisher.flush()).await.unwrap();
            assert!(begun.elapsed() < AT_ONCE, "{:?}", begun.elapsed());
            assert_eq!((publisher.subscriber_count(), publisher.pool().stats().in_use()), (0, 0));
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn several_publishers_and_subscribers_share_a_topic() {
    let dir = Dir::new();
    let mut senders: Vec<_> = (0..3).map(|_| publisher(&dir, "bind 0")).collect();
    let mut readers: Vec<_> = (0..2).map(|_| Peer::start("role_reads_all", &dir)).collect();
    for reader in &mut readers {
        assert_eq!(reader.hear(), "3 publishers");
    }
    let mut own = dir.subscriber("t").end_with_last_publisher(true).connect().unwrap();
    within("publishers", own.wait_for_publishers(3)).await.unwrap();
    for sender in &mut senders {
        assert_eq!(sender.ask("subscribers 3"), "here");
    }
    senders.iter_mut().for_each(|sender| sender.tell("send 500"));
    let mut next: HashMap<u128, u64> = HashMap::new();
    for _ in 0..1_500 {
        let sample = within("recv", own.recv()).await.unwrap();
        let next = next.entry(sample.publisher()).or_default();
        assert_eq!(sample.seq(), *next);
        assert_intact(&sample, *next);
        *next += 1;
    }
    assert!(next.len() == 3 && next.values().all(|count| *count == 500), "{next:?}");
    for sender in &mut senders {
        assert_eq!(sender.hear(), "sent");
        assert_eq!(sender.ask("close"), "closed");
    }
    assert!(matches!(within("end", own.recv()).await, Err(RecvError::Closed)));
    for reader in &mut readers {
        assert_eq!(reader.hear(), "1500 messages in order");
    }
    readers.into_iter().chain(senders).for_each(Peer::finish);
    drop(own);
    dir.assert_empties();
}

/// Reads until the last publisher has closed.
#[tokio::test]
async fn role_reads_all() {
    let Some(role) = Role::of("role_reads_all") else { return };
    let mut subscriber = role.subscriber("t").end_with_last_publisher(true).connect().unwrap();
    within("publishers", subscriber.wait_for_publishers(3)).await.unwrap();
    role.say("3 publishers");
    let mut next: HashMap<u128, u64> = HashMap::new();
    loop {
        match within("recv", subscriber.recv()).await {
            Ok(sample) => {
                let next = next.entry(sample.publisher()).or_default();
                assert_eq!(sample.seq(), *next);
                assert_intact(&sample, *next);
                *next += 1;
            }
            Err(RecvError::Closed) => break,
            Err(error) => panic!("{error}"),
        }
    }
    role.say(&format!("{} messages in order", next.values().sum::<u64>()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn late_joiner_gets_the_last_messages_first() {
    let dir = Dir::new();
    let publisher = dir.publisher("t").history(5).bind().unwrap();
    send(&publisher, 0..2, 100).await;
    let mut first = subscriber(&dir, "connect 64");
    assert_eq!(first.ask("recv 2"), "0..=1");
    send(&publisher, 2..10, 100).await;
    let mut second = subscriber(&dir, "connect 64");
    assert_eq!(second.ask("recv 5"), "5..=9");
    // One whose depth is less than the history gets the latest.
    let mut third = subscriber(&dir, "connect 2");
    assert_eq!(third.ask("recv 2"), "8..=9");
    within("subscribers", publisher.wait_for_subscribers(3)).await;
    assert_eq!(publisher.subscriber_count(), 3);
    third.tell("recv 3");
    send(&publisher, 10..13, 100).await;
    assert_eq!(third.hear(), "10..=12");
    assert_eq!(second.ask("recv 3"), "10..=12");
    assert_eq!(first.ask("recv 11"), "2..=12");
    assert_eq!(first.ask("leave"), "left");
    until("one has left", || publisher.subscriber_count() == 2).await;
    second.kill();
    third.finish();
    until("only the history is left", || publisher.pool().stats().in_use() == 5).await;
    assert_eq!(publisher.subscriber_count(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn history_gives_way_when_the_pool_is_at_its_cap() {
    let dir = Dir::new();
    let pool = ShmPoolConfig::new().max_bytes(4 * MIB as u64);
    let publisher = dir.publisher("t").pool(pool).history(8).bind().unwrap();
    send(&publisher, 0..20, MIB).await;
    let mut late = subscriber(&dir, "connect 64");
    let told = late.ask("next");
    let first: u64 = told.strip_prefix("message ").expect("a message").parse().unwrap();
    assert!((16..20).contains(&first), "{first}");
    late.finish();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stuck_subscriber_is_evicted_and_senders_go_on() {
    for len in [8, MIB] {
        let dir = Dir::new();
        let publisher = dir.publisher("t").queue(1).evict_after(Duration::from_secs(1)).bind().unwrap();
        let mut stuck = subscriber(&dir, "connect 4");
        let mut reader = subscriber(&dir, "connect 4");
        within("subscribers", publisher.wait_for_subscribers(2)).await;
        reader.tell("recv 1000");
        send(&publisher, 0..2, len).await;
        assert_eq!(stuck.ask("hold 2"), "held");
        send(&publisher, 2..1_000, len).await;
        assert_eq!(reader.hear(), "0..=999");
        assert_eq!(publisher.subscriber_count(), 1);
        // What it holds stays its own.
        assert_eq!(stuck.ask("check"), "unchanged");
        // What it had not received is taken back, and counted.
        assert_eq!(stuck.ask("next"), "lagged 2");
        assert_eq!(stuck.ask("next"), "evicted");
        assert_eq!(stuck.ask("check"), "unchanged");
        assert_eq!(stuck.ask("drop 2"), "dropped");
        stuck.finish();
        reader.finish();
        until("everything is back", || publisher.pool().stats().in_use() == 0).await;
    }
}

#[tokio::test]
async fn bytes_of_a_sample_are_where_the_sample_is() {
    let dir = Dir::new();
    let publisher = dir.publisher("t").bind().unwrap();
    let mut subscriber = dir.subscriber("t").connect().unwrap();
    for seq in 0..100 {
        send(&publisher, seq..seq + 1, 1_000).await;
        let sample = within("recv", subscriber.recv()).await.unwrap();
        let address = sample.as_ptr();
        let bytes = Bytes::from(sample.clone());
        assert_eq!(bytes.as_ptr(), address);
        drop(sample);
        let slice = bytes.slice(10..);
        drop(bytes);
        assert_eq!(slice.as_ptr(), address.wrapping_add(10));
        assert!(slice.iter().all(|byte| *byte == seq as u8));
    }
}
