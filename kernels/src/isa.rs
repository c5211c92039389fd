//! Which instruction set the kernels run on: detected once, overridable for tests.
//!
//! In f32 every instruction set gives the same bits (lanes run over outputs, all multiply-adds are fused, reductions use one
//! 16-lane tree). In bf16 the accumulation rule of the hardware instruction is used, so bits may differ between sets.

use std::sync::atomic::{AtomicU8, Ordering};

/// An instruction set that the kernels have a body for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Isa {
    /// Plain Rust; every target.
    Portable,
    /// x86-64 with AVX2 and FMA.
    Avx2,
    /// x86-64 with AVX-512 F, BW, DQ and VL.
    Avx512,
}

impl Isa {
    /// Name as accepted by the environment variable `RFT_ISA`.
    pub fn name(self) -> &'static str {
        match self {
            Isa::Portable => "portable",
            Isa::Avx2 => "avx2",
            Isa::Avx512 => "avx512",
        }
    }

    /// All sets that this machine can run, narrowest first.
    pub fn available() -> Vec<Isa> {
        [Isa::Portable, Isa::Avx2, Isa::Avx512].into_iter().filter(|isa| isa.is_present()).collect()
    }

    fn is_present(self) -> bool {
        match self {
            Isa::Portable => true,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma"),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => {
                Isa::Avx2.is_present()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
            }
            #[cfg(not(target_arch = "x86_64"))]
            _ => false,
        }
    }

    fn code(self) -> u8 {
        match self {
            Isa::Portable => 1,
            Isa::Avx2 => 2,
            Isa::Avx512 => 3,
        }
    }
}

static CHOSEN: AtomicU8 = AtomicU8::new(0);

/// The instruction set in use: the widest that the machine has, or what `RFT_ISA=portable|avx2|avx512` asks for.
///
/// A set that is named but absent is reported on stderr once, and the widest present one below it is used.
pub fn isa() -> Isa {
    match CHOSEN.load(Ordering::Relaxed) {
        1 => Isa::Portable,
        2 => Isa::Avx2,
        3 => Isa::Avx512,
        _ => choose(),
    }
}

/// Makes all kernels of this process use `isa` from now on; false, and no change, where the machine lacks it.
pub fn select_isa(isa: Isa) -> bool {
    let present = isa.is_present();
    if present {
        CHOSEN.store(isa.code(), Ordering::Relaxed);
    }
    present
}

#[cold]
fn choose() -> Isa {
    let widest = *Isa::available().last().expect("the portable set is always there");
    let chosen = match std::env::var("RFT_ISA") {
        Err(_) => widest,
        Ok(name) => {
            match [Isa::Portable, Isa::Avx2, Isa::Avx512].into_iter().find(|isa| isa.name() == name) {
                Some(isa) if isa.is_present() => isa,
                _ => {
                    let names: Vec<_> = Isa::available().into_iter().map(Isa::name).collect();
                    eprintln!(
                        "warning: RFT_ISA={name} is not available here; using {}\nhint: this machine has {}",
                        widest.name(),
                        names.join(", ")
                    );
                    widest
                }
            }
        }
    };
    CHOSEN.store(chosen.code(), Ordering::Relaxed);
    chosen
}
