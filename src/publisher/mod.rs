//! [`ShmPublisher`]: sending messages to a topic.
//!
//! This file is the handle; acceptance and delivery are in `shared` and `delivery`, the task in `task`.

mod backlog;
mod builder;
mod delivery;
mod error;
mod journal;
pub(crate) mod links;
#[cfg(all(test, not(tokio_shm_loom)))]
mod order_tests;
mod pace;
mod patience;
mod published;
#[cfg(tokio_shm_shuttle)]
#[doc(hidden)]
pub mod scenes;
pub(crate) mod shared;
mod sink;
mod staged;
mod stall;
mod stats;
mod task;
#[cfg(all(test, not(tokio_shm_loom)))]
mod tests;

use std::sync::Arc;
use std::time::{Duration, Instant};

pub use self::builder::ShmPublisherBuilder;
pub use self::error::{BindError, FlushError, LoanError, SendError, SendErrorKind, SinkError};
use self::shared::Shared;
use self::sink::SinkState;
use self::staged::Staged;
pub use self::stats::PublisherStats;
use crate::blocking::assert_may_block;
use crate::buffer::{Home, Payload, ShmLoan};
use crate::gate::Lane;
use crate::line::NoPlace;
use crate::pool::{Promised, ShmSegmentPool};
use crate::sync::atomic::{AtomicU32, Ordering};

/// Publishes messages to a topic.
///
/// Cheap to clone; clones are one publisher, and their messages share one numbering. Each subscriber gets every
/// accepted message once and in order, or is told how many it did not get.
///
/// # The end
///
/// Dropping the last clone closes the publisher. What was accepted and can be delivered is delivered in the drop; the rest, for which some
/// subscriber with [`OnFull::Wait`](crate::OnFull::Wait) has no room just now, in the background, for as long as the runtime lives. When
/// the runtime ends before that, its shutdown waits for at most a second, as long as subscribers go on making room and not 100 ms longer.
/// Those that got everything are told that it is closed, the others that it is lost. So only a program that ends while subscribers
/// may be full, and may take longer to read on, has to call [`close`](Self::close) and await it: that waits for them as long as it takes.
///
/// Subscribers that have connected and were not accepted yet are accepted at the end, and told how many messages they missed.
///
/// # As a sink
///
/// It is a [`Sink`](futures::Sink) too, for every [`Payload`]: `feed` accepts a message, `flush` delivers all that were fed, and wakes
/// the subscribers once. Without a flush they are delivered when half the [`queue`](ShmPublisherBuilder::queue) (64 messages
/// at most) or 64 KiB have come together, or when something waits for them.
///
/// With `SinkExt` in scope `send`, `flush` and `close` of a `&mut ShmPublisher` are those of `SinkExt`: dropped, its `send` may have sent all the
/// same. Call them on the publisher itself or a `&ShmPublisher`, or as `ShmPublisher::send(publisher, x)`.
///
/// # Examples
///
/// ```
/// use tokio_shm::{ShmPublisher, ShmSubscriber};
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let dir = tempfile::tempdir()?;
/// # std::fs::set_permissions(&dir, std::os::unix::fs::PermissionsExt::from_mode(0o700))?;
/// let publisher = ShmPublisher::builder("camera/front").runtime_dir(dir.path()).bind()?;
/// let mut camera = ShmSubscriber::builder("camera/front").runtime_dir(dir.path()).connect()?;
///
/// publisher.send(b"copied once").await?;
/// let mut loan = publisher.loan(12).await?;
/// loan.copy_from_slice(b"not even onc");
/// publisher.send(loan).await?;
///
/// assert_eq!(&*camera.recv().await?, b"copied once");
/// assert_eq!(&*camera.recv().await?, b"not even onc");
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct ShmPublisher {
    shared: Arc<Shared>,
    sink: SinkState,
    /// Counts the calls of `send`, more or less.
    sends: AtomicU32,
}

/// So many calls of `send` take one unit of their task's budget, of 128: it is for some ten microseconds of work, and taking one
/// costs a quarter of a send.
const SENDS: u32 = 8;

impl ShmPublisher {
    /// Opens a topic with default settings, in the current runtime.
    ///
    /// A topic is any UTF-8 of 1 to 200 bytes without NUL and `*` (kept for patterns); `/` makes a hierarchy of directories.
    ///
    /// # Errors
    ///
    /// As [`ShmPublisherBuilder::bind`].
    ///
    /// # Panics
    ///
    /// If the runtime's I/O is not enabled.
    pub fn bind(topic: &str) -> Result<Self, BindError> {
        Self::builder(topic).bind()
    }

    /// A publisher with settings of your own.
    pub fn builder(topic: &str) -> ShmPublisherBuilder {
        ShmPublisherBuilder::new(topic)
    }

