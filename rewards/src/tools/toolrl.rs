//! ToolRL's reward for a tool-calling turn (Qian et al. 2025, arXiv:2504.13958).
//!
//! `format + correctness (+ length)`, to the last digit as `verl/utils/reward_score/rlla.py` of qiancheng0/ToolRL
//! computes it, with its environment switches as options and its schedules by step. Known to be lenient: a needless
//! extra call costs little, one wrong value of one still earns 1.0 of 3.

use super::py::{self, Py, strip};
use super::{ToolError, check_length, excerpt};
use serde::{Deserialize, Serialize};

/// The switches of ToolRL's reward; all off is its default.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ToolRlOptions {
    /// Training step, which the schedules need.
    pub step: u64,
    /// `REFINEDREWARD`: names and parameter names match all or nothing.
    pub refined: bool,
    /// `COARSEREWARD`: exact, or the lowest reward.
    pub coarse: bool,
    /// `INTERMEDIATEREWARD`: a call counts whole or not at all.
    pub intermediate: bool,
    /// `CORRECTMAX1`: correctness within [-1, 1] instead of [-3, 3].
    pub correct_max1: bool,
    /// `MAX1STEP30MAX3`: before step 30 correctness is a third, from step 30 on format is half.
    pub max1_step30_max3: bool,
    /// `SCHEDULEREWARD`: over 150 steps format goes from ±2 to ±1, correctness from ±2 to ±3.
    pub schedule: bool,
    /// `WITHLENGTH`: words of thought over 512, at most 1.
    pub with_length: bool,
    /// `SCHEDULELENGTH`: the length that earns 1 goes from 384 to 640 words over 105 steps.
    pub schedule_length: bool,
}

/// The parts of ToolRL's reward.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct ToolRlReward {
    /// The sum.
    pub total: f64,
    /// Whether the turn has the shape of the gold turn, 1 or 0 without schedules.
    pub format: f64,
    /// Agreement of the calls, within [-3, 3] without schedules; 0 where the gold calls no tool.
    pub correctness: f64,
    /// The length part; 0 when switched off.
    pub length: f64,
}

/// Scores a response against the gold turn, both as whole texts.
///
/// # Errors
/// [`ToolError::TooLong`]; [`ToolError::Gold`] where the gold's `<tool_call>` block is not one JSON value a line.
pub fn toolrl(response: &str, gold: &str, options: &ToolRlOptions) -> Result<ToolRlReward, ToolError> {
    check_length(response)?;
    check_length(gold)?;
    let response = assistant_turn(response);
    let format = format_reward(response, gold, options);
    let correctness = correctness_reward(response, gold, options)?;
    let length = if options.with_length { length_reward(response, options) } else { 0.0 };
    Ok(ToolRlReward { total: format + correctness + length, format, correctness, length })
}

/// The last assistant turn of a ChatML text, without its marks.
fn assistant_turn(text: &str) -> &str {
    let text = text.rsplit_once("<|im_start|>assistant").map_or(text, |(_, turn)| turn);
    strip(text.split_once("<|im_end|>").map_or(text, |(turn, _)| turn))
}

fn format_reward(response: &str, gold: &str, options: &ToolRlOptions) -> f64 {
    let (mut max, mut min) = (1.0, 0.0);
    let step = options.step as f64;
    if options.max1_step30_max3 && options.step >= 30 {
        max /= 2.0;
        min /= 2.0;
    }
    if options.schedule {
        max = f64::max(2.0 - (2.0 - max) * step / 150.0, 1.0);
        min = f64::min(-2.0 + (2.0 + min) * step / 150.0, -1.0);
    }
    let once = |tag: &str| {
        response.matches(&format!("<{tag}>")).count() == 1
            && response.matches(&format!("</{tag}>")).count() == 1
    };
    let fits = match (gold.contains("<response>"), gold.contains("<tool_call>")) {
        (true, false) => {
            in_order(response, &["<think>", "</think>\n<response>", "</response>"]) && once("response")
        }
        (false, true) => {
            in_order(response, &["<think>", "</think>\n<tool_call>\n", "\n</tool_call>"]) && once("tool_call")
        }
        (true, true) => {
            let parts = ["<think>", "</think>\n<tool_call>\n", "\n</tool_call>\n<response>", "</response>"];
            in_order(response, &parts) && once("tool_call") && once("response")
        }
        (false, false) => in_order(response, &["<think>", "</think>"]),
    };
    if fits { max } else { min }
}

