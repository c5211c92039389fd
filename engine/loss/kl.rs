//! KL to the reference policy: estimators, where the penalty goes, and its coefficient.
//!
//! With `d = log p_ref - log p` of a sampled token, Schulman's estimators (joschu.net/blog/kl-approx.html) of
//! KL(p || p_ref) are k1 = −d, k2 = d²/2, k3 = e^d − d − 1. All are in nats per token.

use serde::{Deserialize, Serialize};

/// Estimator of the KL divergence from one sample.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Estimator {
    /// Unbiased, high variance, can be negative.
    K1,
    /// Biased, low variance; its gradient is that of the true KL on policy.
    K2,
    /// Unbiased, low variance, never negative (GRPO).
    #[default]
    K3,
}

impl Estimator {
    /// Value and derivative by the policy's logprob, for `new` and `reference` logprobs of one token.
    pub fn value_and_slope(self, new: f64, reference: f64) -> (f64, f64) {
        let d = reference - new;
        match self {
            Self::K1 => (-d, 1.0),
            Self::K2 => (0.5 * d * d, -d),
            Self::K3 => (d.exp_m1() - d, 1.0 - d.exp()),
        }
    }
}

/// Where the penalty enters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Placement {
    /// A term of every token's loss (GRPO).
    #[default]
    Loss,
    /// Subtracted from the completion's reward before the advantage (PPO for language models, RLOO).
    Reward,
}

/// How the coefficient moves.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", deny_unknown_fields)]
pub enum Control {
    /// It does not.
    #[default]
    Fixed,
    /// Proportional control (Ziegler et al. 2019, arXiv 1909.08593, section 2.2):
    /// `coef *= 1 + clip(kl / target - 1, ±0.2) * tokens / horizon`.
    Adaptive {
        /// Wanted KL, nats per token.
        target: f64,
        /// Completion tokens over which a persistent error of 20 % changes the coefficient by 20 %.
        horizon: f64,
    },
}

/// KL control.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct KlConfig {
    /// Factor of the penalty; 0 needs no reference policy.
    pub coefficient: f64,
    /// Estimator.
    pub estimator: Estimator,
    /// Placement.
    pub placement: Placement,
    /// Control of the coefficient.
    pub control: Control,
}

impl Default for KlConfig {
    fn default() -> Self {
        Self {
            coefficient: 0.0,
            estimator: Estimator::K3,
            placement: Placement::Loss,
            control: Control::Fixed,
        }
    }
}

impl KlConfig {
    /// The next coefficient after a step that measured `kl` nats per token over `tokens` completion tokens.
    pub fn next_coefficient(&self, coefficient: f64, kl: f64, tokens: usize) -> f64 {
        match self.control {
            Control::Fixed => coefficient,
            Control::Adaptive { target, horizon } => {
                let error = (kl / target - 1.0).clamp(-0.2, 0.2);
                coefficient * (1.0 + error * tokens as f64 / horizon)
            }
        }
    }

    /// Penalty of one completion: `coefficient` times the summed estimator over its tokens.
    pub fn reward_penalty(&self, coefficient: f64, old: &[f32], reference: &[f32]) -> f64 {
        let kl = |(&o, &r): (&f32, &f32)| self.estimator.value_and_slope(f64::from(o), f64::from(r)).0;
        coefficient * old.iter().zip(reference).map(kl).sum::<f64>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slopes_match_finite_differences() {
        for estimator in [Estimator::K1, Estimator::K2, Estimator::K3] {
            let f = |x: f64| estimator.value_and_slope(x, -1.7).0;
            let (slope, h) = (estimator.value_and_slope(-1.2, -1.7).1, 1e-6);
            assert!((slope - (f(-1.2 + h) - f(-1.2 - h)) / (2.0 * h)).abs() < 1e-8, "{estimator:?}");
        }
    }

    #[test]
    fn k1_and_k3_average_to_the_true_kl() {
        let (p, q) = ([0.7f64, 0.2, 0.1], [0.5f64, 0.25, 0.25]);
        let kl: f64 = p.iter().zip(&q).map(|(p, q)| p * (p / q).ln()).sum();
        for estimator in [Estimator::K1, Estimator::K3] {
            let mean: f64 =
                p.iter().zip(&q).map(|(p, q)| p * estimator.value_and_slope(p.ln(), q.ln()).0).sum();
            assert!((mean - kl).abs() < 1e-12, "{estimator:?}");
        }
    }

    #[test]
    fn the_coefficient_follows_the_error_within_its_clip() {
        let config =
            KlConfig { control: Control::Adaptive { target: 0.1, horizon: 1000.0 }, ..Default::default() };
        assert!((config.next_coefficient(1.0, 0.5, 100) - 1.02).abs() < 1e-12);
        assert!((config.next_coefficient(1.0, 0.09, 100) - 0.99).abs() < 1e-12);
        assert_eq!(KlConfig::default().next_coefficient(0.3, 9.0, 100), 0.3);
    }
}
