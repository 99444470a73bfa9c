//! Medians and percentiles.

/// Of what is to be measured: sorted, and `q` of it at most.
pub(crate) fn quantile(samples: &mut [f64], q: f64) -> f64 {
    assert!(!samples.is_empty(), "something was measured");
    samples.sort_by(f64::total_cmp);
    let last = samples.len() - 1;
    samples[((last as f64) * q).round() as usize]
}

pub(crate) fn median(samples: &mut [f64]) -> f64 {
    quantile(samples, 0.5)
}
