//! Publishers are killed; subscribers survive that wait for the next one all the time, a task and a thread.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use tempfile::TempDir;
use tokio::runtime::Runtime;
use tokio::task::JoinHandle;

use super::victim::{Heard, Victim};
use super::{
    ALL, Case, End, Fallible, PUBLISHERS, Tally, at_once, check, end_if_it_hangs, footprint, goal, left_in,
    publisher_in, random_below, run, runtime_dir, sleep_for_a_random_time, sockets, subscriber_in,
};
use crate::sys::clock::monotonic_ns;
use crate::sys::testing::is_alone;
use crate::{OnFull, RecvError, ShmSample, ShmSubscriber};

/// More than a victim's pool has large messages for.
const DEPTH: u32 = 8;
/// What ends the survivors: shorter than any message of a victim.
const END: [u8; 1] = [0];

#[test]
#[ignore = "the survivors of kill_publisher_in_any_state_harms_nobody_else"]
fn child_publishers_killed() {
    if !is_alone() {
        return;
    }
    end_if_it_hangs();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let mut stages: Vec<_> = ALL.iter().map(|on_full| Stage::new(&runtime, *on_full)).collect();
    // With all that is made only once; the survivors are connected to nobody.
    let before = footprint();
    run("publishers", goal(), PUBLISHERS, |case, on_full, victim, tally| {
        let stage = stages.iter_mut().find(|stage| stage.on_full == on_full).expect("one for each policy");
        let result = stage.round(case, victim, tally);
        // Where something was wrong, the next round is to begin as if nothing had been.
        stage.thread.set_mode(READS);
        result
    });
    stages.iter().for_each(Stage::let_go);
    // A subscriber makes a timer when it first has something to try again, and keeps it.
    let timers = 2 * stages.len();
    let is_back = || {
        let now = footprint();
        (before.0..=before.0 + timers).contains(&now.0) && now.1 == before.1
    };
    at_once("descriptors and mappings are what they were", is_back)
        .unwrap_or_else(|fault| panic!("{fault}: {before:?}, {:?}", footprint()));
    stages.into_iter().for_each(|stage| stage.end(&runtime));
}

/// A topic whose publishers are killed one after the other.
struct Stage {
    on_full: OnFull,
    task: Survivor<JoinHandle<()>>,
    thread: Survivor<thread::JoinHandle<()>>,
    /// Whether the last round has left it to the next publisher to clear the directory.
    uncleared: bool,
    dir: TempDir,
}

/// What a victim has said.
#[derive(Default)]
struct Said {
    /// The publishers that it has been, and when each was bound.
    bound: HashMap<String, u64>,
    /// Of which those had their subscribers.
    ready: Vec<String>,
    closing: HashSet<String>,
    /// How many messages of each were on their links for certain.
    sent: HashMap<String, u64>,
}

impl Said {
    fn note(&mut self, line: &str, tally: &mut Tally) {
        let mut words = line.split(' ').map(str::to_owned);
        let (Some(what), Some(id)) = (words.next(), words.next()) else { return };
        let number = words.next().map_or(0, |word| word.parse().expect("a number"));
        match &*what {
            "bound" => drop(self.bound.insert(id, number)),
            "ready" => {
                let bound = self.bound.get(&id).expect("bound before");
                tally.time("publisher found after", number.saturating_sub(*bound));
                self.ready.push(id);
            }
            "closing" => drop(self.closing.insert(id)),
            "sent" => drop(self.sent.insert(id, number)),
            other => panic!("{other}"),
        }
    }
}

impl Stage {
    fn new(runtime: &Runtime, on_full: OnFull) -> Self {
        let dir = runtime_dir();
        let connect = || subscriber_in(dir.path()).depth(DEPTH).connect().unwrap();
        let task = Survivor::new(on_full, |state| runtime.spawn(task(connect(), state)));
        let thread = Survivor::new(on_full, |state| {
            let subscriber = connect();
            thread::spawn(move || read(subscriber, &state))
        });
        at_once("the survivors wait", || {
            // Registered with the reactor, and in `poll`: nothing of it is made later.
            [&task.state, &thread.state].iter().all(|state| state.begun.load(Ordering::SeqCst))
        })
        .unwrap();
        Self { on_full, task, thread, uncleared: false, dir }
    }

