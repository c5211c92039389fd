//! The tree that an answer is parsed into.

use num_bigint::BigInt;
use num_rational::BigRational;

/// A comparison sign.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Rel {
    Eq,
    Ne,
    Lt,
    Le,
    Gt,
    Ge,
    Approx,
}

impl Rel {
    /// The sign with its two sides exchanged.
    pub(crate) fn flip(self) -> Rel {
        match self {
            Rel::Lt => Rel::Gt,
            Rel::Le => Rel::Ge,
            Rel::Gt => Rel::Lt,
            Rel::Ge => Rel::Le,
            same => same,
        }
    }
}

/// Functions with a meaning of their own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Fun {
    Sin,
    Cos,
    Tan,
    Cot,
    Sec,
    Csc,
    Asin,
    Acos,
    Atan,
    Sinh,
    Cosh,
    Tanh,
    Ln,
    /// Two arguments: base, number.
    Log,
    Exp,
    Abs,
    Floor,
    Ceil,
    Factorial,
    Binomial,
    Gcd,
    Lcm,
    Min,
    Max,
    Mod,
    Re,
    Im,
}

/// A parsed answer.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Expr {
    /// An exact number; `decimal` when it was written with a decimal point.
    Num {
        value: BigRational,
        decimal: bool,
    },
    Sym(String),
    Pi,
    E,
    I,
    Infinity,
    Neg(Box<Expr>),
    Add(Vec<Expr>),
    Mul(Vec<Expr>),
    Div(Box<Expr>, Box<Expr>),
    Pow(Box<Expr>, Box<Expr>),
    /// Radicand and index.
    Root(Box<Expr>, Box<Expr>),
    Call(Fun, Vec<Expr>),
    /// A named function of the answer's own: `f(x)`.
    Named(String, Vec<Expr>),
    /// A letter directly before a bracket: a product or the name of a function.
    Apply(String, Box<Expr>),
    /// `±` (true) or `∓` (false) before a term.
    PlusMinus(bool, Box<Expr>),
    Percent(Box<Expr>),
    Degree(Box<Expr>),
    /// A number with a unit, power and all, as written.
    Unit(Box<Expr>, String),
    /// A bracketed list: `(a, b)`, `[a, b)`, `⟨a, b⟩`.
    Bracket(char, Vec<Expr>, char),
    Set(Vec<Expr>),
    /// Members without brackets around.
    List(Vec<Expr>),
    Matrix(Vec<Vec<Expr>>),
    /// Sides and the signs between them.
    Chain(Vec<Expr>, Vec<Rel>),
    /// `left ∈ right`.
    In(Box<Expr>, Box<Expr>),
    Union(Vec<Expr>),
    Intersection(Vec<Expr>),
    Difference(Box<Expr>, Box<Expr>),
    Ratio(Vec<Expr>),
    /// Digits and base.
    Based(String, u32),
    /// Sum over `var` from the second to the third of the last.
    Sum(String, Box<Expr>, Box<Expr>, Box<Expr>),
    /// Product, likewise.
    Product(String, Box<Expr>, Box<Expr>, Box<Expr>),
    /// Definite integral, likewise.
    Integral(String, Box<Expr>, Box<Expr>, Box<Expr>),
    Text(String),
}

impl Expr {
    pub(crate) fn int(n: i64) -> Expr {
        Expr::Num { value: BigRational::from_integer(BigInt::from(n)), decimal: false }
    }

