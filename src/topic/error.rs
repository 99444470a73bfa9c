//! Why a topic's directory cannot be used.

use super::runtime_dir::RuntimeDirError;
use crate::sys::inotify::WatchError;
use crate::sys::limits::Limit;
use rustix::io::Errno;
use std::io;

/// Publishers and subscribers cannot find each other.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DiscoveryError {
    /// The directory that all topics live in cannot be used.
    #[error(transparent)]
    RuntimeDir(#[from] RuntimeDirError),
    /// The topic's directory cannot be watched.
    #[error(transparent)]
    Watch(#[from] WatchError),
    /// The process has as many descriptors open as it may.
    #[error(
        "no descriptor is left to open the topic with: the limit RLIMIT_NOFILE is {limit}; raise it (`ulimit -n`, or \
         LimitNOFILE= in a systemd unit)"
    )]
    Descriptors {
        /// The soft limit.
        limit: Limit,
        /// The error of the OS.
        source: io::Error,
    },
    /// The topic's directory was removed again each time that it had been made.
    #[error(
        "the topic's directory was removed {attempts} times while it was being opened; is something cleaning up there?"
    )]
    Contended {
        /// How often it was tried.
        attempts: usize,
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

impl DiscoveryError {
    pub(super) fn os(action: &'static str) -> impl Fn(Errno) -> Self {
        move |errno| Self::io(action)(errno.into())
    }

    pub(super) fn io(action: &'static str) -> impl Fn(io::Error) -> Self {
        move |source| {
            if source.raw_os_error() == Some(Errno::MFILE.raw_os_error()) {
                Self::Descriptors { limit: Limit::open_files(), source }
            } else {
                Self::Os { action, source }
            }
        }
    }
}
