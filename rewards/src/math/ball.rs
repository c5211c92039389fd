//! Real numbers of 320 bits that carry a bound of their error.
//!
//! A ball is `m 2^e` with `|error| < 2^err`. Every operation widens the bound, so a difference that
//! does not contain zero is certainly not zero.

use num_bigint::BigInt;
use num_rational::BigRational;
use num_traits::{One, Signed, ToPrimitive, Zero};
use std::sync::LazyLock;

/// Working precision in bits.
pub(crate) const BITS: i64 = 320;
/// The error exponent of an exact value.
const EXACT: i64 = i64::MIN / 4;
/// Sizes beyond `2^LIMIT` are refused.
const LIMIT: i64 = 1 << 22;

static PI: LazyLock<BigInt> = LazyLock::new(|| {
    // Machin: pi/4 = 4 atan(1/5) - atan(1/239), in units of 2^-(BITS+64).
    let one = BigInt::one() << (BITS as usize + 64);
    let arctan = |n: u32| {
        let (mut term, mut total, mut k): (BigInt, BigInt, u32) = (&one / n, BigInt::zero(), 1);
        while !term.is_zero() {
            if k % 4 == 1 {
                total += &term / k;
            } else {
                total -= &term / k;
            }
            term /= n * n;
            k += 2;
        }
        total
    };
    (arctan(5) * 4 - arctan(239)) * 4
});

static LN_2: LazyLock<BigInt> = LazyLock::new(|| {
    // ln 2 = 2 atanh(1/3).
    let one = BigInt::one() << (BITS as usize + 64);
    let (mut term, mut total, mut k): (BigInt, BigInt, u32) = (&one / 3, BigInt::zero(), 1);
    while !term.is_zero() {
        total += &term / k;
        term /= 9;
        k += 2;
    }
    total * 2
});

#[derive(Debug, Clone)]
pub(crate) struct Ball {
    m: BigInt,
    e: i64,
    err: i64,
}

impl Ball {
    pub(crate) fn int(n: i64) -> Ball {
        Ball { m: n.into(), e: 0, err: EXACT }
    }

    pub(crate) fn double(x: f64) -> Option<Ball> {
        let r = BigRational::from_float(x)?;
        Ball::rational(&r)
    }

    pub(crate) fn rational(r: &BigRational) -> Option<Ball> {
        let top = Ball { m: r.numer().clone(), e: 0, err: EXACT };
        if r.denom().is_one() {
            return top.rounded();
        }
        top.over(&Ball { m: r.denom().clone(), e: 0, err: EXACT })
    }

    pub(crate) fn pi() -> Ball {
        Ball { m: PI.clone(), e: -(BITS + 64), err: -(BITS + 50) }
    }

    fn ln_2() -> Ball {
        Ball { m: LN_2.clone(), e: -(BITS + 64), err: -(BITS + 50) }
    }

    /// An exponent above the size: `|m 2^e| < 2^mag`.
    fn mag(&self) -> i64 {
        if self.m.is_zero() { EXACT } else { self.e + self.m.bits() as i64 }
    }

    fn rounded(mut self) -> Option<Ball> {
        let spare = self.m.bits() as i64 - BITS;
        if spare > 0 {
            self.m >>= spare;
            self.e += spare;
            self.err = self.err.max(self.e) + 1;
        }
        (self.mag().abs() < LIMIT || self.m.is_zero()).then_some(self)
    }

    fn with_error(mut self, err: i64) -> Ball {
        self.err = self.err.max(err) + 1;
        self
    }

    /// Whether the ball holds zero.
    pub(crate) fn holds_zero(&self) -> bool {
        self.m.is_zero() || self.err >= self.mag() - 1
    }

    /// Whether it is zero for all that 320 bits can tell.
    pub(crate) fn vanishes(&self) -> bool {
        self.holds_zero() && self.err < -200
    }

    pub(crate) fn negative(&self) -> bool {
        self.m.is_negative()
    }

    pub(crate) fn exact_zero(&self) -> bool {
        self.m.is_zero() && self.err == EXACT
    }

    pub(crate) fn to_f64(&self) -> Option<f64> {
        let spare = (self.m.bits() as i64 - 64).max(0);
        let head = (&self.m >> spare).to_f64()?;
        let exponent = i32::try_from(self.e + spare).ok()?;
        Some(head * 2f64.powi(exponent))
    }

    /// The error is small against the value, or the value is as good as zero.
    pub(crate) fn sharp(&self) -> bool {
        self.err < self.mag() - 100 || self.err < -200
    }

    pub(crate) fn neg(&self) -> Ball {
        Ball { m: -&self.m, ..*self }
    }

