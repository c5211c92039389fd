//! The recipe: everything a run depends on, in one TOML file, fully resolved and printed back.
//!
//! This is the only module that reads TOML; the others receive the small typed structs below. Unknown keys
//! are errors that name the file, the line and the nearest valid key. `--set a.b=value` changes one key.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use toml::{Table, Value};

use crate::advantage::{AdvantageConfig, Baseline, Combine};
use crate::data::arithmetic::ArithmeticConfig;
use crate::error::{EngineError, Result};
use crate::learner::optimizer::OptimizerKind;
use crate::loss::kl::Placement;
use crate::loss::{Objective, presets};

/// The recipe that `launch` runs when none is named.
pub const DEFAULT_RECIPE: &str = include_str!("../scripts/recipes/default.toml");

/// A complete, validated run description.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// Shown in reports and used for the run folder's name.
    #[serde(default = "default_name")]
    pub name: String,
    /// Key of all randomness.
    #[serde(default)]
    pub seed: u64,
    /// The policy.
    pub model: ModelConfig,
    /// The prompts.
    pub data: DataConfig,
    /// Verifiers, summed by weight.
    #[serde(default)]
    pub reward: Vec<RewardConfig>,
    /// How completions are drawn.
    #[serde(default)]
    pub rollout: RolloutConfig,
    /// How rewards become a gradient.
    #[serde(default)]
    pub algorithm: AlgorithmConfig,
    /// How the gradient becomes an update.
    #[serde(default)]
    pub optimizer: OptimizerConfig,
    /// How long, and what is kept.
    #[serde(default)]
    pub train: TrainConfig,
    /// Held-out measurement.
    #[serde(default)]
    pub eval: EvalConfig,
    /// What the run may use of this machine.
    #[serde(default)]
    pub devices: DevicesConfig,
    /// Stages run in order; none means one `grpo` stage of `train.steps`.
    #[serde(default)]
    pub stage: Vec<StageConfig>,
}

fn default_name() -> String {
    "run".into()
}

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
    /// Completions cut at `max_new_tokens` do not enter the loss.
    pub mask_truncated: bool,
}

/// The optimizer and its schedule.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct OptimizerConfig {
    /// The rule.
    pub kind: OptimizerKind,
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
}

impl Default for TrainConfig {
    fn default() -> Self {
        Self { steps: 100, inner_epochs: 1, checkpoint_every: 20, keep_checkpoints: 2, log_groups: 0 }
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
    /// Maximum likelihood on the rows' `demonstration`.
    Sft,
    /// Rollouts, rewards, policy gradient.
    Grpo,
}

/// One stage.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StageConfig {
    /// What it does.
    pub kind: StageKind,
    /// Its steps; a `grpo` stage without it takes `train.steps`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub steps: Option<u64>,
    /// Peak learning rate instead of `optimizer.lr`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lr: Option<f64>,
    /// Demonstrations a step (`sft` only).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub batch: Option<usize>,
}

impl Recipe {
    /// Reads `path` (or the built-in default), applies `--set` overrides and validates.
    ///
    /// # Errors
    /// Names the file, the line and the nearest valid key of an unknown one, or the override at fault.
    pub fn load(path: Option<&Path>, overrides: &[String]) -> Result<Self> {
        let (origin, text) = match path {
            Some(p) => (p.display().to_string(), std::fs::read_to_string(p).map_err(EngineError::io(p))?),
            None => ("built-in default recipe".to_string(), DEFAULT_RECIPE.to_string()),
        };
        Self::parse(&text, &origin, overrides)
    }

    /// Parses recipe text; `origin` is how errors call it.
    ///
    /// # Errors
    /// As [`Recipe::load`].
    pub fn parse(text: &str, origin: &str, overrides: &[String]) -> Result<Self> {
        let from_file: Self = toml::from_str(text).map_err(|e| located(&e, text, origin))?;
        let recipe = if overrides.is_empty() && from_file.algorithm.preset.is_none() {
            from_file
        } else {
            let mut table: Table = text.parse().map_err(|e| located(&e, text, origin))?;
            for item in overrides {
                apply_override(&mut table, item)?;
            }
            apply_preset(&mut table)?;
            let merged = toml::to_string(&table).map_err(|e| EngineError::Config(e.to_string()))?;
            let source = match overrides {
                [] => origin.to_string(),
                items => format!("--set {}", items.join(" --set ")),
            };
            toml::from_str(&merged)
                .map_err(|e| EngineError::Config(format!("{source}: {}", with_nearest(e.message()))))?
        };
        recipe.validate()?;
        Ok(recipe)
    }

