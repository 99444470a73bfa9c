//! Bridge to bridge beside plain zenoh, over TCP on the loopback device: round trip of one message at a time, and one-way
//! throughput, in two processes. Prints a table in Markdown.
//!
//! Bridged, a message goes publisher, bridge, zenoh, bridge, subscriber: two hops through shared memory more than plain. The
//! peer is this program run again. Left out: a real network, which adds the same to both. zenoh's shared memory is off, so that
//! the bytes do go through TCP.
#![allow(clippy::print_stdout)] // its results

use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use tokio_shm::bridge::{Bridge, Direction, Route};
use tokio_shm::{ShmPoolConfig, ShmPublisher, ShmSubscriber};
use zenoh::qos::CongestionControl;

const SIZES: [(&str, usize, usize, usize); 4] = [
    // Name, bytes, round trips, messages one way.
    ("64 B", 64, 3_000, 100_000),
    ("4 KiB", 4 << 10, 3_000, 50_000),
    ("64 KiB", 64 << 10, 1_000, 10_000),
    ("1 MiB", 1 << 20, 300, 1_000),
];
const LIMIT: Duration = Duration::from_secs(60);

#[tokio::main]
async fn main() {
    let arguments: Vec<_> = std::env::args().collect();
    match &arguments[1..] {
        [role, kind, at] if role == "--peer" => peer(kind, at).await,
        arguments if arguments.iter().any(|argument| argument == "--test") => {}
        _ => measure().await,
    }
}

async fn measure() {
    println!(
        "message | round trip, plain | bridged | one way, plain | bridged\n--- | ---: | ---: | ---: | ---:"
    );
    let (mut plain, mut bridged) = (Plain::new().await, Bridged::new().await);
    for (name, len, trips, messages) in SIZES {
        let mut cells = Vec::new();
        cells.push(micros(plain.round_trip(len, trips).await));
        cells.push(micros(bridged.round_trip(len, trips).await));
        cells.push(rate(len, plain.one_way(len, messages).await));
        cells.push(rate(len, bridged.one_way(len, messages).await));
        println!("{name} | {}", cells.join(" | "));
    }
}

fn config(listen: &[&str], connect: &[&str]) -> zenoh::Config {
    let mut config = zenoh::Config::default();
    let list = |endpoints: &[&str]| serde_json::to_string(endpoints).unwrap();
    for (key, value) in [
        ("scouting/multicast/enabled", "false".to_owned()),
        ("transport/shared_memory/enabled", "false".to_owned()),
        ("listen/endpoints", list(listen)),
        ("connect/endpoints", list(connect)),
    ] {
        config.insert_json5(key, &value).unwrap();
    }
    config
}

async fn listening() -> (zenoh::Session, String) {
    let session = zenoh::open(config(&["tcp/127.0.0.1:0"], &[])).await.unwrap();
    let at = session
        .info()
        .locators()
        .await
        .into_iter()
        .map(|at| at.to_string())
        .find(|at| at.starts_with("tcp/"));
    (session, at.unwrap())
}

struct Peer(Child);

impl Peer {
    fn start(kind: &str, at: &str) -> Self {
        let exe = std::env::current_exe().unwrap();
        let mut child = Command::new(exe)
            .args(["--peer", kind, at])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut ready = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut ready).unwrap();
        Self(child)
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        let _ = self.0.wait();
    }
}

/// Sends back what comes with a 1 in front, and of the others only each that has a 2 there.
async fn peer(kind: &str, at: &str) {
    let over = tokio::task::spawn_blocking(|| {
        let mut nothing = String::new();
        let _ = std::io::stdin().read_line(&mut nothing);
    });
    let echoing = async {
        if kind == "plain" {
            let session = zenoh::open(config(&[], &[at])).await.unwrap();
            let back =
                session.declare_publisher("pong").congestion_control(CongestionControl::Block).await.unwrap();
            let samples = session.declare_subscriber("ping").await.unwrap();
            ready();
            while let Ok(sample) = samples.recv_async().await {
                if sample.payload().to_bytes()[0] != 0 {
                    back.put(sample.payload().clone()).await.unwrap();
                }
            }
        } else {
            let dir = tempfile::tempdir().unwrap();
            let bridge =
                bridge(&dir, "ping", "pong").connect(at).config(config(&[], &[at])).start().await.unwrap();
            let back = publisher(&dir, "pong");
            let mut samples = subscriber(&dir, "ping");
            ready();
            while let Ok(sample) = samples.recv().await {
                if sample.first().is_some_and(|&first| first != 0) {
                    back.send(&*sample).await.unwrap();
                }
            }
            bridge.close().await;
        }
    };
    tokio::select! { () = echoing => {}, _ = over => {} }
    std::process::exit(0);
}

fn ready() {
    println!("ready");
    std::io::stdout().flush().unwrap();
}

fn private(dir: &tempfile::TempDir) -> &std::path::Path {
    std::fs::set_permissions(dir, std::os::unix::fs::PermissionsExt::from_mode(0o700)).unwrap();
    dir.path()
}

