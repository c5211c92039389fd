//! Linear layers: right numbers, and the same bits for the same row whatever surrounds it.

mod common;

use common::*;
use proptest::prelude::*;
use rft_kernels::*;

/// Error of a chain of `terms` f32 additions of products below 1 in magnitude: half an ulp of the running sum each, sums stay
/// below the square root of terms times a few.
fn tolerance(terms: usize) -> f64 {
    1e-7 * (terms as f64 + 8.0)
}

struct Case {
    m: usize,
    n: usize,
    k: usize,
    x: Vec<f32>,
    w: Vec<f32>,
    dy: Vec<f32>,
}

impl Case {
    fn new(m: usize, n: usize, k: usize, seed: u64) -> Case {
        let x = numbers(m * k, seed);
        Case { m, n, k, x, w: numbers(n * k, seed + 1), dy: numbers(m * n, seed + 2) }
    }

    fn rounded(&self) -> Case {
        let round = |x: &[f32]| x.iter().map(|x| reference::to_bf16(*x)).collect();
        Case { x: round(&self.x), w: round(&self.w), dy: round(&self.dy), ..*self }
    }

    /// y, dx and dW (rows), each starting from `start`.
    fn run(&self, threads: usize, bf16: bool, write: Write, start: f32) -> [Vec<f32>; 3] {
        let pool = Pool::new(threads);
        let Case { m, n, k, .. } = *self;
        let panels = panels(&self.w, n, k);
        let mut low = vec![u16::MAX; bf16_panels_len(n, k)];
        to_bf16_panels(&pool, &panels, n, k, &mut low);
        let w = Matrix { n, k, f32: &panels, bf16: bf16.then_some(&low), quantized: None };
        let (mut y, mut dx) = (vec![start; m * n], vec![start; m * k]);
        linear(&pool, &self.x, m, w, &mut y, write);
        linear_dx(&pool, &self.dy, m, w, &mut dx, write);
        let mut dw = vec![0.0; panels_len(n, k)];
        pack_panels(&vec![start; n * k], n, k, &mut dw);
        linear_dw(&pool, &self.dy, &self.x, m, n, k, &mut dw, bf16);
        let mut dw_rows = vec![0.0; n * k];
        unpack_panels(&dw, n, k, &mut dw_rows);
        [y, dx, dw_rows]
    }

    fn check(&self, got: &[Vec<f32>; 3], start: f32, write: Write) {
        let Case { m, n, k, .. } = *self;
        let plus =
            |want: Vec<f64>, start: f32| want.into_iter().map(|w| w + f64::from(start)).collect::<Vec<_>>();
        let kept = if write == Write::Add { start } else { 0.0 };
        assert_close("y", &got[0], &plus(reference::linear(&self.x, &self.w, m, n, k), kept), tolerance(k));
        assert_close(
            "dx",
            &got[1],
            &plus(reference::linear_dx(&self.dy, &self.w, m, n, k), kept),
            tolerance(n),
        );
        assert_close(
            "dw",
            &got[2],
            &plus(reference::linear_dw(&self.dy, &self.x, m, n, k), start),
            tolerance(m),
        );
    }
}

#[test]
fn f32_products_match_f64_on_every_instruction_set_with_the_same_bits() {
    for (m, n, k) in [(1, 1, 1), (5, 33, 7), (13, 70, 37), (25, 64, 96), (200, 40, 33), (3, 300, 1100)] {
        let case = Case::new(m, n, k, 7);
        let results = on_every_isa(|_| case.run(3, false, Write::Add, 0.5));
        for (isa, got) in &results {
            case.check(got, 0.5, Write::Add);
            for i in 0..3 {
                assert_eq!(bits(&got[i]), bits(&results[0].1[i]), "{isa:?}, output {i}");
            }
        }
    }
}

