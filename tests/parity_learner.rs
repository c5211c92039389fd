//! Whole training runs of TRL over recorded rollouts, replayed step by step through the learner.

#[path = "support/golden.rs"]
mod golden;

#[path = "support/schedules.rs"]
mod schedules;

use golden::{Tally, Tensors, json, number, numbers, optional, or, root};
use rft_engine::advantage::{AdvantageConfig, Combine, Scale, groups_of, matrix_advantages};
use rft_engine::config::{OptimizerConfig, Precision};
use rft_engine::learner::batch::GroupTokens;
use rft_engine::learner::optimizer::OptimizerKind;
use rft_engine::learner::schedule::learning_rate;
use rft_engine::learner::step::{Learner, ScoreGrads};
use rft_engine::loss::correction::{OutOfBounds, SamplerCorrection, WeightLevel, entropy_threshold};
use rft_engine::loss::kl::{Gradient, KlConfig};
use rft_engine::loss::surrogate::{Cispo, Sapo, Surrogate, Vespo};
use rft_engine::loss::{
    Aggregation, BatchTotals, LossInputs, LossOutputs, LossSums, Objective, RatioLevel, policy_loss,
};
use rft_engine::model::peft::PeftAdapter;
use rft_engine::model::policy::Policy;
use rft_engine::model::source::ModelSource;
use rft_engine::types::TokenId;
use rft_kernels::{Pool, Warp};
use schedules::schedule;
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

/// The trainer's default where a run does not say.
fn loss_type(c: &Value) -> &str {
    c["loss_type"].as_str().unwrap_or("dapo")
}

