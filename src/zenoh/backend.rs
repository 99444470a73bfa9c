//! [`PoolBackend`]: what zenoh's provider allocates from.
//!
//! It hands out slots and takes them back when zenoh says so; when zenoh looks whether it may is up to the provider's
//! collector (here) and the policies.

use std::cell::RefCell;
use std::collections::HashMap;
use std::fmt;
use std::hash::{BuildHasherDefault, Hasher};
use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicIsize, Ordering};
use std::sync::{Arc, OnceLock, Weak};

use ::zenoh::Wait as _;
use ::zenoh::shm::{
    AllocatedChunk, ChunkAllocResult, ChunkDescriptor, MemoryLayout, ProtocolID, PtrInSegment, ShmProvider,
    ShmProviderBackend, ShmProviderBuilder, WithProtocolID, ZAllocError, ZLayoutError,
    cleanup_orphaned_shm_segments,
};
use parking_lot::Mutex;

use super::{BackendError, PROTOCOL_ID, chunk};
use crate::budget::Budget;
use crate::pool::core::{Collect, Slot};
use crate::pool::{PooledSegment, ShmPoolConfig, ShmSegmentPool, TakeError};
use crate::proto::class::{GRAIN, PITCH_MIN, SMALL_MAX};
use crate::segment::Segment;
use crate::sys::memory::{Backing, MemoryError};
use crate::sys::named::{self, Given, Scheme};
use crate::text::chain;

/// The strictest alignment that holds in every process: a page's.
const LARGEST_ALIGNMENT: usize = 4096;

/// zenoh's number for segments that look like its own.
const POSIX_PROTOCOL_ID: ProtocolID = 0;

/// A pool as the backend of a zenoh [`ShmProvider`]; see the [module](super).
///
/// Bounded by the pool's [`max_bytes`](ShmPoolConfig::max_bytes). Alignments up to a page are kept, in receivers too;
/// stricter ones are refused. When it is dropped, memory that receivers may still hold is left to them and never
/// written again.
pub struct PoolBackend {
    inner: Arc<Inner>,
}

struct Inner {
    pool: ShmSegmentPool,
    scheme: Scheme,
    given: Arc<Given>,
    /// What zenoh has, by segment and chunk number ([`key`]). As many as there are buffers out.
    out: Mutex<HashMap<u64, Arc<Slot>, BuildHasherDefault<Spread>>>,
    let_go: Arc<LetGo>,
    collector: OnceLock<Arc<Collector>>,
}

/// Buffers of which nobody in this process has a handle any more, and that zenoh has not freed yet.
///
/// Only such can be collected. Raised by the last local handle, lowered by `free`; as those two are not ordered it may be
/// negative for an instant.
struct LetGo {
    count: AtomicIsize,
    budget: Arc<Budget>,
}

impl PoolBackend {
    /// A backend with a pool of its own, for receivers that use [`shm_clients`](super::shm_clients).
    ///
    /// The configuration's [`backing`](ShmPoolConfig::backing) is set to [`Backing::PosixShm`]. Names left behind by
    /// killed senders of this user are removed, zenoh's own included.
    ///
    /// # Errors
    ///
    /// [`BackendError::DevShm`] where there is no `/dev/shm` to be read.
    pub fn new(config: ShmPoolConfig) -> Result<Self, BackendError> {
        Self::over(&ShmSegmentPool::new(config.backing(Backing::PosixShm)))
    }

