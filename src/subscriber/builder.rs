//! [`ShmSubscriberBuilder`]: settings of a subscriber, and connecting it.

use std::path::PathBuf;

use super::busy::Busy;
use super::core::Core;
use super::waiting::Waits;
use super::{BusyPoll, ConnectError, ShmSubscriber};
use crate::OnFull;
use crate::access::Access;
use crate::text::Hex;
use crate::topic::{DiscoveryError, RuntimeDir, TopicDir, TopicName, TopicWatch};

const MAX_DEPTH: u32 = 65_536;

/// Settings of a [`ShmSubscriber`]; made by [`ShmSubscriber::builder`].
#[derive(Debug, Clone)]
#[must_use = "a builder does nothing until connect is called"]
pub struct ShmSubscriberBuilder {
    topic: String,
    depth: u32,
    on_full: Option<OnFull>,
    busy_poll: BusyPoll,
    end_with_last_publisher: bool,
    publisher_events: bool,
    runtime_dir: Option<PathBuf>,
    access: Access,
}

impl ShmSubscriberBuilder {
    pub(super) fn new(topic: &str) -> Self {
        Self {
            topic: topic.to_owned(),
            depth: 64,
            on_full: None,
            busy_poll: BusyPoll::default(),
            end_with_last_publisher: false,
            publisher_events: false,
            runtime_dir: None,
            access: Access::default(),
        }
    }

    /// How many messages of each publisher may be queued for this subscriber or held by it. Default 64, from 1 to
    /// 65,536.
    ///
    /// Messages that are held count: with `depth` samples in hand nothing more comes.
    pub fn depth(mut self, messages: u32) -> Self {
        self.depth = messages;
        self
    }

    /// What happens to a message for which this subscriber has no room, where the publisher would wait. Default: the
    /// publisher's choice.
    pub fn on_full(mut self, on_full: OnFull) -> Self {
        self.on_full = Some(on_full);
        self
    }

    /// How long to look for a message before sleeping. Default adaptive, at most 50 µs.
    pub fn busy_poll(mut self, busy_poll: BusyPoll) -> Self {
        self.busy_poll = busy_poll;
        self
    }

    /// Whether the stream ends when the last publisher has gone. Default `false`: it waits for the next one.
    ///
    /// It does not end before there was one.
    pub fn end_with_last_publisher(mut self, end: bool) -> Self {
        self.end_with_last_publisher = end;
        self
    }

    /// Whether receiving also tells when a publisher closes: [`RecvError::PublisherClosed`](crate::RecvError::PublisherClosed),
    /// after its last message. Default `false`: it only tells what may be missing.
    ///
    /// For who waits for an answer of a publisher's, and need not wait for a time-out then.
    pub fn publisher_events(mut self, tell: bool) -> Self {
        self.publisher_events = tell;
        self
    }

    /// The runtime directory, in place of `$TOKIO_SHM_DIR`, `$XDG_RUNTIME_DIR/tokio-shm` or the one in the temporary
    /// directory. Made with mode 0700 where it is missing and its parent is there; one that is there must be closed to others, unless they
    /// are let in. In a test: `tempdir.path().join("shm")`.
    pub fn runtime_dir(mut self, path: impl Into<PathBuf>) -> Self {
        self.runtime_dir = Some(path.into());
        self
    }

    /// Connects to publishers that run as this user, too. Default: only to those of the subscriber's own user.
    ///
    /// As [`ShmPublisherBuilder::allow_uid`](crate::ShmPublisherBuilder::allow_uid).
    pub fn allow_uid(mut self, uid: u32) -> Self {
        self.access.allow_uid(uid);
        self
    }

    /// Connects to publishers whose effective group is this one, too.
    ///
    /// As [`ShmPublisherBuilder::allow_gid`](crate::ShmPublisherBuilder::allow_gid).
    pub fn allow_gid(mut self, gid: u32) -> Self {
        self.access.allow_gid(gid);
        self
    }

    /// Connects to the topic's publishers, and from then on to those that come.
    ///
    /// It makes nothing in the runtime directory, which may be read-only; what killed publishers of the topic left there is
    /// removed, where it can be.
    ///
    /// Needs no runtime. Every message sent after this has returned is received or counted, whether or not its publisher has noticed
    /// this subscriber yet. A publisher that comes later is found while this subscriber receives or waits for publishers, a
    /// fraction of a millisecond after its `bind`: what it sent before is counted as [`Lagged`](crate::RecvError::Lagged), save for what
    /// its `history` holds. One that has also closed by then was never met.
    ///
    /// # Errors
    ///
    /// [`ConnectError`]: a bad name or setting, a runtime directory that cannot be used or watched.
    pub fn connect(self) -> Result<ShmSubscriber, ConnectError> {
        let topic = TopicName::new(&self.topic)?;
        if !(1..=MAX_DEPTH).contains(&self.depth) {
            let (min, max, actual) = (1, u64::from(MAX_DEPTH), u64::from(self.depth));
            return Err(ConnectError::OutOfBounds { what: "depth", min, max, actual });
        }
        let failed = |source| ConnectError::Io { topic: self.topic.clone(), source };
        let runtime_dir = RuntimeDir::resolve(self.runtime_dir.as_deref(), self.access.clone())
            .map_err(DiscoveryError::from)?;
        let id = crate::sys::random::random_id().map_err(failed)?;
        let core = self.core(&runtime_dir, &topic, id)?;
        let (topic_name, subscriber) = (topic.as_str(), Hex(id));
        let dir = runtime_dir.path().display();
        tracing::debug!(topic = topic_name, %subscriber, %dir, publishers = core.peers.len(), "connected");
        Ok(ShmSubscriber { topic, core, watched: None })
    }

    fn core(
        &self,
        runtime_dir: &RuntimeDir,
        topic: &TopicName,
        id: u128,
    ) -> Result<Core<Waits>, DiscoveryError> {
        TopicDir::sweep(runtime_dir, topic)?;
        let watch = TopicWatch::new(runtime_dir, topic)?;
        kill_point!("connect: watching");
        let busy = Busy::new(self.busy_poll);
        let (end, events) = (self.end_with_last_publisher, self.publisher_events);
        let mut core = Core::new(watch, id, self.depth, self.on_full, busy, end, events);
        core.watch.explain();
        core.scan()?;
        Ok(core)
    }
}
