//! The stated distribution: filters, log-probabilities, entropy, drawing, gradient.

mod common;

use common::*;
use proptest::prelude::*;
use rft_kernels::*;

fn logits(n: usize, seed: u64) -> Vec<f32> {
    numbers(n, seed).iter().map(|x| x * 8.0).collect()
}

fn warped(logits: &[f32], warp: &Warp) -> (Vec<f32>, RowStats) {
    let mut row = logits.to_vec();
    let stats = warp_row(&mut row, warp, &mut Vec::new());
    (row, stats)
}

fn any_warp() -> impl Strategy<Value = Warp> {
    (
        prop::sample::select(vec![1.0f32, 0.6, 1.7]),
        prop::sample::select(vec![0usize, 1, 5, 40]),
        prop::sample::select(vec![1.0f32, 0.9, 0.3]),
        prop::sample::select(vec![0.0f32, 0.05, 0.5]),
    )
        .prop_map(|(temperature, top_k, top_p, min_p)| Warp { temperature, top_k, top_p, min_p })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, failure_persistence: None, ..Default::default() })]

    #[test]
    fn a_warped_row_is_the_distribution_of_the_f64_twin(n in 1usize..700, warp in any_warp(), seed in 0u64..1000) {
        let logits = logits(n, seed);
        let (row, stats) = warped(&logits, &warp);
        let want = reference::warp(&logits, &warp);
        let mut entropy = 0.0;
        for (x, want) in row.iter().zip(&want) {
            if *want == f64::NEG_INFINITY {
                prop_assert_eq!(*x, f32::NEG_INFINITY);
            } else {
                // lse and logits are of size 10: an ulp each.
                prop_assert!((f64::from(x - stats.lse) - want).abs() < 4e-6, "{} {want}", x - stats.lse);
                entropy -= want.exp() * want;
            }
        }
        prop_assert!((f64::from(stats.entropy) - entropy).abs() < 5e-6, "entropy {} {entropy}", stats.entropy);
    }

    #[test]
    fn drawing_inverts_the_cumulative_sum(n in 1usize..700, warp in any_warp(), seed in 0u64..1000, u in 0.0f64..1.0) {
        let (row, stats) = warped(&logits(n, seed), &warp);
        let p: Vec<f64> = row.iter().map(|x| (f64::from(*x) - f64::from(stats.lse)).exp()).collect();
        let total: f64 = p.iter().sum();
        let drawn = draw(&row, stats.lse, u) as usize;
        prop_assert!(row[drawn] > f32::NEG_INFINITY);
        let below: f64 = p[..drawn].iter().sum();
        prop_assert!(below <= u * total + 1e-6 && u * total <= below + p[drawn] + 1e-6);
    }

    #[test]
    fn the_gradient_is_the_slope_of_logprob_and_entropy(
        n in 2usize..120, temperature in prop::sample::select(vec![1.0f32, 0.7]), seed in 0u64..1000, target in 0usize..120,
    ) {
        let warp = Warp { temperature, top_k: 0, top_p: 1.0, min_p: 0.0 };
        let logits = logits(n, seed);
        let target = target % n;
        let (mut row, stats) = warped(&logits, &warp);
        row_backward(&mut row, &stats, temperature, target as u32, 0.8, -0.3);
        let loss = |z: &[f64]| {
            let t = f64::from(temperature);
            let top = z.iter().copied().fold(f64::NEG_INFINITY, f64::max) / t;
            let lse = top + z.iter().map(|z| (z / t - top).exp()).sum::<f64>().ln();
            let entropy: f64 = z.iter().map(|z| -(z / t - lse).exp() * (z / t - lse)).sum();
            f64::from(0.8f32) * (z[target] / t - lse) + f64::from(-0.3f32) * entropy
        };
        let mut z = reference::wide(&logits);
        let want: Vec<f64> = (0..n).map(|i| slope(&mut z, i, loss)).collect();
        assert_close("d logits", &row, &want, 1e-5);
    }
}

#[test]
fn excluded_tokens_get_no_gradient() {
    let warp = Warp { temperature: 1.0, top_k: 3, top_p: 1.0, min_p: 0.0 };
    let (row, stats) = warped(&logits(50, 2), &warp);
    let mut grad = row.clone();
    row_backward(&mut grad, &stats, 1.0, argmax(&row), 1.0, 1.0);
    for (x, g) in row.iter().zip(&grad) {
        assert!(g.is_finite() && (*x > f32::NEG_INFINITY || *g == 0.0));
    }
}

#[test]
fn every_instruction_set_states_the_same_distribution() {
    let logits = logits(49_152, 3);
    let warp = Warp { temperature: 0.8, top_k: 0, top_p: 0.95, min_p: 0.001 };
    let results = on_every_isa(|_| {
        let (row, stats) = warped(&logits, &warp);
        let drawn: Vec<u32> = (0..20).map(|i| draw(&row, stats.lse, f64::from(i) / 20.0)).collect();
        (bits(&row), stats.lse.to_bits(), stats.entropy.to_bits(), drawn)
    });
    for (isa, got) in &results {
        assert!(got == &results[0].1, "{isa:?}");
    }
}

#[test]
fn the_lowest_id_wins_a_tie_and_nan_shows() {
    assert_eq!(argmax(&[1.0, 3.0, 3.0, 2.0]), 1);
    let warp = Warp { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0 };
    let (_, stats) = warped(&[0.0, f32::NAN, 1.0], &warp);
    assert!(stats.lse.is_nan());
}
