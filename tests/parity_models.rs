//! Decoders against transformers: logits, logprobs, entropies, greedy continuations and gradients of every golden model.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::{Device, Tensor, safetensors};
use rft_engine::config::Precision;
use rft_engine::learner::batch::{GroupTokens, micro_batches, pack};
use rft_engine::model::backprop::Trainer;
use rft_engine::model::decoder::PagedDecoder;
use rft_engine::model::policy::{Grads, Policy};
use rft_engine::model::source::ModelSource;
use rft_engine::rollout::{PagedBatch, PagedModel, Request, RolloutEngine, RolloutKey, SamplingConfig};
use rft_engine::types::{PolicyVersion, Prompt};
use rft_kernels::{BLOCK, PagedRun, Pool, Warp};
use serde_json::Value;

/// Tolerances of the fixtures' README: two correct f32 implementations differ by about 1e-6 relative.
const FORWARD: (f64, f64) = (1e-4, 1e-5);
const GRADIENT: (f64, f64) = (1e-3, 1e-4);

type Golden = std::collections::HashMap<String, Tensor>;

fn root() -> PathBuf {
    let default = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    std::env::var_os("RFT_FIXTURES").map_or(default, PathBuf::from)
}

fn floats(golden: &Golden, name: &str) -> Vec<f32> {
    let tensor = golden.get(name).unwrap_or_else(|| panic!("the golden file has no {name}"));
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

fn ids(golden: &Golden, name: &str) -> Vec<u32> {
    let tensor = golden.get(name).unwrap_or_else(|| panic!("the golden file has no {name}"));
    tensor.flatten_all().unwrap().to_vec1::<i64>().unwrap().into_iter().map(|id| id as u32).collect()
}

/// Largest excess of |got − want| over atol + rtol |want|; at most 1 is agreement.
fn excess(got: &[f32], want: &[f32], (rtol, atol): (f64, f64)) -> f64 {
    assert_eq!(got.len(), want.len());
    let one =
        |(g, w): (&f32, &f32)| (f64::from(*g) - f64::from(*w)).abs() / (atol + rtol * f64::from(*w).abs());
    got.iter().zip(want).map(one).fold(0.0, |a, b| if b.is_nan() { f64::INFINITY } else { a.max(b) })
}

fn warp(temperature: f32) -> Warp {
    Warp { temperature, top_k: 0, top_p: 1.0, min_p: 0.0 }
}

fn scores(
    trainer: &mut Trainer,
    pool: &Pool,
    policy: &Policy,
    tokens: &[u32],
    t: f32,
) -> (Vec<f32>, Vec<f32>) {
    let groups = [GroupTokens { prompt: &tokens[..1], completions: vec![&tokens[1..]] }];
    let batch = pack(&groups, &micro_batches(&groups, usize::MAX)[0]);
    let scores = trainer.forward(pool, &policy.weights(), &batch, &warp(t));
    (scores.logprobs, scores.entropies)
}

/// Gradient of the golden loss: the sum over sequences of weights times logprobs.
fn gradient(pool: &Pool, policy: &Policy, golden: &Golden, sequences: usize) -> (f64, Grads) {
    let (mut trainer, mut grads, mut loss) = (Trainer::default(), policy.new_grads(), 0.0);
    for i in 0..sequences {
        let tokens = ids(golden, &format!("seq{i}.input_ids"));
        let weights = floats(golden, &format!("seq{i}.loss_weights"));
        let groups = [GroupTokens { prompt: &tokens[..1], completions: vec![&tokens[1..]] }];
        let batch = pack(&groups, &micro_batches(&groups, usize::MAX)[0]);
        let found = trainer.forward(pool, &policy.weights(), &batch, &warp(1.0));
        loss += found.logprobs.iter().zip(&weights).map(|(l, w)| f64::from(*l) * f64::from(*w)).sum::<f64>();
        let zeros = vec![0.0; weights.len()];
        trainer.backward(pool, &policy.weights(), &batch, &warp(1.0), &weights, &zeros, &mut grads);
    }
    trainer.finish(pool, &policy.weights(), &mut grads);
    (loss, grads)
}

/// Logits `[n, vocab]` of every position, as the sampler sees them.
fn logits(pool: &Pool, policy: &Policy, tokens: &[u32]) -> Vec<f32> {
    let n = tokens.len();
    let mut model = PagedDecoder::new(policy.weights());
    let blocks = n.div_ceil(BLOCK);
    let mut cache = model.new_cache(blocks);
    let table: Vec<u32> = (0..blocks as u32).collect();
    let positions: Vec<u32> = (0..n as u32).collect();
    let runs = [PagedRun { row: 0, rows: n, first_pos: 0, table: &table }];
    let select: Vec<usize> = (0..n).collect();
    let batch = PagedBatch { tokens, positions: &positions, slots: &positions, runs: &runs, select: &select };
    model.forward(pool, &mut cache, &batch);
    let mut logits = Vec::new();
    model.logits(pool, 0..n, &mut logits);
    logits
}

fn greedy(
    pool: &Pool,
    policy: &Policy,
    source: &ModelSource,
    tokens: &[u32],
    n: usize,
) -> (Vec<u32>, Vec<f32>) {
    let mut model = PagedDecoder::new(policy.weights());
    let mut engine = RolloutEngine::new(&model, 64).with_prefill_rows(13);
    let prompt = Prompt {
        index: 0,
        id: "p".into(),
        text: String::new(),
        tokens: tokens.to_vec(),
        task: Arc::default(),
        fields: Arc::default(),
    };
    let sampling = SamplingConfig {
        max_new_tokens: n,
        temperature: 0.0,
        top_k: 0,
        top_p: 1.0,
        min_p: 0.0,
        stop: Vec::new(),
        stop_tokens: Vec::new(),
    };
    let key = RolloutKey { seed: 0, step: 0, version: PolicyVersion(0) };
    let requests = [Request { prompt: Arc::new(prompt), samples: 1 }];
    let mut found = None;
    let tokenizer = source.tokenizer().unwrap();
    engine
        .generate(&mut model, pool, &tokenizer, &requests, &sampling, key, &mut |_, group| {
            found = Some((group.completions[0].tokens.clone(), group.completions[0].logprobs.clone()));
            Ok(())
        })
        .unwrap();
    found.unwrap()
}

/// Gradients under the names of transformers' parameters, which hold a layer's experts in two stacks.
fn named_gradients(policy: &Policy, grads: &Grads) -> BTreeMap<String, Vec<f32>> {
    let mut named: BTreeMap<String, Vec<f32>> = BTreeMap::new();
    for id in 0..policy.base.slots().len() {
        let values = &grads.base[policy.base.grad_range(id).unwrap()];
        for (tensor, _, got) in policy.base.tensors_of(id, values) {
            let mut name = tensor.replace(".block_sparse_moe.", ".mlp.");
            if let Some((block, expert)) = name.clone().split_once(".experts.") {
                let down = expert.contains(".down_proj.") || expert.contains(".w2.");
                name = format!("{block}.experts.{}", if down { "down_proj" } else { "gate_up_proj" });
            }
            // experts follow each other in the arena, gate before up, as in the stacks
            named.entry(name).or_default().extend(got);
        }
    }
    named
}

#[test]
fn parity_models_agree_with_transformers() {
    let pool = Pool::new(2);
    let folder = root().join("models");
    let mut names: Vec<PathBuf> = std::fs::read_dir(&folder).unwrap().map(|e| e.unwrap().path()).collect();
    names.sort();
    let (mut models, mut checks) = (0, 0);
    for dir in names {
        let manifest: Value =
            serde_json::from_slice(&std::fs::read(dir.join("golden.json")).unwrap()).unwrap();
        if manifest.get("cases").is_some() {
            println!("{}: vision-language models are not read yet", dir.display());
            continue;
        }
        let golden = safetensors::load(dir.join("golden.safetensors"), &Device::Cpu).unwrap();
        let source = ModelSource::open(&dir).unwrap();
        let mut policy = Policy::load(&source, None, 0).unwrap();
        policy.prepare(&pool, 256, Precision::F32);
        let name = dir.file_name().unwrap().to_string_lossy().into_owned();
        let mut worst = (0.0f64, String::new());
        let mut check = |what: String, value: f64| {
            checks += 1;
            if value > worst.0 {
                worst = (value, what);
            }
        };
        let sequences = (0..).take_while(|i| golden.contains_key(&format!("seq{i}.input_ids"))).count();
        let mut trainer = Trainer::default();
        for i in 0..sequences {
            let at = |what: &str| format!("seq{i}.{what}");
            let tokens = ids(&golden, &at("input_ids"));
            let (found, expected) = (logits(&pool, &policy, &tokens), floats(&golden, &at("logits")));
            // of the longest sequence the last position only
            check(at("logits"), excess(&found[found.len() - expected.len()..], &expected, FORWARD));
            let (logprobs, entropies) = scores(&mut trainer, &pool, &policy, &tokens, 1.0);
            check(at("logprobs"), excess(&logprobs, &floats(&golden, &at("logprobs")), FORWARD));
            let expected = floats(&golden, &at("entropy"));
            check(at("entropy"), excess(&entropies, &expected[..entropies.len()], FORWARD));
            let (cool, _) = scores(&mut trainer, &pool, &policy, &tokens, 0.7);
            check(at("logprobs_t0.7"), excess(&cool, &floats(&golden, &at("logprobs_t0.7")), FORWARD));
            if golden.contains_key(&at("greedy_ids")) {
                let expected = ids(&golden, &at("greedy_ids"));
                let (found, found_logprobs) = greedy(&pool, &policy, &source, &tokens, expected.len());
                assert_eq!(found, expected, "{name} {}", at("greedy_ids"));
                check(
                    at("greedy_logprobs"),
                    excess(&found_logprobs, &floats(&golden, &at("greedy_logprobs")), FORWARD),
                );
            }
        }
        let (loss, grads) = gradient(&pool, &policy, &golden, sequences);
        let expected = f64::from(floats(&golden, "loss")[0]);
        assert!(
            (loss - expected).abs() <= 1e-3 + 1e-5 * expected.abs(),
            "{name}: loss {loss}, expected {expected}"
        );
        let stats = manifest["grad_stats"].as_object().unwrap();
        let gradients = named_gradients(&policy, &grads);
        for (tensor, got) in &gradients {
            let norm = got.iter().map(|g| f64::from(*g).powi(2)).sum::<f64>().sqrt();
            let want = stats.get(tensor).unwrap_or_else(|| panic!("{name}: no statistics of {tensor}"))["l2"]
                .as_f64()
                .unwrap();
            // a gradient that is 0 but for rounding (a router that always gives all weight to one expert)
            let rounding = want < 1e-5 && norm < 1e-5;
            let off = if rounding { 0.0 } else { (norm / want - 1.0).abs() };
            check(format!("l2 of {tensor}"), off / 1e-4);
            if golden.contains_key(&format!("grad.{tensor}")) {
                let want = floats(&golden, &format!("grad.{tensor}"));
                check(format!("grad.{tensor}"), excess(got, &want, GRADIENT));
            }
        }
        assert_eq!(gradients.len(), stats.len(), "{name}: every parameter has a gradient");
        println!("{name}: worst {:.3} of its tolerance ({})", worst.0, worst.1);
        assert!(worst.0 <= 1.0, "{name}: {} is {:.2} times its tolerance off", worst.1, worst.0);
        models += 1;
    }
    println!("{models} models, {checks} comparisons agree");
    assert!(models > 0, "no model under {}", folder.display());
}

#[test]
fn parity_models_in_bf16_stay_within_the_measured_distance() {
    let pool = Pool::new(2);
    let (mut sequences, mut folders) = (0, 0);
    for dir in std::fs::read_dir(root().join("models")).unwrap().map(|e| e.unwrap().path()) {
        let manifest: Value =
            serde_json::from_slice(&std::fs::read(dir.join("golden.json")).unwrap()).unwrap();
        let golden = safetensors::load(dir.join("golden.safetensors"), &Device::Cpu).unwrap();
        if manifest.get("cases").is_some() || !golden.contains_key("seq0.logits_bf16") {
            continue;
        }
        let mut policy = Policy::load(&ModelSource::open(&dir).unwrap(), None, 0).unwrap();
        policy.prepare(&pool, 256, Precision::Bf16);
        for i in (0..).take_while(|i| golden.contains_key(&format!("seq{i}.logits_bf16"))) {
            let at = |what: &str| format!("seq{i}.{what}");
            let found = logits(&pool, &policy, &ids(&golden, &at("input_ids")));
            let expected = floats(&golden, &at("logits"));
            let off: Vec<f64> = found.iter().zip(&expected).map(|(f, e)| f64::from((f - e).abs())).collect();
            let (mean, max) =
                (off.iter().sum::<f64>() / off.len() as f64, off.iter().copied().fold(0.0, f64::max));
            let stated = |what: &str| manifest["measured_noise"][at(what)].as_f64().unwrap();
            let (stated_mean, stated_max) =
                (stated("bf16_vs_f32_logits_mean_abs"), stated("bf16_vs_f32_logits_max_abs"));
            println!(
                "{} seq{i}: mean {mean:.5} of {stated_mean:.5}, max {max:.5} of {stated_max:.5}",
                dir.display()
            );
            assert!(mean <= stated_mean && max <= stated_max, "{} seq{i}", dir.display());
            assert!(mean > 0.0, "this is not bf16");
            sequences += 1;
        }
        folders += 1;
    }
    println!("{folders} models, {sequences} sequences in bf16 lie within the stated distance");
    assert!(folders > 0 || std::env::var_os("RFT_FIXTURES").is_some());
}
