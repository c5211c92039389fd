//! The forgetting matrix: held-out reward of every task after every stage, and what it says about forgetting.
//!
//! With R(i, j) the mean held-out reward of task j after stage i of T, and b(j) that before the first stage:
//! average = mean of R(T, j) and backward transfer of j = R(T, j) − R(l, j), with l the last stage that trains on j, here of
//! tasks with l < T (Lopez-Paz & Ranzato 2017, arXiv 1706.08840, section 3, where task and stage are one); forgetting of j =
//! max over i < T of R(i, j), less R(T, j) (Chaudhry et al. 2018, arXiv 1801.10112, section 4.1), of the same tasks; forward
//! transfer of j = R(f − 1, j) − b(j), with f > 1 the first stage that trains on j.

use std::fmt::Write as _;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::report::chart::{escape, number};
use crate::report::metrics::EvalResult;

/// Held-out results by stage and task.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct TaskMatrix {
    /// Names of the tasks.
    pub tasks: Vec<String>,
    /// What each stage is: its kind and tasks.
    pub stages: Vec<String>,
    /// Whether each stage trains on each task: `[stage][task]`.
    pub trained: Vec<Vec<bool>>,
    /// Results before the first stage, by task; `None` for a task without held-out prompts.
    pub before: Vec<Option<EvalResult>>,
    /// Results after each stage that is done: `[stage][task]`.
    pub after_stage: Vec<Vec<Option<EvalResult>>>,
}

impl TaskMatrix {
    fn reward(results: &[Option<EvalResult>], task: usize) -> Option<f64> {
        Some(results.get(task)?.as_ref()?.reward)
    }

    /// R(i, j) with stages from 0.
    fn at(&self, stage: usize, task: usize) -> Option<f64> {
        Self::reward(self.after_stage.get(stage)?, task)
    }

    fn stages_of(&self, task: usize) -> Vec<usize> {
        (0..self.after_stage.len())
            .filter(|&i| self.trained.get(i).is_some_and(|row| row.get(task) == Some(&true)))
            .collect()
    }

    /// Mean held-out reward of all tasks after the last stage.
    pub fn average(&self) -> Option<f64> {
        let last = self.after_stage.len().checked_sub(1)?;
        mean(&(0..self.tasks.len()).map(|j| self.at(last, j)).collect::<Vec<_>>())
    }

    /// Change of a task's reward since the last stage that trained on it; `None` where that is the last stage.
    pub fn backward_transfer(&self, task: usize) -> Option<f64> {
        let last = self.after_stage.len().checked_sub(1)?;
        let learnt = *self.stages_of(task).last().filter(|l| **l < last)?;
        Some(self.at(last, task)? - self.at(learnt, task)?)
    }

    /// By how much the best reward before the last stage was better; `None` where the last stage trains on the task.
    pub fn forgetting(&self, task: usize) -> Option<f64> {
        let last = self.after_stage.len().checked_sub(1)?;
        self.stages_of(task).last().filter(|l| **l < last)?;
        let best = (0..last).filter_map(|i| self.at(i, task)).fold(f64::NEG_INFINITY, f64::max);
        Some(best - self.at(last, task)?)
    }

    /// What the stages before a task's first one did to its reward; `None` where it is trained from the start or never.
    pub fn forward_transfer(&self, task: usize) -> Option<f64> {
        let first = *self.stages_of(task).first().filter(|f| **f > 0)?;
        Some(self.at(first - 1, task)? - Self::reward(&self.before, task)?)
    }

    /// The `task_matrix` of summary.json: mean rewards, pass@1 and the derived figures.
    pub fn to_json(&self) -> Value {
        let passes = |r: &Option<EvalResult>| r.as_ref().and_then(|r| Some(r.pass_at_k.first()?.1));
        let rewards = |row: &Vec<Option<EvalResult>>| -> Vec<Option<f64>> {
            row.iter().map(|r| r.as_ref().map(|r| r.reward)).collect()
        };
        let pass_row =
            |row: &Vec<Option<EvalResult>>| -> Vec<Option<f64>> { row.iter().map(passes).collect() };
        let by_task = |figure: &dyn Fn(usize) -> Option<f64>| -> Value {
            let values: Vec<Option<f64>> = (0..self.tasks.len()).map(figure).collect();
            json!({"by_task": values, "mean": mean(&values)})
        };
        json!({
            "tasks": self.tasks,
            "stages": self.stages,
            "trained": self.trained,
            "before": rewards(&self.before),
            "after_stage": self.after_stage.iter().map(rewards).collect::<Vec<_>>(),
            "pass_at_1": {
                "before": pass_row(&self.before),
                "after_stage": self.after_stage.iter().map(pass_row).collect::<Vec<_>>(),
            },
            "average": self.average(),
            "backward_transfer": by_task(&|j| self.backward_transfer(j)),
            "forgetting": by_task(&|j| self.forgetting(j)),
            "forward_transfer": by_task(&|j| self.forward_transfer(j)),
        })
    }