    fn from_shared(shared: Arc<Shared>) -> Self {
        Self { shared, sink: SinkState::default(), sends: AtomicU32::new(0) }
    }

    /// The topic's name.
    pub fn topic(&self) -> &str {
        self.shared.config.topic.as_str()
    }

    /// The publisher's id, random and new for each `bind`; samples carry it.
    pub fn id(&self) -> u128 {
        self.shared.config.id
    }

    /// A writable message of `len` bytes, waiting at the pool's cap until memory comes free.
    ///
    /// Who waits is served in the order of coming, as [`ShmSegmentPool::take`] says.
    ///
    /// # Errors
    ///
    /// [`LoanError`]: the publisher is closed, or the pool can never hold so much, or the system refuses the memory.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: no memory is lost, and the turn goes to the next waiter.
    pub async fn loan(&self, len: usize) -> Result<ShmLoan, LoanError> {
        match self.idle_loan(len) {
            Some(loan) => Ok(loan),
            // Apart, so that what there is to do for most loans is short.
            None => Box::pin(self.loan_waiting(len)).await,
        }
    }

    /// A writable message of `len` bytes, at once or not at all.
    ///
    /// # Errors
    ///
    /// As [`loan`](Self::loan), and [`TakeError::Full`](crate::TakeError::Full) at the cap.
    pub fn try_loan(&self, len: usize) -> Result<ShmLoan, LoanError> {
        match self.idle_loan(len) {
            Some(loan) => Ok(loan),
            None => self.made_loan(len),
        }
    }

    /// As [`loan`](Self::loan), waiting on this thread.
    ///
    /// # Errors
    ///
    /// As [`loan`](Self::loan).
    ///
    /// # Panics
    ///
    /// On a thread that drives a tokio runtime's tasks.
    pub fn blocking_loan(&self, len: usize) -> Result<ShmLoan, LoanError> {
        assert_may_block();
        self.loan_until(len, None)
    }

    /// As [`blocking_loan`](Self::blocking_loan), for at most `timeout`.
    ///
    /// # Errors
    ///
    /// As [`loan`](Self::loan), and [`TakeError::TimedOut`](crate::TakeError::TimedOut).
    ///
    /// # Panics
    ///
    /// On a thread that drives a tokio runtime's tasks.
    pub fn blocking_loan_timeout(&self, len: usize, timeout: Duration) -> Result<ShmLoan, LoanError> {
        assert_may_block();
        self.loan_until(len, Instant::now().checked_add(timeout))
    }

    /// Sends a message, waiting while the queue is full. Senders that wait get their places in the order in which they came.
    ///
    /// With `Ok` the message is accepted: it is on its way to every subscriber there is, in the order of acceptance,
    /// and with nobody else delivering it is there already. A [`ShmLoan`] is not copied, anything else once.
    ///
    /// # Errors
    ///
    /// [`SendError`] gives the message back: the publisher is closed, or there is no memory to copy it into.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: a `send` that did not return `Ok` has sent nothing, and its memory went back to the pool.
    pub async fn send<B: Payload>(&self, buf: B) -> Result<(), SendError<B::Returned>> {
        // A sender that never has to wait must let other tasks run now and then, the tx task among them.
        let sends = self.sends.load(Ordering::Relaxed).wrapping_add(1);
        self.sends.store(sends, Ordering::Relaxed);
        if sends.is_multiple_of(SENDS) {
            tokio::task::coop::consume_budget().await;
        }
        let mut staged = Staged::new(buf);
        let accepted = match self.stage_now(&mut staged) {
            Ok(()) => self.accept_now(&mut staged),
            Err(kind) if kind.is_pool_full() => None,
            Err(kind) => Some(Err(kind)),
        };
        match accepted {
            Some(Ok(())) => Ok(()),
            Some(Err(kind)) => Err(staged.into_error(kind)),
            None => Box::pin(self.send_waiting(staged)).await,
        }
    }

    /// Sends a message at once or not at all.
    ///
    /// "At once" is within some microseconds: where a subscriber is full and has been making room quickly, it is looked at for
    /// so long.
    ///
    /// # Errors
    ///
    /// As [`send`](Self::send), and [`SendErrorKind::Full`] or [`TakeError::Full`](crate::TakeError::Full) where that would wait.
    pub fn try_send<B: Payload>(&self, buf: B) -> Result<(), SendError<B::Returned>> {
        let mut staged = Staged::new(buf);
        let staged_now = self.stage_now(&mut staged);
        match staged_now.and_then(|()| self.accept_now(&mut staged).unwrap_or(Err(SendErrorKind::Full))) {
            Ok(()) => Ok(()),
            Err(kind) => Err(staged.into_error(kind)),
        }
    }