    fn round(&mut self, case: &Case, victim: &mut Victim, tally: &mut Tally) -> Fallible<()> {
        if case.script == "several" {
            return self.several(case, victim, tally);
        }
        let die_at = match case.end {
            End::At(step, passages) => Some((step, 1 + random_below(passages) as u32)),
            _ => None,
        };
        // A thread that does not read, or gives nothing back.
        let (script, mode) = match case.script {
            "crowds" => ("streams", STAYS_AWAY),
            "starves" => ("starves", HOLDS),
            script => (script, READS),
        };
        self.thread.set_mode(mode);
        victim.order("publisher", script, self.on_full, die_at, self.dir.path())?;
        let mut said = Said::default();
        let visited = matches!(case.end, End::At("leave: heard", _));
        if script != "closes" && (die_at.is_none() || visited) {
            while said.ready.is_empty() {
                self.hear(victim, &mut said, tally)?;
            }
            let uncleared = std::mem::take(&mut self.uncleared) && !victim.is_another_user;
            if uncleared && sockets(self.dir.path()).len() != 1 {
                return Err(format!("left after the next bind: {:?}", sockets(self.dir.path())));
            }
        }
        let died_at = match case.end {
            End::At(..) if visited => {
                self.visit(victim, &mut said, tally)?;
                None
            }
            End::At(..) => None,
            End::Within(micros) => {
                if script == "loans" {
                    victim.hear("loaned")?;
                }
                sleep_for_a_random_time(micros);
                Some(victim.kill())
            }
            End::Blocking => {
                while self.hear(victim, &mut said, tally)? != "blocked" {}
                Some(victim.kill())
            }
        };
        victim.see_die(|line| said.note(line, tally))?;
        let died_at = died_at.or(victim.died_at).ok_or("it did not come to its point")?;
        self.thread.set_mode(READS);
        self.settle(&said, died_at, tally)?;
        // Else the next one to bind does.
        self.uncleared = random_below(2) == 0;
        if self.uncleared { Ok(()) } else { self.clear() }
    }

    /// Two publishers of the same topic, killed one shortly after the other.
    fn several(&mut self, case: &Case, victim: &mut Victim, tally: &mut Tally) -> Fallible<()> {
        let End::Within(micros) = case.end else { return Err("killed at random instants only".to_owned()) };
        let mut other = Victim::start();
        tally.count(case);
        let mut victims = [(victim, Said::default(), 0), (&mut other, Said::default(), 0)];
        for (victim, said, _) in &mut victims {
            victim.order("publisher", "streams", self.on_full, None, self.dir.path())?;
            while said.ready.is_empty() {
                self.hear(victim, said, tally)?;
            }
        }
        for (victim, _, died_at) in &mut victims {
            sleep_for_a_random_time(micros);
            *died_at = victim.kill();
        }
        for (victim, said, died_at) in &mut victims {
            victim.see_die(|line| said.note(line, tally))?;
            self.settle(said, *died_at, tally)?;
        }
        self.clear()
    }

    fn hear(&self, victim: &mut Victim, said: &mut Said, tally: &mut Tally) -> Fallible<String> {
        let line = victim.hear("")?;
        said.note(&line, tally);
        Ok(line)
    }

    /// Subscribers come and go until the victim is dead.
    fn visit(&self, victim: &mut Victim, said: &mut Said, tally: &mut Tally) -> Fallible<()> {
        loop {
            match victim.next_line(Duration::ZERO)? {
                Heard::Line(line) => said.note(&line, tally),
                Heard::End => return Ok(()),
                Heard::Nothing => {
                    let builder = subscriber_in(self.dir.path()).depth(2);
                    let mut visitor = builder.connect().map_err(|error| error.to_string())?;
                    drop(visitor.blocking_recv_timeout(Duration::from_millis(5)));
                }
            }
        }
    }

    /// The survivors have read everything that was published, and have been told of the death.
    fn settle(&self, said: &Said, died_at: u64, tally: &mut Tally) -> Fallible<()> {
        let told_of = said.ready.last().filter(|id| !said.closing.contains(*id));
        for state in [&self.task.state, &self.thread.state] {
            if let Some(id) = told_of {
                at_once("a survivor is told", || state.ledger.lock().unwrap().lost.contains_key(id))?;
                let lost_at = state.ledger.lock().unwrap().lost[id];
                tally.time("survivor told after", lost_at.saturating_sub(died_at));
            }
            at_once("everything published is read", || {
                let ledger = state.ledger.lock().unwrap();
                said.sent.iter().all(|(id, sent)| ledger.next.get(id).is_some_and(|next| next >= sent))
            })?;
            if let Some(fault) = state.ledger.lock().unwrap().fault.take() {
                return Err(fault);
            }
        }
        Ok(())
    }

    /// Whoever connects removes what the dead have left.
    fn clear(&mut self) -> Fallible<()> {
        self.uncleared = false;
        let connected = subscriber_in(self.dir.path()).connect();
        let left = sockets(self.dir.path());
        drop(connected.map_err(|error| error.to_string())?);
        if left.is_empty() { Ok(()) } else { Err(format!("left after the next connect: {left:?}")) }
    }

    /// Has the survivors hold nothing of the dead any more.
    fn let_go(&self) {
        for state in [&self.task.state, &self.thread.state] {
            state.keep(None);
        }
    }

    fn end(self, runtime: &Runtime) {
        let Self { task, thread, dir, .. } = self;
        // Found by the survivors as any other was.
        runtime.block_on(async {
            let publisher = publisher_in(dir.path()).bind().unwrap();
            publisher.wait_for_subscribers(2).await;
            publisher.send(END).await.unwrap();
            publisher.close().await.unwrap();
            task.handle.await.unwrap();
        });
        thread.handle.join().unwrap();
        assert_eq!(left_in(dir.path()), Vec::<String>::new());
    }
}

// What a survivor does with messages.
const READS: u32 = 0;
const HOLDS: u32 = 1;
const STAYS_AWAY: u32 = 2;

