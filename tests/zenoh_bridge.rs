//! Topics beyond one host: two bridges with a runtime directory each, and plain zenoh programs.
//!
//! Two hosts are two runtime directories here; `zenoh_two_hosts` has them in network namespaces of their own.

mod support;

use std::time::Duration;

use support::sessions::{config, listening, until_matched};
use support::{Dir, LIMIT, numbered, until, within};
use tokio_shm::bridge::{Bridge, BridgeBuilder, BridgeStats, Congestion, Direction, Origin, Route};
use tokio_shm::zenoh::shm_clients;
use tokio_shm::{RecvError, ShmPoolConfig, ShmPublisher, ShmSample, ShmSubscriber};
use zenoh::Session;
use zenoh::qos::CongestionControl;

const MIB: usize = 1 << 20;

/// Long enough for what should not come to have come.
const QUIET: Duration = Duration::from_millis(300);

fn write(len: usize, seq: u64) -> Vec<u8> {
    let mut bytes = vec![0; len];
    numbered::write(&mut bytes, seq);
    bytes
}

#[track_caller]
fn seq_of(bytes: &[u8]) -> u64 {
    let seq = numbered::seq_of(bytes);
    numbered::assert_intact(bytes, seq);
    seq
}

fn route(topics: &str, keys: &str) -> Route {
    Route::new(topics, keys).expect("a route")
}

fn bridge(dir: &Dir) -> BridgeBuilder {
    Bridge::builder().runtime_dir(dir.path()).scouting(false)
}

async fn start(builder: BridgeBuilder) -> (Bridge, String) {
    let bridge = within("start", builder.listen("tcp/127.0.0.1:0").start()).await.expect("a bridge");
    let at = bridge.session().info().locators().await.into_iter().map(|at| at.to_string());
    let at = at.into_iter().find(|at| at.starts_with("tcp/")).expect("a locator");
    (bridge, at)
}

/// Two hosts, bridged.
struct Hosts {
    a: Dir,
    b: Dir,
    bridge_a: Bridge,
    bridge_b: Bridge,
}

impl Hosts {
    async fn new(route_a: Route, route_b: Route) -> Self {
        let (a, b) = (Dir::new(), Dir::new());
        let (bridge_a, at) = start(bridge(&a).route(route_a)).await;
        let (bridge_b, _) = start(bridge(&b).route(route_b).connect(at)).await;
        Self { a, b, bridge_a, bridge_b }
    }

    async fn close(self) {
        within("close", self.bridge_b.close()).await;
        within("close", self.bridge_a.close()).await;
        self.a.assert_empties();
        self.b.assert_empties();
    }
}

/// The next message that is no greeting.
async fn recv(subscriber: &mut ShmSubscriber) -> Result<ShmSample, RecvError> {
    loop {
        let sample = within("receive", subscriber.recv()).await?;
        if !sample.is_empty() {
            return Ok(sample);
        }
    }
}

/// Sends empty messages until one has come through: from then on nothing is unheard.
async fn greet(publisher: &ShmPublisher, subscriber: &mut ShmSubscriber) {
    within("greeting", async {
        // What is sent before the bridge is there is not its to count.
        publisher.wait_for_subscribers(1).await;
        loop {
            publisher.send(b"").await.expect("send");
            if let Ok(first) = tokio::time::timeout(Duration::from_millis(50), subscriber.recv()).await {
                // Or more than one, the first of which were dropped, where the route does that.
                match first {
                    Ok(first) => assert!(first.is_empty()),
                    Err(error) => assert!(matches!(error, RecvError::Lagged { .. }), "{error}"),
                }
                return;
            }
        }
    })
    .await;
}

/// The bridge's counters once all that it has taken or received is counted: others may have the last message a moment sooner.
async fn settled(bridge: &Bridge) -> BridgeStats {
    until("all is counted", || {
        let stats = bridge.stats();
        let out = stats.sent + stats.unheard + stats.failed;
        let into = stats.injected + stats.repeated + stats.damaged + stats.echoes + stats.refused;
        (out, into) == (stats.taken, stats.received)
    })
    .await;
    bridge.stats()
}