    /// A backend whose segments look like zenoh's own: any zenoh program on the host reads them, in whatever
    /// language, without a change.
    ///
    /// Such a receiver locks what it attaches to into memory (`RLIMIT_MEMLOCK`, often 8 MiB, must allow for all of
    /// the pool, or it loses the messages in the segments that it could not attach) and keeps it mapped until it ends: choose
    /// [`max_idle_per_size`](ShmPoolConfig::max_idle_per_size) so large that few segments are ever freed.
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new).
    pub fn for_any_receiver(config: ShmPoolConfig) -> Result<Self, BackendError> {
        Self::build(&ShmSegmentPool::new(config.backing(Backing::PosixShm)), Scheme::Zenoh)
    }

    /// A backend over a pool that others may use as well; its cap is then theirs together.
    ///
    /// Who waits for memory in the pool itself, rather than by [`Waiting`](super::Waiting), does not notice what zenoh's
    /// receivers in other processes let go until he or another looks.
    ///
    /// # Errors
    ///
    /// [`BackendError::Backing`] unless the pool is made of [`Backing::PosixShm`], and as [`new`](Self::new).
    pub fn over(pool: &ShmSegmentPool) -> Result<Self, BackendError> {
        Self::build(pool, Scheme::Own)
    }

    fn build(pool: &ShmSegmentPool, scheme: Scheme) -> Result<Self, BackendError> {
        if pool.core().config.backing != Backing::PosixShm {
            return Err(BackendError::Backing);
        }
        // zenoh's own, and ours that look like them.
        cleanup_orphaned_shm_segments();
        let orphans = named::remove_orphans().map_err(BackendError::DevShm)?;
        if orphans > 0 {
            tracing::info!(orphans, "removed the shared memory of killed senders");
        }
        let let_go = LetGo { count: AtomicIsize::new(0), budget: Arc::clone(&pool.core().budget) };
        let inner = Inner {
            pool: pool.clone(),
            scheme,
            given: Arc::default(),
            out: Mutex::default(),
            let_go: Arc::new(let_go),
            collector: OnceLock::new(),
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// The pool.
    pub fn pool(&self) -> &ShmSegmentPool {
        &self.inner.pool
    }

    /// A provider that looks by itself what receivers have let go, whenever it finds nothing idle.
    ///
    /// It does so with every policy, zenoh's `JustAlloc` (no policy given) included.
    pub fn into_provider(self) -> Arc<ShmProvider<Self>> {
        let inner = Arc::clone(&self.inner);
        let provider = Arc::new(ShmProviderBuilder::backend(self).wait());
        let collector =
            Arc::new(Collector { provider: Arc::downgrade(&provider), let_go: Arc::clone(&inner.let_go) });
        let weak: Weak<dyn Collect> = Arc::<Collector>::downgrade(&collector);
        inner.pool.core().add_collector(weak);
        // `self` is gone, and nobody else sets it.
        let _ = inner.collector.set(collector);
        provider
    }

    /// Segments that have a name now.
    pub fn named_segments(&self) -> usize {
        self.inner.given.count() as usize
    }

    /// The backend of a provider, which zenoh has no way to ask for.
    pub(super) fn of(provider: &ShmProvider<Self>) -> Self {
        ASKED.set(Asked::Who);
        // This is the one call that reaches the backend without doing anything.
        provider.available();
        match ASKED.replace(Asked::Nothing) {
            Asked::Answer(backend) => backend,
            _ => unreachable!("available() answers whoever asks on this thread"),
        }
    }

    /// Whether some buffers could be collected, as far as this process knows.
    pub(super) fn may_collect(&self) -> bool {
        self.inner.let_go.any()
    }

    /// Gives a slot to zenoh.
    pub(super) fn hand_out(&self, taken: Result<PooledSegment, TakeError>) -> ChunkAllocResult {
        let slot = taken.map_err(refused)?.into_slot();
        match self.describe(&slot) {
            Ok(chunk) => {
                self.inner.out.lock().insert(key(&chunk.descriptor), slot);
                Ok(chunk)
            }
            Err(error) => {
                tracing::warn!(error = %chain(&error), "shared memory could not be named");
                self.inner.pool.core().give_back(slot);
                Err(ZAllocError::Other)
            }
        }
    }

    fn describe(&self, slot: &Slot) -> std::io::Result<AllocatedChunk> {
        let segment = slot.segment();
        let name = segment.name(self.inner.scheme, &self.inner.given)?;
        if name.scheme() != self.inner.scheme {
            return Err(std::io::Error::other("the pool is used by backends of both kinds"));
        }
        let chunk = match self.inner.scheme {
            Scheme::Own => chunk::number(slot.offset(), name.inode()),
            Scheme::Zenoh => u32::try_from(slot.offset()).map_err(std::io::Error::other)?,
        };
        let len = NonZeroUsize::new(slot.capacity()).unwrap_or(NonZeroUsize::MIN);
        let start = segment.mapping().as_ptr().as_ptr().wrapping_add(slot.offset());
        let handle = LocalHandle { _segment: Arc::clone(segment), let_go: Arc::clone(&self.inner.let_go) };
        Ok(AllocatedChunk::new(
            ChunkDescriptor::new(name.id(), chunk, len),
            PtrInSegment::new(start, Arc::new(handle)),
        ))
    }
}

fn key(chunk: &ChunkDescriptor) -> u64 {
    u64::from(chunk.segment) << 32 | u64::from(chunk.chunk)
}

/// Bytes to take so that a slot has the layout's size and alignment; `None` where that cannot be.
pub(super) fn bytes_for(layout: &MemoryLayout) -> Option<usize> {
    let (size, alignment) = (layout.size().get(), layout.alignment().get_alignment_value().get());
    if alignment <= GRAIN {
        return Some(size);
    }
    // A slot of a segment of its own begins with a page; of those that share one, slots of a power of two are aligned to their
    // size, where they are not so small that they lie apart.
    let shared = || size.max(alignment).max(PITCH_MIN).next_power_of_two();
    let aligned = || if size > SMALL_MAX { size } else { shared() };
    (alignment <= LARGEST_ALIGNMENT).then(aligned)
}

/// What zenoh's policies go by: they wait after `OutOfMemory`, and give up after `Other`.
fn refused(error: TakeError) -> ZAllocError {
    match error {
        TakeError::Full { .. } | TakeError::TimedOut { .. } => ZAllocError::OutOfMemory,
        TakeError::Memory(MemoryError::DevShmFull { .. }) => ZAllocError::OutOfMemory,
        TakeError::Memory(ref shortage) if shortage.is_shortage() => {
            tracing::warn!(error = %chain(shortage), "no shared memory");
            ZAllocError::OutOfMemory
        }
        error => {
            tracing::warn!(error = %chain(&error), "no shared memory");
            ZAllocError::Other
        }
    }
}

impl WithProtocolID for PoolBackend {
    fn id(&self) -> ProtocolID {
        match self.inner.scheme {
            Scheme::Own => PROTOCOL_ID,
            Scheme::Zenoh => POSIX_PROTOCOL_ID,
        }
    }
}

impl ShmProviderBackend for PoolBackend {
    /// At once or not at all.
    fn alloc(&self, layout: &MemoryLayout) -> ChunkAllocResult {
        let len = bytes_for(layout).ok_or(ZAllocError::Other)?;
        let pool = &self.inner.pool;
        if let Some(idle) = pool.take_idle(len) {
            return self.hand_out(Ok(idle));
        }
        // The pool would come to it as well, past whoever else it collects from.
        if let Some(collector) = self.inner.collector.get() {
            collector.collect();
        }
        self.hand_out(pool.try_take(len))
    }

    /// The only way back into the pool: zenoh calls it when its count of holders, in all processes, is zero.
    fn free(&self, chunk: &ChunkDescriptor) {
        let slot = self.inner.out.lock().remove(&key(chunk));
        // Not of this backend, or freed already: then it is not ours to use again.
        let Some(slot) = slot else { return };
        self.inner.let_go.count.fetch_sub(1, Ordering::Relaxed);
        self.inner.pool.core().give_back(slot);
    }

    /// There is nothing to be defragmented: idle segments of other sizes are given up when need be.
    fn defragment(&self) -> usize {
        0
    }

    /// Bytes below the cap and in idle slots, what could be collected not included.
    fn available(&self) -> usize {
        let asked = ASKED.with_borrow_mut(|asked| match asked {
            Asked::Who => {
                *asked = Asked::Answer(Self { inner: Arc::clone(&self.inner) });
                true
            }
            _ => false,
        });
        if asked {
            return 0;
        }
        let stats = self.inner.pool.core().stats();
        let idle: usize = stats.sizes.iter().map(|size| size.size * size.idle).sum();
        usize::try_from(stats.max_bytes - stats.bytes).unwrap_or(usize::MAX).saturating_add(idle)
    }

    fn layout_for(&self, layout: MemoryLayout) -> Result<MemoryLayout, ZLayoutError> {
        bytes_for(&layout)
            .filter(|&len| self.inner.pool.core().class_for(len).is_ok())
            .map(|_| layout)
            .ok_or(ZLayoutError::ProviderIncompatibleLayout)
    }
}

impl fmt::Debug for PoolBackend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PoolBackend")
            .field("scheme", &self.inner.scheme)
            .field("out", &self.inner.out.lock().len())
            .field("pool", &self.inner.pool)
            .finish_non_exhaustive()
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        // The provider is gone, and with it the counts: whoever still holds one of these holds it for ever.
        for (_, slot) in self.out.get_mut().drain() {
            self.pool.core().abandon(&slot, None);
        }
    }
}

