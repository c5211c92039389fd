//! Gradient of [`super::segment_attention`].
//!
//! Softmax is computed again by the forward rule. With p the probabilities and D = dout·out: dv_j += p_j·dout,
//! ds_j = scale·p_j·(dout·v_j − D) (times the cap's slope), dq = Σ ds_j·k_j, dk_j += ds_j·q. Keys and values collect their sums
//! in the order of segments, rows and heads: one work item owns a key/value head of all segments that share rows.

use std::cmp::Reverse;

use super::AttnShape;
use super::core::{
    KeyTile, Query, TOGETHER, by_count, cap_scores, score_group, scores_len, softmax, together, weigh_group,
};
use super::segments::{Segment, Span, Transposed};
use crate::pool::Pool;
use crate::shared::{Block, Shared};
use crate::simd::{LANES, Simd, simd_fn};
use crate::zeros::clear;

/// dqkv = gradient for the fused rows, given the forward's `out` and `dout`, both [rows, heads·d]. All of dqkv is overwritten; rows
/// of no segment get zero.
pub fn segment_attention_backward(
    pool: &Pool,
    shape: &AttnShape,
    qkv: &[f32],
    segs: &[Segment],
    out: &[f32],
    dout: &[f32],
    dqkv: &mut [f32],
) {
    shape.check();
    assert_eq!(dqkv.len(), qkv.len(), "dqkv is like qkv");
    assert_eq!(out.len(), dout.len(), "dout is like out");
    clear(pool, dqkv);
    let keys = Transposed::new(pool, shape, qkv, segs, shape.k_at(0));
    let values = Transposed::new(pool, shape, qkv, segs, shape.v_at(0));
    let mut groups = connected(segs);
    // Long work first, so that no thread is left with it at the end.
    groups.sort_by_key(|group| {
        Reverse(
            group.iter().map(|&s| segs[s].rows.len * (segs[s].rows.len + segs[s].first_pos())).sum::<usize>(),
        )
    });
    let dqkv = Shared::new(dqkv);
    pool.run(groups.len() * shape.kv_heads, |item| {
        let (group, kv_head) = (&groups[item / shape.kv_heads], item % shape.kv_heads);
        let work = Work { shape, qkv, keys: &keys, values: &values, out, dout, dqkv, kv_head };
        let mut scratch = Scratch::default();
        for &s in group {
            work.segment(&segs[s], &mut scratch);
        }
    });
}

/// Segments that share rows (a common prefix, or one is the other's prefix), each group in segment order.
fn connected(segs: &[Segment]) -> Vec<Vec<usize>> {
    let mut spans: Vec<(Span, usize)> = segs
        .iter()
        .enumerate()
        .flat_map(|(s, seg)| seg.prefix.into_iter().chain([seg.rows]).map(move |span| (span, s)))
        .filter(|(span, _)| span.len > 0)
        .collect();
    spans.sort_by_key(|(span, s)| (span.row, *s));
    let mut leader: Vec<usize> = (0..segs.len()).collect();
    let (mut end, mut last) = (0, None);
    for (span, s) in spans {
        if let Some(last) = last.filter(|_| span.row < end) {
            let (a, b) = (find(&mut leader, last), find(&mut leader, s));
            leader[a.max(b)] = a.min(b);
        }
        end = end.max(span.row + span.len);
        last = Some(s);
    }
    let mut groups: Vec<Vec<usize>> = vec![Vec::new(); segs.len()];
    for s in 0..segs.len() {
        let first = find(&mut leader, s);
        groups[first].push(s);
    }
    groups.retain(|group| !group.is_empty());
    groups
}

/// The first segment of the set that `s` belongs to.
fn find(leader: &mut [usize], mut s: usize) -> usize {
    while leader[s] != s {
        leader[s] = leader[leader[s]];
        s = leader[s];
    }
    s
}

/// Rows of scores of the queries that are worked on together.
#[derive(Default)]
struct Scratch {
    scores: Vec<f32>,
    /// Probabilities.
    weights: Vec<f32>,
    /// dout·v, then the gradient of the scores.
    slopes: Vec<f32>,
}

#[derive(Clone, Copy)]
struct Work<'a> {
    shape: &'a AttnShape,
    qkv: &'a [f32],
    keys: &'a Transposed,
    values: &'a Transposed,
    out: &'a [f32],
    dout: &'a [f32],
    dqkv: Shared<'a, f32>,
    kv_head: usize,
}

