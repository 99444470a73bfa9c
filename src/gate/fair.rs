//! A gate that serves its waiters in the order in which they came; see [`Gate`](super::Gate) for what a gate is.
//!
//! Waiters stand in line, and only the first one looks at the condition. It looks again with each [`wake`](FairGate::wake), so what comes
//! free in pieces adds up for it. When it leaves, served, timed out or dropped, the next one is woken to look. A newcomer that finds others
//! in line joins at the end without a look.
//!
//! Some waiters may be content with what is of no use to the first. Those wait in the side lane: its first one looks as well, at that
//! alone ([`Turn::Beside`]).
//!
//! A waiter that is neither polled nor dropped holds up those behind it, as one of tokio's semaphore does.
//!
//! # Why no wake-up is lost
//! As for the gate, by two fences: the waker makes the condition true, *fence*, reads how many are in line; a waiter joins the line, *fence*,
//! looks. Who is to be woken is decided under the lock. A waiter registers its waker under the same lock before each look: either it is
//! found there, or the wake-up came before, and then the look sees what it was for.

use std::collections::VecDeque;
use std::fmt;
use std::future::poll_fn;
use std::task::{Poll, Waker};
use std::time::Instant;

use crate::sync::atomic::{AtomicU64, Ordering, fence};
use crate::sync::{Mutex, Parker, fence_after_rmw};

/// One waiter, in the lower half of the count.
const WAITER: u64 = 1;
/// What one in the side lane counts in addition, in the upper half.
const BESIDE: u64 = 1 << 32;
/// No waiter, but an end: see [`FairGate::close`].
const CLOSED: u64 = 1 << 63;

/// Where a waiter stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Lane {
    /// Before all others: it waits for something that was promised already.
    Urgent,
    Main,
    /// In turn with the main lane; and its first one may look beside.
    Side,
}

/// What a waiter may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Turn {
    /// It is the first: whatever there is.
    First,
    /// It is the first of the side lane: only what is of no use to the first of all.
    Beside,
}

/// See the module.
pub(crate) struct FairGate {
    /// How many are in line, and of these in the side lane; changed under the lock of `lanes` by read-modify-write, read without it. And
    /// whether the gate is closed.
    waiting: AtomicU64,
    lanes: Mutex<Lanes>,
}

#[derive(Default)]
struct Lanes {
    /// Given to the next who comes; so a lower one came before.
    next_id: u64,
    /// Each by id.
    lanes: [VecDeque<Waiter>; 3],
}

struct Waiter {
    id: u64,
    /// `None` while the waiter has been woken and has not looked again.
    waker: Option<Waker>,
}

impl FairGate {
    pub(crate) fn new() -> Self {
        Self { waiting: AtomicU64::new(0), lanes: Mutex::new(Lanes::default()) }
    }

    /// Makes the first waiter look again, and the first of the side lane.
    ///
    /// The caller's last access to memory that the waiters look at must have been a read-modify-write: the one that
    /// made the condition true.
    #[inline]
    pub(crate) fn wake(&self) {
        if self.has_waiters() {
            self.wake_leaders();
        }
    }

    /// Makes everybody look whether the wait has ended, and the first ones at the condition. The same contract as for [`wake`](Self::wake).
    pub(crate) fn wake_all(&self) {
        if self.has_waiters() {
            let mut lanes = self.lanes.lock();
            let wakers: Vec<_> =
                lanes.lanes.iter_mut().flatten().filter_map(|waiter| waiter.waker.take()).collect();
            drop(lanes);
            wakers.into_iter().for_each(Waker::wake);
        }
    }

    /// Whether anybody waits. The same contract as for [`wake`](Self::wake): after `false`, a waiter that comes sees the condition.
    #[inline]
    pub(crate) fn has_waiters(&self) -> bool {
        // SYNC POINT: condition made true, line read.
        fence_after_rmw();
        self.waiting.load(Ordering::Relaxed) != 0
    }

    /// Whether one who comes now for `lane` has others before it, at a glance: it orders nothing.
    #[inline]
    pub(crate) fn is_taken(&self, lane: Lane) -> bool {
        let others = if lane == Lane::Side { BESIDE } else { WAITER };
        self.waiting.load(Ordering::Relaxed) >= others
    }

