//! The ring under every interleaving of two threads, with two places.
//!
//! Each ordering in `ring.rs` was weakened once to see a model here fail. Two withstood: the Release with which the
//! consumer claims an entry, and the Acquire that belongs to it. They keep a load from being overtaken by a store of the
//! other thread that comes later, and loom lets no load see the future.

use super::*;
use crate::proto::layout::HeapPage;
use loom::sync::Arc;
use loom::thread;

/// All words differ from those of other messages, so that a mixture of two is noticed.
fn descriptor(seq: u64) -> Descriptor {
    Descriptor { seq, segment: seq + 10, offset: (seq + 20) * 64, len: seq + 30, ticket: (seq % 2) as u32 }
}

fn drain(consumer: &mut Consumer, page: Page<'_>, received: &mut Vec<u64>) {
    while let Popped::Message(message) = consumer.pop(page).unwrap() {
        assert_eq!(message, descriptor(message.seq));
        received.push(message.seq);
    }
}

/// Queues `count` messages as `DropOldest` does, without ever getting a ticket back from the consumer.
fn publish(page: Page<'_>, count: u64) -> Vec<u64> {
    let mut producer = Producer::new();
    let mut taken_back = Vec::new();
    for seq in 0..count {
        if seq >= 2 {
            match producer.take_back(page).unwrap() {
                Some(position) => taken_back.push(position),
                // The consumer holds both tickets.
                None => break,
            }
        }
        producer.push(page, descriptor(producer.position()));
    }
    taken_back.push(producer.position());
    taken_back
}

fn each_message_has_one_owner(count: u64, most: usize, preemptions: Option<usize>) {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = preemptions;
    model.check(move || {
        let heap = Arc::new(HeapPage::new(2));
        let publisher = thread::spawn({
            let heap = heap.clone();
            move || publish(heap.page(), count)
        });

        let mut consumer = Consumer::new(most);
        let mut received = Vec::new();
        drain(&mut consumer, heap.page(), &mut received);

        let mut owned = publisher.join().unwrap();
        let pushed = owned.pop().unwrap();
        drain(&mut consumer, heap.page(), &mut received);
        assert!(received.is_sorted());
        owned.append(&mut received);
        owned.sort_unstable();
        assert!(owned.into_iter().eq(0..pushed), "each message is obtained once, by either side");
    });
}

#[test]
fn loom_message_pushed_twice_and_taken_back_once_has_one_owner_each() {
    each_message_has_one_owner(3, 1, None);
    each_message_has_one_owner(3, CLAIM_MAX, None);
}

#[test]
fn loom_message_overwriting_two_others_is_never_mixed_with_them() {
    // Without a bound this takes minutes.
    each_message_has_one_owner(4, 1, Some(3));
    each_message_has_one_owner(4, CLAIM_MAX, Some(3));
}

#[test]
fn loom_head_that_overtook_the_tail_seen_accuses_no_honest_producer() {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(3);
    model.check(|| {
        let heap = Arc::new(HeapPage::new(2));
        let publisher = thread::spawn({
            let heap = heap.clone();
            move || {
                // Takes everything back in the end, so that `head` gets past all but the last `tail`.
                let mut producer = Producer::new();
                for seq in 0..4 {
                    if seq >= 2 {
                        producer.take_back(heap.page()).unwrap();
                    }
                    producer.push(heap.page(), descriptor(seq));
                }
                while producer.take_back(heap.page()).unwrap().is_some() {}
            }
        });
        // The first pop is the one that starts furthest behind.
        if let Popped::Message(message) = Consumer::new(CLAIM_MAX).pop(heap.page()).unwrap() {
            assert_eq!(message, descriptor(message.seq));
        }
        publisher.join().unwrap();
    });
}

#[test]
fn loom_message_count_offered_covers_what_is_missing() {
    loom::model(|| {
        let heap = Arc::new(HeapPage::new(2));
        let publisher = thread::spawn({
            let heap = heap.clone();
            move || {
                let mut producer = Producer::new();
                for seq in 0..2 {
                    producer.push(heap.page(), descriptor(seq));
                    producer.offer(heap.page(), seq + 1);
                }
            }
        });

        let mut consumer = Consumer::new(CLAIM_MAX);
        let offered = consumer.offered(heap.page()).unwrap();
        let mut received = Vec::new();
        drain(&mut consumer, heap.page(), &mut received);
        assert!(received.len() as u64 >= offered, "nothing was dropped here");
        publisher.join().unwrap();
    });
}
