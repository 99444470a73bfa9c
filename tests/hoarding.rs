//! A program that waits for messages while it holds all that it may have itself is told so, instead of waiting for ever.

mod support;

use std::time::{Duration, Instant};

use futures::{StreamExt as _, TryStreamExt as _};
use support::{Dir, LIMIT, take_next, within};
use tokio::runtime::{Builder, Runtime};
use tokio_shm::{BusyPoll, RecvError, ShmPoolConfig, ShmPublisher, ShmSample, ShmSubscriber};
use tokio_test::{assert_pending, task};

const MIB: usize = 1 << 20;

fn runtime() -> Runtime {
    Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap()
}

/// As many messages as asked for, in a task.
fn send(publisher: &ShmPublisher, count: u8) -> tokio::task::JoinHandle<()> {
    let publisher = publisher.clone();
    tokio::spawn(async move {
        for number in 0..count {
            publisher.send([number]).await.unwrap();
        }
    })
}

fn is_told(item: &Result<ShmSample, RecvError>, samples: u64, bytes: bool) -> bool {
    matches!(item, Err(RecvError::AllHeld { held, in_bytes, .. }) if (*held, *in_bytes) == (samples, bytes))
}

#[tokio::test]
async fn chunks_of_more_than_the_depth_hand_out_the_error() {
    let dir = Dir::new();
    let publisher = dir.publisher("t").bind().unwrap();
    let subscriber = dir.subscriber("t").depth(64).connect().unwrap();
    let sending = send(&publisher, 100);
    // What is missing of a chunk comes at one a second.
    let mut chunks = subscriber.chunks(67);
    let chunk = within("a chunk", chunks.next()).await.unwrap();
    let (samples, errors) = chunk.split_at(64);
    for (number, sample) in (0..).zip(samples) {
        assert_eq!(**sample.as_ref().unwrap(), [number]);
    }
    for error in errors {
        assert!(is_told(error, 64, false), "{error:?}");
        let error = error.as_ref().unwrap_err();
        assert!(!error.is_terminal());
        let text = error.to_string();
        assert!(text.contains("holds 64 samples") && text.contains("raise depth"), "{text}");
    }
    drop(chunk);
    // And it goes on.
    let mut rest = chunks.into_inner();
    for number in 64..100 {
        assert_eq!(*within("recv", rest.next()).await.unwrap().unwrap(), [number]);
    }
    within("send", sending).await.unwrap();
}

#[tokio::test]
async fn chunks_that_end_at_an_error_do_after_a_second() {
    let dir = Dir::new();
    let publisher = dir.publisher("t").bind().unwrap();
    let subscriber = dir.subscriber("t").depth(64).connect().unwrap();
    let sending = send(&publisher, 100);
    let mut chunks = subscriber.try_chunks(100);
    let error = within("a chunk", chunks.next()).await.unwrap().unwrap_err();
    assert_eq!(error.0.len(), 64);
    assert!(is_told(&Err(error.1), 64, false));
    drop(error.0);
    let mut rest = Vec::new();
    while rest.len() < 36 {
        rest.push(within("recv", chunks.get_mut().next()).await.unwrap().unwrap()[0]);
    }
    assert!(rest.into_iter().eq(64..100));
    within("send", sending).await.unwrap();
}

/// A subscriber and all samples that its depth of two allows, with a third message waiting.
struct Held {
    _dir: Dir,
    runtime: Runtime,
    publisher: ShmPublisher,
    subscriber: ShmSubscriber,
    held: Vec<ShmSample>,
}

impl Held {
    fn new(busy_poll: BusyPoll) -> Self {
        let (dir, runtime) = (Dir::new(), runtime());
        let publisher = dir.publisher("t").runtime(runtime.handle().clone()).bind().unwrap();
        let mut subscriber = dir.subscriber("t").depth(2).busy_poll(busy_poll).connect().unwrap();
        (0..3).for_each(|number| publisher.try_send([number]).unwrap());
        let held = (0..2).map(|_| subscriber.blocking_recv_timeout(LIMIT).unwrap()).collect();
        Self { _dir: dir, runtime, publisher, subscriber, held }
    }

