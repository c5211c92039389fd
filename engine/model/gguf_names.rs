//! A GGUF file seen as a Hugging Face model: config, tensor names and layout, tokenizer and chat template.
//!
//! The inverse of llama.cpp's `convert_hf_to_gguf.py` for the families that [`super::spec`] knows: q and k rows of
//! Llama-type files go back from interleaved to half-split rotary order, Gemma's norms lose the 1 that was added,
//! experts come out of their stacks.

use std::path::Path;

use serde_json::{Map, Value, json};
use tokenizers::AddedToken;
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::normalizers::NFC;
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::tokenizer::normalizer::SplitDelimiterBehavior;

use super::gguf::{Gguf, GgufTensor, Meta, dequantise};
use super::rows::{Place, RowOrder};
use crate::data::tokenizer::Tokenizer;
use crate::error::{EngineError, Result};

/// What is wrong, and where; the caller adds the path.
type Checked<T> = std::result::Result<T, (String, String)>;

/// GGUF architecture, Hugging Face class and `model_type`.
const FAMILIES: [(&str, &str, &str); 9] = [
    ("llama", "LlamaForCausalLM", "llama"),
    ("qwen2", "Qwen2ForCausalLM", "qwen2"),
    ("qwen3", "Qwen3ForCausalLM", "qwen3"),
    ("qwen3moe", "Qwen3MoeForCausalLM", "qwen3_moe"),
    ("smollm3", "SmolLM3ForCausalLM", "smollm3"),
    ("gemma", "GemmaForCausalLM", "gemma"),
    ("gemma2", "Gemma2ForCausalLM", "gemma2"),
    ("gemma3", "Gemma3ForCausalLM", "gemma3_text"),
    ("phi3", "Phi3ForCausalLM", "phi3"),
];

/// A parsed file with its translation.
pub struct GgufModel {
    gguf: Gguf,
    arch: String,
    config: Value,
}

/// A stored tensor under its Hugging Face name.
pub(super) struct Found<'a> {
    stored: &'a GgufTensor,
    /// Its shape as Hugging Face has it.
    pub(super) shape: Vec<usize>,
    change: Change,
}

/// What turns stored numbers into Hugging Face's.
#[derive(Clone, Copy)]
enum Change {
    None,
    /// Rows of each head go from (pair, half) to (half, pair) order.
    Unrotate {
        heads: usize,
    },
    /// Norm weights were stored with 1 added.
    MinusOne,
    /// One slice of a stack along the first dimension.
    Expert(usize),
}

impl GgufModel {
    /// Translates the metadata; `file` is needed for rotary factors that are stored as tensors.
    ///
    /// # Errors
    /// `(key, message)` for an unknown architecture or missing metadata.
    pub fn new(gguf: Gguf, file: &[u8]) -> Checked<Self> {
        let arch =
            gguf.metadata.get("general.architecture").and_then(Meta::as_str).unwrap_or_default().to_string();
        let known = FAMILIES.iter().find(|f| f.0 == arch);
        let &(_, class, model_type) = known.ok_or_else(|| {
            let known = FAMILIES.map(|f| f.0).join(", ");
            ("general.architecture".to_string(), format!("`{arch}` is not supported (known: {known})"))
        })?;
        let mut model = Self { gguf, arch, config: Value::Null };
        model.config = Value::Object(model.build_config(class, model_type, file)?);
        Ok(model)
    }

    /// The `config.json` of the model.
    pub fn config(&self) -> &Value {
        &self.config
    }

    /// The chat template inside the file.
    pub fn chat_template(&self) -> Option<&str> {
        self.gguf.metadata.get("tokenizer.chat_template").and_then(Meta::as_str)
    }

    fn meta(&self, key: &str) -> Option<&Meta> {
        self.gguf.metadata.get(&format!("{}.{key}", self.arch))
    }

    fn number(&self, key: &str) -> Option<f64> {
        self.meta(key).and_then(Meta::as_f64)
    }

