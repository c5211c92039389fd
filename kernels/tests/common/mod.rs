//! What the kernel tests share: numbers, all instruction sets, and a comparison that names the worst element.
#![allow(dead_code)]

use std::sync::Mutex;

use rft_kernels::*;

/// Reproducible numbers in −1..1.
pub fn numbers(n: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x1234_5678_9abc_def1;
    (0..n)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        })
        .collect()
}

/// Runs `f` under every instruction set of this machine, one test at a time, and gives the results in order.
pub fn on_every_isa<T>(f: impl Fn(Isa) -> T) -> Vec<(Isa, T)> {
    let _turn = steady();
    let before = isa();
    let results = Isa::available()
        .into_iter()
        .map(|isa| {
            assert!(select_isa(isa));
            (isa, f(isa))
        })
        .collect();
    select_isa(before);
    results
}

/// Runs `f` under every bf16 rule of this machine, one test at a time.
pub fn under_every_bf16_rule(f: impl Fn(Bf16Rule)) {
    let _turn = steady();
    let before = (isa(), bf16_rule());
    for isa in Isa::available() {
        select_isa(isa);
        for rule in [Bf16Rule::Fused, Bf16Rule::Dot, Bf16Rule::Amx] {
            if select_bf16_rule(rule) {
                f(rule);
            }
        }
    }
    select_isa(before.0);
    select_bf16_rule(before.1);
}

/// Held while a test compares bits in bf16, so that no other test switches the rule under it.
pub fn steady() -> impl Drop {
    TURN.lock().unwrap_or_else(|e| e.into_inner())
}

static TURN: Mutex<()> = Mutex::new(());

/// Asserts |got − want| ≤ tolerance everywhere; the message names the worst element.
pub fn assert_close(what: &str, got: &[f32], want: &[f64], tolerance: f64) {
    assert_eq!(got.len(), want.len(), "{what}: lengths");
    let mut worst = (0, 0.0f64);
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        let error = (f64::from(*g) - w).abs();
        if error.is_nan() || error > worst.1 {
            worst = (i, error);
        }
    }
    let (i, error) = worst;
    assert!(
        error <= tolerance,
        "{what}[{i}]: {} instead of {}, off by {error:e} > {tolerance:e}",
        got[i],
        want[i]
    );
}

/// The bits, so that NaN equals itself and −0 differs from 0.
pub fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

/// Row-major weights as panels.
pub fn panels(rows: &[f32], n: usize, k: usize) -> Vec<f32> {
    let mut panels = vec![f32::NAN; panels_len(n, k)];
    pack_panels(rows, n, k, &mut panels);
    panels
}

/// Σ x·weights.
pub fn weighted(x: &[f64], weights: &[f32]) -> f64 {
    x.iter().zip(weights).map(|(x, w)| x * f64::from(*w)).sum()
}

/// Central difference of f at x in direction i.
pub fn slope(x: &mut [f64], i: usize, f: impl Fn(&[f64]) -> f64) -> f64 {
    const STEP: f64 = 1e-5;
    let old = x[i];
    x[i] = old + STEP;
    let above = f(x);
    x[i] = old - STEP;
    let below = f(x);
    x[i] = old;
    (above - below) / (2.0 * STEP)
}
