//! Answers that a text announces: "the final answer is …", "Answer: …".

use super::delimited::{math_from, math_run};
use super::expr::Expr;
use super::extract::{Hit, MAX_ANSWER, ceil, floor, rfind_ignore_case};
use super::options::{ExtractOptions, Mark};
use super::prose::{denied, goes_on, hedged, plain_first};
use super::{parser, text as words};

/// "answer" marks looked at, from the end.
const MAX_ANCHORS: usize = 30;

/// Adds the answers after "final answer", "answer:", "answer", each with its rank.
pub(super) fn announced(text: &str, options: &ExtractOptions, hits: &mut Vec<(u32, Hit)>) {
    let best = hits.iter().map(|h| h.0).min().unwrap_or(u32::MAX);
    let bytes = text.as_bytes();
    let mut end = bytes.len();
    for _ in 0..MAX_ANCHORS {
        let Some(at) = rfind_ignore_case(&bytes[..end], b"answer") else { return };
        end = at;
        let after = at + "answer".len();
        let rest = &text[after..];
        let line = rest.lines().next().unwrap_or("");
        let blank = line.trim_matches([' ', ':', '*', '#']).is_empty() || line.trim_end().ends_with("is:");
        // The answer may start on the next line.
        let line = if blank { &rest[..floor(rest, 200)] } else { &line[..floor(line, 300)] };
        let lead = text[at - ceil(&text[..at], 12)..at].trim_end().to_lowercase();
        let colon = line.trim_start_matches('*').trim_start().starts_with([':', '：']);
        let Some((hit, hope)) = after_anchor(text, after, line, options) else { continue };
        let is = line[..floor(line, 110)].contains(" is");
        let rank = match (lead.ends_with("final"), is, colon) {
            (true, true, _) if hope => 0,
            (true, true, _) => 50,
            (_, _, true) => 100,
            _ => 200,
        };
        // Keep the last of each rank; this walks backwards.
        if rank <= best && !hits.iter().any(|h| h.0 == rank && h.1.mark == Mark::Announced) {
            hits.push((rank, hit));
        }
    }
}

/// Where the answer starts in the rest of the line: after the first verb, colon or `=` that something
/// like an answer follows at once, or else after the first verb at all.
fn start_of(line: &str) -> usize {
    let mut first = None;
    let mut at = 0;
    while at < line.len() {
        let rest = &line[at..];
        let verb = [" is", " are", " be", " was", " equals", ":", "：", "="]
            .iter()
            .find(|v| rest.get(..v.len()).is_some_and(|r| r.eq_ignore_ascii_case(v)))
            .map(|v| v.len());
        let Some(len) = verb else {
            at += rest.chars().next().map_or(1, char::len_utf8);
            continue;
        };
        at += len;
        let next = line[at..].trim_start_matches([':', ' ', '*', '\n']);
        if next.len() == line[at..].len() && len > 2 && !next.starts_with(['$', '\\']) {
            continue;
        }
        first = first.or(Some(at));
        let number = next.trim_start_matches(['-', '−', '$', '(', '.', '[', '{', '\\']);
        if next.starts_with(['$', '\\']) || number.starts_with(|c: char| c.is_ascii_digit()) {
            return at;
        }
    }
    first.unwrap_or(0)
}

/// The end of the sentence that starts a line.
fn sentence(line: &str) -> usize {
    let bytes = line.as_bytes();
    let ends = |i: usize| match bytes[i] {
        b'.' | b'!' | b'?' => bytes.get(i + 1).is_none_or(|b| b.is_ascii_whitespace() || *b == b'*'),
        b'\n' => !line[..i].trim_matches([' ', ':', '*', '\n']).is_empty(),
        _ => false,
    };
    (0..bytes.len()).find(|&i| ends(i)).unwrap_or(bytes.len())
}

