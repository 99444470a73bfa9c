//! A subscriber's view of a topic: its directory, and the news that publishers have come.
//!
//! No publisher is missed: the watch is in place before the directory is read, so a publisher's name either was there when it was read
//! or makes an event afterwards. The same holds for the directory itself, which others may remove while it is empty: its parent is
//! watched too, and only then it is checked that the directory is still the one that the name leads to. If it goes away
//! later, the parent says so. (The directory's own watch would not, while anybody has it open.)
//!
//! Watches one level up only. Whoever moves or removes whole trees with other tools is noticed if that touches one of the two.

use super::directory::{ATTEMPTS, TopicDir};
use super::error::DiscoveryError;
use super::name::TopicName;
use super::runtime_dir::RuntimeDir;
use crate::sys::inotify::DirectoryWatch;
use std::os::fd::{AsFd, BorrowedFd};

/// A topic's directory, watched. Readable (see [`AsFd`]) when [`changes`](Self::changes) should be called.
#[derive(Debug)]
pub(crate) struct TopicWatch {
    dir: TopicDir,
    watch: DirectoryWatch,
    /// The last call failed before it was known whether the right directory is watched: to be found out by the next.
    astray: bool,
}

impl TopicWatch {
    /// Opens and watches the topic's directory. What is in it already is found by the first scan, to be made after this.
    pub(crate) fn new(runtime: &RuntimeDir, name: &TopicName) -> Result<Self, DiscoveryError> {
        let watch = DirectoryWatch::new()?;
        let mut this = Self { dir: TopicDir::open(runtime, name)?, watch, astray: false };
        this.follow()?;
        Ok(this)
    }

    /// Takes the news: `true` if the directory should be scanned again.
    ///
    /// A reactor's readiness is to be cleared before this, not after: see [`DirectoryWatch::take`].
    ///
    /// # Errors
    /// It may be called again, and tries again then.
    pub(crate) fn changes(&mut self) -> Result<bool, DiscoveryError> {
        let news = self.watch.take()?;
        if !news.changed && !news.gone && !self.astray {
            return Ok(false);
        }
        // Until it is known better: the news has been taken, and a failure below must not lose it.
        let lost = news.gone || std::mem::replace(&mut self.astray, true);
        if lost || self.dir.is_removed()? {
            self.follow()?;
        }
        self.astray = false;
        Ok(true)
    }

    /// The directory, to be scanned and connected through. It changes only in [`changes`](Self::changes).
    pub(crate) fn dir(&self) -> &TopicDir {
        &self.dir
    }

    /// Watches the directory that the name leads to, whatever happens to it meanwhile.
    fn follow(&mut self) -> Result<(), DiscoveryError> {
        for _ in 0..ATTEMPTS {
            let parent = self.dir.open_parent()?;
            self.watch.watch(&[self.dir.as_fd(), parent.as_fd()])?;
            // After the watch: removed later, the parent tells.
            if !self.dir.is_removed()? {
                return Ok(());
            }
            self.dir.reopen()?;
        }
        Err(DiscoveryError::Contended { attempts: ATTEMPTS })
    }
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

    #[test]
    fn publisher_that_comes_later_is_news() {
        let (_keep, runtime) = place();
        let topic = name("a/b");
        let mut watch = TopicWatch::new(&runtime, &topic).unwrap();
        assert!(!watch.changes().unwrap());
        let mut publisher = TopicDir::open(&runtime, &topic).unwrap();
        let id = random_id().unwrap();
        let _listener = publisher.publish(id).unwrap();
        wait(&watch);
        assert!(watch.changes().unwrap());
        assert_eq!(watch.dir().scan().unwrap(), [id]);
    }

    #[test]
    fn directory_removed_by_a_leaver_is_made_and_watched_anew() {
        let (_keep, runtime) = place();
        let topic = name("a/b");
        let mut watch = TopicWatch::new(&runtime, &topic).unwrap();
        for _ in 0..3 {
            TopicDir::open(&runtime, &topic).unwrap().leave().unwrap();
            assert!(watch.dir().is_removed().unwrap());
            let mut publisher = TopicDir::open(&runtime, &topic).unwrap();
            let id = random_id().unwrap();
            let _listener = publisher.publish(id).unwrap();
            wait(&watch);
            assert!(watch.changes().unwrap());
            assert_eq!(watch.dir().scan().unwrap(), [id]);
            publisher.withdraw(id).unwrap();
            wait(&watch);
            assert!(watch.changes().unwrap());
            assert!(!watch.dir().is_removed().unwrap());
            while watch.changes().unwrap() {}
        }
        std::fs::remove_dir_all(runtime.path()).unwrap();
        wait(&watch);
        assert!(watch.changes().unwrap());
        assert!(!watch.dir().is_removed().unwrap());
        watch.dir().leave().unwrap();
        assert_eq!(std::fs::read_dir(runtime.path()).unwrap().count(), 0);
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
                    let mut seen: HashSet<u128> = watch.dir().scan().unwrap().into_iter().collect();
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
                                seen.extend(watch.dir().scan().unwrap());
                            }
                        }
                        found.wait();
                    }
                    watch.dir().leave().unwrap();
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
