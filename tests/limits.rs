//! The limits of a process and of the machine: whoever meets one is told what to change, leaks nothing, and goes on with
//! the same handles once there is room.
//!
//! Limits belong to a process, so each test has children that meet them. Memory is in `limits_memory`; forks, clocks and panics are in
//! `limits_peers`.

mod support;

use std::path::Path;
use std::process::Command;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use support::limits::{assert_says, limited};
use support::{Dir, LIMIT, Peer, Role, is_allowed, skipped, until, wait_until, within};
use tokio_shm::{
    Backing, LoanError, RecvError, ShmPoolConfig, ShmPublisher, ShmSample, ShmSegmentPool, ShmSubscriber,
    TakeError, TryRecvError,
};

const MIB: usize = 1 << 20;

fn names_in(path: impl AsRef<Path>) -> usize {
    std::fs::read_dir(path).map_or(0, Iterator::count)
}

fn descriptors() -> usize {
    names_in("/proc/self/fd")
}

fn mapped_segments() -> usize {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    maps.lines().filter(|line| line.contains("tokio-shm-segment") || line.contains("/dev/shm/")).count()
}

/// Runs `body` with room for `room` descriptors more.
fn with_descriptors<T>(room: u64, body: impl FnOnce() -> T) -> T {
    use std::os::fd::AsRawFd;
    let lowest = std::fs::File::open("/dev/null").unwrap();
    let limit = lowest.as_raw_fd() as u64 + room;
    drop(lowest);
    limited(Resource::Nofile, limit, body)
}

/// Runs a role under `command`, in mounts of its own after `script`, and waits for its end; not where that is forbidden.
fn run_with_mounts(script: &str, role: &str) {
    let dir = Dir::new();
    let script = format!("DIR={}; {script} && exec \"$0\" \"$@\"", dir.path().display());
    let user: &[&str] = if rustix::process::geteuid().is_root() { &[] } else { &["--map-root-user"] };
    let command = [&["unshare", "--mount"], user, &["sh", "-c", &script]].concat();
    if is_allowed(&command) {
        let mut peer = Peer::start_under(&command, role, &dir);
        assert_eq!(peer.hear(), "done");
        peer.finish();
    }
}

fn run(role: &str) {
    let dir = Dir::new();
    let mut peer = Peer::start(role, &dir);
    assert_eq!(peer.hear(), "done");
    peer.finish();
    dir.assert_empties();
}

#[test]
fn limit_descriptors_at_bind_says_so_and_leaves_nothing() {
    run("role_binds_without_descriptors");
}

#[tokio::test]
async fn role_binds_without_descriptors() {
    let Some(role) = Role::of("role_binds_without_descriptors") else { return };
    let before = descriptors();
    let mut room = 0;
    let publisher = loop {
        let bound = with_descriptors(room, || role.publisher("a/b").evict_after(LIMIT).bind());
        match bound {
            Ok(publisher) => break publisher,
            Err(error) => assert_says(&error, &["RLIMIT_NOFILE", "ulimit -n", "LimitNOFILE="]),
        }
        assert_eq!((descriptors(), names_in(&role.dir)), (before, 0), "with room for {room}");
        room += 1;
    };
    assert!((3..10).contains(&room), "{room}");
    // The rest of it works as ever.
    let mut subscriber = role.subscriber("a/b").connect().unwrap();
    publisher.send([1]).await.unwrap();
    assert_eq!(*within("recv", subscriber.recv()).await.unwrap(), [1]);
    drop(subscriber);
    within("close", publisher.close()).await.unwrap();
    assert_eq!(names_in(&role.dir), 0);
    role.say("done");
}

#[test]
fn limit_descriptors_at_a_loan_says_so_and_gives_the_bytes_back() {
    run("role_loans_without_descriptors");
}

