//! When looking again and again is worthwhile before sleeping.
//!
//! It decides; it neither looks nor sleeps.

use std::time::Duration;

use crate::sys::clock::monotonic_ns;

/// How long a subscriber that finds nothing goes on looking before it sleeps.
///
/// Looking catches a message within a fraction of a microsecond, where waking a sleeper takes several to some tens;
/// it costs a core for as long as it lasts.
///
/// In async code the subscriber gives way to the runtime after a microsecond or two of looks (fewer where they do not pay), as [`tokio::task::yield_now`] does: other
/// tasks, the other branches of a `select!` or `join!`, sockets and timers have their turn before it looks again, on a
/// current-thread runtime and on a multi-threaded one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum BusyPoll {
    /// Sleeps at once.
    Off,
    /// Looks for at most `max` while that has been paying lately: it costs nothing on a topic that is idle or slow.
    Adaptive {
        /// The longest time to look before sleeping.
        max: Duration,
    },
    /// Never sleeps.
    Always,
}

impl Default for BusyPoll {
    /// Adaptive, for at most 50 µs: about what waking a sleeper on another core costs.
    fn default() -> Self {
        Self::Adaptive { max: Duration::from_micros(50) }
    }
}

/// After this many failures in a row looking is tried only once in so many sleeps that were short.
const MOST_PATIENCE: u32 = 1 << 10;

/// Looks at memory before the subscriber gives way: a microsecond or two.
const LOOKS: usize = 128;
/// Looks where they are of no use: what the subscriber waits for is sent by a task of its own thread, which must have its turn first.
const FEW_LOOKS: usize = 8;
/// Waits in a row that ended only after giving way, until there are few looks.
const WAITS_TO_FEW: u32 = 4;
/// One in so many waits has all the looks even so: a sender may have moved to another thread.
const WAITS_TO_A_TRIAL: u32 = 32;

/// The state of one subscriber's waiting.
#[derive(Debug)]
pub(super) struct Busy {
    mode: BusyPoll,
    /// When the present wait began, in clock nanoseconds; `None` while there are messages.
    since: Option<u64>,
    /// Whether the present wait has gone to sleep.
    slept: bool,
    /// Whether to look during the next wait.
    looking: bool,
    /// Short sleeps that must come before looking is tried again; doubled by each failure.
    patience: u32,
    short_sleeps: u32,
    /// Whether a look has caught what the present wait is for.
    caught: bool,
    /// Waits in a row that ended awake, but not by a look.
    uncaught: u32,
}

impl Busy {
    pub(super) fn new(mode: BusyPoll) -> Self {
        Self {
            mode,
            since: None,
            slept: false,
            looking: false,
            patience: 1,
            short_sleeps: 0,
            caught: false,
            uncaught: 0,
        }
    }

    /// How many times to look before giving way.
    #[inline]
    pub(super) fn looks(&self) -> usize {
        let few = self.uncaught >= WAITS_TO_FEW && !self.uncaught.is_multiple_of(WAITS_TO_A_TRIAL);
        if few { FEW_LOOKS } else { LOOKS }
    }

    /// A look has found something.
    #[inline]
    pub(super) fn caught(&mut self) {
        self.caught = true;
    }

    /// A message came.
    #[inline]
    pub(super) fn found(&mut self) {
        if self.since.is_some() {
            self.learn();
        }
    }

    /// Nothing there: whether to look again instead of sleeping.
    pub(super) fn look_again(&mut self) -> bool {
        let BusyPoll::Adaptive { max } = self.mode else {
            if self.mode == BusyPoll::Off {
                return false;
            }
            self.since.get_or_insert(0);
            return true;
        };
        let Some(since) = self.since else {
            self.since = Some(monotonic_ns());
            self.slept = false;
            return self.looking;
        };
        if !self.looking || self.slept {
            return false;
        }
        let lasted = monotonic_ns().saturating_sub(since);
        if u128::from(lasted) < max.as_nanos() {
            return true;
        }
        self.looking = false;
        self.patience = (self.patience * 2).min(MOST_PATIENCE);
        self.short_sleeps = 0;
        false
    }

    /// The wait goes to sleep.
    pub(super) fn sleeps(&mut self) {
        self.slept = true;
    }

    #[cold]
    fn learn(&mut self) {
        let Some(since) = self.since.take() else { return };
        if !self.slept {
            let caught = std::mem::take(&mut self.caught);
            self.uncaught = if caught { 0 } else { self.uncaught.checked_add(1).unwrap_or(WAITS_TO_FEW) };
        }
        let BusyPoll::Adaptive { max } = self.mode else { return };
        if !self.slept {
            // It paid.
            self.patience = 1;
            return;
        }
        if u128::from(monotonic_ns().saturating_sub(since)) < max.as_nanos() {
            // Looking would have caught it.
            self.short_sleeps += 1;
            self.looking = self.short_sleeps >= self.patience;
        } else {
            self.short_sleeps = 0;
            self.looking = false;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn busy_off_never_looks_and_always_never_stops() {
        assert!(!Busy::new(BusyPoll::Off).look_again());
        let mut always = Busy::new(BusyPoll::Always);
        assert!((0..100).all(|_| always.look_again()));
    }

    #[test]
    fn busy_looks_few_times_where_messages_come_after_giving_way_only() {
        let mut busy = Busy::new(BusyPoll::Always);
        let mut wait = |by_a_look: bool| {
            assert!(busy.look_again());
            let looks = busy.looks();
            if by_a_look {
                busy.caught();
            }
            busy.found();
            looks
        };
        assert!((0..WAITS_TO_FEW).all(|_| wait(false) == LOOKS));
        let few = (0..WAITS_TO_A_TRIAL).filter(|_| wait(false) == FEW_LOOKS).count();
        assert_eq!(few, WAITS_TO_A_TRIAL as usize - 1, "all but the trial");
        assert_eq!(wait(true), FEW_LOOKS);
        assert_eq!(wait(false), LOOKS, "a look has paid");
    }

    #[test]
    fn busy_adaptive_looks_after_short_sleeps_only() {
        let mut busy = Busy::new(BusyPoll::Adaptive { max: Duration::from_secs(3600) });
        assert!(!busy.look_again(), "nothing learnt yet: sleeps");
        busy.sleeps();
        busy.found();
        assert!(busy.look_again(), "that sleep was short: looks");
        busy.found();

        let mut slow = Busy::new(BusyPoll::Adaptive { max: Duration::ZERO });
        for _ in 0..3 {
            assert!(!slow.look_again());
            slow.sleeps();
            slow.found();
        }
    }

    #[test]
    fn busy_adaptive_gives_up_for_longer_after_each_failure() {
        let mut busy = Busy::new(BusyPoll::Adaptive { max: Duration::from_secs(3600) });
        busy.look_again();
        busy.sleeps();
        busy.found();
        // A wait that lasted beyond `max` while looking.
        busy.look_again();
        busy.since = Some(0);
        busy.mode = BusyPoll::Adaptive { max: Duration::from_nanos(1) };
        assert!(!busy.look_again());
        assert_eq!(busy.patience, 2);
    }
}
