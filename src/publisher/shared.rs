//! What all clones of a publisher, its tx task and its link tasks share: acceptance, and who delivers.
//!
//! A message is accepted when it is on the links, at the head of the line or in the tx queue; from there on it is
//! delivered by whoever passes the turnstile next: a sender, the tx task, a link task.

mod heap;
mod run;

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, OnceLock, Weak};
use std::time::{Duration, Instant};

use super::backlog::Backlog;
use super::delivery::Delivery;
use super::error::{FlushError, LoanError};
use super::journal::{Journal, Note};
use super::links::{Acceptor, NewLink};
use super::stats::PublisherStats;
use crate::OnFull;
use crate::access::Access;
use crate::event::Notifier;
use crate::gate::{FairGate, Gate};
use crate::line::{Joined, Line, NoPlace, is_reached};
use crate::link::LinkSeed;
use crate::pool::core::{Collect, Slot};
use crate::pool::{PooledSegment, ShmSegmentPool};
use crate::proto::class::GRAIN;
use crate::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use crate::sync::{Mutex, spin_loop};
use crate::sys::clock::monotonic_ns;
use crate::sys::fork::{Disown, Origin, PerProcess, Registration};
use crate::topic::TopicName;
use crate::turnstile::{Inside, Turnstile};

/// When to look again for stuck subscribers if somebody was delivering.
const EVICT_RETRY_NS: u64 = 1_000_000;
/// For how long the end of the runtime waits while subscribers make room for what was accepted …
const LINGER: Duration = Duration::from_secs(1);
/// … and while none makes any. Nothing tells it: the tasks that would be told are gone.
const LINGER_FOR_NOTHING: Duration = Duration::from_millis(100);
const LINGER_LOOK: Duration = Duration::from_micros(50);
/// How often a sender that must not wait looks again for what another thread is just collecting.
const COLLECT_SPINS: usize = 64;

/// Publishers of this process, so that a subscriber of this process can have itself accepted at once.
///
/// A child begins without any: its parent's are another process's.
static LOCAL: PerProcess<parking_lot::Mutex<HashMap<u128, Weak<Shared>>>> = PerProcess::new();

/// What waits in the tx queue.
#[derive(Debug)]
pub(crate) enum Queued {
    Slot(Arc<Slot>),
    /// Accepted by a sink while the pool was at its cap: moves into a slot when one comes free.
    // A pointer more, so that a place in the queue is two words and not three.
    Heap(Box<Box<[u8]>>),
}

/// What tasks have to say to the delivery.
pub(crate) enum Control {
    Add(Box<LinkSeed>),
    Leave(u64),
    Remove(u64),
    Part(u64),
}

pub(crate) struct Config {
    pub(crate) topic: TopicName,
    pub(crate) id: u128,
    pub(crate) access: Arc<Access>,
    pub(crate) queue: u32,
    pub(crate) on_full: OnFull,
    pub(crate) history: usize,
    pub(crate) max_subscribers: u32,
    pub(crate) evict_after: Option<Duration>,
    pub(crate) link_bytes: Option<u64>,
}

