//! Memory that a pool has given up and somebody else still has: subscribers that were parted from, and keep their samples.
//!
//! It is counted until they let go. Up to the pool's cap it is counted apart, so that who keeps everything and is evicted for it does
//! not stop the others; beyond that it goes on counting in the cap itself, so that all together is never more than twice the cap.

use std::fmt::Debug;
use std::sync::Arc;

use parking_lot::Mutex;

use super::Reservation;

/// Somebody who may still have what was given up.
pub(crate) trait Holder: Debug + Send + Sync {
    /// Whether it has let go of everything.
    fn is_gone(&self) -> bool;

    /// Whether it is subscriber `id`.
    fn is_subscriber(&self, id: u128) -> bool;
}

/// The segments that a pool has given up.
#[derive(Debug, Default)]
pub(crate) struct Abandoned(Mutex<Records>);

#[derive(Debug, Default)]
struct Records {
    segments: Vec<Record>,
    /// The pool is closed: nothing is counted any more.
    closed: bool,
}

#[derive(Debug)]
struct Record {
    holders: Vec<Arc<dyn Holder>>,
    len: u64,
    /// Of one that goes on counting in the cap.
    kept: Option<Reservation>,
}

/// What a change has set free: reservations wake waiters when they are dropped, and holders may do anything.
type Freed = (Vec<Record>, Vec<Reservation>);

impl Abandoned {
    /// Counts a segment that its pool gives up while `holders` may have it. Where that leaves too much given up, its reservation stays
    /// with it.
    pub(crate) fn add(&self, holders: Vec<Arc<dyn Holder>>, reservation: &mut Reservation) {
        let (len, most) = (reservation.len(), reservation.budget().max);
        let mut records = self.0.lock();
        let freed = records.sweep(most);
        let mut first_kept = false;
        if !records.closed && !holders.iter().all(|holder| holder.is_gone()) {
            let fits = records.apart().saturating_add(len) <= most;
            first_kept = !fits && records.segments.iter().all(|record| record.kept.is_none());
            let kept = (!fits).then(|| reservation.take());
            records.segments.push(Record { holders, len, kept });
        }
        let bytes = records.bytes();
        drop(records);
        drop(freed);
        if first_kept {
            tracing::warn!(
                bytes,
                max_bytes = most,
                "subscribers that were disconnected keep so many bytes of their samples that the pool cannot make up for more; what \
                 they keep counts towards max_bytes until they drop it or end"
            );
        }
    }

    /// Looks who has let go meanwhile.
    pub(crate) fn sweep(&self, most: u64) {
        let freed = self.0.lock().sweep(most);
        drop(freed);
    }

    /// Whether subscriber `id` is to drop what it keeps before it has more: all that was given up is more than a quarter of `most`, the
    /// cap, and some of it is still with that subscriber. The links there are have three quarters at most, so that one subscriber that
    /// comes again and again never brings what is given up beyond the cap.
    pub(crate) fn is_kept_by(&self, id: u128, most: u64) -> bool {
        let mut records = self.0.lock();
        let freed = records.sweep(most);
        let much = records.bytes() > most / 4;
        let kept = much && records.segments.iter().any(|record| record.is_kept_by(id));
        drop(records);
        drop(freed);
        kept
    }

    /// What is still held, in bytes.
    pub(crate) fn bytes(&self) -> u64 {
        self.0.lock().bytes()
    }

    /// Counts nothing any more.
    pub(crate) fn close(&self) {
        let mut records = self.0.lock();
        records.closed = true;
        let segments = std::mem::take(&mut records.segments);
        drop(records);
        drop(segments);
    }
}

impl Record {
    fn is_kept_by(&self, id: u128) -> bool {
        self.holders.iter().any(|holder| holder.is_subscriber(id) && !holder.is_gone())
    }
}

impl Records {
    fn bytes(&self) -> u64 {
        self.segments.iter().map(|record| record.len).sum()
    }

