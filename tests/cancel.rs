//! Futures dropped at any await: nothing sent that was not accepted, nothing lost that was, no slot and no wake-up gone.
//!
//! Storms first, then each case by hand.

mod support;

use std::collections::VecDeque;
use std::future::{Future, poll_fn};
use std::task::Poll;
use std::time::{Duration, Instant};

use futures::{FutureExt, SinkExt, StreamExt};
use support::{Dir, Progress, Random, rounds, spawn_bounded, spawn_while_it_moves, until, within};
use tokio::runtime::Builder;
use tokio::task::{JoinSet, yield_now};
use tokio_shm::{OnFull, PoolStats, ShmPoolConfig, ShmPublisher, ShmSubscriber, TryRecvError};
use tokio_test::{assert_pending, assert_ready, assert_ready_ok, task};

const TASKS: u32 = 8;

/// What each task of a storm tries to send.
fn sends() -> u32 {
    rounds(100_000 / TASKS)
}

#[derive(Clone, Copy)]
enum Flavor {
    CurrentThread,
    MultiThread,
}

/// Runs a storm on a runtime of its own.
fn run<F: Future<Output = ()>>(flavor: Flavor, storm: impl FnOnce(Progress) -> F + Send + 'static) {
    let body = move |progress| {
        let mut builder = match flavor {
            Flavor::CurrentThread => Builder::new_current_thread(),
            Flavor::MultiThread => Builder::new_multi_thread(),
        };
        builder.worker_threads(2).enable_all().build().unwrap().block_on(storm(progress));
    };
    spawn_while_it_moves("storm", body)();
}

/// How a storm's future is given up.
#[derive(Clone, Copy)]
enum Hurry {
    /// After up to 200 µs. (tokio's own timer counts milliseconds.)
    Microseconds,
    /// After a few turns of the scheduler, by `select!`.
    Turns,
}

/// `future`'s value, unless it takes longer than a random short time. One in sixteen is waited for: it would hang if it
/// never got what one that was given up had been chosen for.
async fn hasty<T>(hurry: Hurry, random: &mut Random, future: impl Future<Output = T>) -> Option<T> {
    if random.below(16) == 0 {
        return Some(future.await);
    }
    match hurry {
        Hurry::Microseconds => {
            let deadline = Instant::now() + Duration::from_micros(random.below(200));
            let time_out = poll_fn(|cx| {
                if Instant::now() >= deadline {
                    return Poll::Ready(());
                }
                cx.waker().wake_by_ref();
                Poll::Pending
            });
            tokio::select! {
                biased;
                value = future => Some(value),
                () = time_out => None,
            }
        }
        Hurry::Turns => {
            let turns = random.below(8);
            let tired = async {
                for _ in 0..turns {
                    yield_now().await;
                }
            };
            tokio::select! {
                value = future => Some(value),
                () = tired => None,
            }
        }
    }
}

/// A message of `len` bytes that says who sent it and which of his it is, with all of them checked on arrival.
fn message(task: u32, number: u32, len: usize) -> Vec<u8> {
    let mut bytes = vec![number as u8 ^ task as u8; len];
    bytes[..4].copy_from_slice(&task.to_le_bytes());
    bytes[4..8].copy_from_slice(&number.to_le_bytes());
    bytes
}

fn read(bytes: &[u8]) -> (u32, u32) {
    let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
    let (task, number) = (word(0), word(4));
    assert!(*bytes == message(task, number, bytes.len()), "a slot was used twice");
    (task, number)
}

