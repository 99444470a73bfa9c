//! Threads and tasks on one publisher, threads and tasks as receivers, runtimes that go away under them: everything is
//! accounted for, and nobody is left waiting.
//!
//! Most runtimes here have no timer: it would poll once more what a lost wake-up left asleep, and hide the loss.

mod support;

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::Poll;
use std::time::Duration;

use futures::Sink;
use support::{Dir, LIMIT, Peer, Random, Role, spawn_bounded, wait_until, within};
use tokio::runtime::{Builder, Handle, Runtime};
use tokio::task::{JoinSet, yield_now};
use tokio_shm::{
    BusyPoll, FlushError, LoanError, RecvError, ShmLoan, ShmPoolConfig, ShmPublisher, ShmSegmentPool,
    ShmSubscriber,
};
use tokio_test::{assert_pending, assert_ready, assert_ready_err, task};

fn current_thread() -> Runtime {
    Builder::new_current_thread().enable_io().build().unwrap()
}

fn multi_thread() -> Runtime {
    Builder::new_multi_thread().worker_threads(1).enable_io().build().unwrap()
}

fn number(bytes: &[u8]) -> u32 {
    u32::from_le_bytes(bytes.try_into().unwrap())
}

/// Waits until nothing of the pool is in use. Slots that share a segment with one that a subscriber was left with are
/// freed at the next look for memory, or by a trim.
fn wait_until_unused(pool: &ShmSegmentPool) {
    wait_until("the pool is full", || {
        pool.trim();
        pool.stats().in_use() == 0
    });
}

/// What a publisher with `senders` senders of number `sender + i * senders` has delivered, by sender, until its end.
fn blocking_receive_all(mut subscriber: ShmSubscriber, senders: u32) -> Vec<Vec<u32>> {
    let mut received = vec![Vec::new(); senders as usize];
    loop {
        match subscriber.blocking_recv() {
            Ok(sample) => received[(number(&sample) % senders) as usize].push(number(&sample)),
            Err(RecvError::Closed) => return received,
            Err(error) => panic!("{error}"),
        }
    }
}

#[test]
fn threads_and_tasks_on_one_publisher_are_received_exactly() {
    const EACH: u32 = 2_000;
    const SENDERS: u32 = 8;

    let dir = Dir::new();
    let runtime = multi_thread();
    let publisher = dir.publisher("t").queue(2).runtime(runtime.handle().clone()).bind().unwrap();
    let subscriber = dir.subscriber("t").depth(4).end_with_last_publisher(true).connect().unwrap();
    runtime.block_on(publisher.wait_for_subscribers(1));
    let receiver = spawn_bounded("receiver", move || blocking_receive_all(subscriber, SENDERS));
    let mut threads = Vec::new();
    let mut tasks = JoinSet::new();
    for sender in 0..SENDERS {
        let publisher = publisher.clone();
        let numbers = (0..EACH).map(move |number| number * SENDERS + sender);
        if sender % 2 == 0 {
            let sending = async move {
                for number in numbers.clone() {
                    publisher.send(number.to_le_bytes()).await.unwrap();
                }
                (sender, numbers.collect::<Vec<_>>())
            };
            tasks.spawn_on(sending, runtime.handle());
            continue;
        }
        threads.push(spawn_bounded("sender", move || {
            let mut random = Random::new(u64::from(sender));
            let mut accepted = Vec::new();
            for number in numbers {
                let bytes = number.to_le_bytes();
                let outcome = match sender {
                    1 => publisher.try_send(bytes),
                    3 => publisher.blocking_send_timeout(bytes, Duration::from_micros(random.below(100))),
                    _ => publisher.blocking_send(bytes),
                };
                match outcome {
                    Ok(()) => accepted.push(number),
                    Err(error) => {
                        let expected = if sender == 1 { error.is_full() } else { error.is_timed_out() };
                        assert!(expected && sender < 5, "sender {sender}: {error}");
                        assert_eq!(error.into_inner(), bytes);
                    }
                }
            }
            (sender, accepted)
        }));
    }
    drop(publisher);
    let mut accepted = vec![Vec::new(); SENDERS as usize];
    for thread in threads {
        let (sender, numbers) = thread();
        accepted[sender as usize] = numbers;
    }
    let handle = runtime.handle().clone();
    let tasks = spawn_bounded("tasks", move || handle.block_on(tasks.join_all()));
    for (sender, numbers) in tasks() {
        accepted[sender as usize] = numbers;
    }
    assert!(receiver() == accepted, "what was accepted is not what was received");
    drop(runtime);
}

