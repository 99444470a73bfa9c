//! Sends a file to one or more receivers, and does not let go before all of it is theirs.
//!
//! Dear newcomer, open two terminals. In the first, type
//!
//! ```text
//! cargo run --release --example recv_file -- files /tmp/copy
//! ```
//!
//! and in the second, with a file of your own,
//!
//! ```text
//! cargo run --release --example send_file -- files ~/Downloads/something.iso
//! ```
//!
//! (`files` is the topic; any name will do. The order does not matter.) Both print the same SHA-256, and `sha256sum`
//! agrees. For more receivers, start `recv_file` in more terminals and say how many to wait for:
//!
//! ```text
//! cargo run --release --example send_file -- files something.iso --receivers 3
//! ```
//!
//! The file is read straight into the memory that all receivers read, nine mebibytes of it however long the file is. A
//! receiver that writes to a slow disk makes us wait; one that is killed does not. Kill *this* program half-way, and the
//! receivers know that they do not have the whole file.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "the examples are programs for a terminal")]

mod support;
#[path = "support/transfer.rs"]
mod transfer;

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use lexopt::ValueExt as _;
use sha2::Digest as _;
use support::{Interrupt, Result};
use tokio::task::spawn_blocking;
use tokio_shm::{OnFull, ShmPoolConfig, ShmPublisher};
use transfer::Header;

const CHUNK: usize = 1 << 20;
/// Eight chunks, and a little for the header and the trailer.
const POOL: u64 = 9 << 20;

struct Arguments {
    topic: String,
    file: PathBuf,
    receivers: usize,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    support::exit(run().await)
}

async fn run() -> Result {
    let arguments = arguments()?;
    let mut interrupt = Interrupt::new()?;
    tokio::select! {
        sent = send(&arguments) => sent,
        () = interrupt.wait() => Err("interrupted; the receivers know".into()),
    }
}

fn arguments() -> Result<Arguments> {
    let mut free = Vec::new();
    let mut receivers = 1;
    let mut parser = lexopt::Parser::from_env();
    while let Some(argument) = parser.next()? {
        match argument {
            lexopt::Arg::Long("receivers") => receivers = parser.value()?.parse()?,
            lexopt::Arg::Value(value) => free.push(value),
            argument => return Err(argument.unexpected().into()),
        }
    }
    let [topic, file] =
        <[_; 2]>::try_from(free).map_err(|_| "usage: send_file TOPIC FILE [--receivers N]")?;
    Ok(Arguments { topic: topic.string()?, file: file.into(), receivers })
}

async fn send(arguments: &Arguments) -> Result {
    let Arguments { topic, file: path, receivers } = arguments;
    let (mut file, header) = open(path).map_err(|error| format!("{}: {error}", path.display()))?;

    // `Wait` is the default; it is spelled out because everything here depends on it.
    let publisher = ShmPublisher::builder(topic)
        .pool(ShmPoolConfig::new().max_bytes(POOL))
        .on_full(OnFull::Wait)
        .bind()?;
    eprintln!("waiting for {receivers} receiver(s) on {topic:?}");
    publisher.wait_for_subscribers(*receivers).await;

    publisher.send(header.to_message()).await?;
    let bar = transfer::progress_bar(header.len)?;
    let mut hasher = transfer::hasher();
    let mut left = header.len;
    while left > 0 {
        let len = left.min(CHUNK as u64);
        // Waits while all of the pool is on its way or being read.
        let mut chunk = publisher.loan(len as usize).await?;
        // Reading and hashing take their time: not on the thread that delivers.
        (file, hasher, chunk) = spawn_blocking(move || -> std::io::Result<_> {
            file.read_exact(&mut chunk)?;
            hasher.update(&*chunk);
            Ok((file, hasher, chunk))
        })
        .await?
        .map_err(|error| format!("{}: {error}; did it change meanwhile?", path.display()))?;
        publisher.send(chunk).await?;
        left -= len;
        bar.inc(len);
    }

    // Nobody has seen the trailer yet, so that whoever is missing now has not got the file.
    let missing = receivers.saturating_sub(publisher.subscriber_count());
    let sha256 = hasher.finalize();
    publisher.send(sha256.to_vec()).await?;
    // From here on everything is on the way to the receivers and stays readable for them, whether we live or not.
    publisher.flush().await?;
    publisher.close().await?;
    bar.finish();

    if missing > 0 {
        return Err(format!("{missing} of {receivers} receivers left before the end").into());
    }
    writeln!(std::io::stdout(), "{}  {}", transfer::hex(&sha256), path.display())?;
    Ok(())
}

fn open(path: &Path) -> Result<(File, Header)> {
    let file = File::open(path)?;
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        return Err("is not a regular file".into());
    }
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    Ok((file, Header { len: metadata.len(), name }))
}
