//! Cache lines fetched before they are needed.
//!
//! Locked instructions wait for the writes before them, and a write to a line that another core has waits for that core: lines
//! that were fetched beforehand are waited for by nobody.
#![allow(unsafe_code)]

const LINE: usize = 64;

/// Has what begins at `start` and has `len` bytes fetched, to be read, but no more than `most` lines: how many that are.
///
/// A hint that changes nothing but time, wherever it points. On processors other than x86-64 it does nothing.
#[inline]
pub(crate) fn for_reading(start: *const u8, len: usize, most: usize) -> usize {
    let lines = len.div_ceil(LINE).min(most);
    let mut line = start;
    for _ in 0..lines {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: a prefetch faults at no address and changes nothing that a program can see.
        unsafe {
            std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(line.cast());
        }
        line = line.wrapping_add(LINE);
    }
    lines
}

/// Has the lines of `bytes` fetched, to be written, by writing to each: some of their content is lost.
///
/// Writes take effect one after another, but their lines are fetched all at once: as many as a processor keeps writes in mind, some
/// dozens. So everything that is to be fetched should be by a loop that writes nothing else, ahead of the next locked instruction.
// Tried: `prefetchw`. Where the other core is far away, on an AMD Zen 4, the lines are often not there long afterwards, and a stream of 64 B
// takes twice as long; where it is near a locked instruction waits for a prefetch as for a write.
#[inline]
pub(crate) fn for_writing(bytes: &mut [u8]) {
    for line in bytes.chunks_mut(LINE) {
        line[0] = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_a_message_are_counted_up_to_so_many() {
        let bytes = [0_u8; 200];
        assert_eq!(for_reading(bytes.as_ptr(), 200, 8), 4);
        assert_eq!(for_reading(bytes.as_ptr(), 200, 3), 3);
        assert_eq!(for_reading(std::ptr::null(), 0, 8), 0);
        // What a peer says is not checked yet when it is hinted at.
        assert_eq!(for_reading(std::ptr::without_provenance(usize::MAX - 1), usize::MAX, 2), 2);
    }

    #[test]
    fn each_line_of_a_message_is_written_to() {
        let mut bytes = [1_u8; 200];
        for_writing(&mut bytes);
        assert_eq!(bytes.iter().filter(|&&byte| byte == 0).count(), 4);
        for_writing(&mut []);
    }
}