/// Receives until the message of task [`TASKS`], which is the last, and returns the numbers by task. It is slow, and holds
/// a few samples.
async fn receive_slowly(mut subscriber: ShmSubscriber) -> Vec<Vec<u32>> {
    let mut random = Random::new(99);
    let mut numbers = vec![Vec::new(); TASKS as usize];
    let mut held = VecDeque::new();
    loop {
        let sample = subscriber.recv().await.expect("nothing is lost");
        let (task, number) = read(&sample);
        if task == TASKS {
            return numbers;
        }
        numbers[task as usize].push(number);
        held.push_back(sample);
        if held.len() as u64 > random.below(3) {
            held.pop_front();
        }
        for _ in 0..random.below(4) {
            yield_now().await;
        }
    }
}

/// With nobody holding anything, every slot must come back.
async fn assert_pool_fills(publisher: &ShmPublisher) -> PoolStats {
    until("every slot is back in the pool", || publisher.pool().stats().in_use() == 0).await;
    publisher.pool().stats()
}

#[derive(Clone, Copy)]
enum How {
    Bytes,
    Loans,
    /// Bytes, with room in the queue and hardly any in the pool.
    AtTheCap,
}

async fn send_storm(progress: Progress, how: How, hurry: Hurry) {
    let sends = sends();
    let dir = Dir::new();
    let (queue, len, max_bytes) = match how {
        How::Bytes | How::Loans => (2, 64, 1 << 20),
        How::AtTheCap => (64, 4096, 4 * 4096),
    };
    let pool = ShmPoolConfig::new().max_bytes(max_bytes);
    let publisher = dir.publisher("t").queue(queue).pool(pool).bind().unwrap();
    let subscriber = dir.subscriber("t").depth(4).connect().unwrap();
    // Until its link stands, a subscriber is told how many messages it did not get.
    publisher.wait_for_subscribers(1).await;
    let receiver = tokio::spawn(receive_slowly(subscriber));
    let mut senders = JoinSet::new();
    for task in 0..TASKS {
        let (publisher, progress) = (publisher.clone(), progress.clone());
        senders.spawn(async move {
            let mut random = Random::new(u64::from(task) + 1);
            let mut accepted = Vec::new();
            for number in 0..sends {
                progress.step();
                let bytes = message(task, number, len);
                let sending = async {
                    match how {
                        How::Bytes | How::AtTheCap => publisher.send(bytes).await.unwrap(),
                        How::Loans => {
                            let mut loan = publisher.loan(len).await.unwrap();
                            loan.copy_from_slice(&bytes);
                            publisher.send(loan).await.unwrap();
                        }
                    }
                };
                if hasty(hurry, &mut random, sending).await.is_some() {
                    accepted.push(number);
                }
            }
            (task, accepted)
        });
    }
    let mut accepted = vec![Vec::new(); TASKS as usize];
    while let Some(sender) = senders.join_next().await {
        let (task, numbers) = sender.unwrap();
        accepted[task as usize] = numbers;
    }
    publisher.send(message(TASKS, 0, len)).await.unwrap();
    let received = receiver.await.unwrap();
    for (task, (accepted, received)) in accepted.iter().zip(&received).enumerate() {
        assert_eq!(accepted, received, "task {task}");
    }
    let total: usize = accepted.iter().map(Vec::len).sum();
    let all = (sends * TASKS) as usize;
    assert!(
        (all / 100..=all * 99 / 100).contains(&total),
        "{total} of {all} sends accepted: no storm at all"
    );
    let stats = assert_pool_fills(&publisher).await;
    assert!(stats.bytes <= max_bytes && stats.waiters == 0, "{stats:?}");
}

#[test]
fn storm_of_bytes_on_one_thread_is_received_exactly() {
    run(Flavor::CurrentThread, |progress| send_storm(progress, How::Bytes, Hurry::Microseconds));
}

#[test]
fn storm_of_bytes_on_many_threads_is_received_exactly() {
    run(Flavor::MultiThread, |progress| send_storm(progress, How::Bytes, Hurry::Microseconds));
}

#[test]
fn storm_of_loans_on_one_thread_is_received_exactly() {
    run(Flavor::CurrentThread, |progress| send_storm(progress, How::Loans, Hurry::Microseconds));
}

