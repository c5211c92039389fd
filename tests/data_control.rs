//! Which prompts a step gets: tasks and their mixture, refill, filter, curriculum, replay; each the same bytes on one
//! thread or two, cut off and resumed or not.

#[path = "support/runs.rs"]
mod runs;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use runs::{Folder, lines, program, stderr, summary, timeless_metrics, weights};
use serde_json::{Map, Value};

const MODEL: &str = r#"
[model.new]
hidden = 64
layers = 2
heads = 2
kv_heads = 1
head_dim = 32
ffn = 128
[rollout]
prompts_per_step = 6
group_size = 4
max_new_tokens = 20
[optimizer]
lr = 1e-3
[train]
steps = 6
checkpoint_every = 1
keep_checkpoints = 99
[eval]
temperature = 1.0
"#;

const ONE_TASK: &str = r#"
[data]
heldout = 8
arithmetic = { max_operand = 9, problems = 40, demo_noise = 0.3 }
[[reward]]
script = "math"
[[reward]]
script = "format"
weight = 0.2
[[stage]]
kind = "sft"
steps = 60
lr = 3e-3
batch = 16
[[stage]]
kind = "grpo"
"#;

const TWO_TASKS: &str = r#"
[data]
heldout = 8
[[task]]
name = "add"
arithmetic = { max_operand = 9, problems = 40, demo_noise = 0.3 }
weight = 2.0
[[task]]
name = "subtract"
arithmetic = { max_operand = 9, problems = 30, demo_noise = 0.3, operation = "subtract" }
[[reward]]
script = "math"
[[reward]]
script = "format"
weight = 0.2
tasks = ["subtract"]
[algorithm.objective.kl]
coefficient = 0.01
[[stage]]
kind = "sft"
steps = 40
lr = 3e-3
batch = 16
[[stage]]
kind = "grpo"
steps = 2
[[stage]]
kind = "grpo"
steps = 3
tasks = ["subtract"]
[stage.algorithm.objective.kl]
coefficient = 0.0
[[stage]]
kind = "grpo"
steps = 2
tasks = ["subtract", "add"]
weights = [1.0, 5.0]
"#;

/// What a run says of itself, times aside.
#[derive(PartialEq, Debug)]
struct Record {
    metrics: Vec<Map<String, Value>>,
    samples: Vec<u8>,
    dropped: Option<Vec<u8>>,
    matrix: Value,
    weights: blake3::Hash,
}

fn record(run: &Path) -> Record {
    Record {
        metrics: timeless_metrics(run),
        samples: std::fs::read(run.join("samples.jsonl")).unwrap(),
        dropped: std::fs::read(run.join("dropped.jsonl")).ok(),
        matrix: summary(run)["task_matrix"].clone(),
        weights: blake3::hash(&weights(run)),
    }
}

/// Runs a recipe on two threads, on one, and resumed after each of the `cuts`; all must tell the same.
fn same_however_run(recipe: &str, sets: &[&str], cuts: &[u64]) -> (Folder, Record) {
    let folder = Folder::new(&format!("{MODEL}{recipe}"));
    let launch = |run: &str, threads: &str| record(&folder.run(run, &[sets, &[threads]].concat()));
    let (two, one) = (launch("two", "devices.threads=2"), launch("one", "devices.threads=1"));
    assert_eq!(two, one, "threads can be seen");
    for &keep in cuts {
        let run = folder.resumed(&folder.at("two"), &format!("cut-{keep}"), keep);
        assert_eq!(two, record(&run), "resuming after {keep} can be seen");
    }
    (folder, two)
}

fn one_task(sets: &[&str], cuts: &[u64]) -> (Folder, Record) {
    same_however_run(ONE_TASK, sets, cuts)
}

fn number(row: &Map<String, Value>, key: &str) -> f64 {
    row.get(key).and_then(Value::as_f64).unwrap_or_else(|| panic!("no {key} in {row:?}"))
}

