//! Where the processes of a case meet: a directory on a tmpfs, and nothing outside of it.

use std::fs;
use std::path::Path;

use tempfile::TempDir;

const SHM: &str = "/dev/shm";
/// Of everything the suite makes there, iceoryx2's files outside of the directory included.
/// Short, because the paths of Unix sockets are.
const PREFIX: &str = "tsp-";

/// A new one.
pub(crate) fn directory() -> TempDir {
    let prefix = format!("{PREFIX}{}-", std::process::id());
    tempfile::Builder::new().prefix(&prefix).rand_bytes(3).tempdir_in(SHM).expect("a directory in /dev/shm")
}

/// Removes what this suite, and others that are no longer running, left behind.
pub(crate) fn sweep() {
    crate::peers::sweep();
    for entry in fs::read_dir(SHM).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let Some(rest) = name.to_str().and_then(|name| name.strip_prefix(PREFIX)) else { continue };
        let owner = rest.split('-').next().and_then(|pid| pid.parse::<u32>().ok());
        let running = |pid: u32| pid != std::process::id() && Path::new(&format!("/proc/{pid}")).exists();
        if owner.is_some_and(running) {
            continue;
        }
        let _ = fs::remove_dir_all(entry.path());
        let _ = fs::remove_file(entry.path());
    }
}
