//! [`ShmPublisherBuilder`]: settings of a publisher, and binding it.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::runtime::Handle;

use super::links::Acceptor;
use super::published::Published;
use super::shared::{Config, Shared};
use super::task::TxTask;
use super::{BindError, ShmPublisher};
use crate::OnFull;
use crate::access::Access;
use crate::event::event;
use crate::pool::{ShmPoolConfig, ShmSegmentPool};
use crate::text::{Hex, chain};
use crate::topic::{DiscoveryError, RuntimeDir, TopicDir, TopicName};

/// The longest tx queue, in messages.
const MAX_QUEUE: u32 = 1 << 20;

/// Settings of a [`ShmPublisher`]; made by [`ShmPublisher::builder`].
#[derive(Debug, Clone)]
#[must_use = "a builder does nothing until bind is called"]
pub struct ShmPublisherBuilder {
    topic: String,
    pool: ShmPoolConfig,
    shared_pool: Option<ShmSegmentPool>,
    queue: u32,
    on_full: OnFull,
    history: usize,
    max_subscribers: u32,
    evict_after: Option<Duration>,
    link_bytes: Option<u64>,
    runtime_dir: Option<PathBuf>,
    access: Access,
    runtime: Option<Handle>,
    /// In place of a random one.
    id: Option<u128>,
}

impl ShmPublisherBuilder {
    pub(super) fn new(topic: &str) -> Self {
        Self {
            topic: topic.to_owned(),
            pool: ShmPoolConfig::new(),
            shared_pool: None,
            queue: 64,
            on_full: OnFull::Wait,
            history: 0,
            max_subscribers: 256,
            evict_after: None,
            link_bytes: None,
            runtime_dir: None,
            access: Access::default(),
            runtime: None,
            id: None,
        }
    }

    /// The publisher's id, in place of a random one; it must never have been used.
    #[cfg(feature = "zenoh")]
    pub(crate) fn id(mut self, id: u128) -> Self {
        self.id = Some(id);
        self
    }

    /// The settings of the publisher's own pool.
    pub fn pool(mut self, config: ShmPoolConfig) -> Self {
        self.pool = config;
        self.shared_pool = None;
        self
    }

    /// A pool to share with other publishers; its cap is then theirs together.
    ///
    /// Subscribers map whole segments: those of one publisher can read what is left in a slot of another's messages.
    pub fn shared_pool(mut self, pool: &ShmSegmentPool) -> Self {
        self.shared_pool = Some(pool.clone());
        self
    }

    /// How many accepted messages may wait for delivery. Default 64, at most 1,048,576.
    pub fn queue(mut self, messages: u32) -> Self {
        self.queue = messages;
        self
    }

    /// What happens to a message for which a subscriber has no room. Default [`OnFull::Wait`].
    ///
    /// Where this is [`OnFull::Wait`], a subscriber may choose another for itself.
    pub fn on_full(mut self, on_full: OnFull) -> Self {
        self.on_full = on_full;
        self
    }

    /// How many of the last messages a subscriber that joins late gets. Default 0, at most 65,536. They stay in the
    /// pool for that long; at its cap the oldest are given up before anyone waits.
    pub fn history(mut self, messages: usize) -> Self {
        self.history = messages;
        self
    }

    /// How many subscribers it has at a time. Default 256, from 1 to 65,536.
    ///
    /// Each costs four of this process's descriptors, of which it may have 1,024 by default, and every message is put on each
    /// link: what a send costs grows with their number. Who comes first is served; one more is told by
    /// [`RecvError::Refused`](crate::RecvError::Refused). A subscriber that was dropped counts until its last sample is.
    pub fn max_subscribers(mut self, subscribers: u32) -> Self {
        self.max_subscribers = subscribers;
        self
    }

    /// How many bytes of messages each subscriber may have queued or held, as [`depth`](crate::ShmSubscriberBuilder::depth) is how many
    /// messages. At least 1; one message may always be there, however long it is.
    ///
    /// By default no link is bound while all messages under way take less than about half of the pool's cap; beyond that each
    /// link has a share: three quarters of the cap for a subscriber that is the only one, a quarter for each of two, and three quarters
    /// of the cap by `2n - 1` for each of `n`. A pool that publishers share is divided evenly among them first. So a link that does not
    /// keep up is full before it has all memory, and [`OnFull`] and [`evict_after`](Self::evict_after) say what happens then. The tx queue may
    /// take an eighth of the cap. Set, it binds each link from the beginning, and neither all links together nor the queue are
    /// bound in bytes; `u64::MAX` is no bound at all. Bytes are those of whole slots: up to a quarter more than a message has.
    pub fn link_bytes(mut self, bytes: u64) -> Self {
        self.link_bytes = Some(bytes);
        self
    }

    /// Disconnects a subscriber that has kept senders waiting for so long without taking a message, or that has most of
    /// the memory that a loan has been waiting for. Default: never.
    ///
    /// It keeps the samples that it has, and its place among [`max_subscribers`](Self::max_subscribers), until it drops the last of
    /// them. Their memory counts apart from the pool until then: see [`PoolStats::abandoned_bytes`](crate::PoolStats::abandoned_bytes).
    /// While evicted subscribers keep more than a quarter of the pool's cap none of these is connected again. What subscribers made anew
    /// each time keep beyond another cap counts in the pool's, and then senders wait for memory.
    pub fn evict_after(mut self, time: Duration) -> Self {
        self.evict_after = Some(time);
        self
    }

