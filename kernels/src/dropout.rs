//! Dropout with a mask that is a function of keys, not of when or where it is computed.

use crate::gemm::Write;
use crate::pool::Pool;
use crate::shared::Shared;

/// Rows of one work item.
const ROWS: usize = 8;

/// y[r, j] (+)= x[r, j]·keep(r, j) / (1 − rate) for x and y `[m, k]`, where keep is 0 with probability `rate` and 1 otherwise.
///
/// Whether an element is kept depends on `(keys[r], j)` alone, so any packing of the rows gives the same mask. The gradient
/// is the same function of the output's gradient.
pub fn dropout(pool: &Pool, x: &[f32], k: usize, rate: f32, keys: &[u64], y: &mut [f32], write: Write) {
    assert!((0.0..1.0).contains(&rate), "a dropout rate is in [0, 1), not {rate}");
    assert_eq!(x.len(), keys.len() * k, "x is [keys, k]");
    assert_eq!(y.len(), x.len(), "y is [keys, k]");
    let least = (f64::from(rate) * 2f64.powi(32)) as u32;
    let scale = 1.0 / (1.0 - rate);
    let y = Shared::new(y);
    pool.run(keys.len().div_ceil(ROWS), |item| {
        for r in item * ROWS..((item + 1) * ROWS).min(keys.len()) {
            // SAFETY: each row belongs to one item.
            let to = unsafe { y.part(r * k, k) };
            for (j, (to, x)) in to.iter_mut().zip(&x[r * k..]).enumerate() {
                let kept = if bits(keys[r], j as u32) >= least { x * scale } else { 0.0 };
                *to = if write == Write::Add { *to + kept } else { kept };
            }
        }
    });
}

/// 32 random bits for (key, j): two rounds of a 32-bit mixer with good avalanche (constants of C. Wellons' `lowbias32`).
fn bits(key: u64, j: u32) -> u32 {
    let mix = |mut h: u32| {
        h = (h ^ (h >> 16)).wrapping_mul(0x7feb_352d);
        h = (h ^ (h >> 15)).wrapping_mul(0x846c_a68b);
        h ^ (h >> 16)
    };
    mix(mix(j.wrapping_mul(0x9e37_79b9) ^ key as u32) ^ (key >> 32) as u32)
}
