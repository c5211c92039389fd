//! Boxes, and pieces that one list is written in.

use super::delimited::{joins, percent_after};
use super::extract::{Hit, MAX_ANSWER};
use super::options::{Mark, WhichBox};

/// Boxes looked at, from the end (or the start).
const MAX_BOXES: usize = 40;

/// The end of the brace group that opens at `open`.
fn group_end(text: &str, open: usize) -> Option<usize> {
    let mut depth = 0usize;
    let mut escaped = false;
    for (i, b) in text.as_bytes().iter().enumerate().skip(open).take(MAX_ANSWER + 2) {
        match b {
            _ if escaped => escaped = false,
            b'\\' => escaped = true,
            b'{' => depth += 1,
            b'}' => {
                depth = depth.checked_sub(1)?;
                if depth == 0 {
                    return Some(i);
                }
            }
            _ => {}
        }
    }
    None
}

struct Boxed {
    start: usize,
    end: usize,
    text: String,
}

/// The box that starts at `at`, which is the place of `\boxed`.
fn box_at(text: &str, at: usize) -> Option<Boxed> {
    let mut from = at + "\\boxed".len();
    let rest = &text[from..];
    let trimmed = rest.trim_start_matches([' ', '\n']);
    from += rest.len() - trimmed.len();
    if trimmed.starts_with('{') {
        let end = group_end(text, from)?;
        return Some(Boxed { start: at, end: end + 1, text: text[from + 1..end].to_string() });
    }
    if rest.len() == trimmed.len() {
        return None;
    }
    let word = trimmed.split([' ', '\n', '$', ',']).next()?.trim_end_matches('.');
    (!word.is_empty() && word.len() < 60).then(|| Boxed {
        start: at,
        end: from + word.len(),
        text: word.to_string(),
    })
}

/// The last (or first) run of joined boxes.
pub(super) fn boxes(text: &str, which: WhichBox) -> Option<Hit> {
    let mut places: Vec<usize> = match which {
        WhichBox::Last => text.rmatch_indices("\\boxed").map(|m| m.0).take(MAX_BOXES).collect(),
        WhichBox::First => text.match_indices("\\boxed").map(|m| m.0).take(MAX_BOXES).collect(),
    };
    places.sort_unstable();
    let mut found: Vec<Boxed> = Vec::new();
    let mut scanned = 0;
    for at in places {
        // A box inside a box is part of it.
        if found.last().is_some_and(|b| at < b.end) {
            continue;
        }
        scanned += 1;
        if scanned > MAX_BOXES {
            break;
        }
        if let Some(b) = box_at(text, at).filter(|b| !b.text.trim().is_empty()) {
            found.push(b);
        }
    }
    let mut runs: Vec<Vec<Boxed>> = Vec::new();
    for b in found {
        match runs.last_mut() {
            Some(run) if run.last().is_some_and(|p| joins(&text[p.end..b.start])) => run.push(b),
            _ => runs.push(vec![b]),
        }
    }
    let run = match which {
        WhichBox::Last => runs.pop()?,
        WhichBox::First => runs.into_iter().next()?,
    };
    let end = run.last()?.end;
    let mut parts: Vec<String> = Vec::new();
    for b in &run {
        let part = b.text.trim().to_string();
        if !parts.contains(&part) {
            parts.push(part);
        }
    }
    let mut answer = parts.join(", ");
    if parts.len() == 1 {
        answer.push_str(percent_after(&text[end..]));
    }
    Some(Hit { end, text: answer, mark: Mark::Boxed, latex: true })
}
