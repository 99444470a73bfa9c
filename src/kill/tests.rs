//! The kill matrix: publishers and subscribers, killed with SIGKILL at every named point between two steps of the protocol
//! and at random instants, in every state and with every [`OnFull`]; and what the survivors make of it.
//!
//! The survivors live in one process that sees hundreds of kills, so that what each kill leaves behind adds up. The tests of
//! subscribers and of publishers do so many kills each as half of `TOKIO_SHM_KILLS` says, that of crowds a twentieth of these, and
//! all print what they have measured:
//!
//! ```sh
//! TOKIO_SHM_KILLS=10000 cargo test --release --lib kill_ -- --nocapture
//! ```
//!
//! Where it is allowed every fourth victim is in a pid namespace of its own, and every third another user.
//!
//! Peers that lie are not tested here, nor those that are stopped without being killed.

mod crowds;
mod publishers;
mod roles;
mod subscribers;
mod victim;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::time::{Duration, Instant};

use crate::OnFull::{self, DropNewest, DropOldest, Wait};
use crate::sys::clock::monotonic_ns;
use crate::sys::random::random_id;
use crate::sys::testing::{abort, run_alone};
use crate::{ShmPublisher, ShmPublisherBuilder, ShmSubscriber, ShmSubscriberBuilder};

/// No wait for a victim is longer.
const LIMIT: Duration = Duration::from_secs(20);
/// Nor for a survivor that has to go on: it takes milliseconds, but the machine may have much else to do.
const AT_ONCE: Duration = Duration::from_secs(10);
/// Half of all waits are shorter, however busy the machine.
const MEDIAN: Duration = Duration::from_millis(500);

const MIB: usize = 1 << 20;
/// The cap of every pool: four of the largest messages.
const POOL: u64 = 4 * MIB as u64;
/// What is sent: in a segment with others, in one of its own, and between.
const SIZES: [usize; 3] = [64, 5_000, 40_000];

/// What went wrong, for the survivors.
type Fallible<T> = Result<T, String>;

/// The name of a kill point.
type Step = &'static str;

/// One cell of the matrix, for each of `policies`.
struct Case {
    state: &'static str,
    /// What the victim does, see `roles`.
    script: &'static str,
    policies: &'static [OnFull],
    end: End,
}

#[derive(Debug, Clone, Copy)]
enum End {
    /// It kills itself there, at its first passage or one soon after.
    At(Step, u64),
    /// It is killed so many microseconds after the start, at most.
    Within(u64),
    /// It is killed when somebody has to wait for it.
    Blocking,
}

const ALL: &[OnFull] = &[Wait, DropOldest, DropNewest];

const fn at(state: &'static str, script: &'static str, step: Step, passages: u64) -> Case {
    Case { state, script, policies: ALL, end: End::At(step, passages) }
}

const fn within(state: &'static str, script: &'static str, micros: u64) -> Case {
    Case { state, script, policies: ALL, end: End::Within(micros) }
}

const fn blocking(script: &'static str, policies: &'static [OnFull]) -> Case {
    Case { state: "blocked for room", script, policies, end: End::Blocking }
}

impl Case {
    const fn only(self, policies: &'static [OnFull]) -> Self {
        Self { policies, ..self }
    }
}

const SUBSCRIBERS: &[Case] = &[
    within("idle", "idles", 2_000),
    at("idle", "reads", "sleep: data bell armed", 1),
    at("mid-handshake", "leaves", "connect: watching", 2),
    at("mid-handshake", "leaves", "connect: connected", 2),
    at("mid-handshake", "leaves", "connect: hello sent", 2),
    at("mid-handshake", "leaves", "welcome: received", 2),
    at("mid-handshake", "leaves", "welcome: page mapped", 2),
    at("mid-handshake", "leaves", "welcome: established", 2),
    within("mid-handshake", "leaves", 3_000),
    at("mid-segment-announcement", "leaves", "segment: received", 2),
    at("mid-segment-announcement", "leaves", "segment: mapped", 2),
    at("mid-segment-announcement", "leaves", "socket: read", 2),
    at("mid-receive", "reads", "pop: entry read", 20),
    at("mid-receive", "reads", "pop: entry claimed", 20),
    at("mid-receive", "awaits", "receive: hold begun", 20),
    within("mid-receive", "reads", 5_000),
    within("mid-receive", "awaits", 5_000),
    within("several at once", "several", 3_000),
    at("holding samples", "awaits", "release: hold ended", 20),
    at("holding samples", "reads", "release: bit set", 20),
    at("holding samples", "reads", "credit bell: disarmed", 3).only(&[Wait]),
    within("holding samples", "holds", 2_000).only(&[DropOldest, DropNewest]),
    blocking("holds", &[Wait]),
    blocking("sits", &[Wait]),
    blocking("starves", ALL),
    at("mid-close", "leaves", "leave: one popped", 2),
    at("mid-close", "leaves", "leave: all popped", 2),
    at("mid-close", "leaves", "leave: said", 2),
    within("mid-close", "leaves", 8_000),
];

