//! Sixteen f32 lanes on every instruction set, so that a kernel body is written once.
//!
//! `Avx512` holds them in one register, `Avx2` in two, `Portable` in an array. All operations are exactly rounded (fused
//! multiply-add, division, square root), and horizontal sums use one tree, so the three give the same bits.
//! [`simd_fn!`] compiles a generic body for each set and picks one at run time. Bodies must not touch vectors in closures: a closure
//! that is not inlined is compiled without the set's features, and every operation in it becomes a call.

/// Lanes of a vector.
pub(crate) const LANES: usize = 16;

/// Operations on a vector of [`LANES`] f32.
///
/// Implementations other than [`Portable`] may only be named inside bodies made by [`simd_fn!`], which checks the machine.
pub(crate) trait Simd: Copy {
    type V: Copy;
    /// Most rows of a 32-column GEMM tile that fit into the registers.
    const TILE_ROWS: usize;
    /// Whether 28 vectors fit into the registers.
    const MANY_REGISTERS: bool;

    fn splat(x: f32) -> Self::V;
    /// # Safety
    /// 16 floats are readable at `p`.
    unsafe fn read(p: *const f32) -> Self::V;
    /// # Safety
    /// 16 floats are writable at `p`.
    unsafe fn write(v: Self::V, p: *mut f32);
    /// Asks for the cache line at `p`, which may be any address.
    fn prefetch(p: *const f32);
    /// As [`Simd::prefetch`], to the second cache level only.
    fn prefetch_far(p: *const f32);
    /// As [`Simd::prefetch`], in order to write to the line.
    fn prefetch_write(p: *const f32);
    fn add(a: Self::V, b: Self::V) -> Self::V;
    fn sub(a: Self::V, b: Self::V) -> Self::V;
    fn mul(a: Self::V, b: Self::V) -> Self::V;
    fn div(a: Self::V, b: Self::V) -> Self::V;
    fn sqrt(a: Self::V) -> Self::V;
    /// a·b + c, rounded once.
    fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// c − a·b, rounded once.
    fn fnma(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// a > b ? a : b, so a NaN in either operand gives `b`.
    fn max(a: Self::V, b: Self::V) -> Self::V;
    /// a < b ? a : b, so a NaN in either operand gives `b`.
    fn min(a: Self::V, b: Self::V) -> Self::V;
    /// a < b ? x : y.
    fn select_lt(a: Self::V, b: Self::V, x: Self::V, y: Self::V) -> Self::V;
    fn abs(a: Self::V) -> Self::V;
    /// |a| with the sign of b.
    fn copysign(a: Self::V, b: Self::V) -> Self::V;
    /// p·2^n for whole n in −252..=254, rounded once.
    fn scale(p: Self::V, n: Self::V) -> Self::V;
    /// The low 16 bits of each lane as a bf16 number.
    fn bf16_low(v: Self::V) -> Self::V;
    /// The high 16 bits of each lane as a bf16 number.
    fn bf16_high(v: Self::V) -> Self::V;

    /// # Safety
    /// 16 bf16 numbers are readable at `p`.
    unsafe fn read_bf16(p: *const u16) -> Self::V;

    /// Writes the lanes rounded to bf16, to nearest even; NaN stays NaN.
    ///
    /// # Safety
    /// 16 elements are writable at `p`.
    unsafe fn write_bf16(v: Self::V, p: *mut u16);

    /// Lane i holds `even[i]` in its low and `odd[i]` in its high half, rounded to bf16.
    #[inline(always)]
    fn pair_bf16(even: Self::V, odd: Self::V) -> Self::V {
        let (even, odd) = (Self::to_array(even), Self::to_array(odd));
        let mut both = [0.0; LANES];
        for i in 0..LANES {
            let bits = u32::from(crate::gemm::round(odd[i])) << 16 | u32::from(crate::gemm::round(even[i]));
            both[i] = f32::from_bits(bits);
        }
        Self::load(&both)
    }

    /// From lanes that hold two halves each: 32 lanes (low a, low b), (high a, high b), lane after lane.
    #[inline(always)]
    fn weave_bf16(a: Self::V, b: Self::V) -> (Self::V, Self::V) {
        let (a, b) = (Self::to_array(a), Self::to_array(b));
        let mut woven = [0.0; 2 * LANES];
        for i in 0..LANES {
            let (a, b) = (a[i].to_bits(), b[i].to_bits());
            woven[2 * i] = f32::from_bits(a & 0xffff | b << 16);
            woven[2 * i + 1] = f32::from_bits(a >> 16 | b & 0xffff_0000);
        }
        (Self::load(&woven), Self::load(&woven[LANES..]))
    }

    /// Transposes 16 × 16.
    #[inline(always)]
    fn transpose(rows: &mut [Self::V; LANES]) {
        let mut from = [[0.0; LANES]; LANES];
        for i in 0..LANES {
            from[i] = Self::to_array(rows[i]);
        }
        for i in 0..LANES {
            let mut column = [0.0; LANES];
            for j in 0..LANES {
                column[j] = from[j][i];
            }
            rows[i] = Self::load(&column);
        }
    }

    /// The first 16 elements, zeros where there are fewer.
    #[inline(always)]
    fn load(s: &[f32]) -> Self::V {
        if s.len() >= LANES {
            // SAFETY: 16 elements, just checked.
            unsafe { Self::read(s.as_ptr()) }
        } else {
            let mut full = [0.0; LANES];
            full[..s.len()].copy_from_slice(s);
            // SAFETY: the array has 16 elements.
            unsafe { Self::read(full.as_ptr()) }
        }
    }

    /// Writes 16 elements, or as many as there are.
    #[inline(always)]
    fn store(v: Self::V, s: &mut [f32]) {
        if s.len() >= LANES {
            // SAFETY: 16 elements, just checked.
            unsafe { Self::write(v, s.as_mut_ptr()) }
        } else {
            let full = Self::to_array(v);
            s.copy_from_slice(&full[..s.len()]);
        }
    }

    #[inline(always)]
    fn to_array(v: Self::V) -> [f32; LANES] {
        let mut full = [0.0; LANES];
        // SAFETY: the array has 16 elements.
        unsafe { Self::write(v, full.as_mut_ptr()) };
        full
    }

    /// Sum of the lanes: halves added to halves, 8, 4, 2, 1.
    #[inline(always)]
    fn sum(v: Self::V) -> f32 {
        let mut a = Self::to_array(v);
        let mut half = LANES / 2;
        while half > 0 {
            for i in 0..half {
                a[i] += a[i + half];
            }
            half /= 2;
        }
        a[0]
    }

    /// Largest lane, by halves; with a NaN among them, any of them.
    #[inline(always)]
    fn largest(v: Self::V) -> f32 {
        let mut a = Self::to_array(v);
        let mut half = LANES / 2;
        while half > 0 {
            for i in 0..half {
                a[i] = if a[i] > a[i + half] { a[i] } else { a[i + half] };
            }
            half /= 2;
        }
        a[0]
    }
}

#[derive(Clone, Copy)]
pub(crate) struct Portable;

macro_rules! lanewise {
    (|$($x:ident),+| $e:expr) => {{
        let mut out = [0.0f32; LANES];
        for i in 0..LANES {
            $(let $x = $x[i];)+
            out[i] = $e;
        }
        out
    }};
}

impl Simd for Portable {
    type V = [f32; LANES];
    const TILE_ROWS: usize = 2;
    const MANY_REGISTERS: bool = false;

