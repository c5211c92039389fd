//! The policy term of one token: what is maximised, and its derivative.
//!
//! A term depends on the ratio r of new to old policy, the advantage A and sometimes on log p itself. Its
//! derivative comes in two parts, because a ratio may belong to a whole completion: `through` the log-ratio and
//! `direct`ly by the token's logprob.

use serde::{Deserialize, Serialize};

/// Bounds of the ratio around 1, as distances.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ClipRange {
    /// Below.
    pub low: f64,
    /// Above.
    pub high: f64,
}

/// Soft gate of SAPO.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Sapo {
    /// Temperature of positive advantages.
    pub tau_pos: f64,
    /// Temperature of the others.
    pub tau_neg: f64,
}

impl Default for Sapo {
    fn default() -> Self {
        Self { tau_pos: 1.0, tau_neg: 1.05 }
    }
}

/// Gamma weights of VESPO, `phi(w) = w^k exp(lambda (1 - w))`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Vespo {
    /// Exponent for advantages that are not negative.
    pub k_pos: f64,
    /// Rate for advantages that are not negative.
    pub lambda_pos: f64,
    /// Exponent for negative advantages.
    pub k_neg: f64,
    /// Rate for negative advantages.
    pub lambda_neg: f64,
}

impl Default for Vespo {
    fn default() -> Self {
        Self { k_pos: 2.0, lambda_pos: 3.0, k_neg: 3.0, lambda_neg: 2.0 }
    }
}

impl Vespo {
    /// Smallest log weight that is told apart from 0.
    pub const LOG_FLOOR: f64 = -18.420_680_743_952_367;
    /// Greatest log weight.
    pub const LOG_CEILING: f64 = 20.0;

    /// The weight of a completion whose log importance weight is `log_w`.
    pub fn phi(&self, log_w: f64, advantage: f64) -> f64 {
        let log_w = log_w.clamp(Self::LOG_FLOOR, Self::LOG_CEILING);
        let (k, lambda) =
            if advantage >= 0.0 { (self.k_pos, self.lambda_pos) } else { (self.k_neg, self.lambda_neg) };
        let lambda = lambda.max(1e-4);
        let phi = (lambda + k * log_w - lambda * log_w.exp()).exp();
        if phi.is_finite() { phi } else { 0.0 }
    }
}

/// Bounds of CISPO's detached ratio.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Cispo {
    /// Least factor.
    pub min: f64,
    /// Greatest factor.
    pub max: f64,
}

impl Default for Cispo {
    fn default() -> Self {
        Self { min: 0.0, max: 5.0 }
    }
}

/// How far a token's probability may move before DPPO leaves it out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Divergence {
    /// Difference of the token's probabilities.
    #[default]
    Tv,
    /// KL of the two-way split "this token or another".
    Kl,
}

/// Mask of DPPO; its bounds are the objective's `clip_low` and `clip_high`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Dppo {
    /// Measure of the move.
    pub divergence: Divergence,
    /// Greatest factor.
    pub max: f64,
}

impl Default for Dppo {
    fn default() -> Self {
        Self { divergence: Divergence::Tv, max: 20.0 }
    }
}

/// What is maximised for a token.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Surrogate {
    /// `min(r A, clip(r, 1 - low, 1 + high) A)` (PPO, Schulman et al. 2017, arXiv 1707.06347, eq. 7).
    #[default]
    Clip,
    /// `sg(clamp(r, min, max)) A log p` (CISPO, MiniMax-M1, arXiv 2506.13585, eq. 4).
    Cispo(Cispo),
    /// `4/tau sigmoid(tau (r - 1)) A` (SAPO, Gao et al. 2025, arXiv 2511.20347, eq. 6).
    Sapo(Sapo),
    /// `sg(phi(w)) A log p`, w being the completion's importance weight (VESPO, as in TRL,
    /// `trl/trainer/grpo_trainer.py`, `get_gamma_weights`).
    Vespo(Vespo),
    /// `sg(min(r, max)) A log p` where the move of p stays within bounds, else nothing (DPPO, arXiv 2602.04879).
    Dppo(Dppo),
    /// `A log p` (REINFORCE, Williams 1992; GPG, Chu et al. 2025, arXiv 2504.02546, eq. 5).
    Reinforce,
}

/// Which bound held a token's term.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bound {
    /// None.
    Free,
    /// The lower one, with a negative advantage.
    Low,
    /// The upper one, with a positive advantage.
    High,
    /// A cap that holds whatever the clip range says: `delta`, dual clip, CISPO's bounds.
    Cap,
}

