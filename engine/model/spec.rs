//! What a decoder is: sizes, variants and layer pattern, read from a `config.json`.
//!
//! One [`ModelSpec`] describes every supported family (Llama, Mistral, Qwen2, Qwen3, SmolLM3, Gemma 1-3
//! text, Phi-3, Mixtral, Qwen3-MoE); forward and backward read it and know no family names. Fields follow
//! transformers' configuration classes (v5) and their defaults; the older flat layout (`rope_theta`,
//! `rope_scaling`, `sliding_window_pattern`) gives the same spec. What would change the maths and is not
//! supported is an error that names the field.

use serde_json::{Map, Value, json};

pub use super::rope::{RopeScaling, RopeSpec};
use crate::error::{EngineError, Result};
use crate::types::TokenId;

/// Largest value of any size in a config; anything above is taken for corruption.
const MAX_SIZE: usize = 1 << 24;
/// Most layers of a config.
const MAX_LAYERS: usize = 2048;

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

/// How a family reads its config, where families differ.
struct Family {
    architecture: &'static str,
    model_type: &'static str,
    /// Fields of this family that change the maths, beyond the common ones.
    fields: &'static [&'static str],
}

const FAMILIES: [Family; 11] = [
    Family { architecture: "LlamaForCausalLM", model_type: "llama", fields: &["attention_bias", "mlp_bias"] },
    Family { architecture: "MistralForCausalLM", model_type: "mistral", fields: &["sliding_window"] },
    Family { architecture: "Qwen2ForCausalLM", model_type: "qwen2", fields: QWEN_WINDOW },
    Family {
        architecture: "Qwen3ForCausalLM",
        model_type: "qwen3",
        fields: &[
            "attention_bias",
            "sliding_window",
            "use_sliding_window",
            "max_window_layers",
            "layer_types",
        ],
    },
    Family {
        architecture: "SmolLM3ForCausalLM",
        model_type: "smollm3",
        fields: &[
            "attention_bias",
            "mlp_bias",
            "sliding_window",
            "use_sliding_window",
            "max_window_layers",
            "layer_types",
            "no_rope_layers",
            "no_rope_layer_interval",
        ],
    },
    Family {
        architecture: "GemmaForCausalLM",
        model_type: "gemma",
        fields: &["attention_bias", "hidden_activation", "use_bidirectional_attention"],
    },
    Family { architecture: "Gemma2ForCausalLM", model_type: "gemma2", fields: GEMMA_FIELDS },
    Family { architecture: "Gemma3ForCausalLM", model_type: "gemma3_text", fields: GEMMA_FIELDS },
    Family {
        architecture: "Phi3ForCausalLM",
        model_type: "phi3",
        fields: &["sliding_window", "partial_rotary_factor", "original_max_position_embeddings"],
    },
    Family {
        architecture: "MixtralForCausalLM",
        model_type: "mixtral",
        fields: &["sliding_window", "num_local_experts", "num_experts", "num_experts_per_tok"],
    },
    Family {
        architecture: "Qwen3MoeForCausalLM",
        model_type: "qwen3_moe",
        fields: &[
            "attention_bias",
            "sliding_window",
            "use_sliding_window",
            "max_window_layers",
            "decoder_sparse_step",
            "moe_intermediate_size",
            "num_experts_per_tok",
            "num_experts",
            "num_local_experts",
            "norm_topk_prob",
            "mlp_only_layers",
        ],
    },
];
const QWEN_WINDOW: &[&str] = &["sliding_window", "use_sliding_window", "max_window_layers", "layer_types"];
const GEMMA_FIELDS: &[&str] = &[
    "attention_bias",
    "hidden_activation",
    "use_bidirectional_attention",
    "query_pre_attn_scalar",
    "sliding_window",
    "layer_types",
    "sliding_window_pattern",
    "_sliding_window_pattern",
    "final_logit_softcapping",
    "attn_logit_softcapping",
    "rope_local_base_freq",
];
/// Fields that every family reads.
const COMMON_FIELDS: [&str; 17] = [
    "architectures",
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",
    "tie_word_embeddings",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "partial_rotary_factor",
];
/// Fields that sound like maths and are not: training-time noise and initialisation, caching, placement, ids.
const HARMLESS_FIELDS: [&str; 21] = [
    "attention_dropout",
    "resid_pdrop",
    "embd_pdrop",
    "hidden_dropout",
    "pretraining_tp",
    "initializer_range",
    "use_cache",
    "cache_implementation",
    "output_router_logits",
    "router_aux_loss_coef",
    "router_jitter_noise",
    "attn_implementation",
    "_attn_implementation",
    "_attn_implementation_autoset",
    "attention_probs_dropout_prob",
    "original_max_position_embeddings",
    "max_window_layers",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "transformers_version",
];
/// Parts of names of fields that, in other models, change the maths.
const SUSPICIOUS: [&str; 27] = [
    "attention",
    "attn",
    "act_fn",
    "activation",
    "alibi",
    "bias",
    "chunk",
    "clip",
    "compress",
    "expert",
    "heads",
    "layer_types",
    "logit",
    "moe",
    "multiplier",
    "norm",
    "parallel",
    "pattern",
    "quantization",
    "residual",
    "rope",
    "rotary",
    "scal",
    "sink",
    "softcap",
    "window",
    "shared_layers",
];

