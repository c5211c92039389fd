//! Scores of reasoning-gym's procedural tasks, as that package gives them.
//!
//! Source: reasoning-gym 0.1.25, `score_answer` of each task, behaviour only. The scores are theirs,
//! holes included (a number sort is right within one unit, 24 may be reached by truncation).

use super::compare;
use super::derivative::derivative;
use super::normal::Algebra;
use super::options::EqualOptions;
use super::python;
use num_bigint::BigInt;
use num_rational::BigRational;
use num_traits::{Signed, ToPrimitive, Zero};
use regex::Regex;
use std::sync::LazyLock;

/// Bytes of the longest answer that is parsed.
const MAX_PARSED: usize = 4_000;

/// An item of a task.
#[derive(Debug, Clone, Copy)]
pub struct GymItem<'a> {
    /// The task's name, e.g. `countdown`.
    pub task: &'a str,
    /// The question, from which some tasks read what they need.
    pub question: &'a str,
    /// The stored answer.
    pub gold: &'a str,
    /// Countdown: the numbers to use.
    pub numbers: &'a [i64],
    /// Countdown: the number to reach.
    pub target: Option<f64>,
}

/// Why an answer has no score.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum GymError {
    /// The task is not one of those described here.
    #[error("no score is known for the task {task:?}\n  hint: use `contained` for tasks scored by text")]
    UnknownTask {
        /// The name that was given.
        task: String,
    },
    /// The task's own scorer raises an error on such an answer.
    #[error("the task {task:?} does not score an answer like {answer:?}\n  hint: expected {expected}")]
    Unscorable {
        /// The task.
        task: String,
        /// The answer.
        answer: String,
        /// What it should look like.
        expected: &'static str,
    },
}

/// The score that reasoning-gym gives `answer`; none stands for no answer at all.
pub fn gym_score(item: &GymItem, answer: Option<&str>) -> Result<f64, GymError> {
    let whole = answer.unwrap_or("");
    // What is read as a number or a list is short; anything longer reads as nonsense.
    let text = if whole.len() > MAX_PARSED { "?" } else { whole };
    let gold = item.gold;
    let right = |good: bool| f64::from(u8::from(good));
    let some = |score: f64| if answer.is_some() { score } else { 0.0 };
    Ok(match item.task {
        "basic_arithmetic" | "simple_equations" | "gcd" | "lcm" | "leg_counting" | "letter_counting"
        | "base_conversion" | "aiw" | "count_primes" => contained(whole, gold),
        "chain_sum" | "products" => same_decimal(whole, gold),
        "gsm_symbolic" => first_number(text, gold),
        "countdown" => countdown(text, item.numbers, item.target.unwrap_or(f64::NAN)),
        "puzzle24" => puzzle24(text),
        "fraction_simplification" => simplified_fraction(text, gold, item.question),
        "decimal_arithmetic" => right(near_decimal(text, gold, &BigRational::new(1.into(), 1000.into()))),
        "decimal_chain_sum" => right(near_decimal(text, gold, &BigRational::zero())),
        "complex_arithmetic" => complex_distance(text, gold),
        "polynomial_equations" => root_distance(text, gold),
        "bitwise_arithmetic" => {
            let value = python::int_any_base(text);
            right(value.is_some() && value == python::int_any_base(gold))
        }
        "time_intervals" => some(time_distance(text, gold)),
        "calendar_arithmetic" => calendar(text, gold),
        "number_sorting" => {
            right(sorted(text, gold, item.question.contains("ascending order")) == Some(true))
        }
        "prime_factorization" => {
            if answer.is_none() {
                return Ok(0.0);
            }
            factorization(text, gold).ok_or_else(|| GymError::Unscorable {
                task: item.task.to_string(),
                answer: text.chars().take(80).collect(),
                expected: "integers separated by ×",
            })?
        }
        "simple_integration" => right(antiderivative(text, gold, item.question) == Some(true)),
        "power_function" => some(three_figures(text, gold)),
        "number_format" => {
            let near = python::float(&text.replace(',', ""))
                .zip(python::float(gold))
                .is_some_and(|(a, b)| (a - b).abs() < 1e-2);
            right(near)
        }
        "dice" => {
            let bare = |s: &str| s.to_lowercase().replace('\n', "");
            right(answer.is_some() && bare(whole) == bare(gold))
        }
        task => return Err(GymError::UnknownTask { task: task.to_string() }),
    })
}

