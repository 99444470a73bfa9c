//! `crossbeam_queue::ArrayQueue`, step by step as in its version 0.3.
//!
//! Pushing counts the tail up by a compare-exchange and ends with a plain store of the stamp; popping goes by the stamp, and where that
//! says empty by the tail, after a fence of its own. What a model needs to see beyond that our code has to order itself.

use std::fmt;
use std::sync::Mutex;

use ::loom::sync::atomic::{AtomicUsize, Ordering, fence};
use ::loom::thread::yield_now;

pub(crate) struct ArrayQueue<T> {
    head: AtomicUsize,
    tail: AtomicUsize,
    places: Box<[Place<T>]>,
    /// The smallest power of two above the capacity: below it is the index in a position, above it the lap.
    one_lap: usize,
}

struct Place<T> {
    stamp: AtomicUsize,
    /// By std's lock, which loom does not know of: it orders nothing, and is never waited for.
    value: Mutex<Option<T>>,
}

impl<T> ArrayQueue<T> {
    pub(crate) fn new(capacity: usize) -> Self {
        assert!(capacity > 0, "capacity must be non-zero");
        let place = |index| Place { stamp: AtomicUsize::new(index), value: Mutex::new(None) };
        Self {
            head: AtomicUsize::new(0),
            tail: AtomicUsize::new(0),
            places: (0..capacity).map(place).collect(),
            one_lap: (capacity + 1).next_power_of_two(),
        }
    }

    pub(crate) fn push(&self, item: T) -> Result<(), T> {
        let mut tail = self.tail.load(Ordering::Relaxed);
        loop {
            let place = self.place(tail);
            let stamp = place.stamp.load(Ordering::Acquire);
            if stamp == tail {
                match self.tail.compare_exchange(tail, self.after(tail), Ordering::SeqCst, Ordering::Relaxed)
                {
                    Ok(_) => {
                        *place.value.lock().unwrap() = Some(item);
                        place.stamp.store(tail + 1, Ordering::Release);
                        return Ok(());
                    }
                    Err(now) => tail = now,
                }
            } else {
                if stamp.wrapping_add(self.one_lap) == tail + 1 {
                    fence(Ordering::SeqCst);
                    if self.head.load(Ordering::Relaxed).wrapping_add(self.one_lap) == tail {
                        return Err(item);
                    }
                }
                yield_now();
                tail = self.tail.load(Ordering::Relaxed);
            }
        }
    }

    pub(crate) fn pop(&self) -> Option<T> {
        let mut head = self.head.load(Ordering::Relaxed);
        loop {
            let place = self.place(head);
            let stamp = place.stamp.load(Ordering::Acquire);
            if stamp == head + 1 {
                match self.head.compare_exchange(head, self.after(head), Ordering::SeqCst, Ordering::Relaxed)
                {
                    Ok(_) => {
                        let item = place.value.lock().unwrap().take();
                        place.stamp.store(head.wrapping_add(self.one_lap), Ordering::Release);
                        return item;
                    }
                    Err(now) => head = now,
                }
            } else {
                if stamp == head {
                    fence(Ordering::SeqCst);
                    if self.tail.load(Ordering::Relaxed) == head {
                        return None;
                    }
                }
                // Pushed, and not stamped yet.
                yield_now();
                head = self.head.load(Ordering::Relaxed);
            }
        }
    }

    pub(crate) fn len(&self) -> usize {
        loop {
            let tail = self.tail.load(Ordering::SeqCst);
            let head = self.head.load(Ordering::SeqCst);
            if self.tail.load(Ordering::SeqCst) == tail {
                let (head_index, tail_index) = (self.index(head), self.index(tail));
                return match () {
                    () if head_index < tail_index => tail_index - head_index,
                    () if head_index > tail_index => self.capacity() - head_index + tail_index,
                    () if tail == head => 0,
                    () => self.capacity(),
                };
            }
            yield_now();
        }
    }

    pub(crate) fn capacity(&self) -> usize {
        self.places.len()
    }

    fn index(&self, position: usize) -> usize {
        position & (self.one_lap - 1)
    }

    fn place(&self, position: usize) -> &Place<T> {
        &self.places[self.index(position)]
    }

    fn after(&self, position: usize) -> usize {
        if self.index(position) + 1 < self.capacity() {
            position + 1
        } else {
            (position & !(self.one_lap - 1)).wrapping_add(self.one_lap)
        }
    }
}

impl<T> fmt::Debug for ArrayQueue<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ArrayQueue").finish_non_exhaustive()
    }
}
