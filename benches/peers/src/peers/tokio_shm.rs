//! tokio-shm, from `async` code on a current-thread runtime.

use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;

use futures::{SinkExt, StreamExt as _};
use tokio_shm::{BusyPoll, ShmPoolConfig, ShmPublisher, ShmSubscriber};

use super::{Peer, Rx, Tx};
use crate::case::{Case, Mode};
use crate::payload;

/// Sizes up to this one share segments.
const SHARED: usize = 16 << 10;
/// Large messages that may be accepted beyond those that the subscriber has room for.
const QUEUE: u32 = 1;

/// With settings that fit the work, or those that nobody has touched.
pub(crate) struct TokioShm<const FITTED: bool>;

impl<const FITTED: bool> Peer for TokioShm<FITTED> {
    type Tx = Publisher<FITTED>;
    type Rx = Subscriber;
}

pub(crate) struct Publisher<const FITTED: bool>(ShmPublisher);

impl<const FITTED: bool> Tx for Publisher<FITTED> {
    async fn open(case: &Case, topic: &'static str) -> Self {
        let mut builder = ShmPublisher::builder(topic).runtime_dir(runtime_dir(case));
        if FITTED && case.size > SHARED {
            // Large ones: few under way, so that they stay in the cache, and none of them given up and made again.
            let pool = ShmPoolConfig::new().max_idle_per_size(case.depth + QUEUE as usize + 2);
            builder = builder.queue(QUEUE).pool(pool);
        }
        Self(builder.bind().expect("bind"))
    }

    async fn connected(&mut self, receivers: usize) {
        self.0.wait_for_subscribers(receivers).await;
    }

    async fn send(&mut self, size: usize, number: u64) {
        let mut loan = self.0.loan(size).await.expect("loan");
        payload::write(&mut loan, number);
        self.0.send(loan).await.expect("send");
    }

    /// `feed` and `flush` of its `Sink`.
    async fn send_batch(&mut self, size: usize, number: u64, count: u64) {
        for _ in 0..count {
            let mut loan = self.0.loan(size).await.expect("loan");
            payload::write(&mut loan, number);
            self.0.feed(loan).await.expect("feed");
        }
        SinkExt::<tokio_shm::ShmLoan>::flush(&mut self.0).await.expect("flush");
    }
}

pub(crate) struct Subscriber(ShmSubscriber);

impl Rx for Subscriber {
    async fn open(case: &Case, topic: &'static str) -> Self {
        let mut builder =
            ShmSubscriber::builder(topic).runtime_dir(runtime_dir(case)).depth(case.depth as u32);
        builder = match case.mode {
            Mode::Awake => builder.busy_poll(BusyPoll::Always),
            Mode::Parked => builder.busy_poll(BusyPoll::Off),
            Mode::Default => builder,
        };
        let mut subscriber = builder.connect().expect("connect");
        subscriber.wait_for_publishers(1).await.expect("a publisher");
        Self(subscriber)
    }

    async fn recv<T>(&mut self, look: impl FnOnce(&[u8]) -> T) -> T {
        look(&self.0.next().await.expect("no end asked for").expect("a message"))
    }
}

/// Only its owner may enter, or it is refused.
pub(crate) fn runtime_dir(case: &Case) -> PathBuf {
    let dir = case.dir.join("tokio-shm");
    let _ = std::fs::create_dir(&dir);
    std::fs::set_permissions(&dir, std::fs::Permissions::from_mode(0o700)).expect("mode");
    dir
}
