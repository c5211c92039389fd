//! A step of reinforcement, top down: data, rollout, reward ([`Run::draw`]), advantage ([`Run::terms`]), loss and learner
//! ([`Run::update`]), log ([`Run::log_step`]).

use std::time::Instant;

use rft_kernels::Warp;

use super::Run;
use super::batch::StepBatch;
use super::credit::Credit;
use super::critic::Judged;
use super::draw::{Drawn, Use};
use super::update::Updates;
use crate::advantage::Baseline;
use crate::config::{Recipe, StageConfig};
use crate::error::Result;
use crate::learner::batch::Piece;
use crate::learner::step::Learner;
use crate::loss::entropy::EntropyControl;
use crate::loss::{LossOutputs, Objective};
use crate::model::backprop::Scores;
use crate::report::progress::Progress;
use crate::report::sinks::RunFolder;
use crate::rng::{Purpose, Stream};
use crate::rollout::RolloutEngine;

/// What the loss of a step is made of: all of it is fixed before the step's first update.
pub(super) struct Step<'a> {
    /// From 1, through all stages.
    pub(super) number: u64,
    pub(super) batch: StepBatch<'a>,
    /// Completions that this step drew; those of past groups are behind them.
    pub(super) fresh: usize,
    /// The distribution that tokens were drawn from.
    pub(super) warp: Warp,
    /// Logprobs of the reference policy, by token.
    reference: Option<Vec<f32>>,
    /// The critic's values, by token.
    old_values: Option<Vec<f32>>,
    pub(super) credit: Credit,
    pub(super) kl_coefficient: f64,
    entropy_coefficient: f64,
    /// Whether prompts were dropped when the step was drawn.
    pub(super) drops_rows: bool,
}

impl Step<'_> {
    /// The loss of a micro-batch and its gradient, by token.
    pub(super) fn loss(&self, objective: &Objective, pieces: &[Piece], scores: &Scores) -> LossOutputs {
        let coefficients = (self.kl_coefficient, self.entropy_coefficient);
        let (advantages, reference) = (&self.credit.by_token, self.reference.as_deref());
        self.batch.loss(pieces, scores, advantages, reference, coefficients, objective)
    }

    /// What the critic's values are held against; `None` without a critic.
    pub(super) fn judged(&self, recipe: &Recipe) -> Option<Judged<'_>> {
        let aggregation = recipe.algorithm.objective.aggregation;
        let (config, old) = recipe.algorithm.critic.zip(self.old_values.as_deref())?;
        Some(Judged { config, aggregation, old, returns: &self.credit.returns })
    }
}

impl Run {
    /// Before the first step of a stage that reinforces or compares: measures the held-out reward.
    pub(super) fn begin_grpo(&mut self, engine: &mut RolloutEngine) -> Result<()> {
        if self.state.eval_before.is_none() && self.measures() {
            let (before, _) = self.evaluate(engine)?;
            eprintln!("held-out reward before reinforcement: {:.3}", before.reward);
            self.state.eval_before = Some(before);
        }
        Ok(())
    }

    pub(super) fn grpo_step(
        &mut self,
        stage: &StageConfig,
        total: u64,
        learner: &mut Learner,
        engine: &mut RolloutEngine,
        folder: &mut RunFolder,
        progress: &mut Progress,
    ) -> Result<()> {
        let number = self.state.steps + 1;
        let sampling = self.sampling(self.recipe.rollout.temperature);
        let dropped = self.state.data.measured.dropped.len();
        let drawn = self.draw(stage, engine, &sampling, number, total)?;
        let shown = match &stage.amft {
            Some(_) => self.next_rows(stage, total, stage.batch.unwrap_or(32), Use::Imitate)?,
            None => Vec::new(),
        };

        let start = Instant::now();
        let mut step = self.terms(&drawn, (number, total), learner, engine)?;
        step.drops_rows = self.state.data.measured.dropped.len() > dropped;
        let meta = match &stage.amft {
            Some(config) => self.meta_gradient(config, learner, engine, &sampling, &shown, &step)?,
            None => None,
        };
        engine.rest();
        let updates = self.update(stage, total, learner, &drawn, &step, &shown)?;
        learner.rest(self.plan.activations_rest);
        if step.reference.is_some() {
            self.advance_reference();
        }
        let learner_s = start.elapsed().as_secs_f64();

        let extra = self.advance_controls(stage, &step, &updates, meta);
        self.count_step(&drawn, &updates, learner, learner_s);
        let every = self.recipe.eval.every;
        let eval_reward = match every > 0 && number.is_multiple_of(every) && self.measures() {
            true => Some(self.evaluate(engine)?.0.reward),
            false => None,
        };
        self.remember(&drawn, number);
        let mut metrics = self.step_metrics(number, &drawn, &step, &updates, learner_s, extra);
        metrics.eval_reward = eval_reward;
        self.log_step(metrics, &drawn, &step, &updates, folder, progress)
    }

