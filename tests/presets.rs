//! Every named algorithm through a real run: it trains, and neither threads, micro-batches nor a restart change a bit.

#[path = "support/runs.rs"]
mod runs;

use std::fs;
use std::path::Path;
use std::sync::atomic::AtomicBool;

use rft_engine::config::Recipe;
use rft_engine::loss::presets;
use rft_engine::train::Run;
use runs::timeless_metrics as metrics;
use serde_json::{Map, Value};

/// Steps of imitation before the first one of reinforcement.
const SFT: u64 = 30;

const RECIPE: &str = r#"
name = "test"
[model.new]
hidden = 64
layers = 2
heads = 2
kv_heads = 1
head_dim = 32
ffn = 128
[data]
heldout = 2
[data.arithmetic]
max_operand = 9
problems = 40
demo_noise = 0.4
[[reward]]
script = "math"
[[reward]]
script = "format"
[rollout]
prompts_per_step = 5
group_size = 6
max_new_tokens = 20
[optimizer]
lr = 1e-3
[train]
steps = 2
inner_epochs = 2
checkpoint_every = 1
keep_checkpoints = 3
[[stage]]
kind = "sft"
steps = 30
lr = 3e-3
batch = 16
[[stage]]
kind = "grpo"
"#;

/// Recipes under test: every preset, and what presets leave out.
fn variants() -> Vec<(String, Vec<&'static str>)> {
    let presets = presets::NAMES.iter().map(|name| (name.to_string(), vec![]));
    let more = [
        ("ppo separate", vec!["algorithm.critic.trunk=\"separate\"", "algorithm.critic.lr=1e-3"]),
        ("ppo warm-up", vec!["algorithm.critic.warmup_steps=1"]),
        (
            "ppo separate warm-up",
            vec!["algorithm.critic.trunk=\"separate\"", "algorithm.critic.warmup_steps=1"],
        ),
        ("ppo alone", vec!["rollout.group_size=1", "rollout.prompts_per_step=12"]),
        ("remax alone", vec!["rollout.group_size=1", "rollout.prompts_per_step=12"]),
        ("grpo returns", vec!["algorithm.advantage.credit=\"returns\"", "algorithm.advantage.gamma=0.98"]),
        (
            "grpo entropy",
            vec![
                "algorithm.objective.top_entropy=0.5",
                "algorithm.objective.entropy_coefficient=0.01",
                "algorithm.objective.entropy_control={adaptive={target=5.0, delta=0.01, min=0.0, max=0.1}}",
                "algorithm.objective.off_policy_limit=0.001",
                "algorithm.objective.delta=1.5",
                "algorithm.mask_truncated=true",
            ],
        ),
    ];
    presets.chain(more.map(|(name, sets)| (name.to_string(), sets))).collect()
}

fn recipe(name: &str, sets: &[&str], more: &[String]) -> Recipe {
    let preset = name.split(' ').next().unwrap();
    let mut all = vec![format!("algorithm.preset=\"{preset}\"")];
    all.extend(sets.iter().map(|s| s.to_string()));
    all.extend_from_slice(more);
    Recipe::parse(RECIPE, "test", &all).unwrap_or_else(|e| panic!("{name}: {e}"))
}

fn train(recipe: Recipe, root: &Path, resume: bool) {
    Run::prepare(recipe).unwrap().train(root, resume, &AtomicBool::new(false)).unwrap();
}

/// Metrics that are f64 sums over micro-batches; everything else must be the same to the bit.
const SUMS: [&str; 7] =
    ["loss", "kl", "entropy", "value_loss", "value_mean", "explained_variance", "kl_coefficient"];

fn same(name: &str, a: &[Map<String, Value>], b: &[Map<String, Value>]) {
    for (a, b) in a.iter().zip(b) {
        assert!(a.keys().eq(b.keys()), "{name}");
        for (key, a) in a {
            let near = match (a.as_f64(), b[key].as_f64()) {
                (Some(a), Some(b)) if SUMS.contains(&key.as_str()) => {
                    (a - b).abs() < 1e-12 * a.abs().max(1.0)
                }
                _ => *a == b[key],
            };
            assert!(near, "{name}: {key} is {a} or {}", b[key]);
        }
    }
}

