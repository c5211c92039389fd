//! Verifiers: Lua scripts that turn a completion into a reward, run where they can do no harm.
//!
//! A [`Script`] (shipped or the user's) defines `reward(sample, ctx)` or `reward_group(samples, ctx)`. [`RewardPool`]
//! runs scripts on worker threads, one Luau VM a worker and script, under [`Limits`]; every failure becomes a
//! [`RewardError`] in the [`Outcome`], never a silent 0. [`math`], [`tools`] and [`boxes`] are the pure cores behind the
//! scripts' `rft` library; [`verify`] tries a reward before a run does. Text goes in and numbers come out: no tensors, no tokenizer, no engine types.

pub mod boxes;
mod budget;
mod cases;
mod guards;
mod host;
pub mod math;
mod outcome;
mod pool;
mod returned;
mod sandbox;
mod script;
pub mod tools;
mod types;
mod verifiers;
pub mod verify;

pub use cases::{Case, cases};
pub use pool::{PoolError, RewardPool};
pub use script::{SHIPPED, Script, ScriptError, Source, resolve, shipped_cases};
pub use types::{Context, ErrorKind, Limits, OnError, Outcome, RewardError, RewardSpec, Sample};
pub use verifiers::Verifiers;
