//! Preference objectives on the same terms: per-token logprobs in, loss and per-token gradient out.
//!
//! A pair's scores are the summed (or averaged) log-ratios of its two completions to the reference, or plain
//! logprobs without one (CPO, SimPO, ORPO). A loss is a function of the two scores with its derivative beside it; the
//! chain to tokens is common to all. Formulas as in TRL (`trl/trainer/dpo_trainer.py`, `kto_trainer.py`,
//! `cpo_trainer.py`, `orpo_trainer.py`), papers beside each variant.

use serde::{Deserialize, Serialize};

/// A loss of a pair; `z = beta * (chosen score - rejected score - margin)`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PairLoss {
    /// `-log sigma(z)`, label-smoothed (DPO, Rafailov et al. 2023, arXiv 2305.18290, eq. 7; cDPO).
    Sigmoid,
    /// `max(0, 1 - z)` (SLiC-HF, Zhao et al. 2023, arXiv 2305.10425).
    Hinge,
    /// `(h - 1/(2 beta))^2`, h between scores per token (IPO, Azar et al. 2023, arXiv 2310.12036, eq. 17).
    Ipo,
    /// KL to the smoothed label, reversed (EXO, Ji et al. 2024, arXiv 2402.00856, eq. 16).
    ExoPair,
    /// NCA on pairs (Chen et al. 2024, arXiv 2402.05369).
    NcaPair,
    /// Unbiased under label noise (Chowdhury et al. 2024, arXiv 2403.00409).
    Robust,
    /// Binary classifier of each side, without the shift (Jung et al. 2024, arXiv 2404.04656).
    BcoPair,
    /// SPPO with hard labels (Wu et al. 2024, arXiv 2405.00675).
    SppoHard,
    /// Alignment by optimal transport, paired: sorted margins (Melnyk et al. 2024, arXiv 2406.05882). Sorts the whole batch.
    Aot,
    /// The same with each side sorted by itself. Sorts the whole batch.
    AotUnpaired,
    /// Anchored, up for chosen and down for rejected (D'Oosterlinck et al. 2024, arXiv 2408.06266).
    ApoZero,
    /// Anchored, down for both.
    ApoDown,
    /// Log-ratio modulated loss (Lu et al. 2024, arXiv 2406.08414).
    Discopop,
    /// Negative log-likelihood of the chosen tokens (RPO's and CPO's second term).
    Sft,
    /// [`Self::Sigmoid`] of scores per token.
    SigmoidNorm,
    /// `-beta log sigma(log odds ratio)` of mean logprobs (ORPO, Hong et al. 2024, arXiv 2403.07691, eq. 7).
    OddsRatio,
}

impl PairLoss {
    /// Whether it judges each side by its distance from a reference, and says nothing of plain logprobs.
    pub fn needs_reference(self) -> bool {
        matches!(
            self,
            Self::NcaPair
                | Self::BcoPair
                | Self::SppoHard
                | Self::Aot
                | Self::AotUnpaired
                | Self::ApoZero
                | Self::ApoDown
        )
    }

    /// Whether a pair's term depends on the other pairs of the step.
    pub fn sorts_the_step(self) -> bool {
        matches!(self, Self::Aot | Self::AotUnpaired)
    }
}

/// What a log-ratio becomes before two of them are compared (f-DPO, Wang et al. 2023, arXiv 2309.16240).
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Transform {
    /// Itself: reverse KL.
    #[default]
    Identity,
    /// `log 2 + log sigma(t)`: Jensen-Shannon.
    JensenShannon,
    /// `(exp(rate t) - 1) / rate`: forward KL at −1, alpha-divergence at alpha − 1, AlphaPO at −alpha (arXiv 2501.03884).
    Power {
        /// Rate.
        rate: f64,
    },
}

impl Transform {
    fn value_and_slope(self, t: f64) -> (f64, f64) {
        match self {
            Self::Identity => (t, 1.0),
            Self::JensenShannon => (std::f64::consts::LN_2 + log_sigmoid(t), sigmoid(-t)),
            Self::Power { rate } => ((rate * t).exp_m1() / rate, (rate * t).exp()),
        }
    }
}

