//! What is no limit of resources and yet must not be: a child that outlives its parent, a clock that differs, a panic in
//! user code. Nobody is taken in, and nothing stays held.

mod support;

use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use support::{Dir, LIMIT, Peer, Role, is_allowed, spawn_bounded, until, within};
use tokio_shm::{OnFull, Payload, RecvError, ShmPoolConfig, ShmPublisher, ShmSubscriber};

const MIB: usize = 1 << 20;

/// Hands every descriptor of this process down to a child that outlives it, as `fork` alone would; returns its number.
#[allow(clippy::zombie_processes)] // It is to outlive us.
fn spawn_heir() -> u32 {
    for entry in std::fs::read_dir("/proc/self/fd").unwrap() {
        let number: i32 = entry.unwrap().file_name().to_str().unwrap().parse().unwrap();
        if number > 2 {
            let path = format!("/proc/{}/fd/{number}", std::process::id());
            if std::fs::symlink_metadata(&path).is_ok() {
                clear_close_on_exec(number);
            }
        }
    }
    let heir = Command::new("sleep").arg("1000").stdin(Stdio::null()).stdout(Stdio::null()).spawn().unwrap();
    heir.id()
}

fn clear_close_on_exec(number: i32) {
    use rustix::io::{FdFlags, fcntl_setfd};
    // SAFETY: nothing but a flag of the descriptor is changed, whoever owns it; that it may just have been closed is an error.
    let fd = unsafe { std::os::fd::BorrowedFd::borrow_raw(number) };
    let _ = fcntl_setfd(fd, FdFlags::empty());
}

/// Kills the heir at the test's end.
struct Heir(Pid);

impl Heir {
    fn of(peer: &mut Peer) -> Self {
        Self(Pid::from_raw(peer.hear().parse().unwrap()).unwrap())
    }

    fn holds_sockets(&self) -> bool {
        let fds = std::fs::read_dir(format!("/proc/{}/fd", self.0.as_raw_nonzero())).unwrap();
        let targets = fds.filter_map(|fd| std::fs::read_link(fd.unwrap().path()).ok());
        targets.filter(|target| target.to_str().is_some_and(|name| name.starts_with("socket:"))).count() > 0
    }
}

impl Drop for Heir {
    fn drop(&mut self) {
        let _ = kill_process(self.0, Signal::KILL);
    }
}

#[tokio::test]
async fn limit_fork_of_a_publisher_that_outlives_it_does_not_hide_its_death() {
    let dir = Dir::new();
    let mut waiting = dir.subscriber("t").connect().unwrap();
    let mut blocking = dir.subscriber("t").connect().unwrap();
    let mut peer = Peer::start("role_publisher_with_an_heir", &dir);
    let (first, second) = tokio::join!(waiting.recv(), blocking.recv());
    assert_eq!((&*first.unwrap(), &*second.unwrap()), (&[1][..], &[1][..]));
    let heir = Heir::of(&mut peer);
    let blocking = spawn_bounded("blocking", move || blocking.blocking_recv_timeout(LIMIT));
    let waiting = tokio::spawn(async move { waiting.recv().await });
    tokio::task::yield_now().await;
    peer.kill();
    assert!(heir.holds_sockets());
    let lost = within("recv", waiting).await.unwrap();
    assert!(matches!(lost, Err(RecvError::PublisherLost { .. })), "{lost:?}");
    let lost = tokio::task::spawn_blocking(blocking).await.unwrap();
    assert!(matches!(lost, Err(RecvError::PublisherLost { .. })), "{lost:?}");
    // Who comes now is not taken in by a socket that is still open.
    let mut late = dir.subscriber("t").end_with_last_publisher(true).connect().unwrap();
    let publisher = dir.publisher("t").history(1).bind().unwrap();
    publisher.send([2]).await.unwrap();
    assert_eq!(*within("recv", late.recv()).await.unwrap(), [2]);
    within("close", publisher.close()).await.unwrap();
    assert!(matches!(within("recv", late.recv()).await, Err(RecvError::Closed)));
    assert!(heir.holds_sockets());
    drop(late);
    dir.assert_empties();
}

#[tokio::test]
async fn role_publisher_with_an_heir() {
    let Some(role) = Role::of("role_publisher_with_an_heir") else { return };
    let publisher = role.publisher("t").bind().unwrap();
    within("subscribers", publisher.wait_for_subscribers(2)).await;
    publisher.send([1]).await.unwrap();
    role.say(&spawn_heir().to_string());
    tokio::task::spawn_blocking(move || role.hear()).await.unwrap();
}

