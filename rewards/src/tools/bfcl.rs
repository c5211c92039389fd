//! The Berkeley function-calling leaderboard's AST checker (bfcl_eval/eval_checker/ast_eval/ast_checker.py).
//!
//! Decodes a response (Hermes blocks or Python calls), then compares each call with the allowed values of the gold:
//! names, required and optional parameters, exact Python types, values. By default two holes of the leaderboard are
//! closed: parallel calls may come in any order (there, a greedy search misses some right orders), and a block with
//! broken JSON makes the response wrong (there, it is dropped in silence). [`BfclOptions::leaderboard`] is the original.

use super::py::{self, Dict, Py, PyType};
use super::pyexpr::{self, Call as PyCall, Expr};
use super::{ToolError, check_length, excerpt};
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// What the response should hold.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BfclCategory {
    /// One call, one function on offer.
    #[default]
    Simple,
    /// One call, several functions on offer.
    Multiple,
    /// Several calls.
    Parallel,
    /// No call.
    Irrelevance,
    /// Any call.
    Relevance,
}

impl BfclCategory {
    /// The category of a leaderboard name such as `live_parallel_multiple`.
    pub fn of(name: &str) -> BfclCategory {
        match name {
            name if name.contains("irrelevance") => BfclCategory::Irrelevance,
            name if name.contains("relevance") => BfclCategory::Relevance,
            name if name.contains("parallel") => BfclCategory::Parallel,
            name if name.contains("multiple") => BfclCategory::Multiple,
            _ => BfclCategory::Simple,
        }
    }
}

/// How the response is written.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BfclDecode {
    /// `<tool_call>\n{"name": .., "arguments": {..}}\n</tool_call>`, newlines included.
    #[default]
    Hermes,
    /// `[f(a=1), g()]`, brackets optional.
    Python,
}

/// How to judge.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct BfclOptions {
    /// What the response should hold.
    pub category: BfclCategory,
    /// How the response is written.
    pub decode: BfclDecode,
    /// Function names have `_` in place of `.`, for models whose interface forbids dots.
    pub underscore_to_dot: bool,
    /// Match parallel calls one by one, first fit, as the leaderboard does; else any right order passes.
    pub greedy: bool,
    /// Drop a block with broken JSON and judge the rest, as the leaderboard does; else the response is wrong.
    pub ignore_broken_blocks: bool,
}

impl Default for BfclOptions {
    fn default() -> Self {
        BfclOptions {
            category: BfclCategory::Simple,
            decode: BfclDecode::Hermes,
            underscore_to_dot: false,
            greedy: false,
            ignore_broken_blocks: false,
        }
    }
}

impl BfclOptions {
    /// The leaderboard's own judgement, holes included.
    pub fn leaderboard(category: BfclCategory, decode: BfclDecode) -> Self {
        BfclOptions { category, decode, greedy: true, ignore_broken_blocks: true, ..Default::default() }
    }
}

/// Whether a response passes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct BfclVerdict {
    /// It passes.
    pub valid: bool,
    /// The leaderboard's name for the failure; None when valid.
    pub error_type: Option<String>,
    /// The failure in words; empty when valid.
    pub message: String,
}

/// A decoded call: name and arguments in order.
struct Given {
    name: String,
    arguments: Dict,
}

struct Failure {
    kind: &'static str,
    message: String,
}

type Check = Result<(), Failure>;

fn fail<T>(kind: &'static str, message: impl Into<String>) -> Result<T, Failure> {
    Err(Failure { kind, message: message.into() })
}

/// Judges `text` against `functions` (the schemas on offer, a list) and `possible_answer` (a list of
/// `{function: {parameter: [allowed values]}}`, `""` among them = may be left out; null for (ir)relevance).
///
/// # Errors
/// [`ToolError::TooLong`]; [`ToolError::Gold`] where schemas or answers do not have that shape.
pub fn bfcl(
    text: &str,
    functions: &Value,
    possible_answer: &Value,
    options: &BfclOptions,
) -> Result<BfclVerdict, ToolError> {
    check_length(text)?;
    let decoded = match options.decode {
        BfclDecode::Hermes => decode_hermes(text, options.ignore_broken_blocks),
        BfclDecode::Python => decode_python(text),
    };
    let result = match options.category {
        BfclCategory::Irrelevance => match &decoded {
            Ok(calls) if !calls.is_empty() => {
                fail("irrelevance_error:decoder_success", "a call where none is called for")
            }
            _ => Ok(()),
        },
        BfclCategory::Relevance => match &decoded {
            Ok(calls) if !calls.is_empty() => Ok(()),
            _ => fail("relevance_error:decoder_failed", "no call where one is called for"),
        },
        _ => {
            let gold = Gold::read(functions, possible_answer, options.underscore_to_dot)?;
            decoded.and_then(|calls| gold.check(&calls, options))
        }
    };
    Ok(match result {
        Ok(()) => BfclVerdict { valid: true, error_type: None, message: String::new() },
        Err(failure) => {
            BfclVerdict { valid: false, error_type: Some(failure.kind.to_owned()), message: failure.message }
        }
    })
}

