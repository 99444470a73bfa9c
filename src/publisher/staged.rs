//! A message on its way to acceptance: in shared memory, with what it was made of, in case it has to be given back.

use std::sync::Arc;

use super::{SendError, SendErrorKind};
use crate::buffer::{Home, Payload, ShmLoan};
use crate::pool::PooledSegment;
use crate::pool::core::Slot;

/// A message that was not accepted yet. Two pointers at most: it is moved on every message's way.
pub(super) struct Staged<B> {
    /// `None` once a loan was accepted.
    buf: Option<B>,
    /// Where it was copied to, unless it is a loan itself.
    copy: Option<PooledSegment>,
}

impl<B: Payload> Staged<B> {
    #[inline]
    pub(super) fn new(buf: B) -> Self {
        Self { buf: Some(buf), copy: None }
    }

    /// Whether it is in shared memory already.
    #[inline]
    pub(super) fn is_ready(&self, home: Home<'_>) -> bool {
        self.copy.is_some() || self.buf.as_ref().is_some_and(|buf| buf.is_loan_of(home))
    }

    #[inline]
    pub(super) fn bytes(&self) -> &[u8] {
        self.buf.as_ref().map_or(&[], B::as_bytes)
    }

    /// Copies it to where there is room for as much as it is long; how much that was.
    #[inline]
    pub(super) fn copy_to(&mut self, mut segment: PooledSegment) -> usize {
        let bytes = self.bytes();
        // A `Payload` of the user's may not give the same bytes twice.
        let len = bytes.len().min(segment.len());
        segment[..len].copy_from_slice(&bytes[..len]);
        kill_point!("send: copied");
        self.copy = Some(segment);
        len
    }

    /// The accepted message; called once.
    #[inline]
    pub(super) fn take(&mut self) -> Arc<Slot> {
        let loan = || self.buf.take().and_then(B::into_loan).map(ShmLoan::into_segment);
        let segment = self.copy.take().or_else(loan);
        segment.expect("a message is accepted once, and is_loan_of told the truth").into_slot()
    }

    #[cold]
    pub(super) fn into_error(self, kind: impl Into<SendErrorKind>) -> SendError<B::Returned> {
        let buf = self.buf.expect("a message is given back only if it was not accepted");
        SendError::new(kind, buf.into_returned())
    }

    /// Gives it back, not accepted.
    pub(super) fn into_buf(self) -> B {
        self.buf.expect("a message is given back only if it was not accepted")
    }
}
