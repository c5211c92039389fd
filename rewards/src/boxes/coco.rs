//! COCO average precision and recall, as pycocotools computes them.
//!
//! Ten IoU thresholds .50 to .95, 101 recall points, at most 1, 10 or 100 detections an image, areas small (< 32²),
//! medium (< 96²) and large; crowd regions and gold outside the area range are ignored, neither right nor wrong.

use super::overlap::coco_iou;
use super::{BoxError, MAX_BOXES};
use serde::{Deserialize, Deserializer, Serialize};
use std::collections::BTreeMap;

/// A gold object.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct CocoGold {
    /// Image.
    pub image_id: i64,
    /// Class.
    pub category_id: i64,
    /// `[x, y, width, height]`.
    pub bbox: [f64; 4],
    /// Area that decides small, medium, large; width times height where absent.
    #[serde(default)]
    pub area: Option<f64>,
    /// A region of many objects: detections inside are ignored.
    #[serde(default, deserialize_with = "flag")]
    pub iscrowd: bool,
}

/// A detection.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct CocoDetection {
    /// Image.
    pub image_id: i64,
    /// Class.
    pub category_id: i64,
    /// `[x, y, width, height]`.
    pub bbox: [f64; 4],
    /// Confidence; ties keep the order of the list.
    pub score: f64,
}

/// COCO writes 0 and 1; Lua writes true and false.
fn flag<'de, D: Deserializer<'de>>(deserializer: D) -> Result<bool, D::Error> {
    let value = serde_json::Value::deserialize(deserializer)?;
    Ok(value.as_bool().unwrap_or_else(|| value.as_f64().is_some_and(|x| x != 0.0)))
}

/// The twelve numbers; -1 where there is no gold to judge by.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[allow(non_snake_case)]
pub struct CocoStats {
    /// Mean over all thresholds and classes.
    pub AP: f64,
    /// At IoU .50.
    pub AP50: f64,
    /// At IoU .75.
    pub AP75: f64,
    /// Small objects.
    pub AP_small: f64,
    /// Medium objects.
    pub AP_medium: f64,
    /// Large objects.
    pub AP_large: f64,
    /// Recall with one detection an image.
    pub AR_1: f64,
    /// Recall with ten.
    pub AR_10: f64,
    /// Recall with a hundred.
    pub AR_100: f64,
    /// Recall on small objects.
    pub AR_small: f64,
    /// Recall on medium objects.
    pub AR_medium: f64,
    /// Recall on large objects.
    pub AR_large: f64,
}

/// One class.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[allow(non_snake_case)]
pub struct CocoCategory {
    /// Class.
    pub category_id: i64,
    /// Mean over thresholds.
    pub AP: f64,
    /// At IoU .50.
    pub AP50: f64,
}

/// All of it.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[allow(non_snake_case)]
pub struct CocoResult {
    /// The twelve numbers.
    pub stats: CocoStats,
    /// Classes, ids ascending.
    pub per_category: Vec<CocoCategory>,
    /// AP at .50, .55 … .95.
    pub AP_by_iou: [f64; 10],
}

const LIMITS: [usize; 3] = [1, 10, 100];
const THRESHOLDS: usize = 10;
/// Area ranges: all, small, medium, large.
const AREAS: [(f64, f64); 4] = [(0.0, 1e10), (0.0, 1024.0), (1024.0, 9216.0), (9216.0, 1e10)];

fn threshold(t: usize) -> f64 {
    // numpy's linspace(.5, .95, 10), digit for digit.
    if t == THRESHOLDS - 1 { 0.95 } else { t as f64 * ((0.95 - 0.5) / 9.0) + 0.5 }
}

