//! The `Sink` of a publisher: `poll_ready` reserves a place, `start_send` is the acceptance, `poll_flush` wakes the subscribers.
//!
//! With nobody else delivering, `start_send` puts the message on its links at once and needs no place. Otherwise the message goes
//! into the queue, and `poll_flush` delivers it.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::task::{Context, Poll, ready};

use futures::Sink;
use parking_lot::Mutex;

use super::shared::{Queued, Shared};
use super::staged::Staged;
use super::{SendErrorKind, ShmPublisher, SinkError};
use crate::buffer::Payload;
use crate::places::NoPlace;

/// After so many messages subscribers are woken, flush or not.
const SILENT: usize = 64;

type Waiting<T> = Option<Pin<Box<dyn Future<Output = T> + Send>>>;

/// What one handle's sink is in the middle of. The futures are made only where there is something to wait for.
#[derive(Default)]
pub(super) struct SinkState {
    reserved: bool,
    /// So many messages were accepted without a signal since the last one, or since the last flush began.
    unsignalled: usize,
    // Only ever used through `&mut`; the lock makes the handle `Sync`.
    making_ready: Mutex<Waiting<Result<(), NoPlace>>>,
    flushing: Mutex<Waiting<bool>>,
}

impl SinkState {
    /// Gives up the reserved place, if there is one, and has delivered what nobody is going to flush any more.
    pub(super) fn release(&mut self, shared: &Shared) {
        if std::mem::take(&mut self.reserved) {
            give_up(shared);
            // A closing publisher waits for its places.
            shared.notify();
        }
        if std::mem::take(&mut self.unsignalled) > 0 {
            shared.pump();
        }
    }

    fn poll_reserve(&mut self, shared: &Arc<Shared>, cx: &mut Context<'_>) -> Poll<Result<(), NoPlace>> {
        if self.reserved {
            return Poll::Ready(Ok(()));
        }
        let waiting = self.making_ready.get_mut();
        let made = match waiting {
            Some(waiting) => ready!(waiting.as_mut().poll(cx)),
            None => match try_reserve(shared) {
                Some(made) => made,
                None => {
                    let shared = Arc::clone(shared);
                    let wait = async move { shared.sinks.wait_until(|| make_ready(&shared)).await };
                    ready!(waiting.insert(Box::pin(wait)).as_mut().poll(cx))
                }
            },
        };
        *waiting = None;
        self.reserved = made.is_ok();
        Poll::Ready(made)
    }

    fn poll_flush(&mut self, shared: &Arc<Shared>, cx: &mut Context<'_>) -> Poll<bool> {
        let waiting = self.flushing.get_mut();
        let flushed = match waiting {
            Some(waiting) => ready!(waiting.as_mut().poll(cx)),
            None => {
                self.unsignalled = 0;
                shared.pump();
                let target = shared.flush_target();
                match shared.flushed(target) {
                    Some(flushed) => flushed,
                    None => {
                        let shared = Arc::clone(shared);
                        let wait = async move { shared.flushed.wait_until(|| shared.flushed(target)).await };
                        ready!(waiting.insert(Box::pin(wait)).as_mut().poll(cx))
                    }
                }
            }
        };
        *waiting = None;
        Poll::Ready(flushed)
    }
}

/// Lets others have a reserved place.
fn give_up(shared: &Shared) {
    shared.places().cancel_reserved();
    shared.wake_for_room(1);
}

/// What a waiting sink tries: it may be that only what sinks accepted without a signal fills the queue.
fn make_ready(shared: &Shared) -> Option<Result<(), NoPlace>> {
    try_reserve(shared).or_else(|| {
        shared.pump();
        try_reserve(shared)
    })
}

/// `None`: not now. While a message waits in the heap for memory nobody gets a place, so that such are few.
fn try_reserve(shared: &Shared) -> Option<Result<(), NoPlace>> {
    if shared.starved_for().is_some() && !shared.is_closed() {
        return None;
    }
    match shared.places().reserve() {
        Err(NoPlace::Full) => None,
        reserved => Some(reserved),
    }
}

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
        Poll::Ready(reserved.map_err(|_| SinkError::new(SendErrorKind::Closed, None)))
    }

    fn start_send(self: Pin<&mut Self>, buf: B) -> Result<(), Self::Error> {
        let this = self.get_mut();
        assert!(std::mem::take(&mut this.sink.reserved), "start_send without a poll_ready that was ready");
        let mut staged = Staged::new(buf);
        let ready = match this.stage_now(&mut staged) {
            Ok(()) => true,
            Err(kind) if kind.is_pool_full() => false,
            Err(kind) => {
                give_up(&this.shared);
                return Err(SinkError::new(kind, Some(staged.into_buf().into_returned())));
            }
        };
        // A flush that was given up would not wait for this message.
        *this.sink.flushing.get_mut() = None;
        if ready && this.shared.feed_now(|| staged.take()) {
            give_up(&this.shared);
            this.sink.unsignalled += 1;
            if this.sink.unsignalled >= SILENT {
                // A sink that is fed for ever and never flushed lets its subscribers sleep for no longer than that.
                this.sink.unsignalled = 0;
                this.shared.pump();
            }
            return Ok(());
        }
        let places = this.shared.places();
        if places.use_reserved().is_err() {
            places.cancel_reserved();
            this.shared.notify();
            return Err(SinkError::new(SendErrorKind::Closed, Some(staged.into_buf().into_returned())));
        }
        let queued =
            if ready { Queued::Slot(staged.take()) } else { Queued::Heap(Box::new(staged.bytes().into())) };
        this.shared.push(queued);
        this.sink.unsignalled += 1;
        // Nobody is to wait, for a place or for the end, until this sink happens to be flushed. The fence stands between
        // the push and these looks: whoever has come by now is seen, and whoever comes later sees the message.
        fence(Ordering::SeqCst);
        if this.shared.is_waited_for() {
            this.shared.pump();
        }
        Ok(())
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        let this = self.get_mut();
        match ready!(this.sink.poll_flush(&this.shared, cx)) {
            true => Poll::Ready(Ok(())),
            false => Poll::Ready(Err(SinkError::new(SendErrorKind::Closed, None))),
        }
    }

    /// Flushes. The publisher closes when its last clone is dropped.
    fn poll_close(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Sink::<B>::poll_flush(self, cx)
    }
}

impl fmt::Debug for SinkState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SinkState").field("reserved", &self.reserved).finish_non_exhaustive()
    }
}
