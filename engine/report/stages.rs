//! What a step of imitation or of comparison reports: plain numbers under stable names.

use serde_json::{Map, Value, json};

use crate::report::health::Verdict;

/// Metrics of one step of a preference stage: a line of metrics.jsonl. What a step has no completions for is left out.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct PreferenceMetrics {
    /// Step, from 1, counted over stages that draw or compare.
    pub step: u64,
    /// Pairs, or labelled completions.
    pub compared: usize,
    /// Loss before the step's first update.
    pub loss: f64,
    /// `beta` times the mean score of the chosen (desirable) completions.
    pub rewards_chosen: Option<f64>,
    /// The same of the rejected (undesirable) ones.
    pub rewards_rejected: Option<f64>,
    /// Share of pairs whose chosen completion has the greater score.
    pub accuracies: Option<f64>,
    /// Mean summed logprob of the chosen completions.
    pub logps_chosen: Option<f64>,
    /// The same of the rejected ones.
    pub logps_rejected: Option<f64>,
    /// Baseline of an unpaired loss: estimated KL to the reference, nats a completion, at least 0.
    pub baseline: Option<f64>,
    /// Mean distance of a compared token's logprob from the reference, nats.
    pub log_ratio: Option<f64>,
    /// Mean entropy of the model's next token over the compared completions, nats.
    pub entropy: f64,
    /// Gradient norm before clipping.
    pub grad_norm: f64,
    /// Learning rate of the step's last update.
    pub lr: f64,
    /// Seconds in reference logprobs and updates.
    pub learner_s: f64,
    /// Rows trained on a second.
    pub learner_tokens_per_s: f64,
    /// Peak resident memory of the process so far.
    pub rss_peak_bytes: u64,
    /// Held-out mean reward, where the step was evaluated.
    pub eval_reward: Option<f64>,
    /// What the step did for the policy, and why not more.
    pub health: Verdict,
    /// Of the rollouts, where completions are drawn.
    pub drawn: Option<DrawnMetrics>,
}

/// The part of a step that draws its completions.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct DrawnMetrics {
    /// Mean reward over completions that have one.
    pub reward_mean: Option<f64>,
    /// Mean of each component.
    pub components: Vec<(String, f64)>,
    /// Verifier calls that failed.
    pub reward_errors: usize,
    /// Groups in which no two completions differ enough.
    pub groups_without_pair: usize,
    /// Mean tokens a completion.
    pub completion_tokens_mean: f64,
    /// Share of completions cut at `max_new_tokens`.
    pub truncated_fraction: f64,
    /// Seconds in rollouts.
    pub rollout_s: f64,
    /// Seconds waiting for verifiers after the rollouts.
    pub reward_s: f64,
    /// Completion tokens drawn a second.
    pub rollout_tokens_per_s: f64,
    /// Most KV blocks held at once.
    pub kv_blocks_peak: usize,
    /// What the choice of prompts has to tell.
    pub choice: Vec<(&'static str, f64)>,
}

impl PreferenceMetrics {
    /// The line of metrics.jsonl, keys in a fixed order.
    pub fn to_json(&self) -> Map<String, Value> {
        let mut map = Map::new();
        let mut put = |key: &str, value: Value| {
            if !value.is_null() {
                map.insert(key.to_string(), value);
            }
        };
        put("step", json!(self.step));
        put("stage", json!("preference"));
        put("loss", json!(self.loss));
        put("rewards/chosen", json!(self.rewards_chosen));
        put("rewards/rejected", json!(self.rewards_rejected));
        put("rewards/accuracies", json!(self.accuracies));
        put("rewards/margins", json!(self.margin()));
        put("logps/chosen", json!(self.logps_chosen));
        put("logps/rejected", json!(self.logps_rejected));
        put("kto_baseline", json!(self.baseline));
        put("compared", json!(self.compared));
        put("log_ratio", json!(self.log_ratio));
        put("entropy", json!(self.entropy));
        put("grad_norm", json!(self.grad_norm));
        put("lr", json!(self.lr));
        if let Some(drawn) = &self.drawn {
            put("groups_without_pair", json!(drawn.groups_without_pair));
            put("reward_mean", json!(drawn.reward_mean));
            for (name, mean) in &drawn.components {
                put(&format!("reward/{name}"), json!(mean));
            }
            put("reward_errors", json!(drawn.reward_errors));
            put("completion_tokens_mean", json!(drawn.completion_tokens_mean));
            put("truncated_fraction", json!(drawn.truncated_fraction));
            put("rollout_s", json!(drawn.rollout_s));
            put("reward_s", json!(drawn.reward_s));
            put("rollout_tokens_per_s", json!(drawn.rollout_tokens_per_s));
            put("kv_blocks_peak", json!(drawn.kv_blocks_peak));
            for (name, value) in &drawn.choice {
                put(name, json!(value));
            }
        }
        put("learner_s", json!(self.learner_s));
        put("learner_tokens_per_s", json!(self.learner_tokens_per_s));
        put("rss_peak_bytes", json!(self.rss_peak_bytes));
        put("eval_reward", json!(self.eval_reward));
        put("health", json!(self.health.0));
        map.insert("health_reason".into(), json!(self.health.1));
        map
    }

    /// Difference of the two mean rewards.
    pub fn margin(&self) -> Option<f64> {
        Some(self.rewards_chosen? - self.rewards_rejected?)
    }
}

/// Metrics of one step of a supervised stage: a line of sft.jsonl.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct SftMetrics {
    /// Step, from 1, over all supervised stages.
    pub step: u64,
    /// Number of the stage in the recipe, from 0.
    pub stage_index: usize,
    /// Mean negative log-likelihood of the learned tokens, before the update.
    pub loss: f64,
    /// Learned tokens of the step.
    pub tokens: usize,
    /// Mean entropy of the next token at the positions of completions, nats.
    pub entropy: f64,
    /// Gradient norm before clipping.
    pub grad_norm: f64,
    /// Learning rate.
    pub lr: f64,
    /// Passes over the stage's rows done so far.
    pub epoch: f64,
    /// Seconds of the update.
    pub learner_s: f64,
    /// Rows trained on a second.
    pub learner_tokens_per_s: f64,
    /// Peak resident memory of the process so far.
    pub rss_peak_bytes: u64,
    /// What the step did for the policy, and why not more.
    pub health: Verdict,
}

impl SftMetrics {
    /// The line of sft.jsonl, keys in a fixed order.
    pub fn to_json(&self) -> Map<String, Value> {
        let mut map = Map::new();
        let mut put = |key: &str, value: Value| {
            map.insert(key.to_string(), value);
        };
        put("step", json!(self.step));
        put("stage", json!("sft"));
        put("stage_index", json!(self.stage_index));
        put("loss", json!(self.loss));
        put("tokens", json!(self.tokens));
        put("entropy", json!(self.entropy));
        put("grad_norm", json!(self.grad_norm));
        put("lr", json!(self.lr));
        put("epoch", json!(self.epoch));
        put("learner_s", json!(self.learner_s));
        put("learner_tokens_per_s", json!(self.learner_tokens_per_s));
        put("rss_peak_bytes", json!(self.rss_peak_bytes));
        put("health", json!(self.health.0));
        put("health_reason", json!(self.health.1));
        map
    }
}