pub(crate) struct Shared {
    /// Has it disowned in a child.
    fork: OnceLock<Registration>,
    origin: Origin,
    pub(crate) config: Config,
    pub(crate) pool: ShmSegmentPool,
    pub(crate) acceptor: Acceptor,
    /// Handles that exist; the last one to go closes the publisher.
    pub(crate) handles: AtomicUsize,
    line: Arc<Line<Queued>>,
    /// Bytes of what is in `line`.
    backlog: Backlog,
    /// Senders that wait for a place, in the order in which they came.
    pub(crate) room: FairGate,
    /// Sinks that wait for a place. A gate of their own, where all are always woken: one whose owner polls it no more
    /// stays registered, and would swallow a wake-up meant for another; and one may not take a place while a message
    /// waits in the heap, where a sender may.
    pub(crate) sinks: Gate,
    delivery: Turnstile<Delivery>,
    /// Tells the tx task that there is something to do.
    notifier: Notifier,
    control: Mutex<Vec<Control>>,
    controls: AtomicUsize,
    /// Links whose tasks the tx task has yet to start.
    pub(crate) new_links: Mutex<Vec<NewLink>>,
    /// Messages that became the head without having been in line.
    heads: AtomicU64,
    /// So many of these are on their links.
    heads_delivered: AtomicU64,
    /// So many of those that were in line are on their links. Apart from the heads: each of the two counts in order.
    delivered: AtomicU64,
    /// Who waits for a flush or the end.
    pub(crate) flushed: Gate,
    pub(crate) subscribers: AtomicUsize,
    pub(crate) subscribers_changed: Gate,
    /// The length that the first message in the heap waits for in the pool, plus one; 0 for none.
    starved: AtomicUsize,
    /// The slot that the tx task got for it.
    fed: Mutex<Option<PooledSegment>>,
    /// Nothing is delivered any more: after an orderly end, or because the tx task died.
    ended: AtomicUsize,
    gone: AtomicBool,
    /// When to try the head again though nobody rings for it, in clock nanoseconds; 0 for never.
    retry_at: AtomicU64,
    /// Messages come so fast that not each one's time is noted: the tx task has to note the last ones'.
    rush: AtomicBool,
    /// The tx task looks for subscribers that keep senders waiting for long.
    watching: AtomicBool,
    published: AtomicU64,
    /// What the tx task is to tell the log.
    pub(crate) journal: Journal,
    /// Shared with the links, which count.
    pub(crate) dropped: Arc<AtomicU64>,
    pub(crate) copied_bytes: AtomicU64,
}

/// What a flush waits for: so many messages of the line, and of those that became the head without having been in it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct FlushTarget {
    joined: u64,
    heads: u64,
}

const RUNNING: usize = 0;
const ENDED: usize = 1;
const DIED: usize = 2;

impl Shared {
    pub(crate) fn new(
        config: Config,
        pool: ShmSegmentPool,
        acceptor: Acceptor,
        notifier: Notifier,
    ) -> Arc<Self> {
        let (line, front) = Line::new(config.queue);
        pool.core().add_publisher();
        let link_share = config.link_bytes.map(|bytes| bytes.div_ceil(GRAIN as u64));
        let delivery = Delivery::new(config.id, config.history, link_share, Arc::clone(pool.core()), front);
        let bounded = config.link_bytes.is_none().then(|| pool.core().part());
        // The tx task sees to the end, wherever the panic was.
        let alarm = notifier.clone();
        let shared = Arc::new(Self {
            fork: OnceLock::new(),
            origin: Origin::here(),
            delivery: Turnstile::new(delivery).with_alarm(move || {
                let _ = alarm.notify();
            }),
            backlog: Backlog::new(bounded, config.queue),
            line,
            pool,
            acceptor,
            notifier,
            handles: AtomicUsize::new(1),
            room: FairGate::new(),
            sinks: Gate::new(),
            control: Mutex::default(),
            controls: AtomicUsize::new(0),
            new_links: Mutex::default(),
            heads: AtomicU64::new(0),
            heads_delivered: AtomicU64::new(0),
            delivered: AtomicU64::new(0),
            flushed: Gate::new(),
            subscribers: AtomicUsize::new(0),
            subscribers_changed: Gate::new(),
            starved: AtomicUsize::new(0),
            fed: Mutex::default(),
            ended: AtomicUsize::new(RUNNING),
            gone: AtomicBool::new(false),
            retry_at: AtomicU64::new(0),
            rush: AtomicBool::new(false),
            watching: AtomicBool::new(false),
            published: AtomicU64::new(0),
            journal: Journal::default(),
            dropped: Arc::default(),
            copied_bytes: AtomicU64::new(0),
            config,
        });
        let disown: Weak<dyn Disown> = Arc::downgrade(&shared) as _;
        let _ = shared.fork.set(Registration::handle(disown));
        let collector: Weak<dyn Collect> = Arc::downgrade(&shared) as _;
        shared.pool.core().add_collector(collector);
        LOCAL.get().lock().insert(shared.config.id, Arc::downgrade(&shared));
        shared
    }

    /// The publisher with this id, if it lives in this process.
    pub(crate) fn local(id: u128) -> Option<Arc<Self>> {
        LOCAL.get().lock().get(&id).and_then(Weak::upgrade)
    }

