//! Two processes, camera frames, small messages, figures.
//!
//! Dear newcomer, this is the whole thing in one command. It needs one terminal, and no set-up:
//!
//! ```text
//! cargo run --release --example demo
//! ```
//!
//! It starts itself once more as a second process, and that one subscribes to what this one publishes: first frames of
//! a 1080p camera (1920 × 1080 × 3 bytes, written where they are read: look for `loan` in this file), then messages of
//! 64 bytes as fast as they go, then messages that go to and fro one at a time. The subscriber checks every byte. At the
//! end you see how much went through, and how long it took; the column of copied bytes is meant to be boring.
//!
//! ```text
//! cargo run --release --example demo -- --seconds 20     # longer, for steadier figures
//! cargo run --release --example demo -- --json           # the same for a program to read
//! ```
//!
//! If one message was lost or one byte was wrong it says so, and the exit code is 1. It works in a directory of its own,
//! which it removes, so that you can run it beside anything else. Without `--release` everything works too, slowly.
#![allow(clippy::print_stdout, reason = "the examples are programs for a terminal")]

mod message;
mod report;
mod subscriber;
#[path = "../support/mod.rs"]
mod support;

use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{ExitCode, Stdio};
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use lexopt::ValueExt as _;
use report::{Report, Row};
use support::{Interrupt, Result};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, BufReader, Lines};
use tokio::process::{Child, ChildStdout, Command};
use tokio_shm::{ShmPublisher, ShmSubscriber};

const FRAME: usize = 1920 * 1080 * 3;
const SMALL: usize = 64;

/// A topic, and how many messages of it may be on their way to the subscriber or in its hands.
#[derive(Clone, Copy)]
struct Topic {
    name: &'static str,
    depth: u32,
}

/// One frame is read while the next one waits.
const FRAMES: Topic = Topic { name: "frames", depth: 2 };
const MESSAGES: Topic = Topic { name: "messages", depth: 1_024 };
const PING: Topic = Topic { name: "ping", depth: 64 };
const PONG: Topic = Topic { name: "pong", depth: 64 };

struct Arguments {
    json: bool,
    time: Duration,
    /// We are the second process, and work in this directory.
    subscriber: Option<PathBuf>,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    support::exit(run().await)
}

async fn run() -> Result {
    let Some(arguments) = arguments()? else { return Ok(()) };
    if let Some(dir) = arguments.subscriber {
        return subscriber::run(&dir).await;
    }
    let mut interrupt = Interrupt::new()?;

    // The directory in which publishers and subscribers find each other must be ours alone.
    let private = std::fs::Permissions::from_mode(0o700);
    let dir = tempfile::Builder::new().prefix("tokio-shm-demo-").permissions(private).tempdir()?;
    let mut child = start_subscriber(dir.path())?;
    // Held until we have done with it; waiting for its end would close it.
    let stdin = child.stdin.take();
    let mut stderr = child.stderr.take().expect("it is a pipe");
    let reports = BufReader::new(child.stdout.take().expect("it is a pipe")).lines();
    let measured = {
        let mut measuring = Box::pin(measure(dir.path(), arguments.time, reports));
        tokio::select! {
            measured = &mut measuring => measured,
            status = child.wait() => match status {
                // It has said everything; we have yet to hear it.
                Ok(status) if status.success() => measuring.await,
                Ok(status) => {
                    let mut said = String::new();
                    stderr.read_to_string(&mut said).await?;
                    Err(format!("the subscriber's process ended early ({status}): {}", said.trim()).into())
                }
                Err(error) => Err(error.into()),
            },
            () = interrupt.wait() => Err("interrupted".into()),
        }
    };
    drop(stdin);
    stop(child).await?;
    // Where we were interrupted, the second process may have been quicker.
    if let Err(error) = dir.close()
        && error.kind() != std::io::ErrorKind::NotFound
    {
        return Err(error.into());
    }

    let rows = measured?;
    let text = if arguments.json { report::json(&rows) } else { report::table(&rows) };
    std::io::stdout().write_all(text.as_bytes())?;
    report::verify(&rows)
}

fn arguments() -> Result<Option<Arguments>> {
    let mut arguments = Arguments { json: false, time: Duration::from_secs(4), subscriber: None };
    let mut parser = lexopt::Parser::from_env();
    while let Some(argument) = parser.next()? {
        match argument {
            lexopt::Arg::Long("json") => arguments.json = true,
            lexopt::Arg::Long("seconds") => {
                let seconds: f64 = parser.value()?.parse()?;
                arguments.time = Duration::try_from_secs_f64(seconds)?;
            }
            lexopt::Arg::Long("subscriber") => arguments.subscriber = Some(parser.value()?.into()),
            lexopt::Arg::Short('h') | lexopt::Arg::Long("help") => {
                println!("usage: demo [--json] [--seconds N]");
                return Ok(None);
            }
            argument => return Err(argument.unexpected().into()),
        }
    }
    Ok(Some(arguments))
}