/// A config with its field errors.
struct Fields<'a>(&'a Map<String, Value>);

impl Fields<'_> {
    fn error(key: &str, expected: &str, found: &Value) -> EngineError {
        EngineError::Model(format!("config field `{key}`: expected {expected}, found {found}"))
    }

    fn get(&self, key: &str) -> Option<&Value> {
        self.0.get(key).filter(|v| !v.is_null())
    }

    fn size_or_none(&self, key: &str) -> Result<Option<usize>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match value.as_u64() {
            Some(n) if n >= 1 && n <= MAX_SIZE as u64 => Ok(Some(n as usize)),
            _ => Err(Self::error(key, &format!("a whole number from 1 to {MAX_SIZE}"), value)),
        }
    }

    fn size(&self, key: &str) -> Result<usize> {
        self.size_or_none(key)?.ok_or_else(|| {
            EngineError::Model(format!("config field `{key}` is missing; it has no safe default"))
        })
    }

    fn number(&self, key: &str) -> Result<Option<f64>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match value.as_f64() {
            Some(x) if x.is_finite() => Ok(Some(x)),
            _ => Err(Self::error(key, "a finite number", value)),
        }
    }

    fn positive(&self, key: &str) -> Result<Option<f64>> {
        match self.number(key)? {
            Some(x) if x <= 0.0 => Err(Self::error(key, "a number above 0", &json!(x))),
            x => Ok(x),
        }
    }

    fn flag(&self, key: &str, default: bool) -> Result<bool> {
        match self.get(key) {
            None => Ok(default),
            Some(Value::Bool(b)) => Ok(*b),
            Some(other) => Err(Self::error(key, "true or false", other)),
        }
    }

    fn object(&self, key: &str) -> Result<Option<&Map<String, Value>>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Object(map)) => Ok(Some(map)),
            Some(other) => Err(Self::error(key, "an object", other)),
        }
    }

    /// A list of at least `least` whole numbers.
    fn indices(&self, key: &str, least: usize) -> Result<Option<Vec<usize>>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let list: Option<Vec<usize>> =
            value.as_array().and_then(|a| a.iter().map(|v| v.as_u64().map(|n| n as usize)).collect());
        match list {
            Some(list) if list.len() >= least => Ok(Some(list)),
            _ => Err(Self::error(key, &format!("a list of {least} or more whole numbers"), value)),
        }
    }
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
        if head_dim % 2 != 0 {
            return Err(Fields::error("head_dim", "an even number", &json!(head_dim)));
        }
        let max_positions = f.size("max_position_embeddings")?;
        let attention_bias = f.flag("attention_bias", false)?;
        let (windows, rope_of, ropes) = layer_pattern(&f, arch, layers, head_dim, max_positions)?;
        let moe = moe_spec(&f, arch)?;
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
            attn_softcap: softcap("attn_logit_softcapping", gemma2.then_some(50.0))?,
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
            let scalar = if (scalar - scalar.round()).abs() < 1e-3 {
                json!(scalar.round() as u64)
            } else {
                json!(scalar)
            };
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

