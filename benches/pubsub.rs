//! What messages cost from one process to others.
//!
//! - `one_way/<subscribers>/<size>`: the time for each of a stream of messages; each is written into a loan and sent, and
//!   its every byte read by every subscriber.
//! - `round_trip/<subscribers>/<size>`: one message at a time goes out in the same way, each subscriber copies it into an
//!   answer of the same size, and all answers are read.
//! - `publisher_side` and `subscriber_side`: one side of 64 B messages alone, beside pop and push of the bare queue that
//!   the pool is built on. `one_awake_subscriber` is another process, which drops what it cannot keep up with.
//!
//! A subscriber is this binary run again. `1_busy_subscriber` never sleeps, nor does whoever waits for its answers, and
//! each has a core of its own: on one core they would only keep each other from running. The others have the defaults and
//! run where the scheduler lets them; with fewer cores than processes, switching between them is the larger part. Left out:
//! connecting, the pool's first misses, and subscribers that are slow.
#![allow(missing_docs)] // `criterion_group!` makes public items

use std::env;
use std::hint::black_box;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use criterion::{Criterion, Throughput, criterion_group};
use crossbeam_queue::ArrayQueue;
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use tempfile::TempDir;
use tokio::runtime::Runtime;
use tokio_shm::{BusyPoll, OnFull, ShmPublisher, ShmSample, ShmSubscriber};

const SIZES: [(&str, usize); 5] =
    [("64B", 64), ("4KiB", 4 << 10), ("64KiB", 64 << 10), ("1MiB", 1 << 20), ("16MiB", 16 << 20)];
/// Name, how many, whether they are busy.
const SUBSCRIBERS: [(&str, usize, bool); 3] =
    [("1_subscriber", 1, false), ("1_busy_subscriber", 1, true), ("4_subscribers", 4, false)];

/// A publisher counts messages from 1; in place of the number of one that wants no answer, or is just for looking at.
const NO_ANSWER: u64 = 0;

/// Nothing that a bench waits for takes this long.
const LIMIT: Duration = Duration::from_secs(60);

fn one_way(c: &mut Criterion) {
    let mut group = c.benchmark_group("one_way");
    for (name, count, busy) in SUBSCRIBERS {
        let _pinned = busy.then(|| Pinned::to_core(0));
        let mut setup = Setup::start(count, busy);
        for (size_name, size) in SIZES {
            group.throughput(Throughput::Bytes(size as u64));
            group.bench_function(format!("{name}/{size_name}"), |b| {
                setup.round_trips(size, 4);
                b.iter_custom(|iters| setup.stream(size, iters));
            });
        }
    }
    group.finish();
}

fn round_trip(c: &mut Criterion) {
    let mut group = c.benchmark_group("round_trip");
    for (name, count, busy) in SUBSCRIBERS {
        let _pinned = busy.then(|| Pinned::to_core(0));
        let mut setup = Setup::start(count, busy);
        for (size_name, size) in SIZES {
            group.bench_function(format!("{name}/{size_name}"), |b| {
                setup.round_trips(size, 4);
                b.iter_custom(|iters| setup.round_trips(size, iters));
            });
        }
    }
    group.finish();
}

fn publisher_side(c: &mut Criterion) {
    let mut group = c.benchmark_group("publisher_side");
    let runtime = runtime();
    for subscribers in [0, 1] {
        let _pinned = Pinned::to_core(0);
        let dir = private_dir();
        let publisher = runtime.block_on(async {
            let builder = ShmPublisher::builder("out").runtime_dir(dir.path());
            builder.on_full(OnFull::DropOldest).bind().unwrap()
        });
        let _children: Vec<_> = (0..subscribers).map(|_| Subscriber::start(dir.path(), true)).collect();
        runtime.block_on(within(publisher.wait_for_subscribers(subscribers)));
        let name = if subscribers == 0 { "no_subscriber" } else { "one_awake_subscriber" };
        group.bench_function(format!("{name}/64B"), |b| {
            b.iter_custom(|iters| {
                runtime.block_on(async {
                    let start = Instant::now();
                    for _ in 0..iters {
                        send(&publisher, 64, NO_ANSWER).await;
                    }
                    start.elapsed()
                })
            });
        });
        runtime.block_on(within(publisher.close())).unwrap();
    }
    group.bench_function("array_queue_pop_push", |b| {
        let queue = ArrayQueue::new(8);
        queue.push(Box::new(1_usize)).unwrap();
        b.iter(|| queue.push(black_box(queue.pop().unwrap())).unwrap());
    });
    group.finish();
}