fn weights(root: &Path, step: u64) -> Vec<u8> {
    fs::read(root.join(format!("checkpoints/step-{step:08}/weights.f32"))).unwrap()
}

/// Settings under which a micro-batch holds a group or two of the five.
fn cut_finely(name: &str, sets: &[&str], from: &mut u32) -> Vec<String> {
    // what one variant needs is near what the one before needed
    for mb in *from..140 {
        let more = vec![format!("devices.memory_mb={mb}"), "devices.threads=2".into()];
        let plan = Run::prepare(recipe(name, sets, &more)).map(|run| run.plan().max_rows);
        if plan.is_ok_and(|rows| (160..400).contains(&rows)) {
            *from = mb.saturating_sub(3).max(20);
            return more;
        }
    }
    panic!("{name}: no memory budget cuts the step")
}

#[test]
fn every_algorithm_trains_to_the_same_bits_however_it_is_cut() {
    let mut budget = 20;
    for (name, sets) in variants() {
        let folder = tempfile::tempdir().unwrap();
        let (one, two) = (folder.path().join("one"), folder.path().join("two"));
        train(recipe(&name, &sets, &["devices.threads=1".into()]), &one, false);
        let rows = metrics(&one);
        assert_eq!(rows.len(), 2, "{name}");
        for row in &rows {
            let number = |key: &str| row[key].as_f64().unwrap_or(f64::NAN);
            let numbers = ["loss", "grad_norm", "entropy", "kl"].map(number);
            assert!(numbers.iter().all(|x| x.is_finite()), "{name}: {row:?}");
            assert_eq!(number("ratio_max_dev"), 0.0, "{name}");
            if name.starts_with("ppo") {
                let own =
                    ["value_loss", "value_clip_fraction", "explained_variance", "value_mean"].map(number);
                assert!(own.iter().all(|x| x.is_finite()) && own[0] > 0.0, "{name}: {row:?}");
            }
        }
        assert!(rows[1]["grad_norm"].as_f64().unwrap() > 0.0, "{name}: nothing to learn from");
        assert_ne!(weights(&one, SFT), weights(&one, SFT + 2), "{name}");
        let warms_up = name.ends_with("warm-up");
        assert_eq!(
            weights(&one, SFT) == weights(&one, SFT + 1),
            warms_up,
            "{name}: a warm-up leaves the policy"
        );

        train(recipe(&name, &sets, &cut_finely(&name, &sets, &mut budget)), &two, false);
        same(&name, &rows, &metrics(&two));
        assert_eq!(weights(&one, SFT + 2), weights(&two, SFT + 2), "{name}");
        println!("{name}: loss {} then {}", rows[0]["loss"], rows[1]["loss"]);
    }
}

#[test]
fn a_critic_is_in_every_checkpoint() {
    for sets in [vec![], vec!["algorithm.critic.trunk=\"separate\""]] {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().join("run");
        train(recipe("ppo", &sets, &[]), &root, false);
        let (whole, rows) = (weights(&root, SFT + 2), metrics(&root));
        let head = |root: &Path| fs::read(root.join("checkpoints/step-00000032/critic_head.f32")).unwrap();
        let learned = head(&root);
        assert!(learned.iter().any(|b| *b != 0));
        fs::remove_dir_all(root.join("checkpoints/step-00000032")).unwrap();
        train(recipe("ppo", &sets, &[]), &root, true);
        assert_eq!((weights(&root, SFT + 2), head(&root)), (whole, learned), "{sets:?}");
        assert_eq!(metrics(&root), rows);
        let files: Vec<String> = fs::read_dir(root.join("final"))
            .unwrap()
            .map(|e| e.unwrap().file_name().to_string_lossy().into_owned())
            .collect();
        let model = fs::read(root.join("final/model.safetensors")).unwrap();
        assert!(!String::from_utf8_lossy(&model[..4096.min(model.len())]).contains("value"), "{files:?}");
    }
}
