//! The training loop: the one place that sees data, rollout, reward, advantage, loss and learner together.
//!
//! A run is a list of stages. All that a stage's next step depends on is in `State` and the trainable weights
//! and moments; both are in every checkpoint, so a resumed run takes the very same steps.

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use rayon::prelude::*;
use rft_kernels::{Pool, Warp};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::advantage::{Advantages, Combine, Rewards, grouped, groups_of, matrix_advantages};
use crate::config::{Recipe, StageConfig, StageKind};
use crate::data::arithmetic::{self, Split};
use crate::data::prompts::{Order, Renderer, Row, read_jsonl};
use crate::data::template::Moment;
use crate::data::tokenizer::Tokenizer;
use crate::error::{EngineError, Result};
use crate::eval::Evaluation;
use crate::learner::batch::{GroupTokens, Piece};
use crate::learner::checkpoint::{self, Buffers};
use crate::learner::schedule::learning_rate;
use crate::learner::step::{Learner, ScoreGrads, UpdateStats};
use crate::loss::correction::entropy_threshold;
use crate::loss::entropy::EntropyState;
use crate::loss::kl::Placement;
use crate::loss::{BatchTotals, LossInputs, LossSums, policy_loss};
use crate::memory::MemoryPlan;
use crate::model::backprop::Scores;
use crate::model::decoder::PagedDecoder;
use crate::model::export::{ModelFiles, write_hf_folder, write_safetensors};
use crate::model::lora::{ALL_LINEAR, Adapter};
use crate::model::params::Arena;
use crate::model::peft::PeftAdapter;
use crate::model::policy::{Policy, Weights, new_model_spec};
use crate::model::source::ModelSource;
use crate::report::metrics::{EvalResult, StepMetrics, Summary, environment, rss_peak_bytes};
use crate::report::progress::{self, Example, Progress};
use crate::report::sinks::RunFolder;
use crate::reward::{ScoredGroup, Scorer, component_means, error_counts};
use crate::rollout::{Request, RolloutEngine, RolloutKey, RolloutStats, SamplingConfig};
use crate::types::{FinishReason, Prompt, TokenId};

/// `RolloutKey::step` of evaluations, apart from all training steps.
const EVAL_STEP: u64 = 1 << 63;

/// The whole of a step's randomness and position; what a checkpoint holds beside the buffers.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
struct State {
    /// BLAKE3 of the resolved recipe; a checkpoint belongs to one recipe.
    recipe: String,
    stage: usize,
    step_in_stage: u64,
    /// GRPO steps over all stages.
    steps: u64,
    version: u64,
    updates: u64,
    kl_coefficient: f64,
    entropy: EntropyState,
    /// `ctx.state` of each verifier, as JSON text.
    #[serde(default)]
    reward_states: Vec<String>,
    eval_before: Option<EvalResult>,
    seconds: f64,
    rollout_tokens: u64,
    rollout_seconds: f64,
    learner_rows: u64,
    learner_seconds: f64,
}

/// Prompts of a run and their demonstrations.
struct Tasks {
    train: Vec<Arc<Prompt>>,
    heldout: Vec<Arc<Prompt>>,
    /// Token ids of each training row's `demonstration` with the end token; empty where it has none.
    demonstrations: Vec<Vec<TokenId>>,
    dropped: usize,
}

/// A run made ready: everything loaded and checked, nothing written.
pub struct Run {
    recipe: Recipe,
    pool: Pool,
    tokenizer: Tokenizer,
    files: ModelFiles,
    policy: Policy,
    reference: Option<Arena>,
    tasks: Tasks,
    scorer: Scorer,
    plan: MemoryPlan,
    state: State,
}

impl Run {
    /// Loads model, data and verifiers of a recipe and plans its memory.
    ///
    /// # Errors
    /// Whatever is missing, malformed or does not fit, by name.
    pub fn prepare(recipe: Recipe) -> Result<Self> {
        let pool = Pool::new(recipe.devices.thread_count());
        let scorer = Scorer::new(&recipe.reward, recipe.devices.thread_count())?;
        let source = recipe.model.path.as_ref().map(ModelSource::open).transpose()?;
        let tokenizer = match &source {
            Some(source) => source.tokenizer()?,
            None => arithmetic::tokenizer()?,
        };
        let tasks = load_tasks(&recipe, source.as_ref(), &tokenizer)?;
        let prompt_tokens = longest(tasks.train.iter().chain(&tasks.heldout).map(|p| p.tokens.len()));
        let positions = prompt_tokens
            + recipe.rollout.max_new_tokens.max(longest(tasks.demonstrations.iter().map(Vec::len)));
        let (mut policy, files) = match (&source, &recipe.model.new) {
            (Some(source), _) => {
                if positions > source.spec().max_positions {
                    return Err(EngineError::Config(format!(
                        "the longest prompt and completion need {positions} positions and the model has {}. hint: lower \
                         data.max_prompt_tokens or rollout.max_new_tokens",
                        source.spec().max_positions
                    )));
                }
                (load_policy(&pool, source, &recipe)?, source.files()?)
            }
            (None, Some(shape)) => {
                let eos = *tokenizer
                    .eos()
                    .first()
                    .ok_or_else(|| EngineError::Model("the tokenizer names no end token".into()))?;
                let spec = new_model_spec(shape, tokenizer.vocab_size(), eos, positions.next_power_of_two())?;
                let files = ModelFiles::new(spec.to_config_json("float32"), &tokenizer, None)?;
                (Policy::init(spec, recipe.seed), files)
            }
            (None, None) => unreachable!("a validated recipe has a model"),
        };
        policy.prepare(&pool, positions, recipe.model.precision);
        let needs_copy = recipe.algorithm.objective.needs_reference() && policy.adapter.is_none();
        let mut largest = (0, 0);
        for stage in 0..recipe.stages().len() {
            policy.choose_trained(&recipe.model, recipe.seed, stage)?;
            largest = largest.max((policy.trainable().trainable_len(), stage));
        }
        policy.choose_trained(&recipe.model, recipe.seed, largest.1)?;
        let plan = MemoryPlan::new(&recipe, &policy, needs_copy, prompt_tokens)?;
        policy.choose_trained(&recipe.model, recipe.seed, 0)?;
        let state = State {
            recipe: blake3::hash(recipe.to_toml().as_bytes()).to_hex().to_string(),
            kl_coefficient: recipe.algorithm.objective.kl.coefficient,
            entropy: EntropyState::new(recipe.algorithm.objective.entropy_coefficient),
            ..State::default()
        };
        Ok(Self { recipe, pool, tokenizer, files, policy, reference: None, tasks, scorer, plan, state })
    }

