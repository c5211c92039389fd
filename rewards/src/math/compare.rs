//! Equality of structured answers: lists, sets, tuples, intervals, matrices, relations.

use super::expr::{Expr, Fun, Rel};
use super::numeric::Point;
use super::options::EqualOptions;
use super::scalar::{Context, variables};
use super::{normal::Algebra, text};

/// Budget of one comparison, in units of about a third of a microsecond.
const FUEL: u64 = 16_000;
/// Members beyond which lists are compared in order only.
const MAX_UNORDERED: usize = 48;

/// Whether a parsed prediction answers a parsed gold.
pub(crate) fn equal(gold: &Expr, pred: &Expr, options: &EqualOptions) -> bool {
    let mut comparison = Comparison {
        context: Context {
            algebra: Algebra::new(FUEL),
            rounding: options.float_rounding,
            percent_either_way: options.percent_either_way,
        },
        options,
    };
    if comparison.answers(gold, pred) {
        return true;
    }
    !options.strict && renamed(gold, pred).is_some_and(|pred| comparison.answers(gold, &pred))
}

/// The prediction with its variables called as the gold's, in order of first use.
fn renamed(gold: &Expr, pred: &Expr) -> Option<Expr> {
    let order = |e: &Expr| {
        let mut names: Vec<String> = Vec::new();
        e.walk(&mut |n| {
            if let Expr::Sym(name) = n
                && !names.contains(name)
            {
                names.push(name.clone());
            }
        });
        names
    };
    let (to, from) = (order(gold), order(pred));
    (to.len() == from.len()).then(|| {
        pred.map(&mut |e| match e {
            Expr::Sym(name) => from.iter().position(|f| f == name).map(|i| Expr::Sym(to[i].clone())),
            _ => None,
        })
    })
}

struct Comparison<'a> {
    context: Context,
    options: &'a EqualOptions,
}

/// An atomic relation: `left rel right`.
type Atomic = (Expr, Rel, Expr);

