//! What `fork` copies that two processes must not both use: a generation to tell what was inherited, and a handler that runs in each
//! child.
//!
//! A child has its parent's descriptors and shared mappings, and a copy of all that was known of them. Were it to use them, both would
//! deliver, receive and release on the same links. So in a child, before its first own instruction:
//!
//! * the generation goes up: whatever was made before knows by its [`Origin`] that it belongs to another process;
//! * every writable shared mapping is replaced, at its address, by a private one: what the child writes reaches no other process, and
//!   what it releases is released to no publisher;
//! * every publisher is made to look like one that has died.
//!
//! All of it is done in the child of `fork`, at a cost of a system call a mapping. Nothing is looked at for it on a message's way but
//! [`Origin::is_here`], a plain load. Not covered is a bare `clone` system call, which runs no handlers; `vfork` and `posix_spawn` need none.
#![allow(unsafe_code)]

use std::cell::UnsafeCell;
use std::ffi::c_void;
use std::os::fd::{BorrowedFd, RawFd};
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicBool, AtomicPtr, Ordering};
use std::sync::{Once, Weak};

use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags, mmap, mmap_anonymous};

/// How often this process's ancestors have forked, as far as handlers saw it.
struct Generation(UnsafeCell<u32>);

// SAFETY: written by `in_child` alone, while its process has one thread, which is the writer; threads that begin later do so after the
// write. So no read is concurrent with a write.
unsafe impl Sync for Generation {}

static GENERATION: Generation = Generation(UnsafeCell::new(0));

/// Which process made something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Origin(u32);

impl Origin {
    /// This process, from now on told of forks.
    pub(crate) fn here() -> Self {
        install();
        Self::now()
    }

    /// This process, for what is made of something that has asked [`here`](Self::here).
    // A plain load, so that a reader's loop need not repeat it.
    #[inline(always)]
    pub(crate) fn now() -> Self {
        // SAFETY: no write is concurrent: see `Generation`.
        Self(unsafe { *GENERATION.0.get() })
    }

    /// Whether it was made by this process, and not by one that it was forked from.
    #[inline(always)]
    pub(crate) fn is_here(self) -> bool {
        self == Self::now()
    }
}

/// The error of a system call that is not made, because it would act on another process's behalf.
pub(crate) fn inherited() -> std::io::Error {
    std::io::Error::other("made before this process was forked: it belongs to the parent")
}

/// A value of this process: a child begins with a new one, and never waits for a lock that a thread of its parent held.
#[derive(Debug)]
pub(crate) struct PerProcess<T>(AtomicPtr<Made<T>>);

#[derive(Debug)]
struct Made<T> {
    origin: Origin,
    value: T,
}

impl<T: Default> PerProcess<T> {
    pub(crate) const fn new() -> Self {
        Self(AtomicPtr::new(ptr::null_mut()))
    }

    /// The value, made at the first use in each process. A parent's is left as it is, in the child's memory.
    pub(crate) fn get(&'static self) -> &'static T {
        // SYNC POINT: made
        let mut seen = self.0.load(Ordering::Acquire);
        loop {
            // SAFETY: null, or from `Box::into_raw` below and never freed once it was stored.
            if let Some(made) = unsafe { seen.as_ref() }
                && made.origin.is_here()
            {
                return &made.value;
            }
            let new = Box::into_raw(Box::new(Made { origin: Origin::here(), value: T::default() }));
            // SYNC POINT: made
            match self.0.compare_exchange(seen, new, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => seen = new,
                Err(now) => {
                    // SAFETY: from `Box::into_raw` above, and not stored anywhere.
                    drop(unsafe { Box::from_raw(new) });
                    seen = now;
                }
            }
        }
    }
}

/// What is put out of use in a child.
pub(crate) trait Disown: Send + Sync {
    /// Called in the child of a `fork`, whose only thread may have been anywhere: stores to atomics, and no more.
    fn disown(&self);
}

enum What {
    /// A writable shared mapping of `len` bytes, of the object that `fd` is open on where it is to be readable in the child.
    Memory {
        start: NonNull<u8>,
        len: usize,
        fd: Option<RawFd>,
    },
    Handle(Weak<dyn Disown>),
}

struct Node {
    what: What,
    origin: Origin,
    /// Its neighbours in the list, whose lock orders all accesses.
    next: AtomicPtr<Node>,
    prev: AtomicPtr<Node>,
}

impl Node {
    fn set_next(&self, next: *const Self) {
        self.next.store(next.cast_mut(), Ordering::Relaxed);
    }

    fn set_prev(&self, prev: *const Self) {
        self.prev.store(prev.cast_mut(), Ordering::Relaxed);
    }
}

/// Has something seen to in children, until dropped. To be dropped before that which it is about.
#[derive(Debug)]
pub(crate) struct Registration(NonNull<Node>);

// SAFETY: the node is touched with the list locked only, or when it is in it no more, and what it holds may be used from any thread: an
// address range, a descriptor's number, a `Send` and `Sync` handle.
unsafe impl Send for Registration {}
// SAFETY: as above; `&Registration` gives access to nothing.
unsafe impl Sync for Registration {}

impl Registration {
    /// A writable shared mapping, replaced in a child by a private one of `fd`'s object (what the child writes is its own). Where
    /// that cannot be, it is no memory at all; and where `fd` is none, zeros.
    ///
    /// # Safety
    ///
    /// The range is one mapping of the caller's, which takes only atomic or exclusive access, and stays mapped until this is
    /// dropped.
    pub(crate) unsafe fn memory(start: NonNull<u8>, len: usize, fd: Option<RawFd>) -> Self {
        Self::new(What::Memory { start, len, fd })
    }

