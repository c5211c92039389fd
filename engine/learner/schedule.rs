//! Learning-rate schedules, as transformers' `get_scheduler` defines them (src/transformers/optimization.py).

use std::f64::consts::PI;

use serde::{Deserialize, Serialize};

/// Shape of the learning rate after the warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum ScheduleKind {
    /// Stays at its peak.
    #[default]
    Constant,
    /// Falls to 0 at the last update.
    Linear,
    /// Half a cosine to 0 at the last update.
    Cosine,
    /// Cosine with other wave counts or a floor.
    CosineTo {
        /// Waves over the run; 0.5 is one fall.
        cycles: f64,
        /// Least rate, as a share of the peak.
        floor: f64,
    },
    /// Several falls, each from the peak to 0.
    CosineRestarts {
        /// Falls.
        cycles: f64,
    },
    /// `(1 - done)^power` from the peak to `end`.
    Polynomial {
        /// Exponent.
        power: f64,
        /// Last learning rate, absolute.
        end: f64,
    },
    /// Falls with the root of the updates since the warm-up.
    InverseSqrt,
    /// Constant, then a fall to a floor, where it stays.
    WarmupStableDecay {
        /// Updates of the fall.
        decay: u64,
        /// Shape of the fall.
        shape: DecayShape,
        /// Rate at the ends, as a share of the peak.
        floor: f64,
    },
}

/// Shape of a fall from 1 to 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DecayShape {
    /// Half a cosine.
    #[default]
    Cosine,
    /// Straight.
    Linear,
    /// `1 - sqrt(done)`.
    OneMinusSqrt,
}

/// Learning rate of update `update` (from 0) of `total`, rising linearly over the first `warmup` updates.
pub fn learning_rate(kind: ScheduleKind, peak: f64, update: u64, total: u64, warmup: u64) -> f64 {
    let rise = update as f64 / warmup.max(1) as f64;
    if update < warmup {
        return match kind {
            ScheduleKind::WarmupStableDecay { floor, .. } => peak * (rise * (1.0 - floor) + floor),
            _ => peak * rise,
        };
    }
    let done = (update - warmup) as f64 / total.saturating_sub(warmup).max(1) as f64;
    let wave = |turns: f64| 0.5 * (1.0 + (PI * 2.0 * turns).cos());
    match kind {
        ScheduleKind::Constant => peak,
        ScheduleKind::Linear => peak * (1.0 - done).max(0.0),
        ScheduleKind::Cosine => peak * wave(0.5 * done).max(0.0),
        ScheduleKind::CosineTo { cycles, floor } => {
            peak * (wave(cycles * done) * (1.0 - floor) + floor).max(0.0)
        }
        ScheduleKind::CosineRestarts { .. } if done >= 1.0 => 0.0,
        ScheduleKind::CosineRestarts { cycles } => peak * wave(0.5 * ((cycles * done) % 1.0)).max(0.0),
        ScheduleKind::Polynomial { end, .. } if update > total => end,
        ScheduleKind::Polynomial { power, end } => (peak - end) * (1.0 - done).max(0.0).powf(power) + end,
        ScheduleKind::InverseSqrt => {
            let timescale = if warmup == 0 { 10_000.0 } else { warmup as f64 };
            peak / (((update - warmup) as f64 + timescale) / timescale).sqrt()
        }
        ScheduleKind::WarmupStableDecay { decay, shape, floor } => {
            let stable_end = total.saturating_sub(decay).max(warmup);
            let fallen = update.saturating_sub(stable_end) as f64 / decay.max(1) as f64;
            let height = match shape {
                _ if fallen >= 1.0 => 0.0,
                DecayShape::Cosine => wave(0.5 * fallen),
                DecayShape::Linear => 1.0 - fallen,
                DecayShape::OneMinusSqrt => 1.0 - fallen.sqrt(),
            };
            peak * (height * (1.0 - floor) + floor).max(0.0)
        }
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

    #[test]
    fn a_floor_is_where_the_rate_stays() {
        let kind = ScheduleKind::WarmupStableDecay { decay: 4, shape: DecayShape::Linear, floor: 0.25 };
        let rates: Vec<f64> = (0..12).map(|u| learning_rate(kind, 4.0, u, 10, 2)).collect();
        assert_eq!(rates, [1.0, 2.5, 4.0, 4.0, 4.0, 4.0, 4.0, 3.25, 2.5, 1.75, 1.0, 1.0]);
    }
}
