//! A publisher as a `Sink`: what `feed` accepted is delivered, at the cap and beside others, and nobody waits for a flush
//! that never comes.

mod support;

use std::future::poll_fn;
use std::pin::Pin;
use std::task::{Context, Poll};

use futures::{Sink, SinkExt, StreamExt, stream};
use support::{Dir, Random, until, within};
use tokio::task::{JoinSet, yield_now};
use tokio_shm::{BusyPoll, SendErrorKind, ShmLoan, ShmPoolConfig, ShmPublisher, ShmSubscriber, SinkError};
use tokio_test::{assert_pending, assert_ready, assert_ready_err, assert_ready_ok, task};

const SLOT: usize = 4096;

fn poll_ready(sink: &mut ShmPublisher, cx: &mut Context<'_>) -> Poll<Result<(), SinkError<Vec<u8>>>> {
    Sink::<Vec<u8>>::poll_ready(Pin::new(sink), cx)
}

fn start_send(sink: &mut ShmPublisher, bytes: Vec<u8>) -> Result<(), SinkError<Vec<u8>>> {
    Sink::<Vec<u8>>::start_send(Pin::new(sink), bytes)
}

async fn ready(sink: &mut ShmPublisher) -> Result<(), SinkError<Vec<u8>>> {
    poll_fn(|cx| poll_ready(sink, cx)).await
}

async fn flush(sink: &mut ShmPublisher) -> Result<(), SinkError<Vec<u8>>> {
    SinkExt::<Vec<u8>>::flush(sink).await
}

/// The first bytes of the next `n` messages.
async fn receive(subscriber: &mut ShmSubscriber, n: usize) -> Vec<u8> {
    within("recv", subscriber.take(n).map(|sample| sample.expect("a message")[0]).collect()).await
}

/// A pool of so many slots.
fn slots(n: u64) -> ShmPoolConfig {
    ShmPoolConfig::new().max_bytes(n * SLOT as u64)
}

fn filled(publisher: &ShmPublisher, byte: u8) -> ShmLoan {
    let mut loan = publisher.try_loan(SLOT).expect("a slot");
    loan.fill(byte);
    loan
}

#[tokio::test]
async fn message_fed_at_the_cap_waits_and_arrives_in_order() {
    let dir = Dir::new();
    let publisher = dir.publisher("t").pool(slots(2)).link_bytes(u64::MAX).bind().unwrap();
    let mut subscriber = dir.subscriber("t").connect().unwrap();
    let mut sink = publisher.clone();
    publisher.try_send(filled(&publisher, 0)).unwrap();
    publisher.try_send(filled(&publisher, 1)).unwrap();
    within("feed", sink.feed(vec![2; SLOT])).await.unwrap();
    let mut other = publisher.clone();
    {
        let mut flushing = task::spawn(flush(&mut sink));
        assert_pending!(flushing.poll(), "it waits for memory");
        let mut readying = task::spawn(ready(&mut other));
        assert_pending!(readying.poll(), "and nobody else may feed meanwhile");
        assert_eq!(receive(&mut subscriber, 3).await, [0, 1, 2]);
        within("woken", until("woken", || flushing.is_woken() && readying.is_woken())).await;
        assert_ready_ok!(flushing.poll());
        assert_ready_ok!(readying.poll());
    }
    drop((sink, other, subscriber));
    within("pool", until("the pool is full", || publisher.pool().stats().in_use() == 0)).await;
}

/// A sink that has fed lately has its next place already, and waits all the same.
#[tokio::test]
async fn message_fed_at_the_cap_goes_before_what_sinks_with_a_place_would_feed() {
    let dir = Dir::new();
    let publisher = dir.publisher("t").pool(slots(2)).link_bytes(u64::MAX).bind().unwrap();
    let mut subscriber = dir.subscriber("t").connect().unwrap();
    let (mut sink, mut other) = (publisher.clone(), publisher.clone());
    within("feed", other.feed(filled(&publisher, 0))).await.unwrap();
    publisher.try_send(filled(&publisher, 1)).unwrap();
    within("feed", sink.feed(vec![2; SLOT])).await.unwrap();
    {
        let mut flushing = task::spawn(flush(&mut sink));
        assert_pending!(flushing.poll(), "it waits for memory");
        let mut readying = task::spawn(ready(&mut other));
        assert_pending!(readying.poll(), "and so does this one");
        assert_eq!(receive(&mut subscriber, 3).await, [0, 1, 2]);
        within("woken", until("woken", || flushing.is_woken() && readying.is_woken())).await;
        assert_ready_ok!(flushing.poll());
        assert_ready_ok!(readying.poll());
    }
}