const DECODER_FAILED: &str = "ast_decoder:decoder_failed";

fn decode_hermes(text: &str, ignore_broken: bool) -> Result<Vec<Given>, Failure> {
    let mut calls = Vec::new();
    let mut broken = None;
    for (block, closed) in super::json_calls::blocks(text, "<tool_call>\n", "\n</tool_call>") {
        if !closed {
            continue;
        }
        match py::loads(block) {
            Some(value) => calls.push(value),
            None => broken = Some(block),
        }
    }
    if let Some(block) = broken.filter(|_| !ignore_broken) {
        return fail(DECODER_FAILED, format!("a tool_call block is not JSON: {}", excerpt(block)));
    }
    let read = |value: &Py| {
        let call = value.as_dict()?;
        let name = call.get("name")?;
        let arguments = call.get("arguments")?.as_dict()?.clone();
        (!name.unhashable()).then(|| Given { name: name.as_str().unwrap_or_default().to_owned(), arguments })
    };
    match calls.iter().map(read).collect() {
        Some(calls) => Ok(calls),
        None => fail(DECODER_FAILED, "a tool_call block is not an object with name and arguments"),
    }
}

fn decode_python(text: &str) -> Result<Vec<Given>, Failure> {
    let mut source = text.trim_matches(['`', '\n', ' ']).to_owned();
    if !source.starts_with('[') {
        source.insert(0, '[');
    }
    if !source.ends_with(']') {
        source.push(']');
    }
    let source = py::strip(&source).trim_matches('\'');
    let read = |call: &PyCall| {
        let arguments = python_arguments(call, source)?;
        Some(Given { name: call.name.clone(), arguments })
    };
    let calls = pyexpr::parse_calls(source).and_then(|calls| calls.iter().map(read).collect());
    match calls {
        Some(calls) => Ok(calls),
        None => fail(DECODER_FAILED, "not a list of Python calls"),
    }
}

fn python_arguments(call: &PyCall, source: &str) -> Option<Dict> {
    let mut arguments = Dict::default();
    for (key, value) in &call.keywords {
        arguments.insert(key.clone(), python_value(value, source)?);
    }
    Some(arguments)
}

/// Names, subscripts and calls without keywords stand for themselves as text; a call with keywords is a dict.
fn python_value(expr: &Expr, source: &str) -> Option<Py> {
    let all =
        |items: &[Expr]| items.iter().map(|item| python_value(item, source)).collect::<Option<Vec<Py>>>();
    Some(match expr {
        Expr::Const(value) => value.clone(),
        Expr::Name(name) if name.contains('.') => return None,
        Expr::Name(name) => Py::Str(name.clone()),
        Expr::Source(range) => Py::Str(source[range.clone()].to_owned()),
        Expr::List(items) => Py::List(all(items)?),
        Expr::Tuple(items) => Py::Tuple(all(items)?),
        Expr::Dict(entries) => {
            let mut dict = Dict::default();
            for (key, value) in entries {
                dict.insert(pyexpr::key_text(&python_value(key, source)?)?, python_value(value, source)?);
            }
            Py::Dict(dict)
        }
        Expr::Call(call) if call.keywords.is_empty() => Py::Str(source[call.source.clone()].to_owned()),
        Expr::Call(call) => {
            let mut dict = Dict::default();
            dict.insert(call.name.clone(), Py::Dict(python_arguments(call, source)?));
            Py::Dict(dict)
        }
        Expr::Other => return None,
    })
}

/// The gold side: one entry a call.
struct Gold {
    calls: Vec<GoldCall>,
}

struct GoldCall {
    /// Name as a response has to write it.
    name: String,
    required: Vec<String>,
    parameters: Dict,
    answers: Dict,
}

