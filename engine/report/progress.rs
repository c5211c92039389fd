//! What a person sees while a run goes on, and at its end. Everything goes to stderr.

use std::io::IsTerminal;
use std::path::Path;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::report::metrics::{EvalResult, StepMetrics};
use crate::report::stages::PreferenceMetrics;

/// A line a step: redrawn in place and cut to the width of a terminal, printed one below the other elsewhere. No colours.
#[derive(Debug)]
pub struct Progress {
    bar: Option<ProgressBar>,
    label: String,
    total: u64,
    first: u64,
    /// Steps of reinforcement in earlier stages, once a step tells.
    before: Option<u64>,
    started: Instant,
}

/// A completion to show at the end.
#[derive(Debug, Clone)]
pub struct Example {
    /// The prompt.
    pub prompt: String,
    /// The completion.
    pub completion: String,
    /// Reward, `None` where every verifier abstained.
    pub reward: Option<f64>,
    /// Its components.
    pub components: Vec<(String, Option<f64>)>,
}

impl Progress {
    /// Starts a stage that has done `first` of its `total` steps.
    pub fn start(label: &str, first: u64, total: u64) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let style = ProgressStyle::with_template("{prefix} {bar:16} {pos}/{len}  {wide_msg}")
                .expect("the template above is well formed");
            let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr());
            bar.with_style(style).with_prefix(label.to_string()).with_position(first)
        });
        Self { bar, label: label.to_string(), total, first, before: None, started: Instant::now() }
    }

    /// One step of supervised fine-tuning.
    pub fn sft_step(&mut self, step: u64, loss: f64, tokens_per_s: f64) {
        let text = format!("loss {loss:.4}  {tokens_per_s:.0} tok/s");
        // without a terminal, every tenth step is enough to follow a warm-up
        if self.bar.is_some() || step.is_multiple_of(10) || step == self.total {
            self.line(step, &text);
        }
    }

    /// One step of reinforcement.
    pub fn grpo_step(&mut self, m: &StepMetrics) {
        let components: String =
            m.components.iter().map(|(name, mean)| format!("  {name} {mean:.2}")).collect();
        let eval = m.eval_reward.map_or(String::new(), |r| format!("  held-out {r:.3}"));
        let text = format!(
            "reward {:.3}{components}  kl {:.4}  entropy {:.2}  {:.0} tok/s rollout  {:.0} tok/s learner{eval}",
            m.reward_mean, m.kl, m.entropy, m.rollout_tokens_per_s, m.learner_tokens_per_s
        );
        let before = *self.before.get_or_insert(m.step.saturating_sub(self.first + 1));
        self.line(m.step.saturating_sub(before), &text);
    }

    /// One step of preference optimisation.
    pub fn preference_step(&mut self, step: u64, m: &PreferenceMetrics) {
        let mut text = format!("loss {:.4}  compared {}", m.loss, m.compared);
        for (name, value) in [("accuracy", m.accuracies), ("margin", m.margin())] {
            text += &value.map_or(String::new(), |v| format!("  {name} {v:.3}"));
        }
        if let Some(drawn) = &m.drawn {
            text += &drawn.reward_mean.map_or(String::new(), |r| format!("  reward {r:.3}"));
            text += &format!("  {:.0} tok/s rollout", drawn.rollout_tokens_per_s);
        }
        text += &format!("  {:.0} tok/s learner", m.learner_tokens_per_s);
        text += &m.eval_reward.map_or(String::new(), |r| format!("  held-out {r:.3}"));
        self.line(step, &text);
    }

    /// A line of its own above the live one, or below the last.
    pub fn say(&self, line: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| eprintln!("{line}")),
            None => eprintln!("{line}"),
        }
    }

    fn line(&mut self, step: u64, text: &str) {
        let done = step.saturating_sub(self.first).max(1);
        let left =
            clock(self.started.elapsed().mul_f64(self.total.saturating_sub(step) as f64 / done as f64));
        match &self.bar {
            Some(bar) => {
                bar.set_position(step);
                bar.set_message(format!("{left} left  {text}"));
            }
            None => eprintln!("{} {step:>4}/{}  {text}  {left} left", self.label, self.total),
        }
    }

    /// Ends the live line and leaves it where it is.
    pub fn finish(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.abandon();
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.finish();
    }
}

fn clock(time: Duration) -> String {
    let seconds = time.as_secs();
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3600 => format!("{}:{:02} min", seconds / 60, seconds % 60),
        _ => format!("{}:{:02} h", seconds / 3600, seconds % 3600 / 60),
    }
}

/// The table of held-out results before and after reinforcement.
pub fn before_after(before: &EvalResult, after: &EvalResult) -> String {
    let mut text = format!("  {:<22} {:>8} {:>8} {:>8}\n", "held-out", "before", "after", "change");
    let mut row = |name: &str, a: f64, b: f64| {
        text += &format!("  {name:<22} {a:>8.3} {b:>8.3} {:>+8.3}\n", b - a);
    };
    row("reward", before.reward, after.reward);
    for (name, value) in &after.components {
        let old = before.components.iter().find(|(n, _)| n == name).map_or(0.0, |(_, v)| *v);
        row(name, old, *value);
    }
    for ((k, old), (_, new)) in before.pass_at_k.iter().zip(&after.pass_at_k) {
        row(&format!("pass@{k}"), *old, *new);
    }
    row("tokens a completion", before.completion_tokens_mean, after.completion_tokens_mean);
    text
}

/// Completions with their reward components.
pub fn examples(examples: &[Example]) -> String {
    let mut text = String::new();
    for example in examples {
        let reward = example.reward.map_or("none".into(), |r| format!("{r:.2}"));
        let parts: Vec<String> = example
            .components
            .iter()
            .map(|(name, value)| {
                format!("{name} {}", value.map_or("abstained".into(), |v| format!("{v:.2}")))
            })
            .collect();
        let prompt = one_line(&example.prompt);
        text += &format!(
            "  {prompt}\n    {}\n    reward {reward} = {}\n",
            one_line(&example.completion),
            parts.join(", ")
        );
    }
    text
}

fn one_line(text: &str) -> String {
    let flat = text.trim().replace('\n', "⏎");
    match flat.char_indices().nth(240) {
        Some((at, _)) => format!("{}…", &flat[..at]),
        None => flat,
    }
}

/// Where everything of a run was saved.
pub fn places(root: &Path) -> String {
    let at = |name: &str| root.join(name).display().to_string();
    format!(
        "  model    {}\n  metrics  {}\n  samples  {}\n  report   {}\n",
        at("final"),
        at("metrics.jsonl"),
        at("samples.jsonl"),
        at("report.html")
    )
}
