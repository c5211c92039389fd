//! Tokens to groups of completions: a paged KV cache, continuous batching and the sampler.

pub mod block_pool;
pub mod engine;
pub mod model;
pub mod sampler;
pub mod scheduler;
pub mod sequence;

pub use engine::{Request, RolloutEngine, RolloutStats};
pub use model::{KvCache, PagedBatch, PagedModel};
pub use sampler::SamplingConfig;
pub use sequence::RolloutKey;
