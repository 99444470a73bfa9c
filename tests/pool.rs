//! The pool: what it counts, what it keeps, what it gives up, and who waits when there is nothing left.

mod support;

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use proptest::prelude::*;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use support::{Dir, LIMIT, Peer, Role, wait_until, within};
use tokio_shm::{Backing, PooledSegment, ShmPoolConfig, ShmSegmentPool, TakeError};
use tokio_test::{assert_pending, assert_ready, task};

const KIB: usize = 1 << 10;
const MIB: usize = 1 << 20;

const BACKINGS: [Backing; 2] = [Backing::Memfd, Backing::PosixShm];

fn pool(config: ShmPoolConfig) -> ShmSegmentPool {
    ShmSegmentPool::new(config)
}

fn capped(bytes: usize) -> ShmPoolConfig {
    ShmPoolConfig::new().max_bytes(bytes as u64)
}

/// How many payload segments this process has mapped.
fn mapped_segments() -> usize {
    let maps = std::fs::read_to_string("/proc/self/maps").expect("own mappings");
    maps.lines()
        .filter(|line| line.contains("/memfd:tokio-shm-segment") || line.contains("/dev/shm/"))
        .count()
}

#[test]
fn slot_given_back_is_taken_again_and_counted_as_a_hit() {
    for backing in BACKINGS {
        let pool = pool(ShmPoolConfig::new().backing(backing));
        for len in [64, 5_000, MIB] {
            let before = pool.stats();
            let mut first = pool.try_take(len).unwrap();
            first.fill(7);
            let address = first.as_ptr();
            assert!(first.len() == len && first.capacity() >= len && first.capacity() - len <= len / 4);
            drop(first);
            if len == MIB {
                let again = pool.try_take(len - 10_000).unwrap();
                assert_eq!(again.as_ptr(), address);
                assert!(again.iter().all(|byte| *byte == 7), "nothing is cleared");
            } else {
                drop(pool.try_take(len).unwrap());
            }
            let after = pool.stats();
            assert_eq!((after.misses - before.misses, after.hits - before.hits), (1, 1), "{len}");
            assert_eq!((after.in_use(), after.segments - before.segments), (0, 1));
        }
    }
}

#[test]
fn take_at_the_cap_fails_waits_or_times_out() {
    for backing in BACKINGS {
        let pool = pool(capped(2 * MIB).backing(backing));
        let first = pool.try_take(MIB).unwrap();
        let second = pool.try_take(MIB).unwrap();
        assert_eq!(pool.stats().bytes, 2 * MIB as u64);
        let full = pool.try_take(64).unwrap_err();
        assert!(
            matches!(full, TakeError::Full { len: 64, max_bytes } if max_bytes == 2 * MIB as u64),
            "{full}"
        );
        let timeout = Duration::from_millis(5);
        let begun = std::time::Instant::now();
        let late = pool.blocking_take_timeout(MIB, timeout).unwrap_err();
        assert!(matches!(late, TakeError::TimedOut { len: MIB }) && begun.elapsed() >= timeout, "{late}");

        let waiting = std::thread::spawn({
            let pool = pool.clone();
            move || pool.blocking_take(MIB).map(drop)
        });
        wait_until("a thread waits", || pool.stats().waiters == 1);
        drop(first);
        waiting.join().unwrap().unwrap();
        drop(second);
        assert_eq!((pool.stats().waiters, pool.stats().in_use(), pool.stats().segments), (0, 0, 2));
        drop(pool.blocking_take_timeout(MIB, Duration::MAX).unwrap());
    }
}

#[tokio::test]
async fn task_at_the_cap_waits_until_a_segment_comes_free() {
    let pool = pool(capped(MIB));
    let held = pool.take(MIB).await.unwrap();
    let waiting = tokio::spawn({
        let pool = pool.clone();
        async move { pool.take(100).await.map(drop) }
    });
    support::until("a task waits", || pool.stats().waiters == 1).await;
    // One that gives up takes nothing with it.
    assert!(tokio::time::timeout(Duration::from_millis(2), pool.take(MIB)).await.is_err());
    assert_eq!(pool.stats().waiters, 1);
    drop(held);
    within("take", waiting).await.unwrap().unwrap();
    assert_eq!((pool.stats().waiters, pool.stats().in_use()), (0, 0));
}

#[tokio::test]
async fn large_take_is_served_before_later_ones_that_need_less() {
    let pool = pool(capped(5 * MIB));
    let mut held: Vec<_> = (0..5).map(|_| pool.try_take(MIB).unwrap()).collect();
    let mut large = task::spawn(pool.take(4 * MIB));
    assert_pending!(large.poll());
    let mut later = task::spawn(pool.take(MIB));
    assert_pending!(later.poll());
    for left in [4, 3, 2] {
        drop(held.pop());
        assert!(large.is_woken() && !later.is_woken());
        assert_pending!(large.poll());
        assert_eq!(pool.stats().bytes, left * MIB as u64, "what comes free adds up");
        assert_pending!(later.poll());
        assert!(matches!(pool.try_take(MIB), Err(TakeError::Full { .. })), "nor does one that does not wait");
        let thread = pool.clone();
        let blocked =
            tokio::task::spawn_blocking(move || thread.blocking_take_timeout(MIB, Duration::from_millis(1)));
        assert!(matches!(blocked.await.unwrap(), Err(TakeError::TimedOut { .. })));
    }
    drop(held.pop());
    support::until("the large one is made", || large.is_woken() && !large.poll().is_pending()).await;
    support::until("the next one gets what is left", || later.is_woken() && !later.poll().is_pending()).await;
}

