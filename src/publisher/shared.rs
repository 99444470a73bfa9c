//! What all clones of a publisher, its tx task and its link tasks share: acceptance, and who delivers.
//!
//! A message is accepted when it is on the links, at the head of the line or in the tx queue; from there on it is
//! delivered by whoever passes the turnstile next: a sender, the tx task, a link task.

mod heap;

use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock, Weak};
use std::time::Duration;

use crossbeam_queue::ArrayQueue;
use parking_lot::Mutex;

use super::delivery::Delivery;
use super::links::{Acceptor, NewLink};
use super::stats::PublisherStats;
use crate::OnFull;
use crate::access::Access;
use crate::event::Notifier;
use crate::gate::Gate;
use crate::link::LinkSeed;
use crate::places::Places;
use crate::pool::core::{Collect, Slot};
use crate::pool::{PooledSegment, ShmSegmentPool};
use crate::sys::clock::monotonic_ns;
use crate::topic::TopicName;
use crate::turnstile::{Inside, Turnstile};

/// Messages that one run of delivery takes from the queue before it lets others in.
const RUN: usize = 64;
/// A publisher that was quiet for so long, and has not done so lately, looks for new subscribers before it sends: a
/// message sent right after somebody connected then reaches him instead of being counted as missed. In a stream of
/// messages that is left to the tx task.
const QUIET_NS: u64 = 100_000;
const ACCEPT_EVERY_NS: u64 = 5_000_000;
/// When to look again for stuck subscribers if somebody was delivering.
const EVICT_RETRY_NS: u64 = 1_000_000;
/// When to try again what met with too many descriptors under way in sockets.
const CROWDED_RETRY_NS: u64 = 5_000_000;
/// How often the tx task looks whether a rush of messages is over.
const RUSH_NS: u64 = 1_000_000;
/// How often a sender that must not wait looks again for what another thread is just collecting.
const COLLECT_SPINS: usize = 64;

/// Publishers of this process, so that a subscriber of this process can have itself accepted at once.
static LOCAL: LazyLock<Mutex<HashMap<u128, Weak<Shared>>>> = LazyLock::new(Mutex::default);

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
}

