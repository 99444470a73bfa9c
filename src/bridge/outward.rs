//! One local topic to one zenoh key.
//!
//! zenoh's `put` blocks the calling thread where it makes senders wait, so it is called on tokio's blocking threads, for as many
//! messages as there are at that moment, up to [`BATCH`].

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use ::zenoh::Wait as _;
use ::zenoh::bytes::ZBytes;
use ::zenoh::pubsub::Publisher;
use ::zenoh::qos::{CongestionControl, Reliability};
use ::zenoh::sample::Locality;
use bytes::Bytes;

use super::attachment::Origin;
use super::discovery::LocalPublishers;
use super::stats::{Counters, count};
use super::{INJECTED, SharedMemory, Stop};
use crate::text::chain;
use crate::{RecvError, ShmSample, ShmSubscriber, TryRecvError};

/// Messages handed over in one go, before the task looks whether it is to stop.
const BATCH: usize = 64;

/// Smaller messages are copied sooner than described: zenoh's own threshold.
const WORTH_SHARING: usize = 3072;

/// What one topic's task works with.
pub(super) struct Outward {
    pub(super) subscriber: ShmSubscriber,
    pub(super) publisher: Publisher<'static>,
    pub(super) heard: Arc<AtomicBool>,
    pub(super) local: LocalPublishers,
    pub(super) counters: Arc<Counters>,
    pub(super) shared_memory: Option<SharedMemory>,
}

/// Declares what zenoh is to know of a topic.
///
/// With `close`, zenoh closes a connection that takes no message for as long as is configured; else it drops the message. Closing
/// was tried in all sessions: where the connection is also found dead meanwhile (its lease), zenoh 1.10 deletes it twice, some
/// time apart, by the id of the peer. If the peer has connected again in between, that is what the second time deletes: the
/// connection stays up, and nothing is ever sent on it again.
pub(super) async fn declare(
    session: &::zenoh::Session,
    key: &str,
    close: bool,
) -> ::zenoh::Result<(Publisher<'static>, Arc<AtomicBool>)> {
    let congestion = if close { CongestionControl::Block } else { CongestionControl::Drop };
    let publisher = session
        .declare_publisher(key.to_owned())
        .congestion_control(congestion)
        .reliability(Reliability::Reliable)
        // Not to this bridge's own subscribers.
        .allowed_destination(Locality::Remote)
        .await?;
    let heard = Arc::new(AtomicBool::new(false));
    let listener = Arc::clone(&heard);
    publisher
        .matching_listener()
        .callback(move |status| listener.store(status.matching(), Ordering::Release))
        .background()
        .await?;
    if publisher.matching_status().await?.matching() {
        heard.store(true, Ordering::Release);
    }
    Ok((publisher, heard))
}

impl Outward {
    /// Runs until the topic ends or the bridge stops.
    pub(super) async fn run(mut self, mut stop: Stop) {
        loop {
            let first = tokio::select! {
                biased;
                () = stop.stopped() => return,
                first = self.subscriber.recv() => first,
            };
            let handed = tokio::task::spawn_blocking(move || {
                let goes_on = self.hand_over(first);
                (self, goes_on)
            });
            match handed.await {
                Ok((this, true)) => self = this,
                Ok((this, false)) => {
                    tracing::debug!(topic = this.subscriber.topic(), "the topic's last publisher is gone");
                    return;
                }
                Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
                // The runtime is shutting down.
                Err(_) => return,
            }
        }
    }

    /// Hands over what is there, `false` at the topic's end.
    fn hand_over(&mut self, first: Result<ShmSample, RecvError>) -> bool {
        let mut next = first;
        for left in (0..=BATCH).rev() {
            match next {
                Ok(sample) => self.put(sample),
                Err(RecvError::Lagged { missed: n, .. }) => count(&self.counters.lagged, n),
                Err(RecvError::Closed) => return false,
                Err(error) if error.is_terminal() => {
                    tracing::error!(topic = self.subscriber.topic(), error = %chain(&error), "the topic is no longer bridged");
                    return false;
                }
                Err(error) => tracing::warn!(topic = self.subscriber.topic(), error = %chain(&error)),
            }
            if left == 0 {
                break;
            }
            next = match self.subscriber.try_recv() {
                Err(TryRecvError::Empty) => break,
                Err(TryRecvError::Recv(error)) => Err(error),
                Ok(sample) => Ok(sample),
            };
        }
        true
    }

    fn put(&self, sample: ShmSample) {
        if INJECTED.is_on(sample.publisher()) {
            return;
        }
        self.local.add(sample.publisher());
        count(&self.counters.taken, 1);
        if !self.is_heard() {
            count(&self.counters.unheard, 1);
            return;
        }
        let origin = Origin::now(sample.publisher(), sample.seq());
        let len = sample.len();
        let attachment = origin.encode(&sample);
        let payload = self.payload(sample);
        let put = self.publisher.put(payload).attachment(&attachment[..]).wait();
        match put {
            Ok(()) => {
                count(&self.counters.sent, 1);
                count(&self.counters.sent_bytes, len as u64);
            }
            Err(error) => {
                count(&self.counters.failed, 1);
                tracing::warn!(key = %self.publisher.key_expr(), error = %chain(&*error), "zenoh did not take a message");
            }
        }
    }

    /// Whether anybody subscribes.
    ///
    /// zenoh's listener may tell of an end and of a beginning in the wrong order, where a connection ends and the next one begins;
    /// so before it is believed that nobody does, zenoh is asked.
    fn is_heard(&self) -> bool {
        if self.heard.load(Ordering::Acquire) {
            return true;
        }
        let heard = self.publisher.matching_status().wait().is_ok_and(|status| status.matching());
        if heard {
            self.heard.store(true, Ordering::Release);
        }
        heard
    }

    /// The message as zenoh gets it: where the publisher wrote it, or in shared memory that zenoh's receivers can attach to.
    fn payload(&self, sample: ShmSample) -> ZBytes {
        let shared_memory = match &self.shared_memory {
            Some(shared_memory) if sample.len() >= WORTH_SHARING => shared_memory,
            _ => return ZBytes::from(Bytes::from(sample)),
        };
        match shared_memory.alloc(sample.len()).wait() {
            Ok(mut buf) => {
                buf.copy_from_slice(&sample);
                buf.into()
            }
            // At the cap: rather by zenoh's own ways than late.
            Err(_) => ZBytes::from(Bytes::from(sample)),
        }
    }
}