#[tokio::test]
async fn limit_fork_of_a_subscriber_that_outlives_it_does_not_hide_its_death() {
    let dir = Dir::new();
    let publisher = dir.publisher("t").queue(1).bind().unwrap();
    let mut peer = Peer::start("role_subscriber_with_an_heir", &dir);
    within("a subscriber", publisher.wait_for_subscribers(1)).await;
    publisher.send([1]).await.unwrap();
    let heir = Heir::of(&mut peer);
    // Until there is no room: the next ones wait for a subscriber that will never read.
    while publisher.try_send([2]).is_ok() {}
    let mut sending = tokio_test::task::spawn(publisher.send([3]));
    tokio_test::assert_pending!(sending.poll());
    peer.kill();
    assert!(heir.holds_sockets());
    within("send", sending).await.unwrap();
    until("it is gone", || publisher.subscriber_count() == 0).await;
    within("flush", publisher.flush()).await.unwrap();
    assert_eq!(publisher.pool().stats().in_use(), 0);
    assert!(heir.holds_sockets());
    within("close", publisher.close()).await.unwrap();
    dir.assert_empties();
}

#[test]
fn role_subscriber_with_an_heir() {
    let Some(role) = Role::of("role_subscriber_with_an_heir") else { return };
    let mut subscriber = role.subscriber("t").depth(2).connect().unwrap();
    let _held = subscriber.blocking_recv_timeout(LIMIT).unwrap();
    role.say(&spawn_heir().to_string());
    role.hear();
}

/// The subscriber's clock ahead of the publisher's, and behind it, by more than a day.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn limit_clock_that_differs_makes_nobody_hang_nor_lose_unseen() {
    let ahead = ["unshare", "--time", "--monotonic", "100000", "--fork", "--kill-child"];
    let user: &[&str] = if rustix::process::geteuid().is_root() { &[] } else { &["--map-root-user"] };
    let ahead = [&ahead[..], user].concat();
    if !is_allowed(&ahead) {
        return;
    }
    // Ours is the publisher, and behind.
    let dir = Dir::new();
    let publisher = dir.publisher("t").evict_after(Duration::from_secs(60)).bind().unwrap();
    for _ in 0..50 {
        publisher.send([0; 8]).await.unwrap();
    }
    let mut peer = Peer::start_under(&ahead, "role_accounts_for_all", &dir);
    within("a subscriber", publisher.wait_for_subscribers(1)).await;
    stream(&publisher).await;
    assert_eq!(peer.hear(), "all accounted for");
    assert_eq!(publisher.subscriber_count(), 1, "evicted");
    peer.tell("leave");
    peer.finish();
    within("close", publisher.close()).await.unwrap();

    // Ours is the subscriber, and behind.
    let mut peer = Peer::start_under(&ahead, "role_streams", &dir);
    assert_eq!(peer.hear(), "bound");
    let subscriber = dir.subscriber("t").depth(4).connect().unwrap();
    let reading = spawn_bounded("reading", move || read_stream(subscriber));
    peer.tell("go");
    drop(tokio::task::spawn_blocking(reading).await.unwrap());
    assert_eq!(peer.hear(), "not evicted");
    peer.finish();
    dir.assert_empties();
}

/// A clock that is behind, by half of what ours has run, makes no subscriber count what was sent long before it connected.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn limit_clock_that_is_behind_counts_nothing_of_before_the_connection() {
    let uptime = std::fs::read_to_string("/proc/uptime").unwrap();
    let half = uptime.split('.').next().unwrap().parse::<u64>().unwrap() / 2;
    let offset = format!("-{half}");
    let user: &[&str] = if rustix::process::geteuid().is_root() { &[] } else { &["--map-root-user"] };
    let behind = [&["unshare", "--time", "--monotonic", &offset, "--fork", "--kill-child"], user].concat();
    if half < 60 || !is_allowed(&behind) {
        return;
    }
    let dir = Dir::new();
    let publisher = dir.publisher("t").bind().unwrap();
    for _ in 0..30 {
        publisher.send([0; 8]).await.unwrap();
        // A publisher that is not in a rush looks who is in line before it sends.
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let mut peer = Peer::start_under(&behind, "role_counts_what_it_missed", &dir);
    within("a subscriber", publisher.wait_for_subscribers(1)).await;
    publisher.send([1; 8]).await.unwrap();
    let missed: u64 = peer.hear().parse().unwrap();
    assert!(missed <= 3, "{missed}");
    peer.finish();
}

#[test]
fn role_counts_what_it_missed() {
    let Some(role) = Role::of("role_counts_what_it_missed") else { return };
    let mut subscriber = role.subscriber("t").connect().unwrap();
    let mut lagged = 0;
    loop {
        match subscriber.blocking_recv_timeout(LIMIT) {
            Ok(_) => return role.say(&lagged.to_string()),
            Err(RecvError::Lagged { missed, .. }) => lagged += missed,
            Err(error) => panic!("{error}"),
        }
    }
}

const STREAM: u64 = 2_000;

/// Sends the stream's numbers, counted from where the link stands.
async fn stream(publisher: &ShmPublisher) {
    for number in 1..=STREAM {
        within("send", publisher.send(number.to_le_bytes())).await.unwrap();
    }
}

