//! A PEFT LoRA adapter on disk: `adapter_config.json` and `adapter_model.safetensors`, read and written.
//!
//! Which modules a list of targets, a regular expression, `all-linear`, excluded modules and chosen layers name together is
//! peft's business when it makes an adapter; where the config is more than a list, the stored tensors say what came of it.
//!
//! What the config asks for and the engine does not do (biases, layers of its own, …) is an error that names
//! the field; so is a stored matrix that no adapter site takes.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use memmap2::Mmap;
use rft_kernels::Pool;
use serde_json::{Map, Value, json};

use super::export::write_safetensors;
use super::lora::{ALL_LINEAR, Adapter, targets as targets_module};
use super::policy::Policy;
use super::source::{Stored, map_file, read_safetensors, widen};
use crate::config::LoraConfig;
use crate::data::tokenizer::read_object;
use crate::error::{EngineError, Result};

/// An opened adapter folder.
pub struct PeftAdapter {
    path: PathBuf,
    config: LoraConfig,
    base: Option<String>,
    map: Mmap,
    tensors: BTreeMap<String, Stored>,
}

/// Fields that may only be off.
const MUST_BE_OFF: [&str; 9] = [
    "alora_invocation_tokens",
    "fan_in_fan_out",
    "layer_replication",
    "lora_bias",
    "modules_to_save",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_qalora",
];