    fn size(&self, key: &str) -> Checked<u64> {
        // Some writers give one entry a layer; they must agree.
        let full = || format!("{}.{key}", self.arch);
        match self.meta(key) {
            Some(Meta::List(items)) if !items.is_empty() && items.iter().all(|i| *i == items[0]) => {
                items[0].as_u64().ok_or_else(|| (full(), "expected whole numbers".into()))
            }
            Some(Meta::List(_)) => Err((full(), "sizes that differ by layer are not supported".into())),
            Some(m) => m.as_u64().ok_or_else(|| (full(), format!("expected a whole number, found {m:?}"))),
            None => Err((full(), "missing".into())),
        }
    }

    fn build_config(&self, class: &str, model_type: &str, file: &[u8]) -> Checked<Map<String, Value>> {
        let (heads, hidden, layers) =
            (self.size("attention.head_count")?, self.size("embedding_length")?, self.size("block_count")?);
        if heads == 0 || hidden == 0 {
            return Err((format!("{}.attention.head_count", self.arch), "sizes must be above 0".into()));
        }
        let kv_heads = match self.meta("attention.head_count_kv") {
            None => heads,
            Some(_) => self.size("attention.head_count_kv")?,
        };
        let head_dim = match self.meta("attention.key_length") {
            None => hidden / heads,
            Some(_) => self.size("attention.key_length")?,
        };
        if let Some(v) = self.meta("attention.value_length").and_then(Meta::as_u64).filter(|v| *v != head_dim)
        {
            return Err((
                format!("{}.attention.value_length", self.arch),
                format!("{v}; only values as wide as keys ({head_dim}) are supported"),
            ));
        }
        let embedding = self.gguf.tensors.get("token_embd.weight");
        let vocab = embedding
            .and_then(|t| t.shape.first().copied())
            .ok_or_else(|| ("token_embd.weight".to_string(), "missing".to_string()))?;
        let experts = self.meta("expert_count").and_then(Meta::as_u64).unwrap_or(0);
        let (class, model_type) = match (class, experts) {
            ("LlamaForCausalLM", 1..) => ("MixtralForCausalLM", "mixtral"),
            other => (other.0, model_type),
        };
        let eps = self.number("attention.layer_norm_rms_epsilon").unwrap_or(1e-6) as f32;
        let id = |key: &str| {
            self.gguf
                .metadata
                .get(&format!("tokenizer.ggml.{key}"))
                .and_then(Meta::as_u64)
                .map_or(Value::Null, Value::from)
        };
        let config = json!({
            "architectures": [class],
            "model_type": model_type,
            "vocab_size": vocab,
            "hidden_size": hidden,
            "intermediate_size": self.size("feed_forward_length")?,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": head_dim,
            "max_position_embeddings": self.size("context_length")?,
            // The decimal that the writer rounded to f32.
            "rms_norm_eps": eps.to_string().parse::<f64>().unwrap_or(1e-6),
            "tie_word_embeddings": !self.gguf.tensors.contains_key("output.weight"),
            "attention_dropout": 0.0,
            "use_cache": true,
            "dtype": "float32",
            "torch_dtype": "float32",
            "bos_token_id": id("bos_token_id"),
            "eos_token_id": id("eos_token_id"),
            "pad_token_id": id("padding_token_id"),
        });
        let Value::Object(mut config) = config else { unreachable!("an object literal") };
        let has = |tensor: &str| self.gguf.tensors.contains_key(tensor);
        let act = if self.arch.starts_with("gemma") {
            ("hidden_activation", "gelu_pytorch_tanh")
        } else {
            ("hidden_act", "silu")
        };
        config.insert(act.0.into(), json!(act.1));
        if class != "Qwen2ForCausalLM" && has("blk.0.attn_q.bias") {
            config.insert("attention_bias".into(), json!(true));
        }
        if has("blk.0.ffn_down.bias") {
            config.insert("mlp_bias".into(), json!(true));
        }
        match self.meta("attention.sliding_window").and_then(Meta::as_u64) {
            Some(window) if window > 0 => {
                config.insert("sliding_window".into(), json!(window));
            }
            _ if self.arch == "phi3" => {
                config.insert("sliding_window".into(), Value::Null);
            }
            _ => {}
        }
        match class {
            "Gemma2ForCausalLM" | "Gemma3ForCausalLM" => {
                // Only the 27B models scale by hidden/heads; the file does not say so (nor need it for llama.cpp).
                let by_hidden = layers == if class == "Gemma2ForCausalLM" { 46 } else { 62 };
                config.insert(
                    "query_pre_attn_scalar".into(),
                    json!(if by_hidden { hidden / heads } else { head_dim }),
                );
                for (key, field) in [
                    ("attn_logit_softcapping", "attn_logit_softcapping"),
                    ("final_logit_softcapping", "final_logit_softcapping"),
                ] {
                    config.insert(field.into(), self.number(key).map_or(Value::Null, Value::from));
                }
            }
            "MixtralForCausalLM" => {
                config.insert("num_local_experts".into(), json!(experts));
                config.insert("num_experts_per_tok".into(), json!(self.size("expert_used_count")?));
            }
            "Qwen3MoeForCausalLM" => {
                config.insert("num_experts".into(), json!(experts));
                config.insert("num_experts_per_tok".into(), json!(self.size("expert_used_count")?));
                config
                    .insert("moe_intermediate_size".into(), json!(self.size("expert_feed_forward_length")?));
                config.insert("norm_topk_prob".into(), json!(true));
                let dense = |l: &u64| !has(&format!("blk.{l}.ffn_gate_inp.weight"));
                let dense: Vec<u64> = (0..layers.min(1 << 11)).filter(dense).collect();
                config.insert("mlp_only_layers".into(), json!(dense));
            }
            _ => {}
        }
        self.add_rope(&mut config, head_dim, file)?;
        Ok(config)
    }

