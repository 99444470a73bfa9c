//! What a process has open and mapped, as the kernel says it.

use std::fmt;
use std::fs;

/// What must not grow. Segments are apart: how many of them there are is the pools' affair, within their caps.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Footprint {
    pub(crate) descriptors: usize,
    pub(crate) links_mapped: usize,
    pub(crate) segments_open: usize,
    pub(crate) segment_bytes_mapped: u64,
    /// Private memory that is resident, in KiB.
    pub(crate) private_kib: u64,
}

impl Footprint {
    pub(crate) fn of(pid: u32) -> std::io::Result<Self> {
        let mut this = Self::default();
        for entry in fs::read_dir(format!("/proc/{pid}/fd"))? {
            match fs::read_link(entry?.path()) {
                Ok(target) if is_segment(&target.to_string_lossy()) => this.segments_open += 1,
                Ok(_) => this.descriptors += 1,
                // Closed since.
                Err(_) => {}
            }
        }
        for line in fs::read_to_string(format!("/proc/{pid}/maps"))?.lines() {
            if line.contains("memfd:tokio-shm-link") {
                this.links_mapped += 1;
            } else if is_segment(line) {
                let range = line.split(' ').next().and_then(|range| range.split_once('-'));
                let number = |text| u64::from_str_radix(text, 16).ok();
                if let Some((start, end)) = range.and_then(|(a, b)| Some((number(a)?, number(b)?))) {
                    this.segment_bytes_mapped += end - start;
                }
            }
        }
        let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
        let anonymous = status.lines().find_map(|line| line.strip_prefix("RssAnon:"));
        this.private_kib = anonymous
            .and_then(|value| value.trim().trim_end_matches(" kB").trim().parse().ok())
            .unwrap_or_default();
        Ok(this)
    }
}

fn is_segment(name: &str) -> bool {
    name.contains("memfd:tokio-shm-segment") || name.contains("/dev/shm/")
}

impl fmt::Display for Footprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { descriptors, links_mapped, segments_open, segment_bytes_mapped, private_kib } = self;
        write!(
            f,
            "{descriptors} descriptors, {links_mapped} links, {segments_open} segments open, {} KiB of segments mapped, \
             {private_kib} KiB private",
            segment_bytes_mapped / 1024
        )
    }
}
