//! The `rft` library of the scripts: pure functions of their arguments.
//!
//! `rft.json.decode/encode`, `rft.regex.match/find_all`, `rft.math.equal/extract/number`, `rft.boxes.iou`,
//! `rft.tools.parse`, `rft.edit_distance`. Failures raise Lua errors with the argument's name; nothing returns a
//! default in place of an answer.

pub(crate) mod text;

use std::rc::Rc;

use mlua::{Error as LuaError, Lua, LuaSerdeExt, Table, Value};

use crate::budget::Budget;
use crate::{boxes, math, tools};

/// Bytes of a pattern's compiled form.
const REGEX_SIZE: usize = 1 << 20;

/// Builds the library, read-only.
pub(crate) fn library(lua: &Lua, budget: &Rc<Budget>) -> Result<Table, LuaError> {
    let rft = lua.create_table()?;
    rft.set("json", json(lua)?)?;
    rft.set("regex", regex(lua, budget)?)?;
    rft.set("math", math(lua)?)?;
    rft.set("boxes", boxes(lua)?)?;
    rft.set("tools", tools(lua)?)?;
    rft.set(
        "edit_distance",
        lua.create_function(|_, (a, b): (String, String)| {
            text::edit_distance(&a, &b)
                .ok_or_else(|| LuaError::runtime("rft.edit_distance: the texts are too long"))
        })?,
    )?;
    rft.set_readonly(true);
    Ok(rft)
}

fn group(lua: &Lua, functions: Vec<(&str, mlua::Function)>) -> Result<Table, LuaError> {
    let table = lua.create_table()?;
    for (name, function) in functions {
        table.set(name, function)?;
    }
    table.set_readonly(true);
    Ok(table)
}

fn json(lua: &Lua) -> Result<Table, LuaError> {
    let decode =
        lua.create_function(|lua, text: String| match serde_json::from_str::<serde_json::Value>(&text) {
            Ok(value) => Ok((lua.to_value(&value)?, Value::Nil)),
            Err(error) => Ok((Value::Nil, Value::String(lua.create_string(error.to_string())?))),
        })?;
    let encode = lua.create_function(|lua, value: Value| {
        let value: serde_json::Value = lua.from_value(value)?;
        Ok(value.to_string())
    })?;
    group(lua, vec![("decode", decode), ("encode", encode)])
}

fn compile(pattern: &str) -> Result<regex::Regex, LuaError> {
    regex::RegexBuilder::new(pattern)
        .size_limit(REGEX_SIZE)
        .build()
        .map_err(|e| LuaError::runtime(format!("rft.regex: {e}")))
}

fn captures(lua: &Lua, found: &regex::Captures) -> Result<Table, LuaError> {
    let table = lua.create_table()?;
    for (i, part) in found.iter().enumerate() {
        table.raw_set(i, part.map(|m| m.as_str()))?;
    }
    Ok(table)
}

fn regex(lua: &Lua, budget: &Rc<Budget>) -> Result<Table, LuaError> {
    let find = lua.create_function(|lua, (text, pattern): (String, String)| {
        compile(&pattern)?.captures(&text).map(|found| captures(lua, &found)).transpose()
    })?;
    let budget = Rc::clone(budget);
    let find_all = lua.create_function(move |lua, (text, pattern): (String, String)| {
        let table = lua.create_table()?;
        for found in compile(&pattern)?.captures_iter(&text) {
            if budget.charge(1).is_some() {
                return Err(LuaError::runtime("limit reached"));
            }
            table.push(captures(lua, &found)?)?;
        }
        Ok(table)
    })?;
    group(lua, vec![("match", find), ("find_all", find_all)])
}

fn math(lua: &Lua) -> Result<Table, LuaError> {
    let equal = lua.create_function(|_, (gold, answer): (String, String)| {
        Ok(math::equal(&gold, &answer, &math::EqualOptions::default()))
    })?;
    let extract = lua.create_function(|_, text: String| {
        Ok(math::extract(&text, &math::ExtractOptions::default()).map(|found| found.text))
    })?;
    let number = lua.create_function(|_, text: String| Ok(math::parse_number(&text)))?;
    group(lua, vec![("equal", equal), ("extract", extract), ("number", number)])
}

fn boxes(lua: &Lua) -> Result<Table, LuaError> {
    let iou = lua.create_function(|_, (a, b): (Vec<f64>, Vec<f64>)| {
        let corners = |name: &str, v: Vec<f64>| -> Result<[f64; 4], LuaError> {
            v.try_into().map_err(|v: Vec<f64>| {
                LuaError::runtime(format!(
                    "rft.boxes.iou: {name} must be {{x1, y1, x2, y2}}, got {} numbers",
                    v.len()
                ))
            })
        };
        let (a, b) = (corners("the first box", a)?, corners("the second box", b)?);
        // an inverted or empty box overlaps nothing
        Ok(if boxes::is_proper(&a) && boxes::is_proper(&b) { boxes::iou(&a, &b) } else { 0.0 })
    })?;
    group(lua, vec![("iou", iou)])
}

fn tools(lua: &Lua) -> Result<Table, LuaError> {
    let parse = lua.create_function(|lua, text: String| {
        let (_, parsed) =
            tools::parse_any(&text).map_err(|e| LuaError::runtime(format!("rft.tools.parse: {e}")))?;
        let calls = lua.create_table()?;
        for call in &parsed.calls {
            let entry = lua.create_table()?;
            entry.set("name", call.name.as_str())?;
            entry.set("arguments", lua.to_value(&call.arguments)?)?;
            calls.push(entry)?;
        }
        Ok(calls)
    })?;
    group(lua, vec![("parse", parse)])
}
