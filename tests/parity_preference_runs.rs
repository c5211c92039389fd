//! Whole runs of TRL's preference trainers, replayed batch by batch through the step of a preference stage.

#[path = "support/golden.rs"]
mod golden;

use golden::{Tally, json, number, numbers, optional, or, root};
use rft_engine::config::{OptimizerConfig, Precision};
use rft_engine::learner::batch::GroupTokens;
use rft_engine::learner::optimizer::OptimizerKind;
use rft_engine::learner::step::Learner;
use rft_engine::loss::preference::{KtoConfig, PairLoss, PreferenceConfig, UnpairedLoss};
use rft_engine::model::policy::Policy;
use rft_engine::model::source::ModelSource;
use rft_engine::train::comparison::{Compared, Comparisons, PLAIN, Pair, Verdict};
use rft_engine::types::TokenId;
use rft_kernels::Pool;
use serde_json::Value;

const RTOL: f64 = 1e-3;
const ATOL: f64 = 2e-4;

fn ids(v: &Value) -> Vec<Vec<TokenId>> {
    v.as_array().unwrap().iter().map(|r| numbers(r).into_iter().map(|x| x as TokenId).collect()).collect()
}

fn optimizer(c: &Value) -> OptimizerConfig {
    OptimizerConfig {
        kind: if c["optim"] == "sgd" { OptimizerKind::Sgd } else { OptimizerKind::AdamW },
        lr: number(&c["learning_rate"]),
        beta1: number(&c["adam_beta1"]),
        beta2: number(&c["adam_beta2"]),
        eps: number(&c["adam_epsilon"]),
        weight_decay: number(&c["weight_decay"]),
        max_grad_norm: number(&c["max_grad_norm"]),
        ..OptimizerConfig::default()
    }
}

fn pairs(c: &Value, count: usize) -> Verdict {
    let names = c["loss_type"].as_array().unwrap();
    let weights = match &c["loss_weights"] {
        Value::Null => vec![1.0; names.len()],
        weights => numbers(weights),
    };
    let loss = |name: &Value| serde_json::from_value::<PairLoss>(name.clone()).unwrap();
    let config = PreferenceConfig {
        losses: names.iter().map(loss).zip(weights).collect(),
        beta: number(&c["beta"]),
        label_smoothing: or(&c["label_smoothing"], 0.0),
        ..PreferenceConfig::default()
    };
    let pair = |group| Pair { group, chosen: 0, rejected: 1, margin: 0.0 };
    Verdict::Pairs((0..count).map(pair).collect(), config)
}

