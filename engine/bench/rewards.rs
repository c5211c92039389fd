//! Throughput of verifiers: calls a second on one core and on all, and how long single calls take.
//!
//! A call is what scoring one completion costs a worker: the row as a Lua table, the script, the host functions, the
//! outcome. `(nothing)` is a script that returns 0 at once: what every call pays.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::Args;
use rft_kernels::isa;
use rft_rewards::{Context, RewardSpec, SHIPPED, Sample, Script, Verifiers, cases, resolve};
use serde_json::{Map, Value};

use super::{Measurement, Report, round, spread};
use crate::config::DevicesConfig;
use crate::data::prompts::read_jsonl;
use crate::error::{EngineError, Result};
use crate::report::metrics::environment;
use crate::reward::stored_sample;

/// Flags of `bench rewards`.
#[derive(Debug, Clone, Args)]
pub struct RewardsArgs {
    /// Verifier: a shipped one's name or a .lua file; may be repeated [default: all shipped ones].
    #[arg(long)]
    pub reward: Vec<String>,
    /// JSONL rows {completion, …} to score, in place of the shipped verifiers' own cases.
    #[arg(long)]
    pub data: Option<PathBuf>,
    /// Threads of the figure for many; 0 takes every core.
    #[arg(long, default_value_t = 0)]
    pub threads: usize,
    /// Measurements of each verifier; the first round, a warm-up, is not among them.
    #[arg(long, default_value_t = 3)]
    pub repeats: usize,
    /// Seconds of one measurement.
    #[arg(long, default_value_t = 0.2)]
    pub seconds: f64,
}

/// One call: a sample under the options it is judged with.
#[derive(Clone)]
struct Call {
    sample: Sample,
    options: Map<String, Value>,
}

/// A verifier and the calls that it is measured with.
struct Subject {
    script: Script,
    calls: Vec<Call>,
}

/// Nanoseconds of single calls, ascending, and calls a second of each repeat.
struct Times {
    nanos: Vec<u64>,
    per_s: Vec<f64>,
}

impl Times {
    /// Microseconds that a share of the calls stay below.
    fn quantile_us(&self, share: f64) -> f64 {
        let at = (self.nanos.len().saturating_sub(1) as f64 * share).round() as usize;
        self.nanos.get(at).map_or(0.0, |nanos| *nanos as f64 / 1e3)
    }
}

/// Measures the verifiers one after the other.
///
/// # Errors
/// A script or a row that cannot be read; a script without rows.
pub fn run(args: &RewardsArgs, report: Report) -> Result<()> {
    let threads = DevicesConfig { threads: args.threads, ..Default::default() }.thread_count();
    report(Measurement {
        work: "machine".into(),
        value: threads as f64,
        unit: "threads",
        range: (threads as f64, threads as f64),
        roofline_share: None,
        more: environment(threads, isa().name()),
    });
    let window = Duration::from_secs_f64(args.seconds.clamp(0.01, 60.0));
    for subject in subjects(args)? {
        let one = subject.measure(window, args.repeats.max(1));
        let all: f64 = std::thread::scope(|scope| {
            let running: Vec<_> = (0..threads)
                .map(|_| scope.spawn(|| subject.measure(window, args.repeats.max(1)).per_s))
                .collect();
            running.into_iter().map(|thread| thread.join().map_or(0.0, |per_s| spread(per_s).0)).sum()
        });
        let mut more = Map::new();
        for (name, share) in [("p50_us", 0.5), ("p99_us", 0.99), ("max_us", 1.0)] {
            more.insert(name.into(), round(one.quantile_us(share)).into());
        }
        more.insert("threads".into(), threads.into());
        more.insert("all_threads_per_s".into(), round(all).into());
        let (value, range) = spread(one.per_s);
        report(Measurement {
            work: format!("reward {}, {} rows", subject.script.name(), subject.calls.len()),
            value,
            unit: "calls/s",
            range,
            roofline_share: None,
            more,
        });
    }
    Ok(())
}

fn subjects(args: &RewardsArgs) -> Result<Vec<Subject>> {
    let wrong = |error: rft_rewards::ScriptError| EngineError::Reward(error.to_string());
    let rows = match &args.data {
        Some(path) => stored_calls(path)?,
        None => Vec::new(),
    };
    let nothing = Script::from_text("(nothing)", "function reward() return 0 end").map_err(wrong)?;
    let mut subjects = vec![Subject { script: nothing, calls: shipped_calls("math") }];
    let names: Vec<&str> = match args.reward.as_slice() {
        [] => SHIPPED.iter().map(|(name, _)| *name).collect(),
        given => given.iter().map(String::as_str).collect(),
    };
    for name in names {
        let script = resolve(name).map_err(wrong)?;
        let calls = if rows.is_empty() { shipped_calls(name) } else { rows.clone() };
        if calls.is_empty() {
            return Err(EngineError::Config(format!(
                "{name} has no cases of its own. hint: give rows with --data FILE"
            )));
        }
        subjects.push(Subject { script, calls });
    }
    Ok(subjects)
}

fn shipped_calls(name: &str) -> Vec<Call> {
    cases(name).into_iter().map(|case| Call { sample: case.sample, options: case.options }).collect()
}

fn stored_calls(path: &Path) -> Result<Vec<Call>> {
    let rows = read_jsonl(path)?;
    rows.iter()
        .enumerate()
        .map(|(i, row)| {
            let sample = stored_sample(i, row)
                .map_err(|message| EngineError::malformed(path, format!("row {}", i + 1), message))?;
            Ok(Call { sample, options: Map::new() })
        })
        .collect()
}

impl Subject {
    /// Scores the calls round and round for `repeats` times `window`, after one round that is not counted.
    fn measure(&self, window: Duration, repeats: usize) -> Times {
        let context = Context { step: 1, total_steps: 100, seed: 0 };
        let mut verifiers: Vec<(&Map<String, Value>, Verifiers)> = Vec::new();
        let mut plan: Vec<(usize, &Sample)> = Vec::new();
        for call in &self.calls {
            let known = verifiers.iter().position(|(options, _)| **options == call.options);
            let at = known.unwrap_or_else(|| {
                let spec =
                    RewardSpec { options: call.options.clone(), ..RewardSpec::new(self.script.clone()) };
                verifiers.push((&call.options, Verifiers::new(vec![spec])));
                verifiers.len() - 1
            });
            plan.push((at, &call.sample));
        }
        let mut score = |at: usize, sample: &Sample| {
            std::hint::black_box(verifiers[at].1.score(std::slice::from_ref(sample), &context));
        };
        plan.iter().for_each(|(at, sample)| score(*at, sample));
        let mut times = Times { nanos: Vec::new(), per_s: Vec::with_capacity(repeats) };
        for _ in 0..repeats {
            let (before, start) = (times.nanos.len(), Instant::now());
            while start.elapsed() < window {
                for (at, sample) in &plan {
                    let begin = Instant::now();
                    score(*at, sample);
                    times.nanos.push(begin.elapsed().as_nanos() as u64);
                }
            }
            times.per_s.push((times.nanos.len() - before) as f64 / start.elapsed().as_secs_f64());
        }
        times.nanos.sort_unstable();
        times
    }
}
