//! The ways to wait of the floor: spinning, a futex, an eventfd read by a thread, one watched by tokio.
#![allow(unsafe_code)]

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::fd::{FromRawFd as _, OwnedFd};
use std::sync::atomic::{AtomicU32, Ordering, fence};

use rustix::event::{EventfdFlags, eventfd};
use rustix::thread::futex;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::OUT;
use crate::board::{map, shared_file};
use crate::case::Case;

/// What one end waits by and the other rings. Both ends hold one.
pub(crate) trait Bell: Sized {
    /// A reader cannot tell cheaply whether a writer sleeps.
    const RINGS_FOR_ROOM: bool;
    /// Of a topic: the one for messages and the one for room.
    fn pair(case: &Case, topic: &str) -> [Self; 2];
    fn ring(&self);
    /// Waits until `ready`; may return too early.
    async fn wait(&self, ready: impl Fn() -> bool);
}

/// Never sleeps.
pub(crate) struct Spin;

impl Bell for Spin {
    const RINGS_FOR_ROOM: bool = false;

    fn pair(_: &Case, _: &str) -> [Self; 2] {
        [Self, Self]
    }

    fn ring(&self) {}

    async fn wait(&self, ready: impl Fn() -> bool) {
        while !ready() {
            std::hint::spin_loop();
        }
    }
}

/// Sleeps on a word in a shared page, which says whether anybody sleeps.
pub(crate) struct Futex(&'static AtomicU32);

impl Bell for Futex {
    const RINGS_FOR_ROOM: bool = true;

    fn pair(case: &Case, topic: &str) -> [Self; 2] {
        let size = 256;
        let memory = map(&shared_file(&case.dir.join(format!("{topic}.futex")), size), size);
        [0, 128].map(|offset| {
            // SAFETY: inside the mapping, aligned, zeroed by the kernel, never unmapped, accessed atomically only.
            Self(unsafe { &*memory.wrapping_add(offset).cast::<AtomicU32>() })
        })
    }

    fn ring(&self) {
        fence(Ordering::SeqCst);
        if self.0.load(Ordering::Relaxed) == 1 {
            self.0.store(0, Ordering::Relaxed);
            futex::wake(self.0, futex::Flags::empty(), 1).expect("wake");
        }
    }

    async fn wait(&self, ready: impl Fn() -> bool) {
        self.0.store(1, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        if !ready() {
            match futex::wait(self.0, futex::Flags::empty(), 1, None) {
                Ok(()) | Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => {}
                Err(error) => panic!("wait: {error}"),
            }
        }
        self.0.store(0, Ordering::Relaxed);
    }
}

/// A blocking eventfd.
pub(crate) struct Blocking(File);

impl Bell for Blocking {
    const RINGS_FOR_ROOM: bool = true;

    fn pair(case: &Case, topic: &str) -> [Self; 2] {
        bells(case, topic).map(Self)
    }

    fn ring(&self) {
        (&self.0).write_all(&1_u64.to_ne_bytes()).expect("ring");
    }

    async fn wait(&self, ready: impl Fn() -> bool) {
        if !ready() {
            (&self.0).read_exact(&mut [0; 8]).expect("an eventfd");
        }
    }
}

/// An eventfd on tokio's reactor.
pub(crate) struct AsyncBell(AsyncFd<File>);

impl Bell for AsyncBell {
    const RINGS_FOR_ROOM: bool = true;

    fn pair(case: &Case, topic: &str) -> [Self; 2] {
        bells(case, topic).map(|bell| {
            // SAFETY: the file keeps its descriptor open and the same until it is dropped with the `AsyncFd`.
            let watched = unsafe { AsyncFd::register_with_interest(bell, Interest::READABLE) };
            Self(watched.map_err(|error| error.into_parts().1).expect("register"))
        })
    }

    fn ring(&self) {
        self.0.get_ref().write_all(&1_u64.to_ne_bytes()).expect("ring");
    }

    async fn wait(&self, ready: impl Fn() -> bool) {
        if ready() {
            return;
        }
        let mut guard = self.0.readable().await.expect("a running reactor");
        let read = guard.try_io(|bell| bell.get_ref().read(&mut [0; 8]));
        if let Ok(Err(error)) = read {
            assert_eq!(error.kind(), io::ErrorKind::Interrupted, "{error}");
        }
    }
}

/// The two eventfds of a topic, which the suite made and this process inherited.
fn bells(case: &Case, topic: &str) -> [File; 2] {
    let first = if topic == OUT { 0 } else { 2 };
    [0, 1].map(|nth| {
        // SAFETY: the suite left these descriptors open for this process, and each topic is opened once in it.
        unsafe { File::from_raw_fd(case.bells[first + nth]) }
    })
}

/// How many eventfds a receiver's topics have.
pub(super) const A_RECEIVER: usize = 4;

/// The eventfds of a case, to be inherited: for each receiver those of the topic out, then those of the one back.
pub(crate) fn eventfds(case: &Case) -> Vec<OwnedFd> {
    let flags = match case.peer.as_str() {
        "floor: eventfd" => EventfdFlags::empty(),
        "floor: eventfd + AsyncFd" | "floor: eventfd + AsyncFd, a ring each" => EventfdFlags::NONBLOCK,
        _ => return Vec::new(),
    };
    (0..A_RECEIVER * case.fars).map(|_| eventfd(0, flags).expect("eventfd")).collect()
}
