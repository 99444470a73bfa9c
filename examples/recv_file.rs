//! Receives the file that `send_file` sends: whole, or not at all.
//!
//! Dear newcomer, open two terminals. In the first, type
//!
//! ```text
//! cargo run --release --example recv_file -- files /tmp/copy
//! ```
//!
//! and in the second
//!
//! ```text
//! cargo run --release --example send_file -- files ~/Downloads/something.iso
//! ```
//!
//! There is more to try in the first lines of `send_file.rs`. Here, look at what happens when things go wrong: the content
//! goes to a temporary file beside `/tmp/copy`, which gets its name only once the SHA-256 has been found right. If the
//! sender is killed, if a message is missed, if you press Ctrl-C, then there is no `/tmp/copy`, and the exit code is 1.
#![allow(clippy::print_stderr, reason = "the examples are programs for a terminal")]

mod support;
#[path = "support/transfer.rs"]
mod transfer;

use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use lexopt::ValueExt as _;
use sha2::Digest as _;
use support::{Interrupt, Result};
use tempfile::NamedTempFile;
use tokio::task::spawn_blocking;
use tokio_shm::{RecvError, ShmSample, ShmSubscriber};
use transfer::Header;

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    support::exit(run().await)
}

async fn run() -> Result {
    let (topic, out) = arguments()?;
    let mut interrupt = Interrupt::new()?;
    tokio::select! {
        received = receive(&topic, &out) => received,
        () = interrupt.wait() => Err("interrupted".into()),
    }
}

fn arguments() -> Result<(String, PathBuf)> {
    let mut free = Vec::new();
    let mut parser = lexopt::Parser::from_env();
    while let Some(argument) = parser.next()? {
        match argument {
            lexopt::Arg::Value(value) => free.push(value),
            argument => return Err(argument.unexpected().into()),
        }
    }
    let [topic, out] = <[_; 2]>::try_from(free).map_err(|_| "usage: recv_file TOPIC OUT")?;
    Ok((topic.string()?, out.into()))
}

async fn receive(topic: &str, out: &Path) -> Result {
    let failed = |error| format!("{}: {error}", out.display());
    // Made first: if it cannot be, the sender need not begin.
    let mut file = temporary_file_beside(out).map_err(failed)?;
    let mut sender = Sender::wait_for(topic).await?;

    let header = Header::from_message(&sender.next().await?)?;
    // The name is the sender's idea; where the file goes is ours.
    eprintln!("receiving {:?}, {} bytes", header.name, header.len);
    let bar = transfer::progress_bar(header.len)?;
    let mut hasher = transfer::hasher();
    let mut left = header.len;
    while left > 0 {
        let chunk = sender.next().await?;
        let len = chunk.len() as u64;
        left = left.checked_sub(len).ok_or("the file is longer than its header said")?;
        // Hashing and writing take their time: not on the runtime's thread. The sample goes there as it is, and is
        // given back to the sender at the end of it.
        (file, hasher) = spawn_blocking(move || -> std::io::Result<_> {
            hasher.update(&*chunk);
            file.write_all(&chunk)?;
            Ok((file, hasher))
        })
        .await?
        .map_err(failed)?;
        bar.inc(len);
    }

    let sha256 = hasher.finalize();
    if *sender.next().await? != *sha256 {
        return Err("the SHA-256 is not the sender's: what came is not what was sent".into());
    }
    file.persist(out).map_err(|error| failed(error.error))?;
    bar.finish();
    writeln!(std::io::stdout(), "{}  {}", transfer::hex(&sha256), out.display())?;
    Ok(())
}

/// Removes itself when it is dropped, unless it was given its name by then.
fn temporary_file_beside(out: &Path) -> std::io::Result<NamedTempFile> {
    let directory = out.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    // Readable for whom the umask allows, as any new file.
    let permissions = std::fs::Permissions::from_mode(0o666);
    tempfile::Builder::new().prefix(".recv_file-").permissions(permissions).tempfile_in(directory)
}

/// The publisher that we have the file from, with everything that may happen but its next message made an error.
struct Sender {
    subscriber: ShmSubscriber,
    first: Option<ShmSample>,
    id: u128,
}

impl Sender {
    async fn wait_for(topic: &str) -> Result<Self> {
        let mut subscriber = ShmSubscriber::builder(topic).end_with_last_publisher(true).connect()?;
        eprintln!("waiting for a sender on {topic:?}");
        let first = subscriber.recv().await?;
        if first.seq() != 0 {
            return Err("the sender had begun before we came: start the receivers first".into());
        }
        Ok(Self { subscriber, id: first.publisher(), first: Some(first) })
    }

    async fn next(&mut self) -> Result<ShmSample> {
        if let Some(first) = self.first.take() {
            return Ok(first);
        }
        match self.subscriber.recv().await {
            Ok(sample) if sample.publisher() == self.id => Ok(sample),
            Ok(_) => Err("a second sender is on this topic".into()),
            Err(RecvError::PublisherLost { .. }) => Err("the sender was killed before the end".into()),
            Err(RecvError::Closed) => Err("the sender gave up before the end".into()),
            Err(error) => Err(error.into()),
        }
    }
}
