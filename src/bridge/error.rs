//! What can go wrong with a bridge.

use crate::topic::{DiscoveryError, RuntimeDirError};

/// Why a bridge could not be started.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BridgeError {
    /// There is nothing to do.
    #[error("a bridge needs at least one route")]
    NoRoute,
    /// The runtime directory cannot be used.
    #[error(transparent)]
    RuntimeDir(#[from] RuntimeDirError),
    /// A topic without wildcard cannot be opened.
    #[error("cannot open topic {topic:?}")]
    Topic {
        /// The topic.
        topic: String,
        /// Why.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The runtime directory cannot be watched for new topics.
    #[error("cannot watch the runtime directory for new topics")]
    Watch(#[source] std::io::Error),
    /// zenoh's session could not be opened, or does not do what is asked of it.
    #[error("zenoh: {0}")]
    Zenoh(Box<dyn std::error::Error + Send + Sync>),
    /// The shared memory for zenoh's receivers cannot be made.
    #[error(transparent)]
    SharedMemory(#[from] crate::zenoh::BackendError),
}

impl From<DiscoveryError> for BridgeError {
    fn from(error: DiscoveryError) -> Self {
        Self::Watch(std::io::Error::other(error))
    }
}
