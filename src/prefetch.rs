//! Hints to the processor to fetch a cache line before it is needed: they change nothing but time, wherever they point.
//!
//! Locked instructions wait for the stores before them, and a store to a line that another core has waits for that core: a line
//! that is fetched beforehand is waited for by nobody. On processors other than x86-64 these do nothing.
#![allow(unsafe_code)]

/// Fetches the line at `at` so that it can be read.
#[inline]
pub(crate) fn for_reading(at: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch faults at no address and changes nothing that a program can see.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(at.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}

/// Fetches the line at `at` so that it can be written, which takes it from everybody else.
#[inline]
pub(crate) fn for_writing(at: *const u8) {
    // The instruction that every x86-64 has, or takes for none; the intrinsic makes one for reading of it unless it is told that the
    // processor has this one.
    #[cfg(target_arch = "x86_64")]
    // SAFETY: as above.
    unsafe {
        std::arch::asm!("prefetchw [{}]", in(reg) at, options(readonly, nostack, preserves_flags));
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}
