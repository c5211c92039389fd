//! The derivative of a scalar by one variable.

use super::expr::{Expr, Fun};

fn boxed(e: Expr) -> Box<Expr> {
    Box::new(e)
}

/// `d expr / d var`; none where there is no rule.
pub(crate) fn derivative(expr: &Expr, var: &str) -> Option<Expr> {
    let d = |e: &Expr| derivative(e, var);
    let constant = !expr.any(&|n| matches!(n, Expr::Sym(name) | Expr::Apply(name, _) if name == var));
    if constant {
        return Some(Expr::int(0));
    }
    Some(match expr {
        Expr::Sym(_) => Expr::int(1),
        Expr::Neg(a) => Expr::Neg(boxed(d(a)?)),
        Expr::Add(terms) => Expr::Add(terms.iter().map(d).collect::<Option<_>>()?),
        Expr::Mul(factors) => {
            let mut terms = Vec::with_capacity(factors.len());
            for i in 0..factors.len() {
                let mut product = factors.clone();
                product[i] = d(&factors[i])?;
                terms.push(Expr::Mul(product));
            }
            Expr::Add(terms)
        }
        Expr::Div(a, b) => {
            let top = Expr::Add(vec![
                Expr::Mul(vec![d(a)?, (**b).clone()]),
                Expr::Neg(boxed(Expr::Mul(vec![(**a).clone(), d(b)?]))),
            ]);
            Expr::Div(boxed(top), boxed(Expr::Mul(vec![(**b).clone(), (**b).clone()])))
        }
        // (a^b)' = b a^(b-1) a' + a^b ln(a) b'
        Expr::Pow(a, b) => {
            let less = Expr::Add(vec![(**b).clone(), Expr::int(-1)]);
            let by_base = Expr::Mul(vec![(**b).clone(), Expr::Pow(a.clone(), boxed(less)), d(a)?]);
            let by_exponent = d(b)?;
            if by_exponent == Expr::int(0) {
                return Some(by_base);
            }
            let ln = Expr::Call(Fun::Ln, vec![(**a).clone()]);
            let by_exponent = Expr::Mul(vec![expr.clone(), ln, by_exponent]);
            if d(a)? == Expr::int(0) { by_exponent } else { Expr::Add(vec![by_base, by_exponent]) }
        }
        Expr::Root(a, n) => {
            let power = Expr::Div(boxed(Expr::int(1)), n.clone());
            d(&Expr::Pow(a.clone(), boxed(power)))?
        }
        Expr::Call(fun, args) => {
            let [x] = &args[..] else { return None };
            let call = |f: Fun| Expr::Call(f, vec![x.clone()]);
            let square = |e: Expr| Expr::Pow(boxed(e), boxed(Expr::int(2)));
            let outer = match fun {
                Fun::Sin => call(Fun::Cos),
                Fun::Cos => Expr::Neg(boxed(call(Fun::Sin))),
                Fun::Tan => Expr::Div(boxed(Expr::int(1)), boxed(square(call(Fun::Cos)))),
                Fun::Ln => Expr::Div(boxed(Expr::int(1)), boxed(x.clone())),
                _ => return None,
            };
            Expr::Mul(vec![outer, d(x)?])
        }
        _ => return None,
    })
}
