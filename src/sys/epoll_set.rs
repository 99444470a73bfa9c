//! Several descriptors as one, for those that wait by level: threads in `poll(2)`, and watches that share one source.
//!
//! An epoll instance of our own, never sent to anybody. It hears edges only, so that a descriptor which is ready for ever
//! wakes nobody twice; what it has heard it goes on telling until [`clear`](EpollSet::clear).

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::{Timespec, epoll};

use super::again_if_interrupted;
use super::bell::Bell;
use super::fork::{Origin, inherited};

/// Readable from each edge until cleared.
#[derive(Debug)]
pub(crate) struct EpollSet {
    epoll: OwnedFd,
    /// A child has it open as well: what it took away, or put out, its parent would not hear.
    origin: Origin,
}

impl EpollSet {
    /// One that hears nobody yet.
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self { epoll: epoll::create(epoll::CreateFlags::CLOEXEC)?, origin: Origin::here() })
    }

    /// Hears this bell too.
    pub(crate) fn add_bell(&self, bell: &Bell) -> io::Result<()> {
        self.add(bell.as_fd(), epoll::EventFlags::OUT)
    }

    /// Hears this descriptor's becoming readable too.
    pub(crate) fn add_readable(&self, fd: BorrowedFd<'_>) -> io::Result<()> {
        self.add(fd, epoll::EventFlags::IN)
    }

    /// Hears this descriptor no more.
    pub(crate) fn remove(&self, fd: BorrowedFd<'_>) {
        if !self.origin.is_here() {
            return;
        }
        // It fails only where it was not heard.
        let _ = epoll::delete(&self.epoll, fd);
    }

    /// Puts out what it has heard so far. Look for work *after* this, not before.
    pub(crate) fn clear(&self) {
        if !self.origin.is_here() {
            return;
        }
        let mut events = [MaybeUninit::<epoll::Event>::uninit(); 64];
        // What more has been heard than there is room for is told again at once, and put out then.
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        let _ = again_if_interrupted(|| epoll::wait(&self.epoll, &mut events, Some(&now)).map(drop));
    }

    fn add(&self, fd: BorrowedFd<'_>, what: epoll::EventFlags) -> io::Result<()> {
        if !self.origin.is_here() {
            return Err(inherited());
        }
        Ok(epoll::add(&self.epoll, fd, epoll::EventData::new_u64(0), what | epoll::EventFlags::ET)?)
    }
}

impl AsFd for EpollSet {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::testing::is_readable;

    #[test]
    fn set_is_readable_from_an_edge_to_the_clear() {
        let (set, bells) = (EpollSet::new().unwrap(), [(); 100].map(|()| Bell::new().unwrap()));
        for bell in &bells {
            set.add_bell(bell).unwrap();
            bell.ring();
        }
        assert!(is_readable(&set));
        set.clear();
        set.clear();
        assert!(!is_readable(&set));
        for bell in [0, 99] {
            bells[bell].ring();
            assert!(is_readable(&set));
            set.clear();
            assert!(!is_readable(&set));
        }
    }

    #[test]
    fn descriptor_removed_is_heard_no_more() {
        let (set, bell) = (EpollSet::new().unwrap(), Bell::new().unwrap());
        set.add_bell(&bell).unwrap();
        set.remove(bell.as_fd());
        bell.ring();
        assert!(!is_readable(&set));
    }

    #[test]
    fn sets_that_hear_one_bell_are_cleared_one_by_one() {
        let (first, second, bell) =
            (EpollSet::new().unwrap(), EpollSet::new().unwrap(), Bell::new().unwrap());
        first.add_bell(&bell).unwrap();
        second.add_bell(&bell).unwrap();
        first.clear();
        second.clear();
        bell.ring();
        first.clear();
        assert!(!is_readable(&first));
        assert!(is_readable(&second));
    }
}
