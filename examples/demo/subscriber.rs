//! The subscriber's process: reads and checks what the other one sends, and reports a line for each topic.

use std::io::{Read as _, Write as _};
use std::path::Path;
use std::thread;
use std::time::Duration;

use hdrhistogram::Histogram;
use tokio::sync::oneshot;
use tokio_shm::{RecvError, ShmPublisher, ShmSample, ShmSubscriber};

use crate::report::Report;
use crate::support::Result;
use crate::{FRAMES, MESSAGES, PING, PONG, Topic, message};

/// Does the process's work. Our standard input is a pipe that says nothing: when it ends, our parent is gone.
pub(crate) async fn run(dir: &Path) -> Result {
    let (parent, parent_gone) = oneshot::channel::<()>();
    // A thread, because tokio's standard input would keep the runtime from ending.
    thread::spawn(move || {
        let _ = std::io::stdin().read(&mut [0]);
        drop(parent);
    });
    let done = tokio::select! {
        done = read_all(dir) => done,
        _ = parent_gone => Err("the publishing process is gone".into()),
    };
    if done.is_err() {
        tidy_up(dir);
    }
    done
}

async fn read_all(dir: &Path) -> Result {
    for topic in [FRAMES, MESSAGES] {
        tell(&receive(dir, topic).await?)?;
    }
    tell(&echo(dir).await?)
}

/// Our parent reads our standard output.
fn tell(report: &Report) -> Result {
    Ok(writeln!(std::io::stdout(), "{report}")?)
}

/// Reads a topic until its publisher closes it.
async fn receive(dir: &Path, topic: Topic) -> Result<Report> {
    let mut subscriber = ShmSubscriber::builder(topic.name)
        .runtime_dir(dir)
        .depth(topic.depth)
        .end_with_last_publisher(true)
        .connect()?;
    let mut books = Books::new()?;
    loop {
        match subscriber.recv().await {
            Ok(sample) => books.enter(&sample, message::now())?,
            Err(RecvError::Lagged { missed, .. }) => books.report.lagged += missed,
            Err(RecvError::Closed) => return Ok(books.close()),
            Err(error) => return Err(error.into()),
        }
    }
}

/// Answers every message of one topic with one on another.
async fn echo(dir: &Path) -> Result<Report> {
    let publisher = ShmPublisher::builder(PONG.name).runtime_dir(dir).bind()?;
    let mut subscriber = ShmSubscriber::builder(PING.name)
        .runtime_dir(dir)
        .depth(PING.depth)
        .end_with_last_publisher(true)
        .connect()?;
    let mut books = Books::new()?;
    loop {
        match subscriber.recv().await {
            Ok(ping) => {
                let now = message::now();
                let mut pong = publisher.loan(ping.len()).await?;
                pong.copy_from_slice(&ping);
                publisher.send(pong).await?;
                books.enter(&ping, now)?;
            }
            Err(RecvError::Lagged { missed, .. }) => books.report.lagged += missed,
            Err(RecvError::Closed) => break,
            Err(error) => return Err(error.into()),
        }
    }
    books.report.copied_bytes = publisher.stats().copied_bytes;
    publisher.close().await?;
    Ok(books.close())
}

/// What was received, and how long it took.
struct Books {
    report: Report,
    latencies: Histogram<u64>,
}

impl Books {
    fn new() -> Result<Self> {
        Ok(Self { report: Report::default(), latencies: Histogram::new(3)? })
    }

    fn enter(&mut self, sample: &ShmSample, received_at: u64) -> Result {
        match message::check(sample, sample.seq()) {
            Some(written_at) => self.latencies.record(received_at.saturating_sub(written_at))?,
            None => self.report.wrong += 1,
        }
        self.report.received += 1;
        Ok(())
    }

    fn close(self) -> Report {
        Report { latency: (&self.latencies).into(), ..self.report }
    }
}

/// Leaves nothing behind, even if our parent was killed and cannot do it: what dead publishers left goes away with the
/// next connection to their topics, and then the directory is empty.
fn tidy_up(dir: &Path) {
    // More than once, because the kernel closes what a killed process had open one after the other: the pipe to us may
    // be gone while its sockets still look alive.
    for _ in 0..100 {
        for topic in [FRAMES, MESSAGES, PING, PONG] {
            drop(ShmSubscriber::builder(topic.name).runtime_dir(dir).connect());
        }
        if std::fs::remove_dir(dir).is_ok() {
            return;
        }
        thread::sleep(Duration::from_millis(10));
    }
}
