//! A subscriber's view of a topic: its directory, where there is one, and the news that publishers have come.
//!
//! It makes nothing: what there is of the way to the topic's directory is watched, so that a subscriber needs no right to write
//! anywhere. The topic's directory and its parent; or, where it does not exist, the innermost that does, for the next part to come.
//!
//! No publisher is missed: the watch is in place before the directory is read, so a publisher's name either was there when it was read
//! or makes an event afterwards. The same holds for the directories themselves, which others make and remove: only with the watch
//! in place it is checked that the name still leads to what is watched. If a directory goes away later, its parent says so.
//! (Its own watch would not, while anybody has it open.) The runtime directory's parent is not watched, for that may be `/tmp`;
//! no process keeps the runtime directory open, so that its own watch says when it goes.
//!
//! Watches one level up only. Whoever moves or removes whole trees with other tools is noticed if that touches one of the two.

use super::directory::{ATTEMPTS, Reach, TopicDir, first_parts};
use super::error::DiscoveryError;
use super::name::TopicName;
use super::near_miss;
use super::runtime_dir::RuntimeDir;
use crate::access::Access;
use crate::sys::inotify::{DirectoryWatch, Target, WatchError};
use crate::sys::socket::{ConnectFailed, Connection};
use crate::sys::timer::Timer;
use rustix::fs::fstat;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

/// A topic, watched. Readable (see [`AsFd`]) when [`changes`](Self::changes) should be called.
#[derive(Debug)]
pub(crate) struct TopicWatch {
    runtime: RuntimeDir,
    name: TopicName,
    reach: Reach,
    watch: DirectoryWatch,
    /// For what is to be looked at again without an event; made when that is first needed.
    timer: Option<Timer>,
    /// The last call failed before it was known whether the right directory is watched: to be found out by the next.
    astray: bool,
}

impl TopicWatch {
    /// Watches the topic. What is in it already is found by the first scan, to be made after this.
    pub(crate) fn new(runtime: &RuntimeDir, name: &TopicName) -> Result<Self, DiscoveryError> {
        let mut this = Self {
            runtime: runtime.clone(),
            name: name.clone(),
            reach: find(runtime, name)?,
            watch: DirectoryWatch::new()?,
            timer: None,
            astray: false,
        };
        this.follow()?;
        Ok(this)
    }

    /// Takes the news: `true` if the topic should be scanned again.
    ///
    /// A reactor's readiness is to be cleared before this, not after: see [`DirectoryWatch::take`].
    ///
    /// # Errors
    /// It may be called again, and tries again then.
    pub(crate) fn changes(&mut self) -> Result<bool, DiscoveryError> {
        let news = self.watch.take()?;
        let timed_out = self.timer.as_ref().is_some_and(Timer::take);
        if !news.changed && !news.gone && !self.astray {
            return Ok(timed_out);
        }
        // Until it is known better: the news has been taken, and a failure below must not lose it.
        let lost = news.gone || std::mem::replace(&mut self.astray, true);
        if !self.is_current()? {
            self.follow()?;
        } else if lost {
            self.watch_reach()?;
            if !self.is_current()? {
                self.follow()?;
            }
        }
        self.astray = false;
        Ok(true)
    }

    /// The publishers that have a name in the topic; some may be dead.
    pub(crate) fn scan(&self) -> Result<Vec<u128>, DiscoveryError> {
        self.dir().map_or(Ok(Vec::new()), TopicDir::scan)
    }

    /// Connects to publisher `id`.
    pub(crate) fn connect(&self, id: u128) -> Result<Connection, ConnectFailed> {
        self.dir().map_or(Err(ConnectFailed::Gone), |dir| dir.connect(id))
    }

    /// Removes the name of a publisher that is known to be dead, where it can be, and its directory if nothing else is in it.
    pub(crate) fn remove(&self, id: u128) -> Result<(), DiscoveryError> {
        self.dir().map_or(Ok(()), |dir| dir.remove(id))?;
        self.leave()
    }

    /// The same for one that may be dead.
    pub(crate) fn remove_dead(&self, id: u128) -> Result<(), DiscoveryError> {
        self.dir().map_or(Ok(()), |dir| dir.remove_dead(id))?;
        self.leave()
    }

    /// Removes the topic's directories as far up as they are empty.
    pub(crate) fn leave(&self) -> Result<(), DiscoveryError> {
        self.dir().map_or(Ok(()), TopicDir::leave)
    }

    /// The topic's name.
    pub(crate) fn topic(&self) -> &str {
        self.name.as_str()
    }

    /// Who may take part in the topic.
    pub(crate) fn access(&self) -> &Arc<Access> {
        self.runtime.access()
    }

    /// Has [`changes`](Self::changes) ask for another scan in so many nanoseconds, or sooner.
    pub(crate) fn look_again_in(&mut self, nanoseconds: u64) -> Result<(), DiscoveryError> {
        let failed = DiscoveryError::io("making a timer");
        let timer = match &self.timer {
            Some(timer) => timer,
            None => {
                let timer = Timer::new().map_err(&failed)?;
                self.watch.hear(timer.as_fd())?;
                self.timer.insert(timer)
            }
        };
        timer.set(nanoseconds).map_err(failed)
    }

