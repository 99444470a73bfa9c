//! Scenes of a whole publisher, run under the schedules of shuttle: `.ci/shuttle`.
//!
//! Everything between a handle and a link's page is the real code: gates, turnstile, line, pool, delivery, sinks, close. What waits for
//! descriptors is played: the tx task and the link tasks by loops that wait for the same events, a subscriber by a thread that reads the
//! link's page. There is no clock: a deadline comes after some looks, a timer never, so that none of them hides a lost wake-up.
//!
//! After each scene everything accepted has been read, once and in its sender's order, without any further call; a waiter that is not woken
//! shows as a deadlock. Then all slots and places are back.
//!
//! What each scene would find is shown by `.ci/weaken scenes`.

use std::future::{Future, pending, poll_fn};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures::Sink;
use futures::future::{Either, select};
use shuttle::future::block_on;
use shuttle::rand::{Rng, thread_rng};
use shuttle::scheduler::{PctScheduler, RandomScheduler};
use shuttle::thread;

use super::ShmPublisher;
use super::links::Acceptor;
use super::shared::{Config, Control, Shared};
use crate::access::Access;
use crate::event::{Waiter, event};
use crate::link::{LinkPage, LinkTx, Seat};
use crate::pool::core::forget_last;
use crate::pool::{Promised, ShmPoolConfig, ShmSegmentPool};
use crate::proto::bell::{self, Wake};
use crate::proto::layout::Geometry;
use crate::proto::release;
use crate::proto::ring::{Consumer, Popped};
use crate::sync::atomic::{AtomicBool, Ordering};
use crate::sync::{Mutex, Notify};
use crate::sys::bell::Bell;
use crate::sys::clock::model;
use crate::sys::socket::{self, Connection};
use crate::topic::TopicName;
use crate::{OnFull, SendErrorKind};

/// Instants at which PCT changes who runs.
const DEPTH: usize = 4;

/// Every scene, by name.
pub const SCENES: &[(&str, fn())] = &[
    ("senders_beside_an_idle_sink", senders_beside_an_idle_sink),
    ("sinks_that_do_not_flush", sinks_that_do_not_flush),
    ("sends_given_up", sends_given_up),
    ("flushes_beside_feeds", flushes_beside_feeds),
];

/// Runs a scene under so many schedules, or the one in `SHUTTLE_REPLAY`; how many it was.
///
/// # Panics
///
/// By the first schedule that fails, which is printed.
pub fn check(scene: fn(), schedules: usize, seed: u64) -> usize {
    let play = move || {
        model::reset();
        scene();
        forget_last();
    };
    if let Ok(schedule) = std::env::var("SHUTTLE_REPLAY") {
        shuttle::replay(play, &schedule);
        return 1;
    }
    let mut config = shuttle::Config::new();
    config.stack_size = 128 << 10;
    config.silence_warnings = true;
    config.ungraceful_shutdown_config.immediately_return_on_panic = true;
    let half = schedules.div_ceil(2);
    shuttle::Runner::new(RandomScheduler::new_from_seed(seed, half), config.clone()).run(play)
        + shuttle::Runner::new(PctScheduler::new_from_seed(seed, DEPTH, half), config).run(play)
}

/// A publisher with its tx task.
struct Scene {
    publisher: ShmPublisher,
    links: Vec<Arc<Link>>,
    threads: Vec<thread::JoinHandle<()>>,
    /// A reader has got on.
    progress: Arc<Notify>,
}

struct Settings {
    queue: u32,
    pool: ShmPoolConfig,
}

impl Scene {
    fn new(settings: Settings) -> Self {
        Self::in_pool(settings.queue, ShmSegmentPool::new(settings.pool))
    }

    fn in_pool(queue: u32, pool: ShmSegmentPool) -> Self {
        let config = Config {
            topic: TopicName::new("scene").unwrap(),
            id: 1,
            access: Arc::new(Access::default()),
            queue,
            on_full: OnFull::Wait,
            history: 0,
            max_subscribers: 8,
            evict_after: None,
            link_bytes: None,
        };
        let (notifier, waiter) = event();
        let shared = Shared::new(config, pool, Acceptor::new(None), notifier);
        let publisher = ShmPublisher::from_shared(Arc::clone(&shared));
        let threads = vec![thread::spawn(move || block_on(tx_task(shared, waiter)))];
        Self { publisher, links: Vec::new(), threads, progress: Arc::new(Notify::new()) }
    }

    /// Adds a subscriber that reads all it gets, and its link's task.
    fn subscribe(&mut self, depth: u32) {
        let shared = &self.publisher.shared;
        let (ours, theirs) = socket::pair().unwrap();
        let id = self.links.len() as u64;
        let geometry = Geometry::new(depth).unwrap();
        let dropped = Arc::clone(&shared.dropped);
        let (seed, credit) =
            LinkTx::prepare(id, Arc::new(ours), geometry, OnFull::Wait, 0, dropped, Seat::default()).unwrap();
        let (page, data) = seed.other_end();
        let (stop, read) = (AtomicBool::new(false), Mutex::default());
        let link = Arc::new(Link { id, page, data, credit, stop, read, _connection: theirs });
        self.links.push(Arc::clone(&link));
        shared.tell(Control::Add(Box::new(seed)));
        let (task, shared) = (Arc::clone(&link), Arc::clone(shared));
        self.threads.push(thread::spawn(move || block_on(link_task(&shared, &task))));
        let progress = Arc::clone(&self.progress);
        self.threads.push(thread::spawn(move || block_on(link.read_on(&progress))));
    }

