//! Rows to prompts: JSONL files, templates with `{field}` placeholders, and an order that resumes from one number.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::{Map, Value, json};

use crate::data::template::ChatTemplate;
use crate::data::tokenizer::Tokenizer;
use crate::error::{EngineError, Result};
use crate::rng::{Purpose, Stream};
use crate::types::Prompt;

/// A data row: its fields in the order of the file.
pub type Row = Map<String, Value>;

/// Reads a JSONL file of objects; blank lines are skipped.
///
/// # Errors
/// An unreadable or empty file; a line that is not a JSON object or has more than 64 MiB, by number.
pub fn read_jsonl(path: &Path) -> Result<Vec<Row>> {
    Ok(read_placed(path)?.0)
}

/// Where rows stand: a file and a line for each row, from 1. Rows are split and errors name where they came from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Places {
    /// The file.
    pub path: PathBuf,
    /// One line a row.
    pub lines: Vec<usize>,
}

impl Places {
    /// The error of row `index`, called `id`.
    pub fn error(&self, index: usize, id: &str, message: String) -> EngineError {
        let place = match self.lines.get(index) {
            Some(line) => format!("line {line} (row {id})"),
            None => format!("row {id}"),
        };
        EngineError::malformed(&self.path, place, message)
    }
}

/// Longest row of a file, in bytes: room for pictures within it. Beyond it a line is a mistake, and is not parsed.
const MAX_ROW: usize = 64 << 20;

/// As [`read_jsonl`], with the line of each row.
///
/// # Errors
/// As [`read_jsonl`].
pub fn read_placed(path: &Path) -> Result<(Vec<Row>, Places)> {
    let bytes = std::fs::read(path).map_err(EngineError::io(path))?;
    let text = std::str::from_utf8(&bytes).map_err(|e| {
        let line = bytes[..e.valid_up_to()].iter().filter(|b| **b == b'\n').count() + 1;
        let byte = bytes[e.valid_up_to()];
        let message = format!(
            "byte 0x{byte:02x} is not UTF-8. hint: convert the file, or unpack it if it is compressed"
        );
        EngineError::malformed(path, format!("line {line}"), message)
    })?;
    // some editors begin a file with a byte order mark
    let text = text.trim_start_matches('\u{feff}');
    let (mut rows, mut lines) = (Vec::new(), Vec::new());
    for (i, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let bad = |message: String| EngineError::malformed(path, format!("line {}", i + 1), message);
        if line.len() > MAX_ROW {
            let message = format!("{} MiB, where a row may have {} MiB", line.len() >> 20, MAX_ROW >> 20);
            return Err(bad(message));
        }
        match serde_json::from_str(line).map_err(|e| bad(format!("broken JSON: {e}")))? {
            Value::Object(row) => {
                rows.push(row);
                lines.push(i + 1);
            }
            other => return Err(bad(format!("expected an object {{…}}, found {}", kind(&other)))),
        }
    }
    if rows.is_empty() {
        return Err(EngineError::malformed(path, "file", "holds no row; hint: one JSON object a line"));
    }
    Ok((rows, Places { path: path.into(), lines }))
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

/// A row's `id` as text; its position where it has none.
pub fn row_id(index: usize, row: &Row) -> String {
    match row.get("id") {
        Some(Value::String(id)) => id.clone(),
        Some(Value::Null) | None => index.to_string(),
        Some(other) => other.to_string(),
    }
}

/// Longest text of a prompt that is encoded, in bytes: some 100 000 tokens. Beyond it a row is a mistake, and encoding takes
/// hundreds of bytes of memory for each of its own.
const MAX_TEXT: usize = 512 << 10;

/// How a row becomes a prompt.
#[derive(Clone, Copy)]
pub struct Renderer<'a> {
    /// Text with `{field}` placeholders; without it the row's `prompt` or `messages`.
    pub template: Option<&'a str>,
    /// System message.
    pub system: Option<&'a str>,
    /// The model's chat template, unless it is not to be used.
    pub chat: Option<&'a ChatTemplate>,
    /// The model's tokenizer.
    pub tokenizer: &'a Tokenizer,
    /// Where the rows stand, for errors.
    pub places: Option<&'a Places>,
}

