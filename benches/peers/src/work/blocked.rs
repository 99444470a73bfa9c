//! From room being made to a blocked sender going on.
//!
//! The receiver lets the sender run into it, waits for a given time, writes down when it is, makes room for one
//! message; the sender writes down when its send returns.

use std::sync::atomic::Ordering;
use std::time::Duration;

use crate::board::{Board, STAMPS, now_ns};
use crate::case::Case;
use crate::payload::END;
use crate::peers::{OUT, Peer, Rx, Tx};
use crate::report::Measured;
use crate::stats::{median, quantile};

/// A sender that has not sent anything for so long is blocked.
const STUCK: Duration = Duration::from_millis(100);
/// The first ones are for warming up.
const SKIP: usize = 5;

pub(super) async fn near<P: Peer>(case: &Case, board: &Board) -> Vec<Measured> {
    let mut out = P::Tx::open(case, OUT).await;
    board.ready.reaches(1).await;
    out.connected(1).await;
    let count = repetitions(case);
    // More than can be sent before the receiver begins: how many that is, it tells afterwards.
    let mut returned = Vec::with_capacity(STAMPS);
    while board.phase.get() == 0 || returned.len() < board.phase.get() as usize - 1 + count {
        out.send(case.size, 1).await;
        returned.push(now_ns());
        board.sent.add(1);
    }
    out.send(case.size, END).await;
    board.ended.reaches(1).await;
    let ahead = board.phase.get() as usize - 1;
    let mut times = Vec::new();
    for nth in SKIP..count {
        let freed = board.stamps[nth].load(Ordering::Acquire);
        times.push(returned[ahead + nth].saturating_sub(freed) as f64);
    }
    vec![Measured::new("ns", median(&mut times)), Measured::new("p99_ns", quantile(&mut times, 0.99))]
}

pub(super) async fn far<P: Peer>(case: &Case, board: &Board) -> Vec<Measured> {
    let mut out = P::Rx::open(case, OUT).await;
    board.ready.add(1);
    // Until the sender is stuck.
    board.sent.reaches(1).await;
    loop {
        let sent = board.sent.get();
        tokio::time::sleep(STUCK).await;
        if board.sent.get() == sent {
            break board.phase.set(sent + 1);
        }
    }
    for nth in 0..repetitions(case) {
        std::thread::sleep(Duration::from_millis(case.rest_ms));
        out.free(|| board.stamps[nth].store(now_ns(), Ordering::Release)).await;
    }
    while out.recv(crate::payload::read).await != END {}
    board.ended.add(1);
    Vec::new()
}

fn repetitions(case: &Case) -> usize {
    ((case.effort_ms / case.rest_ms) as usize).clamp(SKIP + 15, STAMPS / 2)
}
