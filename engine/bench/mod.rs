//! `rft-engine bench`: throughput of the parts and of a whole step, against the roofline of this machine.
//!
//! Every measurement is made several times on fresh inputs (new prompts, new random streams, a new policy version, so that no
//! cache answers), and reported as median, extremes and share of the bound that arithmetic and memory set. Measurements are
//! handed over one at a time, as they are made.

mod kernels;
mod learner;
mod rewards;
mod rollout;
mod step;

use std::path::PathBuf;
use std::sync::Arc;

use clap::{Args, Subcommand};
use rft_kernels::{Pool, Roofline, bf16_rule, isa, roofline};
use serde_json::{Map, Value, json};

use crate::config::{DevicesConfig, LoraConfig, Precision};
use crate::data::arithmetic;
use crate::data::tokenizer::Tokenizer;
use crate::error::Result;
use crate::model::policy::Policy;
use crate::model::source::ModelSource;
use crate::model::spec::{LayerSpec, ModelSpec};
use crate::report::metrics::environment;
use crate::rng::{Purpose, Stream};
use crate::types::{Prompt, TokenId};

/// What to measure.
#[derive(Debug, Clone, Subcommand)]
pub enum BenchCommand {
    /// Tokens drawn a second, sampling and logprobs included.
    Rollout(rollout::RolloutArgs),
    /// Tokens trained on a second: forward, backward and AdamW.
    Learner(learner::LearnerArgs),
    /// A whole GRPO step: rollouts, a trivial reward, one update.
    Step(step::StepArgs),
    /// Products, attention and norms at the model's shapes.
    Kernels(kernels::KernelArgs),
    /// Calls of verifiers a second: shipped ones over their cases, your own over rows of data.
    Rewards(rewards::RewardsArgs),
}

/// Flags that all measurements share.
#[derive(Debug, Clone, Args)]
pub struct CommonArgs {
    /// Hugging Face folder or GGUF file [default: random weights of SmolLM2-135M's shape].
    #[arg(long)]
    pub model: Option<PathBuf>,
    /// Arithmetic of the linear layers: f32 or bf16.
    #[arg(long, default_value = "bf16", value_parser = crate::config::parse_precision)]
    pub precision: Precision,
    /// How keys and values are kept: f32 or bf16.
    #[arg(long, default_value = "f32", value_parser = crate::config::parse_precision)]
    pub kv_precision: Precision,
    /// Compute threads; 0 takes every core.
    #[arg(long, default_value_t = 0)]
    pub threads: usize,
    /// Measurements of each case; the first run, a warm-up, is not among them.
    #[arg(long, default_value_t = 3)]
    pub repeats: usize,
}

/// One line of results: what was measured, and named numbers.
#[derive(Debug, Clone)]
pub struct Measurement {
    /// What was measured, with its sizes.
    pub work: String,
    /// Median, in `unit`.
    pub value: f64,
    /// Unit of `value`.
    pub unit: &'static str,
    /// Least and greatest of the repeats.
    pub range: (f64, f64),
    /// Share of the bound of this machine that `value` reaches, where a bound is known.
    pub roofline_share: Option<f64>,
    /// More numbers by name.
    pub more: Map<String, Value>,
}

impl Measurement {
    /// The measurement as one JSON object.
    pub fn to_json(&self) -> Value {
        let mut line = json!({
            "work": self.work, "value": round(self.value), "unit": self.unit,
            "min": round(self.range.0), "max": round(self.range.1), "roofline_share": self.roofline_share.map(round),
        });
        if let Value::Object(line) = &mut line {
            line.extend(self.more.clone());
        }
        line
    }

    /// The measurement as one line of text.
    pub fn to_text(&self) -> String {
        let share =
            self.roofline_share.map_or(String::new(), |s| format!("  {:>3.0} % of the roofline", s * 100.0));
        let more: String = self.more.iter().map(|(name, value)| format!("  {name} {value}")).collect();
        format!(
            "{:<52} {:>9.1} {} ({:.1} to {:.1}){share}{more}",
            self.work, self.value, self.unit, self.range.0, self.range.1
        )
    }
}

/// Processor seconds of this process so far, all threads, in steps of 10 ms; 0 where the system does not say.
fn cpu_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // the program's name, in brackets, may hold spaces; user and system time are the 12th and 13th fields after it
    let ticks = stat.rsplit(')').next().unwrap_or("").split_whitespace().skip(11).take(2);
    ticks.filter_map(|t| t.parse::<f64>().ok()).sum::<f64>() / 100.0
}

/// Sets the peak of memory back to what is held now, where the system can (Linux), so that each case has a peak of its own.
fn reset_peak() {
    rft_kernels::release_pages();
    if cfg!(target_os = "linux") {
        // where it is refused the peak is that of all cases so far
        let _ = std::fs::write("/proc/self/clear_refs", "5");
    }
}

/// Four significant digits are more than a measurement has.
fn round(x: f64) -> f64 {
    format!("{x:.3e}").parse().unwrap_or(x)
}

/// Measures and hands each result to `report`; the first describes the machine.
///
/// # Errors
/// A model that cannot be read or run.
pub fn run(command: &BenchCommand, report: &mut dyn FnMut(&Value, &str)) -> Result<()> {
    let mut each = |m: Measurement| report(&m.to_json(), &m.to_text());
    match command {
        BenchCommand::Rollout(args) => rollout::run(args, &mut machine(&args.common, &mut each)?, &mut each),
        BenchCommand::Learner(args) => learner::run(args, &mut machine(&args.common, &mut each)?, &mut each),
        BenchCommand::Step(args) => step::run(args, &mut machine(&args.common, &mut each)?, &mut each),
        BenchCommand::Kernels(args) => kernels::run(args, &mut machine(&args.common, &mut each)?, &mut each),
        BenchCommand::Rewards(args) => rewards::run(args, &mut each),
    }
}

