//! Shared-memory objects: making them, giving them away, and checking those that come from a peer before they are mapped.
//!
//! Two kinds of object. A *segment* is written by its maker only: its memfd is sealed before anybody else has it, so no
//! one can write, shrink, grow or punch holes, and a reader that has checked the seals can never be sent `SIGBUS`. A *link
//! page* is written by both sides and sealed against resizing only.
//!
//! Hands out addresses, never slices: another process may write the bytes at any time, and what is a race and what is not
//! is for the layers above to say.
#![allow(unsafe_code)]

mod error;
mod posix;
#[cfg(test)]
mod tests;

pub use error::MemoryError;

use super::fork::Registration;
use error::{describe_lock_failure, describe_shortage};
use rustix::fs::{
    FallocateFlags, FileType, MemfdFlags, SealFlags, fallocate, fcntl_add_seals, fcntl_get_seals, fstat,
    ftruncate, memfd_create,
};
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mlock, mmap, munmap};
use std::ffi::c_void;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::ptr::{NonNull, null_mut};
use std::sync::LazyLock;

/// What shared memory is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum Backing {
    /// `memfd_create`, sealed: only the publisher can write, and nobody can shrink it or punch holes into it. Not counted
    /// against the size of `/dev/shm` (often 64 MiB in a container), only against memory.
    #[default]
    Memfd,
    /// `shm_open`, unlinked at once, so that nothing stays behind in `/dev/shm`.
    ///
    /// It cannot be sealed. Subscribers are given a descriptor that is open for reading only, which keeps out mistakes;
    /// but a process of the same user that means harm can open it anew, write payloads, or shrink the object, and whoever
    /// then reads it gets `SIGBUS`. Use it only where `memfd_create` is not to be had, among processes that trust each
    /// other. It needs room in `/dev/shm`.
    PosixShm,
}

/// How [`create`] makes a segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct CreateOptions {
    /// What it is made of.
    pub(crate) backing: Backing,
    /// Allocate and map every page now. Without it each page is a fault at first touch, and may be `SIGBUS` there if memory
    /// has run out.
    pub(crate) populate: bool,
    /// Keep it out of swap.
    pub(crate) lock: bool,
    /// Ask for transparent huge pages. Advice: where they are not to be had, small ones are used.
    pub(crate) huge_pages: bool,
}

/// What makes a memfd a segment: no new way to write, no other size, and no more seals.
const SEGMENT_SEALS: SealFlags =
    SealFlags::FUTURE_WRITE.union(SealFlags::SHRINK).union(SealFlags::GROW).union(SealFlags::SEAL);

/// What makes a memfd a link page: no other size, and no more seals (such as one against the other side's writing).
const LINK_SEALS: SealFlags = SealFlags::SHRINK.union(SealFlags::GROW).union(SealFlags::SEAL);

/// What a link page must have before it is mapped: enough that no access can fail.
const LINK_SEALS_NEEDED: SealFlags = SealFlags::SHRINK.union(SealFlags::GROW);

/// A shared mapping, unmapped on drop.
///
/// Invariant: `ptr..ptr + len` is one mapping made by this module, which nothing else unmaps or remaps.
#[derive(Debug)]
pub(crate) struct Mapping {
    /// Of one that is writable: a child is to have its own. Before the mapping goes.
    fork: Option<Registration>,
    ptr: NonNull<u8>,
    len: usize,
}

