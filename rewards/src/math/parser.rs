//! Tokens to a tree: lists, relations, unions, ratios, then arithmetic by the usual precedence.
//!
//! Depth and node count are bounded; whatever does not parse has no value and never equals anything.

use super::expr::{Expr, Fun, Rel};
use super::lexer::{Tok, Token, lex};
use super::number;
use super::units;
use num_bigint::BigInt;
use num_rational::BigRational;
use num_traits::{One, Signed};

/// Nesting an answer may have.
const MAX_DEPTH: usize = 240;
/// Calls of the recursive rules an answer may cost.
const MAX_WORK: usize = 40_000;

struct Parser {
    tokens: Vec<Token>,
    at: usize,
    depth: usize,
    work: usize,
    /// Open `|` that a `|` would close.
    bars: usize,
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
    fn peek(&self) -> Option<&Tok> {
        self.tokens.get(self.at).map(|t| &t.tok)
    }

    fn peek_at(&self, ahead: usize) -> Option<&Tok> {
        self.tokens.get(self.at + ahead).map(|t| &t.tok)
    }

    fn next(&mut self) -> Option<Tok> {
        let tok = self.tokens.get(self.at)?.tok.clone();
        self.at += 1;
        Some(tok)
    }

    fn eat(&mut self, tok: &Tok) -> bool {
        let hit = self.peek() == Some(tok);
        self.at += usize::from(hit);
        hit
    }

    fn spaced(&self) -> bool {
        self.tokens.get(self.at).is_some_and(|t| t.space)
    }