#[test]
fn stages_draw_their_tasks_by_weight_and_leave_a_matrix() {
    let (folder, record) = same_however_run(TWO_TASKS, &[], &[42, 43, 45, 46]);
    let mut counts: BTreeMap<(u64, String), usize> = BTreeMap::new();
    for row in lines(&folder.at("two/samples.jsonl")) {
        let task = row["task"].as_str().unwrap().to_string();
        let components = row["components"].as_object().unwrap();
        assert_eq!(components.contains_key("format"), task == "subtract", "{row:?}");
        let sign = if task == "add" { "+" } else { "-" };
        assert!(row["prompt"].as_str().unwrap().contains(sign));
        *counts.entry((row["step"].as_u64().unwrap(), task)).or_default() += 1;
    }
    let prompts = |step: u64, task: &str| counts.get(&(step, task.to_string())).copied().unwrap_or(0) / 4;
    for (step, add) in [(1, 4), (2, 4), (3, 0), (4, 0), (5, 0), (6, 5), (7, 5)] {
        assert_eq!((prompts(step, "add"), prompts(step, "subtract")), (add, 6 - add), "step {step}");
    }
    for row in &record.metrics {
        let expected = if (3..=5).contains(&row["step"].as_u64().unwrap()) { 0.0 } else { 0.01 };
        assert_eq!(number(row, "kl_coefficient"), expected, "{row:?}");
    }

    let matrix = &record.matrix;
    assert_eq!(matrix["tasks"], serde_json::json!(["add", "subtract"]));
    let after = matrix["after_stage"].as_array().unwrap();
    assert_eq!(after.len(), 4);
    let last = after[3].as_array().unwrap().iter().map(|v| v.as_f64().unwrap());
    let mean = last.sum::<f64>() / 2.0;
    assert!((matrix["average"].as_f64().unwrap() - mean).abs() < 1e-12, "{matrix}");
    // the tasks hold out equally many prompts, so the run's own result is the mean of the last row
    let whole = summary(&folder.at("two"))["eval_after"].as_f64().unwrap();
    assert!((whole - mean).abs() < 1e-12, "{whole} {mean}");
    assert_eq!(matrix["trained"][2], serde_json::json!([false, true]));
    let page = std::fs::read_to_string(folder.at("two/report.html")).unwrap();
    assert!(page.contains("after 3 grpo subtract"));
}

#[test]
fn refill_replaces_groups_without_variance() {
    let (folder, record) = one_task(&["rollout.dynamic.max_rounds=3"], &[62, 64]);
    let mut refilled = 0;
    let samples = lines(&folder.at("two/samples.jsonl"));
    for row in &record.metrics {
        let (drawn, kept) = (number(row, "groups_drawn"), number(row, "groups_kept"));
        assert!(kept <= 6.0 && (6.0..=18.0).contains(&drawn), "{row:?}");
        assert_eq!(drawn - kept, number(row, "zero_variance_groups"), "{row:?}");
        refilled += usize::from(drawn > 6.0);
        let of_step: Vec<_> = samples.iter().filter(|s| s["step"] == row["step"]).collect();
        assert_eq!(of_step.len() as f64, 4.0 * drawn);
        let taught = of_step.iter().filter(|s| s["advantage"] != 0.0).count() as f64;
        assert!(taught <= 4.0 * kept && taught > 0.0);
        let mean = of_step.iter().map(|s| s["reward"].as_f64().unwrap()).sum::<f64>() / of_step.len() as f64;
        assert!((mean - number(row, "reward_mean")).abs() < 1e-9, "the mean is of all that was drawn");
    }
    assert!(refilled > 0, "no step needed a second round: {:?}", record.metrics);
}

#[test]
fn the_filter_drops_prompts_before_and_during_training_and_says_which() {
    let sets = [
        "data.filter={samples=4, patience=1, min_rate=0.2, max_rate=1.0}",
        "rollout.prompts_per_step=4",
        "rollout.max_new_tokens=24",
    ];
    let (folder, record) = one_task(&sets, &[60, 61, 64]);
    let mut gone: BTreeMap<String, u64> = BTreeMap::new();
    for row in lines(&folder.at("two/dropped.jsonl")) {
        let rate = row["rate"].as_f64().unwrap();
        assert!(rate <= 0.2 + 1e-9 || rate >= 1.0 - 1e-9, "{row:?}");
        gone.insert(row["id"].as_str().unwrap().into(), row["step"].as_u64().unwrap());
    }
    assert!(gone.values().any(|step| *step == 0), "the pass dropped nothing: {gone:?}");
    assert!(gone.values().any(|step| *step > 0), "training dropped nothing: {gone:?}");
    for row in lines(&folder.at("two/samples.jsonl")) {
        let dropped = gone.get(row["id"].as_str().unwrap());
        assert!(dropped.is_none_or(|step| row["step"].as_u64().unwrap() <= *step), "{row:?}");
    }
    assert_eq!(number(record.metrics.last().unwrap(), "prompts_dropped") as usize, gone.len());
}

