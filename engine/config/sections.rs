//! The sections of a recipe: small typed structs with their defaults.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::{AmftConfig, DynamicConfig, FilterConfig, PreferenceStage, ReferenceConfig, ReplayConfig};
use crate::advantage::AdvantageConfig;
use crate::data::arithmetic::ArithmeticConfig;
use crate::data::feed::Curriculum;
use crate::learner::optimizer::{MomentKind, OptimizerKind};
use crate::loss::Objective;
use crate::loss::value::CriticConfig;

/// The policy: a path to load, or a new model to initialise.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelConfig {
    /// A Hugging Face folder or a GGUF file.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
    /// Arithmetic of the linear layers.
    #[serde(default)]
    pub precision: Precision,
    /// Shape of a new model (Qwen3 architecture, random weights).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub new: Option<NewModelConfig>,
    /// Train low-rank adapters and leave the base frozen.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lora: Option<LoraConfig>,
    /// Go on with a PEFT adapter: a folder that peft or `export` wrote.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub adapter: Option<PathBuf>,
    /// Hold the frozen linear layers in 8 or 4 bits.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub quantize: Option<Quantize>,
    /// Only tensors whose Hugging Face names match one of these globs train; empty is all of them. In a glob `*` is any
    /// text, `?` any character, `{a,b}` one of these, `{3..7}` a whole number from 3 to 7.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub train: Vec<String>,
    /// Tensors that match one of these do not train, whatever `train` says.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub freeze: Vec<String>,
    /// Half fine-tuning (Hui et al. 2024, arXiv 2404.18466): half of each layer's matrices and norms are frozen,
    /// drawn anew for each stage.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub half: bool,
}

/// How frozen linear layers are held.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Quantize {
    /// 8 bits: whole numbers of 1/127 of the greatest of 64 weights.
    Int8,
    /// 4 bits: quantiles of a normal distribution (QLoRA, Dettmers et al. 2023, arXiv 2305.14314).
    Nf4,
}

/// Arithmetic of the linear layers; everything between them is f32.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// f32 weights and activations.
    #[default]
    F32,
    /// bf16 operands, f32 accumulation, f32 master weights.
    Bf16,
}

/// Reads a precision as it is written on the command line.
///
/// # Errors
/// Any other text.
pub fn parse_precision(text: &str) -> std::result::Result<Precision, String> {
    match text {
        "f32" => Ok(Precision::F32),
        "bf16" => Ok(Precision::Bf16),
        _ => Err("expected f32 or bf16".into()),
    }
}

/// Shape of a model made from nothing, for tasks small enough to learn from nothing.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NewModelConfig {
    /// Width of the residual stream.
    pub hidden: usize,
    /// Decoder layers.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key/value heads.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Width of the feed-forward layer.
    pub ffn: usize,
}

/// Low-rank adapters (Hu et al. 2021, arXiv 2106.09685).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LoraConfig {
    /// Rank r.
    pub rank: usize,
    /// Scaling numerator: the update is `alpha / r * B A`.
    pub alpha: f32,
    /// `alpha / sqrt(r)` instead (rsLoRA, Kalajdzievski 2023, arXiv 2312.03732).
    pub rslora: bool,
    /// Learn a magnitude for every output beside its direction (DoRA, Liu et al. 2024, arXiv 2402.09353).
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub dora: bool,
    /// Projections that get an adapter, by their Hugging Face names or the ends of them; `all-linear` is every one.
    pub targets: Vec<String>,
    /// Share of the adapters' inputs that a training pass drops. Rollouts and the old logprobs are without it, so with
    /// dropout the ratio of the first update is not 1; `ratio_max_dev` shows by how much.
    pub dropout: f32,
    /// Ranks of modules that a regular expression names, as in peft.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub rank_pattern: BTreeMap<String, usize>,
    /// The same for `alpha`.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub alpha_pattern: BTreeMap<String, f32>,
}

impl Default for LoraConfig {
    fn default() -> Self {
        Self {
            rank: 16,
            alpha: 32.0,
            rslora: false,
            dora: false,
            targets: vec!["all-linear".into()],
            dropout: 0.0,
            rank_pattern: BTreeMap::new(),
            alpha_pattern: BTreeMap::new(),
        }
    }
}

/// Where prompts come from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataConfig {
    /// JSONL file of rows.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
    /// JSONL file of held-out rows; without it the first `heldout` rows in shuffled order are held out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eval_path: Option<PathBuf>,
    /// Rows held out for evaluation.
    #[serde(default = "default_heldout")]
    pub heldout: usize,
    /// Prompt with `{field}` placeholders; without it the row's `prompt` or `messages`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt: Option<String>,
    /// System message put before the prompt (chat models only).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub system: Option<String>,
    /// Render with the model's chat template when it has one.
    #[serde(default = "yes")]
    pub chat: bool,
    /// Longer prompts are dropped, with a warning that counts them.
    #[serde(default = "default_max_prompt")]
    pub max_prompt_tokens: usize,
    /// Generate arithmetic problems instead of reading `path`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub arithmetic: Option<ArithmeticConfig>,
    /// Drops prompts by what their rollouts earn.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub filter: Option<FilterConfig>,
    /// Which prompts come when.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub curriculum: Option<Curriculum>,
}

