//! The critic of a run: its values before a step, its updates, its metrics, and what of it is kept.

use super::Run;
use super::batch::StepBatch;
use crate::config::StageConfig;
use crate::error::Result;
use crate::learner::batch::Piece;
use crate::learner::checkpoint::{Buffers, Values};
use crate::learner::critic::Critic;
use crate::learner::optimizer::Moments;
use crate::learner::schedule::learning_rate;
use crate::learner::step::Learner;
use crate::loss::Aggregation;
use crate::loss::value::{CriticConfig, ValueOutputs, explained_variance, value_loss};

/// What a step's values are held against.
pub(super) struct Judged<'a> {
    pub(super) config: CriticConfig,
    pub(super) aggregation: Aggregation,
    /// Values before the update, by token.
    pub(super) old: &'a [f32],
    pub(super) returns: &'a [f32],
}

/// Sums over an update's micro-batches.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct ValueSums {
    loss: f64,
    clipped: usize,
}

impl Judged<'_> {
    /// The gradient of a micro-batch's values.
    pub(super) fn gradient(
        &self,
        batch: &StepBatch,
        pieces: &[Piece],
        values: &[f32],
        sums: &mut ValueSums,
    ) -> Vec<f32> {
        let (offsets, span) = batch.span(pieces);
        let (old, returns) = (&self.old[span.clone()], &self.returns[span.clone()]);
        let clip = self.config.clip;
        let mask = &batch.mask[span];
        let out: ValueOutputs =
            value_loss(&offsets, values, old, returns, mask, clip, self.aggregation, &batch.totals);
        sums.loss += out.loss;
        sums.clipped += out.clipped;
        let factor = self.config.coefficient;
        out.d_values.iter().map(|d| (f64::from(*d) * factor) as f32).collect()
    }

    /// Metrics of the step; `first` are the sums of its first update, `all` those of every one.
    pub(super) fn metrics(
        &self,
        batch: &StepBatch,
        first: &ValueSums,
        all: &ValueSums,
        updates: u64,
    ) -> Vec<(&'static str, f64)> {
        let tokens = batch.mask.iter().filter(|m| **m).count().max(1) as f64;
        let sum: f64 =
            self.old.iter().zip(&batch.mask).filter(|(_, m)| **m).map(|(v, _)| f64::from(*v)).sum();
        vec![
            ("value_loss", first.loss),
            ("value_clip_fraction", all.clipped as f64 / (tokens * updates.max(1) as f64)),
            ("explained_variance", explained_variance(self.returns, self.old, &batch.mask)),
            ("value_mean", sum / tokens),
        ]
    }
}

impl ValueSums {
    pub(super) fn add(&mut self, other: &Self) {
        self.loss += other.loss;
        self.clipped += other.clipped;
    }
}

impl Run {
    /// The critic starts on the policy as it is at the first step that has one.
    fn begin_critic(&mut self) {
        if let (Some(config), None) = (&self.recipe.algorithm.critic, &self.critic) {
            self.critic = Some(Critic::new(&self.policy, config.is_separate()));
        }
    }

    /// The critic's values of all completion tokens, under the weights that drew them.
    pub(super) fn old_values(&mut self, learner: &mut Learner, batch: &StepBatch) -> Option<Vec<f32>> {
        self.recipe.algorithm.critic?;
        self.begin_critic();
        let critic = self.critic.as_mut()?;
        critic.swap(&mut self.policy, &mut learner.adam);
        let values = learner.values(&self.pool, &self.policy.weights(), &batch.groups, &critic.head);
        critic.swap(&mut self.policy, &mut learner.adam);
        Some(values)
    }

    /// The critic's learning rate at an update.
    pub(super) fn critic_rate(&self, stage: &StageConfig, update: u64, total: u64) -> f64 {
        let o = &self.recipe.optimizer;
        let own = self.recipe.algorithm.critic.and_then(|c| c.lr);
        let peak = own.unwrap_or(stage.lr.unwrap_or(o.lr));
        learning_rate(o.schedule, peak, update, total, o.warmup_updates)
    }

    /// What a checkpoint keeps of the critic, by name.
    pub(super) fn critic_buffers(&self) -> Vec<(&'static str, Values<'_>)> {
        let Some(critic) = &self.critic else { return Vec::new() };
        let (m, v, _) = &critic.moments;
        let mut buffers = vec![
            ("critic_head", critic.head.weights[..].into()),
            ("critic_head_m", m[..].into()),
            ("critic_head_v", v[..].into()),
        ];
        if let Some((arena, adam)) = &critic.trunk {
            buffers.push(("critic_weights", arena.trainable_parts().into()));
            let own = |name: &str| MOMENTS.iter().find(|(_, theirs)| *theirs == name).map(|(own, _)| *own);
            buffers.extend(adam.moments.buffers().into_iter().filter_map(|(n, b)| Some((own(n)?, b))));
        }
        buffers
    }

    /// Updates of the head and of a separate trunk.
    pub(super) fn critic_updates(&self) -> (u64, u64) {
        let trunk = |c: &Critic| c.trunk.as_ref().map_or(0, |(_, adam)| adam.updates);
        self.critic.as_ref().map_or((0, 0), |c| (c.moments.2, trunk(c)))
    }

    /// The inverse of [`Run::critic_buffers`], once the policy's own buffers are taken.
    pub(super) fn restore_critic(&mut self, buffers: &mut Buffers, updates: (u64, u64)) -> Result<()> {
        if !buffers.has("critic_head") {
            return Ok(());
        }
        self.begin_critic();
        let Some(critic) = &mut self.critic else { return Ok(()) };
        let len = critic.head.weights.len();
        critic.head.weights = buffers.take("critic_head", len)?;
        critic.moments =
            (buffers.take("critic_head_m", len)?, buffers.take("critic_head_v", len)?, updates.0);
        if let Some((arena, adam)) = &mut critic.trunk {
            let weights = buffers.take("critic_weights", arena.trainable_len())?;
            arena.set_trainable_values(&weights);
            arena.refresh(&self.pool);
            MOMENTS.iter().for_each(|(own, theirs)| buffers.rename(own, theirs));
            adam.moments = Moments::restore(buffers, arena, &self.recipe.optimizer)?;
            adam.updates = updates.1;
        }
        Ok(())
    }
}

/// Names of a separate trunk's moments, with those that [`Moments`] gives them.
const MOMENTS: [(&str, &str); 3] =
    [("critic_m", "adam_m"), ("critic_v", "adam_v"), ("critic_scales", "adam_scales")];
