//! VLM-R1's rewards (Shen et al. 2025, arXiv:2504.07615; src/open-r1-multimodal/src/open_r1).
//!
//! Referring expressions (`rec`), detection (`od_ap`, `od_ap50`, `odLength`, `weighted_sum`), cosine length and
//! repetition, hole for hole: all boxes three times still earn `od_ap` 1, wrong labels `weighted_sum` 0.3, and with a
//! gold of "None" any prose earns 1.

use super::answer::{fences, first_answer, last_answer, think_answer};
use super::coco::{CocoDetection, CocoGold, coco_ap};
use super::overlap::vlm_r1_iou;
use super::{Bbox, BoxError, check_counts, check_length, excerpt};
use crate::tools::py::{self, Py, is_space, strip};
use regex::Regex;
use serde::{Deserialize, Serialize};
use std::f64::consts::PI;
use std::sync::LazyLock;

/// Sizes for the referring-expression reward, both `[width, height]`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct VlmR1RecOptions {
    /// Size of the picture as the model saw it (its grid times 14); None: no scaling.
    pub input_size: Option<[f64; 2]>,
    /// Size of the picture that the gold box refers to; None: no scaling.
    pub image_size: Option<[f64; 2]>,
}

/// The two parts of the referring-expression reward.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct VlmR1Rec {
    /// IoU of the first integer box of the first answer.
    pub accuracy: f64,
    /// 1 where `<think>…</think><answer>…{…[x1, y1, x2, y2]…}…</answer>` is found.
    pub format: f64,
    /// The sum.
    pub total: f64,
}

/// Every detection reward of VLM-R1; a run uses one of them plus `format`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct VlmR1Detection {
    /// COCO AP with every score 1.
    pub od_ap: f64,
    /// COCO AP at IoU .50.
    pub od_ap50: f64,
    /// `od_ap` times min(1, #gold/#predicted).
    pub od_length: f64,
    /// 0.7 position + 0.3 completeness; None where the original raises (the first matched box has no label).
    pub weighted_sum: Option<f64>,
    /// Minus the share of repeated boxes (or six-word runs); None where the original raises.
    pub repetition: Option<f64>,
    /// 1 for `<think>…</think><answer>…</answer>` and nothing else.
    pub format: f64,
}

fn flag(value: bool) -> f64 {
    if value { 1.0 } else { 0.0 }
}

/// Referring expressions: `gold` is the solution text, `<answer>[x1, y1, x2, y2]</answer>`.
///
/// # Errors
/// [`BoxError::TooLong`]; [`BoxError::Gold`] where the gold holds no box.
pub fn vlm_r1_rec(completion: &str, gold: &str, options: &VlmR1RecOptions) -> Result<VlmR1Rec, BoxError> {
    // Python's \s knows four control characters more.
    const BOX_PATTERN: &str =
        r"\[([0-9]+),[\s\x1c-\x1f]*([0-9]+),[\s\x1c-\x1f]*([0-9]+),[\s\x1c-\x1f]*([0-9]+)\]";
    static BOX: LazyLock<Regex> = LazyLock::new(|| Regex::new(BOX_PATTERN).expect("a constant pattern"));
    static SHAPE: LazyLock<Regex> = LazyLock::new(|| {
        let head = r"(?s)<think>.*?</think>[\s\x1c-\x1f]*<answer>.*?\{.*";
        Regex::new(&format!(r"{head}{BOX_PATTERN}.*\}}.*?</answer>")).expect("a constant pattern")
    });
    check_length(completion)?;
    let gold_box =
        last_answer(gold).and_then(|answer| py::loads(strip(answer))).and_then(|value| first_four(&value));
    let gold_box = gold_box.ok_or_else(|| BoxError::Gold {
        field: "gold".into(),
        expected: "<answer>[x1, y1, x2, y2]</answer>".into(),
        found: excerpt(gold),
    })?;
    let scale = match (options.input_size, options.image_size) {
        (Some(input), Some(image)) => [(input[0], image[0]), (input[1], image[1])],
        _ => [(1.0, 1.0); 2],
    };
    let found = first_answer(completion, false).and_then(|answer| BOX.captures(strip(answer)));
    let accuracy = found.map_or(0.0, |found| {
        let pred: Bbox = std::array::from_fn(|i| {
            let (input, image) = scale[i % 2];
            found[i + 1].parse().unwrap_or(f64::INFINITY) / input * image
        });
        let iou = vlm_r1_iou(&pred, &gold_box);
        if iou.is_finite() { iou } else { 0.0 }
    });
    let format = flag(SHAPE.is_match(completion));
    Ok(VlmR1Rec { accuracy, format, total: accuracy + format })
}

