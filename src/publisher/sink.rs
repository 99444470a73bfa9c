//! The `Sink` of a publisher: `poll_ready` reserves a place, `start_send` is the acceptance, `poll_flush` wakes the subscribers.
//!
//! `start_send` puts the message into the queue. From there messages go on their links together, a batch at a time or with the flush:
//! a message by itself has the publisher wait for cache lines that its subscriber is just reading.

use std::fmt;
use std::future::Future;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use futures::Sink;

use super::shared::{Queued, Shared};
use super::staged::Staged;
use super::{SENDS, SendErrorKind, ShmPublisher, SinkError};
use crate::buffer::Payload;
use crate::line::{Joined, NoPlace};
use crate::sync::Mutex;

/// With so many messages (or half the queue) or so many bytes they are delivered, flush or not.
const BATCH: usize = 64;
const BATCH_BYTES: usize = 64 << 10;

type Waiting<T> = Option<Pin<Box<dyn Future<Output = T> + Send>>>;

/// The place in line that a sink has reserved.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum Place {
    #[default]
    None,
    /// With the message before, to save a step. Given up by a flush.
    Kept,
    /// By a `poll_ready`, for the next `start_send`.
    Ready,
}

/// What one handle's sink is in the middle of. The futures are made only where there is something to wait for.
#[derive(Default)]
pub(super) struct SinkState {
    place: Place,
    /// The state of the line when this sink last changed it.
    word: u64,
    /// So many messages, and bytes, were accepted since the last delivery that this sink saw to.
    batch: usize,
    batch_bytes: usize,
    /// Messages since this sink last let other tasks run, if they wanted to.
    fed: u32,
    // Only ever used through `&mut`; the lock makes the handle `Sync`.
    making_ready: Mutex<Waiting<Result<(), NoPlace>>>,
    flushing: Mutex<Waiting<bool>>,
}

impl SinkState {
    /// Gives up the reserved place, if there is one, and has delivered what nobody is going to flush any more.
    pub(super) fn release(&mut self, shared: &Shared) {
        if std::mem::take(&mut self.place) != Place::None {
            give_up(shared);
        }
        if self.batch > 0 {
            self.deliver(shared);
        }
    }

    fn deliver(&mut self, shared: &Shared) {
        self.batch = 0;
        self.batch_bytes = 0;
        shared.pump();
    }

    fn poll_reserve(&mut self, shared: &Arc<Shared>, cx: &mut Context<'_>) -> Poll<Result<(), NoPlace>> {
        if self.fed >= SENDS {
            // As for `send`: a sink that never has to wait must let other tasks run now and then, the tx task among them.
            ready!(pin!(tokio::task::coop::consume_budget()).poll(cx));
            self.fed = 0;
        }
        if self.place == Place::Kept {
            if shared.starved_for().is_some() || !shared.backlog_has_room() {
                self.give_up_kept(shared);
            } else {
                self.place = Place::Ready;
            }
        }
        if self.place == Place::Ready {
            return Poll::Ready(Ok(()));
        }
        let waiting = self.making_ready.get_mut();
        let made = match waiting {
            Some(waiting) => ready!(waiting.as_mut().poll(cx)),
            None => match make_ready(shared, &mut self.word) {
                Some(made) => made,
                None => {
                    let shared = Arc::clone(shared);
                    let wait = async move { shared.sinks.wait_until(|| make_ready(&shared, &mut 0)).await };
                    ready!(waiting.insert(Box::pin(wait)).as_mut().poll(cx))
                }
            },
        };
        *waiting = None;
        if made.is_ok() {
            self.place = Place::Ready;
        }
        Poll::Ready(made)
    }

    fn poll_flush(&mut self, shared: &Arc<Shared>, cx: &mut Context<'_>) -> Poll<bool> {
        let mut flushing = match self.flushing.get_mut().take() {
            Some(flushing) => flushing,
            None => {
                self.give_up_kept(shared);
                let target = shared.flush_target();
                self.deliver(shared);
                if let Some(flushed) = shared.flushed(target) {
                    return Poll::Ready(flushed);
                }
                let shared = Arc::clone(shared);
                Box::pin(async move { shared.flushed.wait_until(|| shared.flushed(target)).await })
            }
        };
        let flushed = flushing.as_mut().poll(cx);
        if flushed.is_pending() {
            *self.flushing.get_mut() = Some(flushing);
        }
        flushed
    }

    fn give_up_kept(&mut self, shared: &Shared) {
        if self.place == Place::Kept {
            self.place = Place::None;
            give_up(shared);
        }
    }
}

