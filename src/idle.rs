//! The idle slots of one size: a lock-free queue, and behind it a list for what does not fit.
//!
//! It knows nothing of memory or caps; what it holds is the caller's.

#[cfg(all(test, tokio_shm_loom))]
mod loom_tests;

use crate::sync::atomic::{AtomicUsize, Ordering};
use crate::sync::{ArrayQueue, Mutex};

/// Idle things of one kind; taking and putting is one queue operation while the queue suffices.
#[derive(Debug)]
pub(crate) struct Idle<T> {
    queue: ArrayQueue<T>,
    /// What was put while the queue was full. Its capacity suffices for all (`expect_at_most`): no allocation later.
    overflow: Mutex<Vec<T>>,
    /// The overflow's length, written under its lock: lets `take` pass by without the lock.
    overflowed: AtomicUsize,
}

impl<T> Idle<T> {
    pub(crate) fn new(capacity: usize) -> Self {
        Self {
            queue: ArrayQueue::new(capacity),
            overflow: Mutex::new(Vec::new()),
            overflowed: AtomicUsize::new(0),
        }
    }

    /// Makes room for `count` things, so that `put` need not allocate.
    pub(crate) fn expect_at_most(&self, count: usize) {
        let mut overflow = self.overflow.lock();
        let listed = overflow.len();
        overflow.reserve(count.saturating_sub(listed));
    }

    #[inline]
    pub(crate) fn take(&self) -> Option<T> {
        match self.queue.pop() {
            Some(thing) => Some(thing),
            None => self.take_overflow(),
        }
    }

    /// Puts one back, or hands it over if the queue is full.
    ///
    /// What `FairGate::wake` wants: from a read-modify-write on a thing is there for those who look. The queue's `push` ends with a plain
    /// store, but that is not it: it counts the queue's end up before, by a compare-exchange, and a `pop` that sees this waits for
    /// the store instead of finding nothing. (loom's stand-in has the same steps.)
    #[inline]
    pub(crate) fn try_put(&self, thing: T) -> Result<(), T> {
        self.queue.push(thing)
    }

    /// Puts one back.
    #[inline]
    pub(crate) fn put(&self, thing: T) {
        if let Err(thing) = self.queue.push(thing) {
            self.put_overflow(thing);
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.queue.len() + self.overflowed.load(Ordering::Relaxed)
    }

    pub(crate) fn take_all(&self) -> Vec<T> {
        let mut all = Vec::new();
        // Bounded: others may go on putting meanwhile.
        while all.len() < self.queue.capacity()
            && let Some(thing) = self.queue.pop()
        {
            all.push(thing);
        }
        let mut overflow = self.overflow.lock();
        self.overflowed.store(0, Ordering::Relaxed);
        all.append(&mut overflow);
        all
    }

    #[cold]
    fn put_overflow(&self, thing: T) {
        let mut overflow = self.overflow.lock();
        overflow.push(thing);
        // SYNC POINT: overflow length. A read-modify-write, because the waiters are looked at right after it.
        self.overflowed.swap(overflow.len(), Ordering::Release);
    }

    /// Takes one from the overflow and moves others into the queue.
    #[cold]
    fn take_overflow(&self) -> Option<T> {
        // SYNC POINT: overflow length. The list itself is read under the lock. With either look the queue is looked at
        // again: between the look that found it empty and this one, somebody may have moved the list into it, which wakes
        // nobody, as nothing is put by it.
        if self.overflowed.load(Ordering::Acquire) == 0 {
            return self.queue.pop();
        }
        let mut overflow = self.overflow.lock();
        let Some(taken) = overflow.pop() else { return self.queue.pop() };
        for _ in 0..self.queue.capacity() / 2 {
            let Some(thing) = overflow.pop() else { break };
            if let Err(thing) = self.queue.push(thing) {
                overflow.push(thing);
                break;
            }
        }
        // SYNC POINT: overflow length. Whoever sees that nothing is left here sees what was moved.
        self.overflowed.store(overflow.len(), Ordering::Release);
        Some(taken)
    }
}
