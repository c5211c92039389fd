//! A Hugging Face model folder, written.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Value, json};

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