/// All memory is in messages that come after the one that has none.
#[tokio::test]
async fn message_fed_at_the_cap_gets_memory_from_those_behind_it() {
    let dir = Dir::new();
    let publisher = dir.publisher("t").pool(slots(3)).link_bytes(u64::MAX).bind().unwrap();
    let mut subscriber = dir.subscriber("t").connect().unwrap();
    let mut sink = publisher.clone();
    let loans = [filled(&publisher, 2), filled(&publisher, 3), filled(&publisher, 4)];
    within("feed", sink.feed(vec![0; SLOT])).await.unwrap();
    // A sender without memory, and three that have all of it.
    let sender = tokio::spawn({
        let publisher = publisher.clone();
        async move { publisher.send(vec![1; SLOT]).await.unwrap() }
    });
    yield_now().await;
    for loan in loans {
        within("send", publisher.send(loan)).await.unwrap();
    }
    let received = receive(&mut subscriber, 5).await;
    within("sender", sender).await.unwrap();
    within("flush", flush(&mut sink)).await.unwrap();
    assert_eq!(received[0], 0, "it was accepted first");
    let others: Vec<_> = received.iter().copied().filter(|byte| *byte > 1).collect();
    assert_eq!(others, [2, 3, 4]);
}

/// The same with the queue full: senders hold the memory and wait for places.
#[tokio::test]
async fn message_fed_at_the_cap_gets_memory_from_senders_that_wait_for_a_place() {
    let dir = Dir::new();
    let publisher = dir.publisher("t").queue(1).pool(slots(3)).bind().unwrap();
    let mut subscriber = dir.subscriber("t").connect().unwrap();
    let mut sink = publisher.clone();
    let loans = [filled(&publisher, 1), filled(&publisher, 2), filled(&publisher, 3)];
    within("feed", sink.feed(vec![0; SLOT])).await.unwrap();
    let mut senders = JoinSet::new();
    for loan in loans {
        let publisher = publisher.clone();
        senders.spawn(async move { publisher.send(loan).await.unwrap() });
    }
    let mut received = receive(&mut subscriber, 4).await;
    assert_eq!(received[0], 0);
    received.sort_unstable();
    assert_eq!(received, [0, 1, 2, 3]);
    within("senders", senders.join_all()).await;
    within("flush", flush(&mut sink)).await.unwrap();
}

/// Small messages behind a large one: none of their slots will do, but what they free together does.
#[tokio::test]
async fn large_message_fed_at_the_cap_gets_the_memory_of_small_ones_behind_it() {
    let dir = Dir::new();
    let publisher = dir.publisher("t").pool(slots(4)).bind().unwrap();
    let mut subscriber = dir.subscriber("t").connect().unwrap();
    let mut sink = publisher.clone();
    let loans: Vec<_> = (1..=4).map(|byte| filled(&publisher, byte)).collect();
    within("feed", sink.feed(vec![0; 3 * SLOT])).await.unwrap();
    for loan in loans {
        within("send", publisher.send(loan)).await.unwrap();
    }
    assert_eq!(receive(&mut subscriber, 5).await, [0, 1, 2, 3, 4]);
    within("flush", flush(&mut sink)).await.unwrap();
    drop((sink, subscriber));
    within("pool", until("the pool is full", || publisher.pool().stats().in_use() == 0)).await;
}

