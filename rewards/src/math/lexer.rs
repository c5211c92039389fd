//! LaTeX and plain mathematics to tokens; layout commands, dollars and currency signs vanish here.

use super::expr::{Fun, Rel};
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
    text: &'a str,
    at: usize,
    out: Vec<Token>,
    /// For each open bracket, whether commas inside it separate members.
    lists: Vec<bool>,
    environments: usize,
    space: bool,
    /// The next brace only groups (it belongs to a command).
    grouping: bool,
}

const FUNCTIONS: &[(&str, Fun)] = &[
    ("sin", Fun::Sin),
    ("cos", Fun::Cos),
    ("tan", Fun::Tan),
    ("tg", Fun::Tan),
    ("cot", Fun::Cot),
    ("sec", Fun::Sec),
    ("csc", Fun::Csc),
    ("arcsin", Fun::Asin),
    ("arccos", Fun::Acos),
    ("arctan", Fun::Atan),
    ("asin", Fun::Asin),
    ("acos", Fun::Acos),
    ("atan", Fun::Atan),
    ("sinh", Fun::Sinh),
    ("cosh", Fun::Cosh),
    ("tanh", Fun::Tanh),
    ("ln", Fun::Ln),
    ("exp", Fun::Exp),
    ("gcd", Fun::Gcd),
    ("lcm", Fun::Lcm),
    ("max", Fun::Max),
    ("min", Fun::Min),
    ("abs", Fun::Abs),
    ("floor", Fun::Floor),
    ("ceil", Fun::Ceil),
    ("Re", Fun::Re),
    ("Im", Fun::Im),
];

const GREEK: &[&str] = &[
    "alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "lambda", "mu",
    "nu", "xi", "omicron", "rho", "sigma", "tau", "upsilon", "phi", "chi", "psi", "omega", "Gamma", "Delta",
    "Theta", "Lambda", "Xi", "Pi", "Sigma", "Upsilon", "Phi", "Psi", "Omega", "ell", "hbar", "aleph",
];

/// Two- and three-letter runs that are words, never products of letters.
const WORDS: &[&str] = &[
    "am", "an", "as", "at", "be", "by", "do", "go", "he", "if", "in", "is", "it", "me", "my", "no", "on",
    "so", "to", "up", "us", "we", "No", "On", "yes", "Yes", "YES", "NO", "odd", "one", "two", "six", "ten",
    "the", "for", "not", "all", "any", "are", "was", "has", "can", "may", "she", "you", "day", "Sun", "Mon",
    "Tue", "Wed", "Thu", "Fri", "Sat", "red", "eat", "tea", "ate", "art", "rat", "tar", "top", "pot", "opt",
    "dog", "god", "cat", "act", "now", "won", "own", "nor", "tie", "win", "yet", "via", "per", "non", "new",
    "old",
];

fn layout(name: &str) -> bool {
    matches!(
        name,
        "left"
            | "right"
            | "big"
            | "Big"
            | "bigg"
            | "Bigg"
            | "bigl"
            | "bigr"
            | "Bigl"
            | "Bigr"
            | "biggl"
            | "biggr"
            | "Biggl"
            | "Biggr"
            | "middle"
            | "displaystyle"
            | "textstyle"
            | "scriptstyle"
            | "limits"
            | "nolimits"
            | "quad"
            | "qquad"
            | "hfill"
            | "notag"
            | "nonumber"
            | "newline"
            | "strut"
            | "mathstrut"
            | "allowbreak"
            | "protect"
            | "bf"
            | "rm"
            | "it"
            | "thinspace"
            | "medspace"
            | "thickspace"
            | "enspace"
            | "space"
            | "therefore"
            | "displaylimits"
            | "null"
            | "checkmark"
            | "blacksquare"
            | "square"
            | "Box"
            | "qed"
            | "nobreak"
            | "normalsize"
            | "large"
            | "small"
    )
}

