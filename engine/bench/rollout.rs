//! Rollout throughput: prefill and decode, for prompts of their own or groups that share one.

use clap::Args;
use rft_kernels::BLOCK;
use serde_json::{Map, json};

use super::{
    CommonArgs, Machine, Measurement, Report, linear_parameters, prompt, random_tokens, reset_peak, round,
    spread,
};
use crate::config::Precision;
use crate::error::Result;
use crate::model::decoder::PagedDecoder;
use crate::model::policy::Policy;
use crate::report::metrics::rss_peak_bytes;
use crate::rollout::{Request, RolloutEngine, RolloutKey, RolloutStats, SamplingConfig};
use crate::types::{Group, PolicyVersion};

/// Flags of `bench rollout`.
#[derive(Debug, Clone, Args)]
pub struct RolloutArgs {
    #[command(flatten)]
    #[allow(missing_docs)]
    pub common: CommonArgs,
    /// Tokens of a prompt.
    #[arg(long, default_value_t = 64)]
    pub prompt: usize,
    /// Tokens drawn for each completion; the end of text is ignored.
    #[arg(long, default_value_t = 128)]
    pub new: usize,
    /// Completions in flight, one case each.
    #[arg(long, value_delimiter = ',', default_values_t = [8, 32, 64])]
    pub parallel: Vec<usize>,
    /// Completions that share a prompt, one case each (1,2,4,8,16,32,64 draws the curve); 0: all of them, 1: none.
    #[arg(long, value_delimiter = ',', default_values_t = [0])]
    pub group: Vec<usize>,
}

pub(super) fn run(args: &RolloutArgs, machine: &mut Machine, report: Report) -> Result<()> {
    let policy = machine.policy(0, args.prompt + args.new)?;
    for &group in &args.group {
        for &parallel in &args.parallel {
            let group = if group == 0 { parallel } else { group.min(parallel) };
            report(case(args, machine, &policy, parallel, group)?);
        }
    }
    Ok(())
}

fn case(
    args: &RolloutArgs,
    machine: &Machine,
    policy: &Policy,
    parallel: usize,
    group: usize,
) -> Result<Measurement> {
    let prompts = parallel.div_ceil(group);
    reset_peak();
    let mut rollouts = Rollouts::new(machine, policy, args.prompt, args.new, prompts, group)?;
    let (mut decode, mut all, mut prefill) = (Vec::new(), Vec::new(), Vec::new());
    let mut kv_blocks = 0;
    for repeat in 0..machine.repeats + 1 {
        let first = rollouts.run(policy, 1)?.0.seconds;
        let stats = rollouts.run(policy, args.new)?.0;
        let whole = stats.seconds;
        kv_blocks = stats.peak_blocks;
        if repeat > 0 {
            prefill.push((prompts * args.prompt) as f64 / first);
            decode.push((prompts * group * (args.new - 1)) as f64 / (whole - first));
            all.push(whole);
        }
    }
    let (value, range) = spread(decode);
    let passes = (1..args.new).map(|n| pass_bound(machine, policy, prompts, group, args.prompt, n));
    let (seconds, reading) = passes.fold((0.0, 0.0), |sum, pass| (sum.0 + pass.0, sum.1 + pass.1));
    let bound = (prompts * group * (args.new - 1)) as f64 / seconds;
    let mut more = Map::new();
    more.insert("prefill_tokens_per_s".into(), round(spread(prefill).0).into());
    let all = spread(all).0;
    more.insert("seconds".into(), round(all).into());
    more.insert("with_prefill_tokens_per_s".into(), round((prompts * group * args.new) as f64 / all).into());
    more.insert("bound_tokens_per_s".into(), round(bound).into());
    more.insert("bound_by_memory".into(), round(reading / seconds).into());
    more.insert("kv_blocks".into(), kv_blocks.into());
    more.insert("rss_peak_mb".into(), json!(rss_peak_bytes() >> 20));
    Ok(Measurement {
        work: format!(
            "decode {}{} {prompts}x{group}, prompt {}, new {}",
            machine.precision_name(),
            if machine.kv_precision == Precision::Bf16 { ", bf16 cache" } else { "" },
            args.prompt,
            args.new
        ),
        value,
        unit: "tokens/s",
        range,
        roofline_share: Some(value / bound),
        more,
    })
}

/// The least seconds of the decoding pass that follows `n` drawn tokens a sample, and those in which memory is the bound.
///
/// The products wait for the slower of arithmetic and reading (weights once, keys and values once, a shared prompt's once a group);
/// attention's arithmetic is f32 and comes on top. A share of 0.8 of this is the target.
fn pass_bound(
    machine: &Machine,
    policy: &Policy,
    prompts: usize,
    group: usize,
    prompt: usize,
    n: usize,
) -> (f64, f64) {
    let spec = &policy.spec;
    let rows = (prompts * group) as f64;
    let (layers, head) = linear_parameters(spec);
    let element = if machine.kv_precision == Precision::Bf16 { 2.0 } else { 4.0 };
    let cached = 2.0 * element * (spec.layers * spec.kv_heads * spec.head_dim) as f64;
    let seen = (prompt + n) as f64;
    let products = 2.0 * rows * (layers + head);
    let attention = 4.0 * rows * seen * (spec.layers * spec.heads * spec.head_dim) as f64;
    let read = cached * (prompts * prompt) as f64 + cached * rows * n as f64;
    let read = machine.weight_bytes() * (layers + head) + read;
    let (both, computing) = (machine.bound(products, read), machine.bound(products, 0.0));
    (both + attention / (machine.roof.f32_gflops * 1e9), if both > computing { both } else { 0.0 })
}

/// A rollout engine and prompts that are new each time.
pub(super) struct Rollouts<'a> {
    machine: &'a Machine,
    pub(super) engine: RolloutEngine,
    tokenizer: crate::data::tokenizer::Tokenizer,
    prompt: usize,
    prompts: usize,
    group: usize,
    runs: u64,
}

impl<'a> Rollouts<'a> {
    pub(super) fn new(
        machine: &'a Machine,
        policy: &Policy,
        prompt: usize,
        new: usize,
        prompts: usize,
        group: usize,
    ) -> Result<Self> {
        let blocks = prompts * (prompt.div_ceil(BLOCK) + group * (new.div_ceil(BLOCK) + 1));
        let engine = RolloutEngine::new(&PagedDecoder::new(policy.weights()), blocks);
        Ok(Self { machine, engine, tokenizer: machine.tokenizer()?, prompt, prompts, group, runs: 0 })
    }

    /// Draws `new` tokens for each completion.
    pub(super) fn run(&mut self, policy: &Policy, new: usize) -> Result<(RolloutStats, Vec<Group>)> {
        self.runs += 1;
        let vocab = policy.spec.vocab;
        let requests: Vec<Request> = (0..self.prompts)
            .map(|i| {
                let tokens = random_tokens(self.prompt, vocab, self.runs << 32 | i as u64);
                Request { prompt: prompt(i, tokens), samples: self.group }
            })
            .collect();
        let sampling = SamplingConfig { max_new_tokens: new, ..SamplingConfig::default() };
        let key = RolloutKey { seed: 1, step: self.runs, version: PolicyVersion(self.runs) };
        let mut model = PagedDecoder::new(policy.weights());
        let mut groups = Vec::new();
        let stats = self.engine.generate(
            &mut model,
            &self.machine.pool,
            &self.tokenizer,
            &requests,
            &sampling,
            key,
            &mut |_, group| {
                groups.push(group);
                Ok(())
            },
        )?;
        Ok((stats, groups))
    }
}
