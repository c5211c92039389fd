//! Frozen weights: bit for bit unchanged, free of gradients, moments and memory; the rest trains as in a full run.

#[path = "support/runs.rs"]
mod runs;

use std::ops::Range;

use rft_engine::config::{ModelConfig, OptimizerConfig, Precision, Recipe};
use rft_engine::learner::batch::GroupTokens;
use rft_engine::learner::optimizer::Moments;
use rft_engine::learner::step::{Learner, ScoreGrads};
use rft_engine::memory::{DataSize, MemoryPlan};
use rft_engine::model::params::Shape;
use rft_engine::model::policy::Policy;
use rft_engine::model::spec::ModelSpec;
use rft_kernels::{Pool, Warp};
use runs::{Folder, checkpoints, weights};
use serde_json::json;

const SEED: u64 = 11;

/// A decoder with biases and head norms; keys and values have 16 rows each and so share panels of 32.
fn policy() -> Policy {
    let spec = ModelSpec::from_config_json(&json!({
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 50, "hidden_size": 24,
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "intermediate_size": 40, "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
        "max_position_embeddings": 64, "tie_word_embeddings": true, "attention_bias": true, "eos_token_id": 1,
    }));
    let mut policy = Policy::init(spec.unwrap(), 3);
    policy.prepare(&Pool::new(1), 64, Precision::F32);
    policy
}

fn choice(train: &[&str], freeze: &[&str], half: bool) -> ModelConfig {
    let list = |items: &[&str]| items.iter().map(|s| s.to_string()).collect();
    let recipe = Recipe::load(None, &[]).unwrap();
    ModelConfig { train: list(train), freeze: list(freeze), half, ..recipe.model }
}

/// Every Hugging Face tensor with its bits.
fn tensors(policy: &Policy) -> Vec<(String, Vec<u32>)> {
    policy
        .merged_tensors()
        .map(|(name, _, rows)| (name, rows.iter().map(|x| x.to_bits()).collect()))
        .collect()
}

/// One update of a likelihood; weight decay is on, which would move frozen weights first.
fn update(policy: &mut Policy) -> Learner {
    let groups = [
        GroupTokens { prompt: &[3, 7, 11, 2, 9], completions: vec![&[4, 5, 6, 8], &[7, 49], &[1]] },
        GroupTokens { prompt: &[12], completions: vec![&[10, 11, 30]] },
    ];
    let warp = Warp { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0 };
    let optimizer = OptimizerConfig { weight_decay: 0.1, max_grad_norm: 0.0, ..Default::default() };
    let mut learner = Learner::new(policy, 8);
    learner
        .update(&Pool::new(2), policy, &groups, &warp, &optimizer, 1e-2, |_, scores| {
            let n = scores.logprobs.len();
            Ok(ScoreGrads { logprobs: vec![-0.1; n], entropies: vec![0.02; n] })
        })
        .unwrap();
    learner
}

#[test]
fn an_update_leaves_the_bf16_copy_of_the_weights() {
    for train in [vec![], vec!["*.{q,v}_proj.weight"], vec!["*down_proj*", "*.k_proj.weight"]] {
        let mut policy = policy();
        policy.prepare(&Pool::new(1), 64, Precision::Bf16);
        policy.choose_trained(&choice(&train, &[], false), SEED, 0).unwrap();
        let copy = |policy: &Policy| -> Vec<Vec<u16>> {
            let matrices = (0..policy.base.slots().len())
                .filter(|&id| matches!(policy.base.slots()[id].shape, Shape::Matrix { .. }));
            matrices.map(|id| policy.base.matrix(id).bf16.unwrap().to_vec()).collect()
        };
        let before = copy(&policy);
        update(&mut policy);
        let made = copy(&policy);
        assert!(before != made, "{train:?}");
        policy.base.refresh(&Pool::new(1));
        assert!(made == copy(&policy), "{train:?}");
    }
}

