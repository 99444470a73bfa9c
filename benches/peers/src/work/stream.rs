//! Messages one way, as fast as they go; the time is until the last was read.

use std::time::{Duration, Instant};

use crate::board::Board;
use crate::case::Case;
use crate::payload::{END, NO_ANSWER, read};
use crate::peers::{OUT, Peer, Rx, Tx};
use crate::report::Measured;
use crate::stats::median;

/// Messages that a sender hands over at once where it sends in batches.
const BATCH: u64 = 64;
/// Blocks of which the median is taken.
const BLOCKS: u32 = 5;

pub(super) async fn near<P: Peer>(case: &Case, board: &Board) -> Vec<Measured> {
    let mut out = P::Tx::open(case, OUT).await;
    board.ready.reaches(1).await;
    out.connected(1).await;

    let effort = Duration::from_millis(case.effort_ms) / BLOCKS;
    let mut sent = 0;
    let mut count = 64;
    // Ever larger blocks, until one lasts long enough; so it is warm as well.
    let mut took = block(&mut out, case, board, count, &mut sent).await;
    while took < effort {
        let grow = effort.as_secs_f64() / took.as_secs_f64();
        count = (count as f64 * grow.clamp(1.2, 8.0)) as u64 + BATCH;
        count -= count % BATCH;
        took = block(&mut out, case, board, count, &mut sent).await;
    }
    let mut rates = Vec::new();
    for _ in 0..BLOCKS {
        let took = block(&mut out, case, board, count, &mut sent).await;
        rates.push(count as f64 / took.as_secs_f64());
    }
    out.send(case.size, END).await;
    board.ended.reaches(1).await;
    vec![Measured::new("rate", median(&mut rates))]
}

/// Sends `count` messages and waits until they are read.
async fn block<T: Tx>(out: &mut T, case: &Case, board: &Board, count: u64, sent: &mut u64) -> Duration {
    *sent += count;
    board.sent.set(*sent);
    let start = Instant::now();
    if case.batched {
        for _ in 0..count / BATCH {
            out.send_batch(case.size, NO_ANSWER, BATCH).await;
        }
    } else {
        for _ in 0..count {
            out.send(case.size, NO_ANSWER).await;
        }
    }
    board.read.reaches_spinning(*sent).await;
    start.elapsed()
}

pub(super) async fn far<P: Peer>(case: &Case, board: &Board) -> Vec<Measured> {
    let mut out = P::Rx::open(case, OUT).await;
    board.ready.add(1);
    let mut count = 0;
    // How many there will be of the present block; looked up only when all of the last one are there.
    let mut target = 0;
    while out.recv(read).await != END {
        count += 1;
        if count > target {
            target = board.sent.get();
        }
        if count == target {
            board.read.set(count);
        }
    }
    board.ended.add(1);
    Vec::new()
}
