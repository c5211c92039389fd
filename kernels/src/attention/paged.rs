//! Attention of new rows over the paged cache: decode (runs of one row) and chunked prefill (longer runs) alike.

use std::cell::RefCell;

use super::AttnShape;
use super::core::{KeyTile, Query, attend};
use crate::cache::BLOCK;
use crate::pool::Pool;
use crate::shared::Shared;

/// Consecutive rows of one sequence. Row `row + i` sits at position `first_pos + i` and sees positions `0..=first_pos + i`.
#[derive(Clone, Copy, Debug)]
pub struct PagedRun<'a> {
    /// First row in `qkv` and `out`.
    pub row: usize,
    /// Rows in the run.
    pub rows: usize,
    /// Position of the first row.
    pub first_pos: usize,
    /// Block of each 16 positions.
    pub table: &'a [u32],
}

/// Most rows of one work item.
const ROWS: usize = 16;

thread_local! {
    static SCORES: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// out[rows, heads·d] = attention of the queries in `qkv` over the cache, which already holds the rows' own keys and values.
///
/// Neighbouring runs whose tables begin with the same block are worked on together, so that a group's shared prompt is read once
/// for several of its samples.
pub fn paged_attention(
    pool: &Pool,
    shape: &AttnShape,
    qkv: &[f32],
    runs: &[PagedRun],
    k_cache: &[f32],
    v_cache: &[f32],
    out: &mut [f32],
) {
    shape.check();
    let (d, stride, per_row) = (shape.head_dim, shape.stride(), shape.queries_per_key());
    let pieces = cut(runs);
    let items = join(&pieces, runs);
    let out = Shared::new(out);
    pool.run(items.len() * shape.kv_heads, |item| {
        let (kv_head, (first, last)) = (item / items.len(), items[item % items.len()]);
        let pieces = &pieces[first..last];
        let tiles: Vec<Vec<KeyTile>> = pieces
            .iter()
            .map(|piece| {
                let run = &runs[piece.run];
                let end = run.first_pos + piece.from + piece.rows;
                let blocks = run.table[..end.div_ceil(BLOCK)].iter().enumerate();
                blocks
                    .map(|(t, &block)| {
                        let at = (block as usize * shape.kv_heads + kv_head) * BLOCK * d;
                        let (k, v) = (&k_cache[at..][..BLOCK * d], &v_cache[at..][..BLOCK * d]);
                        KeyTile { start: t * BLOCK, len: BLOCK, k, v, v_stride: d }
                    })
                    .collect()
            })
            .collect();
        let mut queries = Vec::with_capacity(ROWS * per_row);
        for (piece, tiles) in pieces.iter().zip(&tiles) {
            let run = &runs[piece.run];
            for i in piece.from..piece.from + piece.rows {
                let position = run.first_pos + i;
                for head in kv_head * per_row..(kv_head + 1) * per_row {
                    // SAFETY: each (row, head) belongs to one item.
                    let out = unsafe { out.part((run.row + i) * shape.heads * d + head * d, d) };
                    let q = &qkv[(run.row + i) * stride + head * d..][..d];
                    queries.push(Query { q, out, from: shape.first_seen(position), to: position + 1, tiles });
                }
            }
        }
        SCORES.with_borrow_mut(|scores| attend(shape, &mut queries, per_row, scores));
    });
}

/// Rows `from..from + rows` of a run.
struct Piece {
    run: usize,
    from: usize,
    rows: usize,
}

/// Cuts runs to pieces of at most [`ROWS`] rows.
fn cut(runs: &[PagedRun]) -> Vec<Piece> {
    let mut pieces = Vec::with_capacity(runs.len());
    for (i, run) in runs.iter().enumerate() {
        for from in (0..run.rows).step_by(ROWS) {
            pieces.push(Piece { run: i, from, rows: ROWS.min(run.rows - from) });
        }
    }
    pieces
}

/// Ranges of neighbouring pieces that share their first block and have at most [`ROWS`] rows in all.
fn join(pieces: &[Piece], runs: &[PagedRun]) -> Vec<(usize, usize)> {
    let mut items: Vec<(usize, usize)> = Vec::with_capacity(pieces.len());
    let mut rows = 0;
    for (i, piece) in pieces.iter().enumerate() {
        let follows = i > 0 && runs[pieces[i - 1].run].table.first() == runs[piece.run].table.first();
        match items.last_mut() {
            Some(item) if follows && rows + piece.rows <= ROWS => {
                item.1 = i + 1;
                rows += piece.rows;
            }
            _ => {
                items.push((i, i + 1));
                rows = piece.rows;
            }
        }
    }
    items
}
