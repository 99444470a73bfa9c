//! Names in `/dev/shm` for shared memory that is made without one, for those who can find it in no other way.
//!
//! A name lasts as long as its [`Name`] and the process that gave it. While that process lives it holds a shared `flock` on
//! the object; the kernel lets go of it at the process's death, whatever that was, so nobody has to know its pid.
//! [`remove_orphans`] removes the names of objects that nobody has locked.
//!
//! Numbers are never used twice by a process, and begin at a random place and go on by a random step, so that two processes
//! do not meet. It does not map what it opens, and does not say what is in it.

use super::fork::{Origin, PerProcess};
use super::ids;
use super::random::random_id;
use rustix::fs::{
    AtFlags, Dir, FileType, FlockOperation, Mode, OFlags, flock, fstat, linkat, open, openat, statat,
    unlinkat,
};
use rustix::io::Errno;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

/// Where the names are: where `shm_open` looks for them.
const DIRECTORY: &str = "/dev/shm";

/// What a name of ours looks like, before its number.
const PREFIX: &str = "tokio-shm-zenoh-";

/// How many numbers are tried. That the first one is taken is unlikely enough.
const ATTEMPTS: usize = 100;

/// How a number is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scheme {
    /// `tokio-shm-zenoh-1a2b3c4d`.
    Own,
    /// `439041101.zenoh`, as zenoh's own segments are called, so that its own client finds them. What killed processes leave
    /// is removed by the next one that uses zenoh's shared memory.
    Zenoh,
}

impl Scheme {
    fn name(self, id: u32) -> String {
        match self {
            Self::Own => format!("{PREFIX}{id:08x}"),
            Self::Zenoh => format!("{id}.zenoh"),
        }
    }
}

/// Names that one owner has given, for its statistics.
#[derive(Debug, Default)]
pub(crate) struct Given(AtomicU32);

impl Given {
    /// How many there are now.
    pub(crate) fn count(&self) -> u32 {
        self.0.load(Ordering::Relaxed)
    }
}

/// An object's name, removed on drop.
#[derive(Debug)]
pub(crate) struct Name {
    /// A child leaves it to its parent.
    origin: Origin,
    id: u32,
    inode: u64,
    scheme: Scheme,
    given: Arc<Given>,
}

