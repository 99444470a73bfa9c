//! Local topics beyond one machine: a bridge between them and [zenoh] key expressions.
//!
//! One bridge a host, each with the routes that concern it; on the other side may be another bridge or any zenoh program.
//! The command `tokio-shm bridge` is this and an argument parser.
//!
//! ```no_run
//! use tokio_shm::bridge::{Bridge, Route};
//!
//! # #[tokio::main]
//! # async fn main() -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
//! let bridge = Bridge::builder()
//!     .route(Route::new("camera/*", "robot1/camera/*")?)
//!     .listen("tcp/0.0.0.0:7447")
//!     .start()
//!     .await?;
//! tokio::signal::ctrl_c().await?;
//! println!("{:?}", bridge.stats());
//! bridge.close().await;
//! # Ok(())
//! # }
//! ```
//!
//! # What it promises
//!
//! - **Order.** Messages of one publisher arrive in its order.
//! - **Once or counted.** What was lost between two bridges (a connection cut, a message dropped) is counted at the
//!   receiving one, exactly, by the gaps in the numbers that travel along: see [`BridgeStats`]. A plain zenoh program finds those
//!   numbers and a timestamp in the attachment: see [`Origin`].
//! - **Backpressure.** With [`Congestion::Wait`] a full subscriber on one host makes the publisher on the other wait, through both
//!   bridges. With [`Congestion::Drop`] messages are dropped and counted.
//! - **No echo.** What a bridge puts into a topic no bridge takes out again, and a message whose publisher is on this host
//!   is not put into a topic here, by whatever way it came back.
//! - **Reconnection.** A session that the bridge opened connects again for ever, to routers and peers that come back; and a
//!   connection that zenoh 1.10 keeps but no longer sends on is ended, so that it is made again
//!   ([`revived`](BridgeStats::revived)).
//!
//! # What is copied
//!
//! A local message is handed to zenoh where its publisher wrote it, and held until zenoh has it in its network buffers, also to
//! zenoh programs of the same host; with [`shared_memory`](BridgeBuilder::shared_memory) the bridge copies it into a pool that such
//! programs attach to. What comes from zenoh is copied once, into the local publisher's pool.

mod attachment;
mod discovery;
mod error;
mod inward;
mod outward;
mod queue;
mod revival;
mod route;
mod stats;

use std::collections::{HashMap, HashSet};
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use ::zenoh::Session;
use ::zenoh::sample::Locality;
use ::zenoh::shm::ShmProvider;
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};

pub use self::attachment::Origin;
use self::discovery::{Discovery, LocalPublishers};
pub use self::error::BridgeError;
use self::inward::{Inward, Topics};
use self::outward::Outward;
use self::revival::Revival;
pub use self::route::{Congestion, Direction, Route, RouteError};
pub use self::stats::BridgeStats;
use self::stats::Counters;
use crate::access::Access;
use crate::sys::random::random_id;
use crate::text::chain;
use crate::topic::RuntimeDir;
use crate::zenoh::{PoolBackend, shm_clients};
use crate::{OnFull, ShmPoolConfig, ShmSubscriber};

type SharedMemory = Arc<ShmProvider<PoolBackend>>;

/// How long [`Bridge::close`] waits for what is under way, and then for what the session's end should have ended.
const PATIENCE: Duration = Duration::from_secs(5);

/// Default of [`BridgeBuilder::patience`].
const SEND_PATIENCE: Duration = Duration::from_secs(30);

/// Where a bridge's publisher ids carry the mark of bridges.
struct Mark(u32);

/// On the ids of publishers that bridges have made: what they publish is not taken out again.
const INJECTED: Mark = Mark(u32::from_be_bytes(*b"brdg"));

impl Mark {
    fn is_on(&self, publisher: u128) -> bool {
        (publisher >> 96) as u32 == self.0
    }

    /// A random id with the mark.
    fn new_id(&self) -> io::Result<u128> {
        Ok(random_id()? >> 32 | u128::from(self.0) << 96)
    }
}

