//! One update: micro-batches forward, an objective's gradient, backward, accumulate, clip, AdamW.
//!
//! The learner does not know what it optimises: an objective sees the scores of a micro-batch and answers with
//! the loss gradient of each logprob and entropy. Objectives get normalisers of the whole batch, so how a batch
//! is cut into micro-batches changes nothing (the gradient buffer adds rows in one fixed order).

use rft_kernels::{Pool, Warp, sum_of_squares};

use crate::config::OptimizerConfig;
use crate::error::Result;
use crate::learner::batch::{GroupTokens, Piece, micro_batches, pack, rows};
use crate::learner::critic::Critic;
use crate::learner::gradient::check_finite;
use crate::learner::optimizer::AdamW;
use crate::model::backprop::{PackedBatch, Scores, Trainer};
use crate::model::policy::{Grads, Policy, Weights};
use crate::model::value_head::ValueHead;

/// Gradient of the loss of one micro-batch, by target.
#[derive(Debug, Default)]
pub struct ScoreGrads {
    /// d loss / d logprob.
    pub logprobs: Vec<f32>,
    /// d loss / d entropy.
    pub entropies: Vec<f32>,
}

impl ScoreGrads {
    /// Those of the next micro-batch behind these.
    pub(super) fn add(&mut self, next: Self) {
        self.logprobs.extend(next.logprobs);
        self.entropies.extend(next.entropies);
    }
}

/// Stands where no logprob is computed.
pub(super) const UNUSED: Warp = Warp { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0 };

/// Rows of the largest micro-batch.
pub(super) fn largest(groups: &[GroupTokens], batches: &[Vec<Piece>]) -> usize {
    batches.iter().map(|pieces| rows(groups, pieces)).max().unwrap_or(0)
}

/// Rows of all micro-batches.
pub(super) fn all_rows(groups: &[GroupTokens], batches: &[Vec<Piece>]) -> usize {
    batches.iter().map(|pieces| rows(groups, pieces)).sum()
}

/// What an update did.
#[derive(Debug, Clone, Copy, Default)]
pub struct UpdateStats {
    /// Norm of the gradient before clipping.
    pub grad_norm: f64,
    /// Rows computed: prompt tokens once a group and completion tokens.
    pub rows: usize,
}

/// What a critic takes part in an update with.
#[derive(Debug)]
pub struct CriticStep<'a> {
    /// The critic, on the trunk that the update trains.
    pub critic: &'a mut Critic,
    /// Learning rate of its head.
    pub lr: f64,
    /// Leaves the trunk as it is: only the head learns.
    pub head_only: bool,
}

/// Gradient buffers, optimizer state and activations of one policy.
#[derive(Debug)]
pub struct Learner {
    pub(super) trainer: Trainer,
    pub(super) grads: Grads,
    /// Optimizer state; saved in checkpoints.
    pub adam: AdamW,
    pub(super) max_rows: usize,
    /// Rows of the largest micro-batch and of the largest update so far.
    pub seen: (usize, usize),
}

impl Learner {
    /// A learner whose micro-batches hold at most `max_rows` rows.
    pub fn new(policy: &Policy, max_rows: usize) -> Self {
        Self {
            trainer: Trainer::default(),
            grads: policy.new_grads(),
            adam: AdamW::default(),
            max_rows,
            seen: (0, 0),
        }
    }

    /// Makes the activations of the first `layers` layers again in the backward pass instead of keeping them.
    pub fn recompute(mut self, layers: usize) -> Self {
        self.trainer.recompute = layers;
        self
    }

    /// Forgets the optimizer's moments and what trained, for a new stage.
    pub fn begin_stage(&mut self) {
        self.adam = AdamW::default();
        // other weights may train in the same places
        self.grads = Grads::default();
    }

    /// Gives back the gradient, for rollouts to take its memory; with `all`, the activations too. Both are made anew when they
    /// are needed.
    pub fn rest(&mut self, all: bool) {
        (self.grads.base, self.grads.adapter) = Default::default();
        if all {
            self.trainer.rest();
        }
    }

    /// Logprobs and entropies of every completion token under `weights`, without gradients; in target order.
    pub fn score(&mut self, pool: &Pool, weights: &Weights, groups: &[GroupTokens], warp: &Warp) -> Scores {
        let mut all = Scores::default();
        let batches = micro_batches(groups, self.max_rows);
        self.trainer.reserve_scoring(weights, largest(groups, &batches));
        for pieces in batches {
            let scores = self.trainer.score(pool, weights, &pack(groups, &pieces), warp);
            all.logprobs.extend(scores.logprobs);
            all.entropies.extend(scores.entropies);
        }
        all
    }

    /// Whether every group fits whole into a micro-batch.
    pub fn keeps_whole(&self, groups: &[GroupTokens]) -> bool {
        let whole = |p: &Piece| p.completions.len() == groups[p.group].completions.len();
        micro_batches(groups, self.max_rows).iter().flatten().all(whole)
    }

    /// The scores that the next update's forward passes give, bit for bit, dropout included.
    pub fn preview(&mut self, pool: &Pool, weights: &Weights, groups: &[GroupTokens], warp: &Warp) -> Scores {
        let mut all = Scores::default();
        for pieces in micro_batches(groups, self.max_rows) {
            let batch = PackedBatch { update: Some(self.adam.updates), ..pack(groups, &pieces) };
            let scores = self.trainer.score(pool, weights, &batch, warp);
            all.logprobs.extend(scores.logprobs);
            all.entropies.extend(scores.entropies);
        }
        all
    }

