//! Per-head query/key normalisation and rotary positions, forward and backward, on fused qkv rows.
//!
//! Rotation is the NeoX form: dimension i of the first half pairs with i + rot/2 (Su et al. 2021, eq. 34, halves instead of
//! neighbours). Dimensions from `rot` on pass through; values pass through.

use crate::attention::AttnShape;
use crate::norm::{norm_row, norm_row_backward, row_scale, weight_row_backward};
use crate::pool::Pool;
use crate::shared::Shared;

/// Weights of the per-head RMS normalisation of queries and keys (Qwen 3, Gemma 3).
#[derive(Clone, Copy, Debug)]
pub struct QkNorm<'a> {
    /// `[head_dim]` for queries.
    pub q: &'a [f32],
    /// `[head_dim]` for keys.
    pub k: &'a [f32],
    /// Added to the mean square.
    pub eps: f32,
    /// Added to the weights: 0, or 1 for Gemma.
    pub offset: f32,
}

/// Cosines and sines by position.
#[derive(Clone, Copy, Debug)]
pub struct Rope<'a> {
    /// [positions, rot/2].
    pub cos: &'a [f32],
    /// [positions, rot/2].
    pub sin: &'a [f32],
    /// Rotated dimensions of a head, even.
    pub rot: usize,
}

/// Rows of one work item.
const ROWS: usize = 8;

/// qkv_out = rope(norm(qkv_in)) for queries and keys, a copy for values; `positions` has one entry a row.
pub fn qk_rope(
    pool: &Pool,
    shape: &AttnShape,
    qkv_in: &[f32],
    norm: Option<QkNorm>,
    rope: Option<Rope>,
    positions: &[u32],
    qkv_out: &mut [f32],
) {
    let (d, stride, m) = (shape.head_dim, shape.stride(), positions.len());
    assert_eq!(qkv_in.len(), m * stride, "qkv_in is [rows, (heads + 2 kv_heads) d]");
    assert_eq!(qkv_out.len(), qkv_in.len(), "qkv_out is like qkv_in");
    let out = Shared::new(qkv_out);
    pool.run(m.div_ceil(ROWS), |item| {
        for r in item * ROWS..((item + 1) * ROWS).min(m) {
            // SAFETY: each row belongs to one item.
            let to = unsafe { out.part(r * stride, stride) };
            let from = &qkv_in[r * stride..][..stride];
            for head in 0..shape.heads + shape.kv_heads {
                let (from, to) = (&from[head * d..][..d], &mut to[head * d..][..d]);
                match norm {
                    Some(norm) => {
                        let w = if head < shape.heads { norm.q } else { norm.k };
                        norm_row(from, w, norm.eps, norm.offset, to);
                    }
                    None => to.copy_from_slice(from),
                }
                if let Some(rope) = rope {
                    rotate(to, &rope, positions[r] as usize, false);
                }
            }
            let v = shape.v_at(0);
            to[v..].copy_from_slice(&from[v..]);
        }
    });
}

/// Turns dqkv, the gradient for [`qk_rope`]'s output, into the gradient for its input, in place; adds to the weights' gradients
/// in row order, heads ascending.
pub fn qk_rope_backward(
    pool: &Pool,
    shape: &AttnShape,
    qkv_in: &[f32],
    norm: Option<QkNorm>,
    rope: Option<Rope>,
    positions: &[u32],
    dqkv: &mut [f32],
    dq_norm: Option<&mut [f32]>,
    dk_norm: Option<&mut [f32]>,
) {
    let (d, stride, m) = (shape.head_dim, shape.stride(), positions.len());
    assert_eq!(qkv_in.len(), m * stride, "qkv_in is [rows, (heads + 2 kv_heads) d]");
    assert_eq!(dqkv.len(), qkv_in.len(), "dqkv is like qkv_in");
    if let Some(rope) = rope {
        let grads = Shared::new(dqkv);
        pool.run(m.div_ceil(ROWS), |item| {
            for r in item * ROWS..((item + 1) * ROWS).min(m) {
                // SAFETY: each row belongs to one item.
                let row = unsafe { grads.part(r * stride, stride) };
                for head in row[..(shape.heads + shape.kv_heads) * d].chunks_exact_mut(d) {
                    rotate(head, &rope, positions[r] as usize, true);
                }
            }
        });
    }
    let Some(norm) = norm else { return };
    for (dw, heads) in [
        (dq_norm, 0..shape.heads), // queries
        (dk_norm, shape.heads..shape.heads + shape.kv_heads),
    ] {
        let Some(dw) = dw else { continue };
        for r in 0..m {
            for head in heads.clone() {
                let at = r * stride + head * d;
                let x = &qkv_in[at..][..d];
                weight_row_backward(x, &dqkv[at..][..d], row_scale(x, norm.eps), dw);
            }
        }
    }
    let grads = Shared::new(dqkv);
    pool.run(m.div_ceil(ROWS), |item| {
        let mut dx = vec![0.0; d];
        for r in item * ROWS..((item + 1) * ROWS).min(m) {
            for head in 0..shape.heads + shape.kv_heads {
                let at = r * stride + head * d;
                let x = &qkv_in[at..][..d];
                let w = if head < shape.heads { norm.q } else { norm.k };
                // SAFETY: each row belongs to one item.
                let dy = unsafe { grads.part(at, d) };
                dx.fill(0.0);
                norm_row_backward(x, w, row_scale(x, norm.eps), norm.offset, dy, &mut dx);
                dy.copy_from_slice(&dx);
            }
        }
    });
}

/// Rotates the pairs of one head by the angles of `position`, or back.
fn rotate(head: &mut [f32], rope: &Rope, position: usize, back: bool) {
    let half = rope.rot / 2;
    let cos = &rope.cos[position * half..][..half];
    let sin = &rope.sin[position * half..][..half];
    let (first, rest) = head.split_at_mut(half);
    for i in 0..half {
        let (a, b) = (first[i], rest[i]);
        let s = if back { -sin[i] } else { sin[i] };
        first[i] = a * cos[i] - b * s;
        rest[i] = b * cos[i] + a * s;
    }
}
