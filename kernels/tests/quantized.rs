//! Quantised weights: the codes are the nearest ones, and products have the bits of the dequantised matrix.

mod common;

use common::*;
use proptest::prelude::*;
use rft_kernels::*;

/// Rows of the dequantised matrix.
fn dequantized(q: &Quantized) -> Vec<f32> {
    let mut rows = vec![0.0; q.n() * q.k()];
    unpack_panels(&q.panels(&Pool::new(2)), q.n(), q.k(), &mut rows);
    rows
}

#[test]
fn codes_are_the_nearest_on_every_instruction_set() {
    let (n, k) = (37, 150);
    let mut rows = numbers(n * k, 1);
    rows[..QUANT_BLOCK].fill(0.0);
    rows[2 * k..3 * k].iter_mut().for_each(|x| *x *= 1e-30);
    for code in [Code::Int8, Code::Nf4] {
        let q = Quantized::new(&Pool::new(2), &rows, n, k, code);
        let results = on_every_isa(|_| dequantized(&q));
        let want = reference::quantized(&rows, n, k, code);
        for (isa, got) in &results {
            for (i, (g, w)) in got.iter().zip(&want).enumerate() {
                assert!(
                    (f64::from(*g) - w).abs() <= 2e-7 * w.abs(),
                    "{isa:?} {code:?} element {i}: {g} for {w}"
                );
            }
            assert_eq!(bits(got), bits(&results[0].1));
        }
    }
}

#[test]
fn eight_and_four_bits_take_the_bytes_they_say() {
    let (n, k) = (64, 256);
    let rows = numbers(n * k, 2);
    // codes and one f32 for each 64 of them
    assert_eq!(Quantized::new(&Pool::new(2), &rows, n, k, Code::Int8).bytes(), n * k + n * k / 16);
    assert_eq!(Quantized::new(&Pool::new(2), &rows, n, k, Code::Nf4).bytes(), n * k / 2 + n * k / 16);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..Default::default() })]

    /// k up to 20 000 makes matrices that are worked on in several parts.
    #[test]
    fn products_have_the_bits_of_the_dequantised_matrix(
        m in 1usize..20, n in 1usize..100, wide in any::<bool>(), k in 1usize..200, four in any::<bool>(),
        bf16 in any::<bool>(), add in any::<bool>(), threads in prop::sample::select(vec![1usize, 3]),
    ) {
        let _steady = steady();
        let (m, k) = if wide { (m.min(3), k * 100) } else { (m, k) };
        let (pool, code) = (Pool::new(threads), if four { Code::Nf4 } else { Code::Int8 });
        let mut q = Quantized::new(&Pool::new(2), &numbers(n * k, 3), n, k, code);
        if bf16 {
            q.use_bf16();
        }
        let panels = q.panels(&pool);
        let mut low = vec![0; bf16_panels_len(n, k)];
        to_bf16_panels(&pool, &panels, n, k, &mut low);
        let whole = Matrix { n, k, f32: &panels, bf16: bf16.then_some(&low), quantized: None };
        let coded = Matrix { n, k, f32: &[], bf16: None, quantized: Some(&q) };
        let (x, dy, write) = (numbers(m * k, 4), numbers(m * n, 5), if add { Write::Add } else { Write::Set });
        let run = |w: Matrix| {
            let (mut y, mut dx) = (vec![0.5; m * n], vec![0.25; m * k]);
            linear(&pool, &x, m, w, &mut y, write);
            linear_dx(&pool, &dy, m, w, &mut dx, write);
            (bits(&y), bits(&dx))
        };
        prop_assert!(run(whole) == run(coded));
    }

    #[test]
    fn a_dropped_element_depends_on_its_key_and_column_alone(rows in 1usize..40, k in 1usize..80, seed in 0u64..99) {
        let (x, rate) = (numbers(rows * k, seed + 1), 0.3);
        let keys: Vec<u64> = (0..rows as u64).map(|r| r.wrapping_mul(0x1234_5678_9abc_def1) ^ seed).collect();
        let mut all = vec![9.0; x.len()];
        dropout(&Pool::new(3), &x, k, rate, &keys, &mut all, Write::Set);
        for r in 0..rows {
            let mut one = vec![1.0; k];
            dropout(&Pool::new(1), &x[r * k..][..k], k, rate, &keys[r..=r], &mut one, Write::Add);
            for ((one, all), x) in one.iter().zip(&all[r * k..]).zip(&x[r * k..]) {
                prop_assert_eq!(*one, 1.0 + all);
                prop_assert!(*all == 0.0 || (all - x / 0.7).abs() < 1e-6);
            }
        }
    }
}

#[test]
fn the_share_of_dropped_elements_is_the_rate() {
    let (rows, k) = (200, 500);
    let keys: Vec<u64> = (0..rows as u64).collect();
    let ones = vec![1.0; rows * k];
    for rate in [0.0f32, 0.1, 0.5] {
        let mut y = vec![0.0; rows * k];
        dropout(&Pool::new(2), &ones, k, rate, &keys, &mut y, Write::Set);
        let dropped = y.iter().filter(|y| **y == 0.0).count() as f64 / y.len() as f64;
        // standard error of a share p of 100 000: sqrt(p (1 - p) / 1e5) <= 0.0016; five of them
        assert!((dropped - f64::from(rate)).abs() < 0.008, "{dropped} for {rate}");
        let column = (0..k).map(|j| (0..rows).filter(|r| y[r * k + j] == 0.0).count()).max().unwrap();
        // greatest of 500 columns of 200 draws: mean plus five standard deviations
        let most = 200.0 * f64::from(rate) + 5.0 * (200.0 * f64::from(rate * (1.0 - rate))).sqrt();
        assert!(column as f64 <= most, "{column} > {most}");
    }
}
