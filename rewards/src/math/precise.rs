//! Evaluation of a tree in complex balls, to tell near misses from equality.

use super::ball::Ball;
use super::expr::{Expr, Fun};
use num_rational::BigRational;
use num_traits::ToPrimitive;

/// A complex ball.
#[derive(Debug, Clone)]
pub(crate) struct Z {
    re: Ball,
    im: Ball,
}

impl Z {
    fn real(re: Ball) -> Z {
        Z { re, im: Ball::int(0) }
    }

    /// An imaginary part that is as good as zero is zero.
    fn settled(self) -> Z {
        if self.im.vanishes() && !self.re.holds_zero() { Z::real(self.re) } else { self }
    }

    fn plus(&self, o: &Z) -> Option<Z> {
        Some(Z { re: self.re.plus(&o.re)?, im: self.im.plus(&o.im)? })
    }

    fn neg(&self) -> Z {
        Z { re: self.re.neg(), im: self.im.neg() }
    }

    fn minus(&self, o: &Z) -> Option<Z> {
        self.plus(&o.neg())
    }

    fn is_real(&self) -> bool {
        self.im.exact_zero()
    }

    fn times(&self, o: &Z) -> Option<Z> {
        if self.is_real() && o.is_real() {
            return Some(Z::real(self.re.times(&o.re)?));
        }
        let re = self.re.times(&o.re)?.minus(&self.im.times(&o.im)?)?;
        let im = self.re.times(&o.im)?.plus(&self.im.times(&o.re)?)?;
        Some(Z { re, im })
    }

    fn square_size(&self) -> Option<Ball> {
        self.re.times(&self.re)?.plus(&self.im.times(&self.im)?)
    }

    fn over(&self, o: &Z) -> Option<Z> {
        if o.is_real() {
            let im = if self.is_real() { Ball::int(0) } else { self.im.over(&o.re)? };
            return Some(Z { re: self.re.over(&o.re)?, im });
        }
        let size = o.square_size()?;
        let top = self.times(&Z { re: o.re.clone(), im: o.im.neg() })?;
        Some(Z { re: top.re.over(&size)?, im: top.im.over(&size)? })
    }

    fn exp(&self) -> Option<Z> {
        let size = self.re.exp()?;
        if self.is_real() {
            return Some(Z::real(size));
        }
        let (s, c) = self.im.sin_cos()?;
        Some(Z { re: size.times(&c)?, im: size.times(&s)? })
    }

    fn ln(&self) -> Option<Z> {
        let z = self.clone().settled();
        if z.is_real() && !z.re.negative() {
            return Some(Z::real(z.re.ln()?));
        }
        let size = z.square_size()?.ln()?;
        let half = Ball::rational(&BigRational::new(1.into(), 2.into()))?;
        Some(Z { re: size.times(&half)?, im: Ball::atan2(&z.im, &z.re)? })
    }

    fn zero(&self) -> bool {
        self.re.vanishes() && self.im.vanishes()
    }

    fn int_power(&self, n: i64) -> Option<Z> {
        let (mut out, mut square, mut left) = (Z::real(Ball::int(1)), self.clone(), n.unsigned_abs());
        while left > 0 {
            if left & 1 == 1 {
                out = out.times(&square)?;
            }
            left >>= 1;
            if left > 0 {
                square = square.times(&square)?;
            }
        }
        if n < 0 { Z::real(Ball::int(1)).over(&out) } else { Some(out) }
    }
}

/// A point of evaluation; `fuel` pays for the work.
pub(crate) struct Precise<'a> {
    pub(crate) variable: &'a dyn Fn(&str) -> f64,
    pub(crate) fuel: u64,
    bound: Vec<(String, Ball)>,
}

