//! What the integration tests share: a runtime directory each, deadlines, and child processes that are this same test
//! binary run again.
#![allow(dead_code)] // Each test binary uses its own part.
#![allow(clippy::print_stdout)] // It is how a child speaks to its parent.

pub(crate) mod limits;
pub(crate) mod numbered;
#[cfg(feature = "zenoh")]
pub(crate) mod sessions;
pub(crate) mod signals;

use std::future::Future;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::RecvTimeoutError;
use std::time::{Duration, Instant};

use tempfile::TempDir;
use tokio_shm::{
    RecvError, ShmPublisher, ShmPublisherBuilder, ShmSample, ShmSubscriber, ShmSubscriberBuilder,
    TryRecvError,
};

/// No wait in any test is longer.
pub(crate) const LIMIT: Duration = Duration::from_secs(180);

/// A runtime directory of a test's own, which must be empty again at its end.
pub(crate) struct Dir(TempDir);

impl Dir {
    pub(crate) fn new() -> Self {
        let dir = tempfile::tempdir().expect("temporary directory");
        std::fs::set_permissions(&dir, std::fs::Permissions::from_mode(0o700)).expect("mode");
        Self(dir)
    }

    pub(crate) fn path(&self) -> &Path {
        self.0.path()
    }

    pub(crate) fn publisher(&self, topic: &str) -> ShmPublisherBuilder {
        ShmPublisher::builder(topic).runtime_dir(self.path())
    }

    pub(crate) fn subscriber(&self, topic: &str) -> ShmSubscriberBuilder {
        ShmSubscriber::builder(topic).runtime_dir(self.path())
    }

    /// Waits until nothing is left in it: the last publisher takes its socket away in the background.
    pub(crate) fn assert_empties(&self) {
        let empty = || std::fs::read_dir(self.path()).expect("runtime directory").next().is_none();
        wait_until("the runtime directory is empty", empty);
    }
}

/// Runs `future`, for no longer than the limit.
pub(crate) async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    match tokio::time::timeout(LIMIT, future).await {
        Ok(value) => value,
        Err(_) => panic!("{what}: not within {LIMIT:?}"),
    }
}

/// Looks until `condition` holds; for what happens in the background and has no event of its own.
pub(crate) fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + LIMIT;
    while !condition() {
        assert!(Instant::now() < deadline, "{what}: not within {LIMIT:?}");
        std::thread::yield_now();
    }
}

/// The next thing that comes, by `try_recv`: without a runtime.
pub(crate) fn take_next(subscriber: &mut ShmSubscriber) -> Result<ShmSample, RecvError> {
    let mut next = None;
    wait_until("something comes", || {
        next = match subscriber.try_recv() {
            Err(TryRecvError::Empty) => None,
            Err(TryRecvError::Recv(error)) => Some(Err(error)),
            Err(other) => panic!("{other}"),
            Ok(sample) => Some(Ok(sample)),
        };
        next.is_some()
    });
    next.unwrap()
}

/// The same, letting other tasks of this runtime run.
pub(crate) async fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + LIMIT;
    while !condition() {
        assert!(Instant::now() < deadline, "{what}: not within {LIMIT:?}");
        tokio::task::yield_now().await;
    }
}

/// Runs `body` on a thread of its own, and returns what waits for its end, for no longer than the limit.
///
/// Nothing of it is a timer of `body`'s runtime: that would poll it once more, and hide a wake-up that was lost.
pub(crate) fn spawn_bounded<T: Send + 'static>(
    what: &'static str,
    body: impl FnOnce() -> T + Send + 'static,
) -> impl FnOnce() -> T {
    let (done, outcome) = std::sync::mpsc::channel();
    std::thread::spawn(move || done.send(body()));
    move || match outcome.recv_timeout(LIMIT) {
        Ok(value) => value,
        Err(error) => panic!("{what}: {error}"),
    }
}

/// Steps of a long test, counted: what is bounded is the time without any, so that a slow machine is not taken for a hang.
#[derive(Clone, Default)]
pub(crate) struct Progress(Arc<AtomicU64>);

impl Progress {
    pub(crate) fn step(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    fn steps(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// As [`spawn_bounded`], where `body` counts its steps, and each limit must see another one. The steps must come to an end by themselves.
pub(crate) fn spawn_while_it_moves<T: Send + 'static>(
    what: &'static str,
    body: impl FnOnce(Progress) -> T + Send + 'static,
) -> impl FnOnce() -> T {
    let progress = Progress::default();
    let (done, outcome) = std::sync::mpsc::channel();
    let counted = progress.clone();
    std::thread::spawn(move || done.send(body(counted)));
    move || {
        let mut before = 0;
        loop {
            match outcome.recv_timeout(LIMIT) {
                Ok(value) => return value,
                Err(RecvTimeoutError::Timeout) if progress.steps() > before => before = progress.steps(),
                Err(error) => panic!("{what}: {error}, after {} steps", progress.steps()),
            }
            println!("{what}: {before} steps so far");
        }
    }
}

/// How often a long test does what it does: `count`, or the part of it that `TOKIO_SHM_TEST_PART` says (10: a tenth). Tools under which
/// everything takes twenty times as long set it, see `.ci`.
pub(crate) fn rounds(count: u32) -> u32 {
    let part = std::env::var("TOKIO_SHM_TEST_PART").map_or(1, |part| part.parse().expect("a number"));
    (count / part).max(1)
}

/// Whether `command` may be run here, and does not fail; says so if not.
pub(crate) fn is_allowed(command: &[&str]) -> bool {
    let mut child = Command::new(command[0]);
    child.args(&command[1..]).arg("true").stdin(Stdio::null()).stderr(Stdio::null()).stdout(Stdio::null());
    let allowed = child.status().is_ok_and(|status| status.success());
    if !allowed {
        skipped(&format!("`{}` is not permitted here", command.join(" ")));
    }
    allowed
}

/// Says that something was not tested, and why.
pub(crate) fn skipped(why: &str) {
    println!("SKIPPED: {why}");
}

/// Random enough to vary what happens; the same in each run.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 16) % end
    }
}

