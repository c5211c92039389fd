//! Logprobs and advantages to a loss and its gradient: pure, slices in, numbers out.
//!
//! The objective is a composition: the level of the ratio × the policy term and its bounds × how tokens are
//! averaged × the KL term. Its gradient by each logprob is written out, so the learner needs no tape and does not
//! know which algorithm it runs; [`presets`] holds the named ones. Every mean is over the whole step
//! ([`BatchTotals`]), never over a micro-batch, and a completion's sums run over its own tokens in order.

pub mod correction;
pub mod entropy;
pub mod kl;
pub mod preference;
pub mod presets;
pub mod surrogate;
pub mod value;

use std::ops::Range;

use serde::{Deserialize, Serialize};

use correction::{Covariance, SamplerCorrection};
use entropy::EntropyControl;
use kl::{KlConfig, Placement};
use surrogate::{Bound, ClipRange, Surrogate, TermInputs};

/// Level at which new and old policies are compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RatioLevel {
    /// `r_t = exp(new_t - old_t)` (PPO, Schulman et al. 2017, arXiv 1707.06347).
    #[default]
    Token,
    /// `r = exp(mean_t (new_t - old_t))` for all tokens of a completion (GSPO, Zheng et al. 2025, arXiv 2507.18071, eq. 7).
    Sequence,
    /// The value of [`Self::Sequence`], with each token's gradient from its own advantage (GSPO-token, eq. 14).
    SequenceToken,
    /// `r = exp(sum_t (new_t - old_t))`: the completion as one action (RLOO, arXiv 2402.14740).
    Product,
    /// Geometric mean of token ratios that are clipped first, in log space (GMPO, Zhao et al. 2025, arXiv 2507.20673, eq. 4).
    Geometric,
}

/// How a step's tokens are averaged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Aggregation {
    /// Every token of the step weighs the same (DAPO, Yu et al. 2025, arXiv 2503.14476, eq. 8).
    #[default]
    Token,
    /// Every completion weighs the same: mean over its tokens, then over completions (GRPO, arXiv 2402.03300, eq. 3).
    Sequence,
    /// Sum over a completion's tokens, then mean over completions (LUSPO; verl's `seq-mean-token-sum`).
    SequenceSum,
    /// Sum over tokens divided by `completions * max_new_tokens` (Dr.GRPO, arXiv 2503.20783).
    Constant,
    /// Sum over tokens.
    Sum,
}

impl Aggregation {
    /// Weight of each token of a completion with `tokens` tokens in the loss.
    pub fn token_weight(self, tokens: usize, totals: &BatchTotals) -> f64 {
        let completions = totals.completions.max(1) as f64;
        match self {
            Self::Token => 1.0 / totals.tokens.max(1) as f64,
            Self::Sequence => 1.0 / (tokens.max(1) as f64 * completions),
            Self::SequenceSum => 1.0 / completions,
            Self::Constant => 1.0 / (completions * totals.max_new_tokens.max(1) as f64),
            Self::Sum => 1.0,
        }
    }
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
    /// Greatest ratio of the unclipped term (INTELLECT-2, arXiv 2505.07291, section 3.4: two-sided clipping).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub delta: Option<f64>,
    /// A negative advantage costs at most this many times itself (Ye et al. 2020, arXiv 1912.09729, eq. 5).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dual_clip: Option<f64>,
    /// Averaging.
    pub aggregation: Aggregation,
    /// Factor of the mean entropy over the step's tokens, added to what is maximised.
    pub entropy_coefficient: f64,
    /// Share of the tokens, the most uncertain ones, that keep their policy term (arXiv 2506.01939).
    pub top_entropy: f64,
    /// A completion with a negative advantage whose mean `log p_sampler - log p_new` is above this loses its policy
    /// term (DeepSeek-V3.2, arXiv 2512.02556, section 3.1: off-policy sequence masking).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub off_policy_limit: Option<f64>,
    /// The policy term.
    pub surrogate: Surrogate,
    /// How the entropy's factor moves.
    pub entropy_control: EntropyControl,
    /// Importance weights for rollouts whose logprobs are not the learner's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sampler_correction: Option<SamplerCorrection>,
    /// What is done about the tokens that drive the entropy down.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub covariance: Option<Covariance>,
    /// KL to the reference policy.
    pub kl: KlConfig,
}

