//! Norms, rotary positions, activations, biases, columns and the optimizer against their f64 twins.

mod common;

use common::*;
use proptest::prelude::*;
use rft_kernels::*;

/// A handful of roundings (6e-8 each) of numbers below about 8.
const TOLERANCE: f64 = 4e-6;

#[test]
fn norms_match_and_their_gradient_is_the_slope() {
    for (m, n, offset) in [(1, 1, 0.0), (5, 24, 1.0), (9, 77, 0.0), (20, 576, 0.0)] {
        let (x, w, dy) = (numbers(m * n, 1), numbers(n, 2), numbers(m * n, 3));
        let run = |threads| {
            let pool = Pool::new(threads);
            let (mut y, mut dx, mut dw) = (vec![0.0; m * n], vec![0.5; m * n], vec![0.25; n]);
            rms_norm(&pool, &x, &w, 1e-2, offset, &mut y);
            rms_norm_backward(&pool, &x, &w, 1e-2, offset, &dy, &mut dx, Some(&mut dw));
            [y, dx, dw]
        };
        let results = on_every_isa(|_| run(2));
        for (isa, got) in &results {
            assert_eq!(got.each_ref().map(|x| bits(x)), results[0].1.each_ref().map(|x| bits(x)), "{isa:?}");
        }
        let got = run(3);
        assert_eq!(got.each_ref().map(|x| bits(x)), results[0].1.each_ref().map(|x| bits(x)), "3 threads");
        let (mut wx, mut ww) = (reference::wide(&x), reference::wide(&w));
        let offset = f64::from(offset);
        let eps = f64::from(1e-2f32);
        assert_close("y", &got[0], &reference::rms_norm(&wx, &ww, eps, offset), TOLERANCE);
        let w = ww.clone();
        for i in (0..m * n).step_by(m * n / 40 + 1) {
            let want = 0.5 + slope(&mut wx, i, |x| weighted(&reference::rms_norm(x, &w, eps, offset), &dy));
            // The slope itself is good to 1e-9; sums of n terms.
            assert!((f64::from(got[1][i]) - want).abs() < 2e-5, "dx[{i}]: {} {want}", got[1][i]);
        }
        for i in (0..n).step_by(n / 40 + 1) {
            let want = 0.25 + slope(&mut ww, i, |w| weighted(&reference::rms_norm(&wx, w, eps, offset), &dy));
            assert!((f64::from(got[2][i]) - want).abs() < 2e-5, "dw[{i}]: {} {want}", got[2][i]);
        }
    }
}

#[test]
fn the_residual_norm_is_an_addition_and_a_norm() {
    let pool = Pool::new(2);
    let (m, n) = (11, 50);
    let (mut x, delta, w) = (numbers(m * n, 1), numbers(m * n, 2), numbers(n, 3));
    let sum: Vec<f32> = x.iter().zip(&delta).map(|(a, b)| a + b).collect();
    let (mut y, mut want, mut kept) = (vec![0.0; m * n], vec![0.0; m * n], vec![f32::NAN; m * n]);
    add_rms_norm(&pool, &mut x, &delta, &w, 1e-5, 0.0, &mut y, &mut kept);
    rms_norm(&pool, &sum, &w, 1e-5, 0.0, &mut want);
    assert_eq!((bits(&x), bits(&y), bits(&kept)), (bits(&sum), bits(&want), bits(&sum)));
    (y, kept) = (vec![f32::NAN; m * n], vec![f32::NAN; m * n]);
    rms_norm_kept(&pool, &sum, &w, 1e-5, 0.0, &mut y, &mut kept);
    assert_eq!((bits(&y), bits(&kept)), (bits(&want), bits(&sum)));
}

#[test]
fn splitting_rows_changes_no_bit_of_a_norm_weights_or_bias_gradient() {
    let pool = Pool::new(3);
    let (m, n) = (23, 50);
    let (x, w, dy) = (numbers(m * n, 1), numbers(n, 2), numbers(m * n, 3));
    let run = |cuts: &[(usize, usize)]| {
        let (mut dw, mut db, mut dx) = (numbers(n, 4), numbers(n, 5), vec![0.0; m * n]);
        for &(from, to) in cuts {
            let part = from * n..to * n;
            let dx = &mut dx[part.clone()];
            rms_norm_backward(&pool, &x[part.clone()], &w, 1e-5, 0.0, &dy[part.clone()], dx, Some(&mut dw));
            bias_backward(&pool, &dy[part], to - from, &mut db);
        }
        (bits(&dw), bits(&db), bits(&dx))
    };
    assert_eq!(run(&[(0, m)]), run(&[(0, 5), (5, 6), (6, m)]));
}

