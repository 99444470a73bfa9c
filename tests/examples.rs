//! The examples, run as a newcomer would run them: real processes, real files, real signals.
//!
//! `cargo test` builds the examples. Where they are missing (as with `--test examples` in a fresh tree) the tests say so
//! and do nothing.
#![allow(clippy::print_stderr, reason = "a skipped test says so")]

mod support;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use sha2::{Digest, Sha256};
use support::{Dir, until, within};
use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::process::{Child, ChildStdout, Command};

/// The path of an example's program, beside this test's own.
fn example(name: &str) -> Option<PathBuf> {
    let own = std::env::current_exe().expect("own path");
    let path = own.ancestors().nth(2).expect("deps is in a directory").join("examples").join(name);
    if path.exists() {
        return Some(path);
    }
    eprintln!("skipped: {} is missing, build it by `cargo build --examples`", path.display());
    None
}

/// A runtime directory of a test's own, and another directory for everything else.
struct Place {
    runtime: Dir,
    files: Dir,
}

impl Place {
    fn new() -> Self {
        Self { runtime: Dir::new(), files: Dir::new() }
    }

    /// Starts a program that is killed if the test fails.
    fn start(&self, program: &Path, arguments: &[&str]) -> Child {
        Command::new(program)
            .args(arguments)
            .current_dir(self.files.path())
            .env("TOKIO_SHM_DIR", self.runtime.path())
            .env("TMPDIR", self.files.path())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .expect("start an example")
    }

    fn write(&self, name: &str, content: &[u8]) {
        fs::write(self.files.path().join(name), content).expect("write a file");
    }

    fn read(&self, name: &str) -> Vec<u8> {
        fs::read(self.files.path().join(name)).expect("read a file")
    }

    /// The names of all files, hidden ones too.
    fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(self.files.path()).expect("directory");
        let mut names: Vec<_> =
            entries.map(|entry| entry.expect("entry").file_name().into_string().expect("UTF-8")).collect();
        names.sort();
        names
    }

    /// Waits until `receivers` of `recv_file` have written something that has no name yet.
    async fn half_way(&self, receivers: usize) {
        let begun = || {
            let names = self.names();
            let sizes = names.iter().filter(|name| name.starts_with(".recv_file-")).map(|name| {
                // It may just be getting its name, or be on its way out.
                fs::metadata(self.files.path().join(name)).map_or(0, |metadata| metadata.len())
            });
            sizes.filter(|&size| size > 0).count() == receivers
        };
        until("every receiver has a part of the file", begun).await;
    }
}

async fn finish(child: Child) -> Output {
    within("the end of an example", child.wait_with_output()).await.expect("wait for an example")
}

/// Waits for the end, asserts success, and returns what was printed.
async fn succeed(child: Child) -> String {
    let output = finish(child).await;
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).expect("UTF-8")
}

/// Waits for the end, asserts exit code 1 with nothing on standard output, and returns the error.
async fn fail(child: Child) -> String {
    let output = finish(child).await;
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(output.stdout.is_empty(), "{output:?}");
    let said = String::from_utf8(output.stderr).expect("UTF-8");
    said.lines().find_map(|line| line.strip_prefix("error: ")).expect("an error").to_owned()
}

fn signal(child: &Child, signal: Signal) {
    let pid = child.id().and_then(|pid| Pid::from_raw(pid.cast_signed())).expect("it is running");
    kill_process(pid, signal).expect("send a signal");
}

/// Several chunks, more than the pool holds, not a whole number of them, no two alike.
fn long_content() -> Vec<u8> {
    (0..(10 << 20) + 12_345_u32).map(|at| (at.wrapping_mul(0x9e37_79b9) >> 24) as u8).collect()
}

async fn transfer(content: &[u8], receivers: usize) {
    let (Some(send_file), Some(recv_file)) = (example("send_file"), example("recv_file")) else { return };
    let place = Place::new();
    place.write("in", content);
    let outs: Vec<String> = (0..receivers).map(|number| format!("out{number}")).collect();
    let receiving: Vec<Child> =
        outs.iter().map(|out| place.start(&recv_file, &["files", out.as_str()])).collect();
    let sending = place.start(&send_file, &["files", "in", "--receivers", &receivers.to_string()]);

    let sha256: String = Sha256::digest(content).iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(succeed(sending).await, format!("{sha256}  in\n"));
    for (child, out) in receiving.into_iter().zip(&outs) {
        assert_eq!(succeed(child).await, format!("{sha256}  {out}\n"));
        assert!(place.read(out) == content, "{out} is another file");
    }
    assert_eq!(place.names().len(), 1 + receivers);
    place.runtime.assert_empties();
}

