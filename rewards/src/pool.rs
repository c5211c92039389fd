//! Worker threads that score groups: each has its own verifiers; jobs and results travel over channels.

use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use crossbeam::channel::{Receiver, Sender, unbounded};
use serde_json::{Value, json};

use crate::sandbox::Sandbox;
use crate::types::{Context, Outcome, RewardError, RewardSpec, Sample};
use crate::verifiers::Verifiers;

/// Why a pool cannot start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PoolError {
    /// The system refused a thread.
    #[error("a verifier thread did not start: {0}")]
    Thread(std::io::Error),
}

struct Job {
    ticket: u64,
    samples: Vec<Sample>,
    context: Context,
    states: Arc<[Arc<str>]>,
}

/// The verifiers of a run. Results do not depend on the number of workers, only their order does.
pub struct RewardPool {
    jobs: Option<Sender<Job>>,
    results: Receiver<(u64, Vec<Outcome>)>,
    workers: Vec<JoinHandle<()>>,
    specs: Arc<Vec<RewardSpec>>,
    states: Mutex<Arc<[Arc<str>]>>,
}

impl RewardPool {
    /// Starts `workers` threads (at least one) that score with every script of `specs`.
    ///
    /// # Errors
    /// The system refuses a thread.
    pub fn new(specs: Vec<RewardSpec>, workers: usize) -> Result<Self, PoolError> {
        let specs = Arc::new(specs);
        let (jobs, job_source) = unbounded::<Job>();
        let (result_sink, results) = unbounded();
        let workers = (0..workers.max(1))
            .map(|i| {
                let (specs, jobs, results) = (Arc::clone(&specs), job_source.clone(), result_sink.clone());
                std::thread::Builder::new()
                    .name(format!("verifier-{i}"))
                    .spawn(move || work(&specs, &jobs, &results))
                    .map_err(PoolError::Thread)
            })
            .collect::<Result<_, _>>()?;
        let states = specs.iter().map(|_| Arc::from("{}")).collect();
        Ok(Self { jobs: Some(jobs), results, workers, specs, states: Mutex::new(states) })
    }

    /// Hands over a group under a number of the caller's choice; returns at once.
    pub fn submit(&self, ticket: u64, samples: Vec<Sample>, context: Context) {
        let sender = self.jobs.as_ref().expect("the pool takes jobs until it is dropped");
        sender
            .send(Job { ticket, samples, context, states: self.states() })
            .expect("workers live as long as the pool");
    }

    /// What each script reads as `ctx.state`, as JSON text, scripts in order; `{}` for those that keep none.
    pub fn states(&self) -> Arc<[Arc<str>]> {
        Arc::clone(&self.states.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Restores what [`RewardPool::states`] gave; groups handed over before keep what they had.
    pub fn set_states(&self, states: &[Arc<str>]) {
        *self.states.lock().unwrap_or_else(PoisonError::into_inner) = states.into();
    }

    /// Ends a step: each script that defines `update_state(state, results, ctx)` gets its state and the step's results,
    /// `{id, sample, completion, reward, components}` each and in the caller's order, and returns the state that the next
    /// step reads. Within a step the state is constant, so neither threads nor the order of scoring can be seen in it.
    ///
    /// # Errors
    /// A failed update, with the script's line; then no state changes.
    pub fn end_step<'a>(
        &self,
        results: impl IntoIterator<Item = (&'a str, usize, &'a str, &'a Outcome)>,
        context: &Context,
    ) -> Result<(), RewardError> {
        if !self.specs.iter().any(|spec| spec.script.stateful()) {
            return Ok(());
        }
        let result = |(id, sample, completion, outcome): (&str, usize, &str, &Outcome)| {
            let known =
                outcome.components.iter().filter_map(|(name, value)| Some((name.clone(), json!((*value)?))));
            let mut result = json!({"id": id, "sample": sample, "completion": completion});
            result["components"] = Value::Object(known.collect());
            if let Some(reward) = outcome.reward {
                result["reward"] = json!(reward);
            }
            result
        };
        let results = Value::Array(results.into_iter().map(result).collect());
        let mut states = self.states().to_vec();
        for (spec, state) in self.specs.iter().zip(&mut states).filter(|(spec, _)| spec.script.stateful()) {
            let sandbox = Sandbox::new(spec.script.clone(), spec.limits, spec.options.clone());
            sandbox.set_state(state);
            *state = sandbox.update_state(&results, context)?;
        }
        self.set_states(&states);
        Ok(())
    }

    /// A scored group, if one is ready.
    pub fn try_recv(&self) -> Option<(u64, Vec<Outcome>)> {
        self.results.try_recv().ok()
    }

    /// The next scored group; waits for it. Call it only while a submitted group is outstanding.
    pub fn recv(&self) -> (u64, Vec<Outcome>) {
        self.results.recv().expect("workers live as long as the pool")
    }
}

impl Drop for RewardPool {
    fn drop(&mut self) {
        self.jobs = None;
        for worker in self.workers.drain(..) {
            // a panic inside a call is caught there
            let _ = worker.join();
        }
    }
}

fn work(specs: &Arc<Vec<RewardSpec>>, jobs: &Receiver<Job>, results: &Sender<(u64, Vec<Outcome>)>) {
    let mut verifiers = Verifiers::new(Arc::clone(specs));
    for job in jobs {
        verifiers.set_states(&job.states);
        if results.send((job.ticket, verifiers.score(&job.samples, &job.context))).is_err() {
            return;
        }
    }
}