/// As hard as it can be for a thread: its time is up about when its message comes.
#[test]
fn blocking_recv_timeout_loses_nothing_of_an_async_sender() {
    const MESSAGES: u32 = 5_000;

    let dir = Dir::new();
    let runtime = multi_thread();
    let publisher = dir.publisher("t").queue(2).runtime(runtime.handle().clone()).bind().unwrap();
    let mut subscriber = dir.subscriber("t").depth(4).end_with_last_publisher(true).connect().unwrap();
    runtime.block_on(publisher.wait_for_subscribers(1));
    runtime.spawn(async move {
        let mut random = Random::new(1);
        for number in 0..MESSAGES {
            publisher.send(number.to_le_bytes()).await.unwrap();
            for _ in 0..random.below(20) {
                yield_now().await;
            }
        }
    });
    let receiving = spawn_bounded("receiver", move || {
        let mut random = Random::new(2);
        let mut next = 0;
        loop {
            match subscriber.blocking_recv_timeout(Duration::from_micros(random.below(50))) {
                Ok(sample) => {
                    assert_eq!(number(&sample), next);
                    next += 1;
                }
                Err(RecvError::TimedOut) => {}
                Err(RecvError::Closed) => return next,
                Err(error) => panic!("{error}"),
            }
        }
    });
    assert_eq!(receiving(), MESSAGES);
}

#[test]
fn async_recv_gets_all_of_a_blocking_sender() {
    let dir = Dir::new();
    let (senders, receivers) = (multi_thread(), current_thread());
    let publisher = dir.publisher("t").queue(1).runtime(senders.handle().clone()).bind().unwrap();
    let mut subscriber = dir.subscriber("t").depth(1).end_with_last_publisher(true).connect().unwrap();
    senders.block_on(publisher.wait_for_subscribers(1));
    let sender = spawn_bounded("sender", move || {
        for number in 0..5_000_u32 {
            publisher.blocking_send(number.to_le_bytes()).unwrap();
        }
    });
    let receiver = spawn_bounded("receiver", move || {
        receivers.block_on(async {
            for expected in 0..5_000 {
                assert_eq!(number(&subscriber.recv().await.unwrap()), expected);
            }
            assert!(matches!(subscriber.recv().await, Err(RecvError::Closed)));
        });
    });
    sender();
    receiver();
}

#[test]
fn subscriber_changes_between_blocking_and_async_and_between_runtimes() {
    let dir = Dir::new();
    let publishers = multi_thread();
    let publisher = dir.publisher("t").runtime(publishers.handle().clone()).bind().unwrap();
    let mut subscriber = dir.subscriber("t").busy_poll(BusyPoll::Off).connect().unwrap();
    publishers.block_on(publisher.wait_for_subscribers(1));
    let rounds = spawn_bounded("rounds", move || {
        for number in 0..100_u8 {
            let runtime = current_thread();
            // It registers with this runtime, finds nothing, and is given up.
            runtime.block_on(async {
                tokio::select! {
                    biased;
                    sample = subscriber.recv() => panic!("nothing was sent: {sample:?}"),
                    () = yield_now() => {}
                }
            });
            drop(runtime);
            let sender = spawn_bounded("sender", {
                let publisher = publisher.clone();
                move || publisher.blocking_send([number]).unwrap()
            });
            let sample = if number % 3 == 0 {
                subscriber.blocking_recv()
            } else {
                current_thread().block_on(subscriber.recv())
            };
            assert_eq!(*sample.unwrap(), [number]);
            sender();
        }
    });
    rounds();
}