    /// The memory plan.
    pub fn plan(&self) -> &MemoryPlan {
        &self.plan
    }

    /// One line on what will run.
    pub fn describe(&self) -> String {
        let million = |n: usize| n as f64 / 1e6;
        format!(
            "{:.2} M parameters ({:.2} M trained, {:?}), {} training prompts ({} dropped as too long), {} held out, {} threads",
            million(self.policy.base.count()),
            million(self.policy.trainable_count()),
            self.recipe.model.precision,
            self.tasks.train.len(),
            self.tasks.dropped,
            self.tasks.heldout.len(),
            self.pool.threads()
        )
    }

    /// Runs all stages and writes the run folder. With `resume`, goes on from its last good checkpoint.
    ///
    /// # Errors
    /// [`EngineError::Interrupted`] when `stop` is set: the step in progress is finished and saved first.
    pub fn train(mut self, root: &Path, resume: bool, stop: &AtomicBool) -> Result<Summary> {
        let checkpoints = root.join("checkpoints");
        let mut learner = Learner::new(&self.policy, self.plan.max_rows);
        let mut folder = if resume {
            self.restore(&checkpoints, &mut learner)?;
            match self.position() {
                0 => eprintln!("no checkpoint yet: starting from the first step"),
                n => eprintln!("resuming after {n} steps"),
            }
            RunFolder::resume(root, self.state.steps)?
        } else {
            RunFolder::create(root, &self.recipe.to_toml())?
        };
        let mut engine = RolloutEngine::new(&PagedDecoder::new(self.policy.weights()), self.plan.kv_blocks);
        let stages = self.recipe.stages();
        let mut clock = Instant::now();
        while let Some(stage) = stages.get(self.state.stage) {
            if self.state.step_in_stage == 0 {
                self.policy.choose_trained(&self.recipe.model, self.recipe.seed, self.state.stage)?;
                learner.begin_stage(&self.policy);
                if stage.kind == StageKind::Grpo {
                    self.begin_grpo(&checkpoints, &mut engine)?;
                }
            }
            let total = stage.steps.unwrap_or(self.recipe.train.steps);
            let label = match stage.kind {
                StageKind::Sft => "sft",
                StageKind::Grpo => "grpo",
            };
            let mut progress = Progress::start(label, self.state.step_in_stage, total);
            while self.state.step_in_stage < total {
                match stage.kind {
                    StageKind::Sft => self.sft_step(stage, total, &mut learner, &mut progress)?,
                    StageKind::Grpo => {
                        self.grpo_step(stage, total, &mut learner, &mut engine, &mut folder, &mut progress)?;
                    }
                }
                self.state.step_in_stage += 1;
                let every = self.recipe.train.checkpoint_every;
                let stopping = stop.load(Ordering::SeqCst);
                let due = every > 0 && self.state.step_in_stage.is_multiple_of(every);
                if stopping || (due && self.state.step_in_stage < total) {
                    self.state.seconds += clock.elapsed().as_secs_f64();
                    clock = Instant::now();
                    self.save(&checkpoints, &learner)?;
                }
                if stopping {
                    return Err(EngineError::Interrupted);
                }
            }
            progress.finish();
            self.state.stage += 1;
            self.state.step_in_stage = 0;
            self.state.seconds += clock.elapsed().as_secs_f64();
            clock = Instant::now();
            self.save(&checkpoints, &learner)?;
        }
        self.finish(&mut engine, &folder, clock)
    }

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
    fn write_merged(&self, out: &Path) -> Result<()> {
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

    /// Before the first step of a GRPO stage: fixes the reference policy and measures the held-out reward.
    fn begin_grpo(&mut self, checkpoints: &Path, engine: &mut RolloutEngine) -> Result<()> {
        if self.recipe.algorithm.objective.needs_reference() && self.policy.adapter.is_none() {
            self.reference = Some(self.policy.base.clone());
            checkpoint::write(checkpoints, "reference", &(), &[("weights", &self.kept(&self.policy.base))])?;
        }
        if self.state.eval_before.is_none() && !self.tasks.heldout.is_empty() {
            let (before, _) = self.evaluate(engine)?;
            eprintln!("held-out reward before reinforcement: {:.3}", before.reward);
            self.state.eval_before = Some(before);
        }
        Ok(())
    }

    fn sft_step(
        &mut self,
        stage: &StageConfig,
        total: u64,
        learner: &mut Learner,
        progress: &mut Progress,
    ) -> Result<()> {
        let start = Instant::now();
        let batch = stage.batch.unwrap_or(32) as u64;
        let mut order = Order::new(self.recipe.seed, self.tasks.train.len());
        let rows: Vec<usize> = (0..batch).map(|i| order.at(self.state.step_in_stage * batch + i)).collect();
        let groups: Vec<GroupTokens> = rows
            .iter()
            .map(|&r| GroupTokens {
                prompt: &self.tasks.train[r].tokens,
                completions: vec![self.tasks.demonstrations[r].as_slice()],
            })
            .collect();
        let tokens: usize = groups.iter().map(|g| g.completions[0].len()).sum();
        if tokens == 0 {
            return Err(EngineError::Config(
                "stage sft: no row has a `demonstration`. hint: add the field, or remove the stage".into(),
            ));
        }
        let warp = Warp { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0 };
        let lr = self.learning_rate(stage, self.state.step_in_stage, total);
        let mut loss = 0.0;
        let nll = |_: &[Piece], scores: &Scores| {
            loss -= scores.logprobs.iter().map(|&l| f64::from(l)).sum::<f64>() / tokens as f64;
            let n = scores.logprobs.len();
            Ok(ScoreGrads { logprobs: vec![-1.0 / tokens as f32; n], entropies: vec![0.0; n] })
        };
        let optimizer = &self.recipe.optimizer;
        let stats = learner.update(&self.pool, &mut self.policy, &groups, &warp, optimizer, lr, nll)?;
        progress.sft_step(
            self.state.step_in_stage + 1,
            loss,
            stats.rows as f64 / start.elapsed().as_secs_f64(),
        );
        Ok(())
    }

    fn grpo_step(
        &mut self,
        stage: &StageConfig,
        total: u64,
        learner: &mut Learner,
        engine: &mut RolloutEngine,
        folder: &mut RunFolder,
        progress: &mut Progress,
    ) -> Result<()> {
        let step = self.state.steps + 1;
        let sampling = self.sampling(self.recipe.rollout.temperature);

        let (groups, rollout, reward_s) = self.roll_out(engine, &sampling, step, total)?;

        let start = Instant::now();
        let mut batch = StepBatch::new(&groups, &sampling, self.recipe.algorithm.mask_truncated);
        if self.recipe.algorithm.objective.top_entropy < 1.0 {
            let entropies =
                learner.score(&self.pool, &self.policy.weights(), &batch.groups, &sampling.warp()).entropies;
            batch.keep_uncertain(&entropies, self.recipe.algorithm.objective.top_entropy);
        }
        let reference = self.reference_logprobs(learner, &batch, &sampling.warp());
        let advantages = self.advantages(&groups, &batch, reference.as_deref());
        let mut first = LossSums::default();
        let mut all = LossSums::default();
        let mut stats = UpdateStats::default();
        let mut rows = 0;
        let mut lr = 0.0;
        let epochs = self.recipe.train.inner_epochs;
        for epoch in 0..epochs {
            lr = self.learning_rate(stage, self.state.step_in_stage * epochs + epoch, total * epochs);
            let mut sums = LossSums::default();
            let objective = &self.recipe.algorithm.objective;
            let kl_coefficient = self.state.kl_coefficient;
            let entropy_coefficient = objective.entropy_control.coefficient(&self.state.entropy);
            let loss = |pieces: &[Piece], scores: &Scores| {
                let out = batch.loss(
                    pieces,
                    scores,
                    &advantages.values,
                    reference.as_deref(),
                    (kl_coefficient, entropy_coefficient),
                    objective,
                );
                sums.add(&out.sums);
                Ok(ScoreGrads { logprobs: out.d_new, entropies: out.d_entropy })
            };
            let (pool, warp) = (&self.pool, sampling.warp());
            let optimizer = &self.recipe.optimizer;
            stats = learner.update(pool, &mut self.policy, &batch.groups, &warp, optimizer, lr, loss)?;
            rows += stats.rows;
            all.add(&sums);
            if epoch == 0 {
                first = sums;
            }
        }
        let learner_s = start.elapsed().as_secs_f64();

        let tokens = first.tokens.max(1) as f64;
        let kl = first.kl / tokens;
        let kl_coefficient = self.state.kl_coefficient;
        self.state.kl_coefficient =
            self.recipe.algorithm.objective.kl.next_coefficient(kl_coefficient, kl, first.tokens);
        self.state.entropy =
            self.recipe.algorithm.objective.entropy_control.next(&self.state.entropy, first.entropy / tokens);
        self.state.steps = step;
        self.state.version = self.policy.version.0;
        self.state.updates = learner.adam.updates;
        self.state.reward_states = self.scorer.states();
        self.state.rollout_tokens += rollout.decoded_tokens as u64;
        self.state.rollout_seconds += rollout.seconds;
        self.state.learner_rows += rows as u64;
        self.state.learner_seconds += learner_s;

        let every = self.recipe.eval.every;
        let eval_reward = match every > 0 && step.is_multiple_of(every) && !self.tasks.heldout.is_empty() {
            true => Some(self.evaluate(engine)?.0.reward),
            false => None,
        };
        let completions = groups.iter().flat_map(|g| &g.group.completions);
        let count = completions.clone().count().max(1) as f64;
        let metrics = StepMetrics {
            step,
            reward_mean: advantages.reward_mean,
            reward_std: advantages.reward_std,
            components: component_means(&groups),
            kl,
            entropy: first.entropy / tokens,
            ratio_max_dev: first.ratio_max_dev,
            clip_fraction: all.clipped as f64 / all.tokens.max(1) as f64,
            zero_variance_groups: advantages.zero_variance_groups,
            reward_errors: groups.iter().flat_map(|g| &g.outcomes).map(|o| o.errors.len()).sum(),
            completion_tokens_mean: completions.clone().map(|c| c.tokens.len()).sum::<usize>() as f64 / count,
            truncated_fraction: completions.filter(|c| c.finish == FinishReason::Length).count() as f64
                / count,
            grad_norm: stats.grad_norm,
            lr,
            loss: first.loss,
            rollout_s: rollout.seconds,
            reward_s,
            learner_s,
            rollout_tokens_per_s: rollout.decoded_tokens as f64 / rollout.seconds.max(1e-9),
            learner_tokens_per_s: rows as f64 / learner_s.max(1e-9),
            kv_blocks_peak: rollout.peak_blocks,
            rss_peak_bytes: rss_peak_bytes(),
            kl_coefficient,
            eval_reward,
        };
        let logged = match self.recipe.train.log_groups {
            0 => groups.len(),
            n => n.min(groups.len()),
        };
        let samples = sample_rows(step, &groups[..logged], &advantages.values);
        folder.samples(&samples)?;
        folder.metrics(step, &metrics.to_json())?;
        progress.grpo_step(&metrics);
        warn_about(&metrics, &groups, progress);
        Ok(())
    }

    /// Draws and scores the groups of a step; verifiers run while later groups still decode.
    fn roll_out(
        &self,
        engine: &mut RolloutEngine,
        sampling: &SamplingConfig,
        step: u64,
        total: u64,
    ) -> Result<(Vec<ScoredGroup>, RolloutStats, f64)> {
        let prompts = self.recipe.rollout.prompts_per_step as u64;
        let mut order = Order::new(self.recipe.seed, self.tasks.train.len());
        let requests: Vec<Request> = (0..prompts)
            .map(|i| Request {
                prompt: Arc::clone(&self.tasks.train[order.at((step - 1) * prompts + i)]),
                samples: self.recipe.rollout.group_size,
            })
            .collect();
        let key = RolloutKey { seed: self.recipe.seed, step, version: self.policy.version };
        let mut scoring = self.scorer.start(step, total, self.recipe.seed);
        let mut model = PagedDecoder::new(self.policy.weights());
        let stats = engine.generate(
            &mut model,
            &self.pool,
            &self.tokenizer,
            &requests,
            sampling,
            key,
            &mut |i, group| {
                scoring.submit(i, group);
                Ok(())
            },
        )?;
        let waiting = Instant::now();
        let groups = scoring.finish()?;
        self.scorer.end_step(&groups, step, total, self.recipe.seed)?;
        Ok((groups, stats, waiting.elapsed().as_secs_f64()))
    }

    fn reference_weights(&self) -> Option<Weights<'_>> {
        if !self.recipe.algorithm.objective.needs_reference() {
            return None;
        }
        match &self.reference {
            Some(base) => Some(self.policy.weights_over(base)),
            None => Some(self.policy.base_weights()),
        }
    }

