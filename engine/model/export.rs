//! A Hugging Face model folder, written.
//!
//! [`write_hf_folder`] streams the tensors to disk one at a time (nothing is held twice) and names the weights
//! file last, so that a folder with a `model.safetensors` is complete. transformers, vLLM and
//! [`super::source::ModelSource`] load what it writes.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufReader, BufWriter, Seek, Write};
use std::path::Path;

use half::bf16;
use serde_json::{Map, Value, json};

use crate::data::tokenizer::Tokenizer;
use crate::error::{EngineError, Result};

/// Every file of a model folder but the weights.
#[derive(Debug, Clone)]
pub struct ModelFiles {
    /// `config.json`.
    pub config: Value,
    /// The other files by name (`tokenizer.json`, `tokenizer_config.json`, `generation_config.json`, …).
    pub files: BTreeMap<String, Vec<u8>>,
}

/// Files that go with a model unchanged.
const KEPT: [&str; 13] = [
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
    "LICENSE",
];

impl ModelFiles {
    /// Takes the files of a model folder.
    ///
    /// # Errors
    /// Unreadable files.
    pub fn from_folder(folder: &Path, config: Value) -> Result<Self> {
        let mut files = BTreeMap::new();
        for name in KEPT {
            let path = folder.join(name);
            if path.is_file() {
                files.insert(name.to_string(), std::fs::read(&path).map_err(EngineError::io(&path))?);
            }
        }
        Ok(Self { config, files })
    }

    /// Writes the files anew for a model that has none.
    ///
    /// # Errors
    /// A tokenizer that cannot be serialised.
    pub fn new(config: Value, tokenizer: &Tokenizer, chat_template: Option<&str>) -> Result<Self> {
        let mut files = BTreeMap::new();
        let pretty = |value: &Value| format!("{value:#}\n").into_bytes();
        files.insert("tokenizer.json".to_string(), tokenizer.to_json()?.into_bytes());
        let mut settings = json!({
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": false,
            "model_max_length": config["max_position_embeddings"],
        });
        for (role, token) in tokenizer.special_tokens() {
            settings[role.as_str()] = json!(token);
        }
        if let Some(template) = chat_template {
            settings["chat_template"] = json!(template);
            files.insert("chat_template.jinja".to_string(), template.as_bytes().to_vec());
        }
        files.insert("tokenizer_config.json".to_string(), pretty(&settings));
        let eos = match tokenizer.eos() {
            [one] => json!(one),
            many => json!(many),
        };
        let generation = json!({
            "bos_token_id": config["bos_token_id"], "eos_token_id": eos, "pad_token_id": tokenizer.pad(),
        });
        files.insert("generation_config.json".to_string(), pretty(&generation));
        Ok(Self { config, files })
    }
}

/// Writes a model folder; `dtype` is `"float32"` or `"bfloat16"`.
///
/// Tensors come as (Hugging Face name, shape, row-major numbers). The folder is created; files of the same names in
/// it are replaced.
///
/// # Errors
/// An unknown `dtype`, a name that comes twice, numbers that do not fill their shape, files that cannot be written.
pub fn write_hf_folder(
    folder: &Path,
    files: &ModelFiles,
    tensors: impl Iterator<Item = (String, Vec<usize>, Vec<f32>)>,
    dtype: &str,
) -> Result<()> {
    std::fs::create_dir_all(folder).map_err(EngineError::io(folder))?;
    for (name, bytes) in &files.files {
        let path = folder.join(name);
        std::fs::write(&path, bytes).map_err(EngineError::io(&path))?;
    }
    let mut config = files.config.clone();
    if let Some(map) = config.as_object_mut() {
        // transformers 5 reads `dtype`, 4 `torch_dtype`.
        map.insert("dtype".into(), json!(dtype));
        map.insert("torch_dtype".into(), json!(dtype));
    }
    let path = folder.join("config.json");
    std::fs::write(&path, format!("{config:#}\n")).map_err(EngineError::io(&path))?;
    write_safetensors(&folder.join("model.safetensors"), tensors, dtype)
}

/// Writes one safetensors file in the order of the iterator, in constant memory.
///
/// # Errors
/// As [`write_hf_folder`].
pub fn write_safetensors(
    path: &Path,
    tensors: impl Iterator<Item = (String, Vec<usize>, Vec<f32>)>,
    dtype: &str,
) -> Result<()> {
    let io = || EngineError::io(path);
    let (code, narrow) = match dtype {
        "float32" => ("F32", false),
        "bfloat16" => ("BF16", true),
        other => {
            return Err(EngineError::Config(format!(
                "cannot write weights as `{other}` (known: float32, bfloat16)"
            )));
        }
    };
    // The header comes first and needs every shape, so the numbers wait in a file of their own.
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let waiting = folder.join(format!(".{}.data", path.file_name().unwrap_or_default().to_string_lossy()));
    let partial = folder.join(format!(".{}.partial", path.file_name().unwrap_or_default().to_string_lossy()));
    let mut data = BufWriter::with_capacity(
        1 << 20,
        File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(&waiting)
            .map_err(EngineError::io(&waiting))?,
    );
    let mut header = Map::new();
    header.insert("__metadata__".into(), json!({"format": "pt"}));
    let mut offset = 0u64;
    for (name, shape, numbers) in tensors {
        let expected = shape.iter().product::<usize>();
        if numbers.len() != expected {
            return Err(EngineError::malformed(
                path,
                format!("tensor `{name}`"),
                format!("shape {shape:?} holds {expected} numbers, given {}", numbers.len()),
            ));
        }
        for chunk in numbers.chunks(4096) {
            let bytes: Vec<u8> = if narrow {
                chunk.iter().flat_map(|x| bf16::from_f32(*x).to_le_bytes()).collect()
            } else {
                chunk.iter().flat_map(|x| x.to_le_bytes()).collect()
            };
            data.write_all(&bytes).map_err(io())?;
        }
        let end = offset + numbers.len() as u64 * if narrow { 2 } else { 4 };
        let entry = json!({"dtype": code, "shape": shape, "data_offsets": [offset, end]});
        if header.insert(name.clone(), entry).is_some() {
            return Err(EngineError::malformed(path, format!("tensor `{name}`"), "given twice"));
        }
        offset = end;
    }
    let mut header = Value::Object(header).to_string();
    // Spaces at the end keep the numbers aligned to 8 bytes.
    header.extend(std::iter::repeat_n(' ', header.len().next_multiple_of(8) - header.len()));
    let mut data = data.into_inner().map_err(|e| io()(e.into_error()))?;
    data.rewind().map_err(io())?;
    let mut out =
        BufWriter::with_capacity(1 << 20, File::create(&partial).map_err(EngineError::io(&partial))?);
    out.write_all(&(header.len() as u64).to_le_bytes()).map_err(io())?;
    out.write_all(header.as_bytes()).map_err(io())?;
    std::io::copy(&mut BufReader::with_capacity(1 << 20, data), &mut out).map_err(io())?;
    let out = out.into_inner().map_err(|e| io()(e.into_error()))?;
    out.sync_all().map_err(io())?;
    std::fs::rename(&partial, path).map_err(io())?;
    std::fs::remove_file(&waiting).map_err(EngineError::io(&waiting))
}
