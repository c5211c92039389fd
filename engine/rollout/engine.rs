//! The rollout engine: prompts in, groups of completions out, over one paged KV cache.

use std::sync::Arc;
use std::time::Instant;

use rft_kernels::{PagedRun, Pool};

use crate::data::tokenizer::{Detokenizer, Tokenizer};
use crate::error::{EngineError, Result};
use crate::rng::{Purpose, Stream};
use crate::rollout::block_pool::BlockPool;
use crate::rollout::model::{KvCache, PagedBatch, PagedModel};
use crate::rollout::sampler::{Drawn, SamplingConfig, sample_rows};
use crate::rollout::scheduler::{Owner, Plan, Scheduler};
use crate::types::{Completion, FinishReason, Group, PolicyVersion, Prompt};

/// Prompt rows of one forward pass: enough to keep the kernels busy, few enough that decoding samples do not wait.
const PREFILL_ROWS: usize = 512;

/// A prompt to answer.
#[derive(Debug, Clone)]
pub struct Request {
    /// The prompt; at least one token.
    pub prompt: Arc<Prompt>,
    /// Completions to draw (G).
    pub samples: usize,
}

/// Key of the randomness of one rollout, and the weights that it runs on.
#[derive(Debug, Clone, Copy)]
pub struct RolloutKey {
    /// The run's seed.
    pub seed: u64,
    /// The step.
    pub step: u64,
    /// The weights.
    pub version: PolicyVersion,
}

/// What a rollout did.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct RolloutStats {
    /// Prompt rows computed.
    pub prefill_tokens: usize,
    /// Tokens drawn.
    pub decoded_tokens: usize,
    /// Wall-clock seconds.
    pub seconds: f64,
    /// Most KV blocks held at once.
    pub peak_blocks: usize,
    /// Times a sample or a prompt gave its blocks back.
    pub preemptions: usize,
}

/// A block pool, its cache, and the buffers of a decode step.
#[derive(Debug)]
pub struct RolloutEngine {
    blocks: BlockPool,
    cache: KvCache,
    plan: Plan,
    logits: Vec<f32>,
    prefill_rows: usize,
}

impl RolloutEngine {
    /// An engine with a cache of `blocks` KV blocks for models shaped like `model`.
    pub fn new(model: &dyn PagedModel, blocks: usize) -> Self {
        Self {
            blocks: BlockPool::new(blocks),
            cache: model.new_cache(blocks),
            plan: Plan::default(),
            logits: Vec::new(),
            prefill_rows: PREFILL_ROWS,
        }
    }

    /// Changes how many prompt rows a forward pass takes; results do not depend on it.
    pub fn with_prefill_rows(mut self, rows: usize) -> Self {
        self.prefill_rows = rows.max(1);
        self
    }

    /// KV blocks that nobody holds; all of them between rollouts.
    pub fn free_blocks(&self) -> usize {
        self.blocks.free()
    }

    /// Draws every request's completions and hands each group over as soon as it is complete.
    ///
    /// The tokens and the bits of the logprobs depend on (weights, seed, step, prompt, sample) alone: not on the
    /// other requests, the pool's size, chunking or threads.
    ///
    /// # Errors
    /// A prompt that is empty or too long for the model or the pool; logits that are not finite; whatever
    /// `on_group` reports.
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
        for request in requests {
            check_fits(&request.prompt, sampling, model.max_positions())?;
        }
        self.blocks.reset_peak();
        let mut stats = RolloutStats::default();
        let groups = requests.iter().map(|r| {
            (Arc::clone(&r.prompt), (0..r.samples).map(|_| Detokenizer::new(tokenizer, true)).collect())
        });
        let blocks = &mut self.blocks;
        let mut scheduler =
            Scheduler::new(blocks, key.version, groups, sampling.max_new_tokens, self.prefill_rows)?;
        while !scheduler.is_done() {
            scheduler.plan(&mut self.plan);
            let plan = &self.plan;
            assert!(!plan.runs.is_empty(), "an unfinished rollout always has a row to run");
            plan.copies.iter().for_each(|&(from, to)| self.cache.copy_block(from, to));
            let runs: Vec<PagedRun> = plan
                .runs
                .iter()
                .map(|r| PagedRun {
                    row: r.row,
                    rows: r.rows,
                    first_pos: r.first_pos,
                    table: scheduler.table(r.owner),
                })
                .collect();
            let batch = PagedBatch {
                tokens: &plan.tokens,
                positions: &plan.positions,
                slots: &plan.slots,
                runs: &runs,
                select: &plan.select,
            };
            model.forward(pool, &mut self.cache, &batch, &mut self.logits);
            drop(runs);
            scheduler.computed(plan);
            let streams: Vec<Vec<(Stream, u64)>> =
                plan.drawers.iter().map(|&owner| draw_keys(&scheduler, owner, key)).collect();
            let drawn = sample_rows(pool, &mut self.logits, model.vocab(), &streams, sampling);
            for (&owner, drawn) in plan.drawers.iter().zip(&drawn) {
                let (g, first) = match owner {
                    Owner::Prompt(g) => (g, 0),
                    Owner::Sample(g, s) => (g, s),
                };
                for (i, token) in drawn.iter().enumerate() {
                    stats.decoded_tokens += 1;
                    if accept(&mut scheduler, g, first + i, *token, sampling)?
                        && scheduler.finished(g, first + i)
                    {
                        on_group(g, take_group(&mut scheduler, g, key.version))?;
                    }
                }
            }
        }
        (stats.prefill_tokens, stats.preemptions) = (scheduler.prefill_tokens, scheduler.preemptions);
        drop(scheduler);
        stats.peak_blocks = self.blocks.peak();
        stats.seconds = start.elapsed().as_secs_f64();
        Ok(stats)
    }
}