async fn assert_quiet(subscriber: &mut ShmSubscriber) {
    if let Ok(more) = tokio::time::timeout(QUIET, recv(subscriber)).await {
        panic!("one too many: {:?}", more.map(|sample| seq_of(&sample)));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn zenoh_bridges_carry_many_topics_each_in_order() {
    let hosts = Hosts::new(
        route("camera/*", "robot1/camera/*").direction(Direction::ToZenoh),
        route("from/robot1/*", "robot1/camera/*").direction(Direction::FromZenoh),
    )
    .await;
    let mut pairs = Vec::new();
    for name in ["front", "back", "left"] {
        let publisher = hosts.a.publisher(&format!("camera/{name}")).bind().expect("bind");
        let mut subscriber = hosts.b.subscriber(&format!("from/robot1/{name}")).connect().expect("connect");
        greet(&publisher, &mut subscriber).await;
        pairs.push((publisher, subscriber));
    }
    // Not of the route.
    let other = hosts.a.publisher("lidar/front").bind().expect("bind");
    let lens = [8, 100, 5_000, 70_000, MIB];
    for seq in 0..200 {
        for (publisher, _) in &pairs {
            let len = lens[seq as usize % lens.len()];
            within("send", publisher.send(write(len, seq))).await.expect("send");
        }
        other.send(&write(100, seq)).await.expect("send");
        if seq % 20 == 19 {
            for (_, subscriber) in &mut pairs {
                for expected in seq - 19..=seq {
                    let sample = recv(subscriber).await.expect("a message");
                    assert_eq!(seq_of(&sample), expected);
                    assert_eq!(sample.len(), lens[expected as usize % lens.len()]);
                }
            }
        }
    }
    let (a, b) = (settled(&hosts.bridge_a).await, settled(&hosts.bridge_b).await);
    assert_eq!((a.sent + a.unheard, a.failed, a.lagged), (a.taken, 0, 0), "{a:?}");
    assert_eq!((b.received, b.missed, b.refused), (b.injected, 0, 0), "{b:?}");
    assert_eq!(a.sent, b.received);
    drop((pairs, other));
    hosts.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn zenoh_bridges_both_ways_echo_nothing() {
    let both = route("t", "k/t");
    let hosts = Hosts::new(both.clone(), both).await;
    let mut publishers = Vec::new();
    let mut subscribers = Vec::new();
    for dir in [&hosts.a, &hosts.b] {
        publishers.push(dir.publisher("t").bind().expect("bind"));
        subscribers.push(dir.subscriber("t").depth(1024).connect().expect("connect"));
    }
    let (at_a, at_b) = subscribers.split_at_mut(1);
    greet(&publishers[0], &mut at_b[0]).await;
    greet(&publishers[1], &mut at_a[0]).await;
    for seq in 0..100 {
        for (host, publisher) in publishers.iter().enumerate() {
            publisher.send(&write(100, seq * 2 + host as u64)).await.expect("send");
        }
    }
    for subscriber in &mut subscribers {
        let mut next = [0, 1];
        for _ in 0..200 {
            let seq = seq_of(&recv(subscriber).await.expect("a message"));
            assert_eq!(seq, next[seq as usize % 2]);
            next[seq as usize % 2] += 2;
        }
        assert_quiet(subscriber).await;
    }
    for stats in [settled(&hosts.bridge_a).await, settled(&hosts.bridge_b).await] {
        assert_eq!((stats.missed, stats.repeated, stats.refused), (0, 0, 0), "{stats:?}");
        assert_eq!(stats.injected, stats.received, "{stats:?}");
    }
    drop((publishers, subscribers));
    hosts.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn zenoh_message_that_comes_back_by_a_detour_is_not_put_into_its_topic_again() {
    // A zenoh program that sends all that it gets to another key, which the bridge takes for its own topic.
    let dir = Dir::new();
    let out = route("t", "out/t").direction(Direction::ToZenoh);
    let back = route("t", "back/t").direction(Direction::FromZenoh);
    let (bridge, at) = start(bridge(&dir).route(out).route(back)).await;
    let detour = zenoh::open(config("client", &[], &[&at])).await.expect("open");
    let returning = detour.declare_publisher("back/t").await.expect("publisher");
    let _turn = detour
        .declare_subscriber("out/t")
        .callback(move |sample| {
            let attachment = sample.attachment().cloned();
            zenoh::Wait::wait(returning.put(sample.payload().clone()).attachment(attachment)).expect("put");
        })
        .await
        .expect("subscriber");
    let publisher = dir.publisher("t").bind().expect("bind");
    let mut subscriber = dir.subscriber("t").connect().expect("connect");
    publisher.wait_for_subscribers(2).await;
    let (mut sent, mut received) = (0, 0);
    // What goes out before the way back is there does not come back.
    until("it comes back, and is known", || {
        bridge.stats().echoes > 0 || {
            sent += u64::from(publisher.try_send(&write(8, sent)).is_ok());
            while subscriber.try_recv().is_ok() {
                received += 1;
            }
            false
        }
    })
    .await;
    // What was sent is here once; whatever came for a second time would be beyond that.
    for _ in received..sent {
        let _ = recv(&mut subscriber).await.expect("a message");
    }
    assert_quiet(&mut subscriber).await;
    assert_eq!(bridge.stats().injected, 0);
    detour.close().await.expect("close");
    drop((publisher, subscriber));
    bridge.close().await;
    dir.assert_empties();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn zenoh_plain_programs_exchange_messages_with_topics() {
    let dir = Dir::new();
    let (bridge, at) = start(bridge(&dir).route(route("robot/*", "r1/*"))).await;
    let plain = zenoh::open(config("client", &[], &[&at])).await.expect("open");
    // From a topic to a plain subscriber, with its number and time beside it.
    let samples = plain.declare_subscriber("r1/pose").await.expect("subscriber");
    let publisher = dir.publisher("robot/pose").bind().expect("bind");
    let mut local = dir.subscriber("robot/pose").depth(1024).connect().expect("connect");
    let mut sent = 0;
    let first = within("the first", async {
        loop {
            publisher.send(&write(5_000, sent)).await.expect("send");
            sent += 1;
            if let Ok(sample) = tokio::time::timeout(Duration::from_millis(50), samples.recv_async()).await {
                return sample.expect("a message");
            }
        }
    })
    .await;
    let mut expected = seq_of(&first.payload().to_bytes());
    for _ in 0..50 {
        publisher.send(&write(5_000, sent)).await.expect("send");
        sent += 1;
        expected += 1;
        let sample = within("receive", samples.recv_async()).await.expect("a message");
        assert_eq!(seq_of(&sample.payload().to_bytes()), expected);
        let origin = Origin::decode(&sample.attachment().expect("an attachment").to_bytes()).expect("ours");
        assert_eq!((origin.publisher, origin.seq), (publisher.id(), expected));
        assert!(origin.time > 0);
    }
    for seq in 0..sent {
        assert_eq!(seq_of(&recv(&mut local).await.expect("a message")), seq);
    }
    // And from a plain publisher to a topic.
    let putting = plain
        .declare_publisher("r1/command")
        .congestion_control(CongestionControl::Block)
        .await
        .expect("publisher");
    let mut commands = dir.subscriber("robot/command").connect().expect("connect");
    until_matched(&putting).await;
    for seq in 0..50 {
        putting.put(write(5_000, seq)).await.expect("put");
        assert_eq!(seq_of(&recv(&mut commands).await.expect("a message")), seq);
    }
    // A deletion is no message.
    putting.delete().await.expect("delete");
    until("the deletion is counted", || bridge.stats().refused == 1).await;
    drop((publisher, local, commands));
    plain.close().await.expect("close");
    bridge.close().await;
    dir.assert_empties();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn zenoh_bridge_with_shared_memory_is_read_in_place_by_a_local_program() {
    let dir = Dir::new();
    let builder = bridge(&dir).route(route("t", "t")).shared_memory(ShmPoolConfig::new().max_bytes(64 << 20));
    let (bridge, at) = start(builder).await;
    let plain =
        zenoh::open(config("client", &[], &[&at])).with_shm_clients(shm_clients()).await.expect("open");
    let samples = plain.declare_subscriber("t").await.expect("subscriber");
    let publisher = dir.publisher("t").bind().expect("bind");
    let mut sent = 0;
    let sample = within("the first", async {
        loop {
            publisher.send(&write(MIB, sent)).await.expect("send");
            sent += 1;
            if let Ok(sample) = tokio::time::timeout(Duration::from_millis(50), samples.recv_async()).await {
                return sample.expect("a message");
            }
        }
    })
    .await;
    assert!(sample.payload().as_shm().is_some(), "it came by copy");
    seq_of(&sample.payload().to_bytes());
    let maps = std::fs::read_to_string("/proc/self/maps").expect("maps");
    assert!(maps.contains("tokio-shm-zenoh-"), "it is not in the pool");
    drop((sample, samples));
    plain.close().await.expect("close");
    drop(publisher);
    bridge.close().await;
    dir.assert_empties();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn zenoh_bridges_make_a_publisher_wait_for_a_slow_subscriber_on_the_other_host() {
    let hosts = Hosts::new(
        route("t", "t").direction(Direction::ToZenoh),
        route("t", "t").direction(Direction::FromZenoh),
    )
    .await;
    let publisher = hosts.a.publisher("t").bind().expect("bind");
    let mut subscriber = hosts.b.subscriber("t").depth(4).connect().expect("connect");
    greet(&publisher, &mut subscriber).await;
    let mut sent = 0;
    // Until there is no room anywhere on the way, but for what keeps the connection alive: two a second.
    while let Ok(accepted) =
        tokio::time::timeout(Duration::from_millis(250), publisher.send(write(MIB, sent))).await
    {
        accepted.expect("send");
        sent += 1;
        assert!(sent < 2_000, "nobody makes it wait");
    }
    for seq in 0..sent {
        let got = seq_of(&recv(&mut subscriber).await.expect("a message"));
        assert_eq!(got, seq, "of {sent}: {:?} {:?}", hosts.bridge_a.stats(), hosts.bridge_b.stats());
    }
    within("send", publisher.send(write(MIB, sent))).await.expect("send");
    assert_eq!(seq_of(&recv(&mut subscriber).await.expect("a message")), sent);
    let (a, b) = (settled(&hosts.bridge_a).await, settled(&hosts.bridge_b).await);
    assert_eq!((a.lagged, a.failed, b.missed, b.refused), (0, 0, 0, 0), "{a:?} {b:?}");
    drop((publisher, subscriber));
    hosts.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn zenoh_bridges_stay_connected_while_a_subscriber_stalls_for_longer_than_the_lease() {
    let (a, b) = (Dir::new(), Dir::new());
    let mut config = config("peer", &[], &[]);
    config.insert_json5("transport/link/tx/lease", "2000").expect("a setting of zenoh's");
    let with =
        |dir, direction| bridge(dir).route(route("t", "t").direction(direction)).config(config.clone());
    let (bridge_a, at) = start(with(&a, Direction::ToZenoh)).await;
    let (bridge_b, _) = start(with(&b, Direction::FromZenoh).connect(at)).await;
    let publisher = a.publisher("t").bind().expect("bind");
    let mut subscriber = b.subscriber("t").depth(4).connect().expect("connect");
    greet(&publisher, &mut subscriber).await;
    let sending = tokio::spawn(async move {
        for seq in 0..600 {
            within("send", publisher.send(write(64 << 10, seq))).await.expect("send");
        }
        publisher
    });
    // More than there is room for on the way: the connection takes next to nothing meanwhile.
    tokio::time::sleep(Duration::from_secs(6)).await;
    for seq in 0..600 {
        assert_eq!(seq_of(&recv(&mut subscriber).await.expect("a message")), seq);
    }
    let publisher = sending.await.expect("sender");
    let stats = settled(&bridge_b).await;
    assert_eq!((stats.missed, stats.damaged, stats.refused), (0, 0, 0), "{stats:?}");
    drop((publisher, subscriber));
    bridge_b.close().await;
    bridge_a.close().await;
    a.assert_empties();
    b.assert_empties();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn zenoh_bridges_out_of_patience_count_what_is_dropped_and_stay_connected() {
    let (a, b) = (Dir::new(), Dir::new());
    let route = |direction| route("t", "t").direction(direction);
    let impatient = bridge(&a).route(route(Direction::ToZenoh)).patience(Duration::from_millis(100));
    let (bridge_a, at) = start(impatient).await;
    let (bridge_b, _) = start(bridge(&b).route(route(Direction::FromZenoh)).connect(at)).await;
    let publisher = a.publisher("t").bind().expect("bind");
    let mut subscriber = b.subscriber("t").depth(4).connect().expect("connect");
    greet(&publisher, &mut subscriber).await;
    let greeted = publisher.stats().published;
    let unheard = bridge_a.stats().unheard;
    // More than there is room for on the way: the sender goes on all the same.
    let mut sent = 300;
    for seq in 0..sent {
        within("send", publisher.send(write(MIB, seq))).await.expect("send");
    }
    let (mut received, mut next) = (0, 0);
    within("the last", async {
        while next < sent {
            match tokio::time::timeout(Duration::from_millis(100), subscriber.recv()).await {
                Ok(sample) => {
                    let sample = sample.expect("a message");
                    if !sample.is_empty() {
                        let seq = seq_of(&sample);
                        assert!(seq >= next, "message {seq} after {next}");
                        (received, next) = (received + 1, seq + 1);
                    }
                }
                Err(_) => {
                    publisher.send(write(MIB, sent)).await.expect("send");
                    sent += 1;
                }
            }
        }
    })
    .await;
    let (stats_a, stats_b) = (settled(&bridge_a).await, settled(&bridge_b).await);
    assert_eq!((stats_a.unheard, stats_a.failed, stats_a.lagged), (unheard, 0, 0), "{stats_a:?}");
    assert!(received < sent, "nothing was dropped: {stats_a:?}");
    // Those before the first greeting that came through are nobody's.
    let counted = stats_b.injected + stats_b.missed - sent;
    assert!(counted >= 1 && counted <= greeted, "{stats_b:?}");
    drop((publisher, subscriber));
    bridge_b.close().await;
    bridge_a.close().await;
    a.assert_empties();
    b.assert_empties();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn zenoh_bridges_that_drop_count_every_message() {
    let drop_it = |direction| route("t", "t").direction(direction).congestion(Congestion::Drop);
    let hosts = Hosts::new(drop_it(Direction::ToZenoh), drop_it(Direction::FromZenoh)).await;
    let publisher = hosts.a.publisher("t").bind().expect("bind");
    let mut subscriber = hosts.b.subscriber("t").depth(4).connect().expect("connect");
    greet(&publisher, &mut subscriber).await;
    let greeted = publisher.stats().published;
    let sent = 500;
    for seq in 0..sent {
        within("send", publisher.send(write(64 << 10, seq))).await.expect("send");
    }
    // The last gets through at some time, and tells what is missing before it.
    let (mut received, mut lagged, mut last) = (0, 0, 0);
    let mut sent = sent;
    within("the last", async {
        loop {
            match tokio::time::timeout(Duration::from_millis(100), subscriber.recv()).await {
                Ok(Ok(sample)) if sample.is_empty() => {}
                Ok(Ok(sample)) => {
                    received += 1;
                    last = seq_of(&sample);
                }
                Ok(Err(RecvError::Lagged { missed: n, .. })) => lagged += n,
                Ok(Err(error)) => panic!("{error}"),
                Err(_) if last + 1 == sent => return,
                Err(_) => {
                    publisher.send(write(64 << 10, sent)).await.expect("send");
                    sent += 1;
                }
            }
        }
    })
    .await;
    let (a, b) = (settled(&hosts.bridge_a).await, settled(&hosts.bridge_b).await);
    assert_eq!(a.taken + a.lagged, greeted + sent, "{a:?}");
    assert!(received < sent, "nothing was dropped");
    // What the bridge there has put into the topic, the subscriber got or knows of; what not, the bridge knows of.
    let greetings_through = b.injected + b.missed - sent;
    assert!(greetings_through >= 1 && greetings_through <= greeted, "{b:?}");
    assert!(received + lagged + b.missed >= sent, "{received} {lagged} {b:?}");
    assert_eq!(b.injected, b.received, "{b:?}");
    drop((publisher, subscriber));
    hosts.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn zenoh_bridges_go_on_after_their_router_restarts() {
    let (a, b) = (Dir::new(), Dir::new());
    let (router, at) = listening("router").await;
    let client = |dir: &Dir, direction| {
        let route = route("t", "t").direction(direction);
        bridge(dir).route(route).config(config("client", &[], &[&at])).start()
    };
    let bridge_a = client(&a, Direction::ToZenoh).await.expect("a bridge");
    let bridge_b = client(&b, Direction::FromZenoh).await.expect("a bridge");
    let publisher = a.publisher("t").bind().expect("bind");
    let mut subscriber = b.subscriber("t").connect().expect("connect");
    greet(&publisher, &mut subscriber).await;
    let mut sent = 0;
    let mut round = async |publisher: &ShmPublisher, subscriber: &mut ShmSubscriber| {
        for _ in 0..20 {
            publisher.send(write(10_000, sent)).await.expect("send");
            assert_eq!(seq_of(&recv(subscriber).await.expect("a message")), sent);
            sent += 1;
        }
    };
    round(&publisher, &mut subscriber).await;
    let mut router = Some(router);
    for _ in 0..2 {
        router.take().expect("a router").close().await.expect("close");
        until("the bridge knows", || {
            // Full, where the bridge is waiting for the connection to end.
            let _ = publisher.try_send(b"");
            bridge_a.stats().unheard > 0
        })
        .await;
        router = Some(restart(&at).await);
        while tokio::time::timeout(QUIET, subscriber.recv()).await.is_ok() {}
        greet(&publisher, &mut subscriber).await;
        round(&publisher, &mut subscriber).await;
    }
    let (stats_a, stats_b) = (bridge_a.close().await, bridge_b.close().await);
    assert!(stats_b.missed > 0, "{stats_b:?}");
    // The first that came through is the first that counts; from then on all are accounted for.
    assert_eq!(stats_a.taken + stats_a.lagged, publisher.stats().published);
    let before = publisher.stats().published - stats_b.injected - stats_b.missed;
    assert!(before <= stats_a.unheard + stats_a.lagged, "{stats_a:?} {stats_b:?}");
    drop((publisher, subscriber));
    a.assert_empties();
    b.assert_empties();
}

/// A router where there was one before.
async fn restart(at: &str) -> Session {
    let deadline = std::time::Instant::now() + LIMIT;
    loop {
        match zenoh::open(config("router", &[at], &[])).await {
            Ok(router) => return router,
            Err(error) => assert!(std::time::Instant::now() < deadline, "{error}"),
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}
