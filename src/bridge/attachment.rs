//! What a bridge says about each message, beside its payload: a zenoh attachment of 48 bytes, little-endian.
//!
//! ```text
//!  0  magic     b"tshm"
//!  4  version   u8, 1
//!  5  reserved  3 bytes, 0; not looked at
//!  8  publisher u128   the id of the local publisher
//! 24  seq       u64    the message's number there: 0 for the first, one more for each
//! 32  time      u64    when the bridge took it, in nanoseconds since 1970 (UTC)
//! 40  sum       u64    of these fields and the payload, see `sum`; 0 for none, as where it is absent
//! ```
//!
//! The sum is there because zenoh 1.10 may tear what it sends: where it gives up a connection in the middle of a write (the
//! lease is over) and the network takes bytes again at that instant, the batches behind follow in the midst of that one. The
//! receiver takes their bytes for the rest of its messages.
//!
//! A later version may be longer; these fields stay where they are.

use std::fmt;
use std::time::{SystemTime, UNIX_EPOCH};

use crate::text::Hex;

const MAGIC: [u8; 4] = *b"tshm";
const VERSION: u8 = 1;

/// The length of an attachment, in bytes.
pub(super) const LEN: usize = 48;

/// What every bridge's attachment has: all but the sum.
const FIELDS: usize = 40;

/// Where a message that came through a bridge is from; the attachment of its zenoh sample.
///
/// ```no_run
/// # fn f(sample: zenoh::sample::Sample) {
/// if let Some(origin) = sample.attachment().and_then(|bytes| tokio_shm::bridge::Origin::decode(&bytes.to_bytes())) {
///     println!("message {} of {:032x}", origin.seq, origin.publisher);
/// }
/// # }
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct Origin {
    /// The id of the local publisher.
    pub publisher: u128,
    /// The message's number at its publisher: 0 for the first, one more for each. A gap is what was lost on the way.
    pub seq: u64,
    /// When the bridge took it, in nanoseconds since 1970 (UTC), by its host's clock.
    pub time: u64,
}

impl fmt::Debug for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Origin")
            .field("publisher", &Hex(self.publisher))
            .field("seq", &self.seq)
            .field("time", &self.time)
            .finish()
    }
}

impl Origin {
    pub(super) fn now(publisher: u128, seq: u64) -> Self {
        let time = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self { publisher, seq, time: u64::try_from(time.as_nanos()).unwrap_or(u64::MAX) }
    }

    /// The attachment's bytes, for a message of this payload.
    pub fn encode(&self, payload: &[u8]) -> [u8; LEN] {
        let mut bytes = self.fields();
        bytes[FIELDS..].copy_from_slice(&sum(&self.fields()[..FIELDS], payload).to_le_bytes());
        bytes
    }

    /// Whether `payload` is what `attachment` was sent with, as far as that says.
    pub(super) fn is_whole(attachment: &[u8], payload: &[u8]) -> bool {
        match attachment.get(FIELDS..LEN).and_then(|sum| sum.try_into().ok()).map(u64::from_le_bytes) {
            None | Some(0) => true,
            Some(expected) => sum(&attachment[..FIELDS], payload) == expected,
        }
    }

    fn fields(&self) -> [u8; LEN] {
        let mut bytes = [0; LEN];
        bytes[..4].copy_from_slice(&MAGIC);
        bytes[4] = VERSION;
        bytes[8..24].copy_from_slice(&self.publisher.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.seq.to_le_bytes());
        bytes[32..FIELDS].copy_from_slice(&self.time.to_le_bytes());
        bytes
    }

    /// Reads an attachment; `None` if it is none of a bridge's.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let bytes: &[u8; FIELDS] = bytes.first_chunk()?;
        if bytes[..4] != MAGIC || bytes[4] < VERSION {
            return None;
        }
        Some(Self {
            publisher: u128::from_le_bytes(bytes[8..24].try_into().ok()?),
            seq: u64::from_le_bytes(bytes[24..32].try_into().ok()?),
            time: u64::from_le_bytes(bytes[32..FIELDS].try_into().ok()?),
        })
    }
}

/// A sum over the fields and then the payload; never 0. It finds bytes that are not where they were, not bytes that were made up.
///
/// Four lanes of 64 bits, so that it takes about as long as reading: each takes every fourth word, `lane = (lane ^ word) * K`,
/// turned left by 29; what is left at the end is filled up with zeros. Then the lanes and the length the same way into one.
fn sum(fields: &[u8], payload: &[u8]) -> u64 {
    const K: u64 = 0x9e37_79b9_7f4a_7c15;
    fn mix(lane: u64, word: u64) -> u64 {
        (lane ^ word).wrapping_mul(K).rotate_left(29)
    }
    fn feed(lanes: &mut [u64; 4], block: &[u8; 32]) {
        let (words, _) = block.as_chunks::<8>();
        for (lane, word) in lanes.iter_mut().zip(words) {
            *lane = mix(*lane, u64::from_le_bytes(*word));
        }
    }
    let mut lanes = [1, 2, 3, 4];
    for bytes in [fields, payload] {
        let (blocks, rest) = bytes.as_chunks::<32>();
        for block in blocks {
            feed(&mut lanes, block);
        }
        if !rest.is_empty() {
            let mut last = [0; 32];
            last[..rest.len()].copy_from_slice(rest);
            feed(&mut lanes, &last);
        }
    }
    lanes.into_iter().fold(payload.len() as u64, mix).max(1)
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
        let encoded = origin.encode(b"payload");
        assert_eq!(encoded[..FIELDS], expected[..FIELDS]);
        // As other programs compute it.
        assert_eq!(u64::from_le_bytes(*encoded[FIELDS..].first_chunk().unwrap()), 0xddb6_512f_eff0_47f5);
        assert_eq!(Origin::decode(&expected), Some(origin));
        // Of a later version, with more behind; and without a sum.
        expected[4] = 2;
        assert_eq!(Origin::decode(&[&expected[..], b"more"].concat()), Some(origin));
        assert_eq!(Origin::decode(&expected[..FIELDS]), Some(origin));
    }

    #[test]
    fn zenoh_attachment_tells_a_torn_message_from_a_whole_one() {
        let payload: Vec<u8> = (0..=200).collect();
        for len in [0, 1, 8, 31, 32, 33, 64, 200] {
            let whole = &payload[..len];
            let attachment = Origin::now(1, 2).encode(whole);
            assert!(Origin::is_whole(&attachment, whole));
            assert!(!Origin::is_whole(&attachment, &payload[..len ^ 1]));
            for at in 0..len {
                let mut torn = whole.to_vec();
                torn[at] ^= 1;
                assert!(!Origin::is_whole(&attachment, &torn), "{len}: {at}");
            }
            for at in 0..FIELDS {
                let mut torn = attachment;
                torn[at] ^= 1;
                assert!(!Origin::is_whole(&torn, whole), "{len}: {at}");
            }
            // What says nothing is taken as it is.
            assert!(Origin::is_whole(&attachment[..FIELDS], b"other"));
        }
    }

    #[test]
    fn zenoh_attachment_of_others_is_none_of_ours() {
        let bytes = Origin::now(1, 2).encode(b"");
        assert_eq!(Origin::decode(&bytes[..FIELDS - 1]), None);
        assert_eq!(Origin::decode(b""), None);
        assert_eq!(Origin::decode(&[0; LEN]), None);
    }
}
