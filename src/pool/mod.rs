//! [`ShmSegmentPool`]: shared-memory segments that are used again instead of being made anew.
//!
//! Making a 1 MiB segment costs hundreds of microseconds of page faults; taking an idle one is one pop from a
//! lock-free queue. It knows nothing of publishers or links.

mod config;
pub(crate) mod core;
mod error;
mod packed;
mod pooled;
mod stats;

use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::sync::oneshot;

pub use self::config::ShmPoolConfig;
use self::core::{Found, PoolCore, Slot};
pub use self::error::TakeError;
pub use self::pooled::PooledSegment;
pub use self::stats::{PoolStats, SizeStats};
use crate::blocking::assert_may_block;
use crate::budget::Reservation;
use crate::gate::{Lane, Turn};
use crate::proto::class::{self, ClassIndex};

/// From here on a segment is made on another thread: its page faults take longer than starting one.
const MAKE_ELSEWHERE: u64 = 512 << 10;

/// The stack of that thread, which calls nothing deep.
const MAKER_STACK: usize = 256 << 10;

/// A pool of shared-memory segments, with a cap in bytes.
///
/// Lock-free where it counts: taking an idle segment and giving one back. Making one, giving up idle ones of other sizes, and what
/// more than 1,024 idle slots of a size take beyond that use locks of this process.
///
/// Cheap to clone; clones are the same pool. A [`PooledSegment`] gives itself back when it is dropped and stays valid
/// when it outlives the pool.
///
/// # Examples
///
/// ```
/// use tokio_shm::{ShmPoolConfig, ShmSegmentPool};
///
/// # fn main() -> Result<(), tokio_shm::TakeError> {
/// let pool = ShmSegmentPool::new(ShmPoolConfig::new());
/// let mut segment = pool.try_take(1 << 20)?; // made: page faults
/// segment[..5].copy_from_slice(b"hello");
/// drop(segment);
/// let segment = pool.try_take(1 << 20)?; // from the pool: nanoseconds
/// assert_eq!(pool.stats().hits, 1);
/// # drop(segment);
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct ShmSegmentPool {
    core: Arc<PoolCore>,
    _open: Arc<Open>,
}

/// Whether the message that memory is for was accepted already.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Promised {
    /// It goes before all others.
    Yes,
    No,
}

/// Held by every handle of a pool; with the last one it closes.
#[derive(Debug)]
struct Open(Arc<PoolCore>);

impl Drop for Open {
    fn drop(&mut self) {
        self.0.close();
    }
}

impl ShmSegmentPool {
    /// An empty pool; nothing is allocated before the first take.
    pub fn new(config: ShmPoolConfig) -> Self {
        let core = Arc::new(PoolCore::new(config));
        Self { _open: Arc::new(Open(Arc::clone(&core))), core }
    }

    /// Takes a segment of at least `len` bytes, or fails at once if the cap leaves no room for it.
    ///
    /// Its content is unspecified. The capacity is at most a quarter above `len`, or 63 bytes if that is more; except at the cap, where an
    /// idle one that is larger may serve.
    ///
    /// # Errors
    ///
    /// [`TakeError::Full`] at the cap or where others wait for it, [`TakeError::TooLarge`] if the cap could never allow it, and
    /// [`TakeError::Memory`] if the system refuses the memory.
    #[inline]
    pub fn try_take(&self, len: usize) -> Result<PooledSegment, TakeError> {
        let idle = if self.core().is_inherited() { None } else { self.core().take_idle_for(len) };
        let slot = match idle {
            Some(slot) => slot,
            None => self.find_or_create(len)?,
        };
        Ok(PooledSegment::new(slot, len))
    }

    /// Takes a segment of at least `len` bytes, waiting at the cap until one comes free.
    ///
    /// Waiters are served in the order in which they came, tasks and threads alike: what comes free adds up for the first one, and a later
    /// one does not take it. Sizes up to 16 KiB share segments, of which the first could seldom have the whole: what is idle of such a
    /// size goes to those who want it meanwhile, in their own order.
    ///
    /// A task that holds segments while it waits for another may be waiting for itself, and a future that is neither polled nor dropped
    /// holds up those behind it.
    ///
    /// Within a runtime a segment of 512 KiB or more that has to be made is made on a thread started for it, so that no task is kept
    /// waiting for its page faults; on this thread where none can be started. A smaller one is made here, in 0.2 ms or less.
    ///
    /// # Errors
    ///
    /// As [`try_take`](Self::try_take), except that it never answers [`TakeError::Full`].
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: a segment that comes too late goes back to the pool, and the next waiter is woken.
    pub async fn take(&self, len: usize) -> Result<PooledSegment, TakeError> {
        self.take_until(len, Promised::No, || false)
            .await
            .expect("only a stop ends the wait without a result")
    }