impl Gold {
    fn read(functions: &Value, possible_answer: &Value, underscore_to_dot: bool) -> Result<Gold, ToolError> {
        let wrong = |field: &str, expected: &str, found: &Value| ToolError::Gold {
            field: field.to_owned(),
            expected: expected.to_owned(),
            found: excerpt(&found.to_string()),
        };
        let functions_list =
            functions.as_array().map_or_else(|| std::slice::from_ref(functions), Vec::as_slice);
        let answers =
            possible_answer.as_array().ok_or_else(|| wrong("possible_answer", "a list", possible_answer))?;
        let mut calls = Vec::new();
        for answer in answers {
            let (name, parameters) = answer
                .as_object()
                .and_then(|map| map.iter().next())
                .ok_or_else(|| wrong("possible_answer", "{function: {parameter: [values]}}", answer))?;
            let schema = functions_list
                .iter()
                .find(|function| function["name"] == name.as_str())
                .or_else(|| functions_list.first().filter(|_| functions_list.len() == 1))
                .ok_or_else(|| wrong("functions", &format!("a schema of {name}"), functions))?;
            let written = schema["name"].as_str().unwrap_or(name);
            let properties = &schema["parameters"]["properties"];
            let (Py::Dict(parameters), Py::Dict(answers)) = (Py::from(properties), Py::from(parameters))
            else {
                return Err(wrong("functions", "parameters.properties and answers as objects", schema));
            };
            let required = schema["parameters"]["required"].as_array().map(Vec::as_slice).unwrap_or_default();
            calls.push(GoldCall {
                name: if underscore_to_dot { written.replace('.', "_") } else { written.to_owned() },
                required: required.iter().filter_map(|name| name.as_str().map(str::to_owned)).collect(),
                parameters,
                answers,
            });
        }
        Ok(Gold { calls })
    }

    fn check(&self, calls: &[Given], options: &BfclOptions) -> Check {
        let (count_kind, parallel) = match options.category {
            BfclCategory::Parallel => ("parallel_function_checker_no_order:wrong_count", true),
            BfclCategory::Multiple => ("multiple_function_checker:wrong_count", false),
            _ => ("simple_function_checker:wrong_count", false),
        };
        let wanted = if options.category == BfclCategory::Simple { 1 } else { self.calls.len() };
        if calls.len() != wanted || self.calls.len() < wanted {
            return fail(count_kind, format!("{} calls where {wanted} are called for", calls.len()));
        }
        if !parallel {
            return match (self.calls.first(), calls.first()) {
                (Some(gold), Some(given)) => gold.check(given),
                _ => Ok(()),
            };
        }
        let fits: Vec<Vec<bool>> = self
            .calls
            .iter()
            .map(|gold| calls.iter().map(|given| gold.check(given).is_ok()).collect())
            .collect();
        let unmatched = if options.greedy { first_fit(&fits) } else { best_fit(&fits) };
        match unmatched {
            None => Ok(()),
            Some(at) => fail(
                "parallel_function_checker_no_order:cannot_find_match",
                format!("no call of the response fits call {} of the gold ({})", at + 1, self.calls[at].name),
            ),
        }
    }
}

/// The first gold call without a partner when each takes the first free response call that fits.
fn first_fit(fits: &[Vec<bool>]) -> Option<usize> {
    let mut used = vec![false; fits.len()];
    fits.iter().position(|row| match (0..row.len()).find(|&i| row[i] && !used[i]) {
        Some(i) => {
            used[i] = true;
            false
        }
        None => true,
    })
}

/// The first gold call that no assignment can serve (augmenting paths); None if all can be served at once.
fn best_fit(fits: &[Vec<bool>]) -> Option<usize> {
    fn augment(gold: usize, fits: &[Vec<bool>], seen: &mut [bool], owner: &mut [Option<usize>]) -> bool {
        for i in 0..owner.len() {
            if fits[gold][i] && !seen[i] {
                seen[i] = true;
                if owner[i].is_none_or(|other| augment(other, fits, seen, owner)) {
                    owner[i] = Some(gold);
                    return true;
                }
            }
        }
        false
    }
    let mut owner = vec![None; fits.len()];
    (0..fits.len()).find(|&gold| !augment(gold, fits, &mut vec![false; fits.len()], &mut owner))
}

impl GoldCall {
    fn check(&self, given: &Given) -> Check {
        if given.name != self.name {
            return fail(
                "simple_function_checker:wrong_func_name",
                format!("function {:?} where {:?} is called for", given.name, self.name),
            );
        }
        if let Some(name) = self.required.iter().find(|name| !given.arguments.contains(name)) {
            return fail(
                "simple_function_checker:missing_required",
                format!("required parameter {name:?} is missing"),
            );
        }
        for (name, value) in given.arguments.iter() {
            let (Some(schema), Some(allowed)) = (self.parameters.get(name), self.answers.get(name)) else {
                return fail(
                    "simple_function_checker:unexpected_param",
                    format!("parameter {name:?} is not called for"),
                );
            };
            check_value(name, value, schema, allowed.as_list().unwrap_or_default())?;
        }
        for (name, allowed) in self.answers.iter() {
            if !given.arguments.contains(name) && !allows_absence(allowed) {
                return fail(
                    "simple_function_checker:missing_optional",
                    format!("parameter {name:?} is missing"),
                );
            }
        }
        Ok(())
    }
}

