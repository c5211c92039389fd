//! Losses, gradients, advantages and metrics against recorded results of other implementations.

#[path = "support/golden.rs"]
mod golden;

#[path = "support/grpo_cases.rs"]
mod grpo_cases;

use std::ops::Range;

use golden::{Tally, Tensor, Tensors, json, number, numbers, optional, or};
use grpo_cases::{Batch, GrpoCase, weighted};
use rft_engine::advantage::{
    AdvantageConfig, Baseline, Combine, Rewards, Scale, grouped, groups_of, matrix_advantages, returns,
};
use rft_engine::loss::correction::{OutOfBounds, SamplerCorrection, WeightLevel, kl_cov};
use rft_engine::loss::entropy::{EntropyControl, EntropyState};
use rft_engine::loss::kl::{Control, Estimator, Gradient, KlConfig};
use rft_engine::loss::surrogate::{Cispo, Divergence, Dppo, Sapo, Surrogate};
use rft_engine::loss::value::value_loss;
use rft_engine::loss::{Aggregation, BatchTotals, LossInputs, Objective, RatioLevel, policy_loss};
use serde_json::Value;

const RTOL: f64 = 1e-4;
const ATOL: f64 = 2e-6;

/// Rewards of a batch: `rows[completion][function]`.
fn rewards(v: &Value) -> Vec<Vec<Option<f64>>> {
    v.as_array().unwrap().iter().map(|r| r.as_array().unwrap().iter().map(optional).collect()).collect()
}

fn advantage_config(scale: &Value, combine: &Value) -> AdvantageConfig {
    AdvantageConfig {
        scale: match scale.as_str().unwrap_or("group") {
            "batch" => Scale::Batch,
            "none" => Scale::None,
            _ => Scale::Group,
        },
        combine: match combine.as_str().unwrap_or("sum_then_normalize") {
            "normalize_then_sum" => Combine::NormalizeThenSum,
            _ => Combine::SumThenNormalize,
        },
        ..AdvantageConfig::default()
    }
}

/// Reward metrics as the trainer logs them, each function's own too.
fn reward_metrics(
    t: &mut Tally,
    metrics: &Value,
    rows: &[Vec<Option<f64>>],
    weights: &[f64],
    group: usize,
    config: &AdvantageConfig,
    rtol: f64,
) {
    let groups = groups_of(rows.len(), group);
    let all = matrix_advantages(rows, weights, &groups, &AdvantageConfig::default());
    t.value("reward", all.reward_mean, number(&metrics["reward"]), rtol, 1e-5);
    t.value("reward_std", all.reward_std, number(&metrics["reward_std"]), rtol, 1e-5);
    // the trainer looks at the deviation that it divides by, and a group with fewer than two rewards has none
    let scored = |g: &Range<usize>| g.clone().filter(|r| rows[*r].iter().any(Option::is_some)).count() > 1;
    let is_by_group = config.scale != Scale::Batch && config.combine == Combine::SumThenNormalize;
    let two_or_more: Vec<Range<usize>> = groups.iter().filter(|g| scored(g)).cloned().collect();
    let by_group =
        matrix_advantages(rows, weights, &two_or_more, &AdvantageConfig::default()).zero_variance_groups;
    let zero = match is_by_group {
        true => by_group as f64 / groups.len() as f64,
        false => f64::from(u8::from(all.reward_std == 0.0)),
    };
    t.value("frac_reward_zero_std", zero, number(&metrics["frac_reward_zero_std"]), RTOL, 1e-6);
    for f in 0..weights.len() {
        let column: Vec<Option<f64>> = rows.iter().map(|r| r[f]).collect();
        if column.iter().flatten().count() < 2 {
            continue;
        }
        let one =
            grouped(&Rewards { values: &column, ..Rewards::default() }, &groups, &AdvantageConfig::default());
        t.value(
            "mean of a reward",
            one.reward_mean,
            number(&metrics[format!("rewards/reward_{f}/mean")]),
            rtol,
            1e-5,
        );
        t.value(
            "std of a reward",
            one.reward_std,
            number(&metrics[format!("rewards/reward_{f}/std")]),
            rtol,
            1e-5,
        );
    }
}

