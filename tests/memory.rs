//! What saves memory changes nothing else (activations made again, moments in 8 bits, no moments at all), and the plan of a
//! run's memory is what it takes.

#[path = "support/runs.rs"]
mod runs;

use rft_engine::config::{NewModelConfig, OptimizerConfig, Precision};
use rft_engine::learner::batch::GroupTokens;
use rft_engine::learner::optimizer::{MomentKind, Moments, OptimizerKind};
use rft_engine::learner::step::{Learner, ScoreGrads};
use rft_engine::model::policy::{Policy, new_model_spec};
use rft_kernels::{Pool, Warp};
use runs::{Folder, checkpoints, cut, resume, stderr, summary, weights};

const RECIPE: &str = r#"
name = "test"
[model.new]
hidden = 64
layers = 3
heads = 2
kv_heads = 1
head_dim = 32
ffn = 128
[data]
heldout = 8
arithmetic = { max_operand = 9, problems = 60, demo_noise = 0.3 }
[[reward]]
script = "math"
[rollout]
prompts_per_step = 4
group_size = 4
max_new_tokens = 16
[algorithm.objective.kl]
coefficient = 0.01
[optimizer]
lr = 1e-3
[train]
steps = 4
checkpoint_every = 1
[[stage]]
kind = "sft"
steps = 20
lr = 3e-3
batch = 16
[[stage]]
kind = "grpo"
"#;

#[test]
fn a_run_that_makes_activations_again_ends_with_the_same_bytes() {
    let folder = Folder::new(RECIPE);
    let kept = folder.run("kept", &["train.recompute=off"]);
    let again = folder.run("again", &["train.recompute=on"]);
    assert_eq!(weights(&kept), weights(&again));
}

#[test]
fn a_run_with_moments_in_8_bits_resumes_to_the_same_bytes() {
    let folder = Folder::new(RECIPE);
    let whole = folder.run("whole", &["optimizer.state=int8"]);
    assert_ne!(weights(&whole), weights(&folder.run("f32", &[])));
    let first = whole.join("checkpoints").join(&checkpoints(&whole)[0]);
    let bytes = |name: &str| std::fs::metadata(first.join(name)).unwrap().len();
    assert_eq!(
        (bytes("adam_m.u8") * 4, bytes("adam_v.u8") * 4),
        (bytes("weights.f32"), bytes("weights.f32"))
    );
    let run = folder.at("cut");
    cut(&whole, &run, 23);
    let resumed = resume(&run);
    assert!(resumed.status.success(), "{}", stderr(&resumed));
    assert!(stderr(&resumed).contains("resuming after 23 steps"));
    assert_eq!(weights(&whole), weights(&run));
}

/// Loss after each of some updates that fit a few sequences.
fn losses(optimizer: &OptimizerConfig) -> (Vec<f64>, Learner, Policy) {
    let pool = Pool::new(2);
    let shape = NewModelConfig { hidden: 32, layers: 2, heads: 2, kv_heads: 1, head_dim: 16, ffn: 64 };
    let mut policy = Policy::init(new_model_spec(&shape, 50, 1, 32).unwrap(), 3);
    policy.prepare(&pool, 32, Precision::F32);
    let mut learner = Learner::new(&policy, 64);
    let groups = [
        GroupTokens { prompt: &[3, 7, 11, 2, 9], completions: vec![&[4, 5, 6, 8], &[4, 5, 6, 1]] },
        GroupTokens { prompt: &[12, 40], completions: vec![&[10, 11, 30, 1]] },
    ];
    let warp = Warp { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0 };
    let mut losses = Vec::new();
    for _ in 0..40 {
        let mut loss = 0.0;
        let nll = |_: &[_], scores: &rft_engine::model::backprop::Scores| {
            loss -= scores.logprobs.iter().map(|&l| f64::from(l)).sum::<f64>() / 12.0;
            Ok(ScoreGrads {
                logprobs: vec![-1.0 / 12.0; scores.logprobs.len()],
                entropies: vec![0.0; scores.logprobs.len()],
            })
        };
        learner.update(&pool, &mut policy, &groups, &warp, optimizer, optimizer.lr, nll).unwrap();
        losses.push(loss);
    }
    (losses, learner, policy)
}

#[test]
fn moments_in_8_bits_fit_as_well_and_take_a_quarter() {
    let config = OptimizerConfig { lr: 3e-3, ..OptimizerConfig::default() };
    let (wide, wide_learner, _) = losses(&config);
    let config = OptimizerConfig { state: MomentKind::Int8, ..config };
    let (narrow, narrow_learner, policy) = losses(&config);
    let (first, last) = (wide[0], wide[39]);
    assert!(last < 0.2 * first, "f32 moments fit: {first} to {last}");
    for (step, (a, b)) in wide.iter().zip(&narrow).enumerate() {
        assert!((a - b).abs() < 0.05 * first, "update {step}: a loss of {b} instead of {a}");
    }
    let bytes = |learner: &Learner| match &learner.adam.moments {
        Moments::None => 0,
        Moments::F32 { m, v } => 4 * (m.len() + v.len()),
        Moments::Int8 { m, v, scales } => m.len() + v.len() + 4 * scales.len(),
    };
    let (wide, narrow) = (bytes(&wide_learner), bytes(&narrow_learner));
    assert_eq!(narrow, Moments::planned_bytes(policy.trainable(), &config));
    assert!(
        wide == 8 * policy.trainable().trainable_len() && narrow * 100 < 26 * wide,
        "{narrow} of {wide} bytes"
    );
}

