//! The command line: subcommands, their flags, and what they print.
//!
//! Data goes to stdout, everything else to stderr; the exit code is 0 only on success (130 after Ctrl-C).

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

use crate::config::Precision;

/// Reinforcement fine-tuning with verifiable rewards.
#[derive(Debug, Parser)]
#[command(name = "rft-engine", version, about, after_help = "Start with: rft-engine launch")]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The subcommands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Fine-tune a model: rollouts, Lua rewards, GRPO updates.
    #[command(after_help = "Examples:
  rft-engine launch                                            the built-in arithmetic recipe, a few minutes
  rft-engine launch --set train.steps=20 --set seed=1
  rft-engine launch scripts/recipes/smollm2-math.toml --run-dir runs/math
  rft-engine launch --run-dir runs/math --resume               go on after Ctrl-C or a crash
  rft-engine launch scripts/recipes/smollm2-math.toml --dry-run")]
    Launch(LaunchArgs),
    /// Mean reward, per component, and pass@k of a model on a file of rows.
    #[command(after_help = "Example:
  rft-engine eval --model runs/math/final --data data/math/test.jsonl --prompt '{question}' --reward math --samples 4")]
    Eval(EvalArgs),
    /// Sample completions as JSONL: {id, prompt, completion, tokens, logprobs, finish_reason}.
    #[command(after_help = "Example:
  rft-engine generate --model models/smollm2 --prompt 'What is 7 + 8?' --n 4 --seed 1")]
    Generate(GenerateArgs),
    /// The learner's logprobs of given tokens: rows {id, tokens, prompt_tokens}, or the output of generate.
    #[command(after_help = "Example:
  rft-engine generate --model M --prompt Hi > g.jsonl && rft-engine logprobs --model M --data g.jsonl")]
    Logprobs(LogprobsArgs),
    /// Score stored completions again: rows {id, completion, …} in, {id, reward, components, error} out.
    #[command(after_help = "Example:
  rft-engine score --reward math --reward my_reward.lua --data runs/math/samples.jsonl")]
    Score(ScoreArgs),
    /// Lint and fuzz a reward script before training with it.
    #[command(after_help = "Example:
  rft-engine verify --reward my_reward.lua --data data/math/test.jsonl")]
    Verify(VerifyArgs),
    /// Write a run's model as a Hugging Face folder, or its adapter as a PEFT folder.
    #[command(after_help = "Examples:
  rft-engine export --run runs/math --out exported
  rft-engine export --run runs/math-lora --out merged --merge-lora")]
    Export(ExportArgs),
    /// Write a run's report again: one self-contained HTML page.
    #[command(after_help = "Example:
  rft-engine report --run runs/math")]
    Report(ReportArgs),
    /// What this machine offers, and why anything is missing.
    Devices,
}

/// Flags of `launch`.
#[derive(Debug, Args)]
pub struct LaunchArgs {
    /// Recipe (TOML); without one, the built-in default.
    pub recipe: Option<PathBuf>,
    /// Change one key of the recipe; may be repeated.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub set: Vec<String>,
    /// Where the run is written; must not exist [default: runs/NAME-N].
    #[arg(long)]
    pub run_dir: Option<PathBuf>,
    /// Go on with the run in --run-dir from its last checkpoint.
    #[arg(long)]
    pub resume: bool,
    /// Print the resolved recipe and the memory plan, and stop.
    #[arg(long)]
    pub dry_run: bool,
}

/// How completions are drawn on the command line.
#[derive(Debug, Args)]
pub struct SamplingArgs {
    /// Longest completion, in tokens.
    #[arg(long, default_value_t = 256)]
    pub max_new_tokens: usize,
    /// Softmax temperature; 0 is greedy.
    #[arg(long, default_value_t = 1.0)]
    pub temperature: f32,
    /// Keep the k most likely tokens; 0 is off.
    #[arg(long, default_value_t = 0)]
    pub top_k: usize,
    /// Keep the smallest set of this probability; 1 is off.
    #[arg(long, default_value_t = 1.0)]
    pub top_p: f32,
    /// Keep tokens of at least this share of the most likely one's probability; 0 is off.
    #[arg(long, default_value_t = 0.0)]
    pub min_p: f32,
    /// End a completion at this string; may be repeated.
    #[arg(long)]
    pub stop: Vec<String>,
    /// Key of all randomness.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
}

/// The model and how it is run.
#[derive(Debug, Args)]
pub struct ModelArgs {
    /// Hugging Face folder or GGUF file.
    #[arg(long)]
    pub model: PathBuf,
    /// Arithmetic of the linear layers: f32 or bf16.
    #[arg(long, default_value = "f32", value_parser = parse_precision)]
    pub precision: Precision,
    /// Compute threads; 0 takes every core.
    #[arg(long, default_value_t = 0)]
    pub threads: usize,
}

