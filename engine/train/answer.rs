//! Prompts answered by the policy as it is and scored by the verifiers: the one way, whatever the answers are for.

use std::sync::Arc;

use super::Run;
use crate::error::Result;
use crate::eval::{Answers, Trial};
use crate::model::decoder::PagedDecoder;
use crate::rollout::{Request, RolloutEngine, RolloutKey, SamplingConfig};
use crate::types::Prompt;

// Parts of `RolloutKey::step`, so that no two uses of the policy draw the same numbers; training has the numbers below.

/// Held-out prompts.
pub(super) const EVALUATION: u64 = 1 << 63;
/// Validation prompts of a meta-gradient, beside the step's number.
pub(super) const VALIDATION: u64 = 1 << 62;
/// The filter's pass before a stage, beside the stage's number.
pub(super) const FILTER_PASS: u64 = 1 << 61;
/// Greedy baselines, beside the step's number.
pub(super) const GREEDY: u64 = 1 << 60;
/// Bit from which on the rounds of a training step are counted: a prompt drawn again in a later round is answered anew.
pub(super) const ROUND: u32 = 40;

impl Run {
    /// The key of rollouts by the policy as it is, for a use or step.
    pub(super) fn rollout_key(&self, step: u64) -> RolloutKey {
        RolloutKey { seed: self.recipe.seed, step, version: self.policy.version }
    }

    /// How this run draws and scores at `progress`, (step, steps in all) as scripts see them.
    pub(super) fn trial<'a>(&'a self, sampling: &'a SamplingConfig, progress: (u64, u64)) -> Trial<'a> {
        Trial { sampling, scorer: &self.scorer, progress }
    }

    /// `samples` completions of each prompt, scored.
    pub(super) fn answer<'a>(
        &self,
        engine: &mut RolloutEngine,
        prompts: impl Iterator<Item = &'a Arc<Prompt>>,
        samples: usize,
        key_step: u64,
        trial: Trial<'_>,
    ) -> Result<Answers> {
        let requests: Vec<Request> =
            prompts.map(|prompt| Request { prompt: Arc::clone(prompt), samples }).collect();
        let mut model = PagedDecoder::new(self.policy.weights());
        let key = self.rollout_key(key_step);
        trial.run(engine, &mut model, &self.pool, &self.tokenizer, &requests, key)
    }
}
