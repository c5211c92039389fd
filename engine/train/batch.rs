//! The completions of a step as the objective sees them: flat, in group order.
use std::collections::BTreeSet;

use crate::learner::batch::{GroupTokens, Piece};
use crate::loss::correction::{SamplerCorrection, entropy_threshold};
use crate::loss::{BatchTotals, LossInputs, policy_loss};
use crate::model::backprop::Scores;
use crate::reward::ScoredGroup;
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
    /// Logprobs as sampled where `old` is not that, and the weights that correct for the difference.
    sampler: Option<(Vec<f32>, Vec<f32>)>,
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
        Self { groups, offsets, first_completion, old, mask, totals, entropy_threshold: None, sampler: None }
    }

    /// Compares the completions from `first` on with `old`, their logprobs at the start of the step, instead of those
    /// that they were sampled with, and weighs their tokens by the step from one to the other.
    pub(super) fn correct(&mut self, first: usize, old: &[f32], correction: &SamplerCorrection) {
        let sampler = self.old.clone();
        self.old[self.offsets[first]..].copy_from_slice(old);
        let weights = correction.weights(&self.offsets, &self.old, &sampler, &self.mask);
        self.sampler = Some((sampler, weights));
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

    /// Leaves the policy term to the `share` of tokens with the greatest entropy at the start of the step.
    pub(super) fn keep_uncertain(&mut self, entropies: &[f32], share: f64) {
        self.entropy_threshold = entropy_threshold(entropies, &self.mask, share);
        let kept = |(e, m): &(&f32, &bool)| **m && self.entropy_threshold.is_none_or(|h| **e >= h);
        self.totals.entropy_tokens = entropies.iter().zip(&self.mask).filter(kept).count();
    }

    pub(super) fn loss(
        &self,
        pieces: &[Piece],
        scores: &Scores,
        advantages: &[f32],
        reference: Option<&[f32]>,
        (kl_coefficient, entropy_coefficient): (f64, f64),
        objective: &crate::loss::Objective,
    ) -> crate::loss::LossOutputs {
        let rows = pieces.iter().flat_map(|p| {
            let first = self.first_completion[p.group];
            p.completions.clone().map(move |c| first + c)
        });
        // a micro-batch holds consecutive completions of the step
        let rows: Vec<usize> = rows.collect();
        let (from, to) = (self.offsets[rows[0]], self.offsets[rows[rows.len() - 1] + 1]);
        let offsets: Vec<usize> =
            (rows[0]..=rows[rows.len() - 1] + 1).map(|r| self.offsets[r] - from).collect();
        let by_token: Vec<f32> =
            rows.iter().flat_map(|&r| vec![advantages[r]; self.offsets[r + 1] - self.offsets[r]]).collect();
        policy_loss(
            &LossInputs {
                offsets: &offsets,
                new: &scores.logprobs,
                old: &self.old[from..to],
                reference: reference.map(|r| &r[from..to]),
                sampler: self.sampler.as_ref().map(|(s, _)| &s[from..to]),
                weights: self.sampler.as_ref().map(|(_, w)| &w[from..to]),
                entropy: &scores.entropies,
                advantages: &by_token,
                mask: &self.mask[from..to],
                totals: self.totals,
                kl_coefficient,
                entropy_coefficient,
                entropy_threshold: self.entropy_threshold,
                ..LossInputs::default()
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