    #[inline]
    pub(crate) fn line(&self) -> &Line<Queued> {
        &self.line
    }

    /// Whether the bytes in the line leave room for another message.
    #[inline]
    pub(crate) fn backlog_has_room(&self) -> bool {
        self.backlog.has_room()
    }

    /// Puts a message into the line, if there is a place for it.
    pub(crate) fn join(&self, message: impl FnOnce() -> Arc<Slot>) -> Result<Joined, NoPlace> {
        if !self.backlog.has_room() && !self.is_closed() {
            return Err(NoPlace::Full);
        }
        self.line.join(|| self.queued(message()))
    }

    /// A message that has a place in the line, to be put there.
    #[inline]
    pub(crate) fn queued(&self, slot: Arc<Slot>) -> Queued {
        self.backlog.add(&slot);
        Queued::Slot(slot)
    }

    #[inline]
    pub(crate) fn is_closed(&self) -> bool {
        self.line.is_closed()
    }

    #[inline]
    pub(crate) fn has_ended(&self) -> bool {
        self.ended.load(Ordering::Acquire) != RUNNING
    }

    /// Whether the tx task is gone too, and with it the socket in the topic's directory.
    pub(crate) fn is_gone(&self) -> bool {
        self.gone.load(Ordering::Acquire)
    }

    /// The tx task's last word.
    pub(crate) fn set_gone(&self) {
        self.gone.swap(true, Ordering::AcqRel);
        self.flushed.wake_all();
    }

    /// Whether it is another process's, which this one was forked from.
    pub(crate) fn is_inherited(&self) -> bool {
        !self.origin.is_here()
    }

    /// Why nothing is accepted any more.
    #[cold]
    pub(crate) fn refusal(&self) -> LoanError {
        if self.is_inherited() { LoanError::Forked } else { LoanError::Closed }
    }

    /// Why what was accepted may not have been delivered.
    #[cold]
    pub(crate) fn flush_error(&self) -> FlushError {
        if self.is_inherited() { FlushError::Forked } else { FlushError::Closed }
    }

    pub(crate) fn has_died(&self) -> bool {
        self.ended.load(Ordering::Acquire) == DIED
    }

    /// Accepts a message if nobody is delivering and nothing is in line before it: it is put on its links here and now,
    /// or becomes the head. `message` is called only if it is accepted; `false`: it has to be queued.
    #[inline]
    pub(crate) fn deliver_now(&self, message: impl FnOnce() -> Arc<Slot>) -> bool {
        let Some(mut delivery) = self.enter() else { return false };
        let accepted = self.deliver_inside(&mut delivery, message);
        self.leave(delivery);
        accepted
    }

    #[inline]
    fn deliver_inside(
        &self,
        delivery: &mut Inside<'_, Delivery>,
        message: impl FnOnce() -> Arc<Slot>,
    ) -> bool {
        self.prepare(delivery);
        if !delivery.is_behind() && !delivery.front.is_empty() {
            // Nothing keeps these from being delivered, but a sink that fed them may never come to flush them.
            self.work(delivery);
            delivery.last_run = monotonic_ns();
            delivery.timed = true;
        }
        if delivery.is_behind() || self.line.is_closed() || !delivery.front.is_empty() {
            return false;
        }
        kill_point!("send: inside");
        if !delivery.deliver(message()) {
            delivery.is_head_direct = true;
            self.heads.fetch_add(1, Ordering::AcqRel);
            self.work(delivery);
        }
        true
    }

    /// Delivers what there is to deliver, unless somebody is at it already: he is then told to go on.
    pub(crate) fn pump(&self) {
        if let Some(mut delivery) = self.enter() {
            self.prepare(&mut delivery);
            self.work(&mut delivery);
            self.leave(delivery);
        }
    }

    /// Wakes who waits for a place: one has come free.
    pub(crate) fn wake_for_room(&self) {
        self.room.wake();
        self.sinks.wake_all();
    }

    /// Whether somebody waits for what may be in the queue to be delivered: for a place, for memory, or for the end.
    #[inline]
    pub(crate) fn is_waited_for(&self) -> bool {
        self.room.has_waiters()
            || self.sinks.has_waiters()
            || self.pool.core().budget.gate.has_waiters()
            || self.is_closed()
    }