    fn reference_logprobs(&self, learner: &mut Learner, batch: &StepBatch, warp: &Warp) -> Option<Vec<f32>> {
        let weights = self.reference_weights()?;
        Some(learner.score(&self.pool, &weights, &batch.groups, warp).logprobs)
    }

    /// Advantages of all completions in order; a KL penalty placed in the reward is taken off first.
    fn advantages(&self, groups: &[ScoredGroup], batch: &StepBatch, reference: Option<&[f32]>) -> Advantages {
        let raw: Vec<Option<f64>> = groups.iter().flat_map(|g| &g.outcomes).map(|o| o.reward).collect();
        let (config, kl) = (&self.recipe.algorithm.advantage, &self.recipe.algorithm.objective.kl);
        let ranges = groups_of(raw.len(), self.recipe.rollout.group_size);
        if config.combine == Combine::NormalizeThenSum {
            // a valid recipe has one weight for all rewards here
            let rows = component_rows(groups);
            let weight = self.recipe.reward.first().map_or(1.0, |r| r.weight);
            return matrix_advantages(
                &rows,
                &vec![weight; rows.first().map_or(0, Vec::len)],
                &ranges,
                config,
            );
        }
        let lengths: Vec<usize> = batch.offsets.windows(2).map(|row| row[1] - row[0]).collect();
        let of = |values: &[Option<f64>]| {
            grouped(&Rewards { values, lengths: &lengths, greedy: &[] }, &ranges, config)
        };
        let plain = of(&raw);
        let (Some(reference), Placement::Reward) = (reference, kl.placement) else { return plain };
        let penalised: Vec<Option<f64>> = raw
            .iter()
            .zip(batch.offsets.windows(2))
            .map(|(reward, row)| {
                let penalty = kl.reward_penalty(
                    self.state.kl_coefficient,
                    &batch.old[row[0]..row[1]],
                    &reference[row[0]..row[1]],
                );
                reward.map(|r| r - penalty)
            })
            .collect();
        Advantages { values: of(&penalised).values, ..plain }
    }

