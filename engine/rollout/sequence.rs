//! What is in flight: a group, and each of its samples with its tokens, text and block table.
//!
//! A sample's n-th draw is a pure function of (seed, step, prompt, sample, n): its stream is made once and asked by
//! position, so that a sample that is preempted and recomputed goes on exactly where it was.

use std::sync::Arc;

use crate::data::tokenizer::{Detokenizer, Tokenizer};
use crate::error::{EngineError, Result};
use crate::rng::{Purpose, Stream};
use crate::rollout::block_pool::PrefixHash;
use crate::rollout::sampler::{Drawn, SamplingConfig};
use crate::types::{Completion, FinishReason, Group, PolicyVersion, Prompt, TokenId};

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

/// One sample in flight.
#[derive(Debug)]
pub struct Sequence {
    /// Drawn tokens.
    pub tokens: Vec<TokenId>,
    /// Their logprobs.
    pub logprobs: Vec<f32>,
    /// Set when it is done.
    pub finish: Option<FinishReason>,
    /// Its random numbers; number n draws token n.
    pub stream: Stream,
    /// Blocks of prompt and completion.
    pub(super) table: Vec<u32>,
    /// Positions, prompt included, whose keys and values are in the cache.
    pub(super) computed: usize,
    /// Whether it holds blocks and takes part in passes.
    pub(super) running: bool,
    text: Detokenizer,
    /// Byte at which a stop string cuts the text.
    cut: Option<usize>,
}

/// Where a group stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    /// It holds no block of its own.
    Waiting,
    /// Its prompt is being computed.
    Prefill,
    /// Its prompt is in the cache; samples fork from it.
    Ready,
    /// All samples are finished.
    Done,
}

/// One group in flight.
#[derive(Debug)]
pub struct GroupState {
    /// What it answers.
    pub prompt: Arc<Prompt>,
    /// Its samples, by number.
    pub samples: Vec<Sequence>,
    /// Blocks of the prompt.
    pub(super) table: Vec<u32>,
    /// Prompt positions in the cache.
    pub(super) computed: usize,
    /// The prefix behind each full prompt block.
    pub(super) prefixes: Vec<PrefixHash>,
    pub(super) phase: Phase,
}

impl Sequence {
    /// A sample without tokens.
    fn new(tokenizer: &Tokenizer, stream: Stream) -> Self {
        Self {
            tokens: Vec::new(),
            logprobs: Vec::new(),
            finish: None,
            stream,
            table: Vec::new(),
            computed: 0,
            running: false,
            text: Detokenizer::new(tokenizer, true),
            cut: None,
        }
    }

    /// Makes room for `tokens` more, and for a table of `blocks`, so that no pass of decoding allocates.
    pub(super) fn reserve(&mut self, tokens: usize, blocks: usize) {
        self.tokens.reserve_exact(tokens);
        self.logprobs.reserve_exact(tokens);
        self.text.reserve(tokens);
        self.table.reserve_exact(blocks.saturating_sub(self.table.len()));
    }

    /// Appends a drawn token; true when it ends the sample.
    ///
    /// A stop token ends it at once and adds no text; a stop string is looked for across token borders; the last
    /// resort is the length.
    pub fn push(&mut self, drawn: Drawn, sampling: &SamplingConfig) -> bool {
        self.tokens.push(drawn.token);
        self.logprobs.push(drawn.logprob);
        if sampling.stop_tokens.contains(&drawn.token) {
            self.finish = Some(FinishReason::Stop);
            return true;
        }
        let before = self.text.text().len();
        let waits = self.text.push(drawn.token).is_empty();
        if sampling.stop.iter().any(|s| !s.is_empty()) {
            self.cut = match waits {
                // bytes may wait for what follows (a byte token, say) and yet complete a stop string
                true => find_stop(&self.text.preview(), before, &sampling.stop),
                false => find_stop(self.text.text(), before, &sampling.stop),
            };
        }
        if self.cut.is_some() {
            self.finish = Some(FinishReason::Stop);
        } else if self.tokens.len() >= sampling.max_new_tokens {
            self.finish = Some(FinishReason::Length);
        }
        self.finish.is_some()
    }

    /// The finished sample: its text ends before the stop string.
    fn into_completion(mut self) -> Completion {
        self.tokens.shrink_to_fit();
        self.logprobs.shrink_to_fit();
        let (mut text, mut token_ends) = self.text.finish();
        if let Some(cut) = self.cut {
            text.truncate(cut);
        }
        // a stop token adds no text
        token_ends.resize(self.tokens.len(), text.len() as u32);
        token_ends.shrink_to_fit();
        token_ends.iter_mut().for_each(|end| *end = (*end).min(text.len() as u32));
        Completion {
            tokens: self.tokens,
            logprobs: self.logprobs,
            text,
            token_ends,
            finish: self.finish.expect("a complete group holds finished samples"),
        }
    }
}

impl GroupState {
    /// `samples` fresh samples of a prompt; the first has number `first_sample` in the key of its randomness.
    pub fn new(
        prompt: Arc<Prompt>,
        samples: usize,
        first_sample: usize,
        key: &RolloutKey,
        tokenizer: &Tokenizer,
    ) -> Self {
        let sample = |number: usize| {
            let words = [key.step, prompt.index as u64, number as u64];
            Sequence::new(tokenizer, Stream::new(key.seed, Purpose::Sample, &words))
        };
        let samples = (first_sample..first_sample + samples).map(sample).collect();
        let prefixes = PrefixHash::of_blocks(key.version, &prompt.tokens);
        Self { prompt, samples, table: Vec::new(), computed: 0, prefixes, phase: Phase::Waiting }
    }