#[tokio::test]
async fn role_loans_without_descriptors() {
    let Some(role) = Role::of("role_loans_without_descriptors") else { return };
    for backing in [Backing::Memfd, Backing::PosixShm] {
        let pool = ShmPoolConfig::new().backing(backing);
        let publisher = role.publisher("t").pool(pool).bind().unwrap();
        let mut subscriber = role.subscriber("t").connect().unwrap();
        publisher.send([1]).await.unwrap();
        let bytes = publisher.pool().stats().bytes;
        let before = (descriptors(), mapped_segments());
        with_descriptors(0, || {
            for len in [MIB, 100_000] {
                let error = publisher.try_loan(len).unwrap_err();
                assert!(
                    matches!(&error, LoanError::Pool(error) if matches!(**error, TakeError::Memory(_))),
                    "{error}"
                );
                assert_says(&error, &["RLIMIT_NOFILE", "ulimit -n"]);
                let error = publisher.try_send(vec![2; len]).unwrap_err();
                assert_says(&error, &["RLIMIT_NOFILE", "ulimit -n"]);
                assert_eq!(error.into_inner(), vec![2; len]);
            }
            // What needs none goes on.
            publisher.try_send([3]).unwrap();
        });
        let stats = publisher.pool().stats();
        assert_eq!((stats.bytes, stats.waiters), (bytes, 0));
        assert_eq!((descriptors(), mapped_segments()), before);
        publisher.send(vec![4; MIB]).await.unwrap();
        for (first, len) in [(1, 1), (3, 1), (4, MIB)] {
            let sample = within("recv", subscriber.recv()).await.unwrap();
            assert_eq!((sample[0], sample.len()), (first, len));
        }
        // Another segment of this size would be made now; where there can be none, the one that has come back will do.
        with_descriptors(0, || publisher.try_send(vec![5; MIB]).unwrap());
        assert_eq!(within("recv", subscriber.recv()).await.unwrap()[0], 5);
        drop(subscriber);
        within("close", publisher.close()).await.unwrap();
    }
    role.say("done");
}

/// Each of the ways to receive.
const WAYS: [&str; 3] = ["recv", "blocking_recv", "try_recv"];

fn receive(way: &str, subscriber: &mut ShmSubscriber) -> Result<ShmSample, RecvError> {
    match way {
        "recv" => tokio::runtime::Handle::current().block_on(within("recv", subscriber.recv())),
        "blocking_recv" => subscriber.blocking_recv_timeout(LIMIT),
        "try_recv" => {
            let mut received = None;
            wait_until("try_recv", || {
                received = match subscriber.try_recv() {
                    Ok(sample) => Some(Ok(sample)),
                    Err(TryRecvError::Recv(error)) => Some(Err(error)),
                    Err(_) => None,
                };
                received.is_some()
            });
            received.unwrap()
        }
        other => panic!("{other}"),
    }
}

/// A message that no room could be made for, in whichever way it is asked for.
#[track_caller]
fn assert_no_room(way: &str, subscriber: &mut ShmSubscriber, parts: &[&str]) {
    match receive(way, subscriber) {
        Err(error @ RecvError::OutOfResources { .. }) => assert_says(&error, parts),
        other => panic!("{way}: {other:?}"),
    }
}

#[tokio::test]
async fn limit_descriptors_at_connect_and_receive_say_so_and_nothing_is_lost() {
    for way in WAYS {
        let dir = Dir::new();
        let publisher = dir.publisher("t").bind().unwrap();
        let mut peer = Peer::start("role_receives_without_descriptors", &dir);
        peer.tell(way);
        assert_eq!(peer.hear(), "connected");
        // Accepted here, but it cannot take the page and the doorbells: what is sent meanwhile must not get lost.
        within("a subscriber", publisher.wait_for_subscribers(1)).await;
        for number in 0..10 {
            within("send", publisher.send([number; 100])).await.unwrap();
        }
        peer.tell("sent");
        // One at a time, as it reads all that there is room for.
        for number in 10..13 {
            assert_eq!(peer.hear(), "more");
            within("send", publisher.send(vec![number; 100_000 << (number - 10)])).await.unwrap();
            peer.tell("sent");
        }
        assert_eq!(peer.hear(), "done");
        peer.finish();
        until("it has left", || publisher.subscriber_count() == 0).await;
        assert_eq!(publisher.pool().stats().in_use(), 0);
        assert_eq!(publisher.stats().dropped, 0);
    }
}

