//! Watching directories, with one inotify instance for as many watches of the process as can share it.
//!
//! inotify instances are few (128 for each user by default), so the watches of a process share one, and hundreds of them a second
//! one. Each is made when there is no room with those that there are, and then kept.
//!
//! Sharing has a catch: whoever reads an event takes it from all. So events are read and handed out under one lock, into flags
//! that each watch has for itself. And a watch cannot wait on the instance alone: a neighbour may empty it between the wake-up and
//! the look, and the kernel, asked again, would say that there is nothing. Each watch therefore waits on an epoll instance of its
//! own that hears both the instance and a bell, and who has read on behalf of others rings that bell.
//!
//! Directories are watched for what comes and goes in them, and files for being removed.
//!
//! What changed is not said, only that something did: the directory has to be read anyway, as events may be lost.

mod error;
#[cfg(test)]
mod tests;

pub use error::WatchError;

use super::INTERRUPTIONS_MAX;
use super::bell::Bell;
use super::epoll_set::EpollSet;
use super::fork::{Origin, PerProcess};
use parking_lot::Mutex;
use rustix::fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags};
use rustix::io::Errno;
use std::collections::HashMap;
use std::ffi::CStr;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

/// What has happened in the directories of a watch since it was asked last.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Changes {
    /// Something has changed in one of the targets; or events were lost.
    pub(crate) changed: bool,
    /// One of the targets was moved or removed, and may not be watched any more: find out, and watch anew.
    pub(crate) gone: bool,
}