    /// What counts apart from the cap.
    fn apart(&self) -> u64 {
        self.segments.iter().filter(|record| record.kept.is_none()).map(|record| record.len).sum()
    }

    fn sweep(&mut self, most: u64) -> Freed {
        let gone = self
            .segments
            .extract_if(.., |record| record.holders.iter().all(|holder| holder.is_gone()))
            .collect();
        let mut apart = self.apart();
        let mut freed = Vec::new();
        for record in &mut self.segments {
            if record.kept.is_some() && apart.saturating_add(record.len) <= most {
                apart += record.len;
                freed.extend(record.kept.take());
            }
        }
        (gone, freed)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;
    use crate::budget::Budget;

    #[derive(Debug, Default)]
    struct Peer(AtomicBool, u128);

    impl Holder for Peer {
        fn is_gone(&self) -> bool {
            self.0.load(Ordering::Relaxed)
        }

        fn is_subscriber(&self, id: u128) -> bool {
            self.1 == id
        }
    }

    #[test]
    fn subscriber_that_keeps_much_is_known_until_it_has_let_go() {
        let budget = Arc::new(Budget::new(100));
        let [first, second] = [1, 2].map(|id| Arc::new(Peer(AtomicBool::new(false), id)));
        let give_up = |len, holders: &[&Arc<Peer>]| {
            let mut reservation = Budget::reserve(&budget, len).unwrap();
            let holders = holders.iter().map(|holder| Arc::clone(holder) as Arc<dyn Holder>).collect();
            budget.abandoned.add(holders, &mut reservation);
        };
        let kept_by = || [1, 2, 3].map(|id| budget.abandoned.is_kept_by(id, 100));
        give_up(25, &[&first]);
        assert_eq!(kept_by(), [false; 3]);
        give_up(1, &[&first, &second]);
        assert_eq!(kept_by(), [true, true, false]);
        second.0.store(true, Ordering::Relaxed);
        assert_eq!(kept_by(), [true, false, false]);
        first.0.store(true, Ordering::Relaxed);
        assert_eq!(kept_by(), [false; 3]);
    }

    #[test]
    fn memory_given_up_counts_apart_up_to_the_cap_and_in_it_beyond() {
        let budget = Arc::new(Budget::new(100));
        let (first, second) = (Arc::new(Peer::default()), Arc::new(Peer::default()));
        let give_up = |len, holders: &[&Arc<Peer>]| {
            let mut reservation = Budget::reserve(&budget, len).unwrap();
            let holders = holders.iter().map(|holder| Arc::clone(holder) as Arc<dyn Holder>).collect();
            budget.abandoned.add(holders, &mut reservation);
        };
        let counts = || {
            budget.abandoned.sweep(100);
            (budget.used(), budget.abandoned.bytes())
        };
        give_up(60, &[&first]);
        give_up(40, &[&second]);
        assert_eq!(counts(), (0, 100));
        // There is no room for more.
        give_up(70, &[&first, &second]);
        assert_eq!(counts(), (70, 170));
        assert!(Budget::reserve(&budget, 31).is_none());
        // One of two is not both; but what it had alone makes room.
        first.0.store(true, Ordering::Relaxed);
        assert_eq!(counts(), (70, 110));
        give_up(10, &[&second]);
        assert_eq!(counts(), (70, 120));
        second.0.store(true, Ordering::Relaxed);
        assert_eq!(counts(), (0, 0));
        // Nothing is counted for who has let go already, or by a pool that is closed.
        give_up(10, &[&first]);
        assert_eq!(counts(), (0, 0));
        let third = Arc::new(Peer::default());
        give_up(100, &[&third]);
        give_up(100, &[&third]);
        assert_eq!(counts(), (100, 200));
        budget.abandoned.close();
        assert_eq!(counts(), (0, 0));
        give_up(100, &[&third]);
        assert_eq!((counts(), Arc::strong_count(&third), Arc::strong_count(&budget)), ((0, 0), 1, 1));
    }
}