    /// The runtime directory, in place of `$TOKIO_SHM_DIR`, `$XDG_RUNTIME_DIR/tokio-shm` or the one in the temporary
    /// directory. Made with mode 0700 where it is missing and its parent is there; one that is there must be closed to others, unless they
    /// are let in. In a test: `tempdir.path().join("shm")`.
    pub fn runtime_dir(mut self, path: impl Into<PathBuf>) -> Self {
        self.runtime_dir = Some(path.into());
        self
    }

    /// Lets in subscribers that run as this user, too. Default: only those of the publisher's own user.
    ///
    /// They have to be able to enter the runtime directory: see [`allow_gid`](Self::allow_gid). Without a group, that is
    /// root in another user's directory, or that user in a directory of root's making that is given to him: what is made in
    /// a directory that belongs to another user who is let in belongs to him. Both sides have to let the other one in.
    ///
    /// The number is that in this process's user namespace. A user without a number there cannot be let in, as all such users
    /// look alike (as 65534).
    pub fn allow_uid(mut self, uid: u32) -> Self {
        self.access.allow_uid(uid);
        self
    }

    /// Lets in subscribers whose effective group is this one, too, whatever their user.
    ///
    /// The effective group counts, which the kernel tells (`Group=` of a systemd unit, `sg`), and no supplementary one.
    /// The runtime directory may then have mode `0770` for that group, and what is made in it is the group's as well: its
    /// members can also remove what others made there. Example: `install -d -m 0770 -o root -g camera /run/camera`, given
    /// to [`runtime_dir`](Self::runtime_dir). Both sides have to let the other one in.
    pub fn allow_gid(mut self, gid: u32) -> Self {
        self.access.allow_gid(gid);
        self
    }

    /// The tokio runtime of the tx task, in place of the current one. Its I/O must be enabled.
    pub fn runtime(mut self, handle: Handle) -> Self {
        self.runtime = Some(handle);
        self
    }

    /// Opens the topic for subscribers and starts the tx task.
    ///
    /// Several publishers may share a topic, in one process or many. What killed ones left in the topic's directory is
    /// removed.
    ///
    /// # Errors
    ///
    /// [`BindError`]: a bad name or setting, no runtime, a runtime directory that cannot be used.
    ///
    /// # Panics
    ///
    /// If the runtime's I/O is not enabled (`enable_io` or `enable_all`).
    pub fn bind(mut self) -> Result<ShmPublisher, BindError> {
        let topic = TopicName::new(&self.topic)?;
        check("queue", u64::from(self.queue), 1, u64::from(MAX_QUEUE))?;
        check("history", self.history as u64, 0, 65_536)?;
        check("link_bytes", self.link_bytes.unwrap_or(1), 1, u64::MAX)?;
        check("max_subscribers", u64::from(self.max_subscribers), 1, 65_536)?;
        let handle = match self.runtime.take() {
            Some(handle) => handle,
            None => Handle::try_current().map_err(|_| BindError::NoRuntime)?,
        };
        if self.shared_pool.as_ref().is_some_and(|pool| pool.core().is_inherited()) {
            return Err(BindError::Forked);
        }
        let runtime_dir = RuntimeDir::resolve(self.runtime_dir.as_deref(), self.access.clone())
            .map_err(DiscoveryError::from)?;
        let bound = self.bind_in(&runtime_dir, topic.clone(), handle);
        if let Ok(publisher) = &bound {
            let (topic, publisher) = (topic.as_str(), Hex(publisher.id()));
            tracing::debug!(topic, %publisher, dir = %runtime_dir.path().display(), "bound");
        }
        if bound.is_err()
            && let Err(error) = TopicDir::remove_empty(&runtime_dir, &topic)
        {
            tracing::debug!(dir = %runtime_dir.path().display(), error = %chain(&error), "the topic's directory stays behind");
        }
        bound
    }

    fn bind_in(
        self,
        runtime_dir: &RuntimeDir,
        topic: TopicName,
        handle: Handle,
    ) -> Result<ShmPublisher, BindError> {
        let failed = |source| match DiscoveryError::io("preparing the publisher")(source) {
            DiscoveryError::Os { source, .. } => BindError::Io { topic: self.topic.clone(), source },
            shortage => shortage.into(),
        };
        let directory = TopicDir::open(runtime_dir, &topic)?;
        directory.remove_stale()?;
        let id = match self.id {
            Some(id) => id,
            None => crate::sys::random::random_id().map_err(failed)?,
        };
        let (listener, place) = Published::new(directory, id)?;
        let listener = Arc::new(listener);
        let config = Config {
            topic,
            id,
            access: Arc::clone(runtime_dir.access()),
            queue: self.queue,
            on_full: self.on_full,
            history: self.history,
            max_subscribers: self.max_subscribers,
            evict_after: self.evict_after,
            link_bytes: self.link_bytes,
        };
        let pool = self.shared_pool.unwrap_or_else(|| ShmSegmentPool::new(self.pool));
        let (notifier, waiter) = event();
        let shared = Shared::new(config, pool, Acceptor::new(Arc::clone(&listener)), notifier);
        // Before what may fail: dropped, it closes the publisher, of which nothing stays.
        let publisher = ShmPublisher::from_shared(Arc::clone(&shared));
        let entered = handle.enter();
        let task = TxTask::new(shared, waiter, listener, place).map_err(failed)?;
        drop(entered);
        handle.spawn(task.run());
        Ok(publisher)
    }
}

fn check(what: &'static str, actual: u64, min: u64, max: u64) -> Result<(), BindError> {
    if (min..=max).contains(&actual) {
        return Ok(());
    }
    Err(BindError::OutOfBounds { what, min, max, actual })
}
