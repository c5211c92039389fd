//! Rows of single stages: demonstrations and judged completions, read before a run starts.

use super::Run;
use super::tasks::Tasks;
use crate::config::{PairSource, Recipe, StageConfig, StageKind};
use crate::data::examples::{Demonstration, Judged, Reader, read_rows};
use crate::data::prompts::{Order, Renderer};
use crate::data::template::Moment;
use crate::data::tokenizer::Tokenizer;
use crate::error::{EngineError, Result};
use crate::model::source::ModelSource;

/// Rows of one stage.
pub(super) enum StageRows {
    /// The stage draws what it learns from.
    None,
    /// Demonstrations (`sft`); those of the tasks are as many as training prompts, empty for tasks that the stage leaves out.
    Demonstrations(Vec<Demonstration>),
    /// Stored pairs or labelled completions (`preference`).
    Judged(Vec<Judged>),
}

impl StageRows {
    /// Whether they are other rows than those of the tasks.
    pub(super) fn is_own(&self) -> bool {
        matches!(self, Self::Judged(_))
    }

    pub(super) fn len(&self) -> usize {
        match self {
            Self::None => 0,
            Self::Demonstrations(rows) => rows.iter().filter(|r| !r.completion.is_empty()).count(),
            Self::Judged(rows) => rows.len(),
        }
    }

    /// Tokens of the longest prompt and completion together.
    pub(super) fn longest(&self) -> usize {
        match self {
            Self::None => 0,
            Self::Demonstrations(rows) => {
                rows.iter().map(|d| d.prompt.len() + d.completion.len()).max().unwrap_or(0)
            }
            // the baseline of unpaired losses puts any completion behind any prompt
            Self::Judged(rows) => {
                let prompt = rows.iter().map(|r| r.prompt.tokens.len()).max();
                let completion = rows.iter().flat_map(|r| &r.completions).map(Vec::len).max();
                prompt.unwrap_or(0) + completion.unwrap_or(0)
            }
        }
    }
}

/// Reads the rows of every stage and gives stages of `epochs` their steps.
///
/// # Errors
/// A row that is no example of what its stage needs, by file and line; a stage without rows.
pub(super) fn load_stage_rows(
    recipe: &mut Recipe,
    source: Option<&ModelSource>,
    tokenizer: &Tokenizer,
    tasks: &Tasks,
) -> Result<Vec<StageRows>> {
    let data = &recipe.data;
    let chat = match (data.chat, source) {
        (true, Some(source)) => source.chat_template(tokenizer)?.map(|template| template.at(Moment::RUN)),
        _ => None,
    };
    let renderer = Renderer {
        template: data.prompt.as_deref(),
        system: data.system.as_deref(),
        chat: chat.as_ref(),
        tokenizer,
        places: None,
    };
    let reader = Reader { renderer };
    let limit = source.map_or(usize::MAX, |s| s.spec().max_positions);
    let (mut all, mut steps) = (Vec::new(), Vec::new());
    for (i, stage) in recipe.stages().iter().enumerate() {
        let limits = Limits {
            prompt: data.max_prompt_tokens,
            all: stage.max_tokens.unwrap_or(limit).min(limit),
            stage: i,
        };
        let needs_own =
            stage.kind == StageKind::Preference && stage.comparison().pairs == PairSource::Demonstrations;
        let rows = match (stage.kind, &stage.path) {
            (StageKind::Sft, Some(path)) => {
                let rows = read_rows(path, |i, row| reader.demonstration(i, row, None))?;
                StageRows::Demonstrations(limits.keep_demonstrations(rows)?)
            }
            (StageKind::Sft, None) => StageRows::Demonstrations(of_tasks(recipe, stage, &reader, tasks)?),
            (StageKind::Preference, Some(path)) => {
                let single = stage.comparison().unpaired.is_some();
                let rows = read_rows(path, |i, row| {
                    let judged = reader.judged(i, row)?;
                    if judged.completions.len() < 2 && !single {
                        return Err("one completion with a `label` is no pair. hint: preference.unpaired = \"kto\" learns from \
                                    such rows"
                            .to_string());
                    }
                    Ok(judged)
                })?;
                StageRows::Judged(limits.keep_judged(rows)?)
            }
            _ if needs_own => {
                if let Some(p) = tasks.train.iter().find(|p| !p.fields.contains_key("demonstration")) {
                    return Err(EngineError::Config(format!(
                        "stage.{i}: row {} has no `demonstration` that the policy's own completions could be held against",
                        p.id
                    )));
                }
                StageRows::None
            }
            _ => StageRows::None,
        };
        steps.push(steps_of(i, stage, recipe.stage.get(i), rows.len())?);
        all.push(rows);
    }
    for (stage, steps) in recipe.stage.iter_mut().zip(steps) {
        stage.steps = steps.or(stage.steps);
    }
    Ok(all)
}

