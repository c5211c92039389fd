//! What can be said about a script without running it: names it cannot reach, drawn rewards.

use std::sync::LazyLock;

use regex::Regex;

use super::{Finding, Severity};
use crate::script::Script;

static GONE: LazyLock<Regex> = LazyLock::new(|| {
    Regex::new(r"(?:^|[^\w.:])(?:(io|os|debug|package|coroutine)\s*\.\s*\w+|(require|load|loadstring|loadfile|dofile|getfenv|setfenv|newproxy|collectgarbage)\s*[(\x22'\[])").expect("a valid pattern")
});
static LIBRARY: LazyLock<Regex> = LazyLock::new(|| {
    Regex::new(r"(?:^|[^\w.:])rft\s*\.\s*(\w+)(?:\s*\.\s*(\w+))?").expect("a valid pattern")
});
static RANDOM: LazyLock<Regex> =
    LazyLock::new(|| Regex::new(r"math\s*\.\s*random\b").expect("a valid pattern"));
/// Findings of the text alone; `known` says whether `rft.A` or `rft.A.B` exists.
pub(super) fn lint(script: &Script, known: impl Fn(&str, Option<&str>) -> bool) -> Vec<Finding> {
    let mut findings = Vec::new();
    let code = code_of(script.text());
    for (at, line) in code.lines().enumerate() {
        let mut add = |severity, check, message: String| {
            findings.push(Finding { line: Some(at as u32 + 1), ..Finding::new(severity, check, message) });
        };
        for found in GONE.captures_iter(line) {
            let name = found.get(1).or(found.get(2)).map_or("", |m| m.as_str());
            add(
                Severity::Error,
                "unreachable",
                format!(
                    "`{name}` does not exist in the sandbox; a reward computes from `sample`, `ctx` and `rft`"
                ),
            );
        }
        for found in LIBRARY.captures_iter(line) {
            let (group, function) = (&found[1], found.get(2).map(|m| m.as_str()));
            if !known(group, function) {
                let name = function.map_or_else(|| group.to_string(), |f| format!("{group}.{f}"));
                add(Severity::Error, "unknown_function", format!("there is no `rft.{name}`"));
            }
        }
        if RANDOM.is_match(line) {
            add(
                Severity::Warning,
                "random",
                "a drawn reward adds noise to every advantage; it is repeatable (keyed by seed, step, row and sample), but is it meant?".into(),
            );
        }
    }
    findings
}

/// The text with comments and strings blanked; lines stay where they are.
fn code_of(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut out: Vec<u8> = Vec::with_capacity(bytes.len());
    let blank = |out: &mut Vec<u8>, part: &[u8]| {
        out.extend(part.iter().map(|b| if *b == b'\n' { b'\n' } else { b' ' }));
    };
    let mut at = 0;
    while at < bytes.len() {
        let rest = &bytes[at..];
        let comment = rest.starts_with(b"--");
        let long = long_bracket(if comment { &rest[2..] } else { rest });
        let length = if let Some(inner) = long {
            inner + if comment { 2 } else { 0 }
        } else if comment {
            rest.iter().position(|b| *b == b'\n').unwrap_or(rest.len())
        } else if matches!(rest[0], b'"' | b'\'' | b'`') {
            let mut end = 1;
            while end < rest.len() && rest[end] != rest[0] && rest[end] != b'\n' {
                end += if rest[end] == b'\\' { 2 } else { 1 };
            }
            (end + 1).min(rest.len())
        } else {
            out.push(rest[0]);
            at += 1;
            continue;
        };
        blank(&mut out, &rest[..length]);
        at += length;
    }
    String::from_utf8_lossy(&out).into_owned()
}

/// Length of the long bracket `[==[ … ]==]` that the text begins with.
fn long_bracket(text: &[u8]) -> Option<usize> {
    if text.first() != Some(&b'[') {
        return None;
    }
    let level = text[1..].iter().take_while(|b| **b == b'=').count();
    if text.get(1 + level) != Some(&b'[') {
        return None;
    }
    let close: Vec<u8> = [&b"]"[..], &vec![b'='; level], b"]"].concat();
    let body = 2 + level;
    let end = text[body..].windows(close.len()).position(|w| w == close);
    Some(end.map_or(text.len(), |end| body + end + close.len()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comments_and_strings_are_no_code() {
        let code = code_of("a = 'io.read' -- os.time\nb = [[\nos.x\n]] c --[==[ io.x\n]] ]==] d");
        assert!(!code.contains("io") && !code.contains("os"), "{code}");
        assert!(code.contains(" c ") && code.ends_with(" d"));
        assert_eq!(code.lines().count(), 5);
    }
}
