//! For tests that need a process of their own: to count descriptors, to lower limits, to change the umask.

use std::os::fd::AsFd;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Resource, Rlimit, setrlimit};

/// Runs one ignored test of this binary in a child process, alone, passes its failure on, and returns what it printed.
pub(crate) fn run_alone(test: &str) -> String {
    let output = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", test, "--ignored", "--test-threads=1", "--nocapture"])
        .env(ALONE, "1")
        .stdin(std::process::Stdio::null())
        .output()
        .unwrap();
    let text =
        format!("{}\n{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{test} failed: {text}");
    assert!(text.contains("1 passed"), "{test} was not found: {text}");
    text
}

/// Whether this process was made by [`run_alone`]. A child half does nothing elsewhere, where it would harm its neighbours.
pub(crate) fn is_alone() -> bool {
    std::env::var_os(ALONE).is_some()
}

const ALONE: &str = "TOKIO_SHM_TEST_RUNS_ALONE";

/// Ends the whole test run: for a thread whose mere panic would leave others waiting for it for ever.
#[allow(clippy::print_stderr)]
pub(crate) fn abort(why: &str) -> ! {
    eprintln!("{why}");
    std::process::abort()
}

/// Whether `poll(2)` finds the descriptor readable now.
pub(crate) fn is_readable(fd: impl AsFd) -> bool {
    let mut fds = [PollFd::new(&fd, PollFlags::IN)];
    poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).unwrap() == 1
}

/// How many descriptors this process has open, not counting the one that this takes.
pub(crate) fn open_descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count() - 1
}

/// Sets a soft limit.
pub(crate) fn set_limit(resource: Resource, current: u64) {
    let maximum = rustix::process::getrlimit(resource).maximum;
    setrlimit(resource, Rlimit { current: Some(current), maximum }).unwrap();
}

/// Gives up what root may do beyond limits and modes. Of the calling thread only, which a test's is.
pub(crate) fn drop_capabilities() {
    use rustix::thread::{CapabilitySet, CapabilitySets, set_capabilities};
    let none = CapabilitySet::empty();
    set_capabilities(None, CapabilitySets { effective: none, permitted: none, inheritable: none }).unwrap();
}
