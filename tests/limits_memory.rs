//! What stands between a pool and its memory: file sizes, threads, control groups, signals, and segments that are mostly holes.
//!
//! Limits belong to a process, so each test has a child that meets them. The others are in `limits`.

mod support;

use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::process::Resource;
use support::limits::{assert_says, limited};
use support::{Dir, LIMIT, Peer, Role, skipped, spawn_bounded, until, wait_until, within};
use tokio_shm::{Backing, RecvError, ShmPoolConfig, ShmSegmentPool};

const MIB: usize = 1 << 20;

fn run(role: &str) {
    let dir = Dir::new();
    let mut peer = Peer::start(role, &dir);
    assert_eq!(peer.hear(), "done");
    peer.finish();
    dir.assert_empties();
}

/// A number of bytes in a file of `/proc` that counts in kB.
fn proc_bytes(file: &str, field: &str) -> usize {
    let text = std::fs::read_to_string(file).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(field)).unwrap();
    line.trim().strip_suffix(" kB").unwrap().parse::<usize>().unwrap() * 1024
}

/// What this process has mapped of shared memory and touched.
fn mapped() -> usize {
    proc_bytes("/proc/self/status", "RssShmem:")
}

/// What the segments of this process take of memory.
fn allocated() -> u64 {
    use std::os::unix::fs::MetadataExt;
    let descriptors = std::fs::read_dir("/proc/self/fd").unwrap().map(|entry| entry.unwrap().path());
    let segments = descriptors.filter(|path| {
        std::fs::read_link(path).is_ok_and(|link| link.to_string_lossy().contains("tokio-shm-segment"))
    });
    segments.filter_map(|path| path.metadata().ok()).map(|data| data.blocks() * 512).sum()
}

#[test]
fn limit_file_size_says_so_and_what_is_there_goes_on() {
    run("role_makes_segments_larger_than_a_file_may_be");
}

#[tokio::test]
async fn role_makes_segments_larger_than_a_file_may_be() {
    let Some(role) = Role::of("role_makes_segments_larger_than_a_file_may_be") else { return };
    const SAYS: [&str; 3] = ["RLIMIT_FSIZE", "ulimit -f", "LimitFSIZE="];
    for backing in [Backing::Memfd, Backing::PosixShm] {
        for populate in [true, false] {
            let pool = ShmPoolConfig::new().backing(backing).populate(populate);
            let publisher = role.publisher("t").pool(pool).bind().unwrap();
            let mut subscriber = role.subscriber("t").connect().unwrap();
            publisher.send([1]).await.unwrap();
            let bytes = publisher.pool().stats().bytes;
            let before = limited(Resource::Fsize, MIB as u64 / 2, || {
                assert_says(&publisher.try_loan(MIB).unwrap_err(), &SAYS);
                drop(publisher.try_loan(MIB / 4).unwrap());
                publisher.pool().trim();
                publisher.pool().stats().bytes
            });
            assert_eq!(before, bytes);
            // No link page can be made: that subscriber is turned away, and the others go on.
            let turned_away = limited(Resource::Fsize, 1024, || {
                let turned_away = role.subscriber("t").connect().unwrap();
                publisher.try_send([2]).unwrap();
                turned_away
            });
            drop(turned_away);
            assert_eq!(*within("recv", subscriber.recv()).await.unwrap(), [1]);
            assert_eq!(*within("recv", subscriber.recv()).await.unwrap(), [2]);
            within("send", publisher.send(vec![3; MIB])).await.unwrap();
            assert_eq!(within("recv", subscriber.recv()).await.unwrap().len(), MIB);
            drop(subscriber);
            within("close", publisher.close()).await.unwrap();
        }
    }
    role.say("done");
}

/// Every blocking thread waits for the message that is to be written into the segment.
#[test]
fn limit_blocking_threads_all_waiting_for_a_message_do_not_keep_it_from_being_made() {
    let runtimes = [tokio::runtime::Builder::new_current_thread, || {
        let mut builder = tokio::runtime::Builder::new_multi_thread();
        builder.worker_threads(2);
        builder
    }];
    for builder in runtimes {
        let sent = spawn_bounded("a message to all blocking threads", move || {
            let runtime = builder().enable_all().max_blocking_threads(4).build().unwrap();
            runtime.block_on(async {
                let dir = Dir::new();
                let publisher = dir.publisher("t").bind().unwrap();
                let waiting: Vec<_> = (0..4)
                    .map(|_| {
                        let mut subscriber = dir.subscriber("t").connect().unwrap();
                        tokio::task::spawn_blocking(move || subscriber.blocking_recv().unwrap().len())
                    })
                    .collect();
                within("subscribers", publisher.wait_for_subscribers(4)).await;
                for len in [MIB, 20 * MIB] {
                    drop(within("loan", publisher.loan(len)).await.unwrap());
                }
                publisher.send(vec![1; MIB]).await.unwrap();
                for one in waiting {
                    assert_eq!(within("recv", one).await.unwrap(), MIB);
                }
            });
        });
        sent();
    }
}

