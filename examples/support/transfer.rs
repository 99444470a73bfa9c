//! How `send_file` and `recv_file` talk: a header, then the content in pieces, then a SHA-256 of it all.
//!
//! The header is the publisher's first message. The pieces together are as long as the header says, and the message
//! after them is the SHA-256. Messages of one publisher come in order and each once, so that this is enough.
#![allow(dead_code, reason = "each side uses its own part")]

use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use sha2::{Digest, Sha256};

use crate::support::Result;

const MAGIC: &[u8; 8] = b"FILE v1\n";

/// The first message.
#[derive(Debug)]
pub(crate) struct Header {
    /// Bytes of the whole file.
    pub(crate) len: u64,
    pub(crate) name: String,
}

impl Header {
    pub(crate) fn to_message(&self) -> Vec<u8> {
        [MAGIC, &self.len.to_le_bytes()[..], self.name.as_bytes()].concat()
    }

    pub(crate) fn from_message(message: &[u8]) -> Result<Self> {
        let (len, name) = message
            .strip_prefix(MAGIC)
            .and_then(|rest| rest.split_first_chunk())
            .ok_or("that is no file: somebody else publishes to this topic")?;
        Ok(Self { len: u64::from_le_bytes(*len), name: String::from_utf8_lossy(name).into_owned() })
    }
}

/// As `sha256sum` prints it.
pub(crate) fn hex(sha256: &[u8]) -> String {
    sha256.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Fresh, to be fed with the pieces.
pub(crate) fn hasher() -> Sha256 {
    Sha256::new()
}

/// On standard error, if that is a terminal.
pub(crate) fn progress_bar(len: u64) -> Result<ProgressBar> {
    let style = ProgressStyle::with_template(
        "{bar:40} {bytes:>12} of {total_bytes}, {binary_bytes_per_sec}, {eta} left",
    )?;
    let bar = ProgressBar::new(len).with_style(style);
    bar.enable_steady_tick(Duration::from_millis(200));
    Ok(bar)
}
