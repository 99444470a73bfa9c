//! A message on its way to acceptance: in shared memory, with what it was made of, in case it has to be given back.

use std::sync::Arc;

use super::{SendError, SendErrorKind};
use crate::buffer::{Home, Payload, Sealed, ShmLoan};
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

    /// How long it is. Of what is in shared memory that is final; else it is the user's word, who may say something else the next time.
    #[inline]
    pub(super) fn len(&self) -> usize {
        self.copy.as_ref().map_or_else(|| self.bytes().len(), |copy| copy.len())
    }

    /// What the user says that it is, just now.
    #[inline]
    fn bytes(&self) -> &[u8] {
        self.buf.as_ref().map_or(&[], B::as_bytes)
    }

    /// Copies it to where `find` finds memory for it; how much that was. The user is asked once.
    #[inline]
    pub(super) fn copy<E>(
        &mut self,
        find: impl FnOnce(&[u8]) -> Result<PooledSegment, E>,
    ) -> Result<usize, E> {
        let bytes = self.bytes();
        let len = bytes.len();
        let mut segment = find(bytes)?;
        segment.copy_from_slice(bytes);
        kill_point!("send: copied");
        self.copy = Some(segment);
        Ok(len)
    }

    /// Copies it into memory that was waited for. If it has become too long for that meanwhile it is not in shared memory yet, and the
    /// segment goes back to the pool. How long it is.
    #[cold]
    pub(super) fn copy_late(&mut self, mut segment: PooledSegment) -> usize {
        let copied = self.copy(|bytes| {
            if bytes.len() > segment.capacity() {
                return Err(bytes.len());
            }
            segment.set_len(bytes.len());
            Ok(segment)
        });
        copied.unwrap_or_else(|len| len)
    }

    /// The accepted message; called once.
    #[inline]
    pub(super) fn take(&mut self) -> Arc<Slot> {
        let loan = || self.buf.take()?.into_loan(Sealed(())).map(ShmLoan::into_segment);
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