    /// Waits, without a call of the publisher's, until what each subscriber has read is as it should be.
    fn wait_until(&self, is_there: impl Fn(&[usize]) -> bool) {
        block_on(async {
            while !self.links.iter().all(|link| is_there(&link.read.lock())) {
                self.progress.notified().await;
            }
        });
    }

    /// Waits, without a call of the publisher's, until every subscriber has got all of `accepted`, and looks at what it got.
    fn settle(&self, accepted: &[Vec<usize>]) {
        let count: usize = accepted.iter().map(Vec::len).sum();
        self.wait_until(|read| read.len() >= count);
        for link in &self.links {
            let read = link.read.lock().clone();
            assert_eq!(read.len(), count, "no more than was accepted: {read:?} of {accepted:?}");
            for own in accepted {
                let got: Vec<_> = read.iter().copied().filter(|id| own.contains(id)).collect();
                assert_eq!(&got, own, "once, and in its sender's order");
            }
        }
    }

    /// Ends it in order; everything has come back.
    fn end(self) {
        let Self { publisher, links, threads, .. } = self;
        let shared = Arc::clone(&publisher.shared);
        assert_eq!(shared.line().len(), 0, "every place is back");
        let closing = block_on(publisher.close());
        assert!(closing.is_ok());
        for link in &links {
            link.stop.store(true, Ordering::Release);
            link.data.notify_one();
            link.credit.model.notify_one();
        }
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        assert_eq!(shared.pool.core().stats().in_use(), 0, "every slot is back");
    }
}

/// The subscriber's end.
struct Link {
    id: u64,
    page: LinkPage,
    data: Arc<Notify>,
    credit: Arc<Bell>,
    stop: AtomicBool,
    /// Lengths of what was read: the messages' names.
    read: Mutex<Vec<usize>>,
    _connection: Connection,
}

impl Link {
    async fn read_on(&self, progress: &Notify) {
        let page = self.page.view();
        let mut consumer = Consumer::new(8);
        let mut due = 0;
        loop {
            match consumer.pop(page).unwrap() {
                Popped::Message(message) => {
                    assert_eq!(message.seq, due, "in order, and none left out");
                    due += 1;
                    self.read.lock().push(message.len as usize);
                    if release::release(page, message.ticket) == Wake::Ring {
                        self.credit.ring();
                    }
                    progress.notify_one();
                    continue;
                }
                Popped::Contended => {
                    thread::yield_now();
                    continue;
                }
                Popped::Empty => {}
            }
            if self.stop.load(Ordering::Acquire) {
                return;
            }
            bell::arm(&page.control.data_armed);
            if consumer.is_empty(page) {
                self.data.notified().await;
            }
            bell::disarm(&page.control.data_armed);
        }
    }
}

/// Waits for what `links::serve` waits for.
async fn link_task(shared: &Shared, link: &Link) {
    loop {
        link.credit.model.notified().await;
        if link.stop.load(Ordering::Acquire) {
            return shared.tell(Control::Remove(link.id));
        }
        shared.pump();
    }
}

/// Waits for what `TxTask::run` waits for.
async fn tx_task(shared: Arc<Shared>, waiter: Waiter) {
    loop {
        if shared.has_ended() || (shared.is_closed() && shared.try_finish()) {
            return shared.set_gone();
        }
        shared.try_again();
        shared.evict();
        shared.warn_of_stalls();
        shared.end_rush();
        let feed = async {
            let Some(len) = shared.slot_wanted() else { return pending().await };
            match shared.pool.take_until(len, Promised::Yes, || shared.has_ended()).await {
                Some(segment) => shared.feed(segment.unwrap()),
                None => {}
            }
        };
        match select(pin!(waiter.wait_async()), pin!(feed)).await {
            Either::Left((told, _)) => told.unwrap(),
            Either::Right(((), _)) => {}
        }
        shared.pump();
    }
}

/// Sends messages of these lengths, each in one of the ways that there are; which of them were accepted.
fn send(publisher: &ShmPublisher, lens: impl Iterator<Item = usize>, ways: &[Way]) -> Vec<usize> {
    let accepted = lens.filter(|len| {
        let message = vec![0; *len];
        match ways[thread_rng().gen_range(0..ways.len())] {
            Way::Task => block_on(publisher.send(message)).map(|()| true).unwrap(),
            Way::Thread => publisher.blocking_send(message).map(|()| true).unwrap(),
            Way::Timed => match publisher.blocking_send_timeout(message, Duration::from_secs(1)) {
                Ok(()) => true,
                Err(error) => {
                    assert!(matches!(error.kind(), SendErrorKind::TimedOut), "{error}");
                    false
                }
            },
            Way::Cancelled => block_on(for_some_polls(publisher.send(message))).map(Result::unwrap).is_some(),
        }
    });
    accepted.collect()
}

