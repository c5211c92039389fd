//! bf16 numbers as their 16 bits, weight panels in bf16, and products that sum them in f32.
//!
//! A bf16 panel holds two consecutive inputs of an output next to each other, as the hardware's dot products want them:
//! element (i, j) of [n, k] is at `((i / 32)·⌈k/2⌉ + j / 2)·64 + (i % 32)·2 + j % 2`. Padding is zero. The left factor is
//! packed to tiles of 16 rows × 32 summands, [row tile][step][16][32], padded with zeros.

use std::cell::RefCell;
use std::sync::atomic::{AtomicU8, Ordering};

use super::Write;
#[cfg(target_arch = "x86_64")]
use super::amx::amx_is_usable;
use super::bf16_pack::{pack_tile, pair_strided_rows, row_part, transpose, transpose_rows};
use super::bf16_product::{FEW_ROWS, LEFT_BYTES, Right, multiply, multiply_into_panels, multiply_transposed};
use crate::buffer::Buffer;
use crate::isa::{Isa, isa};
use crate::panel::{PANEL, panels_len};
use crate::pool::Pool;
use crate::shared::Shared;
use crate::simd::{LANES, simd_fn};

/// Summands of one block of a bf16 sum.
pub const STEP: usize = 32;

/// Pairs of summands in a step.
pub(super) const PAIRS: usize = STEP / 2;

/// Rows of a packed tile of left factors.
pub(super) const TILE_ROWS: usize = 16;

/// Elements of a packed tile.
pub(super) const TILE: usize = TILE_ROWS * STEP;

/// Elements of a step of a panel.
pub(super) const PANEL_STEP: usize = PANEL * STEP;

/// Elements of a transposed part of the weights: 2 MiB.
const TRANSPOSED: usize = 1024 * 1024;

/// Blocks of rows of a weight gradient that are packed at a time.
const GRADIENT_STEPS: usize = 24;

/// How the summands of a step are added to an f32 sum.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bf16Rule {
    /// Pair after pair, two fused multiply-adds each, the odd summand first.
    Fused,
    /// `vdpbf16ps`: the same order with the instruction's own rounding; denormals count as zero.
    Dot,
    /// `tdpbf16ps`: even and odd summands of the step in two chains from zero, their sum is added; denormals count as zero.
    Amx,
}

impl Bf16Rule {
    /// Name as accepted by the environment variable `RFT_BF16`.
    pub fn name(self) -> &'static str {
        match self {
            Bf16Rule::Fused => "fused",
            Bf16Rule::Dot => "dot",
            Bf16Rule::Amx => "amx",
        }
    }

    /// Whether this machine, with the instruction set in use, can follow the rule.
    pub fn is_present(self) -> bool {
        match self {
            Bf16Rule::Fused => true,
            #[cfg(target_arch = "x86_64")]
            Bf16Rule::Dot => isa() == Isa::Avx512 && is_x86_feature_detected!("avx512bf16"),
            #[cfg(target_arch = "x86_64")]
            Bf16Rule::Amx => isa() == Isa::Avx512 && amx_is_usable(),
            #[cfg(not(target_arch = "x86_64"))]
            _ => false,
        }
    }
}

const RULES: [Bf16Rule; 3] = [Bf16Rule::Amx, Bf16Rule::Dot, Bf16Rule::Fused];

static CHOSEN: AtomicU8 = AtomicU8::new(0);

/// The rule in use: the fastest that the machine has, or what `RFT_BF16=amx|dot|fused` asks for.
///
/// A rule that is named but absent is reported on stderr once, and the fastest present one is used.
pub fn bf16_rule() -> Bf16Rule {
    let chosen = CHOSEN.load(Ordering::Relaxed);
    match RULES.get(usize::from(chosen).wrapping_sub(1)) {
        Some(rule) if rule.is_present() => *rule,
        _ => choose(),
    }
}

/// Makes all kernels of this process follow `rule` from now on; false, and no change, where it is absent.
pub fn select_bf16_rule(rule: Bf16Rule) -> bool {
    let present = rule.is_present();
    if present {
        CHOSEN.store(RULES.iter().position(|r| *r == rule).map_or(0, |i| i as u8 + 1), Ordering::Relaxed);
    }
    present
}

