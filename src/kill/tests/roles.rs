//! What a victim does until it is killed; and the witness, who is not.
//!
//! Everything it says on its standard output begins with `> `.

use std::collections::VecDeque;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use super::{MIB, POOL, SIZES, check, message, policy_of, publisher_in, subscriber_in};
use crate::kill::{armed, detour};
use crate::sys::clock::monotonic_ns;
use crate::sys::testing::{is_alone, set_limit};
use crate::{OnFull, RecvError, ShmPoolConfig, ShmPublisher, ShmSample, ShmSubscriber, TryRecvError};

/// A victim's depth: little, so that it is soon full.
pub(super) const DEPTH: u32 = 4;
/// A witness's depth: a slow one must not have as many messages of the middle sizes as the pool has room for, because
/// what is given up for memory's sake may be another's.
pub(super) const WITNESS_DEPTH: u32 = 64;
/// A victim's tx queue.
pub(super) const QUEUE: u32 = 2;

/// Subscribers of one victim that are there with many others, or in line.
pub(super) const CROWD: usize = 100;
pub(super) const LINE: usize = 20;
/// Descriptors for a crowd, and for all of them.
pub(super) const FILES: u64 = 8_192;

/// The parent has asked something.
static TOLD: AtomicBool = AtomicBool::new(false);
static SEEN: AtomicU64 = AtomicU64::new(0);
static LAGGED: AtomicU64 = AtomicU64::new(0);

#[test]
#[ignore = "a child of the kill matrix"]
fn child_role() {
    if !is_alone() {
        return;
    }
    let mut orders = String::new();
    std::io::stdin().read_line(&mut orders).unwrap();
    let orders: Vec<&str> = orders.trim_end().split('\t').collect();
    let [role, script, on_full, point, passage, dir] = orders[..] else { return };
    std::thread::spawn(answer);
    if !point.is_empty() {
        armed::arm(point, passage.parse().unwrap());
    }
    let dir = Path::new(dir);
    match role {
        "publisher" if matches!(script, "attends" | "naps") => asleep(script, policy_of(on_full), dir),
        "publisher" => publisher(script, policy_of(on_full), dir),
        "subscriber" => subscriber(script, dir),
        "witness" => witness(dir),
        other => panic!("{other}"),
    }
}

/// Tells the parent what it asks for, and does not outlive it.
fn answer() {
    let mut line = String::new();
    while std::io::stdin().read_line(&mut line).is_ok_and(|read| read > 0) {
        TOLD.store(true, Ordering::SeqCst);
        say(&format!("seen {} {}", SEEN.load(Ordering::SeqCst), LAGGED.load(Ordering::SeqCst)));
        line.clear();
    }
    std::process::exit(1);
}

#[allow(clippy::print_stdout)] // It is how a child speaks to its parent.
fn say(line: &str) {
    println!("> {line}");
}

fn until_killed() -> ! {
    loop {
        std::thread::park();
    }
}

fn checked(sample: ShmSample) -> ShmSample {
    check(&sample, sample.seq()).unwrap();
    sample
}

fn connect(dir: &Path, depth: u32) -> ShmSubscriber {
    let mut subscriber = subscriber_in(dir).depth(depth).connect().unwrap();
    while subscriber.publisher_count() == 0 {
        // It may well be a message already.
        let _ = subscriber.blocking_recv_timeout(Duration::from_millis(1));
    }
    subscriber
}

/// The next message, after whatever was dropped.
fn receive(subscriber: &mut ShmSubscriber) -> ShmSample {
    loop {
        match subscriber.blocking_recv() {
            Ok(sample) => return checked(sample),
            Err(RecvError::Lagged { .. }) => {}
            Err(error) => panic!("{error}"),
        }
    }
}

fn subscriber(script: &str, dir: &Path) {
    if script == "leaves" {
        loop {
            let mut subscriber = connect(dir, DEPTH);
            let held = receive(&mut subscriber);
            // For others to be in the queue when it goes.
            std::thread::sleep(Duration::from_millis(1));
            drop(subscriber);
            drop(held);
        }
    }
    match script {
        "greets" => {
            detour("connect: connected", || {
                say("connected");
                while !TOLD.load(Ordering::SeqCst) {
                    std::thread::yield_now();
                }
            });
            let _subscriber = subscriber_in(dir).depth(DEPTH).connect().unwrap();
            say("greeted");
            until_killed()
        }
        "line" => {
            let _line = many(dir, LINE);
            say("ready");
            until_killed()
        }
        "crowd" => {
            set_limit(rustix::process::Resource::Nofile, FILES);
            let mut crowd = many(dir, CROWD);
            say("ready");
            let mut held: Vec<_> = crowd.iter().map(|_| None).collect();
            loop {
                for (subscriber, held) in crowd.iter_mut().zip(&mut held) {
                    match subscriber.try_recv() {
                        Ok(sample) => *held = Some(checked(sample)),
                        Err(TryRecvError::Empty | TryRecvError::Recv(RecvError::Lagged { .. })) => {}
                        Err(error) => panic!("{error}"),
                    }
                }
            }
        }
        _ => {}
    }
    let depth = if script == "starves" { 2 * DEPTH } else { DEPTH };
    let mut subscriber = connect(dir, depth);
    say("ready");
    let mut held = VecDeque::new();
    match script {
        "sits" => until_killed(),
        "holds" | "starves" => {
            held.extend((0..DEPTH).map(|_| receive(&mut subscriber)));
            say("holding");
            until_killed()
        }
        "reads" => loop {
            held.push_back(receive(&mut subscriber));
            if held.len() > 2 {
                held.pop_front();
            }
        },
        "awaits" => {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build().unwrap();
            runtime.block_on(async {
                loop {
                    match subscriber.recv().await {
                        Ok(sample) => drop(checked(sample)),
                        Err(RecvError::Lagged { .. }) => {}
                        Err(error) => panic!("{error}"),
                    }
                }
            })
        }
        other => panic!("{other}"),
    }
}