/// What a watch is to hear of.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Target<'a> {
    /// What is moved into a directory or removed from it.
    Directory(BorrowedFd<'a>),
    /// The same, and the directories that are made in it.
    Awaited(BorrowedFd<'a>),
    /// As [`Directory`](Self::Directory), of the directory that this one is in.
    Parent(BorrowedFd<'a>),
    /// Whether a directory is moved.
    Place(BorrowedFd<'a>),
    /// Whether this file in a directory is removed or moved.
    File(BorrowedFd<'a>, &'a str),
}

/// A watch on a few directories or files, which can be exchanged for others.
#[derive(Debug)]
pub(crate) struct DirectoryWatch {
    shared: Arc<Shared>,
    user: User,
    heard: EpollSet,
}

impl DirectoryWatch {
    /// A watch on no directory yet.
    pub(crate) fn new() -> Result<Self, WatchError> {
        let mut instances = INSTANCES.get().lock();
        let with_room = instances.iter().find(|shared| shared.watches.lock().users.len() < USERS_MAX);
        let shared = match with_room {
            Some(shared) => Arc::clone(shared),
            None => {
                let shared = Arc::new(Shared::new()?);
                instances.push(Arc::clone(&shared));
                shared
            }
        };
        let heard = shared.listen()?;
        // While nobody else looks for room.
        let user = shared.watches.lock().join();
        Ok(Self { shared, user, heard })
    }

    /// Watches `targets`, and no longer what it watched before. From the return on, no change of theirs is missed.
    ///
    /// # Errors
    /// On failure it goes on watching what it watched before.
    pub(crate) fn watch(&self, targets: &[Target<'_>]) -> Result<(), WatchError> {
        self.shared.watch(self.user, targets)
    }

    /// Is readable, too, each time that this descriptor becomes readable.
    pub(crate) fn hear(&self, fd: BorrowedFd<'_>) -> Result<(), WatchError> {
        self.heard.add_readable(fd).map_err(WatchError::descriptor)
    }

    /// Reads all events there are, and says what they mean for this watch.
    ///
    /// To be called when [`as_fd`](AsFd::as_fd) is readable. A reactor's readiness is to be cleared *before* the call: what comes
    /// later makes it ready anew.
    pub(crate) fn take(&self) -> Result<Changes, WatchError> {
        // Before reading, so that an event that comes in between lights it up again.
        self.heard.clear();
        self.shared.take(self.user)
    }
}

impl AsFd for DirectoryWatch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.heard.as_fd()
    }
}

impl Drop for DirectoryWatch {
    fn drop(&mut self) {
        self.shared.leave(self.user);
    }
}

/// The process's instances (a child begins without any: of an instance that two processes have, each takes the other's events), the first from the first watch on. None is ever closed: closing one takes the kernel some ten
/// milliseconds (it waits for readers everywhere), on the thread of whoever drops the last subscriber.
static INSTANCES: PerProcess<Mutex<Vec<Arc<Shared>>>> = PerProcess::new();

/// Watches that share an instance. epoll lets a descriptor wake others by way of an epoll instance 500 times and no more (then
/// `EPOLL_CTL_ADD` says EINVAL), and each watch that a reactor waits for is one of them. Half of it, because whatever one of them is
/// to hear wakes them all.
const USERS_MAX: usize = 250;

type User = u64;

#[derive(Debug)]
struct Shared {
    inotify: OwnedFd,
    /// In a child it is left alone.
    origin: Origin,
    /// Rung when somebody has read events that were meant for others.
    bell: Bell,
    watches: Mutex<Watches>,
}

impl Target<'_> {
    fn path(&self) -> String {
        match self {
            Self::Directory(dir) | Self::Awaited(dir) | Self::Place(dir) => {
                format!("/proc/self/fd/{}", dir.as_raw_fd())
            }
            Self::Parent(dir) => format!("/proc/self/fd/{}/..", dir.as_raw_fd()),
            Self::File(dir, name) => format!("/proc/self/fd/{}/{name}", dir.as_raw_fd()),
        }
    }

    /// A directory that is watched twice has one watch in the kernel, which hears of what either wants. `MASK_ADD` only ever widens
    /// that one's mask: without it the kernel empties the mask before it fills it again, and what happens in between is told to nobody.
    fn events(&self) -> WatchFlags {
        let directory = WatchFlags::MOVED_TO | WatchFlags::DELETE | WatchFlags::ONLYDIR;
        let own = match self {
            Self::Directory(_) | Self::Parent(_) => directory,
            Self::Awaited(_) => directory | WatchFlags::CREATE,
            Self::Place(_) => WatchFlags::ONLYDIR,
            // A file that is open is not deleted yet when its name is removed, but has one link less.
            Self::File(..) => WatchFlags::ATTRIB | WatchFlags::DONT_FOLLOW,
        };
        own | WatchFlags::DELETE_SELF | WatchFlags::MOVE_SELF | WatchFlags::MASK_ADD
    }
}

/// Whether an event can be of use to anybody: of what is made in a directory only directories are, and no hidden ones, which are only
/// being made ready. Files count once they are moved to their names.
fn concerns(events: ReadFlags, name: Option<&CStr>) -> bool {
    !events.contains(ReadFlags::CREATE)
        || (events.contains(ReadFlags::ISDIR) && !name.is_some_and(|name| name.to_bytes().starts_with(b".")))
}

/// Of what is read, what says that the directory itself is no longer there or no longer watched.
const GONE: ReadFlags =
    ReadFlags::DELETE_SELF.union(ReadFlags::MOVE_SELF).union(ReadFlags::UNMOUNT).union(ReadFlags::IGNORED);

impl Shared {
    fn new() -> Result<Self, WatchError> {
        // First the one that can only fail for want of a descriptor: inotify gives the same EMFILE for two reasons.
        let bell = Bell::new().map_err(WatchError::descriptor)?;
        let inotify = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)
            .map_err(|errno| WatchError::instance(errno, bell.as_fd()))?;
        Ok(Self { inotify, origin: Origin::here(), bell, watches: Mutex::default() })
    }

    fn listen(&self) -> Result<EpollSet, WatchError> {
        let set = EpollSet::new().map_err(WatchError::descriptor)?;
        set.add_bell(&self.bell).map_err(WatchError::descriptor)?;
        set.add_readable(self.inotify.as_fd()).map_err(WatchError::descriptor)?;
        // The bell is heard from its next ring on: whoever begins to watch looks for himself.
        set.clear();
        Ok(set)
    }

    fn watch(&self, user: User, targets: &[Target<'_>]) -> Result<(), WatchError> {
        if !self.origin.is_here() {
            return Ok(());
        }
        let mut watches = self.watches.lock();
        // What is in the queue belongs to the watches of now; a number given out next may be one that it names.
        self.dispatch(&mut watches, user)?;
        let before = watches.of(user);
        let mut added = Vec::with_capacity(targets.len());
        for target in targets {
            match inotify::add_watch(&self.inotify, target.path(), target.events()) {
                Ok(descriptor) => {
                    watches.add(descriptor, user);
                    added.push(descriptor);
                }
                Err(errno) => {
                    added.retain(|descriptor| !before.contains(descriptor));
                    self.remove(&mut watches, user, &added);
                    return Err(WatchError::watch(errno));
                }
            }
        }
        let mut stale = before;
        stale.retain(|descriptor| !added.contains(descriptor));
        self.remove(&mut watches, user, &stale);
        Ok(())
    }

    fn take(&self, user: User) -> Result<Changes, WatchError> {
        if !self.origin.is_here() {
            return Ok(Changes::default());
        }
        let mut watches = self.watches.lock();
        self.dispatch(&mut watches, user)?;
        Ok(watches.users.get_mut(&user).map(std::mem::take).unwrap_or_default())
    }

    fn leave(&self, user: User) {
        if !self.origin.is_here() {
            return;
        }
        let mut watches = self.watches.lock();
        let all = watches.of(user);
        self.remove(&mut watches, user, &all);
        watches.users.remove(&user);
    }

    fn remove(&self, watches: &mut Watches, user: User, descriptors: &[i32]) {
        for &descriptor in descriptors {
            if watches.remove(descriptor, user) {
                // Fails when the directory has gone and the watch with it.
                let _ = inotify::remove_watch(&self.inotify, descriptor);
            }
        }
    }

    /// Reads all events and notes them with those they concern; wakes the others if there are any besides `reader`.
    fn dispatch(&self, watches: &mut Watches, reader: User) -> Result<(), WatchError> {
        let mut buf = [MaybeUninit::<u8>::uninit(); 4096];
        let mut events = inotify::Reader::new(&self.inotify, &mut buf);
        let mut others = false;
        let mut interruptions = 0;
        let outcome = loop {
            match events.next() {
                Ok(event) if !concerns(event.events(), event.file_name()) => {}
                Ok(event) => others |= watches.note(event.wd(), event.events(), reader),
                Err(Errno::AGAIN) => break Ok(()),
                Err(Errno::INTR) if interruptions < INTERRUPTIONS_MAX => interruptions += 1,
                Err(errno) => break Err(WatchError::reading(errno)),
            }
        };
        if others {
            self.bell.ring();
        }
        outcome
    }
}

/// Who watches what. Small: most processes have a handful of watches.
#[derive(Debug, Default)]
struct Watches {
    last_user: User,
    users: HashMap<User, Changes>,
    /// By the kernel's watch descriptor.
    by_descriptor: HashMap<i32, Vec<User>>,
}

impl Watches {
    fn join(&mut self) -> User {
        self.last_user += 1;
        self.users.insert(self.last_user, Changes::default());
        self.last_user
    }

    fn of(&self, user: User) -> Vec<i32> {
        let watching = self.by_descriptor.iter().filter(|(_, users)| users.contains(&user));
        watching.map(|(&descriptor, _)| descriptor).collect()
    }

    fn add(&mut self, descriptor: i32, user: User) {
        let users = self.by_descriptor.entry(descriptor).or_default();
        if !users.contains(&user) {
            users.push(user);
        }
    }

    /// `true` if nobody watches it any more.
    fn remove(&mut self, descriptor: i32, user: User) -> bool {
        let Some(users) = self.by_descriptor.get_mut(&descriptor) else { return false };
        users.retain(|&other| other != user);
        let unused = users.is_empty();
        if unused {
            self.by_descriptor.remove(&descriptor);
        }
        unused
    }

    /// `true` if it concerns anybody but `reader`.
    fn note(&mut self, descriptor: i32, events: ReadFlags, reader: User) -> bool {
        let gone = events.intersects(GONE);
        let news = Changes { changed: true, gone };
        if events.contains(ReadFlags::QUEUE_OVERFLOW) {
            // Anything may have been lost, the news that a directory went away too.
            return self.note_for(
                self.users.keys().copied().collect(),
                Changes { changed: true, gone: true },
                reader,
            );
        }
        // With IGNORED the kernel's watch is no more, and its number free for another. Should it have been given out again
        // already, those watching are told to watch anew, which finds the right number.
        let users = if events.contains(ReadFlags::IGNORED) {
            self.by_descriptor.remove(&descriptor)
        } else {
            self.by_descriptor.get(&descriptor).cloned()
        };
        // None: the last events of a watch that was given up.
        users.is_some_and(|users| self.note_for(users, news, reader))
    }

    fn note_for(&mut self, users: Vec<User>, news: Changes, reader: User) -> bool {
        let mut others = false;
        for user in users {
            if let Some(changes) = self.users.get_mut(&user) {
                changes.changed |= news.changed;
                changes.gone |= news.gone;
                others |= user != reader;
            }
        }
        others
    }
}
