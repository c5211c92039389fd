//! Whole training runs of TRL over recorded rollouts, replayed step by step through the learner.

#[path = "support/golden.rs"]
mod golden;

use golden::{Tally, Tensors, json, number, numbers, optional, or, root};
use rft_engine::advantage::{AdvantageConfig, Scale, groups_of, matrix_advantages};
use rft_engine::config::{OptimizerConfig, Precision};
use rft_engine::learner::batch::GroupTokens;
use rft_engine::learner::optimizer::OptimizerKind;
use rft_engine::learner::schedule::{ScheduleKind, learning_rate};
use rft_engine::learner::step::{Learner, ScoreGrads};
use rft_engine::loss::correction::{OutOfBounds, SamplerCorrection, WeightLevel};
use rft_engine::loss::kl::{Gradient, KlConfig};
use rft_engine::loss::surrogate::{Cispo, Surrogate};
use rft_engine::loss::{Aggregation, BatchTotals, LossInputs, LossSums, Objective, RatioLevel, policy_loss};
use rft_engine::model::peft::PeftAdapter;
use rft_engine::model::policy::Policy;
use rft_engine::model::source::ModelSource;
use rft_engine::types::TokenId;
use rft_kernels::{Pool, Warp};
use serde_json::Value;

const RTOL: f64 = 1e-3;
const ATOL: f64 = 2e-5;

/// Recorded runs, by file name without extension.
fn names() -> Vec<String> {
    let entries = std::fs::read_dir(root().join("learner")).expect("recorded runs");
    let files = entries.map(|e| e.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<String> = files.filter_map(|f| f.strip_suffix(".json").map(String::from)).collect();
    names.sort();
    names
}

fn ids(v: &Value) -> Vec<Vec<TokenId>> {
    v.as_array().unwrap().iter().map(|r| numbers(r).into_iter().map(|x| x as TokenId).collect()).collect()
}

/// The policy that a run starts from.
fn load(run: &Value, pool: &Pool) -> Policy {
    let source = ModelSource::open(root().join(run["model"].as_str().unwrap())).unwrap();
    let peft = run["adapter"].as_str().map(|path| PeftAdapter::open(root().join(path)).unwrap());
    let mut policy = Policy::load(&source, peft.as_ref().map(PeftAdapter::config), 0).unwrap();
    if let Some(peft) = &peft {
        peft.load_into(&mut policy, 0).unwrap();
    }
    policy.prepare(pool, 256, Precision::F32);
    policy
}

fn objective(c: &Value) -> Objective {
    let (surrogate, aggregation) = match c["loss_type"].as_str().unwrap() {
        "dapo" => (Surrogate::Clip, Aggregation::Token),
        "grpo" => (Surrogate::Clip, Aggregation::Sequence),
        "dr_grpo" => (Surrogate::Clip, Aggregation::Constant),
        "luspo" => (Surrogate::Clip, Aggregation::SequenceSum),
        "cispo" => {
            (Surrogate::Cispo(Cispo { min: 0.0, max: number(&c["epsilon_high"]) }), Aggregation::Token)
        }
        other => panic!("no replay of loss_type {other}"),
    };
    let is_sequence = c["importance_sampling_level"] == "sequence";
    let low = number(&c["epsilon"]);
    let kl =
        KlConfig { coefficient: or(&c["beta"], 0.0), gradient: Gradient::Weighted, ..Default::default() };
    Objective {
        surrogate,
        aggregation,
        ratio: if is_sequence { RatioLevel::Sequence } else { RatioLevel::Token },
        clip_low: low,
        clip_high: or(&c["epsilon_high"], low),
        delta: optional(&c["delta"]),
        kl,
        sampler_correction: correction(c),
        ..Objective::default()
    }
}

fn correction(c: &Value) -> Option<SamplerCorrection> {
    let mode = c["vllm_importance_sampling_mode"].as_str()?;
    Some(SamplerCorrection {
        level: if mode.starts_with("token") { WeightLevel::Token } else { WeightLevel::Sequence },
        out_of_bounds: if mode.ends_with("truncate") { OutOfBounds::Truncate } else { OutOfBounds::Mask },
        min: optional(&c["vllm_importance_sampling_clip_min"]),
        max: optional(&c["vllm_importance_sampling_clip_max"]),
    })
}

fn optimizer(c: &Value) -> OptimizerConfig {
    let is_sgd = c["optim"].as_str().unwrap().to_lowercase().contains("sgd");
    OptimizerConfig {
        state: Default::default(),
        kind: if is_sgd { OptimizerKind::Sgd } else { OptimizerKind::AdamW },
        lr: number(&c["learning_rate"]),
        beta1: number(&c["adam_beta1"]),
        beta2: number(&c["adam_beta2"]),
        eps: number(&c["adam_epsilon"]),
        weight_decay: number(&c["weight_decay"]),
        max_grad_norm: number(&c["max_grad_norm"]),
        warmup_updates: or(&c["warmup_steps"], 0.0) as u64,
        schedule: match c["lr_scheduler_type"].as_str().unwrap() {
            "constant" | "constant_with_warmup" => ScheduleKind::Constant,
            "linear" => ScheduleKind::Linear,
            "cosine" => ScheduleKind::Cosine,
            other => panic!("no replay of schedule {other}"),
        },
    }
}

/// One rollout, ready to be trained on.
struct Generation<'a> {
    groups: Vec<GroupTokens<'a>>,
    offsets: Vec<usize>,
    mask: Vec<bool>,
    advantages: Vec<f32>,
    old: Vec<f32>,
    reference: Option<Vec<f32>>,
    weights: Option<Vec<f32>>,
}

