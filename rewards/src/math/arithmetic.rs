//! Sums, products, powers and what they are made of.

use super::expr::{Expr, Fun};
use super::lexer::{Tok, Token};
use super::number;
use super::parser::{Parser, powered, single_or, times};
use num_bigint::BigInt;
use num_rational::BigRational;
use num_traits::Signed;

impl Parser {
    pub(super) fn sum(&mut self) -> Option<Expr> {
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

    pub(super) fn term(&mut self, negative: bool) -> Option<Expr> {
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
    pub(super) fn starts_factor(&self) -> bool {
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

    pub(super) fn factor(&mut self, leading: bool) -> Option<Expr> {
        self.deeper(|p| {
            let start = p.at;
            let base = p.primary()?;
            let base = p.postfix(base)?;
            // `9\frac{2}{3}` and `9 2/3`: a mixed number.
            if let Expr::Num { value, decimal: false } = &base
                && value.is_integer()
                && leading
                && p.at == start + 1
                && let Some(part) = p.mixed_part()
            {
                return Some(Expr::Num { value: value + part, decimal: false });
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
                    if let (Some(Tok::Open('{')), Some(Tok::Text(word))) = (self.peek(), self.peek_at(1))
                        && matches!(word.as_str(), "th" | "st" | "nd" | "rd")
                    {
                        self.at += 3;
                        continue;
                    }
                    if let [Some(Tok::Open('{')), Some(Tok::Sym(a)), Some(Tok::Sym(b)), Some(Tok::Close('}'))] =
                        [0, 1, 2, 3].map(|n| self.peek_at(n))
                        && matches!(
                            (a.as_str(), b.as_str()),
                            ("t", "h") | ("s", "t") | ("n", "d") | ("r", "d")
                        )
                        && matches!(base, Expr::Num { .. })
                    {
                        self.at += 4;
                        continue;
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
    pub(super) fn exponent(&mut self) -> Option<Expr> {
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
    pub(super) fn argument(&mut self) -> Option<Expr> {
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

    pub(super) fn primary(&mut self) -> Option<Expr> {
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
    pub(super) fn argument_whole(&mut self) -> Option<Expr> {
        match self.peek()? {
            Tok::Num(_) => self.primary(),
            _ => self.argument(),
        }
    }
}
