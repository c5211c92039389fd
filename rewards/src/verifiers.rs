//! All scripts of a run on one thread: from a group of samples to their outcomes.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use crate::outcome;
use crate::sandbox::Sandbox;
use crate::types::{Context, ErrorKind, Outcome, RewardSpec, Sample};

/// The verifiers of a run, one sandbox each, for use on one thread; [`crate::RewardPool`] has one of these a worker.
pub struct Verifiers {
    specs: Arc<Vec<RewardSpec>>,
    sandboxes: Vec<Sandbox>,
}

impl Verifiers {
    /// Verifiers whose outcomes are summed; VMs start with the first call.
    pub fn new(specs: impl Into<Arc<Vec<RewardSpec>>>) -> Self {
        let specs = specs.into();
        let sandboxes = specs.iter().map(sandbox).collect();
        Self { specs, sandboxes }
    }

    /// Sets what each script reads as `ctx.state`, in order; what [`crate::RewardPool::states`] gives.
    pub fn set_states(&mut self, states: &[Arc<str>]) {
        for (own, state) in self.sandboxes.iter().zip(states) {
            own.set_state(state);
        }
    }

    /// Scores a group, the samples of one prompt; one outcome a sample, in their order.
    pub fn score(&mut self, samples: &[Sample], context: &Context) -> Vec<Outcome> {
        let mut outcomes = vec![Outcome::default(); samples.len()];
        let task = samples.first().map_or("", |sample| sample.task.as_str());
        for (spec, own) in self.specs.iter().zip(&mut self.sandboxes).filter(|(s, _)| s.applies_to(task)) {
            let answers = guarded(|| own.score(samples, context)).unwrap_or_else(|message| {
                // whatever state the VM was left in goes with it
                let state = own.state();
                *own = sandbox(spec);
                own.set_state(&state);
                let message = format!("defect of the verifier library, please report it: {message}");
                let error = spec.script.error(ErrorKind::Runtime, message, None);
                samples.iter().map(|_| Err(error.clone())).collect()
            });
            for ((outcome, sample), answer) in outcomes.iter_mut().zip(samples).zip(answers) {
                outcome::add(outcome, spec, sample, answer);
            }
        }
        outcomes
    }
}

fn sandbox(spec: &RewardSpec) -> Sandbox {
    Sandbox::new(spec.script.clone(), spec.limits, spec.options.clone())
}

/// Runs a call whose panic must not take the thread, and with it the outcome that someone waits for.
fn guarded<T>(call: impl FnOnce() -> T) -> Result<T, String> {
    catch_unwind(AssertUnwindSafe(call)).map_err(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("a panic").to_string()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_becomes_its_message() {
        assert_eq!(guarded(|| 3), Ok(3));
        assert_eq!(
            guarded(|| if true {
                panic!("index {} of {}", 4, 2)
            }),
            Err("index 4 of 2".into())
        );
    }
}