impl Default for Objective {
    fn default() -> Self {
        Self {
            ratio: RatioLevel::Token,
            clip_low: 0.2,
            clip_high: 0.2,
            delta: None,
            dual_clip: None,
            aggregation: Aggregation::Token,
            entropy_coefficient: 0.0,
            top_entropy: 1.0,
            off_policy_limit: None,
            surrogate: Surrogate::Clip,
            entropy_control: EntropyControl::Fixed,
            sampler_correction: None,
            covariance: None,
            kl: KlConfig::default(),
        }
    }
}

impl Objective {
    /// Whether reference logprobs are needed.
    pub fn needs_reference(&self) -> bool {
        let kl = &self.kl;
        kl.coefficient != 0.0 || kl.measure || matches!(kl.control, kl::Control::Scheduled { .. })
    }
}

/// Sizes of the whole step, over every micro-batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct BatchTotals {
    /// Tokens that enter the loss.
    pub tokens: usize,
    /// Tokens that enter the entropy bonus: those of `tokens` that reach the entropy threshold, all without one.
    pub entropy_tokens: usize,
    /// Completions, those without a token in the loss included.
    pub completions: usize,
    /// `max_new_tokens` of the rollouts.
    pub max_new_tokens: usize,
}

/// Completions of a micro-batch, their tokens one after another in flat slices.
#[derive(Debug, Clone, Copy, Default)]
pub struct LossInputs<'a> {
    /// First token of each completion, and the end of the last: completions + 1 numbers.
    pub offsets: &'a [usize],
    /// Logprobs under the weights that are trained.
    pub new: &'a [f32],
    /// Logprobs at the start of the step.
    pub old: &'a [f32],
    /// Logprobs under the reference policy, where the objective needs them.
    pub reference: Option<&'a [f32]>,
    /// Logprobs as sampled, where they differ from `old`; only the off-policy limit reads them, NaN counts as equal.
    pub sampler: Option<&'a [f32]>,
    /// Entropies under the weights that are trained.
    pub entropy: &'a [f32],
    /// Advantage of each token.
    pub advantages: &'a [f32],
    /// Tokens that enter the loss.
    pub mask: &'a [bool],
    /// Factor of each token's policy term, from [`SamplerCorrection::weights`].
    pub weights: Option<&'a [f32]>,
    /// Coefficient of |log r| by token, from [`correction::kl_cov`].
    pub drift: Option<&'a [f32]>,
    /// Entropy below which a token loses its policy term, from [`correction::entropy_threshold`].
    pub entropy_threshold: Option<f32>,
    /// Sizes of the whole step.
    pub totals: BatchTotals,
    /// Current KL coefficient.
    pub kl_coefficient: f64,
    /// Current entropy coefficient.
    pub entropy_coefficient: f64,
}

/// Sums over the masked-in tokens of a micro-batch; they add up over micro-batches.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct LossSums {
    /// The loss; its share of the step's.
    pub loss: f64,
    /// The part of `loss` that is the entropy bonus; negative or 0.
    pub entropy_bonus: f64,
    /// Tokens.
    pub tokens: usize,
    /// Estimated KL to the reference as it enters the loss, nats.
    pub kl: f64,
    /// Entropy, nats.
    pub entropy: f64,
    /// `log p_old - log p_new`, nats: k1 of the move since the start of the step.
    pub moved: f64,
    /// |log p_old − log p_new|, nats.
    pub moved_abs: f64,
    /// Ratios, at the objective's level.
    pub ratio: f64,
    /// Tokens whose ratio is cut off by the clip, so that they have no policy gradient.
    pub clipped: usize,
    /// Those below the range with a negative advantage.
    pub clipped_low: usize,
    /// Those above the range with a positive advantage.
    pub clipped_high: usize,
    /// Tokens held by a cap instead (`delta`, dual clip, CISPO's bounds against the advantage's sign).
    pub capped: usize,
    /// Greatest |ratio − 1| of a token.
    pub ratio_max_dev: f64,
}

