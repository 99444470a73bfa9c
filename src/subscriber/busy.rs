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
/// In async code the subscriber gives way to the runtime after a microsecond or two of looks, as [`tokio::task::yield_now`] does: other
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
}

impl Busy {
    pub(super) fn new(mode: BusyPoll) -> Self {
        Self { mode, since: None, slept: false, looking: false, patience: 1, short_sleeps: 0 }
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
            return self.mode == BusyPoll::Always;
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
