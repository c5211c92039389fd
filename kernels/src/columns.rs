//! Biases, and columns moved between a narrow matrix and a fused wide one (LoRA updates).

use crate::pool::Pool;
use crate::shared::Shared;

/// Rows of one work item.
const ROWS: usize = 16;

/// `y[m, n]` += `bias[n]`.
pub fn add_bias(pool: &Pool, y: &mut [f32], m: usize, bias: &[f32]) {
    let n = bias.len();
    assert_eq!(y.len(), m * n, "y is [m, n]");
    let y = Shared::new(y);
    pool.run(m.div_ceil(ROWS), |item| {
        for r in item * ROWS..((item + 1) * ROWS).min(m) {
            // SAFETY: each row belongs to one item.
            let row = unsafe { y.part(r * n, n) };
            row.iter_mut().zip(bias).for_each(|(y, b)| *y += b);
        }
    });
}

/// `db[n]` += the rows of `dy[m, n]`, one after another in row order.
pub fn bias_backward(pool: &Pool, dy: &[f32], m: usize, db: &mut [f32]) {
    let n = db.len();
    assert_eq!(dy.len(), m * n, "dy is [m, n]");
    let columns = n.div_ceil(pool.threads() * 2).next_multiple_of(16);
    let db = Shared::new(db);
    pool.run(if n == 0 { 0 } else { n.div_ceil(columns) }, |item| {
        let from = item * columns;
        let len = columns.min(n - from);
        // SAFETY: each column range belongs to one item.
        let sum = unsafe { db.part(from, len) };
        for r in 0..m {
            sum.iter_mut().zip(&dy[r * n + from..]).for_each(|(s, d)| *s += d);
        }
    });
}

/// y[r, offset..offset + n] += scale·src[r, ..] for rows of y `stride` apart; src is [m, n].
pub fn add_columns(
    pool: &Pool,
    y: &mut [f32],
    stride: usize,
    offset: usize,
    src: &[f32],
    m: usize,
    n: usize,
    scale: f32,
) {
    assert!(offset + n <= stride, "columns {offset}+{n} of {stride}");
    assert_eq!(src.len(), m * n, "src is [m, n]");
    assert_eq!(y.len(), m * stride, "y is [m, stride]");
    let y = Shared::new(y);
    pool.run(m.div_ceil(ROWS), |item| {
        for r in item * ROWS..((item + 1) * ROWS).min(m) {
            // SAFETY: each row belongs to one item.
            let row = unsafe { y.part(r * stride + offset, n) };
            row.iter_mut().zip(&src[r * n..]).for_each(|(y, s)| *y += scale * s);
        }
    });
}

/// out[r, ..] = scale·src[r, offset..offset + n] for rows of src `stride` apart; out is [m, n].
pub fn take_columns(
    pool: &Pool,
    src: &[f32],
    stride: usize,
    offset: usize,
    m: usize,
    n: usize,
    scale: f32,
    out: &mut [f32],
) {
    assert!(offset + n <= stride, "columns {offset}+{n} of {stride}");
    assert_eq!(src.len(), m * stride, "src is [m, stride]");
    assert_eq!(out.len(), m * n, "out is [m, n]");
    let out = Shared::new(out);
    pool.run(m.div_ceil(ROWS), |item| {
        for r in item * ROWS..((item + 1) * ROWS).min(m) {
            // SAFETY: each row belongs to one item.
            let row = unsafe { out.part(r * n, n) };
            row.iter_mut().zip(&src[r * stride + offset..]).for_each(|(o, s)| *o = scale * s);
        }
    });
}
