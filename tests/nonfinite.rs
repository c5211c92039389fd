//! Numbers that are not finite: nothing is updated, the sample is named, and the run can go on from before.

#[path = "support/runs.rs"]
mod runs;

use std::process::Output;

use rft_engine::config::{NewModelConfig, OptimizerConfig, Precision};
use rft_engine::error::EngineError;
use rft_engine::learner::batch::GroupTokens;
use rft_engine::learner::critic::Critic;
use rft_engine::learner::step::{CriticStep, Learner, ScoreGrads};
use rft_engine::model::policy::{Policy, new_model_spec};
use rft_kernels::{Pool, Warp};
use runs::{Folder, checkpoints, lines, resume, stderr};

const WARP: Warp = Warp { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0 };

/// Two groups of two completions; the loss gradient of token `bad` (over all, in order) is `value`.
fn update_with(value: f32, bad: usize) -> (Result<(), EngineError>, bool) {
    let shape = NewModelConfig { hidden: 32, layers: 2, heads: 2, kv_heads: 1, head_dim: 16, ffn: 64 };
    let mut policy = Policy::init(new_model_spec(&shape, 40, 0, 64).unwrap(), 5);
    policy.prepare(&Pool::new(1), 64, Precision::F32);
    let before = policy.base.stored_values().to_vec();
    let groups = [
        GroupTokens { prompt: &[3, 7, 11], completions: vec![&[4, 5, 6], &[7, 9]] },
        GroupTokens { prompt: &[12, 2], completions: vec![&[10, 11, 30], &[8]] },
    ];
    let first = [[0, 3], [5, 8]];
    let mut learner = Learner::new(&policy, 6);
    let result = learner.update(
        &Pool::new(1),
        &mut policy,
        &groups,
        &WARP,
        &OptimizerConfig::default(),
        1e-3,
        |pieces, scores| {
            let places = pieces.iter().flat_map(|p| {
                let (group, all) = (p.group, &groups[p.group].completions);
                p.completions.clone().flat_map(move |c| first[group][c]..first[group][c] + all[c].len())
            });
            let logprobs: Vec<f32> = places.map(|at| if at == bad { value } else { -0.1 }).collect();
            assert_eq!(logprobs.len(), scores.logprobs.len());
            Ok(ScoreGrads { entropies: vec![0.0; logprobs.len()], logprobs })
        },
    );
    (result.map(|_| ()), before == policy.base.stored_values())
}

#[test]
fn the_token_of_a_bad_loss_and_the_completion_of_a_bad_gradient_are_found() {
    for value in [f32::NAN, f32::INFINITY] {
        for (bad, expected) in [(1, (0, 0, 1)), (4, (0, 1, 1)), (5, (1, 0, 0)), (8, (1, 1, 0))] {
            let (result, unchanged) = update_with(value, bad);
            let Err(EngineError::NonFinite { what, group, completion, token }) = result else {
                panic!("{result:?}")
            };
            assert_eq!((what, (group, completion, token.unwrap())), ("loss gradient", expected));
            assert!(unchanged);
        }
    }
    // finite itself, but not times the weights
    let (result, unchanged) = update_with(3e38, 6);
    let Err(EngineError::NonFinite { what, group, completion, token }) = result else { panic!("{result:?}") };
    assert_eq!((what, group, completion, token), ("gradient", 1, 0, None));
    assert!(unchanged);
    let (result, unchanged) = update_with(-0.1, 0);
    assert!(result.is_ok() && !unchanged);
}

/// As [`update_with`], with a critic whose head is not zero: the gradient of the values of completion `bad` is `value`, that of its
/// logprobs -0.1 and with `scored` false nothing at all.
fn judged_with(
    value: f32,
    bad: (usize, usize),
    scored: bool,
    head_only: bool,
) -> (Result<(), EngineError>, bool) {
    let shape = NewModelConfig { hidden: 32, layers: 2, heads: 2, kv_heads: 1, head_dim: 16, ffn: 64 };
    let mut policy = Policy::init(new_model_spec(&shape, 40, 0, 64).unwrap(), 5);
    policy.prepare(&Pool::new(1), 64, Precision::F32);
    let mut critic = Critic::new(&policy, false);
    critic.head.weights.fill(0.5);
    let before = (policy.base.stored_values().to_vec(), critic.head.weights.clone());
    let groups = [
        GroupTokens { prompt: &[3, 7, 11], completions: vec![&[4, 5, 6], &[7, 9]] },
        GroupTokens { prompt: &[12, 2], completions: vec![&[10, 11, 30], &[8]] },
    ];
    let mut learner = Learner::new(&policy, 6);
    let with = Some(CriticStep { critic: &mut critic, lr: 1e-3, head_only });
    let (pool, config) = (Pool::new(1), OptimizerConfig::default());
    let warp = scored.then_some(&WARP);
    let result = learner.update_with(
        &pool,
        &mut policy,
        &groups,
        warp,
        &config,
        1e-3,
        with,
        |pieces, scores, values| {
            let own = pieces.iter().flat_map(|p| p.completions.clone().map(move |c| (p.group, c)));
            let d = own.flat_map(|(g, c)| {
                groups[g].completions[c].iter().map(move |_| if (g, c) == bad { value } else { 0.1 })
            });
            let d: Vec<f32> = d.collect();
            assert_eq!(d.len(), values.len());
            let n = scores.logprobs.len();
            Ok((ScoreGrads { logprobs: vec![-0.1; n], entropies: vec![0.0; n] }, d))
        },
    );
    let same = before == (policy.base.stored_values().to_vec(), critic.head.weights);
    (result.map(|_| ()), same)
}

