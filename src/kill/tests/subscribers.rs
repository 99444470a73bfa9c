//! Subscribers are killed; a publisher and two other subscribers, one of them in a process of its own, survive.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use tempfile::TempDir;
use tokio::runtime::Runtime;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::task::JoinHandle;

use super::roles::{DEPTH, QUEUE, WITNESS_DEPTH};
use super::victim::Victim;
use super::{
    ALL, AT_ONCE, Case, End, Fallible, LIMIT, MIB, POOL, SIZES, SUBSCRIBERS, Tally, at_once, check,
    end_if_it_hangs, footprint, goal, left_in, message, publisher_in, random_below, run, runtime_dir, since,
    sleep_for_a_random_time, subscriber_in,
};
use crate::sys::clock::monotonic_ns;
use crate::sys::testing::is_alone;
use crate::{OnFull, RecvError, ShmPoolConfig, ShmPublisher, ShmSubscriber};

/// How many messages a victim lets pass before senders have to wait for it: on its link, the head, in the queue.
const ROOM: u64 = DEPTH as u64 + 1 + QUEUE as u64;

#[test]
#[ignore = "the survivors of kill_subscriber_in_any_state_harms_nobody_else"]
fn child_subscribers_killed() {
    if !is_alone() {
        return;
    }
    end_if_it_hangs();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let mut stages: Vec<_> = ALL.iter().map(|on_full| Stage::new(&runtime, *on_full)).collect();
    // With all that is made only once.
    stages.iter_mut().for_each(|stage| stage.come_to_rest().unwrap());
    let before = footprint();
    run("subscribers", goal(), SUBSCRIBERS, |case, on_full, victim, tally| {
        let stage = stages.iter_mut().find(|stage| stage.on_full == on_full).expect("one for each policy");
        stage.round(case, victim, tally).map_err(|fault| {
            let seen = stage.witness.fault.lock().unwrap().take();
            let state = format!("{:?}, {:?}", stage.publisher.stats(), stage.publisher.pool().stats());
            // The next round is to begin as if nothing had been.
            let stopped = stage.stop().err();
            format!("{fault}; the witness: {seen:?}; {state}; {stopped:?}")
        })
    });
    stages.iter_mut().for_each(|stage| stage.come_to_rest().unwrap());
    at_once("descriptors and mappings are what they were", || footprint() == before)
        .unwrap_or_else(|fault| panic!("{fault}: {before:?}, {:?}", footprint()));
    stages.into_iter().for_each(Stage::end);
}

/// A publisher with one policy, and who survives with it.
struct Stage {
    on_full: OnFull,
    runtime: tokio::runtime::Handle,
    publisher: ShmPublisher,
    traffic: Arc<Traffic>,
    starts: UnboundedSender<usize>,
    spans: std::sync::mpsc::Receiver<Vec<(u64, u64)>>,
    running: bool,
    witness: Arc<Witness>,
    watching: JoinHandle<()>,
    /// A witness in another process.
    remote: Victim,
    dir: TempDir,
}

impl Stage {
    fn new(runtime: &Runtime, on_full: OnFull) -> Self {
        let dir = runtime_dir();
        let _entered = runtime.enter();
        let pool = ShmPoolConfig::new().max_bytes(POOL);
        // A link may have all of the pool, so that a loan waits for what its subscriber holds.
        let builder = publisher_in(dir.path()).pool(pool).link_bytes(POOL);
        let publisher = builder.on_full(on_full).queue(QUEUE).bind().unwrap();
        let mut remote = Victim::start();
        remote.order("witness", "", on_full, None, dir.path()).unwrap();
        let builder = subscriber_in(dir.path()).depth(WITNESS_DEPTH);
        let subscriber = builder.end_with_last_publisher(true).connect().unwrap();
        let witness = Arc::new(Witness::default());
        let watching = runtime.spawn(watch(subscriber, on_full, Arc::clone(&witness)));
        let (starts, started) = unbounded_channel();
        let (end, spans) = std::sync::mpsc::channel();
        let traffic = Arc::new(Traffic::default());
        runtime.spawn(send(publisher.clone(), Arc::clone(&traffic), Arc::clone(&witness), started, end));
        let stage = Self {
            on_full,
            runtime: runtime.handle().clone(),
            publisher,
            traffic,
            starts,
            spans,
            running: false,
            witness,
            watching,
            remote,
            dir,
        };
        at_once("the witnesses are there", || stage.publisher.subscriber_count() == 2).unwrap();
        stage
    }

