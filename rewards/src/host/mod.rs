//! The `rft` library of the scripts: pure functions of their arguments.
//!
//! Each table is a list of names and plain functions of JSON values (see [`bind`]); `rft.regex`, `rft.json` and
//! `rft.code` need more. Wrong arguments raise Lua errors that name the function and the argument; "not found" is nil.
//! `rewards/docs/reference.md` has every function with an example.

pub(crate) mod bind;
mod boxes;
mod code;
pub(crate) mod convert;
mod json;
mod logprobs;
mod math;
mod regex;
pub(crate) mod text;
mod tools;

use std::rc::Rc;

use mlua::{Error as LuaError, Lua, LuaSerdeExt, Table};

use crate::budget::Budget;

/// Builds the library, read-only.
pub(crate) fn library(lua: &Lua, budget: &Rc<Budget>) -> Result<Table, LuaError> {
    let rft = lua.create_table()?;
    rft.raw_set("null", lua.null())?;
    for (name, functions) in [
        ("text", text::FUNCTIONS),
        ("math", math::MATH),
        ("shape", math::SHAPE),
        ("boxes", boxes::FUNCTIONS),
        ("tools", tools::FUNCTIONS),
    ] {
        rft.raw_set(name, bind::table(lua, budget, name, functions)?)?;
    }
    rft.raw_set("json", json::library(lua, budget)?)?;
    rft.raw_set("regex", regex::library(lua, budget)?)?;
    rft.raw_set("code", code::library(lua, budget)?)?;
    rft.raw_set("prefix_logprob", logprobs::prefix_logprob(lua)?)?;
    for entry in rft.pairs::<String, mlua::Value>() {
        if let (_, mlua::Value::Table(table)) = entry? {
            table.set_readonly(true);
        }
    }
    rft.set_readonly(true);
    Ok(rft)
}
