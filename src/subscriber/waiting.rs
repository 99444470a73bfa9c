//! Waiting for a message: on tokio's reactor, or on this thread with `poll(2)`.
//!
//! Both do the same in the same order: look; register for wake-ups; ask the publishers to ring; look once more; sleep.
//! A ring that comes after the second look finds us registered, one before it left its message for that look to find.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tokio::runtime::Handle;

use super::RecvError;
use super::core::{Core, Item};
use crate::reactor::Watched;
use crate::sys::bell::Bell;
use crate::sys::clock::monotonic_ns;
use crate::sys::epoll_set::EpollSet;
use crate::sys::socket::Connection;

/// Looks between two hints to the processor that this is a loop which waits: such a hint takes as long as ten looks, during
/// which a message lies there, but without any, the core's other thread would be slowed down, who may be the publisher.
const LOOKS_TO_A_PAUSE: usize = 4;
/// Returns to the runtime between two looks at sockets and the directory, while looking at memory.
const ROUNDS: u32 = 64;
/// How often `try_recv` looks at sockets and the directory.
const READ_EVERY_NS: u64 = 1_000_000;

/// A link's registrations with tokio's reactor: made at the first wait.
#[derive(Debug, Default)]
pub(super) struct Waits {
    socket: Option<Watched<Arc<Connection>>>,
    bell: Option<Watched<Arc<Bell>>>,
    process: Option<Watched<Arc<OwnedFd>>>,
    /// Its bell, for threads.
    heard: Option<Heard>,
}

impl Waits {
    /// Leaves the reactor; threads go on hearing the bell.
    fn unregister(&mut self) {
        self.socket = None;
        self.bell = None;
        self.process = None;
    }
}

/// A bell that is heard by the one on which threads wait.
///
/// They do not wait on the bells themselves: `poll(2)` goes by level, and by level a bell is heard for ever.
#[derive(Debug)]
struct Heard {
    bells: Arc<EpollSet>,
    bell: Arc<Bell>,
}

impl Drop for Heard {
    fn drop(&mut self) {
        // Closing the descriptor is not enough while the publisher has another.
        self.bells.remove(self.bell.as_fd());
    }
}