#[tokio::test]
async fn large_take_given_up_passes_its_turn_on() {
    let pool = pool(capped(2 * MIB));
    let held = [pool.try_take(MIB).unwrap(), pool.try_take(MIB).unwrap()];
    let mut large = task::spawn(pool.take(2 * MIB));
    assert_pending!(large.poll());
    let mut later = task::spawn(pool.take(MIB));
    assert_pending!(later.poll());
    let [first, second] = held;
    drop(first);
    assert_pending!(large.poll());
    assert_pending!(later.poll());
    drop(large);
    assert!(later.is_woken());
    support::until("the next one is served", || !later.poll().is_pending()).await;
    drop(second);
    drop(pool.try_take(MIB).unwrap());
}

#[tokio::test]
async fn small_takes_go_on_beside_a_large_one_that_waits() {
    let pool = pool(capped(2 * MIB));
    let small: Vec<_> = (0..2).map(|_| pool.try_take(100).unwrap()).collect();
    let held = pool.try_take(MIB).unwrap();
    let mut large = task::spawn(pool.take(2 * MIB - 200 * KIB));
    assert_pending!(large.poll());
    for _ in 0..1_000 {
        // All slots of the segment that these two have kept from being idle.
        drop(pool.try_take(100).unwrap());
    }
    let mut rest: Vec<_> = std::iter::from_fn(|| pool.try_take(100).ok()).collect();
    let mut waiting = [task::spawn(pool.take(100)), task::spawn(pool.take(100))];
    for waiting in &mut waiting {
        assert_pending!(waiting.poll());
    }
    drop(rest.pop());
    assert!(
        matches!(pool.try_take(100), Err(TakeError::Full { .. })),
        "those that wait have their own order"
    );
    assert_pending!(waiting[1].poll());
    assert!(assert_ready!(waiting[0].poll()).is_ok());
    assert!(assert_ready!(waiting[1].poll()).is_ok(), "what the first has dropped");
    drop((small, rest, held));
    support::until("the large one is served", || large.is_woken() && !large.poll().is_pending()).await;
}

#[test]
fn large_takes_are_served_beside_threads_that_take_small_ones_all_the_time() {
    let pool = pool(capped(8 * MIB));
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for number in 0..4 {
            let (pool, over) = (&pool, &over);
            scope.spawn(move || {
                let mut held = std::collections::VecDeque::new();
                while !over.load(Ordering::Relaxed) {
                    let len = MIB - number * 100 * KIB;
                    // Three each, and never none: together they could have all there is for ever.
                    if held.len() == 3 {
                        held.pop_front();
                    }
                    held.extend(pool.try_take(len));
                    if held.is_empty() {
                        held.extend(pool.blocking_take_timeout(len, LIMIT));
                    }
                    // One that waits gets what the others let go of.
                    if pool.stats().waiters > 0 {
                        held.pop_front();
                    }
                }
            });
        }
        for _ in 0..50 {
            drop(pool.blocking_take_timeout(6 * MIB, LIMIT).expect("starved"));
        }
        over.store(true, Ordering::Relaxed);
    });
    assert_eq!((pool.stats().in_use(), pool.stats().waiters), (0, 0));
}

/// Ends the other threads of a test, also where it fails.
struct Over<'a>(&'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn small_and_large_takes_at_the_cap_go_on_and_the_small_size_does_not_grow() {
    let (pool, over) = (pool(capped(4 * MIB)), AtomicBool::new(false));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let (mut held, _over) = (std::collections::VecDeque::new(), Over(&over));
            while !over.load(Ordering::Relaxed) {
                held.push_back(pool.blocking_take_timeout(100, LIMIT).expect("small"));
                if held.len() > 40 {
                    held.pop_front();
                }
            }
        });
        let (mut held, _over) = (std::collections::VecDeque::new(), Over(&over));
        let mut random = 1_u64;
        for number in 0..10_000 {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let len = 20_000 + (random >> 33) as usize % 300_000;
            held.push_back(pool.blocking_take_timeout(len, LIMIT).expect("large"));
            while held.iter().map(PooledSegment::capacity).sum::<usize>() > 4 * MIB / 3 {
                held.pop_front();
            }
            if number % 100 != 0 {
                continue;
            }
            let slots = pool.stats().sizes.iter().find(|size| size.size == 128).map_or(0, |size| size.slots);
            assert!(slots <= 1_024, "{slots} slots of which 41 are in use");
        }
    });
}

