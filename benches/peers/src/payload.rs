//! What a message carries. Every byte of it is written by the sender and read by the receiver.

use std::hint::black_box;

/// For messages that want no answer.
pub(crate) const NO_ANSWER: u64 = 0;
/// The last message of all.
pub(crate) const END: u64 = u64::MAX;

/// Writes a message in place.
pub(crate) fn write(bytes: &mut [u8], number: u64) {
    bytes.fill(number as u8);
    bytes[..8].copy_from_slice(&number.to_le_bytes());
}

/// Reads every byte of a message and checks the sum; its number.
pub(crate) fn read(bytes: &[u8]) -> u64 {
    let (words, rest) = bytes.as_chunks::<8>();
    debug_assert!(rest.is_empty());
    let sum = words.iter().fold(0_u64, |sum, word| sum.wrapping_add(u64::from_le_bytes(*word)));
    let number = u64::from_le_bytes(words[0]);
    let filled = u64::from_le_bytes([number as u8; 8]).wrapping_mul(words.len() as u64 - 1);
    assert_eq!(black_box(sum), number.wrapping_add(filled), "a message came whole");
    number
}
