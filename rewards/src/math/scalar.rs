//! Equality of two scalars: exact numbers, then normal forms, then evaluation at many points.
//!
//! Two forms that agree are equal with certainty. Forms over independent atoms that differ are
//! unequal with certainty. What is left is evaluated: expressions count as equal only if they agree
//! to 1e-9 (relative) at all of at least six valid points out of 20 and to 2^-200 at two of them, by
//! arithmetic that bounds its error. Sample points are 53-bit fractions, so for analytic functions a
//! false accept has a probability below 2^-50; only integrals and unknown functions rest on the
//! doubles alone.

use super::expr::Expr;
use super::normal::{Algebra, Normal, Stop};
use super::number::within;
use super::numeric::{C, Point};
use super::precise::{Precise, covers};
use super::units::{Relation, relate};
use num_rational::BigRational;
use num_traits::{Signed, ToPrimitive, Zero};
use std::collections::BTreeSet;

/// Points tried and points that must be valid.
const POINTS: usize = 20;
const NEEDED: usize = 6;
const AGREE: f64 = 1e-9;
/// Points at which agreement is confirmed in 320 bits.
const PRECISE: usize = 2;

/// What a comparison needs all through.
pub(crate) struct Context {
    pub(crate) algebra: Algebra,
    pub(crate) rounding: u32,
    pub(crate) percent_either_way: bool,
}

impl Context {
    /// Whether two scalars are equal, units, degrees and percent signs considered.
    pub(crate) fn scalars(&mut self, gold: &Expr, pred: &Expr) -> bool {
        match (gold, pred) {
            (Expr::Unit(a, u), Expr::Unit(b, v)) => match relate(u, v) {
                Relation::Conflict => false,
                Relation::Compatible => self.scalars(a, b),
                Relation::Factor(f) => self.converted(a, b, f),
            },
            (Expr::Unit(a, _), b) => self.scalars(a, b),
            (a, Expr::Unit(b, _)) => self.scalars(a, b),
            (Expr::Degree(a), Expr::Degree(b)) => self.scalars(a, b),
            (Expr::Degree(a), b) | (b, Expr::Degree(a)) if plain_number(a) && plain_number(b) => {
                self.scalars(a, b)
            }
            (Expr::Percent(a), Expr::Percent(b)) => self.values(a, b),
            (Expr::Percent(a), b) if self.percent_either_way => {
                self.dropped_sign(a, b) || self.hundredth(a, b)
            }
            (a, Expr::Percent(b)) if self.percent_either_way => {
                self.dropped_sign(b, a) || self.hundredth(b, a)
            }
            (a, b) => self.values(a, b),
        }
    }

    /// The number before a percent sign against a number without one: the sign may have been left
    /// out, but not below 1, where the number reads as a share.
    fn dropped_sign(&mut self, percent: &Expr, plain: &Expr) -> bool {
        let none = |_: &str| f64::NAN;
        let small = Point::new(&none).value(plain).is_some_and(|x| x.size() > 0.0 && x.size() < 1.0);
        !small && self.values(percent, plain)
    }

    fn hundredth(&mut self, percent: &Expr, plain: &Expr) -> bool {
        self.values(&Expr::Percent(Box::new(percent.clone())), plain)
    }

    fn converted(&mut self, a: &Expr, b: &Expr, factor: f64) -> bool {
        let zero = |_: &str| f64::NAN;
        match (Point::new(&zero).value(a), Point::new(&zero).value(b)) {
            (Some(a), Some(b)) => {
                let a = a.re * factor;
                a.is_finite() && (a - b.re).abs() <= 1e-9 * a.abs().max(b.re.abs()) && a != 0.0
            }
            _ => false,
        }
    }

