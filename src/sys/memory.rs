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
mod room;
#[cfg(test)]
mod tests;

pub use error::MemoryError;
pub(crate) use room::host_memory;

use super::fork::Registration;
use super::limits::Limit;
use error::{describe_lock_failure, describe_shortage};
use rustix::fs::{
    FallocateFlags, FileType, MemfdFlags, SealFlags, fallocate, fcntl_add_seals, fcntl_get_seals, fstat,
    ftruncate, memfd_create,
};
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mlock, mmap, munmap};
use std::ffi::c_void;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::ptr::{NonNull, null_mut};

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

/// A peer's segment up to this size has all its pages mapped at once, in 20 µs.
const POPULATED_MAX: usize = 1 << 20;

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

    /// Has a child of this process find private memory in its place: of `fd`'s object, if `fd` stays open as long as the mapping; zeros
    /// without.
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

    /// Maps the pages of a part of it, and allocates those that its maker never touched.
    fn populate(&self, part: Range<usize>) -> Result<(), Errno> {
        assert!(part.start <= part.end && part.end <= self.len);
        let start = part.start - part.start % rustix::param::page_size();
        // SAFETY: `start` is below the length (checked above), so the address is in this mapping (the type's invariant).
        let at = unsafe { self.ptr.as_ptr().add(start) };
        // SAFETY: the range is this mapping's, by the check above; the advice does not change what it contains.
        unsafe { madvise(at.cast::<c_void>(), part.end - start, Advice::LinuxPopulateRead) }
    }

    /// Sees to it that a part of a sparse mapping can be read: what its maker never touched is allocated now, where a lack of memory
    /// is an error, and not by the read, where it would be SIGBUS or the OOM killer.
    ///
    /// # Errors
    /// [`MemoryError::Unallocated`], and where what is missing would take more than half of the memory that is free.
    pub(crate) fn make_readable(&self, part: Range<usize>) -> Result<(), MemoryError> {
        let len = part.len();
        let unallocated = || MemoryError::Unallocated { len, missing: len as u64 };
        // How much of it is missing shows only by how much less is free after each piece.
        let floor = if len > POPULATED_MAX { room::free() / 2 } else { 0 };
        for start in part.clone().step_by(PIECE as usize) {
            let piece = start..part.end.min(start + PIECE as usize);
            if floor > 0 && room::free() < floor.saturating_add(piece.len() as u64) {
                return Err(unallocated());
            }
            room::ensure(piece.len()).map_err(|_| unallocated())?;
            self.populate(piece).map_err(|_| unallocated())?;
        }
        Ok(())
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

/// A peer's segment, mapped for reading.
#[derive(Debug)]
pub(crate) struct Foreign {
    pub(crate) mapping: Mapping,
    /// Bytes that its maker had allocated when it was mapped.
    pub(crate) allocated: u64,
    /// Reading some of it may have to allocate memory: see [`Mapping::make_readable`].
    pub(crate) sparse: bool,
}

/// Maps a peer's segment for reading.
///
/// A memfd is checked first, so that no access below `len` can ever fail: exactly this size, and sealed against changing it
/// and against holes. A POSIX object cannot promise that; it is checked for its size only.
///
/// A segment of up to 1 MiB has its pages mapped here. A larger one has them mapped by the reads, sixteen at a time: that takes as
/// long in all, but 54 ms for 1 GiB would be a long time for those who wait for this thread.
///
/// # Errors
/// [`MemoryError::WrongSize`], [`MemoryError::MissingSeals`] and [`MemoryError::NotSharedMemory`] are the peer's fault.
pub(crate) fn map_read_only(
    fd: BorrowedFd<'_>,
    len: usize,
    backing: Backing,
) -> Result<Foreign, MemoryError> {
    check_len(len)?;
    let missing = match backing {
        // The seals first: once they are there, the size that is read next stays.
        Backing::Memfd => {
            check_seals(fd, SEGMENT_SEALS)?;
            check_file(fd, len, true)?
        }
        Backing::PosixShm => check_file(fd, len, false)?,
    };
    let mapping =
        Mapping::new(fd, len, ProtFlags::READ, MapFlags::empty()).map_err(MemoryError::mapping(len))?;
    let sparse = missing > 0 && len > POPULATED_MAX;
    if sparse || len <= POPULATED_MAX {
        // Of a sparse one the first page, which shows whether the rest can be had like this.
        let now = if sparse { rustix::param::page_size() } else { len };
        if missing > 0 {
            room::ensure(now).map_err(|_| MemoryError::Unallocated { len, missing })?;
        }
        match mapping.populate(0..now) {
            Ok(()) => {}
            // Before Linux 5.14. What has been allocated cannot fail later either, it only costs a fault at first touch.
            Err(Errno::INVAL) if missing == 0 => {}
            Err(Errno::INVAL) if backing == Backing::Memfd && missing <= room::free() / 2 => {
                allocate(fd, len, backing)?;
                return Ok(Foreign { mapping, allocated: len as u64, sparse: false });
            }
            // Here, where it is an error, rather than as SIGBUS later: a page that the maker had not allocated, and that is
            // not to be had. (EFAULT is what a SIGBUS becomes.)
            Err(_) if missing > 0 => return Err(MemoryError::Unallocated { len, missing }),
            Err(errno) => {
                let errno = if errno == Errno::FAULT { Errno::NOMEM } else { errno };
                return Err(describe_shortage(backing, len, errno));
            }
        }
    }
    Ok(Foreign { mapping, allocated: len as u64 - missing, sparse })
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
    check_file_size(len)?;
    ftruncate(fd, len as u64).map_err(|errno| describe_shortage(backing, len, errno))?;
    if options.populate {
        room::ensure(len)?;
    }
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

/// Whether a file may be so long. The kernel answers a longer one with SIGXFSZ, which ends the process.
fn check_file_size(len: usize) -> Result<(), MemoryError> {
    let limit = Limit::file_size();
    if limit.get().is_some_and(|most| len as u64 > most) {
        return Err(MemoryError::FileSize { len, limit });
    }
    Ok(())
}

/// How much is allocated by one call. A signal undoes what the call has done, and makes it begin anew.
const PIECE: u64 = 64 << 20;

/// Calls in a row that are interrupted before this gives up. By then each allocates one page.
const INTERRUPTIONS_MAX: u32 = 1_000;

fn allocate(fd: BorrowedFd<'_>, len: usize, backing: Backing) -> Result<(), MemoryError> {
    in_pieces(len, |at, bytes| fallocate(fd, FallocateFlags::empty(), at, bytes)).map_err(|errno| match errno
    {
        Errno::INTR => MemoryError::Interrupted { len, source: errno.into() },
        errno => describe_shortage(backing, len, errno),
    })
}

/// Calls `allocate` for one piece of `len` bytes after the other, for smaller ones where it is interrupted.
fn in_pieces(len: usize, mut allocate: impl FnMut(u64, u64) -> Result<(), Errno>) -> Result<(), Errno> {
    let (end, page) = (len as u64, rustix::param::page_size() as u64);
    let (mut at, mut piece, mut interruptions) = (0, PIECE, 0);
    while at < end {
        let bytes = piece.min(end - at);
        match allocate(at, bytes) {
            Ok(()) => {
                at += bytes;
                interruptions = 0;
                piece = (piece * 2).min(PIECE);
            }
            // Smaller pieces are done between two signals.
            Err(Errno::INTR) if interruptions < INTERRUPTIONS_MAX => {
                interruptions += 1;
                piece = (piece / 4).max(page);
            }
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
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
