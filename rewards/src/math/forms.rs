//! Trees to normal forms: powers, roots, logarithms and functions with exact values.

use super::expr::{Expr, Fun};
use super::normal::{
    Algebra, Atom, Normal, Power, Step, Stop, constant, floor_div, gcd, int, mul_powers, one, small_power,
};
use num_bigint::BigInt;
use num_rational::BigRational;
use num_traits::{One, Signed, ToPrimitive, Zero};

/// Largest `n` of `n!`.
const MAX_FACTORIAL: u64 = 400;

impl Algebra {
    fn power(&mut self, base: &Expr, exponent: &Expr) -> Step<Normal> {
        let e = self.of(exponent)?;
        if let Some(e) = e.rational() {
            let base = self.of(base)?;
            let e = small_power(&e)?;
            if e.is_integer() {
                return self.int_power(&base, e.to_integer());
            }
            if e.numer().abs() > 10_000 || *e.denom() > 1000 {
                return Err(Stop::Beyond);
            }
            return self.fraction_power(&base, e);
        }
        let base = self.of(base)?;
        if e.den != one() {
            let key = format!("{} to {}", base.key(), e.key());
            return self.opaque(key);
        }
        // b^(c + k m) = b^c (b^m)^k, and a number splits into its primes.
        let parts: Vec<(String, Power)> = match base.integer() {
            Some(n) if n > BigInt::one() => {
                let factors = self.factors(&n)?;
                factors.into_iter().map(|(p, e, _)| (p.to_string(), Power::from_integer(e))).collect()
            }
            _ => vec![(base.key(), Power::one())],
        };
        let mut out = int(1);
        for (mono, value) in e.num.clone() {
            let value = small_power(&value)?;
            if mono.is_empty() {
                let part = if value.is_integer() {
                    self.int_power(&base, value.to_integer())?
                } else {
                    self.fraction_power(&base, value)?
                };
                out = self.mul(&out, &part)?;
                continue;
            }
            for (name, times) in &parts {
                let power = mul_powers(value, *times)?;
                let part = self.single(Atom::Opaque(format!("{name} to {mono:?}")), power);
                out = self.mul(&out, &part)?;
            }
        }
        Ok(out)
    }

    fn product(&mut self, factors: &[Expr]) -> Step<Normal> {
        let mut out = int(1);
        for f in factors {
            let f = self.of(f)?;
            out = self.mul(&out, &f)?;
        }
        Ok(out)
    }

    /// The normal form of a scalar.
    pub(crate) fn of(&mut self, expr: &Expr) -> Step<Normal> {
        self.pay(1)?;
        match expr {
            Expr::Num { value, .. } => Ok(constant(self.check(value.clone())?)),
            Expr::Sym(name) => Ok(self.single(Atom::Sym(name.clone()), Power::one())),
            Expr::Pi => Ok(self.single(Atom::Pi, Power::one())),
            Expr::E => Ok(self.single(Atom::E, Power::one())),
            Expr::I => Ok(self.single(Atom::I, Power::one())),
            Expr::Infinity => self.opaque("infinity".into()),
            Expr::Neg(a) => {
                let a = self.of(a)?;
                Ok(self.neg(&a))
            }
            Expr::Add(terms) => {
                let mut out = int(0);
                for t in terms {
                    let t = self.of(t)?;
                    out = self.add(&out, &t)?;
                }
                Ok(out)
            }
            Expr::Mul(factors) => self.product(factors),
            Expr::Apply(name, arg) => {
                let head = self.single(Atom::Sym(name.clone()), Power::one());
                let arg = self.of(arg)?;
                self.mul(&head, &arg)
            }
            Expr::Div(a, b) => {
                let (a, b) = (self.of(a)?, self.of(b)?);
                if b.is_zero() {
                    return Err(Stop::Undefined);
                }
                let b = self.inverse(&b)?;
                self.mul(&a, &b)
            }
            Expr::Pow(a, b) => self.power(a, b),
            Expr::Root(a, index) => {
                let index = self.of(index)?.integer().and_then(|n| n.to_i64());
                let index = index.filter(|n| (1..=1000).contains(n)).ok_or(Stop::Beyond)?;
                let a = self.of(a)?;
                if index == 1 {
                    return Ok(a);
                }
                self.fraction_power(&a, Power::new(1, index))
            }
            Expr::Percent(a) => {
                let a = self.of(a)?;
                let hundredth = constant(BigRational::new(1.into(), 100.into()));
                self.mul(&a, &hundredth)
            }
            Expr::Degree(a) => {
                let a = self.of(a)?;
                let part = constant(BigRational::new(1.into(), 180.into()));
                let pi = self.single(Atom::Pi, Power::one());
                let part = self.mul(&part, &pi)?;
                self.mul(&a, &part)
            }
            Expr::Call(fun, args) => self.call(*fun, args),
            Expr::Named(name, args) => {
                let mut key = format!("named {name}");
                for a in args {
                    key.push('|');
                    if let Expr::Matrix(rows) = a {
                        for cell in rows.iter().flatten() {
                            let cell = self.of(cell)?;
                            key.push(';');
                            key.push_str(&cell.key());
                        }
                        key.push_str(&format!("x{}", rows.len()));
                        continue;
                    }
                    key.push_str(&self.of(a)?.key());
                }
                self.opaque(key)
            }
            _ => Err(Stop::Beyond),
        }
    }