#[tokio::test]
async fn message_that_can_never_fit_is_given_back() {
    let dir = Dir::new();
    let mut sink = dir.publisher("t").pool(slots(2)).bind().unwrap();
    let error = within("feed", sink.feed(vec![7; 3 * SLOT])).await.unwrap_err();
    assert!(matches!(error.kind(), SendErrorKind::Pool(_)));
    assert!(error.into_inner().unwrap() == vec![7; 3 * SLOT]);
    within("feed", sink.feed(vec![7])).await.unwrap();
}

#[tokio::test]
async fn reserved_place_is_given_back_when_the_handle_is_dropped() {
    let dir = Dir::new();
    let publisher = dir.publisher("t").queue(1).bind().unwrap();
    let mut holder = publisher.clone();
    within("ready", ready(&mut holder)).await.unwrap();
    let mut other = publisher.clone();
    {
        let mut readying = task::spawn(ready(&mut other));
        assert_pending!(readying.poll(), "the only place is reserved");
        drop(holder);
        assert!(readying.is_woken());
        assert_ready_ok!(readying.poll());
    }
    start_send(&mut other, vec![1]).unwrap();
    within("flush", flush(&mut other)).await.unwrap();
}

#[tokio::test]
async fn reserved_place_is_no_obstacle_to_a_close() {
    let dir = Dir::new();
    let publisher = dir.publisher("t").queue(1).bind().unwrap();
    let mut holder = publisher.clone();
    within("ready", ready(&mut holder)).await.unwrap();
    let mut waiting = publisher.clone();
    let mut readying = task::spawn(ready(&mut waiting));
    assert_pending!(readying.poll());
    within("close", publisher.close()).await.unwrap();
    assert!(readying.is_woken());
    assert!(matches!(assert_ready_err!(readying.poll()).kind(), SendErrorKind::Closed));
    let error = start_send(&mut holder, vec![1]).unwrap_err();
    assert!(matches!(error.kind(), SendErrorKind::Closed));
    assert_eq!(error.into_inner(), Some(vec![1]));
}

#[tokio::test]
async fn message_fed_is_delivered_when_its_handle_is_dropped() {
    let dir = Dir::new();
    let publisher = dir.publisher("t").bind().unwrap();
    let mut subscriber = dir.subscriber("t").connect().unwrap();
    let mut sink = publisher.clone();
    within("feed", sink.feed(vec![1])).await.unwrap();
    drop(sink);
    assert_eq!(receive(&mut subscriber, 1).await, [1]);
}

#[tokio::test]
async fn message_fed_before_a_close_by_another_is_delivered() {
    let dir = Dir::new();
    let publisher = dir.publisher("t").bind().unwrap();
    let subscriber = dir.subscriber("t").end_with_last_publisher(true).connect().unwrap();
    let mut sink = publisher.clone();
    within("feed", sink.feed(vec![1])).await.unwrap();
    within("close", publisher.close()).await.unwrap();
    let received: Vec<_> = within("recv", subscriber.map(|sample| sample.unwrap()[0]).collect()).await;
    assert_eq!(received, [1]);
}

#[tokio::test]
async fn queue_full_of_unflushed_messages_keeps_no_sender_waiting() {
    let dir = Dir::new();
    let publisher = dir.publisher("t").queue(4).bind().unwrap();
    let mut subscriber = dir.subscriber("t").connect().unwrap();
    let mut sink = publisher.clone();
    for number in 0..4 {
        within("feed", sink.feed(vec![number])).await.unwrap();
    }
    publisher.try_send([4]).unwrap();
    for number in 5..9 {
        within("feed", sink.feed(vec![number])).await.unwrap();
    }
    assert_ready_ok!(task::spawn(publisher.send([9])).poll());
    assert_eq!(receive(&mut subscriber, 10).await, (0..10).collect::<Vec<_>>());
}

