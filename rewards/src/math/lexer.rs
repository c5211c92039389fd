//! LaTeX and plain mathematics to tokens; layout commands, dollars and currency signs vanish here.

use super::expr::{Fun, Rel};
use super::names::{FUNCTIONS, GREEK, WORDS, product_like, pronounceable};
use super::units;

/// Tokens an answer may have in all.
const MAX_TOKENS: usize = 3000;

#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Tok {
    /// Digits, with an optional point and exponent.
    Num(String),
    /// Whole, head and period of a recurring decimal.
    Recurring(String, String, String),
    Sym(String),
    Fun(Fun),
    /// `\log`, whose base comes after.
    Log,
    /// Prefix functions of brackets only (`max`, `gcd`, …) are `Fun` too.
    Pi,
    E,
    I,
    Infinity,
    Op(char),
    Open(char),
    Close(char),
    /// `|`, which opens and closes.
    Bar,
    Comma,
    Semicolon,
    /// "and", "or" between answers.
    Joint,
    Rel(Rel),
    In,
    PlusMinus(bool),
    Percent,
    Degree,
    Prime,
    Frac,
    Binom,
    Sqrt,
    Over,
    Choose,
    Mod,
    /// `\pmod`, which is dropped with its argument.
    Pmod,
    Sum,
    Prod,
    Int,
    Lim,
    Cup,
    Cap,
    Setminus,
    EmptySet,
    Begin(String),
    End(String),
    Amp,
    RowSep,
    /// Words: the content of `\text{…}` or a bare word.
    Text(String),
    /// A sign with no meaning here; an answer that holds one has no value.
    Unknown(String),
}

#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Token {
    pub(crate) tok: Tok,
    /// White space came before it.
    pub(crate) space: bool,
}

pub(crate) struct Lexer<'a> {
    pub(super) text: &'a str,
    pub(super) at: usize,
    pub(super) out: Vec<Token>,
    /// For each open bracket, whether commas inside it separate members.
    pub(super) lists: Vec<bool>,
    pub(super) environments: usize,
    pub(super) space: bool,
    /// The next brace only groups (it belongs to a command).
    pub(super) grouping: bool,
}

/// Splits an answer into tokens; none if it is too long.
pub(crate) fn lex(text: &str) -> Option<Vec<Token>> {
    let mut lexer = Lexer {
        text,
        at: 0,
        out: Vec::new(),
        lists: Vec::new(),
        environments: 0,
        space: false,
        grouping: false,
    };
    while lexer.at < text.len() {
        lexer.step()?;
        if lexer.out.len() > MAX_TOKENS {
            return None;
        }
    }
    Some(lexer.out)
}

