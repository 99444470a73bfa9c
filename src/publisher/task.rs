//! The tx task: it accepts subscribers, starts their tasks, and delivers what senders leave to it.

use std::future::pending;
use std::sync::Arc;

use tokio::task::JoinSet;

use super::links;
use super::published::Published;
use super::shared::{Config, Shared};
use crate::event::Waiter;
use crate::pool::{PooledSegment, Promised};
use crate::reactor::Watched;
use crate::sync::atomic::{AtomicBool, Ordering};
use crate::sys::socket::Listener;
use crate::sys::timer::Timer;
use crate::text::{Hex, chain};

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
        mut place: Published,
    ) -> std::io::Result<Self> {
        place.watch();
        let timer = Watched::register(Timer::new()?)?;
        let refused = AtomicBool::new(false);
        Ok(Self { listener: Watched::register(listener)?, shared, waiter, place, timer, refused })
    }

    pub(crate) async fn run(mut self) {
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
            if !shared.is_closed()
                && let Some(listener) = self.place.restore()
            {
                self.listen_on(listener);
            }
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
                () = self.place.changed() => self.place.take_news(),
                () = self.time_out() => {}
            }
            shared.pump();
        }
    }

    /// Accepts subscribers from this listener, too, and from then on only from it.
    fn listen_on(&mut self, listener: Listener) {
        let listener = Arc::new(listener);
        match Watched::register(Arc::clone(&listener)) {
            Ok(watched) => {
                self.shared.acceptor.listen_on(listener);
                self.listener = watched;
                // Who is in line with the one before.
                self.shared.acceptor.accept_new(&self.shared);
            }
            Err(error) => {
                tracing::warn!(error = %chain(&error), "the publisher's new socket cannot be waited on");
                self.place.unusable();
            }
        }
    }

    /// Waits for a slot for the message that waits in the heap, if one does.
    async fn feed(&self) -> Option<PooledSegment> {
        let Some(len) = self.shared.slot_wanted() else { return pending().await };
        let shared = &self.shared;
        match shared.pool.take_until(len, Promised::Yes, || shared.has_ended()).await {
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
                self.wake_in(MEMORY_RETRY_NS);
                pending().await
            }
            None => None,
        }
    }

    fn set_timer(&self) {
        let shared = &self.shared;
        let socket = self.place.due_in().filter(|_| !shared.is_closed());
        let due = [shared.evict(), shared.warn_of_stalls(), shared.retry_in(), shared.end_rush(), socket];
        if let Some(due) = due.into_iter().flatten().min() {
            self.wake_in(due.max(1));
        }
    }

    fn wake_in(&self, nanoseconds: u64) {
        if let Err(error) = self.timer.get().set(nanoseconds) {
            tracing::error!(error = %chain(&error), "cannot set the publisher's timer");
        }
    }

    async fn time_out(&self) {
        match self.timer.readable().await {
            Ok(mut ready) => ready.clear_ready(),
            Err(_) => pending().await,
        }
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