    pub(crate) fn plus(&self, o: &Ball) -> Option<Ball> {
        let err = if self.err == EXACT && o.err == EXACT { EXACT } else { self.err.max(o.err) + 1 };
        if self.m.is_zero() || o.m.is_zero() {
            let value = if self.m.is_zero() { o } else { self };
            return Some(Ball { m: value.m.clone(), e: value.e, err });
        }
        // A far smaller part only widens the error.
        let (big, small) = if self.mag() >= o.mag() { (self, o) } else { (o, self) };
        if small.mag() < big.mag() - 3 * BITS {
            return Ball { m: big.m.clone(), e: big.e, err: err.max(small.mag()) + 1 }.rounded();
        }
        let e = self.e.min(o.e);
        let m = (&self.m << (self.e - e)) + (&o.m << (o.e - e));
        Ball { m, e, err }.rounded()
    }

    pub(crate) fn minus(&self, o: &Ball) -> Option<Ball> {
        self.plus(&o.neg())
    }

    pub(crate) fn times(&self, o: &Ball) -> Option<Ball> {
        let err = if self.err == EXACT && o.err == EXACT {
            EXACT
        } else {
            (self.mag() + o.err).max(o.mag() + self.err).max(self.err + o.err).max(EXACT) + 2
        };
        Ball { m: &self.m * &o.m, e: self.e + o.e, err }.rounded()
    }

    pub(crate) fn over(&self, o: &Ball) -> Option<Ball> {
        if o.holds_zero() {
            return None;
        }
        let shift = (BITS + 8 + o.m.bits() as i64 - self.m.bits() as i64).max(0);
        let m = (&self.m << shift) / &o.m;
        let e = self.e - shift - o.e;
        let size = if m.is_zero() { e } else { e + m.bits() as i64 };
        let low = o.mag() - 1;
        let mut err = e;
        if self.err != EXACT {
            err = err.max(self.err - low + 1);
        }
        if o.err != EXACT {
            err = err.max(size + o.err - low + 2);
        }
        Ball { m, e, err: err + 2 }.rounded()
    }

    /// `self * 2^n`.
    fn scaled(&self, n: i64) -> Ball {
        let err = if self.err == EXACT { EXACT } else { self.err + n };
        Ball { m: self.m.clone(), e: self.e + n, err }
    }

    pub(crate) fn sqrt(&self) -> Option<Ball> {
        if self.holds_zero() {
            let err = if self.err == EXACT { EXACT } else { self.err.max(self.mag()) / 2 + 1 };
            return Some(Ball { m: BigInt::zero(), e: 0, err });
        }
        if self.negative() {
            return None;
        }
        let mut shift = (2 * BITS + 16 - self.m.bits() as i64).max(0);
        if (self.e - shift) % 2 != 0 {
            shift += 1;
        }
        let m = (&self.m << shift).sqrt();
        let e = (self.e - shift) / 2;
        let exact = self.err == EXACT && &m * &m == &self.m << shift;
        let root = Ball { m, e, err: EXACT };
        let err = if exact { EXACT } else { (self.err - root.mag() + 2).max(e) + 1 };
        Ball { err, ..root }.rounded()
    }

    pub(crate) fn exp(&self) -> Option<Ball> {
        if self.mag() > 20 || (self.err != EXACT && self.err > -20) {
            return None;
        }
        if self.exact_zero() {
            return Some(Ball::int(1));
        }
        let turns = self.over(&Ball::ln_2())?;
        let k = turns.to_f64()?.round();
        let rest = self.minus(&Ball::ln_2().times(&Ball::int(k as i64))?)?;
        // e^r = (e^(r/2^16))^(2^16), the inner one by its series.
        let small = Ball { err: EXACT, ..rest }.scaled(-16);
        let (mut term, mut sum) = (Ball::int(1), Ball::int(1));
        for n in 1..24 {
            term = term.times(&small)?.over(&Ball::int(n))?;
            sum = sum.plus(&term)?;
        }
        for _ in 0..16 {
            sum = sum.times(&sum)?;
        }
        let value = sum.scaled(k as i64);
        let mag = value.mag();
        let own = if self.err == EXACT { EXACT } else { mag + self.err + 2 };
        Some(value.with_error((mag - BITS + 40).max(own)))
    }

    pub(crate) fn ln(&self) -> Option<Ball> {
        if self.holds_zero() || self.negative() {
            return None;
        }
        let exponent = self.mag();
        let head = self.scaled(-exponent);
        let start = head.to_f64()?.ln() + exponent as f64 * std::f64::consts::LN_2;
        let x = Ball { err: EXACT, ..self.clone() };
        let mut y = Ball::double(start)?;
        // Halley: y += 2 (x - e^y) / (x + e^y), which triples the digits.
        for _ in 0..2 {
            let e = Ball { err: EXACT, ..y.exp()? };
            let step = x.minus(&e)?.scaled(1).over(&x.plus(&e)?)?;
            y = Ball { err: EXACT, ..y.plus(&step)? };
        }
        let own = if self.err == EXACT { EXACT } else { self.err - self.mag() + 3 };
        let noise = y.mag().max(1) - BITS + 50;
        Some(y.with_error(noise.max(own)))
    }

