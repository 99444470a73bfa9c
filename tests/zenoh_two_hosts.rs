//! Two hosts: two network namespaces joined by a cable (veth), a bridge in each, a publisher in one and a subscriber in the
//! other. The cable is cut and joined again, and every message is accounted for.
//!
//! The namespaces belong to processes that end with this one, and so end with it, whatever happens to it. Needs the right to make
//! them, and `ip`, `nsenter`, `unshare` and `setpriv`.
#![allow(clippy::print_stdout)] // says what is left out

mod support;

use std::collections::HashMap;
use std::io::{BufRead as _, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use support::{Dir, LIMIT, Peer, Role, is_allowed, wait_until};

type Counters = HashMap<String, u64>;

/// A namespace, as long as its keeper lives: which is as long as our end of the pipe is open.
struct Host {
    keeper: Child,
    dir: Dir,
}

impl Host {
    fn new() -> Self {
        let keeper =
            Command::new("unshare").args(["--net", "cat"]).stdin(Stdio::piped()).spawn().expect("unshare");
        let host = Self { keeper, dir: Dir::new() };
        let ours = std::fs::read_link("/proc/self/ns/net").expect("own namespace");
        let theirs = format!("/proc/{}/ns/net", host.keeper.id());
        wait_until("the namespace", || std::fs::read_link(&theirs).is_ok_and(|theirs| theirs != ours));
        host
    }

    /// What a command has to begin with to run there, and to end with us.
    fn enter(&self) -> Vec<String> {
        let pid = self.keeper.id().to_string();
        ["nsenter", "-t", &pid, "-n", "setpriv", "--pdeathsig", "KILL"].map(str::to_owned).into()
    }

    fn run(&self, command: &str) {
        let enter = self.enter();
        let status =
            Command::new(&enter[0]).args(&enter[1..]).args(command.split(' ')).status().expect("nsenter");
        assert!(status.success(), "{command}: {status}");
    }

    fn peer(&self, role: &str) -> Peer {
        let enter = self.enter();
        let words: Vec<_> = enter.iter().map(String::as_str).collect();
        Peer::start_under(&words, role, &self.dir)
    }

    fn bridge(&self, arguments: &[&str]) -> BridgeProcess {
        let enter = self.enter();
        let config = self.dir.path().with_extension("json5");
        // Dead connections are noticed sooner than after ten seconds.
        std::fs::write(&config, "{ transport: { link: { tx: { lease: 2000 } } } }").expect("write");
        let mut child = Command::new(&enter[0])
            .args(&enter[1..])
            .arg(env!("CARGO_BIN_EXE_tokio-shm"))
            .args(["bridge", "--no-scouting", "--stats", "0.05", "--patience", "5", "--runtime-dir"])
            .arg(self.dir.path())
            .arg("--config")
            .arg(&config)
            .args(arguments)
            .stdout(Stdio::piped())
            .spawn()
            .expect("start the bridge");
        let lines = BufReader::new(child.stdout.take().expect("piped")).lines();
        let counters: Arc<parking_lot::Mutex<Counters>> = Arc::default();
        let reading = Arc::clone(&counters);
        let reader = std::thread::spawn(move || {
            for line in lines.map_while(Result::ok).filter(|line| line.starts_with("taken=")) {
                *reading.lock() = line
                    .split(' ')
                    .filter_map(|pair| pair.split_once('='))
                    .map(|(name, value)| (name.to_owned(), value.parse().expect("a number")))
                    .collect();
            }
            let _ = std::fs::remove_file(config);
        });
        let bridge = BridgeProcess { child, counters, reader: Some(reader) };
        wait_until("the bridge runs", || !bridge.counters.lock().is_empty());
        bridge
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        let _ = self.keeper.kill();
        let _ = self.keeper.wait();
    }
}

struct BridgeProcess {
    child: Child,
    counters: Arc<parking_lot::Mutex<Counters>>,
    reader: Option<std::thread::JoinHandle<()>>,
}

impl BridgeProcess {
    fn read(&self, name: &str) -> u64 {
        self.counters.lock()[name]
    }

    /// Ends it in order, and returns its last word.
    fn finish(mut self) -> Counters {
        let pid = Pid::from_raw(self.child.id().cast_signed()).expect("a pid");
        kill_process(pid, Signal::TERM).expect("kill");
        wait_until("the bridge ends", || self.child.try_wait().expect("wait").is_some());
        self.reader.take().expect("once").join().expect("reader");
        assert!(self.child.wait().expect("wait").success());
        self.counters.lock().clone()
    }
}

impl Drop for BridgeProcess {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn ask(peer: &mut Peer, line: &str) -> u64 {
    peer.ask(line).parse().expect("a number")
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("runtime")
}

/// Sends `count` messages of `len` bytes, numbered on; says how many it has sent in all.
#[test]
fn role_publisher() {
    let Some(role) = Role::of("role_publisher") else { return };
    let runtime = runtime();
    let publisher = role.publisher("cam/front").runtime(runtime.handle().clone()).bind().expect("bind");
    // What is sent before the bridge has seen the topic is not its to count.
    let seen =
        runtime.block_on(async { tokio::time::timeout(LIMIT, publisher.wait_for_subscribers(1)).await });
    seen.expect("the bridge");
    role.say("0");
    let mut sent: u64 = 0;
    while let Some(line) = role.hear() {
        let (count, len) = line.split_once(' ').expect("two numbers");
        for _ in 0..count.parse::<u64>().expect("a number") {
            let mut message = vec![sent as u8; len.parse().expect("a number")];
            message[..8].copy_from_slice(&sent.to_le_bytes());
            publisher.blocking_send_timeout(message, LIMIT).expect("send");
            sent += 1;
        }
        role.say(&sent.to_string());
    }
    runtime.block_on(publisher.close()).expect("close");
}

/// `look`: the number after the last message that has come so far. `until N`: receives until message N − 1 and says how many it
/// has received in all. Whatever comes must be whole and in order.
#[test]
fn role_subscriber() {
    let Some(role) = Role::of("role_subscriber") else { return };
    let mut subscriber = role.subscriber("cam/front").connect().expect("connect");
    role.say("0");
    let (mut received, mut next): (u64, u64) = (0, 0);
    while let Some(line) = role.hear() {
        let (end, limit) = match line.strip_prefix("until ") {
            Some(end) => (end.parse().expect("a number"), LIMIT),
            None => (u64::MAX, Duration::from_millis(100)),
        };
        while next < end {
            match subscriber.blocking_recv_timeout(limit) {
                Ok(sample) => {
                    let seq = u64::from_le_bytes(sample[..8].try_into().expect("8 bytes"));
                    assert!(seq >= next, "message {seq} after {next}");
                    assert!(sample[8..].iter().all(|&byte| byte == seq as u8), "message {seq}");
                    (received, next) = (received + 1, seq + 1);
                }
                Err(tokio_shm::RecvError::TimedOut) if end == u64::MAX => break,
                Err(error) => panic!("{error}"),
            }
        }
        role.say(&if end == u64::MAX { next } else { received }.to_string());
    }
}

/// Sends one message after the other until one has come through that was sent after this was called.
fn until_through(publisher: &mut Peer, subscriber: &mut Peer) -> u64 {
    let mut through = 0;
    let mut first = None;
    wait_until("a message comes through", || {
        let sent = ask(publisher, "1 8");
        through = ask(subscriber, "look");
        through >= *first.get_or_insert(sent)
    });
    through
}

#[test]
fn zenoh_bridges_of_two_hosts_account_for_every_message_when_the_cable_is_cut() {
    if !is_allowed(&["unshare", "--net", "setpriv", "--pdeathsig", "KILL"]) || !is_allowed(&["ip", "-V"]) {
        println!("SKIPPED: two hosts: no network namespaces here, or no `ip`");
        return;
    }
    let (a, b) = (Host::new(), Host::new());
    a.run(&format!("ip link add cable type veth peer name cable netns {}", b.keeper.id()));
    for (host, address) in [(&a, "192.0.2.1/24"), (&b, "192.0.2.2/24")] {
        host.run(&format!("ip addr add {address} dev cable"));
        host.run("ip link set lo up");
        host.run("ip link set cable up");
    }
    let routes = ["--topic", "cam/*", "--zenoh", "robot/cam/*", "--direction"];
    let at = "tcp/192.0.2.1:7447";
    let bridge_a = a.bridge(&[&routes[..], &["out", "--listen", at]].concat());
    let bridge_b = b.bridge(&[&routes[..], &["in", "--connect", at]].concat());
    let (mut publisher, mut subscriber) = (a.peer("role_publisher"), b.peer("role_subscriber"));
    assert_eq!((publisher.hear(), subscriber.hear()), ("0".to_owned(), "0".to_owned()));
    until_through(&mut publisher, &mut subscriber);

    // Small messages and frames, all of them.
    for burst in ["500 64", "50 1048576", "100 5000"] {
        let before = ask(&mut publisher, "1 8");
        let received = ask(&mut subscriber, &format!("until {before}"));
        let end = ask(&mut publisher, burst);
        assert_eq!(ask(&mut subscriber, &format!("until {end}")), received + end - before, "{burst}");
    }
    assert_eq!(bridge_b.read("missed"), 0);

    println!("all through; cutting the cable");
    // The cable is cut: what is on its way is lost, what comes after finds nobody.
    a.run("ip link set cable down");
    ask(&mut publisher, "20 5000");
    let unheard = bridge_a.read("unheard");
    wait_until("the bridge knows that nobody hears", || {
        ask(&mut publisher, "1 64");
        bridge_a.read("unheard") > unheard
    });
    ask(&mut publisher, "20 5000");
    println!("nobody hears; joining it again");
    a.run("ip link set cable up");
    until_through(&mut publisher, &mut subscriber);
    println!("through again");
    let end = ask(&mut publisher, "20 1048576");
    let received = ask(&mut subscriber, &format!("until {end}"));

    publisher.finish();
    let (there, here) = (bridge_a.finish(), bridge_b.finish());
    subscriber.finish();
    println!("sent {end}, received {received}\n{there:?}\n{here:?}");
    // On the one end: all that was sent was taken, and is sent or counted.
    assert_eq!(there["taken"] + there["lagged"], end);
    assert_eq!(there["sent"] + there["unheard"] + there["failed"], there["taken"]);
    // On the other: all that came is with the subscriber; what did not, since the first, is counted.
    assert_eq!((here["injected"], here["received"]), (received, received));
    assert!(here["missed"] >= 20);
    let before_the_first = end - received - here["missed"];
    assert!(before_the_first <= there["unheard"], "{before_the_first}");
    a.dir.assert_empties();
    b.dir.assert_empties();
}
