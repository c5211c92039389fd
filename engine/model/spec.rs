//! What a decoder is: sizes, variants and layer pattern, read from a `config.json`.
//!
//! One [`ModelSpec`] describes every supported family (Llama, Mistral, Qwen2, Qwen3, SmolLM3, Gemma 1-3
//! text, Phi-3, Mixtral, Qwen3-MoE); forward and backward read it and know no family names. Fields follow
//! transformers' configuration classes (v5) and their defaults; the older flat layout (`rope_theta`,
//! `rope_scaling`, `sliding_window_pattern`) gives the same spec. What would change the maths and is not
//! supported is an error that names the field.

use serde_json::{Map, Value, json};

use super::config_fields::{
    FAMILIES, Fields, activation, family, layer_pattern, moe_spec, refuse_unknown, token_ids,
};
pub use super::rope::{RopeScaling, RopeSpec};
use crate::error::{EngineError, Result};
use crate::types::TokenId;

/// Most layers of a config.
const MAX_LAYERS: usize = 2048;

/// Most dimensions of a head.
const MAX_HEAD_DIM: usize = 1 << 16;

/// Nonlinearity of the gated feed-forward.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// x · sigmoid(x).
    Silu,
    /// GELU in its tanh approximation.
    GeluTanh,
}

/// What differs from layer to layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerSpec {
    /// A query sees itself and the `window - 1` tokens before it; `None` sees all.
    pub window: Option<usize>,
    /// Index into [`ModelSpec::ropes`]; `None` for a layer without positions (NoPE).
    pub rope: Option<usize>,
    /// Whether the feed-forward is a mixture ([`ModelSpec::moe`]).
    pub experts: bool,
}

/// A mixture of expert feed-forwards.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MoeSpec {
    /// Experts of a layer.
    pub experts: usize,
    /// Experts that a token goes through.
    pub per_token: usize,
    /// Width of one expert.
    pub ffn: usize,
    /// Whether the chosen experts' probabilities are rescaled to sum 1.
    pub renormalise: bool,
    /// What checkpoints call the experts' tensors.
    pub names: ExpertNames,
}

/// Names of a mixture's tensors: `BLOCK.gate.weight`, `BLOCK.experts.E.GATE.weight`, …
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExpertNames {
    /// The feed-forward within its layer.
    pub block: &'static str,
    /// Gate of an expert.
    pub gate: &'static str,
    /// Up of an expert.
    pub up: &'static str,
    /// Down of an expert.
    pub down: &'static str,
}

impl ExpertNames {
    /// Qwen3-MoE's names.
    pub const QWEN: Self = Self { block: "mlp", gate: "gate_proj", up: "up_proj", down: "down_proj" };
    /// Mixtral's names.
    pub const MIXTRAL: Self = Self { block: "block_sparse_moe", gate: "w1", up: "w3", down: "w2" };
}

/// A decoder-only transformer.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelSpec {
    /// The Hugging Face class, such as `Qwen3ForCausalLM`.
    pub architecture: String,
    /// Rows of the embedding.
    pub vocab: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Number of layers.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key/value heads; divides `heads`.
    pub kv_heads: usize,
    /// Dimensions of a head.
    pub head_dim: usize,
    /// Width of the feed-forward.
    pub ffn: usize,
    /// Added to the mean square in every RMS norm.
    pub norm_eps: f32,
    /// Added to every norm weight: 0, or 1 for Gemma.
    pub norm_offset: f32,
    /// Whether the output matrix is the embedding.
    pub tied: bool,
    /// Biases on the q, k and v projections.
    pub qkv_bias: bool,
    /// A bias on the attention's output projection.
    pub o_bias: bool,
    /// Biases in the feed-forward.
    pub mlp_bias: bool,
    /// RMS norms over each head of q and k, before the rotation.
    pub qk_norm: bool,
    /// Norms after attention and after the feed-forward too (Gemma 2 and 3).
    pub sandwich_norms: bool,
    /// Checkpoints hold `qkv_proj` and `gate_up_proj` fused (Phi-3).
    pub fused_projections: bool,
    /// Nonlinearity of the gate.
    pub activation: Activation,
    /// Factor on the embeddings; 1 but for Gemma.
    pub embed_scale: f32,
    /// Factor on q·k.
    pub attn_scale: f32,
    /// `cap * tanh(score / cap)` on attention scores.
    pub attn_softcap: Option<f32>,
    /// The same on the logits.
    pub final_softcap: Option<f32>,
    /// One entry a layer.
    pub layer_specs: Vec<LayerSpec>,
    /// The rotary embeddings that layers refer to.
    pub ropes: Vec<RopeSpec>,
    /// Longest sequence the model was made for.
    pub max_positions: usize,
    /// Token that starts a text, where there is one.
    pub bos: Option<TokenId>,
    /// Tokens that end a text, per the config.
    pub eos: Vec<TokenId>,
    /// The mixture of the layers that have `experts`.
    pub moe: Option<MoeSpec>,
}

