//! Why a backend could not be made.

/// Why [`PoolBackend`](super::PoolBackend) could not be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BackendError {
    /// The pool's segments can have no name.
    #[error(
        "zenoh's receivers attach by name, which only Backing::PosixShm can have: make the pool with that backing"
    )]
    Backing,
    /// `/dev/shm`, where the segments are to be, cannot be read.
    #[error("cannot use /dev/shm, where zenoh's receivers look for shared memory")]
    DevShm(#[source] std::io::Error),
}
