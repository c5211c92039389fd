//! Which prompts a step gets: named tasks and their mixture, the instance filter, refill, replay.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::{Recipe, StageConfig, StageKind};
use crate::data::arithmetic::ArithmeticConfig;
use crate::data::feed::Curriculum;
use crate::error::{EngineError, Result};
use crate::loss::kl::Placement;

/// A named set of prompts with its own held-out ones.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TaskConfig {
    /// What stages, rewards, metrics and samples call it.
    pub name: String,
    /// JSONL file of rows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
    /// JSONL file of held-out rows; without it the first `heldout` rows in shuffled order are held out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub eval_path: Option<PathBuf>,
    /// Generate arithmetic problems instead of reading `path`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub arithmetic: Option<ArithmeticConfig>,
    /// Prompt with `{field}` placeholders; `data.prompt` without it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prompt: Option<String>,
    /// System message; `data.system` without it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub system: Option<String>,
    /// Share of the prompts, relative to the other tasks of the stage.
    #[serde(default = "one")]
    pub weight: f64,
    /// Rows held out for evaluation; `data.heldout` without it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub heldout: Option<usize>,
}

fn one() -> f64 {
    1.0
}

/// Drops prompts that teach nothing, by the mean reward of their completions as a share of the full reward (the sum
/// of the weights; with rewards of 0 and 1 it is the pass rate). A prompt on a bound is out of it.
///
/// Prompts that the policy never solves are dropped before training in RIF-RFT (Lai et al. 2025, arXiv 2507.05386:
/// `samples = 8, min_rate = 0.0`).
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct FilterConfig {
    /// Completions a prompt in a pass over all prompts before each grpo stage; 0 is no pass.
    pub samples: usize,
    /// During training, a prompt out of bounds this many times in a row is dropped; 0 is never.
    pub patience: u64,
    /// A prompt whose mean reward is at or below this share is out of bounds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_rate: Option<f64>,
    /// A prompt whose mean reward is at or above this share is out of bounds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_rate: Option<f64>,
    /// A prompt whose rewards deviate by this or less (standard deviation, as a share of the full reward) is out of bounds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_std: Option<f64>,
}

/// Dynamic sampling (DAPO, Yu et al. 2025, arXiv 2503.14476, section 3.2): groups whose rewards are all equal are left
/// out and further prompts drawn for them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DynamicConfig {
    /// Rounds of drawing a step, the first included; then the step goes on with the groups it has.
    pub max_rounds: u64,
}

impl Default for DynamicConfig {
    fn default() -> Self {
        Self { max_rounds: 3 }
    }
}

/// Which past groups a full buffer keeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ReplayKeep {
    /// The newest.
    #[default]
    Recent,
    /// Those with the highest mean reward, the newest among equals.
    Best,
}

/// A bounded buffer of past groups whose rewards differ.
///
/// Their ratios are new to sampled probability, which clips bound; with `algorithm.objective.sampler_correction` they
/// are new to probability at the start of the step, and its weights correct for the rest (decoupled PPO, Hilton et
/// al. 2021, arXiv 2110.00641, eq. 2).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ReplayConfig {
    /// Share of a step's groups that are past ones, once there are enough.
    pub share: f64,
    /// Most groups kept.
    pub capacity: usize,
    /// Groups older than this many steps are forgotten; 0 is no limit.
    pub max_age: u64,
    /// What a full buffer keeps.
    pub keep: ReplayKeep,
}

impl Default for ReplayConfig {
    fn default() -> Self {
        Self { share: 0.25, capacity: 64, max_age: 16, keep: ReplayKeep::Recent }
    }
}

impl ReplayConfig {
    /// Past groups of a step with `prompts` groups: at least one, and at least one group is fresh.
    pub fn groups(&self, prompts: usize) -> usize {
        ((self.share * prompts as f64).round() as usize).clamp(1, prompts.saturating_sub(1).max(1))
    }
}

