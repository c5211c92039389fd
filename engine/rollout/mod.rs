//! Tokens to groups of completions.

pub mod block_pool;
pub mod engine;
pub mod sampler;
pub mod scheduler;
pub mod sequence;
