//! The doorbell: how a process wakes one that sleeps, without trusting it.
//!
//! An eventfd alone is not enough between processes that do not trust each other. Whoever holds one may clear
//! `O_NONBLOCK` (the flag belongs to the open file, not to the descriptor) and fill the counter: the next ring then
//! blocks for ever. Or it may read the counter, and so eat rings meant for others.
//!
//! So the ringer keeps its eventfd *E* to itself, and gives away an epoll instance *P* that watches *E* edge-triggered.
//! With *P* one can wait (it is a pollable descriptor: tokio's reactor, `poll(2)`) and put the edge out (`epoll_wait`),
//! but not reach *E*: the kernel wants *E* itself for each operation on it.
//!
//! Two kinds, by who made the descriptors:
//! * [`bell_pair`]: the ringer makes both. Nobody can block or starve the ringer; the listener polls a descriptor
//!   that somebody else made. For a publisher that rings its subscribers.
//! * [`listening_pair`]: the listener makes both. Nobody can make the listener poll something that blocks (an epoll
//!   instance from elsewhere may watch a FUSE file, whose `poll` waits for a user process); the ringer writes to an eventfd
//!   that the listener can block. For a publisher that is rung by its subscribers.
//!
//! A bell says only "look again". It carries no count, rings may collapse, and one may come for nothing; it does not say
//! when the ringer dies either: that is the socket's task.

use rustix::event::{EventfdFlags, Timespec, epoll, eventfd};
use rustix::io::Errno;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// Makes a bell that the other side can hear and do nothing else with: the end to keep, and the epoll instance to send.
pub(crate) fn bell_pair() -> io::Result<(Ringer, OwnedFd)> {
    let ringer = Ringer::new()?;
    let bell = ringer.bell()?;
    Ok((ringer, bell.into_fd()))
}

/// Makes a bell that the other side can ring: the end to keep, and the eventfd to send.
///
/// The bell goes deaf when the last copy of the eventfd is closed, so it has to be sent before it is dropped here.
pub(crate) fn listening_pair() -> io::Result<(Bell, OwnedFd)> {
    let ringer = Ringer::new()?;
    let bell = ringer.bell()?;
    Ok((bell, ringer.eventfd))
}

/// The end that rings. Dropping it silences its bells: a ring just before may be lost with it, and none tells of the end.
#[derive(Debug)]
pub(crate) struct Ringer {
    eventfd: OwnedFd,
}

impl Ringer {
    /// A ringer that nobody listens to yet.
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self { eventfd: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)? })
    }

    /// Takes over an eventfd that the peer made with [`listening_pair`].
    ///
    /// # Errors
    /// `InvalidInput` when it is anything but an eventfd: a ring must not write into a file.
    pub(crate) fn from_fd(fd: OwnedFd) -> io::Result<Self> {
        // Nothing but its name in /proc tells an eventfd from other descriptors without writing to it.
        let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&fd));
        if std::fs::read_link(path)?.as_os_str() != "anon_inode:[eventfd]" {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "the doorbell received is not an eventfd",
            ));
        }
        Ok(Self { eventfd: fd })
    }

    /// A bell of this ringer's. There may be any number; each hears every ring.
    pub(crate) fn bell(&self) -> io::Result<Bell> {
        let bell = Bell::deaf()?;
        bell.also_hear(self.eventfd.as_fd())?;
        Ok(bell)
    }

    /// Rings. Never blocks (the eventfd is nonblocking and known to nobody else), and has no failure to report.
    ///
    /// What was written to memory before is seen by whoever looks after hearing it, provided that it was published there
    /// with release order: the bell is a wake-up, not a synchronisation.
    pub(crate) fn ring(&self) {
        // Only the counter's going up makes an edge, so it is never read back: 2^64 rings fit.
        while let Err(errno) = rustix::io::write(&self.eventfd, &1_u64.to_ne_bytes()) {
            match errno {
                Errno::INTR => {}
                // Full, which takes 2^64 rings or a mischievous peer: empty it, so that it can go up again.
                // Each round either writes or empties, and a peer that refills it in between hurts its own bell only.
                Errno::AGAIN => {
                    let mut count = [0_u8; 8];
                    let _ = rustix::io::read(&self.eventfd, &mut count);
                }
                // EBADF and the like: not possible on an eventfd that we own.
                _ => return,
            }
        }
    }
}

