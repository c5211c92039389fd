//! bf16 numbers as their 16 bits, weight panels in bf16, and products that sum them in f32.
//!
//! A bf16 panel holds two consecutive inputs of an output next to each other, as the hardware's dot products want them:
//! element (i, j) of [n, k] is at `((i / 32)·⌈k/2⌉ + j / 2)·64 + (i % 32)·2 + j % 2`. Padding is zero. The left factor is
//! packed to tiles of 16 rows × 32 summands, [row tile][step][16][32], padded with zeros.

use std::cell::RefCell;
use std::sync::atomic::{AtomicU8, Ordering};

use super::Write;
use super::amx::{self, amx_is_usable};
use crate::buffer::Buffer;
use crate::isa::{Isa, isa};
use crate::panel::{PANEL, panels_len};
use crate::pool::Pool;
use crate::shared::{Block, Shared};
use crate::simd::{LANES, Simd, simd_fn};

/// Summands of one block of a bf16 sum.
pub const STEP: usize = 32;

/// Pairs of summands in a step.
const PAIRS: usize = STEP / 2;

/// Rows of a packed tile of left factors.
const TILE_ROWS: usize = 16;

/// Elements of a packed tile.
const TILE: usize = TILE_ROWS * STEP;

/// Elements of a step of a panel.
const PANEL_STEP: usize = PANEL * STEP;

/// Rows that one work item multiplies with a panel.
const ROW_BLOCK: usize = 256;

/// Elements of a transposed part of the weights: 2 MiB.
const TRANSPOSED: usize = 1024 * 1024;

