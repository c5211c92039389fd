//! Paging changes nothing: whatever the pool's size, chunking, batch mix or threads, tokens and logprob bits are
//! those of a naive decoder without a cache; no block leaks and none is found under another policy version.

#[path = "common/fake_model.rs"]
mod fake_model;

use std::collections::{BTreeMap, HashMap, HashSet};

use fake_model::{FakeModel, generate, key, request, stream};
use proptest::prelude::*;
use rft_engine::rollout::block_pool::{BlockPool, PrefixHash};
use rft_engine::rollout::{Request, RolloutEngine, SamplingConfig};
use rft_engine::types::PolicyVersion;
use rft_kernels::BLOCK;

/// Prompts that share prefixes of whole and broken blocks: (length of the shared start, own tokens, samples).
fn requests() -> impl Strategy<Value = Vec<Request>> {
    let prompt = (0..4usize, prop::collection::vec(0..28u32, 1..40), 1..5usize);
    prop::collection::vec(prompt, 1..6).prop_map(|prompts| {
        let shared: Vec<u32> = (0..3 * BLOCK as u32 + 5).map(|i| i * 7 % 28).collect();
        let request = |(index, (start, own, samples)): (usize, (usize, Vec<u32>, usize))| {
            let mut tokens = shared[..start * BLOCK + [0, 3][start % 2]].to_vec();
            tokens.extend(own);
            request(index, tokens, samples)
        };
        prompts.into_iter().enumerate().map(request).collect()
    })
}

fn sampling() -> impl Strategy<Value = SamplingConfig> {
    (
        1..45usize,
        prop::sample::select(vec![0.0f32, 0.7, 1.0]),
        prop::sample::select(vec![0usize, 5]),
        any::<bool>(),
    )
        .prop_map(|(max_new_tokens, temperature, top_k, stops)| SamplingConfig {
            max_new_tokens,
            temperature,
            top_k,
            stop_tokens: if stops { vec![28, 3] } else { vec![] },
            ..SamplingConfig::default()
        })
}

