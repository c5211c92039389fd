//! The memory plan: what a run holds, from the recipe and the model's shape, before anything is allocated.
//!
//! Everything but activations and KV blocks is fixed by the model; those two take what the budget leaves, so
//! the plan decides the size of the learner's micro-batches and of the rollouts' block pool. Rollouts and learner work in turn, and
//! each gives back what the other can use (`RolloutEngine::rest`, `Learner::rest`): a step holds what the larger of them needs.

use std::fmt::{self, Write as _};

use rft_kernels::{BLOCK, held_bytes};

use crate::config::{Precision, Recipe, Recompute};
use crate::error::{EngineError, Result};
use crate::learner::optimizer::Moments;
use crate::model::backprop::chunk_targets;
use crate::model::footprint::{rollout_bytes, training_bytes, waiting_bytes};
use crate::model::policy::Policy;
use crate::rollout::engine::PREFILL_ROWS;
use crate::rollout::sampler::logits_rows;

/// Micro-batches of fewer rows leave the kernels below their peak; then layers' activations are rather made again. More rows are no
/// faster and only take memory, so that a micro-batch has the fewest whole groups that reach it.
const FULL_SPEED_ROWS: usize = 512;

/// Rows that a micro-batch has at most where a group has as many: one that is cut computes its prompt more than once.
const MAX_ROWS: usize = 4096;

/// The program's own pages, thread stacks and small allocations: 18 MiB of the file and 4 MiB, measured.
const PROGRAM_BYTES: usize = 22 << 20;

/// A Lua state with the `rft` library and a shipped verifier, measured.
const STATE_BYTES: usize = 1 << 20;

/// A token of the vocabulary in the tokenizer's tables, with those of a model's file, measured.
const VOCAB_ENTRY_BYTES: usize = 450;

/// A row of data with its fields, beside three times its text (fields, prompt, tokens), measured.
const ROW_BYTES: usize = 3000;

/// A token of a step's completions in the rows of `samples.jsonl` before they are written: three JSON numbers and its text.
const SAMPLE_TOKEN_BYTES: usize = 150;

/// What the data of a run say about its memory.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DataSize {
    /// Tokens of the longest prompt.
    pub prompt_tokens: usize,
    /// Tokens of the longest prompt and completion together, stored ones too.
    pub positions: usize,
    /// Most rows of a step, of whatever stage, with completions of full length.
    pub step_rows: usize,
    /// Most rows of one group of such a step.
    pub group_rows: usize,
    /// Rows, held-out ones and those of single stages too.
    pub rows: usize,
    /// Held-out prompts.
    pub heldout: usize,
    /// Bytes of their prompts.
    pub text: usize,
    /// Tokens of stored completions that are compared with a reference.
    pub stored_tokens: usize,
}

/// Bytes by purpose, and the sizes that follow from the budget.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemoryPlan {
    /// Weights in f32 and, in bf16 precision, their shadow; quantised ones in their codes.
    pub weights: usize,
    /// Gradient buffer.
    pub gradients: usize,
    /// Rows that wait: in bf16 for their block of a gradient, and the embedding's for the end of an update.
    pub waiting: usize,
    /// AdamW moments.
    pub moments: usize,
    /// Copy of the weights or the adapter that reference logprobs come from.
    pub reference: usize,
    /// A separate trunk of the critic and its moments.
    pub critic: usize,
    /// KV block pool.
    pub kv: usize,
    /// The learner's chunk of logits.
    pub logits: usize,
    /// Activations of one micro-batch.
    pub activations: usize,
    /// A pass of the rollouts, with its logits.
    pub rollout: usize,
    /// Everything else: the program, tokenizer, rows, Lua states.
    pub program: usize,
    /// The budget.
    pub budget: usize,
    /// KV blocks of [`BLOCK`] positions.
    pub kv_blocks: usize,
    /// Rows (tokens) of a micro-batch.
    pub max_rows: usize,
    /// Rows of a step of full length.
    pub step_rows: usize,
    /// Layers, from the first, whose activations are made again in the backward pass.
    pub recompute: usize,
    /// Whether the learner gives its activations back for rollouts, which need more than the gradient's memory.
    pub activations_rest: bool,
    /// Whether rollouts happen between gradients that are kept, so that nothing is given back.
    pub at_once: bool,
}

