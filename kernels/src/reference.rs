//! Naive f64 twins of the kernels: the oracle of the tests. Matrices are row-major; nothing here is fast.

use crate::{Act, AdamwStep, AttnShape, Code, NF4, QUANT_BLOCK, Segment, Warp};

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

/// w[n, k] coded and decoded: in each block of a row's inputs the nearest of all the values that a code stands for.
pub fn quantized(w: &[f32], n: usize, k: usize, code: Code) -> Vec<f64> {
    let values: Vec<f64> = match code {
        Code::Int8 => (-127..=127).map(|i| f64::from(i) / 127.0).collect(),
        Code::Nf4 => wide(&NF4),
    };
    let mut out = Vec::with_capacity(n * k);
    for block in w.chunks(k).flat_map(|row| row.chunks(QUANT_BLOCK)) {
        let scale = block.iter().fold(0.0, |most: f64, x| most.max(f64::from(x.abs())));
        for &x in block {
            let distance = |v: &f64| (v * scale - f64::from(x)).abs();
            let nearest = values.iter().min_by(|a, b| distance(a).total_cmp(&distance(b)));
            out.push(nearest.expect("there are values") * scale);
        }
    }
    out
}

/// The numbers in f64.
pub fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|x| f64::from(*x)).collect()
}

/// y = x / sqrt(mean x² + eps)·(offset + w), row by row.
pub fn rms_norm(x: &[f64], w: &[f64], eps: f64, offset: f64) -> Vec<f64> {
    let n = w.len();
    let scale = |row: &[f64]| 1.0 / (row.iter().map(|x| x * x).sum::<f64>() / n as f64 + eps).sqrt();
    x.chunks(n).flat_map(|row| row.iter().zip(w).map(move |(x, w)| x * scale(row) * (offset + w))).collect()
}

/// Rows [gate | up] of 2f columns to act(gate)·up.
pub fn glu(gate_up: &[f64], f: usize, act: Act) -> Vec<f64> {
    let activate = |g: f64| match act {
        Act::Silu => g / (1.0 + (-g).exp()),
        Act::GeluTanh => {
            let inner = (2.0 / std::f64::consts::PI).sqrt() * (g + 0.044715 * g.powi(3));
            0.5 * g * (1.0 + inner.tanh())
        }
    };
    gate_up.chunks(2 * f).flat_map(|row| (0..f).map(move |i| activate(row[i]) * row[f + i])).collect()
}

/// Per-head weights (queries, keys), eps and offset of the query/key norm.
pub type HeadNorm<'a> = (&'a [f64], &'a [f64], f64, f64);

/// Cosines, sines ([positions, rot/2]) and rot.
pub type Angles<'a> = (&'a [f64], &'a [f64], usize);

/// Norm and rotation of queries and keys in fused rows.
pub fn qk_rope(
    shape: &AttnShape,
    qkv: &[f64],
    norm: Option<HeadNorm>,
    rope: Option<Angles>,
    positions: &[u32],
) -> Vec<f64> {
    let d = shape.head_dim;
    let mut out = qkv.to_vec();
    for (row, &position) in out.chunks_mut(shape.stride()).zip(positions) {
        for head in 0..shape.heads + shape.kv_heads {
            let x = &mut row[head * d..(head + 1) * d];
            if let Some((q, k, eps, offset)) = norm {
                let normed = rms_norm(x, if head < shape.heads { q } else { k }, eps, offset);
                x.copy_from_slice(&normed);
            }
            if let Some((cos, sin, rot)) = rope {
                for i in 0..rot / 2 {
                    let (c, s) = (cos[position as usize * rot / 2 + i], sin[position as usize * rot / 2 + i]);
                    let (a, b) = (x[i], x[i + rot / 2]);
                    (x[i], x[i + rot / 2]) = (a * c - b * s, b * c + a * s);
                }
            }
        }
    }
    out
}

