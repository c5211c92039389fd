//! The completions that a reward is tried on, made from a row: right ones, wrong ones, and ones that should pay nothing.

use serde_json::{Map, Value};

use super::Case;

/// What an input is, and so what it may be paid.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    /// The row's own completion.
    Own,
    /// Made of the row's data: an answer that may be right.
    Gold,
    /// The same form with another row's data.
    Foreign,
    /// Every row's answer, one after another.
    Every,
    /// Says nothing about the row.
    Junk,
    /// Says nothing, and is long.
    Huge,
    /// Part of an answer; may be paid or not.
    Partial,
}

/// One completion to try.
#[derive(Debug, Clone)]
pub(super) struct Input {
    pub(super) name: String,
    pub(super) text: String,
    pub(super) role: Role,
}

/// Fields that are no answer.
const RESERVED: [&str; 9] =
    ["id", "prompt", "completion", "tokens", "finish_reason", "step", "sample", "reward", "components"];

/// Bytes of the long inputs.
const HUGE: usize = 1 << 20;

/// Answers that the row's fields may be, as text: strings as they are, the rest as JSON.
pub(super) fn answers(row: &Map<String, Value>) -> Vec<(String, String)> {
    let text = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_string);
    row.iter()
        .filter(|(key, value)| !RESERVED.contains(&key.as_str()) && !value.is_null())
        .map(|(key, value)| (key.clone(), text(value)))
        .filter(|(_, text)| !text.trim().is_empty() && text.len() < 16_384)
        .collect()
}

/// An answer as completions give it.
fn forms(answer: &str) -> [(&'static str, String); 6] {
    [
        ("plain", answer.to_string()),
        ("in <answer> tags", format!("<answer>{answer}</answer>")),
        (
            "after thinking",
            format!("<think>\nI look at it step by step.\n</think>\n<answer>\n{answer}\n</answer>"),
        ),
        ("boxed", format!("So it is \\boxed{{{answer}}}.")),
        ("in a sentence", format!("The answer is {answer}.")),
        ("as a tool call", format!("<tool_call>\n{answer}\n</tool_call>")),
    ]
}

/// All inputs of row `at`; `long` adds those of a megabyte.
pub(super) fn inputs(cases: &[Case], at: usize, long: bool) -> Vec<Input> {
    let Case { fields: row, completion: own, .. } = &cases[at];
    let mut inputs = Vec::new();
    let mut add = |name: String, text: String, role| inputs.push(Input { name, text, role });
    if let Some(own) = own {
        add("the row's own completion".into(), own.clone(), Role::Own);
        let half = own.char_indices().nth(own.chars().count() / 2).map_or(0, |(i, _)| i);
        add("the row's completion, cut in half".into(), own[..half].to_string(), Role::Partial);
        add("the row's completion, twice".into(), format!("{own}\n{own}"), Role::Partial);
    }
    let others: Vec<&Map<String, Value>> =
        (1..cases.len()).map(|by| &cases[(at + by) % cases.len()].fields).take(6).collect();
    for (field, answer) in answers(row) {
        for (form, text) in forms(&answer) {
            add(format!("`{field}` {form}"), text.clone(), Role::Gold);
            if form == "after thinking" {
                let cut = text.len() - "</answer>".len();
                add(format!("`{field}` {form}, cut off"), text[..cut].to_string(), Role::Partial);
                add(format!("`{field}` {form}, then more"), format!("{text} and so on ]]}}>"), Role::Partial);
            }
        }
        let different = |other: &&Map<String, Value>| {
            other.get(&field).is_some_and(|value| Some(value) != row.get(&field)) && !same_answer(row, other)
        };
        if let Some(other) = others.iter().copied().find(different) {
            let foreign = answers(other).into_iter().find(|(name, _)| *name == field);
            for (form, text) in foreign.iter().flat_map(|(_, answer)| forms(answer)) {
                add(format!("another row's `{field}` {form}"), text, Role::Foreign);
            }
        }
        let mut every: Vec<String> = others
            .iter()
            .flat_map(|other| answers(other))
            .filter(|(name, other)| *name == field && *other != answer)
            .map(|(_, other)| other)
            .collect();
        every.sort();
        every.dedup();
        if every.len() >= 2 {
            // neither first nor last, where a script may look by design
            every.insert(every.len() / 2, answer);
            let listed = every.join(", ");
            let tagged: String = every.iter().map(|a| format!("<answer>{a}</answer> ")).collect();
            let boxed: String = every.iter().map(|a| format!("\\boxed{{{a}}} ")).collect();
            add(format!("every `{field}` listed"), listed, Role::Every);
            add(format!("every `{field}` in tags"), tagged, Role::Every);
            add(format!("every `{field}` boxed"), boxed, Role::Every);
        }
    }
    for (name, text) in JUNK {
        add(name.to_string(), text.to_string(), Role::Junk);
    }
    if let Some(prompt) = row.get("prompt").and_then(Value::as_str).filter(|p| !p.trim().is_empty()) {
        add("the prompt repeated".into(), prompt.to_string(), Role::Partial);
    }
    add("one phrase 200 times".into(), "the answer is the answer ".repeat(200), Role::Junk);
    add("nested brackets".into(), format!("{}1{}", "{[(".repeat(300), ")]}".repeat(300)), Role::Junk);
    if long {
        add("a megabyte of one letter".into(), "a".repeat(HUGE), Role::Huge);
        add("a megabyte of words".into(), "so it goes on and on ".repeat(HUGE / 21), Role::Huge);
        add("a megabyte of digits".into(), "1234567890".repeat(HUGE / 10), Role::Huge);
        add("a megabyte of open brackets".into(), "[{(<".repeat(HUGE / 4), Role::Huge);
        add("a megabyte of answer tags".into(), "<answer>".repeat(HUGE / 8), Role::Huge);
    }
    inputs
}

/// Rows whose answers share a value, such as two options of one letter; the one's answer may be right for the other.
fn same_answer(a: &Map<String, Value>, b: &Map<String, Value>) -> bool {
    answers(a)
        .iter()
        .any(|(key, value)| value.len() < 64 && b.get(key).is_some_and(|v| v.as_str() == Some(value)))
}

/// Completions that say nothing about any row.
const JUNK: [(&str, &str); 18] = [
    ("the empty completion", ""),
    ("only spaces", "  \n\t "),
    ("one word", "hello"),
    ("a refusal", "I am sorry, but I cannot help with that."),
    ("an empty answer", "<answer></answer>"),
    ("empty thinking and answer", "<think>\n\n</think>\n<answer>\n\n</answer>"),
    ("an empty box", "\\boxed{}"),
    ("an empty tool call", "<tool_call>\n{}\n</tool_call>"),
    ("an empty list", "[]"),
    ("an empty object", "{}"),
    ("nan", "nan"),
    ("infinity", "<answer>inf</answer>"),
    ("a huge exponent", "<answer>10^10^10^10</answer>"),
    ("a number that is no one's answer", "<answer>-918273645.918273</answer>"),
    ("NUL bytes", "a\0b\0"),
    ("characters of other scripts", "答案是未知数 \u{202e}\u{200b}\u{1f600}"),
    ("an unclosed tag", "<answer>"),
    ("an unclosed string", "{\"name\": \"f\", \"arguments\": {\"x\": \""),
];
