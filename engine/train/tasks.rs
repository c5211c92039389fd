//! Rows to prompts: what a run trains on and what it holds out, task by task.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use rayon::prelude::*;
use serde_json::Value;

use super::amft::Validating;
use crate::config::{Recipe, TaskConfig};
use crate::data::arithmetic::{self, Split};
use crate::data::feed::Feed;
use crate::data::prompts::{Order, Places, Renderer, Row, read_placed};
use crate::data::template::{ChatTemplate, Moment};
use crate::data::tokenizer::Tokenizer;
use crate::error::{EngineError, Result};
use crate::model::source::ModelSource;
use crate::types::{Prompt, TokenId};

/// Prompts of a run and their demonstrations, the tasks one after another.
pub(super) struct Tasks {
    pub(super) train: Vec<Arc<Prompt>>,
    pub(super) heldout: Vec<Arc<Prompt>>,
    /// Token ids of each training row's `demonstration` with the end token; empty where it has none.
    pub(super) demonstrations: Vec<Vec<TokenId>>,
    /// What meta-gradients are measured on; no stage trains on it.
    pub(super) validation: Validating,
    pub(super) dropped: usize,
    pub(super) list: Vec<Task>,
    /// Which row comes next.
    pub(super) feed: Feed,
}

/// One task among them.
pub(super) struct Task {
    /// Empty for the task of a recipe that names none.
    pub(super) name: String,
    pub(super) train: Range<usize>,
    pub(super) heldout: Range<usize>,
    /// Sum of the weights of its rewards.
    pub(super) full_reward: f64,
    /// `Prompt::index` of its first row.
    pub(super) first_row: usize,
    /// Where its training rows stand; none for generated ones.
    pub(super) places: Option<Places>,
}

/// Rows, and where they stand; none for generated ones.
type PlacedRows = (Vec<Row>, Option<Places>);

pub(super) fn load_tasks(
    recipe: &Recipe,
    source: Option<&ModelSource>,
    tokenizer: &Tokenizer,
) -> Result<Tasks> {
    let chat = match (recipe.data.chat, source) {
        (true, Some(source)) => source.chat_template(tokenizer)?.map(|template| template.at(Moment::RUN)),
        _ => None,
    };
    let (mut train, mut heldout, mut list) = (Vec::new(), Vec::new(), Vec::new());
    let (mut rows_before, mut dropped) = (0, 0);
    let tasks = recipe.tasks();
    let mut validation = Vec::new();
    for task in &tasks {
        let (rows, held) = rows_of(task, recipe.seed)?;
        warn_of_rows(recipe, &task.name, &rows.0);
        let mut take = |rows: &PlacedRows, prompts: &mut Vec<Arc<Prompt>>| -> Result<Range<usize>> {
            let first = prompts.len();
            prompts.extend(render(recipe, task, rows_before, rows, chat.as_ref(), tokenizer)?);
            dropped += first + rows.0.len() - prompts.len();
            Ok(first..prompts.len())
        };
        let (mut rows_train, rows_heldout) = (take(&rows, &mut train)?, take(&held, &mut heldout)?);
        let first_row = rows_before;
        rows_before += rows.0.len();
        if rows_train.is_empty() && (task.path.is_some() || task.arithmetic.is_some()) {
            let of = if task.name.is_empty() { String::new() } else { format!(" of task {}", task.name) };
            return Err(EngineError::Config(format!(
                "no training prompt{of} is left: {dropped} are longer than data.max_prompt_tokens = {}. hint: raise it",
                recipe.data.max_prompt_tokens
            )));
        }
        // every task gives its part of what is set aside for validation, the last of its prompts
        let aside = (recipe.validation_prompts() + tasks.len() - 1 - list.len()) / tasks.len();
        if aside > 0 && aside >= rows_train.len() {
            return Err(EngineError::Config(format!(
                "amft.validation_prompts = {} leaves nothing of {} prompts to train on. hint: lower it",
                recipe.validation_prompts(),
                rows_train.len()
            )));
        }
        rows_train.end -= aside;
        validation.extend(train.split_off(rows_train.end));
        let full_reward = recipe.full_reward(&task.name);
        list.push(Task {
            name: task.name.clone(),
            train: rows_train,
            heldout: rows_heldout,
            full_reward,
            first_row,
            places: rows.1,
        });
    }
    if dropped > 0 {
        eprintln!(
            "warning: {dropped} prompts are longer than data.max_prompt_tokens = {} and were dropped",
            recipe.data.max_prompt_tokens
        );
    }
    let demonstrations = demonstrations_of(&train, tokenizer)?;
    let validation =
        Validating { demonstrations: demonstrations_of(&validation, tokenizer)?, prompts: validation };
    let ranges: Vec<Range<usize>> = list.iter().map(|t| t.train.clone()).collect();
    let column = recipe.data.curriculum.as_ref().and_then(|c| c.column());
    let difficulty = column.map(|column| difficulties(&train, column)).transpose()?;
    let feed = Feed::new(recipe.seed, &ranges, difficulty.as_deref());
    Ok(Tasks { train, heldout, demonstrations, validation, dropped, list, feed })
}