impl AsFd for Ringer {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.eventfd.as_fd()
    }
}

/// The end that listens: pollable, readable from each ring until [`clear`](Bell::clear).
///
/// To an edge-triggered watcher (tokio's reactor) each ring is an edge of its own, cleared or not.
#[derive(Debug)]
pub(crate) struct Bell {
    epoll: OwnedFd,
}

impl Bell {
    /// Takes over an epoll instance that the peer made with [`bell_pair`].
    ///
    /// Clears it, so what it announced has to be looked at once before the first wait.
    ///
    /// # Errors
    /// `InvalidInput` when it is anything but an epoll instance.
    pub(crate) fn from_fd(fd: OwnedFd) -> io::Result<Self> {
        match consume_edges(fd.as_fd()) {
            Ok(()) => Ok(Self { epoll: fd }),
            Err(Errno::INVAL) => Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "the doorbell received is not an epoll instance",
            )),
            Err(errno) => Err(errno.into()),
        }
    }

    /// A bell that hears nobody yet.
    pub(crate) fn deaf() -> io::Result<Self> {
        Ok(Self { epoll: epoll::create(epoll::CreateFlags::CLOEXEC)? })
    }

    /// Hears this descriptor no more.
    pub(crate) fn no_longer_hear(&self, fd: BorrowedFd<'_>) {
        // It fails only where it was not heard.
        let _ = epoll::delete(&self.epoll, fd);
    }

    /// Hears this descriptor's becoming readable too, as an edge.
    pub(crate) fn also_hear(&self, fd: BorrowedFd<'_>) -> io::Result<()> {
        Ok(epoll::add(
            &self.epoll,
            fd,
            epoll::EventData::new_u64(0),
            epoll::EventFlags::IN | epoll::EventFlags::ET,
        )?)
    }

    /// Puts out what has rung so far, for those that wait by level (`poll(2)`). Look for work *after* this, not before.
    pub(crate) fn clear(&self) {
        // It was an epoll instance when we took it over, and remains one.
        let _ = consume_edges(self.epoll.as_fd());
    }

    /// The epoll instance, to be sent.
    pub(crate) fn into_fd(self) -> OwnedFd {
        self.epoll
    }
}

impl AsFd for Bell {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }
}

