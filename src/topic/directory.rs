//! The directory of one topic: making it, the publishers in it, and removing it when it is empty.
//!
//! A publisher makes its topic's directories if need be; a subscriber only looks for them, and needs to write nothing. Who leaves
//! removes those that are empty. So any of them may vanish at any time until something is in it, and everything here expects that
//! and tries again. Nothing is locked: a directory is only ever removed by `rmdir`, which the kernel refuses while anything is in
//! it, and a file has the random name of one publisher, which is never another's, so that what has been found dead is dead.
//!
//! Directories appear complete, as sockets do: made under a hidden name, given to whom they are for, then renamed. So no process of
//! another user ever finds one that it cannot enter yet.
//!
//! Waits for nothing and tells nobody: that is the watch's task.

use super::error::DiscoveryError;
use super::name::TopicName;
use super::runtime_dir::{DIRECTORY, RuntimeDir, make_private_dir};
use crate::sys::ownership::Ownership;
use crate::sys::socket::{self, ConnectFailed, Connection, Listener, Liveness, NEW_PREFIX};
use crate::text::chain;
use rustix::fs::{
    AtFlags, Dir, FileType, FlockOperation, Mode, OFlags, RenameFlags, flock, fstat, openat, renameat,
    renameat_with, statat, unlinkat,
};
use rustix::io::Errno;
use rustix::process::geteuid;
use rustix::time::{ClockId, clock_gettime};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

const PUBLISHER_PREFIX: &str = ".pub-";

/// How often a directory may be removed while it is being opened. Each time takes somebody who leaves at just that instant, so
/// that this many is no accident.
pub(super) const ATTEMPTS: usize = 1_000;

/// What is being made takes microseconds. After so many seconds its maker is dead, or finds out when it goes on, and begins anew.
const UNFINISHED_SECONDS: i64 = 60;

/// Tells a file or directory from others that have had its name.
pub(crate) type FileId = (u64, u64);

/// The directory of a topic, open.
#[derive(Debug)]
pub(crate) struct TopicDir {
    runtime: RuntimeDir,
    name: TopicName,
    /// One descriptor only, whatever the depth; parents are found again when they are needed.
    fd: OwnedFd,
}

/// How far the way to a topic's directory exists.
#[derive(Debug)]
pub(super) enum Reach {
    /// All of it.
    Topic(TopicDir),
    /// As far as this directory, of so many of the topic's parts: none for the runtime directory.
    Partway(OwnedFd, usize),
    /// There is no runtime directory; the innermost above it.
    Nothing(OwnedFd),
}

impl TopicDir {
    /// Opens the topic's directory, and makes what is missing of it. For a publisher.
    pub(crate) fn open(runtime: &RuntimeDir, name: &TopicName) -> Result<Self, DiscoveryError> {
        let fd = open_chain(runtime, name)?;
        Ok(Self { runtime: runtime.clone(), name: name.clone(), fd })
    }

    /// Opens what there is of the topic's directories, the innermost, and makes nothing.
    pub(super) fn find(runtime: &RuntimeDir, name: &TopicName) -> Result<Reach, DiscoveryError> {
        let Some(mut fd) = runtime.open_existing()? else {
            return Ok(Reach::Nothing(nearest_above(runtime.path())?));
        };
        for (parts, component) in name.components().enumerate() {
            match openat(&fd, &*component, DIRECTORY, Mode::empty()) {
                Ok(next) => fd = next,
                Err(Errno::NOENT) => return Ok(Reach::Partway(fd, parts)),
                Err(errno) => return Err(DiscoveryError::os("opening the topic's directory")(errno)),
            }
        }
        Ok(Reach::Topic(Self { runtime: runtime.clone(), name: name.clone(), fd }))
    }

