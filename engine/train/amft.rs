//! Adaptive meta fine-tuning: demonstrations beside the rollouts in every step, with a learned weight.
//!
//! The step minimises `(1 - mu) L_RL + mu L_SFT` in one update (He, Feng & Li 2025, arXiv 2508.06944, section 4). Their
//! update of mu has two parts. The meta-gradient: a step of size a moves the weights by `-a [(1 - mu) g_RL + mu g_SFT]`,
//! so to first order the validation loss falls with mu as `a g_V . (g_SFT - g_RL)` grows. It is divided by the norms
//! here, so that its size does not depend on the model's or the optimizer's; the authors' code uses the product, and
//! with the sign of a utility where it has a loss. The regulariser: mu rises while the entropy is below its target.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::answer::VALIDATION;
use super::batch::StepBatch;
use super::grpo::Step;
use super::tasks::Tasks;
use super::{Run, State};
use crate::config::{AmftConfig, Validation};
use crate::error::{EngineError, Result};
use crate::learner::batch::{GroupTokens, Piece};
use crate::learner::step::{Learner, ScoreGrads};
use crate::loss::LossOutputs;
use crate::model::backprop::Scores;
use crate::reward::ScoredGroup;
use crate::rollout::{RolloutEngine, SamplingConfig};
use crate::types::{Prompt, TokenId};

/// The learned weight; part of every checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub(super) struct Balance {
    /// Weight of the demonstrations.
    pub(super) mu: f64,
    /// Wanted entropy, once it is known.
    target: Option<f64>,
    /// Cosine of the last meta-gradient.
    pub(super) meta: f64,
}

impl Balance {
    pub(super) fn new(config: &AmftConfig) -> Self {
        Self { mu: config.mu, target: config.entropy_target, meta: 0.0 }
    }

    /// The weight after a step with mean entropy `entropy`, and the cosine of a meta-gradient where one was measured.
    pub(super) fn next(mut self, config: &AmftConfig, entropy: f64, meta: Option<f64>) -> Self {
        let target = *self.target.get_or_insert(entropy);
        self.meta = meta.unwrap_or(self.meta);
        let change = config.mu_lr * meta.unwrap_or(0.0) + config.entropy_lr * (target - entropy);
        self.mu = (self.mu + change).clamp(config.mu_min, config.mu_max);
        self
    }
}

/// Prompts and demonstrations that no stage trains on.
#[derive(Debug, Default)]
pub(super) struct Validating {
    pub(super) prompts: Vec<Arc<Prompt>>,
    pub(super) demonstrations: Vec<Vec<TokenId>>,
}

/// The demonstrations of a step.
pub(super) struct Imitation<'a> {
    pub(super) groups: Vec<GroupTokens<'a>>,
    pub(super) ids: Vec<&'a str>,
    /// Weight against the rollouts.
    pub(super) mu: f64,
    tokens: usize,
}

impl Imitation<'_> {
    /// The gradient of `reinforce` times the rollouts' loss plus `imitate` times the mean negative log-likelihood of the
    /// demonstrations, which stand behind `first` groups of rollouts; also the micro-batch's share of the likelihood.
    pub(super) fn blend(
        &self,
        pieces: &[Piece],
        scores: &Scores,
        first: usize,
        (reinforce, imitate): (f64, f64),
        rollouts: impl FnOnce(&[Piece], &Scores) -> LossOutputs,
    ) -> (ScoreGrads, Option<LossOutputs>, f64) {
        let (own, shown) = pieces.split_at(pieces.partition_point(|p| p.group < first));
        let length = |p: &Piece| self.groups[p.group - first].completions[0].len();
        let imitated: usize = shown.iter().map(length).sum();
        let cut = scores.logprobs.len() - imitated;
        let mut grads = ScoreGrads::default();
        let outputs = (!own.is_empty()).then(|| {
            let part = Scores {
                logprobs: scores.logprobs[..cut].to_vec(),
                entropies: scores.entropies[..cut].to_vec(),
            };
            rollouts(own, &part)
        });
        if let Some(out) = &outputs {
            let scaled =
                |d: &[f32]| d.iter().map(|d| (reinforce * f64::from(*d)) as f32).collect::<Vec<f32>>();
            (grads.logprobs, grads.entropies) = (scaled(&out.d_new), scaled(&out.d_entropy));
        }
        let tokens = self.tokens as f64;
        grads.logprobs.resize(scores.logprobs.len(), (-imitate / tokens) as f32);
        grads.entropies.resize(scores.logprobs.len(), 0.0);
        let loss = -scores.logprobs[cut..].iter().map(|l| f64::from(*l)).sum::<f64>() / tokens;
        (grads, outputs, loss)
    }
}

