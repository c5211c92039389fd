//! Records that go into and come out of the verifiers.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::script::Script;

/// What one call of a script may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    /// Wall-clock time in milliseconds.
    pub time_ms: u64,
    /// Memory of the Lua heap in bytes, above what the empty VM holds.
    pub memory_bytes: usize,
    /// Calls and loop turns; unlike the time it trips at the same place on every machine.
    pub instructions: Option<u64>,
}

impl Default for Limits {
    fn default() -> Self {
        Limits { time_ms: 1000, memory_bytes: 64 << 20, instructions: Some(10_000_000) }
    }
}

/// What a failed call counts as. In recipes: `"abstain"`, `"fail"` or `{ score = -1.0 }`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnError {
    /// The script's components are left out of the sum.
    #[default]
    Abstain,
    /// The outcome is marked [`Outcome::fatal`] and the run stops.
    Fail,
    /// A fixed score under the script's name.
    Score(f64),
}

/// One verifier of a run.
#[derive(Debug, Clone)]
pub struct RewardSpec {
    /// The script.
    pub script: Script,
    /// Factor of all its components.
    pub weight: f64,
    /// Further factors by component name; 1 where absent.
    pub component_weights: BTreeMap<String, f64>,
    /// Limits of one call.
    pub limits: Limits,
    /// Policy for calls that fail.
    pub on_error: OnError,
    /// What the script reads as `ctx.options`.
    pub options: Map<String, Value>,
    /// Tasks whose samples it scores; empty is all of them.
    pub tasks: Vec<String>,
}

impl RewardSpec {
    /// A verifier of weight 1 with the default limits, which abstains on errors.
    pub fn new(script: Script) -> Self {
        RewardSpec {
            script,
            weight: 1.0,
            component_weights: BTreeMap::new(),
            limits: Limits::default(),
            on_error: OnError::Abstain,
            options: Map::new(),
            tasks: Vec::new(),
        }
    }

    /// Whether it scores samples of `task`.
    pub fn applies_to(&self, task: &str) -> bool {
        self.tasks.is_empty() || self.tasks.iter().any(|t| t == task)
    }
}

/// One completion to score.
#[derive(Debug, Clone, Default)]
pub struct Sample {
    /// The data row's id.
    pub id: String,
    /// Name of the row's task; empty where tasks have no names. It chooses who scores the sample ([`RewardSpec::tasks`]).
    pub task: String,
    /// Number of the sample within its group.
    pub sample: u32,
    /// The completion's text.
    pub completion: String,
    /// The prompt's text.
    pub prompt: String,
    /// Every field of the data row.
    pub fields: Arc<Map<String, Value>>,
    /// Token ids of the completion; empty where unknown.
    pub tokens: Vec<u32>,
    /// Byte offset in `completion` at which each token ends, for dense rewards; as long as `tokens`, or empty.
    pub token_text_ends: Vec<u32>,
    /// Natural-log probability of each token under the distribution that drew it; as long as `tokens`, or empty.
    pub logprobs: Vec<f32>,
    /// `"stop"`, `"length"`, or empty where unknown.
    pub finish_reason: String,
}

/// Where in the run a completion is scored.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Context {
    /// Training step, from 0.
    pub step: u64,
    /// Steps of the whole run; 0 where unknown.
    pub total_steps: u64,
    /// Seed of the run, part of the key of `math.random`.
    pub seed: u64,
}

/// What the verifiers say about one completion.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Outcome {
    /// Weighted sum over the components that did not abstain; None where all did.
    pub reward: Option<f64>,
    /// Unweighted components, scripts in the order of the recipe, names ascending within a script; None = abstained.
    pub components: Vec<(String, Option<f64>)>,
    /// Weighted dense rewards a token, already part of `reward`; empty without dense rewards, else as long as the tokens.
    pub token_rewards: Vec<f32>,
    /// The dense rewards one by one, as (token, weighted value), 0 among them; tokens ascend within a component.
    pub steps: Vec<(u32, f64)>,
    /// Calls that failed.
    pub errors: Vec<RewardError>,
    /// A script whose policy is [`OnError::Fail`] failed.
    pub fatal: bool,
}

/// Why a call failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum ErrorKind {
    /// Ran longer than [`Limits::time_ms`].
    Timeout,
    /// Took more than [`Limits::instructions`].
    Instructions,
    /// Needed more than [`Limits::memory_bytes`].
    Memory,
    /// Raised a Lua error.
    Runtime,
    /// Returned something that is no reward.
    WrongType,
    /// Returned NaN or an infinity.
    NotFinite,
    /// Could not be compiled.
    Syntax,
}

impl ErrorKind {
    /// The name used in JSON.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Timeout => "timeout",
            Self::Instructions => "instructions",
            Self::Memory => "memory",
            Self::Runtime => "runtime",
            Self::WrongType => "wrong_type",
            Self::NotFinite => "not_finite",
            Self::Syntax => "syntax",
        }
    }
}

/// A failed call as data; serialises as `{script, kind, message, line}`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RewardError {
    /// Name of the script.
    pub script: String,
    /// What went wrong.
    pub kind: ErrorKind,
    /// In words.
    pub message: String,
    /// Line of the script, where known.
    pub line: Option<u32>,
    /// Text of that line, for [`fmt::Display`].
    #[serde(skip)]
    pub source_line: Option<String>,
}

impl fmt::Display for RewardError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.script)?;
        if let Some(line) = self.line {
            write!(f, ":{line}")?;
        }
        write!(f, ": {}: {}", self.kind.as_str(), self.message)?;
        if let (Some(line), Some(text)) = (self.line, &self.source_line) {
            write!(f, "\n{line:>5} | {text}")?;
        }
        Ok(())
    }
}

impl std::error::Error for RewardError {}