    /// Calls `f` on this node and all below it.
    pub(crate) fn walk(&self, f: &mut dyn FnMut(&Expr)) {
        f(self);
        match self {
            Expr::Num { .. }
            | Expr::Sym(_)
            | Expr::Pi
            | Expr::E
            | Expr::I
            | Expr::Infinity
            | Expr::Based(..)
            | Expr::Text(_) => {}
            Expr::Neg(a)
            | Expr::Apply(_, a)
            | Expr::PlusMinus(_, a)
            | Expr::Percent(a)
            | Expr::Degree(a)
            | Expr::Unit(a, _) => a.walk(f),
            Expr::Div(a, b)
            | Expr::Pow(a, b)
            | Expr::Root(a, b)
            | Expr::In(a, b)
            | Expr::Difference(a, b) => {
                a.walk(f);
                b.walk(f);
            }
            Expr::Add(v)
            | Expr::Mul(v)
            | Expr::Call(_, v)
            | Expr::Named(_, v)
            | Expr::Bracket(_, v, _)
            | Expr::Set(v)
            | Expr::List(v)
            | Expr::Union(v)
            | Expr::Intersection(v)
            | Expr::Ratio(v)
            | Expr::Chain(v, _) => v.iter().for_each(|e| e.walk(f)),
            Expr::Matrix(rows) => rows.iter().flatten().for_each(|e| e.walk(f)),
            Expr::Sum(_, a, b, c) | Expr::Product(_, a, b, c) | Expr::Integral(_, a, b, c) => {
                a.walk(f);
                b.walk(f);
                c.walk(f);
            }
        }
    }

    /// A copy with `f` tried on every node from the top down; where it answers, its answer stands.
    pub(crate) fn map(&self, f: &mut dyn FnMut(&Expr) -> Option<Expr>) -> Expr {
        if let Some(new) = f(self) {
            return new;
        }
        let mut one = |e: &Expr| Box::new(e.map(f));
        match self {
            Expr::Neg(a) => Expr::Neg(one(a)),
            Expr::Apply(n, a) => Expr::Apply(n.clone(), one(a)),
            Expr::PlusMinus(s, a) => Expr::PlusMinus(*s, one(a)),
            Expr::Percent(a) => Expr::Percent(one(a)),
            Expr::Degree(a) => Expr::Degree(one(a)),
            Expr::Unit(a, u) => Expr::Unit(one(a), u.clone()),
            Expr::Div(a, b) => Expr::Div(one(a), one(b)),
            Expr::Pow(a, b) => Expr::Pow(one(a), one(b)),
            Expr::Root(a, b) => Expr::Root(one(a), one(b)),
            Expr::In(a, b) => Expr::In(one(a), one(b)),
            Expr::Difference(a, b) => Expr::Difference(one(a), one(b)),
            Expr::Sum(v, a, b, c) => Expr::Sum(v.clone(), one(a), one(b), one(c)),
            Expr::Product(v, a, b, c) => Expr::Product(v.clone(), one(a), one(b), one(c)),
            Expr::Integral(v, a, b, c) => Expr::Integral(v.clone(), one(a), one(b), one(c)),
            Expr::Add(v) => Expr::Add(v.iter().map(|e| e.map(f)).collect()),
            Expr::Mul(v) => Expr::Mul(v.iter().map(|e| e.map(f)).collect()),
            Expr::Call(n, v) => Expr::Call(*n, v.iter().map(|e| e.map(f)).collect()),
            Expr::Named(n, v) => Expr::Named(n.clone(), v.iter().map(|e| e.map(f)).collect()),
            Expr::Bracket(o, v, c) => Expr::Bracket(*o, v.iter().map(|e| e.map(f)).collect(), *c),
            Expr::Set(v) => Expr::Set(v.iter().map(|e| e.map(f)).collect()),
            Expr::List(v) => Expr::List(v.iter().map(|e| e.map(f)).collect()),
            Expr::Union(v) => Expr::Union(v.iter().map(|e| e.map(f)).collect()),
            Expr::Intersection(v) => Expr::Intersection(v.iter().map(|e| e.map(f)).collect()),
            Expr::Ratio(v) => Expr::Ratio(v.iter().map(|e| e.map(f)).collect()),
            Expr::Chain(v, r) => Expr::Chain(v.iter().map(|e| e.map(f)).collect(), r.clone()),
            Expr::Matrix(rows) => {
                Expr::Matrix(rows.iter().map(|r| r.iter().map(|e| e.map(f)).collect()).collect())
            }
            leaf => leaf.clone(),
        }
    }

    /// Whether any node satisfies `f`.
    pub(crate) fn any(&self, f: &dyn Fn(&Expr) -> bool) -> bool {
        let mut found = false;
        self.walk(&mut |e| found |= f(e));
        found
    }

    /// Whether a decimal point was written anywhere in it.
    pub(crate) fn has_decimal(&self) -> bool {
        self.any(&|e| matches!(e, Expr::Num { decimal: true, .. }))
    }
}
