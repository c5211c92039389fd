//! CPU kernels of rft-engine: slices in, numbers out; no models, tokens or files.
//!
//! Every element of every output is a sum in one fixed order that depends on its own row only: not on the other rows, the
//! number of threads, tiles, pages or chunks. So a token's numbers are the same bits whether it was decoded alone, prefilled in
//! a chunk, or trained on in a packed batch. In f32 they are also the same on every x86-64 instruction set (see [`isa`]).
//!
//! Arguments are checked with asserts: a length that does not fit is a defect of the caller and panics.

mod activation;
mod adamw;
mod adamw8;
mod attention;
mod buffer;
mod cache;
mod columns;
mod distribution;
mod dropout;
mod gemm;
mod isa;
mod math;
mod norm;
mod pages;
mod panel;
mod pool;
mod quantized;
pub mod reference;
mod roofline;
mod rope;
mod shared;
mod simd;
mod zeros;

pub use activation::{Act, glu, glu_backward};
pub use adamw::{AdamwStep, adamw, adamw_bf16, sgd, sum_of_squares};
pub use adamw8::{MOMENT_BLOCK, MomentCodes, adamw8, decode_moments};
pub use attention::{
    AttnShape, PagedRun, Segment, Span, paged_attention, segment_attention, segment_attention_backward,
};
pub use buffer::Buffer;
pub use cache::{BLOCK, KvPages, round_kv, store_kv};
pub use columns::{add_bias, add_columns, bias_backward, take_columns};
pub use distribution::{RowStats, Warp, argmax, draw, row_backward, warp_row};
pub use dropout::dropout;
pub use gemm::{
    Bf16Rule, Matrix, STEP, Waiting, Write, bf16_panels_len, bf16_rule, linear, linear_dw, linear_dx,
    select_bf16_rule, to_bf16_panels,
};
pub use isa::{Isa, isa, select_isa};
pub use norm::{add_rms_norm, rms_norm, rms_norm_backward, rms_norm_kept};
pub use pages::{HugePages, held_bytes, release_pages};
pub use panel::{PANEL, gather_rows, pack_panels, panels_len, scatter_add_rows, unpack_panels};
pub use pool::Pool;
pub use quantized::{Code, NF4, QUANT_BLOCK, Quantized};
pub use roofline::{Roofline, roofline};
pub use rope::{QkNorm, Rope, qk_rope, qk_rope_backward};
pub use zeros::{clear, zeros};
