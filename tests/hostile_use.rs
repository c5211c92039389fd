//! What a careless or hostile user gives is refused with its place and a remedy, never with a panic, a hang or a run that only
//! seems to succeed.

#[path = "support/runs.rs"]
mod runs;

use std::process::{Command, Stdio};

use rft_engine::report::sinks;
use runs::{Folder, program, resume, stderr};

const RECIPE: &str = r#"
name = "hostile"
[model.new]
hidden = 32
layers = 1
heads = 2
kv_heads = 1
head_dim = 16
ffn = 32
[data]
heldout = 4
arithmetic = { max_operand = 9 }
[[reward]]
script = "REWARD"
[rollout]
prompts_per_step = 2
group_size = 2
max_new_tokens = 8
[train]
steps = 2
[devices]
threads = 1
memory_mb = 256
"#;

fn folder(reward: &str) -> Folder {
    Folder::with_reward(RECIPE, reward)
}

#[test]
fn a_setting_that_cannot_be_is_named_alone_among_others() {
    let folder = folder(runs::DIGITS);
    for (set, words) in [
        ("devices.threads=100000", &["devices.threads", "1024", "hint"][..]),
        ("data.arithmetic.max_operand=0", &["data: arithmetic", "max_operand = 0", "hint"]),
        ("train.steps=-1", &["error: --set train.steps=-1: "]),
        ("train.stepz=1", &["error: --set train.stepz=1: ", "steps"]),
        ("stage.0.steps=1", &["--set stage.0.steps=1", "no [[stage]]", "hint"]),
        ("name=", &["name", "runs/"]),
    ] {
        let output = folder.launch("refused", &["seed=3", set, "train.log_groups=1"]);
        let said = stderr(&output);
        assert_eq!(output.status.code(), Some(1), "{set}: {said}");
        assert!(words.iter().all(|word| said.contains(word)), "{set}: {said}");
        assert!(!folder.at("refused").exists(), "{set}");
    }
}

#[test]
fn rows_from_other_systems_are_read_and_broken_ones_are_named() {
    let recipe =
        RECIPE.replace("arithmetic = { max_operand = 9 }", "path = \"ROWS\"\nprompt = \"{question}\"");
    let folder = Folder::with_reward(&recipe, runs::DIGITS);
    let rows = folder.at("rows.jsonl");
    let recipe = std::fs::read_to_string(folder.at("recipe.toml")).unwrap();
    folder.write("recipe.toml", &recipe.replace("ROWS", rows.to_str().unwrap()));
    let row = |i: usize| format!("{{\"question\":\"{i}+1=\",\"answer\":\"{}\"}}", i + 1);
    let good: Vec<String> = (0..8).map(row).collect();

    folder.write("rows.jsonl", &format!("\u{feff}{}\r\n", good.join("\r\n")));
    folder.run("marked", &[]);
    for (line, words) in [
        (&b"{\"question\":\"\xff\"}"[..], &["line 9", "0xff", "UTF-8", "hint"][..]),
        (b"{\"question\":null}", &["line 9", "{question}", "null"]),
    ] {
        std::fs::write(&rows, [good.join("\n").as_bytes(), b"\n", line].concat()).unwrap();
        let output = folder.launch("broken", &[]);
        let said = stderr(&output);
        assert!(!output.status.success() && words.iter().all(|word| said.contains(word)), "{said}");
    }
}

#[test]
fn a_reward_that_teaches_nothing_is_said_at_the_end_and_one_too_large_is_an_error() {
    let constant = folder("function reward(sample) return 1 end");
    let output = constant.launch("constant", &[]);
    let said = stderr(&output);
    assert!(said.contains("warning: none of 2 steps learned anything: "), "{said}");
    let output = folder("function reward(sample) return 1e300 end").launch("huge", &[]);
    let said = stderr(&output);
    assert!(!output.status.success() && said.contains("not_finite") && said.contains("1e300"), "{said}");
    let varied = folder(runs::DIGITS);
    let said = stderr(&varied.launch("varied", &["train.steps=8", "rollout.group_size=8"]));
    assert!(!said.contains("learned anything"), "{said}");
}

#[test]
fn two_processes_do_not_work_in_one_run_folder() {
    let folder = folder(runs::DIGITS);
    let run = folder.run("run", &[]);
    let lock = sinks::lock(&run).unwrap();
    let output = resume(&run);
    let said = stderr(&output);
    assert!(!output.status.success() && said.contains("another process") && said.contains("hint"), "{said}");
    drop(lock);
    assert!(resume(&run).status.success());
}

#[test]
fn a_small_context_shortens_completions_and_a_reader_that_leaves_is_no_panic() {
    let folder = folder(runs::DIGITS);
    let run = folder.run("run", &[]);
    let model = run.join("final");
    let generate = ["generate", "--model", model.to_str().unwrap(), "--prompt", "1+1="];
    assert!(program(&generate).status.success());
    let none = program(&[&generate[..], &["--n", "0"]].concat());
    assert!(!none.status.success() && stderr(&none).contains("at least 1"), "{}", stderr(&none));
    let recipe = folder.at("recipe.toml");
    for args in [vec!["devices"], vec!["launch", recipe.to_str().unwrap(), "--dry-run"], generate.to_vec()] {
        let mut child = Command::new(env!("CARGO_BIN_EXE_rft-engine"));
        let mut child = child.args(&args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        drop(child.stdout.take());
        let output = child.wait_with_output().unwrap();
        assert!(!stderr(&output).contains("panicked"), "{args:?}: {}", stderr(&output));
        assert_ne!(output.status.code(), Some(101), "{args:?}");
    }
}
