//! The normal form: a quotient of sums of products of atoms with exact rational coefficients.
//!
//! Atoms are variables, π, e, i, primes under a fractional power, and whatever has no rules here
//! (a sine, say), told apart by its normalised arguments. Roots of rationals are written over
//! primes, so equal radicals have equal forms. Every operation is paid from a budget.

use num_bigint::BigInt;
use num_rational::{BigRational, Ratio};
use num_traits::{One, Signed, ToPrimitive, Zero};
use std::collections::{BTreeMap, HashMap};

/// Bits an integer coefficient may have.
const MAX_BITS: u64 = 1 << 14;
/// Bits either part of a fraction may have.
const MAX_FRACTION_BITS: u64 = 1 << 12;
/// Terms a sum may have.
const MAX_TERMS: usize = 400;

/// Why there is no normal form.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stop {
    /// No value: a division by zero and the like.
    Undefined,
    /// Beyond the budget or the rules.
    Beyond,
}

pub(super) type Step<T> = Result<T, Stop>;
pub(super) type Power = Ratio<i64>;
pub(super) type Mono = Vec<(u32, Power)>;
pub(super) type Poly = BTreeMap<Mono, BigRational>;

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) enum Atom {
    Sym(String),
    Pi,
    E,
    I,
    /// A prime, or a cofactor too large to split (then `false`).
    Prime(BigInt, bool),
    Opaque(String),
}

/// A quotient in normal form.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Normal {
    pub(super) num: Poly,
    pub(super) den: Poly,
}

/// Atoms seen so far and the budget left.
#[derive(Debug)]
pub(crate) struct Algebra {
    atoms: HashMap<Atom, u32>,
    pub(super) names: Vec<Atom>,
    pub(crate) fuel: u64,
}

fn bits(value: &BigRational) -> u64 {
    value.numer().bits().max(value.denom().bits())
}

pub(super) fn constant(value: BigRational) -> Normal {
    let mut num = Poly::new();
    if !value.is_zero() {
        num.insert(Vec::new(), value);
    }
    Normal { num, den: one() }
}

pub(super) fn one() -> Poly {
    Poly::from([(Vec::new(), BigRational::one())])
}

pub(super) fn int(n: i64) -> Normal {
    constant(BigRational::from_integer(n.into()))
}

impl Normal {
    /// The value, when it is a plain rational.
    pub(crate) fn rational(&self) -> Option<BigRational> {
        if self.num.is_empty() {
            return Some(BigRational::zero());
        }
        let (mono, value) = self.num.first_key_value()?;
        (self.num.len() == 1 && mono.is_empty() && self.den == one()).then(|| value.clone())
    }

    pub(super) fn integer(&self) -> Option<BigInt> {
        self.rational().filter(BigRational::is_integer).map(|r| r.to_integer())
    }

    pub(crate) fn is_zero(&self) -> bool {
        self.num.is_empty()
    }

    /// A text that is the same for the same form.
    pub(super) fn key(&self) -> String {
        let poly = |p: &Poly| p.iter().map(|(m, c)| format!("{c}{m:?}")).collect::<Vec<_>>().join("+");
        if self.den == one() {
            poly(&self.num)
        } else {
            format!("({})/({})", poly(&self.num), poly(&self.den))
        }
    }
}

impl Algebra {
    pub(crate) fn new(fuel: u64) -> Algebra {
        Algebra { atoms: HashMap::new(), names: Vec::new(), fuel }
    }

    pub(crate) fn pay(&mut self, cost: u64) -> Step<()> {
        if self.fuel < cost {
            self.fuel = 0;
            return Err(Stop::Beyond);
        }
        self.fuel -= cost;
        Ok(())
    }

    pub(super) fn check(&mut self, value: BigRational) -> Step<BigRational> {
        let limit = if value.is_integer() { MAX_BITS } else { MAX_FRACTION_BITS };
        let size = bits(&value);
        self.pay(if value.is_integer() { 1 } else { 4 + size / 8 } + size * size / 16_000)?;
        if size > limit { Err(Stop::Beyond) } else { Ok(value) }
    }