fn is_empty_text(value: &Py) -> bool {
    value.as_str() == Some("")
}

fn allows_absence(allowed: &Py) -> bool {
    allowed.as_list().is_some_and(|values| values.iter().any(is_empty_text))
}

/// The Python type of a schema's type name; JSON Schema's names are known too.
fn python_type(name: &str) -> Option<PyType> {
    Some(match name {
        "string" | "any" => PyType::Str,
        "integer" => PyType::Int,
        "float" | "number" => PyType::Float,
        "boolean" => PyType::Bool,
        "array" | "tuple" => PyType::List,
        "dict" | "object" => PyType::Dict,
        _ => return None,
    })
}

fn check_value(name: &str, value: &Py, schema: &Py, allowed: &[Py]) -> Check {
    let schema = schema.as_dict();
    let type_name = schema.and_then(|schema| schema.get("type")).and_then(Py::as_str).unwrap_or("any");
    let Some(expected) = python_type(type_name) else {
        return fail(
            "type_error:simple",
            format!("the schema of {name:?} has the unknown type {type_name:?}"),
        );
    };
    let nested = (expected == PyType::List)
        .then(|| schema?.get("items")?.as_dict()?.get("type")?.as_str().and_then(python_type))
        .flatten();
    let converted = match value {
        Py::Tuple(items) if type_name == "tuple" => Py::List(items.clone()),
        Py::Int(_) if expected == PyType::Float => Py::Float(value.as_number().unwrap_or(f64::INFINITY)),
        other => other.clone(),
    };
    let value = &converted;
    let is_variable = check_type(name, value, allowed, expected, nested)?;
    if !is_variable {
        match (expected, nested) {
            (PyType::Dict, _) => return check_dict(name, value, allowed),
            (PyType::List, Some(PyType::Dict)) => return check_dicts(name, value, allowed),
            (PyType::Str, _) => return check_text(name, value, allowed),
            (PyType::List, _) => return check_list(name, value, allowed),
            _ => {}
        }
    }
    if allowed.contains(value) {
        return Ok(());
    }
    fail("value_error:others", format!("parameter {name:?} has a value that is not allowed"))
}

/// The type of the value, or of the first allowed value (then it is a "variable"); elements one level deep.
fn check_type(
    name: &str,
    value: &Py,
    allowed: &[Py],
    expected: PyType,
    nested: Option<PyType>,
) -> Result<bool, Failure> {
    let answer_type = allowed.iter().find(|answer| !is_empty_text(answer)).map(Py::kind);
    if value.kind() == expected {
        let is_variable = answer_type.is_some_and(|kind| kind != expected);
        let Some(nested) = nested else {
            return Ok(is_variable);
        };
        let items = value.as_list().unwrap_or_default();
        let fits = allowed.iter().any(|answer| match answer.as_list() {
            Some(answers) => items.iter().all(|item| check_type(name, item, answers, nested, None).is_ok()),
            None => true,
        });
        if fits {
            return Ok(is_variable);
        }
        return fail(
            if answer_type == Some(value.kind()) { "type_error:nested" } else { "type_error:simple" },
            format!("parameter {name:?} has elements of the wrong type"),
        );
    }
    if answer_type == Some(value.kind()) {
        return Ok(true);
    }
    fail("type_error:simple", format!("parameter {name:?} is {:?}, expected {expected:?}", value.kind()))
}

/// Spaces and `,./-_*^` removed, lower case, `'` as `"`.
fn standardize(text: &str) -> String {
    let kept: String = text.chars().filter(|c| !" ,./-_*^".contains(*c)).collect();
    kept.to_lowercase().replace('\'', "\"")
}

fn standardized(value: &Py) -> Py {
    match value {
        Py::Str(text) => Py::Str(standardize(text)),
        other => other.clone(),
    }
}

fn check_text(name: &str, value: &Py, allowed: &[Py]) -> Check {
    let wanted = standardize(value.as_str().unwrap_or_default());
    if allowed.iter().filter_map(Py::as_str).any(|answer| standardize(answer) == wanted) {
        return Ok(());
    }
    fail("value_error:string", format!("parameter {name:?} has a text that is not allowed"))
}

