//! The command line: subcommands, their flags, and what they print.
//!
//! Data goes to stdout, everything else to stderr; the exit code is 0 only on success (130 after Ctrl-C).

use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use clap::{Args, Parser, Subcommand};
use rft_kernels::{BLOCK, Pool};
use rft_rewards::{RewardError, RewardSpec, Source};
use serde_json::{Map, Value, json};

use crate::bench::BenchCommand;
use crate::config::{DevicesConfig, Precision, Recipe, RewardConfig, parse_precision};
use crate::data::prompts::{Places, Renderer, Row, read_jsonl, read_placed};
use crate::data::tokenizer::Tokenizer;
use crate::error::{EngineError, Result};
use crate::eval::{Evaluation, Trial};
use crate::learner::batch::{GroupTokens, micro_batches, pack};
use crate::model::backprop::Trainer;
use crate::model::decoder::PagedDecoder;
use crate::model::policy::Policy;
use crate::model::source::ModelSource;
use crate::reward::Scorer;
use crate::rollout::{Request, RolloutEngine, RolloutKey, SamplingConfig};
use crate::train::{self, Run};
use crate::types::{PolicyVersion, Prompt, TokenId};

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
    /// Lint and fuzz a reward before training: range, determinism, inputs that are paid for nothing, cost a call.
    #[command(after_help = "Examples:
  rft-engine verify --reward my_reward.lua --data data/train.jsonl
  rft-engine verify --reward math --json")]
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
    /// Throughput of rollouts, learner, whole steps, kernels and verifiers, and the share of this machine's roofline.
    #[command(after_help = "Examples:
  rft-engine bench rollout --model models/smollm2 --parallel 8,32,64 --group 1,0
  rft-engine bench learner --precision bf16 --group 1,8 --json
  rft-engine bench step && rft-engine bench kernels --rows 1,8,64 --threads 1
  rft-engine bench rewards --reward math --reward exact")]
    Bench(BenchArgs),
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

/// The distribution that tokens are drawn from and logprobs are stated under.
#[derive(Debug, Args)]
pub struct DistributionArgs {
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
}