const ROLE: &str = "TOKIO_SHM_TEST_ROLE";
const DIRECTORY: &str = "TOKIO_SHM_TEST_DIR";

/// Another process, running the test `role` of this binary, which begins by asking [`Role::of`].
pub(crate) struct Peer {
    child: Child,
    stdin: Option<ChildStdin>,
    stdout: BufReader<ChildStdout>,
}

impl Peer {
    /// Starts it. `role` is the full name of a test in this binary.
    pub(crate) fn start(role: &str, dir: &Dir) -> Self {
        Self::start_under(&[], role, dir)
    }

    /// The same as an argument of `command`, say a tracer.
    pub(crate) fn start_under(command: &[&str], role: &str, dir: &Dir) -> Self {
        let exe = std::env::current_exe().expect("own path");
        let mut words = command.iter().map(std::ffi::OsStr::new).chain([exe.as_os_str()]);
        let mut child = Command::new(words.next().expect("at least the binary"))
            .args(words)
            .args(["--exact", role, "--nocapture", "--test-threads=1"])
            .env(ROLE, role)
            .env(DIRECTORY, dir.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("start a child");
        let stdin = child.stdin.take();
        let stdout = BufReader::new(child.stdout.take().expect("piped"));
        Self { child, stdin, stdout }
    }

    /// Starts it as a user of whom nobody else runs here, this test run a second time included: what the kernel counts for each user is
    /// its own. The directory is given to that user. `None`, with a word, where that is not allowed.
    pub(crate) fn start_as_another_user(role: &str, dir: &Dir) -> Option<Self> {
        let user = 1_000_000 + std::process::id();
        let number = user.to_string();
        let command = ["setpriv", "--reuid", &number, "--regid", &number, "--clear-groups"];
        let exe = std::env::current_exe().expect("own path");
        let is_runnable = ["test", "-x", exe.to_str().expect("a path in UTF-8"), "-a"];
        if !is_allowed(&[&command[..], &is_runnable].concat()) {
            return None;
        }
        std::os::unix::fs::chown(dir.path(), Some(user), None).expect("only root may do the other");
        Some(Self::start_under(&command, role, dir))
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits for a line that begins with `> `, and returns the rest of it.
    pub(crate) fn hear(&mut self) -> String {
        loop {
            let mut line = String::new();
            let read = self.stdout.read_line(&mut line).expect("read from the child");
            assert!(read > 0, "the child ended without a word");
            // The test harness writes what test it runs without ending the line.
            if let Some((_, said)) = line.split_once("> ") {
                return said.trim_end().to_owned();
            }
        }
    }

    pub(crate) fn tell(&mut self, line: &str) {
        writeln!(self.stdin.as_mut().expect("open"), "{line}").expect("write to the child");
    }

    /// Tells it something, and waits for what it says to that.
    pub(crate) fn ask(&mut self, line: &str) -> String {
        self.tell(line);
        self.hear()
    }

    /// Says no more: its [`Role::hear`] returns `None`.
    pub(crate) fn close_stdin(&mut self) {
        drop(self.stdin.take());
    }

    /// Kills it with SIGKILL and waits for its end.
    pub(crate) fn kill(&mut self) {
        self.child.kill().expect("kill");
        self.child.wait().expect("wait");
    }

    /// Waits until it has ended by itself, without a failure.
    pub(crate) fn finish(mut self) {
        drop(self.stdin.take());
        let deadline = Instant::now() + LIMIT;
        loop {
            if let Some(status) = self.child.try_wait().expect("wait") {
                assert!(status.success(), "the child failed: {status}");
                return;
            }
            assert!(Instant::now() < deadline, "the child did not end within {LIMIT:?}");
            std::thread::yield_now();
        }
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What a test that serves as a child process needs.
pub(crate) struct Role {
    pub(crate) dir: std::path::PathBuf,
}

impl Role {
    /// `None` in the ordinary test run, where a role has nothing to do.
    pub(crate) fn of(role: &str) -> Option<Self> {
        (std::env::var(ROLE).ok()? == role)
            .then(|| Self { dir: std::env::var_os(DIRECTORY).expect("set").into() })
    }

    pub(crate) fn say(&self, line: &str) {
        println!("> {line}");
    }

    /// Waits for the parent's next line; `None` when it is gone or has no more to say.
    pub(crate) fn hear(&self) -> Option<String> {
        let mut line = String::new();
        let read = std::io::stdin().read_line(&mut line).expect("read from the parent");
        (read > 0).then(|| line.trim_end().to_owned())
    }

    pub(crate) fn publisher(&self, topic: &str) -> ShmPublisherBuilder {
        ShmPublisher::builder(topic).runtime_dir(&self.dir)
    }

    pub(crate) fn subscriber(&self, topic: &str) -> ShmSubscriberBuilder {
        ShmSubscriber::builder(topic).runtime_dir(&self.dir)
    }
}
