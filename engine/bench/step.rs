//! A whole GRPO step: rollouts, a trivial reward, advantages, the clipped loss and one update.

use std::time::Instant;

use clap::Args;
use rft_kernels::Warp;
use serde_json::{Map, json};

use super::rollout::Rollouts;
use super::{CommonArgs, Machine, Measurement, Report, round, spread, trained};
use crate::advantage::{AdvantageConfig, advantages};
use crate::config::OptimizerConfig;
use crate::error::Result;
use crate::learner::batch::GroupTokens;
use crate::learner::step::{Learner, ScoreGrads};
use crate::loss::{BatchTotals, LossInputs, Objective, policy_loss};
use crate::report::metrics::rss_peak_bytes;
use crate::types::Group;

/// Flags of `bench step`.
#[derive(Debug, Clone, Args)]
pub struct StepArgs {
    #[command(flatten)]
    #[allow(missing_docs)]
    pub common: CommonArgs,
    /// Prompts of a step.
    #[arg(long, default_value_t = 8)]
    pub prompts: usize,
    /// Completions of a prompt.
    #[arg(long, default_value_t = 8)]
    pub group: usize,
    /// Tokens of a prompt.
    #[arg(long, default_value_t = 50)]
    pub prompt: usize,
    /// Tokens of a completion.
    #[arg(long, default_value_t = 64)]
    pub new: usize,
    /// Rank of LoRA adapters on all projections; 0 trains all weights.
    #[arg(long, default_value_t = 0)]
    pub lora: usize,
    /// Rows of a micro-batch, as a run plans them.
    #[arg(long, default_value_t = 1024)]
    pub max_rows: usize,
}

pub(super) fn run(args: &StepArgs, machine: &mut Machine, report: Report) -> Result<()> {
    let mut policy = machine.policy(args.lora, args.prompt + args.new)?;
    let mut learner = Learner::new(&policy, args.max_rows);
    let mut rollouts = Rollouts::new(machine, &policy, args.prompt, args.new, args.prompts, args.group)?;
    let (mut seconds, mut rolling, mut learning) = (Vec::new(), Vec::new(), Vec::new());
    let mut ratio_max_dev = 0.0f64;
    for repeat in 0..machine.repeats + 1 {
        let start = Instant::now();
        let (stats, groups) = rollouts.run(&policy, args.new)?;
        rollouts.engine.rest();
        let tokens: Vec<GroupTokens> = groups.iter().map(GroupTokens::from).collect();
        let rewards: Vec<Option<f64>> =
            completions(&groups).map(|c| Some(f64::from(c.tokens[0] % 2))).collect();
        let advantages = advantages(&rewards, args.group, &AdvantageConfig::default()).values;
        let old: Vec<f32> = completions(&groups).flat_map(|c| c.logprobs.clone()).collect();
        let total = old.len();
        let totals = BatchTotals {
            tokens: total,
            entropy_tokens: total,
            completions: advantages.len(),
            max_new_tokens: args.new,
        };
        let mut at = 0;
        let objective = |_: &[_], scores: &crate::model::backprop::Scores| {
            // Every completion is args.new tokens long, and micro-batches are consecutive.
            let len = scores.logprobs.len();
            let offsets: Vec<usize> = (0..=len / args.new).map(|i| i * args.new).collect();
            let by_token: Vec<f32> = (at..at + len).map(|i| advantages[i / args.new]).collect();
            let inputs = LossInputs {
                offsets: &offsets,
                new: &scores.logprobs,
                old: &old[at..at + len],
                entropy: &scores.entropies,
                advantages: &by_token,
                mask: &vec![true; len],
                totals,
                ..LossInputs::default()
            };
            for (new, old) in scores.logprobs.iter().zip(&old[at..]) {
                ratio_max_dev = ratio_max_dev.max((f64::from(new - old).exp() - 1.0).abs());
            }
            at += len;
            let out = policy_loss(&inputs, &Objective::default());
            Ok(ScoreGrads { logprobs: out.d_new, entropies: out.d_entropy })
        };
        let warp = Warp { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0 };
        learner.update(
            &machine.pool,
            &mut policy,
            &tokens,
            &warp,
            &OptimizerConfig::default(),
            1e-6,
            objective,
        )?;
        learner.rest(false);
        if repeat > 0 {
            seconds.push(start.elapsed().as_secs_f64());
            rolling.push(stats.seconds);
            learning.push(start.elapsed().as_secs_f64() - stats.seconds);
        }
    }
    let (value, range) = spread(seconds);
    let mut more = Map::new();
    more.insert("rollout_s".into(), round(spread(rolling).0).into());
    more.insert("learner_s".into(), round(spread(learning).0).into());
    more.insert("ratio_max_dev".into(), ratio_max_dev.into());
    more.insert("rss_peak_mb".into(), json!(rss_peak_bytes() >> 20));
    let what = trained(args.lora);
    report(Measurement {
        work: format!(
            "GRPO step {} {what}, {}x{}, prompt {}, new {}",
            machine.precision_name(),
            args.prompts,
            args.group,
            args.prompt,
            args.new
        ),
        value,
        unit: "s",
        range,
        roofline_share: None,
        more,
    });
    Ok(())
}

fn completions(groups: &[Group]) -> impl Iterator<Item = &crate::types::Completion> {
    groups.iter().flat_map(|g| &g.completions)
}
