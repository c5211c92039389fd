//! Promise 1 and the rollout engine: what is sampled does not depend on how it was batched, paged or chunked, and its
//! logprobs are the learner's, bit for bit.

mod common;

use std::sync::Arc;

use common::{POSITIONS, mixture, policy, prompts};
use proptest::prelude::*;
use rft_engine::EngineError;
use rft_engine::config::Precision;
use rft_engine::data::tokenizer::Tokenizer;
use rft_engine::learner::batch::{GroupTokens, micro_batches, pack};
use rft_engine::model::backprop::Trainer;
use rft_engine::model::decoder::PagedDecoder;
use rft_engine::model::policy::Policy;
use rft_engine::rollout::{Request, RolloutEngine, RolloutKey, RolloutStats, SamplingConfig};
use rft_engine::types::{FinishReason, Group, PolicyVersion, Prompt};
use rft_kernels::Pool;

fn sampling(temperature: f32, top_k: usize, top_p: f32, min_p: f32, stop_tokens: &[u32]) -> SamplingConfig {
    let stop_tokens = stop_tokens.to_vec();
    SamplingConfig { max_new_tokens: 24, temperature, top_k, top_p, min_p, stop: Vec::new(), stop_tokens }
}

const KEY: RolloutKey = RolloutKey { seed: 11, step: 3, version: PolicyVersion(0) };

struct Setup {
    threads: usize,
    blocks: usize,
    prefill_rows: usize,
}

fn roll_out(
    policy: &Policy,
    tokenizer: &Tokenizer,
    requests: &[Request],
    sampling: &SamplingConfig,
    setup: &Setup,
) -> (Vec<Group>, RolloutStats) {
    let mut model = PagedDecoder::new(policy.weights());
    let mut engine = RolloutEngine::new(&model, setup.blocks).with_prefill_rows(setup.prefill_rows);
    let mut groups: Vec<Option<Group>> = requests.iter().map(|_| None).collect();
    let pool = Pool::new(setup.threads);
    let stats = engine
        .generate(&mut model, &pool, tokenizer, requests, sampling, KEY, &mut |i, group| {
            groups[i] = Some(group);
            Ok(())
        })
        .unwrap();
    assert_eq!(engine.free_blocks(), setup.blocks, "every block is free after a rollout");
    (groups.into_iter().map(Option::unwrap).collect(), stats)
}

/// Tokens and logprob bits of every completion.
fn bits(groups: &[Group]) -> Vec<(Vec<u32>, Vec<u32>)> {
    let completions = groups.iter().flat_map(|g| &g.completions);
    completions.map(|c| (c.tokens.clone(), c.logprobs.iter().map(|l| l.to_bits()).collect())).collect()
}

fn requests(lengths: &[usize], samples: usize, vocab: usize) -> Vec<Request> {
    prompts(lengths, vocab).into_iter().map(|prompt| Request { prompt, samples }).collect()
}

#[test]
fn sampled_logprobs_are_the_learners_bit_for_bit() {
    let (f32, bf16) = (Precision::F32, Precision::Bf16);
    for (precision, kv_precision, experts) in
        [(f32, f32, false), (f32, bf16, false), (f32, bf16, true), (bf16, f32, true), (bf16, bf16, false)]
    {
        let (mut policy, tokenizer) = if experts { mixture(precision) } else { policy(precision) };
        policy.kv_precision = kv_precision;
        let requests = requests(&[1, 15, 16, 17, 40], 4, tokenizer.vocab_size());
        let plain = sampling(1.0, 0, 1.0, 0.0, tokenizer.eos());
        for sampling in [
            plain.clone(),
            SamplingConfig { temperature: 0.7, ..plain.clone() },
            SamplingConfig { temperature: 1.3, top_k: 7, top_p: 0.9, min_p: 0.02, ..plain },
        ] {
            let setup = Setup { threads: 2, blocks: 64, prefill_rows: 24 };
            let (groups, _) = roll_out(&policy, &tokenizer, &requests, &sampling, &setup);
            let tokens: Vec<GroupTokens> = groups.iter().map(GroupTokens::from).collect();
            let sampled: Vec<u32> = bits(&groups).into_iter().flat_map(|(_, l)| l).collect();
            for (max_rows, threads) in [(1000, 1), (50, 3)] {
                let (pool, mut trainer, mut learned) = (Pool::new(threads), Trainer::default(), Vec::new());
                for pieces in micro_batches(&tokens, max_rows) {
                    let batch = pack(&tokens, &pieces);
                    let scores = trainer.forward(&pool, &policy.weights(), &batch, &sampling.warp());
                    learned.extend(scores.logprobs.iter().map(|l| l.to_bits()));
                }
                assert_eq!(
                    sampled, learned,
                    "{} {precision:?} {kv_precision:?} {sampling:?}",
                    policy.spec.architecture
                );
            }
        }
    }
}

