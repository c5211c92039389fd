//! What the rollout engine asks of a model: a forward pass over a ragged batch whose keys and values are paged.

use std::ops::Range;

use rft_kernels::{BLOCK, KvPages, PagedRun, Pool};

/// A decoder that reads and writes a paged KV cache.
pub trait PagedModel {
    /// Logits a row.
    fn vocab(&self) -> usize;

    /// Longest sequence it can run.
    fn max_positions(&self) -> usize;

    /// An empty cache of this many blocks.
    fn new_cache(&self, blocks: usize) -> KvCache;

    /// Runs the batch: stores each row's keys and values at its slot and keeps what the logits of the selected rows
    /// need.
    fn forward(&mut self, pool: &Pool, cache: &mut KvCache, batch: &PagedBatch);

    /// Logits `[rows.len(), vocab]` of some of the last batch's selected rows, by their place in `select`.
    fn logits(&mut self, pool: &Pool, rows: Range<usize>, logits: &mut Vec<f32>);
}

/// Keys and values of every layer, in blocks of [`BLOCK`] positions.
#[derive(Debug)]
pub struct KvCache {
    /// One for each layer.
    pub layers: Vec<KvPages>,
    block_len: usize,
}

impl KvCache {
    /// Zeroed blocks, in f32 or bf16.
    pub fn new(layers: usize, blocks: usize, kv_heads: usize, head_dim: usize, bf16: bool) -> Self {
        let pages = || KvPages::new(blocks, kv_heads, head_dim, bf16);
        let layers = std::iter::repeat_with(pages).take(layers).collect();
        Self { layers, block_len: kv_heads * head_dim * BLOCK }
    }

    /// Copies block `from` onto block `to` in every layer.
    pub fn copy_block(&mut self, from: u32, to: u32) {
        self.layers.iter_mut().for_each(|pages| pages.copy_block(self.block_len, from, to));
    }
}

/// Rows of one forward pass: tokens of any mix of sequences.
#[derive(Debug, Clone, Copy)]
pub struct PagedBatch<'a> {
    /// Token of each row.
    pub tokens: &'a [u32],
    /// Position of each row in its sequence.
    pub positions: &'a [u32],
    /// Where each row's key and value go: `block * BLOCK + offset`.
    pub slots: &'a [u32],
    /// Consecutive rows of one sequence, with its block table.
    pub runs: &'a [PagedRun<'a>],
    /// Rows whose logits are wanted, ascending.
    pub select: &'a [usize],
}
