//! Health of a step that compares completions: which of them there were, and whether the policy learns to tell them apart.

use super::{
    Evidence, FAILED_SHARE, Health, History, KL_LIMIT, TRUNCATED_SHARE, Told, Verdict, because, percent,
    share,
};

/// Steps whose comparisons are looked at together.
const WINDOW: usize = 16;
/// Pairs of those that say something of an accuracy: its standard error is then 6 %.
const FEWEST_PAIRS: u64 = 64;

/// What a step of comparisons showed.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct ComparisonSigns {
    /// What was drawn; `None` where comparisons are stored.
    pub drawn: Option<DrawnSigns>,
    /// Pairs, or labelled completions.
    pub compared: usize,
    /// How the scores told them apart before the update.
    pub told: Told,
    /// Mean distance of a compared token's logprob from the reference, nats; `None` without a reference.
    pub log_ratio: Option<f64>,
    /// Norm before clipping.
    pub grad_norm: f64,
    /// What it is clipped to; 0 is off.
    pub max_grad_norm: f64,
}

/// What a step showed of the completions that it drew.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct DrawnSigns {
    /// Groups.
    pub groups: usize,
    /// Groups whose rewards are all equal.
    pub equal: usize,
    /// Completions.
    pub completions: usize,
    /// Completions with a reward.
    pub rewarded: usize,
    /// Completions on which a verifier failed.
    pub failed: usize,
    /// Completions cut at `max_new_tokens`.
    pub truncated: usize,
    /// Whether rewards rank them; demonstrations need none.
    pub ranked: bool,
}

impl Evidence for ComparisonSigns {
    fn assess(&self, history: &History) -> Verdict {
        if let Some(drawn) = self.drawn
            && let Some(verdict) = drawn.assess(self.compared)
        {
            return verdict;
        }
        if self.grad_norm == 0.0 {
            let why =
                format!("the gradient of {} comparisons is 0: none is short of its margin", self.compared);
            return because(Health::NoGradient, why);
        }
        if let Some(verdict) = history.exploding(self.grad_norm, self.max_grad_norm) {
            return verdict;
        }
        if let Some(far) = self.log_ratio.filter(|far| *far > KL_LIMIT) {
            let why = format!(
                "logprobs of the compared tokens are {far:.3} nats from the reference on average, above {KL_LIMIT:.3}"
            );
            return because(Health::KlRunaway, why);
        }
        let steps = history.told.iter().chain(std::iter::once(&self.told)).filter(|t| t.apart > 0);
        let steps: Vec<&Told> = steps.collect();
        let last = &steps[steps.len().saturating_sub(WINDOW)..];
        if last.len() < WINDOW {
            return (Health::Learning, None);
        }
        let margin = last.iter().map(|t| t.margin).sum::<f64>() / last.len() as f64;
        if margin <= 0.0 {
            let why = format!(
                "the better completions score no higher than the worse ones over {WINDOW} steps (mean margin {margin:.4})"
            );
            return because(Health::NoMargin, why);
        }
        let right: u64 = last.iter().filter_map(|t| t.right).sum();
        let pairs: u64 = last.iter().filter(|t| t.right.is_some()).map(|t| t.apart).sum();
        let n = pairs as f64;
        if pairs >= FEWEST_PAIRS && (right as f64) < n / 2.0 + n.sqrt() / 2.0 {
            let rate = percent(right as f64 / n);
            let why =
                format!("{rate} of the last {pairs} pairs score the right way round, no more than by chance");
            return because(Health::AtChance, why);
        }
        (Health::Learning, None)
    }

    fn note(&self, history: &mut History) {
        history.note_norm(self.grad_norm);
        if self.told.apart > 0 {
            history.told.push_back(self.told);
            if history.told.len() >= WINDOW {
                history.told.pop_front();
            }
        }
    }
}

