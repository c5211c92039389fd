//! Finding the answer in a completion: tags, fences, and the shapes that the papers' format rewards ask for.

use crate::tools::py::is_space;

/// Text of the first `<answer>…</answer>`; with `one_line` it must not span lines (as `.` without DOTALL).
pub(super) fn first_answer(text: &str, one_line: bool) -> Option<&str> {
    if one_line { text.split('\n').find_map(between_tags) } else { between_tags(text) }
}

fn between_tags(text: &str) -> Option<&str> {
    let body = &text[text.find("<answer>")? + "<answer>".len()..];
    Some(&body[..body.find("</answer>")?])
}

/// Text of the last of the `<answer>…</answer>` that follow one another.
pub(super) fn last_answer(text: &str) -> Option<&str> {
    let mut last = None;
    let mut rest = text;
    while let Some(start) = rest.find("<answer>") {
        let body = &rest[start + "<answer>".len()..];
        let Some(end) = body.find("</answer>") else { break };
        last = Some(&body[..end]);
        rest = &body[end + "</answer>".len()..];
    }
    last
}

/// Full match of `<think>…</think>`, white space, `<answer>…</answer>`.
pub(super) fn think_answer(text: &str) -> bool {
    let Some(body) = text.strip_prefix("<think>") else { return false };
    let mut rest = body;
    while let Some(end) = rest.find("</think>") {
        let after = rest[end + "</think>".len()..].trim_start_matches(is_space);
        if let Some(answer) = after.strip_prefix("<answer>") {
            return answer.ends_with("</answer>");
        }
        rest = &rest[end + "</think>".len()..];
    }
    false
}

/// Bodies of the fences `open … ```` in order.
pub(super) fn fences<'a>(text: &'a str, open: &str) -> Vec<&'a str> {
    let mut found = Vec::new();
    let mut rest = text;
    while let Some(start) = rest.find(open) {
        let body = &rest[start + open.len()..];
        let Some(end) = body.find("```") else { break };
        found.push(&body[..end]);
        rest = &body[end + 3..];
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_found_as_the_regular_expressions_find_them() {
        assert_eq!(first_answer("<answer>a\nb</answer><answer>c</answer>", true), Some("c"));
        assert_eq!(first_answer("<answer>a\nb</answer>", false), Some("a\nb"));
        assert_eq!(last_answer("<answer>a</answer> <answer>b</answer> <answer>c"), Some("b"));
        assert!(think_answer("<think>x</think>\n <answer></answer>"));
        assert!(think_answer("<think></think> a </think><answer>b</answer> </answer>"));
        assert!(!think_answer("<think>x</think> so <answer>b</answer>"));
        assert!(!think_answer("<think>x</think><answer>b</answer>\n"));
    }
}