#[cold]
fn choose() -> Bf16Rule {
    let fastest = RULES.into_iter().find(|rule| rule.is_present()).unwrap_or(Bf16Rule::Fused);
    let rule = match std::env::var("RFT_BF16") {
        Err(_) => fastest,
        Ok(name) => match RULES.into_iter().find(|rule| rule.name() == name) {
            Some(rule) if rule.is_present() => rule,
            _ => {
                eprintln!(
                    "warning: RFT_BF16={name} is not available here\nhint: using {}; known are amx, dot, fused",
                    fastest.name()
                );
                fastest
            }
        },
    };
    select_bf16_rule(rule);
    rule
}

/// Elements of an [n, k] matrix in bf16 panels, padding included.
pub fn bf16_panels_len(n: usize, k: usize) -> usize {
    n.div_ceil(PANEL) * k.div_ceil(2) * PANEL * 2
}

/// Nearest bf16, ties to even; NaN stays NaN.
#[inline(always)]
pub(crate) fn round(x: f32) -> u16 {
    let bits = x.to_bits();
    if x.is_nan() {
        return (bits >> 16) as u16 | 0x40;
    }
    ((bits + 0x7fff + (bits >> 16 & 1)) >> 16) as u16
}

/// Rounds f32 panels of an [n, k] matrix to bf16 panels, to nearest even.
pub fn to_bf16_panels(pool: &Pool, panels: &[f32], n: usize, k: usize, out: &mut [u16]) {
    assert_eq!(panels.len(), panels_len(n, k), "panels of [n, k]");
    assert_eq!(out.len(), bf16_panels_len(n, k), "bf16 panels of [n, k]");
    let pairs = k.div_ceil(2);
    let out = Shared::new(out);
    pool.run(n.div_ceil(PANEL), |p| {
        // SAFETY: each panel belongs to one item.
        let to = unsafe { out.part(p * pairs * PANEL * 2, pairs * PANEL * 2) };
        pair_rows(&panels[p * PANEL * k..][..PANEL * k], PANEL, k, to);
    });
}

simd_fn! {
    /// to[row / 2][column][row % 2] = from[row][column] in bf16 for whole vectors of columns; a missing last row is zero.
    pub(crate) fn pair_rows<S>(from: &[f32], columns: usize, rows: usize, to: &mut [u16]) {
        assert!(columns.is_multiple_of(LANES) && from.len() >= rows * columns);
        for (pair, to) in to.chunks_exact_mut(2 * columns).enumerate() {
            for c in (0..columns).step_by(LANES) {
                let both = S::pair_bf16(
                    row_part::<S>(from, columns, 2 * pair, rows, c, columns),
                    row_part::<S>(from, columns, 2 * pair + 1, rows, c, columns),
                );
                // SAFETY: 16 pairs of u16 are 16 floats' bytes, inside the chunk.
                unsafe { S::write(both, to[2 * c..2 * c + 2 * LANES].as_mut_ptr().cast()) };
            }
        }
    }
}

thread_local! {
    /// Packed left and right factors of the product that this thread has started.
    static PACKED: RefCell<(Buffer<u16>, Buffer<u16>)> = RefCell::default();
}

/// y[m, n] (+)= x[m, k]·Wᵀ for W in bf16 panels.
pub(super) fn forward(
    pool: &Pool,
    x: &[f32],
    m: usize,
    w: &[u16],
    n: usize,
    k: usize,
    y: &mut [f32],
    write: Write,
) {
    PACKED.with_borrow_mut(|(left, _)| {
        pack_left(pool, x, m, k, 0, k, left);
        let right = Right { panels: w, pairs: k.div_ceil(2) };
        multiply(pool, left, m, right, n, Shared::new(y), write);
    });
}

