//! Hints to the processor to fetch cache lines before they are needed: they change nothing but time, wherever they point.
//!
//! Locked instructions wait for the writes before them, and a write to a line that another core has waits for that core: lines
//! that were fetched beforehand are waited for by nobody. On processors other than x86-64 these do nothing.
#![allow(unsafe_code)]

const LINE: usize = 64;

/// Fetches what begins at `start` and has `len` bytes, to be read, but no more than `most` lines: how many that are.
#[inline]
pub(crate) fn for_reading(start: *const u8, len: usize, most: usize) -> usize {
    each_line(start, len, most, |line| {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: a prefetch faults at no address and changes nothing that a program can see.
        unsafe {
            std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(line.cast());
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = line;
    })
}

/// The same, to be written, which takes the lines from everybody else.
#[inline]
pub(crate) fn for_writing(start: *const u8, len: usize, most: usize) -> usize {
    each_line(start, len, most, |line| {
        // Every x86-64 has this instruction, or takes it for none. The intrinsic needs to be told, or fetches to read.
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        unsafe {
            std::arch::asm!("prefetchw [{}]", in(reg) line, options(readonly, nostack, preserves_flags));
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = line;
    })
}

#[inline]
fn each_line(start: *const u8, len: usize, most: usize, fetch: impl Fn(*const u8)) -> usize {
    let lines = len.div_ceil(LINE).min(most);
    let mut line = start;
    for _ in 0..lines {
        fetch(line);
        line = line.wrapping_add(LINE);
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_a_message_are_counted_and_none_beyond_most_is_touched() {
        let bytes = [0_u8; 200];
        assert_eq!(for_reading(bytes.as_ptr(), 200, 8), 4);
        assert_eq!(for_writing(bytes.as_ptr(), 200, 3), 3);
        assert_eq!(for_writing(std::ptr::null(), 0, 8), 0);
        // What a peer says is not checked yet when it is hinted at.
        assert_eq!(for_reading(std::ptr::without_provenance(usize::MAX - 1), usize::MAX, 2), 2);
    }
}
