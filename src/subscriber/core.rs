//! What a subscriber does whichever way it waits: connecting to publishers, taking turns among them, ending links.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use super::busy::Busy;
use super::hoard::{Hoard, Hoarded};
use super::retry::{Crowded, Refusal};
use super::{RecvError, SubscriberStats};
use crate::OnFull;
use crate::buffer::ShmSample;
use crate::link::{AllHeld, Ended, LinkError, LinkRx, Next};
use crate::proto::wire::RefusedReason;
use crate::publisher::shared::Shared;
use crate::sys::clock::monotonic_ns;
use crate::sys::epoll_set::EpollSet;
use crate::sys::fork::Origin;
use crate::sys::socket::{ConnectFailed, Connection};
use crate::text::{Hex, chain};
use crate::topic::{DiscoveryError, TopicWatch};

pub(super) type Item = Result<ShmSample, RecvError>;

/// A link and, in `W`, its registration with whatever waits for it.
#[derive(Debug)]
pub(super) struct Peer<W> {
    pub(super) link: LinkRx,
    pub(super) waits: W,
}

#[derive(Debug)]
pub(super) struct Core<W> {
    pub(super) watch: TopicWatch,
    pub(super) peers: Vec<Peer<W>>,
    /// Hears the bells of all links, for threads: made at the first wait of one.
    pub(super) bells: Option<Arc<EpollSet>>,
    /// The runtime that it is registered with.
    pub(super) runtime: Option<tokio::runtime::Id>,
    /// Whose turn it is.
    turn: usize,
    pub(super) busy: Busy,
    /// Counts returns to the runtime while looking.
    pub(super) rounds: u32,
    /// When `try_recv` last looked at sockets and the directory.
    pub(super) last_read: u64,
    pub(super) stats: SubscriberStats,
    id: u128,
    depth: u32,
    on_full: Option<OnFull>,
    end_with_last: bool,
    /// Whether it is told when a publisher closes.
    events: bool,
    /// What is final was told: nothing more comes, and every link was left.
    pub(super) over: bool,
    /// The wait for messages that cannot come, if it is one.
    hoard: Hoard,
    /// In a child it is the parent's, and receives nothing.
    origin: Origin,
    /// When the first look at the directory was over, in clock nanoseconds. A publisher that is met later owes what it has sent since.
    began: Option<u64>,
    /// Those in the directory that this subscriber has been connected to: of what they sent since, their links' ends have told.
    met: HashSet<u128>,
    /// There has been a publisher.
    had_publisher: bool,
    /// A look at the directory, or at its watch, failed half-way: to be done again, as nothing is going to wake us for it.
    pub(super) behind: bool,
    /// Publishers that would not have us, or that we would not have any more: not tried again.
    shunned: HashSet<u128>,
    /// Publishers that have as many connections in line as the system allows. Tried again until there is room.
    crowded: HashMap<u128, Crowded>,
    /// Publishers that lacked something for another subscriber, as was told. Tried again now and then.
    refused: HashMap<u128, Refusal>,
    /// Publishers that went while we waited for room in their line.
    missed: Vec<u128>,
    /// Why no further publisher is found. The end, once nothing more comes from those that were.
    blind: Option<DiscoveryError>,
}

impl<W: Default> Core<W> {
    pub(super) fn new(
        watch: TopicWatch,
        id: u128,
        depth: u32,
        on_full: Option<OnFull>,
        busy: Busy,
        end_with_last: bool,
        events: bool,
    ) -> Self {
        Self {
            watch,
            peers: Vec::new(),
            bells: None,
            runtime: None,
            turn: 0,
            busy,
            rounds: 0,
            last_read: 0,
            stats: SubscriberStats::default(),
            id,
            depth,
            on_full,
            end_with_last,
            events,
            over: false,
            hoard: Hoard::default(),
            origin: Origin::here(),
            began: None,
            met: HashSet::new(),
            had_publisher: false,
            behind: false,
            shunned: HashSet::new(),
            crowded: HashMap::new(),
            refused: HashMap::new(),
            missed: Vec::new(),
            blind: None,
        }
    }

