//! bf16 numbers as their 16 bits, and weight panels in bf16.
//!
//! A bf16 panel holds two consecutive inputs of an output next to each other, as the dot-product instructions want them:
//! element (i, j) of [n, k] is at `((i / 32)·⌈k/2⌉ + j / 2)·64 + (i % 32)·2 + j % 2`. Padding is zero.

use crate::panel::{PANEL, panels_len};
use crate::pool::Pool;
use crate::shared::Shared;

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

/// The f32 of a bf16 number.
#[inline(always)]
pub(crate) fn widen(x: u16) -> f32 {
    f32::from_bits(u32::from(x) << 16)
}

/// Rounds f32 panels of an [n, k] matrix to bf16 panels, to nearest even.
pub fn to_bf16_panels(pool: &Pool, panels: &[f32], n: usize, k: usize, out: &mut [u16]) {
    assert_eq!(panels.len(), panels_len(n, k), "panels of [n, k]");
    assert_eq!(out.len(), bf16_panels_len(n, k), "bf16 panels of [n, k]");
    let pairs = k.div_ceil(2);
    let out = Shared::new(out);
    pool.run(n.div_ceil(PANEL), |p| {
        let from = &panels[p * PANEL * k..][..PANEL * k];
        // SAFETY: each panel belongs to one item.
        let to = unsafe { out.part(p * pairs * PANEL * 2, pairs * PANEL * 2) };
        for (j, group) in to.chunks_exact_mut(PANEL * 2).enumerate() {
            let even = &from[2 * j * PANEL..][..PANEL];
            let odd = from.get((2 * j + 1) * PANEL..(2 * j + 2) * PANEL).unwrap_or(&[0.0; PANEL]);
            for lane in 0..PANEL {
                group[2 * lane] = round(even[lane]);
                group[2 * lane + 1] = round(odd[lane]);
            }
        }
    });
}
