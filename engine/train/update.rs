//! From the fixed terms of a step to new weights: its updates of policy and critic, epoch by epoch.

use super::Run;
use super::amft::imitation;
use super::critic::ValueSums;
use super::draw::Drawn;
use super::grpo::Step;
use crate::config::StageConfig;
use crate::error::Result;
use crate::learner::batch::Piece;
use crate::learner::step::{CriticStep, Learner, ScoreGrads, UpdateStats};
use crate::loss::LossSums;
use crate::model::backprop::Scores;
use crate::reward::ScoredGroup;

/// One update's sums over its micro-batches, before it.
#[derive(Debug, Default)]
pub(super) struct Update {
    pub(super) sums: LossSums,
    pub(super) values: ValueSums,
    /// Mean negative log-likelihood of the demonstrations.
    pub(super) likelihood: f64,
    /// Greatest |ratio - 1| of the groups that this step drew.
    pub(super) ratio_max_dev: f64,
    stats: UpdateStats,
    /// Rows computed, those of a separate critic among them.
    rows: usize,
}

/// All updates of a step.
#[derive(Debug, Default)]
pub(super) struct Updates {
    pub(super) first: Update,
    /// Sums over all of them.
    pub(super) all: LossSums,
    pub(super) values: ValueSums,
    pub(super) rows: usize,
    pub(super) last: UpdateStats,
    /// Learning rate of the last one.
    pub(super) lr: f64,
}

impl Run {
    /// Updates the weights `train.inner_epochs` times; `shown` are the rows whose demonstrations are imitated beside.
    pub(super) fn update(
        &mut self,
        stage: &StageConfig,
        total: u64,
        learner: &mut Learner,
        drawn: &Drawn,
        step: &Step,
        shown: &[usize],
    ) -> Result<Updates> {
        let mut updates = Updates::default();
        let epochs = self.recipe.train.inner_epochs;
        for epoch in 0..epochs {
            let (at, end) = (self.state.step_in_stage * epochs + epoch, total * epochs);
            let lr = self.learning_rate(stage, at, end);
            let critic_lr = self.critic_rate(stage, at, end);
            let mut done = self.update_policy(learner, drawn, step, shown, lr, critic_lr)?;
            self.update_critic(learner, drawn, step, critic_lr, &mut done)?;
            updates.all.add(&done.sums);
            updates.values.add(&done.values);
            updates.rows += done.rows;
            (updates.last, updates.lr) = (done.stats, lr);
            if epoch == 0 {
                updates.first = done;
            }
        }
        Ok(updates)
    }

    /// One update of the policy, and of the critic that shares its trunk.
    fn update_policy(
        &mut self,
        learner: &mut Learner,
        drawn: &Drawn,
        step: &Step,
        shown: &[usize],
        lr: f64,
        critic_lr: f64,
    ) -> Result<Update> {
        let batch = &step.batch;
        let imitation = imitation(&self.tasks, &self.state, shown)?;
        let (mut groups, mut ids) = (batch.groups.clone(), ids_of(&drawn.groups));
        if let Some(shown) = &imitation {
            groups.extend(shown.groups.iter().cloned());
            ids.extend(&shown.ids);
        }
        let mut done = Update::default();
        let objective = &self.recipe.algorithm.objective;
        let reinforce = |pieces: &[Piece], scores: &Scores| step.loss(objective, pieces, scores);
        let mut loss = |pieces: &[Piece], scores: &Scores| {
            let own = pieces.partition_point(|p| p.group < batch.groups.len());
            let moved = batch.ratio_deviation(&pieces[..own], scores, step.fresh);
            done.ratio_max_dev = done.ratio_max_dev.max(moved);
            let Some(shown) = &imitation else {
                let out = reinforce(pieces, scores);
                done.sums.add(&out.sums);
                return ScoreGrads { logprobs: out.d_new, entropies: out.d_entropy };
            };
            let weights = (1.0 - shown.mu, shown.mu);
            let (grads, out, share) = shown.blend(pieces, scores, batch.groups.len(), weights, reinforce);
            out.iter().for_each(|out| done.sums.add(&out.sums));
            done.likelihood += share;
            grads
        };
        let (pool, warp, optimizer) = (&self.pool, &step.warp, &self.recipe.optimizer);
        let judged = step.judged(&self.recipe);
        let critics_own = self.recipe.algorithm.critic.is_some_and(|c| step.number <= c.warmup_steps);
        let critic = self.critic.as_mut().filter(|_| judged.is_some());
        if critics_own && critic.as_ref().is_some_and(|c| c.trunk.is_some()) {
            let scores = learner.score(pool, &self.policy.weights(), &batch.groups, warp);
            loss(&batch.whole(), &scores);
            return Ok(done);
        }
        let with = critic.filter(|c| c.trunk.is_none()).map(|critic| CriticStep {
            critic,
            lr: critic_lr,
            head_only: critics_own,
        });
        let both = |pieces: &[Piece], scores: &Scores, values: &[f32]| {
            let grads = loss(pieces, scores);
            let judge = judged.as_ref().filter(|_| !values.is_empty());
            let d = judge.map(|j| j.gradient(batch, pieces, values, &mut done.values));
            Ok((grads, d.unwrap_or_default()))
        };
        done.stats = learner
            .update_with(pool, &mut self.policy, &groups, Some(warp), optimizer, lr, with, both)
            .map_err(|e| self.name_sample(e, &groups, &ids))?;
        done.rows = done.stats.rows;
        Ok(done)
    }

    /// One update of a critic that has its own trunk, if there is one; it takes the policy's place while it works.
    fn update_critic(
        &mut self,
        learner: &mut Learner,
        drawn: &Drawn,
        step: &Step,
        lr: f64,
        done: &mut Update,
    ) -> Result<()> {
        let Some(judged) = step.judged(&self.recipe) else { return Ok(()) };
        let Some(mut critic) = self.critic.take_if(|c| c.trunk.is_some()) else { return Ok(()) };
        let (version, batch) = (self.policy.version, &step.batch);
        let own = |pieces: &[Piece], _: &Scores, values: &[f32]| {
            Ok((ScoreGrads::default(), judged.gradient(batch, pieces, values, &mut done.values)))
        };
        critic.swap(&mut self.policy, &mut learner.adam);
        let with = Some(CriticStep { critic: &mut critic, lr, head_only: false });
        let (pool, policy, optimizer) = (&self.pool, &mut self.policy, &self.recipe.optimizer);
        let stats = learner.update_with(pool, policy, &batch.groups, None, optimizer, lr, with, own);
        critic.swap(&mut self.policy, &mut learner.adam);
        (self.policy.version, self.critic) = (version, Some(critic));
        let ids = ids_of(&drawn.groups);
        done.rows += stats.map_err(|e| self.name_sample(e, &batch.groups, &ids))?.rows;
        Ok(())
    }
}

/// Row id of every group.
fn ids_of(groups: &[ScoredGroup]) -> Vec<&str> {
    groups.iter().map(|g| g.group.prompt.id.as_str()).collect()
}
