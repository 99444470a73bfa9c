//! [`Collecting`] and [`Waiting`]: how hard an allocation tries.
#![allow(unsafe_code)]

use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::task::{Poll, ready};
use std::time::Instant;

use ::zenoh::shm::{
    AllocPolicy, AsyncAllocPolicy, ChunkAllocResult, ConstPolicy, JustAlloc, MemoryLayout, SafePolicy,
    ShmProvider, ZAllocError,
};

use super::PoolBackend;
use super::backend::bytes_for;
use super::pace::{Pace, Ticks};
use crate::pool::{Promised, TakeError};

/// An idle slot; else what receivers have let go; else a new segment, below the cap; else fails.
///
/// What a provider from [`PoolBackend::into_provider`] does by itself; for one that zenoh's `ShmProviderBuilder` has made.
///
/// ```no_run
/// # use zenoh::Wait as _;
/// # fn f(provider: &zenoh::shm::ShmProvider<tokio_shm::zenoh::PoolBackend>) -> Result<(), Box<dyn std::error::Error>> {
/// let buf = provider.alloc(4096).with_policy::<tokio_shm::zenoh::Collecting>().wait()?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone, Copy, Default)]
pub struct Collecting;

/// As [`Collecting`], but waits at the cap: asynchronously when the builder is awaited, on this thread with `wait()`.
///
/// What it is woken by, and what it has to look for, is told in the [module](super).
///
/// # Panics
///
/// When awaited at the cap outside a tokio runtime, or in one whose I/O is not enabled.
///
/// # Cancel safety
///
/// Cancel safe: no memory is lost and no other waiter misses its turn.
///
/// ```no_run
/// # async fn f(provider: &zenoh::shm::ShmProvider<tokio_shm::zenoh::PoolBackend>) -> Result<(), Box<dyn std::error::Error>> {
/// let buf = provider.alloc(4096).with_policy::<tokio_shm::zenoh::Waiting>().await?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone, Copy, Default)]
pub struct Waiting;

// SAFETY: it frees only by `garbage_collect`, which takes what zenoh counts no holder of, and allocates from what was freed so.
unsafe impl SafePolicy for Collecting {}
// SAFETY: as `Collecting`.
unsafe impl SafePolicy for Waiting {}

impl ConstPolicy for Collecting {
    const NEW: Self = Self;
}

impl ConstPolicy for Waiting {
    const NEW: Self = Self;
}

impl AllocPolicy<PoolBackend> for Collecting {
    fn alloc(&self, layout: &MemoryLayout, provider: &ShmProvider<PoolBackend>) -> ChunkAllocResult {
        let backend = PoolBackend::of(provider);
        let len = bytes_for(layout).ok_or(ZAllocError::Other)?;
        let core = backend.pool().core();
        if backend.may_collect() && !core.has_idle_for(len) {
            provider.garbage_collect();
        }
        JustAlloc.alloc(layout, provider)
    }
}

impl AllocPolicy<PoolBackend> for Waiting {
    fn alloc(&self, layout: &MemoryLayout, provider: &ShmProvider<PoolBackend>) -> ChunkAllocResult {
        match Collecting.alloc(layout, provider) {
            Err(ZAllocError::OutOfMemory) => {}
            done => return done,
        }
        let backend = PoolBackend::of(provider);
        let len = bytes_for(layout).ok_or(ZAllocError::Other)?;
        let pool = backend.pool();
        let mut pace = Pace::new();
        let mut place = pool.core().budget.gate.join(pool.lane(len));
        loop {
            // Nobody tells us of what receivers in other processes let go.
            let must_look = backend.may_collect();
            let deadline = must_look.then(|| Instant::now() + pace.interval());
            let ended = || {
                collect(provider, &backend);
                (!must_look && backend.may_collect()).then_some(None)
            };
            let outcome = place.block_until(deadline, ended, |turn| match pool.try_take_in_turn(len, turn) {
                Err(TakeError::Full { .. }) => None,
                taken => Some(Some(taken)),
            });
            if let Some(Some(taken)) = outcome {
                return backend.hand_out(taken);
            }
        }
    }
}

// Written out: what `#[async_trait]` makes of the trait.
impl AsyncAllocPolicy<PoolBackend> for Waiting {
    fn alloc_async<'policy, 'layout, 'provider, 'all>(
        &'policy self,
        layout: &'layout MemoryLayout,
        provider: &'provider ShmProvider<PoolBackend>,
    ) -> Pin<Box<dyn Future<Output = ChunkAllocResult> + Send + 'all>>
    where
        'policy: 'all,
        'layout: 'all,
        'provider: 'all,
        Self: 'all,
    {
        Box::pin(async move {
            match Collecting.alloc(layout, provider) {
                Err(ZAllocError::OutOfMemory) => wait(layout, provider).await,
                done => done,
            }
        })
    }
}

async fn wait(layout: &MemoryLayout, provider: &ShmProvider<PoolBackend>) -> ChunkAllocResult {
    let backend = PoolBackend::of(provider);
    let len = bytes_for(layout).ok_or(ZAllocError::Other)?;
    let look = || {
        collect(provider, &backend);
        false
    };
    let mut take = pin!(backend.pool().take_until(len, Promised::No, look));
    let mut ticks = None;
    let taken = poll_fn(|cx| {
        loop {
            if let Poll::Ready(taken) = take.as_mut().poll(cx) {
                return Poll::Ready(taken);
            }
            // All that is out has a handle in this process: dropping the last one wakes `take`.
            if !backend.may_collect() {
                return Poll::Pending;
            }
            // Such a one may have gone just now. Only for what is left after that it takes a timer.
            collect(provider, &backend);
            if let Poll::Ready(taken) = take.as_mut().poll(cx) {
                return Poll::Ready(taken);
            }
            if !backend.may_collect() {
                return Poll::Pending;
            }
            let ticks = match &mut ticks {
                Some(ticks) => ticks,
                none => match Ticks::new() {
                    Ok(new) => none.insert(new),
                    Err(error) => return Poll::Ready(Some(Err(no_timer(error)))),
                },
            };
            if let Err(error) = ready!(ticks.poll_tick(cx)) {
                return Poll::Ready(Some(Err(no_timer(error))));
            }
            // What this frees wakes `take`, too.
            collect(provider, &backend);
        }
    });
    let taken = taken.await;
    backend.hand_out(taken.expect("only a stop ends the wait without a result"))
}

fn collect(provider: &ShmProvider<PoolBackend>, backend: &PoolBackend) {
    if backend.may_collect() {
        provider.garbage_collect();
    }
}

fn no_timer(error: std::io::Error) -> TakeError {
    TakeError::Memory(crate::MemoryError::Os { action: "making a timer", source: error })
}