    fn round(&mut self, case: &Case, victim: &mut Victim, tally: &mut Tally) -> Fallible<()> {
        let starving = case.script == "starves";
        // What is given up for memory's sake may be a witness's as well.
        self.witness.may_lag.store(starving && self.on_full == OnFull::DropOldest, Ordering::SeqCst);
        let size = if starving { MIB } else { SIZES[random_below(SIZES.len() as u64) as usize] };
        let die_at = match case.end {
            End::At(step, passages) => Some((step, 1 + random_below(passages) as u32)),
            _ => None,
        };
        let idle = case.script == "idles";
        let several = case.script == "several";
        let script = if idle || several { "reads" } else { case.script };
        victim.order("subscriber", script, self.on_full, die_at, self.dir.path())?;
        // From here on it may come to its end at any time, or goes on until it is killed.
        if !matches!(case.end, End::At(..)) && case.script != "leaves" {
            victim.hear("ready")?;
        }
        let mut others = Vec::new();
        for script in ["sits", "awaits"].into_iter().filter(|_| several) {
            let mut other = Victim::start();
            other.order("subscriber", script, self.on_full, None, self.dir.path())?;
            other.hear("ready")?;
            others.push(other);
        }
        let sent_before = self.traffic.done.load(Ordering::SeqCst);
        if !idle {
            self.start(size);
        }
        let mut released = false;
        let died_at = match case.end {
            End::At(..) => None,
            End::Within(micros) => {
                for other in &mut others {
                    tally.count(case);
                    sleep_for_a_random_time(micros);
                    other.kill();
                }
                sleep_for_a_random_time(micros);
                Some(victim.kill())
            }
            End::Blocking => {
                if script != "sits" {
                    victim.hear("holding")?;
                }
                let (begun, done) = (&self.traffic.begun, &self.traffic.done);
                at_once("a sender has to wait", || match starving {
                    true => self.publisher.pool().stats().waiters == 1,
                    false => {
                        let (begun, done) = (begun.load(Ordering::SeqCst), done.load(Ordering::SeqCst));
                        done == sent_before + ROOM && begun == done + 1
                    }
                })?;
                released = true;
                Some(victim.kill())
            }
        };
        for victim in others.iter_mut().chain([&mut *victim]) {
            victim.see_die(|_| ())?;
        }
        let died_at = died_at.or(victim.died_at).ok_or("it did not come to its point")?;

        at_once("its link is gone", || self.publisher.subscriber_count() == 2)?;
        tally.time("link gone after", since(died_at));
        if !idle {
            let done = self.traffic.done.load(Ordering::SeqCst);
            at_once("senders go on", || self.traffic.done.load(Ordering::SeqCst) > done + 2)?;
            let spans = self.stop()?;
            let waited = |(start, end): &(u64, u64)| end.saturating_sub(died_at.max(*start));
            let longest = spans.iter().filter(|span| span.1 > died_at).map(waited).max().unwrap_or_default();
            if longest > AT_ONCE.as_nanos() as u64 {
                return Err(format!("a sender waited for {longest} ns after the death"));
            }
            tally.time("longest send after", longest);
            if released {
                let span = spans.iter().find(|span| span.0 < died_at && died_at < span.1);
                tally.time("blocked sender released after", waited(span.ok_or("no sender was waiting")?));
            }
        }
        self.settle()?;
        if idle {
            return Ok(());
        }
        // So that the next round needs new segments, and the old ones are retired.
        self.publisher.pool().trim();
        at_once("all memory is free", || self.publisher.pool().stats().bytes == 0)
    }

    /// With one segment in use, and everybody told which are not any more.
    fn come_to_rest(&mut self) -> Fallible<()> {
        self.start(SIZES[0]);
        let done = self.traffic.done.load(Ordering::SeqCst);
        at_once("messages are sent", || self.traffic.done.load(Ordering::SeqCst) > done)?;
        self.stop()?;
        self.settle()
    }

    /// Everybody else has got everything, and everything is back.
    fn settle(&mut self) -> Fallible<()> {
        let publisher = self.publisher.clone();
        self.runtime
            .block_on(async { tokio::time::timeout(AT_ONCE, publisher.flush()).await })
            .map_err(|_| format!("flush: not within {AT_ONCE:?}"))?
            .map_err(|error| error.to_string())?;
        let published = self.publisher.stats().published;
        if published != self.traffic.done.load(Ordering::SeqCst) {
            return Err(format!("{published} messages published, not as many as were sent"));
        }
        at_once("the witness has got everything", || self.witness.next.load(Ordering::SeqCst) >= published)?;
        if let Some(fault) = self.witness.fault.lock().unwrap().take() {
            return Err(fault);
        }
        let mut told = Ok((0, 0));
        at_once("the witness in another process has got everything", || {
            told = self.ask_remote();
            told.as_ref().map_or(true, |(seen, _)| *seen >= published)
        })?;
        let (seen, lagged) = told?;
        if seen > published || (lagged > 0 && self.on_full == OnFull::Wait) {
            return Err(format!("the other process saw {seen} of {published} messages, {lagged} lost"));
        }
        at_once("everything is back", || self.publisher.pool().stats().in_use() == 0)
    }

