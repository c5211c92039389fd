//! Finding the answer in a text.
//!
//! Order of priority, first hit wins: `<answer>` tags; `#### x`; boxes and "final answer is x. I
//! hope" (0); "final answer … is x" (50); "answer: x" (100); "answer … x" (200); any LaTeX, any number
//! (300). Boxes move to another rank by [`ExtractOptions::boxed_priority`]. Within a rank the match
//! that ends last wins. Pieces joined by `,`, "and", "or" are one list, so a hedge is never one value.
//! The ranks follow math-verify 0.9 (`src/math_verify/parser.py`); tags, negation and text answers
//! are ours.

use super::options::{ExtractOptions, Extracted, Mark, WhichBox};
use super::parser;
use regex::Regex;
use std::sync::LazyLock;

/// Bytes from the end in which unannounced answers are looked for.
const TAIL: usize = 12_000;
/// Boxes looked at, from the end (or the start).
const MAX_BOXES: usize = 40;
/// "answer" marks looked at, from the end.
const MAX_ANCHORS: usize = 30;
/// Bytes of the longest answer.
const MAX_ANSWER: usize = 8_000;

static EXPRESSION: LazyLock<Regex> = LazyLock::new(|| {
    Regex::new(r"(?:^|[\s=:])(?:\*\*)?(-?\(?-?\d[\d. +\-*×/^()÷]*[+\-*×/^()÷][\d. +\-*×/^()÷]+)")
        .expect("a fixed pattern")
});
static NUMBER: LazyLock<Regex> = LazyLock::new(|| {
    Regex::new(concat!(
        r"(?:^|[\s=:：是为])(?:\*\*)?\\?[$€£¥₹]?",
        r"([-−]?(?:[1-9]\d{0,2}(?:[ ,]\d{3})+(?:\.\d+)?|\d+[.,]\d+|\.\d+|\d+)",
        r"(?:[eE][+-]?\d+|/\d+)?)(\s*(?:\\?%|[Pp]ercent(?:age)?\b|[Pp]ct\b))?"
    ))
    .expect("a fixed pattern")
});