fn parse_precision(text: &str) -> Result<Precision, String> {
    match text {
        "f32" => Ok(Precision::F32),
        "bf16" => Ok(Precision::Bf16),
        _ => Err("expected f32 or bf16".into()),
    }
}

/// How rows become prompts.
#[derive(Debug, Args)]
pub struct PromptArgs {
    /// System message (chat models).
    #[arg(long)]
    pub system: Option<String>,
    /// Use the text as it is, without the model's chat template.
    #[arg(long)]
    pub raw: bool,
}

/// Flags of `eval`.
#[derive(Debug, Args)]
pub struct EvalArgs {
    #[command(flatten)]
    #[allow(missing_docs)]
    pub model: ModelArgs,
    /// JSONL file of rows.
    #[arg(long)]
    pub data: PathBuf,
    /// Prompt with {field} placeholders; without it the row's `prompt` or `messages`.
    #[arg(long)]
    pub prompt: Option<String>,
    /// Verifier: a shipped one's name or a .lua file; may be repeated.
    #[arg(long, required = true)]
    pub reward: Vec<String>,
    /// Completions a prompt; more than one also gives pass@k.
    #[arg(long, default_value_t = 1)]
    pub samples: usize,
    /// Use only the first N rows; 0 uses all.
    #[arg(long, default_value_t = 0)]
    pub limit: usize,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub sampling: SamplingArgs,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub rendering: PromptArgs,
}

/// Flags of `generate`.
#[derive(Debug, Args)]
pub struct GenerateArgs {
    #[command(flatten)]
    #[allow(missing_docs)]
    pub model: ModelArgs,
    /// One prompt (with --data: its template with {field} placeholders).
    #[arg(long, required_unless_present = "data")]
    pub prompt: Option<String>,
    /// JSONL file of rows to answer.
    #[arg(long)]
    pub data: Option<PathBuf>,
    /// Completions a prompt.
    #[arg(long, default_value_t = 1)]
    pub n: usize,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub sampling: SamplingArgs,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub rendering: PromptArgs,
}

/// Flags of `logprobs`.
#[derive(Debug, Args)]
pub struct LogprobsArgs {
    #[command(flatten)]
    #[allow(missing_docs)]
    pub model: ModelArgs,
    /// JSONL rows {id, tokens, prompt_tokens}, or the output of generate.
    #[arg(long)]
    pub data: PathBuf,
    /// Temperature of the stated distribution.
    #[arg(long, default_value_t = 1.0)]
    pub temperature: f32,
    /// Top-k of the stated distribution; 0 is off.
    #[arg(long, default_value_t = 0)]
    pub top_k: usize,
    /// Top-p of the stated distribution; 1 is off.
    #[arg(long, default_value_t = 1.0)]
    pub top_p: f32,
    /// Min-p of the stated distribution; 0 is off.
    #[arg(long, default_value_t = 0.0)]
    pub min_p: f32,
}

/// Flags of `score`.
#[derive(Debug, Args)]
pub struct ScoreArgs {
    /// Verifier: a shipped one's name or a .lua file; may be repeated.
    #[arg(long, required = true)]
    pub reward: Vec<String>,
    /// JSONL rows {id, completion, …}.
    #[arg(long)]
    pub data: PathBuf,
    /// `ctx.step` of the scripts.
    #[arg(long, default_value_t = 0)]
    pub step: u64,
    /// `ctx.total_steps` of the scripts.
    #[arg(long, default_value_t = 0)]
    pub total_steps: u64,
}

/// Flags of `verify`.
#[derive(Debug, Args)]
pub struct VerifyArgs {
    /// Verifier: a shipped one's name or a .lua file.
    #[arg(long)]
    pub reward: String,
    /// JSONL rows like those it will see.
    #[arg(long)]
    pub data: Option<PathBuf>,
}

/// Flags of `export`.
#[derive(Debug, Args)]
pub struct ExportArgs {
    /// Run folder.
    #[arg(long)]
    pub run: PathBuf,
    /// Folder to write; must not exist.
    #[arg(long)]
    pub out: PathBuf,
    /// Add the adapter to the base weights and write a whole model.
    #[arg(long)]
    pub merge_lora: bool,
}

/// Flags of `report`.
#[derive(Debug, Args)]
pub struct ReportArgs {
    /// Run folder.
    #[arg(long)]
    pub run: PathBuf,
}
