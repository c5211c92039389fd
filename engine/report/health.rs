//! Whether a step taught the policy anything and, where it did not, why: in a word and in words.
//!
//! A pure function of what the step showed ([`Signs`]) and of a short memory of earlier steps ([`History`]), which is
//! part of every checkpoint, so that a resumed run says the same. The first cause that applies is the one named.
//! Steps that compare and steps that imitate show something else ([`comparison`], [`imitation`]); the mechanism is one.

pub mod comparison;
pub mod imitation;

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use serde::{Deserialize, Serialize};

/// Half of the completions without their verifiers' verdict: the step's mean and spread say little about the policy.
const FAILED_SHARE: f64 = 0.5;
/// Nine of ten cut off: whatever a verifier looks for at the end is not there.
const TRUNCATED_SHARE: f64 = 0.9;
/// A norm ten times the usual one, after clipping to `max_grad_norm`, is the direction of a few outliers alone.
const NORM_FACTOR: f64 = 10.0;
/// Norms that "usual" is the median of, and how many it takes.
const NORMS: (usize, usize) = (16, 8);
/// One nat a token: sampled tokens are e times as likely as under the reference; text of 20 tokens e^20 times.
const KL_LIMIT: f64 = 1.0;
/// An adaptive coefficient moves by at most 20 % a horizon: five times its target is beyond what it holds.
const KL_TARGET_FACTOR: f64 = 5.0;
/// Most of the tokens have no policy gradient left.
const CLIPPED_SHARE: f64 = 0.5;
/// A tenth of the entropy that the run began with (the mean of its first steps) …
const ENTROPY_SHARE: f64 = 0.1;
/// … over this many steps,
const ENTROPY_STEPS: u64 = 5;
/// … with half of the groups agreeing on one answer,
const AGREEING_SHARE: f64 = 0.5;
/// … and it is not the answer that pays: the mean reward is below this share of the weights' sum.
const SOLVED_SHARE: f64 = 0.95;

/// What a step did for the policy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Health {
    /// The policy learned from its rewards, comparisons or demonstrations.
    #[default]
    Learning,
    /// No completion has a reward.
    NoReward,
    /// Verifiers failed on many completions.
    RewardErrors,
    /// Nearly all completions were cut off, and nothing was learned from them.
    Truncated,
    /// Rewards do not tell completions apart.
    ZeroVariance,
    /// No two completions of a group make a pair.
    NoPair,
    /// Nothing is left to move: the loss is flat.
    NoGradient,
    /// The gradient is many times the usual one.
    ExplodingNorm,
    /// The policy is far from its reference.
    KlRunaway,
    /// The better completions score no higher than the worse ones.
    NoMargin,
    /// Scores order pairs no better than chance.
    AtChance,
    /// The loss is above what it was at the stage's start.
    Diverging,
    /// The clip cuts most tokens off.
    Clipped,
    /// The policy hardly varies its answers any more, and they are not the ones that pay.
    EntropyCollapse,
}

impl Health {
    /// As in metrics.jsonl.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Learning => "learning",
            Self::NoReward => "no_reward",
            Self::RewardErrors => "reward_errors",
            Self::Truncated => "truncated",
            Self::ZeroVariance => "zero_variance",
            Self::NoPair => "no_pair",
            Self::NoGradient => "no_gradient",
            Self::ExplodingNorm => "exploding_norm",
            Self::KlRunaway => "kl_runaway",
            Self::NoMargin => "no_margin",
            Self::AtChance => "at_chance",
            Self::Diverging => "diverging",
            Self::Clipped => "clipped",
            Self::EntropyCollapse => "entropy_collapse",
        }
    }

    /// What to do about it.
    pub fn hint(self) -> &'static str {
        match self {
            Self::Learning => "",
            Self::NoReward | Self::RewardErrors => {
                "try the reward on these rows with `rft-engine verify`, or raise its limits"
            }
            Self::Truncated => "raise rollout.max_new_tokens, or reward short answers",
            Self::ZeroVariance => "easier or harder prompts, a larger group, or a reward with more levels",
            Self::NoPair => "a larger group, a smaller min_gap, or a reward with more levels",
            Self::NoGradient => "these rows are learned: fewer epochs, harder ones, or a greater margin",
            Self::ExplodingNorm => "lower optimizer.lr or optimizer.max_grad_norm if it goes on",
            Self::KlRunaway => {
                "raise algorithm.objective.kl.coefficient (beta of a preference stage) or lower optimizer.lr"
            }
            Self::NoMargin | Self::AtChance => {
                "look for pairs whose sides are swapped or hardly differ, raise optimizer.lr, or lower the stage's beta"
            }
            Self::Diverging => "lower the stage's lr, or warm it up (optimizer.warmup_updates)",
            Self::Clipped => "lower optimizer.lr or train.inner_epochs",
            Self::EntropyCollapse => {
                "raise rollout.temperature or algorithm.objective.entropy_coefficient, or go back to an earlier checkpoint"
            }
        }
    }
}

