//! Finding the answer in a text.
//!
//! Order of priority, first hit wins: `<answer>` tags; `#### x`; boxes and "final answer is x. I
//! hope" (0); "final answer … is x" (50); "answer: x" (100); "answer … x" (200); any LaTeX, any number
//! (300). Boxes move to another rank by [`ExtractOptions::boxed_priority`]. Within a rank the match
//! that ends last wins. Pieces joined by `,`, "and", "or" are one list, so a hedge is never one value.
//! The ranks follow math-verify 0.9 (`src/math_verify/parser.py`); tags, negation and text answers
//! are ours.

use super::announced::announced;
use super::boxed::boxes;
use super::delimited::{math_from, math_run};
use super::expr::Expr;
use super::options::{ExtractOptions, Extracted, Mark};
use super::parser;
use super::prose::{EXPRESSION, NUMBER, denied, ends_list, number_of, trim_expression};

/// Bytes from the end in which unannounced answers are looked for.
const TAIL: usize = 12_000;
/// Bytes of the longest answer.
pub(super) const MAX_ANSWER: usize = 8_000;

/// A stretch of the text that may be the answer.
pub(super) struct Hit {
    pub(super) end: usize,
    pub(super) text: String,
    pub(super) mark: Mark,
    pub(super) latex: bool,
}

impl Hit {
    fn found(self) -> Option<Extracted> {
        let text = self.text.trim().to_string();
        (!text.is_empty() && text.len() <= MAX_ANSWER).then_some(Extracted {
            text,
            mark: self.mark,
            latex: self.latex,
        })
    }
}

/// The answer that a text gives, or none.
///
/// ```
/// use rft_rewards::math::{ExtractOptions, extract};
/// let found = extract("So the answer is $\\boxed{18}$.", &ExtractOptions::default());
/// assert_eq!(found.map(|f| f.text).as_deref(), Some("18"));
/// ```
pub fn extract(text: &str, options: &ExtractOptions) -> Option<Extracted> {
    let mut text = text;
    if options.after_think
        && let Some(at) = text.rfind("</think>")
    {
        text = &text[at + "</think>".len()..];
    }
    if options.answer_tags
        && let Some(found) = tagged(text, options)
    {
        return Some(found);
    }
    let mut hits: Vec<(u32, Hit)> = Vec::new();
    if options.latex
        && let Some(hit) = boxes(text, options.which_box)
    {
        hits.push((options.boxed_priority, hit));
    }
    // A box that outranks everything else needs no further search, but for the last-end rule.
    announced(text, options, &mut hits);
    if let Some(best) = hits.iter().map(|h| h.0).min() {
        return hits.into_iter().filter(|h| h.0 == best).max_by_key(|h| h.1.end)?.1.found();
    }
    if !options.unanchored {
        return None;
    }
    unannounced(text, options)?.found()
}

/// `<answer>…</answer>` and `#### …`, the last of either.
fn tagged(text: &str, options: &ExtractOptions) -> Option<Extracted> {
    if let Some(close) = text.rfind("</answer>")
        && let Some(open) = text[..close].rfind("<answer>")
    {
        let inner = text[open + "<answer>".len()..close].trim();
        let bare = ExtractOptions { answer_tags: false, after_think: false, ..options.clone() };
        if let Some(found) = extract(inner, &bare).filter(|f| f.mark != Mark::Plain) {
            return Some(Extracted { mark: Mark::Tag, ..found });
        }
        let latex = inner.contains(['\\', '$']);
        return Hit { end: close, text: inner.to_string(), mark: Mark::Tag, latex }.found();
    }
    if !options.expr {
        return None;
    }
    let at = text.rfind("####")?;
    let line = text[at..].trim_start_matches('#').lines().next()?.trim();
    let line = line.trim_end_matches('.');
    let text = if line.contains("\\boxed") { boxes(line, options.which_box)?.text } else { line.to_string() };
    Hit { end: at, text, mark: Mark::Tag, latex: false }.found()
}