    fn add_rope(&self, config: &mut Map<String, Value>, head_dim: u64, file: &[u8]) -> Checked<()> {
        let theta = self.number("rope.freq_base").unwrap_or(10000.0);
        config.insert("rope_theta".into(), json!(theta));
        if self.arch == "gemma3" {
            config.insert(
                "rope_local_base_freq".into(),
                json!(self.number("rope.freq_base_swa").unwrap_or(10000.0)),
            );
        }
        if let Some(dim) = self.meta("rope.dimension_count").and_then(Meta::as_u64).filter(|d| *d != head_dim)
        {
            config.insert("partial_rotary_factor".into(), json!(dim as f64 / head_dim as f64));
        }
        let original = self.number("rope.scaling.original_context_length");
        if let Some(n) = original.filter(|_| self.arch == "phi3") {
            config.insert("original_max_position_embeddings".into(), json!(n as u64));
        }
        let factors = |name: &str| -> Checked<Option<Vec<f64>>> {
            let Some(t) = self.gguf.tensors.get(name) else { return Ok(None) };
            let kind = t.kind.map_err(|code| (name.to_string(), format!("ggml type {code} is not read")))?;
            let mut out = vec![];
            dequantise(kind, &file[t.bytes.clone()], &mut out);
            Ok(Some(out.iter().map(|f| f64::from(*f)).collect()))
        };
        let kind = self.meta("rope.scaling.type").and_then(Meta::as_str).unwrap_or("none");
        let factor = self.number("rope.scaling.factor");
        let scaling = if let (Some(long), Some(short)) =
            (factors("rope_factors_long.weight")?, factors("rope_factors_short.weight")?)
        {
            json!({
                "rope_type": "longrope", "long_factor": long, "short_factor": short,
                "attention_factor": self.number("rope.scaling.attn_factor"),
            })
        } else if let Some(stored) = factors("rope_freqs.weight")? {
            llama3_scaling(theta, head_dim as usize, &stored).ok_or_else(|| {
                (
                    "rope_freqs.weight".to_string(),
                    "these rotary factors are none of Llama 3.1's or 3.2's".to_string(),
                )
            })?
        } else {
            match kind {
                "none" => Value::Null,
                "linear" => json!({"rope_type": "linear", "factor": factor}),
                "yarn" => json!({
                    "rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original,
                }),
                other => {
                    return Err((
                        format!("{}.rope.scaling.type", self.arch),
                        format!("`{other}` is not supported"),
                    ));
                }
            }
        };
        config.insert("rope_scaling".into(), scaling);
        Ok(())
    }

