//! Who is compared. Each peer is a sender and a receiver that any work can be done with.
//!
//! Calls are `async` for all of them, so that a work is written once; those of a peer that blocks never yield.

mod bell;
mod iceoryx2;
mod ipc_channel;
mod ring;
mod ringfire;
mod tokio_shm;
mod unix;
mod zenoh;

use crate::case::Case;
use crate::process::Side;
use crate::work;

pub(crate) use self::bell::eventfds;
use self::bell::{AsyncBell, Blocking, Futex, Spin};
pub(crate) use self::tokio_shm::runtime_dir;
pub(crate) use self::zenoh::sweep;

/// The topic from the sending process to the receiving ones, and the one back.
pub(crate) const OUT: &str = "out";
pub(crate) const BACK: &str = "back";

/// A transport, or a floor below all transports.
pub(crate) trait Peer {
    type Tx: Tx;
    type Rx: Rx;
    /// It cannot be driven by a current-thread runtime.
    const MULTI_THREAD: bool = false;
}

/// The sending end of a topic.
pub(crate) trait Tx: Sized {
    /// Makes the topic; does not wait for receivers.
    async fn open(case: &Case, topic: &'static str) -> Self;
    /// Waits until that many receivers are there and every message from now on reaches them.
    async fn connected(&mut self, receivers: usize);
    /// Writes a message of `size` bytes and sends it, waiting for room.
    async fn send(&mut self, size: usize, number: u64);
    /// Sends `count` messages in the way that is fastest for many at once.
    async fn send_batch(&mut self, size: usize, number: u64, count: u64) {
        for _ in 0..count {
            self.send(size, number).await;
        }
    }
}

/// The receiving end of a topic.
pub(crate) trait Rx: Sized {
    /// Finds the topic, waiting for it to be made.
    async fn open(case: &Case, topic: &'static str) -> Self;
    /// Waits for a message and looks at it, in place where the peer can; then it is given back.
    async fn recv<T>(&mut self, look: impl FnOnce(&[u8]) -> T) -> T;
    /// Waits for a message, reads it, and calls `freed` right before the step that makes room for another.
    async fn free(&mut self, freed: impl FnOnce()) -> u64 {
        self.recv(|bytes| {
            let number = crate::payload::read(bytes);
            freed();
            number
        })
        .await
    }
}

/// Tries again, for as long as the suite lets this process live.
pub(crate) async fn until_some<T>(mut attempt: impl FnMut() -> Option<T>) -> T {
    loop {
        if let Some(done) = attempt() {
            return done;
        }
        tokio::time::sleep(std::time::Duration::from_micros(500)).await;
    }
}

macro_rules! peers {
    ($($name:literal => $peer:ty),* $(,)?) => {
        /// Does one side of a case.
        pub(crate) fn run(case: &Case, side: Side) {
            match case.peer.as_str() {
                $($name => work::run::<$peer>(case, side),)*
                other => panic!("no peer is called {other}"),
            }
        }
    };
}

peers! {
    "tokio-shm" => tokio_shm::TokioShm<true>,
    "tokio-shm, settings left alone" => tokio_shm::TokioShm<false>,
    "iceoryx2" => iceoryx2::Iceoryx2,
    "ringfire" => ringfire::Ringfire,
    "zenoh SHM" => zenoh::Zenoh,
    "ipc-channel" => ipc_channel::IpcChannel,
    "Unix stream" => unix::Stream,
    "Unix seqpacket" => unix::Seqpacket,
    "floor: spin" => ring::Floor<Spin>,
    "floor: futex" => ring::Floor<Futex>,
    "floor: eventfd" => ring::Floor<Blocking>,
    "floor: eventfd + AsyncFd" => ring::Floor<AsyncBell>,
    "floor: futex, a ring each" => ring::Floors<Futex>,
    "floor: eventfd + AsyncFd, a ring each" => ring::Floors<AsyncBell>,
}