/// In one process and on one thread: filled first, and only then timed.
fn subscriber_side(c: &mut Criterion) {
    let mut group = c.benchmark_group("subscriber_side");
    let runtime = runtime();
    let dir = private_dir();
    let (publisher, mut subscriber) = runtime.block_on(async {
        let publisher = ShmPublisher::builder("out").runtime_dir(dir.path()).bind().unwrap();
        let subscriber = ShmSubscriber::builder("out").runtime_dir(dir.path()).depth(1_024).connect();
        (publisher, subscriber.unwrap())
    });
    group.bench_function("recv_drop/64B", |b| {
        b.iter_custom(|iters| {
            runtime.block_on(async {
                let mut time = Duration::ZERO;
                let mut left = iters;
                while left > 0 {
                    let batch = left.min(1_024);
                    left -= batch;
                    for _ in 0..batch {
                        send(&publisher, 64, NO_ANSWER).await;
                    }
                    let start = Instant::now();
                    for _ in 0..batch {
                        drop(black_box(subscriber.recv().await.unwrap()));
                    }
                    time += start.elapsed();
                }
                time
            })
        });
    });
    group.finish();
}

/// A publisher with its subscribers, and the way their answers come back.
struct Setup {
    // Dropped in this order: the subscribers end with their publisher, and then the directory goes.
    publisher: Option<ShmPublisher>,
    answers: Option<ShmSubscriber>,
    children: Vec<Subscriber>,
    runtime: Runtime,
    number: u64,
    _dir: TempDir,
}

impl Setup {
    fn start(subscribers: usize, busy: bool) -> Self {
        let dir = private_dir();
        let runtime = runtime();
        let (publisher, answers, children) = runtime.block_on(within(async {
            let publisher = ShmPublisher::builder("out").runtime_dir(dir.path()).bind().unwrap();
            let answers = ShmSubscriber::builder("back").runtime_dir(dir.path()).busy_poll(polling(busy));
            let mut answers = answers.connect().unwrap();
            let children: Vec<_> = (0..subscribers).map(|_| Subscriber::start(dir.path(), busy)).collect();
            publisher.wait_for_subscribers(subscribers).await;
            answers.wait_for_publishers(subscribers).await.unwrap();
            (publisher, answers, children)
        }));
        let (publisher, answers) = (Some(publisher), Some(answers));
        Self { publisher, answers, children, runtime, number: NO_ANSWER, _dir: dir }
    }

    /// Sends `count` messages, of which the last is answered when it was read.
    fn stream(&mut self, size: usize, count: u64) -> Duration {
        self.trips(size, 1, count)
    }

    fn round_trips(&mut self, size: usize, count: u64) -> Duration {
        self.trips(size, count, 1)
    }

    fn trips(&mut self, size: usize, trips: u64, messages: u64) -> Duration {
        let (Some(publisher), Some(answers)) = (&self.publisher, &mut self.answers) else { unreachable!() };
        self.runtime.block_on(within(async {
            let start = Instant::now();
            for _ in 0..trips {
                for _ in 1..messages {
                    send(publisher, size, NO_ANSWER).await;
                }
                self.number += 1;
                send(publisher, size, self.number).await;
                for _ in 0..self.children.len() {
                    assert_eq!(read(&answers.recv().await.unwrap()), self.number);
                }
            }
            start.elapsed()
        }))
    }
}

impl Drop for Setup {
    fn drop(&mut self) {
        let publisher = self.publisher.take().expect("taken only here");
        self.answers = None;
        // For the answer that they may be about to send there is nobody any more; then they see the end.
        let closed = self.runtime.block_on(within(publisher.close()));
        for child in &mut self.children {
            child.end();
        }
        closed.unwrap();
    }
}

