//! One script in one Luau VM: what it may reach, how long it may run, and how its failures become data.
//!
//! The VM has no io, os, debug, load or require; the libraries are read-only, and each call runs the script's top level
//! again in an environment of its own, so nothing leaks from a call to the next. Luau's interrupt fires at calls, loop
//! turns and inside string patterns; once a limit trips it raises at every turn, so `pcall` cannot swallow it. A VM whose
//! call tripped a limit is thrown away.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;
use std::sync::Arc;

use mlua::chunk::ChunkMode;
use mlua::{
    Error as LuaError, Function, Lua, LuaOptions, MultiValue, StdLib, Table, Value, Variadic, VmState,
};

use crate::budget::{Budget, random_key};
use crate::guards;
use crate::host::{self, convert::from_json, convert::to_json};
use crate::returned::{Returned, read_group, read_reward};
use crate::script::Script;
use crate::types::{Context, ErrorKind, Limits, RewardError, Sample};

/// What a script answers for each sample of a group.
pub(crate) type Answers = Vec<Result<Returned, RewardError>>;

/// Globals of the base library that would let a script load code, read others' environments or stop the collector.
const FORBIDDEN: [&str; 7] =
    ["collectgarbage", "getfenv", "setfenv", "loadstring", "load", "require", "newproxy"];

/// Libraries that scripts of other Lua hosts use, with the reason that reading them gives.
const ABSENT: [(&str, &str); 5] = [
    ("coroutine", "a limit must end a call wherever it is; loop, or pass functions"),
    ("io", "a reward reads no files; put data into the row"),
    ("os", "a reward is the same at any time and on any machine"),
    ("debug", "errors are reported with their line"),
    ("package", "a reward is one file"),
];

/// A script ready to be called.
pub(crate) struct Sandbox {
    script: Script,
    limits: Limits,
    options: serde_json::Map<String, serde_json::Value>,
    vm: RefCell<Option<Vm>>,
    watch: Option<Rc<RefCell<Seen>>>,
    /// `ctx.state` of a stateful script, as JSON text.
    state: RefCell<Arc<str>>,
}

/// What a watched script did beside scoring.
#[derive(Debug, Clone, Default)]
pub(crate) struct Seen {
    /// Fields that it read and the sample did not have.
    pub(crate) absent_fields: BTreeSet<String>,
    /// Globals that calls wrote.
    pub(crate) globals: BTreeSet<String>,
}

/// State before the first step.
const EMPTY_STATE: &str = "{}";
/// Bytes of a state's JSON text.
const MAX_STATE: usize = 1 << 18;

struct Vm {
    lua: Lua,
    budget: Rc<Budget>,
    /// Bytes that the VM holds before any call.
    settled: usize,
}

/// Runs a script's top level once and checks that it defines a reward; whether it keeps state.
pub(crate) fn check(script: &Script) -> Result<bool, RewardError> {
    let sandbox = Sandbox::new(script.clone(), Limits::default(), serde_json::Map::new());
    sandbox.with_vm(0, |vm| {
        let env = vm.environment(script)?;
        let defined = |name: &str| env.get::<Option<Function>>(name).map(|f| f.is_some());
        if defined("reward")? || defined("reward_group")? {
            return defined("update_state");
        }
        Err(LuaError::runtime("the script defines neither `function reward(sample, ctx)` nor `function reward_group(samples, ctx)`"))
    })
}

/// Whether the scripts' library has `rft.GROUP` or `rft.GROUP.FUNCTION`.
pub(crate) fn knows(group: &str, function: Option<&str>) -> bool {
    let look = || -> Result<bool, LuaError> {
        let (lua, _) = bare(&Limits::default(), true)?;
        let rft: Table = lua.globals().get("rft")?;
        Ok(match (rft.get::<Value>(group)?, function) {
            (Value::Nil, _) => false,
            (Value::Table(table), Some(name)) => !table.get::<Value>(name)?.is_nil(),
            _ => true,
        })
    };
    look().unwrap_or(true)
}

impl Sandbox {
    pub(crate) fn new(
        script: Script,
        limits: Limits,
        options: serde_json::Map<String, serde_json::Value>,
    ) -> Self {
        Self {
            script,
            limits,
            options,
            vm: RefCell::new(None),
            watch: None,
            state: RefCell::new(EMPTY_STATE.into()),
        }
    }