/// Numbers without a pattern, the same each time.
fn random(below: usize, state: &mut u64) -> usize {
    *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    (*state >> 33) as usize % below
}

#[test]
fn large_take_is_served_once_small_ones_held_have_been_replaced_though_all_segments_had_some() {
    for (cap, len) in
        [(MIB, 8), (MIB, 1_000), (4 * MIB, 100), (4 * MIB, 5_000), (64 * MIB, 1_000), (64 * MIB, 10_000)]
    {
        let (pool, mut state) = (pool(capped(cap).populate(false)), 1);
        let mut all: Vec<_> = std::iter::from_fn(|| pool.try_take(len).ok()).collect();
        let slots = all.len();
        // One of sixteen, anywhere.
        let mut held = std::collections::VecDeque::new();
        while held.len() < slots / 16 {
            held.push_back(all.swap_remove(random(all.len(), &mut state)));
        }
        drop(all);
        let mut large = task::spawn(pool.take(cap / 2));
        assert_pending!(large.poll());
        let mut passed = 0_usize;
        let served = loop {
            // Later than others that take what has just come back.
            if passed.is_multiple_of(7)
                && large.is_woken()
                && let std::task::Poll::Ready(served) = large.poll()
            {
                break served;
            }
            held.pop_front();
            held.push_back(pool.try_take(len).expect("a small one goes on beside"));
            passed += 1;
            assert!(passed <= 2 * held.len() + 7, "{len} of {cap}: {passed} passed, {:?}", pool.stats());
        };
        assert!(served.is_ok());
        drop((served, held));
        // All can be had again without a lock.
        drop(pool.try_take(len).unwrap());
        assert_eq!(pool.stats().in_use(), 0);
    }
}

#[test]
fn takes_of_all_sizes_are_served_after_a_bounded_number_of_small_ones() {
    for cap in [128 * KIB, 512 * KIB, 4 * MIB, 64 * MIB] {
        let (pool, mut state) = (pool(capped(cap).populate(false)), 7);
        let mut held: Vec<PooledSegment> = Vec::new();
        for _ in 0..60 {
            let mut large = task::spawn(pool.take(20 * KIB + random(cap / 4 - 20 * KIB + 1, &mut state)));
            let mut passed = 0_usize;
            let served = loop {
                if passed.is_multiple_of(5)
                    && let std::task::Poll::Ready(served) = large.poll()
                {
                    break served.unwrap();
                }
                // From 8 bytes to 16 KiB, as many of each magnitude; some are held for long.
                let len = 8 << random(12, &mut state);
                if held.len() >= 4 {
                    drop(held.swap_remove(random(held.len(), &mut state)));
                }
                held.extend(pool.try_take(len));
                passed += 1;
                assert!(passed <= 500, "{cap}: {passed} passed, {:?}", pool.stats());
            };
            // For a while, so that the next one waits.
            drop(large);
            held.push(served);
        }
        drop(held);
        assert_eq!((pool.stats().in_use(), pool.stats().waiters), (0, 0));
    }
}

#[tokio::test]
async fn take_dropped_while_its_segment_is_made_leaves_it_idle() {
    let pool = pool(capped(4 * MIB));
    for _ in 0..20 {
        // It has begun to make one by then, or waits for the one that another began.
        drop(tokio_test::task::spawn(pool.take(4 * MIB)).poll());
    }
    // Made on another thread, it may come only now.
    let segment = within("take", pool.take(4 * MIB)).await.unwrap();
    assert_eq!((pool.stats().segments, pool.stats().in_use()), (1, 1));
    drop(segment);
    pool.trim();
    assert_eq!(pool.stats().bytes, 0);
}

#[test]
fn idle_slots_of_other_sizes_are_given_up_before_anyone_waits() {
    for backing in BACKINGS {
        let pool = pool(capped(4 * MIB).backing(backing));
        let lens = [64, 1_000, 16 * KIB, 20_000, 100_000, MIB];
        let held: Vec<_> = lens.iter().map(|len| pool.try_take(*len).unwrap()).collect();
        drop(held);
        assert!(pool.stats().segments == lens.len() && pool.stats().in_use() == 0);
        // All of the cap, at once.
        let all = pool.try_take(4 * MIB).unwrap();
        let stats = pool.stats();
        assert_eq!((stats.segments, stats.bytes, stats.idle()), (1, 4 * MIB as u64, 0));
        drop(all);
        // And back: the one large segment goes for a small slot.
        let small = pool.try_take(1).unwrap();
        assert!(pool.stats().bytes <= 512 * KIB as u64);
        // A segment of which one slot is in use stays, and so do the bytes in it.
        drop(pool.try_take(1).unwrap());
        assert!(matches!(pool.try_take(4 * MIB), Err(TakeError::Full { .. })));
        drop(small);
        drop(pool.try_take(4 * MIB).unwrap());
    }
}