    /// Whether one waits that is not in the side lane. The same glance.
    #[cfg(not(tokio_shm_loom))]
    pub(crate) fn waits_in_main(&self) -> bool {
        let waiting = self.waiting.load(Ordering::Relaxed) & !CLOSED;
        waiting % BESIDE > waiting / BESIDE
    }

    /// The turn of one who comes now for `lane` and does not join the line. The same glance.
    pub(crate) fn newcomers_turn(&self, lane: Lane) -> Option<Turn> {
        match self.is_taken(lane) {
            true => None,
            false if self.is_taken(Lane::Main) => Some(Turn::Beside),
            false => Some(Turn::First),
        }
    }

    /// Marks the gate as one at which nothing more is handed out: [`has_waiters`](Self::has_waiters) is true from now on, and asks for a
    /// look at [`is_closed`](Self::is_closed). A full fence on x86-64, as a read-modify-write.
    pub(crate) fn close(&self) {
        self.waiting.fetch_or(CLOSED, Ordering::Relaxed);
    }

    /// Whether it is closed. The same contract as for [`wake`](Self::wake).
    #[inline]
    pub(crate) fn is_closed(&self) -> bool {
        fence_after_rmw();
        self.waiting.load(Ordering::Relaxed) & CLOSED != 0
    }

    /// How many wait, for statistics.
    #[cfg(not(tokio_shm_loom))]
    pub(crate) fn waiters(&self) -> usize {
        (self.waiting.load(Ordering::Relaxed) % BESIDE) as usize
    }

    /// Waits until `attempt` returns something in its turn, or `ended` does.
    ///
    /// Both are called without any lock, and may wake this gate or others.
    ///
    /// # Cancel safety
    /// Cancel safe: dropped before completion, `attempt` has not succeeded, and its turn has gone to the next one.
    pub(crate) async fn wait_until<T>(
        &self,
        lane: Lane,
        ended: impl Fn() -> Option<T>,
        mut attempt: impl FnMut(Turn) -> Option<T>,
    ) -> T {
        if let Some(value) = self.look_at_once(lane, &ended, &mut attempt) {
            return value;
        }
        let mut place = self.join(lane);
        poll_fn(|cx| place.look(cx.waker(), &ended, &mut attempt).map_or(Poll::Pending, Poll::Ready)).await
    }

    /// Blocks the calling thread until `attempt` returns something in its turn, or `ended` does; `None` if `deadline` came first.
    ///
    /// As [`wait_until`](Self::wait_until), with one last look after the deadline.
    pub(crate) fn blocking_wait_until<T>(
        &self,
        lane: Lane,
        deadline: Option<Instant>,
        ended: impl Fn() -> Option<T>,
        mut attempt: impl FnMut(Turn) -> Option<T>,
    ) -> Option<T> {
        if let Some(value) = self.look_at_once(lane, &ended, &mut attempt) {
            return Some(value);
        }
        self.join(lane).block_until(deadline, ended, attempt)
    }

    /// Joins the line; left when what it returns is dropped.
    pub(crate) fn join(&self, lane: Lane) -> Place<'_> {
        let mut lanes = self.lanes.lock();
        let id = lanes.next_id;
        lanes.next_id += 1;
        lanes.lanes[lane as usize].push_back(Waiter { id, waker: None });
        // Relaxed: the fence before the look is what orders it.
        self.waiting.fetch_add(unit(lane), Ordering::Relaxed);
        Place { gate: self, lane, id }
    }

    fn look_at_once<T>(
        &self,
        lane: Lane,
        ended: impl Fn() -> Option<T>,
        attempt: impl FnOnce(Turn) -> Option<T>,
    ) -> Option<T> {
        ended().or_else(|| self.newcomers_turn(lane).and_then(attempt))
    }

    #[inline(never)]
    fn wake_leaders(&self) {
        let wakers = self.lanes.lock().take_leaders();
        wakers.into_iter().flatten().for_each(Waker::wake);
    }
}

