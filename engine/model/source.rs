//! A model on disk: a Hugging Face folder (safetensors, single or sharded) or a GGUF file.
//!
//! [`ModelSource::open`] checks the files' headers; their numbers are mapped piece by piece as they are wanted, so
//! nothing is held twice. Tensors go by their Hugging Face names whatever the file. What is wrong with
//! a file is an error that names the file, the tensor, what was expected and what was found.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use memmap2::{Mmap, MmapOptions};
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};

use super::experts::stacked;
use super::export::ModelFiles;
use super::gguf::{GgmlType, Gguf};
use super::gguf_names::GgufModel;
use super::rows::{Place, RowOrder, StoredRows};
use super::spec::ModelSpec;
use crate::data::template::ChatTemplate;
use crate::data::tokenizer::{Tokenizer, read_object};
use crate::error::{EngineError, Result};

/// An opened model.
pub struct ModelSource {
    path: PathBuf,
    spec: ModelSpec,
    config: Value,
    weights: Weights,
}

enum Weights {
    Safetensors { files: Vec<(PathBuf, File)>, tensors: BTreeMap<String, Stored> },
    Gguf { file: File, model: Box<GgufModel> },
}

/// Where one safetensors tensor lies.
pub(super) struct Stored {
    file: usize,
    pub(super) dtype: Dtype,
    pub(super) shape: Vec<usize>,
    pub(super) bytes: Range<usize>,
}

