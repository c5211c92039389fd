//! A paged model whose logits are a hash of everything that a sequence's block table says came before, and the
//! naive way to answer with it: no blocks, no batches. Any mistake of the paging changes tokens and logprobs.

#![allow(dead_code)]

use std::ops::Range;
use std::sync::Arc;

use rft_engine::data::tokenizer::Tokenizer;
use rft_engine::rng::{Purpose, Stream, unit};
use rft_engine::rollout::{
    KvCache, PagedBatch, PagedModel, Request, RolloutEngine, RolloutKey, RolloutStats, SamplingConfig,
};
use rft_engine::types::{Group, PolicyVersion, Prompt, TokenId};
use rft_kernels::{KvPages, Pool, argmax, draw, warp_row};

/// Characters of the test vocabulary; `<eos>` follows them.
pub(crate) const CHARACTERS: &str = "abcdefghijklmnopqrstuvwxyz .";

/// One character a token.
pub(crate) fn tokenizer() -> Tokenizer {
    Tokenizer::from_characters(CHARACTERS, &[], &["<eos>"], "<eos>").unwrap()
}

/// Writes each token, mixed with its position and the weights, into the cache and hashes all that it reads back.
pub(crate) struct FakeModel {
    pub(crate) vocab: usize,
    /// Stands for the weights.
    pub(crate) weights: u64,
    /// Rows of each pass, and how many of them were drawn from.
    pub(crate) passes: Vec<(usize, usize)>,
    hashes: Vec<u64>,
}

impl FakeModel {
    pub(crate) fn new(weights: u64) -> Self {
        Self { vocab: tokenizer().vocab_size(), weights, passes: Vec::new(), hashes: Vec::new() }
    }

    /// What is stored for a token: 24 bits each of key and value, which f32 holds exactly.
    fn entry(&self, token: TokenId, position: usize) -> (f32, f32) {
        let bits = Stream::new(self.weights, Purpose::Init, &[u64::from(token), position as u64]).at(0);
        ((bits >> 40) as f32, ((bits >> 16) & 0xFF_FFFF) as f32)
    }

    fn logits_of(&self, hash: u64) -> impl Iterator<Item = f32> + use<> {
        let numbers = Stream::new(hash, Purpose::Init, &[]);
        (0..self.vocab as u64).map(move |token| 6.0 * unit(numbers.at(token)) as f32)
    }

    /// Tokens and logprobs of one sample, from the definition.
    pub(crate) fn naive_sample(
        &self,
        prompt: &[TokenId],
        stream: &Stream,
        sampling: &SamplingConfig,
    ) -> (Vec<TokenId>, Vec<f32>) {
        let (mut tokens, mut logprobs) = (Vec::new(), Vec::new());
        let mut sequence = prompt.to_vec();
        loop {
            let entries = sequence.iter().enumerate().map(|(i, &t)| self.entry(t, i));
            let mut row: Vec<f32> = self.logits_of(hash(entries)).collect();
            let stats = warp_row(&mut row, &sampling.warp(), &mut Vec::new());
            let token = match sampling.temperature == 0.0 {
                true => argmax(&row),
                false => draw(&row, stats.lse, unit(stream.at(tokens.len() as u64))),
            };
            tokens.push(token);
            logprobs.push(row[token as usize] - stats.lse);
            if sampling.stop_tokens.contains(&token) || tokens.len() == sampling.max_new_tokens {
                return (tokens, logprobs);
            }
            sequence.push(token);
        }
    }
}

fn hash(entries: impl Iterator<Item = (f32, f32)>) -> u64 {
    entries.fold(0, |h, (k, v)| Stream::new(h, Purpose::Init, &[k as u64, v as u64]).at(0))
}

impl PagedModel for FakeModel {
    fn vocab(&self) -> usize {
        self.vocab
    }

    fn max_positions(&self) -> usize {
        512
    }

    fn new_cache(&self, blocks: usize) -> KvCache {
        KvCache::new(1, blocks, 1, 1, false)
    }

    fn forward(&mut self, _: &Pool, cache: &mut KvCache, batch: &PagedBatch) {
        let KvPages::F32 { k: keys, v: values } = &mut cache.layers[0] else { unreachable!("made in f32") };
        self.passes.push((batch.tokens.len(), batch.select.len()));
        for ((&token, &position), &slot) in batch.tokens.iter().zip(batch.positions).zip(batch.slots) {
            let (k, v) = self.entry(token, position as usize);
            (keys[slot as usize], values[slot as usize]) = (k, v);
        }
        let slot = |table: &[u32], p: usize| {
            table[p / rft_kernels::BLOCK] as usize * rft_kernels::BLOCK + p % rft_kernels::BLOCK
        };
        self.hashes.clear();
        for &row in batch.select {
            let run = batch.runs.iter().find(|r| (r.row..r.row + r.rows).contains(&row)).unwrap();
            let position = run.first_pos + (row - run.row);
            assert_eq!(position, batch.positions[row] as usize);
            assert_eq!(slot(run.table, position), batch.slots[row] as usize);
            let slots = (0..=position).map(|p| slot(run.table, p));
            self.hashes.push(hash(slots.map(|s| (keys[s], values[s]))));
        }
    }

    fn logits(&mut self, _: &Pool, rows: Range<usize>, logits: &mut Vec<f32>) {
        logits.clear();
        for &hash in &self.hashes[rows] {
            logits.extend(self.logits_of(hash));
        }
    }
}

/// A prompt of these tokens.
pub(crate) fn prompt(index: usize, tokens: Vec<TokenId>) -> Arc<Prompt> {
    let text = tokenizer().decode(&tokens, false);
    Arc::new(Prompt {
        index,
        id: format!("p{index}"),
        text,
        tokens,
        task: Arc::default(),
        fields: Arc::default(),
    })
}

/// A request for `samples` completions of a prompt of these tokens.
pub(crate) fn request(index: usize, tokens: Vec<TokenId>, samples: usize) -> Request {
    Request { prompt: prompt(index, tokens), samples }
}

/// The stream that sample `sample` of prompt `index` draws from.
pub(crate) fn stream(key: &RolloutKey, index: usize, sample: usize) -> Stream {
    Stream::new(key.seed, Purpose::Sample, &[key.step, index as u64, sample as u64])
}

/// A key with this step and policy version.
pub(crate) fn key(step: u64, version: u64) -> RolloutKey {
    RolloutKey { seed: 11, step, version: PolicyVersion(version) }
}

/// Runs a rollout; the groups in order of the requests.
pub(crate) fn generate(
    engine: &mut RolloutEngine,
    model: &mut FakeModel,
    threads: usize,
    requests: &[Request],
    sampling: &SamplingConfig,
    key: RolloutKey,
) -> (Vec<Group>, RolloutStats) {
    let mut groups: Vec<Option<Group>> = requests.iter().map(|_| None).collect();
    let pool = Pool::new(threads);
    let stats = engine
        .generate(model, &pool, &tokenizer(), requests, sampling, key, &mut |i, group| {
            assert!(groups[i].replace(group).is_none(), "group {i} was handed over twice");
            Ok(())
        })
        .unwrap();
    (groups.into_iter().map(Option::unwrap).collect(), stats)
}
