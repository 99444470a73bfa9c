//! How much of a pool the messages of one publisher may take, and which part of that each of its links.
//!
//! Arithmetic only. Units are the caller's, one for all numbers.

/// A publisher's part of its pool, divided among its links. The rest is left for loans and for the tx queue.
///
/// While all messages together take no more than [`scarce`](Self::is_scarce), no link is bound: messages that several links have
/// take their memory once, however many links there are. Beyond that a link takes no message that brings it above its share. Links
/// above their shares got there before memory was scarce; the others come to their shares at most. So all of them together stay
/// below `all`: `scarce + (links - 1) * each`, with `scarce = links * each`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Shares {
    /// What the messages take at most. A link that has nothing may go beyond its share up to here.
    all: u64,
    /// Up to here no link is bound by its share.
    scarce: u64,
    /// A link's share.
    each: u64,
}

impl Shares {
    /// Three quarters of `part`, the publisher's part of its pool, among `links`.
    pub(crate) fn divide(part: u64, links: usize) -> Self {
        let (all, links) = (part / 4 * 3, links.max(1) as u64);
        let each = all / (2 * links - 1);
        Self { all, scarce: each * links, each }
    }

    /// `each` for every link, however much that is together, of a publisher with a `part` of its pool.
    pub(crate) fn fixed(part: u64, each: u64) -> Self {
        Self { all: part / 4 * 3, scarce: 0, each }
    }

    /// A link's share.
    pub(crate) fn each(&self) -> u64 {
        self.each
    }

    /// Whether links are bound by their shares while messages take `used`.
    #[inline]
    pub(crate) fn is_scarce(&self, used: u64) -> bool {
        used > self.scarce
    }

    /// Whether the messages take more than they may.
    pub(crate) fn is_exceeded(&self, used: u64) -> bool {
        used > self.all
    }

    /// Whether the messages take so much that it is them for whom memory is short, and not loans.
    pub(crate) fn is_half(&self, used: u64) -> bool {
        used >= self.all / 2
    }

    /// Whether a link that has `held` may have a message of `len`, while all messages, this one included, take `used`.
    ///
    /// A message that is the only one may go anywhere, however long it is.
    pub(crate) fn admits(&self, used: u64, held: u64, len: u64) -> bool {
        !self.is_scarce(used)
            || held.saturating_add(len) <= self.each
            || (held == 0 && !self.is_exceeded(used))
            || used <= len
    }
}

#[cfg(all(test, not(tokio_shm_loom)))]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn link_alone_has_three_quarters_and_two_have_a_quarter_each() {
        let one = Shares::divide(1_600, 1);
        assert_eq!((one.each(), one.scarce), (1_200, 1_200));
        let two = Shares::divide(1_600, 2);
        assert_eq!((two.each(), two.scarce), (400, 800));
        // Nothing is bound yet, then what has less than its share or nothing at all.
        assert!(two.admits(800, 700, 100));
        assert!(!two.admits(801, 700, 100));
        assert!(two.admits(801, 300, 100));
        assert!(!two.admits(801, 301, 100));
        assert!(two.admits(1_200, 0, 500));
        assert!(!two.admits(1_201, 0, 500));
    }

    #[test]
    fn message_longer_than_everything_goes_alone() {
        let shares = Shares::divide(100, 3);
        assert!(shares.admits(1_000, 0, 1_000));
        assert!(!shares.admits(1_001, 0, 1_000));
    }

    #[test]
    fn share_that_was_set_binds_at_once_and_a_link_with_nothing_never() {
        let shares = Shares::fixed(1_600, 10);
        assert!(shares.admits(1, 9, 1));
        assert!(!shares.admits(1_000, 10, 1));
        assert!(shares.admits(1_200, 0, 500));
        assert!(!shares.admits(1_201, 0, 500));
    }

    proptest! {
        /// Links that take and release in any order never have more than `all` together, if each message could be alone in a share.
        #[test]
        fn links_never_have_more_than_all(
            links in 1usize..8,
            steps in prop::collection::vec((0u8..=255, 1u64..10, any::<u8>()), 1..400),
        ) {
            let shares = Shares::divide(1_600, links);
            let mut held = vec![Vec::<usize>::new(); links];
            // Each message's length, and how many have it.
            let mut messages: Vec<(u64, usize)> = Vec::new();
            for (to, len, release) in steps {
                let message = messages.len();
                messages.push((len, 0));
                for link in (0..links).filter(|link| to & (1 << link) != 0) {
                    let used = messages.iter().filter(|m| m.1 > 0).map(|m| m.0).sum::<u64>();
                    let used = used + if messages[message].1 == 0 { len } else { 0 };
                    let has = held[link].iter().map(|&m| messages[m].0).sum();
                    if shares.admits(used, has, len) {
                        held[link].push(message);
                        messages[message].1 += 1;
                    }
                }
                let link = release as usize % (2 * links);
                if link < links && !held[link].is_empty() {
                    let at = release as usize / 16 % held[link].len();
                    let message = held[link].remove(at);
                    messages[message].1 -= 1;
                }
                let used = messages.iter().filter(|m| m.1 > 0).map(|m| m.0).sum::<u64>();
                prop_assert!(used <= 1_200, "{used}");
            }
        }
    }
}