#[test]
fn a_curriculum_by_column_widens() {
    let sets = ["data.curriculum={kind=\"widening\", column=\"difficulty\", start=0.3, by=1.0}"];
    let (folder, _) = one_task(&sets, &[30, 63]);
    let mean = |steps: std::ops::RangeInclusive<u64>| {
        let rows = lines(&folder.at("two/samples.jsonl"));
        let of: Vec<f64> = (rows.iter())
            .filter(|r| steps.contains(&r["step"].as_u64().unwrap()))
            .map(|r| r["difficulty"].as_f64().unwrap())
            .collect();
        of.iter().sum::<f64>() / of.len() as f64
    };
    assert!(mean(1..=2) < mean(5..=6), "{} {}", mean(1..=2), mean(5..=6));
    assert_eq!(mean(1..=1), 0.0, "a sum of digits without a carry is the easiest");
}

#[test]
fn a_curriculum_by_pass_rate_returns_to_what_is_neither_solved_nor_hopeless() {
    let sets = ["data.curriculum={kind=\"pass_rate\", target=0.6, width=0.15, floor=0.01}", "train.steps=14"];
    let (folder, _) = one_task(&sets, &[61, 70]);
    let mut rates: BTreeMap<String, f64> = BTreeMap::new();
    let (mut drawn, mut all) = (Vec::new(), Vec::new());
    let rows = lines(&folder.at("two/samples.jsonl"));
    for step in rows.chunk_by(|a, b| a["step"] == b["step"]) {
        let before = rates.clone();
        for group in step.chunks(4) {
            let id = group[0]["id"].as_str().unwrap().to_string();
            let rate = group.iter().map(|s| s["reward"].as_f64().unwrap() / 1.2).sum::<f64>() / 4.0;
            if let Some(known) = before.get(&id) {
                drawn.push((known - 0.6).abs());
                all.push(before.values().map(|r| (r - 0.6).abs()).sum::<f64>() / before.len() as f64);
            }
            rates.entry(id).and_modify(|old| *old = 0.5 * (*old + rate)).or_insert(rate);
        }
    }
    let mean = |distances: &[f64]| distances.iter().sum::<f64>() / distances.len() as f64;
    assert!(drawn.len() > 12 && mean(&drawn) < 0.8 * mean(&all), "{} {}", mean(&drawn), mean(&all));
}

#[test]
fn past_groups_come_again_with_the_logprobs_that_sampled_them() {
    for sets in [
        &["rollout.replay={share=0.34, capacity=8, max_age=3}"][..],
        &[
            "rollout.replay={share=0.34, capacity=8, keep=\"best\"}",
            "algorithm.objective.sampler_correction={level=\"token\"}",
        ],
    ] {
        let (folder, record) = one_task(sets, &[61, 64]);
        let corrected = sets.len() > 1;
        let mut replayed = 0.0;
        for row in &record.metrics {
            replayed += number(row, "replayed_groups");
            // what this step drew is exactly on-policy, what it replays is not
            assert_eq!(number(row, "ratio_max_dev"), 0.0, "{row:?}");
            if number(row, "replayed_groups") > 0.0 {
                let moved = number(row, "replayed_ratio_max_dev");
                assert_eq!(moved > 0.0, !corrected, "with a correction ratios start at 1: {row:?}");
                assert!(number(row, "replayed_age_mean") >= 1.0);
            }
        }
        assert!(replayed >= 6.0, "{:?}", record.metrics);
        let fresh = lines(&folder.at("two/samples.jsonl")).len() as f64 / 4.0;
        assert_eq!(fresh + replayed, 36.0, "a step has six groups, fresh or past");
    }
}

