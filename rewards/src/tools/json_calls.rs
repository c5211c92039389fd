//! The formats whose calls are JSON objects or lists of them.

use super::py::{self, Py, strip};
use super::{Call, Parsed, ToolError};
use serde_json::{Map, Value};

/// Starts at which a JSON value is tried before a text full of braces is given up.
const MAX_STARTS: usize = 20_000;

/// Which keys hold the arguments of a call object, in order of preference.
#[derive(Clone, Copy)]
pub(super) struct Keys {
    arguments: &'static [&'static str],
    /// A call without arguments is one with none given.
    optional: bool,
}

const ARGUMENTS: Keys = Keys { arguments: &["arguments"], optional: false };
const EITHER: Keys = Keys { arguments: &["arguments", "parameters"], optional: false };
const PARAMETERS_FIRST: Keys = Keys { arguments: &["parameters", "arguments"], optional: true };

/// A call object as a call; None if it is none or holds a number that JSON cannot write.
fn call(object: &Py, keys: Keys) -> Option<Call> {
    let dict = object.as_dict()?;
    let name = dict.get("name")?.as_str()?.to_owned();
    let arguments = match keys.arguments.iter().find_map(|key| dict.get(key)) {
        Some(value) => decode_once(value)?,
        None if keys.optional => Value::Object(Map::new()),
        None => return None,
    };
    Some(Call { name, arguments })
}

/// Arguments given as a string of JSON are decoded once; any other string stays one.
fn decode_once(value: &Py) -> Option<Value> {
    if let Some(inner) = value.as_str().and_then(py::loads)
        && matches!(inner, Py::Dict(_))
    {
        return inner.to_json();
    }
    value.to_json()
}

/// All items of a list as calls, or None if one is none.
fn calls(list: &Py, keys: Keys) -> Option<Vec<Call>> {
    list.as_list()?.iter().map(|item| call(item, keys)).collect()
}

/// The readable items of a list.
fn readable(list: &Py, keys: Keys) -> Vec<Call> {
    list.as_list().unwrap_or_default().iter().filter_map(|item| call(item, keys)).collect()
}

/// The texts between `open` and the next `close`; the last may be unclosed (then the flag is false).
pub(super) fn blocks<'a>(text: &'a str, open: &str, close: &str) -> Vec<(&'a str, bool)> {
    let mut found = Vec::new();
    let mut rest = text;
    while let Some(start) = rest.find(open) {
        let body = &rest[start + open.len()..];
        match body.find(close) {
            Some(end) => {
                found.push((&body[..end], true));
                rest = &body[end + close.len()..];
            }
            None => {
                found.push((body, false));
                break;
            }
        }
    }
    found
}

pub(super) fn before<'a>(text: &'a str, marker: &str) -> &'a str {
    text.find(marker).map_or(text, |at| &text[..at])
}

/// `tool-parser`'s reading of an object: missing arguments are none given, strings stay strings, JSON by serde.
fn exact_call(object: &Value, names: &[&str], keys: &[&str]) -> Option<Call> {
    let name = names.iter().find_map(|key| object.get(key))?.as_str()?.to_owned();
    let arguments =
        keys.iter().find_map(|key| object.get(key)).cloned().unwrap_or_else(|| Value::Object(Map::new()));
    Some(Call { name, arguments })
}

pub(super) fn hermes(text: &str, exact: bool) -> Parsed {
    const OPEN: &str = "<tool_call>";
    if !text.contains(OPEN) {
        return Parsed::none(text);
    }
    let calls: Vec<Call> = if exact {
        blocks(text, "<tool_call>\n", "\n</tool_call>")
            .into_iter()
            .filter(|(_, closed)| *closed)
            .filter_map(|(body, _)| serde_json::from_str(body.trim()).ok())
            .filter_map(|object| exact_call(&object, &["name"], &["arguments"]))
            .collect()
    } else {
        blocks(text, OPEN, "</tool_call>")
            .into_iter()
            .filter_map(|(body, _)| py::loads(body))
            .filter_map(|object| call(&object, ARGUMENTS))
            .collect()
    };
    if calls.is_empty() { Parsed::none(text) } else { Parsed::of(calls, before(text, OPEN)) }
}

pub(super) fn llama3(text: &str, exact: bool) -> Parsed {
    const TAG: &str = "<|python_tag|>";
    if exact {
        let (content, json) = match text.split_once(TAG) {
            Some(split) => split,
            None if text.trim_start().starts_with('{') => ("", text),
            None => return Parsed::none(text),
        };
        let parts: Vec<&str> = if json.contains(';') { json.split(';').collect() } else { vec![json] };
        let calls: Vec<Call> = parts
            .into_iter()
            .filter_map(|part| serde_json::from_str(part.trim()).ok())
            .filter_map(|object| exact_call(&object, &["name"], &["parameters"]))
            .collect();
        return if calls.is_empty() { Parsed::none(text) } else { Parsed::of(calls, content) };
    }
    let mut calls = Vec::new();
    let mut at = 0;
    for _ in 0..MAX_STARTS {
        let Some(start) = text[at..].find('{') else { break };
        at += start;
        match py::raw_decode(&text[at..]) {
            Some((object, length)) => {
                calls.extend(call(&object, EITHER));
                at += length;
            }
            None => at += 1,
        }
    }
    if calls.is_empty() { Parsed::none(text) } else { Parsed::of(calls, "") }
}