/// The tiles of one segment, three ways.
struct Tiles<'a> {
    /// Keys to score with.
    keys: Vec<KeyTile<'a>>,
    /// Values in the place of the keys, keys in the place of the values.
    swapped: Vec<KeyTile<'a>>,
    /// Fused row of each tile's first position.
    rows: Vec<usize>,
}

impl Work<'_> {
    fn segment(&self, seg: &Segment, scratch: &mut Scratch) {
        let shape = self.shape;
        let (d, per_row) = (shape.head_dim, shape.queries_per_key());
        let mut tiles = Tiles { keys: Vec::new(), swapped: Vec::new(), rows: Vec::new() };
        self.keys.tiles(shape, self.qkv, seg, seg.rows.len, self.kv_head, &mut tiles.keys);
        let own = (seg.rows, seg.first_pos());
        for (span, position) in seg.prefix.map(|prefix| (prefix, 0)).into_iter().chain([own]) {
            for t in 0..span.len.div_ceil(LANES) {
                let row = span.row + t * LANES;
                tiles.swapped.push(KeyTile {
                    start: position + t * LANES,
                    len: LANES.min(span.len - t * LANES),
                    k: self.values.tile(shape, span, t, self.kv_head),
                    v: &self.qkv[row * shape.stride() + shape.k_at(self.kv_head)..],
                    v_stride: shape.stride(),
                });
                tiles.rows.push(row);
            }
        }
        let len = scores_len(seg.first_pos() + seg.rows.len);
        for buffer in [&mut scratch.scores, &mut scratch.weights, &mut scratch.slopes] {
            buffer.resize(len * TOGETHER, 0.0);
        }
        let count = seg.rows.len * per_row;
        for first in (0..count).step_by(together(per_row)) {
            let count = together(per_row).min(count - first);
            let queries = (first..first + count).map(|i| {
                let (row, head) = (i / per_row, self.kv_head * per_row + i % per_row);
                let position = seg.first_pos() + row;
                let row = seg.rows.row + row;
                // SAFETY: this item owns the head's gradients of all rows of the group.
                let dq = unsafe { self.dqkv.part(row * shape.stride() + head * d, d) };
                let q = &self.qkv[row * shape.stride() + head * d..][..d];
                Query { q, out: dq, from: shape.first_seen(position), to: position + 1, tiles: &tiles.keys }
            });
            let outs = (first..first + count).map(|i| {
                let at = (seg.rows.row + i / per_row) * shape.heads * d
                    + (self.kv_head * per_row + i % per_row) * d;
                (&self.out[at..][..d], &self.dout[at..][..d])
            });
            backward_group(
                *self,
                &mut queries.collect::<Vec<_>>(),
                &outs.collect::<Vec<_>>(),
                &tiles,
                scratch,
                len,
            );
        }
    }
}

simd_fn! {
    fn backward_group<S>(
        work: Work, queries: &mut [Query], outs: &[(&[f32], &[f32])], tiles: &Tiles,
        scratch: &mut Scratch, row: usize,
    ) {
        let shape = work.shape;
        let d = shape.head_dim;
        let Scratch { scores, weights, slopes } = scratch;

        score_group::<S, f32>(d, queries, scores, row);
        let mut swapped: Vec<Query> = queries
            .iter_mut()
            .zip(outs)
            .map(|(query, (_, dout))| Query {
                q: dout, out: &mut *query.out, from: query.from, to: query.to, tiles: &tiles.swapped,
            })
            .collect();
        score_group::<S, f32>(d, &swapped, slopes, row);
        for (r, query) in swapped.iter().enumerate() {
            let (from, to) = (query.from, query.to);
            let (scores, weights, slopes) =
                (&mut scores[r * row..][..row], &mut weights[r * row..][..row], &mut slopes[r * row..][..row]);
            cap_scores::<S>(shape, from, to, scores);
            weights.copy_from_slice(scores);
            let share = S::splat(1.0 / softmax::<S>(from, to, weights));
            let (out, dout) = outs[r];
            let mut inner = S::splat(0.0);
            for i in (0..d).step_by(LANES) {
                inner = S::fma(S::load(&dout[i..]), S::load(&out[i..]), inner);
            }
            let inner = S::splat(S::sum(inner));
            for i in (from / LANES * LANES..to).step_by(LANES) {
                let p = S::mul(S::load(&weights[i..]), share);
                let mut slope = S::mul(S::mul(p, S::sub(S::load(&slopes[i..]), inner)), S::splat(shape.scale));
                if let Some(cap) = shape.softcap {
                    let bend = S::div(S::load(&scores[i..]), S::splat(cap));
                    slope = S::mul(slope, S::fnma(bend, bend, S::splat(1.0)));
                }
                S::store(p, &mut weights[i..]);
                S::store(slope, &mut slopes[i..]);
            }
            // What the row does not see but its neighbours do.
            for row in [weights, slopes] {
                row[..from].fill(0.0);
                row[to..].fill(0.0);
            }
        }
        weigh_group::<S, f32>(&mut swapped, slopes, row);
        let first = swapped.iter().map(|query| query.from).min().unwrap_or(0);
        let last = swapped.iter().map(|query| query.to).max().unwrap_or(0);
        let mut q = [&[][..]; TOGETHER];
        let mut dout = [&[][..]; TOGETHER];
        for (r, query) in queries.iter().enumerate() {
            (q[r], dout[r]) = (query.q, outs[r].1);
        }
        let (k_at, v_at) = (shape.k_at(work.kv_head), shape.v_at(work.kv_head));
        by_count!(queries.len(), collect, (&work, tiles, slopes, row, first, last, &q, k_at));
        by_count!(queries.len(), collect, (&work, tiles, weights, row, first, last, &dout, v_at));
    }
}