/// Detection: `gold` is the solution text, `<answer>` around "None" or a ```json list of
/// `{"bbox_2d": [x1, y1, x2, y2], "label": ".."}`.
///
/// # Errors
/// [`BoxError::TooLong`], [`BoxError::TooMany`]; [`BoxError::Gold`] where the gold is neither.
pub fn vlm_r1_detection(completion: &str, gold: &str) -> Result<VlmR1Detection, BoxError> {
    check_length(completion)?;
    check_length(gold)?;
    let (od_ap, od_ap50, od_length) = average_precision(completion, gold)?;
    Ok(VlmR1Detection {
        od_ap,
        od_ap50,
        od_length,
        weighted_sum: weighted_sum(completion, gold)?,
        repetition: repetition(completion),
        format: flag(think_answer(completion)),
    })
}

/// Items that Python's iteration over a JSON value yields.
fn items(value: Py) -> Option<Vec<Py>> {
    match value {
        Py::List(items) | Py::Tuple(items) => Some(items),
        Py::Dict(dict) => Some(dict.iter().map(|(key, _)| Py::Str(key.to_owned())).collect()),
        Py::Str(text) => Some(text.chars().map(|c| Py::Str(c.to_string())).collect()),
        _ => None,
    }
}

fn gold_items(json: Option<&str>) -> Result<Vec<Py>, BoxError> {
    let Some(json) = json.map(strip).filter(|json| !json.is_empty()) else {
        return Ok(Vec::new());
    };
    py::loads(json).and_then(items).ok_or_else(|| BoxError::Gold {
        field: "gold".into(),
        expected: "a JSON list in a ```json fence".into(),
        found: excerpt(json),
    })
}

fn pred_items(json: Option<&str>) -> Vec<Py> {
    json.and_then(|json| py::loads(strip(json))).and_then(items).unwrap_or_default()
}

fn first_four(value: &Py) -> Option<Bbox> {
    let numbers = value.as_list()?.get(..4)?;
    let numbers: Vec<f64> = numbers.iter().map(Py::as_number).collect::<Option<_>>()?;
    numbers.try_into().ok()
}

fn bbox_of(item: &Py) -> Option<Bbox> {
    first_four(item.as_dict()?.get("bbox_2d")?)
}

/// (od_ap, od_ap50, odLength).
fn average_precision(completion: &str, gold: &str) -> Result<(f64, f64, f64), BoxError> {
    let gold = first_answer(gold, false).map(strip);
    let Some(answer) = last_answer(completion).map(strip) else {
        return Ok((0.0, 0.0, 0.0));
    };
    if gold == Some("None") && answer == "None" {
        return Ok((1.0, 1.0, 1.0));
    }
    let golds = gold_items(fences(gold.unwrap_or_default(), "```json").last().copied())?;
    let preds = pred_items(fences(answer, "```json").last().copied());
    check_counts(preds.len(), golds.len())?;
    let (ap, ap50) = match (preds.is_empty(), golds.is_empty()) {
        (true, true) => (1.0, 1.0),
        (false, false) => mean_ap(&preds, &golds)?,
        _ => (0.0, 0.0),
    };
    let share = if golds.len() >= preds.len() { 1.0 } else { golds.len() as f64 / preds.len() as f64 };
    Ok((ap, ap50, ap * share))
}

fn mean_ap(preds: &[Py], golds: &[Py]) -> Result<(f64, f64), BoxError> {
    let xywh = |b: Bbox| [b[0], b[1], b[2] - b[0], b[3] - b[1]];
    let mut labels: Vec<&Py> = Vec::new();
    let mut coco_golds = Vec::new();
    for gold in golds {
        let read = gold.as_dict().and_then(|dict| dict.get("label")).zip(bbox_of(gold));
        let (label, bbox) = read.ok_or_else(|| BoxError::Gold {
            field: "gold".into(),
            expected: "objects with bbox_2d and label".into(),
            found: excerpt(&format!("{gold:?}")),
        })?;
        let category = labels.iter().position(|known| *known == label).unwrap_or_else(|| {
            labels.push(label);
            labels.len() - 1
        });
        let bbox = xywh(bbox);
        coco_golds.push(CocoGold {
            image_id: 0,
            category_id: category as i64,
            bbox,
            area: None,
            iscrowd: false,
        });
    }
    let detections: Vec<CocoDetection> = preds
        .iter()
        .filter_map(|pred| {
            let label = pred.as_dict()?.get("label")?;
            let category = labels.iter().position(|known| *known == label)?;
            Some(CocoDetection {
                image_id: 0,
                category_id: category as i64,
                bbox: xywh(bbox_of(pred)?),
                score: 1.0,
            })
        })
        .collect();
    if detections.is_empty() {
        return Ok((0.0, 0.0));
    }
    let stats = coco_ap(&coco_golds, &detections, &[])?.stats;
    Ok((stats.AP, stats.AP50))
}