    /// A sandbox that notes what [`Seen`] lists.
    pub(crate) fn watching(
        script: Script,
        limits: Limits,
        options: serde_json::Map<String, serde_json::Value>,
    ) -> Self {
        Self { watch: Some(Rc::default()), ..Self::new(script, limits, options) }
    }

    /// What was noted so far.
    pub(crate) fn watched(&self) -> Seen {
        self.watch.as_ref().map(|seen| seen.borrow().clone()).unwrap_or_default()
    }

    /// Scores a group: one call of `reward_group`, or one of `reward` a sample.
    pub(crate) fn score(&self, samples: &[Sample], context: &Context) -> Answers {
        let whole = self.with_vm(self.key(samples, 0, context), |vm| {
            let env = vm.environment(&self.script)?;
            let Some(function) = env.get::<Option<Function>>("reward_group")? else { return Ok(None) };
            let list = vm.lua.create_table()?;
            for sample in samples {
                list.push(self.sample(vm, sample)?)?;
            }
            let before = self.globals(&env)?;
            let returned: Value = function.call((list, self.context(vm, samples, context)?))?;
            self.note_globals(&env, &before)?;
            Ok(Some(read_group(returned, samples.len())))
        });
        match whole {
            Ok(Some(Ok(answers))) => answers.into_iter().map(|a| a.map_err(|e| self.wrong(e))).collect(),
            Ok(Some(Err(wrong))) => samples.iter().map(|_| Err(self.wrong(wrong.clone()))).collect(),
            Ok(None) => (0..samples.len()).map(|i| self.score_one(&samples[i..=i], context)).collect(),
            Err(error) => samples.iter().map(|_| Err(error.clone())).collect(),
        }
    }

    fn score_one(&self, sample: &[Sample], context: &Context) -> Result<Returned, RewardError> {
        let key = self.key(sample, u64::from(sample[0].sample), context);
        let answer = self.with_vm(key, |vm| {
            let env = vm.environment(&self.script)?;
            let function: Function = env.get("reward")?;
            let before = self.globals(&env)?;
            let returned: MultiValue =
                function.call((self.sample(vm, &sample[0])?, self.context(vm, sample, context)?))?;
            self.note_globals(&env, &before)?;
            Ok(read_reward(returned.into_iter().next().unwrap_or(Value::Nil)))
        })?;
        answer.map_err(|e| self.wrong(e))
    }

    /// The sample's table; a watched one notes reads of fields that it lacks.
    fn sample(&self, vm: &Vm, sample: &Sample) -> Result<Table, LuaError> {
        let table = vm.sample(sample)?;
        if let Some(seen) = &self.watch {
            let seen = Rc::clone(seen);
            let note = move |_: &Lua, (_, key): (Value, Value)| {
                if let Value::String(key) = key {
                    seen.borrow_mut().absent_fields.insert(key.to_string_lossy());
                }
                Ok(Value::Nil)
            };
            let meta = vm.lua.create_table()?;
            meta.set("__index", vm.lua.create_function(note)?)?;
            table.set_metatable(Some(meta))?;
        }
        Ok(table)
    }

    /// `ctx`; the state of a stateful script is read-only in it, all the way down.
    fn context(&self, vm: &Vm, samples: &[Sample], context: &Context) -> Result<Table, LuaError> {
        let table = vm.context(samples, context, &self.options)?;
        if self.script.stateful() {
            let state = self.state_value(vm)?;
            freeze(&state)?;
            table.raw_set("state", state)?;
        }
        Ok(table)
    }

    fn state_value(&self, vm: &Vm) -> Result<Value, LuaError> {
        let state = serde_json::from_str(&self.state.borrow()).map_err(LuaError::external)?;
        from_json(&vm.lua, &state)
    }

    /// What calls read as `ctx.state`, as JSON text.
    pub(crate) fn state(&self) -> Arc<str> {
        Arc::clone(&self.state.borrow())
    }

    /// Sets what the next calls read as `ctx.state`.
    pub(crate) fn set_state(&self, state: &Arc<str>) {
        *self.state.borrow_mut() = Arc::clone(state);
    }