    /// Connects to the publishers in the topic's directory that it is not connected to yet.
    ///
    /// # Errors
    /// It may be called again, and goes on then. (One that cannot be connected to for want of a descriptor must not be passed
    /// over: its messages would be missed without being counted.)
    pub(super) fn scan(&mut self) -> Result<(), DiscoveryError> {
        let scanned = self.try_scan();
        self.stats.publishers = self.peers.len();
        if scanned.is_ok() && self.began.is_none() {
            self.began = Some(monotonic_ns());
        }
        scanned
    }

    fn try_scan(&mut self) -> Result<(), DiscoveryError> {
        let present = self.watch.scan()?;
        self.shunned.retain(|id| present.contains(id));
        self.met.retain(|id| present.contains(id));
        let gone: Vec<_> = self.crowded.keys().copied().filter(|id| !present.contains(id)).collect();
        gone.into_iter().for_each(|id| self.miss(id));
        self.refused.retain(|id, _| present.contains(id));
        let mut next = None;
        for id in present {
            if self.shunned.contains(&id) || self.peers.iter().any(|peer| peer.link.publisher == id) {
                continue;
            }
            if let Some(refusal) = self.refused.get(&id) {
                let due = refusal.due_in(monotonic_ns());
                if due > 0 {
                    next = Some(next.map_or(due, |next: u64| next.min(due)));
                    continue;
                }
            }
            let local = Shared::local(id);
            if let Some(local) = &local {
                local.note_time();
            }
            let begun = match self.connect(id, local.as_deref()) {
                Ok(connection) => {
                    let since = self.crowded.get(&id).map(|crowded| crowded.since);
                    let began = self.began.filter(|_| !self.met.contains(&id));
                    self.begin(id, connection, local, since.into_iter().chain(began).min())
                }
                // Killed, or closing, or about to be found under its name once more.
                Err(ConnectFailed::Dead | ConnectFailed::Gone) => {
                    self.miss(id);
                    self.refused.remove(&id);
                    self.watch.leave()?;
                    continue;
                }
                Err(ConnectFailed::Busy) => {
                    self.wait_for_room(id)?;
                    continue;
                }
                Err(ConnectFailed::Os(error)) => Err(error.into()),
            };
            match begun {
                Ok(link) => {
                    self.had_publisher = true;
                    self.crowded.remove(&id);
                    self.met.insert(id);
                    self.peers.push(Peer { link, waits: W::default() });
                }
                // Its socket looks alive as long as a child of it has it open.
                Err(LinkError::Ended) => self.watch.remove(id)?,
                Err(LinkError::Io(error)) => match DiscoveryError::io("connecting to a publisher")(error) {
                    error if error.is_shortage() => return Err(error),
                    error => {
                        // It has ended, or turned us away, before we could greet: if it lives it has room again soon.
                        tracing::debug!(publisher = %Hex(id), error = %chain(&error), "cannot connect to a publisher yet");
                        self.put_off(id)?;
                    }
                },
                Err(error) => {
                    tracing::warn!(publisher = %Hex(id), error = %chain(&error), "cannot connect to a publisher");
                }
            }
        }
        next.map_or(Ok(()), |next| self.watch.look_again_in(next))
    }

    /// Has a publisher tried again later that lacked something. `true` if that is the first time since it had us, or ever.
    fn put_off(&mut self, id: u128) -> Result<bool, DiscoveryError> {
        let first = !self.refused.contains_key(&id);
        let pause = self.refused.entry(id).or_default().put_off(monotonic_ns());
        self.watch.look_again_in(pause)?;
        Ok(first)
    }

