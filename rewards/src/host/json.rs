//! `rft.json`: reading, writing and checking documents.

use std::rc::Rc;

use mlua::{Error as LuaError, IntoLua, Lua, LuaString, Table, Value};
use serde_json::{Value as Json, json};

use super::bind::{self, Answer, Args, charge};
use super::convert::{from_json, to_json};
use crate::budget::Budget;

/// Longest text that is read, in bytes.
const MAX_TEXT: usize = 1 << 20;
/// Longest schema, as JSON text.
const MAX_SCHEMA: usize = 1 << 16;
/// Violations that are told.
const MAX_ERRORS: usize = 8;

pub(super) fn library(lua: &Lua, budget: &Rc<Budget>) -> Result<Table, LuaError> {
    let table = bind::table(lua, budget, "json", &[("schema", schema), ("equal", equal)])?;
    let price = Rc::clone(budget);
    let decode = move |lua: &Lua, text: LuaString| -> Result<(Value, Value), LuaError> {
        let bytes = text.as_bytes();
        charge(&price, bytes.len())?;
        let refuse = |lua: &Lua, message: String| Ok((Value::Nil, message.into_lua(lua)?));
        if bytes.len() > MAX_TEXT {
            return refuse(lua, format!("{} bytes exceed the limit of {MAX_TEXT}", bytes.len()));
        }
        match serde_json::from_slice::<Json>(&bytes) {
            Ok(value) => Ok((from_json(lua, &value)?, Value::Nil)),
            Err(error) => refuse(lua, error.to_string()),
        }
    };
    table.raw_set("decode", lua.create_function(decode)?)?;
    let price = Rc::clone(budget);
    let encode = move |lua: &Lua, value: Value| -> Result<String, LuaError> {
        let json =
            to_json(lua, &value).map_err(|error| LuaError::runtime(format!("rft.json.encode: {error}")))?;
        let text = json.to_string();
        charge(&price, text.len())?;
        Ok(text)
    };
    table.raw_set("encode", lua.create_function(encode)?)?;
    Ok(table)
}

/// Equality of two values as documents: order of keys aside, 1 and 1.0 the same.
fn equal(args: &Args) -> Answer {
    Ok(json!(same(args.json(0), args.json(1))))
}

fn same(a: &Json, b: &Json) -> bool {
    match (a, b) {
        (Json::Number(a), Json::Number(b)) => a.as_f64() == b.as_f64(),
        (Json::Array(a), Json::Array(b)) => a.len() == b.len() && a.iter().zip(b).all(|(a, b)| same(a, b)),
        (Json::Object(a), Json::Object(b)) => {
            a.len() == b.len() && a.iter().all(|(key, a)| b.get(key).is_some_and(|b| same(a, b)))
        }
        // An empty Lua table has lost which of the two it was.
        (Json::Array(a), Json::Object(b)) | (Json::Object(b), Json::Array(a)) => a.is_empty() && b.is_empty(),
        _ => a == b,
    }
}

/// Checks a value (or JSON text of one, in a table `{text = ..}`) against a JSON schema.
fn schema(args: &Args) -> Answer {
    let schema = match args.json(1) {
        Json::String(text) => {
            serde_json::from_str(text).map_err(|error| format!("argument 2 (schema): {error}"))?
        }
        other => other.clone(),
    };
    if schema.to_string().len() > MAX_SCHEMA {
        return Err(format!("the schema is longer than {MAX_SCHEMA} bytes"));
    }
    let options = jsonschema::options().with_pattern_options(jsonschema::PatternOptions::regex());
    let validator = options.build(&schema).map_err(|error| format!("argument 2 (schema): {error}"))?;
    let errors: Vec<String> = validator
        .iter_errors(args.json(0))
        .take(MAX_ERRORS)
        .map(|error| {
            let place = error.instance_path().to_string();
            let words: String = error.to_string().chars().take(200).collect();
            if place.is_empty() { words } else { format!("{place}: {words}") }
        })
        .collect();
    Ok(json!({"valid": errors.is_empty(), "errors": errors}))
}
