//! The doorbell: how a process wakes one that sleeps, neither of them trusting the other.
//!
//! An eventfd used in the ordinary way can be turned against whoever rings it: `O_NONBLOCK` belongs to the open file, which both
//! processes have, so the listener may clear it, fill the counter, and the next `write` blocks for ever. So a bell is rung the other
//! way round. Its counter begins full and each ring *takes one off it*: a read with `RWF_NOWAIT`, which does not wait whatever
//! the file's flags are, and which wakes everybody who waits for the counter to have room. What each side does with a bell
//! is then harmless to itself:
//!
//! * The ringer reads, and never waits. With `EFD_SEMAPHORE` a read takes one, so that a counter of nearly 2^64 outlasts all rings.
//! * The listener watches for `EPOLLOUT`, edge-triggered, and touches the counter not at all. The kernel's `poll` of an eventfd
//!   takes no lock that a process could hold (that of an epoll instance does), and nobody can make it wait.
//!
//! A peer that empties the counter hurts its own bell: it is not rung any more, or does not ring.
//!
//! Given up: an eventfd that only the ringer has, heard by way of an epoll instance in the listener's hands. It is safe for the
//! ringer only, and a nested epoll costs half a microsecond a round trip. `pwritev2` with `RWF_NOWAIT` is refused on eventfds.
//!
//! A bell says only "look again". It carries no count, rings may collapse, and one may come for nothing; it does not say
//! when the ringer dies either: that is the socket's task.

use std::io::{self, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::event::{EventfdFlags, eventfd};
use rustix::io::{Errno, ReadWriteFlags, preadv2};

/// A bell: either side rings it, either side may listen to it.
///
/// To an edge-triggered watcher of its becoming writable (tokio's reactor, an [`EpollSet`](super::epoll_set::EpollSet))
/// each ring is an edge of its own. By level it is writable from the first ring on and for ever.
#[derive(Debug)]
pub(crate) struct Bell {
    eventfd: OwnedFd,
    /// Where a model's threads hear it.
    #[cfg(tokio_shm_shuttle)]
    pub(crate) model: std::sync::Arc<crate::sync::Notify>,
}

impl Bell {
    /// Makes a bell, to be sent to the peer as it is.
    ///
    /// # Errors
    /// `Unsupported` before Linux 5.8, where an eventfd cannot be read with `RWF_NOWAIT`.
    pub(crate) fn new() -> io::Result<Self> {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK | EventfdFlags::SEMAPHORE;
        let bell = Self::of(eventfd(0, flags)?);
        // The most that fits. Nobody else has it yet, so this does not wait.
        rustix::io::write(&bell.eventfd, &(u64::MAX - 1).to_ne_bytes())?;
        match bell.take_one() {
            Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "a doorbell cannot be made: Linux 5.8 or later is needed, and preadv2 allowed",
            )),
            other => Ok(other.map(|()| bell)?),
        }
    }

    /// Takes over a bell that the peer made.
    ///
    /// # Errors
    /// `InvalidInput` when it is anything but an eventfd: what else the peer may send could make us wait when it is read or polled.
    pub(crate) fn from_fd(fd: OwnedFd) -> io::Result<Self> {
        // Nothing but its name in /proc tells an eventfd from other descriptors without using it.
        let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
        if std::fs::read_link(path)?.as_os_str() != "anon_inode:[eventfd]" {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "the doorbell received is not an eventfd",
            ));
        }
        Ok(Self::of(fd))
    }

    fn of(eventfd: OwnedFd) -> Self {
        Self {
            eventfd,
            #[cfg(tokio_shm_shuttle)]
            model: std::sync::Arc::new(crate::sync::Notify::new()),
        }
    }

    /// Rings. Never waits, whatever the peer does with the bell, and has no failure to report.
    ///
    /// What was written to memory before is seen by whoever looks after hearing it, provided that it was published there
    /// with release order: the bell is a wake-up, not a synchronisation.
    pub(crate) fn ring(&self) {
        // It fails when the peer has emptied the counter, which is the peer's own loss: an honest one cannot.
        let _ = self.take_one();
        #[cfg(tokio_shm_shuttle)]
        self.model.notify_one();
    }

    fn take_one(&self) -> Result<(), Errno> {
        let mut count = [0; 8];
        // The offset that stands for none: an eventfd has no positions.
        let read =
            preadv2(&self.eventfd, &mut [IoSliceMut::new(&mut count)], u64::MAX, ReadWriteFlags::NOWAIT);
        read.map(drop)
    }
}

impl AsFd for Bell {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.eventfd.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::epoll_set::EpollSet;
    use crate::sys::testing::is_readable;

    /// The same bell in the peer's hands.
    fn sent(bell: &Bell) -> Bell {
        Bell::from_fd(bell.eventfd.try_clone().unwrap()).unwrap()
    }

    #[test]
    fn bell_rung_is_heard_on_the_other_side_once_for_each_look() {
        let bell = Bell::new().unwrap();
        let set = EpollSet::new().unwrap();
        set.add_bell(&sent(&bell)).unwrap();
        set.clear();
        for _ in 0..1_000 {
            assert!(!is_readable(&set));
            bell.ring();
            bell.ring();
            assert!(is_readable(&set));
            set.clear();
        }
        assert!(!is_readable(&set));
    }

    #[test]
    fn bell_whose_peer_makes_it_blocking_and_fills_or_empties_it_keeps_nobody_waiting() {
        let bell = Bell::new().unwrap();
        let peer = sent(&bell);
        rustix::fs::fcntl_setfl(&peer, rustix::fs::OFlags::empty()).unwrap();
        // Full again: a write would wait now.
        rustix::io::write(&peer, &1_u64.to_ne_bytes()).unwrap();
        bell.ring();
        // Empty, as no honest peer can make it: an ordinary read would wait.
        let empty = Bell::of(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::SEMAPHORE).unwrap());
        empty.ring();
        assert_eq!(empty.take_one(), Err(Errno::AGAIN));
    }

    #[test]
    fn bell_that_its_peer_writes_to_is_not_heard_for_it() {
        let bell = Bell::new().unwrap();
        let set = EpollSet::new().unwrap();
        set.add_bell(&bell).unwrap();
        set.clear();
        rustix::io::write(sent(&bell), &1_u64.to_ne_bytes()).unwrap();
        assert!(!is_readable(&set));
        bell.ring();
        assert!(is_readable(&set));
    }

    #[test]
    fn descriptors_of_another_kind_are_refused() {
        let file = std::fs::File::open("/dev/null").unwrap();
        let epoll = rustix::event::epoll::create(rustix::event::epoll::CreateFlags::CLOEXEC).unwrap();
        for fd in [file.into(), epoll] {
            assert_eq!(Bell::from_fd(fd).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        }
    }
}
