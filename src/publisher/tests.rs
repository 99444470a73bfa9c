//! Steps of two senders, or of a sender and a task, in an order that is rare by itself: between them a *detour* of one thread takes
//! the other's steps (`kill::detour`). And what takes a process of its own.

use std::time::Duration;

use futures::{FutureExt, SinkExt};
use rustix::process::Resource;
use tokio_test::{assert_pending, assert_ready_ok, task};

use super::*;
use crate::kill::detour;
use crate::sys::testing::{is_alone, run_alone, set_limit};
use crate::{ShmPoolConfig, ShmSubscriber};

struct Dir(tempfile::TempDir);

impl Dir {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::set_permissions(&dir, std::os::unix::fs::PermissionsExt::from_mode(0o700)).unwrap();
        Self(dir)
    }

    fn publisher(&self) -> ShmPublisherBuilder {
        ShmPublisher::builder("t").runtime_dir(self.0.path())
    }

    fn subscriber(&self, depth: u32) -> ShmSubscriber {
        ShmSubscriber::builder("t").runtime_dir(self.0.path()).depth(depth).connect().unwrap()
    }
}

/// The first bytes of all that is there.
fn received(subscriber: &mut ShmSubscriber) -> Vec<u8> {
    std::iter::from_fn(|| subscriber.try_recv().ok()).map(|sample| sample[0]).collect()
}

fn feed(sink: &mut ShmPublisher, byte: u8) {
    sink.feed([byte]).now_or_never().expect("there is a place").unwrap();
}

