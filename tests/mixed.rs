//! All that a subscriber can meet, at random: several publishers that end in all ways, all ways of receiving mixed, samples kept, a
//! handle dropped at any point. Each message comes once and in order, or is counted; nothing stays behind.

mod support;

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{JoinHandle, spawn};
use std::time::{Duration, Instant};

use futures::{FutureExt as _, StreamExt as _};
use support::{Dir, LIMIT, Random, until, wait_until, within};
use tokio::runtime::{Builder, Runtime};
use tokio_shm::{
    BusyPoll, OnFull, RecvError, ShmPublisher, ShmPublisherBuilder, ShmSample, ShmSubscriber, TryRecvError,
};

const ROUNDS: u64 = 40;
const PUBLISHERS: u64 = 3;

/// How many messages each publisher has accepted; known once it has ended.
type Accepted = Arc<Mutex<HashMap<u128, u64>>>;

fn runtime(random: &mut Random) -> Runtime {
    match random.below(2) {
        0 => Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap(),
        _ => Builder::new_current_thread().enable_all().build().unwrap(),
    }
}

/// Sends some, once the subscriber is there, or has been, and ends in one of all ways.
fn publish(
    builder: ShmPublisherBuilder,
    seed: u64,
    accepted: Accepted,
    left: Arc<AtomicBool>,
) -> JoinHandle<()> {
    spawn(move || {
        let mut random = Random::new(seed);
        let runtime = runtime(&mut random);
        let on_full = [OnFull::Wait, OnFull::DropOldest, OnFull::DropNewest][random.below(3) as usize];
        let builder = builder.on_full(on_full).queue(1 + random.below(8) as u32);
        let publisher = builder.runtime(runtime.handle().clone()).bind().unwrap();
        let pool = publisher.pool().clone();
        runtime.block_on(async {
            tokio::select! {
                () = publisher.wait_for_subscribers(1) => {}
                () = until("a subscriber", || left.load(Ordering::Relaxed)) => {}
            }
        });
        let count = random.below(300);
        let mut sent = 0;
        for _ in 0..count {
            sent += u64::from(runtime.block_on(send(&publisher, sent, &mut random)));
        }
        let id = publisher.id();
        let end = random.below(4);
        // Before it can be told to anybody.
        accepted.lock().unwrap().insert(id, sent);
        match end {
            0 => runtime.block_on(within("close", publisher.close())).unwrap(),
            1 => drop(publisher),
            2 => {
                runtime.shutdown_timeout(LIMIT);
                drop(publisher);
                return;
            }
            _ => {
                let _ = runtime.block_on(async { publisher.flush().now_or_never() });
                publisher.clone().close().now_or_never();
            }
        }
        // What it has accepted is delivered for as long as its runtime is driven.
        runtime.block_on(async {
            until("all is back", || pool.stats().in_use() == 0).await;
        });
    })
}

/// Sends message `number` in one of the ways there are; `false` if it was given up.
async fn send(publisher: &ShmPublisher, number: u64, random: &mut Random) -> bool {
    let payload = number.to_le_bytes();
    match random.below(4) {
        0 => publisher.try_send(payload).is_ok(),
        1 => matches!(publisher.send(payload).now_or_never(), Some(Ok(()))),
        2 => {
            tokio::task::yield_now().await;
            within("send", publisher.send(payload)).await.unwrap();
            true
        }
        _ => {
            within("send", publisher.send(payload)).await.unwrap();
            true
        }
    }
}

/// Receives in one of the ways there are; `None`: nothing, this time.
fn receive(
    subscriber: &mut ShmSubscriber,
    runtime: &Runtime,
    random: &mut Random,
) -> Option<Result<ShmSample, RecvError>> {
    let a_moment = Duration::from_micros(random.below(2_000));
    match random.below(7) {
        0 => match subscriber.try_recv() {
            Ok(sample) => Some(Ok(sample)),
            Err(TryRecvError::Empty) => None,
            Err(TryRecvError::Recv(error)) => Some(Err(error)),
            Err(other) => panic!("{other}"),
        },
        1 => match subscriber.blocking_recv_timeout(a_moment) {
            Err(RecvError::TimedOut) => None,
            item => Some(item),
        },
        2 => subscriber.blocking_recv_timeout(Duration::ZERO).into(),
        3 => runtime.block_on(async { subscriber.recv().now_or_never() }),
        4 => runtime.block_on(async { subscriber.next().now_or_never() }).flatten(),
        5 => runtime.block_on(async { tokio::time::timeout(a_moment, subscriber.recv()).await.ok() }),
        _ => runtime
            .block_on(async { tokio::time::timeout(a_moment, subscriber.wait_for_publishers(2)).await.ok() })
            .and_then(|waited| waited.err().map(Err)),
    }
}

