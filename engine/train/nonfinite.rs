//! When a number is not finite: which sample it belongs to, and what is kept of the run.

use std::path::Path;

use super::{Run, State};
use crate::error::EngineError;
use crate::learner::batch::GroupTokens;
use crate::learner::step::Learner;
use crate::types::PolicyVersion;

/// Characters of a prompt or completion that an error shows.
const SHOWN: usize = 80;

impl Run {
    /// Says which sample of a batch a learner's error is about: the row's id, the completion's number, the place of the
    /// token and the text around it. `ids` has one id a group.
    pub(super) fn name_sample(
        &self,
        error: EngineError,
        groups: &[GroupTokens],
        ids: &[&str],
    ) -> EngineError {
        let EngineError::NonFinite { what, group, completion, token } = error else { return error };
        let (Some(tokens), Some(id)) = (groups.get(group), ids.get(group)) else { return error };
        let ids = tokens.completions[completion];
        let text = |ids: &[u32]| self.tokenizer.decode(ids, false);
        let place = token.map_or(String::new(), |at| {
            format!(" at token {at} of {} ({:?})", ids.len(), text(&ids[at..=at]))
        });
        let shown = token.map_or(ids, |at| &ids[..=at]);
        EngineError::Numeric(format!(
            "the {what} of completion {completion} of row {id} is not finite{place}; nothing was updated\n  prompt ends {:?}\n  \
             completion {} {:?}",
            tail(&text(tokens.prompt)),
            if token.is_some() { "up to there ends" } else { "ends" },
            tail(&text(shown)),
        ))
    }

    /// After a step that failed on a number: saves the state before the step, which the failure left as it was, beside
    /// the checkpoints that are there. Other errors pass through.
    pub(super) fn keep_last_good(
        &mut self,
        error: EngineError,
        before: State,
        version: PolicyVersion,
        checkpoints: &Path,
        learner: &Learner,
    ) -> EngineError {
        if !matches!(error, EngineError::Numeric(_) | EngineError::NonFinite { .. }) {
            return error;
        }
        let hint = "hint: lower optimizer.lr or optimizer.max_grad_norm in a new run, or look at the row; `export` writes the \
                    model of the newest checkpoint";
        if self.policy.version != version {
            return EngineError::Numeric(format!(
                "{}\nan earlier update of this step was made already: --resume goes on from the checkpoint before it. {hint}",
                without_prefix(&error)
            ));
        }
        self.state = before;
        let position = self.position();
        if position == 0 {
            return EngineError::Numeric(format!(
                "{}\nit was the first step: the model is as it was loaded. {hint}",
                without_prefix(&error)
            ));
        }
        match self.save_keeping(checkpoints, learner, usize::MAX) {
            Ok(path) => EngineError::Numeric(format!(
                "{}\nthe state before this step is in {} and older checkpoints are kept. {hint}",
                without_prefix(&error),
                path.display()
            )),
            Err(failed) => EngineError::Numeric(format!(
                "{}\nand the state before this step could not be saved: {failed}",
                without_prefix(&error)
            )),
        }
    }
}

fn without_prefix(error: &EngineError) -> String {
    let text = error.to_string();
    text.strip_prefix("numbers: ").unwrap_or(&text).to_string()
}

fn tail(text: &str) -> String {
    let chars = text.chars().count();
    match text.char_indices().nth(chars.saturating_sub(SHOWN)) {
        Some((at, _)) if at > 0 => format!("…{}", &text[at..]),
        _ => text.to_string(),
    }
}
