//! The ring against a plain queue. What only happens between threads is in `loom_tests` and in `proto::tests`.

use super::*;
use crate::proto::class::LARGEST;
use crate::proto::layout::HeapPage;
use proptest::prelude::*;
use std::cell::RefCell;
use std::collections::VecDeque;

#[derive(Debug, Clone)]
enum Op {
    Push { segment: u64, offset: u64, len: u64, ticket: u32 },
    Pop,
    TakeBack,
    Queued,
    IsEmpty,
    Offer(u64),
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        4 => (any::<u64>(), 0u64..1 << 48, 0..=LARGEST as u64, any::<u32>()).prop_map(
            |(segment, grains, len, ticket)| Op::Push { segment, offset: grains * 64, len, ticket }
        ),
        3 => Just(Op::Pop),
        2 => Just(Op::TakeBack),
        1 => Just(Op::Queued),
        1 => Just(Op::IsEmpty),
        1 => (0u64..3).prop_map(Op::Offer),
    ]
}

proptest! {
    #[test]
    fn ring_agrees_with_a_queue(
        depth in 1u32..=20,
        most in 1usize..=CLAIM_MAX + 1,
        ops in prop::collection::vec(op(), 0..300),
    ) {
        let heap = HeapPage::new(depth);
        let page = heap.page();
        let (mut producer, mut consumer) = (Producer::new(), Consumer::new(most));
        let mut oracle = VecDeque::new();
        let (mut seq, mut position, mut offered) = (0, 0, 0);
        for op in ops {
            // The oldest ones are the consumer's already.
            let claimed = consumer.claimed - consumer.next;
            prop_assert!(claimed < most);
            match op {
                Op::Push { segment, offset, len, ticket } if oracle.len() < depth as usize => {
                    let descriptor = Descriptor { seq, segment, offset, len, ticket: ticket % depth };
                    prop_assert_eq!(producer.position(), position);
                    producer.push(page, descriptor);
                    oracle.push_back((position, descriptor));
                    position += 1;
                    seq += 1;
                }
                Op::Push { .. } => {}
                Op::Pop => {
                    let expected = oracle.pop_front().map_or(Popped::Empty, |(_, it)| Popped::Message(it));
                    prop_assert_eq!(consumer.pop(page), Ok(expected));
                }
                Op::TakeBack => {
                    let expected = oracle.remove(claimed).map(|(position, _)| position);
                    prop_assert_eq!(producer.take_back(page), Ok(expected));
                }
                Op::Queued => prop_assert_eq!(producer.queued(page), Ok((oracle.len() - claimed) as u64)),
                Op::IsEmpty => {
                    // After a pop that found nothing, the look is exact; else it may err to the side of looking again.
                    if !oracle.is_empty() {
                        prop_assert!(!consumer.is_empty(page));
                    } else {
                        prop_assert_eq!(consumer.pop(page), Ok(Popped::Empty));
                        prop_assert!(consumer.is_empty(page));
                    }
                }
                Op::Offer(more) => {
                    offered += more;
                    producer.offer(page, offered);
                    prop_assert_eq!(consumer.offered(page), Ok(offered));
                }
            }
        }
    }
}

fn descriptor(seq: u64) -> Descriptor {
    Descriptor { seq, segment: 0, offset: 0, len: 0, ticket: 0 }
}

#[test]
fn deepest_link_has_a_ticket_for_every_bit_pattern() {
    let heap = HeapPage::new(1 << 16);
    let (offset, len, ticket) = ((1 << 54) - 64, (1 << LEN_BITS) - 1, (1 << 16) - 1);
    let descriptor = Descriptor { seq: 1, segment: 2, offset, len, ticket };
    Producer::new().push(heap.page(), descriptor);
    assert_eq!(Consumer::new(1).pop(heap.page()), Ok(Popped::Message(descriptor)));
}

#[test]
fn head_that_cannot_be_is_named_by_the_producer() {
    let heap = HeapPage::new(2);
    let page = heap.page();
    let mut producer = Producer::new();
    producer.push(page, descriptor(0));
    page.control.head.store(2, Ordering::Relaxed);
    assert_eq!(producer.take_back(page), Err(Misbehaved::HeadPastTail { head: 2, tail: 1 }));
    page.control.head.store(1, Ordering::Relaxed);
    assert_eq!(producer.take_back(page), Ok(None));
    page.control.head.store(0, Ordering::Relaxed);
    assert_eq!(producer.queued(page), Err(Misbehaved::HeadWentBack { seen: 1, now: 0 }));
    let mut producer = Producer::new();
    // Three tickets were given back for two: the tickets' table has let each one go once it was released.
    for seq in 0..3 {
        producer.push(page, descriptor(seq));
    }
    assert_eq!(producer.take_back(page), Err(Misbehaved::ReleasedUnread { queued: 3, capacity: 2 }));
}

#[test]
fn entry_of_another_lap_is_no_message() {
    // The first lap, one after which all bits of a stamp begin anew, and the last.
    for lap in [0, (1 << 23) - 4, u64::MAX / 4 - 1] {
        let heap = HeapPage::new(4);
        let page = heap.page();
        let first = lap * 4;
        let (mut producer, mut consumer) = (Producer::new(), Consumer::new(1));
        (producer.tail, producer.head_seen, consumer.head) = (first, first, first);
        page.control.head.store(first, Ordering::Relaxed);
        for seq in 0..3 {
            assert_eq!(consumer.pop(page), Ok(Popped::Empty), "lap {lap}, message {seq}");
            assert!(consumer.is_empty(page));
            producer.push(page, descriptor(seq));
            assert!(!consumer.is_empty(page));
            assert_eq!(consumer.pop(page), Ok(Popped::Message(descriptor(seq))));
        }
    }
}