const PUBLISHERS: &[Case] = &[
    within("idle", "idles", 2_000),
    at("mid-handshake", "closes", "bind: directory begun", 1),
    at("mid-handshake", "closes", "bind: directory made", 1),
    at("mid-handshake", "closes", "bind: bound", 2),
    at("mid-handshake", "closes", "bind: listening", 2),
    at("mid-handshake", "closes", "bind: renamed", 2),
    at("mid-handshake", "closes", "accept: accepted", 4),
    at("mid-handshake", "closes", "hello: read", 4),
    at("mid-handshake", "closes", "hello: link prepared", 4),
    at("mid-handshake", "closes", "welcome: sent", 4),
    at("mid-handshake", "closes", "welcome: offered", 4),
    within("mid-handshake", "closes", 3_000),
    at("accepting as a sender", "attends", "accept: accepted", 4),
    at("accepting as a sender", "attends", "hello: read", 4),
    at("accepting as a sender", "attends", "hello: link prepared", 4),
    at("accepting as a sender", "attends", "welcome: sent", 4),
    at("accepting as a sender", "attends", "welcome: offered", 4),
    at("mid-loan", "streams", "segment: made", 3),
    at("mid-loan", "streams", "loan: taken", 20),
    within("mid-loan", "loans", 2_000),
    at("mid-send", "streams", "send: copied", 20),
    at("mid-send", "streams", "send: inside", 20),
    at("mid-send", "streams", "send: numbered", 20),
    at("mid-send", "streams", "offer: ticket issued", 40),
    at("mid-send", "streams", "push: entry written", 40),
    at("mid-send", "streams", "push: published", 40),
    at("mid-send", "streams", "offer: one link", 40),
    at("mid-send", "streams", "data bell: disarmed", 4),
    at("mid-send", "streams", "reclaim: word swapped", 5),
    at("mid-send", "streams", "reclaim: one ticket", 9),
    at("mid-send", "streams", "leave: heard", 2),
    within("mid-send", "streams", 6_000),
    // A gap is told without a name: where there are several publishers there must not be any.
    within("several at once", "several", 4_000).only(&[Wait]),
    at("mid-segment-announcement", "streams", "announce: due", 6),
    at("mid-segment-announcement", "streams", "announce: sent", 6),
    at("mid-segment-announcement", "streams", "retire: sent", 3),
    at("blocked for room", "crowds", "join: counted", 2).only(&[Wait]),
    at("blocked for room", "crowds", "send: queued", 2).only(&[Wait]),
    at("blocked for room", "crowds", "head: credit armed", 2).only(&[Wait]),
    at("blocked for room", "crowds", "take back: head moved", 9).only(&[DropOldest]),
    at("blocked for room", "crowds", "take back: ticket reclaimed", 9).only(&[DropOldest]),
    at("blocked for room", "crowds", "drop: counted", 9).only(&[DropNewest]),
    within("blocked for room", "crowds", 6_000).only(&[DropOldest, DropNewest]),
    blocking("crowds", &[Wait]),
    blocking("starves", ALL),
    at("mid-close", "closes", "bye: offered", 3),
    at("mid-close", "closes", "bye: sent", 3),
    at("mid-close", "closes", "withdraw: begun", 2),
    at("mid-close", "closes", "withdraw: removed", 2),
    within("mid-close", "closes", 20_000),
];

/// What a victim of these does, see `crowds`.
const CROWDS: &[Case] = &[
    within("greeted by a sender", "greets", 1_000),
    within("in line", "line", 1_000),
    within("with others in line", "naps", 1_000).only(&[Wait]),
    within("hundreds at once", "crowd", 5_000),
];