    /// Removes what dead processes have left of the topic, its empty directories included. For who is about to look for it.
    pub(crate) fn sweep(runtime: &RuntimeDir, name: &TopicName) -> Result<(), DiscoveryError> {
        let unfinished = unfinished_name(name.components().next().unwrap_or_default().as_str());
        match Self::find(runtime, name)? {
            Reach::Topic(dir) => {
                dir.remove_stale()?;
                dir.leave()
            }
            // Of a directory in the runtime directory itself, which nobody else looks through.
            Reach::Partway(root, 0) if is_abandoned(root.as_fd(), &unfinished) => {
                remove_unfinished(root.as_fd(), &unfinished);
                Ok(())
            }
            Reach::Partway(..) | Reach::Nothing(_) => Ok(()),
        }
    }

    /// Where it is.
    pub(crate) fn path(&self) -> std::path::PathBuf {
        self.runtime.path().join(relative_path(&self.name))
    }

    /// Opens it anew, if it was removed.
    pub(crate) fn reopen(&mut self) -> Result<(), DiscoveryError> {
        self.fd = open_chain(&self.runtime, &self.name)?;
        Ok(())
    }

    /// Makes publisher `id` known, and able to be connected to, in that order reversed: it accepts before it is seen.
    ///
    /// `id` must be random: its name must never have been another publisher's.
    pub(crate) fn publish(&mut self, id: u128) -> Result<Listener, DiscoveryError> {
        let name = publisher_name(id);
        for _ in 0..ATTEMPTS {
            match Listener::bind(self.fd.as_fd(), &name) {
                Ok(listener) => return Ok(listener),
                // Removed under us: nothing can be made in it. (From the first file on, it stays.)
                Err(error) if error.kind() == std::io::ErrorKind::NotFound && self.is_removed()? => {
                    self.reopen()?
                }
                Err(error) => return Err(DiscoveryError::io("making the publisher's socket")(error)),
            }
        }
        Err(DiscoveryError::Contended { attempts: ATTEMPTS })
    }

    /// Makes publisher `id` unknown, and leaves.
    pub(crate) fn withdraw(&self, id: u128) -> Result<(), DiscoveryError> {
        self.remove_file(&publisher_name(id))?;
        kill_point!("withdraw: removed");
        self.leave()
    }

    /// The publishers that have a name here; some may be dead.
    pub(crate) fn scan(&self) -> Result<Vec<u128>, DiscoveryError> {
        let names = self.own_files()?;
        Ok(names.iter().filter_map(|name| publisher_id(name)).collect())
    }

    /// Connects to publisher `id`. One that is found dead has no name afterwards, where it can be removed.
    pub(crate) fn connect(&self, id: u128) -> Result<Connection, ConnectFailed> {
        let name = publisher_name(id);
        match socket::connect(self.fd.as_fd(), &name) {
            Err(ConnectFailed::Dead) => {}
            other => return other,
        }
        // Its name may have led to another socket of the same publisher, made again, since it was looked up.
        match socket::liveness(self.fd.as_fd(), &name)? {
            Liveness::Alive => socket::connect(self.fd.as_fd(), &name),
            Liveness::Gone => Err(ConnectFailed::Gone),
            Liveness::Unknown => Err(ConnectFailed::Dead),
            Liveness::Dead => {
                if let Err(error) = self.remove_file(&name) {
                    tracing::debug!(error = %chain(&error), "the socket of a dead publisher stays behind");
                }
                Err(ConnectFailed::Dead)
            }
        }
    }

    /// Removes the name of a publisher that is known to be dead.
    pub(crate) fn remove(&self, id: u128) -> Result<(), DiscoveryError> {
        self.remove_file(&publisher_name(id))
    }

    /// Removes the name of publisher `id` if that is dead.
    pub(crate) fn remove_dead(&self, id: u128) -> Result<(), DiscoveryError> {
        self.remove_if_stale(&publisher_name(id))
    }

    /// Removes the names that dead processes have left behind here.
    ///
    /// Takes no lock: between finding a name dead and removing it, no other publisher can have taken that name, as names are random.
    /// A name that is only being made may be found dead for an instant; its maker notices and makes another.
    pub(crate) fn remove_stale(&self) -> Result<(), DiscoveryError> {
        self.own_files()?.iter().try_for_each(|name| self.remove_if_stale(name))
    }

