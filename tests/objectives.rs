//! Properties that every objective must have: exact gradients, and no bit of them changed by a cut into micro-batches.

use proptest::prelude::*;
use rft_engine::loss::correction::{
    Covariance, SamplerCorrection, WeightLevel, clip_cov, entropy_threshold, kl_cov,
};
use rft_engine::loss::kl::{Estimator, Gradient, KlConfig};
use rft_engine::loss::preference::{
    KtoConfig, PairInputs, PairLoss, PreferenceConfig, Transform, kto_loss, pair_loss,
};
use rft_engine::loss::surrogate::{Cispo, Surrogate};
use rft_engine::loss::value::value_loss;
use rft_engine::loss::{
    Aggregation, BatchTotals, LossInputs, LossOutputs, LossSums, Objective, RatioLevel, policy_loss, presets,
};

/// A step of a few completions with ragged lengths.
#[derive(Debug, Clone)]
struct Step {
    offsets: Vec<usize>,
    new: Vec<f32>,
    old: Vec<f32>,
    reference: Vec<f32>,
    sampler: Vec<f32>,
    entropy: Vec<f32>,
    advantages: Vec<f32>,
    mask: Vec<bool>,
}

fn step() -> impl Strategy<Value = Step> {
    let token =
        (-3.0f32..-0.05, -0.5f32..0.5, -0.5f32..0.5, -0.3f32..0.3, 0.1f32..3.0, prop::bool::weighted(0.85));
    let row = (prop::collection::vec(token, 1..7), -2.0f32..2.0);
    prop::collection::vec(row, 2..6).prop_map(|rows| {
        let mut s = Step {
            offsets: vec![0],
            new: vec![],
            old: vec![],
            reference: vec![],
            sampler: vec![],
            entropy: vec![],
            advantages: vec![],
            mask: vec![],
        };
        for (tokens, advantage) in rows {
            for (new, moved, apart, stale, entropy, mask) in tokens {
                s.new.push(new);
                s.old.push((new - moved).min(-0.01));
                s.reference.push((new - apart).min(-0.01));
                s.sampler.push((new - moved - stale).min(-0.01));
                s.entropy.push(entropy);
                s.advantages.push(advantage);
                s.mask.push(mask);
            }
            s.offsets.push(s.new.len());
        }
        s
    })
}

/// What is fixed before the loss, for the whole step.
struct Fixed {
    weights: Option<Vec<f32>>,
    drift: Option<Vec<f32>>,
    threshold: Option<f32>,
    totals: BatchTotals,
}

impl Step {
    fn fix(&self, objective: &Objective) -> Fixed {
        let threshold = (objective.top_entropy < 1.0)
            .then(|| entropy_threshold(&self.entropy, &self.mask, objective.top_entropy))
            .flatten();
        let mut weights = objective
            .sampler_correction
            .map(|c| c.weights(&self.offsets, &self.old, &self.sampler, &self.mask));
        let mut drift = None;
        match objective.covariance {
            Some(Covariance::Kl { coefficient, .. }) => {
                drift = Some(kl_cov(&self.old, &self.advantages, &self.mask, 0.3, coefficient));
            }
            Some(Covariance::Clip { .. }) => {
                let bounds = (-1.0, 5.0);
                weights = Some(clip_cov(&self.old, &self.advantages, &self.mask, 0.3, bounds, |n| n / 2));
            }
            None => {}
        }
        let counted = |t: &usize| self.mask[*t] && threshold.is_none_or(|h| self.entropy[*t] >= h);
        Fixed {
            weights,
            drift,
            threshold,
            totals: BatchTotals {
                tokens: self.mask.iter().filter(|m| **m).count(),
                entropy_tokens: (0..self.mask.len()).filter(counted).count(),
                completions: self.offsets.len() - 1,
                max_new_tokens: 8,
            },
        }
    }

    fn run(&self, rows: std::ops::Range<usize>, objective: &Objective, fixed: &Fixed) -> LossOutputs {
        let (from, to) = (self.offsets[rows.start], self.offsets[rows.end]);
        let offsets: Vec<usize> = self.offsets[rows.start..=rows.end].iter().map(|o| o - from).collect();
        let inputs = LossInputs {
            offsets: &offsets,
            new: &self.new[from..to],
            old: &self.old[from..to],
            reference: Some(&self.reference[from..to]),
            sampler: Some(&self.sampler[from..to]),
            entropy: &self.entropy[from..to],
            advantages: &self.advantages[from..to],
            mask: &self.mask[from..to],
            weights: fixed.weights.as_deref().map(|w| &w[from..to]),
            drift: fixed.drift.as_deref().map(|d| &d[from..to]),
            entropy_threshold: fixed.threshold,
            totals: fixed.totals,
            kl_coefficient: 0.1,
            entropy_coefficient: objective.entropy_coefficient,
        };
        policy_loss(&inputs, objective)
    }
}

