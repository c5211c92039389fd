//! Finding and loading scripts: shipped ones by name, the user's by path.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use mlua::Error as LuaError;
use mlua::chunk::Compiler;
use serde_json::{Map, Value};

use crate::types::{ErrorKind, RewardError};

/// Embeds each verifier with the cases beside it.
macro_rules! shipped {
    ($($name:literal)*) => {
        /// The shipped verifiers: name and source.
        pub const SHIPPED: &[(&str, &str)] =
            &[$(($name, include_str!(concat!("../lua/", $name, ".lua")))),*];
        const CASES: &[(&str, &str)] =
            &[$(($name, include_str!(concat!("../lua/", $name, ".cases.jsonl")))),*];
    };
}

shipped! {
    "classification"
    "code_cases"
    "cosine_length"
    "countdown"
    "detection"
    "edit_distance"
    "exact"
    "format"
    "grounding"
    "iou"
    "json_schema"
    "math"
    "multiple_choice"
    "numeric"
    "regex"
    "repetition"
    "soft_overlong"
    "think_format"
    "token_f1"
    "tool_call"
}

/// The cases of a shipped verifier: rows with `completion`, the fields it reads, and `expect`, its reward (null: it
/// abstains); `options` where it needs some. Empty for a name that is not in [`SHIPPED`].
pub fn shipped_cases(name: &str) -> Vec<Map<String, Value>> {
    let text = CASES.iter().find(|(own, _)| *own == name).map_or("", |(_, text)| text);
    text.lines().map(|line| serde_json::from_str(line).expect("cases are JSON objects, by test")).collect()
}

/// Largest script that is loaded, in bytes.
const MAX_SOURCE: u64 = 4 << 20;

/// Where a script comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// One of [`SHIPPED`].
    Shipped(&'static str),
    /// A file.
    File(PathBuf),
}

/// A script whose syntax has been checked.
#[derive(Clone)]
pub struct Script {
    name: Arc<str>,
    source: Source,
    text: Arc<str>,
    bytecode: Arc<[u8]>,
    stateful: bool,
}

impl fmt::Debug for Script {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Script")
            .field("name", &self.name)
            .field("source", &self.source)
            .finish_non_exhaustive()
    }
}

/// Why a script cannot be loaded.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ScriptError {
    /// No shipped verifier has that name and it is no path of a script.
    #[error("no verifier is called {name:?}{}\nhint: shipped verifiers are {}; a script of your own is named by its path, such as rewards/mine.lua", nearest.map(|n| format!(", did you mean {n:?}?")).unwrap_or_default(), shipped_names())]
    Unknown {
        /// What was asked for.
        name: String,
        /// The shipped name closest to it.
        nearest: Option<&'static str>,
    },
    /// The file cannot be read.
    #[error("{path}: {cause}\nhint: give the path of a .lua file, or the name of a shipped verifier")]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        cause: std::io::Error,
    },
    /// The file is no text, or far too long.
    #[error("{path}: {problem}")]
    NotText {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// The script is no Luau.
    #[error("{path}:{}: syntax error: {}\n{:>5} | {}", line.unwrap_or(0), message, line.unwrap_or(0), source_line.as_deref().unwrap_or(""))]
    Syntax {
        /// The file, or the name of a shipped verifier.
        path: String,
        /// Line, where known.
        line: Option<u32>,
        /// The compiler's words.
        message: String,
        /// Text of the line.
        source_line: Option<String>,
    },
    /// The script's top level fails, or defines no reward.
    #[error("{path}: {error}")]
    Load {
        /// The file, or the name of a shipped verifier.
        path: String,
        /// What happened.
        error: RewardError,
    },
}

fn shipped_names() -> String {
    SHIPPED.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", ")
}