/// 1 for the gold itself, its share of the length for a text that contains it, else 0.
pub fn contained(answer: &str, gold: &str) -> f64 {
    if answer.is_empty() {
        0.0
    } else if answer == gold {
        1.0
    } else if answer.contains(gold) {
        gold.chars().count() as f64 / answer.chars().count() as f64
    } else {
        0.0
    }
}

/// 1 for the same decimal, commas and trailing zeros aside; else as [`contained`].
pub fn same_decimal(answer: &str, gold: &str) -> f64 {
    let (answer, gold) = (answer.replace(',', ""), gold.replace(',', ""));
    match (python::decimal(&answer), python::decimal(&gold)) {
        (Some(a), Some(b)) if a == b => 1.0,
        _ if answer == gold => 1.0 - f64::from(u8::from(answer.is_empty())),
        _ => contained(&answer, &gold),
    }
}

fn near_decimal(answer: &str, gold: &str, tolerance: &BigRational) -> bool {
    match (python::decimal(answer), python::decimal(gold)) {
        (Some(a), Some(b)) => (a - b).abs() <= *tolerance,
        _ => false,
    }
}

/// The first number of the text: 1 if it is the gold, 0.01 if it is another, 0 if there is none.
fn first_number(answer: &str, gold: &str) -> f64 {
    static NUMBER: LazyLock<Regex> =
        LazyLock::new(|| Regex::new(r"\b-?\d+(?:\.\d+)?\b").expect("a fixed pattern"));
    let value = NUMBER.find(answer).and_then(|m| m.as_str().parse::<f64>().ok());
    match (value, python::float(gold)) {
        (Some(a), Some(b)) if a == b => 1.0,
        (Some(_), Some(_)) => 0.01,
        _ => 0.0,
    }
}

fn value_of(answer: &str) -> Option<BigRational> {
    let expr = python::expression(answer)?;
    Algebra::new(4_000).of(&expr).ok()?.rational()
}

/// The integers written in a text.
fn integers(text: &str) -> Vec<BigInt> {
    text.split(|c: char| !c.is_ascii_digit()).filter_map(|d| d.parse().ok()).collect()
}

/// Countdown: 1 if every number is used exactly once and the value is the target, 0.05 for another
/// arithmetic expression, 0.01 for anything else.
pub fn countdown(answer: &str, numbers: &[i64], target: f64) -> f64 {
    let Some(value) = value_of(answer).and_then(|v| v.to_f64()) else { return 0.01 };
    let mut used = integers(answer);
    let mut wanted: Vec<BigInt> = numbers.iter().map(|&n| n.into()).collect();
    used.sort_unstable();
    wanted.sort_unstable();
    // numpy.isclose with its relative tolerance of 1e-5.
    let reached = (value - target).abs() <= 1e-6 + 1e-5 * target.abs();
    if used == wanted && reached { 1.0 } else { 0.05 }
}

/// The 24 game: 1 for four numbers from 1 to 10 whose truncated value is 24, else 0.01.
pub fn puzzle24(answer: &str) -> f64 {
    let Some(value) = value_of(answer) else { return 0.01 };
    let used = integers(answer);
    let range = BigInt::from(1)..=BigInt::from(10);
    let legal = used.len() == 4 && used.iter().all(|n| range.contains(n));
    if legal && value.trunc() == BigRational::from_integer(24.into()) { 1.0 } else { 0.01 }
}

fn fraction_of(answer: &str) -> Option<(BigInt, BigInt)> {
    static FRACTION: LazyLock<Regex> = LazyLock::new(|| {
        Regex::new(r"(?i)^\\d?frac\s*\{\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\}").expect("a fixed pattern")
    });
    let bare = answer.trim().trim_matches('$').trim();
    if bare.len() > MAX_PARSED {
        return None;
    }
    if let Some(c) = FRACTION.captures(bare) {
        return Some((c[1].parse().ok()?, c[2].parse().ok()?));
    }
    let (top, bottom) = bare.split_once('/')?;
    Some((python::int(top)?, python::int(bottom)?))
}

/// 1 for the reduced fraction, 0.1 for a part of the given one kept, 0.05 for another, else 0.01.
fn simplified_fraction(answer: &str, gold: &str, question: &str) -> f64 {
    let Some((top, bottom)) = fraction_of(answer) else { return 0.01 };
    if fraction_of(gold).is_some_and(|g| g == (top.clone(), bottom.clone())) {
        return 1.0;
    }
    let given = integers(question);
    if given.len() >= 2 && (top == given[0] || bottom == given[1]) { 0.1 } else { 0.05 }
}