    /// What `receive` returns is the notice, not at once and twice; with a sample dropped the next message comes.
    fn check(
        &mut self,
        mut receive: impl FnMut(&Runtime, &mut ShmSubscriber) -> Result<ShmSample, RecvError>,
    ) {
        for _ in 0..2 {
            let begun = Instant::now();
            let notice = receive(&self.runtime, &mut self.subscriber);
            assert!(is_told(&notice, 2, false), "{notice:?}");
            assert!(begun.elapsed() > Duration::from_millis(900), "{:?}", begun.elapsed());
        }
        drop(self.held.remove(0));
        assert_eq!(*receive(&self.runtime, &mut self.subscriber).unwrap(), [2]);
        self.held.clear();
        self.publisher.try_send([3]).unwrap();
        assert_eq!(*receive(&self.runtime, &mut self.subscriber).unwrap(), [3]);
    }
}

#[test]
fn wait_in_vain_is_told_by_every_way_of_receiving() {
    for busy_poll in [BusyPoll::default(), BusyPoll::Off, BusyPoll::Always] {
        let mut held = Held::new(busy_poll);
        held.check(|runtime, subscriber| runtime.block_on(within("recv", subscriber.recv())));
        let mut held = Held::new(busy_poll);
        held.check(|runtime, subscriber| runtime.block_on(within("next", subscriber.next())).unwrap());
        let mut held = Held::new(busy_poll);
        held.check(|_, subscriber| subscriber.blocking_recv());
        let mut held = Held::new(busy_poll);
        held.check(|_, subscriber| subscriber.blocking_recv_timeout(LIMIT));
    }
    Held::new(BusyPoll::default()).check(|_, subscriber| take_next(subscriber));
}

#[test]
fn wait_in_pieces_is_told_as_one() {
    let mut all = Held::new(BusyPoll::default());
    let mut timed_out = 0;
    let notice = loop {
        match all.subscriber.blocking_recv_timeout(Duration::from_millis(20)) {
            Err(RecvError::TimedOut) => timed_out += 1,
            other => break other,
        }
    };
    assert!(is_told(&notice, 2, false), "{notice:?}");
    assert!((2..=51).contains(&timed_out), "{timed_out}");
    assert_eq!(all.held.len(), 2);
}

#[tokio::test]
async fn sample_given_up_elsewhere_in_time_is_all_there_is_to_it() {
    let dir = Dir::new();
    let publisher = dir.publisher("t").bind().unwrap();
    let mut subscriber = dir.subscriber("t").depth(1).connect().unwrap();
    let mut held = None;
    for number in 0..200_u8 {
        publisher.try_send([number]).unwrap();
        let mut next = task::spawn(subscriber.recv());
        if held.is_some() {
            assert_pending!(next.poll());
            let given_up = tokio::spawn(async move { drop(held) });
            within("elsewhere", given_up).await.unwrap();
        }
        let sample = within("recv", next).await.unwrap();
        assert_eq!(*sample, [number]);
        held = Some(sample);
    }
}

#[tokio::test]
async fn wait_is_in_vain_only_if_nothing_can_come_from_any_publisher() {
    let dir = Dir::new();
    let (one, other) = (dir.publisher("t").bind().unwrap(), dir.publisher("t").bind().unwrap());
    let mut subscriber = dir.subscriber("t").depth(1).connect().unwrap();
    one.send([1]).await.unwrap();
    let held = within("recv", subscriber.recv()).await.unwrap();
    let waited = tokio::time::timeout(Duration::from_millis(2_500), subscriber.recv()).await;
    assert!(waited.is_err(), "{waited:?}");
    other.send([2]).await.unwrap();
    let also = within("recv", subscriber.recv()).await.unwrap();
    let notice = within("recv", subscriber.recv()).await;
    assert!(is_told(&notice, 2, false), "{notice:?}");
    drop((held, also));
}

