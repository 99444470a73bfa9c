//! What the log is told: what comes and goes, with names, and nothing of messages. Each test has a log of its own, in a process of its own.

mod support;

use std::cell::Cell;
use std::fmt::Write as _;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::time::Instant;

use rustix::net::{
    AddressFamily, SendFlags, SocketAddrUnix, SocketFlags, SocketType, connect, send, socket_with,
};
use tokio_shm::{RecvError, ShmPublisher, ShmSubscriber};

use support::{Dir, LIMIT, Peer, Role, until, within};

/// A log in memory, a line an event.
struct Log {
    lines: Mutex<Vec<String>>,
    /// Called for each event, with nothing of this log's held.
    layer: Option<fn(&str)>,
}

static LINES: Log = Log { lines: Mutex::new(Vec::new()), layer: None };
static PUBLISHING: Log = Log { lines: Mutex::new(Vec::new()), layer: Some(use_the_crate) };

impl Log {
    fn lines(&self) -> MutexGuard<'_, Vec<String>> {
        self.lines.lock().expect("no panic while logging")
    }

    /// Waits for a line with all of these words.
    async fn until_told(&self, words: &[&str]) {
        self.until_told_by(words, || ()).await;
    }

    /// The same, and calls `step` each time before it looks again.
    async fn until_told_by(&self, words: &[&str], mut step: impl FnMut()) {
        let is_told = || self.lines().iter().any(|line| words.iter().all(|word| line.contains(word)));
        let deadline = Instant::now() + LIMIT / 2;
        while !is_told() {
            assert!(Instant::now() < deadline, "{words:?} is not told, but {:#?}", self.lines());
            step();
            tokio::task::yield_now().await;
        }
    }
}

impl tracing::Subscriber for &'static Log {
    fn enabled(&self, metadata: &tracing::Metadata<'_>) -> bool {
        metadata.target().starts_with("tokio_shm")
    }

    fn new_span(&self, _: &tracing::span::Attributes<'_>) -> tracing::span::Id {
        tracing::span::Id::from_u64(1)
    }

    fn record(&self, _: &tracing::span::Id, _: &tracing::span::Record<'_>) {}

    fn record_follows_from(&self, _: &tracing::span::Id, _: &tracing::span::Id) {}

    fn event(&self, event: &tracing::Event<'_>) {
        let mut line = event.metadata().level().to_string();
        event.record(&mut |field: &tracing::field::Field, value: &dyn std::fmt::Debug| {
            write!(line, " {field}={value:?}").expect("a string takes it");
        });
        if let Some(layer) = self.layer {
            layer(&line);
        }
        self.lines().push(line);
    }

    fn enter(&self, _: &tracing::span::Id) {}

    fn exit(&self, _: &tracing::span::Id) {}
}

#[test]
fn what_comes_and_goes_is_told_on_both_sides_and_messages_are_not() {
    let dir = Dir::new();
    Peer::start("role_both_sides", &dir).finish();
    dir.assert_empties();
}

#[tokio::test]
async fn role_both_sides() {
    let Some(role) = Role::of("role_both_sides") else { return };
    tracing::subscriber::set_global_default(&LINES).unwrap();
    let us = format!("process={} (", std::process::id());
    let dir = format!("dir={}", role.dir.display());
    let publisher = role.publisher("t").bind().unwrap();
    let id = format!("publisher={:032x}", publisher.id());
    LINES.until_told(&["DEBUG", "topic=\"t\"", &id, &dir, "bound"]).await;
    let mut subscriber = role.subscriber("t").connect().unwrap();
    LINES.until_told(&["DEBUG", "topic=\"t\"", &dir, "connected"]).await;
    LINES.until_told(&["DEBUG", &id, &us, "link to a publisher is up"]).await;
    LINES.until_told(&["DEBUG", &id, &us, "link to a subscriber is up"]).await;
    // Once all is still, messages are all there is.
    within("send", publisher.send([0])).await.unwrap();
    assert_eq!(*within("recv", subscriber.recv()).await.unwrap(), [0]);
    let before = LINES.lines().len();
    for n in 0..1_000_u32 {
        within("send", publisher.send(n.to_ne_bytes())).await.unwrap();
        assert_eq!(*within("recv", subscriber.recv()).await.unwrap(), n.to_ne_bytes());
    }
    assert_eq!(LINES.lines()[before..], [""; 0]);
    drop(subscriber);
    LINES.until_told(&["DEBUG", &id, &us, "link to a subscriber is down", "it left"]).await;
    let mut subscriber = role.subscriber("t").end_with_last_publisher(true).connect().unwrap();
    within("another", publisher.wait_for_subscribers(1)).await;
    within("close", publisher.close()).await.unwrap();
    assert!(matches!(within("end", subscriber.recv()).await, Err(RecvError::Closed)));
    LINES.until_told(&["DEBUG", &id, "link to a publisher is down", "it has closed"]).await;
    LINES.until_told(&["DEBUG", &id, "the publisher has ended"]).await;
}

