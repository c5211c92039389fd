//! TRL's reward functions, to the last digit.
//!
//! Source: trl 1.16.0, `trl/rewards/` (`format_rewards.py`, `other_rewards.py`,
//! `accuracy_rewards.py`), behaviour only.

use super::options::{ExtractOptions, Verdict};
use super::{EqualOptions, VerifyOptions, verify};
use std::collections::HashSet;

/// 1 if the text starts with `<think>`, has it once, and closes it; else 0.
pub fn think_format(completion: &str) -> f64 {
    let inner = completion.strip_prefix("<think>");
    let good = inner.is_some_and(|rest| !rest.contains("<think>") && rest.contains("</think>"));
    f64::from(u8::from(good))
}

/// DAPO's soft overlong punishment: 0 up to `max - cache` tokens, then down a line to -1 at `max`.
pub fn soft_overlong(length: u64, max: u64, cache: u64) -> f64 {
    let soft = max.saturating_sub(cache);
    if length <= soft {
        0.0
    } else if length <= max {
        (soft as f64 - length as f64) / cache as f64
    } else {
        -1.0
    }
}

/// `max_penalty * (1 - distinct / all)` over the `n`-grams of the token ids; 0 for fewer than `n`.
pub fn repetition(ids: &[u32], n: usize, max_penalty: f64) -> f64 {
    if n == 0 || ids.len() < n {
        return 0.0;
    }
    let all = ids.len() - n + 1;
    let distinct = ids.windows(n).collect::<HashSet<_>>().len();
    (1.0 - distinct as f64 / all as f64) * max_penalty
}

/// The ends of [`cosine_scaled`]'s two curves.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct CosineBounds {
    /// Wrong and short.
    pub min_wrong: f64,
    /// Wrong and long.
    pub max_wrong: f64,
    /// Right and long.
    pub min_correct: f64,
    /// Right and short.
    pub max_correct: f64,
}

impl Default for CosineBounds {
    fn default() -> Self {
        CosineBounds { min_wrong: -1.0, max_wrong: -0.5, min_correct: 0.5, max_correct: 1.0 }
    }
}

/// A reward that falls with length when right and rises with length when wrong, along a cosine.
pub fn cosine_scaled(length: u64, max_length: u64, correct: bool, bounds: &CosineBounds) -> f64 {
    let progress = if max_length == 0 { 1.0 } else { (length as f64 / max_length as f64).min(1.0) };
    let cosine = (progress * std::f64::consts::PI).cos();
    let (low, high) = if correct {
        (bounds.min_correct, bounds.max_correct)
    } else {
        // A wrong answer starts from the lower bound.
        (bounds.max_wrong, bounds.min_wrong)
    };
    low + 0.5 * (high - low) * (1.0 + cosine)
}

/// 1 if the announced or boxed LaTeX of the completion equals the solution, 0 if not, none if the
/// solution has no answer in it.
pub fn accuracy(completion: &str, solution: &str) -> Option<f64> {
    let options = VerifyOptions {
        gold: ExtractOptions { boxed_priority: 50, after_think: false, ..ExtractOptions::default() },
        pred: ExtractOptions {
            expr: false,
            unanchored: false,
            answer_tags: false,
            after_think: false,
            ..ExtractOptions::default()
        },
        equal: EqualOptions::default(),
    };
    match verify(solution, completion, &options) {
        Verdict::GoldUnparsable => None,
        Verdict::Equal => Some(1.0),
        Verdict::Different | Verdict::NoAnswer => Some(0.0),
    }
}

/// [`accuracy`] of what follows the last `</think>`; 0 if the reasoning does not end.
pub fn reasoning_accuracy(completion: &str, solution: &str) -> Option<f64> {
    match completion.rsplit_once("</think>") {
        Some((_, answer)) => accuracy(answer, solution),
        None => accuracy("", solution),
    }
}
