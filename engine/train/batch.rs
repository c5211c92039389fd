//! The completions of a step as the objective sees them: flat, in group order.

use std::collections::BTreeSet;
use std::ops::Range;

use crate::learner::batch::{GroupTokens, Piece};
use crate::loss::correction::{Covariance, SamplerCorrection, clip_cov, entropy_threshold, kl_cov};
use crate::loss::{BatchTotals, LossInputs, policy_loss};
use crate::model::backprop::Scores;
use crate::reward::ScoredGroup;
use crate::rng::Stream;
use crate::rollout::SamplingConfig;
use crate::types::FinishReason;

/// The completions of a step as the learner sees them, flat in group order.
pub(super) struct StepBatch<'a> {
    pub(super) groups: Vec<GroupTokens<'a>>,
    /// First token of each completion and the end of the last.
    pub(super) offsets: Vec<usize>,
    /// First completion of each group and the end of the last.
    pub(super) first_completion: Vec<usize>,
    pub(super) old: Vec<f32>,
    pub(super) mask: Vec<bool>,
    pub(super) totals: BatchTotals,
    pub(super) entropy_threshold: Option<f32>,
    /// Logprobs as sampled where `old` is not that.
    sampler: Option<Vec<f32>>,
    /// Coefficient of |log r| by token.
    drift: Option<Vec<f32>>,
    /// Factor of the policy term by token.
    weights: Option<Vec<f32>>,
}

impl<'a> StepBatch<'a> {
    pub(super) fn new(scored: &'a [ScoredGroup], sampling: &SamplingConfig, mask_truncated: bool) -> Self {
        let groups = scored.iter().map(|s| GroupTokens::from(&s.group)).collect();
        let (mut offsets, mut first_completion) = (vec![0], vec![0]);
        let (mut old, mut mask) = (Vec::new(), Vec::new());
        for scored in scored {
            for (completion, outcome) in scored.group.completions.iter().zip(&scored.outcomes) {
                // an abstained completion has no advantage and must not dilute the step's mean either
                let masked =
                    (mask_truncated && completion.finish == FinishReason::Length) || outcome.reward.is_none();
                old.extend_from_slice(&completion.logprobs);
                mask.resize(old.len(), !masked);
                offsets.push(old.len());
            }
            first_completion.push(offsets.len() - 1);
        }
        let totals = BatchTotals {
            tokens: mask.iter().filter(|m| **m).count(),
            entropy_tokens: mask.iter().filter(|m| **m).count(),
            completions: offsets.len() - 1,
            max_new_tokens: sampling.max_new_tokens,
        };
        let (entropy_threshold, sampler, drift, weights) = (None, None, None, None);
        Self {
            groups,
            offsets,
            first_completion,
            old,
            mask,
            totals,
            entropy_threshold,
            sampler,
            drift,
            weights,
        }
    }

    /// Compares the completions from `first` on with `old`, their logprobs at the start of the step, instead of those
    /// that they were sampled with, and weighs their tokens by the step from one to the other.
    pub(super) fn correct(&mut self, first: usize, old: &[f32], correction: &SamplerCorrection) {
        let sampler = self.old.clone();
        self.old[self.offsets[first]..].copy_from_slice(old);
        let weights = correction.weights(&self.offsets, &self.old, &sampler, &self.mask);
        self.weights = Some(weights);
        self.sampler = Some(sampler);
    }

    /// Greatest |new / old probability − 1| of the tokens in the loss, over the completions before `end`.
    pub(super) fn ratio_deviation(&self, pieces: &[Piece], scores: &Scores, end: usize) -> f64 {
        let (mut at, mut greatest) = (0, 0.0f64);
        for piece in pieces {
            for c in piece.completions.clone() {
                let row = self.first_completion[piece.group] + c;
                for t in self.offsets[row]..self.offsets[row + 1] {
                    if row < end && self.mask[t] {
                        let moved = f64::from(scores.logprobs[at]) - f64::from(self.old[t]);
                        greatest = greatest.max(moved.exp_m1().abs());
                    }
                    at += 1;
                }
            }
        }
        greatest
    }