/// Numbers of a padded `[rows, columns]` tensor at the tokens of each row, rows one after another.
fn unpadded(tensors: &Tensors, name: &str, offsets: &[usize]) -> Option<Vec<f32>> {
    let tensor = tensors.find(name)?;
    let rows = tensor.data.chunks(tensor.columns()).zip(offsets.windows(2));
    Some(rows.flat_map(|(row, o)| row[..o[1] - o[0]].to_vec()).collect())
}

/// Compares every stored tensor of a prefix with those of the policy.
fn check_tensors(t: &mut Tally, tensors: &Tensors, prefix: &str, policy: &Policy, values: &[f32], atol: f64) {
    let arena = policy.trainable();
    for id in 0..arena.slots().len() {
        for (name, _, got) in arena.tensors_of(id, &values[arena.grad_range(id).unwrap()]) {
            let peft = name.replace("lora_A.weight", "lora_A.default.weight");
            let name = peft.replace("lora_B.weight", "lora_B.default.weight");
            if let Some(want) = tensors.find(&format!("{prefix}.{name}")) {
                t.values(&name, &got, &want.data, RTOL, atol);
            }
        }
    }
}

fn replay(name: &str, t: &mut Tally) {
    let (run, tensors) =
        (json(&format!("learner/{name}.json")), Tensors::open(&format!("learner/{name}.safetensors")));
    let (c, pool) = (&run["config"], Pool::new(2));
    let (objective, optimizer) = (objective(c), optimizer(c));
    let group = number(&c["num_generations"]) as usize;
    let scale = match c["scale_rewards"].as_str().unwrap() {
        "group" => Scale::Group,
        "batch" => Scale::Batch,
        _ => Scale::None,
    };
    let warp = Warp { temperature: number(&c["temperature"]) as f32, top_k: 0, top_p: 1.0, min_p: 0.0 };
    let mut policy = load(&run, &pool);
    let initial = policy.clone();
    // a micro-batch of one group, as recorded
    let mut learner = Learner::new(&policy, 64);
    let (updates, iterations) = (number(&c["max_steps"]) as u64, number(&c["num_iterations"]) as u64);
    let logs = run["logs_per_optimizer_step"].as_array().unwrap();
    let start = policy.trainable().trainable_values().into_owned();
    let mut step = 0;
    for (k, recorded) in run["rollouts"].as_array().unwrap().iter().enumerate() {
        let (prompts, completions) = (ids(&recorded["prompt_ids"]), ids(&recorded["completion_ids"]));
        let rewards: Vec<Vec<Option<f64>>> = recorded["rewards"]
            .as_array()
            .unwrap()
            .iter()
            .map(|r| r.as_array().unwrap().iter().map(optional).collect())
            .collect();
        let is_cut = |tokens: &[TokenId]| !matches!(tokens.last(), Some(509 | 511));
        let masks_cut = c["mask_truncated_completions"].as_bool() == Some(true);
        let mut offsets = vec![0];
        let mut mask = Vec::new();
        for tokens in &completions {
            mask.extend(vec![!(masks_cut && is_cut(tokens)); tokens.len()]);
            offsets.push(mask.len());
        }
        let config = AdvantageConfig { scale, ..AdvantageConfig::default() };
        let advantages = matrix_advantages(
            &rewards,
            &numbers(&c["reward_weights"]),
            &groups_of(rewards.len(), group),
            &config,
        );
        t.case(format!("{name} rollout {k}"));
        t.values(
            "advantages",
            &advantages.values,
            &tensors.get(&format!("gen{k}.advantages")).data,
            1e-4,
            1e-5,
        );
        let groups: Vec<GroupTokens> = prompts
            .chunks(group)
            .zip(completions.chunks(group))
            .map(|(p, c)| {
                assert!(p.iter().all(|x| *x == p[0]), "a group has one prompt");
                GroupTokens { prompt: &p[0], completions: c.iter().map(Vec::as_slice).collect() }
            })
            .collect();
        let old = learner.score(&pool, &policy.weights(), &groups, &warp).logprobs;
        if let Some(want) = unpadded(&tensors, &format!("gen{k}.old_per_token_logps"), &offsets) {
            // where a truncated completion is masked, its row is stored as padding
            let kept = |x: &[f32]| -> Vec<f32> {
                x.iter().zip(&mask).filter(|(_, m)| **m).map(|(x, _)| *x).collect()
            };
            t.values("old logprobs", &kept(&old), &kept(&want), RTOL, ATOL);
        }
        let reference = (objective.kl.coefficient != 0.0)
            .then(|| learner.score(&pool, &initial.weights(), &groups, &warp).logprobs);
        if let (Some(got), Some(want)) =
            (&reference, unpadded(&tensors, &format!("gen{k}.ref_per_token_logps"), &offsets))
        {
            t.values("reference logprobs", got, &want, RTOL, ATOL);
        }
        let weights = objective.sampler_correction.filter(|_| run["use_sampling_logps"] == true).map(|c| {
            let rows = recorded["sampling_logps"].as_array().unwrap();
            let sampler: Vec<f32> = rows.iter().flat_map(numbers).map(|x| x as f32).collect();
            c.weights(&offsets, &old, &sampler, &mask)
        });
        let generation =
            Generation { groups, offsets, mask, advantages: advantages.values, old, reference, weights };
        for _ in 0..iterations {
            if step == updates {
                break;
            }
            let log = &logs[step as usize];
            t.case(format!("{name} step {}", step + 1));
            let lr = learning_rate(optimizer.schedule, optimizer.lr, step, updates, optimizer.warmup_updates);
            t.value("learning rate", lr, number(&log["learning_rate"]), 0.0, 1e-12);
            let (sums, grad_norm) =
                update(&generation, c, &objective, &optimizer, lr, &warp, &pool, &mut policy, &mut learner);
            t.value("loss", sums.loss, number(&log["loss"]), RTOL, ATOL);
            t.value("grad norm", grad_norm, number(&log["grad_norm"]), RTOL, ATOL);
            step += 1;
            if step == 1 {
                let clip = (optimizer.max_grad_norm / (grad_norm + 1e-6)).min(1.0);
                let grads = learner.last_grads();
                let grads = if policy.adapter.is_some() { &grads.adapter } else { &grads.base };
                let clipped: Vec<f32> = grads.iter().map(|g| (f64::from(*g) * clip) as f32).collect();
                check_tensors(t, &tensors, "step1.clipped_grad", &policy, &clipped, ATOL);
            }
            let now = policy.trainable().trainable_values().into_owned();
            check_tensors(t, &tensors, &format!("step{step}.param"), &policy, &now, ATOL);
            let moved = match step {
                1 => &run["param_delta_l2_step1"],
                s if s == updates => &run["param_delta_l2_per_step"],
                _ => continue,
            };
            check_distances(t, moved, &policy, &start, &now);
        }
    }
    t.fact(&format!("{name}: {step} of {updates} updates replayed"), step == updates);
}

