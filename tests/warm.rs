//! What a message costs once both sides are warm and awake: no allocation and no system call, on either side.
//!
//! Two processes throw batches back and forth, each of them publisher and subscriber at once, and neither ever sleeps
//! (`BusyPoll::Always`). Allocations are counted by the allocator, system calls by strace.
//!
//! Two calls remain that are not for messages: tokio looks at its driver once in so many polls and when a task has used up
//! its budget, and a publisher that has paused looks for new subscribers once in so much time. Both are counted and held
//! against that.
#![allow(unsafe_code)] // a global allocator is unsafe to implement
#![allow(clippy::print_stderr)] // says what is left out where strace cannot be used

mod support;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::future::poll_fn;
use std::pin::pin;
use std::process::Command;
use std::time::{Duration, Instant};

use futures::SinkExt;
use support::{Dir, Peer, Role, within};
use tokio_shm::{BusyPoll, OnFull, ShmLoan, ShmPublisher, ShmSample, ShmSubscriber};

/// Messages sent before one side waits for the other. More than one, so that two processes on one core need not be
/// switched for every message; no more than the default depth, so that nobody is ever full.
const BATCH: usize = 32;
const WARM_UP: usize = 100 * BATCH;
const MESSAGES: usize = 1_000 * BATCH;
const LEN: usize = 64;

/// So many messages a task may send and receive before tokio has it give way to others.
const BUDGET: u64 = 128;

/// After a pause a publisher looks for new subscribers, but not more often than this.
const ACCEPT_INTERVAL: Duration = Duration::from_millis(5);
/// A publisher that sends fast looks whether it still does, and not more often than this.
const RUSH_INTERVAL: Duration = Duration::from_millis(1);

/// The system's allocator, counting for each thread: a role has one, and beside it the test harness goes about its own.
struct Counting;

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

fn count_allocation() {
    ALLOCATIONS.set(ALLOCATIONS.get() + 1);
}

