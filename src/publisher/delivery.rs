//! What only one thread at a time touches: the links, the message numbers, the message that is stuck.
//!
//! [`Shared`](super::shared::Shared) decides who that is and feeds it; nothing here waits.

use std::collections::VecDeque;
use std::sync::Arc;

use super::journal::Note;
use super::pace::Pace;
use super::patience::{LOOKS, LOOKS_IN_VAIN, PAUSES, Patience};
use super::shared::Queued;
use super::stall::{Stall, Watch};
use crate::line::Front;
use crate::link::{InFlight, LinkError, LinkSeed, LinkTx, Message, Offer};
use crate::pool::core::{PoolCore, Slot};
use crate::proto::bell;
use crate::proto::class::GRAIN;
use crate::proto::joinlog::JoinLog;
use crate::proto::share::Shares;
use crate::sys::clock::monotonic_ns;

pub(crate) struct Delivery {
    publisher: u128,
    /// Of the tx queue.
    pub(super) front: Front<Queued>,
    links: Vec<LinkTx>,
    in_flight: InFlight,
    next_seq: u64,
    /// Accepted, on some links already, and waiting for room on the others.
    head: Option<Message>,
    /// The head has not been in line.
    pub(crate) is_head_direct: bool,
    /// Whether to look for room for it.
    patience: Patience,
    /// The last messages, for subscribers that join late; newest last.
    history: VecDeque<Message>,
    history_len: usize,
    /// Which message numbers were given out when, for exact counts at a join.
    log: JoinLog,
    /// The lowest number not yet in the log.
    logged: u64,
    /// When to read the clock.
    pub(super) pace: Pace,
    /// When the last run was that read it, in clock nanoseconds.
    pub(crate) last_run: u64,
    /// The present run has read it.
    pub(crate) timed: bool,
    /// When a run last looked for new subscribers.
    pub(crate) last_accept: u64,
    /// How many dropped segments of the pool the links know of.
    retired: u64,
    /// A link's share of the pool in units of `GRAIN`, if it was set.
    link_share: Option<u64>,
    /// The publisher's part of its pool, in the same units.
    pub(crate) part: u64,
    /// Since when a loan has been waiting for memory that subscribers hold, in clock nanoseconds.
    starving_since: Option<u64>,
    /// When a warning was given of that.
    starving_warned_at: Option<u64>,
    /// Messages in the heap that wait for slots, in order; they come before the queue.
    pub(crate) waiting: VecDeque<Box<[u8]>>,
    /// What the log is to be told. Links have come or gone, or failed to, where there is something.
    pub(crate) notes: Vec<Note>,
    /// Links have come or gone since this was last cleared.
    pub(crate) links_changed: bool,
    /// No message is taken any more.
    pub(crate) finished: bool,
}

impl Delivery {
    pub(crate) fn new(
        publisher: u128,
        history_len: usize,
        link_share: Option<u64>,
        pool: Arc<PoolCore>,
        front: Front<Queued>,
    ) -> Self {
        let mut delivery = Self {
            publisher,
            front,
            links: Vec::new(),
            in_flight: InFlight::new(pool),
            next_seq: 0,
            head: None,
            is_head_direct: false,
            patience: Patience::default(),
            history: VecDeque::with_capacity(history_len.min(1_024)),
            history_len,
            log: JoinLog::new(0),
            logged: 0,
            pace: Pace::default(),
            last_run: 0,
            timed: false,
            last_accept: 0,
            retired: 0,
            link_share,
            part: 0,
            starving_since: None,
            starving_warned_at: None,
            waiting: VecDeque::new(),
            notes: Vec::new(),
            links_changed: false,
            finished: false,
        };
        delivery.divide(0);
        delivery
    }

    /// Divides the publisher's part of the pool among so many links.
    fn divide(&mut self, links: usize) {
        let pool = self.in_flight.pool();
        let part = pool.part();
        self.part = part;
        self.in_flight.shares = match self.link_share {
            Some(each) => Shares::fixed(part, each),
            None => Shares::divide(part, links),
        };
        self.links_changed = true;
    }

    #[inline]
    pub(crate) fn next_seq(&self) -> u64 {
        self.next_seq
    }

    /// Whether a message waits that comes before the queue.
    #[inline]
    pub(crate) fn is_behind(&self) -> bool {
        self.head.is_some() || !self.waiting.is_empty()
    }

    #[inline]
    pub(crate) fn is_stuck(&self) -> bool {
        self.head.is_some()
    }

    /// Whether the head may be stuck on something that no subscriber rings for.
    pub(crate) fn is_crowded(&self) -> bool {
        let Some(head) = &self.head else { return false };
        self.links.iter().any(|link| link.crowded && link.is_behind(head.seq))
    }

