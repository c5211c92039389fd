//! Chat templates: messages to the text of a prompt, as transformers' `apply_chat_template` renders it.
//!
//! Jinja by minijinja with Python's string methods, `tojson` as `json.dumps`, `raise_exception`, `strftime_now`,
//! loop controls and `{% generation %}` blocks. Templates come from strangers: a render has a budget of work and
//! output (`template_guard.rs`), runs on a stack of its own, and reaches no file, clock (but the date) or network.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::ops::Range;
use std::sync::Arc;

use minijinja::machinery::{self, CodeGenerator, Instructions};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Rest, StringInput, ValueKind, from_args};
use minijinja::{AutoEscape, Environment, Error, ErrorKind, State, Value as Jinja};
use serde_json::{Map, Value, json};

use super::python::{JsonStyle, float_repr, json_dumps, strftime};
use super::template_guard;
use super::tokenizer::Tokenizer;
use crate::error::{EngineError, Result};
use crate::types::TokenId;

/// Largest template source, in bytes; those of published models have up to 30 KiB.
const MAX_SOURCE: usize = 128 << 10;
/// Work that a render may do whatever its input: instructions, or 64 bytes of text each. It bounds time and memory alike.
const BASE_FUEL: u64 = 1_250_000;
/// Further work for each byte of the messages and tools, and the most of all.
const FUEL_PER_BYTE: u64 = 4;
const MAX_FUEL: u64 = 8_000_000;
/// Largest value of a render, in bytes as if written out in full, beside four times its input, and the most of all.
const BASE_VALUE: u64 = 16 << 20;
const MAX_VALUE: u64 = 64 << 20;
/// Deepest nesting of blocks, and four times the deepest of macros.
const RECURSION: usize = 250;
/// Stack of a render; values that a template nests are dropped recursively.
const STACK: usize = 512 << 20;
/// Marks the end of a message that is to be continued, as in transformers.
const CONTINUE_TAG: &str = "CONTINUE_FINAL_MESSAGE_TAG ";

/// The point in time that `strftime_now` shows, in UTC.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Moment {
    /// Seconds since 1970-01-01 00:00:00.
    pub unix_seconds: i64,
}

impl Moment {
    /// The day that the prompts of a run show, whenever it is started or resumed: 26 July 2024, on which the templates of
    /// Llama 3 fall back by themselves.
    pub const RUN: Self = Self { unix_seconds: 1_721_952_000 };

    /// The clock's time.
    pub fn now() -> Self {
        let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        Self { unix_seconds: since.map_or(0, |d| d.as_secs() as i64) }
    }
}

/// A compiled template; cheap to clone.
#[derive(Clone)]
pub struct ChatTemplate {
    env: Arc<Environment<'static>>,
    syntax: SyntaxConfig,
    source: Arc<str>,
    /// The source with stand-ins for what the engine lacks.
    prepared: Arc<str>,
    special_tokens: Arc<BTreeMap<String, String>>,
    moment: Option<Moment>,
}

impl std::fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ChatTemplate").field("bytes", &self.source.len()).finish_non_exhaustive()
    }
}

