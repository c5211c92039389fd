//! The groups of a step: which prompts, what they were answered and paid, and which of them are trained on.

use serde::{Deserialize, Serialize};

use super::Run;
use super::answer::ROUND;
use super::filter::Measured;
use super::replay::{self, Past, informative};
use crate::config::StageConfig;
use crate::data::feed::{Cursor, Now};
use crate::error::Result;
use crate::reward::ScoredGroup;
use crate::rollout::{RolloutEngine, RolloutStats, SamplingConfig};

/// What the choice of prompts depends on; in every checkpoint.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct DataState {
    /// Of reinforcement, on through all stages.
    pub(super) prompts: Cursor,
    /// Of likelihood stages, from the start in each.
    pub(super) demonstrations: Cursor,
    pub(super) measured: Measured,
    pub(super) past: Vec<Past>,
}

impl DataState {
    pub(super) fn begin_stage(&mut self) {
        self.prompts.served.clear();
        self.demonstrations = Cursor::default();
    }
}

/// What rows are drawn for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Use {
    /// Their prompts are answered.
    Answer,
    /// Their demonstrations are imitated.
    Imitate,
}

/// The groups of a step.
pub(super) struct Drawn {
    /// Those that are trained on: fresh ones, then past ones.
    pub(super) groups: Vec<ScoredGroup>,
    /// How many of `groups` are fresh.
    pub(super) fresh: usize,
    /// Training row of each fresh one.
    rows: Vec<usize>,
    /// Fresh ones that are not trained on, since their rewards are all equal.
    pub(super) left_out: Vec<ScoredGroup>,
    pub(super) stats: RolloutStats,
    /// Seconds waited for verifiers after the rollouts.
    pub(super) reward_s: f64,
    /// What to tell of the choice.
    pub(super) metrics: Vec<(&'static str, f64)>,
}

impl Drawn {
    /// Groups that this step's policy drew.
    pub(super) fn seen(&self) -> impl Iterator<Item = &ScoredGroup> + Clone {
        self.groups[..self.fresh].iter().chain(&self.left_out)
    }

    /// Whether what was drawn is what is trained on.
    pub(super) fn is_plain(&self) -> bool {
        self.left_out.is_empty() && self.fresh == self.groups.len()
    }
}

impl Run {
    /// The next `count` training rows of a stage.
    pub(super) fn next_rows(
        &mut self,
        stage: &StageConfig,
        total: u64,
        count: usize,
        purpose: Use,
    ) -> Result<Vec<usize>> {
        let weights = self.recipe.task_weights(stage);
        let state = &mut self.state.data;
        let answered = purpose == Use::Answer;
        let cursor = if answered { &mut state.prompts } else { &mut state.demonstrations };
        let curriculum = self.recipe.data.curriculum.as_ref().filter(|c| answered || c.column().is_some());
        let now = Now {
            weights: &weights,
            progress: self.state.step_in_stage as f64 / total.max(1) as f64,
            curriculum,
            rates: &state.measured.rates,
        };
        let dropped = |row: usize| answered && state.measured.dropped.contains_key(&row);
        let feed = &mut self.tasks.feed;
        let rows: std::result::Result<Vec<usize>, usize> =
            (0..count).map(|_| feed.next(cursor, &now, &dropped)).collect();
        rows.map_err(|task| self.nothing_left(task))
    }

    /// Draws and scores the groups of a step; verifiers run while later groups still decode.
    pub(super) fn draw(
        &mut self,
        stage: &StageConfig,
        engine: &mut RolloutEngine,
        sampling: &SamplingConfig,
        step: u64,
        total: u64,
    ) -> Result<Drawn> {
        let prompts = self.recipe.rollout.prompts_per_step;
        let replay = self.recipe.rollout.replay.clone();
        let chosen = replay.as_ref().map_or(Vec::new(), |config| {
            replay::choose(&self.state.data.past, config, config.groups(prompts), self.recipe.seed, step)
        });
        let wanted = prompts - chosen.len();
        let rounds = self.recipe.rollout.dynamic.as_ref().map_or(1, |d| d.max_rounds);
        let (mut rows, mut seen, mut stats, mut reward_s) =
            (Vec::new(), Vec::new(), RolloutStats::default(), 0.0);
        let mut kept = 0;
        for round in 0..rounds {
            if kept >= wanted {
                break;
            }
            let new = self.next_rows(stage, total, wanted - kept, Use::Answer)?;
            let prompts = new.iter().map(|&row| &self.tasks.train[row]);
            let (samples, trial) = (self.recipe.rollout.group_size, self.trial(sampling, (step, total)));
            let answers = self.answer(engine, prompts, samples, step | round << ROUND, trial)?;
            kept += answers.groups.iter().filter(|g| informative(g)).count();
            rows.extend(new);
            seen.extend(answers.groups);
            add(&mut stats, &answers.stats);
            reward_s += answers.waited;
        }
        self.scorer.end_step(&seen, step, total, self.recipe.seed)?;
        self.observe(&rows, &seen, step);

        let mut metrics = Vec::new();
        let mut drawn = Drawn {
            groups: Vec::new(),
            fresh: 0,
            rows: Vec::new(),
            left_out: Vec::new(),
            stats,
            reward_s,
            metrics: Vec::new(),
        };
        if self.recipe.rollout.dynamic.is_some() {
            metrics.extend([("groups_drawn", seen.len() as f64), ("groups_kept", kept as f64)]);
        }
        // without a single group to learn from, the first ones stand as they are
        let keep_all = self.recipe.rollout.dynamic.is_none() || kept == 0;
        for (row, group) in rows.into_iter().zip(seen) {
            if (keep_all && drawn.groups.len() < wanted) || informative(&group) {
                drawn.groups.push(group);
                drawn.rows.push(row);
            } else {
                drawn.left_out.push(group);
            }
        }
        drawn.fresh = drawn.groups.len();
        if replay.is_some() {
            let ages = chosen.iter().map(|&i| step - self.state.data.past[i].step).sum::<u64>();
            metrics.push(("replayed_groups", chosen.len() as f64));
            metrics.push(("replayed_age_mean", ages as f64 / chosen.len().max(1) as f64));
        }
        for i in chosen {
            let (_, group) = replay::recall(&self.state.data.past[i], &self.tasks)?;
            drawn.groups.push(group);
        }
        if self.recipe.data.filter.is_some() {
            metrics.push(("prompts_dropped", self.state.data.measured.dropped.len() as f64));
        }
        drawn.metrics = metrics;
        Ok(drawn)
    }

    /// Ends a step: its good groups may be trained on again.
    pub(super) fn remember(&mut self, drawn: &Drawn, step: u64) {
        if let Some(config) = &self.recipe.rollout.replay {
            replay::remember(
                &mut self.state.data.past,
                config,
                step,
                &drawn.rows,
                &drawn.groups[..drawn.fresh],
            );
        }
    }
}

fn add(sum: &mut RolloutStats, more: &RolloutStats) {
    sum.prefill_tokens += more.prefill_tokens;
    sum.cached_tokens += more.cached_tokens;
    sum.decoded_tokens += more.decoded_tokens;
    sum.recomputed_tokens += more.recomputed_tokens;
    sum.passes += more.passes;
    sum.seconds += more.seconds;
    sum.peak_blocks = sum.peak_blocks.max(more.peak_blocks);
    sum.preemptions += more.preemptions;
}
