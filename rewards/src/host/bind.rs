//! Binding plain functions of JSON arguments to Lua: conversion, checks of arguments, and the price of a call.

use std::rc::Rc;

use mlua::{Error as LuaError, Function, Lua, MultiValue, Table};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value as Json;

use super::convert::{from_json, to_json};
use crate::budget::Budget;

/// Bytes of text that cost one step.
const BYTES_A_STEP: usize = 256;

/// The arguments of a call.
pub(crate) struct Args(Vec<Json>);

/// What a host function gives back; an `Err` becomes a Lua error.
pub(crate) type Answer = Result<Json, String>;

/// A host function.
pub(crate) type Host = fn(&Args) -> Answer;

impl Args {
    fn at(&self, at: usize) -> &Json {
        self.0.get(at).unwrap_or(&Json::Null)
    }

    fn wrong(&self, at: usize, what: &str, expected: &str) -> String {
        let found = match self.at(at) {
            Json::Null => "nil".to_string(),
            Json::Bool(value) => value.to_string(),
            Json::Number(number) => number.to_string(),
            Json::String(text) => format!("the string {:?}", text.chars().take(40).collect::<String>()),
            Json::Array(_) => "a list".to_string(),
            Json::Object(_) => "a table".to_string(),
        };
        format!("argument {} ({what}) must be {expected}, got {found}", at + 1)
    }

    /// A string; a number is taken as Lua writes it.
    pub(crate) fn text(&self, at: usize, what: &str) -> Result<std::borrow::Cow<'_, str>, String> {
        match self.at(at) {
            Json::String(text) => Ok(text.as_str().into()),
            Json::Number(number) => Ok(number.to_string().into()),
            _ => Err(self.wrong(at, what, "a string")),
        }
    }

    pub(crate) fn number(&self, at: usize, what: &str) -> Result<f64, String> {
        self.at(at).as_f64().ok_or_else(|| self.wrong(at, what, "a number"))
    }

    pub(crate) fn count(&self, at: usize, what: &str) -> Result<u64, String> {
        self.at(at).as_u64().ok_or_else(|| self.wrong(at, what, "a whole number from 0"))
    }

    pub(crate) fn flag(&self, at: usize, what: &str) -> Result<bool, String> {
        self.at(at).as_bool().ok_or_else(|| self.wrong(at, what, "true or false"))
    }

    pub(crate) fn given(&self, at: usize) -> bool {
        !self.at(at).is_null()
    }

    pub(crate) fn json(&self, at: usize) -> &Json {
        self.at(at)
    }

    /// A table of a known shape.
    pub(crate) fn read<T: DeserializeOwned>(&self, at: usize, what: &str) -> Result<T, String> {
        let value = match self.at(at) {
            // An empty Lua table is a list or an object, as the reader wishes.
            Json::Object(object) if object.is_empty() => {
                return serde_json::from_str("{}")
                    .or_else(|_| serde_json::from_str("[]"))
                    .map_err(|error: serde_json::Error| format!("argument {} ({what}): {error}", at + 1));
            }
            other => other.clone(),
        };
        serde_json::from_value(value).map_err(|error| format!("argument {} ({what}): {error}", at + 1))
    }

    /// A table of options that may be left out; unknown keys are errors of the reader's.
    pub(crate) fn options<T: DeserializeOwned + Default>(&self, at: usize) -> Result<T, String> {
        if self.given(at) { self.read(at, "options") } else { Ok(T::default()) }
    }
}

/// A record as JSON, absent parts left out.
pub(crate) fn answer<T: Serialize>(value: T) -> Answer {
    serde_json::to_value(value).map_err(|error| error.to_string())
}

/// Binds `functions` as the read-only table `rft.NAME`.
pub(crate) fn table(
    lua: &Lua,
    budget: &Rc<Budget>,
    group: &str,
    functions: &[(&'static str, Host)],
) -> Result<Table, LuaError> {
    let table = lua.create_table()?;
    for (name, host) in functions {
        table.raw_set(*name, function(lua, budget, format!("rft.{group}.{name}"), *host)?)?;
    }
    Ok(table)
}

fn function(lua: &Lua, budget: &Rc<Budget>, name: String, host: Host) -> Result<Function, LuaError> {
    let budget = Rc::clone(budget);
    lua.create_function(move |lua, values: MultiValue| {
        let fail = |message: String| LuaError::runtime(format!("{name}: {message}"));
        let mut args = Vec::with_capacity(values.len());
        let mut bytes = 0;
        for value in &values {
            bytes += value.as_string().map_or(64, |text| text.as_bytes().len());
            args.push(to_json(lua, value).map_err(fail)?);
        }
        charge(&budget, bytes)?;
        let result = host(&Args(args)).map_err(fail)?;
        // A null answer is nil: "not found", as opposed to a null inside a document.
        if result.is_null() { Ok(mlua::Value::Nil) } else { from_json(lua, &result) }
    })
}

/// Takes the price of reading `bytes` from the budget; raises once a limit has tripped.
pub(crate) fn charge(budget: &Budget, bytes: usize) -> Result<(), LuaError> {
    match budget.charge(1 + (bytes / BYTES_A_STEP) as u64) {
        None => Ok(()),
        Some(_) => Err(LuaError::runtime("limit reached")),
    }
}