impl ChatTemplate {
    /// Compiles a template; `special_tokens` (`bos_token`, `eos_token`, …) become its variables.
    ///
    /// # Errors
    /// A source that does not parse (with its line), or is larger than 128 KiB.
    pub fn new(source: &str, special_tokens: &BTreeMap<String, String>) -> Result<Self> {
        if source.len() > MAX_SOURCE {
            return Err(EngineError::Model(format!(
                "chat template: {} bytes; at most {MAX_SOURCE} are supported",
                source.len()
            )));
        }
        let mut env = Environment::new();
        env.set_debug(false);
        env.set_recursion_limit(RECURSION);
        env.remove_global("debug");
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        let syntax = syntax.map_err(|e| failure(&e))?;
        env.set_unknown_method_callback(method);
        env.add_filter("tojson", tojson);
        env.add_filter("indent", indent);
        env.add_filter("trim", trim);
        env.add_filter("__generation", mark_generation);
        env.add_filter("string", |value: Jinja| python_str(&value));
        env.add_test("iterable", |value: &Jinja| {
            matches!(
                value.kind(),
                ValueKind::String
                    | ValueKind::Seq
                    | ValueKind::Map
                    | ValueKind::Iterable
                    | ValueKind::Undefined
            )
        });
        env.add_test("sequence", |value: &Jinja| {
            matches!(value.kind(), ValueKind::String | ValueKind::Seq | ValueKind::Map)
        });
        env.set_formatter(|out, _, value| out.write_str(&python_str(value)).map_err(Error::from));
        env.add_function("raise_exception", |message: String| -> std::result::Result<String, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, format!("the template refuses: {message}")))
        });
        env.add_function("strftime_now", strftime_now);
        let prepared = generation_tags_to_filters(source);
        let prepared = template_guard::unfold_repeats(&prepared, &syntax).map_err(|e| failure(&e))?;
        let prepared: Arc<str> = prepared.into();
        on_own_stack(|| compile(&prepared, &syntax).map(|_| ()))?;
        Ok(Self {
            env: Arc::new(env),
            syntax,
            source: source.into(),
            prepared,
            special_tokens: Arc::new(special_tokens.clone()),
            moment: None,
        })
    }

    /// Fixes the date that the template sees, so that the same messages always give the same text.
    #[must_use]
    pub fn at(mut self, moment: Moment) -> Self {
        self.moment = Some(moment);
        self
    }

    /// The template's source.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// Renders a conversation.
    ///
    /// `messages` is a list of objects, `kwargs` further variables (`enable_thinking`, …);
    /// `continue_final_message: true` among them leaves the last message open.
    ///
    /// # Errors
    /// What the template refuses, gets wrong, or spends beyond its budget, with its line.
    pub fn render(
        &self,
        messages: &Value,
        tools: Option<&Value>,
        kwargs: &Map<String, Value>,
        add_generation_prompt: bool,
    ) -> Result<String> {
        Ok(self.render_marked(messages, tools, kwargs, add_generation_prompt)?.0)
    }

    /// Renders a conversation and gives the byte ranges of its `{% generation %}` blocks (what the assistant
    /// wrote); a template without such blocks gives none.
    ///
    /// # Errors
    /// As [`ChatTemplate::render`].
    pub fn render_marked(
        &self,
        messages: &Value,
        tools: Option<&Value>,
        kwargs: &Map<String, Value>,
        add_generation_prompt: bool,
    ) -> Result<(String, Vec<Range<usize>>)> {
        let mut kwargs = kwargs.clone();
        let resume = kwargs.shift_remove("continue_final_message") == Some(Value::Bool(true));
        let mut messages = with_reasoning_names(messages)?;
        let unfinished = match (resume, add_generation_prompt) {
            (false, _) => None,
            (true, true) => {
                return Err(EngineError::Model(
                    "chat template: continue_final_message and add_generation_prompt exclude each other"
                        .into(),
                ));
            }
            (true, false) => Some(open_last_message(&mut messages)?),
        };
        let mut context = Map::new();
        context.extend(self.special_tokens.iter().map(|(k, v)| (k.clone(), json!(v))));
        context.insert("messages".into(), messages);
        context.insert("tools".into(), tools.cloned().unwrap_or_default());
        context.insert("documents".into(), Value::Null);
        context.insert("add_generation_prompt".into(), json!(add_generation_prompt));
        context.extend(kwargs);
        let moment = self.moment.unwrap_or_else(Moment::now);
        context.insert("__moment".into(), json!(moment.unix_seconds));
        let context = Value::Object(context);
        let input = context.to_string();
        let mark = unused_mark(&input, &self.source);
        let size = input.len() as u64;
        let rendered = on_own_stack(|| {
            let mut env = (*self.env).clone();
            env.set_fuel(Some((BASE_FUEL + FUEL_PER_BYTE * size).min(MAX_FUEL)));
            env.add_global("__mark", mark.clone());
            template_guard::install(&mut env, (BASE_VALUE + 4 * size).min(MAX_VALUE));
            let (instructions, blocks) = compile(&self.prepared, &self.syntax)?;
            let mut text = String::new();
            let mut out = machinery::make_string_output(&mut text);
            machinery::eval(&env, &instructions, to_jinja(&context), &blocks, &mut out, AutoEscape::None)
                .map_err(|e| failure(&e))?;
            Ok(text)
        })?;
        let (mut text, ranges) = take_marks(&rendered, &mark);
        if let Some(unfinished) = unfinished {
            close_at_tag(&mut text, &unfinished)?;
        }
        Ok((text, ranges))
    }

    /// Renders and encodes a conversation, with a mask that is true for the assistant's tokens.
    ///
    /// # Errors
    /// As [`ChatTemplate::render`] and [`Tokenizer::encode`].
    pub fn encode_with_mask(
        &self,
        tokenizer: &Tokenizer,
        messages: &Value,
        tools: Option<&Value>,
        kwargs: &Map<String, Value>,
    ) -> Result<(Vec<TokenId>, Vec<bool>)> {
        let (text, ranges) = self.render_marked(messages, tools, kwargs, false)?;
        tokenizer.encode_marked(&text, &ranges)
    }
}

