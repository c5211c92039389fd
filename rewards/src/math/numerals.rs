//! Numbers as they are written: thousands marks, decimals, recurring decimals, exponents.

use super::lexer::{Lexer, Tok};

impl Lexer<'_> {
    fn digits(&mut self) -> String {
        let rest = self.rest();
        let end = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
        self.at += end;
        rest[..end].to_string()
    }

    /// The length of a thousands mark here, with three digits and no more after it.
    fn thousands(&self, groups: usize) -> Option<usize> {
        let rest = self.rest();
        let three = |skip: usize| {
            let after = rest.get(skip..)?.as_bytes();
            let digits = after.iter().take_while(|b| b.is_ascii_digit()).count();
            (digits == 3).then_some(skip)
        };
        for mark in ["{,}", ",\\!", "\\,", "\\!"] {
            if let Some(after) = rest.strip_prefix(mark) {
                let spaces = after.len() - after.trim_start_matches(' ').len();
                if let Some(skip) = three(mark.len() + spaces) {
                    return Some(skip);
                }
            }
        }
        if self.in_list() {
            return None;
        }
        if rest.starts_with(',') {
            // All groups to the end of the run must have three digits, else it is a list.
            let run = rest.as_bytes();
            let mut at = 0;
            while run.get(at) == Some(&b',') && run.get(at + 1).is_some_and(u8::is_ascii_digit) {
                let digits = run[at + 1..].iter().take_while(|b| b.is_ascii_digit()).count();
                if digits != 3 {
                    return None;
                }
                at += 4;
            }
            return three(1);
        }
        if rest.starts_with(' ') && groups < 6 {
            let skip = three(1)?;
            let after = rest[skip + 3..].trim_start();
            return (!after.starts_with('/')).then_some(skip);
        }
        None
    }

    pub(super) fn number(&mut self) {
        let mut text = self.digits();
        if !text.is_empty() && text.len() <= 3 && !text.starts_with('0') {
            let mut groups = 0;
            while let Some(skip) = self.thousands(groups) {
                self.at += skip;
                text.push_str(&self.digits());
                groups += 1;
            }
        }
        if self.rest().starts_with('.') {
            let after = &self.rest()[1..];
            if after.starts_with(|c: char| c.is_ascii_digit()) {
                self.at += 1;
                text = if text.is_empty() { "0".to_string() } else { text };
                text.push('.');
                text.push_str(&self.digits());
                if self.recurring(&text) {
                    return;
                }
            } else if after.starts_with("\\overline")
                || after.starts_with("\\bar")
                || after.starts_with("\\dot")
            {
                self.at += 1;
                text.push('.');
                if self.recurring(&text) {
                    return;
                }
            } else if after.trim_matches(['$', '}', ' ', ')', '\n']).is_empty()
                || after.starts_with("\\)")
                || after.starts_with("\\]")
            {
                // A full stop at the end of the sentence.
                self.at += 1;
            }
        }
        let rest = self.rest().as_bytes();
        if matches!(rest.first(), Some(b'e' | b'E')) {
            let sign = usize::from(matches!(rest.get(1), Some(b'+' | b'-')));
            let digits = rest[1 + sign..].iter().take_while(|b| b.is_ascii_digit()).count();
            let after = rest.get(1 + sign + digits);
            if digits > 0 && !after.is_some_and(|b| b.is_ascii_alphabetic() || *b == b'.') {
                text.push_str(&self.rest()[..1 + sign + digits]);
                self.at += 1 + sign + digits;
            }
        }
        self.push(Tok::Num(text));
    }

    /// `\overline{27}`, `\bar{3}`, `\dot{3}` after the point of `text`.
    fn recurring(&mut self, text: &str) -> bool {
        let start = self.at;
        for name in ["\\overline", "\\bar", "\\dot"] {
            if self.take(name) {
                let braced = self.take("{");
                let period = self.digits();
                if !period.is_empty() && (!braced || self.take("}")) {
                    let (whole, head) = text.split_once('.').unwrap_or((text, ""));
                    let tok = Tok::Recurring(whole.to_string(), head.to_string(), period);
                    self.push(tok);
                    return true;
                }
            }
            self.at = start;
        }
        false
    }
}