impl Run {
    /// The cosine between the gradient of the validation loss and that of `L_SFT - L_RL`, on the steps that measure it.
    pub(super) fn meta_gradient(
        &self,
        config: &AmftConfig,
        learner: &mut Learner,
        engine: &mut RolloutEngine,
        sampling: &SamplingConfig,
        shown_rows: &[usize],
        step: &Step,
    ) -> Result<Option<f64>> {
        if !config.has_meta() || !self.state.step_in_stage.is_multiple_of(config.meta_every) {
            return Ok(None);
        }
        let Some(imitation) = imitation(&self.tasks, &self.state, shown_rows)? else { return Ok(None) };
        let (batch, warp) = (&step.batch, &step.warp);
        let objective = &self.recipe.algorithm.objective;
        let rollouts = |pieces: &[Piece], scores: &Scores| step.loss(objective, pieces, scores);
        let groups: Vec<GroupTokens> = batch.groups.iter().chain(&imitation.groups).cloned().collect();
        let apart = learner.gradient(&self.pool, &self.policy, &groups, warp, |pieces, scores| {
            Ok(imitation.blend(pieces, scores, batch.groups.len(), (-1.0, 1.0), rollouts).0)
        })?;
        let wanted = match config.validation {
            Validation::Reward => self.reward_gradient(learner, engine, sampling)?,
            Validation::Demonstrations => {
                let set = &self.tasks.validation;
                let groups: Vec<GroupTokens> =
                    set.prompts.iter().zip(&set.demonstrations).map(|(p, d)| shown(p, d)).collect();
                let weight = -1.0 / count(&groups)? as f32;
                learner.gradient(&self.pool, &self.policy, &groups, warp, |_, scores| {
                    let n = scores.logprobs.len();
                    Ok(ScoreGrads { logprobs: vec![weight; n], entropies: vec![0.0; n] })
                })?
            }
        };
        Ok(Some(cosine(&wanted, &apart)))
    }

    /// Gradient of minus the expected reward of the validation prompts: each completion's advantage over its group, no
    /// KL and no clip, mean over tokens.
    fn reward_gradient(
        &self,
        learner: &mut Learner,
        engine: &mut RolloutEngine,
        sampling: &SamplingConfig,
    ) -> Result<Vec<f32>> {
        let step = self.state.steps + 1;
        let trial = self.trial(sampling, (step, self.recipe.train.steps));
        let (prompts, samples) = (self.tasks.validation.prompts.iter(), self.recipe.rollout.group_size);
        let scored = self.answer(engine, prompts, samples, VALIDATION | step, trial)?.groups;
        let batch = StepBatch::new(&scored, sampling, false);
        let advantages = centred(&scored);
        let tokens = batch.totals.tokens.max(1) as f32;
        let weight = |g: usize, c: usize| {
            let row = batch.first_completion[g] + c;
            (advantages[row], batch.offsets[row + 1] - batch.offsets[row])
        };
        learner.gradient(&self.pool, &self.policy, &batch.groups, &sampling.warp(), |pieces, scores| {
            let rows = pieces.iter().flat_map(|p| p.completions.clone().map(|c| (p.group, c)));
            let logprobs: Vec<f32> = rows
                .flat_map(|(g, c)| {
                    let (advantage, len) = weight(g, c);
                    vec![-advantage / tokens; len]
                })
                .collect();
            Ok(ScoreGrads { entropies: vec![0.0; scores.logprobs.len()], logprobs })
        })
    }
}

