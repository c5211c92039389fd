//! Tokens to a tree: lists, relations, unions, ratios, then arithmetic by the usual precedence.
//!
//! Depth and node count are bounded; whatever does not parse has no value and never equals anything.

use super::expr::Expr;
use super::lexer::{Tok, Token, lex};
use super::units;
use num_rational::BigRational;
use num_traits::One;

/// Nesting an answer may have.
const MAX_DEPTH: usize = 240;
/// Calls of the recursive rules an answer may cost.
const MAX_WORK: usize = 40_000;

pub(super) struct Parser {
    pub(super) tokens: Vec<Token>,
    pub(super) at: usize,
    depth: usize,
    work: usize,
    /// Open `|` that a `|` would close.
    pub(super) bars: usize,
}

/// Parses a bare answer.
pub(crate) fn parse(text: &str) -> Option<Expr> {
    if let Some(based) = based(text) {
        return Some(based);
    }
    let mut tokens = lex(text)?;
    while matches!(tokens.last(), Some(Token { tok: Tok::Comma | Tok::Semicolon | Tok::Joint, .. })) {
        tokens.pop();
    }
    while matches!(tokens.first(), Some(Token { tok: Tok::Joint | Tok::Op(':') | Tok::Comma, .. })) {
        tokens.remove(0);
    }
    if tokens.is_empty() {
        return None;
    }
    let mut parser = Parser { tokens, at: 0, depth: 0, work: 0, bars: 0 };
    let answer = parser.answer()?;
    (parser.at == parser.tokens.len()).then_some(answer)
}

/// `204_5`, `2A3_{12}`.
fn based(text: &str) -> Option<Expr> {
    let text = text.trim().trim_matches('$');
    let (digits, base) = text.split_once('_')?;
    let base = base.strip_prefix("{").and_then(|b| b.strip_suffix('}')).unwrap_or(base);
    let base = base
        .strip_prefix("\\text{")
        .or_else(|| base.strip_prefix("\\mathrm{"))
        .and_then(|b| b.strip_suffix('}'))
        .unwrap_or(base);
    let base: u32 = base.trim().parse().ok()?;
    let good = !digits.is_empty()
        && digits.len() < 200
        && digits.starts_with(|c: char| c.is_ascii_digit())
        && (2..=36).contains(&base)
        && digits.chars().all(|c| c.is_ascii_digit() || c.is_ascii_uppercase());
    good.then(|| Expr::Based(digits.trim_start_matches('0').to_string(), base))
}

impl Parser {
    pub(super) fn peek(&self) -> Option<&Tok> {
        self.tokens.get(self.at).map(|t| &t.tok)
    }

    pub(super) fn peek_at(&self, ahead: usize) -> Option<&Tok> {
        self.tokens.get(self.at + ahead).map(|t| &t.tok)
    }

    pub(super) fn next(&mut self) -> Option<Tok> {
        let tok = self.tokens.get(self.at)?.tok.clone();
        self.at += 1;
        Some(tok)
    }

    pub(super) fn eat(&mut self, tok: &Tok) -> bool {
        let hit = self.peek() == Some(tok);
        self.at += usize::from(hit);
        hit
    }

    pub(super) fn spaced(&self) -> bool {
        self.tokens.get(self.at).is_some_and(|t| t.space)
    }

    /// Runs a rule one level deeper.
    pub(super) fn deeper<T>(&mut self, rule: impl FnOnce(&mut Self) -> Option<T>) -> Option<T> {
        self.work += 1;
        if self.depth >= MAX_DEPTH || self.work > MAX_WORK {
            return None;
        }
        self.depth += 1;
        let result = rule(self);
        self.depth -= 1;
        result
    }

    fn answer(&mut self) -> Option<Expr> {
        let mut groups = vec![self.members()?];
        let mut semicolons = false;
        while self.eat(&Tok::Semicolon) {
            semicolons = true;
            if self.at == self.tokens.len() {
                break;
            }
            groups.push(self.members()?);
        }
        if !semicolons || groups.len() == 1 {
            return single_or(groups.swap_remove(0), Expr::List);
        }
        // `p=5,q=2; p=7,q=2` is a list of tuples.
        let groups = groups.into_iter().map(|g| single_or(g, |v| Expr::Bracket('(', v, ')')));
        Some(Expr::List(groups.collect::<Option<_>>()?))
    }

    /// Members between commas, "and", "or", up to a semicolon, a closing sign or the end.
    pub(super) fn members(&mut self) -> Option<Vec<Expr>> {
        let mut members = vec![self.relation()?];
        loop {
            let mut separated = false;
            while matches!(self.peek(), Some(Tok::Comma | Tok::Joint)) {
                separated = true;
                self.at += 1;
            }
            let end = matches!(self.peek(), None | Some(Tok::Semicolon | Tok::Close(_)));
            if !separated || end {
                return Some(members);
            }
            members.push(self.relation()?);
        }
    }

