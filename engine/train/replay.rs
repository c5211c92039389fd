//! Past groups that are trained on again: a bounded buffer, part of the checkpoint.
//!
//! A past group keeps the logprobs that its own policy sampled it with, so its importance ratios are right, and its
//! rewards, so its advantages are. How far it may be from the policy is bounded by its age, and its effect by the clip.

use std::sync::Arc;

use rft_rewards::{Outcome, RewardError};
use serde::{Deserialize, Serialize};

use super::tasks::Tasks;
use crate::config::{ReplayConfig, ReplayKeep};
use crate::error::{EngineError, Result};
use crate::reward::ScoredGroup;
use crate::rng::{Purpose, Stream};
use crate::types::{Completion, FinishReason, Group, PolicyVersion, TokenId};

/// One past group: what choosing needs, and the group as JSON text (a line a group in the checkpoint, parsed when drawn).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Past {
    pub(super) step: u64,
    mean: f64,
    group: String,
}

#[derive(Serialize, Deserialize)]
struct Stored {
    row: usize,
    version: u64,
    completions: Vec<StoredCompletion>,
}

#[derive(Serialize, Deserialize)]
struct StoredCompletion {
    tokens: Vec<TokenId>,
    logprobs: Vec<f32>,
    text: String,
    token_ends: Vec<u32>,
    finish: FinishReason,
    reward: Option<f64>,
    components: Vec<(String, Option<f64>)>,
    token_rewards: Vec<f32>,
    #[serde(default)]
    steps: Vec<(u32, f64)>,
    errors: Vec<RewardError>,
}

/// Whether at least two of a group's rewards differ.
pub(super) fn informative(group: &ScoredGroup) -> bool {
    let mut rewards = group.outcomes.iter().filter_map(|o| o.reward).filter(|r| r.is_finite());
    let first = rewards.next();
    rewards.any(|r| Some(r) != first)
}

/// Numbers of the past groups of `step`, ascending: up to `count` of those that are not too old.
pub(super) fn choose(past: &[Past], config: &ReplayConfig, count: usize, seed: u64, step: u64) -> Vec<usize> {
    let young = |p: &Past| config.max_age == 0 || step - p.step <= config.max_age;
    let mut numbers: Vec<usize> = (0..past.len()).filter(|&i| young(&past[i])).collect();
    Stream::new(seed, Purpose::Curriculum, &[u64::MAX, step]).shuffle(&mut numbers);
    numbers.truncate(count);
    numbers.sort_unstable();
    numbers
}

/// Puts the informative ones of a step's fresh groups into the buffer and takes out what is too old or too many.
pub(super) fn remember(
    past: &mut Vec<Past>,
    config: &ReplayConfig,
    step: u64,
    rows: &[usize],
    groups: &[ScoredGroup],
) {
    for (&row, scored) in rows.iter().zip(groups).filter(|(_, g)| informative(g)) {
        let rewards: Vec<f64> = scored.outcomes.iter().filter_map(|o| o.reward).collect();
        let mean = rewards.iter().sum::<f64>() / rewards.len() as f64;
        past.push(Past { step, mean, group: store(row, scored) });
    }
    past.retain(|p| config.max_age == 0 || step - p.step <= config.max_age);
    while past.len() > config.capacity {
        let worst = match config.keep {
            ReplayKeep::Recent => 0,
            // the first of equals is the oldest
            ReplayKeep::Best => {
                (1..past.len()).fold(0, |w, i| if past[i].mean < past[w].mean { i } else { w })
            }
        };
        past.remove(worst);
    }
}

fn store(row: usize, scored: &ScoredGroup) -> String {
    let completion = |(c, o): (&Completion, &Outcome)| StoredCompletion {
        tokens: c.tokens.clone(),
        logprobs: c.logprobs.clone(),
        text: c.text.clone(),
        token_ends: c.token_ends.clone(),
        finish: c.finish,
        reward: o.reward,
        components: o.components.clone(),
        token_rewards: o.token_rewards.clone(),
        steps: o.steps.clone(),
        errors: o.errors.clone(),
    };
    let completions = scored.group.completions.iter().zip(&scored.outcomes).map(completion).collect();
    let stored = Stored { row, version: scored.group.version.0, completions };
    serde_json::to_string(&stored).expect("a group is plain JSON")
}

/// The row and the group that [`remember`] stored.
///
/// # Errors
/// A checkpoint of other data: a row that is not there.
pub(super) fn recall(past: &Past, tasks: &Tasks) -> Result<(usize, ScoredGroup)> {
    let bad = |why: String| EngineError::malformed("checkpoint", "replay", why);
    let stored: Stored = serde_json::from_str(&past.group).map_err(|e| bad(e.to_string()))?;
    let prompt =
        tasks.train.get(stored.row).ok_or_else(|| bad(format!("row {} is not there", stored.row)))?;
    let (mut completions, mut outcomes) = (Vec::new(), Vec::new());
    for c in stored.completions {
        let StoredCompletion { tokens, logprobs, text, token_ends, finish, .. } = c;
        completions.push(Completion { tokens, logprobs, text, token_ends, finish });
        outcomes.push(Outcome {
            reward: c.reward,
            components: c.components,
            token_rewards: c.token_rewards,
            steps: c.steps,
            errors: c.errors,
            fatal: false,
        });
    }
    let group = Group { prompt: Arc::clone(prompt), completions, version: PolicyVersion(stored.version) };
    Ok((stored.row, ScoredGroup { group, outcomes }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn past(step: u64, mean: f64) -> Past {
        Past { step, mean, group: String::new() }
    }

    #[test]
    fn a_full_buffer_forgets_the_oldest_or_the_worst() {
        let full = || vec![past(1, 0.9), past(2, 0.1), past(3, 0.5), past(4, 0.1)];
        let kept = |config: &ReplayConfig| {
            let mut buffer = full();
            remember(&mut buffer, config, 5, &[], &[]);
            buffer.iter().map(|p| p.step).collect::<Vec<_>>()
        };
        let config = ReplayConfig { capacity: 2, ..Default::default() };
        assert_eq!(kept(&config), [3, 4]);
        assert_eq!(kept(&ReplayConfig { keep: ReplayKeep::Best, ..config.clone() }), [1, 3]);
        assert_eq!(kept(&ReplayConfig { capacity: 9, max_age: 2, ..config }), [3, 4]);
    }

    #[test]
    fn a_choice_is_a_function_of_seed_and_step() {
        let buffer: Vec<Past> = (1..9).map(|step| past(step, 0.5)).collect();
        let config = ReplayConfig { max_age: 4, ..Default::default() };
        let chosen = choose(&buffer, &config, 3, 7, 10);
        assert_eq!(chosen, choose(&buffer, &config, 3, 7, 10));
        assert!(chosen.len() == 3 && chosen.iter().all(|&i| buffer[i].step >= 6), "{chosen:?}");
        assert_eq!(choose(&buffer[..2], &ReplayConfig::default(), 3, 7, 3), [0, 1]);
    }
}
