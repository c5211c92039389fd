//! The instance filter: prompts whose rollouts teach nothing are dropped, and the run folder says which and why.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::Run;
use super::answer::FILTER_PASS;
use crate::config::{FilterConfig, StageConfig};
use crate::data::feed::Curriculum;
use crate::error::{EngineError, Result};
use crate::report::sinks::RunFolder;
use crate::reward::ScoredGroup;
use crate::rollout::RolloutEngine;

/// Prompts of a pass that are drawn at once: bounds the completions held.
const PASS_PROMPTS: usize = 256;

/// What was measured of the prompts so far.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct Measured {
    /// Exponential moving average of a row's mean reward, as a share of the full one; only with a pass-rate curriculum.
    pub(super) rates: BTreeMap<usize, f32>,
    pub(super) dropped: BTreeMap<usize, Dropped>,
    /// Times in a row that a row was out of bounds.
    streaks: BTreeMap<usize, u64>,
}

/// Why a row is gone.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Dropped {
    /// Steps done when it was dropped.
    step: u64,
    rate: f64,
    std: f64,
    why: String,
}

/// Mean and standard deviation (n in the denominator) of a group's rewards as shares of `full`; `None` where all abstained.
pub(super) fn shares(group: &ScoredGroup, full: f64) -> Option<(f64, f64)> {
    let rewards: Vec<f64> =
        group.outcomes.iter().filter_map(|o| o.reward).filter(|r| r.is_finite()).map(|r| r / full).collect();
    let n = rewards.len() as f64;
    let mean = rewards.iter().sum::<f64>() / n;
    let variance = rewards.iter().map(|r| (r - mean).powi(2)).sum::<f64>() / n;
    (n > 0.0).then(|| (mean, variance.sqrt()))
}

/// Rounding of a sum of rewards, so that a prompt that always earns the full reward is on a bound of 1.
const ROUNDING: f64 = 1e-9;

impl FilterConfig {
    /// Which bound a prompt is on or beyond, in words.
    fn out_of_bounds(&self, rate: f64, std: f64) -> Option<String> {
        match (self.min_rate, self.max_rate, self.min_std) {
            (Some(min), ..) if rate <= min + ROUNDING => {
                Some(format!("mean reward {rate:.3} ≤ min_rate {min}"))
            }
            (_, Some(max), _) if rate >= max - ROUNDING => {
                Some(format!("mean reward {rate:.3} ≥ max_rate {max}"))
            }
            (.., Some(min)) if std <= min + ROUNDING => Some(format!("deviation {std:.3} ≤ min_std {min}")),
            _ => None,
        }
    }
}

impl Run {
    /// Takes note of what the fresh groups of a step earned; drops rows that were out of bounds too often in a row.
    pub(super) fn observe(&mut self, rows: &[usize], groups: &[ScoredGroup], step: u64) {
        for (&row, group) in rows.iter().zip(groups) {
            let task = &self.tasks.list[self.tasks.feed.task_of(row)];
            let Some((rate, std)) = shares(group, task.full_reward) else { continue };
            let measured = &mut self.state.data.measured;
            if let Some(Curriculum::PassRate { decay, .. }) = self.recipe.data.curriculum {
                let old = measured.rates.get(&row).map_or(rate, |r| f64::from(*r));
                measured.rates.insert(row, (decay * old + (1.0 - decay) * rate) as f32);
            }
            let Some(filter) = self.recipe.data.filter.as_ref().filter(|f| f.patience > 0) else { continue };
            let Some(why) = filter.out_of_bounds(rate, std) else {
                measured.streaks.remove(&row);
                continue;
            };
            let streak = measured.streaks.entry(row).or_default();
            *streak += 1;
            let times = *streak;
            let left = task.train.len() - measured.dropped.range(task.train.clone()).count();
            // the last prompts of a task stay: a run must not end because its policy has become good
            if times >= filter.patience
                && left > self.recipe.rollout.prompts_per_step
                && !measured.dropped.contains_key(&row)
            {
                measured.streaks.remove(&row);
                let why = format!("{why}, {times} times in a row");
                measured.dropped.insert(row, Dropped { step, rate, std, why });
            }
        }
    }

