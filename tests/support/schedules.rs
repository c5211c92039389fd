//! Learning-rate schedules by the names of transformers.

use rft_engine::learner::schedule::{DecayShape, ScheduleKind};
use serde_json::Value;

use super::golden::{number, optional, or};

/// The schedule that a name and its keyword arguments stand for, and the warm-up and length it runs with.
pub fn schedule(name: &str, k: &Value, peak: f64, total: u64, warmup: u64) -> (ScheduleKind, u64, u64) {
    let kind = match name {
        "constant" => return (ScheduleKind::Constant, total, 0),
        "constant_with_warmup" => ScheduleKind::Constant,
        "linear" => ScheduleKind::Linear,
        "cosine" => match optional(&k["num_cycles"]) {
            None => ScheduleKind::Cosine,
            Some(cycles) => ScheduleKind::CosineTo { cycles, floor: 0.0 },
        },
        "cosine_with_min_lr" => {
            let floor = optional(&k["min_lr_rate"]).unwrap_or_else(|| or(&k["min_lr"], 0.0) / peak);
            ScheduleKind::CosineTo { cycles: or(&k["num_cycles"], 0.5), floor }
        }
        "cosine_with_restarts" => ScheduleKind::CosineRestarts { cycles: or(&k["num_cycles"], 1.0) },
        "polynomial" => ScheduleKind::Polynomial { power: or(&k["power"], 1.0), end: or(&k["lr_end"], 1e-7) },
        "inverse_sqrt" => ScheduleKind::InverseSqrt,
        "warmup_stable_decay" => {
            let decay = number(&k["num_decay_steps"]) as u64;
            let stable = or(&k["num_stable_steps"], total.saturating_sub(warmup + decay) as f64) as u64;
            let shape = match k["decay_type"].as_str().unwrap_or("cosine") {
                "cosine" => DecayShape::Cosine,
                "linear" => DecayShape::Linear,
                "1-sqrt" => DecayShape::OneMinusSqrt,
                other => panic!("unknown decay_type {other}"),
            };
            let kind = ScheduleKind::WarmupStableDecay { decay, shape, floor: or(&k["min_lr_ratio"], 0.0) };
            return (kind, warmup + stable + decay, warmup);
        }
        other => panic!("unknown schedule {other}"),
    };
    (kind, total, warmup)
}