impl Default for DataConfig {
    fn default() -> Self {
        Self {
            path: None,
            eval_path: None,
            heldout: default_heldout(),
            prompt: None,
            system: None,
            chat: yes(),
            max_prompt_tokens: default_max_prompt(),
            arithmetic: None,
            filter: None,
            curriculum: None,
        }
    }
}

fn default_heldout() -> usize {
    100
}

fn default_max_prompt() -> usize {
    1024
}

fn yes() -> bool {
    true
}

/// One verifier.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RewardConfig {
    /// A shipped verifier's name or a path to a `.lua` file.
    pub script: String,
    /// Factor of its components in the sum.
    #[serde(default = "one")]
    pub weight: f64,
    /// Wall-clock limit of a call.
    #[serde(default = "default_time_ms")]
    pub time_ms: u64,
    /// Memory limit of its Lua state.
    #[serde(default = "default_memory_mb")]
    pub memory_mb: usize,
    /// What a failed call means.
    #[serde(default)]
    pub on_error: OnErrorConfig,
    /// Score of a failed call with `on_error = "score"`.
    #[serde(default)]
    pub error_score: f64,
    /// Visible to the script as `ctx.options`.
    #[serde(default, skip_serializing_if = "serde_json::Map::is_empty")]
    pub options: serde_json::Map<String, serde_json::Value>,
    /// Names of the `[[task]]`s whose completions it scores; empty is all of them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tasks: Vec<String>,
}

fn one() -> f64 {
    1.0
}

fn default_time_ms() -> u64 {
    1000
}

fn default_memory_mb() -> usize {
    64
}

/// What a failed reward call means.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnErrorConfig {
    /// The sample has no reward from this script and no advantage from it.
    #[default]
    Abstain,
    /// The run stops.
    Fail,
    /// The sample gets `error_score`.
    Score,
}

/// How completions are drawn.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RolloutConfig {
    /// Prompts a step.
    pub prompts_per_step: usize,
    /// Completions a prompt (G).
    pub group_size: usize,
    /// Longest completion, in tokens.
    pub max_new_tokens: usize,
    /// Softmax temperature; 0 is greedy.
    pub temperature: f32,
    /// Keep the k most likely tokens; 0 is off.
    pub top_k: usize,
    /// Keep the smallest set of this probability; 1 is off.
    pub top_p: f32,
    /// Keep tokens of at least this share of the most likely one's probability; 0 is off.
    pub min_p: f32,
    /// Strings that end a completion.
    pub stop: Vec<String>,
    /// Memory of the KV block pool; 0 sizes it for one step's groups.
    pub kv_memory_mb: usize,
    /// How keys and values are kept; bf16 halves their memory and rounds them in every pass, the learner's too.
    pub kv_precision: Precision,
    /// Draws further prompts in place of groups whose rewards are all equal.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dynamic: Option<DynamicConfig>,
    /// Mixes good groups of earlier steps into a step.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub replay: Option<ReplayConfig>,
}

impl Default for RolloutConfig {
    fn default() -> Self {
        Self {
            prompts_per_step: 8,
            group_size: 8,
            max_new_tokens: 128,
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            stop: Vec::new(),
            kv_memory_mb: 0,
            kv_precision: Precision::F32,
            dynamic: None,
            replay: None,
        }
    }
}

/// How rewards become a gradient: a preset by name, with any of its settings changed.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AlgorithmConfig {
    /// A named algorithm ([`crate::loss::presets`]) whose settings hold where the recipe has none of its own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub preset: Option<String>,
    /// Reward to advantage.
    pub advantage: AdvantageConfig,
    /// Logprobs and advantages to loss.
    pub objective: Objective,
    /// What the KL term compares with.
    pub reference: ReferenceConfig,
    /// Judges every token's state, in the place of comparisons within the group.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub critic: Option<CriticConfig>,
    /// Completions cut at `max_new_tokens` do not enter the loss.
    pub mask_truncated: bool,
}

/// The optimizer and its schedule.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct OptimizerConfig {
    /// The rule.
    pub kind: OptimizerKind,
    /// How AdamW's moments are held: `f32`, or `int8` at a quarter of the memory.
    pub state: MomentKind,
    /// Peak learning rate.
    pub lr: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay of matrices; norms and biases have none.
    pub weight_decay: f64,
    /// Gradients are scaled down to this global norm; 0 is off.
    pub max_grad_norm: f64,
    /// Shape of the learning rate over the updates.
    pub schedule: crate::learner::schedule::ScheduleKind,
    /// Updates of linear warm-up.
    pub warmup_updates: u64,
}

impl Default for OptimizerConfig {
    fn default() -> Self {
        Self {
            kind: OptimizerKind::AdamW,
            state: MomentKind::F32,
            lr: 1e-6,
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            weight_decay: 0.0,
            max_grad_norm: 1.0,
            schedule: Default::default(),
            warmup_updates: 0,
        }
    }
}

