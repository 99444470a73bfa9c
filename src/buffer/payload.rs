//! [`Payload`]: what can be sent.

use std::sync::Arc;

use bytes::{Bytes, BytesMut};

use super::{ShmLoan, ShmSample};
use crate::pool::core::PoolCore;

/// Something that can be sent as a message: bytes, copied once into shared memory, or a [`ShmLoan`], not copied.
///
/// A loan is sent without a copy by a publisher that shares its pool; any other publisher copies it. A
/// [`PooledSegment`](crate::PooledSegment) that is lent (`&segment`) is copied; to send it without a copy, make it a loan:
/// `ShmLoan::from(segment)`.
///
/// An array goes by value as well; one of many kilobytes is better lent (`&array[..]`): by value it is moved from hand to hand,
/// and an optimising compiler takes minutes over the moves of 100,000 bytes.
///
/// # Examples
///
/// For a type of your own:
///
/// ```
/// use tokio_shm::Payload;
///
/// struct Frame(Vec<u8>);
///
/// impl Payload for Frame {
///     type Returned = Self;
///
///     fn as_bytes(&self) -> &[u8] {
///         &self.0
///     }
///
///     fn into_returned(self) -> Self {
///         self
///     }
/// }
/// ```
pub trait Payload: Sized {
    /// What an error gives back of a message that was not sent: itself, or nothing for what is only borrowed (so that
    /// the error may outlive the borrow, as `?` in a function that returns `Box<dyn Error>` wants it).
    type Returned;

    /// The message. Whatever one call returns is sent as a whole; another call may return something else.
    ///
    /// It is called before the message is accepted, and where there was no memory at first once more. If it panics nothing is sent.
    fn as_bytes(&self) -> &[u8];

    /// Gives back a message that was not sent.
    fn into_returned(self) -> Self::Returned;

    // These two take what cannot be named outside of this crate, so that they cannot be overridden there: the second is called in
    // the middle of a delivery, where nothing of a user's may run.

    /// Whether `into_loan` will succeed.
    #[doc(hidden)]
    #[inline]
    fn is_loan_of(&self, _home: Home<'_>) -> bool {
        false
    }

    /// The loan that this is, for the pool that it is from.
    #[doc(hidden)]
    #[inline]
    fn into_loan(self, _sealed: Sealed) -> Option<ShmLoan> {
        None
    }
}

/// Names a pool to the hidden part of [`Payload`].
#[doc(hidden)]
#[derive(Debug, Clone, Copy)]
pub struct Home<'a>(pub(crate) &'a Arc<PoolCore>);

/// Seals the hidden part of [`Payload`].
///
/// ```compile_fail
/// struct Mine;
///
/// impl tokio_shm::Payload for Mine {
///     type Returned = Self;
///
///     fn as_bytes(&self) -> &[u8] {
///         &[]
///     }
///
///     fn into_returned(self) -> Self {
///         self
///     }
///
///     fn into_loan(self) -> Option<tokio_shm::ShmLoan> {
///         panic!("in the middle of a delivery")
///     }
/// }
/// ```
#[doc(hidden)]
#[derive(Debug, Clone, Copy)]
pub struct Sealed(pub(crate) ());

impl Payload for ShmLoan {
    type Returned = Self;

    fn into_returned(self) -> Self {
        self
    }

    fn as_bytes(&self) -> &[u8] {
        self
    }

    #[inline]
    fn is_loan_of(&self, home: Home<'_>) -> bool {
        self.segment().is_of(home.0)
    }

    #[inline]
    fn into_loan(self, _sealed: Sealed) -> Option<ShmLoan> {
        Some(self)
    }
}

impl<T: AsRef<[u8]> + ?Sized> Payload for &T {
    type Returned = ();

    fn into_returned(self) {}

    fn as_bytes(&self) -> &[u8] {
        (**self).as_ref()
    }
}

macro_rules! payload_by_as_ref {
    ($($owned:ty),+ $(,)?) => {$(
        impl Payload for $owned {
            type Returned = Self;

            fn into_returned(self) -> Self {
                self
            }

            fn as_bytes(&self) -> &[u8] {
                self.as_ref()
            }
        }
    )+};
}

payload_by_as_ref!(Vec<u8>, String, Box<[u8]>, Arc<[u8]>, Bytes, BytesMut, ShmSample);

impl<const N: usize> Payload for [u8; N] {
    type Returned = Self;

    fn into_returned(self) -> Self {
        self
    }

    fn as_bytes(&self) -> &[u8] {
        self
    }
}
