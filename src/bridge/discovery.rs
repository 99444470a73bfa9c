//! Which local topics have publishers, and the news that this has changed: the runtime directory as a tree, watched.
//!
//! It connects to nobody. What killed publishers have left is told apart, and removed. It has an inotify instance of its own,
//! because it has to hear of directories that are made, of which subscribers must not.

use std::collections::{HashMap, HashSet};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::Path;
use std::sync::Arc;

use parking_lot::RwLock;
use rustix::fs::inotify::{self, CreateFlags, Reader, WatchFlags};
use rustix::io::Errno;

use super::INJECTED;
use crate::reactor::Watched;
use crate::sys::INTERRUPTIONS_MAX;
use crate::topic::{RuntimeDir, is_publisher_alive, is_publisher_of, topic_of_components};

/// How deep the tree is followed: a topic has at most so many parts.
const MAX_DEPTH: usize = 200;

const EVENTS: WatchFlags = WatchFlags::CREATE
    .union(WatchFlags::MOVED_TO)
    .union(WatchFlags::DELETE)
    .union(WatchFlags::DELETE_SELF)
    .union(WatchFlags::MOVE_SELF)
    .union(WatchFlags::ONLYDIR);

/// The publishers of this host that are not bridges'.
///
/// Those that are gone as well, as what they sent may still come back; until there are [`MANY`].
#[derive(Debug, Clone, Default)]
pub(super) struct LocalPublishers(Arc<RwLock<HashSet<u128>>>);

/// Publishers known at which those that are gone are forgotten.
const MANY: usize = 4_096;

impl LocalPublishers {
    pub(super) fn contains(&self, publisher: u128) -> bool {
        self.0.read().contains(&publisher)
    }

    /// One that a message has come from: it may be on its way back before the directory is looked at.
    pub(super) fn add(&self, publisher: u128) {
        if !self.contains(publisher) {
            self.0.write().insert(publisher);
        }
    }

    fn found(&self, found: &HashSet<u128>) {
        let mut known = self.0.write();
        if known.len() >= MANY {
            known.clear();
        }
        known.extend(found);
    }
}

/// The runtime directory, watched.
pub(super) struct Discovery {
    runtime_dir: RuntimeDir,
    inotify: Watched<OwnedFd>,
    publishers: LocalPublishers,
}

impl Discovery {
    /// # Panics
    /// Outside a tokio runtime, or in one whose I/O is not enabled.
    pub(super) fn new(runtime_dir: RuntimeDir) -> io::Result<Self> {
        let inotify = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
        Ok(Self { runtime_dir, inotify: Watched::register(inotify)?, publishers: LocalPublishers::default() })
    }

    pub(super) fn publishers(&self) -> LocalPublishers {
        self.publishers.clone()
    }

    /// The topics that somebody else than a bridge publishes to.
    ///
    /// What changes after this has begun makes [`changed`](Self::changed) return: each directory is watched before it is read.
    pub(super) fn scan(&self) -> io::Result<HashSet<String>> {
        // Made, if somebody has removed it.
        drop(self.runtime_dir.open().map_err(io::Error::other)?);
        let mut found = HashMap::new();
        self.walk(self.runtime_dir.path(), &mut Vec::new(), &mut found)?;
        self.publishers.found(&found.values().flatten().copied().collect());
        Ok(found.into_keys().collect())
    }

    /// Waits for a change since the last scan began.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub(super) async fn changed(&self) -> io::Result<()> {
        loop {
            let mut ready = self.inotify.readable().await?;
            // Before reading: what comes later lights it up again.
            ready.clear_ready();
            if self.take()? {
                return Ok(());
            }
        }
    }

    fn take(&self) -> io::Result<bool> {
        let mut buffer = [MaybeUninit::uninit(); 4096];
        let mut reader = Reader::new(self.inotify.get().as_fd(), &mut buffer);
        let mut any = false;
        let mut interruptions = 0;
        loop {
            match reader.next() {
                // What it is does not matter: the tree is read anyway, as events may be lost.
                Ok(_) => any = true,
                Err(Errno::WOULDBLOCK) => return Ok(any),
                Err(Errno::INTR) if interruptions < INTERRUPTIONS_MAX => interruptions += 1,
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    fn walk(
        &self,
        path: &Path,
        components: &mut Vec<String>,
        found: &mut HashMap<String, Vec<u128>>,
    ) -> io::Result<()> {
        match inotify::add_watch(self.inotify.get(), path, EVENTS) {
            Ok(_) => {}
            // Left by its last user meanwhile.
            Err(Errno::NOENT | Errno::NOTDIR) => return Ok(()),
            Err(errno) => return Err(errno.into()),
        }
        let entries = match std::fs::read_dir(path) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(error),
        };
        for entry in entries {
            let Ok(entry) = entry else { continue };
            let name = entry.file_name();
            let Some(name) = name.to_str() else { continue };
            if let Some(publisher) = is_publisher_of(name) {
                if !INJECTED.is_on(publisher)
                    && let Some(topic) = topic_of_components(components)
                    && is_publisher_alive(path, name).unwrap_or(true)
                {
                    found.entry(topic).or_default().push(publisher);
                }
            } else if components.len() < MAX_DEPTH && entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                components.push(name.to_owned());
                self.walk(&entry.path(), components, found)?;
                components.pop();
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zenoh_publisher_that_is_gone_is_known_until_there_are_many() {
        let known = LocalPublishers::default();
        known.add(0);
        known.found(&HashSet::from([1]));
        known.found(&HashSet::new());
        assert!(known.contains(0) && known.contains(1));
        (2..MANY as u128).for_each(|publisher| known.add(publisher));
        known.found(&HashSet::from([1]));
        assert!(known.contains(1) && !known.contains(0));
    }
}
