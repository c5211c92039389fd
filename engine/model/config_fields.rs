//! The fields of a `config.json`: which family reads which, with what defaults, and what is refused.

use serde_json::{Map, Value, json};

use super::rope::RopeSpec;
use super::spec::{Activation, ExpertNames, MoeSpec};
use crate::error::{EngineError, Result};
use crate::types::TokenId;

/// Largest value of any size in a config; anything above is taken for corruption.
const MAX_SIZE: usize = 1 << 24;

/// Most experts of a model, all layers together.
const MAX_EXPERTS: usize = 1 << 16;

/// How a family reads its config, where families differ.
pub(super) struct Family {
    pub(super) architecture: &'static str,
    pub(super) model_type: &'static str,
    /// Fields of this family that change the maths, beyond the common ones.
    pub(super) fields: &'static [&'static str],
}

pub(super) const FAMILIES: [Family; 11] = [
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
const SUSPICIOUS: [&str; 40] = [
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
    "shared",
    "conv",
    "cross",
    "dense",
    "depth",
    "encoder",
    "interleav",
    "kv_",
    "lora_rank",
    "mup",
    "per_layer",
    "position",
    "ssm",
    "vision",
];

/// A config with its field errors.
pub(super) struct Fields<'a>(pub(super) &'a Map<String, Value>);

impl Fields<'_> {
    pub(super) fn error(key: &str, expected: &str, found: &Value) -> EngineError {
        EngineError::Model(format!("config field `{key}`: expected {expected}, found {found}"))
    }

    pub(super) fn get(&self, key: &str) -> Option<&Value> {
        self.0.get(key).filter(|v| !v.is_null())
    }

    pub(super) fn size_or_none(&self, key: &str) -> Result<Option<usize>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match value.as_u64() {
            Some(n) if n >= 1 && n <= MAX_SIZE as u64 => Ok(Some(n as usize)),
            _ => Err(Self::error(key, &format!("a whole number from 1 to {MAX_SIZE}"), value)),
        }
    }

    pub(super) fn size(&self, key: &str) -> Result<usize> {
        self.size_or_none(key)?.ok_or_else(|| {
            EngineError::Model(format!("config field `{key}` is missing; it has no safe default"))
        })
    }

    pub(super) fn number(&self, key: &str) -> Result<Option<f64>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match value.as_f64() {
            Some(x) if x.is_finite() => Ok(Some(x)),
            _ => Err(Self::error(key, "a finite number", value)),
        }
    }

    pub(super) fn positive(&self, key: &str) -> Result<Option<f64>> {
        match self.number(key)? {
            Some(x) if x <= 0.0 => Err(Self::error(key, "a number above 0", &json!(x))),
            Some(x) if !(x as f32).is_normal() => {
                Err(Self::error(key, "a number that f32 holds (1.2e-38 to 3.4e38)", &json!(x)))
            }
            x => Ok(x),
        }
    }

    pub(super) fn flag(&self, key: &str, default: bool) -> Result<bool> {
        match self.get(key) {
            None => Ok(default),
            Some(Value::Bool(b)) => Ok(*b),
            Some(other) => Err(Self::error(key, "true or false", other)),
        }
    }

    pub(super) fn object(&self, key: &str) -> Result<Option<&Map<String, Value>>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Object(map)) => Ok(Some(map)),
            Some(other) => Err(Self::error(key, "an object", other)),
        }
    }

    /// A list of at least `least` whole numbers.
    pub(super) fn indices(&self, key: &str, least: usize) -> Result<Option<Vec<usize>>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let list: Option<Vec<usize>> =
            value.as_array().and_then(|a| a.iter().map(|v| v.as_u64().map(|n| n as usize)).collect());
        match list {
            Some(list) if list.len() >= least => Ok(Some(list)),
            _ => Err(Self::error(key, &format!("a list of {least} or more whole numbers"), value)),
        }
    }
}

pub(super) fn family(f: &Fields) -> Result<&'static Family> {
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
pub(super) fn refuse_unknown(map: &Map<String, Value>, family: &Family) -> Result<()> {
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

pub(super) fn activation(f: &Fields, gemma: bool, gemma1: bool) -> Result<Activation> {
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

pub(super) fn token_ids(f: &Fields, key: &str) -> Result<Vec<TokenId>> {
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

pub(super) fn moe_spec(f: &Fields, arch: &str, layers: usize) -> Result<Option<MoeSpec>> {
    let renormalise = match arch {
        "MixtralForCausalLM" => true,
        "Qwen3MoeForCausalLM" => f.flag("norm_topk_prob", false)?,
        _ => return Ok(None),
    };
    let experts = match f.size_or_none("num_local_experts")? {
        Some(n) => n,
        None => f.size("num_experts")?,
    };
    // a config that lies must not decide how many tensors are looked for
    if experts.saturating_mul(layers) > MAX_EXPERTS {
        return Err(Fields::error(
            if f.get("num_local_experts").is_some() { "num_local_experts" } else { "num_experts" },
            &format!("at most {} in {layers} layers", MAX_EXPERTS / layers),
            &json!(experts),
        ));
    }
    let per_token = f.size("num_experts_per_tok")?;
    if per_token > experts {
        return Err(Fields::error(
            "num_experts_per_tok",
            &format!("at most the number of experts ({experts})"),
            &json!(per_token),
        ));
    }
    let ffn =
        f.size(if arch == "MixtralForCausalLM" { "intermediate_size" } else { "moe_intermediate_size" })?;
    let names = if arch == "MixtralForCausalLM" { ExpertNames::MIXTRAL } else { ExpertNames::QWEN };
    Ok(Some(MoeSpec { experts, per_token, ffn, renormalise, names }))
}

/// Window and rotary index of each layer, and the rotary embeddings.
#[allow(clippy::type_complexity)]
pub(super) fn layer_pattern(
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
