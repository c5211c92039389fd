//! The engine's two halves on a tiny model: a rollout of groups, and an update on what it drew.
//!
//! Throughput is in tokens: drawn ones for rollouts, rows for updates. At this size barriers, the sampler and the scheduler weigh as
//! much as the products; `rft-engine bench` measures real shapes against the roofline.

use std::hint::black_box;
use std::sync::Arc;
use std::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use rft_engine::config::{NewModelConfig, OptimizerConfig, Precision};
use rft_engine::data::arithmetic;
use rft_engine::learner::batch::GroupTokens;
use rft_engine::learner::step::{Learner, ScoreGrads};
use rft_engine::model::decoder::PagedDecoder;
use rft_engine::model::policy::{Policy, new_model_spec};
use rft_engine::rollout::{Request, RolloutEngine, RolloutKey, SamplingConfig};
use rft_engine::types::{Group, PolicyVersion, Prompt};
use rft_kernels::Pool;

const PROMPT: usize = 20;
const NEW: usize = 32;

fn pool() -> Pool {
    let threads = std::env::var("RFT_THREADS").ok().and_then(|threads| threads.parse().ok());
    Pool::new(threads.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, Into::into)))
}

/// The shape of the built-in recipe's model.
fn policy(pool: &Pool, precision: Precision) -> Policy {
    let tokenizer = arithmetic::tokenizer().expect("the built-in tokenizer");
    let shape = NewModelConfig { hidden: 128, layers: 4, heads: 4, kv_heads: 2, head_dim: 32, ffn: 384 };
    let spec = new_model_spec(&shape, tokenizer.vocab_size(), tokenizer.eos()[0], PROMPT + NEW);
    let mut policy = Policy::init(spec.expect("a known architecture"), 1);
    policy.prepare(pool, PROMPT + NEW, precision);
    policy
}

fn requests(prompts: usize, samples: usize) -> Vec<Request> {
    let prompt = |index: usize| {
        let tokens = (0..PROMPT).map(|i| ((i * 7 + index * 3 + i * index) % 16) as u32).collect();
        let (id, task, fields) = (index.to_string(), Arc::default(), Arc::default());
        Prompt { index, id, text: String::new(), tokens, task, fields }
    };
    (0..prompts).map(|i| Request { prompt: Arc::new(prompt(i)), samples }).collect()
}

/// Draws every request's completions; `step` makes a policy version of its own, so that no cache answers.
fn roll_out(
    pool: &Pool,
    policy: &Policy,
    engine: &mut RolloutEngine,
    requests: &[Request],
    step: u64,
) -> Vec<Group> {
    let tokenizer = arithmetic::tokenizer().expect("the built-in tokenizer");
    let sampling = SamplingConfig { max_new_tokens: NEW, ..SamplingConfig::default() };
    let key = RolloutKey { seed: 1, step, version: PolicyVersion(step) };
    let mut groups = Vec::new();
    let mut model = PagedDecoder::new(policy.weights());
    let mut keep = |_, group| {
        groups.push(group);
        Ok(())
    };
    engine.generate(&mut model, pool, &tokenizer, requests, &sampling, key, &mut keep).expect("a rollout");
    groups
}

fn rollout(c: &mut Criterion) {
    let pool = pool();
    let mut group = c.benchmark_group("rollout");
    for (precision, name) in [(Precision::F32, "f32"), (Precision::Bf16, "bf16")] {
        let policy = policy(&pool, precision);
        let mut engine = RolloutEngine::new(&PagedDecoder::new(policy.weights()), 64 * 5);
        let mut step = 0;
        for (prompts, samples) in [(1, 1), (1, 8), (8, 8), (64, 1)] {
            let requests = requests(prompts, samples);
            group.throughput(Throughput::Elements((prompts * samples * NEW) as u64));
            group.bench_function(BenchmarkId::new(name, format!("{prompts}x{samples}")), |b| {
                b.iter(|| {
                    step += 1;
                    roll_out(&pool, &policy, &mut engine, black_box(&requests), step)
                });
            });
        }
    }
}

fn learner(c: &mut Criterion) {
    let pool = pool();
    let mut group = c.benchmark_group("learner");
    for (precision, name) in [(Precision::F32, "f32"), (Precision::Bf16, "bf16")] {
        let mut policy = policy(&pool, precision);
        let mut engine = RolloutEngine::new(&PagedDecoder::new(policy.weights()), 64 * 5);
        let groups = roll_out(&pool, &policy, &mut engine, &requests(8, 8), 1);
        let tokens: Vec<GroupTokens> = groups.iter().map(GroupTokens::from).collect();
        let mut learner = Learner::new(&policy, 2048);
        let (optimizer, warp) = (OptimizerConfig::default(), SamplingConfig::default().warp());
        group.throughput(Throughput::Elements((8 * (PROMPT + 8 * (NEW - 1))) as u64));
        group.bench_function(BenchmarkId::new(name, "8x8"), |b| {
            b.iter(|| {
                let objective = |_: &[_], scores: &rft_engine::model::backprop::Scores| {
                    let n = scores.logprobs.len();
                    let d = (0..n).map(|i| if i % 2 == 0 { 1.0 } else { -1.0 } / n as f32).collect();
                    Ok(ScoreGrads { logprobs: d, entropies: vec![0.0; n] })
                };
                learner
                    .update(&pool, &mut policy, black_box(&tokens), &warp, &optimizer, 1e-6, objective)
                    .expect("an update")
            });
        });
    }
}

criterion_group! {
    name = engine;
    config = Criterion::default()
        .sample_size(20)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1));
    targets = rollout, learner
}
criterion_main!(engine);