/// Rows of a weight gradient that are packed at a time; a multiple of [`STEP`].
const GRADIENT_ROWS: usize = 1024;

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
    fn pair_rows<S>(from: &[f32], columns: usize, rows: usize, to: &mut [u16]) {
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

/// 16 elements of row r from column `at` on; zero beyond `rows` and `columns`.
#[inline(always)]
fn row_part<S: Simd>(x: &[f32], stride: usize, r: usize, rows: usize, at: usize, columns: usize) -> S::V {
    if r < rows && at < columns {
        S::load(&x[r * stride + at..r * stride + columns.min(at + LANES)])
    } else {
        S::splat(0.0)
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

/// dx[m, k] (+)= dy[m, n]·W: parts of W are transposed to panels of k, over which the sums run on.
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
    let part = (TRANSPOSED / (panels * PANEL).max(1)).next_multiple_of(STEP);
    if write == Write::Set && n == 0 {
        dx.fill(0.0);
    }
    PACKED.with_borrow_mut(|(left, right)| {
        for from in (0..n).step_by(part) {
            let len = part.min(n - from);
            let steps = len.div_ceil(STEP);
            pack_left(pool, dy, m, n, from, len, left);
            right.reserve(panels * steps * PANEL_STEP);
            let transposed = Shared::new(right);
            pool.run(panels, |q| {
                // SAFETY: each panel of the transpose belongs to one item.
                let to = unsafe { transposed.part(q * steps * PANEL_STEP, steps * PANEL_STEP) };
                transpose(w, k, from, q, to);
            });
            let right = Right { panels: right, pairs: steps * PAIRS };
            let write = if from == 0 { write } else { Write::Add };
            multiply(pool, left, m, right, k, Shared::new(dx), write);
        }
    });
}

/// dW[n, k] += dyᵀ·x. The tiles of the left factor hold x transposed, 16 inputs × 32 rows; dy becomes panels of pairs of rows.
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
    let (inputs, panels) = (k.div_ceil(TILE_ROWS), n.div_ceil(PANEL));
    PACKED.with_borrow_mut(|(left, right)| {
        for from in (0..m).step_by(GRADIENT_ROWS) {
            let rows = GRADIENT_ROWS.min(m - from);
            let steps = rows.div_ceil(STEP);
            left.reserve(inputs.next_multiple_of(2) * steps * TILE);
            right.reserve(panels * steps * PANEL_STEP);
            let (lefts, rights) = (Shared::new(left), Shared::new(right));
            pool.run(steps, |step| {
                let rows = STEP.min(rows - step * STEP);
                let first = from + step * STEP;
                for t in 0..inputs {
                    // SAFETY: each step of each tile belongs to one item.
                    let tile = unsafe { lefts.part((t * steps + step) * TILE, TILE) };
                    let columns = TILE_ROWS.min(k - t * TILE_ROWS);
                    transpose_rows(&x[first * k + t * TILE_ROWS..], k, rows, columns, tile);
                }
                for p in 0..panels {
                    // SAFETY: as above.
                    let to = unsafe { rights.part((p * steps + step) * PANEL_STEP, PANEL_STEP) };
                    let columns = PANEL.min(n - p * PANEL);
                    pair_strided_rows(&dy[first * n + p * PANEL..], n, rows, columns, to);
                }
            });
            let right = Right { panels: right, pairs: steps * PAIRS };
            let left = &left[..];
            // Long panels are cut so that there is work for all threads.
            let cut =
                if panels < 4 * pool.threads() { (inputs / 4).max(1).next_multiple_of(2) } else { inputs };
            let cuts = inputs.div_ceil(cut);
            pool.run(panels * cuts, |item| {
                let (p, first) = (item / cuts, item % cuts * cut);
                let end = k.min((first + cut) * TILE_ROWS);
                let rows = end - first * TILE_ROWS;
                // SAFETY: these inputs of this panel belong to this item.
                let to = unsafe { dw.block((p * k + first * TILE_ROWS) * PANEL, PANEL, rows, PANEL) };
                multiply_panel(&left[first * steps * TILE..], steps, right, p, to, Write::Add);
            });
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

simd_fn! {
    /// to[step][row][32] = rows of `len` elements in bf16, zero beyond.
    fn pack_tile<S>(x: &[f32], stride: usize, rows: usize, len: usize, to: &mut [u16]) {
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
    fn transpose_rows<S>(x: &[f32], stride: usize, rows: usize, columns: usize, to: &mut [u16]) {
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
    fn pair_strided_rows<S>(x: &[f32], stride: usize, rows: usize, columns: usize, to: &mut [u16]) {
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
    fn transpose<S>(w: &[u16], k: usize, from: usize, q: usize, to: &mut [u16]) {
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

/// Panels of pairs: [panel][pairs][32][2].
#[derive(Clone, Copy)]
struct Right<'a> {
    panels: &'a [u16],
    pairs: usize,
}

fn multiply(pool: &Pool, left: &[u16], m: usize, right: Right, n: usize, y: Shared<f32>, write: Write) {
    let panels = n.div_ceil(PANEL);
    let steps = right.pairs.div_ceil(PAIRS);
    // Equal row blocks of whole tile pairs.
    let blocks = m.div_ceil(ROW_BLOCK);
    let block = if blocks == 0 { 0 } else { m.div_ceil(blocks).next_multiple_of(2 * TILE_ROWS) };
    let run = (panels * blocks / (pool.threads() * 8)).clamp(1, 8);
    let runs = panels.div_ceil(run);
    pool.run(blocks * runs, |item| {
        let from = item / runs * block;
        let rows = block.min(m.saturating_sub(from));
        let left = &left[from.div_ceil(TILE_ROWS) * steps * TILE..];
        for p in item % runs * run..(item % runs * run + run).min(panels) {
            // SAFETY: these rows and columns belong to this item.
            let y = unsafe { y.block(from * n + p * PANEL, n, rows, PANEL.min(n - p * PANEL)) };
            multiply_panel(left, steps, right, p, y, write);
        }
    });
}

/// y (+)= left tiles · panel p, 32 rows at a time.
fn multiply_panel(left: &[u16], steps: usize, right: Right, p: usize, y: Block<f32>, write: Write) {
    let rule = bf16_rule();
    let panel = &right.panels[p * right.pairs * 2 * PANEL..][..right.pairs * 2 * PANEL];
    let whole = right.pairs / PAIRS;
    // A short last step is padded here, so that no rule reads beyond a panel.
    let mut tail = Aligned([0; PANEL_STEP]);
    tail.0[..panel.len() - whole * PANEL_STEP].copy_from_slice(&panel[whole * PANEL_STEP..]);
    #[cfg(target_arch = "x86_64")]
    // SAFETY: the rule is in use only where the machine has it.
    let tiles = (rule == Bf16Rule::Amx).then(|| unsafe { amx::Tiles::new() });
    let mut part = Aligned([0.0f32; 2 * TILE_ROWS * PANEL]);
    for r in (0..y.rows).step_by(2 * TILE_ROWS) {
        let rows = (2 * TILE_ROWS).min(y.rows - r);
        let count = rows.div_ceil(TILE_ROWS);
        let left = &left[r / TILE_ROWS * steps * TILE..][..count * steps * TILE];
        let in_place = y.columns == PANEL && rows == 2 * TILE_ROWS;
        if !in_place && write == Write::Add {
            y.read(r, rows, &mut part.0);
        }
        let (c, stride) = if in_place { (y.row_start(r), y.stride) } else { (part.0.as_mut_ptr(), PANEL) };
        let mut write = write;
        for (from, count, panel) in [(0, whole, panel), (whole, steps - whole, &tail.0)] {
            if count == 0 && (from > 0 || steps > 0) {
                continue;
            }
            let product = Product { left, steps, from, count, panel, c, stride, rows, write };
            match rule {
                #[cfg(target_arch = "x86_64")]
                Bf16Rule::Amx => product.amx(tiles.as_ref().expect("made above for this rule")),
                #[cfg(target_arch = "x86_64")]
                // SAFETY: the rule is in use only where the machine has the instruction.
                Bf16Rule::Dot => unsafe { dot(&product) },
                _ => fused(&product),
            }
            write = Write::Add;
        }
        if !in_place {
            y.write(r, rows, &part.0);
        }
    }
}

/// Steps `from..from + count` of up to 32 rows times 32 columns.
struct Product<'a> {
    /// One or two row tiles of `steps` steps.
    left: &'a [u16],
    steps: usize,
    from: usize,
    count: usize,
    /// From step `from` on.
    panel: &'a [u16],
    /// Rows of 32 elements that belong to the product: `rows` of them, or 32 where stride is [`PANEL`].
    c: *mut f32,
    stride: usize,
    rows: usize,
    write: Write,
}

impl Product<'_> {
    fn check(&self) {
        assert!(self.rows.div_ceil(TILE_ROWS) * self.steps * TILE <= self.left.len());
        assert!(self.from + self.count <= self.steps && self.count * PANEL_STEP <= self.panel.len());
    }

    #[cfg(target_arch = "x86_64")]
    fn amx(&self, tiles: &amx::Tiles) {
        self.check();
        let left = self.left[self.from * TILE..].as_ptr().cast();
        let (panel, c, stride) = (self.panel.as_ptr().cast(), self.c.cast(), self.stride * 4);
        // SAFETY: the sizes are checked; c holds 32 rows where `rows` is less, as it is then the padded copy.
        unsafe {
            if self.rows > TILE_ROWS {
                tiles.block(left, self.steps * amx::TILE, panel, self.count, c, stride, self.write);
            } else {
                tiles.half_block(left, panel, self.count, c, stride, self.write);
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bf16")]
fn dot(product: &Product) {
    use std::arch::x86_64::*;

    /// R rows × 32 columns in registers.
    ///
    /// # Safety
    /// As for [`Product`]; `left` is the first of R rows of a tile.
    #[target_feature(enable = "avx512f,avx512bf16")]
    unsafe fn rows<const R: usize>(product: &Product, left: *const u32, c: *mut f32) {
        // SAFETY: promised by the caller.
        unsafe {
            let mut sums = [[_mm512_setzero_ps(); 2]; R];
            if product.write == Write::Add {
                for (i, sum) in sums.iter_mut().enumerate() {
                    let c = c.add(i * product.stride);
                    *sum = [_mm512_loadu_ps(c), _mm512_loadu_ps(c.add(LANES))];
                }
            }
            let panel: *const i32 = product.panel.as_ptr().cast();
            for step in 0..product.count {
                let left = left.add((product.from + step) * TILE_ROWS * PAIRS);
                for pair in 0..PAIRS {
                    let w = panel.add((step * PAIRS + pair) * PANEL);
                    let w0: __m512bh = std::mem::transmute(_mm512_loadu_si512(w.cast()));
                    let w1: __m512bh = std::mem::transmute(_mm512_loadu_si512(w.add(LANES).cast()));
                    for (i, sum) in sums.iter_mut().enumerate() {
                        let x = _mm512_set1_epi32(*left.add(i * PAIRS + pair) as i32);
                        let x: __m512bh = std::mem::transmute(x);
                        *sum = [_mm512_dpbf16_ps(sum[0], x, w0), _mm512_dpbf16_ps(sum[1], x, w1)];
                    }
                }
            }
            for (i, sum) in sums.into_iter().enumerate() {
                let c = c.add(i * product.stride);
                _mm512_storeu_ps(c, sum[0]);
                _mm512_storeu_ps(c.add(LANES), sum[1]);
            }
        }
    }

    product.check();
    for r in (0..product.rows).step_by(8) {
        let left: *const u32 = product.left[r / TILE_ROWS * product.steps * TILE..].as_ptr().cast();
        // SAFETY: sizes are checked; rows r.. of c are the product's.
        unsafe {
            let left = left.add(r % TILE_ROWS * PAIRS);
            let c = product.c.add(r * product.stride);
            match (product.rows - r).min(8) {
                1 => rows::<1>(product, left, c),
                2 => rows::<2>(product, left, c),
                3 => rows::<3>(product, left, c),
                4 => rows::<4>(product, left, c),
                5 => rows::<5>(product, left, c),
                6 => rows::<6>(product, left, c),
                7 => rows::<7>(product, left, c),
                _ => rows::<8>(product, left, c),
            }
        }
    }
}

simd_fn! {
    fn fused<S>(product: &Product) {
        product.check();
        for r in (0..product.rows).step_by(2) {
            let left = product.left[r / TILE_ROWS * product.steps * TILE..].as_ptr();
            // SAFETY: sizes are checked; rows r.. of c are the product's.
            unsafe {
                let left: *const u32 = left.cast::<u32>().add(r % TILE_ROWS * PAIRS);
                let c = product.c.add(r * product.stride);
                if product.rows - r >= 2 {
                    fused_rows::<S, 2>(product, left, c);
                } else {
                    fused_rows::<S, 1>(product, left, c);
                }
            }
        }
    }
}

/// R rows × 32 columns in registers.
///
/// # Safety
/// As for [`Product`]; `left` is the first of R rows of a tile.
#[inline(always)]
unsafe fn fused_rows<S: Simd, const R: usize>(product: &Product, left: *const u32, c: *mut f32) {
    // SAFETY: promised by the caller.
    unsafe {
        let mut sums = [[S::splat(0.0); 2]; R];
        if product.write == Write::Add {
            for (i, sum) in sums.iter_mut().enumerate() {
                let c = c.add(i * product.stride);
                *sum = [S::read(c), S::read(c.add(LANES))];
            }
        }
        let panel: *const f32 = product.panel.as_ptr().cast();
        for step in 0..product.count {
            let left = left.add((product.from + step) * TILE_ROWS * PAIRS);
            for pair in 0..PAIRS {
                let w = panel.add((step * PAIRS + pair) * PANEL);
                for half in 0..2 {
                    let w = S::read(w.add(half * LANES));
                    let (even, odd) = (S::bf16_low(w), S::bf16_high(w));
                    for (i, sum) in sums.iter_mut().enumerate() {
                        let x = *left.add(i * PAIRS + pair);
                        let sum = &mut sum[half];
                        *sum = S::fma(S::splat(f32::from_bits(x & 0xffff_0000)), odd, *sum);
                        *sum = S::fma(S::splat(f32::from_bits(x << 16)), even, *sum);
                    }
                }
            }
        }
        for (i, sum) in sums.into_iter().enumerate() {
            let c = c.add(i * product.stride);
            S::write(sum[0], c);
            S::write(sum[1], c.add(LANES));
        }
    }
}

/// Starts at a cache line.
#[repr(align(64))]
struct Aligned<T>(T);