/// What a step showed.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Signs {
    /// Groups.
    pub groups: usize,
    /// Groups whose rewards are all equal.
    pub zero_variance_groups: usize,
    /// Completions.
    pub completions: usize,
    /// Completions with a reward.
    pub rewarded: usize,
    /// Completions on which a verifier failed.
    pub failed: usize,
    /// Completions whose rewards gave them an advantage other than 0.
    pub taught: usize,
    /// Whether demonstrations taught something beside the rewards.
    pub imitates: bool,
    /// Mean reward.
    pub reward_mean: f64,
    /// Sum of the verifiers' weights: the reward of a perfect completion by convention.
    pub full_reward: f64,
    /// Share of completions cut at `max_new_tokens`.
    pub truncated_fraction: f64,
    /// Whether those are left out of the loss.
    pub mask_truncated: bool,
    /// Share of clipped tokens.
    pub clip_fraction: f64,
    /// Nats per token.
    pub entropy: f64,
    /// Nats per token, where there is a reference.
    pub kl: Option<f64>,
    /// What an adaptive coefficient holds it at.
    pub kl_target: Option<f64>,
    /// Norm before clipping.
    pub grad_norm: f64,
    /// What it is clipped to; 0 is off.
    pub max_grad_norm: f64,
}

/// How the scores of a step told better completions from worse ones.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Told {
    /// Pairs that score the right way round; `None` where single completions are judged.
    pub right: Option<u64>,
    /// Pairs (or judged completions) whose scores differ at all.
    pub apart: u64,
    /// Mean difference of the better ones' rewards and the worse ones'.
    pub margin: f64,
}

/// What a kind of step shows.
pub trait Evidence {
    /// Judges the step by what it showed and by the steps before.
    fn assess(&self, history: &History) -> Verdict;
    /// Leaves in the history what later steps are compared with.
    fn note(&self, history: &mut History);
}

/// What later steps are compared with.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct History {
    /// Sum and number of the first steps' entropies.
    entropy: (f64, u64),
    /// The last norms of the stage that are not 0.
    norms: VecDeque<f64>,
    /// The last steps of the stage that told completions apart.
    told: VecDeque<Told>,
    /// Losses of the stage's first steps and of its last.
    losses: (Vec<f64>, VecDeque<f64>),
    last: Health,
    /// Steps since `last` began.
    since: u64,
    counts: BTreeMap<Health, u64>,
    /// Failures that the last step had, so that each is said once.
    failures: BTreeSet<String>,
}

/// Health of a step, and why in words (`None` while it learns).
pub type Verdict = (Health, Option<String>);

fn share(n: usize, of: usize) -> f64 {
    n as f64 / of.max(1) as f64
}

fn percent(x: f64) -> String {
    format!("{:.0} %", 100.0 * x)
}

impl Evidence for Signs {
    fn assess(&self, history: &History) -> Verdict {
        let s = self;
        if s.completions == 0 {
            let why = "no group was left to train on: all that was drawn was filtered out".to_string();
            return because(Health::ZeroVariance, why);
        }
        let untaught = s.taught == 0 && !s.imitates;
        if s.rewarded == 0 {
            let all = s.completions;
            return because(Health::NoReward, format!("none of the {all} completions has a reward"));
        }
        if share(s.failed, s.completions) >= FAILED_SHARE {
            let (n, all) = (s.failed, s.completions);
            return because(Health::RewardErrors, format!("verifiers failed on {n} of {all} completions"));
        }
        if s.truncated_fraction >= TRUNCATED_SHARE && (untaught || s.mask_truncated) {
            let what = if s.mask_truncated { "and masked" } else { "and their rewards are equal" };
            let cut = percent(s.truncated_fraction);
            let why = format!("{cut} of the completions were cut at max_new_tokens {what}");
            return because(Health::Truncated, why);
        }
        if untaught {
            let why = format!("every group's rewards are equal (mean {:.3})", s.reward_mean);
            return because(Health::ZeroVariance, why);
        }
        if let Some(verdict) = history.exploding(s.grad_norm, s.max_grad_norm) {
            return verdict;
        }
        let limit = s.kl_target.map_or(KL_LIMIT, |target| KL_TARGET_FACTOR * target);
        if let Some(kl) = s.kl.filter(|kl| *kl > limit) {
            let why = format!("the KL to the reference is {kl:.3} nats a token, above {limit:.3}");
            return because(Health::KlRunaway, why);
        }
        if s.clip_fraction > CLIPPED_SHARE {
            let why = format!("the clip cuts {} of the tokens off", percent(s.clip_fraction));
            return because(Health::Clipped, why);
        }
        let start = history.entropy.0 / history.entropy.1.max(1) as f64;
        if history.entropy.1 == ENTROPY_STEPS
            && s.entropy < ENTROPY_SHARE * start
            && share(s.zero_variance_groups, s.groups) >= AGREEING_SHARE
            && s.reward_mean < SOLVED_SHARE * s.full_reward
        {
            let (now, agree) = (s.entropy, s.zero_variance_groups);
            let why = format!(
                "entropy fell from {start:.3} to {now:.4} nats a token and {agree} of {} groups agree, at a mean reward of {:.3}",
                s.groups, s.reward_mean
            );
            return because(Health::EntropyCollapse, why);
        }
        (Health::Learning, None)
    }