    /// Runs `update_state(state, results, ctx)` on what a step's calls gave; the new state as JSON text.
    pub(crate) fn update_state(
        &self,
        results: &serde_json::Value,
        context: &Context,
    ) -> Result<Arc<str>, RewardError> {
        let key = random_key(context.seed, context.step, self.script.name(), "update_state", 0);
        let text = self.with_vm(key, |vm| {
            let function: Function = vm.environment(&self.script)?.get("update_state")?;
            let ctx = vm.context(&[], context, &self.options)?;
            let new: Value = function.call((self.state_value(vm)?, from_json(&vm.lua, results)?, ctx))?;
            if !new.is_table() {
                let found = new.type_name();
                return Ok(Err(format!(
                    "update_state must return the new state, a table; it returned {found}"
                )));
            }
            Ok(to_json(&vm.lua, &new).map(|json| json.to_string()).map_err(|e| format!("the new state: {e}")))
        })?;
        let text = text.map_err(|message| self.wrong((ErrorKind::WrongType, message)))?;
        if text.len() > MAX_STATE {
            let message =
                format!("the new state has {} bytes as JSON, at most {MAX_STATE} are kept", text.len());
            return Err(self.wrong((ErrorKind::WrongType, message)));
        }
        Ok(text.into())
    }

    /// Names in a watched call's environment.
    fn globals(&self, env: &Table) -> Result<BTreeSet<String>, LuaError> {
        if self.watch.is_none() {
            return Ok(BTreeSet::new());
        }
        env.pairs::<String, Value>().map(|pair| pair.map(|(name, _)| name)).collect()
    }

    fn note_globals(&self, env: &Table, before: &BTreeSet<String>) -> Result<(), LuaError> {
        let Some(seen) = &self.watch else { return Ok(()) };
        let new = self.globals(env)?.into_iter().filter(|name| !before.contains(name));
        seen.borrow_mut().globals.extend(new);
        Ok(())
    }

    fn key(&self, samples: &[Sample], sample: u64, context: &Context) -> u64 {
        let row = samples.first().map_or("", |s| s.id.as_str());
        random_key(context.seed, context.step, self.script.name(), row, sample)
    }

    fn wrong(&self, (kind, message): (ErrorKind, String)) -> RewardError {
        self.script.error(kind, message, None)
    }

    /// Runs `call` within the limits; its failure becomes a [`RewardError`], and a tripped VM is dropped.
    ///
    /// Out of memory in a VM that served before is tried again in a fresh one, so that the garbage of other samples never
    /// decides.
    fn with_vm<T>(&self, random: u64, call: impl Fn(&Vm) -> Result<T, LuaError>) -> Result<T, RewardError> {
        let mut slot = self.vm.borrow_mut();
        loop {
            let used = slot.take();
            let fresh = used.is_none();
            let vm = match used {
                Some(vm) => vm,
                None => Vm::new(&self.limits).map_err(|e| {
                    self.script.error(ErrorKind::Runtime, format!("the sandbox did not start: {e}"), None)
                })?,
            };
            if vm.lua.used_memory() > vm.settled + self.limits.memory_bytes / 8 {
                // a collection can only fail where a script has left a trap; then the VM is not worth keeping
                if vm.lua.gc_collect().is_err() {
                    continue;
                }
            }
            vm.budget.start(&self.limits, random);
            let result = catch_unwind(AssertUnwindSafe(|| call(&vm)));
            let Ok(result) = result else {
                let message = "a host function panicked; please report the script and the sample";
                return Err(self.script.error(ErrorKind::Runtime, message, None));
            };
            match (result, vm.budget.tripped()) {
                (Ok(value), None) => {
                    *slot = Some(vm);
                    return Ok(value);
                }
                (result, Some(kind)) => {
                    let from_error = || result.err().and_then(|e| line_of(&e, self.script.name()));
                    let line = vm.budget.line().or_else(from_error);
                    let message = match kind {
                        ErrorKind::Instructions => {
                            let most = self.limits.instructions.unwrap_or(u64::MAX);
                            format!("took more than {most} steps (calls and loop turns)")
                        }
                        _ => format!("ran longer than {} ms", self.limits.time_ms),
                    };
                    return Err(self.script.error(kind, message, line));
                }
                (Err(error), None) if is_memory(&error) && !fresh => {}
                (Err(error), None) => {
                    let memory = is_memory(&error);
                    let failure = self.failure(&error, memory);
                    if !memory {
                        *slot = Some(vm);
                    }
                    return Err(failure);
                }
            }
        }
    }