#[test]
fn role_receives_without_descriptors() {
    let Some(role) = Role::of("role_receives_without_descriptors") else { return };
    const SAYS: [&str; 2] = ["RLIMIT_NOFILE", "ulimit -n"];
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let way = role.hear().unwrap();
    // `recv` only: elsewhere no runtime is needed.
    let _entered = (way == "recv").then(|| runtime.enter());
    // The inotify instance is made with the first subscriber, and stays.
    drop(role.subscriber("other").connect().unwrap());
    let before = descriptors();
    let mut room = 0;
    let mut subscriber = loop {
        match with_descriptors(room, || role.subscriber("t").connect()) {
            Ok(subscriber) => break subscriber,
            Err(error) => assert_says(&error, &SAYS),
        }
        assert_eq!(descriptors(), before, "with room for {room}");
        room += 1;
    };
    assert!((3..10).contains(&room), "{room}");
    let connected = descriptors();
    role.say("connected");
    assert_eq!(role.hear().unwrap(), "sent");
    for room in [0, 1, 2, 0] {
        with_descriptors(room, || assert_no_room(&way, &mut subscriber, &SAYS));
        assert!(descriptors() <= connected + 1, "with room for {room}");
    }
    for number in 0..10 {
        assert_eq!(*receive(&way, &mut subscriber).unwrap(), [number; 100]);
    }
    for number in 10..13 {
        role.say("more");
        assert_eq!(role.hear().unwrap(), "sent");
        for _ in 0..2 {
            with_descriptors(0, || assert_no_room(&way, &mut subscriber, &SAYS));
        }
        let sample = receive(&way, &mut subscriber).unwrap();
        assert!(sample.len() == 100_000 << (number - 10) && sample.iter().all(|byte| *byte == number));
    }
    assert_eq!(subscriber.stats().lagged, 0);
    drop(subscriber);
    assert_eq!(descriptors(), before);
    role.say("done");
}

/// A publisher that comes when there is no descriptor to connect to it with is not forgotten.
#[test]
fn limit_descriptors_when_a_publisher_comes_say_so_and_it_is_connected_to_later() {
    for way in WAYS {
        let dir = Dir::new();
        let mut peer = Peer::start("role_finds_a_publisher_without_descriptors", &dir);
        peer.tell(way);
        assert_eq!(peer.hear(), "connected");
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_io().build().unwrap();
        let publisher = dir.publisher("t").history(1).runtime(runtime.handle().clone()).bind().unwrap();
        publisher.blocking_send([7]).unwrap();
        peer.tell("bound");
        assert_eq!(peer.hear(), "done");
        peer.finish();
    }
}

#[test]
fn role_finds_a_publisher_without_descriptors() {
    let Some(role) = Role::of("role_finds_a_publisher_without_descriptors") else { return };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let way = role.hear().unwrap();
    let _entered = (way == "recv").then(|| runtime.enter());
    let mut subscriber = role.subscriber("t").connect().unwrap();
    role.say("connected");
    assert_eq!(role.hear().unwrap(), "bound");
    for room in [1, 0, 1, 0] {
        with_descriptors(room, || {
            assert_no_room(&way, &mut subscriber, &["RLIMIT_NOFILE", "ulimit -n"]);
        });
    }
    assert_eq!(*receive(&way, &mut subscriber).unwrap(), [7]);
    role.say("done");
}

/// More than a link has at a time, and the descriptors that it takes.
const SEGMENTS: usize = 8_192 + 100;
const FILES: u64 = SEGMENTS as u64 + 100;

