//! Logprobs and advantages to a loss and its gradient: pure, slices in, numbers out.
//!
//! The objective is a composition: the level of the ratio × what bounds it × how tokens are averaged × the KL
//! term. Its gradient by each logprob is written out, so the learner needs no tape and does not know which
//! algorithm it runs. Every mean is over the whole step ([`BatchTotals`]), never over a micro-batch.

pub mod kl;

use serde::{Deserialize, Serialize};

use kl::{KlConfig, Placement};

/// Level at which new and old policies are compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RatioLevel {
    /// `r_t = exp(new_t - old_t)` (PPO, Schulman et al. 2017, arXiv 1707.06347).
    #[default]
    Token,
    /// `r = exp(mean_t (new_t - old_t))` for all tokens of a completion (GSPO, Zheng et al. 2025, arXiv 2507.18071, eq. 7).
    Sequence,
}

/// How a step's tokens are averaged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Aggregation {
    /// Every token of the step weighs the same (DAPO, Yu et al. 2025, arXiv 2503.14476, eq. 8).
    #[default]
    Token,
    /// Every completion weighs the same: mean over its tokens, then over completions (GRPO, arXiv 2402.03300, eq. 3).
    Sequence,
    /// Sum over tokens divided by `completions * max_new_tokens` (Dr.GRPO, arXiv 2503.20783).
    Constant,
}

/// A policy-gradient objective.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Objective {
    /// Level of the ratio.
    pub ratio: RatioLevel,
    /// The ratio may fall to `1 - clip_low` before a negative advantage stops pushing.
    pub clip_low: f64,
    /// The ratio may rise to `1 + clip_high` before a positive advantage stops pushing (clip-higher: above `clip_low`).
    pub clip_high: f64,
    /// Averaging.
    pub aggregation: Aggregation,
    /// Factor of the mean entropy, added to the objective.
    pub entropy_coefficient: f64,
    /// KL to the reference policy.
    pub kl: KlConfig,
}

impl Default for Objective {
    fn default() -> Self {
        Self {
            ratio: RatioLevel::Token,
            clip_low: 0.2,
            clip_high: 0.2,
            aggregation: Aggregation::Token,
            entropy_coefficient: 0.0,
            kl: KlConfig::default(),
        }
    }
}

impl Objective {
    /// Whether reference logprobs are needed.
    pub fn needs_reference(&self) -> bool {
        self.kl.coefficient != 0.0
    }
}

/// Sizes of the whole step, over every micro-batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct BatchTotals {
    /// Tokens that enter the loss.
    pub tokens: usize,
    /// Completions, those without a token in the loss included.
    pub completions: usize,
    /// `max_new_tokens` of the rollouts.
    pub max_new_tokens: usize,
}

/// Completions of a micro-batch, their tokens one after another in flat slices.
#[derive(Debug, Clone, Copy)]
pub struct LossInputs<'a> {
    /// First token of each completion, and the end of the last: completions + 1 numbers.
    pub offsets: &'a [usize],
    /// Logprobs under the weights that are trained.
    pub new: &'a [f32],
    /// Logprobs under the weights that sampled.
    pub old: &'a [f32],
    /// Logprobs under the reference policy, where the objective needs them.
    pub reference: Option<&'a [f32]>,
    /// Entropies under the weights that are trained.
    pub entropy: &'a [f32],
    /// Advantage of each token.
    pub advantages: &'a [f32],
    /// Tokens that enter the loss.
    pub mask: &'a [bool],
    /// Sizes of the whole step.
    pub totals: BatchTotals,
    /// Current KL coefficient.
    pub kl_coefficient: f64,
}

/// Sums over the masked tokens of a micro-batch; they add up over micro-batches.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct LossSums {
    /// The loss; its share of the step's.
    pub loss: f64,
    /// Tokens.
    pub tokens: usize,
    /// Estimated KL to the reference, nats.
    pub kl: f64,
    /// Entropy, nats.
    pub entropy: f64,
    /// Tokens whose ratio is cut off by the clip, so that they have no policy gradient.
    pub clipped: usize,
    /// Greatest |ratio − 1|.
    pub ratio_max_dev: f64,
}

