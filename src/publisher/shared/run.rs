//! One run of delivery: what whoever passes the turnstile does inside, from the look for new subscribers to the ring for those who
//! sleep.

use std::panic::{AssertUnwindSafe, catch_unwind};

use super::{Control, Queued, Shared};
use crate::publisher::delivery::Delivery;
use crate::sync::atomic::Ordering;
use crate::sys::clock::monotonic_ns;
use crate::turnstile::Inside;

/// Messages that one run of delivery takes from the queue before it lets others in.
const RUN: usize = 64;
/// A publisher that was quiet for so long, and has not done so lately, looks for new subscribers before it sends: a
/// message sent right after somebody connected then reaches him instead of being counted as missed. In a stream of
/// messages that is left to the tx task.
const QUIET_NS: u64 = 100_000;
const ACCEPT_EVERY_NS: u64 = 5_000_000;
/// When to try again what met with too many descriptors under way in sockets.
const CROWDED_RETRY_NS: u64 = 5_000_000;
/// How often the tx task looks whether a rush of messages is over.
const RUSH_NS: u64 = 1_000_000;

impl Shared {
    #[inline]
    pub(in crate::publisher) fn enter(&self) -> Option<Inside<'_, Delivery>> {
        let inside = self.delivery.enter();
        if inside.is_none() && self.delivery.is_poisoned() {
            self.end_poisoned();
        }
        inside
    }

    /// After a panic inside: nothing can be delivered any more, and nothing is to wait for it. Subscribers are told, and all slots go back
    /// that can still be found.
    #[cold]
    fn end_poisoned(&self) {
        self.die();
        // What is left may be anything: a panic more is the last one.
        let finish = AssertUnwindSafe(|| self.delivery.salvage(|delivery| self.finish_dead(delivery)));
        if catch_unwind(finish).is_err() {
            tracing::error!(
                "a panic in the middle of a delivery has left memory behind that is in use for ever"
            );
        }
    }

    /// What is done first at every entry: new subscribers, if there may be some, and what the tasks have said.
    #[inline]
    pub(super) fn prepare(&self, delivery: &mut Inside<'_, Delivery>) {
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
        // Where the tx task has not seen the last rush end it looks at this one, too.
        if delivery.pace.read(now) && !self.rush.swap(true, Ordering::AcqRel) {
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

    /// The end without order: all that was not delivered goes back to the pool.
    fn finish_dead(&self, delivery: &mut Delivery) {
        if !delivery.finished {
            delivery.finish(false);
        }
        self.give_back_queued(delivery);
    }

    /// Gives back what joined and is not delivered: only after a death, a clean end waits until there is nothing. The pool may be shared,
    /// and go on.
    fn give_back_queued(&self, delivery: &mut Delivery) {
        while let Some(queued) = self.pop(delivery) {
            if let Queued::Slot(slot) = queued {
                slot.give_back();
            }
        }
        drop(self.fed.lock().take());
    }

    /// Delivers from the head and the queue until they are empty, stuck, or enough for one run.
    pub(super) fn work(&self, delivery: &mut Delivery) {
        let pool = self.pool.core();
        if self.has_died() && !delivery.finished {
            self.finish(delivery, false);
        }
        if delivery.finished {
            self.give_back_queued(delivery);
            return;
        }
        if pool.budget.gate.has_waiters() {
            self.reclaim(delivery);
        }
        let mut done = 0;
        let mut heads_done = 0;
        let mut popped = 0;
        loop {
            if delivery.is_stuck() {
                let goes_on = delivery.retry_head() || (delivery.look_for_room() && delivery.retry_head());
                if !goes_on {
                    if delivery.arm_stuck(monotonic_ns()) {
                        self.watch_stalls();
                    }
                    if !delivery.retry_head() {
                        if delivery.is_crowded()
                            && self.retry_at.swap(monotonic_ns() + CROWDED_RETRY_NS, Ordering::AcqRel) == 0
                        {
                            self.notify();
                        }
                        break;
                    }
                }
                if std::mem::take(&mut delivery.is_head_direct) {
                    heads_done += 1;
                } else {
                    done += 1;
                }
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
            delivery.front.give_back(popped);
            self.wake_for_room();
        }
        if done + heads_done > 0 {
            // Before, so that whoever has flushed finds all of it in the statistics.
            self.published.store(delivery.next_seq(), Ordering::Relaxed);
            if heads_done > 0 {
                self.heads_delivered.fetch_add(heads_done, Ordering::AcqRel);
            }
            self.delivered.fetch_add(done, Ordering::AcqRel);
            self.flushed.wake_all();
            if popped == 0 {
                // The head has gone, and no place has come free: they may all be reserved, and a sender needs none now.
                self.room.wake();
            }
        }
    }

    /// Returns to the pool whatever subscribers have released.
    pub(super) fn reclaim(&self, delivery: &mut Delivery) {
        if delivery.reclaim() {
            self.watch_stalls();
        }
    }

    /// Has the tx task look how long senders wait for a subscriber, unless it does already.
    fn watch_stalls(&self) {
        // Plain: changed inside the turnstile only.
        let watching = self.watching.load(Ordering::Relaxed);
        if !watching {
            self.watching.store(true, Ordering::Release);
        }
        if !watching || self.config.evict_after.is_some() {
            self.notify();
        }
    }

    /// The first in the line, whose bytes are counted off.
    #[inline]
    pub(super) fn pop(&self, delivery: &mut Delivery) -> Option<Queued> {
        let queued = delivery.front.pop();
        if let Some(Queued::Slot(slot)) = &queued {
            self.backlog.remove(slot);
        }
        queued
    }

    /// Rings who has to be woken and opens the turnstile; if somebody knocked meanwhile, his work is done too.
    #[inline]
    pub(in crate::publisher) fn leave(&self, delivery: Inside<'_, Delivery>) {
        if self.conclude(delivery) {
            self.answer();
        }
    }

    /// The end of a run: `true` if somebody knocked meanwhile.
    #[inline]
    fn conclude(&self, mut delivery: Inside<'_, Delivery>) -> bool {
        delivery.ring();
        self.note(&mut delivery);
        delivery.leave()
    }

    /// Does the work of those that knocked, or has the tx task do it where there is more and more of it.
    ///
    /// It may have been a sender that found neither the turnstile open nor a place in line, and waits: where all places are reserved
    /// none ever comes free, and what it can do is to enter. (More than one: the one that is woken wakes the next.)
    #[cold]
    fn answer(&self) {
        let mut rounds = 0;
        while rounds < 2 || self.has_ended() {
            rounds += 1;
            // Another is inside, and has heard of it now.
            let Some(mut delivery) = self.enter() else { return };
            self.prepare(&mut delivery);
            self.work(&mut delivery);
            if !self.conclude(delivery) {
                self.room.wake();
                return;
            }
        }
        self.notify();
        self.room.wake();
    }

    /// Notes for others what the run has come to.
    #[inline]
    pub(super) fn note(&self, delivery: &mut Delivery) {
        self.published.store(delivery.next_seq(), Ordering::Relaxed);
        if delivery.timed || delivery.links_changed || self.line.is_closed() {
            self.note_rest(delivery);
        }
    }

    /// What most runs have nothing of.
    #[inline(never)]
    fn note_rest(&self, delivery: &mut Delivery) {
        if std::mem::take(&mut delivery.timed) {
            delivery.log(delivery.last_run);
        }
        if self.line.is_closed() && !delivery.finished && self.is_done(delivery) {
            // The tx task has been waiting for this to end the publisher.
            self.notify();
        }
        if std::mem::take(&mut delivery.links_changed) {
            self.backlog.set_part(delivery.part);
            self.subscribers.swap(delivery.subscribers(), Ordering::AcqRel);
            self.subscribers_changed.wake_all();
            delivery.notes.drain(..).for_each(|note| self.log(note));
        }
    }

    /// Ends all links; those that are in line first get theirs.
    pub(super) fn finish(&self, delivery: &mut Delivery, clean: bool) {
        self.acceptor.accept_last(self);
        self.obey(delivery);
        delivery.finish(clean);
    }

    /// Delivers until nothing is left, or the rest has to wait.
    pub(super) fn work_off(&self, delivery: &mut Delivery) {
        loop {
            let before = delivery.next_seq();
            self.work(delivery);
            if delivery.next_seq() == before || delivery.is_behind() || delivery.front.is_empty() {
                return;
            }
        }
    }

    /// Whether a closed publisher has delivered everything that it ever accepted.
    pub(super) fn is_done(&self, delivery: &Delivery) -> bool {
        self.line.is_closed() && self.line.all_back() && !delivery.is_behind()
    }
}
