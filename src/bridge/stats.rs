//! What a bridge counts.

use std::sync::atomic::{AtomicU64, Ordering};

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident),+ $(,)?) => {
        /// A reading of a bridge's counters, all routes together.
        ///
        /// To zenoh, each message taken is sent, unheard or failed. From zenoh, each message received is injected, repeated,
        /// damaged, an echo or refused; what was injected and what was missed are together all that the other bridge's publishers have
        /// sent from the first message on that came through.
        #[derive(Debug, Clone, Default, PartialEq, Eq)]
        #[non_exhaustive]
        pub struct BridgeStats {
            $($(#[$doc])* pub $name: u64,)+
        }

        #[derive(Debug, Default)]
        pub(super) struct Counters {
            $(pub(super) $name: AtomicU64,)+
        }

        impl Counters {
            pub(super) fn read(&self) -> BridgeStats {
                BridgeStats { $($name: self.$name.load(Ordering::Relaxed),)+ }
            }
        }
    };
}

counters! {
    /// Messages taken from local topics; what bridges have put there is left alone and not counted.
    taken,
    /// Of those, messages handed to zenoh.
    sent,
    /// Payload bytes handed to zenoh.
    sent_bytes,
    /// Messages taken that nobody in zenoh subscribed to at that moment.
    unheard,
    /// Messages taken that zenoh would not have.
    failed,
    /// Messages of local topics that were missed because the bridge was behind ([`Congestion::Drop`](super::Congestion)) or lost
    /// with their publisher's connection.
    lagged,
    /// Messages received from zenoh.
    received,
    /// Of those, messages put into local topics.
    injected,
    /// Payload bytes put into local topics.
    injected_bytes,
    /// Messages that other bridges took but that did not arrive here, by the gaps in their numbers.
    missed,
    /// Messages received for a second time, or out of order: not injected.
    repeated,
    /// Messages received that are not as the other bridge sent them (zenoh 1.10 may tear one as it gives up a connection): not
    /// injected, and missed.
    damaged,
    /// Messages received whose publisher is on this host: not injected.
    echoes,
    /// Messages received that no topic can take: a key that no topic can have, more topics than
    /// [`max_topics`](super::BridgeBuilder::max_topics), larger than the pool, a deletion.
    refused,
    /// Connections that zenoh kept up but no longer sent on (a bug of zenoh 1.10), ended so that they are made again. What was sent
    /// meanwhile is missed there.
    revived,
}

pub(super) fn count(counter: &AtomicU64, n: u64) {
    counter.fetch_add(n, Ordering::Relaxed);
}