    /// The stored tensor of a Hugging Face name.
    pub(super) fn find(&self, name: &str) -> Option<Found<'_>> {
        let (stored_name, expert) = self.stored_name(name)?;
        let stored = self.gguf.tensors.get(&stored_name)?;
        let heads = |key: &str| self.size(key).unwrap_or(1) as usize;
        let rotated = matches!(self.arch.as_str(), "llama" | "smollm3");
        let change = match expert {
            Some(e) if stored.shape.len() == 3 && e < stored.shape[0] => Change::Expert(e),
            Some(_) => return None,
            None if rotated && name.contains(".q_proj.") => {
                Change::Unrotate { heads: heads("attention.head_count") }
            }
            None if rotated && name.contains(".k_proj.") => Change::Unrotate {
                heads: self
                    .size("attention.head_count_kv")
                    .map_or_else(|_| heads("attention.head_count"), |n| n as usize),
            },
            None if self.arch.starts_with("gemma") && name.ends_with("norm.weight") => Change::MinusOne,
            None => Change::None,
        };
        let shape = if expert.is_some() { stored.shape[1..].to_vec() } else { stored.shape.clone() };
        Some(Found { stored, shape, change })
    }

    /// Names of [`GgufModel::find`]'s tensors, sorted.
    pub(super) fn names(&self) -> Vec<String> {
        let mut names = vec![];
        for stored in self.gguf.tensors.keys() {
            names.extend(self.hf_names(stored));
        }
        names.sort();
        names
    }

    /// The first stored tensor, by its own name, none of whose Hugging Face names `uses` says yes to. Rotary factors are
    /// part of the config.
    pub(super) fn unused(&self, uses: impl Fn(&str) -> bool) -> Option<String> {
        let config = |stored: &str| stored.starts_with("rope_f") || stored.ends_with(".rope_freqs.weight");
        let used = |stored: &str| self.hf_names(stored).iter().any(|name| uses(name));
        self.gguf.tensors.keys().find(|stored| !config(stored) && !used(stored)).cloned()
    }

    /// Where a tensor lies; the file's code of a storage type that is not read as the error.
    pub(super) fn place(&self, name: &str) -> std::result::Result<Place, u32> {
        let found = self.find(name).expect("the caller has looked it up");
        let (kind, mut bytes) = (found.stored.kind?, found.stored.bytes.clone());
        let mut order = RowOrder::Same;
        match found.change {
            Change::None | Change::MinusOne => {}
            Change::Expert(e) => {
                let one = bytes.len() / found.stored.shape[0];
                bytes = bytes.start + e * one..bytes.start + (e + 1) * one;
            }
            Change::Unrotate { heads } => {
                let rows = found.shape[0];
                // A shape that does not divide is left as it is; the config's shape check has refused it already.
                if rows > 0 && heads > 0 && rows.is_multiple_of(2 * heads) {
                    order = RowOrder::Unrotate { head: rows / heads };
                }
            }
        }
        let add = if matches!(found.change, Change::MinusOne) { -1.0 } else { 0.0 };
        Ok(Place { kind, bytes, shape: found.shape, order, add })
    }

    /// GGUF name of a Hugging Face name, and the expert where it is one of a stack.
    fn stored_name(&self, name: &str) -> Option<(String, Option<usize>)> {
        match name {
            "model.embed_tokens.weight" => return Some(("token_embd.weight".into(), None)),
            "model.norm.weight" => return Some(("output_norm.weight".into(), None)),
            "lm_head.weight" => return Some(("output.weight".into(), None)),
            _ => {}
        }
        let (layer, rest) = name.strip_prefix("model.layers.")?.split_once('.')?;
        let layer: usize = layer.parse().ok()?;
        let (part, suffix) = rest.rsplit_once('.')?;
        if let Some((block, expert, matrix)) = expert_part(part) {
            let stacked = match (block, matrix) {
                ("mlp", "gate_proj") | ("block_sparse_moe", "w1") => "ffn_gate_exps",
                ("mlp", "up_proj") | ("block_sparse_moe", "w3") => "ffn_up_exps",
                ("mlp", "down_proj") | ("block_sparse_moe", "w2") => "ffn_down_exps",
                _ => return None,
            };
            return Some((format!("blk.{layer}.{stacked}.{suffix}"), Some(expert)));
        }
        let stored = self.parts().iter().find(|p| p.0 == part)?.1;
        Some((format!("blk.{layer}.{stored}.{suffix}"), None))
    }

    /// Hugging Face names of a GGUF name: one, or one for each expert.
    fn hf_names(&self, stored: &str) -> Vec<String> {
        match stored {
            "token_embd.weight" => return vec!["model.embed_tokens.weight".into()],
            "output_norm.weight" => return vec!["model.norm.weight".into()],
            "output.weight" => return vec!["lm_head.weight".into()],
            _ => {}
        }
        let Some((layer, rest)) = stored.strip_prefix("blk.").and_then(|r| r.split_once('.')) else {
            return vec![];
        };
        let Some((part, suffix)) = rest.rsplit_once('.') else { return vec![] };
        let mixtral = self.config["model_type"] == "mixtral";
        let matrix = match (part, mixtral) {
            ("ffn_gate_exps", false) => "mlp.experts.{e}.gate_proj",
            ("ffn_up_exps", false) => "mlp.experts.{e}.up_proj",
            ("ffn_down_exps", false) => "mlp.experts.{e}.down_proj",
            ("ffn_gate_exps", true) => "block_sparse_moe.experts.{e}.w1",
            ("ffn_up_exps", true) => "block_sparse_moe.experts.{e}.w3",
            ("ffn_down_exps", true) => "block_sparse_moe.experts.{e}.w2",
            ("ffn_gate_inp", true) => {
                return vec![format!("model.layers.{layer}.block_sparse_moe.gate.{suffix}")];
            }
            _ => {
                let part = self.parts().iter().find(|p| p.1 == part);
                return part.map(|p| format!("model.layers.{layer}.{}.{suffix}", p.0)).into_iter().collect();
            }
        };
        // Bounded: a header may claim any number of empty experts.
        let experts = self.gguf.tensors[stored].shape.first().copied().unwrap_or(0).min(4096);
        (0..experts)
            .map(|e| format!("model.layers.{layer}.{}.{suffix}", matrix.replace("{e}", &e.to_string())))
            .collect()
    }

    /// Parts of a layer: Hugging Face's name, GGUF's name.
    fn parts(&self) -> &'static [(&'static str, &'static str)] {
        const SHARED: &[(&str, &str)] = &[
            ("input_layernorm", "attn_norm"),
            ("self_attn.q_proj", "attn_q"),
            ("self_attn.k_proj", "attn_k"),
            ("self_attn.v_proj", "attn_v"),
            ("self_attn.o_proj", "attn_output"),
            ("self_attn.q_norm", "attn_q_norm"),
            ("self_attn.k_norm", "attn_k_norm"),
            ("post_attention_layernorm", "ffn_norm"),
            ("mlp.gate_proj", "ffn_gate"),
            ("mlp.up_proj", "ffn_up"),
            ("mlp.down_proj", "ffn_down"),
            ("mlp.gate", "ffn_gate_inp"),
            ("block_sparse_moe.gate", "ffn_gate_inp"),
        ];
        const SANDWICH: &[(&str, &str)] = &[
            ("input_layernorm", "attn_norm"),
            ("self_attn.q_proj", "attn_q"),
            ("self_attn.k_proj", "attn_k"),
            ("self_attn.v_proj", "attn_v"),
            ("self_attn.o_proj", "attn_output"),
            ("self_attn.q_norm", "attn_q_norm"),
            ("self_attn.k_norm", "attn_k_norm"),
            ("post_attention_layernorm", "post_attention_norm"),
            ("pre_feedforward_layernorm", "ffn_norm"),
            ("post_feedforward_layernorm", "post_ffw_norm"),
            ("mlp.gate_proj", "ffn_gate"),
            ("mlp.up_proj", "ffn_up"),
            ("mlp.down_proj", "ffn_down"),
        ];
        const FUSED: &[(&str, &str)] = &[
            ("input_layernorm", "attn_norm"),
            ("self_attn.qkv_proj", "attn_qkv"),
            ("self_attn.o_proj", "attn_output"),
            ("post_attention_layernorm", "ffn_norm"),
            ("mlp.gate_up_proj", "ffn_up"),
            ("mlp.down_proj", "ffn_down"),
        ];
        match self.arch.as_str() {
            "gemma2" | "gemma3" => SANDWICH,
            "phi3" => FUSED,
            _ => SHARED,
        }
    }

    /// The tokenizer of the metadata, or of a `tokenizer.json` beside the file where the metadata's kind is not
    /// supported.
    ///
    /// # Errors
    /// A vocabulary that is missing, malformed or of an unsupported kind.
    pub fn tokenizer(&self, path: &Path) -> Result<Tokenizer> {
        let fail = |(place, message): (String, String)| EngineError::malformed(path, place, message);
        let get = |key: &str| self.gguf.metadata.get(&format!("tokenizer.ggml.{key}"));
        let kind = get("model").and_then(Meta::as_str).unwrap_or_default();
        let pre = get("pre").and_then(Meta::as_str).unwrap_or("default");
        let splitting = (kind == "gpt2").then(|| splitting(pre)).flatten();
        let Some(splitting) = splitting else {
            if let Some(folder) = path.parent().filter(|f| f.join("tokenizer.json").exists()) {
                return Tokenizer::from_folder(folder, &[]);
            }
            return Err(fail((
                "tokenizer.ggml".into(),
                format!(
                    "kind `{kind}` with pre-tokenizer `{pre}` is not supported\nhint: put the model's tokenizer.json and tokenizer_config.json beside the GGUF file"
                ),
            )));
        };
        let texts = |key: &str| -> Checked<Vec<&str>> {
            let place = || format!("tokenizer.ggml.{key}");
            let list = get(key)
                .and_then(Meta::as_list)
                .ok_or_else(|| (place(), "missing or not a list".to_string()))?;
            list.iter().map(|m| m.as_str().ok_or_else(|| (place(), "expected texts".to_string()))).collect()
        };
        let tokens = texts("tokens").map_err(fail)?;
        let mut merges = vec![];
        for merge in texts("merges").map_err(fail)? {
            let pair = merge.split_once(' ').ok_or_else(|| {
                fail((
                    "tokenizer.ggml.merges".into(),
                    format!("`{merge}` is not two tokens with a space between"),
                ))
            })?;
            merges.push((pair.0.to_string(), pair.1.to_string()));
        }
        let mut vocab = Vocab::default();
        for (id, token) in tokens.iter().enumerate() {
            if vocab.insert(token.to_string(), id as u32).is_some() {
                return Err(fail(("tokenizer.ggml.tokens".into(), format!("`{token}` appears twice"))));
            }
        }
        let wrong = |e: tokenizers::Error| EngineError::malformed(path, "tokenizer.ggml", e.to_string());
        let model = BPE::builder().vocab_and_merges(vocab, merges).ignore_merges(splitting.ignore_merges);
        let mut inner = tokenizers::Tokenizer::new(model.build().map_err(wrong)?);
        if splitting.nfc {
            inner.with_normalizer(Some(NFC)).map_err(wrong)?;
        }
        inner
            .with_pre_tokenizer(Some(Sequence::new(splitting.steps)))
            .with_decoder(Some(ByteLevel::new(false, true, true)));
        let kinds = get("token_type").and_then(Meta::as_list).unwrap_or_default();
        let mut added: Vec<AddedToken> = vec![];
        for (token, kind) in tokens.iter().zip(kinds) {
            match kind.as_u64() {
                Some(3) => added.push(AddedToken::from(*token, true).normalized(false)),
                Some(4) => added.push(AddedToken::from(*token, false).normalized(false)),
                _ => {}
            }
        }
        inner.add_tokens(added).map_err(wrong)?;
        let mut roles = std::collections::BTreeMap::new();
        for (key, role) in [
            ("bos_token_id", "bos_token"),
            ("eos_token_id", "eos_token"),
            ("padding_token_id", "pad_token"),
            ("unknown_token_id", "unk_token"),
        ] {
            if let Some(id) = get(key).and_then(Meta::as_u64) {
                let token = tokens.get(id as usize).ok_or_else(|| {
                    fail((
                        format!("tokenizer.ggml.{key}"),
                        format!("{id} is not among the {} tokens", tokens.len()),
                    ))
                })?;
                roles.insert(role.to_string(), token.to_string());
            }
        }
        let turn = get("eot_token_id").and_then(Meta::as_u64).filter(|id| (*id as usize) < tokens.len());
        Tokenizer::new(inner, roles, &turn.map(|id| id as u32).into_iter().collect::<Vec<_>>())
    }
}

