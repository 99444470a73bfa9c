//! How many instructions each hot path takes, for a machine too noisy for times: `.ci/callgrind` runs this under valgrind
//! and compares with the figures in `instructions.txt`. By itself it says nothing.
//!
//! `instructions PATH N` runs the operation of that path N times, each within [`counted`], which is all that callgrind is told
//! to count: a message that is sent there is received elsewhere, or the other way round. `--list` names the paths.
//!
//! Nothing in it depends on time. Publishers do: one that sends fast reads its clock for every sixteenth message only, and under
//! valgrind nothing is fast. So the clock is this file's own, and goes on by so much at each reading: by more than there is
//! between the messages of a rush for the paths named `…/slow`, by less for those named `…/rush`.
//!
//! Left out: what the system does in a call, the reading of a real clock (about 50 ns), cache misses, and the waiting of one side
//! for the other. A locked instruction counts as one, and takes as long as twenty others.
#![allow(unsafe_code)] // a function that the C library has, too
#![allow(missing_docs)]
#![allow(clippy::print_stdout, clippy::print_stderr)] // it is a command

use std::env;
use std::ffi::{c_int, c_long};
use std::hint::black_box;
use std::os::unix::fs::PermissionsExt;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicI64, Ordering};
use std::task::{Context, Poll, Waker};

use crossbeam_queue::ArrayQueue;
use futures::SinkExt;
use tempfile::TempDir;
use tokio::runtime::Runtime;
use tokio_shm::event::event;
use tokio_shm::{ShmPoolConfig, ShmPublisher, ShmSegmentPool, ShmSubscriber};

/// Messages before the other side has its turn: all that a subscriber has room for by default, and a publisher's queue too.
const BATCH: u64 = 64;
const LEN: usize = 64;

type Run = fn(u64);

const PATHS: [(&str, Run); 14] = [
    ("floor/array_queue_pop_push", array_queue),
    ("pool_take_drop/4KiB", |n| pool(n, 4 << 10)),
    ("pool_take_drop/1MiB", |n| pool(n, 1 << 20)),
    ("event_notify_wait/sync", event_sync),
    ("event_notify_wait/async", event_async),
    ("loan_send/no_subscriber/slow", |n| loan_send(n, 0, SLOW)),
    ("loan_send/no_subscriber/rush", |n| loan_send(n, 0, RUSH)),
    ("loan_send/one_subscriber/slow", |n| loan_send(n, 1, SLOW)),
    ("loan_send/one_subscriber/rush", |n| loan_send(n, 1, RUSH)),
    ("copy_send/no_subscriber/slow", |n| copy_send(n, 0, SLOW)),
    ("copy_send/no_subscriber/rush", |n| copy_send(n, 0, RUSH)),
    ("copy_send/one_subscriber/rush", |n| copy_send(n, 1, RUSH)),
    ("feed_64_flush/one_subscriber", feed_flush),
    ("recv_drop", recv_drop),
];

fn main() {
    // Cargo adds `--bench`.
    let arguments: Vec<_> = env::args().skip(1).filter(|argument| argument != "--bench").collect();
    match &arguments[..] {
        [list] if list == "--list" => PATHS.iter().for_each(|(name, _)| println!("{name}")),
        [path, count] => {
            let (_, run) = PATHS.iter().find(|(name, _)| name == path).expect("one of --list");
            run(count.parse().expect("a number"));
        }
        _ => eprintln!("instructions: nothing to time here; .ci/callgrind counts"),
    }
}

/// The only function in which callgrind counts, by its name.
#[inline(never)]
fn counted<T>(body: impl FnOnce() -> T) -> T {
    body()
}

/// What the pool is built on, for comparison.
fn array_queue(n: u64) {
    let queue = ArrayQueue::new(8);
    queue.push(Box::new(1_usize)).unwrap();
    counted(|| (0..n).for_each(|_| queue.push(black_box(queue.pop().unwrap())).unwrap()));
}

fn pool(n: u64, len: usize) {
    let pool = ShmSegmentPool::new(ShmPoolConfig::new());
    drop(pool.try_take(len).unwrap());
    counted(|| (0..n).for_each(|_| drop(black_box(pool.try_take(black_box(len)).unwrap()))));
}

fn event_sync(n: u64) {
    let (notifier, waiter) = event();
    counted(|| {
        for _ in 0..n {
            notifier.notify().unwrap();
            waiter.wait().unwrap();
        }
    });
}

fn event_async(n: u64) {
    let (notifier, waiter) = event();
    counted(|| {
        for _ in 0..n {
            notifier.notify().unwrap();
            ready(pin!(waiter.wait_async())).unwrap();
        }
    });
}

fn loan_send(n: u64, subscribers: usize, step: i64) {
    let mut topic = Topic::new(subscribers, step);
    topic.batches(n, |topic| counted(|| topic.send()), Topic::receive);
}

