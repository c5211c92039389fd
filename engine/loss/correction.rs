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

/// What is done about the few tokens whose logprob and advantage covary most, which drive the entropy down (Cui et al.
/// 2025, arXiv 2505.22617, section 4).
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Covariance {
    /// The greatest `share` pays `coefficient * |log r|` ([`kl_cov`]).
    Kl {
        /// Share of the tokens.
        share: f64,
        /// Factor of the penalty.
        coefficient: f64,
    },
    /// A random `share`, drawn among the tokens whose covariance is between `low` and `high`, has no gradient ([`clip_cov`]).
    Clip {
        /// Share of the tokens.
        share: f64,
        /// Least covariance.
        low: f64,
        /// Greatest covariance.
        high: f64,
    },
}

/// `(A - mean A) (log p - mean log p)` of the masked-in tokens, by token (arXiv 2505.22617, eq. 9).
fn covariances(new: &[f32], advantages: &[f32], mask: &[bool]) -> Vec<(usize, f64)> {
    let valid: Vec<usize> = (0..new.len()).filter(|&t| mask[t]).collect();
    let mean = |x: &[f32]| valid.iter().map(|&t| f64::from(x[t])).sum::<f64>() / valid.len().max(1) as f64;
    let (mean_new, mean_advantage) = (mean(new), mean(advantages));
    let covariance = |t: usize| (f64::from(advantages[t]) - mean_advantage) * (f64::from(new[t]) - mean_new);
    valid.iter().map(|&t| (t, covariance(t))).collect()
}

fn share_of(tokens: usize, share: f64) -> usize {
    ((tokens as f64 * share) as usize).max(1)
}

/// Coefficient of the penalty |log r| by token: `coefficient` for the `share` of masked-in tokens whose logprob and
/// advantage covary most, 0 for the rest (KL-Cov, arXiv 2505.22617, eq. 11).
pub fn kl_cov(new: &[f32], advantages: &[f32], mask: &[bool], share: f64, coefficient: f64) -> Vec<f32> {
    let mut out = vec![0.0; new.len()];
    let mut ranked = covariances(new, advantages, mask);
    ranked.sort_by(|a, b| b.1.total_cmp(&a.1));
    for &(t, _) in ranked.iter().take(share_of(ranked.len(), share)) {
        out[t] = coefficient as f32;
    }
    out
}

/// Factor of the policy term by token: 0 for a random `share` of the masked-in tokens, drawn among those whose covariance
/// is within `bounds`, 1 for the rest (Clip-Cov, arXiv 2505.22617, eq. 10). `below(n)` draws a number under n.
pub fn clip_cov(
    new: &[f32],
    advantages: &[f32],
    mask: &[bool],
    share: f64,
    bounds: (f64, f64),
    mut below: impl FnMut(u64) -> u64,
) -> Vec<f32> {
    let all = covariances(new, advantages, mask);
    let mut within: Vec<usize> =
        all.iter().filter(|(_, c)| *c > bounds.0 && *c < bounds.1).map(|(t, _)| *t).collect();
    let mut out = vec![1.0; new.len()];
    for i in 0..share_of(all.len(), share).min(within.len()) {
        let pick = i + below((within.len() - i) as u64) as usize;
        within.swap(i, pick);
        out[within[i]] = 0.0;
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

    #[test]
    fn clipping_by_covariance_leaves_out_a_share_within_the_bounds() {
        // means -1 and 0: covariances 1, -1, 0, 0, 4 x masked
        let new = [0.0, 0.0, -2.0, -2.0, -9.0];
        let advantages = [1.0, -1.0, 0.0, 0.0, 5.0];
        let mask = [true, true, true, true, false];
        let factors = |share, bounds| clip_cov(&new, &advantages, &mask, share, bounds, |n| n - 1);
        assert_eq!(factors(0.5, (0.5, 5.0)), [0.0, 1.0, 1.0, 1.0, 1.0]);
        assert_eq!(factors(0.5, (-2.0, 5.0)).iter().filter(|f| **f == 0.0).count(), 2);
        assert_eq!(factors(0.01, (-2.0, 5.0)).iter().filter(|f| **f == 0.0).count(), 1, "at least one");
        assert_eq!(factors(0.5, (2.0, 5.0)), [1.0; 5]);
    }
}