    fn failure(&self, error: &LuaError, memory: bool) -> RewardError {
        if memory {
            let message = format!("more than {} bytes", self.limits.memory_bytes);
            return self.script.error(ErrorKind::Memory, message, line_of(error, self.script.name()));
        }
        let line = line_of(error, self.script.name());
        let text = message_of(error);
        // below the first line stands a traceback
        let text = text.lines().next().unwrap_or_default();
        let prefix = line.map(|l| format!("{}:{l}: ", self.script.name()));
        let text = prefix.and_then(|p| text.split_once(&p).map(|(_, rest)| rest)).unwrap_or(text);
        self.script.error(ErrorKind::Runtime, clipped(text), line)
    }
}

/// Makes a table of JSON shape read-only, all the way down.
fn freeze(value: &Value) -> Result<(), LuaError> {
    let Value::Table(table) = value else { return Ok(()) };
    for pair in table.pairs::<Value, Value>() {
        freeze(&pair?.1)?;
    }
    table.set_readonly(true);
    Ok(())
}

fn is_memory(error: &LuaError) -> bool {
    match error {
        LuaError::MemoryError(_) => true,
        LuaError::CallbackError { cause, .. } | LuaError::WithContext { cause, .. } => is_memory(cause),
        other => other.to_string().contains("not enough memory"),
    }
}

fn message_of(error: &LuaError) -> String {
    match error {
        LuaError::RuntimeError(text) => text.clone(),
        // the script's own line stands in the traceback of the host call, where `line_of` finds it
        LuaError::CallbackError { cause, .. } | LuaError::WithContext { cause, .. } => message_of(cause),
        other => other.to_string(),
    }
}

fn clipped(text: &str) -> String {
    text.chars().take(400).collect()
}

/// The first `NAME:LINE` in an error's text.
fn line_of(error: &LuaError, name: &str) -> Option<u32> {
    let text = error.to_string();
    let mark = format!("{name}:");
    text.match_indices(&mark).find_map(|(at, _)| {
        let digits: String = text[at + mark.len()..].chars().take_while(char::is_ascii_digit).collect();
        digits.parse().ok()
    })
}

/// A VM with the pure libraries and, with `library`, `rft`; read-only and under the limits' interrupt and memory.
pub(crate) fn bare(limits: &Limits, library: bool) -> Result<(Lua, Rc<Budget>), LuaError> {
    let libs = StdLib::MATH | StdLib::STRING | StdLib::TABLE | StdLib::UTF8 | StdLib::BIT | StdLib::BUFFER;
    let lua = Lua::new_with(libs, LuaOptions::new().catch_rust_panics(true))?;
    let budget = Rc::new(Budget::new());
    let globals = lua.globals();
    for name in FORBIDDEN {
        globals.set(name, Value::Nil)?;
    }
    for (name, why) in ABSENT {
        let meta = lua.create_table()?;
        let refuse = move |_: &Lua, (_, _): (Value, Value)| -> Result<(), LuaError> {
            Err(LuaError::runtime(format!("`{name}` does not exist in the sandbox: {why}")))
        };
        meta.set("__index", lua.create_function(refuse)?)?;
        meta.set("__metatable", "locked")?;
        let library = lua.create_table()?;
        library.set_metatable(Some(meta))?;
        library.set_readonly(true);
        globals.set(name, library)?;
    }
    guards::install(&lua)?;
    install_math(&lua, &budget)?;
    let printer = Rc::clone(&budget);
    let print = move |_: &Lua, values: Variadic<Value>| {
        let parts: Result<Vec<String>, LuaError> = values.iter().map(|v| v.to_string()).collect();
        if let Some(line) = printer.printable(parts?.join("\t")).filter(|_| library) {
            eprintln!("[lua] {line}");
        }
        Ok(())
    };
    globals.set("print", lua.create_function(print)?)?;
    if library {
        globals.set("rft", host::library(&lua, &budget)?)?;
    }
    lua.sandbox(true)?;
    let ticking = Rc::clone(&budget);
    lua.set_interrupt(move |lua| match ticking.charge(1) {
        None => Ok(VmState::Continue),
        Some(_) => {
            ticking.set_line(lua.inspect_stack(0, |d| d.current_line().map(|l| l as u32)).flatten());
            Err(LuaError::runtime("limit reached"))
        }
    });
    lua.set_memory_limit(lua.used_memory() + limits.memory_bytes)?;
    Ok((lua, budget))
}

