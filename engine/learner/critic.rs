//! The critic's own learning: its head with gradient and moments, and its trunk where it does not share the policy's.
//!
//! A separate trunk is a second set of the weights that train (the base, or the adapter over the same frozen base).
//! It takes their place in the policy while the critic works ([`Critic::swap`]), so one learner serves both.

use rft_kernels::{AdamwStep, Pool, adamw, sgd, sum_of_squares};

use crate::config::OptimizerConfig;
use crate::learner::optimizer::{AdamW, OptimizerKind};
use crate::model::params::Arena;
use crate::model::policy::Policy;
use crate::model::value_head::ValueHead;

/// A critic's weights and optimizer state.
#[derive(Debug)]
pub struct Critic {
    /// Hidden state to value.
    pub head: ValueHead,
    /// First and second moments of the head, and its updates.
    pub moments: (Vec<f32>, Vec<f32>, u64),
    /// The weights that train, of a trunk that is not the policy's, and their moments.
    pub trunk: Option<(Arena, AdamW)>,
    pub(super) grad: Vec<f32>,
}

impl Critic {
    /// A critic that says 0 everywhere, on the policy's trunk or on a `separate` one that starts as a copy of it.
    pub fn new(policy: &Policy, separate: bool) -> Self {
        let head = ValueHead::new(policy.spec.hidden);
        let len = head.weights.len();
        let trainable = policy.trainable();
        let trunk = separate.then(|| (trainable.clone(), AdamW::default()));
        Self { head, moments: (vec![0.0; len], vec![0.0; len], 0), trunk, grad: vec![0.0; len] }
    }

    /// Puts a separate trunk and its moments in the place of the policy's, or both back; nothing for a shared one.
    pub fn swap(&mut self, policy: &mut Policy, adam: &mut AdamW) {
        if let Some((arena, moments)) = &mut self.trunk {
            std::mem::swap(policy.trainable_mut(), arena);
            std::mem::swap(adam, moments);
        }
    }

    /// One update of the head from its gradient, which is scaled down to `config.max_grad_norm` by its own norm.
    pub(super) fn step(&mut self, pool: &Pool, config: &OptimizerConfig, lr: f64) {
        let norm = sum_of_squares(pool, &self.grad).sqrt();
        let clip =
            if config.max_grad_norm > 0.0 { (config.max_grad_norm / (norm + 1e-6)).min(1.0) } else { 1.0 };
        let (m, v, updates) = &mut self.moments;
        *updates += 1;
        if config.kind == OptimizerKind::Sgd {
            return sgd(pool, &mut self.head.weights, &self.grad, lr as f32, 0.0, clip as f32);
        }
        let step = AdamwStep {
            lr: lr as f32,
            beta1: config.beta1 as f32,
            beta2: config.beta2 as f32,
            eps: config.eps as f32,
            weight_decay: 0.0,
            step: *updates,
            grad_scale: clip as f32,
        };
        adamw(pool, &mut self.head.weights, &self.grad, m, v, &step);
    }

    /// The head's gradient of the last update.
    pub fn last_grad(&self) -> &[f32] {
        &self.grad
    }
}
