//! Plain cases of the main kernels.

use rft_kernels::*;

fn numbers(n: usize, seed: u32) -> Vec<f32> {
    let mut s = seed.wrapping_mul(2_654_435_761).wrapping_add(12345);
    (0..n)
        .map(|_| {
            s ^= s << 13;
            s ^= s >> 17;
            s ^= s << 5;
            (s as f32 / u32::MAX as f32) * 2.0 - 1.0
        })
        .collect()
}

#[test]
fn linear_is_the_product() {
    let pool = Pool::new(2);
    let (m, n, k) = (13, 70, 37);
    let (x, w) = (numbers(m * k, 1), numbers(n * k, 2));
    let mut panels = vec![0.0; panels_len(n, k)];
    pack_panels(&w, n, k, &mut panels);
    let mut y = vec![0.0; m * n];
    linear(&pool, &x, m, Matrix { n, k, f32: &panels, bf16: None }, &mut y, Write::Set);
    for r in 0..m {
        for i in 0..n {
            let want: f64 = (0..k).map(|j| f64::from(x[r * k + j]) * f64::from(w[i * k + j])).sum();
            assert!((want - f64::from(y[r * n + i])).abs() < 1e-5);
        }
    }
    let mut dx = vec![0.0; m * k];
    linear_dx(&pool, &y, m, Matrix { n, k, f32: &panels, bf16: None }, &mut dx, Write::Set, &mut Vec::new());
    let mut dw = vec![0.0; panels_len(n, k)];
    linear_dw(&pool, &y, &x, m, n, k, &mut dw, false);
    let mut dw_rows = vec![0.0; n * k];
    unpack_panels(&dw, n, k, &mut dw_rows);
    for j in 0..k {
        let want: f64 = (0..n).map(|i| f64::from(y[i]) * f64::from(w[i * k + j])).sum();
        assert!((want - f64::from(dx[j])).abs() < 1e-4);
        let want: f64 = (0..m).map(|r| f64::from(y[r * n + 5]) * f64::from(x[r * k + j])).sum();
        assert!((want - f64::from(dw_rows[5 * k + j])).abs() < 1e-4);
    }
}

#[test]
fn paged_and_packed_attention_agree_bit_for_bit() {
    let pool = Pool::new(2);
    let shape =
        AttnShape { heads: 6, kv_heads: 2, head_dim: 24, scale: 0.2, window: Some(20), softcap: Some(3.0) };
    let len = 45;
    let qkv = numbers(len * shape.stride(), 3);
    let mut packed = vec![0.0; len * 6 * 24];
    let segs = [
        Segment { rows: Span { row: 0, len: 7 }, prefix: None },
        Segment { rows: Span { row: 7, len: 38 }, prefix: Some(Span { row: 0, len: 7 }) },
    ];
    segment_attention(&pool, &shape, &qkv, &segs, &mut packed);
    let table = [4, 1, 3];
    let size = 5 * BLOCK * 2 * 24;
    let (mut k, mut v) = (vec![f32::NAN; size], vec![f32::NAN; size]);
    let slots: Vec<u32> = (0..len).map(|p| table[p / BLOCK] * 16 + (p % BLOCK) as u32).collect();
    store_kv(&pool, &shape, &qkv, &slots, &mut k, &mut v);
    let mut paged = vec![0.0; packed.len()];
    let runs = [
        PagedRun { row: 0, rows: 20, first_pos: 0, table: &table },
        PagedRun { row: 20, rows: 1, first_pos: 20, table: &table },
        PagedRun { row: 21, rows: 24, first_pos: 21, table: &table },
    ];
    paged_attention(&pool, &shape, &qkv, &runs, &k, &v, &mut paged);
    assert_eq!(packed, paged);
    assert!(paged.iter().all(|x| x.is_finite()));
}

#[test]
fn attention_gradient_is_the_slope() {
    let pool = Pool::new(2);
    let shape =
        AttnShape { heads: 2, kv_heads: 1, head_dim: 8, scale: 0.4, window: Some(5), softcap: Some(2.0) };
    let segs = [
        Segment { rows: Span { row: 0, len: 5 }, prefix: None },
        Segment { rows: Span { row: 5, len: 3 }, prefix: Some(Span { row: 0, len: 4 }) },
        Segment { rows: Span { row: 8, len: 4 }, prefix: Some(Span { row: 0, len: 4 }) },
    ];
    let mut qkv = numbers(12 * shape.stride(), 5);
    let dout = numbers(12 * 16, 6);
    let mut out = vec![0.0; dout.len()];
    segment_attention(&pool, &shape, &qkv, &segs, &mut out);
    let mut grad = vec![f32::NAN; qkv.len()];
    segment_attention_backward(&pool, &shape, &qkv, &segs, &out, &dout, &mut grad);
    let h = 1e-2;
    for i in (0..qkv.len()).step_by(7) {
        let old = qkv[i];
        let mut loss = [0.0f64; 2];
        for (loss, step) in loss.iter_mut().zip([h, -h]) {
            qkv[i] = old + step;
            segment_attention(&pool, &shape, &qkv, &segs, &mut out);
            *loss = out.iter().zip(&dout).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
        }
        qkv[i] = old;
        let slope = (loss[0] - loss[1]) / (2.0 * f64::from(h));
        assert!((slope - f64::from(grad[i])).abs() < 2e-3, "{i}: {slope} against {}", grad[i]);
    }
}

#[test]
fn warped_rows_are_distributions() {
    let logits = numbers(1000, 9).iter().map(|x| x * 6.0).collect::<Vec<_>>();
    for warp in [
        Warp { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0 },
        Warp { temperature: 0.7, top_k: 50, top_p: 0.9, min_p: 0.01 },
    ] {
        let mut row = logits.clone();
        let stats = warp_row(&mut row, &warp, &mut Vec::new());
        let sum: f64 = row.iter().map(|x| (f64::from(*x) - f64::from(stats.lse)).exp()).sum();
        assert!((sum - 1.0).abs() < 1e-5);
        for i in 0..100 {
            let t = draw(&row, stats.lse, f64::from(i) / 100.0);
            assert!(row[t as usize] > f32::NEG_INFINITY);
        }
        assert_eq!(argmax(&row), argmax(&logits));
    }
}

#[test]
fn the_pool_does_every_item_once() {
    use std::sync::atomic::{AtomicUsize, Ordering};
    for threads in [1, 2, 3, 8] {
        let pool = Pool::new(threads);
        for items in [0, 1, 2, 7, 100] {
            for _ in 0..50 {
                let counts: Vec<AtomicUsize> = (0..items).map(|_| AtomicUsize::new(0)).collect();
                pool.run(items, |i| {
                    counts[i].fetch_add(1, Ordering::Relaxed);
                });
                assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == 1));
            }
        }
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            pool.run(10, |i| assert!(i != 5, "item 5"));
        }));
        assert!(result.is_err());
        pool.run(10, |_| {});
    }
}
