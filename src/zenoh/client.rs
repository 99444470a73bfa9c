//! [`PoolClient`]: how a zenoh session attaches to the segments of a sender's pool.
//!
//! zenoh keeps every segment that it ever attached to. So it is the segment that unmaps itself once its sender has freed it
//! and no message in it is held here.

use std::fmt;
use std::os::fd::AsFd as _;
use std::sync::atomic::fence;
use std::sync::{Arc, LazyLock, Weak};

use ::zenoh::Result as ZResult;
use ::zenoh::shm::{
    ChunkID, PosixShmClient, ProtocolID, SegmentID, ShmClient, ShmClientStorage, ShmSegment, WithProtocolID,
};
use parking_lot::Mutex;

use super::{PROTOCOL_ID, chunk};
use crate::sys::memory::{self, Mapping};
use crate::sys::named;

/// What a receiver's session is opened with: zenoh's own shared memory, and that of [`PoolBackend`](super::PoolBackend).
///
/// The same storage for all sessions of the process.
///
/// ```no_run
/// # async fn f() -> zenoh::Result<()> {
/// let session = zenoh::open(zenoh::Config::default()).with_shm_clients(tokio_shm::zenoh::shm_clients()).await?;
/// # Ok(())
/// # }
/// ```
pub fn shm_clients() -> Arc<ShmClientStorage> {
    static CLIENTS: LazyLock<Arc<ShmClientStorage>> = LazyLock::new(|| {
        let clients: [Arc<dyn ShmClient>; 2] = [Arc::new(PosixShmClient), Arc::new(PoolClient::new())];
        Arc::new(ShmClientStorage::builder().with_clients(&clients).build())
    });
    Arc::clone(&CLIENTS)
}

/// Attaches a zenoh session to the segments of [`PoolBackend`](super::PoolBackend)s, for a
/// [`ShmClientStorage`] of your own; otherwise use [`shm_clients`].
#[derive(Debug, Default)]
pub struct PoolClient {
    attached: Mutex<Vec<Weak<AttachedSegment>>>,
}

impl PoolClient {
    /// A client that has not attached to anything yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Unmaps the segments that their senders have freed and in which no message is held here, and says how many others there
    /// are. Attaching to a new segment does so too.
    pub fn unmap_freed(&self) -> usize {
        let mut attached = self.attached.lock();
        attached.retain(|segment| segment.upgrade().is_some_and(|segment| !segment.unmap_if_freed()));
        attached.len()
    }
}

impl WithProtocolID for PoolClient {
    fn id(&self) -> ProtocolID {
        PROTOCOL_ID
    }
}

impl ShmClient for PoolClient {
    fn attach(&self, segment: SegmentID) -> ZResult<Arc<dyn ShmSegment>> {
        self.unmap_freed();
        let segment = Arc::new(AttachedSegment { id: segment, mapped: Mutex::new(Vec::new()) });
        segment.remap(&mut segment.mapped.lock())?;
        self.attached.lock().push(Arc::downgrade(&segment));
        Ok(segment)
    }
}

/// One of a sender's segments, or several that have had the same number one after the other.
struct AttachedSegment {
    id: SegmentID,
    /// The last is the current one. None: its sender has freed it.
    mapped: Mutex<Vec<Mapped>>,
}

struct Mapped {
    mapping: Mapping,
    inode: u64,
}

impl AttachedSegment {
    /// Maps the object that the number leads to now. What was mapped before may still be read and stays.
    fn remap(&self, mapped: &mut Vec<Mapped>) -> ZResult<()> {
        let found = named::find(self.id)?;
        let len = usize::try_from(found.len)?;
        let mapping = memory::map_writable(found.fd.as_fd(), len)?;
        mapped.push(Mapped { mapping, inode: found.inode });
        Ok(())
    }

    /// Whether it has been unmapped, now or before.
    fn unmap_if_freed(self: Arc<Self>) -> bool {
        let mut mapped = self.mapped.lock();
        let Some(current) = mapped.last() else { return true };
        if named::leads_to(self.id, current.inode) {
            return false;
        }
        // zenoh's own, and `self`. Any message has one more, which it got before it called `map`, and so before it had
        // an address; `map` waits for our lock, and fails after we have unmapped.
        if Arc::strong_count(&self) > 2 {
            return false;
        }
        // Pairs with the decrement by which the last message let go: what it read was read before.
        fence(std::sync::atomic::Ordering::Acquire);
        mapped.clear();
        true
    }
}

impl ShmSegment for AttachedSegment {
    fn map(&self, chunk: ChunkID) -> ZResult<*mut u8> {
        let mut mapped = self.mapped.lock();
        if !mapped.last().is_some_and(|current| chunk::is_of(chunk, current.inode)) {
            self.remap(&mut mapped)?;
        }
        let offset = chunk::offset(chunk);
        match mapped.last() {
            Some(current) if chunk::is_of(chunk, current.inode) && offset < current.mapping.len() => {
                Ok(current.mapping.as_ptr().as_ptr().wrapping_add(offset))
            }
            _ => Err(format!("shared memory {:08x} is another's now: the message is gone", self.id).into()),
        }
    }
}

impl fmt::Debug for AttachedSegment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AttachedSegment")
            .field("id", &format_args!("{:08x}", self.id))
            .field("mappings", &self.mapped.lock().len())
            .finish()
    }
}