#[test]
fn storm_of_loans_on_many_threads_is_received_exactly() {
    run(Flavor::MultiThread, |progress| send_storm(progress, How::Loans, Hurry::Microseconds));
}

#[test]
fn storm_at_the_cap_on_one_thread_is_received_exactly() {
    run(Flavor::CurrentThread, |progress| send_storm(progress, How::AtTheCap, Hurry::Microseconds));
}

#[test]
fn storm_at_the_cap_on_many_threads_is_received_exactly() {
    run(Flavor::MultiThread, |progress| send_storm(progress, How::AtTheCap, Hurry::Microseconds));
}

#[test]
fn storm_by_select_on_one_thread_is_received_exactly() {
    run(Flavor::CurrentThread, |progress| send_storm(progress, How::Bytes, Hurry::Turns));
}

#[test]
fn storm_by_select_on_many_threads_is_received_exactly() {
    run(Flavor::MultiThread, |progress| send_storm(progress, How::Loans, Hurry::Turns));
}

#[test]
fn storm_by_select_at_the_cap_is_received_exactly() {
    run(Flavor::MultiThread, |progress| send_storm(progress, How::AtTheCap, Hurry::Turns));
}

/// What a storm of sinks has been told: numbers accepted for sure, and numbers accepted perhaps.
#[derive(Default, Clone)]
struct Told {
    accepted: Vec<u32>,
    perhaps: Vec<u32>,
}

async fn sink_storm(progress: Progress, max_bytes: u64) {
    const LEN: usize = 4096;

    let dir = Dir::new();
    let pool = ShmPoolConfig::new().max_bytes(max_bytes);
    let publisher = dir.publisher("t").queue(4).pool(pool).bind().unwrap();
    let subscriber = dir.subscriber("t").depth(4).connect().unwrap();
    // Until its link stands, a subscriber is told how many messages it did not get.
    publisher.wait_for_subscribers(1).await;
    let receiver = tokio::spawn(receive_slowly(subscriber));
    let mut senders = JoinSet::new();
    for task in 0..TASKS {
        let (mut sink, progress) = (publisher.clone(), progress.clone());
        senders.spawn(async move {
            let mut random = Random::new(u64::from(task) + 1);
            let mut told = Told::default();
            for number in 0..sends() {
                progress.step();
                let bytes = message(task, number, LEN);
                if random.below(2) == 0 {
                    let fed = hasty(Hurry::Microseconds, &mut random, sink.feed(bytes)).await;
                    if let Some(fed) = fed {
                        fed.unwrap();
                        told.accepted.push(number);
                    }
                } else {
                    let sent = hasty(Hurry::Microseconds, &mut random, SinkExt::send(&mut sink, bytes)).await;
                    match sent {
                        Some(sent) => {
                            sent.unwrap();
                            told.accepted.push(number);
                        }
                        None => told.perhaps.push(number),
                    }
                }
            }
            SinkExt::<Vec<u8>>::flush(&mut sink).await.unwrap();
            (task, told)
        });
    }
    let mut told = vec![Told::default(); TASKS as usize];
    while let Some(sender) = senders.join_next().await {
        let (task, by_task) = sender.unwrap();
        told[task as usize] = by_task;
    }
    publisher.send(message(TASKS, 0, LEN)).await.unwrap();
    let received = receiver.await.unwrap();
    for (told, received) in told.iter().zip(&received) {
        assert!(received.is_sorted_by(|a, b| a < b), "out of order or twice");
        let sure: Vec<u32> =
            received.iter().copied().filter(|number| told.perhaps.binary_search(number).is_err()).collect();
        assert_eq!(sure, told.accepted, "what feed accepted is exact");
    }
    assert!(told.iter().all(|told| !told.accepted.is_empty() && !told.perhaps.is_empty()));
    assert_pool_fills(&publisher).await;
}

