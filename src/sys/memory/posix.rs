//! `shm_open` without leaving a name behind.

use super::MemoryError;
use super::error::open_failure;
use crate::sys::random::random_id;
use rustix::fs::Mode;
use rustix::shm;
use std::os::fd::OwnedFd;

/// An object that has no name any more.
pub(super) struct Unlinked {
    pub(super) writable: OwnedFd,
    pub(super) read_only: OwnedFd,
}

/// Makes an object under a random name, opens it a second time for reading only, and unlinks it, whatever happens.
///
/// A process killed in between leaves an empty file of no size in `/dev/shm`: the pages come later.
pub(super) fn open_unlinked() -> Result<Unlinked, MemoryError> {
    let id = random_id().map_err(|source| MemoryError::Os { action: "choosing a random name", source })?;
    let name = format!("/tokio-shm-{id:032x}");
    let opening = |errno| open_failure("creating shared memory in /dev/shm", errno);
    let flags = shm::OFlags::CREATE | shm::OFlags::EXCL | shm::OFlags::RDWR;
    let writable = shm::open(&name, flags, Mode::RUSR | Mode::WUSR).map_err(opening)?;
    let name = Name(name);
    let read_only = shm::open(&name.0, shm::OFlags::RDONLY, Mode::empty()).map_err(opening)?;
    Ok(Unlinked { writable, read_only })
}

struct Name(String);

impl Drop for Name {
    fn drop(&mut self) {
        let _ = shm::unlink(&self.0);
    }
}
