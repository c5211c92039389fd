//! Linear layers on panels: forward, input gradient and weight gradient.
//!
//! **f32**: an output element is one chain of fused multiply-adds, c ← a·w + c, over the summed dimension from first to last; it
//! starts at zero or at the stored value. Cutting the walk and storing between the pieces changes no bit; neither does the
//! choice of tiles, threads or blocks.
//!
//! **bf16**: both factors are rounded to bf16 (to nearest even) and summed in f32, by blocks of [`STEP`] summands counted from
//! the start of the call (a short last block is filled with zeros). How a block is summed is the hardware's rule ([`Bf16Rule`]),
//! the same for every shape within a process. A weight gradient cut at multiples of [`STEP`] rows keeps its bits; one cut anywhere
//! does if the rows of an unfinished block wait for the next call ([`Waiting`]).

mod amx;
mod bf16;
mod bf16_pack;
mod bf16_product;
mod f32;
mod f32_pack;
mod f32_tile;

#[cfg(target_arch = "x86_64")]
pub(crate) use amx::Tiles;
pub use bf16::{Bf16Rule, STEP, bf16_panels_len, bf16_rule, select_bf16_rule, to_bf16_panels};
pub(crate) use bf16::{pair_rows, round};

use crate::panel::panels_len;
use crate::pool::Pool;
use crate::quantized::Quantized;

/// An [n, k] weight matrix (n outputs, k inputs) in panels.
#[derive(Clone, Copy, Debug)]
pub struct Matrix<'a> {
    /// Outputs.
    pub n: usize,
    /// Inputs.
    pub k: usize,
    /// [`panels_len`] numbers; may be empty where `bf16` is there.
    pub f32: &'a [f32],
    /// [`bf16_panels_len`] numbers; where present, products are made in bf16 and summed in f32.
    pub bf16: Option<&'a [u16]>,
    /// Where present, the weights are these, and the other two are empty.
    pub quantized: Option<&'a Quantized>,
}

impl Matrix<'_> {
    fn check(&self) {
        match (self.quantized, self.bf16) {
            (Some(quantized), _) => assert_eq!((quantized.n(), quantized.k()), (self.n, self.k), "[n, k]"),
            (_, Some(bf16)) => {
                assert_eq!(bf16.len(), bf16_panels_len(self.n, self.k), "bf16 panels of [n, k]")
            }
            (_, None) => assert_eq!(self.f32.len(), panels_len(self.n, self.k), "panels of [n, k]"),
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
    match (w.quantized, w.bf16) {
        (Some(quantized), _) => quantized.linear(pool, x, m, y, write),
        (_, Some(bf16)) => bf16::forward(pool, x, m, bf16, w.n, w.k, y, write),
        (_, None) => f32::forward(pool, x, m, w.f32, w.n, w.k, y, write),
    }
}

/// dx[m, k] = dy[m, n]·W, summed over n ascending. With bf16 weights dy is rounded to bf16 and sums are f32.
pub fn linear_dx(pool: &Pool, dy: &[f32], m: usize, w: Matrix, dx: &mut [f32], write: Write) {
    w.check();
    assert_eq!(dy.len(), m * w.n, "dy is [m, n]");
    assert_eq!(dx.len(), m * w.k, "dx is [m, k]");
    match (w.quantized, w.bf16) {
        (Some(quantized), _) => quantized.linear_dx(pool, dy, m, dx, write),
        (_, Some(bf16)) => bf16::input_gradient(pool, dy, m, bf16, w.n, w.k, dx, write),
        (_, None) => f32::input_gradient(pool, dy, m, w.f32, w.n, w.k, dx, write),
    }
}

/// dW[n, k] += dyᵀ[n, m]·x[m, k] in panels, starting from the stored values.
///
/// In f32 rows are added one after another, so that splitting them into several calls gives the same bits. With `bf16` both sides
/// are rounded to bf16 and rows are added by blocks of [`STEP`]: splits at multiples of it give the same bits.
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
    if bf16 {
        bf16::weight_gradient(pool, None, dy, x, m, n, k, dw_panels);
    } else {
        f32::weight_gradient(pool, dy, x, m, n, k, dw_panels);
    }
}

/// Rows of a bf16 weight gradient that wait for their block of [`STEP`] to fill, so that its bits do not depend on how the rows
/// were cut into calls.
#[derive(Clone, Debug)]
pub struct Waiting {
    n: usize,
    k: usize,
    dy: Vec<f32>,
    x: Vec<f32>,
}

impl Waiting {
    /// No rows, for a gradient of [n, k].
    pub fn new(n: usize, k: usize) -> Waiting {
        Waiting { n, k, dy: Vec::new(), x: Vec::new() }
    }

    /// Most bytes that rows for a gradient of [n, k] take.
    pub fn most_bytes(n: usize, k: usize) -> usize {
        STEP * (n + k) * size_of::<f32>()
    }

    /// Forgets the rows.
    pub fn clear(&mut self) {
        self.dy.clear();
        self.x.clear();
    }

    /// As [`linear_dw`] in bf16, except that the rows of the last, unfinished block wait here.
    pub fn linear_dw(&mut self, pool: &Pool, dy: &[f32], x: &[f32], m: usize, dw_panels: &mut [f32]) {
        let (n, k) = (self.n, self.k);
        assert_eq!(dy.len(), m * n, "dy is [m, n]");
        assert_eq!(x.len(), m * k, "x is [m, k]");
        assert_eq!(dw_panels.len(), panels_len(n, k), "panels of [n, k]");
        let waiting = self.dy.len() / n.max(1);
        // What fills the block that has begun, whole blocks, and what waits again.
        let filling = if waiting == 0 { 0 } else { m.min(STEP - waiting) };
        self.dy.extend_from_slice(&dy[..filling * n]);
        self.x.extend_from_slice(&x[..filling * k]);
        let full = waiting + filling == STEP;
        let end = filling + (m - filling) / STEP * STEP;
        if full || end > filling {
            let first = full.then_some((&self.dy[..], &self.x[..]));
            let (dy, x) = (&dy[filling * n..end * n], &x[filling * k..end * k]);
            bf16::weight_gradient(pool, first, dy, x, end - filling, n, k, dw_panels);
        }
        if full {
            self.clear();
        }
        self.dy.extend_from_slice(&dy[end * n..]);
        self.x.extend_from_slice(&x[end * k..]);
    }

    /// Adds the rows that wait, their block filled with zeros.
    pub fn finish(&mut self, pool: &Pool, dw_panels: &mut [f32]) {
        let rows = self.dy.len() / self.n.max(1);
        linear_dw(pool, &self.dy, &self.x, rows, self.n, self.k, dw_panels, true);
        self.clear();
    }
}