/// A token's term.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Term {
    /// To be maximised.
    pub value: f64,
    /// Derivative by the log-ratio.
    pub through: f64,
    /// Derivative by the logprob, the ratio held still.
    pub direct: f64,
    /// What held it.
    pub bound: Bound,
}

/// What a term is computed from.
#[derive(Debug, Clone, Copy)]
pub struct TermInputs {
    /// New to old policy, at the objective's level.
    pub ratio: f64,
    /// VESPO's weight of the completion; 1 elsewhere.
    pub phi: f64,
    /// Advantage.
    pub advantage: f64,
    /// Logprob under the new policy.
    pub new: f64,
    /// Logprob under the old policy.
    pub old: f64,
}

impl Surrogate {
    /// The term of one token; `delta` caps the unclipped ratio, `dual_clip` the ratio of negative advantages.
    pub fn term(&self, x: TermInputs, clip: ClipRange, delta: Option<f64>, dual_clip: Option<f64>) -> Term {
        let TermInputs { ratio, advantage, new, .. } = x;
        let detached = |factor: f64, bound| {
            let direct = factor * advantage;
            Term { value: direct * new, through: 0.0, direct, bound }
        };
        match self {
            Self::Clip => clipped(ratio, advantage, clip, delta, dual_clip),
            Self::Cispo(c) => {
                let bound = if ratio > c.max && advantage > 0.0 {
                    Bound::High
                } else if ratio < c.min && advantage < 0.0 {
                    Bound::Low
                } else if ratio > c.max || ratio < c.min {
                    Bound::Cap
                } else {
                    Bound::Free
                };
                detached(ratio.clamp(c.min, c.max), bound)
            }
            Self::Sapo(s) => {
                let tau = if advantage > 0.0 { s.tau_pos } else { s.tau_neg };
                let gate = 1.0 / (1.0 + (-tau * (ratio - 1.0)).exp());
                let value = 4.0 / tau * gate * advantage;
                let through = 4.0 * gate * (1.0 - gate) * ratio * advantage;
                Term { value, through, direct: 0.0, bound: Bound::Free }
            }
            Self::Vespo(_) => detached(x.phi, Bound::Free),
            Self::Dppo(d) => {
                let bound = if d.within(x.new, x.old, advantage, clip) {
                    Bound::Free
                } else if advantage > 0.0 {
                    Bound::High
                } else {
                    Bound::Low
                };
                detached(if bound == Bound::Free { ratio.min(d.max) } else { 0.0 }, bound)
            }
            Self::Reinforce => detached(1.0, Bound::Free),
        }
    }
}

fn clipped(ratio: f64, advantage: f64, clip: ClipRange, delta: Option<f64>, dual_clip: Option<f64>) -> Term {
    let (low, high) = (1.0 - clip.low, 1.0 + clip.high);
    let unclipped = delta.map_or(ratio, |d| ratio.min(d));
    let (free, bounded) = (unclipped * advantage, ratio.clamp(low, high) * advantage);
    let bound = if unclipped < low && advantage < 0.0 {
        Bound::Low
    } else if unclipped > high && advantage > 0.0 {
        Bound::High
    } else if unclipped < ratio && free <= bounded {
        Bound::Cap
    } else {
        Bound::Free
    };
    let value = free.min(bounded);
    if let Some(cap) = dual_clip.map(|c| c * advantage)
        && advantage < 0.0
        && value < cap
    {
        return Term { value: cap, through: 0.0, direct: 0.0, bound: Bound::Cap };
    }
    // where a bound holds the term is constant; else d (r A) / d log r = r A
    let moves = if free <= bounded { unclipped == ratio } else { (low..=high).contains(&ratio) };
    Term { value, through: if moves { ratio * advantage } else { 0.0 }, direct: 0.0, bound }
}

impl Dppo {
    /// Whether the token's probability stays within bounds in the direction its advantage pushes.
    fn within(&self, new: f64, old: f64, advantage: f64, clip: ClipRange) -> bool {
        let (p, q) = (new.exp(), old.exp());
        let up = advantage > 0.0;
        match self.divergence {
            Divergence::Tv if up => p - q <= clip.high,
            Divergence::Tv => p - q >= -clip.low,
            Divergence::Kl => {
                let rest = |x: f64| (1.0 - x).max(1e-8);
                let kl = q * (old - new) + rest(q) * (rest(q) / rest(p)).ln();
                if up { p <= q || kl <= clip.high } else { p >= q || kl <= clip.low }
            }
        }
    }
}