    /// The recipe as TOML, every default written out.
    pub fn to_toml(&self) -> String {
        toml::to_string(self).expect("a recipe holds only TOML types")
    }

    /// The stages with their steps filled in.
    pub fn stages(&self) -> Vec<StageConfig> {
        let mut stages = match self.stage.is_empty() {
            true => vec![StageConfig { kind: StageKind::Grpo, steps: None, lr: None, batch: None }],
            false => self.stage.clone(),
        };
        for stage in &mut stages {
            stage.steps.get_or_insert(self.train.steps);
        }
        stages
    }

    /// What an objective asks for and a step cannot give.
    fn validate_algorithm(&self) -> Result<()> {
        let fail = |message: &str| Err(EngineError::Config(message.into()));
        let (advantage, objective) = (&self.algorithm.advantage, &self.algorithm.objective);
        if advantage.baseline == Baseline::Greedy {
            return fail(
                "algorithm.advantage.baseline = \"greedy\" needs a greedy completion of every prompt, which rollouts \
                 do not draw yet. hint: \"leave_one_out\" is the nearest baseline",
            );
        }
        if advantage.combine == Combine::NormalizeThenSum {
            if self.reward.windows(2).any(|r| r[0].weight != r[1].weight) {
                return fail(
                    "algorithm.advantage.combine = \"normalize_then_sum\" gives every reward the same say. \
                     hint: set the same weight for all rewards",
                );
            }
            if objective.kl.placement == Placement::Reward && objective.kl.coefficient != 0.0 {
                return fail(
                    "algorithm.advantage.combine = \"normalize_then_sum\" has no single reward to take a KL penalty \
                     from. hint: set algorithm.objective.kl.placement = \"loss\"",
                );
            }
        }
        if objective.sampler_correction.is_some() {
            return fail(
                "algorithm.objective.sampler_correction weighs rollouts of another engine, whose logprobs differ from the \
                 learner's; here they are the same bits and nothing is left to correct. hint: remove it",
            );
        }
        if !(objective.top_entropy > 0.0 && objective.top_entropy <= 1.0) {
            return Err(EngineError::Config(format!(
                "algorithm.objective.top_entropy must be in (0, 1], got {}",
                objective.top_entropy
            )));
        }
        Ok(())
    }

    fn validate(&self) -> Result<()> {
        let fail = |message: String| Err(EngineError::Config(message));
        match (&self.model.path, &self.model.new) {
            (None, None) => {
                return fail(
                    "model: set `path` (a model folder or GGUF file) or a `[model.new]` shape".into(),
                );
            }
            (Some(_), Some(_)) => return fail("model: `path` and `[model.new]` exclude each other".into()),
            _ => {}
        }
        match (&self.data.path, &self.data.arithmetic) {
            (None, None) => return fail("data: set `path` (a JSONL file) or `[data.arithmetic]`".into()),
            (Some(_), Some(_)) => {
                return fail("data: `path` and `[data.arithmetic]` exclude each other".into());
            }
            _ => {}
        }
        let grpo = self.stages().iter().any(|s| s.kind == StageKind::Grpo);
        if grpo && self.reward.is_empty() {
            return fail("reward: a grpo stage needs at least one [[reward]]".into());
        }
        self.validate_algorithm()?;
        let r = &self.rollout;
        for (key, value) in [
            ("rollout.prompts_per_step", r.prompts_per_step),
            ("rollout.max_new_tokens", r.max_new_tokens),
            ("eval.samples", self.eval.samples),
        ] {
            if value == 0 {
                return fail(format!("{key} must be at least 1"));
            }
        }
        if r.group_size < 2 && grpo {
            return fail(
                "rollout.group_size must be at least 2: an advantage compares the completions of a group"
                    .into(),
            );
        }
        if !(r.temperature > 0.0 && r.temperature.is_finite()) {
            return fail(format!(
                "rollout.temperature must be positive, got {} (eval.temperature may be 0)",
                r.temperature
            ));
        }
        if !(r.top_p > 0.0 && r.top_p <= 1.0) {
            return fail(format!("rollout.top_p must be in (0, 1], got {}", r.top_p));
        }
        if !(0.0..1.0).contains(&r.min_p) {
            return fail(format!("rollout.min_p must be in [0, 1), got {}", r.min_p));
        }
        for (i, r) in self.reward.iter().enumerate() {
            for (key, value) in [("weight", r.weight), ("error_score", r.error_score)] {
                if !value.is_finite() {
                    return fail(format!("reward.{i}.{key} must be a finite number, got {value}"));
                }
            }
        }
        if !(self.optimizer.lr > 0.0 && self.optimizer.lr.is_finite()) {
            return fail(format!("optimizer.lr must be positive, got {}", self.optimizer.lr));
        }
        let model = &self.model;
        let adapted = model.lora.is_some() || model.adapter.is_some();
        if model.lora.is_some() && model.adapter.is_some() {
            return fail("model: `adapter` brings its own settings, so it excludes `[model.lora]`".into());
        }
        if model.quantize.is_some() && !adapted {
            return fail(
                "model.quantize: only frozen weights can be held in 8 or 4 bits, and without an adapter these train. \
                 hint: add `[model.lora]`"
                    .into(),
            );
        }
        if model.half && adapted {
            return fail("model: `half` freezes halves of the model's own layers, and with an adapter those are frozen \
                         already. hint: drop one of the two".into());
        }
        if adapted && model.path.is_none() {
            return fail("model: an adapter needs a model to adapt. hint: set `path`".into());
        }
        if self.train.inner_epochs == 0 {
            return fail("train.inner_epochs must be at least 1".into());
        }
        if let Some(lora) = &self.model.lora {
            if lora.rank == 0 || lora.rank_pattern.values().any(|r| *r == 0) || lora.targets.is_empty() {
                return fail("model.lora: `rank` must be at least 1 and `targets` not empty".into());
            }
            if !(0.0..1.0).contains(&lora.dropout) {
                return fail(format!("model.lora.dropout must be in [0, 1), got {}", lora.dropout));
            }
        }
        Ok(())
    }
}

