//! Backslash commands of LaTeX to tokens.

use super::expr::Rel;
use super::lexer::{Lexer, Tok, Token, letter};
use super::names::{function, known, layout, styling, wording};

impl<'a> Lexer<'a> {
    /// The raw content of the brace group here.
    fn group(&mut self) -> Option<&'a str> {
        let rest = self.rest();
        let trimmed = rest.trim_start();
        if !trimmed.starts_with('{') {
            return None;
        }
        let open = rest.len() - trimmed.len();
        let mut depth = 0;
        let mut escaped = false;
        for (i, b) in rest.bytes().enumerate().skip(open) {
            match b {
                _ if escaped => escaped = false,
                b'\\' => escaped = true,
                b'{' => depth += 1,
                b'}' => {
                    depth -= 1;
                    if depth == 0 {
                        self.at += i + 1;
                        return Some(&rest[open + 1..i]);
                    }
                }
                _ => {}
            }
        }
        None
    }

    pub(super) fn command(&mut self) {
        let after = &self.rest()[1..];
        let name_len = after.find(|c: char| !c.is_ascii_alphabetic()).unwrap_or(after.len());
        if name_len == 0 {
            let Some(c) = after.chars().next() else {
                self.at += 1;
                return;
            };
            self.at += 1 + c.len_utf8();
            let tok = match c {
                '\\' => {
                    // A doubled backslash before a command is a broken escape, unless rows are meant.
                    let rest = self.rest();
                    let len = rest.find(|c: char| !c.is_ascii_alphabetic()).unwrap_or(rest.len());
                    if self.environments == 0 && (1..=len).rev().any(|n| known(&rest[..n])) {
                        self.at -= 1;
                        return;
                    }
                    if self.environments == 0 && (rest.starts_with(['{', '}', '%', '$', ',', '!', '(', ')']))
                    {
                        self.at -= 1;
                        return;
                    }
                    if self.environments == 0 && rest.trim_matches(['$', ' ', '\n']).is_empty() {
                        return;
                    }
                    Tok::RowSep
                }
                '{' => {
                    self.lists.push(true);
                    Tok::Open('s')
                }
                '}' => {
                    self.lists.pop();
                    Tok::Close('s')
                }
                '%' => Tok::Percent,
                '|' => Tok::Bar,
                '$' | '(' | ')' | '[' | ']' => return,
                '_' | '&' | '#' => Tok::Unknown(c.to_string()),
                _ => {
                    self.space |= c.is_whitespace() || matches!(c, ',' | ';' | ':' | '>');
                    return;
                }
            };
            return self.push(tok);
        }
        let mut name = &after[..name_len];
        // `\quadx`: a spacing command that swallowed a letter.
        for head in ["qquad", "quad", "cdot", "times", "pi", "displaystyle"] {
            if name.len() > head.len() && name.starts_with(head) && !known(name) {
                name = &name[..head.len()];
                break;
            }
        }
        self.at += 1 + name.len();
        self.named(name);
    }

    fn named(&mut self, name: &'a str) {
        if layout(name) {
            self.space |=
                !matches!(name, "left" | "right" | "middle") && !name.to_lowercase().starts_with("big");
            if matches!(name, "left" | "right") && self.rest().starts_with('.') {
                self.at += 1;
            }
            return;
        }
        if wording(name) && self.words(name) {
            return;
        }
        if styling(name) || wording(name) {
            self.grouping = true;
            return;
        }
        let tok = match name {
            "frac" | "dfrac" | "tfrac" | "cfrac" => Tok::Frac,
            "binom" | "dbinom" | "tbinom" => Tok::Binom,
            "sqrt" => Tok::Sqrt,
            "over" => Tok::Over,
            "choose" => Tok::Choose,
            "pi" => Tok::Pi,
            "infty" | "infin" => Tok::Infinity,
            "imath" => Tok::I,
            "times" | "cdot" | "ast" | "star" | "cdotp" | "bullet" => Tok::Op('*'),
            "div" => Tok::Op('/'),
            "pm" => Tok::PlusMinus(true),
            "mp" => Tok::PlusMinus(false),
            "le" | "leq" | "leqslant" | "leqq" => Tok::Rel(Rel::Le),
            "ge" | "geq" | "geqslant" | "geqq" => Tok::Rel(Rel::Ge),
            "lt" => Tok::Rel(Rel::Lt),
            "gt" => Tok::Rel(Rel::Gt),
            "ne" | "neq" => Tok::Rel(Rel::Ne),
            "equiv" => Tok::Rel(Rel::Eq),
            "approx" | "simeq" | "cong" | "thickapprox" | "doteq" => Tok::Rel(Rel::Approx),
            "in" => Tok::In,
            "cup" => Tok::Cup,
            "cap" => Tok::Cap,
            "setminus" | "backslash" | "smallsetminus" => Tok::Setminus,
            "emptyset" | "varnothing" => Tok::EmptySet,
            "land" | "lor" | "wedge" | "vee" => Tok::Joint,
            "circ" | "degree" | "deg" => {
                if matches!(self.last(), Some(Tok::Op('^'))) {
                    self.out.pop();
                } else if let [.., Token { tok: Tok::Op('^'), .. }, Token { tok: Tok::Open('{'), .. }] =
                    self.out[..]
                    && self.rest().trim_start().starts_with('}')
                {
                    let skip = self.rest().find('}').map_or(0, |i| i + 1);
                    self.at += skip;
                    self.lists.pop();
                    self.out.truncate(self.out.len() - 2);
                }
                Tok::Degree
            }
            "prime" => {
                if matches!(self.last(), Some(Tok::Op('^'))) {
                    self.out.pop();
                }
                Tok::Prime
            }
            "bmod" | "mod" => Tok::Mod,
            "pmod" => {
                self.group();
                Tok::Pmod
            }
            "sum" => Tok::Sum,
            "prod" => Tok::Prod,
            "int" => Tok::Int,
            "lim" => Tok::Lim,
            "log" => Tok::Log,
            "lg" => {
                for tok in [Tok::Log, Tok::Op('_'), Tok::Num("10".into())] {
                    self.push(tok);
                }
                return;
            }
            "lfloor" => Tok::Open('f'),
            "rfloor" => Tok::Close('f'),
            "lceil" => Tok::Open('c'),
            "rceil" => Tok::Close('c'),
            "lvert" | "lVert" => Tok::Open('|'),
            "rvert" | "rVert" => Tok::Close('|'),
            "vert" | "Vert" | "mid" => Tok::Bar,
            "langle" => {
                self.lists.push(true);
                Tok::Open('<')
            }
            "rangle" => {
                self.lists.pop();
                Tok::Close('>')
            }
            "lbrace" => Tok::Open('s'),
            "rbrace" => Tok::Close('s'),
            "lbrack" => Tok::Open('['),
            "rbrack" => Tok::Close(']'),
            "colon" => Tok::Op(':'),
            "begin" | "end" => return self.environment(name),
            "mathbb" | "mathds" => {
                let set = self.group().map(str::trim).unwrap_or("");
                let name = match set {
                    "R" => "ℝ",
                    "Z" => "ℤ",
                    "Q" => "ℚ",
                    "N" => "ℕ",
                    "C" => "ℂ",
                    other => other,
                };
                Tok::Sym(name.to_string())
            }
            "overline" | "bar" | "vec" | "hat" | "widehat" | "tilde" | "overrightarrow" | "widetilde"
            | "dot" => {
                let inner = match self.group() {
                    Some(inner) => inner.trim().to_string(),
                    None => match self.rest().trim_start().chars().next() {
                        Some(c) if c.is_ascii_alphanumeric() => {
                            self.at = self.text.len() - self.rest().trim_start().len() + 1;
                            c.to_string()
                        }
                        _ => return self.push(Tok::Unknown(name.to_string())),
                    },
                };
                Tok::Sym(format!("{name} {inner}"))
            }
            "phantom" | "hphantom" | "vphantom" | "hspace" | "vspace" | "label" | "tag" | "color"
            | "hskip" => {
                self.group();
                return;
            }
            "varepsilon" => Tok::Sym("epsilon".into()),
            "varphi" => Tok::Sym("phi".into()),
            "vartheta" => Tok::Sym("theta".into()),
            "varrho" => Tok::Sym("rho".into()),
            "ldots" | "dots" | "cdots" | "dotsc" | "dotsb" | "dotsm" | "vdots" | "ddots" => {
                Tok::Unknown("dots".into())
            }
            "to" | "rightarrow" | "mapsto" | "longrightarrow" | "implies" | "Rightarrow" | "iff" => {
                Tok::Unknown("to".into())
            }
            _ => {
                if let Some(fun) = function(name) {
                    Tok::Fun(fun)
                } else {
                    Tok::Sym(name.to_string())
                }
            }
        };
        self.push(tok);
    }

    fn environment(&mut self, name: &str) {
        let kind = self.group().unwrap_or("").trim_end_matches('*').to_string();
        if name == "begin" {
            if kind == "array" {
                self.group();
            }
            self.environments += 1;
            self.lists.push(true);
            self.push(Tok::Begin(kind));
        } else {
            self.environments = self.environments.saturating_sub(1);
            self.lists.pop();
            self.push(Tok::End(kind));
        }
    }

    /// The argument of `\text` and its kin: joints, units and words; false if it is mathematics.
    fn words(&mut self, name: &str) -> bool {
        let start = self.at;
        let Some(inner) = self.group() else { return false };
        let word = inner.trim().trim_matches(['~', ',', ' ']).trim();
        self.space |= inner.starts_with([' ', '~']);
        if word.is_empty() {
            if inner.contains(',') {
                self.push(Tok::Comma);
            }
            self.space = true;
            return true;
        }
        if self.known_word(word) {
            return true;
        }
        match word {
            "%" | "\\%" | "percent" => {
                self.push(Tok::Percent);
                return true;
            }
            "i" | "e" => {
                self.push(letter(word));
                return true;
            }
            _ => {}
        }
        let long_word =
            word.split(|c: char| !c.is_ascii_alphabetic()).any(|w| w.len() > 1 && function(w).is_none());
        let letters = word.chars().filter(|c| c.is_alphabetic()).count();
        let single = letters == 1 && word.len() > 1 || word.chars().any(|c| c.is_ascii_digit());
        let upright = !matches!(name, "mathbf" | "mathit" | "mathsf" | "mathtt" | "textit" | "textbf");
        let unit = upright
            && matches!(self.last(), Some(Tok::Num(_) | Tok::Close(_) | Tok::Pi | Tok::Sym(_)))
            && word.chars().all(|c| c.is_alphabetic() || matches!(c, '.' | ' ' | '/' | '(' | ')'));
        if !long_word && !unit && (single || letters == 0 || word.len() == 1) {
            self.at = start;
            self.grouping = true;
            return false;
        }
        let word = word.trim_matches(['(', ')']).to_string();
        self.push(Tok::Text(word));
        true
    }
}