    /// Tells the delivery something and has it done.
    pub(crate) fn tell(&self, control: Control) {
        self.leave_word(control);
        self.pump();
    }

    /// Tells the delivery something for its next run.
    pub(crate) fn leave_word(&self, control: Control) {
        self.control.lock().push(control);
        self.controls.fetch_add(1, Ordering::Release);
    }

    /// Accepts who has connected, for a subscriber of our own process.
    pub(crate) fn accept_now(&self) {
        self.acceptor.accept_pending(self);
        self.pump();
    }

    /// Has the tx task tell the log.
    pub(crate) fn log(&self, note: Note) {
        self.journal.note(note);
        self.notify();
    }

    /// Signals the tx task.
    pub(crate) fn notify(&self) {
        // An error means that the tx task is gone; whoever needs it learns that from `has_ended`.
        let _ = self.notifier.notify();
    }

    /// Accepts nothing any more; what was accepted goes on being delivered. Where that is done already the publisher
    /// ends here and now: its runtime may be about to go.
    pub(crate) fn close(&self) {
        self.line.close();
        self.wake_everybody();
        self.try_finish();
        self.notify();
    }

    /// Ends the publisher once everything accepted is on its links; `false` while it is not.
    pub(crate) fn try_finish(&self) -> bool {
        let Some(mut delivery) = self.enter() else { return false };
        if delivery.finished {
            self.leave(delivery);
            return true;
        }
        self.acceptor.accept_pending(self);
        self.prepare(&mut delivery);
        self.work_off(&mut delivery);
        let done = self.is_done(&delivery);
        if done {
            self.finish(&mut delivery, true);
            self.ended.swap(ENDED, Ordering::AcqRel);
        }
        self.leave(delivery);
        if done {
            self.bury();
        }
        done
    }

    /// The tx task is gone, and its runtime with it: an orderly end if everything accepted can be delivered, for as long as subscribers
    /// go on reading it and no longer than [`LINGER`].
    pub(crate) fn end(&self) {
        self.line.close();
        self.wake_for_close();
        let begun = Instant::now();
        let (mut moved_at, mut moved) = (begun, self.moved());
        while !self.has_ended() && !self.try_finish() {
            let (now, moves) = (Instant::now(), self.moved());
            if moves != moved {
                (moved_at, moved) = (now, moves);
            }
            if now - moved_at > LINGER_FOR_NOTHING || now - begun > LINGER {
                return self.die();
            }
            std::thread::sleep(LINGER_LOOK);
        }
    }

    /// Changes when a message that had to wait has been delivered.
    fn moved(&self) -> u64 {
        let heads = self.heads_delivered.load(Ordering::Relaxed);
        self.delivered.load(Ordering::Relaxed).wrapping_add(heads)
    }

    /// The tx task is gone without an orderly end: everything that waits is released with an error.
    pub(crate) fn die(&self) {
        self.line.close();
        if self.ended.compare_exchange(RUNNING, DIED, Ordering::AcqRel, Ordering::Acquire).is_ok() {
            // If somebody is inside he sees it when he leaves.
            self.pump();
            self.bury();
        }
    }

    /// All that was accepted so far. To be read before the delivery that a flush begins with: what joins later may never be flushed.
    pub(crate) fn flush_target(&self) -> FlushTarget {
        FlushTarget { joined: self.line.joined(), heads: self.heads.load(Ordering::Acquire) }
    }

    /// Whether everything accepted up to `target` is on its links: `Some(false)` if it never will be.
    pub(crate) fn flushed(&self, target: FlushTarget) -> Option<bool> {
        if is_reached(self.delivered.load(Ordering::Acquire), target.joined)
            && is_reached(self.heads_delivered.load(Ordering::Acquire), target.heads)
        {
            return Some(true);
        }
        self.has_ended().then_some(false)
    }

    pub(crate) fn stats(&self) -> PublisherStats {
        PublisherStats {
            published: self.published.load(Ordering::Relaxed),
            dropped: self.dropped.load(Ordering::Relaxed),
            copied_bytes: self.copied_bytes.load(Ordering::Relaxed),
            subscribers: self.subscribers.load(Ordering::Relaxed),
            queued: self.line.len(),
        }
    }