    fn evaluate(&self, engine: &mut RolloutEngine) -> Result<(EvalResult, Vec<ScoredGroup>)> {
        let sampling = self.sampling(self.recipe.eval.temperature);
        let evaluation = Evaluation {
            prompts: &self.tasks.heldout,
            samples: self.recipe.eval.samples,
            sampling: &sampling,
            scorer: &self.scorer,
            full_reward: self.recipe.reward.iter().map(|r| r.weight).sum(),
            progress: (self.state.steps, self.recipe.train.steps),
        };
        let key = RolloutKey { seed: self.recipe.seed, step: EVAL_STEP, version: self.policy.version };
        let mut model = PagedDecoder::new(self.policy.weights());
        let (result, groups, _) = evaluation.run(engine, &mut model, &self.pool, &self.tokenizer, key)?;
        Ok((result, groups))
    }

    fn sampling(&self, temperature: f32) -> SamplingConfig {
        let r = &self.recipe.rollout;
        SamplingConfig {
            max_new_tokens: r.max_new_tokens,
            temperature,
            top_k: r.top_k,
            top_p: r.top_p,
            min_p: r.min_p,
            stop: r.stop.clone(),
            stop_tokens: self.tokenizer.eos().to_vec(),
        }
    }

    fn learning_rate(&self, stage: &StageConfig, update: u64, total: u64) -> f64 {
        let o = &self.recipe.optimizer;
        learning_rate(o.schedule, stage.lr.unwrap_or(o.lr), update, total, o.warmup_updates)
    }

