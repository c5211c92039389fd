//! Python values and Python's JSON reader.
//!
//! The published rewards and checkers are Python: whether `2 == 2.0`, whether `NaN` is legal JSON, or how many
//! digits an integer may have changes their verdicts. [`Py`] keeps what JSON and Python literals can express
//! (integers apart from floats, tuples apart from lists) and [`loads`]/[`raw_decode`] read text the way
//! `json.loads`/`JSONDecoder.raw_decode` do, in linear time and with a depth limit.

use num_bigint::BigInt;
use num_traits::{FromPrimitive, ToPrimitive};
use serde_json::{Map, Number, Value};
use std::collections::HashMap;

/// Nesting beyond this is refused, as Python refuses it (`RecursionError`), only sooner.
pub(crate) const MAX_DEPTH: usize = 200;
/// CPython refuses to read integers with more digits (`sys.int_info.default_max_str_digits`).
const MAX_INT_DIGITS: usize = 4300;

/// A value as Python sees it.
#[derive(Debug, Clone)]
pub(crate) enum Py {
    None,
    Bool(bool),
    Int(BigInt),
    Float(f64),
    Str(String),
    List(Vec<Py>),
    Tuple(Vec<Py>),
    Dict(Dict),
}

/// The Python type of a value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PyType {
    None,
    Bool,
    Int,
    Float,
    Str,
    List,
    Tuple,
    Dict,
}

/// A dict in insertion order; a repeated key keeps its place and takes the later value.
#[derive(Debug, Clone, Default)]
pub(crate) struct Dict {
    entries: Vec<(String, Py)>,
    index: HashMap<String, usize>,
}

impl Dict {
    pub(crate) fn insert(&mut self, key: String, value: Py) {
        match self.index.get(&key) {
            Some(&at) => self.entries[at].1 = value,
            None => {
                self.index.insert(key.clone(), self.entries.len());
                self.entries.push((key, value));
            }
        }
    }

    pub(crate) fn get(&self, key: &str) -> Option<&Py> {
        self.index.get(key).map(|&at| &self.entries[at].1)
    }

    pub(crate) fn contains(&self, key: &str) -> bool {
        self.index.contains_key(key)
    }

    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (&str, &Py)> {
        self.entries.iter().map(|(key, value)| (key.as_str(), value))
    }
}

impl Py {
    pub(crate) fn kind(&self) -> PyType {
        match self {
            Py::None => PyType::None,
            Py::Bool(_) => PyType::Bool,
            Py::Int(_) => PyType::Int,
            Py::Float(_) => PyType::Float,
            Py::Str(_) => PyType::Str,
            Py::List(_) => PyType::List,
            Py::Tuple(_) => PyType::Tuple,
            Py::Dict(_) => PyType::Dict,
        }
    }

    pub(crate) fn as_str(&self) -> Option<&str> {
        match self {
            Py::Str(text) => Some(text),
            _ => None,
        }
    }

    pub(crate) fn as_dict(&self) -> Option<&Dict> {
        match self {
            Py::Dict(dict) => Some(dict),
            _ => None,
        }
    }

    pub(crate) fn as_list(&self) -> Option<&[Py]> {
        match self {
            Py::List(items) => Some(items),
            _ => None,
        }
    }

    /// The number that arithmetic sees: `True` is 1; an integer beyond f64 is none (`OverflowError`).
    pub(crate) fn as_number(&self) -> Option<f64> {
        match self {
            Py::Bool(value) => Some(f64::from(u8::from(*value))),
            Py::Int(value) => value.to_f64().filter(|x| x.is_finite()),
            Py::Float(value) => Some(*value),
            _ => None,
        }
    }

    /// Whether `hash(value)` raises.
    pub(crate) fn unhashable(&self) -> bool {
        match self {
            Py::List(_) | Py::Dict(_) => true,
            Py::Tuple(items) => items.iter().any(Py::unhashable),
            _ => false,
        }
    }

    /// `json.dumps` then JSON: tuples become lists; an integer beyond 64 bits becomes a float.
    /// None where the value holds a number that JSON cannot write (infinity, NaN).
    pub(crate) fn to_json(&self) -> Option<Value> {
        Some(match self {
            Py::None => Value::Null,
            Py::Bool(value) => Value::Bool(*value),
            Py::Int(value) => match (value.to_i64(), value.to_u64()) {
                (Some(small), _) => Value::Number(small.into()),
                (None, Some(large)) => Value::Number(large.into()),
                (None, None) => Value::Number(Number::from_f64(value.to_f64()?)?),
            },
            Py::Float(value) => Value::Number(Number::from_f64(*value)?),
            Py::Str(text) => Value::String(text.clone()),
            Py::List(items) | Py::Tuple(items) => {
                Value::Array(items.iter().map(Py::to_json).collect::<Option<_>>()?)
            }
            Py::Dict(dict) => {
                let mut map = Map::new();
                for (key, value) in dict.iter() {
                    map.insert(key.to_owned(), value.to_json()?);
                }
                Value::Object(map)
            }
        })
    }
}