/// Token ids of each row's `demonstration` with the end token; empty where it has none.
fn demonstrations_of(prompts: &[Arc<Prompt>], tokenizer: &Tokenizer) -> Result<Vec<Vec<TokenId>>> {
    let tokens = |prompt: &Arc<Prompt>| match prompt.fields.get("demonstration") {
        Some(Value::String(text)) => {
            let mut tokens = tokenizer.encode(text)?;
            tokens.extend(tokenizer.eos().first());
            Ok(tokens)
        }
        _ => Ok(Vec::new()),
    };
    prompts.iter().map(tokens).collect()
}

/// The task's training rows and held-out rows.
fn rows_of(task: &TaskConfig, seed: u64) -> Result<(PlacedRows, PlacedRows)> {
    let heldout = task.heldout.unwrap_or_default();
    match (&task.path, &task.arithmetic) {
        (Some(path), _) => {
            split_rows(read_placed(path)?, task.eval_path.as_deref(), heldout, seed, &task.name)
        }
        (None, Some(problems)) => Ok((
            (arithmetic::generate(problems, seed, Split::Train, problems.problems), None),
            (arithmetic::generate(problems, seed, Split::Heldout, heldout), None),
        )),
        // every stage of a validated recipe has rows of its own
        (None, None) => {
            let held = task.eval_path.as_deref().map(|path| held_out(path, heldout)).transpose()?;
            Ok((PlacedRows::default(), held.unwrap_or_default()))
        }
    }
}

fn warn_of_rows(recipe: &Recipe, task: &str, rows: &[Row]) {
    let applies = |tasks: &[String]| tasks.is_empty() || tasks.iter().any(|t| t == task);
    for reward in recipe.reward.iter().filter(|r| applies(&r.tasks)) {
        for warning in rft_rewards::boxes::check_rows(&reward.script, &reward.options, rows) {
            let rows: Vec<String> = warning.rows.iter().map(|row| (row + 1).to_string()).collect();
            eprintln!(
                "warning: reward {}: {} (training rows {})",
                reward.script,
                warning.message,
                rows.join(", ")
            );
        }
    }
}

/// Prompts of the rows that are short enough, numbered from `before`; those of a named task without an `id` are called after it.
fn render(
    recipe: &Recipe,
    task: &TaskConfig,
    before: usize,
    (rows, places): &PlacedRows,
    chat: Option<&ChatTemplate>,
    tokenizer: &Tokenizer,
) -> Result<Vec<Arc<Prompt>>> {
    let (template, system) = (task.prompt.as_deref(), task.system.as_deref());
    let renderer = Renderer { template, system, chat, tokenizer, places: places.as_ref() };
    let name: Arc<str> = task.name.as_str().into();
    let prompt = |(i, row): (usize, &Row)| {
        let Some(mut prompt) = renderer.prompt_within(i, row, recipe.data.max_prompt_tokens)? else {
            return Ok(None);
        };
        prompt.index += before;
        prompt.task = Arc::clone(&name);
        if !recipe.task.is_empty() && row.get("id").is_none_or(Value::is_null) {
            prompt.id = format!("{name}-{}", prompt.id);
        }
        Ok(Some(Arc::new(prompt)))
    };
    // one after another is the order of errors, whatever the threads did
    let rendered: Vec<Result<Option<Arc<Prompt>>>> = rows.par_iter().enumerate().map(prompt).collect();
    rendered.into_iter().filter_map(Result::transpose).collect()
}

fn difficulties(train: &[Arc<Prompt>], column: &str) -> Result<Vec<f64>> {
    let number = |prompt: &Arc<Prompt>| {
        prompt.fields.get(column).and_then(Value::as_f64).ok_or_else(|| {
            EngineError::Config(format!(
                "row {}: no number `{column}`, which data.curriculum orders by. hint: add it to every row, or name another \
                 column",
                prompt.id
            ))
        })
    };
    train.iter().map(number).collect()
}

/// The first `count` rows of a file that only measures.
fn held_out(path: &Path, count: usize) -> Result<PlacedRows> {
    let (mut rows, places) = read_placed(path)?;
    rows.truncate(count);
    Ok((rows, Some(places)))
}

fn split_rows(
    (rows, places): (Vec<Row>, Places),
    eval: Option<&Path>,
    heldout: usize,
    seed: u64,
    task: &str,
) -> Result<(PlacedRows, PlacedRows)> {
    if let Some(path) = eval {
        return Ok(((rows, Some(places)), held_out(path, heldout)?));
    }
    if heldout >= rows.len() {
        let place = if task.is_empty() { "data.heldout".into() } else { format!("task {task}: heldout") };
        return Err(EngineError::Config(format!(
            "{place} = {heldout} leaves nothing of {} rows to train on. hint: lower it",
            rows.len()
        )));
    }
    let mut order = Order::new(seed, rows.len());
    let mut held: Vec<usize> = (0..heldout as u64).map(|p| order.at(p)).collect();
    held.sort_unstable();
    let (mut held_rows, mut held_lines, mut train, mut lines) = (vec![], vec![], vec![], vec![]);
    for (i, (row, line)) in rows.into_iter().zip(places.lines).enumerate() {
        let held = held.binary_search(&i).is_ok();
        let (rows, lines) = if held { (&mut held_rows, &mut held_lines) } else { (&mut train, &mut lines) };
        rows.push(row);
        lines.push(line);
    }
    let path = places.path;
    let at = |path, lines| Some(Places { path, lines });
    Ok(((train, at(path.clone(), lines)), (held_rows, at(path, held_lines))))
}
