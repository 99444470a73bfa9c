//! [`ShmSubscriber`]: receiving the messages of a topic.
//!
//! This file is the handle; taking turns among publishers is in `core`, waiting in `waiting`.

mod builder;
mod busy;
mod core;
mod error;
mod stats;
mod waiting;

use std::fmt;
use std::future::poll_fn;
use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use futures::Stream;

pub use self::builder::ShmSubscriberBuilder;
pub use self::busy::BusyPoll;
use self::core::Core;
pub use self::error::{ConnectError, RecvError, TryRecvError};
pub use self::stats::SubscriberStats;
use self::waiting::Waits;
use crate::blocking::assert_may_block;
use crate::buffer::ShmSample;
use crate::reactor::Watched;
use crate::topic::TopicName;

/// Receives the messages of a topic, in place, from however many publishers there are.
///
/// It is a [`Stream`] too. Publishers may come, go and come back. Messages of one publisher arrive in its order; among
/// publishers it takes turns.
///
/// Dropping it leaves samples that are still held readable.
///
/// It may be awaited in one runtime and then in another; only the one in which it is awaited has to be driven.
///
/// # Examples
///
/// ```
/// use futures::StreamExt as _;
/// use tokio_shm::{ShmPublisher, ShmSubscriber};
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let dir = tempfile::tempdir()?;
/// # std::fs::set_permissions(&dir, std::os::unix::fs::PermissionsExt::from_mode(0o700))?;
/// let publisher = ShmPublisher::builder("numbers").runtime_dir(dir.path()).bind()?;
/// let mut numbers = ShmSubscriber::builder("numbers")
///     .runtime_dir(dir.path())
///     .end_with_last_publisher(true)
///     .connect()?;
/// publisher.send(&[1, 2, 3][..]).await?;
/// drop(publisher);
/// while let Some(sample) = numbers.next().await {
///     assert_eq!(&*sample?, [1, 2, 3]);
/// }
/// # Ok(())
/// # }
/// ```
#[must_use = "a subscriber that is dropped receives nothing"]
pub struct ShmSubscriber {
    topic: TopicName,
    // Before `core`: a registration goes before what it watches.
    watched: Option<Watched<OwnedFd>>,
    core: Core<Waits>,
}

/// So many messages take one unit of their task's budget, of 128: they are for some ten microseconds of work, and taking one costs
/// as much as a message.
const RECEIVED: u64 = 8;

impl ShmSubscriber {
    /// Connects to a topic with default settings; whether anybody publishes to it yet does not matter.
    ///
    /// # Errors
    ///
    /// As [`ShmSubscriberBuilder::connect`].
    pub fn connect(topic: &str) -> Result<Self, ConnectError> {
        Self::builder(topic).connect()
    }

    /// A subscriber with settings of your own.
    pub fn builder(topic: &str) -> ShmSubscriberBuilder {
        ShmSubscriberBuilder::new(topic)
    }

    /// The topic's name.
    pub fn topic(&self) -> &str {
        self.topic.as_str()
    }

    /// Receives the next message, waiting for it.
    ///
    /// # Errors
    ///
    /// [`RecvError`]: what was missed, who was lost, or the end. Except after [`RecvError::Closed`],
    /// [`RecvError::Forked`] and [`RecvError::Io`] receiving goes on.
    ///
    /// # Panics
    ///
    /// Outside a tokio runtime, or in one whose I/O is not enabled, if it has to wait.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: no message is lost.
    pub async fn recv(&mut self) -> Result<ShmSample, RecvError> {
        poll_fn(|cx| self.poll_recv(cx)).await
    }

    /// Polls for the next message; see [`recv`](Self::recv).
    ///
    /// # Errors
    ///
    /// As [`recv`](Self::recv).
    ///
    /// # Panics
    ///
    /// As [`recv`](Self::recv).
    #[inline]
    pub fn poll_recv(&mut self, cx: &mut Context<'_>) -> Poll<Result<ShmSample, RecvError>> {
        if let Some(sample) = self.next_sample() {
            return Poll::Ready(Ok(sample));
        }
        self.poll_next_item(cx)
    }

    /// The next message, if it is there and no other task has to have its turn first.
    // Inlined, as what it calls: the sample is then made where the caller wants it. (See DESIGN.md, *What a message costs*.)
    #[inline(always)]
    fn next_sample(&mut self) -> Option<ShmSample> {
        if self.core.stats.received.is_multiple_of(RECEIVED) { None } else { self.core.next_sample() }
    }

