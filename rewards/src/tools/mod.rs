//! Tool calls: parsing what models write, and the rewards that judge it.
//!
//! [`parse`] reads one of the 18 text [`Format`]s (or [`parse_any`] finds it), [`toolrl`] is ToolRL's reward with all
//! its switches, [`bfcl`] the Berkeley function-calling leaderboard's AST checker with its holes closed by default.
//! Everything takes text and JSON and returns plain records; no input panics, and text beyond [`MAX_TEXT`] is an error.

mod bfcl;
mod detect;
mod formats;
mod json_calls;
pub(crate) mod py;
pub(crate) mod pyexpr;
mod tagged;
mod toolrl;

pub use bfcl::{BfclCategory, BfclDecode, BfclOptions, BfclVerdict, bfcl};
pub use detect::parse_any;
pub use formats::{Dialect, Format, ParseOptions, parse, parse_with};
pub use toolrl::{ToolRlOptions, ToolRlReward, toolrl};

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Longest text that is looked at, in bytes; longer text is an error rather than a slow reward.
pub const MAX_TEXT: usize = 1 << 21;

/// One call as the text states it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Call {
    /// Function name, as written.
    pub name: String,
    /// An object; a string where the text holds arguments that are not JSON (a verifier then finds no argument).
    pub arguments: Value,
}

/// What a text holds: its calls in order, and the rest.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Parsed {
    /// The calls in the order of the text; empty where there is none or where the text is broken.
    pub calls: Vec<Call>,
    /// The text that is not a call (the whole text where no call was found).
    pub content: String,
    /// Whether the text meant to call a tool: true with a marker and no readable call in some formats.
    pub called: bool,
}

impl Parsed {
    fn none(text: &str) -> Parsed {
        Parsed { calls: Vec::new(), content: text.to_owned(), called: false }
    }

    fn of(calls: Vec<Call>, content: &str) -> Parsed {
        Parsed { called: !calls.is_empty(), calls, content: content.to_owned() }
    }
}

/// Why tool calls cannot be read or judged.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ToolError {
    /// The text is longer than [`MAX_TEXT`].
    #[error(
        "text of {bytes} bytes exceeds the limit of {limit}\nhint: cap the completion length, or score such samples by a fixed value"
    )]
    TooLong {
        /// Length of the text.
        bytes: usize,
        /// The limit.
        limit: usize,
    },
    /// The format allows one marker, the text holds several.
    #[error("{format}: only one {marker} is allowed, found {found}")]
    RepeatedMarker {
        /// Name of the format.
        format: &'static str,
        /// The marker.
        marker: &'static str,
        /// How often it stands in the text.
        found: usize,
    },
    /// The gold side of the data row cannot be used.
    #[error(
        "{field} of the data row: expected {expected}, found {found}\nhint: fix the data; a reward against a broken gold would train on noise"
    )]
    Gold {
        /// Which part of the row.
        field: String,
        /// What it should be.
        expected: String,
        /// What it is.
        found: String,
    },
}

fn check_length(text: &str) -> Result<(), ToolError> {
    if text.len() > MAX_TEXT {
        return Err(ToolError::TooLong { bytes: text.len(), limit: MAX_TEXT });
    }
    Ok(())
}

/// The first characters of a text, for messages.
fn excerpt(text: &str) -> String {
    let mut short: String = text.chars().take(60).collect();
    if short.len() < text.len() {
        short.push('…');
    }
    format!("{short:?}")
}
