//! Python call expressions as models write them: `[f(a='x', n=3), g()]`.
//!
//! A recursive-descent reader for the part of Python's expression grammar that tool calls use: literals, containers,
//! dotted names, calls, arithmetic on constants. Anything else is a syntax error or [`Expr::Other`]; nothing is evaluated
//! but constants. Depth is limited and the work is linear in the text.

use super::py::{self, Dict, MAX_DEPTH, Py};
use num_bigint::BigInt;
use num_traits::{Num, ToPrimitive, Zero};
use std::ops::Range;

/// An expression; `Other` is one that is legal but has no value as an argument.
#[derive(Debug, Clone)]
pub(crate) enum Expr {
    Const(Py),
    Name(String),
    List(Vec<Expr>),
    Tuple(Vec<Expr>),
    Dict(Vec<(Expr, Expr)>),
    Call(Call),
    /// A subscript: legal, without a value; byte range of its text.
    Source(Range<usize>),
    Other,
}

/// `name(positional…, key=value…)`: positional values are only counted; `source` is the byte range of the whole call.
#[derive(Debug, Clone)]
pub(crate) struct Call {
    pub(crate) name: String,
    pub(crate) positional: usize,
    pub(crate) keywords: Vec<(String, Expr)>,
    pub(crate) source: Range<usize>,
}

/// The whole text as one expression; None if it is not.
pub(crate) fn parse(text: &str) -> Option<Expr> {
    let mut parser = Parser { text, at: 0, depth: 0 };
    let expr = parser.tuple_or_expr()?;
    parser.space();
    (parser.at == text.len()).then_some(expr)
}

/// A list of calls `[f(..), g(..)]` or a single call `f(..)`.
pub(crate) fn parse_calls(text: &str) -> Option<Vec<Call>> {
    let as_call = |expr| match expr {
        Expr::Call(call) => Some(call),
        _ => None,
    };
    match parse(text)? {
        Expr::Call(call) => Some(vec![call]),
        Expr::List(items) | Expr::Tuple(items) => items.into_iter().map(as_call).collect(),
        _ => None,
    }
}

struct Parser<'a> {
    text: &'a str,
    at: usize,
    depth: usize,
}

