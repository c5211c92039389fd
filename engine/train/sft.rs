//! A step of maximum likelihood on demonstrations.

use std::time::Instant;

use super::Run;
use super::comparison::PLAIN;
use super::draw::Use;
use super::stage_rows::StageRows;
use crate::config::StageConfig;
use crate::error::Result;
use crate::learner::batch::{GroupTokens, Piece};
use crate::learner::step::{Learner, ScoreGrads};
use crate::model::backprop::Scores;
use crate::report::health::imitation::ImitationSigns;
use crate::report::metrics::rss_peak_bytes;
use crate::report::progress::Progress;
use crate::report::sinks::RunFolder;
use crate::report::stages::SftMetrics;

impl Run {
    /// One update on the stage's next rows: the mean negative log-likelihood of all their learned tokens.
    pub(super) fn sft_step(
        &mut self,
        stage: &StageConfig,
        total: u64,
        learner: &mut Learner,
        folder: &mut RunFolder,
        progress: &mut Progress,
    ) -> Result<()> {
        let start = Instant::now();
        let batch = stage.rows_per_step();
        let chosen = match stage.path {
            Some(_) => self.own_rows(batch),
            None => self.next_rows(stage, total, batch, Use::Imitate)?,
        };
        let StageRows::Demonstrations(rows) = &self.stage_rows[self.state.stage] else {
            unreachable!("a supervised stage has read its demonstrations");
        };
        let count = rows.iter().filter(|r| !r.completion.is_empty()).count();
        let rows: Vec<_> = chosen.iter().map(|&row| &rows[row]).collect();
        let groups: Vec<GroupTokens> = rows
            .iter()
            .map(|r| GroupTokens { prompt: &r.prompt, completions: vec![r.completion.as_slice()] })
            .collect();
        let mask: Vec<bool> = rows.iter().flat_map(|r| r.mask.iter().copied()).collect();
        let tokens = mask.iter().filter(|m| **m).count();
        let lr = self.learning_rate(stage, self.state.step_in_stage, total);
        // sums over the step in its own order, whatever the micro-batches
        let (mut nll, mut entropy, mut at) = (0.0, 0.0, 0);
        let objective = |_: &[Piece], scores: &Scores| {
            let n = scores.logprobs.len();
            let learned = &mask[at..at + n];
            at += n;
            entropy += scores.entropies.iter().map(|e| f64::from(*e)).sum::<f64>();
            for (logprob, _) in scores.logprobs.iter().zip(learned).filter(|(_, m)| **m) {
                nll -= f64::from(*logprob);
            }
            let weight = |m: &bool| if *m { -1.0 / tokens as f32 } else { 0.0 };
            Ok(ScoreGrads { logprobs: learned.iter().map(weight).collect(), entropies: vec![0.0; n] })
        };
        let optimizer = &self.recipe.optimizer;
        let stats = learner
            .update(&self.pool, &mut self.policy, &groups, &PLAIN, optimizer, lr, objective)
            .map_err(|e| {
            let ids: Vec<&str> = rows.iter().map(|r| r.id.as_str()).collect();
            self.name_sample(e, &groups, &ids)
        })?;
        let learner_s = start.elapsed().as_secs_f64();
        self.state.sft_steps += 1;
        let loss = nll / tokens as f64;
        let signs = ImitationSigns {
            loss,
            grad_norm: stats.grad_norm,
            max_grad_norm: self.recipe.optimizer.max_grad_norm,
        };
        let health = self.state.sft_health.assess(&signs);
        let change = self.state.sft_health.remember(&signs, &health);
        let metrics = SftMetrics {
            step: self.state.sft_steps,
            stage_index: self.state.stage,
            loss,
            tokens,
            entropy: entropy / mask.len() as f64,
            grad_norm: stats.grad_norm,
            lr,
            epoch: (self.state.step_in_stage + 1) as f64 * batch as f64 / count as f64,
            learner_s,
            learner_tokens_per_s: stats.rows as f64 / learner_s.max(1e-9),
            rss_peak_bytes: rss_peak_bytes(),
            health,
        };
        folder.sft(self.state.sft_steps, &metrics.to_json())?;
        progress.sft_step(self.state.step_in_stage + 1, metrics.loss, metrics.learner_tokens_per_s);
        if let Some(line) = change {
            progress.say(&format!("sft step {}: {line}", self.state.sft_steps));
        }
        Ok(())
    }
}