#[test]
fn what_trains_moves_as_in_a_full_run_and_what_is_frozen_keeps_its_bits() {
    let before = tensors(&policy());
    let mut full = policy();
    update(&mut full);
    let full = tensors(&full);
    for (train, freeze, half) in [
        (vec![], vec!["*k_proj.weight"], false),
        (vec!["*.{q,v}_proj.*", "*up_proj*"], vec![], false),
        (vec!["model.layers.{1..2}.*"], vec!["*.q_norm.weight", "*.bias"], false),
        (vec!["*.k_norm.weight", "model.norm.weight"], vec![], false),
        (vec!["model.layers.2.mlp.down_proj.weight"], vec![], false),
        (vec![], vec!["model.embed_tokens.weight"], false),
        (vec![], vec![], true),
    ] {
        let mut some = policy();
        some.choose_trained(&choice(&train, &freeze, half), SEED, 0).unwrap();
        let trains: Vec<bool> = some
            .base
            .slots()
            .iter()
            .flat_map(|slot| {
                let mut row = 0;
                slot.parts.iter().map(move |part| {
                    let rows = row..row + part.rows;
                    row = rows.end;
                    slot.trained
                        .iter()
                        .flat_map(|t| &t.rows)
                        .any(|t| t.start <= rows.start && rows.end <= t.end)
                })
            })
            .collect();
        let learner = update(&mut some);
        let (mut trained, mut frozen) = (0, 0);
        for (((name, got), trains), ((_, before), (_, full))) in
            tensors(&some).iter().zip(trains).zip(before.iter().zip(&full))
        {
            assert_ne!(before, full, "{name} has a gradient");
            assert_eq!(
                got,
                if trains { full } else { before },
                "{name}, trained: {trains}, {train:?} {freeze:?}"
            );
            *(if trains { &mut trained } else { &mut frozen }) += 1;
        }
        assert!(trained > 0 && frozen > 0, "{train:?} {freeze:?}");
        let len = some.base.trainable_len();
        assert_eq!(
            len,
            some.base.slots().iter().flat_map(|s| &s.trained).map(|t| t.grad.len()).sum::<usize>()
        );
        for slot in some.base.slots() {
            let k = if let Shape::Matrix { k, .. } = slot.shape { k } else { 1 };
            for run in &slot.trained {
                let rows: usize = run.rows.iter().map(Range::len).sum();
                assert!(run.grad.len() < (rows + 63) * k, "more than the panels that {:?} touch", run.rows);
            }
        }
        let Moments::F32 { m, .. } = &learner.adam.moments else { panic!("moments are f32 by default") };
        assert_eq!(m.len(), len);
        assert_eq!(learner.last_grads().base.len(), len);
    }
}

const DATA: DataSize = DataSize {
    prompt_tokens: 20,
    positions: 84,
    step_rows: 4000,
    group_rows: 500,
    rows: 100,
    heldout: 0,
    text: 2000,
    stored_tokens: 0,
};

#[test]
fn the_memory_plan_counts_what_trains() {
    let recipe = Recipe::load(None, &[]).unwrap();
    let mut policy = policy();
    let whole = MemoryPlan::new(&recipe, &policy, 0, DATA).unwrap();
    policy.choose_trained(&choice(&["model.layers.0.self_attn.q_proj.weight"], &[], false), 0, 0).unwrap();
    let plan = MemoryPlan::new(&recipe, &policy, 0, DATA).unwrap();
    assert_eq!(plan.gradients, 4 * 32 * 24, "32 rows of 24 numbers");
    assert_eq!(plan.moments, 2 * plan.gradients);
    assert_eq!(plan.weights, whole.weights);
    assert_eq!(policy.new_grads().base.len() * 4, plan.gradients);
}

#[test]
fn a_bf16_cache_holds_twice_the_blocks() {
    let plan = |more: &[&str]| {
        let sets: Vec<String> = more.iter().map(|s| s.to_string()).collect();
        let recipe = Recipe::load(None, &sets).unwrap();
        MemoryPlan::new(&recipe, &policy(), 0, DATA).unwrap()
    };
    let (plain, half) = (plan(&[]), plan(&["rollout.kv_precision=\"bf16\""]));
    assert_eq!(plain.kv_blocks, half.kv_blocks);
    // each layer's keys and values are held to whole huge pages, of 2 MiB
    let rounding = 2 * policy().spec.layers * (1 << 20);
    assert!(
        (plain.kv / 2).abs_diff(half.kv) <= rounding,
        "a step's blocks take half: {} {}",
        plain.kv,
        half.kv
    );
    assert!(half.kv < plain.kv * 6 / 10, "{} {}", half.kv, plain.kv);
}

#[test]
fn patterns_that_match_nothing_or_everything_are_refused() {
    for (train, freeze, says) in [
        (vec!["*.qq_proj.*"], vec![], "model.train: pattern `*.qq_proj.*` matches no tensor"),
        (vec![], vec!["model.layers.{2..9"], "model.freeze: pattern `model.layers.{2..9` has a `{`"),
        (vec!["*"], vec!["model.*"], "leave nothing to train"),
    ] {
        let error = policy().choose_trained(&choice(&train, &freeze, false), 0, 0).unwrap_err().to_string();
        assert!(error.contains(says), "{error}");
    }
    let lora = ["model.lora={}".to_string(), "model.half=true".to_string()];
    let error = Recipe::load(None, &lora).unwrap_err().to_string();
    assert!(error.contains("half"), "{error}");
}

const RECIPE: &str = r#"
name = "half"
[model]
half = true
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
max_new_tokens = 12
[algorithm.objective.kl]
coefficient = 0.01
[optimizer]
lr = 1e-3
[train]
steps = 4
checkpoint_every = 1
keep_checkpoints = 99
[[stage]]
kind = "sft"
steps = 2
batch = 4
[[stage]]
kind = "grpo"
"#;

/// A half that trained in the first stage and rests in the second must be in the checkpoints of the second.
#[test]
fn a_run_with_redrawn_halves_resumes_to_the_same_bytes_from_every_checkpoint() {
    let place = Folder::new(RECIPE);
    let whole = place.run("whole", &[]);
    assert_eq!(checkpoints(&whole).len(), 6);
    for last in [1, 2, 3, 5] {
        let cut = place.resumed(&whole, &format!("cut-{last}"), last);
        assert_eq!(weights(&whole), weights(&cut), "from checkpoint {last}");
    }
}