impl Parser<'_> {
    fn peek(&self) -> Option<char> {
        self.text[self.at..].chars().next()
    }

    fn space(&mut self) {
        while let Some(c) = self.peek() {
            if matches!(c, ' ' | '\t' | '\n' | '\r' | '\x0c') {
                self.at += c.len_utf8();
            } else if c == '#' {
                let rest = &self.text[self.at..];
                self.at += rest.find('\n').unwrap_or(rest.len());
            } else {
                break;
            }
        }
    }

    /// Skips white space, then takes `token` if it comes next.
    fn eat(&mut self, token: &str) -> bool {
        self.space();
        let found = self.text[self.at..].starts_with(token);
        if found {
            self.at += token.len();
        }
        found
    }

    fn tuple_or_expr(&mut self) -> Option<Expr> {
        let first = self.expr()?;
        if !self.eat(",") {
            return Some(first);
        }
        let mut items = vec![first];
        loop {
            self.space();
            if self.at == self.text.len() || matches!(self.peek(), Some(')' | ']' | '}')) {
                return Some(Expr::Tuple(items));
            }
            items.push(self.expr()?);
            if !self.eat(",") {
                return Some(Expr::Tuple(items));
            }
        }
    }

    fn expr(&mut self) -> Option<Expr> {
        if self.depth > MAX_DEPTH {
            return None;
        }
        self.depth += 1;
        let expr = self.sum();
        self.depth -= 1;
        expr
    }

    fn sum(&mut self) -> Option<Expr> {
        let mut left = self.product()?;
        loop {
            self.space();
            let op = match self.peek() {
                Some(op @ ('+' | '-')) => op,
                _ => return Some(left),
            };
            self.at += 1;
            left = fold(op, left, self.product()?);
        }
    }

    fn product(&mut self) -> Option<Expr> {
        let mut left = self.unary()?;
        loop {
            self.space();
            let rest = &self.text[self.at..];
            let (op, len) = if rest.starts_with("**") {
                return None;
            } else if rest.starts_with("//") {
                ('i', 2)
            } else {
                match self.peek() {
                    Some(op @ ('*' | '/' | '%')) => (op, 1),
                    _ => return Some(left),
                }
            };
            self.at += len;
            left = fold(op, left, self.unary()?);
        }
    }

    fn unary(&mut self) -> Option<Expr> {
        self.space();
        let mut negative = false;
        let mut signed = false;
        while let Some(c @ ('-' | '+')) = self.peek() {
            signed = true;
            negative ^= c == '-';
            self.at += 1;
            self.space();
        }
        let operand = self.power()?;
        if !signed {
            return Some(operand);
        }
        Some(match operand {
            Expr::Const(Py::Int(value)) => Expr::Const(Py::Int(if negative { -value } else { value })),
            Expr::Const(Py::Float(value)) => Expr::Const(Py::Float(if negative { -value } else { value })),
            _ => Expr::Other,
        })
    }

    fn power(&mut self) -> Option<Expr> {
        let base = self.trailers()?;
        if !self.eat("**") {
            return Some(base);
        }
        self.depth += 1;
        let exponent = if self.depth > MAX_DEPTH { None } else { self.unary() };
        self.depth -= 1;
        Some(fold('p', base, exponent?))
    }

    fn trailers(&mut self) -> Option<Expr> {
        self.space();
        let start = self.at;
        let mut expr = self.atom()?;
        loop {
            self.space();
            match self.peek() {
                Some('.') => {
                    self.at += 1;
                    self.space();
                    let attribute = self.identifier()?;
                    expr = match expr {
                        Expr::Name(mut name) => {
                            name.push('.');
                            name.push_str(&attribute);
                            Expr::Name(name)
                        }
                        _ => Expr::Other,
                    };
                }
                Some('(') => {
                    let (positional, keywords) = self.arguments()?;
                    expr = match expr {
                        Expr::Name(name) => {
                            Expr::Call(Call { name, positional, keywords, source: start..self.at })
                        }
                        _ => Expr::Other,
                    };
                }
                Some('[') => {
                    self.at += 1;
                    self.tuple_or_expr()?;
                    if !self.eat("]") {
                        return None;
                    }
                    expr = match expr {
                        Expr::Name(_) => Expr::Source(start..self.at),
                        _ => Expr::Other,
                    };
                }
                _ => return Some(expr),
            }
        }
    }

    /// `(…)` of a call: how many positional values, and the keywords; Python's reader lets a keyword repeat, and so does this.
    fn arguments(&mut self) -> Option<(usize, Vec<(String, Expr)>)> {
        self.at += 1;
        let mut positional = 0;
        let mut keywords: Vec<(String, Expr)> = Vec::new();
        loop {
            if self.eat(")") {
                return Some((positional, keywords));
            }
            self.space();
            let rewind = self.at;
            let key = self.identifier();
            let is_keyword = key.is_some() && self.eat("=") && self.peek() != Some('=');
            match key {
                Some(key) if is_keyword => {
                    let value = self.expr()?;
                    keywords.push((key, value));
                }
                _ => {
                    self.at = rewind;
                    self.expr()?;
                    positional += 1;
                    if !keywords.is_empty() {
                        return None;
                    }
                }
            }
            if self.eat(")") {
                return Some((positional, keywords));
            }
            if !self.eat(",") {
                return None;
            }
        }
    }

    fn atom(&mut self) -> Option<Expr> {
        self.space();
        match self.peek()? {
            '(' => {
                self.at += 1;
                if self.eat(")") {
                    return Some(Expr::Tuple(Vec::new()));
                }
                let inner = self.tuple_or_expr()?;
                self.eat(")").then_some(inner)
            }
            '[' => {
                self.at += 1;
                let mut items = Vec::new();
                loop {
                    if self.eat("]") {
                        return Some(Expr::List(items));
                    }
                    items.push(self.expr()?);
                    if !self.eat(",") {
                        return self.eat("]").then_some(Expr::List(items));
                    }
                }
            }
            '{' => self.braces(),
            '"' | '\'' => self.strings(),
            '.' if self.text[self.at..].starts_with("...") => {
                self.at += 3;
                Some(Expr::Const(Py::Str("...".into())))
            }
            '.' | '0'..='9' => self.number(),
            _ => {
                if self.string_prefix().is_some() {
                    return self.strings();
                }
                match self.identifier()?.as_str() {
                    "True" => Some(Expr::Const(Py::Bool(true))),
                    "False" => Some(Expr::Const(Py::Bool(false))),
                    "None" => Some(Expr::Const(Py::None)),
                    "lambda" | "not" | "and" | "or" | "if" | "else" | "for" | "in" | "is" | "await"
                    | "yield" => None,
                    name => Some(Expr::Name(name.to_owned())),
                }
            }
        }
    }

    /// A dict, or a set (which has no value here).
    fn braces(&mut self) -> Option<Expr> {
        self.at += 1;
        let mut entries = Vec::new();
        let mut set = false;
        loop {
            if self.eat("}") {
                return Some(if set { Expr::Other } else { Expr::Dict(entries) });
            }
            let key = self.expr()?;
            if self.eat(":") {
                if set {
                    return None;
                }
                let value = self.expr()?;
                entries.push((key, value));
            } else if entries.is_empty() {
                set = true;
            } else {
                return None;
            }
            if !self.eat(",") && !self.text[self.at..].starts_with('}') {
                return None;
            }
        }
    }

    fn identifier(&mut self) -> Option<String> {
        let rest = &self.text[self.at..];
        let mut end = 0;
        for (i, c) in rest.char_indices() {
            let legal = c == '_' || c.is_alphabetic() || (i > 0 && c.is_alphanumeric());
            if !legal {
                break;
            }
            end = i + c.len_utf8();
        }
        self.at += end;
        (end > 0).then(|| rest[..end].to_owned())
    }

    /// Length of `r`, `b`, `f`, `u` and their pairs, when a quote follows.
    fn string_prefix(&self) -> Option<usize> {
        let rest = &self.text.as_bytes()[self.at..];
        let len = rest.iter().take_while(|c| b"rRbBfFuU".contains(c)).count();
        (len <= 2 && matches!(rest.get(len), Some(b'"' | b'\''))).then_some(len)
    }

    /// One or more adjacent string literals; bytes and f-strings have no value here.
    fn strings(&mut self) -> Option<Expr> {
        let mut out = String::new();
        let mut plain = true;
        loop {
            let prefix_len = self.string_prefix()?;
            let prefix = self.text[self.at..self.at + prefix_len].to_ascii_lowercase();
            self.at += prefix_len;
            plain &= !prefix.contains(['b', 'f']);
            self.string(prefix.contains('r'), &mut out)?;
            self.space();
            if self.string_prefix().is_none() {
                return Some(if plain { Expr::Const(Py::Str(out)) } else { Expr::Other });
            }
        }
    }

    fn string(&mut self, raw: bool, out: &mut String) -> Option<()> {
        let quote = self.peek()?;
        let triple: String = std::iter::repeat_n(quote, 3).collect();
        let long = self.text[self.at..].starts_with(&triple);
        self.at += if long { 3 } else { 1 };
        loop {
            if long && self.text[self.at..].starts_with(&triple) {
                self.at += 3;
                return Some(());
            }
            let c = self.peek()?;
            self.at += c.len_utf8();
            match c {
                '\\' if raw => {
                    out.push('\\');
                    let next = self.peek()?;
                    self.at += next.len_utf8();
                    out.push(next);
                }
                '\\' => self.escape(out)?,
                '\n' if !long => return None,
                c if c == quote && !long => return Some(()),
                c => out.push(c),
            }
        }
    }

    fn escape(&mut self, out: &mut String) -> Option<()> {
        let c = self.peek()?;
        self.at += c.len_utf8();
        match c {
            '\n' => {}
            '\\' | '\'' | '"' => out.push(c),
            'a' => out.push('\x07'),
            'b' => out.push('\x08'),
            'f' => out.push('\x0c'),
            'n' => out.push('\n'),
            'r' => out.push('\r'),
            't' => out.push('\t'),
            'v' => out.push('\x0b'),
            'x' => self.code_point(2, out)?,
            'u' => self.code_point(4, out)?,
            'U' => self.code_point(8, out)?,
            '0'..='7' => {
                let mut value = c.to_digit(8)?;
                for _ in 0..2 {
                    match self.peek().and_then(|c| c.to_digit(8)) {
                        Some(digit) => {
                            value = value * 8 + digit;
                            self.at += 1;
                        }
                        None => break,
                    }
                }
                out.push(char::from_u32(value)?);
            }
            other => {
                out.push('\\');
                out.push(other);
            }
        }
        Some(())
    }

    fn code_point(&mut self, digits: usize, out: &mut String) -> Option<()> {
        let text = self.text.get(self.at..self.at + digits)?;
        if !text.bytes().all(|c| c.is_ascii_hexdigit()) {
            return None;
        }
        self.at += digits;
        out.push(char::from_u32(u32::from_str_radix(text, 16).ok()?).unwrap_or('\u{fffd}'));
        Some(())
    }

    fn number(&mut self) -> Option<Expr> {
        let rest = &self.text[self.at..];
        let radix = match rest.as_bytes() {
            [b'0', b'x' | b'X', ..] => 16,
            [b'0', b'o' | b'O', ..] => 8,
            [b'0', b'b' | b'B', ..] => 2,
            _ => 10,
        };
        if radix != 10 {
            let len = rest[2..].bytes().take_while(|c| c.is_ascii_hexdigit() || *c == b'_').count();
            self.at += 2 + len;
            let digits = rest[2..2 + len].replace('_', "");
            let short = digits.len() <= 4096;
            return BigInt::from_str_radix(&digits, radix)
                .ok()
                .filter(|_| short)
                .map(|v| Expr::Const(Py::Int(v)));
        }
        let bytes = rest.as_bytes();
        let run = |mut i: usize| {
            while bytes.get(i).is_some_and(|c| c.is_ascii_digit() || *c == b'_') {
                i += 1;
            }
            i
        };
        let mut end = run(0);
        let mut float = false;
        if bytes.get(end) == Some(&b'.') {
            float = true;
            end = run(end + 1);
        }
        if matches!(bytes.get(end), Some(b'e' | b'E')) {
            let sign = usize::from(matches!(bytes.get(end + 1), Some(b'+' | b'-')));
            let stop = run(end + 1 + sign);
            if stop > end + 1 + sign {
                float = true;
                end = stop;
            }
        }
        let digits = rest[..end].replace('_', "");
        self.at += end;
        if matches!(self.peek(), Some('j' | 'J')) {
            self.at += 1;
            return Some(Expr::Other);
        }
        if self.peek().is_some_and(|c| c == '_' || c.is_alphanumeric()) || digits == "." {
            return None;
        }
        if float {
            return digits.parse().ok().map(|value| Expr::Const(Py::Float(value)));
        }
        if digits.len() > 1 && digits.starts_with('0') && digits.bytes().any(|c| c != b'0') {
            return None;
        }
        py::integer(&digits).map(|value| Expr::Const(Py::Int(value)))
    }
}

