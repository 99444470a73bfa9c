//! A process to be killed, as its parent sees it: this test binary run again, waiting for its orders.

use std::ffi::OsStr;
use std::io::{Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Signal, geteuid};

use super::{Fallible, LIMIT, Step, policy_name};
use crate::OnFull;
use crate::sys::clock::monotonic_ns;

pub(super) struct Victim {
    child: Child,
    stdin: ChildStdin,
    stdout: ChildStdout,
    heard: Vec<u8>,
    /// When it came to the point where it killed itself, by its own word.
    pub(super) died_at: Option<u64>,
    /// It runs in a pid namespace of its own, where its peers have no numbers and it has none for them.
    is_apart: bool,
    /// It runs as another user, who is let in.
    pub(super) is_another_user: bool,
}

/// Of so many victims one is in a pid namespace of its own.
const APART: u32 = 4;
/// Of so many victims one is another user.
const OTHERS: u32 = 3;

/// The other user, and the group that is let in: numbers of no other process.
pub(super) const USER: u32 = 64_001;
pub(super) const GROUP: u32 = 64_242;

/// What starts a program as that user.
const SETPRIV: [&str; 4] = ["setpriv", "--reuid=64001", "--regid=64242", "--clear-groups"];

/// What starts a program in a pid namespace of its own, and ends it when it is killed itself. The shell is there because the first
/// process of such a namespace cannot kill itself.
const UNSHARE: [&str; 7] = ["unshare", "--pid", "--fork", "--kill-child", "sh", "-c", "\"$0\" \"$@\"; exit"];

/// Whether that is allowed here.
fn may_be_apart() -> bool {
    static ALLOWED: LazyLock<bool> = LazyLock::new(|| succeeds(&[&UNSHARE[..], &["true"]].concat()));
    *ALLOWED
}

/// Whether this test can be run as the other user.
pub(super) fn may_be_another_user() -> bool {
    static ALLOWED: LazyLock<bool> = LazyLock::new(|| {
        let exe = std::env::current_exe().expect("own path");
        let is_runnable = ["test", "-x", exe.to_str().expect("a path in UTF-8")];
        geteuid().is_root() && succeeds(&[&SETPRIV[..], &is_runnable].concat())
    });
    *ALLOWED
}

fn succeeds(command: &[&str]) -> bool {
    let mut child = Command::new(command[0]);
    child.args(&command[1..]).stderr(Stdio::null()).status().is_ok_and(|status| status.success())
}

/// How many victims this process has started in pid namespaces and as another user, in words.
pub(super) fn others() -> String {
    let started = STARTED.load(Ordering::Relaxed);
    let apart = match may_be_apart() {
        true => format!("{} victims in pid namespaces of their own", started / APART),
        false => "SKIPPED: victims in pid namespaces of their own, because `unshare` is not allowed here"
            .to_owned(),
    };
    match may_be_another_user() {
        true => format!("{apart}; {} as another user", started / OTHERS),
        false => format!("{apart}; SKIPPED: victims of another user, because `setpriv` is not allowed here"),
    }
}

static STARTED: AtomicU32 = AtomicU32::new(0);

/// What [`Victim::next_line`] found.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Heard {
    Line(String),
    Nothing,
    /// It is gone, and has said everything.
    End,
}

impl Victim {
    /// Starts one; it does nothing before it has its orders. So it can be started while the last one is being killed.
    pub(super) fn start() -> Self {
        let exe = std::env::current_exe().expect("own path");
        let number = STARTED.fetch_add(1, Ordering::Relaxed) + 1;
        let is_apart = may_be_apart() && number.is_multiple_of(APART);
        let is_another_user = may_be_another_user() && number.is_multiple_of(OTHERS);
        let unshare = UNSHARE.iter().filter(|_| is_apart);
        let setpriv = SETPRIV.iter().filter(|_| is_another_user);
        let mut words = unshare.chain(setpriv).map(OsStr::new).chain([exe.as_os_str()]);
        let mut child = Command::new(words.next().expect("at least the binary"))
            .args(words)
            .args([
                "--exact",
                "kill::tests::roles::child_role",
                "--ignored",
                "--nocapture",
                "--test-threads=1",
            ])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("start a child");
        let stdin = child.stdin.take().expect("piped");
        let stdout = child.stdout.take().expect("piped");
        Self { child, stdin, stdout, heard: Vec::new(), died_at: None, is_apart, is_another_user }
    }

