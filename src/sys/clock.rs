//! The clock that messages are stamped with.
//!
//! Monotonic, and the same for every process of the host (of one time namespace); it says nothing about wall time.

#[cfg(not(tokio_shm_shuttle))]
use rustix::time::{ClockId, clock_gettime};

/// Nanoseconds of `CLOCK_MONOTONIC`. Answered by the vDSO: no system call on common clock sources.
#[cfg(not(tokio_shm_shuttle))]
#[inline]
pub(crate) fn monotonic_ns() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    // Monotonic time starts near zero at boot: neither field is negative, and 64 bits last for 584 years.
    (now.tv_sec as u64).wrapping_mul(1_000_000_000).wrapping_add(now.tv_nsec as u64)
}

/// In a model each look takes a microsecond, so that a schedule is the same whenever it is run.
#[cfg(tokio_shm_shuttle)]
pub(crate) fn monotonic_ns() -> u64 {
    model::pass(1_000)
}

#[cfg(tokio_shm_shuttle)]
pub(crate) mod model {
    use std::cell::Cell;

    thread_local! {
        static NOW: Cell<u64> = const { Cell::new(START) };
    }

    const START: u64 = 1_000_000_000;

    /// Lets time pass, and says what time it is then.
    pub(crate) fn pass(ns: u64) -> u64 {
        let now = NOW.get() + ns;
        NOW.set(now);
        now
    }

    /// The beginning of a schedule.
    pub(crate) fn reset() {
        NOW.set(START);
    }
}

#[cfg(test)]
mod tests {
    use super::monotonic_ns;

    #[test]
    fn clock_read_twice_never_goes_back() {
        let first = monotonic_ns();
        assert!(first > 0);
        assert!(monotonic_ns() >= first);
    }
}