/// A pool that has more segments than a link retires those that the subscriber has nothing of.
#[test]
fn limit_segments_of_a_link_are_retired_and_announced_anew() {
    if getrlimit(Resource::Nofile).maximum.is_some_and(|files| files < FILES) {
        return skipped(&format!("RLIMIT_NOFILE cannot be raised to {FILES}"));
    }
    run("role_sends_in_more_segments_than_a_link_has");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn role_sends_in_more_segments_than_a_link_has() {
    let Some(role) = Role::of("role_sends_in_more_segments_than_a_link_has") else { return };
    // The smallest that have a segment each.
    const LEN: usize = 20 * 1024;
    let maximum = getrlimit(Resource::Nofile).maximum;
    setrlimit(Resource::Nofile, Rlimit { current: Some(FILES), maximum }).unwrap();
    let pool = ShmPoolConfig::new().max_idle_per_size(SEGMENTS).max_bytes((2 * SEGMENTS * LEN) as u64);
    let publisher = role.publisher("t").pool(pool).bind().unwrap();
    let mut subscriber = role.subscriber("t").connect().unwrap();
    let loan = |number: usize| {
        let mut loan = publisher.try_loan(LEN).unwrap();
        loan[..8].copy_from_slice(&number.to_le_bytes());
        loan
    };
    // One that is held is not retired.
    publisher.send(loan(usize::MAX)).await.unwrap();
    let held = within("recv", subscriber.recv()).await.unwrap();
    for _ in 0..2 {
        // All at a time, so that no two have a segment.
        let loans: Vec<_> = (0..SEGMENTS).map(loan).collect();
        for (number, loan) in loans.into_iter().enumerate() {
            within("send", publisher.send(loan)).await.unwrap();
            let sample = within("recv", subscriber.recv()).await.unwrap();
            assert_eq!(sample[..8], number.to_le_bytes());
        }
        assert!(mapped_segments() <= SEGMENTS + 1 + 8_192);
    }
    assert_eq!(held[..8], usize::MAX.to_le_bytes());
    assert_eq!((publisher.subscriber_count(), subscriber.stats().lagged), (1, 0));
    drop(held);
    role.say("done");
}

#[tokio::test]
async fn limit_address_space_says_so_and_nothing_is_lost() {
    let dir = Dir::new();
    let publisher = dir.publisher("t").bind().unwrap();
    let mut peer = Peer::start("role_receives_without_address_space", &dir);
    assert_eq!(peer.hear(), "connected");
    within("a subscriber", publisher.wait_for_subscribers(1)).await;
    within("send", publisher.send([1])).await.unwrap();
    assert_eq!(peer.hear(), "more");
    within("send", publisher.send(vec![2; 32 * MIB])).await.unwrap();
    within("send", publisher.send([3])).await.unwrap();
    peer.tell("sent");
    assert_eq!(peer.hear(), "done");
    peer.finish();
    until("it has left", || publisher.subscriber_count() == 0).await;
    assert_eq!(publisher.pool().stats().in_use(), 0);
}

#[test]
fn role_receives_without_address_space() {
    let Some(role) = Role::of("role_receives_without_address_space") else { return };
    const SAYS: [&str; 3] = ["RLIMIT_AS", "ulimit -v", "LimitAS="];
    let cramped = |body: &mut dyn FnMut()| {
        let pages = std::fs::read_to_string("/proc/self/statm").unwrap();
        let pages: u64 = pages.split(' ').next().unwrap().parse().unwrap();
        limited(Resource::As, pages * rustix::param::page_size() as u64 + 8 * MIB as u64, body);
    };
    let mut subscriber = role.subscriber("t").connect().unwrap();
    role.say("connected");
    assert_eq!(*subscriber.blocking_recv_timeout(LIMIT).unwrap(), [1]);
    role.say("more");
    assert_eq!(role.hear().unwrap(), "sent");
    let before = (descriptors(), mapped_segments());
    for _ in 0..3 {
        cramped(&mut || assert_no_room("blocking_recv", &mut subscriber, &SAYS));
        assert_eq!((descriptors(), mapped_segments()), before);
    }
    let sample = subscriber.blocking_recv_timeout(LIMIT).unwrap();
    assert!(sample.len() == 32 * MIB && sample.iter().all(|byte| *byte == 2));
    assert_eq!(*subscriber.blocking_recv_timeout(LIMIT).unwrap(), [3]);
    drop(sample);

    for backing in [Backing::Memfd, Backing::PosixShm] {
        let pool = ShmSegmentPool::new(ShmPoolConfig::new().backing(backing));
        let before = (descriptors(), mapped_segments());
        cramped(&mut || {
            let error = pool.try_take(32 * MIB).unwrap_err();
            assert_says(&error, &SAYS);
        });
        assert_eq!((descriptors(), mapped_segments(), pool.stats().bytes), (before.0, before.1, 0));
        drop(pool.try_take(32 * MIB).unwrap());
    }
    role.say("done");
}

#[test]
fn limit_dev_shm_tiny_or_full_says_so_and_what_is_there_goes_on() {
    run_with_mounts("mount -t tmpfs -o size=1m tmpfs /dev/shm", "role_fills_dev_shm");
}

#[tokio::test]
async fn role_fills_dev_shm() {
    let Some(role) = Role::of("role_fills_dev_shm") else { return };
    const SAYS: [&str; 4] = ["/dev/shm", "1048576", "--shm-size", "memfd"];
    let config = ShmPoolConfig::new().backing(Backing::PosixShm);
    let publisher = role.publisher("t").pool(config.clone()).bind().unwrap();
    let mut subscriber = role.subscriber("t").connect().unwrap();
    let before = descriptors();
    assert_says(&publisher.try_loan(2 * MIB).unwrap_err(), &SAYS);
    assert_eq!((descriptors(), mapped_segments(), publisher.pool().stats().bytes), (before, 0, 0));
    // Filled bit by bit: as much as fits is usable.
    let mut held = Vec::new();
    let error = loop {
        match publisher.try_loan(100_000) {
            Ok(mut loan) => {
                loan.fill(held.len() as u8);
                held.push(loan);
            }
            Err(error) => break error,
        }
    };
    assert_says(&error, &SAYS);
    assert!((8..=10).contains(&held.len()), "{}", held.len());
    let bytes = publisher.pool().stats().bytes;
    let before = (descriptors(), mapped_segments());
    for _ in 0..10 {
        assert_says(&publisher.try_loan(100_000).unwrap_err(), &SAYS);
        assert_says(&publisher.loan(300_000).await.unwrap_err(), &SAYS);
    }
    assert_eq!(
        (descriptors(), mapped_segments(), publisher.pool().stats().bytes),
        (before.0, before.1, bytes)
    );
    for (number, loan) in held.into_iter().enumerate() {
        within("send", publisher.send(loan)).await.unwrap();
        let sample = within("recv", subscriber.recv()).await.unwrap();
        assert!(sample.iter().all(|byte| *byte == number as u8));
    }
    // With room again the same pool makes segments of another size.
    publisher.pool().trim();
    until("there is room", || {
        assert!(subscriber.try_recv().is_err());
        publisher.try_loan(300_000).is_ok()
    })
    .await;
    // And memfds do not count against it.
    drop(ShmSegmentPool::new(ShmPoolConfig::new()).try_take(8 * MIB).unwrap());
    drop((subscriber, publisher));
    until("the directory is empty", || names_in(&role.dir) == 0).await;
    assert_eq!(names_in("/dev/shm"), 0);
    role.say("done");
}

/// Cannot bind, says why, leaves nothing; and can after `mended`. A subscriber needs to write nothing.
async fn assert_unusable(role: &Role, parts: &[&str], mended: impl FnOnce()) {
    // The inotify instance is made by the first try, and stays.
    drop(role.subscriber("t").connect());
    let before = (descriptors(), names_in(&role.dir));
    // It makes nothing, and waits.
    let mut subscriber = role.subscriber("a/b").connect().unwrap();
    for _ in 0..3 {
        assert_says(&role.publisher("a/b").bind().unwrap_err(), parts);
        drop(role.subscriber("a/b").connect().unwrap());
        assert_eq!(names_in(&role.dir), before.1);
    }
    mended();
    let publisher = role.publisher("a/b").history(1).bind().unwrap();
    publisher.send([1]).await.unwrap();
    assert_eq!(*within("recv", subscriber.recv()).await.unwrap(), [1]);
    drop(subscriber);
    within("close", publisher.close()).await.unwrap();
    until("all is closed", || descriptors() == before.0).await;
}

fn mount(words: &[&str], dir: &Path) {
    assert!(Command::new("mount").args(words).arg(dir).status().unwrap().success());
}

#[test]
fn limit_runtime_directory_read_only_says_so() {
    run_with_mounts("mount -t tmpfs -o ro,mode=700 tmpfs $DIR", "role_cannot_write_its_directory");
}

#[tokio::test]
async fn role_cannot_write_its_directory() {
    let Some(role) = Role::of("role_cannot_write_its_directory") else { return };
    // A directory that would have to be made there.
    let missing = Role { dir: role.dir.join("missing") };
    let error = missing.publisher("t").bind().unwrap_err();
    assert_says(&error, &["parent must exist and be writable", "TOKIO_SHM_DIR"]);
    assert_unusable(&role, &["read-only", "TOKIO_SHM_DIR"], || mount(&["-o", "remount,rw"], &role.dir)).await;
    role.say("done");
}

#[test]
fn limit_runtime_directory_on_a_full_disk_says_so() {
    run_with_mounts("mount -t tmpfs -o nr_inodes=2,mode=700 tmpfs $DIR", "role_has_no_room_in_its_directory");
}

#[tokio::test]
async fn role_has_no_room_in_its_directory() {
    let Some(role) = Role::of("role_has_no_room_in_its_directory") else { return };
    // Room for one directory, but for nothing in it.
    assert_unusable(&role, &["no space is left", "TOKIO_SHM_DIR"], || {
        mount(&["-o", "remount,nr_inodes=100"], &role.dir);
    })
    .await;
    assert_eq!(names_in(&role.dir), 0);
    role.say("done");
}

#[test]
fn limit_runtime_directory_too_long_or_of_another_user_says_so() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build().unwrap();
    let _entered = runtime.enter();
    let dir = Dir::new();
    let long = dir.path().join("d/".repeat(2100));
    let bound = ShmPublisher::builder("t").runtime_dir(&long).bind();
    assert_says(&bound.unwrap_err(), &["too long", "TOKIO_SHM_DIR"]);
    let connected = ShmSubscriber::builder("t").runtime_dir(&long).connect();
    assert_says(&connected.unwrap_err(), &["too long", "TOKIO_SHM_DIR"]);
    if std::os::unix::fs::chown(dir.path(), Some(65_534), None).is_ok() {
        let parts = ["belongs to user 65534", "runs as user 0", "TOKIO_SHM_DIR"];
        assert_says(&dir.publisher("t").bind().unwrap_err(), &parts);
        assert_says(&dir.subscriber("t").connect().unwrap_err(), &parts);
        assert_eq!(names_in(dir.path()), 0);
    }
}

