//! What a subscriber does whichever way it waits: connecting to publishers, taking turns among them, ending links.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use super::busy::Busy;
use super::{RecvError, SubscriberStats};
use crate::OnFull;
use crate::buffer::ShmSample;
use crate::link::{Ended, LinkError, LinkRx, Next};
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
    /// That it waits for messages which cannot come was told.
    told_held: bool,
    /// In a child it is the parent's, and receives nothing.
    origin: Origin,
    /// There has been a publisher.
    had_publisher: bool,
    /// A look at the directory, or at its watch, failed half-way: to be done again, as nothing is going to wake us for it.
    pub(super) behind: bool,
    /// Publishers that would not have us, or that we would not have any more: not tried again.
    shunned: HashSet<u128>,
    /// Publishers that have as many connections in line as the system allows. Tried again until there is room.
    crowded: HashMap<u128, Crowded>,
    /// Publishers that went while we waited for that.
    missed: Vec<u128>,
    /// Why no further publisher is found. The end, once nothing more comes from those that were.
    blind: Option<DiscoveryError>,
}

/// A wait for room in a publisher's line.
#[derive(Debug, Clone, Copy)]
struct Crowded {
    /// When it began, in clock nanoseconds: what was sent since is received or counted.
    since: u64,
    tries: u32,
}

/// When to try again, at first and at the latest.
const CROWDED_NS: u64 = 2_000_000;
const CROWDED_MAX_NS: u64 = 100_000_000;

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
            told_held: false,
            origin: Origin::here(),
            had_publisher: false,
            behind: false,
            shunned: HashSet::new(),
            crowded: HashMap::new(),
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
        scanned
    }

    fn try_scan(&mut self) -> Result<(), DiscoveryError> {
        let present = self.watch.scan()?;
        self.shunned.retain(|id| present.contains(id));
        let gone: Vec<_> = self.crowded.keys().copied().filter(|id| !present.contains(id)).collect();
        gone.into_iter().for_each(|id| self.miss(id));
        for id in present {
            if self.shunned.contains(&id) || self.peers.iter().any(|peer| peer.link.publisher == id) {
                continue;
            }
            let local = Shared::local(id);
            if let Some(local) = &local {
                local.note_time();
            }
            let begun = match self.connect(id, local.as_deref()) {
                Ok(connection) => {
                    let since = self.crowded.get(&id).map(|crowded| crowded.since);
                    self.begin(id, connection, local, since)
                }
                // Killed, or closing, or about to be found under its name once more.
                Err(ConnectFailed::Dead | ConnectFailed::Gone) => {
                    self.miss(id);
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
                    self.peers.push(Peer { link, waits: W::default() });
                }
                // Its socket looks alive as long as a child of it has it open.
                Err(LinkError::Ended) => self.watch.remove(id)?,
                Err(LinkError::Io(error)) => match DiscoveryError::io("connecting to a publisher")(error) {
                    error if error.is_shortage() => return Err(error),
                    error => {
                        tracing::warn!(publisher = %Hex(id), error = %chain(&error), "cannot connect to a publisher");
                    }
                },
                Err(error) => {
                    tracing::warn!(publisher = %Hex(id), error = %chain(&error), "cannot connect to a publisher");
                }
            }
        }
        Ok(())
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
            Crowded { since: monotonic_ns(), tries: 0 }
        });
        let pause = CROWDED_NS.saturating_mul(1 << crowded.tries.min(10)).min(CROWDED_MAX_NS);
        crowded.tries = crowded.tries.saturating_add(1);
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
                    // The message after the gap comes next, not another publisher's.
                    self.turn = at;
                    let link = &self.peers[at].link;
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
            self.stats.publishers_lost += 1;
            return Some(Err(RecvError::PublisherLost { publisher }));
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

    /// The wait goes to sleep.
    pub(super) fn sleeps(&mut self) {
        self.busy.sleeps();
        if !self.told_held && !self.peers.is_empty() && self.peers.iter().all(|peer| peer.link.holds_all()) {
            self.tell_held();
        }
    }

    /// Nothing comes before a sample is dropped. That may be about to happen in another task or thread, so it is told once, and no
    /// error.
    #[cold]
    fn tell_held(&mut self) {
        self.told_held = true;
        tracing::warn!(
            publisher = %Hex(self.peers[0].link.publisher),
            depth = self.depth,
            "a subscriber waits for a message while this program holds all samples that its depth allows: none comes before one \
             is dropped; drop samples sooner, or raise depth"
        );
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
        drop(waits);
        link.leave();
        self.stats.publishers = self.peers.len();
        if matches!(ended, Ended::Lost)
            && let Err(error) = self.watch.remove_dead(publisher)
        {
            tracing::debug!(error = %chain(&error), "the socket of a dead publisher stays behind");
        }
        match ended {
            // One that went before it knew of us had nothing for us.
            Ended::Lost if !was_established => None,
            Ended::Closed => self.events.then_some(RecvError::PublisherClosed { publisher }),
            Ended::Lost => {
                self.stats.publishers_lost += 1;
                Some(RecvError::PublisherLost { publisher })
            }
            Ended::Refused(reason) => {
                match reason {
                    // Who receives again is not stuck any more.
                    RefusedReason::Stuck => self.behind = true,
                    // What it lacked it may have when there is a reason to look again.
                    RefusedReason::OutOfResources | RefusedReason::Full => {}
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