impl<'a> Precise<'a> {
    pub(crate) fn new(variable: &'a dyn Fn(&str) -> f64, fuel: u64) -> Precise<'a> {
        Precise { variable, fuel, bound: Vec::new() }
    }

    fn pay(&mut self, cost: u64) -> Option<()> {
        self.fuel = self.fuel.checked_sub(cost)?;
        Some(())
    }

    /// Whether the two have the same value as far as 320 bits can tell; none if it cannot be said.
    pub(crate) fn agree(&mut self, a: &Expr, b: &Expr) -> Option<bool> {
        let (x, y) = (self.visit(a)?, self.visit(b)?);
        let gap = x.minus(&y)?;
        let same = gap.re.holds_zero() && gap.im.holds_zero();
        let sharp = x.re.sharp() && x.im.sharp() && y.re.sharp() && y.im.sharp();
        if same && !sharp { None } else { Some(same) }
    }

    /// Whether `a(p) b(q) = a(q) b(p)`, with `p` and `q` two points.
    pub(crate) fn cross(
        p: &dyn Fn(&str) -> f64,
        q: &dyn Fn(&str) -> f64,
        a: &Expr,
        b: &Expr,
        fuel: &mut u64,
    ) -> Option<bool> {
        let mut values = Vec::with_capacity(4);
        for point in [p, q] {
            for expr in [a, b] {
                let mut precise = Precise::new(point, *fuel);
                let value = precise.visit(expr);
                *fuel = precise.fuel;
                values.push(value?);
            }
        }
        let (left, right) = (values[0].times(&values[3])?, values[2].times(&values[1])?);
        let gap = left.minus(&right)?;
        let sharp = left.re.sharp() && left.im.sharp() && right.re.sharp() && right.im.sharp();
        Some(sharp && gap.re.holds_zero() && gap.im.holds_zero())
    }

    fn visit(&mut self, expr: &Expr) -> Option<Z> {
        self.pay(4)?;
        Some(match expr {
            Expr::Num { value, .. } => Z::real(Ball::rational(value)?),
            Expr::Sym(name) => match self.bound.iter().rev().find(|b| b.0 == *name) {
                Some(bound) => Z::real(bound.1.clone()),
                None => Z::real(Ball::double((self.variable)(name))?),
            },
            Expr::Pi => Z::real(Ball::pi()),
            Expr::E => {
                self.pay(60)?;
                Z::real(Ball::int(1).exp()?)
            }
            Expr::I => Z { re: Ball::int(0), im: Ball::int(1) },
            Expr::Neg(a) => self.visit(a)?.neg(),
            Expr::Add(terms) => {
                let mut sum = Z::real(Ball::int(0));
                for t in terms {
                    sum = sum.plus(&self.visit(t)?)?;
                }
                sum
            }
            Expr::Mul(factors) => {
                let mut product = Z::real(Ball::int(1));
                for f in factors {
                    product = product.times(&self.visit(f)?)?;
                }
                product
            }
            Expr::Apply(name, a) => self.visit(&Expr::Sym(name.clone()))?.times(&self.visit(a)?)?,
            Expr::Div(a, b) => self.visit(a)?.over(&self.visit(b)?)?,
            Expr::Pow(a, b) => {
                let exact = super::numeric::exact_power(b);
                if **a == Expr::E && exact.is_none() {
                    self.pay(80)?;
                    return self.visit(b)?.settled().exp();
                }
                let (base, e) = (self.visit(a)?, self.visit(b)?);
                self.power(base, &e, exact)?
            }
            Expr::Root(a, index) => {
                let n = super::numeric::exact_power(index).filter(|n| n.1 == 1 && n.0 > 0)?.0;
                let a = self.visit(a)?;
                let e = Z::real(Ball::rational(&BigRational::new(1.into(), n.into()))?);
                self.power(a, &e, Some((1, n)))?
            }
            Expr::Percent(a) => self.visit(a)?.over(&Z::real(Ball::int(100)))?,
            Expr::Degree(a) => self.visit(a)?.times(&Z::real(Ball::pi()))?.over(&Z::real(Ball::int(180)))?,
            Expr::Call(fun, args) => self.call(*fun, args)?,
            Expr::Sum(var, from, to, body) | Expr::Product(var, from, to, body) => {
                let (from, to) = (self.whole(from)?, self.whole(to)?);
                if to - from > 60 {
                    return None;
                }
                let sum = matches!(expr, Expr::Sum(..));
                let mut total = Z::real(Ball::int(if sum { 0 } else { 1 }));
                for k in from..=to {
                    self.bound.push((var.clone(), Ball::int(k)));
                    let value = self.visit(body);
                    self.bound.pop();
                    total = if sum { total.plus(&value?)? } else { total.times(&value?)? };
                }
                total
            }
            _ => return None,
        })
    }

    /// A small integer value.
    fn whole(&mut self, expr: &Expr) -> Option<i64> {
        let z = self.visit(expr)?;
        let x = z.re.to_f64().filter(|x| z.is_real() && x.fract() == 0.0 && x.abs() < 1e9)?;
        z.re.minus(&Ball::int(x as i64))?.holds_zero().then_some(x as i64)
    }

    fn power(&mut self, base: Z, e: &Z, exact: Option<(i64, i64)>) -> Option<Z> {
        self.pay(60)?;
        let base = base.settled();
        if let Some((top, 1)) = exact
            && top.abs() < 1 << 16
        {
            if top < 0 && base.zero() {
                return None;
            }
            return base.int_power(top);
        }
        if base.zero() {
            return (e.is_real() && !e.re.negative() && !e.re.holds_zero()).then(|| base.clone());
        }
        if let (Some((top, 2)), true) = (exact, base.is_real()) {
            let root = if base.re.negative() {
                Z { re: Ball::int(0), im: base.re.neg().sqrt()? }
            } else {
                Z::real(base.re.sqrt()?)
            };
            return root.int_power(top);
        }
        self.pay(200)?;
        if let Some((top, bottom)) = exact
            && bottom % 2 != 0
            && base.is_real()
            && base.re.negative()
        {
            let size = Z::real(base.re.neg().ln()?).times(e)?.exp()?;
            return Some(if top % 2 == 0 { size } else { size.neg() });
        }
        base.ln()?.times(e)?.exp()
    }

    fn call(&mut self, fun: Fun, args: &[Expr]) -> Option<Z> {
        let x = self.visit(args.first()?)?;
        let real = || x.is_real().then_some(&x.re);
        let one = Ball::int(1);
        match fun {
            Fun::Sin | Fun::Cos | Fun::Tan | Fun::Cot | Fun::Sec | Fun::Csc => {
                self.pay(80)?;
                let (s, c) = real()?.sin_cos()?;
                Some(Z::real(match fun {
                    Fun::Sin => s,
                    Fun::Cos => c,
                    Fun::Tan => s.over(&c)?,
                    Fun::Cot => c.over(&s)?,
                    Fun::Sec => one.over(&c)?,
                    _ => one.over(&s)?,
                }))
            }
            Fun::Asin | Fun::Acos => {
                self.pay(200)?;
                let x = real()?;
                let other = one.minus(&x.times(x)?)?.sqrt()?;
                let angle = if fun == Fun::Asin { Ball::atan2(x, &other) } else { Ball::atan2(&other, x) };
                Some(Z::real(angle?))
            }
            Fun::Atan => {
                self.pay(200)?;
                Some(Z::real(Ball::atan2(real()?, &one)?))
            }
            Fun::Sinh | Fun::Cosh | Fun::Tanh => {
                self.pay(160)?;
                let (up, down) = (x.exp()?, x.neg().exp()?);
                let two = Z::real(Ball::int(2));
                match fun {
                    Fun::Sinh => up.minus(&down)?.over(&two),
                    Fun::Cosh => up.plus(&down)?.over(&two),
                    _ => up.minus(&down)?.over(&up.plus(&down)?),
                }
            }
            Fun::Ln => {
                self.pay(150)?;
                x.ln()
            }
            Fun::Log => {
                self.pay(300)?;
                self.visit(args.get(1)?)?.ln()?.over(&x.ln()?)
            }
            Fun::Exp => {
                self.pay(80)?;
                x.exp()
            }
            Fun::Abs => match x.is_real() {
                true => Some(Z::real(if x.re.negative() { x.re.neg() } else { x.re })),
                false => Some(Z::real(x.square_size()?.sqrt()?)),
            },
            Fun::Re => Some(Z::real(x.re)),
            Fun::Im => Some(Z::real(x.im)),
            Fun::Factorial => {
                let n = self.whole(&args[0]).filter(|n| (0..=300).contains(n))?;
                self.pay(n as u64)?;
                let mut out = one;
                for k in 2..=n {
                    out = out.times(&Ball::int(k))?;
                }
                Some(Z::real(out))
            }
            Fun::Binomial => {
                let k = self.whole(args.get(1)?).filter(|k| (0..=60).contains(k))?;
                self.pay(k as u64 * 4)?;
                let mut out = Z::real(one);
                for j in 0..k {
                    let factor = x.minus(&Z::real(Ball::int(j)))?;
                    out = out.times(&factor)?.over(&Z::real(Ball::int(j + 1)))?;
                }
                Some(out)
            }
            Fun::Min | Fun::Max => {
                let mut best = x;
                for other in &args[1..] {
                    let other = self.visit(other)?;
                    if !best.is_real() || !other.is_real() {
                        return None;
                    }
                    let gap = other.re.minus(&best.re)?;
                    if gap.negative() == (fun == Fun::Min) {
                        best = other;
                    }
                }
                Some(best)
            }
            Fun::Floor | Fun::Ceil | Fun::Gcd | Fun::Lcm | Fun::Mod => self.integral_call(fun, args),
        }
    }

    /// Functions with jumps: only where every argument is a small integer.
    fn integral_call(&mut self, fun: Fun, args: &[Expr]) -> Option<Z> {
        let ints: Vec<i64> = args.iter().map(|a| self.whole(a)).collect::<Option<_>>()?;
        let value = match (fun, &ints[..]) {
            (Fun::Floor | Fun::Ceil, [n]) => *n,
            (Fun::Gcd, list) => list.iter().fold(0, |a, b| super::numeric::gcd(a, *b)),
            (Fun::Lcm, list) => list.iter().try_fold(1i64, |a, &b| {
                if b == 0 { None } else { a.checked_mul(b / super::numeric::gcd(a, b)).map(i64::abs) }
            })?,
            (Fun::Mod, [a, n]) if *n != 0 => a.rem_euclid(*n),
            _ => return None,
        };
        Some(Z::real(Ball::int(value)))
    }
}

/// Whether a tree can be evaluated here at all.
pub(crate) fn covers(expr: &Expr) -> bool {
    !expr.any(&|e| matches!(e, Expr::Integral(..) | Expr::Named(..)) || to_big(e))
}

/// Numbers too long to be worth it.
fn to_big(e: &Expr) -> bool {
    matches!(e, Expr::Num { value, .. } if value.to_f64().is_none())
}
