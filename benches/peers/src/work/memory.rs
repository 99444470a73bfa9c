//! Memory of both processes with a topic that is full: what the topic added to what they had before.
//!
//! `PSS` counts a page that both have mapped half for each; the sum is what the machine has spent.

use std::fs;

use crate::board::Board;
use crate::case::Case;
use crate::payload::{END, read};
use crate::peers::{OUT, Peer, Rx, Tx};
use crate::report::Measured;

pub(super) async fn near<P: Peer>(case: &Case, board: &Board) -> Vec<Measured> {
    board.phase.reaches(1).await;
    let (own, other) = (std::process::id(), board.far_pid.get() as u32);
    let before = [usage(own), usage(other)];
    let mut out = P::Tx::open(case, OUT).await;
    board.ready.reaches(1).await;
    out.connected(1).await;
    // Several times as many as fit: by then every piece of memory has been in use.
    for round in 1..=4 {
        for _ in 0..case.depth {
            out.send(case.size, 1).await;
        }
        board.sent.set(round);
        board.read.reaches(round * case.depth as u64).await;
    }
    let after = [usage(own), usage(other)];
    out.send(case.size, END).await;
    board.ended.reaches(1).await;

    let names = [["pss_near", "pss_far"], ["rss_near", "rss_far"]];
    let mut measured = Vec::new();
    for (kind, names) in names.iter().enumerate() {
        for (side, name) in names.iter().enumerate() {
            measured.push(Measured::new(name, after[side][kind].saturating_sub(before[side][kind]) as f64));
        }
    }
    let sum = measured[0].value + measured[1].value;
    measured.push(Measured::new("pss", sum));
    measured
}

pub(super) async fn far<P: Peer>(case: &Case, board: &Board) -> Vec<Measured> {
    board.far_pid.set(u64::from(std::process::id()));
    board.phase.set(1);
    // The other side looks at what this process is before the topic.
    tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    let mut out = P::Rx::open(case, OUT).await;
    board.ready.add(1);
    for round in 1..=4 {
        board.sent.reaches(round).await;
        for _ in 0..case.depth {
            out.recv(read).await;
            board.read.add(1);
        }
    }
    while out.recv(read).await != END {}
    board.ended.add(1);
    Vec::new()
}

/// PSS and RSS in bytes.
fn usage(pid: u32) -> [u64; 2] {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).expect("own processes");
    ["Pss:", "Rss:"].map(|name| {
        let line = text.lines().find_map(|line| line.strip_prefix(name)).expect("the kernel tells it");
        line.split_whitespace().next().and_then(|kib| kib.parse::<u64>().ok()).expect("a number") * 1024
    })
}