/// Lets all other tasks of this runtime come to rest.
async fn come_to_rest() {
    for _ in 0..200 {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn message_sent_behind_one_that_is_just_being_fed_is_delivered_with_it() {
    let dir = Dir::new();
    let publisher = dir.publisher().bind().unwrap();
    let mut subscriber = dir.subscriber(4);
    let mut sink = publisher.clone();
    detour("join: counted", move || publisher.try_send([2]).unwrap());
    feed(&mut sink, 1);
    assert_eq!(received(&mut subscriber), [1, 2], "no other call is needed");
}

#[tokio::test]
async fn flush_begun_while_a_message_is_just_being_fed_ends() {
    let dir = Dir::new();
    let publisher = dir.publisher().bind().unwrap();
    let mut subscriber = dir.subscriber(4);
    let mut sink = publisher.clone();
    let flush = Arc::new(parking_lot::Mutex::new(task::spawn({
        let publisher = publisher.clone();
        async move { publisher.flush().await }
    })));
    let flushing = Arc::clone(&flush);
    detour("join: counted", move || assert_pending!(flushing.lock().poll()));
    feed(&mut sink, 1);
    assert!(flush.lock().is_woken());
    assert_ready_ok!(flush.lock().poll());
    assert_eq!(received(&mut subscriber), [1]);
}

#[tokio::test]
async fn sender_that_finds_no_place_behind_one_that_is_just_being_fed_is_woken() {
    let dir = Dir::new();
    let publisher = dir.publisher().queue(1).bind().unwrap();
    let mut subscriber = dir.subscriber(4);
    let mut sink = publisher.clone();
    let send = Arc::new(parking_lot::Mutex::new(task::spawn({
        let publisher = publisher.clone();
        async move { publisher.send([2]).await }
    })));
    let sending = Arc::clone(&send);
    detour("join: counted", move || assert_pending!(sending.lock().poll()));
    feed(&mut sink, 1);
    assert!(send.lock().is_woken());
    assert_ready_ok!(send.lock().poll());
    assert_eq!(received(&mut subscriber), [1, 2]);
}

#[tokio::test]
async fn sender_turned_away_while_all_places_are_reserved_is_woken_when_there_is_nobody_inside() {
    let dir = Dir::new();
    let publisher = dir.publisher().queue(1).bind().unwrap();
    let mut subscriber = dir.subscriber(4);
    let mut idle = publisher.clone();
    std::future::poll_fn(|cx| futures::Sink::<[u8; 1]>::poll_ready(std::pin::Pin::new(&mut idle), cx))
        .await
        .unwrap();
    let inside = publisher.shared.enter().unwrap();
    let mut sends = [1, 2, 3].map(|byte| {
        let publisher = publisher.clone();
        task::spawn(async move { publisher.send([byte]).await })
    });
    sends.iter_mut().for_each(|send| assert_pending!(send.poll()));
    publisher.shared.leave(inside);
    for send in &mut sends {
        assert!(send.is_woken(), "one after the other");
        assert_ready_ok!(send.poll());
    }
    assert_eq!(received(&mut subscriber), [1, 2, 3]);
}

#[tokio::test]
async fn flush_ends_when_the_messages_before_it_are_on_their_links_and_not_sooner() {
    let dir = Dir::new();
    let publisher = dir.publisher().bind().unwrap();
    let mut subscriber = dir.subscriber(1);
    publisher.try_send([0]).unwrap();
    let flush = Arc::new(parking_lot::Mutex::new(task::spawn({
        let publisher = publisher.clone();
        async move { publisher.flush().await }
    })));
    let (flushing, other) = (Arc::clone(&flush), publisher.clone());
    detour("offer: one link", move || {
        // The one that is being delivered is going to be the head, and is not counted as such yet.
        other.try_send([2]).unwrap();
        assert_pending!(flushing.lock().poll());
    });
    publisher.try_send([1]).unwrap();
    for expected in [0, 1] {
        assert_pending!(flush.lock().poll(), "the last one is not on its link");
        assert_eq!(subscriber.try_recv().unwrap()[0], expected);
        publisher.shared.pump();
    }
    assert_ready_ok!(flush.lock().poll());
    assert_eq!(received(&mut subscriber), [2]);
}

#[tokio::test]
async fn flush_does_not_wait_for_what_another_feeds_meanwhile() {
    let dir = Dir::new();
    let publisher = dir.publisher().bind().unwrap();
    let mut subscriber = dir.subscriber(2);
    let (mut sink, mut other) = (publisher.clone(), publisher.clone());
    publisher.try_send([0]).unwrap();
    assert_eq!(received(&mut subscriber), [0]);
    feed(&mut sink, 1);
    let fed = Arc::new(AtomicU32::new(0));
    let feeding = Arc::clone(&fed);
    // The end of the delivery: no place is free, and one has been released.
    detour("reclaim: word swapped", move || {
        feed(&mut other, 2);
        feeding.store(1, Ordering::Relaxed);
        // Dropped, the handle would have it delivered.
        std::mem::forget(other);
    });
    let flushed = SinkExt::<[u8; 1]>::flush(&mut sink).now_or_never();
    assert_eq!(fed.load(Ordering::Relaxed), 1);
    assert!(matches!(flushed, Some(Ok(()))), "{flushed:?}");
    // The handle that was forgotten.
    publisher.shared.handles.fetch_sub(1, Ordering::AcqRel);
}

const SLOT: usize = 4096;

fn slots(count: u64) -> ShmPoolConfig {
    ShmPoolConfig::new().max_bytes(count * SLOT as u64)
}

fn takes(publisher: &ShmPublisher) -> u64 {
    let stats = publisher.pool().stats();
    stats.hits + stats.misses
}

#[tokio::test]
async fn memory_for_the_next_message_in_the_heap_is_looked_for_once() {
    let dir = Dir::new();
    let publisher = dir.publisher().pool(slots(8)).bind().unwrap();
    let mut subscriber = dir.subscriber(1);
    let loans: Vec<_> = (1..=8)
        .map(|byte| {
            let mut loan = publisher.try_loan(SLOT).unwrap();
            loan.fill(byte);
            loan
        })
        .collect();
    let mut sink = publisher.clone();
    sink.feed(vec![0; 3 * SLOT]).await.unwrap();
    for loan in loans {
        publisher.try_send(loan).unwrap();
    }
    come_to_rest().await;
    // The large one is on its link, the next one is the head, and there is memory for the one after that.
    let looked_for = takes(&publisher);
    come_to_rest().await;
    assert!(takes(&publisher) <= looked_for + 1, "the tx task does nothing else");
    for byte in 0..=8 {
        assert_eq!(subscriber.recv().await.unwrap()[0], byte);
    }
}

#[test]
fn message_in_the_heap_is_tried_again_when_the_system_has_refused_its_memory() {
    run_alone("publisher::tests::child_message_in_the_heap_is_tried_again");
}

#[test]
#[ignore = "run by another test, in a process of its own"]
fn child_message_in_the_heap_is_tried_again() {
    if !is_alone() {
        return;
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let dir = Dir::new();
        let publisher = dir.publisher().pool(slots(64)).bind().unwrap();
        let mut subscriber = dir.subscriber(8);
        publisher.send([0]).await.unwrap();
        assert_eq!(subscriber.recv().await.unwrap()[0], 0);
        // Of another size: to be given up for the message.
        let loan = publisher.try_loan(48 * SLOT).unwrap();
        let mut sink = publisher.clone();
        sink.feed(vec![1; 40 * SLOT]).await.unwrap();
        publisher.shared.pump();
        come_to_rest().await;
        assert!(publisher.shared.starved_for().is_some(), "it waits in the heap");
        let limit = rustix::process::getrlimit(Resource::Nofile).current.unwrap();
        set_limit(Resource::Nofile, 3);
        drop(loan);
        come_to_rest().await;
        assert!(publisher.shared.starved_for().is_some(), "there is no descriptor for its segment");
        set_limit(Resource::Nofile, limit);
        publisher.send([2]).await.unwrap();
        let flushed = tokio::time::timeout(Duration::from_secs(20), publisher.flush()).await;
        flushed.expect("nothing else has to happen").unwrap();
        assert_eq!(received(&mut subscriber), [1, 2]);
    });
}

/// Longer, or shorter, each time that it is asked.
struct Fickle {
    asked: std::cell::Cell<usize>,
    lens: &'static [usize],
}

impl Fickle {
    fn new(lens: &'static [usize]) -> Self {
        Self { asked: std::cell::Cell::new(0), lens }
    }
}

impl Payload for Fickle {
    type Returned = Self;

    fn as_bytes(&self) -> &[u8] {
        let asked = self.asked.replace(self.asked.get() + 1);
        &[7; 64 * SLOT][..self.lens[asked % self.lens.len()]]
    }

    fn into_returned(self) -> Self {
        self
    }
}

/// What comes is one of the answers, whole, and nothing of what was in the memory before.
fn assert_whole(sample: &[u8], lens: &[usize]) {
    assert!(lens.contains(&sample.len()), "{} of {lens:?}", sample.len());
    assert!(sample.iter().all(|byte| *byte == 7));
}

const FICKLE: [&[usize]; 4] = [&[10, 20], &[20, 10], &[10, 3 * SLOT], &[3 * SLOT, 10]];

#[tokio::test]
async fn payload_that_is_not_the_same_twice_is_sent_as_it_was_once() {
    let dir = Dir::new();
    let publisher = dir.publisher().bind().unwrap();
    let mut subscriber = dir.subscriber(8);
    for lens in FICKLE {
        // What was in the memory before.
        let mut loan = publisher.try_loan(3 * SLOT).unwrap();
        loan.fill(1);
        drop(loan);
        publisher.try_send(Fickle::new(lens)).unwrap();
        publisher.send(Fickle::new(lens)).await.unwrap();
        publisher.clone().feed(Fickle::new(lens)).await.unwrap();
        for _ in 0..3 {
            assert_whole(&subscriber.recv().await.unwrap(), lens);
        }
    }
    tokio::task::spawn_blocking(move || {
        for lens in FICKLE {
            publisher.blocking_send(Fickle::new(lens)).unwrap();
            assert_whole(&subscriber.blocking_recv().unwrap(), lens);
        }
    })
    .await
    .unwrap();
}

#[tokio::test]
async fn payload_that_is_not_the_same_twice_is_sent_as_it_was_once_after_a_wait_for_memory() {
    let dir = Dir::new();
    for lens in FICKLE {
        let publisher = dir.publisher().pool(slots(4)).bind().unwrap();
        let mut subscriber = dir.subscriber(8);
        let held = publisher.try_loan(4 * SLOT).unwrap();
        let mut send = task::spawn(publisher.send(Fickle::new(lens)));
        assert_pending!(send.poll());
        drop(held);
        assert!(send.is_woken());
        tokio::time::timeout(Duration::from_secs(20), send).await.unwrap().unwrap();
        assert_whole(&subscriber.recv().await.unwrap(), lens);
        let held = publisher.try_loan(4 * SLOT).unwrap();
        let mut sink = publisher.clone();
        sink.feed(Fickle::new(lens)).await.unwrap();
        drop(held);
        assert_whole(&subscriber.recv().await.unwrap(), lens);
    }
}

struct Panics;

impl Payload for Panics {
    type Returned = Self;

    fn as_bytes(&self) -> &[u8] {
        panic!("the user's")
    }

    fn into_returned(self) -> Self {
        self
    }
}

#[tokio::test]
async fn place_reserved_is_not_lost_with_a_payload_that_panics() {
    let dir = Dir::new();
    let publisher = dir.publisher().queue(1).bind().unwrap();
    let mut subscriber = dir.subscriber(8);
    let mut sink = publisher.clone();
    let ready = |sink: &mut ShmPublisher| {
        std::future::poll_fn(|cx| {
            futures::Sink::<[u8; 1]>::poll_ready(std::pin::Pin::new(&mut *sink), cx).map(Result::unwrap)
        })
        .now_or_never()
    };
    assert!(ready(&mut sink).is_some());
    let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        futures::Sink::start_send(std::pin::Pin::new(&mut sink), Panics)
    }));
    assert!(panicked.is_err());
    drop(sink);
    let mut other = publisher.clone();
    assert!(ready(&mut other).is_some(), "the place has come back");
    futures::Sink::start_send(std::pin::Pin::new(&mut other), [1]).unwrap();
    drop(other);
    assert_eq!(received(&mut subscriber), [1]);
}