    fn note(&self, history: &mut History) {
        if history.entropy.1 < ENTROPY_STEPS {
            history.entropy = (history.entropy.0 + self.entropy, history.entropy.1 + 1);
        }
        history.note_norm(self.grad_norm);
    }
}

impl History {
    /// Judges a step by what it showed and by the steps before.
    pub fn assess(&self, signs: &impl Evidence) -> Verdict {
        signs.assess(self)
    }

    /// Forgets what only the steps of one stage can be compared with.
    pub fn begin_stage(&mut self) {
        self.norms.clear();
        self.told.clear();
        self.losses = Default::default();
    }

    /// A norm that is many times the usual one and beyond what is clipped anyway.
    fn exploding(&self, norm: f64, max: f64) -> Option<Verdict> {
        let usual = self.usual_norm().filter(|u| norm > NORM_FACTOR * u && norm > max)?;
        Some(because(Health::ExplodingNorm, format!("the gradient's norm is {norm:.3}, usually {usual:.3}")))
    }

    fn note_norm(&mut self, norm: f64) {
        if norm > 0.0 {
            self.norms.push_back(norm);
            if self.norms.len() > NORMS.0 {
                self.norms.pop_front();
            }
        }
    }

    fn usual_norm(&self) -> Option<f64> {
        let mut norms: Vec<f64> = self.norms.iter().copied().collect();
        norms.sort_by(f64::total_cmp);
        (norms.len() >= NORMS.1).then(|| norms[norms.len() / 2])
    }

    /// Remembers a judged step; gives a line to print when its health is another than the step's before.
    pub fn remember(&mut self, signs: &impl Evidence, (health, why): &Verdict) -> Option<String> {
        signs.note(self);
        *self.counts.entry(*health).or_default() += 1;
        let (before, steps) = (std::mem::replace(&mut self.last, *health), self.since);
        if before == *health {
            self.since += 1;
            return None;
        }
        self.since = 1;
        Some(match why {
            Some(why) => format!("not learning ({}): {why}. hint: {}", health.as_str(), health.hint()),
            None => format!("learning again, after {steps} steps of {}", before.as_str()),
        })
    }

    /// Of the failures of a step, those that the step before did not have.
    pub fn new_failures(&mut self, failures: impl Iterator<Item = String>) -> BTreeSet<String> {
        let now: BTreeSet<String> = failures.collect();
        let new = now.difference(&self.failures).cloned().collect();
        self.failures = now;
        new
    }

    /// Steps by health, for the summary.
    pub fn counts(&self) -> serde_json::Map<String, serde_json::Value> {
        self.counts.iter().map(|(health, n)| (health.as_str().to_string(), (*n).into())).collect()
    }

    /// What to say of a run in which no step learned.
    pub fn none_learned(&self) -> Option<String> {
        if self.counts.is_empty() || self.counts.contains_key(&Health::Learning) {
            return None;
        }
        let of = |(health, n): (&Health, &u64)| format!("{} {n}", health.as_str());
        let why = self.counts.iter().map(of).collect::<Vec<_>>().join(", ");
        Some(format!("none of {} steps learned anything: {why}", self.counts.values().sum::<u64>()))
    }
}

