//! The paged key/value cache of one layer: where a block keeps its 16 positions, and how rows get in.
//!
//! Keys are transposed inside a block, [block][kv_head][head_dim][16], so that 16 scores are made at a time; values are
//! [block][kv_head][16][head_dim].

use crate::attention::AttnShape;
use crate::pool::Pool;
use crate::shared::Shared;

/// Positions in a block.
pub const BLOCK: usize = 16;

/// Writes the keys and values of fused rows qkv[rows, (heads + 2·kv_heads)·d] into their slots (block·16 + offset, each once).
pub fn store_kv(
    pool: &Pool,
    shape: &AttnShape,
    qkv: &[f32],
    slots: &[u32],
    k_cache: &mut [f32],
    v_cache: &mut [f32],
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
                    unsafe { k_cache.part(at + i * BLOCK + offset, 1)[0] = *x };
                }
                // SAFETY: as above.
                unsafe { v_cache.part(at + offset * d, d) }.copy_from_slice(v);
            }
        }
    });
}

/// Copies block `src` of one layer's cache to block `dst` (copy on write).
pub fn copy_block(shape: &AttnShape, src: u32, dst: u32, k_cache: &mut [f32], v_cache: &mut [f32]) {
    let len = shape.kv_heads * BLOCK * shape.head_dim;
    let (src, dst) = (src as usize * len, dst as usize * len);
    k_cache.copy_within(src..src + len, dst);
    v_cache.copy_within(src..src + len, dst);
}