impl Run {
    /// Rows of a step that takes `count` of the stage's own file, in its shuffled order.
    pub(super) fn own_rows(&self, count: usize) -> Vec<usize> {
        let mut order = Order::new(self.recipe.seed, self.stage_rows[self.state.stage].len());
        let from = self.state.step_in_stage * count as u64;
        (from..from + count as u64).map(|at| order.at(at)).collect()
    }
}

/// Steps of a stage that states epochs.
fn steps_of(
    i: usize,
    stage: &StageConfig,
    written: Option<&StageConfig>,
    rows: usize,
) -> Result<Option<u64>> {
    let Some(epochs) = stage.epochs else { return Ok(None) };
    let batch = stage.rows_per_step() as f64;
    let steps = ((epochs * rows as f64 / batch).ceil() as u64).max(1);
    match written.and_then(|w| w.steps) {
        Some(stated) if stated != steps => Err(EngineError::Config(format!(
            "stage.{i}: steps = {stated}, and epochs = {epochs} over {rows} rows of which a step takes {batch} are {steps} \
             steps. hint: remove one of the two"
        ))),
        _ => Ok(Some(steps)),
    }
}

/// Demonstrations of the training rows, in their order.
fn of_tasks(
    recipe: &Recipe,
    stage: &StageConfig,
    reader: &Reader,
    tasks: &Tasks,
) -> Result<Vec<Demonstration>> {
    let mut all = Vec::with_capacity(tasks.train.len());
    for ((task, config), weight) in tasks.list.iter().zip(recipe.tasks()).zip(recipe.task_weights(stage)) {
        let renderer = Renderer { system: config.system.as_deref(), ..reader.renderer };
        for prompt in &tasks.train[task.train.clone()] {
            if weight == 0.0 {
                all.push(Demonstration::default());
                continue;
            }
            let read =
                (Reader { renderer }).demonstration(prompt.index, &prompt.fields, Some(&prompt.tokens));
            let mut row = read.map_err(|message| match &task.places {
                Some(places) => places.error(prompt.index - task.first_row, &prompt.id, message),
                None => EngineError::Config(format!("row {}: {message}", prompt.id)),
            })?;
            row.id.clone_from(&prompt.id);
            all.push(row);
        }
    }
    Ok(all)
}

/// What is too long for a stage.
struct Limits {
    prompt: usize,
    all: usize,
    stage: usize,
}

impl Limits {
    fn keep<T>(&self, rows: Vec<T>, lengths: impl Fn(&T) -> (usize, usize)) -> Result<Vec<T>> {
        let count = rows.len();
        let fits = |row: &T| {
            let (prompt, longest) = lengths(row);
            prompt <= self.prompt && prompt + longest <= self.all
        };
        let kept: Vec<T> = rows.into_iter().filter(fits).collect();
        let limits = format!("data.max_prompt_tokens = {} or {} tokens in all", self.prompt, self.all);
        if kept.is_empty() {
            return Err(EngineError::Config(format!(
                "stage.{}: every one of {count} rows is longer than {limits}. hint: raise data.max_prompt_tokens or \
                 max_tokens",
                self.stage
            )));
        }
        if kept.len() < count {
            eprintln!(
                "warning: stage.{}: {} of {count} rows are longer than {limits} and were dropped",
                self.stage,
                count - kept.len()
            );
        }
        Ok(kept)
    }

    fn keep_demonstrations(&self, rows: Vec<Demonstration>) -> Result<Vec<Demonstration>> {
        // the prompt of a conversation is all before the first answer: only the sum counts
        Limits { prompt: usize::MAX, ..*self }.keep(rows, |d| (d.prompt.len(), d.completion.len()))
    }

    fn keep_judged(&self, rows: Vec<Judged>) -> Result<Vec<Judged>> {
        self.keep(rows, |r| (r.prompt.tokens.len(), r.completions.iter().map(Vec::len).max().unwrap_or(0)))
    }
}