impl<'a> Lexer<'a> {
    pub(super) fn rest(&self) -> &'a str {
        &self.text[self.at..]
    }

    pub(super) fn peek(&self) -> Option<char> {
        self.rest().chars().next()
    }

    pub(super) fn push(&mut self, tok: Tok) {
        self.out.push(Token { tok, space: std::mem::take(&mut self.space) });
        self.grouping = false;
    }

    pub(super) fn last(&self) -> Option<&Tok> {
        self.out.last().map(|t| &t.tok)
    }

    pub(super) fn take(&mut self, prefix: &str) -> bool {
        let hit = self.rest().starts_with(prefix);
        if hit {
            self.at += prefix.len();
        }
        hit
    }

    /// Whether commas here separate members and not thousands.
    pub(super) fn in_list(&self) -> bool {
        self.lists.iter().any(|&l| l)
    }

    fn step(&mut self) -> Option<()> {
        let c = self.peek()?;
        let two = self.rest().get(..2).unwrap_or("");
        let rel = match two {
            "<=" | "=<" => Some(Rel::Le),
            ">=" => Some(Rel::Ge),
            "==" | ":=" => Some(Rel::Eq),
            "~=" => Some(Rel::Approx),
            "!=" if !matches!(self.last(), Some(Tok::Num(_))) => Some(Rel::Ne),
            _ => None,
        };
        if let Some(rel) = rel {
            self.at += 2;
            self.push(Tok::Rel(rel));
            return Some(());
        }
        if two == "**" {
            self.at += 2;
            self.push(Tok::Op('^'));
            return Some(());
        }
        if c.is_ascii_digit() || (c == '.' && self.rest()[1..].starts_with(|d: char| d.is_ascii_digit())) {
            self.number();
            return Some(());
        }
        if c.is_ascii_alphabetic() {
            self.letters();
            return Some(());
        }
        if c == '\\' {
            self.command();
            return Some(());
        }
        self.at += c.len_utf8();
        self.sign(c);
        Some(())
    }

    /// A single character that is neither letter, digit nor backslash.
    fn sign(&mut self, c: char) {
        let tok = match c {
            '$' | '€' | '£' | '¥' | '₹' | '₽' | '₩' => return,
            '~' | '\u{a0}' | '\u{2009}' | '\u{202f}' | '\u{2061}' | '\u{2062}' => {
                self.space = true;
                return;
            }
            c if c.is_whitespace() => {
                self.space = true;
                return;
            }
            '+' => Tok::Op('+'),
            '-' | '−' | '–' | '﹣' => Tok::Op('-'),
            '*' | '×' | '·' | '⋅' | '∗' | '∙' => Tok::Op('*'),
            '/' | '÷' | '∕' => Tok::Op('/'),
            '^' => Tok::Op('^'),
            '_' => Tok::Op('_'),
            '!' => Tok::Op('!'),
            ':' => Tok::Op(':'),
            '(' | '[' => {
                self.lists.push(true);
                Tok::Open(c)
            }
            ')' | ']' => {
                self.lists.pop();
                Tok::Close(c)
            }
            '{' => {
                let set = !self.grouping
                    && matches!(self.last(), None | Some(Tok::In | Tok::Rel(_) | Tok::Comma | Tok::Cup));
                self.lists.push(set);
                Tok::Open('{')
            }
            '}' => {
                self.lists.pop();
                Tok::Close('}')
            }
            '⟨' => Tok::Open('<'),
            '⟩' => Tok::Close('>'),
            '|' => Tok::Bar,
            ',' | '，' | '、' => Tok::Comma,
            ';' | '；' => Tok::Semicolon,
            '=' => Tok::Rel(Rel::Eq),
            '<' => Tok::Rel(Rel::Lt),
            '>' => Tok::Rel(Rel::Gt),
            '≤' | '⩽' => Tok::Rel(Rel::Le),
            '≥' | '⩾' => Tok::Rel(Rel::Ge),
            '≠' => Tok::Rel(Rel::Ne),
            '≈' | '≃' | '≅' => Tok::Rel(Rel::Approx),
            '∈' => Tok::In,
            '±' => Tok::PlusMinus(true),
            '∓' => Tok::PlusMinus(false),
            '%' | '％' => Tok::Percent,
            '°' | 'º' => Tok::Degree,
            '\'' | '′' | '’' => Tok::Prime,
            '√' => Tok::Sqrt,
            '∛' | '∜' => {
                let index = if c == '∛' { "3" } else { "4" };
                for tok in [Tok::Sqrt, Tok::Open('['), Tok::Num(index.into()), Tok::Close(']')] {
                    self.push(tok);
                }
                return;
            }
            'π' => Tok::Pi,
            '∞' => Tok::Infinity,
            '∪' => Tok::Cup,
            '∩' => Tok::Cap,
            '∖' => Tok::Setminus,
            '∅' | 'Ø' => Tok::EmptySet,
            '&' => Tok::Amp,
            'ℝ' | 'ℤ' | 'ℚ' | 'ℕ' | 'ℂ' => Tok::Sym(c.to_string()),
            _ => return self.unicode(c),
        };
        self.push(tok);
    }

    /// Superscripts, subscripts, vulgar fractions and Greek.
    fn unicode(&mut self, c: char) {
        const SUPER: &str = "⁰¹²³⁴⁵⁶⁷⁸⁹";
        const SUB: &str = "₀₁₂₃₄₅₆₇₈₉";
        const LETTERS: &str = "αβγδεζηθικλμνξορστυφχψω";
        const FRACTIONS: &[(char, u32, u32)] = &[
            ('½', 1, 2),
            ('⅓', 1, 3),
            ('⅔', 2, 3),
            ('¼', 1, 4),
            ('¾', 3, 4),
            ('⅕', 1, 5),
            ('⅖', 2, 5),
            ('⅗', 3, 5),
            ('⅘', 4, 5),
            ('⅙', 1, 6),
            ('⅚', 5, 6),
            ('⅐', 1, 7),
            ('⅛', 1, 8),
            ('⅜', 3, 8),
            ('⅝', 5, 8),
            ('⅞', 7, 8),
            ('⅑', 1, 9),
            ('⅒', 1, 10),
        ];
        if let Some(&(_, top, bottom)) = FRACTIONS.iter().find(|f| f.0 == c) {
            self.push(Tok::Frac);
            self.push(Tok::Num(top.to_string()));
            self.push(Tok::Num(bottom.to_string()));
            return;
        }
        for (table, op) in [(SUPER, '^'), (SUB, '_')] {
            let digit = |c: char| table.chars().position(|d| d == c);
            let minus = c == '⁻' && op == '^';
            if digit(c).is_none() && !minus {
                continue;
            }
            let mut digits: String = digit(c).map(|d| d.to_string()).unwrap_or_default();
            while let Some(d) = self.peek().and_then(digit) {
                digits.push_str(&d.to_string());
                self.at += self.peek().map_or(0, char::len_utf8);
            }
            self.push(Tok::Op(op));
            self.push(Tok::Open('{'));
            if minus {
                self.push(Tok::Op('-'));
            }
            self.push(Tok::Num(digits));
            self.push(Tok::Close('}'));
            return;
        }
        if let Some(at) = LETTERS.chars().position(|l| l == c) {
            // Both tables run from alpha to omega, pi being a sign of its own.
            let name = GREEK.iter().filter(|g| g.starts_with(char::is_lowercase)).nth(at);
            return self.push(Tok::Sym(name.map_or_else(|| c.to_string(), ToString::to_string)));
        }
        if c.is_alphabetic() {
            let mut word = c.to_string();
            while let Some(next) = self.peek().filter(|n| n.is_alphabetic()) {
                word.push(next);
                self.at += next.len_utf8();
            }
            return self.push(Tok::Text(word));
        }
        if matches!(c, '。' | '！' | '，') && self.rest().trim().is_empty() {
            return;
        }
        self.push(Tok::Unknown(c.to_string()));
    }

    fn letters(&mut self) {
        let rest = self.rest();
        let end = rest.find(|c: char| !c.is_ascii_alphabetic()).unwrap_or(rest.len());
        let run = &rest[..end];
        let after_number =
            matches!(self.last(), Some(Tok::Num(_) | Tok::Close(_) | Tok::Pi | Tok::Infinity | Tok::Percent));
        // `3x10^5`
        if run == "x" && matches!(self.last(), Some(Tok::Num(_))) && rest[1..].trim_start().starts_with("10")
        {
            self.at += 1;
            return self.push(Tok::Op('*'));
        }
        if self.known_word(run) {
            self.at += end;
            return;
        }
        if run.len() == 1 {
            self.at += 1;
            let alone = self.rest().trim_start_matches(['^', '2', '3', '{', '}', '$', ' ', '.']).is_empty();
            if after_number
                && self.space
                && alone
                && matches!(run, "m" | "g" | "s" | "h" | "L" | "l")
                && matches!(self.last(), Some(Tok::Num(_)))
            {
                return self.push(Tok::Text(run.to_string()));
            }
            return self.push(letter(run));
        }
        if after_number && units::is_unit_word(run) {
            self.at += end;
            return self.push(Tok::Text(run.to_string()));
        }
        let word = end >= 4 || WORDS.contains(&run) || run.len() == 3 && !product_like(run);
        let beside_math = self.out.iter().any(|t| !matches!(t.tok, Tok::Text(_)))
            || rest[end..].trim_start().starts_with(['^', '+', '-', '*', '/', '=', '(', '_']);
        if (word && (!beside_math || run.len() > 6 || WORDS.contains(&run) || pronounceable(run)))
            || matches!(self.last(), Some(Tok::Text(_)))
        {
            self.at += end;
            return self.push(Tok::Text(run.to_string()));
        }
        // A product of letters; a function name may end it (`xsin`), which is rare enough to leave.
        self.at += end;
        for c in run.chars() {
            self.push(letter(&c.to_string()));
        }
    }

    /// Functions, constants and joints written without a backslash.
    pub(super) fn known_word(&mut self, run: &str) -> bool {
        let tok = match run {
            "sqrt" => Tok::Sqrt,
            "pi" | "Pi" => Tok::Pi,
            "inf" | "infty" | "infinity" | "Infinity" | "oo" => Tok::Infinity,
            "log" => Tok::Log,
            "and" | "or" | "AND" | "OR" => Tok::Joint,
            "percent" | "pct" | "percentage" | "Percent" => Tok::Percent,
            "mod" => Tok::Mod,
            "degrees" | "degree" if matches!(self.last(), Some(Tok::Num(_))) => Tok::Degree,
            "cbrt" => {
                for tok in [Tok::Sqrt, Tok::Open('['), Tok::Num("3".into()), Tok::Close(']')] {
                    self.push(tok);
                }
                return true;
            }
            "U" if matches!(self.last(), Some(Tok::Close(_))) => Tok::Cup,
            _ => {
                if let Some(f) = FUNCTIONS.iter().find(|f| f.0 == run && f.0 != "Re" && f.0 != "Im") {
                    Tok::Fun(f.1)
                } else if run.len() > 3 && GREEK.contains(&run) {
                    Tok::Sym(run.to_string())
                } else {
                    return false;
                }
            }
        };
        self.push(tok);
        true
    }
}

pub(super) fn letter(name: &str) -> Tok {
    match name {
        "e" => Tok::E,
        "i" => Tok::I,
        _ => Tok::Sym(name.to_string()),
    }
}