/// Attention within segments of fused rows: out[rows, heads·d].
pub fn attention(shape: &AttnShape, qkv: &[f64], segs: &[Segment]) -> Vec<f64> {
    let (d, stride) = (shape.head_dim, shape.stride());
    let per_key = shape.heads / shape.kv_heads;
    let mut out = vec![0.0; qkv.len() / stride * shape.heads * d];
    for seg in segs {
        let prefix = seg.prefix.map_or(0..0, |p| p.row..p.row + p.len);
        for i in 0..seg.rows.len {
            let seen: Vec<usize> = prefix.clone().chain(seg.rows.row..=seg.rows.row + i).collect();
            let first = shape.window.map_or(0, |w| seen.len().saturating_sub(w));
            for head in 0..shape.heads {
                let at = |row: usize, head: usize| &qkv[row * stride + head * d..][..d];
                let q = at(seg.rows.row + i, head);
                let score = |row: &usize| {
                    let k = at(*row, shape.heads + head / per_key);
                    let s = q.iter().zip(k).map(|(a, b)| a * b).sum::<f64>() * f64::from(shape.scale);
                    shape.softcap.map_or(s, |cap| f64::from(cap) * (s / f64::from(cap)).tanh())
                };
                let scores: Vec<f64> = seen[first..].iter().map(score).collect();
                let top = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let sum: f64 = scores.iter().map(|s| (s - top).exp()).sum();
                let out = &mut out[((seg.rows.row + i) * shape.heads + head) * d..][..d];
                for (row, s) in seen[first..].iter().zip(&scores) {
                    let v = at(*row, shape.heads + shape.kv_heads + head / per_key);
                    out.iter_mut().zip(v).for_each(|(o, v)| *o += (s - top).exp() / sum * v);
                }
            }
        }
    }
    out
}

/// Log-probabilities of a row of logits under a warp, −inf for excluded tokens, by sorting everything.
pub fn warp(logits: &[f32], warp: &Warp) -> Vec<f64> {
    let mut z: Vec<f64> = logits.iter().map(|x| f64::from(*x / warp.temperature)).collect();
    let mut order: Vec<usize> = (0..z.len()).collect();
    // Likely tokens first; of equals the higher id, as the lower is excluded first.
    order.sort_by(|&a, &b| z[b].total_cmp(&z[a]).then(b.cmp(&a)));
    if warp.top_k > 0 && warp.top_k < z.len() {
        let bound = z[order[warp.top_k - 1]];
        z.iter_mut().filter(|z| **z < bound).for_each(|z| *z = f64::NEG_INFINITY);
    }
    let top = z[order[0]];
    if warp.top_p < 1.0 {
        let sum: f64 = z.iter().map(|z| (z - top).exp()).sum();
        let mut below = 0.0;
        for &i in order[1..].iter().rev() {
            below += (z[i] - top).exp() / sum;
            if below <= 1.0 - f64::from(warp.top_p) {
                z[i] = f64::NEG_INFINITY;
            }
        }
    }
    if warp.min_p > 0.0 {
        let bound = f64::from(warp.min_p);
        z.iter_mut().filter(|z| (**z - top).exp() < bound).for_each(|z| *z = f64::NEG_INFINITY);
    }
    let lse = top + z.iter().map(|z| (z - top).exp()).sum::<f64>().ln();
    z.iter().map(|z| z - lse).collect()
}

/// One AdamW step on one weight: the new (w, m, v).
pub fn adamw(w: f64, g: f64, m: f64, v: f64, p: &AdamwStep) -> (f64, f64, f64) {
    let (b1, b2, lr) = (f64::from(p.beta1), f64::from(p.beta2), f64::from(p.lr));
    let g = g * f64::from(p.grad_scale);
    let m = b1 * m + (1.0 - b1) * g;
    let v = b2 * v + (1.0 - b2) * g * g;
    let root = (v / (1.0 - b2.powf(p.step as f64))).sqrt() + f64::from(p.eps);
    let w = w * (1.0 - lr * f64::from(p.weight_decay));
    (w - lr * m / (1.0 - b1.powf(p.step as f64)) / root, m, v)
}
