//! The memory plan: what a run holds, from the recipe and the model's shape, before anything is allocated.
//!
//! Everything but activations and KV blocks is fixed by the model; those two take what the budget leaves, so
//! the plan decides the size of the learner's micro-batches and of the rollouts' block pool.

use std::fmt::{self, Write as _};

use rft_kernels::BLOCK;

use crate::config::{Precision, Recipe, Recompute};
use crate::error::{EngineError, Result};
use crate::learner::optimizer::Moments;
use crate::model::backprop::{LOGITS_CHUNK_BYTES, activation_bytes_per_row};
use crate::model::policy::Policy;
use crate::rollout::sampler::logits_rows;

/// Micro-batches above this many rows are no faster (the kernels are at their peak) and only take memory.
const MAX_ROWS: usize = 4096;

/// Micro-batches of fewer rows leave the kernels below their peak; then layers' activations are rather made again.
const FULL_SPEED_ROWS: usize = 512;

/// Program, tokenizer, Lua states and allocator slack, measured at 40–90 MB.
const PROGRAM_BYTES: usize = 96 << 20;

/// Bytes by purpose, and the sizes that follow from the budget.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemoryPlan {
    /// Weights in f32 and, in bf16 precision, their shadow; quantised ones in their codes.
    pub weights: usize,
    /// Gradient buffer and, in bf16, the rows that wait for their block.
    pub gradients: usize,
    /// AdamW moments.
    pub moments: usize,
    /// Copy of the weights or the adapter that reference logprobs come from.
    pub reference: usize,
    /// KV block pool.
    pub kv: usize,
    /// The rollout's and the learner's chunks of logits.
    pub logits: usize,
    /// Activations of one micro-batch.
    pub activations: usize,
    /// Everything else.
    pub program: usize,
    /// The budget.
    pub budget: usize,
    /// KV blocks of [`BLOCK`] positions.
    pub kv_blocks: usize,
    /// Rows (tokens) of a micro-batch.
    pub max_rows: usize,
    /// Layers, from the first, whose activations are made again in the backward pass.
    pub recompute: usize,
}

impl MemoryPlan {
    /// Plans a run of `recipe` over `policy` that keeps `reference` bytes of a reference policy and whose longest prompt
    /// has `prompt_tokens` tokens.
    ///
    /// # Errors
    /// A budget that cannot hold the run, with what to lower.
    pub fn new(recipe: &Recipe, policy: &Policy, reference: usize, prompt_tokens: usize) -> Result<Self> {
        let spec = &policy.spec;
        let rollout = &recipe.rollout;
        let base = policy.base.bytes();
        let adapter = policy.adapter.as_ref().map_or(0, |a| a.arena.bytes());
        let trainable = policy.trainable().trainable_len();
        let bf16 = recipe.model.precision == Precision::Bf16;
        let waiting = if bf16 { policy.trainable().waiting_bytes() } else { 0 };
        let samples = rollout.prompts_per_step * rollout.group_size;

        let element_bytes = if rollout.kv_precision == Precision::Bf16 { 2 } else { 4 };
        let block_bytes = 2 * element_bytes * BLOCK * spec.kv_heads * spec.head_dim * spec.layers;
        let sample_blocks = rollout.max_new_tokens.div_ceil(BLOCK) + 1;
        let step_blocks = rollout.prompts_per_step * prompt_tokens.div_ceil(BLOCK) + samples * sample_blocks;
        let fewest_blocks = prompt_tokens.div_ceil(BLOCK) + sample_blocks;

        let mut plan = Self {
            weights: base + adapter,
            // a meta-gradient is the product of two gradients
            gradients: (4 * trainable + waiting) * if recipe.has_meta_gradient() { 2 } else { 1 },
            moments: Moments::planned_bytes(policy.trainable(), &recipe.optimizer),
            reference,
            kv: 0,
            logits: samples.min(logits_rows(spec.vocab)) * spec.vocab * 4
                + (1 + usize::from(spec.final_softcap.is_some()))
                    * LOGITS_CHUNK_BYTES.min(512 * spec.vocab * 4),
            activations: 0,
            program: PROGRAM_BYTES,
            budget: recipe.devices.memory_mb << 20,
            kv_blocks: 0,
            max_rows: 0,
            recompute: 0,
        };
        let longest = prompt_tokens + rollout.max_new_tokens;
        let step_rows = rollout.prompts_per_step * prompt_tokens + samples * rollout.max_new_tokens;
        let per_row = |recompute| activation_bytes_per_row(&policy.weights(), recompute);
        let most = spec.layers - 1;
        let least_per_row = per_row(if recipe.train.recompute == Recompute::Off { 0 } else { most });
        let fewest = longest * least_per_row + fewest_blocks * block_bytes;
        let left = plan.budget.saturating_sub(plan.total());
        if left < fewest {
            return Err(EngineError::Memory(format!(
                "the run needs at least {} and devices.memory_mb allows {}\n{plan}\nhint: raise devices.memory_mb, or lower \
                 rollout.max_new_tokens, data.max_prompt_tokens or the model; [model.lora] needs no gradients, moments \
                 and reference of the base",
                mib(plan.total() + fewest),
                mib(plan.budget),
            )));
        }
        // KV first, up to what one step can use and at most half of what is left; activations get the rest.
        let wanted = match rollout.kv_memory_mb {
            0 => (step_blocks * block_bytes).min(left / 2),
            mb => (mb << 20).min(step_blocks * block_bytes),
        };
        plan.kv_blocks = (wanted / block_bytes).max(fewest_blocks);
        plan.kv = plan.kv_blocks * block_bytes;
        let left = left.saturating_sub(plan.kv);
        let full_speed = FULL_SPEED_ROWS.min(step_rows).max(longest);
        plan.recompute = match recipe.train.recompute {
            Recompute::Off => 0,
            Recompute::On => most,
            Recompute::Auto => (0..most).find(|&layers| full_speed * per_row(layers) <= left).unwrap_or(most),
        };
        let per_row = per_row(plan.recompute);
        plan.max_rows = (left / per_row).clamp(longest, MAX_ROWS.max(longest)).min(step_rows.max(longest));
        plan.activations = plan.max_rows * per_row;
        Ok(plan)
    }

    /// Bytes in all.
    pub fn total(&self) -> usize {
        self.weights
            + self.gradients
            + self.moments
            + self.reference
            + self.kv
            + self.logits
            + self.activations
            + self.program
    }
}

fn mib(bytes: usize) -> String {
    format!("{} MiB", bytes.div_ceil(1 << 20))
}

impl fmt::Display for MemoryPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut activations = format!("micro-batches of {} tokens", self.max_rows);
        if self.recompute > 0 {
            write!(activations, "; those of {} layers are made again", self.recompute)?;
        }
        let rows = [
            ("weights", self.weights, String::new()),
            ("gradients", self.gradients, String::new()),
            ("optimizer moments", self.moments, String::new()),
            ("reference", self.reference, String::new()),
            ("KV blocks", self.kv, format!("{} blocks of {BLOCK} positions", self.kv_blocks)),
            ("logits", self.logits, String::new()),
            ("activations", self.activations, activations),
            ("program", self.program, String::new()),
            ("total", self.total(), format!("budget {}", mib(self.budget))),
        ];
        for (name, bytes, note) in rows {
            writeln!(f, "  {name:<18} {:>10}  {note}", mib(bytes))?;
        }
        Ok(())
    }
}
