//! Rewards of a step to an advantage for every token: within groups, or by a critic.

use std::ops::Range;

use serde_json::Value;

use super::Run;
use super::answer::GREEDY;
use super::batch::{StepBatch, component_rows};
use super::step_log::shortest;
use crate::advantage::dense::{self, Steps};
use crate::advantage::{
    Advantages, Combine, CreditRule, Rewards, compare, filter_groups, grouped, matrix_advantages, returns,
};
use crate::error::Result;
use crate::loss::kl::Placement;
use crate::reward::ScoredGroup;
use crate::rollout::RolloutEngine;

/// What the loss of a step compares with.
pub(super) struct Credit {
    /// By completion, for who reads them; the mean over its tokens where these differ.
    pub(super) advantages: Advantages,
    pub(super) by_token: Vec<f32>,
    /// What the critic's values should be, by token; empty without one.
    pub(super) returns: Vec<f32>,
}

/// The rewards of a step, completion by completion.
struct Scored<'a> {
    raw: Vec<Option<f64>>,
    steps: Vec<&'a Steps>,
    groups: Vec<Range<usize>>,
    lengths: Vec<usize>,
    /// Reward of the greedy completion of each completion's prompt; empty without one.
    greedy: Vec<Option<f64>>,
}

impl Credit {
    /// Puts into rows of samples.jsonl, the batch's completions first, the advantages of tokens that differ within one.
    pub(super) fn show_by_token(&self, rows: &mut [Value], offsets: &[usize], completions: usize) {
        for (row, span) in rows.iter_mut().zip(offsets.windows(2)).take(completions) {
            let own = &self.by_token[span[0]..span[1]];
            if let (Value::Object(row), true) = (row, own.iter().any(|a| *a != own[0])) {
                row.insert("token_advantages".into(), own.iter().map(|a| shortest(*a)).collect());
            }
        }
    }
}

impl Run {
    /// Advantages of all tokens in order. `values` are the critic's, `greedy` has one reward a group.
    pub(super) fn credit(
        &self,
        groups: &[ScoredGroup],
        batch: &StepBatch,
        reference: Option<&[f32]>,
        values: Option<&[f32]>,
        greedy: &[Option<f64>],
    ) -> Credit {
        let outcomes = || groups.iter().flat_map(|g| &g.outcomes);
        let of_group = |(g, group): (&Option<f64>, &ScoredGroup)| vec![*g; group.outcomes.len()];
        let scored = Scored {
            raw: outcomes().map(|o| o.reward).collect(),
            steps: outcomes().map(|o| o.steps.as_slice()).collect(),
            groups: batch.first_completion.windows(2).map(|g| g[0]..g[1]).collect(),
            lengths: batch.offsets.windows(2).map(|row| row[1] - row[0]).collect(),
            greedy: greedy.iter().zip(groups).flat_map(of_group).collect(),
        };
        let mut credit = match (values, self.recipe.algorithm.advantage.credit) {
            (Some(values), _) => self.critics(&scored, batch, reference, values),
            (None, CreditRule::Returns) => self.returns(&scored, batch, reference),
            (None, rule) => self.compared(groups, &scored, batch, reference, rule),
        };
        if !self.recipe.compares_in_group() {
            credit.advantages.zero_variance_groups = 0;
        }
        credit
    }

    /// Rewards by token, the KL penalty taken off each token's own where it has its place in the reward.
    fn token_rewards(&self, scored: &Scored, batch: &StepBatch, reference: Option<&[f32]>) -> Vec<f64> {
        let mut rewards = dense::token_rewards(&batch.offsets, &scored.raw, &scored.steps);
        let kl = &self.recipe.algorithm.objective.kl;
        if let (Some(reference), Placement::Reward) = (reference, kl.placement) {
            kl.penalise_tokens(self.state.kl_coefficient, &batch.old, reference, &mut rewards);
        }
        rewards
    }

    fn critics(
        &self,
        scored: &Scored,
        batch: &StepBatch,
        reference: Option<&[f32]>,
        values: &[f32],
    ) -> Credit {
        let config = self.recipe.algorithm.critic.unwrap_or_default();
        let rewards = self.token_rewards(scored, batch, reference);
        let (gamma, lambda) = (config.gamma, config.lambda);
        let mut out = returns::gae(&batch.offsets, &rewards, values, &batch.mask, gamma, lambda);
        if config.whiten {
            returns::whiten(&mut out.advantages, &batch.mask);
        }
        let returns = out.returns.iter().map(|r| *r as f32).collect();
        Credit { returns, ..self.by_token(scored, batch, &out.advantages) }
    }

    fn returns(&self, scored: &Scored, batch: &StepBatch, reference: Option<&[f32]>) -> Credit {
        let config = &self.recipe.algorithm.advantage;
        let rewards = self.token_rewards(scored, batch, reference);
        let kept = self.kept_rewards(scored);
        let totals: Vec<Option<f64>> = batch
            .offsets
            .windows(2)
            .zip(&kept)
            .map(|(row, kept)| kept.map(|_| rewards[row[0]..row[1]].iter().sum()))
            .collect();
        let greedy: Vec<f64> = scored.greedy.iter().map(|g| g.unwrap_or(0.0)).collect();
        let inputs = Rewards { values: &totals, lengths: &scored.lengths, greedy: &greedy };
        let (_, compared) = compare(&inputs, &scored.groups, config);
        let mut values = returns::discounted_returns(&batch.offsets, &rewards, &batch.mask, config.gamma);
        for (row, compared) in batch.offsets.windows(2).zip(&compared) {
            for value in &mut values[row[0]..row[1]] {
                *value = compared.map_or(0.0, |c| (*value - c.baseline) / c.divisor);
            }
        }
        if config.whiten {
            returns::whiten(&mut values, &batch.mask);
        }
        self.by_token(scored, batch, &values)
    }

