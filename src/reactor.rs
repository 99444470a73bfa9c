//! File descriptors on tokio's reactor.
#![allow(unsafe_code)]

use std::io;
use std::mem::ManuallyDrop;
use std::ops::Deref;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::Arc;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::sys::bell::Bell;
use crate::sys::fork::Origin;

/// A descriptor by its owner, which keeps it open and the same for as long as it is registered.
#[derive(Debug)]
pub(crate) struct Registered<T> {
    raw: RawFd,
    owner: T,
}

impl<T> AsRawFd for Registered<T> {
    fn as_raw_fd(&self) -> RawFd {
        self.raw
    }
}

/// `T`'s descriptor, watched by the current runtime's reactor.
#[derive(Debug)]
pub(crate) struct Watched<T> {
    fd: ManuallyDrop<AsyncFd<Registered<T>>>,
    origin: Origin,
}

impl<T: AsFd> Watched<T> {
    /// Registers `owner`'s descriptor for reading, edge-triggered.
    ///
    /// # Panics
    ///
    /// Outside a tokio runtime, or in one whose I/O is not enabled.
    pub(crate) fn register(owner: T) -> io::Result<Self> {
        Self::register_for(owner, Interest::READABLE)
    }

    fn register_for(owner: T, interest: Interest) -> io::Result<Self> {
        let raw = owner.as_fd().as_raw_fd();
        let registered = Registered { raw, owner };
        // SAFETY: the descriptor number never changes and stays open until `owner` is dropped, which happens only
        // with or after the `AsyncFd` that has it: `Registered` gives no access by value or `&mut`, and the owners
        // that this crate passes (`OwnedFd` wrappers and `Arc`s of them) do not replace their descriptor.
        let watched = unsafe { AsyncFd::register_with_interest(registered, interest) };
        let watched = watched.map_err(|error| error.into_parts().1)?;
        Ok(Self { fd: ManuallyDrop::new(watched), origin: Origin::here() })
    }

    pub(crate) fn get(&self) -> &T {
        &self.fd.get_ref().owner
    }
}

impl Watched<Arc<Bell>> {
    /// Registers a bell: each ring makes it writable anew.
    ///
    /// # Panics
    ///
    /// As [`register`](Self::register).
    pub(crate) fn register_bell(bell: Arc<Bell>) -> io::Result<Self> {
        Self::register_for(bell, Interest::WRITABLE)
    }
}

impl<T> Deref for Watched<T> {
    type Target = AsyncFd<Registered<T>>;

    fn deref(&self) -> &Self::Target {
        &self.fd
    }
}

impl<T> Drop for Watched<T> {
    fn drop(&mut self) {
        // A child has its parent's epoll instance: to leave it there would be to make the parent deaf.
        if self.origin.is_here() {
            // SAFETY: `self` is not used any more: it is being dropped.
            unsafe { ManuallyDrop::drop(&mut self.fd) };
        }
    }
}