    /// As [`send`](Self::send), waiting on this thread.
    ///
    /// # Errors
    ///
    /// As [`send`](Self::send).
    ///
    /// # Panics
    ///
    /// On a thread that drives a tokio runtime's tasks.
    pub fn blocking_send<B: Payload>(&self, buf: B) -> Result<(), SendError<B::Returned>> {
        assert_may_block();
        self.send_until(buf, None)
    }

    /// As [`blocking_send`](Self::blocking_send), for at most `timeout`, the wait for memory included.
    ///
    /// # Errors
    ///
    /// As [`send`](Self::send), and [`SendErrorKind::TimedOut`]: nothing was sent then.
    ///
    /// # Panics
    ///
    /// On a thread that drives a tokio runtime's tasks.
    pub fn blocking_send_timeout<B: Payload>(
        &self,
        buf: B,
        timeout: Duration,
    ) -> Result<(), SendError<B::Returned>> {
        assert_may_block();
        self.send_until(buf, Instant::now().checked_add(timeout))
    }

    /// Waits until every message accepted before this call is on its links, or counted where a subscriber was full.
    ///
    /// What is on a link outlives the publisher. `flush` does not wait for subscribers to read.
    ///
    /// # Errors
    ///
    /// [`FlushError`] if the tx task is gone with its runtime.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: delivery goes on.
    pub async fn flush(&self) -> Result<(), FlushError> {
        let target = self.shared.flush_target();
        self.shared.pump();
        match self.shared.flushed.wait_until(|| self.shared.flushed(target)).await {
            true => Ok(()),
            false => Err(self.shared.flush_error()),
        }
    }

    /// Closes the publisher, for all clones, once everything accepted is on its links.
    ///
    /// Subscribers then know that nothing is missing. Messages of other clones that are not accepted yet are refused. Waits for as long as a
    /// subscriber with [`OnFull::Wait`](crate::OnFull::Wait) has no room; see [the end](Self#the-end) for when it is needed.
    ///
    /// # Errors
    ///
    /// [`FlushError`] if the tx task went with its runtime before everything was delivered.
    ///
    /// # Cancel safety
    ///
    /// The publisher goes on closing in the background.
    pub async fn close(self) -> Result<(), FlushError> {
        self.shared.close();
        let shared = &self.shared;
        shared.flushed.wait_until(|| shared.is_gone().then_some(())).await;
        if shared.has_died() { Err(shared.flush_error()) } else { Ok(()) }
    }

    /// Whether the publisher takes no more messages: closed, or its runtime is gone.
    pub fn is_closed(&self) -> bool {
        self.shared.is_closed()
    }

    /// How many subscribers there are now.
    pub fn subscriber_count(&self) -> usize {
        self.shared.subscribers.load(Ordering::Acquire)
    }

    /// Waits until there are at least `n` subscribers, or the publisher is closed.
    ///
    /// A subscriber that was there before the publisher finds it while it receives, or waits for publishers. One that was killed counts until
    /// its death is noticed, as a rule within a few milliseconds.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe.
    pub async fn wait_for_subscribers(&self, n: usize) {
        let enough = || (self.subscriber_count() >= n || self.is_closed()).then_some(());
        self.shared.subscribers_changed.wait_until(enough).await;
    }

    /// The publisher's counters.
    pub fn stats(&self) -> PublisherStats {
        self.shared.stats()
    }

    /// The pool that its loans are from.
    pub fn pool(&self) -> &ShmSegmentPool {
        &self.shared.pool
    }

    /// A loan from an idle slot; `None`: there is none, or there are to be no more.
    #[inline]
    fn idle_loan(&self, len: usize) -> Option<ShmLoan> {
        if self.shared.is_closed() {
            return None;
        }
        self.shared.pool.take_idle(len).map(ShmLoan::new)
    }

    /// A loan where no slot is idle, without waiting.
    #[inline(never)]
    fn made_loan(&self, len: usize) -> Result<ShmLoan, LoanError> {
        self.check_open()?;
        Ok(ShmLoan::new(self.shared.pool.try_take(len)?))
    }

    /// To be called before the pool is asked for what it may not have: its refusal would hide that the publisher is closed.
    fn check_open(&self) -> Result<(), LoanError> {
        if self.shared.is_closed() { Err(self.shared.refusal()) } else { Ok(()) }
    }

    fn loan_until(&self, len: usize, deadline: Option<Instant>) -> Result<ShmLoan, LoanError> {
        if let Some(loan) = self.idle_loan(len) {
            return Ok(loan);
        }
        self.check_open()?;
        let taken = self.shared.pool.blocking_take_until(len, deadline, || self.shared.is_closed());
        Ok(ShmLoan::new(taken.ok_or_else(|| self.shared.refusal())??))
    }