/// The last answer, line breaks as spaces, lower case, without a final dot.
fn clean_text(text: &str) -> String {
    let text = last_answer(text).unwrap_or(text);
    let mut clean = text.to_owned();
    for line_break in ['\n', '\r'] {
        let mut out = String::with_capacity(clean.len());
        let mut previous = None;
        for c in clean.chars() {
            if c != line_break {
                out.push(c);
            } else if !previous.is_some_and(is_space) {
                out.push(' ');
            }
            previous = Some(c);
        }
        clean = out;
    }
    strip(&clean).trim_end_matches('.').to_lowercase()
}

fn weighted_sum(completion: &str, gold: &str) -> Result<Option<f64>, BoxError> {
    let (content, gold) = (clean_text(completion), clean_text(gold));
    if gold == "none" {
        return Ok(Some(flag(content == "none")));
    }
    let (content, gold) = (clean_text(&content), clean_text(&gold));
    let preds = pred_items(fences(&content, "```json").first().copied());
    let golds = gold_items(fences(&gold, "```json").first().copied())?;
    if golds.is_empty() {
        return Ok(Some(flag(preds.is_empty())));
    }
    if preds.is_empty() {
        return Ok(Some(0.0));
    }
    check_counts(preds.len(), golds.len())?;
    Ok(detection_score(&preds, &golds))
}

/// Greedy matching by greatest IoU of at least 0.5, then position and completeness; None for its UnboundLocalError.
fn detection_score(preds: &[Py], golds: &[Py]) -> Option<f64> {
    let gold_boxes: Vec<Option<Bbox>> = golds.iter().map(bbox_of).collect();
    let mut pairs = Vec::new();
    for (p, pred) in preds.iter().map(bbox_of).enumerate() {
        for (g, gold) in gold_boxes.iter().enumerate() {
            let iou = pred.zip(*gold).map_or(0.0, |(pred, gold)| vlm_r1_iou(&pred, &gold));
            if iou >= 0.5 {
                pairs.push((iou, p, g));
            }
        }
    }
    pairs.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)).then(a.2.cmp(&b.2)));
    let label = |item: &Py| Some(item.as_dict()?.get("label")?.as_str()?.to_lowercase());
    let (mut pred_used, mut gold_used) = (vec![false; preds.len()], vec![false; golds.len()]);
    let (mut position, mut matched) = (0.0, 0usize);
    // A prediction without a label keeps the label of the one matched before, as in the original.
    let mut pred_label: Option<String> = None;
    for (iou, p, g) in pairs {
        if pred_used[p] || gold_used[g] {
            continue;
        }
        pred_used[p] = true;
        gold_used[g] = true;
        matched += 1;
        pred_label = label(&preds[p]).or(pred_label);
        if pred_label.as_deref()? == label(&golds[g]).unwrap_or_default() {
            position += iou;
        }
    }
    let (preds, golds) = (preds.len() as f64, golds.len() as f64);
    let missed = (golds - matched as f64) / golds;
    let spare = (preds - matched as f64) / preds;
    let completeness = 1.0 - (missed + spare) / 2.0;
    Some((0.7 * (position / golds) + 0.3 * completeness) / (0.7 + 0.0 + 0.3))
}

/// Cosine length reward over 1024 tokens: right answers 1 to 0.5, wrong ones 0 to -0.5.
///
/// VLM-R1 itself calls it with `correct` always true.
pub fn vlm_r1_cosine(tokens: usize, correct: bool) -> f64 {
    let (min, max) = if correct { (0.5, 1.0) } else { (0.0, -0.5) };
    max - (max - min) * (1.0 - (tokens as f64 * PI / 1024.0).cos()) / 2.0
}