/// Arithmetic on two constants; anything else has no value.
fn fold(op: char, left: Expr, right: Expr) -> Expr {
    let (Expr::Const(mut left), Expr::Const(right)) = (left, right) else {
        return Expr::Other;
    };
    if let (Py::Int(a), Py::Int(b)) = (&left, &right) {
        let small = a.bits() + b.bits() <= 512;
        let value = match op {
            '+' if small => Some(a + b),
            '-' if small => Some(a - b),
            '*' if small => Some(a * b),
            'i' if small && !b.is_zero() => Some(floor_div(a, b)),
            '%' if small && !b.is_zero() => Some(a - b * floor_div(a, b)),
            'p' => b.to_u32().filter(|e| a.bits() * u64::from(*e) <= 512).map(|e| a.pow(e)),
            _ => None,
        };
        if let Some(value) = value {
            return Expr::Const(Py::Int(value));
        }
    }
    if let (Py::Str(a), Py::Str(b), '+') = (&mut left, &right, op) {
        a.push_str(b);
        return Expr::Const(left);
    }
    let (Some(a), Some(b)) = (left.as_number(), right.as_number()) else {
        return Expr::Other;
    };
    let value = match op {
        '+' => a + b,
        '-' => a - b,
        '*' => a * b,
        '/' if b != 0.0 => a / b,
        'i' if b != 0.0 => (a / b).floor(),
        '%' if b != 0.0 => a - b * (a / b).floor(),
        'p' => a.powf(b),
        _ => return Expr::Other,
    };
    if value.is_finite() { Expr::Const(Py::Float(value)) } else { Expr::Other }
}

