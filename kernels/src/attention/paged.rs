//! Attention of new rows over the paged cache: decode (runs of one row) and chunked prefill (longer runs) alike.

use std::cell::RefCell;

use super::AttnShape;
use super::core::{Element, KeyTile, Query, attend};
use crate::cache::{BLOCK, KvPages};
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

/// What an item or a call needs, kept from one to the next: a decoding pass allocates nothing.
#[derive(Default)]
struct Scratch {
    scores: Vec<f32>,
    tiles: Vec<KeyTile<'static>>,
    queries: Vec<Query<'static>>,
    pieces: Vec<Piece>,
    items: Vec<(usize, usize)>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// The vector emptied, for elements of the same size that borrow from elsewhere; its allocation stays (collecting works in place).
fn recycle<A, B>(mut vector: Vec<A>) -> Vec<B> {
    vector.clear();
    vector.into_iter().map(|_| unreachable!("the vector is empty")).collect()
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
    pages: &KvPages,
    out: &mut [f32],
) {
    match pages {
        KvPages::F32 { k, v } => attention(pool, shape, qkv, runs, k, v, out),
        KvPages::Bf16 { k, v } => attention(pool, shape, qkv, runs, k, v, out),
    }
}

fn attention<E: Element>(
    pool: &Pool,
    shape: &AttnShape,
    qkv: &[f32],
    runs: &[PagedRun],
    k_cache: &[E],
    v_cache: &[E],
    out: &mut [f32],
) {
    shape.check();
    let (d, stride, per_row) = (shape.head_dim, shape.stride(), shape.queries_per_key());
    let (mut pieces, mut items) =
        SCRATCH.with_borrow_mut(|s| (std::mem::take(&mut s.pieces), std::mem::take(&mut s.items)));
    cut(runs, &mut pieces);
    join(&pieces, runs, &mut items);
    let out = Shared::new(out);
    let blocks_of = |piece: &Piece| {
        let run = &runs[piece.run];
        &run.table[..(run.first_pos + piece.from + piece.rows).div_ceil(BLOCK)]
    };
    pool.run(items.len() * shape.kv_heads, |item| {
        let (kv_head, (first, last)) = (item / items.len(), items[item % items.len()]);
        let pieces = &pieces[first..last];
        let (mut scores, tiles, queries) = SCRATCH.with_borrow_mut(|s| {
            (std::mem::take(&mut s.scores), std::mem::take(&mut s.tiles), std::mem::take(&mut s.queries))
        });
        let mut tiles: Vec<KeyTile<E>> = recycle(tiles);
        for piece in pieces {
            tiles.extend(blocks_of(piece).iter().enumerate().map(|(t, &block)| {
                let at = (block as usize * shape.kv_heads + kv_head) * BLOCK * d;
                let (k, v) = (&k_cache[at..][..BLOCK * d], &v_cache[at..][..BLOCK * d]);
                KeyTile { start: t * BLOCK, len: BLOCK, k, v, v_stride: d }
            }));
        }
        let mut queries: Vec<Query<E>> = recycle(queries);
        let mut rest = &tiles[..];
        for piece in pieces {
            let run = &runs[piece.run];
            let tiles = rest.split_off(..blocks_of(piece).len()).expect("each piece has its tiles");
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
        attend(shape, &mut queries, per_row, &mut scores);
        let (queries, tiles) = (recycle(queries), recycle(tiles));
        SCRATCH.with_borrow_mut(|s| (s.scores, s.tiles, s.queries) = (scores, tiles, queries));
    });
    SCRATCH.with_borrow_mut(|s| (s.pieces, s.items) = (pieces, items));
}

/// Rows `from..from + rows` of a run.
struct Piece {
    run: usize,
    from: usize,
    rows: usize,
}

/// Cuts runs to pieces of at most [`ROWS`] rows.
fn cut(runs: &[PagedRun], pieces: &mut Vec<Piece>) {
    pieces.clear();
    for (i, run) in runs.iter().enumerate() {
        for from in (0..run.rows).step_by(ROWS) {
            pieces.push(Piece { run: i, from, rows: ROWS.min(run.rows - from) });
        }
    }
}

/// Ranges of neighbouring pieces that share their first block and have at most [`ROWS`] rows in all.
fn join(pieces: &[Piece], runs: &[PagedRun], items: &mut Vec<(usize, usize)>) {
    items.clear();
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
}
