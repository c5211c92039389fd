//! Attention of the learner's packed batch: segments of rows, several of which may share a prefix.

use std::cell::RefCell;
use std::collections::HashMap;

use super::AttnShape;
use super::core::{KeyTile, Query, attend};
use crate::pool::Pool;
use crate::shared::Shared;
use crate::simd::{LANES, simd_fn};

/// Consecutive rows of the batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Span {
    /// First row.
    pub row: usize,
    /// Rows.
    pub len: usize,
}

/// Rows that see all of `prefix` and themselves causally; the position of row i is `prefix.len + i`.
#[derive(Clone, Copy, Debug)]
pub struct Segment {
    /// The segment's own rows; no row is in two segments.
    pub rows: Span,
    /// Rows before it, which other segments may share.
    pub prefix: Option<Span>,
}

impl Segment {
    pub(super) fn first_pos(&self) -> usize {
        self.prefix.map_or(0, |prefix| prefix.len)
    }
}

/// Rows of one work item.
const ROWS: usize = 16;

thread_local! {
    static SCORES: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
    /// Tiles of earlier batches, for their memory.
    static SPARE: RefCell<Vec<Vec<f32>>> = const { RefCell::new(Vec::new()) };
}

/// out[rows, heads·d] = attention within the segments of fused rows `qkv`; the same bits as [`super::paged_attention`] gives for
/// the same sequence.
pub fn segment_attention(pool: &Pool, shape: &AttnShape, qkv: &[f32], segs: &[Segment], out: &mut [f32]) {
    shape.check();
    let (d, stride) = (shape.head_dim, shape.stride());
    let keys = Transposed::new(pool, shape, qkv, segs, shape.k_at(0));
    let items: Vec<(usize, usize, usize)> = segs
        .iter()
        .enumerate()
        .flat_map(|(s, seg)| {
            let len = seg.rows.len;
            (0..len).step_by(ROWS).map(move |from| (s, from, ROWS.min(len - from)))
        })
        .collect();
    let out = Shared::new(out);
    pool.run(items.len() * shape.kv_heads, |item| {
        let (kv_head, item) = (item / items.len(), item % items.len());
        let (s, from, rows) = items[item];
        let seg = &segs[s];
        let mut tiles = Vec::new();
        keys.tiles(shape, qkv, seg, from + rows, kv_head, &mut tiles);
        let mut queries = Vec::with_capacity(rows * shape.queries_per_key());
        for i in from..from + rows {
            let position = seg.first_pos() + i;
            for head in kv_head * shape.queries_per_key()..(kv_head + 1) * shape.queries_per_key() {
                // SAFETY: each (row, head) belongs to one item.
                let out = unsafe { out.part((seg.rows.row + i) * shape.heads * d + head * d, d) };
                let q = &qkv[(seg.rows.row + i) * stride + head * d..][..d];
                queries.push(Query {
                    q,
                    out,
                    from: shape.first_seen(position),
                    to: position + 1,
                    tiles: &tiles,
                });
            }
        }
        SCORES.with_borrow_mut(|scores| attend(shape, &mut queries, shape.queries_per_key(), scores));
    });
}

/// One of the fused row's parts (keys or values) of all spans, transposed to [span][tile][kv_head][d][16].
pub(super) struct Transposed {
    tiles: Vec<f32>,
    first_tile: HashMap<Span, usize>,
}

impl Transposed {
    /// Transposes the part that starts at column `at` of a fused row.
    pub(super) fn new(
        pool: &Pool,
        shape: &AttnShape,
        qkv: &[f32],
        segs: &[Segment],
        at: usize,
    ) -> Transposed {
        let (d, stride) = (shape.head_dim, shape.stride());
        let mut first_tile = HashMap::new();
        let mut sources = Vec::new();
        for span in segs.iter().flat_map(|seg| seg.prefix.into_iter().chain([seg.rows])) {
            first_tile.entry(span).or_insert_with(|| {
                let first = sources.len();
                sources.extend(
                    (0..span.len)
                        .step_by(LANES)
                        .map(|from| Span { row: span.row + from, len: LANES.min(span.len - from) }),
                );
                first
            });
        }
        let size = shape.kv_heads * d * LANES;
        let mut tiles = SPARE.with_borrow_mut(Vec::pop).unwrap_or_default();
        tiles.resize(sources.len() * size, 0.0);
        let shared = Shared::new(&mut tiles);
        pool.run(sources.len(), |t| {
            // SAFETY: each tile belongs to one item.
            let tile = unsafe { shared.part(t * size, size) };
            let Span { row, len } = sources[t];
            transpose_tile(&qkv[row * stride + at..], stride, len, shape.kv_heads * d, tile);
        });
        Transposed { tiles, first_tile }
    }

    /// The transposed tile `t` of a span.
    pub(super) fn tile(&self, shape: &AttnShape, span: Span, t: usize, kv_head: usize) -> &[f32] {
        let size = shape.head_dim * LANES;
        &self.tiles[((self.first_tile[&span] + t) * shape.kv_heads + kv_head) * size..][..size]
    }

    /// Tiles of the prefix and of the segment's first `rows` rows, ascending by position.
    pub(super) fn tiles<'a>(
        &'a self,
        shape: &AttnShape,
        qkv: &'a [f32],
        seg: &Segment,
        rows: usize,
        kv_head: usize,
        tiles: &mut Vec<KeyTile<'a>>,
    ) {
        let stride = shape.stride();
        let own = (seg.rows, rows, seg.first_pos());
        for (span, rows, position) in
            seg.prefix.map(|prefix| (prefix, prefix.len, 0)).into_iter().chain([own])
        {
            for t in 0..rows.div_ceil(LANES) {
                tiles.push(KeyTile {
                    start: position + t * LANES,
                    len: LANES.min(rows - t * LANES),
                    k: self.tile(shape, span, t, kv_head),
                    v: &qkv[(span.row + t * LANES) * stride + shape.v_at(kv_head)..],
                    v_stride: stride,
                });
            }
        }
    }
}

impl Drop for Transposed {
    fn drop(&mut self) {
        let tiles = std::mem::take(&mut self.tiles);
        // The thread may be ending.
        let _ = SPARE.try_with(|spare| spare.borrow_mut().push(tiles));
    }
}

simd_fn! {
    /// tile[column][16] = rows of `columns` elements, `stride` apart; zero for lanes beyond `rows`.
    fn transpose_tile<S>(from: &[f32], stride: usize, rows: usize, columns: usize, tile: &mut [f32]) {
        for c in (0..columns).step_by(LANES) {
            let width = LANES.min(columns - c);
            let mut block = [S::splat(0.0); LANES];
            for (r, row) in block.iter_mut().take(rows).enumerate() {
                *row = S::load(&from[r * stride + c..][..width]);
            }
            S::transpose(&mut block);
            for (i, column) in block.into_iter().take(width).enumerate() {
                S::store(column, &mut tile[(c + i) * LANES..]);
            }
        }
    }
}
