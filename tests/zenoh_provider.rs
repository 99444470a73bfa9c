//! The pool as zenoh's shared-memory provider: what a receiver holds stays as it is, the cap holds, waiting ends, and nothing
//! is left behind.
//!
//! The receivers are other processes and use zenoh's public interface only.

mod support;

use std::collections::{HashSet, VecDeque};
use std::os::unix::fs::MetadataExt as _;
use std::sync::Arc;
use std::time::Duration;

use support::numbered::{assert_intact, seq_of, write};
use support::sessions::{config, listening, until_matched};
use support::{Dir, LIMIT, Peer, Role, spawn_bounded, until, within};
use tokio_shm::zenoh::{BackendError, Collecting, PoolBackend, Waiting, shm_clients};
use tokio_shm::{Backing, ShmPoolConfig, ShmSegmentPool};
use zenoh::Wait as _;
use zenoh::qos::CongestionControl;
use zenoh::shm::{
    AllocAlignment, BlockOn, GarbageCollect, MemoryLayout, ShmProvider, ShmProviderBuilder, ZAllocError,
    ZLayoutAllocError, ZShm, ZShmMut,
};

const KIB: usize = 1 << 10;
const MIB: usize = 1 << 20;

type Samples = zenoh::handlers::FifoChannelHandler<zenoh::sample::Sample>;
type Provider = ShmProvider<PoolBackend>;

fn provider(max_bytes: usize) -> (Arc<Provider>, ShmSegmentPool) {
    let backend = PoolBackend::new(ShmPoolConfig::new().max_bytes(max_bytes as u64)).expect("a backend");
    let pool = backend.pool().clone();
    (backend.into_provider(), pool)
}

fn alloc(provider: &Provider, len: usize, seq: u64) -> ZShmMut {
    let mut buf = provider.alloc(len).wait().expect("memory");
    write(&mut buf, seq);
    buf
}

fn is_out_of_memory<T>(result: Result<T, ZLayoutAllocError>) -> bool {
    matches!(result, Err(ZLayoutAllocError::Alloc(ZAllocError::OutOfMemory)))
}

/// What this session publishes, where others can come to it.
async fn sender() -> (zenoh::Session, String, zenoh::pubsub::Publisher<'static>) {
    let (session, at) = listening("peer").await;
    let publisher =
        session.declare_publisher("t").congestion_control(CongestionControl::Block).await.expect("publisher");
    (session, at, publisher)
}

fn receiver(dir: &Dir, at: &str, clients: &str) -> Peer {
    let mut peer = Peer::start("role_receiver", dir);
    peer.tell(&format!("connect {at} {clients}"));
    assert_eq!(peer.hear(), "connected");
    peer
}