    /// A handle, which is told in a child that it is another process's.
    pub(crate) fn handle(handle: Weak<dyn Disown>) -> Self {
        Self::new(What::Handle(handle))
    }

    fn new(what: What) -> Self {
        let (next, prev) = Default::default();
        // Allocated before the lock is taken: a fork that waits for the lock may have stopped the allocator.
        let node: &Node = Box::leak(Box::new(Node { what, origin: Origin::here(), next, prev }));
        LIST.lock();
        let first = LIST.first();
        node.set_next(first.map_or(ptr::null(), ptr::from_ref));
        if let Some(first) = first {
            first.set_prev(node);
        }
        LIST.head.store(ptr::from_ref(node).cast_mut(), Ordering::Relaxed);
        LIST.unlock();
        Self(NonNull::from(node))
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        // SAFETY: from `Box::leak` in `new`, and freed below.
        let node = unsafe { self.0.as_ref() };
        LIST.lock();
        let (next, prev) = (List::at(&node.next), List::at(&node.prev));
        match prev {
            Some(prev) => prev.set_next(next.map_or(ptr::null(), ptr::from_ref)),
            None => LIST.head.store(node.next.load(Ordering::Relaxed), Ordering::Relaxed),
        }
        if let Some(next) = next {
            next.set_prev(prev.map_or(ptr::null(), ptr::from_ref));
        }
        LIST.unlock();
        // SAFETY: from `Box::leak` in `new`; it is in no list any more, and `node` is not used after this.
        drop(unsafe { Box::from_raw(self.0.as_ptr()) });
    }
}

/// All registrations. The lock is held for a few instructions, and by a thread that forks until it has.
struct List {
    locked: AtomicBool,
    head: AtomicPtr<Node>,
}

static LIST: List = List { locked: AtomicBool::new(false), head: AtomicPtr::new(ptr::null_mut()) };

impl List {
    fn lock(&self) {
        // SYNC POINT: list unlocked
        while self.locked.swap(true, Ordering::Acquire) {
            std::thread::yield_now();
        }
    }

    fn unlock(&self) {
        // SYNC POINT: list unlocked
        self.locked.store(false, Ordering::Release);
    }

    fn first(&self) -> Option<&Node> {
        Self::at(&self.head)
    }

    /// The node that a pointer of the list leads to. With the list locked; not to be used after.
    fn at(pointer: &AtomicPtr<Node>) -> Option<&Node> {
        // SAFETY: null, or a node that is in the list: it is live, because it is taken out, with the list locked, before it is freed.
        unsafe { pointer.load(Ordering::Relaxed).as_ref() }
    }
}

fn install() {
    static INSTALLED: Once = Once::new();
    INSTALLED.call_once(|| {
        // SAFETY: the handlers are functions of this type, which live as long as the process, and call only what may be called in the
        // child of a process with many threads: atomics and bare system calls.
        let failed = unsafe { libc::pthread_atfork(Some(prepare), Some(in_parent), Some(in_child)) };
        // It fails for want of a few bytes only.
        assert_eq!(failed, 0, "no memory to be told of forks");
    });
}

extern "C" fn prepare() {
    LIST.lock();
}

extern "C" fn in_parent() {
    LIST.unlock();
}

extern "C" fn in_child() {
    // SAFETY: this process has one thread: nothing reads it now.
    unsafe { *GENERATION.0.get() += 1 };
    // Locked by `prepare`, by the thread that this one is a copy of.
    let mut next = LIST.first();
    while let Some(node) = next {
        // What a parent inherited was seen to when the parent was made.
        if node.origin.0 + 1 == Origin::now().0 {
            node.what.disown();
        }
        next = List::at(&node.next);
    }
    LIST.unlock();
}

impl What {
    fn disown(&self) {
        match self {
            &Self::Memory { start, len, fd } => {
                if replace(start, len, fd).is_err() {
                    let words =
                        "tokio-shm: fork: shared memory cannot be taken from the child, which is ended\n";
                    // SAFETY: the words are there, and as long as is said. (Not by std, whose lock a thread of the parent may hold.)
                    unsafe { libc::write(2, words.as_ptr().cast(), words.len()) };
                    std::process::abort();
                }
            }
            // Counted up and down again, from at least one that a thread of the parent's had and never drops here: nothing is freed.
            Self::Handle(handle) => {
                if let Some(handle) = handle.upgrade() {
                    handle.disown();
                }
            }
        }
    }
}

/// Puts private memory where a shared mapping is.
fn replace(start: NonNull<u8>, len: usize, fd: Option<RawFd>) -> Result<(), Errno> {
    let (start, mut prot) = (start.as_ptr().cast::<c_void>(), ProtFlags::READ | ProtFlags::WRITE);
    let flags = MapFlags::PRIVATE | MapFlags::FIXED | MapFlags::NORESERVE;
    if let Some(fd) = fd {
        // SAFETY: open for as long as the call, by whatever this number stands for: no other thread closes it. (A segment's own outlives
        // its mapping; what another would bring is the child's alone, and is not read: loans of the parent's panic.)
        let fd = unsafe { BorrowedFd::borrow_raw(fd) };
        // SAFETY: the range is one mapping of the registration's owner (`Registration::memory`'s contract), and stays mapped.
        if unsafe { mmap(start, len, prot, flags, fd, 0) }.is_ok() {
            return Ok(());
        }
        // Where so much may not even be promised (`vm.overcommit_memory`): nothing touches a segment of the parent's.
        prot = ProtFlags::empty();
    }
    // SAFETY: as above.
    unsafe { mmap_anonymous(start, len, prot, flags) }.map(drop)
}
