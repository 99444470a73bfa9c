//! What a bridge says about each message, beside its payload: a zenoh attachment of 40 bytes, little-endian.
//!
//! ```text
//!  0  magic     b"tshm"
//!  4  version   u8, 1
//!  5  reserved  3 bytes, 0; not looked at
//!  8  publisher u128   the id of the local publisher
//! 24  seq       u64    the message's number there: 0 for the first, one more for each
//! 32  time      u64    when the bridge took it, in nanoseconds since 1970 (UTC)
//! ```
//!
//! A later version may be longer; these fields stay where they are.

use std::time::{SystemTime, UNIX_EPOCH};

const MAGIC: [u8; 4] = *b"tshm";
const VERSION: u8 = 1;

/// The length of an attachment, in bytes.
pub(super) const LEN: usize = 40;

/// Where a message that came through a bridge is from; the attachment of its zenoh sample.
///
/// ```no_run
/// # fn f(sample: zenoh::sample::Sample) {
/// if let Some(origin) = sample.attachment().and_then(|bytes| tokio_shm::bridge::Origin::decode(&bytes.to_bytes())) {
///     println!("message {} of {:032x}", origin.seq, origin.publisher);
/// }
/// # }
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct Origin {
    /// The id of the local publisher.
    pub publisher: u128,
    /// The message's number at its publisher: 0 for the first, one more for each. A gap is what was lost on the way.
    pub seq: u64,
    /// When the bridge took it, in nanoseconds since 1970 (UTC), by its host's clock.
    pub time: u64,
}

impl Origin {
    pub(super) fn now(publisher: u128, seq: u64) -> Self {
        let time = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self { publisher, seq, time: u64::try_from(time.as_nanos()).unwrap_or(u64::MAX) }
    }

    /// The attachment's bytes.
    pub fn encode(&self) -> [u8; LEN] {
        let mut bytes = [0; LEN];
        bytes[..4].copy_from_slice(&MAGIC);
        bytes[4] = VERSION;
        bytes[8..24].copy_from_slice(&self.publisher.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.seq.to_le_bytes());
        bytes[32..].copy_from_slice(&self.time.to_le_bytes());
        bytes
    }

    /// Reads an attachment; `None` if it is none of a bridge's.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let bytes: &[u8; LEN] = bytes.first_chunk()?;
        if bytes[..4] != MAGIC || bytes[4] < VERSION {
            return None;
        }
        Some(Self {
            publisher: u128::from_le_bytes(bytes[8..24].try_into().ok()?),
            seq: u64::from_le_bytes(bytes[24..32].try_into().ok()?),
            time: u64::from_le_bytes(bytes[32..].try_into().ok()?),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zenoh_attachment_is_laid_out_as_documented() {
        let origin = Origin { publisher: 0x0102, seq: 3, time: 4 };
        let mut expected = [0; LEN];
        expected[..5].copy_from_slice(b"tshm\x01");
        (expected[8], expected[9], expected[24], expected[32]) = (2, 1, 3, 4);
        assert_eq!(origin.encode(), expected);
        assert_eq!(Origin::decode(&expected), Some(origin));
        // Of a later version, with more behind.
        expected[4] = 2;
        assert_eq!(Origin::decode(&[&expected[..], b"more"].concat()), Some(origin));
    }

    #[test]
    fn zenoh_attachment_of_others_is_none_of_ours() {
        let bytes = Origin::now(1, 2).encode();
        assert_eq!(Origin::decode(&bytes[..LEN - 1]), None);
        assert_eq!(Origin::decode(b""), None);
        assert_eq!(Origin::decode(&[0; LEN]), None);
    }
}