/// A receiver that does what it is told, one line after the other.
#[test]
fn role_receiver() {
    let Some(role) = Role::of("role_receiver") else { return };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let mut session = None;
    let mut samples = None;
    let mut held: VecDeque<zenoh::sample::Sample> = VecDeque::new();
    while let Some(line) = role.hear() {
        let mut words = line.split(' ');
        let verb = words.next().expect("a verb");
        let mut number = || words.next().map_or(0, |word| word.parse::<u64>().expect("a number"));
        let receive = || {
            let samples: &zenoh::pubsub::Subscriber<Samples> = samples.as_ref().expect("connected");
            let sample = samples.recv_timeout(LIMIT).expect("receive").expect("a message");
            assert!(sample.payload().as_shm().is_some(), "the message came by copy");
            let bytes = sample.payload().to_bytes();
            assert_intact(&bytes, seq_of(&bytes));
            drop(bytes);
            sample
        };
        match verb {
            "connect" => {
                let at = line.split(' ').nth(1).expect("where");
                let builder = zenoh::open(config("client", &[], &[at]));
                let opened = runtime.block_on(async {
                    if line.ends_with("pool") {
                        builder.with_shm_clients(shm_clients()).await
                    } else {
                        builder.await
                    }
                });
                let opened = opened.expect("open a session");
                let channel = zenoh::handlers::FifoChannel::new(4096);
                samples = Some(opened.declare_subscriber("t").with(channel).wait().expect("subscribe"));
                session = Some(opened);
                role.say("connected");
            }
            "hold" => {
                let count = number();
                held.extend((0..count).map(|_| receive()));
                role.say("held");
            }
            "recv" => {
                let count = number();
                let first = seq_of(&receive().payload().to_bytes());
                let last = (1..count).fold(first, |last, _| {
                    let seq = seq_of(&receive().payload().to_bytes());
                    assert_eq!(seq, last + 1);
                    seq
                });
                role.say(&format!("{first}..={last}"));
            }
            "check" => {
                for sample in &held {
                    let bytes = sample.payload().to_bytes();
                    assert_intact(&bytes, seq_of(&bytes));
                }
                role.say("unchanged");
            }
            "drop" => {
                let count = number() as usize;
                drop(held.drain(..count));
                role.say("dropped");
            }
            "mappings" => {
                let maps = std::fs::read_to_string("/proc/self/maps").expect("maps");
                role.say(&maps.lines().filter(|line| line.contains("tokio-shm-zenoh-")).count().to_string());
            }
            other => panic!("{other}"),
        }
    }
    drop(held);
    drop(samples);
    drop(session);
}