#[test]
fn bf16_products_match_f64_of_rounded_factors_under_every_rule() {
    for (m, n, k) in
        [(1, 1, 1), (5, 33, 7), (16, 32, 32), (33, 70, 37), (70, 64, 96), (290, 40, 66), (3, 300, 1100)]
    {
        let case = Case::new(m, n, k, 11);
        under_every_bf16_rule(|_| {
            for write in [Write::Set, Write::Add] {
                case.rounded().check(&case.run(2, true, write, 0.25), 0.25, write);
            }
        });
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..Default::default() })]

    #[test]
    fn a_row_has_the_same_bits_alone_and_in_any_batch(
        m in 1usize..70, n in 1usize..80, k in 1usize..120, threads in prop::sample::select(vec![1usize, 2, 3, 8]),
        bf16 in any::<bool>(), seed in 0u64..1000,
    ) {
        let _steady = steady();
        let case = Case::new(m, n, k, seed);
        let all = case.run(threads, bf16, Write::Set, 0.0);
        prop_assert_eq!(bits(&all[2]), bits(&case.run(1, bf16, Write::Set, 0.0)[2]));
        for row in [0, m / 2, m - 1] {
            let one = Case {
                m: 1, n, k, w: case.w.clone(),
                x: case.x[row * k..][..k].to_vec(), dy: case.dy[row * n..][..n].to_vec(),
            };
            let alone = one.run(1, bf16, Write::Set, 0.0);
            prop_assert_eq!(bits(&all[0][row * n..][..n]), bits(&alone[0]));
            prop_assert_eq!(bits(&all[1][row * k..][..k]), bits(&alone[1]));
        }
    }

    #[test]
    fn splitting_the_rows_of_a_weight_gradient_changes_no_bit(
        m in 1usize..300, n in 1usize..70, k in 1usize..70, cut in 0.0f64..1.0, bf16 in any::<bool>(),
    ) {
        let _steady = steady();
        let pool = Pool::new(2);
        let case = Case::new(m, n, k, 3);
        // In bf16 rows are added by blocks of STEP, so cuts are at its multiples.
        let cut = (cut * m as f64) as usize;
        let cut = if bf16 { cut / STEP * STEP } else { cut };
        let mut whole = panels(&numbers(n * k, 9), n, k);
        let mut split = whole.clone();
        linear_dw(&pool, &case.dy, &case.x, m, n, k, &mut whole, bf16);
        linear_dw(&pool, &case.dy[..cut * n], &case.x[..cut * k], cut, n, k, &mut split, bf16);
        linear_dw(&pool, &case.dy[cut * n..], &case.x[cut * k..], m - cut, n, k, &mut split, bf16);
        prop_assert_eq!(bits(&whole), bits(&split));
    }

    #[test]
    fn a_bf16_weight_gradient_whose_rows_may_wait_has_the_same_bits_for_all_cuts(
        m in 1usize..300, n in 1usize..70, k in 1usize..70, cuts in prop::collection::vec(0.0f64..1.0, 0..5),
    ) {
        let _steady = steady();
        let pool = Pool::new(2);
        let case = Case::new(m, n, k, 3);
        let mut whole = panels(&numbers(n * k, 9), n, k);
        let mut split = whole.clone();
        linear_dw(&pool, &case.dy, &case.x, m, n, k, &mut whole, true);
        let mut cuts: Vec<usize> = cuts.iter().map(|cut| (cut * m as f64) as usize).chain([0, m]).collect();
        cuts.sort_unstable();
        let mut waiting = Waiting::new(n, k);
        for (from, to) in cuts.iter().zip(&cuts[1..]) {
            let (dy, x) = (&case.dy[from * n..to * n], &case.x[from * k..to * k]);
            waiting.linear_dw(&pool, dy, x, to - from, &mut split);
        }
        waiting.finish(&pool, &mut split);
        prop_assert_eq!(bits(&whole), bits(&split));
    }

    #[test]
    fn nan_and_infinity_stay_in_their_row(m in 2usize..40, n in 1usize..40, k in 1usize..40, bf16 in any::<bool>()) {
        let _steady = steady();
        let mut case = Case::new(m, n, k, 5);
        let clean = case.run(2, bf16, Write::Set, 0.0);
        case.x[k * (m / 2)] = f32::NAN;
        case.dy[n * (m / 2)] = f32::INFINITY;
        let dirty = case.run(2, bf16, Write::Set, 0.0);
        for r in 0..m {
            let (y, dx) = (&dirty[0][r * n..][..n], &dirty[1][r * k..][..k]);
            if r == m / 2 {
                prop_assert!(y.iter().all(|y| y.is_nan()) && dx.iter().all(|d| !d.is_finite()));
            } else {
                prop_assert_eq!(bits(y), bits(&clean[0][r * n..][..n]));
                prop_assert_eq!(bits(dx), bits(&clean[1][r * k..][..k]));
            }
        }
    }
}

