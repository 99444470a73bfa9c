//! Whether a peer's process is still there.
//!
//! A socket does not say when a process dies that has forked: the child holds it open too. A pidfd does.

use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, getpid, pidfd_open};
use std::io;
use std::os::fd::OwnedFd;

/// What can be known of a process.
#[derive(Debug)]
pub(crate) enum Process {
    /// It runs; the descriptor becomes readable when it ends. Close-on-exec.
    Running(OwnedFd),
    /// It has ended.
    Ended,
    /// It is this one, or has no number in this process's namespace, or the kernel will not tell: the socket has to do.
    Unknown,
}

impl Process {
    /// Looks up the process that the kernel named as a socket's peer.
    ///
    /// Between that process's end and this call its number may have been given to another one; then only the socket tells
    /// of its end.
    pub(crate) fn watch(pid: Option<Pid>) -> io::Result<Self> {
        let Some(pid) = pid.filter(|pid| *pid != getpid()) else { return Ok(Self::Unknown) };
        match pidfd_open(pid, PidfdFlags::empty()) {
            Ok(fd) => Ok(Self::Running(fd)),
            Err(Errno::SRCH) => Ok(Self::Ended),
            Err(errno @ (Errno::MFILE | Errno::NFILE | Errno::NOMEM)) => Err(errno.into()),
            // Before Linux 5.3, or forbidden by a sandbox.
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

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::event::{PollFd, PollFlags, Timespec, poll};

    #[test]
    fn process_that_ends_makes_its_descriptor_readable_and_is_then_known_to_have_ended() {
        let mut child =
            std::process::Command::new("cat").stdin(std::process::Stdio::piped()).spawn().unwrap();
        let pid = Pid::from_child(&child);
        let fd = Process::watch(Some(pid)).unwrap().into_fd().expect("a child can be watched");
        let ready = |seconds| {
            let timeout = Timespec { tv_sec: seconds, tv_nsec: 0 };
            poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&timeout)).unwrap() == 1
        };
        assert!(!ready(0));
        drop(child.stdin.take());
        assert!(ready(60));
        child.wait().unwrap();
        assert!(matches!(Process::watch(Some(pid)).unwrap(), Process::Ended));
        assert!(matches!(Process::watch(Some(getpid())).unwrap(), Process::Unknown));
    }
}