impl ModelSpec {
    /// Reads a `config.json` of either layout.
    ///
    /// # Errors
    /// An unknown architecture, a missing or absurd size, or a field that changes the maths in a way that is
    /// not supported; each names the field, what was expected and what was found.
    pub fn from_config_json(config: &Value) -> Result<Self> {
        let map = config
            .as_object()
            .ok_or_else(|| EngineError::Model("config.json: expected an object at the top".into()))?;
        let f = Fields(map);
        let family = family(&f)?;
        refuse_unknown(map, family)?;
        let arch = family.architecture;
        let gemma = arch.starts_with("Gemma");
        let gemma23 = gemma && arch != "GemmaForCausalLM";

        let (hidden, heads, layers) =
            (f.size("hidden_size")?, f.size("num_attention_heads")?, f.size("num_hidden_layers")?);
        if layers > MAX_LAYERS {
            return Err(Fields::error("num_hidden_layers", &format!("at most {MAX_LAYERS}"), &json!(layers)));
        }
        let head_dim = match (f.size_or_none("head_dim")?, arch) {
            (Some(d), _) => d,
            (None, "Qwen3ForCausalLM") => 128,
            (None, _) if gemma => 256,
            (None, _) if hidden % heads == 0 => hidden / heads,
            (None, _) => {
                return Err(Fields::error(
                    "hidden_size",
                    &format!("a multiple of num_attention_heads ({heads})"),
                    &json!(hidden),
                ));
            }
        };
        let kv_heads = f.size_or_none("num_key_value_heads")?.unwrap_or(heads);
        if heads % kv_heads != 0 {
            return Err(Fields::error(
                "num_key_value_heads",
                &format!("a divisor of num_attention_heads ({heads})"),
                &json!(kv_heads),
            ));
        }
        if head_dim % 2 != 0 || head_dim > MAX_HEAD_DIM {
            let expected = format!("an even number up to {MAX_HEAD_DIM}");
            return Err(Fields::error("head_dim", &expected, &json!(head_dim)));
        }
        let max_positions = f.size("max_position_embeddings")?;
        let attention_bias = f.flag("attention_bias", false)?;
        let (windows, rope_of, ropes) = layer_pattern(&f, arch, layers, head_dim, max_positions)?;
        let moe = moe_spec(&f, arch, layers)?;
        let dense = f.indices("mlp_only_layers", 0)?.unwrap_or_default();
        let sparse_step = f.size_or_none("decoder_sparse_step")?.unwrap_or(1);
        let layer_specs = (0..layers)
            .map(|l| LayerSpec {
                window: windows[l],
                rope: rope_of[l],
                experts: moe.is_some() && !dense.contains(&l) && (l + 1) % sparse_step == 0,
            })
            .collect();
        if f.flag("use_bidirectional_attention", false)? {
            return Err(Fields::error(
                "use_bidirectional_attention",
                "false (only causal attention is supported)",
                &json!(true),
            ));
        }
        let query_scalar =
            if gemma23 { f.positive("query_pre_attn_scalar")?.unwrap_or(256.0) } else { head_dim as f64 };
        let softcap = |key: &str, default: Option<f64>| -> Result<Option<f32>> {
            let default = if map.contains_key(key) { None } else { default };
            Ok(f.positive(key)?.or(default).map(|x| x as f32))
        };
        let gemma2 = arch == "Gemma2ForCausalLM";
        let spec = Self {
            architecture: arch.to_string(),
            vocab: f.size("vocab_size")?,
            hidden,
            layers,
            heads,
            kv_heads,
            head_dim,
            ffn: f.size("intermediate_size")?,
            norm_eps: match f.positive("rms_norm_eps")? {
                Some(eps) => eps as f32,
                None if matches!(arch, "Phi3ForCausalLM" | "MixtralForCausalLM") => 1e-5,
                None => 1e-6,
            },
            norm_offset: if gemma { 1.0 } else { 0.0 },
            tied: f.flag("tie_word_embeddings", gemma || arch == "SmolLM3ForCausalLM")?,
            qkv_bias: attention_bias || arch == "Qwen2ForCausalLM",
            o_bias: attention_bias,
            mlp_bias: f.flag("mlp_bias", false)?,
            qk_norm: matches!(arch, "Qwen3ForCausalLM" | "Qwen3MoeForCausalLM" | "Gemma3ForCausalLM"),
            sandwich_norms: gemma23,
            fused_projections: arch == "Phi3ForCausalLM",
            activation: activation(&f, gemma, arch == "GemmaForCausalLM")?,
            embed_scale: if gemma { (hidden as f64).sqrt() as f32 } else { 1.0 },
            attn_scale: query_scalar.powf(-0.5) as f32,
            // Gemma 3's configs have the field, and transformers hands it to no attention there
            attn_softcap: softcap("attn_logit_softcapping", gemma2.then_some(50.0))?.filter(|_| gemma2),
            final_softcap: softcap("final_logit_softcapping", gemma2.then_some(30.0))?,
            layer_specs,
            ropes,
            max_positions,
            bos: token_ids(&f, "bos_token_id")?.first().copied(),
            eos: token_ids(&f, "eos_token_id")?,
            moe,
        };
        Ok(spec)
    }

