//! What a recipe asks for and a run cannot give, each with its remedy.

use super::{PairSource, Recipe, StageKind};
use crate::advantage::Combine;
use crate::error::{EngineError, Result};
use crate::loss::kl::Placement;

impl Recipe {
    /// What an objective asks for and a step cannot give.
    fn validate_algorithm(&self) -> Result<()> {
        let fail = |message: &str| Err(EngineError::Config(message.into()));
        let (advantage, objective) = (&self.algorithm.advantage, &self.algorithm.objective);
        if advantage.combine == Combine::NormalizeThenSum {
            if self.reward.windows(2).any(|r| r[0].weight != r[1].weight) {
                return fail(
                    "algorithm.advantage.combine = \"normalize_then_sum\" gives every reward the same say. \
                     hint: set the same weight for all rewards",
                );
            }
            if objective.kl.placement == Placement::Reward && objective.kl.coefficient != 0.0 {
                return fail(
                    "algorithm.advantage.combine = \"normalize_then_sum\" has no single reward to take a KL penalty \
                     from. hint: set algorithm.objective.kl.placement = \"loss\"",
                );
            }
        }
        if objective.sampler_correction.is_some() && self.rollout.replay.is_none() {
            return fail(
                "algorithm.objective.sampler_correction weighs rollouts of another policy; here a step trains on its own, \
                 whose logprobs are the learner's bit for bit. hint: remove it, or replay past groups: [rollout.replay]",
            );
        }
        if !(objective.top_entropy > 0.0 && objective.top_entropy <= 1.0) {
            return Err(EngineError::Config(format!(
                "algorithm.objective.top_entropy must be in (0, 1], got {}",
                objective.top_entropy
            )));
        }
        Ok(())
    }

    /// What each stage asks for and lacks, or has and cannot use.
    fn validate_stages(&self) -> Result<()> {
        for (i, stage) in self.stage.iter().enumerate() {
            let at = format!("stage.{i}");
            let fail = |message: String| Err(EngineError::Config(format!("{at}{message}")));
            if let Some(lr) = stage.lr.filter(|lr| !(*lr > 0.0 && lr.is_finite())) {
                return fail(format!(".lr must be positive, got {lr}"));
            }
            if stage.batch == Some(0) {
                return fail(".batch must be at least 1".into());
            }
            if let Some(epochs) = stage.epochs.filter(|e| !(*e > 0.0 && e.is_finite())) {
                return fail(format!(".epochs must be positive, got {epochs}"));
            }
            let preference = stage.kind == StageKind::Preference;
            let draws = stage.draws();
            if stage.max_tokens.is_some() && stage.path.is_none() && !draws {
                return fail(
                    ".max_tokens holds for the rows of `path`. hint: data.max_prompt_tokens for those of [data]".into(),
                );
            }
            let misplaced = [
                ("batch", draws && stage.kind != StageKind::Amft && stage.batch.is_some()),
                ("epochs", draws && stage.epochs.is_some()),
                ("path", draws && stage.path.is_some()),
                ("max_tokens", draws && stage.max_tokens.is_some()),
                ("preference", !preference && stage.preference.is_some()),
            ];
            if let Some((key, _)) = misplaced.iter().find(|(_, wrong)| *wrong) {
                return fail(match *key {
                    "preference" => {
                        ".preference: only a stage of kind \"preference\" compares completions".into()
                    }
                    key => format!(
                        ".{key}: this stage draws its completions. hint: rollout.prompts_per_step and group_size say how many, \
                         [data] for which prompts"
                    ),
                });
            }
            if preference {
                let comparison = stage.comparison();
                comparison.validate(&at)?;
                match comparison.pairs {
                    PairSource::Stored if stage.path.is_none() => {
                        return fail(
                            ".path: stored pairs need a JSONL file of rows with `prompt`, `chosen` and `rejected`. hint: set \
                             it, or preference.pairs = \"groups\" to make pairs of scored rollouts"
                                .into(),
                        );
                    }
                    PairSource::Groups if self.reward.is_empty() => {
                        return fail(
                            ".preference.pairs = \"groups\" compares rewards. hint: add a [[reward]]".into(),
                        );
                    }
                    PairSource::Groups if self.rollout.group_size < 2 => {
                        return fail(
                            ".preference.pairs = \"groups\" needs rollout.group_size of at least 2".into(),
                        );
                    }
                    _ => {}
                }
                let alone = if draws { self.rollout.prompts_per_step } else { stage.rows_per_step() } < 2;
                if comparison.unpaired.is_some() && alone {
                    return fail(
                        ".preference.unpaired: the baseline of a completion is the answer to another prompt, so a step needs two. \
                         hint: raise batch (or rollout.prompts_per_step)"
                            .into(),
                    );
                }
            }
        }
        Ok(())
    }

