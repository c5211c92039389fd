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
    health_in(run, "metrics.jsonl")
}

fn health_in(run: &Path, file: &str) -> Vec<(String, String)> {
    let word = |v: &Value| v.as_str().unwrap_or_default().to_string();
    let rows = lines(&run.join(file));
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

#[test]
fn steps_that_compare_rollouts_say_why_they_do_not_learn() {
    let place = Folder::with_reward(RECIPE, CHANGING);
    let stage = r#"stage=[{ kind = "preference", steps = 6, preference = { pairs = "groups" } }]"#;
    let output = place.launch("run", &[stage]);
    let (text, run) = (stderr(&output), place.at("run"));
    assert!(output.status.success(), "{text}");
    let judged = health(&run);
    let words: Vec<&str> = judged.iter().map(|(word, _)| word.as_str()).collect();
    let expected = ["learning", "learning", "zero_variance", "zero_variance", "no_reward", "learning"];
    assert_eq!(words, expected, "{judged:?}");
    assert_eq!(judged[2].1, "no group gave a pair: 3 groups were drawn, and the rewards of each are equal");
    assert!(text.contains("step 3: not learning (zero_variance)"), "{text}");
    assert!(text.contains("step 6: learning again, after 1 steps of no_reward"), "{text}");
    let counts = json!({"learning": 3, "zero_variance": 2, "no_reward": 1});
    assert_eq!(summary(&run)["health"], counts);
    let resumed = place.resumed(&run, "resumed", 4);
    assert_eq!(health(&resumed), judged);
    assert_eq!(summary(&resumed)["health"], counts);
}

#[test]
fn pairs_that_contradict_each_other_are_called_out_and_good_ones_are_not() {
    let place = Folder::with_reward(RECIPE, CHANGING);
    let row = |i: u64, good: bool| {
        let (a, b) = (i % 10, i / 10);
        let says = |sum: u64| format!("<answer>{sum}</answer>");
        let (right, wrong) = (says(a + b), says(a + b + 1));
        let (chosen, rejected) = if good { (right, wrong) } else { (wrong, right) };
        json!({"prompt": format!("{a}+{b}="), "chosen": chosen, "rejected": rejected}).to_string()
    };
    let good: Vec<String> = (0..40).map(|i| row(i, true)).collect();
    let swapped: Vec<String> = (0..40).map(|i| row(i / 2, i % 2 == 0)).collect();
    for (name, rows) in [("good", good), ("swapped", swapped)] {
        place.write(&format!("{name}.jsonl"), &rows.join("\n"));
        let path = place.at(&format!("{name}.jsonl"));
        let stage = format!(r#"stage=[{{ kind = "preference", steps = 24, batch = 8, path = {path:?} }}]"#);
        let run = place.run(name, &[&stage]);
        let judged = health(&run);
        assert!(judged[..16].iter().all(|(word, _)| word == "learning"), "{name}: {judged:?}");
        for (word, why) in &judged[18..] {
            match name {
                "good" => assert_eq!(word, "learning", "{why}"),
                _ => assert!(["no_margin", "at_chance"].contains(&word.as_str()), "{word}: {why}"),
            }
        }
        assert_eq!(health(&place.resumed(&run, &format!("{name}-resumed"), 10)), judged);
    }
}

#[test]
fn a_supervised_stage_whose_loss_grows_is_said_to_diverge() {
    let place = Folder::with_reward(RECIPE, CHANGING);
    let stage = |lr: f64| {
        format!(
            r#"stage=[{{ kind = "sft", steps = 4, batch = 8, lr = 1e-3 }}, {{ kind = "sft", steps = 16, batch = 8, lr = {lr} }}]"#
        )
    };
    let steady = place.run("steady", &[&stage(1e-3)]);
    assert!(health_in(&steady, "sft.jsonl").iter().all(|(word, _)| word == "learning"));
    assert_eq!(summary(&steady)["sft_health"], json!({"learning": 20}));
    assert_eq!(summary(&steady)["health"], json!({}));

    let output = place.launch("wild", &[&stage(3.0)]);
    let (text, run) = (stderr(&output), place.at("wild"));
    assert!(output.status.success(), "{text}");
    let judged = health_in(&run, "sft.jsonl");
    let lost: Vec<&(String, String)> = judged.iter().filter(|(word, _)| word == "diverging").collect();
    assert!(!lost.is_empty() && lost[0].1.contains("the loss rose from"), "{judged:?}");
    assert!(judged[..4].iter().all(|(word, _)| word == "learning"), "{judged:?}");
    assert!(text.contains("sft step ") && text.contains("not learning (diverging)"), "{text}");
    assert!(std::fs::read_to_string(run.join("report.html")).unwrap().contains("Health of supervised steps"));
    assert_eq!(health_in(&place.resumed(&run, "resumed", 14), "sft.jsonl"), judged);
}