    fn atom(&mut self, atom: Atom) -> u32 {
        let next = self.names.len() as u32;
        match self.atoms.get(&atom) {
            Some(&id) => id,
            None => {
                self.names.push(atom.clone());
                self.atoms.insert(atom, next);
                next
            }
        }
    }

    pub(super) fn single(&mut self, atom: Atom, power: Power) -> Normal {
        let id = self.atom(atom);
        Normal { num: Poly::from([(vec![(id, power)], BigRational::one())]), den: one() }
    }

    pub(super) fn opaque(&mut self, key: String) -> Step<Normal> {
        if key.len() > 4000 {
            return Err(Stop::Beyond);
        }
        self.pay(1 + key.len() as u64 / 50)?;
        Ok(self.single(Atom::Opaque(key), Power::one()))
    }

    /// Multiplies two monomials; the factor is what powers of i and of primes leave.
    fn mono_mul(&mut self, a: &Mono, b: &Mono) -> Step<(Mono, BigRational)> {
        let mut factor = BigRational::one();
        let mut out: Mono = Vec::with_capacity(a.len() + b.len());
        let (mut i, mut j) = (0, 0);
        self.pay(1)?;
        while i < a.len() || j < b.len() {
            let (id, power) = match (a.get(i), b.get(j)) {
                (Some(x), Some(y)) if x.0 == y.0 => {
                    i += 1;
                    j += 1;
                    (x.0, add_powers(x.1, y.1)?)
                }
                (Some(x), Some(y)) if x.0 < y.0 => {
                    i += 1;
                    let _ = y;
                    *x
                }
                (_, Some(y)) => {
                    j += 1;
                    *y
                }
                (Some(x), None) => {
                    i += 1;
                    *x
                }
                (None, None) => break,
            };
            let power = match &self.names[id as usize] {
                Atom::I if power.is_integer() => {
                    let turns = power.to_integer().rem_euclid(4);
                    if turns >= 2 {
                        factor = -factor;
                    }
                    Power::from_integer(turns % 2)
                }
                Atom::Prime(p, _) => {
                    let whole = power.floor().to_integer();
                    if whole != 0 {
                        let part = self.power_of(BigRational::from_integer(p.clone()), whole)?;
                        factor = product(&factor, &part);
                    }
                    power - Power::from_integer(whole)
                }
                _ => power,
            };
            if !power.is_zero() {
                out.push((id, power));
            }
        }
        Ok((out, factor))
    }

    fn add_term(&mut self, poly: &mut Poly, mono: Mono, value: BigRational) -> Step<()> {
        let old = poly.remove(&mono);
        let value = match old {
            Some(old) => self.check(sum(&old, &value))?,
            None => value,
        };
        if !value.is_zero() {
            poly.insert(mono, value);
        }
        if poly.len() > MAX_TERMS { Err(Stop::Beyond) } else { Ok(()) }
    }

    fn poly_mul(&mut self, a: &Poly, b: &Poly) -> Step<Poly> {
        let mut out = Poly::new();
        for (m, x) in a {
            for (n, y) in b {
                let (mono, factor) = self.mono_mul(m, n)?;
                let mut value = self.check(product(x, y))?;
                if !factor.is_one() {
                    value = self.check(product(&value, &factor))?;
                }
                self.add_term(&mut out, mono, value)?;
            }
        }
        Ok(out)
    }

    fn poly_add(&mut self, a: &Poly, b: &Poly) -> Step<Poly> {
        let mut out = a.clone();
        for (m, x) in b {
            self.add_term(&mut out, m.clone(), x.clone())?;
        }
        Ok(out)
    }

    /// Moves a denominator of one term into the numerator.
    fn settle(&mut self, num: Poly, den: Poly) -> Step<Normal> {
        if den.is_empty() {
            return Err(Stop::Undefined);
        }
        if den.len() > 1 {
            return Ok(Normal { num, den });
        }
        if den == one() {
            return Ok(Normal { num, den });
        }
        let (mono, value) = den.into_iter().next().ok_or(Stop::Undefined)?;
        let inverse: Mono = mono.into_iter().map(|(id, p)| (id, -p)).collect();
        let (inverse, factor) = self.mono_mul(&inverse, &Vec::new())?;
        let inverse = Poly::from([(inverse, factor / value)]);
        let num = self.poly_mul(&num, &inverse)?;
        Ok(Normal { num, den: one() })
    }

