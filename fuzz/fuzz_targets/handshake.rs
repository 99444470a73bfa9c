//! Frames, descriptors and page of a hostile peer, against a subscriber's link or a publisher:
//! `cargo +nightly fuzz run handshake`.
#![no_main]

use std::cell::OnceCell;

use tokio_shm::fuzzing::{Stage, Step, subscriber};

thread_local! {
    static STAGE: OnceCell<(Stage, tempfile::TempDir)> = const { OnceCell::new() };
}

libfuzzer_sys::fuzz_target!(|input: (bool, Vec<Step>)| match input {
    (true, steps) => subscriber(&steps),
    (false, steps) => STAGE.with(|stage| stage.get_or_init(stage_in_a_directory).0.publisher(&steps)),
});

fn stage_in_a_directory() -> (Stage, tempfile::TempDir) {
    let dir = tempfile::tempdir().expect("a directory");
    std::fs::set_permissions(&dir, std::os::unix::fs::PermissionsExt::from_mode(0o700)).expect("its mode");
    (Stage::new(dir.path()), dir)
}