/// Subscribers that have connected, served or not.
fn many(dir: &Path, count: usize) -> Vec<ShmSubscriber> {
    (0..count).map(|_| subscriber_in(dir).depth(DEPTH).connect().unwrap()).collect()
}

/// Receives everything, in order, and answers when it is asked how much that was.
fn witness(dir: &Path) {
    let mut subscriber = subscriber_in(dir).depth(WITNESS_DEPTH).connect().unwrap();
    loop {
        match subscriber.blocking_recv() {
            Ok(sample) => {
                assert_eq!(sample.seq(), SEEN.load(Ordering::SeqCst));
                drop(checked(sample));
                SEEN.fetch_add(1, Ordering::SeqCst);
            }
            Err(RecvError::Lagged { missed, .. }) => {
                LAGGED.fetch_add(missed, Ordering::SeqCst);
                SEEN.fetch_add(missed, Ordering::SeqCst);
            }
            Err(error) => panic!("{error}"),
        }
    }
}

fn publisher(script: &str, on_full: OnFull, dir: &Path) {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    runtime.block_on(async {
        loop {
            let pool = ShmPoolConfig::new().max_bytes(POOL);
            // A link may have all of the pool, so that a loan waits for what its subscriber holds.
            let builder = publisher_in(dir).pool(pool).link_bytes(POOL);
            let publisher = builder.on_full(on_full).queue(QUEUE).bind().unwrap();
            tell("bound", &publisher);
            publisher.wait_for_subscribers(2).await;
            tell("ready", &publisher);
            match script {
                "idles" => std::future::pending().await,
                "loans" => {
                    let mut loans = Vec::new();
                    for len in [SIZES[0], SIZES[1], MIB] {
                        loans.push(publisher.loan(len).await.unwrap());
                    }
                    say("loaned");
                    std::future::pending().await
                }
                "streams" => stream(&publisher, &SIZES, u64::MAX).await,
                "starves" => stream(&publisher, &[MIB], u64::MAX).await,
                "closes" => {
                    stream(&publisher, &SIZES, 3).await;
                    say(&format!("closing {:032x}", publisher.id()));
                    publisher.close().await.unwrap();
                }
                other => panic!("{other}"),
            }
        }
    });
}

/// A publisher whose runtime does nothing before it closes: who flushes accepts, and reads the greetings.
fn asleep(script: &str, on_full: OnFull, dir: &Path) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    loop {
        let builder = publisher_in(dir).on_full(on_full).queue(QUEUE).runtime(runtime.handle().clone());
        let publisher = builder.bind().unwrap();
        tell("bound", &publisher);
        if script == "naps" {
            until_killed();
        }
        while publisher.subscriber_count() < 2 {
            let _ = tokio_test::task::spawn(publisher.flush()).poll();
            std::thread::yield_now();
        }
        tell("ready", &publisher);
        runtime.block_on(async {
            stream(&publisher, &SIZES, 3).await;
            say(&format!("closing {:032x}", publisher.id()));
            publisher.close().await.unwrap();
        });
    }
}

/// Says what has become of a publisher, and when.
fn tell(what: &str, publisher: &ShmPublisher) {
    say(&format!("{what} {:032x} {}", publisher.id(), monotonic_ns()));
}

/// Sends messages, says when it has to wait, and of how many it is certain that they are on their links.
async fn stream(publisher: &ShmPublisher, sizes: &[usize], count: u64) {
    for seq in 0..count {
        let size = sizes[seq as usize % sizes.len()];
        let mut sending = tokio_test::task::spawn(publisher.send(message(seq, size)));
        match sending.poll() {
            std::task::Poll::Ready(sent) => sent.unwrap(),
            std::task::Poll::Pending => {
                say("blocked");
                sending.await.unwrap();
            }
        }
        if tokio_test::task::spawn(publisher.flush()).poll().is_ready() {
            say(&format!("sent {:032x} {}", publisher.id(), seq + 1));
        }
        if seq % 16 == 15 {
            // So that subscribers sleep now and then, and segments are made anew.
            tokio::time::sleep(Duration::from_millis(1)).await;
            let _ = publisher.pool().stats();
            publisher.pool().trim();
        }
    }
}