/// The publisher says so: only it knows what a link may have.
#[tokio::test]
async fn wait_for_bytes_that_the_program_holds_itself_is_told() {
    let dir = Dir::new();
    let pool = ShmPoolConfig::new().max_bytes(16 * MIB as u64);
    let publisher = dir.publisher("t").pool(pool).link_bytes(4 * MIB as u64).bind().unwrap();
    let mut subscriber = dir.subscriber("t").connect().unwrap();
    let mut other = dir.subscriber("t").connect().unwrap();
    within("subscribers", publisher.wait_for_subscribers(2)).await;
    let mut held = Vec::new();
    for _ in 0..3 {
        publisher.send(publisher.loan(MIB).await.unwrap()).await.unwrap();
        held.push(within("recv", subscriber.recv()).await.unwrap());
        drop(within("recv", other.recv()).await.unwrap());
    }
    // One that keeps no sender waiting is not told, nor one that only waits with the others.
    let waited = tokio::time::timeout(Duration::from_millis(1_500), subscriber.recv()).await;
    assert!(waited.is_err(), "{waited:?}");
    publisher.send(publisher.loan(MIB).await.unwrap()).await.unwrap();
    held.push(within("recv", subscriber.recv()).await.unwrap());
    let kept = within("recv", other.recv()).await.unwrap();
    publisher.send(publisher.loan(2 * MIB).await.unwrap()).await.unwrap();
    let others = within("recv", other.recv()).await.unwrap();
    assert_eq!(others.len(), 2 * MIB);
    let innocent = tokio::spawn(async move {
        let waited = tokio::time::timeout(Duration::from_millis(2_500), other.recv()).await;
        (other, waited.is_err())
    });
    let notice = within("recv", subscriber.recv()).await;
    assert!(is_told(&notice, 4, true), "{notice:?}");
    let text = notice.unwrap_err().to_string();
    assert!(text.contains("holds 4 samples") && text.contains("link_bytes"), "{text}");
    let (_other, waited) = innocent.await.unwrap();
    assert!(waited, "told although another is in the way");
    held.clear();
    assert_eq!(within("recv", subscriber.recv()).await.unwrap().len(), 2 * MIB);
    // What was told is over with it.
    let last = publisher.loan(8).await.unwrap();
    publisher.send(last).await.unwrap();
    let small = within("recv", subscriber.recv()).await.unwrap();
    let waited = tokio::time::timeout(Duration::from_millis(2_500), subscriber.recv()).await;
    assert!(waited.is_err(), "{waited:?}");
    drop((small, kept, others));
}

/// It comes again by itself, and is not taken before it has dropped enough: what it keeps never takes the others' memory.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn subscriber_that_keeps_all_and_is_evicted_stops_nobody() {
    const MESSAGES: u64 = 100;
    let dir = Dir::new();
    let pool = ShmPoolConfig::new().max_bytes(16 * MIB as u64);
    let publisher = dir.publisher("t").pool(pool).evict_after(Duration::from_millis(20)).bind().unwrap();
    let mut reads = dir.subscriber("t").connect().unwrap();
    let mut keeps = dir.subscriber("t").connect().unwrap();
    let keeper = tokio::spawn(async move {
        let (mut kept, mut evicted) = (Vec::new(), 0);
        loop {
            match keeps.recv().await {
                Ok(sample) => kept.push(sample),
                Err(RecvError::Evicted { .. }) => evicted += 1,
                Err(RecvError::Refused { reason, .. }) => break (keeps, kept, evicted, reason),
                Err(RecvError::Lagged { .. } | RecvError::AllHeld { .. }) => {}
                Err(other) => panic!("{other}"),
            }
        }
    });
    let reader = tokio::spawn(async move {
        while reads.recv().await.unwrap().seq() < MESSAGES - 1 {}
        reads
    });
    for _ in 0..MESSAGES {
        within("send", publisher.send(vec![1; MIB])).await.unwrap();
        let stats = publisher.pool().stats();
        assert!(stats.abandoned_bytes <= stats.max_bytes, "{stats:?}");
    }
    let _reads = within("the reader", reader).await.unwrap();
    let (mut keeps, kept, evicted, reason) = within("the keeper is refused", keeper).await.unwrap();
    assert!(evicted > 0 && reason.contains("drop them"), "{evicted}: {reason}");
    // And it is taken when it has.
    drop(kept);
    within("a place", keeps.wait_for_publishers(1)).await.unwrap();
}
