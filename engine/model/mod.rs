//! One decoder family: what it is, its weights, forward and backward.

pub mod backprop;
mod config_fields;
pub mod decoder;
mod dora;
pub mod experts;
pub mod export;
pub mod footprint;
pub mod freeze;
pub mod gguf;
pub mod gguf_names;
pub mod lora;
pub mod params;
pub mod peft;
pub mod policy;
pub mod rope;
mod rows;
pub mod source;
pub mod spec;
pub mod value_head;
