//! From nothing to the first message: bind, connect, send, receive, in processes that have not done so before.

use crate::board::{Board, now_ns};
use crate::case::Case;
use crate::payload::{END, read};
use crate::peers::{OUT, Peer, Rx, Tx};
use crate::report::Measured;

pub(super) async fn near<P: Peer>(case: &Case, board: &Board) -> Vec<Measured> {
    // Both at the starting line.
    board.phase.add(1);
    board.phase.reaches_spinning(2).await;
    let from = now_ns();
    let mut out = P::Tx::open(case, OUT).await;
    out.connected(1).await;
    // The receiver says when it may be sent to, for those whose sender does not know it.
    board.ready.reaches_spinning(1).await;
    out.send(case.size, 1).await;
    board.read.reaches_spinning(1).await;
    let took = board.read.get() - from;
    out.send(case.size, END).await;
    board.ended.reaches(1).await;
    vec![Measured::new("ns", took as f64)]
}

pub(super) async fn far<P: Peer>(case: &Case, board: &Board) -> Vec<Measured> {
    board.phase.add(1);
    board.phase.reaches_spinning(2).await;
    let mut out = P::Rx::open(case, OUT).await;
    board.ready.add(1);
    out.recv(read).await;
    board.read.set(now_ns());
    while out.recv(read).await != END {}
    board.ended.add(1);
    Vec::new()
}
