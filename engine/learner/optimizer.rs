//! The optimizer over the trainable slots of a policy, with state that can be saved and a norm in a fixed order.

use rft_kernels::{AdamwStep, Pool, adamw, sgd, sum_of_squares};
use serde::{Deserialize, Serialize};

use crate::config::OptimizerConfig;
use crate::model::params::Arena;

/// How a gradient becomes an update.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OptimizerKind {
    /// AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101).
    #[default]
    AdamW,
    /// Plain gradient descent, weight decay added to the gradient as in torch; the betas and `eps` are not read.
    Sgd,
}

/// Moments of every trainable number, laid out as the gradient buffer.
#[derive(Debug, Clone, PartialEq)]
pub struct AdamW {
    /// First moments.
    pub m: Vec<f32>,
    /// Second moments.
    pub v: Vec<f32>,
    /// Updates done.
    pub updates: u64,
}

impl AdamW {
    /// Zero moments for `len` numbers.
    pub fn new(len: usize) -> Self {
        Self { m: vec![0.0; len], v: vec![0.0; len], updates: 0 }
    }

    /// One update of `arena` from `grads`, scaled down to `config.max_grad_norm` where that is positive.
    /// Matrices decay, vectors (norms, biases) do not. Returns the gradient's norm before scaling.
    pub fn step(
        &mut self,
        pool: &Pool,
        arena: &mut Arena,
        grads: &[f32],
        config: &OptimizerConfig,
        lr: f64,
    ) -> f64 {
        let norm = sum_of_squares(pool, grads).sqrt();
        // 1e-6 as in torch.nn.utils.clip_grad_norm_
        let clip =
            if config.max_grad_norm > 0.0 { (config.max_grad_norm / (norm + 1e-6)).min(1.0) } else { 1.0 };
        self.updates += 1;
        let frozen = arena.frozen_beside_trained();
        for (weights, range, decays) in arena.trainable_mut() {
            if config.kind == OptimizerKind::Sgd {
                let decay = if decays { config.weight_decay as f32 } else { 0.0 };
                sgd(pool, weights, &grads[range], lr as f32, decay, clip as f32);
                continue;
            }
            let step = AdamwStep {
                lr: lr as f32,
                beta1: config.beta1 as f32,
                beta2: config.beta2 as f32,
                eps: config.eps as f32,
                weight_decay: if decays { config.weight_decay as f32 } else { 0.0 },
                step: self.updates,
                grad_scale: clip as f32,
            };
            let (m, v) = (&mut self.m[range.clone()], &mut self.v[range.clone()]);
            adamw(pool, weights, &grads[range], m, v, &step);
        }
        arena.put_back(&frozen);
        arena.refresh(pool);
        norm
    }
}
