//! [`ShmSubscriber`]: receiving the messages of a topic.
//!
//! This file is the handle; taking turns among publishers is in `core`, waiting in `waiting`.

mod builder;
mod busy;
mod core;
mod error;
mod hoard;
mod retry;
mod stats;
mod waiting;

use std::fmt;
use std::future::poll_fn;
use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use futures::Stream;
use futures::stream::FusedStream;

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
    /// [`RecvError`]: what was missed, who was lost, that this program itself holds all that it may have
    /// ([`AllHeld`](RecvError::AllHeld)), or the end. Receiving goes on unless it [is terminal](RecvError::is_terminal).
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
                Poll::Ready(self.conclude(item))
            }
        }
    }

    /// What an item, or none at the end, amounts to. After an end nothing comes.
    fn conclude(&mut self, item: Option<Result<ShmSample, RecvError>>) -> Result<ShmSample, RecvError> {
        let item = item.unwrap_or(Err(RecvError::Closed));
        if item.as_ref().is_err_and(RecvError::is_terminal) {
            self.core.conclude();
        }
        item
    }

    /// Receives the next message if it is there.
    ///
    /// # Errors
    ///
    /// [`TryRecvError::Empty`], or what [`recv`](Self::recv) would have returned. [`RecvError::AllHeld`] is for programs that try at
    /// least every second or two, once a second; all other tries are [`TryRecvError::Empty`] then.
    pub fn try_recv(&mut self) -> Result<ShmSample, TryRecvError> {
        let mut item = self.core.next();
        if item.is_none() && !self.core.over {
            // Nobody else reads what concerns links while nothing is awaited.
            item = match self.core.read_now_and_then() {
                Ok(false) => self.core.next(),
                Ok(true) => self.core.next().or_else(|| self.core.waits_awake().map(Err)),
                Err(error) => Some(Err(error)),
            };
        }
        if item.is_none() && !self.core.is_over() {
            return Err(TryRecvError::Empty);
        }
        Ok(self.conclude(item)?)
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
        let item = self.core.blocking_next(None);
        self.conclude(item)
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
        let item = self.core.blocking_next(Instant::now().checked_add(timeout));
        self.conclude(item)
    }

    /// How many publishers have accepted this subscriber, as far as it has looked.
    pub fn publisher_count(&self) -> usize {
        self.core.established()
    }

    /// Waits until at least `n` publishers have accepted this subscriber. Messages that come meanwhile stay.
    ///
    /// # Errors
    ///
    /// [`RecvError::Refused`] or [`RecvError::Evicted`] of a publisher that will not have this subscriber, which is told by this in
    /// place of the next [`recv`](Self::recv): it may be called again, and waits for others. [`RecvError::OutOfResources`] as there.
    /// [`RecvError::Io`] if the system refuses what waiting needs, and [`RecvError::Closed`] after an end. Whatever else happened to
    /// a publisher is told by the next [`recv`](Self::recv).
    ///
    /// # Panics
    ///
    /// As [`recv`](Self::recv).
    ///
    /// # Cancel safety
    ///
    /// Cancel safe.
    pub async fn wait_for_publishers(&mut self, n: usize) -> Result<(), RecvError> {
        let accepted = poll_fn(|cx| self.core.poll_publishers(n, &mut self.watched, cx)).await;
        if accepted.as_ref().is_err_and(RecvError::is_terminal) {
            self.core.conclude();
        }
        accepted
    }

    /// The subscriber's counters.
    pub fn stats(&self) -> SubscriberStats {
        self.core.stats.clone()
    }
}

impl Stream for ShmSubscriber {
    type Item = Result<ShmSample, RecvError>;

    /// Its errors are notices, and the next item comes all the same, save for [`RecvError::Forked`] and [`RecvError::Io`], which are
    /// the last items of all. It ends after these, and after the last publisher where that was asked for; and stays so.
    ///
    /// What collects items, as [`chunks`](futures::StreamExt::chunks) does, holds their samples meanwhile: the subscriber's `depth` has to be
    /// more than it collects. Else [`RecvError::AllHeld`] comes instead of each sample that there is no room for, one a second;
    /// [`try_chunks`](futures::TryStreamExt::try_chunks) hands the first one out at once.
    // Not inlined: the caller's loop over a message's bytes is better off without all this around it.
    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        if let Some(sample) = this.next_sample() {
            return Poll::Ready(Some(Ok(sample)));
        }
        if this.core.over {
            return Poll::Ready(None);
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

impl FusedStream for ShmSubscriber {
    fn is_terminated(&self) -> bool {
        self.core.over
    }
}

impl Drop for ShmSubscriber {
    fn drop(&mut self) {
        self.core.leave();
    }
}