/// Whether the text is the parts in order with anything between them, the first at the start, the last at the end.
fn in_order(text: &str, parts: &[&str]) -> bool {
    let Some((last, firsts)) = parts.split_last() else {
        return true;
    };
    let mut rest = text;
    for (i, part) in firsts.iter().enumerate() {
        match rest.find(part) {
            Some(at) if i > 0 || at == 0 => rest = &rest[at + part.len()..],
            _ => return false,
        }
    }
    rest.ends_with(last)
}

fn length_reward(response: &str, options: &ToolRlOptions) -> f64 {
    if !response.contains("<think>") || !response.contains("</think>") {
        return 0.0;
    }
    let full =
        if options.schedule_length { (640.0 - 384.0) * options.step as f64 / 105.0 + 384.0 } else { 512.0 };
    let thought = response.rsplit_once("<think>").map_or("", |(_, rest)| rest);
    let thought = thought.split_once("</think>").map_or(thought, |(inner, _)| inner);
    let words = thought.split(py::is_space).filter(|word| !word.is_empty()).count();
    f64::min(round2(words as f64 / full), 1.0)
}

/// Python's `round(x, 2)`: the nearest two-decimal number of the exact binary value.
fn round2(x: f64) -> f64 {
    format!("{x:.2}").parse().unwrap_or(x)
}

fn correctness_reward(response: &str, gold: &str, options: &ToolRlOptions) -> Result<f64, ToolError> {
    let (mut max, mut min) = if options.correct_max1 { (1.0, -1.0) } else { (3.0, -3.0) };
    let step = options.step as f64;
    if options.max1_step30_max3 && options.step < 30 {
        max /= 3.0;
        min /= 3.0;
    }
    if options.schedule {
        max = f64::min((max - 2.0) * step / 150.0 + 2.0, 3.0);
        min = f64::max((min + 2.0) * step / 150.0 - 2.0, -3.0);
    }
    let Some(block) = first_block(gold) else {
        return Ok(0.0);
    };
    let gold_calls = lines(block).ok_or_else(|| ToolError::Gold {
        field: "gold".into(),
        expected: "one JSON call a line between <tool_call> and </tool_call>".into(),
        found: excerpt(block),
    })?;
    let calls = first_block(response).filter(|_| response.contains("</tool_call>")).and_then(lines);
    Ok(calls.and_then(|calls| call_reward(&gold_calls, &calls, max, min, options)).unwrap_or(min))
}

/// Text between the first `<tool_call>` and the next `<tool_call>` or `</tool_call>`.
fn first_block(text: &str) -> Option<&str> {
    let block = text.split("<tool_call>").nth(1)?;
    block.split("</tool_call>").next().map(strip)
}

fn lines(block: &str) -> Option<Vec<Py>> {
    block.split('\n').map(py::loads).collect()
}