/// `("mlp", 3, "gate_proj")` of `mlp.experts.3.gate_proj`.
fn expert_part(part: &str) -> Option<(&str, usize, &str)> {
    let (block, rest) = part.split_once(".experts.")?;
    let (expert, matrix) = rest.split_once('.')?;
    Some((block, expert.parse().ok()?, matrix))
}

/// The published `llama3` scaling that gives these divisors of the frequencies.
fn llama3_scaling(theta: f64, head_dim: usize, stored: &[f64]) -> Option<Value> {
    use super::rope::{RopeScaling, RopeSpec};
    let candidates = [(8.0, 1.0, 4.0, 8192.0), (32.0, 1.0, 4.0, 8192.0)];
    candidates.iter().find_map(|&(factor, low, high, original)| {
        let scaling = RopeScaling::Llama3 {
            factor,
            low_freq_factor: low,
            high_freq_factor: high,
            original_positions: original,
        };
        let plain = RopeSpec { theta, rotary_dim: head_dim, scaling: RopeScaling::None }.inv_freq(0).0;
        let scaled = RopeSpec { theta, rotary_dim: head_dim, scaling }.inv_freq(0).0;
        let same = plain.len() == stored.len()
            && plain.iter().zip(&scaled).zip(stored).all(|((p, s), f)| (p / s / f - 1.0).abs() < 1e-4);
        same.then(|| {
            json!({
                "rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high,
                "original_max_position_embeddings": original as u64,
            })
        })
    })
}

