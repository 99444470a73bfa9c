//! The tx task: it accepts subscribers, starts their tasks, and delivers what senders leave to it.

use std::future::pending;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};
use tokio::task::JoinSet;

use super::links;
use super::shared::{Config, Shared};
use crate::event::Waiter;
use crate::pool::PooledSegment;
use crate::reactor::Watched;
use crate::sys::clock::monotonic_ns;
use crate::sys::fork::Origin;
use crate::sys::socket::Listener;
use crate::text::{Hex, chain};
use crate::topic::{DiscoveryError, TopicDir};

/// What the task owns. Dropped with it, finished or not: then nobody can find the publisher any more, and nobody waits
/// for it in vain.
pub(crate) struct TxTask {
    shared: Arc<Shared>,
    waiter: Waiter,
    listener: Watched<Arc<Listener>>,
    place: Published,
    /// Made in good time: what it is for is, among others, that no descriptor is to be had.
    timer: Watched<Timer>,
    /// The system refused the memory for the message that waits in the heap; said once, until it is there.
    refused: AtomicBool,
}

/// When to ask again for memory that the system has refused: it comes free without a word.
const MEMORY_RETRY_NS: u64 = 20_000_000;

impl TxTask {
    /// # Panics
    ///
    /// Outside a tokio runtime, or in one whose I/O is not enabled.
    pub(crate) fn new(
        shared: Arc<Shared>,
        waiter: Waiter,
        listener: Arc<Listener>,
        place: Published,
    ) -> std::io::Result<Self> {
        let timer = Watched::register(Timer::new()?)?;
        let refused = AtomicBool::new(false);
        Ok(Self { listener: Watched::register(listener)?, shared, waiter, place, timer, refused })
    }

    pub(crate) async fn run(self) {
        let shared = Arc::clone(&self.shared);
        let mut links = JoinSet::new();
        loop {
            for new in std::mem::take(&mut *shared.new_links.lock()) {
                links.spawn(links::serve(Arc::clone(&shared), new));
            }
            while links.try_join_next().is_some() {
                shared.acceptor.descriptors_came_free();
            }
            shared.journal.tell(&shared.config);
            if shared.has_ended() {
                return;
            }
            if shared.is_closed() {
                // Nobody is to find us any more; who has connected already is still welcomed and told the count.
                self.place.withdraw();
                if shared.try_finish() {
                    return;
                }
            }
            shared.try_again();
            if shared.acceptor.has_more() {
                // Whoever is connected goes before those who connect as fast as they are accepted.
                tokio::task::yield_now().await;
            }
            self.set_timer();
            tokio::select! {
                _ = self.waiter.wait_async() => {}
                ready = self.listener.readable() => match ready {
                    Ok(mut ready) => {
                        ready.clear_ready();
                        shared.acceptor.accept_new(&shared);
                    }
                    Err(error) => {
                        tracing::error!(topic = shared.config.topic.as_str(), error = %chain(&error), "the runtime's I/O is gone");
                        return;
                    }
                },
                Some(_) = links.join_next() => shared.acceptor.descriptors_came_free(),
                Some(segment) = self.feed() => shared.feed(segment),
                () = self.time_out() => {}
            }
            shared.pump();
        }
    }

    /// Waits for a slot for the message that waits in the heap, if one does.
    async fn feed(&self) -> Option<PooledSegment> {
        let Some(len) = self.shared.slot_wanted() else { return pending().await };
        let shared = &self.shared;
        match shared.pool.take_until(len, || shared.has_ended()).await {
            Some(Ok(segment)) => {
                self.refused.store(false, Ordering::Relaxed);
                Some(segment)
            }
            Some(Err(error)) => {
                if !self.refused.swap(true, Ordering::Relaxed) {
                    let topic = shared.config.topic.as_str();
                    tracing::warn!(topic, error = %chain(&error), "a message that a sink accepted waits for memory");
                }
                // It is tried again then, or with whatever happens before.
                self.timer.get().set(MEMORY_RETRY_NS);
                pending().await
            }
            None => None,
        }
    }

    fn set_timer(&self) {
        let due = [
            self.shared.evict(),
            self.shared.warn_of_stalls(),
            self.shared.retry_in(),
            self.shared.end_rush(),
        ]
        .into_iter()
        .flatten()
        .min();
        if let Some(due) = due {
            self.timer.get().set(due.max(1));
        }
    }

    async fn time_out(&self) {
        match self.timer.readable().await {
            Ok(mut ready) => ready.clear_ready(),
            Err(_) => pending().await,
        }
    }
}

/// The socket's name in the topic's directory; gone with this, so that a `bind` that fails afterwards leaves none.
pub(crate) struct Published {
    /// A child leaves the name to its parent.
    origin: Origin,
    directory: TopicDir,
    id: u128,
}

impl Published {
    pub(crate) fn new(mut directory: TopicDir, id: u128) -> Result<(Listener, Self), DiscoveryError> {
        let listener = directory.publish(id)?;
        Ok((listener, Self { origin: Origin::here(), directory, id }))
    }

    fn withdraw(&self) {
        if !self.origin.is_here() {
            return;
        }
        kill_point!("withdraw: begun");
        if let Err(error) = self.directory.withdraw(self.id) {
            tracing::debug!(error = %chain(&error), "the publisher's socket stays behind until the next bind or connect");
        }
    }
}

impl Drop for Published {
    fn drop(&mut self) {
        self.withdraw();
    }
}

impl Drop for TxTask {
    fn drop(&mut self) {
        self.place.withdraw();
        self.shared.end();
        self.shared.set_gone();
        let Config { topic, id, .. } = &self.shared.config;
        self.shared.journal.tell(&self.shared.config);
        tracing::debug!(topic = topic.as_str(), publisher = %Hex(*id), "the publisher has ended");
    }
}

/// A timer of our own: the runtime's may not be enabled.
struct Timer {
    fd: OwnedFd,
    /// When it runs out, or did, in clock nanoseconds. Only the task sets it.
    due: AtomicU64,
}

impl Timer {
    fn new() -> std::io::Result<Self> {
        let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
        Ok(Self { fd: timerfd_create(TimerfdClockId::Monotonic, flags)?, due: AtomicU64::new(0) })
    }

    /// Has it run out in so many nanoseconds, or sooner: whoever is woken too soon sets it again.
    fn set(&self, nanoseconds: u64) {
        let now = monotonic_ns();
        let due = now.saturating_add(nanoseconds);
        let set = self.due.load(Ordering::Relaxed);
        if now < set && set <= due {
            return;
        }
        self.due.store(due, Ordering::Relaxed);
        let zero = Timespec { tv_sec: 0, tv_nsec: 0 };
        let value = Timespec {
            tv_sec: i64::try_from(nanoseconds / 1_000_000_000).unwrap_or(i64::MAX),
            tv_nsec: (nanoseconds % 1_000_000_000) as _,
        };
        let timer = Itimerspec { it_interval: zero, it_value: value };
        if let Err(error) = timerfd_settime(&self.fd, TimerfdTimerFlags::empty(), &timer) {
            tracing::error!(error = %chain(&error), "cannot set the timer for stuck subscribers");
        }
    }
}

impl AsFd for Timer {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
