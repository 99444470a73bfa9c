//! When each message was sent, roughly: so that a subscriber is owed exactly what was sent after it connected.
//!
//! A subscriber has connected as soon as the kernel took its connection, but its publisher accepts it only later, and
//! may have delivered batches to others meanwhile. This log says from which message on the newcomer has to receive or
//! count.
//!
//! It remembers the last [`RECENT`] batches exactly, and of older ones fewer the older they are, so that its size is
//! fixed. The answer about a forgotten batch is an earlier message than necessary: the subscriber then counts as lost
//! what was sent shortly before it connected, and never misses a message unaware. (Dropping every second batch whenever
//! the log was full was simpler, but answers about a time 10,000 batches ago were off by thousands.)
//!
//! It reads no clock: times are the caller's, from one monotonic clock that the host's processes share.

use std::collections::VecDeque;

/// Batches remembered exactly.
const RECENT: usize = 512;
/// Each level remembers every second batch of those that the level before it has forgotten …
const LEVELS: usize = 16;
/// … and this many. So the log reaches back four million batches, at 1/16 of the age or better.
const LEVEL: usize = 32;

/// What had been sent by when.
#[derive(Debug)]
pub(crate) struct JoinLog {
    /// The number of the first message there ever was.
    first_seq: u64,
    /// Newest first. Allocated once, 1,024 batches in all.
    levels: Box<[Level]>,
}

/// Every message below `next_seq` had been sent by `time`.
#[derive(Debug, Clone, Copy)]
struct Batch {
    time: u64,
    next_seq: u64,
}

impl JoinLog {
    /// For a publisher whose first message will be `first_seq`.
    pub(crate) fn new(first_seq: u64) -> Self {
        let lens = core::iter::once(RECENT).chain([LEVEL; LEVELS]);
        Self { first_seq, levels: lens.map(Level::new).collect() }
    }

    /// Remembers that all messages below `next_seq` had been sent by `time`.
    ///
    /// `time`, in nanoseconds, is read after the batch's last message was accepted. Amortised O(1).
    #[inline]
    pub(crate) fn record(&mut self, time: u64, next_seq: u64) {
        if let Some(last) = self.levels[0].batches.back_mut() {
            if next_seq <= last.next_seq {
                return;
            }
            // Of two batches at one time, the later includes the earlier. A clock that seems to have gone back is
            // held at where it was, which errs to the safe side.
            if time <= last.time {
                last.next_seq = next_seq;
                return;
            }
        }
        let mut batch = Batch { time, next_seq };
        for level in &mut self.levels {
            match level.push(batch) {
                Some(older) => batch = older,
                None => break,
            }
        }
    }

    /// The first message that was not certainly sent before `time`.
    pub(crate) fn seq_at(&self, time: u64) -> u64 {
        // The newest batch before `time` that is still remembered.
        let before = self.levels.iter().find_map(|level| {
            let before = level.batches.partition_point(|batch| batch.time < time);
            before.checked_sub(1).map(|last| level.batches[last].next_seq)
        });
        before.unwrap_or(self.first_seq)
    }
}

/// Batches of one resolution, oldest first, strictly ascending in both fields.
#[derive(Debug)]
struct Level {
    len_max: usize,
    batches: VecDeque<Batch>,
    /// Whether the batch forgotten last was passed on.
    passed_on: bool,
}

impl Level {
    fn new(len_max: usize) -> Self {
        Self { len_max, batches: VecDeque::with_capacity(len_max), passed_on: false }
    }

    /// Remembers `batch`, and returns what the next level is to remember instead of this one.
    #[inline]
    fn push(&mut self, batch: Batch) -> Option<Batch> {
        let oldest = if self.batches.len() < self.len_max { None } else { self.batches.pop_front() };
        self.batches.push_back(batch);
        let oldest = oldest?;
        self.passed_on = !self.passed_on;
        self.passed_on.then_some(oldest)
    }
}

#[cfg(all(test, not(tokio_shm_loom)))]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Remembers everything.
    struct Oracle {
        first_seq: u64,
        batches: Vec<(u64, u64)>,
    }

    impl Oracle {
        fn seq_at(&self, time: u64) -> u64 {
            self.batches
                .iter()
                .filter(|(sent, _)| *sent < time)
                .map(|(_, next)| *next)
                .max()
                .unwrap_or(self.first_seq)
        }
    }

    fn fill(first_seq: u64, steps: &[(u64, u64)]) -> (JoinLog, Oracle) {
        let mut log = JoinLog::new(first_seq);
        let mut oracle = Oracle { first_seq, batches: Vec::new() };
        let (mut time, mut seq) = (1_000, first_seq);
        for (later, messages) in steps {
            time += later;
            seq += messages;
            log.record(time, seq);
            oracle.batches.push((time, seq));
        }
        (log, oracle)
    }

    proptest! {
        #[test]
        fn answer_is_exact_while_everything_is_remembered(
            first_seq in 0u64..10,
            steps in prop::collection::vec((0u64..5, 0u64..4), 0..=RECENT),
            asked in prop::collection::vec(900u64..2_500, 1..50),
        ) {
            let (log, oracle) = fill(first_seq, &steps);
            for time in asked {
                prop_assert_eq!(log.seq_at(time), oracle.seq_at(time));
            }
        }

        #[test]
        fn answer_never_skips_a_message_that_is_owed(
            steps in prop::collection::vec((0u64..3, 0u64..3), 3_000..6_000),
            asked in prop::collection::vec(900u64..10_000, 1..20),
        ) {
            let (log, oracle) = fill(0, &steps);
            prop_assert!(log.levels.iter().all(|level| level.batches.len() <= level.len_max));
            let ascends = |a: &&Batch, b: &&Batch| a.time < b.time && a.next_seq < b.next_seq;
            prop_assert!(log.levels.iter().rev().flat_map(|level| &level.batches).is_sorted_by(ascends));
            for time in asked {
                prop_assert!(log.seq_at(time) <= oracle.seq_at(time));
            }
            let last = oracle.batches.last().unwrap();
            prop_assert_eq!(log.seq_at(last.0 + 1), last.1);
        }
    }

    #[test]
    fn answer_about_an_old_time_is_off_by_a_sixteenth_of_its_age_at_most() {
        let mut log = JoinLog::new(0);
        let allocated: Vec<_> = log.levels.iter().map(|level| level.batches.capacity()).collect();
        let now = 1_000_000;
        for time in 1..=now {
            log.record(time, time);
        }
        for age in 0..now {
            // The last batch before time t has the next message t - 1.
            let off = (now - age - 1) - log.seq_at(now - age);
            assert!(off <= if age < RECENT as u64 - 1 { 0 } else { age / 16 }, "{off} at age {age}");
        }
        assert!(log.levels.iter().map(|level| level.batches.capacity()).eq(allocated));
    }

    #[test]
    fn batch_at_a_time_that_seems_to_go_back_is_owed() {
        let mut log = JoinLog::new(0);
        log.record(10, 1);
        log.record(5, 2);
        assert_eq!(log.seq_at(10), 0);
        assert_eq!(log.seq_at(11), 2);
    }
}
