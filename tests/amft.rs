//! Stages of imitation and reinforcement: what they are at the ends of their weight, deterministic, resumable.

#[path = "support/runs.rs"]
mod runs;

use runs::{DIGITS, Folder, stderr, timeless_metrics as metrics, weights};

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
script = "REWARD"
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

#[test]
fn at_the_ends_of_its_weight_it_is_imitation_or_reinforcement_bit_for_bit() {
    let place = Folder::with_reward(RECIPE, DIGITS);
    let fixed = |mu: &str| {
        format!("stage.0.amft={{mu = {mu}, mu_min = {mu}, mu_max = {mu}, meta_every = 0, entropy_lr = 0.0}}")
    };
    let imitates = place.run("one", &[&fixed("1.0")]);
    let sft = place.run("sft", &[r#"stage=[{kind = "sft", batch = 5, steps = 6}]"#]);
    assert_eq!(weights(&imitates), weights(&sft));
    let reinforces = place.run("zero", &[&fixed("0.0")]);
    let grpo = place.run("grpo", &[r#"stage=[{kind = "grpo"}]"#]);
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
    let place = Folder::with_reward(RECIPE, DIGITS);
    for (name, validation) in [("reward", "reward"), ("likelihood", "demonstrations")] {
        let set = format!("stage.0.amft.validation={validation:?}");
        let whole = place.run(name, &[&set, "devices.threads=1"]);
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

        let two = place.run(&format!("{name}-two"), &[&set, "devices.threads=2"]);
        assert_eq!((weights(&two), metrics(&two)), (weights(&whole), rows.clone()));
        for last in [1, 2, 5] {
            let cut = place.resumed(&whole, &format!("{name}-{last}"), last);
            assert_eq!((weights(&cut), metrics(&cut)), (weights(&whole), rows.clone()), "from {last}");
        }
    }
}

#[test]
fn settings_that_cannot_work_are_refused() {
    let place = Folder::with_reward(RECIPE, DIGITS);
    for (set, says) in [
        ("stage.0.amft.mu=0.99", "mu_max"),
        ("stage.0.amft.mu_lr=-1.0", "mu_lr"),
        ("stage.0.amft.validation_prompts=0", "validation_prompts"),
        ("stage.0.amft.validation_prompts=40", "leaves nothing"),
        ("stage.0.kind=\"grpo\"", "kind \"amft\""),
        ("rollout.top_k=3", "top_k"),
    ] {
        let output = place.launch("refused", &[set]);
        let text = stderr(&output);
        assert!(!output.status.success() && text.contains(says), "{set}: {text}");
        assert!(!place.at("refused").exists());
    }
}