#[test]
fn kill_points_of_the_source_are_those_of_the_matrix() {
    fn search(dir: &Path, found: &mut BTreeSet<String>) {
        for entry in std::fs::read_dir(dir).unwrap().map(Result::unwrap) {
            if entry.file_type().unwrap().is_dir() {
                search(&entry.path(), found);
            } else {
                let text = std::fs::read_to_string(entry.path()).unwrap();
                let points = text.lines().filter_map(|line| line.trim().strip_prefix("kill_point!(\""));
                let names = points.filter_map(|rest| Some(rest.split_once("\");")?.0.to_owned()));
                names.for_each(|name| assert!(found.insert(name.clone()), "{name:?} stands for two places"));
            }
        }
    }
    let mut found = BTreeSet::new();
    search(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), &mut found);
    let killed_at = SUBSCRIBERS.iter().chain(PUBLISHERS).filter_map(|case| match case.end {
        End::At(step, _) => Some(step.to_owned()),
        _ => None,
    });
    assert_eq!(found, killed_at.collect());
}

#[test]
fn kill_subscriber_in_any_state_harms_nobody_else() {
    report(&run_alone("kill::tests::subscribers::child_subscribers_killed"));
}

#[test]
fn kill_publisher_in_any_state_harms_nobody_else() {
    report(&run_alone("kill::tests::publishers::child_publishers_killed"));
}

#[test]
fn kill_of_hundreds_of_those_in_line_or_greeted_by_a_sender_harms_nobody_else() {
    report(&run_alone("kill::tests::crowds::child_crowds_killed"));
}

#[allow(clippy::print_stdout)] // For whoever asks for it with `--nocapture`.
fn report(output: &str) {
    output.lines().filter(|line| line.starts_with("kills: ")).for_each(|line| println!("{line}"));
}

/// How many kills each of the two tests does.
fn goal() -> usize {
    std::env::var("TOKIO_SHM_KILLS").map_or(1_200, |count| count.parse().expect("a number")) / 2
}

/// Ends the survivors' process if it hangs where no other wait is bounded.
fn end_if_it_hangs() {
    let limit = Duration::from_secs(100) + Duration::from_millis(100) * goal() as u32;
    std::thread::spawn(move || {
        std::thread::sleep(limit);
        abort("the survivors hang");
    });
}

/// Goes through the cases again and again, until the goal is reached, with the next victim ready all the time.
fn run(
    whom: &str,
    goal: usize,
    cases: &'static [Case],
    mut round: impl FnMut(&'static Case, OnFull, &mut victim::Victim, &mut Tally) -> Fallible<()>,
) {
    let mut tally = Tally::default();
    let cells: Vec<_> =
        cases.iter().flat_map(|case| case.policies.iter().map(move |on_full| (case, *on_full))).collect();
    let mut next = victim::Victim::start();
    for (case, on_full) in cells.into_iter().cycle() {
        let kill = tally.kills();
        if kill >= goal || tally.faults.len() == 3 {
            break;
        }
        let mut victim = std::mem::replace(&mut next, victim::Victim::start());
        tally.count(case);
        if let Err(fault) = round(case, on_full, &mut victim, &mut tally) {
            tally.faults.push(format!("{kill}: {} ({:?}, {on_full:?}): {fault}", case.state, case.end));
        }
    }
    tally.tell(whom);
}

/// What a run amounts to.
#[derive(Default)]
struct Tally {
    kills: BTreeMap<&'static str, usize>,
    faults: Vec<String>,
    /// Nanoseconds, of many kinds.
    times: BTreeMap<&'static str, Vec<u64>>,
}

impl Tally {
    fn count(&mut self, case: &Case) {
        *self.kills.entry(case.state).or_default() += 1;
    }

    fn kills(&self) -> usize {
        self.kills.values().sum()
    }

    fn time(&mut self, what: &'static str, nanoseconds: u64) {
        self.times.entry(what).or_default().push(nanoseconds);
    }

    #[allow(clippy::print_stdout)] // The parent reads it.
    fn tell(mut self, whom: &str) {
        let kills = self.kills();
        let states: Vec<_> = self.kills.iter().map(|(state, count)| format!("{count} {state}")).collect();
        let faults = self.faults.len();
        println!("\nkills: {whom}: {kills} ({}), {faults} faults", states.join(", "));
        println!("kills: {whom}: {}", victim::others());
        for (what, times) in &mut self.times {
            times.sort_unstable();
            let at = |share: f64| times[((times.len() - 1) as f64 * share) as usize] as f64 / 1e6;
            let (count, median, p99, max) = (times.len(), at(0.5), at(0.99), at(1.0));
            println!("kills: {whom}: {what}: {count}, ms: median {median:.2}, p99 {p99:.2}, max {max:.2}");
        }
        assert!(self.faults.is_empty(), "{:#?}", self.faults);
        for (what, times) in self.times {
            assert!(times[times.len() / 2] < MEDIAN.as_nanos() as u64, "{what} takes too long");
        }
    }
}

/// Looks until `condition` holds, for no longer than a survivor may take.
fn at_once(what: &str, mut condition: impl FnMut() -> bool) -> Fallible<()> {
    let deadline = Instant::now() + AT_ONCE;
    while !condition() {
        if Instant::now() > deadline {
            return Err(format!("{what}: not within {AT_ONCE:?}"));
        }
        std::thread::sleep(Duration::from_micros(50));
    }
    Ok(())
}

/// Any number below `end`, another one each time.
fn random_below(end: u64) -> u64 {
    (random_id().expect("random numbers") % u128::from(end)) as u64
}

fn sleep_for_a_random_time(micros: u64) {
    std::thread::sleep(Duration::from_micros(random_below(micros)));
}

fn policy_name(on_full: OnFull) -> &'static str {
    match on_full {
        Wait => "wait",
        DropOldest => "drop-oldest",
        DropNewest => "drop-newest",
    }
}

