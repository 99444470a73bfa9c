//! The tx task: it accepts subscribers, starts their tasks, and delivers what senders leave to it.

use std::future::pending;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};
use tokio::task::JoinSet;

use super::links;
use super::shared::Shared;
use crate::event::Waiter;
use crate::pool::PooledSegment;
use crate::reactor::Watched;
use crate::sys::clock::monotonic_ns;
use crate::sys::fork::Origin;
use crate::sys::socket::Listener;
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
}

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
        Ok(Self { listener: Watched::register(listener)?, shared, waiter, place, timer })
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
                        tracing::error!(%error, "the runtime's I/O is gone");
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
        let Some(len) = self.shared.starved_for() else { return pending().await };
        let shared = &self.shared;
        match shared.pool.take_until(len, || shared.has_ended()).await {
            Some(Ok(segment)) => Some(segment),
            Some(Err(error)) => {
                tracing::warn!(%error, "a message that a sink accepted waits for memory");
                // It is tried again with whatever happens next: a release, a send, a subscriber that goes.
                pending().await
            }
            None => None,
        }
    }

    fn set_timer(&self) {
        let due =
            [self.shared.evict(), self.shared.retry_in(), self.shared.end_rush()].into_iter().flatten().min();
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
            tracing::debug!(%error, "the publisher's socket stays behind until the next bind or connect");
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
        self.shared.die();
        self.shared.set_gone();
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
            tracing::error!(%error, "cannot set the timer for stuck subscribers");
        }
    }
}

impl AsFd for Timer {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