    fn save(&mut self, checkpoints: &Path, learner: &Learner) -> Result<()> {
        self.state.version = self.policy.version.0;
        self.state.updates = learner.adam.updates;
        let weights = self.kept(self.policy.trainable());
        let buffers = [("weights", &weights[..]), ("adam_m", &learner.adam.m), ("adam_v", &learner.adam.v)];
        checkpoint::save(
            checkpoints,
            self.position(),
            &self.state,
            &buffers,
            self.recipe.train.keep_checkpoints,
        )?;
        Ok(())
    }

    /// What a checkpoint keeps of the weights: those that train, or all of them where stages train different ones.
    fn kept<'a>(&self, arena: &'a Arena) -> Cow<'a, [f32]> {
        if self.recipe.model.half { Cow::Borrowed(arena.stored_values()) } else { arena.trainable_values() }
    }

    /// Steps of all stages so far: the checkpoint's number.
    fn position(&self) -> u64 {
        let stages = self.recipe.stages();
        let done = stages[..self.state.stage].iter().map(|s| s.steps.unwrap_or_default()).sum::<u64>();
        done + self.state.step_in_stage
    }

    fn restore(&mut self, checkpoints: &Path, learner: &mut Learner) -> Result<()> {
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
        learner.begin_stage(&self.policy);
        let mut take = |name: &str, len: usize| take_buffer(&mut buffers, checkpoints, name, len);
        let len = self.policy.trainable().trainable_len();
        let kept = self.kept(self.policy.trainable()).len();
        put_back(&self.recipe, self.policy.trainable_mut(), &take("weights", kept)?);
        self.policy.trainable_mut().refresh(&self.pool);
        (learner.adam.m, learner.adam.v) = (take("adam_m", len)?, take("adam_v", len)?);
        learner.adam.updates = state.updates;
        self.policy.version.0 = state.version;
        let in_grpo = self.recipe.stages().get(state.stage).is_some_and(|s| s.kind == StageKind::Grpo);
        let needs_copy = self.recipe.algorithm.objective.needs_reference() && self.policy.adapter.is_none();
        if in_grpo && state.step_in_stage > 0 && needs_copy {
            let (_, mut buffers) = checkpoint::read::<()>(checkpoints, "reference")?;
            let mut reference = self.policy.base.clone();
            put_back(&self.recipe, &mut reference, &take_buffer(&mut buffers, checkpoints, "weights", kept)?);
            reference.refresh(&self.pool);
            self.reference = Some(reference);
        }
        if !state.reward_states.is_empty() {
            self.scorer.set_states(&state.reward_states);
        }
        self.state = state;
        Ok(())
    }

    fn finish(mut self, engine: &mut RolloutEngine, folder: &RunFolder, clock: Instant) -> Result<Summary> {
        let root = folder.root();
        self.write_merged(&root.join("final"))?;
        let after = if self.tasks.heldout.is_empty() { None } else { Some(self.evaluate(engine)?) };
        self.state.seconds += clock.elapsed().as_secs_f64();
        let components = |result: Option<&EvalResult>| -> Map<String, Value> {
            result.iter().flat_map(|r| &r.components).map(|(n, v)| (n.clone(), json!(v))).collect()
        };
        let before = self.state.eval_before.as_ref();
        let summary = Summary {
            steps: self.state.steps,
            seconds: self.state.seconds,
            eval_before: before.map(|e| e.reward),
            eval_after: after.as_ref().map(|(e, _)| e.reward),
            eval_before_components: components(before),
            eval_after_components: components(after.as_ref().map(|(e, _)| e)),
            rollout_tokens_per_s: self.state.rollout_tokens as f64 / self.state.rollout_seconds.max(1e-9),
            learner_tokens_per_s: self.state.learner_rows as f64 / self.state.learner_seconds.max(1e-9),
            rss_peak_bytes: rss_peak_bytes(),
            final_model: "final".into(),
            version: env!("CARGO_PKG_VERSION").into(),
            environment: environment(self.pool.threads(), rft_kernels::isa().name()),
        };
        folder.json("summary.json", &summary)?;
        crate::report::html::write(root)?;
        if let (Some(before), Some((after, groups))) = (before, &after) {
            eprint!("\n{}", progress::before_after(before, after));
            let shown: Vec<Example> = groups.iter().take(3).map(example).collect();
            eprint!("\n{}", progress::examples(&shown));
        }
        eprint!("\n{}", progress::places(root));
        Ok(summary)
    }
}

