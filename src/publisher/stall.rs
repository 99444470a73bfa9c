//! Subscribers that keep senders waiting for long: when to say so, and in which words.

use std::time::Duration;

use crate::link::Holding;
use crate::text::Called;

/// How long senders wait for one subscriber before it is worth a warning.
const AFTER_NS: u64 = 1_000_000_000;
/// When to warn of the same subscriber again.
const AGAIN_NS: u64 = 60_000_000_000;

/// A subscriber for which senders have been waiting.
pub(crate) struct Stall {
    pub(crate) subscriber: Holding,
    pub(crate) waited_ns: u64,
    /// Its share of the pool in bytes.
    pub(crate) share: u64,
    /// They wait for memory that it has, not for room on its link.
    pub(crate) for_memory: bool,
}

/// When to warn of waits that begin and end.
pub(crate) struct Watch {
    now: u64,
    next: Option<u64>,
}

impl Watch {
    pub(crate) fn new(now: u64) -> Self {
        Self { now, next: None }
    }

    /// For how long the wait has been going on that began at `since`, in nanoseconds, if it is time to warn of it. The last warning was
    /// at `warned`, which is brought up to date.
    pub(crate) fn is_due(&mut self, since: Option<u64>, warned: &mut Option<u64>) -> Option<u64> {
        let since = since?;
        let due = |warned: Option<u64>| {
            let again = warned.map_or(0, |warned| warned.saturating_add(AGAIN_NS));
            since.saturating_add(AFTER_NS).max(again)
        };
        let is_due = due(*warned) <= self.now;
        if is_due {
            *warned = Some(self.now);
        }
        // Another subscriber may begin to keep senders waiting at any time.
        let next = due(*warned).min(self.now + AFTER_NS);
        self.next = Some(self.next.map_or(next, |earlier| earlier.min(next)));
        is_due.then(|| self.now.saturating_sub(since))
    }

    /// When to look again; `None` where nothing waits.
    pub(crate) fn next(&self) -> Option<u64> {
        self.next
    }
}

impl Stall {
    /// Writes the warning into the log. Not to be called where other senders wait for the caller.
    pub(crate) fn warn(&self, topic: &str) {
        let Self { subscriber: Holding { peer, messages, bytes, depth }, share, .. } = self;
        let process = Called::of(peer.peer_credentials().ok().and_then(|peer| peer.pid));
        let waited = Duration::from_nanos(self.waited_ns);
        if self.for_memory {
            tracing::warn!(
                topic,
                %process,
                messages,
                bytes,
                ?waited,
                "senders wait for memory, and this subscriber has most of it: raise max_bytes, lower \
                 link_bytes, or set evict_after or on_full"
            );
        } else {
            tracing::warn!(
                topic,
                %process,
                messages,
                depth,
                bytes,
                share,
                ?waited,
                "senders wait for this subscriber: it has its depth in messages, or its share of the pool in \
                 bytes; raise depth, link_bytes or max_bytes, or set evict_after or on_full"
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wait_is_told_once_it_is_long_and_again_much_later() {
        let mut warned = None;
        let mut look = |now: u64, since: Option<u64>| {
            let mut watch = Watch::new(now);
            (watch.is_due(since, &mut warned), watch.next())
        };
        assert_eq!(look(5, None), (None, None));
        assert_eq!(look(10, Some(5)), (None, Some(5 + AFTER_NS)));
        let late = 5 + AFTER_NS;
        assert_eq!(look(late, Some(5)), (Some(AFTER_NS), Some(late + AFTER_NS)));
        // Another wait a little later is not told.
        assert_eq!(look(late + 2 * AFTER_NS, Some(late)), (None, Some(late + 3 * AFTER_NS)));
        assert!(look(late + AGAIN_NS, Some(late)).0.is_some());
    }
}