    fn remove_if_stale(&self, name: &str) -> Result<(), DiscoveryError> {
        let found = socket::liveness(self.fd.as_fd(), name)
            .map_err(DiscoveryError::io("asking whether a publisher is alive"))?;
        if found == Liveness::Dead {
            self.remove_file(name)?;
        }
        // Another user's that we cannot ask yet, or a directory: both have the name for an instant only, or for ever.
        if matches!(found, Liveness::Dead | Liveness::Unknown)
            && name.starts_with(NEW_PREFIX)
            && is_abandoned(self.fd.as_fd(), name)
        {
            remove_unfinished(self.fd.as_fd(), name);
        }
        Ok(())
    }

    /// Removes the topic's directories as far up as they are empty, never the runtime directory itself.
    ///
    /// `self` stays open on what may be removed now.
    pub(crate) fn leave(&self) -> Result<(), DiscoveryError> {
        Self::remove_empty(&self.runtime, &self.name)
    }

    /// The same for whoever could not even open it, or has closed it: without a descriptor to spare, none can be opened either.
    pub(crate) fn remove_empty(runtime: &RuntimeDir, name: &TopicName) -> Result<(), DiscoveryError> {
        // Removed with all that was in it, by whoever made it: nothing is left to leave.
        let Some(root) = runtime.open_existing()? else { return Ok(()) };
        let mut path = relative_path(name);
        loop {
            match unlinkat(&root, &*path, AtFlags::REMOVEDIR) {
                // Somebody else was quicker, and may have been killed before they came to the next.
                Ok(()) | Err(Errno::NOENT) => {}
                // In use: by others, who remove it when they leave. (Or mounted on; or something that is none of ours.)
                Err(
                    Errno::NOTEMPTY
                    | Errno::EXIST
                    | Errno::BUSY
                    | Errno::NOTDIR
                    | Errno::LOOP
                    | Errno::ACCESS
                    | Errno::PERM
                    | Errno::ROFS,
                ) => {
                    return Ok(());
                }
                Err(errno) => return Err(DiscoveryError::os("removing the topic's directory")(errno)),
            }
            match path.rfind('/') {
                Some(slash) => path.truncate(slash),
                None => return Ok(()),
            }
        }
    }

    /// Whether this is no longer the directory that the topic's name leads to.
    ///
    /// By where the name leads, not by the link count only: that is not to be relied upon on an overlay, and says nothing of a
    /// directory that was moved away.
    pub(crate) fn is_removed(&self) -> Result<bool, DiscoveryError> {
        let ours = fstat(&self.fd).map_err(DiscoveryError::os("looking at the topic's directory"))?;
        if ours.st_nlink == 0 {
            return Ok(true);
        }
        Ok(self.leads_to(None)? != Some((ours.st_dev, ours.st_ino)))
    }

    /// What the name of publisher `id` leads to now, by way of the runtime directory: whoever looks for it finds this.
    pub(crate) fn found_as(&self, id: u128) -> Result<Option<FileId>, DiscoveryError> {
        self.leads_to(Some(&publisher_name(id)))
    }

    fn leads_to(&self, file: Option<&str>) -> Result<Option<FileId>, DiscoveryError> {
        let Some(root) = self.runtime.open_existing()? else { return Ok(None) };
        let mut path = relative_path(&self.name);
        if let Some(file) = file {
            path = format!("{path}/{file}");
        }
        match statat(&root, path, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(named) => Ok(Some((named.st_dev, named.st_ino))),
            Err(Errno::NOENT | Errno::NOTDIR) => Ok(None),
            Err(errno) => Err(DiscoveryError::os("looking at the topic's directory")(errno)),
        }
    }

    fn remove_file(&self, name: &str) -> Result<(), DiscoveryError> {
        match unlinkat(&self.fd, name, AtFlags::empty()) {
            // A directory of that name is not ours to remove; nor is another's in a sticky one.
            Ok(()) | Err(Errno::NOENT | Errno::ISDIR | Errno::ACCESS | Errno::PERM | Errno::ROFS) => Ok(()),
            Err(errno) => Err(DiscoveryError::os("removing a publisher's socket")(errno)),
        }
    }

