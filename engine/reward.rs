//! Groups to rewards: hands finished groups to the verifier pool while others still decode.

use std::collections::BTreeMap;
use std::sync::Arc;

use rft_rewards::{Context, Limits, OnError, Outcome, RewardPool, RewardSpec, Sample};
use serde_json::Value;

use crate::config::{OnErrorConfig, RewardConfig};
use crate::data::prompts::Row;
use crate::error::{EngineError, Result};
use crate::types::Group;

/// A group with what its verifiers said.
#[derive(Debug, Clone)]
pub struct ScoredGroup {
    /// The completions.
    pub group: Group,
    /// One a completion.
    pub outcomes: Vec<Outcome>,
}

/// The verifiers of a run.
pub struct Scorer {
    pool: RewardPool,
}

/// Groups of one rollout on their way through the verifiers.
pub struct Scoring<'a> {
    scorer: &'a Scorer,
    context: Context,
    waiting: BTreeMap<u64, Group>,
    done: BTreeMap<u64, ScoredGroup>,
}

impl Scorer {
    /// Loads the scripts of `rewards` into `workers` sandboxes.
    ///
    /// # Errors
    /// A script that is missing or does not parse, by path and line.
    pub fn new(rewards: &[RewardConfig], workers: usize) -> Result<Self> {
        let specs: Vec<RewardSpec> = rewards
            .iter()
            .map(|r| {
                Ok(RewardSpec {
                    weight: r.weight,
                    limits: Limits {
                        time_ms: r.time_ms,
                        memory_bytes: r.memory_mb << 20,
                        ..Limits::default()
                    },
                    on_error: match r.on_error {
                        OnErrorConfig::Abstain => OnError::Abstain,
                        OnErrorConfig::Fail => OnError::Fail,
                        OnErrorConfig::Score => OnError::Score(r.error_score),
                    },
                    options: r.options.clone(),
                    tasks: r.tasks.clone(),
                    ..RewardSpec::new(
                        rft_rewards::resolve(&r.script).map_err(|e| EngineError::Reward(e.to_string()))?,
                    )
                })
            })
            .collect::<Result<_>>()?;
        let pool = RewardPool::new(specs, workers.max(1)).map_err(|e| EngineError::Reward(e.to_string()))?;
        Ok(Self { pool })
    }

    /// Ends a step: scripts that keep state see its results in order, and the next step sees their new state.
    ///
    /// # Errors
    /// A failed `update_state`, with its line.
    pub fn end_step(&self, groups: &[ScoredGroup], step: u64, total_steps: u64, seed: u64) -> Result<()> {
        let results = groups.iter().flat_map(|g| {
            let samples = g.group.completions.iter().zip(&g.outcomes).enumerate();
            samples.map(|(i, (c, outcome))| (g.group.prompt.id.as_str(), i, c.text.as_str(), outcome))
        });
        let context = Context { step, total_steps, seed };
        self.pool.end_step(results, &context).map_err(|error| EngineError::Reward(error.to_string()))
    }

    /// The scripts' states as JSON texts, for a checkpoint.
    pub fn states(&self) -> Vec<String> {
        self.pool.states().iter().map(|state| state.to_string()).collect()
    }

    /// Restores what [`Scorer::states`] gave.
    pub fn set_states(&self, states: &[String]) {
        let states: Vec<Arc<str>> = states.iter().map(|state| state.as_str().into()).collect();
        self.pool.set_states(&states);
    }

    /// Starts scoring the groups of one rollout.
    pub fn start(&self, step: u64, total_steps: u64, seed: u64) -> Scoring<'_> {
        let context = Context { step, total_steps, seed };
        Scoring { scorer: self, context, waiting: BTreeMap::new(), done: BTreeMap::new() }
    }
}

impl Scoring<'_> {
    /// Hands over group number `index`; returns at once.
    pub fn submit(&mut self, index: usize, group: Group) {
        let samples = group
            .completions
            .iter()
            .enumerate()
            .map(|(i, c)| Sample {
                id: group.prompt.id.clone(),
                task: group.prompt.task.to_string(),
                sample: i as u32,
                completion: c.text.clone(),
                prompt: group.prompt.text.clone(),
                fields: group.prompt.fields.clone(),
                tokens: c.tokens.clone(),
                token_text_ends: c.token_ends.clone(),
                logprobs: c.logprobs.clone(),
                finish_reason: c.finish.as_str().to_string(),
            })
            .collect();
        self.waiting.insert(index as u64, group);
        self.scorer.pool.submit(index as u64, samples, self.context);
        while let Some((ticket, outcomes)) = self.scorer.pool.try_recv() {
            self.take(ticket, outcomes);
        }
    }

    /// Waits for the rest; the groups in order of their numbers, whatever order they were scored in.
    ///
    /// # Errors
    /// A failed call of a script whose policy is to stop the run.
    pub fn finish(mut self) -> Result<Vec<ScoredGroup>> {
        while !self.waiting.is_empty() {
            let (ticket, outcomes) = self.scorer.pool.recv();
            self.take(ticket, outcomes);
        }
        let groups: Vec<ScoredGroup> = std::mem::take(&mut self.done).into_values().collect();
        for scored in &groups {
            for (i, outcome) in scored.outcomes.iter().enumerate() {
                if let Some(error) = outcome.errors.first().filter(|_| outcome.fatal) {
                    return Err(EngineError::Reward(format!(
                        "prompt {}, sample {i}: {error} (on_error = \"fail\")",
                        scored.group.prompt.id
                    )));
                }
            }
        }
        Ok(groups)
    }

    fn take(&mut self, ticket: u64, outcomes: Vec<Outcome>) {
        if let Some(group) = self.waiting.remove(&ticket) {
            self.done.insert(ticket, ScoredGroup { group, outcomes });
        }
    }
}