/// The demonstrations that a step of an `amft` stage imitates, those of `rows`; `None` for other stages.
pub(super) fn imitation<'a>(
    tasks: &'a Tasks,
    state: &State,
    rows: &[usize],
) -> Result<Option<Imitation<'a>>> {
    let Some(balance) = state.balance else { return Ok(None) };
    let groups: Vec<GroupTokens> =
        rows.iter().map(|&r| shown(&tasks.train[r], &tasks.demonstrations[r])).collect();
    let ids = rows.iter().map(|&r| tasks.train[r].id.as_str()).collect();
    let tokens = count(&groups)?;
    Ok(Some(Imitation { groups, ids, mu: balance.mu, tokens }))
}

/// Of every completion, its reward less the mean of its group; 0 where it has none.
fn centred(scored: &[ScoredGroup]) -> Vec<f32> {
    let mut all = Vec::new();
    for group in scored {
        let rewards: Vec<f64> = group.outcomes.iter().filter_map(|o| o.reward).collect();
        let mean = rewards.iter().sum::<f64>() / rewards.len().max(1) as f64;
        all.extend(group.outcomes.iter().map(|o| o.reward.map_or(0.0, |r| (r - mean) as f32)));
    }
    all
}

fn shown<'a>(prompt: &'a Prompt, demonstration: &'a [TokenId]) -> GroupTokens<'a> {
    GroupTokens { prompt: &prompt.tokens, completions: vec![demonstration] }
}

fn count(groups: &[GroupTokens]) -> Result<usize> {
    match groups.iter().map(|g| g.completions[0].len()).sum() {
        0 => Err(EngineError::Config(
            "stage amft: no row of the batch has a `demonstration`. hint: add the field, or use kind = \"grpo\"".into(),
        )),
        n => Ok(n),
    }
}