/// By how much one f32 rounding of a group's mean moves an advantage that is normalised twice.
fn rounding_of_f32(rows: &[Vec<Option<f64>>], weights: &[f64], group: usize) -> f64 {
    let none = AdvantageConfig { scale: Scale::None, ..AdvantageConfig::default() };
    let once =
        matrix_advantages(rows, weights, &groups_of(rows.len(), group), &AdvantageConfig::default()).values;
    let std = |x: &[f64]| {
        grouped(
            &Rewards { values: &x.iter().map(|v| Some(*v)).collect::<Vec<_>>(), ..Rewards::default() },
            &[],
            &none,
        )
        .reward_std
    };
    let summed: Vec<f64> = rows.iter().flat_map(|r| r.iter().flatten().copied()).collect();
    let ulp = summed.iter().fold(0.0, |m: f64, x| m.max(x.abs())) * f64::from(f32::EPSILON);
    let least = summed.chunks(group).map(std).fold(f64::INFINITY, f64::min);
    let second = std(&once.iter().map(|x| f64::from(*x)).collect::<Vec<_>>());
    ulp / (least + 1e-4) / (second + 1e-4)
}

#[test]
fn parity_losses_grpo() {
    let (file, tensors) = (json("losses/grpo.json"), Tensors::open("losses/grpo.safetensors"));
    let mut t = Tally::new("grpo.json: loss, gradient, metrics, advantages, sampler weights");
    for case in file["cases"].as_array().unwrap() {
        let c = GrpoCase::read(case, &file["batches"], &tensors);
        t.case(c.id.clone());
        let group = c.resolved("num_generations");
        let weights = c.reward_weights();
        let config = advantage_config(&c.options["scale_rewards"], &c.options["multi_objective_aggregation"]);
        let rows = rewards(&c.batch_json["rewards"]);
        let a = matrix_advantages(&rows, &weights, &groups_of(rows.len(), group), &config);
        // the loss is compared on the recorded advantages: the sign of one that is 0 but for rounding decides a metric
        let recorded = &tensors.get(&format!("{}.advantages", c.id)).data;
        t.values("advantages", &a.values, recorded, RTOL, 1e-5);
        reward_metrics(&mut t, &case["scoring_metrics"], &rows, &weights, group, &config, RTOL);
        let mask: Vec<f32> = c.mask.iter().map(|m| f32::from(u8::from(*m))).collect();
        t.values("mask", &mask, &tensors.get(&format!("{}.loss_mask", c.id)).data, 0.0, 0.0);
        c.check_sampler_weights(&mut t, &case["scoring_metrics"], &tensors);
        c.check_losses(&mut t, recorded, &case["loss"], &case["metrics"], &tensors);
    }
    t.finish();
}

#[test]
fn parity_losses_advantages() {
    let file = json("losses/advantages.json");
    let mut t = Tally::new("advantages.json: advantages and reward metrics");
    for (i, c) in file["cases"].as_array().unwrap().iter().enumerate() {
        t.case(format!("{i} {} {} {}", c["name"], c["scale_rewards"], c["multi_objective_aggregation"]));
        let rows = rewards(&c["rewards"]);
        let group = number(&c["num_generations"]) as usize;
        let weights = weighted(&c["reward_weights"], rows[0].len());
        let config = advantage_config(&c["scale_rewards"], &c["multi_objective_aggregation"]);
        let a = matrix_advantages(&rows, &weights, &groups_of(rows.len(), group), &config);
        // the recorded f32 deviation of nearly equal or huge rewards is itself off by this much
        let hard = matches!(c["name"].as_str(), Some("tiny_spread" | "large_values"));
        let (rtol, mut atol) = if hard { (2e-3, 2e-3) } else { (RTOL, 1e-5) };
        if hard && config.combine == Combine::NormalizeThenSum {
            atol += rounding_of_f32(&rows, &weights, group);
        }
        t.values("advantages", &a.values, &numbers(&c["advantages"]), rtol, atol);
        reward_metrics(
            &mut t,
            &c["metrics"],
            &rows,
            &weights,
            group,
            &config,
            if hard { 2e-3 } else { RTOL },
        );
    }
    t.finish();
}

