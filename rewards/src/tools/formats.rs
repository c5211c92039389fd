//! The text formats of tool calls, and the two readings of them.
//!
//! Each format is what one family of models is trained to write. Two widely used readers disagree on damaged text:
//! vLLM's parsers keep what can be read, the Rust crate `tool-parser` ("smg") insists on exact shapes; [`Dialect`]
//! chooses. On well-formed text both give the same calls.

use super::{Parsed, ToolError, check_length, json_calls, tagged};
use serde::{Deserialize, Serialize};

/// How a family of models writes its calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Format {
    /// `<tool_call>\n{"name": "f", "arguments": {..}}\n</tool_call>`, a block a call (Hermes, Qwen2.5, Qwen3).
    Hermes,
    /// `{"name": "f", "parameters": {..}}`, several joined by `;`, perhaps after `<|python_tag|>`.
    Llama3Json,
    /// `[f(a='x', n=3), g()]` (Llama 3.2).
    Pythonic,
    /// The same between `<|python_start|>` and `<|python_end|>`.
    Llama4Pythonic,
    /// `<function_calls>f(a='x')\ng()</function_calls>`, a call a line.
    Olmo3Pythonic,
    /// `[TOOL_CALLS] [{"name": "f", "arguments": {..}}]` (Mistral tokenizers before v11).
    MistralJsonList,
    /// `[TOOL_CALLS]f{"a": 1}[TOOL_CALLS]g{..}` (Mistral tokenizers from v11).
    MistralNameArgs,
    /// A JSON list of calls: bare, fenced, after `</think>`, in `<tool_call>` or behind `[TOOL_CALLS]`.
    Xlam,
    /// `<|tool_call|> [{..}]` or `<tool_call> [{..}]` without a close tag (Granite 3).
    Granite,
    /// `<tool_calls>[{..}]</tool_calls>`.
    Jamba,
    /// `functools[{..}]` (Phi-4-mini).
    Phi4Functools,
    /// `<|action_start|><|plugin|>{"name": .., "parameters": ..}<|action_end|>`.
    #[serde(rename = "internlm2")]
    InternLm2,
    /// DeepSeek-V3's special tokens around a name and a fenced JSON object.
    DeepseekV3,
    /// `<tool_call>\n<function=f>\n<parameter=a>x</parameter>\n</function>\n</tool_call>` (Qwen3-Coder).
    Qwen3Xml,
    /// `<tools>{..}</tools>`, a block a call (Qwen2.5-Coder).
    Qwen25CoderTools,
    /// The first JSON object or list in the text.
    PlainJson,
    /// Kimi-K2's special tokens around `functions.f:0` and a JSON object.
    KimiK2,
    /// Step-3's special tokens around `<steptml:invoke name="f">`.
    Step3,
}

impl Format {
    /// All formats.
    pub const ALL: [Format; 18] = [
        Format::Hermes,
        Format::Llama3Json,
        Format::Pythonic,
        Format::Llama4Pythonic,
        Format::Olmo3Pythonic,
        Format::MistralJsonList,
        Format::MistralNameArgs,
        Format::Xlam,
        Format::Granite,
        Format::Jamba,
        Format::Phi4Functools,
        Format::InternLm2,
        Format::DeepseekV3,
        Format::Qwen3Xml,
        Format::Qwen25CoderTools,
        Format::PlainJson,
        Format::KimiK2,
        Format::Step3,
    ];
}

/// Which reader's judgement of damaged text is followed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Dialect {
    /// Keep what can be read, as vLLM's parsers do.
    #[default]
    Vllm,
    /// Exact shapes only, as the Rust crate `tool-parser` 1.10 does.
    Smg,
}

/// How to read.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ParseOptions {
    /// Whose judgement of damaged text is followed.
    pub dialect: Dialect,
    /// Names of the tools on offer; a call of any other name is not returned. None: every name passes.
    pub tools: Option<Vec<String>>,
}

/// Reads `text` as `format`, keeping what can be read.
///
/// A text without calls, or too broken to read, is `Ok` with no calls and the text as content.
///
/// # Errors
/// [`ToolError::TooLong`], and [`ToolError::RepeatedMarker`] where the format forbids a second marker.
pub fn parse(text: &str, format: Format) -> Result<Parsed, ToolError> {
    parse_with(text, format, &ParseOptions::default())
}

/// Reads `text` as `format` under `options`; see [`parse`].
///
/// # Errors
/// As [`parse`].
pub fn parse_with(text: &str, format: Format, options: &ParseOptions) -> Result<Parsed, ToolError> {
    check_length(text)?;
    let exact = options.dialect == Dialect::Smg;
    let mut parsed = match format {
        Format::Hermes => json_calls::hermes(text, exact),
        Format::Llama3Json => json_calls::llama3(text, exact),
        Format::Pythonic => tagged::pythonic(text, exact),
        Format::Llama4Pythonic => tagged::llama4(text, exact),
        Format::Olmo3Pythonic => tagged::olmo3(text),
        Format::MistralJsonList => json_calls::mistral_list(text, exact)?,
        Format::MistralNameArgs => json_calls::mistral_name_args(text),
        Format::Xlam => json_calls::xlam(text),
        Format::Granite => json_calls::granite(text),
        Format::Jamba => json_calls::jamba(text),
        Format::Phi4Functools => json_calls::phi4(text),
        Format::InternLm2 => json_calls::internlm2(text),
        Format::DeepseekV3 => tagged::deepseek_v3(text, exact),
        Format::Qwen3Xml => tagged::qwen3_xml(text),
        Format::Qwen25CoderTools => json_calls::qwen25_coder(text),
        Format::PlainJson => json_calls::plain_json(text),
        Format::KimiK2 => tagged::kimi_k2(text, exact),
        Format::Step3 => tagged::step3(text),
    };
    if let Some(tools) = &options.tools {
        parsed.calls.retain(|call| tools.contains(&call.name));
        parsed.called &= !parsed.calls.is_empty();
    }
    Ok(parsed)
}