/// A sender that comes while a message waits for room on its links needs a place, and none again once that one has gone.
#[tokio::test]
async fn sender_goes_on_while_a_sink_has_reserved_the_only_place() {
    let dir = Dir::new();
    let publisher = dir.publisher("t").queue(1).bind().unwrap();
    let mut subscriber = dir.subscriber("t").depth(1).connect().unwrap();
    let mut holder = publisher.clone();
    within("ready", ready(&mut holder)).await.unwrap();
    publisher.try_send([0]).unwrap();
    publisher.try_send([1]).unwrap();
    let mut sending = task::spawn(publisher.send([2]));
    assert_pending!(sending.poll(), "one is on the link, one is stuck, and there is no place");
    assert_eq!(receive(&mut subscriber, 2).await, [0, 1]);
    within("woken", until("woken", || sending.is_woken())).await;
    assert_ready_ok!(sending.poll());
    assert_eq!(receive(&mut subscriber, 1).await, [2]);
}

/// A publisher, and a subscriber with room for more than a silent sink is allowed, which sleeps when it finds nothing.
async fn with_sleeper(dir: &Dir) -> (ShmPublisher, ShmSubscriber) {
    let publisher = dir.publisher("t").bind().unwrap();
    let subscriber = dir.subscriber("t").depth(1_000).busy_poll(BusyPoll::Off).connect().unwrap();
    within("wait", publisher.wait_for_subscribers(1)).await;
    (publisher, subscriber)
}

#[tokio::test]
async fn message_fed_wakes_whoever_sleeps_with_the_flush() {
    let dir = Dir::new();
    let (mut sink, mut subscriber) = with_sleeper(&dir).await;
    let mut receiving = task::spawn(subscriber.next());
    assert_pending!(receiving.poll());
    for number in 0..3 {
        within("feed", sink.feed(vec![number])).await.unwrap();
    }
    within("flush", flush(&mut sink)).await.unwrap();
    within("woken", until("woken", || receiving.is_woken())).await;
    assert_eq!(assert_ready!(receiving.poll()).unwrap().unwrap()[0], 0);
}

#[tokio::test]
async fn messages_fed_without_a_flush_wake_whoever_sleeps_all_the_same() {
    let dir = Dir::new();
    let (mut sink, mut subscriber) = with_sleeper(&dir).await;
    let mut receiving = task::spawn(subscriber.next());
    assert_pending!(receiving.poll());
    for number in 0..64 {
        within("feed", sink.feed(vec![number])).await.unwrap();
    }
    within("woken", until("woken", || receiving.is_woken())).await;
    assert_eq!(assert_ready!(receiving.poll()).unwrap().unwrap()[0], 0);
}

#[tokio::test]
async fn large_message_fed_is_not_kept_for_the_flush() {
    let dir = Dir::new();
    let (mut sink, mut subscriber) = with_sleeper(&dir).await;
    within("feed", sink.feed(vec![7; 64 << 10])).await.unwrap();
    assert_eq!(receive(&mut subscriber, 1).await, [7]);
}

/// Neither by a feed nor by a flush is there ever anything to wait for.
#[tokio::test]
async fn sink_fed_without_end_lets_other_tasks_run() {
    let dir = Dir::new();
    let mut sink = dir.publisher("t").bind().unwrap();
    for flushes in [false, true] {
        let other = tokio::spawn(async {});
        for _ in 0..100_000 {
            sink.feed(vec![0]).await.unwrap();
            if flushes {
                flush(&mut sink).await.unwrap();
            }
            if other.is_finished() {
                break;
            }
        }
        assert!(other.is_finished());
    }
}