impl ModelSource {
    /// Opens a folder with a `config.json`, a `.gguf` file, or a folder that holds exactly one `.gguf` file.
    ///
    /// # Errors
    /// Missing files or shards, malformed headers, an unsupported architecture or config field.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let kind = std::fs::metadata(path).map_err(EngineError::io(path))?;
        if kind.is_file() {
            return Self::open_gguf(path);
        }
        if path.join("config.json").exists() {
            return Self::open_folder(path);
        }
        let mut found = with_extension(path, "gguf")?;
        match (found.pop(), found.is_empty()) {
            (Some(one), true) => Self::open_gguf(&one),
            (Some(_), false) => Err(EngineError::malformed(
                path,
                "*.gguf",
                "several GGUF files and no config.json\nhint: name the file itself as the model",
            )),
            (None, _) => Err(EngineError::malformed(
                path,
                "config.json",
                "missing, and there is no .gguf file either\nhint: a model is a Hugging Face folder (config.json, *.safetensors, tokenizer.json) or a GGUF file",
            )),
        }
    }

    fn open_folder(path: &Path) -> Result<Self> {
        let config_path = path.join("config.json");
        let config = read_object(&config_path)?.map(Value::Object).unwrap_or_default();
        let spec = ModelSpec::from_config_json(&config)
            .map_err(|e| EngineError::Model(format!("{}: {}", config_path.display(), without_kind(e))))?;
        let index_path = path.join("model.safetensors.index.json");
        let index = read_object(&index_path)?;
        let names: Vec<PathBuf> = match &index {
            None => {
                let single = path.join("model.safetensors");
                let found = if single.exists() { vec![single] } else { with_extension(path, "safetensors")? };
                let found: Vec<_> =
                    found.into_iter().filter(|p| !p.ends_with("adapter_model.safetensors")).collect();
                if found.is_empty() {
                    return Err(EngineError::malformed(
                        path,
                        "model.safetensors",
                        "missing\nhint: pickled weights (pytorch_model.bin) are not read; convert them with transformers' save_pretrained",
                    ));
                }
                if found.iter().any(|p| p.to_string_lossy().contains("-of-")) {
                    return Err(EngineError::malformed(
                        &index_path,
                        "file",
                        "missing, but the folder holds shards (…-of-….safetensors)\nhint: copy the index too",
                    ));
                }
                found
            }
            Some(index) => shard_names(path, &index_path, index)?,
        };
        let mut files = vec![];
        let mut tensors = BTreeMap::new();
        for name in names {
            let (file, map) = open_mapped(&name)?;
            read_safetensors(&name, &map, files.len(), &mut tensors)?;
            files.push((name, file));
        }
        if let Some(map) = index.as_ref().and_then(|i| i.get("weight_map")).and_then(Value::as_object) {
            for (tensor, file) in map {
                let found = tensors.get(tensor).map(|t| files[t.file].0.file_name().unwrap_or_default());
                if found.map(|f| f.to_string_lossy().into_owned()).as_deref() != file.as_str() {
                    return Err(EngineError::malformed(
                        &index_path,
                        tensor,
                        format!("the index puts it in {file}, which does not hold it"),
                    ));
                }
            }
        }
        Ok(Self { path: path.to_path_buf(), spec, config, weights: Weights::Safetensors { files, tensors } })
    }

    fn open_gguf(path: &Path) -> Result<Self> {
        if path.extension().is_some_and(|e| e != "gguf") {
            return Err(EngineError::malformed(
                path,
                "file",
                "not a .gguf file\nhint: for safetensors, name the folder that holds config.json",
            ));
        }
        let (file, map) = open_mapped(path)?;
        let parsed =
            Gguf::parse(&map).map_err(|(place, message)| EngineError::malformed(path, place, message))?;
        let model = GgufModel::new(parsed, &map)
            .map_err(|(place, message)| EngineError::malformed(path, place, message))?;
        let config = model.config().clone();
        let spec = ModelSpec::from_config_json(&config)
            .map_err(|e| EngineError::Model(format!("{}: {}", path.display(), without_kind(e))))?;
        Ok(Self {
            path: path.to_path_buf(),
            spec,
            config,
            weights: Weights::Gguf { file, model: Box::new(model) },
        })
    }

    /// The folder or file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What the model is.
    pub fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    /// Its `config.json` (built from the metadata for GGUF).
    pub fn config(&self) -> &Value {
        &self.config
    }

    /// Its tokenizer; it must not have more tokens than the embedding has rows.
    ///
    /// # Errors
    /// Missing or malformed files, a tokenizer that does not fit the model.
    pub fn tokenizer(&self) -> Result<Tokenizer> {
        let tokenizer = match &self.weights {
            Weights::Safetensors { .. } => Tokenizer::from_folder(&self.path, &self.spec.eos)?,
            Weights::Gguf { model, .. } => model.tokenizer(&self.path)?,
        };
        if tokenizer.vocab_size() > self.spec.vocab {
            return Err(EngineError::malformed(
                &self.path,
                "tokenizer",
                format!(
                    "it has ids up to {}, but the model's embedding has only {} rows\nhint: tokenizer and weights are of different models",
                    tokenizer.vocab_size() - 1,
                    self.spec.vocab
                ),
            ));
        }
        if let Some(end) = tokenizer.eos().iter().find(|id| **id as usize >= self.spec.vocab) {
            return Err(EngineError::malformed(
                &self.path,
                "eos_token_id",
                format!("{end} lies outside the vocabulary of {}", self.spec.vocab),
            ));
        }
        Ok(tokenizer)
    }

    /// The source of its chat template, where it has one.
    ///
    /// # Errors
    /// Malformed files.
    pub fn chat_template_source(&self) -> Result<Option<String>> {
        match &self.weights {
            Weights::Gguf { model, .. } => Ok(model.chat_template().map(str::to_string)),
            Weights::Safetensors { .. } => folder_template(&self.path),
        }
    }

    /// Its chat template with the tokenizer's special tokens, where it has one.
    ///
    /// # Errors
    /// Malformed files; a template that does not parse.
    pub fn chat_template(&self, tokenizer: &Tokenizer) -> Result<Option<ChatTemplate>> {
        self.chat_template_source()?
            .map(|source| ChatTemplate::new(&source, tokenizer.special_tokens()))
            .transpose()
    }

    /// Everything but the weights, for [`super::export::write_hf_folder`].
    ///
    /// # Errors
    /// Malformed files.
    pub fn files(&self) -> Result<ModelFiles> {
        match &self.weights {
            Weights::Safetensors { .. } => ModelFiles::from_folder(&self.path, self.config.clone()),
            Weights::Gguf { .. } => {
                let tokenizer = self.tokenizer()?;
                let template = self.chat_template_source()?;
                ModelFiles::new(self.config.clone(), &tokenizer, template.as_deref())
            }
        }
    }

    /// Whether the tensor is stored.
    pub fn has(&self, name: &str) -> bool {
        match &self.weights {
            Weights::Safetensors { tensors, .. } => locate(tensors, name).is_some(),
            Weights::Gguf { model, .. } => model.find(name).is_some(),
        }
    }

    /// Hugging Face names of all stored tensors, sorted.
    pub fn names(&self) -> Vec<String> {
        match &self.weights {
            Weights::Safetensors { tensors, .. } => tensors.keys().cloned().collect(),
            Weights::Gguf { model, .. } => model.names(),
        }
    }

    /// Shape of a stored tensor, slowest dimension first.
    pub fn shape(&self, name: &str) -> Option<Vec<usize>> {
        match &self.weights {
            Weights::Safetensors { tensors, .. } => locate(tensors, name).map(|(_, shape, _)| shape),
            Weights::Gguf { model, .. } => model.find(name).map(|t| t.shape),
        }
    }

    /// Whether a tensor is stored with exactly the shape `expect`; nothing is read.
    ///
    /// # Errors
    /// A missing tensor or another shape, by name.
    pub fn expect(&self, name: &str, expect: &[usize]) -> Result<()> {
        let Some(shape) = self.shape(name) else {
            let close = self.names();
            let close = close.iter().filter(|n| n.len() < 256).min_by_key(|n| edits(n, name));
            let hint = close.map_or(String::new(), |n| format!("\nhint: the closest stored name is `{n}`"));
            return Err(EngineError::malformed(
                &self.path,
                format!("tensor `{name}`"),
                format!("missing: a {} needs it, of shape {expect:?}{hint}", self.spec.architecture),
            ));
        };
        if shape != expect {
            return Err(EngineError::malformed(
                &self.path,
                format!("tensor `{name}`"),
                format!("expected shape {expect:?} from the config, found {shape:?}"),
            ));
        }
        Ok(())
    }

    /// Refuses weights that the decoder would leave out: what is stored beyond the tensors of these names.
    ///
    /// Frequencies of the rotary embedding, which follow from the config, and the head of tied models may be there.
    ///
    /// # Errors
    /// The first such tensor, by name.
    pub(super) fn refuse_unused(&self, names: &[String]) -> Result<()> {
        let harmless = |name: &str| {
            name.ends_with("rotary_emb.inv_freq") || (self.spec.tied && name == "lm_head.weight")
        };
        let unused = match &self.weights {
            Weights::Safetensors { tensors, .. } => {
                let used: HashSet<&str> = names.iter().filter_map(|n| stored_name(tensors, n)).collect();
                tensors.keys().find(|name| !used.contains(name.as_str()) && !harmless(name)).cloned()
            }
            Weights::Gguf { model, .. } => {
                let used: HashSet<&str> = names.iter().map(String::as_str).collect();
                model.unused(|name| used.contains(name) || harmless(name))
            }
        };
        let Some(name) = unused else { return Ok(()) };
        Err(EngineError::malformed(
            &self.path,
            format!("tensor `{name}`"),
            format!(
                "stored, but a {} with this config has no use for it, so the results would not be the model's\n\
                 hint: check the sizes and switches of the config; leave the tensor out of the file if it is known not to matter",
                self.spec.architecture
            ),
        ))
    }

    /// One tensor as f32, row-major, of exactly the shape `expect`.
    ///
    /// # Errors
    /// A missing tensor, another shape, or a storage type that is not read; each names the tensor.
    pub fn tensor(&self, name: &str, expect: &[usize]) -> Result<Vec<f32>> {
        self.rows(name, expect)?.read().map_err(|e| self.read_error(e))
    }

    /// One tensor of exactly the shape `expect`, to be read by rows.
    pub(super) fn rows(&self, name: &str, expect: &[usize]) -> Result<StoredRows<'_>> {
        self.expect(name, expect)?;
        let refuse = |found: String| {
            EngineError::malformed(
                &self.path,
                format!("tensor `{name}`"),
                format!(
                    "expected numbers as f32, bf16 or f16 (GGUF: also Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q4_K, Q5_K, Q6_K), found {found}"
                ),
            )
        };
        match &self.weights {
            Weights::Safetensors { files, tensors } => {
                let (stored, shape, bytes) = locate(tensors, name).expect("its shape was found");
                let kind = match stored.dtype {
                    Dtype::F32 => GgmlType::F32,
                    Dtype::BF16 => GgmlType::Bf16,
                    Dtype::F16 => GgmlType::F16,
                    other => return Err(refuse(format!("{other:?}"))),
                };
                let place = Place { kind, bytes, shape, order: RowOrder::Same, add: 0.0 };
                Ok(StoredRows { file: &files[stored.file].1, place })
            }
            Weights::Gguf { file, model } => {
                let place = model.place(name).map_err(|code| refuse(format!("ggml type {code}")))?;
                Ok(StoredRows { file, place })
            }
        }
    }

    /// A file that could be opened and cannot be mapped.
    pub(super) fn read_error(&self, e: std::io::Error) -> EngineError {
        EngineError::io(&self.path)(e)
    }
}

