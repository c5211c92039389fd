//! Named functions, sums, products, integrals and matrices.

use super::expr::{Expr, Fun, Rel};
use super::lexer::Tok;
use super::parser::{Parser, powered, times};

impl Parser {
    /// The arguments of a function: a bracket, or the product that follows; and a power before them.
    pub(super) fn arguments(&mut self) -> Option<(Option<Expr>, Vec<Expr>)> {
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

    pub(super) fn function(&mut self, fun: Fun) -> Option<Expr> {
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
        if let (Some(Expr::Neg(one)), true) = (&power, matches!(fun, Fun::Sin | Fun::Cos | Fun::Tan))
            && **one == Expr::int(1)
        {
            let inverse = match fun {
                Fun::Sin => Fun::Asin,
                Fun::Cos => Fun::Acos,
                _ => Fun::Atan,
            };
            return Some(Expr::Call(inverse, args));
        }
        if fun == Fun::Exp {
            let [arg] = <[Expr; 1]>::try_from(args).ok()?;
            return Some(powered(Expr::Pow(Box::new(Expr::E), Box::new(arg)), power));
        }
        Some(powered(Expr::Call(fun, args), power))
    }

    /// `\sum_{k=1}^{n} body`, `\prod` likewise.
    pub(super) fn big_operator(&mut self, kind: Tok) -> Option<Expr> {
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
    pub(super) fn integral(&mut self) -> Option<Expr> {
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

    pub(super) fn matrix(&mut self, kind: &str) -> Option<Expr> {
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
