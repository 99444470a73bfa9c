//! Publishers and subscribers in one process: the handles' promises, one by one.

mod support;

use futures::{SinkExt, StreamExt};
use support::{Dir, within};
use tokio_shm::{OnFull, RecvError, ShmPoolConfig, TryRecvError};

#[tokio::test]
async fn message_sent_right_after_connect_is_received() {
    let dir = Dir::new();
    let publisher = dir.publisher("a/b").bind().unwrap();
    let mut subscriber = dir.subscriber("a/b").connect().unwrap();
    publisher.send(b"hello").await.unwrap();
    let sample = within("recv", subscriber.recv()).await.unwrap();
    assert_eq!((&*sample, sample.seq(), sample.publisher()), (&b"hello"[..], 0, publisher.id()));
    drop((publisher, subscriber));
    within("empty", support::until("directory", || std::fs::read_dir(dir.path()).unwrap().next().is_none()))
        .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn message_sent_right_after_connect_is_received_however_quick_the_tx_task() {
    let dir = Dir::new();
    let publisher = dir.publisher("t").bind().unwrap();
    for number in 0..1_000_u32 {
        let mut subscriber = dir.subscriber("t").connect().unwrap();
        publisher.send(number.to_le_bytes()).await.unwrap();
        let sample = within("recv", subscriber.recv()).await.unwrap();
        assert_eq!((sample.seq(), &*sample), (number.into(), &number.to_le_bytes()[..]));
    }
}

#[tokio::test]
async fn many_messages_arrive_in_order() {
    let dir = Dir::new();
    let publisher = dir.publisher("t").bind().unwrap();
    let mut subscriber = dir.subscriber("t").end_with_last_publisher(true).connect().unwrap();
    let sender = tokio::spawn(async move {
        for number in 0..10_000_u32 {
            publisher.send(number.to_le_bytes()).await.unwrap();
        }
    });
    let mut next = 0_u32;
    while let Some(sample) = within("recv", subscriber.next()).await {
        assert_eq!(&*sample.unwrap(), next.to_le_bytes());
        next += 1;
    }
    assert_eq!(next, 10_000);
    sender.await.unwrap();
}

#[tokio::test]
async fn sink_feeds_and_flushes() {
    let dir = Dir::new();
    let mut publisher = dir.publisher("t").queue(4).bind().unwrap();
    let mut subscriber = dir.subscriber("t").depth(100).connect().unwrap();
    for number in 0..50_u8 {
        publisher.feed(vec![number; 100]).await.unwrap();
    }
    SinkExt::<Vec<u8>>::flush(&mut publisher).await.unwrap();
    for number in 0..50_u8 {
        assert_eq!(&*within("recv", subscriber.recv()).await.unwrap(), [number; 100]);
    }
    assert!(matches!(subscriber.try_recv(), Err(TryRecvError::Empty)));
}

#[tokio::test]
async fn drop_oldest_counts_exactly() {
    let dir = Dir::new();
    let publisher = dir.publisher("t").on_full(OnFull::DropOldest).bind().unwrap();
    let mut subscriber = dir.subscriber("t").depth(4).connect().unwrap();
    for number in 0..10_u8 {
        publisher.send([number]).await.unwrap();
    }
    assert!(matches!(subscriber.recv().await, Err(RecvError::Lagged { missed: 6, .. })));
    for number in 6..10_u8 {
        assert_eq!(&*subscriber.recv().await.unwrap(), [number]);
    }
}

#[tokio::test]
async fn drop_newest_tells_without_a_further_message() {
    let dir = Dir::new();
    let publisher = dir.publisher("t").on_full(OnFull::DropNewest).bind().unwrap();
    let mut subscriber = dir.subscriber("t").depth(4).connect().unwrap();
    for number in 0..10_u8 {
        publisher.send([number]).await.unwrap();
    }
    for number in 0..4_u8 {
        assert_eq!(&*subscriber.recv().await.unwrap(), [number]);
    }
    assert!(matches!(within("lag", subscriber.recv()).await, Err(RecvError::Lagged { missed: 6, .. })));
}

#[tokio::test]
async fn message_taken_back_for_memory_is_told_without_a_further_message() {
    const QUARTER: usize = 1 << 20;
    let dir = Dir::new();
    let pool = ShmPoolConfig::new().max_bytes(4 * QUARTER as u64);
    let publisher = dir.publisher("t").on_full(OnFull::DropOldest).pool(pool).bind().unwrap();
    let mut subscriber = dir.subscriber("t").connect().unwrap();
    within("send", publisher.send(vec![0; QUARTER])).await.unwrap();
    let mut loans = Vec::new();
    for _ in 0..4 {
        loans.push(within("loan", publisher.loan(QUARTER)).await.unwrap());
    }
    assert!(matches!(subscriber.try_recv(), Err(TryRecvError::Recv(RecvError::Lagged { missed: 1, .. }))));
}

#[tokio::test]
async fn wait_blocks_until_a_sample_is_dropped() {
    let dir = Dir::new();
    let publisher = dir.publisher("t").queue(1).bind().unwrap();
    let mut subscriber = dir.subscriber("t").depth(2).connect().unwrap();
    let mut sent = 0_u8;
    while publisher.try_send([sent]).is_ok() {
        sent += 1;
    }
    assert_eq!(sent, 4, "two on the link, one at the head, one queued");
    let held = subscriber.recv().await.unwrap();
    assert!(publisher.try_send([sent]).is_err(), "held messages count");
    drop(held);
    within("send", publisher.send([sent])).await.unwrap();
    for number in 1..=sent {
        assert_eq!(&*within("recv", subscriber.recv()).await.unwrap(), [number]);
    }
}

#[tokio::test]
async fn loan_is_not_copied_and_returns_to_the_pool() {
    let dir = Dir::new();
    let publisher = dir.publisher("t").pool(ShmPoolConfig::new().max_bytes(1 << 20)).bind().unwrap();
    let mut subscriber = dir.subscriber("t").connect().unwrap();
    for round in 0..100_u8 {
        let mut loan = publisher.loan(512 << 10).await.unwrap();
        loan.fill(round);
        within("send", publisher.send(loan)).await.unwrap();
        let sample = within("recv", subscriber.recv()).await.unwrap();
        assert!(sample.iter().all(|byte| *byte == round));
    }
    assert_eq!(publisher.stats().copied_bytes, 0);
    assert!(publisher.pool().stats().bytes <= 1 << 20);
}

/// The pages of a large segment are mapped by who reads them, when it does: to take one in does not hold up a runtime's thread.
#[tokio::test]
async fn large_segment_is_taken_in_without_touching_its_pages() {
    const LEN: usize = 64 << 20;
    let dir = Dir::new();
    let publisher = dir.publisher("t").bind().unwrap();
    let mut subscriber = dir.subscriber("t").connect().unwrap();
    within("subscriber", publisher.wait_for_subscribers(1)).await;
    within("send", publisher.send(publisher.loan(LEN).await.unwrap())).await.unwrap();
    let faults = || {
        let stat = std::fs::read_to_string("/proc/thread-self/stat").unwrap();
        let fields = stat.rsplit_once(')').unwrap().1;
        fields.split_whitespace().nth(7).unwrap().parse::<usize>().unwrap()
    };
    let resident = || {
        let status = std::fs::read_to_string("/proc/self/smaps_rollup").unwrap();
        let rss = status.lines().find_map(|line| line.strip_prefix("Rss:")).unwrap();
        rss.split_whitespace().next().unwrap().parse::<usize>().unwrap() << 10
    };
    let before = (faults(), resident());
    let sample = within("recv", subscriber.recv()).await.unwrap();
    let after = (faults(), resident());
    assert_eq!(sample.len(), LEN);
    assert!(after.0 - before.0 < LEN / 4_096 / 64, "{} faults", after.0 - before.0);
    assert!(after.1 < before.1 + LEN / 4, "{} bytes more", after.1 - before.1);
}

/// Each message has a segment of its own, announced over the socket, which fills up long before the link does. The
/// subscriber then releases nothing: that it reads has to suffice.
#[test]
fn sender_goes_on_when_a_full_socket_is_read() {
    let dir = Dir::new();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let pool = ShmPoolConfig::new().pooling(false);
    let builder = dir.publisher("t").queue(8).pool(pool).runtime(runtime.handle().clone());
    let publisher = builder.bind().unwrap();
    let mut subscriber = dir.subscriber("t").depth(2_000).connect().unwrap();
    let mut accepted = 0_u32;
    while publisher.try_send(vec![0; 20_000]).is_ok() {
        accepted += 1;
    }
    let queued = publisher.stats().queued;
    assert!(queued > 0 && (accepted as usize) < 1_000, "{accepted} accepted: the socket was never full");
    let mut held = Vec::new();
    for number in 0..accepted {
        let sample = subscriber.blocking_recv_timeout(support::LIMIT).unwrap();
        assert_eq!(sample.seq(), u64::from(number));
        held.push(sample);
    }
}