pub(super) fn mistral_list(text: &str, exact: bool) -> Result<Parsed, ToolError> {
    const BOT: &str = "[TOOL_CALLS]";
    if exact {
        return Ok(mistral_exact(text));
    }
    let Some((content, raw)) = text.split_once(BOT) else {
        return Ok(Parsed::none(text));
    };
    let found = text.matches(BOT).count();
    if found > 1 {
        return Err(ToolError::RepeatedMarker { format: "mistral_json_list", marker: BOT, found });
    }
    let raw = strip(raw);
    let list = py::raw_decode(raw).map(|(list, _)| list).or_else(|| {
        let start = raw.find("[{")?;
        let end = raw.rfind("}]")?;
        py::loads(raw.get(start..end + 2)?)
    });
    let keys = Keys { optional: true, ..ARGUMENTS };
    Ok(match list.as_ref().and_then(|list| calls(list, keys)) {
        Some(calls) => Parsed { called: true, calls, content: content.to_owned() },
        None => Parsed::none(raw),
    })
}

/// `[TOOL_CALLS] [` … the bracket that closes it.
fn mistral_exact(text: &str) -> Parsed {
    const BOT: &str = "[TOOL_CALLS] [";
    let Some(at) = text.find(BOT) else {
        return Parsed::none(text);
    };
    let json = &text[at + BOT.len() - 1..];
    let mut stream = serde_json::Deserializer::from_str(json).into_iter::<Value>();
    let Some(Ok(Value::Array(items))) = stream.next() else {
        return Parsed::none(text);
    };
    let calls = items.iter().filter_map(|item| exact_call(item, &["name"], &["arguments"])).collect();
    Parsed::of(calls, &text[..at])
}

pub(super) fn mistral_name_args(text: &str) -> Parsed {
    const BOT: &str = "[TOOL_CALLS]";
    let Some((content, raw)) = text.split_once(BOT) else {
        return Parsed::none(text);
    };
    let calls = raw
        .split(BOT)
        .filter_map(|raw| {
            let (name, arguments) = raw.split_at(raw.find('{')?);
            let name = name.replace("[ARGS]", "").trim().to_owned();
            let decoded = py::raw_decode(arguments).and_then(|(value, _)| value.to_json());
            Some(Call { name, arguments: decoded.unwrap_or_else(|| Value::String(arguments.to_owned())) })
        })
        .collect();
    Parsed { called: true, calls, content: content.to_owned() }
}

pub(super) fn xlam(text: &str) -> Parsed {
    let found = xlam_list(text);
    let Some((content, json)) = found else {
        return Parsed::none(text);
    };
    match py::loads(json) {
        Some(list) if list.as_list().is_some() => Parsed::of(readable(&list, ARGUMENTS), &content),
        _ => Parsed::none(text),
    }
}

/// Where an xLAM text keeps its list: content and JSON.
fn xlam_list(text: &str) -> Option<(String, &str)> {
    const THINK: &str = "</think>";
    if let Some(at) = text.find(THINK) {
        let (thought, answer) = text.split_at(at + THINK.len());
        let answer = strip(answer);
        let json = std::iter::once(answer)
            .chain(xlam_blocks(answer).into_iter().map(|(body, _)| body))
            .find(|json| py::loads(json).is_some());
        if let Some(json) = json {
            return Some((strip(thought).to_owned(), json));
        }
    }
    for (body, outer) in xlam_blocks(text) {
        if py::loads(body).is_some() {
            return Some((strip(&text.replace(outer, "")).to_owned(), body));
        }
    }
    (strip(text).starts_with('[')).then(|| (String::new(), text))
}

/// Fenced, `[TOOL_CALLS]` and `<tool_call>` blocks: body, and the whole with its marks.
fn xlam_blocks(text: &str) -> Vec<(&str, &str)> {
    let mut found = Vec::new();
    let mut rest = text;
    while let Some(start) = rest.find("```") {
        let inner = &rest[start + 3..];
        let body = inner.strip_prefix("json").unwrap_or(inner);
        let Some(end) = body.find("```") else { break };
        let skipped = inner.len() - body.len();
        found.push((&body[..end], &rest[start..start + 3 + skipped + end + 3]));
        rest = &body[end + 3..];
    }
    let mut rest = text;
    while let Some(start) = rest.find("[TOOL_CALLS]") {
        let body = &rest[start + "[TOOL_CALLS]".len()..];
        let end = body.find('\n').unwrap_or(body.len());
        found.push((&body[..end], &rest[start..start + "[TOOL_CALLS]".len() + end]));
        rest = &body[end..];
    }
    let mut rest = text;
    while let Some(start) = rest.find("<tool_call>") {
        let body = &rest[start + "<tool_call>".len()..];
        let Some(end) = body.find("</tool_call>") else { break };
        let whole = "<tool_call>".len() + end + "</tool_call>".len();
        found.push((&body[..end], &rest[start..start + whole]));
        rest = &rest[start + whole..];
    }
    found.truncate(MAX_STARTS);
    found
}