/// Every preset, and settings that no preset has.
fn objectives() -> Vec<(String, Objective)> {
    let mut all: Vec<(String, Objective)> =
        presets::NAMES.iter().map(|n| (n.to_string(), presets::preset(n).unwrap().0)).collect();
    let levels = [
        RatioLevel::Token,
        RatioLevel::Sequence,
        RatioLevel::SequenceToken,
        RatioLevel::Product,
        RatioLevel::Geometric,
    ];
    for ratio in levels {
        for aggregation in AGGREGATIONS {
            for estimator in [Estimator::K1, Estimator::K2, Estimator::K3, Estimator::Abs] {
                for gradient in [Gradient::Plain, Gradient::StraightThrough, Gradient::Weighted] {
                    let kl = KlConfig { coefficient: 0.1, estimator, gradient, ..KlConfig::default() };
                    let objective =
                        Objective { ratio, aggregation, clip_high: 0.28, kl, ..Objective::default() };
                    all.push((format!("{ratio:?} {aggregation:?} {estimator:?} {gradient:?}"), objective));
                }
            }
        }
    }
    let token_weights = SamplerCorrection { level: WeightLevel::Token, max: Some(1.1), ..Default::default() };
    let extras = Objective {
        entropy_coefficient: 0.05,
        top_entropy: 0.6,
        off_policy_limit: Some(0.05),
        delta: Some(1.4),
        dual_clip: Some(1.3),
        sampler_correction: Some(token_weights),
        ..Objective::default()
    };
    for ratio in levels {
        all.push((format!("extras {ratio:?}"), Objective { ratio, ..extras.clone() }));
        let surrogate = Surrogate::Cispo(Cispo { min: 0.8, max: 1.2 });
        all.push((format!("cispo {ratio:?}"), Objective { ratio, surrogate, ..extras.clone() }));
    }
    all
}

/// Logprobs of a completion, under the policy and the reference.
type Side = Vec<(f32, f32)>;

fn side() -> impl Strategy<Value = Side> {
    prop::collection::vec((-3.0f32..-0.05, -3.0f32..-0.05), 1..6)
}

/// Every preference loss that is a sum over pairs; AOT's two compare ranks over the whole step.
fn preferences() -> Vec<(String, PreferenceConfig)> {
    let losses = [
        PairLoss::Sigmoid,
        PairLoss::Hinge,
        PairLoss::Ipo,
        PairLoss::ExoPair,
        PairLoss::NcaPair,
        PairLoss::Robust,
        PairLoss::BcoPair,
        PairLoss::SppoHard,
        PairLoss::ApoZero,
        PairLoss::ApoDown,
        PairLoss::Discopop,
        PairLoss::Sft,
        PairLoss::SigmoidNorm,
        PairLoss::OddsRatio,
    ];
    let mut all = Vec::new();
    for loss in losses {
        let plain = PreferenceConfig {
            losses: vec![(loss, 0.7), (PairLoss::Sft, 0.3)],
            length_normalised: loss == PairLoss::OddsRatio,
            label_smoothing: 0.1,
            ..PreferenceConfig::default()
        };
        all.push((format!("{loss:?}"), plain.clone()));
        all.push((
            format!("{loss:?} bent"),
            PreferenceConfig { transform: Transform::JensenShannon, ..plain },
        ));
    }
    let simpo = PreferenceConfig { length_normalised: true, margin: 0.5, beta: 2.0, ..Default::default() };
    all.push(("simpo".into(), simpo));
    all.push(("ld-dpo".into(), PreferenceConfig { ld_alpha: Some(0.4), ..Default::default() }));
    all
}

fn flat(sides: &[&Side]) -> (Vec<usize>, Vec<f32>, Vec<f32>) {
    let mut offsets = vec![0];
    offsets.extend(sides.iter().scan(0, |at, side| {
        *at += side.len();
        Some(*at)
    }));
    let tokens = || sides.iter().flat_map(|side| side.iter());
    (offsets, tokens().map(|t| t.0).collect(), tokens().map(|t| t.1).collect())
}

