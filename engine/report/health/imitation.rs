//! Health of a supervised step: whether its demonstrations become likelier.
//!
//! What cannot be learned from at all never gets here: rows without a learned token are refused when they are read, and a loss
//! that is not finite stops the run.

use super::{Evidence, Health, History, Verdict, because};

/// Steps at a stage's start, and at its end so far, whose mean losses are compared.
const STEPS: usize = 5;
/// A fifth above the start, and this many nats, is more than batches differ by.
const GROWTH: (f64, f64) = (1.2, 0.1);

/// What a supervised step showed.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct ImitationSigns {
    /// Mean negative log-likelihood of the learned tokens.
    pub loss: f64,
    /// Norm before clipping.
    pub grad_norm: f64,
    /// What it is clipped to; 0 is off.
    pub max_grad_norm: f64,
}

impl Evidence for ImitationSigns {
    fn assess(&self, history: &History) -> Verdict {
        if self.grad_norm == 0.0 {
            return because(Health::NoGradient, format!("the gradient is 0 at a loss of {:.4}", self.loss));
        }
        if let Some(verdict) = history.exploding(self.grad_norm, self.max_grad_norm) {
            return verdict;
        }
        let (first, last) = &history.losses;
        let mean = |losses: &[f64]| losses.iter().sum::<f64>() / losses.len().max(1) as f64;
        let last: Vec<f64> = last.iter().copied().chain([self.loss]).collect();
        let (start, now) = (mean(first), mean(&last));
        if last.len() == STEPS && now > GROWTH.0 * start + GROWTH.1 {
            let why = format!(
                "the loss rose from {start:.3} at the stage's start to {now:.3} over the last {STEPS} steps"
            );
            return because(Health::Diverging, why);
        }
        (Health::Learning, None)
    }

    fn note(&self, history: &mut History) {
        history.note_norm(self.grad_norm);
        let (first, last) = &mut history.losses;
        if first.len() < STEPS {
            return first.push(self.loss);
        }
        last.push_back(self.loss);
        if last.len() == STEPS {
            last.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn good() -> ImitationSigns {
        ImitationSigns { loss: 2.0, grad_norm: 0.5, max_grad_norm: 1.0 }
    }

    fn after(steps: usize, signs: &ImitationSigns, mut history: History) -> History {
        for _ in 0..steps {
            let verdict = history.assess(signs);
            history.remember(signs, &verdict);
        }
        history
    }

    #[test]
    fn norms_and_losses_are_compared_with_those_of_the_stage() {
        let start = after(8, &good(), History::default());
        let judge = |history: &History, signs| history.assess(&signs).0;
        assert_eq!(judge(&start, ImitationSigns { grad_norm: 0.0, ..good() }), Health::NoGradient);
        assert_eq!(judge(&start, ImitationSigns { grad_norm: 5.1, ..good() }), Health::ExplodingNorm);
        assert_eq!(judge(&start, ImitationSigns { grad_norm: 4.9, ..good() }), Health::Learning);
        for (loss, expected) in [(2.51, Health::Diverging), (2.49, Health::Learning), (0.1, Health::Learning)]
        {
            let signs = ImitationSigns { loss, ..good() };
            let most = after(4, &signs, start.clone());
            assert_eq!(judge(&most, signs), expected, "{loss}");
            assert_eq!(
                judge(&after(2, &signs, start.clone()), signs),
                Health::Learning,
                "{loss} for three steps"
            );
            let mut next = most;
            next.begin_stage();
            assert_eq!(judge(&next, signs), Health::Learning, "{loss} at the start of another stage");
        }
    }
}
