//! Both ends of a link at work on a page that somebody scribbles on.

use std::collections::BTreeSet;

use crate::proto::bell::{arm, disarm, must_ring};
use crate::proto::layout::{CONTROL_WORDS, HeapPage};
use crate::proto::model::Publisher;
use crate::proto::release::release;
use crate::proto::ring::{CLAIM_MAX, Consumer, Popped};

/// What is done to a link's page, and with it.
#[derive(Debug, Clone, arbitrary::Arbitrary)]
pub enum Op {
    /// The publisher queues a message.
    Publish,
    /// It takes the oldest back.
    TakeBack,
    /// It collects what was released.
    Collect,
    /// The subscriber takes a message.
    Pop,
    /// It drops the n-th that it holds.
    Drop(u8),
    /// It asks to be rung for.
    ArmData,
    /// It is awake.
    DisarmData,
    /// The publisher asks to be rung for.
    ArmCredit,
    /// Both look without taking anything.
    Look,
    /// Somebody stores something somewhere: a small number, a very large one, or any.
    Scribble(u16, Lie),
    /// The same at one of the first words, the cursors among them.
    ScribbleCursor(u8, Lie),
}

/// A value worth storing.
#[derive(Debug, Clone, Copy, arbitrary::Arbitrary)]
pub enum Lie {
    /// A small number.
    Small(u8),
    /// As far below the largest.
    Large(u8),
    /// Any.
    Any(u64),
}

impl Lie {
    /// The value.
    pub(super) fn value(self) -> u64 {
        match self {
            Self::Small(value) => value.into(),
            Self::Large(below) => u64::MAX - u64::from(below),
            Self::Any(value) => value,
        }
    }
}

/// Does all of `ops` to a link of `depth` modulo 70, errors or not. The publisher never gets back what it has not given
/// out, and nothing is out of range.
pub fn page(depth: u8, ops: &[Op]) {
    let depth = u32::from(depth) % 70 + 1;
    let heap = HeapPage::new(depth);
    heap.page().init(0);
    let mut publisher = Publisher::new(depth);
    let mut consumer = Consumer::new(CLAIM_MAX);
    let mut held = Vec::new();
    let mut owned = BTreeSet::new();
    for op in ops {
        match *op {
            Op::Publish => {
                let seq = publisher.next_seq;
                if publisher.publish(&heap) == Ok(true) {
                    owned.insert(seq);
                }
                let _ = must_ring(&heap.page().control.data_armed);
            }
            Op::TakeBack => {
                if let Ok(Some(seq)) = publisher.take_back(&heap) {
                    assert!(owned.remove(&seq), "message {seq} came back twice");
                }
            }
            Op::Collect => match publisher.collect(&heap) {
                Ok(values) => {
                    for seq in values {
                        assert!(owned.remove(&seq), "message {seq} came back twice");
                    }
                }
                // What a publisher does with such a link.
                Err(_) => {
                    let _ = publisher.tickets.drain().count();
                    owned.clear();
                }
            },
            Op::Pop => {
                if let Ok(Popped::Message(message)) = consumer.pop(heap.page()) {
                    assert!(message.ticket < depth && message.offset % 64 == 0);
                    held.push(message);
                }
            }
            Op::Drop(at) if !held.is_empty() => {
                let message = held.swap_remove(usize::from(at) % held.len());
                let _ = release(heap.page(), message.ticket);
            }
            Op::Drop(_) => {}
            Op::ArmData => arm(&heap.page().control.data_armed),
            Op::DisarmData => disarm(&heap.page().control.data_armed),
            Op::ArmCredit => arm(&heap.page().control.credit_armed),
            Op::Look => {
                if let Ok(queued) = publisher.producer.queued(heap.page()) {
                    assert!(queued <= u64::from(heap.page().geometry().capacity()));
                }
                let _ = consumer.offered(heap.page());
                let _ = consumer.is_empty(heap.page());
                let _ = heap.page().validate();
            }
            Op::Scribble(at, lie) => heap.scribble(usize::from(at) % heap.words(), lie.value()),
            Op::ScribbleCursor(at, lie) => heap.scribble(usize::from(at) % (CONTROL_WORDS + 4), lie.value()),
        }
        assert_eq!(publisher.tickets.outstanding() as usize, owned.len());
    }
}
