//! A zenoh program whose shared memory comes from the pool.
//!
//! Dear newcomer, if you use zenoh already, this is the line that changes:
//!
//! ```text
//! let provider = ShmProviderBuilder::default_backend(16 << 20).wait()?;          // before
//! let provider = PoolBackend::new(ShmPoolConfig::new())?.into_provider();        // after
//! ```
//!
//! Everything else is zenoh as you know it. Open two terminals. In the first, type
//!
//! ```text
//! cargo run --features zenoh --example zenoh_provider -- receive
//! ```
//!
//! and in the second
//!
//! ```text
//! cargo run --features zenoh --example zenoh_provider -- send
//! ```
//!
//! The receiver prints where each frame lies: in shared memory, where the sender wrote it. Then try this:
//!
//! - Suspend the receiver with Ctrl-Z. It holds what it has, so the sender's pool fills up to its cap, and the sender waits, without
//!   using the processor for it. Bring it back with `fg`: both go on.
//! - Kill the sender with `kill -9` and look into `/dev/shm`: its segments are still there. Start it again: they are gone.
#![allow(clippy::print_stdout, reason = "the examples are programs for a terminal")]

mod support;

use std::process::ExitCode;
use std::time::Duration;

use support::{Interrupt, Result};
use tokio_shm::ShmPoolConfig;
use tokio_shm::zenoh::{PoolBackend, Waiting, shm_clients};
use zenoh::qos::CongestionControl;

const FRAME: usize = 1920 * 1080 * 3;

#[tokio::main]
async fn main() -> ExitCode {
    support::exit(run().await)
}

async fn run() -> Result {
    let mut interrupt = Interrupt::new()?;
    let ended = interrupt.wait();
    match std::env::args().nth(1).as_deref() {
        Some("receive") => tokio::select! { done = receive() => done, () = ended => Ok(()) },
        Some("send") => tokio::select! { done = send() => done, () = ended => Ok(()) },
        _ => Err("say `send` or `receive`".into()),
    }
}

async fn send() -> Result {
    let backend = PoolBackend::new(ShmPoolConfig::new().max_bytes(64 << 20))?;
    let pool = backend.pool().clone();
    let provider = backend.into_provider();

    let session = zenoh::open(zenoh::Config::default()).await?;
    let camera =
        session.declare_publisher("camera/front").congestion_control(CongestionControl::Block).await?;
    println!("sending frames of {FRAME} bytes to \"camera/front\"; Ctrl-C ends it");

    let mut tick = tokio::time::interval(Duration::from_millis(33));
    for number in 0_u64.. {
        tick.tick().await;
        // At the cap this waits until receivers let go of frames. Without a policy it would fail.
        let mut frame = provider.alloc(FRAME).with_policy::<Waiting>().await?;
        frame.fill(number as u8);
        frame[..8].copy_from_slice(&number.to_le_bytes());
        camera.put(frame).await?;
        if number.is_multiple_of(30) {
            let stats = pool.stats();
            println!("frame {number}: {} segments made, {} takes from the pool", stats.misses, stats.hits);
        }
    }
    Ok(())
}

async fn receive() -> Result {
    // With the pool's client, beside zenoh's own. Without it frames come too, by copy.
    let session = zenoh::open(zenoh::Config::default()).with_shm_clients(shm_clients()).await?;
    let frames = session.declare_subscriber("camera/front").await?;
    println!("receiving frames from \"camera/front\"; Ctrl-C ends it");
    while let Ok(sample) = frames.recv_async().await {
        let place = if sample.payload().as_shm().is_some() { "in shared memory" } else { "by copy" };
        let frame = sample.payload().to_bytes();
        let number = frame.first_chunk().map(|bytes| u64::from_le_bytes(*bytes));
        println!("frame {number:?}: {} bytes, {place}", frame.len());
    }
    Ok(())
}