/// Evaluates detections against gold on `categories` (all that either side names where the slice is empty).
///
/// An empty list of detections is legal: precision and recall are 0 where there is gold.
///
/// # Errors
/// [`BoxError::TooMany`] beyond [`MAX_BOXES`] gold boxes or detections; [`BoxError::Option`] for a score that is no number.
pub fn coco_ap(
    golds: &[CocoGold],
    detections: &[CocoDetection],
    categories: &[i64],
) -> Result<CocoResult, BoxError> {
    let most = golds.len().max(detections.len());
    if most > MAX_BOXES {
        return Err(BoxError::TooMany { what: "boxes", found: most, limit: MAX_BOXES });
    }
    if let Some(bad) = detections.iter().find(|detection| detection.score.is_nan()) {
        return Err(BoxError::Option { option: "score", expected: "a number", found: bad.score.to_string() });
    }
    let mut categories = categories.to_vec();
    if categories.is_empty() {
        categories.extend(golds.iter().map(|gold| gold.category_id));
        categories.extend(detections.iter().map(|detection| detection.category_id));
    }
    categories.sort_unstable();
    categories.dedup();
    let cells: Vec<Cells> = categories.iter().map(|&id| Cells::of(id, golds, detections)).collect();

    let ap = |area: usize, limit: usize, at: Option<usize>, cells: &[Cells]| {
        let chosen = cells.iter().map(|cell| &cell.by_area[area][limit].precision);
        mean(chosen.flat_map(|by_threshold| match at {
            Some(t) => by_threshold[t..t + 1].iter(),
            None => by_threshold.iter(),
        }))
    };
    let ar = |area: usize, limit: usize| {
        let recalls: Vec<f64> = cells.iter().flat_map(|cell| cell.by_area[area][limit].recall).collect();
        mean_of(recalls.into_iter())
    };
    let stats = CocoStats {
        AP: ap(0, 2, None, &cells),
        AP50: ap(0, 2, Some(0), &cells),
        AP75: ap(0, 2, Some(5), &cells),
        AP_small: ap(1, 2, None, &cells),
        AP_medium: ap(2, 2, None, &cells),
        AP_large: ap(3, 2, None, &cells),
        AR_1: ar(0, 0),
        AR_10: ar(0, 1),
        AR_100: ar(0, 2),
        AR_small: ar(1, 2),
        AR_medium: ar(2, 2),
        AR_large: ar(3, 2),
    };
    let per_category = categories
        .iter()
        .zip(&cells)
        .map(|(&category_id, cell)| {
            let cell = std::slice::from_ref(cell);
            CocoCategory { category_id, AP: ap(0, 2, None, cell), AP50: ap(0, 2, Some(0), cell) }
        })
        .collect();
    let by_iou = std::array::from_fn(|t| ap(0, 2, Some(t), &cells));
    Ok(CocoResult { stats, per_category, AP_by_iou: by_iou })
}

/// Mean over the 101 precisions of every cell that has gold; -1 if none has.
fn mean<'a>(cells: impl Iterator<Item = &'a Option<Vec<f64>>>) -> f64 {
    mean_of(cells.flatten().flat_map(|points| points.iter().copied()))
}

fn mean_of(values: impl Iterator<Item = f64>) -> f64 {
    let (mut sum, mut count) = (0.0, 0u64);
    for value in values.filter(|value| *value > -1.0) {
        sum += value;
        count += 1;
    }
    if count == 0 { -1.0 } else { sum / count as f64 }
}

/// One class: precision and recall by area range and detection limit.
struct Cells {
    by_area: [[Cell; 3]; 4],
}

struct Cell {
    /// By threshold: precision at the 101 recall points, None without gold.
    precision: [Option<Vec<f64>>; THRESHOLDS],
    /// By threshold; -1 without gold.
    recall: [f64; THRESHOLDS],
}

/// One image of one class: detections by falling score, at most a hundred, and the IoU with each gold box.
struct Image<'a> {
    golds: Vec<&'a CocoGold>,
    detections: Vec<&'a CocoDetection>,
    ious: Vec<f64>,
}

/// What became of a detection at one threshold.
#[derive(Clone, Copy)]
struct Fate {
    score: f64,
    matched: bool,
    ignored: bool,
}