fn check_fits(prompt: &Prompt, sampling: &SamplingConfig, max_positions: usize) -> Result<()> {
    if prompt.tokens.is_empty() {
        return Err(EngineError::Config(format!(
            "prompt {} is empty: there is nothing to condition on",
            prompt.id
        )));
    }
    let longest = prompt.tokens.len() + sampling.max_new_tokens;
    if longest > max_positions {
        return Err(EngineError::Config(format!(
            "prompt {}: {} tokens and {} new ones are more than the {max_positions} positions prepared for",
            prompt.id,
            prompt.tokens.len(),
            sampling.max_new_tokens
        )));
    }
    Ok(())
}

/// The streams that draw from an owner's row: each sample of a fresh prompt, or one sample.
fn draw_keys(scheduler: &Scheduler, owner: Owner, key: RolloutKey) -> Vec<(Stream, u64)> {
    let (g, samples) = match owner {
        Owner::Prompt(g) => (g, 0..scheduler.groups[g].samples.len()),
        Owner::Sample(g, s) => (g, s..s + 1),
    };
    let group = &scheduler.groups[g];
    samples
        .map(|s| {
            let words = [key.step, group.prompt.index as u64, s as u64];
            (Stream::new(key.seed, Purpose::Sample, &words), group.samples[s].tokens.len() as u64)
        })
        .collect()
}

/// Appends a drawn token; true when it ends the sample.
fn accept(
    scheduler: &mut Scheduler,
    g: usize,
    s: usize,
    drawn: Drawn,
    sampling: &SamplingConfig,
) -> Result<bool> {
    let group = &mut scheduler.groups[g];
    if !drawn.logprob.is_finite() {
        return Err(EngineError::Numeric(format!(
            "the model's logits are not finite at token {} of sample {s} of prompt {}",
            group.samples[s].tokens.len(),
            group.prompt.id
        )));
    }
    let sample = &mut group.samples[s];
    sample.tokens.push(drawn.token);
    sample.logprobs.push(drawn.logprob);
    if sampling.stop_tokens.contains(&drawn.token) {
        sample.finish = Some(FinishReason::Stop);
        return Ok(true);
    }
    let before = sample.text.text().len();
    sample.text.push(drawn.token);
    sample.cut = find_stop(sample.text.text(), before, &sampling.stop);
    if sample.cut.is_some() {
        sample.finish = Some(FinishReason::Stop);
    } else if sample.tokens.len() >= sampling.max_new_tokens {
        sample.finish = Some(FinishReason::Length);
    }
    Ok(sample.finish.is_some())
}

/// Start of the earliest stop string that ends after byte `before`.
fn find_stop(text: &str, before: usize, stops: &[String]) -> Option<usize> {
    stops
        .iter()
        .filter(|stop| !stop.is_empty())
        .filter_map(|stop| {
            let mut from = (before + 1).saturating_sub(stop.len());
            while !text.is_char_boundary(from) {
                from -= 1;
            }
            text[from..].find(stop.as_str()).map(|at| from + at)
        })
        .min()
}

fn take_group(scheduler: &mut Scheduler, g: usize, version: PolicyVersion) -> Group {
    let group = &mut scheduler.groups[g];
    let completions = group
        .samples
        .drain(..)
        .map(|sample| {
            let (mut text, mut token_ends) = sample.text.finish();
            if let Some(cut) = sample.cut {
                text.truncate(cut);
            }
            // a stop token adds no text
            token_ends.resize(sample.tokens.len(), text.len() as u32);
            token_ends.iter_mut().for_each(|end| *end = (*end).min(text.len() as u32));
            Completion {
                tokens: sample.tokens,
                logprobs: sample.logprobs,
                text,
                token_ends,
                finish: sample.finish.expect("a complete group holds finished samples"),
            }
        })
        .collect();
    Group { prompt: Arc::clone(&group.prompt), completions, version }
}
