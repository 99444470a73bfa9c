//! What is done, the same for every peer.

mod blocked;
mod cpu;
mod fan_out;
mod first;
mod hop;
mod memory;
mod micro;
mod publisher_side;
mod stream;

use tokio::runtime::{Builder, Runtime};

use crate::board::Board;
use crate::case::{Case, Work};
use crate::peers::Peer;
use crate::process::{Side, settle};
use crate::report::Measured;

/// Does one side of a case in this process.
pub(crate) fn run<P: Peer>(case: &Case, side: Side) {
    settle(if side == Side::Near { 0 } else { case.far_core });
    if case.work == Work::Micro {
        return micro::near(case).iter().for_each(Measured::print);
    }
    let board = Board::open(&case.dir);
    let runtime = runtime(P::MULTI_THREAD);
    let measured = runtime.block_on(async {
        match (case.work, side) {
            (Work::Hop, Side::Near) => hop::near::<P>(case, board).await,
            (Work::Hop, Side::Far) => hop::far::<P>(case, board).await,
            (Work::Stream, Side::Near) => stream::near::<P>(case, board).await,
            (Work::Stream, Side::Far) => stream::far::<P>(case, board).await,
            (Work::FanOut, Side::Near) => fan_out::near::<P>(case, board).await,
            (Work::FanOut, Side::Far) => fan_out::far::<P>(case, board).await,
            (Work::Blocked, Side::Near) => blocked::near::<P>(case, board).await,
            (Work::Blocked, Side::Far) => blocked::far::<P>(case, board).await,
            (Work::Cpu, Side::Near) => cpu::near::<P>(case, board).await,
            (Work::Cpu, Side::Far) => cpu::far::<P>(case, board).await,
            (Work::First, Side::Near) => first::near::<P>(case, board).await,
            (Work::First, Side::Far) => first::far::<P>(case, board).await,
            (Work::Memory, Side::Near) => memory::near::<P>(case, board).await,
            (Work::Memory, Side::Far) => memory::far::<P>(case, board).await,
            (Work::PublisherSide, Side::Near) => publisher_side::near(case, board).await,
            (Work::PublisherSide, Side::Far) => publisher_side::far(case, board).await,
            (Work::Micro, _) => unreachable!("it has no other side"),
        }
    });
    measured.iter().for_each(Measured::print);
    runtime.shutdown_timeout(std::time::Duration::from_secs(1));
}

fn runtime(multi_thread: bool) -> Runtime {
    let mut builder = if multi_thread { Builder::new_multi_thread() } else { Builder::new_current_thread() };
    builder.worker_threads(1).enable_all().build().expect("runtime")
}
