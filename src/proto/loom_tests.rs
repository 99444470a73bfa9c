//! A whole link under every interleaving: publisher and subscriber, ring, release, doorbells, take-back, death.
//!
//! The payload is a cell that loom watches: written by the publisher when a slot is used (again), read by the subscriber
//! while it holds the ticket. A slot that was recycled too early is a data race, a wake-up that was lost a deadlock, a message
//! that went missing a failed count. What the sockets carry is not modelled, except that the end of one process orders all
//! that it did before what the other does about it: loom's `join`.
//!
//! Tried, one at a time, and found by the models here: `Relaxed` in place of `Release` for the stamp in `ring::Descriptor::publish`, and for
//! the `fetch_or` in `release::release`, the fences of `bell::arm` and `bell::fence_before_looking` left out, and a publisher that
//! reuses what it takes back although the subscriber has claimed it.
#![allow(unsafe_code)]

use super::bell::{self, Wake, arm, must_ring};
use super::hold::Hold;
use super::layout::{HeapPage, Page};
use super::release::{Collector, Released, release};
use super::ring::{CLAIM_MAX, Consumer, Descriptor, Popped, Producer};
use super::ticket::Tickets;
use crate::sync::{Condvar, Mutex};
use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::thread;

/// An eventfd and whoever waits for it.
struct Doorbell {
    rung: Mutex<bool>,
    heard: Condvar,
}

impl Doorbell {
    fn new() -> Self {
        Self { rung: Mutex::new(false), heard: Condvar::new() }
    }

    fn ring(&self) {
        *self.rung.lock() = true;
        self.heard.notify_one();
    }

    fn wait(&self) {
        let mut rung = self.rung.lock();
        while !*rung {
            self.heard.wait(&mut rung);
        }
        *rung = false;
    }
}

/// What both processes see; slots and tickets have the same numbers, as there is one of each.
struct Link {
    heap: HeapPage,
    payload: UnsafeCell<()>,
    data: Doorbell,
    credit: Doorbell,
}

// SAFETY: the cell is never dereferenced: it only lets loom see who reads and writes when, and fail the model if a write is
// concurrent with anything.
unsafe impl Sync for Link {}

impl Link {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            heap: HeapPage::new(1),
            payload: UnsafeCell::new(()),
            data: Doorbell::new(),
            credit: Doorbell::new(),
        })
    }

    fn page(&self) -> Page<'_> {
        self.heap.page()
    }
}

struct Publisher<'a> {
    link: &'a Link,
    producer: Producer,
    collector: Collector,
    tickets: Tickets<()>,
    next_seq: u64,
}

impl<'a> Publisher<'a> {
    fn new(link: &'a Link) -> Self {
        Self {
            link,
            producer: Producer::new(),
            collector: Collector::new(),
            tickets: Tickets::new(1),
            next_seq: 0,
        }
    }

    fn reclaim(&mut self) {
        let tickets = &mut self.tickets;
        let free = tickets.free();
        let give_back = |released: Released| {
            released.for_each(|ticket| tickets.reclaim(ticket).expect("an honest subscriber"));
            Ok(())
        };
        self.collector.collect(self.link.page(), usize::MAX, give_back).unwrap();
        self.producer.fetch(self.link.page(), free..self.tickets.free());
    }

    /// Takes back the oldest message if the subscriber has not got it.
    fn take_back(&mut self) -> bool {
        let Some(position) = self.producer.take_back(self.link.page()).unwrap() else { return false };
        let ticket = self.tickets.at_position(position).expect("an honest subscriber");
        self.tickets.reclaim(ticket).is_some()
    }

    /// Writes a message into the slot and puts it on the link, if the ticket is free.
    fn try_send(&mut self) -> bool {
        let Ok(ticket) = self.tickets.issue(self.producer.position(), ()) else { return false };
        self.link.payload.with_mut(|_written| ());
        let descriptor = Descriptor { seq: self.next_seq, segment: 0, offset: 0, len: 0, ticket };
        self.producer.push(self.link.page(), descriptor);
        self.next_seq += 1;
        true
    }