impl From<&Value> for Py {
    fn from(value: &Value) -> Py {
        match value {
            Value::Null => Py::None,
            Value::Bool(value) => Py::Bool(*value),
            Value::Number(number) => match (number.as_i64(), number.as_u64()) {
                (Some(small), _) => Py::Int(small.into()),
                (None, Some(large)) => Py::Int(large.into()),
                (None, None) => Py::Float(number.as_f64().unwrap_or(f64::NAN)),
            },
            Value::String(text) => Py::Str(text.clone()),
            Value::Array(items) => Py::List(items.iter().map(Py::from).collect()),
            Value::Object(map) => {
                let mut dict = Dict::default();
                for (key, value) in map {
                    dict.insert(key.clone(), Py::from(value));
                }
                Py::Dict(dict)
            }
        }
    }
}

/// Python's `==`: numbers by value whatever their type, lists and tuples apart, dicts in any order.
impl PartialEq for Py {
    fn eq(&self, other: &Py) -> bool {
        match (self, other) {
            (Py::None, Py::None) => true,
            (Py::Str(a), Py::Str(b)) => a == b,
            (Py::List(a), Py::List(b)) | (Py::Tuple(a), Py::Tuple(b)) => a == b,
            (Py::Dict(a), Py::Dict(b)) => {
                a.len() == b.len() && a.iter().all(|(key, value)| b.get(key).is_some_and(|v| v == value))
            }
            (Py::Float(a), Py::Float(b)) => a == b,
            (Py::Float(a), b) | (b, Py::Float(a)) => match b.as_integer() {
                Some(b) => a.fract() == 0.0 && BigInt::from_f64(*a).is_some_and(|a| a == b),
                None => false,
            },
            (a, b) => match (a.as_integer(), b.as_integer()) {
                (Some(a), Some(b)) => a == b,
                _ => false,
            },
        }
    }
}

impl Py {
    fn as_integer(&self) -> Option<BigInt> {
        match self {
            Py::Bool(value) => Some(BigInt::from(u8::from(*value))),
            Py::Int(value) => Some(value.clone()),
            _ => None,
        }
    }
}

/// Python's `str.isspace` for one character.
pub(crate) fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\x1c'..='\x1f').contains(&c)
}

/// Python's `str.strip()`.
pub(crate) fn strip(text: &str) -> &str {
    text.trim_matches(is_space)
}

/// An integer literal of decimal digits, within CPython's limit.
pub(crate) fn integer(digits: &str) -> Option<BigInt> {
    let count = digits.bytes().filter(u8::is_ascii_digit).count();
    if count == 0 || count > MAX_INT_DIGITS {
        return None;
    }
    digits.parse().ok()
}

/// `json.loads`: the whole text is one JSON value, white space aside. None on any error.
pub(crate) fn loads(text: &str) -> Option<Py> {
    let mut reader = Reader { text: text.as_bytes(), at: 0 };
    reader.space();
    let value = reader.value(0)?;
    reader.space();
    (reader.at == text.len()).then_some(value)
}

/// `JSONDecoder.raw_decode`: one JSON value at the very start, and the byte offset behind it.
pub(crate) fn raw_decode(text: &str) -> Option<(Py, usize)> {
    let mut reader = Reader { text: text.as_bytes(), at: 0 };
    let value = reader.value(0)?;
    Some((value, reader.at))
}

struct Reader<'a> {
    text: &'a [u8],
    at: usize,
}