fn complex(answer: &str) -> Option<(f64, f64)> {
    let mut text = answer.replace(' ', "").to_lowercase();
    while text.len() > 1 && text.starts_with('(') && text.ends_with(')') {
        text = text[1..text.len() - 1].to_string();
    }
    let text = text.replace('i', "j");
    let Some(body) = text.strip_suffix('j') else {
        return if text.contains('j') { None } else { Some((python::float(&text)?, 0.0)) };
    };
    let coefficient = |s: &str| match s {
        "" | "+" => Some(1.0),
        "-" => Some(-1.0),
        s => python::float(s),
    };
    // The last sign that is not an exponent's splits the parts.
    let bytes = body.as_bytes();
    let split = (1..bytes.len()).rev().find(|&i| matches!(bytes[i], b'+' | b'-') && bytes[i - 1] != b'e');
    match split {
        Some(at) => Some((python::float(&body[..at])?, coefficient(&body[at..])?)),
        None => Some((0.0, coefficient(body)?)),
    }
}

/// exp(-|answer - gold|).
fn complex_distance(answer: &str, gold: &str) -> f64 {
    match (complex(answer), complex(gold)) {
        (Some(a), Some(b)) => (-(a.0 - b.0).hypot(a.1 - b.1)).exp().min(1.0),
        _ => 0.0,
    }
}

/// The mean of exp(-10 distance) over greedily matched roots, less 0.5 for each missing or spare one.
fn root_distance(answer: &str, gold: &str) -> f64 {
    let roots = |text: &str| {
        let mut list: Vec<f64> =
            text.split(',').filter_map(python::float).filter(|x| !x.is_nan()).take(1000).collect();
        list.sort_by(f64::total_cmp);
        list
    };
    let (mut left, found) = (roots(gold), roots(answer));
    if left.is_empty() && found.is_empty() {
        return 1.0;
    }
    let (mut total, mut matched, mut spare) = (0.0, 0usize, 0usize);
    for x in found {
        let mut nearest: Option<(usize, f64)> = None;
        for (i, y) in left.iter().enumerate() {
            let distance = (x - y).abs();
            if distance < nearest.map_or(f64::INFINITY, |n| n.1) {
                nearest = Some((i, distance));
            }
        }
        match nearest {
            Some((i, distance)) => {
                left.remove(i);
                matched += 1;
                total += (-10.0 * distance).exp();
            }
            None => spare += 1,
        }
    }
    if matched > 0 {
        total /= matched as f64;
    }
    (total - 0.5 * (left.len() + spare) as f64).max(0.0)
}

fn clock(text: &str) -> Option<f64> {
    let whole = |s: &str| python::int(s).and_then(|n| n.to_f64());
    let parts: Vec<&str> = text.trim().split(':').collect();
    let mut seconds = whole(parts[0])? * 3600.0 + whole(parts.get(1)?)? * 60.0;
    if let Some(last) = parts.get(2) {
        seconds += match last.split_once('.') {
            Some((s, ms)) => whole(s)? + whole(ms)? / 1000.0,
            None => whole(last)?,
        };
    }
    Some(seconds)
}

/// 1 less the share of the longest difference: 24 hours for a time, 100 days for a date.
fn time_distance(answer: &str, gold: &str) -> f64 {
    let days = |text: &str| text.split_whitespace().next().and_then(python::int).and_then(|n| n.to_f64());
    let moment = |text: &str| {
        let (days, _) = text.split_once(" days,").unwrap_or((text, ""));
        let time = text.split(',').nth(1)?;
        Some(python::int(days)?.to_f64()? * 86400.0 + clock(time)?)
    };
    let (values, longest) = if gold.contains(" days,") {
        (moment(answer).zip(moment(gold)), 8_640_000.0)
    } else if gold.contains("days") {
        (days(answer).zip(days(gold)), 100.0)
    } else {
        (clock(answer).zip(clock(gold)), 86_400.0)
    };
    values.map_or(0.0, |(a, b)| if a == b { 1.0 } else { (1.0 - (a - b).abs() / longest).max(0.0) })
}

