//! Names that nobody has used before.
//!
//! 128 random bits: unique without asking anybody, and never used twice. Not a secret: ids are written into file names.

use super::again_if_interrupted;
use rustix::io::Errno;
use rustix::rand::{GetRandomFlags, getrandom};
use std::io;

/// A random 128-bit id, never zero.
///
/// # Errors
/// Only where the kernel has no `getrandom`, or a sandbox forbids it.
pub(crate) fn random_id() -> io::Result<u128> {
    let mut bytes = [0_u8; 16];
    // Up to 256 bytes are given whole or not at all; a signal can come only while the pool is still being seeded.
    again_if_interrupted(|| match getrandom(&mut bytes, GetRandomFlags::empty()) {
        Ok(16) if bytes != [0; 16] => Ok(()),
        Ok(_) => Err(Errno::INTR),
        Err(errno) => Err(errno),
    })?;
    Ok(u128::from_ne_bytes(bytes))
}

#[cfg(test)]
mod tests {
    use super::random_id;

    #[test]
    fn random_id_asked_twice_differs() {
        assert_ne!(random_id().unwrap(), random_id().unwrap());
    }
}