#[test]
fn limit_inotify_instances_used_up_says_so() {
    let dir = Dir::new();
    let Some(mut peer) = Peer::start_as_another_user("role_uses_up_inotify", &dir) else { return };
    assert_eq!(peer.hear(), "done");
    peer.finish();
}

#[tokio::test]
async fn role_uses_up_inotify() {
    use rustix::fs::inotify::{CreateFlags, init};
    let Some(role) = Role::of("role_uses_up_inotify") else { return };
    let before = descriptors();
    let mut taken = Vec::new();
    let refused = loop {
        match init(CreateFlags::CLOEXEC) {
            Ok(instance) => taken.push(instance),
            Err(error) => break error,
        }
    };
    assert_eq!(refused, rustix::io::Errno::MFILE);
    // A publisher needs none.
    let publisher = role.publisher("t").bind().unwrap();
    for _ in 0..3 {
        let open = descriptors();
        let error = role.subscriber("t").connect().unwrap_err();
        assert_says(&error, &["fs.inotify.max_user_instances", "sysctl -w"]);
        assert_eq!(descriptors(), open);
    }
    drop(taken);
    let mut subscriber = role.subscriber("t").connect().unwrap();
    publisher.send([1]).await.unwrap();
    assert_eq!(*within("recv", subscriber.recv()).await.unwrap(), [1]);
    drop(subscriber);
    within("close", publisher.close()).await.unwrap();
    // The instance stays, with its bell.
    until("all is closed", || descriptors() <= before + 2).await;
    assert_eq!(names_in(&role.dir), 0);
    role.say("done");
}
