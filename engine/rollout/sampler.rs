//! How the next token is drawn, and the distribution that its logprob is stated under.

use rft_kernels::{Pool, Warp, argmax, draw, warp_row};

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
    /// Tokens that end a completion.
    pub stop_tokens: Vec<TokenId>,
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
}

/// One drawn token.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Drawn {
    /// The token.
    pub token: TokenId,
    /// Its natural-log probability under the stated distribution.
    pub logprob: f32,
}

/// Draws from each row of `logits [rows, vocab]`: for row i one token per stream in `streams[i]`, at that stream's
/// given position. The rows are warped in place.
pub fn sample_rows(
    pool: &Pool,
    logits: &mut [f32],
    vocab: usize,
    streams: &[Vec<(Stream, u64)>],
    sampling: &SamplingConfig,
) -> Vec<Vec<Drawn>> {
    let warp = sampling.warp();
    pool.map_chunks(&mut logits[..streams.len() * vocab], vocab, |i, row| {
        let stats = warp_row(row, &warp, &mut Vec::new());
        let pick = |(stream, at): &(Stream, u64)| {
            let token = match sampling.temperature {
                0.0 => argmax(row),
                _ => draw(row, stats.lse, unit(stream.at(*at))),
            };
            Drawn { token, logprob: row[token as usize] - stats.lse }
        };
        streams[i].iter().map(pick).collect()
    })
}
