//! `rft.regex`: regular expressions in time linear in the text (the syntax of the crate `regex`), kept compiled.

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;

use mlua::{Error as LuaError, Lua, LuaString, Table};
use regex::{Captures, Regex, RegexBuilder};

use super::bind::charge;
use crate::budget::Budget;

/// Compiled sizes that are tried, smallest first, in bytes.
const SIZES: [usize; 4] = [1 << 14, 1 << 16, 1 << 18, 1 << 20];
/// Bytes of text times bytes of program that one search may need.
const MAX_WORK: usize = 1 << 35;
/// Longest pattern, in bytes.
const MAX_PATTERN: usize = 8192;
/// Patterns that are kept.
const KEPT: usize = 64;

struct Compiled {
    regex: Regex,
    size: usize,
}

/// Patterns of one VM and the budget they draw on.
#[derive(Clone)]
struct Patterns {
    budget: Rc<Budget>,
    compiled: Rc<RefCell<HashMap<String, Rc<Compiled>>>>,
}

impl Patterns {
    fn find(
        &self,
        name: &str,
        text: &LuaString,
        pattern: &LuaString,
    ) -> Result<(Rc<Compiled>, String), LuaError> {
        let text = text.to_string_lossy();
        let pattern = pattern.to_string_lossy();
        let fail = |message: String| LuaError::runtime(format!("rft.regex.{name}: {message}"));
        charge(&self.budget, text.len())?;
        let known = self.compiled.borrow().get(&pattern).cloned();
        let compiled = match known {
            Some(compiled) => compiled,
            None => {
                let compiled = Rc::new(compile(&pattern).map_err(fail)?);
                let mut kept = self.compiled.borrow_mut();
                if kept.len() >= KEPT {
                    kept.clear();
                }
                kept.insert(pattern, Rc::clone(&compiled));
                compiled
            }
        };
        if text.len().saturating_mul(compiled.size) > MAX_WORK {
            return Err(fail(format!(
                "the pattern is too large for a text of {} bytes; cut the text or simplify the pattern",
                text.len()
            )));
        }
        Ok((compiled, text))
    }

    /// One further match: the price of starting the search again.
    fn next(&self, text: &str) -> Result<(), LuaError> {
        charge(&self.budget, text.len() / 16)
    }
}

fn compile(pattern: &str) -> Result<Compiled, String> {
    if pattern.len() > MAX_PATTERN {
        return Err(format!("the pattern is longer than {MAX_PATTERN} bytes"));
    }
    for size in SIZES {
        match RegexBuilder::new(pattern).size_limit(size).dfa_size_limit(1 << 21).build() {
            Ok(regex) => return Ok(Compiled { regex, size }),
            Err(regex::Error::CompiledTooBig(_)) => {}
            Err(error) => return Err(error.to_string()),
        }
    }
    Err("the pattern is too large; large counted repetitions are the usual cause".to_string())
}

fn captures(lua: &Lua, regex: &Regex, found: &Captures) -> Result<Table, LuaError> {
    let table = lua.create_table()?;
    for (i, part) in found.iter().enumerate() {
        table.raw_set(i, part.map(|m| m.as_str()))?;
    }
    for name in regex.capture_names().flatten() {
        table.raw_set(name, found.name(name).map(|m| m.as_str()))?;
    }
    if let Some(whole) = found.get(0) {
        table.raw_set("from", whole.start() + 1)?;
        table.raw_set("to", whole.end())?;
    }
    Ok(table)
}

pub(super) fn library(lua: &Lua, budget: &Rc<Budget>) -> Result<Table, LuaError> {
    let all = Patterns { budget: Rc::clone(budget), compiled: Rc::default() };
    let table = lua.create_table()?;
    let patterns = all.clone();
    let find = move |lua: &Lua, (text, pattern): (LuaString, LuaString)| {
        let (compiled, text) = patterns.find("match", &text, &pattern)?;
        compiled.regex.captures(&text).map(|found| captures(lua, &compiled.regex, &found)).transpose()
    };
    table.raw_set("match", lua.create_function(find)?)?;
    let patterns = all.clone();
    let test = move |_: &Lua, (text, pattern): (LuaString, LuaString)| {
        let (compiled, text) = patterns.find("test", &text, &pattern)?;
        Ok(compiled.regex.is_match(&text))
    };
    table.raw_set("test", lua.create_function(test)?)?;
    let patterns = all.clone();
    let find_all = move |lua: &Lua, (text, pattern): (LuaString, LuaString)| {
        let (compiled, text) = patterns.find("find_all", &text, &pattern)?;
        let list = lua.create_table()?;
        for (i, found) in compiled.regex.captures_iter(&text).enumerate() {
            patterns.next(&text)?;
            list.raw_set(i + 1, captures(lua, &compiled.regex, &found)?)?;
        }
        Ok(list)
    };
    table.raw_set("find_all", lua.create_function(find_all)?)?;
    let patterns = all.clone();
    let count = move |_: &Lua, (text, pattern): (LuaString, LuaString)| {
        let (compiled, text) = patterns.find("count", &text, &pattern)?;
        let mut count = 0;
        for _ in compiled.regex.find_iter(&text) {
            patterns.next(&text)?;
            count += 1;
        }
        Ok(count)
    };
    table.raw_set("count", lua.create_function(count)?)?;
    let patterns = all.clone();
    let replace = move |_: &Lua, (text, pattern, by): (LuaString, LuaString, String)| {
        let (compiled, text) = patterns.find("replace", &text, &pattern)?;
        let mut out = String::new();
        let mut last = 0;
        for found in compiled.regex.captures_iter(&text) {
            patterns.next(&text)?;
            let Some(whole) = found.get(0) else { continue };
            out.push_str(&text[last..whole.start()]);
            found.expand(&by, &mut out);
            last = whole.end();
            if out.len() > 1 << 24 {
                return Err(LuaError::runtime("rft.regex.replace: the result is longer than 16 MiB"));
            }
        }
        out.push_str(&text[last..]);
        Ok(out)
    };
    table.raw_set("replace", lua.create_function(replace)?)?;
    let patterns = all;
    let split = move |lua: &Lua, (text, pattern): (LuaString, LuaString)| {
        let (compiled, text) = patterns.find("split", &text, &pattern)?;
        let list = lua.create_table()?;
        for (i, part) in compiled.regex.split(&text).enumerate() {
            patterns.next(&text)?;
            list.raw_set(i + 1, part)?;
        }
        Ok(list)
    };
    table.raw_set("split", lua.create_function(split)?)?;
    table.raw_set("escape", lua.create_function(|_, text: String| Ok(regex::escape(&text)))?)?;
    Ok(table)
}