fn start_subscriber(dir: &Path) -> Result<Child> {
    let child = Command::new(std::env::current_exe()?)
        .arg("--subscriber")
        .arg(dir)
        // It ends with us, however we end: see `subscriber::run`.
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        // Ctrl-C in the terminal is for us alone.
        .process_group(0)
        .kill_on_drop(true)
        .spawn()?;
    Ok(child)
}

/// Lets the second process end by itself, if it does so soon.
async fn stop(mut child: Child) -> Result {
    if tokio::time::timeout(Duration::from_secs(2), child.wait()).await.is_err() {
        child.kill().await?;
    }
    Ok(())
}

async fn measure(dir: &Path, time: Duration, mut reports: Lines<BufReader<ChildStdout>>) -> Result<Vec<Row>> {
    Ok(vec![
        stream(dir, "1080p frames", FRAMES, FRAME, time / 2, &mut reports).await?,
        stream(dir, "one way", MESSAGES, SMALL, time / 4, &mut reports).await?,
        round_trips(dir, "round trip", time / 4, &mut reports).await?,
    ])
}

/// Sends messages of `size` bytes as fast as the subscriber reads them.
async fn stream(
    dir: &Path,
    name: &'static str,
    topic: Topic,
    size: usize,
    time: Duration,
    reports: &mut Lines<BufReader<ChildStdout>>,
) -> Result<Row> {
    let publisher = ShmPublisher::builder(topic.name).runtime_dir(dir).queue(1).bind()?;
    // As many as can be on their way, one that waits for them, one in the queue and one being written: made now, so that
    // the first messages are no slower than the others.
    publisher.pool().prewarm(size, topic.depth as usize + 3)?;
    publisher.wait_for_subscribers(1).await;

    let started = Instant::now();
    let end = message::now() + u64::try_from(time.as_nanos())?;
    let mut count = 0;
    loop {
        let mut message = publisher.loan(size).await?;
        let now = message::write(&mut message, count);
        publisher.send(message).await?;
        count += 1;
        if now >= end {
            break;
        }
        // A task that hardly ever waits must let others run now and then: here, the one that watches for Ctrl-C.
        tokio::task::coop::consume_budget().await;
    }
    publisher.flush().await?;
    let stats = publisher.stats();
    publisher.close().await?;
    let report = next(reports).await?;
    let seconds = started.elapsed().as_secs_f64();
    Ok(Row { name, size, count, dropped: stats.dropped, copied_bytes: stats.copied_bytes, seconds, report })
}

/// Sends a message and waits for the answer, over and over.
async fn round_trips(
    dir: &Path,
    name: &'static str,
    time: Duration,
    reports: &mut Lines<BufReader<ChildStdout>>,
) -> Result<Row> {
    let publisher = ShmPublisher::builder(PING.name).runtime_dir(dir).bind()?;
    let mut subscriber = ShmSubscriber::builder(PONG.name).runtime_dir(dir).depth(PONG.depth).connect()?;
    publisher.wait_for_subscribers(1).await;
    subscriber.wait_for_publishers(1).await?;

    let mut latencies = Histogram::<u64>::new(3)?;
    let mut wrong = 0;
    let started = Instant::now();
    let end = message::now() + u64::try_from(time.as_nanos())?;
    let mut count = 0;
    loop {
        let mut ping = publisher.loan(SMALL).await?;
        message::write(&mut ping, count);
        publisher.send(ping).await?;
        let pong = subscriber.recv().await?;
        let now = message::now();
        match message::check(&pong, count) {
            Some(written_at) => latencies.record(now.saturating_sub(written_at))?,
            None => wrong += 1,
        }
        count += 1;
        if now >= end {
            break;
        }
    }
    let seconds = started.elapsed().as_secs_f64();
    let stats = publisher.stats();
    publisher.close().await?;
    let mut report = next(reports).await?;
    report.wrong += wrong;
    report.latency = (&latencies).into();
    let size = SMALL;
    Ok(Row { name, size, count, dropped: stats.dropped, copied_bytes: stats.copied_bytes, seconds, report })
}

async fn next(reports: &mut Lines<BufReader<ChildStdout>>) -> Result<Report> {
    let line = reports.next_line().await?.ok_or("the subscriber's process ended early")?;
    Ok(line.parse()?)
}
