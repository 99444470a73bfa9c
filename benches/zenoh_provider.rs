//! What an allocation costs in zenoh's providers: `alloc` and drop of 4 KiB to 16 MiB, collection included, from the pool
//! and from zenoh's own three backends, and making a provider. Beside it the bare pool, cold (a segment made and freed) and
//! warm (taken and put back), and their ratio. Prints tables in Markdown.
//!
//! All are measured in turns, in one run; each figure is the median of 15 batches. Left out: writing the bytes, receivers, waiting
//! at the cap. zenoh's backends collect, and put together what is free, when their arena (64 MiB) is full; the pool's when nothing
//! is idle.
#![allow(clippy::print_stdout)] // its results

use std::hint::black_box;
use std::time::{Duration, Instant};

use tokio_shm::zenoh::PoolBackend;
use tokio_shm::{Backing, ShmPoolConfig, ShmSegmentPool};
use zenoh::Wait as _;
use zenoh::shm::{
    Defragment, GarbageCollect, PosixShmProviderBackendBinaryHeap, PosixShmProviderBackendBuddy,
    PosixShmProviderBackendTalc, ShmProvider, ShmProviderBackend, ShmProviderBuilder,
};

const SIZES: [(&str, usize); 4] =
    [("4 KiB", 4 << 10), ("64 KiB", 64 << 10), ("1 MiB", 1 << 20), ("16 MiB", 16 << 20)];
const ARENA: usize = 64 << 20;
const BATCHES: usize = 15;
const BATCH: Duration = Duration::from_millis(15);

/// What is measured, once.
type Call<'a> = Box<dyn FnMut() + 'a>;

fn main() {
    // `cargo test` runs benches too.
    if std::env::args().any(|argument| argument == "--test") {
        return;
    }
    println!("alloc + drop | pool | talc | buddy | heap | bare pool, warm | bare pool, cold | cold ÷ warm");
    println!("--- | ---: | ---: | ---: | ---: | ---: | ---: | ---:");
    for (name, size) in SIZES {
        // New ones for each size: an arena that has been cut up for small ones is slower for large ones.
        let pool = PoolBackend::new(config()).unwrap().into_provider();
        let talc =
            ShmProviderBuilder::backend(PosixShmProviderBackendTalc::builder(ARENA).wait().unwrap()).wait();
        let buddy =
            ShmProviderBuilder::backend(PosixShmProviderBackendBuddy::builder(ARENA).wait().unwrap()).wait();
        let heap =
            ShmProviderBuilder::backend(PosixShmProviderBackendBinaryHeap::builder(ARENA).wait().unwrap())
                .wait();
        let bare = ShmSegmentPool::new(config());
        let cold = cold_pool(size);
        let mut contenders: [Call<'_>; 6] = [
            Box::new(|| drop(black_box(pool.alloc(black_box(size)).wait().unwrap()))),
            Box::new(|| collecting(&talc, size)),
            Box::new(|| collecting(&buddy, size)),
            Box::new(|| collecting(&heap, size)),
            Box::new(|| drop(black_box(bare.try_take(black_box(size)).unwrap()))),
            Box::new(|| drop(black_box(cold.try_take(black_box(size)).unwrap()))),
        ];
        let figures = in_turns(&mut contenders);
        let cells: Vec<_> = figures.iter().map(|&figure| time(figure)).collect();
        println!("{name} | {} | {:.0}", cells.join(" | "), figures[5] / figures[4]);
    }
    println!("\nmaking a provider | pool | talc | buddy | heap\n--- | ---: | ---: | ---: | ---:");
    let mut makers: [Call<'_>; 4] = [
        Box::new(|| drop(black_box(PoolBackend::new(config()).unwrap().into_provider()))),
        Box::new(|| drop(black_box(PosixShmProviderBackendTalc::builder(ARENA).wait().unwrap()))),
        Box::new(|| drop(black_box(PosixShmProviderBackendBuddy::builder(ARENA).wait().unwrap()))),
        Box::new(|| drop(black_box(PosixShmProviderBackendBinaryHeap::builder(ARENA).wait().unwrap()))),
    ];
    let cells: Vec<_> = in_turns(&mut makers).iter().map(|&figure| time(figure)).collect();
    println!("64 MiB | {}", cells.join(" | "));
}

fn config() -> ShmPoolConfig {
    ShmPoolConfig::new().backing(Backing::PosixShm).max_bytes(ARENA as u64)
}

/// A pool that makes every segment anew. One slot a segment, also of small sizes: those share an eighth of the cap.
fn cold_pool(size: usize) -> ShmSegmentPool {
    let config = ShmPoolConfig::new().backing(Backing::PosixShm).max_bytes(8 * size as u64);
    ShmSegmentPool::new(config.pooling(false))
}

fn collecting<B: ShmProviderBackend>(provider: &ShmProvider<B>, size: usize) {
    drop(black_box(
        provider.alloc(black_box(size)).with_policy::<Defragment<GarbageCollect>>().wait().unwrap(),
    ));
}

/// Nanoseconds a call, of each.
fn in_turns(contenders: &mut [Call<'_>]) -> Vec<f64> {
    let mut batches = vec![Vec::with_capacity(BATCHES); contenders.len()];
    for round in 0..=BATCHES {
        for (call, batches) in contenders.iter_mut().zip(&mut batches) {
            let (mut calls, begin) = (0_u32, Instant::now());
            while begin.elapsed() < BATCH {
                // A look at the clock for every few calls, and for slow ones after each.
                for _ in 0..if calls == 0 { 1 } else { calls.min(64) } {
                    call();
                    calls += 1;
                }
            }
            let figure = begin.elapsed().as_nanos() as f64 / f64::from(calls);
            // The first round warms up.
            if round > 0 {
                batches.push(figure);
            }
        }
    }
    batches.iter_mut().map(|batches| median(batches)).collect()
}

fn median(figures: &mut [f64]) -> f64 {
    figures.sort_by(f64::total_cmp);
    figures[figures.len() / 2]
}

fn time(nanoseconds: f64) -> String {
    match nanoseconds {
        ..1_000.0 => format!("{nanoseconds:.0} ns"),
        ..1_000_000.0 => format!("{:.1} µs", nanoseconds / 1e3),
        _ => format!("{:.2} ms", nanoseconds / 1e6),
    }
}