/// A preference objective.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PreferenceConfig {
    /// Losses and their weights, added up.
    pub losses: Vec<(PairLoss, f64)>,
    /// Inverse temperature.
    pub beta: f64,
    /// Assumed rate of swapped labels.
    pub label_smoothing: f64,
    /// Transform of the scores.
    pub transform: Transform,
    /// Scores are means over tokens (SimPO, Meng et al. 2024, arXiv 2405.14734, eq. 4).
    pub length_normalised: bool,
    /// Margin between the scores; SimPO's gamma / beta.
    pub margin: f64,
    /// Weight of tokens past the length of the pair's shorter completion (LD-DPO, Liu et al. 2024, arXiv 2409.06411).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ld_alpha: Option<f64>,
    /// Temperature of DiscoPOP's gate.
    pub discopop_tau: f64,
}

impl Default for PreferenceConfig {
    fn default() -> Self {
        Self {
            losses: vec![(PairLoss::Sigmoid, 1.0)],
            beta: 0.1,
            label_smoothing: 0.0,
            transform: Transform::Identity,
            length_normalised: false,
            margin: 0.0,
            ld_alpha: None,
            discopop_tau: 0.05,
        }
    }
}

/// Pairs of a batch: n chosen completions, then the n rejected ones, tokens one after another.
#[derive(Debug, Clone, Copy, Default)]
pub struct PairInputs<'a> {
    /// First token of each completion and the end of the last: 2n + 1 numbers.
    pub offsets: &'a [usize],
    /// Logprobs under the weights that are trained.
    pub new: &'a [f32],
    /// Logprobs under the reference; `None` for losses without one.
    pub reference: Option<&'a [f32]>,
    /// Weight of each pair (WPO), see [`wpo_weights`].
    pub weights: Option<&'a [f32]>,
    /// Further margin of each pair, in score units (MODPO, Zhou et al. 2023, arXiv 2310.03708).
    pub margins: Option<&'a [f32]>,
    /// Pairs of the whole step.
    pub total_pairs: usize,
    /// Chosen tokens of the whole step.
    pub total_chosen_tokens: usize,
}

/// Loss, gradient and sums for metrics.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct PreferenceOutputs {
    /// Share of the step's loss.
    pub loss: f64,
    /// Loss of each pair or row, weights and the mean over the step left out.
    pub losses: Vec<f64>,
    /// d loss / d new logprob, by token.
    pub d_new: Vec<f32>,
    /// `beta * score` of each chosen completion (each completion for KTO).
    pub chosen_rewards: Vec<f64>,
    /// `beta * score` of each rejected completion (empty for KTO).
    pub rejected_rewards: Vec<f64>,
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

fn log_sigmoid(x: f64) -> f64 {
    x.min(0.0) - (-x.abs()).exp().ln_1p()
}

/// Weight of each pair by how likely the policy itself is to write it (WPO, Zhou et al. 2024, arXiv 2406.11827, eq. 4):
/// the product over both sides of `exp(mean(new - log_sum_squares))`, log_sum_squares being the log of the summed
/// squared probabilities of each token's distribution.
pub fn wpo_weights(offsets: &[usize], new: &[f32], log_sum_squares: &[f32]) -> Vec<f32> {
    let side = |r: usize| {
        let tokens = offsets[r]..offsets[r + 1];
        let n = tokens.len().max(1) as f64;
        (tokens.map(|t| f64::from(new[t]) - f64::from(log_sum_squares[t])).sum::<f64>() / n).exp()
    };
    let n = (offsets.len() - 1) / 2;
    (0..n).map(|p| (side(p) * side(n + p)) as f32).collect()
}

/// One pair: raw and transformed scores, lengths.
#[derive(Clone, Copy)]
struct Pair {
    chosen: f64,
    rejected: f64,
    /// Transformed, and the transform's slope.
    chosen_score: (f64, f64),
    rejected_score: (f64, f64),
    lengths: (f64, f64),
    margin: f64,
}

/// Loss and derivatives by the raw chosen and rejected scores.
struct PairTerm {
    value: f64,
    d_chosen: f64,
    d_rejected: f64,
}

