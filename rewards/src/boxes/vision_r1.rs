//! Vision-R1's rewards (Zhan et al. 2025, arXiv:2503.18013; Vision-R1/vision_r1/visionr1_qwen.py of Griffon).
//!
//! Precision, recall and dual format with progressive refinement by step, in single precision as the original computes
//! them. Known holes are kept: wrong labels cost nothing, spare boxes cost precision nothing, an object instead of a
//! list passes the format.

use super::matching::hungarian;
use super::{BoxError, LabeledBox, check_counts, check_length};
use crate::tools::py::{self, Py, strip};
use regex::Regex;
use serde::{Deserialize, Serialize};
use std::sync::LazyLock;

/// From this step on the thresholds are the stricter ones.
const REFINED_FROM: u64 = 1500;

/// Step and sizes; sizes are `[width, height]`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct VisionR1Options {
    /// Training step for the progressive refinement (`--adaptive`); None: no refinement, as the published script runs.
    pub step: Option<u64>,
    /// Size of the picture as the model saw it; None: no scaling.
    pub input_size: Option<[f64; 2]>,
    /// Size of the picture that the gold boxes refer to; None: no scaling.
    pub image_size: Option<[f64; 2]>,
}

/// The three parts, of weight 1 each.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct VisionR1Reward {
    /// Mean refined GIoU of the matched pairs; None where the original raises (boxes, but no gold).
    pub precision: Option<f64>,
    /// Share of gold boxes with a good enough GIoU, refined; None as for precision.
    pub recall: Option<f64>,
    /// 1 for a JSON text whose items have four numbers; turned round when there is no gold.
    pub dual_format: f64,
    /// The sum, None parts left out.
    pub total: f64,
}

/// Scores a completion against labelled gold boxes.
///
/// # Errors
/// [`BoxError::TooLong`], [`BoxError::TooMany`].
pub fn vision_r1(
    completion: &str,
    gold: &[LabeledBox],
    options: &VisionR1Options,
) -> Result<VisionR1Reward, BoxError> {
    check_length(completion)?;
    let dual_format = dual_format(completion, gold.is_empty());
    let preds = extract(strip(completion));
    check_counts(preds.len(), gold.len())?;
    let (precision, recall) = if preds.is_empty() {
        let reward = if gold.is_empty() { 1.0 } else { 0.0 };
        (Some(reward), Some(reward))
    } else if gold.is_empty() {
        (None, None)
    } else {
        match matched_giou(&preds, gold, options)? {
            Some(quality) => (
                Some(f64::from(precision(&quality, options.step))),
                Some(recall(&quality, gold.len(), options.step)),
            ),
            None => (None, None),
        }
    };
    let total = precision.unwrap_or(0.0) + recall.unwrap_or(0.0) + dual_format;
    Ok(VisionR1Reward { precision, recall, dual_format, total })
}

/// 0 below `low`, 1 above `high`, else unchanged.
fn refine(x: f32, low: f32, high: f32) -> f32 {
    if x < low {
        0.0
    } else if x > high {
        1.0
    } else {
        x
    }
}

fn precision(quality: &[f32], step: Option<u64>) -> f32 {
    let (low, high) = match step {
        None => (0.0, 1.0),
        Some(step) if step < REFINED_FROM => (0.5, 0.75),
        Some(_) => (0.75, 0.9),
    };
    quality.iter().map(|&g| refine(g, low, high)).sum::<f32>() / quality.len() as f32
}

fn recall(quality: &[f32], golds: usize, step: Option<u64>) -> f64 {
    let bar = if step.is_none_or(|step| step < REFINED_FROM) { 0.5 } else { 0.75 };
    let found: f32 = quality.iter().map(|&g| refine(g, bar, bar)).sum();
    let recall = found / golds as f32;
    f64::from(match step {
        None => refine(recall, 0.0, 1.0),
        Some(_) => refine(recall, 0.5, 0.75),
    })
}

struct Pred {
    bbox: [f32; 4],
    label: Option<String>,
}

/// GIoU of the pairs of the Hungarian matching on L1 - class - GIoU; None where a cost is NaN.
fn matched_giou(
    preds: &[Pred],
    gold: &[LabeledBox],
    options: &VisionR1Options,
) -> Result<Option<Vec<f32>>, BoxError> {
    let scale = match (options.input_size, options.image_size) {
        (Some(input), Some(image)) => [0, 1].map(|axis| (input[axis] as f32, image[axis] as f32)),
        _ => [(1.0, 1.0); 2],
    };
    let golds: Vec<([f32; 4], String)> =
        gold.iter().map(|item| (item.bbox.map(|x| x as f32), item.label.to_lowercase())).collect();
    let mut quality = Vec::with_capacity(preds.len() * golds.len());
    let mut cost = Vec::with_capacity(preds.len() * golds.len());
    for pred in preds {
        let scaled: [f32; 4] = std::array::from_fn(|i| pred.bbox[i] / scale[i % 2].0 * scale[i % 2].1);
        for (bbox, label) in &golds {
            let distance: f32 = scaled.iter().zip(bbox).map(|(a, b)| (a - b).abs()).sum();
            let class = if pred.label.as_deref() == Some(label) { -1.0 } else { 0.0 };
            let giou = giou(&scaled, bbox);
            quality.push(giou);
            cost.push(f64::from(distance + class - giou));
        }
    }
    if cost.iter().any(|cost| !cost.is_finite()) {
        return Ok(None);
    }
    let pairs = hungarian(&cost, preds.len(), golds.len())?;
    Ok(Some(pairs.into_iter().map(|(p, g)| quality[p * golds.len() + g]).collect()))
}