pub(super) fn granite(text: &str) -> Parsed {
    let stripped = strip(text);
    let stripped = stripped.strip_prefix("<|tool_call|>").unwrap_or(stripped);
    let stripped = stripped.strip_prefix("<tool_call>").unwrap_or(stripped);
    match py::loads(stripped).as_ref().and_then(|list| calls(list, ARGUMENTS)) {
        Some(calls) => Parsed { called: true, calls, content: String::new() },
        None => Parsed::none(text),
    }
}

pub(super) fn jamba(text: &str) -> Parsed {
    const OPEN: &str = "<tool_calls>";
    let found = blocks(text, OPEN, "</tool_calls>");
    let list = match found.first() {
        Some((body, true)) => py::loads(body),
        _ => None,
    };
    match list.as_ref().and_then(|list| calls(list, ARGUMENTS)) {
        Some(calls) => {
            let content = before(text, OPEN);
            let content = if content == " " { "" } else { content };
            Parsed { called: true, calls, content: content.to_owned() }
        }
        None => Parsed::none(text),
    }
}

pub(super) fn phi4(text: &str) -> Parsed {
    const OPEN: &str = "functools";
    let mut at = 0;
    while let Some(start) = text[at..].find("functools[") {
        at += start + OPEN.len();
        if let Some((list, _)) = py::raw_decode(&text[at..])
            && let Some(calls) = calls(&list, EITHER)
        {
            return if calls.is_empty() { Parsed::none(text) } else { Parsed::of(calls, "") };
        }
    }
    Parsed::none(text)
}

pub(super) fn internlm2(text: &str) -> Parsed {
    const OPEN: &str = "<|action_start|><|plugin|>";
    let Some((content, action)) = text.split_once(OPEN) else {
        return Parsed::none(text);
    };
    let action = before(action, "<|action_end|>");
    let object = action.find('{').and_then(|at| py::loads(&action[at..]));
    match object.as_ref().and_then(|object| call(object, PARAMETERS_FIRST)) {
        Some(call) => Parsed::of(vec![call], content),
        None => Parsed::none(text),
    }
}

pub(super) fn qwen25_coder(text: &str) -> Parsed {
    const OPEN: &str = "<tools>";
    let calls: Vec<Call> = blocks(text, OPEN, "</tools>")
        .into_iter()
        .filter(|(_, closed)| *closed)
        .filter_map(|(body, _)| py::loads(body))
        .filter_map(|object| call(&object, EITHER))
        .collect();
    if calls.is_empty() { Parsed::none(text) } else { Parsed::of(calls, before(text, OPEN)) }
}

/// The first balanced `{…}` or `[…]` that is JSON; what is around it is content, whether or not it holds a call.
pub(super) fn plain_json(text: &str) -> Parsed {
    let Some((start, end, value)) = first_json(text) else {
        return Parsed::none(text);
    };
    let items = match &value {
        Value::Array(items) => items.as_slice(),
        other => std::slice::from_ref(other),
    };
    let calls = items
        .iter()
        .filter_map(|item| exact_call(item, &["name", "function"], &["arguments", "parameters"]))
        .collect();
    Parsed::of(calls, &format!("{}{}", &text[..start], &text[end..]))
}

fn first_json(text: &str) -> Option<(usize, usize, Value)> {
    let (mut in_string, mut escaped) = (false, false);
    let mut stack: Vec<u8> = Vec::new();
    let mut start = None;
    for (i, c) in text.bytes().enumerate() {
        if escaped {
            escaped = false;
            continue;
        }
        match c {
            b'\\' if in_string => escaped = true,
            b'"' => in_string = !in_string,
            _ if in_string => {}
            b'{' | b'[' => {
                start.get_or_insert(i);
                stack.push(c);
            }
            b'}' | b']' => {
                let matches = stack.pop().map(|open| open + 2 == c);
                if matches == Some(false) {
                    stack.clear();
                }
                if matches != Some(true) {
                    start = None;
                } else if stack.is_empty()
                    && let Some(from) = start.take()
                    && let Ok(value) = serde_json::from_str(&text[from..=i])
                {
                    return Some((from, i + 1, value));
                }
            }
            _ => {}
        }
    }
    None
}