/// Blocks that the largest group needs to run alone.
fn fewest_blocks(requests: &[Request], sampling: &SamplingConfig) -> usize {
    let needed = |r: &Request| {
        let n = r.prompt.tokens.len();
        n.div_ceil(BLOCK) + (n % BLOCK + sampling.max_new_tokens).div_ceil(BLOCK)
    };
    requests.iter().map(needed).max().unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn paged_rollouts_equal_a_naive_decoder(
        requests in requests(),
        sampling in sampling(),
        spare in prop::sample::select(vec![0usize, 1, 3, 10, 400]),
        prefill_rows in prop::sample::select(vec![1usize, 5, 16, 33, 512]),
        threads in 1..3usize,
    ) {
        let capacity = fewest_blocks(&requests, &sampling) + spare;
        let mut engine = RolloutEngine::new(&FakeModel::new(0), capacity).with_prefill_rows(prefill_rows);
        // three policy versions over one cache; the last two rollouts share theirs and so its blocks
        for (step, version) in [(1, 1), (2, 2), (3, 2)] {
            let mut model = FakeModel::new(version);
            let key = key(step, version);
            let (groups, stats) = generate(&mut engine, &mut model, threads, &requests, &sampling, key);
            for (request, group) in requests.iter().zip(&groups) {
                prop_assert_eq!(group.completions.len(), request.samples);
                prop_assert_eq!(group.version, PolicyVersion(version));
                for (s, completion) in group.completions.iter().enumerate() {
                    let stream = stream(&key, request.prompt.index, s);
                    let (tokens, logprobs) = model.naive_sample(&request.prompt.tokens, &stream, &sampling);
                    prop_assert_eq!(&completion.tokens, &tokens);
                    let bits = |l: &[f32]| l.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
                    prop_assert_eq!(bits(&completion.logprobs), bits(&logprobs));
                }
            }
            prop_assert_eq!(engine.free_blocks(), capacity, "no block stays held");
            prop_assert!(stats.peak_blocks <= capacity);
            let decoded: usize = groups.iter().flat_map(|g| &g.completions).map(|c| c.tokens.len()).sum();
            prop_assert_eq!(stats.decoded_tokens, decoded);
        }
    }

    #[test]
    fn the_block_pool_equals_a_naive_one(ops in prop::collection::vec((0..6u8, any::<prop::sample::Index>(), 1..3u64), 0..300)) {
        const CAPACITY: usize = 7;
        let mut pool = BlockPool::new(CAPACITY);
        // held blocks with their counts; published content of blocks that were not taken since
        let mut held: BTreeMap<u32, u32> = BTreeMap::new();
        let mut content: HashMap<u32, (u64, Vec<u32>)> = HashMap::new();
        let mut peak = 0;
        for (op, pick, version) in ops {
            let some_held = (!held.is_empty()).then(|| *held.keys().nth(pick.index(held.len())).unwrap());
            let tokens: Vec<u32> = (0..BLOCK as u32).map(|i| i + pick.index(3) as u32).collect();
            match (op, some_held) {
                (0 | 1, _) => {
                    let id = pool.take();
                    prop_assert_eq!(id.is_some(), held.len() < CAPACITY);
                    if let Some(id) = id {
                        prop_assert!(!held.contains_key(&id), "a held block was taken");
                        held.insert(id, 1);
                        content.remove(&id);
                    }
                }
                (2, Some(id)) => {
                    pool.retain(id);
                    *held.get_mut(&id).unwrap() += 1;
                }
                (3, Some(id)) => {
                    pool.release(id);
                    let count = held.get_mut(&id).unwrap();
                    *count -= 1;
                    if *count == 0 {
                        held.remove(&id);
                    }
                }
                (4, Some(id)) => {
                    pool.publish(id, PrefixHash::root(PolicyVersion(version)).then(&tokens));
                    let known = content.values().any(|c| *c == (version, tokens.clone()));
                    if !known && !content.contains_key(&id) {
                        content.insert(id, (version, tokens));
                    }
                }
                (5, _) => {
                    let found = pool.find(&PrefixHash::of_blocks(PolicyVersion(version), &tokens)[0]);
                    let expected = content.iter().find(|(_, c)| **c == (version, tokens.clone())).map(|(id, _)| *id);
                    prop_assert_eq!(found, expected);
                    if let Some(id) = found {
                        prop_assert_eq!(pool.is_held(id), held.contains_key(&id));
                        pool.retain(id);
                        *held.entry(id).or_insert(0) += 1;
                    }
                }
                _ => {}
            }
            peak = peak.max(held.len());
            prop_assert_eq!(pool.free(), CAPACITY - held.len());
            prop_assert_eq!(pool.peak(), peak);
            prop_assert!(held.iter().all(|(&id, &count)| pool.is_shared(id) == (count > 1)));
        }
        for (id, count) in held {
            (0..count).for_each(|_| pool.release(id));
        }
        let all: HashSet<u32> = std::iter::from_fn(|| pool.take()).collect();
        prop_assert_eq!(all.len(), CAPACITY, "every block comes back once");
    }
}

#[test]
fn the_tightest_pool_preempts_and_still_ends() {
    let sampling = SamplingConfig { max_new_tokens: 60, ..SamplingConfig::default() };
    let requests: Vec<Request> = (0..6).map(|i| request(i, vec![i as u32; 20 + i], 4)).collect();
    let (mut free, mut tight) = (FakeModel::new(1), FakeModel::new(1));
    let mut plenty = RolloutEngine::new(&free, 400);
    let mut little = RolloutEngine::new(&tight, fewest_blocks(&requests, &sampling) + 6);
    let (expected, calm) = generate(&mut plenty, &mut free, 1, &requests, &sampling, key(1, 1));
    let (groups, stats) = generate(&mut little, &mut tight, 2, &requests, &sampling, key(1, 1));
    assert_eq!((calm.preemptions, calm.recomputed_tokens), (0, 0));
    assert!(stats.preemptions > 0 && stats.recomputed_tokens > 0, "{stats:?}");
    println!("{stats:?}");
    for (a, b) in expected.iter().zip(&groups) {
        for (a, b) in a.completions.iter().zip(&b.completions) {
            assert_eq!((&a.tokens, &a.text), (&b.tokens, &b.text));
        }
    }
}

