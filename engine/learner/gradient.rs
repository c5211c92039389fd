//! Gradients without an update: of a whole batch as one vector, and of one completion at a time to find a bad one.

use rft_kernels::{Pool, Warp, sum_of_squares};

use super::batch::{GroupTokens, Piece, micro_batches, pack};
use super::step::{Learner, ScoreGrads, all_rows, largest};
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
        for pieces in batches {
            self.add_gradient(pool, &weights, groups, &pieces, warp, &mut objective)?;
        }
        self.trainer.finish(pool, &weights, &mut self.grads);
        let grads = if policy.adapter.is_some() { &self.grads.adapter } else { &self.grads.base };
        match sum_of_squares(pool, grads).is_finite() {
            true => Ok(grads.clone()),
            false => Err(self.culprit(pool, &weights, groups, warp, objective)?),
        }
    }

    fn add_gradient(
        &mut self,
        pool: &Pool,
        weights: &Weights,
        groups: &[GroupTokens],
        pieces: &[Piece],
        warp: &Warp,
        objective: &mut impl FnMut(&[Piece], &Scores) -> Result<ScoreGrads>,
    ) -> Result<()> {
        let batch = PackedBatch { update: Some(self.adam.updates), ..pack(groups, pieces) };
        let scores = self.trainer.forward(pool, weights, &batch, warp);
        let d = objective(pieces, &scores)?;
        check_finite("logprob", groups, pieces, &scores.entropies)?;
        check_finite("loss gradient", groups, pieces, &d.logprobs)?;
        check_finite("entropy gradient", groups, pieces, &d.entropies)?;
        self.trainer.backward(pool, weights, &batch, warp, &d.logprobs, &d.entropies, &mut self.grads);
        Ok(())
    }

    /// The completion whose own gradient is not finite, found by computing them one by one.
    pub(super) fn culprit(
        &mut self,
        pool: &Pool,
        weights: &Weights,
        groups: &[GroupTokens],
        warp: &Warp,
        mut objective: impl FnMut(&[Piece], &Scores) -> Result<ScoreGrads>,
    ) -> Result<EngineError> {
        for (group, completions) in groups.iter().map(|g| g.completions.len()).enumerate() {
            for completion in 0..completions {
                let pieces = [Piece { group, completions: completion..completion + 1 }];
                self.grads.clear(pool);
                self.add_gradient(pool, weights, groups, &pieces, warp, &mut objective)?;
                self.trainer.finish(pool, weights, &mut self.grads);
                let sums = [&self.grads.base, &self.grads.adapter].map(|g| sum_of_squares(pool, g));
                if sums.iter().any(|sum| !sum.is_finite()) {
                    return Ok(EngineError::NonFinite { what: "gradient", group, completion, token: None });
                }
            }
        }
        Ok(EngineError::Numeric(
            "the gradient is not finite though that of every completion is: their sum is too large; nothing was updated. \
             hint: lower optimizer.lr"
                .into(),
        ))
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
