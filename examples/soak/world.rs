//! The parent: starts, stalls, stops and kills the others, and checks what can be seen from outside.

use std::collections::HashMap;
use std::io::{BufRead as _, BufReader};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::{JoinHandle, sleep};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tokio_shm::ShmSubscriber;

use crate::footprint::Footprint;
use crate::payload::Random;
use crate::peers::PATIENT;
use crate::support::Result;
use crate::{POOL_CAP, TOPICS};

/// How many come and go at a time, beside those that stay.
const GUESTS: usize = 8;
/// Nobody who is asked to end may take longer, on a machine that does other things as well.
const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) fn run(time: Duration) -> Result {
    let private = std::fs::Permissions::from_mode(0o700);
    let dir = tempfile::Builder::new().prefix("tokio-shm-soak-").permissions(private).tempdir()?;
    let left_before = left_in_dev_shm()?;
    let mut world = World::new(dir.path())?;
    let begun = Instant::now();
    let warm_up = (time / 5).min(Duration::from_secs(60));
    world.churn(begun, warm_up)?;
    let before = world.rest()?;
    println!("after {} s of warming up, with nobody but those that stay:", warm_up.as_secs());
    world.tell_footprints(&before);
    world.churn(begun, time)?;
    let after = world.rest()?;
    println!("at the end, with nobody but those that stay:");
    world.tell_footprints(&after);
    world.compare(&before, &after)?;
    world.end()?;
    if left_in_dev_shm()? > left_before {
        return Err("something is left in /dev/shm".into());
    }
    println!("{} s, no invariant violated: {}", begun.elapsed().as_secs(), world.tally);
    Ok(())
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    Publisher,
    Subscriber,
}

/// What a child has said.
#[derive(Default)]
struct Said {
    sent: u64,
    received: u64,
    lagged: u64,
    /// Publishers that it lost.
    lost: Vec<String>,
    /// Its last words: `closed` or `read`.
    last: Option<String>,
}

struct Peer {
    kind: Kind,
    topic: usize,
    child: Child,
    stdin: Option<ChildStdin>,
    said: Arc<Mutex<Said>>,
    reader: Option<JoinHandle<()>>,
    /// Stopped, until then.
    stalled: Option<Instant>,
    /// Asked to end, then.
    asked: Option<Instant>,
}

impl Peer {
    fn start(kind: Kind, topic: usize, dir: &Path, seed: u64, stays: bool) -> Result<Self> {
        let role = match kind {
            Kind::Publisher => "publisher",
            Kind::Subscriber => "subscriber",
        };
        let mut command = Command::new(std::env::current_exe()?);
        command.arg(role).arg(dir).args([topic.to_string(), seed.to_string()]);
        if stays {
            command.env(PATIENT, "1");
        }
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let stdin = child.stdin.take();
        let lines = BufReader::new(child.stdout.take().ok_or("no standard output")?).lines();
        let said = Arc::new(Mutex::new(Said::default()));
        let reader = std::thread::spawn({
            let said = Arc::clone(&said);
            move || lines.map_while(std::result::Result::ok).for_each(|line| note(&mut lock(&said), &line))
        });
        Ok(Self { kind, topic, child, stdin, said, reader: Some(reader), stalled: None, asked: None })
    }

    fn name(&self) -> String {
        format!("{:?} {} of {}", self.kind, self.child.id(), TOPICS[self.topic].name)
    }

    fn signal(&self, signal: Signal) -> Result {
        Ok(kill_process(Pid::from_child(&self.child), signal)?)
    }

    fn ask_to_end(&mut self) -> Result {
        self.signal(Signal::CONT)?;
        self.stalled = None;
        self.asked.get_or_insert_with(Instant::now);
        drop(self.stdin.take());
        Ok(())
    }

    /// Whether it has ended, which it must not have by itself, nor badly.
    fn has_ended(&mut self) -> Result<bool> {
        match self.child.try_wait()? {
            Some(status) if self.asked.is_some() && status.success() => {
                if let Some(reader) = self.reader.take() {
                    reader.join().map_err(|_| "a thread panicked")?;
                }
                Ok(true)
            }
            Some(status) => Err(format!("{} failed: {status}", self.name()).into()),
            None if self.asked.is_some_and(|asked| asked.elapsed() > PATIENCE) => {
                Err(format!("{} does not end", self.name()).into())
            }
            None => Ok(false),
        }
    }