#[test]
fn a_tight_pool_computes_little_twice() {
    let sampling = SamplingConfig { max_new_tokens: 128, ..SamplingConfig::default() };
    for (stop_tokens, most) in [(vec![], 0.35), ((0..2).collect(), 0.2)] {
        let sampling = SamplingConfig { stop_tokens, ..sampling.clone() };
        let requests: Vec<Request> = (0..32).map(|i| request(i, vec![i as u32 % 28; 32], 4)).collect();
        // an eighth of what all need at once
        let mut engine = RolloutEngine::new(&FakeModel::new(1), 32 * (2 + 4 * 8) / 8);
        let (_, stats) = generate(&mut engine, &mut FakeModel::new(1), 1, &requests, &sampling, key(1, 1));
        println!("{stats:?}");
        assert!((stats.recomputed_tokens as f64) < most * stats.decoded_tokens as f64, "{stats:?}");
    }
}

#[test]
fn a_group_costs_one_prompt() {
    let sampling = SamplingConfig { max_new_tokens: 4, ..SamplingConfig::default() };
    let mut model = FakeModel::new(1);
    let mut engine = RolloutEngine::new(&model, 100);
    let requests = [request(0, vec![5; 3 * BLOCK + 2], 8)];
    let (_, stats) = generate(&mut engine, &mut model, 1, &requests, &sampling, key(1, 1));
    assert_eq!(stats.prefill_tokens, 3 * BLOCK + 2);
    // the prompt's four blocks, and a copy of its tail for each sample
    assert_eq!(stats.peak_blocks, 4 + 8);
    // prefill, then three passes of 8 rows: the last token needs none
    assert_eq!(model.passes, [(3 * BLOCK + 2, 1), (8, 8), (8, 8), (8, 8)]);
}

#[test]
fn a_prompt_seen_before_is_found_under_the_same_weights_only() {
    let sampling = SamplingConfig { max_new_tokens: 2, ..SamplingConfig::default() };
    let mut engine = RolloutEngine::new(&FakeModel::new(1), 100);
    let mut rollout = |length: usize, step: u64, version: u64| {
        let requests = [request(0, vec![9; length], 2)];
        generate(&mut engine, &mut FakeModel::new(version), 1, &requests, &sampling, key(step, version)).1
    };
    assert_eq!(rollout(40, 1, 1).cached_tokens, 0);
    assert_eq!(rollout(40, 2, 1).cached_tokens, 32);
    // a prompt that is cached as a whole still computes its last token, and with it that token's block
    let whole = rollout(32, 3, 1);
    assert_eq!((whole.cached_tokens, whole.prefill_tokens), (16, 16));
    assert_eq!(rollout(40, 4, 2).cached_tokens, 0);
}

/// A long shared start of 5 blocks, then 9 tokens of the prompt's own.
fn behind_a_system_prompt(index: usize, samples: usize) -> Request {
    let tokens = (0..5 * BLOCK as u32).map(|i| i * 5 % 28).chain((0..9).map(|i| (index as u32 + i) % 28));
    request(index, tokens.collect(), samples)
}

#[test]
fn prompts_behind_one_system_prompt_compute_it_once() {
    let sampling = SamplingConfig { max_new_tokens: 20, ..SamplingConfig::default() };
    for (capacity, prefill_rows, threads) in
        [(400, 512, 1), (400, 30, 2), (400, 7, 1), (21, 512, 1), (14, 40, 1)]
    {
        let mut model = FakeModel::new(1);
        let mut engine = RolloutEngine::new(&model, capacity).with_prefill_rows(prefill_rows);
        let requests: Vec<Request> = (0..6).map(|i| behind_a_system_prompt(i, 2)).collect();
        let (groups, stats) = generate(&mut engine, &mut model, threads, &requests, &sampling, key(1, 1));
        for (request, group) in requests.iter().zip(&groups) {
            for (s, completion) in group.completions.iter().enumerate() {
                let stream = stream(&key(1, 1), request.prompt.index, s);
                let (tokens, _) = model.naive_sample(&request.prompt.tokens, &stream, &sampling);
                assert_eq!(completion.tokens, tokens, "{capacity} blocks, {prefill_rows} rows, {request:?}");
            }
        }
        if capacity == 400 {
            assert_eq!(
                (stats.prefill_tokens, stats.cached_tokens),
                (5 * BLOCK + 6 * 9, 5 * 5 * BLOCK),
                "{stats:?}"
            );
            // and no pass waits for it: those behind read what the first one's rows store in the same pass
            let passes = (5 * BLOCK + 6 * 9usize).div_ceil(prefill_rows) + 19;
            assert!(stats.passes <= passes, "{stats:?}");
        }
        // an evaluation under the same weights finds it, under others not
        let later: Vec<Request> = (10..14).map(|i| behind_a_system_prompt(i, 1)).collect();
        let (_, again) = generate(&mut engine, &mut model, threads, &later, &sampling, key(2, 1));
        if capacity == 400 {
            assert_eq!((again.prefill_tokens, again.cached_tokens), (4 * 9, 4 * 5 * BLOCK));
        }
        let (_, other) = generate(&mut engine, &mut FakeModel::new(2), threads, &later, &sampling, key(3, 2));
        assert!(other.prefill_tokens >= 5 * BLOCK + 4 * 9);
        assert_eq!(engine.free_blocks(), capacity);
    }
}

