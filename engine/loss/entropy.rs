//! The entropy bonus's coefficient and how it moves.

use serde::{Deserialize, Serialize};

/// How the coefficient of the entropy bonus moves.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", deny_unknown_fields)]
pub enum EntropyControl {
    /// It does not.
    #[default]
    Fixed,
    /// Rises by `delta` after a step whose entropy is at or below `target`, falls by it after the others, within
    /// `min..=max`; the bonus applies only after a step at or below the target (Skywork-OR1, He et al. 2025,
    /// arXiv 2505.22312, section 4; TRL's `use_adaptive_entropy`).
    Adaptive {
        /// Wanted entropy, nats per token.
        target: f64,
        /// Change a step.
        delta: f64,
        /// Least coefficient.
        min: f64,
        /// Greatest coefficient.
        max: f64,
    },
}

/// State of the control.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct EntropyState {
    /// Current coefficient.
    pub coefficient: f64,
    /// Mean entropy of the last step, nats per token; `None` before the first.
    pub last: Option<f64>,
}

impl EntropyState {
    /// The state before the first step.
    pub fn new(coefficient: f64) -> Self {
        Self { coefficient, last: None }
    }
}

impl EntropyControl {
    /// The coefficient that the next step's loss uses.
    pub fn coefficient(&self, state: &EntropyState) -> f64 {
        match self {
            Self::Fixed => state.coefficient,
            Self::Adaptive { target, .. } if state.last.is_some_and(|h| h <= *target) => state.coefficient,
            Self::Adaptive { .. } => 0.0,
        }
    }

    /// The state after a step with mean entropy `entropy`, nats per token.
    pub fn next(&self, state: &EntropyState, entropy: f64) -> EntropyState {
        let coefficient = match self {
            Self::Fixed => state.coefficient,
            Self::Adaptive { target, delta, max, .. } if entropy <= *target => {
                (state.coefficient + delta).min(*max)
            }
            Self::Adaptive { delta, min, .. } => (state.coefficient - delta).max(*min),
        };
        EntropyState { coefficient, last: Some(entropy) }
    }
}