    /// Refuses what the model's numbers make meaningless.
    ///
    /// # Errors
    /// A logprob that is not finite, by sample and token.
    pub(super) fn check(&self, s: usize, drawn: &Drawn) -> Result<()> {
        if drawn.logprob.is_finite() {
            return Ok(());
        }
        let (sample, prompt) = (&self.samples[s], &self.prompt.text);
        let tail = prompt.char_indices().rev().nth(79).map_or(0, |(at, _)| at);
        Err(EngineError::Numeric(format!(
            "the model's logits are not finite at token {} of completion {s} of row {}. hint: look at the weights of the \
             last update (grad_norm, optimizer.lr)\n  prompt ends {:?}\n  completion so far {:?}",
            sample.tokens.len(),
            self.prompt.id,
            &prompt[tail..],
            sample.text.preview(),
        )))
    }

    /// Takes the finished samples out.
    pub(super) fn take_group(&mut self, version: PolicyVersion) -> Group {
        let completions = self.samples.drain(..).map(Sequence::into_completion).collect();
        Group { prompt: Arc::clone(&self.prompt), completions, version }
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stop_string_is_found_where_new_text_completes_it() {
        let stops = ["</a>".to_string(), "\n\n".to_string()];
        assert_eq!(find_stop("x</a", 3, &stops), None);
        assert_eq!(find_stop("x</a>", 4, &stops), Some(1));
        assert_eq!(find_stop("x\n\n</a>", 2, &stops), Some(1));
        // it ended before the new text, so it was dealt with then
        assert_eq!(find_stop("</a>yyyy", 4, &stops), None);
        assert_eq!(find_stop("é</a>", 2, &stops), Some(2));
    }

    /// Pushes ids until the sample ends; how many it took, and the completion.
    fn run(tokenizer: &Tokenizer, ids: &[TokenId], sampling: &SamplingConfig) -> (usize, Completion) {
        let mut sample = Sequence::new(tokenizer, Stream::new(0, Purpose::Sample, &[]));
        let ended = ids.iter().position(|&token| sample.push(Drawn { token, logprob: -1.0 }, sampling));
        (ended.expect("the sample ends") + 1, sample.into_completion())
    }

    #[test]
    fn a_stop_string_ends_a_sample_across_token_borders() {
        let tokenizer = Tokenizer::from_characters("abcé", &["<x>"], &["<eos>"], "<eos>").unwrap();
        let ids = tokenizer.encode("aabcé<x>b").unwrap();
        let sampling =
            |stop: &str| SamplingConfig { stop: vec![stop.to_string()], ..SamplingConfig::default() };
        let (taken, found) = run(&tokenizer, &ids, &sampling("abc"));
        assert_eq!((taken, found.text.as_str(), found.finish), (4, "a", FinishReason::Stop));
        assert_eq!((found.tokens.len(), found.logprobs.len(), found.token_ends), (4, 4, vec![1, 1, 1, 1]));
        // from inside a character of two tokens, and into an added token
        let (taken, found) = run(&tokenizer, &ids, &sampling("é<"));
        assert_eq!((taken, found.text.as_str()), (7, "aabc"));
    }

    #[test]
    fn a_stop_token_adds_no_text_and_the_length_ends_what_does_not_stop() {
        let tokenizer = Tokenizer::from_characters("ab", &[], &["<eos>"], "<eos>").unwrap();
        let eos = tokenizer.eos()[0];
        let stopping =
            SamplingConfig { stop_tokens: vec![eos], max_new_tokens: 4, ..SamplingConfig::default() };
        let (taken, found) = run(&tokenizer, &[0, eos, 1, 1], &stopping);
        assert_eq!((taken, found.text.as_str(), found.finish), (2, "a", FinishReason::Stop));
        assert_eq!((found.tokens, found.token_ends), (vec![0, eos], vec![1, 1]));
        let (taken, found) = run(&tokenizer, &[0, 1, 1, 0, 1], &stopping);
        assert_eq!((taken, found.text.as_str(), found.finish), (4, "abba", FinishReason::Length));
    }

    #[test]
    fn a_stop_string_of_byte_tokens_ends_a_sample_without_waiting_for_what_follows() {
        let json = r#"{"version": "1.0", "added_tokens": [],
            "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
            "model": {"type": "BPE", "byte_fallback": true, "vocab": {"a": 0, "<0x0A>": 1, "b": 2}, "merges": []}}"#;
        let inner = tokenizers::Tokenizer::from_bytes(json).unwrap();
        let tokenizer = Tokenizer::new(inner, Default::default(), &[]).unwrap();
        let sampling = SamplingConfig { stop: vec!["\n\n".into()], ..SamplingConfig::default() };
        let (taken, found) = run(&tokenizer, &[0, 1, 2, 1, 1, 2, 2], &sampling);
        assert_eq!((taken, found.text.as_str(), found.finish), (5, "a\nb", FinishReason::Stop));
    }
}
