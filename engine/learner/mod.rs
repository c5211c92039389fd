//! The update: micro-batches, optimizer, schedules, checkpoints.

pub mod batch;
pub mod checkpoint;
pub mod critic;
mod gradient;
pub mod optimizer;
pub mod schedule;
pub mod step;