    fn values(&mut self, gold: &Expr, pred: &Expr) -> bool {
        if self.algebra.pay(5).is_err() {
            return false;
        }
        let decimal = gold.has_decimal() || pred.has_decimal();
        if let (Expr::Num { value: a, .. }, Expr::Num { value: b, .. }) = (gold, pred) {
            return a == b || decimal && self.rounded(a, b);
        }
        let forms = (self.algebra.of(gold), self.algebra.of(pred));
        if let (Err(Stop::Undefined), _) | (_, Err(Stop::Undefined)) = forms {
            return false;
        }
        if let (Ok(a), Ok(b)) = &forms {
            match self.algebra.same(a, b) {
                Ok(true) => return true,
                Ok(false) => {
                    if let (Some(a), Some(b)) = (a.rational(), b.rational()) {
                        return decimal && self.rounded(&a, &b);
                    }
                    if self.algebra.decided(a, b) {
                        return decimal && self.near(gold, pred, a, b);
                    }
                    if decimal && self.near(gold, pred, a, b) {
                        return true;
                    }
                }
                Err(_) => {}
            }
        }
        self.numeric(gold, pred)
    }

    /// Agreement to the stated decimal places of two numbers of which neither is an integer.
    fn rounded(&self, a: &BigRational, b: &BigRational) -> bool {
        if a.is_integer() || b.is_integer() {
            return false;
        }
        match (a.to_f64(), b.to_f64()) {
            (Some(x), Some(y)) if x.is_finite() && y.is_finite() => within(x, y, self.rounding),
            _ => false,
        }
    }

    /// A decimal against a closed irrational value.
    fn near(&mut self, gold: &Expr, pred: &Expr, a: &Normal, b: &Normal) -> bool {
        if self.algebra.has_variable(a) && !closed(gold) || self.algebra.has_variable(b) && !closed(pred) {
            return false;
        }
        if a.rational().is_some_and(|r| r.is_integer()) || b.rational().is_some_and(|r| r.is_integer()) {
            return false;
        }
        let none = |_: &str| f64::NAN;
        match (Point::new(&none).value(gold), Point::new(&none).value(pred)) {
            (Some(x), Some(y)) => {
                within(x.re, y.re, self.rounding)
                    && (x.im == y.im
                        || within(x.im, y.im, self.rounding)
                        || x.im.abs().max(y.im.abs()) < 1e-12)
            }
            _ => false,
        }
    }

    /// Agreement at many points.
    fn numeric(&mut self, gold: &Expr, pred: &Expr) -> bool {
        let names = variables(&[gold, pred]);
        let near = |a: C, b: C| {
            let scale = a.size().max(b.size());
            a.minus(b).size() <= AGREE * scale || scale < 1e-13
        };
        let Some(points) = self.sample(&names, gold, pred, near) else { return false };
        if !covers(gold) || !covers(pred) {
            return true;
        }
        // Doubles cannot tell a near miss from equality; 320 bits with an error bound can.
        let whole = discrete(gold) || discrete(pred);
        points.iter().take(PRECISE).all(|&point| {
            let variable = |name: &str| sample(name, point, whole);
            let mut precise = Precise::new(&variable, self.algebra.fuel);
            let agree = precise.agree(gold, pred);
            self.algebra.fuel = precise.fuel;
            agree == Some(true)
        })
    }

    /// The valid points, if `agree` holds at all of them and there are enough.
    fn sample(
        &mut self,
        names: &BTreeSet<String>,
        a: &Expr,
        b: &Expr,
        mut agree: impl FnMut(C, C) -> bool,
    ) -> Option<Vec<usize>> {
        let whole = discrete(a) || discrete(b);
        let (points, needed) = if names.is_empty() { (1, 1) } else { (POINTS, NEEDED) };
        let mut valid = Vec::new();
        for point in 0..points {
            self.algebra.pay(40).ok()?;
            let variable =
                |name: &str| if names.contains(name) { sample(name, point, whole) } else { f64::NAN };
            let (mut left, mut right) = (Point::new(&variable), Point::new(&variable));
            let (x, y) = (left.value(a), right.value(b));
            self.algebra.pay(u64::from(left.visits + right.visits) / 4).ok()?;
            match (x, y) {
                (Some(x), Some(y)) => {
                    if !agree(x, y) {
                        return None;
                    }
                    valid.push(point);
                }
                (None, None) => {}
                // Defined on one side only: a removable hole is rare at random points.
                _ => return None,
            }
        }
        (valid.len() >= needed).then_some(valid)
    }