#[tokio::test]
async fn demo_of_a_second_loses_nothing_and_leaves_nothing() {
    let Some(demo) = example("demo") else { return };
    let place = Place::new();
    let printed = succeed(place.start(&demo, &["--seconds", "1", "--json"])).await;
    let json: serde_json::Value = serde_json::from_str(&printed).expect("JSON and nothing else");
    let rows = json["measurements"].as_array().expect("an array");
    let sizes: Vec<_> = rows.iter().map(|row| row["message_bytes"].as_u64()).collect();
    assert_eq!(sizes, [Some(6_220_800), Some(64), Some(64)]);
    for row in rows {
        assert!(row["sent"].as_u64() > Some(0), "{row}");
        assert_eq!(row["received"], row["sent"]);
        assert!(row["latency_ns"]["p50"].as_u64() > Some(0), "{row}");
        for nothing in ["drops", "wrong", "copied_bytes"] {
            assert_eq!(row[nothing].as_u64(), Some(0), "{row}");
        }
    }
    assert_eq!(place.names(), [""; 0]);
    place.runtime.assert_empties();
}

/// Starts a demo that would run for long, and waits until it is at work.
async fn long_demo(demo: &Path, place: &Place) -> Child {
    let child = place.start(demo, &["--seconds", "600"]);
    let at_work = || place.names().iter().any(|name| place.files.path().join(name).join("frames").exists());
    until("the demo is at work", at_work).await;
    child
}

#[tokio::test]
async fn demo_terminated_or_interrupted_leaves_nothing() {
    let Some(demo) = example("demo") else { return };
    for by in [Signal::TERM, Signal::INT] {
        let place = Place::new();
        let child = long_demo(&demo, &place).await;
        signal(&child, by);
        assert_eq!(fail(child).await, "interrupted");
        assert_eq!(place.names(), [""; 0]);
    }
}

#[tokio::test]
async fn demo_killed_is_tidied_up_by_its_second_process() {
    let Some(demo) = example("demo") else { return };
    let place = Place::new();
    let child = long_demo(&demo, &place).await;
    signal(&child, Signal::KILL);
    assert!(!finish(child).await.status.success());
    until("the demo's directory is gone", || place.names().is_empty()).await;
}

#[tokio::test]
async fn empty_file_is_received() {
    transfer(b"", 1).await;
}

#[tokio::test]
async fn file_longer_than_the_pool_is_received() {
    transfer(&long_content(), 1).await;
}

#[tokio::test]
async fn file_is_received_by_three() {
    transfer(&long_content(), 3).await;
}

#[tokio::test]
async fn sender_killed_half_way_leaves_no_file_at_its_receivers() {
    let (Some(send_file), Some(recv_file)) = (example("send_file"), example("recv_file")) else { return };
    let place = Place::new();
    place.write("in", &long_content());
    let receiving: Vec<Child> =
        ["out0", "out1", "out2"].iter().map(|out| place.start(&recv_file, &["files", out])).collect();
    // It receives nothing, so that the sender comes no further than its first chunks.
    let mut stuck = place.runtime.subscriber("files").depth(2).connect().expect("subscribe");
    let sending = place.start(&send_file, &["files", "in", "--receivers", "4"]);
    within("the sender", stuck.wait_for_publishers(1)).await.expect("wait");

    place.half_way(3).await;
    signal(&sending, Signal::KILL);
    assert!(!finish(sending).await.status.success());
    for child in receiving {
        assert_eq!(fail(child).await, "the sender was killed before the end");
    }
    assert_eq!(place.names(), ["in"]);
    drop(stuck);
    // What it could not take away itself goes with the next one on its topic.
    drop(place.runtime.subscriber("files").connect().expect("subscribe"));
    place.runtime.assert_empties();
}

