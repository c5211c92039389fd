//! What a recipe's critic, filter and token-level advantages must be to work.

use super::{Recipe, StageKind};
use crate::advantage::{Baseline, Combine, CreditRule};
use crate::error::{EngineError, Result};
use crate::loss::correction::Covariance;

impl Recipe {
    /// Whether a completion is held against others of its group.
    pub fn compares_in_group(&self) -> bool {
        self.algorithm.critic.is_none() && self.algorithm.advantage.compares_in_group()
    }

    pub(super) fn validate_credit(&self) -> Result<()> {
        let fail = |message: String| Err(EngineError::Config(message));
        let a = &self.algorithm.advantage;
        if !(0.0..=1.0).contains(&a.gamma) {
            return fail(format!("algorithm.advantage.gamma must be in [0, 1], got {}", a.gamma));
        }
        if a.credit == CreditRule::Returns && a.combine == Combine::NormalizeThenSum {
            return fail(
                "algorithm.advantage.combine = \"normalize_then_sum\" has no single reward a token. hint: credit = \
                 \"completion\""
                    .into(),
            );
        }
        if let Some(filter) = &a.filter {
            if filter.keep < 2 || filter.keep >= self.rollout.group_size {
                return fail(format!(
                    "algorithm.advantage.filter.keep must be at least 2 and less than rollout.group_size = {}, got {}. hint: raise rollout.group_size",
                    self.rollout.group_size, filter.keep
                ));
            }
            if a.combine == Combine::NormalizeThenSum {
                return fail(
                    "algorithm.advantage.filter ranks one reward a completion; combine = \"normalize_then_sum\" has several. \
                     hint: remove one of the two"
                        .into(),
                );
            }
        }
        if let Some(Covariance::Kl { share, .. } | Covariance::Clip { share, .. }) =
            self.algorithm.objective.covariance
            && !(0.0..=1.0).contains(&share)
        {
            return fail(format!("algorithm.objective.covariance.share must be in [0, 1], got {share}"));
        }
        let Some(critic) = &self.algorithm.critic else { return Ok(()) };
        let positive = |x: f64| x > 0.0 && x.is_finite();
        for (key, value) in [("gamma", critic.gamma), ("lambda", critic.lambda)] {
            if !(0.0..=1.0).contains(&value) {
                return fail(format!("algorithm.critic.{key} must be in [0, 1], got {value}"));
            }
        }
        for (key, value) in [("clip", critic.clip), ("coefficient", critic.coefficient)] {
            if !positive(value) {
                return fail(format!("algorithm.critic.{key} must be positive, got {value}"));
            }
        }
        if critic.lr.is_some_and(|lr| !positive(lr)) {
            return fail("algorithm.critic.lr must be positive".into());
        }
        if a.combine == Combine::NormalizeThenSum || a.filter.is_some() || a.baseline == Baseline::Greedy {
            return fail(
                "algorithm.critic is the baseline of every token: `filter`, combine = \"normalize_then_sum\" and baseline = \
                 \"greedy\" of [algorithm.advantage] have no place beside it. hint: remove them"
                    .into(),
            );
        }
        if self.stages().iter().any(|s| s.kind == StageKind::Amft) {
            return fail(
                "algorithm.critic: a stage of kind \"amft\" has none. hint: remove one of the two".into(),
            );
        }
        if self.model.lora.as_ref().is_some_and(|lora| lora.dora) && critic.is_separate() {
            return fail(
                "algorithm.critic.trunk = \"separate\" does not go with model.lora.dora. hint: trunk = \"shared\"".into(),
            );
        }
        if self.model.half && critic.is_separate() {
            return fail(
                "algorithm.critic.trunk = \"separate\" copies what trains, and model.half changes that with every stage. \
                 hint: trunk = \"shared\""
                    .into(),
            );
        }
        Ok(())
    }
}
