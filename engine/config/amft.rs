//! `[stage.amft]`: imitation and reinforcement in one step, weighed by what helps on validation prompts.

use serde::{Deserialize, Serialize};

use super::{Recipe, StageKind};
use crate::error::{EngineError, Result};

/// Settings of an `amft` stage (He, Feng & Li 2025, arXiv 2508.06944): `(1 - mu) L_RL + mu L_SFT` with a learned `mu`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AmftConfig {
    /// Weight of the demonstrations at the first step.
    pub mu: f64,
    /// Least weight.
    pub mu_min: f64,
    /// Greatest weight.
    pub mu_max: f64,
    /// How far one meta-gradient moves the weight at most: its factor is the cosine of two gradients.
    pub mu_lr: f64,
    /// Steps between two meta-gradients; 0 never measures one.
    pub meta_every: u64,
    /// Training prompts set aside for them; no stage trains on these.
    pub validation_prompts: usize,
    /// What a meta-gradient improves.
    pub validation: Validation,
    /// The weight rises by this times (target − entropy) after every step: below its target the policy imitates more.
    pub entropy_lr: f64,
    /// Wanted entropy, nats per token; without it that of the stage's first step.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub entropy_target: Option<f64>,
}

/// What is to rise on the validation prompts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Validation {
    /// The reward of completions that are drawn for them.
    #[default]
    Reward,
    /// The likelihood of their demonstrations.
    Demonstrations,
}

impl Default for AmftConfig {
    fn default() -> Self {
        Self {
            mu: 0.5,
            mu_min: 0.05,
            mu_max: 0.95,
            mu_lr: 0.1,
            meta_every: 5,
            validation_prompts: 32,
            validation: Validation::Reward,
            entropy_lr: 0.01,
            entropy_target: None,
        }
    }
}

impl AmftConfig {
    /// Whether meta-gradients are measured at all.
    pub fn has_meta(&self) -> bool {
        self.meta_every > 0 && self.mu_lr != 0.0
    }
}

impl Recipe {
    /// Whether any stage measures meta-gradients.
    pub fn has_meta_gradient(&self) -> bool {
        self.stages().iter().filter_map(|s| s.amft.as_ref()).any(AmftConfig::has_meta)
    }

    /// Training prompts that `amft` stages set aside for validation.
    pub fn validation_prompts(&self) -> usize {
        let of = |a: &AmftConfig| if a.has_meta() { a.validation_prompts } else { 0 };
        self.stages().iter().filter_map(|s| s.amft.as_ref()).map(of).max().unwrap_or(0)
    }

    pub(super) fn validate_amft(&self) -> Result<()> {
        let fail = |message: String| Err(EngineError::Config(message));
        for (i, stage) in self.stages().iter().enumerate() {
            let Some(a) = &stage.amft else { continue };
            let key = format!("stage.{i}.amft");
            if stage.kind != StageKind::Amft {
                return fail(format!("{key}: only a stage of kind \"amft\" reads it"));
            }
            if !(0.0 <= a.mu_min && a.mu_min <= a.mu && a.mu <= a.mu_max && a.mu_max <= 1.0) {
                return fail(format!(
                    "{key}: 0 <= mu_min <= mu <= mu_max <= 1 must hold, got {} <= {} <= {}",
                    a.mu_min, a.mu, a.mu_max
                ));
            }
            for (name, value) in [("mu_lr", a.mu_lr), ("entropy_lr", a.entropy_lr)] {
                if !(value.is_finite() && value >= 0.0) {
                    return fail(format!("{key}.{name} must be a number from 0, got {value}"));
                }
            }
            if a.has_meta() && a.validation_prompts == 0 {
                return fail(format!(
                    "{key}: a meta-gradient needs validation_prompts. hint: meta_every = 0 goes without"
                ));
            }
            let r = &self.rollout;
            if r.top_k != 0 || r.top_p < 1.0 || r.min_p > 0.0 {
                return fail(format!(
                    "{key}: under rollout.top_k, top_p or min_p a demonstration may be impossible. hint: remove them"
                ));
            }
        }
        Ok(())
    }
}
