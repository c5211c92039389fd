//! The bf16 tile product of AMX, by inline assembly: permission, configuration, and a 32×32 block of sums.
//!
//! `tdpbf16ps` adds the even and the odd products of 32 summands in two f32 chains that start at zero, adds the two, and adds
//! that to the sum; denormals count as zero. A row's result does not depend on the other rows of a tile.

use std::sync::OnceLock;

use super::Write;

/// Whether the machine has AMX-BF16 and the system lets this process use it.
pub fn amx_is_usable() -> bool {
    static USABLE: OnceLock<bool> = OnceLock::new();
    *USABLE.get_or_init(request)
}

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
fn request() -> bool {
    use std::arch::asm;
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
        unsafe { std::arch::asm!("ldtilecfg [{}]", in(reg) &config, options(nostack, readonly)) };
        Tiles(())
    }

    /// c[32, 32] (+)= the sum of `steps` products of left tiles and panel steps.
    ///
    /// # Safety
    /// `left` and `left + below` are readable for steps·1024 bytes, `panel` for steps·2048; 32 rows of 128 bytes, `stride` bytes
    /// apart, are the caller's at `c`.
    pub(super) unsafe fn block(
        &self,
        left: *const u8,
        below: usize,
        panel: *const u8,
        steps: usize,
        c: *mut u8,
        stride: usize,
        write: Write,
    ) {
        use std::arch::asm;
        // SAFETY: promised by the caller. The compiler never keeps values in tiles, so they live from one statement to the next.
        unsafe {
            let lower = c.add(16 * stride);
            match write {
                Write::Set => asm!("tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3"),
                Write::Add => asm!(
                    "tileloadd tmm0, [{c} + {s}]",
                    "tileloadd tmm1, [{c} + {s} + 64]",
                    "tileloadd tmm2, [{l} + {s}]",
                    "tileloadd tmm3, [{l} + {s} + 64]",
                    c = in(reg) c, l = in(reg) lower, s = in(reg) stride, options(nostack, readonly)
                ),
            }
            if steps > 0 {
                asm!(
                    "2:",
                    "tileloadd tmm4, [{a} + {s64}]",
                    "tileloadd tmm6, [{b} + {s128}]",
                    "tileloadd tmm7, [{b} + {s128} + 64]",
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "tileloadd tmm5, [{a2} + {s64}]",
                    "tdpbf16ps tmm1, tmm4, tmm7",
                    "tdpbf16ps tmm2, tmm5, tmm6",
                    "tdpbf16ps tmm3, tmm5, tmm7",
                    "add {a}, 1024",
                    "add {a2}, 1024",
                    "add {b}, 2048",
                    "dec {n}",
                    "jnz 2b",
                    a = inout(reg) left => _, a2 = inout(reg) left.add(below) => _, b = inout(reg) panel => _,
                    n = inout(reg) steps => _, s64 = in(reg) 64usize, s128 = in(reg) 128usize, options(nostack, readonly)
                );
            }
            asm!(
                "tilestored [{c} + {s}], tmm0",
                "tilestored [{c} + {s} + 64], tmm1",
                "tilestored [{l} + {s}], tmm2",
                "tilestored [{l} + {s} + 64], tmm3",
                c = in(reg) c, l = in(reg) lower, s = in(reg) stride, options(nostack)
            );
        }
    }

    /// Like [`Tiles::block`] for 16 rows.
    ///
    /// # Safety
    /// As there, for one left tile and 16 rows.
    pub(super) unsafe fn half_block(
        &self,
        left: *const u8,
        panel: *const u8,
        steps: usize,
        c: *mut u8,
        stride: usize,
        write: Write,
    ) {
        use std::arch::asm;
        // SAFETY: promised by the caller; see `block`.
        unsafe {
            match write {
                Write::Set => asm!("tilezero tmm0", "tilezero tmm1"),
                Write::Add => asm!(
                    "tileloadd tmm0, [{c} + {s}]",
                    "tileloadd tmm1, [{c} + {s} + 64]",
                    c = in(reg) c, s = in(reg) stride, options(nostack, readonly)
                ),
            }
            if steps > 0 {
                asm!(
                    "2:",
                    "tileloadd tmm4, [{a} + {s64}]",
                    "tileloadd tmm6, [{b} + {s128}]",
                    "tileloadd tmm7, [{b} + {s128} + 64]",
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "tdpbf16ps tmm1, tmm4, tmm7",
                    "add {a}, 1024",
                    "add {b}, 2048",
                    "dec {n}",
                    "jnz 2b",
                    a = inout(reg) left => _, b = inout(reg) panel => _, n = inout(reg) steps => _,
                    s64 = in(reg) 64usize, s128 = in(reg) 128usize, options(nostack, readonly)
                );
            }
            asm!(
                "tilestored [{c} + {s}], tmm0",
                "tilestored [{c} + {s} + 64], tmm1",
                c = in(reg) c, s = in(reg) stride, options(nostack)
            );
        }
    }
}

#[cfg(target_arch = "x86_64")]
impl Drop for Tiles {
    fn drop(&mut self) {
        // SAFETY: tiles exist only where the machine has AMX.
        unsafe { std::arch::asm!("tilerelease", options(nostack, nomem)) };
    }
}
