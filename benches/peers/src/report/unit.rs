//! Figures as people read them: three digits and a unit.

/// What a table's figures are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Unit {
    /// Given in nanoseconds.
    Time,
    /// Messages a second; with their size, bytes a second as well.
    Rate,
    /// Of one core.
    Percent,
    /// Given in bytes.
    Bytes,
}

impl Unit {
    pub(crate) fn show(self, value: f64) -> String {
        match self {
            Self::Time => scaled(value, &[("ns", 1.0), ("µs", 1e3), ("ms", 1e6), ("s", 1e9)]),
            Self::Rate => scaled(value, &[("/s", 1.0), ("k/s", 1e3), ("M/s", 1e6)]),
            Self::Percent => format!("{value:.2} %"),
            Self::Bytes => {
                scaled(value, &[("B", 1.0), ("KiB", 1024.0), ("MiB", 1048576.0), ("GiB", 1073741824.0)])
            }
        }
    }
}

fn scaled(value: f64, units: &[(&str, f64)]) -> String {
    let (unit, scale) = units.iter().rev().find(|(_, scale)| value >= *scale).unwrap_or(&units[0]);
    format!("{} {unit}", digits(value / scale))
}

/// Three digits that count.
pub(crate) fn digits(value: f64) -> String {
    match value.abs() {
        100.0.. => format!("{value:.0}"),
        10.0.. => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

/// A message's size.
pub(crate) fn size(bytes: usize) -> String {
    match bytes {
        0..1024 => format!("{bytes} B"),
        1024..1048576 => format!("{} KiB", bytes >> 10),
        _ => format!("{} MiB", bytes >> 20),
    }
}

/// What [`size`] has written.
pub(crate) fn parse_size(text: &str) -> Option<f64> {
    let (number, unit) = text.split_once(' ')?;
    let scale = match unit {
        "B" => 1.0,
        "KiB" => 1024.0,
        "MiB" => 1048576.0,
        _ => return None,
    };
    Some(number.parse::<f64>().ok()? * scale)
}