impl Recipe {
    /// The tasks with what they share filled in; without a `[[task]]`, the nameless one of `[data]`.
    pub fn tasks(&self) -> Vec<TaskConfig> {
        let data = &self.data;
        if self.task.is_empty() {
            return vec![TaskConfig {
                name: String::new(),
                path: data.path.clone(),
                eval_path: data.eval_path.clone(),
                arithmetic: data.arithmetic.clone(),
                prompt: data.prompt.clone(),
                system: data.system.clone(),
                weight: 1.0,
                heldout: Some(data.heldout),
            }];
        }
        let filled = |task: &TaskConfig| TaskConfig {
            prompt: task.prompt.clone().or_else(|| data.prompt.clone()),
            system: task.system.clone().or_else(|| data.system.clone()),
            heldout: task.heldout.or(Some(data.heldout)),
            ..task.clone()
        };
        self.task.iter().map(filled).collect()
    }

    /// Sum of the weights of the rewards that score `task`.
    pub fn full_reward(&self, task: &str) -> f64 {
        let applies = |tasks: &[String]| tasks.is_empty() || tasks.iter().any(|t| t == task);
        self.reward.iter().filter(|r| applies(&r.tasks)).map(|r| r.weight).sum()
    }

    /// Weight of each task in `stage`, in the order of [`Recipe::tasks`]; 0 for those that it does not draw from.
    pub fn task_weights(&self, stage: &StageConfig) -> Vec<f64> {
        let weight = |task: &TaskConfig| match stage.tasks.iter().position(|t| *t == task.name) {
            Some(at) => stage.weights.get(at).copied().unwrap_or(task.weight),
            None if stage.tasks.is_empty() => task.weight,
            None => 0.0,
        };
        self.tasks().iter().map(weight).collect()
    }

    fn known_task(&self, name: &str, place: &str) -> Result<()> {
        let names: Vec<&str> = self.task.iter().map(|t| t.name.as_str()).collect();
        match names.contains(&name) {
            true => Ok(()),
            false if names.is_empty() => Err(EngineError::Config(format!(
                "{place} names the task `{name}` and the recipe has no [[task]]. hint: add one with that name, or remove \
                 {place}"
            ))),
            false => Err(EngineError::Config(format!(
                "{place} names the task `{name}`; the recipe has {}",
                names.join(", ")
            ))),
        }
    }

    pub(super) fn validate_tasks(&self) -> Result<()> {
        let fail = |message: String| Err(EngineError::Config(message));
        let data = &self.data;
        if !self.task.is_empty()
            && (data.path.is_some() || data.eval_path.is_some() || data.arithmetic.is_some())
        {
            return fail(
                "data: `path`, `eval_path` and `arithmetic` belong to a task here. hint: move them into a [[task]]".into(),
            );
        }
        for (i, task) in self.tasks().iter().enumerate() {
            let place = if self.task.is_empty() { "data".into() } else { format!("task {}", task.name) };
            if !self.task.is_empty() && task.name.trim().is_empty() {
                return fail(format!("task.{i}.name must not be empty"));
            }
            if self.task[..i.min(self.task.len())].iter().any(|t| t.name == task.name) {
                return fail(format!("two tasks are called `{}`. hint: a name is one task's", task.name));
            }
            match (&task.path, &task.arithmetic) {
                (None, None)
                    if self.task.is_empty() && self.stages().iter().all(StageConfig::reads_own_rows) => {}
                (None, None) => {
                    return fail(format!(
                        "{place}: set `path` (a JSONL file) or `arithmetic` (generated problems)"
                    ));
                }
                (Some(_), Some(_)) => {
                    return fail(format!("{place}: `path` and `arithmetic` exclude each other"));
                }
                (None, Some(arithmetic)) => arithmetic
                    .check()
                    .map_err(|message| EngineError::Config(format!("{place}: arithmetic: {message}")))?,
                _ => {}
            }
            if !(task.weight > 0.0 && task.weight.is_finite()) {
                return fail(format!(
                    "{place}: `weight` must be positive, got {}. hint: leave the task out of stage.tasks instead",
                    task.weight
                ));
            }
        }
        for (i, reward) in self.reward.iter().enumerate() {
            for name in &reward.tasks {
                self.known_task(name, &format!("reward.{i}.tasks"))?;
            }
        }
        for (i, stage) in self.stage.iter().enumerate() {
            for name in &stage.tasks {
                self.known_task(name, &format!("stage.{i}.tasks"))?;
            }
            if !stage.weights.is_empty() && stage.weights.len() != stage.tasks.len() {
                return fail(format!(
                    "stage.{i}.weights has {} numbers and `tasks` {} names. hint: one weight a name",
                    stage.weights.len(),
                    stage.tasks.len()
                ));
            }
            if let Some(w) = stage.weights.iter().find(|w| !(**w > 0.0 && w.is_finite())) {
                return fail(format!("stage.{i}.weights must be positive, got {w}"));
            }
        }
        for (stage, weights) in self.stages().iter().map(|s| (s, self.task_weights(s))) {
            let drawn = self.tasks().into_iter().zip(weights).filter(|(_, w)| *w > 0.0).map(|(t, _)| t.name);
            for name in drawn.filter(|_| stage.kind != StageKind::Sft && !self.reward.is_empty()) {
                if self.full_reward(&name) == 0.0
                    && !self.reward.iter().any(|r| r.tasks.is_empty() || r.tasks.contains(&name))
                {
                    return fail(format!(
                        "task {name} has no reward: every [[reward]] names other `tasks`. hint: add the task to one"
                    ));
                }
            }
        }
        self.validate_draws()
    }