impl Comparison<'_> {
    fn answers(&mut self, gold: &Expr, pred: &Expr) -> bool {
        if self.context.algebra.pay(2).is_err() {
            return false;
        }
        let (gold, pred) = (&simplified(gold), &simplified(pred));
        let both_relations = is_relation(gold) && is_relation(pred);
        if both_relations && self.relations(gold, pred) {
            return true;
        }
        // A name before the value says nothing when the other side has none.
        let (g_label, g) = labelled(gold);
        let (p_label, p) = labelled(pred);
        match (g_label, p_label) {
            (Some(a), Some(b)) => {
                if !self.same_label(a, b) {
                    return false;
                }
                if both_relations
                    && matches!((gold, pred), (Expr::Chain(x, _), Expr::Chain(y, _)) if x.len() == 2 && y.len() == 2)
                {
                    return false;
                }
                return self.values(&g, &p);
            }
            (None, None) => {}
            _ => return self.values(&g, &p),
        }
        self.values(gold, pred)
    }

    fn same_label(&mut self, a: &Expr, b: &Expr) -> bool {
        a == b
    }

    fn values(&mut self, gold: &Expr, pred: &Expr) -> bool {
        match (gold, pred) {
            (Expr::Text(a), Expr::Text(b)) => text::words(a).is_some() && text::words(a) == text::words(b),
            (Expr::Text(_), _) | (_, Expr::Text(_)) => false,
            (Expr::Based(a, x), Expr::Based(b, y)) => a == b && x == y,
            (Expr::Based(..), _) | (_, Expr::Based(..)) => false,
            (Expr::Ratio(a), Expr::Ratio(b)) => self.ratio(a, b),
            (Expr::Ratio(_), _) | (_, Expr::Ratio(_)) => false,
            (Expr::Union(_) | Expr::Intersection(_) | Expr::Difference(..), _)
            | (_, Expr::Union(_) | Expr::Intersection(_) | Expr::Difference(..)) => self.unions(gold, pred),
            (Expr::Chain(..), Expr::Chain(..)) => false,
            (Expr::Chain(..), _) => self.relation_and_set(gold, pred),
            (_, Expr::Chain(..)) => self.options.allow_set_relation_comp && self.relation_and_set(pred, gold),
            _ if is_list(gold) || is_list(pred) => self.lists(gold, pred),
            _ => {
                let (a, b) = (matrix(gold), matrix(pred));
                match (a, b) {
                    (Some(a), Some(b)) => self.matrices(&a, &b),
                    (None, None) => self.context.scalars(gold, pred),
                    _ => false,
                }
            }
        }
    }

    fn ratio(&mut self, a: &[Expr], b: &[Expr]) -> bool {
        a.len() == b.len()
            && a.iter().zip(b).all(|(x, y)| match (x, y) {
                (Expr::Text(x), Expr::Text(y)) => x == y,
                _ => self.values(x, y),
            })
    }

    fn unions(&mut self, gold: &Expr, pred: &Expr) -> bool {
        match (gold, pred) {
            (Expr::Union(a), Expr::Union(b)) | (Expr::Intersection(a), Expr::Intersection(b)) => {
                self.unordered(a, b)
            }
            (Expr::Difference(a, x), Expr::Difference(b, y)) => self.values(a, b) && self.values(x, y),
            _ => false,
        }
    }

    fn matrices(&mut self, a: &[Vec<Expr>], b: &[Vec<Expr>]) -> bool {
        a.len() == b.len()
            && a.iter().zip(b).all(|(r, s)| r.len() == s.len())
            && a.iter().flatten().zip(b.iter().flatten()).all(|(x, y)| self.context.scalars(x, y))
    }

    fn lists(&mut self, gold: &Expr, pred: &Expr) -> bool {
        match (gold, pred) {
            (Expr::Set(a), Expr::Set(b)) => self.sets(a, b),
            (Expr::Set(a), Expr::List(b)) | (Expr::List(a), Expr::Set(b)) => self.sets(a, b),
            (Expr::List(a), Expr::List(b)) => self.bare_lists(a, b),
            (Expr::Bracket('(', a, ')'), Expr::List(b)) | (Expr::List(a), Expr::Bracket('(', b, ')')) => {
                self.ordered(a, b)
            }
            (Expr::Bracket(o, a, c), Expr::Bracket(p, b, d)) => {
                let same = o == p && c == d;
                // Square and round brackets are both used for vectors of three and more.
                let vectors = a.len() > 2 && *o == mirror(*c) && *p == mirror(*d);
                (same || vectors) && self.ordered(a, b)
            }
            (Expr::Set(a), Expr::Bracket('[', b, ']')) if b.len() > 2 => self.sets(a, b),
            // A single value in a list of one.
            (Expr::Set(a), b) | (b, Expr::Set(a)) if a.len() == 1 && !is_list(b) => {
                self.answers(&a[0].clone(), b)
            }
            _ => false,
        }
    }

    fn bare_lists(&mut self, a: &[Expr], b: &[Expr]) -> bool {
        let tuples = a.iter().chain(b).all(|e| matches!(e, Expr::Bracket(..)));
        if tuples && !self.options.ordered_lists {
            return self.sets(a, b);
        }
        if a.len() != b.len() {
            return false;
        }
        if self.options.ordered_lists {
            return self.ordered(a, b);
        }
        // Values of several names are told apart by their order when one side leaves the names out.
        let names = |list: &[Expr]| list.iter().filter_map(|e| labelled(e).0).cloned().collect::<Vec<_>>();
        let (x, y) = (names(a), names(b));
        let distinct = |n: &[Expr]| n.windows(2).any(|w| w[0] != w[1]);
        if (distinct(&x) && y.is_empty()) || (distinct(&y) && x.is_empty()) {
            return self.ordered(a, b);
        }
        self.unordered(a, b)
    }

    fn ordered(&mut self, a: &[Expr], b: &[Expr]) -> bool {
        a.len() == b.len() && a.iter().zip(b).all(|(x, y)| self.answers(x, y))
    }

    fn sets(&mut self, a: &[Expr], b: &[Expr]) -> bool {
        if self.unordered(a, b) {
            return true;
        }
        if a.len() == b.len() || a.len().max(b.len()) > MAX_UNORDERED {
            return false;
        }
        // Members written twice count once.
        a.iter().all(|x| b.iter().any(|y| self.answers(x, y)))
            && b.iter().all(|y| a.iter().any(|x| self.answers(x, y)))
    }

    fn unordered(&mut self, a: &[Expr], b: &[Expr]) -> bool {
        if a.len() != b.len() {
            return false;
        }
        if a.len() > MAX_UNORDERED {
            return self.ordered(a, b);
        }
        let mut used = vec![false; b.len()];
        a.iter().enumerate().all(|(i, x)| {
            let from_here = (i..b.len()).chain(0..i);
            for j in from_here {
                if !used[j] && self.answers(x, &b[j]) {
                    used[j] = true;
                    return true;
                }
            }
            false
        })
    }

    fn relations(&mut self, gold: &Expr, pred: &Expr) -> bool {
        let (Some(a), Some(b)) = (atomics(gold), atomics(pred)) else { return false };
        self.same_atomics(&a, &b)
    }

    fn same_atomics(&mut self, a: &[Atomic], b: &[Atomic]) -> bool {
        if a.len() != b.len() || a.is_empty() {
            return false;
        }
        let mut used = vec![false; b.len()];
        a.iter().all(|x| {
            for (j, y) in b.iter().enumerate() {
                if !used[j] && self.same_atomic(x, y) {
                    used[j] = true;
                    return true;
                }
            }
            false
        })
    }

    fn same_atomic(&mut self, a: &Atomic, b: &Atomic) -> bool {
        // All order relations are turned to `<` or `≤`.
        let turned = |(l, rel, r): &Atomic| match rel {
            Rel::Gt | Rel::Ge => (difference(r, l), rel.flip()),
            _ => (difference(l, r), *rel),
        };
        let ((d, rel), (e, sign)) = (turned(a), turned(b));
        if rel != sign {
            return false;
        }
        match rel {
            Rel::Approx => false,
            Rel::Eq | Rel::Ne => self.context.proportional(&d, &e, false) || self.rounded_sides(a, b),
            _ => self.context.proportional(&d, &e, true) || self.rounded_sides(a, b),
        }
    }

    /// The same left side and a right side equal up to rounding (`x = 0.333333`).
    fn rounded_sides(&mut self, a: &Atomic, b: &Atomic) -> bool {
        a.1 == b.1
            && a.0 == b.0
            && !matches!(a.2, Expr::Chain(..))
            && (a.2.has_decimal() || b.2.has_decimal() || !is_scalar(&a.2))
            && self.values(&a.2, &b.2)
    }

    /// An inequality against the interval or set it describes.
    fn relation_and_set(&mut self, relation: &Expr, set: &Expr) -> bool {
        let Expr::Chain(sides, signs) = relation else { return false };
        if signs.iter().any(|r| matches!(r, Rel::Eq | Rel::Approx | Rel::Ne)) {
            return false;
        }
        let subject = match sides.len() {
            3 => sides[1].clone(),
            2 if is_label(&sides[0]) => sides[0].clone(),
            2 if is_label(&sides[1]) => sides[1].clone(),
            _ => {
                let names = variables(&[relation]);
                match (names.len(), names.first()) {
                    (1, Some(name)) => Expr::Sym(name.clone()),
                    _ => return false,
                }
            }
        };
        let Expr::Bracket(open, ends, close) = set else { return false };
        let [low, high] = &ends[..] else { return false };
        let strict = |c: char| matches!(c, '(' | ')');
        let mut wanted = Vec::new();
        if !infinite(low) {
            wanted.push((low.clone(), if strict(*open) { Rel::Lt } else { Rel::Le }, subject.clone()));
        }
        if !infinite(high) {
            wanted.push((subject, if strict(*close) { Rel::Lt } else { Rel::Le }, high.clone()));
        }
        let Some(given) = atomics(relation) else { return false };
        self.same_atomics(&given, &wanted)
    }
}