impl LossSums {
    /// Adds another micro-batch's.
    pub fn add(&mut self, other: &Self) {
        self.loss += other.loss;
        self.tokens += other.tokens;
        self.kl += other.kl;
        self.entropy += other.entropy;
        self.clipped += other.clipped;
        self.ratio_max_dev = self.ratio_max_dev.max(other.ratio_max_dev);
    }
}

/// Gradient of a micro-batch's share of the loss.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct LossOutputs {
    /// Sums for the metrics.
    pub sums: LossSums,
    /// d loss / d new logprob, by token; 0 where masked.
    pub d_new: Vec<f32>,
    /// d loss / d entropy, by token; 0 where masked.
    pub d_entropy: Vec<f32>,
}

/// Loss (to be minimised) and gradient of an objective on a micro-batch.
///
/// `L = -sum_t w_t [min(r_t A_t, clip(r_t) A_t) - beta kl_t + c H_t]`, where w_t is the weight of a token in the
/// aggregation. The sums of a completion run over its own tokens in order, in f64, so that a completion's
/// gradient does not depend on the rest of its micro-batch.
pub fn policy_loss(inputs: &LossInputs, objective: &Objective) -> LossOutputs {
    let n = inputs.new.len();
    let mut out = LossOutputs { sums: LossSums::default(), d_new: vec![0.0; n], d_entropy: vec![0.0; n] };
    for row in inputs.offsets.windows(2) {
        completion_loss(row[0]..row[1], inputs, objective, &mut out);
    }
    out
}