impl Renderer<'_> {
    /// The prompt of row `index`.
    ///
    /// # Errors
    /// By file, line and row: a missing field, a chat template that refuses, text of more than 512 KiB or that the tokenizer
    /// cannot express.
    pub fn prompt(&self, index: usize, row: &Row) -> Result<Prompt> {
        self.prompt_within(index, row, usize::MAX)?.ok_or_else(|| {
            self.bad(index, &row_id(index, row), format!("its prompt is longer than {} KiB", MAX_TEXT >> 10))
        })
    }

    /// As [`Renderer::prompt`]; `None` when it is longer than `max_tokens` or than 512 KiB.
    ///
    /// # Errors
    /// As [`Renderer::prompt`].
    pub fn prompt_within(&self, index: usize, row: &Row, max_tokens: usize) -> Result<Option<Prompt>> {
        let id = row_id(index, row);
        let bad = |message: String| self.bad(index, &id, message);
        let messages = match (self.template, row.get("prompt"), row.get("messages")) {
            (Some(template), ..) => match fill(template, row).map_err(bad)? {
                text if text.len() > MAX_TEXT => return Ok(None),
                text => Content::Text(text),
            },
            // before it is copied for the template
            (None, Some(Value::String(prompt)), _) if prompt.len() > MAX_TEXT => return Ok(None),
            (None, Some(Value::String(prompt)), _) => Content::Text(prompt.clone()),
            (None, _, Some(Value::Array(messages))) => Content::Messages(messages.clone()),
            _ => return Err(bad("no `prompt` (string) or `messages` (list); hint: set data.prompt to a template such as \"{question}\"".into())),
        };
        let text = match (self.chat, messages) {
            (Some(chat), content) => {
                let mut list: Vec<Value> =
                    self.system.iter().map(|s| json!({"role": "system", "content": s})).collect();
                match content {
                    Content::Text(text) => list.push(json!({"role": "user", "content": text})),
                    Content::Messages(messages) => list.extend(messages),
                }
                chat.render(&Value::Array(list), row.get("tools"), &Map::new(), true)
                    .map_err(|e| bad(e.to_string()))?
            }
            (None, Content::Text(text)) => text,
            (None, Content::Messages(_)) => {
                return Err(bad(
                    "has `messages`, and the model has no chat template (or data.chat is false)".into(),
                ));
            }
        };
        if text.len() > MAX_TEXT {
            return Ok(None);
        }
        let tokens = self.tokenizer.encode(&text).map_err(|e| bad(e.to_string()))?;
        let fits = tokens.len() <= max_tokens;
        Ok(fits.then(|| Prompt {
            index,
            id,
            text,
            tokens,
            task: Arc::default(),
            fields: Arc::new(row.clone()),
        }))
    }

    fn bad(&self, index: usize, id: &str, message: String) -> EngineError {
        match self.places {
            Some(places) => places.error(index, id, message),
            None => EngineError::Config(format!("row {id}: {message}")),
        }
    }
}

impl Renderer<'_> {
    /// The template's text for a row, where there is a template.
    pub(super) fn filled(&self, row: &Row) -> Option<String> {
        fill(self.template?, row).ok()
    }
}

enum Content {
    Text(String),
    Messages(Vec<Value>),
}

/// Fills `{field}` placeholders; `{{` and `}}` are braces.
fn fill(template: &str, row: &Row) -> std::result::Result<String, String> {
    let (mut out, mut rest) = (String::new(), template);
    while let Some(at) = rest.find(['{', '}']) {
        out.push_str(&rest[..at]);
        let brace = &rest[at..at + 1];
        rest = &rest[at + 1..];
        if rest.starts_with(brace) {
            out.push_str(brace);
            rest = &rest[1..];
            continue;
        }
        let Some(end) = rest.find('}').filter(|_| brace == "{") else {
            return Err(format!(
                "the prompt template has a lone `{brace}`; write `{brace}{brace}` for the character"
            ));
        };
        let field = &rest[..end];
        match row.get(field) {
            Some(Value::String(text)) => out.push_str(text),
            Some(Value::Null) => {
                return Err(format!("the prompt template names `{{{field}}}`, which is null here"));
            }
            Some(other) => out.push_str(&other.to_string()),
            None => {
                let known: Vec<&str> = row.keys().map(String::as_str).collect();
                return Err(format!(
                    "the prompt template names `{{{field}}}`, and the row has only: {}",
                    known.join(", ")
                ));
            }
        }
        rest = &rest[end + 1..];
    }
    out.push_str(rest);
    Ok(out)
}