/// How completions are drawn on the command line.
#[derive(Debug, Args)]
pub struct SamplingArgs {
    /// Longest completion, in tokens [default: 256, or what the model's context leaves].
    #[arg(long)]
    pub max_new_tokens: Option<usize>,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub distribution: DistributionArgs,
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
    /// How keys and values are kept (a run's `rollout.kv_precision`): f32 or bf16.
    #[arg(long, default_value = "f32", value_parser = parse_precision)]
    pub kv_precision: Precision,
    /// Compute threads; 0 takes every core.
    #[arg(long, default_value_t = 0)]
    pub threads: usize,
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
    #[arg(long, default_value_t = 1, value_parser = at_least_one)]
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
    #[arg(long, default_value_t = 1, value_parser = at_least_one)]
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
    #[command(flatten)]
    #[allow(missing_docs)]
    pub distribution: DistributionArgs,
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
    /// Verifier: a shipped one's name or a .lua file; may be repeated.
    #[arg(long, required = true)]
    pub reward: Vec<String>,
    /// JSONL rows to try it on: data rows, or stored completions; without it the script's own NAME.cases.jsonl.
    #[arg(long)]
    pub data: Option<PathBuf>,
    /// `ctx.options` of the script, as JSON.
    #[arg(long, value_name = "JSON")]
    pub options: Option<String>,
    /// One JSON object a script in place of text.
    #[arg(long)]
    pub json: bool,
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

/// Flags of `bench`.
#[derive(Debug, Args)]
pub struct BenchArgs {
    /// What to measure.
    #[command(subcommand)]
    pub command: BenchCommand,
    /// One JSON object a line instead of text; the first describes the machine.
    #[arg(long, global = true)]
    pub json: bool,
}

/// Parses the process's arguments and runs the command.
///
/// # Errors
/// Whatever the command reports; [`EngineError::Interrupted`] after Ctrl-C.
pub fn run() -> Result<()> {
    match Cli::parse().command {
        Command::Launch(args) => launch(args),
        Command::Eval(args) => eval(&args),
        Command::Generate(args) => generate(&args),
        Command::Logprobs(args) => logprobs(&args),
        Command::Score(args) => score(&args),
        Command::Verify(args) => verify(&args),
        Command::Export(args) => export(&args),
        Command::Report(args) => crate::report::html::write(&args.run),
        Command::Bench(args) => {
            let mut written = Ok(());
            crate::bench::run(&args.command, &mut |json, text| {
                let line = if args.json { format!("{json}\n") } else { format!("{text}\n") };
                written = std::mem::replace(&mut written, Ok(())).and_then(|()| print_text(&line));
            })?;
            written
        }
        Command::Devices => devices(),
    }
}

fn launch(args: LaunchArgs) -> Result<()> {
    let (recipe, root) = match (args.resume, args.run_dir) {
        (true, None) => {
            return Err(EngineError::Config("--resume needs --run-dir: the run folder to go on with".into()));
        }
        (true, Some(_)) if args.recipe.is_some() || !args.set.is_empty() => {
            return Err(EngineError::Config(
                "--resume goes on with the run folder's own recipe; leave out RECIPE and --set".into(),
            ));
        }
        (true, Some(root)) => (Recipe::load(Some(&root.join("recipe.toml")), &[])?, root),
        (false, root) => {
            let recipe = Recipe::load(args.recipe.as_deref(), &args.set)?;
            let root = root.unwrap_or_else(|| train::free_run_dir(&recipe.name));
            if root.exists() && !args.dry_run {
                return Err(EngineError::Config(format!(
                    "{} exists already and a run is never overwritten. hint: choose another --run-dir, or --resume to go on with it",
                    root.display()
                )));
            }
            (recipe, root)
        }
    };
    let text = recipe.to_toml();
    let run = Run::prepare(recipe)?;
    if args.dry_run {
        let plan: String = run.plan().to_string().lines().map(|l| format!("#{l}\n")).collect();
        return print_text(&format!("{text}\n# memory plan\n{plan}"));
    }
    eprintln!("{}", run.describe());
    static STOP: AtomicBool = AtomicBool::new(false);
    let second = || {
        if STOP.swap(true, Ordering::SeqCst) {
            std::process::exit(130);
        }
        eprintln!("\nstopping after this step; press Ctrl-C again to stop at once");
    };
    // a handler that cannot be set leaves the default one: Ctrl-C still works, without the save
    if let Err(error) = ctrlc::set_handler(second) {
        eprintln!("warning: Ctrl-C will not save: {error}");
    }
    match run.train(&root, args.resume, &STOP) {
        Err(EngineError::Interrupted) => {
            eprintln!("saved. Go on with: rft-engine launch --run-dir {} --resume", root.display());
            Err(EngineError::Interrupted)
        }
        result => result.map(|_| ()),
    }
}

/// A model loaded to be sampled or scored.
struct Loaded {
    pool: Pool,
    policy: Policy,
    tokenizer: Tokenizer,
    source: ModelSource,
}

impl Loaded {
    fn open(args: &ModelArgs) -> Result<Self> {
        let source = ModelSource::open(&args.model)?;
        let devices = DevicesConfig { threads: args.threads, ..Default::default() };
        devices.check().map_err(|message| EngineError::Config(format!("--{message}")))?;
        let pool = Pool::new(devices.thread_count());
        let mut policy = Policy::load_on(&pool, &source, None, 0)?;
        policy.kv_precision = args.kv_precision;
        Ok(Self { pool, policy, tokenizer: source.tokenizer()?, source })
    }

    fn prepare(&mut self, positions: usize, precision: Precision) -> Result<()> {
        let most = self.policy.spec.max_positions;
        if positions > most {
            return Err(EngineError::Config(format!(
                "{positions} positions are needed and the model has {most}. hint: fewer new tokens, or shorter prompts"
            )));
        }
        self.policy.prepare(&self.pool, positions, precision);
        Ok(())
    }