    fn call(&mut self, fun: Fun, args: &[Expr]) -> Step<Normal> {
        let mut values = Vec::with_capacity(args.len());
        for a in args {
            values.push(self.of(a)?);
        }
        let rationals: Option<Vec<BigRational>> = values.iter().map(Normal::rational).collect();
        if let Some(rationals) = rationals
            && let Some(result) = self.exact_call(fun, &rationals)
        {
            return result;
        }
        match (fun, &values[..]) {
            (Fun::Binomial, [n, k]) => {
                if let Some(k) = k.integer().and_then(|k| k.to_u32()).filter(|&k| k <= 8) {
                    let mut out = int(1);
                    for j in 0..k {
                        let j_th = self.sub(n, &int(i64::from(j)))?;
                        out = self.mul(&out, &j_th)?;
                        let part = constant(BigRational::new(1.into(), (j + 1).into()));
                        out = self.mul(&out, &part)?;
                    }
                    return Ok(out);
                }
            }
            (Fun::Log, [base, x]) => {
                let (base, x) = (self.logarithm(base)?, self.logarithm(x)?);
                if base.is_zero() {
                    return Err(Stop::Undefined);
                }
                let base = self.inverse(&base)?;
                return self.mul(&base, &x);
            }
            (Fun::Ln, [x]) => return self.logarithm(x),
            _ => {}
        }
        let keys: Vec<String> = values.iter().map(Normal::key).collect();
        self.opaque(format!("{fun:?} {}", keys.join("|")))
    }

    /// ln of a number over primes; of anything else an atom.
    fn logarithm(&mut self, x: &Normal) -> Step<Normal> {
        if let Some(value) = x.rational().filter(BigRational::is_positive) {
            let mut out = int(0);
            for (part, sign) in [(value.numer(), 1), (value.denom(), -1)] {
                for (p, e, _) in self.factors(&part.clone())? {
                    let ln = self.single(Atom::Opaque(format!("ln {p}")), Power::one());
                    let term = self.mul(&ln, &int(e * sign))?;
                    out = self.add(&out, &term)?;
                }
            }
            return Ok(out);
        }
        if x.is_zero() {
            return Err(Stop::Undefined);
        }
        if x.num.len() == 1 && x.den == one() {
            let (mono, value) = x.num.first_key_value().ok_or(Stop::Beyond)?;
            if let ([(id, power)], true) = (&mono[..], value.is_one())
                && self.names[*id as usize] == Atom::E
            {
                let power = BigRational::new((*power.numer()).into(), (*power.denom()).into());
                return Ok(constant(power));
            }
        }
        let key = format!("ln {}", x.key());
        self.opaque(key)
    }

    /// A function of rationals whose value is rational; none if it has no such rule.
    fn exact_call(&mut self, fun: Fun, args: &[BigRational]) -> Option<Step<Normal>> {
        let ints: Option<Vec<BigInt>> = args.iter().map(|a| a.is_integer().then(|| a.to_integer())).collect();
        let result = match (fun, args) {
            (Fun::Abs, [x]) => x.abs(),
            (Fun::Floor, [x]) => x.floor(),
            (Fun::Ceil, [x]) => x.ceil(),
            (Fun::Re, [x]) => x.clone(),
            (Fun::Im, [_]) => BigRational::zero(),
            (Fun::Min, args) => args.iter().min()?.clone(),
            (Fun::Max, args) => args.iter().max()?.clone(),
            (Fun::Factorial, [x]) => {
                let n = x.is_integer().then(|| x.to_integer())?;
                if n.is_negative() {
                    return Some(Err(Stop::Undefined));
                }
                let Some(n) = n.to_u64().filter(|&n| n <= MAX_FACTORIAL) else {
                    return Some(Err(Stop::Beyond));
                };
                if let Err(stop) = self.pay(n / 4 + 1) {
                    return Some(Err(stop));
                }
                let product = (1..=n).fold(BigInt::one(), |acc, k| acc * k);
                BigRational::from_integer(product)
            }
            (Fun::Binomial, [_, _]) => {
                let ints = ints?;
                let (n, k) = (ints[0].to_i64()?, ints[1].to_i64()?);
                if !(0..=1000).contains(&n) || k < 0 {
                    return None;
                }
                if k > n {
                    return Some(Ok(int(0)));
                }
                let k = k.min(n - k);
                if let Err(stop) = self.pay(k as u64 + 1) {
                    return Some(Err(stop));
                }
                let mut out = BigInt::one();
                for j in 0..k {
                    out = out * (n - j) / (j + 1);
                }
                BigRational::from_integer(out)
            }
            (Fun::Gcd, [_, ..]) => {
                let gcd = ints?.iter().fold(BigInt::zero(), |acc, n| gcd(&acc, n));
                BigRational::from_integer(gcd)
            }
            (Fun::Lcm, [_, ..]) => {
                let ints = ints?;
                if ints.iter().any(Zero::is_zero) || ints.len() > 20 {
                    return None;
                }
                let lcm = ints.iter().fold(BigInt::one(), |acc, n| (&acc / gcd(&acc, n) * n).abs());
                BigRational::from_integer(lcm)
            }
            (Fun::Mod, [_, _]) => {
                let ints = ints?;
                if ints[1].is_zero() {
                    return Some(Err(Stop::Undefined));
                }
                BigRational::from_integer(&ints[0] - floor_div(&ints[0], &ints[1]) * &ints[1])
            }
            _ => return None,
        };
        let checked = self.check(result);
        Some(checked.map(constant))
    }
}