fn styling(name: &str) -> bool {
    matches!(
        name,
        "mathbf"
            | "mathrm"
            | "mathit"
            | "mathsf"
            | "mathtt"
            | "mathcal"
            | "mathfrak"
            | "boldsymbol"
            | "bm"
            | "boxed"
            | "fbox"
            | "ensuremath"
            | "mathop"
            | "mathord"
            | "underline"
            | "smash"
            | "pmb"
            | "mathnormal"
            | "displaybox"
            | "underbrace"
            | "overbrace"
            | "mathbin"
            | "mathrel"
            | "mathopen"
            | "mathclose"
            | "framebox"
    )
}

fn wording(name: &str) -> bool {
    matches!(
        name,
        "text"
            | "textbf"
            | "textit"
            | "textrm"
            | "textsf"
            | "texttt"
            | "textnormal"
            | "mbox"
            | "hbox"
            | "emph"
            | "textup"
            | "textsc"
            | "operatorname"
            | "mathrm"
            | "mathbf"
            | "mathit"
            | "mathsf"
            | "mathtt"
            | "operatorname*"
            | "unit"
            | "si"
            | "mathop"
    )
}

fn known(name: &str) -> bool {
    layout(name) && name.len() > 3
        || styling(name)
        || wording(name)
        || GREEK.contains(&name)
        || FUNCTIONS.iter().any(|f| f.0 == name)
        || matches!(
            name,
            "frac"
                | "dfrac"
                | "tfrac"
                | "cfrac"
                | "sqrt"
                | "left"
                | "right"
                | "pi"
                | "infty"
                | "times"
                | "cdot"
                | "div"
                | "le"
                | "leq"
                | "ge"
                | "geq"
                | "neq"
                | "ne"
                | "lt"
                | "gt"
                | "in"
                | "cup"
                | "cap"
                | "pm"
                | "mp"
                | "binom"
                | "begin"
                | "log"
                | "overline"
                | "circ"
                | "mathbb"
                | "quad"
        )
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
    fn rest(&self) -> &'a str {
        &self.text[self.at..]
    }

    fn peek(&self) -> Option<char> {
        self.rest().chars().next()
    }

    fn push(&mut self, tok: Tok) {
        self.out.push(Token { tok, space: std::mem::take(&mut self.space) });
        self.grouping = false;
    }

    fn last(&self) -> Option<&Tok> {
        self.out.last().map(|t| &t.tok)
    }

    fn take(&mut self, prefix: &str) -> bool {
        let hit = self.rest().starts_with(prefix);
        if hit {
            self.at += prefix.len();
        }
        hit
    }

    /// Whether commas here separate members and not thousands.
    fn in_list(&self) -> bool {
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

    fn number(&mut self) {
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
        if (word && !(beside_math && run.len() <= 6 && !WORDS.contains(&run) && !pronounceable(run)))
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
    fn known_word(&mut self, run: &str) -> bool {
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

    fn command(&mut self) {
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
                {
                    if self.rest().trim_start().starts_with('}') {
                        let skip = self.rest().find('}').map_or(0, |i| i + 1);
                        self.at += skip;
                        self.lists.pop();
                        self.out.truncate(self.out.len() - 2);
                    }
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
                if let Some(f) = FUNCTIONS.iter().find(|f| f.0 == name) {
                    Tok::Fun(f.1)
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
        let long_word = word
            .split(|c: char| !c.is_ascii_alphabetic())
            .any(|w| w.len() > 1 && !FUNCTIONS.iter().any(|f| f.0 == w));
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

fn letter(name: &str) -> Tok {
    match name {
        "e" => Tok::E,
        "i" => Tok::I,
        _ => Tok::Sym(name.to_string()),
    }
}

/// Three letters that read as a product: no vowel, or neighbours as in `abc`, `xyz`.
fn product_like(run: &str) -> bool {
    let all = |set: &str| run.chars().all(|c| set.contains(c));
    run.bytes().all(|b| b.is_ascii_uppercase())
        || !run.contains(['a', 'e', 'i', 'o', 'u'])
        || ["abc", "xyza", "xyzb", "abx", "aby", "uvw", "ijk", "axy"].iter().any(|s| all(s))
}

/// Whether a run of letters could be a word.
fn pronounceable(run: &str) -> bool {
    run.len() > 3
        && run.contains(['a', 'e', 'i', 'o', 'u', 'y'])
        && run.bytes().any(|b| !b"aeiouy".contains(&b))
}
