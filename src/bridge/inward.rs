//! The zenoh keys of one route to local topics.
//!
//! One task for all topics of the route, so that what waits in zenoh is bounded; a topic that makes it wait makes all of the route
//! wait.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use ::zenoh::bytes::ZBytes;
use ::zenoh::sample::{Sample, SampleKind};

use super::attachment::Origin;
use super::discovery::LocalPublishers;
use super::queue::Queue;
use super::stats::{Counters, count};
use super::{Congestion, INJECTED, Route, Stop};
use crate::text::chain;
use crate::topic::RuntimeDir;
use crate::{BindError, OnFull, ShmPoolConfig, ShmPublisher};

/// Publishers of other hosts whose numbers are followed, for each topic.
const MAX_ORIGINS: usize = 256;

/// How long the first message of a topic waits for subscribers that wait for the topic. They leave no trace where it could be looked
/// for: they find its publisher.
const FIRST_SUBSCRIBER: Duration = Duration::from_millis(200);
/// How long all first messages of a route wait so in vain …
const IN_VAIN: Duration = Duration::from_secs(2);
/// … before each waits only for as long as subscribers take to find a publisher on a machine that is not busy.
const FOUND_WITHIN: Duration = Duration::from_millis(5);

/// What one route's task works with.
pub(super) struct Inward {
    pub(super) route: Route,
    pub(super) samples: Queue,
    pub(super) topics: Topics,
    pub(super) local: LocalPublishers,
    pub(super) counters: Arc<Counters>,
}

/// How local publishers are made.
pub(super) struct Topics {
    pub(super) runtime_dir: RuntimeDir,
    pub(super) pool: ShmPoolConfig,
    pub(super) congestion: Congestion,
    pub(super) max_topics: usize,
    pub(super) open: HashMap<String, Topic>,
    /// How long first messages have waited for subscribers that did not come.
    pub(super) waited_in_vain: Duration,
}

pub(super) struct Topic {
    publisher: ShmPublisher,
    /// The next number of each publisher of other hosts.
    expected: HashMap<u128, u64>,
}

/// What a message's number says.
enum Arrival {
    /// So many are missing before it.
    New(u64),
    Repeated,
}

impl Topics {
    /// The topic's publisher, made at its first message.
    pub(super) async fn open(&mut self, topic: &str) -> Result<&mut Topic, BindError> {
        if !self.open.contains_key(topic) {
            let publisher = self.bind(topic)?;
            // A subscriber that waits for the topic is to get the first message as well.
            let patience =
                FIRST_SUBSCRIBER.min(IN_VAIN.saturating_sub(self.waited_in_vain)).max(FOUND_WITHIN);
            if tokio::time::timeout(patience, publisher.wait_for_subscribers(1)).await.is_err() {
                self.waited_in_vain += patience;
            }
            self.open.insert(topic.to_owned(), Topic { publisher, expected: HashMap::new() });
        }
        Ok(self.open.get_mut(topic).expect("just put there"))
    }

    fn bind(&self, topic: &str) -> Result<ShmPublisher, BindError> {
        let on_full = match self.congestion {
            Congestion::Wait => OnFull::Wait,
            Congestion::Drop => OnFull::DropOldest,
        };
        let id = INJECTED.new_id().map_err(|source| BindError::Io { topic: topic.to_owned(), source })?;
        ShmPublisher::builder(topic)
            .runtime_dir(self.runtime_dir.path())
            .pool(self.pool.clone())
            .on_full(on_full)
            .id(id)
            .bind()
    }
}

impl Topic {
    fn arrival(&mut self, origin: &Origin) -> Arrival {
        let next = origin.seq.wrapping_add(1);
        if let Some(expected) = self.expected.get_mut(&origin.publisher) {
            if origin.seq < *expected {
                return Arrival::Repeated;
            }
            let missing = origin.seq - *expected;
            *expected = next;
            return Arrival::New(missing);
        }
        if self.expected.len() >= MAX_ORIGINS {
            // Any of them: one that comes back is counted from there on.
            let some = self.expected.keys().next().copied();
            some.map(|some| self.expected.remove(&some));
        }
        self.expected.insert(origin.publisher, next);
        Arrival::New(0)
    }
}

impl Inward {
    /// Runs until the bridge stops or the session ends; then what was taken from zenoh is on its links.
    pub(super) async fn run(mut self, mut stop: Stop) {
        loop {
            let sample = tokio::select! {
                biased;
                () = stop.stopped() => break,
                sample = self.samples.recv() => sample,
            };
            // The session is closed.
            let Some(sample) = sample else { break };
            count(&self.counters.received, 1);
            tokio::select! {
                biased;
                () = self.inject(&sample) => {}
                () = stop.stopped() => {
                    count(&self.counters.refused, 1);
                    break;
                }
            }
        }
        for (topic, Topic { publisher, .. }) in self.topics.open.drain() {
            if let Err(error) = publisher.close().await {
                tracing::warn!(%topic, error = %chain(&error));
            }
        }
    }

    /// Puts one message into its topic.
    async fn inject(&mut self, sample: &Sample) {
        let key = sample.key_expr().as_str();
        let topic = match self.route.topic_of(key) {
            Some(topic) if sample.kind() == SampleKind::Put => topic,
            _ => return count(&self.counters.refused, 1),
        };
        let attachment = sample.attachment().map(ZBytes::to_bytes);
        let origin = attachment.as_deref().and_then(Origin::decode);
        if origin.is_some_and(|origin| self.local.contains(origin.publisher)) {
            return count(&self.counters.echoes, 1);
        }
        if self.topics.open.len() >= self.topics.max_topics && !self.topics.open.contains_key(&topic) {
            tracing::warn!(%topic, "too many topics");
            return count(&self.counters.refused, 1);
        }
        let open = match self.topics.open(&topic).await {
            Ok(open) => open,
            Err(error) => {
                tracing::warn!(%key, error = %chain(&error), "no topic for a message");
                return count(&self.counters.refused, 1);
            }
        };
        let payload = sample.payload();
        let mut loan = match open.publisher.loan(payload.len()).await {
            Ok(loan) => loan,
            Err(error) => {
                tracing::warn!(%topic, error = %chain(&error), "no memory for a message");
                return count(&self.counters.refused, 1);
            }
        };
        // The one copy: out of zenoh's buffers, or out of shared memory.
        let mut at = 0;
        for slice in payload.slices() {
            loan[at..at + slice.len()].copy_from_slice(slice);
            at += slice.len();
        }
        if let (Some(attachment), Some(origin)) = (&attachment, &origin) {
            if !Origin::is_whole(attachment, &loan) {
                // Not even its number is to be believed: the next one tells that it is missing.
                tracing::warn!(%topic, "a message came damaged");
                return count(&self.counters.damaged, 1);
            }
            match open.arrival(origin) {
                Arrival::Repeated => return count(&self.counters.repeated, 1),
                Arrival::New(missing) => count(&self.counters.missed, missing),
            }
        }
        match open.publisher.send(loan).await {
            Ok(()) => {
                count(&self.counters.injected, 1);
                count(&self.counters.injected_bytes, at as u64);
            }
            Err(error) => {
                tracing::warn!(%topic, error = %chain(&error));
                count(&self.counters.refused, 1);
            }
        }
    }
}
