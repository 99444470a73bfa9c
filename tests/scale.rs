//! A thousand topics between two processes: every subscriber finds its publisher, and gets each message once.
//!
//! Only what must hold at that size is tested here, the descriptors that it takes included; how long things take is for
//! `benches/scale.rs`.
#![allow(clippy::print_stdout)] // says how many descriptors there were

mod support;

use futures::StreamExt as _;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use support::{Dir, Peer, Role, skipped, within};
use tokio::task::JoinSet;

const TOPICS: usize = 1_000;
const MESSAGES: u64 = 10;

/// What a topic with one link may cost: of the publisher's descriptors, and of the subscriber's.
const PUBLISHER_FILES: usize = 8;
const SUBSCRIBER_FILES: usize = 7;
/// The process's own: standard streams, the runtime's, inotify's.
const OTHER_FILES: usize = 64;
/// A link under way may have more for an instant.
const FILES: u64 = (TOPICS * (PUBLISHER_FILES + 1) + OTHER_FILES) as u64;

/// Half of the subscribers are there before their publisher, and learn of it when it comes; the others find it there.
#[test]
fn scale_of_a_thousand_topics_delivers_every_message_once() {
    if getrlimit(Resource::Nofile).maximum.is_some_and(|files| files < FILES) {
        return skipped(&format!("RLIMIT_NOFILE cannot be raised to {FILES}"));
    }
    let dir = Dir::new();
    let mut subscribers = Peer::start("role_subscribes_to_all", &dir);
    assert_eq!(subscribers.hear(), "connected to half");
    let mut publishers = Peer::start("role_publishes_to_all", &dir);
    assert_eq!(publishers.hear(), "bound");
    subscribers.tell("connect to the rest");
    // Both count while all links stand.
    let files = |said: String| said.parse::<usize>().expect("a number of descriptors");
    let (publishing, subscribing) = (files(publishers.hear()), files(subscribers.hear()));
    println!("{TOPICS} topics: {publishing} descriptors of the publishers, {subscribing} of the subscribers");
    assert!(publishing <= TOPICS * PUBLISHER_FILES + OTHER_FILES);
    assert!(subscribing <= TOPICS * SUBSCRIBER_FILES + OTHER_FILES);
    publishers.tell("send");
    subscribers.finish();
    publishers.finish();
    dir.assert_empties();
}

#[test]
fn role_publishes_to_all() {
    let Some(role) = Role::of("role_publishes_to_all") else { return };
    raise_files();
    run(async move {
        let publishers: Vec<_> = (0..TOPICS).map(|n| role.publisher(&topic(n)).bind().unwrap()).collect();
        role.say("bound");
        for publisher in &publishers {
            within("subscriber", publisher.wait_for_subscribers(1)).await;
        }
        role.say(&open_files().to_string());
        assert_eq!(role.hear().unwrap(), "send");
        let mut sending = JoinSet::new();
        for (number, publisher) in publishers.into_iter().enumerate() {
            sending.spawn(async move {
                for message in 0..MESSAGES {
                    publisher.send(text(number, message)).await.unwrap();
                    tokio::task::yield_now().await;
                }
                publisher.close().await.unwrap();
            });
        }
        within("all sent", sending.join_all()).await;
    });
}

#[test]
fn role_subscribes_to_all() {
    let Some(role) = Role::of("role_subscribes_to_all") else { return };
    raise_files();
    run(async move {
        let connect = |n: usize| {
            let subscriber = role.subscriber(&topic(n)).end_with_last_publisher(true).connect().unwrap();
            (n, subscriber)
        };
        let mut subscribers: Vec<_> = (0..TOPICS).step_by(2).map(connect).collect();
        role.say("connected to half");
        assert_eq!(role.hear().unwrap(), "connect to the rest");
        subscribers.extend((1..TOPICS).step_by(2).map(connect));
        let mut waiting = JoinSet::new();
        for (n, mut subscriber) in subscribers {
            waiting.spawn(async move {
                subscriber.wait_for_publishers(1).await.unwrap();
                (n, subscriber)
            });
        }
        let subscribers = within("publishers", waiting.join_all()).await;
        role.say(&open_files().to_string());
        let mut receiving = JoinSet::new();
        for (n, mut subscriber) in subscribers {
            receiving.spawn(async move {
                for message in 0..MESSAGES {
                    let sample = subscriber.next().await.expect("a message").unwrap();
                    assert_eq!(*sample, *text(n, message));
                }
                assert!(subscriber.next().await.is_none(), "topic {n}: more than was sent");
            });
        }
        within("all received", receiving.join_all()).await;
    });
}

/// In directories of a hundred each, as a robot would name them.
fn topic(number: usize) -> String {
    format!("group{}/topic{}", number / 100, number % 100)
}

fn text(number: usize, message: u64) -> Vec<u8> {
    format!("message {message} of topic {number}").into_bytes()
}

fn raise_files() {
    let maximum = getrlimit(Resource::Nofile).maximum;
    setrlimit(Resource::Nofile, Rlimit { current: Some(FILES), maximum }).unwrap();
}

fn open_files() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

fn run(role: impl Future<Output = ()>) {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(role);
}