    fn connect(&self, id: u128, local: Option<&Shared>) -> Result<Connection, ConnectFailed> {
        match self.watch.connect(id) {
            Err(ConnectFailed::Busy) => {}
            other => return other,
        }
        // In our own process nobody else needs to run for the line to move.
        let Some(local) = local else { return Err(ConnectFailed::Busy) };
        local.accept_now();
        self.watch.connect(id)
    }

    /// Publisher `id` cannot take another connection at present: has it tried again.
    fn wait_for_room(&mut self, id: u128) -> Result<(), DiscoveryError> {
        let crowded = self.crowded.entry(id).or_insert_with(|| {
            tracing::warn!(
                topic = self.watch.topic(),
                publisher = %Hex(id),
                "a publisher has as many connections waiting as it may; this one is tried again until there is room \
                 (net.core.somaxconn)"
            );
            Crowded::new()
        });
        let pause = crowded.pause();
        self.watch.look_again_in(pause)
    }

    /// A publisher that is gone before it took us, if we had to wait for it: it may have sent something meanwhile.
    fn miss(&mut self, id: u128) {
        if self.crowded.remove(&id).is_some() {
            self.had_publisher = true;
            self.missed.push(id);
        }
    }

    /// `local`: the publisher, where it is one of this process. `wanted_at`: see [`LinkRx::begin`].
    fn begin(
        &self,
        publisher: u128,
        connection: Connection,
        local: Option<Arc<Shared>>,
        wanted_at: Option<u64>,
    ) -> Result<LinkRx, LinkError> {
        let access = self.watch.access();
        let mut link =
            LinkRx::begin(publisher, connection, self.depth, self.on_full, self.id, access, wanted_at)?;
        if let Some(local) = local {
            // In our own process nobody else needs to run for it to accept us.
            local.accept_now();
            link.read_socket();
        }
        Ok(link)
    }

    /// Whether it is another process's, which this one was forked from.
    #[inline(always)]
    pub(super) fn is_inherited(&self) -> bool {
        !self.origin.is_here()
    }

    /// The next message of the publisher whose turn it is, if it is there and nothing else is to be told of.
    #[inline(always)]
    pub(super) fn next_sample(&mut self) -> Option<ShmSample> {
        if self.is_inherited() {
            return None;
        }
        if self.turn >= self.peers.len() {
            self.turn = 0;
        }
        let sample = self.peers.get_mut(self.turn)?.link.next_sample()?;
        self.turn += 1;
        self.count(&sample);
        Some(sample)
    }

    #[inline]
    fn count(&mut self, sample: &ShmSample) {
        self.stats.received += 1;
        // Saturating: a publisher may say anything.
        self.stats.bytes = self.stats.bytes.saturating_add(sample.len() as u64);
        self.busy.found();
    }

    /// The next thing that any publisher has for us, taking turns.
    #[inline]
    pub(super) fn next(&mut self) -> Option<Item> {
        if self.is_inherited() {
            return Some(Err(RecvError::Forked));
        }
        let count = self.peers.len();
        for _ in 0..count {
            if self.turn >= self.peers.len() {
                self.turn = 0;
            }
            let at = self.turn;
            self.turn += 1;
            match self.peers[at].link.next() {
                Next::Sample(sample) => {
                    self.count(&sample);
                    return Some(Ok(sample));
                }
                Next::Lagged(missed) => {
                    self.stats.lagged = self.stats.lagged.saturating_add(missed);
                    let link = &self.peers[at].link;
                    if link.is_behind_gap() {
                        // The message after the gap comes next, not another publisher's.
                        self.turn = at;
                    }
                    let (publisher, all_held) = (link.publisher, link.holds_all());
                    return Some(Err(RecvError::Lagged { publisher, missed, all_held }));
                }
                Next::Short(shortage) => return Some(Err(shortage.into())),
                // Contended: `has_something` goes on saying so, which keeps us from sleeping.
                Next::Empty | Next::Contended => {}
                Next::Ended(ended) => {
                    if let Some(error) = self.end(at, ended) {
                        return Some(Err(error));
                    }
                }
            }
        }
        if self.missed.is_empty() && self.blind.is_none() { None } else { self.apart() }
    }

