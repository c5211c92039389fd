//! The corpus of hostile scripts: each is contained, the worker lives, and the next sample is scored right.

use std::path::Path;
use std::time::{Duration, Instant};

use rft_rewards::{Context, Limits, RewardPool, RewardSpec, Sample, resolve};

const LIMITS: Limits = Limits { time_ms: 300, memory_bytes: 16 << 20, instructions: Some(1_000_000) };
/// A loaded machine may not schedule the worker for a while; a hang is minutes.
const PATIENCE: Duration = Duration::from_secs(8);

#[test]
fn every_script_of_the_corpus_is_contained() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/hostile");
    let mut paths: Vec<_> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    assert!(paths.len() >= 60, "{} hostile scripts", paths.len());
    let mut wrong = Vec::new();
    for path in &paths {
        let name = path.file_stem().unwrap().to_string_lossy().into_owned();
        let script = resolve(path.to_str().unwrap()).unwrap_or_else(|error| panic!("{error}"));
        let allowed = script.text().lines().next().unwrap().trim_start_matches("-- may end in: ").to_string();
        let spec = RewardSpec { limits: LIMITS, ..RewardSpec::new(script) };
        let pool = RewardPool::new(vec![spec], 1).unwrap();
        let sample = |text: &str| Sample { id: "row".into(), completion: text.into(), ..Sample::default() };
        let start = Instant::now();
        pool.submit(0, vec![sample("bad"), sample("good")], Context::default());
        let outcomes = pool.recv().1;
        let took = start.elapsed();
        let (bad, good) = (&outcomes[0], &outcomes[1]);
        let kind = bad.errors.first().map_or("ok", |error| error.kind.as_str());
        if !allowed.split(' ').any(|allowed| allowed == kind) {
            wrong.push(format!("{name}: {kind} ({allowed}): {:?} {:?}", bad.reward, bad.errors));
        }
        if kind != "ok" && bad.reward.is_some() {
            wrong.push(format!("{name}: failed and yet scored {:?}", bad.reward));
        }
        if good.reward != Some(4.0) || !good.errors.is_empty() {
            wrong.push(format!("{name}: the next sample: {good:?}"));
        }
        if took > PATIENCE {
            wrong.push(format!("{name}: took {took:?}"));
        }
    }
    println!("{} of {} hostile scripts contained", paths.len() - wrong.len().min(paths.len()), paths.len());
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
