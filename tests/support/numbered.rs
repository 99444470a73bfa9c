//! Messages that say which one they are in every byte: the number, and then its last byte again and again.

pub(crate) fn write(bytes: &mut [u8], seq: u64) {
    bytes[..8].copy_from_slice(&seq.to_le_bytes());
    bytes[8..].fill(seq as u8);
}

pub(crate) fn seq_of(bytes: &[u8]) -> u64 {
    u64::from_le_bytes(bytes[..8].try_into().expect("8 bytes"))
}

#[track_caller]
pub(crate) fn assert_intact(bytes: &[u8], seq: u64) {
    assert_eq!(bytes[..8], seq.to_le_bytes());
    let expected = [seq as u8; 4096];
    assert!(bytes[8..].chunks(4096).all(|bytes| bytes == &expected[..bytes.len()]), "message {seq}");
}