fn family(f: &Fields) -> Result<&'static Family> {
    let architecture = match f.get("architectures") {
        None => None,
        Some(Value::Array(list)) if list.len() == 1 => list[0].as_str(),
        Some(other) => return Err(Fields::error("architectures", "a list of one name", other)),
    };
    let known = || FAMILIES.iter().map(|f| f.architecture).collect::<Vec<_>>().join(", ");
    let model_type = f.get("model_type").and_then(Value::as_str);
    let found = match (architecture, model_type) {
        (Some(a), _) => FAMILIES.iter().find(|f| f.architecture == a),
        (None, Some(t)) => FAMILIES.iter().find(|f| f.model_type == t),
        (None, None) => {
            return Err(EngineError::Model(
                "config.json names neither `architectures` nor `model_type`".into(),
            ));
        }
    };
    let name = architecture.or(model_type).unwrap_or_default();
    let found = found.ok_or_else(|| {
        EngineError::Model(format!(
            "config field `architectures`: `{name}` is not supported (known: {})",
            known()
        ))
    })?;
    match model_type {
        Some(t) if t != found.model_type => Err(EngineError::Model(format!(
            "config field `model_type`: `{t}` does not fit architecture `{}` (expected `{}`)",
            found.architecture, found.model_type
        ))),
        _ => Ok(found),
    }
}

/// Refuses fields that change the maths of other models and that this family does not read.
fn refuse_unknown(map: &Map<String, Value>, family: &Family) -> Result<()> {
    for (key, value) in map {
        let key = key.as_str();
        let read =
            COMMON_FIELDS.contains(&key) || family.fields.contains(&key) || HARMLESS_FIELDS.contains(&key);
        let off = matches!(value, Value::Null | Value::Bool(false))
            || value.as_f64() == Some(0.0)
            || value.as_array().is_some_and(Vec::is_empty);
        // Written by transformers 5 for every family; it must then say what the family does anyway.
        let says_nothing = key == "layer_types"
            && value.as_array().is_some_and(|kinds| kinds.iter().all(|k| k == "full_attention"));
        if !read && !off && !says_nothing && SUSPICIOUS.iter().any(|part| key.contains(part)) {
            return Err(EngineError::Model(format!(
                "config field `{key}` = {value} is not supported for {}\nhint: remove it from config.json if it is known not to change the computation",
                family.architecture
            )));
        }
    }
    Ok(())
}

fn activation(f: &Fields, gemma: bool, gemma1: bool) -> Result<Activation> {
    // Gemma checkpoints say "gelu" in `hidden_act` and mean the tanh form that `hidden_activation` names.
    let key = if gemma { "hidden_activation" } else { "hidden_act" };
    match f.get(key) {
        None => Ok(if gemma { Activation::GeluTanh } else { Activation::Silu }),
        Some(v) => match v.as_str() {
            Some("silu" | "swish") => Ok(Activation::Silu),
            Some("gelu_pytorch_tanh" | "gelu_new" | "gelu_fast") => Ok(Activation::GeluTanh),
            Some("gelu") if gemma1 => Ok(Activation::GeluTanh),
            _ => Err(Fields::error(key, "silu or gelu_pytorch_tanh", v)),
        },
    }
}

fn token_ids(f: &Fields, key: &str) -> Result<Vec<TokenId>> {
    let one = |v: &Value| {
        v.as_u64()
            .and_then(|n| TokenId::try_from(n).ok())
            .ok_or_else(|| Fields::error(key, "a token id or a list of them", v))
    };
    match f.get(key) {
        None => Ok(vec![]),
        Some(Value::Array(list)) => list.iter().map(one).collect(),
        Some(v) => Ok(vec![one(v)?]),
    }
}

