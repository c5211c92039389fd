//! Finding out which format a text uses.

use super::py::strip;
use super::{Dialect, Format, ParseOptions, Parsed, ToolError, parse_with};

/// Reads `text` in whichever format its markers show; the format is None where no call is found.
///
/// Markers decide before shapes; several candidates are tried in a fixed order and the first that yields calls wins.
///
/// # Errors
/// As [`parse_with`].
pub fn parse_any(text: &str) -> Result<(Option<Format>, Parsed), ToolError> {
    super::check_length(text)?;
    for (format, dialect) in candidates(text) {
        match parse_with(text, format, &ParseOptions { dialect, tools: None }) {
            Ok(parsed) if parsed.calls.iter().any(|call| is_name(&call.name)) => {
                return Ok((Some(format), parsed));
            }
            Ok(_) | Err(ToolError::RepeatedMarker { .. }) => {}
            Err(error) => return Err(error),
        }
    }
    Ok((None, Parsed::none(text)))
}

/// Prose behind a marker is no function name.
fn is_name(name: &str) -> bool {
    !name.is_empty() && name.chars().all(|c| c.is_alphanumeric() || "_.-/:".contains(c))
}

fn candidates(text: &str) -> Vec<(Format, Dialect)> {
    const MARKERS: [(&str, &[Format]); 14] = [
        ("<|tool_calls_section_begin|>", &[Format::KimiK2]),
        ("<｜tool▁calls▁begin｜>", &[Format::DeepseekV3]),
        ("<｜tool_calls_begin｜>", &[Format::Step3]),
        ("<|action_start|>", &[Format::InternLm2]),
        ("<function=", &[Format::Qwen3Xml]),
        ("<tool_call>", &[Format::Hermes, Format::Granite, Format::Xlam]),
        ("<|tool_call|>", &[Format::Granite]),
        ("<tool_calls>", &[Format::Jamba]),
        ("<tools>", &[Format::Qwen25CoderTools]),
        ("<function_calls>", &[Format::Olmo3Pythonic]),
        ("<|python_start|>", &[Format::Llama4Pythonic]),
        ("[TOOL_CALLS]", &[Format::MistralJsonList, Format::MistralNameArgs, Format::Xlam]),
        ("functools[", &[Format::Phi4Functools]),
        ("<|python_tag|>", &[Format::Llama3Json]),
    ];
    let mut found: Vec<Format> = Vec::new();
    for (marker, formats) in MARKERS {
        if text.contains(marker) {
            found.extend(formats);
        }
    }
    let body = strip(text);
    if body.starts_with('[') {
        found.extend([Format::Pythonic, Format::Xlam]);
    }
    if body.contains("```") || body.contains("</think>") {
        found.push(Format::Xlam);
    }
    if body.contains('{') {
        found.extend([Format::Llama3Json, Format::PlainJson]);
    }
    let mut found: Vec<_> = found.into_iter().map(|format| (format, Dialect::Vllm)).collect();
    if body.contains('[') {
        // A list of calls amid prose.
        found.push((Format::Pythonic, Dialect::Smg));
    }
    found
}
