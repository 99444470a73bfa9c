//! Who is at the other end of a connection, as the kernel knows it.
//!
//! Asked by plain `getsockopt` into plain numbers: a peer in another pid namespace has the number 0, which rustix's `Pid` cannot hold.
//! It does not judge who may take part.
#![allow(unsafe_code)]

use std::ffi::c_int;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use rustix::process::Pid;

use crate::sys::ids;

/// Not in every version of libc that this builds with.
const SO_PEERPIDFD: c_int = if cfg!(any(target_arch = "sparc", target_arch = "sparc64")) { 0x56 } else { 77 };

/// Who is at the other end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct PeerCredentials {
    /// The process that connected, or that listened; `None` when it has no number in our pid namespace.
    pub(crate) pid: Option<Pid>,
    /// Its effective user then; `None` when that user has no number in our user namespace.
    pub(crate) uid: Option<u32>,
    /// Its effective group then, likewise.
    pub(crate) gid: Option<u32>,
}

/// Reads an option that is a plain structure of numbers, for which every bit pattern is a value.
///
/// # Safety
/// `T` is valid whatever its bytes are.
unsafe fn option<T: Copy>(socket: BorrowedFd<'_>, name: c_int) -> io::Result<T> {
    let mut value = MaybeUninit::<T>::zeroed();
    let size = libc::socklen_t::try_from(size_of::<T>()).expect("small");
    let mut len = size;
    let socket = socket.as_raw_fd();
    // SAFETY: `value` has room for `len` bytes, and both outlive the call, which writes nothing else.
    let outcome =
        unsafe { libc::getsockopt(socket, libc::SOL_SOCKET, name, value.as_mut_ptr().cast(), &raw mut len) };
    if outcome != 0 {
        return Err(io::Error::last_os_error());
    }
    if len != size {
        return Err(io::Error::other(format!("socket option {name} has {len} bytes where {size} were due")));
    }
    // SAFETY: zeroed, then written by the kernel: all of it is initialised, and by the caller's word any bytes will do.
    Ok(unsafe { value.assume_init() })
}

/// Who connected (seen from the side that accepted), or who listened (seen from the side that connected).
pub(super) fn credentials(socket: BorrowedFd<'_>) -> io::Result<PeerCredentials> {
    // SAFETY: three integers.
    let libc::ucred { pid, uid, gid } = unsafe { option(socket, libc::SO_PEERCRED) }?;
    Ok(PeerCredentials { pid: positive(pid), uid: ids::known_uid(uid), gid: ids::known_gid(gid) })
}

/// `Pid` takes no negative number either, and panics in debug builds.
fn positive(pid: i32) -> Option<Pid> {
    if pid > 0 { Pid::from_raw(pid) } else { None }
}

/// A descriptor of the peer's process, whatever its pid namespace. Since Linux 6.5; close-on-exec.
///
/// # Errors
/// `ESRCH` (from Linux 6.16 on, at the latest) or `EINVAL` (before) when the process has ended and was waited for; `ENOPROTOOPT` before
/// Linux 6.5; anything in a sandbox.
pub(super) fn pidfd(socket: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    // SAFETY: an integer.
    let fd: c_int = unsafe { option(socket, SO_PEERPIDFD) }?;
    if fd < 0 {
        return Err(io::Error::from_raw_os_error(libc::EBADF));
    }
    // SAFETY: the kernel has just made it for this call, so it is open and owned by nothing else.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn process_without_a_number_here_is_none() {
        assert_eq!(positive(0), None);
        assert_eq!(positive(-1), None);
        assert_eq!(positive(7), Pid::from_raw(7));
    }
}
