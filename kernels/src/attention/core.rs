//! One (row, head) after another, or several at a time, against tiles of 16 keys.

use super::AttnShape;
use crate::math::{exp, tanh};
use crate::simd::{LANES, Simd, simd_fn};

/// Up to 16 consecutive positions of one key/value head.
#[derive(Clone, Copy)]
pub(super) struct KeyTile<'a> {
    /// Position of the first key.
    pub(super) start: usize,
    /// Keys in the tile.
    pub(super) len: usize,
    /// [head_dim][16], transposed.
    pub(super) k: &'a [f32],
    /// Values, `v_stride` apart.
    pub(super) v: &'a [f32],
    pub(super) v_stride: usize,
}

/// One query: what it sees and where its output goes.
pub(super) struct Query<'a> {
    pub(super) q: &'a [f32],
    pub(super) out: &'a mut [f32],
    /// Positions seen.
    pub(super) from: usize,
    pub(super) to: usize,
}

/// Queries worked on together: as many independent chains as hide the latency of a multiply-add.
pub(super) const TOGETHER: usize = 4;

/// Scratch of one thread.
#[derive(Default)]
pub(super) struct Scratch {
    pub(super) scores: Vec<f32>,
}

/// Softmax attention of every query over the tiles, which are in ascending order and reach from the first position seen to the last.
pub(super) fn attend(shape: &AttnShape, tiles: &[KeyTile], queries: &mut [Query], scratch: &mut Scratch) {
    for group in queries.chunks_mut(TOGETHER) {
        let end = group.iter().map(|query| query.to).max().unwrap_or(0);
        let row = end.next_multiple_of(LANES) + LANES;
        if scratch.scores.len() < row * TOGETHER {
            scratch.scores.resize(row * TOGETHER, 0.0);
        }
        let start = group.iter().map(|query| query.from).min().unwrap_or(0);
        let first = tiles.partition_point(|tile| tile.start + tile.len <= start);
        let last = tiles.partition_point(|tile| tile.start < end);
        attend_group(shape, &tiles[first..last], group, &mut scratch.scores, row);
    }
}

simd_fn! {
    fn attend_group<S>(shape: &AttnShape, tiles: &[KeyTile], group: &mut [Query], scores: &mut [f32], row: usize) {
        score_group::<S>(shape.head_dim, tiles, group, scores, row);
        for (query, scores) in group.iter_mut().zip(scores.chunks_exact_mut(row)) {
            cap_scores::<S>(shape, query.from, query.to, scores);
            let sum = softmax::<S>(query.from, query.to, scores);
            query.out.fill(0.0);
            weigh::<S>(tiles, query, scores, query.from, query.to);
            let share = S::splat(1.0 / sum);
            for i in (0..query.out.len()).step_by(LANES) {
                let out = S::mul(S::load(&query.out[i..]), share);
                S::store(out, &mut query.out[i..]);
            }
        }
    }
}

/// scores[query][position] = q·k.
#[inline(always)]
pub(super) fn score_group<S: Simd>(
    d: usize,
    tiles: &[KeyTile],
    group: &[Query],
    scores: &mut [f32],
    row: usize,
) {
    for tile in tiles {
        assert!(tile.k.len() >= d * LANES);
        for (query, scores) in group.iter().zip(scores.chunks_exact_mut(row)) {
            S::store(dot::<S>(&query.q[..d], tile.k), &mut scores[tile.start..]);
        }
    }
}

/// 16 dot products of `q` with the columns of `k`[d][16], each one chain over d.
#[inline(always)]
pub(super) fn dot<S: Simd>(q: &[f32], k: &[f32]) -> S::V {
    let mut sum = S::splat(0.0);
    for (q, k) in q.iter().zip(k.chunks_exact(LANES)) {
        sum = S::fma(S::splat(*q), S::load(k), sum);
    }
    sum
}

/// Scales scores from..to, caps them, and writes −inf around them up to the lanes' edges.
#[inline(always)]
pub(super) fn cap_scores<S: Simd>(shape: &AttnShape, from: usize, to: usize, scores: &mut [f32]) {
    let first = from / LANES * LANES;
    let last = to.next_multiple_of(LANES);
    let scale = S::splat(shape.scale);
    for i in (first..last).step_by(LANES) {
        let mut s = S::mul(S::load(&scores[i..]), scale);
        if let Some(cap) = shape.softcap {
            s = S::mul(S::splat(cap), tanh::<S>(S::div(s, S::splat(cap))));
        }
        S::store(s, &mut scores[i..]);
    }
    scores[first..from].fill(f32::NEG_INFINITY);
    scores[to..last].fill(f32::NEG_INFINITY);
}

/// scores = exp(scores − their maximum) over the lanes that hold from..to; returns their sum.
#[inline(always)]
pub(super) fn softmax<S: Simd>(from: usize, to: usize, scores: &mut [f32]) -> f32 {
    let first = from / LANES * LANES;
    let last = to.next_multiple_of(LANES);
    let mut largest = S::splat(f32::NEG_INFINITY);
    for i in (first..last).step_by(LANES) {
        largest = S::max(S::load(&scores[i..]), largest);
    }
    let largest = S::splat(S::largest(largest));
    let mut sum = S::splat(0.0);
    for i in (first..last).step_by(LANES) {
        let e = exp::<S>(S::sub(S::load(&scores[i..]), largest));
        sum = S::add(sum, e);
        S::store(e, &mut scores[i..]);
    }
    S::sum(sum)
}

/// out += Σ weights[j]·v[j] over positions from..to ascending.
#[inline(always)]
fn weigh<S: Simd>(tiles: &[KeyTile], query: &mut Query, weights: &[f32], from: usize, to: usize) {
    for i in (0..query.out.len()).step_by(LANES) {
        let width = LANES.min(query.out.len() - i);
        let mut sum = S::load(&query.out[i..]);
        for tile in tiles {
            let first = from.max(tile.start);
            let last = to.min(tile.start + tile.len);
            for j in first..last {
                let v = S::load(&tile.v[(j - tile.start) * tile.v_stride + i..][..width]);
                sum = S::fma(S::splat(weights[j]), v, sum);
            }
        }
        S::store(sum, &mut query.out[i..]);
    }
}