    fn validate_draws(&self) -> Result<()> {
        let fail = |message: String| Err(EngineError::Config(message));
        if let Some(filter) = &self.data.filter {
            if filter.samples == 0 && filter.patience == 0 {
                return fail(
                    "data.filter: set `samples` (a pass before training) or `patience` (during it)".into(),
                );
            }
            if filter.min_rate.is_none() && filter.max_rate.is_none() && filter.min_std.is_none() {
                return fail(
                    "data.filter: set at least one bound: `min_rate`, `max_rate` or `min_std`".into(),
                );
            }
            if let (Some(min), Some(max)) = (filter.min_rate, filter.max_rate)
                && min >= max
            {
                return fail(format!("data.filter: min_rate = {min} is not below max_rate = {max}"));
            }
        }
        if let Some(curriculum) = &self.data.curriculum {
            curriculum.check().or_else(|message| fail(format!("data.curriculum: {message}")))?;
        }
        let by_rate = matches!(self.data.curriculum, Some(Curriculum::PassRate { .. }));
        if by_rate || self.data.filter.is_some() {
            let place = if by_rate { "data.curriculum" } else { "data.filter" };
            for task in self.tasks().iter().filter(|_| !self.reward.is_empty()) {
                if self.full_reward(&task.name) <= 0.0 {
                    return fail(format!(
                        "{place} measures rewards as a share of the full one, the sum of the weights, and that is not \
                         positive. hint: give rewards positive weights"
                    ));
                }
            }
        }
        if self.rollout.dynamic.as_ref().is_some_and(|d| d.max_rounds == 0) {
            return fail("rollout.dynamic.max_rounds must be at least 1".into());
        }
        if let Some(replay) = &self.rollout.replay {
            if !(replay.share > 0.0 && replay.share < 1.0) {
                return fail(format!(
                    "rollout.replay.share must be between 0 and 1, got {}. hint: without replay, remove [rollout.replay]",
                    replay.share
                ));
            }
            if self.rollout.prompts_per_step < 2 {
                return fail(
                    "rollout.replay needs rollout.prompts_per_step of at least 2: one fresh and one past group".into(),
                );
            }
            let needed = replay.groups(self.rollout.prompts_per_step);
            if replay.capacity < needed {
                return fail(format!(
                    "rollout.replay.capacity = {} cannot fill the {needed} past groups of a step. hint: raise it",
                    replay.capacity
                ));
            }
            let algorithms = self.stage.iter().filter_map(|s| s.algorithm.as_ref()).chain([&self.algorithm]);
            for kl in algorithms.map(|a| &a.objective.kl) {
                if kl.placement == Placement::Reward && kl.coefficient != 0.0 {
                    return fail(
                        "rollout.replay: a KL penalty in the reward would be that of the policy that sampled a past group. \
                         hint: set algorithm.objective.kl.placement = \"loss\""
                            .into(),
                    );
                }
            }
        }
        Ok(())
    }
}
