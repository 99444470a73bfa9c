//! The pool inside [zenoh]: a shared-memory provider for senders, and what receivers attach to it with.
//!
//! A zenoh program changes one line where it makes its provider, and from then on what it allocates comes from a
//! [`ShmSegmentPool`](crate::ShmSegmentPool):
//!
//! ```no_run
//! # fn main() -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
//! use tokio_shm::ShmPoolConfig;
//! use tokio_shm::zenoh::PoolBackend;
//! use zenoh::Wait as _;
//!
//! // let provider = zenoh::shm::ShmProviderBuilder::default_backend(16 << 20).wait()?;
//! let provider = PoolBackend::new(ShmPoolConfig::new())?.into_provider();
//!
//! let mut buf = provider.alloc(1 << 20).wait()?;
//! buf[0] = 1;
//! # Ok(())
//! # }
//! ```
//!
//! A receiver opens its session with [`shm_clients`], or the sender chooses [`PoolBackend::for_any_receiver`], whose
//! segments look like zenoh's own.
//!
//! # When memory is used again
//!
//! zenoh counts the holders of each buffer in shared memory, in all processes. A receiver that lets go lowers that count
//! and tells nobody; the provider has to look. Only when the count is zero does zenoh call the backend's `free`, and only
//! that gives a slot back to the pool. When does it look?
//!
//! - A provider made by [`into_provider`](PoolBackend::into_provider) looks by itself whenever it finds nothing idle, before
//!   it makes a new segment. No policy is needed.
//! - One made by zenoh's `ShmProviderBuilder` looks when a policy tells it to: [`Collecting`] or [`Waiting`] before
//!   a segment is made, zenoh's `GarbageCollect` only at the cap.
//!
//! # Waiting for memory
//!
//! [`Waiting`] awaits (or blocks for) memory at the cap. It is woken as soon as the last handle *in this process*
//! is dropped (local receivers included), a slot or bytes of the pool come free otherwise, or idle segments of
//! other sizes can be given up. What it cannot be woken by is a receiver in another process, because zenoh tells nobody: as long
//! as such a receiver may be what it waits for, and only then, it also looks at growing intervals, from 20 µs to 4 ms, so that
//! it is late by no more than the time it has waited already. (zenoh's own `BlockOn` looks every millisecond, always.)
//!
//! # Names
//!
//! zenoh's receivers attach by number. So a pool's segment gets a name in `/dev/shm` (mode 0600) at its first use here, with a
//! number of 32 bits that the process never uses again, beginning at a random one; messages also carry 20 bits of the
//! object's inode number, by which a receiver notices that a number leads to another object than before. The name goes with
//! the segment. What killed senders leave is recognised by a lock that nobody holds any more, and removed when
//! the next backend is made.
//!
//! # What zenoh cannot do
//!
//! - A receiver that is killed never lowers the counts of what it held: that memory is not used again until its provider is
//!   gone. (zenoh can have it back by `garbage_collect_unsafe`, which may also take it from one that only stalls.)
//! - Receivers map segments writable, and trust the sender with the length. Use it among processes that trust each other.
//! - A receiver keeps about 200 bytes for every segment that it has ever attached to.

mod backend;
mod client;
mod error;
mod pace;
mod policy;

pub use self::backend::PoolBackend;
pub use self::client::{PoolClient, shm_clients};
pub use self::error::BackendError;
pub use self::policy::{Collecting, Waiting};

/// The protocol's number among zenoh's: what a sender's backend and a receiver's client have in common.
pub const PROTOCOL_ID: ::zenoh::shm::ProtocolID = u32::from_be_bytes(*b"tshm");

/// How a place in a segment travels: as zenoh's 32-bit chunk number.
///
/// The lower 12 bits are the offset in units of 64 bytes: only segments of up to 256 KiB have more than one slot. The
/// upper 20 are from the object's inode number.
mod chunk {
    use crate::proto::class::{GRAIN, SHARED_SEGMENT};

    const OFFSET_BITS: u32 = 12;
    const _: () = assert!(SHARED_SEGMENT / GRAIN <= 1 << OFFSET_BITS);

    pub(super) fn number(offset: usize, inode: u64) -> u32 {
        (offset / GRAIN) as u32 | tag(inode) << OFFSET_BITS
    }

    pub(super) fn offset(chunk: u32) -> usize {
        (chunk as usize & ((1 << OFFSET_BITS) - 1)) * GRAIN
    }

    pub(super) fn is_of(chunk: u32, inode: u64) -> bool {
        chunk >> OFFSET_BITS == tag(inode)
    }

    fn tag(inode: u64) -> u32 {
        inode as u32 & ((1 << (32 - OFFSET_BITS)) - 1)
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        #[test]
        fn zenoh_chunk_number_gives_back_offset_and_inode() {
            for (at, inode) in [(0, 0), (64, 1), (SHARED_SEGMENT - GRAIN, u64::MAX), (4096, 0xfff_ffff)] {
                let chunk = number(at, inode);
                assert_eq!(offset(chunk), at);
                assert!(is_of(chunk, inode) && !is_of(chunk, inode ^ 1));
            }
        }
    }
}