#[test]
fn idle_segments_beyond_the_maximum_are_freed() {
    let pool = pool(ShmPoolConfig::new().max_idle_per_size(2));
    let held: Vec<_> = (0..5).map(|_| pool.try_take(MIB).unwrap()).collect();
    assert_eq!(pool.stats().bytes, 5 * MIB as u64);
    drop(held);
    let stats = pool.stats();
    assert_eq!((stats.idle(), stats.segments, stats.bytes), (2, 2, 2 * MIB as u64));
    assert_eq!(stats.sizes.len(), 1);
    assert_eq!((stats.sizes[0].size, stats.sizes[0].slots, stats.sizes[0].idle), (MIB, 2, 2));
    // Small ones share segments: all of them stay.
    let held: Vec<_> = (0..100).map(|_| pool.try_take(64).unwrap()).collect();
    drop(held);
    assert_eq!(pool.stats().segments, 3);
}

#[test]
fn trim_frees_what_is_wholly_idle_and_nothing_else() {
    let pool = pool(ShmPoolConfig::new());
    let large = pool.try_take(MIB).unwrap();
    let mut small: Vec<_> = (0..10_000).map(|_| pool.try_take(64).unwrap()).collect();
    // 128, then as many more as there are, up to 4,096 in one.
    assert_eq!(
        pool.stats().segments,
        9,
        "128, 128, 256, 512, 1,024, 2,048, 4,096 and 4,096 slots share one each, and a large one"
    );
    let mut kept = small.swap_remove(0);
    kept.fill(9);
    drop((small, large));
    pool.trim();
    assert_eq!((pool.stats().segments, pool.stats().in_use()), (1, 1));
    assert_eq!(*kept, [9; 64]);
    // What was left idle in it can still be taken.
    let held: Vec<_> = (0..127).map(|_| pool.try_take(64).unwrap()).collect();
    assert_eq!(pool.stats().segments, 1);
    drop((kept, held));
    pool.trim();
    let stats = pool.stats();
    assert_eq!((stats.segments, stats.bytes, stats.idle()), (0, 0, 0));
    assert_eq!((stats.misses, stats.hits), (9, 9_992 + 127), "counts outlive segments");
}

#[tokio::test]
async fn settings_at_their_largest_are_used_or_refused() {
    let dir = Dir::new();
    let largest = || ShmPoolConfig::new().max_idle_per_size(usize::MAX).max_bytes(u64::MAX).populate(false);
    let refused = [
        dir.publisher("t").queue(u32::MAX).bind().err(),
        dir.publisher("t").history(usize::MAX).bind().err(),
        dir.publisher("t").max_subscribers(u32::MAX).bind().err(),
    ];
    for error in refused {
        assert!(matches!(error, Some(tokio_shm::BindError::OutOfBounds { .. })), "{error:?}");
    }
    assert!(dir.subscriber("t").depth(u32::MAX).connect().is_err());
    let publisher = dir
        .publisher("t")
        .queue(1 << 20)
        .history(1 << 16)
        .max_subscribers(1 << 16)
        .link_bytes(u64::MAX)
        .evict_after(Duration::MAX)
        .pool(largest())
        .bind()
        .unwrap();
    let mut subscriber = dir.subscriber("t").depth(1 << 16).connect().unwrap();
    within("send", publisher.send([7; 100])).await.unwrap();
    assert_eq!(*within("recv", subscriber.recv()).await.unwrap(), [7; 100]);
    // As many as there is room for below the cap.
    let pool = pool(capped(MIB).max_idle_per_size(usize::MAX));
    assert_eq!(pool.prewarm(100 * KIB, usize::MAX).unwrap(), 9);
    assert!(pool.prewarm(8, usize::MAX).unwrap() > 0);
    assert!(pool.stats().bytes <= MIB as u64);
}

#[test]
fn prewarm_makes_slots_up_to_the_cap() {
    let pool = pool(capped(8 * MIB).max_idle_per_size(4));
    assert_eq!(pool.prewarm(MIB, 3).unwrap(), 3);
    assert_eq!((pool.stats().idle(), pool.stats().misses), (3, 3));
    assert_eq!(pool.prewarm(MIB, 3).unwrap(), 3, "they are there already");
    assert_eq!(pool.stats().misses, 3);
    assert_eq!(pool.prewarm(MIB, 6).unwrap(), 4, "no more than may be idle");
    assert!(pool.prewarm(64, 5_000).unwrap() >= 5_000);
    pool.trim();
    assert_eq!(pool.prewarm(MIB, 200).unwrap(), 4);
    assert_eq!(pool.stats().misses, pool.stats().segments as u64 + 11, "none is made to be freed again");
    assert_eq!(pool.prewarm(2 * MIB, 100).unwrap(), 2, "no other size is given up for it");
    assert_eq!((pool.stats().bytes, pool.stats().idle()), (8 * MIB as u64, 6));
    assert!(matches!(pool.prewarm(9 * MIB, 1), Err(TakeError::TooLarge { .. })));
}

