//! When to tell a program that it waits for what cannot come, because it holds all that it may have itself.
//!
//! What it holds may be about to be dropped in another task or thread, so it is told only once it has held the same for a while. It
//! knows no link and reads no clock.

/// For how long a wait has to be in vain before it is told, and told again.
const AFTER_NS: u64 = 1_000_000_000;
/// A wait that was looked at so long ago was given up meanwhile.
const STALE_NS: u64 = 2 * AFTER_NS;

/// A wait during which nothing came and nothing was dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Wait {
    /// When it began, or was told last, in clock nanoseconds.
    since: u64,
    /// What the subscriber had received by then.
    received: u64,
    /// What the program holds.
    held: u64,
}

#[derive(Debug, Default)]
pub(super) struct Hoard(Option<Wait>);

/// What is to be done about a wait.
#[must_use]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Hoarded {
    /// Look again in so many nanoseconds.
    LookIn(u64),
    /// It has been in vain for long: it is to be told.
    Tell,
}

impl Hoard {
    /// Nothing, or not only what the program holds, keeps messages from coming.
    #[inline]
    pub(super) fn clear(&mut self) {
        self.0 = None;
    }

    /// A wait goes on at `now`, and the `held` samples keep every message from coming.
    pub(super) fn look(&mut self, received: u64, held: u64, now: u64) -> Hoarded {
        let goes_on = |wait: &Wait| {
            wait.received == received && wait.held == held && now.saturating_sub(wait.since) < STALE_NS
        };
        let wait = match self.0.filter(goes_on) {
            Some(wait) => wait,
            None => *self.0.insert(Wait { since: now, received, held }),
        };
        let lasted = now.saturating_sub(wait.since);
        if lasted < AFTER_NS {
            return Hoarded::LookIn(AFTER_NS - lasted);
        }
        self.0 = Some(Wait { since: now, ..wait });
        Hoarded::Tell
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    #[test]
    fn wait_in_vain_is_told_once_a_second() {
        let mut hoard = Hoard::default();
        assert_eq!(hoard.look(64, 64, 5), Hoarded::LookIn(1_000 * MS));
        assert_eq!(hoard.look(64, 64, 5 + 400 * MS), Hoarded::LookIn(600 * MS));
        assert_eq!(hoard.look(64, 64, 5 + 1_100 * MS), Hoarded::Tell);
        assert_eq!(hoard.look(64, 64, 5 + 1_100 * MS), Hoarded::LookIn(1_000 * MS));
        assert_eq!(hoard.look(64, 64, 5 + 2_100 * MS), Hoarded::Tell);
    }

    #[test]
    fn sample_that_came_or_was_dropped_begins_anew() {
        for (received, held) in [(65, 64), (64, 63)] {
            let mut hoard = Hoard::default();
            assert_eq!(hoard.look(64, 64, 0), Hoarded::LookIn(1_000 * MS));
            assert_eq!(hoard.look(received, held, 999 * MS), Hoarded::LookIn(1_000 * MS));
            assert_eq!(hoard.look(received, held, 1_500 * MS), Hoarded::LookIn(499 * MS));
            hoard.clear();
            assert_eq!(hoard.look(received, held, 1_999 * MS), Hoarded::LookIn(1_000 * MS));
        }
    }

    #[test]
    fn time_between_two_waits_is_not_waited() {
        let mut hoard = Hoard::default();
        assert_eq!(hoard.look(64, 64, 0), Hoarded::LookIn(1_000 * MS));
        assert_eq!(hoard.look(64, 64, 10_000 * MS), Hoarded::LookIn(1_000 * MS));
    }
}
