//! A pass of decoding allocates nothing: rollouts of twice the length allocate as often.

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use common::{mixture, policy, prompts};
use rft_engine::config::Precision;
use rft_engine::data::tokenizer::Tokenizer;
use rft_engine::model::decoder::PagedDecoder;
use rft_engine::model::policy::Policy;
use rft_engine::rollout::{PagedModel, Request, RolloutEngine, RolloutKey, SamplingConfig};
use rft_engine::types::PolicyVersion;
use rft_kernels::Pool;

struct Counting;

static COUNT: AtomicUsize = AtomicUsize::new(0);

// SAFETY: the system's allocator, counted.
#[allow(unsafe_code)]
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        COUNT.fetch_add(1, Ordering::Relaxed);
        // SAFETY: as promised by the caller.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: as promised by the caller.
        unsafe { System.dealloc(memory, layout) }
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        COUNT.fetch_add(1, Ordering::Relaxed);
        // SAFETY: as promised by the caller.
        unsafe { System.realloc(memory, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Passes and allocations of a rollout of `new` tokens a completion.
fn roll_out(
    engine: &mut RolloutEngine,
    model: &mut dyn PagedModel,
    pool: &Pool,
    tokenizer: &Tokenizer,
    version: u64,
    new: usize,
) -> (usize, usize) {
    let prompts = prompts(&[5, 20], tokenizer.vocab_size());
    let requests: Vec<Request> = prompts.into_iter().map(|prompt| Request { prompt, samples: 5 }).collect();
    let sampling = SamplingConfig { max_new_tokens: new, temperature: 0.9, top_k: 20, ..Default::default() };
    let key = RolloutKey { seed: 1, step: 1, version: PolicyVersion(version) };
    let before = COUNT.load(Ordering::Relaxed);
    let stats = engine.generate(model, pool, tokenizer, &requests, &sampling, key, &mut |_, _| Ok(()));
    (stats.unwrap().passes, COUNT.load(Ordering::Relaxed) - before)
}

fn a_longer_rollout_allocates_no_more((policy, tokenizer): (Policy, Tokenizer), threads: usize) {
    let (pool, mut model) = (Pool::new(threads), PagedDecoder::new(policy.weights()));
    let mut engine = RolloutEngine::new(&model, 128);
    let mut run = |version, new| roll_out(&mut engine, &mut model, &pool, &tokenizer, version, new);
    // twice, so that every thread has taken part and grown its buffers
    (0..2).for_each(|version| _ = run(version, 96));
    let counts = [(2, 48), (3, 96), (4, 48), (5, 96)].map(|(version, new)| run(version, new));
    let name = &policy.spec.architecture;
    println!("{name}, {threads} threads: (passes, allocations) {counts:?}");
    assert_eq!((counts[0].0, counts[1].0), (48, 96));
    // Ten samples' texts may outgrow four bytes a token once, and a thread may meet a larger item than before; one
    // allocation a pass would be 48.
    let [short, long] = [0, 1].map(|i| counts[i].1.min(counts[i + 2].1));
    assert!(long <= short + 10 + 4 * (threads - 1), "{name}: {counts:?}");
}

/// One test, so that no other thread of this program allocates meanwhile.
#[test]
fn decoding_allocates_nothing() {
    for precision in [Precision::F32, Precision::Bf16] {
        for (threads, kv_precision) in [(1, Precision::F32), (2, Precision::F32), (2, Precision::Bf16)] {
            for (mut policy, tokenizer) in [policy(precision), mixture(precision)] {
                policy.kv_precision = kv_precision;
                a_longer_rollout_allocates_no_more((policy, tokenizer), threads);
            }
        }
    }
}