#[test]
fn parity_losses_entropy_controller() {
    let (file, recorded) =
        (json("losses/entropy_controller.json"), Tensors::open("losses/entropy_controller.safetensors"));
    let (grpo, tensors) = (json("losses/grpo.json"), Tensors::open("losses/grpo.safetensors"));
    let mut t = Tally::new("entropy_controller.json: steps");
    let o = &file["options"];
    let control = EntropyControl::Adaptive {
        target: number(&o["entropy_target"]),
        delta: number(&o["entropy_coef_delta"]),
        min: number(&o["entropy_coef_min"]),
        max: number(&o["entropy_coef_max"]),
    };
    let mut state = EntropyState::new(number(&o["entropy_coef"]));
    let batch_name = file["batch"].as_str().unwrap();
    let batch = Batch::read(batch_name, &tensors);
    let batch_json = &grpo["batches"][batch_name];
    let rows = rewards(&batch_json["rewards"]);
    let group = number(&batch_json["num_generations"]) as usize;
    let weights = vec![1.0; rows[0].len()];
    let a = matrix_advantages(&rows, &weights, &groups_of(rows.len(), group), &AdvantageConfig::default());
    let micro = or(&o["micro_batch"], rows.len() as f64) as usize;
    let micros = rows.len() / micro;
    for (s, step) in file["steps"].as_array().unwrap().iter().enumerate() {
        t.case(format!("step {s}"));
        let scale = number(&step["entropy_scale"]) as f32;
        let entropy: Vec<f32> = batch.entropy.iter().map(|e| e * scale).collect();
        let coefficient = control.coefficient(&state);
        let (mut losses, mut d_new, mut d_entropy, mut sum, mut tokens) = (vec![], vec![], vec![], 0.0, 0);
        for m in 0..micros {
            let r = m * micro..(m + 1) * micro;
            let span = r.start * batch.columns..r.end * batch.columns;
            let here = batch.mask[span.clone()].iter().filter(|m| **m).count();
            let by_token: Vec<f32> = r.clone().flat_map(|r| vec![a.values[r]; batch.columns]).collect();
            let out = policy_loss(
                &LossInputs {
                    offsets: &batch.offsets(micro),
                    new: &batch.logps[span.clone()],
                    old: &batch.old[span.clone()],
                    entropy: &entropy[span.clone()],
                    advantages: &by_token,
                    mask: &batch.mask[span.clone()],
                    totals: BatchTotals {
                        tokens: batch.mask.iter().filter(|m| **m).count(),
                        entropy_tokens: here * micros,
                        completions: rows.len(),
                        max_new_tokens: batch.columns,
                    },
                    entropy_coefficient: coefficient,
                    ..LossInputs::default()
                },
                &Objective::default(),
            );
            losses.push(out.sums.loss);
            d_new.extend(out.d_new);
            d_entropy.extend(out.d_entropy);
            sum += out.sums.entropy;
            tokens += out.sums.tokens;
        }
        let entropy = sum / tokens as f64;
        state = control.next(&state, entropy);
        t.values("loss", &losses, &numbers(&step["loss"]), RTOL, ATOL);
        t.value("entropy", entropy, number(&step["window_entropy"]), RTOL, ATOL);
        t.value("coefficient", state.coefficient, number(&step["entropy_coef_after"]), RTOL, 1e-9);
        t.values("gradient", &d_new, &recorded.get(&format!("step{s}.grad_logps")).data, RTOL, ATOL);
        t.values(
            "entropy gradient",
            &d_entropy,
            &recorded.get(&format!("step{s}.grad_entropy")).data,
            RTOL,
            ATOL,
        );
    }
    t.finish();
}