fn floor_div(a: &BigInt, b: &BigInt) -> BigInt {
    let quotient = a / b;
    let exact = &quotient * b == *a;
    if !exact && (a.sign() != b.sign()) { quotient - 1 } else { quotient }
}

/// What a bare name stands for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Names {
    /// Nothing: it has no value.
    Reject,
    /// `true`, `false` and `null` for their values.
    JsonWords,
    /// Its own text.
    Text,
}

/// The JSON-like value of a literal expression.
pub(crate) fn literal(expr: &Expr, names: Names) -> Option<Py> {
    let all = |items: &[Expr]| items.iter().map(|item| literal(item, names)).collect::<Option<Vec<Py>>>();
    match expr {
        Expr::Const(value) => Some(value.clone()),
        Expr::List(items) => all(items).map(Py::List),
        Expr::Tuple(items) => all(items).map(Py::Tuple),
        Expr::Dict(entries) => {
            let mut dict = Dict::default();
            for (key, value) in entries {
                dict.insert(key_text(&literal(key, names)?)?, literal(value, names)?);
            }
            Some(Py::Dict(dict))
        }
        Expr::Name(name) => match (names, name.as_str()) {
            (Names::Text, text) => Some(Py::Str(text.to_owned())),
            (Names::JsonWords, "true") => Some(Py::Bool(true)),
            (Names::JsonWords, "false") => Some(Py::Bool(false)),
            (Names::JsonWords, "null") => Some(Py::None),
            _ => None,
        },
        _ => None,
    }
}