// SAFETY: it is an address range that belongs to the process, not to a thread, and this type reads and writes nothing there.
// Those who do go through `as_ptr`, and answer for their own synchronisation.
unsafe impl Send for Mapping {}
// SAFETY: as above; `&Mapping` gives out only the address and the length.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// The first byte; page-aligned. Valid for [`len`](Self::len) bytes as long as `self` lives, writable if it was mapped so.
    pub(crate) fn as_ptr(&self) -> NonNull<u8> {
        self.ptr
    }

    /// The length asked for, in bytes; never zero.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    fn new(fd: BorrowedFd<'_>, len: usize, prot: ProtFlags, flags: MapFlags) -> Result<Self, Errno> {
        // SAFETY: with a null address and without MAP_FIXED the kernel picks a range that nothing else uses, so no memory of
        // this process changes. That the file's size makes the range accessible is the callers' doing: each has checked it.
        let ptr = unsafe { mmap(null_mut(), len, prot, MapFlags::SHARED | flags, fd, 0) }?;
        // mmap gives address zero to nobody who did not ask for it.
        NonNull::new(ptr.cast()).map(|ptr| Self { fork: None, ptr, len }).ok_or(Errno::NOMEM)
    }

    /// Has a child of this process find private memory in its place: of `fd`'s object, which is to stay open as long as the mapping, or
    /// zeros.
    fn own(mut self, fd: Option<BorrowedFd<'_>>) -> Self {
        // SAFETY: the range is this mapping's (the type's invariant), and the registration goes before it does (`drop`). That `fd` stays
        // open is the caller's word.
        self.fork = Some(unsafe { Registration::memory(self.ptr, self.len, fd.map(|fd| fd.as_raw_fd())) });
        self
    }

    fn advise(&self, advice: Advice) -> Result<(), Errno> {
        // SAFETY: the range is this mapping's (the type's invariant), and the advices used here (huge pages, populate) do not
        // change what it contains.
        unsafe { madvise(self.ptr.as_ptr().cast::<c_void>(), self.len, advice) }
    }

    fn lock(&self) -> Result<(), Errno> {
        // SAFETY: the range is this mapping's (the type's invariant); locking changes nothing that a program can see.
        unsafe { mlock(self.ptr.as_ptr().cast::<c_void>(), self.len) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        drop(self.fork.take());
        // SAFETY: the range is this mapping's and still mapped (the type's invariant), and whoever took its address promised,
        // by `as_ptr`'s contract, not to use it after `self`.
        let unmapped = unsafe { munmap(self.ptr.as_ptr().cast::<c_void>(), self.len) };
        debug_assert_eq!(unmapped, Ok(()));
    }
}

/// Makes a segment of `len` bytes, all zero: the descriptor for subscribers, and the only mapping that can write.
///
/// The mapping is there before the seals, which is why it can still write after them.
///
/// # Errors
/// Whatever fails, nothing is left behind: no descriptor, no mapping, no name.
pub(crate) fn create(len: usize, options: &CreateOptions) -> Result<(OwnedFd, Mapping), MemoryError> {
    check_len(len)?;
    match options.backing {
        Backing::Memfd => {
            let fd = new_memfd(c"tokio-shm-segment")?;
            let mapping = size_and_map(fd.as_fd(), len, options)?;
            fcntl_add_seals(&fd, SEGMENT_SEALS).map_err(MemoryError::os("sealing the shared memory"))?;
            let mapping = mapping.own(Some(fd.as_fd()));
            Ok((fd, mapping))
        }
        Backing::PosixShm => {
            let object = posix::open_unnamed()?;
            let mapping = size_and_map(object.writable.as_fd(), len, options)?;
            let mapping = mapping.own(Some(object.read_only.as_fd()));
            Ok((object.read_only, mapping))
        }
    }
}

/// Makes a link page of `len` bytes, all zero, that whoever gets the descriptor can map and write.
///
/// # Errors
/// As [`create`].
pub(crate) fn create_link_page(len: usize) -> Result<(OwnedFd, Mapping), MemoryError> {
    check_len(len)?;
    let options = CreateOptions { backing: Backing::Memfd, populate: true, lock: false, huge_pages: false };
    let fd = new_memfd(c"tokio-shm-link")?;
    let mapping = size_and_map(fd.as_fd(), len, &options)?;
    fcntl_add_seals(&fd, LINK_SEALS).map_err(MemoryError::os("sealing the link page"))?;
    Ok((fd, mapping.own(None)))
}

