//! The rollout engine: prompts in, groups of completions out, over one paged KV cache.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use rft_kernels::{PagedRun, Pool};

use crate::data::tokenizer::Tokenizer;
use crate::error::{EngineError, Result};
use crate::rollout::block_pool::BlockPool;
use crate::rollout::model::{KvCache, PagedBatch, PagedModel};
use crate::rollout::sampler::{DrawKey, Drawn, SamplingConfig, logits_rows, sample_rows};
use crate::rollout::scheduler::{Counts, Owner, Plan, Scheduler};
use crate::rollout::sequence::{GroupState, RolloutKey};
use crate::types::{Group, Prompt};

/// Prompt rows of one forward pass: enough to keep the kernels busy, few enough that decoding samples do not wait.
pub(crate) const PREFILL_ROWS: usize = 512;

/// A prompt to answer.
#[derive(Debug, Clone)]
pub struct Request {
    /// The prompt; at least one token.
    pub prompt: Arc<Prompt>,
    /// Completions to draw (G); at least one.
    pub samples: usize,
}

/// What a rollout did.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct RolloutStats {
    /// Prompt rows computed.
    pub prefill_tokens: usize,
    /// Prompt rows found in the cache, or shared with an earlier prompt of the rollout.
    pub cached_tokens: usize,
    /// Tokens drawn.
    pub decoded_tokens: usize,
    /// Completion rows computed once more after a preemption.
    pub recomputed_tokens: usize,
    /// Forward passes.
    pub passes: usize,
    /// Wall-clock seconds.
    pub seconds: f64,
    /// Most KV blocks held at once.
    pub peak_blocks: usize,
    /// Times a sample or a prompt gave its blocks back.
    pub preemptions: usize,
}

/// A block pool, its cache, and the buffers of a pass.
#[derive(Debug)]
pub struct RolloutEngine {
    blocks: BlockPool,
    /// Made for the first rollout after a rest.
    cache: Option<KvCache>,
    plan: Plan,
    logits: Vec<f32>,
    keys: Vec<DrawKey>,
    drawn: Vec<Drawn>,
    runs: Vec<PagedRun<'static>>,
    prefill_rows: usize,
}

impl RolloutEngine {
    /// An engine with a cache of `blocks` KV blocks for models shaped like `model`.
    pub fn new(model: &dyn PagedModel, blocks: usize) -> Self {
        Self {
            blocks: BlockPool::new(blocks),
            cache: Some(model.new_cache(blocks)),
            plan: Plan::default(),
            logits: Vec::new(),
            keys: Vec::new(),
            drawn: Vec::new(),
            runs: Vec::new(),
            prefill_rows: PREFILL_ROWS,
        }
    }

    /// Changes how many prompt rows a forward pass takes; results do not depend on it.
    pub fn with_prefill_rows(mut self, rows: usize) -> Self {
        self.prefill_rows = rows.max(1);
        self
    }

    /// Gives the cache and the buffers of passes back, for the learner to take their memory, and forgets what was cached: an update
    /// makes it worthless.
    pub fn rest(&mut self) {
        if self.cache.take().is_some() {
            self.blocks = BlockPool::new(self.blocks.capacity());
        }
        self.logits = Vec::new();
    }

    /// KV blocks that nobody holds; all of them between rollouts.
    pub fn free_blocks(&self) -> usize {
        self.blocks.free()
    }

    /// Draws every request's completions and hands each group over, with its request's number, as soon as it is
    /// complete: scoring can overlap decoding.
    ///
    /// The tokens and the bits of the logprobs depend on (weights, seed, step, prompt, sample) alone: not on the
    /// other requests, the pool's size, chunking or threads. Where a prompt is asked for twice, the second
    /// request's samples are numbered on, so that they are not the first's again.
    ///
    /// # Errors
    /// Sampling settings out of range; a prompt that is empty or too long for the model or the pool; logits that
    /// are not finite; whatever `on_group` reports.
    #[allow(clippy::too_many_arguments)]
    pub fn generate(
        &mut self,
        model: &mut dyn PagedModel,
        pool: &Pool,
        tokenizer: &Tokenizer,
        requests: &[Request],
        sampling: &SamplingConfig,
        key: RolloutKey,
        on_group: &mut dyn FnMut(usize, Group) -> Result<()>,
    ) -> Result<RolloutStats> {
        let start = Instant::now();
        sampling.check()?;
        for request in requests {
            check_request(request, sampling, model.max_positions())?;
        }
        let cache = self.cache.get_or_insert_with(|| model.new_cache(self.blocks.capacity()));
        self.blocks.reset_peak();
        let mut stats = RolloutStats::default();
        let groups = group_states(requests, &key, tokenizer);
        let blocks = &mut self.blocks;
        let mut scheduler = Scheduler::new(blocks, groups, sampling.max_new_tokens, self.prefill_rows)?;
        let chunk = logits_rows(model.vocab());
        while !scheduler.is_done() {
            scheduler.plan(&mut self.plan);
            forward(model, pool, cache, &self.plan, &scheduler, &mut self.runs);
            scheduler.computed(&self.plan);
            stats.passes += 1;
            let drawers = &self.plan.drawers;
            for from in (0..drawers.len()).step_by(chunk) {
                let rows = from..(from + chunk).min(drawers.len());
                model.logits(pool, rows.clone(), &mut self.logits);
                draw_keys(&scheduler, &drawers[rows.clone()], &mut self.keys);
                sample_rows(pool, &mut self.logits, model.vocab(), &self.keys, sampling, &mut self.drawn);
                let mut drawn = self.drawn.iter();
                for &owner in &drawers[rows] {
                    for (g, s) in owner_samples(&scheduler, owner) {
                        let drawn = drawn.next().expect("one draw a sample of each selected row");
                        let group = &mut scheduler.groups[g];
                        group.check(s, drawn)?;
                        stats.decoded_tokens += 1;
                        if group.samples[s].push(*drawn, sampling) && scheduler.finished(g, s) {
                            on_group(g, scheduler.groups[g].take_group(key.version))?;
                        }
                    }
                }
            }
        }
        let counts = scheduler.counts;
        drop(scheduler);
        let Counts { prefill_tokens, cached_tokens, recomputed_tokens, preemptions } = counts;
        let (peak_blocks, seconds) = (self.blocks.peak(), start.elapsed().as_secs_f64());
        Ok(RolloutStats {
            prefill_tokens,
            cached_tokens,
            recomputed_tokens,
            preemptions,
            peak_blocks,
            seconds,
            ..stats
        })
    }
}

