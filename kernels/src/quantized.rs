//! Frozen weights in 8 or 4 bits, and products with them.
//!
//! Every [`QUANT_BLOCK`] inputs of an output share one f32 scale, their greatest magnitude. An 8-bit code is a whole number of
//! scale/127 (to nearest); a 4-bit code names one of the 16 quantiles of a normal distribution (NF4: Dettmers et al. 2023,
//! arXiv 2305.14314, appendix E) times the scale. The layout is that of panels: for each input the 32 outputs of a panel, in 4
//! bits output i in the low half of byte i and output 16 + i in its high half.
//!
//! Products dequantise a few panels at a time into a piece of memory that stays in the caches and multiply with that, so they
//! give the bits that the dequantised matrix would give.

use std::cell::RefCell;
use std::ops::Range;

use crate::columns::take_columns;
use crate::gemm::{Matrix, Write, bf16_panels_len, linear, linear_dx, to_bf16_panels};
use crate::panel::{PANEL, panels_len};
use crate::pool::Pool;
use crate::shared::Shared;

/// Inputs that share a scale.
pub const QUANT_BLOCK: usize = 64;

/// Dequantised numbers that are alive at a time: 1 MiB.
const ALIVE: usize = 256 * 1024;

/// The values of the 4-bit codes.
pub const NF4: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

/// How a weight is coded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Code {
    /// 8 bits, evenly spaced.
    Int8,
    /// 4 bits, spaced as a normal distribution's quantiles.
    Nf4,
}

/// An [n, k] weight matrix in 8 or 4 bits.
#[derive(Clone, Debug)]
pub struct Quantized {
    n: usize,
    k: usize,
    code: Code,
    /// Multiply in bf16, as a [`Matrix`] with bf16 panels does.
    bf16: bool,
    /// `[panel][input][32 codes]`
    codes: Vec<u8>,
    /// `[panel][block of inputs][32]`
    scales: Vec<f32>,
}

impl Quantized {
    /// All zeros.
    pub fn zeros(n: usize, k: usize, code: Code) -> Self {
        let (panels, blocks) = (n.div_ceil(PANEL), k.div_ceil(QUANT_BLOCK));
        let codes = vec![0; panels * k * bytes_per_input(code)];
        Self { n, k, code, bf16: false, codes, scales: vec![0.0; panels * blocks * PANEL] }
    }

    /// Codes row-major `rows [n, k]`.
    pub fn new(pool: &Pool, rows: &[f32], n: usize, k: usize, code: Code) -> Self {
        assert_eq!(rows.len(), n * k, "rows are [n, k]");
        let mut out = Self::zeros(n, k, code);
        out.set_rows(pool, 0, rows);
        out
    }

    /// Codes whole rows from `first` on, which is the first of a panel and was zero.
    pub fn set_rows(&mut self, pool: &Pool, first: usize, rows: &[f32]) {
        let (k, code, width) = (self.k, self.code, bytes_per_input(self.code));
        let blocks = k.div_ceil(QUANT_BLOCK);
        assert!(first.is_multiple_of(PANEL), "row {first} is the first of no panel");
        assert!(k == 0 || first + rows.len() / k <= self.n, "rows beyond the matrix");
        let codes = Shared::new(&mut self.codes);
        let scales = Shared::new(&mut self.scales);
        pool.run(rows.len().div_ceil((PANEL * k).max(1)), |item| {
            let p = first / PANEL + item;
            // SAFETY: each panel belongs to one item.
            let codes = unsafe { codes.part(p * k * width, k * width) };
            // SAFETY: likewise.
            let scales = unsafe { scales.part(p * blocks * PANEL, blocks * PANEL) };
            let rows = &rows[item * PANEL * k..rows.len().min((item + 1) * PANEL * k)];
            for (lane, row) in rows.chunks_exact(k).enumerate() {
                code_row(row, code, lane, codes, scales);
            }
        });
    }

    /// Outputs.
    pub fn n(&self) -> usize {
        self.n
    }

    /// Inputs.
    pub fn k(&self) -> usize {
        self.k
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.codes.len() + 4 * self.scales.len()
    }