    /// Picks the tokens of great covariance of logprob (as sampled) and advantage, over the whole step.
    pub(super) fn hold_covariance(&mut self, control: Covariance, advantages: &[f32], mut draws: Stream) {
        match control {
            Covariance::Kl { share, coefficient } => {
                self.drift = Some(kl_cov(&self.old, advantages, &self.mask, share, coefficient));
            }
            Covariance::Clip { share, low, high } => {
                let below = |n| draws.below(n);
                let factors = clip_cov(&self.old, advantages, &self.mask, share, (low, high), below);
                match &mut self.weights {
                    Some(weights) => weights.iter_mut().zip(&factors).for_each(|(w, f)| *w *= f),
                    none => *none = Some(factors),
                }
            }
        }
    }

    /// Offsets of the completions of a micro-batch within its tokens, and these within the step's.
    pub(super) fn span(&self, pieces: &[Piece]) -> (Vec<usize>, Range<usize>) {
        // a micro-batch holds consecutive completions of the step
        let row = |p: &Piece, c: usize| self.first_completion[p.group] + c;
        let first = row(&pieces[0], pieces[0].completions.start);
        let last = &pieces[pieces.len() - 1];
        let rows = first..=row(last, last.completions.end);
        let (from, to) = (self.offsets[*rows.start()], self.offsets[*rows.end()]);
        (rows.map(|r| self.offsets[r] - from).collect(), from..to)
    }

    /// All completions as one micro-batch.
    pub(super) fn whole(&self) -> Vec<Piece> {
        let groups = self.groups.iter().enumerate();
        groups.map(|(group, g)| Piece { group, completions: 0..g.completions.len() }).collect()
    }

    /// Leaves the policy term to the `share` of tokens with the greatest entropy at the start of the step.
    pub(super) fn keep_uncertain(&mut self, entropies: &[f32], share: f64) {
        self.entropy_threshold = entropy_threshold(entropies, &self.mask, share);
        let kept = |(e, m): &(&f32, &bool)| **m && self.entropy_threshold.is_none_or(|h| **e >= h);
        self.totals.entropy_tokens = entropies.iter().zip(&self.mask).filter(kept).count();
    }

    /// Loss and gradient of a micro-batch; `advantages` and `reference` are those of the whole step, by token.
    pub(super) fn loss(
        &self,
        pieces: &[Piece],
        scores: &Scores,
        advantages: &[f32],
        reference: Option<&[f32]>,
        (kl_coefficient, entropy_coefficient): (f64, f64),
        objective: &crate::loss::Objective,
    ) -> crate::loss::LossOutputs {
        let (offsets, span) = self.span(pieces);
        policy_loss(
            &LossInputs {
                offsets: &offsets,
                new: &scores.logprobs,
                old: &self.old[span.clone()],
                reference: reference.map(|r| &r[span.clone()]),
                sampler: self.sampler.as_deref().map(|s| &s[span.clone()]),
                entropy: &scores.entropies,
                advantages: &advantages[span.clone()],
                mask: &self.mask[span.clone()],
                drift: self.drift.as_deref().map(|d| &d[span.clone()]),
                weights: self.weights.as_deref().map(|w| &w[span.clone()]),
                totals: self.totals,
                kl_coefficient,
                entropy_coefficient,
                entropy_threshold: self.entropy_threshold,
            },
            objective,
        )
    }
}

/// Components of every completion in one order of names; what a completion lacks counts as abstained.
pub(super) fn component_rows(groups: &[ScoredGroup]) -> Vec<Vec<Option<f64>>> {
    let outcomes = || groups.iter().flat_map(|g| &g.outcomes);
    let names: BTreeSet<&str> = outcomes().flat_map(|o| &o.components).map(|(n, _)| n.as_str()).collect();
    let value = |components: &[(String, Option<f64>)], name: &str| {
        components.iter().find(|(n, _)| n == name).and_then(|(_, v)| *v)
    };
    outcomes().map(|o| names.iter().map(|n| value(&o.components, n)).collect()).collect()
}