/// The policy of a recipe that names a model: the base, quantised or not, and its adapter, new or read.
fn load_policy(pool: &Pool, source: &ModelSource, recipe: &Recipe) -> Result<Policy> {
    let model = &recipe.model;
    let adapted = model.lora.is_some() || model.adapter.is_some();
    let mut policy = Policy::load_base(pool, source, !adapted, model.quantize)?;
    if let Some(config) = &model.lora {
        policy.adapter = Some(Adapter::new(&policy.spec, config, recipe.seed)?);
    }
    if let Some(folder) = &model.adapter {
        PeftAdapter::open(folder)?.load_into(&mut policy, recipe.seed)?;
    }
    Ok(policy)
}

/// `q_proj` of `base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight`.
fn module(tensor: &str) -> Option<&str> {
    tensor.split_once(".lora_")?.0.rsplit('.').next()
}

/// Writes `adapter_config.json` and `adapter_model.safetensors` as peft does.
fn write_adapter(out: &Path, adapter: &Adapter, base: &str) -> Result<()> {
    std::fs::create_dir_all(out).map_err(EngineError::io(out))?;
    // other loaders than peft's want the modules by name
    let targets: BTreeSet<&str> = match adapter.config.targets.iter().any(|t| t == ALL_LINEAR) {
        true => adapter
            .arena
            .slots()
            .iter()
            .flat_map(|slot| &slot.parts)
            .filter_map(|p| module(&p.name))
            .collect(),
        false => adapter.config.targets.iter().map(String::as_str).collect(),
    };
    let config = json!({
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": adapter.config.rank,
        "lora_alpha": adapter.config.alpha,
        "lora_dropout": adapter.config.dropout,
        "rank_pattern": adapter.config.rank_pattern,
        "alpha_pattern": adapter.config.alpha_pattern,
        "use_rslora": adapter.config.rslora,
        "target_modules": targets,
        "bias": "none",
        "inference_mode": true,
    });
    let path = out.join("adapter_config.json");
    std::fs::write(&path, format!("{config:#}\n")).map_err(EngineError::io(path))?;
    let arena = &adapter.arena;
    let tensors = (0..arena.slots().len()).flat_map(|id| arena.tensors_of(id, arena.values(id)));
    write_safetensors(&out.join("adapter_model.safetensors"), tensors, "float32")
}

/// The inverse of `Run::kept`.
fn put_back(recipe: &Recipe, arena: &mut Arena, weights: &[f32]) {
    if recipe.model.half {
        arena.stored_values_mut().copy_from_slice(weights);
    } else {
        arena.set_trainable_values(weights);
    }
}

fn take_buffer(buffers: &mut Buffers, root: &Path, name: &str, len: usize) -> Result<Vec<f32>> {
    let found = buffers.remove(name).unwrap_or_default();
    match found.len() == len {
        true => Ok(found),
        false => {
            Err(EngineError::malformed(root, name, format!("{len} numbers expected, {} found", found.len())))
        }
    }
}

/// The completions of a step as the learner sees them, flat in group order.
struct StepBatch<'a> {
    groups: Vec<GroupTokens<'a>>,
    /// First token of each completion and the end of the last.
    offsets: Vec<usize>,
    /// First completion of each group and the end of the last.
    first_completion: Vec<usize>,
    old: Vec<f32>,
    mask: Vec<bool>,
    totals: BatchTotals,
    entropy_threshold: Option<f32>,
}

