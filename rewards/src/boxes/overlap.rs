//! Intersection over union and its relatives, in every convention the field uses.
//!
//! [`iou`] and [`giou`] are safe: an improper box overlaps nothing. [`overlap`] follows a peer exactly, degenerate boxes
//! included, and says None where the peer yields NaN or raises.

use super::{Bbox, is_proper};
use serde::{Deserialize, Serialize};
use std::f64::consts::PI;

/// Which convention.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Measure {
    /// torchvision `box_iou`: I/U on continuous coordinates.
    Iou,
    /// torchvision `generalized_box_iou`: IoU - (C - U)/C (Rezatofighi et al. 2019).
    Giou,
    /// torchvision `distance_box_iou`: IoU - d²/(c² + 1e-7) (Zheng et al. 2020).
    Diou,
    /// torchvision `complete_box_iou`: DIoU - αv (Zheng et al. 2020).
    Ciou,
    /// pycocotools, boxes turned into x, y, width, height; 0 where torchvision has NaN.
    Coco,
    /// pycocotools against a crowd region: I/area(pred).
    CocoCrowd,
    /// Visual-RFT's detection reward: areas of any sign once the corners overlap.
    VisualRft,
    /// VLM-R1: the intersection ends at x2-1, y2-1 and is one larger; a one-pixel overlap counts nothing.
    VlmR1,
    /// Visual-RFT's grounding reward: GIoU + 1 with areas of both signs.
    LisaGiouPlusOne,
}

fn area(b: &Bbox) -> f64 {
    (b[2] - b[0]) * (b[3] - b[1])
}

/// Width and height of the common part; negative where apart.
fn common(a: &Bbox, b: &Bbox) -> (f64, f64) {
    (a[2].min(b[2]) - a[0].max(b[0]), a[3].min(b[3]) - a[1].max(b[1]))
}

/// Width and height of the smallest box around both.
fn hull(a: &Bbox, b: &Bbox) -> (f64, f64) {
    (a[2].max(b[2]) - a[0].min(b[0]), a[3].max(b[3]) - a[1].min(b[1]))
}

/// IoU within [0, 1]; 0 for improper boxes (see [`is_proper`]).
pub fn iou(a: &Bbox, b: &Bbox) -> f64 {
    if !is_proper(a) || !is_proper(b) {
        return 0.0;
    }
    let value = torch_iou(a, b).0;
    if value.is_finite() { value.clamp(0.0, 1.0) } else { 0.0 }
}

/// GIoU within [-1, 1]; -1 for improper boxes.
pub fn giou(a: &Bbox, b: &Bbox) -> f64 {
    if !is_proper(a) || !is_proper(b) {
        return -1.0;
    }
    let value = torch_giou(a, b);
    if value.is_finite() { value.clamp(-1.0, 1.0) } else { -1.0 }
}

/// The overlap of a prediction and a gold box as a peer computes it; None where it yields NaN or raises.
pub fn overlap(pred: &Bbox, gold: &Bbox, measure: Measure) -> Option<f64> {
    let value = match measure {
        Measure::Iou => torch_iou(pred, gold).0,
        Measure::Giou => torch_giou(pred, gold),
        Measure::Diou => torch_diou(pred, gold),
        Measure::Ciou => torch_ciou(pred, gold),
        Measure::Coco => coco_iou(&xywh(pred), &xywh(gold), false),
        Measure::CocoCrowd => coco_iou(&xywh(pred), &xywh(gold), true),
        Measure::VisualRft => visual_rft_iou(gold, pred),
        Measure::VlmR1 => vlm_r1_iou(pred, gold),
        Measure::LisaGiouPlusOne => lisa_giou(gold, pred),
    };
    value.is_finite().then_some(value)
}

/// `[x, y, width, height]`.
pub(super) fn xywh(b: &Bbox) -> [f64; 4] {
    [b[0], b[1], b[2] - b[0], b[3] - b[1]]
}

fn torch_iou(a: &Bbox, b: &Bbox) -> (f64, f64) {
    let (w, h) = common(a, b);
    let inter = w.max(0.0) * h.max(0.0);
    let union = area(a) + area(b) - inter;
    (inter / union, union)
}

fn torch_giou(a: &Bbox, b: &Bbox) -> f64 {
    let (iou, union) = torch_iou(a, b);
    let (w, h) = hull(a, b);
    let around = w.max(0.0) * h.max(0.0);
    iou - (around - union) / around
}

const EPSILON: f64 = 1e-7;

