//! The publisher's side alone: loan, write and send, with no subscriber, and with one in another process that never sleeps. It has read
//! what was sent before more is, or, where it is to be outrun, drops what it cannot keep up with.

use std::time::{Duration, Instant};

use tokio_shm::{BusyPoll, OnFull, ShmPublisher, ShmSubscriber};

use crate::board::Board;
use crate::case::Case;
use crate::payload;
use crate::peers::{OUT, runtime_dir};
use crate::report::Measured;
use crate::stats::median;

/// Messages of which the time is taken: half of what the subscriber has room for.
const BURST: u64 = 32;
/// The same where nobody keeps up with them.
const RUSH: u64 = 4096;

pub(super) async fn near(case: &Case, board: &Board) -> Vec<Measured> {
    let keeps_up = case.fars > 0 && !case.outrun;
    let (on_full, block) = if keeps_up { (OnFull::Wait, BURST) } else { (OnFull::DropOldest, RUSH) };
    let builder = ShmPublisher::builder(OUT).runtime_dir(runtime_dir(case)).on_full(on_full);
    let publisher = builder.bind().expect("bind");
    publisher.wait_for_subscribers(case.fars).await;
    let mut times = Vec::new();
    let start = Instant::now();
    while start.elapsed() < Duration::from_millis(case.effort_ms) || times.len() < 5 {
        let from = Instant::now();
        for number in 1..=block {
            let mut loan = publisher.loan(case.size).await.expect("loan");
            payload::write(&mut loan, number);
            publisher.send(loan).await.expect("send");
        }
        times.push(from.elapsed().as_nanos() as f64 / block as f64);
        if keeps_up {
            board.read.reaches_spinning(times.len() as u64 * block).await;
        }
    }
    board.phase.set(1);
    board.ended.reaches(case.fars as u64).await;
    vec![Measured::new("ns", median(&mut times))]
}

pub(super) async fn far(case: &Case, board: &Board) -> Vec<Measured> {
    let builder = ShmSubscriber::builder(OUT).runtime_dir(runtime_dir(case)).busy_poll(BusyPoll::Always);
    let mut subscriber = builder.connect().expect("connect");
    while board.phase.get() == 0 {
        // It may lag, where it is outrun.
        let received = tokio::time::timeout(Duration::from_millis(20), subscriber.recv()).await;
        if let Ok(Ok(sample)) = received {
            payload::read(&sample);
            board.read.add(1);
        }
    }
    board.ended.add(1);
    Vec::new()
}