/// A running bridge between local topics and zenoh; see the [module](self).
///
/// It stops when it is dropped.
#[derive(Debug)]
#[must_use = "a bridge stops when it is dropped"]
pub struct Bridge {
    session: Session,
    own_session: bool,
    counters: Arc<Counters>,
    stop: watch::Sender<bool>,
    running: JoinHandle<()>,
}

/// Settings of a [`Bridge`]; made by [`Bridge::builder`].
#[derive(Debug, Default)]
#[must_use = "a builder does nothing until start is called"]
pub struct BridgeBuilder {
    routes: Vec<Route>,
    session: Option<Session>,
    config: Option<::zenoh::Config>,
    listen: Vec<String>,
    connect: Vec<String>,
    runtime_dir: Option<PathBuf>,
    pool: ShmPoolConfig,
    shared_memory: Option<ShmPoolConfig>,
    depth: Option<u32>,
    max_topics: Option<usize>,
    patience: Option<Duration>,
    no_scouting: bool,
}

impl Bridge {
    /// A bridge with no route yet.
    pub fn builder() -> BridgeBuilder {
        BridgeBuilder::default()
    }

    /// The bridge's counters.
    pub fn stats(&self) -> BridgeStats {
        self.counters.read()
    }

    /// zenoh's session, to ask it where it listens or whom it is connected to.
    pub fn session(&self) -> &Session {
        &self.session
    }

    /// Whether it has stopped by itself: zenoh's session was closed, or the runtime directory can no longer be read.
    pub fn is_stopped(&self) -> bool {
        self.running.is_finished()
    }

    /// Stops: what was received from zenoh is on its links then, what was taken from local topics is zenoh's. A session
    /// that the bridge opened is closed.
    ///
    /// Where the other side takes nothing, it waits for five seconds, and leaves the rest: it is counted nowhere but in the gap
    /// that the other bridge sees.
    ///
    /// # Cancel safety
    ///
    /// The bridge goes on stopping in the background.
    pub async fn close(self) -> BridgeStats {
        let Self { session, own_session, counters, stop, mut running } = self;
        let _ = stop.send(true);
        let mut stopped = tokio::time::timeout(PATIENCE, &mut running).await;
        if own_session && let Err(error) = session.close().await {
            tracing::warn!(error = %chain(&*error), "zenoh's session did not close well");
        }
        if stopped.is_err() {
            // A put that waited for the session ends with it.
            stopped = tokio::time::timeout(PATIENCE, &mut running).await;
        }
        match stopped {
            Ok(Err(error)) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
            Ok(_) => {}
            Err(_) => tracing::warn!("the bridge did not stop in time: zenoh takes nothing"),
        }
        counters.read()
    }
}

impl BridgeBuilder {
    /// Adds a route. A topic for which there are several goes all of these ways.
    pub fn route(mut self, route: Route) -> Self {
        self.routes.push(route);
        self
    }

    /// A session to use, in place of one of the bridge's own. Its settings are left alone: see [`start`](Self::start) for
    /// what the bridge sets for its own.
    pub fn session(mut self, session: Session) -> Self {
        self.session = Some(session);
        self
    }

    /// The configuration of the bridge's session. Default: zenoh's.
    pub fn config(mut self, config: ::zenoh::Config) -> Self {
        self.config = Some(config);
        self
    }

    /// Adds an endpoint that others can connect to, such as `tcp/0.0.0.0:7447`.
    pub fn listen(mut self, endpoint: impl Into<String>) -> Self {
        self.listen.push(endpoint.into());
        self
    }

    /// Adds an endpoint to connect to, such as `tcp/192.168.1.7:7447`: a router or another bridge.
    pub fn connect(mut self, endpoint: impl Into<String>) -> Self {
        self.connect.push(endpoint.into());
        self
    }

    /// Whether the bridge's session looks for others on the network by multicast. Default: as the configuration says.
    pub fn scouting(mut self, scouting: bool) -> Self {
        self.no_scouting = !scouting;
        self
    }