    fn prompts(
        &self,
        rows: &[Row],
        template: Option<&str>,
        rendering: &PromptArgs,
        places: Option<&Places>,
    ) -> Result<Vec<Arc<Prompt>>> {
        let chat = match rendering.raw {
            true => None,
            false => self.source.chat_template(&self.tokenizer)?,
        };
        let renderer = Renderer {
            template,
            system: rendering.system.as_deref(),
            chat: chat.as_ref(),
            tokenizer: &self.tokenizer,
            places,
        };
        rows.iter().enumerate().map(|(i, row)| renderer.prompt(i, row).map(Arc::new)).collect()
    }

    fn sampling(&self, args: &SamplingArgs, prompts: &[Arc<Prompt>]) -> Result<SamplingConfig> {
        let mut stop_tokens = self.tokenizer.eos().to_vec();
        stop_tokens.extend(self.policy.spec.eos.iter().filter(|id| !self.tokenizer.eos().contains(id)));
        let room = self.policy.spec.max_positions.saturating_sub(longest(prompts));
        let sampling = SamplingConfig {
            max_new_tokens: args.max_new_tokens.unwrap_or(room.clamp(1, 256)),
            temperature: args.distribution.temperature,
            top_k: args.distribution.top_k,
            top_p: args.distribution.top_p,
            min_p: args.distribution.min_p,
            stop: args.stop.clone(),
            stop_tokens,
        };
        sampling.check()?;
        Ok(sampling)
    }

    /// An engine whose pool holds up to 64 sequences of the longest prompt at once.
    fn engine(&self, prompts: &[Arc<Prompt>], samples: usize, max_new_tokens: usize) -> RolloutEngine {
        let longest = prompts.iter().map(|p| p.tokens.len()).max().unwrap_or(1) + max_new_tokens;
        let sequences = (prompts.len() * samples).clamp(1, 64);
        let blocks = (longest.div_ceil(BLOCK) + 2) * sequences;
        RolloutEngine::new(&PagedDecoder::new(self.policy.weights()), blocks)
    }
}

fn at_least_one(text: &str) -> std::result::Result<usize, String> {
    text.parse().ok().filter(|n| *n >= 1).ok_or_else(|| "a whole number of at least 1 is needed".into())
}

fn longest(prompts: &[Arc<Prompt>]) -> usize {
    prompts.iter().map(|p| p.tokens.len()).max().unwrap_or(0)
}

fn print_line(value: &Value) -> Result<()> {
    print_text(&format!("{value}\n"))
}

/// Writes to stdout; a reader that has seen enough (`| head`) ends the program, as other filters end.
fn print_text(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => std::process::exit(141),
        written => written.map_err(EngineError::io("standard output")),
    }
}

fn eval(args: &EvalArgs) -> Result<()> {
    let (mut rows, places) = read_placed(&args.data)?;
    if args.limit > 0 {
        rows.truncate(args.limit);
    }
    let rewards = args.reward.iter().map(|r| reward_config(r)).collect::<Vec<_>>();
    let mut loaded = Loaded::open(&args.model)?;
    let scorer = Scorer::new(&rewards, loaded.pool.threads())?;
    let prompts = loaded.prompts(&rows, args.prompt.as_deref(), &args.rendering, Some(&places))?;
    let sampling = loaded.sampling(&args.sampling, &prompts)?;
    loaded.prepare(longest(&prompts) + sampling.max_new_tokens, args.model.precision)?;
    let mut engine = loaded.engine(&prompts, args.samples, sampling.max_new_tokens);
    let evaluation = Evaluation {
        prompts: &prompts,
        samples: args.samples,
        trial: Trial { sampling: &sampling, scorer: &scorer, progress: (0, 0) },
        full_reward: rewards.iter().map(|r| r.weight).sum(),
    };
    let key = RolloutKey { seed: args.sampling.seed, step: 0, version: PolicyVersion(0) };
    let mut model = PagedDecoder::new(loaded.policy.weights());
    let (result, groups, stats) =
        evaluation.run(&mut engine, &mut model, &loaded.pool, &loaded.tokenizer, key)?;
    let components: Map<String, Value> =
        result.components.iter().map(|(n, v)| (n.clone(), json!(v))).collect();
    let passes: Map<String, Value> =
        result.pass_at_k.iter().map(|(k, v)| (format!("pass@{k}"), json!(v))).collect();
    let errors: usize = groups.iter().flat_map(|g| &g.outcomes).map(|o| o.errors.len()).sum();
    print_line(&json!({
        "prompts": prompts.len(),
        "samples": args.samples,
        "reward_mean": result.reward,
        "components": components,
        "pass_at_k": passes,
        "reward_errors": errors,
        "completion_tokens_mean": result.completion_tokens_mean,
        "rollout_tokens_per_s": stats.decoded_tokens as f64 / stats.seconds.max(1e-9),
    }))
}

