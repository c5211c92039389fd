//! AdamW with moments in 8 bits beside AdamW with moments in f32.

mod common;

use common::{bits, numbers, on_every_isa};
use rft_kernels::{AdamwStep, MOMENT_BLOCK, MomentCodes, Pool, adamw, adamw8, decode_moments};

struct Eight {
    w: Vec<f32>,
    m: Vec<u8>,
    v: Vec<u8>,
    scales: Vec<f32>,
}

impl Eight {
    fn new(w: Vec<f32>) -> Self {
        let n = w.len();
        Self { w, m: vec![0; n], v: vec![0; n], scales: vec![0.0; 2 * n.div_ceil(MOMENT_BLOCK)] }
    }

    fn step(&mut self, pool: &Pool, g: &[f32], step: u64) {
        let moments = MomentCodes { m: &mut self.m, v: &mut self.v, scales: &mut self.scales };
        adamw8(pool, &mut self.w, g, moments, &options(step));
    }
}

fn options(step: u64) -> AdamwStep {
    AdamwStep { lr: 1e-3, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.1, step, grad_scale: 1.0 }
}

/// Gradients of a noisy slope; neighbours' magnitudes span `decades`.
fn gradient(n: usize, step: u64, decades: f32) -> Vec<f32> {
    let (slope, noise) = (numbers(n, 77), numbers(n, 100 + step));
    let scale = |i: usize| 10f32.powf(-decades * (i % 4) as f32 / 3.0);
    (0..n).map(|i| scale(i) * (0.3 * slope[i] + noise[i])).collect()
}

#[test]
fn codes_do_not_depend_on_threads_or_instructions() {
    let n = 40_001;
    let run = |threads| {
        let (pool, mut state) = (Pool::new(threads), Eight::new(numbers(n, 1)));
        (1..=3).for_each(|step| state.step(&pool, &gradient(n, step, 3.0), step));
        (bits(&state.w), state.m, state.v, bits(&state.scales))
    };
    let got = run(1);
    for (isa, other) in on_every_isa(|_| run(3)) {
        assert!(got == other, "{isa:?}");
    }
}

/// How far the weights end from those with f32 moments, relative to the way that these went, and the greatest difference.
fn distance(decades: f32) -> (f64, f32) {
    let (n, steps, pool) = (4096, 200, Pool::new(2));
    let start = numbers(n, 1);
    let mut eight = Eight::new(start.clone());
    let (mut w, mut m, mut v) = (start.clone(), vec![0.0; n], vec![0.0; n]);
    for step in 1..=steps {
        let g = gradient(n, step, decades);
        eight.step(&pool, &g, step);
        adamw(&pool, &mut w, &g, &mut m, &mut v, &options(step));
    }
    let norm = |x: &mut dyn Iterator<Item = f32>| x.map(|x| f64::from(x).powi(2)).sum::<f64>().sqrt();
    let between = |a: &[f32], b: &[f32]| norm(&mut a.iter().zip(b).map(|(a, b)| a - b));
    let scales = |which: usize| eight.scales[which..].iter().step_by(2).copied();
    let (m8, v8) = (decode_moments(&eight.m, scales(0), true), decode_moments(&eight.v, scales(1), false));
    assert!(v8.iter().all(|&v| v > 0.0), "a second moment was lost");
    for (moments, want, what) in [(&m8, &m, "first"), (&v8, &v, "second")] {
        let off = between(moments, want) / norm(&mut want.iter().copied());
        assert!(off < 0.05, "{what} moments are off by {off} of their norm");
    }
    // drawn between two codes, second moments are neither greater nor smaller in the mean
    let mean = v8.iter().zip(&v).map(|(a, b)| f64::from(a / b)).sum::<f64>() / n as f64;
    assert!(
        (mean - 1.0).abs() < 0.01 + 0.03 * f64::from(decades),
        "second moments are off by {mean} in the mean"
    );
    let most = eight.w.iter().zip(&w).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
    (between(&eight.w, &w) / between(&w, &start), most)
}

#[test]
fn a_trajectory_stays_beside_that_of_f32_moments() {
    // measured: 0.011, 0.038 and 0.13 of the way, after 200 steps
    for (decades, bound) in [(0.0, 0.015), (1.5, 0.05), (3.0, 0.16)] {
        let (off, most) = distance(decades);
        println!("magnitudes over {decades} decades: off by {off:.4} of the way, by {most:.4} at most");
        assert!(off > 0.0 && off < bound, "off by {off} of the way that the weights went");
        assert!(most < 0.1, "a weight is off by {most}");
    }
}

#[test]
fn a_number_without_gradients_stays() {
    let (pool, n) = (Pool::new(1), 300);
    let mut state = Eight::new(vec![0.5; n]);
    let g: Vec<f32> = (0..n).map(|i| if i < 10 { 1.0 } else { 0.0 }).collect();
    (1..=2).for_each(|step| state.step(&pool, &g, step));
    let still = 0.5 * (1.0 - 1e-4f32) * (1.0 - 1e-4f32);
    assert!(state.w[10..].iter().all(|w| (w - still).abs() < 1e-7) && state.w[0] < still);
}
