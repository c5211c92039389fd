//! Rows to prompts: what a run trains on and what it holds out.
use std::path::Path;
use std::sync::Arc;

use rayon::prelude::*;
use serde_json::Value;

use super::amft::Validating;
use crate::config::Recipe;
use crate::data::arithmetic::{self, Split};
use crate::data::prompts::{Order, Renderer, Row, read_jsonl};
use crate::data::template::Moment;
use crate::data::tokenizer::Tokenizer;
use crate::error::{EngineError, Result};
use crate::model::source::ModelSource;
use crate::types::{Prompt, TokenId};

/// Prompts of a run and their demonstrations.
pub(super) struct Tasks {
    pub(super) train: Vec<Arc<Prompt>>,
    pub(super) heldout: Vec<Arc<Prompt>>,
    /// Token ids of each training row's `demonstration` with the end token; empty where it has none.
    pub(super) demonstrations: Vec<Vec<TokenId>>,
    /// What meta-gradients are measured on; no stage trains on it.
    pub(super) validation: Validating,
    pub(super) dropped: usize,
}

impl Tasks {
    /// Sets the last `n` training prompts aside for validation.
    pub(super) fn set_aside(&mut self, n: usize) -> Result<()> {
        let left = self.train.len().saturating_sub(n);
        if left == 0 && n > 0 {
            return Err(EngineError::Config(format!(
                "amft.validation_prompts = {n} leaves nothing of {} prompts to train on. hint: lower it",
                self.train.len()
            )));
        }
        self.validation = Validating {
            prompts: self.train.split_off(left),
            demonstrations: self.demonstrations.split_off(left),
        };
        Ok(())
    }
}

pub(super) fn load_tasks(
    recipe: &Recipe,
    source: Option<&ModelSource>,
    tokenizer: &Tokenizer,
) -> Result<Tasks> {
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
    let mut tasks = Tasks { train, heldout, demonstrations, validation: Validating::default(), dropped };
    tasks.set_aside(recipe.validation_prompts())?;
    Ok(tasks)
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