#[test]
fn subscriber_that_only_blocks_needs_no_runtime() {
    let dir = Dir::new();
    let mut subscriber = dir.subscriber("t").end_with_last_publisher(true).connect().unwrap();
    assert!(matches!(subscriber.blocking_recv_timeout(Duration::ZERO), Err(RecvError::TimedOut)));
    let receiver = spawn_bounded("receiver", move || {
        assert!(Handle::try_current().is_err());
        let sample = subscriber.blocking_recv().unwrap();
        let clone = subscriber.blocking_recv_timeout(LIMIT).unwrap().clone();
        assert!(matches!(subscriber.blocking_recv(), Err(RecvError::Closed)));
        (*sample).iter().chain(&*clone).copied().collect::<Vec<_>>()
    });
    let runtime = multi_thread();
    let publisher = dir.publisher("t").history(2).runtime(runtime.handle().clone()).bind().unwrap();
    publisher.blocking_send([1]).unwrap();
    publisher.blocking_send([2]).unwrap();
    runtime.block_on(publisher.wait_for_subscribers(1));
    drop(publisher);
    assert_eq!(receiver(), [1, 2]);
}

/// In another process, so that nobody accepts it on its own thread.
#[test]
fn child_receives_without_ever_waiting() {
    let Some(role) = Role::of("child_receives_without_ever_waiting") else { return };
    let mut subscriber = role.subscriber("t").connect().unwrap();
    role.say("connected");
    let mut sample = None;
    wait_until("a message", || {
        sample = subscriber.blocking_recv_timeout(Duration::ZERO).ok();
        sample.is_some()
    });
    assert_eq!(*sample.unwrap(), [7]);
}

#[tokio::test]
async fn blocking_recv_with_no_time_at_all_learns_of_publishers() {
    let dir = Dir::new();
    let mut child = Peer::start("child_receives_without_ever_waiting", &dir);
    assert_eq!(child.hear(), "connected");
    let publisher = dir.publisher("t").bind().unwrap();
    within("subscriber", publisher.wait_for_subscribers(1)).await;
    publisher.send([7]).await.unwrap();
    child.finish();
}

fn panic_message(panic: &(dyn Any + Send)) -> &str {
    panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied()).unwrap()
}

type Call = fn(&ShmPublisher, &mut ShmSubscriber);

/// Every blocking call; receiving needs what the first two send.
const BLOCKING: [(&str, Call); 8] = [
    ("blocking_send", |publisher, _| publisher.blocking_send([1]).unwrap()),
    ("blocking_send_timeout", |publisher, _| publisher.blocking_send_timeout([2], LIMIT).unwrap()),
    ("blocking_loan", |publisher, _| drop(publisher.blocking_loan(1).unwrap())),
    ("blocking_loan_timeout", |publisher, _| drop(publisher.blocking_loan_timeout(1, LIMIT).unwrap())),
    ("blocking_take", |publisher, _| drop(publisher.pool().blocking_take(1).unwrap())),
    ("blocking_take_timeout", |publisher, _| drop(publisher.pool().blocking_take_timeout(1, LIMIT).unwrap())),
    ("blocking_recv", |_, subscriber| assert_eq!(*subscriber.blocking_recv().unwrap(), [1])),
    ("blocking_recv_timeout", |_, subscriber| {
        assert_eq!(*subscriber.blocking_recv_timeout(LIMIT).unwrap(), [2]);
    }),
];

/// Where a runtime's tasks run every one of them must say why it will not; elsewhere each works.
fn blocking_calls(runtime: &Runtime) {
    let dir = Dir::new();
    let publisher = dir.publisher("t").runtime(runtime.handle().clone()).bind().unwrap();
    let mut subscriber = dir.subscriber("t").connect().unwrap();
    let refused = async {
        publisher.wait_for_subscribers(1).await;
        for (name, call) in BLOCKING {
            let outcome = catch_unwind(AssertUnwindSafe(|| call(&publisher, &mut subscriber)));
            let panic = outcome.expect_err(name);
            let message = panic_message(&*panic);
            assert!(
                message.contains("Cannot block the current thread from within a runtime"),
                "{name}: {message}"
            );
        }
        (publisher, subscriber)
    };
    let (publisher, mut subscriber) = runtime.block_on(refused);
    for (_, call) in BLOCKING {
        call(&publisher, &mut subscriber);
    }
    let elsewhere = async move {
        let calls = move || BLOCKING.iter().for_each(|(_, call)| call(&publisher, &mut subscriber));
        tokio::task::spawn_blocking(calls).await.unwrap();
    };
    runtime.block_on(elsewhere);
}