/// Loss and gradient of pairs.
pub fn pair_loss(inputs: &PairInputs, config: &PreferenceConfig) -> PreferenceOutputs {
    let n = (inputs.offsets.len() - 1) / 2;
    let len = |r: usize| inputs.offsets[r + 1] - inputs.offsets[r];
    let token_weight = |row: usize, position: usize| {
        let shorter = len(row % n).min(len(row % n + n));
        let beyond = config.ld_alpha.filter(|_| position >= shorter).unwrap_or(1.0);
        if config.length_normalised { beyond / len(row).max(1) as f64 } else { beyond }
    };
    let sum = |row: usize, logprobs: &[f32]| {
        (0..len(row))
            .map(|i| token_weight(row, i) * f64::from(logprobs[inputs.offsets[row] + i]))
            .sum::<f64>()
    };
    let new: Vec<f64> = (0..2 * n).map(|r| sum(r, inputs.new)).collect();
    let reference: Vec<f64> = (0..2 * n).map(|r| inputs.reference.map_or(0.0, |x| sum(r, x))).collect();
    let pairs: Vec<Pair> = (0..n)
        .map(|p| {
            let (chosen, rejected) = (new[p] - reference[p], new[n + p] - reference[n + p]);
            let lengths = (len(p).max(1) as f64, len(n + p).max(1) as f64);
            Pair {
                chosen,
                rejected,
                chosen_score: config.transform.value_and_slope(chosen),
                rejected_score: config.transform.value_and_slope(rejected),
                lengths: if config.length_normalised { (1.0, 1.0) } else { lengths },
                margin: config.margin + inputs.margins.map_or(0.0, |m| f64::from(m[p])),
            }
        })
        .collect();
    let mut out = PreferenceOutputs {
        losses: vec![0.0; n],
        d_new: vec![0.0; inputs.new.len()],
        chosen_rewards: pairs.iter().map(|p| config.beta * p.chosen).collect(),
        rejected_rewards: pairs.iter().map(|p| config.beta * p.rejected).collect(),
        ..PreferenceOutputs::default()
    };
    let share = 1.0 / inputs.total_pairs.max(1) as f64;
    let pair_weight = |p: usize| inputs.weights.map_or(1.0, |w| f64::from(w[p]));
    let mut d_score = vec![0.0; 2 * n];
    let mut d_nll = 0.0;
    for &(loss, weight) in &config.losses {
        if loss == PairLoss::Sft {
            let tokens = inputs.total_chosen_tokens.max(1) as f64;
            let logprobs = inputs.new[inputs.offsets[0]..inputs.offsets[n]].iter();
            let nll = -logprobs.map(|x| f64::from(*x)).sum::<f64>() / tokens;
            // exactly 1 without weights, so that it does not depend on how the step is cut
            let mean_weight = inputs.weights.map_or(1.0, |_| (0..n).map(pair_weight).sum::<f64>() * share);
            out.loss += weight * nll * mean_weight;
            out.losses.iter_mut().for_each(|l| *l += weight * nll);
            d_nll -= weight * mean_weight / tokens;
            continue;
        }
        let terms = match loss {
            PairLoss::Aot | PairLoss::AotUnpaired => sorted_terms(loss, &new, &reference, config),
            _ => pairs.iter().map(|p| pair_term(loss, p, config)).collect(),
        };
        for (p, term) in terms.iter().enumerate() {
            let w = weight * share * pair_weight(p);
            out.loss += w * term.value;
            out.losses[p] += weight * term.value;
            d_score[p] += w * term.d_chosen;
            d_score[n + p] += w * term.d_rejected;
        }
    }
    for (row, d) in d_score.iter().enumerate() {
        for i in 0..len(row) {
            let nll = if row < n { d_nll } else { 0.0 };
            out.d_new[inputs.offsets[row] + i] = (d * token_weight(row, i) + nll) as f32;
        }
    }
    out
}

