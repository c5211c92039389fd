//! `rft.code`: runs Lua that a model wrote, in a VM of its own with nothing but the pure libraries.
//!
//! What the code does there is the model's fault, not the script's: its errors, endless loops and memory bombs are
//! results (`ok = false`), while the script's own budget goes on.

use std::rc::Rc;
use std::time::{Duration, Instant};

use mlua::{Error as LuaError, Function, Lua, LuaString, MultiValue, Table, Value};
use serde::Deserialize;
use serde_json::Value as Json;

use super::bind::charge;
use super::convert::{from_json, to_json};
use crate::budget::Budget;
use crate::sandbox;
use crate::types::Limits;

/// Longest code, in bytes.
const MAX_CODE: usize = 1 << 16;
/// Most cases of one run.
const MAX_CASES: usize = 1000;

#[derive(Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Options {
    steps: u64,
    time_ms: u64,
    memory_bytes: usize,
}

impl Default for Options {
    fn default() -> Self {
        Options { steps: 100_000, time_ms: 50, memory_bytes: 8 << 20 }
    }
}

pub(super) fn library(lua: &Lua, budget: &Rc<Budget>) -> Result<Table, LuaError> {
    let table = lua.create_table()?;
    let budget = Rc::clone(budget);
    let run = move |lua: &Lua, (code, name, cases, options): (LuaString, String, Value, Value)| {
        let fail = |message: String| LuaError::runtime(format!("rft.code.run: {message}"));
        let Json::Array(cases) = to_json(lua, &cases).map_err(fail)? else {
            return Err(fail("argument 3 (cases) must be a list of argument lists".into()));
        };
        if cases.len() > MAX_CASES {
            return Err(fail(format!("more than {MAX_CASES} cases")));
        }
        let options: Options = match to_json(lua, &options).map_err(fail)? {
            Json::Null => Options::default(),
            options => serde_json::from_value(options).map_err(|error| fail(error.to_string()))?,
        };
        charge(&budget, code.as_bytes().len())?;
        let list = lua.create_table()?;
        let code = code.to_string_lossy();
        let whole = Instant::now() + budget.left().0;
        for (i, case) in cases.iter().enumerate() {
            let args = match case {
                Json::Array(args) => args.clone(),
                Json::Object(empty) if empty.is_empty() => Vec::new(),
                _ => return Err(fail(format!("case {} must be a list of arguments", i + 1))),
            };
            let left = whole.saturating_duration_since(Instant::now());
            let (result, steps) = one(&code, &name, &args, &options, left);
            // The code's work is paid for by the script, so that many cases cannot run for ever.
            charge(&budget, steps as usize / 8 * 256)?;
            let entry = lua.create_table()?;
            entry.raw_set("ok", result.is_ok())?;
            match result {
                Ok(value) => entry.raw_set("value", from_json(lua, &value)?)?,
                Err(message) => entry.raw_set("error", message)?,
            }
            list.raw_set(i + 1, entry)?;
        }
        Ok(list)
    };
    table.raw_set("run", lua.create_function(run)?)?;
    Ok(table)
}

/// Calls the function `name` of `code` in a fresh VM: its first result, or why there is none; and the steps taken.
fn one(
    code: &str,
    name: &str,
    args: &[Json],
    options: &Options,
    left: Duration,
) -> (Result<Json, String>, u64) {
    if code.len() > MAX_CODE {
        return (Err(format!("the code is longer than {MAX_CODE} bytes")), 0);
    }
    let time_ms = options.time_ms.min(u64::try_from(left.as_millis()).unwrap_or(u64::MAX));
    let limits = Limits { time_ms, memory_bytes: options.memory_bytes, instructions: Some(options.steps) };
    let (lua, budget) = match sandbox::bare(&limits, false) {
        Ok(vm) => vm,
        Err(error) => return (Err(error.to_string()), 0),
    };
    budget.start(&limits, 0);
    let result = (|| {
        lua.load(code).set_name("=code").exec()?;
        let function: Option<Function> = lua.globals().get(name)?;
        let Some(function) = function else {
            return Err(LuaError::runtime(format!("the code defines no function {name:?}")));
        };
        let args: Result<MultiValue, LuaError> = args.iter().map(|arg| from_json(&lua, arg)).collect();
        let mut results: MultiValue = function.call(args?)?;
        to_json(&lua, &results.pop_front().unwrap_or(Value::Nil)).map_err(LuaError::runtime)
    })();
    let result = match (result, budget.tripped()) {
        (_, Some(kind)) => Err(kind.as_str().to_string()),
        (Ok(value), None) => Ok(value),
        (Err(error), None) => {
            let words = error.to_string();
            Err(words.lines().next().unwrap_or_default().chars().take(200).collect())
        }
    };
    (result, budget.steps())
}