#[test]
fn activations_match_and_their_gradient_is_the_slope() {
    let (m, f) = (7, 45);
    let gate_up: Vec<f32> = numbers(m * 2 * f, 1).iter().map(|x| x * 6.0).collect();
    let dout = numbers(m * f, 2);
    for act in [Act::Silu, Act::GeluTanh] {
        let run = |threads| {
            let pool = Pool::new(threads);
            let (mut out, mut d) = (vec![0.0; m * f], vec![f32::NAN; m * 2 * f]);
            glu(&pool, &gate_up, m, f, act, &mut out);
            glu_backward(&pool, &gate_up, m, f, act, &dout, &mut d, None);
            let (mut out_again, mut d_again) = (vec![f32::NAN; m * f], vec![f32::NAN; m * 2 * f]);
            glu_backward(&pool, &gate_up, m, f, act, &dout, &mut d_again, Some(&mut out_again));
            assert_eq!((bits(&out), bits(&d)), (bits(&out_again), bits(&d_again)));
            [out, d]
        };
        let got = run(8);
        for (isa, other) in on_every_isa(|_| run(1)) {
            assert_eq!(got.each_ref().map(|x| bits(x)), other.each_ref().map(|x| bits(x)), "{isa:?}");
        }
        let mut x = reference::wide(&gate_up);
        // Outputs reach 36.
        assert_close("glu", &got[0], &reference::glu(&x, f, act), 2e-5);
        let want: Vec<f64> =
            (0..x.len()).map(|i| slope(&mut x, i, |x| weighted(&reference::glu(x, f, act), &dout))).collect();
        assert_close("d_gate_up", &got[1], &want, 2e-5);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, failure_persistence: None, ..Default::default() })]

    #[test]
    fn positions_and_head_norms_match_and_their_gradient_is_the_slope(
        (heads, kv_heads) in prop::sample::select(vec![(1usize, 1usize), (3, 1), (4, 2)]),
        (head_dim, rot) in prop::sample::select(vec![(8usize, 8usize), (24, 24), (20, 12)]),
        normed in any::<bool>(), rotated in any::<bool>(), offset in prop::sample::select(vec![0.0f32, 1.0]), rows in 1usize..12,
    ) {
        let shape = AttnShape { heads, kv_heads, head_dim, scale: 1.0, window: None, softcap: None };
        let positions: Vec<u32> = (0..rows as u32).map(|i| (i * 5) % 9).collect();
        let angles = numbers(9 * rot / 2, 1);
        let (cos, sin): (Vec<f32>, Vec<f32>) = angles.iter().map(|a| ((a * 3.0).cos(), (a * 3.0).sin())).unzip();
        let (qkv, q, k) = (numbers(rows * shape.stride(), 2), numbers(head_dim, 3), numbers(head_dim, 4));
        let norm = normed.then_some(QkNorm { q: &q, k: &k, eps: 1e-2, offset });
        let rope = rotated.then_some(Rope { cos: &cos, sin: &sin, rot });
        let d = numbers(qkv.len(), 5);
        let pool = Pool::new(2);
        let mut out = vec![f32::NAN; qkv.len()];
        qk_rope(&pool, &shape, &qkv, norm, rope, &positions, &mut out);
        let (mut grad, mut dq, mut dk) = (d.clone(), vec![0.0; head_dim], vec![0.0; head_dim]);
        qk_rope_backward(&pool, &shape, &qkv, norm, rope, &positions, &mut grad, Some(&mut dq), Some(&mut dk));

        let (wq, wk, wcos, wsin) =
            (reference::wide(&q), reference::wide(&k), reference::wide(&cos), reference::wide(&sin));
        let twin = |x: &[f64], q: &[f64], k: &[f64]| {
            let norm = normed.then_some((q, k, f64::from(1e-2f32), f64::from(offset)));
            reference::qk_rope(&shape, x, norm, rotated.then_some((&wcos, &wsin, rot)), &positions)
        };
        let mut x = reference::wide(&qkv);
        assert_close("out", &out, &twin(&x, &wq, &wk), TOLERANCE);
        let want: Vec<f64> = (0..x.len()).map(|i| slope(&mut x, i, |x| weighted(&twin(x, &wq, &wk), &d))).collect();
        assert_close("dqkv", &grad, &want, 2e-5);
        let mut w = wq.clone();
        let want: Vec<f64> = (0..head_dim).map(|i| slope(&mut w, i, |w| weighted(&twin(&x, w, &wk), &d))).collect();
        assert_close("dq_norm", &dq, &want, 2e-5);
        let mut w = wk.clone();
        let want: Vec<f64> = (0..head_dim).map(|i| slope(&mut w, i, |w| weighted(&twin(&x, &wq, w), &d))).collect();
        assert_close("dk_norm", &dk, &want, 2e-5);
    }
}