    /// Before a stage: draws `filter.samples` completions of every prompt of its tasks and drops those out of bounds.
    pub(super) fn filter_pass(
        &mut self,
        stage: &StageConfig,
        engine: &mut RolloutEngine,
        folder: &RunFolder,
    ) -> Result<()> {
        let Some(filter) = self.recipe.data.filter.clone().filter(|f| f.samples > 0) else { return Ok(()) };
        let weights = self.recipe.task_weights(stage);
        let rows: Vec<usize> = (self.tasks.list.iter().zip(&weights))
            .filter(|(_, weight)| **weight > 0.0)
            .flat_map(|(task, _)| task.train.clone())
            .filter(|row| !self.state.data.measured.dropped.contains_key(row))
            .collect();
        let sampling = self.sampling(self.recipe.rollout.temperature);
        let (steps, key_step) = (self.state.steps, FILTER_PASS + self.state.stage as u64);
        let before = self.state.data.measured.dropped.len();
        for rows in rows.chunks(PASS_PROMPTS) {
            let prompts = rows.iter().map(|&row| &self.tasks.train[row]);
            let trial = self.trial(&sampling, (steps, self.recipe.train.steps));
            let answers = self.answer(engine, prompts, filter.samples, key_step, trial)?;
            for (&row, group) in rows.iter().zip(&answers.groups) {
                let task = &self.tasks.list[self.tasks.feed.task_of(row)];
                let Some((rate, std)) = shares(group, task.full_reward) else { continue };
                let measured = &mut self.state.data.measured;
                if matches!(self.recipe.data.curriculum, Some(Curriculum::PassRate { .. })) {
                    measured.rates.insert(row, rate as f32);
                }
                if let Some(why) = filter.out_of_bounds(rate, std) {
                    measured.dropped.insert(row, Dropped { step: steps, rate, std, why });
                }
            }
        }
        let dropped = self.state.data.measured.dropped.len() - before;
        eprintln!("filter: {dropped} of {} prompts dropped after {} tries each", rows.len(), filter.samples);
        self.write_dropped(folder)
    }

    /// Which rows are left to draw from is a fact of the run: dropped.jsonl lists the others, as they are now.
    pub(super) fn write_dropped(&self, folder: &RunFolder) -> Result<()> {
        if self.recipe.data.filter.is_none() {
            return Ok(());
        }
        let line = |(row, d): (&usize, &Dropped)| {
            let prompt = &self.tasks.train[*row];
            let mut line = json!({"step": d.step, "id": prompt.id, "prompt": prompt.text, "rate": d.rate, "std": d.std, "why": d.why});
            if !prompt.task.is_empty() {
                line["task"] = json!(*prompt.task);
            }
            line
        };
        let lines: Vec<Value> = self.state.data.measured.dropped.iter().map(line).collect();
        folder.lines("dropped.jsonl", &lines)
    }

    /// All prompts of a task are gone.
    pub(super) fn nothing_left(&self, task: usize) -> EngineError {
        let name = &self.tasks.list[task].name;
        let of = if name.is_empty() { String::new() } else { format!(" of task {name}") };
        EngineError::Config(format!(
            "the filter dropped every training prompt{of}; dropped.jsonl has the reasons. hint: widen the bounds of \
             [data.filter], or warm the policy up first"
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prompt_on_a_bound_is_out_of_it() {
        let filter = FilterConfig {
            min_rate: Some(0.0),
            max_rate: Some(1.0),
            min_std: Some(0.1),
            ..Default::default()
        };
        let out = |rate: f64, std: f64| filter.out_of_bounds(rate, std).is_some();
        assert!(out(0.0, 0.5) && out(1.0, 0.5) && out(0.1 + 0.7 + 0.2, 0.5) && out(0.5, 0.1));
        assert!(!out(0.01, 0.2) && !out(0.99, 0.11));
        assert!(FilterConfig::default().out_of_bounds(0.0, 0.0).is_none());
    }
}
