//! A subscriber's books: each publisher's messages in order, and every one that is missing counted.
//!
//! `Lagged` does not say whose messages were missed. Those before a message are that publisher's; those that are told with
//! nothing behind them can be anybody's, and are kept apart until a gap claims them.

use std::collections::HashMap;

use crate::support::Result;

#[derive(Default)]
pub(crate) struct Books {
    /// The number due next, by publisher.
    due: HashMap<u128, u64>,
    /// Told since the last message.
    told: u64,
    /// Told, and not before the message of a publisher that had a gap.
    unclaimed: u64,
    pub(crate) received: u64,
    pub(crate) lagged: u64,
}

impl Books {
    pub(crate) fn lagged(&mut self, missed: u64) -> Result {
        if missed == 0 {
            return Err("told of a gap of nothing".into());
        }
        self.lagged += missed;
        self.told += missed;
        Ok(())
    }

    pub(crate) fn received(&mut self, publisher: u128, seq: u64) -> Result {
        self.received += 1;
        let told = std::mem::take(&mut self.told);
        let Some(due) = self.due.insert(publisher, seq + 1) else {
            // What it sent before we were connected to it, or another's.
            self.unclaimed += told;
            return Ok(());
        };
        let Some(gap) = seq.checked_sub(due) else {
            return Err(format!("publisher {publisher:032x}: message {seq} where {due} was due").into());
        };
        self.unclaimed += told;
        self.unclaimed = self.unclaimed.checked_sub(gap).ok_or_else(|| {
            format!(
                "publisher {publisher:032x}: {gap} messages before {seq} are missing, and were not counted"
            )
        })?;
        Ok(())
    }

    /// The publisher was lost, or has disconnected us: nothing more of it can be expected.
    pub(crate) fn lost(&mut self, publisher: u128) {
        self.due.remove(&publisher);
    }

    /// What was received of each publisher, as `id:due` words, and how many of those told are still unclaimed.
    pub(crate) fn close(&self) -> String {
        let due = self.due.iter().map(|(publisher, due)| format!(" {publisher:032x}:{due}"));
        format!("{}{}", self.unclaimed + self.told, due.collect::<String>())
    }
}
