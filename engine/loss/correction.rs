//! Weights and selections that are fixed before the loss: sampler correction, entropy quantile, covariance.
//!
//! They look at more than one completion, so they are computed once for the whole step and handed to
//! [`super::policy_loss`] by token; that keeps the loss independent of how the step is cut into micro-batches.

use serde::{Deserialize, Serialize};

/// Level of an importance weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WeightLevel {
    /// One a token.
    Token,
    /// One a completion: the product over its tokens.
    #[default]
    Sequence,
}

/// What happens to a weight out of bounds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OutOfBounds {
    /// Clamped (TIS: Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training").
    Truncate,
    /// Set to 0 (MIS; by token: IcePop).
    #[default]
    Mask,
}

/// Importance weights of the policy that the learner computes to the one that sampled.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SamplerCorrection {
    /// Level.
    pub level: WeightLevel,
    /// Out of bounds.
    pub out_of_bounds: OutOfBounds,
    /// Least weight.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min: Option<f64>,
    /// Greatest weight.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max: Option<f64>,
}

impl Default for SamplerCorrection {
    fn default() -> Self {
        Self { level: WeightLevel::Sequence, out_of_bounds: OutOfBounds::Mask, min: None, max: Some(3.0) }
    }
}

impl SamplerCorrection {
    /// One weight a token from logprobs at the start of the step (`old`) and as sampled (`sampler`), rows by
    /// `offsets`; masked tokens and NaN logprobs count as equal (TRL, `vllm_importance_sampling_mode`).
    pub fn weights(&self, offsets: &[usize], old: &[f32], sampler: &[f32], mask: &[bool]) -> Vec<f32> {
        let log_ratio = |t: usize| {
            let d = f64::from(old[t]) - f64::from(sampler[t]);
            if mask[t] && !d.is_nan() { d } else { 0.0 }
        };
        let mut weights = Vec::with_capacity(old.len());
        for row in offsets.windows(2) {
            let row = row[0]..row[1];
            match self.level {
                WeightLevel::Token => weights.extend(row.map(|t| self.bounded(log_ratio(t).exp()) as f32)),
                WeightLevel::Sequence => {
                    let weight = self.bounded(row.clone().map(log_ratio).sum::<f64>().exp()) as f32;
                    weights.extend(row.map(|_| weight));
                }
            }
        }
        weights
    }

    fn bounded(&self, weight: f64) -> f64 {
        let (min, max) = (self.min.unwrap_or(f64::NEG_INFINITY), self.max.unwrap_or(f64::INFINITY));
        match self.out_of_bounds {
            OutOfBounds::Truncate => weight.max(min).min(max),
            OutOfBounds::Mask if weight < min || weight > max => 0.0,
            OutOfBounds::Mask => weight,
        }
    }
}

/// Entropy that the `share` most uncertain of the masked-in tokens reach (Wang et al. 2025, arXiv 2506.01939, eq. 5);
/// torch's interpolated quantile, in f32 as torch computes it. `None` when no token is in the loss.
pub fn entropy_threshold(entropy: &[f32], mask: &[bool], share: f64) -> Option<f32> {
    let mut sorted: Vec<f32> = entropy.iter().zip(mask).filter(|(_, m)| **m).map(|(e, _)| *e).collect();
    sorted.sort_by(f32::total_cmp);
    let last = sorted.len().checked_sub(1)?;
    let rank = (1.0 - share) as f32 * last as f32;
    let below = (rank.floor() as usize).min(last);
    let (a, b, w) = (sorted[below], sorted[(below + 1).min(last)], rank - rank.floor());
    Some(if w < 0.5 { a + w * (b - a) } else { b - (b - a) * (1.0 - w) })
}

/// Coefficient of the penalty |log r| by token: `coefficient` for the `share` of masked-in tokens whose logprob and
/// advantage covary most, 0 for the rest (KL-Cov, Cui et al. 2025, arXiv 2505.22617, eq. 11).
pub fn kl_cov(new: &[f32], advantages: &[f32], mask: &[bool], share: f64, coefficient: f64) -> Vec<f32> {
    let mut out = vec![0.0; new.len()];
    let valid: Vec<usize> = (0..new.len()).filter(|&t| mask[t]).collect();
    let mean = |x: &[f32]| valid.iter().map(|&t| f64::from(x[t])).sum::<f64>() / valid.len().max(1) as f64;
    let (mean_new, mean_advantage) = (mean(new), mean(advantages));
    let covariance = |t: usize| (f64::from(advantages[t]) - mean_advantage) * (f64::from(new[t]) - mean_new);
    let mut ranked = valid.clone();
    ranked.sort_by(|&a, &b| covariance(b).total_cmp(&covariance(a)));
    let count = ((valid.len() as f64 * share) as usize).max(1);
    for &t in ranked.iter().take(count) {
        out[t] = coefficient as f32;
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sequence_weight_is_the_product_and_is_bounded_once() {
        let (old, sampler) = ([-1.0, -1.0, -2.0], [-1.5, -1.5, f32::NAN]);
        let c =
            SamplerCorrection { out_of_bounds: OutOfBounds::Truncate, max: Some(2.0), ..Default::default() };
        assert_eq!(c.weights(&[0, 2, 3], &old, &sampler, &[true; 3]), [2.0, 2.0, 1.0]);
        let masked = SamplerCorrection { out_of_bounds: OutOfBounds::Mask, ..c };
        assert_eq!(masked.weights(&[0, 2, 3], &old, &sampler, &[true; 3]), [0.0, 0.0, 1.0]);
        let token = SamplerCorrection { level: WeightLevel::Token, ..c };
        assert_eq!(token.weights(&[0, 2, 3], &old, &sampler, &[false, true, true]), [1.0, 0.5f32.exp(), 1.0]);
    }

    #[test]
    fn the_threshold_interpolates_between_ranks() {
        let mask = [true, true, false, true];
        assert_eq!(entropy_threshold(&[1.0, 3.0, 9.0, 2.0], &mask, 0.5), Some(2.0));
        assert_eq!(entropy_threshold(&[1.0, 3.0, 9.0, 2.0], &mask, 0.25), Some(2.5));
        assert_eq!(entropy_threshold(&[1.0], &[false], 0.5), None);
    }
}
