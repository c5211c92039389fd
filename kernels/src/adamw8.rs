//! AdamW with moments in 8 bits: read, updated and coded again in one pass.
//!
//! Moments are held by blocks of [`MOMENT_BLOCK`] numbers: an f32 scale, the block's greatest magnitude, and a code a number, the
//! one of 256 values of the *dynamic map* (Dettmers et al. 2022, arXiv 2110.02861, sections 1.3 and 2.1): seven decades of
//! 0.1..1, each with twice as many evenly spaced values as the one below, signed for first moments, unsigned for second ones.
//!
//! Two things differ for second moments. They go to one of the two values beside them, each as likely as it is near, and not to
//! the nearest: they change by a thousandth a step, less than half of what lies between two codes, and would stay where they are.
//! The draw is a hash of step and place, so it is the same in every run. And one above zero is never coded as zero, since its root
//! is divided by.

use std::sync::LazyLock;

use crate::adamw::{AdamwStep, adamw_chunk};
use crate::pool::Pool;
use crate::shared::Shared;

/// Numbers that share a scale.
pub const MOMENT_BLOCK: usize = 256;

/// Blocks of one work item.
const BLOCKS: usize = 64;

/// Decades below 1 that the codes cover.
const DECADES: u32 = 7;

/// Greatest f32 exponent field below which every magnitude is nearest to the smallest values: 2^-24 < 1e-7.
const LEAST_EXPONENT: u32 = 127 - 24;

/// A code table and the way into it.
struct Map {
    /// Ascending, and infinity.
    values: [f32; 257],
    /// The greatest code at or below the smallest magnitude in a cell; cells are of one exponent and 7 bits of mantissa.
    first: Vec<u8>,
    /// Code of zero.
    zero: usize,
}

impl Map {
    fn new(signed: bool) -> Self {
        let mut values = vec![0.0f64, 1.0];
        for decade in 0..DECADES {
            let count = 1 << (decade + u32::from(!signed));
            let scale = 10f64.powi(decade as i32 + 1 - DECADES as i32);
            for i in 0..count {
                let value = scale * (0.1 + 0.9 * (f64::from(i) + 0.5) / f64::from(count));
                values.push(value);
                if signed {
                    values.push(-value);
                }
            }
        }
        values.sort_by(f64::total_cmp);
        values.push(f64::INFINITY);
        let values: [f32; 257] = std::array::from_fn(|i| values[i] as f32);
        let zero = values.iter().position(|&v| v == 0.0).expect("zero has a code");
        let start = |cell: u32| f32::from_bits((cell << 16) + (LEAST_EXPONENT << 23));
        let cells = (127 - LEAST_EXPONENT) * 128 + 1;
        let below = |x: f32| (values.partition_point(|v| *v <= x) - 1) as u8;
        let first = (0..cells).map(|cell| if cell == 0 { zero as u8 } else { below(start(cell)) }).collect();
        Self { values, first, zero }
    }

    /// The code of the value at or below `x` in 0..=1, or the next one: the nearer `x` is to it, the more of `u` in 0..1.
    #[inline(always)]
    fn beside(&self, x: f32, u: f32) -> usize {
        let cell = (x.to_bits() >> 16).saturating_sub(LEAST_EXPONENT << 7) as usize;
        let mut code = usize::from(self.first[cell.min(self.first.len() - 1)]);
        // a cell holds at most two values
        code += usize::from(self.values[code + 1] <= x);
        code += usize::from(self.values[code + 1] <= x);
        let (low, high) = (self.values[code], self.values[code + 1]);
        code + usize::from(x - low > u * (high - low))
    }
}

static SIGNED: LazyLock<Map> = LazyLock::new(|| Map::new(true));
static UNSIGNED: LazyLock<Map> = LazyLock::new(|| Map::new(false));

/// First and second moments of `len` numbers in 8 bits; a code of zero with a scale of zero is zero.
#[derive(Debug)]
pub struct MomentCodes<'a> {
    /// Codes of the first moments `[len]`.
    pub m: &'a mut [u8],
    /// Codes of the second moments `[len]`.
    pub v: &'a mut [u8],
    /// Scale of the first and of the second moments of each block, `[2 * len.div_ceil(MOMENT_BLOCK)]`.
    pub scales: &'a mut [f32],
}

/// As [`crate::adamw()`], with moments in 8 bits.
pub fn adamw8(pool: &Pool, w: &mut [f32], g: &[f32], moments: MomentCodes, p: &AdamwStep) {
    let n = w.len();
    let blocks = n.div_ceil(MOMENT_BLOCK);
    assert!(g.len() == n && moments.m.len() == n && moments.v.len() == n, "w, g, m, v have one length");
    assert_eq!(moments.scales.len(), 2 * blocks, "two scales a block");
    let (w, m, v) = (Shared::new(w), Shared::new(moments.m), Shared::new(moments.v));
    let scales = Shared::new(moments.scales);
    pool.run(blocks.div_ceil(BLOCKS), |item| {
        let (signed, unsigned) = (&*SIGNED, &*UNSIGNED);
        let (mut first, mut second) = ([0.0; MOMENT_BLOCK], [0.0; MOMENT_BLOCK]);
        for block in item * BLOCKS..((item + 1) * BLOCKS).min(blocks) {
            let from = block * MOMENT_BLOCK;
            let len = MOMENT_BLOCK.min(n - from);
            // SAFETY: each block belongs to one item.
            let (w, m, v, scales) = unsafe {
                (w.part(from, len), m.part(from, len), v.part(from, len), scales.part(2 * block, 2))
            };
            let (first, second) = (&mut first[..len], &mut second[..len]);
            decode(m, scales[0], signed, first);
            decode(v, scales[1], unsigned, second);
            adamw_chunk(w, &g[from..from + len], first, second, p);
            scales[0] = encode(first, signed, 0, |_| 0.5, m);
            let draws = Draws { step: p.step, from: from as u64 };
            scales[1] = encode(second, unsigned, 1, |i| draws.at(i), v);
        }
    });
}