impl LetGo {
    fn any(&self) -> bool {
        self.count.load(Ordering::Acquire) > 0
    }
}

/// What all handles of one buffer in this process share; zenoh drops it after it has lowered its count.
struct LocalHandle {
    /// Keeps the memory mapped for them, should the provider go first.
    _segment: Arc<Segment>,
    let_go: Arc<LetGo>,
}

impl Drop for LocalHandle {
    fn drop(&mut self) {
        self.let_go.count.fetch_add(1, Ordering::AcqRel);
        self.let_go.budget.gate.wake_all();
    }
}

/// Lets the pool ask zenoh what has been let go.
struct Collector {
    provider: Weak<ShmProvider<PoolBackend>>,
    let_go: Arc<LetGo>,
}

impl Collect for Collector {
    fn collect(&self) {
        if self.let_go.any()
            && let Some(provider) = self.provider.upgrade()
        {
            provider.garbage_collect();
        }
    }
}

/// Hashes a key that we have made ourselves, in a few cycles: segments are numbered at random.
#[derive(Default)]
struct Spread(u64);

impl Hasher for Spread {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|&byte| self.write_u64(self.0 ^ u64::from(byte)));
    }

    fn write_u64(&mut self, key: u64) {
        // By the golden ratio, so that the upper bits depend on all; the table goes by the upper and the lower ones.
        let product = key.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.0 = product ^ (product >> 32);
    }
}

enum Asked {
    Nothing,
    Who,
    Answer(PoolBackend),
}

thread_local! {
    /// How [`PoolBackend::of`] and `available` talk past zenoh.
    static ASKED: RefCell<Asked> = const { RefCell::new(Asked::Nothing) };
}