    /// What is to be told apart from the links.
    #[cold]
    fn apart(&mut self) -> Option<Item> {
        if let Some(publisher) = self.missed.pop() {
            // Whether it was killed or has closed in order is not known: to the others nothing need be missing.
            let reason = "it was gone before it had room for another connection; what it sent since the first try was missed, and \
                          is not counted";
            return Some(Err(RecvError::Refused { publisher, reason: reason.to_owned() }));
        }
        if !self.peers.is_empty() || self.is_over() {
            return None;
        }
        // The last look: what was in the way may have gone by now.
        let error = self.blind.take()?;
        match self.watch.changes().and_then(|_| self.scan()) {
            Ok(()) if self.peers.is_empty() => None,
            Ok(()) => self.next(),
            Err(_) => Some(Err(error.into())),
        }
    }

    /// Whether there may be something, by a look at memory alone.
    #[inline]
    pub(super) fn has_something(&self) -> bool {
        self.peers.iter().any(|peer| peer.link.has_something())
    }

    /// Whether nothing will ever come any more.
    pub(super) fn is_over(&self) -> bool {
        self.over
            || self.end_with_last
                && self.had_publisher
                && self.peers.is_empty()
                && self.crowded.is_empty()
                && self.refused.is_empty()
                && self.missed.is_empty()
    }

    pub(super) fn established(&self) -> usize {
        self.peers.iter().filter(|peer| peer.link.is_established()).count()
    }

    /// Reads the directory's changes, and connects to who has come.
    ///
    /// # Errors
    /// A shortage, after which it is tried again. Whatever else is in the way is told when nothing more comes from the links.
    pub(super) fn read_watch(&mut self) -> Result<(), DiscoveryError> {
        // Until it is known better: the news is taken by the first call, and a failure of the second must not lose it.
        let behind = std::mem::replace(&mut self.behind, true);
        match self.watch.changes().and_then(|news| if news || behind { self.scan() } else { Ok(()) }) {
            Ok(()) => self.blind = None,
            Err(error) if error.is_shortage() => return Err(error),
            Err(error) => {
                if self.blind.is_none() {
                    tracing::warn!(error = %chain(&error), topic = self.watch.topic(), "no further publisher is found");
                }
                self.blind = Some(error);
            }
        }
        self.behind = false;
        Ok(())
    }

    /// The wait goes to sleep, unless there is this to be told.
    #[inline]
    pub(super) fn sleeps(&mut self) -> Option<RecvError> {
        self.busy.sleeps();
        match self.all_held() {
            None => None,
            Some(all) => self.hoarded(all, true),
        }
    }

    /// What is to be told of a wait that goes on without sleeping.
    pub(super) fn waits_awake(&mut self) -> Option<RecvError> {
        let all = self.all_held()?;
        self.hoarded(all, false)
    }

    /// What this program holds, if no message can come from any publisher before it drops some of it.
    #[inline]
    fn all_held(&mut self) -> Option<AllHeld> {
        let all = if self.peers.is_empty() || !self.crowded.is_empty() {
            None
        } else {
            self.peers.iter().try_fold(AllHeld { samples: 0, by_depth: true }, |all, peer| {
                let held = peer.link.all_held()?;
                let samples = all.samples + held.samples;
                Some(AllHeld { samples, by_depth: all.by_depth && held.by_depth })
            })
        };
        if all.is_none() {
            self.hoard.clear();
        }
        all
    }

    #[cold]
    fn hoarded(&mut self, all: AllHeld, sleeps: bool) -> Option<RecvError> {
        let AllHeld { samples, by_depth } = all;
        match self.hoard.look(self.stats.received, samples, monotonic_ns()) {
            Hoarded::Tell => Some(RecvError::AllHeld { held: samples, in_bytes: !by_depth }),
            Hoarded::LookIn(pause) => {
                if sleeps && let Err(error) = self.watch.look_again_in(pause) {
                    tracing::warn!(
                        error = %chain(&error),
                        "a wait for messages is in vain: this program holds all samples that it may have"
                    );
                }
                None
            }
        }
    }