impl LossSums {
    /// Adds another micro-batch's.
    pub fn add(&mut self, other: &Self) {
        self.loss += other.loss;
        self.entropy_bonus += other.entropy_bonus;
        self.tokens += other.tokens;
        self.kl += other.kl;
        self.entropy += other.entropy;
        self.moved += other.moved;
        self.moved_abs += other.moved_abs;
        self.ratio += other.ratio;
        self.clipped += other.clipped;
        self.clipped_low += other.clipped_low;
        self.clipped_high += other.clipped_high;
        self.capped += other.capped;
        self.ratio_max_dev = self.ratio_max_dev.max(other.ratio_max_dev);
    }

    fn count(&mut self, bound: Bound) {
        match bound {
            Bound::Free => {}
            Bound::Low => self.clipped_low += 1,
            Bound::High => self.clipped_high += 1,
            Bound::Cap => self.capped += 1,
        }
        self.clipped += usize::from(matches!(bound, Bound::Low | Bound::High));
    }
}

/// What happened in one completion.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct RowStats {
    /// Tokens in the loss.
    pub tokens: usize,
    /// As in [`LossSums`].
    pub clipped_low: usize,
    /// As in [`LossSums`].
    pub clipped_high: usize,
    /// VESPO's weight; 1 elsewhere.
    pub phi: f64,
}

/// Gradient of a micro-batch's share of the loss.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct LossOutputs {
    /// Sums for the metrics.
    pub sums: LossSums,
    /// One a completion.
    pub rows: Vec<RowStats>,
    /// d loss / d new logprob, by token; 0 where masked.
    pub d_new: Vec<f32>,
    /// d loss / d entropy, by token; 0 where masked.
    pub d_entropy: Vec<f32>,
}

/// Loss (to be minimised) and gradient of an objective on a micro-batch.
///
/// `L = -sum_t w_t [k_t J_t - beta kl_t] - c mean_t H_t`, where w_t is the weight of a token in the aggregation, k_t
/// the product of its importance weight and selections (entropy threshold, off-policy limit), and J_t the policy
/// term. The sums of a completion run over its own tokens in order, in f64, so that a completion's gradient does not
/// depend on the rest of its micro-batch.
pub fn policy_loss(inputs: &LossInputs, objective: &Objective) -> LossOutputs {
    let n = inputs.new.len();
    let mut out = LossOutputs { d_new: vec![0.0; n], d_entropy: vec![0.0; n], ..LossOutputs::default() };
    for row in inputs.offsets.windows(2) {
        let before = out.sums;
        let phi = completion_loss(row[0]..row[1], inputs, objective, &mut out);
        out.rows.push(RowStats {
            tokens: out.sums.tokens - before.tokens,
            clipped_low: out.sums.clipped_low - before.clipped_low,
            clipped_high: out.sums.clipped_high - before.clipped_high,
            phi,
        });
    }
    out
}

/// A completion's own view: its tokens in the loss, and what they share.
struct Row<'a> {
    inputs: &'a LossInputs<'a>,
    tokens: Vec<usize>,
    /// Log of the ratio that all tokens share; `None` at token level.
    log_ratio: Option<f64>,
    /// By how much a token's logprob moves the shared log-ratio, by position in `tokens`; empty at token level.
    shares: Vec<f64>,
    /// What clipping before the mean did to each token (geometric level only).
    bounds: Vec<Bound>,
}

