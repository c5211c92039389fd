//! One decoder family: what it is, its weights, forward and backward.

pub mod decoder;
pub mod backprop;
pub mod export;
pub mod gguf;
pub mod gguf_names;
pub mod lora;
pub mod params;
pub mod rope;
pub mod source;
pub mod spec;