/// Leading words that add nothing to an answer.
fn without_filler(phrase: &str) -> &str {
    const FILLER: &[&str] = &[
        "therefore",
        "thus",
        "then",
        "simply",
        "just",
        "exactly",
        "only",
        "indeed",
        "clearly",
        "either",
        "approximately",
        "about",
        "equal to",
        "given by",
        "option",
        "choice",
        "letter",
        "now",
        "also",
        "still",
        "actually",
        "really",
        "found to be",
        "to be",
        "therefore,",
        "thus,",
    ];
    let mut phrase = phrase.trim_matches([' ', '*', ':', '：', '"', '`', '\n', ',']);
    loop {
        let lower = phrase.to_lowercase();
        let Some(word) = FILLER.iter().find(|f| lower.strip_prefix(**f).is_some_and(|r| r.starts_with(' ')))
        else {
            return phrase;
        };
        phrase = phrase[word.len()..].trim_start();
    }
}

/// The first answer in the line after a mark, and whether "I hope" follows it.
fn after_anchor(text: &str, after: usize, line: &str, options: &ExtractOptions) -> Option<(Hit, bool)> {
    let from = start_of(line);
    let clause = &line[from..];
    let cut = sentence(clause);
    let phrase = without_filler(&clause[..cut]);
    let prose = options.expr && options.unanchored;
    let begin = after + from;
    let whole = |text: &str| Hit {
        end: begin + cut,
        text: text.to_string(),
        mark: Mark::Announced,
        latex: text.contains(['$', '\\']),
    };
    let hit = if let Some(hit) = phrase_hit(phrase, options).then(|| whole(phrase)) {
        if denied(&text[after..begin], "") || denied(clause.split(phrase).next().unwrap_or(""), "") {
            return None;
        }
        hit
    } else {
        let near = begin + floor(&text[begin..], 110 + MAX_ANSWER);
        let latex = if options.latex { math_from(&text[..near], begin) } else { None };
        let latex = latex.filter(|m| m.start <= begin + floor(clause, 110));
        let plain = if options.expr { plain_first(clause) } else { None };
        let (start, hit) = match (latex, plain) {
            (Some(m), Some((s, ..))) if m.start <= begin + s => (m.start, math_run(text, m)),
            (Some(m), None) => (m.start, math_run(text, m)),
            (_, Some((s, e, number))) => {
                let end = begin + e;
                let start = begin + s;
                // `18x`, `18√2`: not a number but the start of something longer.
                let tail = text[end..]
                    .split([' ', '\n', ',', ';', ')'])
                    .next()
                    .unwrap_or("")
                    .trim_end_matches(['.', '*']);
                let longer = tail
                    .starts_with(|c: char| c.is_alphabetic() || matches!(c, '√' | '^' | '\\' | '/' | '_'));
                let (number, end) =
                    if longer { (format!("{number}{tail}"), end + tail.len()) } else { (number, end) };
                (start, Hit { end, text: number, mark: Mark::Announced, latex: false })
            }
            (None, None) => {
                let short =
                    !phrase.is_empty() && phrase.len() <= 60 && phrase.split_whitespace().count() <= 6;
                return (prose && from > 0 && short).then(|| (whole(phrase), false));
            }
        };
        if denied(&text[after..start], &text[hit.end..]) {
            return None;
        }
        if hedged(text.get(begin..start).unwrap_or("")) || goes_on(&text[hit.end..]) {
            // One of several, or a bound: the phrase is the answer, whatever it is worth.
            return prose.then(|| (whole(phrase), false));
        }
        hit
    };
    let hope = text[hit.end..].trim_start_matches(['.', ' ', '*', '$']).starts_with("I hope");
    Some((Hit { mark: Mark::Announced, ..hit }, hope))
}

/// Whether a phrase is an answer as a whole.
fn phrase_hit(phrase: &str, options: &ExtractOptions) -> bool {
    if !options.latex || !options.expr || phrase.is_empty() || phrase.len() > 300 {
        return false;
    }
    // Dollars must pair up, or one stands for money.
    let math = phrase.chars().any(|c| c.is_ascii_digit() || matches!(c, '\\' | '$' | 'π' | '√' | '∞'));
    let single = words::choice(phrase).is_some();
    (math || single)
        && parser::parse(phrase).is_some_and(|e| !e.any(&|n| matches!(n, Expr::Text(_))) || single)
}