/// Maps a peer's segment for reading.
///
/// A memfd is checked first, so that no access below `len` can ever fail: exactly this size, and sealed against changing it
/// and against holes. A POSIX object cannot promise that; it is checked for its size only.
///
/// # Errors
/// [`MemoryError::WrongSize`], [`MemoryError::MissingSeals`] and [`MemoryError::NotSharedMemory`] are the peer's fault.
pub(crate) fn map_read_only(
    fd: BorrowedFd<'_>,
    len: usize,
    backing: Backing,
) -> Result<Mapping, MemoryError> {
    check_len(len)?;
    let missing = match backing {
        // The seals first: once they are there, the size that is read next stays.
        Backing::Memfd => {
            check_seals(fd, SEGMENT_SEALS)?;
            check_file(fd, len, true)?
        }
        Backing::PosixShm => check_file(fd, len, false)?,
    };
    if missing > 0 && available_memory().is_some_and(|free| missing > free / 2) {
        // It costs the maker nothing to announce what it has not allocated; whoever reads it is who allocates it.
        return Err(MemoryError::Unallocated { len, missing });
    }
    let mapping =
        Mapping::new(fd, len, ProtFlags::READ, MapFlags::empty()).map_err(MemoryError::mapping(len))?;
    match mapping.advise(Advice::LinuxPopulateRead) {
        Ok(()) => Ok(mapping),
        // Before Linux 5.14. What has been allocated cannot fail later either, it only costs a fault at first touch.
        Err(Errno::INVAL) if missing == 0 => Ok(mapping),
        // Here, where it is an error, rather than as SIGBUS later: a page that the maker had not allocated, and that is
        // not to be had. (EFAULT is what a SIGBUS becomes.)
        Err(_) if missing > 0 => Err(MemoryError::Unallocated { len, missing }),
        Err(errno) => {
            Err(describe_shortage(backing, len, if errno == Errno::FAULT { Errno::NOMEM } else { errno }))
        }
    }
}

/// Maps a peer's link page for reading and writing.
///
/// # Errors
/// As [`map_read_only`].
pub(crate) fn map_link_page(fd: BorrowedFd<'_>, len: usize) -> Result<Mapping, MemoryError> {
    check_len(len)?;
    check_seals(fd, LINK_SEALS_NEEDED)?;
    check_file(fd, len, true)?;
    let mapping = Mapping::new(fd, len, ProtFlags::READ | ProtFlags::WRITE, MapFlags::POPULATE)
        .map_err(MemoryError::mapping(len))?;
    Ok(mapping.own(None))
}

/// Maps a POSIX object for reading and writing, as zenoh's receivers do.
///
/// Its maker is trusted not to shrink it: it cannot be sealed.
///
/// # Errors
/// [`MemoryError::WrongSize`] and [`MemoryError::NotSharedMemory`] if it is not what `len` says.
#[cfg(feature = "zenoh")]
pub(crate) fn map_writable(fd: BorrowedFd<'_>, len: usize) -> Result<Mapping, MemoryError> {
    check_len(len)?;
    check_file(fd, len, true)?;
    Mapping::new(fd, len, ProtFlags::READ | ProtFlags::WRITE, MapFlags::empty())
        .map_err(MemoryError::mapping(len))
}

fn new_memfd(name: &std::ffi::CStr) -> Result<OwnedFd, MemoryError> {
    memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)
        .map_err(MemoryError::opening("creating a memfd"))
}

fn size_and_map(fd: BorrowedFd<'_>, len: usize, options: &CreateOptions) -> Result<Mapping, MemoryError> {
    let backing = options.backing;
    ftruncate(fd, len as u64).map_err(|errno| describe_shortage(backing, len, errno))?;
    let mapping = if options.huge_pages {
        // The advice belongs to the mapping and has to be there before the pages are.
        let mapping = Mapping::new(fd, len, ProtFlags::READ | ProtFlags::WRITE, MapFlags::empty())
            .map_err(MemoryError::mapping(len))?;
        let _ = mapping.advise(Advice::LinuxHugepage);
        if options.populate {
            // Whatever this cannot do (it needs Linux 5.14), `allocate` does in small pages or reports.
            let _ = mapping.advise(Advice::LinuxPopulateWrite);
            allocate(fd, len, backing)?;
        }
        mapping
    } else {
        // Allocating before mapping: a lack of memory is an error here, and would be SIGBUS at first touch.
        let populate = if options.populate {
            allocate(fd, len, backing)?;
            MapFlags::POPULATE
        } else {
            MapFlags::empty()
        };
        Mapping::new(fd, len, ProtFlags::READ | ProtFlags::WRITE, populate)
            .map_err(MemoryError::mapping(len))?
    };
    if options.lock {
        mapping.lock().map_err(|errno| describe_lock_failure(len, errno))?;
    }
    Ok(mapping)
}