impl ShmPublisher {
    /// Gets the message into shared memory, or into the heap while the pool is at its cap.
    #[inline]
    fn stage_or_box<B: Payload>(
        &self,
        staged: &mut Staged<B>,
    ) -> Result<Option<Box<Box<[u8]>>>, SendErrorKind> {
        if staged.is_ready(self.home()) {
            return Ok(None);
        }
        let copied = staged.copy(|bytes| match self.try_loan(bytes.len()) {
            Ok(loan) => Ok(loan.into_segment()),
            Err(error) if error.is_full() => Err(Ok(Box::new(bytes.into()))),
            Err(error) => Err(Err(error.into())),
        });
        match copied {
            Ok(len) => {
                self.count_copied(len);
                Ok(None)
            }
            Err(heap) => heap.map(Some),
        }
    }
}

/// Lets others have a reserved place.
fn give_up(shared: &Shared) {
    shared.line().cancel_reserved();
    shared.wake_for_room();
}

/// What a waiting sink tries: it may be that only what sinks accepted without a signal fills the queue.
fn make_ready(shared: &Shared, word: &mut u64) -> Option<Result<(), NoPlace>> {
    try_reserve(shared, word).or_else(|| {
        shared.pump();
        try_reserve(shared, word)
    })
}

/// `None`: not now. While a message waits in the heap for memory nobody gets a place, so that such are few.
fn try_reserve(shared: &Shared, word: &mut u64) -> Option<Result<(), NoPlace>> {
    if (shared.starved_for().is_some() || !shared.backlog_has_room()) && !shared.is_closed() {
        return None;
    }
    match shared.line().reserve(word) {
        Err(NoPlace::Full) => None,
        reserved => Some(reserved),
    }
}

/// What is fed is delivered by the flush, or when half the queue (64 messages at most) or 64 KiB have come together; and at once while
/// anybody waits for a place, for memory or for the end.
///
/// `start_send` is the acceptance: what `feed` or `start_send` returned `Ok` for will be delivered, and what they did
/// not return `Ok` for was not sent. `SinkExt::send` is `feed` and then `flush`: cancelled while it flushes, its message
/// may have been accepted. (The inherent [`send`](ShmPublisher::send) has no such doubt.)
///
/// A message fed while the pool is at its cap waits in the heap until there is room for it in the pool; until then
/// `poll_ready` is pending.
impl<B: Payload> Sink<B> for ShmPublisher {
    type Error = SinkError<B::Returned>;

    fn poll_ready(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        let this = self.get_mut();
        let reserved = ready!(this.sink.poll_reserve(&this.shared, cx));
        Poll::Ready(reserved.map_err(|_| SinkError::new(this.shared.refusal().into(), None)))
    }

    fn start_send(self: Pin<&mut Self>, buf: B) -> Result<(), Self::Error> {
        let this = self.get_mut();
        assert!(this.sink.place == Place::Ready, "start_send without a poll_ready that was ready");
        let mut staged = Staged::new(buf);
        let heap = match this.stage_or_box(&mut staged) {
            Ok(heap) => heap,
            Err(kind) => {
                this.sink.place = Place::None;
                give_up(&this.shared);
                return Err(SinkError::new(kind, Some(staged.into_buf().into_returned())));
            }
        };
        // Not sooner: with a message whose `as_bytes` panics the place is still this sink's.
        this.sink.place = Place::None;
        // A flush that was given up would not wait for this message.
        *this.sink.flushing.get_mut() = None;
        let ready = heap.is_none();
        let len = heap.as_ref().map_or_else(|| staged.len(), |bytes| bytes.len());
        let queued = || heap.map_or_else(|| this.shared.queued(staged.take()), Queued::Heap);
        // While a message waits in the heap nobody is to have a place for another.
        let missed = match this.shared.line().join_reserved(&mut this.sink.word, ready, queued) {
            Ok(Joined { missed, kept }) => {
                if kept {
                    this.sink.place = Place::Kept;
                }
                missed
            }
            Err(_) => {
                return Err(SinkError::new(
                    this.shared.refusal().into(),
                    Some(staged.into_buf().into_returned()),
                ));
            }
        };
        this.sink.fed += 1;
        this.sink.batch += 1;
        this.sink.batch_bytes += len;
        // Nobody is to wait, for a place, for memory or for the end, until this sink happens to be flushed: whoever has come by now is seen
        // (joining ends with a fence), and whoever comes later sees the message. A delivery that came before the message was there has left
        // what is behind it as well.
        let most = (this.shared.config.queue as usize / 2).clamp(1, BATCH);
        let is_due = this.sink.batch >= most || this.sink.batch_bytes >= BATCH_BYTES || missed;
        if is_due || this.shared.is_waited_for() {
            this.sink.deliver(&this.shared);
        }
        Ok(())
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        let this = self.get_mut();
        match ready!(this.sink.poll_flush(&this.shared, cx)) {
            true => Poll::Ready(Ok(())),
            false => Poll::Ready(Err(SinkError::new(this.shared.refusal().into(), None))),
        }
    }

    /// Flushes. The publisher closes when its last clone is dropped.
    fn poll_close(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Sink::<B>::poll_flush(self, cx)
    }
}

impl fmt::Debug for SinkState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SinkState").field("place", &self.place).finish_non_exhaustive()
    }
}