fn mirror(close: char) -> char {
    if close == ')' { '(' } else { '[' }
}

fn infinite(e: &Expr) -> bool {
    match e {
        Expr::Infinity => true,
        Expr::Neg(a) => infinite(a),
        _ => false,
    }
}

fn difference(a: &Expr, b: &Expr) -> Expr {
    Expr::Add(vec![a.clone(), Expr::Neg(Box::new(b.clone()))])
}

fn is_list(e: &Expr) -> bool {
    matches!(e, Expr::List(_) | Expr::Set(_) | Expr::Bracket(..))
}

fn is_relation(e: &Expr) -> bool {
    matches!(e, Expr::Chain(..))
}

fn is_scalar(e: &Expr) -> bool {
    !is_list(e) && !matches!(e, Expr::Matrix(_) | Expr::Text(_) | Expr::Union(_) | Expr::Ratio(_))
}

/// The relations of a chain one by one, if all sides are scalars.
fn atomics(chain: &Expr) -> Option<Vec<Atomic>> {
    let Expr::Chain(sides, signs) = chain else { return None };
    let pairs = sides.windows(2).zip(signs).map(|(w, rel)| (w[0].clone(), *rel, w[1].clone()));
    Some(pairs.collect())
}

/// Brings an answer to the shape that is compared: `x ∈ S` is `S`, `≈` ends a chain, `±` is two answers.
fn simplified(e: &Expr) -> Expr {
    match e {
        Expr::In(_, set) => simplified(set),
        Expr::Bracket('(', ends, ')') if matches!(ends[..], [Expr::Neg(ref a), Expr::Infinity] if **a == Expr::Infinity) => {
            Expr::Sym("ℝ".into())
        }
        Expr::Chain(sides, signs) => {
            // What follows "≈" only rounds what came before, unless nothing but a name did.
            let mut keep = sides.len();
            if let Some(at) = signs.iter().position(|r| *r == Rel::Approx)
                && (at > 0 || !is_label(&sides[0]))
            {
                keep = at + 1;
            }
            if keep == 1 {
                if !roughly(&sides[0], &sides[1]) {
                    // "5 ≈ 6" is no answer.
                    return Expr::Text(String::new());
                }
                return simplified(&sides[0]);
            }
            let mut sides = sides[..keep].to_vec();
            let mut signs = signs[..keep - 1].to_vec();
            if let [Rel::Approx] = signs[..] {
                signs[0] = Rel::Eq;
            }
            // A chain of equalities counts by its name and its last part.
            if sides.len() > 2 && signs.iter().all(|r| *r == Rel::Eq) {
                let last = sides[sides.len() - 1].clone();
                if is_label(&sides[0]) {
                    sides = vec![sides[0].clone(), last];
                    signs = vec![Rel::Eq];
                } else {
                    return simplified(&last);
                }
            }
            // An equality of two numbers is a calculation, and its result the answer.
            if signs[..] == [Rel::Eq] && sides.iter().all(|s| is_scalar(s) && variables(&[s]).is_empty()) {
                return simplified(&sides[1]);
            }
            let chain = Expr::Chain(sides, signs);
            if has_pm(&chain) {
                return Expr::List(both_signs(&chain));
            }
            chain
        }
        Expr::List(items) => Expr::List(expand(items)),
        Expr::Set(items) => Expr::Set(expand(items)),
        other if has_pm(other) => Expr::List(both_signs(other)),
        other => other.clone(),
    }
}