/// How a byte-level vocabulary cuts text before merging.
struct Splitting {
    steps: Vec<PreTokenizerWrapper>,
    nfc: bool,
    ignore_merges: bool,
}

/// llama.cpp's name of a pre-tokenizer to the `tokenizers` steps of the models that it stands for.
fn splitting(pre: &str) -> Option<Splitting> {
    let bytes = |use_regex: bool| ByteLevel::new(false, true, use_regex).into();
    let split = |pattern: &str| {
        Split::new(SplitPattern::Regex(pattern.into()), SplitDelimiterBehavior::Isolated, false)
            .ok()
            .map(PreTokenizerWrapper::from)
    };
    const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
    const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
    Some(match pre {
        "smollm" | "starcoder" | "refact" | "codeshell" => {
            Splitting { steps: vec![Digits::new(true).into(), bytes(true)], nfc: false, ignore_merges: false }
        }
        "default" | "gpt-2" | "phi-2" | "olmo" => {
            Splitting { steps: vec![bytes(true)], nfc: false, ignore_merges: false }
        }
        "qwen2" | "deepseek-r1-qwen" => {
            Splitting { steps: vec![split(QWEN2)?, bytes(false)], nfc: true, ignore_merges: false }
        }
        "llama-bpe" | "llama3" | "llama-v3" | "smaug-bpe" => {
            Splitting { steps: vec![split(LLAMA3)?, bytes(false)], nfc: false, ignore_merges: true }
        }
        _ => return None,
    })
}
