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
/// There are *notices*, after which receiving goes on, and *ends*, after which nothing ever comes: [`Closed`](Self::Closed),
/// [`Forked`](Self::Forked) and [`Io`](Self::Io). [`is_terminal`](Self::is_terminal) tells them apart. A program that is to run for
/// months logs the notices and leaves its loop at an end:
///
/// ```no_run
/// # async fn f(mut subscriber: tokio_shm::ShmSubscriber) -> Result<(), tokio_shm::RecvError> {
/// loop {
///     match subscriber.recv().await {
///         Ok(sample) => println!("{} bytes", sample.len()),
///         Err(end) if end.is_terminal() => return Err(end),
///         Err(notice) => eprintln!("{notice}"),
///     }
/// }
/// # }
/// ```
///
/// After an end every call returns [`Closed`](Self::Closed), or [`Forked`](Self::Forked) again, and the
/// [`Stream`](futures::Stream) is over.
#[derive(thiserror::Error)]
#[non_exhaustive]
pub enum RecvError {
    /// So many messages of a publisher were dropped because this subscriber was full, or were sent while it was being
    /// connected. The next message of that publisher is the one after them.
    ///
    /// Exact, save the first of a publisher after this subscriber has connected to it: never too few, but messages from just before
    /// may be counted as well. Those are up to fifteen of a publisher in a rush (messages less than two microseconds apart), and
    /// more only where it accepted the connection so late that 512 batches had been sent meanwhile: then up to a sixteenth of these.
    #[error("{missed} messages of publisher {publisher:032x} were missed; {}", advice(*all_held))]
    #[non_exhaustive]
    Lagged {
        /// The id of the publisher.
        publisher: u128,
        /// How many messages.
        missed: u64,
        /// Whether this process holds as many samples of the publisher as the subscriber's depth allows, when this is told: then
        /// it is not slow, but keeps too many.
        all_held: bool,
    },
    /// A publisher has closed, and everything that it had accepted was received or counted before this. Only with
    /// [`publisher_events`](crate::ShmSubscriberBuilder::publisher_events).
    #[error("publisher {publisher:032x} has closed; nothing of it is missing beyond what was told")]
    PublisherClosed {
        /// The id of the publisher.
        publisher: u128,
    },
    /// A publisher is gone without closing, killed most likely: messages that it had accepted may be missing.
    #[error("publisher {publisher:032x} was lost; messages that it had accepted may be missing")]
    PublisherLost {
        /// The id of the publisher.
        publisher: u128,
    },
    /// A publisher disconnected this subscriber because it kept senders waiting for too long.
    ///
    /// The next call connects to it again: who receives is not stuck any more. What it sends between this and then is missed, and
    /// not counted.
    #[error(
        "publisher {publisher:032x} disconnected us for being stuck; receive faster or choose OnFull::DropOldest"
    )]
    Evicted {
        /// The id of the publisher.
        publisher: u128,
    },
    /// A publisher would not have this subscriber.
    ///
    /// One that had too many subscribers, or no memory or descriptors for another, or whose evicted samples this subscriber still keeps, is
    /// tried again: after a twentieth of a second at
    /// first and every two seconds at last, for as long as something is awaited. That it goes on refusing is not told again. What it
    /// sends meanwhile is missed, and not counted.
    #[error("publisher {publisher:032x} refused the connection: {reason}")]
    Refused {
        /// The id of the publisher.
        publisher: u128,
        /// What it said.
        reason: String,
    },
    /// This program itself holds so many samples that no message can come before it drops one: of each publisher as many as
    /// the subscriber's [`depth`](crate::ShmSubscriberBuilder::depth), or, `in_bytes`, its share of the publisher's memory
    /// ([`link_bytes`](crate::ShmPublisherBuilder::link_bytes)).
    ///
    /// Told after a second of waiting, during which nothing came and nothing was dropped, and after each further one.
    #[error(
        "this program holds {held} samples, {}: no message can come before one is dropped; drop samples sooner, or raise {}",
        if *in_bytes { "all that its share of the publishers' memory allows" } else { "all that its depth allows" },
        if *in_bytes { "link_bytes or max_bytes of the publisher" } else { "depth" }
    )]
    #[non_exhaustive]
    AllHeld {
        /// How many samples, of all publishers.
        held: u64,
        /// Of a publisher at least they are not `depth`, but all the bytes that it lets one subscriber have.
        in_bytes: bool,
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
    /// The last publisher has closed, with
    /// [`end_with_last_publisher`](crate::ShmSubscriberBuilder::end_with_last_publisher); or an end was told before. For good.
    #[error("nothing more comes: the last publisher has closed the topic, or receiving ended before")]
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
    /// The system refused something that receiving cannot go on without. For good: every publisher was left.
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
            Self::Lagged { publisher, missed, all_held } => f
                .debug_struct("Lagged")
                .field("publisher", &Hex(*publisher))
                .field("missed", missed)
                .field("all_held", all_held)
                .finish(),
            Self::PublisherClosed { publisher } => of("PublisherClosed", publisher, f),
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
            Self::AllHeld { held, in_bytes } => {
                f.debug_struct("AllHeld").field("held", held).field("in_bytes", in_bytes).finish()
            }
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

impl RecvError {
    /// Whether this is the end: no further call has a message, ever. Else it is a notice, and receiving goes on.
    ///
    /// # Examples
    ///
    /// ```
    /// # use tokio_shm::RecvError;
    /// assert!(RecvError::Closed.is_terminal());
    /// assert!(!RecvError::TimedOut.is_terminal());
    /// ```
    pub fn is_terminal(&self) -> bool {
        match self {
            Self::Closed | Self::Forked | Self::Io(_) => true,
            Self::Lagged { .. }
            | Self::PublisherClosed { .. }
            | Self::PublisherLost { .. }
            | Self::Evicted { .. }
            | Self::Refused { .. }
            | Self::AllHeld { .. }
            | Self::PeerMisbehaved { .. }
            | Self::OutOfResources { .. }
            | Self::TimedOut => false,
        }
    }
}

/// What can be done about messages that were missed.
fn advice(all_held: bool) -> &'static str {
    if all_held {
        "this program holds all samples that its depth allows: drop some, or raise depth"
    } else {
        "receive faster, raise depth, choose OnFull::Wait, or, for what came before the connection, history"
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
