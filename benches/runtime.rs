//! What a subscriber that looks for messages costs the runtime that it is in: a call and its answer over two topics.
//!
//! `current_thread` and `multi_thread` have both ends as tasks of one runtime; `always` and `sleeping` are the same with
//! `BusyPoll::Always` and `BusyPoll::Off`, `mixed` with a caller that looks and an answerer that sleeps;
//! `mpsc` the same over tokio's own channels, the floor. `two_runtimes` has an end each in two threads with a runtime of their
//! own, where looking is what pays. `timer` is how late a millisecond's sleep of tokio's is beside a subscriber that never
//! stops looking.
//!
//! Left out: other processes (`pubsub` has them) and payloads beyond 8 bytes.
#![allow(missing_docs)] // `criterion_group!` makes public items

use std::os::unix::fs::PermissionsExt as _;
use std::time::{Duration, Instant};

use criterion::{Criterion, criterion_group, criterion_main};
use tokio::runtime::{Builder, Runtime};
use tokio_shm::{BusyPoll, ShmPublisher, ShmSubscriber};

struct Dir(tempfile::TempDir);

impl Dir {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::set_permissions(&dir, std::fs::Permissions::from_mode(0o700)).unwrap();
        Self(dir)
    }

    fn publisher(&self, topic: &str) -> ShmPublisher {
        ShmPublisher::builder(topic).runtime_dir(self.0.path()).bind().unwrap()
    }

    fn subscriber(&self, topic: &str, busy_poll: BusyPoll) -> ShmSubscriber {
        ShmSubscriber::builder(topic)
            .runtime_dir(self.0.path())
            .busy_poll(busy_poll)
            .end_with_last_publisher(true)
            .connect()
            .unwrap()
    }
}

fn current_thread() -> Runtime {
    Builder::new_current_thread().enable_all().build().unwrap()
}

fn multi_thread() -> Runtime {
    Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

/// Answers each call, until the caller is gone.
async fn serve(answers: ShmPublisher, mut calls: ShmSubscriber) {
    while let Ok(call) = calls.recv().await {
        answers.send(&*call).await.unwrap();
    }
}

async fn call(calls: &ShmPublisher, answers: &mut ShmSubscriber, number: u64) {
    calls.send(number.to_ne_bytes()).await.unwrap();
    assert_eq!(*answers.recv().await.unwrap(), number.to_ne_bytes());
}

/// Times calls whose both ends are tasks of `runtime`.
fn within(c: &mut Criterion, name: &str, runtime: &Runtime, [caller, server]: [BusyPoll; 2]) {
    let dir = Dir::new();
    let (calls, answers, server) = runtime.block_on(async {
        let (calls, answers) = (dir.publisher("call"), dir.publisher("answer"));
        let answered = dir.subscriber("answer", caller);
        let server = tokio::spawn(serve(answers, dir.subscriber("call", server)));
        (calls, answered, server)
    });
    let mut ends = Some((calls, answers));
    c.bench_function(&format!("call/{name}"), |b| {
        b.iter_custom(|times| {
            let (calls, mut answers) = ends.take().unwrap();
            let task = async move {
                let begun = Instant::now();
                for number in 0..times {
                    call(&calls, &mut answers, number).await;
                }
                (begun.elapsed(), calls, answers)
            };
            let (took, calls, answers) = runtime.block_on(async { tokio::spawn(task).await.unwrap() });
            ends = Some((calls, answers));
            took
        });
    });
    drop(ends);
    runtime.block_on(server).unwrap();
}

fn mpsc(c: &mut Criterion) {
    let runtime = current_thread();
    c.bench_function("call/mpsc", |b| {
        b.iter_custom(|times| {
            runtime.block_on(async {
                let (calls, mut called) = tokio::sync::mpsc::channel::<u64>(64);
                let (answers, mut answered) = tokio::sync::mpsc::channel::<u64>(64);
                let server = tokio::spawn(async move {
                    while let Some(call) = called.recv().await {
                        answers.send(call).await.unwrap();
                    }
                });
                let begun = Instant::now();
                for number in 0..times {
                    calls.send(number).await.unwrap();
                    assert_eq!(answered.recv().await, Some(number));
                }
                let took = begun.elapsed();
                drop(calls);
                server.await.unwrap();
                took
            })
        });
    });
}

fn two_runtimes(c: &mut Criterion) {
    let (dir, runtime) = (Dir::new(), current_thread());
    let busy_poll = BusyPoll::default();
    let calls = runtime.block_on(async { dir.publisher("call") });
    let called = dir.subscriber("call", busy_poll);
    let other = current_thread();
    let answers = other.block_on(async { dir.publisher("answer") });
    let mut answered = dir.subscriber("answer", busy_poll);
    let server = std::thread::spawn(move || other.block_on(serve(answers, called)));
    c.bench_function("call/two_runtimes", |b| {
        b.iter_custom(|times| {
            runtime.block_on(async {
                let begun = Instant::now();
                for number in 0..times {
                    call(&calls, &mut answered, number).await;
                }
                begun.elapsed()
            })
        });
    });
    drop(calls);
    drop(runtime);
    server.join().unwrap();
}

fn timer(c: &mut Criterion) {
    let (dir, runtime) = (Dir::new(), current_thread());
    let mut idle = dir.subscriber("idle", BusyPoll::Always);
    let sleep = Duration::from_millis(1);
    c.bench_function("timer_of_1ms", |b| {
        b.iter_custom(|times| {
            runtime.block_on(async {
                let begun = Instant::now();
                for _ in 0..times {
                    tokio::select! {
                        received = idle.recv() => panic!("{received:?}"),
                        () = tokio::time::sleep(sleep) => {}
                    }
                }
                begun.elapsed()
            })
        });
    });
}

fn calls(c: &mut Criterion) {
    within(c, "current_thread", &current_thread(), [BusyPoll::default(); 2]);
    within(c, "current_thread_always", &current_thread(), [BusyPoll::Always; 2]);
    within(c, "current_thread_sleeping", &current_thread(), [BusyPoll::Off; 2]);
    within(c, "multi_thread", &multi_thread(), [BusyPoll::default(); 2]);
    within(c, "multi_thread_always", &multi_thread(), [BusyPoll::Always; 2]);
    within(c, "multi_thread_sleeping", &multi_thread(), [BusyPoll::Off; 2]);
    within(c, "current_thread_mixed", &current_thread(), [BusyPoll::Always, BusyPoll::Off]);
    within(c, "multi_thread_mixed", &multi_thread(), [BusyPoll::Always, BusyPoll::Off]);
    mpsc(c);
    two_runtimes(c);
    timer(c);
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(20).measurement_time(Duration::from_secs(3));
    targets = calls
}
criterion_main!(benches);
