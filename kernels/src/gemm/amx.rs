//! The bf16 tile product of AMX, by inline assembly: permission, configuration, and a 32×32 block of sums.
//!
//! `tdpbf16ps` adds the even and the odd products of 32 summands in two f32 chains that start at zero, adds the two, and adds
//! that to the sum; denormals count as zero. A row's result does not depend on the other rows of a tile.

#[cfg(target_arch = "x86_64")]
use std::arch::asm;
use std::sync::OnceLock;

/// Whether the machine has AMX-BF16 and the system lets this process use it.
pub fn amx_is_usable() -> bool {
    static USABLE: OnceLock<bool> = OnceLock::new();
    *USABLE.get_or_init(request)
}

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
fn request() -> bool {
    use std::arch::x86_64::{__cpuid, __cpuid_count};

    const ARCH_PRCTL: i64 = 158;
    const REQUEST_PERMISSION: i64 = 0x1023;
    const TILE_DATA: i64 = 18;
    // CPUID leaf 7: EDX bit 22 is AMX-BF16, bit 24 AMX-TILE.
    let present = __cpuid(0).eax >= 7 && __cpuid_count(7, 0).edx & (1 << 22 | 1 << 24) == 1 << 22 | 1 << 24;
    if !present {
        return false;
    }
    let result: i64;
    // SAFETY: a system call that reads and writes no memory of ours; it clobbers rcx and r11.
    unsafe {
        asm!("syscall", inlateout("rax") ARCH_PRCTL => result, in("rdi") REQUEST_PERMISSION, in("rsi") TILE_DATA,
            out("rcx") _, out("r11") _, options(nostack));
    }
    result == 0
}

#[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
fn request() -> bool {
    false
}

/// Bytes of a tile: 16 rows of 64.
pub(super) const TILE: usize = 1024;

/// The tiles of this thread, configured as 16 rows of 64 bytes each until dropped.
pub(crate) struct Tiles(());

#[cfg(target_arch = "x86_64")]
impl Tiles {
    /// # Safety
    /// [`amx_is_usable`] has said so.
    pub(crate) unsafe fn new() -> Tiles {
        #[repr(C, align(64))]
        struct Config([u8; 64]);
        let mut config = Config([0; 64]);
        config.0[0] = 1;
        for tile in 0..8 {
            config.0[16 + 2 * tile] = 64;
            config.0[48 + tile] = 16;
        }
        // SAFETY: the machine has AMX; the configuration is valid (palette 1, 16 rows of 64 bytes).
        unsafe { asm!("ldtilecfg [{}]", in(reg) &config, options(nostack, readonly)) };
        Tiles(())
    }

    /// The sum of `steps` products of left tiles and panel steps, added to the sums at `from` (zero where there are none) and
    /// stored at `to`: 32 rows, or with `half` 16, of 128 bytes each. While it runs, lines that the caller wants next are fetched.
    ///
    /// # Safety
    /// `left` and `left + below` (not with `half`) are readable for steps·1024 bytes, `panel` for steps·2048; the rows at `from`
    /// and `to` are the caller's.
    pub(super) unsafe fn block(
        &self,
        left: *const u8,
        below: usize,
        panel: *const u8,
        steps: usize,
        from: Option<Rows>,
        to: Rows,
        half: bool,
        ahead: Ahead,
    ) {
        // SAFETY: promised by the caller. The compiler never keeps values in tiles, so they live from one statement to the next.
        unsafe {
            match from {
                None => asm!("tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3"),
                Some(c) => {
                    asm!("tileloadd tmm0, [{c} + {s}]", "tileloadd tmm1, [{c} + {s} + 64]",
                        c = in(reg) c.start, s = in(reg) c.stride, options(nostack, readonly));
                    if !half {
                        asm!("tileloadd tmm2, [{c} + {s}]", "tileloadd tmm3, [{c} + {s} + 64]",
                            c = in(reg) c.start.add(16 * c.stride), s = in(reg) c.stride, options(nostack, readonly));
                    }
                }
            }
            match (half, ahead.lines, ahead.sums.is_null()) {
                (true, 0, _) => steps_of::<true, 0, false>(left, below, panel, steps, ahead),
                (true, ..) => steps_of::<true, 32, false>(left, below, panel, steps, ahead),
                (false, 0, true) => steps_of::<false, 0, false>(left, below, panel, steps, ahead),
                (false, 0, false) => steps_of::<false, 0, true>(left, below, panel, steps, ahead),
                (false, 1..=4, true) => steps_of::<false, 4, false>(left, below, panel, steps, ahead),
                (false, _, false) => steps_of::<false, 4, true>(left, below, panel, steps, ahead),
                (false, 5..=8, _) => steps_of::<false, 8, false>(left, below, panel, steps, ahead),
                (false, 9..=16, _) => steps_of::<false, 16, false>(left, below, panel, steps, ahead),
                (false, ..) => steps_of::<false, 32, false>(left, below, panel, steps, ahead),
            }
            asm!("tilestored [{c} + {s}], tmm0", "tilestored [{c} + {s} + 64], tmm1",
                c = in(reg) to.start, s = in(reg) to.stride, options(nostack));
            if !half {
                asm!("tilestored [{c} + {s}], tmm2", "tilestored [{c} + {s} + 64], tmm3",
                    c = in(reg) to.start.add(16 * to.stride), s = in(reg) to.stride, options(nostack));
            }
        }
    }
}

