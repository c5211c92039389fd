//! Rewards of groups to advantages: pure, slices in, numbers out.
//!
//! GRPO (Shao et al. 2024, arXiv 2402.03300, section 4.1.2) compares each completion with its group:
//! `A_i = (r_i - mean(r)) / (std(r) + eps)`. Dr.GRPO (Liu et al. 2025, arXiv 2503.20783) leaves the division out.
//! A completion whose verifiers all abstained has no reward: it is left out of the statistics and its advantage
//! is 0, so one failed script never turns a group into NaN.

use serde::{Deserialize, Serialize};

/// What the centred reward is divided by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Scale {
    /// Standard deviation of the group (n − 1 in the denominator).
    #[default]
    Group,
    /// Standard deviation of all rewards of the step.
    Batch,
    /// Nothing (Dr.GRPO).
    None,
}

/// What is subtracted from a reward.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Baseline {
    /// Mean of the group, the completion itself included (GRPO).
    #[default]
    GroupMean,
    /// Mean of the group's other completions (RLOO, Ahmadian et al. 2024, arXiv 2402.14740, eq. 6).
    LeaveOneOut,
}

/// How rewards become advantages.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AdvantageConfig {
    /// What is subtracted.
    pub baseline: Baseline,
    /// What it is divided by.
    pub scale: Scale,
    /// Added to the standard deviation; TRL's value.
    pub eps: f64,
}

impl Default for AdvantageConfig {
    fn default() -> Self {
        Self { baseline: Baseline::GroupMean, scale: Scale::Group, eps: 1e-4 }
    }
}

/// Advantages of a step.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Advantages {
    /// One a completion, in the order of the rewards.
    pub values: Vec<f32>,
    /// Groups whose rewards are all equal (or fewer than two): they teach nothing.
    pub zero_variance_groups: usize,
    /// Mean of the rewards that exist; 0 when none does.
    pub reward_mean: f64,
    /// Mean over groups of the group's standard deviation.
    pub reward_std: f64,
}

/// Advantages of `rewards`, groups of `group_size` one after another; `None` and non-finite values abstain.
pub fn advantages(rewards: &[Option<f64>], group_size: usize, config: &AdvantageConfig) -> Advantages {
    assert!(group_size > 0 && rewards.len().is_multiple_of(group_size), "rewards come in whole groups");
    let scored = |r: &Option<f64>| r.filter(|x| x.is_finite());
    let all: Vec<f64> = rewards.iter().filter_map(scored).collect();
    let batch_std = std_dev(&all);
    let mut out = Advantages { reward_mean: mean(&all), ..Advantages::default() };
    let groups = rewards.len() / group_size;
    for group in rewards.chunks_exact(group_size) {
        let present: Vec<f64> = group.iter().filter_map(scored).collect();
        let (n, mean, std) = (present.len(), mean(&present), std_dev(&present));
        out.reward_std += std / groups as f64;
        if std == 0.0 {
            out.zero_variance_groups += 1;
        }
        let divisor = match config.scale {
            Scale::Group => std + config.eps,
            Scale::Batch => batch_std + config.eps,
            Scale::None => 1.0,
        };
        out.values.extend(group.iter().map(|r| {
            let Some(r) = scored(r) else { return 0.0 };
            let baseline = match config.baseline {
                Baseline::GroupMean => mean,
                Baseline::LeaveOneOut if n > 1 => (mean * n as f64 - r) / (n - 1) as f64,
                Baseline::LeaveOneOut => r,
            };
            ((r - baseline) / divisor) as f32
        }));
    }
    out
}

fn mean(values: &[f64]) -> f64 {
    if values.is_empty() { 0.0 } else { values.iter().sum::<f64>() / values.len() as f64 }
}

/// Sample standard deviation; 0 for fewer than two values, exactly 0 for equal ones.
fn std_dev(values: &[f64]) -> f64 {
    if values.len() < 2 || values.iter().all(|v| *v == values[0]) {
        return 0.0;
    }
    let mean = mean(values);
    (values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / (values.len() - 1) as f64).sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn some(values: &[f64]) -> Vec<Option<f64>> {
        values.iter().copied().map(Some).collect()
    }

    #[test]
    fn a_group_is_centred_and_scaled() {
        // mean 0.5, std sqrt(1/3): (1 - 0.5) / (0.57735 + 1e-4) = 0.86588
        let a = advantages(&some(&[1.0, 0.0, 1.0, 0.0]), 4, &AdvantageConfig::default());
        assert!((a.values[0] - 0.865_876).abs() < 1e-5 && (a.values[1] + 0.865_876).abs() < 1e-5, "{a:?}");
    }

    #[test]
    fn an_abstained_row_is_left_out_and_gets_nothing() {
        let rewards = [Some(1.0), None, Some(0.0), Some(f64::NAN)];
        let config = AdvantageConfig { scale: Scale::None, ..Default::default() };
        let a = advantages(&rewards, 4, &config);
        assert_eq!(a.values, [0.5, 0.0, -0.5, 0.0]);
        assert_eq!(a.reward_mean, 0.5);
        assert_eq!(advantages(&[None, None], 2, &config).values, [0.0, 0.0]);
    }

    #[test]
    fn equal_rewards_are_counted_and_teach_nothing() {
        // 0.1 three times does not sum to 0.3 in floating point; the group must still count as equal
        let a = advantages(&some(&[0.1, 0.1, 0.1, 1.0, 0.0, 0.5]), 3, &AdvantageConfig::default());
        assert_eq!((a.zero_variance_groups, &a.values[..3]), (1, &[0.0; 3][..]));
    }

    #[test]
    fn leave_one_out_is_the_mean_scaled_by_n_over_n_minus_one() {
        let rewards = some(&[1.0, 2.0, 6.0]);
        let config = |baseline| AdvantageConfig { baseline, scale: Scale::None, eps: 0.0 };
        let mean = advantages(&rewards, 3, &config(Baseline::GroupMean)).values;
        let loo = advantages(&rewards, 3, &config(Baseline::LeaveOneOut)).values;
        for (m, l) in mean.iter().zip(&loo) {
            assert!((l - m * 1.5).abs() < 1e-6);
        }
    }
}
