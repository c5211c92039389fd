//! Vector exp, tanh and sigmoid: fixed polynomials in fused multiply-adds, the same bits on every instruction set.

use crate::simd::Simd;

/// e^x, at most 2 ulp off; 0 below [`EXP_FLOOR`], +inf above 88.73, NaN for NaN.
///
/// Results that would be denormal are 0: making one costs the hardware a hundred cycles, and masked scores would make many.
/// x = n·ln 2 + r with |r| ≤ ln 2 / 2; e^r by its Taylor series to r^7 (remainder 5e-9 of r^8/8!), then scaled by 2^n.
#[inline(always)]
pub(crate) fn exp<S: Simd>(x: S::V) -> S::V {
    // 1.5·2^23: adding it rounds to a whole number.
    let magic = S::splat(12_582_912.0);
    let floor = S::splat(EXP_FLOOR);
    let given = x;
    let x = S::max(floor, S::min(S::splat(89.0), x));
    let n = S::sub(S::fma(x, S::splat(std::f32::consts::LOG2_E), magic), magic);
    // ln 2 in two parts; the first has 9 trailing zero bits, so n times it is exact.
    let r = S::fnma(n, S::splat(0.693_359_4), x);
    let r = S::fnma(n, S::splat(-2.121_944_4e-4), r);
    let mut p = S::splat(1.0 / 5040.0);
    for c in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        p = S::fma(p, r, S::splat(c));
    }
    S::select_lt(given, floor, S::splat(0.0), S::scale(p, n))
}

/// Below this e^x is 0 here; just above it is still a normal number.
pub(crate) const EXP_FLOOR: f32 = -87.3;

/// 1 / (1 + e^−x).
#[inline(always)]
pub(crate) fn sigmoid<S: Simd>(x: S::V) -> S::V {
    let one = S::splat(1.0);
    S::div(one, S::add(one, exp::<S>(S::sub(S::splat(0.0), x))))
}

/// tanh x: an odd polynomial below 1/4 in magnitude, (1 − e) / (1 + e) with e = e^(−2|x|) above.
#[inline(always)]
pub(crate) fn tanh<S: Simd>(x: S::V) -> S::V {
    let one = S::splat(1.0);
    let size = S::abs(x);
    let e = exp::<S>(S::mul(S::splat(-2.0), size));
    let large = S::copysign(S::div(S::sub(one, e), S::add(one, e)), x);
    let square = S::mul(x, x);
    // Taylor coefficients of tanh x / x in x².
    let mut p = S::splat(-1382.0 / 155_925.0);
    for c in [62.0 / 2835.0, -17.0 / 315.0, 2.0 / 15.0, -1.0 / 3.0] {
        p = S::fma(p, square, S::splat(c));
    }
    let small = S::fma(S::mul(x, square), p, x);
    S::select_lt(size, S::splat(0.25), small, large)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::{LANES, simd_fn};

    simd_fn! {
        fn apply<S>(function: usize, x: &[f32; LANES]) -> [f32; LANES] {
            S::to_array(match function {
                0 => exp::<S>(S::load(x)),
                1 => tanh::<S>(S::load(x)),
                _ => sigmoid::<S>(S::load(x)),
            })
        }
    }

    /// Distance in units of the last place of the exact value.
    fn ulps(got: f32, want: f64) -> f64 {
        let unit =
            f64::from(f32::from_bits((want.abs() as f32).to_bits() + 1)) - f64::from(want.abs() as f32);
        (f64::from(got) - want).abs() / unit
    }

    #[test]
    fn exp_tanh_and_sigmoid_are_within_their_ulps() {
        let exact: [fn(f64) -> f64; 3] = [f64::exp, f64::tanh, |x| 1.0 / (1.0 + (-x).exp())];
        for (function, (exact, most)) in exact.into_iter().zip([2.0, 3.0, 3.0]).enumerate() {
            let mut worst = (0.0, 0.0);
            for i in -54_000..54_000i32 {
                let x: [f32; LANES] = std::array::from_fn(|lane| (i as f32 + lane as f32 / 16.0) * 0.0016);
                for (x, y) in x.into_iter().zip(apply(function, &x)) {
                    let error = ulps(y, exact(f64::from(x)));
                    if error > worst.0 {
                        worst = (error, x);
                    }
                }
            }
            assert!(worst.0 <= most, "function {function}: {} ulp at {}", worst.0, worst.1);
        }
    }

    #[test]
    fn exp_is_right_at_the_ends() {
        let mut x = [0.0; LANES];
        x[..6].copy_from_slice(&[f32::NEG_INFINITY, -1e30, -105.0, 89.0, f32::INFINITY, f32::NAN]);
        let y = apply(0, &x);
        assert_eq!(y[..5], [0.0, 0.0, 0.0, f32::INFINITY, f32::INFINITY]);
        assert!(y[5].is_nan() && y[6] == 1.0);
    }
}
