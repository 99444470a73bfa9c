//! The clock that messages are stamped with.
//!
//! Monotonic, and the same for every process of the host (of one time namespace); it says nothing about wall time.

use rustix::time::{ClockId, clock_gettime};

/// Nanoseconds of `CLOCK_MONOTONIC`. Answered by the vDSO: no system call on common clock sources.
#[inline]
pub(crate) fn monotonic_ns() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    // Monotonic time starts near zero at boot: neither field is negative, and 64 bits last for 584 years.
    (now.tv_sec as u64).wrapping_mul(1_000_000_000).wrapping_add(now.tv_nsec as u64)
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
