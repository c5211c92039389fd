//! Learning-rate schedules, as transformers' `get_scheduler` defines them (src/transformers/optimization.py).

use serde::{Deserialize, Serialize};

/// Shape of the learning rate after the warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ScheduleKind {
    /// Stays at its peak.
    #[default]
    Constant,
    /// Falls to 0 at the last update.
    Linear,
    /// Half a cosine to 0 at the last update.
    Cosine,
}

/// Learning rate of update `update` (from 0) of `total`, rising linearly over the first `warmup` updates.
pub fn learning_rate(kind: ScheduleKind, peak: f64, update: u64, total: u64, warmup: u64) -> f64 {
    if update < warmup {
        return peak * update as f64 / warmup.max(1) as f64;
    }
    let span = total.saturating_sub(warmup).max(1) as f64;
    let done = (update - warmup) as f64 / span;
    peak * match kind {
        ScheduleKind::Constant => 1.0,
        ScheduleKind::Linear => (1.0 - done).max(0.0),
        ScheduleKind::Cosine => (0.5 * (1.0 + (std::f64::consts::PI * done).cos())).max(0.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn warm_up_rises_to_the_peak_and_the_end_is_zero() {
        for kind in [ScheduleKind::Linear, ScheduleKind::Cosine] {
            assert_eq!(learning_rate(kind, 2.0, 0, 10, 4), 0.0);
            assert_eq!(learning_rate(kind, 2.0, 2, 10, 4), 1.0);
            assert_eq!(learning_rate(kind, 2.0, 4, 10, 4), 2.0);
            assert!((learning_rate(kind, 2.0, 7, 10, 4) - 1.0).abs() < 1e-12, "half-way down");
            assert!(learning_rate(kind, 2.0, 10, 10, 4) < 1e-12);
        }
    }
}