impl Lanes {
    /// Which lane the first of all stands in.
    fn first(&self) -> Option<Lane> {
        let [urgent, main, side] = self.lanes.each_ref().map(|lane| lane.front().map(|waiter| waiter.id));
        match (main, side) {
            _ if urgent.is_some() => Some(Lane::Urgent),
            (Some(main), Some(side)) if side < main => Some(Lane::Side),
            (Some(_), _) => Some(Lane::Main),
            (None, side) => side.map(|_| Lane::Side),
        }
    }

    /// The wakers of the first of all and of the first of the side lane.
    fn take_leaders(&mut self) -> [Option<Waker>; 2] {
        let first = self.first();
        let beside = Some(Lane::Side).filter(|_| first != Some(Lane::Side));
        [first, beside].map(|lane| self.lanes[lane? as usize].front_mut()?.waker.take())
    }

    fn turn(&self, lane: Lane, at: usize) -> Option<Turn> {
        match lane {
            _ if at > 0 => None,
            _ if self.first() == Some(lane) => Some(Turn::First),
            Lane::Side => Some(Turn::Beside),
            _ => None,
        }
    }

    fn position(&self, lane: Lane, id: u64) -> usize {
        let found = self.lanes[lane as usize].binary_search_by_key(&id, |waiter| waiter.id);
        found.expect("a waiter is in line until its place is dropped")
    }
}

fn unit(lane: Lane) -> u64 {
    if lane == Lane::Side { WAITER + BESIDE } else { WAITER }
}

/// A place in line; dropping it leaves the line, and the next one's turn comes.
#[must_use = "the place is left at once if it is dropped"]
pub(crate) struct Place<'a> {
    gate: &'a FairGate,
    lane: Lane,
    id: u64,
}

impl Place<'_> {
    /// Blocks the calling thread; see [`FairGate::blocking_wait_until`]. After `None` the place is still held.
    pub(crate) fn block_until<T>(
        &mut self,
        deadline: Option<Instant>,
        ended: impl Fn() -> Option<T>,
        mut attempt: impl FnMut(Turn) -> Option<T>,
    ) -> Option<T> {
        let parker = Parker::of_this_thread();
        let mut timed_out = false;
        loop {
            // Before the look: a wake-up after it keeps this thread from sleeping.
            let wakes = parker.wakes();
            if let Some(value) = self.look(parker.waker(), &ended, &mut attempt) {
                return Some(value);
            }
            if timed_out {
                return None;
            }
            timed_out = parker.sleep(wakes, deadline);
        }
    }

    /// One look, after which `waker` is woken for the next.
    fn look<T>(
        &mut self,
        waker: &Waker,
        ended: impl Fn() -> Option<T>,
        attempt: impl FnOnce(Turn) -> Option<T>,
    ) -> Option<T> {
        let turn = self.register(waker);
        // SYNC POINT: line joined, condition read.
        fence(Ordering::SeqCst);
        ended().or_else(|| turn.and_then(attempt))
    }

    fn register(&mut self, waker: &Waker) -> Option<Turn> {
        let mut lanes = self.gate.lanes.lock();
        let at = lanes.position(self.lane, self.id);
        let old = lanes.lanes[self.lane as usize][at].waker.replace(waker.clone());
        let turn = lanes.turn(self.lane, at);
        drop(lanes);
        // Outside of the lock: what a waker drops may come back to this gate.
        drop(old);
        turn
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        let mut lanes = self.gate.lanes.lock();
        let at = lanes.position(self.lane, self.id);
        let had_turn = lanes.turn(self.lane, at).is_some();
        let left = lanes.lanes[self.lane as usize].remove(at);
        self.gate.waiting.fetch_sub(unit(self.lane), Ordering::Relaxed);
        let next = if had_turn { lanes.take_leaders() } else { [None, None] };
        drop(lanes);
        next.into_iter().flatten().for_each(Waker::wake);
        drop(left);
    }
}

impl fmt::Debug for FairGate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let waiting = self.waiting.load(Ordering::Relaxed);
        f.debug_struct("FairGate")
            .field("waiting", &(waiting % BESIDE))
            .field("beside", &((waiting & !CLOSED) / BESIDE))
            .finish()
    }
}

#[cfg(all(test, tokio_shm_loom))]
mod loom_tests;
#[cfg(all(test, not(tokio_shm_loom)))]
mod tests;