/// Reads until the stream's last number, with pauses that fill the link; nothing of it may be missing.
fn read_stream(mut subscriber: ShmSubscriber) -> ShmSubscriber {
    let (mut received, mut lagged, mut next) = (0, 0, 1);
    loop {
        match subscriber.blocking_recv_timeout(LIMIT) {
            Ok(sample) => {
                received += 1;
                let number = u64::from_le_bytes((*sample).try_into().unwrap());
                assert!(number == 0 && next == 1 || number == next, "{number} where {next} was due");
                next = number + 1;
                // All that was sent before is received or counted; a clock that differs may make it more.
                assert!(received + lagged <= sample.seq() + 1, "{lagged} lost of {}", sample.seq());
                if number == STREAM {
                    return subscriber;
                }
                if number.is_multiple_of(500) {
                    std::thread::sleep(Duration::from_millis(50));
                }
            }
            Err(RecvError::Lagged { missed, .. }) if next == 1 => lagged += missed,
            Err(error) => panic!("{error}"),
        }
    }
}

#[test]
fn role_accounts_for_all() {
    let Some(role) = Role::of("role_accounts_for_all") else { return };
    let subscriber = read_stream(role.subscriber("t").depth(4).connect().unwrap());
    role.say("all accounted for");
    role.hear();
    drop(subscriber);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn role_streams() {
    let Some(role) = Role::of("role_streams") else { return };
    let publisher = role.publisher("t").evict_after(Duration::from_secs(60)).bind().unwrap();
    role.say("bound");
    assert_eq!(role.hear().unwrap(), "go");
    within("a subscriber", publisher.wait_for_subscribers(1)).await;
    stream(&publisher).await;
    until("it has left", || publisher.subscriber_count() == 0).await;
    role.say("not evicted");
    within("close", publisher.close()).await.unwrap();
}

/// Panics when it is asked for its bytes.
struct Panicking;

impl Payload for Panicking {
    type Returned = ();

    fn as_bytes(&self) -> &[u8] {
        panic!("in user code")
    }

    fn into_returned(self) {}
}

#[test]
fn limit_panic_while_a_loan_or_sample_is_held_gives_it_back() {
    let dir = Dir::new();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let pool = ShmPoolConfig::new().max_bytes(4 * MIB as u64);
    let publisher = dir.publisher("t").pool(pool).queue(1).runtime(runtime.handle().clone()).bind().unwrap();
    let mut subscriber = dir.subscriber("t").depth(1).connect().unwrap();
    runtime.block_on(publisher.wait_for_subscribers(1));
    for round in 0..20 {
        // A loan, in a task and in a thread; a payload that panics.
        let clone = publisher.clone();
        let task = async move {
            let _loan = clone.loan(MIB).await.unwrap();
            panic!("with a loan");
        };
        assert!(runtime.block_on(runtime.spawn(task)).unwrap_err().is_panic());
        let clone = publisher.clone();
        let task = async move { clone.send(Panicking).await.unwrap() };
        assert!(runtime.block_on(runtime.spawn(task)).unwrap_err().is_panic());
        let clone = publisher.clone();
        let thread = std::thread::spawn(move || clone.blocking_send(Panicking));
        assert!(thread.join().is_err());
        let clone = publisher.clone();
        let thread = std::thread::spawn(move || {
            let _loan = clone.blocking_loan(MIB).unwrap();
            panic!("with a loan");
        });
        assert!(thread.join().is_err());
        assert_eq!(publisher.pool().stats().in_use(), 0, "round {round}");
        assert!(!publisher.is_closed());

        // A sample: with a depth of one, nothing more comes before it is given back.
        publisher.blocking_send([round]).unwrap();
        let sample = subscriber.blocking_recv_timeout(LIMIT).unwrap();
        let thread = std::thread::spawn(move || {
            let _held = sample.clone();
            assert_eq!(*sample, [99]);
        });
        assert!(thread.join().is_err());
        publisher.blocking_send_timeout([round + 100], LIMIT).unwrap();
        assert_eq!(*subscriber.blocking_recv_timeout(LIMIT).unwrap(), [round + 100]);
    }
    // A subscriber that goes with a panicking task, while another goes on.
    let doomed = dir.subscriber("t").depth(1).on_full(OnFull::Wait).connect().unwrap();
    runtime.block_on(publisher.wait_for_subscribers(2));
    let task = async move {
        let mut doomed = doomed;
        let _held = doomed.recv().await.unwrap();
        panic!("with a subscriber and a sample");
    };
    let task = runtime.spawn(task);
    for number in 0..50 {
        publisher.blocking_send_timeout([number], LIMIT).unwrap();
        assert_eq!(*subscriber.blocking_recv_timeout(LIMIT).unwrap(), [number]);
    }
    assert!(runtime.block_on(task).unwrap_err().is_panic());
    drop(subscriber);
    runtime.block_on(until("all is back", || publisher.pool().stats().in_use() == 0));
    drop(publisher);
    dir.assert_empties();
}