#[test]
fn everything_at_once_is_still_a_function_of_the_checkpoint() {
    let sets = [
        "data.filter={patience=2, max_rate=1.0}",
        "data.curriculum={kind=\"pass_rate\"}",
        "rollout.dynamic.max_rounds=2",
        "rollout.replay={share=0.2}",
        "train.inner_epochs=2",
    ];
    let (_, record) = same_however_run(TWO_TASKS, &sets, &[42, 44]);
    assert_eq!(record.metrics.len(), 7);
}

#[test]
fn contradictions_are_refused_with_a_remedy() {
    let (one, two) =
        (Folder::new(&format!("{MODEL}{ONE_TASK}")), Folder::new(&format!("{MODEL}{TWO_TASKS}")));
    let refuse = |folder: &Folder, set: &str, words: &[&str]| {
        let output = folder.launch("refused", &[set]);
        let text = stderr(&output);
        assert!(!output.status.success(), "{set} was accepted");
        assert!(words.iter().all(|w| text.contains(w)), "{set}: {text}");
        assert!(!folder.at("refused").exists(), "{set} left a run folder");
    };
    refuse(&one, "stage.1.tasks=[\"add\"]", &["no [[task]]", "hint"]);
    refuse(&one, "data.filter={samples=4}", &["at least one bound"]);
    refuse(&one, "data.filter={min_rate=0.5}", &["samples", "patience"]);
    refuse(&one, "data.filter={samples=2, min_rate=0.5, max_rate=0.4}", &["not below"]);
    refuse(&one, "data.curriculum={kind=\"sorted\", column=\"hardness\"}", &["hardness", "hint"]);
    refuse(&one, "data.curriculum={kind=\"pass_rate\", target=2.0}", &["target", "between"]);
    refuse(&one, "data.curriculum={kind=\"widening\"}", &["column"]);
    refuse(&one, "rollout.dynamic.max_rounds=0", &["at least 1"]);
    refuse(&one, "rollout.dynamic.max_round=2", &["max_round", "`max_rounds`"]);
    refuse(&one, "rollout.replay.share=1.5", &["between 0 and 1", "hint"]);
    refuse(&one, "rollout.replay={share=0.5, capacity=1}", &["capacity", "raise"]);
    refuse(&one, "algorithm.objective.sampler_correction.level=\"token\"", &["[rollout.replay]"]);
    refuse(&two, "data.arithmetic.max_operand=3", &["belong to a task", "hint"]);
    refuse(&two, "stage.2.tasks=[\"multiply\"]", &["multiply", "add, subtract"]);
    refuse(&two, "stage.3.weights=[1.0]", &["one weight a name"]);
    refuse(&two, "stage.3.weights=[1.0, -1.0]", &["positive"]);
    refuse(&two, "task.1.name=\"add\"", &["two tasks"]);
    refuse(&two, "task.0.weight=0.0", &["positive", "stage.tasks"]);
    refuse(&two, "reward.0.tasks=[\"subtract\"]", &["task add has no reward", "hint"]);
    refuse(&two, "reward.1.tasks=[\"sub\"]", &["sub", "add, subtract"]);
    refuse(&two, "stage.2.algorithm.preset=\"grop\"", &["stage.2.algorithm.preset", "grpo"]);
    refuse(&two, "stage.2.algorithm.objective.top_entropy=0.0", &["top_entropy"]);

    let all: BTreeSet<String> =
        lines_of_dry_run(&two).lines().filter_map(|l| l.strip_prefix("name = ")).map(String::from).collect();
    assert!(all.contains("\"add\"") && all.contains("\"subtract\""), "{all:?}");
}

/// A resolved recipe reads back: what the run folder holds is what resumes.
fn lines_of_dry_run(folder: &Folder) -> String {
    let dry = program(&["launch", folder.at("recipe.toml").to_str().unwrap(), "--dry-run"]);
    assert!(dry.status.success(), "{}", stderr(&dry));
    let text = String::from_utf8_lossy(&dry.stdout).into_owned();
    std::fs::write(folder.at("again.toml"), &text).unwrap();
    let again = program(&["launch", folder.at("again.toml").to_str().unwrap(), "--dry-run"]);
    assert_eq!(text, String::from_utf8_lossy(&again.stdout));
    text
}