impl Vm {
    fn new(limits: &Limits) -> Result<Self, LuaError> {
        let (lua, budget) = bare(limits, true)?;
        let settled = lua.used_memory();
        Ok(Self { lua, budget, settled })
    }

    /// A fresh environment in which the script's top level has run.
    fn environment(&self, script: &Script) -> Result<Table, LuaError> {
        let env = self.lua.create_table()?;
        let meta = self.lua.create_table()?;
        meta.set("__index", self.lua.globals())?;
        meta.set("__metatable", "locked")?;
        env.set_metatable(Some(meta))?;
        env.raw_set("_G", &env)?;
        let chunk = self.lua.load(script.bytecode()).set_name(format!("={}", script.name()));
        chunk.set_mode(ChunkMode::Binary).set_environment(env.clone()).exec()?;
        Ok(env)
    }

    /// A field of a row: as JSON, but an absent value is nil.
    fn to_lua(&self, value: &serde_json::Value) -> Result<Value, LuaError> {
        if value.is_null() { Ok(Value::Nil) } else { from_json(&self.lua, value) }
    }

    fn sample(&self, sample: &Sample) -> Result<Table, LuaError> {
        let table = self.lua.create_table()?;
        for (key, value) in sample.fields.iter() {
            table.raw_set(key.as_str(), self.to_lua(value)?)?;
        }
        table.raw_set("id", sample.id.as_str())?;
        table.raw_set("completion", sample.completion.as_str())?;
        table.raw_set("prompt", sample.prompt.as_str())?;
        if !sample.tokens.is_empty() {
            table.raw_set("tokens", self.lua.create_sequence_from(sample.tokens.iter().copied())?)?;
        }
        if !sample.logprobs.is_empty() {
            table.raw_set("logprobs", self.lua.create_sequence_from(sample.logprobs.iter().copied())?)?;
        }
        if !sample.token_text_ends.is_empty() {
            let ends = sample.token_text_ends.iter().copied();
            table.raw_set("token_ends", self.lua.create_sequence_from(ends)?)?;
        }
        if !sample.finish_reason.is_empty() {
            table.raw_set("finish_reason", sample.finish_reason.as_str())?;
        }
        Ok(table)
    }

    fn context(
        &self,
        samples: &[Sample],
        context: &Context,
        options: &serde_json::Map<String, serde_json::Value>,
    ) -> Result<Table, LuaError> {
        let table = self.lua.create_table()?;
        table.raw_set("step", context.step)?;
        table.raw_set("total_steps", context.total_steps)?;
        let opts = self.lua.create_table()?;
        for (key, value) in options {
            opts.raw_set(key.as_str(), self.to_lua(value)?)?;
        }
        table.raw_set("options", opts)?;
        if let [sample] = samples {
            table.raw_set("sample", sample.sample)?;
            table.raw_set("tokens", self.lua.create_sequence_from(sample.tokens.iter().copied())?)?;
            table.raw_set("finish_reason", sample.finish_reason.as_str())?;
            if !sample.logprobs.is_empty() {
                table.raw_set("logprobs", self.lua.create_sequence_from(sample.logprobs.iter().copied())?)?;
            }
        }
        Ok(table)
    }
}

/// `math.random` and `math.randomseed` over the call's own stream.
fn install_math(lua: &Lua, budget: &Rc<Budget>) -> Result<(), LuaError> {
    let math: Table = lua.globals().get("math")?;
    let source = Rc::clone(budget);
    math.set(
        "random",
        lua.create_function(move |_, (low, high): (Option<f64>, Option<f64>)| {
            let unit = (source.random() >> 11) as f64 / (1u64 << 53) as f64;
            let (low, high) = match (low, high) {
                (None, _) => return Ok(unit),
                (Some(high), None) => (1.0, high.floor()),
                (Some(low), Some(high)) => (low.floor(), high.floor()),
            };
            if low > high {
                return Err(LuaError::runtime("math.random: the interval is empty"));
            }
            Ok(low + (unit * (high - low + 1.0)).floor())
        })?,
    )?;
    let source = Rc::clone(budget);
    math.set(
        "randomseed",
        lua.create_function(move |_, seed: f64| {
            source.reseed(seed.to_bits());
            Ok(())
        })?,
    )
}
