//! Naive f64 twins of the kernels: the oracle of the tests. Matrices are row-major; nothing here is fast.

/// The bf16 nearest to x (ties to even), as f32.
pub fn to_bf16(x: f32) -> f32 {
    half::bf16::from_f32(x).to_f32()
}

/// y[m, n] = x[m, k]·w[n, k]ᵀ.
pub fn linear(x: &[f32], w: &[f32], m: usize, n: usize, k: usize) -> Vec<f64> {
    let mut y = vec![0.0; m * n];
    for r in 0..m {
        for i in 0..n {
            y[r * n + i] = (0..k).map(|j| f64::from(x[r * k + j]) * f64::from(w[i * k + j])).sum();
        }
    }
    y
}

/// dx[m, k] = dy[m, n]·w[n, k].
pub fn linear_dx(dy: &[f32], w: &[f32], m: usize, n: usize, k: usize) -> Vec<f64> {
    let mut dx = vec![0.0; m * k];
    for r in 0..m {
        for j in 0..k {
            dx[r * k + j] = (0..n).map(|i| f64::from(dy[r * n + i]) * f64::from(w[i * k + j])).sum();
        }
    }
    dx
}

/// dw[n, k] = dy[m, n]ᵀ·x[m, k].
pub fn linear_dw(dy: &[f32], x: &[f32], m: usize, n: usize, k: usize) -> Vec<f64> {
    let mut dw = vec![0.0; n * k];
    for i in 0..n {
        for j in 0..k {
            dw[i * k + j] = (0..m).map(|r| f64::from(dy[r * n + i]) * f64::from(x[r * k + j])).sum();
        }
    }
    dw
}