    /// Sine and cosine.
    pub(crate) fn sin_cos(&self) -> Option<(Ball, Ball)> {
        if self.mag() > 40 || (self.err != EXACT && self.err > -20) {
            return None;
        }
        let half = Ball::pi().scaled(-1);
        let k = self.over(&half)?.to_f64()?.round();
        let rest = self.minus(&half.times(&Ball::int(k as i64))?)?;
        let r = Ball { err: EXACT, ..rest };
        let square = r.times(&r)?.neg();
        let (mut sin, mut cos) = (r.clone(), Ball::int(1));
        let (mut s, mut c) = (r.clone(), Ball::int(1));
        for n in 1..40 {
            c = c.times(&square)?.over(&Ball::int((2 * n - 1) * (2 * n)))?;
            s = s.times(&square)?.over(&Ball::int((2 * n) * (2 * n + 1)))?;
            cos = cos.plus(&c)?;
            sin = sin.plus(&s)?;
        }
        let own = if self.err == EXACT { EXACT } else { self.err + 1 };
        let noise = (self.mag().max(1) - BITS + 40).max(own);
        // Zero is exact only for the exact zero.
        let (sin, cos) = match (k as i64).rem_euclid(4) {
            0 => (sin, cos),
            1 => (cos, sin.neg()),
            2 => (sin.neg(), cos.neg()),
            _ => (cos.neg(), sin),
        };
        if self.exact_zero() {
            return Some((Ball::int(0), Ball::int(1)));
        }
        Some((sin.with_error(noise), cos.with_error(noise)))
    }

    /// The angle of the point (x, y).
    pub(crate) fn atan2(y: &Ball, x: &Ball) -> Option<Ball> {
        if y.exact_zero() && !x.holds_zero() {
            return Some(if x.negative() { Ball::pi() } else { Ball::int(0) });
        }
        let size = y.mag().max(x.mag());
        if y.holds_zero() && x.holds_zero() {
            return None;
        }
        let (ys, xs) = (y.scaled(-size), x.scaled(-size));
        let mut angle = Ball::double(ys.to_f64()?.atan2(xs.to_f64()?))?;
        // tan of what is missing is (y c - x s) / (x c + y s).
        for _ in 0..2 {
            let (s, c) = angle.sin_cos()?;
            let top = ys.times(&c)?.minus(&xs.times(&s)?)?;
            let bottom = xs.times(&c)?.plus(&ys.times(&s)?)?;
            angle = Ball { err: EXACT, ..angle.plus(&Ball { err: EXACT, ..top.over(&bottom)? })? };
        }
        let own = if y.err == EXACT && x.err == EXACT { EXACT } else { y.err.max(x.err) - size + 4 };
        Some(angle.with_error((-BITS + 60).max(own)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn near(a: &Ball, b: &Ball) -> bool {
        // The bound holds the difference, and is itself small against the value.
        a.sharp() && a.minus(b).is_some_and(|d| d.holds_zero() && d.err < a.mag().max(0) - 190)
    }

    #[test]
    fn functions_undo_each_other() {
        for x in [0.3, 1.0, 2.5, 17.25, 300.0] {
            let b = Ball::double(x).unwrap();
            assert!(near(&b.ln().unwrap().exp().unwrap(), &b), "ln {x}");
            let root = b.sqrt().unwrap();
            assert!(near(&root.times(&root).unwrap(), &b), "sqrt {x}");
            let (s, c) = b.sin_cos().unwrap();
            let one = s.times(&s).unwrap().plus(&c.times(&c).unwrap()).unwrap();
            assert!(near(&one, &Ball::int(1)), "sin² + cos² at {x}");
        }
        for x in [0.1, 0.7, 1.5, -1.2, 3.0] {
            let b = Ball::double(x).unwrap();
            let (s, c) = b.sin_cos().unwrap();
            assert!(near(&Ball::atan2(&s, &c).unwrap(), &b), "atan2 at {x}");
        }
        assert!((Ball::pi().to_f64().unwrap() - std::f64::consts::PI).abs() < 1e-15);
        assert!((Ball::ln_2().to_f64().unwrap() - std::f64::consts::LN_2).abs() < 1e-15);
    }

    #[test]
    fn tiny_differences_are_seen() {
        // e^(pi sqrt 163) is 7.5e-13 short of an integer.
        let x = Ball::pi().times(&Ball::int(163).sqrt().unwrap()).unwrap().exp().unwrap();
        let n = Ball { m: "262537412640768744".parse().unwrap(), e: 0, err: EXACT };
        let gap = n.minus(&x).unwrap();
        assert!(!gap.holds_zero());
        assert!((gap.to_f64().unwrap() - 7.499274e-13).abs() < 1e-18);
        let small = Ball::int(-1000).exp().unwrap();
        assert!(!small.holds_zero());
    }
}