/// As a user of whom nobody else runs here, so that it is this process alone that has too many threads.
#[test]
fn limit_threads_none_to_be_had_a_loan_is_made_all_the_same() {
    let dir = Dir::new();
    let Some(mut peer) = Peer::start_as_another_user("role_loans_without_threads", &dir) else { return };
    assert_eq!(peer.hear(), "done");
    peer.finish();
}

#[tokio::test]
async fn role_loans_without_threads() {
    let Some(role) = Role::of("role_loans_without_threads") else { return };
    let publisher = role.publisher("t").bind().unwrap();
    rustix::process::setrlimit(
        Resource::Nproc,
        rustix::process::Rlimit { current: Some(1), maximum: Some(1) },
    )
    .unwrap();
    assert!(std::thread::Builder::new().spawn(|| ()).is_err());
    let held = [MIB, 20 * MIB].map(|len| publisher.try_loan(len).unwrap());
    drop(held);
    publisher.pool().trim();
    for len in [MIB, 20 * MIB] {
        assert_eq!(within("loan", publisher.loan(len)).await.unwrap().len(), len);
    }
    role.say("done");
}

/// A control group of memory, made below this process's own, and removed.
struct Group(PathBuf);

impl Group {
    /// `None` where there can be none.
    fn new(limit: usize) -> Option<Self> {
        let groups = std::fs::read_to_string("/proc/self/cgroup").ok()?;
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").ok()?;
        for line in mounts.lines() {
            let (mount, kind) = line.split_once(" - ")?;
            let mut kind = kind.split(' ');
            let (kind, options) = (kind.next()?, kind.nth(1)?);
            let unified = kind == "cgroup2";
            let counts_memory = options.split(',').any(|option| option == "memory");
            if !unified && (kind != "cgroup" || !counts_memory) {
                continue;
            }
            let mut mount = mount.split(' ').skip(3);
            let (root, point) = (mount.next()?, mount.next()?);
            let ours = groups.lines().find_map(|line| {
                let mut fields = line.splitn(3, ':').skip(1);
                let (controllers, path) = (fields.next()?, fields.next()?);
                let ours = if unified {
                    controllers.is_empty()
                } else {
                    controllers.split(',').any(|controller| controller == "memory")
                };
                ours.then_some(path)
            })?;
            let below = ours.strip_prefix(root.trim_end_matches('/')).unwrap_or(ours);
            let group = Path::new(point)
                .join(below.trim_start_matches('/'))
                .join(format!("tokio-shm-test-{}", std::process::id()));
            if std::fs::create_dir(&group).is_err() {
                continue;
            }
            let group = Self(group);
            let name = if unified { "memory.max" } else { "memory.limit_in_bytes" };
            if std::fs::write(group.0.join(name), limit.to_string()).is_ok() {
                return Some(group);
            }
        }
        None
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // Busy for a moment after its last process has ended.
        wait_until("the control group is removed", || std::fs::remove_dir(&self.0).is_ok());
    }
}

#[test]
fn limit_control_group_says_so_instead_of_the_oom_killer() {
    let Some(group) = Group::new(96 * MIB) else {
        return skipped("no control group of memory can be made here");
    };
    let dir = Dir::new();
    let mut peer = Peer::start("role_fills_its_control_group", &dir);
    std::fs::write(group.0.join("cgroup.procs"), peer.pid().to_string()).unwrap();
    peer.tell("go");
    assert_eq!(peer.hear(), "done");
    peer.finish();
}