fn pair_term(loss: PairLoss, p: &Pair, config: &PreferenceConfig) -> PairTerm {
    let (beta, smoothing) = (config.beta, config.label_smoothing);
    let ((cs, c_slope), (rs, r_slope)) = (p.chosen_score, p.rejected_score);
    let z = beta * (cs - rs - p.margin);
    // of a loss in z
    let by_z = |value: f64, dz: f64| PairTerm {
        value,
        d_chosen: dz * beta * c_slope,
        d_rejected: -dz * beta * r_slope,
    };
    let raw = |value: f64, d_chosen: f64, d_rejected: f64| PairTerm { value, d_chosen, d_rejected };
    let (bc, br) = (beta * p.chosen, beta * p.rejected);
    let slope = |x: f64| sigmoid(x) * sigmoid(-x);
    match loss {
        PairLoss::Sigmoid => smoothed(z, smoothing, by_z),
        PairLoss::Hinge => by_z((1.0 - z).max(0.0), if z < 1.0 { -1.0 } else { 0.0 }),
        PairLoss::Ipo => {
            let h = cs / p.lengths.0 - rs / p.lengths.1 - p.margin - 1.0 / (2.0 * beta);
            raw(h * h, 2.0 * h / p.lengths.0 * c_slope, -2.0 * h / p.lengths.1 * r_slope)
        }
        PairLoss::ExoPair => {
            let e = if smoothing == 0.0 { 1e-3 } else { smoothing };
            let (up, down) = (log_sigmoid(z) - (1.0 - e).ln(), log_sigmoid(-z) - e.ln());
            by_z(sigmoid(z) * up + sigmoid(-z) * down, slope(z) * (up - down))
        }
        PairLoss::NcaPair => raw(
            -log_sigmoid(bc) - 0.5 * log_sigmoid(-bc) - 0.5 * log_sigmoid(-br),
            beta * (0.5 * sigmoid(bc) - sigmoid(-bc)),
            beta * 0.5 * sigmoid(br),
        ),
        PairLoss::Robust => by_z(
            (smoothing * log_sigmoid(-z) - (1.0 - smoothing) * log_sigmoid(z)) / (1.0 - 2.0 * smoothing),
            (-smoothing * sigmoid(z) - (1.0 - smoothing) * sigmoid(-z)) / (1.0 - 2.0 * smoothing),
        ),
        PairLoss::BcoPair => {
            raw(-log_sigmoid(bc) - log_sigmoid(-br), -beta * sigmoid(-bc), beta * sigmoid(br))
        }
        PairLoss::SppoHard => {
            let (a, b) = (p.chosen - 0.5 / beta, p.rejected + 0.5 / beta);
            raw(a * a + b * b, 2.0 * a, 2.0 * b)
        }
        PairLoss::ApoZero => raw(1.0 - sigmoid(bc) + sigmoid(br), -beta * slope(bc), beta * slope(br)),
        PairLoss::ApoDown => {
            let margin = beta * slope(bc - br);
            raw(sigmoid(bc) + 1.0 - sigmoid(bc - br), beta * slope(bc) - margin, margin)
        }
        PairLoss::Discopop => {
            let gate = sigmoid(z / config.discopop_tau);
            let gate_slope = gate * (1.0 - gate) / config.discopop_tau;
            let (logistic, exponential) = (-log_sigmoid(z), (-z).exp());
            by_z(
                logistic * (1.0 - gate) + exponential * gate,
                -sigmoid(-z) * (1.0 - gate) - exponential * gate + (exponential - logistic) * gate_slope,
            )
        }
        PairLoss::SigmoidNorm => {
            let z = beta * (cs / p.lengths.0 - rs / p.lengths.1 - p.margin);
            let dz = -sigmoid(-z) * beta;
            raw(-log_sigmoid(z), dz * c_slope / p.lengths.0, -dz * r_slope / p.lengths.1)
        }
        PairLoss::OddsRatio => {
            let log_not = |x: f64| (-x.exp()).ln_1p();
            let odds = p.chosen - p.rejected - (log_not(p.chosen) - log_not(p.rejected));
            let d = -beta * sigmoid(-odds);
            raw(-beta * log_sigmoid(odds), d / -p.chosen.exp_m1(), -d / -p.rejected.exp_m1())
        }
        PairLoss::Aot | PairLoss::AotUnpaired | PairLoss::Sft => unreachable!("losses of the whole batch"),
    }
}

fn smoothed(z: f64, smoothing: f64, term: impl Fn(f64, f64) -> PairTerm) -> PairTerm {
    term(
        -(1.0 - smoothing) * log_sigmoid(z) - smoothing * log_sigmoid(-z),
        smoothing * sigmoid(z) - (1.0 - smoothing) * sigmoid(-z),
    )
}

