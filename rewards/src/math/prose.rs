//! Numbers and arithmetic in plain text, and the words that deny or hedge them.

use super::parser;
use regex::Regex;
use std::sync::LazyLock;

pub(super) static EXPRESSION: LazyLock<Regex> = LazyLock::new(|| {
    Regex::new(r"(?:^|[\s=:])(?:\*\*)?(-?\(?-?\d[\d. +\-*×/^()÷]*[+\-*×/^()÷][\d. +\-*×/^()÷]+)")
        .expect("a fixed pattern")
});
pub(super) static NUMBER: LazyLock<Regex> = LazyLock::new(|| {
    Regex::new(concat!(
        r"(?:^|[\s=:：是为])(?:\*\*)?\\?[$€£¥₹]?",
        r"([-−]?(?:[1-9]\d{0,2}(?:[ ,]\d{3})+(?:\.\d+)?|\d+[.,]\d+|\.\d+|\d+)",
        r"(?:[eE][+-]?\d+|/\d+)?)(\s*(?:\\?%|[Pp]ercent(?:age)?\b|[Pp]ct\b))?"
    ))
    .expect("a fixed pattern")
});

/// Whether the words around an answer deny it: "not 18", "cannot be 18", "18 is wrong".
pub(super) fn denied(before: &str, after: &str) -> bool {
    let before = &before[super::extract::floor(before, before.len().saturating_sub(60))..];
    let clause = before.rsplit(['.', '\n', ';', '!', '?']).next().unwrap_or("");
    let words = clause
        .split_whitespace()
        .rev()
        .map(|w| w.trim_matches(['$', '*', ':', '\\', '(', ',']).to_lowercase());
    let denying = |w: &str| {
        w.ends_with("n't")
            || w.ends_with("n’t")
            || matches!(w, "not" | "never" | "cannot" | "≠" | "neq" | "!=" | "neither")
    };
    if words.filter(|w| !w.is_empty()).take(3).any(|w| denying(&w)) {
        return true;
    }
    let after = &after[..super::extract::floor(after, 60)];
    let mut words = after.split_whitespace().map(|w| w.trim_matches(['.', ',', '$', '*']).to_lowercase());
    let first = words.find(|w| !w.is_empty()).unwrap_or_default();
    let second = words.next().unwrap_or_default();
    let verb = matches!(first.as_str(), "is" | "was" | "are" | "be" | "seems");
    denying(&first)
        || matches!(first.as_str(), "fails" | "fail")
        || verb
            && (denying(&second) || matches!(second.as_str(), "wrong" | "incorrect" | "false" | "impossible"))
}

/// Whether the words before a number make it a bound or one of several.
pub(super) fn hedged(lead: &str) -> bool {
    lead.split_whitespace().any(|w| {
        let w = w.trim_matches([',', ':', '*']).to_lowercase();
        matches!(
            w.as_str(),
            "between"
                | "either"
                | "neither"
                | "not"
                | "except"
                | "less"
                | "more"
                | "greater"
                | "fewer"
                | "than"
                | "least"
                | "most"
                | "below"
                | "above"
                | "from"
                | "or"
                | "unknown"
                | "if"
        )
    })
}

/// Whether more values follow at once: ", 19", "or 19", "and 19", "to 19".
pub(super) fn goes_on(rest: &str) -> bool {
    let rest = &rest[..super::extract::floor(rest, 60)];
    let trimmed = rest.trim_start_matches([' ', ',', '$', '*', '\\', '(']);
    let mut words = trimmed.splitn(2, ' ');
    let first = words.next().unwrap_or("");
    let joint = matches!(first.to_lowercase().as_str(), "or" | "and" | "to" | "through" | "versus");
    let next = if joint { words.next().unwrap_or("") } else { trimmed };
    let marked = joint || rest.trim_start_matches(['$', ' ', '*']).starts_with(',');
    marked && next.trim_start_matches([' ', '$', '-', '\\', '(']).starts_with(|c: char| c.is_ascii_digit())
}

/// Whether a number ends a list: other numbers stand right before it.
pub(super) fn ends_list(before: &str) -> bool {
    let before = &before[super::extract::floor(before, before.len().saturating_sub(80))..];
    let line = before.rsplit('\n').next().unwrap_or("");
    let mut trimmed = line.trim_end_matches([' ', ',', '$', '*', '(']);
    for joint in [" or", " and", "or", "and"] {
        if let Some(head) = trimmed.strip_suffix(joint) {
            trimmed = head.trim_end_matches([' ', ',', '$', '*']);
            break;
        }
    }
    trimmed.len() < line.len() && trimmed.ends_with(|c: char| c.is_ascii_digit())
}

/// The number or arithmetic that a line gives first, after its last `=` if it has one.
pub(super) fn plain_first(line: &str) -> Option<(usize, usize, String)> {
    let stop = line.find(". ").map_or(line.len(), |i| i + 1);
    let line = &line[..stop];
    let from = line.rfind('=').unwrap_or(0);
    let tail = line.get(from..)?;
    let expression = EXPRESSION.captures(tail).and_then(|c| {
        let m = c.get(1)?;
        let text = trim_expression(m.as_str());
        parser::parse(text).is_some().then(|| (m.start(), m.start() + text.len(), text.to_string()))
    });
    let number = NUMBER.captures(tail).and_then(|c| number_of(tail, &c));
    let found = match (expression, number) {
        (Some(e), Some(n)) => Some(if e.0 <= n.0 { e } else { n }),
        (e, n) => e.or(n),
    }?;
    Some((from + found.0, from + found.1, found.2))
}

pub(super) fn trim_expression(text: &str) -> &str {
    let mut text = text.trim_end_matches([' ', '.', '+', '-', '*', '/', '^', '×', '÷', '(']);
    while text.ends_with(')') && text.matches(')').count() > text.matches('(').count() {
        text = text[..text.len() - 1].trim_end();
    }
    text
}

/// A matched number as the parser reads it: decimal comma to point, percent sign kept.
pub(super) fn number_of(text: &str, captures: &regex::Captures) -> Option<(usize, usize, String)> {
    let m = captures.get(1)?;
    let mut digits = m.as_str();
    let percent = captures.get(2).is_some();
    // A digit right after means the groups were not of three.
    if text[m.end()..].starts_with(|c: char| c.is_ascii_digit()) {
        digits = digits.split([' ', ',']).next()?;
    }
    let mut number = digits.replace('−', "-");
    let grouped = {
        let whole = number.trim_start_matches('-').split(['.', 'e', '/']).next().unwrap_or("");
        let parts: Vec<&str> = whole.split([' ', ',']).collect();
        parts.len() > 1
            && !parts[0].starts_with('0')
            && parts[0].len() <= 3
            && parts[1..].iter().all(|p| p.len() == 3)
    };
    if grouped {
        number = number.replace([' ', ','], "");
    } else if number.matches(',').count() == 1 {
        number = number.replace(',', ".");
    }
    if percent {
        number.push('%');
    }
    Some((m.start(), captures.get(0)?.end(), number))
}
