//! Gradient of [`super::segment_attention`].
//!
//! Softmax is computed again by the forward rule. With p the probabilities, D = dout·out: dv_j += p_j·dout,
//! ds_j = p_j·(dout·v_j − D) (times the cap's slope), dq = scale·Σ ds_j·k_j, dk_j += scale·ds_j·q. Keys and values collect
//! their sums in the order of segments, rows and heads: one work item owns a key/value head of all segments that share rows.

use super::AttnShape;
use super::core::{KeyTile, Query, cap_scores, dot, score_group, softmax};
use super::segments::{Segment, Span, Transposed};
use crate::pool::Pool;
use crate::shared::Shared;
use crate::simd::{LANES, Simd, simd_fn};

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
    dqkv.fill(0.0);
    let keys = Transposed::new(pool, shape, qkv, segs, shape.k_at(0));
    let values = Transposed::new(pool, shape, qkv, segs, shape.v_at(0));
    let groups = connected(segs);
    let dqkv = Shared::new(dqkv);
    pool.run(groups.len() * shape.kv_heads, |item| {
        let (kv_head, group) = (item / groups.len(), &groups[item % groups.len()]);
        let mut scratch = Scratch::default();
        for &s in group {
            let work = Work { shape, qkv, keys: &keys, values: &values, out, dout, dqkv, kv_head };
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
    fn find(leader: &mut [usize], mut s: usize) -> usize {
        while leader[s] != s {
            leader[s] = leader[leader[s]];
            s = leader[s];
        }
        s
    }
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

#[derive(Default)]
struct Scratch {
    scores: Vec<f32>,
    weights: Vec<f32>,
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

impl Work<'_> {
    fn segment(&self, seg: &Segment, scratch: &mut Scratch) {
        let shape = self.shape;
        let mut tiles = Vec::new();
        self.keys.tiles(shape, self.qkv, seg, seg.rows.len, self.kv_head, &mut tiles);
        let mut value_tiles = Vec::new();
        let mut rows = Vec::new();
        let parts = seg.prefix.into_iter().chain([seg.rows]);
        for span in parts {
            for t in 0..span.len.div_ceil(LANES) {
                value_tiles.push(self.values.tile(shape, span, t, self.kv_head));
                rows.push(span.row + t * LANES);
            }
        }
        let len = (seg.first_pos() + seg.rows.len).next_multiple_of(LANES) + LANES;
        scratch.scores.resize(len, 0.0);
        scratch.weights.resize(len, 0.0);
        for i in 0..seg.rows.len {
            let position = seg.first_pos() + i;
            let count = tiles.partition_point(|tile| tile.start <= position);
            for head in 0..shape.queries_per_key() {
                let head = self.kv_head * shape.queries_per_key() + head;
                backward_row(
                    *self,
                    seg.rows.row + i,
                    head,
                    position,
                    &tiles[..count],
                    &value_tiles,
                    &rows,
                    scratch,
                );
            }
        }
    }
}

simd_fn! {
    fn backward_row<S>(
        work: Work, row: usize, head: usize, position: usize,
        tiles: &[KeyTile], value_tiles: &[&[f32]], rows: &[usize], scratch: &mut Scratch,
    ) {
        let shape = work.shape;
        let (d, stride) = (shape.head_dim, shape.stride());
        let q = &work.qkv[row * stride + head * d..][..d];
        let at = row * shape.heads * d + head * d;
        let (out, dout) = (&work.out[at..][..d], &work.dout[at..][..d]);
        let (from, to) = (shape.first_seen(position), position + 1);
        let first = tiles.partition_point(|tile| tile.start + tile.len <= from);
        let (tiles, value_tiles, rows) = (&tiles[first..], &value_tiles[first..], &rows[first..]);
        let Scratch { scores, weights } = scratch;

        let query = [Query { q, out: &mut [], from, to }];
        let len = scores.len();
        score_group::<S>(d, tiles, &query, scores, len);
        cap_scores::<S>(shape, from, to, scores);
        weights.copy_from_slice(scores);
        let share = 1.0 / softmax::<S>(from, to, weights);

        let mut inner = S::splat(0.0);
        for i in (0..d).step_by(LANES) {
            inner = S::fma(S::load(&dout[i..]), S::load(&out[i..]), inner);
        }
        let inner = S::splat(S::sum(inner));
        for ((tile, v), &base) in tiles.iter().zip(value_tiles).zip(rows) {
            let dp = dot::<S>(dout, v);
            let p = S::mul(S::load(&weights[tile.start..]), S::splat(share));
            let mut ds = S::mul(S::mul(p, S::sub(dp, inner)), S::splat(shape.scale));
            if let Some(cap) = shape.softcap {
                let bend = S::div(S::load(&scores[tile.start..]), S::splat(cap));
                ds = S::mul(ds, S::fnma(bend, bend, S::splat(1.0)));
            }
            let (p, ds) = (S::to_array(p), S::to_array(ds));
            // SAFETY: this item owns the head's gradients of all rows of the group; the parts do not overlap.
            let dq = unsafe { work.dqkv.part(row * stride + head * d, d) };
            for j in from.max(tile.start)..to.min(tile.start + tile.len) {
                let lane = j - tile.start;
                let k_at = (base + lane) * stride + shape.k_at(work.kv_head);
                // SAFETY: as above.
                let dk = unsafe { work.dqkv.part(k_at, d) };
                // SAFETY: as above.
                let dv = unsafe { work.dqkv.part((base + lane) * stride + shape.v_at(work.kv_head), d) };
                add_scaled::<S>(ds[lane], &work.qkv[k_at..][..d], dq);
                add_scaled::<S>(ds[lane], q, dk);
                add_scaled::<S>(p[lane], dout, dv);
            }
        }
    }
}

/// y += a·x.
#[inline(always)]
fn add_scaled<S: Simd>(a: f32, x: &[f32], y: &mut [f32]) {
    for i in (0..x.len()).step_by(LANES) {
        S::store(S::fma(S::splat(a), S::load(&x[i..]), S::load(&y[i..])), &mut y[i..]);
    }
}
