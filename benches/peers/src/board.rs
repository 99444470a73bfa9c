//! A page that all processes of a case share: who is ready, what was read, when. No peer has a part in it.
#![allow(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::time::{ClockId, clock_gettime};

/// Instants that it can carry.
pub(crate) const STAMPS: usize = 4096;

/// The page's words, zero at first.
#[repr(C)]
pub(crate) struct Board {
    /// Processes that have opened everything.
    pub(crate) ready: Padded,
    /// Messages read by all receivers together.
    pub(crate) read: Padded,
    /// Messages whose sending has returned.
    pub(crate) sent: Padded,
    /// Receivers that have seen the last message.
    pub(crate) ended: Padded,
    /// Phases of a work, as far as the sender has come.
    pub(crate) phase: Padded,
    /// The receiving process.
    pub(crate) far_pid: Padded,
    pub(crate) stamps: [AtomicU64; STAMPS],
}

/// Alone on its cache lines.
#[repr(C, align(128))]
pub(crate) struct Padded(AtomicU64);

impl Padded {
    pub(crate) fn get(&self) -> u64 {
        self.0.load(Ordering::Acquire)
    }

    pub(crate) fn set(&self, value: u64) {
        self.0.store(value, Ordering::Release);
    }

    /// Waits in small sleeps until it is at least `value`.
    pub(crate) async fn reaches(&self, value: u64) {
        while self.get() < value {
            tokio::time::sleep(std::time::Duration::from_micros(500)).await;
        }
    }

    /// Waits until it is at least `value` without ever sleeping; other tasks of the runtime go on.
    pub(crate) async fn reaches_spinning(&self, value: u64) {
        while self.get() < value {
            tokio::task::yield_now().await;
        }
    }

    pub(crate) fn add(&self, value: u64) -> u64 {
        self.0.fetch_add(value, Ordering::AcqRel) + value
    }
}

impl Board {
    /// The board of a case, made by whoever comes first and mapped until the process ends.
    pub(crate) fn open(dir: &Path) -> &'static Self {
        let memory = map(&shared_file(&dir.join("board"), size_of::<Self>()), size_of::<Self>());
        // SAFETY: the mapping is page-aligned, large enough, zeroed by the kernel, shared, and never unmapped; every bit
        // pattern is a valid `Board`, and all of it is atomic.
        unsafe { &*memory.cast::<Self>() }
    }
}

/// A file of that size, made if it is not there.
pub(crate) fn shared_file(path: &Path, size: usize) -> File {
    let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path);
    let file = file.expect("open a file of the suite");
    file.set_len(size as u64).expect("make room on the tmpfs");
    file
}

/// Maps a file, shared and for good.
pub(crate) fn map(file: &File, size: usize) -> *mut u8 {
    use rustix::mm::{MapFlags, ProtFlags, mmap};
    let protection = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: a new mapping at an address of the kernel's choice; nothing else is touched.
    let memory = unsafe { mmap(std::ptr::null_mut(), size, protection, MapFlags::SHARED, file, 0) };
    memory.expect("map a file of the suite").cast()
}

/// `CLOCK_MONOTONIC`, which all processes share.
pub(crate) fn now_ns() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}
