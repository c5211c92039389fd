//! Symbols with their subscripts and arguments, and brackets of every kind.

use super::expr::{Expr, Fun, Rel};
use super::lexer::Tok;
use super::parser::Parser;

impl Parser {
    pub(super) fn symbol(&mut self, mut name: String) -> Option<Expr> {
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

    pub(super) fn bracket(&mut self, open: char) -> Option<Expr> {
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
}
