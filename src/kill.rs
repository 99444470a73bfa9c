//! Instants between two steps of the protocol at which a test may have its process killed.
//!
//! A point is code in unit tests only. Elsewhere, loom's models included, it expands to nothing: no branch, no name.

#[cfg(all(test, not(tokio_shm_loom)))]
mod armed;
#[cfg(all(test, not(tokio_shm_loom)))]
mod tests;

#[cfg(all(test, not(tokio_shm_loom)))]
pub(crate) use self::armed::{detour, pass};

/// Names the instant between the statement before and the one after.
#[cfg(any(not(test), tokio_shm_loom))]
macro_rules! kill_point {
    ($name:literal) => {};
}

#[cfg(all(test, not(tokio_shm_loom)))]
macro_rules! kill_point {
    ($name:literal) => {
        $crate::kill::pass($name)
    };
}
