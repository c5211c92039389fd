//! What templates expect of Python: `json.dumps`, `repr` of floats, `strftime`.

use minijinja::value::ValueKind;
use minijinja::{Error, ErrorKind, Value};

/// Options of `json.dumps`.
pub(super) struct JsonStyle<'a> {
    /// Between items.
    pub(super) item: &'a str,
    /// Between key and value.
    pub(super) colon: &'a str,
    /// One level of indentation; `None` for one line.
    pub(super) indent: Option<&'a str>,
    /// Escape everything beyond ASCII.
    pub(super) ensure_ascii: bool,
    /// Sort objects by key.
    pub(super) sort_keys: bool,
}

/// Deepest nesting that is written.
const MAX_DEPTH: usize = 256;

/// Writes a value as Python's `json.dumps` does, piece by piece.
///
/// # Errors
/// Values that Python refuses (undefined ones), nesting beyond 256, or what `out` returns.
pub(super) fn json_dumps(
    value: &Value,
    style: &JsonStyle<'_>,
    depth: usize,
    out: &mut dyn FnMut(&str) -> Result<(), Error>,
) -> Result<(), Error> {
    let refuse = |what: String| Err(Error::new(ErrorKind::InvalidOperation, what));
    if depth > MAX_DEPTH {
        return refuse(format!("tojson: nested more than {MAX_DEPTH} deep"));
    }
    let line = |depth: usize| style.indent.map_or(String::new(), |by| format!("\n{}", by.repeat(depth)));
    match value.kind() {
        ValueKind::None => out("null"),
        ValueKind::Bool => out(if value.is_true() { "true" } else { "false" }),
        ValueKind::Number => out(&number(value)),
        ValueKind::String => out(&quoted(value.as_str().unwrap_or_default(), style.ensure_ascii)),
        ValueKind::Map => {
            let mut keys: Vec<Value> = value.try_iter()?.collect();
            if style.sort_keys {
                keys.sort();
            }
            if keys.is_empty() {
                return out("{}");
            }
            out("{")?;
            for (i, key) in keys.iter().enumerate() {
                if i > 0 {
                    out(style.item)?;
                }
                out(&line(depth + 1))?;
                let name = match key.kind() {
                    ValueKind::String => key.as_str().unwrap_or_default().to_string(),
                    ValueKind::None => "null".into(),
                    ValueKind::Bool => if key.is_true() { "true" } else { "false" }.into(),
                    ValueKind::Number => number(key),
                    other => return refuse(format!("tojson: keys of kind {other} are not possible")),
                };
                out(&quoted(&name, style.ensure_ascii))?;
                out(style.colon)?;
                json_dumps(&value.get_item(key)?, style, depth + 1, out)?;
            }
            out(&line(depth))?;
            out("}")
        }
        ValueKind::Seq | ValueKind::Iterable => {
            let mut empty = true;
            out("[")?;
            for item in value.try_iter()? {
                if !empty {
                    out(style.item)?;
                }
                empty = false;
                out(&line(depth + 1))?;
                json_dumps(&item, style, depth + 1, out)?;
            }
            if !empty {
                out(&line(depth))?;
            }
            out("]")
        }
        other => refuse(format!("tojson: a value of kind {other} is not JSON")),
    }
}

fn number(value: &Value) -> String {
    if value.is_integer() {
        return value.to_string();
    }
    f64::try_from(value.clone()).map_or_else(|_| value.to_string(), float_repr)
}

/// Python's `repr` of a float: the shortest digits that read back, in scientific form outside 1e-4..1e16.
pub(super) fn float_repr(x: f64) -> String {
    if x.is_nan() {
        return "NaN".into();
    }
    if x.is_infinite() {
        return if x > 0.0 { "Infinity" } else { "-Infinity" }.into();
    }
    let scientific = format!("{x:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if x != 0.0 && !(-4..16).contains(&exponent) {
        let sign = if exponent < 0 { '-' } else { '+' };
        return format!("{digits}e{sign}{:02}", exponent.abs());
    }
    let plain = x.to_string();
    if plain.contains('.') { plain } else { format!("{plain}.0") }
}