#[test]
fn biases_and_columns_land_where_they_belong() {
    let pool = Pool::new(2);
    let (m, n, stride, offset) = (19, 5, 12, 4);
    let (start, src, bias) = (numbers(m * stride, 1), numbers(m * n, 2), numbers(stride, 3));
    let mut y = start.clone();
    add_columns(&pool, &mut y, stride, offset, &src, m, n, 0.5);
    add_bias(&pool, &mut y, m, &bias);
    let mut taken = vec![0.0; m * n];
    take_columns(&pool, &start, stride, offset, m, n, 2.0, &mut taken);
    for r in 0..m {
        for c in 0..stride {
            let inside = (offset..offset + n).contains(&c);
            let added = if inside { 0.5 * src[r * n + c - offset] } else { 0.0 };
            assert_eq!(y[r * stride + c], start[r * stride + c] + added + bias[c]);
            if inside {
                assert_eq!(taken[r * n + c - offset], 2.0 * start[r * stride + c]);
            }
        }
    }
}

#[test]
fn adamw_follows_the_formula_for_several_steps_whatever_the_threads() {
    let n = 40_001;
    let grads: Vec<Vec<f32>> = (0..3).map(|step| numbers(n, step + 10)).collect();
    let run = |threads| {
        let pool = Pool::new(threads);
        let (mut w, mut m, mut v) = (numbers(n, 1), vec![0.0; n], vec![0.0; n]);
        for (g, step) in grads.iter().zip(1..) {
            adamw(&pool, &mut w, g, &mut m, &mut v, &step_options(step));
        }
        [w, m, v]
    };
    let got = run(1);
    for (isa, other) in on_every_isa(|_| run(3)) {
        assert_eq!(got.each_ref().map(|x| bits(x)), other.each_ref().map(|x| bits(x)), "{isa:?}");
    }
    let w = numbers(n, 1);
    let mut want = [vec![0.0; n], vec![0.0; n], vec![0.0; n]];
    for i in 0..n {
        let mut state = (f64::from(w[i]), 0.0, 0.0);
        for (g, step) in grads.iter().zip(1..) {
            state = reference::adamw(state.0, f64::from(g[i]), state.1, state.2, &step_options(step));
        }
        (want[0][i], want[1][i], want[2][i]) = state;
    }
    for (name, (got, want)) in ["w", "m", "v"].iter().zip(got.iter().zip(&want)) {
        // Updates are of size lr = 1e-2 with relative error 1e-6; weights are below 1.
        assert_close(name, got, want, 3e-7);
    }
}

#[test]
fn adamw_makes_the_same_bf16_panels_on_its_way() {
    for (n, k) in [(1, 2), (70, 576), (33, 1538)] {
        let len = panels_len(n, k);
        let (g, start) = (numbers(len, 5), numbers(len, 1));
        let pool = Pool::new(1);
        let (mut w, mut m, mut v) = (start.clone(), vec![0.1; len], vec![0.2; len]);
        adamw(&pool, &mut w, &g, &mut m, &mut v, &step_options(3));
        let mut shadow = vec![0; bf16_panels_len(n, k)];
        to_bf16_panels(&pool, &w, n, k, &mut shadow);
        for threads in [1, 3] {
            for (isa, (got, got_shadow)) in on_every_isa(|_| {
                let (mut w, mut m, mut v) = (start.clone(), vec![0.1; len], vec![0.2; len]);
                let mut shadow = vec![0xffff; len];
                adamw_bf16(&Pool::new(threads), &mut w, &g, &mut m, &mut v, &mut shadow, &step_options(3));
                ([w, m, v], shadow)
            }) {
                assert_eq!([&w, &m, &v].map(|x| bits(x)), got.each_ref().map(|x| bits(x)), "{isa:?}");
                assert!(shadow == got_shadow, "{isa:?}: another shadow of [{n}, {k}]");
            }
        }
    }
}

fn step_options(step: u64) -> AdamwStep {
    AdamwStep { lr: 1e-2, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, step, grad_scale: 0.5 }
}

#[test]
fn the_sum_of_squares_is_exact_enough_and_the_same_for_any_threads() {
    let x = numbers(100_003, 1);
    let want: f64 = x.iter().map(|x| f64::from(*x) * f64::from(*x)).sum();
    let sums: Vec<u64> =
        [1, 2, 3, 8].map(|threads| sum_of_squares(&Pool::new(threads), &x).to_bits()).to_vec();
    assert!(sums.iter().all(|sum| *sum == sums[0]));
    assert!((f64::from_bits(sums[0]) - want).abs() < 1e-9 * want);
}
