//! f32 products: one register tile of up to 12 × 32 sums for forward and both gradients.
//!
//! The factor that a tile broadcasts lies in strips of 12, [step][12], the other one in panels, [step][32], so that both are read
//! from end to end. Forward packs x to strips; the weight gradient packs x to strips of 12 inputs and dy to panels. The input
//! gradient broadcasts the weights as they are and packs dy to panels of 32 rows: its sums are transposed at the end. Long sums
//! are cut so that a piece of a panel stays in L1 while strips pass; they wait in f32, which changes no bit.

use std::cell::RefCell;
use std::ops::Range;

use super::Write;
use super::f32_pack::{STRIP, pack_columns, pack_rows, transpose_in, transpose_out};
use super::f32_tile::{MOST_STEPS, across_panels, forward_panel, gradient_panel};
use crate::buffer::Buffer;
use crate::panel::PANEL;
use crate::pool::Pool;
use crate::shared::Shared;

/// Rows of a work item of the forward product: with k ≤ 1536 they stay in a 2 MiB L2 beside the panel.
const ROW_BLOCK: usize = 192;

/// Most rows of a weight gradient that are added at a time.
const GRADIENT_ROWS: usize = 192;

/// Elements of inputs of a weight gradient that are packed at a time: 1 MiB, so that they stay in L2.
const PACKED: usize = 1 << 18;

/// Rows of inputs that are packed together.
const CHUNK: usize = 16;

/// Most panels of a work item of the weight gradient.
const PANELS: usize = 4;

/// Rows of a work item of the input gradient.
const GRADIENT_BLOCK: usize = 128;

/// Most inputs of a work item of the input gradient: a piece of the weights stays in L2 beside the sums.
const GRADIENT_INPUTS: usize = 768;

thread_local! {
    /// Packed factors of the product that this thread has started.
    static LEFT: RefCell<Buffer<f32>> = RefCell::default();
    /// Rows that an item of a gradient has packed.
    static PACKED_ROWS: RefCell<Buffer<f32>> = RefCell::default();
    /// Sums of an item of the input gradient.
    static WAITING: RefCell<Buffer<f32>> = RefCell::default();
}

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
    let panels = n.div_ceil(PANEL);
    let blocks = m.div_ceil(ROW_BLOCK);
    // Equal row blocks, so that no item is a sliver.
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
            let panel = &w[p * PANEL * k..][..PANEL * k];
            let next = w.get((p + 1) * PANEL * k..).filter(|next| !next.is_empty()).unwrap_or(panel);
            // SAFETY: these rows and columns belong to this item.
            let y = unsafe { y.block(from * n + p * PANEL, n, rows, columns) };
            forward_panel(&x[from * k..], panel, next, k, &y, write);
        }
    });
}

/// dW[n, k] += dyᵀ·x.
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
    let strips = k.div_ceil(STRIP);
    let most = (PACKED / (strips * STRIP).max(1) / PANEL * PANEL).clamp(96, GRADIENT_ROWS);
    let panels = n.div_ceil(PANEL);
    let run = (panels / (pool.threads() * 4)).clamp(1, PANELS);
    LEFT.with_borrow_mut(|left| {
        // All panels take a block of rows before the next one, so that its part of x stays in the caches.
        for from in (0..m).step_by(most) {
            let rows = most.min(m - from);
            left.reserve(strips * STRIP * rows);
            let packed = Shared::new(left);
            pool.run(rows.div_ceil(CHUNK), |chunk| {
                let first = chunk * CHUNK;
                let count = CHUNK.min(rows - first);
                for strip in 0..strips {
                    let x = &x[(from + first) * k + strip * STRIP..];
                    // SAFETY: these rows of each strip belong to one item.
                    let to = unsafe { packed.part((strip * rows + first) * STRIP, count * STRIP) };
                    pack_rows(x, k, count, k - strip * STRIP, STRIP, to);
                }
            });
            let left: &[f32] = left;
            pool.run(panels.div_ceil(run), |item| {
                let some = item * run..panels.min((item + 1) * run);
                PACKED_ROWS.with_borrow_mut(|packed| {
                    packed.reserve(PANELS * GRADIENT_ROWS * PANEL);
                    let packed = &mut packed[..some.len() * rows * PANEL];
                    // Neighbouring panels together, as a row of each is no more than two lines of a page.
                    let dy = &dy[from * n + some.start * PANEL..];
                    pack_rows(dy, n, rows, n - some.start * PANEL, PANEL, packed);
                    for (p, panel) in some.zip(packed.chunks_exact(rows * PANEL)) {
                        // SAFETY: each panel belongs to one item.
                        let sums = unsafe { dw.block(p * PANEL * k, PANEL, k, PANEL) };
                        gradient_panel(left, panel, rows, &sums);
                    }
                });
            });
        }
    });
}

/// dx[m, k] (+)= dy[m, n]·W, whose sums run over n.
pub(super) fn input_gradient(
    pool: &Pool,
    dy: &[f32],
    m: usize,
    w: &[f32],
    n: usize,
    k: usize,
    dx: &mut [f32],
    write: Write,
) {
    if m == 0 || k == 0 {
        return;
    }
    let blocks = m.div_ceil(GRADIENT_BLOCK);
    let block = m.div_ceil(blocks).next_multiple_of(PANEL);
    // More items than threads, none of a sliver of inputs.
    let parts =
        k.div_ceil(GRADIENT_INPUTS).max((pool.threads() * 4).div_ceil(blocks).min(k / (8 * STRIP))).max(1);
    let part = k.div_ceil(parts).next_multiple_of(STRIP);
    let parts = k.div_ceil(part);
    let dx = Shared::new(dx);
    pool.run(blocks * parts, |item| {
        let rows = item / parts * block..m.min((item / parts + 1) * block);
        let inputs = item % parts * part..k.min((item % parts + 1) * part);
        if !rows.is_empty() {
            WAITING.with_borrow_mut(|sums| {
                PACKED_ROWS.with_borrow_mut(|packed| {
                    gradient_block(dy, rows, w, n, k, inputs, &dx, write, sums, packed);
                });
            });
        }
    });
}

/// Some inputs of the gradient of some rows.
fn gradient_block(
    dy: &[f32],
    rows: Range<usize>,
    w: &[f32],
    n: usize,
    k: usize,
    inputs: Range<usize>,
    dx: &Shared<f32>,
    write: Write,
    sums: &mut Buffer<f32>,
    packed: &mut Buffer<f32>,
) {
    // SAFETY: these rows and inputs belong to one item.
    let dx = unsafe { dx.block(rows.start * k + inputs.start, k, rows.len(), inputs.len()) };
    let strips = rows.len().div_ceil(PANEL);
    let stride = inputs.len() * PANEL;
    sums.reserve(strips * stride);
    packed.reserve(PANEL * MOST_STEPS);
    let sums = &mut sums[..strips * stride];
    match write {
        Write::Set => sums.fill(0.0),
        Write::Add => transpose_in(&dx, sums),
    }
    for from in (0..n).step_by(MOST_STEPS) {
        let steps = MOST_STEPS.min(n - from);
        let weights = &w[from * k..];
        for (s, sums) in sums.chunks_exact_mut(stride).enumerate() {
            let first = rows.start + s * PANEL;
            let count = PANEL.min(rows.end - first);
            let packed = &mut packed[..steps * PANEL];
            pack_columns(&dy[first * n + from..], n, count, steps, packed);
            across_panels(weights, k, inputs.clone(), packed, steps, count, sums, (s, strips));
        }
    }
    transpose_out(sums, &dx);
}
