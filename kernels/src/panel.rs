//! The panel layout of matrices: 32 outputs side by side for every input, so that a GEMM tile streams one contiguous piece.
//!
//! An [n, k] matrix (n outputs, k inputs) has `n.div_ceil(32)` panels of k×32; element (i, j) is at
//! `(i / 32)·32·k + j·32 + i % 32`. Rows beyond n are zero and stay zero.

use crate::pool::Pool;
use crate::shared::Shared;
use crate::simd::{LANES, simd_fn};

/// Outputs in a panel.
pub const PANEL: usize = 32;

/// Elements of an [n, k] matrix in panels, padding included.
pub fn panels_len(n: usize, k: usize) -> usize {
    n.div_ceil(PANEL) * PANEL * k
}

/// Packs row-major [n, k] into panels.
pub fn pack_panels(rows: &[f32], n: usize, k: usize, panels: &mut [f32]) {
    assert_eq!(rows.len(), n * k, "rows are [n, k]");
    assert_eq!(panels.len(), panels_len(n, k), "panels of [n, k]");
    if k == 0 {
        return;
    }
    for (rows, panel) in rows.chunks(PANEL * k).zip(panels.chunks_exact_mut(PANEL * k)) {
        pack_panel(rows, k, panel);
    }
}

simd_fn! {
    /// Packs up to 32 rows of k into one panel.
    fn pack_panel<S>(rows: &[f32], k: usize, panel: &mut [f32]) {
        let n = rows.len() / k;
        for first in [0, LANES] {
            for j in (0..k).step_by(LANES) {
                let mut block = [S::splat(0.0); LANES];
                for (row, block) in (first..n).zip(&mut block) {
                    *block = S::load(&rows[row * k + j..(row + 1) * k]);
                }
                S::transpose(&mut block);
                for (column, block) in (j..k).zip(block) {
                    S::store(block, &mut panel[column * PANEL + first..][..LANES]);
                }
            }
        }
    }
}

/// Unpacks panels into row-major [n, k].
pub fn unpack_panels(panels: &[f32], n: usize, k: usize, rows: &mut [f32]) {
    assert_eq!(rows.len(), n * k, "rows are [n, k]");
    assert_eq!(panels.len(), panels_len(n, k), "panels of [n, k]");
    for (i, row) in rows.chunks_exact_mut(k.max(1)).enumerate() {
        let panel = &panels[i / PANEL * PANEL * k..];
        for (j, x) in row.iter_mut().enumerate() {
            *x = panel[j * PANEL + i % PANEL];
        }
    }
}

/// `out[r]` = row `ids[r]` of the matrix; out is `[ids, k]`. The embedding lookup.
pub fn gather_rows(pool: &Pool, panels: &[f32], n: usize, k: usize, ids: &[u32], out: &mut [f32]) {
    assert_eq!(panels.len(), panels_len(n, k), "panels of [n, k]");
    assert_eq!(out.len(), ids.len() * k, "out is [ids, k]");
    const ROWS: usize = 8;
    let out = Shared::new(out);
    pool.run(ids.len().div_ceil(ROWS), |item| {
        for r in item * ROWS..((item + 1) * ROWS).min(ids.len()) {
            let id = ids[r] as usize;
            assert!(id < n, "row {id} of {n}");
            let panel = &panels[id / PANEL * PANEL * k..][..PANEL * k];
            // SAFETY: each row belongs to one item.
            let row = unsafe { out.part(r * k, k) };
            for (j, x) in row.iter_mut().enumerate() {
                *x = panel[j * PANEL + id % PANEL];
            }
        }
    });
}

/// d_panels\[ids\[r\]\] += d_rows\[r\], in row order, so that splitting the rows into several calls changes nothing.
pub fn scatter_add_rows(pool: &Pool, d_rows: &[f32], ids: &[u32], n: usize, k: usize, d_panels: &mut [f32]) {
    assert_eq!(d_panels.len(), panels_len(n, k), "panels of [n, k]");
    assert_eq!(d_rows.len(), ids.len() * k, "d_rows is [ids, k]");
    assert!(ids.iter().all(|&id| (id as usize) < n), "a row id beyond {n}");
    let columns = k.div_ceil(pool.threads() * 4).max(16);
    let d_panels = Shared::new(d_panels);
    pool.run(k.div_ceil(columns), |item| {
        let from = item * columns;
        let to = (from + columns).min(k);
        for (r, &id) in ids.iter().enumerate() {
            let (panel, lane) = (id as usize / PANEL, id as usize % PANEL);
            // SAFETY: each item owns columns from..to of every panel.
            let part = unsafe { d_panels.part((panel * k + from) * PANEL, (to - from) * PANEL) };
            for (j, d) in d_rows[r * k + from..r * k + to].iter().enumerate() {
                part[j * PANEL + lane] += d;
            }
        }
    });
}