fn copy_send(n: u64, subscribers: usize, step: i64) {
    let mut topic = Topic::new(subscribers, step);
    let message = [7; LEN];
    let send = |topic: &mut Topic| {
        counted(|| {
            (0..BATCH).for_each(|_| ready(pin!(topic.publisher.send(black_box(&message[..])))).unwrap())
        });
    };
    topic.batches(n, send, Topic::receive);
}

/// Counts whole batches: N messages, and N / 64 flushes.
fn feed_flush(n: u64) {
    let mut topic = Topic::new(1, RUSH);
    let feed = |topic: &mut Topic| {
        counted(|| {
            for _ in 0..BATCH {
                let loan = ready(pin!(topic.publisher.loan(black_box(LEN)))).unwrap();
                ready(pin!(topic.publisher.feed(loan))).unwrap();
            }
            ready(pin!(SinkExt::<&[u8]>::flush(&mut topic.publisher))).unwrap();
        });
    };
    topic.batches(n, feed, Topic::receive);
}

fn recv_drop(n: u64) {
    Topic::new(1, RUSH).batches(n, Topic::send, |topic| counted(|| topic.receive()));
}

/// A publisher and its subscriber, all on this thread. The runtime does not turn once they know each other: whatever is polled here
/// finds what it wants.
struct Topic {
    publisher: ShmPublisher,
    subscriber: Option<ShmSubscriber>,
    runtime: Runtime,
    _dir: TempDir,
}

impl Topic {
    fn new(subscribers: usize, step: i64) -> Self {
        let dir = tempfile::tempdir().expect("temporary directory");
        std::fs::set_permissions(&dir, std::fs::Permissions::from_mode(0o700)).expect("mode");
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
        let (publisher, subscriber) = runtime.block_on(async {
            let publisher = ShmPublisher::builder("t").runtime_dir(dir.path()).bind().unwrap();
            let connect = || ShmSubscriber::builder("t").runtime_dir(dir.path()).connect().unwrap();
            let mut subscriber = (subscribers == 1).then(connect);
            publisher.wait_for_subscribers(subscribers).await;
            if let Some(subscriber) = &mut subscriber {
                subscriber.wait_for_publishers(1).await.unwrap();
            }
            (publisher, subscriber)
        });
        STEP.store(step, Ordering::Relaxed);
        let mut topic = Self { publisher, subscriber, runtime, _dir: dir };
        // The segment is made and announced, and the publisher notices that there is a rush.
        topic.batches(BATCH, Self::send, Self::receive);
        topic
    }

    /// Sends `n` messages by `send` and receives them by `receive`, so many at a time.
    fn batches(&mut self, n: u64, mut send: impl FnMut(&mut Self), mut receive: impl FnMut(&mut Self)) {
        assert!(n.is_multiple_of(BATCH), "messages go in batches of {BATCH}");
        let handle = self.runtime.handle().clone();
        let _runtime = handle.enter();
        for _ in 0..n / BATCH {
            send(self);
            receive(self);
        }
    }

    #[inline]
    fn send(&mut self) {
        for _ in 0..BATCH {
            let loan = ready(pin!(self.publisher.loan(black_box(LEN)))).unwrap();
            ready(pin!(self.publisher.send(loan))).unwrap();
        }
    }

    #[inline]
    fn receive(&mut self) {
        if let Some(subscriber) = &mut self.subscriber {
            (0..BATCH).for_each(|_| drop(black_box(ready(pin!(subscriber.recv())).unwrap())));
        }
    }
}

/// Polls in place, as an `await` would: a future by value would be copied first.
#[inline]
fn ready<T>(future: Pin<&mut impl Future<Output = T>>) -> T {
    match future.poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(value) => value,
        Poll::Pending => panic!("there is something to wait for"),
    }
}

/// In nanoseconds: no rush, however few messages there are to a reading …
const SLOW: i64 = 100_000;
/// … and one.
const RUSH: i64 = 500;

static STEP: AtomicI64 = AtomicI64::new(SLOW);
static NOW: AtomicI64 = AtomicI64::new(1 << 40);

#[repr(C)]
struct Timespec {
    seconds: i64,
    nanoseconds: c_long,
}

/// In place of the C library's, for this binary and all that is linked into it.
///
/// # Safety
///
/// `time` points to a `timespec` that may be written.
#[unsafe(no_mangle)]
unsafe extern "C" fn clock_gettime(_clock: c_int, time: *mut Timespec) -> c_int {
    let now = NOW.fetch_add(STEP.load(Ordering::Relaxed), Ordering::Relaxed);
    let read = Timespec { seconds: now / 1_000_000_000, nanoseconds: now % 1_000_000_000 };
    // SAFETY: as the caller promises.
    unsafe { time.write(read) };
    0
}
