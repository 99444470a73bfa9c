//! What a segment costs: `alloc/cold`, one made, populated, locked where `RLIMIT_MEMLOCK` allows, and freed again, and
//! `alloc/warm`, one taken from the pool and put back, each by `try_take` and drop on one thread; `floor`, the bare queue
//! that a pool cannot be faster than; and `contended`, both with two threads at it at once.
//!
//! Left out: touching the bytes (cold has them all mapped, warm has them in whatever cache they were), waiting at the cap,
//! and the many slots that a segment of a small size has by default: cold pools are so small that it has one, lest 64
//! times 4 KiB be made for the one that is measured.
#![allow(missing_docs)] // `criterion_group!` makes public items
#![allow(clippy::print_stderr)] // what a figure means depends on the machine's limits, which are told beside it

use std::hint::{black_box, spin_loop};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use criterion::{Criterion, criterion_group, criterion_main};
use crossbeam_queue::ArrayQueue;
use tokio_shm::{Backing, ShmPoolConfig, ShmSegmentPool};

const SIZES: [(&str, usize); 4] =
    [("4KiB", 4 << 10), ("64KiB", 64 << 10), ("1MiB", 1 << 20), ("16MiB", 16 << 20)];
const BACKINGS: [(&str, Backing); 2] = [("posix", Backing::PosixShm), ("memfd", Backing::Memfd)];

fn alloc(c: &mut Criterion) {
    let mut group = c.benchmark_group("alloc");
    for (backing_name, backing) in BACKINGS {
        for (size_name, size) in SIZES {
            group.bench_function(format!("cold/{backing_name}/{size_name}"), |b| {
                let pool = cold_pool(backing, size);
                b.iter(|| pool.try_take(size).unwrap());
            });
        }
    }
    for (backing_name, backing) in BACKINGS {
        for (size_name, size) in SIZES {
            group.bench_function(format!("warm/{backing_name}/{size_name}"), |b| {
                let pool = ShmSegmentPool::new(ShmPoolConfig::new().backing(backing));
                drop(pool.try_take(size).unwrap());
                b.iter(|| drop(black_box(pool.try_take(black_box(size)).unwrap())));
            });
        }
    }
    group.finish();
}

/// A pool that makes every segment anew: locked, or not where that is refused.
fn cold_pool(backing: Backing, size: usize) -> ShmSegmentPool {
    // Small segments share an eighth of the cap.
    let config = ShmPoolConfig::new().backing(backing).max_bytes(8 * size as u64).pooling(false);
    let locked = ShmSegmentPool::new(config.clone().lock_memory(true));
    match locked.try_take(size) {
        Ok(_) => locked,
        Err(error) => {
            let reason = std::error::Error::source(&error).map_or(error.to_string(), ToString::to_string);
            eprintln!("not locked: {reason}");
            ShmSegmentPool::new(config)
        }
    }
}

fn floor(c: &mut Criterion) {
    let mut group = c.benchmark_group("floor/array_queue");
    group.bench_function("usize", |b| {
        let queue = ArrayQueue::new(8);
        queue.push(1_usize).unwrap();
        b.iter(|| queue.push(black_box(queue.pop().unwrap())).unwrap());
    });
    group.bench_function("box", |b| {
        let queue = ArrayQueue::new(8);
        queue.push(Box::new(1_usize)).unwrap();
        b.iter(|| queue.push(black_box(queue.pop().unwrap())).unwrap());
    });
    group.finish();
}

fn contended(c: &mut Criterion) {
    const THREADS: usize = 2;
    let mut group = c.benchmark_group("contended/2");
    group.bench_function("pool/4KiB", |b| {
        let pool = ShmSegmentPool::new(ShmPoolConfig::new());
        drop(pool.try_take(4 << 10).unwrap());
        b.iter_custom(|iters| {
            together::<THREADS>(iters, || drop(black_box(pool.try_take(black_box(4 << 10)).unwrap())))
        });
    });
    // As many entries, of the same size, as a pool of 4 KiB slots has after its first miss.
    group.bench_function("array_queue", |b| {
        let queue = ArrayQueue::new(4_096);
        for number in 0..64_usize {
            queue.push(Box::new(number)).unwrap();
        }
        b.iter_custom(|iters| {
            together::<THREADS>(iters, || queue.push(black_box(queue.pop().unwrap())).unwrap())
        });
    });
    group.finish();
}

/// How long `N` threads take that begin at once and do `iters` rounds each.
fn together<const N: usize>(iters: u64, round: impl Fn() + Sync) -> Duration {
    let ready = AtomicUsize::new(0);
    let run = || {
        ready.fetch_add(1, Ordering::AcqRel);
        while ready.load(Ordering::Acquire) < N {
            spin_loop();
        }
        let start = Instant::now();
        (0..iters).for_each(|_| round());
        start.elapsed()
    };
    thread::scope(|scope| {
        let others: Vec<_> = (1..N).map(|_| scope.spawn(run)).collect();
        let mine = run();
        others.into_iter().map(|other| other.join().unwrap()).fold(mine, Duration::max)
    })
}

fn short() -> Criterion {
    Criterion::default()
        .sample_size(20)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_millis(1_000))
}

criterion_group! { name = benches; config = short(); targets = alloc, floor, contended }
criterion_main!(benches);
