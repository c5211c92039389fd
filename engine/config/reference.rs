//! Which policy a run is held against: the reference of the KL term and of preference losses.

use serde::{Deserialize, Serialize};

use super::{Recipe, StageConfig, StageKind};
use crate::error::{EngineError, Result};
use crate::loss::kl::{Control, Gradient, Placement};

/// The policy that reference logprobs come from. With an adapter every kind keeps at most a copy of the adapter.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase", deny_unknown_fields)]
pub enum ReferenceConfig {
    /// The policy at the start of the first stage that needs a reference: the loaded model, after a warm-up its result.
    /// With a new adapter and no stage before it that is the adapter switched off, which costs no memory.
    #[default]
    Initial,
    /// The loaded model, before any stage; with an adapter, the adapter switched off.
    Base,
    /// The policy at the start of the current stage.
    Stage,
    /// The policy of some steps ago, taken again every `every` steps (counted over stages).
    Refreshed {
        /// Steps.
        every: u64,
    },
    /// A moving average of the policy: every `every` steps `reference += (1 - decay) (policy - reference)`.
    Ema {
        /// Share of the reference that stays.
        #[serde(default = "default_decay")]
        decay: f64,
        /// Steps between two moves.
        #[serde(default = "default_every")]
        every: u64,
    },
}

fn default_decay() -> f64 {
    0.99
}

fn default_every() -> u64 {
    1
}

impl ReferenceConfig {
    /// Whether it is one policy from the start of a stage to its end.
    pub fn stays_in_a_stage(self) -> bool {
        !matches!(self, Self::Refreshed { .. } | Self::Ema { .. })
    }

    /// Whether it stays as it was taken to the end of the run.
    pub fn is_fixed(self) -> bool {
        matches!(self, Self::Initial | Self::Base)
    }

    pub(super) fn validate(self) -> Result<()> {
        let fail = |message: String| Err(EngineError::Config(message));
        match self {
            Self::Refreshed { every: 0 } | Self::Ema { every: 0, .. } => {
                fail("algorithm.reference.every must be at least 1".into())
            }
            Self::Ema { decay, .. } if !(0.0..1.0).contains(&decay) => fail(format!(
                "algorithm.reference.decay must be in [0, 1), got {decay}; 1 would never move. hint: kind = \"initial\""
            )),
            _ => Ok(()),
        }
    }
}

impl Recipe {
    /// What a KL term cannot be, and what would leave it without effect.
    pub(super) fn validate_kl(&self) -> Result<()> {
        let kl = &self.algorithm.objective.kl;
        let fail = |message: String| Err(EngineError::Config(format!("algorithm.objective.kl.{message}")));
        let is_factor = |x: f64| x.is_finite() && x >= 0.0;
        if !is_factor(kl.coefficient) {
            return fail(format!("coefficient must be a number from 0, got {}", kl.coefficient));
        }
        match kl.control {
            Control::Adaptive { .. } if kl.coefficient == 0.0 => fail(
                "control: an adaptive coefficient is multiplied, so from 0 it never moves. hint: set `coefficient`".into(),
            ),
            Control::Adaptive { target, horizon } if !(target > 0.0 && horizon > 0.0) => {
                fail(format!("control: target and horizon must be positive, got {target} and {horizon}"))
            }
            Control::Scheduled { end, .. } if !is_factor(end) => {
                fail(format!("control.end must be a number from 0, got {end}"))
            }
            _ if kl.placement == Placement::Reward && kl.gradient != Gradient::Plain => fail(
                "gradient: a penalty in the reward has no gradient of its own. hint: remove `gradient`, or set \
                 placement = \"loss\""
                    .into(),
            ),
            _ => Ok(()),
        }
    }

    /// Whether a stage needs reference logprobs.
    pub fn stage_needs_reference(&self, stage: &StageConfig) -> bool {
        let algorithm = stage.algorithm.as_ref().unwrap_or(&self.algorithm);
        match stage.kind {
            StageKind::Sft => false,
            StageKind::Grpo | StageKind::Amft => algorithm.objective.needs_reference(),
            StageKind::Preference => stage.comparison().needs_reference(),
        }
    }

    /// Whether any stage does.
    pub fn needs_reference(&self) -> bool {
        self.stages().iter().any(|stage| self.stage_needs_reference(stage))
    }
}
