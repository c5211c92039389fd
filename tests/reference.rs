//! The reference policy: what each kind compares with, what it costs, and that a resumed run has the very same one.

#[path = "support/runs.rs"]
mod runs;

use std::path::Path;

use runs::{Folder, lines, program, stderr, weights};

/// A warm-up and two stages of reinforcement; every checkpoint is kept.
const RECIPE: &str = r#"
name = "reference"
[model.new]
hidden = 32
layers = 2
heads = 2
kv_heads = 1
head_dim = 16
ffn = 64
[data]
heldout = 4
[data.arithmetic]
max_operand = 9
problems = 30
[[reward]]
script = "format"
[rollout]
prompts_per_step = 3
group_size = 4
max_new_tokens = 8
[algorithm.objective]
entropy_coefficient = 0.01
[algorithm.objective.kl]
coefficient = 0.1
[optimizer]
lr = 3e-3
[train]
checkpoint_every = 1
keep_checkpoints = 99
[[stage]]
kind = "sft"
steps = 2
batch = 4
[[stage]]
kind = "grpo"
steps = 3
[[stage]]
kind = "grpo"
steps = 3
"#;

/// (recipe's value, GRPO steps at whose start the policy is the reference itself).
const KINDS: [(&str, &[u64]); 6] = [
    (r#"{kind = "initial"}"#, &[1]),
    (r#"{kind = "base"}"#, &[]),
    (r#"{kind = "stage"}"#, &[1, 4]),
    (r#"{kind = "refreshed", every = 2}"#, &[1, 3, 5]),
    (r#"{kind = "ema", decay = 0.5, every = 2}"#, &[1]),
    (r#"{kind = "ema", decay = 0.0}"#, &[1, 2, 3, 4, 5, 6]),
];

/// The same recipe with an adapter on a model of its own making.
fn lora() -> Folder {
    let place = Folder::new(RECIPE);
    let first = place.run("first", &["stage=[{kind = \"sft\", steps = 1, batch = 2}]"]);
    let text = RECIPE.split("[model.new]").next().unwrap().to_string()
        + "[data]"
        + RECIPE.split("[data]").nth(1).unwrap()
        + &format!("[model]\npath = {:?}\n[model.lora]\nrank = 4\n", first.join("final"));
    place.write("recipe.toml", &text);
    place
}

/// MiB of the reference in the memory plan.
fn planned(place: &Folder, sets: &[&str]) -> u64 {
    let recipe = place.at("recipe.toml");
    let mut args = vec!["launch", recipe.to_str().unwrap(), "--dry-run"];
    sets.iter().for_each(|set| args.extend(["--set", set]));
    let output = program(&args);
    assert!(output.status.success(), "{}", stderr(&output));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let line = text.lines().find(|l| l.starts_with("#  reference ")).unwrap();
    line.split_whitespace().nth(2).unwrap().parse().unwrap()
}

fn kls(run: &Path) -> Vec<f64> {
    lines(&run.join("metrics.jsonl")).iter().map(|row| row["kl"].as_f64().unwrap()).collect()
}

/// Each kind is the policy itself exactly where it should be, and every resumed run ends in the same bytes.
fn each_kind_is_what_it_says_and_resumes(place: &Folder) {
    for (i, (kind, same)) in KINDS.iter().enumerate() {
        let whole = place.run(&format!("whole-{i}"), &[&format!("algorithm.reference={kind}")]);
        for (step, kl) in (1..).zip(kls(&whole)) {
            assert_eq!(kl == 0.0, same.contains(&step), "{kind}: KL {kl} at step {step}");
        }
        for last in [1, 3, 4, 5, 7] {
            let cut = place.resumed(&whole, &format!("cut-{i}-{last}"), last);
            assert_eq!(weights(&whole), weights(&cut), "{kind} from checkpoint {last}");
            assert_eq!(kls(&whole), kls(&cut), "{kind} from checkpoint {last}");
        }
    }
}

#[test]
fn each_kind_with_full_fine_tuning() {
    each_kind_is_what_it_says_and_resumes(&Folder::new(RECIPE));
}

#[test]
fn each_kind_with_an_adapter() {
    each_kind_is_what_it_says_and_resumes(&lora());
}

#[test]
fn a_reference_is_planned_for_and_with_an_adapter_it_costs_the_adapter_at_most() {
    let (full, lora) = (Folder::new(RECIPE), lora());
    let no_warm_up = r#"stage=[{kind = "grpo", steps = 1}]"#;
    assert_eq!(planned(&full, &["algorithm.objective.kl.coefficient=0.0"]), 0);
    assert_eq!(planned(&full, &[]), 1);
    assert_eq!(planned(&lora, &[no_warm_up]), 0, "a new adapter switched off is the initial policy");
    assert_eq!(planned(&lora, &[r#"algorithm.reference={kind = "base"}"#]), 0);
    assert_eq!(planned(&lora, &[]), 1, "after a warm-up it is not");

    // and then the two are the same policy: KL 0 at the first step of both
    let run = lora.run("cold", &[no_warm_up]);
    assert_eq!(kls(&run), [0.0]);
    assert!(!run.join("checkpoints/reference").exists());
}

#[test]
fn kinds_that_cannot_work_are_refused() {
    for (value, says) in [
        (r#"{kind = "refreshed", every = 0}"#, "algorithm.reference.every"),
        (r#"{kind = "ema", decay = 1.0}"#, "algorithm.reference.decay"),
        (r#"{kind = "ema", dekay = 0.5}"#, "dekay"),
        (r#"{kind = "frozen"}"#, "frozen"),
    ] {
        let set = format!("algorithm.reference={value}");
        let error = rft_engine::config::Recipe::load(None, &[set]).unwrap_err().to_string();
        assert!(error.contains(says), "{value}: {error}");
    }
}
