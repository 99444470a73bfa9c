//! What can go wrong with shared memory, and what to do about it.

use super::Backing;
use crate::sys::limits::Limit;
use rustix::io::Errno;
use std::io;
use std::path::PathBuf;

/// Shared memory could not be made, or what a peer sent is not what it should be.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MemoryError {
    /// Zero, or more than the address space can hold.
    #[error("{len} bytes is not a length that shared memory can have")]
    InvalidLength {
        /// The length asked for.
        len: usize,
    },
    /// The process has as many descriptors open as it may.
    #[error(
        "no descriptor is left for shared memory: the limit RLIMIT_NOFILE is {limit}; raise it (`ulimit -n`, or \
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
        "no descriptor is left on this host for shared memory: fs.file-max is {limit}; raise it (`sysctl -w fs.file-max=…`), \
         or end who has so many open"
    )]
    HostDescriptors {
        /// The limit.
        limit: Limit,
        /// The error of the OS.
        source: io::Error,
    },
    /// There is no memory left, in the host or in the container.
    #[error(
        "no memory for {len} bytes of shared memory: the host or the container has none left; lower max_bytes, or give it \
         more"
    )]
    OutOfMemory {
        /// The length asked for.
        len: usize,
        /// The error of the OS.
        source: io::Error,
    },
    /// A control group, the process's own or one above it, leaves no room for so much; more would have the OOM killer end a process.
    #[error(
        "no memory for {len} bytes of shared memory: of the {limit} bytes that {} allows, {free} are free, less a reserve; lower \
         max_bytes, or raise it (`docker run --memory`, MemoryMax= and MemoryHigh= in a systemd unit, resources.limits.memory of \
         a pod)", file.display()
    )]
    ControlGroup {
        /// The length asked for.
        len: usize,
        /// What may still be allocated, in bytes, less what is left to the rest of the group: a sixteenth of the limit, 64 MiB at
        /// most.
        free: u64,
        /// The limit, in bytes.
        limit: u64,
        /// The file that sets it.
        file: PathBuf,
    },
    /// No file of the process may be so long; a segment is a file.
    #[error(
        "cannot make {len} bytes of shared memory: the limit RLIMIT_FSIZE is {limit} bytes; raise it (`ulimit -f`, or \
         LimitFSIZE= in a systemd unit)"
    )]
    FileSize {
        /// The length asked for.
        len: usize,
        /// The soft limit, in bytes.
        limit: Limit,
    },
    /// Signals came faster than a page could be allocated.
    #[error(
        "cannot allocate {len} bytes of shared memory: signals interrupt each call; have fewer of them, or block them on the \
         threads that loan and send"
    )]
    Interrupted {
        /// The length asked for.
        len: usize,
        /// The error of the OS.
        source: io::Error,
    },
    /// Its maker has not allocated all of it, and there is not the memory to do so here.
    #[error(
        "up to {missing} of {len} bytes of shared memory were never allocated by who made it, and there is no memory for them"
    )]
    Unallocated {
        /// The length of what was to be read.
        len: usize,
        /// How much of it may not have been allocated, in bytes.
        missing: u64,
    },
    /// The process may not map any more.
    #[error(
        "cannot map {len} bytes of shared memory: the limit RLIMIT_AS is {address_space} bytes (`ulimit -v` counts in KiB, or \
         LimitAS= in a systemd unit), and vm.max_map_count {mappings} mappings; raise the one that was reached"
    )]
    AddressSpace {
        /// The length asked for.
        len: usize,
        /// The soft limit of the process's addresses, in bytes.
        address_space: Limit,
        /// How many mappings a process may have.
        mappings: Limit,
        /// The error of the OS.
        source: io::Error,
    },
    /// `/dev/shm` is full, which only [`Backing::PosixShm`] needs.
    #[error(
        "no room for {len} bytes in /dev/shm: it has {total} bytes, of which {free} are free; enlarge it (`docker run \
         --shm-size`), or use the memfd backing, which does not need it"
    )]
    DevShmFull {
        /// The length asked for.
        len: usize,
        /// The size of `/dev/shm`, in bytes.
        total: u64,
        /// What of it is free, in bytes.
        free: u64,
        /// The error of the OS.
        source: io::Error,
    },
    /// The memory was to be locked, and the process may not lock so much.
    #[error(
        "cannot lock {len} bytes of shared memory: the limit RLIMIT_MEMLOCK is {limit} bytes for the whole process; raise \
         it (`ulimit -l` counts in KiB, or LimitMEMLOCK= in a systemd unit), or turn lock_memory off"
    )]
    Lock {
        /// The length asked for.
        len: usize,
        /// The soft limit, in bytes.
        limit: Limit,
        /// The error of the OS.
        source: io::Error,
    },
    /// The peer sent a descriptor of something else.
    #[error("the peer sent a descriptor that is not shared memory")]
    NotSharedMemory,
    /// The peer sent shared memory that it, or another, could still take away.
    #[error("the peer sent shared memory without the seals it must have; missing: {missing}")]
    MissingSeals {
        /// The names of the seals, as in `F_SEAL_…`.
        missing: String,
    },
    /// The peer sent shared memory of another size than it said.
    #[error("the peer sent shared memory of {found} bytes where {expected} were announced")]
    WrongSize {
        /// The size announced.
        expected: u64,
        /// The size it has.
        found: u64,
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

impl MemoryError {
    pub(super) fn os(action: &'static str) -> impl Fn(Errno) -> Self {
        move |errno| Self::Os { action, source: errno.into() }
    }

    pub(super) fn opening(action: &'static str) -> impl Fn(Errno) -> Self {
        move |errno| open_failure(action, errno)
    }

    pub(super) fn mapping(len: usize) -> impl Fn(Errno) -> Self {
        move |errno| match errno {
            Errno::NOMEM => Self::AddressSpace {
                len,
                address_space: Limit::address_space(),
                mappings: Limit::sysctl("/proc/sys/vm/max_map_count"),
                source: errno.into(),
            },
            _ => Self::Os { action: "mapping shared memory", source: errno.into() },
        }
    }

    /// Of a peer's packet, with shared memory in it, that was not received. `Err`: it was not for want of a descriptor.
    pub(crate) fn receiving(source: io::Error) -> Result<Self, io::Error> {
        match Errno::from_io_error(&source) {
            Some(errno @ (Errno::MFILE | Errno::NFILE)) => Ok(open_failure("receiving", errno)),
            _ => Err(source),
        }
    }

    /// Whether it is this process, or its host, that has too little, rather than the peer's shared memory that is wrong.
    pub(crate) fn is_shortage(&self) -> bool {
        matches!(
            self,
            Self::Descriptors { .. }
                | Self::HostDescriptors { .. }
                | Self::OutOfMemory { .. }
                | Self::ControlGroup { .. }
                | Self::AddressSpace { .. }
        )
    }
}

/// No object could be opened.
pub(super) fn open_failure(action: &'static str, errno: Errno) -> MemoryError {
    match errno {
        Errno::MFILE => MemoryError::Descriptors { limit: Limit::open_files(), source: errno.into() },
        Errno::NFILE => MemoryError::HostDescriptors { limit: Limit::files(), source: errno.into() },
        _ => MemoryError::Os { action, source: errno.into() },
    }
}

/// An object could not have the size, or the pages, that it needs.
pub(super) fn describe_shortage(backing: Backing, len: usize, errno: Errno) -> MemoryError {
    match (backing, errno) {
        (Backing::PosixShm, Errno::NOSPC) => {
            let (total, free) = match rustix::fs::statvfs("/dev/shm") {
                Ok(fs) => (fs.f_blocks.saturating_mul(fs.f_frsize), fs.f_bavail.saturating_mul(fs.f_frsize)),
                Err(_) => (0, 0),
            };
            MemoryError::DevShmFull { len, total, free, source: errno.into() }
        }
        (_, Errno::NOSPC | Errno::NOMEM) => MemoryError::OutOfMemory { len, source: errno.into() },
        // Larger than any file may be.
        (_, Errno::FBIG) => MemoryError::InvalidLength { len },
        _ => MemoryError::Os { action: "allocating shared memory", source: errno.into() },
    }
}

/// The pages could not be locked: EPERM with a limit of zero, ENOMEM over it, EAGAIN when some would not stay.
pub(super) fn describe_lock_failure(len: usize, errno: Errno) -> MemoryError {
    match errno {
        Errno::PERM | Errno::NOMEM | Errno::AGAIN => {
            MemoryError::Lock { len, limit: Limit::locked_memory(), source: errno.into() }
        }
        _ => MemoryError::Os { action: "locking shared memory", source: errno.into() },
    }
}
