//! Why a segment could not be had.

use crate::sys::memory::MemoryError;

/// Why [`ShmSegmentPool`](crate::ShmSegmentPool) gave no segment.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TakeError {
    /// Everything the cap allows is in use, or others wait for what is not; only from the `try_` calls.
    #[error(
        "no segment for {len} bytes: all {max_bytes} bytes of the pool are in use or waited for; wait for one, or raise max_bytes"
    )]
    Full {
        /// The length asked for, in bytes.
        len: usize,
        /// The pool's cap, in bytes.
        max_bytes: u64,
    },
    /// The time given ran out first; only from the calls that take one.
    #[error("no segment for {len} bytes came free in time; allow more time, or raise max_bytes")]
    TimedOut {
        /// The length asked for, in bytes.
        len: usize,
    },
    /// The pool was made before this process was forked.
    #[error(
        "the pool was made before this process was forked and belongs to the parent: make one in this process"
    )]
    Forked,
    /// Longer than the whole pool may ever hold.
    #[error(
        "{len} bytes can never fit into a pool of {max_bytes} bytes; raise max_bytes or send it in pieces"
    )]
    TooLarge {
        /// The length asked for, in bytes.
        len: usize,
        /// The pool's cap, in bytes.
        max_bytes: u64,
    },
    /// The system refused the memory.
    #[error("cannot make a shared-memory segment")]
    Memory(#[from] MemoryError),
}