impl Cells {
    fn of(category: i64, golds: &[CocoGold], detections: &[CocoDetection]) -> Cells {
        let mut images: BTreeMap<i64, Image<'_>> = BTreeMap::new();
        let empty = || Image { golds: Vec::new(), detections: Vec::new(), ious: Vec::new() };
        for gold in golds.iter().filter(|gold| gold.category_id == category) {
            images.entry(gold.image_id).or_insert_with(empty).golds.push(gold);
        }
        for detection in detections.iter().filter(|detection| detection.category_id == category) {
            images.entry(detection.image_id).or_insert_with(empty).detections.push(detection);
        }
        for image in images.values_mut() {
            image.detections.sort_by(|a, b| b.score.total_cmp(&a.score));
            image.detections.truncate(LIMITS[2]);
            let pairs = image.detections.iter().flat_map(|d| image.golds.iter().map(move |g| (d, g)));
            image.ious = pairs.map(|(d, g)| coco_iou(&d.bbox, &g.bbox, g.iscrowd)).collect();
        }
        let images: Vec<Image<'_>> = images.into_values().collect();
        let by_area = AREAS.map(|range| {
            let judged: Vec<_> = images.iter().map(|image| image.judge(range)).collect();
            LIMITS.map(|limit| accumulate(&judged, limit))
        });
        Cells { by_area }
    }
}

/// By threshold the fates of an image's detections, and how many gold boxes count.
type Judged = ([Vec<Fate>; THRESHOLDS], usize);

impl Image<'_> {
    fn judge(&self, (low, high): (f64, f64)) -> Judged {
        let outside = |area: f64| area < low || area > high;
        let ignored: Vec<bool> = self
            .golds
            .iter()
            .map(|gold| gold.iscrowd || outside(gold.area.unwrap_or(gold.bbox[2] * gold.bbox[3])))
            .collect();
        // Gold that counts comes first, so that an ignored box is taken only when nothing else fits.
        let mut order: Vec<usize> = (0..self.golds.len()).collect();
        order.sort_by_key(|&g| ignored[g]);
        let fates = std::array::from_fn(|t| {
            let mut taken = vec![false; self.golds.len()];
            let fate = |(d, detection): (usize, &&CocoDetection)| {
                let mut best = f64::min(threshold(t), 1.0 - 1e-10);
                let mut found: Option<usize> = None;
                for &g in &order {
                    if taken[g] && !self.golds[g].iscrowd {
                        continue;
                    }
                    if found.is_some_and(|m| !ignored[m]) && ignored[g] {
                        break;
                    }
                    let iou = self.ious[d * self.golds.len() + g];
                    if iou >= best {
                        best = iou;
                        found = Some(g);
                    }
                }
                if let Some(g) = found {
                    taken[g] = true;
                }
                let alone = found.is_none() && outside(detection.bbox[2] * detection.bbox[3]);
                Fate {
                    score: detection.score,
                    matched: found.is_some(),
                    ignored: found.is_some_and(|g| ignored[g]) || alone,
                }
            };
            self.detections.iter().enumerate().map(fate).collect()
        });
        (fates, ignored.iter().filter(|ignored| !**ignored).count())
    }
}

fn accumulate(images: &[Judged], limit: usize) -> Cell {
    let golds: usize = images.iter().map(|(_, count)| count).sum();
    let mut cell = Cell { precision: Default::default(), recall: [-1.0; THRESHOLDS] };
    if golds == 0 {
        return cell;
    }
    for t in 0..THRESHOLDS {
        let mut fates: Vec<Fate> =
            images.iter().flat_map(|(fates, _)| fates[t].iter().take(limit)).copied().collect();
        fates.sort_by(|a, b| b.score.total_cmp(&a.score));
        let (mut right, mut wrong) = (0.0, 0.0);
        let (mut recalls, mut precisions) =
            (Vec::with_capacity(fates.len()), Vec::with_capacity(fates.len()));
        for fate in &fates {
            right += f64::from(u8::from(fate.matched && !fate.ignored));
            wrong += f64::from(u8::from(!fate.matched && !fate.ignored));
            recalls.push(right / golds as f64);
            precisions.push(right / (wrong + right + f64::EPSILON));
        }
        cell.recall[t] = recalls.last().copied().unwrap_or(0.0);
        for i in (1..precisions.len()).rev() {
            precisions[i - 1] = f64::max(precisions[i - 1], precisions[i]);
        }
        let point = |p: usize| {
            let wanted = if p == 100 { 1.0 } else { p as f64 * 0.01 };
            precisions.get(recalls.partition_point(|recall| *recall < wanted)).copied().unwrap_or(0.0)
        };
        cell.precision[t] = Some((0..=100).map(point).collect());
    }
    cell
}