#[test]
fn storm_of_sinks_on_one_thread_is_exact_but_for_cancelled_flushes() {
    run(Flavor::CurrentThread, |progress| sink_storm(progress, 1 << 20));
}

#[test]
fn storm_of_sinks_on_many_threads_is_exact_but_for_cancelled_flushes() {
    run(Flavor::MultiThread, |progress| sink_storm(progress, 1 << 20));
}

/// Here messages wait in the heap.
#[test]
fn storm_of_sinks_at_the_cap_is_exact_but_for_cancelled_flushes() {
    run(Flavor::MultiThread, |progress| sink_storm(progress, 4 * 4096));
}

async fn recv_storm(progress: Progress, hurry: Hurry) {
    let messages = rounds(20_000);
    let dir = Dir::new();
    let publisher = dir.publisher("t").queue(2).bind().unwrap();
    let mut subscriber = dir.subscriber("t").depth(4).end_with_last_publisher(true).connect().unwrap();
    publisher.wait_for_subscribers(1).await;
    let sender = tokio::spawn(async move {
        let mut random = Random::new(7);
        for number in 0..messages {
            publisher.send(number.to_le_bytes()).await.unwrap();
            for _ in 0..random.below(8) {
                yield_now().await;
            }
        }
    });
    let mut random = Random::new(8);
    let (mut next, mut cancelled) = (0_u32, 0_u32);
    loop {
        match hasty(hurry, &mut random, subscriber.next()).await {
            Some(Some(sample)) => {
                assert_eq!(*sample.unwrap(), next.to_le_bytes());
                next += 1;
                progress.step();
            }
            Some(None) => break,
            None => cancelled += 1,
        }
    }
    assert_eq!(next, messages);
    assert!(cancelled > 0, "no storm at all");
    sender.await.unwrap();
}

#[test]
fn storm_of_receives_on_one_thread_loses_nothing() {
    run(Flavor::CurrentThread, |progress| recv_storm(progress, Hurry::Microseconds));
    run(Flavor::CurrentThread, |progress| recv_storm(progress, Hurry::Turns));
}

#[test]
fn storm_of_receives_on_many_threads_loses_nothing() {
    run(Flavor::MultiThread, |progress| recv_storm(progress, Hurry::Microseconds));
    run(Flavor::MultiThread, |progress| recv_storm(progress, Hurry::Turns));
}

/// Some of `lens` are so large that they are made on another thread, which then finishes for nobody.
async fn loan_storm(progress: Progress, max_bytes: u64, lens: &'static [usize], rounds: u32) {
    let dir = Dir::new();
    let pool = ShmPoolConfig::new().max_bytes(max_bytes);
    let publisher = dir.publisher("t").pool(pool).bind().unwrap();
    let mut borrowers = JoinSet::new();
    for task in 0..TASKS {
        let (publisher, progress) = (publisher.clone(), progress.clone());
        borrowers.spawn(async move {
            let mut random = Random::new(u64::from(task) + 1);
            for _ in 0..rounds {
                progress.step();
                let len = lens[random.below(lens.len() as u64) as usize];
                if let Some(loan) = hasty(Hurry::Microseconds, &mut random, publisher.loan(len)).await {
                    let _held = loan.unwrap();
                    for _ in 0..random.below(4) {
                        yield_now().await;
                    }
                }
            }
        });
    }
    while let Some(borrower) = borrowers.join_next().await {
        borrower.unwrap();
    }
    let stats = assert_pool_fills(&publisher).await;
    assert!(stats.bytes <= max_bytes && stats.waiters == 0, "{stats:?}");
    // Nothing stays charged for what does not exist: the whole cap can be had, once what is still being made for nobody
    // is there.
    drop(publisher.pool().take(max_bytes as usize).await.unwrap());
}

