//! Packing for f32 products: strips and panels from row-major matrices, and sums transposed back.

use crate::panel::PANEL;
use crate::shared::Block;
use crate::simd::{LANES, simd_fn};

/// Broadcast factors of a strip, the most rows of a register tile.
pub(super) const STRIP: usize = 12;

simd_fn! {
    /// to[column][row] = from[row·stride + column] for up to 32 rows and `columns` columns; zero for the other rows.
    pub(super) fn pack_columns<S>(from: &[f32], stride: usize, rows: usize, columns: usize, to: &mut [f32]) {
        assert!(rows <= PANEL && to.len() >= columns * PANEL);
        assert!(rows == 0 || (rows - 1) * stride + columns <= from.len());
        for (first, column) in (0..columns).step_by(LANES).flat_map(|column| [(0, column), (LANES, column)]) {
            let mut block = [S::splat(0.0); LANES];
            let count = rows.saturating_sub(first).min(LANES);
            if columns - column >= LANES {
                for (row, block) in block.iter_mut().enumerate().take(count) {
                    // SAFETY: inside the rows, as asserted.
                    *block = unsafe { S::read(from.as_ptr().add((first + row) * stride + column)) };
                }
                S::transpose(&mut block);
                for (i, block) in block.into_iter().enumerate() {
                    // SAFETY: inside the columns, as asserted.
                    unsafe { S::write(block, to.as_mut_ptr().add((column + i) * PANEL + first)) };
                }
                continue;
            }
            for (row, block) in block.iter_mut().enumerate().take(count) {
                *block = S::load(&from[(first + row) * stride + column..][..columns - column]);
            }
            S::transpose(&mut block);
            for (column, block) in (column..columns).zip(block) {
                S::store(block, &mut to[column * PANEL + first..][..LANES]);
            }
        }
    }
}

simd_fn! {
    /// to[strip][row][i] = from[row·stride + strip·width + i] for strips of `width` columns, 12 or 32; zero beyond `columns`.
    pub(super) fn pack_rows<S>(from: &[f32], stride: usize, rows: usize, columns: usize, width: usize, to: &mut [f32]) {
        let strips = to.len() / (rows * width).max(1);
        assert!(rows == 0 || (rows - 1) * stride + columns.min(strips * width) <= from.len());
        for row in 0..rows {
            for strip in 0..strips {
                for first in (0..width).step_by(LANES) {
                    let column = strip * width + first;
                    let (start, at) = (row * stride + column, (strip * rows + row) * width + first);
                    // A store past the strip's width is overwritten by the next row.
                    if column + LANES <= columns && start + LANES <= from.len() && (first + LANES <= width || row + 1 < rows) {
                        // SAFETY: just checked, and inside the strips.
                        unsafe { S::write(S::read(from.as_ptr().add(start)), to.as_mut_ptr().add(at)) };
                        continue;
                    }
                    let count = columns.saturating_sub(column).min(width - first).min(LANES);
                    let end = at + (width - first).min(LANES);
                    to[at..end].fill(0.0);
                    if count > 0 {
                        to[at..at + count].copy_from_slice(&from[start..start + count]);
                    }
                }
            }
        }
    }
}

simd_fn! {
    /// sums[strip][column][row] = x[strip·32 + row][column]; zero beyond the last row.
    pub(super) fn transpose_in<S>(x: &Block<f32>, sums: &mut [f32]) {
        for (strip, sums) in sums.chunks_exact_mut(x.columns * PANEL).enumerate() {
            for (half, column) in (0..2).flat_map(|half| (0..x.columns).step_by(LANES).map(move |column| (half, column))) {
                let mut block = [S::splat(0.0); LANES];
                let first = strip * PANEL + half * LANES;
                for (row, block) in (first..x.rows).zip(&mut block) {
                    *block = S::load(x.row_part(row, column, (x.columns - column).min(LANES)));
                }
                S::transpose(&mut block);
                for (column, block) in (column..x.columns).zip(block) {
                    S::store(block, &mut sums[column * PANEL + half * LANES..][..LANES]);
                }
            }
        }
    }
}

simd_fn! {
    /// The reverse of [`transpose_in`].
    pub(super) fn transpose_out<S>(sums: &[f32], x: &Block<f32>) {
        for (strip, sums) in sums.chunks_exact(x.columns * PANEL).enumerate() {
            for (half, column) in (0..2).flat_map(|half| (0..x.columns).step_by(LANES).map(move |column| (half, column))) {
                let mut block = [S::splat(0.0); LANES];
                for (column, block) in (column..x.columns).zip(&mut block) {
                    *block = S::load(&sums[column * PANEL + half * LANES..][..LANES]);
                }
                S::transpose(&mut block);
                let first = strip * PANEL + half * LANES;
                for (row, block) in (first..x.rows).zip(block) {
                    // SAFETY: one part of the block is alive at a time.
                    S::store(block, unsafe { x.row_part_mut(row, column, (x.columns - column).min(LANES)) });
                }
            }
        }
    }
}
