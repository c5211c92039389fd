//! Visual-RFT's rewards (Liu et al. 2025, arXiv:2503.01785; src/virft/src/open_r1/{grpo,grpo_lisa}.py).
//!
//! The formulas of the code, without its first step, which compares one number of the two texts by math-verify and
//! answers 1 if it agrees. Known holes are kept: a far box with confidence 0 earns confidence 1, several boxes in a
//! grounding answer are read in the wrong order, corners in the wrong order earn full marks.

use super::answer::{first_answer, think_answer};
use super::overlap::{lisa_giou, visual_rft_iou};
use super::{Bbox, BoxError, check_counts, check_length};
use crate::tools::py::{self, Dict, Py, strip};
use regex::Regex;
use serde::Serialize;
use std::sync::LazyLock;

/// The three parts of the detection reward, of weight 1 each.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct VisualRftReward {
    /// Sum of the IoUs above 0.5 over max(#gold, #predicted).
    pub iou: f64,
    /// Mean of c for matched and 1 - c for other boxes, within [0, 1].
    pub confidence: f64,
    /// 1 for `<think>…</think><answer>…</answer>` and nothing else.
    pub format: f64,
    /// The sum.
    pub total: f64,
}

/// The two parts of the grounding reward.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct VisualRftGrounding {
    /// GIoU + 1, within [0, 2].
    pub accuracy: f64,
    /// 1 for `<think>…</think><answer>…</answer>` and nothing else.
    pub format: f64,
    /// The sum.
    pub total: f64,
}

fn flag(value: bool) -> f64 {
    if value { 1.0 } else { 0.0 }
}

/// Detection: `gold` is the solution text, `<answer>[{'Position': [x1, y1, x2, y2], 'Confidence': 1.0}, …]</answer>`.
///
/// Whatever the original meets with an exception (no list, wrong keys, three numbers) scores 0.
///
/// # Errors
/// [`BoxError::TooLong`], [`BoxError::TooMany`].
pub fn visual_rft_detection(completion: &str, gold: &str) -> Result<VisualRftReward, BoxError> {
    check_length(completion)?;
    check_length(gold)?;
    let matched = match_boxes(completion, gold)?;
    let (iou, confidence) = matched.map_or((0.0, 0.0), |(pairs, golds)| {
        let iou: f64 = pairs.iter().map(|(iou, _)| iou).sum();
        let right = |(iou, c): &(f64, f64)| if *iou == 0.0 { (1.0 - iou) * (1.0 - c) } else { *c };
        let confidence = pairs.iter().map(right).sum::<f64>() / pairs.len() as f64;
        ((iou / pairs.len().max(golds) as f64).min(1.0), confidence.clamp(0.0, 1.0))
    });
    let clean = |x: f64| if x.is_nan() { 0.0 } else { x };
    let (iou, confidence) = (clean(iou), clean(confidence));
    let format = flag(think_answer(completion));
    Ok(VisualRftReward { iou, confidence, format, total: iou + confidence + format })
}

type Pairs = (Vec<(f64, f64)>, usize);

/// (IoU or 0, confidence) of each prediction and the number of gold boxes; None where the original raises.
fn match_boxes(completion: &str, gold: &str) -> Result<Option<Pairs>, BoxError> {
    let answer = first_answer(completion, true).unwrap_or(completion);
    let answer = format!("<answer>{}</answer>", strip(answer));
    let answer = answer.replace("[[", "[").replace("]]", "]").replace('\n', "");
    let (Some(preds), Some(golds)) = (box_list(&answer), box_list(strip(gold))) else {
        return Ok(None);
    };
    let (Some(preds), Some(golds)) = (preds.as_list(), golds.as_list()) else {
        return Ok(None);
    };
    if !matches!(preds.first(), Some(Py::Dict(_))) {
        return Ok(None);
    }
    check_counts(preds.len(), golds.len())?;
    Ok(pair(preds, golds))
}