fn torch_diou(a: &Bbox, b: &Bbox) -> f64 {
    let (w, h) = hull(a, b);
    let diagonal = w.max(0.0).powi(2) + h.max(0.0).powi(2) + EPSILON;
    let dx = (a[0] + a[2]) / 2.0 - (b[0] + b[2]) / 2.0;
    let dy = (a[1] + a[3]) / 2.0 - (b[1] + b[3]) / 2.0;
    torch_iou(a, b).0 - (dx * dx + dy * dy) / diagonal
}

fn torch_ciou(a: &Bbox, b: &Bbox) -> f64 {
    let aspect = |b: &Bbox| ((b[2] - b[0]) / (b[3] - b[1])).atan();
    let v = 4.0 / (PI * PI) * (aspect(a) - aspect(b)).powi(2);
    let alpha = v / (1.0 - torch_iou(a, b).0 + v + EPSILON);
    torch_diou(a, b) - alpha * v
}

/// pycocotools' IoU of `[x, y, width, height]` boxes; 0 where they do not overlap, whatever their areas.
pub(super) fn coco_iou(pred: &[f64; 4], gold: &[f64; 4], crowd: bool) -> f64 {
    let w = f64::min(pred[2] + pred[0], gold[2] + gold[0]) - f64::max(pred[0], gold[0]);
    let h = f64::min(pred[3] + pred[1], gold[3] + gold[1]) - f64::max(pred[1], gold[1]);
    if w <= 0.0 || h <= 0.0 {
        return 0.0;
    }
    let inter = w * h;
    let pred_area = pred[2] * pred[3];
    inter / if crowd { pred_area } else { pred_area + gold[2] * gold[3] - inter }
}

/// Visual-RFT `calculate_iou`; NaN where it divides by zero.
pub(super) fn visual_rft_iou(a: &Bbox, b: &Bbox) -> f64 {
    let (w, h) = common(a, b);
    if w <= 0.0 || h <= 0.0 {
        return 0.0;
    }
    let inter = w * h;
    inter / (area(a) + area(b) - inter)
}

/// VLM-R1 `iou`; NaN where it divides by zero.
pub(super) fn vlm_r1_iou(a: &Bbox, b: &Bbox) -> f64 {
    let (x1, y1) = (a[0].max(b[0]), a[1].max(b[1]));
    let (x2, y2) = ((a[2] - 1.0).min(b[2] - 1.0), (a[3] - 1.0).min(b[3] - 1.0));
    let inter = if x1 < x2 && y1 < y2 { (x2 - x1 + 1.0) * (y2 - y1 + 1.0) } else { 0.0 };
    let union = area(a) + area(b) - inter;
    if union == 0.0 { f64::NAN } else { inter / union }
}

/// Visual-RFT `compute_giou`: GIoU + 1, areas of both signs.
pub(super) fn lisa_giou(gold: &Bbox, pred: &Bbox) -> f64 {
    let (w, h) = common(gold, pred);
    let inter = w.max(0.0) * h.max(0.0);
    let union = area(gold) + area(pred) - inter;
    let iou = if union > 0.0 { inter / union } else { 0.0 };
    let (w, h) = hull(gold, pred);
    let around = w * h;
    1.0 + if around > 0.0 { iou - (around - union) / around } else { iou }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOLD: Bbox = [10.0, 10.0, 20.0, 20.0];

    #[test]
    fn inverted_boxes_overlap_nothing_by_default() {
        let inverted = [20.0, 20.0, 10.0, 10.0];
        assert_eq!(iou(&inverted, &GOLD), 0.0);
        assert_eq!(giou(&inverted, &GOLD), -1.0);
        // The hole: torchvision and Visual-RFT give full marks to the gold's corners in the wrong order.
        assert_eq!(overlap(&inverted, &GOLD, Measure::Giou), Some(1.0));
        assert_eq!(overlap(&inverted, &GOLD, Measure::LisaGiouPlusOne), Some(2.0));
    }

    #[test]
    fn a_one_pixel_overlap_counts() {
        let (a, b) = ([0.0, 0.0, 2.0, 2.0], [1.0, 1.0, 3.0, 3.0]);
        assert!((iou(&a, &b) - 1.0 / 7.0).abs() < 1e-12);
        assert_eq!(overlap(&a, &b, Measure::VlmR1), Some(0.0));
        assert_eq!(iou(&[0.0, 0.0, 1.0, 1.0], &[0.0, 0.0, 1.0, 1.0]), 1.0);
    }
}