    fn kill(mut self) -> Result {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn lock(said: &Mutex<Said>) -> std::sync::MutexGuard<'_, Said> {
    said.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

fn note(said: &mut Said, line: &str) {
    let (verb, rest) = line.split_once(' ').unwrap_or((line, ""));
    let mut numbers = rest.split(' ').map(|word| word.parse().unwrap_or(0));
    match verb {
        "sent" => said.sent = numbers.next().unwrap_or(0),
        "received" => {
            said.received = numbers.next().unwrap_or(0);
            said.lagged = numbers.next().unwrap_or(0);
        }
        "lost" => said.lost.push(rest.to_owned()),
        _ => said.last = Some(rest.to_owned()),
    }
}

#[derive(Default)]
struct Tally {
    started: u64,
    stopped: u64,
    stalled: u64,
    killed: u64,
    sent: u64,
    received: u64,
    lagged: u64,
    lost: u64,
}

impl Tally {
    fn add(&mut self, peer: &Peer) {
        let said = lock(&peer.said);
        self.sent += said.sent;
        self.received += said.received;
        self.lagged += said.lagged;
        self.lost += said.lost.len() as u64;
    }
}

impl std::fmt::Display for Tally {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { started, stopped, stalled, killed, sent, received, lagged, lost } = self;
        write!(
            f,
            "{started} processes started, {stopped} stopped, {stalled} stalls, {killed} killed; {sent} messages sent, \
             {received} received, {lagged} counted as missed, {lost} times a publisher lost"
        )
    }
}

struct World<'a> {
    dir: &'a Path,
    random: Random,
    /// A publisher and a subscriber for each topic.
    staying: Vec<Peer>,
    guests: Vec<Peer>,
    tally: Tally,
    told: Instant,
}

impl<'a> World<'a> {
    fn new(dir: &'a Path) -> Result<Self> {
        let seed = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?.as_secs();
        println!("seed {seed}, {} topics, {GUESTS} guests at a time", TOPICS.len());
        let mut random = Random::new(seed);
        let mut staying = Vec::new();
        for kind in [Kind::Subscriber, Kind::Publisher] {
            for topic in 0..TOPICS.len() {
                staying.push(Peer::start(kind, topic, dir, random.below(1 << 40), true)?);
            }
        }
        let tally = Tally { started: staying.len() as u64, ..Tally::default() };
        Ok(Self { dir, random, staying, guests: Vec::new(), tally, told: Instant::now() })
    }

    /// Lets guests come, go, stall and die until `time` after `begun`.
    fn churn(&mut self, begun: Instant, time: Duration) -> Result {
        while begun.elapsed() < time {
            self.step()?;
            self.look()?;
            if self.told.elapsed() >= Duration::from_secs(10) {
                self.told = Instant::now();
                println!("{:4} s: {}", begun.elapsed().as_secs(), self.so_far());
            }
            sleep(Duration::from_millis(20 + self.random.below(60)));
        }
        Ok(())
    }

    fn so_far(&self) -> Tally {
        let mut tally = Tally { ..self.tally };
        self.staying.iter().chain(&self.guests).for_each(|peer| tally.add(peer));
        tally
    }

    fn step(&mut self) -> Result {
        if self.guests.len() < GUESTS {
            let kind = [Kind::Publisher, Kind::Subscriber, Kind::Subscriber][self.random.below(3) as usize];
            let (topic, seed) = (self.random.below(TOPICS.len() as u64) as usize, self.random.below(1 << 40));
            self.guests.push(Peer::start(kind, topic, self.dir, seed, false)?);
            self.tally.started += 1;
            return Ok(());
        }
        let at = self.random.below(self.guests.len() as u64) as usize;
        match self.random.below(8) {
            0 | 1 => {
                let peer = self.guests.swap_remove(at);
                self.tally.add(&peer);
                peer.kill()?;
                self.tally.killed += 1;
            }
            2 if self.guests[at].asked.is_none() => self.guests[at].ask_to_end()?,
            3 if self.guests[at].asked.is_none() && self.guests[at].stalled.is_none() => {
                self.guests[at].signal(Signal::STOP)?;
                let time = Duration::from_millis(self.random.below(2_000));
                self.guests[at].stalled = Some(Instant::now() + time);
                self.tally.stalled += 1;
            }
            _ => {}
        }
        Ok(())
    }

    /// Ends stalls, collects who has ended, and checks that those who stay live and stay within their bounds.
    fn look(&mut self) -> Result {
        for at in (0..self.guests.len()).rev() {
            if self.guests[at].stalled.is_some_and(|until| until <= Instant::now()) {
                self.guests[at].signal(Signal::CONT)?;
                self.guests[at].stalled = None;
            }
            if self.guests[at].has_ended()? {
                self.tally.stopped += 1;
                self.tally.add(&self.guests[at]);
                drop(self.guests.swap_remove(at));
            }
        }
        // A publisher of each that stays, and guests.
        let bound = POOL_CAP * (1 + GUESTS as u64);
        for peer in &mut self.staying {
            peer.has_ended()?;
            let most = if peer.kind == Kind::Publisher { POOL_CAP } else { 2 * bound };
            // The kernel does not read the mappings at one instant: what was exchanged meanwhile is in there twice.
            for looks_left in (0..10).rev() {
                let now = Footprint::of(peer.child.id())?;
                if now.segment_bytes_mapped <= most && now.descriptors <= 50 + 8 * (1 + GUESTS) {
                    break;
                }
                if looks_left == 0 {
                    return Err(format!("{}: {now}", peer.name()).into());
                }
            }
        }
        Ok(())
    }

