//! A tiny policy with sharp random weights, and prompts for it.

use std::sync::Arc;

use rft_engine::config::{NewModelConfig, Precision};
use rft_engine::data::arithmetic;
use rft_engine::data::tokenizer::Tokenizer;
use rft_engine::model::policy::{Policy, new_model_spec};
use rft_engine::model::spec::ModelSpec;
use rft_engine::types::Prompt;
use rft_kernels::Pool;

/// Positions that [`policy`] is prepared for.
pub const POSITIONS: usize = 128;

/// A two-layer model over the arithmetic tokenizer whose distributions are far from uniform.
pub fn policy(precision: Precision) -> (Policy, Tokenizer) {
    let tokenizer = arithmetic::tokenizer().unwrap();
    let shape = NewModelConfig { hidden: 48, layers: 2, heads: 4, kv_heads: 2, head_dim: 16, ffn: 80 };
    let eos = tokenizer.eos()[0];
    let spec = new_model_spec(&shape, tokenizer.vocab_size(), eos, POSITIONS).unwrap();
    let mut policy = Policy::init(spec, 7);
    for id in 0..policy.base.slots().len() {
        policy.base.values_mut(id).iter_mut().for_each(|w| *w *= 2.5);
    }
    policy.prepare(&Pool::new(1), POSITIONS, precision);
    (policy, tokenizer)
}

/// A mixture of four experts, two a token, in the second of its two layers, otherwise as [`policy`].
pub fn mixture(precision: Precision) -> (Policy, Tokenizer) {
    let tokenizer = arithmetic::tokenizer().unwrap();
    let spec = ModelSpec::from_config_json(&serde_json::json!({
        "architectures": ["Qwen3MoeForCausalLM"],
        "vocab_size": tokenizer.vocab_size(),
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 80,
        "moe_intermediate_size": 40,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "norm_topk_prob": true,
        "decoder_sparse_step": 2,
        "max_position_embeddings": POSITIONS,
        "eos_token_id": tokenizer.eos()[0],
    }));
    let mut policy = Policy::init(spec.unwrap(), 7);
    for id in 0..policy.base.slots().len() {
        policy.base.values_mut(id).iter_mut().for_each(|w| *w *= 2.5);
    }
    policy.prepare(&Pool::new(1), POSITIONS, precision);
    (policy, tokenizer)
}

/// Prompts of these lengths, their tokens spread over the vocabulary.
pub fn prompts(lengths: &[usize], vocab: usize) -> Vec<Arc<Prompt>> {
    let prompt = |(index, &length): (usize, &usize)| {
        Arc::new(Prompt {
            index,
            id: index.to_string(),
            text: String::new(),
            tokens: (0..length).map(|i| ((i * 7 + index * 3 + i * i) % vocab) as u32).collect(),
            task: Arc::default(),
            fields: Arc::default(),
        })
    };
    lengths.iter().enumerate().map(prompt).collect()
}