    fn poll_next_item(&mut self, cx: &mut Context<'_>) -> Poll<Result<ShmSample, RecvError>> {
        // A subscriber that always finds something must let other tasks run now and then.
        let budget = ready!(tokio::task::coop::poll_proceed(cx));
        let core = &mut self.core;
        let mut sample = core.next_sample();
        let looking = sample.is_none() && core.busy.look_again();
        if looking && core.look() {
            sample = core.next_sample();
        }
        if let Some(sample) = sample {
            budget.made_progress();
            return Poll::Ready(Ok(sample));
        }
        match core.poll_next(looking, &mut self.watched, cx) {
            Poll::Pending => Poll::Pending,
            Poll::Ready(item) => {
                budget.made_progress();
                Poll::Ready(item.unwrap_or(Err(RecvError::Closed)))
            }
        }
    }

    /// Receives the next message if it is there.
    ///
    /// # Errors
    ///
    /// [`TryRecvError::Empty`], or what [`recv`](Self::recv) would have returned.
    pub fn try_recv(&mut self) -> Result<ShmSample, TryRecvError> {
        if let Some(item) = self.core.next() {
            return Ok(item?);
        }
        // Nobody else reads what concerns links while nothing is awaited.
        self.core.read_now_and_then()?;
        match self.core.next() {
            Some(item) => Ok(item?),
            None if self.core.is_over() => Err(RecvError::Closed.into()),
            None => Err(TryRecvError::Empty),
        }
    }

    /// As [`recv`](Self::recv), waiting on this thread. Needs no runtime.
    ///
    /// # Errors
    ///
    /// As [`recv`](Self::recv).
    ///
    /// # Panics
    ///
    /// On a thread that drives a tokio runtime's tasks.
    pub fn blocking_recv(&mut self) -> Result<ShmSample, RecvError> {
        assert_may_block();
        self.core.blocking_next(None).unwrap_or(Err(RecvError::Closed))
    }

    /// As [`blocking_recv`](Self::blocking_recv), for at most `timeout`.
    ///
    /// # Errors
    ///
    /// As [`recv`](Self::recv), and [`RecvError::TimedOut`]: no message was lost.
    ///
    /// # Panics
    ///
    /// On a thread that drives a tokio runtime's tasks.
    pub fn blocking_recv_timeout(&mut self, timeout: Duration) -> Result<ShmSample, RecvError> {
        assert_may_block();
        self.core.blocking_next(Instant::now().checked_add(timeout)).unwrap_or(Err(RecvError::Closed))
    }

    /// How many publishers have accepted this subscriber, as far as it has looked.
    pub fn publisher_count(&self) -> usize {
        self.core.established()
    }

    /// Waits until at least `n` publishers have accepted this subscriber. Messages that come meanwhile stay.
    ///
    /// # Errors
    ///
    /// [`RecvError::Io`] if the system refuses what waiting needs. What happened to a publisher is told by the next
    /// [`recv`](Self::recv).
    ///
    /// # Panics
    ///
    /// As [`recv`](Self::recv).
    ///
    /// # Cancel safety
    ///
    /// Cancel safe.
    pub async fn wait_for_publishers(&mut self, n: usize) -> Result<(), RecvError> {
        poll_fn(|cx| self.core.poll_publishers(n, &mut self.watched, cx)).await
    }

    /// The subscriber's counters.
    pub fn stats(&self) -> SubscriberStats {
        self.core.stats.clone()
    }
}

impl Stream for ShmSubscriber {
    type Item = Result<ShmSample, RecvError>;

    /// Ends after the last publisher where that was asked for, and after [`RecvError::Io`] only if polled no more.
    // Not inlined: the caller's loop over a message's bytes is better off without all this around it.
    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        if let Some(sample) = this.next_sample() {
            return Poll::Ready(Some(Ok(sample)));
        }
        match ready!(this.poll_next_item(cx)) {
            Err(RecvError::Closed) => Poll::Ready(None),
            item => Poll::Ready(Some(item)),
        }
    }
}

impl fmt::Debug for ShmSubscriber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ShmSubscriber")
            .field("topic", &self.topic)
            .field("stats", &self.core.stats)
            .finish_non_exhaustive()
    }
}

impl Drop for ShmSubscriber {
    fn drop(&mut self) {
        self.core.leave();
    }
}