/// Gradient rows first..last at column `at` += Σ coefficients[r][position]·x[r] over the R queries in order.
#[inline(always)]
fn collect<S: Simd, const R: usize>(
    work: &Work,
    tiles: &Tiles,
    coefficients: &[f32],
    row: usize,
    first: usize,
    last: usize,
    x: &[&[f32]; TOGETHER],
    at: usize,
) {
    let (d, stride) = (work.shape.head_dim, work.shape.stride());
    assert!(coefficients.len() >= (R - 1) * row + last && x[..R].iter().all(|x| x.len() == d));
    let mut i = 0;
    while i < d {
        let whole = S::MANY_REGISTERS && d - i >= 4 * LANES;
        let width = if whole { 4 * LANES } else { LANES.min(d - i) };
        // The factors stay in registers over all positions.
        let mut factors = [[S::splat(0.0); 4]; R];
        for r in 0..R {
            for c in 0..width.div_ceil(LANES) {
                factors[r][c] = S::load(&x[r][i + c * LANES..]);
            }
        }
        for (tile, start) in tiles.keys.iter().zip(&tiles.rows) {
            let (from, to) = (first.max(tile.start), last.min(tile.start + tile.len));
            if from >= to {
                continue;
            }
            // SAFETY: this item owns the head's gradients of all rows of the group; one block is alive at a time.
            let sums = unsafe {
                work.dqkv.block((start + from - tile.start) * stride + at + i, stride, to - from, width)
            };
            if whole {
                // SAFETY: the block is 64 columns wide; the coefficients are checked.
                unsafe { collect_columns::<S, R>(coefficients.as_ptr().add(from), row, &factors, &sums) };
                continue;
            }
            for j in from..to {
                // SAFETY: a row of the block.
                let sum = unsafe { std::slice::from_raw_parts_mut(sums.row_start(j - from), width) };
                let mut v = S::load(sum);
                for r in 0..R {
                    v = S::fma(S::splat(coefficients[r * row + j]), factors[r][0], v);
                }
                S::store(v, sum);
            }
        }
        i += width;
    }
}

/// # Safety
/// `coefficient + r·row + i` is readable for r < R and each row i of `sums`, which are 64 wide.
#[inline(always)]
unsafe fn collect_columns<S: Simd, const R: usize>(
    coefficient: *const f32,
    row: usize,
    factors: &[[S::V; 4]; R],
    sums: &Block<f32>,
) {
    let start = sums.row_start(0);
    for i in 0..sums.rows {
        // SAFETY: promised by the caller.
        unsafe {
            let sum = start.add(i * sums.stride);
            let mut v = [S::splat(0.0); 4];
            for c in 0..4 {
                v[c] = S::read(sum.add(c * LANES));
            }
            for r in 0..R {
                let w = S::splat(*coefficient.add(r * row + i));
                for c in 0..4 {
                    v[c] = S::fma(w, factors[r][c], v[c]);
                }
            }
            for c in 0..4 {
                S::write(v[c], sum.add(c * LANES));
            }
        }
    }
}