#[test]
fn parity_losses_rloo() {
    let (file, tensors) = (json("losses/rloo.json"), Tensors::open("losses/rloo.safetensors"));
    let mut t = Tally::new("rloo.json: loss, gradient, metrics, advantages");
    for c in file["cases"].as_array().unwrap() {
        let (id, o, name) = (c["id"].as_str().unwrap(), &c["options"], c["batch"].as_str().unwrap());
        t.case(id);
        let mut batch = Batch::read(name, &tensors);
        let batch_json = &file["batches"][name];
        if o["mask_truncated_completions"].as_bool() == Some(true) {
            batch.mask_truncated(&batch_json["completions"]);
        }
        let rows = rewards(&batch_json["rewards"]);
        let (n, group) = (rows.len(), number(&batch_json["num_generations"]) as usize);
        let weights = weighted(&o["reward_weights"], rows[0].len());
        let kl =
            KlConfig { coefficient: or(&o["beta"], 0.0), estimator: Estimator::K1, ..KlConfig::default() };
        let masked = |x: &[f32], r: usize| -> Vec<f32> {
            let row = r * batch.columns..(r + 1) * batch.columns;
            row.map(|t| if batch.mask[t] { x[t] } else { 0.0 }).collect()
        };
        let summed: Vec<Option<f64>> = (0..n)
            .map(|r| {
                let scored = rows[r].iter().zip(&weights).filter_map(|(x, w)| x.map(|x| x * w));
                rows[r].iter().any(Option::is_some).then(|| {
                    let mut reward: f64 = scored.sum();
                    if !o["reward_clip_range"].is_null() {
                        let range = numbers(&o["reward_clip_range"]);
                        reward = reward.clamp(range[0], range[1]);
                    }
                    reward
                        - kl.reward_penalty(
                            kl.coefficient,
                            &masked(&batch.old, r),
                            &masked(&batch.reference, r),
                        )
                })
            })
            .collect();
        let config = AdvantageConfig {
            baseline: Baseline::LeaveOneOut,
            scale: Scale::None,
            whiten: o["normalize_advantages"].as_bool() == Some(true),
            ..AdvantageConfig::default()
        };
        let a = grouped(&Rewards { values: &summed, ..Rewards::default() }, &groups_of(n, group), &config);
        t.values("advantages", &a.values, &tensors.get(&format!("{id}.advantages")).data, RTOL, 1e-5);
        let low = or(&o["epsilon"], 0.2);
        let objective = Objective {
            ratio: RatioLevel::Product,
            aggregation: Aggregation::Sequence,
            clip_low: low,
            clip_high: or(&o["epsilon_high"], low),
            ..Objective::default()
        };
        let micro = or(&o["micro_batch"], n as f64) as usize;
        let (mut losses, mut d_new) = (vec![], vec![]);
        for (m, metrics) in c["metrics"].as_array().unwrap().iter().enumerate() {
            let r = m * micro..(m + 1) * micro;
            let span = r.start * batch.columns..r.end * batch.columns;
            let by_token: Vec<f32> = r.clone().flat_map(|r| vec![a.values[r]; batch.columns]).collect();
            let out = policy_loss(
                &LossInputs {
                    offsets: &batch.offsets(micro),
                    new: &batch.logps[span.clone()],
                    old: &batch.old[span.clone()],
                    entropy: &batch.entropy[span.clone()],
                    advantages: &by_token,
                    mask: &batch.mask[span.clone()],
                    totals: BatchTotals { completions: micro, ..BatchTotals::default() },
                    ..LossInputs::default()
                },
                &objective,
            );
            losses.push(out.sums.loss);
            let share = |f: fn(&rft_engine::loss::RowStats) -> usize| {
                out.rows.iter().filter(|r| f(r) > 0).count() as f64 / micro as f64
            };
            t.value(
                "clip low",
                share(|r| r.clipped_low),
                number(&metrics["clip_ratio/low_mean"]),
                RTOL,
                1e-6,
            );
            t.value(
                "clip high",
                share(|r| r.clipped_high),
                number(&metrics["clip_ratio/high_mean"]),
                RTOL,
                1e-6,
            );
            t.value(
                "entropy",
                out.sums.entropy / out.sums.tokens as f64,
                number(&metrics["entropy"]),
                RTOL,
                ATOL,
            );
            d_new.extend(out.d_new);
        }
        t.values("loss", &losses, &numbers(&c["loss"]), RTOL, ATOL);
        t.values("gradient", &d_new, &tensors.get(&format!("{id}.grad_logps")).data, RTOL, ATOL);
    }
    t.finish();
}

fn aggregation(mode: &str) -> Aggregation {
    match mode {
        "token-mean" => Aggregation::Token,
        "token-sum" => Aggregation::Sum,
        "seq-mean-token-sum" => Aggregation::SequenceSum,
        "seq-mean-token-mean" => Aggregation::Sequence,
        "seq-mean-token-sum-norm" => Aggregation::Constant,
        other => panic!("unknown aggregation {other}"),
    }
}

/// Sizes of a padded batch as that library counts them: completions without a token do not count.
fn totals(mask: &Tensor, info: &Value) -> (BatchTotals, f64) {
    let mask_of = mask.mask();
    let full = mask_of.chunks(mask.columns()).filter(|row| row.iter().any(|m| *m)).count();
    let tokens = mask_of.iter().filter(|m| **m).count();
    let totals = BatchTotals {
        tokens: or(&info["batch_num_tokens"], tokens as f64) as usize,
        entropy_tokens: tokens,
        completions: or(&info["global_batch_size"], full as f64) as usize,
        max_new_tokens: or(&info["loss_scale_factor"], mask.columns() as f64) as usize,
    };
    (totals, or(&info["dp_size"], 1.0))
}