fn quoted(text: &str, ensure_ascii: bool) -> String {
    let mut out = String::with_capacity(text.len() + 2);
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            c if (c as u32) < 0x20 => out.push_str(&format!("\\u{:04x}", c as u32)),
            c if ensure_ascii && !c.is_ascii() => {
                for unit in c.encode_utf16(&mut [0; 2]) {
                    out.push_str(&format!("\\u{unit:04x}"));
                }
            }
            c => out.push(c),
        }
    }
    out.push('"');
    out
}

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const DAYS: [&str; 7] = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];

/// `datetime.strftime` in the C locale for a time in UTC.
///
/// # Errors
/// A directive that is not known.
pub(super) fn strftime(unix_seconds: i64, format: &str) -> Result<String, String> {
    let (days, second_of_day) = (unix_seconds.div_euclid(86400), unix_seconds.rem_euclid(86400));
    let (year, month, day, day_of_year) = civil(days);
    let weekday = (days + 4).rem_euclid(7);
    let (hour, minute, second) = (second_of_day / 3600, second_of_day / 60 % 60, second_of_day % 60);
    let hour12 = (hour + 11) % 12 + 1;
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let mut directive = chars.next();
        let bare = directive == Some('-');
        if bare {
            directive = chars.next();
        }
        let padded = |n: i64, width: usize| if bare { n.to_string() } else { format!("{n:0width$}") };
        let (month_name, day_name) = (MONTHS[(month - 1) as usize], DAYS[weekday as usize]);
        out += &match directive {
            Some('Y') => padded(year, 4),
            Some('y') => padded(year.rem_euclid(100), 2),
            Some('m') => padded(month, 2),
            Some('d') => padded(day, 2),
            Some('e') => {
                if bare {
                    day.to_string()
                } else {
                    format!("{day:2}")
                }
            }
            Some('j') => padded(day_of_year, 3),
            Some('H') => padded(hour, 2),
            Some('I') => padded(hour12, 2),
            Some('M') => padded(minute, 2),
            Some('S') => padded(second, 2),
            Some('f') => "000000".into(),
            Some('B') => month_name.into(),
            Some('b' | 'h') => month_name[..3].into(),
            Some('A') => day_name.into(),
            Some('a') => day_name[..3].into(),
            Some('w') => weekday.to_string(),
            Some('u') => ((weekday + 6) % 7 + 1).to_string(),
            Some('p') => if hour < 12 { "AM" } else { "PM" }.into(),
            Some('F') => format!("{year:04}-{month:02}-{day:02}"),
            Some('T') => format!("{hour:02}:{minute:02}:{second:02}"),
            Some('R') => format!("{hour:02}:{minute:02}"),
            Some('D' | 'x') => format!("{month:02}/{day:02}/{:02}", year.rem_euclid(100)),
            Some('X') => format!("{hour:02}:{minute:02}:{second:02}"),
            Some('c') => format!(
                "{} {} {day:2} {hour:02}:{minute:02}:{second:02} {year}",
                &day_name[..3],
                &month_name[..3]
            ),
            Some('z' | 'Z') => String::new(),
            Some('%') => "%".into(),
            other => return Err(format!("strftime_now: directive %{} is not known", other.unwrap_or(' '))),
        };
    }
    Ok(out)
}

/// Year, month, day and day of the year of a day number since 1970-01-01 (proleptic Gregorian).
fn civil(days: i64) -> (i64, i64, i64, i64) {
    let leap = |y: i64| y % 4 == 0 && (y % 100 != 0 || y % 400 == 0);
    // Whole 400-year cycles of 146097 days first, so that the walk is short.
    let cycles = days.div_euclid(146_097);
    let (mut year, mut rest) = (1970 + 400 * cycles, days.rem_euclid(146_097));
    loop {
        let length = if leap(year) { 366 } else { 365 };
        if rest < length {
            break;
        }
        rest -= length;
        year += 1;
    }
    let day_of_year = rest + 1;
    let lengths = [31, if leap(year) { 29 } else { 28 }, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
    let mut month = 0;
    while rest >= lengths[month] {
        rest -= lengths[month];
        month += 1;
    }
    (year, month as i64 + 1, rest + 1, day_of_year)
}