#[test]
fn topic_without_a_publisher_is_told_with_what_is_watched_and_names_like_it() {
    let dir = Dir::new();
    Peer::start("role_mistypes", &dir).finish();
    dir.assert_empties();
}

#[tokio::test]
async fn role_mistypes() {
    let Some(role) = Role::of("role_mistypes") else { return };
    tracing::subscriber::set_global_default(&LINES).unwrap();
    let publisher = role.publisher("camera/front").bind().unwrap();
    let _subscriber = role.subscriber("camera/fornt").connect().unwrap();
    let watched = format!("watched={}/camera", role.dir.display());
    let topic = "topic=\"camera/fornt\"";
    LINES.until_told(&["DEBUG", topic, &watched, "no publisher of the topic is there"]).await;
    LINES.until_told(&["DEBUG", topic, "other=\"camera/front\"", "a similar name"]).await;
    within("close", publisher.close()).await.unwrap();
}

/// As a service that has no `XDG_RUNTIME_DIR` and a program of a session that does, or the other way round: each is told its own
/// directory, the one with it that there is another, and with `TOKIO_SHM_DIR` alike they meet.
#[test]
fn directories_that_differ_by_the_environment_are_told_and_can_be_set_alike() {
    for publisher_has_it in [false, true] {
        let (session, temporary) = (Dir::new(), Dir::new());
        let word = |name: &str, dir: &Dir| format!("{name}={}", dir.path().display());
        let (xdg, tmp) = (word("XDG_RUNTIME_DIR", &session), word("TMPDIR", &temporary));
        let with = ["env", "-u", "TOKIO_SHM_DIR", &xdg, &tmp];
        let without = ["env", "-u", "TOKIO_SHM_DIR", "-u", "XDG_RUNTIME_DIR", &tmp];
        let (ours, theirs) =
            if publisher_has_it { (&with[..], &without[..]) } else { (&without[..], &with[..]) };
        let mut publisher = Peer::start_under(ours, "role_publisher_somewhere", &session);
        assert_eq!(publisher.hear(), "bound");
        let mut subscriber = Peer::start_under(theirs, "role_subscriber_somewhere", &session);
        let usual = temporary.path().join(format!("tokio-shm-{}", rustix::process::geteuid().as_raw()));
        let of_session = session.path().join("tokio-shm");
        let (at, there) = if publisher_has_it { (&of_session, &usual) } else { (&usual, &of_session) };
        assert_eq!(publisher.ask("where"), at.display().to_string());
        assert_eq!(subscriber.ask("where"), there.display().to_string());
        let other = if publisher_has_it { String::new() } else { usual.display().to_string() };
        assert_eq!(subscriber.ask("other"), other);
        assert_eq!(subscriber.ask("receive"), "nothing");
        publisher.finish();
        subscriber.finish();
        // What the README says to do.
        let common = word("TOKIO_SHM_DIR", &session);
        let (ours, theirs) = (["env", &common, &tmp], ["env", &common, &xdg]);
        let mut publisher = Peer::start_under(&ours, "role_publisher_somewhere", &session);
        assert_eq!(publisher.hear(), "bound");
        let mut subscriber = Peer::start_under(&theirs, "role_subscriber_somewhere", &session);
        assert_eq!(subscriber.ask("where"), session.path().display().to_string());
        assert_eq!(subscriber.ask("receive"), "a message");
        subscriber.finish();
        publisher.finish();
    }
}

