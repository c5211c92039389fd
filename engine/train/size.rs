//! What the memory plan needs to know of a run's rows: how many, how long, and how much of them a step takes.

use super::stage_rows::StageRows;
use super::tasks::Tasks;
use crate::config::{PairSource, Recipe, StageConfig, StageKind};
use crate::data::prompts::Order;
use crate::memory::DataSize;

/// Steps that are looked at for the one with the longest rows.
const STEPS_SEEN: u64 = 2000;

/// Sizes of a run whose longest prompt has `prompt_tokens` and whose longest sequence `positions`. Steps are taken as if rows came in
/// the order of the seed, and completions that are drawn as if all had full length.
pub(super) fn data_size(
    recipe: &Recipe,
    tasks: &Tasks,
    stage_rows: &[StageRows],
    prompt_tokens: usize,
    positions: usize,
) -> DataSize {
    let all = || tasks.train.iter().chain(&tasks.heldout).chain(&tasks.validation.prompts);
    let stages = recipe.stages();
    let steps = stages.iter().zip(stage_rows).map(|(stage, rows)| largest(recipe, tasks, stage, rows));
    let (step_rows, group_rows) = steps.fold((1, 1), |most, one| (most.0.max(one.0), most.1.max(one.1)));
    DataSize {
        prompt_tokens,
        positions,
        step_rows,
        group_rows,
        rows: all().count() + stage_rows.iter().filter(|r| r.is_own()).map(StageRows::len).sum::<usize>(),
        heldout: tasks.heldout.len(),
        text: all().map(|p| p.text.len()).sum(),
        stored_tokens: stages
            .iter()
            .zip(stage_rows)
            .map(|(stage, rows)| compared(stage, rows))
            .max()
            .unwrap_or(0),
    }
}

/// Tokens of stored completions whose reference logprobs are kept.
fn compared(stage: &StageConfig, rows: &StageRows) -> usize {
    match rows {
        StageRows::Judged(rows) if stage.comparison().needs_reference() => {
            rows.iter().flat_map(|r| &r.completions).map(Vec::len).sum()
        }
        _ => 0,
    }
}

/// Rows of the largest step of a stage and of the largest group.
fn largest(recipe: &Recipe, tasks: &Tasks, stage: &StageConfig, rows: &StageRows) -> (usize, usize) {
    let steps = stage.steps.unwrap_or(recipe.train.steps).min(STEPS_SEEN);
    let most = |rows: &[usize], per_step: usize| {
        let mut order = Order::new(recipe.seed, rows.len());
        // a run whose stages all have rows of their own may have none
        let steps = if rows.is_empty() { 0 } else { steps };
        let step = |step: u64| {
            let places = step * per_step as u64..(step + 1) * per_step as u64;
            places.map(|place| rows[order.at(place)]).sum::<usize>()
        };
        ((0..steps).map(step).max().unwrap_or(0), rows.iter().copied().max().unwrap_or(0))
    };
    // a completion's last token predicts nothing
    let completion = |tokens: usize| tokens.saturating_sub(1);
    let shown =
        || tasks.train.iter().zip(&tasks.demonstrations).map(|(p, d)| p.tokens.len() + completion(d.len()));
    match rows {
        StageRows::Demonstrations(rows) => {
            let lengths = rows.iter().filter(|r| !r.completion.is_empty());
            let lengths: Vec<usize> =
                lengths.map(|r| r.prompt.len() + completion(r.completion.len())).collect();
            most(&lengths, stage.rows_per_step())
        }
        StageRows::Judged(rows) => {
            let length = |r: &crate::data::examples::Judged| {
                r.prompt.tokens.len() + r.completions.iter().map(|c| completion(c.len())).sum::<usize>()
            };
            most(&rows.iter().map(length).collect::<Vec<_>>(), stage.rows_per_step())
        }
        StageRows::None => {
            let own = recipe.rollout.group_size * completion(recipe.rollout.max_new_tokens);
            let against =
                stage.kind == StageKind::Preference && stage.comparison().pairs == PairSource::Demonstrations;
            let drawn: Vec<usize> = match against {
                true => shown().map(|tokens| tokens + own).collect(),
                false => tasks.train.iter().map(|p| p.tokens.len() + own).collect(),
            };
            let (mut step, group) = most(&drawn, recipe.rollout.prompts_per_step);
            if stage.kind == StageKind::Amft {
                step += most(&shown().collect::<Vec<_>>(), stage.rows_per_step()).0;
            }
            (step, group)
        }
    }
}
