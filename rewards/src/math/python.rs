//! Strict readers for what Python accepts: arithmetic expressions, `int`, `float`, `Decimal`.

use super::expr::{Expr, Fun};
use super::number;
use num_bigint::BigInt;
use num_rational::BigRational;
use num_traits::Num;

/// Characters of the longest text that is read.
const MAX_TEXT: usize = 2_000;
const MAX_DEPTH: usize = 60;

/// Parses `10*x**7 + sin(x)/3`: no implied products, no `^`, names of any length.
pub(crate) fn expression(text: &str) -> Option<Expr> {
    let text = text.trim();
    if text.is_empty() || text.len() > MAX_TEXT || !text.is_ascii() {
        return None;
    }
    let mut reader = Reader { bytes: text.as_bytes(), at: 0, depth: 0 };
    let expr = reader.sum()?;
    reader.skip();
    (reader.at == text.len()).then_some(expr)
}

struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
    depth: usize,
}

impl Reader<'_> {
    fn skip(&mut self) {
        while self.bytes.get(self.at).is_some_and(u8::is_ascii_whitespace) {
            self.at += 1;
        }
    }

    fn peek(&mut self) -> Option<u8> {
        self.skip();
        self.bytes.get(self.at).copied()
    }

    fn take(&mut self, sign: &[u8]) -> bool {
        self.skip();
        let hit = self.bytes[self.at..].starts_with(sign);
        self.at += if hit { sign.len() } else { 0 };
        hit
    }

    fn word(&mut self, good: impl Fn(u8) -> bool) -> String {
        let start = self.at;
        while self.bytes.get(self.at).is_some_and(|&b| good(b)) {
            self.at += 1;
        }
        self.bytes[start..self.at].iter().map(|&b| b as char).collect()
    }

    fn sum(&mut self) -> Option<Expr> {
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return None;
        }
        let mut terms = vec![self.product()?];
        while let Some(sign @ (b'+' | b'-')) = self.peek() {
            self.at += 1;
            let term = self.product()?;
            terms.push(if sign == b'-' { Expr::Neg(Box::new(term)) } else { term });
        }
        self.depth -= 1;
        if terms.len() == 1 { terms.pop() } else { Some(Expr::Add(terms)) }
    }

    fn product(&mut self) -> Option<Expr> {
        let mut left = self.signed()?;
        loop {
            if self.take(b"//") {
                let right = self.signed()?;
                left = Expr::Call(Fun::Floor, vec![Expr::Div(Box::new(left), Box::new(right))]);
            } else if self.take(b"/") {
                let right = self.signed()?;
                left = Expr::Div(Box::new(left), Box::new(right));
            } else if self.peek() == Some(b'*') && self.bytes.get(self.at + 1) != Some(&b'*') {
                self.at += 1;
                let right = self.signed()?;
                left = Expr::Mul(vec![left, right]);
            } else {
                return Some(left);
            }
        }
    }

    fn signed(&mut self) -> Option<Expr> {
        let mut negative = false;
        while let Some(sign @ (b'+' | b'-')) = self.peek() {
            self.at += 1;
            negative ^= sign == b'-';
        }
        let value = self.power()?;
        Some(if negative { Expr::Neg(Box::new(value)) } else { value })
    }

    fn power(&mut self) -> Option<Expr> {
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return None;
        }
        let base = self.atom()?;
        let value = if self.take(b"**") {
            let exponent = self.signed()?;
            Expr::Pow(Box::new(base), Box::new(exponent))
        } else {
            base
        };
        self.depth -= 1;
        Some(value)
    }

    fn atom(&mut self) -> Option<Expr> {
        match self.peek()? {
            b'(' => {
                self.at += 1;
                let inner = self.sum()?;
                self.take(b")").then_some(inner)
            }
            b'0'..=b'9' | b'.' => {
                let mut text = self.word(|b| b.is_ascii_digit() || b == b'.');
                if matches!(self.bytes.get(self.at), Some(b'e' | b'E')) {
                    text.push('e');
                    self.at += 1;
                    if matches!(self.bytes.get(self.at), Some(b'+' | b'-')) {
                        text.push(self.bytes[self.at] as char);
                        self.at += 1;
                    }
                    text.push_str(&self.word(|b| b.is_ascii_digit()));
                }
                let ends = !self.bytes.get(self.at).is_some_and(|b| b.is_ascii_alphabetic() || *b == b'_');
                let one_point = text.matches('.').count() <= 1 && text != ".";
                let value = number::exact(&text).filter(|_| ends && one_point)?;
                Some(Expr::Num { value, decimal: text.contains('.') })
            }
            b if b.is_ascii_alphabetic() || b == b'_' => {
                let name = self.word(|b| b.is_ascii_alphanumeric() || b == b'_');
                if self.peek() != Some(b'(') {
                    return Some(match name.as_str() {
                        "pi" => Expr::Pi,
                        "E" => Expr::E,
                        "I" => Expr::I,
                        _ => Expr::Sym(name),
                    });
                }
                self.at += 1;
                let argument = self.sum()?;
                if !self.take(b")") {
                    return None;
                }
                let fun = match name.as_str() {
                    "sin" => Fun::Sin,
                    "cos" => Fun::Cos,
                    "tan" => Fun::Tan,
                    "log" | "ln" => Fun::Ln,
                    "exp" => return Some(Expr::Pow(Box::new(Expr::E), Box::new(argument))),
                    "sqrt" => return Some(Expr::Root(Box::new(argument), Box::new(Expr::int(2)))),
                    "abs" | "Abs" => Fun::Abs,
                    _ => return None,
                };
                Some(Expr::Call(fun, vec![argument]))
            }
            _ => None,
        }
    }
}