    fn ring_if_armed(&self) {
        bell::fence_before_looking();
        if bell::must_ring_after_fence(&self.link.page().control.data_armed) == Wake::Ring {
            self.link.data.ring();
        }
    }

    /// As `OnFull::Wait` does.
    fn send(&mut self) {
        while !self.try_send() {
            self.reclaim();
            if self.try_send() {
                break;
            }
            arm(&self.link.page().control.credit_armed);
            self.reclaim();
            if self.try_send() {
                break;
            }
            self.link.credit.wait();
        }
        self.ring_if_armed();
    }

    /// As `OnFull::DropOldest` does: `false` if the message was dropped, because the subscriber holds what is there.
    fn send_or_drop(&mut self) -> bool {
        if !self.try_send() {
            self.reclaim();
            if !self.try_send() && !(self.take_back() && self.try_send()) {
                self.next_seq += 1;
                self.producer.offer(self.link.page(), self.next_seq);
                self.ring_if_armed();
                return false;
            }
        }
        self.ring_if_armed();
        true
    }
}

struct Subscriber<'a> {
    link: &'a Link,
    consumer: Consumer,
    hold: Hold,
}

impl<'a> Subscriber<'a> {
    fn new(link: &'a Link) -> Self {
        Self { link, consumer: Consumer::new(CLAIM_MAX), hold: Hold::default() }
    }

    fn try_receive(&mut self) -> Option<u64> {
        match self.consumer.pop(self.link.page()).unwrap() {
            Popped::Message(message) => {
                assert!(self.hold.begin(), "a ticket that is still held");
                Some(message.seq)
            }
            Popped::Empty => None,
            Popped::Contended => unreachable!("so many take-backs do not happen here"),
        }
    }

    fn receive(&mut self) -> u64 {
        loop {
            if let Some(seq) = self.try_receive() {
                return seq;
            }
            arm(&self.link.page().control.data_armed);
            if let Some(seq) = self.try_receive() {
                return seq;
            }
            self.link.data.wait();
        }
    }

    fn read(&self) {
        self.link.payload.with(|_read| ());
    }

    fn release(&self) {
        if self.hold.end() && release(self.link.page(), 0) == Wake::Ring {
            self.link.credit.ring();
        }
    }
}

fn model(preemptions: usize, link: impl Fn() + Sync + Send + 'static) {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(preemptions);
    model.check(link);
}

#[test]
fn loom_link_with_one_ticket_carries_each_message_once_and_both_sides_wake() {
    model(3, || {
        let link = Link::new();
        let subscriber = thread::spawn({
            let link = link.clone();
            move || {
                let mut subscriber = Subscriber::new(&link);
                for seq in 0..3 {
                    assert_eq!(subscriber.receive(), seq);
                    subscriber.read();
                    subscriber.release();
                }
            }
        });
        let mut publisher = Publisher::new(&link);
        for _ in 0..3 {
            publisher.send();
        }
        subscriber.join().unwrap();
    });
}

#[test]
fn loom_link_that_drops_the_oldest_loses_nothing_uncounted() {
    model(3, || {
        let link = Link::new();
        let subscriber = thread::spawn({
            let link = link.clone();
            move || {
                let mut subscriber = Subscriber::new(&link);
                let mut received = Vec::new();
                for _ in 0..2 {
                    if let Some(seq) = subscriber.try_receive() {
                        subscriber.read();
                        subscriber.release();
                        received.push(seq);
                    }
                }
                received
            }
        });
        let mut publisher = Publisher::new(&link);
        let sent: Vec<u64> = (0..3).filter(|_| publisher.send_or_drop()).collect();
        let mut received = subscriber.join().unwrap();
        // What is left on the link: at most one, and the newest that was not dropped.
        publisher.reclaim();
        if publisher.take_back() {
            received.push(*sent.last().unwrap());
        }
        assert!(received.is_sorted_by(|a, b| a < b), "{received:?}");
        assert!(received.iter().all(|seq| sent.contains(seq)), "{received:?} of {sent:?}");
        assert_eq!(publisher.tickets.outstanding(), 0, "every ticket is back");
    });
}

