//! The cases that stand beside the shipped verifiers: rows with the reward they must earn.
//!
//! A case is a line of `lua/NAME.cases.jsonl`: the row, `completion`, optional `options` and `tokens`, and `expect` (null:
//! the verifier abstains). Tests hold them, `bench rewards` measures with them.

use std::sync::Arc;

use serde_json::{Map, Value};

use crate::script::shipped_cases;
use crate::types::Sample;

/// A row, the options it is judged under, and the reward it must earn.
#[derive(Debug, Clone)]
pub struct Case {
    /// What is judged.
    pub sample: Sample,
    /// What the script reads as `ctx.options`.
    pub options: Map<String, Value>,
    /// The reward; None where the verifier must abstain.
    pub expect: Option<f64>,
}

/// The cases of the shipped verifier `name`; none for any other name.
pub fn cases(name: &str) -> Vec<Case> {
    shipped_cases(name).into_iter().filter_map(case).collect()
}

/// A row's case; None where it is none, which the test below rules out.
fn case(mut row: Map<String, Value>) -> Option<Case> {
    let expect = row.remove("expect")?.as_f64();
    let options = row.remove("options").and_then(|options| options.as_object().cloned()).unwrap_or_default();
    let tokens = match row.get("tokens") {
        Some(tokens) => serde_json::from_value(tokens.clone()).ok()?,
        None => Vec::new(),
    };
    let text = |key: &str| row.get(key).and_then(Value::as_str).map(str::to_string);
    let completion = text("completion")?;
    let (id, prompt) = (text("id").unwrap_or_default(), text("prompt").unwrap_or_default());
    let sample = Sample { id, prompt, completion, tokens, fields: Arc::new(row), ..Sample::default() };
    Some(Case { sample, options, expect })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_line_is_a_case_and_every_shipped_verifier_has_some() {
        for (name, _) in crate::SHIPPED {
            let rows = shipped_cases(name);
            assert_eq!(cases(name).len(), rows.len(), "{name}");
            assert!(rows.len() >= 4, "{name}");
        }
    }
}