#[test]
fn many_small_sizes_share_a_small_pool() {
    for cap in [MIB, 512 * KIB, 256 * KIB] {
        let pool = pool(capped(cap));
        let held: Vec<_> = (1..=14).map(|number| pool.try_take(number * 93).unwrap()).collect();
        assert!(pool.stats().bytes <= cap as u64);
        drop(held);
        // And large ones get what they left.
        drop(pool.try_take(cap).unwrap());
    }
    // Where not even a segment each has room, a slot of a larger size does.
    let pool = pool(capped(16 * KIB));
    let lens = [100, 1_000, 2_000, 3_000];
    drop(lens.map(|len| pool.try_take(len).unwrap()));
    let held: Vec<_> = lens.iter().map(|len| pool.try_take(*len).unwrap()).collect();
    let other = pool.try_take(300).unwrap();
    assert!(other.len() == 300 && other.capacity() >= 300);
    drop((other, held));
}

#[test]
fn segments_of_small_pools_that_keep_little_are_given_up_for_other_sizes() {
    for cap in [4 * KIB, 16 * KIB, 64 * KIB, 128 * KIB] {
        for max_idle in [1, usize::MAX] {
            let pool = pool(capped(cap).max_idle_per_size(max_idle));
            for len in [1, 600, 1_000, 4 * KIB, 10 * KIB, 16 * KIB, 20 * KIB, 128 * KIB, 1, 640] {
                if len > cap {
                    continue;
                }
                let mut held: Vec<_> = std::iter::from_fn(|| pool.try_take(len).ok()).collect();
                assert!(
                    !held.is_empty(),
                    "{len} bytes of {cap}, at most {max_idle} idle: {:?}",
                    pool.stats()
                );
                // In another order than that in which they came.
                while !held.is_empty() {
                    drop(held.swap_remove(held.len() / 2));
                }
            }
        }
    }
    drop(pool(ShmPoolConfig::new().max_idle_per_size(usize::MAX).max_bytes(u64::MAX)).try_take(MIB).unwrap());
}

#[test]
fn random_large_sizes_at_the_cap_use_what_is_large_enough() {
    let pool = pool(capped(64 * MIB).populate(false));
    let mut random = 1_u64;
    let mut held = std::collections::VecDeque::new();
    let mut take = |held: &mut std::collections::VecDeque<PooledSegment>| {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let len = 1_000_000 + (random >> 33) as usize % 9_000_000;
        while held.len() >= 4 {
            held.pop_front();
        }
        while let Err(error) = pool.try_take(len).map(|segment| held.push_back(segment)) {
            assert!(matches!(error, TakeError::Full { .. }) && held.pop_front().is_some(), "{error}");
        }
    };
    (0..100).for_each(|_| take(&mut held));
    let before = pool.stats().misses;
    (0..1_000).for_each(|_| take(&mut held));
    let made = pool.stats().misses - before;
    assert!(made < 150, "{made} of 1,000 were made anew");
    // No more than a part is lost to it.
    drop(held);
    let fit = std::iter::from_fn(|| pool.try_take(MIB).ok()).collect::<Vec<_>>().len();
    assert!(fit >= 32, "{fit} messages of a MiB");
}

#[test]
fn slots_begin_at_what_align_promises() {
    for backing in BACKINGS {
        let pool = pool(ShmPoolConfig::new().backing(backing));
        for len in [1, 64, 65, 100, 700, 5_000, 16 * KIB, 17 * KIB, 300 * KIB] {
            let held: Vec<_> = (0..200).map(|_| pool.try_take(len).unwrap()).collect();
            assert!(held.iter().all(|segment| segment.as_ptr().addr() % tokio_shm::ALIGN == 0));
        }
    }
}

#[tokio::test]
async fn pooled_segment_of_the_publishers_pool_is_sent_as_a_loan_without_a_copy() {
    let (dir, pool, other) = (Dir::new(), pool(ShmPoolConfig::new()), pool(ShmPoolConfig::new()));
    let publisher = dir.publisher("t").shared_pool(&pool).bind().unwrap();
    let mut subscriber = dir.subscriber("t").connect().unwrap();
    for (from, copied) in [(&pool, 0), (&other, 100)] {
        let mut segment = from.try_take(100).unwrap();
        segment.fill(7);
        publisher.send(tokio_shm::ShmLoan::from(segment)).await.unwrap();
        assert_eq!(publisher.stats().copied_bytes, copied);
        let sample = within("recv", subscriber.recv()).await.unwrap();
        assert_eq!(*sample, [7; 100]);
        assert_eq!(sample.as_ptr().addr() % tokio_shm::ALIGN, 0);
    }
}

#[test]
fn pool_without_pooling_keeps_nothing() {
    for backing in BACKINGS {
        let pool = pool(capped(4 * MIB).pooling(false).backing(backing));
        for len in [64, 64, MIB, MIB] {
            drop(pool.try_take(len).unwrap());
            let stats = pool.stats();
            assert_eq!((stats.idle(), stats.bytes, stats.segments), (0, 0, 0));
        }
        assert_eq!((pool.stats().misses, pool.stats().hits), (4, 0));
    }
}

