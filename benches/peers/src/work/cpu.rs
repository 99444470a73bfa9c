//! Processor time that a topic takes while nothing is sent, and with 60 messages a second; settings are the defaults.
//!
//! Time of all threads of each process, from the scheduler's own count in `/proc`.

use std::fs;
use std::time::{Duration, Instant};

use crate::board::Board;
use crate::case::Case;
use crate::payload::{END, read};
use crate::peers::{OUT, Peer, Rx, Tx};
use crate::report::Measured;

const FRAME: Duration = Duration::from_nanos(1_000_000_000 / 60);
/// After connecting, and after a phase, until all is quiet.
const SETTLE: Duration = Duration::from_millis(300);

pub(super) async fn near<P: Peer>(case: &Case, board: &Board) -> Vec<Measured> {
    let mut out = P::Tx::open(case, OUT).await;
    board.ready.reaches(1).await;
    out.connected(1).await;
    out.send(case.size, 1).await;
    tokio::time::sleep(SETTLE).await;

    let (own, other) = (std::process::id(), board.far_pid.get() as u32);
    let span = Duration::from_millis(case.effort_ms);
    let mut measured = Vec::new();

    let idle = Usage::now(own, other);
    tokio::time::sleep(span).await;
    idle.until_now(["idle_near", "idle_far"], &mut measured);

    let frames = (span.as_nanos() / FRAME.as_nanos()) as u32;
    let busy = Usage::now(own, other);
    let start = tokio::time::Instant::now();
    for frame in 1..=frames {
        out.send(case.size, 1).await;
        tokio::time::sleep_until(start + FRAME * frame).await;
    }
    busy.until_now(["frames_near", "frames_far"], &mut measured);
    out.send(case.size, END).await;
    board.ended.reaches(1).await;
    measured
}

pub(super) async fn far<P: Peer>(case: &Case, board: &Board) -> Vec<Measured> {
    board.far_pid.set(u64::from(std::process::id()));
    let mut out = P::Rx::open(case, OUT).await;
    board.ready.add(1);
    while out.recv(read).await != END {}
    board.ended.add(1);
    Vec::new()
}

/// What both processes had used at an instant.
struct Usage {
    pids: [u32; 2],
    used: [u64; 2],
    at: Instant,
}

impl Usage {
    /// This process comes last here and first at the end: looking takes time, too.
    fn now(near: u32, far: u32) -> Self {
        let (other, own) = (nanoseconds(far), nanoseconds(near));
        Self { pids: [near, far], used: [own, other], at: Instant::now() }
    }

    /// In percent of a core.
    fn until_now(self, names: [&str; 2], measured: &mut Vec<Measured>) {
        let wall = self.at.elapsed().as_nanos() as f64;
        for ((pid, used), name) in self.pids.into_iter().zip(self.used).zip(names) {
            let used = nanoseconds(pid).saturating_sub(used);
            measured.push(Measured::new(name, used as f64 / wall * 100.0));
        }
    }
}

/// That all threads of a process have run.
fn nanoseconds(pid: u32) -> u64 {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).expect("own processes");
    let of = |task: fs::DirEntry| {
        let stat = fs::read_to_string(task.path().join("schedstat")).ok()?;
        stat.split_whitespace().next()?.parse::<u64>().ok()
    };
    tasks.flatten().filter_map(of).sum()
}