    fn compared(
        &self,
        groups: &[ScoredGroup],
        scored: &Scored,
        batch: &StepBatch,
        reference: Option<&[f32]>,
        rule: CreditRule,
    ) -> Credit {
        let (config, kl) = (&self.recipe.algorithm.advantage, &self.recipe.algorithm.objective.kl);
        let spread = |values: &[f32]| -> Vec<f32> {
            values.iter().zip(&scored.lengths).flat_map(|(&v, &n)| std::iter::repeat_n(v, n)).collect()
        };
        if config.combine == Combine::NormalizeThenSum {
            // a valid recipe has one weight for all rewards here
            let rows = component_rows(groups);
            let weight = self.recipe.reward.first().map_or(1.0, |r| r.weight);
            let weights = vec![weight; rows.first().map_or(0, Vec::len)];
            let advantages = matrix_advantages(&rows, &weights, &scored.groups, config);
            return Credit { by_token: spread(&advantages.values), advantages, returns: Vec::new() };
        }
        let greedy: Vec<f64> = scored.greedy.iter().map(|g| g.unwrap_or(0.0)).collect();
        let of = |values: &[Option<f64>]| {
            let inputs = Rewards { values, lengths: &scored.lengths, greedy: &greedy };
            grouped(&inputs, &scored.groups, config)
        };
        let kept = self.kept_rewards(scored);
        let has_steps = rule == CreditRule::Process && scored.steps.iter().any(|s| !s.is_empty());
        let mut outcomes = kept.clone();
        for (row, reward) in outcomes.iter_mut().enumerate().filter_map(|(i, r)| Some((i, r.as_mut()?))) {
            let tokens = batch.offsets[row]..batch.offsets[row + 1];
            if has_steps {
                *reward = dense::outcome_part(*reward, scored.steps[row]);
            }
            if let (Some(reference), Placement::Reward) = (reference, kl.placement) {
                let coefficient = self.state.kl_coefficient;
                *reward -= kl.reward_penalty(coefficient, &batch.old[tokens.clone()], &reference[tokens]);
            }
        }
        let values = of(&outcomes).values;
        let plain = of(&scored.raw);
        let mut by_token = spread(&values);
        if !has_steps {
            return Credit { by_token, advantages: Advantages { values, ..plain }, returns: Vec::new() };
        }
        let kept: Vec<bool> = kept.iter().map(Option::is_some).collect();
        let steps = dense::process(&batch.offsets, &scored.groups, &scored.steps, &kept, config);
        by_token.iter_mut().zip(&steps).for_each(|(a, s)| *a = (f64::from(*a) + s) as f32);
        let all: Vec<f64> = by_token.iter().map(|a| f64::from(*a)).collect();
        self.by_token(scored, batch, &all)
    }

    /// Rewards of the completions that take part: those that the filter keeps and that have a baseline.
    fn kept_rewards(&self, scored: &Scored) -> Vec<Option<f64>> {
        let mut kept = match &self.recipe.algorithm.advantage.filter {
            Some(f) => filter_groups(&scored.raw, &scored.lengths, &scored.groups, f.by, f.keep),
            None => scored.raw.clone(),
        };
        for (reward, greedy) in kept.iter_mut().zip(&scored.greedy) {
            *reward = reward.filter(|_| greedy.is_some());
        }
        kept
    }

    /// Advantages that differ from token to token, with their means for who reads them.
    fn by_token(&self, scored: &Scored, batch: &StepBatch, values: &[f64]) -> Credit {
        let inputs = Rewards { values: &scored.raw, ..Rewards::default() };
        let statistics = crate::advantage::AdvantageConfig::default();
        let (plain, _) = compare(&inputs, &scored.groups, &statistics);
        let own: Vec<f32> =
            values.iter().zip(&batch.mask).map(|(v, m)| if *m { *v as f32 } else { 0.0 }).collect();
        let mean = |row: &[usize]| {
            let sum = own[row[0]..row[1]].iter().map(|a| f64::from(*a)).sum::<f64>();
            (sum / (row[1] - row[0]).max(1) as f64) as f32
        };
        let means = batch.offsets.windows(2).map(mean).collect();
        Credit { advantages: Advantages { values: means, ..plain }, by_token: own, returns: Vec::new() }
    }

    /// Rewards of one greedy completion of each group's prompt (ReMax), `None` where its verifiers abstain.
    pub(super) fn greedy_rewards(
        &self,
        engine: &mut RolloutEngine,
        groups: &[ScoredGroup],
        step: u64,
        total: u64,
    ) -> Result<Vec<Option<f64>>> {
        let prompts = groups.iter().map(|g| &g.group.prompt);
        let sampling = self.sampling(0.0);
        let answers = self.answer(engine, prompts, 1, GREEDY | step, self.trial(&sampling, (step, total)))?;
        Ok(answers.groups.iter().map(|g| g.outcomes[0].reward).collect())
    }
}
