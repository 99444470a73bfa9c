//! A subscriber that never stops looking lets everything else in its runtime make progress: it is counted how often it is polled
//! while the others take so many steps. (Times would tell of the machine.)

mod support;

use std::future::poll_fn;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use support::{Dir, within};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;
use tokio::runtime::{Builder, Runtime};
use tokio_shm::{BusyPoll, ShmPublisher, ShmSubscriber};

/// What others do while the subscriber looks.
const STEPS: u64 = 200;
/// Polls of the subscriber that a step may take on average: those of one that wakes itself at once are 60.
const POLLS: u64 = 8;

fn current_thread() -> Runtime {
    Builder::new_current_thread().enable_all().build().unwrap()
}

fn multi_thread() -> Runtime {
    Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap()
}

fn looking(dir: &Dir, topic: &str) -> ShmSubscriber {
    dir.subscriber(topic).busy_poll(BusyPoll::Always).connect().unwrap()
}

/// Receives for ever, where nothing comes, and counts its polls.
async fn look(mut subscriber: ShmSubscriber, polls: Arc<AtomicU64>) {
    poll_fn(|cx| {
        polls.fetch_add(1, Ordering::SeqCst);
        subscriber.poll_recv(cx).map(|received| panic!("{received:?}"))
    })
    .await
}

/// Sends bytes to itself, each of which the reactor has to tell of.
async fn echo() {
    let (mut one, mut other) = UnixStream::pair().unwrap();
    for _ in 0..STEPS {
        one.write_all(&[1]).await.unwrap();
        // More room than there are bytes: tokio then takes it that all is read, and waits for the reactor's word the next time.
        assert_eq!(other.read(&mut [0; 8]).await.unwrap(), 1);
    }
}

fn assert_gave_way(case: &str, polls: &AtomicU64) {
    let polls = polls.load(Ordering::SeqCst);
    assert!(polls >= 1, "{case}: it was never polled");
    assert!(polls <= STEPS * POLLS, "{case}: polled {polls} times in {STEPS} steps of others");
}

#[test]
fn subscriber_that_never_sleeps_lets_sockets_and_the_root_future_go_on() {
    let dir = Dir::new();
    let runtime = current_thread();
    let polls = Arc::new(AtomicU64::new(0));
    let task = runtime.spawn(look(looking(&dir, "t"), Arc::clone(&polls)));
    runtime.block_on(within("echo", echo()));
    task.abort();
    assert_gave_way("root future", &polls);
}

#[test]
fn subscriber_that_never_sleeps_lets_the_other_branches_of_its_task_go_on() {
    let runtimes = [("current thread", current_thread()), ("multi thread", multi_thread())];
    for (case, runtime) in runtimes {
        let dir = Dir::new();
        let polls = Arc::new(AtomicU64::new(0));
        let looks = look(looking(&dir, "t"), Arc::clone(&polls));
        let task = async move {
            let both = async {
                let ((), ()) = tokio::join!(looks, std::future::pending());
            };
            tokio::select! {
                () = echo() => {}
                () = both => unreachable!("nothing comes"),
            }
            // A timer, by which the driver is told from a socket.
            tokio::time::sleep(Duration::from_millis(1)).await;
        };
        runtime.block_on(async { within("branches", runtime.spawn(task)).await.unwrap() });
        assert_gave_way(case, &polls);
    }
}

#[test]
fn subscriber_that_never_sleeps_lets_timers_of_its_task_run_out() {
    for runtime in [current_thread(), multi_thread()] {
        let dir = Dir::new();
        let mut subscriber = looking(&dir, "t");
        let task = async move {
            for _ in 0..20 {
                let waited = tokio::time::timeout(Duration::from_millis(1), subscriber.recv()).await;
                assert!(waited.is_err(), "nobody publishes");
            }
        };
        runtime.block_on(async { within("timers", runtime.spawn(task)).await.unwrap() });
    }
}

#[test]
fn call_and_its_answer_in_one_runtime_take_a_few_polls_of_each_end() {
    for (case, runtime) in [("current thread", current_thread()), ("multi thread", multi_thread())] {
        let dir = Dir::new();
        let polls = Arc::new(AtomicU64::new(0));
        let publisher = |topic: &str| dir.publisher(topic).runtime(runtime.handle().clone()).bind().unwrap();
        let (calls, answers) = (publisher("call"), publisher("answer"));
        let (mut called, mut answered) = (looking(&dir, "call"), looking(&dir, "answer"));
        let (counted_by_server, counted_by_client) = (Arc::clone(&polls), Arc::clone(&polls));
        // Started by a thread of the runtime: neither has begun to look while the other is still to be started.
        let talk = async move {
            let server = tokio::spawn(async move {
                for _ in 0..STEPS {
                    take(&mut called, &counted_by_server).await;
                    give(&answers).await;
                }
            });
            let client = tokio::spawn(async move {
                for _ in 0..STEPS {
                    give(&calls).await;
                    take(&mut answered, &counted_by_client).await;
                }
            });
            within("server", server).await.unwrap();
            within("client", client).await.unwrap();
        };
        runtime.block_on(async { runtime.spawn(talk).await.unwrap() });
        assert_gave_way(case, &polls);
    }
}

async fn give(publisher: &ShmPublisher) {
    publisher.send([1]).await.unwrap();
}

async fn take(subscriber: &mut ShmSubscriber, polls: &AtomicU64) {
    let received = poll_fn(|cx| {
        polls.fetch_add(1, Ordering::SeqCst);
        subscriber.poll_recv(cx)
    });
    assert_eq!(*received.await.unwrap(), [1]);
}