impl DrawnSigns {
    /// What is wrong with completions of which `compared` pairs or labels came.
    fn assess(&self, compared: usize) -> Option<Verdict> {
        if self.completions == 0 {
            let why = "no group was left to compare: all that was drawn was filtered out".to_string();
            return Some(because(Health::NoPair, why));
        }
        if self.ranked && self.rewarded == 0 {
            let why = format!("none of the {} completions has a reward", self.completions);
            return Some(because(Health::NoReward, why));
        }
        if self.ranked && share(self.failed, self.completions) >= FAILED_SHARE {
            let why = format!("verifiers failed on {} of {} completions", self.failed, self.completions);
            return Some(because(Health::RewardErrors, why));
        }
        if compared > 0 {
            return None;
        }
        let none = format!("no group gave a pair: {} groups were drawn", self.groups);
        let cut = share(self.truncated, self.completions);
        Some(match () {
            () if self.ranked && self.equal == self.groups => {
                because(Health::ZeroVariance, format!("{none}, and the rewards of each are equal"))
            }
            () if cut >= TRUNCATED_SHARE => {
                let cut = percent(cut);
                because(
                    Health::Truncated,
                    format!("{none}, and {cut} of the completions were cut at max_new_tokens"),
                )
            }
            () => because(Health::NoPair, format!("{none}, and too few have completions that differ enough")),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A step that teaches, of 8 pairs.
    fn good() -> ComparisonSigns {
        let told = Told { right: Some(6), apart: 8, margin: 0.2 };
        ComparisonSigns {
            compared: 8,
            told,
            log_ratio: Some(0.1),
            grad_norm: 0.5,
            max_grad_norm: 1.0,
            drawn: None,
        }
    }

    fn drawn() -> DrawnSigns {
        DrawnSigns {
            groups: 4,
            equal: 1,
            completions: 16,
            rewarded: 16,
            failed: 0,
            truncated: 2,
            ranked: true,
        }
    }

    fn after(steps: usize, signs: &ComparisonSigns) -> History {
        let mut history = History::default();
        for _ in 0..steps {
            let verdict = history.assess(signs);
            history.remember(signs, &verdict);
        }
        history
    }

    #[test]
    fn every_cause_is_named_at_its_threshold_and_not_below() {
        let history = after(8, &good());
        let none = |drawn| ComparisonSigns { drawn: Some(drawn), compared: 0, grad_norm: 0.0, ..good() };
        let some = |drawn| ComparisonSigns { drawn: Some(drawn), ..good() };
        let table = [
            (Health::Learning, good()),
            (Health::Learning, some(drawn())),
            (Health::NoPair, none(DrawnSigns::default())),
            (Health::NoPair, none(drawn())),
            (Health::ZeroVariance, none(DrawnSigns { equal: 4, ..drawn() })),
            (Health::Truncated, none(DrawnSigns { truncated: 15, ..drawn() })),
            (Health::NoPair, none(DrawnSigns { truncated: 14, ..drawn() })),
            (Health::Learning, some(DrawnSigns { truncated: 16, ..drawn() })),
            (Health::NoReward, none(DrawnSigns { rewarded: 0, failed: 16, ..drawn() })),
            (Health::Learning, some(DrawnSigns { rewarded: 0, ranked: false, ..drawn() })),
            (Health::RewardErrors, some(DrawnSigns { failed: 8, ..drawn() })),
            (Health::Learning, some(DrawnSigns { failed: 7, ..drawn() })),
            (Health::NoGradient, ComparisonSigns { grad_norm: 0.0, ..good() }),
            (Health::ExplodingNorm, ComparisonSigns { grad_norm: 5.1, ..good() }),
            (Health::Learning, ComparisonSigns { grad_norm: 4.9, ..good() }),
            (Health::Learning, ComparisonSigns { grad_norm: 5.1, max_grad_norm: 6.0, ..good() }),
            (Health::KlRunaway, ComparisonSigns { log_ratio: Some(1.01), ..good() }),
            (Health::Learning, ComparisonSigns { log_ratio: Some(0.99), ..good() }),
            (Health::Learning, ComparisonSigns { log_ratio: None, ..good() }),
        ];
        for (expected, signs) in table {
            let (health, why) = history.assess(&signs);
            assert_eq!(health, expected, "{signs:?}: {why:?}");
            assert_eq!(
                (why.is_none(), health.hint().is_empty()),
                (health == Health::Learning, why.is_none())
            );
            assert_eq!(serde_json::to_value(health).unwrap(), health.as_str());
        }
    }

    #[test]
    fn sixteen_steps_that_tell_pairs_apart_show_a_margin_and_an_accuracy() {
        let told = |right, apart, margin| ComparisonSigns { told: Told { right, apart, margin }, ..good() };
        for (expected, signs) in [
            (Health::NoMargin, told(Some(6), 8, -0.1)),
            (Health::NoMargin, told(None, 8, 0.0)),
            (Health::Learning, told(None, 8, 0.1)),
            (Health::AtChance, told(Some(4), 8, 0.1)),
            (Health::Learning, told(Some(5), 8, 0.1)),
            // too few pairs to say
            (Health::Learning, told(Some(1), 3, 0.1)),
            // the reference is the policy itself: nothing is told apart yet
            (Health::Learning, told(Some(0), 0, 0.0)),
        ] {
            assert_eq!(after(14, &signs).assess(&signs).0, Health::Learning, "{signs:?}");
            let history = after(15, &signs);
            assert_eq!(history.assess(&signs).0, expected, "{signs:?}");
            // a longer run is judged by its last steps
            let (mut history, good) = (after(40, &signs), good());
            for _ in 0..16 {
                history.remember(&good, &(Health::Learning, None));
            }
            assert_eq!(history.assess(&good).0, Health::Learning);
            history.begin_stage();
            assert_eq!(history.assess(&signs).0, Health::Learning, "another stage starts anew");
        }
    }
}