impl Core<Waits> {
    /// Polls for the next item, whatever it is; `None` once it is over. `looking`: it is not to sleep yet.
    pub(super) fn poll_next(
        &mut self,
        looking: bool,
        watched: &mut Option<Watched<OwnedFd>>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Item>> {
        if let Some(item) = self.next() {
            return Poll::Ready(Some(item));
        }
        if self.over {
            return Poll::Ready(None);
        }
        if looking {
            self.rounds = self.rounds.wrapping_add(1);
            if self.rounds.is_multiple_of(ROUNDS) {
                // Publishers come and go without touching the memory that we look at.
                if let Err(error) = self.poll_events(watched, cx) {
                    return Poll::Ready(Some(Err(error)));
                }
                if self.is_over() {
                    return Poll::Ready(None);
                }
                if let Some(notice) = self.waits_awake() {
                    return Poll::Ready(Some(Err(notice)));
                }
            }
            give_way(cx);
            return Poll::Pending;
        }
        self.poll_asleep(watched, cx)
    }

    /// Looks until there is something, for as many times as pay; `false` if there never was.
    #[inline]
    pub(super) fn look(&mut self) -> bool {
        for look in 1..=self.busy.looks() {
            if self.has_something() {
                self.busy.caught();
                return true;
            }
            if look.is_multiple_of(LOOKS_TO_A_PAUSE) {
                std::hint::spin_loop();
            }
        }
        false
    }

    #[cold]
    fn poll_asleep(
        &mut self,
        watched: &mut Option<Watched<OwnedFd>>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Item>> {
        loop {
            let events = match self.poll_events(watched, cx) {
                Ok(events) => events,
                Err(error) => return Poll::Ready(Some(Err(error))),
            };
            self.arm();
            let item = self.next();
            if item.is_some() || self.is_over() {
                self.disarm();
                return Poll::Ready(item);
            }
            if self.has_something() {
                self.disarm();
                give_way(cx);
                return Poll::Pending;
            }
            if !events {
                let Some(notice) = self.sleeps() else { return Poll::Pending };
                self.disarm();
                return Poll::Ready(Some(Err(notice)));
            }
        }
    }

    /// Handles what the reactor has seen and registers for more; `false` once there was nothing to handle, and the
    /// task will be woken for whatever comes.
    fn poll_events(
        &mut self,
        watched: &mut Option<Watched<OwnedFd>>,
        cx: &mut Context<'_>,
    ) -> Result<bool, RecvError> {
        self.move_to_this_runtime(watched);
        let mut any = false;
        for peer in &mut self.peers {
            let waits = &mut peer.waits;
            if waits.socket.is_none() {
                waits.socket = Some(Watched::register(Arc::clone(peer.link.connection()))?);
            }
            if poll_ready(&mut waits.socket, cx) || peer.link.is_unread() {
                peer.link.read_socket();
                any = true;
            }
            if waits.process.is_none()
                && let Some(process) = peer.link.process()
            {
                waits.process = Some(Watched::register(Arc::clone(process))?);
            }
            if poll_ready(&mut waits.process, cx) {
                peer.link.process_ended();
                any = true;
            }
            if waits.bell.is_none()
                && let Some(bell) = peer.link.bell()
            {
                waits.bell = Some(Watched::register_bell(Arc::clone(bell))?);
                any = true;
            }
            any |= poll_rung(&mut waits.bell, cx);
        }
        if watched.is_none() {
            *watched = Some(Watched::register(self.watch.as_fd().try_clone_to_owned()?)?);
        }
        if poll_ready(watched, cx) || self.behind {
            self.read_watch()?;
            any = true;
        }
        Ok(any)
    }

    /// Gives up the registrations with another runtime than the present one, which may not be driven any more, for new ones.
    fn move_to_this_runtime(&mut self, watched: &mut Option<Watched<OwnedFd>>) {
        // Outside any runtime it stays with the one that it is registered with.
        let Ok(runtime) = Handle::try_current() else { return };
        let before = self.runtime.replace(runtime.id());
        if before.is_some_and(|before| before != runtime.id()) {
            *watched = None;
            for peer in &mut self.peers {
                peer.waits.unregister();
            }
        }
    }

    /// Polls until `n` publishers have accepted us.
    pub(super) fn poll_publishers(
        &mut self,
        n: usize,
        watched: &mut Option<Watched<OwnedFd>>,
        cx: &mut Context<'_>,
    ) -> Poll<Result<(), RecvError>> {
        loop {
            if self.is_inherited() {
                return Poll::Ready(Err(RecvError::Forked));
            }
            if self.established() >= n {
                return Poll::Ready(Ok(()));
            }
            if self.over {
                return Poll::Ready(Err(RecvError::Closed));
            }
            let events = self.poll_events(watched, cx);
            if let Some(shortage) = self.peers.iter_mut().find_map(|peer| peer.link.take_shortage()) {
                return Poll::Ready(Err(shortage.into()));
            }
            if let Some(refused) = self.take_refusal() {
                return Poll::Ready(Err(refused));
            }
            match events {
                Ok(true) if self.peers.iter().any(|peer| peer.link.is_unread()) => {
                    give_way(cx);
                    return Poll::Pending;
                }
                Ok(true) => {}
                Ok(false) => return Poll::Pending,
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }

    /// Reads what publishers and the directory have to say, without waiting.
    pub(super) fn read_everything(&mut self) -> Result<(), RecvError> {
        for peer in &mut self.peers {
            peer.link.read_socket();
            peer.link.look_for_death();
        }
        Ok(self.read_watch()?)
    }

    /// The same, at most once a millisecond: for callers that look again and again, of whom most want no system call. `true` if it has.
    pub(super) fn read_now_and_then(&mut self) -> Result<bool, RecvError> {
        let now = monotonic_ns();
        if now.saturating_sub(self.last_read) < READ_EVERY_NS && self.established() == self.peers.len() {
            return Ok(false);
        }
        self.last_read = now;
        self.read_everything()?;
        Ok(true)
    }

    /// Waits on this thread; `None` once it is over, [`RecvError::TimedOut`] at the deadline.
    pub(super) fn blocking_next(&mut self, deadline: Option<Instant>) -> Option<Item> {
        loop {
            if let Some(item) = self.next() {
                return Some(item);
            }
            if self.over {
                return None;
            }
            if self.busy.look_again() {
                self.look();
                self.rounds = self.rounds.wrapping_add(1);
                if self.rounds.is_multiple_of(ROUNDS) {
                    if let Err(error) = self.read_everything() {
                        return Some(Err(error));
                    }
                    if self.is_over() {
                        return None;
                    }
                    if let Some(notice) = self.waits_awake() {
                        return Some(Err(notice));
                    }
                }
                // A clock read for each round of looks is cheap beside what it saves.
                if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                    return Some(Err(RecvError::TimedOut));
                }
                continue;
            }
            if let Err(error) = self.listen() {
                return Some(Err(error));
            }
            self.arm();
            if let Some(item) = self.next() {
                self.disarm();
                return Some(item);
            }
            if self.is_over() {
                return None;
            }
            if self.has_something() {
                self.disarm();
                if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                    return Some(Err(RecvError::TimedOut));
                }
                for peer in self.peers.iter_mut().filter(|peer| peer.link.is_unread()) {
                    peer.link.read_socket();
                }
                std::thread::yield_now();
                continue;
            }
            if let Some(notice) = self.sleeps() {
                self.disarm();
                return Some(Err(notice));
            }
            match self.sleep(deadline) {
                Ok(true) => {}
                Ok(false) => {
                    self.disarm();
                    return Some(self.next().unwrap_or(Err(RecvError::TimedOut)));
                }
                Err(error) => return Some(Err(error)),
            }
        }
    }

    /// Has every bell heard that is not yet, and puts out what has rung: before the look, so that what is rung for later
    /// is a new event.
    fn listen(&mut self) -> Result<(), RecvError> {
        let bells = match &self.bells {
            Some(bells) => bells,
            None => self.bells.insert(Arc::new(EpollSet::new()?)),
        };
        for peer in &mut self.peers {
            let Some(bell) = peer.link.bell() else { continue };
            if peer.waits.heard.is_some() {
                continue;
            }
            bells.add_bell(bell)?;
            peer.waits.heard = Some(Heard { bells: Arc::clone(bells), bell: Arc::clone(bell) });
        }
        bells.clear();
        Ok(())
    }

    /// Sleeps until something happens, and handles what concerns sockets and the directory; `false` at the deadline.
    fn sleep(&mut self, deadline: Option<Instant>) -> Result<bool, RecvError> {
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        // Past the deadline it looks without sleeping: a caller with no time at all must learn of publishers, too.
        let late = left.is_some_and(|left| left.is_zero());
        if self.behind {
            // Nothing is going to wake us for what is to be done again.
            self.read_watch()?;
            return Ok(!late);
        }
        // Longer than the kernel can count is as good as for ever.
        let timeout = left.and_then(|left| Timespec::try_from(left).ok());
        let mut sockets = Vec::new();
        let mut processes = Vec::new();
        let directory;
        {
            // The directory first, then the bells, then for each link its socket and its publisher's process.
            let mut fds = vec![readable(self.watch.as_fd())];
            let mut owners = vec![None];
            if let Some(bells) = &self.bells {
                fds.push(readable(bells.as_fd()));
                owners.push(None);
            }
            for (at, peer) in self.peers.iter().enumerate() {
                fds.push(readable(peer.link.as_fd()));
                owners.push(Some((at, Source::Socket)));
                if let Some(process) = peer.link.process() {
                    fds.push(readable(process.as_fd()));
                    owners.push(Some((at, Source::Process)));
                }
            }
            match poll(&mut fds, timeout.as_ref()) {
                Ok(0) => return Ok(false),
                Ok(_) => {}
                Err(rustix::io::Errno::INTR) => return Ok(true),
                Err(error) => return Err(io::Error::from(error).into()),
            }
            directory = !fds[0].revents().is_empty();
            for (fd, owner) in fds.iter().zip(owners) {
                match owner {
                    Some((at, Source::Socket)) if !fd.revents().is_empty() => sockets.push(at),
                    Some((at, Source::Process)) if !fd.revents().is_empty() => processes.push(at),
                    _ => {}
                }
            }
        }
        for at in sockets {
            self.peers[at].link.read_socket();
        }
        for at in processes {
            self.peers[at].link.process_ended();
        }
        if directory {
            self.read_watch()?;
        }
        Ok(!late)
    }
}

/// Has the task polled again once others, the runtime's I/O and its timers have had their turn.
///
/// As [`tokio::task::yield_now`] does. To wake the task at once would put it before all of them: a current-thread runtime looks
/// at its I/O once in 61 polls then, and a multi-threaded one polls a task again and again that wakes itself on its worker, where
/// whatever that worker has to run next waits behind it.
fn give_way(cx: &mut Context<'_>) {
    let yielding = pin!(tokio::task::yield_now());
    if yielding.poll(cx).is_ready() {
        // It never is when it is polled first; a version of tokio's where it is must not leave the task asleep.
        cx.waker().wake_by_ref();
    }
}

/// What of a link has become ready.
#[derive(Clone, Copy)]
enum Source {
    Socket,
    Process,
}

fn readable(fd: BorrowedFd<'_>) -> PollFd<'_> {
    PollFd::from_borrowed_fd(fd, PollFlags::IN)
}

/// Whether the descriptor has become ready since it was last asked; only if not, the task will be woken when it does.
///
/// The readiness is cleared before anybody looks: what comes later is a new event.
fn poll_ready<T: AsFd>(watched: &mut Option<Watched<T>>, cx: &mut Context<'_>) -> bool {
    let Some(registered) = watched else { return false };
    let ready = registered.poll_read_ready(cx).map_ok(|mut ready| ready.clear_ready());
    take_ready(watched, ready)
}

/// Whether the bell has been rung; otherwise as [`poll_ready`].
fn poll_rung(watched: &mut Option<Watched<Arc<Bell>>>, cx: &mut Context<'_>) -> bool {
    let Some(registered) = watched else { return false };
    let rung = registered.poll_write_ready(cx).map_ok(|mut ready| ready.clear_ready());
    take_ready(watched, rung)
}

fn take_ready<T>(watched: &mut Option<Watched<T>>, ready: Poll<io::Result<()>>) -> bool {
    if let Poll::Ready(Err(_)) = ready {
        // The runtime that it was registered with is gone: register with the present one.
        *watched = None;
    }
    ready.is_ready()
}
