//! [`Payload`]: what can be sent.

use std::sync::Arc;

use bytes::{Bytes, BytesMut};

use super::{ShmLoan, ShmSample};
use crate::pool::core::PoolCore;

/// Something that can be sent as a message: bytes, copied once into shared memory, or a [`ShmLoan`], not copied.
///
/// Implement it for a type of your own by `as_bytes` alone. A loan is sent without a copy by a publisher that shares
/// its pool; any other publisher copies it.
pub trait Payload: Sized {
    /// The message.
    fn as_bytes(&self) -> &[u8];

    /// Whether `into_loan` will succeed.
    #[doc(hidden)]
    fn is_loan_of(&self, _home: Home<'_>) -> bool {
        false
    }

    /// The loan that this is, for the pool that it is from.
    #[doc(hidden)]
    fn into_loan(self) -> Option<ShmLoan> {
        None
    }
}

/// Names a pool to the hidden part of [`Payload`].
#[doc(hidden)]
#[derive(Debug, Clone, Copy)]
pub struct Home<'a>(pub(crate) &'a Arc<PoolCore>);

impl Payload for ShmLoan {
    fn as_bytes(&self) -> &[u8] {
        self
    }

    fn is_loan_of(&self, home: Home<'_>) -> bool {
        self.segment().is_of(home.0)
    }

    fn into_loan(self) -> Option<ShmLoan> {
        Some(self)
    }
}

impl<T: AsRef<[u8]> + ?Sized> Payload for &T {
    fn as_bytes(&self) -> &[u8] {
        (**self).as_ref()
    }
}

macro_rules! payload_by_as_ref {
    ($($owned:ty),+ $(,)?) => {$(
        impl Payload for $owned {
            fn as_bytes(&self) -> &[u8] {
                self.as_ref()
            }
        }
    )+};
}

payload_by_as_ref!(Vec<u8>, String, Box<[u8]>, Arc<[u8]>, Bytes, BytesMut, ShmSample);

impl<const N: usize> Payload for [u8; N] {
    fn as_bytes(&self) -> &[u8] {
        self
    }
}