#[test]
fn storm_of_loans_taken_leaves_the_pool_full() {
    run(Flavor::CurrentThread, |progress| loan_storm(progress, 16 << 10, &[4096], sends() / 4));
    run(Flavor::MultiThread, |progress| loan_storm(progress, 16 << 10, &[64, 4096, 8192], sends() / 8));
}

#[test]
fn storm_of_large_loans_leaves_the_pool_full() {
    run(Flavor::MultiThread, |progress| loan_storm(progress, 1 << 20, &[256 << 10, 512 << 10], rounds(50)));
}

/// A publisher and subscriber with every ticket and place taken, by messages 0 to 3.
fn stuck(dir: &Dir) -> (ShmPublisher, ShmSubscriber) {
    let publisher = dir.publisher("t").queue(1).bind().unwrap();
    let subscriber = dir.subscriber("t").depth(2).connect().unwrap();
    for number in 0..4_u8 {
        publisher.try_send([number]).expect("two on the link, one at the head, one queued");
    }
    (publisher, subscriber)
}

/// What comes until there is nothing more, with the runtime let run in between.
async fn drain(subscriber: &mut ShmSubscriber) -> Vec<u8> {
    let mut received = Vec::new();
    loop {
        match subscriber.try_recv() {
            Ok(sample) => received.push(sample[0]),
            Err(TryRecvError::Empty) => {}
            Err(error) => panic!("{error}"),
        }
        // The last is always 255.
        if received.last() == Some(&255) {
            return received;
        }
        yield_now().await;
    }
}

#[tokio::test]
async fn send_dropped_while_it_waits_has_sent_nothing() {
    let dir = Dir::new();
    let (publisher, mut subscriber) = stuck(&dir);
    let mut waiting = task::spawn(publisher.send([4]));
    assert_pending!(waiting.poll());
    assert_eq!(publisher.pool().stats().in_use(), 5);
    drop(waiting);
    assert_eq!(publisher.pool().stats().in_use(), 4);
    let last = publisher.send([255]);
    let (sent, received) = within("drain", futures::future::join(last, drain(&mut subscriber))).await;
    sent.unwrap();
    assert_eq!(received, [0, 1, 2, 3, 255]);
    drop(subscriber);
    within("pool", assert_pool_fills(&publisher)).await;
}

#[tokio::test]
async fn send_dropped_after_its_wake_up_leaves_the_place_to_the_next() {
    let dir = Dir::new();
    let (publisher, mut subscriber) = stuck(&dir);
    let mut first = task::spawn(publisher.send([4]));
    let mut second = task::spawn(publisher.send([255]));
    assert_pending!(first.poll());
    assert_pending!(second.poll());
    drop(subscriber.recv().await.unwrap());
    within("woken", until("a sender is woken", || first.is_woken())).await;
    assert!(!second.is_woken(), "one place, one wake-up");
    drop(first);
    assert!(second.is_woken(), "the wake-up was passed on");
    assert_ready_ok!(second.poll());
    assert_eq!(within("drain", drain(&mut subscriber)).await, [1, 2, 3, 255]);
}

#[tokio::test]
async fn send_dropped_after_its_wake_up_leaves_the_place_to_a_thread() {
    for _ in 0..50 {
        let dir = Dir::new();
        let (publisher, mut subscriber) = stuck(&dir);
        let mut first = task::spawn(publisher.send([4]));
        assert_pending!(first.poll());
        let thread = spawn_bounded("blocking_send", {
            let publisher = publisher.clone();
            move || publisher.blocking_send([255]).unwrap()
        });
        drop(subscriber.recv().await.unwrap());
        within("woken", until("a sender is woken", || first.is_woken())).await;
        drop(first);
        assert_eq!(within("drain", drain(&mut subscriber)).await, [1, 2, 3, 255]);
        thread();
    }
}