/// Whether two numbers are within a tenth of each other, or one is no plain number.
fn roughly(a: &Expr, b: &Expr) -> bool {
    let none = |_: &str| f64::NAN;
    match (Point::new(&none).value(a), Point::new(&none).value(b)) {
        (Some(x), Some(y)) => x.minus(y).size() <= 0.1 * x.size().max(y.size()),
        _ => true,
    }
}

fn expand(items: &[Expr]) -> Vec<Expr> {
    items.iter().flat_map(|e| if has_pm(e) { both_signs(e) } else { vec![e.clone()] }).collect()
}

fn has_pm(e: &Expr) -> bool {
    e.any(&|n| matches!(n, Expr::PlusMinus(..)))
}

fn both_signs(e: &Expr) -> Vec<Expr> {
    [true, false]
        .into_iter()
        .map(|upper| {
            e.map(&mut |n| match n {
                Expr::PlusMinus(plus, a) => {
                    let inner = (**a).clone();
                    Some(if *plus == upper { inner } else { Expr::Neg(Box::new(inner)) })
                }
                _ => None,
            })
        })
        .collect()
}

/// The name an answer is given under, and the answer: `x = 5`, `f(x) = x^2`, `(x, y) = (1, 2)`.
fn labelled(e: &Expr) -> (Option<&Expr>, Expr) {
    if let Expr::Chain(sides, signs) = e
        && let ([left, right], [Rel::Eq]) = (&sides[..], &signs[..])
    {
        if is_label(left) {
            return (Some(left), simplified(right));
        }
        if is_label(right) {
            return (Some(right), simplified(left));
        }
    }
    (None, e.clone())
}

