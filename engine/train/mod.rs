//! The training loop: the one place that sees data, rollout, reward, advantage, loss and learner together.
//!
//! A run is a list of stages. All that a stage's next step depends on is in `State` and the trainable weights
//! and moments; both are in every checkpoint, so a resumed run takes the very same steps.

mod amft;
mod answer;
mod batch;
pub mod comparison;
mod credit;
mod critic;
mod draw;
mod filter;
mod grpo;
mod matrix;
mod nonfinite;
mod pairs;
mod preference;
mod reference;
mod replay;
mod saved;
mod sft;
mod size;
mod stage_rows;
mod step_log;
mod tasks;
mod update;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use rft_kernels::Pool;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::config::{Recipe, StageConfig, StageKind};
use crate::data::arithmetic;
use crate::data::tokenizer::Tokenizer;
use crate::error::{EngineError, Result};
use crate::learner::critic::Critic;
use crate::learner::schedule::learning_rate;
use crate::learner::step::Learner;
use crate::loss::entropy::EntropyState;
use crate::memory::MemoryPlan;
use crate::model::decoder::PagedDecoder;
use crate::model::export::ModelFiles;
use crate::model::lora::Adapter;
use crate::model::peft::PeftAdapter;
use crate::model::policy::{Policy, new_model_spec};
use crate::model::source::ModelSource;
use crate::report::forgetting::TaskMatrix;
use crate::report::health::History;
use crate::report::metrics::{EvalResult, Summary, environment, rss_peak_bytes};
use crate::report::progress::{self, Example, Progress};
use crate::report::sinks::{self, RunFolder};
use crate::reward::{ScoredGroup, Scorer};
use crate::rollout::{RolloutEngine, SamplingConfig};
use amft::Balance;
use draw::DataState;
use reference::{Reference, ReferenceState, reference_bytes};
use stage_rows::{StageRows, load_stage_rows};
use tasks::{Tasks, load_tasks};

/// The whole of a step's randomness and position; what a checkpoint holds beside the buffers.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
struct State {
    /// BLAKE3 of the resolved recipe; a checkpoint belongs to one recipe.
    recipe: String,
    stage: usize,
    step_in_stage: u64,
    /// Steps of the stages that draw or compare: the numbers of metrics.jsonl.
    steps: u64,
    /// Steps of supervised stages: the numbers of sft.jsonl.
    #[serde(default)]
    sft_steps: u64,
    version: u64,
    updates: u64,
    /// Of the critic's head and its own trunk.
    #[serde(default)]
    critic_updates: (u64, u64),
    kl_coefficient: f64,
    entropy: EntropyState,
    /// The learned weight of an `amft` stage.
    balance: Option<Balance>,
    /// The reference policy, once it is taken.
    reference: Option<ReferenceState>,
    /// `ctx.state` of each verifier, as JSON text.
    #[serde(default)]
    reward_states: Vec<String>,
    /// Which prompts come next, and what is known of them.
    #[serde(default)]
    data: DataState,
    /// Held-out results by stage and task.
    #[serde(default)]
    matrix: TaskMatrix,
    eval_before: Option<EvalResult>,
    /// Of the steps of metrics.jsonl, and of those of sft.jsonl.
    health: History,
    #[serde(default)]
    sft_health: History,
    seconds: f64,
    rollout_tokens: u64,
    rollout_seconds: f64,
    learner_rows: u64,
    learner_seconds: f64,
}

/// A run made ready: everything loaded and checked, nothing written.
pub struct Run {
    /// Its `algorithm` is that of the stage in progress.
    recipe: Recipe,
    pool: Pool,
    tokenizer: Tokenizer,
    files: ModelFiles,
    policy: Policy,
    reference: Option<Reference>,
    /// Its logprobs of the stage's stored rows, by row, as far as they were needed.
    reference_kept: BTreeMap<usize, Vec<f32>>,
    critic: Option<Critic>,
    tasks: Tasks,
    /// By stage.
    stage_rows: Vec<StageRows>,
    scorer: Scorer,
    plan: MemoryPlan,
    state: State,
}