/// `a.b=value`, where value is TOML and a bare word is a string.
/// Puts the settings of `algorithm.preset` under those that the recipe states itself.
fn apply_preset(table: &mut Table) -> Result<()> {
    let Some(Value::Table(own)) = table.get("algorithm") else { return Ok(()) };
    let Some(name) = own.get("preset").and_then(Value::as_str) else { return Ok(()) };
    let Some((objective, advantage)) = presets::preset(name) else {
        return Err(EngineError::Config(format!(
            "algorithm.preset: no algorithm is called `{name}`. hint: one of {}",
            presets::NAMES.join(", ")
        )));
    };
    let preset = AlgorithmConfig { objective, advantage, ..AlgorithmConfig::default() };
    let mut merged = Table::try_from(preset).map_err(|e| EngineError::Config(e.to_string()))?;
    lay_over(&mut merged, own);
    table.insert("algorithm".into(), Value::Table(merged));
    Ok(())
}

/// Copies `own` over `base`, table by table; a table of another `kind` replaces the one below.
fn lay_over(base: &mut Table, own: &Table) {
    for (key, value) in own {
        match (base.get_mut(key), value) {
            (Some(Value::Table(below)), Value::Table(above))
                if above.get("kind").is_none_or(|k| below.get("kind") == Some(k)) =>
            {
                lay_over(below, above);
            }
            _ => {
                base.insert(key.clone(), value.clone());
            }
        }
    }
}

fn apply_override(table: &mut Table, item: &str) -> Result<()> {
    let bad = |why: &str| EngineError::Config(format!("--set {item}: {why}"));
    let (key, raw) =
        item.split_once('=').ok_or_else(|| bad("expected key=value, for example train.steps=6"))?;
    let value = format!("v = {raw}")
        .parse::<Table>()
        .ok()
        .and_then(|mut t| t.remove("v"))
        .unwrap_or_else(|| Value::String(raw.to_string()));
    let mut path: Vec<&str> = key.trim().split('.').collect();
    let last = path.pop().filter(|k| !k.is_empty()).ok_or_else(|| bad("the key is empty"))?;
    let mut here = Value::Table(std::mem::take(table));
    {
        let mut node = &mut here;
        for part in path {
            node = match node {
                Value::Table(t) => t.entry(part).or_insert_with(|| Value::Table(Table::new())),
                Value::Array(list) => {
                    let index: usize = part
                        .parse()
                        .map_err(|_| bad("a list takes an index, for example reward.0.weight=2"))?;
                    list.get_mut(index).ok_or_else(|| bad("no such list item"))?
                }
                _ => return Err(bad(&format!("`{part}` is below a plain value"))),
            };
        }
        match node {
            Value::Table(t) => {
                t.insert(last.to_string(), value);
            }
            _ => return Err(bad("the key does not name a table entry")),
        }
    }
    if let Value::Table(t) = here {
        *table = t;
    }
    Ok(())
}

