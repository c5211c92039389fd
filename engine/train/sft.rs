//! A step of maximum likelihood on demonstrations.
use std::time::Instant;

use rft_kernels::Warp;

use super::Run;
use super::draw::Use;
use crate::config::StageConfig;
use crate::error::{EngineError, Result};
use crate::learner::batch::{GroupTokens, Piece};
use crate::learner::step::{Learner, ScoreGrads};
use crate::model::backprop::Scores;
use crate::report::progress::Progress;

impl Run {
    pub(super) fn sft_step(
        &mut self,
        stage: &StageConfig,
        total: u64,
        learner: &mut Learner,
        progress: &mut Progress,
    ) -> Result<()> {
        let start = Instant::now();
        let rows = self.next_rows(stage, total, stage.batch.unwrap_or(32), Use::Imitate)?;
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
        let stats = learner
            .update(&self.pool, &mut self.policy, &groups, &warp, optimizer, lr, nll)
            .map_err(|e| {
                let ids: Vec<&str> = rows.iter().map(|&r| self.tasks.train[r].id.as_str()).collect();
                self.name_sample(e, &groups, &ids)
            })?;
        progress.sft_step(
            self.state.step_in_stage + 1,
            loss,
            stats.rows as f64 / start.elapsed().as_secs_f64(),
        );
        Ok(())
    }
}
