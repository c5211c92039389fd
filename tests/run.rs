//! Whole runs of the program: learning, determinism, resumption, refusals.

#[path = "support/runs.rs"]
mod runs;

use std::path::{Path, PathBuf};
use std::process::Command;

use runs::{Folder, lines, program, stderr, timeless_metrics, weights};
use serde_json::Value;

/// A short run: a small model, a warm-up, a few steps, a checkpoint every other one.
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
heldout = 16
[data.arithmetic]
max_operand = 9
problems = 60
demo_noise = 0.3
[[reward]]
script = "math"
[[reward]]
script = "format"
weight = 0.2
[rollout]
prompts_per_step = 6
group_size = 6
max_new_tokens = 24
[algorithm.objective.kl]
coefficient = 0.01
[optimizer]
lr = 1e-3
[train]
steps = 6
checkpoint_every = 2
[eval]
temperature = 1.0
[[stage]]
kind = "sft"
steps = 40
lr = 3e-3
batch = 16
[[stage]]
kind = "grpo"
"#;

#[test]
fn equal_seeds_give_equal_bytes_on_one_thread_and_on_two() {
    let folder = Folder::new(RECIPE);
    let one = folder.launch("one", &["devices.threads=1"]);
    assert!(one.status.success(), "{}", stderr(&one));
    let two = folder.launch("two", &["devices.threads=2"]);
    assert!(two.status.success(), "{}", stderr(&two));
    assert_eq!(timeless_metrics(&folder.at("one")), timeless_metrics(&folder.at("two")));
    assert_eq!(weights(&folder.at("one")), weights(&folder.at("two")));
    let read = |run: &str| std::fs::read(folder.at(run).join("samples.jsonl")).unwrap();
    assert_eq!(read("one"), read("two"));

    let rows = lines(&folder.at("one").join("metrics.jsonl"));
    assert_eq!(rows.len(), 6);
    for row in &rows {
        assert_eq!(row["ratio_max_dev"], 0.0, "the learner recomputes what was sampled exactly: {row:?}");
        assert!(row["grad_norm"].as_f64().unwrap() > 0.0);
    }
    let other = folder.launch("other", &["seed=9"]);
    assert!(other.status.success(), "{}", stderr(&other));
    assert_ne!(weights(&folder.at("one")), weights(&folder.at("other")));
}

#[test]
fn a_run_cut_off_anywhere_resumes_to_the_same_bytes() {
    let folder = Folder::new(RECIPE);
    let whole = folder.launch("whole", &[]);
    assert!(whole.status.success(), "{}", stderr(&whole));
    let copy = |from: &Path, to: &Path| {
        let status = Command::new("cp").arg("-r").arg(from).arg(to).status().unwrap();
        assert!(status.success());
    };
    // what a kill leaves: the last two checkpoints are kept, so both of the run's ends can be tried
    let run = folder.at("cut");
    copy(&folder.at("whole"), &run);
    let mut checkpoints: Vec<PathBuf> =
        std::fs::read_dir(run.join("checkpoints")).unwrap().map(|e| e.unwrap().path()).collect();
    checkpoints.retain(|p| p.file_name().unwrap().to_string_lossy().starts_with("step-"));
    checkpoints.sort();
    assert_eq!(checkpoints.len(), 2);
    // the newest one torn, files of the future left over, a half-written line
    let newest = checkpoints.last().unwrap().join("weights.f32");
    let bytes = std::fs::read(&newest).unwrap();
    std::fs::write(&newest, &bytes[..bytes.len() / 2]).unwrap();
    std::fs::remove_dir_all(run.join("final")).unwrap();
    std::fs::remove_file(run.join("summary.json")).unwrap();
    let metrics = run.join("metrics.jsonl");
    std::fs::write(&metrics, std::fs::read_to_string(&metrics).unwrap() + "{\"step\": 7, \"rew").unwrap();
    let resumed = program(&["launch", "--run-dir", run.to_str().unwrap(), "--resume"]);
    assert!(resumed.status.success(), "{}", stderr(&resumed));
    assert!(stderr(&resumed).contains("torn or altered"), "{}", stderr(&resumed));
    assert_eq!(weights(&folder.at("whole")), weights(&run));
    assert_eq!(timeless_metrics(&folder.at("whole")), timeless_metrics(&run));
    let samples = |run: &Path| std::fs::read(run.join("samples.jsonl")).unwrap();
    assert_eq!(samples(&folder.at("whole")), samples(&run));
}

#[cfg(unix)]
#[test]
fn a_killed_run_resumes_to_the_same_bytes() {
    let folder = Folder::new(RECIPE);
    let whole = folder.launch("whole", &[]);
    assert!(whole.status.success(), "{}", stderr(&whole));
    let run = folder.at("killed");
    for attempt in 0..4 {
        let (recipe, root) = (folder.at("recipe.toml"), run.to_str().unwrap().to_string());
        let mut args = vec!["launch".to_string(), "--run-dir".to_string(), root.clone()];
        if run.exists() {
            args.push("--resume".into());
        } else {
            args.insert(1, recipe.display().to_string());
        }
        let mut child = Command::new(env!("CARGO_BIN_EXE_rft-engine")).args(&args).spawn().unwrap();
        std::thread::sleep(std::time::Duration::from_millis(150 + 250 * attempt));
        // SIGKILL: nothing in the program gets to run
        child.kill().unwrap();
        child.wait().unwrap();
    }
    let resumed = program(&["launch", "--run-dir", run.to_str().unwrap(), "--resume"]);
    assert!(resumed.status.success(), "{}", stderr(&resumed));
    assert_eq!(weights(&folder.at("whole")), weights(&run));
    assert_eq!(timeless_metrics(&folder.at("whole")), timeless_metrics(&run));
}