/// dx[m, k] (+)= dy[m, n]·W: parts of W are transposed to panels of k, over which the sums run on. Few rows take
/// pieces that stay in L1, made by whoever uses them; many share parts that stay in L2.
pub(super) fn input_gradient(
    pool: &Pool,
    dy: &[f32],
    m: usize,
    w: &[u16],
    n: usize,
    k: usize,
    dx: &mut [f32],
    write: Write,
) {
    let panels = k.div_ceil(PANEL);
    let few = m <= FEW_ROWS;
    let parts = match few {
        true => (n * m.next_multiple_of(TILE_ROWS) * size_of::<u16>()).div_ceil(LEFT_BYTES),
        false => (n * panels * PANEL).div_ceil(TRANSPOSED),
    };
    // Equal parts of whole steps.
    let part = n.div_ceil(parts.max(1)).next_multiple_of(STEP).max(STEP);
    if write == Write::Set && n == 0 {
        dx.fill(0.0);
    }
    PACKED.with_borrow_mut(|(left, right)| {
        for from in (0..n).step_by(part) {
            let len = part.min(n - from);
            let steps = len.div_ceil(STEP);
            pack_left(pool, dy, m, n, from, len, left);
            let write = if from == 0 { write } else { Write::Add };
            if few {
                multiply_transposed(pool, left, m, w, k, from, steps, Shared::new(dx), write);
                continue;
            }
            right.reserve(panels * steps * PANEL_STEP);
            let transposed = Shared::new(right);
            pool.run(panels, |q| {
                // SAFETY: each panel of the transpose belongs to one item.
                let to = unsafe { transposed.part(q * steps * PANEL_STEP, steps * PANEL_STEP) };
                transpose(w, k, from, q, to);
            });
            let right = Right { panels: right, pairs: steps * PAIRS };
            multiply(pool, left, m, right, k, Shared::new(dx), write);
        }
    });
}

/// dW[n, k] += dyᵀ·x over the rows of `first`, a whole block or nothing, and then m more. The tiles of the left factor hold x
/// transposed, 16 inputs × 32 rows; dy becomes panels of pairs of rows.
pub(super) fn weight_gradient(
    pool: &Pool,
    first: Option<(&[f32], &[f32])>,
    dy: &[f32],
    x: &[f32],
    m: usize,
    n: usize,
    k: usize,
    dw_panels: &mut [f32],
) {
    let dw = Shared::new(dw_panels);
    let (inputs, panels) = (k.div_ceil(TILE_ROWS), n.div_ceil(PANEL));
    let all = usize::from(first.is_some()) + m.div_ceil(STEP);
    let block = |step: usize| match first {
        Some((dy, x)) if step == 0 => (dy, x, STEP),
        _ => {
            let from = (step - usize::from(first.is_some())) * STEP;
            (&dy[from * n..], &x[from * k..], STEP.min(m - from))
        }
    };
    PACKED.with_borrow_mut(|(left, right)| {
        for from in (0..all).step_by(GRADIENT_STEPS) {
            let steps = GRADIENT_STEPS.min(all - from);
            left.reserve(inputs.next_multiple_of(2) * steps * TILE);
            right.reserve(panels * steps * PANEL_STEP);
            let (lefts, rights) = (Shared::new(left), Shared::new(right));
            pool.run(steps, |step| {
                let (dy, x, rows) = block(from + step);
                for t in 0..inputs {
                    // SAFETY: each step of each tile belongs to one item.
                    let tile = unsafe { lefts.part((t * steps + step) * TILE, TILE) };
                    let columns = TILE_ROWS.min(k - t * TILE_ROWS);
                    transpose_rows(&x[t * TILE_ROWS..], k, rows, columns, tile);
                }
                for p in 0..panels {
                    // SAFETY: as above.
                    let to = unsafe { rights.part((p * steps + step) * PANEL_STEP, PANEL_STEP) };
                    let columns = PANEL.min(n - p * PANEL);
                    pair_strided_rows(&dy[p * PANEL..], n, rows, columns, to);
                }
            });
            let right = Right { panels: right, pairs: steps * PAIRS };
            multiply_into_panels(pool, left, k, right, n, dw);
        }
    });
}

/// Packs columns `from..from + len` of x[m, k] to tiles of 16 rows.
fn pack_left(pool: &Pool, x: &[f32], m: usize, k: usize, from: usize, len: usize, left: &mut Buffer<u16>) {
    let steps = len.div_ceil(STEP);
    let tiles = m.div_ceil(TILE_ROWS);
    // Products take two tiles at a time.
    left.reserve(tiles.next_multiple_of(2) * steps * TILE);
    let left = Shared::new(left);
    let pack = |t: usize| {
        // SAFETY: each row tile belongs to one item.
        let to = unsafe { left.part(t * steps * TILE, steps * TILE) };
        let rows = TILE_ROWS.min(m - t * TILE_ROWS);
        pack_tile(&x[t * TILE_ROWS * k + from..], k, rows, len, to);
    };
    // Below this the hand-over costs more than the work.
    if m * len < 16 * 1024 {
        (0..tiles).for_each(pack);
    } else {
        pool.run(tiles, pack);
    }
}