impl<'a> Row<'a> {
    fn new(inputs: &'a LossInputs<'a>, tokens: Vec<usize>, objective: &Objective) -> Self {
        let n = tokens.len() as f64;
        let mut row = Self { inputs, tokens, log_ratio: None, shares: Vec::new(), bounds: Vec::new() };
        let sum = || row.tokens.iter().map(|&t| row.moved(t)).sum::<f64>();
        match objective.ratio {
            RatioLevel::Token => {}
            RatioLevel::SequenceToken => row.log_ratio = Some(sum() / n),
            RatioLevel::Sequence => {
                (row.log_ratio, row.shares) = (Some(sum() / n), vec![1.0 / n; row.tokens.len()])
            }
            RatioLevel::Product => (row.log_ratio, row.shares) = (Some(sum()), vec![1.0; row.tokens.len()]),
            RatioLevel::Geometric => row.geometric(objective),
        }
        row
    }

    /// `log p_new - log p_old`.
    fn moved(&self, t: usize) -> f64 {
        f64::from(self.inputs.new[t]) - f64::from(self.inputs.old[t])
    }

    /// Whether the token's entropy reaches the threshold.
    fn uncertain(&self, t: usize) -> bool {
        self.inputs.entropy_threshold.is_none_or(|h| self.inputs.entropy[t] >= h)
    }

    fn geometric(&mut self, objective: &Objective) {
        let kept = self.tokens.iter().filter(|&&t| self.uncertain(t)).count().max(1) as f64;
        let mut sum = 0.0;
        for &t in &self.tokens {
            let (moved, up) = (self.moved(t), self.inputs.advantages[t] > 0.0);
            let (bounded, bound) = if up && moved > objective.clip_high {
                (objective.clip_high, Bound::High)
            } else if !up && moved < -objective.clip_low {
                (-objective.clip_low, if self.inputs.advantages[t] < 0.0 { Bound::Low } else { Bound::Free })
            } else {
                (moved, Bound::Free)
            };
            let kept_here = self.uncertain(t);
            sum += if kept_here { bounded } else { 0.0 };
            self.shares.push(if kept_here && bounded == moved { 1.0 / kept } else { 0.0 });
            self.bounds.push(bound);
        }
        self.log_ratio = Some(sum / kept);
    }

    /// Whether the whole completion is one term, so that a selection of tokens acts within the ratio.
    fn is_one_term(objective: &Objective) -> bool {
        matches!(objective.ratio, RatioLevel::Product | RatioLevel::Geometric)
    }

    fn mean_drift_from_sampler(&self) -> f64 {
        let sampler = self.inputs.sampler.unwrap_or(self.inputs.old);
        let drift = |t: usize| f64::from(sampler[t]) - f64::from(self.inputs.new[t]);
        let finite = |d: f64| if d.is_nan() { 0.0 } else { d };
        self.tokens.iter().map(|&t| finite(drift(t))).sum::<f64>() / self.tokens.len().max(1) as f64
    }

    /// Log importance weight of the completion for VESPO.
    fn log_weight(&self) -> f64 {
        let moved: f64 = self.tokens.iter().map(|&t| self.moved(t).clamp(-20.0, 20.0)).sum();
        let sampler = self.inputs.weights.map_or(0.0, |w| {
            let log = |t: usize| {
                f64::from(w[t]).ln().clamp(surrogate::Vespo::LOG_FLOOR, surrogate::Vespo::LOG_CEILING)
            };
            self.tokens.iter().map(|&t| log(t)).sum()
        });
        moved + sampler
    }
}

