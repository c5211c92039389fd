//! The formats whose calls are Python expressions or special tokens around a name.

use super::json_calls::{before, blocks};
use super::py::{self, Dict, Py, strip};
use super::pyexpr::{self, Call as PyCall, Names, literal};
use super::{Call, Parsed};
use regex::Regex;
use serde_json::Value;
use std::collections::HashSet;
use std::sync::LazyLock;

fn regex(pattern: &str) -> Regex {
    Regex::new(pattern).expect("a constant pattern")
}

fn python_call(call: &PyCall, names: Names) -> Option<Call> {
    let mut arguments = Dict::default();
    for (key, value) in &call.keywords {
        arguments.insert(key.clone(), literal(value, names)?);
    }
    Some(Call { name: call.name.clone(), arguments: Py::Dict(arguments).to_json()? })
}

pub(super) fn pythonic(text: &str, exact: bool) -> Parsed {
    if exact {
        return pythonic_block(text);
    }
    let body = strip(text);
    if !body.starts_with('[') {
        return Parsed::none(text);
    }
    let calls = pyexpr::parse_calls(body).unwrap_or_default();
    let calls: Vec<Call> = calls.iter().filter_map(|call| python_call(call, Names::Reject)).collect();
    if calls.is_empty() { Parsed::none(text) } else { Parsed::of(calls, "") }
}

/// The first list of calls anywhere in the text; all of it must have values.
fn pythonic_block(text: &str) -> Parsed {
    static BLOCK: LazyLock<Regex> =
        LazyLock::new(|| regex(r"(?s)\[\s*[A-Za-z_]\w*\s*\(.*?\)\s*(?:,\s*[A-Za-z_]\w*\s*\(.*?\)\s*)*\]"));
    let cleaned = text.replace("<|python_start|>", "").replace("<|python_end|>", "");
    let Some(block) = BLOCK.find(&cleaned) else {
        return Parsed::none(text);
    };
    let whole = |call: &PyCall| {
        let keys: HashSet<&str> = call.keywords.iter().map(|(key, _)| key.as_str()).collect();
        let plain = call.positional == 0 && !call.name.contains('.') && keys.len() == call.keywords.len();
        if plain { python_call(call, Names::Text) } else { None }
    };
    let calls = pyexpr::parse_calls(block.as_str())
        .and_then(|calls| calls.iter().map(whole).collect::<Option<Vec<Call>>>());
    match calls {
        Some(calls) if !calls.is_empty() => {
            Parsed::of(calls, &format!("{}{}", &cleaned[..block.start()], &cleaned[block.end()..]))
        }
        _ => Parsed::none(text),
    }
}

pub(super) fn llama4(text: &str, exact: bool) -> Parsed {
    if exact {
        return pythonic_block(text);
    }
    let body = strip(text);
    let body = body.strip_prefix("<|python_start|>").unwrap_or(body);
    let body = body.strip_suffix("<|python_end|>").unwrap_or(body);
    let parsed = pythonic(body, false);
    if parsed.called { parsed } else { Parsed::none(text) }
}

pub(super) fn olmo3(text: &str) -> Parsed {
    let body = strip(text);
    let body = body.strip_prefix("<function_calls>").unwrap_or(body);
    let body = body.strip_suffix("</function_calls>").unwrap_or(body);
    let lines: Vec<&str> = body.lines().map(strip).filter(|line| !line.is_empty()).collect();
    let whole = lines.iter().map(|line| pyexpr::parse_calls(line)).collect::<Option<Vec<_>>>();
    // A call may itself span lines; then the block is read as one list.
    let parsed =
        whole.map(|calls| calls.into_iter().flatten().collect()).or_else(|| pyexpr::parse_calls(body));
    let calls: Vec<PyCall> = parsed.unwrap_or_default();
    let calls: Vec<Call> = calls.iter().filter_map(|call| python_call(call, Names::JsonWords)).collect();
    if calls.is_empty() { Parsed::none(text) } else { Parsed::of(calls, "") }
}

pub(super) fn deepseek_v3(text: &str, exact: bool) -> Parsed {
    const SECTION: &str = "<｜tool▁calls▁begin｜>";
    if !text.contains(SECTION) {
        return Parsed::none(text);
    }
    let calls: Vec<Call> = blocks(text, "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>")
        .into_iter()
        .filter(|(_, closed)| *closed)
        .filter_map(|(body, _)| deepseek_call(body, exact))
        .collect();
    if calls.is_empty() { Parsed::none(text) } else { Parsed::of(calls, before(text, SECTION)) }
}

