//! POSIX shared memory without leaving a name behind.

use super::MemoryError;
use super::error::open_failure;
use crate::sys::random::random_id;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::{fs, shm};
use std::os::fd::{AsRawFd, OwnedFd};

/// An object that has no name.
pub(super) struct Unnamed {
    pub(super) writable: OwnedFd,
    pub(super) read_only: OwnedFd,
}

/// Makes an object in the file system of `shm_open`, and opens it a second time for reading only.
///
/// It never has a name where `O_TMPFILE` is known there, which is wherever it is a tmpfs; so there is none to stay
/// behind when this process is killed.
pub(super) fn open_unnamed() -> Result<Unnamed, MemoryError> {
    let mode = Mode::RUSR | Mode::WUSR;
    match fs::open("/dev/shm", OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC, mode) {
        Ok(writable) => {
            let path = format!("/proc/self/fd/{}", writable.as_raw_fd());
            let read_only =
                fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).map_err(failure)?;
            Ok(Unnamed { writable, read_only })
        }
        Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::INVAL) => open_unlinked(),
        Err(errno) => Err(failure(errno)),
    }
}

/// The same by `shm_open` under a random name, which is unlinked at once, whatever happens.
///
/// A process killed in between leaves an empty file in `/dev/shm`: the pages come later.
fn open_unlinked() -> Result<Unnamed, MemoryError> {
    let id = random_id().map_err(|source| MemoryError::Os { action: "choosing a random name", source })?;
    let name = format!("/tokio-shm-{id:032x}");
    let flags = shm::OFlags::CREATE | shm::OFlags::EXCL | shm::OFlags::RDWR;
    let writable = shm::open(&name, flags, Mode::RUSR | Mode::WUSR).map_err(failure)?;
    let name = Name(name);
    let read_only = shm::open(&name.0, shm::OFlags::RDONLY, Mode::empty()).map_err(failure)?;
    Ok(Unnamed { writable, read_only })
}

fn failure(errno: Errno) -> MemoryError {
    open_failure("creating shared memory in /dev/shm", errno)
}

struct Name(String);

impl Drop for Name {
    fn drop(&mut self) {
        let _ = shm::unlink(&self.0);
    }
}