struct Ppo {
    file: Value,
    tensors: Tensors,
}

impl Ppo {
    fn open() -> Self {
        Self { file: json("losses/ppo.json"), tensors: Tensors::open("losses/ppo.safetensors") }
    }

    fn cases(&self, list: &str) -> impl Iterator<Item = &Value> {
        self.file[list].as_array().unwrap().iter()
    }

    fn of(&self, case: &Value, name: &str) -> &Tensor {
        self.tensors.get(&format!("batch.{}.{name}", case["batch"].as_str().unwrap_or("plain")))
    }

    /// The per-token rewards that a case names, 0 where masked out.
    fn token_rewards(&self, case: &Value) -> Vec<f64> {
        let name = case["token_rewards"].as_str().unwrap().split(' ').next().unwrap();
        let masked = self.of(case, name).data.iter().zip(&self.of(case, "mask").data);
        masked.map(|(r, m)| f64::from(r * m)).collect()
    }
}

fn rows_of(t: &Tensor) -> Vec<usize> {
    (0..=t.rows()).map(|r| r * t.columns()).collect()
}

#[test]
fn parity_losses_ppo_gae_and_value() {
    let p = Ppo::open();
    let mut t = Tally::new("ppo.json: generalised advantage estimation");
    for c in p.cases("gae") {
        let id = c["id"].as_str().unwrap();
        t.case(id);
        let mask = p.of(c, "mask");
        let (rewards, values) = (p.token_rewards(c), &p.of(c, "values").data);
        let out = returns::gae(
            &rows_of(mask),
            &rewards,
            values,
            &mask.mask(),
            number(&c["gamma"]),
            number(&c["lam"]),
        );
        let want = |name: &str| &p.tensors.get(&format!("gae.{id}.{name}")).data;
        t.values("raw", &out.advantages, want("raw_advantages"), RTOL, 1e-5);
        t.values("returns", &out.returns, want("returns"), RTOL, 1e-5);
        let mut white = out.advantages;
        returns::whiten(&mut white, &mask.mask());
        t.values("whitened", &white, want("advantages"), RTOL, 1e-5);
    }
    t.finish();

    let mut t = Tally::new("ppo.json: clipped value loss");
    for c in p.cases("value_loss") {
        let id = c["id"].as_str().unwrap();
        t.case(id);
        let mask = p.of(c, "mask");
        let (totals, _) = totals(mask, c);
        let out = value_loss(
            &rows_of(mask),
            &p.of(c, "vpreds").data,
            &p.of(c, "values").data,
            &p.tensors.get("value.returns").data,
            &mask.mask(),
            number(&c["cliprange_value"]),
            aggregation(c["loss_agg_mode"].as_str().unwrap()),
            &totals,
        );
        t.value("loss", out.loss, number(&c["loss"]), RTOL, ATOL);
        t.value("clipped", out.clipped as f64 / totals.tokens as f64, number(&c["clipfrac"]), RTOL, ATOL);
        t.values("gradient", &out.d_values, &p.tensors.get(&format!("value.{id}.grad")).data, RTOL, ATOL);
    }
    t.finish();
}