fn check_request(request: &Request, sampling: &SamplingConfig, max_positions: usize) -> Result<()> {
    let prompt = &request.prompt;
    if prompt.tokens.is_empty() {
        return Err(EngineError::Config(format!(
            "prompt {} is empty: there is nothing to condition on",
            prompt.id
        )));
    }
    if request.samples == 0 {
        return Err(EngineError::Config(format!("prompt {}: 0 completions are asked for", prompt.id)));
    }
    let longest = prompt.tokens.len() + sampling.max_new_tokens;
    if longest > max_positions {
        return Err(EngineError::Config(format!(
            "prompt {}: {} tokens and {} new ones are more than the {max_positions} positions prepared for. hint: lower \
             max_new_tokens or shorten the prompt",
            prompt.id,
            prompt.tokens.len(),
            sampling.max_new_tokens
        )));
    }
    Ok(())
}

/// The groups of a rollout; the samples of a prompt are numbered through all its requests.
fn group_states(requests: &[Request], key: &RolloutKey, tokenizer: &Tokenizer) -> Vec<GroupState> {
    let mut asked: HashMap<usize, usize> = HashMap::new();
    let group = |request: &Request| {
        let before = asked.entry(request.prompt.index).or_default();
        let first = std::mem::replace(before, *before + request.samples);
        GroupState::new(Arc::clone(&request.prompt), request.samples, first, key, tokenizer)
    };
    requests.iter().map(group).collect()
}

fn forward(
    model: &mut dyn PagedModel,
    pool: &Pool,
    cache: &mut KvCache,
    plan: &Plan,
    scheduler: &Scheduler,
    scratch: &mut Vec<PagedRun<'static>>,
) {
    assert!(!plan.runs.is_empty(), "an unfinished rollout always has a row to run");
    plan.copies.iter().for_each(|&(from, to)| cache.copy_block(from, to));
    let run = |r: &crate::rollout::scheduler::PlannedRun| PagedRun {
        row: r.row,
        rows: r.rows,
        first_pos: r.first_pos,
        table: scheduler.table(r.owner),
    };
    let mut runs: Vec<PagedRun> = recycle(std::mem::take(scratch));
    runs.extend(plan.runs.iter().map(run));
    let batch = PagedBatch {
        tokens: &plan.tokens,
        positions: &plan.positions,
        slots: &plan.slots,
        runs: &runs,
        select: &plan.select,
    };
    model.forward(pool, cache, &batch);
    *scratch = recycle(runs);
}

/// The vector emptied, for elements that borrow from elsewhere; its allocation stays (collecting works in place).
fn recycle<'a>(mut runs: Vec<PagedRun<'_>>) -> Vec<PagedRun<'a>> {
    runs.clear();
    runs.into_iter().map(|_| unreachable!("the vector is empty")).collect()
}

/// Who draws from an owner's last row: every sample of a fresh prompt, or the one sample.
fn owner_samples(scheduler: &Scheduler, owner: Owner) -> impl Iterator<Item = (usize, usize)> + use<> {
    let (g, samples): (usize, Range<usize>) = match owner {
        Owner::Prompt(g) => (g, 0..scheduler.groups[g].samples.len()),
        Owner::Sample(g, s) => (g, s..s + 1),
    };
    samples.map(move |s| (g, s))
}

fn draw_keys(scheduler: &Scheduler, drawers: &[Owner], keys: &mut Vec<DrawKey>) {
    keys.clear();
    for (row, &owner) in drawers.iter().enumerate() {
        keys.extend(owner_samples(scheduler, owner).map(|(g, s)| {
            let sample = &scheduler.groups[g].samples[s];
            DrawKey { row, stream: sample.stream.clone(), at: sample.tokens.len() as u64 }
        }));
    }
}
