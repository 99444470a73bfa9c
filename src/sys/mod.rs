//! What the crate asks of Linux: shared memory, doorbells, sockets that carry descriptors, directory watches, a clock.
//!
//! Knows rustix and nothing above it: no tokio, no topic, no protocol. Every descriptor made or received here is
//! close-on-exec, and no call here blocks.

pub(crate) mod bell;
pub(crate) mod cgroup;
pub(crate) mod clock;
#[cfg(feature = "zenoh")]
pub(crate) mod connections;
pub(crate) mod epoll_set;
pub(crate) mod fork;
pub(crate) mod ids;
pub(crate) mod inotify;
pub(crate) mod limits;
pub(crate) mod memory;
#[cfg(feature = "zenoh")]
pub(crate) mod named;
pub(crate) mod ownership;
pub(crate) mod process;
pub(crate) mod random;
pub(crate) mod socket;
#[cfg(test)]
pub(crate) mod testing;
pub(crate) mod timer;

use rustix::io::Errno;

/// Begins of a call that are interrupted before it is given up.
pub(crate) const INTERRUPTIONS_MAX: u32 = 1_000;

/// Makes a call again that a signal has interrupted, or another `passing` trouble; not for ever, so that what interrupts it each time is
/// an error and no hang.
fn again<T>(passing: impl Fn(Errno) -> bool, mut call: impl FnMut() -> Result<T, Errno>) -> Result<T, Errno> {
    let mut interruptions = 0;
    loop {
        match call() {
            Err(errno) if (errno == Errno::INTR || passing(errno)) && interruptions < INTERRUPTIONS_MAX => {
                interruptions += 1;
            }
            other => return other,
        }
    }
}

/// Makes a call again that a signal has interrupted.
fn again_if_interrupted<T>(call: impl FnMut() -> Result<T, Errno>) -> Result<T, Errno> {
    again(|_| false, call)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn call_interrupted_each_time_is_given_up_and_any_other_is_made_until_it_is_done() {
        let mut calls = 0;
        let mut count = |outcome| {
            calls += 1;
            if calls % 10 == 0 { Ok(calls) } else { outcome }
        };
        assert_eq!(again_if_interrupted(|| count(Err(Errno::INTR))), Ok(10));
        assert_eq!(again_if_interrupted(|| count(Err(Errno::AGAIN))), Err(Errno::AGAIN));
        assert_eq!(again(|errno| errno == Errno::AGAIN, || count(Err(Errno::AGAIN))), Ok(20));
        let mut calls = 0;
        let outcome = again_if_interrupted(|| {
            calls += 1;
            Err::<(), _>(Errno::INTR)
        });
        assert_eq!((outcome, calls), (Err(Errno::INTR), INTERRUPTIONS_MAX + 1));
    }
}