#[derive(Debug, Clone, Copy)]
enum Way {
    Task,
    Thread,
    Timed,
    Cancelled,
}

/// What came of the future, unless it was dropped before, at a poll or between two.
async fn for_some_polls<F: Future>(future: F) -> Option<F::Output> {
    let mut future = pin!(future);
    let mut polls = thread_rng().gen_range(1..4);
    poll_fn(|cx| {
        if let Poll::Ready(output) = future.as_mut().poll(cx) {
            return Poll::Ready(Some(output));
        }
        polls -= 1;
        if polls == 0 {
            return Poll::Ready(None);
        }
        // Another poll comes, woken or not.
        cx.waker().wake_by_ref();
        Poll::Pending
    })
    .await
}

fn poll_ready(sink: &mut ShmPublisher, cx: &mut Context<'_>) -> Poll<()> {
    Sink::<Vec<u8>>::poll_ready(Pin::new(sink), cx).map(Result::unwrap)
}

async fn reserve(sink: &mut ShmPublisher) {
    poll_fn(|cx| poll_ready(sink, cx)).await;
}

/// Feeds messages of these lengths, flushing now and then.
fn feed(sink: &mut ShmPublisher, lens: impl Iterator<Item = usize>, flushes: bool) -> Vec<usize> {
    block_on(async {
        let mut fed = Vec::new();
        for len in lens {
            reserve(sink).await;
            Sink::start_send(Pin::new(&mut *sink), vec![0; len]).unwrap();
            fed.push(len);
            if flushes && thread_rng().gen_bool(0.5) {
                poll_fn(|cx| Sink::<Vec<u8>>::poll_flush(Pin::new(&mut *sink), cx)).await.unwrap();
            }
        }
        fed
    })
}

fn spawn<T: Send + 'static>(act: impl FnOnce() -> T + Send + 'static) -> thread::JoinHandle<T> {
    thread::spawn(act)
}

fn joined(actors: Vec<thread::JoinHandle<Vec<usize>>>) -> Vec<Vec<usize>> {
    actors.into_iter().map(|actor| actor.join().unwrap()).collect()
}

/// So little that a message of a page waits for the one before.
fn pool() -> ShmPoolConfig {
    ShmPoolConfig::new().populate(false)
}

/// An idle sink has every place: what waits behind the head waits for no place, and is woken all the same.
fn senders_beside_an_idle_sink() {
    let mut scene = Scene::new(Settings { queue: 1, pool: pool() });
    scene.subscribe(1);
    let mut idle = scene.publisher.clone();
    block_on(reserve(&mut idle));
    let actors = [1..4, 4..6].map(|lens| {
        let publisher = scene.publisher.clone();
        spawn(move || send(&publisher, lens, &[Way::Task, Way::Thread]))
    });
    scene.settle(&joined(actors.into()));
    drop(idle);
    scene.end();
}

/// A sink is preempted where it has joined and its message is not there yet; a sender joins behind it. The sinks are not flushed, but what was
/// sent beside them is delivered.
fn sinks_that_do_not_flush() {
    let mut scene = Scene::new(Settings { queue: 16, pool: pool() });
    scene.subscribe(4);
    let sinks = [1..3, 3..5].map(|lens| {
        let mut sink = scene.publisher.clone();
        spawn(move || {
            let fed = feed(&mut sink, lens, false);
            (sink, fed)
        })
    });
    let publisher = scene.publisher.clone();
    let sent = spawn(move || send(&publisher, 5..8, &[Way::Task, Way::Thread])).join().unwrap();
    let fed = sinks.map(|sink| sink.join().unwrap());
    scene.wait_until(|read| sent.iter().all(|len| read.contains(len)));
    let mut accepted = vec![sent];
    for (sink, fed) in fed {
        drop(sink);
        accepted.push(fed);
    }
    scene.settle(&accepted);
    scene.end();
}

/// Waits that are given up in any way hand on their turn.
fn sends_given_up() {
    let mut scene = Scene::new(Settings { queue: 1, pool: pool() });
    scene.subscribe(1);
    let all = [Way::Task, Way::Thread, Way::Timed, Way::Cancelled];
    let actors = [1..4, 4..6, 6..8].map(|lens| {
        let publisher = scene.publisher.clone();
        spawn(move || send(&publisher, lens, &all))
    });
    scene.settle(&joined(actors.into()));
    scene.end();
}

/// Flushes all return, beside sends and sinks that are not flushed.
fn flushes_beside_feeds() {
    let mut scene = Scene::new(Settings { queue: 8, pool: pool() });
    scene.subscribe(1);
    let mut flushed = scene.publisher.clone();
    let mut fed = scene.publisher.clone();
    let publisher = scene.publisher.clone();
    let actors = vec![
        spawn(move || feed(&mut flushed, 1..4, true)),
        spawn(move || feed(&mut fed, 4..6, false)),
        spawn(move || send(&publisher, 6..8, &[Way::Task])),
    ];
    scene.settle(&joined(actors));
    scene.end();
}