type Compiled<'s> = (Instructions<'s>, BTreeMap<&'s str, Instructions<'s>>);

/// Instructions of the template and of its blocks, guarded.
fn compile<'s>(source: &'s str, syntax: &SyntaxConfig) -> Result<Compiled<'s>> {
    let tree = machinery::parse(source, "chat", syntax.clone()).map_err(|e| failure(&e))?;
    let mut generator = CodeGenerator::new("chat", source);
    generator.compile_stmt(&tree);
    let (main, blocks) = generator.finish();
    let blocks = blocks.iter().map(|(name, block)| (*name, template_guard::weave(block))).collect();
    Ok((template_guard::weave(&main), blocks))
}

/// Runs on a thread with a large stack (only touched pages cost memory).
fn on_own_stack<T: Send>(f: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    std::thread::scope(|scope| {
        let thread =
            std::thread::Builder::new().name("template".into()).stack_size(STACK).spawn_scoped(scope, f);
        let thread =
            thread.map_err(|e| EngineError::Memory(format!("no thread for the chat template: {e}")))?;
        thread
            .join()
            .unwrap_or_else(|_| Err(EngineError::Model("chat template: the template engine failed".into())))
    })
}

fn to_jinja(value: &Value) -> Jinja {
    match value {
        Value::Null => Jinja::from(()),
        Value::Bool(b) => Jinja::from(*b),
        Value::Number(n) => match (n.as_i64(), n.as_u64()) {
            (Some(n), _) => Jinja::from(n),
            (None, Some(n)) => Jinja::from(n),
            (None, None) => Jinja::from(n.as_f64().unwrap_or(f64::NAN)),
        },
        Value::String(s) => Jinja::from(s.as_str()),
        Value::Array(items) => items.iter().map(to_jinja).collect(),
        Value::Object(map) => Jinja::from_pairs(map.iter().map(|(k, v)| (k.as_str(), to_jinja(v)))),
    }
}

fn failure(e: &Error) -> EngineError {
    let line = e.line().map_or(String::new(), |l| format!("line {l}: "));
    let hint = match e.kind() {
        ErrorKind::OutOfFuel => {
            "\nhint: the template loops or grows without bound; its budget is far above any real conversation's"
        }
        _ => "",
    };
    let detail = e.detail().map_or(String::new(), |d| format!(": {d}"));
    EngineError::Model(format!("chat template: {line}{}{detail}{hint}", e.kind()))
}

/// transformers shows a message's reasoning under every name that templates read.
fn with_reasoning_names(messages: &Value) -> Result<Value> {
    let wrong = |found: &Value| {
        EngineError::Model(format!("chat template: `messages` must be a list of objects, found {found:.80}"))
    };
    let list = messages.as_array().ok_or_else(|| wrong(messages))?;
    let mut out = vec![];
    for message in list {
        let message = message.as_object().ok_or_else(|| wrong(message))?;
        let names = ["reasoning_content", "thinking", "reasoning"];
        let mut named = Map::new();
        if let Some(reasoning) = names.iter().find_map(|n| message.get(*n).filter(|v| !v.is_null())) {
            named.insert("thinking".into(), reasoning.clone());
            named.extend(message.clone());
            named.insert("reasoning_content".into(), reasoning.clone());
        } else {
            named.clone_from(message);
        }
        out.push(Value::Object(named));
    }
    Ok(Value::Array(out))
}

/// Appends the tag to the last message's text and returns that text.
fn open_last_message(messages: &mut Value) -> Result<String> {
    let refuse = |what: &str| EngineError::Model(format!("chat template: continue_final_message: {what}"));
    let last =
        messages.as_array_mut().and_then(|m| m.last_mut()).ok_or_else(|| refuse("there is no message"))?;
    let content = &mut last["content"];
    if let Value::Array(parts) = content {
        let part = parts.iter_mut().rev().find(|p| p["text"].is_string());
        let part = part.ok_or_else(|| refuse("the last message has no text part"))?;
        let text = part["text"].as_str().unwrap_or_default().to_string();
        part["text"] = json!(format!("{text}{CONTINUE_TAG}"));
        return Ok(text);
    }
    let text = content.as_str().ok_or_else(|| refuse("the last message has no text"))?.to_string();
    *content = json!(format!("{text}{CONTINUE_TAG}"));
    Ok(text)
}

