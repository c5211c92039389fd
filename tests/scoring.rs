//! From finished groups to rewards: order, failures as data, and evaluation on top of them.

#[path = "common/fake_model.rs"]
mod fake_model;

use std::path::Path;
use std::sync::Arc;

use fake_model::{FakeModel, key, prompt, tokenizer};
use rft_engine::EngineError;
use rft_engine::config::{OnErrorConfig, RewardConfig};
use rft_engine::eval::{Evaluation, Trial, pass_at_k};
use rft_engine::reward::{ScoredGroup, Scorer, component_means, error_counts};
use rft_engine::rollout::{Request, RolloutEngine, SamplingConfig};
use rft_engine::types::{Completion, FinishReason, Group, PolicyVersion};
use rft_kernels::Pool;

fn script(folder: &Path, name: &str, text: &str) -> RewardConfig {
    let path = folder.join(format!("{name}.lua"));
    std::fs::write(&path, text).unwrap();
    RewardConfig {
        script: path.to_str().unwrap().to_string(),
        weight: 1.0,
        time_ms: 1000,
        memory_mb: 16,
        on_error: OnErrorConfig::Abstain,
        error_score: 0.0,
        options: serde_json::Map::new(),
        tasks: Vec::new(),
    }
}

fn group(index: usize, texts: &[&str]) -> Group {
    let completion = |text: &&str| Completion {
        tokens: vec![0; text.len()],
        logprobs: vec![0.0; text.len()],
        text: text.to_string(),
        token_ends: (1..=text.len() as u32).collect(),
        finish: FinishReason::Stop,
    };
    Group {
        prompt: prompt(index, vec![1, 2]),
        completions: texts.iter().map(completion).collect(),
        version: PolicyVersion(0),
    }
}

fn score(scorer: &Scorer, groups: &[Group]) -> Result<Vec<ScoredGroup>, EngineError> {
    let mut scoring = scorer.start(1, 2, 0);
    groups.iter().enumerate().for_each(|(i, g)| scoring.submit(i, g.clone()));
    scoring.finish()
}

#[test]
fn groups_come_back_in_their_order_whatever_finishes_first() {
    let folder = tempfile::tempdir().unwrap();
    // the first group is by far the slowest
    let slow = "function reward(s) local n = 0
        if s.completion == 'slow' then for i = 1, 300000 do n = n + 1 end end
        return #s.completion end";
    let configs = [script(folder.path(), "length", slow)];
    let groups: Vec<Group> =
        (0..12).map(|i| group(i, &if i == 0 { ["slow", "slow"] } else { ["a", "bc"] })).collect();
    for workers in [1, 2, 8] {
        let scored = score(&Scorer::new(&configs, workers).unwrap(), &groups).unwrap();
        let order: Vec<usize> = scored.iter().map(|s| s.group.prompt.index).collect();
        assert_eq!(order, (0..12).collect::<Vec<_>>());
        let rewards: Vec<_> = scored.iter().map(|s| [s.outcomes[0].reward, s.outcomes[1].reward]).collect();
        assert_eq!(rewards[0], [Some(4.0), Some(4.0)]);
        assert!(rewards[1..].iter().all(|r| *r == [Some(1.0), Some(2.0)]));
    }
}

#[test]
fn handing_over_a_group_waits_for_no_script() {
    let folder = tempfile::tempdir().unwrap();
    // each call runs into its time limit of 50 ms
    let endless = RewardConfig {
        time_ms: 50,
        ..script(folder.path(), "endless", "function reward() while true do string.rep('x', 1000) end end")
    };
    let scorer = Scorer::new(&[endless], 1).unwrap();
    let (start, mut scoring) = (std::time::Instant::now(), scorer.start(1, 2, 0));
    (0..4).for_each(|i| scoring.submit(i, group(i, &["a", "b"])));
    let handed_over = start.elapsed();
    let scored = scoring.finish().unwrap();
    let kinds = scored.iter().flat_map(|g| &g.outcomes).map(|o| o.errors[0].kind.as_str());
    assert!(
        kinds.clone().count() == 8 && kinds.clone().all(|kind| matches!(kind, "timeout" | "instructions"))
    );
    // the scripts take 400 ms, or as long as their ten million steps; a decoder would have waited for none of it
    assert!(handed_over * 10 < start.elapsed(), "{handed_over:?} of {:?}", start.elapsed());
}

#[test]
fn failures_are_counted_with_their_text_and_never_become_a_number() {
    let folder = tempfile::tempdir().unwrap();
    let fragile = "function reward(s)
        if s.completion == 'bad' then error('no digits') end
        return 1 end";
    let configs =
        [script(folder.path(), "fragile", fragile), script(folder.path(), "silent", "function reward() end")];
    let scored =
        score(&Scorer::new(&configs, 2).unwrap(), &[group(0, &["ok", "bad"]), group(1, &["bad", "bad"])])
            .unwrap();
    let rewards: Vec<_> = scored.iter().flat_map(|s| &s.outcomes).map(|o| o.reward).collect();
    assert_eq!(rewards, [Some(1.0), None, None, None]);
    let errors = error_counts(&scored);
    assert_eq!(errors.len(), 1);
    assert_eq!((errors[0].script.as_str(), errors[0].kind, errors[0].count), ("fragile", "runtime", 3));
    for part in ["prompt p0, sample 1", "no digits", "fragile:2"] {
        assert!(errors[0].first.contains(part), "{}", errors[0].first);
    }
    // `silent` abstained throughout: it has no mean, not a mean of 0
    assert_eq!(component_means(&scored), [("fragile".to_string(), 1.0)]);
}

