//! A whole link: ring, tickets, release bitmap and bells together.

use super::bell::{Wake, arm, disarm, must_ring};
use super::layout::HeapPage;
use super::model::Publisher;
use super::release::release;
use super::ring::{CLAIM_MAX, Consumer, Descriptor, Popped};
use proptest::prelude::*;
use std::collections::{BTreeSet, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};

fn assert_intact(message: Descriptor) {
    let seq = message.seq;
    assert_eq!((message.segment, message.offset, message.len), (seq ^ 0xabcd, seq * 64, seq ^ 0x5a));
}

#[derive(Debug, Clone)]
enum Op {
    Publish,
    TakeBack,
    Collect,
    Pop,
    /// Drops the n-th held sample.
    Drop(usize),
    ArmData,
    DisarmData,
    ArmCredit,
    Look,
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        6 => Just(Op::Publish),
        3 => Just(Op::TakeBack),
        3 => Just(Op::Collect),
        6 => Just(Op::Pop),
        5 => any::<usize>().prop_map(Op::Drop),
        1 => Just(Op::ArmData),
        1 => Just(Op::DisarmData),
        1 => Just(Op::ArmCredit),
        2 => Just(Op::Look),
    ]
}

proptest! {
    #[test]
    fn link_agrees_with_a_queue_and_a_set(depth in 1u32..=70, ops in prop::collection::vec(op(), 0..400)) {
        let heap = HeapPage::new(depth);
        heap.page().init(0);
        prop_assert_eq!(heap.page().validate(), Ok(()));
        let mut publisher = Publisher::new(depth);
        let mut consumer = Consumer::new(1);
        let mut held = Vec::new();
        let (mut queued, mut released) = (VecDeque::new(), BTreeSet::new());
        let (mut data_armed, mut credit_armed) = (false, false);
        for op in ops {
            match op {
                Op::Publish => {
                    let seq = publisher.next_seq;
                    let room = queued.len() + held.len() + released.len() < depth as usize;
                    prop_assert_eq!(publisher.publish(&heap), Ok(room));
                    if room {
                        queued.push_back(seq);
                        let wake = must_ring(&heap.page().control.data_armed);
                        prop_assert_eq!(wake == Wake::Ring, std::mem::take(&mut data_armed));
                    }
                }
                Op::TakeBack => prop_assert_eq!(publisher.take_back(&heap), Ok(queued.pop_front())),
                Op::Collect => {
                    let got: BTreeSet<_> = publisher.collect(&heap).unwrap().into_iter().collect();
                    prop_assert_eq!(got, std::mem::take(&mut released));
                }
                Op::Pop => match consumer.pop(heap.page()).unwrap() {
                    Popped::Message(message) => {
                        assert_intact(message);
                        prop_assert_eq!(Some(message.seq), queued.pop_front());
                        held.push(message);
                    }
                    Popped::Empty => prop_assert!(queued.is_empty()),
                    Popped::Contended => prop_assert!(false, "nobody to lose a race against"),
                },
                Op::Drop(at) if !held.is_empty() => {
                    let message = held.swap_remove(at % held.len());
                    let wake = release(heap.page(), message.ticket);
                    prop_assert_eq!(wake == Wake::Ring, std::mem::take(&mut credit_armed));
                    released.insert(message.seq);
                }
                Op::Drop(_) => {}
                Op::ArmData => {
                    arm(&heap.page().control.data_armed);
                    data_armed = true;
                }
                Op::DisarmData => {
                    disarm(&heap.page().control.data_armed);
                    data_armed = false;
                }
                Op::ArmCredit => {
                    arm(&heap.page().control.credit_armed);
                    credit_armed = true;
                }
                Op::Look => {
                    prop_assert_eq!(publisher.producer.queued(heap.page()), Ok(queued.len() as u64));
                    prop_assert_eq!(consumer.offered(heap.page()), Ok(publisher.next_seq));
                    prop_assert!(queued.is_empty() || !consumer.is_empty(heap.page()));
                }
            }
            let outstanding = queued.len() + held.len() + released.len();
            prop_assert_eq!(publisher.tickets.outstanding() as usize, outstanding);
        }
    }
}

/// A publisher that overwrites at full speed against a subscriber that holds on to what it got for a while.
#[test]
fn messages_between_two_threads_are_each_received_or_taken_back() {
    const MESSAGES: u64 = if cfg!(miri) { 300 } else { 200_000 };
    for (depth, most) in [2, 3, 8, 65].into_iter().flat_map(|depth| [(depth, 1), (depth, CLAIM_MAX)]) {
        let heap = HeapPage::new(depth);
        heap.page().init(0);
        let (mut received, mut taken_back) = (Vec::new(), Vec::new());
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut publisher = Publisher::new(depth);
                while publisher.next_seq < MESSAGES {
                    let before = publisher.next_seq;
                    if !publisher.publish(&heap).unwrap() && publisher.collect(&heap).unwrap().is_empty() {
                        match publisher.take_back(&heap).unwrap() {
                            Some(seq) => taken_back.push(seq),
                            // All are held: the subscriber drops one when it runs.
                            None => std::thread::yield_now(),
                        }
                    }
                    // Now and then, let the other one catch up where there is one core only.
                    if publisher.next_seq > before && before.is_multiple_of(64) {
                        std::thread::yield_now();
                    }
                }
                done.store(true, Ordering::Release);
            });
            let mut consumer = Consumer::new(most);
            let mut held = VecDeque::new();
            loop {
                let closed = done.load(Ordering::Acquire);
                match consumer.pop(heap.page()).unwrap() {
                    Popped::Message(message) => {
                        assert_intact(message);
                        received.push(message.seq);
                        held.push_back(message.ticket);
                        if held.len() >= depth.div_ceil(2) as usize {
                            let _ = release(heap.page(), held.pop_front().unwrap());
                        }
                    }
                    Popped::Empty if closed => break,
                    Popped::Empty | Popped::Contended => std::thread::yield_now(),
                }
            }
            assert_eq!(consumer.offered(heap.page()), Ok(MESSAGES));
        });
        assert!(received.is_sorted() && taken_back.is_sorted());
        received.append(&mut taken_back);
        received.sort_unstable();
        assert!(received.into_iter().eq(0..MESSAGES), "each message has one owner");
    }
}
