//! Packing of bf16 factors: tiles of rows, tiles of transposed rows, pairs of rows, and panels transposed.

use super::bf16::{PAIRS, PANEL_STEP, STEP, TILE};
use crate::panel::PANEL;
use crate::simd::{LANES, Simd, simd_fn};

simd_fn! {
    /// to[step][row][32] = rows of `len` elements in bf16, zero beyond.
    pub(super) fn pack_tile<S>(x: &[f32], stride: usize, rows: usize, len: usize, to: &mut [u16]) {
        for (step, to) in to.chunks_exact_mut(TILE).enumerate() {
            for (r, to) in to.chunks_exact_mut(STEP).enumerate() {
                for half in 0..2 {
                    let at = step * STEP + half * LANES;
                    let v = if r < rows && at < len {
                        S::load(&x[r * stride + at..r * stride + len.min(at + LANES)])
                    } else {
                        S::splat(0.0)
                    };
                    // SAFETY: half of a row of 32.
                    unsafe { S::write_bf16(v, to.as_mut_ptr().add(half * LANES)) };
                }
            }
        }
    }
}

simd_fn! {
    /// to[column][row] = x[row][column] in bf16 for 16 columns and 32 rows, zero beyond `rows` and `columns`.
    pub(super) fn transpose_rows<S>(x: &[f32], stride: usize, rows: usize, columns: usize, to: &mut [u16]) {
        let mut pairs = [S::splat(0.0); LANES];
        for (i, pair) in pairs.iter_mut().enumerate() {
            *pair = S::pair_bf16(
                row_part::<S>(x, stride, 2 * i, rows, 0, columns),
                row_part::<S>(x, stride, 2 * i + 1, rows, 0, columns),
            );
        }
        S::transpose(&mut pairs);
        for (pair, to) in pairs.into_iter().zip(to.chunks_exact_mut(STEP)) {
            // SAFETY: 16 pairs of u16 are a row of the tile.
            unsafe { S::write(pair, to.as_mut_ptr().cast()) };
        }
    }
}

simd_fn! {
    /// to[row / 2][column][row % 2] = x[row][column] in bf16 for 32 rows and 32 columns, zero beyond `rows` and `columns`.
    pub(super) fn pair_strided_rows<S>(x: &[f32], stride: usize, rows: usize, columns: usize, to: &mut [u16]) {
        for (pair, to) in to.chunks_exact_mut(2 * PANEL).enumerate() {
            for (half, to) in to.chunks_exact_mut(2 * LANES).enumerate() {
                let both = S::pair_bf16(
                    row_part::<S>(x, stride, 2 * pair, rows, half * LANES, columns),
                    row_part::<S>(x, stride, 2 * pair + 1, rows, half * LANES, columns),
                );
                // SAFETY: 16 pairs of u16, the chunk.
                unsafe { S::write(both, to.as_mut_ptr().cast()) };
            }
        }
    }
}

simd_fn! {
    /// Panel q of the transpose of W[from.., ..]: to[step of 32 n][pair of n][32 k][2].
    pub(super) fn transpose<S>(w: &[u16], k: usize, from: usize, q: usize, to: &mut [u16]) {
        let pairs = k.div_ceil(2);
        let first = q * PAIRS;
        let count = PAIRS.min(pairs - first);
        for (step, to) in to.chunks_exact_mut(PANEL_STEP).enumerate() {
            let panel = &w[((from / PANEL + step) * pairs + first) * 2 * PANEL..][..count * 2 * PANEL];
            for half in 0..2 {
                let mut rows = [S::splat(0.0); LANES];
                for (row, panel) in rows.iter_mut().zip(panel.chunks_exact(2 * PANEL)) {
                    // SAFETY: 16 pairs of u16, half of the chunk.
                    *row = unsafe { S::read(panel[half * 2 * LANES..][..2 * LANES].as_ptr().cast()) };
                }
                // From [pair of k][n] to [n][pair of k]; two n are woven to pairs for the even and the odd k.
                S::transpose(&mut rows);
                for (i, n) in rows.chunks_exact(2).enumerate() {
                    let (lower, upper) = S::weave_bf16(n[0], n[1]);
                    let to = &mut to[(half * LANES / 2 + i) * 2 * PANEL..][..2 * PANEL];
                    // SAFETY: the two halves of a row of 32 pairs.
                    unsafe {
                        S::write(lower, to.as_mut_ptr().cast());
                        S::write(upper, to.as_mut_ptr().add(2 * LANES).cast());
                    }
                }
            }
        }
    }
}

/// 16 elements of row r from column `at` on; zero beyond `rows` and `columns`.
#[inline(always)]
pub(super) fn row_part<S: Simd>(
    x: &[f32],
    stride: usize,
    r: usize,
    rows: usize,
    at: usize,
    columns: usize,
) -> S::V {
    if r < rows && at < columns {
        S::load(&x[r * stride + at..r * stride + columns.min(at + LANES)])
    } else {
        S::splat(0.0)
    }
}
