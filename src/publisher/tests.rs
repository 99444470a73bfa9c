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
    let flush = std::sync::Arc::new(parking_lot::Mutex::new(task::spawn({
        let publisher = publisher.clone();
        async move { publisher.flush().await }
    })));
    let flushing = std::sync::Arc::clone(&flush);
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
    let send = std::sync::Arc::new(parking_lot::Mutex::new(task::spawn({
        let publisher = publisher.clone();
        async move { publisher.send([2]).await }
    })));
    let sending = std::sync::Arc::clone(&send);
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
    let flush = std::sync::Arc::new(parking_lot::Mutex::new(task::spawn({
        let publisher = publisher.clone();
        async move { publisher.flush().await }
    })));
    let (flushing, other) = (std::sync::Arc::clone(&flush), publisher.clone());
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
    let mut subscriber = dir.subscriber(4);
    let (mut sink, mut other) = (publisher.clone(), publisher.clone());
    let mut receiving = task::spawn(async { subscriber.recv().await });
    assert_pending!(receiving.poll(), "it sleeps, and is rung for");
    feed(&mut sink, 1);
    detour("data bell: disarmed", move || {
        feed(&mut other, 2);
        // Its handle would have it delivered.
        std::mem::forget(other);
    });
    let flushed = SinkExt::<[u8; 1]>::flush(&mut sink).now_or_never();
    assert!(matches!(flushed, Some(Ok(()))), "{flushed:?}");
    // Give back what was forgotten.
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
    let publisher = dir.publisher().pool(slots(4)).bind().unwrap();
    let mut subscriber = dir.subscriber(1);
    let mut held: Vec<_> = (0..2).map(|_| publisher.try_loan(SLOT).unwrap()).collect();
    publisher.try_send(vec![0; SLOT]).unwrap();
    // The head, which the subscriber keeps waiting.
    publisher.try_send(vec![1; SLOT]).unwrap();
    let mut sinks = [publisher.clone(), publisher.clone()];
    for sink in &mut sinks {
        std::future::poll_fn(|cx| futures::Sink::<Vec<u8>>::poll_ready(std::pin::Pin::new(&mut *sink), cx))
            .await
            .unwrap();
    }
    for (sink, byte) in sinks.iter_mut().zip(2..) {
        futures::Sink::start_send(std::pin::Pin::new(sink), vec![byte; SLOT]).unwrap();
    }
    publisher.shared.pump();
    come_to_rest().await;
    held.clear();
    come_to_rest().await;
    let before = takes(&publisher);
    come_to_rest().await;
    assert!(takes(&publisher) <= before + 2, "the tx task does nothing else");
    let mut all = Vec::new();
    while all.len() < 4 {
        all.push(subscriber.recv().await.unwrap()[0]);
    }
    assert_eq!(all, [0, 1, 2, 3]);
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
