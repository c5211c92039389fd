//! Evaluation of a tree in complex doubles at given values of its variables.

use super::expr::{Expr, Fun};
use num_traits::ToPrimitive;
use std::f64::consts::{E, PI};

/// Terms a sum or product may run over.
const MAX_TERMS: i64 = 60;
/// Node visits one evaluation may cost.
const MAX_VISITS: u32 = 8_000;

/// A complex number.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct C {
    pub(crate) re: f64,
    pub(crate) im: f64,
}

impl C {
    pub(crate) fn real(re: f64) -> C {
        C { re, im: 0.0 }
    }

    pub(crate) fn size(self) -> f64 {
        self.re.hypot(self.im)
    }

    pub(crate) fn finite(self) -> bool {
        self.re.is_finite() && self.im.is_finite()
    }

    fn plus(self, o: C) -> C {
        C { re: self.re + o.re, im: self.im + o.im }
    }

    pub(crate) fn minus(self, o: C) -> C {
        C { re: self.re - o.re, im: self.im - o.im }
    }

    fn times(self, o: C) -> C {
        C { re: self.re * o.re - self.im * o.im, im: self.re * o.im + self.im * o.re }
    }

    pub(crate) fn over(self, o: C) -> C {
        let d = o.re * o.re + o.im * o.im;
        C { re: (self.re * o.re + self.im * o.im) / d, im: (self.im * o.re - self.re * o.im) / d }
    }

    fn exp(self) -> C {
        let size = self.re.exp();
        if self.im == 0.0 { C::real(size) } else { C { re: size * self.im.cos(), im: size * self.im.sin() } }
    }

    fn ln(self) -> Option<C> {
        (self.size() > 0.0).then(|| C { re: self.size().ln(), im: self.im.atan2(self.re) })
    }

    fn is_real(self) -> bool {
        self.im.abs() <= 1e-12 * self.re.abs().max(1e-300)
    }

    fn int_power(self, n: i64) -> C {
        let (mut out, mut square, mut left) = (C::real(1.0), self, n.unsigned_abs());
        while left > 0 {
            if left & 1 == 1 {
                out = out.times(square);
            }
            square = square.times(square);
            left >>= 1;
        }
        if n < 0 { C::real(1.0).over(out) } else { out }
    }

    /// Principal power, but the real one where a negative number meets an odd root.
    fn power(self, e: C, exact: Option<(i64, i64)>) -> Option<C> {
        if let Some((top, bottom)) = exact {
            if bottom == 1 && top.abs() < 1 << 20 {
                return (top >= 0 || self.size() > 0.0).then(|| self.int_power(top));
            }
            if bottom % 2 != 0 && self.im == 0.0 && self.re < 0.0 {
                let size = (-self.re).powf(top as f64 / bottom as f64);
                return Some(C::real(if top % 2 == 0 { size } else { -size }));
            }
        }
        if self.size() == 0.0 {
            return (e.im == 0.0 && e.re > 0.0).then_some(C::real(0.0));
        }
        if self.im == 0.0 && self.re > 0.0 && e.im == 0.0 {
            return Some(C::real(self.re.powf(e.re)));
        }
        if e.im == 0.0 && e.re.fract() == 0.0 && e.re.abs() < 1e6 {
            return Some(self.int_power(e.re as i64));
        }
        Some(self.ln()?.times(e).exp())
    }

    fn sqrt(self) -> C {
        if self.im == 0.0 {
            return if self.re >= 0.0 {
                C::real(self.re.sqrt())
            } else {
                C { re: 0.0, im: (-self.re).sqrt() }
            };
        }
        let size = self.size();
        let re = ((size + self.re) / 2.0).max(0.0).sqrt();
        let im = ((size - self.re) / 2.0).max(0.0).sqrt();
        C { re, im: im.copysign(self.im) }
    }
}

/// Values of variables and of functions of the answer's own.
pub(crate) struct Point<'a> {
    /// The value of a variable.
    pub(crate) variable: &'a dyn Fn(&str) -> f64,
    pub(crate) visits: u32,
    bound: Vec<(String, C)>,
}