    pub(super) fn order(
        &mut self,
        role: &str,
        script: &str,
        on_full: OnFull,
        die_at: Option<(Step, u32)>,
        dir: &Path,
    ) -> Fallible<()> {
        let (point, passage) = die_at.unwrap_or(("", 0));
        let words =
            [role, script, policy_name(on_full), point, &passage.to_string(), &dir.display().to_string()];
        self.tell(&words.join("\t"))
    }

    pub(super) fn tell(&mut self, line: &str) -> Fallible<()> {
        writeln!(self.stdin, "{line}").map_err(|error| format!("telling a child: {error}"))
    }

    /// The next thing it says, or that it is gone.
    pub(super) fn next_line(&mut self, patience: Duration) -> Fallible<Heard> {
        let deadline = Instant::now() + patience;
        loop {
            if let Some(end) = self.heard.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.heard.drain(..=end).collect();
                // The test harness writes which test it runs, without ending the line, and then how it went.
                let line = String::from_utf8_lossy(&line);
                let Some((_, said)) = line.split_once("> ") else { continue };
                if let Some(at) = said.strip_prefix("dying ") {
                    self.died_at = Some(at.trim_end().parse().map_err(|error| format!("{said}: {error}"))?);
                    continue;
                }
                return Ok(Heard::Line(said.trim_end().to_owned()));
            }
            let left = Timespec::try_from(deadline.saturating_duration_since(Instant::now()));
            let mut ready = [PollFd::new(&self.stdout, PollFlags::IN)];
            match poll(&mut ready, Some(&left.expect("short"))) {
                Ok(0) => return Ok(Heard::Nothing),
                Ok(_) => {}
                Err(rustix::io::Errno::INTR) => continue,
                Err(error) => return Err(format!("listening to a child: {error}")),
            }
            let mut bytes = [0; 4096];
            match self.stdout.read(&mut bytes).map_err(|error| format!("listening to a child: {error}"))? {
                0 => return Ok(Heard::End),
                read => self.heard.extend_from_slice(&bytes[..read]),
            }
        }
    }

    /// Waits until it says `word`, and returns what follows.
    pub(super) fn hear(&mut self, word: &str) -> Fallible<String> {
        let deadline = Instant::now() + LIMIT;
        loop {
            match self.next_line(deadline.saturating_duration_since(Instant::now()))? {
                Heard::Line(line) => {
                    if let Some(rest) = line.strip_prefix(word) {
                        return Ok(rest.trim().to_owned());
                    }
                }
                Heard::Nothing => return Err(format!("a child did not say {word:?} in {LIMIT:?}")),
                Heard::End => return Err(format!("a child ended before it said {word:?}")),
            }
        }
    }

    /// Kills it, and says when.
    pub(super) fn kill(&mut self) -> u64 {
        let now = monotonic_ns();
        self.child.kill().expect("a child can be killed");
        now
    }

    /// Waits for its end, which must be by SIGKILL, and passes on what it said until then.
    pub(super) fn see_die(&mut self, mut each: impl FnMut(&str)) -> Fallible<()> {
        let deadline = Instant::now() + LIMIT;
        loop {
            match self.next_line(deadline.saturating_duration_since(Instant::now()))? {
                Heard::Line(line) => each(&line),
                Heard::Nothing => return Err(format!("a child did not come to its end in {LIMIT:?}")),
                Heard::End => break,
            }
        }
        let status = self.child.wait().map_err(|error| format!("waiting for a child: {error}"))?;
        // The shell tells of its child's end by its own.
        let killed_apart = self.is_apart && status.code() == Some(128 + Signal::KILL.as_raw());
        match killed_apart || status.signal() == Some(Signal::KILL.as_raw()) {
            true => Ok(()),
            false => Err(format!("a child ended by itself: {status}")),
        }
    }
}

impl Drop for Victim {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
