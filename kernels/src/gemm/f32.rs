//! f32 products: one register tile of R rows × 32 outputs for forward and both gradients.

use super::Write;
use crate::panel::PANEL;
use crate::pool::Pool;
use crate::shared::{Block, Shared};
use crate::simd::{LANES, Simd, simd_fn};

/// Rows that one work item multiplies with a panel: with k ≤ 1536 they stay in a 2 MiB L2 beside the panel.
const ROW_BLOCK: usize = 192;

/// Elements of a transposed part of the weights: 1 MiB, so that it is still in the caches when it is used.
const TRANSPOSED: usize = 256 * 1024;

/// Rows of a weight gradient that are added at a time: 576 inputs of them are half of a 2 MiB L2.
const GRADIENT_ROWS: usize = 384;

/// y[m, n] (+)= x[m, k]·Wᵀ for W in panels.
pub(super) fn forward(
    pool: &Pool,
    x: &[f32],
    m: usize,
    w: &[f32],
    n: usize,
    k: usize,
    y: &mut [f32],
    write: Write,
) {
    let left = View { start: x, row: k, step: 1 };
    multiply(pool, left, m, w, n, k, y, write);
}

/// dx[m, k] (+)= dy[m, n]·W: parts of W are transposed to panels of k, over which the chains run on.
pub(super) fn input_gradient(
    pool: &Pool,
    dy: &[f32],
    m: usize,
    w: &[f32],
    n: usize,
    k: usize,
    dx: &mut [f32],
    write: Write,
    scratch: &mut Vec<f32>,
) {
    let panels = k.div_ceil(PANEL);
    let part = (TRANSPOSED / (panels * PANEL).max(1)).next_multiple_of(PANEL);
    if write == Write::Set && n == 0 {
        dx.fill(0.0);
    }
    for from in (0..n).step_by(part) {
        let steps = part.min(n - from);
        scratch.resize(panels * PANEL * steps, 0.0);
        let transposed = Shared::new(scratch);
        pool.run(panels, |q| {
            // SAFETY: each panel of the transpose belongs to one item.
            let to = unsafe { transposed.part(q * PANEL * steps, PANEL * steps) };
            transpose(w, k, from, q * PANEL, to);
        });
        let left = View { start: &dy[from..], row: n, step: 1 };
        let write = if from == 0 { write } else { Write::Add };
        multiply(pool, left, m, scratch, k, steps, dx, write);
    }
}

simd_fn! {
    /// to[i][lane] = W[from + i, column + lane] for 32 columns; zero beyond k.
    fn transpose<S>(w: &[f32], k: usize, from: usize, column: usize, to: &mut [f32]) {
        let lanes = PANEL.min(k - column);
        for (p, to) in to.chunks_mut(PANEL * PANEL).enumerate() {
            let panel = &w[((from / PANEL + p) * k + column) * PANEL..][..lanes * PANEL];
            for half in 0..2 {
                let (first, last) = (half * LANES, lanes.min(half * LANES + LANES));
                for i in (0..PANEL).step_by(LANES) {
                    let mut block = [S::splat(0.0); LANES];
                    for lane in first..last {
                        block[lane - first] = S::load(&panel[lane * PANEL + i..]);
                    }
                    S::transpose(&mut block);
                    for (row, block) in block.into_iter().enumerate() {
                        if let Some(to) = to.get_mut((i + row) * PANEL + first..).filter(|to| !to.is_empty()) {
                            S::store(block, &mut to[..LANES]);
                        }
                    }
                }
            }
        }
    }
}

/// dW[n, k] += dyᵀ·x. A panel of dy is packed to [rows][32]; then x plays the left factor, one tile of dW for 12 inputs.
pub(super) fn weight_gradient(
    pool: &Pool,
    dy: &[f32],
    x: &[f32],
    m: usize,
    n: usize,
    k: usize,
    dw_panels: &mut [f32],
) {
    let dw = Shared::new(dw_panels);
    // All panels take a block of rows before the next one, so that its part of x stays in the caches.
    for from in (0..m).step_by(GRADIENT_ROWS) {
        let rows = GRADIENT_ROWS.min(m - from);
        pool.run(n.div_ceil(PANEL), |p| {
            let lanes = PANEL.min(n - p * PANEL);
            let mut packed = [0.0; GRADIENT_ROWS * PANEL];
            for (r, to) in packed.chunks_exact_mut(PANEL).take(rows).enumerate() {
                to[..lanes].copy_from_slice(&dy[(from + r) * n + p * PANEL..][..lanes]);
            }
            // SAFETY: each panel belongs to one item.
            let panel = unsafe { dw.block(p * PANEL * k, PANEL, k, PANEL) };
            let left = View { start: &x[from * k..], row: 1, step: k };
            multiply_panel(left, &packed, rows, &panel, Write::Add);
        });
    }
}

