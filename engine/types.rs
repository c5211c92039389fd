//! Records that cross modules: plain data, shapes and units beside each field.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// Index into the vocabulary.
pub type TokenId = u32;

/// Counts the updates of the weights; KV blocks and completions carry it so that stale ones are never mixed in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
pub struct PolicyVersion(pub u64);

/// One task: a data row, its rendered prompt and the prompt's tokens.
#[derive(Debug, Clone)]
pub struct Prompt {
    /// Position of the row in its data set.
    pub index: usize,
    /// The row's `id` (its position as text where the row has none).
    pub id: String,
    /// The rendered prompt, chat template included.
    pub text: String,
    /// Token ids of `text`.
    pub tokens: Vec<TokenId>,
    /// Name of the task that the row belongs to; empty where the recipe names none.
    pub task: Arc<str>,
    /// Every field of the row, as the reward scripts see them.
    pub fields: Arc<Map<String, Value>>,
}

/// Why a completion ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FinishReason {
    /// A stop token or a stop string.
    Stop,
    /// `max_new_tokens` reached.
    Length,
}

impl FinishReason {
    /// `"stop"` or `"length"`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
        }
    }
}

/// One sampled answer.
#[derive(Debug, Clone)]
pub struct Completion {
    /// Sampled ids in order, with the stop token where one ended it.
    pub tokens: Vec<TokenId>,
    /// Natural-log probability of each token under the stated (warped) distribution; as long as `tokens`.
    pub logprobs: Vec<f32>,
    /// Decoded text without special tokens, cut before a stop string.
    pub text: String,
    /// Byte offset in `text` at which each token ends; as long as `tokens`.
    pub token_ends: Vec<u32>,
    /// Why it ended.
    pub finish: FinishReason,
}

/// The completions of one prompt under one policy version.
#[derive(Debug, Clone)]
pub struct Group {
    /// The prompt that all of them answer.
    pub prompt: Arc<Prompt>,
    /// G completions, by sample number.
    pub completions: Vec<Completion>,
    /// The weights that sampled them.
    pub version: PolicyVersion,
}