#[allow(clippy::too_many_arguments)]
fn update(
    g: &Generation,
    c: &Value,
    objective: &Objective,
    optimizer: &OptimizerConfig,
    lr: f64,
    warp: &Warp,
    pool: &Pool,
    policy: &mut Policy,
    learner: &mut Learner,
) -> (LossSums, f64) {
    let tokens = g.mask.iter().filter(|m| **m).count();
    let totals = BatchTotals {
        tokens,
        entropy_tokens: tokens,
        completions: g.offsets.len() - 1,
        max_new_tokens: number(&c["max_completion_length"]) as usize,
    };
    let mut sums = LossSums::default();
    let mut row = 0;
    let stats = learner
        .update(pool, policy, &g.groups, warp, optimizer, lr, |pieces, scores| {
            let rows: usize = pieces.iter().map(|p| p.completions.len()).sum();
            let (from, to) = (g.offsets[row], g.offsets[row + rows]);
            let offsets: Vec<usize> = g.offsets[row..=row + rows].iter().map(|o| o - from).collect();
            let advantages: Vec<f32> = (row..row + rows)
                .flat_map(|r| vec![g.advantages[r]; g.offsets[r + 1] - g.offsets[r]])
                .collect();
            row += rows;
            let out = policy_loss(
                &LossInputs {
                    offsets: &offsets,
                    new: &scores.logprobs,
                    old: &g.old[from..to],
                    reference: g.reference.as_deref().map(|r| &r[from..to]),
                    entropy: &scores.entropies,
                    advantages: &advantages,
                    mask: &g.mask[from..to],
                    weights: g.weights.as_deref().map(|w| &w[from..to]),
                    totals,
                    kl_coefficient: objective.kl.coefficient,
                    ..LossInputs::default()
                },
                objective,
            );
            sums.add(&out.sums);
            Ok(ScoreGrads { logprobs: out.d_new, entropies: out.d_entropy })
        })
        .unwrap();
    (sums, stats.grad_norm)
}

