//! Reinforcement fine-tuning with verifiable rewards.
//!
//! The modules follow the data:
//!
//! ```text
//! data -> rollout -> reward -> advantage -> loss -> learner
//!          \________________ model ________________/
//! ```
//!
//! [`train`] is the one place that sees all six; [`cli`] turns a command line into calls of it.

pub mod advantage;
pub mod bench;
pub mod cli;
pub mod config;
pub mod data;
pub mod error;
pub mod eval;
pub mod learner;
pub mod loss;
pub mod memory;
pub mod model;
pub mod report;
pub mod reward;
pub mod rng;
pub mod rollout;
pub mod train;
pub mod types;

pub use error::{EngineError, Result};
