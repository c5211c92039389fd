//! Worker threads that score groups: one sandbox a worker and script, jobs and results over channels.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread::JoinHandle;

use crossbeam::channel::{Receiver, Sender, unbounded};

use crate::outcome;
use crate::sandbox::Sandbox;
use crate::types::{Context, ErrorKind, Outcome, RewardSpec, Sample};

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
}

/// The verifiers of a run. Results do not depend on the number of workers, only their order does.
pub struct RewardPool {
    jobs: Option<Sender<Job>>,
    results: Receiver<(u64, Vec<Outcome>)>,
    workers: Vec<JoinHandle<()>>,
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
        Ok(Self { jobs: Some(jobs), results, workers })
    }

    /// Hands over a group under a number of the caller's choice; returns at once.
    pub fn submit(&self, ticket: u64, samples: Vec<Sample>, context: Context) {
        let sender = self.jobs.as_ref().expect("the pool takes jobs until it is dropped");
        sender.send(Job { ticket, samples, context }).expect("workers live as long as the pool");
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

fn work(specs: &[RewardSpec], jobs: &Receiver<Job>, results: &Sender<(u64, Vec<Outcome>)>) {
    let sandbox = |spec: &RewardSpec| Sandbox::new(spec.script.clone(), spec.limits, spec.options.clone());
    let mut sandboxes: Vec<Sandbox> = specs.iter().map(sandbox).collect();
    for job in jobs {
        let mut outcomes = vec![Outcome::default(); job.samples.len()];
        for (spec, own) in specs.iter().zip(&mut sandboxes) {
            let answers = guarded(|| own.score(&job.samples, &job.context)).unwrap_or_else(|message| {
                // whatever state the VM was left in goes with it
                *own = sandbox(spec);
                let message = format!("defect of the verifier library, please report it: {message}");
                let error = spec.script.error(ErrorKind::Runtime, message, None);
                job.samples.iter().map(|_| Err(error.clone())).collect()
            });
            for ((outcome, sample), answer) in outcomes.iter_mut().zip(&job.samples).zip(answers) {
                outcome::add(outcome, spec, sample, answer);
            }
        }
        if results.send((job.ticket, outcomes)).is_err() {
            return;
        }
    }
}

/// Runs a call whose panic must not take the worker, and with it the outcome that someone waits for.
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
