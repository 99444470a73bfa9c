//! What is sent and what is received: [`ShmLoan`], [`Payload`], [`ShmSample`].

mod loan;
mod payload;
mod sample;

pub use self::loan::ShmLoan;
pub use self::payload::Payload;
pub(crate) use self::payload::{Home, Sealed};
pub(crate) use self::sample::RemoteSegment;
pub use self::sample::ShmSample;
