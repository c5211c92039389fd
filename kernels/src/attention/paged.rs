//! Attention of new rows over the paged cache: decode (runs of one row) and chunked prefill (longer runs) alike.

use std::cell::RefCell;

use super::AttnShape;
use super::core::{KeyTile, Query, Scratch, attend};
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

/// Rows of one work item.
const ROWS: usize = 16;

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// out[rows, heads·d] = attention of the queries in `qkv` over the cache, which already holds the rows' own keys and values.
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
    let (d, stride) = (shape.head_dim, shape.stride());
    let items: Vec<(usize, usize, usize)> = runs
        .iter()
        .enumerate()
        .flat_map(|(r, run)| {
            (0..run.rows).step_by(ROWS).map(move |from| (r, from, ROWS.min(run.rows - from)))
        })
        .collect();
    let out = Shared::new(out);
    pool.run(items.len() * shape.kv_heads, |item| {
        let (kv_head, item) = (item / items.len(), item % items.len());
        let (r, from, rows) = items[item];
        let run = &runs[r];
        let end = run.first_pos + from + rows;
        let tiles: Vec<KeyTile> = (0..end.div_ceil(BLOCK))
            .map(|t| {
                let at = (run.table[t] as usize * shape.kv_heads + kv_head) * BLOCK * d;
                let len = BLOCK.min(end - t * BLOCK);
                KeyTile {
                    start: t * BLOCK,
                    len,
                    k: &k_cache[at..][..BLOCK * d],
                    v: &v_cache[at..],
                    v_stride: d,
                }
            })
            .collect();
        let mut queries = Vec::with_capacity(rows * shape.queries_per_key());
        for i in from..from + rows {
            let position = run.first_pos + i;
            for head in kv_head * shape.queries_per_key()..(kv_head + 1) * shape.queries_per_key() {
                // SAFETY: each (row, head) belongs to one item.
                let out = unsafe { out.part((run.row + i) * shape.heads * d + head * d, d) };
                let q = &qkv[(run.row + i) * stride + head * d..][..d];
                queries.push(Query { q, out, from: shape.first_seen(position), to: position + 1 });
            }
        }
        SCRATCH.with_borrow_mut(|scratch| attend(shape, &tiles, &mut queries, scratch));
    });
}