#[tokio::test]
async fn sender_interrupted_half_way_leaves_no_file_and_no_socket() {
    let (Some(send_file), Some(recv_file)) = (example("send_file"), example("recv_file")) else { return };
    let place = Place::new();
    place.write("in", &long_content());
    let receiving = place.start(&recv_file, &["files", "out"]);
    let mut stuck = place.runtime.subscriber("files").depth(2).connect().expect("subscribe");
    let sending = place.start(&send_file, &["files", "in", "--receivers", "2"]);
    within("the sender", stuck.wait_for_publishers(1)).await.expect("wait");

    place.half_way(1).await;
    signal(&sending, Signal::INT);
    assert_eq!(fail(sending).await, "interrupted; the receivers know");
    assert!(fail(receiving).await.ends_with("before the end"));
    assert_eq!(place.names(), ["in"]);
    drop(stuck);
    place.runtime.assert_empties();
}

#[tokio::test]
async fn receiver_interrupted_half_way_leaves_no_file_and_the_sender_goes_on() {
    let (Some(send_file), Some(recv_file)) = (example("send_file"), example("recv_file")) else { return };
    let place = Place::new();
    let content = long_content();
    place.write("in", &content);
    let staying = place.start(&recv_file, &["files", "out"]);
    let leaving = place.start(&recv_file, &["files", "none"]);
    let mut stuck = place.runtime.subscriber("files").depth(2).connect().expect("subscribe");
    let sending = place.start(&send_file, &["files", "in", "--receivers", "3"]);
    within("the sender", stuck.wait_for_publishers(1)).await.expect("wait");

    place.half_way(2).await;
    signal(&leaving, Signal::INT);
    assert_eq!(fail(leaving).await, "interrupted");
    drop(stuck);
    succeed(staying).await;
    assert_eq!(fail(sending).await, "2 of 3 receivers left before the end");
    assert!(place.read("out") == content);
    assert_eq!(place.names(), ["in", "out"]);
    place.runtime.assert_empties();
}

#[tokio::test]
async fn file_that_is_none_is_refused_in_one_line() {
    let Some(send_file) = example("send_file") else { return };
    let place = Place::new();
    for (arguments, error) in [
        (&["files", "none"][..], "none: No such file or directory (os error 2)"),
        (&["files", "."], ".: is not a regular file"),
        (&["files"], "usage: send_file TOPIC FILE [--receivers N]"),
        (&["files", "x", "--fast"], "invalid option '--fast'"),
    ] {
        assert_eq!(fail(place.start(&send_file, arguments)).await, error);
    }
    place.runtime.assert_empties();
}

#[tokio::test]
async fn sync_sends_every_message() {
    let Some(sync) = example("sync") else { return };
    let place = Place::new();
    assert!(succeed(place.start(&sync, &[])).await.starts_with("100000 messages from thread to thread"));
    place.runtime.assert_empties();
}

#[tokio::test]
async fn timeout_keeps_exact_books() {
    let Some(timeout) = example("timeout") else { return };
    let place = Place::new();
    let printed = succeed(place.start(&timeout, &[])).await;
    assert!(printed.ends_with("the same, in the same order\n"), "{printed}");
    place.runtime.assert_empties();
}

async fn next_line(lines: &mut Lines<BufReader<ChildStdout>>) -> String {
    within("a line", lines.next_line()).await.expect("read").expect("it has not ended")
}

#[tokio::test]
async fn subscriber_goes_on_with_the_next_publisher_after_one_was_killed() {
    let (Some(publisher), Some(subscriber)) = (example("publisher"), example("subscriber")) else { return };
    let place = Place::new();
    let mut listening = place.start(&subscriber, &["news"]);
    let mut lines = BufReader::new(listening.stdout.take().expect("piped")).lines();
    assert_eq!(next_line(&mut lines).await, "listening to \"news\"; Ctrl-C ends it");

    let first = place.start(&publisher, &["news"]);
    let name = format!("from process {}", first.id().expect("it is running"));
    // What it said before it was found is told as missed.
    while !next_line(&mut lines).await.ends_with(&name) {}
    signal(&first, Signal::KILL);
    finish(first).await;
    // It may have said more before it was killed.
    while next_line(&mut lines).await != "… a publisher was killed; waiting for another" {}

    let second = place.start(&publisher, &["news"]);
    let name = format!("from process {}", second.id().expect("it is running"));
    // What it said before it was found is told as missed.
    while !next_line(&mut lines).await.ends_with(&name) {}
    signal(&second, Signal::INT);
    succeed(second).await;
    signal(&listening, Signal::INT);
    succeed(listening).await;
    place.runtime.assert_empties();
}
