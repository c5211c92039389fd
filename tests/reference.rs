//! The reference policy: what each kind compares with, what it costs, and that a resumed run has the very same one.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::{Map, Value};

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

struct Place {
    folder: tempfile::TempDir,
    lora: Option<PathBuf>,
}

impl Place {
    fn full() -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("recipe.toml"), RECIPE).unwrap();
        Self { folder, lora: None }
    }

    /// The same recipe with an adapter on a model of its own making.
    fn lora() -> Self {
        let place = Self::full();
        let first = place.at("first");
        place.launch(&first, &["stage=[{kind = \"sft\", steps = 1, batch = 2}]"]);
        let text = RECIPE.split("[model.new]").next().unwrap().to_string()
            + "[data]"
            + RECIPE.split("[data]").nth(1).unwrap()
            + &format!("[model]\npath = {:?}\n[model.lora]\nrank = 4\n", first.join("final"));
        std::fs::write(place.at("recipe.toml"), text).unwrap();
        Self { lora: Some(first), ..place }
    }

    fn at(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn command(&self, run: &Path, sets: &[&str], flags: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_rft-engine"));
        command.arg("launch").arg(self.at("recipe.toml")).arg("--run-dir").arg(run).args(flags);
        sets.iter().for_each(|set| {
            command.args(["--set", set]);
        });
        let output = command.output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        output
    }

    fn launch(&self, run: &Path, sets: &[&str]) {
        self.command(run, sets, &[]);
    }

    /// MiB of the reference in the memory plan.
    fn planned(&self, sets: &[&str]) -> u64 {
        let text = self.command(&self.at("planned"), sets, &["--dry-run"]);
        let text = String::from_utf8_lossy(&text.stdout).into_owned();
        let line = text.lines().find(|l| l.starts_with("#  reference ")).unwrap();
        line.split_whitespace().nth(2).unwrap().parse().unwrap()
    }
}

fn metrics(run: &Path) -> Vec<Map<String, Value>> {
    let text = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn kls(run: &Path) -> Vec<f64> {
    metrics(run).iter().map(|row| row["kl"].as_f64().unwrap()).collect()
}

fn resume_from(whole: &Path, cut: &Path, last: u64) {
    assert!(Command::new("cp").arg("-r").arg(whole).arg(cut).status().unwrap().success());
    std::fs::remove_dir_all(cut.join("final")).unwrap();
    for entry in std::fs::read_dir(cut.join("checkpoints")).unwrap() {
        let path = entry.unwrap().path();
        let step = path.file_name().unwrap().to_string_lossy().strip_prefix("step-").map(str::to_string);
        if step.is_some_and(|step| step.parse::<u64>().unwrap() > last) {
            std::fs::remove_dir_all(path).unwrap();
        }
    }
    let mut command = Command::new(env!("CARGO_BIN_EXE_rft-engine"));
    let output = command.args(["launch", "--resume", "--run-dir"]).arg(cut).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// Each kind is the policy itself exactly where it should be, and every resumed run ends in the same bytes.
fn each_kind_is_what_it_says_and_resumes(place: &Place) {
    for (i, (kind, same)) in KINDS.iter().enumerate() {
        let whole = place.at(&format!("whole-{i}"));
        place.launch(&whole, &[&format!("algorithm.reference={kind}")]);
        for (step, kl) in (1..).zip(kls(&whole)) {
            assert_eq!(kl == 0.0, same.contains(&step), "{kind}: KL {kl} at step {step}");
        }
        let weights = |run: &Path| std::fs::read(run.join("final/model.safetensors")).unwrap();
        for last in [1, 3, 4, 5, 7] {
            let cut = place.at(&format!("cut-{i}-{last}"));
            resume_from(&whole, &cut, last);
            assert_eq!(weights(&whole), weights(&cut), "{kind} from checkpoint {last}");
            assert_eq!(kls(&whole), kls(&cut), "{kind} from checkpoint {last}");
        }
    }
}

#[test]
fn each_kind_with_full_fine_tuning() {
    each_kind_is_what_it_says_and_resumes(&Place::full());
}

#[test]
fn each_kind_with_an_adapter() {
    each_kind_is_what_it_says_and_resumes(&Place::lora());
}

#[test]
fn a_reference_is_planned_for_and_with_an_adapter_it_costs_the_adapter_at_most() {
    let (full, lora) = (Place::full(), Place::lora());
    let no_warm_up = r#"stage=[{kind = "grpo", steps = 1}]"#;
    assert!(lora.lora.is_some());
    assert_eq!(full.planned(&["algorithm.objective.kl.coefficient=0.0"]), 0);
    assert_eq!(full.planned(&[]), 1);
    assert_eq!(lora.planned(&[no_warm_up]), 0, "a new adapter switched off is the initial policy");
    assert_eq!(lora.planned(&[r#"algorithm.reference={kind = "base"}"#]), 0);
    assert_eq!(lora.planned(&[]), 1, "after a warm-up it is not");

    // and then the two are the same policy: KL 0 at the first step of both
    let run = lora.at("cold");
    lora.launch(&run, &[no_warm_up]);
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