fn allocate(fd: BorrowedFd<'_>, len: usize, backing: Backing) -> Result<(), MemoryError> {
    if backing == Backing::Memfd && len >= LARGE && available_memory().is_some_and(|free| (len as u64) > free)
    {
        return Err(describe_shortage(backing, len, Errno::NOMEM));
    }
    loop {
        match fallocate(fd, FallocateFlags::empty(), 0, len as u64) {
            Ok(()) => return Ok(()),
            // A signal undoes it all. Each try starts anew, but signals that come faster than this is done are no life.
            Err(Errno::INTR) => {}
            Err(errno) => return Err(describe_shortage(backing, len, errno)),
        }
    }
}

/// What it takes to be worth a look at `/proc/meminfo` first.
const LARGE: usize = 64 << 20;

/// Bytes that could be allocated without anybody being killed for it, as the kernel estimates.
///
/// A memfd has no size limit of its own: the kernel would go on allocating until the OOM killer finds a victim.
fn available_memory() -> Option<u64> {
    let meminfo = std::fs::read_to_string("/proc/meminfo").ok()?;
    meminfo_bytes(&meminfo, "MemAvailable:")?.checked_add(meminfo_bytes(&meminfo, "SwapFree:")?)
}

/// Bytes that the host has, swap included; no limit where it does not say.
pub(crate) fn host_memory() -> u64 {
    static BYTES: LazyLock<u64> = LazyLock::new(|| {
        let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let ram = meminfo_bytes(&meminfo, "MemTotal:").unwrap_or(u64::MAX);
        ram.saturating_add(meminfo_bytes(&meminfo, "SwapTotal:").unwrap_or(0))
    });
    *BYTES
}

fn meminfo_bytes(meminfo: &str, field: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix(field))?;
    line.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// Nothing beyond what a pointer's offset can express, and not nothing.
fn check_len(len: usize) -> Result<(), MemoryError> {
    if len == 0 || isize::try_from(len).is_err() { Err(MemoryError::InvalidLength { len }) } else { Ok(()) }
}

fn check_seals(fd: BorrowedFd<'_>, needed: SealFlags) -> Result<(), MemoryError> {
    match fcntl_get_seals(fd) {
        Ok(seals) if seals.contains(needed) => Ok(()),
        Ok(seals) => Err(MemoryError::MissingSeals { missing: seal_names(needed.difference(seals)) }),
        // Not a kind of file that can be sealed.
        Err(Errno::INVAL | Errno::BADF) => Err(MemoryError::NotSharedMemory),
        Err(errno) => Err(MemoryError::os("reading the seals of shared memory")(errno)),
    }
}

fn seal_names(seals: SealFlags) -> String {
    seals.iter_names().map(|(name, _)| name).collect::<Vec<_>>().join(", ")
}

/// Checks type and size; says how many bytes have not been allocated.
fn check_file(fd: BorrowedFd<'_>, len: usize, exactly: bool) -> Result<u64, MemoryError> {
    let stat = fstat(fd).map_err(MemoryError::os("looking at shared memory"))?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Err(MemoryError::NotSharedMemory);
    }
    let found = u64::try_from(stat.st_size).unwrap_or(0);
    let expected = len as u64;
    if found < expected || (exactly && found != expected) {
        return Err(MemoryError::WrongSize { expected, found });
    }
    Ok(expected.saturating_sub(u64::try_from(stat.st_blocks).unwrap_or(0).saturating_mul(512)))
}