#[test]
fn parity_losses_ppo_aggregation_and_kl() {
    let p = Ppo::open();
    let mut t = Tally::new("ppo.json: aggregation");
    for (i, c) in p.cases("agg").enumerate() {
        t.case(format!("{i} {}", c["mode"]));
        let tensor = |k: &str| p.tensors.get(&format!("batch.{}", c[k].as_str().unwrap()));
        let (losses, mask) = (tensor("loss_mat"), tensor("mask"));
        let (totals, ranks) = totals(mask, c);
        let mut sum = 0.0;
        for (row, m) in losses.data.chunks(mask.columns()).zip(mask.mask().chunks(mask.columns())) {
            let tokens = m.iter().filter(|m| **m).count();
            let weight = aggregation(c["mode"].as_str().unwrap()).token_weight(tokens, &totals);
            sum += row.iter().zip(m).filter(|(_, m)| **m).map(|(x, _)| weight * f64::from(*x)).sum::<f64>();
        }
        t.value("result", sum * ranks, number(&c["result"]), RTOL, ATOL);
    }
    t.finish();

    let mut t = Tally::new("ppo.json: KL estimators and their gradients");
    for c in p.cases("kl") {
        let (id, name) = (c["id"].as_str().unwrap(), c["estimator"].as_str().unwrap());
        t.case(format!("{id} {name}"));
        let (new, reference, mask) = (p.of(c, "logprob"), p.of(c, "ref"), p.of(c, "mask").mask());
        let kl = KlConfig {
            estimator: match name.trim_end_matches('+') {
                "k1" | "kl" => Estimator::K1,
                "k2" | "mse" => Estimator::K2,
                "k3" | "low_var_kl" => Estimator::K3,
                "abs" => Estimator::Abs,
                other => panic!("unknown estimator {other}"),
            },
            gradient: if name.ends_with('+') { Gradient::StraightThrough } else { Gradient::Plain },
            ..KlConfig::default()
        };
        let tokens = mask.iter().filter(|m| **m).count() as f64;
        let pairs = new.data.iter().zip(&reference.data);
        let each: Vec<_> = pairs.map(|(n, r)| kl.token(f64::from(*n), f64::from(*r), 1.0)).collect();
        let values: Vec<f64> = each.iter().map(|k| k.value).collect();
        t.values("value", &values, &p.tensors.get(&format!("kl.{id}.value")).data, RTOL, ATOL);
        let slopes: Vec<f64> =
            each.iter().zip(&mask).map(|(k, m)| if *m { k.direct / tokens } else { 0.0 }).collect();
        t.values("gradient", &slopes, &p.tensors.get(&format!("kl.{id}.grad")).data, RTOL, ATOL);
        let mean = values.iter().zip(&mask).filter(|(_, m)| **m).map(|(v, _)| v).sum::<f64>() / tokens;
        t.value("mean", mean, number(&c["masked_mean"]), RTOL, ATOL);
    }
    t.finish();

    let mut t = Tally::new("ppo.json: KL in the rewards, adaptive coefficient");
    t.case("penalised rewards");
    let kl = KlConfig { estimator: Estimator::K1, ..KlConfig::default() };
    let plain = &p.file["kl_penalised_rewards"];
    let mut rewards: Vec<f64> = p.of(plain, "outcome").data.iter().map(|r| f64::from(*r)).collect();
    kl.penalise_tokens(
        number(&plain["kl_ratio"]),
        &p.of(plain, "old").data,
        &p.of(plain, "ref").data,
        &mut rewards,
    );
    t.values("rewards", &rewards, &p.tensors.get("kl.penalised_rewards").data, RTOL, ATOL);
    let init = &p.file["kl_controller_init"];
    let control = Control::Adaptive { target: number(&init["target_kl"]), horizon: number(&init["horizon"]) };
    let kl = KlConfig { control, ..KlConfig::default() };
    let mut coefficient = number(&init["init_kl_coef"]);
    for (i, c) in p.cases("kl_controller").enumerate() {
        t.case(format!("coefficient {i}"));
        coefficient =
            kl.next_coefficient(coefficient, number(&c["current_kl"]), number(&c["n_steps"]) as usize);
        t.value("coefficient", coefficient, number(&c["value_after"]), 1e-9, 0.0);
    }
    t.finish();

    let mut t = Tally::new("ppo.json: truncated importance weights");
    for c in p.cases("rollout_correction") {
        let id = c["id"].as_str().unwrap();
        t.case(id);
        let correction = SamplerCorrection {
            level: if c["rollout_is"] == "sequence" { WeightLevel::Sequence } else { WeightLevel::Token },
            out_of_bounds: OutOfBounds::Truncate,
            min: None,
            max: Some(number(&c["threshold"])),
        };
        let mask = p.of(c, "mask");
        let weights =
            correction.weights(&rows_of(mask), &p.of(c, "old").data, &p.of(c, "rollout").data, &mask.mask());
        // that library writes 0 for tokens that are not in the loss
        let kept: Vec<f32> = weights.iter().zip(&mask.data).map(|(w, m)| w * m).collect();
        t.values("weights", &kept, &p.tensors.get(&format!("rc.{id}.weights")).data, RTOL, ATOL);
    }
    t.finish();
}