/// Finds a script by the name of a shipped verifier or by path, and checks that it defines a reward.
///
/// # Errors
/// [`ScriptError`]: unknown name, unreadable file, syntax error (path, line, message and the line's text), a top level
/// that fails, or neither `reward` nor `reward_group`.
pub fn resolve(spec: &str) -> Result<Script, ScriptError> {
    if let Some((name, text)) = SHIPPED.iter().find(|(name, _)| *name == spec) {
        return Script::load(Source::Shipped(name), name, text);
    }
    let path = Path::new(spec);
    if !spec.ends_with(".lua") && !spec.ends_with(".luau") && !path.is_file() {
        return Err(ScriptError::Unknown { name: spec.to_owned(), nearest: nearest(spec) });
    }
    let unreadable = |cause| ScriptError::Unreadable { path: path.to_owned(), cause };
    let size = std::fs::metadata(path).map_err(unreadable)?.len();
    if size > MAX_SOURCE {
        let problem = format!("{size} bytes exceed the limit of {MAX_SOURCE} for a script");
        return Err(ScriptError::NotText { path: path.to_owned(), problem });
    }
    let bytes = std::fs::read(path).map_err(unreadable)?;
    let text = String::from_utf8(bytes).map_err(|error| ScriptError::NotText {
        path: path.to_owned(),
        problem: format!("not UTF-8 text (byte {})", error.utf8_error().valid_up_to()),
    })?;
    let stem = path.file_stem().map_or_else(|| spec.to_owned(), |stem| stem.to_string_lossy().into_owned());
    Script::load(Source::File(path.to_owned()), &stem, &text)
}

impl Script {
    /// A script from its text; `name` is the component's name and stands in error messages.
    ///
    /// # Errors
    /// As [`resolve`].
    pub fn from_text(name: &str, text: &str) -> Result<Script, ScriptError> {
        Script::load(Source::File(PathBuf::from(format!("{name}.lua"))), name, text)
    }

    fn load(source: Source, name: &str, text: &str) -> Result<Script, ScriptError> {
        let path = match &source {
            Source::Shipped(name) => format!("{name}.lua"),
            Source::File(path) => path.display().to_string(),
        };
        let text = text.strip_prefix('\u{feff}').unwrap_or(text);
        let compiler = Compiler::new().set_optimization_level(1).set_debug_level(1);
        let bytecode = compiler.compile(text).map_err(|error| syntax_error(&path, text, &error))?;
        let (name, text, bytecode) = (name.into(), text.into(), bytecode.into());
        let mut script = Script { name, source, text, bytecode, stateful: false };
        script.stateful =
            crate::sandbox::check(&script).map_err(|error| ScriptError::Load { path, error })?;
        Ok(script)
    }

    /// Name of the component: the file's stem, or the shipped verifier's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Where it comes from.
    pub fn source(&self) -> &Source {
        &self.source
    }

    /// Its text.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Text of a line, from 1.
    pub fn line(&self, line: u32) -> Option<&str> {
        self.text.lines().nth((line as usize).checked_sub(1)?)
    }

    /// Whether it defines `update_state(state, results, ctx)`, and so has a `ctx.state`.
    pub fn stateful(&self) -> bool {
        self.stateful
    }

    pub(crate) fn bytecode(&self) -> &[u8] {
        &self.bytecode
    }

    pub(crate) fn error(
        &self,
        kind: ErrorKind,
        message: impl Into<String>,
        line: Option<u32>,
    ) -> RewardError {
        let source_line = line.and_then(|line| self.line(line)).map(|text| text.trim_end().to_owned());
        RewardError { script: self.name.to_string(), kind, message: message.into(), line, source_line }
    }
}

/// Luau reports `:LINE: message`, perhaps behind a chunk name.
fn syntax_error(path: &str, text: &str, error: &LuaError) -> ScriptError {
    let raw = match error {
        LuaError::SyntaxError { message, .. } => message.clone(),
        other => other.to_string(),
    };
    // mlua hands over some messages without the leading colon
    let raw = if raw.starts_with(|c: char| c.is_ascii_digit()) { format!(":{raw}") } else { raw };
    let mut line = None;
    let mut message = raw.clone();
    for (at, _) in raw.match_indices(':') {
        let rest = &raw[at + 1..];
        let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
        if digits > 0 && rest[digits..].starts_with(": ") {
            line = rest[..digits].parse().ok();
            message = rest[digits + 2..].to_owned();
            break;
        }
    }
    let source_line = line.and_then(|line: u32| text.lines().nth((line as usize).checked_sub(1)?));
    ScriptError::Syntax {
        path: path.to_owned(),
        line,
        message: message.trim().to_owned(),
        source_line: source_line.map(|text| text.trim_end().to_owned()),
    }
}

fn nearest(spec: &str) -> Option<&'static str> {
    let distance =
        |name: &str| crate::host::text::edit_distance(&spec.to_lowercase(), name).unwrap_or(usize::MAX);
    SHIPPED
        .iter()
        .map(|(name, _)| (distance(name), *name))
        .filter(|(distance, name)| *distance * 2 <= name.len())
        .min()
        .map(|(_, name)| name)
}