fn reward_config(script: &str) -> RewardConfig {
    RewardConfig {
        script: script.to_string(),
        weight: 1.0,
        time_ms: 1000,
        memory_mb: 64,
        on_error: Default::default(),
        error_score: 0.0,
        options: Map::new(),
        tasks: Vec::new(),
    }
}

fn generate(args: &GenerateArgs) -> Result<()> {
    let (rows, places, template) = match (&args.data, &args.prompt) {
        (Some(path), template) => {
            let (rows, places) = read_placed(path)?;
            (rows, Some(places), template.as_deref())
        }
        (None, Some(prompt)) => (vec![Map::from_iter([("prompt".to_string(), json!(prompt))])], None, None),
        (None, None) => unreachable!("clap requires one of them"),
    };
    let mut loaded = Loaded::open(&args.model)?;
    let prompts = loaded.prompts(&rows, template, &args.rendering, places.as_ref())?;
    let sampling = loaded.sampling(&args.sampling, &prompts)?;
    loaded.prepare(longest(&prompts) + sampling.max_new_tokens, args.model.precision)?;
    let mut engine = loaded.engine(&prompts, args.n, sampling.max_new_tokens);
    let requests: Vec<Request> =
        prompts.iter().map(|p| Request { prompt: Arc::clone(p), samples: args.n }).collect();
    let key = RolloutKey { seed: args.sampling.seed, step: 0, version: PolicyVersion(0) };
    let mut model = PagedDecoder::new(loaded.policy.weights());
    let warp = sampling.warp();
    let stated = json!({
        "temperature": warp.temperature, "top_k": warp.top_k, "top_p": warp.top_p, "min_p": warp.min_p,
    });
    // groups are printed in the order of the file, as soon as all before them are complete
    let (mut waiting, mut next) = (std::collections::BTreeMap::new(), 0);
    engine.generate(
        &mut model,
        &loaded.pool,
        &loaded.tokenizer,
        &requests,
        &sampling,
        key,
        &mut |i, group| {
            waiting.insert(i, group);
            while let Some(group) = waiting.remove(&next) {
                next += 1;
                for c in &group.completions {
                    print_line(&json!({
                        "id": group.prompt.id,
                        "prompt": group.prompt.text,
                        "completion": c.text,
                        "tokens": c.tokens,
                        "logprobs": c.logprobs,
                        "finish_reason": c.finish,
                        "prompt_ids": group.prompt.tokens,
                        "sampling": stated,
                    }))?;
                }
            }
            Ok(())
        },
    )?;
    Ok(())
}

/// A row of `logprobs`: its prompt, its completion and the distribution they are scored under.
struct ScoreRow {
    id: Value,
    prompt: Vec<TokenId>,
    completion: Vec<TokenId>,
    warp: rft_kernels::Warp,
}

