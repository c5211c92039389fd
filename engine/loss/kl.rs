//! KL to the reference policy: estimators, their gradients, where the penalty goes, and its coefficient.
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
    /// |k1| (verl, `verl/trainer/ppo/core_algos.py`, `kl_penalty`).
    Abs,
}

impl Estimator {
    /// Value and derivative by the policy's logprob, for `new` and `reference` logprobs of one token.
    pub fn value_and_slope(self, new: f64, reference: f64) -> (f64, f64) {
        let d = reference - new;
        match self {
            Self::K1 => (-d, 1.0),
            Self::K2 => (0.5 * d * d, -d),
            Self::K3 => (d.exp_m1() - d, -d.exp_m1()),
            Self::Abs => (d.abs(), if d == 0.0 { 0.0 } else { -d.signum() }),
        }
    }
}

/// What the penalty's gradient is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Gradient {
    /// The estimator's own (GRPO, Shao et al. 2024, arXiv 2402.03300, eq. 4).
    #[default]
    Plain,
    /// That of k2, whose expectation is the gradient of the KL; the value stays (verl's `k1+`, `k3+`).
    StraightThrough,
    /// The estimator times the policy's ratio to the sampling policy, which makes value and gradient unbiased
    /// when the samples are old (DeepSeek-V3.2, arXiv 2512.02556, section 3.1; TRL's `use_bias_correction_kl`).
    Weighted,
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
    /// A straight line from the configured coefficient to `end`.
    Scheduled {
        /// Last value.
        end: f64,
        /// Steps until it is reached.
        steps: u64,
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
    /// Gradient of a penalty in the loss.
    pub gradient: Gradient,
    /// Placement.
    pub placement: Placement,
    /// Control of the coefficient.
    pub control: Control,
    /// Keeps a reference policy and logs the KL to it even where the coefficient is 0.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub measure: bool,
}

impl Default for KlConfig {
    fn default() -> Self {
        Self {
            coefficient: 0.0,
            estimator: Estimator::K3,
            gradient: Gradient::Plain,
            placement: Placement::Loss,
            control: Control::Fixed,
            measure: false,
        }
    }
}

/// One token's penalty.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TokenKl {
    /// Nats.
    pub value: f64,
    /// Derivative by the policy's logprob, the ratio held still.
    pub direct: f64,
    /// Derivative by the log-ratio.
    pub through: f64,
}

impl KlConfig {
    /// Penalty of one token, for its `new` and `reference` logprobs and the `ratio` that the objective uses.
    pub fn token(&self, new: f64, reference: f64, ratio: f64) -> TokenKl {
        let (value, slope) = self.estimator.value_and_slope(new, reference);
        match self.gradient {
            Gradient::Plain => TokenKl { value, direct: slope, through: 0.0 },
            Gradient::StraightThrough => TokenKl { value, direct: new - reference, through: 0.0 },
            Gradient::Weighted => {
                TokenKl { value: value * ratio, direct: slope * ratio, through: value * ratio }
            }
        }
    }

    /// The KL that an adaptive coefficient holds, nats per token.
    pub fn target(&self) -> Option<f64> {
        match self.control {
            Control::Adaptive { target, .. } => Some(target),
            _ => None,
        }
    }

    /// The next coefficient after a step that measured `kl` nats per token over `tokens` completion tokens.
    pub fn next_coefficient(&self, coefficient: f64, kl: f64, tokens: usize) -> f64 {
        match self.control {
            Control::Fixed => coefficient,
            Control::Adaptive { target, horizon } => {
                let error = (kl / target - 1.0).clamp(-0.2, 0.2);
                coefficient * (1.0 + error * tokens as f64 / horizon)
            }
            Control::Scheduled { end, steps } => {
                let next = coefficient + (end - self.coefficient) / steps.max(1) as f64;
                next.clamp(end.min(self.coefficient), end.max(self.coefficient))
            }
        }
    }

    /// Penalty of one completion: `coefficient` times the summed estimator over its tokens.
    pub fn reward_penalty(&self, coefficient: f64, old: &[f32], reference: &[f32]) -> f64 {
        let kl = |(&o, &r): (&f32, &f32)| self.estimator.value_and_slope(f64::from(o), f64::from(r)).0;
        coefficient * old.iter().zip(reference).map(kl).sum::<f64>()
    }

    /// Takes the penalty of every token off its own reward, in place (PPO, Ouyang et al. 2022, arXiv 2203.02155, eq. 2).
    pub fn penalise_tokens(&self, coefficient: f64, old: &[f32], reference: &[f32], rewards: &mut [f64]) {
        for ((reward, &o), &r) in rewards.iter_mut().zip(old).zip(reference) {
            *reward -= coefficient * self.estimator.value_and_slope(f64::from(o), f64::from(r)).0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: [Estimator; 4] = [Estimator::K1, Estimator::K2, Estimator::K3, Estimator::Abs];

    #[test]
    fn slopes_match_finite_differences() {
        for estimator in ALL {
            let f = |x: f64| estimator.value_and_slope(x, -1.7).0;
            let (slope, h) = (estimator.value_and_slope(-1.2, -1.7).1, 1e-6);
            assert!((slope - (f(-1.2 + h) - f(-1.2 - h)) / (2.0 * h)).abs() < 1e-8, "{estimator:?}");
        }
    }

    #[test]
    fn k1_and_k3_average_to_the_true_kl() {
        let (p, q) = ([0.7f64, 0.2, 0.1], [0.5f64, 0.3, 0.2]);
        let exact: f64 = p.iter().zip(q).map(|(p, q)| p * (p / q).ln()).sum();
        for estimator in [Estimator::K1, Estimator::K3] {
            let mean: f64 =
                p.iter().zip(q).map(|(p, q)| p * estimator.value_and_slope(p.ln(), q.ln()).0).sum();
            assert!((mean - exact).abs() < 1e-12);
        }
    }

    #[test]
    fn the_weighted_gradient_is_the_derivative_of_the_weighted_value() {
        let kl = KlConfig { gradient: Gradient::Weighted, ..KlConfig::default() };
        let at = |new: f64| kl.token(new, -1.7, (new + 1.4).exp());
        let (t, h) = (at(-1.2), 1e-6);
        let numeric = (at(-1.2 + h).value - at(-1.2 - h).value) / (2.0 * h);
        assert!((t.direct + t.through - numeric).abs() < 1e-8);
    }

    #[test]
    fn control_pushes_towards_the_target_within_bounds() {
        let control = Control::Adaptive { target: 0.1, horizon: 1000.0 };
        let kl = KlConfig { control, ..KlConfig::default() };
        assert!((kl.next_coefficient(0.2, 10.0, 1000) - 0.24).abs() < 1e-12);
        assert!((kl.next_coefficient(0.2, 0.0, 1000) - 0.16).abs() < 1e-12);
        assert_eq!(kl.next_coefficient(0.2, 0.1, 1000), 0.2);
    }

    #[test]
    fn a_schedule_ends_at_its_end() {
        let kl = KlConfig {
            coefficient: 0.1,
            control: Control::Scheduled { end: 0.02, steps: 4 },
            ..KlConfig::default()
        };
        let mut coefficient = kl.coefficient;
        for _ in 0..4 {
            coefficient = kl.next_coefficient(coefficient, 0.0, 0);
        }
        assert!((coefficient - 0.02).abs() < 1e-12);
        assert_eq!(kl.next_coefficient(0.02, 9.0, 9), 0.02);
    }
}