    /// Says in the log why nothing may arrive, where that is asked for. To be called once: it reads a directory.
    pub(crate) fn explain(&self) {
        if !tracing::enabled!(tracing::Level::DEBUG) {
            return;
        }
        let parts = match &self.reach {
            Reach::Topic(_) => usize::MAX,
            Reach::Partway(_, parts) => *parts,
            Reach::Nothing(_) => 0,
        };
        let (topic, runtime_dir) = (self.name.as_str(), self.runtime.path().display());
        if self.scan().is_ok_and(|publishers| publishers.is_empty()) {
            let watched = self.runtime.path().join(first_parts(&self.name, parts));
            tracing::debug!(
                topic, %runtime_dir, watched = %watched.display(),
                "no publisher of the topic is there; waiting for one in the directory watched"
            );
            if let Reach::Partway(dir, parts) = &self.reach {
                for other in near_miss::find(dir.as_fd(), *parts, &self.runtime, &self.name) {
                    tracing::debug!(topic, other, "there is a topic with a similar name");
                }
            }
        } else {
            tracing::debug!(topic, %runtime_dir, "publishers of the topic are there");
        }
    }

    fn dir(&self) -> Option<&TopicDir> {
        match &self.reach {
            Reach::Topic(dir) => Some(dir),
            Reach::Partway(..) | Reach::Nothing(_) => None,
        }
    }

    /// Watches what the name leads to, whatever happens to it meanwhile.
    fn follow(&mut self) -> Result<(), DiscoveryError> {
        for _ in 0..ATTEMPTS {
            self.watch_reach()?;
            // After the watch: what changes later is told.
            if self.is_current()? {
                return Ok(());
            }
            self.reach = find(&self.runtime, &self.name)?;
        }
        Err(DiscoveryError::Contended { attempts: ATTEMPTS })
    }

    fn watch_reach(&self) -> Result<(), WatchError> {
        match &self.reach {
            Reach::Topic(dir) => {
                self.watch.watch(&[Target::Directory(dir.as_fd()), Target::Parent(dir.as_fd())])
            }
            Reach::Partway(fd, 0) | Reach::Nothing(fd) => self.watch.watch(&[Target::Awaited(fd.as_fd())]),
            Reach::Partway(fd, _) => {
                self.watch.watch(&[Target::Awaited(fd.as_fd()), Target::Parent(fd.as_fd())])
            }
        }
    }

    /// Whether the name still leads as far as it did, to the same directory.
    fn is_current(&self) -> Result<bool, DiscoveryError> {
        Ok(match (&self.reach, &find(&self.runtime, &self.name)?) {
            (Reach::Topic(ours), Reach::Topic(found)) => is_same(ours.as_fd(), found.as_fd())?,
            (Reach::Partway(ours, so_far), Reach::Partway(found, parts)) => {
                so_far == parts && is_same(ours.as_fd(), found.as_fd())?
            }
            (Reach::Nothing(ours), Reach::Nothing(found)) => is_same(ours.as_fd(), found.as_fd())?,
            _ => false,
        })
    }
}

/// Finds the topic in the runtime directory, which is made where it can be.
fn find(runtime: &RuntimeDir, name: &TopicName) -> Result<Reach, DiscoveryError> {
    let found = TopicDir::find(runtime, name)?;
    // Where it cannot be made, others may.
    if matches!(found, Reach::Nothing(_)) && runtime.open().is_ok() {
        return TopicDir::find(runtime, name);
    }
    Ok(found)
}

fn is_same(one: BorrowedFd<'_>, other: BorrowedFd<'_>) -> Result<bool, DiscoveryError> {
    let failed = DiscoveryError::os("looking at the topic's directory");
    let (one, other) = (fstat(one).map_err(&failed)?, fstat(other).map_err(&failed)?);
    Ok((one.st_dev, one.st_ino) == (other.st_dev, other.st_ino))
}