/// None stands for any exception of the original, which earns the lowest reward.
fn call_reward(gold: &[Py], calls: &[Py], max: f64, min: f64, options: &ToolRlOptions) -> Option<f64> {
    if gold == calls {
        return Some(max);
    }
    if options.coarse {
        return Some(min);
    }
    let field = |call: &'_ Py, key: &str| call.as_dict()?.get(key).cloned();
    let gold_names: Vec<Py> = gold.iter().map(|call| field(call, "name")).collect::<Option<_>>()?;
    let names: Vec<Py> = calls.iter().map(|call| field(call, "name")).collect::<Option<_>>()?;
    let mut score = overlap(&gold_names, &names, options.refined)?;
    let mut possible = 1.0;
    let mut used = vec![false; calls.len()];
    for (gold_call, gold_name) in gold.iter().zip(&gold_names) {
        let gold_call_dict = gold_call.as_dict()?;
        let parameters = gold_call_dict.get("parameters")?;
        let parameters_dict = parameters.as_dict();
        possible += if options.intermediate { 1.0 } else { 1.0 + parameters_dict?.len() as f64 };
        let (mut best, mut best_score) = (None, 0.0);
        for (i, call) in calls.iter().enumerate() {
            if used[i] || names[i] != *gold_name {
                continue;
            }
            if options.intermediate {
                if gold_call == call {
                    (best, best_score) = (Some(i), 1.0);
                    break;
                }
                continue;
            }
            let given = call.as_dict()?.get("parameters")?.as_dict()?;
            let wanted = parameters_dict?;
            let keys =
                |dict: &py::Dict| dict.iter().map(|(key, _)| Py::Str(key.to_owned())).collect::<Vec<_>>();
            let same_keys = overlap(&keys(wanted), &keys(given), options.refined)?;
            let right = wanted.iter().filter(|(key, value)| given.get(key) == Some(value)).count() as f64;
            if same_keys + right > best_score {
                (best, best_score) = (Some(i), same_keys + right);
            }
        }
        if let Some(i) = best {
            used[i] = true;
            score += best_score;
        }
    }
    Some((max - min) * score / possible + min)
}

/// Multiset overlap over union; 1 for equal lists, 0 if one is empty; None for names that cannot be counted.
fn overlap(a: &[Py], b: &[Py], refined: bool) -> Option<f64> {
    if a == b {
        return Some(1.0);
    }
    if refined || a.is_empty() || b.is_empty() {
        return Some(0.0);
    }
    if a.iter().chain(b).any(Py::unhashable) {
        return None;
    }
    let mut left: std::collections::HashMap<String, i64> = std::collections::HashMap::new();
    for item in a {
        *left.entry(hash_key(item)).or_default() += 1;
    }
    let mut shared = 0;
    for item in b {
        if let Some(count) = left.get_mut(&hash_key(item)).filter(|count| **count > 0) {
            *count -= 1;
            shared += 1;
        }
    }
    let union = a.len() + b.len() - shared;
    Some(if union > 0 { shared as f64 / union as f64 } else { 0.0 })
}

/// A text that is equal for equal hashable values (1, 1.0 and True are one key).
fn hash_key(value: &Py) -> String {
    match value {
        Py::Str(text) => format!("s{text}"),
        Py::None => "none".into(),
        other => match other.as_number() {
            Some(number) => format!("n{number:?}"),
            None => format!("{other:?}"),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOLD: &str =
        "<think> t </think>\n<tool_call>\n{\"name\": \"f\", \"parameters\": {\"a\": 1}}\n</tool_call>";

    fn score(response: &str, options: &ToolRlOptions) -> f64 {
        toolrl(response, GOLD, options).unwrap().total
    }

    #[test]
    fn the_gold_itself_earns_four_and_nothing_earns_minus_three() {
        let options = ToolRlOptions::default();
        assert_eq!(score(GOLD, &options), 4.0);
        assert_eq!(score("", &options), -3.0);
        assert_eq!(score(&GOLD.replace(": 1", ": 1.0"), &options), 4.0);
    }

    #[test]
    fn length_follows_the_schedule_of_its_full_mark() {
        let options =
            ToolRlOptions { with_length: true, schedule_length: true, step: 105, ..Default::default() };
        let thought = "w ".repeat(320);
        let response = GOLD.replace(" t ", &thought);
        assert_eq!(toolrl(&response, GOLD, &options).unwrap().length, 0.5);
    }

    #[test]
    fn a_broken_gold_is_an_error() {
        let error = toolrl(GOLD, "<tool_call>\n{oops\n</tool_call>", &ToolRlOptions::default()).unwrap_err();
        assert!(error.to_string().contains("hint:"), "{error}");
    }
}
