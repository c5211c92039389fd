//! Verifiers.

pub mod boxes;
pub mod host;
pub mod math;
pub mod pool;
pub mod sandbox;
pub mod score;
pub mod script;
pub mod tools;
pub mod verify;