impl Drop for Scoring<'_> {
    /// A rollout that ends early leaves no outcome behind for the next one.
    fn drop(&mut self) {
        while !self.waiting.is_empty() {
            let (ticket, outcomes) = self.scorer.pool.recv();
            self.take(ticket, outcomes);
        }
    }
}

impl Scorer {
    /// Scores stored completions: rows `{id, completion, …any fields}`; neighbours of the same `id` and `step` with a
    /// `sample` number are one group. Outcomes come in the order of the rows.
    ///
    /// # Errors
    /// A row without a `completion`, by position.
    pub fn score_rows(
        &self,
        rows: &[Row],
        step: u64,
        total_steps: u64,
    ) -> std::result::Result<Vec<Outcome>, (usize, String)> {
        let mut groups: Vec<Vec<Sample>> = Vec::new();
        let mut last = None;
        for (i, row) in rows.iter().enumerate() {
            let sample = stored_sample(i, row).map_err(|message| (i, message))?;
            let number = row.get("sample").and_then(Value::as_u64);
            let group = number.map(|_| ["task", "id", "step"].map(|key| row.get(key).cloned()));
            match groups.last_mut() {
                Some(samples) if group.is_some() && group == last => samples.push(sample),
                _ => groups.push(vec![sample]),
            }
            last = group;
        }
        let context = Context { step, total_steps, seed: 0 };
        let count = groups.len();
        for (ticket, samples) in groups.into_iter().enumerate() {
            self.pool.submit(ticket as u64, samples, context);
        }
        let done: BTreeMap<u64, Vec<Outcome>> = (0..count).map(|_| self.pool.recv()).collect();
        Ok(done.into_values().flatten().collect())
    }
}

/// A stored completion, row number `index` of its file, as a verifier sees it.
///
/// # Errors
/// No `completion`.
pub fn stored_sample(index: usize, row: &Row) -> std::result::Result<Sample, String> {
    let text = |key: &str| row.get(key).and_then(Value::as_str).map(str::to_string);
    let completion = text("completion").ok_or_else(|| "has no `completion` (string)".to_string())?;
    let tokens = row.get("tokens").and_then(|t| serde_json::from_value(t.clone()).ok()).unwrap_or_default();
    let logprobs =
        row.get("logprobs").and_then(|l| serde_json::from_value(l.clone()).ok()).unwrap_or_default();
    let id = row.get("id").map(|id| id.as_str().map_or_else(|| id.to_string(), str::to_string));
    Ok(Sample {
        id: id.unwrap_or_else(|| index.to_string()),
        task: text("task").unwrap_or_default(),
        sample: row.get("sample").and_then(Value::as_u64).unwrap_or(0) as u32,
        completion,
        prompt: text("prompt").unwrap_or_default(),
        fields: Arc::new(row.clone()),
        tokens,
        token_text_ends: Vec::new(),
        logprobs,
        finish_reason: text("finish_reason").unwrap_or_default(),
    })
}

/// Failed calls of one script for one reason.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ErrorCount {
    /// Name of the script.
    pub script: String,
    /// The reason, as in `samples.jsonl`.
    pub kind: &'static str,
    /// Calls.
    pub count: usize,
    /// The first of them: where and what.
    pub first: String,
}

/// Failed calls by script and reason, in order of first appearance.
pub fn error_counts<'a>(groups: impl IntoIterator<Item = &'a ScoredGroup>) -> Vec<ErrorCount> {
    let mut counts: Vec<ErrorCount> = Vec::new();
    for scored in groups {
        for (sample, error) in
            scored.outcomes.iter().enumerate().flat_map(|(s, o)| o.errors.iter().map(move |e| (s, e)))
        {
            let kind = error.kind.as_str();
            match counts.iter_mut().find(|c| c.script == error.script && c.kind == kind) {
                Some(known) => known.count += 1,
                None => counts.push(ErrorCount {
                    script: error.script.clone(),
                    kind,
                    count: 1,
                    first: format!("prompt {}, sample {sample}: {error}", scored.group.prompt.id),
                }),
            }
        }
    }
    counts
}

/// Mean of each component over the completions that have it, in order of first appearance; a component that all
/// abstained from has no mean and is left out.
pub fn component_means<'a>(groups: impl IntoIterator<Item = &'a ScoredGroup>) -> Vec<(String, f64)> {
    let mut sums: Vec<(String, f64, usize)> = Vec::new();
    for (name, value) in groups.into_iter().flat_map(|g| &g.outcomes).flat_map(|o| &o.components) {
        let at = sums.iter().position(|(n, ..)| n == name).unwrap_or_else(|| {
            sums.push((name.clone(), 0.0, 0));
            sums.len() - 1
        });
        if let Some(value) = value {
            sums[at].1 += value;
            sums[at].2 += 1;
        }
    }
    sums.into_iter().filter(|(_, _, n)| *n > 0).map(|(name, sum, n)| (name, sum / n as f64)).collect()
}