#[test]
fn length_beyond_the_cap_is_too_large_and_no_length_is_not() {
    let pool = pool(capped(MIB));
    for len in [MIB + 1, 1 << 30, 1 << 50, usize::MAX] {
        let error = pool.try_take(len).unwrap_err();
        assert!(matches!(error, TakeError::TooLarge { len: told, .. } if told == len), "{error}");
        assert!(matches!(pool.blocking_take(len), Err(TakeError::TooLarge { .. })));
    }
    assert_eq!(pool.stats().bytes, 0);
    let mut none = pool.try_take(0).unwrap();
    assert!(none.is_empty() && none.capacity() == 64);
    none.set_len(64);
    none.fill(1);
    // Smaller than a page, a pool can hold nothing at all.
    assert!(matches!(ShmSegmentPool::new(capped(0)).try_take(0), Err(TakeError::TooLarge { .. })));
    assert_eq!(ShmSegmentPool::new(capped(4 * KIB)).try_take(1).unwrap().len(), 1);
}

#[test]
#[should_panic(expected = "do not fit")]
fn set_len_beyond_the_capacity_panics() {
    let mut segment = pool(ShmPoolConfig::new()).try_take(100).unwrap();
    segment.set_len(129);
}

#[test]
fn segment_outlives_its_pool() {
    for len in [64, MIB] {
        let pool = pool(ShmPoolConfig::new());
        let mut segment = pool.try_take(len).unwrap();
        let other = pool.try_take(len).unwrap();
        drop(pool);
        segment.fill(3);
        drop(other);
        assert!(segment.iter().all(|byte| *byte == 3));
    }
}

#[test]
fn thread_that_waits_at_the_cap_sleeps() {
    let pool = pool(capped(2 * MIB));
    // Idle slots of other sizes that cannot be given up, because one of their segment is in use.
    let held: Vec<_> = [64, 1_000, 4_000, MIB].map(|len| pool.try_take(len).unwrap()).into();
    let cpu =
        || Duration::try_from(rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime)).unwrap();
    let before = cpu();
    let waited = Duration::from_millis(500);
    assert!(matches!(pool.blocking_take_timeout(2 * MIB, waited), Err(TakeError::TimedOut { .. })));
    let used = cpu() - before;
    assert!(used < waited / 4, "{used:?} of processor time in a wait of {waited:?}");
    drop(held);
}

#[test]
fn takes_and_drops_in_many_threads_add_up() {
    // A tight cap, so that sizes push each other out and threads wait for one another all the time.
    let pool = pool(capped(2 * MIB).max_idle_per_size(3).populate(false));
    let lens = [1, 64, 200, 4_000, 16 * KIB, 20_000, 100_000, 300_000, MIB];
    let takes: u64 = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..4_u8)
            .map(|number| {
                let (pool, lens) = (&pool, &lens);
                scope.spawn(move || {
                    let mut random = u64::from(number) + 1;
                    let mut taken = 0;
                    let mut held: Vec<PooledSegment> = Vec::new();
                    for round in 0..1_000 {
                        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(99);
                        let choice = (random >> 33) as usize;
                        let len = lens[choice % lens.len()];
                        // Whoever holds nothing may wait for the others; if all waited for each other, none would.
                        let segment = if held.is_empty() {
                            Some(pool.blocking_take_timeout(len, LIMIT).unwrap())
                        } else {
                            pool.try_take(len).ok()
                        };
                        if round % 64 == 0 {
                            assert!(pool.stats().bytes <= 2 * MIB as u64);
                        }
                        if let Some(mut segment) = segment {
                            segment.fill(number);
                            taken += 1;
                            held.push(segment);
                        }
                        if held.len() > choice % 4 {
                            let segment = held.swap_remove(choice % held.len());
                            assert!(segment.iter().all(|byte| *byte == number), "two have the same slot");
                        }
                    }
                    taken
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).sum()
    });
    let stats = pool.stats();
    assert_eq!((stats.hits + stats.misses, stats.in_use(), stats.waiters), (takes, 0, 0));
    assert!(stats.sizes.iter().all(|size| size.idle == size.slots), "{stats:?}");
    pool.trim();
    assert_eq!((pool.stats().bytes, pool.stats().segments), (0, 0));
}

/// What a pool of large slots has to do, written down plainly.
struct Model {
    max_bytes: usize,
    max_idle: usize,
    idle: std::collections::BTreeMap<usize, usize>,
    bytes: usize,
    hits: u64,
    misses: u64,
}

impl Model {
    /// Four sizes to each power of two.
    fn size_of(len: usize) -> usize {
        len.next_multiple_of(1 << ((len - 1).ilog2() - 2))
    }

