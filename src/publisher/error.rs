//! What can go wrong when publishing, one type an operation.

use std::fmt;

use crate::pool::TakeError;
use crate::sys::memory::MemoryError;
use crate::topic::{DiscoveryError, TopicError};

/// Why [`ShmPublisher::bind`](crate::ShmPublisher::bind) failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BindError {
    /// The topic's name cannot be used.
    #[error(transparent)]
    Topic(#[from] TopicError),
    /// The topic cannot be opened in the runtime directory.
    #[error(transparent)]
    Discovery(#[from] DiscoveryError),
    /// The pool that it was to share was made before this process was forked.
    #[error(
        "the shared pool was made before this process was forked and belongs to the parent: make one in this process"
    )]
    Forked,
    /// There is no runtime for the tx task.
    #[error(
        "no tokio runtime: call bind inside one, or give its Handle to ShmPublisher::builder(topic).runtime(handle)"
    )]
    NoRuntime,
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
    /// The system refused something else that a publisher needs.
    #[error("cannot publish topic {topic:?}")]
    Io {
        /// The topic.
        topic: String,
        /// Why.
        source: std::io::Error,
    },
}

/// What a child is told of its parent's publisher.
const FORKED: &str = "the publisher was bound before this process was forked and belongs to the parent: bind the topic again in \
                      this process";

/// Why a loan could not be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LoanError {
    /// The publisher is closed, or its tx task is gone with its runtime.
    #[error("the publisher is closed: bind the topic again to go on")]
    Closed,
    /// The publisher was bound before this process was forked.
    #[error("{FORKED}")]
    Forked,
    /// The pool has none. Boxed, so that a loan is handed on in registers: by way of memory it takes longer than to find it.
    #[error(transparent)]
    Pool(Box<TakeError>),
}

impl LoanError {
    /// Whether everything that the cap allows is in use just now; only from [`try_loan`](crate::ShmPublisher::try_loan).
    pub fn is_full(&self) -> bool {
        matches!(self, Self::Pool(error) if matches!(**error, TakeError::Full { .. }))
    }
}

impl From<TakeError> for LoanError {
    #[cold]
    fn from(error: TakeError) -> Self {
        Self::Pool(Box::new(error))
    }
}

/// Why a message was not accepted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SendErrorKind {
    /// The publisher is closed, or its tx task is gone with its runtime.
    #[error("the publisher is closed: bind the topic again to go on")]
    Closed,
    /// The publisher was bound before this process was forked.
    #[error("{FORKED}")]
    Forked,
    /// Subscribers are behind and the queue is full; only from `try_send`.
    #[error(
        "the queue is full: wait with send, lengthen it with builder().queue, or let slow subscribers lose messages"
    )]
    Full,
    /// The time given ran out first; only from the calls that take one.
    #[error("the subscribers made no room in time")]
    TimedOut,
    /// There was no memory to copy it into. Boxed, as in [`LoanError::Pool`].
    #[error(transparent)]
    Pool(Box<TakeError>),
}

impl SendErrorKind {
    /// Whether everything that the pool's cap allows is in use just now.
    pub(super) fn is_pool_full(&self) -> bool {
        matches!(self, Self::Pool(error) if matches!(**error, TakeError::Full { .. }))
    }
}

impl From<LoanError> for SendErrorKind {
    #[cold]
    fn from(error: LoanError) -> Self {
        match error {
            LoanError::Closed => Self::Closed,
            LoanError::Forked => Self::Forked,
            LoanError::Pool(error) if matches!(*error, TakeError::TimedOut { .. }) => Self::TimedOut,
            LoanError::Pool(error) => Self::Pool(error),
        }
    }
}

/// A message that was not sent, and why. Nothing of it was seen by any subscriber.
///
/// `B` is what was to be sent, or `()` where that was only borrowed; see [`Payload`](crate::Payload).
pub struct SendError<B> {
    kind: SendErrorKind,
    buf: B,
}

impl<B> SendError<B> {
    pub(crate) fn new(kind: impl Into<SendErrorKind>, buf: B) -> Self {
        Self { kind: kind.into(), buf }
    }

    /// Why it was not sent.
    pub fn kind(&self) -> &SendErrorKind {
        &self.kind
    }

    /// Whether the publisher is closed: no later send will succeed either.
    pub fn is_closed(&self) -> bool {
        matches!(self.kind, SendErrorKind::Closed)
    }

    /// Whether there was no room just now, in the queue or in the pool.
    pub fn is_full(&self) -> bool {
        matches!(self.kind, SendErrorKind::Full) || self.kind.is_pool_full()
    }

    /// Whether the time ran out.
    pub fn is_timed_out(&self) -> bool {
        matches!(self.kind, SendErrorKind::TimedOut)
    }

    /// The message, unsent.
    pub fn into_inner(self) -> B {
        self.buf
    }
}

/// What the `Sink` of a publisher can run into.
pub struct SinkError<B> {
    kind: SendErrorKind,
    buf: Option<B>,
}

impl<B> SinkError<B> {
    pub(crate) fn new(kind: SendErrorKind, buf: Option<B>) -> Self {
        Self { kind, buf }
    }

    /// What it is.
    pub fn kind(&self) -> &SendErrorKind {
        &self.kind
    }

    /// The message that was not accepted, if there was one.
    pub fn into_inner(self) -> Option<B> {
        self.buf
    }
}

// The message itself is left out of both, so that it need not be `Debug`.
macro_rules! error_about_a_message {
    ($($name:ident),+) => {$(
        impl<B> fmt::Debug for $name<B> {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.debug_struct(stringify!($name)).field("kind", &self.kind).finish_non_exhaustive()
            }
        }

        impl<B> fmt::Display for $name<B> {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "not sent: {}", self.kind)
            }
        }

        impl<B> std::error::Error for $name<B> {
            fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
                std::error::Error::source(&self.kind)
            }
        }
    )+};
}

error_about_a_message!(SendError, SinkError);

/// Why a flush or a close did not do what it should.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FlushError {
    /// The tx task went with its runtime while accepted messages were waiting.
    #[error("the publisher's runtime is gone: accepted messages may not have been delivered")]
    Closed,
    /// The publisher was bound before this process was forked. What the parent accepted, the parent delivers.
    #[error("{FORKED}")]
    Forked,
}

impl From<MemoryError> for LoanError {
    fn from(error: MemoryError) -> Self {
        TakeError::from(error).into()
    }
}