    /// As [`take`](Self::take), waiting on this thread.
    ///
    /// # Errors
    ///
    /// As [`take`](Self::take).
    ///
    /// # Panics
    ///
    /// On a thread that drives a tokio runtime's tasks.
    pub fn blocking_take(&self, len: usize) -> Result<PooledSegment, TakeError> {
        assert_may_block();
        self.blocking_take_until(len, None, || false).expect("only a stop ends the wait without a result")
    }

    /// As [`blocking_take`](Self::blocking_take), for at most `timeout`.
    ///
    /// # Errors
    ///
    /// As [`take`](Self::take), and [`TakeError::TimedOut`].
    ///
    /// # Panics
    ///
    /// On a thread that drives a tokio runtime's tasks.
    pub fn blocking_take_timeout(&self, len: usize, timeout: Duration) -> Result<PooledSegment, TakeError> {
        assert_may_block();
        // A time-out beyond what the clock can say is no time-out.
        let deadline = Instant::now().checked_add(timeout);
        self.blocking_take_until(len, deadline, || false).expect("only a stop ends the wait without a result")
    }

    /// Makes segments until `count` slots of `len` bytes are idle, and returns how many that left idle.
    ///
    /// Makes no more than there is room for below the cap, without giving up idle segments of other sizes; and of sizes above 16 KiB no
    /// more than `max_idle_per_size`, which is what is kept. It makes them on this thread: about
    /// 300 µs for each MiB.
    ///
    /// # Errors
    ///
    /// [`TakeError::TooLarge`] and [`TakeError::Memory`]. Reaching the cap is none: the count tells.
    pub fn prewarm(&self, len: usize, count: usize) -> Result<usize, TakeError> {
        let size = self.core().class_for(len)?;
        let kept = if class::is_small(size) { usize::MAX } else { self.core().config.max_idle_per_size };
        let mut taken = Vec::new();
        while taken.len() < count.min(kept) {
            let slot = match self.core().find_new(size) {
                Found::Slot(slot) => slot,
                Found::Room(room) => self.core().create(size, room)?,
                Found::Nothing => break,
            };
            taken.push(PooledSegment::new(slot, len));
        }
        drop(taken);
        let size = class::size_of(size);
        Ok(self.stats().sizes.iter().find(|stats| stats.size == size).map_or(0, |stats| stats.idle))
    }

    /// Frees every segment of which nothing is in use.
    pub fn trim(&self) {
        self.core().trim();
    }

    /// The pool's counters, after collecting what subscribers have released.
    pub fn stats(&self) -> PoolStats {
        self.core().collect();
        self.core().stats()
    }

    /// An idle segment, if there is one right here and no other waits for it.
    #[inline]
    pub(crate) fn take_idle(&self, len: usize) -> Option<PooledSegment> {
        self.core().take_idle_for(len).map(|slot| PooledSegment::new(slot, len))
    }

    /// An idle segment, if there is one right here, for a message that was accepted already: before all who wait.
    pub(crate) fn take_idle_first(&self, len: usize) -> Option<PooledSegment> {
        self.core().take_idle(class::class_of(len)?).map(|slot| PooledSegment::new(slot, len))
    }

    /// As [`try_take`](Self::try_take), by one whose turn it is.
    #[cfg(feature = "zenoh")]
    pub(crate) fn try_take_in_turn(&self, len: usize, turn: Turn) -> Result<PooledSegment, TakeError> {
        let class = self.core().class_for(len)?;
        let found = self.core().find(class, turn);
        self.made_of(found, class, len).map(|slot| PooledSegment::new(slot, len))
    }

    /// Where one waits for `len` bytes.
    #[cfg(feature = "zenoh")]
    pub(crate) fn lane(&self, len: usize) -> Lane {
        class::class_of(len).map_or(Lane::Main, core::lane)
    }

    pub(crate) fn core(&self) -> &Arc<PoolCore> {
        &self.core
    }

