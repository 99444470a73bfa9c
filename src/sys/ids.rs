//! Which numbers of users and groups mean somebody in particular.
//!
//! In a user namespace the kernel shows all that have no number in it as one and the same: the overflow id, 65534 by default. It is
//! also the number of an ordinary user, `nobody`. So it stands for that user only where everyone has a number, as outside of all
//! user namespaces; elsewhere it stands for nobody in particular, and nothing must be granted to it.

use std::fmt;
use std::fs;
use std::sync::OnceLock;

use rustix::process::geteuid;

/// What the kernel shows unless it was told otherwise (`kernel.overflowuid`, `kernel.overflowgid`).
const OVERFLOW: u32 = 65_534;

/// The user of this number, or `None` if it may be any that has no number in this user namespace.
pub(crate) fn known_uid(uid: u32) -> Option<u32> {
    static OVERFLOW_UID: OnceLock<u32> = OnceLock::new();
    let overflow = *OVERFLOW_UID.get_or_init(|| read_overflow("/proc/sys/kernel/overflowuid"));
    (uid != overflow || everyone_has_a_number("/proc/self/uid_map")).then_some(uid)
}

/// The group of this number, or `None`, likewise.
pub(crate) fn known_gid(gid: u32) -> Option<u32> {
    static OVERFLOW_GID: OnceLock<u32> = OnceLock::new();
    let overflow = *OVERFLOW_GID.get_or_init(|| read_overflow("/proc/sys/kernel/overflowgid"));
    (gid != overflow || everyone_has_a_number("/proc/self/gid_map")).then_some(gid)
}

/// Whether this number is that of our own effective user, and of no other.
pub(crate) fn is_ours(uid: u32) -> bool {
    uid == geteuid().as_raw() && known_uid(uid).is_some()
}

fn read_overflow(sysctl: &str) -> u32 {
    fs::read_to_string(sysctl).ok().and_then(|text| text.trim().parse().ok()).unwrap_or(OVERFLOW)
}

/// Whether every id of the host has a number by this map. (A namespace that can make one of all numbers has one itself.) Not where
/// it cannot be read. Read each time, as a process may change its namespace.
fn everyone_has_a_number(map: &str) -> bool {
    fs::read_to_string(map).is_ok_and(|map| map.split_whitespace().eq(["0", "0", "4294967295"]))
}

/// A user or group in a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Shown(pub(crate) Option<u32>);

impl fmt::Display for Shown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(id) => id.fmt(f),
            None => f.write_str("unknown (without a number in this process's user namespace)"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overflow_id_is_a_user_only_where_everyone_has_a_number() {
        let dir = tempfile::tempdir().unwrap();
        let file = |text: &str| {
            let path = dir.path().join("file");
            fs::write(&path, text).unwrap();
            path.to_str().unwrap().to_owned()
        };
        assert_eq!(read_overflow(&file("77\n")), 77);
        assert_eq!(read_overflow(&file("")), OVERFLOW);
        assert_eq!(read_overflow("/no/such/sysctl"), OVERFLOW);
        assert!(everyone_has_a_number(&file("         0          0 4294967295\n")));
        let rootless = "         0       1000          1\n         1     100000      65536\n";
        for map in ["", rootless, "0 100000 65536", "0 1 4294967294"] {
            assert!(!everyone_has_a_number(&file(map)), "{map}");
        }
        assert!(!everyone_has_a_number("/no/such/map"));
    }

    #[test]
    fn ordinary_ids_are_known_in_any_namespace() {
        assert_eq!((known_uid(0), known_gid(1_000)), (Some(0), Some(1_000)));
        assert!(!is_ours(geteuid().as_raw().wrapping_add(1)));
        assert_eq!(Shown(Some(7)).to_string(), "7");
    }
}