impl PeftAdapter {
    /// Opens an adapter folder.
    ///
    /// # Errors
    /// Missing or malformed files; a field that is not supported, by name.
    pub fn open(folder: impl AsRef<Path>) -> Result<Self> {
        let folder = folder.as_ref();
        let config_path = folder.join("adapter_config.json");
        let fields = read_object(&config_path)?.ok_or_else(|| {
            EngineError::malformed(
                folder,
                "adapter_config.json",
                "missing\nhint: an adapter is a folder that peft's save_pretrained wrote",
            )
        })?;
        let refused =
            |(field, message): (&'static str, String)| EngineError::malformed(&config_path, field, message);
        let mut config = lora_config(&fields).map_err(refused)?;
        let path = folder.join("adapter_model.safetensors");
        let map = map_file(&path)?;
        let mut tensors = BTreeMap::new();
        read_safetensors(&path, &map, 0, &mut tensors)?;
        if names_by_rule(&fields) {
            config.targets = stored_modules(&fields, tensors.keys()).map_err(refused)?;
        }
        let base = fields.get("base_model_name_or_path").and_then(Value::as_str).map(str::to_string);
        Ok(Self { path, config, base, map, tensors })
    }

    /// Rank, scaling and targets.
    pub fn config(&self) -> &LoraConfig {
        &self.config
    }

    /// The base model that the adapter names.
    pub fn base(&self) -> Option<&str> {
        self.base.as_deref()
    }

    /// Puts the adapter on a policy's base model, in place of one that it has; `seed` is its dropout's.
    ///
    /// # Errors
    /// Missing or misshapen matrices, and stored ones that fit nowhere, each by name.
    pub fn load_into(&self, policy: &mut Policy, seed: u64) -> Result<()> {
        let plan = Adapter::plan(&policy.spec, &self.config)?;
        // a config that lies about its rank must not decide how much is allocated
        for (shape, parts) in &plan.layout {
            for part in parts {
                self.stored(&part.name, &shape.of_part(part))?;
            }
        }
        let mut adapter = Adapter::planned(plan, &self.config, seed);
        let mut used = 0;
        for id in 0..adapter.arena.slots().len() {
            adapter.arena.load_slot(id, |name, shape| {
                used += 1;
                self.tensor(name, shape)
            })?;
        }
        if used != self.tensors.len() {
            let places: Vec<&str> =
                adapter.arena.slots().iter().flat_map(|s| s.parts.iter().map(|p| p.name.as_str())).collect();
            let lost = self.tensors.keys().find(|name| !places.contains(&name.as_str()));
            let lost = lost.map_or("", String::as_str);
            return Err(EngineError::malformed(
                &self.path,
                format!("tensor `{lost}`"),
                "this model has no place for it",
            ));
        }
        policy.adapter = Some(adapter);
        policy.measure_adapter(&Pool::new(1));
        Ok(())
    }

    fn stored(&self, name: &str, expect: &[usize]) -> Result<&Stored> {
        let stored = self
            .tensors
            .get(name)
            .ok_or_else(|| self.fail(name, format!("missing, expected shape {expect:?}")))?;
        match stored.shape == expect {
            true => Ok(stored),
            false => Err(self.fail(name, format!("expected shape {expect:?}, found {:?}", stored.shape))),
        }
    }

    fn fail(&self, tensor: &str, message: String) -> EngineError {
        EngineError::malformed(&self.path, format!("tensor `{tensor}`"), message)
    }

    fn tensor(&self, name: &str, expect: &[usize]) -> Result<Vec<f32>> {
        let stored = self.stored(name, expect)?;
        widen(stored.dtype, &self.map[stored.bytes.clone()])
            .ok_or_else(|| self.fail(name, format!("expected f32, bf16 or f16, found {:?}", stored.dtype)))
    }
}

/// The supported part of an `adapter_config.json`; errors are (field, message).
fn lora_config(fields: &Map<String, Value>) -> std::result::Result<LoraConfig, (&'static str, String)> {
    let get = |key: &str| fields.get(key).filter(|v| !v.is_null());
    let expect = |key: &'static str, what: &str| {
        (key, format!("expected {what}, found {}", fields.get(key).unwrap_or(&Value::Null)))
    };
    if get("peft_type").and_then(Value::as_str) != Some("LORA") {
        return Err(expect("peft_type", "\"LORA\""));
    }
    if get("bias").is_some_and(|b| b != "none") {
        return Err(expect("bias", "\"none\""));
    }
    for key in MUST_BE_OFF {
        let off = match get(key) {
            None | Some(Value::Bool(false)) => true,
            Some(Value::Array(list)) => list.is_empty(),
            Some(Value::Object(map)) => map.is_empty(),
            Some(_) => false,
        };
        if !off {
            return Err((key, format!("{} is not supported", fields[key])));
        }
    }
    let rank = get("r").and_then(Value::as_u64).filter(|r| (1..=4096).contains(r));
    let alpha = get("lora_alpha").and_then(Value::as_f64).filter(|a| a.is_finite());
    let targets = match get("target_modules") {
        Some(Value::Array(list)) => {
            list.iter().map(|t| t.as_str().map(str::to_string)).collect::<Option<Vec<_>>>()
        }
        Some(Value::String(all)) if all == ALL_LINEAR => Some(vec![all.clone()]),
        // a regular expression: see `stored_modules`
        Some(Value::String(_)) => Some(Vec::new()),
        _ => None,
    };
    Ok(LoraConfig {
        rank: rank.ok_or_else(|| expect("r", "a whole number from 1 to 4096"))? as usize,
        alpha: alpha.ok_or_else(|| expect("lora_alpha", "a number"))? as f32,
        rslora: get("use_rslora").and_then(Value::as_bool).unwrap_or(false),
        dora: get("use_dora").and_then(Value::as_bool).unwrap_or(false),
        targets: targets
            .ok_or_else(|| expect("target_modules", "a list of projection names or a pattern"))?,
        dropout: match get("lora_dropout") {
            None => 0.0,
            Some(rate) => {
                let rate = rate.as_f64().filter(|rate| (0.0..1.0).contains(rate));
                rate.ok_or_else(|| expect("lora_dropout", "a number in [0, 1)"))? as f32
            }
        },
        rank_pattern: pattern(fields, "rank_pattern", "whole numbers from 1 to 4096", |value| {
            value.as_u64().filter(|r| (1..=4096).contains(r)).map(|r| r as usize)
        })?,
        alpha_pattern: pattern(fields, "alpha_pattern", "numbers", |value| {
            value.as_f64().filter(|a| a.is_finite()).map(|a| a as f32)
        })?,
    })
}

/// Whether the adapted modules follow from more than a list of names.
fn names_by_rule(fields: &Map<String, Value>) -> bool {
    let set = |key: &str| match fields.get(key) {
        None | Some(Value::Null) => false,
        Some(Value::Array(list)) => !list.is_empty(),
        Some(_) => true,
    };
    let pattern = fields.get("target_modules").and_then(Value::as_str).is_some_and(|t| t != ALL_LINEAR);
    pattern || set("exclude_modules") || set("layers_to_transform")
}