#[test]
fn head_that_cannot_be_is_named_by_the_consumer() {
    let heap = HeapPage::new(2);
    let page = heap.page();
    let (mut producer, mut consumer) = (Producer::new(), Consumer::new(1));
    producer.push(page, descriptor(0));
    assert!(matches!(consumer.pop(page), Ok(Popped::Message(_))));
    page.control.head.store(0, Ordering::Relaxed);
    assert_eq!(consumer.pop(page), Err(Misbehaved::HeadWentBack { seen: 1, now: 0 }));
    producer.push(page, descriptor(1));
    assert_eq!(consumer.pop(page), Err(Misbehaved::HeadWentBack { seen: 1, now: 0 }));
}

#[test]
fn head_moved_on_to_nowhere_is_followed() {
    let heap = HeapPage::new(2);
    let page = heap.page();
    let mut consumer = Consumer::new(1);
    for head in [7, u64::MAX - 1] {
        page.control.head.store(head, Ordering::Relaxed);
        assert!(!consumer.is_empty(page));
        assert_eq!(consumer.pop(page), Ok(Popped::Empty));
        assert!(consumer.is_empty(page));
    }
    // The position before the first is stamped as a new page is.
    page.control.head.store(u64::MAX, Ordering::Relaxed);
    assert!(consumer.pop(page).is_ok());
}

#[test]
fn claims_go_beyond_a_cache_line_while_there_is_a_backlog() {
    let heap = HeapPage::new(32);
    let page = heap.page();
    let (mut producer, mut consumer) = (Producer::new(), Consumer::new(CLAIM_MAX));
    for seq in 0..20 {
        producer.push(page, descriptor(seq));
    }
    let mut claims = Vec::new();
    for seq in 0..20 {
        let before = page.control.head.load(Ordering::Relaxed);
        assert_eq!(consumer.pop(page), Ok(Popped::Message(descriptor(seq))));
        claims.push(page.control.head.load(Ordering::Relaxed) - before);
    }
    claims.retain(|claimed| *claimed > 0);
    assert_eq!(claims, [ENTRIES_A_LINE as u64, CLAIM_MAX as u64, CLAIM_MAX as u64, 2]);
    producer.push(page, descriptor(20));
    producer.push(page, descriptor(21));
    producer.push(page, descriptor(22));
    assert_eq!(consumer.pop(page), Ok(Popped::Message(descriptor(20))));
    assert_eq!(
        page.control.head.load(Ordering::Relaxed),
        22,
        "the last claim had found less than it looked for"
    );
}

#[test]
fn rest_of_a_claim_is_taken_without_claiming_more() {
    let heap = HeapPage::new(8);
    let page = heap.page();
    let (mut producer, mut consumer) = (Producer::new(), Consumer::new(CLAIM_MAX));
    (0..2).for_each(|seq| producer.push(page, descriptor(seq)));
    assert_eq!(consumer.pop(page), Ok(Popped::Message(descriptor(0))));
    producer.push(page, descriptor(2));
    assert!(consumer.take_claimed().eq([descriptor(1)]));
    assert_eq!(consumer.take_claimed().next(), None);
    assert_eq!(producer.queued(page), Ok(1));
    assert_eq!(consumer.pop(page), Ok(Popped::Message(descriptor(2))));
    assert!(consumer.is_empty(page));
}

#[test]
fn messages_that_come_soon_are_told_of_once() {
    let heap = HeapPage::new(4);
    let page = heap.page();
    let (mut producer, mut consumer) = (Producer::new(), Consumer::new(CLAIM_MAX));
    for seq in 0..3 {
        producer.push(page, descriptor(seq));
    }
    let told = RefCell::new(Vec::new());
    for seq in 0..3 {
        let popped = consumer.pop_with(page, |soon| told.borrow_mut().push(soon.seq));
        assert_eq!(popped, Ok(Popped::Message(descriptor(seq))));
    }
    assert_eq!(told.into_inner(), [0, 1, 2]);
}

#[test]
fn ticket_beyond_the_depth_is_misbehaviour() {
    let heap = HeapPage::new(3);
    let page = heap.page();
    Producer::new().push(page, Descriptor { ticket: 3, ..descriptor(0) });
    assert_eq!(Consumer::new(1).pop(page), Err(Misbehaved::TicketOutOfRange { ticket: 3, depth: 3 }));
}

#[test]
fn consumer_far_behind_follows_a_producer_that_took_back_more_than_the_ring_holds() {
    let heap = HeapPage::new(2);
    let page = heap.page();
    let (mut producer, mut consumer) = (Producer::new(), Consumer::new(1));
    for seq in 0..100 {
        if seq >= 2 {
            assert_eq!(producer.take_back(page), Ok(Some(seq - 2)));
        }
        producer.push(page, descriptor(seq));
    }
    assert_eq!(consumer.pop(page), Ok(Popped::Message(descriptor(98))));
    assert_eq!(consumer.pop(page), Ok(Popped::Message(descriptor(99))));
    assert_eq!(consumer.pop(page), Ok(Popped::Empty));
}
