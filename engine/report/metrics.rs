//! What a step and a run report: plain numbers under stable names.

use serde::Serialize;
use serde_json::{Map, Value, json};

use crate::report::health::Verdict;

/// Metrics of one GRPO step: one line of metrics.jsonl.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct StepMetrics {
    /// Step, from 1.
    pub step: u64,
    /// Mean reward over completions that have one.
    pub reward_mean: f64,
    /// Mean over groups of the reward's standard deviation.
    pub reward_std: f64,
    /// Mean of each component over completions that have it.
    pub components: Vec<(String, f64)>,
    /// Estimated KL to the reference, nats per completion token; 0 without a reference.
    pub kl: f64,
    /// Mean entropy of the stated distribution, nats.
    pub entropy: f64,
    /// Greatest |ratio − 1| at the step's first update; 0 when sampler and learner agree bit for bit.
    pub ratio_max_dev: f64,
    /// Share of tokens whose ratio the clip cuts off, over all updates of the step.
    pub clip_fraction: f64,
    /// Groups whose rewards are all equal.
    pub zero_variance_groups: usize,
    /// Verifier calls that failed.
    pub reward_errors: usize,
    /// Mean tokens a completion.
    pub completion_tokens_mean: f64,
    /// Share of completions cut at `max_new_tokens`.
    pub truncated_fraction: f64,
    /// Gradient norm before clipping, of the step's last update.
    pub grad_norm: f64,
    /// Learning rate of the step's last update.
    pub lr: f64,
    /// Loss of the step's first update.
    pub loss: f64,
    /// Seconds in rollouts.
    pub rollout_s: f64,
    /// Seconds waiting for verifiers after the rollouts.
    pub reward_s: f64,
    /// Seconds in reference logprobs and updates.
    pub learner_s: f64,
    /// Completion tokens drawn a second.
    pub rollout_tokens_per_s: f64,
    /// Rows (prompts once a group, completions) trained on a second.
    pub learner_tokens_per_s: f64,
    /// Most KV blocks held at once.
    pub kv_blocks_peak: usize,
    /// Peak resident memory of the process so far.
    pub rss_peak_bytes: u64,
    /// KL coefficient of the step.
    pub kl_coefficient: f64,
    /// Held-out mean reward, where the step was evaluated.
    pub eval_reward: Option<f64>,
    /// What the kind of stage adds, by key.
    pub extra: Vec<(&'static str, f64)>,
    /// What the step did for the policy, and why not more.
    pub health: Verdict,
    /// What the choice of prompts and past groups tells, where the recipe has one.
    pub data: Vec<(&'static str, f64)>,
}

/// Keys whose values depend on the machine and the moment; equal runs differ in these alone.
pub const TIMING_KEYS: [&str; 6] =
    ["rollout_s", "reward_s", "learner_s", "rollout_tokens_per_s", "learner_tokens_per_s", "rss_peak_bytes"];

impl StepMetrics {
    /// The line of metrics.jsonl, keys in a fixed order.
    pub fn to_json(&self) -> Map<String, Value> {
        let mut map = Map::new();
        let mut put = |key: &str, value: Value| {
            map.insert(key.to_string(), value);
        };
        put("step", json!(self.step));
        put("reward_mean", json!(self.reward_mean));
        put("reward_std", json!(self.reward_std));
        for (name, mean) in &self.components {
            put(&format!("reward/{name}"), json!(mean));
        }
        put("kl", json!(self.kl));
        put("entropy", json!(self.entropy));
        put("ratio_max_dev", json!(self.ratio_max_dev));
        put("clip_fraction", json!(self.clip_fraction));
        put("zero_variance_groups", json!(self.zero_variance_groups));
        put("reward_errors", json!(self.reward_errors));
        put("completion_tokens_mean", json!(self.completion_tokens_mean));
        put("truncated_fraction", json!(self.truncated_fraction));
        put("grad_norm", json!(self.grad_norm));
        put("lr", json!(self.lr));
        put("loss", json!(self.loss));
        put("rollout_s", json!(self.rollout_s));
        put("reward_s", json!(self.reward_s));
        put("learner_s", json!(self.learner_s));
        put("rollout_tokens_per_s", json!(self.rollout_tokens_per_s));
        put("learner_tokens_per_s", json!(self.learner_tokens_per_s));
        put("kv_blocks_peak", json!(self.kv_blocks_peak));
        put("rss_peak_bytes", json!(self.rss_peak_bytes));
        put("kl_coefficient", json!(self.kl_coefficient));
        for (name, value) in &self.data {
            // a count reads as one
            put(name, if value.fract() == 0.0 { json!(*value as u64) } else { json!(value) });
        }
        if let Some(reward) = self.eval_reward {
            put("eval_reward", json!(reward));
        }
        for (key, value) in &self.extra {
            put(key, json!(value));
        }
        put("health", json!(self.health.0));
        put("health_reason", json!(self.health.1));
        map
    }
}

/// Mean reward over held-out prompts, whole and by component.
#[derive(Debug, Clone, Default, PartialEq, Serialize, serde::Deserialize)]
pub struct EvalResult {
    /// Mean reward over completions that have one.
    pub reward: f64,
    /// Mean of each component.
    pub components: Vec<(String, f64)>,
    /// (k, pass@k) for k = 1, 2, 4, … up to the completions drawn a prompt.
    pub pass_at_k: Vec<(usize, f64)>,
    /// Mean tokens a completion.
    pub completion_tokens_mean: f64,
}

/// summary.json.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Summary {
    /// GRPO steps done.
    pub steps: u64,
    /// Wall-clock seconds, over all resumptions.
    pub seconds: f64,
    /// Held-out mean reward before the first GRPO step.
    pub eval_before: Option<f64>,
    /// Held-out mean reward after the last step.
    pub eval_after: Option<f64>,
    /// The same by component.
    pub eval_before_components: Map<String, Value>,
    /// The same by component.
    pub eval_after_components: Map<String, Value>,
    /// The forgetting matrix of a recipe with named tasks ([`crate::report::forgetting`]).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub task_matrix: Option<Value>,
    /// Completion tokens drawn a second, over all steps.
    pub rollout_tokens_per_s: f64,
    /// Rows trained on a second, over all steps.
    pub learner_tokens_per_s: f64,
    /// Peak resident memory.
    pub rss_peak_bytes: u64,
    /// What the memory plan expected of steps of full length.
    pub memory_plan_bytes: u64,
    /// The same of steps as long as they came.
    pub memory_plan_seen_bytes: u64,
    /// Steps by health ([`crate::report::health::Health`]).
    pub health: Map<String, Value>,
    /// The same of supervised steps.
    #[serde(skip_serializing_if = "Map::is_empty")]
    pub sft_health: Map<String, Value>,
    /// Folder of the trained model, relative to the run folder.
    pub final_model: String,
    /// Version of this program.
    pub version: String,
    /// The machine, as [`environment`] describes it.
    pub environment: Map<String, Value>,
}

