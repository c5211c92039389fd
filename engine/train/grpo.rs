//! A step of reinforcement: draw, score, compare, update, log.

use std::time::Instant;

use serde_json::{Map, Value, json};

use super::Run;
use super::amft::imitation;
use super::batch::StepBatch;
use super::critic::{Judged, ValueSums};
use super::draw::{Drawn, Use};
use crate::advantage::{AdvantageConfig, Advantages, Baseline, Rewards, grouped};
use crate::config::StageConfig;
use crate::error::Result;
use crate::learner::batch::Piece;
use crate::learner::step::{CriticStep, Learner, ScoreGrads, UpdateStats};
use crate::loss::LossSums;
use crate::loss::entropy::EntropyControl;
use crate::loss::kl::Placement;
use crate::model::backprop::Scores;
use crate::report::health::Signs;
use crate::report::metrics::{StepMetrics, rss_peak_bytes};
use crate::report::progress::Progress;
use crate::report::sinks::RunFolder;
use crate::reward::{ErrorCount, ScoredGroup, component_means, error_counts};
use crate::rng::{Purpose, Stream};
use crate::rollout::RolloutEngine;
use crate::types::FinishReason;

/// Advantages below this are rounding.
const NO_ADVANTAGE: f32 = 1e-6;

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
        let step = self.state.steps + 1;
        let sampling = self.sampling(self.recipe.rollout.temperature);

        let dropped = self.state.data.measured.dropped.len();
        let drawn = self.draw(stage, engine, &sampling, step, total)?;
        let shown = match &stage.amft {
            Some(_) => self.next_rows(stage, total, stage.batch.unwrap_or(32), Use::Imitate)?,
            None => Vec::new(),
        };
        let (groups, rollout, reward_s) = (&drawn.groups, drawn.stats, drawn.reward_s);

        let start = Instant::now();
        let mut batch = StepBatch::new(groups, &sampling, self.recipe.algorithm.mask_truncated);
        let fresh = batch.first_completion[drawn.fresh];
        if let Some(correction) = self.recipe.algorithm.objective.sampler_correction
            && drawn.fresh < groups.len()
        {
            let past = &batch.groups[drawn.fresh..];
            let old = learner.score(&self.pool, &self.policy.weights(), past, &sampling.warp()).logprobs;
            batch.correct(fresh, &old, &correction);
        }
        if self.recipe.algorithm.objective.top_entropy < 1.0 {
            let entropies =
                learner.score(&self.pool, &self.policy.weights(), &batch.groups, &sampling.warp()).entropies;
            batch.keep_uncertain(&entropies, self.recipe.algorithm.objective.top_entropy);
        }
        // a later stage may have no KL term though an earlier one had
        let reference = match self.recipe.algorithm.objective.needs_reference() {
            true => self.reference_logprobs(learner, &batch.groups, &sampling.warp()),
            false => None,
        };
        let greedy = match self.recipe.algorithm.advantage.baseline {
            Baseline::Greedy => self.greedy_rewards(engine, groups, step, total)?,
            _ => Vec::new(),
        };
        let old_values = self.old_values(learner, &batch);
        let credit = self.credit(groups, &batch, reference.as_deref(), old_values.as_deref(), &greedy);
        let advantages = &credit.advantages;
        if let Some(control) = self.recipe.algorithm.objective.covariance {
            let draws = Stream::new(self.recipe.seed, Purpose::Covariance, &[step]);
            batch.hold_covariance(control, &credit.by_token, draws);
        }
        let judged = self.recipe.algorithm.critic.zip(old_values.as_deref()).map(|(config, old)| Judged {
            config,
            aggregation: self.recipe.algorithm.objective.aggregation,
            old,
            returns: &credit.returns,
        });
        let critics_own = self.is_critics_own(step);
        let imitation = imitation(&self.tasks, &self.state, &shown)?;
        let (mut all_groups, mut ids) = (batch.groups.clone(), ids_of(groups));
        if let Some(shown) = &imitation {
            all_groups.extend(shown.groups.iter().cloned());
            ids.extend(&shown.ids);
        }
        let entropy_coefficient =
            self.recipe.algorithm.objective.entropy_control.coefficient(&self.state.entropy);
        let coefficients = (self.state.kl_coefficient, entropy_coefficient);
        let objective = &self.recipe.algorithm.objective;
        let reinforce = |pieces: &[Piece], scores: &Scores| {
            batch.loss(pieces, scores, &credit.by_token, reference.as_deref(), coefficients, objective)
        };
        let meta = match (&stage.amft, &imitation) {
            (Some(config), Some(shown)) => {
                self.meta_gradient(config, learner, engine, &sampling, shown, &batch, &reinforce)?
            }
            _ => None,
        };
        let (mut value_first, mut value_all) = (ValueSums::default(), ValueSums::default());
        let mut imitated = 0.0;
        let mut first = LossSums::default();
        let mut all = LossSums::default();
        let mut stats = UpdateStats::default();
        let mut rows = 0;
        let mut lr = 0.0;
        let mut fresh_ratio_dev = 0.0f64;
        engine.rest();
        let epochs = self.recipe.train.inner_epochs;
        for epoch in 0..epochs {
            lr = self.learning_rate(stage, self.state.step_in_stage * epochs + epoch, total * epochs);
            let mut sums = LossSums::default();
            let critic_lr =
                self.critic_rate(stage, self.state.step_in_stage * epochs + epoch, total * epochs);
            let mut value_sums = ValueSums::default();
            let mut likelihood = 0.0;
            let mut loss = |pieces: &[Piece], scores: &Scores| {
                if epoch == 0 {
                    let own = pieces.partition_point(|p| p.group < batch.groups.len());
                    let moved = batch.ratio_deviation(&pieces[..own], scores, fresh);
                    fresh_ratio_dev = fresh_ratio_dev.max(moved);
                }
                let Some(shown) = &imitation else {
                    let out = reinforce(pieces, scores);
                    sums.add(&out.sums);
                    return Ok(ScoreGrads { logprobs: out.d_new, entropies: out.d_entropy });
                };
                let weights = (1.0 - shown.mu, shown.mu);
                let (grads, out, share) = shown.blend(pieces, scores, batch.groups.len(), weights, reinforce);
                out.iter().for_each(|out| sums.add(&out.sums));
                likelihood += share;
                Ok(grads)
            };
            let (pool, warp) = (&self.pool, sampling.warp());
            let optimizer = &self.recipe.optimizer;
            let separate = judged.is_some() && self.critic.as_ref().is_some_and(|c| c.trunk.is_some());
            if separate && critics_own {
                let scores = learner.score(pool, &self.policy.weights(), &batch.groups, &warp);
                loss(&batch.whole(), &scores)?;
                stats = UpdateStats::default();
            } else {
                let with = self
                    .critic
                    .as_mut()
                    .filter(|_| judged.is_some() && !separate)
                    .map(|critic| CriticStep { critic, lr: critic_lr, head_only: critics_own });
                let both = |pieces: &[Piece], scores: &Scores, values: &[f32]| {
                    let grads = loss(pieces, scores)?;
                    let judge = judged.as_ref().filter(|_| !values.is_empty());
                    let d = judge.map(|j| j.gradient(&batch, pieces, values, &mut value_sums));
                    Ok((grads, d.unwrap_or_default()))
                };
                stats = learner
                    .update_with(pool, &mut self.policy, &all_groups, Some(&warp), optimizer, lr, with, both)
                    .map_err(|e| self.name_sample(e, &all_groups, &ids))?;
            }
            if let (Some(judged), Some(mut critic)) = (&judged, self.critic.take_if(|_| separate)) {
                let version = self.policy.version;
                critic.swap(&mut self.policy, &mut learner.adam);
                let with = Some(CriticStep { critic: &mut critic, lr: critic_lr, head_only: false });
                let own = |pieces: &[Piece], _: &Scores, values: &[f32]| {
                    Ok((ScoreGrads::default(), judged.gradient(&batch, pieces, values, &mut value_sums)))
                };
                let (policy, groups) = (&mut self.policy, &batch.groups);
                let done = learner.update_with(pool, policy, groups, None, optimizer, critic_lr, with, own);
                critic.swap(&mut self.policy, &mut learner.adam);
                (self.policy.version, self.critic) = (version, Some(critic));
                rows += done.map_err(|e| self.name_sample(e, &batch.groups, &ids))?.rows;
            }
            rows += stats.rows;
            all.add(&sums);
            value_all.add(&value_sums);
            if epoch == 0 {
                (first, value_first) = (sums, value_sums);
                imitated = likelihood;
            }
        }
        learner.rest(self.plan.activations_rest);
        if reference.is_some() {
            self.advance_reference();
        }
        let learner_s = start.elapsed().as_secs_f64();

        let tokens = first.tokens.max(1) as f64;
        let kl = first.kl / tokens;
        let kl_coefficient = self.state.kl_coefficient;
        self.state.kl_coefficient =
            self.recipe.algorithm.objective.kl.next_coefficient(kl_coefficient, kl, first.tokens);
        self.state.entropy =
            self.recipe.algorithm.objective.entropy_control.next(&self.state.entropy, first.entropy / tokens);
        let mut extra = judged.map_or(Vec::new(), |j| j.metrics(&batch, &value_first, &value_all, epochs));
        if let (Some(config), Some(balance)) = (&stage.amft, self.state.balance) {
            let next = balance.next(config, first.entropy / tokens, meta);
            extra = vec![("sft_loss", imitated), ("amft_mu", balance.mu), ("amft_meta", next.meta)];
            self.state.balance = Some(next);
        }
        if self.recipe.algorithm.objective.entropy_control != EntropyControl::Fixed {
            extra.push(("entropy_coefficient", entropy_coefficient));
        }
        self.state.steps = step;
        self.state.version = self.policy.version.0;
        self.state.updates = learner.adam.updates;
        self.state.reward_states = self.scorer.states();
        self.state.rollout_tokens += rollout.decoded_tokens as u64;
        self.state.rollout_seconds += rollout.seconds;
        self.state.learner_rows += rows as u64;
        self.state.learner_seconds += learner_s;

        let every = self.recipe.eval.every;
        let eval_reward = match every > 0 && step.is_multiple_of(every) && self.measures() {
            true => Some(self.evaluate(engine)?.0.reward),
            false => None,
        };
        self.remember(&drawn, step);
        let (reward_mean, reward_std, zero_variance_groups) = match drawn.is_plain() {
            true => (advantages.reward_mean, advantages.reward_std, advantages.zero_variance_groups),
            false => seen_rewards(&drawn),
        };
        let completions = drawn.seen().flat_map(|g| &g.group.completions);
        let count = completions.clone().count().max(1) as f64;
        let signs = self.signs(groups, advantages, &first, &all, &stats);
        let health = self.state.health.assess(&signs);
        let change = self.state.health.remember(&signs, &health);
        let mut data = drawn.metrics.clone();
        if fresh < batch.offsets.len() - 1 {
            data.push(("replayed_ratio_max_dev", first.ratio_max_dev));
        }
        let metrics = StepMetrics {
            step,
            reward_mean,
            reward_std,
            components: component_means(drawn.seen()),
            kl,
            entropy: first.entropy / tokens,
            ratio_max_dev: fresh_ratio_dev,
            clip_fraction: all.clipped as f64 / all.tokens.max(1) as f64,
            zero_variance_groups,
            reward_errors: drawn.seen().flat_map(|g| &g.outcomes).map(|o| o.errors.len()).sum(),
            completion_tokens_mean: completions.clone().map(|c| c.tokens.len()).sum::<usize>() as f64 / count,
            truncated_fraction: completions.filter(|c| c.finish == FinishReason::Length).count() as f64
                / count,
            grad_norm: stats.grad_norm,
            lr,
            loss: first.loss,
            rollout_s: rollout.seconds,
            reward_s,
            learner_s,
            rollout_tokens_per_s: rollout.decoded_tokens as f64 / rollout.seconds.max(1e-9),
            learner_tokens_per_s: rows as f64 / learner_s.max(1e-9),
            kv_blocks_peak: rollout.peak_blocks,
            rss_peak_bytes: rss_peak_bytes(),
            kl_coefficient,
            eval_reward,
            extra,
            health,
            data,
        };
        let logged = match self.recipe.train.log_groups {
            0 => usize::MAX,
            n => n,
        };
        let nothing = std::iter::repeat(&0.0);
        let mut samples =
            sample_rows(step, drawn.seen().take(logged), advantages.values.iter().take(fresh).chain(nothing));
        credit.show_by_token(&mut samples, &batch.offsets, fresh);
        folder.samples(&samples)?;
        folder.metrics(step, &metrics.to_json())?;
        if self.state.data.measured.dropped.len() > dropped {
            self.write_dropped(folder)?;
        }
        progress.grpo_step(&metrics);
        if let Some(line) = change {
            progress.say(&format!("step {step}: {line}"));
        }
        self.warn_of_failures(step, &drawn, progress);
        Ok(())
    }

    /// Says which verifiers failed in a way that was not said before.
    pub(super) fn warn_of_failures(&mut self, step: u64, drawn: &Drawn, progress: &mut Progress) {
        let errors = error_counts(drawn.seen());
        let new = self.state.health.new_failures(errors.iter().map(failure_key));
        for e in errors.iter().filter(|e| new.contains(&failure_key(e))) {
            let what =
                format!("{} calls of {} failed ({}), the first: {}", e.count, e.script, e.kind, e.first);
            progress.say(&format!("warning: step {step}: {what}"));
        }
    }

    /// What a step showed of its health.
    fn signs(
        &self,
        groups: &[ScoredGroup],
        advantages: &Advantages,
        first: &LossSums,
        all: &LossSums,
        stats: &UpdateStats,
    ) -> Signs {
        let (kl, has_kl) = {
            let objective = &self.recipe.algorithm.objective;
            (&objective.kl, objective.needs_reference())
        };
        let full: f64 = groups.iter().map(|g| self.recipe.full_reward(&g.group.prompt.task)).sum();
        let outcomes = || groups.iter().flat_map(|g| &g.outcomes);
        let completions = || groups.iter().flat_map(|g| &g.group.completions);
        let cut = completions().filter(|c| c.finish == FinishReason::Length).count();
        // a KL penalty in the reward gives advantages that no verifier gave
        let only_kl = kl.placement == Placement::Reward && advantages.zero_variance_groups == groups.len();
        let taught = advantages.values.iter().filter(|a| !only_kl && a.abs() > NO_ADVANTAGE).count();
        Signs {
            groups: groups.len(),
            zero_variance_groups: advantages.zero_variance_groups,
            completions: completions().count(),
            rewarded: outcomes().filter(|o| o.reward.is_some()).count(),
            failed: outcomes().filter(|o| !o.errors.is_empty()).count(),
            taught,
            imitates: self.state.balance.is_some_and(|b| b.mu > 0.0),
            reward_mean: advantages.reward_mean,
            full_reward: full / groups.len().max(1) as f64,
            truncated_fraction: cut as f64 / completions().count().max(1) as f64,
            mask_truncated: self.recipe.algorithm.mask_truncated,
            clip_fraction: all.clipped as f64 / all.tokens.max(1) as f64,
            entropy: first.entropy / first.tokens.max(1) as f64,
            kl: has_kl.then(|| first.kl / first.tokens.max(1) as f64),
            kl_target: kl.target(),
            grad_norm: stats.grad_norm,
            max_grad_norm: self.recipe.optimizer.max_grad_norm,
        }
    }
}