fn giou(a: &[f32; 4], b: &[f32; 4]) -> f32 {
    let area = |b: &[f32; 4]| (b[2] - b[0]) * (b[3] - b[1]);
    let inter = (a[2].min(b[2]) - a[0].max(b[0])).max(0.0) * (a[3].min(b[3]) - a[1].max(b[1])).max(0.0);
    let union = area(a) + area(b) - inter;
    let hull = (a[2].max(b[2]) - a[0].min(b[0])).max(0.0) * (a[3].max(b[3]) - a[1].min(b[1])).max(0.0);
    inter / union - (hull - union) / hull
}

/// Boxes with x1 < x2 and y1 < y2, from the JSON list or else by pattern.
fn extract(text: &str) -> Vec<Pred> {
    let list = json_list(text).unwrap_or_default();
    let mut preds: Vec<Pred> = list.iter().filter_map(read_item).collect();
    if preds.is_empty() {
        preds = by_pattern(text);
    }
    preds
}

/// Python's line breaks.
fn is_line_break(c: char) -> bool {
    matches!(c, '\n' | '\r' | '\x0b' | '\x0c' | '\x1c'..='\x1e' | '\u{85}' | '\u{2028}' | '\u{2029}')
}

fn json_list(text: &str) -> Option<Vec<Py>> {
    // Behind the fence every line break of Python's becomes a new line.
    let unfenced: Option<String> = text.starts_with("```json").then(|| {
        let rest = text.split_once(is_line_break).map_or("", |(_, rest)| rest);
        rest.chars().map(|c| if is_line_break(c) { '\n' } else { c }).collect()
    });
    let body = unfenced.as_deref().unwrap_or(text);
    let body = body.split("```").next().unwrap_or(body);
    match py::loads(body)? {
        Py::List(items) => Some(items),
        _ => None,
    }
}

fn read_item(item: &Py) -> Option<Pred> {
    let dict = item.as_dict()?;
    let numbers = dict.get("bbox_2d")?.as_list().filter(|numbers| numbers.len() == 4)?;
    let numbers: Vec<f32> = numbers.iter().map(int).collect::<Option<_>>()?;
    let bbox: [f32; 4] = numbers.try_into().ok()?;
    let label = dict.get("label").and_then(Py::as_str).map(|label| strip(label).to_lowercase());
    (bbox[0] < bbox[2] && bbox[1] < bbox[3]).then_some(Pred { bbox, label })
}

/// Python's `int(x)`: floats are cut, texts of digits are read.
fn int(value: &Py) -> Option<f32> {
    match value {
        Py::Float(x) => x.is_finite().then(|| x.trunc() as f32),
        Py::Str(text) => {
            py::integer(strip(text)).and_then(|value| Py::Int(value).as_number()).map(|x| x as f32)
        }
        other => other.as_number().map(|x| x as f32),
    }
}

fn by_pattern(text: &str) -> Vec<Pred> {
    static ITEM: LazyLock<Regex> = LazyLock::new(|| {
        let number = "([0-9]{1,3}|1000)";
        let pattern =
            format!(r#"\{{"bbox_2d": \[{number}, {number}, {number}, {number}\], "label": "([^"]+)"\}}"#);
        Regex::new(&pattern).expect("a constant pattern")
    });
    ITEM.captures_iter(text)
        .filter_map(|found| {
            let bbox = [1, 2, 3, 4].map(|i| found[i].parse::<f32>().unwrap_or(0.0));
            let label = Some(strip(&found[5]).to_lowercase());
            (bbox[0] < bbox[2] && bbox[1] < bbox[3]).then_some(Pred { bbox, label })
        })
        .collect()
}

fn dual_format(text: &str, no_gold: bool) -> f64 {
    let text = text.replace("```json\n", "").replace("\n```", "");
    let valid = match py::loads(strip(&text)) {
        None => false,
        Some(Py::List(items)) => items.iter().all(|item| match item.as_dict() {
            Some(dict) if dict.contains("label") => dict
                .get("bbox_2d")
                .is_none_or(|bbox| bbox.as_list().is_some_and(|numbers| numbers.len() == 4)),
            _ => true,
        }),
        Some(_) => true,
    };
    if valid != no_gold { 1.0 } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gold() -> Vec<LabeledBox> {
        let bbox = [0.0, 0.0, 100.0, 100.0];
        vec![LabeledBox { label: "cat".into(), bbox }]
    }

    fn precision_of(y2: u32, step: Option<u64>) -> f64 {
        let completion = format!("[{{\"bbox_2d\": [0, 0, 100, {y2}], \"label\": \"cat\"}}]");
        vision_r1(&completion, &gold(), &VisionR1Options { step, ..Default::default() })
            .unwrap()
            .precision
            .unwrap()
    }

    #[test]
    fn thresholds_rise_at_step_1500() {
        assert!((precision_of(80, None) - 0.8).abs() < 1e-6);
        assert_eq!(precision_of(80, Some(1499)), 1.0);
        assert!((precision_of(80, Some(1500)) - 0.8).abs() < 1e-6);
        assert_eq!(precision_of(74, Some(1500)), 0.0);
    }

    #[test]
    fn boxes_without_gold_have_no_verdict() {
        let completion = "[{\"bbox_2d\": [1, 1, 9, 9], \"label\": \"cat\"}]";
        let reward = vision_r1(completion, &[], &VisionR1Options::default()).unwrap();
        assert_eq!((reward.precision, reward.recall, reward.dual_format), (None, None, 0.0));
    }
}