/// Which layers' activations are made again in the backward pass: the gradient's bits are the same, a step takes longer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Recompute {
    /// As few layers as let micro-batches run at full speed within `devices.memory_mb`.
    #[default]
    Auto,
    /// All.
    On,
    /// None.
    Off,
}

/// How long, and what is kept.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TrainConfig {
    /// GRPO steps: one rollout batch each.
    pub steps: u64,
    /// Updates that share one rollout batch, each over all of its prompts (GRPO's mu).
    pub inner_epochs: u64,
    /// Steps between checkpoints; 0 keeps only the last.
    pub checkpoint_every: u64,
    /// Checkpoints kept.
    pub keep_checkpoints: usize,
    /// Groups a step that are written to samples.jsonl; 0 is all.
    pub log_groups: usize,
    /// Whether a layer's activations are kept for the backward pass or made again in it from the layer's input.
    pub recompute: Recompute,
}

impl Default for TrainConfig {
    fn default() -> Self {
        Self {
            steps: 100,
            inner_epochs: 1,
            checkpoint_every: 20,
            keep_checkpoints: 2,
            log_groups: 0,
            recompute: Recompute::Auto,
        }
    }
}

/// Held-out measurement.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct EvalConfig {
    /// Steps between evaluations; 0 measures only before and after.
    pub every: u64,
    /// Completions a prompt; more than one also gives pass@k.
    pub samples: usize,
    /// Temperature; 0 is greedy.
    pub temperature: f32,
}

impl Default for EvalConfig {
    fn default() -> Self {
        Self { every: 0, samples: 1, temperature: 0.0 }
    }
}

/// What the run may use of this machine.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DevicesConfig {
    /// Compute threads; 0 takes every core.
    pub threads: usize,
    /// Memory the whole run may take; micro-batches and the KV pool are sized from it.
    pub memory_mb: usize,
}

impl Default for DevicesConfig {
    fn default() -> Self {
        Self { threads: 0, memory_mb: 4096 }
    }
}

impl DevicesConfig {
    /// Refuses more threads than a machine has use for.
    ///
    /// # Errors
    /// More than 1024 threads.
    pub fn check(&self) -> std::result::Result<(), String> {
        match self.threads {
            0..=1024 => Ok(()),
            n => Err(format!("threads must be at most 1024, got {n}. hint: 0 takes every core")),
        }
    }

    /// Compute threads with 0 resolved to this machine's cores.
    pub fn thread_count(&self) -> usize {
        match self.threads {
            0 => std::thread::available_parallelism().map_or(1, usize::from),
            n => n,
        }
    }
}

/// What a stage does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum StageKind {
    /// Maximum likelihood on demonstrations.
    Sft,
    /// Rollouts, rewards, policy gradient.
    Grpo,
    /// Both in every step, with a learned weight.
    Amft,
    /// Better completions against worse ones, stored or drawn.
    Preference,
}

/// One stage.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StageConfig {
    /// What it does.
    pub kind: StageKind,
    /// Its steps; without it (and `epochs`), `train.steps`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub steps: Option<u64>,
    /// Peak learning rate instead of `optimizer.lr`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lr: Option<f64>,
    /// Rows a step (`sft`, `amft`, and `preference` with stored rows); 32 without it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub batch: Option<usize>,
    /// Passes over the rows in place of `steps`, for stages that have `batch`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub epochs: Option<f64>,
    /// JSONL file of the stage's own rows (`sft`, `preference`); `sft` without it reads those of `[data]`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
    /// Rows whose prompt and completion are longer together are dropped, with a warning that counts them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_tokens: Option<usize>,
    /// Settings of an `amft` stage.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub amft: Option<AmftConfig>,
    /// How completions are compared (`preference` only).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub preference: Option<PreferenceStage>,
    /// Tasks that it draws from; empty is all of them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tasks: Vec<String>,
    /// Their weights in this stage, in the order of `tasks`; empty keeps each task's own.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub weights: Vec<f64>,
    /// Settings laid over `[algorithm]` for this stage.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub algorithm: Option<AlgorithmConfig>,
}

impl StageConfig {
    /// A stage with every setting at its default.
    pub fn new(kind: StageKind) -> Self {
        Self {
            kind,
            steps: None,
            lr: None,
            batch: None,
            epochs: None,
            path: None,
            max_tokens: None,
            amft: None,
            preference: None,
            tasks: Vec::new(),
            weights: Vec::new(),
            algorithm: None,
        }
    }

    /// Rows a step.
    pub fn rows_per_step(&self) -> usize {
        self.batch.unwrap_or(32)
    }

    /// How completions are compared.
    pub fn comparison(&self) -> PreferenceStage {
        self.preference.clone().unwrap_or_default()
    }

    /// Whether it takes its rows from a file of its own and none from `[data]` and the tasks.
    pub fn reads_own_rows(&self) -> bool {
        self.path.is_some()
    }

    /// Whether its completions are drawn from the policy.
    pub fn draws(&self) -> bool {
        match self.kind {
            StageKind::Sft => false,
            StageKind::Grpo | StageKind::Amft => true,
            StageKind::Preference => self.comparison().draws(),
        }
    }
}