pub(super) fn sample_rows<'a>(
    step: u64,
    groups: impl Iterator<Item = &'a ScoredGroup>,
    advantages: impl Iterator<Item = &'a f32>,
) -> Vec<Value> {
    let samples = groups.flat_map(|g| {
        let prompt = &g.group.prompt;
        g.group.completions.iter().zip(&g.outcomes).enumerate().map(move |(i, pair)| (prompt, i, pair))
    });
    samples
        .zip(advantages)
        .map(|((prompt, sample, (completion, outcome)), advantage)| {
            let mut row = (*prompt.fields).clone();
            let components: Map<String, Value> =
                outcome.components.iter().map(|(n, v)| (n.clone(), json!(v))).collect();
            let own = json!({
                "step": step,
                "id": prompt.id,
                "sample": sample,
                "prompt": prompt.text,
                "completion": completion.text,
                "reward": outcome.reward,
                "components": components,
                "errors": outcome.errors,
                "advantage": shortest(*advantage),
                "finish_reason": completion.finish,
                "tokens": completion.tokens,
                "token_ends": completion.token_ends,
                "logprobs": completion.logprobs.iter().map(|l| shortest(*l)).collect::<Vec<f64>>(),
            });
            if let Value::Object(own) = own {
                row.extend(own);
            }
            if !prompt.task.is_empty() {
                row.insert("task".into(), json!(*prompt.task));
            }
            Value::Object(row)
        })
        .collect()
}

/// Row id of every group.
fn ids_of(groups: &[ScoredGroup]) -> Vec<&str> {
    groups.iter().map(|g| g.group.prompt.id.as_str()).collect()
}

/// What makes two failures the same for who reads the log.
fn failure_key(e: &ErrorCount) -> String {
    format!("{}: {}", e.script, e.kind)
}

/// The number with the fewest digits that reads back as `x`: half as long in JSON as that of the widened number.
pub(super) fn shortest(x: f32) -> f64 {
    x.to_string().parse().unwrap_or_else(|_| f64::from(x))
}

/// Mean reward, deviation and groups of equal rewards of all that a step drew, whatever it trains on.
fn seen_rewards(drawn: &Drawn) -> (f64, f64, usize) {
    let (mut values, mut ranges) = (Vec::new(), Vec::new());
    for group in drawn.seen() {
        let first = values.len();
        values.extend(group.outcomes.iter().map(|o| o.reward));
        ranges.push(first..values.len());
    }
    let all =
        grouped(&Rewards { values: &values, ..Rewards::default() }, &ranges, &AdvantageConfig::default());
    (all.reward_mean, all.reward_std, all.zero_variance_groups)
}