    fn take(&mut self, len: usize) -> Result<usize, &'static str> {
        let size = Self::size_of(len);
        if size > self.max_bytes {
            return Err("too large");
        }
        if let Some(idle) = self.idle.get_mut(&size).filter(|idle| **idle > 0) {
            *idle -= 1;
            self.hits += 1;
            return Ok(size);
        }
        // The smaller ones first, the largest of them, and then what is larger.
        let others = self.idle.keys().copied().filter(|other| *other < size).rev();
        let others: Vec<_> = others.chain(self.idle.keys().copied().filter(|other| *other > size)).collect();
        for other in others {
            let idle = self.idle.get_mut(&other).unwrap();
            while self.bytes + size > self.max_bytes && *idle > 0 {
                *idle -= 1;
                self.bytes -= other;
            }
        }
        if self.bytes + size > self.max_bytes {
            return Err("full");
        }
        self.bytes += size;
        self.misses += 1;
        Ok(size)
    }

    fn give_back(&mut self, size: usize) {
        let idle = self.idle.entry(size).or_default();
        if *idle < self.max_idle {
            *idle += 1;
        } else {
            self.bytes -= size;
        }
    }

    fn trim(&mut self) {
        for (size, idle) in &mut self.idle {
            self.bytes -= size * std::mem::take(idle);
        }
    }
}

#[derive(Debug, Clone)]
enum Operation {
    Take(usize),
    Drop(usize),
    Trim,
}

fn operations() -> impl Strategy<Value = Vec<Operation>> {
    let operation = prop_oneof![
        6 => (16 * KIB + 1..300 * KIB).prop_map(Operation::Take),
        2 => prop::sample::select(vec![20_000, 40_000, 100_000, 270_000, 2 * MIB]).prop_map(Operation::Take),
        6 => any::<usize>().prop_map(Operation::Drop),
        1 => Just(Operation::Trim),
    ];
    prop::collection::vec(operation, 1..80)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn pool_does_what_the_plain_model_does(operations in operations(), max_idle in 1_usize..4) {
        let mut model = Model {
            max_bytes: MIB,
            max_idle,
            idle: Default::default(),
            bytes: 0,
            hits: 0,
            misses: 0,
        };
        let pool = pool(capped(MIB).max_idle_per_size(max_idle).populate(false));
        let mut held = Vec::new();
        for operation in operations {
            match operation {
                Operation::Take(len) => match (pool.try_take(len), model.take(len)) {
                    (Ok(segment), Ok(size)) => {
                        prop_assert_eq!((segment.len(), segment.capacity()), (len, size));
                        held.push(segment);
                    }
                    (Err(TakeError::Full { .. }), Err("full"))
                    | (Err(TakeError::TooLarge { .. }), Err("too large")) => {}
                    (pool, model) => prop_assert!(false, "{pool:?} where the model has {model:?}"),
                },
                Operation::Drop(_) if held.is_empty() => {}
                Operation::Drop(index) => {
                    let segment = held.swap_remove(index % held.len());
                    model.give_back(segment.capacity());
                }
                Operation::Trim => {
                    pool.trim();
                    model.trim();
                }
            }
            let stats = pool.stats();
            prop_assert_eq!(stats.bytes, model.bytes as u64);
            prop_assert_eq!((stats.hits, stats.misses), (model.hits, model.misses));
            prop_assert_eq!(stats.in_use(), held.len());
            prop_assert_eq!(stats.idle(), model.idle.values().sum::<usize>());
        }
    }
}

#[test]
fn limit_memory_that_may_not_be_locked_is_an_error_that_names_the_limit_and_leaves_nothing() {
    let dir = Dir::new();
    let mut peer = Peer::start("role_locks_memory", &dir);
    assert_eq!(peer.hear(), "nothing left behind");
    peer.finish();
}

/// Alone in a process, because it lowers a limit and counts descriptors.
#[test]
fn role_locks_memory() {
    use rustix::thread::{CapabilitySet, CapabilitySets, set_capabilities};

    let Some(role) = Role::of("role_locks_memory") else { return };
    // Limits are not for root.
    let none = CapabilitySet::empty();
    set_capabilities(None, CapabilitySets { effective: none, permitted: none, inheritable: none }).unwrap();
    let maximum = getrlimit(Resource::Memlock).maximum;
    setrlimit(Resource::Memlock, Rlimit { current: Some(MIB as u64), maximum }).unwrap();
    let descriptors = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    let before = (descriptors(), mapped_segments());
    for backing in BACKINGS {
        let pool = pool(ShmPoolConfig::new().lock_memory(true).backing(backing));
        let fits = pool.try_take(512 * KIB).unwrap();
        for _ in 0..10 {
            let error = pool.try_take(MIB).unwrap_err();
            let TakeError::Memory(source) = &error else { panic!("{error}") };
            let text = source.to_string();
            assert!(text.contains("RLIMIT_MEMLOCK is 1048576 bytes"), "{text}");
            assert!(matches!(pool.blocking_take(MIB), Err(TakeError::Memory(_))));
        }
        let stats = pool.stats();
        assert_eq!((stats.bytes, stats.segments, stats.in_use()), (512 * KIB as u64, 1, 1));
        drop((fits, pool));
        assert_eq!((descriptors(), mapped_segments()), before);
    }
    role.say("nothing left behind");
}