#[tokio::test]
async fn role_fills_its_control_group() {
    let Some(role) = Role::of("role_fills_its_control_group") else { return };
    const SAYS: [&str; 4] = ["/tokio-shm-test-", "100663296", "max_bytes", "docker run --memory"];
    assert_eq!(role.hear().unwrap(), "go");
    let publisher = role.publisher("t").bind().unwrap();
    let mut subscriber = role.subscriber("t").connect().unwrap();
    assert_says(&publisher.try_loan(200 * MIB).unwrap_err(), &SAYS);
    assert_says(&publisher.loan(200 * MIB).await.unwrap_err(), &SAYS);
    // However small the pieces are.
    for (len, at_least) in [(8 * MIB, 7), (MIB, 60), (100_000, 600), (5_000, 4_000)] {
        let mut held = Vec::new();
        let error = loop {
            match publisher.loan(len).await {
                Ok(mut loan) => {
                    loan.fill(1);
                    held.push(loan);
                }
                Err(error) => break error,
            }
        };
        assert!(held.len() >= at_least, "{} of {len}", held.len());
        assert_says(&error, &SAYS);
        // Again and again, but for a few that the kernel has made room for meanwhile, by what it forgets of files.
        let mut refused = 0;
        while refused < 3 {
            match publisher.try_loan(len) {
                Ok(loan) => held.push(loan),
                Err(error) => {
                    assert_says(&error, &SAYS);
                    refused += 1;
                }
            }
        }
        // What there is goes on, and what comes back can be had again.
        within("send", publisher.send(held.pop().unwrap())).await.unwrap();
        assert_eq!(within("recv", subscriber.recv()).await.unwrap().len(), len);
        drop(held);
        publisher.pool().trim();
        until("it can be had again", || {
            assert!(subscriber.try_recv().is_err());
            publisher.try_loan(8 * MIB).is_ok()
        })
        .await;
        publisher.pool().trim();
    }
    role.say("done");
}

#[test]
fn limit_signals_without_end_do_not_keep_memory_from_being_made() {
    run("role_allocates_under_signals");
}

#[test]
fn role_allocates_under_signals() {
    let Some(role) = Role::of("role_allocates_under_signals") else { return };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let _entered = runtime.enter();
    // Its handler, which every signal runs through.
    let _signals = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::user_defined1()).unwrap();
    let len = 512 * MIB;
    let pool = ShmSegmentPool::new(ShmPoolConfig::new().max_bytes(len as u64));
    let make = move || drop(pool.try_take(len).unwrap());
    let made = std::thread::spawn(make);
    let thread = support::signals::Target::of(&made);
    let deadline = std::time::Instant::now() + LIMIT;
    while !made.is_finished() {
        assert!(std::time::Instant::now() < deadline, "nothing was allocated within {LIMIT:?}");
        thread.send_user_defined1();
        // Far less than allocating all of it takes.
        let next = std::time::Instant::now() + Duration::from_micros(200);
        while std::time::Instant::now() < next {
            std::hint::spin_loop();
        }
    }
    made.join().unwrap();
    role.say("done");
}

/// A publisher that has reserved much and touched little, as often as its host could not bear if all of it were touched.
#[test]
fn limit_sparse_segments_larger_than_the_host_are_received_without_being_filled() {
    let dir = Dir::new();
    let mut publisher = Peer::start("role_sends_little_of_much", &dir);
    assert_eq!(publisher.hear(), "bound");
    let mut subscriber = Peer::start("role_receives_little_of_much", &dir);
    assert_eq!(subscriber.hear(), "connected");
    publisher.tell("send");
    assert_eq!(subscriber.hear(), "done");
    publisher.tell("look");
    assert_eq!(publisher.hear(), "done");
    subscriber.finish();
    publisher.finish();
}

/// How many of them there are, and what of each is used.
const SPARSE: usize = 3;
const USED: usize = 1_000;

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn role_sends_little_of_much() {
    let Some(role) = Role::of("role_sends_little_of_much") else { return };
    let len = proc_bytes("/proc/meminfo", "MemAvailable:") / 16 * 10;
    let pool = ShmPoolConfig::new().populate(false).max_bytes(16 * len as u64);
    let publisher = role.publisher("t").pool(pool).bind().unwrap();
    role.say("bound");
    assert_eq!(role.hear().unwrap(), "send");
    let loans: Vec<_> = (0..SPARSE).map(|_| publisher.try_loan(len).unwrap()).collect();
    for (number, mut loan) in loans.into_iter().enumerate() {
        loan[..USED].fill(number as u8);
        loan.set_len(USED);
        within("send", publisher.send(loan)).await.unwrap();
    }
    // And one that is used as a whole, though of a class that is larger.
    within("send", publisher.send(vec![9; 33 * MIB])).await.unwrap();
    assert_eq!(role.hear().unwrap(), "look");
    let allocated = allocated();
    assert!(allocated < 40 * MIB as u64, "{allocated}");
    role.say("done");
}

#[tokio::test]
async fn role_receives_little_of_much() {
    let Some(role) = Role::of("role_receives_little_of_much") else { return };
    let mut subscriber = role.subscriber("t").connect().unwrap();
    within("a publisher", subscriber.wait_for_publishers(1)).await.unwrap();
    role.say("connected");
    for number in 0..SPARSE {
        let sample = within("recv", subscriber.recv()).await.unwrap();
        assert!(sample.len() == USED && sample.iter().all(|byte| *byte == number as u8));
    }
    assert!(mapped() < 2 * MIB, "{}", mapped());
    let sample = within("recv", subscriber.recv()).await.unwrap();
    assert!(sample.len() == 33 * MIB && sample.iter().all(|byte| *byte == 9));
    role.say("done");
}

