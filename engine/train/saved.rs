//! What a run leaves on disk and goes on from: checkpoints, the reference policy, exported models.

use std::path::{Path, PathBuf};

use super::{Run, State};
use crate::config::Recipe;
use crate::error::{EngineError, Result};
use crate::learner::checkpoint;
use crate::learner::optimizer::Moments;
use crate::learner::step::Learner;
use crate::model::export::write_hf_folder;
use crate::model::params::Arena;
use crate::model::peft::write_adapter;
use crate::model::source::ModelSource;

impl Run {
    /// Writes the model of the run's last checkpoint: a Hugging Face folder, or for an adapter run without `merge` a
    /// PEFT adapter.
    ///
    /// # Errors
    /// No good checkpoint; files that cannot be written.
    pub fn export(mut self, root: &Path, out: &Path, merge: bool) -> Result<()> {
        let checkpoints = root.join("checkpoints");
        let mut learner = Learner::new(&self.policy, 1);
        self.restore(&checkpoints, &mut learner)?;
        if self.position() == 0 {
            return Err(EngineError::Config(format!(
                "{} holds no good checkpoint to export",
                checkpoints.display()
            )));
        }
        match (&self.policy.adapter, merge) {
            (Some(adapter), false) => {
                let base = self.recipe.model.path.clone().unwrap_or_default();
                write_adapter(out, adapter, &base.display().to_string())
            }
            _ => self.write_merged(out),
        }
    }

    /// Writes the model, adapters merged: into the source's own weights where the run holds quantised ones.
    pub(super) fn write_merged(&self, out: &Path) -> Result<()> {
        let (Some(_), Some(path)) = (self.recipe.model.quantize, &self.recipe.model.path) else {
            return write_hf_folder(out, &self.files, self.policy.merged_tensors(), "float32");
        };
        let source = ModelSource::open(path)?;
        let mut failed = Ok(());
        write_hf_folder(
            out,
            &self.files,
            self.policy.merged_from(&self.pool, &source, &mut failed),
            "float32",
        )?;
        if failed.is_err() {
            let weights = out.join("model.safetensors");
            std::fs::remove_file(&weights).map_err(EngineError::io(weights))?;
        }
        failed
    }

    pub(super) fn save(&mut self, checkpoints: &Path, learner: &Learner) -> Result<()> {
        self.save_keeping(checkpoints, learner, self.recipe.train.keep_checkpoints).map(|_| ())
    }

    /// Saves a checkpoint and deletes all but the newest `keep`.
    pub(super) fn save_keeping(
        &mut self,
        checkpoints: &Path,
        learner: &Learner,
        keep: usize,
    ) -> Result<PathBuf> {
        self.state.version = self.policy.version.0;
        self.state.updates = learner.adam.updates;
        self.state.critic_updates = self.critic_updates();
        let mut buffers = vec![("weights", self.kept(self.policy.trainable()).into())];
        buffers.extend(learner.adam.moments.buffers());
        buffers.extend(self.reference_buffer());
        buffers.extend(self.critic_buffers());
        checkpoint::save(checkpoints, self.position(), &self.state, &buffers, keep)
    }

    /// What a checkpoint keeps of the weights: those that train, or all of them where stages train different ones.
    pub(super) fn kept<'a>(&self, arena: &'a Arena) -> Vec<&'a [f32]> {
        if self.recipe.model.half { vec![arena.stored_values()] } else { arena.trainable_parts() }
    }

    /// Steps of all stages so far: the checkpoint's number.
    pub(super) fn position(&self) -> u64 {
        let stages = self.recipe.stages();
        let done = stages[..self.state.stage].iter().map(|s| s.steps.unwrap_or_default()).sum::<u64>();
        done + self.state.step_in_stage
    }

    pub(super) fn restore(&mut self, checkpoints: &Path, learner: &mut Learner) -> Result<()> {
        let (found, skipped) = checkpoint::latest::<State>(checkpoints)?;
        skipped.iter().for_each(|line| eprintln!("warning: {line}"));
        let Some((_, state, mut buffers)) = found else {
            return Ok(());
        };
        if state.recipe != self.state.recipe {
            return Err(EngineError::Config(
                "the checkpoint belongs to another recipe. hint: resume with the run folder's own recipe.toml, unchanged".into(),
            ));
        }
        // between stages the moments are those of the stage before
        let stage = if state.step_in_stage == 0 { state.stage.saturating_sub(1) } else { state.stage };
        self.policy.choose_trained(&self.recipe.model, self.recipe.seed, stage)?;
        learner.begin_stage();
        let kept = total(&self.kept(self.policy.trainable()));
        put_back(&self.recipe, self.policy.trainable_mut(), &buffers.take("weights", kept)?);
        self.policy.trainable_mut().refresh(&self.pool);
        self.policy.measure_adapter(&self.pool);
        learner.adam.moments =
            Moments::restore(&mut buffers, self.policy.trainable(), &self.recipe.optimizer)?;
        learner.adam.updates = state.updates;
        self.policy.version.0 = state.version;
        // of a stage that goes on the algorithm is known; a new one is entered when it begins
        if let Some(stage) = self.recipe.stages().get(stage) {
            self.enter(stage);
        }
        self.restore_reference(checkpoints, &state, &mut buffers)?;
        self.restore_critic(&mut buffers, state.critic_updates)?;
        if !state.reward_states.is_empty() {
            self.scorer.set_states(&state.reward_states);
        }
        self.state = state;
        Ok(())
    }
}

/// The inverse of `Run::kept`.
pub(super) fn put_back(recipe: &Recipe, arena: &mut Arena, weights: &[f32]) {
    if recipe.model.half {
        arena.stored_values_mut().copy_from_slice(weights);
    } else {
        arena.set_trainable_values(weights);
    }
}

/// Numbers of all parts.
pub(super) fn total(parts: &[&[f32]]) -> usize {
    parts.iter().map(|part| part.len()).sum()
}