fn policy_of(name: &str) -> OnFull {
    *ALL.iter().find(|on_full| policy_name(**on_full) == name).expect("a policy")
}

/// A message of which every byte says which one it is.
fn message(seq: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![seq as u8; len];
    bytes[..8].copy_from_slice(&seq.to_le_bytes());
    bytes
}

fn check(bytes: &[u8], seq: u64) -> Fallible<()> {
    let intact = bytes[..8] == seq.to_le_bytes() && bytes[8..].iter().all(|byte| *byte == seq as u8);
    if intact { Ok(()) } else { Err(format!("message {seq} is not what was sent")) }
}

/// What this process has open and mapped of others' or its own shared memory.
fn footprint() -> (usize, usize) {
    let maps = std::fs::read_to_string("/proc/self/maps").expect("maps");
    let shared = maps.lines().filter(|line| line.contains("memfd:tokio-shm") || line.contains("/dev/shm/"));
    (crate::sys::testing::open_descriptors(), shared.count())
}

/// A runtime directory, for other users too where there are some.
fn runtime_dir() -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("temporary directory");
    let shared = victim::may_be_another_user();
    if shared {
        std::os::unix::fs::chown(dir.path(), None, Some(victim::GROUP)).expect("group");
    }
    let mode = if shared { 0o770 } else { 0o700 };
    std::fs::set_permissions(&dir, std::os::unix::fs::PermissionsExt::from_mode(mode)).expect("mode");
    dir
}

/// A publisher of the topic, for this user and the other one.
fn publisher_in(dir: &Path) -> ShmPublisherBuilder {
    ShmPublisher::builder("t").runtime_dir(dir).allow_uid(0).allow_gid(victim::GROUP)
}

/// A subscriber, likewise.
fn subscriber_in(dir: &Path) -> ShmSubscriberBuilder {
    ShmSubscriber::builder("t").runtime_dir(dir).allow_uid(0).allow_gid(victim::GROUP)
}

/// What is left in a runtime directory, except for what only its maker can complete, or any other after a minute.
fn left_in(dir: &Path) -> Vec<String> {
    let unfinished = format!(".new-{}-", victim::USER);
    let names = std::fs::read_dir(dir).expect("runtime directory").flatten();
    let names = names.map(|entry| entry.file_name().to_string_lossy().into_owned());
    names.filter(|name| !name.starts_with(&unfinished)).collect()
}

/// The sockets in the topic's directory, finished or not.
fn sockets(dir: &Path) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(dir.join("t")) else { return Vec::new() };
    entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

/// How long ago that was.
fn since(then: u64) -> u64 {
    monotonic_ns().saturating_sub(then)
}
