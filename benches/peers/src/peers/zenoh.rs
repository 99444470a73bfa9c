//! zenoh with shared memory, between two sessions that are connected by a Unix socket and nothing else. Messages are
//! allocated by its provider, congestion blocks the sender.

use std::path::PathBuf;
use std::sync::OnceLock;
use std::time::Duration;

use zenoh::handlers::{FifoChannel, FifoChannelHandler};
use zenoh::pubsub::{Publisher as Declared, Subscriber as DeclaredSubscriber};
use zenoh::qos::CongestionControl;
use zenoh::sample::Sample;
use zenoh::shm::{BlockOn, GarbageCollect, PosixShmProviderBackend, ShmProvider, ShmProviderBuilder};
use zenoh::{Config, Session, Wait as _};

use super::{BACK, OUT, Peer, Rx, Tx, until_some};
use crate::case::{Case, Work};
use crate::payload;

pub(crate) struct Zenoh;

impl Peer for Zenoh {
    type Tx = Publisher;
    type Rx = Subscriber;
    const MULTI_THREAD: bool = true;
}

pub(crate) struct Publisher {
    provider: ShmProvider<PosixShmProviderBackend>,
    publisher: Declared<'static>,
}

impl Tx for Publisher {
    async fn open(case: &Case, topic: &'static str) -> Self {
        let session = session(case, topic == OUT).await;
        // Room for all that may be under way, and for what its allocator takes.
        let room = ((case.depth + 8) * (case.size + 256)).next_multiple_of(1 << 16);
        let backend = PosixShmProviderBackend::builder(room).wait().expect("shared memory");
        let provider = ShmProviderBuilder::backend(backend).wait();
        let publisher = session.declare_publisher(topic).congestion_control(CongestionControl::Block);
        // Batches are for streams; single messages go at once.
        let publisher = publisher.express(case.work != Work::Stream).await.expect("publisher");
        Self { provider, publisher }
    }

    async fn connected(&mut self, receivers: usize) {
        while !self.publisher.matching_status().await.expect("status").matching() {
            tokio::time::sleep(Duration::from_micros(200)).await;
        }
        if receivers > 1 {
            // It tells that there are some, not how many.
            tokio::time::sleep(Duration::from_millis(300)).await;
        }
    }

    async fn send(&mut self, size: usize, number: u64) {
        let buffer = self.provider.alloc(size).with_policy::<BlockOn<GarbageCollect>>();
        let mut buffer = buffer.await.expect("memory");
        payload::write(&mut buffer, number);
        self.publisher.put(buffer).await.expect("put");
    }
}

pub(crate) struct Subscriber(DeclaredSubscriber<FifoChannelHandler<Sample>>);

impl Rx for Subscriber {
    async fn open(case: &Case, topic: &'static str) -> Self {
        let session = session(case, topic == BACK).await;
        let subscriber = session.declare_subscriber(topic).with(FifoChannel::new(case.depth));
        Self(subscriber.await.expect("subscriber"))
    }

    async fn recv<T>(&mut self, look: impl FnOnce(&[u8]) -> T) -> T {
        let sample = self.0.recv_async().await.expect("a message");
        look(sample.payload().as_shm().expect("in shared memory"))
    }
}

/// The session of this process; the sending one of a case listens.
async fn session(case: &Case, listens: bool) -> &'static Session {
    static SESSION: OnceLock<Session> = OnceLock::new();
    if let Some(session) = SESSION.get() {
        return session;
    }
    let socket: PathBuf = case.dir.join("zenoh.sock");
    if !listens {
        until_some(|| socket.exists().then_some(())).await;
    }
    let endpoint = format!(r#"["unixsock-stream/{}"]"#, socket.display());
    let mut config = Config::default();
    let settings = [
        ("mode", r#""peer""#),
        ("scouting/multicast/enabled", "false"),
        ("scouting/gossip/enabled", "false"),
        (if listens { "listen/endpoints" } else { "connect/endpoints" }, &endpoint),
        (if listens { "connect/endpoints" } else { "listen/endpoints" }, "[]"),
        ("transport/shared_memory/enabled", "true"),
    ];
    for (key, value) in settings {
        config.insert_json5(key, value).expect("a setting");
    }
    let opened = zenoh::open(config).await.expect("session");
    SESSION.get_or_init(|| opened)
}

/// Has it remove what its killed processes left in `/dev/shm`; those that end do so themselves.
pub(crate) fn sweep() {
    zenoh::shm::cleanup_orphaned_shm_segments();
}