#[test]
fn blocking_calls_panic_on_a_runtimes_thread_and_work_elsewhere() {
    blocking_calls(&current_thread());
    blocking_calls(&multi_thread());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn blocking_call_panics_in_a_task_but_not_in_block_in_place() {
    let pool = ShmSegmentPool::new(ShmPoolConfig::new());
    let in_task = tokio::spawn({
        let pool = pool.clone();
        async move { drop(pool.blocking_take(1)) }
    });
    let panic = in_task.await.unwrap_err().into_panic();
    assert!(panic_message(&*panic).contains("Cannot block"), "{}", panic_message(&*panic));
    let in_place =
        tokio::spawn(async move { tokio::task::block_in_place(|| pool.blocking_take(1).map(drop)) });
    in_place.await.unwrap().unwrap();
}

/// How a runtime goes.
#[derive(Clone, Copy)]
enum Going {
    Dropped,
    InTheBackground,
}

impl Going {
    fn end(self, runtime: Runtime) {
        match self {
            Self::Dropped => drop(runtime),
            Self::InTheBackground => runtime.shutdown_background(),
        }
    }
}

const SLOT: usize = 4096;

/// Everything that can wait on a publisher waits when the runtime of its tx task goes.
fn runtime_goes(runtime: Runtime, going: Going) {
    let dir = Dir::new();
    // Three slots go into messages that are stuck, three into loans that wait to be sent.
    let pool = ShmPoolConfig::new().max_bytes(6 * SLOT as u64);
    let handle = runtime.handle().clone();
    let publisher = dir.publisher("t").queue(1).pool(pool).runtime(handle).bind().unwrap();
    let mut subscriber = dir.subscriber("t").depth(1).end_with_last_publisher(true).connect().unwrap();
    runtime.block_on(publisher.wait_for_subscribers(1));
    for number in 0..3 {
        // One on the link, one at the head, one queued.
        publisher.blocking_send([number; SLOT]).unwrap();
    }
    let loan = |byte: u8| {
        let mut loan = publisher.try_loan(SLOT).unwrap();
        loan.fill(byte);
        loan
    };

    let mut threads: Vec<Box<dyn FnOnce()>> = Vec::new();
    let mut thread = |body: fn(&ShmPublisher, Option<ShmLoan>), loan| {
        let publisher = publisher.clone();
        threads.push(Box::new(spawn_bounded("blocked", move || body(&publisher, loan))));
    };
    let for_room: fn(&ShmPublisher, Option<ShmLoan>) = |publisher, loan| {
        let error = publisher.blocking_send(loan.unwrap()).unwrap_err();
        assert!(error.is_closed());
        assert!(*error.into_inner() == [10; SLOT]);
    };
    thread(for_room, Some(loan(10)));
    let for_room_in_time: fn(&ShmPublisher, Option<ShmLoan>) = |publisher, loan| {
        let error = publisher.blocking_send_timeout(loan.unwrap(), LIMIT).unwrap_err();
        assert!(error.is_closed());
        assert!(*error.into_inner() == [11; SLOT]);
    };
    thread(for_room_in_time, Some(loan(11)));
    let by_hand = loan(12);
    thread(
        |publisher, _| match publisher.blocking_loan(SLOT) {
            // What was stuck may come back just before it looks whether the publisher is closed.
            Ok(loan) => assert!(publisher.blocking_send(loan).unwrap_err().is_closed()),
            Err(error) => assert!(matches!(error, LoanError::Closed)),
        },
        None,
    );
    thread(
        |publisher, _| {
            let error = publisher.blocking_send(vec![13; SLOT]).unwrap_err();
            assert!(error.is_closed());
            assert!(error.into_inner() == [13; SLOT]);
        },
        None,
    );

    // Polled by hand, on a thread without any runtime.
    let mut sending = task::spawn(publisher.send(by_hand));
    assert_pending!(sending.poll());
    let mut copying = task::spawn(publisher.send(vec![14; SLOT]));
    assert_pending!(copying.poll());
    let mut borrowing = task::spawn(publisher.loan(SLOT));
    assert_pending!(borrowing.poll());
    let mut flushing = task::spawn(publisher.flush());
    assert_pending!(flushing.poll());
    let mut meeting = task::spawn(publisher.wait_for_subscribers(9));
    assert_pending!(meeting.poll());
    let mut sink = publisher.clone();
    let mut readying =
        task::spawn(std::future::poll_fn(|cx| Sink::<Vec<u8>>::poll_ready(Pin::new(&mut sink), cx)));
    assert_pending!(readying.poll());
    wait_until("who waits for memory", || publisher.pool().stats().waiters == 4);

    going.end(runtime);
    threads.into_iter().for_each(|join| join());
    wait_until("all woken", || sending.is_woken() && copying.is_woken() && borrowing.is_woken());
    wait_until("all woken", || flushing.is_woken() && meeting.is_woken() && readying.is_woken());
    let error = assert_ready_err!(sending.poll());
    assert!(error.is_closed());
    assert!(*error.into_inner() == [12; SLOT]);
    let error = assert_ready_err!(copying.poll());
    assert!(error.is_closed());
    assert!(error.into_inner() == [14; SLOT]);
    assert!(matches!(assert_ready!(borrowing.poll()), Err(LoanError::Closed)));
    assert!(matches!(assert_ready!(flushing.poll()), Err(FlushError::Closed)));
    assert_ready!(meeting.poll());
    assert!(assert_ready!(readying.poll()).is_err());
    drop(readying);

    // From now on every call says so at once.
    assert!(publisher.is_closed());
    assert!(publisher.try_send([1]).unwrap_err().is_closed());
    assert!(publisher.blocking_send([1]).unwrap_err().is_closed());
    assert!(matches!(publisher.try_loan(1), Err(LoanError::Closed)));
    assert_eq!(publisher.subscriber_count(), 0);

    let receiving = spawn_bounded("receiver", move || {
        assert!(
            *subscriber.blocking_recv().unwrap() == [0; SLOT],
            "it was on the link, and nobody else may use it"
        );
        let lost = subscriber.blocking_recv();
        assert!(matches!(lost, Err(RecvError::PublisherLost { .. })), "{lost:?}");
        assert!(matches!(subscriber.blocking_recv(), Err(RecvError::Closed)));
    });
    receiving();
    // The handles live on, but neither the socket nor anything of the pool is left.
    dir.assert_empties();
    wait_until_unused(publisher.pool());
    drop((sending, copying, borrowing, flushing, meeting));
    let closing = spawn_bounded("close", move || current_thread().block_on(publisher.close()));
    assert!(matches!(closing(), Err(FlushError::Closed)));
}

#[test]
fn limit_runtime_dropped_releases_everybody() {
    for _ in 0..10 {
        runtime_goes(multi_thread(), Going::Dropped);
        runtime_goes(current_thread(), Going::Dropped);
    }
}

#[test]
fn limit_runtime_shut_down_in_the_background_releases_everybody() {
    for _ in 0..10 {
        runtime_goes(multi_thread(), Going::InTheBackground);
        runtime_goes(current_thread(), Going::InTheBackground);
    }
}

#[test]
fn limit_close_under_way_when_the_runtime_goes_says_so() {
    let dir = Dir::new();
    let runtime = multi_thread();
    let publisher = dir.publisher("t").queue(1).runtime(runtime.handle().clone()).bind().unwrap();
    let subscriber = dir.subscriber("t").depth(1).connect().unwrap();
    runtime.block_on(publisher.wait_for_subscribers(1));
    for number in 0..3 {
        publisher.blocking_send([number]).unwrap();
    }
    let mut closing = task::spawn(publisher.close());
    assert_pending!(closing.poll());
    drop(runtime);
    wait_until("woken", || closing.is_woken());
    assert!(matches!(assert_ready!(closing.poll()), Err(FlushError::Closed)));
    drop(subscriber);
    dir.assert_empties();
}

/// In the middle of traffic: what arrives is what was accepted, in order, up to some point.
#[test]
fn limit_runtime_gone_amid_traffic_leaves_nobody_waiting() {
    for round in 0..40 {
        let dir = Dir::new();
        let runtime = multi_thread();
        let publisher = dir.publisher("t").queue(2).runtime(runtime.handle().clone()).bind().unwrap();
        let mut subscriber = dir.subscriber("t").depth(4).end_with_last_publisher(true).connect().unwrap();
        runtime.block_on(publisher.wait_for_subscribers(1));
        let senders: Vec<_> = (0..3_u32)
            .map(|sender| {
                let publisher = publisher.clone();
                spawn_bounded("sender", move || {
                    let others = (sender == 2).then(current_thread);
                    for number in 0.. {
                        let bytes = (number * 3 + sender).to_le_bytes();
                        let outcome = match &others {
                            Some(runtime) => runtime.block_on(publisher.send(bytes)),
                            None => publisher.blocking_send(bytes),
                        };
                        if let Err(error) = outcome {
                            assert!(error.is_closed());
                            assert_eq!(error.into_inner(), bytes);
                            return number;
                        }
                    }
                    unreachable!("it ends with the publisher")
                })
            })
            .collect();
        let enough = Arc::new(AtomicBool::new(false));
        let receiver = spawn_bounded("receiver", {
            let enough = Arc::clone(&enough);
            move || {
                let mut next = [0; 3];
                loop {
                    match subscriber.blocking_recv() {
                        Ok(sample) => {
                            let number = number(&sample);
                            assert_eq!(number / 3, next[(number % 3) as usize]);
                            next[(number % 3) as usize] += 1;
                            if next.iter().sum::<u32>() > 20 * round {
                                enough.store(true, Ordering::Relaxed);
                            }
                        }
                        Err(RecvError::PublisherLost { .. }) => {}
                        Err(RecvError::Closed) => return next,
                        Err(error) => panic!("{error}"),
                    }
                }
            }
        });
        wait_until("some traffic", || enough.load(Ordering::Relaxed));
        drop(runtime);
        let accepted: Vec<_> = senders.into_iter().map(|join| join()).collect();
        let received = receiver();
        assert!(received.iter().zip(&accepted).all(|(received, accepted)| received <= accepted));
        wait_until_unused(publisher.pool());
        dir.assert_empties();
    }
}

#[test]
fn child_connected_and_never_accepted() {
    let Some(role) = Role::of("child_connected_and_never_accepted") else { return };
    let mut subscriber = role.subscriber("t").end_with_last_publisher(true).connect().unwrap();
    role.say("connected");
    let mut end = subscriber.blocking_recv_timeout(LIMIT);
    if matches!(end, Err(RecvError::PublisherLost { .. })) {
        end = subscriber.blocking_recv_timeout(LIMIT);
    }
    assert!(matches!(end, Err(RecvError::Closed)), "{end:?}");
}

/// The handle keeps the socket open that the subscriber is in line at.
#[test]
fn subscriber_in_line_when_the_runtime_goes_sees_the_end() {
    let dir = Dir::new();
    let runtime = current_thread();
    let publisher = dir.publisher("t").runtime(runtime.handle().clone()).bind().unwrap();
    let mut child = Peer::start("child_connected_and_never_accepted", &dir);
    assert_eq!(child.hear(), "connected");
    drop(runtime);
    child.finish();
    drop(publisher);
    dir.assert_empties();
}

#[test]
fn close_of_one_clone_makes_the_others_sends_closed() {
    let dir = Dir::new();
    let runtime = multi_thread();
    let publisher = dir.publisher("t").queue(1).runtime(runtime.handle().clone()).bind().unwrap();
    let mut subscriber = dir.subscriber("t").depth(1).end_with_last_publisher(true).connect().unwrap();
    runtime.block_on(publisher.wait_for_subscribers(1));
    for number in 0..3_u8 {
        publisher.blocking_send([number]).unwrap();
    }
    let blocked = spawn_bounded("blocked", {
        let publisher = publisher.clone();
        move || publisher.blocking_send(vec![8]).unwrap_err()
    });
    let mut sending = task::spawn(publisher.send(vec![9]));
    assert_pending!(sending.poll());
    let mut closing = task::spawn(publisher.clone().close());
    assert_pending!(closing.poll(), "messages are under way");
    assert_eq!(blocked().into_inner(), [8]);
    let error = assert_ready_err!(sending.poll());
    assert!(error.is_closed());
    assert_eq!(error.into_inner(), [9]);
    let received = spawn_bounded("receiver", move || {
        let mut received = Vec::new();
        loop {
            match subscriber.blocking_recv() {
                Ok(sample) => received.push(sample[0]),
                Err(RecvError::Closed) => return received,
                Err(error) => panic!("{error}"),
            }
        }
    });
    assert_eq!(received(), [0, 1, 2]);
    // Each delivery wakes it.
    wait_until("closed", || closing.is_woken() && matches!(closing.poll(), Poll::Ready(Ok(()))));
    dir.assert_empties();
}

#[test]
fn last_publisher_dropped_delivers_what_was_accepted_however_slow_the_subscriber() {
    let dir = Dir::new();
    let runtime = multi_thread();
    let publisher = dir.publisher("t").queue(64).runtime(runtime.handle().clone()).bind().unwrap();
    let subscriber = dir.subscriber("t").depth(1).end_with_last_publisher(true).connect().unwrap();
    runtime.block_on(publisher.wait_for_subscribers(1));
    for number in 0..66_u32 {
        publisher.blocking_send(number.to_le_bytes()).unwrap();
    }
    let clone = publisher.clone();
    drop(publisher);
    assert!(!clone.is_closed());
    drop(clone);
    let receiver = spawn_bounded("receiver", move || blocking_receive_all(subscriber, 1));
    assert_eq!(receiver(), [(0..66).collect::<Vec<_>>()]);
    dir.assert_empties();
}

/// What a subscriber holds, and what it has yet to receive, stays as it was, whatever becomes of the publisher: with a
/// shared pool, the others must not get it.
fn end_with_samples_out(end: impl FnOnce(Runtime, ShmPublisher)) {
    let dir = Dir::new();
    let runtime = multi_thread();
    let pool = ShmSegmentPool::new(ShmPoolConfig::new().max_bytes(16 * SLOT as u64));
    let builder = |topic| dir.publisher(topic).shared_pool(&pool);
    let publisher = builder("t").runtime(runtime.handle().clone()).bind().unwrap();
    let others = multi_thread();
    let other = builder("other").runtime(others.handle().clone()).bind().unwrap();
    let mut subscriber = dir.subscriber("t").end_with_last_publisher(true).connect().unwrap();
    runtime.block_on(publisher.wait_for_subscribers(1));
    // Some share a segment, some have one to themselves.
    for len in [8, 8, SLOT, SLOT] {
        publisher.blocking_send(vec![1; len]).unwrap();
    }
    runtime.block_on(publisher.flush()).unwrap();
    let receive = |subscriber: &mut ShmSubscriber| subscriber.blocking_recv_timeout(LIMIT).unwrap();
    let mut samples = vec![receive(&mut subscriber)];
    end(runtime, publisher);
    for len in [8, SLOT] {
        let mut loans: Vec<_> = std::iter::from_fn(|| other.try_loan(len).ok()).collect();
        assert!(!loans.is_empty());
        loans.iter_mut().for_each(|loan| loan.fill(2));
    }
    samples.extend((0..3).map(|_| receive(&mut subscriber)));
    assert!(samples.iter().all(|sample| sample.iter().all(|byte| *byte == 1)), "somebody else wrote there");
    drop((samples, subscriber));
    wait_until_unused(&pool);
}

#[test]
fn samples_stay_as_they_were_when_the_publisher_closes() {
    end_with_samples_out(|runtime, publisher| runtime.block_on(publisher.close()).unwrap());
    end_with_samples_out(|runtime, publisher| {
        drop(publisher);
        drop(runtime);
    });
}

#[test]
fn samples_stay_as_they_were_when_the_runtime_goes() {
    end_with_samples_out(|runtime, publisher| {
        drop(runtime);
        drop(publisher);
    });
}

#[test]
fn samples_stay_as_they_were_when_the_subscriber_is_evicted() {
    let dir = Dir::new();
    let runtime = multi_thread();
    let pool = ShmPoolConfig::new().max_bytes(16 * SLOT as u64);
    let builder = dir.publisher("t").queue(1).pool(pool).evict_after(Duration::from_millis(5));
    let publisher = builder.runtime(runtime.handle().clone()).bind().unwrap();
    let mut subscriber = dir.subscriber("t").depth(2).connect().unwrap();
    runtime.block_on(publisher.wait_for_subscribers(1));
    publisher.blocking_send([1; 8]).unwrap();
    publisher.blocking_send([1; SLOT]).unwrap();
    let held = [subscriber.blocking_recv().unwrap(), subscriber.blocking_recv().unwrap()];
    // Blocks until the subscriber, which is full, is gone.
    for _ in 0..4 {
        publisher.blocking_send([2; 8]).unwrap();
    }
    assert!(matches!(subscriber.blocking_recv_timeout(LIMIT), Err(RecvError::Evicted { .. })));
    assert_eq!(publisher.subscriber_count(), 0);
    for len in [8, SLOT] {
        let mut loans: Vec<_> = std::iter::from_fn(|| publisher.try_loan(len).ok()).collect();
        assert!(!loans.is_empty());
        loans.iter_mut().for_each(|loan| loan.fill(2));
    }
    assert!(held.iter().all(|sample| sample.iter().all(|byte| *byte == 1)), "somebody else wrote there");
    wait_until_unused(publisher.pool());
}

/// Bursts through ever other bottlenecks, and after each burst not a sound until all of it has arrived.
#[test]
fn burst_arrives_whole_without_any_further_activity() {
    const ROUNDS: u64 = 150;

    let body = || {
        let mut random = Random::new(5);
        let runtime = multi_thread();
        for round in 0..ROUNDS {
            let dir = Dir::new();
            let (queue, depth) = (1 + random.below(3) as u32, 1 + random.below(4) as u32);
            let pool = match random.below(3) {
                0 => ShmPoolConfig::new().max_bytes((1 + random.below(4)) * SLOT as u64),
                _ => ShmPoolConfig::new(),
            };
            let handle = runtime.handle().clone();
            let publisher = dir.publisher("t").queue(queue).pool(pool).runtime(handle).bind().unwrap();
            let mut subscriber = dir.subscriber("t").depth(depth).busy_poll(BusyPoll::Off).connect().unwrap();
            runtime.block_on(publisher.wait_for_subscribers(1));
            let (senders, burst) = (1 + random.below(6), 1 + random.below(8));
            let mut threads: Vec<Box<dyn FnOnce()>> = Vec::new();
            for sender in 0..senders {
                let (publisher, blocking) = (publisher.clone(), publisher.clone());
                let sending = async move {
                    for _ in 0..burst {
                        publisher.send([sender as u8; SLOT]).await.unwrap();
                    }
                };
                match random.below(3) {
                    0 => drop(runtime.spawn(sending)),
                    1 => threads.push(Box::new(spawn_bounded("sender", move || {
                        current_thread().block_on(sending);
                    }))),
                    _ => threads.push(Box::new(spawn_bounded("sender", move || {
                        for _ in 0..burst {
                            blocking.blocking_send([sender as u8; SLOT]).unwrap();
                        }
                    }))),
                }
            }
            let total = senders * burst;
            let receive = async move {
                for _ in 0..total {
                    drop(subscriber.recv().await.unwrap());
                }
            };
            if round % 2 == 0 {
                current_thread().block_on(receive);
            } else {
                runtime.block_on(receive);
            }
            threads.into_iter().for_each(|join| join());
        }
    };
    spawn_bounded("bursts", body)();
}