/// Gradients of some of the pairs, pair by pair (chosen, then rejected), and their share of the loss.
fn part(pairs: &[(Side, Side)], range: std::ops::Range<usize>, config: &PreferenceConfig) -> (Vec<f32>, f64) {
    let here = &pairs[range];
    let sides: Vec<&Side> = here.iter().map(|p| &p.0).chain(here.iter().map(|p| &p.1)).collect();
    let (offsets, new, reference) = flat(&sides);
    let margins: Vec<f32> = here.iter().map(|(c, r)| 0.1 * (c.len() as f32 - r.len() as f32)).collect();
    let inputs = PairInputs {
        offsets: &offsets,
        new: &new,
        // the odds are of mean logprobs, which no reference is taken from
        reference: config.losses.iter().all(|l| l.0 != PairLoss::OddsRatio).then_some(&reference[..]),
        weights: None,
        margins: Some(&margins),
        total_pairs: pairs.len(),
        total_chosen_tokens: pairs.iter().map(|p| p.0.len()).sum(),
    };
    let out = pair_loss(&inputs, config);
    let n = here.len();
    let by_pair =
        (0..n).flat_map(|p| [p, n + p]).flat_map(|row| out.d_new[offsets[row]..offsets[row + 1]].to_vec());
    (by_pair.collect(), out.loss)
}

const AGGREGATIONS: [Aggregation; 5] = [
    Aggregation::Token,
    Aggregation::Sequence,
    Aggregation::SequenceSum,
    Aggregation::Constant,
    Aggregation::Sum,
];

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn cutting_a_step_changes_no_bit_of_the_gradient(step in step(), cut in 1usize..5) {
        let rows = step.offsets.len() - 1;
        let cut = cut.min(rows - 1);
        for (name, objective) in objectives() {
            let fixed = step.fix(&objective);
            let whole = step.run(0..rows, &objective, &fixed);
            let (a, b) = (step.run(0..cut, &objective, &fixed), step.run(cut..rows, &objective, &fixed));
            prop_assert_eq!(&whole.d_new, &[a.d_new, b.d_new].concat(), "{}", name);
            prop_assert_eq!(&whole.d_entropy, &[a.d_entropy, b.d_entropy].concat(), "{}", name);
            let mut sums = LossSums::default();
            sums.add(&a.sums);
            sums.add(&b.sums);
            prop_assert!((whole.sums.loss - sums.loss).abs() < 1e-12 * whole.sums.loss.abs().max(1.0), "{}", name);
            prop_assert_eq!((whole.sums.tokens, whole.sums.clipped), (sums.tokens, sums.clipped));
            prop_assert_eq!(whole.sums.ratio_max_dev, sums.ratio_max_dev);
        }
    }

    #[test]
    fn cutting_a_step_changes_no_bit_of_the_values_gradient(step in step(), cut in 1usize..5) {
        let rows = step.offsets.len() - 1;
        let cut = cut.min(rows - 1);
        let totals = step.fix(&Objective::default()).totals;
        for aggregation in AGGREGATIONS {
            let part = |rows: std::ops::Range<usize>| {
                let (from, to) = (step.offsets[rows.start], step.offsets[rows.end]);
                let offsets: Vec<usize> = step.offsets[rows.start..=rows.end].iter().map(|o| o - from).collect();
                let (values, old, returns) = (&step.new[from..to], &step.old[from..to], &step.reference[from..to]);
                value_loss(&offsets, values, old, returns, &step.mask[from..to], 0.2, aggregation, &totals)
            };
            let (whole, a, b) = (part(0..rows), part(0..cut), part(cut..rows));
            prop_assert_eq!(&whole.d_values, &[a.d_values, b.d_values].concat());
            prop_assert_eq!(whole.clipped, a.clipped + b.clipped);
            prop_assert!((whole.loss - a.loss - b.loss).abs() < 1e-12 * whole.loss.abs().max(1.0));
        }
    }

    #[test]
    fn cutting_pairs_changes_no_bit_of_their_gradient(pairs in prop::collection::vec((side(), side()), 2..6), cut in 1usize..5) {
        let cut = cut.min(pairs.len() - 1);
        for (name, config) in preferences() {
            let (whole, a, b) = (part(&pairs, 0..pairs.len(), &config), part(&pairs, 0..cut, &config), part(&pairs, cut..pairs.len(), &config));
            prop_assert_eq!(&whole.0, &[a.0, b.0].concat(), "{}", name);
            prop_assert!((whole.1 - a.1 - b.1).abs() < 1e-12 * whole.1.abs().max(1.0), "{}", name);
        }
        let kto = |rows: std::ops::Range<usize>| {
            let all: Vec<&Side> = pairs[rows].iter().flat_map(|(c, r)| [c, r]).collect();
            let (offsets, new, reference) = flat(&all);
            let desirable: Vec<bool> = (0..all.len()).map(|i| i % 2 == 0).collect();
            kto_loss(&offsets, &new, &reference, &desirable, 0.3, 2 * pairs.len(), &KtoConfig::default()).d_new
        };
        prop_assert_eq!(kto(0..pairs.len()), [kto(0..cut), kto(cut..pairs.len())].concat());
    }

    #[test]
    fn gradients_match_finite_differences(step in step()) {
        let rows = step.offsets.len() - 1;
        for (name, objective) in objectives() {
            // a detached factor or a straight-through value has, by design, another gradient than its loss
            let detached = !matches!(objective.surrogate, Surrogate::Clip | Surrogate::Sapo(_) | Surrogate::Reinforce);
            let own_tokens = objective.ratio == RatioLevel::SequenceToken;
            if detached || own_tokens || objective.kl.gradient == Gradient::StraightThrough {
                continue;
            }
            let fixed = step.fix(&objective);
            let out = step.run(0..rows, &objective, &fixed);
            let loss = |t: usize, h: f32| {
                let mut moved = step.clone();
                moved.new[t] += h;
                step_loss(&moved, rows, &objective, &fixed, moved.new[t] - step.new[t])
            };
            for t in 0..step.new.len() {
                let ((up, du), (down, dd)) = (loss(t, 2e-5), loss(t, -2e-5));
                let (at, _) = step_loss(&step, rows, &objective, &fixed, 0.0);
                let (right, left) = ((up - at) / f64::from(du), (at - down) / f64::from(-dd));
                let (low, high) = (left.min(right), left.max(right));
                let got = f64::from(out.d_new[t]);
                // the secants bracket the derivative; at a kink it is one of theirs, off by half a step of curvature,
                // which is about the derivative itself: 1e-5 of it (the loss is f64, so the step can be this short)
                let slack = 2e-5 * (1.0 + got.abs());
                let near = got > low - slack && got < high + slack;
                prop_assert!(near, "{} token {}: {} not in {}..{}", name, t, got, low, high);
            }
        }
    }
}

