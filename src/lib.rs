//! Async-first shared-memory publish/subscribe for tokio, on Linux.
//!
//! A program publishes to a topic; programs in other processes on the same host read each message where it was
//! written. Everything can be awaited, every future can be dropped at any await, and any process can be killed at any
//! instruction without harm to the others.
//!
//! ```no_run
//! use futures::StreamExt as _;
//! use tokio_shm::{ShmPublisher, ShmSubscriber};
//!
//! # async fn publisher(frame: &[u8]) -> Result<(), Box<dyn std::error::Error>> {
//! let publisher = ShmPublisher::bind("camera/front")?;
//! publisher.wait_for_subscribers(1).await; // a message to no subscriber is sent, and gone
//! publisher.send(frame).await?; // copied once, into a pooled segment
//! # Ok(())
//! # }
//! # async fn subscriber() -> Result<(), Box<dyn std::error::Error>> {
//! // In another process, for months: publishers may come, go and come back.
//! let mut camera = ShmSubscriber::connect("camera/front")?;
//! while let Some(received) = camera.next().await {
//!     match received {
//!         Ok(sample) => println!("{} bytes, read in place", sample.len()),
//!         Err(end) if end.is_terminal() => return Err(end.into()),
//!         Err(notice) => eprintln!("{notice}"), // messages were missed, say, or a publisher was lost: it goes on
//!     }
//! }
//! # Ok(())
//! # }
//! ```
//!
//! - [`ShmPublisher`]: `send`, `loan`, `flush`, [`Sink`](futures::Sink); `try_` and `blocking_` beside each.
//! - [`ShmSubscriber`]: `recv`, [`Stream`](futures::Stream); `try_` and `blocking_` beside it.
//! - [`ShmSegmentPool`]: the pool by itself.
//! - [`event`]: a sticky event for tasks and threads.
//!
//! # Fork
//!
//! Handles, loans and samples belong to the process that made them. In a child made by `fork` each of their calls is an error
//! that says so (`Forked`), their bytes panic, and dropping them leaves the parent's alone; what the child binds and connects
//! itself works as anywhere. So daemonize first and connect then, and have forked workers connect by themselves. (A child of a process with
//! threads may do little before `exec`, by POSIX: fork before starting a multi-threaded runtime.)
//!
//! # Log
//!
//! With a [`tracing`] subscriber and `RUST_LOG=tokio_shm=debug`: publishers and subscribers that come and go with their processes, and
//! the directories that they use. Nothing is logged for a message. A log layer may itself publish by this crate.
//!
//! # Features
//!
//! - `zenoh`, off by default: `zenoh` and `bridge`, for when one machine is not enough. The pool as a shared-memory
//!   provider of [zenoh](https://docs.rs/zenoh), topics bridged to zenoh key expressions, and the command `tokio-shm`.
#![deny(unsafe_code)]
// Loom runs the parts alone; what uses the rest of them is left out then.
#![cfg_attr(tokio_shm_loom, allow(dead_code))]

#[cfg(not(target_os = "linux"))]
compile_error!("tokio-shm runs on Linux only: it is built on memfd seals, eventfd, epoll and inotify");

// First: its macro is used everywhere.
#[macro_use]
mod kill;

mod budget;
pub mod event;
mod gate;
mod hot;
mod idle;
mod line;
mod proto;
mod sync;
mod turnstile;

#[cfg(not(tokio_shm_loom))]
mod access;
mod apart;
#[cfg(not(tokio_shm_loom))]
mod blocking;
#[cfg(not(tokio_shm_loom))]
mod buffer;
#[cfg(all(fuzzing, not(test), not(tokio_shm_loom)))]
#[doc(hidden)]
pub mod fuzzing;
#[cfg(all(test, not(tokio_shm_loom)))]
mod fuzzing;
#[cfg(all(test, not(tokio_shm_loom)))]
mod hostile;
#[cfg(not(tokio_shm_loom))]
mod link;
#[cfg(not(tokio_shm_loom))]
mod on_full;
#[cfg(not(tokio_shm_loom))]
mod pool;
#[cfg(not(tokio_shm_loom))]
mod prefetch;
#[cfg(not(tokio_shm_loom))]
mod publisher;
#[cfg(not(tokio_shm_loom))]
mod reactor;
#[cfg(not(tokio_shm_loom))]
mod segment;
#[cfg(not(tokio_shm_loom))]
mod subscriber;
#[cfg(not(tokio_shm_loom))]
mod sys;
#[cfg(not(tokio_shm_loom))]
mod text;
#[cfg(not(tokio_shm_loom))]
mod topic;

#[cfg(all(feature = "zenoh", not(tokio_shm_loom)))]
pub mod bridge;
#[cfg(all(feature = "zenoh", not(tokio_shm_loom)))]
pub mod zenoh;

/// What the address of each loan's, sample's and pooled segment's first byte is a multiple of, in bytes: a cache line.
///
/// So values of any type that asks for no more may be read and written in place.
pub const ALIGN: usize = 64;

#[cfg(not(tokio_shm_loom))]
pub use self::{
    buffer::{Payload, ShmLoan, ShmSample},
    link::Fault,
    on_full::OnFull,
    pool::{PoolStats, PooledSegment, ShmPoolConfig, ShmSegmentPool, SizeStats, TakeError},
    publisher::{
        BindError, FlushError, LoanError, PublisherStats, SendError, SendErrorKind, ShmPublisher,
        ShmPublisherBuilder, SinkError,
    },
    subscriber::{
        BusyPoll, ConnectError, RecvError, ShmSubscriber, ShmSubscriberBuilder, SubscriberStats, TryRecvError,
    },
    sys::inotify::WatchError,
    sys::memory::{Backing, MemoryError},
    topic::{DiscoveryError, RuntimeDirError, TopicError},
};

#[cfg(tokio_shm_shuttle)]
#[doc(hidden)]
pub use self::publisher::scenes;

/// The README's code is compiled with the documentation's.
#[cfg(all(doctest, not(tokio_shm_loom)))]
#[doc = include_str!("../README.md")]
mod readme {}