fn moe_spec(f: &Fields, arch: &str) -> Result<Option<MoeSpec>> {
    let renormalise = match arch {
        "MixtralForCausalLM" => true,
        "Qwen3MoeForCausalLM" => f.flag("norm_topk_prob", false)?,
        _ => return Ok(None),
    };
    let experts = match f.size_or_none("num_local_experts")? {
        Some(n) => n,
        None => f.size("num_experts")?,
    };
    let per_token = f.size("num_experts_per_tok")?;
    if per_token > experts {
        return Err(Fields::error(
            "num_experts_per_tok",
            &format!("at most the number of experts ({experts})"),
            &json!(per_token),
        ));
    }
    let ffn = f.size(if renormalise && arch == "MixtralForCausalLM" {
        "intermediate_size"
    } else {
        "moe_intermediate_size"
    })?;
    Ok(Some(MoeSpec { experts, per_token, ffn, renormalise }))
}

/// Window and rotary index of each layer, and the rotary embeddings.
#[allow(clippy::type_complexity)]
fn layer_pattern(
    f: &Fields,
    arch: &str,
    layers: usize,
    head_dim: usize,
    max_positions: usize,
) -> Result<(Vec<Option<usize>>, Vec<Option<usize>>, Vec<RopeSpec>)> {
    let gated = matches!(
        arch,
        "Qwen2ForCausalLM" | "Qwen3ForCausalLM" | "Qwen3MoeForCausalLM" | "SmolLM3ForCausalLM"
    );
    let has_windows = gated
        || matches!(
            arch,
            "MistralForCausalLM"
                | "MixtralForCausalLM"
                | "Phi3ForCausalLM"
                | "Gemma2ForCausalLM"
                | "Gemma3ForCausalLM"
        );
    let window = match f.size_or_none("sliding_window")? {
        _ if !has_windows || (gated && !f.flag("use_sliding_window", false)?) => None,
        None if !f.0.contains_key("sliding_window")
            && (arch.starts_with("Gemma") || arch == "MistralForCausalLM") =>
        {
            Some(4096)
        }
        window => window,
    };
    let rotates = match (arch, f.indices("no_rope_layers", layers)?) {
        ("SmolLM3ForCausalLM", Some(list)) => list.iter().take(layers).map(|&r| r != 0).collect(),
        ("SmolLM3ForCausalLM", None) => {
            let every = f.size_or_none("no_rope_layer_interval")?.unwrap_or(4);
            (0..layers).map(|l| (l + 1) % every != 0).collect()
        }
        _ => vec![true; layers],
    };
    let sliding: Vec<bool> = match f.get("layer_types").filter(|_| gated || arch.starts_with("Gemma")) {
        Some(Value::Array(kinds)) if kinds.len() == layers => kinds
            .iter()
            .map(|kind| match kind.as_str() {
                Some("sliding_attention") => Ok(true),
                Some("full_attention") => Ok(false),
                _ => Err(Fields::error("layer_types", "sliding_attention or full_attention", kind)),
            })
            .collect::<Result<_>>()?,
        Some(other) => return Err(Fields::error("layer_types", &format!("a list of {layers} kinds"), other)),
        None => {
            let pattern = match f.size_or_none("sliding_window_pattern")? {
                Some(n) => n,
                None => f.size_or_none("_sliding_window_pattern")?.unwrap_or(6),
            };
            let first_windowed = match f.get("max_window_layers") {
                None => 28,
                Some(v) => {
                    v.as_u64().ok_or_else(|| Fields::error("max_window_layers", "a whole number", v))?
                        as usize
                }
            };
            (0..layers)
                .map(|l| match arch {
                    "Gemma2ForCausalLM" => l % 2 == 0,
                    "Gemma3ForCausalLM" => (l + 1) % pattern != 0,
                    "Qwen2ForCausalLM" | "Qwen3ForCausalLM" => l >= first_windowed,
                    "SmolLM3ForCausalLM" => !rotates[l],
                    _ => true,
                })
                .collect()
        }
    };
    if sliding.iter().any(|s| *s) && arch.starts_with("Gemma3") && window.is_none() {
        return Err(EngineError::Model(
            "config field `sliding_window`: layers of kind sliding_attention need one".into(),
        ));
    }
    let windows: Vec<Option<usize>> = sliding.iter().map(|s| window.filter(|_| *s)).collect();

    let default_theta = match arch {
        "SmolLM3ForCausalLM" => 2e6,
        "MixtralForCausalLM" | "Gemma3ForCausalLM" => 1e6,
        _ => 1e4,
    };
    let theta = f.positive("rope_theta")?.unwrap_or(default_theta);
    let partial = f.positive("partial_rotary_factor")?.unwrap_or(1.0);
    let original = match arch {
        "Phi3ForCausalLM" => Some(f.size_or_none("original_max_position_embeddings")?.unwrap_or(4096)),
        _ => None,
    };
    let none = Map::new();
    let parse = |params: &Map<String, Value>, theta: f64| {
        let mut params = params.clone();
        if arch == "Phi3ForCausalLM" && rope_kind(&params) == Some("yarn") {
            params.insert("rope_type".into(), json!("longrope"));
        }
        RopeSpec::from_json(&params, theta, head_dim, partial, max_positions, original)
            .map_err(|e| EngineError::Model(format!("config field `rope_parameters` / `rope_scaling`: {e}")))
    };
    let old = f.object("rope_scaling")?;
    let new = f.object("rope_parameters")?;
    if arch == "Gemma3ForCausalLM" {
        let nested = |key: &str| match new.and_then(|n| n.get(key)) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::Object(map)) => Ok(Some(map)),
            Some(other) => Err(Fields::error("rope_parameters", &format!("an object under `{key}`"), other)),
        };
        if let Some(flat) = new.filter(|n| n.contains_key("rope_type")) {
            return Err(Fields::error(
                "rope_parameters",
                "objects under full_attention and sliding_attention",
                &Value::Object(flat.clone()),
            ));
        }
        let global = parse(nested("full_attention")?.or(old).unwrap_or(&none), theta)?;
        let local_theta = f.positive("rope_local_base_freq")?.unwrap_or(1e4);
        let local = parse(nested("sliding_attention")?.unwrap_or(&none), local_theta)?;
        let rope_of = sliding.iter().map(|s| Some(usize::from(*s))).collect();
        return Ok((windows, rope_of, vec![global, local]));
    }
    // transformers 5 nests by layer type where a model has several kinds of layer; all must then agree.
    let flat = match new {
        Some(map) if map.contains_key("full_attention") || map.contains_key("sliding_attention") => {
            let mut kinds = map.values().filter_map(Value::as_object);
            let first = kinds.next().unwrap_or(&none);
            if kinds.any(|k| k != first) {
                return Err(EngineError::Model(format!(
                    "config field `rope_parameters`: different rotary embeddings by layer type are not supported for {arch}"
                )));
            }
            Some(first)
        }
        other => other,
    };
    // The older key wins where both are present, as in transformers.
    let rope = parse(
        old.or(flat).unwrap_or(&none),
        match old.or(flat).and_then(|m| m.get("rope_theta")) {
            Some(_) => theta,
            None => flat.and_then(|m| m.get("rope_theta")).and_then(Value::as_f64).unwrap_or(theta),
        },
    )?;
    let rope_of = rotates.iter().map(|r| r.then_some(0)).collect();
    Ok((windows, rope_of, vec![rope]))
}

fn rope_kind(params: &Map<String, Value>) -> Option<&str> {
    params.get("rope_type").or_else(|| params.get("type")).and_then(Value::as_str)
}
