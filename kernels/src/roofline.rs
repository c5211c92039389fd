//! What this machine can do at most: fused multiply-adds, bf16 products and bytes read, all threads together.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use crate::buffer::Buffer;
use crate::gemm::{Bf16Rule, bf16_rule};
use crate::pool::Pool;
use crate::shared::Shared;
use crate::simd::{LANES, simd_fn};

/// Peak rates, the best of many short windows: of a thread times the threads for arithmetic, of all together for reading.
#[derive(Clone, Copy, Debug)]
pub struct Roofline {
    /// Threads that were measured together.
    pub threads: usize,
    /// f32 fused multiply-adds from registers, 10⁹ operations (two per multiply-add) a second.
    pub f32_gflops: f64,
    /// bf16 products summed in f32 from registers by the rule in use, 10⁹ operations a second.
    pub bf16_gflops: f64,
    /// Bytes read from a buffer larger than the usual last-level caches, 10⁹ a second.
    pub read_gb_per_s: f64,
}

/// Windows per rate; the best counts, as other programs take their share of the slow ones.
const WINDOWS: usize = 400;

/// Bytes of the buffer that is read.
const READ_BYTES: usize = 256 << 20;

/// Windows that one reading of the buffer is cut to.
const READ_PARTS: usize = 16;

/// Measures the rates of this machine with the threads of `pool`, in about a second.
pub fn roofline(pool: &Pool) -> Roofline {
    let threads = pool.threads();
    let rate = |operations: f64, work: &(dyn Fn() + Sync)| {
        let best = AtomicU64::new(u64::MAX);
        for _ in 0..WINDOWS {
            pool.run(threads, |_| {
                let start = Instant::now();
                work();
                best.fetch_min(start.elapsed().as_nanos() as u64, Ordering::Relaxed);
            });
        }
        threads as f64 * operations / best.into_inner() as f64
    };
    let f32_gflops = rate(ROUNDS as f64 * (CHAINS * LANES * 2) as f64, &|| multiply_adds(ROUNDS));
    let bf16_gflops = match bf16_rule() {
        #[cfg(target_arch = "x86_64")]
        Bf16Rule::Amx => rate(ROUNDS as f64 * 4.0 * (16 * 16 * 32 * 2) as f64, &|| {
            // SAFETY: the rule is in use only where the machine has AMX.
            unsafe { x86::tiles(ROUNDS) }
        }),
        #[cfg(target_arch = "x86_64")]
        Bf16Rule::Dot => rate(ROUNDS as f64 * (12 * 32 * 2) as f64, &|| {
            // SAFETY: the rule is in use only where the machine has the instruction.
            unsafe { x86::dots(ROUNDS) }
        }),
        _ => f32_gflops,
    };

    let mut buffer = Buffer::<f32>::zeros(READ_BYTES / size_of::<f32>());
    let part = buffer.len() / (READ_PARTS * threads);
    let pages = Shared::new(&mut buffer);
    // SAFETY: each part belongs to one item. Zero pages are all one page until they are written to.
    pool.run(READ_PARTS * threads, |i| unsafe { pages.part(i * part, part) }.fill(1.0));
    let mut seconds = f64::INFINITY;
    for window in 0..10 * READ_PARTS {
        let window = &buffer[window % READ_PARTS * threads * part..][..threads * part];
        let start = Instant::now();
        pool.run(threads, |i| {
            std::hint::black_box(total(&window[i * part..][..part]));
        });
        seconds = seconds.min(start.elapsed().as_secs_f64());
    }
    let read_gb_per_s = (threads * part * size_of::<f32>()) as f64 / seconds / 1e9;
    Roofline { threads, f32_gflops, bf16_gflops, read_gb_per_s }
}

/// Elements that a line is asked for ahead of its use: 4 KiB.
const AHEAD: usize = 1024;

/// Rounds of one window: about 0.3 ms.
const ROUNDS: usize = 40_000;

/// Independent sums: enough to hide a latency of five cycles on two units.
const CHAINS: usize = 12;

simd_fn! {
    fn multiply_adds<S>(rounds: usize) {
        let a = S::splat(std::hint::black_box(0.5));
        let (mut s0, mut s1, mut s2, mut s3, mut s4, mut s5) = (a, a, a, a, a, a);
        let (mut s6, mut s7, mut s8, mut s9, mut s10, mut s11) = (a, a, a, a, a, a);
        for _ in 0..rounds {
            (s0, s1, s2, s3) = (S::fma(s0, a, a), S::fma(s1, a, a), S::fma(s2, a, a), S::fma(s3, a, a));
            (s4, s5, s6, s7) = (S::fma(s4, a, a), S::fma(s5, a, a), S::fma(s6, a, a), S::fma(s7, a, a));
            (s8, s9, s10, s11) = (S::fma(s8, a, a), S::fma(s9, a, a), S::fma(s10, a, a), S::fma(s11, a, a));
        }
        for s in [s0, s1, s2, s3, s4, s5, s6, s7, s8, s9, s10, s11] {
            std::hint::black_box(S::to_array(s));
        }
    }
}

simd_fn! {
    fn total<S>(x: &[f32]) -> f32 {
        let zero = S::splat(0.0);
        let mut sums = [zero; 8];
        for x in x.chunks_exact(8 * LANES) {
            // Some pages ahead, as the hardware's own prefetch stops at the end of each.
            for i in 0..8 {
                S::prefetch(x.as_ptr().wrapping_add(AHEAD + i * LANES));
            }
            for i in 0..8 {
                sums[i] = S::add(sums[i], S::load(&x[i * LANES..]));
            }
        }
        let mut sum = zero;
        for s in sums {
            sum = S::add(sum, s);
        }
        S::sum(sum)
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::asm;

    use crate::gemm::Tiles;

    /// Four independent tile products a round.
    ///
    /// # Safety
    /// The machine has AMX.
    pub(super) unsafe fn tiles(rounds: usize) {
        // SAFETY: promised by the caller; tiles that were never loaded are zero.
        unsafe {
            let tiles = Tiles::new();
            for _ in 0..rounds {
                asm!(
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "tdpbf16ps tmm1, tmm4, tmm7",
                    "tdpbf16ps tmm2, tmm5, tmm6",
                    "tdpbf16ps tmm3, tmm5, tmm7",
                    options(nostack)
                );
            }
            drop(tiles);
        }
    }

    /// Twelve independent dot products a round.
    ///
    /// # Safety
    /// The machine has AVX-512 BF16.
    #[target_feature(enable = "avx512f,avx512bf16")]
    pub(super) unsafe fn dots(rounds: usize) {
        use std::arch::x86_64::*;

        // SAFETY: 512 bits are 512 bits.
        let x: __m512bh = unsafe { std::mem::transmute(_mm512_set1_epi32(std::hint::black_box(0))) };
        let zero = _mm512_setzero_ps();
        let (mut a, mut b, mut c, mut d) = ([zero; 3], [zero; 3], [zero; 3], [zero; 3]);
        for _ in 0..rounds {
            for i in 0..3 {
                a[i] = _mm512_dpbf16_ps(a[i], x, x);
                b[i] = _mm512_dpbf16_ps(b[i], x, x);
                c[i] = _mm512_dpbf16_ps(c[i], x, x);
                d[i] = _mm512_dpbf16_ps(d[i], x, x);
            }
        }
        std::hint::black_box((a, b, c, d));
    }
}
