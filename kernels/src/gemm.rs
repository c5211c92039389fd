//! Linear layers on panels: forward, input gradient and weight gradient, all with one register tile.
//!
//! The tile holds R rows × 32 outputs and walks the summed dimension from first to last, so an output element is one chain of
//! fused multiply-adds, c ← a·w + c, that starts at zero or at the stored value. Cutting the walk and storing between the
//! pieces changes no bit; neither does the choice of R, of threads or of blocks.

use crate::bf16::{bf16_panels_len, round, widen};
use crate::panel::{PANEL, panels_len};
use crate::pool::Pool;
use crate::shared::Shared;
use crate::simd::{Simd, simd_fn};

/// An [n, k] weight matrix (n outputs, k inputs) in panels.
#[derive(Clone, Copy, Debug)]
pub struct Matrix<'a> {
    /// Outputs.
    pub n: usize,
    /// Inputs.
    pub k: usize,
    /// [`panels_len`] numbers.
    pub f32: &'a [f32],
    /// [`bf16_panels_len`] numbers; where present, products are made in bf16 and summed in f32.
    pub bf16: Option<&'a [u16]>,
}

impl Matrix<'_> {
    fn check(&self) {
        match self.bf16 {
            Some(bf16) => assert_eq!(bf16.len(), bf16_panels_len(self.n, self.k), "bf16 panels of [n, k]"),
            None => assert_eq!(self.f32.len(), panels_len(self.n, self.k), "panels of [n, k]"),
        }
    }
}

/// Whether an output is overwritten, or the chain of sums starts at the stored value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Write {
    /// Start at zero.
    Set,
    /// Start at the stored value.
    Add,
}

/// y[m, n] = x[m, k]·Wᵀ. With bf16 weights x is rounded to bf16 and sums are f32.
pub fn linear(pool: &Pool, x: &[f32], m: usize, w: Matrix, y: &mut [f32], write: Write) {
    w.check();
    assert_eq!(x.len(), m * w.k, "x is [m, k]");
    assert_eq!(y.len(), m * w.n, "y is [m, n]");
    match w.bf16 {
        Some(bf16) => {
            let rounded: Vec<f32> = x.iter().map(|&x| widen(round(x))).collect();
            let mut wide = vec![0.0; panels_len(w.n, w.k)];
            widen_panels(pool, bf16, w.n, w.k, &mut wide);
            multiply(pool, &rounded, m, &wide, w.n, w.k, y, write);
        }
        None => multiply(pool, x, m, w.f32, w.n, w.k, y, write),
    }
}

/// dx[m, k] = dy[m, n]·W, summed over n ascending. With bf16 weights dy is rounded to bf16 and sums are f32.
pub fn linear_dx(
    pool: &Pool,
    dy: &[f32],
    m: usize,
    w: Matrix,
    dx: &mut [f32],
    write: Write,
    scratch: &mut Vec<f32>,
) {
    w.check();
    assert_eq!(dy.len(), m * w.n, "dy is [m, n]");
    assert_eq!(dx.len(), m * w.k, "dx is [m, k]");
    let mut wide = Vec::new();
    let panels = match w.bf16 {
        Some(bf16) => {
            wide.resize(panels_len(w.n, w.k), 0.0);
            widen_panels(pool, bf16, w.n, w.k, &mut wide);
            &wide
        }
        None => w.f32,
    };
    scratch.clear();
    scratch.resize(panels_len(w.k, w.n), 0.0);
    let transposed = Shared::new(scratch);
    pool.run(w.k.div_ceil(PANEL), |q| {
        // SAFETY: each panel of the transpose belongs to one item.
        let to = unsafe { transposed.part(q * PANEL * w.n, PANEL * w.n) };
        for i in 0..w.n {
            let panel = &panels[i / PANEL * PANEL * w.k..];
            for (lane, t) in to[i * PANEL..][..PANEL.min(w.k - q * PANEL)].iter_mut().enumerate() {
                *t = panel[(q * PANEL + lane) * PANEL + i % PANEL];
            }
        }
    });
    if w.bf16.is_some() {
        let rounded: Vec<f32> = dy.iter().map(|&x| widen(round(x))).collect();
        multiply(pool, &rounded, m, scratch, w.k, w.n, dx, write);
    } else {
        multiply(pool, dy, m, scratch, w.k, w.n, dx, write);
    }
}

/// dW[n, k] += dyᵀ[n, m]·x[m, k] in panels: rows are added one after another to the stored value, so that splitting them into
/// several calls gives the same bits. With `bf16` both sides are rounded to bf16 first and sums are f32.
#[allow(clippy::too_many_arguments)]
pub fn linear_dw(
    pool: &Pool,
    dy: &[f32],
    x: &[f32],
    m: usize,
    n: usize,
    k: usize,
    dw_panels: &mut [f32],
    bf16: bool,
) {
    assert_eq!(dy.len(), m * n, "dy is [m, n]");
    assert_eq!(x.len(), m * k, "x is [m, k]");
    assert_eq!(dw_panels.len(), panels_len(n, k), "panels of [n, k]");
    let rounded: Vec<f32>;
    let x = if bf16 {
        rounded = x.iter().map(|&x| widen(round(x))).collect();
        &rounded
    } else {
        x
    };
    let dw = Shared::new(dw_panels);
    pool.run(n.div_ceil(PANEL), |p| {
        let mut column = vec![0.0; m * PANEL];
        let lanes = PANEL.min(n - p * PANEL);
        for (r, to) in column.chunks_exact_mut(PANEL).enumerate() {
            let from = &dy[r * n + p * PANEL..][..lanes];
            for (t, d) in to.iter_mut().zip(from) {
                *t = if bf16 { widen(round(*d)) } else { *d };
            }
        }
        // SAFETY: each panel belongs to one item.
        let panel = unsafe { dw.part(p * PANEL * k, PANEL * k) };
        let view = View { start: x, row: 1, step: k };
        rows_by_panel(view, k, &column, m, panel, Write::Add);
    });
}