/// Mapping a large segment does not touch all its pages on the thread that receives.
#[test]
fn limit_large_segment_is_mapped_without_touching_its_pages() {
    let dir = Dir::new();
    let mut subscriber = Peer::start("role_receives_much_and_reads_little", &dir);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let publisher = dir.publisher("t").history(1).bind().unwrap();
        within("send", publisher.send(vec![3; 128 * MIB])).await.unwrap();
        subscriber.tell("receive");
        within("a subscriber", publisher.wait_for_subscribers(1)).await;
        let done = tokio::task::spawn_blocking(move || {
            assert_eq!(subscriber.hear(), "done");
            subscriber.finish();
        });
        within("the subscriber", done).await.unwrap();
    });
}

#[tokio::test]
async fn role_receives_much_and_reads_little() {
    let Some(role) = Role::of("role_receives_much_and_reads_little") else { return };
    assert_eq!(role.hear().unwrap(), "receive");
    let mut subscriber = role.subscriber("t").connect().unwrap();
    let sample = within("recv", subscriber.recv()).await.unwrap();
    assert!(mapped() < 2 * MIB, "{}", mapped());
    assert!(sample.iter().all(|byte| *byte == 3));
    assert!(mapped() >= 128 * MIB, "{}", mapped());
    role.say("done");
}

/// A subscriber that keeps all it gets, is disconnected for it, and comes again.
#[test]
fn limit_samples_kept_after_evictions_are_counted_and_bounded() {
    const CAP: usize = 64 * MIB;
    const LEN: usize = 4 * MIB;
    let dir = Dir::new();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let _entered = runtime.enter();
    let pool = ShmPoolConfig::new().max_bytes(CAP as u64);
    let publisher = dir.publisher("t").pool(pool).evict_after(Duration::from_millis(20)).bind().unwrap();
    let mut keeper = Peer::start("role_keeps_all_and_comes_again", &dir);
    assert_eq!(keeper.hear(), "connected");
    let kept = |pid: u32| {
        let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
        let lines = maps.lines().filter(|line| line.contains("tokio-shm-segment"));
        let range = lines.filter_map(|line| line.split(' ').next()?.split_once('-'));
        let len = |(start, end)| {
            usize::from_str_radix(end, 16).unwrap() - usize::from_str_radix(start, 16).unwrap()
        };
        range.map(len).sum::<usize>()
    };
    // Until there is no memory for another message.
    let mut sent = 0;
    while let Ok(mut loan) = publisher.blocking_loan_timeout(LEN, Duration::from_secs(3)) {
        loan.fill(1);
        publisher.blocking_send(loan).unwrap();
        sent += LEN;
        let stats = publisher.pool().stats();
        assert!(stats.bytes <= stats.max_bytes && stats.abandoned_bytes <= 2 * stats.max_bytes, "{stats:?}");
        assert!(kept(keeper.pid()) <= 2 * CAP, "{stats:?}");
        assert!(sent < 100 * CAP, "{stats:?}");
    }
    let stats = publisher.pool().stats();
    assert!(sent > CAP && stats.abandoned_bytes > CAP as u64, "{sent}: {stats:?}");
    // It is told of in time, and nobody has to look.
    let waiting = {
        let publisher = publisher.clone();
        spawn_bounded("a loan", move || drop(publisher.blocking_loan(LEN).unwrap()))
    };
    wait_until("it waits", || publisher.pool().stats().waiters > 0);
    keeper.kill();
    waiting();
    wait_until("all is back", || {
        let stats = publisher.pool().stats();
        (stats.abandoned_bytes, stats.in_use()) == (0, 0)
    });
    let all: Vec<_> = (0..CAP / LEN).map(|_| publisher.try_loan(LEN).unwrap()).collect();
    drop(all);
    runtime.block_on(async { within("close", publisher.close()).await.unwrap() });
    dir.assert_empties();
}

#[test]
fn role_keeps_all_and_comes_again() {
    let Some(role) = Role::of("role_keeps_all_and_comes_again") else { return };
    let mut kept = Vec::new();
    let mut subscriber = role.subscriber("t").connect().unwrap();
    role.say("connected");
    loop {
        match subscriber.blocking_recv() {
            Ok(sample) => kept.push(sample),
            Err(RecvError::Lagged { .. }) => {}
            Err(_) => subscriber = role.subscriber("t").connect().unwrap(),
        }
    }
}
