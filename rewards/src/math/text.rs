//! Answers that are words: comparison after layout, case and articles are set aside.

/// Removes white space, dollars and layout commands; what is left may be compared byte by byte.
pub(crate) fn squeeze(text: &str) -> String {
    let mut out = text.trim().trim_end_matches(['.', '。']).to_string();
    for noise in ["\\left", "\\right", "\\displaystyle", "\\!", "\\,", "\\;", "\\:", "\\ ", "$", "~"] {
        if out.contains(noise) {
            out = out.replace(noise, "");
        }
    }
    // White space says something only between letters and digits.
    let mut squeezed = String::with_capacity(out.len());
    let mut gap = false;
    for c in out.chars() {
        if c.is_whitespace() {
            gap = true;
            continue;
        }
        if gap && c.is_alphanumeric() && squeezed.ends_with(|p: char| p.is_alphanumeric() || p == ',') {
            squeezed.push(' ');
        }
        gap = false;
        squeezed.push(c);
    }
    squeezed
}

/// An answer without the bold marks and the full stop around it.
pub(crate) fn bare(text: &str) -> &str {
    let mut text = text.trim();
    if let Some(inner) = text.strip_prefix("**").and_then(|t| t.strip_suffix("**")) {
        text = inner.trim();
    }
    let stop = text
        .strip_suffix(['.', '。'])
        .filter(|t| !t.ends_with(['.', '\\']) && !t.ends_with("\\left") && !t.ends_with("\\right"));
    stop.unwrap_or(text).trim_end()
}

/// The words of a text answer, or none if it holds something else.
pub(crate) fn words(text: &str) -> Option<String> {
    let mut plain = text.to_string();
    for mark in ["\\text", "\\mathrm", "\\mbox", "\\textbf", "\\textit", "\\operatorname", "\\mathbf", "\\ "]
    {
        for bare in [format!("{mark}{{"), format!("{mark} {{")] {
            if plain.contains(&bare) {
                plain = plain.replace(&bare, " ");
            }
        }
    }
    plain.retain(|c| !matches!(c, '{' | '}' | '$' | '"' | '`' | '*'));
    if plain.contains('\\') {
        return None;
    }
    let lower = plain.to_lowercase();
    let lower = lower.trim().trim_end_matches(['.', '!', ';', ',', '。']).trim();
    let mut parts: Vec<&str> = lower.split_whitespace().collect();
    if parts.len() > 1 && matches!(parts[0], "a" | "an" | "the") {
        parts.remove(0);
    }
    let joined = parts.join(" ");
    joined.chars().any(char::is_alphabetic).then_some(joined)
}

/// The letter of a multiple choice: `C`, `(C)`, `\text{C}`, `**C**`.
pub(crate) fn choice(text: &str) -> Option<char> {
    let bare = words(text)?;
    let bare = bare.trim_matches(['(', ')', '[', ']', '.', ':', ' ']);
    let mut chars = bare.chars();
    let letter = chars.next()?.to_ascii_uppercase();
    (chars.next().is_none() && ('A'..='J').contains(&letter) && text.contains(letter)).then_some(letter)
}

/// The letter that opens an answer with its option's text: `C) 12`, `(C) 12`, `C. twelve`.
pub(crate) fn leading_choice(text: &str) -> Option<char> {
    let text = text.trim();
    let open = text.starts_with('(');
    let mut chars = text.trim_start_matches('(').chars();
    let letter = chars.next().filter(|c| ('A'..='J').contains(c))?;
    let close = chars.next()?;
    let rest = chars.as_str();
    let marked = close == ')' || (!open && matches!(close, '.' | ':') && rest.starts_with(' '));
    // A second label means the answer is not one choice.
    let other = ('A'..='J').any(|l| {
        rest.contains(&format!("{l})"))
            || rest.contains(&format!(" {l}."))
            || rest.contains(&format!(" or {l}"))
    });
    let bare = rest.trim().trim_matches(['(', ')', '.', ':']);
    let second = bare.len() == 1 && bare.starts_with(|c: char| ('A'..='J').contains(&c));
    (marked && !rest.trim().is_empty() && !other && !second).then_some(letter)
}