fn because(health: Health, why: String) -> Verdict {
    (health, Some(why))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A step that teaches.
    fn good() -> Signs {
        Signs {
            groups: 4,
            zero_variance_groups: 1,
            completions: 16,
            rewarded: 16,
            taught: 12,
            reward_mean: 0.5,
            full_reward: 1.0,
            truncated_fraction: 0.1,
            entropy: 0.8,
            kl: Some(0.01),
            grad_norm: 0.5,
            max_grad_norm: 1.0,
            ..Signs::default()
        }
    }

    fn after(steps: usize) -> History {
        let mut history = History::default();
        for _ in 0..steps {
            let verdict = history.assess(&good());
            assert_eq!(history.remember(&good(), &verdict), None);
        }
        history
    }

    #[test]
    fn every_cause_is_named_at_its_threshold_and_not_below() {
        let history = after(8);
        let g = good;
        let collapsed = Signs { entropy: 0.079, zero_variance_groups: 2, ..g() };
        let table: Vec<(Health, Signs)> = vec![
            (Health::Learning, g()),
            (Health::ZeroVariance, Signs { groups: 0, completions: 0, rewarded: 0, taught: 0, ..g() }),
            (Health::NoReward, Signs { rewarded: 0, taught: 0, ..g() }),
            (Health::RewardErrors, Signs { failed: 8, ..g() }),
            (Health::Learning, Signs { failed: 7, ..g() }),
            (Health::Truncated, Signs { truncated_fraction: 0.9, taught: 0, zero_variance_groups: 4, ..g() }),
            (Health::Truncated, Signs { truncated_fraction: 1.0, mask_truncated: true, ..g() }),
            (Health::Learning, Signs { truncated_fraction: 1.0, ..g() }),
            (Health::ZeroVariance, Signs { truncated_fraction: 0.89, taught: 0, ..g() }),
            (Health::ZeroVariance, Signs { zero_variance_groups: 4, taught: 0, ..g() }),
            (Health::Learning, Signs { taught: 0, imitates: true, ..g() }),
            (Health::ExplodingNorm, Signs { grad_norm: 5.1, ..g() }),
            (Health::Learning, Signs { grad_norm: 4.9, ..g() }),
            (Health::Learning, Signs { grad_norm: 5.1, max_grad_norm: 6.0, ..g() }),
            (Health::KlRunaway, Signs { kl: Some(1.01), ..g() }),
            (Health::Learning, Signs { kl: Some(0.99), ..g() }),
            (Health::KlRunaway, Signs { kl: Some(0.26), kl_target: Some(0.05), ..g() }),
            (Health::Learning, Signs { kl: Some(0.24), kl_target: Some(0.05), ..g() }),
            (Health::Learning, Signs { kl: None, ..g() }),
            (Health::Clipped, Signs { clip_fraction: 0.51, ..g() }),
            (Health::Learning, Signs { clip_fraction: 0.5, ..g() }),
            (Health::EntropyCollapse, collapsed),
            (Health::Learning, Signs { entropy: 0.081, ..collapsed }),
            (Health::Learning, Signs { zero_variance_groups: 1, ..collapsed }),
            (Health::Learning, Signs { reward_mean: 0.96, ..collapsed }),
        ];
        for (expected, signs) in table {
            let (health, why) = history.assess(&signs);
            assert_eq!(health, expected, "{signs:?}: {why:?}");
            assert_eq!(why.is_none(), health == Health::Learning);
            assert_eq!(health.hint().is_empty(), health == Health::Learning);
            let word = serde_json::to_value(health).unwrap();
            assert_eq!(word, health.as_str(), "the word in files is the word in checkpoints");
        }
    }

    #[test]
    fn what_needs_a_history_is_silent_without_one() {
        let exploded = Signs { grad_norm: 50.0, ..good() };
        assert_eq!(after(7).assess(&exploded).0, Health::Learning);
        assert_eq!(after(8).assess(&exploded).0, Health::ExplodingNorm);
        let collapsed = Signs { entropy: 0.01, zero_variance_groups: 3, ..good() };
        assert_eq!(after(4).assess(&collapsed).0, Health::Learning);
        assert_eq!(after(5).assess(&collapsed).0, Health::EntropyCollapse);
    }

    #[test]
    fn a_change_is_said_once_and_every_step_is_counted() {
        let mut history = after(2);
        let bad = Signs { taught: 0, zero_variance_groups: 4, ..good() };
        let mut step = |signs: &Signs| {
            let verdict = history.assess(signs);
            history.remember(signs, &verdict)
        };
        let line = step(&bad).unwrap();
        assert!(
            line.contains("zero_variance") && line.contains("mean 0.500") && line.contains("hint: "),
            "{line}"
        );
        assert_eq!((step(&bad), step(&bad)), (None, None));
        assert!(step(&good()).unwrap().contains("learning again, after 3 steps of zero_variance"));
        assert_eq!(step(&good()), None);
        assert_eq!(
            serde_json::Value::from(history.counts()),
            serde_json::json!({"learning": 4, "zero_variance": 3})
        );
    }

    #[test]
    fn a_history_goes_through_a_checkpoint_unchanged() {
        let mut history = after(9);
        history.new_failures(["math: Timeout".to_string()].into_iter());
        let text = serde_json::to_string(&history).unwrap();
        assert_eq!(serde_json::from_str::<History>(&text).unwrap(), history);
        assert!(history.new_failures(["math: Timeout".to_string()].into_iter()).is_empty());
        assert_eq!(history.new_failures(["math: Panic".to_string()].into_iter()).len(), 1);
    }
}