/// A stretch of the text that may be the answer.
struct Hit {
    end: usize,
    text: String,
    mark: Mark,
    latex: bool,
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
    if options.after_think {
        if let Some(at) = text.rfind("</think>") {
            text = &text[at + "</think>".len()..];
        }
    }
    if options.answer_tags {
        if let Some(found) = tagged(text, options) {
            return Some(found);
        }
    }
    let mut hits: Vec<(u32, Hit)> = Vec::new();
    if options.latex {
        if let Some(hit) = boxes(text, options.which_box) {
            hits.push((options.boxed_priority, hit));
        }
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
    if let Some(close) = text.rfind("</answer>") {
        if let Some(open) = text[..close].rfind("<answer>") {
            let inner = text[open + "<answer>".len()..close].trim();
            let bare = ExtractOptions { answer_tags: false, after_think: false, ..options.clone() };
            if let Some(found) = extract(inner, &bare).filter(|f| f.mark != Mark::Plain) {
                return Some(Extracted { mark: Mark::Tag, ..found });
            }
            let latex = inner.contains(['\\', '$']);
            return Hit { end: close, text: inner.to_string(), mark: Mark::Tag, latex }.found();
        }
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
fn boxes(text: &str, which: WhichBox) -> Option<Hit> {
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

/// A percent sign that follows an answer outside its delimiters.
fn percent_after(rest: &str) -> &'static str {
    let rest = rest.trim_start_matches(['$', ' ']);
    let rest = rest.strip_prefix("\\)").unwrap_or(rest).trim_start();
    let hit = ["%", "\\%", "percent", "pct", "Percent"].iter().any(|p| rest.starts_with(p));
    if hit { "\\%" } else { "" }
}

/// Whether the text between two pieces makes them one list.
fn joins(between: &str) -> bool {
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
struct Math {
    start: usize,
    end: usize,
    inner: std::ops::Range<usize>,
}

/// The first `$…$`, `$$…$$`, `\(…\)`, `\[…\]` at or after `from`.
fn math_from(text: &str, from: usize) -> Option<Math> {
    let bytes = text.as_bytes();
    let mut at = from;
    while at < bytes.len() {
        match bytes[at] {
            b'\\' => {
                let (close, multiline) = match bytes.get(at + 1) {
                    Some(b'(') => ("\\)", false),
                    Some(b'[') => ("\\]", true),
                    _ => {
                        at += 2;
                        continue;
                    }
                };
                let body = &text[at + 2..];
                if let Some(len) = body.find(close).filter(|&l| l > 0 && l <= MAX_ANSWER) {
                    if multiline || !body[..len].contains('\n') {
                        return Some(Math { start: at, end: at + 4 + len, inner: at + 2..at + 2 + len });
                    }
                }
                at += 2;
            }
            b'$' if bytes.get(at + 1) == Some(&b'$') => {
                if let Some(len) = text[at + 2..].find("$$").filter(|&l| l > 0 && l <= MAX_ANSWER) {
                    return Some(Math { start: at, end: at + 4 + len, inner: at + 2..at + 2 + len });
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
fn math_run(text: &str, first: Math) -> Hit {
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

/// Whether the words just before an answer deny it.
fn denied(before: &str) -> bool {
    let before = before.trim_end_matches([' ', '$', '*', ':', '\\', '(']);
    let word = before.rsplit([' ', '\n']).next().unwrap_or("").to_lowercase();
    word == "not"
        || word.ends_with("n't")
        || word.ends_with("n’t")
        || matches!(word.as_str(), "never" | "cannot" | "≠" | "\\neq" | "!=")
}

/// Answers after "final answer", "answer:", "answer".
fn announced(text: &str, options: &ExtractOptions, hits: &mut Vec<(u32, Hit)>) {
    let best = hits.iter().map(|h| h.0).min().unwrap_or(u32::MAX);
    let bytes = text.as_bytes();
    let mut seen = 0;
    let mut end = bytes.len();
    while let Some(at) = rfind_ignore_case(&bytes[..end], b"answer") {
        end = at;
        seen += 1;
        if seen > MAX_ANCHORS {
            return;
        }
        let after = at + "answer".len();
        let rest = &text[after..];
        let line = rest.lines().next().unwrap_or("");
        let line = if line.trim().is_empty() || line.trim() == ":" {
            // The answer may start on the next line.
            &rest[..floor(rest, 200)]
        } else {
            &line[..floor(line, 300)]
        };
        let lead = text[..at].trim_end().to_lowercase_tail(6);
        let last = lead.ends_with("final");
        let colon = line.trim_start_matches('*').trim_start().starts_with([':', '：']);
        let Some((hit, hope)) = after_anchor(text, after, line, options) else { continue };
        let is = line[..floor(line, 110)].contains(" is");
        let rank = match (last, is, colon) {
            (true, true, _) if hope => 0,
            (true, true, _) => 50,
            (_, _, true) => 100,
            _ => 200,
        };
        if rank > best {
            continue;
        }
        // Keep the last of each rank; this walks backwards.
        if !hits.iter().any(|h| h.0 == rank && h.1.mark == Mark::Announced) {
            hits.push((rank, hit));
        }
    }
}

/// The first answer in the line after a mark, and whether "I hope" follows it.
fn after_anchor(text: &str, after: usize, line: &str, options: &ExtractOptions) -> Option<(Hit, bool)> {
    let window = floor(line, 110);
    // "… is 34": what stands right after the verb comes before what stands nearer.
    let verb = verb_end(line, options);
    let latex = if options.latex {
        math_from(text, after + verb).filter(|m| m.start <= after + verb + window)
    } else {
        None
    };
    let plain = if options.expr { plain_first(&line[verb..]) } else { None };
    let plain = plain.map(|(s, e, number)| (s + verb, e + verb, number));
    let (start, hit) = match (latex, plain) {
        (Some(m), Some((s, _, _))) if m.start <= after + s => (m.start, math_run(text, m)),
        (Some(m), None) => (m.start, math_run(text, m)),
        (_, Some((s, e, number))) => {
            (after + s, Hit { end: after + e, text: number, mark: Mark::Plain, latex: false })
        }
        (None, None) => {
            let (start, hit) = worded(line, options)?;
            (after + start, Hit { end: after + hit.end, ..hit })
        }
    };
    if denied(&text[after..start]) {
        return None;
    }
    let hope = text[hit.end..].trim_start_matches(['.', ' ', '*']).starts_with("I hope");
    Some((Hit { mark: Mark::Announced, ..hit }, hope))
}

/// The end of the first "is" or "are" that an answer follows at once; 0 if there is none.
fn verb_end(line: &str, options: &ExtractOptions) -> usize {
    let mut from = 0;
    while let Some(at) = line[from..].find(" is").map(|i| from + i + 3) {
        let rest = line[at..].trim_start_matches([':', ' ', '*']);
        let start = line.len() - rest.len();
        let math = options.latex && math_from(rest, 0).is_some_and(|m| m.start == 0);
        let number = options.expr
            && rest.trim_start_matches(['-', '−', '$', '(', '.']).starts_with(|c: char| c.is_ascii_digit());
        if start > at && (math || number) {
            return at;
        }
        from = at;
    }
    0
}

/// A text answer: "the answer is an ellipse.", "Answer: Yes".
fn worded(line: &str, options: &ExtractOptions) -> Option<(usize, Hit)> {
    if !options.expr || !options.unanchored {
        return None;
    }
    let from = line.find(" is ").map(|i| i + 4).or_else(|| line.find(':').map(|i| i + 1))?;
    let rest = &line[from..];
    let cut = rest.find(['.', '\n', ';']).unwrap_or(rest.len());
    let phrase = rest[..cut].trim_matches([' ', '*', '"', ':', '`']);
    let short = !phrase.is_empty() && phrase.len() <= 60 && phrase.split_whitespace().count() <= 6;
    short.then(|| (from, Hit { end: from + cut, text: phrase.to_string(), mark: Mark::Plain, latex: false }))
}

/// The number or arithmetic that a line gives first, after its last `=` if it has one.
fn plain_first(line: &str) -> Option<(usize, usize, String)> {
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

fn trim_expression(text: &str) -> &str {
    let mut text = text.trim_end_matches([' ', '.', '+', '-', '*', '/', '^', '×', '÷', '(']);
    while text.ends_with(')') && text.matches(')').count() > text.matches('(').count() {
        text = text[..text.len() - 1].trim_end();
    }
    text
}

/// A matched number as the parser reads it: decimal comma to point, percent sign kept.
fn number_of(text: &str, captures: &regex::Captures) -> Option<(usize, usize, String)> {
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

/// The last LaTeX or number of the text.
fn unannounced(text: &str, options: &ExtractOptions) -> Option<Hit> {
    let trimmed = text.trim();
    if options.latex && trimmed.len() <= 300 && !trimmed.contains('$') && !trimmed.contains('\n') {
        // The whole text is one bare answer.
        let bare = trimmed.trim_end_matches('.');
        let words =
            bare.split_whitespace().filter(|w| w.len() > 3 && w.bytes().all(|b| b.is_ascii_alphabetic()));
        if words.count() == 0
            && parser::parse(bare).is_some()
            && bare.chars().any(|c| c.is_ascii_digit() || c == '\\')
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
            if !denied(&tail[..start]) && worth(&hit.text) {
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
                    parser::parse(text).map(|_| (m.start(), m.start() + text.len(), text.to_string()))
                } else {
                    number_of(tail, &captures)
                };
                let Some((start, end, number)) = found else { continue };
                if denied(&tail[..start]) || best.as_ref().is_some_and(|b| b.end >= end) {
                    continue;
                }
                best = Some(Hit { end, text: number, mark: Mark::Plain, latex: false });
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
fn floor(text: &str, n: usize) -> usize {
    let mut n = n.min(text.len());
    while !text.is_char_boundary(n) {
        n -= 1;
    }
    n
}

/// How many bytes to take from the end to take about `n`.
fn ceil(text: &str, n: usize) -> usize {
    let start = text.len().saturating_sub(n);
    text.len() - floor(text, start)
}

fn rfind_ignore_case(bytes: &[u8], word: &[u8]) -> Option<usize> {
    let mut at = bytes.len().checked_sub(word.len())?;
    loop {
        if bytes[at].eq_ignore_ascii_case(&word[0]) && bytes[at..at + word.len()].eq_ignore_ascii_case(word) {
            return Some(at);
        }
        at = at.checked_sub(1)?;
    }
}

trait LowercaseTail {
    fn to_lowercase_tail(&self, n: usize) -> String;
}

impl LowercaseTail for str {
    /// The last `n` bytes or so, in lower case.
    fn to_lowercase_tail(&self, n: usize) -> String {
        self[self.len() - ceil(self, n)..].to_lowercase()
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
    for _ in 0..MAX_ANCHORS {
        let Some(at) = rfind_ignore_case(&bytes[..end], b"answer") else { break };
        end = at;
        let found = places(at + 6, (at + 66).min(bytes.len())).next();
        if let Some(i) = found.filter(|&i| !denied(&text[floor(text, at + 6)..i])) {
            return Some(bytes[i] as char);
        }
    }
    places(0, bytes.len().min(TAIL)).next().map(|i| bytes[i] as char)
}