/// A dict key as `json.dumps` writes it.
pub(crate) fn key_text(key: &Py) -> Option<String> {
    match key {
        Py::Str(text) => Some(text.clone()),
        Py::None => Some("null".into()),
        Py::Bool(value) => Some(value.to_string()),
        Py::Int(value) => Some(value.to_string()),
        Py::Float(value) => Some(format!("{value:?}")),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_are_read_with_their_literals() {
        let calls = parse_calls(
            "[a.b(x='it\\'s', n=-3, f=1e3, t=(1, 2), d={'k': [None, True]}, s=\"a\" 'b'), g(1), h(e=2*3+1)]",
        )
        .unwrap();
        assert_eq!(calls.len(), 3);
        assert_eq!(calls[0].name, "a.b");
        let values: Vec<_> =
            calls[0].keywords.iter().map(|(_, e)| literal(e, Names::Reject).unwrap()).collect();
        assert_eq!(values[0], Py::Str("it's".into()));
        assert_eq!(values[1], Py::Int((-3).into()));
        assert_eq!(values[5], Py::Str("ab".into()));
        assert_eq!(literal(&calls[2].keywords[0].1, Names::Reject).unwrap(), Py::Int(7.into()));
    }

    #[test]
    fn what_python_refuses_is_refused() {
        for text in ["[f(a=1]", "f(a=1, 2)", "hello world", "[f(a=01)]", "f(a='x)", "", "f(a=1) g()"] {
            assert!(parse_calls(text).is_none(), "{text}");
        }
        assert!(parse(&"[".repeat(100_000)).is_none());
        assert!(parse(&"1+".repeat(400_000)).is_none());
        assert!(parse(&"-".repeat(400_000)).is_none());
        assert!(parse(&"2**".repeat(400_000)).is_none());
    }
}