    #[inline(always)]
    fn splat(x: f32) -> Self::V {
        [x; LANES]
    }
    #[inline(always)]
    unsafe fn read(p: *const f32) -> Self::V {
        // SAFETY: promised by the caller.
        unsafe { p.cast::<[f32; LANES]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn write(v: Self::V, p: *mut f32) {
        // SAFETY: promised by the caller.
        unsafe { p.cast::<[f32; LANES]>().write_unaligned(v) }
    }
    #[inline(always)]
    fn prefetch(_: *const f32) {}
    #[inline(always)]
    fn prefetch_far(_: *const f32) {}
    #[inline(always)]
    fn prefetch_write(_: *const f32) {}
    #[inline(always)]
    fn add(a: Self::V, b: Self::V) -> Self::V {
        lanewise!(|a, b| a + b)
    }
    #[inline(always)]
    fn sub(a: Self::V, b: Self::V) -> Self::V {
        lanewise!(|a, b| a - b)
    }
    #[inline(always)]
    fn mul(a: Self::V, b: Self::V) -> Self::V {
        lanewise!(|a, b| a * b)
    }
    #[inline(always)]
    fn div(a: Self::V, b: Self::V) -> Self::V {
        lanewise!(|a, b| a / b)
    }
    #[inline(always)]
    fn sqrt(a: Self::V) -> Self::V {
        lanewise!(|a| a.sqrt())
    }
    #[inline(always)]
    fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        lanewise!(|a, b, c| a.mul_add(b, c))
    }
    #[inline(always)]
    fn fnma(a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        lanewise!(|a, b, c| (-a).mul_add(b, c))
    }
    #[inline(always)]
    fn max(a: Self::V, b: Self::V) -> Self::V {
        lanewise!(|a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    fn min(a: Self::V, b: Self::V) -> Self::V {
        lanewise!(|a, b| if a < b { a } else { b })
    }
    #[inline(always)]
    fn select_lt(a: Self::V, b: Self::V, x: Self::V, y: Self::V) -> Self::V {
        lanewise!(|a, b, x, y| if a < b { x } else { y })
    }
    #[inline(always)]
    fn abs(a: Self::V) -> Self::V {
        lanewise!(|a| a.abs())
    }
    #[inline(always)]
    fn copysign(a: Self::V, b: Self::V) -> Self::V {
        lanewise!(|a, b| a.copysign(b))
    }
    #[inline(always)]
    fn scale(p: Self::V, n: Self::V) -> Self::V {
        lanewise!(|p, n| {
            let n = n as i32;
            let half = n >> 1;
            let power = |e: i32| f32::from_bits(((e + 127) as u32) << 23);
            p * power(half) * power(n - half)
        })
    }
    #[inline(always)]
    fn bf16_low(v: Self::V) -> Self::V {
        lanewise!(|v| f32::from_bits(v.to_bits() << 16))
    }
    #[inline(always)]
    fn bf16_high(v: Self::V) -> Self::V {
        lanewise!(|v| f32::from_bits(v.to_bits() & 0xffff_0000))
    }
    #[inline(always)]
    unsafe fn read_bf16(p: *const u16) -> Self::V {
        // SAFETY: promised by the caller.
        let bits = unsafe { p.cast::<[u16; LANES]>().read_unaligned() };
        let mut wide = [0.0; LANES];
        for i in 0..LANES {
            wide[i] = f32::from_bits(u32::from(bits[i]) << 16);
        }
        wide
    }
    #[inline(always)]
    unsafe fn write_bf16(v: Self::V, p: *mut u16) {
        for (i, x) in v.into_iter().enumerate() {
            // SAFETY: promised by the caller.
            unsafe { p.add(i).write(crate::gemm::round(x)) };
        }
    }
}

#[cfg(target_arch = "x86_64")]
pub(crate) use x86::{Avx2, Avx512};

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::Simd;

    // SAFETY (whole module): `Avx2` and `Avx512` are named only inside entry points made by `simd_fn!`, which run after the
    // machine was found to have the features; reads and writes are promised by the caller.
    macro_rules! hw {
        ($e:expr) => {{
            // SAFETY: see the note at the top of the module.
            #[allow(unused_unsafe)]
            unsafe {
                $e
            }
        }};
    }

    #[derive(Clone, Copy)]
    pub(crate) struct Avx512;

    impl Simd for Avx512 {
        type V = __m512;
        const TILE_ROWS: usize = 12;
        const MANY_REGISTERS: bool = true;

        #[inline(always)]
        fn splat(x: f32) -> __m512 {
            hw!(_mm512_set1_ps(x))
        }
        #[inline(always)]
        unsafe fn read(p: *const f32) -> __m512 {
            hw!(_mm512_loadu_ps(p))
        }
        #[inline(always)]
        unsafe fn write(v: __m512, p: *mut f32) {
            hw!(_mm512_storeu_ps(p, v))
        }
        #[inline(always)]
        fn prefetch(p: *const f32) {
            hw!(_mm_prefetch::<_MM_HINT_T0>(p.cast()));
        }
        #[inline(always)]
        fn prefetch_far(p: *const f32) {
            hw!(_mm_prefetch::<_MM_HINT_T1>(p.cast()));
        }
        #[inline(always)]
        fn prefetch_write(p: *const f32) {
            hw!(std::arch::asm!("prefetchw [{}]", in(reg) p, options(nostack, preserves_flags, readonly)));
        }
        #[inline(always)]
        fn add(a: __m512, b: __m512) -> __m512 {
            hw!(_mm512_add_ps(a, b))
        }
        #[inline(always)]
        fn sub(a: __m512, b: __m512) -> __m512 {
            hw!(_mm512_sub_ps(a, b))
        }
        #[inline(always)]
        fn mul(a: __m512, b: __m512) -> __m512 {
            hw!(_mm512_mul_ps(a, b))
        }
        #[inline(always)]
        fn div(a: __m512, b: __m512) -> __m512 {
            hw!(_mm512_div_ps(a, b))
        }
        #[inline(always)]
        fn sqrt(a: __m512) -> __m512 {
            hw!(_mm512_sqrt_ps(a))
        }
        #[inline(always)]
        fn fma(a: __m512, b: __m512, c: __m512) -> __m512 {
            hw!(_mm512_fmadd_ps(a, b, c))
        }
        #[inline(always)]
        fn fnma(a: __m512, b: __m512, c: __m512) -> __m512 {
            hw!(_mm512_fnmadd_ps(a, b, c))
        }
        #[inline(always)]
        fn max(a: __m512, b: __m512) -> __m512 {
            hw!(_mm512_max_ps(a, b))
        }
        #[inline(always)]
        fn min(a: __m512, b: __m512) -> __m512 {
            hw!(_mm512_min_ps(a, b))
        }
        #[inline(always)]
        fn select_lt(a: __m512, b: __m512, x: __m512, y: __m512) -> __m512 {
            hw!(_mm512_mask_blend_ps(_mm512_cmp_ps_mask::<_CMP_LT_OQ>(a, b), y, x))
        }
        #[inline(always)]
        fn abs(a: __m512) -> __m512 {
            hw!(_mm512_abs_ps(a))
        }
        #[inline(always)]
        fn copysign(a: __m512, b: __m512) -> __m512 {
            let sign = hw!(_mm512_set1_ps(-0.0));
            hw!(_mm512_or_ps(_mm512_andnot_ps(sign, a), _mm512_and_ps(sign, b)))
        }
        #[inline(always)]
        fn scale(p: __m512, n: __m512) -> __m512 {
            hw!(_mm512_scalef_ps(p, n))
        }
        #[inline(always)]
        fn bf16_low(v: __m512) -> __m512 {
            hw!(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_castps_si512(v))))
        }
        #[inline(always)]
        fn bf16_high(v: __m512) -> __m512 {
            hw!(_mm512_and_ps(v, _mm512_castsi512_ps(_mm512_set1_epi32(0xffff_0000u32 as i32))))
        }
        #[inline(always)]
        unsafe fn read_bf16(p: *const u16) -> __m512 {
            hw!(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(
                p.cast()
            )))))
        }
        #[inline(always)]
        unsafe fn write_bf16(v: __m512, p: *mut u16) {
            hw!({
                let up = rounded_bf16(v);
                _mm256_storeu_si256(p.cast(), _mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(up)));
            })
        }
        #[inline(always)]
        fn pair_bf16(even: __m512, odd: __m512) -> __m512 {
            hw!({
                let (even, odd) = (rounded_bf16(even), rounded_bf16(odd));
                let high = _mm512_and_si512(odd, _mm512_set1_epi32(0xffff_0000u32 as i32));
                _mm512_castsi512_ps(_mm512_or_si512(_mm512_srli_epi32::<16>(even), high))
            })
        }
        #[inline(always)]
        fn weave_bf16(a: __m512, b: __m512) -> (__m512, __m512) {
            hw!({
                let (a, b) = (_mm512_castps_si512(a), _mm512_castps_si512(b));
                let low = _mm512_mask_blend_epi16(0xaaaa_aaaa, a, _mm512_slli_epi32::<16>(b));
                let high = _mm512_mask_blend_epi16(0xaaaa_aaaa, _mm512_srli_epi32::<16>(a), b);
                let first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
                let second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
                let lower = _mm512_permutex2var_epi32(low, first, high);
                let upper = _mm512_permutex2var_epi32(low, second, high);
                (_mm512_castsi512_ps(lower), _mm512_castsi512_ps(upper))
            })
        }
        #[inline(always)]
        fn transpose(r: &mut [__m512; 16]) {
            hw!({
                // Within groups of four rows: 4×4 blocks of every 128-bit lane.
                for q in r.chunks_exact_mut(4) {
                    let (a, b) = (_mm512_unpacklo_ps(q[0], q[1]), _mm512_unpackhi_ps(q[0], q[1]));
                    let (c, d) = (_mm512_unpacklo_ps(q[2], q[3]), _mm512_unpackhi_ps(q[2], q[3]));
                    q[0] = _mm512_shuffle_ps::<0b01_00_01_00>(a, c);
                    q[1] = _mm512_shuffle_ps::<0b11_10_11_10>(a, c);
                    q[2] = _mm512_shuffle_ps::<0b01_00_01_00>(b, d);
                    q[3] = _mm512_shuffle_ps::<0b11_10_11_10>(b, d);
                }
                // Then the 4×4 matrix of lanes.
                for i in 0..4 {
                    let (a, b, c, d) = (r[i], r[i + 4], r[i + 8], r[i + 12]);
                    let ab = _mm512_shuffle_f32x4::<0b10_00_10_00>(a, b);
                    let ab_odd = _mm512_shuffle_f32x4::<0b11_01_11_01>(a, b);
                    let cd = _mm512_shuffle_f32x4::<0b10_00_10_00>(c, d);
                    let cd_odd = _mm512_shuffle_f32x4::<0b11_01_11_01>(c, d);
                    r[i] = _mm512_shuffle_f32x4::<0b10_00_10_00>(ab, cd);
                    r[i + 8] = _mm512_shuffle_f32x4::<0b11_01_11_01>(ab, cd);
                    r[i + 4] = _mm512_shuffle_f32x4::<0b10_00_10_00>(ab_odd, cd_odd);
                    r[i + 12] = _mm512_shuffle_f32x4::<0b11_01_11_01>(ab_odd, cd_odd);
                }
            })
        }
    }

    /// Bits of the lanes after rounding to bf16; the low halves are leftovers.
    #[inline(always)]
    unsafe fn rounded_bf16(v: __m512) -> __m512i {
        hw!({
            let bits = _mm512_castps_si512(v);
            let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
            let up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
            let nan = _mm512_or_si512(bits, _mm512_set1_epi32(0x40_0000));
            _mm512_mask_blend_epi32(_mm512_cmp_ps_mask::<_CMP_UNORD_Q>(v, v), up, nan)
        })
    }

    #[derive(Clone, Copy)]
    pub(crate) struct Avx2;

    macro_rules! both {
        (|$($x:ident),+| $e:expr) => {{
            let lower = { $(let $x = $x.0;)+ hw!($e) };
            let upper = { $(let $x = $x.1;)+ hw!($e) };
            Pair(lower, upper)
        }};
    }

    #[derive(Clone, Copy)]
    pub(crate) struct Pair(__m256, __m256);

    impl Simd for Avx2 {
        type V = Pair;
        const TILE_ROWS: usize = 3;
        const MANY_REGISTERS: bool = false;

        #[inline(always)]
        fn splat(x: f32) -> Pair {
            let v = hw!(_mm256_set1_ps(x));
            Pair(v, v)
        }
        #[inline(always)]
        unsafe fn read(p: *const f32) -> Pair {
            Pair(hw!(_mm256_loadu_ps(p)), hw!(_mm256_loadu_ps(p.add(8))))
        }
        #[inline(always)]
        unsafe fn write(v: Pair, p: *mut f32) {
            hw!(_mm256_storeu_ps(p, v.0));
            hw!(_mm256_storeu_ps(p.add(8), v.1));
        }
        #[inline(always)]
        fn prefetch(p: *const f32) {
            hw!(_mm_prefetch::<_MM_HINT_T0>(p.cast()));
        }
        #[inline(always)]
        fn prefetch_far(p: *const f32) {
            hw!(_mm_prefetch::<_MM_HINT_T1>(p.cast()));
        }
        #[inline(always)]
        fn prefetch_write(p: *const f32) {
            hw!(std::arch::asm!("prefetchw [{}]", in(reg) p, options(nostack, preserves_flags, readonly)));
        }
        #[inline(always)]
        fn add(a: Pair, b: Pair) -> Pair {
            both!(|a, b| _mm256_add_ps(a, b))
        }
        #[inline(always)]
        fn sub(a: Pair, b: Pair) -> Pair {
            both!(|a, b| _mm256_sub_ps(a, b))
        }
        #[inline(always)]
        fn mul(a: Pair, b: Pair) -> Pair {
            both!(|a, b| _mm256_mul_ps(a, b))
        }
        #[inline(always)]
        fn div(a: Pair, b: Pair) -> Pair {
            both!(|a, b| _mm256_div_ps(a, b))
        }
        #[inline(always)]
        fn sqrt(a: Pair) -> Pair {
            both!(|a| _mm256_sqrt_ps(a))
        }
        #[inline(always)]
        fn fma(a: Pair, b: Pair, c: Pair) -> Pair {
            both!(|a, b, c| _mm256_fmadd_ps(a, b, c))
        }
        #[inline(always)]
        fn fnma(a: Pair, b: Pair, c: Pair) -> Pair {
            both!(|a, b, c| _mm256_fnmadd_ps(a, b, c))
        }
        #[inline(always)]
        fn max(a: Pair, b: Pair) -> Pair {
            both!(|a, b| _mm256_max_ps(a, b))
        }
        #[inline(always)]
        fn min(a: Pair, b: Pair) -> Pair {
            both!(|a, b| _mm256_min_ps(a, b))
        }
        #[inline(always)]
        fn select_lt(a: Pair, b: Pair, x: Pair, y: Pair) -> Pair {
            both!(|a, b, x, y| _mm256_blendv_ps(y, x, _mm256_cmp_ps::<_CMP_LT_OQ>(a, b)))
        }
        #[inline(always)]
        fn abs(a: Pair) -> Pair {
            both!(|a| _mm256_andnot_ps(_mm256_set1_ps(-0.0), a))
        }
        #[inline(always)]
        fn copysign(a: Pair, b: Pair) -> Pair {
            both!(|a, b| {
                let sign = _mm256_set1_ps(-0.0);
                _mm256_or_ps(_mm256_andnot_ps(sign, a), _mm256_and_ps(sign, b))
            })
        }
        #[inline(always)]
        fn scale(p: Pair, n: Pair) -> Pair {
            both!(|p, n| {
                let n = _mm256_cvtps_epi32(n);
                let half = _mm256_srai_epi32::<1>(n);
                let bias = _mm256_set1_epi32(127);
                let first = _mm256_slli_epi32::<23>(_mm256_add_epi32(half, bias));
                let second = _mm256_slli_epi32::<23>(_mm256_add_epi32(_mm256_sub_epi32(n, half), bias));
                _mm256_mul_ps(_mm256_mul_ps(p, _mm256_castsi256_ps(first)), _mm256_castsi256_ps(second))
            })
        }
        #[inline(always)]
        fn bf16_low(v: Pair) -> Pair {
            both!(|v| _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_castps_si256(v))))
        }
        #[inline(always)]
        fn bf16_high(v: Pair) -> Pair {
            both!(|v| _mm256_and_ps(v, _mm256_castsi256_ps(_mm256_set1_epi32(0xffff_0000u32 as i32))))
        }
        #[inline(always)]
        unsafe fn read_bf16(p: *const u16) -> Pair {
            let wide = |p: *const u16| {
                hw!(_mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(_mm_loadu_si128(
                    p.cast()
                )))))
            };
            Pair(wide(p), wide(p.wrapping_add(8)))
        }
        #[inline(always)]
        unsafe fn write_bf16(v: Pair, p: *mut u16) {
            let up = both!(|v| {
                let bits = _mm256_castps_si256(v);
                let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
                let up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
                let nan = _mm256_or_si256(bits, _mm256_set1_epi32(0x40_0000));
                let up =
                    _mm256_blendv_epi8(up, nan, _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(v, v)));
                _mm256_castsi256_ps(_mm256_srli_epi32::<16>(up))
            });
            hw!({
                let packed = _mm256_packus_epi32(_mm256_castps_si256(up.0), _mm256_castps_si256(up.1));
                _mm256_storeu_si256(p.cast(), _mm256_permute4x64_epi64::<0b11_01_10_00>(packed));
            })
        }
    }
}

