//! Mean reward and pass@k over a set of prompts, on the same rollout engine and verifiers as training.

use std::sync::Arc;
use std::time::Instant;

use rft_kernels::Pool;

use crate::data::tokenizer::Tokenizer;
use crate::error::{EngineError, Result};
use crate::report::metrics::EvalResult;
use crate::reward::{ScoredGroup, Scorer, component_means, error_counts};
use crate::rollout::{PagedModel, Request, RolloutEngine, RolloutKey, RolloutStats, SamplingConfig};
use crate::types::Prompt;

/// A completion passes when its reward is at least this share of the best possible one, taken as the sum of weights.
const PASS_SHARE: f64 = 0.999;

/// How prompts are answered and answers scored.
#[derive(Clone, Copy)]
pub struct Trial<'a> {
    /// How completions are drawn.
    pub sampling: &'a SamplingConfig,
    /// Verifiers.
    pub scorer: &'a Scorer,
    /// `ctx.step` and `ctx.total_steps` of the scripts.
    pub progress: (u64, u64),
}

/// Requests answered and scored.
pub struct Answers {
    /// In the order of the requests.
    pub groups: Vec<ScoredGroup>,
    /// Of the rollouts.
    pub stats: RolloutStats,
    /// Seconds waited for verifiers after the last completion.
    pub waited: f64,
}

impl Trial<'_> {
    /// Answers and scores requests; verifiers run while later groups still decode.
    ///
    /// # Errors
    /// As [`RolloutEngine::generate`] and [`crate::reward::Scoring::finish`].
    pub fn run(
        &self,
        engine: &mut RolloutEngine,
        model: &mut dyn PagedModel,
        pool: &Pool,
        tokenizer: &Tokenizer,
        requests: &[Request],
        key: RolloutKey,
    ) -> Result<Answers> {
        let mut scoring = self.scorer.start(self.progress.0, self.progress.1, key.seed);
        let stats =
            engine.generate(model, pool, tokenizer, requests, self.sampling, key, &mut |i, group| {
                scoring.submit(i, group);
                Ok(())
            })?;
        let waiting = Instant::now();
        Ok(Answers { groups: scoring.finish()?, stats, waited: waiting.elapsed().as_secs_f64() })
    }
}

/// What an evaluation runs on.
pub struct Evaluation<'a> {
    /// Prompts to answer.
    pub prompts: &'a [Arc<Prompt>],
    /// Completions a prompt.
    pub samples: usize,
    /// How they are drawn and scored.
    pub trial: Trial<'a>,
    /// Sum of the verifiers' weights.
    pub full_reward: f64,
}

impl Evaluation<'_> {
    /// Answers and scores the prompts.
    ///
    /// # Errors
    /// No completion has a reward; else as [`Trial::run`].
    pub fn run(
        &self,
        engine: &mut RolloutEngine,
        model: &mut dyn PagedModel,
        pool: &Pool,
        tokenizer: &Tokenizer,
        key: RolloutKey,
    ) -> Result<(EvalResult, Vec<ScoredGroup>, RolloutStats)> {
        let requests: Vec<Request> =
            self.prompts.iter().map(|p| Request { prompt: Arc::clone(p), samples: self.samples }).collect();
        let answers = self.trial.run(engine, model, pool, tokenizer, &requests, key)?;
        Ok((self.summarise(&answers.groups)?, answers.groups, answers.stats))
    }

    fn summarise(&self, groups: &[ScoredGroup]) -> Result<EvalResult> {
        let rewards: Vec<f64> = groups.iter().flat_map(|g| &g.outcomes).filter_map(|o| o.reward).collect();
        if rewards.is_empty() {
            return Err(EngineError::Reward(match error_counts(groups).first() {
                Some(e) => format!(
                    "none of the {} evaluated completions got a reward; {} calls of {} failed ({}), the first: {}",
                    groups.len() * self.samples,
                    e.count,
                    e.script,
                    e.kind,
                    e.first
                ),
                None => format!(
                    "none of the {} evaluated completions got a reward: every verifier abstained. hint: check that the \
                     rows have the fields that the scripts read",
                    groups.len() * self.samples
                ),
            }));
        }
        let completions: Vec<usize> =
            groups.iter().flat_map(|g| &g.group.completions).map(|c| c.tokens.len()).collect();
        let passes = |g: &ScoredGroup| {
            let full = PASS_SHARE * self.full_reward;
            g.outcomes.iter().filter(|o| o.reward.is_some_and(|r| r >= full)).count()
        };
        let powers = (0..).map(|i| 1usize << i).take_while(|k| *k <= self.samples);
        let pass_at_k = powers
            .map(|k| {
                let sum: f64 = groups.iter().map(|g| pass_at_k(self.samples, passes(g), k)).sum();
                (k, sum / groups.len().max(1) as f64)
            })
            .collect();
        Ok(EvalResult {
            reward: rewards.iter().sum::<f64>() / rewards.len() as f64,
            components: component_means(groups),
            pass_at_k,
            completion_tokens_mean: completions.iter().sum::<usize>() as f64
                / completions.len().max(1) as f64,
        })
    }
}

/// Unbiased pass@k from `n` samples of which `c` pass: `1 - C(n-c, k) / C(n, k)` (Chen et al. 2021, arXiv 2107.03374, eq. 1).
pub fn pass_at_k(n: usize, c: usize, k: usize) -> f64 {
    if n - c < k {
        return 1.0;
    }
    1.0 - (n - c + 1..=n).map(|i| 1.0 - k as f64 / i as f64).product::<f64>()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pass_at_k_counts_subsets() {
        // 4 samples, 1 passes: a pair holds it in 3 of 6 cases
        assert!((pass_at_k(4, 1, 2) - 0.5).abs() < 1e-12);
        assert_eq!((pass_at_k(4, 0, 2), pass_at_k(4, 3, 2)), (0.0, 1.0));
    }
}
