//! The reference policy of a run: when it is taken, how it moves, what checkpoints keep of it.
//!
//! With an adapter only the adapter is copied. `initial` and `base` never change once taken and are written once, as
//! `checkpoints/reference`; the other kinds are a buffer of every checkpoint, so a resumed run has the very same one.

use std::path::Path;

use rft_kernels::{Pool, Warp};
use serde::{Deserialize, Serialize};

use super::saved::{put_back, total};
use super::{Run, State};
use crate::config::{Recipe, ReferenceConfig};
use crate::error::Result;
use crate::learner::batch::GroupTokens;
use crate::learner::checkpoint::{self, Buffers, Values};
use crate::learner::step::Learner;
use crate::model::lora::Adapter;
use crate::model::params::Arena;
use crate::model::policy::{Policy, Weights};

/// Folder below `checkpoints/` of a reference that never changes.
const FOLDER: &str = "reference";
/// Buffer of a checkpoint with a reference that does.
const BUFFER: &str = "reference";

/// What reference logprobs are computed with.
pub(super) enum Reference {
    /// The base weights, the adapter switched off.
    AdapterOff,
    /// A copy of the adapter over the same base weights.
    Adapter(Box<Adapter>),
    /// A copy of the weights.
    Weights(Box<Arena>),
}

/// What a checkpoint says about the reference.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct ReferenceState {
    /// A copy, not the adapter switched off.
    copied: bool,
    /// Steps since it was taken or moved.
    age: u64,
}

impl Reference {
    /// A copy of what trains.
    fn of(policy: &Policy) -> Self {
        match &policy.adapter {
            Some(adapter) => Self::Adapter(Box::new(adapter.clone())),
            None => Self::Weights(Box::new(policy.base.clone())),
        }
    }

    fn weights<'a>(&'a self, policy: &'a Policy) -> Weights<'a> {
        match self {
            Self::AdapterOff => policy.base_weights(),
            Self::Adapter(adapter) => policy.weights_with(adapter),
            Self::Weights(base) => policy.weights_over(base),
        }
    }

    fn arena(&self) -> Option<&Arena> {
        match self {
            Self::AdapterOff => None,
            Self::Adapter(adapter) => Some(&adapter.arena),
            Self::Weights(base) => Some(base),
        }
    }

    fn arena_mut(&mut self) -> Option<&mut Arena> {
        match self {
            Self::AdapterOff => None,
            Self::Adapter(adapter) => Some(&mut adapter.arena),
            Self::Weights(base) => Some(base),
        }
    }

    /// `reference += (1 - decay) (policy - reference)`, number by number.
    fn average(&mut self, pool: &Pool, policy: &Policy, decay: f64) {
        let Some(arena) = self.arena_mut() else { return };
        let step = (1.0 - decay) as f32;
        for (kept, now) in arena.stored_values_mut().iter_mut().zip(policy.trainable().stored_values()) {
            *kept += step * (now - *kept);
        }
        self.refresh(pool, policy);
    }

    /// Brings what depends on the weights up to date.
    fn refresh(&mut self, pool: &Pool, policy: &Policy) {
        if let Some(arena) = self.arena_mut() {
            arena.refresh(pool);
        }
        if let Self::Adapter(adapter) = self {
            policy.measure(pool, adapter);
        }
    }
}

/// Bytes that the reference of a recipe takes at most.
pub(super) fn reference_bytes(recipe: &Recipe, policy: &Policy) -> usize {
    if !recipe.needs_reference() {
        return 0;
    }
    let stages = recipe.stages();
    let first = stages.first().is_some_and(|s| recipe.stage_needs_reference(s));
    match (&policy.adapter, recipe.algorithm.reference) {
        (None, _) => policy.base.bytes(),
        (Some(_), ReferenceConfig::Base) => 0,
        (Some(_), ReferenceConfig::Initial) if first && recipe.model.adapter.is_none() => 0,
        (Some(adapter), _) => adapter.arena.bytes(),
    }
}