fn pair(preds: &[Py], golds: &[Py]) -> Option<Pairs> {
    let mut unique: Vec<(&Py, f64)> = Vec::new();
    let mut seen = std::collections::HashSet::new();
    for pred in preds {
        let dict = pred.as_dict()?;
        let position = dict.get("Position")?;
        let numbers = match position {
            Py::List(numbers) if !numbers.iter().any(Py::unhashable) => numbers,
            // tuple("abcd") and tuple({…}) are legal and fail later, unless nothing looks at them.
            Py::Str(_) | Py::Dict(_) => &Vec::new(),
            _ => return None,
        };
        let key: Vec<String> = match position {
            Py::List(_) => numbers.iter().map(number_key).collect(),
            other => vec![format!("{other:?}")],
        };
        if seen.insert(key) {
            unique.push((position, confidence(dict)?));
        }
    }
    unique.sort_by(|a, b| b.1.partial_cmp(&a.1).unwrap_or(std::cmp::Ordering::Equal));
    let mut used = vec![false; golds.len()];
    let mut pairs = Vec::with_capacity(unique.len());
    for (position, confidence) in unique {
        let (mut best, mut found) = (0.0, None);
        for (i, gold) in golds.iter().enumerate().filter(|(i, _)| !used[*i]) {
            let gold = four_numbers(gold.as_dict()?.get("Position")?)?;
            let iou = visual_rft_iou(&gold, &four_numbers(position)?);
            if iou.is_nan() {
                return None;
            }
            if iou > best {
                (best, found) = (iou, Some(i));
            }
        }
        match found.filter(|_| best > 0.5) {
            Some(i) => {
                used[i] = true;
                pairs.push((best, confidence));
            }
            None => pairs.push((0.0, confidence)),
        }
    }
    Some((pairs, golds.len()))
}

fn number_key(number: &Py) -> String {
    number.as_number().map_or_else(|| format!("{number:?}"), |x| format!("{:?}", x + 0.0))
}

fn confidence(dict: &Dict) -> Option<f64> {
    dict.get("Confidence")?.as_number()
}

fn four_numbers(position: &Py) -> Option<Bbox> {
    let numbers: Vec<f64> = position.as_list()?.iter().map(Py::as_number).collect::<Option<_>>()?;
    numbers.try_into().ok()
}

/// The list between the answer tags, single quotes read as double, a cut list closed behind its last whole item.
fn box_list(text: &str) -> Option<Py> {
    let start = text.find("<answer>")? + "<answer>".len();
    let end = text.find("</answer>").unwrap_or(text.len());
    let mut content = text.get(start..end).unwrap_or_default().to_owned();
    if !content.ends_with(']') {
        let whole = content.rsplit_once("},").map_or(content.as_str(), |(whole, _)| whole);
        content = format!("{whole}}}]");
    }
    py::loads(&content.replace('\'', "\""))
}

/// Grounding (LISA): `gold` is the solution text, `<answer>(x1,y1),(x2,y2)</answer>` in thousandths.
///
/// # Errors
/// [`BoxError::TooLong`].
pub fn visual_rft_grounding(completion: &str, gold: &str) -> Result<VisualRftGrounding, BoxError> {
    check_length(completion)?;
    check_length(gold)?;
    let gold = strip(first_answer(gold, true).unwrap_or(gold));
    let answer = strip(first_answer(completion, false).unwrap_or(completion));
    let accuracy = if answer == gold {
        2.0
    } else {
        match (corners(gold), corners(answer)) {
            (Some(gold), Some(pred)) => lisa_giou(&gold, &pred),
            _ => 0.0,
        }
    };
    let format = flag(think_answer(completion));
    Ok(VisualRftGrounding { accuracy, format, total: accuracy + format })
}

/// The first two of: all first corners, then all second corners. With several boxes that is no box of them.
fn corners(text: &str) -> Option<Bbox> {
    static PAIR: LazyLock<Regex> = LazyLock::new(|| {
        // Python's \s knows four control characters more.
        let s = r"[\s\x1c-\x1f]*";
        let point = format!(r"\({s}([0-9]+){s},{s}([0-9]+){s}\)");
        Regex::new(&format!("{point}{s},{s}{point}")).expect("a constant pattern")
    });
    let boxes: Vec<[f64; 4]> = PAIR
        .captures_iter(text)
        .take(2)
        .map(|found| [1, 2, 3, 4].map(|i| found[i].parse::<f64>().unwrap_or(f64::INFINITY) / 1000.0))
        .collect();
    let corners = match boxes.as_slice() {
        [] => return None,
        [one] => *one,
        [one, two, ..] => [one[0], one[1], two[0], two[1]],
    };
    corners.iter().all(|x| x.is_finite()).then_some(corners)
}