/// `epoll_wait` that does not wait. Four events are more than any bell of ours watches; a peer's that watches more just
/// stays readable.
fn consume_edges(epoll: BorrowedFd<'_>) -> Result<(), Errno> {
    let mut events = [MaybeUninit::<epoll::Event>::uninit(); 4];
    loop {
        match epoll::wait(epoll, &mut events, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })) {
            Err(Errno::INTR) => {}
            other => return other.map(drop),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::event::{PollFd, PollFlags, poll};

    const NOW: Timespec = Timespec { tv_sec: 0, tv_nsec: 0 };

    fn is_readable(fd: impl AsFd) -> bool {
        let mut fds = [PollFd::new(&fd, PollFlags::IN)];
        poll(&mut fds, Some(&NOW)).unwrap() == 1
    }

    /// What tokio's reactor is to a bell.
    struct Reactor(OwnedFd);

    impl Reactor {
        fn watching(fd: impl AsFd) -> Self {
            let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).unwrap();
            epoll::add(
                &epoll,
                fd,
                epoll::EventData::new_u64(7),
                epoll::EventFlags::IN | epoll::EventFlags::ET,
            )
            .unwrap();
            Self(epoll)
        }

        fn turn(&self) -> bool {
            let mut events = [MaybeUninit::<epoll::Event>::uninit(); 4];
            let (events, _) = epoll::wait(&self.0, &mut events, Some(&NOW)).unwrap();
            !events.is_empty()
        }
    }

    fn fill(eventfd: impl AsFd) {
        rustix::io::write(eventfd, &(u64::MAX - 1).to_ne_bytes()).unwrap();
    }

    #[test]
    fn bell_polled_by_level_is_readable_from_ring_to_clear() {
        let (ringer, fd) = bell_pair().unwrap();
        let bell = Bell::from_fd(fd).unwrap();
        for _ in 0..3 {
            assert!(!is_readable(&bell));
            ringer.ring();
            ringer.ring();
            assert!(is_readable(&bell));
            assert!(is_readable(&bell));
            bell.clear();
        }
        assert!(!is_readable(&bell));
    }

    #[test]
    fn bell_never_cleared_gives_an_edge_for_every_ring() {
        let (ringer, fd) = bell_pair().unwrap();
        let bell = Bell::from_fd(fd).unwrap();
        let reactor = Reactor::watching(&bell);
        for _ in 0..1_000 {
            assert!(!reactor.turn());
            ringer.ring();
            assert!(reactor.turn());
        }
    }

    #[test]
    fn bell_cleared_before_the_reactor_turns_gives_the_next_edge() {
        let (ringer, fd) = bell_pair().unwrap();
        let bell = Bell::from_fd(fd).unwrap();
        let reactor = Reactor::watching(&bell);
        for _ in 0..100 {
            ringer.ring();
            bell.clear();
            assert!(!reactor.turn());
            ringer.ring();
            assert!(reactor.turn());
        }
    }

    #[test]
    fn ringer_with_a_full_counter_still_makes_an_edge() {
        let (ringer, fd) = bell_pair().unwrap();
        let bell = Bell::from_fd(fd).unwrap();
        fill(&ringer.eventfd);
        let reactor = Reactor::watching(&bell);
        assert!(reactor.turn());
        ringer.ring();
        assert!(reactor.turn());
        assert!(is_readable(&bell));
    }

    #[test]
    fn bell_holder_cannot_reach_the_eventfd() {
        let (ringer, fd) = bell_pair().unwrap();
        assert_eq!(rustix::io::write(&fd, &1_u64.to_ne_bytes()), Err(Errno::INVAL));
        assert_eq!(rustix::io::read(&fd, &mut [0_u8; 8]), Err(Errno::INVAL));
        // Clearing O_NONBLOCK on what it has does not reach the ringer's.
        rustix::fs::fcntl_setfl(&fd, rustix::fs::OFlags::empty()).unwrap();
        let flags = rustix::fs::fcntl_getfl(&ringer.eventfd).unwrap();
        assert!(flags.contains(rustix::fs::OFlags::NONBLOCK));
        // To stop watching it, or to watch it otherwise, takes the eventfd itself.
        let other = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        assert_eq!(epoll::delete(&fd, &other), Err(Errno::NOENT));
        let bell = Bell::from_fd(fd).unwrap();
        ringer.ring();
        assert!(is_readable(&bell));
    }

    #[test]
    fn bells_of_one_ringer_each_hear_every_ring() {
        let ringer = Ringer::new().unwrap();
        let (first, second) = (ringer.bell().unwrap(), ringer.bell().unwrap());
        ringer.ring();
        first.clear();
        assert!(!is_readable(&first));
        assert!(is_readable(&second));
    }

    #[test]
    fn listening_pair_rung_by_the_peer_is_heard() {
        let (bell, eventfd) = listening_pair().unwrap();
        let reactor = Reactor::watching(&bell);
        let ringer = Ringer::from_fd(eventfd).unwrap();
        assert!(!reactor.turn());
        ringer.ring();
        assert!(reactor.turn());
        // The peer drains it or fills it: the listener is not harmed, only unheard or woken.
        rustix::io::read(&ringer.eventfd, &mut [0_u8; 8]).unwrap();
        fill(&ringer.eventfd);
        ringer.ring();
        bell.clear();
        ringer.ring();
        assert!(is_readable(&bell));
        drop(ringer);
        bell.clear();
        assert!(!is_readable(&bell));
    }

    #[test]
    fn descriptors_of_another_kind_are_refused() {
        let file = std::fs::File::open("/dev/null").unwrap();
        let event = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        assert_eq!(Bell::from_fd(event).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        assert_eq!(
            Bell::from_fd(file.try_clone().unwrap().into()).unwrap_err().kind(),
            io::ErrorKind::InvalidInput
        );
        assert_eq!(Ringer::from_fd(file.into()).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        let (_ringer, epoll) = bell_pair().unwrap();
        assert_eq!(Ringer::from_fd(epoll).unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }
}