/// The modules that the stored tensors belong to; each must be one that the config's names or pattern allow.
fn stored_modules<'a>(
    fields: &Map<String, Value>,
    tensors: impl Iterator<Item = &'a String>,
) -> std::result::Result<Vec<String>, (&'static str, String)> {
    let modules: BTreeSet<&str> = tensors
        .filter_map(|name| name.strip_prefix("base_model.model.")?.split_once(".lora_").map(|(m, _)| m))
        .collect();
    let targets = &fields["target_modules"];
    let pattern = match targets.as_str().filter(|t| *t != ALL_LINEAR) {
        None => None,
        Some(pattern) => Some(regex::Regex::new(&format!("^(?:{pattern})$")).map_err(|e| {
            ("target_modules", format!("`{pattern}` is no regular expression that is understood here: {e}"))
        })?),
    };
    let named = |module: &str| match (&pattern, targets) {
        (Some(pattern), _) => pattern.is_match(module),
        (None, Value::Array(list)) => {
            list.iter().filter_map(Value::as_str).any(|t| targets_module(t, module))
        }
        _ => true,
    };
    match modules.iter().find(|module| !named(module)) {
        Some(module) => Err((
            "target_modules",
            format!("{targets} does not name `{module}`, which the adapter has tensors of"),
        )),
        None if modules.is_empty() => Err(("target_modules", format!("{targets} names no stored tensor"))),
        None => Ok(modules.into_iter().map(String::from).collect()),
    }
}

/// A table from patterns to numbers; absent is empty.
fn pattern<T>(
    fields: &Map<String, Value>,
    key: &'static str,
    what: &str,
    number: impl Fn(&Value) -> Option<T>,
) -> std::result::Result<BTreeMap<String, T>, (&'static str, String)> {
    let map = match fields.get(key) {
        None | Some(Value::Null) => return Ok(BTreeMap::new()),
        Some(Value::Object(map)) => map,
        Some(other) => return Err((key, format!("expected an object, found {other}"))),
    };
    let entry = |(name, value): (&String, &Value)| {
        let number =
            number(value).ok_or_else(|| (key, format!("expected {what}, found {value} for `{name}`")))?;
        Ok((name.clone(), number))
    };
    map.iter().map(entry).collect()
}

/// `q_proj` of `base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight`.
fn module(tensor: &str) -> Option<&str> {
    tensor.split_once(".lora_")?.0.rsplit('.').next()
}

/// Writes `adapter_config.json` and `adapter_model.safetensors` as peft does.
pub fn write_adapter(out: &Path, adapter: &Adapter, base: &str) -> Result<()> {
    std::fs::create_dir_all(out).map_err(EngineError::io(out))?;
    // other loaders than peft's want the modules by name
    let targets: BTreeSet<&str> = match adapter.config.targets.iter().any(|t| t == ALL_LINEAR) {
        true => adapter
            .arena
            .slots()
            .iter()
            .flat_map(|slot| &slot.parts)
            .filter_map(|p| module(&p.name))
            .collect(),
        false => adapter.config.targets.iter().map(String::as_str).collect(),
    };
    let config = json!({
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": adapter.config.rank,
        "lora_alpha": adapter.config.alpha,
        "lora_dropout": adapter.config.dropout,
        "rank_pattern": adapter.config.rank_pattern,
        "alpha_pattern": adapter.config.alpha_pattern,
        "use_rslora": adapter.config.rslora,
        "use_dora": adapter.config.dora,
        "target_modules": targets,
        "bias": "none",
        "inference_mode": true,
    });
    let path = out.join("adapter_config.json");
    std::fs::write(&path, format!("{config:#}\n")).map_err(EngineError::io(path))?;
    let arena = &adapter.arena;
    let tensors = (0..arena.slots().len()).flat_map(|id| arena.tensors_of(id, arena.values(id)));
    write_safetensors(&out.join("adapter_model.safetensors"), tensors, "float32")
}