impl AsFd for TopicWatch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.watch.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::random::random_id;
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    use std::collections::HashSet;

    fn place() -> (tempfile::TempDir, RuntimeDir) {
        let keep = tempfile::tempdir().unwrap();
        let runtime =
            RuntimeDir::resolve(Some(&keep.path().join("r")), crate::access::Access::default()).unwrap();
        (keep, runtime)
    }

    fn name(name: &str) -> TopicName {
        TopicName::new(name).unwrap()
    }

    /// Waits for news, bounded.
    fn wait(watch: &TopicWatch) {
        let limit = Timespec { tv_sec: 20, tv_nsec: 0 };
        assert_eq!(poll(&mut [PollFd::new(watch, PollFlags::IN)], Some(&limit)).unwrap(), 1, "no news came");
    }

    /// Waits for news, and takes it.
    fn assert_news(watch: &mut TopicWatch) {
        wait(watch);
        assert!(watch.changes().unwrap());
    }

    /// A publisher that comes to the topic, and is seen.
    fn assert_found(watch: &mut TopicWatch, runtime: &RuntimeDir, topic: &TopicName) -> (TopicDir, u128) {
        let mut publisher = TopicDir::open(runtime, topic).unwrap();
        let id = random_id().unwrap();
        let _listener = publisher.publish(id).unwrap();
        assert_news(watch);
        assert_eq!(watch.scan().unwrap(), [id]);
        (publisher, id)
    }

    #[test]
    fn publisher_that_comes_later_is_news() {
        let (_keep, runtime) = place();
        let topic = name("a/b");
        let mut watch = TopicWatch::new(&runtime, &topic).unwrap();
        assert!(!watch.changes().unwrap());
        assert_found(&mut watch, &runtime, &topic);
    }

    #[test]
    fn directory_that_comes_and_goes_is_followed_and_never_made() {
        let (_keep, runtime) = place();
        let topic = name("a/b");
        let mut watch = TopicWatch::new(&runtime, &topic).unwrap();
        let entries = || std::fs::read_dir(runtime.path()).unwrap().count();
        for _ in 0..3 {
            TopicDir::open(&runtime, &topic).unwrap().leave().unwrap();
            assert_eq!((watch.scan().unwrap(), entries()), (vec![], 0));
            let (publisher, id) = assert_found(&mut watch, &runtime, &topic);
            publisher.withdraw(id).unwrap();
            assert_news(&mut watch);
            while watch.changes().unwrap() {}
            assert_eq!((watch.scan().unwrap(), entries()), (vec![], 0));
        }
        // The runtime directory as well, whoever makes it again.
        for _ in 0..3 {
            let mut publisher = TopicDir::open(&runtime, &topic).unwrap();
            publisher.publish(random_id().unwrap()).unwrap();
            assert_news(&mut watch);
            std::fs::remove_dir_all(runtime.path()).unwrap();
            wait(&watch);
            while watch.changes().unwrap() {}
            assert_eq!(watch.scan().unwrap(), []);
        }
        watch.leave().unwrap();
        assert_eq!(entries(), 0);
    }

    #[test]
    fn part_made_by_hand_or_moved_in_is_news() {
        let (_keep, runtime) = place();
        let mut watch = TopicWatch::new(&runtime, &name("a/b/c")).unwrap();
        let a = runtime.path().join("a");
        std::fs::create_dir(&a).unwrap();
        assert_news(&mut watch);
        std::fs::create_dir_all(runtime.path().join("x/c")).unwrap();
        while watch.changes().unwrap() {}
        std::fs::rename(runtime.path().join("x"), a.join("b")).unwrap();
        assert_news(&mut watch);
        assert_found(&mut watch, &runtime, &name("a/b/c"));
    }

    #[test]
    fn look_again_is_asked_for_once_when_the_time_is_over() {
        let (_keep, runtime) = place();
        let mut watch = TopicWatch::new(&runtime, &name("a")).unwrap();
        for _ in 0..3 {
            watch.look_again_in(1_000_000).unwrap();
            watch.look_again_in(3_600_000_000_000).unwrap();
            wait(&watch);
            while !watch.changes().unwrap() {
                wait(&watch);
            }
            assert!(!watch.changes().unwrap());
        }
    }

    #[test]
    fn publisher_is_found_by_every_watch_however_directories_come_and_go() {
        let (_keep, runtime) = place();
        let topic = name("x/y");
        let rounds = 150;
        let (found, stop) = (std::sync::Barrier::new(4), std::sync::atomic::AtomicBool::new(false));
        let wanted = parking_lot::Mutex::new(Vec::<u128>::new());
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    let mut watch = TopicWatch::new(&runtime, &topic).unwrap();
                    let mut seen: HashSet<u128> = watch.scan().unwrap().into_iter().collect();
                    for round in 0..rounds {
                        while !wanted.lock().get(round).is_some_and(|id| seen.contains(id)) {
                            // A failed assertion here would leave the others at the barrier for ever.
                            let limit = Timespec { tv_sec: 20, tv_nsec: 0 };
                            if poll(&mut [PollFd::new(&watch, PollFlags::IN)], Some(&limit)).unwrap() == 0 {
                                crate::sys::testing::abort(&format!(
                                    "round {round}: a publisher was not found"
                                ));
                            }
                            if watch.changes().unwrap() {
                                seen.extend(watch.scan().unwrap());
                            }
                        }
                        found.wait();
                    }
                    watch.leave().unwrap();
                });
            }
            // Comes and goes all the time, and takes the empty directories along.
            scope.spawn(|| {
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    TopicDir::open(&runtime, &topic).unwrap().leave().unwrap();
                }
            });
            for _ in 0..rounds {
                let mut dir = TopicDir::open(&runtime, &topic).unwrap();
                let id = random_id().unwrap();
                // Before it is published: whoever finds it is looking for it already.
                wanted.lock().push(id);
                let _listener = dir.publish(id).unwrap();
                found.wait();
                dir.withdraw(id).unwrap();
            }
            stop.store(true, std::sync::atomic::Ordering::Relaxed);
        });
        TopicDir::open(&runtime, &topic).unwrap().leave().unwrap();
        assert_eq!(std::fs::read_dir(runtime.path()).unwrap().count(), 0);
    }
}
