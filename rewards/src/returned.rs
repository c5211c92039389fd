//! What a script gives back, read strictly: whatever is no reward is an error, never a 0.

use mlua::{Error as LuaError, Table, Value};

use crate::types::ErrorKind;

/// A span of the completion with a reward of its own: 1-based byte positions, both ends included, as `string.find` gives.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct DenseSpan {
    pub(crate) from: u32,
    pub(crate) to: u32,
    pub(crate) value: f64,
}

/// A component's value.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Component {
    Number(f64),
    Dense(Vec<DenseSpan>),
}

/// A script's answer for one sample.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Returned {
    /// `nil`.
    Abstain,
    /// One component under the script's name.
    One(Component),
    /// Named components, names ascending.
    Named(Vec<(String, Component)>),
}

/// Kind and message of an answer that is no reward.
pub(crate) type Wrong = (ErrorKind, String);

/// Components that a table may name.
const MAX_COMPONENTS: usize = 64;
/// Spans that a dense component may have.
const MAX_SPANS: usize = 65_536;

pub(crate) fn read_reward(value: Value) -> Result<Returned, Wrong> {
    match value {
        Value::Nil => Ok(Returned::Abstain),
        null if null.is_null() => Ok(Returned::Abstain),
        Value::Table(table) => read_table(&table).map_err(unreadable)?,
        other => Ok(Returned::One(Component::Number(number(&other, "the reward")?))),
    }
}

/// A group's rewards, one a sample; whatever else a script returns is no list of rewards.
pub(crate) fn read_group(value: Value, samples: usize) -> Result<Vec<Result<Returned, Wrong>>, Wrong> {
    let wrong = |found: String| {
        let message = format!("reward_group must return a list of {samples} rewards, one a sample; {found}");
        (ErrorKind::WrongType, message)
    };
    let Value::Table(table) = value else {
        return Err(wrong(format!("it returned {}", value.type_name())));
    };
    let mut last = 0;
    for pair in table.pairs::<Value, Value>() {
        let key = pair.map_err(unreadable)?.0;
        let position = match key {
            Value::Integer(at) => Some(at as f64),
            Value::Number(at) => Some(at),
            _ => None,
        };
        match position.filter(|at| at.fract() == 0.0 && (1.0..=samples as f64).contains(at)) {
            Some(at) => last = last.max(at as usize),
            None => return Err(wrong(format!("it has one at [{}]", key.to_string().map_err(unreadable)?))),
        }
    }
    if last < samples {
        return Err(wrong(format!("it ends after {last} (rft.null abstains for a sample)")));
    }
    (1..=samples).map(|i| Ok(read_reward(table.raw_get::<Value>(i).map_err(unreadable)?))).collect()
}

fn unreadable(error: LuaError) -> Wrong {
    (ErrorKind::WrongType, format!("the returned table cannot be read: {error}"))
}

fn number(value: &Value, what: &str) -> Result<f64, Wrong> {
    let number = match value {
        Value::Integer(n) => *n as f64,
        Value::Number(n) => *n,
        other => {
            return Err((
                ErrorKind::WrongType,
                format!("{what} must be a number, a table of components or nil, not {}", other.type_name()),
            ));
        }
    };
    if !number.is_finite() {
        return Err((ErrorKind::NotFinite, format!("{what} is {number}")));
    }
    // means and deviations of larger ones would overflow
    if number.abs() > f64::from(f32::MAX) {
        return Err((ErrorKind::NotFinite, format!("{what} is {number:e}, beyond single precision")));
    }
    Ok(number)
}

fn read_table(table: &Table) -> Result<Result<Returned, Wrong>, LuaError> {
    let mut named = Vec::new();
    let mut list = Vec::new();
    for pair in table.pairs::<Value, Value>() {
        let (key, value) = pair?;
        match key {
            Value::String(name) if named.len() < MAX_COMPONENTS => {
                named.push((name.to_string_lossy(), value))
            }
            Value::Integer(_) | Value::Number(_) if list.len() < MAX_SPANS => list.push(value),
            _ => {
                return Ok(Err((
                    ErrorKind::WrongType,
                    format!("a reward has at most {MAX_COMPONENTS} components with string names"),
                )));
            }
        }
    }
    if named.is_empty() && list.is_empty() {
        return Ok(Err((ErrorKind::WrongType, "the returned table is empty; return nil to abstain".into())));
    }
    if named.is_empty() {
        return Ok(read_spans(list)?.map(Returned::One));
    }
    if !list.is_empty() {
        return Ok(Err((ErrorKind::WrongType, "the returned table mixes names and positions".into())));
    }
    named.sort_by(|a, b| a.0.cmp(&b.0));
    let mut components = Vec::with_capacity(named.len());
    for (name, value) in named {
        let component = match value {
            Value::Table(spans) => {
                let spans: Result<Vec<Value>, LuaError> = spans.sequence_values().take(MAX_SPANS).collect();
                read_spans(spans?)?
            }
            other => number(&other, &format!("component `{name}`")).map(Component::Number),
        };
        match component {
            Ok(component) => components.push((name, component)),
            Err(wrong) => return Ok(Err(wrong)),
        }
    }
    Ok(Ok(Returned::Named(components)))
}

fn read_spans(values: Vec<Value>) -> Result<Result<Component, Wrong>, LuaError> {
    if values.is_empty() {
        let message = "a component is a table without spans; a dense reward is a list of {from, to, value}";
        return Ok(Err((ErrorKind::WrongType, message.into())));
    }
    let mut spans = Vec::with_capacity(values.len());
    for value in values {
        let Value::Table(span) = value else {
            return Ok(Err((ErrorKind::WrongType, "a dense reward is a list of {from, to, value}".into())));
        };
        let mut part = [0.0; 3];
        for (slot, (at, key)) in part.iter_mut().zip([(1, "from"), (2, "to"), (3, "value")]) {
            let mut value: Value = span.raw_get(key)?;
            if value.is_nil() {
                value = span.raw_get(at)?;
            }
            match number(&value, &format!("`{key}` of a span")) {
                Ok(n) => *slot = n,
                Err(wrong) => return Ok(Err(wrong)),
            }
        }
        if !(part[0] >= 1.0 && part[1] >= part[0] && part[1] <= f64::from(u32::MAX)) {
            return Ok(Err((
                ErrorKind::WrongType,
                format!("a span needs 1 <= from <= to, got {} to {}", part[0], part[1]),
            )));
        }
        spans.push(DenseSpan { from: part[0] as u32, to: part[1] as u32, value: part[2] });
    }
    Ok(Ok(Component::Dense(spans)))
}