    /// The runtime directory, in place of `$TOKIO_SHM_DIR`, `$XDG_RUNTIME_DIR/tokio-shm` or the one in the temporary
    /// directory.
    pub fn runtime_dir(mut self, path: impl Into<PathBuf>) -> Self {
        self.runtime_dir = Some(path.into());
        self
    }

    /// The pool of each local topic that the bridge publishes to.
    pub fn pool(mut self, config: ShmPoolConfig) -> Self {
        self.pool = config;
        self
    }

    /// Puts messages of 3 KiB or more into a pool that zenoh programs of this host read in place, if they are opened with
    /// [`shm_clients`]. To all others zenoh copies them from there. Default: no shared memory with zenoh programs, whatever
    /// [`config`](Self::config) says.
    ///
    /// A receiver that is kept from running for a tenth of a second may lose what was sent meanwhile: zenoh 1.10 takes it for dead.
    /// Another bridge counts that as [`missed`](BridgeStats::missed).
    pub fn shared_memory(mut self, config: ShmPoolConfig) -> Self {
        self.shared_memory = Some(config);
        self
    }

    /// How many messages of each local publisher may be queued for the bridge or held by it. Default 64.
    pub fn depth(mut self, messages: u32) -> Self {
        self.depth = Some(messages);
        self
    }

    /// How long a sender waits for a connection that takes nothing, before its message is dropped, and counted as
    /// [`missed`](BridgeStats::missed) there. Default thirty seconds.
    ///
    /// It is also how long it may take after a connection was cut in the middle of a wait until the next one is of use. In a
    /// [`session`](Self::session) of yours it is what its configuration says.
    pub fn patience(mut self, patience: Duration) -> Self {
        self.patience = Some(patience);
        self
    }

    /// How many topics the bridge publishes to, for each route. Default 1,024.
    pub fn max_topics(mut self, topics: usize) -> Self {
        self.max_topics = Some(topics);
        self
    }

    /// Opens the session, if none was given, and starts.
    ///
    /// Topics without wildcard are subscribed to when this returns. Others are when they are found in the runtime
    /// directory; what their publishers sent before that is neither bridged nor counted.
    ///
    /// A session of the bridge's own tries to connect for ever, and does not close a connection that takes nothing:
    /// see [`patience`](Self::patience). In a session given to it, zenoh closes such a connection (after five seconds by
    /// default); and zenoh 1.10 may then lose sight of the next one to the same peer, for as long as that lasts. In such a session
    /// zenoh may also send by its own shared memory, which it may use again too soon: see docs/bridge.md.
    ///
    /// # Errors
    ///
    /// [`BridgeError`]: no route, a runtime directory that cannot be used, or whatever zenoh refuses.
    ///
    /// # Panics
    ///
    /// Outside a tokio runtime, or in one whose I/O and time are not enabled.
    pub async fn start(self) -> Result<Bridge, BridgeError> {
        if self.routes.is_empty() {
            return Err(BridgeError::NoRoute);
        }
        let runtime_dir = RuntimeDir::resolve(self.runtime_dir.as_deref(), Access::default())?;
        let shared_memory = match &self.shared_memory {
            Some(config) => Some(PoolBackend::new(config.clone())?.into_provider()),
            None => None,
        };
        let (session, own_session) = match &self.session {
            Some(session) => (session.clone(), false),
            None => (self.open_session().await.map_err(BridgeError::Zenoh)?, true),
        };
        let discovery = Discovery::new(runtime_dir.clone()).map_err(BridgeError::Watch)?;
        let (stop, stopping) = watch::channel(false);
        let mut running = Running {
            session: session.clone(),
            runtime_dir,
            counters: Arc::default(),
            shared_memory,
            local: discovery.publishers(),
            depth: self.depth.unwrap_or(64),
            own_session,
            stop: Stop(stopping),
            outward: JoinSet::new(),
            bridged: HashSet::new(),
            inward: JoinSet::new(),
        };
        let counters = Arc::clone(&running.counters);
        let found = discovery.scan().map_err(BridgeError::Watch)?;
        for route in self.routes.iter().filter(|route| route.is_from_zenoh()) {
            let topics = Topics {
                runtime_dir: running.runtime_dir.clone(),
                pool: self.pool.clone(),
                congestion: route.congestion,
                max_topics: self.max_topics.unwrap_or(1_024),
                open: HashMap::new(),
                waited_in_vain: Duration::ZERO,
            };
            running.start_inward(route, topics).await?;
        }
        for (index, route) in self.routes.iter().enumerate().filter(|(_, route)| route.is_to_zenoh()) {
            if let Some((topic, key)) = route.exact() {
                running.start_outward(index, route, topic, &key, false).await?;
            }
        }
        running.follow(&self.routes, &found).await;
        if own_session {
            let revival = Revival::new(&session).await.map_err(BridgeError::Zenoh)?;
            tokio::spawn(revival.run(session.clone(), Arc::clone(&counters), running.stop.clone()));
        }
        let running = tokio::spawn(running.run(self.routes, discovery));
        Ok(Bridge { session, own_session, counters, stop, running })
    }