    fn send_until<B: Payload>(
        &self,
        buf: B,
        deadline: Option<Instant>,
    ) -> Result<(), SendError<B::Returned>> {
        let mut staged = Staged::new(buf);
        let mut len = staged.len();
        while !staged.is_ready(self.home()) {
            match self.loan_until(len, deadline) {
                Ok(loan) => len = self.copy_late(&mut staged, loan),
                Err(error) => return Err(staged.into_error(error)),
            }
        }
        let room = &self.shared.room;
        let accepted =
            room.blocking_wait_until(Lane::Main, deadline, || self.closed(), |_| self.accept(&mut staged));
        match accepted.unwrap_or(Err(SendErrorKind::TimedOut)) {
            Ok(()) => Ok(()),
            Err(kind) => Err(staged.into_error(kind)),
        }
    }

    fn home(&self) -> Home<'_> {
        Home(self.shared.pool.core())
    }

    /// Gets the message into shared memory without waiting.
    #[inline]
    fn stage_now<B: Payload>(&self, staged: &mut Staged<B>) -> Result<(), SendErrorKind> {
        if !staged.is_ready(self.home()) {
            let copied = staged.copy(|bytes| self.try_loan(bytes.len()).map(ShmLoan::into_segment))?;
            self.count_copied(copied);
        }
        Ok(())
    }

    #[inline]
    fn count_copied(&self, bytes: usize) {
        self.shared.copied_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// Copies a message into memory that was waited for, unless it has become longer than that; how long it is.
    fn copy_late<B: Payload>(&self, staged: &mut Staged<B>, loan: ShmLoan) -> usize {
        let len = staged.copy_late(loan.into_segment());
        if staged.is_ready(self.home()) {
            self.count_copied(len);
        }
        len
    }

    #[cold]
    async fn loan_waiting(&self, len: usize) -> Result<ShmLoan, LoanError> {
        self.check_open()?;
        let taken = self.shared.pool.take_until(len, Promised::No, || self.shared.is_closed()).await;
        Ok(ShmLoan::new(taken.ok_or_else(|| self.shared.refusal())??))
    }

    /// What is left of a `send` that has to wait, for memory or for a place.
    #[cold]
    async fn send_waiting<B: Payload>(&self, mut staged: Staged<B>) -> Result<(), SendError<B::Returned>> {
        let mut len = staged.len();
        while !staged.is_ready(self.home()) {
            match self.loan(len).await {
                Ok(loan) => len = self.copy_late(&mut staged, loan),
                Err(error) => return Err(staged.into_error(error)),
            }
        }
        let room = &self.shared.room;
        match room.wait_until(Lane::Main, || self.closed(), |_| self.accept(&mut staged)).await {
            Ok(()) => Ok(()),
            Err(kind) => Err(staged.into_error(kind)),
        }
    }

    /// What ends the wait for a place.
    fn closed(&self) -> Option<Result<(), SendErrorKind>> {
        self.shared.is_closed().then_some(Err(SendErrorKind::Closed))
    }

    /// As [`accept`](Self::accept), of a sender that has not waited: not before those that do.
    #[inline]
    fn accept_now<B: Payload>(&self, staged: &mut Staged<B>) -> Option<Result<(), SendErrorKind>> {
        if self.shared.room.is_taken(Lane::Main) {
            return self.closed();
        }
        self.accept(staged)
    }

    /// Accepts the message if there is a place for it; `None`: not now. Once `Ok`, `staged` is empty.
    #[inline]
    fn accept<B: Payload>(&self, staged: &mut Staged<B>) -> Option<Result<(), SendErrorKind>> {
        if self.shared.deliver_now(|| staged.take()) {
            return Some(Ok(()));
        }
        match self.shared.join(|| staged.take()) {
            // Missed or not: it is delivered now.
            Ok(_) => {
                kill_point!("send: queued");
                self.shared.pump();
                Some(Ok(()))
            }
            Err(NoPlace::Full) => None,
            Err(NoPlace::Closed) => Some(Err(self.shared.refusal().into())),
        }
    }
}

impl Clone for ShmPublisher {
    fn clone(&self) -> Self {
        self.shared.handles.fetch_add(1, Ordering::Relaxed);
        Self::from_shared(Arc::clone(&self.shared))
    }
}

impl Drop for ShmPublisher {
    fn drop(&mut self) {
        if self.shared.is_inherited() {
            // The parent's: nothing of it is undone here. A thread that is not there may hold any of its locks.
            std::mem::forget(Arc::clone(&self.shared));
            return;
        }
        self.sink.release(&self.shared);
        if self.shared.handles.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.shared.close();
        }
    }
}