#[test]
fn a_failure_may_stop_the_run_and_leaves_nothing_for_the_next_rollout() {
    let folder = tempfile::tempdir().unwrap();
    let fragile = "function reward(s) if s.completion == 'bad' then error('no digits') end return 1 end";
    let strict = RewardConfig { on_error: OnErrorConfig::Fail, ..script(folder.path(), "fragile", fragile) };
    let scorer = Scorer::new(&[strict], 2).unwrap();
    let error = score(&scorer, &[group(0, &["ok"]), group(7, &["ok", "bad"])]).unwrap_err().to_string();
    for part in ["prompt p7, sample 1", "no digits", "on_error"] {
        assert!(error.contains(part), "{error}");
    }
    let mut abandoned = scorer.start(1, 2, 0);
    (0..5).for_each(|i| abandoned.submit(i, group(i, &["ok", "ok", "ok"])));
    drop(abandoned);
    let scored = score(&scorer, &[group(3, &["ok"])]).unwrap();
    assert_eq!((scored.len(), scored[0].outcomes.len(), scored[0].group.prompt.index), (1, 1, 3));
}

#[test]
fn an_evaluation_counts_passes_by_subsets() {
    let folder = tempfile::tempdir().unwrap();
    // about half of the letters come before n
    let configs =
        [script(folder.path(), "early", "function reward(s) return s.completion < 'n' and 1 or 0 end")];
    let scorer = Scorer::new(&configs, 2).unwrap();
    let prompts: Vec<_> = (0..5).map(|i| prompt(i, vec![i as u32; 3])).collect();
    let sampling = SamplingConfig { max_new_tokens: 1, ..SamplingConfig::default() };
    let evaluation = Evaluation {
        prompts: &prompts,
        samples: 4,
        trial: Trial { sampling: &sampling, scorer: &scorer, progress: (0, 0) },
        full_reward: 1.0,
    };
    let mut model = FakeModel::new(1);
    let mut engine = RolloutEngine::new(&model, 64);
    let pool = Pool::new(1);
    let (result, groups, stats) =
        evaluation.run(&mut engine, &mut model, &pool, &tokenizer(), key(1, 1)).unwrap();
    assert_eq!(stats.decoded_tokens, 20);
    let passes: Vec<Vec<bool>> =
        groups.iter().map(|g| g.group.completions.iter().map(|c| c.text.as_str() < "n").collect()).collect();
    let passed = passes.iter().flatten().filter(|p| **p).count();
    assert!((1..20).contains(&passed), "the test needs both: {passes:?}");
    assert!((result.reward - passed as f64 / 20.0).abs() < 1e-12);
    // k of 4 samples by brute force: every subset of that size, and whether one of it passes
    for (k, value) in result.pass_at_k {
        let subsets = || (0..16u32).filter(|m| m.count_ones() as usize == k);
        let hit = |p: &Vec<bool>| subsets().filter(|m| (0..4).any(|i| m >> i & 1 == 1 && p[i])).count();
        let expected: f64 =
            passes.iter().map(|p| hit(p) as f64 / subsets().count() as f64).sum::<f64>() / 5.0;
        assert!((value - expected).abs() < 1e-12, "pass@{k}: {value} {expected}");
    }
    assert!(pass_at_k(1000, 3, 100) < pass_at_k(1000, 4, 100));
}

#[test]
fn an_evaluation_without_any_reward_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let prompts = [prompt(0, vec![1, 2])];
    let sampling = SamplingConfig { max_new_tokens: 1, ..SamplingConfig::default() };
    for (text, part) in
        [("function reward() end", "abstained"), ("function reward() error('gone') end", "gone")]
    {
        let scorer = Scorer::new(&[script(folder.path(), "none", text)], 1).unwrap();
        let evaluation = Evaluation {
            prompts: &prompts,
            samples: 2,
            trial: Trial { sampling: &sampling, scorer: &scorer, progress: (0, 0) },
            full_reward: 1.0,
        };
        let mut model = FakeModel::new(1);
        let mut engine = RolloutEngine::new(&model, 8);
        let error =
            evaluation.run(&mut engine, &mut model, &Pool::new(1), &tokenizer(), key(1, 1)).unwrap_err();
        assert!(error.to_string().contains(part), "{error}");
    }
}

#[test]
fn an_error_while_groups_are_handed_over_ends_the_rollout_cleanly() {
    let mut model = FakeModel::new(1);
    let mut engine = RolloutEngine::new(&model, 64);
    let requests: Vec<Request> =
        (0..4).map(|i| Request { prompt: Arc::clone(&prompt(i, vec![3; 20])), samples: 3 }).collect();
    let sampling = SamplingConfig { max_new_tokens: 9, ..SamplingConfig::default() };
    let mut seen = 0;
    let result = engine.generate(
        &mut model,
        &Pool::new(1),
        &tokenizer(),
        &requests,
        &sampling,
        key(1, 1),
        &mut |_, _| {
            seen += 1;
            Err(EngineError::Interrupted)
        },
    );
    assert!(matches!(result, Err(EngineError::Interrupted)));
    assert_eq!((seen, engine.free_blocks()), (1, 64));
}