    async fn open_session(&self) -> ::zenoh::Result<Session> {
        let given = self.config.is_some();
        let mut config = self.config.clone().unwrap_or_default();
        for (key, endpoints) in [("listen/endpoints", &self.listen), ("connect/endpoints", &self.connect)] {
            if !endpoints.is_empty() {
                config.insert_json5(key, &json_list(endpoints))?;
            }
        }
        if self.no_scouting {
            config.insert_json5("scouting/multicast/enabled", "false")?;
        }
        if !given {
            let settings = [
                ("connect/exit_on_failure", "false"),
                ("connect/timeout_ms", "-1"),
                ("connect/retry", "{ period_init_ms: 200, period_max_ms: 2000, period_increase_factor: 2 }"),
            ];
            for (key, value) in settings {
                config.insert_json5(key, value)?;
            }
        }
        let patience = self.patience.unwrap_or(SEND_PATIENCE).as_micros().to_string();
        for key in ["wait_before_drop", "max_wait_before_drop_fragments"] {
            config
                .insert_json5(&format!("transport/link/tx/queue/congestion_control/drop/{key}"), &patience)?;
        }
        // To programs of this host zenoh sends by an arena of its own, by default. Which of it is still held a thread of the receiver
        // says every 50 ms; where it is late (a busy machine), zenoh 1.10 uses that memory again while it is being read, and does
        // not deliver what arrives. So only memory of ours, if that is wanted.
        let shared_memory = self.shared_memory.is_some();
        let key = if shared_memory { "transport_optimization/enabled" } else { "enabled" };
        config.insert_json5(&format!("transport/shared_memory/{key}"), "false")?;
        match ::zenoh::open(config) {
            open if shared_memory => open.with_shm_clients(shm_clients()).await,
            open => open.await,
        }
    }
}

/// A list of strings as JSON.
fn json_list(strings: &[String]) -> String {
    let quoted = strings.iter().map(|text| {
        let escaped: String = text
            .chars()
            .flat_map(|c| match c {
                '"' | '\\' => vec!['\\', c],
                c => vec![c],
            })
            .collect();
        format!("\"{escaped}\"")
    });
    format!("[{}]", quoted.collect::<Vec<_>>().join(","))
}

/// Says when to stop: told so, or the bridge dropped.
#[derive(Debug, Clone)]
struct Stop(watch::Receiver<bool>);

impl Stop {
    /// Cancel safe.
    async fn stopped(&mut self) {
        // An error is the sender's end, which means the same.
        let _ = self.0.wait_for(|stop| *stop).await;
    }
}

/// How long after a failed look at the runtime directory the next one is.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

struct Running {
    session: Session,
    runtime_dir: RuntimeDir,
    counters: Arc<Counters>,
    shared_memory: Option<SharedMemory>,
    local: LocalPublishers,
    depth: u32,
    own_session: bool,
    stop: Stop,
    outward: JoinSet<(usize, String)>,
    /// What `outward` is at: by route and topic.
    bridged: HashSet<(usize, String)>,
    inward: JoinSet<()>,
}

