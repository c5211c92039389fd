//! Overlap of rotated boxes by clipping one polygon against the other (Sutherland and Hodgman 1974).

use serde::{Deserialize, Serialize};

/// A box turned about its centre.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct RotatedBox {
    /// Centre.
    pub cx: f64,
    /// Centre.
    pub cy: f64,
    /// Width before turning.
    pub w: f64,
    /// Height before turning.
    pub h: f64,
    /// Counter-clockwise with y up; negate it where y points down.
    pub angle_degrees: f64,
}

type Point = (f64, f64);

impl RotatedBox {
    /// The corners, counter-clockwise, relative to `origin`.
    fn corners(&self, origin: Point) -> Vec<Point> {
        let (sin, cos) = self.angle_degrees.to_radians().sin_cos();
        let (w, h) = (self.w / 2.0, self.h / 2.0);
        let turn =
            |(x, y): Point| (self.cx - origin.0 + x * cos - y * sin, self.cy - origin.1 + x * sin + y * cos);
        [(-w, -h), (w, -h), (w, h), (-w, h)].map(turn).to_vec()
    }

    fn is_proper(&self) -> bool {
        let numbers = [self.cx, self.cy, self.w, self.h, self.angle_degrees];
        numbers.iter().all(|x| x.is_finite()) && self.w > 0.0 && self.h > 0.0
    }
}

/// Common area of two rotated boxes; 0 for boxes without area.
pub fn rotated_intersection(a: &RotatedBox, b: &RotatedBox) -> f64 {
    if !a.is_proper() || !b.is_proper() {
        return 0.0;
    }
    // Coordinates relative to one centre keep the digits where boxes are small and far from zero.
    let origin = (b.cx, b.cy);
    let clip = b.corners(origin);
    let mut polygon = a.corners(origin);
    for i in 0..4 {
        polygon = keep_left(&polygon, clip[i], clip[(i + 1) % 4]);
    }
    let shared = area(&polygon).max(0.0);
    if shared.is_finite() { shared } else { 0.0 }
}

/// IoU of two rotated boxes within [0, 1].
pub fn rotated_iou(a: &RotatedBox, b: &RotatedBox) -> f64 {
    let inter = rotated_intersection(a, b);
    if inter == 0.0 {
        return 0.0;
    }
    let value = inter / (a.w * a.h + b.w * b.h - inter);
    if value.is_finite() { value.clamp(0.0, 1.0) } else { 0.0 }
}

/// The part of a convex polygon to the left of the line from `p` to `q`.
fn keep_left(polygon: &[Point], p: Point, q: Point) -> Vec<Point> {
    let side = |r: Point| (q.0 - p.0) * (r.1 - p.1) - (q.1 - p.1) * (r.0 - p.0);
    let mut kept = Vec::with_capacity(polygon.len() + 1);
    for (i, &r) in polygon.iter().enumerate() {
        let next = polygon[(i + 1) % polygon.len()];
        let (here, there) = (side(r), side(next));
        if here >= 0.0 {
            kept.push(r);
        }
        if (here > 0.0 && there < 0.0) || (here < 0.0 && there > 0.0) {
            let t = here / (here - there);
            kept.push((r.0 + t * (next.0 - r.0), r.1 + t * (next.1 - r.1)));
        }
    }
    kept
}

fn area(polygon: &[Point]) -> f64 {
    let twice: f64 = (0..polygon.len())
        .map(|i| {
            let (a, b) = (polygon[i], polygon[(i + 1) % polygon.len()]);
            a.0 * b.1 - b.0 * a.1
        })
        .sum();
    twice / 2.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_square_and_itself_turned_by_45_degrees_share_an_octagon() {
        let square = RotatedBox { cx: 5.0, cy: 5.0, w: 2.0, h: 2.0, angle_degrees: 0.0 };
        let turned = RotatedBox { angle_degrees: 45.0, ..square };
        let octagon = 8.0 * (2f64.sqrt() - 1.0);
        assert!((rotated_intersection(&square, &turned) - octagon).abs() < 1e-12);
        assert!((rotated_iou(&square, &RotatedBox { angle_degrees: 90.0, ..square }) - 1.0).abs() < 1e-12);
        assert_eq!(rotated_iou(&square, &RotatedBox { w: f64::NAN, ..square }), 0.0);
    }
}