/// Sizes of which rows, sums and panels are cut in every way: blocks of rows, pieces of panels, runs, outputs beyond the caches.
#[test]
fn large_bf16_products_have_the_bits_of_single_rows() {
    let (m, n, k) = (530, 1000, 330);
    let case = Case::new(m, n, k, 21);
    under_every_bf16_rule(|_| {
        for write in [Write::Set, Write::Add] {
            let all = case.run(2, true, write, 0.5);
            assert_eq!(bits(&all[2]), bits(&case.run(3, true, write, 0.5)[2]));
            for row in [0, 287, 288, m - 1] {
                let one = Case {
                    m: 1,
                    x: case.x[row * k..][..k].to_vec(),
                    dy: case.dy[row * n..][..n].to_vec(),
                    w: case.w.clone(),
                    ..case
                };
                let alone = one.run(1, true, write, 0.5);
                assert_eq!(bits(&all[0][row * n..][..n]), bits(&alone[0]));
                assert_eq!(bits(&all[1][row * k..][..k]), bits(&alone[1]));
            }
        }
        let rounded = case.rounded();
        let dw = &case.run(2, true, Write::Set, 0.0)[2];
        for (i, j) in [(0, 0), (999, 329), (31, 200), (32, 311), (512, 288)] {
            let rows = (0..m).map(|r| f64::from(rounded.dy[r * n + i]) * f64::from(rounded.x[r * k + j]));
            let (want, got) = (rows.sum::<f64>(), f64::from(dw[i * k + j]));
            assert!((want - got).abs() < tolerance(m), "dW[{i}, {j}] is {got}, not {want}");
        }
    });
}

/// Sizes of which rows, inputs and sums are cut in every way; each sum is one chain of fused multiply-adds from first to last.
#[test]
fn large_f32_products_are_chains_in_order() {
    let chain = |start: f32, factors: &mut dyn Iterator<Item = (f32, f32)>| {
        factors.fold(start, |sum, (a, b)| a.mul_add(b, sum))
    };
    let results = on_every_isa(|_| {
        for (m, n, k) in [(430, 1000, 330), (200, 210, 1601), (81, 33, 801)] {
            let case = Case::new(m, n, k, 23);
            for (write, start) in [(Write::Set, 0.0), (Write::Add, 0.5)] {
                let all = case.run(3, false, write, start);
                for i in 0..200 {
                    let (r, o, j) = (i * 7919 % m, i * 104_729 % n, i * 1_299_709 % k);
                    let y = chain(start, &mut (0..k).map(|j| (case.x[r * k + j], case.w[o * k + j])));
                    let dx = chain(start, &mut (0..n).map(|o| (case.dy[r * n + o], case.w[o * k + j])));
                    let dw = chain(start, &mut (0..m).map(|r| (case.dy[r * n + o], case.x[r * k + j])));
                    assert_eq!(all[0][r * n + o].to_bits(), y.to_bits(), "y[{r}, {o}] of {m}, {n}, {k}");
                    assert_eq!(all[1][r * k + j].to_bits(), dx.to_bits(), "dx[{r}, {j}] of {m}, {n}, {k}");
                    assert_eq!(all[2][o * k + j].to_bits(), dw.to_bits(), "dW[{o}, {j}] of {m}, {n}, {k}");
                }
            }
        }
    });
    assert!(!results.is_empty());
}

/// Input gradients of up to 320 rows take a way of their own, in two parts where the outputs are many.
#[test]
fn few_rows_through_bf16_weights_have_the_bits_of_many_rows() {
    let (n, k) = (1400, 101);
    let case = Case::new(330, n, k, 23);
    under_every_bf16_rule(|_| {
        for write in [Write::Set, Write::Add] {
            let many = case.run(2, true, write, 0.5);
            for (m, threads) in [(1, 1), (17, 8), (70, 3), (320, 2)] {
                let few = Case {
                    m,
                    x: case.x[..m * k].to_vec(),
                    dy: case.dy[..m * n].to_vec(),
                    w: case.w.clone(),
                    ..case
                };
                let got = few.run(threads, true, write, 0.5);
                assert_eq!(bits(&got[1]), bits(&many[1][..m * k]), "{m} rows");
                if m == 17 {
                    few.rounded().check(&got, 0.5, write);
                }
            }
        }
    });
}

#[test]
fn rows_are_looked_up_and_scattered_in_order() {
    let pool = Pool::new(3);
    let (n, k) = (70, 41);
    let w = numbers(n * k, 1);
    let panels = panels(&w, n, k);
    let ids = [69, 0, 33, 0, 32, 0];
    let mut rows = vec![0.0; ids.len() * k];
    gather_rows(&pool, &panels, n, k, &ids, &mut rows);
    for (r, id) in ids.iter().enumerate() {
        assert_eq!(rows[r * k..][..k], w[*id as usize * k..][..k]);
    }
    let d = numbers(ids.len() * k, 2);
    let mut grad = vec![0.0; panels.len()];
    scatter_add_rows(&pool, &d, &ids, n, k, &mut grad);
    let mut back = vec![0.0; n * k];
    unpack_panels(&grad, n, k, &mut back);
    for j in 0..k {
        assert_eq!(back[j], d[k + j] + d[3 * k + j] + d[5 * k + j]);
        assert_eq!(back[69 * k + j], d[j]);
        assert_eq!(back[5 * k + j], 0.0);
    }
}