/// Adds one completion; gives VESPO's weight of it.
fn completion_loss(
    range: Range<usize>,
    inputs: &LossInputs,
    objective: &Objective,
    out: &mut LossOutputs,
) -> f64 {
    let totals = &inputs.totals;
    let completions = totals.completions.max(1) as f64;
    let first = range.start;
    let has_tokens = !range.is_empty();
    let row = Row::new(inputs, range.filter(|&t| inputs.mask[t]).collect(), objective);
    let is_vespo = match &objective.surrogate {
        Surrogate::Vespo(v) => Some(v),
        _ => None,
    };
    let phi = is_vespo
        .filter(|_| has_tokens)
        .map_or(1.0, |v| v.phi(row.log_weight(), f64::from(inputs.advantages[first])));
    if row.tokens.is_empty() {
        // the empty product is 1: a constant, kept so that losses compare with other implementations'
        if has_tokens && Row::is_one_term(objective) {
            out.sums.loss -= f64::from(inputs.advantages[first]) / completions;
        }
        return phi;
    }
    let weight = objective.aggregation.token_weight(row.tokens.len(), totals);
    let bonus = inputs.entropy_coefficient / totals.entropy_tokens.max(1) as f64;
    let clip = ClipRange { low: objective.clip_low, high: objective.clip_high };
    let clip = if objective.ratio == RatioLevel::Geometric {
        ClipRange { low: 1.0, high: f64::INFINITY }
    } else {
        clip
    };
    let off_policy = objective.off_policy_limit.is_some_and(|limit| row.mean_drift_from_sampler() > limit);
    // derivative of the completion's terms by the log-ratio they share
    let mut shared = 0.0;
    let mut d_new = vec![0.0; row.tokens.len()];
    for (i, &t) in row.tokens.iter().enumerate() {
        let (new, old) = (f64::from(inputs.new[t]), f64::from(inputs.old[t]));
        let advantage = f64::from(inputs.advantages[t]);
        let moved = row.moved(t);
        let ratio = row.log_ratio.unwrap_or(moved).exp();
        let term = objective.surrogate.term(
            TermInputs { ratio, phi, advantage, new, old },
            clip,
            objective.delta,
            objective.dual_clip,
        );
        let mut keep = if is_vespo.is_some() { 1.0 } else { inputs.weights.map_or(1.0, |w| f64::from(w[t])) };
        if (off_policy && advantage < 0.0) || (!row.uncertain(t) && !Row::is_one_term(objective)) {
            keep = 0.0;
        }
        let sums = &mut out.sums;
        sums.loss -= weight * keep * term.value;
        d_new[i] -= weight * keep * term.direct;
        let mut through = -weight * keep * term.through;
        sums.tokens += 1;
        sums.moved -= moved;
        sums.moved_abs += moved.abs();
        sums.ratio += ratio;
        sums.ratio_max_dev = sums.ratio_max_dev.max(moved.exp_m1().abs());
        sums.count(row.bounds.get(i).copied().unwrap_or(term.bound));

        let entropy = f64::from(inputs.entropy[t]);
        sums.entropy += entropy;
        if bonus != 0.0 && row.uncertain(t) {
            sums.loss -= bonus * entropy;
            sums.entropy_bonus -= bonus * entropy;
            out.d_entropy[t] = (-bonus) as f32;
        }
        if let Some(drift) = inputs.drift {
            let c = weight * keep * f64::from(drift[t]);
            sums.loss += c * moved.abs();
            d_new[i] += if moved == 0.0 { 0.0 } else { c * moved.signum() };
        }
        if let Some(reference) = inputs.reference {
            let kl = objective.kl.token(new, f64::from(reference[t]), ratio);
            sums.kl += kl.value;
            if objective.kl.placement == Placement::Loss {
                let c = weight * inputs.kl_coefficient;
                sums.loss += c * kl.value;
                d_new[i] += c * kl.direct;
                through += c * kl.through;
            }
        }
        if row.shares.is_empty() {
            d_new[i] += through;
        } else {
            shared += through;
        }
    }
    for (i, &t) in row.tokens.iter().enumerate() {
        out.d_new[t] = (d_new[i] + row.shares.get(i).map_or(0.0, |s| s * shared)) as f32;
    }
    phi
}