fn is_label(e: &Expr) -> bool {
    let capital = |e: &Expr| matches!(e, Expr::Sym(n) if n.starts_with(char::is_uppercase));
    match e {
        Expr::Sym(_) | Expr::Named(..) | Expr::Apply(..) | Expr::Text(_) => true,
        Expr::Mul(parts) => parts.iter().all(capital),
        Expr::Call(Fun::Abs, args) => {
            args.iter().all(|a| capital(a) || matches!(a, Expr::Mul(parts) if parts.iter().all(capital)))
        }
        Expr::Bracket('(', parts, ')') => parts.iter().all(|p| matches!(p, Expr::Sym(_))),
        Expr::Ratio(parts) => parts.iter().all(is_label),
        Expr::Unit(value, _) => is_label(value),
        Expr::Div(a, b) => is_label(a) && is_label(b) && matches!(**a, Expr::Mul(_)),
        _ => false,
    }
}

/// The entries of a matrix expression: sums of matrices and scalar multiples are worked out.
fn matrix(e: &Expr) -> Option<Vec<Vec<Expr>>> {
    match e {
        Expr::Matrix(rows) => Some(rows.clone()),
        Expr::Neg(a) => {
            let rows = matrix(a)?;
            Some(each(&rows, |x| Expr::Neg(Box::new(x.clone()))))
        }
        Expr::Mul(factors) => {
            let mut found = None;
            let mut scale = Vec::new();
            for f in factors {
                match matrix(f) {
                    Some(rows) if found.is_none() => found = Some(rows),
                    Some(_) => return None,
                    None => scale.push(f.clone()),
                }
            }
            let rows = found?;
            Some(each(&rows, |x| {
                let mut parts = scale.clone();
                parts.push(x.clone());
                Expr::Mul(parts)
            }))
        }
        Expr::Div(a, b) => {
            let rows = matrix(a)?;
            if b.any(&|n| matches!(n, Expr::Matrix(_))) {
                return None;
            }
            Some(each(&rows, |x| Expr::Div(Box::new(x.clone()), b.clone())))
        }
        Expr::Add(terms) => {
            let mut sum = matrix(terms.first()?)?;
            for t in &terms[1..] {
                let other = matrix(t)?;
                if other.len() != sum.len() || other[0].len() != sum[0].len() {
                    return None;
                }
                for (row, more) in sum.iter_mut().zip(other) {
                    for (x, y) in row.iter_mut().zip(more) {
                        *x = Expr::Add(vec![x.clone(), y]);
                    }
                }
            }
            Some(sum)
        }
        _ => None,
    }
}

fn each(rows: &[Vec<Expr>], f: impl Fn(&Expr) -> Expr) -> Vec<Vec<Expr>> {
    rows.iter().map(|r| r.iter().map(&f).collect()).collect()
}
