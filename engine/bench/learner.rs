//! Learner throughput: one update of given completions, full or LoRA, with shared prompts or without.

use std::time::Instant;

use clap::Args;
use serde_json::{Map, json};

use super::{
    CommonArgs, Machine, Measurement, Report, cpu_seconds, linear_parameters, random_tokens, reset_peak,
    round, spread, trained,
};
use crate::config::OptimizerConfig;
use crate::error::Result;
use crate::learner::batch::GroupTokens;
use crate::learner::step::{Learner, ScoreGrads};
use crate::model::spec::ModelSpec;
use crate::report::metrics::rss_peak_bytes;
use crate::types::TokenId;
use rft_kernels::Warp;

/// Flags of `bench learner`.
#[derive(Debug, Clone, Args)]
pub struct LearnerArgs {
    #[command(flatten)]
    #[allow(missing_docs)]
    pub common: CommonArgs,
    /// Completions of an update.
    #[arg(long, default_value_t = 16)]
    pub sequences: usize,
    /// Tokens of a prompt.
    #[arg(long, default_value_t = 64)]
    pub prompt: usize,
    /// Tokens of a completion.
    #[arg(long, default_value_t = 128)]
    pub new: usize,
    /// Completions that share a prompt, one case each.
    #[arg(long, value_delimiter = ',', default_values_t = [1])]
    pub group: Vec<usize>,
    /// Rank of LoRA adapters on all projections; 0 trains all weights.
    #[arg(long, default_value_t = 0)]
    pub lora: usize,
    /// Rows of a micro-batch.
    #[arg(long, default_value_t = 1536)]
    pub max_rows: usize,
}

pub(super) fn run(args: &LearnerArgs, machine: &mut Machine, report: Report) -> Result<()> {
    let mut policy = machine.policy(args.lora, args.prompt + args.new)?;
    let mut separate = None;
    for &group in &args.group {
        // each case's buffers and peak are its own
        let mut learner = Learner::new(&policy, args.max_rows);
        reset_peak();
        let (mut rates, mut rows, mut key) = (Vec::new(), 0, 0);
        let mut least_cpu = f64::INFINITY;
        let counted = (args.sequences * (args.prompt + args.new)) as f64;
        for repeat in 0..machine.repeats + 1 {
            let batch =
                Batch::random(args.sequences, group, args.prompt, args.new, policy.spec.vocab, &mut key);
            let (start, cpu) = (Instant::now(), cpu_seconds());
            let count = (args.sequences * args.new) as f32;
            let objective = |_: &[_], scores: &crate::model::backprop::Scores| {
                let n = scores.logprobs.len();
                let d = (0..n).map(|i| if i % 2 == 0 { 1.0 } else { -1.0 } / count).collect();
                Ok(ScoreGrads { logprobs: d, entropies: vec![0.0; n] })
            };
            let warp = Warp { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0 };
            let optimizer = OptimizerConfig::default();
            let stats = learner.update(
                &machine.pool,
                &mut policy,
                &batch.groups(),
                &warp,
                &optimizer,
                1e-6,
                objective,
            )?;
            if repeat > 0 {
                rates.push(counted / start.elapsed().as_secs_f64());
                least_cpu = least_cpu.min(cpu_seconds() - cpu);
            }
            rows = stats.rows;
        }
        let (value, range) = spread(rates);
        let bound = counted / step_bound(machine, &policy.spec, args, group, rows);
        let mut more = Map::new();
        more.insert("seconds_per_update".into(), round(counted / value).into());
        more.insert("least_cpu_seconds".into(), round(least_cpu).into());
        more.insert("rows".into(), rows.into());
        more.insert("bound_tokens_per_s".into(), round(bound).into());
        more.insert("rss_peak_mb".into(), json!(rss_peak_bytes() >> 20));
        let peak = rss_peak_bytes();
        if group == 1 {
            separate = Some((value, peak));
        } else if let Some((alone, peak_alone)) = separate {
            more.insert("times_faster_than_separate".into(), round(value / alone).into());
            more.insert("peak_of_separate".into(), round(peak as f64 / peak_alone as f64).into());
        }
        let what = trained(args.lora);
        report(Measurement {
            work: format!(
                "update {} {what}, {}x({}+{}), groups of {group}",
                machine.precision_name(),
                args.sequences,
                args.prompt,
                args.new
            ),
            value,
            unit: "tokens/s",
            range,
            roofline_share: Some(value / bound),
            more,
        });
    }
    Ok(())
}

/// The least seconds of an update: products forward and backward once (LoRA: without the frozen weights' gradients), the
/// optimizer's passes over memory; attention is left out.
fn step_bound(machine: &Machine, spec: &ModelSpec, args: &LearnerArgs, group: usize, rows: usize) -> f64 {
    let (layers, head) = linear_parameters(spec);
    let passes = if args.lora > 0 { 4.0 } else { 6.0 };
    let targets = (args.sequences * args.new) as f64;
    let rows = (rows as f64).max((args.sequences.div_ceil(group) * args.prompt) as f64);
    let trained = if args.lora > 0 { 0.0 } else { layers + head };
    machine.bound(passes * (rows * layers + targets * head), 0.0)
        + 7.0 * 4.0 * trained / (machine.roof.read_gb_per_s * 1e9)
}

/// Random prompts and completions.
struct Batch {
    prompts: Vec<Vec<TokenId>>,
    completions: Vec<Vec<TokenId>>,
    group: usize,
}

impl Batch {
    fn random(
        sequences: usize,
        group: usize,
        prompt: usize,
        new: usize,
        vocab: usize,
        key: &mut u64,
    ) -> Self {
        let mut tokens = |len| {
            *key += 1;
            random_tokens(len, vocab, *key)
        };
        let prompts = (0..sequences.div_ceil(group)).map(|_| tokens(prompt)).collect();
        Self { prompts, completions: (0..sequences).map(|_| tokens(new)).collect(), group }
    }

    fn groups(&self) -> Vec<GroupTokens<'_>> {
        let completions = self.completions.chunks(self.group);
        self.prompts
            .iter()
            .zip(completions)
            .map(|(prompt, c)| GroupTokens { prompt, completions: c.iter().map(Vec::as_slice).collect() })
            .collect()
    }
}