/// Where measurements go.
type Report<'a> = &'a mut dyn FnMut(Measurement);

/// What a measurement runs on.
struct Machine {
    pool: Pool,
    roof: Roofline,
    precision: Precision,
    kv_precision: Precision,
    repeats: usize,
    source: Option<ModelSource>,
}

fn machine(args: &CommonArgs, report: Report) -> Result<Machine> {
    let threads = DevicesConfig { threads: args.threads, ..Default::default() }.thread_count();
    let pool = Pool::new(threads);
    let roof = roofline(&pool);
    let mut more = environment(threads, isa().name());
    more.insert("bf16_rule".into(), bf16_rule().name().into());
    more.insert("f32_gflops".into(), round(roof.f32_gflops).into());
    more.insert("bf16_gflops".into(), round(roof.bf16_gflops).into());
    more.insert("version".into(), env!("CARGO_PKG_VERSION").into());
    more.insert("flags".into(), json!(std::env::args().skip(1).collect::<Vec<_>>()));
    report(Measurement {
        work: "machine, memory read".into(),
        value: roof.read_gb_per_s,
        unit: "GB/s",
        range: (roof.read_gb_per_s, roof.read_gb_per_s),
        roofline_share: None,
        more,
    });
    let source = args.model.as_ref().map(ModelSource::open).transpose()?;
    Ok(Machine {
        pool,
        roof,
        precision: args.precision,
        kv_precision: args.kv_precision,
        repeats: args.repeats.max(1),
        source,
    })
}

impl Machine {
    /// The policy to measure, with LoRA adapters of `rank` on all projections; rank 0 trains all weights.
    fn policy(&self, rank: usize, positions: usize) -> Result<Policy> {
        let lora = LoraConfig { rank, alpha: 2.0 * rank as f32, ..LoraConfig::default() };
        let lora = (rank > 0).then_some(&lora);
        let mut policy = match (&self.source, lora) {
            (Some(source), lora) => Policy::load_on(&self.pool, source, lora, 0)?,
            (None, Some(lora)) => Policy::init(smollm2()?, 0).with_adapter(lora, 0)?,
            (None, None) => Policy::init(smollm2()?, 0),
        };
        policy.kv_precision = self.kv_precision;
        policy.prepare(&self.pool, positions, self.precision);
        Ok(policy)
    }

    fn tokenizer(&self) -> Result<Tokenizer> {
        self.source.as_ref().map_or_else(arithmetic::tokenizer, ModelSource::tokenizer)
    }

    fn precision_name(&self) -> &'static str {
        match self.precision {
            Precision::F32 => "f32",
            Precision::Bf16 => "bf16",
        }
    }

    /// Operations a second of the linear layers at best, 10⁹.
    fn gflops(&self) -> f64 {
        match self.precision {
            Precision::F32 => self.roof.f32_gflops,
            Precision::Bf16 => self.roof.bf16_gflops,
        }
    }

    /// Bytes of a weight as the linear layers read it.
    fn weight_bytes(&self) -> f64 {
        match self.precision {
            Precision::F32 => 4.0,
            Precision::Bf16 => 2.0,
        }
    }

    /// The least seconds that this many operations and bytes can take.
    fn bound(&self, operations: f64, bytes: f64) -> f64 {
        (operations / (self.gflops() * 1e9)).max(bytes / (self.roof.read_gb_per_s * 1e9))
    }
}

/// The shape of SmolLM2-135M.
fn smollm2() -> Result<ModelSpec> {
    ModelSpec::from_config_json(&json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 49152, "hidden_size": 576,
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 1536,
        "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 100000.0, "max_position_embeddings": 8192,
        "tie_word_embeddings": true, "torch_dtype": "float32", "eos_token_id": 2,
    }))
}

/// Parameters that a token is multiplied with in the layers, and in the head.
fn linear_parameters(spec: &ModelSpec) -> (f64, f64) {
    let (q, kv) = (spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim);
    let layer = |layer: &LayerSpec| match &spec.moe {
        Some(moe) if layer.experts => moe.experts + moe.per_token * 3 * moe.ffn,
        _ => 3 * spec.ffn,
    };
    let layers: usize = spec.layer_specs.iter().map(|l| spec.hidden * (2 * q + 2 * kv + layer(l))).sum();
    (layers as f64, (spec.vocab * spec.hidden) as f64)
}

/// Random tokens that no tokenizer reserves.
fn random_tokens(len: usize, vocab: usize, key: u64) -> Vec<TokenId> {
    let mut noise = Stream::new(17, Purpose::Init, &[key]);
    let low = (vocab / 4).min(100);
    (0..len).map(|_| (low + (noise.next_f64() * (vocab - low) as f64) as usize) as TokenId).collect()
}

fn prompt(index: usize, tokens: Vec<TokenId>) -> Arc<Prompt> {
    Arc::new(Prompt {
        index,
        id: index.to_string(),
        text: String::new(),
        tokens,
        task: Arc::default(),
        fields: Arc::default(),
    })
}

/// What trains, in the words of a result.
fn trained(rank: usize) -> String {
    if rank > 0 { format!("LoRA r={rank}") } else { "full".into() }
}

/// Median and extremes.
fn spread(mut values: Vec<f64>) -> (f64, (f64, f64)) {
    values.sort_by(f64::total_cmp);
    let last = values.len() - 1;
    ((values[last / 2] + values[last.div_ceil(2)]) / 2.0, (values[0], values[last]))
}