impl Reader<'_> {
    fn peek(&self) -> Option<u8> {
        self.text.get(self.at).copied()
    }

    fn eat(&mut self, word: &str) -> bool {
        let found = self.text[self.at..].starts_with(word.as_bytes());
        if found {
            self.at += word.len();
        }
        found
    }

    fn space(&mut self) {
        while matches!(self.peek(), Some(b' ' | b'\t' | b'\n' | b'\r')) {
            self.at += 1;
        }
    }

    fn value(&mut self, depth: usize) -> Option<Py> {
        if depth > MAX_DEPTH {
            return None;
        }
        match self.peek()? {
            b'"' => self.string().map(Py::Str),
            b'{' => self.object(depth),
            b'[' => self.array(depth),
            b'n' => self.eat("null").then_some(Py::None),
            b't' => self.eat("true").then_some(Py::Bool(true)),
            b'f' => self.eat("false").then_some(Py::Bool(false)),
            b'N' => self.eat("NaN").then_some(Py::Float(f64::NAN)),
            b'I' => self.eat("Infinity").then_some(Py::Float(f64::INFINITY)),
            b'-' if self.text[self.at..].starts_with(b"-Infinity") => {
                self.at += "-Infinity".len();
                Some(Py::Float(f64::NEG_INFINITY))
            }
            b'-' | b'0'..=b'9' => self.number(),
            _ => None,
        }
    }

    fn object(&mut self, depth: usize) -> Option<Py> {
        self.at += 1;
        let mut dict = Dict::default();
        self.space();
        if self.eat("}") {
            return Some(Py::Dict(dict));
        }
        loop {
            self.space();
            let key = if self.peek() == Some(b'"') { self.string()? } else { return None };
            self.space();
            if !self.eat(":") {
                return None;
            }
            self.space();
            let value = self.value(depth + 1)?;
            dict.insert(key, value);
            self.space();
            if self.eat("}") {
                return Some(Py::Dict(dict));
            }
            if !self.eat(",") {
                return None;
            }
        }
    }

    fn array(&mut self, depth: usize) -> Option<Py> {
        self.at += 1;
        let mut items = Vec::new();
        self.space();
        if self.eat("]") {
            return Some(Py::List(items));
        }
        loop {
            self.space();
            items.push(self.value(depth + 1)?);
            self.space();
            if self.eat("]") {
                return Some(Py::List(items));
            }
            if !self.eat(",") {
                return None;
            }
        }
    }

    /// A string; control characters are errors, a lone surrogate becomes U+FFFD.
    fn string(&mut self) -> Option<String> {
        self.at += 1;
        let mut out = Vec::new();
        loop {
            let c = self.peek()?;
            self.at += 1;
            match c {
                b'"' => return String::from_utf8(out).ok(),
                b'\\' => {
                    let escape = self.peek()?;
                    self.at += 1;
                    match escape {
                        b'"' | b'\\' | b'/' => out.push(escape),
                        b'b' => out.push(8),
                        b'f' => out.push(12),
                        b'n' => out.push(b'\n'),
                        b'r' => out.push(b'\r'),
                        b't' => out.push(b'\t'),
                        b'u' => {
                            let c = self.unicode()?;
                            out.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes());
                        }
                        _ => return None,
                    }
                }
                0..=0x1f => return None,
                _ => out.push(c),
            }
        }
    }

    fn hex4(&mut self) -> Option<u32> {
        let digits = self.text.get(self.at..self.at + 4)?;
        if !digits.iter().all(u8::is_ascii_hexdigit) {
            return None;
        }
        self.at += 4;
        u32::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()
    }

    fn unicode(&mut self) -> Option<char> {
        let high = self.hex4()?;
        if (0xd800..0xdc00).contains(&high) && self.text[self.at..].starts_with(b"\\u") {
            let rewind = self.at;
            self.at += 2;
            match self.hex4() {
                Some(low) if (0xdc00..0xe000).contains(&low) => {
                    return char::from_u32(0x10000 + ((high - 0xd800) << 10) + (low - 0xdc00));
                }
                _ => self.at = rewind,
            }
        }
        Some(char::from_u32(high).unwrap_or('\u{fffd}'))
    }

    fn digits(&mut self) -> usize {
        let start = self.at;
        while matches!(self.peek(), Some(b'0'..=b'9')) {
            self.at += 1;
        }
        self.at - start
    }

    fn number(&mut self) -> Option<Py> {
        let start = self.at;
        self.eat("-");
        if !self.eat("0") && self.digits() == 0 {
            return None;
        }
        let mut float = false;
        let rewind = self.at;
        if self.eat(".") {
            if self.digits() == 0 {
                self.at = rewind;
            } else {
                float = true;
            }
        }
        let rewind = self.at;
        if matches!(self.peek(), Some(b'e' | b'E')) {
            self.at += 1;
            if matches!(self.peek(), Some(b'+' | b'-')) {
                self.at += 1;
            }
            if self.digits() == 0 {
                self.at = rewind;
            } else {
                float = true;
            }
        }
        let text = std::str::from_utf8(&self.text[start..self.at]).ok()?;
        if float { text.parse().ok().map(Py::Float) } else { integer(text).map(Py::Int) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_compare_by_value_and_keep_their_type() {
        assert_eq!(loads("2").unwrap(), loads("2.0").unwrap());
        assert_eq!(loads("true").unwrap(), loads("1").unwrap());
        assert_ne!(loads("9007199254740993").unwrap(), loads("9007199254740992.0").unwrap());
        assert_eq!(loads("2.0").unwrap().kind(), PyType::Float);
        assert_ne!(loads("[1]").unwrap(), loads("1").unwrap());
    }

    #[test]
    fn json_is_read_as_python_reads_it() {
        assert!(matches!(loads("NaN"), Some(Py::Float(x)) if x.is_nan()));
        assert!(loads("{\"a\": 1,}").is_none());
        assert!(loads("01").is_none());
        assert!(loads("\"a\nb\"").is_none());
        assert_eq!(loads("\"\\ud83d\\ude00\"").unwrap(), Py::Str("😀".into()));
        assert_eq!(loads("{\"a\": 1, \"a\": 2}").unwrap().as_dict().unwrap().len(), 1);
        assert!(loads(&"[".repeat(100_000)).is_none());
        assert!(loads(&"9".repeat(5_000)).is_none());
        assert_eq!(raw_decode("{\"a\": 1} tail").unwrap().1, 8);
    }
}