/// A fresh shuffle of `n` rows each epoch, as a pure function of a position in the endless sequence.
#[derive(Debug, Clone)]
pub struct Order {
    seed: u64,
    epoch: u64,
    rows: Vec<usize>,
}

impl Order {
    /// The order of `n` rows (at least one) under `seed`.
    pub fn new(seed: u64, n: usize) -> Self {
        let mut order = Self { seed, epoch: 0, rows: (0..n).collect() };
        order.shuffle(0);
        order
    }

    fn shuffle(&mut self, epoch: u64) {
        self.epoch = epoch;
        self.rows.sort_unstable();
        Stream::new(self.seed, Purpose::Shuffle, &[epoch]).shuffle(&mut self.rows);
    }

    /// The row at `position`.
    pub fn at(&mut self, position: u64) -> usize {
        let n = self.rows.len() as u64;
        if position / n != self.epoch {
            self.shuffle(position / n);
        }
        self.rows[(position % n) as usize]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row() -> Row {
        let Value::Object(row) = json!({"question": "2+2?", "n": 7}) else {
            unreachable!("an object literal")
        };
        row
    }

    #[test]
    fn placeholders_take_fields_and_double_braces_are_braces() {
        assert_eq!(fill("Q: {question} {{{n}}}", &row()).unwrap(), "Q: 2+2? {7}");
        assert!(fill("{missing}", &row()).unwrap_err().contains("`{missing}`"));
        assert!(fill("a } b", &row()).unwrap_err().contains("lone"));
    }

    #[test]
    fn every_epoch_visits_every_row_and_a_position_is_enough_to_resume() {
        let mut order = Order::new(5, 7);
        let first: Vec<usize> = (0..21).map(|p| order.at(p)).collect();
        for epoch in first.chunks(7) {
            let mut seen = epoch.to_vec();
            seen.sort_unstable();
            assert_eq!(seen, (0..7).collect::<Vec<_>>());
        }
        assert_ne!(first[..7], first[7..14]);
        let mut resumed = Order::new(5, 7);
        assert_eq!(first[12..], (12..21).map(|p| resumed.at(p)).collect::<Vec<_>>());
    }

    #[test]
    fn a_row_without_a_prompt_is_named_by_file_and_line_and_an_absurd_one_is_not_encoded() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("d.jsonl");
        std::fs::write(&path, "{\"prompt\": \"a\"}\n\n{\"prompt\": 1}\n").unwrap();
        let (rows, places) = read_placed(&path).unwrap();
        let tokenizer = Tokenizer::from_characters("a ", &[], &["<eos>"], "<eos>").unwrap();
        let renderer = Renderer {
            template: None,
            system: None,
            chat: None,
            tokenizer: &tokenizer,
            places: Some(&places),
        };
        // a refused row is named without another look at the file, which may be large or gone
        std::fs::remove_file(&path).unwrap();
        let error = renderer.prompt(1, &rows[1]).unwrap_err().to_string();
        assert!(error.contains("d.jsonl: line 3 (row 1)"), "{error}");
        assert_eq!(renderer.prompt(0, &rows[0]).unwrap().text, "a");
        let absurd = Row::from_iter([("prompt".to_string(), json!("a".repeat(MAX_TEXT + 1)))]);
        assert!(renderer.prompt(7, &absurd).unwrap_err().to_string().contains("row 7"));
        assert!(renderer.prompt_within(7, &absurd, 100).unwrap().is_none());
    }

    #[test]
    fn a_broken_row_is_named_by_file_and_line() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("d.jsonl");
        std::fs::write(&path, "{\"a\": 1}\n\n{\"a\": \n").unwrap();
        let error = read_jsonl(&path).unwrap_err().to_string();
        assert!(error.contains("d.jsonl") && error.contains("line 3"), "{error}");
        std::fs::write(&path, "[1]\n").unwrap();
        assert!(read_jsonl(&path).unwrap_err().to_string().contains("a list"));
        std::fs::write(&path, "\n").unwrap();
        assert!(read_jsonl(&path).unwrap_err().to_string().contains("no row"));
        std::fs::write(&path, format!("{{}}\n{{\"a\": \"{}\"}}\n", "x".repeat(MAX_ROW))).unwrap();
        let error = read_jsonl(&path).unwrap_err().to_string();
        assert!(error.contains("line 2") && error.contains("64 MiB"), "{error}");
    }
}