fn step_loss(step: &Step, rows: usize, objective: &Objective, fixed: &Fixed, moved: f32) -> (f64, f32) {
    (step.run(0..rows, objective, fixed).sums.loss, moved)
}

#[test]
fn a_masked_token_has_no_gradient_and_counts_nowhere() {
    let step = Step {
        offsets: vec![0, 2, 3],
        new: vec![-1.0, -0.5, -2.0],
        old: vec![-1.1, -0.9, -2.05],
        reference: vec![-1.3, -0.4, -2.5],
        sampler: vec![-1.1, -0.9, -2.05],
        entropy: vec![0.9, 0.8, 1.2],
        advantages: vec![1.3, 1.3, -0.8],
        mask: vec![true, false, true],
    };
    for (name, objective) in objectives() {
        let fixed = step.fix(&objective);
        let out = step.run(0..2, &objective, &fixed);
        assert_eq!((out.d_new[1], out.d_entropy[1], out.sums.tokens), (0.0, 0.0, 2), "{name}");
        let changed = Step { new: vec![-1.0, -7.5, -2.0], ..step.clone() };
        assert_eq!(changed.run(0..2, &objective, &fixed), out, "{name}");
    }
}

#[test]
fn on_policy_the_ratio_is_exactly_one_and_nothing_is_clipped() {
    let new = vec![-1.0, -0.5, -2.0, -0.7];
    let step = Step {
        offsets: vec![0, 3, 4],
        old: new.clone(),
        reference: new.clone(),
        sampler: new.clone(),
        new,
        entropy: vec![0.9, 0.8, 1.2, 0.3],
        advantages: vec![1.3, 1.3, 1.3, -0.8],
        mask: vec![true; 4],
    };
    for (name, objective) in objectives() {
        let out = step.run(0..2, &objective, &step.fix(&objective));
        let sums = out.sums;
        assert_eq!((sums.ratio_max_dev, sums.ratio, sums.clipped, sums.moved), (0.0, 4.0, 0, 0.0), "{name}");
    }
}