#[test]
fn a_prompt_asked_for_twice_gets_other_samples_the_second_time() {
    let sampling = SamplingConfig { max_new_tokens: 12, ..SamplingConfig::default() };
    let mut model = FakeModel::new(1);
    let mut engine = RolloutEngine::new(&model, 100);
    let requests = [request(4, vec![9; 5], 2), request(5, vec![9; 5], 2), request(4, vec![9; 5], 3)];
    let (groups, _) = generate(&mut engine, &mut model, 1, &requests, &sampling, key(1, 1));
    // (group, sample in it) and its number among all samples of that prompt
    for (g, s, index, number) in [(0, 0, 4, 0), (0, 1, 4, 1), (1, 0, 5, 0), (2, 0, 4, 2), (2, 2, 4, 4)] {
        let stream = stream(&key(1, 1), index, number);
        let (tokens, _) = model.naive_sample(&[9; 5], &stream, &sampling);
        assert_eq!(groups[g].completions[s].tokens, tokens, "group {g}, sample {s}");
    }
}

#[test]
fn a_finished_sibling_frees_its_blocks() {
    let sampling =
        SamplingConfig { max_new_tokens: 64, stop_tokens: (0..26).collect(), ..SamplingConfig::default() };
    let mut model = FakeModel::new(3);
    let mut engine = RolloutEngine::new(&model, 1000);
    let requests = [request(0, vec![1; BLOCK], 64)];
    let (groups, stats) = generate(&mut engine, &mut model, 1, &requests, &sampling, key(1, 1));
    let lengths: Vec<usize> = groups[0].completions.iter().map(|c| c.tokens.len()).collect();
    let longest = *lengths.iter().max().unwrap();
    let alive = |t: usize| lengths.iter().filter(|&&l| l > t).count();
    // a row a living sample, in every pass after the prompt's
    let rows: Vec<usize> = model.passes[1..].iter().map(|p| p.0).collect();
    assert_eq!(rows, (1..longest).map(alive).collect::<Vec<_>>());
    // a sample that lives past its first token takes one block; nobody here gets to a second
    assert!(longest <= BLOCK);
    assert_eq!(stats.peak_blocks, 1 + alive(1));
    assert_eq!(engine.free_blocks(), 1000);
}

#[test]
fn a_group_that_can_never_fit_is_an_error_with_its_numbers() {
    let sampling = SamplingConfig { max_new_tokens: 100, ..SamplingConfig::default() };
    let mut model = FakeModel::new(1);
    let mut engine = RolloutEngine::new(&model, 8);
    let pool = rft_kernels::Pool::new(1);
    let requests = [request(0, vec![1; 40], 2)];
    let error = engine
        .generate(
            &mut model,
            &pool,
            &fake_model::tokenizer(),
            &requests,
            &sampling,
            key(1, 1),
            &mut |_, _| Ok(()),
        )
        .unwrap_err()
        .to_string();
    // 3 blocks of prompt and 7 of a sample from its tail on
    for number in ["40 tokens", "100 new", "10 KV blocks", "has 8", "hint:"] {
        assert!(error.contains(number), "{number}: {error}");
    }
    assert_eq!(engine.free_blocks(), 8);
}