impl<'a> StepBatch<'a> {
    fn new(scored: &'a [ScoredGroup], sampling: &SamplingConfig, mask_truncated: bool) -> Self {
        let groups = scored.iter().map(|s| GroupTokens::from(&s.group)).collect();
        let (mut offsets, mut first_completion) = (vec![0], vec![0]);
        let (mut old, mut mask) = (Vec::new(), Vec::new());
        for scored in scored {
            for (completion, outcome) in scored.group.completions.iter().zip(&scored.outcomes) {
                // an abstained completion has no advantage and must not dilute the step's mean either
                let masked =
                    (mask_truncated && completion.finish == FinishReason::Length) || outcome.reward.is_none();
                old.extend_from_slice(&completion.logprobs);
                mask.resize(old.len(), !masked);
                offsets.push(old.len());
            }
            first_completion.push(offsets.len() - 1);
        }
        let totals = BatchTotals {
            tokens: mask.iter().filter(|m| **m).count(),
            entropy_tokens: mask.iter().filter(|m| **m).count(),
            completions: offsets.len() - 1,
            max_new_tokens: sampling.max_new_tokens,
        };
        Self { groups, offsets, first_completion, old, mask, totals, entropy_threshold: None }
    }

    /// Leaves the policy term to the `share` of tokens with the greatest entropy at the start of the step.
    fn keep_uncertain(&mut self, entropies: &[f32], share: f64) {
        self.entropy_threshold = entropy_threshold(entropies, &self.mask, share);
        let kept = |(e, m): &(&f32, &bool)| **m && self.entropy_threshold.is_none_or(|h| **e >= h);
        self.totals.entropy_tokens = entropies.iter().zip(&self.mask).filter(kept).count();
    }

    fn loss(
        &self,
        pieces: &[Piece],
        scores: &Scores,
        advantages: &[f32],
        reference: Option<&[f32]>,
        (kl_coefficient, entropy_coefficient): (f64, f64),
        objective: &crate::loss::Objective,
    ) -> crate::loss::LossOutputs {
        let rows = pieces.iter().flat_map(|p| {
            let first = self.first_completion[p.group];
            p.completions.clone().map(move |c| first + c)
        });
        // a micro-batch holds consecutive completions of the step
        let rows: Vec<usize> = rows.collect();
        let (from, to) = (self.offsets[rows[0]], self.offsets[rows[rows.len() - 1] + 1]);
        let offsets: Vec<usize> =
            (rows[0]..=rows[rows.len() - 1] + 1).map(|r| self.offsets[r] - from).collect();
        let by_token: Vec<f32> =
            rows.iter().flat_map(|&r| vec![advantages[r]; self.offsets[r + 1] - self.offsets[r]]).collect();
        policy_loss(
            &LossInputs {
                offsets: &offsets,
                new: &scores.logprobs,
                old: &self.old[from..to],
                reference: reference.map(|r| &r[from..to]),
                entropy: &scores.entropies,
                advantages: &by_token,
                mask: &self.mask[from..to],
                totals: self.totals,
                kl_coefficient,
                entropy_coefficient,
                entropy_threshold: self.entropy_threshold,
                ..LossInputs::default()
            },
            objective,
        )
    }
}

/// Components of every completion in one order of names; what a completion lacks counts as abstained.
fn component_rows(groups: &[ScoredGroup]) -> Vec<Vec<Option<f64>>> {
    let outcomes = || groups.iter().flat_map(|g| &g.outcomes);
    let names: BTreeSet<&str> = outcomes().flat_map(|o| &o.components).map(|(n, _)| n.as_str()).collect();
    let value = |components: &[(String, Option<f64>)], name: &str| {
        components.iter().find(|(n, _)| n == name).and_then(|(_, v)| *v)
    };
    outcomes().map(|o| names.iter().map(|n| value(&o.components, n)).collect()).collect()
}

fn longest(lengths: impl Iterator<Item = usize>) -> usize {
    lengths.max().unwrap_or(0)
}