    /// Reference logprobs, values, advantages: what the loss of the drawn groups is made of.
    fn terms<'a>(
        &mut self,
        drawn: &'a Drawn,
        (number, total): (u64, u64),
        learner: &mut Learner,
        engine: &mut RolloutEngine,
    ) -> Result<Step<'a>> {
        let groups = &drawn.groups;
        let sampling = self.sampling(self.recipe.rollout.temperature);
        let warp = sampling.warp();
        let mut batch = StepBatch::new(groups, &sampling, self.recipe.algorithm.mask_truncated);
        let fresh = batch.first_completion[drawn.fresh];
        let objective = &self.recipe.algorithm.objective;
        if let Some(correction) = objective.sampler_correction
            && drawn.fresh < groups.len()
        {
            let past = &batch.groups[drawn.fresh..];
            let old = learner.score(&self.pool, &self.policy.weights(), past, &warp).logprobs;
            batch.correct(fresh, &old, &correction);
        }
        if objective.top_entropy < 1.0 {
            let scores = learner.score(&self.pool, &self.policy.weights(), &batch.groups, &warp);
            batch.keep_uncertain(&scores.entropies, objective.top_entropy);
        }
        // a later stage may have no KL term though an earlier one had
        let reference = match objective.needs_reference() {
            true => self.reference_logprobs(learner, &batch.groups, &warp),
            false => None,
        };
        let greedy = match self.recipe.algorithm.advantage.baseline {
            Baseline::Greedy => self.greedy_rewards(engine, groups, number, total)?,
            _ => Vec::new(),
        };
        let old_values = self.old_values(learner, &batch);
        let credit = self.credit(groups, &batch, reference.as_deref(), old_values.as_deref(), &greedy);
        let objective = &self.recipe.algorithm.objective;
        if let Some(control) = objective.covariance {
            let draws = Stream::new(self.recipe.seed, Purpose::Covariance, &[number]);
            batch.hold_covariance(control, &credit.by_token, draws);
        }
        Ok(Step {
            number,
            batch,
            fresh,
            warp,
            reference,
            old_values,
            credit,
            kl_coefficient: self.state.kl_coefficient,
            entropy_coefficient: objective.entropy_control.coefficient(&self.state.entropy),
            drops_rows: false,
        })
    }

    /// Moves the KL and entropy coefficients and the weight of demonstrations by what the step showed; returns the metrics that
    /// only some recipes have.
    fn advance_controls(
        &mut self,
        stage: &StageConfig,
        step: &Step,
        updates: &Updates,
        meta: Option<f64>,
    ) -> Vec<(&'static str, f64)> {
        let (first, objective) = (&updates.first.sums, &self.recipe.algorithm.objective);
        let tokens = first.tokens.max(1) as f64;
        let (kl, entropy) = (first.kl / tokens, first.entropy / tokens);
        self.state.kl_coefficient = objective.kl.next_coefficient(step.kl_coefficient, kl, first.tokens);
        self.state.entropy = objective.entropy_control.next(&self.state.entropy, entropy);
        let epochs = self.recipe.train.inner_epochs;
        let judged = step.judged(&self.recipe);
        let mut extra = judged
            .map_or(Vec::new(), |j| j.metrics(&step.batch, &updates.first.values, &updates.values, epochs));
        if let (Some(config), Some(balance)) = (&stage.amft, self.state.balance) {
            let next = balance.next(config, entropy, meta);
            self.state.balance = Some(next);
            let imitated = updates.first.likelihood;
            extra = vec![("sft_loss", imitated), ("amft_mu", balance.mu), ("amft_meta", next.meta)];
        }
        if objective.entropy_control != EntropyControl::Fixed {
            extra.push(("entropy_coefficient", step.entropy_coefficient));
        }
        extra
    }

    fn count_step(&mut self, drawn: &Drawn, updates: &Updates, learner: &Learner, learner_s: f64) {
        self.state.steps += 1;
        self.state.version = self.policy.version.0;
        self.state.updates = learner.adam.updates;
        self.state.reward_states = self.scorer.states();
        self.state.rollout_tokens += drawn.stats.decoded_tokens as u64;
        self.state.rollout_seconds += drawn.stats.seconds;
        self.state.learner_rows += updates.rows as u64;
        self.state.learner_seconds += learner_s;
    }
}
