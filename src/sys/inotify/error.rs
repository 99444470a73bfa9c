//! Why a directory cannot be watched, and what to do about it.

use crate::sys::limits::Limit;
use rustix::io::Errno;
use std::io;
use std::os::fd::BorrowedFd;

/// The runtime directory cannot be watched for publishers that come and go.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WatchError {
    /// Programs of this user hold all inotify instances; a process needs one for every 250 subscribers.
    #[error(
        "no inotify instance is left for this user: fs.inotify.max_user_instances is {limit}; raise it (`sysctl -w \
         fs.inotify.max_user_instances=1024`) or end a program that holds many"
    )]
    Instances {
        /// The limit, for all processes of the user.
        limit: Limit,
        /// The error of the OS.
        source: io::Error,
    },
    /// This user watches as many files as it may.
    #[error(
        "no inotify watch is left for this user: fs.inotify.max_user_watches is {limit}; raise it (`sysctl -w \
         fs.inotify.max_user_watches=524288`)"
    )]
    Watches {
        /// The limit, for all processes of the user.
        limit: Limit,
        /// The error of the OS.
        source: io::Error,
    },
    /// The process has as many descriptors open as it may.
    #[error(
        "no descriptor is left to watch a directory with: the limit RLIMIT_NOFILE is {limit}; raise it (`ulimit -n`, or \
         LimitNOFILE= in a systemd unit)"
    )]
    Descriptors {
        /// The soft limit.
        limit: Limit,
        /// The error of the OS.
        source: io::Error,
    },
    /// Something else.
    #[error("{action} failed")]
    Os {
        /// What was tried.
        action: &'static str,
        /// The error of the OS.
        source: io::Error,
    },
}

impl WatchError {
    /// Of an epoll instance or an eventfd. (ENOSPC here is epoll's own limit, which counts in tens of thousands.)
    pub(super) fn descriptor(source: io::Error) -> Self {
        if source.raw_os_error() == Some(Errno::MFILE.raw_os_error()) {
            Self::Descriptors { limit: Limit::open_files(), source }
        } else {
            Self::Os { action: "making a descriptor to wait on", source }
        }
    }

    /// Of `inotify_init`, which says EMFILE for want of an instance and of a descriptor alike. `any` is one to copy: if that
    /// fails too, it is the descriptors.
    pub(super) fn instance(errno: Errno, any: BorrowedFd<'_>) -> Self {
        match errno {
            Errno::MFILE if any.try_clone_to_owned().is_ok() => Self::Instances {
                limit: Limit::sysctl("/proc/sys/fs/inotify/max_user_instances"),
                source: errno.into(),
            },
            Errno::MFILE => Self::Descriptors { limit: Limit::open_files(), source: errno.into() },
            _ => Self::Os { action: "making an inotify instance", source: errno.into() },
        }
    }

    pub(super) fn watch(errno: Errno) -> Self {
        match errno {
            Errno::NOSPC => Self::Watches {
                limit: Limit::sysctl("/proc/sys/fs/inotify/max_user_watches"),
                source: errno.into(),
            },
            _ => Self::Os { action: "watching a directory", source: errno.into() },
        }
    }

    pub(super) fn reading(errno: Errno) -> Self {
        Self::Os { action: "reading inotify events", source: errno.into() }
    }
}