    /// Sends the guests away, and returns what those who stay have open when all has come to rest.
    fn rest(&mut self) -> Result<Vec<Footprint>> {
        for guest in &mut self.guests {
            guest.ask_to_end()?;
        }
        while !self.guests.is_empty() {
            self.look()?;
            sleep(Duration::from_millis(10));
        }
        // What killed ones left goes with the next that comes.
        for topic in &TOPICS {
            drop(ShmSubscriber::builder(topic.name).runtime_dir(self.dir).connect()?);
        }
        sleep(Duration::from_secs(3));
        let sockets = files_below(self.dir)?;
        if sockets != TOPICS.len() {
            return Err(
                format!("{sockets} files in the runtime directory of {} publishers", TOPICS.len()).into()
            );
        }
        self.staying.iter().map(|peer| Ok(Footprint::of(peer.child.id())?)).collect()
    }

    fn tell_footprints(&self, footprints: &[Footprint]) {
        for (peer, footprint) in self.staying.iter().zip(footprints) {
            println!("  {:10} {:16} {footprint}", format!("{:?}", peer.kind), TOPICS[peer.topic].name);
        }
    }

    fn compare(&self, before: &[Footprint], after: &[Footprint]) -> Result {
        for ((peer, before), after) in self.staying.iter().zip(before).zip(after) {
            let grown = after.descriptors > before.descriptors
                || after.links_mapped > before.links_mapped
                || after.segment_bytes_mapped > POOL_CAP
                || after.private_kib > before.private_kib + 4 * 1024;
            if grown {
                return Err(format!("{} has grown: {before}; now {after}", peer.name()).into());
            }
        }
        Ok(())
    }

    /// Ends those who stay, publishers first, and compares what was sent with what was read.
    fn end(&mut self) -> Result {
        let mut sent = HashMap::new();
        for kind in [Kind::Publisher, Kind::Subscriber] {
            let mut ending: Vec<_> = self.staying.extract_if(.., |peer| peer.kind == kind).collect();
            for peer in &mut ending {
                peer.ask_to_end()?;
            }
            for mut peer in ending {
                while !peer.has_ended()? {
                    sleep(Duration::from_millis(10));
                }
                self.tally.stopped += 1;
                self.tally.add(&peer);
                let said = lock(&peer.said);
                let last = said.last.clone().ok_or_else(|| format!("{} said no last word", peer.name()))?;
                if kind == Kind::Publisher {
                    let (id, count) = last.split_once(':').ok_or("a last word without a count")?;
                    sent.insert(peer.topic, (id.to_owned(), count.parse::<u64>()?));
                    continue;
                }
                let (id, sent) = &sent[&peer.topic];
                if said.lost.contains(id) {
                    println!("  {} was disconnected for being slow", peer.name());
                    continue;
                }
                let mut words = last.split(' ');
                let unclaimed: u64 = words.next().unwrap_or_default().parse()?;
                let due =
                    words.find_map(|word| word.strip_prefix(id)?.strip_prefix(':')?.parse::<u64>().ok());
                let due = due.ok_or_else(|| format!("{} read nothing of {id}", peer.name()))?;
                println!(
                    "  {}: all of {sent} read or counted up to {due}, {unclaimed} told beside",
                    peer.name()
                );
                if due > *sent || due + unclaimed < *sent {
                    return Err(format!("{}: {sent} sent, {due} + {unclaimed} read", peer.name()).into());
                }
            }
        }
        for topic in &TOPICS {
            drop(ShmSubscriber::builder(topic.name).runtime_dir(self.dir).connect()?);
        }
        if std::fs::read_dir(self.dir)?.next().is_some() {
            return Err("the runtime directory is not empty".into());
        }
        Ok(())
    }
}

fn files_below(dir: &Path) -> Result<usize> {
    let mut files = 0;
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        files += if entry.file_type()?.is_dir() { files_below(&entry.path())? } else { 1 };
    }
    Ok(files)
}

fn left_in_dev_shm() -> Result<usize> {
    let names = std::fs::read_dir("/dev/shm")?;
    Ok(names.flatten().filter(|entry| entry.file_name().to_string_lossy().starts_with("tokio-shm")).count())
}