fn deepseek_call(body: &str, exact: bool) -> Option<Call> {
    let (kind, rest) = body.split_once("<｜tool▁sep｜>")?;
    let (name, json) = rest.split_once("\n```json\n")?;
    let json = json.strip_suffix("\n```")?;
    if strip(kind) != "function" || strip(name).is_empty() {
        return None;
    }
    let mut arguments = py::loads(json)?.to_json()?;
    if exact && !arguments.is_object() {
        arguments = serde_json::json!({ "value": arguments });
    }
    Some(Call { name: strip(name).to_owned(), arguments })
}

pub(super) fn kimi_k2(text: &str, exact: bool) -> Parsed {
    const SECTION: &str = "<|tool_calls_section_begin|>";
    static CALL: LazyLock<Regex> = LazyLock::new(|| {
        regex(
            r"(?s)<\|tool_call_begin\|>\s*(?:functions\.)?([\w.\-]+):\d+\s*<\|tool_call_argument_begin\|>\s*(\{.*?\})\s*<\|tool_call_end\|>",
        )
    });
    if !text.contains(SECTION) {
        return Parsed::none(text);
    }
    let calls: Vec<Call> = CALL
        .captures_iter(text)
        .filter(|found| !exact || !found[1].contains('-'))
        .filter_map(|found| {
            let arguments = py::loads(&found[2])?.to_json()?;
            Some(Call { name: found[1].to_owned(), arguments })
        })
        .collect();
    if calls.is_empty() { Parsed::none(text) } else { Parsed::of(calls, before(text, SECTION)) }
}

pub(super) fn step3(text: &str) -> Parsed {
    const SECTION: &str = "<｜tool_calls_begin｜>";
    static INVOKE: LazyLock<Regex> =
        LazyLock::new(|| regex(r#"(?s)<steptml:invoke name="([^"]+)">(.+?)</steptml:invoke>"#));
    static PARAMETER: LazyLock<Regex> =
        LazyLock::new(|| regex(r#"(?s)<steptml:parameter name="([^"]+)">(.+?)</steptml:parameter>"#));
    if !text.contains(SECTION) {
        return Parsed::none(text);
    }
    let read = |body: &str| {
        let (kind, invoke) = body.split_once("<｜tool_sep｜>")?;
        if !kind.contains("function") || invoke.contains("<｜tool_sep｜>") {
            return None;
        }
        let found = INVOKE.captures(invoke)?;
        let name = found[1].trim().to_owned();
        if name.is_empty() {
            return None;
        }
        let mut arguments = serde_json::Map::new();
        for parameter in PARAMETER.captures_iter(&found[2]) {
            arguments.insert(parameter[1].trim().to_owned(), scalar(parameter[2].trim()));
        }
        Some(Call { name, arguments: Value::Object(arguments) })
    };
    let calls: Vec<Call> = blocks(text, "<｜tool_call_begin｜>", "<｜tool_call_end｜>")
        .into_iter()
        .filter(|(_, closed)| *closed)
        .filter_map(|(body, _)| read(body))
        .collect();
    if calls.is_empty() { Parsed::none(text) } else { Parsed::of(calls, before(text, SECTION)) }
}

pub(super) fn qwen3_xml(text: &str) -> Parsed {
    const FUNCTION: &str = "<function=";
    let mut calls = Vec::new();
    for (body, closed) in blocks(text, FUNCTION, "</function>") {
        let Some((name, rest)) = body.split_once('>').filter(|(name, _)| !name.contains('\n')) else {
            continue;
        };
        // An unclosed function counts where its parameters are whole: a cut text is no call.
        if !closed || name.trim().is_empty() {
            continue;
        }
        let mut arguments = serde_json::Map::new();
        for (parameter, _) in blocks(rest, "<parameter=", "</parameter>") {
            if let Some((key, value)) = parameter.split_once('>') {
                let value = value.strip_prefix('\n').unwrap_or(value);
                let value = value.strip_suffix('\n').unwrap_or(value);
                arguments.insert(key.trim().to_owned(), scalar(value));
            }
        }
        calls.push(Call { name: name.trim().to_owned(), arguments: Value::Object(arguments) });
    }
    if calls.is_empty() {
        return Parsed::none(text);
    }
    let content = before(before(text, FUNCTION), "<tool_call>");
    Parsed::of(calls, content)
}

/// A value written without quotes: JSON if it is JSON, Python's words, else the text itself.
fn scalar(text: &str) -> Value {
    if let Some(value) = py::loads(text).and_then(|value| value.to_json()) {
        return value;
    }
    match text.trim() {
        "True" => Value::Bool(true),
        "False" => Value::Bool(false),
        "None" => Value::Null,
        _ => Value::String(text.to_owned()),
    }
}
