//! Topics: their names, where they live in the file system, and how publishers and subscribers of one find each other.
//!
//! A topic is a directory, a publisher a socket in it, and inotify says when one appears: no broker, no daemon, no thread. What
//! is said over the sockets is not known here.

mod directory;
mod error;
mod name;
mod near_miss;
mod runtime_dir;
mod watch;

pub(crate) use directory::{FileId, TopicDir, publisher_name};
#[cfg(feature = "zenoh")]
pub(crate) use directory::{is_publisher_alive, publisher_id as is_publisher_of};
pub use error::DiscoveryError;
pub use name::TopicError;
pub(crate) use name::TopicName;
#[cfg(feature = "zenoh")]
pub(crate) use name::topic_of_components;
pub(crate) use runtime_dir::RuntimeDir;
pub use runtime_dir::RuntimeDirError;
pub(crate) use watch::TopicWatch;
