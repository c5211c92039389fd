//! Units that may follow a number without being part of its value.

/// A known unit: its dimension and its size in that dimension's base unit.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Unit {
    pub(crate) dimension: &'static str,
    pub(crate) size: f64,
}

/// `(spellings, dimension, size)`; a spelling is matched whole and with its case.
const UNITS: &[(&[&str], &str, f64)] = &[
    (&["mm", "millimeter", "millimeters", "millimetre", "millimetres"], "length", 1e-3),
    (&["cm", "centimeter", "centimeters", "centimetre", "centimetres"], "length", 1e-2),
    (&["dm", "decimeter", "decimeters"], "length", 1e-1),
    (&["m", "meter", "meters", "metre", "metres"], "length", 1.0),
    (&["km", "kilometer", "kilometers", "kilometre", "kilometres", "kms"], "length", 1e3),
    (&["inch", "inches"], "length", 0.0254),
    (&["ft", "foot", "feet"], "length", 0.3048),
    (&["yd", "yds", "yard", "yards"], "length", 0.9144),
    (&["mi", "mile", "miles"], "length", 1609.344),
    (&["mg", "milligram", "milligrams"], "mass", 1e-3),
    (&["g", "gram", "grams"], "mass", 1.0),
    (&["kg", "kgs", "kilogram", "kilograms"], "mass", 1e3),
    (&["lb", "lbs", "pound", "pounds"], "mass", 453.59237),
    (&["oz", "ounce", "ounces"], "mass", 28.349523125),
    (&["ton", "tons", "tonne", "tonnes"], "mass?", 1.0),
    (&["ms", "millisecond", "milliseconds"], "time", 1e-3),
    (&["s", "sec", "secs", "second", "seconds"], "time", 1.0),
    (&["min", "mins", "minute", "minutes"], "time", 60.0),
    (&["h", "hr", "hrs", "hour", "hours"], "time", 3600.0),
    (&["day", "days"], "time", 86400.0),
    (&["week", "weeks"], "time", 604800.0),
    (&["month", "months"], "month", 1.0),
    (&["year", "years", "yr", "yrs"], "month", 12.0),
    (&["ml", "mL", "milliliter", "milliliters"], "volume", 1e-3),
    (&["cl", "cL"], "volume", 1e-2),
    (&["L", "l", "liter", "liters", "litre", "litres"], "volume", 1.0),
    (&["gallon", "gallons", "gal"], "volume", 3.785411784),
    (&["mph", "miles per hour", "miles/hour", "mi/h", "mi/hr"], "speed", 1.609344),
    (&["kph", "kmh", "km/h", "km/hr", "kilometers per hour", "kilometres per hour"], "speed", 1.0),
    (&["m/s", "meters per second", "metres per second", "meters/second"], "speed", 3.6),
    (&["cent", "cents"], "money", 0.01),
    (&["dollar", "dollars", "USD", "usd", "bucks"], "money", 1.0),
    (&["euro", "euros", "EUR"], "euro", 1.0),
    (&["degree", "degrees", "deg"], "angle", 1.0),
    (&["rad", "radian", "radians"], "radian", 1.0),
    (&["unit", "units"], "", 1.0),
    (&["Hz", "hz", "kHz", "MHz"], "frequency?", 1.0),
    (&["kW", "kWh", "watts", "watt"], "power?", 1.0),
    (&["mol", "moles"], "amount", 1.0),
    (&["pt", "pts", "ppm", "fps", "rpm", "bps", "mpg", "psi"], "", 1.0),
];

/// The unit of exactly this spelling.
pub(crate) fn lookup(word: &str) -> Option<Unit> {
    UNITS
        .iter()
        .find(|(names, ..)| names.contains(&word))
        .map(|&(_, dimension, size)| Unit { dimension, size })
}