    pub(crate) fn add(&mut self, a: &Normal, b: &Normal) -> Step<Normal> {
        if a.den == b.den {
            let num = self.poly_add(&a.num, &b.num)?;
            return self.settle(num, a.den.clone());
        }
        let left = self.poly_mul(&a.num, &b.den)?;
        let right = self.poly_mul(&b.num, &a.den)?;
        let num = self.poly_add(&left, &right)?;
        let den = self.poly_mul(&a.den, &b.den)?;
        self.settle(num, den)
    }

    pub(crate) fn mul(&mut self, a: &Normal, b: &Normal) -> Step<Normal> {
        let num = self.poly_mul(&a.num, &b.num)?;
        let den = self.poly_mul(&a.den, &b.den)?;
        self.settle(num, den)
    }

    pub(crate) fn neg(&mut self, a: &Normal) -> Normal {
        Normal { num: a.num.iter().map(|(m, c)| (m.clone(), -c)).collect(), den: a.den.clone() }
    }

    pub(super) fn inverse(&mut self, a: &Normal) -> Step<Normal> {
        self.settle(a.den.clone(), a.num.clone())
    }

    /// `a - b`.
    pub(crate) fn sub(&mut self, a: &Normal, b: &Normal) -> Step<Normal> {
        let b = self.neg(b);
        self.add(a, &b)
    }

    fn power_of(&mut self, base: BigRational, n: i64) -> Step<BigRational> {
        if n == 0 {
            return Ok(BigRational::one());
        }
        if base.is_zero() {
            return if n > 0 { Ok(base) } else { Err(Stop::Undefined) };
        }
        let size = n.unsigned_abs();
        if base.abs().is_one() {
            return Ok(if size.is_multiple_of(2) { base.abs() } else { base });
        }
        let total = bits(&base).saturating_mul(size);
        if total > MAX_BITS {
            return Err(Stop::Beyond);
        }
        self.pay(1 + total * total / 32_000)?;
        let value = num_traits::pow(base, size as usize);
        self.check(if n < 0 { value.recip() } else { value })
    }

    pub(super) fn int_power(&mut self, a: &Normal, n: i64) -> Step<Normal> {
        if n == 0 {
            return Ok(int(1));
        }
        let base = if n < 0 { self.inverse(a)? } else { a.clone() };
        let n = n.unsigned_abs();
        if let Some(value) = base.rational() {
            let n = i64::try_from(n).map_err(|_| Stop::Beyond)?;
            return Ok(constant(self.power_of(value, n)?));
        }
        if base.num.len() > 1 || base.den.len() > 1 {
            if n > 64 {
                return Err(Stop::Beyond);
            }
        } else if n > 100_000 {
            return Err(Stop::Beyond);
        }
        let (mut result, mut square, mut left) = (int(1), base, n);
        loop {
            if left & 1 == 1 {
                result = self.mul(&result, &square)?;
            }
            left >>= 1;
            if left == 0 {
                return Ok(result);
            }
            square = self.mul(&square, &square)?;
        }
    }

    /// Prime factors of a positive integer; a large rest stays whole.
    pub(super) fn factors(&mut self, n: &BigInt) -> Step<Vec<(BigInt, i64, bool)>> {
        let mut out: Vec<(BigInt, i64, bool)> = Vec::new();
        let mut rest = n.clone();
        if let Some(mut small) = rest.to_u64() {
            let mut p = 2u64;
            while p * p <= small && p < 20_000 {
                let mut e = 0;
                while small % p == 0 {
                    small /= p;
                    e += 1;
                }
                if e > 0 {
                    out.push((p.into(), e, true));
                }
                p += if p == 2 { 1 } else { 2 };
            }
            self.pay(p / 20 + 1)?;
            rest = small.into();
            if small > 1 {
                let sure = p * p > small;
                self.push_rest(&mut out, rest, sure);
            }
            return Ok(out);
        }
        if rest.bits() > 1024 {
            return Err(Stop::Beyond);
        }
        for p in 2u32..400 {
            let mut e = 0;
            loop {
                self.pay(1)?;
                let (q, r) = (&rest / p, &rest % p);
                if !r.is_zero() {
                    break;
                }
                rest = q;
                e += 1;
            }
            if e > 0 {
                out.push((p.into(), e, true));
            }
        }
        if !rest.is_one() {
            self.push_rest(&mut out, rest, false);
        }
        Ok(out)
    }