#[test]
fn a_thousand_small_messages_queued_cost_four_mappings() {
    for backing in ["memfd", "posix"] {
        let dir = Dir::new();
        let mut publisher = Peer::start("role_queues_small_messages", &dir);
        publisher.tell(backing);
        assert_eq!(publisher.hear(), "bound");
        let mut subscriber = Peer::start("role_counts_mappings", &dir);
        assert_eq!(subscriber.hear(), "connected");
        publisher.tell("go");
        assert_eq!(publisher.hear(), "1024 in 4 mappings of 393216 bytes");
        subscriber.tell("1024");
        assert_eq!(subscriber.hear(), "1024 received, at most 4 mapped");
        subscriber.finish();
        publisher.tell("stop");
        publisher.finish();
    }
}

#[tokio::test]
async fn role_queues_small_messages() {
    let Some(role) = Role::of("role_queues_small_messages") else { return };
    let backing = if role.hear().unwrap() == "posix" { Backing::PosixShm } else { Backing::Memfd };
    let publisher = role.publisher("t").pool(ShmPoolConfig::new().backing(backing)).bind().unwrap();
    role.say("bound");
    assert_eq!(role.hear().unwrap(), "go");
    within("a subscriber", publisher.wait_for_subscribers(1)).await;
    for number in 0..1_024_u32 {
        within("send", publisher.send([number as u8; 64])).await.unwrap();
    }
    let stats = publisher.pool().stats();
    assert_eq!(stats.in_use(), 1_024);
    role.say(&format!("1024 in {} mappings of {} bytes", mapped_segments(), stats.bytes));
    role.hear();
}

/// Receives, holding eight, as many messages as it is told, and says how many segments it had mapped at most.
#[test]
fn role_counts_mappings() {
    let Some(role) = Role::of("role_counts_mappings") else { return };
    let mut subscriber = role.subscriber("t").depth(1_024).connect().unwrap();
    role.say("connected");
    let count: usize = role.hear().unwrap().parse().unwrap();
    let (mut held, mut most) = (std::collections::VecDeque::new(), 0);
    for number in 0..count {
        let sample = subscriber.blocking_recv_timeout(LIMIT).unwrap();
        assert!(sample.iter().all(|byte| *byte == number as u8), "message {number}");
        held.push_back(sample);
        if held.len() > 8 {
            held.pop_front();
        }
        if number % 16 == 0 {
            most = most.max(mapped_segments());
        }
    }
    role.say(&format!("{count} received, at most {most} mapped"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn segments_that_the_pool_dropped_are_unmapped_by_subscribers() {
    // Without pooling every message has a segment of its own; with it, sizes push each other out at the cap.
    let configs = [
        capped(2 * MIB).pooling(false),
        capped(2 * MIB).pooling(false).backing(Backing::PosixShm),
        capped(2 * MIB).max_idle_per_size(2),
    ];
    for config in configs {
        let dir = Dir::new();
        let publisher =
            dir.publisher("t").queue(2).link_bytes(u64::MAX).pool(config.populate(false)).bind().unwrap();
        let mut peer = Peer::start("role_counts_mappings", &dir);
        assert_eq!(peer.hear(), "connected");
        // Until its link stands it is told of messages instead of getting them.
        within("a subscriber", publisher.wait_for_subscribers(1)).await;
        let count = 3_000;
        peer.tell(&count.to_string());
        for number in 0..count {
            // More than 100 KiB each, so that no more than 20 exist at any time.
            let mut loan = within("loan", publisher.loan(100 * KIB + number * 37 % 100 * KIB)).await.unwrap();
            loan.fill(number as u8);
            within("send", publisher.send(loan)).await.unwrap();
            assert!(publisher.pool().stats().bytes <= 2 * MIB as u64);
        }
        let said = peer.hear();
        let (_, most) = said.split_once("at most ").unwrap();
        let most: usize = most.strip_suffix(" mapped").unwrap().parse().unwrap();
        // Those that exist, and those whose end it has not been told of yet.
        assert!(most <= 64, "{said}");
        peer.finish();
        drop(publisher);
    }
}

#[tokio::test]
async fn large_messages_read_one_by_one_have_two_segments_where_two_may_be_kept() {
    for (config, len, segments) in [
        (ShmPoolConfig::new(), MIB, 2),
        (ShmPoolConfig::new(), 256 * KIB, 1),
        (ShmPoolConfig::new(), 8 * MIB, 1),
        (ShmPoolConfig::new().max_idle_per_size(1), MIB, 1),
        (capped(MIB), MIB, 1),
    ] {
        let dir = Dir::new();
        let publisher = dir.publisher("t").pool(config).bind().unwrap();
        let mut subscriber = dir.subscriber("t").connect().unwrap();
        within("a subscriber", publisher.wait_for_subscribers(1)).await;
        for _ in 0..20 {
            let loan = within("loan", publisher.loan(len)).await.unwrap();
            within("send", publisher.send(loan)).await.unwrap();
            drop(within("recv", subscriber.recv()).await.unwrap());
        }
        let stats = publisher.pool().stats();
        assert_eq!((stats.segments, stats.misses), (segments, segments as u64), "{len} bytes");
    }
}