/// Cuts the rendered text where the last message ended.
fn close_at_tag(text: &mut String, unfinished: &str) -> Result<()> {
    let tag = CONTINUE_TAG.trim();
    let at = text.rfind(tag).filter(|_| text.contains(unfinished.trim())).ok_or_else(|| {
        EngineError::Model(
            "chat template: continue_final_message: the template drops or rewrites the last message".into(),
        )
    })?;
    let kept_spacing = text[at..].starts_with(CONTINUE_TAG);
    text.truncate(at);
    if !kept_spacing {
        text.truncate(text.trim_end().len());
    }
    Ok(())
}

/// minijinja has no `{% generation %}`: a filter block in its place wraps the text in marks.
fn generation_tags_to_filters(source: &str) -> String {
    let tag = generation_tags(source);
    let mut out = String::with_capacity(source.len());
    let mut at = 0;
    for (range, replacement) in tag {
        out.push_str(&source[at..range.start]);
        out.push_str(&replacement);
        at = range.end;
    }
    out.push_str(&source[at..]);
    out
}

/// The `{% generation %}` and `{% endgeneration %}` tags and what stands in for them.
fn generation_tags(source: &str) -> Vec<(Range<usize>, String)> {
    let mut found = vec![];
    let mut from = 0;
    while let Some(open) = source[from..].find("{%").map(|i| from + i) {
        let Some(close) = source[open + 2..].find("%}").map(|i| open + 2 + i) else { break };
        let body = &source[open + 2..close];
        from = open + 2;
        let (left, rest) = match body.strip_prefix(['-', '+']) {
            Some(rest) => (&body[..1], rest),
            None => ("", body),
        };
        let (right, word) = match rest.strip_suffix(['-', '+']) {
            Some(word) => (&rest[rest.len() - 1..], word),
            None => ("", rest),
        };
        let stand_in = match word.trim() {
            "generation" => "filter __generation",
            "endgeneration" => "endfilter",
            _ => continue,
        };
        // As many lines as before, so that errors name the right one.
        let lines = "\n".repeat(word.matches('\n').count());
        found.push((open..close + 2, format!("{{%{left} {stand_in}{lines} {right}%}}")));
        from = close + 2;
    }
    found
}

/// A string that neither the input nor the template holds.
fn unused_mark(input: &str, source: &str) -> String {
    (0u32..)
        .map(|i| format!("\u{FDD0}{i}\u{FDD1}"))
        .find(|mark| !input.contains(mark.as_str()) && !source.contains(mark.as_str()))
        .expect("some number is free")
}

fn mark_generation(state: &State<'_, '_>, body: &str) -> std::result::Result<Jinja, Error> {
    let mark = state.lookup("__mark").unwrap_or_default();
    let mark = mark.as_str().unwrap_or_default();
    Ok(Jinja::from(format!("{mark}{body}{mark}")))
}

/// Removes the marks; every pair encloses a range of the result.
fn take_marks(rendered: &str, mark: &str) -> (String, Vec<Range<usize>>) {
    let (mut text, mut ranges) = (String::with_capacity(rendered.len()), vec![]);
    let mut start = None;
    let mut pieces = rendered.split(mark);
    text.push_str(pieces.next().unwrap_or_default());
    for piece in pieces {
        match start.take() {
            None => start = Some(text.len()),
            Some(start) => ranges.push(start..text.len()),
        }
        text.push_str(piece);
    }
    (text, ranges)
}

/// Python's `str`: minijinja's, but for the exponents of floats.
fn python_str(value: &Jinja) -> String {
    match value.kind() {
        ValueKind::Number if !value.is_integer() => {
            f64::try_from(value.clone()).map_or_else(|_| value.to_string(), float_repr)
        }
        _ => value.to_string(),
    }
}

fn strftime_now(state: &State<'_, '_>, format: &str) -> std::result::Result<String, Error> {
    let seconds = state.lookup("__moment").and_then(|m| i64::try_from(m).ok()).unwrap_or(0);
    strftime(seconds, format).map_err(|e| Error::new(ErrorKind::InvalidOperation, e))
}