/// What the numbers of a run depend on beside its recipe: processor, threads, instruction set of the kernels, memory, system.
pub fn environment(threads: usize, isa: &str) -> Map<String, Value> {
    let first = |path: &str, key: &str| {
        let text = std::fs::read_to_string(path).unwrap_or_default();
        let line = text.lines().find_map(|l| l.strip_prefix(key)).unwrap_or("unknown");
        line.trim_start_matches([' ', '\t', ':']).trim().to_string()
    };
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let memory =
        first("/proc/meminfo", "MemTotal").trim_end_matches(" kB").parse::<u64>().map_or(0, |kib| kib * 1024);
    let map = json!({
        "cpu": first("/proc/cpuinfo", "model name"),
        "cores": cores,
        "threads": threads,
        "kernels": isa,
        "memory_bytes": memory,
        "system": format!("{} {}", std::env::consts::OS, std::env::consts::ARCH),
    });
    match map {
        Value::Object(map) => map,
        _ => unreachable!("the literal above is an object"),
    }
}

/// Peak resident memory of this process; 0 where the system does not tell.
pub fn rss_peak_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"));
    line.and_then(|l| l.trim().strip_suffix("kB")).and_then(|n| n.trim().parse::<u64>().ok()).unwrap_or(0)
        * 1024
}