fn objective(c: &Value) -> Objective {
    let low = or(&c["epsilon"], 0.2);
    let high = or(&c["epsilon_high"], low);
    let (surrogate, aggregation) = match loss_type(c) {
        "dapo" | "bnpo" => (Surrogate::Clip, Aggregation::Token),
        "grpo" => (Surrogate::Clip, Aggregation::Sequence),
        "dr_grpo" => (Surrogate::Clip, Aggregation::Constant),
        "luspo" => (Surrogate::Clip, Aggregation::SequenceSum),
        "cispo" => (Surrogate::Cispo(Cispo { min: 0.0, max: high }), Aggregation::Token),
        "sapo" => {
            let s = Sapo::default();
            let tau_pos = or(&c["sapo_temperature_pos"], s.tau_pos);
            let tau_neg = or(&c["sapo_temperature_neg"], s.tau_neg);
            (Surrogate::Sapo(Sapo { tau_pos, tau_neg }), Aggregation::Sequence)
        }
        "vespo" => {
            let v = Vespo::default();
            let v = Vespo {
                k_pos: or(&c["vespo_k_pos"], v.k_pos),
                lambda_pos: or(&c["vespo_lambda_pos"], v.lambda_pos),
                k_neg: or(&c["vespo_k_neg"], v.k_neg),
                lambda_neg: or(&c["vespo_lambda_neg"], v.lambda_neg),
            };
            (Surrogate::Vespo(v), Aggregation::Token)
        }
        other => panic!("no loss_type {other} in the trainer"),
    };
    let is_sequence = c["importance_sampling_level"] == "sequence";
    let is_weighted = c["use_bias_correction_kl"].as_bool() != Some(false);
    let kl = KlConfig {
        coefficient: or(&c["beta"], 0.0),
        gradient: if is_weighted { Gradient::Weighted } else { Gradient::Plain },
        ..Default::default()
    };
    Objective {
        surrogate,
        aggregation,
        ratio: if is_sequence { RatioLevel::Sequence } else { RatioLevel::Token },
        clip_low: low,
        clip_high: high,
        delta: optional(&c["delta"]),
        top_entropy: or(&c["top_entropy_quantile"], 1.0),
        off_policy_limit: optional(&c["off_policy_mask_threshold"]),
        entropy_coefficient: or(&c["entropy_coef"], 0.0),
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

/// Settings of the optimizer, and the updates that its schedule runs over.
fn optimizer(c: &Value) -> (OptimizerConfig, u64) {
    // a warm-up below 1 is a share of the run
    let total = number(&c["max_steps"]) as u64;
    let share = |x: f64| (x * total as f64).ceil() as u64;
    let warmup = match or(&c["warmup_steps"], 0.0) {
        0.0 => share(or(&c["warmup_ratio"], 0.0)),
        x if x < 1.0 => share(x),
        n => n as u64,
    };
    let (name, lr) = (c["lr_scheduler_type"].as_str().unwrap(), number(&c["learning_rate"]));
    let (schedule, total, warmup_updates) = schedule(name, &c["lr_scheduler_kwargs"], lr, total, warmup);
    let is_sgd = c["optim"].as_str().unwrap().to_lowercase().contains("sgd");
    let config = OptimizerConfig {
        state: Default::default(),
        kind: if is_sgd { OptimizerKind::Sgd } else { OptimizerKind::AdamW },
        lr: number(&c["learning_rate"]),
        beta1: number(&c["adam_beta1"]),
        beta2: number(&c["adam_beta2"]),
        eps: number(&c["adam_epsilon"]),
        weight_decay: number(&c["weight_decay"]),
        max_grad_norm: number(&c["max_grad_norm"]),
        warmup_updates,
        schedule,
    };
    (config, total)
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
    sampler: Option<Vec<f32>>,
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
    let (objective, (optimizer, scheduled)) = (objective(c), optimizer(c));
    let group = number(&c["num_generations"]) as usize;
    let scale = match c["scale_rewards"].as_str().unwrap_or("group") {
        "group" => Scale::Group,
        "batch" => Scale::Batch,
        _ => Scale::None,
    };
    let combine = match c["multi_objective_aggregation"].as_str() {
        Some("normalize_then_sum") => Combine::NormalizeThenSum,
        _ => Combine::SumThenNormalize,
    };
    let warp = Warp { temperature: number(&c["temperature"]) as f32, top_k: 0, top_p: 1.0, min_p: 0.0 };
    let mut policy = load(&run, &pool);
    let initial = policy.clone();
    // all rows at once: the recorded micro-batches are cut in the loss
    let mut learner = Learner::new(&policy, 4096);
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
        let config = AdvantageConfig { scale, combine, ..AdvantageConfig::default() };
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
        let sampler: Option<Vec<f32>> = (run["use_sampling_logps"] == true).then(|| {
            let rows = recorded["sampling_logps"].as_array().unwrap();
            rows.iter().flat_map(numbers).map(|x| x as f32).collect()
        });
        let weights = objective
            .sampler_correction
            .zip(sampler.as_deref())
            .map(|(c, sampler)| c.weights(&offsets, &old, sampler, &mask));
        let generation = Generation {
            groups,
            offsets,
            mask,
            advantages: advantages.values,
            old,
            reference,
            weights,
            sampler,
        };
        for _ in 0..iterations {
            if step == updates {
                break;
            }
            let log = &logs[step as usize];
            t.case(format!("{name} step {}", step + 1));
            let lr =
                learning_rate(optimizer.schedule, optimizer.lr, step, scheduled, optimizer.warmup_updates);
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
    let mut sums = LossSums::default();
    let mut row = 0;
    let stats = learner
        .update(pool, policy, &g.groups, warp, optimizer, lr, |pieces, scores| {
            let rows: usize = pieces.iter().map(|p| p.completions.len()).sum();
            let mut grads = ScoreGrads::default();
            // the trainer's own micro-batches, whatever the learner's are
            let recorded = number(&c["per_device_train_batch_size"]) as usize;
            let end = row + rows;
            let first = g.offsets[row];
            while row < end {
                let next = (row / recorded * recorded + recorded).min(end);
                let span = g.offsets[row] - first..g.offsets[next] - first;
                micro_batch(
                    g,
                    c,
                    objective,
                    row..next,
                    &scores.logprobs[span.clone()],
                    &scores.entropies[span],
                )
                .add_to(&mut sums, &mut grads);
                row = next;
            }
            Ok(grads)
        })
        .unwrap();
    (sums, stats.grad_norm)
}

/// A recorded micro-batch's loss, with the factor that the trainer's accumulation gives it.
struct Part {
    out: LossOutputs,
    scale: f64,
}

impl Part {
    fn add_to(mut self, sums: &mut LossSums, grads: &mut ScoreGrads) {
        self.out.sums.loss *= self.scale;
        sums.add(&self.out.sums);
        let scaled = |d: &f32| (f64::from(*d) * self.scale) as f32;
        grads.logprobs.extend(self.out.d_new.iter().map(scaled));
        grads.entropies.extend(self.out.d_entropy.iter().map(scaled));
    }
}

fn micro_batch(
    g: &Generation,
    c: &Value,
    objective: &Objective,
    rows: std::ops::Range<usize>,
    new: &[f32],
    entropy: &[f32],
) -> Part {
    let span = g.offsets[rows.start]..g.offsets[rows.end];
    let offsets: Vec<usize> = g.offsets[rows.start..=rows.end].iter().map(|o| o - span.start).collect();
    let advantages: Vec<f32> =
        rows.clone().flat_map(|r| vec![g.advantages[r]; g.offsets[r + 1] - g.offsets[r]]).collect();
    let mask = &g.mask[span.clone()];
    let count = |mask: &[bool]| mask.iter().filter(|m| **m).count();
    let accumulation = or(&c["gradient_accumulation_steps"], 1.0);
    // these three are averaged over the tokens of the whole generation batch, the others by micro-batch
    let over_all = matches!(loss_type(c), "dapo" | "cispo" | "vespo");
    let (tokens, scale) = match over_all {
        true => (count(&g.mask), or(&c["steps_per_generation"], accumulation) / accumulation),
        false => (count(mask), 1.0 / accumulation),
    };
    let threshold = (objective.top_entropy < 1.0)
        .then(|| entropy_threshold(entropy, mask, objective.top_entropy))
        .flatten();
    let uncertain =
        entropy.iter().zip(mask).filter(|(e, m)| **m && threshold.is_none_or(|h| **e >= h)).count();
    let inputs = LossInputs {
        offsets: &offsets,
        new,
        old: &g.old[span.clone()],
        reference: g.reference.as_deref().map(|r| &r[span.clone()]),
        sampler: g.sampler.as_deref().map(|s| &s[span.clone()]),
        entropy,
        advantages: &advantages,
        mask,
        weights: g.weights.as_deref().map(|w| &w[span.clone()]),
        drift: None,
        entropy_threshold: threshold,
        totals: BatchTotals {
            tokens,
            entropy_tokens: uncertain,
            completions: rows.len(),
            max_new_tokens: number(&c["max_completion_length"]) as usize,
        },
        kl_coefficient: objective.kl.coefficient,
        entropy_coefficient: objective.entropy_coefficient / accumulation / scale,
    };
    Part { out: policy_loss(&inputs, objective), scale }
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