    /// Whether a subscriber has something that it can release.
    pub(crate) fn has_tickets_out(&self) -> bool {
        self.links.iter().any(LinkTx::has_tickets_out)
    }

    pub(crate) fn subscribers(&self) -> usize {
        self.links.iter().filter(|link| !link.is_leaving()).count()
    }

    /// Numbers the message and puts it on every link with room. Where one keeps it waiting it becomes the head:
    /// `false`.
    #[inline]
    pub(crate) fn deliver(&mut self, slot: Arc<Slot>) -> bool {
        debug_assert!(self.head.is_none());
        if self.links.is_empty() && self.history_len == 0 {
            self.next_seq += 1;
            self.in_flight.pool().give_back(slot);
            return true;
        }
        self.deliver_to_somebody(slot)
    }

    fn deliver_to_somebody(&mut self, slot: Arc<Slot>) -> bool {
        let message = Message { flight: self.in_flight.begin(slot), seq: self.next_seq };
        self.next_seq += 1;
        kill_point!("send: numbered");
        self.offer(message)
    }

    /// Tries the links again that kept the head waiting; `false` if one still does.
    pub(crate) fn retry_head(&mut self) -> bool {
        let Some(message) = self.head.take() else { return true };
        let gone = self.offer(message);
        if gone {
            for link in &mut self.links {
                link.blocked_since = None;
                link.tell_at_share(false);
            }
        }
        gone
    }

    #[inline]
    fn offer(&mut self, message: Message) -> bool {
        if self.in_flight.is_scarce() {
            self.make_room(message);
        }
        let mut stuck = false;
        let mut broken = false;
        for link in &mut self.links {
            match link.offer(message, &mut self.in_flight) {
                Offer::Done => {}
                Offer::Blocked => stuck = true,
                Offer::Broken => broken = true,
            }
            kill_point!("offer: one link");
        }
        if broken {
            self.remove_broken();
        }
        if stuck {
            self.head = Some(message);
            return false;
        }
        if self.history_len == 0 {
            self.in_flight.release(message.flight);
        } else {
            self.remember(message);
        }
        true
    }

    /// Makes room for the message where a link's share has none: by what subscribers released, then by what the history has.
    #[cold]
    fn make_room(&mut self, message: Message) {
        if self.links.iter().all(|link| link.fits(message.flight, &self.in_flight)) {
            return;
        }
        for link in &mut self.links {
            link.reclaim(&mut self.in_flight);
        }
        self.remove_broken();
        while self.in_flight.is_exceeded() && self.give_up_history() {}
    }

    /// Whether messages were delivered whose time is not noted yet.
    pub(crate) fn is_untimed(&self) -> bool {
        self.logged < self.next_seq
    }

    /// Notes the time of what was delivered since the last note. It must have been read after all of these were accepted, or
    /// (of the one that a sender is just delivering himself) after its sending had begun.
    #[inline]
    pub(crate) fn log(&mut self, now: u64) {
        if self.logged < self.next_seq {
            self.log.record(now, self.next_seq);
            self.logged = self.next_seq;
        }
    }

    /// Wakes the subscribers that sleep, after a full fence. Told by every run, whatever it delivered.
    ///
    /// What those released that have no room any more is collected here, where the messages are gone already and nobody waits.
    #[inline]
    pub(crate) fn ring(&mut self) {
        if !self.links.is_empty() {
            self.ring_links();
        }
    }

    fn ring_links(&mut self) {
        bell::fence_before_looking();
        let mut broken = false;
        for link in &mut self.links {
            link.ring_if_armed();
            if !link.has_room() {
                link.reclaim(&mut self.in_flight);
                broken |= link.fault.is_some();
            }
        }
        if broken {
            self.remove_broken();
        }
    }

    /// Looks for a few microseconds at most whether the subscribers that keep the head waiting make room, where that has been paying
    /// lately: `true` if they have.
    #[cold]
    pub(crate) fn look_for_room(&mut self) -> bool {
        let Some(head) = &self.head else { return true };
        if !self.patience.is_due() {
            return false;
        }
        let mut some = false;
        for look in 1..=LOOKS {
            (0..PAUSES).for_each(|_| crate::sync::spin_loop());
            let mut much = true;
            for link in self.links.iter_mut().filter(|link| link.is_behind(head.seq)) {
                link.reclaim(&mut self.in_flight);
                some |= link.has_room() && link.fits(head.flight, &self.in_flight);
                much &= link.has_much_room();
            }
            if much || (look >= LOOKS_IN_VAIN && !some) {
                break;
            }
        }
        self.patience.learn(some);
        self.remove_broken();
        some
    }

