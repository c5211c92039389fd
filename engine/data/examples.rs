//! Rows that hold completions: demonstrations, preference pairs and labelled completions, as tokens.
//!
//! A completion is a string, which follows the prompt as a rollout's tokens would (its end token behind it), or a list
//! of chat messages, rendered with the prompt by the model's template and cut behind its last end token: what a
//! template writes after that, no rollout ever draws.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use rayon::prelude::*;
use serde_json::{Map, Value, json};

use crate::data::prompts::{Renderer, Row, read_placed, row_id};
use crate::error::{EngineError, Result};
use crate::types::{Prompt, TokenId};

/// A prompt and what is to be imitated after it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Demonstration {
    /// The row's `id`, or its position.
    pub id: String,
    /// At least one token.
    pub prompt: Vec<TokenId>,
    /// All that follows: the demonstration, or in a conversation the turns of others too.
    pub completion: Vec<TokenId>,
    /// Which of these tokens are the assistant's, and learned; as long as `completion`.
    pub mask: Vec<bool>,
}

/// Completions of one prompt and what is known of them.
#[derive(Debug, Clone)]
pub struct Judged {
    /// The prompt.
    pub prompt: Arc<Prompt>,
    /// The completions: the chosen one and the rejected one, or one alone.
    pub completions: Vec<Vec<TokenId>>,
    /// Whether each is desirable.
    pub desirable: Vec<bool>,
    /// The row's own `margin`; 0 without one.
    pub margin: f64,
}

/// Reads the rows of a file as `parse` takes them; an error names the file and the line.
///
/// # Errors
/// As [`read_placed`]; what `parse` refuses.
pub fn read_rows<T: Send>(
    path: &Path,
    parse: impl Fn(usize, &Row) -> std::result::Result<T, String> + Sync,
) -> Result<Vec<T>> {
    let (rows, places) = read_placed(path)?;
    let parsed: Vec<std::result::Result<T, String>> =
        rows.par_iter().enumerate().map(|(i, row)| parse(i, row)).collect();
    let refused = |(i, parsed): (usize, std::result::Result<T, String>)| {
        parsed.map_err(|message| EngineError::malformed(path, format!("line {}", places.lines[i]), message))
    };
    parsed.into_iter().enumerate().map(refused).collect()
}

/// Turns rows into tokens.
#[derive(Clone, Copy)]
pub struct Reader<'a> {
    /// How prompts are rendered.
    pub renderer: Renderer<'a>,
}

type Parsed<T> = std::result::Result<T, String>;

