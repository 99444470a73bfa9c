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
    RuntimeDir(RuntimeDirError),
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
    /// All processes of the host together have as many files open as they may.
    #[error(
        "no descriptor is left on this host to open the topic with: fs.file-max is {limit}; raise it (`sysctl -w \
         fs.file-max=…`), or end who has so many open"
    )]
    HostDescriptors {
        /// The limit.
        limit: Limit,
        /// The error of the OS.
        source: io::Error,
    },
    /// The file system of the runtime directory is full.
    #[error(
        "{action} failed: no space is left where the runtime directory is; make some there, or name another directory in \
         TOKIO_SHM_DIR"
    )]
    Full {
        /// What was tried.
        action: &'static str,
        /// The error of the OS.
        source: io::Error,
    },
    /// This process may not read or change what is in the runtime directory.
    #[error(
        "{action} failed: the runtime directory, or something in it, is read-only or closed to this process; open it, or name \
         another directory in TOKIO_SHM_DIR"
    )]
    NotPermitted {
        /// What was tried.
        action: &'static str,
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

impl From<RuntimeDirError> for DiscoveryError {
    fn from(error: RuntimeDirError) -> Self {
        match error {
            RuntimeDirError::Open { source, .. } if Errno::from_io_error(&source) == Some(Errno::MFILE) => {
                Self::Descriptors { limit: Limit::open_files(), source }
            }
            RuntimeDirError::Open { source, .. } if Errno::from_io_error(&source) == Some(Errno::NFILE) => {
                Self::HostDescriptors { limit: Limit::files(), source }
            }
            error => Self::RuntimeDir(error),
        }
    }
}

impl DiscoveryError {
    /// Whether it was for want of a descriptor, or the like, and may succeed once there is one.
    pub(crate) fn is_shortage(&self) -> bool {
        use WatchError::{Instances, Watches};
        matches!(
            self,
            Self::Descriptors { .. }
                | Self::HostDescriptors { .. }
                | Self::Watch(Instances { .. } | Watches { .. } | WatchError::Descriptors { .. })
        )
    }

    pub(super) fn os(action: &'static str) -> impl Fn(Errno) -> Self {
        move |errno| Self::io(action)(errno.into())
    }

    pub(crate) fn io(action: &'static str) -> impl Fn(io::Error) -> Self {
        move |source| match Errno::from_io_error(&source) {
            Some(Errno::MFILE) => Self::Descriptors { limit: Limit::open_files(), source },
            Some(Errno::NFILE) => Self::HostDescriptors { limit: Limit::files(), source },
            Some(Errno::NOSPC | Errno::DQUOT) => Self::Full { action, source },
            Some(Errno::ROFS | Errno::ACCESS | Errno::PERM) => Self::NotPermitted { action, source },
            _ => Self::Os { action, source },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Not by using them up: that would be everybody's.
    #[test]
    fn limit_files_of_the_host_says_so_and_is_tried_again() {
        let error = DiscoveryError::io("x")(Errno::NFILE.into());
        assert!(error.is_shortage() && error.to_string().contains("sysctl -w fs.file-max="), "{error}");
        let receive = crate::RecvError::from(error);
        assert!(matches!(receive, crate::RecvError::OutOfResources { .. }), "{receive}");
    }
}
