//! What has come from zenoh for one route and waits to be put into its topics.
//!
//! zenoh calls its subscribers where it receives, and a call that waits is what makes a sender wait: nothing more is read from that
//! connection meanwhile. Two things zenoh 1.10 does not expect of such a call, and zenoh's own channels do not spare it:
//!
//! - It receives on two threads, and what else a waiting thread was to do waits as well: connections that have nothing to do with it
//!   are not read, and found dead. So the thread is given away before it is waited for.
//! - Nor does it look whether the peer is alive, and finds it dead afterwards if that took longer than the lease (ten seconds by
//!   default). So one more message is taken after every [`BREATH`], as long as there is room for that; it is half a minute.

use std::sync::Arc;
use std::time::Duration;

use ::zenoh::sample::Sample;
use parking_lot::{Condvar, Mutex};
use tokio::sync::mpsc;

/// Messages that wait before the sender is made to, and how many more are taken while it is.
const ROOM: usize = 64;

/// Shorter than any lease.
const BREATH: Duration = Duration::from_millis(500);

#[derive(Debug, Default)]
struct Shared {
    waiting: Mutex<usize>,
    taken: Condvar,
}

/// Where zenoh puts them.
pub(super) struct Entrance<T = Sample> {
    shared: Arc<Shared>,
    messages: mpsc::UnboundedSender<T>,
}

/// Where they are taken out, in the same order.
pub(super) struct Queue<T = Sample> {
    shared: Arc<Shared>,
    messages: mpsc::UnboundedReceiver<T>,
}

pub(super) fn queue<T>() -> (Entrance<T>, Queue<T>) {
    let shared = Arc::<Shared>::default();
    let (sender, receiver) = mpsc::unbounded_channel();
    (Entrance { shared: Arc::clone(&shared), messages: sender }, Queue { shared, messages: receiver })
}

impl<T> Entrance<T> {
    /// Blocks while there is no room.
    ///
    /// # Panics
    /// In a current-thread runtime, if there is no room. (zenoh receives in none.)
    pub(super) fn push(&self, message: T) {
        if *self.shared.waiting.lock() >= ROOM {
            tokio::task::block_in_place(|| self.wait_for_room());
        }
        *self.shared.waiting.lock() += 1;
        // An error is the queue's end.
        let _ = self.messages.send(message);
    }

    fn wait_for_room(&self) {
        let Shared { waiting, taken } = &*self.shared;
        let mut waiting = waiting.lock();
        let is_full = |waiting: &mut usize| !self.messages.is_closed() && *waiting >= ROOM;
        taken.wait_while_for(&mut waiting, is_full, BREATH);
        taken.wait_while(&mut waiting, |waiting| is_full(waiting) && *waiting >= 2 * ROOM);
    }
}

impl<T> Queue<T> {
    /// The next one; `None` once nobody will put any more in.
    ///
    /// # Cancel safety
    /// Cancel safe: cancelled, nothing was taken.
    pub(super) async fn recv(&mut self) -> Option<T> {
        let message = self.messages.recv().await?;
        *self.shared.waiting.lock() -= 1;
        self.shared.taken.notify_all();
        Some(message)
    }
}

impl<T> Drop for Queue<T> {
    fn drop(&mut self) {
        self.messages.close();
        // So that nobody is between looking and waiting.
        drop(self.shared.waiting.lock());
        self.shared.taken.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;
    use std::time::Instant;

    #[tokio::test]
    async fn zenoh_queue_that_is_full_makes_wait_until_something_is_taken() {
        let (entrance, mut queue) = queue();
        let putting = thread::spawn(move || (0..1_000).for_each(|n| entrance.push(n)));
        for n in 0..1_000 {
            assert_eq!(queue.recv().await, Some(n));
            assert!(*queue.shared.waiting.lock() <= 2 * ROOM);
        }
        assert_eq!(queue.recv().await, None);
        putting.join().unwrap();
    }

    #[test]
    fn zenoh_queue_that_is_full_takes_one_more_now_and_then() {
        let (entrance, _queue) = queue();
        (0..ROOM).for_each(|n| entrance.push(n));
        let start = Instant::now();
        entrance.push(ROOM);
        assert!(start.elapsed() >= BREATH);
    }

    #[test]
    fn zenoh_queue_that_ends_lets_everybody_go() {
        let (entrance, queue) = queue();
        *queue.shared.waiting.lock() = 2 * ROOM;
        let putting = thread::spawn(move || (0..1_000).for_each(|n| entrance.push(n)));
        drop(queue);
        putting.join().unwrap();
    }
}
