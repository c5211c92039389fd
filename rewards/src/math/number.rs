//! Plain numbers: the fast path of comparison, and digits to exact rationals.

use num_bigint::BigInt;
use num_rational::BigRational;
use num_traits::{One, Zero};

/// Digits a number may have in all before it is refused.
pub(crate) const MAX_DIGITS: usize = 4000;
/// Largest power of ten that a written exponent may shift by.
const MAX_SHIFT: i64 = 1000;

/// A decimal of at most 30 digits: `(-1)^negative * digits * 10^-places`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Plain {
    negative: bool,
    digits: u128,
    places: u32,
    /// A decimal point was written.
    pub(crate) decimal: bool,
}

impl Plain {
    /// Reads `-1,234.50`, `+7`, `.5`, `12.`; no currency, exponent or spaces inside.
    pub(crate) fn read(text: &str) -> Option<Plain> {
        let bytes = text.trim_ascii().as_bytes();
        let (negative, bytes) = match bytes {
            [b'-', rest @ ..] => (true, rest),
            [b'+', rest @ ..] => (false, rest),
            rest => (false, rest),
        };
        if bytes.is_empty() || bytes.len() > 40 {
            return None;
        }
        let mut plain = Plain { negative, digits: 0, places: 0, decimal: false };
        let (mut count, mut group, mut grouped) = (0, 0, false);
        for (at, &byte) in bytes.iter().enumerate() {
            match byte {
                b'0'..=b'9' => {
                    plain.digits = plain.digits * 10 + u128::from(byte - b'0');
                    count += 1;
                    group += 1;
                    plain.places += u32::from(plain.decimal);
                }
                b',' if !plain.decimal => {
                    let first =
                        if grouped { group == 3 } else { (1..=3).contains(&group) && bytes[0] != b'0' };
                    if !first {
                        return None;
                    }
                    grouped = true;
                    group = 0;
                }
                b'.' if !plain.decimal => {
                    if grouped && group != 3 {
                        return None;
                    }
                    plain.decimal = at + 1 < bytes.len();
                    if !plain.decimal && count == 0 {
                        return None;
                    }
                    if at + 1 == bytes.len() {
                        break;
                    }
                }
                _ => return None,
            }
        }
        if count == 0 || count > 30 || (grouped && !plain.decimal && group != 3) {
            return None;
        }
        Some(plain)
    }

    fn strip(mut self) -> Plain {
        while self.places > 0 && self.digits.is_multiple_of(10) {
            self.digits /= 10;
            self.places -= 1;
        }
        self.negative &= self.digits != 0;
        self
    }

    /// The nearest double.
    pub(crate) fn value(self) -> f64 {
        let size = self.digits as f64 / 10f64.powi(self.places as i32);
        if self.negative { -size } else { size }
    }

    /// Equal exactly, or to `rounding` places where both were written as decimals.
    pub(crate) fn equal(self, other: Plain, rounding: u32) -> bool {
        let (a, b) = (self.strip(), other.strip());
        if a.negative == b.negative && a.digits == b.digits && a.places == b.places {
            return true;
        }
        a.places > 0 && b.places > 0 && within(a.value(), b.value(), rounding)
    }
}

/// Agreement to `rounding` decimal places, counted from the leading digit for numbers below 1.
pub(crate) fn within(a: f64, b: f64, rounding: u32) -> bool {
    let scale = a.abs().max(b.abs()).min(1.0);
    (a - b).abs() < 0.5 * 10f64.powi(-(rounding.min(300) as i32)) * scale
}

/// A number written alone: sign, currency, thousands separators, decimals, exponent, percent
/// (a hundredth) or one fraction bar.
///
/// ```
/// use rft_rewards::math::parse_number;
/// assert_eq!(parse_number("$1,234.50"), Some(1234.5));
/// assert_eq!(parse_number("3/4"), Some(0.75));
/// assert_eq!(parse_number("12 apples"), None);
/// ```
pub fn parse_number(text: &str) -> Option<f64> {
    let text = text.trim();
    if let Some(plain) = Plain::read(text) {
        return Some(plain.value());
    }
    if text.len() > 400 {
        return None;
    }
    if let Some((top, bottom)) = text.split_once('/') {
        let (top, bottom) = (parse_number(top)?, parse_number(bottom)?);
        return Some(top / bottom).filter(|q| q.is_finite());
    }
    if let Some(head) = text.strip_suffix('%') {
        return parse_number(head.strip_suffix('\\').unwrap_or(head)).map(|n| n / 100.0);
    }
    let (sign, rest) = match text.strip_prefix(['-', '−']) {
        Some(rest) => (-1.0, rest),
        None => (1.0, text.strip_prefix('+').unwrap_or(text)),
    };
    let rest = rest.strip_prefix('\\').unwrap_or(rest);
    let rest = rest.strip_prefix(['$', '€', '£', '¥', '₹']).unwrap_or(rest).trim();
    if let Some(plain) = Plain::read(rest).filter(|_| !rest.starts_with(['-', '+'])) {
        return Some(sign * plain.value());
    }
    let shape = rest.starts_with(|c: char| c.is_ascii_digit() || c == '.')
        && rest.bytes().all(|b| b.is_ascii_digit() || matches!(b, b'.' | b'e' | b'E' | b'+' | b'-'));
    let value = rest.parse::<f64>().ok().filter(|_| shape)?;
    (value.is_finite()).then_some(sign * value)
}

/// `10^n`.
pub(crate) fn ten_to(n: usize) -> BigInt {
    num_traits::pow(BigInt::from(10), n)
}

/// Digits with an optional point and exponent, as the lexer writes them, to an exact number.
pub(crate) fn exact(text: &str) -> Option<BigRational> {
    let (mantissa, exponent) = match text.find(['e', 'E']) {
        Some(at) => (&text[..at], text[at + 1..].parse::<i64>().ok()?),
        None => (text, 0),
    };
    if mantissa.len() > MAX_DIGITS || exponent.abs() > MAX_SHIFT {
        return None;
    }
    let (whole, part) = mantissa.split_once('.').unwrap_or((mantissa, ""));
    let digits: BigInt = format!("{whole}{part}").parse().ok()?;
    let shift = exponent - part.len() as i64;
    if digits.is_zero() {
        return Some(BigRational::zero());
    }
    Some(if shift >= 0 {
        BigRational::from_integer(digits * ten_to(shift as usize))
    } else if part.bytes().all(|b| b == b'0') && exponent == 0 {
        BigRational::from_integer(digits / ten_to(part.len()))
    } else {
        BigRational::new(digits, ten_to(-shift as usize))
    })
}

/// `whole.head` followed by `period` for ever.
pub(crate) fn recurring(whole: &str, head: &str, period: &str) -> Option<BigRational> {
    if period.is_empty() || whole.len() + head.len() + period.len() > 300 {
        return None;
    }
    let all: BigInt = format!("{whole}{head}{period}").parse().ok()?;
    let start: BigInt = format!("0{whole}{head}").parse().ok()?;
    let bottom = ten_to(head.len()) * (ten_to(period.len()) - BigInt::one());
    Some(BigRational::new(all - start, bottom))
}
