//! Mathematical answers: finding them in a text and telling whether two are equal.
//!
//! [`equal`] compares two bare answers, [`extract`] finds the answer in a text, [`verify`] does both.
//! Whatever cannot be shown equal is different: a wrong answer accepted is worse than a right one
//! refused. Every call is bounded in depth, size and steps and takes a few milliseconds at most;
//! nothing here panics on any input. The remaining disagreements with other graders are listed in
//! `rewards/docs/math-disagreements.md`.

mod announced;
mod arithmetic;
mod ball;
mod boxed;
mod commands;
mod compare;
mod delimited;
mod derivative;
mod expr;
mod extract;
mod forms;
mod gym;
mod lexer;
mod names;
mod normal;
mod number;
mod numerals;
mod numeric;
mod operands;
mod operators;
mod options;
mod parser;
mod precise;
mod prose;
mod python;
mod scalar;
mod shaping;
mod text;
mod units;

pub use extract::{extract, extract_choice};
pub use gym::{GymError, GymItem, contained, countdown, gym_score, puzzle24, same_decimal};
pub use number::parse_number;
pub use options::{EqualOptions, ExtractOptions, Extracted, Mark, Verdict, VerifyOptions, WhichBox};
pub use shaping::{
    CosineBounds, accuracy, cosine_scaled, reasoning_accuracy, repetition, soft_overlong, think_format,
};

/// Bytes of an answer beyond which only identical texts are equal.
const MAX_ANSWER: usize = 6_000;

/// Whether `pred` is the answer `gold`; both are bare answers, LaTeX or plain.
///
/// ```
/// use rft_rewards::math::{EqualOptions, equal};
/// let options = EqualOptions::default();
/// assert!(equal("\\frac{1}{2}", "0.5", &options));
/// assert!(equal("2\\sqrt{3}", "\\sqrt{12}", &options));
/// assert!(equal("(x+1)^2", "x^2+2x+1", &options));
/// assert!(!equal("12345", "(12,345)", &options));
/// ```
pub fn equal(gold: &str, pred: &str, options: &EqualOptions) -> bool {
    if let (Some(a), Some(b)) = (number::Plain::read(gold), number::Plain::read(pred)) {
        return a.equal(b, options.float_rounding);
    }
    let (gold, pred) = (text::bare(gold), text::bare(pred));
    if gold.is_empty() || pred.is_empty() {
        return false;
    }
    if gold.len().max(pred.len()) > MAX_ANSWER {
        return gold == pred;
    }
    let (a, b) = (text::squeeze(gold), text::squeeze(pred));
    if a.is_empty() || b.is_empty() {
        return false;
    }
    if a == b {
        return true;
    }
    if let Some(letter) = text::choice(gold)
        && (text::leading_choice(pred) == Some(letter) || text::choice(pred) == Some(letter))
    {
        return true;
    }
    match (parser::parse(gold), parser::parse(pred)) {
        (Some(g), Some(p)) => {
            if compare::equal(&g, &p, options) {
                return true;
            }
            let wordy = |e: &expr::Expr| e.any(&|n| matches!(n, expr::Expr::Text(_)));
            wordy(&g) && wordy(&p) && same_words(gold, pred)
        }
        (None, None) => same_words(gold, pred),
        _ => false,
    }
}

fn same_words(gold: &str, pred: &str) -> bool {
    let words = text::words(gold);
    words.is_some() && words == text::words(pred)
}

/// Finds the answers of two texts and compares them.
///
/// ```
/// use rft_rewards::math::{Verdict, VerifyOptions, verify};
/// let options = VerifyOptions::default();
/// assert_eq!(verify("$\\boxed{18}$", "so the answer is 18.", &options), Verdict::Equal);
/// assert_eq!(verify("18", "\\boxed{18} or \\boxed{19}", &options), Verdict::Different);
/// assert_eq!(verify("18", "I do not know.", &options), Verdict::NoAnswer);
/// ```
pub fn verify(gold_text: &str, pred_text: &str, options: &VerifyOptions) -> Verdict {
    let Some(gold) = extract(gold_text, &options.gold) else { return Verdict::GoldUnparsable };
    let Some(pred) = extract(pred_text, &options.pred) else { return Verdict::NoAnswer };
    if equal(&gold.text, &pred.text, &options.equal) { Verdict::Equal } else { Verdict::Different }
}

/// Compares a bare gold answer with the answer found in a text.
pub fn check(gold: &str, pred_text: &str, extraction: &ExtractOptions, options: &EqualOptions) -> Verdict {
    if gold.trim().is_empty() {
        return Verdict::GoldUnparsable;
    }
    match extract(pred_text, extraction) {
        None => Verdict::NoAnswer,
        Some(pred) if equal(gold, &pred.text, options) => Verdict::Equal,
        Some(_) => Verdict::Different,
    }
}
