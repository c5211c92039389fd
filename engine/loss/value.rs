//! The critic's loss: squared error of the returns, held near the values that the rollout was judged with.

use super::{Aggregation, BatchTotals};

/// Loss and gradient of a micro-batch's values.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ValueOutputs {
    /// Share of the step's loss.
    pub loss: f64,
    /// Tokens whose clipped error is the greater one.
    pub clipped: usize,
    /// d loss / d value, by token.
    pub d_values: Vec<f32>,
}

/// `0.5 * max((v - R)^2, (clip(v, old ± range) - R)^2)`, aggregated (PPO2's clipped value loss; Schulman et al. 2016,
/// arXiv 1506.02438, fits R; verl, `verl/trainer/ppo/core_algos.py`, `compute_value_loss`).
///
/// All slices by token; rows by `offsets`; masked tokens have no gradient.
#[allow(clippy::too_many_arguments)]
pub fn value_loss(
    offsets: &[usize],
    values: &[f32],
    old: &[f32],
    returns: &[f32],
    mask: &[bool],
    clip: f64,
    aggregation: Aggregation,
    totals: &BatchTotals,
) -> ValueOutputs {
    let mut out = ValueOutputs { d_values: vec![0.0; values.len()], ..ValueOutputs::default() };
    for row in offsets.windows(2) {
        let tokens: Vec<usize> = (row[0]..row[1]).filter(|&t| mask[t]).collect();
        let weight = 0.5 * aggregation.token_weight(tokens.len(), totals);
        for t in tokens {
            let (v, o, r) = (f64::from(values[t]), f64::from(old[t]), f64::from(returns[t]));
            let bounded = v.clamp(o - clip, o + clip);
            let (free_error, bounded_error) = ((v - r).powi(2), (bounded - r).powi(2));
            let is_clipped = bounded_error > free_error;
            out.clipped += usize::from(is_clipped);
            out.loss += weight * free_error.max(bounded_error);
            let moves = !is_clipped || bounded == v;
            out.d_values[t] = if moves { (weight * 2.0 * (v - r)) as f32 } else { 0.0 };
        }
    }
    out
}
