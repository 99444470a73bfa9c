//! [`Apart`]: what different threads or processes write, kept out of each other's cache lines.

use core::ops::Deref;

/// A value that shares its cache lines with no other: two of them, as the adjacent-line prefetcher of x86-64 pulls them in pairs.
#[derive(Debug)]
#[repr(C, align(128))]
pub(crate) struct Apart<T>(pub(crate) T);

impl<T> Deref for Apart<T> {
    type Target = T;

    #[inline]
    fn deref(&self) -> &T {
        &self.0
    }
}