    /// Disconnects subscribers that have kept senders waiting for too long, and says in how many nanoseconds the next
    /// one will have.
    pub(crate) fn evict(&self) -> Option<u64> {
        let limit = u64::try_from(self.config.evict_after?.as_nanos()).unwrap_or(u64::MAX);
        let Some(mut delivery) = self.enter() else { return Some(EVICT_RETRY_NS) };
        let now = monotonic_ns();
        delivery.evict(now.saturating_sub(limit));
        self.work(&mut delivery);
        let due = delivery.stuck_since().map(|since| since.saturating_add(limit).saturating_sub(now));
        self.leave(delivery);
        due
    }

    /// Warns of subscribers that keep senders waiting, and says in how many nanoseconds to look again.
    pub(crate) fn warn_of_stalls(&self) -> Option<u64> {
        if !self.watching.load(Ordering::Acquire) {
            return None;
        }
        let Some(mut delivery) = self.enter() else { return Some(EVICT_RETRY_NS) };
        let (now, mut stalls) = (monotonic_ns(), Vec::new());
        let next = delivery.stalls(now, &mut stalls);
        self.watching.store(next.is_some(), Ordering::Release);
        self.leave(delivery);
        stalls.iter().for_each(|stall| stall.warn(self.config.topic.as_str()));
        next.map(|next| next.saturating_sub(now))
    }

    /// Does what was put off and is due, for the tx task.
    pub(crate) fn try_again(&self) {
        let now = monotonic_ns();
        if self.acceptor.has_more() || self.acceptor.retry_at().is_some_and(|at| at <= now) {
            self.acceptor.accept_new(self);
        }
        let at = self.retry_at.load(Ordering::Acquire);
        if at != 0 && at <= now {
            self.retry_at.swap(0, Ordering::AcqRel);
            self.pump();
        }
    }

    /// In how many nanoseconds there is something to [`try_again`](Self::try_again).
    pub(crate) fn retry_in(&self) -> Option<u64> {
        let head = Some(self.retry_at.load(Ordering::Acquire)).filter(|at| *at != 0);
        let at = head.into_iter().chain(self.acceptor.retry_at()).min()?;
        Some(at.saturating_sub(monotonic_ns()))
    }

    fn bury(&self) {
        self.acceptor.close();
        // Ended was set before: nobody adds to them any more.
        std::mem::take(&mut *self.new_links.lock()).into_iter().for_each(NewLink::refuse);
        LOCAL.get().lock().remove(&self.config.id);
        self.wake_everybody();
    }

    fn wake_everybody(&self) {
        self.flushed.wake_all();
        self.wake_for_close();
    }

    /// Wakes those that a closed publisher has nothing for. A flush and a close go on waiting.
    fn wake_for_close(&self) {
        self.room.wake_all();
        self.sinks.wake_all();
        self.subscribers_changed.wake_all();
        self.pool.core().budget.gate.wake_all();
    }
}

impl Disown for Shared {
    /// As if it had died by a panic inside, while everything was being delivered.
    fn disown(&self) {
        self.delivery.poison();
        self.line.close();
        self.ended.swap(DIED, Ordering::AcqRel);
        self.gone.swap(true, Ordering::AcqRel);
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.pool.core().remove_publisher();
    }
}

impl Collect for Shared {
    fn collect(&self) {
        for _ in 0..COLLECT_SPINS {
            if let Some(mut delivery) = self.enter() {
                // Who looks for memory and never finds any sends nothing either: subscribers must not keep what is gone.
                delivery.retire();
                // What a sink has fed may have all the memory there is.
                self.work(&mut delivery);
                self.reclaim(&mut delivery);
                self.leave(delivery);
                return;
            }
            // Whoever is inside collects for a registered waiter when he leaves; a caller that does not wait has to
            // see for itself.
            spin_loop();
        }
    }
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared")
            .field("topic", &self.config.topic)
            .field("stats", &self.stats())
            .finish_non_exhaustive()
    }
}