impl MemoryPlan {
    /// Plans a run of `recipe` over `policy` and such data that keeps `reference` bytes of a reference policy.
    ///
    /// # Errors
    /// A budget that cannot hold the run, with what to lower.
    pub fn new(recipe: &Recipe, policy: &Policy, reference: usize, data: DataSize) -> Result<Self> {
        let spec = &policy.spec;
        let rollout = &recipe.rollout;
        let base = policy.base.bytes();
        let adapter = policy.adapter.as_ref().map_or(0, |a| a.arena.bytes());
        let trainable = policy.trainable().trainable_len();
        let bf16 = recipe.model.precision == Precision::Bf16;
        let waiting = if bf16 { policy.trainable().waiting_bytes() } else { 0 };
        // a run of stored rows draws only to be measured, if at all
        let draws = recipe.stages().iter().any(|stage| stage.draws());
        let measured = if recipe.reward.is_empty() { 0 } else { data.heldout };
        let (prompts, completions) = match draws {
            true => (rollout.prompts_per_step, rollout.group_size),
            false => (measured, recipe.eval.samples),
        };
        let samples = prompts * completions;

        let prompt_tokens = data.prompt_tokens;
        let element_bytes = if rollout.kv_precision == Precision::Bf16 { 2 } else { 4 };
        let layer_block = element_bytes * BLOCK * spec.kv_heads * spec.head_dim;
        let block_bytes = 2 * layer_block * spec.layers;
        let sample_blocks = rollout.max_new_tokens.div_ceil(BLOCK) + 1;
        let step_blocks = prompts * prompt_tokens.div_ceil(BLOCK) + samples * sample_blocks;
        let fewest_blocks = prompt_tokens.div_ceil(BLOCK) + sample_blocks;
        let longest = data.positions;
        let step_rows = data.step_rows;
        let weights = policy.weights();
        let copies = 1 + usize::from(spec.final_softcap.is_some());
        let scripts = recipe.reward.len() * recipe.devices.thread_count();
        let decoding = samples.max(measured * recipe.eval.samples);
        let program = PROGRAM_BYTES
            + scripts * STATE_BYTES
            + spec.vocab * VOCAB_ENTRY_BYTES
            + data.rows * ROW_BYTES
            + 3 * data.text
            + if draws { samples * rollout.max_new_tokens * SAMPLE_TOKEN_BYTES } else { 0 };

        let mut plan = Self {
            weights: base + adapter,
            // a meta-gradient is the product of two gradients
            gradients: 4 * trainable * if recipe.has_meta_gradient() { 2 } else { 1 },
            waiting: waiting + waiting_bytes(&weights, step_rows),
            moments: Moments::planned_bytes(policy.trainable(), &recipe.optimizer),
            reference: reference + 4 * data.stored_tokens,
            critic: match recipe.algorithm.critic {
                Some(critic) if critic.is_separate() => {
                    policy.trainable().bytes() + Moments::planned_bytes(policy.trainable(), &recipe.optimizer)
                }
                _ => 0,
            },
            kv: 0,
            logits: copies * held_bytes(chunk_targets(spec.vocab).min(step_rows) * spec.vocab * 4),
            activations: 0,
            rollout: match decoding {
                0 => 0,
                n => {
                    rollout_bytes(&weights, PREFILL_ROWS + n.min(samples))
                        + held_bytes(n.min(logits_rows(spec.vocab)) * spec.vocab * 4)
                }
            },
            program,
            budget: recipe.devices.memory_mb << 20,
            kv_blocks: 0,
            max_rows: 0,
            step_rows,
            recompute: 0,
            activations_rest: false,
            at_once: recipe.has_meta_gradient(),
        };
        let bytes = |rows, recompute| training_bytes(&weights, rows, recompute);
        let most = spec.layers - 1;
        let fewest = bytes(longest, if recipe.train.recompute == Recompute::Off { 0 } else { most });
        let least = Self { activations: fewest, kv: fewest_blocks * block_bytes, ..plan.clone() };
        if least.total() > plan.budget {
            return Err(EngineError::Memory(format!(
                "the run needs at least {} and devices.memory_mb allows {}\n{plan}\nhint: raise devices.memory_mb, or lower \
                 rollout.max_new_tokens, data.max_prompt_tokens or the model; optimizer.state = \"int8\" takes a quarter of \
                 the moments; [model.lora] needs no gradients, moments and reference of the base",
                mib(least.total()),
                mib(plan.budget),
            )));
        }
        // KV first, up to what one step can use and, where the learner gives nothing back, at most half of what is left;
        // activations get the rest.
        let left = plan.budget - plan.common();
        let left = match plan.at_once {
            true => (left - plan.gradients - plan.logits - plan.rollout) / 2,
            false => left - plan.rollout,
        };
        let wanted = match rollout.kv_memory_mb {
            0 => (step_blocks * block_bytes).min(left),
            mb => (mb << 20).min(step_blocks * block_bytes),
        };
        let held = |blocks: usize| 2 * spec.layers * held_bytes(blocks * layer_block);
        plan.kv_blocks = (wanted / block_bytes).max(fewest_blocks);
        plan.kv = if decoding == 0 { 0 } else { held(plan.kv_blocks) };
        plan.activations_rest = plan.rollouts() > plan.gradients;
        let left = plan.budget.saturating_sub(plan.common() + plan.gradients + plan.logits);
        let left = left.saturating_sub(if plan.at_once { plan.rollouts() } else { 0 });
        let group = data.group_rows.max(1);
        let enough = (FULL_SPEED_ROWS.div_ceil(group) * group).min(MAX_ROWS).min(step_rows).max(longest);
        let full_speed = FULL_SPEED_ROWS.min(step_rows).max(longest);
        plan.recompute = match recipe.train.recompute {
            Recompute::Off => 0,
            Recompute::On => most,
            Recompute::Auto => (0..most).find(|&layers| bytes(full_speed, layers) <= left).unwrap_or(most),
        };
        let (mut fits, mut over) = (longest, enough + 1);
        while fits + 1 < over {
            let rows = usize::midpoint(fits, over);
            *(if bytes(rows, plan.recompute) <= left { &mut fits } else { &mut over }) = rows;
        }
        plan.max_rows = fits;
        plan.activations = bytes(fits, plan.recompute);
        Ok(plan)
    }