/// Terms of losses that compare order statistics; the k-th term's gradient goes to the pairs that hold rank k.
fn sorted_terms(loss: PairLoss, new: &[f64], reference: &[f64], config: &PreferenceConfig) -> Vec<PairTerm> {
    let n = new.len() / 2;
    let ranks = |x: &[f64]| {
        let mut order: Vec<usize> = (0..n).collect();
        order.sort_by(|&a, &b| x[a].total_cmp(&x[b]));
        order
    };
    let diff = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a - b).collect::<Vec<f64>>();
    // both: delta_k = upper[up_k] - lower[low_k]
    let (upper, lower) = match loss {
        PairLoss::Aot => (diff(&new[..n], &new[n..]), diff(&reference[..n], &reference[n..])),
        _ => (diff(&new[..n], &reference[..n]), diff(&new[n..], &reference[n..])),
    };
    let mut terms: Vec<PairTerm> =
        (0..n).map(|_| PairTerm { value: 0.0, d_chosen: 0.0, d_rejected: 0.0 }).collect();
    for (up, low) in ranks(&upper).into_iter().zip(ranks(&lower)) {
        let z = config.beta * (upper[up] - lower[low]);
        let t = smoothed(z, config.label_smoothing, |value, dz| PairTerm {
            value,
            d_chosen: dz * config.beta,
            d_rejected: -dz * config.beta,
        });
        terms[up].value += t.value;
        terms[up].d_chosen += t.d_chosen;
        let other = if loss == PairLoss::Aot { up } else { low };
        terms[other].d_rejected += t.d_rejected;
    }
    terms
}

/// Unpaired objective.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum UnpairedLoss {
    /// KTO (Ethayarajh et al. 2024, arXiv 2402.01306, eq. 8).
    #[default]
    Kto,
    /// APO-zero on single completions.
    ApoZeroUnpaired,
}

/// Settings of an unpaired objective.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct KtoConfig {
    /// Loss.
    pub loss: UnpairedLoss,
    /// Inverse temperature.
    pub beta: f64,
    /// Weight of desirable completions.
    pub desirable_weight: f64,
    /// Weight of undesirable completions.
    pub undesirable_weight: f64,
}

impl Default for KtoConfig {
    fn default() -> Self {
        Self { loss: UnpairedLoss::Kto, beta: 0.1, desirable_weight: 1.0, undesirable_weight: 1.0 }
    }
}

/// KTO's baseline: mean over rows of the summed log-ratio of mismatched completions, at least 0; detached.
pub fn kto_baseline(new_sums: &[f64], reference_sums: &[f64]) -> f64 {
    let n = new_sums.len().max(1) as f64;
    (new_sums.iter().zip(reference_sums).map(|(a, b)| a - b).sum::<f64>() / n).max(0.0)
}

/// Loss and gradient of single completions, `desirable` or not, against a `baseline` from [`kto_baseline`].
pub fn kto_loss(
    offsets: &[usize],
    new: &[f32],
    reference: &[f32],
    desirable: &[bool],
    baseline: f64,
    total_rows: usize,
    config: &KtoConfig,
) -> PreferenceOutputs {
    let mut out = PreferenceOutputs { d_new: vec![0.0; new.len()], ..PreferenceOutputs::default() };
    for (row, &good) in offsets.windows(2).zip(desirable) {
        let tokens = row[0]..row[1];
        let score: f64 = tokens.clone().map(|t| f64::from(new[t]) - f64::from(reference[t])).sum();
        let sign = if good { 1.0 } else { -1.0 };
        let (weight, shift) = match config.loss {
            UnpairedLoss::Kto if good => (config.desirable_weight, baseline),
            UnpairedLoss::Kto => (config.undesirable_weight, baseline),
            UnpairedLoss::ApoZeroUnpaired => (1.0, 0.0),
        };
        let z = sign * config.beta * (score - shift);
        let value = weight * (1.0 - sigmoid(z));
        let share = 1.0 / total_rows.max(1) as f64;
        out.loss += share * value;
        out.losses.push(value);
        out.chosen_rewards.push(config.beta * score);
        let d = -share * weight * sigmoid(z) * sigmoid(-z) * sign * config.beta;
        out.d_new[tokens].fill(d as f32);
    }
    out
}