    fn push_rest(&mut self, out: &mut Vec<(BigInt, i64, bool)>, rest: BigInt, sure: bool) {
        for k in [2u32, 3, 5] {
            let root = rest.nth_root(k);
            if !sure && num_traits::pow(root.clone(), k as usize) == rest {
                out.push((root, i64::from(k), false));
                return;
            }
        }
        out.push((rest, 1, sure));
    }

    /// A positive rational to a fractional power, over primes.
    fn rational_power(&mut self, value: &BigRational, power: Power) -> Step<Normal> {
        let mut out = int(1);
        for (part, sign) in [(value.numer(), 1), (value.denom(), -1)] {
            for (p, e, sure) in self.factors(&part.clone())? {
                let e = e.checked_mul(sign).ok_or(Stop::Beyond)?;
                let total = mul_powers(power, Power::from_integer(e))?;
                let id = self.atom(Atom::Prime(p, sure));
                let (mono, factor) = self.mono_mul(&vec![(id, total)], &Vec::new())?;
                let part = Normal { num: Poly::from([(mono, factor)]), den: one() };
                out = self.mul(&out, &part)?;
            }
        }
        Ok(out)
    }

    pub(super) fn fraction_power(&mut self, base: &Normal, power: Power) -> Step<Normal> {
        if base.is_zero() {
            return if power > Power::zero() { Ok(base.clone()) } else { Err(Stop::Undefined) };
        }
        let odd = power.denom() % 2 != 0;
        if base.num.len() == 1 && base.den == one() {
            let (mono, value) = base.num.first_key_value().ok_or(Stop::Beyond)?;
            let (mono, value) = (mono.clone(), value.clone());
            let mut free = 0;
            let splits = mono.iter().all(|(id, p)| match &self.names[*id as usize] {
                Atom::Pi | Atom::E | Atom::Prime(..) => true,
                Atom::Sym(_) => {
                    free += 1;
                    odd && p.is_integer() || p.is_one()
                }
                _ => false,
            });
            let negative = value.is_negative();
            if splits && (odd || free <= 1 && !(negative && free > 0)) {
                let mut out = self.rational_power(&value.abs(), power)?;
                if negative {
                    let turn = if odd {
                        int(if power.numer() % 2 == 0 { 1 } else { -1 })
                    } else if *power.denom() == 2 {
                        let i = self.single(Atom::I, Power::one());
                        self.int_power(&i, *power.numer())?
                    } else {
                        return Err(Stop::Beyond);
                    };
                    out = self.mul(&out, &turn)?;
                }
                for (id, p) in mono {
                    let p = mul_powers(p, power)?;
                    let (mono, factor) = self.mono_mul(&vec![(id, p)], &Vec::new())?;
                    let part = Normal { num: Poly::from([(mono, factor)]), den: one() };
                    out = self.mul(&out, &part)?;
                }
                return Ok(out);
            }
        }
        let key = format!("root {power} of {}", base.key());
        self.opaque(key)
    }

    /// Whether the two forms are the same quotient.
    pub(crate) fn same(&mut self, a: &Normal, b: &Normal) -> Step<bool> {
        if a.den == b.den {
            return Ok(a.num == b.num);
        }
        let left = self.poly_mul(&a.num, &b.den)?;
        let right = self.poly_mul(&b.num, &a.den)?;
        Ok(left == right)
    }