fn multiply(
    pool: &Pool,
    left: View,
    m: usize,
    w: &[f32],
    n: usize,
    steps: usize,
    y: &mut [f32],
    write: Write,
) {
    let panels = n.div_ceil(PANEL);
    // Equal row blocks, so that no item is a sliver.
    let blocks = m.div_ceil(ROW_BLOCK);
    let block = if blocks == 0 { 0 } else { m.div_ceil(blocks) };
    // A few neighbouring panels an item where there are many: fewer, longer streams.
    let run = (panels * blocks / (pool.threads() * 8)).clamp(1, 8);
    let runs = panels.div_ceil(run);
    let y = Shared::new(y);
    pool.run(blocks * runs, |item| {
        let from = item / runs * block;
        let rows = block.min(m - from);
        for p in item % runs * run..(item % runs * run + run).min(panels) {
            let columns = PANEL.min(n - p * PANEL);
            let left = View { start: &left.start[from * left.row..], ..left };
            let w = &w[p * PANEL * steps..][..PANEL * steps];
            // SAFETY: these rows and columns belong to this item.
            let y = unsafe { y.block(from * n + p * PANEL, n, rows, columns) };
            multiply_panel(left, w, steps, &y, write);
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

/// Rows of the largest tile.
const MOST_ROWS: usize = 12;

simd_fn! {
    /// y[rows, ≤ 32] (+)= left[rows, steps]·w[steps, 32].
    fn multiply_panel<S>(left: View, w: &[f32], steps: usize, y: &Block<f32>, write: Write) {
        let rows = y.rows;
        assert!(rows == 0 || steps == 0 || (rows - 1) * left.row + (steps - 1) * left.step < left.start.len());
        assert!(steps * PANEL <= w.len() && y.columns <= PANEL);
        let tiles = rows.div_ceil(S::TILE_ROWS);
        let mut part = [0.0; MOST_ROWS * PANEL];
        for t in 0..tiles {
            // Equal tiles: 13 rows are 7 + 6.
            let (r, end) = (t * rows / tiles, (t + 1) * rows / tiles);
            let whole = y.columns == PANEL;
            if !whole && write == Write::Add {
                y.read(r, end - r, &mut part);
            }
            // SAFETY: the asserts above cover these rows of `left` and all of `w`; the block holds the rows of y.
            unsafe {
                let a = left.start.as_ptr().add(r * left.row);
                let (c, c_row) = if whole { (y.row_start(r), y.stride) } else { (part.as_mut_ptr(), PANEL) };
                macro_rules! sizes {
                    ($($n:literal)+) => {
                        match end - r {
                            $($n => tile::<S, $n>(a, left.row, left.step, w.as_ptr(), steps, c, c_row, write),)+
                            _ => unreachable!("tiles have 1 to 12 rows"),
                        }
                    };
                }
                sizes!(1 2 3 4 5 6 7 8 9 10 11 12);
            }
            if !whole {
                y.write(r, end - r, &part);
            }
        }
    }
}

/// R rows × 32 outputs in registers, over all steps.
///
/// # Safety
/// `a` is readable at `i·a_row + t·a_step` for i < R, t < steps; `w` for 32·steps; 32 elements at `c + i·c_row` are the caller's.
#[inline(always)]
unsafe fn tile<S: Simd, const R: usize>(
    a: *const f32,
    a_row: usize,
    a_step: usize,
    w: *const f32,
    steps: usize,
    c: *mut f32,
    c_row: usize,
    write: Write,
) {
    // SAFETY: promised by the caller.
    unsafe {
        let mut sums = [[S::splat(0.0); 2]; R];
        if write == Write::Add {
            for i in 0..R {
                sums[i] = [S::read(c.add(i * c_row)), S::read(c.add(i * c_row + LANES))];
            }
        }
        for t in 0..steps {
            let w0 = S::read(w.add(t * PANEL));
            let w1 = S::read(w.add(t * PANEL + LANES));
            for i in 0..R {
                let x = S::splat(*a.add(i * a_row + t * a_step));
                sums[i][0] = S::fma(x, w0, sums[i][0]);
                sums[i][1] = S::fma(x, w1, sums[i][1]);
            }
        }
        for i in 0..R {
            S::write(sums[i][0], c.add(i * c_row));
            S::write(sums[i][1], c.add(i * c_row + LANES));
        }
    }
}
