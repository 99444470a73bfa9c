//! What messages contain: every byte follows from the publisher, the message's number and its length, so that a slot that
//! was written again too early, or read at the wrong place, shows.

/// Small and fast; the same for the same seed.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(mix(seed) | 1)
    }

    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 16) % end
    }

    /// A length from 0 to 1 MiB: mostly small, all sizes now and then.
    pub(crate) fn len(&mut self) -> usize {
        let most = match self.below(64) {
            0 => 1 << 20,
            1..8 => 128 << 10,
            8..24 => 4 << 10,
            _ => 256,
        };
        self.below(most + 1) as usize
    }
}

fn mix(value: u64) -> u64 {
    let value = (value ^ (value >> 31)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (value ^ (value >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9)
}

fn words(publisher: u128, seq: u64, len: usize) -> impl Iterator<Item = [u8; 8]> {
    let first = mix(mix(publisher as u64 ^ (publisher >> 64) as u64 ^ seq.rotate_left(32)) ^ len as u64);
    (0..).map(move |at: u64| first.wrapping_add(at.wrapping_mul(0x0101_0101_0101_0101)).to_le_bytes())
}

pub(crate) fn write(bytes: &mut [u8], publisher: u128, seq: u64) {
    let words = words(publisher, seq, bytes.len());
    for (place, word) in bytes.chunks_mut(8).zip(words) {
        place.copy_from_slice(&word[..place.len()]);
    }
}

pub(crate) fn is_intact(bytes: &[u8], publisher: u128, seq: u64) -> bool {
    bytes.chunks(8).zip(words(publisher, seq, bytes.len())).all(|(place, word)| *place == word[..place.len()])
}
