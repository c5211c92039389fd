//! Health in whole runs: said once when it changes, counted in the summary, shown in the report, unchanged by a resumption.

#[path = "support/runs.rs"]
mod runs;

use std::path::Path;

use runs::{Folder, lines, stderr, summary};
use serde_json::{Value, json};

const RECIPE: &str = r#"
name = "health"
[model.new]
hidden = 32
layers = 2
heads = 2
kv_heads = 1
head_dim = 16
ffn = 64
[data]
heldout = 0
[data.arithmetic]
max_operand = 9
problems = 30
[[reward]]
script = "REWARD"
[rollout]
prompts_per_step = 3
group_size = 4
max_new_tokens = 8
[optimizer]
lr = 1e-3
[train]
steps = 6
checkpoint_every = 2
keep_checkpoints = 99
"#;

fn health(run: &Path) -> Vec<(String, String)> {
    let word = |v: &Value| v.as_str().unwrap_or_default().to_string();
    let rows = lines(&run.join("metrics.jsonl"));
    rows.iter().map(|row| (word(&row["health"]), word(&row["health_reason"]))).collect()
}

/// Rewards are equal on the steps 3 and 4, and the verifier fails on every completion of step 5.
const CHANGING: &str = "function reward(sample, ctx)
  if ctx.step == 5 then error('no verdict today') end
  if ctx.step == 3 or ctx.step == 4 then return 0.25 end
  local _, n = sample.completion:gsub('%d', '')
  return n / 8
end
";

#[test]
fn each_change_is_said_once_and_each_step_is_counted() {
    let place = Folder::with_reward(RECIPE, CHANGING);
    let output = place.launch("run", &["rollout.max_new_tokens=64"]);
    let (text, run) = (stderr(&output), place.at("run"));
    assert!(output.status.success(), "{text}");
    let health_of = health;
    let health = health_of(&run);
    let words: Vec<&str> = health.iter().map(|(word, _)| word.as_str()).collect();
    assert_eq!(words[2..5], ["zero_variance", "zero_variance", "no_reward"], "{health:?}");
    assert_eq!((words[0], words[1], words[5]), ("learning", "learning", "learning"), "{health:?}");
    assert_eq!(health[2].1, "every group's rewards are equal (mean 0.250)");
    let lines: Vec<&str> = text.lines().filter(|l| l.contains("learning")).collect();
    assert_eq!(lines.len(), 3, "{lines:#?}");
    assert!(lines[0].starts_with("step 3: not learning (zero_variance)") && lines[0].contains("hint: "));
    assert!(lines[1].starts_with("step 5: not learning (no_reward)"));
    assert_eq!(lines[2], "step 6: learning again, after 1 steps of no_reward");
    // the failure itself is said too
    assert_eq!(text.matches("calls of reward failed").count(), 1, "{text}");
    let counts = json!({"learning": 3, "zero_variance": 2, "no_reward": 1});
    assert_eq!(summary(&run)["health"], counts);
    let page = std::fs::read_to_string(place.at("run/report.html")).unwrap();
    assert!(page.contains("3 of 6 steps learned") && page.contains("<td>3–4<td>zero_variance"));

    let resumed = place.resumed(&run, "resumed", 2);
    assert_eq!(health_of(&resumed), health);
    assert_eq!(summary(&resumed)["health"], counts);
}

#[test]
fn cut_off_completions_and_clipped_tokens_are_told_apart_from_equal_rewards() {
    let place = Folder::with_reward(RECIPE, "function reward() return 0 end\n");
    let run = place.run("cut", &["rollout.max_new_tokens=1", "train.steps=1"]);
    let (word, why) = &health(&run)[0];
    assert_eq!(word, "truncated");
    assert!(
        why.ends_with("of the completions were cut at max_new_tokens and their rewards are equal"),
        "{why}"
    );

    let place = Folder::with_reward(RECIPE, CHANGING);
    let sets =
        ["train.inner_epochs=8", "train.steps=2", "optimizer.lr=3e-2", "algorithm.objective.clip_low=1e-4"];
    let run = place.run("clip", &[&sets[..], &["algorithm.objective.clip_high=1e-4"]].concat());
    let health = health(&run);
    assert!(
        health.iter().any(|(word, why)| word == "clipped" && why.contains("of the tokens off")),
        "{health:?}"
    );
}