fn publisher(dir: &tempfile::TempDir, topic: &str) -> ShmPublisher {
    ShmPublisher::builder(topic).runtime_dir(private(dir)).pool(ShmPoolConfig::new()).bind().unwrap()
}

fn subscriber(dir: &tempfile::TempDir, topic: &str) -> ShmSubscriber {
    ShmSubscriber::builder(topic).runtime_dir(private(dir)).connect().unwrap()
}

fn bridge(dir: &tempfile::TempDir, into: &str, out_of: &str) -> tokio_shm::bridge::BridgeBuilder {
    Bridge::builder()
        .runtime_dir(private(dir))
        .route(Route::new(into, into).unwrap().direction(Direction::FromZenoh))
        .route(Route::new(out_of, out_of).unwrap().direction(Direction::ToZenoh))
}

/// `first` is 1 for a message that is to come back.
fn message(len: usize, first: u8) -> Vec<u8> {
    let mut message = vec![7; len];
    message[0] = first;
    message
}

trait Path {
    async fn send(&mut self, message: &[u8]);
    /// The next that comes back, or nothing in time.
    async fn back(&mut self, limit: Duration) -> Option<usize>;

    async fn come_through(&mut self) {
        let begin = Instant::now();
        loop {
            self.send(&message(8, 1)).await;
            if self.back(Duration::from_millis(100)).await.is_some() {
                break;
            }
            assert!(begin.elapsed() < LIMIT, "no way to the peer");
        }
        while self.back(Duration::from_millis(200)).await.is_some() {}
    }

    /// The median, in seconds.
    async fn round_trip(&mut self, len: usize, trips: usize) -> f64 {
        let message = message(len, 1);
        let mut times = Vec::with_capacity(trips);
        for trip in 0..trips + trips / 10 {
            let begin = Instant::now();
            self.send(&message).await;
            assert_eq!(self.back(LIMIT).await, Some(len));
            if trip >= trips / 10 {
                times.push(begin.elapsed().as_secs_f64());
            }
        }
        times.sort_by(f64::total_cmp);
        times[times.len() / 2]
    }

    /// Messages a second, from the first sent until the last has come back.
    async fn one_way(&mut self, len: usize, messages: usize) -> f64 {
        let (silent, last) = (message(len, 0), message(len, 2));
        let begin = Instant::now();
        for _ in 1..messages {
            self.send(&silent).await;
        }
        self.send(&last).await;
        assert_eq!(self.back(LIMIT).await, Some(len));
        messages as f64 / begin.elapsed().as_secs_f64()
    }
}

struct Plain {
    samples: zenoh::pubsub::Subscriber<zenoh::handlers::FifoChannelHandler<zenoh::sample::Sample>>,
    publisher: zenoh::pubsub::Publisher<'static>,
    _session: zenoh::Session,
    _peer: Peer,
}

impl Plain {
    async fn new() -> Self {
        let (session, at) = listening().await;
        let samples = session.declare_subscriber("pong").await.unwrap();
        let publisher =
            session.declare_publisher("ping").congestion_control(CongestionControl::Block).await.unwrap();
        let mut plain = Self { samples, publisher, _peer: Peer::start("plain", &at), _session: session };
        plain.come_through().await;
        plain
    }
}

impl Path for Plain {
    async fn send(&mut self, message: &[u8]) {
        self.publisher.put(message).await.unwrap();
    }

    async fn back(&mut self, limit: Duration) -> Option<usize> {
        let sample = tokio::time::timeout(limit, self.samples.recv_async()).await.ok()?;
        Some(sample.unwrap().payload().len())
    }
}

struct Bridged {
    samples: ShmSubscriber,
    publisher: ShmPublisher,
    _bridge: Bridge,
    _dir: tempfile::TempDir,
    _peer: Peer,
}

impl Bridged {
    async fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (session, at) = listening().await;
        let bridge = bridge(&dir, "pong", "ping").session(session).start().await.unwrap();
        let (publisher, samples) = (publisher(&dir, "ping"), subscriber(&dir, "pong"));
        let mut bridged =
            Self { samples, publisher, _bridge: bridge, _dir: dir, _peer: Peer::start("bridged", &at) };
        bridged.come_through().await;
        bridged
    }
}

impl Path for Bridged {
    async fn send(&mut self, message: &[u8]) {
        self.publisher.send(message).await.unwrap();
    }

    async fn back(&mut self, limit: Duration) -> Option<usize> {
        let sample = tokio::time::timeout(limit, self.samples.recv()).await.ok()?;
        Some(sample.unwrap().len())
    }
}

fn micros(seconds: f64) -> String {
    format!("{:.0} µs", seconds * 1e6)
}

fn rate(len: usize, messages: f64) -> String {
    if len < 64 << 10 {
        format!("{:.0} k/s", messages / 1e3)
    } else {
        format!("{:.2} GB/s", messages * len as f64 / 1e9)
    }
}