/// The last LaTeX or number of the text.
fn unannounced(text: &str, options: &ExtractOptions) -> Option<Hit> {
    let trimmed = text.trim();
    if options.latex && trimmed.len() <= 300 && !trimmed.contains('$') && !trimmed.contains('\n') {
        // The whole text is one bare answer.
        let bare = trimmed.trim_end_matches('.');
        let words =
            bare.split_whitespace().filter(|w| w.len() > 3 && w.bytes().all(|b| b.is_ascii_alphabetic()));
        if words.count() == 0
            && bare.chars().any(|c| c.is_ascii_digit() || c == '\\')
            && parser::parse(bare).is_some_and(|e| !e.any(&|n| matches!(n, Expr::Text(_))))
        {
            return Some(Hit { end: text.len(), text: bare.to_string(), mark: Mark::Plain, latex: true });
        }
    }
    let from = text.len() - ceil(text, TAIL);
    let tail = &text[from..];
    let mut best: Option<Hit> = None;
    if options.latex {
        let mut at = 0;
        while let Some(math) = math_from(tail, at) {
            let start = math.start;
            let hit = math_run(tail, math);
            at = hit.end;
            if !denied(&tail[..start], &tail[hit.end..]) && worth(&hit.text) {
                best = Some(hit);
            }
        }
    }
    if options.expr {
        for (pattern, expression) in [(&EXPRESSION, true), (&NUMBER, false)] {
            for captures in pattern.captures_iter(tail) {
                let Some(m) = captures.get(1) else { continue };
                let found = if expression {
                    let text = trim_expression(m.as_str());
                    Some((m.start(), m.start() + text.len(), text.to_string()))
                } else {
                    number_of(tail, &captures)
                };
                let Some((start, end, number)) = found else { continue };
                if best.as_ref().is_some_and(|b| b.end >= end) || denied(&tail[..start], &tail[end..]) {
                    continue;
                }
                if expression && parser::parse(&number).is_none() {
                    continue;
                }
                // The last of several numbers is not an answer, and no earlier one is either.
                let text = if ends_list(&tail[..start]) { format!("… {number}") } else { number };
                best = Some(Hit { end, text, mark: Mark::Plain, latex: false });
            }
        }
    }
    best
}

/// A lone operator between dollars is no answer.
fn worth(text: &str) -> bool {
    text.chars().any(char::is_alphanumeric) && parser::parse(text).is_some()
}

/// The largest character boundary at or below `n`.
pub(super) fn floor(text: &str, n: usize) -> usize {
    let mut n = n.min(text.len());
    while !text.is_char_boundary(n) {
        n -= 1;
    }
    n
}

/// How many bytes to take from the end to take about `n`.
pub(super) fn ceil(text: &str, n: usize) -> usize {
    let start = text.len().saturating_sub(n);
    text.len() - floor(text, start)
}

pub(super) fn rfind_ignore_case(bytes: &[u8], word: &[u8]) -> Option<usize> {
    let mut at = bytes.len().checked_sub(word.len())?;
    loop {
        if bytes[at].eq_ignore_ascii_case(&word[0]) && bytes[at..at + word.len()].eq_ignore_ascii_case(word) {
            return Some(at);
        }
        at = at.checked_sub(1)?;
    }
}

/// The letter of a multiple-choice answer in a text: after "answer", else the first that stands alone.
///
/// `letters` are the options, e.g. `"ABCD"`. Returns the letter as written.
pub fn extract_choice(text: &str, letters: &str) -> Option<char> {
    let bytes = text.as_bytes();
    let alone = |at: usize| {
        let before = at == 0 || !bytes[at - 1].is_ascii_alphanumeric() && bytes[at - 1] != b'\'';
        let after = bytes.get(at + 1).is_none_or(|b| !b.is_ascii_alphanumeric() && *b != b'\'');
        before && after
    };
    let places = |from: usize, to: usize| {
        (from..to).filter(|&i| letters.contains(bytes[i] as char) && bytes[i].is_ascii() && alone(i))
    };
    let mut end = bytes.len();
    for _ in 0..30 {
        let Some(at) = rfind_ignore_case(&bytes[..end], b"answer") else { break };
        end = at;
        let found = places(at + 6, (at + 66).min(bytes.len())).next();
        if let Some(i) = found.filter(|&i| !denied(&text[floor(text, at + 6)..i], "")) {
            return Some(bytes[i] as char);
        }
    }
    places(0, bytes.len().min(TAIL)).next().map(|i| bytes[i] as char)
}
