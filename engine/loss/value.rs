//! The critic's loss: squared error of the returns, held near the values that the rollout was judged with.

use serde::{Deserialize, Serialize};

use super::{Aggregation, BatchTotals};

/// Whose hidden states the critic reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Trunk {
    /// The policy's: its weights get the gradient of both losses.
    #[default]
    Shared,
    /// Its own: a copy of what trains, from the first step on, with its own moments.
    Separate,
}

/// A critic, which judges every token's state (PPO, Schulman et al. 2017, arXiv 1707.06347).
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CriticConfig {
    /// Peak learning rate of its head, and of a separate trunk; the stage's where it is not given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lr: Option<f64>,
    /// Discount a token.
    pub gamma: f64,
    /// Weight of far against near values in the advantage (GAE, arXiv 1506.02438, eq. 16). Below 1 the early tokens of a
    /// completion learn from the critic's values instead of its reward, which takes a critic that knows something.
    pub lambda: f64,
    /// How far a value may move from that before the update until its loss stops pushing.
    pub clip: f64,
    /// Factor of its loss.
    pub coefficient: f64,
    /// Brings the advantages to mean 0 and deviation 1 over the tokens of the step.
    pub whiten: bool,
    /// Whose hidden states it reads.
    pub trunk: Trunk,
    /// Steps at the start in which only the critic learns: the head alone on a shared trunk.
    pub warmup_steps: u64,
}

impl Default for CriticConfig {
    fn default() -> Self {
        Self {
            lr: None,
            gamma: 1.0,
            lambda: 1.0,
            clip: 0.2,
            coefficient: 0.1,
            whiten: true,
            trunk: Trunk::Shared,
            warmup_steps: 0,
        }
    }
}

impl CriticConfig {
    /// Whether it has a trunk of its own.
    pub fn is_separate(&self) -> bool {
        self.trunk == Trunk::Separate
    }
}

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

/// Share of the variance of the returns that the values explain, over the masked-in tokens: `1 - Var(R - V) / Var(R)`; 0
/// where all returns are equal.
pub fn explained_variance(returns: &[f32], values: &[f32], mask: &[bool]) -> f64 {
    let variance = |f: &dyn Fn(usize) -> f64| {
        let x: Vec<f64> = (0..mask.len()).filter(|&t| mask[t]).map(f).collect();
        let mean = x.iter().sum::<f64>() / x.len().max(1) as f64;
        x.iter().map(|v| (v - mean).powi(2)).sum::<f64>()
    };
    let total = variance(&|t| f64::from(returns[t]));
    if total == 0.0 {
        return 0.0;
    }
    1.0 - variance(&|t| f64::from(returns[t]) - f64::from(values[t])) / total
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn explained_variance_of_known_values() {
        let (returns, mask) = ([1.0, 0.0, 9.0, 1.0], [true, true, false, true]);
        assert_eq!(explained_variance(&returns, &[1.5, 0.5, 0.0, 1.5], &mask), 1.0);
        assert_eq!(explained_variance(&returns, &[0.3; 4], &mask), 0.0);
        assert_eq!(explained_variance(&[2.0; 4], &[0.0, 1.0, 2.0, 3.0], &mask), 0.0);
    }
}
