//! Gradients without an update: of a whole batch as one vector, and of one completion at a time to find a bad one.

use rft_kernels::{Pool, Warp, sum_of_squares};

use super::batch::{GroupTokens, Piece, micro_batches, pack};
use super::critic::Critic;
use super::step::{CriticStep, Learner, ScoreGrads, UNUSED, all_rows, largest};
use crate::error::{EngineError, Result};
use crate::model::backprop::{PackedBatch, Scores};
use crate::model::policy::{Policy, Weights};

impl Learner {
    /// The gradient of an objective, laid out as the trainable arena's slots; nothing is updated.
    ///
    /// # Errors
    /// As [`Learner::update`].
    pub fn gradient(
        &mut self,
        pool: &Pool,
        policy: &Policy,
        groups: &[GroupTokens],
        warp: &Warp,
        mut objective: impl FnMut(&[Piece], &Scores) -> Result<ScoreGrads>,
    ) -> Result<Vec<f32>> {
        self.grads.begin(pool, policy);
        let weights = policy.weights();
        let batches = micro_batches(groups, self.max_rows);
        self.trainer.reserve_training(&weights, largest(groups, &batches), all_rows(groups, &batches));
        let mut given = ScoreGrads::default();
        for pieces in batches {
            let batch = PackedBatch { update: Some(self.adam.updates), ..pack(groups, &pieces) };
            let scores = self.trainer.forward(pool, &weights, &batch, warp);
            let d = objective(&pieces, &scores)?;
            check_finite("logprob", groups, &pieces, &scores.entropies)?;
            check_finite("loss gradient", groups, &pieces, &d.logprobs)?;
            check_finite("entropy gradient", groups, &pieces, &d.entropies)?;
            self.trainer.backward(pool, &weights, &batch, warp, &d.logprobs, &d.entropies, &mut self.grads);
            given.add(d);
        }
        self.trainer.finish(pool, &weights, &mut self.grads);
        let grads = if policy.adapter.is_some() { &self.grads.adapter } else { &self.grads.base };
        match sum_of_squares(pool, grads).is_finite() {
            true => Ok(grads.clone()),
            false => Err(self.culprit(pool, &weights, groups, Some(warp), &given, &[], None)),
        }
    }

    /// The completion whose own gradient is not finite, found by carrying the gradients back that an update was given, one
    /// completion at a time: of the policy's scores and, with a critic, of its values.
    #[allow(clippy::too_many_arguments)]
    pub(super) fn culprit(
        &mut self,
        pool: &Pool,
        weights: &Weights,
        groups: &[GroupTokens],
        warp: Option<&Warp>,
        given: &ScoreGrads,
        values: &[f32],
        mut critic: Option<CriticStep>,
    ) -> EngineError {
        let trains_trunk = !critic.as_ref().is_some_and(|c| c.head_only);
        let completions = groups.iter().enumerate();
        let completions =
            completions.flat_map(|(g, of)| of.completions.iter().enumerate().map(move |c| (g, c)));
        let mut at = 0;
        for (group, (completion, tokens)) in completions {
            let place = at..at + tokens.len();
            at = place.end;
            // what nothing was given for has no gradients at all
            let own = |all| <[f32]>::get(all, place.clone()).unwrap_or_default();
            let pieces = [Piece { group, completions: completion..completion + 1 }];
            let batch = PackedBatch { update: Some(self.adam.updates), ..pack(groups, &pieces) };
            self.grads.clear(pool);
            match warp {
                Some(warp) => drop(self.trainer.forward(pool, weights, &batch, warp)),
                None => self.trainer.forward_hidden(pool, weights, &batch, trains_trunk),
            }
            let mut head_squares = 0.0;
            if let Some(c) = &mut critic {
                let Critic { head, grad, .. } = &mut *c.critic;
                grad.fill(0.0);
                self.trainer.values_backward(&batch, head, own(values), grad);
                head_squares = sum_of_squares(pool, grad);
            }
            if trains_trunk {
                let (logprobs, entropies) = (own(&given.logprobs), own(&given.entropies));
                let warp = warp.unwrap_or(&UNUSED);
                self.trainer.backward(pool, weights, &batch, warp, logprobs, entropies, &mut self.grads);
            }
            self.trainer.finish(pool, weights, &mut self.grads);
            let squares = [&self.grads.base, &self.grads.adapter].map(|g| sum_of_squares(pool, g));
            let what = match squares.iter().all(|sum| sum.is_finite()) {
                false => "gradient",
                true if !head_squares.is_finite() => "critic's gradient",
                true => continue,
            };
            return EngineError::NonFinite { what, group, completion, token: None };
        }
        EngineError::Numeric(
            "the gradient is not finite though that of every completion is: their sum is too large; nothing was updated. \
             hint: lower optimizer.lr"
                .into(),
        )
    }
}

/// Refuses a number that is not finite, by its place in the batch.
pub(super) fn check_finite(
    what: &'static str,
    groups: &[GroupTokens],
    pieces: &[Piece],
    values: &[f32],
) -> Result<()> {
    let Some(mut at) = values.iter().position(|v| !v.is_finite()) else { return Ok(()) };
    for piece in pieces {
        for completion in piece.completions.clone() {
            let len = groups[piece.group].completions[completion].len();
            if at < len {
                let token = Some(at);
                return Err(EngineError::NonFinite { what, group: piece.group, completion, token });
            }
            at -= len;
        }
    }
    unreachable!("values cover exactly the pieces' tokens")
}