    /// How many messages it has received or was told of, and of how many it was told.
    fn ask_remote(&mut self) -> Fallible<(u64, u64)> {
        self.remote.tell("how many?")?;
        let told = self.remote.hear("seen")?;
        let (seen, lagged) = told.split_once(' ').ok_or("two numbers")?;
        let number = |word: &str| word.parse().map_err(|error| format!("{told}: {error}"));
        Ok((number(seen)?, number(lagged)?))
    }

    fn start(&mut self, size: usize) {
        self.running = true;
        self.traffic.stop.store(false, Ordering::SeqCst);
        self.starts.send(size).expect("the sender's task runs");
    }

    fn stop(&mut self) -> Fallible<Vec<(u64, u64)>> {
        if !std::mem::take(&mut self.running) {
            return Ok(Vec::new());
        }
        self.traffic.stop.store(true, Ordering::SeqCst);
        self.spans.recv_timeout(LIMIT).map_err(|error| format!("the sender's task: {error}"))
    }

    fn end(self) {
        let Self { runtime, publisher, starts, watching, remote, dir, .. } = self;
        drop((starts, remote));
        runtime.block_on(publisher.close()).unwrap();
        runtime.block_on(watching).unwrap();
        drop(subscriber_in(dir.path()).connect().unwrap());
        assert_eq!(left_in(dir.path()), Vec::<String>::new());
    }
}

/// What the sender's task has done, and is to do.
#[derive(Default)]
struct Traffic {
    begun: AtomicU64,
    done: AtomicU64,
    stop: AtomicBool,
}

/// Sends messages whenever it is told to start, until told to stop; then says when each send began and ended.
async fn send(
    publisher: ShmPublisher,
    traffic: Arc<Traffic>,
    witness: Arc<Witness>,
    mut starts: UnboundedReceiver<usize>,
    ended: std::sync::mpsc::Sender<Vec<(u64, u64)>>,
) {
    while let Some(size) = starts.recv().await {
        let mut spans = Vec::new();
        while !traffic.stop.load(Ordering::SeqCst) {
            // First: whoever has seen that it has begun finds the time within its span.
            let start = monotonic_ns();
            let message = message(traffic.begun.fetch_add(1, Ordering::SeqCst), size);
            publisher.send(message).await.expect("send");
            spans.push((start, monotonic_ns()));
            let done = traffic.done.fetch_add(1, Ordering::SeqCst) + 1;
            // Where nobody has to wait for the witness it must not lag for being slow.
            while done.saturating_sub(witness.next.load(Ordering::SeqCst)) > u64::from(WITNESS_DEPTH) / 2 {
                tokio::task::yield_now().await;
            }
            if done.is_multiple_of(8) {
                tokio::time::sleep(std::time::Duration::from_millis(1)).await;
            }
        }
        if ended.send(spans).is_err() {
            return;
        }
    }
}

/// A subscriber that must not notice anything.
#[derive(Default)]
struct Witness {
    /// The message due next.
    next: AtomicU64,
    may_lag: AtomicBool,
    fault: Mutex<Option<String>>,
}

async fn watch(mut subscriber: ShmSubscriber, on_full: OnFull, witness: Arc<Witness>) {
    loop {
        let due = witness.next.load(Ordering::SeqCst);
        let (next, right) = match subscriber.recv().await {
            Ok(sample) if sample.seq() == due => (due + 1, check(&sample, due)),
            Ok(sample) => {
                (sample.seq() + 1, Err(format!("message {} came where {due} was due", sample.seq())))
            }
            Err(RecvError::Lagged { missed, .. }) if witness.may_lag.load(Ordering::SeqCst) => {
                (due + missed, Ok(()))
            }
            Err(RecvError::Lagged { missed, .. }) => {
                (due + missed, Err(format!("{missed} messages were missed")))
            }
            Err(RecvError::Closed) => return,
            Err(error) => (due, Err(error.to_string())),
        };
        if let Err(fault) = right {
            witness.fault.lock().unwrap().get_or_insert(format!("with {on_full:?}: {fault}"));
        }
        // Last: whoever waits for it looks for faults then.
        witness.next.store(next, Ordering::SeqCst);
    }
}