fn completion_loss(
    row: std::ops::Range<usize>,
    inputs: &LossInputs,
    objective: &Objective,
    out: &mut LossOutputs,
) {
    let tokens: Vec<usize> = row.filter(|&t| inputs.mask[t]).collect();
    if tokens.is_empty() {
        return;
    }
    let totals = &inputs.totals;
    let weight = match objective.aggregation {
        Aggregation::Token => 1.0 / totals.tokens.max(1) as f64,
        Aggregation::Sequence => 1.0 / (tokens.len() * totals.completions) as f64,
        Aggregation::Constant => 1.0 / (totals.completions * totals.max_new_tokens) as f64,
    };
    let log_ratio = |t: usize| f64::from(inputs.new[t]) - f64::from(inputs.old[t]);
    let sequence = tokens.iter().map(|&t| log_ratio(t)).sum::<f64>() / tokens.len() as f64;
    let (low, high) = (1.0 - objective.clip_low, 1.0 + objective.clip_high);
    let mut sequence_slope = 0.0;
    for &t in &tokens {
        let ratio = match objective.ratio {
            RatioLevel::Token => log_ratio(t).exp(),
            RatioLevel::Sequence => sequence.exp(),
        };
        let advantage = f64::from(inputs.advantages[t]);
        let (free, bounded) = (ratio * advantage, ratio.clamp(low, high) * advantage);
        let clipped = bounded < free;
        let surrogate = free.min(bounded);
        // d/d new_t of the surrogate: r A where it is not clipped (d r / d new = r)
        let slope = if clipped { 0.0 } else { free };
        let mut d_new = match objective.ratio {
            RatioLevel::Token => -weight * slope,
            RatioLevel::Sequence => {
                sequence_slope += slope;
                0.0
            }
        };
        let sums = &mut out.sums;
        sums.loss -= weight * surrogate;
        sums.tokens += 1;
        sums.clipped += usize::from(clipped);
        sums.ratio_max_dev = sums.ratio_max_dev.max((ratio - 1.0).abs());
        let entropy = f64::from(inputs.entropy[t]);
        sums.entropy += entropy;
        if objective.entropy_coefficient != 0.0 {
            sums.loss -= weight * objective.entropy_coefficient * entropy;
            out.d_entropy[t] = (-weight * objective.entropy_coefficient) as f32;
        }
        if let Some(reference) = inputs.reference {
            let (new, reference) = (f64::from(inputs.new[t]), f64::from(reference[t]));
            let (kl, kl_slope) = objective.kl.estimator.value_and_slope(new, reference);
            sums.kl += kl;
            if objective.kl.placement == Placement::Loss {
                sums.loss += weight * inputs.kl_coefficient * kl;
                d_new += weight * inputs.kl_coefficient * kl_slope;
            }
        }
        out.d_new[t] = d_new as f32;
    }
    if objective.ratio == RatioLevel::Sequence {
        // every token's logprob moves the completion's one ratio by 1 / tokens
        let each = -weight * sequence_slope / tokens.len() as f64;
        for &t in &tokens {
            out.d_new[t] = (f64::from(out.d_new[t]) + each) as f32;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Case {
        offsets: Vec<usize>,
        new: Vec<f32>,
        old: Vec<f32>,
        reference: Vec<f32>,
        entropy: Vec<f32>,
        advantages: Vec<f32>,
        mask: Vec<bool>,
    }

    /// Ratios inside and outside the clip, both signs of the advantage, a masked token.
    fn case() -> Case {
        Case {
            offsets: vec![0, 3, 5, 8],
            new: vec![-1.0, -0.5, -2.0, -0.7, -1.1, -0.3, -0.9, -1.5],
            old: vec![-1.1, -0.9, -2.05, -0.2, -1.0, -0.3, -0.85, -1.9],
            reference: vec![-1.3, -0.4, -2.5, -0.7, -1.0, -0.6, -0.8, -1.2],
            entropy: vec![0.9, 0.8, 1.2, 0.4, 0.6, 0.2, 0.5, 1.0],
            advantages: vec![1.3, 1.3, 1.3, -0.8, -0.8, 0.4, 0.4, 0.4],
            mask: vec![true, true, true, true, true, true, false, true],
        }
    }

    fn run(c: &Case, rows: std::ops::Range<usize>, objective: &Objective) -> LossOutputs {
        let (from, to) = (c.offsets[rows.start], c.offsets[rows.end]);
        let offsets: Vec<usize> = c.offsets[rows.start..=rows.end].iter().map(|o| o - from).collect();
        let inputs = LossInputs {
            offsets: &offsets,
            new: &c.new[from..to],
            old: &c.old[from..to],
            reference: Some(&c.reference[from..to]),
            entropy: &c.entropy[from..to],
            advantages: &c.advantages[from..to],
            mask: &c.mask[from..to],
            totals: BatchTotals { tokens: 7, completions: 3, max_new_tokens: 4 },
            kl_coefficient: 0.1,
        };
        policy_loss(&inputs, objective)
    }

    fn objectives() -> Vec<Objective> {
        let mut all = Vec::new();
        for ratio in [RatioLevel::Token, RatioLevel::Sequence] {
            for aggregation in [Aggregation::Token, Aggregation::Sequence, Aggregation::Constant] {
                for estimator in [kl::Estimator::K1, kl::Estimator::K2, kl::Estimator::K3] {
                    let kl = KlConfig { coefficient: 0.1, estimator, ..KlConfig::default() };
                    all.push(Objective {
                        ratio,
                        aggregation,
                        clip_high: 0.28,
                        entropy_coefficient: 0.05,
                        kl,
                        ..Default::default()
                    });
                }
            }
        }
        all
    }

    #[test]
    fn gradients_match_finite_differences() {
        for objective in objectives() {
            let out = run(&case(), 0..3, &objective);
            for t in 0..8 {
                let shifted = |h: f32| {
                    let mut c = case();
                    c.new[t] += h;
                    run(&c, 0..3, &objective).sums.loss
                };
                let numeric = (shifted(5e-4) - shifted(-5e-4)) / 1e-3;
                assert!(
                    (numeric - f64::from(out.d_new[t])).abs() < 2e-4,
                    "{objective:?} token {t}: {numeric} {}",
                    out.d_new[t]
                );
            }
        }
    }

    #[test]
    fn splitting_a_step_changes_no_bit_of_the_gradient() {
        for objective in objectives() {
            let whole = run(&case(), 0..3, &objective);
            let (a, b) = (run(&case(), 0..1, &objective), run(&case(), 1..3, &objective));
            assert_eq!(whole.d_new, [a.d_new, b.d_new].concat());
            assert!((whole.sums.loss - a.sums.loss - b.sums.loss).abs() < 1e-12);
        }
    }

    #[test]
    fn a_masked_token_has_no_gradient_and_counts_nowhere() {
        let out = run(&case(), 0..3, &Objective::default());
        assert_eq!((out.d_new[6], out.sums.tokens), (0.0, 7));
    }

    #[test]
    fn on_policy_the_ratio_is_exactly_one_and_nothing_is_clipped() {
        let mut c = case();
        c.old = c.new.clone();
        let out = run(&c, 0..3, &Objective::default());
        assert_eq!((out.sums.ratio_max_dev, out.sums.clipped), (0.0, 0));
    }
}