#[test]
fn plain_gradient_descent_holds_no_moments() {
    let config = OptimizerConfig { kind: OptimizerKind::Sgd, lr: 0.1, ..OptimizerConfig::default() };
    let (losses, learner, policy) = losses(&config);
    assert!(losses[39] < losses[0]);
    assert_eq!(learner.adam.moments, Moments::None);
    assert_eq!(Moments::planned_bytes(policy.trainable(), &config), 0);
}

/// A model large enough to tell, whose steps fill their micro-batches.
const WIDE: [&str; 11] = [
    "model.new={ hidden = 256, layers = 6, heads = 4, kv_heads = 2, head_dim = 64, ffn = 768 }",
    "rollout.prompts_per_step=48",
    "rollout.group_size=4",
    "rollout.max_new_tokens=32",
    "data.heldout=32",
    "train.steps=2",
    "train.checkpoint_every=0",
    "stage.0.steps=1",
    "optimizer.lr=1e-5",
    "devices.threads=2",
    "devices.memory_mb=300",
];

/// Two stages that draw nothing; nothing is measured either.
#[test]
#[cfg(target_os = "linux")]
fn the_peak_of_supervised_and_preference_stages_is_within_a_tenth_of_the_plan() {
    let folder = Folder::new("");
    let pairs: Vec<String> = (0..512u64)
        .map(|i| {
            let (a, b) = (i % 100, i / 5);
            let says = |sum: u64| format!("<think>{a}+{b}={sum}</think><answer>{sum}</answer>");
            let (chosen, rejected) = (says(a + b), says(a + b + 1));
            serde_json::json!({"prompt": format!("{a}+{b}="), "chosen": chosen, "rejected": rejected})
                .to_string()
        })
        .collect();
    folder.write("pairs.jsonl", &pairs.join("\n"));
    let pairs = format!("path = {:?}", folder.at("pairs.jsonl"));
    let head = RECIPE.split("[[reward]]").next().unwrap().replace("heldout = 8", "heldout = 0");
    for (name, stage, of_pairs) in [
        ("sft", "kind = \"sft\"\nbatch = 128\nsteps = 3\n".to_string(), false),
        ("dpo", format!("kind = \"preference\"\nbatch = 64\nsteps = 3\n{pairs}\n"), true),
        (
            "simpo",
            format!(
                "kind = \"preference\"\nbatch = 64\nsteps = 3\n{pairs}\n[stage.preference]\nreference_free = true\n"
            ),
            true,
        ),
    ] {
        let head = if of_pairs { head.split("[data]").next().unwrap() } else { &head };
        let recipe = format!(
            "{head}[rollout]\nmax_new_tokens = 32\n[train]\ncheckpoint_every = 0\n[[stage]]\n{stage}"
        );
        folder.write("recipe.toml", &recipe);
        let sets = [WIDE[0], "optimizer.lr=1e-5", "devices.threads=2", "devices.memory_mb=400"];
        let run = folder.run(name, &sets);
        let [peak, plan, seen] = planned(&run);
        println!(
            "{name}: peak {peak:.0} MiB, {:.3} of the plan, {:.3} of the steps that came",
            peak / plan,
            peak / seen
        );
        assert!((0.9..1.1).contains(&(peak / plan)), "{name}: {peak:.0} of {plan:.0} MiB");
        assert!((0.9..1.1).contains(&(peak / seen)), "{name}: {peak:.0} of {seen:.0} MiB");
    }
}

/// Measured peak, plan, and plan for the steps that came, MiB.
fn planned(run: &std::path::Path) -> [f64; 3] {
    let summary = summary(run);
    ["rss_peak_bytes", "memory_plan_bytes", "memory_plan_seen_bytes"]
        .map(|key| summary[key].as_f64().unwrap() / f64::from(1 << 20))
}

/// The plan is for completions of full length; where all end early, it says afterwards what they should have taken.
#[test]
#[cfg(target_os = "linux")]
fn completions_that_end_early_take_less_than_the_plan_and_what_it_says_of_them() {
    let folder = Folder::new(RECIPE);
    let stop = r#"rollout.stop=["0", "1", "2", "3", "4", "5", "6", "7", "8", "9"]"#;
    let run = folder.run("early", &[&WIDE[..], &[stop, "rollout.prompts_per_step=16"]].concat());
    let [peak, plan, seen] = planned(&run);
    println!(
        "early: peak {peak:.0} MiB, {:.3} of the plan, {:.3} of the steps that came",
        peak / plan,
        peak / seen
    );
    assert!(seen < 0.95 * plan && peak < plan, "{peak:.0}, {seen:.0} and {plan:.0} MiB");
    assert!((0.9..1.1).contains(&(peak / seen)), "{peak:.0} of {seen:.0} MiB");
}

/// Every run is a process of its own, so that its peak is its own.
#[test]
#[cfg(target_os = "linux")]
fn the_measured_peak_is_within_a_tenth_of_the_plan() {
    let folder = Folder::new(RECIPE);
    let mut peaks = Vec::new();
    for (name, sets) in [
        ("kept", vec!["train.recompute=off"]),
        ("again", vec!["train.recompute=on", "devices.memory_mb=240"]),
        ("bf16", vec!["model.precision=bf16"]),
    ] {
        let run = folder.run(name, &[&WIDE[..], &sets[..]].concat());
        let summary = summary(&run);
        let [peak, plan] = ["rss_peak_bytes", "memory_plan_bytes"].map(|key| summary[key].as_f64().unwrap());
        println!("{name}: peak {:.0} MiB, {:.3} of the plan", peak / f64::from(1 << 20), peak / plan);
        peaks.push((name, peak / plan));
    }
    for (name, ratio) in peaks {
        assert!((0.9..1.1).contains(&ratio), "{name}: the peak is {ratio:.3} times the plan");
    }
}
