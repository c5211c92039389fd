//! The kernels' gradients against candle's automatic differentiation, on a feed-forward block.

use candle_core::{DType, Device, Tensor, Var};
use rft_kernels::{
    Act, Matrix, Pool, Write, glu, glu_backward, linear, linear_dw, linear_dx, pack_panels, panels_len,
    rms_norm, rms_norm_backward, unpack_panels,
};

const ROWS: usize = 5;
const HIDDEN: usize = 40;
const FFN: usize = 24;
const EPS: f32 = 1e-5;

/// Numbers in (-1, 1) without structure that a kernel could share.
fn noise(n: usize, key: u64) -> Vec<f32> {
    let mut stream = rft_engine::rng::Stream::new(key, rft_engine::rng::Purpose::Init, &[]);
    (0..n).map(|_| (2.0 * stream.next_f64() - 1.0) as f32).collect()
}

fn var(values: &[f32], shape: &[usize]) -> Var {
    Var::from_tensor(&Tensor::from_slice(values, shape, &Device::Cpu).unwrap()).unwrap()
}

fn panels(rows: &[f32], n: usize, k: usize) -> Vec<f32> {
    let mut out = vec![0.0; panels_len(n, k)];
    pack_panels(rows, n, k, &mut out);
    out
}

fn close(what: &str, found: &[f32], expected: &Tensor) {
    let expected: Vec<f32> = expected.flatten_all().unwrap().to_dtype(DType::F32).unwrap().to_vec1().unwrap();
    assert_eq!(found.len(), expected.len(), "{what}");
    for (f, e) in found.iter().zip(&expected) {
        // two f32 sums of a few dozen terms in different orders
        assert!((f - e).abs() <= 2e-5 + 2e-5 * e.abs(), "{what}: {f} against {e}");
    }
}

#[test]
fn a_feed_forward_block_has_candles_gradients() {
    let (x, norm) = (noise(ROWS * HIDDEN, 1), noise(HIDDEN, 2));
    let (gate_up, down, weight) =
        (noise(2 * FFN * HIDDEN, 3), noise(HIDDEN * FFN, 4), noise(ROWS * HIDDEN, 5));

    let (xv, nv) = (var(&x, &[ROWS, HIDDEN]), var(&norm, &[HIDDEN]));
    let (gv, dv) = (var(&gate_up, &[2 * FFN, HIDDEN]), var(&down, &[HIDDEN, FFN]));
    // the slow norm is the differentiable one: candle's fused norm drops its gradient
    let normed = candle_nn::ops::rms_norm_slow(xv.as_tensor(), nv.as_tensor(), EPS).unwrap();
    let both = normed.matmul(&gv.t().unwrap()).unwrap();
    let gate = candle_nn::ops::silu(&both.narrow(1, 0, FFN).unwrap()).unwrap();
    let act = (gate * both.narrow(1, FFN, FFN).unwrap()).unwrap();
    let y = act.matmul(&dv.t().unwrap()).unwrap();
    let w = Tensor::from_slice(&weight, (ROWS, HIDDEN), &Device::Cpu).unwrap();
    let grads = (&y * w).unwrap().sum_all().unwrap().backward().unwrap();

    let pool = Pool::new(2);
    let (gp, dp) = (panels(&gate_up, 2 * FFN, HIDDEN), panels(&down, HIDDEN, FFN));
    let matrix = |n, k, f32| Matrix { n, k, f32, bf16: None, quantized: None };
    let (mut h, mut gu) = (vec![0.0; ROWS * HIDDEN], vec![0.0; ROWS * 2 * FFN]);
    let (mut a, mut out) = (vec![0.0; ROWS * FFN], vec![0.0; ROWS * HIDDEN]);
    rms_norm(&pool, &x, &norm, EPS, 0.0, &mut h);
    linear(&pool, &h, ROWS, matrix(2 * FFN, HIDDEN, &gp), &mut gu, Write::Set);
    glu(&pool, &gu, ROWS, FFN, Act::Silu, &mut a);
    linear(&pool, &a, ROWS, matrix(HIDDEN, FFN, &dp), &mut out, Write::Set);
    close("output", &out, &y);

    let (mut da, mut dgu, mut dh) =
        (vec![0.0; ROWS * FFN], vec![0.0; ROWS * 2 * FFN], vec![0.0; ROWS * HIDDEN]);
    let (mut dx, mut dnorm) = (vec![0.0; ROWS * HIDDEN], vec![0.0; HIDDEN]);
    let (mut ddown, mut dgate_up) = (vec![0.0; dp.len()], vec![0.0; gp.len()]);
    linear_dx(&pool, &weight, ROWS, matrix(HIDDEN, FFN, &dp), &mut da, Write::Set);
    linear_dw(&pool, &weight, &a, ROWS, HIDDEN, FFN, &mut ddown, false);
    glu_backward(&pool, &gu, ROWS, FFN, Act::Silu, &da, &mut dgu, None);
    linear_dx(&pool, &dgu, ROWS, matrix(2 * FFN, HIDDEN, &gp), &mut dh, Write::Set);
    linear_dw(&pool, &dgu, &h, ROWS, 2 * FFN, HIDDEN, &mut dgate_up, false);
    rms_norm_backward(&pool, &x, &norm, EPS, 0.0, &dh, &mut dx, Some(&mut dnorm));

    let rows = |panels: &[f32], n: usize, k: usize| {
        let mut out = vec![0.0; n * k];
        unpack_panels(panels, n, k, &mut out);
        out
    };
    close("d input", &dx, grads.get(&xv).unwrap());
    close("d norm", &dnorm, grads.get(&nv).unwrap());
    close("d gate and up", &rows(&dgate_up, 2 * FFN, HIDDEN), grads.get(&gv).unwrap());
    close("d down", &rows(&ddown, HIDDEN, FFN), grads.get(&dv).unwrap());
}