fn logprobs(args: &LogprobsArgs) -> Result<()> {
    let rows = read_jsonl(&args.data)?;
    let mut loaded = Loaded::open(&args.model)?;
    let rows: Vec<ScoreRow> = rows
        .iter()
        .enumerate()
        .map(|(i, row)| {
            score_row(row, &loaded, args)
                .map_err(|message| EngineError::malformed(&args.data, format!("row {}", i + 1), message))
        })
        .collect::<Result<_>>()?;
    let positions = rows.iter().map(|r| r.prompt.len() + r.completion.len()).max().unwrap_or(1);
    loaded.prepare(positions, args.model.precision)?;
    let mut trainer = Trainer::default();
    for row in &rows {
        let groups = [GroupTokens { prompt: &row.prompt, completions: vec![&row.completion] }];
        let mut scored = Vec::new();
        for pieces in micro_batches(&groups, usize::MAX) {
            scored = trainer
                .score(&loaded.pool, &loaded.policy.weights(), &pack(&groups, &pieces), &row.warp)
                .logprobs;
        }
        print_line(&json!({"id": row.id, "logprobs": scored}))?;
    }
    Ok(())
}

fn score_row(row: &Row, loaded: &Loaded, args: &LogprobsArgs) -> std::result::Result<ScoreRow, String> {
    let ids = |key: &str| -> std::result::Result<Option<Vec<TokenId>>, String> {
        let Some(value) = row.get(key) else { return Ok(None) };
        let ids: Vec<TokenId> = serde_json::from_value(value.clone())
            .map_err(|e| format!("`{key}` is no list of token ids: {e}"))?;
        match ids.iter().find(|id| **id as usize >= loaded.policy.spec.vocab) {
            Some(id) => {
                Err(format!("`{key}`: token {id} is outside the vocabulary of {}", loaded.policy.spec.vocab))
            }
            None => Ok(Some(ids)),
        }
    };
    let tokens = ids("tokens")?.ok_or("has no `tokens`")?;
    let (prompt, completion) = match (row.get("prompt_tokens"), ids("prompt_ids")?, row.get("prompt")) {
        (Some(n), _, _) => {
            let n = n.as_u64().filter(|n| *n >= 1 && *n <= tokens.len() as u64);
            let most = tokens.len();
            let n = n.ok_or_else(|| format!("`prompt_tokens` must be from 1 to the {most} of `tokens`"))?
                as usize;
            (tokens[..n].to_vec(), tokens[n..].to_vec())
        }
        (None, Some(prompt), _) => (prompt, tokens),
        (None, None, Some(Value::String(text))) => {
            (loaded.tokenizer.encode(text).map_err(|e| e.to_string())?, tokens)
        }
        _ => {
            return Err(
                "needs `prompt_tokens` (how many of `tokens` are the prompt), `prompt_ids` or `prompt`"
                    .into(),
            );
        }
    };
    if prompt.is_empty() {
        return Err("the prompt is empty".into());
    }
    let stated = row.get("sampling");
    let number =
        |key: &str, flag: f64| stated.and_then(|s| s.get(key)).and_then(Value::as_f64).unwrap_or(flag);
    let warp = rft_kernels::Warp {
        temperature: number("temperature", f64::from(args.distribution.temperature)) as f32,
        top_k: number("top_k", args.distribution.top_k as f64) as usize,
        top_p: number("top_p", f64::from(args.distribution.top_p)) as f32,
        min_p: number("min_p", f64::from(args.distribution.min_p)) as f32,
    };
    if warp.temperature.is_nan() || warp.temperature <= 0.0 {
        return Err("the temperature must be positive".into());
    }
    Ok(ScoreRow { id: row.get("id").cloned().unwrap_or_default(), prompt, completion, warp })
}

fn devices() -> Result<()> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    print_text(&format!(
        "cpu   {cores} cores, kernels for {}\ncuda  not built in: this build has CPU kernels only\n",
        rft_kernels::isa().name()
    ))
}