/// Compiles a body that is generic over [`Simd`] for each instruction set, and a function that runs the one in use.
macro_rules! simd_fn {
    ($(#[$meta:meta])* $vis:vis fn $name:ident<$S:ident>($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? $body:block) => {
        $(#[$meta])*
        $vis fn $name($($arg: $ty),*) $(-> $ret)? {
            #[inline(always)]
            fn body<$S: $crate::simd::Simd>($($arg: $ty),*) $(-> $ret)? $body

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
            fn avx512($($arg: $ty),*) $(-> $ret)? {
                body::<$crate::simd::Avx512>($($arg),*)
            }

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma")]
            fn avx2($($arg: $ty),*) $(-> $ret)? {
                body::<$crate::simd::Avx2>($($arg),*)
            }

            match $crate::isa::isa() {
                #[cfg(target_arch = "x86_64")]
                // SAFETY: `isa` names a set only where the machine has it.
                $crate::isa::Isa::Avx512 => unsafe { avx512($($arg),*) },
                #[cfg(target_arch = "x86_64")]
                // SAFETY: as above.
                $crate::isa::Isa::Avx2 => unsafe { avx2($($arg),*) },
                _ => body::<$crate::simd::Portable>($($arg),*),
            }
        }
    };
}
pub(crate) use simd_fn;