    pub(super) fn validate(&self) -> Result<()> {
        let fail = |message: String| Err(EngineError::Config(message));
        match (&self.model.path, &self.model.new) {
            (None, None) => {
                return fail(
                    "model: set `path` (a model folder or GGUF file) or a `[model.new]` shape".into(),
                );
            }
            (Some(_), Some(_)) => return fail("model: `path` and `[model.new]` exclude each other".into()),
            _ => {}
        }
        self.validate_tasks()?;
        let grpo = self.stages().iter().any(|s| matches!(s.kind, StageKind::Grpo | StageKind::Amft));
        if grpo && self.reward.is_empty() {
            return fail("reward: a grpo stage needs at least one [[reward]]".into());
        }
        self.validate_algorithm()?;
        self.validate_credit()?;
        self.algorithm.reference.validate()?;
        self.validate_kl()?;
        self.validate_amft()?;
        self.validate_stages()?;
        for (i, algorithm) in
            self.stage.iter().enumerate().filter_map(|(i, s)| Some((i, s.algorithm.clone()?)))
        {
            if algorithm.reference != self.algorithm.reference {
                return fail(format!(
                    "stage.{i}.algorithm.reference: a run has one reference policy. hint: set algorithm.reference, and \
                     kind = \"stage\" to take it anew in each stage"
                ));
            }
            let alone = Self { algorithm, stage: Vec::new(), ..self.clone() };
            alone.validate_algorithm().and(alone.validate_kl()).map_err(|e| match e {
                EngineError::Config(message) => EngineError::Config(format!("stage.{i}.{message}")),
                other => other,
            })?;
        }
        self.devices.check().map_err(|message| EngineError::Config(format!("devices.{message}")))?;
        if self.name.is_empty() || self.name.contains(['/', '\\']) {
            return fail(format!(
                "name must be a plain word: runs are written to runs/NAME-1; got {:?}",
                self.name
            ));
        }
        let r = &self.rollout;
        for (key, value) in [
            ("rollout.prompts_per_step", r.prompts_per_step),
            ("rollout.max_new_tokens", r.max_new_tokens),
            ("eval.samples", self.eval.samples),
        ] {
            if value == 0 {
                return fail(format!("{key} must be at least 1"));
            }
        }
        if r.group_size == 0 || (r.group_size < 2 && grpo && self.compares_in_group()) {
            return fail(
                "rollout.group_size must be at least 2: an advantage compares the completions of a group. hint: one is \
                 enough with [algorithm.critic], or with a baseline of \"greedy\", \"batch_mean\" or \"zero\" and \
                 scale = \"none\""
                    .into(),
            );
        }
        if !(r.temperature > 0.0 && r.temperature.is_finite()) {
            return fail(format!(
                "rollout.temperature must be positive, got {} (eval.temperature may be 0)",
                r.temperature
            ));
        }
        if !(r.top_p > 0.0 && r.top_p <= 1.0) {
            return fail(format!("rollout.top_p must be in (0, 1], got {}", r.top_p));
        }
        if !(0.0..1.0).contains(&r.min_p) {
            return fail(format!("rollout.min_p must be in [0, 1), got {}", r.min_p));
        }
        for (i, r) in self.reward.iter().enumerate() {
            for (key, value) in [("weight", r.weight), ("error_score", r.error_score)] {
                if !value.is_finite() {
                    return fail(format!("reward.{i}.{key} must be a finite number, got {value}"));
                }
            }
        }
        if !(self.optimizer.lr > 0.0 && self.optimizer.lr.is_finite()) {
            return fail(format!("optimizer.lr must be positive, got {}", self.optimizer.lr));
        }
        let model = &self.model;
        let adapted = model.lora.is_some() || model.adapter.is_some();
        if model.lora.is_some() && model.adapter.is_some() {
            return fail("model: `adapter` brings its own settings, so it excludes `[model.lora]`".into());
        }
        if model.quantize.is_some() && !adapted {
            return fail(
                "model.quantize: only frozen weights can be held in 8 or 4 bits, and without an adapter these train. \
                 hint: add `[model.lora]`"
                    .into(),
            );
        }
        if model.half && adapted {
            return fail("model: `half` freezes halves of the model's own layers, and with an adapter those are frozen \
                         already. hint: drop one of the two".into());
        }
        if adapted && model.path.is_none() {
            return fail("model: an adapter needs a model to adapt. hint: set `path`".into());
        }
        if self.train.inner_epochs == 0 {
            return fail("train.inner_epochs must be at least 1".into());
        }
        if let Some(lora) = &self.model.lora {
            let ranks = || lora.rank_pattern.values().chain([&lora.rank]);
            if ranks().any(|rank| !(1..=4096).contains(rank)) || lora.targets.is_empty() {
                return fail("model.lora: `rank` must be from 1 to 4096 and `targets` not empty".into());
            }
            if !(0.0..1.0).contains(&lora.dropout) {
                return fail(format!("model.lora.dropout must be in [0, 1), got {}", lora.dropout));
            }
        }
        Ok(())
    }
}
