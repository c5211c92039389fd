//! Answers that are words: comparison after layout, case and articles are set aside.

/// Removes white space, dollars and layout commands; what is left may be compared byte by byte.
pub(crate) fn squeeze(text: &str) -> String {
    let mut out = text.trim().trim_end_matches(['.', '。']).to_string();
    for noise in ["\\left", "\\right", "\\displaystyle", "\\!", "\\,", "\\;", "\\:", "\\ ", "$", "~"] {
        if out.contains(noise) {
            out = out.replace(noise, "");
        }
    }
    out.retain(|c| !c.is_whitespace());
    out
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
    (marked && !rest.trim().is_empty() && !other).then_some(letter)
}