#[test]
fn a_greedy_rollout_takes_the_most_likely_token_each_time() {
    let (policy, tokenizer) = policy(Precision::F32);
    let requests = requests(&[9], 2, tokenizer.vocab_size());
    let setup = Setup { threads: 1, blocks: 16, prefill_rows: 64 };
    let (groups, _) = roll_out(&policy, &tokenizer, &requests, &sampling(0.0, 0, 1.0, 0.0, &[]), &setup);
    let first = &groups[0].completions[0];
    assert_eq!(first.tokens, groups[0].completions[1].tokens);
    // no other token in any position has a higher logprob: replacing one by any other lowers it
    let mut trainer = Trainer::default();
    let warp = sampling(1.0, 0, 1.0, 0.0, &[]).warp();
    for other in 0..tokenizer.vocab_size() as u32 {
        let mut changed = first.tokens.clone();
        changed[5] = other;
        let groups = [GroupTokens { prompt: &requests[0].prompt.tokens, completions: vec![&changed] }];
        let batch = pack(&groups, &micro_batches(&groups, 1000)[0]);
        let scores = trainer.forward(&Pool::new(1), &policy.weights(), &batch, &warp);
        assert!(scores.logprobs[5] <= first.logprobs[5]);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn batching_paging_and_chunking_change_no_bit(
        lengths in prop::collection::vec(1usize..60, 1..6),
        samples in 1usize..5,
        threads in prop::sample::select(vec![1usize, 2, 3]),
        extra_blocks in 0usize..12,
        prefill_rows in 1usize..40,
        experts in any::<bool>(),
        kv_precision in prop::sample::select(vec![Precision::F32, Precision::Bf16]),
    ) {
        // company at an expert must not show either
        let (mut policy, tokenizer) = if experts { mixture(Precision::F32) } else { policy(Precision::F32) };
        policy.kv_precision = kv_precision;
        let requests = requests(&lengths, samples, tokenizer.vocab_size());
        let sampling = sampling(1.0, 0, 1.0, 0.0, tokenizer.eos());
        let roomy = Setup { threads: 1, blocks: 400, prefill_rows: 1000 };
        let (expected, _) = roll_out(&policy, &tokenizer, &requests, &sampling, &roomy);
        // the least that the longest prompt needs, so that most samples are preempted again and again
        let least = lengths.iter().map(|l| l.div_ceil(16) + (l % 16 + 24usize).div_ceil(16)).max().unwrap();
        let tight = Setup { threads, blocks: least + extra_blocks, prefill_rows };
        let (found, _) = roll_out(&policy, &tokenizer, &requests, &sampling, &tight);
        prop_assert_eq!(bits(&expected), bits(&found));
        // alone, a group gives what it gave in company
        let (alone, _) = roll_out(&policy, &tokenizer, &requests[..1], &sampling, &tight);
        prop_assert_eq!(&bits(&expected)[..samples], bits(&alone));
    }
}

#[test]
fn a_tight_pool_preempts_and_a_prompt_is_prefilled_once_a_group() {
    let (policy, tokenizer) = policy(Precision::F32);
    let requests = requests(&[33, 40, 21], 4, tokenizer.vocab_size());
    let sampling = sampling(1.0, 0, 1.0, 0.0, &[]);
    let roomy = Setup { threads: 1, blocks: 100, prefill_rows: 1000 };
    let (_, stats) = roll_out(&policy, &tokenizer, &requests, &sampling, &roomy);
    assert_eq!((stats.prefill_tokens, stats.preemptions, stats.decoded_tokens), (94, 0, 3 * 4 * 24));
    // each sample shares the prompt's full blocks and copies its tail: 2 + 4 * 2, 2 + 4 * 2 + …
    assert!(stats.peak_blocks < 40, "{stats:?}");
    let tight = Setup { threads: 1, blocks: 7, prefill_rows: 1000 };
    let (_, stats) = roll_out(&policy, &tokenizer, &requests, &sampling, &tight);
    assert!(stats.preemptions > 0 && stats.peak_blocks <= 7, "{stats:?}");
}

#[test]
fn a_shared_start_is_computed_once_and_changes_no_bit() {
    for precision in [Precision::F32, Precision::Bf16] {
        let (policy, tokenizer) = policy(precision);
        let start = prompts(&[37], tokenizer.vocab_size()).remove(0);
        let behind = |index: usize| {
            let own = (0..5 + index).map(|i| ((i * 3 + index) % tokenizer.vocab_size()) as u32);
            let tokens = start.tokens.iter().copied().chain(own).collect();
            Request { prompt: Arc::new(Prompt { index, tokens, ..Prompt::clone(&start) }), samples: 3 }
        };
        let requests: Vec<Request> = (0..4).map(behind).collect();
        let sampling = sampling(1.0, 0, 1.0, 0.0, &[]);
        for prefill_rows in [1000, 11] {
            let setup = Setup { threads: 2, blocks: 100, prefill_rows };
            let (together, stats) = roll_out(&policy, &tokenizer, &requests, &sampling, &setup);
            assert_eq!((stats.cached_tokens, stats.prefill_tokens), (3 * 32, 42 + (11 + 12 + 13)));
            for (request, group) in requests.iter().zip(&together) {
                let (alone, _) =
                    roll_out(&policy, &tokenizer, std::slice::from_ref(request), &sampling, &setup);
                assert_eq!(bits(&alone), bits(std::slice::from_ref(group)));
            }
        }
    }
}

#[test]
fn a_prompt_that_cannot_fit_is_refused_with_the_numbers() {
    let (policy, tokenizer) = policy(Precision::F32);
    let requests = requests(&[40], 2, tokenizer.vocab_size());
    let mut model = PagedDecoder::new(policy.weights());
    let mut engine = RolloutEngine::new(&model, 4);
    let mut run = |sampling: &SamplingConfig| {
        let pool = Pool::new(1);
        engine
            .generate(&mut model, &pool, &tokenizer, &requests, sampling, KEY, &mut |_, _| Ok(()))
            .unwrap_err()
    };
    let error = run(&sampling(1.0, 0, 1.0, 0.0, &[]));
    assert!(matches!(error, EngineError::Memory(_)) && error.to_string().contains("pool has 4"), "{error}");
    let error = run(&SamplingConfig { max_new_tokens: POSITIONS, ..sampling(1.0, 0, 1.0, 0.0, &[]) });
    assert!(error.to_string().contains("128 positions"), "{error}");
}

#[test]
fn a_stop_string_cuts_the_text_and_keeps_the_tokens() {
    let (policy, tokenizer) = policy(Precision::F32);
    let requests = requests(&[9], 8, tokenizer.vocab_size());
    let setup = Setup { threads: 1, blocks: 64, prefill_rows: 64 };
    let free = sampling(1.5, 0, 1.0, 0.0, &[]);
    let (groups, _) = roll_out(&policy, &tokenizer, &requests, &free, &setup);
    // any two characters that some sample wrote, so that the string spans two tokens
    let text = &groups[0].completions[0].text;
    let stop: String = text.chars().skip(2).take(2).collect();
    let stopping = SamplingConfig { stop: vec![stop.clone()], ..free };
    let (stopped, _) = roll_out(&policy, &tokenizer, &requests, &stopping, &setup);
    for (free, stopped) in groups[0].completions.iter().zip(&stopped[0].completions) {
        assert!(free.tokens.starts_with(&stopped.tokens));
        match free.text.find(&stop) {
            Some(at) => {
                assert_eq!((&free.text[..at], FinishReason::Stop), (stopped.text.as_str(), stopped.finish));
                assert!(tokenizer.decode(&stopped.tokens, true).contains(&stop));
                assert_eq!(stopped.token_ends.last().map(|e| *e as usize), Some(at));
            }
            None => assert_eq!((&free.text, free.finish), (&stopped.text, stopped.finish)),
        }
    }
}