/// The elements that Python's iteration over an allowed value yields.
fn elements(value: &Py) -> Vec<Py> {
    match value {
        Py::List(items) | Py::Tuple(items) => items.iter().map(standardized).collect(),
        Py::Str(text) => text.chars().map(|c| Py::Str(standardize(&c.to_string()))).collect(),
        _ => Vec::new(),
    }
}

fn check_list(name: &str, value: &Py, allowed: &[Py]) -> Check {
    let given = elements(value);
    if allowed.iter().any(|answer| elements(answer) == given) {
        return Ok(());
    }
    fail("value_error:list/tuple", format!("parameter {name:?} has a list that is not allowed"))
}

fn check_dict(name: &str, value: &Py, allowed: &[Py]) -> Check {
    let mut failure =
        Failure { kind: "dict_checker:unclear", message: format!("no dict is allowed for {name:?}") };
    let empty = Dict::default();
    let given = value.as_dict().unwrap_or(&empty);
    for answer in allowed.iter().filter(|answer| !is_empty_text(answer)) {
        match check_entries(given, answer) {
            Ok(()) => return Ok(()),
            Err(later) => failure = later,
        }
    }
    Err(failure)
}

fn check_entries(given: &Dict, answer: &Py) -> Check {
    let Some(answer) = answer.as_dict() else {
        return fail("value_error:dict_key", "the answer is no dict");
    };
    let mut result = Ok(());
    for (key, value) in given.iter() {
        let Some(values) = answer.get(key) else {
            result = fail("value_error:dict_key", format!("key {key:?} is not called for"));
            break;
        };
        if !elements(values).contains(&standardized(value)) {
            result = fail("value_error:dict_value", format!("key {key:?} has a value that is not allowed"));
            break;
        }
    }
    for (key, values) in answer.iter() {
        let may_be_absent = allows_absence(values) || values.as_str().is_some();
        if !given.contains(key) && !may_be_absent {
            return fail("value_error:dict_key", format!("key {key:?} is missing"));
        }
    }
    result
}

fn check_dicts(name: &str, value: &Py, allowed: &[Py]) -> Check {
    let given = value.as_list().unwrap_or_default();
    let mut failure = Failure {
        kind: "list_dict_checker:unclear",
        message: format!("no list of dicts is allowed for {name:?}"),
    };
    for answer in allowed {
        let answers = answer.as_list().unwrap_or_default();
        if given.len() != answers.len() {
            failure = Failure {
                kind: "value_error:list_dict_count",
                message: format!("parameter {name:?} holds {} dicts, not {}", given.len(), answers.len()),
            };
            continue;
        }
        let each = given
            .iter()
            .zip(answers)
            .map(|(dict, answer)| check_dict(name, dict, std::slice::from_ref(answer)));
        match each.into_iter().collect::<Result<Vec<()>, Failure>>() {
            Ok(_) => return Ok(()),
            Err(later) => failure = later,
        }
    }
    Err(failure)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn verdict(text: &str, options: &BfclOptions) -> BfclVerdict {
        let functions = json!([{ "name": "f", "parameters": { "type": "dict", "required": ["a"], "properties": {
            "a": { "type": "integer" }, "b": { "type": "string" } } } }]);
        let answers =
            json!([{ "f": { "a": [1, 2], "b": ["x", ""] } }, { "f": { "a": [1], "b": ["x", ""] } }]);
        bfcl(text, &functions, &answers, options).unwrap()
    }

    const TWO_THEN_ONE: &str = "[f(a=1), f(a=2)]";

    #[test]
    fn a_right_set_in_another_order_passes_by_default_only() {
        let category = BfclCategory::Parallel;
        let ours = BfclOptions { category, decode: BfclDecode::Python, ..Default::default() };
        assert!(verdict(TWO_THEN_ONE, &ours).valid);
        assert!(!verdict(TWO_THEN_ONE, &BfclOptions::leaderboard(category, BfclDecode::Python)).valid);
        assert!(!verdict("[f(a=2), f(a=2)]", &ours).valid);
    }

    #[test]
    fn a_broken_block_is_not_ignored_by_default() {
        let functions = json!([{ "name": "f", "parameters": { "required": [], "properties": {} } }]);
        let text = "<tool_call>\n{\"name\": \"f\", \"arguments\": {}}\n</tool_call>\n<tool_call>\n{oops\n</tool_call>";
        let judge = |options| bfcl(text, &functions, &json!([{ "f": {} }]), &options).unwrap().valid;
        assert!(!judge(BfclOptions::default()));
        assert!(judge(BfclOptions::leaderboard(BfclCategory::Simple, BfclDecode::Hermes)));
    }
}
