//! One message at a time to several receivers; the time is until the last of them has read it.
//!
//! Receivers say so on the board, whatever the peer: no answers come back. The sender looks there without sleeping, on
//! a core of its own; the receivers share the other.

use std::time::{Duration, Instant};

use crate::board::{Board, now_ns};
use crate::case::Case;
use crate::payload::{END, read};
use crate::peers::{OUT, Peer, Rx, Tx};
use crate::report::Measured;
use crate::stats::{median, quantile};

pub(super) async fn near<P: Peer>(case: &Case, board: &Board) -> Vec<Measured> {
    let mut out = P::Tx::open(case, OUT).await;
    board.ready.reaches(case.fars as u64).await;
    out.connected(case.fars).await;

    let effort = Duration::from_millis(case.effort_ms);
    let mut times = Vec::new();
    let mut number = 0;
    let start = Instant::now();
    while start.elapsed() < effort || number < 40 {
        number += 1;
        let from = now_ns();
        out.send(case.size, number).await;
        board.read.reaches_spinning(number * case.fars as u64).await;
        // The first ones warm it up.
        if number > 20 {
            times.push((now_ns() - from) as f64);
        }
    }
    out.send(case.size, END).await;
    board.ended.reaches(case.fars as u64).await;
    vec![Measured::new("ns", median(&mut times)), Measured::new("p99_ns", quantile(&mut times, 0.99))]
}

pub(super) async fn far<P: Peer>(case: &Case, board: &Board) -> Vec<Measured> {
    let mut out = P::Rx::open(case, OUT).await;
    board.ready.add(1);
    while out.recv(read).await != END {
        board.read.add(1);
    }
    board.ended.add(1);
    Vec::new()
}