#[tokio::test]
async fn panic_inside_a_delivery_is_told_to_subscribers_and_gives_slots_back() {
    let dir = Dir::new();
    let pool = crate::ShmSegmentPool::new(ShmPoolConfig::new());
    let publisher = dir.publisher().shared_pool(&pool).history(4).bind().unwrap();
    // All of them are on its link: nothing of what it releases is waited for.
    let mut subscriber = dir.subscriber(8);
    (0..4).for_each(|byte| publisher.try_send([byte]).unwrap());
    assert_eq!(pool.stats().in_use(), 4);
    // The tx task has nothing to do any more but what it is told to.
    come_to_rest().await;
    let other = publisher.clone();
    let panicked = std::thread::spawn(move || {
        let _inside = other.shared.enter().unwrap();
        // So that nothing but the panic tells of it.
        std::mem::forget(other.clone());
        panic!("inside");
    });
    assert!(panicked.join().is_err());
    let told = async {
        for byte in 0..4 {
            assert_eq!(subscriber.recv().await.unwrap()[0], byte);
        }
        subscriber.recv().await
    };
    let told = tokio::time::timeout(Duration::from_secs(20), told).await.expect("no other call is needed");
    assert!(matches!(told, Err(crate::RecvError::PublisherLost { .. })), "{told:?}");
    assert!(publisher.is_closed());
    assert_eq!(pool.stats().in_use(), 0);
}