fn located(error: &toml::de::Error, text: &str, origin: &str) -> EngineError {
    let line = error.span().map_or(1, |s| text[..s.start.min(text.len())].matches('\n').count() + 1);
    EngineError::malformed(origin, format!("line {line}"), with_nearest(error.message()))
}

/// Adds "did you mean" to serde's "unknown field `x`, expected one of `a`, `b`".
fn with_nearest(message: &str) -> String {
    let Some(rest) = message.strip_prefix("unknown field `") else { return message.to_string() };
    let mut quoted = rest.split('`').step_by(2);
    let Some(unknown) = quoted.next() else { return message.to_string() };
    let valid: Vec<&str> = rest.split('`').skip(2).step_by(2).collect();
    let mut out = format!("unknown key `{unknown}`");
    if let Some(best) = valid.iter().min_by_key(|v| edit_distance(unknown, v)) {
        let _ = write!(out, "; the nearest valid key is `{best}`");
    }
    let _ = write!(out, " (valid here: {})", valid.join(", "));
    out
}

/// Levenshtein distance in characters.
fn edit_distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, ca) in a.chars().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, &cb) in b.iter().enumerate() {
            let substitute = diagonal + usize::from(ca != cb);
            diagonal = row[j + 1];
            row[j + 1] = substitute.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn edit_distance_of_known_pairs() {
        assert_eq!(edit_distance("kitten", "sitting"), 3);
        assert_eq!(edit_distance("", "abc"), 3);
        assert_eq!(edit_distance("steps", "steps"), 0);
    }

    #[test]
    fn an_unknown_key_names_file_line_and_neighbour() {
        let text = "[model]\npath = \"m\"\n[data]\npath = \"d\"\n[rollout]\ngroup_sise = 4\n";
        let error = Recipe::parse(text, "r.toml", &[]).unwrap_err().to_string();
        assert!(error.contains("r.toml: line 6") && error.contains("`group_size`"), "{error}");
    }

    #[test]
    fn a_resolved_recipe_reads_back_as_itself() {
        let recipe = Recipe::load(None, &["train.steps=6".into(), "devices.threads=1".into()]).unwrap();
        assert_eq!(recipe.train.steps, 6);
        assert_eq!(Recipe::parse(&recipe.to_toml(), "again", &[]).unwrap(), recipe);
    }

    #[test]
    fn a_preset_lies_under_the_recipes_own_settings() {
        let set = |items: &[&str]| {
            let items: Vec<String> = items.iter().map(|i| i.to_string()).collect();
            Recipe::load(None, &items)
        };
        let recipe = set(&["algorithm.preset=\"cispo\"", "algorithm.objective.clip_low=0.3"]).unwrap();
        let (cispo, _) = crate::loss::presets::preset("cispo").unwrap();
        assert_eq!(recipe.algorithm.objective.surrogate, cispo.surrogate);
        assert_eq!(recipe.algorithm.objective.clip_low, 0.3);
        assert_eq!(Recipe::parse(&recipe.to_toml(), "recipe.toml", &[]).unwrap(), recipe);
        let error = set(&["algorithm.preset=\"gropo\""]).unwrap_err().to_string();
        assert!(error.contains("gropo") && error.contains("dr_grpo"), "{error}");
        assert!(set(&["algorithm.advantage.baseline=\"greedy\""]).is_err());
        assert!(set(&["algorithm.objective.top_entropy=0.0"]).is_err());
        let correction =
            "algorithm.objective.sampler_correction={level=\"token\", out_of_bounds=\"truncate\", max=2.0}";
        let refused = set(&[correction]).unwrap_err().to_string();
        assert!(refused.contains("nothing is left to correct"), "{refused}");
        for key in ["reward.0.weight=nan", "reward.1.error_score=inf"] {
            let error = set(&[key]).unwrap_err().to_string();
            assert!(error.contains("finite"), "{error}");
        }
    }

    #[test]
    fn an_override_reaches_list_items_and_rejects_unknown_keys() {
        let recipe = Recipe::load(None, &["reward.0.weight=0.25".into()]).unwrap();
        assert_eq!(recipe.reward[0].weight, 0.25);
        let error = Recipe::load(None, &["train.stepz=6".into()]).unwrap_err().to_string();
        assert!(error.contains("--set train.stepz=6") && error.contains("`steps`"), "{error}");
    }
}
