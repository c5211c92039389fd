//! The AdamW and the plain update, with the weights' bf16 shadow in the same pass, and the sum of squares for the gradient norm.

use crate::gemm::pair_rows;
use crate::panel::PANEL;
use crate::pool::Pool;
use crate::shared::Shared;
use crate::simd::{LANES, simd_fn};

/// Elements of one work item; sums of squares are made per chunk, so this also fixes their order.
const CHUNK: usize = 16 * 1024;

/// Elements whose weights are rounded to bf16 while they are in L1: whole pairs of inputs of a panel.
const PART: usize = 32 * PANEL;

/// One AdamW step (Loshchilov & Hutter 2019, algorithm 2, as in `torch.optim.AdamW`).
#[derive(Clone, Copy, Debug)]
pub struct AdamwStep {
    /// Learning rate of this step.
    pub lr: f32,
    /// Decay of the first moment.
    pub beta1: f32,
    /// Decay of the second moment.
    pub beta2: f32,
    /// Added to the root of the second moment.
    pub eps: f32,
    /// Decoupled weight decay; the weight loses lr·weight_decay of itself.
    pub weight_decay: f32,
    /// Number of this step, from 1.
    pub step: u64,
    /// What the gradients are multiplied by first (clipping, averaging).
    pub grad_scale: f32,
}

/// Updates weights w and moments m, v from gradients g.
pub fn adamw(pool: &Pool, w: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32], p: &AdamwStep) {
    let n = w.len();
    assert!(g.len() == n && m.len() == n && v.len() == n, "w, g, m, v have one length");
    let (w, m, v) = (Shared::new(w), Shared::new(m), Shared::new(v));
    pool.run(n.div_ceil(CHUNK), |item| {
        let from = item * CHUNK;
        let len = CHUNK.min(n - from);
        // SAFETY: each chunk belongs to one item.
        let (w, m, v) = unsafe { (w.part(from, len), m.part(from, len), v.part(from, len)) };
        adamw_chunk(w, &g[from..from + len], m, v, p);
    });
}

/// As [`adamw`] for w in panels of a matrix with an even number of inputs, and `shadow`, the same in bf16 panels.
pub fn adamw_bf16(
    pool: &Pool,
    w: &mut [f32],
    g: &[f32],
    m: &mut [f32],
    v: &mut [f32],
    shadow: &mut [u16],
    p: &AdamwStep,
) {
    let n = w.len();
    assert!(g.len() == n && m.len() == n && v.len() == n && shadow.len() == n, "w, g, m, v have one length");
    assert!(n.is_multiple_of(2 * PANEL), "panels of pairs of inputs");
    let (w, m, v) = (Shared::new(w), Shared::new(m), Shared::new(v));
    let shadow = Shared::new(shadow);
    pool.run(n.div_ceil(CHUNK), |item| {
        for from in (item * CHUNK..n.min((item + 1) * CHUNK)).step_by(PART) {
            let len = PART.min(n - from);
            // SAFETY: each chunk belongs to one item.
            let (w, m, v) = unsafe { (w.part(from, len), m.part(from, len), v.part(from, len)) };
            adamw_chunk(w, &g[from..from + len], m, v, p);
            // SAFETY: as above.
            pair_rows(w, PANEL, len / PANEL, unsafe { shadow.part(from, len) });
        }
    });
}

simd_fn! {
    pub(crate) fn adamw_chunk<S>(w: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32], p: &AdamwStep) {
        let bias1 = 1.0 - f64::from(p.beta1).powf(p.step as f64);
        let bias2 = 1.0 - f64::from(p.beta2).powf(p.step as f64);
        let step_size = S::splat((f64::from(p.lr) / bias1) as f32);
        let root_bias2 = S::splat(bias2.sqrt() as f32);
        let keep = S::splat((1.0 - f64::from(p.lr) * f64::from(p.weight_decay)) as f32);
        let (beta1, beta2) = (S::splat(p.beta1), S::splat(p.beta2));
        let rest1 = S::splat((1.0 - f64::from(p.beta1)) as f32);
        let rest2 = S::splat((1.0 - f64::from(p.beta2)) as f32);
        let (eps, scale) = (S::splat(p.eps), S::splat(p.grad_scale));
        for i in (0..w.len()).step_by(LANES) {
            let g = S::mul(S::load(&g[i..]), scale);
            let first = S::fma(beta1, S::load(&m[i..]), S::mul(rest1, g));
            let second = S::fma(beta2, S::load(&v[i..]), S::mul(S::mul(rest2, g), g));
            let denominator = S::add(S::div(S::sqrt(second), root_bias2), eps);
            let kept = S::mul(S::load(&w[i..]), keep);
            S::store(S::fnma(step_size, S::div(first, denominator), kept), &mut w[i..]);
            S::store(first, &mut m[i..]);
            S::store(second, &mut v[i..]);
        }
    }
}

/// `w -= lr * (grad_scale * g + weight_decay * w)`, as `torch.optim.SGD` without momentum.
pub fn sgd(pool: &Pool, w: &mut [f32], g: &[f32], lr: f32, weight_decay: f32, grad_scale: f32) {
    assert_eq!(w.len(), g.len(), "w and g have one length");
    let n = w.len();
    let w = Shared::new(w);
    pool.run(n.div_ceil(CHUNK), |item| {
        // SAFETY: each chunk belongs to one item.
        let w = unsafe { w.part(item * CHUNK, CHUNK.min(n - item * CHUNK)) };
        for (w, g) in w.iter_mut().zip(&g[item * CHUNK..]) {
            *w -= lr * (grad_scale * g + weight_decay * *w);
        }
    });
}

/// Σx² in f64, by fixed chunks in ascending order.
pub fn sum_of_squares(pool: &Pool, x: &[f32]) -> f64 {
    let mut sums = vec![0.0; x.len().div_ceil(CHUNK)];
    let shared = Shared::new(&mut sums);
    pool.run(x.len().div_ceil(CHUNK), |item| {
        // SAFETY: each chunk belongs to one item.
        let sum = unsafe { shared.part(item, 1) };
        sum[0] = squares(&x[item * CHUNK..((item + 1) * CHUNK).min(x.len())]);
    });
    sums.iter().sum()
}

/// Σx² in 16 f64 lanes by index mod 16, then their sum in order.
fn squares(x: &[f32]) -> f64 {
    let mut lanes = [0.0f64; LANES];
    for chunk in x.chunks(LANES) {
        for (lane, &x) in lanes.iter_mut().zip(chunk) {
            *lane += f64::from(x) * f64::from(x);
        }
    }
    lanes.iter().sum()
}