/// Writes a message in place and sends it.
async fn send(publisher: &ShmPublisher, size: usize, number: u64) {
    let mut loan = publisher.loan(size).await.unwrap();
    loan.fill(number as u8);
    loan[..8].copy_from_slice(&number.to_le_bytes());
    publisher.send(loan).await.unwrap();
}

/// Reads every byte of a message; its number.
fn read(sample: &ShmSample) -> u64 {
    let words = sample.chunks_exact(8).map(|word| u64::from_le_bytes(word.try_into().unwrap()));
    black_box(words.fold(0, |sum: u64, word| sum.wrapping_add(word)));
    u64::from_le_bytes(sample[..8].try_into().unwrap())
}

const DIRECTORY: &str = "TOKIO_SHM_BENCH_DIR";
const BUSY: &str = "TOKIO_SHM_BENCH_BUSY";

/// Another process that runs [`subscribe`].
struct Subscriber(Child);

impl Subscriber {
    fn start(dir: &Path, busy: bool) -> Self {
        let mut command = Command::new(env::current_exe().expect("own path"));
        command.env(DIRECTORY, dir).stdin(Stdio::null()).stdout(Stdio::null());
        if busy {
            command.env(BUSY, "yes");
        }
        Self(command.spawn().expect("start a subscriber"))
    }

    /// Waits for its end, which is due when the publisher is gone.
    fn end(&mut self) {
        let deadline = Instant::now() + LIMIT;
        while self.0.try_wait().expect("wait").is_none() && Instant::now() < deadline {
            std::thread::yield_now();
        }
    }
}

impl Drop for Subscriber {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Receives, reads, and answers where that is wanted, until the publisher is gone.
async fn subscribe(dir: &Path, busy: bool) {
    let back = ShmPublisher::builder("back").runtime_dir(dir).bind().unwrap();
    let out = ShmSubscriber::builder("out").runtime_dir(dir).busy_poll(polling(busy));
    let mut out = out.end_with_last_publisher(true).connect().unwrap();
    loop {
        match out.recv().await {
            Ok(sample) if read(&sample) != NO_ANSWER => {
                let mut answer = back.loan(sample.len()).await.unwrap();
                answer.copy_from_slice(&sample);
                drop(sample);
                back.send(answer).await.unwrap();
            }
            Ok(_) | Err(tokio_shm::RecvError::Lagged { .. }) => {}
            Err(_) => break,
        }
    }
    drop(out);
    let _ = back.close().await;
}

fn polling(busy: bool) -> BusyPoll {
    if busy { BusyPoll::Always } else { BusyPoll::default() }
}

fn private_dir() -> TempDir {
    let dir = tempfile::tempdir().expect("temporary directory");
    std::fs::set_permissions(&dir, std::fs::Permissions::from_mode(0o700)).expect("mode");
    dir
}

fn runtime() -> Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime")
}

/// Keeps this thread, and what it starts meanwhile, on one core until dropped.
struct Pinned(CpuSet);

impl Pinned {
    /// To the `nth` of the machine's cores, if this thread may run there.
    fn to_core(nth: usize) -> Self {
        let before = sched_getaffinity(None).expect("a thread may ask for its own cores");
        let mut one = CpuSet::new();
        one.set(nth);
        // A core that is not there or not allowed: it runs where it did.
        let _ = sched_setaffinity(None, &one);
        Self(before)
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        let _ = sched_setaffinity(None, &self.0);
    }
}

async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(LIMIT, future).await.expect("within the limit")
}

fn short() -> Criterion {
    Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_millis(800))
}

criterion_group! {
    name = benches;
    config = short();
    targets = one_way, round_trip, publisher_side, subscriber_side
}

fn main() {
    if let Some(dir) = env::var_os(DIRECTORY) {
        let busy = env::var_os(BUSY).is_some();
        let _pinned = busy.then(|| Pinned::to_core(1));
        return runtime().block_on(subscribe(dir.as_ref(), busy));
    }
    benches();
    Criterion::default().configure_from_args().final_summary();
}
