//! From a row of logits to the distribution that tokens are drawn from, and its gradient.
//!
//! The sampler and the learner both call these functions, so a token's logprob is the same number on both sides. Filters follow
//! the order of Hugging Face transformers' logits processors: temperature, top-k, top-p, min-p.

use crate::math::{EXP_FLOOR, exp};
use crate::simd::{LANES, simd_fn};

/// How logits are turned into a distribution.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Warp {
    /// Logits are divided by this; positive.
    pub temperature: f32,
    /// Keep the k largest (and what ties with the last of them); 0: off.
    pub top_k: usize,
    /// Keep the smallest set of most likely tokens that holds this much probability; 1: off.
    pub top_p: f32,
    /// Keep what is at least this fraction as likely as the most likely; 0: off.
    pub min_p: f32,
}

/// What is needed beside the row to state probabilities.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RowStats {
    /// Log of the sum of exponentials: logprob(t) = row\[t\] − lse.
    pub lse: f32,
    /// Entropy of the distribution in nats.
    pub entropy: f32,
}

/// Turns logits into logits/temperature with excluded tokens at −inf, in place.
pub fn warp_row(row: &mut [f32], warp: &Warp, scratch: &mut Vec<(f32, u32)>) -> RowStats {
    if warp.temperature != 1.0 {
        divide(row, warp.temperature);
    }
    if warp.top_k > 0 && warp.top_k < row.len() {
        keep_top_k(row, warp.top_k, scratch);
    }
    if warp.top_p < 1.0 {
        keep_top_p(row, warp.top_p, scratch);
    }
    let largest = row_largest(row);
    if warp.min_p > 0.0 {
        let bound = f64::from(largest) + f64::from(warp.min_p).ln();
        row.iter_mut().filter(|x| f64::from(**x) < bound).for_each(|x| *x = f32::NEG_INFINITY);
    }
    let (sum, weighted) = exp_sums(row, largest);
    RowStats { lse: (f64::from(largest) + sum.ln()) as f32, entropy: (sum.ln() - weighted / sum) as f32 }
}

/// Excludes what is smaller than the k-th largest.
fn keep_top_k(row: &mut [f32], k: usize, scratch: &mut Vec<(f32, u32)>) {
    // The k-th largest of the largest of disjoint parts is no larger than the k-th largest of all.
    let part = (row.len() / (4 * k).max(512)).max(1);
    scratch.clear();
    scratch.extend(row.chunks(part).map(|part| (row_largest(part), 0)));
    let least = if scratch.len() > k {
        scratch.select_nth_unstable_by(k - 1, |a, b| b.0.total_cmp(&a.0)).1.0
    } else {
        f32::NEG_INFINITY
    };
    scratch.clear();
    scratch.extend(row.iter().zip(0..).filter(|(x, _)| **x >= least).map(|(x, i)| (*x, i)));
    if scratch.len() < k {
        // NaN compares with nothing; it stays for the caller to find.
        return;
    }
    let (_, kth, _) = scratch.select_nth_unstable_by(k - 1, |a, b| b.0.total_cmp(&a.0));
    let bound = kth.0;
    row.iter_mut().filter(|x| **x < bound).for_each(|x| *x = f32::NEG_INFINITY);
}

/// Excludes the least likely tokens while their probabilities sum to no more than 1 − p; of equals the lower id goes first.
fn keep_top_p(row: &mut [f32], p: f32, scratch: &mut Vec<(f32, u32)>) {
    let largest = row_largest(row);
    let (sum, _) = exp_sums(row, largest);
    let spare = (1.0 - f64::from(p)) * sum;
    let weight = |x: f32| (f64::from(x) - f64::from(largest)).exp();
    // All that is below this bound goes: even together it holds less than the spare mass.
    let bound = (f64::from(largest) + (spare / row.len() as f64).ln()) as f32;
    scratch.clear();
    let mut kept = 0.0;
    for (x, id) in row.iter_mut().zip(0..) {
        if *x >= bound || x.is_nan() {
            scratch.push((*x, id));
            kept += weight(*x);
        } else {
            *x = f32::NEG_INFINITY;
        }
    }
    let mut mass = (sum - kept).max(0.0);
    scratch.sort_unstable_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
    for &(x, id) in scratch.iter().take(scratch.len().saturating_sub(1)) {
        mass += weight(x);
        if mass > spare || mass.is_nan() {
            break;
        }
        row[id as usize] = f32::NEG_INFINITY;
    }
}