fn labels(c: &Value, step: &Value) -> Verdict {
    let config = KtoConfig {
        loss: UnpairedLoss::Kto,
        beta: number(&c["beta"]),
        desirable_weight: number(&c["desirable_weight"]),
        undesirable_weight: number(&c["undesirable_weight"]),
    };
    let desirable = step["labels"].as_array().unwrap().iter().map(|l| l.as_bool().unwrap()).collect();
    Verdict::Labels(desirable, 0.0, config)
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

/// Compares what a step reports with what was logged.
fn check(t: &mut Tally, step: &Comparisons, compared: &Compared, log: &Value) {
    t.value("loss", compared.outputs.loss, number(&log["loss"]), RTOL, ATOL);
    t.value("grad norm", compared.stats.grad_norm, number(&log["grad_norm"]), RTOL, ATOL);
    let logps = step.sums(&compared.logprobs);
    let (chosen, rejected): (Vec<usize>, Vec<usize>) = match &step.verdict {
        Verdict::Pairs(pairs, _) => pairs.iter().map(|p| step.rows_of(p)).unzip(),
        Verdict::Labels(desirable, ..) => (0..desirable.len()).partition(|&row| desirable[row]),
    };
    let of = |rows: &[usize], x: &[f64]| mean(&rows.iter().map(|&r| x[r]).collect::<Vec<_>>());
    t.value("logps/chosen", of(&chosen, &logps), number(&log["logps/chosen"]), RTOL, ATOL);
    t.value("logps/rejected", of(&rejected, &logps), number(&log["logps/rejected"]), RTOL, ATOL);
    let out = &compared.outputs;
    let (up, down) = match &step.verdict {
        Verdict::Pairs(..) => (mean(&out.chosen_rewards), mean(&out.rejected_rewards)),
        Verdict::Labels(..) => (of(&chosen, &out.chosen_rewards), of(&rejected, &out.chosen_rewards)),
    };
    t.value("rewards/chosen", up, number(&log["rewards/chosen"]), RTOL, ATOL);
    t.value("rewards/rejected", down, number(&log["rewards/rejected"]), RTOL, ATOL);
    t.value("rewards/margins", up - down, number(&log["rewards/margins"]), RTOL, ATOL);
    if let Some(want) = optional(&log["rewards/accuracies"]) {
        let better = out.chosen_rewards.iter().zip(&out.rejected_rewards).filter(|(c, r)| c > r).count();
        t.value("rewards/accuracies", better as f64 / chosen.len() as f64, want, 0.0, 1e-9);
    }
    if let (Verdict::Labels(_, baseline, config), Some(want)) = (&step.verdict, optional(&log["kl"])) {
        // logged without beta by some releases and with it by none
        t.value("baseline", *baseline, want, RTOL, ATOL * config.beta.max(1.0));
    }
}

fn replay(run: &Value, source: &ModelSource, t: &mut Tally) {
    let (name, c, pool) = (run["name"].as_str().unwrap(), &run["config"], Pool::new(2));
    let optimizer = optimizer(c);
    let mut policy = Policy::load(source, None, 0).unwrap();
    policy.prepare(&pool, 256, Precision::F32);
    let reference = policy.clone();
    // a micro-batch of about one pair
    let mut learner = Learner::new(&policy, 72);
    let start = policy.base.trainable_values().into_owned();
    for (i, recorded) in run["steps"].as_array().unwrap().iter().enumerate() {
        t.case(format!("{name} step {}", i + 1));
        let (prompts, completions) = (ids(&recorded["prompts"]), ids(&recorded["completions"]));
        let is_pairs = recorded["labels"].is_null();
        let count = if is_pairs { prompts.len() / 2 } else { prompts.len() };
        let group = |g: usize| {
            let mut own = vec![completions[g].as_slice()];
            if is_pairs {
                assert_same_prompt(&prompts[g], &prompts[g + count]);
                own.push(&completions[g + count]);
            }
            GroupTokens { prompt: &prompts[g], completions: own }
        };
        let verdict = if is_pairs { pairs(c, count) } else { labels(c, recorded) };
        let mut step = Comparisons::new((0..count).map(group).collect(), verdict);
        step.reference = Some(learner.score(&pool, &reference.weights(), &step.groups, &PLAIN).logprobs);
        if !is_pairs {
            let mismatched = step.mismatched();
            let wanted = ids(&recorded["kl_completions"]);
            let same = mismatched.iter().zip(&wanted).all(|(g, want)| g.completions[0] == *want);
            t.fact("mismatched completions", same);
            let new = learner.score(&pool, &policy.weights(), &mismatched, &PLAIN).logprobs;
            let old = learner.score(&pool, &reference.weights(), &mismatched, &PLAIN).logprobs;
            step.set_baseline(&mismatched, &new, &old);
        }
        let compared = step.update(&pool, &mut policy, &mut learner, &optimizer, optimizer.lr).unwrap();
        check(t, &step, &compared, &recorded["logs"]);
    }
    let now = policy.base.trainable_values().into_owned();
    t.case(format!("{name} distances"));
    for id in 0..policy.base.slots().len() {
        let range = policy.base.grad_range(id).unwrap();
        let was = policy.base.tensors_of(id, &start[range.clone()]);
        for ((tensor, _, now), (_, _, was)) in policy.base.tensors_of(id, &now[range]).iter().zip(was) {
            let moved = now.iter().zip(&was).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>().sqrt();
            let want = number(&run["param_delta_l2"][tensor.as_str()]);
            t.value(&format!("distance of {tensor}"), moved, want, RTOL, ATOL);
        }
    }
}

fn assert_same_prompt(a: &[TokenId], b: &[TokenId]) {
    assert_eq!(a, b, "a pair has one prompt");
}

#[test]
fn parity_preference_runs_replay_trl() {
    if !root().join("preference/runs.json").exists() {
        println!("preference runs: skipped, {} has none", root().display());
        return;
    }
    let file = json("preference/runs.json");
    let source = ModelSource::open(root().join(file["model"].as_str().unwrap())).unwrap();
    let mut t = Tally::new("preference: whole runs of TRL's DPOTrainer and KTOTrainer");
    for run in file["runs"].as_array().unwrap() {
        replay(run, &source, &mut t);
    }
    t.finish();
}