/// How far each tensor has moved from the start, against the recorded distances.
fn check_distances(t: &mut Tally, want: &Value, policy: &Policy, start: &[f32], now: &[f32]) {
    let arena = policy.trainable();
    for id in 0..arena.slots().len() {
        let range = arena.grad_range(id).unwrap();
        let was = arena.tensors_of(id, &start[range.clone()]);
        for ((name, _, now), (_, _, was)) in arena.tensors_of(id, &now[range]).iter().zip(was) {
            let peft = name.replace("lora_A.weight", "lora_A.default.weight");
            let name = peft.replace("lora_B.weight", "lora_B.default.weight");
            let squares = now.iter().zip(&was).map(|(a, b)| f64::from(a - b).powi(2));
            if let Some(want) = optional(&want[&name]) {
                t.value(&format!("distance of {name}"), squares.sum::<f64>().sqrt(), want, RTOL, ATOL);
            } else {
                t.fact(&format!("{name} is recorded"), false);
            }
        }
    }
}

#[test]
fn parity_learner_replays_recorded_runs() {
    let mut t = Tally::new("learner: rollouts and optimizer steps of recorded runs");
    for name in names() {
        if json(&format!("learner/{name}.json"))["images_of_prompt"].is_array() {
            println!(
                "learner: {name} skipped: its prompts hold images, which this learner does not read yet"
            );
            continue;
        }
        replay(&name, &mut t);
    }
    t.finish();
}