/// Whoever waits for memory comes first or last: what has all of it was fed and is not flushed.
#[tokio::test]
async fn memory_in_messages_fed_and_not_flushed_is_no_obstacle_to_who_waits_for_it() {
    let dir = Dir::new();
    let publisher = dir.publisher("t").pool(slots(2)).bind().unwrap();
    let subscriber = dir.subscriber("t").connect().unwrap();
    let reader =
        tokio::spawn(subscriber.map(|sample| sample.map(|sample| sample[0])).take(5).collect::<Vec<_>>());
    within("wait", publisher.wait_for_subscribers(1)).await;
    for _ in 0..100 {
        yield_now().await;
    }
    // From here on nobody has anything to do.
    let mut sink = publisher.clone();
    for byte in [0, 1] {
        within("feed", sink.feed(filled(&publisher, byte))).await.unwrap();
    }
    let last = [
        within("loan", publisher.loan(SLOT)).await.unwrap(),
        within("loan", publisher.loan(SLOT)).await.unwrap(),
    ];
    let waits = tokio::spawn({
        let publisher = publisher.clone();
        async move { publisher.loan(SLOT).await.unwrap() }
    });
    within("nobody waits", until("nobody waits", || publisher.pool().stats().waiters == 1)).await;
    for (mut loan, byte) in last.into_iter().zip([2, 3]) {
        loan.fill(byte);
        within("feed", sink.feed(loan)).await.unwrap();
    }
    let mut loan = within("loan", waits).await.unwrap();
    loan.fill(4);
    within("send", publisher.send(loan)).await.unwrap();
    let received = within("reader", reader).await.unwrap();
    assert_eq!(received.into_iter().map(Result::unwrap).collect::<Vec<_>>(), [0, 1, 2, 3, 4]);
}

/// One handle, in both ways, with a subscriber that now keeps up and now does not.
#[tokio::test]
async fn messages_fed_and_sent_by_one_handle_keep_their_order() {
    const MESSAGES: usize = 3_000;
    let dir = Dir::new();
    let publisher = dir.publisher("t").queue(8).bind().unwrap();
    let mut subscriber = dir.subscriber("t").depth(4).connect().unwrap();
    publisher.wait_for_subscribers(1).await;
    let mut sink = publisher.clone();
    let sender = tokio::spawn(async move {
        let mut random = Random::new(7);
        for number in 0..MESSAGES {
            let bytes = number.to_le_bytes().to_vec();
            match random.below(5) {
                0 => ShmPublisher::send(&sink, bytes).await.unwrap(),
                1 if ShmPublisher::try_send(&sink, bytes.clone()).is_ok() => {}
                2 => SinkExt::send(&mut sink, bytes).await.unwrap(),
                _ => sink.feed(bytes).await.unwrap(),
            }
        }
        flush(&mut sink).await.unwrap();
    });
    let mut random = Random::new(8);
    for number in 0..MESSAGES {
        if random.below(20) == 0 {
            for _ in 0..random.below(50) {
                yield_now().await;
            }
        }
        let sample = within("recv", subscriber.recv()).await.unwrap();
        assert_eq!(*sample, number.to_le_bytes());
    }
    within("sender", sender).await.unwrap();
}

#[tokio::test]
async fn feed_given_up_takes_no_wake_up_from_a_sender() {
    let dir = Dir::new();
    let publisher = dir.publisher("t").queue(1).bind().unwrap();
    let mut subscriber = dir.subscriber("t").depth(2).connect().unwrap();
    for number in 0..4_u8 {
        publisher.try_send([number]).unwrap();
    }
    let mut idle = publisher.clone();
    {
        let mut feeding = task::spawn(idle.feed(vec![8]));
        assert_pending!(feeding.poll());
    }
    let mut sending = task::spawn(publisher.send([4]));
    assert_pending!(sending.poll());
    drop(subscriber.recv().await.unwrap());
    within("woken", until("the sender is woken", || sending.is_woken())).await;
    assert_ready_ok!(sending.poll());
    assert_eq!(receive(&mut subscriber, 4).await, [1, 2, 3, 4]);
}

/// The next flush must wait for what was fed after the one that was given up.
#[tokio::test]
async fn flush_after_one_given_up_is_about_newer_messages_too() {
    let dir = Dir::new();
    let mut sink = dir.publisher("t").queue(8).bind().unwrap();
    let mut subscriber = dir.subscriber("t").depth(1).connect().unwrap();
    sink.feed(vec![0]).await.unwrap();
    sink.feed(vec![1]).await.unwrap();
    {
        let mut flushing = task::spawn(flush(&mut sink));
        assert_pending!(flushing.poll());
    }
    sink.feed(vec![2]).await.unwrap();
    {
        let mut flushing = task::spawn(flush(&mut sink));
        assert_pending!(flushing.poll());
        assert_eq!(receive(&mut subscriber, 1).await, [0]);
        // What the first flush was about is on the link once the second can be received; the last one is not.
        let one = within("recv", subscriber.recv()).await.unwrap();
        assert_eq!(*one, [1]);
        assert_pending!(flushing.poll());
        drop(one);
        assert_eq!(receive(&mut subscriber, 1).await, [2]);
        within("woken", until("woken", || flushing.is_woken())).await;
        assert_ready_ok!(flushing.poll());
    }
}

