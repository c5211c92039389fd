//! Pairing predictions with gold boxes: greedily, or by the assignment of least cost.

use super::{Bbox, BoxError, check_counts, iou};
use serde::Serialize;

/// A prediction and the gold box it is paired with.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Match {
    /// Index of the prediction.
    pub pred: usize,
    /// Index of the gold box.
    pub gold: usize,
    /// Their IoU.
    pub iou: f64,
}

/// Pairs by falling IoU while it is at least `threshold` and above 0; ties go to the earlier prediction, then gold.
///
/// # Errors
/// [`BoxError::TooMany`].
pub fn match_greedy(preds: &[Bbox], golds: &[Bbox], threshold: f64) -> Result<Vec<Match>, BoxError> {
    check_counts(preds.len(), golds.len())?;
    let mut pairs = all_pairs(preds, golds, threshold);
    pairs.sort_by(|a, b| b.iou.total_cmp(&a.iou));
    let (mut pred_used, mut gold_used) = (vec![false; preds.len()], vec![false; golds.len()]);
    pairs.retain(|pair| {
        let free = !pred_used[pair.pred] && !gold_used[pair.gold];
        if free {
            pred_used[pair.pred] = true;
            gold_used[pair.gold] = true;
        }
        free
    });
    Ok(pairs)
}

/// Pairs so that the sum of IoUs is greatest; pairs below `threshold` (or with IoU 0) are left out before.
///
/// # Errors
/// [`BoxError::TooMany`].
pub fn match_hungarian(preds: &[Bbox], golds: &[Bbox], threshold: f64) -> Result<Vec<Match>, BoxError> {
    check_counts(preds.len(), golds.len())?;
    let mut value = vec![0.0; preds.len() * golds.len()];
    for pair in all_pairs(preds, golds, threshold) {
        value[pair.pred * golds.len() + pair.gold] = pair.iou;
    }
    let cost: Vec<f64> = value.iter().map(|iou| -iou).collect();
    let assigned = hungarian(&cost, preds.len(), golds.len())?;
    Ok(assigned
        .into_iter()
        .map(|(pred, gold)| Match { pred, gold, iou: value[pred * golds.len() + gold] })
        .filter(|pair| pair.iou > 0.0)
        .collect())
}

fn all_pairs(preds: &[Bbox], golds: &[Bbox], threshold: f64) -> Vec<Match> {
    let mut pairs = Vec::new();
    for (pred, a) in preds.iter().enumerate() {
        for (gold, b) in golds.iter().enumerate() {
            let iou = iou(a, b);
            if iou > 0.0 && iou >= threshold {
                pairs.push(Match { pred, gold, iou });
            }
        }
    }
    pairs
}

/// Work beyond which an assignment is refused: small side squared times large side.
const MAX_ASSIGNMENT_WORK: usize = 400_000_000;

/// The assignment of least cost of a row-major `[rows, columns]` matrix: pairs (row, column), rows ascending.
///
/// Shortest augmenting paths (Crouse 2016), ties as in scipy's `linear_sum_assignment`.
///
/// # Errors
/// [`BoxError::TooMany`]; [`BoxError::Option`] for a matrix of another size or a cost that is not finite.
pub fn hungarian(cost: &[f64], rows: usize, columns: usize) -> Result<Vec<(usize, usize)>, BoxError> {
    if cost.len() != rows * columns || cost.iter().any(|c| !c.is_finite()) {
        return Err(BoxError::Option {
            option: "cost",
            expected: "rows * columns finite numbers",
            found: format!("{} numbers", cost.len()),
        });
    }
    let work = rows.min(columns).pow(2) * rows.max(columns);
    if work > MAX_ASSIGNMENT_WORK {
        return Err(BoxError::TooMany { what: "assignment steps", found: work, limit: MAX_ASSIGNMENT_WORK });
    }
    if columns < rows {
        let turned: Vec<f64> = (0..rows * columns).map(|at| cost[at % rows * columns + at / rows]).collect();
        let mut pairs: Vec<_> = assign(&turned, columns, rows).into_iter().map(|(c, r)| (r, c)).collect();
        pairs.sort_unstable();
        return Ok(pairs);
    }
    Ok(assign(cost, rows, columns))
}

fn assign(cost: &[f64], rows: usize, columns: usize) -> Vec<(usize, usize)> {
    let (mut u, mut v) = (vec![0.0; rows], vec![0.0; columns]);
    let (mut column_of, mut row_of) = (vec![usize::MAX; rows], vec![usize::MAX; columns]);
    for row in 0..rows {
        let mut distance = vec![f64::INFINITY; columns];
        let mut parent = vec![usize::MAX; columns];
        let (mut row_seen, mut column_seen) = (vec![false; rows], vec![false; columns]);
        let mut remaining: Vec<usize> = (0..columns).rev().collect();
        let (mut reached, mut current) = (0.0, row);
        let sink = loop {
            row_seen[current] = true;
            let (mut lowest, mut chosen) = (f64::INFINITY, 0);
            for (at, &column) in remaining.iter().enumerate() {
                let through = reached + cost[current * columns + column] - u[current] - v[column];
                if through < distance[column] {
                    distance[column] = through;
                    parent[column] = current;
                }
                let free = row_of[column] == usize::MAX;
                if distance[column] < lowest || (distance[column] == lowest && free) {
                    (lowest, chosen) = (distance[column], at);
                }
            }
            reached = lowest;
            let column = remaining.swap_remove(chosen);
            column_seen[column] = true;
            if row_of[column] == usize::MAX {
                break column;
            }
            current = row_of[column];
        };
        u[row] += reached;
        for other in (0..rows).filter(|&other| row_seen[other] && other != row) {
            u[other] += reached - distance[column_of[other]];
        }
        for column in (0..columns).filter(|&column| column_seen[column]) {
            v[column] -= reached - distance[column];
        }
        let mut column = sink;
        loop {
            let owner = parent[column];
            row_of[column] = owner;
            std::mem::swap(&mut column_of[owner], &mut column);
            if owner == row {
                break;
            }
        }
    }
    column_of.into_iter().enumerate().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_least_cost_is_found_in_any_shape() {
        let cost = [4.0, 1.0, 3.0, 2.0, 0.0, 5.0, 3.0, 2.0, 2.0];
        assert_eq!(hungarian(&cost, 3, 3).unwrap(), [(0, 1), (1, 0), (2, 2)]);
        assert_eq!(hungarian(&[5.0, 1.0, 2.0], 3, 1).unwrap(), [(1, 0)]);
        assert_eq!(hungarian(&[5.0, 1.0, 2.0], 1, 3).unwrap(), [(0, 1)]);
        assert_eq!(hungarian(&[], 0, 3).unwrap(), []);
        assert!(hungarian(&[f64::NAN], 1, 1).is_err());
    }

    #[test]
    fn hungarian_beats_greedy_where_greed_costs() {
        let golds = [[0.0, 0.0, 10.0, 10.0], [4.0, 0.0, 14.0, 10.0]];
        let preds = [[2.0, 0.0, 12.0, 10.0], [0.0, 0.0, 10.0, 9.0]];
        let sum = |pairs: Vec<Match>| pairs.iter().map(|pair| pair.iou).sum::<f64>();
        let best = sum(match_hungarian(&preds, &golds, 0.0).unwrap());
        assert!(best >= sum(match_greedy(&preds, &golds, 0.0).unwrap()));
        assert_eq!(match_greedy(&preds, &golds, 0.99).unwrap(), []);
    }
}