/// Woken by one place that came free, a sender may deliver by itself and leave the place; the next must have it.
#[tokio::test]
async fn senders_that_wait_all_get_through_once_there_is_room() {
    let dir = Dir::new();
    let publisher = dir.publisher("t").queue(1).bind().unwrap();
    let mut subscriber = dir.subscriber("t").depth(8).connect().unwrap();
    let mut numbers = 0..;
    while publisher.try_send([numbers.next().unwrap()]).is_ok() {}
    let mut waiting: Vec<_> = (0..6).map(|_| task::spawn(publisher.send([100]))).collect();
    for sender in &mut waiting {
        assert_pending!(sender.poll());
    }
    // Released in one go: there is a ticket for each of them.
    let held: Vec<_> = (0..8).map(|_| subscriber.try_recv().unwrap()).collect();
    drop(held);
    let mut sent = 0;
    within(
        "senders",
        until("all senders are woken", || {
            waiting.retain_mut(|sender| {
                if !sender.is_woken() {
                    return true;
                }
                match sender.poll() {
                    Poll::Ready(outcome) => outcome.unwrap(),
                    Poll::Pending => return true,
                }
                sent += 1;
                false
            });
            waiting.is_empty()
        }),
    )
    .await;
    assert_eq!(sent, 6);
}

#[tokio::test]
async fn loan_dropped_while_it_waits_takes_nothing() {
    let dir = Dir::new();
    let publisher = dir.publisher("t").pool(ShmPoolConfig::new().max_bytes(4096)).bind().unwrap();
    let held = publisher.try_loan(4096).unwrap();
    let mut waiting = task::spawn(publisher.loan(4096));
    assert_pending!(waiting.poll());
    assert_eq!(publisher.pool().stats().waiters, 1);
    drop(waiting);
    assert_eq!(publisher.pool().stats().waiters, 0);
    drop(held);
    assert_eq!(publisher.pool().stats().in_use(), 0);
    drop(publisher.try_loan(4096).unwrap());
}

#[tokio::test]
async fn loan_dropped_after_its_wake_up_leaves_the_slot_to_the_next() {
    let dir = Dir::new();
    let publisher = dir.publisher("t").pool(ShmPoolConfig::new().max_bytes(4096)).bind().unwrap();
    let held = publisher.try_loan(4096).unwrap();
    let mut first = task::spawn(publisher.loan(4096));
    let mut second = task::spawn(publisher.loan(4096));
    assert_pending!(first.poll());
    assert_pending!(second.poll());
    drop(held);
    assert!(first.is_woken());
    drop(first);
    assert!(second.is_woken());
    drop(assert_ready_ok!(second.poll()));
}

/// The slot is not in the pool but with a subscriber: its release must reach the loan that still waits.
#[tokio::test]
async fn loan_dropped_while_it_waits_for_a_subscriber_leaves_the_release_to_the_next() {
    let dir = Dir::new();
    let publisher = dir.publisher("t").pool(ShmPoolConfig::new().max_bytes(4096)).bind().unwrap();
    let mut subscriber = dir.subscriber("t").connect().unwrap();
    publisher.send([1; 4096]).await.unwrap();
    let sample = within("recv", subscriber.recv()).await.unwrap();
    let mut first = task::spawn(publisher.loan(4096));
    let mut second = task::spawn(publisher.loan(4096));
    assert_pending!(first.poll());
    assert_pending!(second.poll());
    drop(sample);
    within("woken", until("a borrower is woken", || first.is_woken())).await;
    drop(first);
    within("woken", until("the other is woken", || second.is_woken())).await;
    drop(assert_ready_ok!(second.poll()));
}

#[tokio::test]
async fn recv_dropped_after_its_wake_up_leaves_the_message() {
    let dir = Dir::new();
    let publisher = dir.publisher("t").bind().unwrap();
    let mut subscriber = dir.subscriber("t").connect().unwrap();
    for number in 0..100_u8 {
        {
            let mut receiving = task::spawn(subscriber.recv());
            // The first polls register with the reactor, or look for a while: only then does it sleep.
            while receiving.poll().is_pending() && receiving.is_woken() {}
            publisher.send([number]).await.unwrap();
            within("woken", until("the receiver is woken", || receiving.is_woken())).await;
        }
        let sample = assert_ready_ok!(task::spawn(subscriber.recv()).poll());
        assert_eq!(*sample, [number]);
    }
}