pub(crate) struct Shared {
    pub(crate) config: Config,
    pub(crate) pool: ShmSegmentPool,
    pub(crate) acceptor: Acceptor,
    /// Handles that exist; the last one to go closes the publisher.
    pub(crate) handles: AtomicUsize,
    places: Places,
    /// Senders that wait for a place.
    pub(crate) room: Gate,
    /// Sinks that wait for a place. A gate of their own, where all are always woken: one whose owner polls it no more
    /// stays registered, and would swallow a wake-up meant for another; and one may not take a place while a message
    /// waits in the heap, where a sender may.
    pub(crate) sinks: Gate,
    queue: ArrayQueue<Queued>,
    delivery: Turnstile<Delivery>,
    /// Tells the tx task that there is something to do.
    notifier: Notifier,
    control: Mutex<Vec<Control>>,
    controls: AtomicUsize,
    /// Links whose tasks the tx task has yet to start.
    pub(crate) new_links: Mutex<Vec<NewLink>>,
    /// Messages that went through the queue or became the head: so many were accepted, so many are on their links.
    accepted: AtomicU64,
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
    published: AtomicU64,
    /// Shared with the links, which count.
    pub(crate) dropped: Arc<AtomicU64>,
    pub(crate) copied_bytes: AtomicU64,
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
        let shared = Arc::new(Self {
            delivery: Turnstile::new(Delivery::new(config.id, config.history, Arc::clone(pool.core()))),
            places: Places::new(config.queue),
            queue: ArrayQueue::new(config.queue as usize),
            pool,
            acceptor,
            notifier,
            handles: AtomicUsize::new(1),
            room: Gate::new(),
            sinks: Gate::new(),
            control: Mutex::default(),
            controls: AtomicUsize::new(0),
            new_links: Mutex::default(),
            accepted: AtomicU64::new(0),
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
            published: AtomicU64::new(0),
            dropped: Arc::default(),
            copied_bytes: AtomicU64::new(0),
            config,
        });
        let collector: Weak<dyn Collect> = Arc::downgrade(&shared) as _;
        shared.pool.core().add_collector(collector);
        LOCAL.lock().insert(shared.config.id, Arc::downgrade(&shared));
        shared
    }

    /// The publisher with this id, if it lives in this process.
    pub(crate) fn local(id: u128) -> Option<Arc<Self>> {
        LOCAL.lock().get(&id).and_then(Weak::upgrade)
    }

    #[inline]
    pub(crate) fn places(&self) -> &Places {
        &self.places
    }

    #[inline]
    pub(crate) fn is_closed(&self) -> bool {
        self.places.is_closed()
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
        if accepted {
            // A sender that was woken for a place has left it free: it is the next one's.
            self.room.wake(1);
        }
        accepted
    }

    /// As [`deliver_now`](Self::deliver_now), but with nothing left to be done wakes no subscriber that sleeps: the next run
    /// does, by whomever.
    #[inline]
    pub(crate) fn feed_now(&self, message: impl FnOnce() -> Arc<Slot>) -> bool {
        let Some(mut delivery) = self.enter() else { return false };
        let accepted = self.deliver_inside(&mut delivery, message);
        if delivery.is_behind() {
            self.leave(delivery);
            return accepted;
        }
        self.note(&mut delivery);
        if delivery.leave() {
            self.pump();
        }
        accepted
    }

    #[inline]
    fn deliver_inside(
        &self,
        delivery: &mut Inside<'_, Delivery>,
        message: impl FnOnce() -> Arc<Slot>,
    ) -> bool {
        self.prepare(delivery);
        if !delivery.is_behind() && !self.queue.is_empty() {
            // Nothing keeps these from being delivered, but a sink that fed them may never come to flush them.
            self.work(delivery);
            delivery.last_run = monotonic_ns();
            delivery.timed = true;
        }
        if delivery.is_behind() || self.places.is_closed() || !self.queue.is_empty() {
            return false;
        }
        kill_point!("send: inside");
        if !delivery.deliver(message()) {
            self.accepted.fetch_add(1, Ordering::AcqRel);
            self.work(delivery);
        }
        true
    }

    /// Accepts the message into a place that the caller took. It is delivered by the next `pump`.
    pub(crate) fn push(&self, queued: Queued) {
        self.accepted.fetch_add(1, Ordering::AcqRel);
        let full = self.queue.push(queued);
        debug_assert!(full.is_ok(), "there are as many places as the queue is long");
    }

    /// Delivers what there is to deliver, unless somebody is at it already: he is then told to go on.
    pub(crate) fn pump(&self) {
        if let Some(mut delivery) = self.enter() {
            self.prepare(&mut delivery);
            self.work(&mut delivery);
            self.leave(delivery);
        }
    }

    /// Gives back places of the queue, and wakes who waits for one.
    pub(crate) fn give_back(&self, places: usize) {
        self.places.give_back(places as u64);
        self.wake_for_room(places);
    }

    /// Wakes who waits for one of `places` places that came free.
    pub(crate) fn wake_for_room(&self, places: usize) {
        self.room.wake(places);
        self.sinks.wake_all();
    }

    /// Whether somebody waits for what may be in the queue to be delivered: for a place, or for the end.
    pub(crate) fn is_waited_for(&self) -> bool {
        self.room.has_waiters() || self.sinks.has_waiters() || self.is_closed()
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

    /// Signals the tx task.
    pub(crate) fn notify(&self) {
        // An error means that the tx task is gone; whoever needs it learns that from `has_ended`.
        let _ = self.notifier.notify();
    }

    /// Accepts nothing any more; what was accepted goes on being delivered. Where that is done already the publisher
    /// ends here and now: its runtime may be about to go.
    pub(crate) fn close(&self) {
        self.places.close();
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
        self.work(&mut delivery);
        let done = self.is_done(&delivery);
        if done {
            delivery.finish(true);
            self.ended.swap(ENDED, Ordering::AcqRel);
        }
        self.leave(delivery);
        if done {
            self.bury();
        }
        done
    }

    /// The tx task is gone without an orderly end: everything that waits is released with an error.
    pub(crate) fn die(&self) {
        self.places.close();
        if self.ended.compare_exchange(RUNNING, DIED, Ordering::AcqRel, Ordering::Acquire).is_ok() {
            // If somebody is inside he sees it when he leaves.
            self.pump();
            self.bury();
        }
    }

    pub(crate) fn flush_target(&self) -> u64 {
        self.accepted.load(Ordering::Acquire)
    }

    /// Whether everything accepted up to `target` is on its links: `Some(false)` if it never will be.
    pub(crate) fn flushed(&self, target: u64) -> Option<bool> {
        // Signed, because delivery may be ahead of the count by those being accepted right now.
        if self.delivered.load(Ordering::Acquire).wrapping_sub(target) as i64 >= 0 {
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
            queued: self.queue.len(),
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

    #[inline]
    fn enter(&self) -> Option<Inside<'_, Delivery>> {
        let inside = self.delivery.enter();
        if inside.is_none() && self.delivery.is_poisoned() && !self.has_ended() {
            // Somebody panicked inside: nothing can be delivered any more, and nobody is to wait for it.
            self.die();
        }
        inside
    }

    /// What is done first at every entry: new subscribers, if there may be some, and what the tasks have said.
    #[inline]
    fn prepare(&self, delivery: &mut Inside<'_, Delivery>) {
        if delivery.pace.is_due() {
            self.read_clock(delivery);
        }
        delivery.retire();
        if self.controls.load(Ordering::Acquire) != 0 {
            self.obey(delivery);
        }
    }

    fn read_clock(&self, delivery: &mut Delivery) {
        let now = monotonic_ns();
        if now.saturating_sub(delivery.last_run) > QUIET_NS
            && now.saturating_sub(delivery.last_accept) > ACCEPT_EVERY_NS
            // Somebody connects faster than he is accepted: then the tx task is at it, and senders would do nothing else.
            && !self.acceptor.has_more()
        {
            self.acceptor.accept_pending(self);
            // Afterwards, so that most of the time is left for sending however long it takes.
            delivery.last_accept = monotonic_ns();
        }
        delivery.last_run = now;
        delivery.timed = true;
        if delivery.pace.read(now) {
            self.rush.store(true, Ordering::Release);
            self.notify();
        }
    }

    /// Notes the time of what was sent so far, for a subscriber that is just about to connect.
    pub(crate) fn note_time(&self) {
        if let Some(mut delivery) = self.enter() {
            delivery.log(monotonic_ns());
            self.leave(delivery);
        }
    }

    /// Notes the time of messages that came too fast for it to be noted with each, and says when to do so again.
    pub(crate) fn end_rush(&self) -> Option<u64> {
        if !self.rush.load(Ordering::Acquire) {
            return None;
        }
        let Some(mut delivery) = self.enter() else { return Some(RUSH_NS) };
        let goes_on = delivery.is_untimed();
        if goes_on {
            delivery.log(monotonic_ns());
        } else {
            delivery.pace.rest();
            self.rush.store(false, Ordering::Release);
        }
        self.leave(delivery);
        goes_on.then_some(RUSH_NS)
    }

    #[cold]
    fn obey(&self, delivery: &mut Delivery) {
        let controls = std::mem::take(&mut *self.control.lock());
        self.controls.fetch_sub(controls.len(), Ordering::AcqRel);
        for control in controls {
            match control {
                Control::Add(seed) if !delivery.finished => delivery.add(*seed),
                Control::Add(_) => {}
                Control::Leave(id) => delivery.leave(id),
                Control::Remove(id) => delivery.remove(id),
                Control::Part(id) => delivery.part(id),
            }
        }
    }

    /// Delivers from the head and the queue until they are empty, stuck, or enough for one run.
    fn work(&self, delivery: &mut Delivery) {
        let pool = self.pool.core();
        if self.has_died() && !delivery.finished {
            delivery.finish(false);
        }
        if delivery.finished {
            // Only after a death: a clean end waits until it is empty. The pool may be shared, and go on.
            while let Some(queued) = self.queue.pop() {
                if let Queued::Slot(slot) = queued {
                    slot.give_back();
                }
            }
            drop(self.fed.lock().take());
            return;
        }
        if pool.budget.gate.has_waiters() {
            delivery.reclaim();
        }
        let mut done = 0;
        let mut popped = 0;
        loop {
            if delivery.is_stuck() {
                if !delivery.retry_head() {
                    let begun = delivery.arm_stuck(monotonic_ns());
                    if !delivery.retry_head() {
                        if begun && self.config.evict_after.is_some() {
                            self.notify();
                        }
                        if delivery.is_crowded()
                            && self.retry_at.swap(monotonic_ns() + CROWDED_RETRY_NS, Ordering::AcqRel) == 0
                        {
                            self.notify();
                        }
                        break;
                    }
                }
                done += 1;
            }
            if popped >= RUN {
                self.notify();
                break;
            }
            let Some(slot) = self.next_queued(delivery, &mut popped) else { break };
            if self.controls.load(Ordering::Acquire) != 0 {
                // Somebody may have come between this run's beginning and the sending of this message.
                self.obey(delivery);
            }
            if delivery.deliver(slot) {
                done += 1;
            }
        }
        if popped > 0 {
            // Taken after the pops: later than any of these messages was accepted.
            delivery.log(monotonic_ns());
            self.give_back(popped);
        }
        if done > 0 {
            // Before, so that whoever has flushed finds all of it in the statistics.
            self.published.store(delivery.next_seq(), Ordering::Relaxed);
            self.delivered.fetch_add(done, Ordering::AcqRel);
            self.flushed.wake_all();
            if popped == 0 {
                // The head has gone, and no place has come free: they may all be reserved, and a sender needs none now.
                self.room.wake(1);
            }
        }
    }

    /// Rings who has to be woken and opens the turnstile; if somebody knocked meanwhile, his work is done too, by the
    /// tx task where there is more of it.
    #[inline]
    fn leave<'s>(&'s self, mut delivery: Inside<'s, Delivery>) {
        let mut rounds = 0;
        loop {
            self.conclude(&mut delivery);
            if !delivery.leave() {
                return;
            }
            rounds += 1;
            if rounds > 2 && !self.has_ended() {
                return self.notify();
            }
            let Some(next) = self.enter() else { return };
            delivery = next;
            self.prepare(&mut delivery);
            self.work(&mut delivery);
        }
    }

    #[inline]
    fn conclude(&self, delivery: &mut Delivery) {
        delivery.ring();
        self.note(delivery);
    }

    /// Notes for others what the run has come to.
    #[inline]
    fn note(&self, delivery: &mut Delivery) {
        if std::mem::take(&mut delivery.timed) {
            delivery.log(delivery.last_run);
        }
        self.published.store(delivery.next_seq(), Ordering::Relaxed);
        if self.places.is_closed() && !delivery.finished && self.is_done(delivery) {
            // The tx task has been waiting for this to end the publisher.
            self.notify();
        }
        if std::mem::take(&mut delivery.links_changed) {
            self.subscribers.swap(delivery.subscribers(), Ordering::AcqRel);
            self.subscribers_changed.wake_all();
        }
    }

    /// Whether a closed publisher has delivered everything that it ever accepted.
    fn is_done(&self, delivery: &Delivery) -> bool {
        self.places.is_closed() && self.places.all_back() && self.queue.is_empty() && !delivery.is_behind()
    }

    fn bury(&self) {
        self.acceptor.close();
        // Ended was set before: nobody adds to them any more.
        std::mem::take(&mut *self.new_links.lock()).into_iter().for_each(NewLink::refuse);
        LOCAL.lock().remove(&self.config.id);
        self.wake_everybody();
    }

    fn wake_everybody(&self) {
        self.room.wake_all();
        self.sinks.wake_all();
        self.flushed.wake_all();
        self.subscribers_changed.wake_all();
        self.pool.core().budget.gate.wake_all();
    }
}

impl Collect for Shared {
    fn collect(&self) {
        for _ in 0..COLLECT_SPINS {
            if let Some(mut delivery) = self.enter() {
                // Who looks for memory and never finds any sends nothing either: subscribers must not keep what is gone.
                delivery.retire();
                delivery.reclaim();
                self.leave(delivery);
                return;
            }
            // Whoever is inside collects for a registered waiter when he leaves; a caller that does not wait has to
            // see for itself.
            std::hint::spin_loop();
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