impl Reader<'_> {
    /// A row with a prompt (already `rendered`, or to be) and a `demonstration`, or with `messages` that the assistant has
    /// a part in.
    ///
    /// # Errors
    /// Neither of them, or what cannot be rendered, in words.
    pub fn demonstration(
        &self,
        index: usize,
        row: &Row,
        rendered: Option<&[TokenId]>,
    ) -> Parsed<Demonstration> {
        if let Some(demonstration) = row.get("demonstration") {
            let prompt = match rendered {
                Some(tokens) => tokens.to_vec(),
                None => self.renderer.prompt(index, row).map_err(|e| e.to_string())?.tokens,
            };
            let Value::String(text) = demonstration else {
                return Err("`demonstration` must be a string; a conversation goes into `messages`".into());
            };
            let completion = self.text(text)?;
            let mask = vec![true; completion.len()];
            return Ok(Demonstration { id: row_id(index, row), prompt, completion, mask });
        }
        match row.get("messages") {
            Some(Value::Array(messages)) if messages.iter().any(is_assistant) => {
                self.conversation(index, messages, row)
            }
            Some(_) => {
                Err("no message of `messages` has the role \"assistant\": there is nothing to imitate".into())
            }
            None => Err("no `demonstration` (string) and no `messages` with an assistant's turn. hint: add one, or give \
                         the stage a `path` of its own to rows that have them"
                .into()),
        }
    }

    /// A row with a prompt and `chosen` and `rejected`, or `completion` and `label`.
    ///
    /// # Errors
    /// Missing or equal completions, or what cannot be rendered, in words.
    pub fn judged(&self, index: usize, row: &Row) -> Parsed<Judged> {
        let margin = match row.get("margin") {
            None | Some(Value::Null) => 0.0,
            Some(value) => value
                .as_f64()
                .filter(|m| m.is_finite())
                .ok_or_else(|| format!("`margin` must be a finite number, found {value}"))?,
        };
        let (names, desirable) = match (row.get("chosen"), row.get("rejected"), row.get("completion")) {
            (Some(chosen), Some(rejected), _) => {
                if chosen == rejected {
                    return Err("`chosen` equals `rejected`: nothing is preferred".into());
                }
                (vec!["chosen", "rejected"], vec![true, false])
            }
            (None, None, Some(_)) => match row.get("label") {
                Some(Value::Bool(label)) => (vec!["completion"], vec![*label]),
                _ => return Err("`completion` needs a `label`, true (desirable) or false".into()),
            },
            _ => {
                return Err("expected `chosen` and `rejected`, or `completion` and `label`. hint: \
                            preference.pairs = \"groups\" makes pairs of scored rollouts instead"
                    .into());
            }
        };
        // without a prompt of its own, a pair's is what both conversations begin with
        let shared = row.get("prompt").is_none() && row.get("messages").is_none();
        let mut row = row.clone();
        if let (true, Some(Value::Array(a)), Some(Value::Array(b))) =
            (shared && self.renderer.template.is_none(), row.get("chosen"), row.get("rejected"))
        {
            let same = a.iter().zip(b).take_while(|(a, b)| a == b).count();
            let (a, b, prompt) = (a[same..].to_vec(), b[same..].to_vec(), a[..same].to_vec());
            if prompt.is_empty() {
                return Err("`chosen` and `rejected` share no first message that could be the prompt".into());
            }
            row.insert("messages".into(), Value::Array(prompt));
            row.insert("chosen".into(), Value::Array(a));
            row.insert("rejected".into(), Value::Array(b));
        } else if let Some(Value::Array(messages)) = row.get("prompt").cloned() {
            row.insert("messages".into(), Value::Array(messages));
        }
        let prompt = self.renderer.prompt(index, &row).map_err(|e| e.to_string())?;
        let mut completions = Vec::new();
        for name in names {
            let tokens = match &row[name] {
                Value::String(text) => self.text(text)?,
                Value::Array(turns) if !turns.is_empty() => self.turns(&prompt, &row, turns)?,
                _ => return Err(format!("`{name}` must be a string or a list of messages")),
            };
            if tokens.is_empty() {
                return Err(format!("`{name}` has no token"));
            }
            completions.push(tokens);
        }
        if completions.len() == 2 && completions[0] == completions[1] {
            return Err("`chosen` and `rejected` are the same tokens: nothing is preferred".into());
        }
        Ok(Judged { prompt: Arc::new(prompt), completions, desirable, margin })
    }

    /// Tokens of a completion that is text, with the end token.
    ///
    /// # Errors
    /// Text that the tokenizer cannot express, in words.
    pub fn text(&self, text: &str) -> Parsed<Vec<TokenId>> {
        let tokenizer = self.renderer.tokenizer;
        let mut tokens = tokenizer.encode(text).map_err(|e| e.to_string())?;
        tokens.extend(tokenizer.eos().first());
        Ok(tokens)
    }

    /// Tokens of messages that answer a rendered prompt.
    fn turns(&self, prompt: &Prompt, row: &Row, turns: &[Value]) -> Parsed<Vec<TokenId>> {
        let Some(chat) = self.renderer.chat else { return Err(NO_TEMPLATE.into()) };
        let mut messages = self.prompt_messages(row);
        messages.extend(turns.iter().cloned());
        let text = chat
            .render(&Value::Array(messages), row.get("tools"), &Map::new(), false)
            .map_err(|e| e.to_string())?;
        let Some(rest) = text.strip_prefix(&prompt.text) else {
            return Err("the chat template renders the conversation with another beginning than its prompt. hint: give the \
                        completion as a string"
                .into());
        };
        let tokens = self.renderer.tokenizer.encode(rest).map_err(|e| e.to_string())?;
        Ok(self.until_end(tokens))
    }

    /// The messages that the renderer makes of a row's prompt.
    fn prompt_messages(&self, row: &Row) -> Vec<Value> {
        let mut messages: Vec<Value> =
            self.renderer.system.iter().map(|s| json!({"role": "system", "content": s})).collect();
        match (self.renderer.template, row.get("prompt"), row.get("messages")) {
            (None, Some(Value::String(text)), _) => messages.push(json!({"role": "user", "content": text})),
            (None, _, Some(Value::Array(own))) => messages.extend(own.iter().cloned()),
            (Some(_), ..) => {
                messages
                    .push(json!({"role": "user", "content": self.renderer.filled(row).unwrap_or_default()}));
            }
            _ => {}
        }
        messages
    }

    /// A whole conversation, of which the assistant's turns are learned.
    fn conversation(&self, index: usize, messages: &[Value], row: &Row) -> Parsed<Demonstration> {
        let Some(chat) = self.renderer.chat else { return Err(NO_TEMPLATE.into()) };
        let mut all: Vec<Value> =
            self.renderer.system.iter().map(|s| json!({"role": "system", "content": s})).collect();
        all.extend(messages.iter().cloned());
        let tools = row.get("tools");
        let (text, mut ranges) = chat
            .render_marked(&Value::Array(all.clone()), tools, &Map::new(), false)
            .map_err(|e| e.to_string())?;
        if ranges.iter().all(Range::is_empty) {
            ranges = self.turns_by_prefix(&all, tools, &text)?;
        }
        let tokenizer = self.renderer.tokenizer;
        let (tokens, mut mask) = tokenizer.encode_marked(&text, &ranges).map_err(|e| e.to_string())?;
        // of each turn, what stands behind its end token is the template's
        let mut at = 0;
        while at < mask.len() {
            let end = (at..mask.len()).find(|&i| !mask[i]).unwrap_or(mask.len());
            if let Some(last) = (at..end).rev().find(|&i| tokenizer.eos().contains(&tokens[i])) {
                mask[last + 1..end].fill(false);
            }
            at = end + 1;
        }
        let first = mask.iter().position(|m| *m).ok_or("the assistant's turns have no token")?;
        let last = mask.iter().rposition(|m| *m).unwrap_or(first);
        if first == 0 {
            return Err("the conversation begins with the assistant: a prompt has at least one token".into());
        }
        Ok(Demonstration {
            id: row_id(index, row),
            prompt: tokens[..first].to_vec(),
            completion: tokens[first..=last].to_vec(),
            mask: mask[first..=last].to_vec(),
        })
    }

    /// Where the assistant's turns stand in the text of a conversation, for templates without `{% generation %}`: from the
    /// end of what is rendered before a turn to the end of what is rendered with it.
    fn turns_by_prefix(
        &self,
        messages: &[Value],
        tools: Option<&Value>,
        text: &str,
    ) -> Parsed<Vec<Range<usize>>> {
        let Some(chat) = self.renderer.chat else { return Err(NO_TEMPLATE.into()) };
        let render = |n: usize, open: bool| {
            chat.render(&Value::Array(messages[..n].to_vec()), tools, &Map::new(), open)
                .map_err(|e| e.to_string())
        };
        let mut ranges = Vec::new();
        for (i, _) in messages.iter().enumerate().filter(|(_, m)| is_assistant(m)) {
            let (before, with) = (render(i, true)?, render(i + 1, false)?);
            if !with.starts_with(&before) || !text.starts_with(&with) {
                return Err(format!(
                    "message {i}: the chat template renders this turn otherwise once the conversation goes on, so its \
                     tokens cannot be told. hint: a template with {{% generation %}} blocks, or one row a turn"
                ));
            }
            ranges.push(before.len()..with.len());
        }
        Ok(ranges)
    }

    /// The tokens up to the last end token, where there is one.
    fn until_end(&self, mut tokens: Vec<TokenId>) -> Vec<TokenId> {
        let eos = self.renderer.tokenizer.eos();
        if let Some(last) = tokens.iter().rposition(|t| eos.contains(t)) {
            tokens.truncate(last + 1);
        }
        tokens
    }
}

const NO_TEMPLATE: &str = "has messages, and the model has no chat template (or data.chat is false)";

fn is_assistant(message: &Value) -> bool {
    message["role"] == "assistant"
}