    /// Values of the states in which every completion token was drawn, in target order.
    pub fn values(
        &mut self,
        pool: &Pool,
        weights: &Weights,
        groups: &[GroupTokens],
        head: &ValueHead,
    ) -> Vec<f32> {
        let mut all = Vec::new();
        for pieces in micro_batches(groups, self.max_rows) {
            let batch = pack(groups, &pieces);
            self.trainer.forward_hidden(pool, weights, &batch, false);
            all.extend(self.trainer.values(&batch, head));
        }
        all
    }

    /// Accumulates the gradient over all micro-batches and applies one update.
    ///
    /// # Errors
    /// [`NonFinite`](crate::error::EngineError::NonFinite) for a logprob, loss gradient or gradient that is not finite: nothing is
    /// updated. Whatever the objective reports.
    #[allow(clippy::too_many_arguments)]
    pub fn update(
        &mut self,
        pool: &Pool,
        policy: &mut Policy,
        groups: &[GroupTokens],
        warp: &Warp,
        optimizer: &OptimizerConfig,
        lr: f64,
        mut objective: impl FnMut(&[Piece], &Scores) -> Result<ScoreGrads>,
    ) -> Result<UpdateStats> {
        self.update_with(pool, policy, groups, Some(warp), optimizer, lr, None, |pieces, scores, _| {
            Ok((objective(pieces, scores)?, Vec::new()))
        })
    }

    /// As [`Learner::update`] with a critic's values among what the objective sees, and their gradient among what it
    /// answers. Without a `warp` no logprob is computed: scores are empty and so must their gradients be.
    ///
    /// # Errors
    /// As [`Learner::update`].
    #[allow(clippy::too_many_arguments)]
    pub fn update_with(
        &mut self,
        pool: &Pool,
        policy: &mut Policy,
        groups: &[GroupTokens],
        warp: Option<&Warp>,
        optimizer: &OptimizerConfig,
        lr: f64,
        mut critic: Option<CriticStep>,
        mut objective: impl FnMut(&[Piece], &Scores, &[f32]) -> Result<(ScoreGrads, Vec<f32>)>,
    ) -> Result<UpdateStats> {
        self.grads.begin(pool, policy);
        if let Some(c) = &mut critic {
            c.critic.grad.fill(0.0);
        }
        let trains_trunk = !critic.as_ref().is_some_and(|c| c.head_only);
        let mut stats = UpdateStats::default();
        let weights = policy.weights();
        let (mut given, mut given_values) = (ScoreGrads::default(), Vec::new());
        let batches = micro_batches(groups, self.max_rows);
        let (micro, all) = (largest(groups, &batches), all_rows(groups, &batches));
        self.seen = (self.seen.0.max(micro), self.seen.1.max(all));
        self.trainer.reserve_training(&weights, micro, all);
        for pieces in batches {
            let batch = PackedBatch { update: Some(self.adam.updates), ..pack(groups, &pieces) };
            stats.rows += batch.tokens.len();
            let scores = match warp {
                Some(warp) => self.trainer.forward(pool, &weights, &batch, warp),
                None => {
                    self.trainer.forward_hidden(pool, &weights, &batch, trains_trunk);
                    Scores::default()
                }
            };
            let values = critic.as_ref().map(|c| self.trainer.values(&batch, &c.critic.head));
            let (d, d_values) = objective(&pieces, &scores, values.as_deref().unwrap_or(&[]))?;
            check_finite("logprob", groups, &pieces, &scores.entropies)?;
            check_finite("loss gradient", groups, &pieces, &d.logprobs)?;
            check_finite("entropy gradient", groups, &pieces, &d.entropies)?;
            check_finite("value gradient", groups, &pieces, &d_values)?;
            if let Some(c) = &mut critic {
                let Critic { head, grad, .. } = &mut *c.critic;
                self.trainer.values_backward(&batch, head, &d_values, grad);
            }
            if trains_trunk {
                let warp = warp.unwrap_or(&UNUSED);
                self.trainer.backward(
                    pool,
                    &weights,
                    &batch,
                    warp,
                    &d.logprobs,
                    &d.entropies,
                    &mut self.grads,
                );
            }
            given.add(d);
            given_values.extend(d_values);
        }
        self.trainer.finish(pool, &weights, &mut self.grads);
        let own = if policy.adapter.is_some() { &self.grads.adapter } else { &self.grads.base };
        let head_grad = critic.as_ref().map_or(&[][..], |c| &c.critic.grad);
        let [squares, head_squares] = [&own[..], head_grad].map(|g| sum_of_squares(pool, g));
        if !squares.is_finite() || !head_squares.is_finite() {
            return Err(self.culprit(pool, &weights, groups, warp, &given, &given_values, critic));
        }
        if let Some(c) = critic {
            c.critic.step(pool, optimizer, c.lr);
        }
        if trains_trunk {
            let grads = if policy.adapter.is_some() { &self.grads.adapter } else { &self.grads.base };
            stats.grad_norm = squares.sqrt();
            self.adam.step(pool, policy.trainable_mut(), grads, stats.grad_norm, optimizer, lr);
            policy.version.0 += 1;
            policy.measure_adapter(pool);
        }
        Ok(stats)
    }

    /// The gradient of the last update, laid out as the trainable arena's slots.
    pub fn last_grads(&self) -> &Grads {
        &self.grads
    }
}
