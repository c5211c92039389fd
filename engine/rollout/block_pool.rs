//! block_pool