struct Survivor<H> {
    state: Arc<State>,
    handle: H,
}

struct State {
    on_full: OnFull,
    begun: AtomicBool,
    mode: AtomicU32,
    ledger: Mutex<Ledger>,
    /// Held until the next one comes, perhaps of another publisher.
    last: Mutex<Option<ShmSample>>,
}

/// What a survivor has seen.
#[derive(Default)]
struct Ledger {
    /// Of each publisher, the message due next.
    next: HashMap<String, u64>,
    /// Of which publishers it was told that they are lost, and when.
    lost: HashMap<String, u64>,
    /// Messages that it was told are missing before the next one.
    missed: u64,
    fault: Option<String>,
}

impl<H> Survivor<H> {
    fn new(on_full: OnFull, start: impl FnOnce(Arc<State>) -> H) -> Self {
        let state = Arc::new(State {
            on_full,
            begun: AtomicBool::new(false),
            mode: AtomicU32::new(READS),
            ledger: Mutex::default(),
            last: Mutex::default(),
        });
        Self { handle: start(Arc::clone(&state)), state }
    }
}

impl Survivor<thread::JoinHandle<()>> {
    fn set_mode(&self, mode: u32) {
        self.state.mode.store(mode, Ordering::SeqCst);
        self.handle.thread().unpark();
    }
}

impl State {
    /// Gives back a sample, which is as it was however long ago its publisher died.
    fn let_go(&self, sample: ShmSample) {
        if let Err(fault) = check(&sample, sample.seq()) {
            self.ledger.lock().unwrap().fault.get_or_insert(fault);
        }
    }

    /// Keeps a sample in place of the last one.
    fn keep(&self, sample: Option<ShmSample>) {
        let last = std::mem::replace(&mut *self.last.lock().unwrap(), sample);
        last.into_iter().for_each(|last| self.let_go(last));
    }

    /// Books what came; the sample, if it is one; `None` at the end.
    fn book(&self, item: Result<ShmSample, RecvError>) -> Option<Option<ShmSample>> {
        let mut ledger = self.ledger.lock().unwrap();
        let booked = match item {
            Ok(sample) if *sample == END => return None,
            Ok(sample) => ledger.message(&sample).map(|()| Some(sample)),
            Err(RecvError::Lagged { missed, .. }) if self.on_full != OnFull::Wait => {
                ledger.missed += missed;
                Ok(None)
            }
            Err(RecvError::PublisherLost { publisher }) => {
                ledger.lost(&format!("{publisher:032x}"));
                Ok(None)
            }
            Err(error) => Err(format!("with {:?}: {error}", self.on_full)),
        };
        Some(booked.unwrap_or_else(|fault| {
            ledger.fault.get_or_insert(fault);
            None
        }))
    }
}

impl Ledger {
    fn message(&mut self, sample: &ShmSample) -> Fallible<()> {
        let id = format!("{:032x}", sample.publisher());
        if self.lost.contains_key(&id) {
            return Err(format!("message {} of {id} came after its loss", sample.seq()));
        }
        let next = self.next.entry(id).or_default();
        let due = *next + std::mem::take(&mut self.missed);
        *next = sample.seq() + 1;
        match sample.seq() == due {
            true => check(sample, due),
            false => Err(format!("message {} came where {due} was due", sample.seq())),
        }
    }

    fn lost(&mut self, id: &str) {
        *self.next.entry(id.to_owned()).or_default() += std::mem::take(&mut self.missed);
        self.lost.insert(id.to_owned(), monotonic_ns());
    }
}

async fn task(mut subscriber: ShmSubscriber, state: Arc<State>) {
    // Registers whatever it waits on.
    let waiting = tokio::time::timeout(Duration::from_millis(1), subscriber.recv()).await;
    assert!(waiting.is_err(), "nobody publishes yet");
    state.begun.store(true, Ordering::SeqCst);
    while let Some(booked) = state.book(subscriber.recv().await) {
        if booked.is_some() {
            state.keep(booked);
        }
    }
}

fn read(mut subscriber: ShmSubscriber, state: &State) {
    let mut held = Vec::new();
    state.begun.store(true, Ordering::SeqCst);
    loop {
        match state.mode.load(Ordering::SeqCst) {
            // It has yet to meet the publisher, if it was told before it came to wait for one.
            STAYS_AWAY if subscriber.publisher_count() == 0 => {
                match subscriber.blocking_recv_timeout(Duration::from_millis(1)) {
                    Err(RecvError::TimedOut) => {}
                    received => {
                        let Some(booked) = state.book(received) else { return };
                        if booked.is_some() {
                            state.keep(booked);
                        }
                    }
                }
                continue;
            }
            STAYS_AWAY => {
                thread::park();
                continue;
            }
            HOLDS => {}
            _ => held.drain(..).for_each(|sample| state.let_go(sample)),
        }
        let Some(booked) = state.book(subscriber.blocking_recv()) else { return };
        match state.mode.load(Ordering::SeqCst) {
            HOLDS => held.extend(booked),
            _ if booked.is_some() => state.keep(booked),
            _ => {}
        }
    }
}
