//! RMS normalisation, alone and fused with the residual addition, and its gradient.
//!
//! y = x / sqrt(mean x² + eps) · (offset + w) (Zhang & Sennrich 2019, eq. 4; offset 1 is Gemma's form). A row's sum of
//! squares runs in 16 lanes by column mod 16, then one tree.

use crate::pool::Pool;
use crate::shared::Shared;
use crate::simd::{LANES, Simd, simd_fn};

/// Rows of one work item.
const ROWS: usize = 8;

/// `y[m, n]` = norm of each row of `x[m, n]`; w is `[n]`.
pub fn rms_norm(pool: &Pool, x: &[f32], w: &[f32], eps: f32, offset: f32, y: &mut [f32]) {
    norm(pool, x, w, eps, offset, y, None);
}

/// As [`rms_norm`], and `kept` becomes a copy of x in the same pass.
pub fn rms_norm_kept(
    pool: &Pool,
    x: &[f32],
    w: &[f32],
    eps: f32,
    offset: f32,
    y: &mut [f32],
    kept: &mut [f32],
) {
    norm(pool, x, w, eps, offset, y, Some(kept));
}

fn norm(pool: &Pool, x: &[f32], w: &[f32], eps: f32, offset: f32, y: &mut [f32], kept: Option<&mut [f32]>) {
    let m = rows(x.len(), w.len());
    assert_eq!(y.len(), x.len(), "y is [m, n]");
    assert!(kept.as_ref().is_none_or(|kept| kept.len() == x.len()), "kept is [m, n]");
    let n = w.len();
    let (y, kept) = (Shared::new(y), kept.map(Shared::new));
    pool.run(m.div_ceil(ROWS), |item| {
        for r in item * ROWS..((item + 1) * ROWS).min(m) {
            let x = &x[r * n..][..n];
            // SAFETY: each row belongs to one item.
            let y = unsafe { y.part(r * n, n) };
            norm_row(x, w, eps, offset, y);
            if let Some(kept) = kept {
                // SAFETY: as above.
                unsafe { kept.part(r * n, n) }.copy_from_slice(x);
            }
        }
    });
}

/// x += delta, then y = norm of each row of x; `kept` becomes a copy of the new x.
pub fn add_rms_norm(
    pool: &Pool,
    x: &mut [f32],
    delta: &[f32],
    w: &[f32],
    eps: f32,
    offset: f32,
    y: &mut [f32],
    kept: &mut [f32],
) {
    let m = rows(x.len(), w.len());
    assert_eq!(delta.len(), x.len(), "delta is [m, n]");
    assert_eq!(y.len(), x.len(), "y is [m, n]");
    assert_eq!(kept.len(), x.len(), "kept is [m, n]");
    let n = w.len();
    let (x, y, kept) = (Shared::new(x), Shared::new(y), Shared::new(kept));
    pool.run(m.div_ceil(ROWS), |item| {
        for r in item * ROWS..((item + 1) * ROWS).min(m) {
            // SAFETY: each row belongs to one item.
            let (x, y, kept) = unsafe { (x.part(r * n, n), y.part(r * n, n), kept.part(r * n, n)) };
            x.iter_mut().zip(&delta[r * n..]).for_each(|(x, d)| *x += d);
            norm_row(x, w, eps, offset, y);
            kept.copy_from_slice(x);
        }
    });
}