/// The token at quantile u of the distribution, u in [0, 1): inverse of the cumulative sum over ascending ids.
///
/// `row` and `lse` come from [`warp_row`]. Never an excluded token.
pub fn draw(row: &[f32], lse: f32, u: f64) -> u32 {
    const PARTS: usize = 64;
    let part = row.len().div_ceil(PARTS).next_multiple_of(LANES).max(LANES);
    let mut sums = [0.0; PARTS];
    for (sum, row) in sums.iter_mut().zip(row.chunks(part)) {
        *sum = exp_sums(row, lse).0;
    }
    let mut left = u * sums.iter().sum::<f64>();
    let mut chosen = 0;
    for (i, sum) in sums.iter().enumerate() {
        if *sum > 0.0 {
            chosen = i;
            if left < *sum {
                break;
            }
            left -= sum;
        }
    }
    let mut last = 0;
    for (id, x) in row.iter().enumerate().skip(chosen * part).take(part) {
        if *x == f32::NEG_INFINITY {
            continue;
        }
        let p = (f64::from(*x) - f64::from(lse)).exp();
        if p > 0.0 {
            last = id;
            if left < p {
                break;
            }
            left -= p;
        }
    }
    last as u32
}

/// The largest element's index; the lowest of equals; NaN is passed over; 0 where there is none.
pub fn argmax(row: &[f32]) -> u32 {
    let largest = row_largest(row);
    row.iter().position(|x| *x == largest).unwrap_or(0) as u32
}

/// Turns a row of [`warp_row`] into d loss / d raw logits, given d loss / d logprob(target) and d loss / d entropy.
///
/// d logprob(t) / d z_i = \[i = t\] − p_i and d entropy / d z_i = −p_i·(log p_i + entropy), both over the temperature.
pub fn row_backward(
    row: &mut [f32],
    stats: &RowStats,
    temperature: f32,
    target: u32,
    dlogp: f32,
    dentropy: f32,
) {
    backward(row, stats, temperature, dlogp, dentropy);
    row[target as usize] += dlogp / temperature;
}

simd_fn! {
    fn backward<S>(row: &mut [f32], stats: &RowStats, temperature: f32, dlogp: f32, dentropy: f32) {
        let lse = S::splat(stats.lse);
        let share = S::splat(1.0 / temperature);
        let (dlogp, dentropy, entropy) = (S::splat(dlogp), S::splat(dentropy), S::splat(stats.entropy));
        // Below this exp is 0; the bound keeps 0·inf out of excluded tokens.
        let floor = S::splat(2.0 * EXP_FLOOR);
        for i in (0..row.len()).step_by(LANES) {
            let logp = S::max(floor, S::sub(S::load(&row[i..]), lse));
            let slope = S::fma(dentropy, S::add(logp, entropy), dlogp);
            let d = S::mul(S::mul(exp::<S>(logp), slope), share);
            S::store(S::sub(S::splat(0.0), d), &mut row[i..]);
        }
    }
}

simd_fn! {
    fn divide<S>(row: &mut [f32], by: f32) {
        let by = S::splat(by);
        for i in (0..row.len()).step_by(LANES) {
            S::store(S::div(S::load(&row[i..]), by), &mut row[i..]);
        }
    }
}

simd_fn! {
    /// The largest element; NaN is passed over.
    fn row_largest<S>(row: &[f32]) -> f32 {
        let mut largest = S::splat(f32::NEG_INFINITY);
        let whole = row.len() / LANES * LANES;
        for i in (0..whole).step_by(LANES) {
            largest = S::max(S::load(&row[i..]), largest);
        }
        row[whole..].iter().fold(S::largest(largest), |a, b| a.max(*b))
    }
}

/// Elements whose exponentials are summed in f32 before they join the f64 sum.
const SUM_CHUNK: usize = 32 * LANES;

simd_fn! {
    /// Σ e^(x − offset) and Σ (x − offset)·e^(x − offset): f32 in 16 lanes by index mod 16 within a chunk, f64 over chunks.
    fn exp_sums<S>(row: &[f32], offset: f32) -> (f64, f64) {
        let offset = S::splat(offset);
        let floor = S::splat(2.0 * EXP_FLOOR);
        let (mut total, mut total_weighted) = (0.0, 0.0);
        for chunk in row.chunks(SUM_CHUNK) {
            let (mut sum, mut weighted) = (S::splat(0.0), S::splat(0.0));
            for i in (0..chunk.len()).step_by(LANES) {
                let x = if chunk.len() - i >= LANES {
                    S::load(&chunk[i..])
                } else {
                    let mut full = [f32::NEG_INFINITY; LANES];
                    full[..chunk.len() - i].copy_from_slice(&chunk[i..]);
                    S::load(&full)
                };
                let x = S::max(floor, S::sub(x, offset));
                let e = exp::<S>(x);
                sum = S::add(sum, e);
                weighted = S::fma(e, x, weighted);
            }
            total += f64::from(S::sum(sum));
            total_weighted += f64::from(S::sum(weighted));
        }
        (total, total_weighted)
    }
}
