//! When to try publishers again that had no room for a subscriber: no event tells when it comes free.
//!
//! It neither waits nor connects.

use crate::sys::clock::monotonic_ns;

/// When to try again what the kernel refused for want of room in a publisher's line, at first and at the latest.
const CROWDED_NS: u64 = 2_000_000;
const CROWDED_MAX_NS: u64 = 100_000_000;
/// The same of a publisher that refused for want of a seat or of resources.
const REFUSED_NS: u64 = 50_000_000;
const REFUSED_MAX_NS: u64 = 2_000_000_000;

/// A wait for room in a publisher's line.
#[derive(Debug, Clone, Copy)]
pub(super) struct Crowded {
    /// When it began, in clock nanoseconds: what was sent since is received or counted.
    pub(super) since: u64,
    tries: u32,
}

impl Crowded {
    pub(super) fn new() -> Self {
        Self { since: monotonic_ns(), tries: 0 }
    }

    /// One more try was in vain: in how many nanoseconds to try again.
    pub(super) fn pause(&mut self) -> u64 {
        pause(&mut self.tries, CROWDED_NS, CROWDED_MAX_NS)
    }
}

/// A wait for a publisher to have what it lacked.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Refusal {
    tries: u32,
    /// When to try again, in clock nanoseconds.
    due: u64,
}

impl Refusal {
    /// It was refused, once more perhaps, at `now`: in how many nanoseconds to try again.
    pub(super) fn put_off(&mut self, now: u64) -> u64 {
        let pause = pause(&mut self.tries, REFUSED_NS, REFUSED_MAX_NS);
        self.due = now.saturating_add(pause);
        pause
    }

    /// In how many nanoseconds to try again: 0 if it is time.
    pub(super) fn due_in(&self, now: u64) -> u64 {
        self.due.saturating_sub(now)
    }
}

/// Twice as long after each try.
fn pause(tries: &mut u32, first: u64, most: u64) -> u64 {
    let pause = first.saturating_mul(1 << (*tries).min(10)).min(most);
    *tries = tries.saturating_add(1);
    pause
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusal_is_put_off_for_longer_each_time_up_to_a_bound() {
        let mut refusal = Refusal::default();
        assert_eq!(refusal.due_in(7), 0);
        let pauses: Vec<_> = (0..40).map(|_| refusal.put_off(7)).collect();
        assert_eq!(pauses[..3], [REFUSED_NS, 2 * REFUSED_NS, 4 * REFUSED_NS]);
        assert!(pauses.is_sorted() && pauses[39] == REFUSED_MAX_NS);
        assert_eq!(refusal.due_in(7), REFUSED_MAX_NS);
        assert_eq!(refusal.due_in(u64::MAX), 0);
        let mut crowded = Crowded::new();
        assert_eq!((0..40).map(|_| crowded.pause()).last(), Some(CROWDED_MAX_NS));
    }
}