impl Running {
    async fn start_inward(&mut self, route: &Route, mut topics: Topics) -> Result<(), BridgeError> {
        if let Some((topic, _)) = route.exact() {
            let opened = topics.open(&topic).await.map(|_| ());
            opened.map_err(|error| BridgeError::Topic { topic, source: error.into() })?;
        }
        let (entrance, samples) = queue::queue();
        let subscriber = self
            .session
            .declare_subscriber(route.keys())
            .callback(move |sample| entrance.push(sample))
            // Not what this bridge itself publishes.
            .allowed_origin(Locality::Remote)
            .await
            .map_err(BridgeError::Zenoh)?;
        let counters = Arc::clone(&self.counters);
        let inward = Inward { route: route.clone(), samples, topics, local: self.local.clone(), counters };
        let stop = self.stop.clone();
        self.inward.spawn(async move {
            inward.run(stop).await;
            drop(subscriber);
        });
        Ok(())
    }

    async fn start_outward(
        &mut self,
        index: usize,
        route: &Route,
        topic: String,
        key: &str,
        ends: bool,
    ) -> Result<(), BridgeError> {
        let mut builder = ShmSubscriber::builder(&topic)
            .runtime_dir(self.runtime_dir.path())
            .depth(self.depth)
            .end_with_last_publisher(ends);
        if route.congestion == Congestion::Drop {
            builder = builder.on_full(OnFull::DropOldest);
        }
        let subscriber = match builder.connect() {
            Ok(subscriber) => subscriber,
            Err(error) => return Err(BridgeError::Topic { topic, source: error.into() }),
        };
        // In a session of its own, zenoh waits before it drops; in another one, only before it closes the connection.
        let close = !self.own_session && route.congestion == Congestion::Wait;
        let (publisher, heard) =
            outward::declare(&self.session, key, close).await.map_err(BridgeError::Zenoh)?;
        tracing::debug!(topic, key, "bridged");
        let counters = Arc::clone(&self.counters);
        let outward = Outward {
            subscriber,
            publisher,
            heard,
            local: self.local.clone(),
            counters,
            shared_memory: self.shared_memory.clone(),
        };
        let stop = self.stop.clone();
        self.bridged.insert((index, topic.clone()));
        self.outward.spawn(async move {
            outward.run(stop).await;
            (index, topic)
        });
        Ok(())
    }

    /// Starts with the topics found that are not bridged yet.
    async fn follow(&mut self, routes: &[Route], found: &HashSet<String>) {
        for (index, route) in routes.iter().enumerate().filter(|(_, route)| route.is_to_zenoh()) {
            for topic in found {
                let Some(key) = route.key_of(topic) else { continue };
                if self.bridged.contains(&(index, topic.clone())) {
                    continue;
                }
                if let Err(error) = self.start_outward(index, route, topic.clone(), &key, true).await {
                    tracing::warn!(%topic, error = %chain(&error), "the topic is not bridged");
                }
            }
        }
    }

    async fn run(mut self, routes: Vec<Route>, discovery: Discovery) {
        loop {
            let look = tokio::select! {
                biased;
                () = self.stop.stopped() => break,
                // The session is closed.
                Some(_) = self.inward.join_next() => break,
                Some(ended) = self.outward.join_next() => {
                    match ended {
                        Ok(ended) => { self.bridged.remove(&ended); }
                        Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
                        Err(_) => break,
                    }
                    Ok(())
                }
                changed = discovery.changed() => changed,
            };
            match look.and_then(|()| discovery.scan()) {
                Ok(found) => self.follow(&routes, &found).await,
                Err(error) => {
                    tracing::warn!(error = %chain(&error), "the runtime directory cannot be looked at");
                    tokio::select! {
                        () = self.stop.stopped() => break,
                        () = tokio::time::sleep(LOOK_AGAIN) => {}
                    }
                }
            }
        }
        while self.outward.join_next().await.is_some() {}
        while self.inward.join_next().await.is_some() {}
    }
}
