//! Whether memory can be had without anybody being killed for it.
//!
//! A memfd has no size limit of its own: the kernel would go on allocating until the OOM killer finds a victim, in the host or
//! in the control group. So each allocation asks here first. What this cannot see is what others allocate at the same time.

use super::MemoryError;
use super::error::describe_shortage;
use crate::sys::cgroup::{self, Tightest};
use crate::sys::fork::PerProcess;
use parking_lot::Mutex;
use rustix::io::Errno;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// What was found is believed for so long, and for this part of it: a look reads some ten files and takes as long as making a
/// segment of 256 KiB.
const BELIEVED_FOR: Duration = Duration::from_millis(250);
const BELIEVED_PART: u64 = 8;

/// What may be allocated without a look.
struct Credit {
    bytes: u64,
    since: Instant,
}

static CREDIT: Mutex<Option<Credit>> = Mutex::new(None);

/// Checks that `len` bytes can be allocated now.
///
/// # Errors
/// [`MemoryError::ControlGroup`] or [`MemoryError::OutOfMemory`].
pub(super) fn ensure(len: usize) -> Result<(), MemoryError> {
    let wanted = len as u64;
    // Taken by another thread, or by one that a fork has left behind: then there is no credit.
    let mut credit = CREDIT.try_lock();
    if let Some(Some(credit)) = credit.as_deref_mut()
        && let Some(left) = credit.bytes.checked_sub(wanted)
        && credit.since.elapsed() < BELIEVED_FOR
    {
        credit.bytes = left;
        return Ok(());
    }
    let found = look();
    let bytes = (found.free() / BELIEVED_PART).saturating_sub(wanted);
    if let Some(credit) = credit.as_deref_mut() {
        *credit = Some(Credit { bytes, since: Instant::now() });
    }
    found.check(len)
}

/// Bytes that could be allocated without anybody being killed for it, as far as is known.
pub(super) fn free() -> u64 {
    look().free()
}

struct Found {
    /// `None` where the host does not say.
    host: Option<u64>,
    group: Option<Tightest>,
}

fn look() -> Found {
    let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let swap = meminfo_bytes(&meminfo, "SwapFree:").unwrap_or(0);
    let host = meminfo_bytes(&meminfo, "MemAvailable:").map(|memory| memory.saturating_add(swap));
    Found { host, group: cgroup::tightest(swap) }
}

impl Found {
    fn free(&self) -> u64 {
        let group = self.group.as_ref().map(|group| group.free);
        self.host.into_iter().chain(group).min().unwrap_or(u64::MAX)
    }

    fn check(self, len: usize) -> Result<(), MemoryError> {
        let wanted = len as u64;
        match self {
            Self { group: Some(Tightest { free, limit, file }), host }
                if wanted > free && host.is_none_or(|host| free <= host) =>
            {
                Err(MemoryError::ControlGroup { len, free, limit, file })
            }
            Self { host: Some(free), .. } if wanted > free => {
                Err(describe_shortage(super::Backing::Memfd, len, Errno::NOMEM))
            }
            _ => Ok(()),
        }
    }
}

/// Bytes that the host has, swap included; no limit where it does not say.
pub(crate) fn host_memory() -> u64 {
    // A child does not wait for a thread of its parent's to have read it.
    static BYTES: PerProcess<OnceLock<u64>> = PerProcess::new();
    *BYTES.get().get_or_init(|| {
        let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let ram = meminfo_bytes(&meminfo, "MemTotal:").unwrap_or(u64::MAX);
        ram.saturating_add(meminfo_bytes(&meminfo, "SwapTotal:").unwrap_or(0))
    })
}

fn meminfo_bytes(meminfo: &str, field: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix(field))?;
    line.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(host: Option<u64>, group: Option<u64>) -> Found {
        let group = group.map(|free| Tightest { free, limit: 9_999, file: "/group/memory.max".into() });
        Found { host, group }
    }

    #[test]
    fn memory_is_refused_by_whichever_of_host_and_group_has_less() {
        for fits in
            [found(None, None), found(Some(10), None), found(None, Some(10)), found(Some(10), Some(10))]
        {
            fits.check(10).unwrap();
        }
        for host in [found(Some(9), None), found(Some(8), Some(9)), found(Some(8), Some(99))] {
            assert!(matches!(host.check(10), Err(MemoryError::OutOfMemory { len: 10, .. })));
        }
        for group in [found(None, Some(9)), found(Some(9), Some(9)), found(Some(99), Some(9))] {
            assert_eq!(group.free(), 9);
            let error = group.check(10).unwrap_err();
            assert!(error.is_shortage());
            let text = error.to_string();
            for part in ["10 bytes", "/group/memory.max", "9999", "9 are free", "max_bytes"] {
                assert!(text.contains(part), "{text}");
            }
        }
    }

    #[test]
    fn memory_that_no_machine_has_is_refused_with_and_without_a_look_before() {
        for _ in 0..2 {
            ensure(1).unwrap();
            assert!(ensure(isize::MAX as usize).is_err());
        }
    }
}
