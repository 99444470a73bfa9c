//! Limits of the process and of the host, as error messages name them.

use rustix::process::{Resource, getrlimit};
use std::fmt;

/// A soft limit, or none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limit(Option<u64>);

impl Limit {
    /// The limit, or `None` where there is none (or it cannot be read).
    #[must_use]
    pub fn get(self) -> Option<u64> {
        self.0
    }

    /// The soft `RLIMIT_NOFILE`: how many descriptors the process may have open.
    pub(crate) fn open_files() -> Self {
        Self(getrlimit(Resource::Nofile).current)
    }

    /// The soft `RLIMIT_MEMLOCK`, in bytes.
    pub(crate) fn locked_memory() -> Self {
        Self(getrlimit(Resource::Memlock).current)
    }

    /// The soft `RLIMIT_AS`, in bytes.
    pub(crate) fn address_space() -> Self {
        Self(getrlimit(Resource::As).current)
    }

    /// The soft `RLIMIT_FSIZE`, in bytes.
    pub(crate) fn file_size() -> Self {
        Self(getrlimit(Resource::Fsize).current)
    }

    /// `fs.file-max`: how many files all processes of the host may have open.
    pub(crate) fn files() -> Self {
        Self::sysctl("/proc/sys/fs/file-max")
    }

    /// A number under `/proc/sys`.
    pub(crate) fn sysctl(path: &str) -> Self {
        Self(std::fs::read_to_string(path).ok().and_then(|text| text.trim().parse().ok()))
    }
}

impl fmt::Display for Limit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(limit) => limit.fmt(f),
            None => f.write_str("unlimited or unknown"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Limit;

    #[test]
    fn limit_of_a_sysctl_that_is_missing_reads_unknown() {
        assert_eq!(Limit::sysctl("/proc/sys/no/such/limit").to_string(), "unlimited or unknown");
        assert!(Limit::sysctl("/proc/sys/fs/inotify/max_user_watches").get().is_some());
    }
}