    /// Whether `a = c b` for one rational or sampled constant `c`; its sign is handed to `sign`.
    pub(crate) fn proportional(&mut self, a: &Expr, b: &Expr, positive: bool) -> bool {
        let forms = (self.algebra.of(a), self.algebra.of(b));
        if let (Ok(x), Ok(y)) = &forms {
            if x.is_zero() || y.is_zero() {
                return x.is_zero() && y.is_zero();
            }
            if !self.algebra.has_variable(x) || !self.algebra.has_variable(y) {
                return false;
            }
            match self.algebra.proportion(x, y) {
                Ok(Some(ratio)) => return !ratio.is_zero() && (!positive || ratio.is_positive()),
                Ok(None) if self.algebra.decided(x, y) && !radical(a) && !radical(b) => return false,
                _ => {}
            }
        }
        if let (Err(Stop::Undefined), _) | (_, Err(Stop::Undefined)) = forms {
            return false;
        }
        let names = variables(&[a, b]);
        if names.is_empty() {
            return false;
        }
        let mut first: Option<C> = None;
        let points = self.sample(&names, a, b, |x, y| {
            if y.size() < 1e-12 || x.size() < 1e-12 {
                return x.size() < 1e-12 && y.size() < 1e-12;
            }
            let ratio = x.over(y);
            if ratio.im.abs() > 1e-9 * ratio.size() || positive && ratio.re <= 0.0 {
                return false;
            }
            match first {
                None => {
                    first = Some(ratio);
                    true
                }
                Some(c) => ratio.minus(c).size() <= AGREE * c.size(),
            }
        });
        let Some([p, q, ..]) = points.as_deref() else { return false };
        if !covers(a) || !covers(b) {
            return true;
        }
        // The two products that a common ratio makes equal.
        let at = |point: usize| move |name: &str| sample(name, point, false);
        let (first, second) = (at(*p), at(*q));
        Precise::cross(&first, &second, a, b, &mut self.algebra.fuel) == Some(true)
    }
}

fn plain_number(e: &Expr) -> bool {
    !e.any(&|n| !matches!(n, Expr::Num { .. } | Expr::Neg(_) | Expr::Div(..) | Expr::Add(_)))
}

/// No variables and no functions of one's own.
fn closed(e: &Expr) -> bool {
    !e.any(&|n| matches!(n, Expr::Sym(_) | Expr::Apply(..) | Expr::Named(..)))
}

fn radical(e: &Expr) -> bool {
    e.any(&|n| matches!(n, Expr::Root(..) | Expr::Pow(..) | Expr::Pi | Expr::E))
}

/// Made for integers only.
fn discrete(e: &Expr) -> bool {
    e.any(&|n| match n {
        Expr::Sum(..) | Expr::Product(..) => true,
        Expr::Call(f, _) => {
            use super::expr::Fun::{Binomial, Factorial, Gcd, Lcm, Mod};
            matches!(f, Factorial | Binomial | Gcd | Lcm | Mod)
        }
        _ => false,
    })
}

pub(crate) fn variables(exprs: &[&Expr]) -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    for e in exprs {
        e.walk(&mut |n| {
            if let Expr::Sym(name) | Expr::Apply(name, _) = n {
                names.insert(name.clone());
            }
        });
    }
    names
}

/// The value of a variable at a sample point: positive first, of either sign later.
fn sample(name: &str, point: usize, whole: bool) -> f64 {
    let mut h = 0xcbf2_9ce4_8422_2325u64 ^ (point as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    for b in name.bytes() {
        h = (h ^ u64::from(b)).wrapping_mul(0x1000_0000_01b3);
    }
    h ^= h >> 29;
    h = h.wrapping_mul(0xbf58_476d_1ce4_e5b9);
    h ^= h >> 32;
    if whole {
        return 4.0 + (h % 9) as f64 + (point / 10) as f64;
    }
    let unit = (h >> 11) as f64 / (1u64 << 53) as f64;
    let size = 0.31 + 2.3 * unit;
    if point >= 8 && h & 1 == 1 { -size } else { size }
}