    /// A `config.json` that transformers (4 and 5) and [`ModelSpec::from_config_json`] read; `dtype` is
    /// `"float32"` or `"bfloat16"`.
    pub fn to_config_json(&self, dtype: &str) -> Value {
        let arch = self.architecture.as_str();
        let model_type = FAMILIES.iter().find(|f| f.architecture == arch).map_or("llama", |f| f.model_type);
        let takes = |key: &str| FAMILIES.iter().any(|f| f.architecture == arch && f.fields.contains(&key));
        let eos = match self.eos.as_slice() {
            [] => Value::Null,
            [one] => json!(one),
            many => json!(many),
        };
        let mut out = json!({
            "architectures": [arch],
            "model_type": model_type,
            "vocab_size": self.vocab,
            "hidden_size": self.hidden,
            "intermediate_size": self.ffn,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": self.max_positions,
            "rms_norm_eps": shortest(self.norm_eps),
            "tie_word_embeddings": self.tied,
            "attention_dropout": 0.0,
            "bos_token_id": self.bos,
            "eos_token_id": eos,
            // Some families' default lies outside a small vocabulary.
            "pad_token_id": self.eos.first(),
            "use_cache": true,
            "dtype": dtype,
            "torch_dtype": dtype,
        });
        let map = out.as_object_mut().expect("an object literal");
        let act = if self.activation == Activation::Silu { "silu" } else { "gelu_pytorch_tanh" };
        map.insert(
            if takes("hidden_activation") { "hidden_activation" } else { "hidden_act" }.into(),
            json!(act),
        );
        if takes("attention_bias") {
            map.insert("attention_bias".into(), json!(self.o_bias));
        }
        if takes("mlp_bias") {
            map.insert("mlp_bias".into(), json!(self.mlp_bias));
        }
        let window = self.layer_specs.iter().find_map(|l| l.window);
        if takes("sliding_window") {
            map.insert("sliding_window".into(), json!(window));
        }
        if takes("use_sliding_window") {
            map.insert("use_sliding_window".into(), json!(window.is_some()));
        }
        if takes("layer_types") {
            let kinds: Vec<&str> = self
                .layer_specs
                .iter()
                .map(|l| if l.window.is_some() { "sliding_attention" } else { "full_attention" })
                .collect();
            map.insert("layer_types".into(), json!(kinds));
        }
        if takes("no_rope_layers") {
            let has_rope: Vec<u8> = self.layer_specs.iter().map(|l| u8::from(l.rope.is_some())).collect();
            map.insert("no_rope_layers".into(), json!(has_rope));
        }
        if takes("query_pre_attn_scalar") {
            let scalar = f64::from(self.attn_scale).powi(-2);
            // Whole where that is the same scale: what is read back must be.
            let whole = scalar.round();
            let same = (1.0..1e15).contains(&whole) && whole.powf(-0.5) as f32 == self.attn_scale;
            let scalar = if same { json!(whole as u64) } else { json!(scalar) };
            map.insert("query_pre_attn_scalar".into(), scalar);
            map.insert("attn_logit_softcapping".into(), json!(self.attn_softcap));
            map.insert("final_logit_softcapping".into(), json!(self.final_softcap));
        }
        self.insert_ropes(map);
        if let Some(moe) = &self.moe {
            map.insert("num_experts_per_tok".into(), json!(moe.per_token));
            if arch == "MixtralForCausalLM" {
                map.insert("num_local_experts".into(), json!(moe.experts));
            } else {
                let dense: Vec<usize> = (0..self.layers).filter(|&l| !self.layer_specs[l].experts).collect();
                map.insert("num_experts".into(), json!(moe.experts));
                map.insert("moe_intermediate_size".into(), json!(moe.ffn));
                map.insert("norm_topk_prob".into(), json!(moe.renormalise));
                map.insert("decoder_sparse_step".into(), json!(1));
                map.insert("mlp_only_layers".into(), json!(dense));
            }
        }
        out
    }