#[test]
fn the_default_recipe_raises_the_held_out_reward_early() {
    let folder = Folder::new(RECIPE);
    let root = folder.at("learns");
    // a fifth of the recipe's steps: from about 0.5 to about 0.9 in the recorded runs of five seeds
    let run = program(&["launch", "--run-dir", root.to_str().unwrap(), "--set", "train.steps=32"]);
    assert!(run.status.success(), "{}", stderr(&run));
    let summary: Value = serde_json::from_slice(&std::fs::read(root.join("summary.json")).unwrap()).unwrap();
    let (before, after) = (summary["eval_before"].as_f64().unwrap(), summary["eval_after"].as_f64().unwrap());
    assert!(after > before + 0.2, "{before} -> {after}");
    assert_eq!(summary["steps"], 32);
    for name in ["recipe.toml", "metrics.jsonl", "samples.jsonl", "report.html", "final/config.json"] {
        assert!(root.join(name).is_file(), "{name} is missing");
    }
}

#[test]
fn stored_rewards_are_reproduced_by_score_and_logprobs_by_logprobs() {
    let folder = Folder::new(RECIPE);
    let run = folder.launch("run", &["train.steps=1"]);
    assert!(run.status.success(), "{}", stderr(&run));
    let samples = folder.at("run/samples.jsonl");
    let scored =
        program(&["score", "--reward", "math", "--reward", "format", "--data", samples.to_str().unwrap()]);
    assert!(scored.status.success(), "{}", stderr(&scored));
    let rows: Vec<Value> =
        String::from_utf8_lossy(&scored.stdout).lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    assert_eq!(rows.len(), 36);
    for (stored, row) in lines(&samples).iter().zip(&rows) {
        assert_eq!(stored["components"], row["components"]);
        assert!(row.get("differences").is_none() && row["error"].is_null(), "{row}");
    }

    let model = folder.at("run/final");
    let generated = program(&[
        "generate",
        "--model",
        model.to_str().unwrap(),
        "--prompt",
        "3+4=",
        "--n",
        "3",
        "--max-new-tokens",
        "20",
        "--temperature",
        "0.9",
    ]);
    assert!(generated.status.success(), "{}", stderr(&generated));
    let file = folder.at("generated.jsonl");
    std::fs::write(&file, &generated.stdout).unwrap();
    let rescored =
        program(&["logprobs", "--model", model.to_str().unwrap(), "--data", file.to_str().unwrap()]);
    assert!(rescored.status.success(), "{}", stderr(&rescored));
    let again: Vec<Value> =
        String::from_utf8_lossy(&rescored.stdout).lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    assert_eq!(again.len(), 3);
    for (sampled, again) in lines(&file).iter().zip(&again) {
        assert_eq!(sampled["logprobs"], again["logprobs"]);
    }
}

#[test]
fn what_cannot_work_is_refused_with_its_place() {
    let folder = Folder::new(RECIPE);
    let refuse = |sets: &[&str], words: &[&str]| {
        let output = folder.launch("refused", sets);
        let text = stderr(&output);
        assert!(!output.status.success(), "{sets:?} was accepted");
        assert!(words.iter().all(|w| text.contains(w)), "{sets:?}: {text}");
        assert!(!folder.at("refused").exists(), "{sets:?} left a run folder");
    };
    refuse(&["rollout.group_sise=4"], &["group_sise", "group_size"]);
    refuse(&["rollout.group_size=1"], &["group_size", "at least 2"]);
    refuse(&["reward.0.script=\"maths\""], &["maths", "math"]);
    refuse(&["devices.memory_mb=20"], &["memory", "devices.memory_mb", "lower"]);
    refuse(&["model.path=\"nowhere\""], &["model", "exclude each other"]);
    refuse(&["rollout.temperature=0.0"], &["temperature"]);

    let bad = folder.at("bad.lua");
    std::fs::write(&bad, "function reward(sample)\n  return 1 +\nend\n").unwrap();
    refuse(&[&format!("reward.0.script=\"{}\"", bad.display())], &["bad.lua:3", "syntax error"]);

    let existing = folder.at("existing");
    std::fs::create_dir(&existing).unwrap();
    let output = folder.launch("existing", &[]);
    assert!(!output.status.success() && stderr(&output).contains("never overwritten"), "{}", stderr(&output));
    assert_eq!(std::fs::read_dir(&existing).unwrap().count(), 0);

    let output = program(&["launch", folder.at("missing.toml").to_str().unwrap()]);
    assert!(stderr(&output).contains("missing.toml"), "{}", stderr(&output));
    std::fs::write(folder.at("recipe.toml"), "[model]\npath = \"m\"\n[data]\npath = \"d\"\n[rolout]\n")
        .unwrap();
    let output = folder.launch("refused", &[]);
    assert!(
        stderr(&output).contains("line 5") && stderr(&output).contains("`rollout`"),
        "{}",
        stderr(&output)
    );
}
