//! Held-out measurement of a run: all tasks at once, and after each stage of a recipe with named tasks.

use std::collections::BTreeMap;

use super::Run;
use super::answer::EVALUATION;
use crate::config::StageConfig;
use crate::error::Result;
use crate::eval::Evaluation;
use crate::model::decoder::PagedDecoder;
use crate::report::forgetting::TaskMatrix;
use crate::report::metrics::EvalResult;
use crate::reward::ScoredGroup;
use crate::rollout::RolloutEngine;

impl Run {
    /// Held-out results of each task (`None` without held-out prompts), and the groups of all.
    pub(super) fn evaluate_tasks(
        &self,
        engine: &mut RolloutEngine,
    ) -> Result<(Vec<Option<EvalResult>>, Vec<ScoredGroup>)> {
        let sampling = self.sampling(self.recipe.eval.temperature);
        let key = self.rollout_key(EVALUATION);
        let (mut results, mut all) = (Vec::new(), Vec::new());
        for task in &self.tasks.list {
            if task.heldout.is_empty() {
                results.push(None);
                continue;
            }
            let evaluation = Evaluation {
                prompts: &self.tasks.heldout[task.heldout.clone()],
                samples: self.recipe.eval.samples,
                trial: self.trial(&sampling, (self.state.steps, self.recipe.train.steps)),
                full_reward: task.full_reward,
            };
            let mut model = PagedDecoder::new(self.policy.weights());
            let (result, groups, _) = evaluation.run(engine, &mut model, &self.pool, &self.tokenizer, key)?;
            results.push(Some(result));
            all.extend(groups);
        }
        Ok((results, all))
    }

    /// Held-out result over the prompts of all tasks, and their groups.
    pub(super) fn evaluate(&self, engine: &mut RolloutEngine) -> Result<(EvalResult, Vec<ScoredGroup>)> {
        let (results, groups) = self.evaluate_tasks(engine)?;
        let sizes = self.tasks.list.iter().map(|t| t.heldout.len());
        let parts: Vec<(usize, EvalResult)> =
            sizes.zip(results).filter_map(|(n, result)| Some((n, result?))).collect();
        Ok((together(parts), groups))
    }

    /// Whether stages are measured task by task: the recipe names tasks and holds prompts out.
    fn has_matrix(&self) -> bool {
        !self.recipe.task.is_empty() && !self.recipe.reward.is_empty() && !self.tasks.heldout.is_empty()
    }

    /// Before the first stage: what the policy knows of each task.
    pub(super) fn begin_matrix(&mut self, stages: &[StageConfig], engine: &mut RolloutEngine) -> Result<()> {
        if self.has_matrix() && self.state.matrix.tasks.is_empty() {
            let (before, _) = self.evaluate_tasks(engine)?;
            let weights: Vec<Vec<f64>> = stages.iter().map(|s| self.recipe.task_weights(s)).collect();
            self.state.matrix = TaskMatrix {
                tasks: self.tasks.list.iter().map(|t| t.name.clone()).collect(),
                stages: stages.iter().enumerate().map(|(i, s)| stage_label(i, s)).collect(),
                trained: weights.iter().map(|row| row.iter().map(|w| *w > 0.0).collect()).collect(),
                before,
                after_stage: Vec::new(),
            };
        }
        Ok(())
    }

    /// After a stage: what the policy knows of each task now.
    pub(super) fn end_stage(&mut self, engine: &mut RolloutEngine) -> Result<()> {
        if self.has_matrix() {
            let (after, _) = self.evaluate_tasks(engine)?;
            let rewards: Vec<String> = (self.tasks.list.iter().zip(&after))
                .filter_map(|(task, r)| Some(format!("{} {:.3}", task.name, r.as_ref()?.reward)))
                .collect();
            let label = self.state.matrix.stages.get(self.state.stage).cloned().unwrap_or_default();
            eprintln!("held-out reward after stage {label}: {}", rewards.join(", "));
            self.state.matrix.after_stage.push(after);
        }
        Ok(())
    }
}

/// "2 grpo subtract": number from 1, kind, tasks.
fn stage_label(number: usize, stage: &StageConfig) -> String {
    let kind = serde_json::to_value(stage.kind).ok();
    let kind = kind.as_ref().and_then(|k| k.as_str()).unwrap_or_default();
    let tasks = if stage.tasks.is_empty() { "all".to_string() } else { stage.tasks.join(" ") };
    format!("{} {kind} {tasks}", number + 1)
}

/// One result of several tasks', each as heavy as its held-out prompts are many.
fn together(mut parts: Vec<(usize, EvalResult)>) -> EvalResult {
    if parts.len() == 1
        && let Some((_, only)) = parts.pop()
    {
        return only;
    }
    let total: usize = parts.iter().map(|(n, _)| n).sum();
    let mean = |value: &dyn Fn(&EvalResult) -> f64| {
        parts.iter().map(|(n, r)| *n as f64 * value(r)).sum::<f64>() / total.max(1) as f64
    };
    let mut components: BTreeMap<&str, (f64, usize)> = BTreeMap::new();
    for (n, result) in &parts {
        for (name, value) in &result.components {
            let sum = components.entry(name).or_default();
            *sum = (sum.0 + *n as f64 * value, sum.1 + n);
        }
    }
    let ks = parts.first().map_or(Vec::new(), |(_, r)| r.pass_at_k.iter().map(|(k, _)| *k).collect());
    EvalResult {
        reward: mean(&|r| r.reward),
        components: components.iter().map(|(name, (sum, n))| (name.to_string(), sum / *n as f64)).collect(),
        pass_at_k: ks.iter().enumerate().map(|(i, k)| (*k, mean(&|r| r.pass_at_k[i].1))).collect(),
        completion_tokens_mean: mean(&|r| r.completion_tokens_mean),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tasks_weigh_by_their_prompts_and_a_component_by_those_that_have_it() {
        let result = |reward: f64, name: &str| EvalResult {
            reward,
            components: vec![(name.into(), reward), ("format".into(), reward)],
            pass_at_k: vec![(1, reward / 2.0)],
            completion_tokens_mean: 10.0 * reward,
        };
        let all = together(vec![(10, result(0.2, "math")), (30, result(0.6, "iou"))]);
        assert!((all.reward - 0.5).abs() < 1e-12 && (all.pass_at_k[0].1 - 0.25).abs() < 1e-12);
        let component = |name: &str| all.components.iter().find(|(n, _)| n == name).unwrap().1;
        assert!((component("math") - 0.2).abs() < 1e-12 && (component("format") - 0.5).abs() < 1e-12);
        assert_eq!(together(vec![(3, result(0.3, "a"))]), result(0.3, "a"));
    }
}