/// As many sinks as there are clones, and places for fewer.
async fn many_sinks(queue: u32, pool: ShmPoolConfig) {
    const SINKS: u8 = 6;
    const EACH: u32 = 500;

    let dir = Dir::new();
    let publisher = dir.publisher("t").queue(queue).pool(pool).bind().unwrap();
    let mut subscriber = dir.subscriber("t").depth(4).end_with_last_publisher(true).connect().unwrap();
    publisher.wait_for_subscribers(1).await;
    for who in 0..SINKS {
        let mut sink = publisher.clone();
        tokio::spawn(async move {
            let mut random = Random::new(u64::from(who));
            for number in 0..EACH {
                let mut message = vec![who; SLOT];
                message[..4].copy_from_slice(&number.to_le_bytes());
                if random.below(4) == 0 {
                    SinkExt::send(&mut sink, message).await.unwrap();
                } else {
                    sink.feed(message).await.unwrap();
                }
            }
            // No flush: the drop has the rest delivered.
        });
    }
    drop(publisher);
    let mut next = [0; SINKS as usize];
    while let Some(sample) = within("recv", subscriber.next()).await {
        let sample = sample.unwrap();
        let next = &mut next[usize::from(sample[4])];
        assert_eq!(sample[..4], u32::to_le_bytes(*next));
        *next += 1;
    }
    assert_eq!(next, [EACH; SINKS as usize]);
}

#[tokio::test]
async fn sinks_at_once_on_one_thread_are_received_exactly() {
    many_sinks(2, ShmPoolConfig::new()).await;
    many_sinks(16, slots(4)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sinks_at_once_on_many_threads_are_received_exactly() {
    many_sinks(2, ShmPoolConfig::new()).await;
    many_sinks(16, slots(4)).await;
    many_sinks(1, slots(1)).await;
}

#[tokio::test]
async fn stream_is_forwarded_whole() {
    let dir = Dir::new();
    let publisher = dir.publisher("t").queue(3).bind().unwrap();
    let subscriber = dir.subscriber("t").depth(2).end_with_last_publisher(true).connect().unwrap();
    let messages = stream::iter((0..1_000_u32).map(|number| Ok(number.to_le_bytes().to_vec())));
    let forwarded = tokio::spawn(async move {
        messages.forward(publisher).await.unwrap();
    });
    let read = |sample: Result<tokio_shm::ShmSample, _>| {
        u32::from_le_bytes((&*sample.expect("a message")).try_into().expect("four bytes"))
    };
    let received: Vec<_> = within("recv", subscriber.map(read).collect()).await;
    assert_eq!(received, (0..1_000).collect::<Vec<_>>());
    forwarded.await.unwrap();
}

#[tokio::test]
#[should_panic(expected = "start_send without a poll_ready")]
async fn start_send_without_poll_ready_panics() {
    let dir = Dir::new();
    let mut sink = dir.publisher("t").bind().unwrap();
    drop(start_send(&mut sink, vec![1]));
}

/// `poll_ready` may be called again and again, and costs one place.
#[tokio::test]
async fn poll_ready_again_reserves_no_second_place() {
    let dir = Dir::new();
    let publisher = dir.publisher("t").queue(2).bind().unwrap();
    let (mut first, mut second) = (publisher.clone(), publisher.clone());
    for _ in 0..3 {
        assert_ready!(task::spawn(ready(&mut first)).poll()).unwrap();
    }
    assert_ready!(task::spawn(ready(&mut second)).poll()).unwrap();
    let mut third = publisher.clone();
    assert_pending!(task::spawn(ready(&mut third)).poll());
}
