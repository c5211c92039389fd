//! LaTeX between delimiters.

use super::extract::{Hit, MAX_ANSWER};
use super::options::Mark;

/// A percent sign that follows an answer outside its delimiters.
pub(super) fn percent_after(rest: &str) -> &'static str {
    let rest = rest.trim_start_matches(['$', ' ']);
    let rest = rest.strip_prefix("\\)").unwrap_or(rest).trim_start();
    let hit = ["%", "\\%", "percent", "pct", "Percent"].iter().any(|p| rest.starts_with(p));
    if hit { "\\%" } else { "" }
}

/// Whether the text between two pieces makes them one list.
pub(super) fn joins(between: &str) -> bool {
    if between.len() > 60 {
        return false;
    }
    let mut plain = between.to_string();
    for noise in
        ["\\quad", "\\qquad", "\\text", "\\mbox", "\\ ", "\\,", "\\;", "\\(", "\\)", "\\[", "\\]", "~"]
    {
        plain = plain.replace(noise, " ");
    }
    plain.retain(|c| !matches!(c, '$' | '{' | '}'));
    let plain = plain.trim().to_lowercase();
    if matches!(plain.as_str(), "," | ";" | "和" | "或") {
        return true;
    }
    let words: Vec<&str> =
        plain.split_whitespace().map(|w| w.trim_matches(',')).filter(|w| !w.is_empty()).collect();
    words.len() <= 4
        && words.iter().any(|w| matches!(*w, "and" | "or"))
        && plain.chars().all(|c| c.is_alphabetic() || matches!(c, ' ' | ',' | '\n'))
}

/// A delimited piece of LaTeX.
pub(super) struct Math {
    pub(super) start: usize,
    end: usize,
    inner: std::ops::Range<usize>,
}

/// The first `$…$`, `$$…$$`, `\(…\)`, `\[…\]` at or after `from`.
pub(super) fn math_from(text: &str, from: usize) -> Option<Math> {
    let bytes = text.as_bytes();
    let mut at = from;
    // The next closing mark of each kind, searched for once and kept while it lies ahead.
    let mut ahead: [Option<Option<usize>>; 3] = [None; 3];
    let mut next = |kind: usize, mark: &str, from: usize| match ahead[kind] {
        Some(None) => None,
        Some(Some(place)) if place >= from => Some(place),
        _ => {
            let place = text[from..].find(mark).map(|i| i + from);
            ahead[kind] = Some(place);
            place
        }
    };
    while at < bytes.len() {
        match bytes[at] {
            b'\\' => {
                let close = match bytes.get(at + 1) {
                    Some(b'(') => next(0, "\\)", at + 2),
                    Some(b'[') => next(1, "\\]", at + 2),
                    _ => {
                        at += 2;
                        continue;
                    }
                };
                let multiline = bytes.get(at + 1) == Some(&b'[');
                if let Some(end) = close.filter(|&end| end > at + 2 && end - at <= MAX_ANSWER)
                    && (multiline || !text[at + 2..end].contains('\n'))
                {
                    return Some(Math { start: at, end: end + 2, inner: at + 2..end });
                }
                at += 2;
            }
            b'$' if bytes.get(at + 1) == Some(&b'$') => {
                if let Some(end) = next(2, "$$", at + 2).filter(|&end| end > at + 2 && end - at <= MAX_ANSWER)
                {
                    return Some(Math { start: at, end: end + 2, inner: at + 2..end });
                }
                at += 2;
            }
            b'$' if at == 0 || !bytes[at - 1].is_ascii_digit() => {
                let mut end = at + 1;
                while end < bytes.len() && end - at <= MAX_ANSWER && bytes[end] != b'$' && bytes[end] != b'\n'
                {
                    end += if bytes[end] == b'\\' { 2 } else { 1 };
                }
                if end < bytes.len() && bytes[end] == b'$' && end > at + 1 {
                    return Some(Math { start: at, end: end + 1, inner: at + 1..end });
                }
                // Not a pair; nothing before the stop can open one either.
                at = end.max(at + 1);
            }
            _ => at += 1,
        }
    }
    None
}

/// The run of joined LaTeX pieces that starts with `first`.
pub(super) fn math_run(text: &str, first: Math) -> Hit {
    let mut end = first.end;
    let mut answer = text.get(first.inner.clone()).unwrap_or("").trim().to_string();
    let mut count = 1;
    while let Some(next) = math_from(text, end).filter(|_| count < 10) {
        if !text.get(end..next.start).is_some_and(joins) {
            break;
        }
        answer.push_str(", ");
        answer.push_str(text.get(next.inner.clone()).unwrap_or("").trim());
        end = next.end;
        count += 1;
    }
    if count == 1 {
        answer.push_str(percent_after(text.get(end..).unwrap_or("")));
    }
    Hit { end, text: answer, mark: Mark::Plain, latex: true }
}
