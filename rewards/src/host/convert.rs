//! Between Lua values and JSON, with bounds on depth and size so that no script can exhaust the stack or the heap.

use mlua::{Error as LuaError, Lua, LuaSerdeExt, Table, Value};
use serde_json::{Map, Number, Value as Json};

/// Deepest nesting.
const MAX_DEPTH: usize = 64;
/// Most values in one conversion.
const MAX_NODES: usize = 1 << 20;
/// Integers that a Lua number holds exactly.
const MAX_EXACT: f64 = 9_007_199_254_740_992.0;

/// A JSON value in Lua. Null becomes `rft.null`; an empty list keeps a mark, so that it is written as `[]` again.
pub(crate) fn from_json(lua: &Lua, value: &Json) -> Result<Value, LuaError> {
    Ok(match value {
        Json::Null => lua.null(),
        Json::Bool(value) => Value::Boolean(*value),
        Json::Number(number) => Value::Number(number.as_f64().unwrap_or(f64::NAN)),
        Json::String(text) => Value::String(lua.create_string(text)?),
        Json::Array(items) => {
            let table = lua.create_table_with_capacity(items.len(), 0)?;
            for (i, item) in items.iter().enumerate() {
                table.raw_set(i + 1, from_json(lua, item)?)?;
            }
            if items.is_empty() {
                table.set_metatable(Some(lua.array_metatable()))?;
            }
            Value::Table(table)
        }
        Json::Object(object) => {
            let table = lua.create_table_with_capacity(0, object.len())?;
            for (key, item) in object {
                table.raw_set(key.as_str(), from_json(lua, item)?)?;
            }
            Value::Table(table)
        }
    })
}

/// A Lua value as JSON.
///
/// # Errors
/// NaN and infinities, functions and the like, tables that mix names and positions or are too deep or too large.
pub(crate) fn to_json(lua: &Lua, value: &Value) -> Result<Json, String> {
    let mut nodes = 0;
    convert(lua, value, 0, &mut nodes)
}

fn convert(lua: &Lua, value: &Value, depth: usize, nodes: &mut usize) -> Result<Json, String> {
    *nodes += 1;
    if *nodes > MAX_NODES {
        return Err(format!("more than {MAX_NODES} values"));
    }
    match value {
        Value::Nil => Ok(Json::Null),
        null if null.is_null() => Ok(Json::Null),
        Value::Boolean(value) => Ok(Json::Bool(*value)),
        Value::Integer(n) => Ok(Json::from(*n)),
        Value::Number(n) if n.fract() == 0.0 && n.abs() <= MAX_EXACT => Ok(Json::from(*n as i64)),
        Value::Number(n) => {
            Number::from_f64(*n).map(Json::Number).ok_or_else(|| format!("{n} is not a JSON number"))
        }
        Value::String(text) => Ok(Json::String(text.to_string_lossy())),
        Value::Table(_) if depth >= MAX_DEPTH => Err(format!("nested deeper than {MAX_DEPTH} tables")),
        Value::Table(table) => convert_table(lua, table, depth, nodes),
        other => Err(format!("a {} has no JSON form", other.type_name())),
    }
}

fn convert_table(lua: &Lua, table: &Table, depth: usize, nodes: &mut usize) -> Result<Json, String> {
    let length = table.raw_len();
    if length == 0 {
        let marked = table.metatable().is_some_and(|meta| meta == lua.array_metatable());
        let mut object = Map::new();
        for pair in table.pairs::<Value, Value>() {
            let (key, item) = pair.map_err(|error| error.to_string())?;
            let Value::String(key) = key else {
                return Err(format!("a table key is a {}, expected a string", key.type_name()));
            };
            object.insert(key.to_string_lossy(), convert(lua, &item, depth + 1, nodes)?);
        }
        // The order of a Lua table depends on its history; the text must not.
        object.sort_keys();
        return Ok(if marked && object.is_empty() { Json::Array(Vec::new()) } else { Json::Object(object) });
    }
    let mut list = Vec::new();
    for i in 1..=length {
        let item: Value = table.raw_get(i).map_err(|error| error.to_string())?;
        list.push(convert(lua, &item, depth + 1, nodes)?);
    }
    let mut keys = 0;
    for pair in table.pairs::<Value, Value>() {
        pair.map_err(|error| error.to_string())?;
        keys += 1;
        if keys > length {
            return Err("a table mixes positions and names".into());
        }
    }
    Ok(Json::Array(list))
}