    /// Multiplies in bf16 from now on.
    pub fn use_bf16(&mut self) {
        self.bf16 = true;
    }

    /// The dequantised weights in panels.
    pub fn panels(&self, pool: &Pool) -> Vec<f32> {
        let mut out = vec![0.0; panels_len(self.n, self.k)];
        self.dequantize(pool, 0..self.n.div_ceil(PANEL), &mut out);
        out
    }

    /// Writes some panels to `out`.
    fn dequantize(&self, pool: &Pool, panels: Range<usize>, out: &mut [f32]) {
        let (k, width, blocks) = (self.k, bytes_per_input(self.code), self.k.div_ceil(QUANT_BLOCK));
        let out = Shared::new(out);
        pool.run(panels.len(), |item| {
            let p = panels.start + item;
            // SAFETY: each panel belongs to one item.
            let to = unsafe { out.part(item * PANEL * k, PANEL * k) };
            let codes = self.codes[p * k * width..][..k * width].chunks(QUANT_BLOCK * width);
            let scales = self.scales[p * blocks * PANEL..].chunks_exact(PANEL);
            for ((to, codes), scales) in to.chunks_mut(QUANT_BLOCK * PANEL).zip(codes).zip(scales) {
                let scales = scales.try_into().expect("a panel of scales");
                match self.code {
                    Code::Int8 => int8_block(codes, scales, to),
                    Code::Nf4 => nf4_block(codes, scales, to),
                }
            }
        });
    }

    /// Calls `with` for parts of the matrix, dequantised, in the order of its outputs.
    fn for_each_part(&self, pool: &Pool, mut with: impl FnMut(Range<usize>, Matrix, &mut Vec<f32>)) {
        let at_once = (ALIVE / (PANEL * self.k).max(1)).max(1);
        let panels = self.n.div_ceil(PANEL);
        let mut scratch = SCRATCH.take();
        for from in (0..panels).step_by(at_once) {
            let some = from..(from + at_once).min(panels);
            let outputs = some.start * PANEL..(some.end * PANEL).min(self.n);
            scratch.wide.resize(some.len() * PANEL * self.k, 0.0);
            self.dequantize(pool, some, &mut scratch.wide);
            let bf16 = self.bf16.then(|| {
                scratch.narrow.resize(bf16_panels_len(outputs.len(), self.k), 0);
                to_bf16_panels(pool, &scratch.wide, outputs.len(), self.k, &mut scratch.narrow);
                &scratch.narrow[..]
            });
            let part = Matrix { n: outputs.len(), k: self.k, f32: &scratch.wide, bf16, quantized: None };
            with(outputs, part, &mut scratch.columns);
        }
        SCRATCH.set(scratch);
    }

    /// As [`linear`].
    pub(crate) fn linear(&self, pool: &Pool, x: &[f32], m: usize, y: &mut [f32], write: Write) {
        if self.k == 0 && write == Write::Set {
            return y.fill(0.0);
        }
        let n = self.n;
        self.for_each_part(pool, |outputs, part, columns| {
            if outputs.len() == n {
                return linear(pool, x, m, part, y, write);
            }
            let width = outputs.len();
            columns.resize(m * width, 0.0);
            if write == Write::Add {
                take_columns(pool, y, n, outputs.start, m, width, 1.0, columns);
            }
            linear(pool, x, m, part, columns, write);
            let y = Shared::new(y);
            pool.run(m, |r| {
                // SAFETY: each row belongs to one item.
                let row = unsafe { y.part(r * n + outputs.start, width) };
                row.copy_from_slice(&columns[r * width..][..width]);
            });
        });
    }

    /// As [`linear_dx`].
    pub(crate) fn linear_dx(&self, pool: &Pool, dy: &[f32], m: usize, dx: &mut [f32], write: Write) {
        if self.n == 0 && write == Write::Set {
            return dx.fill(0.0);
        }
        let n = self.n;
        self.for_each_part(pool, |outputs, part, columns| {
            // the chains over the outputs run on from part to part
            let write = if outputs.start == 0 { write } else { Write::Add };
            if outputs.len() == n {
                return linear_dx(pool, dy, m, part, dx, write);
            }
            columns.resize(m * outputs.len(), 0.0);
            take_columns(pool, dy, n, outputs.start, m, outputs.len(), 1.0, columns);
            linear_dx(pool, columns, m, part, dx, write);
        });
    }
}