    /// Both layouts of the rotary parameters, so that either reader finds its own.
    fn insert_ropes(&self, map: &mut Map<String, Value>) {
        let rope_of = |windowed: bool| {
            let layer = self.layer_specs.iter().find(|l| l.window.is_some() == windowed && l.rope.is_some());
            layer
                .and_then(|l| l.rope)
                .or_else(|| (!self.ropes.is_empty()).then_some(0))
                .map(|r| &self.ropes[r])
        };
        if self.architecture == "Gemma3ForCausalLM" {
            let (Some(global), Some(local)) = (rope_of(false), rope_of(true)) else { return };
            let nested = json!({
                "full_attention": global.to_json(self.head_dim), "sliding_attention": local.to_json(self.head_dim),
            });
            map.insert("rope_parameters".into(), nested);
            map.insert("rope_local_base_freq".into(), json!(local.theta));
            insert_old_rope(map, global, self.head_dim);
        } else if let Some(rope) = self.ropes.first() {
            map.insert("rope_parameters".into(), Value::Object(rope.to_json(self.head_dim)));
            insert_old_rope(map, rope, self.head_dim);
            if let (RopeScaling::LongRope { original_positions, .. }, "Phi3ForCausalLM") =
                (&rope.scaling, self.architecture.as_str())
            {
                map.insert("original_max_position_embeddings".into(), json!(original_positions));
            }
        }
    }
}

fn insert_old_rope(map: &mut Map<String, Value>, rope: &RopeSpec, head_dim: usize) {
    map.insert("rope_theta".into(), json!(rope.theta));
    if rope.rotary_dim != head_dim {
        map.insert("partial_rotary_factor".into(), json!(rope.rotary_dim as f64 / head_dim as f64));
    }
    let mut scaling = rope.to_json(head_dim);
    scaling.remove("rope_theta");
    scaling.remove("partial_rotary_factor");
    let scaling = if rope.scaling == RopeScaling::None { Value::Null } else { Value::Object(scaling) };
    map.insert("rope_scaling".into(), scaling);
}

/// The decimal that a person would have written for this f32.
fn shortest(x: f32) -> f64 {
    x.to_string().parse().unwrap_or(f64::from(x))
}