    pub(super) fn relation(&mut self) -> Option<Expr> {
        let first = self.side()?;
        let mut sides = vec![first];
        let mut signs = Vec::new();
        loop {
            match self.peek() {
                Some(&Tok::Rel(rel)) => {
                    self.at += 1;
                    signs.push(rel);
                    sides.push(self.side()?);
                }
                Some(Tok::In) if signs.is_empty() => {
                    self.at += 1;
                    let right = self.side()?;
                    return Some(Expr::In(Box::new(sides.swap_remove(0)), Box::new(right)));
                }
                _ => break,
            }
        }
        Some(if signs.is_empty() { sides.swap_remove(0) } else { Expr::Chain(sides, signs) })
    }

    /// Unions, differences and ratios of sums, with a unit after.
    fn side(&mut self) -> Option<Expr> {
        let mut left = self.ratio()?;
        loop {
            match self.peek() {
                Some(Tok::Cup) => {
                    self.at += 1;
                    let right = self.ratio()?;
                    match &mut left {
                        Expr::Union(parts) => parts.push(right),
                        _ => left = Expr::Union(vec![left, right]),
                    }
                }
                Some(Tok::Cap) => {
                    self.at += 1;
                    let right = self.ratio()?;
                    match &mut left {
                        Expr::Intersection(parts) => parts.push(right),
                        _ => left = Expr::Intersection(vec![left, right]),
                    }
                }
                Some(Tok::Setminus) => {
                    self.at += 1;
                    left = Expr::Difference(Box::new(left), Box::new(self.ratio()?));
                }
                Some(Tok::Pmod) => {
                    self.at += 1;
                    left = Expr::Named("pmod".into(), vec![left]);
                }
                _ => return Some(left),
            }
        }
    }

    fn ratio(&mut self) -> Option<Expr> {
        let first = self.with_unit()?;
        if self.peek() != Some(&Tok::Op(':')) {
            return Some(first);
        }
        let mut parts = vec![first];
        while self.eat(&Tok::Op(':')) {
            // Clock times keep their zeros: `2:05` is not `2:5`.
            if let Some(Tok::Num(digits)) = self.peek()
                && digits.len() > 1
                && digits.starts_with('0')
            {
                let text = digits.clone();
                self.at += 1;
                parts.push(Expr::Text(text));
                continue;
            }
            parts.push(self.with_unit()?);
        }
        Some(Expr::Ratio(parts))
    }

    fn with_unit(&mut self) -> Option<Expr> {
        let mut value = self.sum()?;
        if matches!(value, Expr::Text(_)) {
            return Some(value);
        }
        // `5 million people`
        while let Some(Tok::Text(word)) = self.peek() {
            let word = word.clone();
            let (head, rest) = word.split_once(' ').unwrap_or((&word, ""));
            let Some(scale) = units::scale(head) else { break };
            value = times(value, Expr::int(scale));
            if rest.is_empty() {
                self.at += 1;
            } else {
                self.tokens[self.at].tok = Tok::Text(rest.to_string());
            }
        }
        let mut unit = String::new();
        while let Some(Tok::Text(word)) = self.peek() {
            if units::is_no_unit(word) {
                return None;
            }
            if !unit.is_empty() {
                unit.push(' ');
            }
            unit.push_str(word);
            self.at += 1;
            self.unit_tail(&mut unit);
        }
        if unit.is_empty() {
            return Some(value);
        }
        // An ordinal ending is no unit: `4\text{th}`.
        if matches!(unit.as_str(), "th" | "st" | "nd" | "rd") {
            return Some(value);
        }
        Some(Expr::Unit(Box::new(value), unit))
    }

    /// The power or divisor of a unit: `^2`, `^{3}`, `/`, `per`.
    fn unit_tail(&mut self, unit: &mut String) {
        let save = self.at;
        match self.peek() {
            Some(Tok::Op('^')) => {
                self.at += 1;
                let braced = self.eat(&Tok::Open('{'));
                if let Some(Tok::Num(power)) = self.next()
                    && (!braced || self.eat(&Tok::Close('}')))
                {
                    unit.push('^');
                    unit.push_str(&power);
                    return;
                }
                self.at = save;
            }
            Some(Tok::Op('/' | '*')) => match self.peek_at(1) {
                Some(Tok::Text(_)) => {
                    self.at += 1;
                    unit.push('/');
                }
                Some(Tok::Sym(letter)) if matches!(letter.as_str(), "h" | "s" | "m" | "L" | "g") => {
                    unit.push('/');
                    unit.push_str(letter);
                    self.at += 2;
                    if self.peek() == Some(&Tok::Op('^')) {
                        self.unit_tail(unit);
                    }
                }
                _ => {}
            },
            _ => {}
        }
    }
}

pub(super) fn single_or(mut parts: Vec<Expr>, make: impl FnOnce(Vec<Expr>) -> Expr) -> Option<Expr> {
    match parts.len() {
        0 => None,
        1 => parts.pop(),
        _ => Some(make(parts)),
    }
}

pub(super) fn times(left: Expr, right: Expr) -> Expr {
    match left {
        Expr::Mul(mut factors) => {
            factors.push(right);
            Expr::Mul(factors)
        }
        left => Expr::Mul(vec![left, right]),
    }
}

pub(super) fn powered(base: Expr, power: Option<Expr>) -> Expr {
    match power {
        Some(power) if power != Expr::Num { value: BigRational::one(), decimal: false } => {
            Expr::Pow(Box::new(base), Box::new(power))
        }
        _ => base,
    }
}