fn widen_panels(pool: &Pool, bf16: &[u16], n: usize, k: usize, out: &mut [f32]) {
    let out = Shared::new(out);
    let pairs = k.div_ceil(2);
    pool.run(n.div_ceil(PANEL), |p| {
        // SAFETY: each panel belongs to one item.
        let to = unsafe { out.part(p * PANEL * k, PANEL * k) };
        for (j, to) in to.chunks_exact_mut(PANEL).enumerate() {
            let from = &bf16[(p * pairs + j / 2) * PANEL * 2..][..PANEL * 2];
            to.iter_mut().enumerate().for_each(|(lane, t)| *t = widen(from[2 * lane + j % 2]));
        }
    });
}

/// y[m, n] (+)= x[m, k]·Wᵀ for W in f32 panels.
#[allow(clippy::too_many_arguments)]
fn multiply(pool: &Pool, x: &[f32], m: usize, w: &[f32], n: usize, k: usize, y: &mut [f32], write: Write) {
    let row_block = 240.min(m.max(1));
    let row_blocks = m.div_ceil(row_block);
    let panels = n.div_ceil(PANEL);
    let y = Shared::new(y);
    pool.run(row_blocks * panels, |item| {
        let (block, p) = (item / panels, item % panels);
        let from = block * row_block;
        let rows = row_block.min(m - from);
        let columns = PANEL.min(n - p * PANEL);
        for r in (0..rows).step_by(12) {
            let rows = 12.min(rows - r);
            let mut tile = [0.0; 12 * PANEL];
            let view = View { start: &x[(from + r) * k..], row: k, step: 1 };
            if write == Write::Add {
                for i in 0..rows {
                    // SAFETY: rows and columns of this item only.
                    let y = unsafe { y.part((from + r + i) * n + p * PANEL, columns) };
                    tile[i * PANEL..][..columns].copy_from_slice(y);
                }
            }
            rows_by_panel(view, rows, &w[p * PANEL * k..], k, &mut tile, Write::Add);
            for i in 0..rows {
                // SAFETY: rows and columns of this item only.
                let y = unsafe { y.part((from + r + i) * n + p * PANEL, columns) };
                y.copy_from_slice(&tile[i * PANEL..][..columns]);
            }
        }
    });
}

/// A matrix of left factors: element (row, step) at `row·self.row + step·self.step`.
#[derive(Clone, Copy)]
struct View<'a> {
    start: &'a [f32],
    row: usize,
    step: usize,
}

simd_fn! {
    /// c[rows, 32] (+)= a[rows, steps]·w[steps, 32]; rows of c are 32 apart.
    fn rows_by_panel<S>(a: View, rows: usize, w: &[f32], steps: usize, c: &mut [f32], write: Write) {
        assert!(rows * PANEL <= c.len());
        assert!(rows == 0 || steps == 0 || (rows - 1) * a.row + (steps - 1) * a.step < a.start.len());
        assert!(steps * PANEL <= w.len());
        let mut r = 0;
        while r < rows {
            let left = a.start.as_ptr().wrapping_add(r * a.row);
            let c = c[r * PANEL..].as_mut_ptr();
            let now = (rows - r).min(S::TILE_ROWS);
            macro_rules! sizes {
                ($($n:literal)+) => {
                    match now {
                        // SAFETY: the asserts above cover rows r..r + now of a and c, and all of w.
                        $($n => unsafe { tile::<S, $n>(left, a.row, a.step, w.as_ptr(), steps, c, write) },)+
                        _ => unreachable!("tiles have 1 to 12 rows"),
                    }
                };
            }
            sizes!(1 2 3 4 5 6 7 8 9 10 11 12);
            r += now;
        }
    }
}

/// R rows × 32 outputs in registers, over all steps.
///
/// # Safety
/// `a` is readable at `i·a_row + t·a_step` for i < R, t < steps; `w` for 32·steps; `c` is writable for 32·R.
#[inline(always)]
unsafe fn tile<S: Simd, const R: usize>(
    a: *const f32,
    a_row: usize,
    a_step: usize,
    w: *const f32,
    steps: usize,
    c: *mut f32,
    write: Write,
) {
    // SAFETY: promised by the caller.
    unsafe {
        let mut sums = [[S::splat(0.0); 2]; R];
        if write == Write::Add {
            for i in 0..R {
                sums[i] = [S::read(c.add(i * PANEL)), S::read(c.add(i * PANEL + 16))];
            }
        }
        for t in 0..steps {
            let w0 = S::read(w.add(t * PANEL));
            let w1 = S::read(w.add(t * PANEL + 16));
            for i in 0..R {
                let x = S::splat(*a.add(i * a_row + t * a_step));
                sums[i][0] = S::fma(x, w0, sums[i][0]);
                sums[i][1] = S::fma(x, w1, sums[i][1]);
            }
        }
        for i in 0..R {
            S::write(sums[i][0], c.add(i * PANEL));
            S::write(sums[i][1], c.add(i * PANEL + 16));
        }
    }
}