/// A sender that is to be killed.
#[test]
fn role_sender() {
    let Some(role) = Role::of("role_sender") else { return };
    let (provider, _pool) = provider(64 * MIB);
    let sizes = [100, 4 * KIB, 64 * KIB, MIB];
    let held: Vec<_> = sizes.iter().map(|&len| alloc(&provider, len, 1)).collect();
    role.say("sent");
    role.hear();
    drop(held);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn zenoh_message_in_pool_memory_is_read_in_place_by_another_process() {
    let dir = Dir::new();
    let (provider, pool) = provider(64 * MIB);
    let (_session, at, publisher) = sender().await;
    let mut peer = receiver(&dir, &at, "pool");
    until_matched(&publisher).await;
    for (seq, len) in [8, 100, 4 * KIB, 16 * KIB, 64 * KIB, MIB, 16 * MIB].into_iter().enumerate() {
        publisher.put(alloc(&provider, len, seq as u64)).await.expect("put");
        assert_eq!(peer.ask("recv 1"), format!("{seq}..={seq}"));
    }
    peer.finish();
    // Let go by that process, noticed by the next who finds nothing idle.
    let all: Vec<_> = [100, 4 * KIB, MIB, 16 * MIB].map(|len| alloc(&provider, len, 0)).into();
    assert_eq!(pool.stats().in_use(), all.len());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn zenoh_buffer_held_in_another_process_is_unchanged_after_thousands_more() {
    let dir = Dir::new();
    let (provider, pool) = provider(16 * MIB);
    let (_session, at, publisher) = sender().await;
    let mut peer = receiver(&dir, &at, "pool");
    until_matched(&publisher).await;
    let mut places = HashSet::new();
    let mut seq = 0;
    for len in [200, 64 * KIB, MIB] {
        let buf = alloc(&provider, len, seq);
        places.insert(buf.as_ptr() as usize);
        publisher.put(buf).await.expect("put");
        seq += 1;
    }
    assert_eq!(peer.ask("hold 3"), "held");
    for round in 0..40 {
        let len = [200, 64 * KIB, MIB][round % 3];
        let batch = if len == MIB { 10 } else { 100 };
        let first = seq;
        for _ in 0..batch {
            let mut buf = within("memory", async { provider.alloc(len).with_policy::<Waiting>().await })
                .await
                .expect("memory");
            assert!(!places.contains(&(buf.as_ptr() as usize)), "memory that is held was given out");
            write(&mut buf, seq);
            publisher.put(buf).await.expect("put");
            seq += 1;
            if (seq - first).is_multiple_of(10) {
                assert_eq!(peer.ask("recv 10"), format!("{}..={}", seq - 10, seq - 1));
            }
            let stats = pool.stats();
            assert!(stats.bytes <= stats.max_bytes, "{stats:?}");
        }
        assert_eq!(peer.ask("check"), "unchanged");
    }
    assert!(seq > 2_500);
    // And once let go, it is used again.
    assert_eq!(peer.ask("drop 3"), "dropped");
    until("the memory is used again", || {
        let bufs: Vec<_> = (0..10).map(|_| alloc(&provider, 200, 0)).collect();
        bufs.iter().any(|buf| places.contains(&(buf.as_ptr() as usize))) || {
            pool.trim();
            pool.stats().in_use() == bufs.len()
        }
    })
    .await;
    peer.finish();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn zenoh_buffer_for_any_receiver_is_read_in_place_by_plain_zenoh() {
    let dir = Dir::new();
    let backend = PoolBackend::for_any_receiver(ShmPoolConfig::new().max_bytes(4 << 20)).expect("a backend");
    let provider = backend.into_provider();
    let (_session, at, publisher) = sender().await;
    let mut peer = receiver(&dir, &at, "default");
    until_matched(&publisher).await;
    for (seq, len) in [100, 4 * KIB, 64 * KIB].into_iter().enumerate() {
        publisher.put(alloc(&provider, len, seq as u64)).await.expect("put");
        assert_eq!(peer.ask("hold 1"), "held");
    }
    assert_eq!(peer.ask("check"), "unchanged");
    peer.finish();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn zenoh_allocation_at_the_cap_waits_until_another_process_lets_go() {
    let dir = Dir::new();
    let (provider, _pool) = provider(2 * MIB);
    let (_session, at, publisher) = sender().await;
    let mut peer = receiver(&dir, &at, "pool");
    until_matched(&publisher).await;
    for seq in 0..2 {
        publisher.put(alloc(&provider, MIB, seq)).await.expect("put");
    }
    assert_eq!(peer.ask("hold 2"), "held");
    assert!(is_out_of_memory(provider.alloc(MIB).wait()));
    let waiting = tokio::spawn({
        let provider = Arc::clone(&provider);
        async move { provider.alloc(MIB).with_policy::<Waiting>().await }
    });
    // Long enough for many looks, none of which may find anything.
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(!waiting.is_finished());
    assert_eq!(peer.ask("drop 1"), "dropped");
    let buf = within("the wait", waiting).await.expect("no panic").expect("memory");
    // The same on a thread.
    let blocked = spawn_bounded("the blocking wait", {
        let provider = Arc::clone(&provider);
        move || provider.alloc(MIB).with_policy::<Waiting>().wait().expect("memory").len()
    });
    assert_eq!(peer.ask("drop 1"), "dropped");
    assert_eq!(blocked(), MIB);
    drop(buf);
    peer.finish();
}

#[test]
fn zenoh_allocation_at_the_cap_is_woken_by_the_last_local_handle_without_a_timer() {
    let (provider, pool) = provider(MIB);
    let held: ZShm = alloc(&provider, MIB, 7).into();
    let clone = held.clone();
    let waiting = spawn_bounded("the wait", {
        let provider = Arc::clone(&provider);
        // No time and no I/O in this runtime: a timer would panic.
        move || {
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            runtime
                .block_on(async { provider.alloc(MIB).with_policy::<Waiting>().await.map(|buf| buf.len()) })
        }
    });
    support::wait_until("somebody waits", || pool.stats().waiters == 1);
    drop(held);
    assert_intact(&clone, 7);
    drop(clone);
    assert_eq!(waiting().expect("memory"), MIB);
}

#[tokio::test]
async fn zenoh_wait_that_is_dropped_takes_nothing() {
    let (provider, pool) = provider(MIB);
    let held = alloc(&provider, MIB, 7);
    for _ in 0..3 {
        let waiting = async { provider.alloc(MIB).with_policy::<Waiting>().await };
        assert!(tokio::time::timeout(Duration::from_millis(5), waiting).await.is_err());
    }
    drop(held);
    let again = within("memory", async { provider.alloc(MIB).with_policy::<Waiting>().await }).await;
    assert_eq!(pool.stats().in_use(), 1);
    drop(again.expect("memory"));
}

#[test]
fn zenoh_cap_holds_and_frees_what_is_not_held_for_other_sizes() {
    let (provider, pool) = provider(4 * MIB);
    for round in 0..200 {
        let len = [100, 10 * KIB, 100 * KIB, MIB, 3 * MIB][round % 5];
        drop(alloc(&provider, len, 3));
        assert!(pool.stats().bytes <= 4 << 20);
    }
    let held: Vec<_> = (0..4).filter_map(|_| provider.alloc(MIB).wait().ok()).collect();
    assert!(held.len() >= 3, "{}", held.len());
    assert!(is_out_of_memory(provider.alloc(3 * MIB).wait()));
    assert!(matches!(provider.alloc(5 * MIB).wait(), Err(ZLayoutAllocError::Layout(_))));
    drop(held);
    assert!(provider.alloc(3 * MIB).wait().is_ok());
}

#[test]
fn zenoh_policies_of_zenoh_and_ours_collect_for_a_provider_that_does_not() {
    let backend = PoolBackend::new(ShmPoolConfig::new().max_bytes(4 << 20)).unwrap();
    let pool = backend.pool().clone();
    let provider = ShmProviderBuilder::backend(backend).wait();
    for _ in 0..20 {
        drop(provider.alloc(MIB).with_policy::<Collecting>().wait().expect("memory"));
    }
    assert_eq!(pool.stats().misses, 1, "one segment goes round");
    for _ in 0..20 {
        drop(provider.alloc(MIB).with_policy::<GarbageCollect>().wait().expect("memory"));
        drop(provider.alloc(MIB).with_policy::<BlockOn<GarbageCollect>>().wait().expect("memory"));
        drop(provider.alloc(MIB).with_policy::<Waiting>().wait().expect("memory"));
    }
    assert!(pool.stats().misses <= 4, "up to the cap, and no more");
    let held: Vec<_> =
        (0..4).map(|_| provider.alloc(MIB).with_policy::<Collecting>().wait().unwrap()).collect();
    assert!(is_out_of_memory(provider.alloc(MIB).wait()));
    assert_eq!(provider.available(), 0);
    drop(held);
    assert!(provider.garbage_collect() >= MIB);
    assert_eq!(provider.available(), 4 * MIB);
}

#[test]
fn zenoh_layouts_get_their_size_and_alignment_up_to_a_page() {
    let (provider, _pool) = provider(64 * MIB);
    let mut held = Vec::new();
    for pow in 0..=12 {
        let alignment = AllocAlignment::new(pow).unwrap();
        for size in [1, 64, 100, 1000, 4096, 5000, 16 * KIB, 20 * KIB, 300 * KIB] {
            let size = alignment.align_size(size.try_into().unwrap());
            let layout = MemoryLayout::new(size, alignment).unwrap();
            let buf = provider.alloc(layout).wait().expect("memory");
            assert_eq!(buf.len(), size.get());
            assert!(buf.as_ptr().addr().is_multiple_of(1 << pow), "alignment 2^{pow}, {size} bytes");
            held.push(buf);
        }
    }
    let too_strict = MemoryLayout::new(1 << 13, AllocAlignment::new(13).unwrap()).unwrap();
    assert!(matches!(provider.alloc(too_strict).wait(), Err(ZLayoutAllocError::Layout(_))));
    // None overlaps another.
    for (index, buf) in held.iter_mut().enumerate() {
        buf.fill(index as u8);
    }
    assert!(held.iter().enumerate().all(|(index, buf)| buf.iter().all(|&byte| byte == index as u8)));
}

#[test]
fn zenoh_buffer_outlives_its_provider_unchanged() {
    let pool = ShmSegmentPool::new(ShmPoolConfig::new().backing(Backing::PosixShm).max_bytes(8 << 20));
    let provider = PoolBackend::over(&pool).unwrap().into_provider();
    let small: ZShm = alloc(&provider, 100, 5).into();
    let large: ZShm = alloc(&provider, MIB, 6).into();
    drop(provider);
    for _ in 0..100 {
        let mut taken: Vec<_> = [100, 100, MIB].iter().map(|&len| pool.try_take(len).unwrap()).collect();
        taken.iter_mut().for_each(|segment| segment.fill(0xff));
    }
    assert_intact(&small, 5);
    assert_intact(&large, 6);
    drop((small, large));
    pool.trim();
    assert_eq!(pool.stats().bytes, 0);
}

#[test]
fn zenoh_backend_over_memfds_is_refused() {
    let pool = ShmSegmentPool::new(ShmPoolConfig::new());
    assert!(matches!(PoolBackend::over(&pool), Err(BackendError::Backing)));
}

#[test]
fn zenoh_names_of_killed_senders_are_gone_after_the_next_start() {
    let dir = Dir::new();
    let mut peer = Peer::start("role_sender", &dir);
    assert_eq!(peer.hear(), "sent");
    let inodes: HashSet<u64> = std::fs::read_dir(format!("/proc/{}/fd", peer.pid()))
        .unwrap()
        .filter_map(|entry| std::fs::metadata(entry.ok()?.path()).ok().map(|metadata| metadata.ino()))
        .collect();
    // The pool's segments, and what zenoh has of its own.
    let names = || -> Vec<_> {
        let entries = std::fs::read_dir("/dev/shm").unwrap().filter_map(Result::ok);
        entries
            .filter_map(|entry| entry.metadata().ok().map(|metadata| (entry.file_name(), metadata)))
            .filter(|(_, metadata)| inodes.contains(&metadata.ino()))
            .collect()
    };
    let found = names();
    assert_eq!(
        found.iter().filter(|(name, _)| name.to_string_lossy().starts_with("tokio-shm-zenoh-")).count(),
        4
    );
    assert!(found.iter().all(|(_, metadata)| metadata.mode() & 0o7777 == 0o600));
    // While it lives, whoever starts leaves them alone.
    drop(PoolBackend::new(ShmPoolConfig::new()).unwrap());
    assert_eq!(names().len(), found.len());
    peer.kill();
    drop(PoolBackend::new(ShmPoolConfig::new()).unwrap());
    assert_eq!(names().len(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn zenoh_receiver_unmaps_what_its_sender_has_freed() {
    let dir = Dir::new();
    let (provider, pool) = provider(64 * MIB);
    let (_session, at, publisher) = sender().await;
    let mut peer = receiver(&dir, &at, "pool");
    until_matched(&publisher).await;
    publisher.put(alloc(&provider, MIB, 0)).await.expect("put");
    assert_eq!(peer.ask("hold 1"), "held");
    for seq in 1..100 {
        publisher.put(alloc(&provider, 100 * KIB, seq)).await.expect("put");
        assert_eq!(peer.ask("recv 1"), format!("{seq}..={seq}"));
        until("it was let go", || {
            provider.garbage_collect();
            pool.trim();
            pool.stats().in_use() == 1
        })
        .await;
    }
    let mappings: usize = peer.ask("mappings").parse().expect("a number");
    assert!(mappings <= 3, "{mappings} mappings for two segments");
    assert_eq!(peer.ask("check"), "unchanged");
    peer.finish();
    drop(provider);
}