impl<'a> Point<'a> {
    pub(crate) fn new(variable: &'a dyn Fn(&str) -> f64) -> Point<'a> {
        Point { variable, visits: 0, bound: Vec::new() }
    }

    /// The value of a scalar; none where it has no finite one.
    pub(crate) fn value(&mut self, expr: &Expr) -> Option<C> {
        self.visit(expr).filter(|c| c.finite())
    }

    fn visit(&mut self, expr: &Expr) -> Option<C> {
        self.visits += 1;
        if self.visits > MAX_VISITS {
            return None;
        }
        let value = match expr {
            Expr::Num { value, .. } => C::real(value.to_f64()?),
            Expr::Sym(name) => match self.bound.iter().rev().find(|b| b.0 == *name) {
                Some(bound) => bound.1,
                None => C::real((self.variable)(name)),
            },
            Expr::Pi => C::real(PI),
            Expr::E => C::real(E),
            Expr::I => C { re: 0.0, im: 1.0 },
            Expr::Neg(a) => C::real(0.0).minus(self.visit(a)?),
            Expr::Add(terms) => {
                let mut sum = C::real(0.0);
                for t in terms {
                    sum = sum.plus(self.visit(t)?);
                }
                sum
            }
            Expr::Mul(factors) => {
                let mut product = C::real(1.0);
                for f in factors {
                    product = product.times(self.visit(f)?);
                }
                product
            }
            Expr::Apply(name, a) => {
                let head = self.visit(&Expr::Sym(name.clone()))?;
                head.times(self.visit(a)?)
            }
            Expr::Div(a, b) => {
                let (a, b) = (self.visit(a)?, self.visit(b)?);
                if b.size() == 0.0 {
                    return None;
                }
                a.over(b)
            }
            Expr::Pow(a, b) => {
                let (base, e) = (self.visit(a)?, self.visit(b)?);
                base.power(e, exact_power(b))?
            }
            Expr::Root(a, index) => {
                let (a, n) = (self.visit(a)?, self.visit(index)?);
                if n.im != 0.0 || n.re.fract() != 0.0 || n.re < 1.0 || n.re > 1000.0 {
                    return None;
                }
                if n.re == 2.0 { a.sqrt() } else { a.power(C::real(1.0 / n.re), Some((1, n.re as i64)))? }
            }
            Expr::Percent(a) => self.visit(a)?.times(C::real(0.01)),
            Expr::Degree(a) => self.visit(a)?.times(C::real(PI / 180.0)),
            Expr::Call(fun, args) => {
                let mut values = Vec::with_capacity(args.len());
                for a in args {
                    values.push(self.visit(a)?);
                }
                call(*fun, &values)?
            }
            Expr::Named(name, args) => {
                // An unknown function: any fixed mixture of its arguments will do.
                let mut mixed = name.bytes().fold(0.7, |h, b| (h * 31.7 + f64::from(b)).fract() + 0.3);
                for a in args {
                    let a = self.visit(a)?;
                    mixed = (mixed * 1.618 + a.re * 2.9 + a.im * 0.37).sin() + 1.7;
                }
                C::real(mixed)
            }
            Expr::Sum(var, from, to, body) | Expr::Product(var, from, to, body) => {
                let (from, to) = (integer(self.visit(from)?)?, integer(self.visit(to)?)?);
                if to.checked_sub(from)? > MAX_TERMS {
                    return None;
                }
                let sum = matches!(expr, Expr::Sum(..));
                let mut total = C::real(if sum { 0.0 } else { 1.0 });
                for k in from..=to {
                    self.bound.push((var.clone(), C::real(k as f64)));
                    let value = self.visit(body);
                    self.bound.pop();
                    total = if sum { total.plus(value?) } else { total.times(value?) };
                }
                total
            }
            Expr::Integral(var, from, to, body) => self.integral(var, from, to, body)?,
            _ => return None,
        };
        Some(value)
    }

    /// Gauss-Legendre over 16 panels of 5 nodes, and a refusal where 8 panels disagree.
    fn integral(&mut self, var: &str, from: &Expr, to: &Expr, body: &Expr) -> Option<C> {
        const NODES: [(f64, f64); 5] = [
            (0.0, 0.568_888_888_888_888_9),
            (-0.538_469_310_105_683_1, 0.478_628_670_499_366_47),
            (0.538_469_310_105_683_1, 0.478_628_670_499_366_47),
            (-0.906_179_845_938_664, 0.236_926_885_056_189_08),
            (0.906_179_845_938_664, 0.236_926_885_056_189_08),
        ];
        let (a, b) = (self.visit(from)?, self.visit(to)?);
        let mut results = Vec::new();
        for panels in [8, 16] {
            let width = b.minus(a).times(C::real(1.0 / f64::from(panels)));
            let mut total = C::real(0.0);
            for p in 0..panels {
                let middle = a.plus(width.times(C::real(f64::from(p) + 0.5)));
                for (node, weight) in NODES {
                    let x = middle.plus(width.times(C::real(node / 2.0)));
                    self.bound.push((var.to_string(), x));
                    let value = self.visit(body);
                    self.bound.pop();
                    total = total.plus(value?.times(width).times(C::real(weight / 2.0)));
                }
            }
            results.push(total);
        }
        let (rough, fine) = (results[0], results[1]);
        (fine.minus(rough).size() <= 1e-11 * fine.size().max(1e-9)).then_some(fine)
    }
}

fn integer(c: C) -> Option<i64> {
    (c.im == 0.0 && c.re.fract() == 0.0 && c.re.abs() < 1e9).then_some(c.re as i64)
}

pub(super) fn gcd(a: i64, b: i64) -> i64 {
    let (mut a, mut b) = (a.unsigned_abs(), b.unsigned_abs());
    while b > 0 {
        (a, b) = (b, a % b);
    }
    a as i64
}

/// The exponent as a quotient of small integers, if written so.
pub(super) fn exact_power(e: &Expr) -> Option<(i64, i64)> {
    match e {
        Expr::Num { value, .. } => Some((value.numer().to_i64()?, value.denom().to_i64()?)),
        Expr::Neg(a) => exact_power(a).and_then(|(t, b)| Some((t.checked_neg()?, b))),
        Expr::Div(a, b) => match (exact_power(a)?, exact_power(b)?) {
            ((top, 1), (bottom, 1)) if bottom > 0 => {
                let g = gcd(top, bottom).max(1);
                Some((top / g, bottom / g))
            }
            _ => None,
        },
        _ => None,
    }
}

fn call(fun: Fun, args: &[C]) -> Option<C> {
    let i = C { re: 0.0, im: 1.0 };
    let one = C::real(1.0);
    let real = |f: fn(f64) -> f64| args.first().filter(|x| x.is_real()).map(|x| C::real(f(x.re)));
    let ints = || args.iter().map(|a| integer(*a)).collect::<Option<Vec<i64>>>();
    let x = *args.first()?;
    let sin = |x: C| C { re: x.re.sin() * x.im.cosh(), im: x.re.cos() * x.im.sinh() };
    let cos = |x: C| C { re: x.re.cos() * x.im.cosh(), im: -(x.re.sin() * x.im.sinh()) };
    // A pole that rounding turned into a large number is still a pole.
    let divide = |a: C, b: C| (b.size() > 1e-13).then(|| a.over(b));
    match fun {
        Fun::Sin => Some(sin(x)),
        Fun::Cos => Some(cos(x)),
        Fun::Tan => divide(sin(x), cos(x)),
        Fun::Cot => divide(cos(x), sin(x)),
        Fun::Sec => divide(one, cos(x)),
        Fun::Csc => divide(one, sin(x)),
        Fun::Asin => real(f64::asin),
        Fun::Acos => real(f64::acos),
        Fun::Atan => real(f64::atan),
        Fun::Sinh => Some(sin(i.times(x)).over(i)),
        Fun::Cosh => Some(cos(i.times(x))),
        Fun::Tanh => divide(sin(i.times(x)).over(i), cos(i.times(x))),
        Fun::Ln => x.ln(),
        Fun::Log => {
            let base = x.ln()?;
            if base.size() == 0.0 {
                return None;
            }
            Some(args.get(1)?.ln()?.over(base))
        }
        Fun::Exp => Some(x.exp()),
        Fun::Abs => Some(C::real(x.size())),
        Fun::Floor => real(f64::floor),
        Fun::Ceil => real(f64::ceil),
        Fun::Re => Some(C::real(x.re)),
        Fun::Im => Some(C::real(x.im)),
        Fun::Min => args
            .iter()
            .all(|a| a.is_real())
            .then(|| args.iter().fold(x, |m, a| if a.re < m.re { *a } else { m })),
        Fun::Max => args
            .iter()
            .all(|a| a.is_real())
            .then(|| args.iter().fold(x, |m, a| if a.re > m.re { *a } else { m })),
        Fun::Factorial => {
            let n = integer(x).filter(|n| (0..=170).contains(n))?;
            Some(C::real((1..=n).fold(1.0, |acc, k| acc * k as f64)))
        }
        Fun::Binomial => {
            let k = integer(*args.get(1)?).filter(|k| (0..=60).contains(k))?;
            let product = (0..k).fold(one, |acc, j| {
                let j = j as f64;
                acc.times(x.minus(C::real(j))).times(C::real(1.0 / (j + 1.0)))
            });
            Some(product)
        }
        Fun::Gcd => Some(C::real(ints()?.into_iter().fold(0i64, gcd) as f64)),
        Fun::Lcm => {
            let mut out = 1i64;
            for n in ints()? {
                if n == 0 {
                    return None;
                }
                out = out.checked_mul(n / gcd(out, n))?;
            }
            Some(C::real(out.abs() as f64))
        }
        Fun::Mod => match ints()?[..] {
            [a, n] if n != 0 => Some(C::real(a.rem_euclid(n) as f64)),
            _ => None,
        },
    }
}
