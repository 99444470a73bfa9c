//! What can go wrong when receiving, one type an operation.

use std::fmt;

use crate::link::Fault;
use crate::sys::memory::MemoryError;
use crate::text::Hex;
use crate::topic::{DiscoveryError, TopicError};

/// Why [`ShmSubscriber::connect`](crate::ShmSubscriber::connect) failed. That there is no publisher yet is no error.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConnectError {
    /// The topic's name cannot be used.
    #[error(transparent)]
    Topic(#[from] TopicError),
    /// The topic cannot be opened in the runtime directory, or not watched for publishers to come.
    #[error(transparent)]
    Discovery(#[from] DiscoveryError),
    /// A setting is out of its bounds.
    #[error("{what} must be between {min} and {max}, not {actual}")]
    OutOfBounds {
        /// The setting.
        what: &'static str,
        /// Its least value.
        min: u64,
        /// Its greatest value.
        max: u64,
        /// What was asked for.
        actual: u64,
    },
    /// The system refused something else that a subscriber needs.
    #[error("cannot subscribe to topic {topic:?}")]
    Io {
        /// The topic.
        topic: String,
        /// Why.
        source: std::io::Error,
    },
}

/// Why there is no message, or not the next one.
///
/// Only [`Closed`](Self::Closed), [`Forked`](Self::Forked) and [`Io`](Self::Io) are for good; after every other error the subscriber goes on,
/// and is connected to a publisher that comes back.
#[derive(thiserror::Error)]
#[non_exhaustive]
pub enum RecvError {
    /// So many messages of a publisher were dropped because this subscriber was full, or were sent while it was being
    /// connected. The next message of that publisher is the one after them.
    ///
    /// Exact, save the first of a publisher after this subscriber has connected to it: never too few, but messages from just before
    /// may be counted as well. Those are up to fifteen of a publisher in a rush (messages less than two microseconds apart), and
    /// more only where it accepted the connection so late that 512 batches had been sent meanwhile: then up to a sixteenth of these.
    #[error("{0} messages were missed; receive faster, raise depth, or choose OnFull::Wait")]
    Lagged(u64),
    /// A publisher is gone without closing, killed most likely: messages that it had accepted may be missing.
    #[error("publisher {publisher:032x} was lost; messages that it had accepted may be missing")]
    PublisherLost {
        /// The id of the publisher.
        publisher: u128,
    },
    /// A publisher disconnected this subscriber because it kept senders waiting for too long.
    #[error(
        "publisher {publisher:032x} disconnected us for being stuck; receive faster or choose OnFull::DropOldest"
    )]
    Evicted {
        /// The id of the publisher.
        publisher: u128,
    },
    /// A publisher would not have this subscriber.
    ///
    /// One that had too many subscribers, or no memory or descriptors for another, is tried again when a publisher comes to
    /// the topic or goes: not when it has room again, of which nobody tells. To try at once, connect anew.
    #[error("publisher {publisher:032x} refused the connection: {reason}")]
    Refused {
        /// The id of the publisher.
        publisher: u128,
        /// What it said.
        reason: String,
    },
    /// A publisher broke the protocol and was disconnected.
    #[error("publisher {publisher:032x} was disconnected because it {fault}")]
    PeerMisbehaved {
        /// The id of the publisher.
        publisher: u128,
        /// What it did.
        #[source]
        fault: Fault,
    },
    /// The last publisher has closed; only with
    /// [`end_with_last_publisher`](crate::ShmSubscriberBuilder::end_with_last_publisher).
    #[error("the last publisher has closed the topic")]
    Closed,
    /// This process has no descriptor or no memory left for what a publisher has sent, or to connect to one that came.
    /// Nothing is lost by it: what was sent stays where it is, and every further call tries again.
    #[error("{source}; nothing is lost: receive again once there is room")]
    OutOfResources {
        /// What there is too little of, and how to get more: a [`MemoryError`] or a
        /// [`DiscoveryError`].
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The subscriber was connected before this process was forked. It goes on in the parent, undisturbed; this is for good.
    #[error(
        "the subscriber was connected before this process was forked and belongs to the parent: connect again in this process"
    )]
    Forked,
    /// The time given ran out; only from the calls that take one.
    #[error("no message came in time")]
    TimedOut,
    /// The system refused something that receiving cannot go on without.
    #[error("cannot receive any more")]
    Io(#[source] std::io::Error),
}

impl fmt::Debug for RecvError {
    /// As derived, with ids as [`Display`](fmt::Display) has them.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let of = |name, publisher: &u128, f: &mut fmt::Formatter<'_>| {
            f.debug_struct(name).field("publisher", &Hex(*publisher)).finish()
        };
        match self {
            Self::Lagged(missed) => f.debug_tuple("Lagged").field(missed).finish(),
            Self::PublisherLost { publisher } => of("PublisherLost", publisher, f),
            Self::Evicted { publisher } => of("Evicted", publisher, f),
            Self::Refused { publisher, reason } => f
                .debug_struct("Refused")
                .field("publisher", &Hex(*publisher))
                .field("reason", reason)
                .finish(),
            Self::PeerMisbehaved { publisher, fault } => f
                .debug_struct("PeerMisbehaved")
                .field("publisher", &Hex(*publisher))
                .field("fault", fault)
                .finish(),
            Self::Closed => f.write_str("Closed"),
            Self::OutOfResources { source } => {
                f.debug_struct("OutOfResources").field("source", source).finish()
            }
            Self::Forked => f.write_str("Forked"),
            Self::TimedOut => f.write_str("TimedOut"),
            Self::Io(source) => f.debug_tuple("Io").field(source).finish(),
        }
    }
}

impl From<MemoryError> for RecvError {
    /// Of a shortage.
    fn from(error: MemoryError) -> Self {
        Self::OutOfResources { source: error.into() }
    }
}

impl From<DiscoveryError> for RecvError {
    fn from(error: DiscoveryError) -> Self {
        if error.is_shortage() {
            Self::OutOfResources { source: error.into() }
        } else {
            Self::Io(std::io::Error::other(error))
        }
    }
}

impl From<std::io::Error> for RecvError {
    /// Of a call that waiting needs.
    fn from(error: std::io::Error) -> Self {
        match DiscoveryError::io("waiting for messages")(error) {
            DiscoveryError::Os { source, .. } => Self::Io(source),
            shortage => shortage.into(),
        }
    }
}

/// Why [`ShmSubscriber::try_recv`](crate::ShmSubscriber::try_recv) has no message.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TryRecvError {
    /// There is none now.
    #[error("there is no message now")]
    Empty,
    /// What [`recv`](crate::ShmSubscriber::recv) would have returned.
    #[error(transparent)]
    Recv(#[from] RecvError),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn debug_has_ids_as_display_has_them() {
        let id = "0".repeat(30) + "ab";
        for error in [
            RecvError::PublisherLost { publisher: 0xab },
            RecvError::Evicted { publisher: 0xab },
            RecvError::Refused { publisher: 0xab, reason: String::new() },
        ] {
            assert!(error.to_string().contains(&id) && format!("{error:?}").contains(&id), "{error:?}");
        }
    }
}