    /// The matrix for a terminal; `*` marks what a stage trained on.
    pub fn to_text(&self) -> String {
        let wide = self.stages.iter().map(|s| s.chars().count()).max().unwrap_or(0).max(17) + 2;
        let mut text = format!("  {:wide$}", "held-out reward");
        self.tasks.iter().for_each(|task| text += &format!("{task:>12} "));
        let mut row = |label: &str, cell: &dyn Fn(usize) -> (Option<f64>, bool)| {
            let _ = write!(text, "\n  {label:wide$}");
            for j in 0..self.tasks.len() {
                let (value, trained) = cell(j);
                let value = value.map_or("–".into(), |v| format!("{v:.3}"));
                let _ = write!(text, "{value:>12}{}", if trained { '*' } else { ' ' });
            }
        };
        row("before", &|j| (Self::reward(&self.before, j), false));
        for (i, stage) in self.stages.iter().enumerate().take(self.after_stage.len()) {
            row(&format!("after {stage}"), &|j| (self.at(i, j), self.trained[i][j]));
        }
        row("forgetting", &|j| (self.forgetting(j), false));
        row("backward transfer", &|j| (self.backward_transfer(j), false));
        row("forward transfer", &|j| (self.forward_transfer(j), false));
        if let Some(average) = self.average() {
            let _ = write!(text, "\n  {:wide$}{average:>12.3}", "average after all");
        }
        text + "\n"
    }
}

fn mean(values: &[Option<f64>]) -> Option<f64> {
    let known: Vec<f64> = values.iter().filter_map(|v| *v).collect();
    (!known.is_empty()).then(|| known.iter().sum::<f64>() / known.len() as f64)
}

/// The matrix of a summary as HTML; empty without one.
pub fn html(summary: &Map<String, Value>) -> String {
    let Some(Value::Object(matrix)) = summary.get("task_matrix") else { return String::new() };
    let list = |key: &str| matrix.get(key).and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
    let cell = |value: Option<&Value>| value.and_then(Value::as_f64).map_or("–".into(), number);
    let mut html = String::from(
        "<h2>Tasks</h2><p class=\"note\">Mean held-out reward of each task (columns) after each stage (rows); bold is what \
         the stage trained on.<table><tr><th>",
    );
    for task in list("tasks") {
        let _ = write!(html, "<th>{}", escape(task.as_str().unwrap_or_default()));
    }
    let columns = list("tasks").len();
    let mut row = |label: &str, values: &[Value], bold: &[Value]| {
        let _ = write!(html, "<tr><th>{}", escape(label));
        for j in 0..columns {
            let (open, close) =
                if bold.get(j) == Some(&Value::Bool(true)) { ("<b>", "</b>") } else { ("", "") };
            let _ = write!(html, "<td>{open}{}{close}", cell(values.get(j)));
        }
    };
    row("before", list("before"), &[]);
    for (i, values) in list("after_stage").iter().enumerate() {
        let label = list("stages").get(i).and_then(Value::as_str).unwrap_or_default();
        let of = |key: &str| -> Vec<Value> {
            list(key).get(i).and_then(Value::as_array).cloned().unwrap_or_default()
        };
        row(
            &format!("after {label}"),
            values.as_array().map(Vec::as_slice).unwrap_or_default(),
            &of("trained"),
        );
    }
    for key in ["forgetting", "backward_transfer", "forward_transfer"] {
        let values = matrix.get(key).and_then(|f| f.get("by_task")?.as_array().cloned()).unwrap_or_default();
        row(&key.replace('_', " "), &values, &[]);
    }
    html + "</table>"
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(rewards: &[f64]) -> Vec<Option<EvalResult>> {
        rewards.iter().map(|&reward| Some(EvalResult { reward, ..Default::default() })).collect()
    }

    /// Three tasks, one a stage, but the second stage trains on the first task too.
    fn matrix() -> TaskMatrix {
        TaskMatrix {
            tasks: ["a", "b", "c"].map(String::from).to_vec(),
            stages: ["1 grpo a", "2 grpo a b", "3 grpo c"].map(String::from).to_vec(),
            trained: vec![vec![true, false, false], vec![true, true, false], vec![false, false, true]],
            before: row(&[0.1, 0.2, 0.3]),
            after_stage: vec![row(&[0.9, 0.25, 0.2]), row(&[0.8, 0.7, 0.4]), row(&[0.6, 0.75, 0.9])],
        }
    }

    #[test]
    fn figures_follow_their_definitions() {
        let m = matrix();
        let near = |a: Option<f64>, b: f64| assert!((a.unwrap() - b).abs() < 1e-12, "{a:?} {b}");
        near(m.average(), 0.75);
        near(m.backward_transfer(0), 0.6 - 0.8);
        near(m.backward_transfer(1), 0.75 - 0.7);
        near(m.forgetting(0), 0.9 - 0.6);
        near(m.forgetting(1), 0.7 - 0.75);
        near(m.forward_transfer(1), 0.25 - 0.2);
        near(m.forward_transfer(2), 0.4 - 0.3);
        assert_eq!((m.backward_transfer(2), m.forgetting(2), m.forward_transfer(0)), (None, None, None));
        near(m.to_json()["forgetting"]["mean"].as_f64(), (0.3 - 0.05) / 2.0);
    }

    #[test]
    fn text_and_page_hold_every_number() {
        let text = matrix().to_text();
        for piece in ["after 2 grpo a b", "0.800*", "0.700*", "0.400 ", "forgetting", "0.750"] {
            assert!(text.contains(piece), "{piece}: {text}");
        }
        let summary = Map::from_iter([("task_matrix".to_string(), matrix().to_json())]);
        let page = html(&summary);
        assert!(page.contains("<b>0.8</b>") && page.contains("after 3 grpo c"), "{page}");
        assert_eq!(html(&Map::new()), "");
    }
}
