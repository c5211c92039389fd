//! How the next token is drawn, and the distribution that its logprob is stated under.

use std::cell::RefCell;

use rft_kernels::{Pool, Warp, argmax, draw, warp_row};

use crate::error::{EngineError, Result};
use crate::rng::{Stream, unit};
use crate::types::TokenId;

/// Settings of a rollout.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplingConfig {
    /// Longest completion, in tokens.
    pub max_new_tokens: usize,
    /// Softmax temperature; 0 is greedy, and its logprobs are those of temperature 1.
    pub temperature: f32,
    /// Keep the k most likely tokens; 0 is off.
    pub top_k: usize,
    /// Keep the smallest set of this probability; 1 is off.
    pub top_p: f32,
    /// Keep tokens of at least this share of the most likely one's probability; 0 is off.
    pub min_p: f32,
    /// Strings that end a completion; its text is cut before them.
    pub stop: Vec<String>,
    /// Tokens that end a completion; empty ignores the end of text.
    pub stop_tokens: Vec<TokenId>,
}

impl Default for SamplingConfig {
    /// 128 tokens of the model's own distribution; nothing ends a completion early.
    fn default() -> Self {
        Self {
            max_new_tokens: 128,
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            stop: Vec::new(),
            stop_tokens: Vec::new(),
        }
    }
}

impl SamplingConfig {
    /// The stated distribution, as sampler and learner both compute it.
    pub fn warp(&self) -> Warp {
        Warp {
            temperature: if self.temperature == 0.0 { 1.0 } else { self.temperature },
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
        }
    }

    /// Refuses settings that state no distribution.
    ///
    /// # Errors
    /// The setting, its value and its range.
    pub fn check(&self) -> Result<()> {
        let fail = |text: String| Err(EngineError::Config(format!("sampling: {text}")));
        if self.max_new_tokens == 0 {
            return fail("max_new_tokens must be at least 1, got 0".into());
        }
        if !(self.temperature >= 0.0 && self.temperature.is_finite()) {
            return fail(format!("temperature must be 0 (greedy) or positive, got {}", self.temperature));
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return fail(format!("top_p must be in (0, 1], got {}", self.top_p));
        }
        if !(0.0..1.0).contains(&self.min_p) {
            return fail(format!("min_p must be in [0, 1), got {}", self.min_p));
        }
        Ok(())
    }
}

/// One drawn token.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Drawn {
    /// The token.
    pub token: TokenId,
    /// Its natural-log probability under the stated distribution.
    pub logprob: f32,
}

/// A draw to make.
#[derive(Debug, Clone)]
pub struct DrawKey {
    /// Row of the logits.
    pub row: usize,
    /// Random numbers of the sample.
    pub stream: Stream,
    /// Which of them to use: the token's place in the completion.
    pub at: u64,
}

/// Logits that are alive at once, in bytes; a chunk has at least [`MIN_ROWS`] rows.
const CHUNK_BYTES: usize = 16 << 20;

/// Fewer rows would leave the product with the output matrix bound by memory.
const MIN_ROWS: usize = 32;

/// Rows of logits that the sampler takes at a time, so that no `[tokens, vocabulary]` buffer grows with the batch.
pub fn logits_rows(vocab: usize) -> usize {
    (CHUNK_BYTES / (4 * vocab)).max(MIN_ROWS)
}