/// dx += the gradient for x; dw += the gradient for w, in row order.
pub fn rms_norm_backward(
    pool: &Pool,
    x: &[f32],
    w: &[f32],
    eps: f32,
    offset: f32,
    dy: &[f32],
    dx: &mut [f32],
    dw: Option<&mut [f32]>,
) {
    let n = w.len();
    let m = rows(x.len(), n);
    assert_eq!(dy.len(), x.len(), "dy is [m, n]");
    assert_eq!(dx.len(), x.len(), "dx is [m, n]");
    let dx = Shared::new(dx);
    let mut scales = vec![0.0; m];
    let shared_scales = Shared::new(&mut scales);
    pool.run(m.div_ceil(ROWS), |item| {
        for r in item * ROWS..((item + 1) * ROWS).min(m) {
            // SAFETY: each row belongs to one item.
            let (dx, scale) = unsafe { (dx.part(r * n, n), shared_scales.part(r, 1)) };
            scale[0] = row_scale(&x[r * n..][..n], eps);
            norm_row_backward(&x[r * n..][..n], w, scale[0], offset, &dy[r * n..][..n], dx);
        }
    });
    if let Some(dw) = dw {
        assert_eq!(dw.len(), n, "dw is [n]");
        let columns = n.div_ceil(pool.threads() * 2).next_multiple_of(LANES);
        let dw = Shared::new(dw);
        pool.run(if n == 0 { 0 } else { n.div_ceil(columns) }, |item| {
            let from = item * columns;
            let len = columns.min(n - from);
            // SAFETY: each column range belongs to one item.
            let sum = unsafe { dw.part(from, len) };
            for (r, scale) in scales.iter().enumerate() {
                weight_row_backward(&x[r * n + from..][..len], &dy[r * n + from..][..len], *scale, sum);
            }
        });
    }
}

fn rows(elements: usize, n: usize) -> usize {
    assert!(n > 0 && elements.is_multiple_of(n), "x is [m, {n}] but has {elements} elements");
    elements / n
}

simd_fn! {
    /// y = x·(1/sqrt(mean x² + eps))·(offset + w).
    pub(crate) fn norm_row<S>(x: &[f32], w: &[f32], eps: f32, offset: f32, y: &mut [f32]) {
        let scale = S::splat(scale_of::<S>(x, eps));
        let offset = S::splat(offset);
        for i in (0..x.len()).step_by(LANES) {
            let unit = S::mul(S::load(&x[i..]), scale);
            S::store(S::mul(unit, S::add(offset, S::load(&w[i..]))), &mut y[i..]);
        }
    }
}

simd_fn! {
    /// 1 / sqrt(mean x² + eps).
    pub(crate) fn row_scale<S>(x: &[f32], eps: f32) -> f32 {
        scale_of::<S>(x, eps)
    }
}

#[inline(always)]
fn scale_of<S: Simd>(x: &[f32], eps: f32) -> f32 {
    let mut squares = S::splat(0.0);
    for i in (0..x.len()).step_by(LANES) {
        let x = S::load(&x[i..]);
        squares = S::fma(x, x, squares);
    }
    1.0 / (S::sum(squares) / x.len() as f32 + eps).sqrt()
}

simd_fn! {
    /// dx += s·(g − x·s²·mean(g·x)) with g = dy·(offset + w) and s the row's scale.
    pub(crate) fn norm_row_backward<S>(x: &[f32], w: &[f32], scale: f32, offset: f32, dy: &[f32], dx: &mut [f32]) {
        let n = x.len();
        let offset = S::splat(offset);
        let mut dot = S::splat(0.0);
        for i in (0..n).step_by(LANES) {
            let g = S::mul(S::load(&dy[i..]), S::add(offset, S::load(&w[i..])));
            dot = S::fma(g, S::load(&x[i..]), dot);
        }
        let pull = S::splat(S::sum(dot) / n as f32 * scale * scale);
        let scale = S::splat(scale);
        for i in (0..n).step_by(LANES) {
            let g = S::mul(S::load(&dy[i..]), S::add(offset, S::load(&w[i..])));
            let inner = S::fnma(S::load(&x[i..]), pull, g);
            S::store(S::fma(scale, inner, S::load(&dx[i..])), &mut dx[i..]);
        }
    }
}

simd_fn! {
    /// dw += dy·x·scale.
    pub(crate) fn weight_row_backward<S>(x: &[f32], dy: &[f32], scale: f32, dw: &mut [f32]) {
        let scale = S::splat(scale);
        for i in (0..x.len()).step_by(LANES) {
            let unit = S::mul(S::load(&x[i..]), scale);
            S::store(S::fma(S::load(&dy[i..]), unit, S::load(&dw[i..])), &mut dw[i..]);
        }
    }
}
