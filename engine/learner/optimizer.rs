//! The optimizer over the trainable slots of a policy, with state that can be saved and a norm in a fixed order.

use rft_kernels::{AdamwStep, MOMENT_BLOCK, MomentCodes, Pool, adamw, adamw_bf16, adamw8, sgd};
use serde::{Deserialize, Serialize};

use crate::config::OptimizerConfig;
use crate::error::Result;
use crate::learner::checkpoint::{Buffers, Values};
use crate::model::params::{Arena, TrainedMut};

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

/// How moments are held.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MomentKind {
    /// Eight bytes a trained number.
    #[default]
    F32,
    /// Two bytes a trained number: 8-bit codes with a scale a block (Dettmers et al. 2022, arXiv 2110.02861).
    Int8,
}

/// Moments of every trainable number, laid out as the gradient buffer.
#[derive(Debug, Clone, PartialEq, Default)]
pub enum Moments {
    /// None yet: zero, or a rule without moments.
    #[default]
    None,
    /// First and second moments.
    F32 {
        /// First.
        m: Vec<f32>,
        /// Second.
        v: Vec<f32>,
    },
    /// Codes as of [`adamw8`]; blocks start anew with every run of trained rows.
    Int8 {
        /// Codes of the first.
        m: Vec<u8>,
        /// Codes of the second.
        v: Vec<u8>,
        /// Two scales a block.
        scales: Vec<f32>,
    },
}

impl Moments {
    /// Zero moments of what trains in `arena`.
    fn zeros(arena: &Arena, config: &OptimizerConfig) -> Self {
        let len = arena.trainable_len();
        match (config.kind, config.state) {
            (OptimizerKind::Sgd, _) => Self::None,
            (_, MomentKind::F32) => Self::F32 { m: vec![0.0; len], v: vec![0.0; len] },
            (_, MomentKind::Int8) => {
                Self::Int8 { m: vec![0; len], v: vec![0; len], scales: vec![0.0; scale_count(arena)] }
            }
        }
    }

    /// Bytes that the moments of what trains in `arena` will take.
    pub fn planned_bytes(arena: &Arena, config: &OptimizerConfig) -> usize {
        match (config.kind, config.state) {
            (OptimizerKind::Sgd, _) => 0,
            (_, MomentKind::F32) => 8 * arena.trainable_len(),
            (_, MomentKind::Int8) => 2 * arena.trainable_len() + 4 * scale_count(arena),
        }
    }

    /// What a checkpoint keeps, by name.
    pub fn buffers(&self) -> Vec<(&'static str, Values<'_>)> {
        match self {
            Self::None => Vec::new(),
            Self::F32 { m, v } => vec![("adam_m", m[..].into()), ("adam_v", v[..].into())],
            Self::Int8 { m, v, scales } => {
                vec![("adam_m", m[..].into()), ("adam_v", v[..].into()), ("adam_scales", scales[..].into())]
            }
        }
    }

    /// The inverse of [`Moments::buffers`] for what trains in `arena`.
    ///
    /// # Errors
    /// Buffers of another length or kind.
    pub fn restore(buffers: &mut Buffers, arena: &Arena, config: &OptimizerConfig) -> Result<Self> {
        let len = arena.trainable_len();
        if config.kind == OptimizerKind::Sgd || !buffers.has("adam_m") {
            return Ok(Self::None);
        }
        Ok(match config.state {
            MomentKind::F32 => Self::F32 { m: buffers.take("adam_m", len)?, v: buffers.take("adam_v", len)? },
            MomentKind::Int8 => Self::Int8 {
                m: buffers.take_codes("adam_m", len)?,
                v: buffers.take_codes("adam_v", len)?,
                scales: buffers.take("adam_scales", scale_count(arena))?,
            },
        })
    }
}

fn scale_count(arena: &Arena) -> usize {
    2 * arena.trained_runs().map(|run| run.len().div_ceil(MOMENT_BLOCK)).sum::<usize>()
}

/// The optimizer's memory of a stage.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct AdamW {
    /// Made at the first update.
    pub moments: Moments,
    /// Updates done.
    pub updates: u64,
}

impl AdamW {
    /// One update of `arena` from `grads` of length `norm`, scaled down to `config.max_grad_norm` where that is positive.
    /// Matrices decay, vectors (norms, biases) do not.
    pub fn step(
        &mut self,
        pool: &Pool,
        arena: &mut Arena,
        grads: &[f32],
        norm: f64,
        config: &OptimizerConfig,
        lr: f64,
    ) {
        // 1e-6 as in torch.nn.utils.clip_grad_norm_
        let clip =
            if config.max_grad_norm > 0.0 { (config.max_grad_norm / (norm + 1e-6)).min(1.0) } else { 1.0 };
        self.updates += 1;
        if matches!(self.moments, Moments::None) {
            self.moments = Moments::zeros(arena, config);
        }
        let mut scales_from = 0;
        let frozen = arena.frozen_beside_trained();
        // whether the pass over the weights makes their shadow too
        let shadowed = config.kind == OptimizerKind::AdamW && config.state == MomentKind::F32;
        for TrainedMut { weights, shadow, grad: range, decays } in arena.trainable_mut() {
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
            let grads = &grads[range.clone()];
            match &mut self.moments {
                Moments::F32 { m, v } => {
                    let (m, v) = (&mut m[range.clone()], &mut v[range]);
                    match shadow {
                        Some(shadow) => adamw_bf16(pool, weights, grads, m, v, shadow, &step),
                        None => adamw(pool, weights, grads, m, v, &step),
                    }
                }
                Moments::Int8 { m, v, scales } => {
                    let scales = &mut scales[scales_from..][..2 * range.len().div_ceil(MOMENT_BLOCK)];
                    scales_from += scales.len();
                    let moments = MomentCodes { m: &mut m[range.clone()], v: &mut v[range], scales };
                    adamw8(pool, weights, grads, moments, &step);
                }
                Moments::None => unreachable!("made above for every rule but the plain one"),
            }
        }
        arena.put_back(&frozen);
        arena.refresh_trained(pool, shadowed);
    }
}
