//! The paged key/value cache of one layer: where a block keeps its 16 positions, and how rows get in.
//!
//! In bf16 keys and values are rounded when they are stored; [`round_kv`] does the same to rows that are attended to in place, so
//! that both ways see the same numbers.
//! Keys are transposed inside a block, [block][kv_head][head_dim][16], so that 16 scores are made at a time; values are
//! [block][kv_head][16][head_dim].

use crate::attention::AttnShape;
use crate::gemm::round;
use crate::pool::Pool;
use crate::shared::Shared;

/// Positions in a block.
pub const BLOCK: usize = 16;

/// Keys and values of one layer, in blocks.
#[derive(Clone, Debug)]
pub enum KvPages {
    /// As they are computed.
    F32 {
        /// `[block][kv_head][head_dim][16]`.
        k: Vec<f32>,
        /// `[block][kv_head][16][head_dim]`.
        v: Vec<f32>,
    },
    /// Rounded to bf16, to nearest even.
    Bf16 {
        /// As in f32.
        k: Vec<u16>,
        /// As in f32.
        v: Vec<u16>,
    },
}

impl KvPages {
    /// Zeroed pages of `blocks` blocks, in f32 or bf16.
    pub fn new(blocks: usize, kv_heads: usize, head_dim: usize, bf16: bool) -> KvPages {
        let len = blocks * kv_heads * head_dim * BLOCK;
        match bf16 {
            true => KvPages::Bf16 { k: vec![0; len], v: vec![0; len] },
            false => KvPages::F32 { k: vec![0.0; len], v: vec![0.0; len] },
        }
    }

    /// Copies block `from` to block `to` (copy on write); a block has `len` = kv_heads·head_dim·16 elements.
    pub fn copy_block(&mut self, len: usize, from: u32, to: u32) {
        let (from, to) = (from as usize * len, to as usize * len);
        match self {
            KvPages::F32 { k, v } => [k, v].map(|x| x.copy_within(from..from + len, to)),
            KvPages::Bf16 { k, v } => [k, v].map(|x| x.copy_within(from..from + len, to)),
        };
    }
}

/// Rounds the keys and values of fused rows to bf16 in place, as [`KvPages::Bf16`] stores them.
pub fn round_kv(pool: &Pool, shape: &AttnShape, qkv: &mut [f32]) {
    pool.map_chunks(qkv, shape.stride(), |_, row| {
        for x in &mut row[shape.k_at(0)..] {
            *x = f32::from_bits(u32::from(round(*x)) << 16);
        }
    });
}

/// Writes the keys and values of fused rows qkv[rows, (heads + 2·kv_heads)·d] into their slots (block·16 + offset, each once).
pub fn store_kv(pool: &Pool, shape: &AttnShape, qkv: &[f32], slots: &[u32], pages: &mut KvPages) {
    match pages {
        KvPages::F32 { k, v } => store(pool, shape, qkv, slots, k, v, |x| x),
        KvPages::Bf16 { k, v } => store(pool, shape, qkv, slots, k, v, round),
    }
}

fn store<E: Send>(
    pool: &Pool,
    shape: &AttnShape,
    qkv: &[f32],
    slots: &[u32],
    k_cache: &mut [E],
    v_cache: &mut [E],
    element: impl Fn(f32) -> E + Sync,
) {
    let d = shape.head_dim;
    let stride = shape.stride();
    assert_eq!(qkv.len(), slots.len() * stride, "qkv is [rows, (heads + 2 kv_heads) d]");
    const ROWS: usize = 8;
    let (k_cache, v_cache) = (Shared::new(k_cache), Shared::new(v_cache));
    pool.run(slots.len().div_ceil(ROWS), |item| {
        for r in item * ROWS..((item + 1) * ROWS).min(slots.len()) {
            let (block, offset) = (slots[r] as usize / BLOCK, slots[r] as usize % BLOCK);
            for head in 0..shape.kv_heads {
                let at = (block * shape.kv_heads + head) * BLOCK * d;
                let k = &qkv[r * stride + shape.k_at(head)..][..d];
                let v = &qkv[r * stride + shape.v_at(head)..][..d];
                for (i, x) in k.iter().enumerate() {
                    // SAFETY: a slot belongs to one row, so single elements are written by one item.
                    unsafe { k_cache.part(at + i * BLOCK + offset, 1)[0] = element(*x) };
                }
                // SAFETY: as above.
                let to = unsafe { v_cache.part(at + offset * d, d) };
                to.iter_mut().zip(v).for_each(|(to, x)| *to = element(*x));
            }
        }
    });
}