/// Rows of 32 sums.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
pub(super) struct Rows {
    pub start: *mut u8,
    /// Bytes from one row to the next.
    pub stride: usize,
}

/// What to fetch during a block; addresses may lie anywhere.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
pub(super) struct Ahead {
    /// Lines that come next in some panel.
    pub panel: *const u8,
    /// How many of them at each step.
    pub lines: usize,
    /// Bytes from one step's lines to the next one's; 0 where they follow each other.
    pub stride: usize,
    /// Sums that are written next, two lines at each step; null for none.
    pub sums: *const u8,
}

/// The steps of a block: tiles 0 to 3 += left · panel.
///
/// # Safety
/// As for [`Tiles::block`].
#[cfg(target_arch = "x86_64")]
#[inline(always)]
unsafe fn steps_of<const HALF: bool, const LINES: usize, const SUMS: bool>(
    left: *const u8,
    below: usize,
    panel: *const u8,
    steps: usize,
    ahead: Ahead,
) {
    use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
    // SAFETY: promised by the caller; a prefetch may name any address.
    unsafe {
        for step in 0..steps {
            let left = left.add(step * TILE);
            let panel = panel.add(step * 2 * TILE);
            if HALF {
                asm!(
                    "tileloadd tmm4, [{a} + {s64}]",
                    "tileloadd tmm6, [{b} + {s128}]",
                    "tileloadd tmm7, [{b} + {s128} + 64]",
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "tdpbf16ps tmm1, tmm4, tmm7",
                    a = in(reg) left, b = in(reg) panel, s64 = in(reg) 64usize, s128 = in(reg) 128usize,
                    options(nostack, readonly, preserves_flags)
                );
            } else {
                asm!(
                    "tileloadd tmm4, [{a} + {s64}]",
                    "tileloadd tmm6, [{b} + {s128}]",
                    "tileloadd tmm7, [{b} + {s128} + 64]",
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "tileloadd tmm5, [{a2} + {s64}]",
                    "tdpbf16ps tmm1, tmm4, tmm7",
                    "tdpbf16ps tmm2, tmm5, tmm6",
                    "tdpbf16ps tmm3, tmm5, tmm7",
                    a = in(reg) left, a2 = in(reg) left.add(below), b = in(reg) panel, s64 = in(reg) 64usize,
                    s128 = in(reg) 128usize, options(nostack, readonly, preserves_flags)
                );
            }
            let stride = if ahead.stride == 0 { LINES * 64 } else { ahead.stride };
            for line in 0..LINES {
                _mm_prefetch::<_MM_HINT_T1>(ahead.panel.wrapping_add(step * stride + line * 64).cast());
            }
            if SUMS {
                let sums = ahead.sums.wrapping_add(step * 128);
                asm!("prefetchw [{c}]", "prefetchw [{c} + 64]", c = in(reg) sums,
                    options(nostack, readonly, preserves_flags));
            }
        }
    }
}

/// Copies rows of 128 bytes past the caches, as they are read much later; both sides start at cache lines.
///
/// # Safety
/// `count` rows at `from` are readable, and those at `to` are the caller's to write; all are aligned to 64 bytes.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn stream(from: *const u8, to: Rows, count: usize) {
    use std::arch::x86_64::{_mm512_load_si512, _mm512_stream_si512};
    for row in 0..count {
        // SAFETY: promised by the caller.
        unsafe {
            let (from, to) = (from.add(row * 128), to.start.add(row * to.stride));
            let (low, high) = (_mm512_load_si512(from.cast()), _mm512_load_si512(from.add(64).cast()));
            _mm512_stream_si512(to.cast(), low);
            _mm512_stream_si512(to.add(64).cast(), high);
        }
    }
}

/// Makes what this thread has streamed visible to the others before anything that it writes later.
#[cfg(target_arch = "x86_64")]
pub(super) fn end_stream() {
    // SAFETY: every x86-64 processor has the instruction.
    unsafe { std::arch::x86_64::_mm_sfence() };
}

#[cfg(target_arch = "x86_64")]
impl Drop for Tiles {
    fn drop(&mut self) {
        // SAFETY: tiles exist only where the machine has AMX.
        unsafe { asm!("tilerelease", options(nostack, nomem)) };
    }
}