/// The subscriber is killed after so many steps: the publisher blocks on it until its end, and has everything back by that
/// alone.
fn subscriber_dies_after(steps: usize) {
    model(3, move || {
        let link = Link::new();
        let subscriber = thread::spawn({
            let link = link.clone();
            move || {
                let mut subscriber = Subscriber::new(&link);
                let step = std::cell::Cell::new(0);
                let alive = || step.replace(step.get() + 1) < steps;
                while alive() {
                    let Some(_) = subscriber.try_receive() else { continue };
                    if !alive() {
                        return;
                    }
                    subscriber.read();
                    if !alive() {
                        return;
                    }
                    let _ = subscriber.hold.end();
                    // Between the release and the ring that it owes, too.
                    let wake = release(link.page(), 0);
                    if !alive() {
                        return;
                    }
                    if wake == Wake::Ring {
                        link.credit.ring();
                    }
                }
            }
        });
        let mut publisher = Publisher::new(&link);
        let mut accepted = 0;
        while accepted < 2 {
            publisher.reclaim();
            if publisher.try_send() {
                publisher.ring_if_armed();
                accepted += 1;
                continue;
            }
            arm(&link.page().control.credit_armed);
            publisher.reclaim();
            if publisher.tickets.free() == 0 {
                break;
            }
        }
        // It is blocked, or through; here comes the end of the other process.
        subscriber.join().unwrap();
        let held = publisher.tickets.outstanding() as usize;
        assert_eq!(publisher.tickets.drain().count(), held);
        assert_eq!(publisher.tickets.free(), 1);
        link.payload.with_mut(|_written| ());
    });
}

#[test]
fn loom_link_of_a_subscriber_killed_at_any_step_gives_everything_back() {
    for steps in 0..6 {
        subscriber_dies_after(steps);
    }
}

/// The publisher is killed between any two steps: what is on the link is read, once, and nothing that was half done is seen.
#[test]
fn loom_link_of_a_publisher_killed_at_any_step_is_read_to_its_end() {
    for steps in 0..4 {
        model(3, move || {
            let link = Link::new();
            let publisher = thread::spawn({
                let link = link.clone();
                move || {
                    let mut publisher = Publisher::new(&link);
                    let mut left = steps;
                    while left > 0 && publisher.try_send() {
                        left -= 1;
                        if left == 0 {
                            return publisher.next_seq;
                        }
                        // The ring.
                        publisher.ring_if_armed();
                        left -= 1;
                        publisher.reclaim();
                    }
                    publisher.next_seq
                }
            });
            let mut subscriber = Subscriber::new(&link);
            let mut received = 0;
            let mut take = |subscriber: &mut Subscriber<'_>| {
                while let Some(seq) = subscriber.try_receive() {
                    assert_eq!(seq, received);
                    subscriber.read();
                    subscriber.release();
                    received += 1;
                }
            };
            take(&mut subscriber);
            arm(&link.page().control.data_armed);
            // Asleep, until the ring or the end: either makes it look again.
            let sent = publisher.join().unwrap();
            take(&mut subscriber);
            assert_eq!(received, sent);
        });
    }
}

#[test]
fn loom_link_whose_subscriber_reads_its_socket_wakes_a_publisher_that_waits_for_room_there() {
    model(3, || {
        let link = Link::new();
        // The socket: full until the subscriber has read it.
        let full = Arc::new(Mutex::new(true));
        let subscriber = thread::spawn({
            let (link, full) = (link.clone(), full.clone());
            move || {
                *full.lock() = false;
                if must_ring(&link.page().control.credit_armed) == Wake::Ring {
                    link.credit.ring();
                }
            }
        });
        while *full.lock() {
            arm(&link.page().control.credit_armed);
            if !*full.lock() {
                break;
            }
            link.credit.wait();
        }
        subscriber.join().unwrap();
    });
}