/// Python's methods; those whose work is not bounded by their text and result are paid for first.
fn method(
    state: &mut State<'_, '_>,
    value: &Jinja,
    name: &str,
    args: &[Jinja],
) -> std::result::Result<Jinja, Error> {
    if let Some(text) = value.as_str() {
        let bytes = match name {
            "strip" | "lstrip" | "rstrip" => set_size(text, args.first()),
            "format" => format_size(text, args),
            _ => 0,
        };
        state.consume_fuel(bytes / 64)?;
    }
    minijinja_contrib::pycompat::unknown_method_callback(state, value, name, args)
}

/// The engine's `trim`, which compares every character with every one of a set.
fn trim(
    state: &State<'_, '_>,
    text: StringInput<'_>,
    set: Option<std::borrow::Cow<'_, str>>,
) -> std::result::Result<Jinja, Error> {
    let size = set.as_ref().map_or(0, |set| text.as_str().len() as u64 * set.len() as u64);
    state.consume_fuel(size / 64)?;
    Ok(minijinja::filters::trim(text, set))
}

fn set_size(text: &str, set: Option<&Jinja>) -> u64 {
    let set = set.and_then(|s| s.as_str()).map_or(0, str::len);
    text.len() as u64 * set as u64
}

/// What a format string can make of its arguments: every field may show the longest, at every width that is written.
fn format_size(format: &str, args: &[Jinja]) -> u64 {
    let widths = format.split(|c: char| !c.is_ascii_digit()).filter(|digits| !digits.is_empty());
    let widths = widths.fold(0u64, |sum, digits| sum.saturating_add(digits.parse().unwrap_or(u64::MAX)));
    let fields = format.matches('{').count() as u64;
    let longest = args.iter().map(|a| a.as_str().map_or_else(|| a.to_string().len(), str::len)).max();
    fields.saturating_mul(longest.unwrap_or(0) as u64).saturating_add(widths)
}

/// The engine's `indent`, which makes its margin before it knows whether a line takes it: the margin is paid for first.
fn indent(state: &State<'_, '_>, args: Rest<Jinja>) -> std::result::Result<Jinja, Error> {
    let (text, width, first, blank, kwargs): (
        StringInput<'_>,
        Option<usize>,
        Option<bool>,
        Option<bool>,
        Kwargs,
    ) = from_args(&args)?;
    let width = match width {
        Some(width) => width,
        None => kwargs.get::<Option<usize>>("width")?.unwrap_or(4),
    };
    let lines = text.as_str().matches('\n').count() + 1;
    state.consume_fuel((width.saturating_mul(lines) / 64) as u64)?;
    minijinja::filters::indent(text, Some(width), first, blank, kwargs)
}

fn tojson(state: &State<'_, '_>, value: Jinja, kwargs: Kwargs) -> std::result::Result<Jinja, Error> {
    let separators: Option<Vec<String>> = kwargs.get("separators")?;
    let indent: Option<Jinja> = kwargs.get("indent")?;
    let indent = match indent {
        None => None,
        Some(v) if v.is_none() => None,
        Some(v) if v.kind() == ValueKind::Number => Some(" ".repeat(usize::try_from(v)?.min(64))),
        Some(v) => Some(v.as_str().filter(|by| by.len() <= 64).map(str::to_string).ok_or_else(|| {
            Error::new(ErrorKind::InvalidOperation, "indent: expected at most 64 bytes of text")
        })?),
    };
    let ensure_ascii: Option<bool> = kwargs.get("ensure_ascii")?;
    let sort_keys: Option<bool> = kwargs.get("sort_keys")?;
    kwargs.assert_all_used()?;
    let (item, colon) = match separators.as_deref() {
        Some([item, colon]) => (item.as_str(), colon.as_str()),
        Some(_) => return Err(Error::new(ErrorKind::InvalidOperation, "separators: expected two texts")),
        None if indent.is_some() => (",", ": "),
        None => (", ", ": "),
    };
    let mut out = String::new();
    json_dumps(
        &value,
        &JsonStyle {
            item,
            colon,
            indent: indent.as_deref(),
            ensure_ascii: ensure_ascii.unwrap_or(false),
            sort_keys: sort_keys.unwrap_or(false),
        },
        0,
        &mut |text| {
            let _ = out.write_str(text);
            // The engine charges what a filter returns only afterwards.
            state.consume_fuel(1 + text.len() as u64 / 32)
        },
    )?;
    Ok(Jinja::from(out))
}
