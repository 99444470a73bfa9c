//! The floor: a bare ring in a shared page and a bell, with nothing else that a transport needs: no pool, no second
//! receiver, no discovery, no check of what the other side wrote, no recovery from its death.
#![allow(unsafe_code)]

use std::sync::atomic::{AtomicU64, Ordering};

use super::bell::{A_RECEIVER, Bell};
use super::{Peer, Rx, Tx};
use crate::board::{map, shared_file};
use crate::case::Case;
use crate::payload;

/// A ring whose ends wait by the bell `B`.
pub(crate) struct Floor<B>(std::marker::PhantomData<B>);

impl<B: Bell> Peer for Floor<B> {
    type Tx = Writer<B>;
    type Rx = Reader<B>;
}

/// The same for several receivers, each with a ring of its own.
pub(crate) struct Floors<B>(std::marker::PhantomData<B>);

impl<B: Bell> Peer for Floors<B> {
    type Tx = Writers<B>;
    type Rx = ReaderOfMany<B>;
}

#[repr(C)]
struct Head {
    /// Messages written; by the writer.
    tail: Line,
    /// Messages read; by the reader.
    head: Line,
}

#[repr(C, align(128))]
struct Line(AtomicU64);

/// The mapped ring, as both ends see it.
struct Ring {
    head: &'static Head,
    slots: *mut u8,
    size: usize,
    capacity: u64,
}

impl Ring {
    fn open(case: &Case, topic: &str) -> Self {
        let capacity = case.depth.next_power_of_two();
        let bytes = size_of::<Head>() + capacity * case.size;
        let memory = map(&shared_file(&case.dir.join(topic), bytes), bytes);
        // SAFETY: the mapping is page-aligned, at least as large as a `Head`, zeroed by the kernel, never unmapped, and
        // the head is accessed atomically only.
        let head = unsafe { &*memory.cast::<Head>() };
        let slots = memory.wrapping_add(size_of::<Head>());
        Self { head, slots, size: case.size, capacity: capacity as u64 }
    }

    fn slot(&self, position: u64) -> *mut u8 {
        self.slots.wrapping_add((position & (self.capacity - 1)) as usize * self.size)
    }
}

pub(crate) struct Writer<B> {
    ring: Ring,
    tail: u64,
    /// The reader's position when it was last looked at.
    head: u64,
    bell: B,
    room: B,
}

impl<B: Bell> Tx for Writer<B> {
    async fn open(case: &Case, topic: &'static str) -> Self {
        let ring = Ring::open(case, topic);
        let [bell, room] = B::pair(case, topic);
        Self { ring, tail: 0, head: 0, bell, room }
    }

    async fn connected(&mut self, _: usize) {}

    async fn send(&mut self, size: usize, number: u64) {
        assert_eq!(size, self.ring.size);
        while self.tail - self.head == self.ring.capacity {
            self.head = self.ring.head.head.0.load(Ordering::Acquire);
            if self.tail - self.head == self.ring.capacity {
                let head = &self.ring.head.head.0;
                let full = self.tail - self.ring.capacity;
                self.room.wait(|| head.load(Ordering::Acquire) != full).await;
            }
        }
        // SAFETY: the reader has read this slot, or never had it, and does not look at it before the tail is stored.
        let slot = unsafe { std::slice::from_raw_parts_mut(self.ring.slot(self.tail), size) };
        payload::write(slot, number);
        self.tail += 1;
        self.ring.head.tail.0.store(self.tail, Ordering::Release);
        self.bell.ring();
    }
}

pub(crate) struct Reader<B> {
    ring: Ring,
    head: u64,
    /// The writer's position when it was last looked at.
    tail: u64,
    bell: B,
    room: B,
}

impl<B: Bell> Rx for Reader<B> {
    async fn open(case: &Case, topic: &'static str) -> Self {
        let ring = Ring::open(case, topic);
        let [bell, room] = B::pair(case, topic);
        Self { ring, head: 0, tail: 0, bell, room }
    }

    async fn recv<T>(&mut self, look: impl FnOnce(&[u8]) -> T) -> T {
        while self.tail == self.head {
            self.tail = self.ring.head.tail.0.load(Ordering::Acquire);
            if self.tail == self.head {
                let (tail, empty) = (&self.ring.head.tail.0, self.head);
                self.bell.wait(|| tail.load(Ordering::Acquire) != empty).await;
            }
        }
        // SAFETY: the writer has stored a tail beyond this slot and leaves it alone until the head is stored.
        let slot = unsafe { std::slice::from_raw_parts(self.ring.slot(self.head), self.ring.size) };
        let seen = look(slot);
        let was_full = self.tail - self.head == self.ring.capacity;
        self.head += 1;
        self.ring.head.head.0.store(self.head, Ordering::Release);
        if was_full || B::RINGS_FOR_ROOM {
            self.room.ring();
        }
        seen
    }
}

pub(crate) struct Writers<B>(Vec<Writer<B>>);

impl<B: Bell> Tx for Writers<B> {
    async fn open(case: &Case, topic: &'static str) -> Self {
        let mut writers = Vec::new();
        for nth in 0..case.fars {
            writers.push(Writer::open(&alone(case, nth), topic).await);
        }
        Self(writers)
    }

    async fn connected(&mut self, _: usize) {}

    async fn send(&mut self, size: usize, number: u64) {
        for writer in &mut self.0 {
            writer.send(size, number).await;
        }
    }
}

pub(crate) struct ReaderOfMany<B>(Reader<B>);

impl<B: Bell> Rx for ReaderOfMany<B> {
    async fn open(case: &Case, topic: &'static str) -> Self {
        Self(Reader::open(&alone(case, case.nth), topic).await)
    }

    async fn recv<T>(&mut self, look: impl FnOnce(&[u8]) -> T) -> T {
        self.0.recv(look).await
    }
}

/// The case as it would be for one of its receivers alone.
fn alone(case: &Case, nth: usize) -> Case {
    let dir = case.dir.join(nth.to_string());
    std::fs::create_dir_all(&dir).expect("a directory for each receiver");
    let bells = case.bells.chunks(A_RECEIVER).nth(nth).unwrap_or_default().to_vec();
    Case { dir, bells, ..case.clone() }
}