/// What a product with a quantised matrix works on.
#[derive(Default)]
struct Scratch {
    wide: Vec<f32>,
    narrow: Vec<u16>,
    columns: Vec<f32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

fn bytes_per_input(code: Code) -> usize {
    if code == Code::Int8 { PANEL } else { PANEL / 2 }
}

/// Codes one row into its lane of a panel.
fn code_row(row: &[f32], code: Code, lane: usize, codes: &mut [u8], scales: &mut [f32]) {
    let width = bytes_per_input(code);
    for (b, block) in row.chunks(QUANT_BLOCK).enumerate() {
        let most = block.iter().fold(0f32, |most, x| most.max(x.abs()));
        let scale = if code == Code::Int8 { most / 127.0 } else { most };
        scales[b * PANEL + lane] = scale;
        for (j, &x) in block.iter().enumerate() {
            let at = (b * QUANT_BLOCK + j) * width;
            match code {
                Code::Int8 => {
                    let steps = if scale > 0.0 { (x / scale).round_ties_even() } else { 0.0 };
                    codes[at + lane] = steps.clamp(-127.0, 127.0) as i8 as u8;
                }
                Code::Nf4 => {
                    let nearest = nearest_nf4(if scale > 0.0 { x / scale } else { 0.0 });
                    codes[at + lane % 16] |= nearest << (lane / 16 * 4);
                }
            }
        }
    }
}

/// The code of the nearest value; of two as near, the lower.
fn nearest_nf4(x: f32) -> u8 {
    (0..15).filter(|&c| f64::from(x) > (f64::from(NF4[c]) + f64::from(NF4[c + 1])) / 2.0).count() as u8
}

fn int8_block(codes: &[u8], scales: &[f32; PANEL], to: &mut [f32]) {
    for (codes, to) in codes.chunks_exact(PANEL).zip(to.chunks_exact_mut(PANEL)) {
        for ((to, &code), scale) in to.iter_mut().zip(codes).zip(scales) {
            *to = f32::from(code as i8) * scale;
        }
    }
}

fn nf4_block(codes: &[u8], scales: &[f32; PANEL], to: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    if crate::isa::isa() == crate::isa::Isa::Avx512 {
        // SAFETY: `isa` names a set only where the machine has it.
        return unsafe { nf4_block_avx512(codes, scales, to) };
    }
    for (codes, to) in codes.chunks_exact(PANEL / 2).zip(to.chunks_exact_mut(PANEL)) {
        for (i, &code) in codes.iter().enumerate() {
            to[i] = NF4[usize::from(code & 15)] * scales[i];
            to[i + 16] = NF4[usize::from(code >> 4)] * scales[i + 16];
        }
    }
}

/// The 16 values fill one register, so a look-up is one permutation of it.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn nf4_block_avx512(codes: &[u8], scales: &[f32; PANEL], to: &mut [f32]) {
    use std::arch::x86_64::*;
    // SAFETY: whole registers of f32 inside the arrays.
    let (table, low, high) = unsafe {
        (
            _mm512_loadu_ps(NF4.as_ptr()),
            _mm512_loadu_ps(scales.as_ptr()),
            _mm512_loadu_ps(scales[16..].as_ptr()),
        )
    };
    for (codes, to) in codes.chunks_exact(PANEL / 2).zip(to.chunks_exact_mut(PANEL)) {
        // SAFETY: 16 codes are read and 32 numbers written, the lengths of the chunks.
        unsafe {
            let codes = _mm512_cvtepu8_epi32(_mm_loadu_si128(codes.as_ptr().cast()));
            let first = _mm512_permutexvar_ps(codes, table);
            let second = _mm512_permutexvar_ps(_mm512_srli_epi32::<4>(codes), table);
            _mm512_storeu_ps(to.as_mut_ptr(), _mm512_mul_ps(first, low));
            _mm512_storeu_ps(to[16..].as_mut_ptr(), _mm512_mul_ps(second, high));
        }
    }
}