#[test]
fn with_a_critic_the_completion_of_a_bad_gradient_is_found_too() {
    for (bad, scored) in [((0, 1), true), ((1, 0), true), ((1, 0), false), ((0, 0), false)] {
        for (head_only, expected) in [(false, "gradient"), (true, "critic's gradient")] {
            let (result, unchanged) = judged_with(3e38, bad, scored, head_only);
            let Err(EngineError::NonFinite { what, group, completion, token }) = result else {
                panic!("{bad:?} {scored} {head_only}: {result:?}")
            };
            assert_eq!((what, (group, completion), token), (expected, bad, None));
            assert!(unchanged, "{bad:?} {scored}");
        }
    }
    let (result, unchanged) = judged_with(f32::NAN, (1, 1), true, false);
    let Err(EngineError::NonFinite { what, group, completion, token }) = result else { panic!("{result:?}") };
    assert_eq!((what, group, completion, token), ("value gradient", 1, 1, Some(0)));
    assert!(unchanged);
    let (result, unchanged) = judged_with(0.1, (0, 0), true, false);
    assert!(result.is_ok() && !unchanged);
}

const RECIPE: &str = r#"
name = "explodes"
[data]
heldout = 0
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
[train]
checkpoint_every = 2
keep_checkpoints = 1
"#;

const NEW: &str = "[model.new]\nhidden = 32\nlayers = 2\nheads = 2\nkv_heads = 1\nhead_dim = 16\nffn = 64\n";

fn place() -> Folder {
    Folder::new(&format!("{RECIPE}{NEW}"))
}

fn says(output: &Output, words: &[&str]) {
    let text = stderr(output);
    assert!(!output.status.success(), "{text}");
    for word in words {
        assert!(text.contains(word), "no `{word}` in: {text}");
    }
}

#[test]
fn a_run_that_explodes_in_reinforcement_stops_with_the_sample_and_can_be_resumed() {
    let place = place();
    // 1e38 overflows forward, in the rollout of the next step; 1e30 only backward, in its update
    for (run, lr, what) in [
        ("forward", "1e38", "the model's logits are not finite at token "),
        ("backward", "1e30", "the gradient of completion "),
    ] {
        let stages = format!(
            r#"stage=[{{kind = "sft", steps = 2, batch = 4, lr = 1e-3}}, {{kind = "grpo", steps = 3, lr = {lr}}}]"#
        );
        let words = [what, "of row train-", "prompt ends \"", "step-00000003", "optimizer.lr"];
        says(&place.launch(run, &[&stages]), &words);
        // the end of the warm-up is kept although only one checkpoint was asked for
        assert_eq!(checkpoints(&place.at(run)), ["step-00000002", "step-00000003"]);
        assert_eq!(lines(&place.at(run).join("metrics.jsonl")).len(), 1);
        says(&resume(&place.at(run)), &["resuming after 3 steps", what, "step-00000003"]);

        // and from the checkpoint before, to the same step
        std::fs::remove_dir_all(place.at(run).join("checkpoints/step-00000003")).unwrap();
        says(&resume(&place.at(run)), &["resuming after 2 steps", what]);
        assert_eq!(lines(&place.at(run).join("metrics.jsonl")).len(), 1);
    }
}

#[test]
fn a_gradient_that_overflows_names_its_sample_whatever_the_stage() {
    let place = place();
    for (name, stage, sets) in [
        ("sft", r#"kind = "sft", steps = 3, batch = 4"#, vec![]),
        (
            "preference",
            r#"kind = "preference", steps = 3, preference = { pairs = "demonstrations" }"#,
            vec![],
        ),
        ("critic", r#"kind = "grpo", steps = 3"#, vec!["algorithm.preset=ppo"]),
        ("separate", r#"kind = "grpo", steps = 3"#, vec!["algorithm.critic={ trunk = \"separate\" }"]),
    ] {
        let stages = format!("stage=[{{ {stage}, lr = 1e30 }}]");
        let output = place.launch(name, &[&sets[..], &[&stages]].concat());
        says(&output, &["gradient of completion ", "of row train-", "prompt ends \"", "optimizer.lr"]);
        assert_eq!(output.status.code(), Some(1), "{name}: {}", stderr(&output));
    }
}

#[test]
fn a_run_that_explodes_in_its_demonstrations_names_row_token_and_text() {
    let place = place();
    let stages = r#"stage=[{kind = "sft", steps = 4, batch = 4, lr = 1e38}]"#;
    let words = [
        "of completion 0 of row train-",
        "is not finite at token 0 of ",
        "nothing was updated",
        "prompt ends \"",
        "step-00000001",
    ];
    says(&place.launch("run", &[stages]), &words);
    assert_eq!(checkpoints(&place.at("run")), ["step-00000001"]);
    says(&resume(&place.at("run")), &["resuming after 1 steps", "is not finite at token"]);
}

#[test]
fn a_model_with_a_nan_fails_at_its_first_step_with_the_sample() {
    let place = place();
    assert!(place.launch("good", &[r#"stage=[{kind = "sft", steps = 1, batch = 2}]"#]).status.success());
    let file = place.at("good/final/model.safetensors");
    let mut bytes = std::fs::read(&file).unwrap();
    let last = bytes.len() - 4;
    bytes[last..].copy_from_slice(&f32::NAN.to_le_bytes());
    std::fs::write(&file, bytes).unwrap();
    let recipe = format!("{RECIPE}[model]\npath = {:?}\n", place.at("good/final"));
    place.write("recipe.toml", &recipe);
    for (run, stages) in [
        ("sft", r#"stage=[{kind = "sft", steps = 1, batch = 2}]"#),
        ("grpo", r#"stage=[{kind = "grpo", steps = 1}]"#),
    ] {
        says(&place.launch(run, &[stages]), &["not finite", "of row train-", "it was the first step"]);
        assert!(!place.at(run).join("final").exists());
    }
}