    /// The plan with steps as long as they came: the largest micro-batch and the largest update, in rows. Completions that end early
    /// leave less to hold than the plan allows for.
    #[must_use]
    pub fn seen(&self, policy: &Policy, (micro, update): (usize, usize)) -> Self {
        let (weights, rows) = (policy.weights(), micro.min(self.max_rows));
        let embedding = |rows| waiting_bytes(&weights, rows);
        Self {
            activations: training_bytes(&weights, rows, self.recompute).min(self.activations),
            waiting: self.waiting - embedding(self.step_rows) + embedding(update.min(self.step_rows)),
            ..self.clone()
        }
    }

    /// A line on the measured peak beside the plan for steps of full length and for those `seen`, and a warning where it exceeded
    /// the budget.
    pub fn beside(&self, seen: &Self, peak: u64) -> String {
        let peak = usize::try_from(peak).unwrap_or(usize::MAX);
        let mut line = format!(
            "  memory   peak {}, planned {} for steps of full length and {} for the longest that came\n",
            mib(peak),
            mib(self.total()),
            mib(seen.total())
        );
        if peak > self.budget {
            let _ = writeln!(
                line,
                "warning: the peak is above devices.memory_mb = {}. hint: lower it by {}, so that the plan leaves room",
                self.budget >> 20,
                (peak - self.budget).div_ceil(1 << 20)
            );
        }
        line
    }

    /// Bytes in all: those that stay, and the larger of what rollouts and learner need in turn.
    pub fn total(&self) -> usize {
        let (rollouts, learner) = (self.rollouts(), self.learner());
        self.common() + if self.at_once { rollouts + learner } else { rollouts.max(learner) }
    }

    /// Bytes that are held at all times.
    fn common(&self) -> usize {
        self.weights + self.waiting + self.moments + self.reference + self.critic + self.program
    }

    /// Bytes that the learner alone needs.
    fn learner(&self) -> usize {
        self.gradients + self.logits + self.activations
    }

    /// Bytes that rollouts alone need.
    fn rollouts(&self) -> usize {
        self.kv + self.rollout
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
        let turn = |whose: &str| if self.at_once { String::new() } else { format!("{whose} turn") };
        let rows = [
            ("weights", self.weights, String::new()),
            ("optimizer moments", self.moments, String::new()),
            ("reference", self.reference, String::new()),
            ("critic", self.critic, String::new()),
            ("waiting rows", self.waiting, String::new()),
            ("gradients", self.gradients, turn("learner's")),
            ("logits", self.logits, turn("learner's")),
            ("activations", self.activations, activations),
            ("KV blocks", self.kv, format!("{} blocks of {BLOCK} positions", self.kv_blocks)),
            ("rollout pass", self.rollout, turn("rollouts'")),
            ("program", self.program, "tokenizer, rows and Lua states with it".into()),
            ("total", self.total(), format!("the larger turn; budget {}", mib(self.budget))),
        ];
        for (name, bytes, note) in rows {
            writeln!(f, "  {name:<18} {:>10}  {note}", mib(bytes))?;
        }
        Ok(())
    }
}