/// Digits with single underscores between them, as Python writes long numbers.
fn without_underscores(text: &str) -> Option<String> {
    let good = !text.starts_with('_') && !text.ends_with('_') && !text.contains("__");
    (good && text.len() <= MAX_TEXT).then(|| text.replace('_', ""))
}

/// `int(text)`.
pub(crate) fn int(text: &str) -> Option<BigInt> {
    int_of_base(text, 10)
}

fn int_of_base(text: &str, base: u32) -> Option<BigInt> {
    let text = text.trim();
    let digits = text.strip_prefix(['+', '-']).unwrap_or(text);
    let digits = without_underscores(digits)?;
    if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_alphanumeric()) {
        return None;
    }
    let value = BigInt::from_str_radix(&digits, base).ok()?;
    Some(if text.starts_with('-') { -value } else { value })
}

/// `int(text, 0)`: the base is read from a prefix.
pub(crate) fn int_any_base(text: &str) -> Option<BigInt> {
    let text = text.trim();
    let (negative, rest) = match text.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, text.strip_prefix('+').unwrap_or(text)),
    };
    let lower = rest.to_ascii_lowercase();
    let (digits, base) = match lower.get(..2) {
        Some("0x") => (&lower[2..], 16),
        Some("0o") => (&lower[2..], 8),
        Some("0b") => (&lower[2..], 2),
        _ => (&lower[..], 10),
    };
    if digits.starts_with(['+', '-'])
        || base == 10 && digits.len() > 1 && digits.starts_with('0') && !digits.trim_matches('0').is_empty()
    {
        return None;
    }
    let value = int_of_base(digits, base)?;
    Some(if negative { -value } else { value })
}

/// `float(text)`.
pub(crate) fn float(text: &str) -> Option<f64> {
    let text = without_underscores(text.trim())?;
    let bare = text.trim_start_matches(['+', '-']);
    let word = ["inf", "infinity", "nan"].contains(&bare.to_ascii_lowercase().as_str());
    (word || bare.starts_with(|c: char| c.is_ascii_digit() || c == '.')).then(|| text.parse().ok())?
}

/// `Decimal(text)` where it is finite.
pub(crate) fn decimal(text: &str) -> Option<BigRational> {
    let text = without_underscores(text.trim())?;
    let (negative, bare) = match text.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, text.strip_prefix('+').unwrap_or(&text)),
    };
    let (mantissa, exponent) = bare.split_once(['e', 'E']).unwrap_or((bare, "0"));
    let digits = mantissa.bytes().filter(u8::is_ascii_digit).count();
    let shape = digits > 0
        && mantissa.bytes().all(|b| b.is_ascii_digit() || b == b'.')
        && mantissa.matches('.').count() <= 1
        && exponent.parse::<i64>().is_ok();
    let value = number::exact(bare).filter(|_| shape)?;
    Some(if negative { -value } else { value })
}
