//! One measurement: which work, by which peer, with what. It travels from the suite to its processes.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// What is done; one room each in [`crate::work`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(crate) enum Work {
    Hop,
    Stream,
    FanOut,
    Blocked,
    Cpu,
    First,
    Memory,
    PublisherSide,
    Micro,
}

/// How a receiver waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(crate) enum Mode {
    /// It never sleeps.
    Awake,
    /// It sleeps at once.
    Parked,
    /// As the peer does it unless told otherwise.
    Default,
}

/// Everything that a process of the suite has to know.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Case {
    pub(crate) work: Work,
    /// As tables call it; [`crate::peers::run`] knows all of them.
    pub(crate) peer: String,
    pub(crate) mode: Mode,
    /// Bytes a message.
    pub(crate) size: usize,
    /// Receiving processes.
    pub(crate) fars: usize,
    /// Which of them this is, for the process that is one.
    pub(crate) nth: usize,
    /// The core of the receiving processes; the sending one has core 0.
    pub(crate) far_core: usize,
    /// Messages that a receiver may be behind.
    pub(crate) depth: usize,
    /// Messages are handed over in batches, where the peer can.
    pub(crate) batched: bool,
    /// The receiver is not waited for: it drops what it cannot keep up with.
    pub(crate) outrun: bool,
    /// How long to measure, in milliseconds; works that count repetitions derive their number from it.
    pub(crate) effort_ms: u64,
    /// How long a sender is kept blocked, in milliseconds.
    pub(crate) rest_ms: u64,
    /// Inherited eventfds, for floors that ring them.
    pub(crate) bells: Vec<i32>,
    /// Where the processes meet: private, on a tmpfs, removed afterwards.
    pub(crate) dir: PathBuf,
}

impl Case {
    pub(crate) fn new(work: Work, peer: &str, mode: Mode, size: usize) -> Self {
        Self {
            work,
            peer: peer.to_owned(),
            mode,
            size,
            fars: 1,
            nth: 0,
            far_core: 1,
            depth: 64,
            batched: false,
            outrun: false,
            effort_ms: 300,
            rest_ms: 1,
            bells: Vec::new(),
            dir: PathBuf::new(),
        }
    }
}