#[tokio::test]
async fn flush_dropped_goes_on_delivering() {
    let dir = Dir::new();
    let (publisher, mut subscriber) = stuck(&dir);
    let mut flushing = task::spawn(publisher.flush());
    assert_pending!(flushing.poll());
    drop(flushing);
    let mut flushing = task::spawn(publisher.flush());
    assert_pending!(flushing.poll());
    let received: Vec<_> =
        within("recv", (&mut subscriber).take(4).map(|sample| sample.unwrap()[0]).collect()).await;
    assert_eq!(received, [0, 1, 2, 3]);
    within("woken", until("the flush is woken", || flushing.is_woken())).await;
    assert_ready_ok!(flushing.poll());
}

#[tokio::test]
async fn close_dropped_goes_on_closing() {
    let dir = Dir::new();
    let publisher = dir.publisher("t").queue(1).bind().unwrap();
    let mut subscriber = dir.subscriber("t").depth(2).end_with_last_publisher(true).connect().unwrap();
    for number in 0..4_u8 {
        publisher.try_send([number]).unwrap();
    }
    let mut closing = task::spawn(publisher.clone().close());
    assert_pending!(closing.poll());
    drop(closing);
    assert!(publisher.is_closed());
    let error = publisher.send(vec![4]).await.unwrap_err();
    assert!(error.is_closed());
    assert_eq!(error.into_inner(), [4]);
    let received: Vec<_> = within("recv", (&mut subscriber).map(|sample| sample.unwrap()[0]).collect()).await;
    assert_eq!(received, [0, 1, 2, 3], "and then the end");
    within("close", publisher.close()).await.unwrap();
}

#[tokio::test]
async fn wait_for_subscribers_dropped_leaves_the_others_waiting_rightly() {
    let dir = Dir::new();
    let publisher = dir.publisher("t").bind().unwrap();
    let mut first = task::spawn(publisher.wait_for_subscribers(1));
    let mut second = task::spawn(publisher.wait_for_subscribers(1));
    let mut two = task::spawn(publisher.wait_for_subscribers(2));
    assert_pending!(first.poll());
    assert_pending!(second.poll());
    assert_pending!(two.poll());
    let subscriber = dir.subscriber("t").connect().unwrap();
    within("woken", until("woken", || first.is_woken())).await;
    drop(first);
    assert!(second.is_woken());
    assert_ready!(second.poll());
    assert_pending!(two.poll());
    let other = dir.subscriber("t").connect().unwrap();
    within("woken", until("woken", || two.is_woken())).await;
    assert_ready!(two.poll());
    drop((subscriber, other));
    within("gone", until("both have left", || publisher.subscriber_count() == 0)).await;
}

#[tokio::test]
async fn wait_for_publishers_dropped_loses_neither_publisher_nor_message() {
    let dir = Dir::new();
    let mut subscriber = dir.subscriber("t").connect().unwrap();
    {
        let mut waiting = task::spawn(subscriber.wait_for_publishers(1));
        assert_pending!(waiting.poll());
        let publisher = dir.publisher("t").on_full(OnFull::Wait).history(1).bind().unwrap();
        publisher.send([1]).await.unwrap();
        within("woken", until("woken", || waiting.is_woken())).await;
        drop(waiting);
        assert!(subscriber.wait_for_publishers(0).now_or_never().is_some());
        within("publisher", subscriber.wait_for_publishers(1)).await.unwrap();
        assert_eq!(*within("recv", subscriber.recv()).await.unwrap(), [1]);
    }
}
