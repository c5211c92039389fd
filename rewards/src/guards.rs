//! Library functions of Luau that can work for minutes without an interrupt, replaced by ones that cannot.
//!
//! Found by reading VM/src/{lstrlib,ltablib}.cpp of Luau 0.740: plain search is quadratic, a character class is scanned
//! for every character, `table.move` and `table.sort` without a comparison loop outside the interpreter.

use mlua::{Error as LuaError, Function, Lua, MultiValue, Table, Value};

/// Bytes of text times bytes of pattern that one call may need.
const MAX_WORK: usize = 1 << 28;
/// Elements that `table.move` may move at once.
const MAX_MOVED: f64 = 4e6;

/// Replaces the functions; call it before the libraries become read-only.
pub(crate) fn install(lua: &Lua) -> Result<(), LuaError> {
    let string: Table = lua.globals().get("string")?;
    for name in ["find", "match", "gmatch", "gsub", "split"] {
        let original: Function = string.get(name)?;
        let guarded = lua.create_function(move |_, args: MultiValue| {
            let length =
                |at: usize| args.get(at).and_then(Value::as_string).map_or(0, |text| text.as_bytes().len());
            if length(0).saturating_mul(length(1)) > MAX_WORK {
                return Err(LuaError::runtime(format!(
                    "string.{name}: a pattern of {} bytes on a text of {} bytes is too much work",
                    length(1),
                    length(0)
                )));
            }
            original.call::<MultiValue>(args)
        })?;
        string.set(name, guarded)?;
    }
    let table: Table = lua.globals().get("table")?;
    let sort: Function = table.get("sort")?;
    let less: Function = lua.load("return function(a, b) return a < b end").set_name("=table.sort").eval()?;
    let guarded = lua.create_function(move |_, (list, compare): (Table, Option<Function>)| {
        sort.call::<()>((list, compare.unwrap_or_else(|| less.clone())))
    })?;
    table.set("sort", guarded)?;
    let move_: Function = table.get("move")?;
    let guarded = lua.create_function(move |_, args: (Value, f64, f64, MultiValue)| {
        let (list, first, last, rest) = args;
        if last - first > MAX_MOVED {
            return Err(LuaError::runtime("table.move: more than 4 million elements"));
        }
        move_.call::<MultiValue>((list, first, last, rest))
    })?;
    table.set("move", guarded)
}