    /// The names of our own files here, as against the directories of topics further down.
    fn own_files(&self) -> Result<Vec<String>, DiscoveryError> {
        let mut names = names_in(self.fd.as_fd())?;
        names.retain(|name| name.starts_with(PUBLISHER_PREFIX) || name.starts_with(NEW_PREFIX));
        Ok(names)
    }
}

impl AsFd for TopicDir {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// What is in a directory, as far as it is UTF-8.
pub(super) fn names_in(dir: BorrowedFd<'_>) -> Result<Vec<String>, DiscoveryError> {
    let failed = DiscoveryError::os("reading the topic's directory");
    let entries = match Dir::read_from(dir) {
        Ok(entries) => entries,
        // Removed: nothing is in it.
        Err(Errno::NOENT) => return Ok(Vec::new()),
        Err(errno) => return Err(failed(errno)),
    };
    let mut names = Vec::new();
    for entry in entries {
        let entry = match entry {
            Ok(entry) => entry,
            Err(Errno::NOENT) => break,
            Err(errno) => return Err(failed(errno)),
        };
        if let Ok(name) = entry.file_name().to_str() {
            names.push(name.to_owned());
        }
    }
    Ok(names)
}

pub(crate) fn publisher_name(id: u128) -> String {
    format!("{PUBLISHER_PREFIX}{id:032x}")
}

/// Only what `publisher_name` makes; `from_str_radix` alone would take `+1` too.
pub(crate) fn publisher_id(name: &str) -> Option<u128> {
    let id = u128::from_str_radix(name.strip_prefix(PUBLISHER_PREFIX)?, 16).ok()?;
    (publisher_name(id) == name).then_some(id)
}

/// At most 401 bytes: far below what a path may have.
pub(super) fn relative_path(name: &TopicName) -> String {
    first_parts(name, usize::MAX)
}

/// The path of the topic's first so many parts.
pub(super) fn first_parts(name: &TopicName, parts: usize) -> String {
    name.components().take(parts).collect::<Vec<_>>().join("/")
}

/// The innermost directory that there is on the way to `path`, which is absolute.
fn nearest_above(path: &std::path::Path) -> Result<OwnedFd, DiscoveryError> {
    let failed = DiscoveryError::os("opening the parent of the runtime directory");
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    for above in path.ancestors().skip(1) {
        match rustix::fs::open(above, flags, Mode::empty()) {
            Err(Errno::NOENT) => {}
            other => return other.map_err(failed),
        }
    }
    Err(failed(Errno::NOENT))
}

fn open_chain(runtime: &RuntimeDir, name: &TopicName) -> Result<OwnedFd, DiscoveryError> {
    for _ in 0..ATTEMPTS {
        if let Some(fd) = try_open_chain(runtime.open()?, name)? {
            // `systemd-tmpfiles` leaves a directory alone, and all in it, while somebody holds a lock on it. One that has the lock
            // itself just now is not waited for: what it removes is made again.
            let _ = flock(&fd, FlockOperation::NonBlockingLockShared);
            return Ok(fd);
        }
    }
    Err(DiscoveryError::Contended { attempts: ATTEMPTS })
}

/// `None`: a directory was removed on the way.
fn try_open_chain(root: OwnedFd, name: &TopicName) -> Result<Option<OwnedFd>, DiscoveryError> {
    let mut dir = root;
    for component in name.components() {
        dir = match openat(&dir, &*component, DIRECTORY, Mode::empty()) {
            Ok(next) => next,
            Err(Errno::NOENT) => {
                make_component(dir.as_fd(), &component)
                    .map_err(DiscoveryError::os("making the topic's directory"))?;
                match openat(&dir, &*component, DIRECTORY, Mode::empty()) {
                    Ok(next) => next,
                    Err(Errno::NOENT) => return Ok(None),
                    Err(errno) => return Err(DiscoveryError::os("opening the topic's directory")(errno)),
                }
            }
            Err(errno) => return Err(DiscoveryError::os("opening the topic's directory")(errno)),
        };
    }
    Ok(Some(dir))
}

/// Makes a directory that is complete when it appears: it has the owner, group and mode of the one that it is in.
///
/// `Ok`, too, where others were at it meanwhile: look again.
fn make_component(parent: BorrowedFd<'_>, component: &str) -> Result<(), Errno> {
    let ownership = Ownership::of(parent)?;
    let new = unfinished_name(component);
    match make_private_dir(parent, &*new, ownership) {
        Ok(()) => {}
        // What another process of this user has begun and is at, or was killed at, is as good as ours.
        Err(Errno::EXIST) => match ownership.settle(parent, &*new, FileType::Directory) {
            Ok(()) => {}
            // It has its name by now; or it is given away already, and not ours to complete.
            Err(Errno::NOENT) => {
                let _ = unlinkat(parent, &*new, AtFlags::REMOVEDIR);
                return Ok(());
            }
            Err(errno) => return Err(errno),
        },
        // What it was to be made in is gone.
        Err(Errno::NOENT) => return Ok(()),
        Err(errno) => return Err(errno),
    }
    kill_point!("bind: directory made");
    let renamed = match renameat_with(parent, &*new, parent, component, RenameFlags::NOREPLACE) {
        // A file system that does not know this. Without it an empty directory is replaced, which its users notice.
        Err(Errno::INVAL | Errno::NOSYS) => renameat(parent, &*new, parent, component),
        other => other,
    };
    match renamed {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(Errno::EXIST | Errno::NOTEMPTY | Errno::NOTDIR) => {
            let _ = unlinkat(parent, &*new, AtFlags::REMOVEDIR);
            Ok(())
        }
        Err(errno) => Err(errno),
    }
}

/// Each user's own, because what one has begun another may not be able to go on with.
fn unfinished_name(component: &str) -> String {
    format!("{NEW_PREFIX}{}-{component}", geteuid().as_raw())
}

/// Whether what has this name has been unfinished for too long.
fn is_abandoned(dir: BorrowedFd<'_>, name: &str) -> bool {
    // A clock that was set in between makes it wrong, and whoever is at it begins anew.
    let now = clock_gettime(ClockId::Realtime).tv_sec;
    statat(dir, name, AtFlags::SYMLINK_NOFOLLOW)
        .is_ok_and(|stat| now.saturating_sub(stat.st_ctime) > UNFINISHED_SECONDS)
}

/// Fails where it is not ours to remove, or has become something else.
fn remove_unfinished(dir: BorrowedFd<'_>, name: &str) {
    if unlinkat(dir, name, AtFlags::empty()).is_err() {
        let _ = unlinkat(dir, name, AtFlags::REMOVEDIR);
    }
}

/// Whether publisher `name` in the directory at `path` is alive, or cannot be asked. One that is dead has no name afterwards, where
/// it can be removed, nor its directory, if nothing else is in it.
#[cfg(feature = "zenoh")]
pub(crate) fn is_publisher_alive(path: &std::path::Path, name: &str) -> std::io::Result<bool> {
    let dir = rustix::fs::open(path, DIRECTORY, Mode::empty())?;
    let found = socket::liveness(dir.as_fd(), name)?;
    if found == Liveness::Dead {
        let _ = unlinkat(&dir, name, AtFlags::empty());
        let _ = rustix::fs::rmdir(path);
    }
    Ok(matches!(found, Liveness::Alive | Liveness::Unknown))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::access::Access;
    use crate::sys::random::random_id;

    struct Place {
        keep: tempfile::TempDir,
        runtime: RuntimeDir,
    }

    impl Place {
        fn new() -> Self {
            let keep = tempfile::tempdir().unwrap();
            let runtime = RuntimeDir::resolve(Some(&keep.path().join("r")), Access::default()).unwrap();
            Self { keep, runtime }
        }

        fn topic(&self, name: &str) -> TopicDir {
            TopicDir::open(&self.runtime, &TopicName::new(name).unwrap()).unwrap()
        }

        fn entries(&self) -> usize {
            std::fs::read_dir(self.runtime.path()).unwrap().count()
        }
    }

    #[test]
    fn publisher_published_is_found_connected_to_and_withdrawn() {
        let place = Place::new();
        let id = random_id().unwrap();
        let (mut ours, theirs) = (place.topic("camera/front"), place.topic("camera/front"));
        assert_eq!(theirs.scan().unwrap(), []);
        let listener = ours.publish(id).unwrap();
        assert_eq!(theirs.scan().unwrap(), [id]);
        let _connection = theirs.connect(id).unwrap();
        assert!(listener.accept().unwrap().is_some());
        theirs.leave().unwrap();
        theirs.remove_stale().unwrap();
        assert_eq!(theirs.scan().unwrap(), [id]);
        assert!(!theirs.is_removed().unwrap());
        ours.withdraw(id).unwrap();
        assert_eq!(theirs.scan().unwrap(), []);
        assert!(theirs.is_removed().unwrap());
        assert_eq!(place.entries(), 0);
        assert!(matches!(theirs.connect(id), Err(ConnectFailed::Gone)));
    }

    #[test]
    fn publisher_that_died_is_removed_and_the_living_stays() {
        let place = Place::new();
        let mut topic = place.topic("a");
        let (dead, alive) = (random_id().unwrap(), random_id().unwrap());
        drop(topic.publish(dead).unwrap());
        let _listener = topic.publish(alive).unwrap();
        // Half made by somebody who died then, and a directory that only looks like ours.
        std::fs::write(place.runtime.path().join("a/.new-0-x"), b"").unwrap();
        std::fs::create_dir(place.runtime.path().join("a/.pub-dir")).unwrap();
        assert!(matches!(topic.connect(dead), Err(ConnectFailed::Dead)));
        topic.remove_stale().unwrap();
        assert_eq!(topic.scan().unwrap(), [alive]);
        assert!(!place.runtime.path().join("a/.new-0-x").exists());
    }

    #[test]
    fn topic_inside_another_keeps_it_and_is_not_one_of_its_publishers() {
        let place = Place::new();
        let (mut inner, mut outer) = (place.topic("a/.pub-b"), place.topic("a"));
        let (first, second) = (random_id().unwrap(), random_id().unwrap());
        let _inner = inner.publish(first).unwrap();
        let _outer = outer.publish(second).unwrap();
        assert_eq!((inner.scan().unwrap(), outer.scan().unwrap()), (vec![first], vec![second]));
        outer.withdraw(second).unwrap();
        assert!(!outer.is_removed().unwrap());
        inner.withdraw(first).unwrap();
        assert!(outer.is_removed().unwrap());
        assert_eq!(place.entries(), 0);
    }

    #[test]
    fn publish_in_a_directory_removed_meanwhile_makes_it_anew() {
        let place = Place::new();
        let mut topic = place.topic("a/b/c");
        let id = random_id().unwrap();
        place.topic("a/b/c").leave().unwrap();
        assert!(topic.is_removed().unwrap());
        let _listener = topic.publish(id).unwrap();
        assert_eq!(place.topic("a/b/c").scan().unwrap(), [id]);
        // The whole runtime directory, too.
        let mut other = place.topic("d");
        std::fs::remove_dir_all(place.runtime.path()).unwrap();
        assert!(other.is_removed().unwrap());
        other.publish(random_id().unwrap()).unwrap();
        assert_eq!(place.topic("d").scan().unwrap().len(), 1);
    }

    #[test]
    fn runtime_directory_removed_meanwhile_is_not_brought_back_by_leaving() {
        let place = Place::new();
        let mut topic = place.topic("a/b");
        let id = random_id().unwrap();
        let _listener = topic.publish(id).unwrap();
        std::fs::remove_dir_all(place.runtime.path()).unwrap();
        topic.withdraw(id).unwrap();
        assert!(!place.runtime.path().exists());
    }

    #[test]
    fn names_at_the_limits_can_be_used_in_a_deep_runtime_directory() {
        let place = Place::new();
        let deep = place.keep.path().join("d".repeat(150)).join("e".repeat(150));
        std::fs::create_dir_all(&deep).unwrap();
        let runtime = RuntimeDir::resolve(Some(&deep.join("r")), Access::default()).unwrap();
        for name in
            ["%".repeat(200), "/".repeat(200), ".".repeat(200), "+".repeat(200), "\u{1f980}".repeat(50)]
        {
            let mut topic = TopicDir::open(&runtime, &TopicName::new(&name).unwrap()).unwrap();
            let id = random_id().unwrap();
            let listener = topic.publish(id).unwrap();
            let _connection = topic.connect(id).unwrap();
            assert!(listener.accept().unwrap().is_some());
            topic.withdraw(id).unwrap();
            assert_eq!(std::fs::read_dir(runtime.path()).unwrap().count(), 0);
        }
    }

    #[test]
    fn link_in_place_of_a_topic_is_not_followed() {
        let place = Place::new();
        std::os::unix::fs::symlink("/tmp", place.runtime.path().join("a")).unwrap();
        for name in ["a", "a/b"] {
            let error = TopicDir::open(&place.runtime, &TopicName::new(name).unwrap()).unwrap_err();
            assert!(matches!(error, DiscoveryError::Os { .. }), "{error:?}");
        }
    }

    #[test]
    fn directory_appears_with_its_final_mode_and_one_left_unfinished_is_completed() {
        use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
        let keep = tempfile::tempdir().unwrap();
        let root = keep.path().join("r");
        std::fs::create_dir(&root).unwrap();
        std::fs::set_permissions(&root, std::fs::Permissions::from_mode(0o770)).unwrap();
        let mut access = Access::default();
        access.allow_gid(root.metadata().unwrap().gid());
        let runtime = RuntimeDir::resolve(Some(&root), access).unwrap();
        let topic = TopicName::new("a/b").unwrap();
        let unfinished = root.join(unfinished_name("a"));
        // Somebody was killed there.
        std::fs::create_dir(&unfinished).unwrap();
        std::fs::set_permissions(&unfinished, std::fs::Permissions::from_mode(0o700)).unwrap();
        let stop = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    if let Ok(found) = root.join("a").metadata()
                        && found.mode() & 0o7777 != 0o770
                    {
                        crate::sys::testing::abort(&format!("seen with mode {:o}", found.mode()));
                    }
                }
            });
            for _ in 0..2_000 {
                let dir = TopicDir::open(&runtime, &topic).unwrap();
                assert!(!unfinished.exists());
                dir.leave().unwrap();
            }
            stop.store(true, std::sync::atomic::Ordering::Relaxed);
        });
        assert_eq!(std::fs::read_dir(&root).unwrap().count(), 0);
    }

    #[test]
    fn publisher_ids_are_read_only_from_names_that_we_write() {
        assert_eq!(publisher_id(&publisher_name(7)), Some(7));
        for name in [
            ".pub-",
            ".pub-7",
            ".pub-+0000000000000000000000000000007",
            ".pub-0000000000000000000000000000000G",
        ] {
            assert_eq!(publisher_id(name), None, "{name}");
        }
        assert_eq!(publisher_id(&publisher_name(0xab).to_uppercase()), None);
    }

    #[test]
    fn topics_opened_and_left_by_many_at_once_end_in_an_empty_directory() {
        let place = Place::new();
        std::thread::scope(|scope| {
            for thread in 0..8 {
                let place = &place;
                scope.spawn(move || {
                    for round in 0..500 {
                        let mut topic = place.topic(["a", "a/b", "a/b/c", "a//b"][(thread + round) % 4]);
                        match round % 3 {
                            0 => topic.leave().unwrap(),
                            1 => {
                                let id = random_id().unwrap();
                                let _listener = topic.publish(id).unwrap();
                                assert!(topic.scan().unwrap().contains(&id));
                                topic.withdraw(id).unwrap();
                            }
                            _ => {
                                let id = random_id().unwrap();
                                drop(topic.publish(id).unwrap());
                                topic.remove_stale().unwrap();
                                topic.leave().unwrap();
                            }
                        }
                    }
                });
            }
        });
        assert_eq!(place.entries(), 0);
    }
}