fn verify(args: &VerifyArgs) -> Result<()> {
    let data = args.data.as_deref().map(read_jsonl).transpose()?;
    let options: Map<String, Value> = match &args.options {
        Some(text) => serde_json::from_str(text)
            .map_err(|e| EngineError::Config(format!("--options must be a JSON object: {e}")))?,
        None => Map::new(),
    };
    let mut failed = Vec::new();
    for name in &args.reward {
        let script = rft_rewards::resolve(name).map_err(|e| EngineError::Reward(e.to_string()))?;
        let rows = match &data {
            Some(rows) => rows.clone(),
            None => own_cases(&script)?,
        };
        let spec = RewardSpec { options: options.clone(), ..RewardSpec::new(script) };
        let report = rft_rewards::verify::verify(&spec, &rows);
        if args.json {
            print_line(&serde_json::to_value(&report).map_err(|e| EngineError::Reward(e.to_string()))?)?;
        } else {
            print_text(&format!("{report}\n"))?;
        }
        if !report.passed() {
            failed.push(name.as_str());
        }
    }
    if failed.is_empty() {
        return Ok(());
    }
    Err(EngineError::Reward(format!("{} did not pass", failed.join(", "))))
}

/// The cases that stand beside a script: `NAME.cases.jsonl`; none where there is no such file.
fn own_cases(script: &rft_rewards::Script) -> Result<Vec<Row>> {
    let path = match script.source() {
        Source::Shipped(name) => {
            return Ok(rft_rewards::shipped_cases(name));
        }
        Source::File(path) => path.with_extension("cases.jsonl"),
    };
    if path.is_file() { read_jsonl(&path) } else { Ok(Vec::new()) }
}

fn score(args: &ScoreArgs) -> Result<()> {
    let rows = read_jsonl(&args.data)?;
    let rewards: Vec<RewardConfig> = args.reward.iter().map(|r| reward_config(r)).collect();
    let threads = DevicesConfig::default().thread_count();
    let scorer = Scorer::new(&rewards, threads)?;
    let results = scorer
        .score_rows(&rows, args.step, args.total_steps)
        .map_err(|(row, message)| EngineError::malformed(&args.data, format!("row {}", row + 1), message))?;
    let (mut failed, mut changed) = (0, 0);
    for (row, outcome) in rows.iter().zip(&results) {
        let components: Map<String, Value> =
            outcome.components.iter().map(|(n, v)| (n.clone(), json!(v))).collect();
        failed += usize::from(!outcome.errors.is_empty());
        let mut line = json!({
            "id": row.get("id").cloned().unwrap_or_default(),
            "reward": outcome.reward,
            "components": components,
            "error": outcome.errors.first(),
        });
        if let Some(Value::Object(stored)) = row.get("components") {
            let difference = |(name, value): (&String, &Value)| {
                let now = components.get(name).and_then(Value::as_f64);
                (now != value.as_f64()).then(|| (name.clone(), json!({"stored": value, "now": now})))
            };
            let differences: Map<String, Value> = stored.iter().filter_map(difference).collect();
            changed += usize::from(!differences.is_empty());
            if !differences.is_empty() {
                line["differences"] = Value::Object(differences);
            }
        }
        print_line(&line)?;
    }
    // each place that failed, once, with its line of the script
    let mut places: Vec<&RewardError> = Vec::new();
    for error in results.iter().flat_map(|outcome| &outcome.errors) {
        if !places
            .iter()
            .any(|known| (&known.script, known.kind, known.line) == (&error.script, error.kind, error.line))
        {
            eprintln!("{error}");
            places.push(error);
        }
    }
    let scored: Vec<f64> = results.iter().filter_map(|o| o.reward).collect();
    let mean = scored.iter().sum::<f64>() / scored.len().max(1) as f64;
    eprintln!(
        "{} rows: mean reward {mean:.4} over {} scored, {failed} with errors, {changed} different from what is stored",
        rows.len(),
        scored.len()
    );
    Ok(())
}

fn export(args: &ExportArgs) -> Result<()> {
    if args.out.exists() {
        return Err(EngineError::Config(format!(
            "{} exists already. hint: choose another --out",
            args.out.display()
        )));
    }
    let recipe = Recipe::load(Some(&args.run.join("recipe.toml")), &[])
        .map_err(|e| EngineError::Config(format!("{e}. hint: --run takes a folder that `launch` wrote")))?;
    Run::prepare(recipe)?.export(&args.run, &args.out, args.merge_lora)
}