/// Cosine of two gradients, summed in f64 in order; 0 where one of them is 0.
fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
    let norms = (dot(a, a) * dot(b, b)).sqrt();
    if norms > 0.0 { dot(a, b) / norms } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{NewModelConfig, OptimizerConfig, Precision};
    use crate::learner::optimizer::OptimizerKind;
    use crate::model::policy::{Policy, new_model_spec};
    use rft_kernels::{Pool, Warp};

    const WARP: Warp = Warp { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0 };

    fn policy() -> Policy {
        let shape = NewModelConfig { hidden: 32, layers: 2, heads: 2, kv_heads: 1, head_dim: 16, ffn: 64 };
        let mut policy = Policy::init(new_model_spec(&shape, 40, 0, 64).unwrap(), 5);
        policy.prepare(&Pool::new(1), 64, Precision::F32);
        policy
    }

    fn demonstrations() -> Imitation<'static> {
        let groups = vec![
            GroupTokens { prompt: &[3, 7, 11], completions: vec![&[4, 5, 6]] },
            GroupTokens { prompt: &[12, 2], completions: vec![&[10, 11, 30, 1]] },
        ];
        Imitation { groups, ids: vec!["a", "b"], mu: 0.4, tokens: 7 }
    }

    fn rollouts() -> Vec<GroupTokens<'static>> {
        vec![GroupTokens { prompt: &[9, 8], completions: vec![&[20, 21], &[22, 23, 24], &[25]] }]
    }

    /// A loss of the rollouts that is linear in their logprobs.
    fn linear(pieces: &[Piece], scores: &Scores) -> LossOutputs {
        let slopes = [[0.3f32, -0.2, 0.0], [-0.4, 0.1, 0.25], [0.5, 0.0, 0.0]];
        let lengths = [2, 3, 1];
        let d_new: Vec<f32> = pieces
            .iter()
            .flat_map(|p| p.completions.clone())
            .flat_map(|c| slopes[c][..lengths[c]].to_vec())
            .collect();
        assert_eq!(d_new.len(), scores.logprobs.len());
        LossOutputs { d_entropy: vec![0.0; d_new.len()], d_new, ..LossOutputs::default() }
    }

    /// Mean log-likelihood of a third set of tokens.
    fn utility(policy: &Policy, learner: &mut Learner) -> f64 {
        let groups = [GroupTokens { prompt: &[3, 8], completions: vec![&[4, 21, 6]] }];
        let scores = learner.score(&Pool::new(1), &policy.weights(), &groups, &WARP);
        scores.logprobs.iter().map(|l| f64::from(*l)).sum::<f64>() / 3.0
    }

    /// The utility after one plain step of `(1 - mu) L_RL + mu L_SFT`.
    fn utility_after(mu: f64, lr: f64) -> f64 {
        let (mut policy, shown) = (policy(), demonstrations());
        let groups: Vec<GroupTokens> = rollouts().into_iter().chain(shown.groups.iter().cloned()).collect();
        let mut learner = Learner::new(&policy, 9);
        let optimizer =
            OptimizerConfig { kind: OptimizerKind::Sgd, max_grad_norm: 0.0, ..Default::default() };
        learner
            .update(&Pool::new(1), &mut policy, &groups, &WARP, &optimizer, lr, |pieces, scores| {
                Ok(shown.blend(pieces, scores, 1, (1.0 - mu, mu), linear).0)
            })
            .unwrap();
        utility(&policy, &mut learner)
    }

    #[test]
    fn the_meta_gradient_is_the_slope_of_the_utility_after_a_step() {
        let (policy, shown, pool) = (policy(), demonstrations(), Pool::new(1));
        let groups: Vec<GroupTokens> = rollouts().into_iter().chain(shown.groups.iter().cloned()).collect();
        let mut learner = Learner::new(&policy, 9);
        let apart = learner
            .gradient(&pool, &policy, &groups, &WARP, |pieces, scores| {
                Ok(shown.blend(pieces, scores, 1, (-1.0, 1.0), linear).0)
            })
            .unwrap();
        let validation = [GroupTokens { prompt: &[3, 8], completions: vec![&[4, 21, 6]] }];
        let wanted = learner
            .gradient(&pool, &policy, &validation, &WARP, |_, _| {
                Ok(ScoreGrads { logprobs: vec![-1.0 / 3.0; 3], entropies: vec![0.0; 3] })
            })
            .unwrap();
        let dot: f64 = wanted.iter().zip(&apart).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
        let lr = 1e-3;
        let slope = (utility_after(1.0, lr) - utility_after(0.0, lr)) / 1.0;
        assert!((slope - lr * dot).abs() < 0.02 * slope.abs(), "{slope}, first order {}", lr * dot);
        let cosine = cosine(&wanted, &apart);
        assert!(cosine * slope > 0.0 && cosine.abs() < 1.0, "{cosine}");
        assert_eq!(super::cosine(&wanted, &vec![0.0; apart.len()]), 0.0);
    }

    #[test]
    fn the_weight_follows_both_terms_within_its_range() {
        let config =
            AmftConfig { mu_lr: 0.1, entropy_lr: 0.5, entropy_target: Some(1.0), ..AmftConfig::default() };
        let start = Balance::new(&config);
        let mu = |entropy, meta| start.next(&config, entropy, meta).mu;
        assert_eq!(mu(1.0, None), 0.5);
        assert!((mu(1.0, Some(0.4)) - 0.54).abs() < 1e-12, "imitation helps");
        assert!((mu(1.0, Some(-0.4)) - 0.46).abs() < 1e-12, "it harms");
        assert!((mu(0.8, None) - 0.6).abs() < 1e-12, "entropy below its target");
        assert!((mu(1.4, None) - 0.3).abs() < 1e-12, "and above");
        assert_eq!((mu(0.0, Some(1.0)), mu(3.0, None)), (0.95, 0.05));
        // without a target the first entropy is one
        let config = AmftConfig { entropy_target: None, ..config };
        let first = Balance::new(&config).next(&config, 2.0, None);
        assert_eq!(first.mu, 0.5);
        assert!((first.next(&config, 1.9, None).mu - 0.55).abs() < 1e-12);
    }
}
