//! What delivery has to say to the log, and where that is said.
//!
//! A log layer may do anything, publish by this crate as well. So nothing is logged inside the turnstile, nor with a lock held: what happens
//! there is noted, and the tx task tells it.

use std::io;

use rustix::process::Pid;

use super::shared::Config;
use crate::link::LinkError;
use crate::sync::Mutex;
use crate::sync::atomic::{AtomicUsize, Ordering};
use crate::text::{Called, Hex, chain};

/// Notes kept at a time. Peers may make as many as they like: what is beyond is counted.
const NOTES_MAX: usize = 64;

/// Something that happened to a publisher. `link` is its number for the connection.
#[derive(Debug)]
pub(crate) enum Note {
    CannotAccept(io::Error),
    Refused(Option<Pid>, LinkError),
    /// There were too many connections that said nothing.
    TurnedAway(Option<Pid>),
    NotWelcomed(LinkError),
    Evicted {
        link: u64,
        process: Option<Pid>,
    },
    Disconnected {
        link: u64,
        process: Option<Pid>,
        fault: LinkError,
    },
}

/// Notes, oldest first.
#[derive(Debug, Default)]
pub(crate) struct Journal {
    notes: Mutex<Vec<Note>>,
    /// How many there were, kept or not, since they were last told.
    count: AtomicUsize,
}

impl Journal {
    /// Notes something; the tx task is to be notified.
    pub(crate) fn note(&self, note: Note) {
        let mut notes = self.notes.lock();
        if notes.len() < NOTES_MAX {
            notes.push(note);
        }
        self.count.fetch_add(1, Ordering::Release);
    }

    /// Tells what was noted. Not to be called inside the turnstile, nor with a lock held.
    pub(crate) fn tell(&self, config: &Config) {
        if self.count.load(Ordering::Acquire) == 0 {
            return;
        }
        let (notes, count) = {
            let mut notes = self.notes.lock();
            (std::mem::take(&mut *notes), self.count.swap(0, Ordering::AcqRel))
        };
        let untold = count - notes.len();
        let (topic, publisher) = (config.topic.as_str(), Hex(config.id));
        for note in notes {
            note.tell(topic, publisher);
        }
        if untold > 0 {
            tracing::debug!(topic, %publisher, untold, "more happened than is told");
        }
    }
}

impl Note {
    fn tell(self, topic: &str, publisher: Hex) {
        match self {
            Self::CannotAccept(error) => tracing::warn!(
                topic,
                %publisher,
                error = %chain(&error),
                "cannot accept a subscriber; raise RLIMIT_NOFILE if it is too low"
            ),
            Self::Refused(pid, error) => {
                tracing::debug!(topic, %publisher, process = %Called::of(pid), error = %chain(&error), "refused a connection");
            }
            Self::TurnedAway(pid) => tracing::debug!(
                topic,
                %publisher,
                process = %Called::of(pid),
                "turned away a connection that says nothing: there are too many"
            ),
            Self::NotWelcomed(error) => {
                tracing::debug!(topic, %publisher, error = %chain(&error), "a subscriber left while it was being welcomed");
            }
            Self::Evicted { link, process } => tracing::warn!(
                topic,
                %publisher,
                link,
                process = %Called::of(process),
                "a subscriber was stuck for too long and has been disconnected"
            ),
            Self::Disconnected { link, process, fault: LinkError::Io(error) } if is_gone(&error) => {
                tracing::debug!(
                    topic,
                    %publisher,
                    link,
                    process = %Called::of(process),
                    error = %chain(&error),
                    "a subscriber is gone"
                )
            }
            Self::Disconnected { link, process, fault } => tracing::warn!(
                topic,
                %publisher,
                link,
                process = %Called::of(process),
                fault = %chain(&fault),
                "disconnecting a subscriber"
            ),
        }
    }
}

/// Whether a send failed for no fault but that there is no receiver any more.
fn is_gone(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset)
}