impl Run {
    /// At the start of a stage: takes the reference policy where its kind says so.
    pub(super) fn begin_reference(&mut self, checkpoints: &Path) -> Result<()> {
        let stage = &self.recipe.stages()[self.state.stage];
        let config = self.recipe.algorithm.reference;
        let due = match config {
            ReferenceConfig::Base => self.recipe.needs_reference() && self.reference.is_none(),
            ReferenceConfig::Stage => self.recipe.stage_needs_reference(stage),
            _ => self.recipe.stage_needs_reference(stage) && self.reference.is_none(),
        };
        if !due {
            return Ok(());
        }
        // a new adapter adds exactly zero
        let off = match config {
            ReferenceConfig::Base => self.policy.adapter.is_some(),
            ReferenceConfig::Initial => self.recipe.model.lora.is_some() && self.policy.version.0 == 0,
            _ => false,
        };
        let reference = if off { Reference::AdapterOff } else { Reference::of(&self.policy) };
        if let (Some(arena), true) = (reference.arena(), config.is_fixed()) {
            checkpoint::write(checkpoints, FOLDER, &(), &[("weights", self.kept(arena).into())])?;
        }
        self.state.reference = Some(ReferenceState { copied: !off, age: 0 });
        self.reference = Some(reference);
        Ok(())
    }

    /// After a step that used the reference: takes it again or moves it where its kind says so.
    pub(super) fn advance_reference(&mut self) {
        let (Some(reference), Some(state)) = (&mut self.reference, &mut self.state.reference) else { return };
        let (ReferenceConfig::Refreshed { every } | ReferenceConfig::Ema { every, .. }) =
            self.recipe.algorithm.reference
        else {
            return;
        };
        state.age += 1;
        if state.age < every {
            return;
        }
        state.age = 0;
        let decay = match self.recipe.algorithm.reference {
            ReferenceConfig::Ema { decay, .. } => decay,
            _ => 0.0,
        };
        if decay == 0.0 {
            // the sum would round; the copy is written over, as a second one would double it for a moment
            if let Some(arena) = reference.arena_mut() {
                arena.stored_values_mut().copy_from_slice(self.policy.trainable().stored_values());
                reference.refresh(&self.pool, &self.policy);
            } else {
                *reference = Reference::of(&self.policy);
            }
        } else {
            reference.average(&self.pool, &self.policy, decay);
        }
    }

    /// Logprobs of every completion token under the reference policy, in order; `None` before it is taken.
    pub(super) fn reference_logprobs(
        &self,
        learner: &mut Learner,
        groups: &[GroupTokens],
        warp: &Warp,
    ) -> Option<Vec<f32>> {
        let weights = self.reference.as_ref()?.weights(&self.policy);
        Some(learner.score(&self.pool, &weights, groups, warp).logprobs)
    }

    /// The buffer of a checkpoint: a reference that changes during a run.
    pub(super) fn reference_buffer(&self) -> Option<(&'static str, Values<'_>)> {
        let arena = self.reference.as_ref()?.arena()?;
        (!self.recipe.algorithm.reference.is_fixed()).then(|| (BUFFER, self.kept(arena).into()))
    }

    /// Takes the reference of a checkpoint back.
    pub(super) fn restore_reference(
        &mut self,
        checkpoints: &Path,
        state: &State,
        buffers: &mut Buffers,
    ) -> Result<()> {
        self.reference = match state.reference {
            None => None,
            Some(ReferenceState { copied: false, .. }) => Some(Reference::AdapterOff),
            Some(_) => {
                let mut reference = Reference::of(&self.policy);
                let arena = reference.arena_mut().expect("a copy has an arena");
                let len = total(&self.kept(arena));
                let weights = if self.recipe.algorithm.reference.is_fixed() {
                    let (_, mut fixed) = checkpoint::read::<()>(checkpoints, FOLDER)?;
                    fixed.take("weights", len)?
                } else {
                    buffers.take(BUFFER, len)?
                };
                put_back(&self.recipe, arena, &weights);
                reference.refresh(&self.pool, &self.policy);
                Some(reference)
            }
        };
        Ok(())
    }
}