    /// Asks the subscribers that keep the head waiting to ring when they release something. The caller must try once
    /// more afterwards. `true` if one of them has only just begun to.
    pub(crate) fn arm_stuck(&mut self, now: u64) -> bool {
        let Some(head) = &self.head else { return false };
        let in_flight = &self.in_flight;
        // What one has no share for any other may release.
        let short = self.links.iter().any(|link| link.is_short(*head, in_flight));
        // One that has nothing keeps no sender waiting: it is kept from the message by the one that has most.
        let innocent = |link: &LinkTx| link.is_short(*head, in_flight) && link.held_bytes() == 0;
        let most = self.links.iter().any(innocent).then(|| self.fullest()).flatten();
        let mut begun = false;
        for (index, link) in self.links.iter_mut().enumerate() {
            let behind = link.is_behind(head.seq);
            if (behind && !innocent(link)) || most == Some(index) {
                begun |= link.blocked_since.is_none();
                link.blocked_since.get_or_insert(now);
            } else {
                link.blocked_since = None;
            }
            link.tell_at_share(link.is_short(*head, in_flight) && link.held_bytes() > 0);
            if behind || short {
                link.arm_credit();
                kill_point!("head: credit armed");
            }
        }
        begun
    }

    /// The link whose subscriber has most of the pool.
    fn fullest(&self) -> Option<usize> {
        let links = self.links.iter().map(LinkTx::held_bytes).enumerate();
        links.filter(|(_, held)| *held > 0).max_by_key(|(_, held)| *held).map(|(index, _)| index)
    }

    /// Returns to the pool whatever subscribers have released. For a pool that has waiters, subscribers are asked to
    /// ring at the next release as well, and if nothing came free, messages are given up. `true` if a wait for what
    /// subscribers have has only just begun.
    #[must_use]
    pub(crate) fn reclaim(&mut self) -> bool {
        let waited_for = self.in_flight.pool().budget.gate.has_waiters();
        let mut freed = 0;
        for link in &mut self.links {
            if waited_for {
                link.arm_credit();
            }
            freed += link.reclaim(&mut self.in_flight);
        }
        let in_vain = waited_for && freed == 0 && !self.give_up_oldest();
        self.remove_broken();
        if !in_vain || !self.in_flight.is_half() {
            self.starving_since = None;
            return false;
        }
        let begun = self.starving_since.is_none();
        self.starving_since.get_or_insert_with(monotonic_ns);
        begun
    }

    /// Gives up messages until a slot comes free, which wakes who waits for it to look, and perhaps to come here again.
    ///
    /// First the oldest of the history that nobody else has; then those not received yet by subscribers that agreed to
    /// lose such, oldest first. What others have as well frees nothing: that must not be the end of it, because
    /// nobody would come here again. `false` if there is none left to give up.
    #[cold]
    fn give_up_oldest(&mut self) -> bool {
        loop {
            if self.give_up_history() {
                return true;
            }
            let in_flight = &mut self.in_flight;
            let mut taken =
                self.links.iter_mut().filter_map(|link| link.take_back_oldest(in_flight)).peekable();
            if taken.peek().is_none() {
                return false;
            }
            if taken.fold(false, |freed, came_free| freed | came_free) {
                return true;
            }
        }
    }

    /// Gives up the oldest message of the history that no subscriber has; `false` if there is none.
    fn give_up_history(&mut self) -> bool {
        let unshared = self.history.iter().position(|message| self.in_flight.is_unshared(message.flight));
        let Some(message) = unshared.and_then(|at| self.history.remove(at)) else { return false };
        self.in_flight.release(message.flight);
        true
    }

    /// Tells subscribers of segments that the pool has dropped.
    #[inline]
    pub(crate) fn retire(&mut self) {
        let retired = self.in_flight.pool().budget.retired();
        if retired != self.retired {
            self.retired = retired;
            if self.part != self.in_flight.pool().part() {
                self.divide(self.links.len());
            }
            for link in &mut self.links {
                link.retire_segments();
            }
            self.remove_broken();
        }
    }

    /// Welcomes a subscriber.
    pub(crate) fn add(&mut self, seed: LinkSeed) {
        let expect = self.log.seq_at(seed.connected_at).min(self.next_seq);
        // The head was accepted and is still on its way: this subscriber gets it too, unless it is from before it came and no part of
        // the history either.
        let next_seq = match &self.head {
            Some(head) if head.seq >= expect || self.history_len > 0 => head.seq,
            _ => self.next_seq,
        };
        self.divide(self.links.len() + 1);
        while self.in_flight.is_exceeded() && self.give_up_history() {}
        match seed.welcome(self.publisher, expect, next_seq, &self.history, &mut self.in_flight) {
            Ok(link) => self.links.push(link),
            Err(error) => {
                self.divide(self.links.len());
                self.note(Note::NotWelcomed(error));
            }
        }
    }

    /// A subscriber has dropped its handle but may still hold samples.
    pub(crate) fn leave(&mut self, id: u64) {
        if let Some(link) = self.links.iter_mut().find(|link| link.id == id) {
            link.leave(&mut self.in_flight);
            self.links_changed = true;
            self.remove_broken();
        }
    }