fn ppo_objective(c: &Value) -> Objective {
    let k = &c["config"];
    let ratio = or(&k["clip_ratio"], 0.2);
    let common = Objective {
        aggregation: aggregation(c["loss_agg_mode"].as_str().unwrap()),
        clip_low: or(&k["clip_ratio_low"], ratio),
        clip_high: or(&k["clip_ratio_high"], ratio),
        ..Objective::default()
    };
    let dppo = |divergence| {
        let max = or(&k["clip_ratio_c"], 20.0);
        Objective { surrogate: Surrogate::Dppo(Dppo { divergence, max }), ..common.clone() }
    };
    match c["loss_mode"].as_str().unwrap() {
        "vanilla" => Objective { dual_clip: Some(or(&k["clip_ratio_c"], 3.0)), ..common },
        "gspo" => Objective { ratio: RatioLevel::SequenceToken, ..common },
        "sapo" => {
            let (tau_pos, tau_neg) = (or(&k["tau_pos"], 1.0), or(&k["tau_neg"], 1.05));
            let surrogate = Surrogate::Sapo(Sapo { tau_pos, tau_neg });
            Objective { surrogate, aggregation: Aggregation::Sequence, ..common }
        }
        "gpg" => Objective { surrogate: Surrogate::Reinforce, ..common },
        "geo_mean" => {
            Objective { ratio: RatioLevel::Geometric, aggregation: Aggregation::Sequence, ..common }
        }
        "cispo" => {
            let (min, max) = (1.0 - common.clip_low, 1.0 + common.clip_high);
            Objective { surrogate: Surrogate::Cispo(Cispo { min, max }), ..common }
        }
        "kl_cov" => Objective { clip_low: 1.0, clip_high: f64::INFINITY, ..common },
        "dppo_tv" => dppo(Divergence::Tv),
        "dppo_kl" => dppo(Divergence::Kl),
        other => panic!("unknown loss_mode {other}"),
    }
}

#[test]
fn parity_losses_ppo_policy() {
    let p = Ppo::open();
    let mut t = Tally::new("ppo.json: policy losses, gradients and metrics");
    for c in p.cases("policy_loss") {
        let (id, mode) = (c["id"].as_str().unwrap(), c["loss_mode"].as_str().unwrap());
        t.case(format!("{id} {mode}"));
        let (new, mask) = (p.of(c, "logprob"), p.of(c, "mask"));
        let advantages = p.of(c, c["advantages"].as_str().unwrap());
        let (mut totals, ranks) = totals(mask, &c["global_batch_info"]);
        if mode == "geo_mean" {
            totals.completions = mask.rows();
        }
        let kl_cov_settings = &c["policy_loss_config"];
        let drift = (mode == "kl_cov").then(|| {
            let (share, coefficient) =
                (or(&kl_cov_settings["kl_cov_ratio"], 0.0002), or(&kl_cov_settings["ppo_kl_coef"], 1.0));
            kl_cov(&new.data, &advantages.data, &mask.mask(), share, coefficient)
        });
        let out = policy_loss(
            &LossInputs {
                offsets: &rows_of(mask),
                new: &new.data,
                old: &p.of(c, "old").data,
                entropy: &vec![0.0; new.data.len()],
                advantages: &advantages.data,
                mask: &mask.mask(),
                weights: (c["rollout_is_weights"] == true).then(|| &p.of(c, "is_weights").data[..]),
                drift: drift.as_deref(),
                totals,
                ..LossInputs::default()
            },
            &ppo_objective(c),
        );
        let scaled: Vec<f64> = out.d_new.iter().map(|d| f64::from(*d) * ranks).collect();
        t.value("loss", out.sums.loss * ranks, number(&c["loss"]), RTOL, ATOL);
        t.values("gradient", &scaled, &p.tensors.get(&format!("policy.{id}.grad")).data, RTOL, ATOL);
        let (s, m) = (&out.sums, &c["metrics"]);
        let tokens = s.tokens as f64;
        if let Some(kl) = optional(&m["actor/ppo_kl"]) {
            let moved = if mode == "kl_cov" { s.moved_abs } else { s.moved };
            t.value("ppo_kl", moved / tokens, kl, RTOL, ATOL);
        }
        // geo_mean counts tokens outside the range on the side that is not clipped, too
        if let (Some(clipped), false) = (optional(&m["actor/pg_clipfrac"]), mode == "geo_mean") {
            let all = s.clipped + if mode == "cispo" { s.capped } else { 0 };
            t.value("pg_clipfrac", all as f64 / tokens, clipped, RTOL, ATOL);
        }
        if let (Some(capped), "vanilla") = (optional(&m["actor/pg_clipfrac_lower"]), mode) {
            t.value("pg_clipfrac_lower", s.capped as f64 / tokens, capped, RTOL, ATOL);
        }
    }
    t.finish();
}