/// Repetition reward: minus the share of repeated boxes, or of repeated six-word runs where there is no box list.
///
/// None where the original raises (a list of things that are no objects).
///
/// # Errors
/// [`BoxError::TooLong`].
pub fn vlm_r1_repetition(completion: &str) -> Result<Option<f64>, BoxError> {
    check_length(completion)?;
    Ok(repetition(completion))
}

fn repetition(text: &str) -> Option<f64> {
    static LIST: LazyLock<Regex> = LazyLock::new(|| {
        Regex::new(r#"(?s)\[[\s\x1c-\x1f]*\{.*?"bbox_2d".*?"label".*?\}[\s\x1c-\x1f]*\]"#)
            .expect("a constant pattern")
    });
    if text.is_empty() {
        return Some(0.0);
    }
    let fenced = match fences(text, "```json").first() {
        Some(body) => Some(strip(body)),
        None => fences(text, "```")
            .first()
            .map(|body| strip(body))
            .filter(|body| !body.is_empty())
            .or_else(|| LIST.find(text).map(|found| found.as_str())),
    };
    let list =
        fenced.filter(|json| !json.is_empty()).and_then(|json| py::loads(json).or_else(|| repair(json)));
    if let Some(list) = list.as_ref().and_then(Py::as_list).filter(|list| !list.is_empty()) {
        return repeated_boxes(list);
    }
    let lower = text.to_lowercase();
    let words: Vec<&str> = lower.split(is_space).filter(|word| !word.is_empty()).collect();
    if words.len() < 6 {
        return Some(0.0);
    }
    let total = words.len() - 5;
    let unique: std::collections::HashSet<&[&str]> = words.windows(6).collect();
    Some(-(1.0 - unique.len() as f64 / total as f64))
}

fn repeated_boxes(list: &[Py]) -> Option<f64> {
    let mut seen = std::collections::HashSet::new();
    let mut total = 0usize;
    for item in list {
        match item {
            Py::Dict(dict) => {
                if let Some((bbox, label)) = dict.get("bbox_2d").zip(dict.get("label")) {
                    seen.insert(format!("{bbox:?}_{label:?}"));
                    total += 1;
                }
            }
            // `'bbox_2d' in item` is legal for texts and lists, and taking the item then fails.
            Py::Str(text) if text.contains("bbox_2d") && text.contains("label") => return None,
            Py::Str(_) | Py::List(_) | Py::Tuple(_) => {}
            _ => return None,
        }
    }
    if total == 0 { Some(0.0) } else { Some(-(1.0 - seen.len() as f64 / total as f64)) }
}

/// Closes what a cut JSON text leaves open: the string, then the brackets; a dangling comma or key is dropped.
///
/// The original uses the package `json_repair`, which also guesses at damage in the middle of a text; such a text is
/// judged as words here.
fn repair(text: &str) -> Option<Py> {
    let (mut in_string, mut escaped) = (false, false);
    let mut open = Vec::new();
    for c in text.chars() {
        match c {
            _ if escaped => escaped = false,
            '\\' if in_string => escaped = true,
            '"' => in_string = !in_string,
            _ if in_string => {}
            '[' => open.push(']'),
            '{' => open.push('}'),
            ']' | '}' => {
                open.pop();
            }
            _ => {}
        }
    }
    let closers: String = open.iter().rev().collect();
    let mut whole = text.to_owned();
    if escaped {
        whole.pop();
    }
    if in_string {
        whole.push('"');
    }
    let trimmed = whole.trim_end_matches(|c| is_space(c) || c == ',');
    [format!("{trimmed}{closers}"), format!("{trimmed}null{closers}"), format!("{trimmed}:null{closers}")]
        .iter()
        .find_map(|candidate| py::loads(candidate))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cosine_runs_from_one_to_a_half() {
        assert_eq!(vlm_r1_cosine(0, true), 1.0);
        assert!((vlm_r1_cosine(1024, true) - 0.5).abs() < 1e-12);
        assert_eq!(vlm_r1_cosine(0, false), -0.5);
    }

    #[test]
    fn a_cut_list_is_closed() {
        let list = repair(r#"[{"bbox_2d": [1, 2, 3, 4], "label": "ca"#).unwrap();
        assert_eq!(list.as_list().unwrap().len(), 1);
        assert!(repair(r#"[{"bbox_2d": [1, 2, 3, 4], "#).is_some());
        assert!(repair("[}").is_none());
    }
}
