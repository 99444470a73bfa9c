//! Processor time that a topic takes while nothing is sent, and with 60 messages a second; settings are the defaults.
//!
//! Time of all threads of each process: this one's by its clock, the other one's from the scheduler's count in `/proc`,
//! which is exact while it sleeps.

use std::fs;
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};

use crate::board::Board;
use crate::case::Case;
use crate::payload::{END, read};
use crate::peers::{OUT, Peer, Rx, Tx};
use crate::report::Measured;

const FRAME: Duration = Duration::from_nanos(1_000_000_000 / 60);
/// After connecting, and after a phase, until all is quiet.
const SETTLE: Duration = Duration::from_millis(300);

pub(super) async fn near<P: Peer>(case: &Case, board: &Board) -> Vec<Measured> {
    let sleeping = Usage::of_a_sleep().await;
    let mut out = P::Tx::open(case, OUT).await;
    board.ready.reaches(1).await;
    out.connected(1).await;
    out.send(case.size, 1).await;
    tokio::time::sleep(SETTLE).await;

    let far = board.far_pid.get() as u32;
    let span = Duration::from_millis(case.effort_ms);
    let mut measured = Vec::new();

    let mut idle = Usage::now(far);
    // That it sleeps here is no part of the topic.
    idle.used[0] += sleeping;
    tokio::time::sleep(span).await;
    idle.until_now(["idle_near", "idle_far"], &mut measured);

    let frames = (span.as_nanos() / FRAME.as_nanos()) as u32;
    let busy = Usage::now(far);
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
    far: u32,
    used: [u64; 2],
    at: Instant,
}

impl Usage {
    /// This process comes last here and first at the end: looking takes time, too.
    fn now(far: u32) -> Self {
        let other = of_threads(far);
        Self { far, used: [own(), other], at: Instant::now() }
    }

    /// What one sleep takes of a process that has no topic yet.
    async fn of_a_sleep() -> u64 {
        tokio::time::sleep(SETTLE).await;
        let before = own();
        tokio::time::sleep(SETTLE).await;
        own() - before
    }

    /// In percent of a core.
    fn until_now(self, names: [&str; 2], measured: &mut Vec<Measured>) {
        let wall = self.at.elapsed().as_nanos() as f64;
        let now = [own(), of_threads(self.far)];
        for ((now, before), name) in now.into_iter().zip(self.used).zip(names) {
            measured.push(Measured::new(name, now.saturating_sub(before) as f64 / wall * 100.0));
        }
    }
}

/// Nanoseconds that this process has run.
fn own() -> u64 {
    let used = clock_gettime(ClockId::ProcessCPUTime);
    used.tv_sec as u64 * 1_000_000_000 + used.tv_nsec as u64
}

/// Nanoseconds that all threads of a process have run.
fn of_threads(pid: u32) -> u64 {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).expect("own processes");
    let of = |task: fs::DirEntry| {
        let stat = fs::read_to_string(task.path().join("schedstat")).ok()?;
        stat.split_whitespace().next()?.parse::<u64>().ok()
    };
    tasks.flatten().filter_map(of).sum()
}