    /// As `take`, but gives up with `None` once `stop` says so; whoever makes it say so wakes the budget's gate.
    pub(crate) async fn take_until(
        &self,
        len: usize,
        promised: Promised,
        stop: impl Fn() -> bool,
    ) -> Option<Result<PooledSegment, TakeError>> {
        let class = match self.core().class_for(len) {
            Ok(class) => class,
            Err(error) => return Some(Err(error)),
        };
        let lane = match promised {
            Promised::Yes => Lane::Urgent,
            Promised::No => core::lane(class),
        };
        let ended = || stop().then_some(None);
        let found = self.core().budget.gate.wait_until(lane, ended, |turn| self.look(class, turn)).await?;
        let slot = match found {
            Found::Room(room) => self.create_elsewhere(class, room).await,
            Found::Slot(slot) => Ok(slot),
            Found::Nothing => unreachable!("nothing is no reason to stop waiting"),
        };
        Some(slot.map(|slot| PooledSegment::new(slot, len)))
    }

    /// As `take_until`, on this thread and for no longer than `deadline`.
    pub(crate) fn blocking_take_until(
        &self,
        len: usize,
        deadline: Option<Instant>,
        stop: impl Fn() -> bool,
    ) -> Option<Result<PooledSegment, TakeError>> {
        let class = match self.core().class_for(len) {
            Ok(class) => class,
            Err(error) => return Some(Err(error)),
        };
        let gate = &self.core().budget.gate;
        let ended = || stop().then_some(None);
        let found =
            gate.blocking_wait_until(core::lane(class), deadline, ended, |turn| self.look(class, turn));
        let Some(found) = found else {
            return Some(Err(TakeError::TimedOut { len }));
        };
        let slot = match found? {
            Found::Room(room) => self.core().create(class, room),
            Found::Slot(slot) => Ok(slot),
            Found::Nothing => unreachable!("nothing is no reason to stop waiting"),
        };
        Some(slot.map(|slot| PooledSegment::new(slot, len)))
    }

    /// One attempt of a waiter.
    fn look(&self, class: ClassIndex, turn: Turn) -> Option<Option<Found>> {
        match self.core().find(class, turn) {
            Found::Nothing => None,
            found => Some(Some(found)),
        }
    }

    #[cold]
    fn find_or_create(&self, len: usize) -> Result<Arc<Slot>, TakeError> {
        let class = self.core().class_for(len)?;
        self.made_of(self.core().find_now(class), class, len)
    }

    fn made_of(&self, found: Found, class: ClassIndex, len: usize) -> Result<Arc<Slot>, TakeError> {
        match found {
            Found::Slot(slot) => Ok(slot),
            Found::Room(room) => self.core().create(class, room),
            Found::Nothing => Err(TakeError::Full { len, max_bytes: self.core().config.max_bytes }),
        }
    }

    /// Makes a segment off the runtime's threads if it is large and there is a runtime.
    ///
    /// On a thread of its own, which costs a fifth of what making 1 MiB does. Not on tokio's blocking threads: all of them may be in
    /// calls that wait for the very message that this segment is for, and where none can be started `spawn_blocking` panics.
    ///
    /// If the caller is cancelled meanwhile, the finished segment is dropped as a `PooledSegment` and so goes idle.
    async fn create_elsewhere(&self, class: ClassIndex, room: Reservation) -> Result<Arc<Slot>, TakeError> {
        if room.len() < MAKE_ELSEWHERE || tokio::runtime::Handle::try_current().is_err() {
            return self.core().create(class, room);
        }
        let handed = Arc::new(Mutex::new(Some(room)));
        let (done, made) = oneshot::channel();
        let maker = {
            let (core, handed) = (Arc::clone(self.core()), Arc::clone(&handed));
            move || {
                let room = handed.lock().take().expect("only a thread that could not be started leaves it");
                let made = core.create(class, room).map(|slot| {
                    let len = slot.capacity();
                    PooledSegment::new(slot, len)
                });
                // Dropped, and so idle, if nobody waits for it any more.
                let _ = done.send(made);
            }
        };
        let thread = std::thread::Builder::new().name("tokio-shm-make".into()).stack_size(MAKER_STACK);
        let Ok(maker) = thread.spawn(maker) else {
            let room = handed.lock().take().expect("the thread was not started");
            return self.core().create(class, room);
        };
        match made.await {
            Ok(made) => made.map(PooledSegment::into_slot),
            Err(_) => match maker.join() {
                Err(panic) => std::panic::resume_unwind(panic),
                Ok(()) => unreachable!("it tells what came of it before it ends"),
            },
        }
    }
}