#[test]
fn parity_losses_ppo_advantages() {
    let p = Ppo::open();
    let mut t = Tally::new("ppo.json: advantage estimators");
    for c in p.cases("advantage") {
        let (id, name) = (c["id"].as_str().unwrap(), c["estimator"].as_str().unwrap());
        t.case(format!("{id} {name}"));
        let mask = p.of(c, "mask");
        let (keep, offsets) = (mask.mask(), rows_of(mask));
        let token_rewards = p.token_rewards(c);
        let sums: Vec<f64> = token_rewards.chunks(mask.columns()).map(|r| r.iter().sum()).collect();
        let group_of = numbers(&c["group_of_row"]);
        let gamma = or(&c["gamma"], 1.0);
        let by_norm = if c["norm_adv_by_std_in_grpo"] == false { Scale::None } else { Scale::Group };
        let (baseline, scale) = match name {
            "grpo" | "grpo_vectorized" => (Baseline::GroupMean, by_norm),
            "grpo_passk" => (Baseline::SecondBest, by_norm),
            "rloo" | "rloo_vectorized" => (Baseline::LeaveOneOut, Scale::None),
            "opo" => (Baseline::LengthWeighted, Scale::None),
            "gpg" => (Baseline::GroupMean, Scale::NonZeroShare),
            "reinforce_plus_plus_baseline" => (Baseline::GroupMean, Scale::None),
            "remax" => (Baseline::Greedy, Scale::None),
            "reinforce_plus_plus" => (Baseline::Zero, Scale::None),
            other => panic!("unknown estimator {other}"),
        };
        let greedy: Vec<f64> = match name {
            "remax" => p.of(c, "seq_adv").data.chunks(mask.columns()).map(|r| f64::from(r[0])).collect(),
            _ => Vec::new(),
        };
        // groups must be consecutive: rows in the order of their group
        let mut order: Vec<usize> = (0..sums.len()).collect();
        order.sort_by(|a, b| group_of[*a].total_cmp(&group_of[*b]));
        let mut groups: Vec<Range<usize>> = Vec::new();
        for i in 0..order.len() {
            match groups.last_mut() {
                Some(g) if group_of[order[g.start]] == group_of[order[i]] => g.end = i + 1,
                _ => groups.push(i..i + 1),
            }
        }
        let tokens = |r: usize| keep[offsets[r]..offsets[r + 1]].iter().filter(|m| **m).count();
        let sorted = grouped(
            &Rewards {
                values: &order.iter().map(|r| Some(sums[*r])).collect::<Vec<_>>(),
                lengths: &order.iter().map(|r| tokens(*r)).collect::<Vec<_>>(),
                greedy: &order.iter().map(|r| greedy.get(*r).copied().unwrap_or(0.0)).collect::<Vec<_>>(),
            },
            &groups,
            &AdvantageConfig { baseline, scale, eps: 1e-6, ..AdvantageConfig::default() },
        );
        let mut by_row = vec![0.0; sums.len()];
        order.iter().zip(&sorted.values).for_each(|(r, a)| by_row[*r] = *a);
        let mut got = returns::by_token(&offsets, &by_row, &keep);
        if name == "reinforce_plus_plus" {
            got = returns::discounted_returns(&offsets, &token_rewards, &keep, gamma);
        }
        if name.starts_with("reinforce") {
            returns::whiten(&mut got, &keep);
        }
        // only tokens in the loss are compared: what stands elsewhere is never read
        let only = |x: f64, t: usize| if keep[t] { x } else { 0.0 };
        let got: Vec<f64> = got.iter().enumerate().map(|(t, x)| only(*x, t)).collect();
        let want = &p.tensors.get(&format!("adv.{id}.advantages")).data;
        let want: Vec<f64> = want.iter().enumerate().map(|(t, x)| only(f64::from(*x), t)).collect();
        t.values("advantages", &got, &want, RTOL, 1e-5);
    }
    t.finish();
}