impl Name {
    /// Names the object that `fd` is open on and locks it against [`remove_orphans`].
    ///
    /// The object must have been made with `O_TMPFILE` in `/dev/shm`. The lock lasts until `fd` and its duplicates are
    /// closed, so `fd` must stay open for as long as the name.
    ///
    /// # Errors
    /// An object that cannot have a name, no `/proc`, or no number left.
    pub(crate) fn give(fd: BorrowedFd<'_>, scheme: Scheme, given: &Arc<Given>) -> io::Result<Self> {
        let directory = open_directory()?;
        let inode = fstat(fd)?.st_ino;
        // Before there is a name, so that it is never seen without. Shared, because zenoh's receivers take one as well.
        flock(fd, FlockOperation::NonBlockingLockShared)?;
        let object = format!("/proc/self/fd/{}", fd.as_raw_fd());
        for _ in 0..ATTEMPTS {
            let id = next_id()?;
            match linkat(fd_of_nothing(), &object, &directory, scheme.name(id), AtFlags::SYMLINK_FOLLOW) {
                Ok(()) => {
                    given.0.fetch_add(1, Ordering::Relaxed);
                    return Ok(Self { origin: Origin::here(), id, inode, scheme, given: Arc::clone(given) });
                }
                Err(Errno::EXIST) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        Err(Errno::EXIST.into())
    }

    pub(crate) fn id(&self) -> u32 {
        self.id
    }

    /// The object's inode number, which tells it from another that has had the same name before.
    pub(crate) fn inode(&self) -> u64 {
        self.inode
    }

    pub(crate) fn scheme(&self) -> Scheme {
        self.scheme
    }
}

impl Drop for Name {
    fn drop(&mut self) {
        if self.origin.is_here()
            && let Ok(directory) = open_directory()
        {
            remove(directory.as_fd(), &self.scheme.name(self.id), self.inode);
        }
        self.given.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// An object found by its number.
#[derive(Debug)]
pub(crate) struct Found {
    pub(crate) fd: OwnedFd,
    pub(crate) len: u64,
    pub(crate) inode: u64,
}

/// Opens the object that is called `id` by [`Scheme::Own`], for reading and writing.
///
/// # Errors
/// `NotFound` where there is none; anything that is not a plain file of our own user.
pub(crate) fn find(id: u32) -> io::Result<Found> {
    let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let fd = openat(open_directory()?, Scheme::Own.name(id), flags, Mode::empty())?;
    let stat = fstat(&fd)?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile || !ids::is_ours(stat.st_uid) {
        return Err(Errno::PERM.into());
    }
    Ok(Found { fd, len: u64::try_from(stat.st_size).unwrap_or(0), inode: stat.st_ino })
}

/// Whether number `id` still leads to the object with this inode.
pub(crate) fn leads_to(id: u32, inode: u64) -> bool {
    let Ok(directory) = open_directory() else { return true };
    match statat(&directory, Scheme::Own.name(id), AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) => stat.st_ino == inode,
        // Where it cannot be told, it may.
        Err(errno) => errno != Errno::NOENT,
    }
}

/// Removes the names ([`Scheme::Own`]) of this user's objects whose process is dead, and says how many.
///
/// # Errors
/// If `/dev/shm` cannot be read. A name that cannot be looked at stays.
pub(crate) fn remove_orphans() -> io::Result<usize> {
    let directory = open_directory()?;
    let mut removed = 0;
    for entry in Dir::read_from(&directory)? {
        let entry = entry?;
        let Ok(name) = entry.file_name().to_str() else { continue };
        if !is_ours(name) {
            continue;
        }
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK;
        let Ok(fd) = openat(&directory, name, flags, Mode::empty()) else { continue };
        let Ok(stat) = fstat(&fd) else { continue };
        // Root may lock what belongs to others; it is theirs to clean up.
        if ids::is_ours(stat.st_uid) && flock(&fd, FlockOperation::NonBlockingLockExclusive).is_ok() {
            removed += usize::from(remove(directory.as_fd(), name, stat.st_ino));
        }
    }
    Ok(removed)
}

fn is_ours(name: &str) -> bool {
    let Some(number) = name.strip_prefix(PREFIX) else { return false };
    number.len() == 8 && number.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

/// Removes a name if it still is this object's.
fn remove(directory: BorrowedFd<'_>, name: &str, inode: u64) -> bool {
    statat(directory, name, AtFlags::SYMLINK_NOFOLLOW).is_ok_and(|stat| stat.st_ino == inode)
        && unlinkat(directory, name, AtFlags::empty()).is_ok()
}

fn open_directory() -> io::Result<OwnedFd> {
    Ok(open(DIRECTORY, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?)
}

/// For a path that is absolute.
fn fd_of_nothing() -> BorrowedFd<'static> {
    rustix::fs::CWD
}

/// A number that this process has not had before.
///
/// The `n`th is `start + n · step` modulo 2³², with a random start and a random odd step: each of the 2³² comes once.
fn next_id() -> io::Result<u32> {
    // A child has a sequence of its own.
    static SEQUENCE: PerProcess<(OnceLock<(u32, u32)>, AtomicU64)> = PerProcess::new();
    let (sequence, used) = SEQUENCE.get();
    let &(start, step) = match sequence.get() {
        Some(sequence) => sequence,
        None => {
            let random = random_id()?;
            sequence.get_or_init(|| (random as u32, (random >> 32) as u32 | 1))
        }
    };
    let n = u32::try_from(used.fetch_add(1, Ordering::Relaxed))
        .map_err(|_| io::Error::other("this process has used up all 2^32 numbers for named shared memory"))?;
    Ok(start.wrapping_add(n.wrapping_mul(step)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::memory::{self, Backing, CreateOptions, Mapping};
    use std::path::Path;

    fn object() -> (OwnedFd, Mapping) {
        let options =
            CreateOptions { backing: Backing::PosixShm, populate: true, lock: false, huge_pages: false };
        memory::create(8192, &options).unwrap()
    }

    fn path(name: &Name) -> std::path::PathBuf {
        Path::new(DIRECTORY).join(name.scheme.name(name.id))
    }

    #[test]
    fn zenoh_name_leads_to_its_object_until_dropped() {
        use std::os::unix::fs::MetadataExt as _;
        let given = Arc::new(Given::default());
        for scheme in [Scheme::Own, Scheme::Zenoh] {
            let (fd, _mapping) = object();
            let name = Name::give(fd.as_fd(), scheme, &given).unwrap();
            let path = path(&name);
            let metadata = std::fs::metadata(&path).unwrap();
            assert_eq!((metadata.mode() & 0o777, metadata.ino()), (0o600, name.inode()));
            if scheme == Scheme::Own {
                let found = find(name.id()).unwrap();
                assert_eq!((found.len, found.inode), (8192, name.inode()));
                assert!(leads_to(name.id(), name.inode()) && !leads_to(name.id(), name.inode() + 1));
            }
            assert_eq!(given.count(), 1);
            drop(name);
            assert!(!path.exists());
            assert_eq!(given.count(), 0);
        }
    }

    #[test]
    fn zenoh_name_of_a_dead_owner_is_removed_and_of_a_living_one_stays() {
        let given = Arc::new(Given::default());
        let (living, _mapping) = object();
        let living = (Name::give(living.as_fd(), Scheme::Own, &given).unwrap(), living);
        let (dead, _mapping) = object();
        let name = Name::give(dead.as_fd(), Scheme::Own, &given).unwrap();
        // As the kernel does when a process is killed: the descriptor goes, the name stays.
        drop(dead);
        // Another test may be at it at the same time.
        remove_orphans().unwrap();
        assert!(!path(&name).exists());
        assert!(path(&living.0).exists());
    }

    #[test]
    fn zenoh_name_of_a_number_taken_meanwhile_leaves_the_other_alone() {
        let given = Arc::new(Given::default());
        let (fd, _mapping) = object();
        let name = Name::give(fd.as_fd(), Scheme::Own, &given).unwrap();
        let path = path(&name);
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, b"another's").unwrap();
        drop(name);
        assert_eq!(std::fs::read(&path).unwrap(), b"another's");
        std::fs::remove_file(&path).unwrap();
    }

    #[test]
    fn zenoh_numbers_are_never_used_twice() {
        let mut ids: Vec<_> = (0..10_000).map(|_| next_id().unwrap()).collect();
        ids.sort_unstable();
        ids.dedup();
        assert_eq!(ids.len(), 10_000);
    }

    #[test]
    fn zenoh_names_of_others_are_none_of_ours() {
        assert!(is_ours(&Scheme::Own.name(7)));
        for name in ["tokio-shm-zenoh-", "tokio-shm-zenoh-7", "tokio-shm-zenoh-0000000G", "7.zenoh"] {
            assert!(!is_ours(name), "{name}");
        }
    }
}