/// The moments that codes stand for; `signed` for first moments. For tests and reports.
pub fn decode_moments(codes: &[u8], scales: impl Iterator<Item = f32>, signed: bool) -> Vec<f32> {
    let map = if signed { &*SIGNED } else { &*UNSIGNED };
    let mut out = vec![0.0; codes.len()];
    for ((codes, out), scale) in codes.chunks(MOMENT_BLOCK).zip(out.chunks_mut(MOMENT_BLOCK)).zip(scales) {
        decode(codes, scale, map, out);
    }
    out
}

fn decode(codes: &[u8], scale: f32, map: &Map, out: &mut [f32]) {
    for (out, &code) in out.iter_mut().zip(codes) {
        *out = map.values[usize::from(code)] * scale;
    }
}

/// Numbers in 0..1 by step and place.
#[derive(Clone, Copy)]
struct Draws {
    step: u64,
    from: u64,
}

impl Draws {
    /// The finaliser of MurmurHash3 (Appleby, public domain) over step and place.
    #[inline(always)]
    fn at(self, i: usize) -> f32 {
        let mut x = (self.from as u32).wrapping_add(i as u32) ^ (self.step as u32).wrapping_mul(0x9e37_79b1);
        x = (x ^ x >> 16).wrapping_mul(0x85eb_ca6b);
        x = (x ^ x >> 13).wrapping_mul(0xc2b2_ae35);
        (x ^ x >> 16) as f32 * (1.0 / 4_294_967_296.0)
    }
}

/// Codes a block and gives its scale; what is not zero is at least `least` codes from zero. A `draw` of a half gives the nearest.
#[inline(always)]
fn encode(x: &[f32], map: &Map, least: usize, draw: impl Fn(usize) -> f32, codes: &mut [u8]) -> f32 {
    let scale = x.iter().fold(0f32, |most, x| most.max(x.abs()));
    let inverse = 1.0 / scale;
    if !(scale > 0.0 && inverse.is_finite()) {
        // nothing, or less than a number has an inverse of
        codes.fill(map.zero as u8);
        return 0.0;
    }
    for (i, (code, &x)) in codes.iter_mut().zip(x).enumerate() {
        let away = map.beside((x.abs() * inverse).min(1.0), draw(i)) - map.zero;
        let away = if x == 0.0 { 0 } else { away.max(least) };
        *code = if x < 0.0 { map.zero - away.min(map.zero) } else { map.zero + away } as u8;
    }
    scale
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_maps_have_256_values_and_those_beside_a_number_are_found() {
        for signed in [true, false] {
            let map = Map::new(signed);
            assert!(map.values.windows(2).all(|v| v[0] < v[1]));
            assert_eq!((map.values[255], map.zero), (1.0, if signed { 127 } else { 0 }));
            // 0.55 is the only value of a signed decade of one: 0.1 + 0.9/2
            let smallest = if signed { 0.55e-6 } else { 0.325e-6 };
            assert!((map.values[map.zero + 1] - smallest).abs() < 1e-12);
            let mut x = 1e-9f32;
            while x <= 1.0 {
                let low = map.values.partition_point(|v| *v <= x) - 1;
                assert_eq!(map.beside(x, 0.999_999_9), low, "{x}");
                let draws = (0..2000).map(|i| map.values[map.beside(x, i as f32 / 2000.0)]);
                let mean = draws.map(f64::from).sum::<f64>() / 2000.0;
                let space = f64::from(map.values[low + 1] - map.values[low]);
                assert!((mean - f64::from(x)).abs() < space / 1000.0 + 1e-7, "{x}: {mean} in the mean");
                x *= 1.003;
            }
            assert_eq!((map.beside(0.0, 0.0), map.beside(1.0, 0.0)), (map.zero, 255));
        }
    }

    #[test]
    fn every_value_keeps_its_code_and_a_second_moment_is_never_lost() {
        for (map, least) in [(&*SIGNED, 0), (&*UNSIGNED, 1)] {
            let mut codes = [0; 256];
            let quarter: Vec<f32> = map.values[..256].iter().map(|v| v * 0.25).collect();
            let scale = encode(&quarter, map, least, |_| 0.3, &mut codes);
            assert_eq!(scale, 0.25);
            assert!(codes.iter().enumerate().all(|(i, &code)| i == usize::from(code)));
        }
        let mut codes = [9; 4];
        assert_eq!(encode(&[1e-20, 1.0, 0.0, 1e-30], &UNSIGNED, 1, |_| 0.5, &mut codes), 1.0);
        assert_eq!(codes, [1, 255, 0, 1]);
        assert_eq!(encode(&[0.0; 4], &UNSIGNED, 1, |_| 0.5, &mut codes), 0.0);
    }
}
