//! What the crate asks of Linux: shared memory, doorbells, sockets that carry descriptors, directory watches, a clock.
//!
//! Knows rustix and nothing above it: no tokio, no topic, no protocol. Every descriptor made or received here is
//! close-on-exec, and no call here blocks.

pub(crate) mod bell;
pub(crate) mod cgroup;
pub(crate) mod clock;
#[cfg(feature = "zenoh")]
pub(crate) mod connections;
pub(crate) mod epoll_set;
pub(crate) mod fork;
pub(crate) mod inotify;
pub(crate) mod limits;
pub(crate) mod memory;
#[cfg(feature = "zenoh")]
pub(crate) mod named;
pub(crate) mod ownership;
pub(crate) mod process;
pub(crate) mod random;
pub(crate) mod socket;
#[cfg(test)]
pub(crate) mod testing;