// SAFETY: the system's allocator does it all.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count_allocation();
        // SAFETY: the caller keeps to the same contract.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count_allocation();
        // SAFETY: the caller keeps to the same contract.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        count_allocation();
        // SAFETY: the caller keeps to the same contract.
        unsafe { System.realloc(ptr, layout, new_size) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: the caller keeps to the same contract.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Begin and end of what is measured, for whoever reads a trace of system calls.
const BEGIN: &str = "begin";
const END: &str = "end";

#[test]
fn warm_message_allocates_nothing_on_either_side() {
    let dir = Dir::new();
    let mut pong = Peer::start("role_pong", &dir);
    let mut ping = Peer::start("role_ping", &dir);
    for (name, peer) in [("ping", &mut ping), ("pong", &mut pong)] {
        let figures = Figures::hear(peer);
        assert_eq!(figures.allocations, 0, "{name}, while it sent and received {MESSAGES} messages each");
    }
    ping.finish();
    pong.finish();
}

#[test]
fn warm_message_makes_no_system_call_at_the_first_side() {
    if let Some(strace) = Strace::new() {
        let dir = Dir::new();
        let mut ping = Peer::start_under(&strace.command(), "role_ping", &dir);
        let mut pong = Peer::start("role_pong", &dir);
        let figures = Figures::hear(&mut ping);
        Figures::hear(&mut pong);
        ping.finish();
        pong.finish();
        strace.assert_only_what_is_not_for_messages(&figures);
    }
}

#[test]
fn warm_message_makes_no_system_call_at_the_other_side() {
    if let Some(strace) = Strace::new() {
        let dir = Dir::new();
        let mut pong = Peer::start_under(&strace.command(), "role_pong", &dir);
        let mut ping = Peer::start("role_ping", &dir);
        let figures = Figures::hear(&mut pong);
        Figures::hear(&mut ping);
        ping.finish();
        pong.finish();
        strace.assert_only_what_is_not_for_messages(&figures);
    }
}

#[test]
fn warm_publisher_that_never_waits_makes_no_system_call() {
    talks_for_nothing("role_talker");
}

#[test]
fn warm_sink_that_never_waits_makes_no_system_call() {
    talks_for_nothing("role_feeder");
}

fn talks_for_nothing(role: &str) {
    if let Some(strace) = Strace::new() {
        let dir = Dir::new();
        let subscriber = Peer::start("role_listener", &dir);
        let mut publisher = Peer::start_under(&strace.command(), role, &dir);
        let figures = Figures::hear(&mut publisher);
        publisher.finish();
        subscriber.finish();
        assert_eq!(figures.allocations, 0);
        assert!(figures.polls <= MESSAGES as u64 / BUDGET + 1, "it waited: {} polls", figures.polls);
        strace.assert_only_what_is_not_for_messages(&figures);
    }
}

#[test]
fn role_ping() {
    if let Some(role) = Role::of("role_ping") {
        play(&role, "ping", "pong", true);
    }
}

#[test]
fn role_pong() {
    if let Some(role) = Role::of("role_pong") {
        play(&role, "pong", "ping", false);
    }
}

/// Sends into the void of a subscriber that reads what it can, and drops the rest.
#[test]
fn role_talker() {
    let Some(role) = Role::of("role_talker") else { return };
    run(async move {
        let publisher = role.publisher("t").on_full(OnFull::DropOldest).bind().unwrap();
        prewarm(&publisher);
        within("subscriber", publisher.wait_for_subscribers(1)).await;
        send(&publisher, WARM_UP).await;
        let figures = measure(&role, async { send(&publisher, MESSAGES).await }).await;
        figures.say(&role);
        within("close", publisher.close()).await.unwrap();
    });
}

/// The same as a sink.
#[test]
fn role_feeder() {
    let Some(role) = Role::of("role_feeder") else { return };
    run(async move {
        let mut publisher = role.publisher("t").on_full(OnFull::DropOldest).bind().unwrap();
        prewarm(&publisher);
        within("subscriber", publisher.wait_for_subscribers(1)).await;
        feed(&mut publisher, WARM_UP).await;
        let figures = measure(&role, async { feed(&mut publisher, MESSAGES).await }).await;
        figures.say(&role);
        within("close", publisher.close()).await.unwrap();
    });
}

#[test]
fn role_listener() {
    let Some(role) = Role::of("role_listener") else { return };
    run(async move {
        let subscriber = role.subscriber("t").busy_poll(BusyPoll::Always).end_with_last_publisher(true);
        let mut subscriber = subscriber.connect().unwrap();
        while let Ok(_) | Err(tokio_shm::RecvError::Lagged { .. }) = within("recv", subscriber.recv()).await {
        }
    });
}

/// One side: sends batches to one topic, each after, or before, a batch that it receives from the other.
fn play(role: &Role, to: &str, from: &str, begins: bool) {
    let publisher = |topic: &str| role.publisher(topic);
    let subscriber = |topic: &str| role.subscriber(topic).busy_poll(BusyPoll::Always);
    let (to, from) = (publisher(to), subscriber(from));
    let role = Role { dir: role.dir.clone() };
    run(async move {
        let publisher = to.bind().unwrap();
        prewarm(&publisher);
        let mut subscriber = from.connect().unwrap();
        within("the other side", async {
            publisher.wait_for_subscribers(1).await;
            subscriber.wait_for_publishers(1).await.unwrap();
        })
        .await;
        // tokio allocates its list of tasks that yielded when the first one does: when it has used up its budget.
        tokio::task::yield_now().await;
        // One timer for both: to set one is a call.
        let figures = within("messages", async {
            rally(&publisher, &mut subscriber, WARM_UP, begins).await;
            measure(&role, rally(&publisher, &mut subscriber, MESSAGES, begins)).await
        });
        figures.await.say(&role);
        // Not before the other side has measured, too: to see one go is more work than a message.
        role.hear();
    });
}

async fn rally(publisher: &ShmPublisher, subscriber: &mut ShmSubscriber, messages: usize, begins: bool) {
    for _ in 0..messages / BATCH {
        if begins {
            send(publisher, BATCH).await;
        }
        for _ in 0..BATCH {
            let sample: ShmSample = subscriber.recv().await.unwrap();
            assert_eq!(*sample, [7; LEN]);
        }
        if !begins {
            send(publisher, BATCH).await;
        }
    }
}

async fn send(publisher: &ShmPublisher, messages: usize) {
    for _ in 0..messages {
        let mut loan = publisher.loan(LEN).await.unwrap();
        loan.fill(7);
        publisher.send(loan).await.unwrap();
    }
}

async fn feed(publisher: &mut ShmPublisher, messages: usize) {
    for _ in 0..messages / BATCH {
        for _ in 0..BATCH {
            let mut loan = publisher.loan(LEN).await.unwrap();
            loan.fill(7);
            publisher.feed(loan).await.unwrap();
        }
        SinkExt::<ShmLoan>::flush(publisher).await.unwrap();
    }
}

/// Makes the segment here: `loan` would have another thread make it, whose wake-ups may be seen late.
fn prewarm(publisher: &ShmPublisher) {
    publisher.pool().prewarm(LEN, 1).unwrap();
}

/// As a task: what `block_on` is given is polled by other rules, and tokio looks at its driver each time.
fn run(role: impl Future<Output = ()> + Send + 'static) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async { tokio::spawn(role).await.unwrap() });
}

/// What one side has to tell about its measured messages.
struct Figures {
    allocations: u64,
    polls: u64,
    time: Duration,
}

impl Figures {
    fn say(&self, role: &Role) {
        role.say(&format!("{} {} {}", self.allocations, self.polls, self.time.as_micros()));
    }

    fn hear(peer: &mut Peer) -> Self {
        assert_eq!(peer.hear(), BEGIN);
        assert_eq!(peer.hear(), END);
        let said = peer.hear();
        let mut words = said.split(' ').map(|word| word.parse().expect("a number"));
        let mut next = || words.next().expect("three numbers");
        Self { allocations: next(), polls: next(), time: Duration::from_micros(next()) }
    }
}

async fn measure(role: &Role, future: impl Future<Output = ()>) -> Figures {
    let mut future = pin!(future);
    let mut polls = 0;
    role.say(BEGIN);
    let (before, start) = (ALLOCATIONS.get(), Instant::now());
    poll_fn(|cx| {
        polls += 1;
        future.as_mut().poll(cx)
    })
    .await;
    let (allocations, time) = (ALLOCATIONS.get() - before, start.elapsed());
    role.say(END);
    Figures { allocations, polls, time }
}

/// A run of strace, and where it writes to.
struct Strace(tempfile::NamedTempFile);

impl Strace {
    /// `None`, and a word about it, where it is not installed or may not trace.
    fn new() -> Option<Self> {
        let log = tempfile::NamedTempFile::new().expect("temporary file");
        let strace = Self(log);
        let tried = Command::new("strace").args(&strace.command()[1..]).arg("true").output();
        match tried {
            Ok(output) if output.status.success() => Some(strace),
            Ok(output) => {
                eprintln!("SKIPPED, strace cannot trace: {}", String::from_utf8_lossy(&output.stderr).trim());
                None
            }
            Err(error) => {
                eprintln!("SKIPPED, strace cannot be run: {error}");
                None
            }
        }
    }

    fn command(&self) -> [&str; 6] {
        // `-a 1`: no padding before a call's result.
        ["strace", "-f", "-a", "1", "-o", self.0.path().to_str().expect("a path of ASCII")]
    }

    /// The calls between the two marks, of the thread that made the marks.
    fn calls(&self) -> Vec<String> {
        let log = std::fs::read_to_string(self.0.path()).expect("strace's log");
        let lines: Vec<_> = log.lines().filter_map(|line| line.split_once(' ')).collect();
        let mark = |mark: &str| {
            let written = format!("write(1, \"> {mark}\\n\"");
            lines.iter().position(|(_, call)| call.trim_start().starts_with(&written)).expect("the mark")
        };
        let (begin, end) = (mark(BEGIN), mark(END));
        let (thread, _) = lines[begin];
        let mut calls = Vec::<String>::new();
        for (_, call) in lines[begin + 1..end].iter().filter(|(of, _)| *of == thread) {
            let call = call.trim_start();
            // A call during which another thread made one is written in two parts.
            match (call.strip_prefix("<... "), calls.last_mut()) {
                (Some(resumed), Some(begun)) => {
                    begun.push_str(resumed.split_once(" resumed>").expect("a rest").1)
                }
                // The end of the mark.
                (Some(_), None) => {}
                (None, _) => calls.push(call.trim_end_matches(" <unfinished ...>").to_owned()),
            }
        }
        calls
    }

    /// Asserts that there was nothing but tokio's looks at its driver, which come from polls, and looks for new
    /// subscribers and for the end of a rush, which come from time. (How many there are of each depends on how long the other
    /// side takes, which waits for a side that strace makes slow.)
    fn assert_only_what_is_not_for_messages(&self, figures: &Figures) {
        let calls = self.calls();
        let (driver, calls): (Vec<_>, Vec<_>) = calls.into_iter().partition(|call| is_look_at_driver(call));
        // That the segment's announcement had come by the socket is seen when a message names it; tokio's word of it may
        // come later. So one look there may be left over from warming up.
        let (socket, calls): (Vec<_>, Vec<_>) = calls.into_iter().partition(|call| is_look_at_socket(call));
        assert!(socket.len() <= 1, "for {MESSAGES} messages: {socket:#?}");
        let (accept, calls): (Vec<_>, Vec<_>) =
            calls.into_iter().partition(|call| is_look_for_subscribers(call));
        let (rush, calls): (Vec<_>, Vec<_>) = calls.into_iter().partition(|call| is_timer_of_a_rush(call));
        assert!(calls.is_empty(), "for {MESSAGES} messages: {calls:#?}");
        // When it has looked in vain for a while or has used up its budget a task gives way, and when there is no other the driver
        // has its turn. A message that is there in time is none of these.
        let most = figures.polls + 2 * MESSAGES as u64 / BUDGET + 1;
        assert!(
            driver.len() as u64 <= most,
            "{} looks at the driver in {} polls",
            driver.len(),
            figures.polls
        );
        // Set, and found to have run out.
        let most = 2 * (figures.time.as_nanos() / RUSH_INTERVAL.as_nanos() + 1);
        assert!(rush.len() as u128 <= most, "{} calls for a timer in {:?}", rush.len(), figures.time);
        let most = figures.time.as_nanos() / ACCEPT_INTERVAL.as_nanos() + 1;
        assert!(accept.len() as u128 <= most, "{} looks for subscribers in {:?}", accept.len(), figures.time);
    }
}

/// `epoll_wait` that does not wait, and found nothing.
fn is_look_at_driver(call: &str) -> bool {
    (call.starts_with("epoll_wait(") && call.ends_with(", 0) = 0"))
        || (call.starts_with("epoll_pwait(") && call.contains(", 0, NULL, ") && call.ends_with(" = 0"))
}

/// `accept4` that found nobody.
fn is_look_for_subscribers(call: &str) -> bool {
    call.starts_with("accept4(") && call.contains(" = -1 EAGAIN ")
}

/// The timer of a publisher that is sending fast, by which the time of its last messages is noted when it stops.
fn is_timer_of_a_rush(call: &str) -> bool {
    call.starts_with("timerfd_settime(")
        || (call.starts_with("epoll_wait(") && call.contains("events=EPOLLIN,") && call.ends_with(", 0) = 1"))
}

/// `recvmsg` that found nothing.
fn is_look_at_socket(call: &str) -> bool {
    call.starts_with("recvmsg(") && call.contains(" = -1 EAGAIN ")
}
