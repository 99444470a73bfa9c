//! The places of the tx queue: who may push into it, and when nobody may any more.
//!
//! One word, so that "the publisher is open" and "there is a place" are one question with one answer.

use crate::sync::atomic::{AtomicU64, Ordering};

const CLOSED: u64 = 1 << 63;
const RESERVED: u64 = 1 << 32;
const FREE: u64 = RESERVED - 1;

/// Bits 0..32: free places. Bits 32..63: places reserved by a sink that has not used them yet. Bit 63: closed.
///
/// Senders take a free place, or reserve one and use it later; delivery gives places back; closing is for good. All
/// by read-modify-write.
#[derive(Debug)]
pub(crate) struct Places {
    word: AtomicU64,
    total: u64,
}

/// Why there is no place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum NoPlace {
    Full,
    Closed,
}

impl Places {
    pub(crate) fn new(total: u32) -> Self {
        Self { word: AtomicU64::new(u64::from(total)), total: u64::from(total) }
    }

    /// Takes a place, to be pushed into at once.
    #[inline]
    pub(crate) fn take(&self) -> Result<(), NoPlace> {
        self.change(|word| if word & FREE == 0 { Err(NoPlace::Full) } else { Ok(word - 1) })
    }

    /// Keeps a place for later.
    pub(crate) fn reserve(&self) -> Result<(), NoPlace> {
        self.change(|word| if word & FREE == 0 { Err(NoPlace::Full) } else { Ok(word - 1 + RESERVED) })
    }

    /// Turns a reserved place into one to be pushed into at once.
    pub(crate) fn use_reserved(&self) -> Result<(), NoPlace> {
        self.change(|word| Ok(word - RESERVED))
    }

    /// Gives up a reserved place unused.
    pub(crate) fn cancel_reserved(&self) {
        self.word.fetch_sub(RESERVED - 1, Ordering::AcqRel);
    }

    /// Gives back `count` places that were pushed into.
    #[inline]
    pub(crate) fn give_back(&self, count: u64) {
        self.word.fetch_add(count, Ordering::AcqRel);
    }

    pub(crate) fn close(&self) {
        self.word.fetch_or(CLOSED, Ordering::AcqRel);
    }

    #[inline]
    pub(crate) fn is_closed(&self) -> bool {
        self.word.load(Ordering::Acquire) & CLOSED != 0
    }

    /// Whether every place taken has been given back: once closed, that is for good.
    pub(crate) fn all_back(&self) -> bool {
        let word = self.word.load(Ordering::Acquire);
        (word & FREE) + ((word & !CLOSED) / RESERVED) == self.total
    }

    #[inline]
    fn change(&self, step: impl Fn(u64) -> Result<u64, NoPlace>) -> Result<(), NoPlace> {
        let mut word = self.word.load(Ordering::Relaxed);
        loop {
            if word & CLOSED != 0 {
                return Err(NoPlace::Closed);
            }
            // AcqRel: a place taken was given back after its message had left the queue, and `all_back` sees what was
            // pushed into the places it counts.
            match self.word.compare_exchange_weak(word, step(word)?, Ordering::AcqRel, Ordering::Relaxed) {
                Ok(_) => return Ok(()),
                Err(now) => word = now,
            }
        }
    }
}

#[cfg(all(test, tokio_shm_loom))]
mod loom_tests {
    use super::*;
    use crate::sync::ArrayQueue;
    use crate::turnstile::Turnstile;
    use loom::sync::Arc;
    use loom::sync::atomic::AtomicBool;
    use loom::thread;

    /// What of a publisher decides when it is done, with numbers for messages.
    struct Publisher {
        places: Places,
        queue: ArrayQueue<u32>,
        delivered: Turnstile<u32>,
        done: AtomicBool,
    }

    impl Publisher {
        fn send(&self) -> bool {
            if self.places.take().is_err() {
                return false;
            }
            self.queue.push(1).expect("as many places as the queue is long");
            self.pump();
            true
        }

        fn close(&self) {
            self.places.close();
            self.pump();
        }

        /// Delivers, and is done when nothing can come any more; again for whoever knocked.
        fn pump(&self) {
            while let Some(mut delivered) = self.delivered.enter() {
                while let Some(message) = self.queue.pop() {
                    assert!(!self.done.load(Ordering::Relaxed), "a message after the end");
                    *delivered += message;
                    self.places.give_back(1);
                }
                if self.places.is_closed() && self.places.all_back() && self.queue.is_empty() {
                    self.done.store(true, Ordering::Relaxed);
                }
                if !delivered.leave() {
                    return;
                }
            }
        }
    }

    // Tried: with `all_back` looking for a free place only, as if one taken were none of its business, loom finds the end
    // that comes before an accepted message.
    #[test]
    fn loom_message_accepted_during_a_close_is_delivered_before_the_end() {
        loom::model(|| {
            let publisher = Arc::new(Publisher {
                places: Places::new(2),
                queue: ArrayQueue::new(2),
                delivered: Turnstile::new(0),
                done: AtomicBool::new(false),
            });
            let sender = thread::spawn({
                let publisher = publisher.clone();
                move || publisher.send()
            });
            publisher.close();
            let accepted = sender.join().unwrap();
            publisher.pump();
            let delivered = publisher.delivered.enter().unwrap();
            assert_eq!(*delivered, u32::from(accepted));
            assert!(publisher.done.load(Ordering::Relaxed));
            let _ = delivered.leave();
        });
    }
}

#[cfg(all(test, not(tokio_shm_loom)))]
mod tests {
    use super::*;

    #[test]
    fn places_run_out_and_come_back() {
        let places = Places::new(2);
        assert_eq!(places.take(), Ok(()));
        assert_eq!(places.reserve(), Ok(()));
        assert_eq!(places.take(), Err(NoPlace::Full));
        assert!(!places.all_back());
        places.cancel_reserved();
        places.give_back(1);
        assert!(places.all_back());
    }

    #[test]
    fn places_reserved_are_no_obstacle_to_an_end() {
        let places = Places::new(2);
        assert_eq!(places.reserve(), Ok(()));
        places.close();
        assert!(places.all_back());
        assert_eq!(places.use_reserved(), Err(NoPlace::Closed));
        places.cancel_reserved();
        assert!(places.all_back() && places.is_closed());
    }
}
