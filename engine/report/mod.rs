//! What a run leaves behind: metrics, samples, curves, a page.

pub mod chart;
pub mod forgetting;
pub mod health;
pub mod html;
pub mod metrics;
pub mod progress;
pub mod sinks;
pub mod stages;
pub mod tensorboard;