    pub(super) fn arm(&mut self) {
        for peer in &mut self.peers {
            peer.link.arm();
        }
    }

    pub(super) fn disarm(&mut self) {
        for peer in &mut self.peers {
            peer.link.disarm();
        }
    }

    /// A publisher that would not have us, if that is all that there is to tell of it.
    pub(super) fn take_refusal(&mut self) -> Option<RecvError> {
        let at = self.peers.iter().position(|peer| peer.link.was_refused())?;
        match self.peers[at].link.next() {
            Next::Ended(ended) => self.end(at, ended),
            _ => None,
        }
    }

    /// What was told is final: no publisher is to wait for us.
    #[cold]
    pub(super) fn conclude(&mut self) {
        self.over = true;
        // A child leaves its parent's links alone.
        if !self.is_inherited() {
            self.leave_links();
        }
    }

    fn leave_links(&mut self) {
        for peer in self.peers.drain(..) {
            drop(peer.waits);
            peer.link.leave();
        }
        self.stats.publishers = 0;
    }

    /// Leaves every link; samples that are still held keep theirs open.
    pub(super) fn leave(&mut self) {
        self.leave_links();
        if let Err(error) = self.watch.leave() {
            tracing::debug!(error = %chain(&error), "the topic's directory stays behind");
        }
    }

    #[cold]
    fn end(&mut self, at: usize, ended: Ended) -> Option<RecvError> {
        let Peer { link, waits } = self.peers.swap_remove(at);
        let publisher = link.publisher;
        tracing::debug!(publisher = %Hex(publisher), why = %ended, "link to a publisher is down");
        let was_established = link.is_established();
        let is_refused = matches!(ended, Ended::Refused(_));
        if was_established || !is_refused {
            // Told anew the next time.
            self.refused.remove(&publisher);
        }
        drop(waits);
        link.leave();
        self.stats.publishers = self.peers.len();
        if matches!(ended, Ended::Lost)
            && let Err(error) = self.watch.remove_dead(publisher)
        {
            tracing::debug!(error = %chain(&error), "the socket of a dead publisher stays behind");
        }
        match ended {
            Ended::Closed => self.events.then_some(RecvError::PublisherClosed { publisher }),
            Ended::Lost => {
                self.stats.publishers_lost += 1;
                Some(RecvError::PublisherLost { publisher })
            }
            Ended::Refused(reason) => {
                match reason {
                    // Who receives again is not stuck any more.
                    RefusedReason::Stuck => self.behind = true,
                    // What it lacked it may have later. It is told once.
                    RefusedReason::OutOfResources | RefusedReason::Full | RefusedReason::Keeping => {
                        match self.put_off(publisher) {
                            Ok(true) => {}
                            Ok(false) => return None,
                            Err(error) => {
                                tracing::debug!(publisher = %Hex(publisher), error = %chain(&error), "it is tried again later");
                            }
                        }
                    }
                    RefusedReason::NotPermitted | RefusedReason::NotUnderstood => {
                        self.shunned.insert(publisher);
                    }
                }
                Some(match reason {
                    RefusedReason::Stuck => RecvError::Evicted { publisher },
                    reason => RecvError::Refused { publisher, reason: reason.to_string() },
                })
            }
            Ended::Fault(fault) => {
                self.shunned.insert(publisher);
                Some(RecvError::PeerMisbehaved { publisher, fault })
            }
            Ended::Io(error) => {
                tracing::warn!(publisher = %Hex(publisher), error = %chain(&error), "cannot talk to a publisher any more");
                self.stats.publishers_lost += 1;
                Some(RecvError::PublisherLost { publisher })
            }
        }
    }
}