impl Run {
    /// Loads model, data and verifiers of a recipe and plans its memory.
    ///
    /// # Errors
    /// Whatever is missing, malformed or does not fit, by name.
    pub fn prepare(mut recipe: Recipe) -> Result<Self> {
        let pool = Pool::new(recipe.devices.thread_count());
        let scorer = Scorer::new(&recipe.reward, recipe.devices.thread_count())?;
        let source = recipe.model.path.as_ref().map(ModelSource::open).transpose()?;
        let tokenizer = match &source {
            Some(source) => source.tokenizer()?,
            None => arithmetic::tokenizer()?,
        };
        let tasks = load_tasks(&recipe, source.as_ref(), &tokenizer)?;
        let stage_rows = load_stage_rows(&mut recipe, source.as_ref(), &tokenizer, &tasks)?;
        let validation = &tasks.validation;
        let prompt_tokens = longest(
            tasks.train.iter().chain(&tasks.heldout).chain(&validation.prompts).map(|p| p.tokens.len()),
        );
        let shown = longest(tasks.demonstrations.iter().chain(&validation.demonstrations).map(Vec::len));
        let stored = longest(stage_rows.iter().map(StageRows::longest));
        let positions = stored.max(prompt_tokens + recipe.rollout.max_new_tokens.max(shown));
        let (mut policy, files) = match (&source, &recipe.model.new) {
            (Some(source), _) => {
                if positions > source.spec().max_positions {
                    return Err(EngineError::Config(format!(
                        "the longest prompt and completion need {positions} positions and the model has {}. hint: lower \
                         data.max_prompt_tokens, rollout.max_new_tokens or a stage's max_tokens",
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
        policy.kv_precision = recipe.rollout.kv_precision;
        policy.prepare(&pool, positions, recipe.model.precision);
        let mut largest = (0, 0);
        for stage in 0..recipe.stages().len() {
            policy.choose_trained(&recipe.model, recipe.seed, stage)?;
            largest = largest.max((policy.trainable().trainable_len(), stage));
        }
        policy.choose_trained(&recipe.model, recipe.seed, largest.1)?;
        let data = size::data_size(&recipe, &tasks, &stage_rows, prompt_tokens, positions);
        let plan = MemoryPlan::new(&recipe, &policy, reference_bytes(&recipe, &policy), data)?;
        policy.choose_trained(&recipe.model, recipe.seed, 0)?;
        let state = State {
            recipe: blake3::hash(recipe.to_toml().as_bytes()).to_hex().to_string(),
            kl_coefficient: recipe.algorithm.objective.kl.coefficient,
            entropy: EntropyState::new(recipe.algorithm.objective.entropy_coefficient),
            ..State::default()
        };
        Ok(Self {
            recipe,
            pool,
            tokenizer,
            files,
            policy,
            reference: None,
            reference_kept: BTreeMap::new(),
            critic: None,
            tasks,
            stage_rows,
            scorer,
            plan,
            state,
        })
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
        let mut learner = Learner::new(&self.policy, self.plan.max_rows).recompute(self.plan.recompute);
        let mut folder = if resume {
            let lock = sinks::lock(root)?;
            self.restore(&checkpoints, &mut learner)?;
            match self.position() {
                0 => eprintln!("no checkpoint yet: starting from the first step"),
                n => eprintln!("resuming after {n} steps"),
            }
            RunFolder::resume(root, self.state.steps, self.state.sft_steps, lock)?
        } else {
            RunFolder::create(root, &self.recipe.to_toml())?
        };
        let mut engine = RolloutEngine::new(&PagedDecoder::new(self.policy.weights()), self.plan.kv_blocks);
        let stages = self.recipe.stages();
        self.write_dropped(&folder)?;
        self.begin_matrix(&stages, &mut engine)?;
        let mut clock = Instant::now();
        while let Some(stage) = stages.get(self.state.stage) {
            if self.state.step_in_stage == 0 {
                self.policy.choose_trained(&self.recipe.model, self.recipe.seed, self.state.stage)?;
                learner.begin_stage();
                self.enter(stage);
                self.state.data.begin_stage();
                self.reference_kept.clear();
                self.state.health.begin_stage();
                self.state.sft_health.begin_stage();
                self.begin_reference(&checkpoints)?;
                self.state.balance = stage.amft.as_ref().map(Balance::new);
                if stage.draws() {
                    self.filter_pass(stage, &mut engine, &folder)?;
                }
                if stage.kind != StageKind::Sft {
                    self.begin_grpo(&mut engine)?;
                }
            }
            let total = stage.steps.unwrap_or(self.recipe.train.steps);
            let label = match stage.kind {
                StageKind::Sft => "sft",
                StageKind::Grpo => "grpo",
                StageKind::Amft => "amft",
                StageKind::Preference => "preference",
            };
            let mut progress = Progress::start(label, self.state.step_in_stage, total);
            while self.state.step_in_stage < total {
                let (before, version) = (self.state.clone(), self.policy.version);
                let step = match stage.kind {
                    StageKind::Sft => self.sft_step(stage, total, &mut learner, &mut folder, &mut progress),
                    StageKind::Grpo | StageKind::Amft => {
                        self.grpo_step(stage, total, &mut learner, &mut engine, &mut folder, &mut progress)
                    }
                    StageKind::Preference => {
                        let (learner, engine) = (&mut learner, &mut engine);
                        self.preference_step(stage, total, learner, engine, &mut folder, &mut progress)
                    }
                };
                if let Err(error) = step {
                    return Err(self.keep_last_good(error, before, version, &checkpoints, &learner));
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
            learner.rest(true);
            self.end_stage(&mut engine)?;
            self.state.stage += 1;
            self.state.step_in_stage = 0;
            self.state.seconds += clock.elapsed().as_secs_f64();
            clock = Instant::now();
            self.save(&checkpoints, &learner)?;
        }
        // what only training needs is given back before the model is written and measured
        let seen = self.plan.seen(&self.policy, learner.seen);
        drop(learner);
        self.finish(&mut engine, &folder, &seen, clock)
    }

    /// Makes the algorithm that of `stage`; where that changes it, KL and entropy coefficients start anew.
    fn enter(&mut self, stage: &StageConfig) {
        let Some(algorithm) = &stage.algorithm else { return };
        if self.recipe.algorithm != *algorithm {
            self.state.kl_coefficient = algorithm.objective.kl.coefficient;
            self.state.entropy = EntropyState::new(algorithm.objective.entropy_coefficient);
            self.recipe.algorithm = algorithm.clone();
        }
    }

    /// Whether there are held-out prompts and verifiers to measure with.
    pub(super) fn measures(&self) -> bool {
        !self.tasks.heldout.is_empty() && !self.recipe.reward.is_empty()
    }

    pub(super) fn sampling(&self, temperature: f32) -> SamplingConfig {
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

    pub(super) fn learning_rate(&self, stage: &StageConfig, update: u64, total: u64) -> f64 {
        let o = &self.recipe.optimizer;
        learning_rate(o.schedule, stage.lr.unwrap_or(o.lr), update, total, o.warmup_updates)
    }

    fn finish(
        mut self,
        engine: &mut RolloutEngine,
        folder: &RunFolder,
        seen: &MemoryPlan,
        clock: Instant,
    ) -> Result<Summary> {
        let root = folder.root();
        self.write_merged(&root.join("final"))?;
        let after = if self.measures() { Some(self.evaluate(engine)?) } else { None };
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
            task_matrix: (!self.state.matrix.tasks.is_empty()).then(|| self.state.matrix.to_json()),
            rollout_tokens_per_s: self.state.rollout_tokens as f64 / self.state.rollout_seconds.max(1e-9),
            learner_tokens_per_s: self.state.learner_rows as f64 / self.state.learner_seconds.max(1e-9),
            rss_peak_bytes: rss_peak_bytes(),
            memory_plan_bytes: self.plan.total() as u64,
            memory_plan_seen_bytes: seen.total() as u64,
            health: self.state.health.counts(),
            sft_health: self.state.sft_health.counts(),
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
        if !self.state.matrix.tasks.is_empty() {
            eprint!("\n{}", self.state.matrix.to_text());
        }
        if let Some(line) = self.state.health.none_learned() {
            eprintln!("\nwarning: {line}. hint: `health_reason` in metrics.jsonl says more of each step");
        }
        eprint!("\n{}", progress::places(root));
        eprint!("{}", self.plan.beside(seen, summary.rss_peak_bytes));
        Ok(summary)
    }
}

/// The policy of a recipe that names a model: the base, quantised or not, and its adapter, new or read.
fn load_policy(pool: &Pool, source: &ModelSource, recipe: &Recipe) -> Result<Policy> {
    let model = &recipe.model;
    let adapted = model.lora.is_some() || model.adapter.is_some();
    let mut policy = Policy::load_base(pool, source, !adapted, model.quantize)?;
    if let Some(config) = &model.lora {
        let adapter = Adapter::new(&policy.spec, config, recipe.seed)?;
        policy.adopt(pool, adapter);
    }
    if let Some(folder) = &model.adapter {
        PeftAdapter::open(folder)?.load_into(&mut policy, recipe.seed)?;
    }
    Ok(policy)
}

fn longest(lengths: impl Iterator<Item = usize>) -> usize {
    lengths.max().unwrap_or(0)
}

fn example(scored: &ScoredGroup) -> Example {
    Example {
        prompt: scored.group.prompt.text.clone(),
        completion: scored.group.completions[0].text.clone(),
        reward: scored.outcomes[0].reward,
        components: scored.outcomes[0].components.clone(),
    }
}

/// The first of `runs/NAME-1`, `runs/NAME-2`, … that does not exist.
pub fn free_run_dir(name: &str) -> PathBuf {
    (1..)
        .map(|n| PathBuf::from(format!("runs/{name}-{n}")))
        .find(|p| !p.exists())
        .expect("numbers do not run out")
}