/// The message without the "model: " of its kind, for wrapping with a path.
fn without_kind(e: EngineError) -> String {
    match e {
        EngineError::Model(message) => message,
        other => other.to_string(),
    }
}

/// Number of edits between two names (Levenshtein).
fn edits(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.bytes().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.bytes().enumerate() {
            let replaced = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

fn with_extension(folder: &Path, extension: &str) -> Result<Vec<PathBuf>> {
    let mut found = vec![];
    for entry in std::fs::read_dir(folder).map_err(EngineError::io(folder))? {
        let path = entry.map_err(EngineError::io(folder))?.path();
        if path.extension().is_some_and(|e| e == extension) {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

/// Opens a file and maps all of it.
fn open_mapped(path: &Path) -> Result<(File, Mmap)> {
    let file = File::open(path).map_err(EngineError::io(path))?;
    let len = file.metadata().map_err(EngineError::io(path))?.len() as usize;
    let map = map_range(&file, 0..len).map_err(EngineError::io(path))?;
    Ok((file, map))
}

/// Maps a file read-only.
pub(super) fn map_file(path: &Path) -> Result<Mmap> {
    open_mapped(path).map(|(_, map)| map)
}

/// Maps a part of a file read-only.
#[allow(unsafe_code)]
pub(super) fn map_range(file: &File, bytes: Range<usize>) -> std::io::Result<Mmap> {
    // SAFETY: the map is private and read-only and every use is bounds-checked against its length; a file that
    // another process shortens meanwhile ends this one with SIGBUS, as for any program that maps its weights.
    unsafe { MmapOptions::new().offset(bytes.start as u64).len(bytes.len()).map(file) }
}

/// The distinct files of an index, all present and inside the folder.
fn shard_names(
    folder: &Path,
    index_path: &Path,
    index: &serde_json::Map<String, Value>,
) -> Result<Vec<PathBuf>> {
    let map = index
        .get("weight_map")
        .and_then(Value::as_object)
        .ok_or_else(|| EngineError::malformed(index_path, "weight_map", "missing or not an object"))?;
    let mut names: Vec<&str> = vec![];
    for (tensor, file) in map {
        let name = file.as_str().filter(|f| !f.contains(['/', '\\']) && f.ends_with(".safetensors"));
        let name = name.ok_or_else(|| {
            EngineError::malformed(
                index_path,
                tensor,
                format!("expected the name of a .safetensors file beside the index, found {file}"),
            )
        })?;
        names.push(name);
    }
    names.sort_unstable();
    names.dedup();
    let missing: Vec<&str> = names.iter().copied().filter(|n| !folder.join(n).is_file()).collect();
    if !missing.is_empty() {
        return Err(EngineError::malformed(
            folder,
            "shards",
            format!(
                "{} of {} are missing: {}\nhint: finish the download",
                missing.len(),
                names.len(),
                missing.join(", ")
            ),
        ));
    }
    Ok(names.into_iter().map(|n| folder.join(n)).collect())
}

/// The name that a tensor, or the stack that holds it, has in the files.
fn stored_name<'a>(tensors: &'a BTreeMap<String, Stored>, name: &str) -> Option<&'a str> {
    let key = |name: &str| tensors.get_key_value(name).map(|(key, _)| key.as_str());
    key(name).or_else(|| match stacked(name) {
        Some(part) => key(&part.name),
        None => key(&name.replace(".block_sparse_moe.", ".mlp.")),
    })
}

/// A tensor with its shape and bytes, stored as itself or, for experts, inside the stack of transformers 5.
fn locate<'a>(
    tensors: &'a BTreeMap<String, Stored>,
    name: &str,
) -> Option<(&'a Stored, Vec<usize>, Range<usize>)> {
    let key = stored_name(tensors, name)?;
    let stack = &tensors[key];
    let Some(part) = stacked(name).filter(|part| part.name == key) else {
        return Some((stack, stack.shape.clone(), stack.bytes.clone()));
    };
    let &[experts, rows, width] = stack.shape.as_slice() else { return None };
    let halves = if part.half.is_some() { 2 } else { 1 };
    if part.expert >= experts || rows % halves != 0 {
        return None;
    }
    let len = stack.bytes.len() / experts / halves;
    let start = stack.bytes.start + len * (part.expert * halves + part.half.unwrap_or(0));
    Some((stack, vec![rows / halves, width], start..start + len))
}

pub(super) fn read_safetensors(
    path: &Path,
    map: &Mmap,
    file: usize,
    tensors: &mut BTreeMap<String, Stored>,
) -> Result<()> {
    let (header, metadata) = SafeTensors::read_metadata(map).map_err(|e| {
        let claimed = map.first_chunk::<8>().map_or(0, |b| u64::from_le_bytes(*b));
        EngineError::malformed(
            path,
            "safetensors header",
            format!(
                "{e} (file of {} bytes, header claims {claimed})\nhint: the file is truncated or damaged; get it again",
                map.len()
            ),
        )
    })?;
    let infos: HashMap<String, _> = metadata.tensors();
    for (name, info) in infos {
        let (start, end) = info.data_offsets;
        let bytes = header + 8 + start..header + 8 + end;
        if bytes.end > map.len() {
            return Err(EngineError::malformed(path, name, "its data lies outside the file"));
        }
        let stored = Stored { file, dtype: info.dtype, shape: info.shape.clone(), bytes };
        if tensors.insert(name.clone(), stored).is_some() {
            return Err(EngineError::malformed(
                path,
                name,
                "this tensor is also in another file of the folder",
            ));
        }
    }
    Ok(())
}

pub(super) fn widen(dtype: Dtype, bytes: &[u8]) -> Option<Vec<f32>> {
    Some(match dtype {
        Dtype::F32 => bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
        Dtype::BF16 => bytes.as_chunks::<2>().0.iter().map(|b| bf16::from_le_bytes(*b).to_f32()).collect(),
        Dtype::F16 => bytes.as_chunks::<2>().0.iter().map(|b| f16::from_le_bytes(*b).to_f32()).collect(),
        _ => return None,
    })
}

/// The chat template of a folder: `chat_template.jinja`, `chat_template.json`, or inside `tokenizer_config.json`
/// (of several named ones, `default`).
fn folder_template(folder: &Path) -> Result<Option<String>> {
    let file = folder.join("chat_template.jinja");
    if file.exists() {
        return std::fs::read_to_string(&file).map(Some).map_err(EngineError::io(&file));
    }
    for name in ["chat_template.json", "tokenizer_config.json"] {
        let path = folder.join(name);
        let map = read_object(&path)?;
        match map.as_ref().and_then(|m| m.get("chat_template")) {
            None | Some(Value::Null) => {}
            Some(Value::String(source)) => return Ok(Some(source.clone())),
            Some(Value::Array(list)) => {
                let default = list.iter().find(|t| t["name"] == json!("default"));
                match default.and_then(|t| t["template"].as_str()) {
                    Some(source) => return Ok(Some(source.to_string())),
                    None => {
                        return Err(EngineError::malformed(
                            path,
                            "chat_template",
                            "none of the templates is named `default`",
                        ));
                    }
                }
            }
            Some(other) => {
                return Err(EngineError::malformed(
                    path,
                    "chat_template",
                    format!("expected text, found {other}"),
                ));
            }
        }
    }
    Ok(None)
}