/// Whether a bare word after a number reads as a counted thing: a known unit, or plainly a word.
pub(crate) fn is_unit_word(word: &str) -> bool {
    if lookup(word).is_some() {
        return word.len() > 1;
    }
    word.len() >= 4
        && word.bytes().all(|b| b.is_ascii_lowercase())
        && word.bytes().any(|b| matches!(b, b'a' | b'e' | b'i' | b'o' | b'u'))
}

/// What two units say about each other.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Relation {
    /// The same, or nothing known against it.
    Compatible,
    /// Known to measure different things, or not convertible with certainty.
    Conflict,
    /// One of the first is this many of the second.
    Factor(f64),
}

/// Whether two names of counted things are the same up to number, case and further words.
fn alike(a: &str, b: &str) -> bool {
    let stem = |w: &str| {
        let w = w.to_lowercase();
        let w = w.trim_matches(['.', ',']).to_string();
        w.strip_suffix("es").or_else(|| w.strip_suffix('s')).map(str::to_string).unwrap_or(w)
    };
    let words = |t: &str| t.split([' ', '/', '-']).map(stem).filter(|w| !w.is_empty()).collect::<Vec<_>>();
    let (a, b) = (words(a), words(b));
    let (short, long) = if a.len() <= b.len() { (&a, &b) } else { (&b, &a) };
    short.iter().any(|w| w == "unit") || short.iter().all(|w| long.contains(w))
}

/// What a word after a number multiplies it by, or none if it is not such a word.
pub(crate) fn scale(word: &str) -> Option<i64> {
    Some(match word.to_lowercase().as_str() {
        "dozen" => 12,
        "hundred" => 100,
        "thousand" => 1_000,
        "million" | "millions" => 1_000_000,
        "billion" | "billions" => 1_000_000_000,
        "trillion" => 1_000_000_000_000,
        _ => return None,
    })
}

/// Words that are never a unit: what they say changes the value, or doubts it.
pub(crate) fn is_no_unit(word: &str) -> bool {
    const WORDS: &str = "not or nor and but is isn no wrong incorrect false maybe perhaps plus minus times over \
        squared cubed half halves third thirds quarter fourth fourths fifth fifths tenth tenths \
        hundredth hundredths thousandths to less more than root factorial divided by choose mod \
        approximately instead actually either otherwise if unless exponent power negative percent \
        infinity fails fail undefined unknown none eighth eighths sixth sixths sevenths ninths";
    let lower = word.to_lowercase();
    lower.split(|c: char| !c.is_alphanumeric()).any(|w| {
        WORDS.split_ascii_whitespace().any(|word| word == w)
            || scale(w).is_some()
            || w.bytes().any(|b| b.is_ascii_digit())
    })
}

/// Compares two written units, each with an optional power (`cm^2`).
pub(crate) fn relate(a: &str, b: &str) -> Relation {
    let split = |u: &str| -> (String, i32) {
        let u = u.trim().trim_end_matches('.');
        let (base, power) = u.split_once('^').unwrap_or((u, "1"));
        let (square, base) = match base.trim().split_once(' ') {
            Some(("square" | "sq", rest)) => (2, rest),
            Some(("cubic", rest)) => (3, rest),
            _ => (1, base.trim()),
        };
        let power = power.trim_matches(['{', '}']).parse::<i32>().unwrap_or(1);
        (base.trim().to_string(), power * square)
    };
    let ((a, p), (b, q)) = (split(a), split(b));
    if a == b && p == q {
        return Relation::Compatible;
    }
    let (Some(x), Some(y)) = (lookup(&a), lookup(&b)) else {
        return if alike(&a, &b) && p == q { Relation::Compatible } else { Relation::Conflict };
    };
    if x.dimension.is_empty() || y.dimension.is_empty() {
        return Relation::Compatible;
    }
    if x.dimension != y.dimension || p != q || x.dimension.ends_with('?') && a != b {
        return Relation::Conflict;
    }
    if x.size == y.size { Relation::Compatible } else { Relation::Factor((x.size / y.size).powi(p)) }
}
