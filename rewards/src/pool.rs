//! Worker threads that score groups: each has its own verifiers; jobs and results travel over channels.

use std::sync::Arc;
use std::thread::JoinHandle;

use crossbeam::channel::{Receiver, Sender, unbounded};

use crate::types::{Context, Outcome, RewardSpec, Sample};
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

fn work(specs: &Arc<Vec<RewardSpec>>, jobs: &Receiver<Job>, results: &Sender<(u64, Vec<Outcome>)>) {
    let mut verifiers = Verifiers::new(Arc::clone(specs));
    for job in jobs {
        if results.send((job.ticket, verifiers.score(&job.samples, &job.context))).is_err() {
            return;
        }
    }
}