fn load_tasks(recipe: &Recipe, source: Option<&ModelSource>, tokenizer: &Tokenizer) -> Result<Tasks> {
    let data = &recipe.data;
    let (train, heldout) = match (&data.path, &data.arithmetic) {
        (Some(path), _) => {
            split_rows(read_jsonl(path)?, data.eval_path.as_deref(), data.heldout, recipe.seed)?
        }
        (None, Some(task)) => (
            arithmetic::generate(task, recipe.seed, Split::Train, task.problems),
            arithmetic::generate(task, recipe.seed, Split::Heldout, data.heldout),
        ),
        (None, None) => unreachable!("a validated recipe has data"),
    };
    for reward in &recipe.reward {
        for warning in rft_rewards::boxes::check_rows(&reward.script, &reward.options, &train) {
            let rows: Vec<String> = warning.rows.iter().map(|row| (row + 1).to_string()).collect();
            eprintln!(
                "warning: reward {}: {} (training rows {})",
                reward.script,
                warning.message,
                rows.join(", ")
            );
        }
    }
    let chat = match (data.chat, source) {
        (true, Some(source)) => source.chat_template(tokenizer)?.map(|template| template.at(Moment::RUN)),
        _ => None,
    };
    let renderer = Renderer {
        template: data.prompt.as_deref(),
        system: data.system.as_deref(),
        chat: chat.as_ref(),
        tokenizer,
    };
    let mut dropped = 0;
    let mut render = |rows: &[Row]| -> Result<Vec<Arc<Prompt>>> {
        let mut prompts = Vec::with_capacity(rows.len());
        let rendered: Vec<Result<Prompt>> =
            rows.par_iter().enumerate().map(|(i, row)| renderer.prompt(i, row)).collect();
        for prompt in rendered {
            let prompt = prompt?;
            match prompt.tokens.len() <= data.max_prompt_tokens {
                true => prompts.push(Arc::new(prompt)),
                false => dropped += 1,
            }
        }
        Ok(prompts)
    };
    let (train, heldout) = (render(&train)?, render(&heldout)?);
    if train.is_empty() {
        return Err(EngineError::Config(format!(
            "no training prompt is left: {dropped} are longer than data.max_prompt_tokens = {}. hint: raise it",
            data.max_prompt_tokens
        )));
    }
    if dropped > 0 {
        eprintln!(
            "warning: {dropped} prompts are longer than data.max_prompt_tokens = {} and were dropped",
            data.max_prompt_tokens
        );
    }
    let demonstrations = train
        .iter()
        .map(|prompt| match prompt.fields.get("demonstration") {
            Some(Value::String(text)) => {
                let mut tokens = tokenizer.encode(text)?;
                tokens.extend(tokenizer.eos().first());
                Ok(tokens)
            }
            _ => Ok(Vec::new()),
        })
        .collect::<Result<_>>()?;
    Ok(Tasks { train, heldout, demonstrations, dropped })
}

fn split_rows(
    rows: Vec<Row>,
    eval: Option<&Path>,
    heldout: usize,
    seed: u64,
) -> Result<(Vec<Row>, Vec<Row>)> {
    if let Some(path) = eval {
        let mut held = read_jsonl(path)?;
        held.truncate(heldout);
        return Ok((rows, held));
    }
    if heldout >= rows.len() {
        return Err(EngineError::Config(format!(
            "data.heldout = {heldout} leaves nothing of {} rows to train on. hint: lower it",
            rows.len()
        )));
    }
    let mut order = Order::new(seed, rows.len());
    let mut held: Vec<usize> = (0..heldout as u64).map(|p| order.at(p)).collect();
    held.sort_unstable();
    let (mut train, mut test) = (Vec::new(), Vec::new());
    for (i, row) in rows.into_iter().enumerate() {
        if held.binary_search(&i).is_ok() { test.push(row) } else { train.push(row) }
    }
    Ok((train, test))
}

fn sample_rows(step: u64, groups: &[ScoredGroup], advantages: &[f32]) -> Vec<Value> {
    let samples = groups.iter().flat_map(|g| {
        let prompt = &g.group.prompt;
        g.group.completions.iter().zip(&g.outcomes).enumerate().map(move |(i, pair)| (prompt, i, pair))
    });
    samples
        .zip(advantages)
        .map(|((prompt, sample, (completion, outcome)), advantage)| {
            let mut row = (*prompt.fields).clone();
            let components: Map<String, Value> =
                outcome.components.iter().map(|(n, v)| (n.clone(), json!(v))).collect();
            let own = json!({
                "step": step,
                "id": prompt.id,
                "sample": sample,
                "prompt": prompt.text,
                "completion": completion.text,
                "reward": outcome.reward,
                "components": components,
                "errors": outcome.errors,
                "advantage": advantage,
                "finish_reason": completion.finish,
                "tokens": completion.tokens,
                "token_ends": completion.token_ends,
                "logprobs": completion.logprobs,
            });
            if let Value::Object(own) = own {
                row.extend(own);
            }
            Value::Object(row)
        })
        .collect()
}

fn example(scored: &ScoredGroup) -> Example {
    Example {
        prompt: scored.group.prompt.text.clone(),
        completion: scored.group.completions[0].text.clone(),
        reward: scored.outcomes[0].reward,
        components: scored.outcomes[0].components.clone(),
    }
}

/// Says in words when a step cannot have taught anything, or when verifiers failed.
fn warn_about(metrics: &StepMetrics, groups: &[ScoredGroup], progress: &mut Progress) {
    let say = |line: String| progress.say(&format!("warning: step {}: {line}", metrics.step));
    if metrics.zero_variance_groups == groups.len() {
        say(format!(
            "every group's rewards are equal (mean {:.3}): nothing was learned. hint: easier or harder prompts, a larger \
             group, or a reward with more levels",
            metrics.reward_mean
        ));
    }
    for e in error_counts(groups) {
        say(format!("{} calls of {} failed ({}), the first: {}", e.count, e.script, e.kind, e.first));
    }
}

/// The first of `runs/NAME-1`, `runs/NAME-2`, … that does not exist.
pub fn free_run_dir(name: &str) -> PathBuf {
    (1..)
        .map(|n| PathBuf::from(format!("runs/{name}-{n}")))
        .find(|p| !p.exists())
        .expect("numbers do not run out")
}
