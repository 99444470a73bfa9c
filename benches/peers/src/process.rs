//! Processes of the suite: this binary run again, pinned, with an end that cannot be missed.

use std::env;
use std::io::Read;
use std::os::fd::AsRawFd;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Signal, set_parent_process_death_signal};
use rustix::thread::{CpuSet, sched_setaffinity};

use crate::case::Case;
use crate::peers::eventfds;
use crate::report::Measured;

/// No case takes this long; one that does has failed.
const LIMIT: Duration = Duration::from_secs(40);

const CASE: &str = "TOKIO_SHM_PEERS_CASE";
const SIDE: &str = "TOKIO_SHM_PEERS_SIDE";

/// Which process of a case this is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    /// The one that sends, measures and prints.
    Near,
    /// One of those that receive.
    Far,
}

/// The case and side that this process was started for, if it is not the suite itself.
pub(crate) fn child() -> Option<(Case, Side)> {
    let case = env::var(CASE).ok()?;
    let case = serde_json::from_str(&case).expect("the suite's own text");
    let side = if env::var(SIDE).is_ok_and(|side| side == "near") { Side::Near } else { Side::Far };
    Some((case, side))
}

/// Runs a case in processes of its own; what they measured, or why they did not.
pub(crate) fn run(case: &Case) -> Result<Vec<Measured>, String> {
    let bells = eventfds(case);
    let case = &Case { bells: bells.iter().map(AsRawFd::as_raw_fd).collect(), ..case.clone() };
    let far = |nth| Running::start(&Case { nth, ..case.clone() }, Side::Far);
    let mut processes: Vec<_> = (0..case.fars).map(far).collect();
    processes.push(Running::start(case, Side::Near));
    wait(&mut processes)?;
    let mut near = processes.pop().expect("the last one started");
    let mut printed = String::new();
    let mut stdout = near.0.stdout.take().expect("piped");
    stdout.read_to_string(&mut printed).map_err(|error| error.to_string())?;
    printed.lines().map(Measured::parse).collect::<Option<_>>().ok_or("printed something else".into())
}

/// Waits until all have ended well, or one has not.
fn wait(processes: &mut [Running]) -> Result<(), String> {
    let deadline = Instant::now() + LIMIT;
    while Instant::now() < deadline {
        let mut running = false;
        for process in &mut *processes {
            match process.0.try_wait().map_err(|error| error.to_string())? {
                None => running = true,
                Some(status) if status.success() => {}
                Some(status) => return Err(status.to_string()),
            }
        }
        if !running {
            return Ok(());
        }
        thread::sleep(Duration::from_millis(2));
    }
    Err("not done in time".into())
}

/// A process of the suite, killed when dropped.
struct Running(Child);

impl Running {
    fn start(case: &Case, side: Side) -> Self {
        let mut command = Command::new(env::current_exe().expect("own path"));
        command.env(CASE, serde_json::to_string(case).expect("plain data"));
        command.env(SIDE, if side == Side::Near { "near" } else { "far" });
        command.env("RUST_BACKTRACE", "0").env("IOX2_LOG_LEVEL", "error");
        // Some peers put sockets and locks there.
        command.env("TMPDIR", &case.dir);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::inherit());
        Self(command.spawn().expect("start a process of the suite"))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Pins this process before it starts a thread, and has it die with the suite.
pub(crate) fn settle(core: usize) {
    let _ = set_parent_process_death_signal(Some(Signal::KILL));
    pin(core);
}

/// Pins this thread and those it starts. A core that is not there or not allowed: it runs where it did.
pub(crate) fn pin(core: usize) {
    let mut one = CpuSet::new();
    one.set(core);
    let _ = sched_setaffinity(None, &one);
}