/// What is due next of each publisher.
#[derive(Default)]
struct Books(HashMap<u128, u64>);

impl Books {
    fn enter(&mut self, item: &Result<ShmSample, RecvError>, accepted: &Accepted) -> bool {
        let accepted = |id: &u128| accepted.lock().unwrap().get(id).copied();
        match item {
            Ok(sample) => {
                let due = self.0.entry(sample.publisher()).or_default();
                assert_eq!((sample.seq(), &**sample), (*due, &due.to_le_bytes()[..]));
                *due += 1;
            }
            Err(RecvError::Lagged { publisher, missed, .. }) => {
                *self.0.entry(*publisher).or_default() += missed
            }
            Err(RecvError::PublisherClosed { publisher }) => {
                let told = self.0.get(publisher).copied().unwrap_or(0);
                assert_eq!(Some(told), accepted(publisher), "all is accounted for");
                return true;
            }
            Err(RecvError::PublisherLost { publisher }) => {
                let told = self.0.get(publisher).copied().unwrap_or(0);
                assert!(Some(told) <= accepted(publisher), "{told}");
                return true;
            }
            Err(RecvError::AllHeld { .. } | RecvError::TimedOut) => {}
            Err(error) => panic!("{error:?}"),
        }
        false
    }
}

fn round(seed: u64) {
    let mut random = Random::new(seed);
    let dir = Dir::new();
    let runtime = runtime(&mut random);
    let (accepted, left) = (Accepted::default(), Arc::new(AtomicBool::new(false)));
    let busy = [BusyPoll::Off, BusyPoll::default(), BusyPoll::Always][random.below(3) as usize];
    let builder =
        dir.subscriber("t").depth(1 + random.below(12) as u32).busy_poll(busy).publisher_events(true);
    let mut subscriber = builder.connect().unwrap();
    let publishers: Vec<_> = (0..PUBLISHERS)
        .map(|n| publish(dir.publisher("t"), 1_000 * seed + n, Arc::clone(&accepted), Arc::clone(&left)))
        .collect();
    // One in four is dropped in the middle, once all have begun to send.
    let leaves_after = if random.below(4) == 0 { random.below(300) } else { u64::MAX };
    let (mut books, mut held, mut ended, mut items) = (Books::default(), Vec::new(), 0, 0);
    let deadline = Instant::now() + LIMIT;
    while ended < PUBLISHERS {
        assert!(Instant::now() < deadline, "{ended} have ended, {items} items");
        if items >= leaves_after && subscriber.stats().publishers == PUBLISHERS as usize {
            break;
        }
        match receive(&mut subscriber, &runtime, &mut random) {
            Some(item) => {
                items += 1;
                ended += u64::from(books.enter(&item, &accepted));
                held.extend(item.ok().filter(|_| random.below(4) == 0));
                if held.len() > random.below(12) as usize {
                    let at = random.below(held.len() as u64) as usize;
                    drop(held.swap_remove(at));
                }
            }
            None => {
                held.pop();
            }
        }
    }
    if random.below(2) == 0 {
        drop(subscriber);
        drop(held);
    } else {
        drop(held);
        drop(subscriber);
    }
    left.store(true, Ordering::Relaxed);
    for publisher in publishers {
        wait_until("a publisher ends", || publisher.is_finished());
        publisher.join().unwrap();
    }
    dir.assert_empties();
}

#[test]
fn subscriber_of_all_that_happens_accounts_for_every_message() {
    for seed in 0..ROUNDS {
        let outcome = std::panic::catch_unwind(|| round(seed));
        assert!(outcome.is_ok(), "in the round of seed {seed}");
    }
}
