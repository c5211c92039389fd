//! Stages of imitation and reinforcement: what they are at the ends of their weight, deterministic, resumable.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use rft_engine::report::metrics::TIMING_KEYS;
use serde_json::{Map, Value};

const RECIPE: &str = r#"
name = "amft"
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
problems = 40
[[reward]]
script = "DIGITS"
[rollout]
prompts_per_step = 3
group_size = 4
max_new_tokens = 8
[optimizer]
lr = 3e-3
[train]
steps = 6
checkpoint_every = 1
keep_checkpoints = 99
[[stage]]
kind = "amft"
batch = 5
[stage.amft]
validation_prompts = 6
meta_every = 2
"#;

/// A reward that varies from completion to completion.
const DIGITS: &str =
    "function reward(sample)\n  local _, n = sample.completion:gsub('%d', '')\n  return n / 8\nend\n";

struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Self {
        let place = Self(tempfile::tempdir().unwrap());
        std::fs::write(place.at("digits.lua"), DIGITS).unwrap();
        let recipe = RECIPE.replace("DIGITS", &place.at("digits.lua").display().to_string());
        std::fs::write(place.at("recipe.toml"), recipe).unwrap();
        place
    }

    fn at(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn try_launch(&self, run: &str, sets: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_rft-engine"));
        command.arg("launch").arg(self.at("recipe.toml")).arg("--run-dir").arg(self.at(run));
        sets.iter().for_each(|set| {
            command.args(["--set", set]);
        });
        command.output().unwrap()
    }

    fn launch(&self, run: &str, sets: &[&str]) -> PathBuf {
        let output = self.try_launch(run, sets);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        self.at(run)
    }
}

/// metrics.jsonl without what depends on the machine and the moment.
fn metrics(run: &Path) -> Vec<Map<String, Value>> {
    let text = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let rows = text.lines().map(|line| serde_json::from_str(line).unwrap());
    let timeless = |mut row: Map<String, Value>| {
        row.retain(|key, _| !TIMING_KEYS.contains(&key.as_str()));
        row
    };
    rows.map(timeless).collect()
}

fn weights(run: &Path) -> Vec<u8> {
    std::fs::read(run.join("final/model.safetensors")).unwrap()
}

#[test]
fn at_the_ends_of_its_weight_it_is_imitation_or_reinforcement_bit_for_bit() {
    let place = Place::new();
    let fixed = |mu: &str| {
        format!("stage.0.amft={{mu = {mu}, mu_min = {mu}, mu_max = {mu}, meta_every = 0, entropy_lr = 0.0}}")
    };
    let imitates = place.launch("one", &[&fixed("1.0")]);
    let sft = place.launch("sft", &[r#"stage=[{kind = "sft", batch = 5, steps = 6}]"#]);
    assert_eq!(weights(&imitates), weights(&sft));
    let reinforces = place.launch("zero", &[&fixed("0.0")]);
    let grpo = place.launch("grpo", &[r#"stage=[{kind = "grpo"}]"#]);
    assert_eq!(weights(&reinforces), weights(&grpo));
    for (ours, plain) in metrics(&reinforces).iter().zip(metrics(&grpo)) {
        for (key, value) in &plain {
            assert_eq!(&ours[key], value, "{key}");
        }
        assert_eq!(ours["amft_mu"], 0.0);
    }
}

#[test]
fn the_weight_is_learned_the_same_on_one_thread_and_two_and_after_every_resumption() {
    let place = Place::new();
    for (name, validation) in [("reward", "reward"), ("likelihood", "demonstrations")] {
        let set = format!("stage.0.amft.validation={validation:?}");
        let whole = place.launch(name, &[&set, "devices.threads=1"]);
        let rows = metrics(&whole);
        let of = |key: &str| rows.iter().map(|row| row[key].as_f64().unwrap()).collect::<Vec<f64>>();
        let (mu, meta) = (of("amft_mu"), of("amft_meta"));
        assert_eq!(mu[0], 0.5);
        assert!(mu[1..].iter().all(|m| (0.05..=0.95).contains(m)) && mu[1] != mu[0], "{mu:?}");
        // measured on the steps 1, 3, 5 and shown until the next
        assert_eq!((meta[0], meta[2], meta[4]), (meta[1], meta[3], meta[5]));
        assert!(meta[0] != meta[2] && meta.iter().all(|m| m.abs() <= 1.0 && *m != 0.0), "{meta:?}");
        assert!(of("sft_loss").iter().all(|loss| *loss > 0.0));
        // demonstrations are likelier afterwards
        assert!(of("sft_loss")[5] < of("sft_loss")[0]);

        let two = place.launch(&format!("{name}-two"), &[&set, "devices.threads=2"]);
        assert_eq!((weights(&two), metrics(&two)), (weights(&whole), rows.clone()));
        for last in [1, 2, 5] {
            let cut = place.at(&format!("{name}-{last}"));
            assert!(Command::new("cp").arg("-r").arg(&whole).arg(&cut).status().unwrap().success());
            std::fs::remove_dir_all(cut.join("final")).unwrap();
            for step in last + 1..=6 {
                std::fs::remove_dir_all(cut.join(format!("checkpoints/step-{step:08}"))).unwrap();
            }
            let mut command = Command::new(env!("CARGO_BIN_EXE_rft-engine"));
            let output = command.args(["launch", "--resume", "--run-dir"]).arg(&cut).output().unwrap();
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            assert_eq!((weights(&cut), metrics(&cut)), (weights(&whole), rows.clone()), "from {last}");
        }
    }
}

#[test]
fn settings_that_cannot_work_are_refused() {
    let place = Place::new();
    for (set, says) in [
        ("stage.0.amft.mu=0.99", "mu_max"),
        ("stage.0.amft.mu_lr=-1.0", "mu_lr"),
        ("stage.0.amft.validation_prompts=0", "validation_prompts"),
        ("stage.0.amft.validation_prompts=40", "leaves nothing"),
        ("stage.0.kind=\"grpo\"", "kind \"amft\""),
        ("rollout.top_k=3", "top_k"),
    ] {
        let output = place.try_launch("refused", &[set]);
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && text.contains(says), "{set}: {text}");
        assert!(!place.at("refused").exists());
    }
}