    /// A subscriber is gone: everything it held comes back.
    pub(crate) fn remove(&mut self, id: u64) {
        match self.take_link(id) {
            Some(link) => link.end(&mut self.in_flight),
            // It was parted from before, and has let go now.
            None => self.in_flight.pool().budget.sweep_abandoned(),
        }
    }

    /// A subscriber cannot be served any more, but lives on for all that is known.
    pub(crate) fn part(&mut self, id: u64) {
        if let Some(link) = self.take_link(id) {
            link.part(&mut self.in_flight);
        }
    }

    /// Ends the links that have kept senders waiting since before `limit`: a head, by themselves, or a loan, by having most of what it
    /// waits for.
    pub(crate) fn evict(&mut self, limit: u64) {
        let stuck = |link: &LinkTx| link.blocked_since.is_some_and(|since| since <= limit);
        while let Some(index) = self.links.iter().position(stuck) {
            self.evict_link(index);
        }
        if self.starving_since().is_some_and(|since| since <= limit) {
            // Set anew by the next look for memory that is in vain.
            self.starving_since = None;
            if self.in_flight.pool().budget.gate.has_waiters()
                && let Some(index) = self.fullest()
            {
                self.evict_link(index);
            }
        }
    }

    fn evict_link(&mut self, index: usize) {
        let link = self.take_link_at(index);
        self.note(Note::Evicted { link: link.id, process: link.process() });
        link.evict(&mut self.in_flight);
    }

    /// The earliest time at which senders began to wait for a subscriber.
    pub(crate) fn stuck_since(&self) -> Option<u64> {
        self.links.iter().filter_map(|link| link.blocked_since).chain(self.starving_since()).min()
    }

    /// Since when a loan has been waiting for memory that a subscriber has, and not for one that keeps the head waiting.
    fn starving_since(&self) -> Option<u64> {
        self.starving_since.filter(|_| self.links.iter().all(|link| link.blocked_since.is_none()))
    }

    /// Adds to `stalls` the subscribers for which senders have been waiting for long, and says when to look again. `None`: when one of
    /// them begins to keep senders waiting.
    pub(crate) fn stalls(&mut self, now: u64, stalls: &mut Vec<Stall>) -> Option<u64> {
        let mut watch = Watch::new(now);
        let share = self.in_flight.shares.each().saturating_mul(GRAIN as u64);
        let mut stall = |link: &LinkTx, waited_ns, for_memory| {
            stalls.push(Stall { subscriber: link.holding(), waited_ns, share, for_memory });
        };
        for link in &mut self.links {
            if let Some(waited) = watch.is_due(link.blocked_since, &mut link.warned_at) {
                stall(link, waited, false);
            }
        }
        if let Some(fullest) = self.fullest()
            && let Some(waited) = watch.is_due(self.starving_since(), &mut self.starving_warned_at)
        {
            stall(&self.links[fullest], waited, true);
        }
        watch.next()
    }

    /// Ends everything. After a `clean` end subscribers know that nothing is missing.
    pub(crate) fn finish(&mut self, clean: bool) {
        self.finished = true;
        self.links_changed = true;
        self.waiting.clear();
        for mut link in std::mem::take(&mut self.links) {
            if clean {
                link.bye(self.next_seq);
            }
            link.part(&mut self.in_flight);
        }
        for message in self.head.take().into_iter().chain(self.history.drain(..)) {
            self.in_flight.release(message.flight);
        }
    }

    fn remember(&mut self, message: Message) {
        if self.history.len() == self.history_len
            && let Some(oldest) = self.history.pop_front()
        {
            self.in_flight.release(oldest.flight);
        }
        self.history.push_back(message);
    }

    /// Ends the links that broke the protocol or can no longer be talked to.
    fn remove_broken(&mut self) {
        while let Some(link) = self.links.iter_mut().find(|link| link.fault.is_some()) {
            let id = link.id;
            let process = link.process();
            let Some(fault) = link.fault.take() else { return };
            match fault {
                LinkError::Fault(_) => self.remove(id),
                _ => self.part(id),
            }
            self.note(Note::Disconnected { link: id, process, fault });
        }
    }

    fn note(&mut self, note: Note) {
        self.notes.push(note);
        // It is looked at where that is.
        self.links_changed = true;
    }

    fn take_link(&mut self, id: u64) -> Option<LinkTx> {
        let index = self.links.iter().position(|link| link.id == id)?;
        Some(self.take_link_at(index))
    }

    /// Takes a link out, whose share is divided among the others.
    fn take_link_at(&mut self, index: usize) -> LinkTx {
        let link = self.links.swap_remove(index);
        self.divide(self.links.len());
        link
    }
}