/// What stands in the log behind `field`, of the runtime directory.
fn told_of_the_directory(field: &str) -> String {
    let lines = LINES.lines();
    let told = lines.iter().filter(|line| line.contains("runtime directory"));
    let mut values = told.filter_map(|line| line.split_once(&format!(" {field}="))?.1.split(' ').next());
    values.next_back().unwrap_or_default().to_owned()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn role_publisher_somewhere() {
    let Some(role) = Role::of("role_publisher_somewhere") else { return };
    tracing::subscriber::set_global_default(&LINES).unwrap();
    let publisher = ShmPublisher::builder("t").history(1).bind().unwrap();
    publisher.send([1]).await.unwrap();
    role.say("bound");
    while role.hear().is_some() {
        role.say(&told_of_the_directory("path"));
    }
    within("close", publisher.close()).await.unwrap();
}

#[test]
fn role_subscriber_somewhere() {
    let Some(role) = Role::of("role_subscriber_somewhere") else { return };
    tracing::subscriber::set_global_default(&LINES).unwrap();
    let mut subscriber = ShmSubscriber::connect("t").unwrap();
    while let Some(word) = role.hear() {
        match word.as_str() {
            "where" => role.say(&told_of_the_directory("path")),
            "other" => role.say(&told_of_the_directory("other")),
            _ => match subscriber.blocking_recv_timeout(std::time::Duration::from_secs(1)) {
                Ok(_) => role.say("a message"),
                Err(RecvError::TimedOut) => role.say("nothing"),
                Err(error) => panic!("{error}"),
            },
        }
    }
}

thread_local! {
    static IN_LAYER: Cell<bool> = const { Cell::new(false) };
}

/// The publisher that the layer publishes by: the one that the events are about.
static PUBLISHER: Mutex<Option<(ShmPublisher, std::path::PathBuf)>> = Mutex::new(None);

/// Does what would wait for ever, or be left undone, were this called with anything of the publisher's held.
fn use_the_crate(line: &str) {
    // Not of all that comes of what this does itself, or there would be no end.
    static OF_LINKS: AtomicUsize = AtomicUsize::new(0);
    let of_link =
        ["link to a ", "a subscriber is gone", "more happened"].iter().any(|words| line.contains(words));
    if of_link && OF_LINKS.fetch_add(1, Ordering::Relaxed) > 4 {
        return;
    }
    if IN_LAYER.replace(true) {
        return;
    }
    if let Some((publisher, dir)) = &*PUBLISHER.lock().expect("no panic while logging")
        && !publisher.is_closed()
    {
        // Has itself accepted on the spot; and has room until it is known to have gone.
        let subscriber = ShmSubscriber::builder("t").runtime_dir(dir).depth(1_024).connect().unwrap();
        // There is one thread: where this is queued and not delivered, an event was told by the one who delivers.
        let sent = publisher.try_send(line.as_bytes());
        let flushed = tokio_test::task::spawn(publisher.flush()).poll();
        let delivered = sent.is_ok() && flushed.is_ready();
        drop(subscriber);
        if !delivered {
            PUBLISHING.lines().push(format!("UNDELIVERED: {line}"));
        }
    }
    IN_LAYER.set(false);
}

#[tokio::test]
async fn log_layer_that_publishes_by_the_same_publisher_delivers_and_locks_nothing_up() {
    let dir = Dir::new();
    let peer = Peer::start("role_publishing_layer", &dir);
    within("the role", tokio::task::spawn_blocking(move || peer.finish())).await.unwrap();
    dir.assert_empties();
}

#[tokio::test]
async fn role_publishing_layer() {
    let Some(role) = Role::of("role_publishing_layer") else { return };
    tracing::subscriber::set_global_default(&PUBLISHING).unwrap();
    let evict_after = std::time::Duration::from_millis(20);
    let publisher = role.publisher("t").queue(256).evict_after(evict_after).bind().unwrap();
    *PUBLISHER.lock().unwrap() = Some((publisher.clone(), role.dir.clone()));
    // One that connects and leaves.
    let subscriber = role.subscriber("t").connect().unwrap();
    within("a subscriber", publisher.wait_for_subscribers(1)).await;
    drop(subscriber);
    PUBLISHING.until_told(&["link to a subscriber is down"]).await;
    // One that says what it may not, before it is accepted and after, and more that say nothing than there may be.
    let path = role.dir.join(format!("t/.pub-{:032x}", publisher.id()));
    let stranger = || {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
        connect(&socket, &SocketAddrUnix::new(&path).unwrap()).unwrap();
        socket
    };
    let wrong = stranger();
    send(&wrong, b"wrong", SendFlags::empty()).unwrap();
    PUBLISHING.until_told(&["refused a connection", &format!("process={} (", std::process::id())]).await;
    let silent: Vec<_> = (0..129).map(|_| stranger()).collect();
    PUBLISHING.until_told(&["turned away"]).await;
    send(&silent[128], b"wrong", SendFlags::empty()).unwrap();
    PUBLISHING.until_told(&["ended before it was a link", "not a frame"]).await;
    drop((wrong, silent));
    // All are told before senders are kept waiting, and this layer with them.
    let ended =
        || PUBLISHING.lines().iter().filter(|line| line.contains("ended before it was a link")).count();
    until("129 connections end", || ended() == 129).await;
    // One that keeps senders waiting.
    let mut stuck = role.subscriber("t").depth(1).connect().unwrap();
    within("send", publisher.send([1])).await.unwrap();
    within("send", publisher.send([2])).await.unwrap();
    within("flush", publisher.flush()).await.unwrap();
    PUBLISHING.until_told(&["WARN", "stuck", &format!("process={} (", std::process::id())]).await;
    while !matches!(within("recv", stuck.recv()).await, Err(RecvError::Evicted { .. })) {}
    *PUBLISHER.lock().unwrap() = None;
    within("close", publisher.close()).await.unwrap();
    drop(stuck);
    let undelivered: Vec<_> =
        PUBLISHING.lines().iter().filter(|line| line.starts_with("UNDELIVERED")).cloned().collect();
    assert_eq!(undelivered, [""; 0]);
}
