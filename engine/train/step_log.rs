//! What a step of reinforcement tells: its line of metrics, its samples, its health, its failures.

use serde_json::{Map, Value, json};

use super::Run;
use super::draw::Drawn;
use super::grpo::Step;
use super::update::Updates;
use crate::advantage::{AdvantageConfig, Advantages, Rewards, grouped};
use crate::error::Result;
use crate::loss::kl::Placement;
use crate::report::health::Signs;
use crate::report::metrics::{StepMetrics, rss_peak_bytes};
use crate::report::progress::Progress;
use crate::report::sinks::RunFolder;
use crate::reward::{ErrorCount, ScoredGroup, component_means, error_counts};
use crate::types::FinishReason;

/// Advantages below this are rounding.
const NO_ADVANTAGE: f32 = 1e-6;

impl Run {
    /// The metrics of step `number`, but for its held-out reward and its health.
    pub(super) fn step_metrics(
        &self,
        number: u64,
        drawn: &Drawn,
        step: &Step,
        updates: &Updates,
        learner_s: f64,
        extra: Vec<(&'static str, f64)>,
    ) -> StepMetrics {
        let (first, all, rollout) = (&updates.first.sums, &updates.all, &drawn.stats);
        let advantages = &step.credit.advantages;
        let (reward_mean, reward_std, zero_variance_groups) = match drawn.is_plain() {
            true => (advantages.reward_mean, advantages.reward_std, advantages.zero_variance_groups),
            false => seen_rewards(drawn),
        };
        let completions = drawn.seen().flat_map(|g| &g.group.completions);
        let count = completions.clone().count().max(1) as f64;
        let tokens = first.tokens.max(1) as f64;
        let mut data = drawn.metrics.clone();
        if drawn.fresh < drawn.groups.len() {
            data.push(("replayed_ratio_max_dev", first.ratio_max_dev));
        }
        StepMetrics {
            step: number,
            reward_mean,
            reward_std,
            components: component_means(drawn.seen()),
            kl: first.kl / tokens,
            entropy: first.entropy / tokens,
            ratio_max_dev: updates.first.ratio_max_dev,
            clip_fraction: all.clipped as f64 / all.tokens.max(1) as f64,
            zero_variance_groups,
            reward_errors: drawn.seen().flat_map(|g| &g.outcomes).map(|o| o.errors.len()).sum(),
            completion_tokens_mean: completions.clone().map(|c| c.tokens.len()).sum::<usize>() as f64 / count,
            truncated_fraction: completions.filter(|c| c.finish == FinishReason::Length).count() as f64
                / count,
            grad_norm: updates.last.grad_norm,
            lr: updates.lr,
            loss: first.loss,
            rollout_s: rollout.seconds,
            reward_s: drawn.reward_s,
            learner_s,
            rollout_tokens_per_s: rollout.decoded_tokens as f64 / rollout.seconds.max(1e-9),
            learner_tokens_per_s: updates.rows as f64 / learner_s.max(1e-9),
            kv_blocks_peak: rollout.peak_blocks,
            rss_peak_bytes: rss_peak_bytes(),
            kl_coefficient: step.kl_coefficient,
            eval_reward: None,
            extra,
            health: Default::default(),
            data,
        }
    }

    /// Judges the step, writes it into the run folder and shows it.
    pub(super) fn log_step(
        &mut self,
        mut metrics: StepMetrics,
        drawn: &Drawn,
        step: &Step,
        updates: &Updates,
        folder: &mut RunFolder,
        progress: &mut Progress,
    ) -> Result<()> {
        let advantages = &step.credit.advantages;
        let signs = self.signs(&drawn.groups, advantages, updates);
        metrics.health = self.state.health.assess(&signs);
        let change = self.state.health.remember(&signs, &metrics.health);
        let logged = match self.recipe.train.log_groups {
            0 => usize::MAX,
            n => n,
        };
        let nothing = std::iter::repeat(&0.0);
        let of_fresh = advantages.values.iter().take(step.fresh);
        let mut samples = sample_rows(metrics.step, drawn.seen().take(logged), of_fresh.chain(nothing));
        step.credit.show_by_token(&mut samples, &step.batch.offsets, step.fresh);
        folder.samples(&samples)?;
        folder.metrics(metrics.step, &metrics.to_json())?;
        if step.drops_rows {
            self.write_dropped(folder)?;
        }
        progress.grpo_step(&metrics);
        if let Some(line) = change {
            progress.say(&format!("step {}: {line}", metrics.step));
        }
        self.warn_of_failures(metrics.step, drawn, progress);
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
    fn signs(&self, groups: &[ScoredGroup], advantages: &Advantages, updates: &Updates) -> Signs {
        let (first, all) = (&updates.first.sums, &updates.all);
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
            grad_norm: updates.last.grad_norm,
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
