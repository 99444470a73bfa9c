//! The name under which a publisher is found: its socket in the topic's directory, kept there for as long as the publisher is.
//!
//! Files that nothing has been written to for days are removed by cleaners, from `/tmp` at least, and directories by people. A
//! publisher whose socket is gone serves those it has, and is found by no other. So the socket is watched, and made again. (The
//! topic's directory is locked besides, which `systemd-tmpfiles` respects.)

use std::os::fd::AsFd as _;

use crate::reactor::Watched;
use crate::sys::clock::monotonic_ns;
use crate::sys::fork::Origin;
use crate::sys::inotify::{DirectoryWatch, Target};
use crate::sys::socket::Listener;
use crate::text::{Hex, chain};
use crate::topic::{DiscoveryError, FileId, TopicDir, publisher_name};

/// How soon a socket that was made again is made again once more: something may remove it as fast as it is made.
const REST_NS: u64 = 100_000_000;
/// When to try again what failed: what was in the way goes without a word.
const RETRY_NS: u64 = 1_000_000_000;

/// The socket's name in the topic's directory; gone with this, so that a `bind` that fails afterwards leaves none.
pub(crate) struct Published {
    /// A child leaves the name to its parent.
    origin: Origin,
    directory: TopicDir,
    id: u128,
    /// What the name leads to, if it is ours.
    socket: Option<FileId>,
    watch: Option<Watched<DirectoryWatch>>,
    /// When to look whether it still is, in clock nanoseconds.
    look_at: Option<u64>,
    made_at: u64,
    /// It could not be made again, which is told once.
    failing: bool,
}

impl Published {
    pub(crate) fn new(mut directory: TopicDir, id: u128) -> Result<(Listener, Self), DiscoveryError> {
        let listener = directory.publish(id)?;
        let mut this = Self {
            origin: Origin::here(),
            directory,
            id,
            socket: None,
            watch: None,
            look_at: None,
            made_at: 0,
            failing: false,
        };
        this.socket = this.directory.found_as(id)?;
        Ok((listener, this))
    }

    /// Begins to watch over the name.
    ///
    /// # Panics
    ///
    /// Outside a tokio runtime, or in one whose I/O is not enabled.
    pub(crate) fn watch(&mut self) {
        let watched = DirectoryWatch::new().map_err(DiscoveryError::from).and_then(|watch| {
            Watched::register(watch).map_err(DiscoveryError::io("watching the publisher's socket"))
        });
        match watched {
            Ok(watch) => {
                self.watch = Some(watch);
                self.follow();
            }
            // Short of inotify instances, say, which subscribers need more.
            Err(error) => tracing::debug!(error = %chain(&error), "the publisher's socket is not watched"),
        }
    }

    /// Waits until something happens to the name, or for ever.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe.
    pub(crate) async fn changed(&self) {
        match &self.watch {
            Some(watch) => match watch.readable().await {
                // Before the news is taken: what comes later makes it ready anew.
                Ok(mut ready) => ready.clear_ready(),
                Err(_) => std::future::pending().await,
            },
            None => std::future::pending().await,
        }
    }

    /// Takes the news; says nothing of it yet.
    pub(crate) fn take_news(&mut self) {
        let Some(watch) = &self.watch else { return };
        let news = watch.get().take().is_ok_and(|news| !news.changed && !news.gone);
        if !news && self.look_at.is_none() {
            self.look_at = Some(monotonic_ns().max(self.made_at + REST_NS));
        }
    }

    /// In how many nanoseconds there is something to [`restore`](Self::restore).
    pub(crate) fn due_in(&self) -> Option<u64> {
        self.look_at.map(|at| at.saturating_sub(monotonic_ns()))
    }

    /// Makes the socket again, if it is time and its name is gone or leads to something else.
    pub(crate) fn restore(&mut self) -> Option<Listener> {
        if self.look_at.is_none_or(|at| at > monotonic_ns()) {
            return None;
        }
        self.look_at = None;
        match self.try_restore() {
            Ok(made) => {
                self.failing = false;
                self.follow();
                made
            }
            Err(error) => {
                if !std::mem::replace(&mut self.failing, true) {
                    tracing::warn!(
                        error = %chain(&error),
                        "the publisher's socket was removed and cannot be made again yet: no new subscriber finds it"
                    );
                }
                self.look_at = Some(monotonic_ns() + RETRY_NS);
                None
            }
        }
    }

    /// What was made again cannot be used: to be made once more, later.
    pub(crate) fn unusable(&mut self) {
        self.socket = None;
        self.look_at = Some(monotonic_ns() + RETRY_NS);
    }

    pub(crate) fn withdraw(&self) {
        if !self.origin.is_here() {
            return;
        }
        kill_point!("withdraw: begun");
        if let Err(error) = self.directory.withdraw(self.id) {
            tracing::debug!(error = %chain(&error), "the publisher's socket stays behind until the next bind or connect");
        }
    }

    fn try_restore(&mut self) -> Result<Option<Listener>, DiscoveryError> {
        let found = self.directory.found_as(self.id)?;
        if found.is_some() && found == self.socket {
            return Ok(None);
        }
        if self.directory.is_removed()? {
            // It may have been moved, with our socket in it.
            let _ = self.directory.remove(self.id);
            self.directory.reopen()?;
        }
        let listener = self.directory.publish(self.id)?;
        self.socket = self.directory.found_as(self.id)?;
        self.made_at = monotonic_ns();
        tracing::warn!(
            publisher = %Hex(self.id),
            directory = %self.directory.path().display(),
            "the publisher's socket was removed by something else, and has been made again; exempt the directory from cleaning"
        );
        Ok(Some(listener))
    }

    /// Watches what has the name now. If it is gone again already, there is something to do.
    fn follow(&mut self) {
        let Some(watch) = &self.watch else { return };
        let name = publisher_name(self.id);
        let dir = self.directory.as_fd();
        let watched = watch.get().watch(&[Target::File(dir, &name), Target::Place(dir)]);
        // After the watch: what happens later is news.
        let in_place =
            self.directory.found_as(self.id).is_ok_and(|found| found.is_some() && found == self.socket);
        match watched {
            Ok(()) if in_place => {}
            Err(error) if in_place => {
                tracing::debug!(error = %chain(&error), "the publisher's socket is not watched")
            }
            _ => self.look_at = Some(monotonic_ns().max(self.made_at + REST_NS)),
        }
    }
}

impl Drop for Published {
    fn drop(&mut self) {
        self.withdraw();
    }
}
