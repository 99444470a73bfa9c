//! Whether a peer's process is still there.
//!
//! A socket does not say when a process dies that has forked: the child holds it open too. A pidfd does.

use crate::sys::socket::Connection;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
#[cfg(test)]
use rustix::process::Pid;
use rustix::process::{PidfdFlags, getpid, pidfd_open};
use std::io;
use std::os::fd::OwnedFd;

/// What can be known of a process.
#[derive(Debug)]
pub(crate) enum Process {
    /// It runs; the descriptor becomes readable when it ends. Close-on-exec.
    Running(OwnedFd),
    /// It has ended.
    Ended,
    /// It is this one, or the kernel will not tell: the socket has to do, which does not end while a child has it open.
    Unknown,
}

impl Process {
    /// Finds the process at the other end of a connection.
    ///
    /// Since Linux 6.5 the kernel gives a descriptor of it, whatever namespace it is in. Before, it is found by its number,
    /// which may have been given to another process since, and which it has not outside of our pid namespace: then only the
    /// socket tells of its end.
    pub(crate) fn watch(peer: &Connection) -> io::Result<Self> {
        let pid = peer.peer_credentials()?.pid;
        if pid == Some(getpid()) {
            return Ok(Self::Unknown);
        }
        let given = peer.peer_pidfd().map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO));
        Self::of(given.or_else(|errno| match (errno, pid) {
            (Errno::SRCH | Errno::MFILE | Errno::NFILE | Errno::NOMEM, _) | (_, None) => Err(errno),
            (_, Some(pid)) => pidfd_open(pid, PidfdFlags::empty()),
        }))
    }

    fn of(found: Result<OwnedFd, Errno>) -> io::Result<Self> {
        match found {
            // Of a process that has ended there may still be a descriptor.
            Ok(fd) if has_ended(&fd)? => Ok(Self::Ended),
            Ok(fd) => Ok(Self::Running(fd)),
            Err(Errno::SRCH) => Ok(Self::Ended),
            Err(errno @ (Errno::MFILE | Errno::NFILE | Errno::NOMEM)) => Err(errno.into()),
            // Too old a Linux, or forbidden by a sandbox.
            Err(_) => Ok(Self::Unknown),
        }
    }

    /// What to wait on for its end.
    pub(crate) fn into_fd(self) -> Option<OwnedFd> {
        match self {
            Self::Running(fd) => Some(fd),
            Self::Ended | Self::Unknown => None,
        }
    }
}

fn has_ended(process: &OwnedFd) -> io::Result<bool> {
    let mut fds = [PollFd::new(process, PollFlags::IN)];
    loop {
        match poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })) {
            Ok(ready) => return Ok(ready != 0),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn process_that_ends_makes_its_descriptor_readable_and_is_then_known_to_have_ended() {
        let mut child =
            std::process::Command::new("cat").stdin(std::process::Stdio::piped()).spawn().unwrap();
        let open = || pidfd_open(Pid::from_child(&child), PidfdFlags::empty());
        let Process::Running(fd) = Process::of(open()).unwrap() else { panic!("a child can be watched") };
        assert!(!has_ended(&fd).unwrap());
        let zombie = open();
        drop(child.stdin.take());
        let timeout = Timespec { tv_sec: 60, tv_nsec: 0 };
        assert_eq!(poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&timeout)).unwrap(), 1);
        assert!(matches!(Process::of(zombie).unwrap(), Process::Ended));
        child.wait().unwrap();
        let gone = pidfd_open(Pid::from_child(&child), PidfdFlags::empty());
        assert!(matches!(Process::of(gone).unwrap(), Process::Ended));
    }

    #[test]
    fn process_that_cannot_be_watched_is_unknown_and_a_shortage_an_error() {
        for errno in [Errno::NOPROTOOPT, Errno::NOSYS, Errno::PERM, Errno::INVAL] {
            assert!(matches!(Process::of(Err(errno)).unwrap(), Process::Unknown));
        }
        assert!(Process::of(Err(Errno::MFILE)).is_err());
        let (ours, _theirs) = crate::sys::socket::pair().unwrap();
        assert!(matches!(Process::watch(&ours).unwrap(), Process::Unknown), "it is this one");
    }
}