    /// The constant `a / b` if it is one and rational.
    pub(crate) fn proportion(&mut self, a: &Normal, b: &Normal) -> Step<Option<BigRational>> {
        let left = self.poly_mul(&a.num, &b.den)?;
        let right = self.poly_mul(&b.num, &a.den)?;
        let Some((mono, bottom)) = right.first_key_value() else { return Ok(None) };
        let Some(top) = left.get(mono) else { return Ok(None) };
        let ratio = self.check(top / bottom)?;
        if left.len() != right.len() {
            return Ok(None);
        }
        for (mono, value) in &right {
            let scaled = self.check(product(value, &ratio))?;
            if left.get(mono) != Some(&scaled) {
                return Ok(None);
            }
        }
        Ok(Some(ratio))
    }

    /// Whether unequal forms are certainly unequal values: only independent atoms occur.
    pub(crate) fn decided(&self, a: &Normal, b: &Normal) -> bool {
        let (mut pi, mut e) = (false, false);
        let all = [&a.num, &a.den, &b.num, &b.den];
        let plain =
            all.iter().flat_map(|p| p.keys()).flatten().all(|(id, _)| match &self.names[*id as usize] {
                Atom::Sym(_) | Atom::I => true,
                Atom::Pi => {
                    pi = true;
                    true
                }
                Atom::E => {
                    e = true;
                    true
                }
                Atom::Prime(_, sure) => *sure,
                Atom::Opaque(_) => false,
            });
        plain && !(pi && e)
    }

    /// Whether the form holds a variable or a function of one's own.
    pub(crate) fn has_variable(&self, a: &Normal) -> bool {
        [&a.num, &a.den]
            .iter()
            .flat_map(|p| p.keys())
            .flatten()
            .any(|(id, _)| matches!(self.names[*id as usize], Atom::Sym(_) | Atom::Opaque(_)))
    }
}

/// `a * b`, without the search for a common divisor where both are integers.
fn product(a: &BigRational, b: &BigRational) -> BigRational {
    if a.is_integer() && b.is_integer() {
        return BigRational::from_integer(a.numer() * b.numer());
    }
    a * b
}

/// `a + b`, likewise.
fn sum(a: &BigRational, b: &BigRational) -> BigRational {
    if a.is_integer() && b.is_integer() {
        return BigRational::from_integer(a.numer() + b.numer());
    }
    a + b
}

/// The greatest common divisor, read off a reduced fraction.
pub(super) fn gcd(a: &BigInt, b: &BigInt) -> BigInt {
    if a.is_zero() || b.is_zero() {
        return (a + b).abs();
    }
    (b / BigRational::new(a.clone(), b.clone()).denom()).abs()
}

pub(super) fn floor_div(a: &BigInt, b: &BigInt) -> BigInt {
    BigRational::new(a.clone(), b.clone()).floor().to_integer()
}

pub(super) fn small_power(value: &BigRational) -> Step<Power> {
    match (value.numer().to_i64(), value.denom().to_i64()) {
        (Some(top), Some(bottom)) if top.unsigned_abs() < 1 << 40 && bottom < 1 << 30 => {
            Ok(Power::new_raw(top, bottom))
        }
        _ => Err(Stop::Beyond),
    }
}

fn add_powers(a: Power, b: Power) -> Step<Power> {
    let top = a.numer().checked_mul(*b.denom()).zip(b.numer().checked_mul(*a.denom()));
    let top = top.and_then(|(x, y)| x.checked_add(y));
    let bottom = a.denom().checked_mul(*b.denom());
    match (top, bottom) {
        (Some(t), Some(b)) if t.abs() < 1 << 40 && b < 1 << 30 => Ok(Power::new(t, b)),
        _ => Err(Stop::Beyond),
    }
}

pub(super) fn mul_powers(a: Power, b: Power) -> Step<Power> {
    let (top, bottom) = (a.numer().checked_mul(*b.numer()), a.denom().checked_mul(*b.denom()));
    match (top, bottom) {
        (Some(t), Some(b)) if t.checked_abs().is_some_and(|t| t < 1 << 40) && b < 1 << 30 => {
            Ok(Power::new(t, b))
        }
        _ => Err(Stop::Beyond),
    }
}
