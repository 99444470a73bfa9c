//! One message at a time, there and back: half of the round trip is a hop.
//!
//! Blocks of round trips are timed for the median, single ones for the percentile: the clock is a good part of a short trip.

use std::time::{Duration, Instant};

use crate::board::{Board, now_ns};
use crate::case::Case;
use crate::payload::{END, read};
use crate::peers::{BACK, OUT, Peer, Rx, Tx};
use crate::report::Measured;
use crate::stats::{median, quantile};

/// Trips before anything is timed.
const WARM: u64 = 200;
/// How long a block takes, about: long beside the clock, short beside what disturbs.
const BLOCK: Duration = Duration::from_micros(50);

pub(super) async fn near<P: Peer>(case: &Case, board: &Board) -> Vec<Measured> {
    let mut out = P::Tx::open(case, OUT).await;
    let mut back = P::Rx::open(case, BACK).await;
    board.ready.reaches(case.fars as u64).await;
    out.connected(case.fars).await;

    let mut trips = Trips::<P> { out: &mut out, back: &mut back, size: case.size, number: 0 };
    let start = Instant::now();
    let warm = if case.size > 1 << 20 { WARM / 20 } else { WARM };
    trips.make(warm).await;
    let one = start.elapsed() / warm as u32;
    let block = (BLOCK.as_nanos() / one.as_nanos().max(1)).max(1) as u64;

    let effort = Duration::from_millis(case.effort_ms);
    let mut blocks = Vec::new();
    let start = Instant::now();
    while start.elapsed() < effort * 2 / 3 || blocks.len() < 10 {
        let from = now_ns();
        trips.make(block).await;
        blocks.push((now_ns() - from) as f64 / block as f64 / 2.0);
    }
    let mut single = Vec::new();
    let start = Instant::now();
    while start.elapsed() < effort / 3 || single.len() < 10 {
        let from = now_ns();
        trips.make(1).await;
        single.push((now_ns() - from) as f64 / 2.0);
    }
    out.send(case.size, END).await;
    board.ended.reaches(case.fars as u64).await;
    vec![Measured::new("ns", median(&mut blocks)), Measured::new("p99_ns", quantile(&mut single, 0.99))]
}

struct Trips<'a, P: Peer> {
    out: &'a mut P::Tx,
    back: &'a mut P::Rx,
    size: usize,
    number: u64,
}

impl<P: Peer> Trips<'_, P> {
    async fn make(&mut self, count: u64) {
        for _ in 0..count {
            self.number += 1;
            self.out.send(self.size, self.number).await;
            assert_eq!(self.back.recv(read).await, self.number);
        }
    }
}

pub(super) async fn far<P: Peer>(case: &Case, board: &Board) -> Vec<Measured> {
    let mut back = P::Tx::open(case, BACK).await;
    let mut out = P::Rx::open(case, OUT).await;
    back.connected(1).await;
    board.ready.add(1);
    loop {
        match out.recv(read).await {
            END => break,
            number => back.send(case.size, number).await,
        }
    }
    board.ended.add(1);
    Vec::new()
}