thread_local! {
    static SCRATCH: RefCell<Vec<(f32, u32)>> = const { RefCell::new(Vec::new()) };
    /// Log of the sum of exponentials of each row.
    static LSES: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// Makes the draws `keys` from `logits [rows, vocab]`, which are warped in place; `drawn` gets one token a key.
pub fn sample_rows(
    pool: &Pool,
    logits: &mut [f32],
    vocab: usize,
    keys: &[DrawKey],
    sampling: &SamplingConfig,
    drawn: &mut Vec<Drawn>,
) {
    let warp = sampling.warp();
    let mut lses = LSES.take();
    lses.resize(logits.len() / vocab, 0.0);
    pool.map_chunks_into(logits, vocab, &mut lses, |_, row| {
        SCRATCH.with_borrow_mut(|scratch| warp_row(row, &warp, scratch)).lse
    });
    let logits = &*logits;
    drawn.clear();
    drawn.resize(keys.len(), Drawn::default());
    pool.map_chunks(drawn, 1, |i, drawn| {
        let key = &keys[i];
        let (row, lse) = (&logits[key.row * vocab..(key.row + 1) * vocab], lses[key.row]);
        let token = match sampling.temperature == 0.0 {
            true => argmax(row),
            false => draw(row, lse, unit(key.stream.at(key.at))),
        };
        drawn[0] = Drawn { token, logprob: row[token as usize] - lse };
    });
    LSES.set(lses);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Purpose;

    fn draws(sampling: &SamplingConfig, logits: &[f32], n: u64) -> Vec<Drawn> {
        let stream = Stream::new(1, Purpose::Sample, &[]);
        let keys: Vec<DrawKey> = (0..n).map(|at| DrawKey { row: 0, stream: stream.clone(), at }).collect();
        let mut drawn = Vec::new();
        sample_rows(&Pool::new(1), &mut logits.to_vec(), logits.len(), &keys, sampling, &mut drawn);
        drawn
    }

    #[test]
    fn frequencies_follow_the_stated_probabilities() {
        let logits: Vec<f32> = [0.5f32, 0.25, 0.125, 0.125].iter().map(|p| p.ln()).collect();
        let n = 40_000;
        for (temperature, top_k, expected) in [
            (1.0, 0, [0.5, 0.25, 0.125, 0.125]),
            (0.5, 0, [16.0, 4.0, 1.0, 1.0].map(|w| w / 22.0)),
            (1.0, 2, [2.0 / 3.0, 1.0 / 3.0, 0.0, 0.0]),
        ] {
            let sampling = SamplingConfig { temperature, top_k, ..SamplingConfig::default() };
            let drawn = draws(&sampling, &logits, n);
            for (token, p) in expected.into_iter().enumerate() {
                let of_token = || drawn.iter().filter(|d| d.token as usize == token);
                let share = of_token().count() as f64 / n as f64;
                // five standard errors
                assert!((share - p).abs() <= 5.0 * (p * (1.0 - p) / n as f64).sqrt(), "{token}: {share} {p}");
                assert!(of_token().all(|d| (f64::from(d.logprob).exp() - p).abs() < 1e-6));
            }
        }
    }

    #[test]
    fn temperature_zero_takes_the_largest_and_states_the_logprob_at_one() {
        let sampling = SamplingConfig { temperature: 0.0, ..SamplingConfig::default() };
        let drawn = draws(&sampling, &[0.0, 2.0, 2.0, 1.0], 3);
        let sum: f64 = [0.0f64, 2.0, 2.0, 1.0].iter().map(|x| x.exp()).sum();
        assert!(drawn.iter().all(|d| d.token == 1 && (f64::from(d.logprob) - (2.0 - sum.ln())).abs() < 1e-6));
    }

    #[test]
    fn settings_without_a_distribution_are_refused() {
        let base = SamplingConfig::default;
        for (bad, word) in [
            (SamplingConfig { temperature: -1.0, ..base() }, "temperature"),
            (SamplingConfig { temperature: f32::NAN, ..base() }, "temperature"),
            (SamplingConfig { top_p: 0.0, ..base() }, "top_p"),
            (SamplingConfig { min_p: 1.0, ..base() }, "min_p"),
            (SamplingConfig { max_new_tokens: 0, ..base() }, "max_new_tokens"),
        ] {
            assert!(bad.check().unwrap_err().to_string().contains(word));
        }
        assert!(base().check().is_ok());
    }
}