/// Weekdays by name, counts by exp(-5 relative error), yes or no by the word.
fn calendar(answer: &str, gold: &str) -> f64 {
    const DAYS: [&str; 7] = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"];
    if answer.is_empty() {
        return 0.0;
    }
    let bare = answer.trim();
    if DAYS.contains(&gold) {
        return if bare == gold {
            1.0
        } else if DAYS.contains(&bare) {
            0.1
        } else if DAYS.iter().any(|d| d.eq_ignore_ascii_case(bare)) {
            0.05
        } else {
            0.0
        };
    }
    let Some(wanted) = python::int(gold).and_then(|n| n.to_f64()) else {
        return f64::from(u8::from(bare.to_lowercase() == gold.to_lowercase()));
    };
    match python::int(bare).and_then(|n| n.to_f64()) {
        None => 0.0,
        Some(given) if wanted == 0.0 => f64::from(u8::from(given == 0.0)),
        Some(given) => (-5.0 * ((given - wanted).abs() / wanted)).exp().max(0.0),
    }
}

/// Whether a JSON list is sorted and each number is within one of the gold's.
fn sorted(answer: &str, gold: &str, ascending: bool) -> Option<bool> {
    let numbers = |text: &str| -> Option<Vec<f64>> {
        let list: Vec<serde_json::Value> = serde_json::from_str(&text.replace('\'', "\"")).ok()?;
        list.iter()
            .map(|v| match v {
                serde_json::Value::String(s) => python::float(s),
                serde_json::Value::Bool(b) => Some(f64::from(u8::from(*b))),
                v => v.as_f64(),
            })
            .collect()
    };
    let (given, wanted) = (numbers(answer)?, numbers(gold)?);
    let order = given.windows(2).all(|w| if ascending { w[0] <= w[1] } else { w[0] >= w[1] });
    let near = given.iter().zip(&wanted).all(|(a, b)| (a - b).abs() <= 1.0);
    Some(given.len() == wanted.len() && order && near)
}

/// 1 for the same factors, 0.5 for the same product, else 0.01; none if a part is no integer.
fn factorization(answer: &str, gold: &str) -> Option<f64> {
    let factors = |text: &str| -> Option<Vec<BigInt>> {
        let mut list: Vec<BigInt> = text
            .split('×')
            .map(str::trim)
            .filter(|p| !p.is_empty())
            .take(400)
            .map(python::int)
            .collect::<Option<_>>()?;
        list.sort_unstable();
        Some(list)
    };
    let (given, wanted) = (factors(answer)?, factors(gold)?);
    if given == wanted {
        return Some(1.0);
    }
    if given.iter().map(BigInt::bits).sum::<u64>() > 20_000 {
        return Some(0.01);
    }
    let product = |list: &[BigInt]| list.iter().fold(BigInt::from(1), |acc, n| acc * n);
    Some(if product(&given) == product(&wanted) { 0.5 } else { 0.01 })
}

/// Whether the derivative of the answer is the integrand of the question.
fn antiderivative(answer: &str, gold: &str, question: &str) -> Option<bool> {
    let (_, integrand) = question.split_once('∫')?;
    let (integrand, _) = integrand.split_once(" dx")?;
    let integrand = python::expression(integrand)?;
    let answer = python::expression(answer)?;
    let names = |e: &super::expr::Expr| super::scalar::variables(&[e]);
    let mut candidates = names(&integrand);
    if candidates.is_empty() {
        candidates = names(&python::expression(gold)?);
        candidates.remove("C");
    }
    let variable = candidates.first()?;
    let slope = derivative(&answer, variable)?;
    Some(compare::equal(&integrand, &slope, &EqualOptions::default()))
}

/// 1 if both agree in three significant figures (half to even), else 0.01.
fn three_figures(answer: &str, gold: &str) -> f64 {
    let figures = |text: &str| -> Option<BigRational> {
        let value = python::decimal(text)?;
        if value.is_zero() {
            return Some(value);
        }
        // Scale the size into [100, 1000).
        let ten = BigRational::from_integer(10.into());
        let digits = |n: &BigInt| n.abs().to_string().len() as i32;
        let mut shift = 3 - (digits(value.numer()) - digits(value.denom()));
        let power = |n: i32| ten.pow(n);
        let (low, high) = (power(2), power(3));
        while value.abs() * power(shift) >= high {
            shift -= 1;
        }
        while value.abs() * power(shift) < low {
            shift += 1;
        }
        let scaled = value * power(shift);
        let (floor, half) = (scaled.floor(), BigRational::new(1.into(), 2.into()));
        let part = &scaled - &floor;
        let even = (floor.to_integer() % BigInt::from(2)).is_zero();
        let up = part > half || part == half && !even;
        let rounded = if up { floor + BigRational::from_integer(1.into()) } else { floor };
        Some(rounded * power(-shift))
    };
    match (figures(answer), figures(gold)) {
        (Some(a), Some(b)) if a == b => 1.0,
        _ => 0.01,
    }
}
