//! Logprobs and advantages to a loss and its gradient.

pub mod aggregate;
pub mod clip;
pub mod kl;
pub mod preference;
