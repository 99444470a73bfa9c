//! When a publisher whose subscriber is full looks on for a while before it asks to be rung for.
//!
//! A subscriber that is awake makes room within a microsecond or two, and is slowed down if it has to ring for each message that it
//! gives back; so is the sender, who is then woken for one place at a time. One that sleeps, or takes its time, is not worth looking at.
//! Which it is, the last tries tell. This decides; it does not look.

/// Looks that find nothing given back at all before it is given up.
pub(super) const LOOKS_IN_VAIN: usize = 4;
/// Looks at most.
pub(super) const LOOKS: usize = 8;
/// Hints to the processor that this is a loop which waits, between two looks: some 400 ns. Each look takes a cache line from the
/// subscriber, which needs it for the next message that it gives back.
pub(super) const PAUSES: usize = 16;
/// Occasions that go by without a look after so many failures in a row: two to the power of these, and of this at most.
const FAILURES_MAX: u32 = 6;

/// What the last tries came to.
#[derive(Debug, Default)]
pub(super) struct Patience {
    failures: u32,
    /// Occasions to let go by.
    skip: u32,
}

impl Patience {
    /// Whether to look, on this occasion.
    pub(super) fn is_due(&mut self) -> bool {
        match self.skip.checked_sub(1) {
            Some(skip) => {
                self.skip = skip;
                false
            }
            None => true,
        }
    }

    /// Takes note of what looking came to.
    pub(super) fn learn(&mut self, paid: bool) {
        self.failures = if paid { 0 } else { (self.failures + 1).min(FAILURES_MAX) };
        self.skip = if paid { 0 } else { 1 << self.failures };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patience_runs_out_by_failures_and_comes_back_with_success() {
        let mut patience = Patience::default();
        let mut tries = 0;
        for _ in 0..1_000 {
            if patience.is_due() {
                tries += 1;
                patience.learn(false);
            }
        }
        assert!((10..25).contains(&tries), "{tries}");
        while !patience.is_due() {}
        patience.learn(true);
        for _ in 0..100 {
            assert!(patience.is_due());
            patience.learn(true);
        }
    }
}