    /// Runs a rule one level deeper.
    fn deeper<T>(&mut self, rule: impl FnOnce(&mut Self) -> Option<T>) -> Option<T> {
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
    fn members(&mut self) -> Option<Vec<Expr>> {
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

    fn relation(&mut self) -> Option<Expr> {
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
            if let Some(Tok::Num(digits)) = self.peek() {
                if digits.len() > 1 && digits.starts_with('0') {
                    let text = digits.clone();
                    self.at += 1;
                    parts.push(Expr::Text(text));
                    continue;
                }
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
                if let Some(Tok::Num(power)) = self.next() {
                    if !braced || self.eat(&Tok::Close('}')) {
                        unit.push('^');
                        unit.push_str(&power);
                        return;
                    }
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

    fn sum(&mut self) -> Option<Expr> {
        self.deeper(|p| {
            let mut terms = Vec::new();
            loop {
                let mut negative = false;
                let mut both = None;
                let mut signs = 0;
                while let Some(tok) = p.peek() {
                    match tok {
                        Tok::Op('-') => negative = !negative,
                        Tok::Op('+') => {}
                        Tok::PlusMinus(up) if both.is_none() => both = Some(*up),
                        _ => break,
                    }
                    signs += 1;
                    p.at += 1;
                }
                if signs > 3 || (signs == 0 && !terms.is_empty()) {
                    return None;
                }
                let mut term = p.term(negative)?;
                if let Some(up) = both {
                    term = Expr::PlusMinus(up, Box::new(term));
                }
                terms.push(term);
                if !matches!(p.peek(), Some(Tok::Op('+' | '-') | Tok::PlusMinus(_))) {
                    break;
                }
            }
            let words = terms.len() > 1 && terms.iter().any(|t| matches!(t, Expr::Text(_)));
            if words { None } else { single_or(terms, Expr::Add) }
        })
    }

    fn term(&mut self, negative: bool) -> Option<Expr> {
        let mut left = self.factor(true)?;
        // Words take part in no product.
        if matches!(left, Expr::Text(_)) {
            return (!negative).then_some(left);
        }
        loop {
            match self.peek() {
                Some(Tok::Op('*')) => {
                    self.at += 1;
                    let right = self.signed_factor()?;
                    left = times(left, right);
                }
                Some(Tok::Op('/')) => {
                    self.at += 1;
                    let right = self.signed_factor()?;
                    left = Expr::Div(Box::new(left), Box::new(right));
                }
                Some(Tok::Mod) => {
                    self.at += 1;
                    let right = self.factor(true)?;
                    left = Expr::Call(Fun::Mod, vec![left, right]);
                }
                Some(Tok::Over | Tok::Choose) => {
                    let over = self.next()? == Tok::Over;
                    let right = self.term(false)?;
                    left = if over {
                        Expr::Div(Box::new(left), Box::new(right))
                    } else {
                        Expr::Call(Fun::Binomial, vec![left, right])
                    };
                }
                _ if self.starts_factor() => {
                    let right = self.factor(false)?;
                    left = times(left, right);
                }
                _ => break,
            }
        }
        Some(if negative { Expr::Neg(Box::new(left)) } else { left })
    }

    fn signed_factor(&mut self) -> Option<Expr> {
        if self.eat(&Tok::Op('-')) {
            return Some(Expr::Neg(Box::new(self.factor(true)?)));
        }
        self.eat(&Tok::Op('+'));
        self.factor(true)
    }

    /// Whether the next token can follow a factor without a sign between.
    fn starts_factor(&self) -> bool {
        match self.peek() {
            Some(
                Tok::Sym(_)
                | Tok::Pi
                | Tok::E
                | Tok::I
                | Tok::Fun(_)
                | Tok::Log
                | Tok::Frac
                | Tok::Binom
                | Tok::Sqrt
                | Tok::Sum
                | Tok::Prod
                | Tok::Int
                | Tok::Begin(_)
                | Tok::Infinity,
            ) => true,
            Some(Tok::Num(_)) => {
                // `x2` and `)2` are products, `5 5` is not.
                !matches!(self.tokens[self.at - 1].tok, Tok::Num(_) | Tok::Recurring(..))
            }
            Some(Tok::Open(c)) => *c != '[' && *c != 's',
            Some(Tok::Bar) => self.bars == 0,
            _ => false,
        }
    }

    fn factor(&mut self, leading: bool) -> Option<Expr> {
        self.deeper(|p| {
            let start = p.at;
            let base = p.primary()?;
            let base = p.postfix(base)?;
            // `9\frac{2}{3}` and `9 2/3`: a mixed number.
            if let Expr::Num { value, decimal: false } = &base {
                if value.is_integer() && leading && p.at == start + 1 {
                    if let Some(part) = p.mixed_part() {
                        return Some(Expr::Num { value: value + part, decimal: false });
                    }
                }
            }
            Some(base)
        })
    }

    /// A proper fraction of plain integers here, if there is one.
    fn mixed_part(&mut self) -> Option<BigRational> {
        let save = self.at;
        let part = self.try_mixed();
        if part.is_none() {
            self.at = save;
        }
        part
    }

    fn try_mixed(&mut self) -> Option<BigRational> {
        let (top, bottom): (BigInt, BigInt) = match self.peek()? {
            Tok::Frac => {
                self.at += 1;
                (self.plain_argument()?, self.plain_argument()?)
            }
            Tok::Num(top) if self.spaced() && self.peek_at(1) == Some(&Tok::Op('/')) => {
                let top = top.parse().ok()?;
                let Some(Tok::Num(bottom)) = self.peek_at(2) else { return None };
                let bottom = bottom.parse().ok()?;
                self.at += 3;
                if matches!(self.peek(), Some(Tok::Op('^' | '!') | Tok::Num(_))) {
                    return None;
                }
                (top, bottom)
            }
            _ => return None,
        };
        let proper = top.is_positive() && top < bottom && !matches!(self.peek(), Some(Tok::Op('^')));
        proper.then(|| BigRational::new(top, bottom))
    }

    fn plain_argument(&mut self) -> Option<BigInt> {
        if self.eat(&Tok::Open('{')) {
            let Some(Tok::Num(digits)) = self.next() else { return None };
            return self.eat(&Tok::Close('}')).then(|| digits.parse().ok())?;
        }
        let digit = self.single_digit()?;
        digit.parse().ok()
    }

    /// One digit of the number here, as TeX takes an argument without braces.
    fn single_digit(&mut self) -> Option<String> {
        let Some(Tok::Num(digits)) = self.tokens.get(self.at).map(|t| t.tok.clone()) else { return None };
        if digits.len() == 1 {
            self.at += 1;
            return Some(digits);
        }
        if !digits.bytes().all(|b| b.is_ascii_digit()) {
            return None;
        }
        let (first, rest) = digits.split_at(1);
        self.tokens[self.at] = Token { tok: Tok::Num(rest.to_string()), space: false };
        Some(first.to_string())
    }

    fn postfix(&mut self, mut base: Expr) -> Option<Expr> {
        loop {
            match self.peek() {
                Some(Tok::Op('^')) => {
                    self.at += 1;
                    // `4^{th}`
                    if let (Some(Tok::Open('{')), Some(Tok::Text(word))) = (self.peek(), self.peek_at(1)) {
                        if matches!(word.as_str(), "th" | "st" | "nd" | "rd") {
                            self.at += 3;
                            continue;
                        }
                    }
                    if let [
                        Some(Tok::Open('{')),
                        Some(Tok::Sym(a)),
                        Some(Tok::Sym(b)),
                        Some(Tok::Close('}')),
                    ] = [0, 1, 2, 3].map(|n| self.peek_at(n))
                    {
                        if matches!(
                            (a.as_str(), b.as_str()),
                            ("t", "h") | ("s", "t") | ("n", "d") | ("r", "d")
                        ) && matches!(base, Expr::Num { .. })
                        {
                            self.at += 4;
                            continue;
                        }
                    }
                    if matches!(self.peek(), Some(Tok::Prime)) {
                        continue;
                    }
                    let exponent = self.exponent()?;
                    base = Expr::Pow(Box::new(base), Box::new(exponent));
                }
                Some(Tok::Op('!')) => {
                    self.at += 1;
                    if self.peek() == Some(&Tok::Op('!')) {
                        return None;
                    }
                    base = Expr::Call(Fun::Factorial, vec![base]);
                }
                Some(Tok::Percent) => {
                    self.at += 1;
                    if matches!(base, Expr::Percent(_)) {
                        return None;
                    }
                    base = Expr::Percent(Box::new(base));
                }
                Some(Tok::Degree) => {
                    self.at += 1;
                    base = Expr::Degree(Box::new(base));
                }
                Some(Tok::Prime) => {
                    self.at += 1;
                    let Expr::Sym(name) = &base else { return None };
                    base = Expr::Sym(format!("{name}'"));
                }
                _ => return Some(base),
            }
        }
    }

    /// What stands after `^`: a group, or one signed factor with its own powers.
    fn exponent(&mut self) -> Option<Expr> {
        self.deeper(|p| {
            if p.peek() == Some(&Tok::Open('{')) {
                let group = p.primary()?;
                // `2^{3}^2` is not TeX, but means a tower.
                if p.eat(&Tok::Op('^')) {
                    return Some(Expr::Pow(Box::new(group), Box::new(p.exponent()?)));
                }
                return Some(group);
            }
            if p.eat(&Tok::Op('-')) {
                return Some(Expr::Neg(Box::new(p.exponent()?)));
            }
            p.eat(&Tok::Op('+'));
            let base = p.primary()?;
            if p.eat(&Tok::Op('^')) {
                return Some(Expr::Pow(Box::new(base), Box::new(p.exponent()?)));
            }
            Some(base)
        })
    }

    /// The argument of a command: a group, or one token.
    fn argument(&mut self) -> Option<Expr> {
        match self.peek()? {
            Tok::Open('{') => self.primary(),
            Tok::Num(_) => {
                let digit = self.single_digit()?;
                Some(Expr::Num { value: number::exact(&digit)?, decimal: false })
            }
            Tok::Op('-') => {
                self.at += 1;
                Some(Expr::Neg(Box::new(self.argument()?)))
            }
            _ => self.primary(),
        }
    }

    fn primary(&mut self) -> Option<Expr> {
        self.deeper(Self::primary_here)
    }

    fn primary_here(&mut self) -> Option<Expr> {
        Some(match self.next()? {
            Tok::Num(text) => {
                let decimal = text.contains('.');
                Expr::Num { value: number::exact(&text)?, decimal }
            }
            Tok::Recurring(whole, head, period) => {
                Expr::Num { value: number::recurring(&whole, &head, &period)?, decimal: false }
            }
            Tok::Pi => Expr::Pi,
            Tok::E => Expr::E,
            Tok::I => Expr::I,
            Tok::Infinity => Expr::Infinity,
            Tok::Sym(name) => return self.symbol(name),
            Tok::Open(open) => return self.bracket(open),
            Tok::Bar => {
                self.bars += 1;
                let inner = self.sum();
                self.bars -= 1;
                let inner = inner?;
                if !self.eat(&Tok::Bar) {
                    return None;
                }
                Expr::Call(Fun::Abs, vec![inner])
            }
            Tok::Frac => {
                let top = self.argument()?;
                let bottom = self.argument()?;
                Expr::Div(Box::new(top), Box::new(bottom))
            }
            Tok::Binom => {
                let top = self.argument()?;
                let bottom = self.argument()?;
                Expr::Call(Fun::Binomial, vec![top, bottom])
            }
            Tok::Sqrt => {
                let mut index = Expr::int(2);
                if self.eat(&Tok::Open('[')) {
                    index = self.sum()?;
                    if !self.eat(&Tok::Close(']')) {
                        return None;
                    }
                }
                let radicand = match self.peek()? {
                    Tok::Num(_) => self.primary()?,
                    _ => self.argument()?,
                };
                Expr::Root(Box::new(radicand), Box::new(index))
            }
            Tok::Fun(fun) => return self.function(fun),
            Tok::Log => {
                let base = if self.eat(&Tok::Op('_')) { self.argument_whole()? } else { Expr::int(10) };
                let (power, args) = self.arguments()?;
                let [arg] = <[Expr; 1]>::try_from(args).ok()?;
                powered(Expr::Call(Fun::Log, vec![base, arg]), power)
            }
            Tok::Sum => return self.big_operator(Tok::Sum),
            Tok::Prod => return self.big_operator(Tok::Prod),
            Tok::Int => return self.integral(),
            Tok::Begin(kind) => return self.matrix(&kind),
            Tok::EmptySet => Expr::Set(Vec::new()),
            Tok::Text(first) => {
                let mut words = first;
                while let Some(tok) = self.peek() {
                    match tok {
                        Tok::Text(word) => {
                            words.push(' ');
                            words.push_str(word);
                        }
                        _ => break,
                    }
                    self.at += 1;
                }
                Expr::Text(words)
            }
            _ => return None,
        })
    }

    /// Like [`Self::argument`], but a bare number is taken whole (`\log_10`).
    fn argument_whole(&mut self) -> Option<Expr> {
        match self.peek()? {
            Tok::Num(_) => self.primary(),
            _ => self.argument(),
        }
    }

    fn symbol(&mut self, mut name: String) -> Option<Expr> {
        if self.eat(&Tok::Op('_')) {
            name = format!("{name}_{}", self.subscript()?);
        }
        while self.eat(&Tok::Prime) {
            name.push('\'');
        }
        let function = matches!(name.trim_end_matches('\''), "f" | "g" | "h" | "F" | "G" | "H");
        if matches!(name.as_str(), "angle" | "triangle" | "measuredangle") {
            while let Some(Tok::Sym(part)) = self.peek() {
                name = format!("{name} {part}");
                self.at += 1;
            }
            return Some(Expr::Sym(name));
        }
        // `f^{-1}(x)`
        if function
            && [0, 1, 2, 3, 4, 5].map(|n| self.peek_at(n))
                == [
                    Some(&Tok::Op('^')),
                    Some(&Tok::Open('{')),
                    Some(&Tok::Op('-')),
                    Some(&Tok::Num("1".into())),
                    Some(&Tok::Close('}')),
                    Some(&Tok::Open('(')),
                ]
        {
            self.at += 5;
            name.push_str("^-1");
        }
        if self.peek() == Some(&Tok::Open('(')) && !self.spaced() {
            let save = self.at;
            self.at += 1;
            let args = self.members();
            let closed = self.eat(&Tok::Close(')'));
            if let (Some(args), true) = (args, closed) {
                if function {
                    return Some(Expr::Named(name, args));
                }
                if let [Expr::Sym(_) | Expr::Num { .. } | Expr::Text(_) | Expr::Pi] = args[..] {
                    let [arg] = <[Expr; 1]>::try_from(args).ok()?;
                    return Some(Expr::Apply(name, Box::new(arg)));
                }
            }
            self.at = save;
        }
        Some(Expr::Sym(name))
    }

    /// A subscript as written, spaces and braces aside.
    fn subscript(&mut self) -> Option<String> {
        let mut depth = 0;
        let mut name = String::new();
        loop {
            match self.next()? {
                Tok::Open('{') => depth += 1,
                Tok::Close('}') => depth -= 1,
                Tok::Num(s) | Tok::Sym(s) | Tok::Text(s) => name.push_str(&s),
                Tok::I => name.push('i'),
                Tok::E => name.push('e'),
                Tok::Pi => name.push_str("pi"),
                Tok::Op(c) => name.push(c),
                Tok::Comma => name.push(','),
                Tok::Rel(Rel::Eq) => name.push('='),
                Tok::Infinity => name.push('∞'),
                _ => return None,
            }
            if depth == 0 {
                return Some(name);
            }
            if depth < 0 || name.len() > 60 {
                return None;
            }
        }
    }

    fn bracket(&mut self, open: char) -> Option<Expr> {
        let bars = std::mem::take(&mut self.bars);
        let result = self.bracketed(open);
        self.bars = bars;
        result
    }

    fn bracketed(&mut self, open: char) -> Option<Expr> {
        if open == '|' || open == 'f' || open == 'c' {
            let inner = self.sum()?;
            let fun = match open {
                '|' => Fun::Abs,
                'f' => Fun::Floor,
                _ => Fun::Ceil,
            };
            return self.eat(&Tok::Close(open)).then(|| Expr::Call(fun, vec![inner]));
        }
        let closer = match open {
            '{' => '}',
            's' => 's',
            '<' => '>',
            _ => '0',
        };
        let closes = |tok: Option<&Tok>| match tok {
            Some(Tok::Close(c)) => (*c == closer || (closer == '0' && matches!(c, ')' | ']'))).then_some(*c),
            _ => None,
        };
        if closes(self.peek()).is_some() {
            self.at += 1;
            return (open == 's' || open == '{').then(|| Expr::Set(Vec::new()));
        }
        let mut members = self.members()?;
        while self.eat(&Tok::Semicolon) {
            members.extend(self.members()?);
        }
        let close = closes(self.peek())?;
        self.at += 1;
        Some(match open {
            's' => Expr::Set(members),
            '{' if members.len() == 1 => members.swap_remove(0),
            '{' => Expr::Set(members),
            '(' if close == ')' && members.len() == 1 => members.swap_remove(0),
            // Brackets around an `array` are the matrix's own.
            '(' | '[' if matches!(members[..], [Expr::Matrix(_)]) => members.swap_remove(0),
            '<' => Expr::Bracket('(', members, ')'),
            _ => Expr::Bracket(open, members, close),
        })
    }

    /// The arguments of a function: a bracket, or the product that follows; and a power before them.
    fn arguments(&mut self) -> Option<(Option<Expr>, Vec<Expr>)> {
        let power = if self.eat(&Tok::Op('^')) { Some(self.exponent()?) } else { None };
        if self.peek() == Some(&Tok::Open('(')) {
            self.at += 1;
            let bars = std::mem::take(&mut self.bars);
            let members = self.members();
            self.bars = bars;
            let members = members?;
            return self.eat(&Tok::Close(')')).then_some((power, members));
        }
        let mut arg = {
            let negative = self.eat(&Tok::Op('-'));
            let first = self.factor(true)?;
            if negative { Expr::Neg(Box::new(first)) } else { first }
        };
        while self.starts_factor()
            && !matches!(
                self.peek(),
                Some(Tok::Fun(_) | Tok::Log | Tok::Open(_) | Tok::Sum | Tok::Int | Tok::Begin(_))
            )
        {
            let right = self.factor(false)?;
            arg = times(arg, right);
        }
        Some((power, vec![arg]))
    }

    fn function(&mut self, fun: Fun) -> Option<Expr> {
        let (power, mut args) = self.arguments()?;
        if matches!(fun, Fun::Gcd | Fun::Lcm | Fun::Min | Fun::Max) {
            if let [Expr::Set(members)] = &args[..] {
                args = members.clone();
            }
            return (args.len() > 1).then_some(powered(Expr::Call(fun, args), power));
        }
        if args.len() != 1 {
            return None;
        }
        if let (Some(Expr::Neg(one)), true) = (&power, matches!(fun, Fun::Sin | Fun::Cos | Fun::Tan)) {
            if **one == Expr::int(1) {
                let inverse = match fun {
                    Fun::Sin => Fun::Asin,
                    Fun::Cos => Fun::Acos,
                    _ => Fun::Atan,
                };
                return Some(Expr::Call(inverse, args));
            }
        }
        if fun == Fun::Exp {
            let [arg] = <[Expr; 1]>::try_from(args).ok()?;
            return Some(powered(Expr::Pow(Box::new(Expr::E), Box::new(arg)), power));
        }
        Some(powered(Expr::Call(fun, args), power))
    }

    /// `\sum_{k=1}^{n} body`, `\prod` likewise.
    fn big_operator(&mut self, kind: Tok) -> Option<Expr> {
        if !self.eat(&Tok::Op('_')) {
            return None;
        }
        let Expr::Chain(sides, signs) = self.group_relation()? else { return None };
        let ([Expr::Sym(var), from], [Rel::Eq]) = (&sides[..], &signs[..]) else { return None };
        let (var, from) = (var.clone(), from.clone());
        if !self.eat(&Tok::Op('^')) {
            return None;
        }
        let to = self.argument_whole()?;
        let body = self.term(false)?;
        let parts = (Box::new(from), Box::new(to), Box::new(body));
        Some(if kind == Tok::Sum {
            Expr::Sum(var, parts.0, parts.1, parts.2)
        } else {
            Expr::Product(var, parts.0, parts.1, parts.2)
        })
    }

    fn group_relation(&mut self) -> Option<Expr> {
        if !self.eat(&Tok::Open('{')) {
            return None;
        }
        // An index called `i` is no imaginary unit, here and in what follows.
        if self.peek() == Some(&Tok::I) {
            for token in &mut self.tokens[self.at..] {
                if token.tok == Tok::I {
                    token.tok = Tok::Sym("i".into());
                }
            }
        }
        let relation = self.relation()?;
        self.eat(&Tok::Close('}')).then_some(relation)
    }

    /// `\int_a^b body\,dx`.
    fn integral(&mut self) -> Option<Expr> {
        if !self.eat(&Tok::Op('_')) {
            return None;
        }
        let from = self.argument_whole()?;
        if !self.eat(&Tok::Op('^')) {
            return None;
        }
        let to = self.argument_whole()?;
        // The differential is the last `d` of the same bracket level.
        let mut depth = 0i32;
        let mut found = None;
        for (i, token) in self.tokens.iter().enumerate().skip(self.at) {
            match &token.tok {
                Tok::Open(_) => depth += 1,
                Tok::Close(_) => depth -= 1,
                Tok::Sym(d) if d == "d" && depth == 0 => {
                    if let Some(Tok::Sym(var)) = self.tokens.get(i + 1).map(|t| &t.tok) {
                        found = Some((i, var.clone()));
                        break;
                    }
                }
                _ => {}
            }
            if depth < 0 {
                return None;
            }
        }
        let (d, var) = found?;
        let rest = self.tokens.split_off(d + 2);
        self.tokens.truncate(d);
        let body = if self.at == d { Some(Expr::int(1)) } else { self.sum() };
        let complete = self.at == d;
        self.tokens.extend(rest);
        let body = body.filter(|_| complete)?;
        Some(Expr::Integral(var, Box::new(from), Box::new(to), Box::new(body)))
    }

    fn matrix(&mut self, kind: &str) -> Option<Expr> {
        if matches!(kind, "align" | "aligned" | "equation" | "gather" | "gathered" | "cases" | "split") {
            return None;
        }
        let mut rows = Vec::new();
        let mut row = Vec::new();
        loop {
            match self.peek()? {
                Tok::End(_) => {
                    self.at += 1;
                    break;
                }
                Tok::Amp => {
                    self.at += 1;
                }
                Tok::RowSep => {
                    self.at += 1;
                    rows.push(std::mem::take(&mut row));
                }
                _ => row.push(self.sum()?),
            }
        }
        if !row.is_empty() {
            rows.push(row);
        }
        let width = rows.first()?.len();
        if width == 0 || rows.iter().any(|r| r.len() != width) {
            return None;
        }
        Some(match kind {
            "vmatrix" | "Vmatrix" => Expr::Named("det".into(), vec![Expr::Matrix(rows)]),
            _ => Expr::Matrix(rows),
        })
    }
}

fn single_or(mut parts: Vec<Expr>, make: impl FnOnce(Vec<Expr>) -> Expr) -> Option<Expr> {
    match parts.len() {
        0 => None,
        1 => parts.pop(),
        _ => Some(make(parts)),
    }
}

fn times(left: Expr, right: Expr) -> Expr {
    match left {
        Expr::Mul(mut factors) => {
            factors.push(right);
            Expr::Mul(factors)
        }
        left => Expr::Mul(vec![left, right]),
    }
}

fn powered(base: Expr, power: Option<Expr>) -> Expr {
    match power {
        Some(power) if power != Expr::Num { value: BigRational::one(), decimal: false } => {
            Expr::Pow(Box::new(base), Box::new(power))
        }
        _ => base,
    }
}
