//! Scored groups to comparisons: which completions of a group a preference stage takes, and what it says of them.

use rft_rewards::Outcome;

use crate::config::{PreferenceStage, Selection};
use crate::reward::ScoredGroup;
use crate::types::{Completion, FinishReason};

/// What a stage takes of one group.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Choice {
    /// Numbers of the completions that are compared, ascending.
    pub(super) used: Vec<usize>,
    /// Better and worse completion by their place in `used`, and the pair's margin in score units.
    pub(super) pairs: Vec<(usize, usize, f32)>,
    /// Whether each of `used` is desirable (unpaired losses only).
    pub(super) desirable: Vec<bool>,
}

/// A completion that can be compared: it has a reward, and is whole where cut ones do not count.
struct Candidate<'a> {
    sample: usize,
    value: f64,
    completion: &'a Completion,
    outcome: &'a Outcome,
}

fn component(outcome: &Outcome, name: &str) -> Option<f64> {
    outcome.components.iter().find(|(n, _)| n == name).and_then(|(_, value)| *value)
}

/// The comparisons of a group; none where no two completions differ enough.
pub(super) fn choose(scored: &ScoredGroup, stage: &PreferenceStage, mask_truncated: bool) -> Choice {
    let completions = scored.group.completions.iter().zip(&scored.outcomes).enumerate();
    let mut candidates: Vec<Candidate> = completions
        .filter(|(_, (c, _))| !(mask_truncated && c.finish == FinishReason::Length))
        .filter_map(|(sample, (completion, outcome))| {
            let value = match &stage.rank_by {
                Some(name) => component(outcome, name)?,
                None => outcome.reward?,
            };
            Some(Candidate { sample, value, completion, outcome })
        })
        .collect();
    if stage.unpaired.is_some() {
        return labels(&candidates, stage.min_gap);
    }
    // the best first; equal ones in the order in which they were drawn
    candidates.sort_by(|a, b| b.value.total_cmp(&a.value));
    let n = candidates.len();
    let ranks: Vec<(usize, usize)> = match stage.select {
        Selection::BestWorst if n > 1 => vec![(0, n - 1)],
        Selection::BestWorst => vec![],
        Selection::AllRanked => (0..n).flat_map(|i| (i + 1..n).map(move |j| (i, j))).collect(),
    };
    let mut found: Vec<(usize, usize, f32)> = Vec::new();
    for (i, j) in ranks {
        let (better, worse) = (&candidates[i], &candidates[j]);
        let gap = better.value - worse.value;
        let differs =
            gap > 0.0 && gap >= stage.min_gap && better.completion.tokens != worse.completion.tokens;
        if let (true, Some(margin)) = (differs, margin(better, worse, gap, stage)) {
            found.push((better.sample, worse.sample, margin));
        }
    }
    let mut used: Vec<usize> = found.iter().flat_map(|(a, b, _)| [*a, *b]).collect();
    used.sort_unstable();
    used.dedup();
    let place = |sample| used.partition_point(|s| *s < sample);
    let pairs = found.into_iter().map(|(a, b, margin)| (place(a), place(b), margin)).collect();
    Choice { pairs, used, desirable: Vec::new() }
}

/// Margin in score units; `None` where a component that it needs is missing.
fn margin(better: &Candidate, worse: &Candidate, gap: f64, stage: &PreferenceStage) -> Option<f32> {
    let mut margin = stage.gap_margin * gap;
    for (name, weight) in &stage.component_margins {
        margin += weight * (component(better.outcome, name)? - component(worse.outcome, name)?);
    }
    Some((margin / stage.beta) as f32)
}

/// Completions above the group's mean are desirable, those below are not, those at it are left out.
fn labels(candidates: &[Candidate], min_gap: f64) -> Choice {
    let mean = candidates.iter().map(|c| c.value).sum::<f64>() / candidates.len().max(1) as f64;
    let mut choice = Choice::default();
    for c in candidates {
        let distance = c.value - mean;
        // the mean of equal numbers may differ from them in the last bit
        if distance.abs() > 1e-9 && distance.abs() >= min_gap {
            choice.used.push(c.sample);
            choice.desirable.push(distance > 0.0);
        }
    }
    choice
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::types::{Group, PolicyVersion, Prompt};

    /// A group whose completions are one token each, with their rewards and a component `long`.
    fn group(rewards: &[Option<f64>]) -> ScoredGroup {
        let prompt = Prompt {
            index: 0,
            id: "0".into(),
            text: String::new(),
            tokens: vec![1],
            task: Arc::default(),
            fields: Arc::default(),
        };
        let completion = |i: usize| Completion {
            tokens: vec![i as u32],
            logprobs: vec![-1.0],
            text: String::new(),
            token_ends: vec![0],
            finish: if i == 0 { FinishReason::Length } else { FinishReason::Stop },
        };
        let outcome = |(i, reward): (usize, &Option<f64>)| Outcome {
            reward: *reward,
            components: vec![("long".into(), (i != 1).then_some(i as f64))],
            ..Outcome::default()
        };
        ScoredGroup {
            group: Group {
                prompt: Arc::new(prompt),
                completions: (0..rewards.len()).map(completion).collect(),
                version: PolicyVersion(0),
            },
            outcomes: rewards.iter().enumerate().map(outcome).collect(),
        }
    }

    fn stage() -> PreferenceStage {
        PreferenceStage { beta: 0.5, ..PreferenceStage::default() }
    }

    const REWARDS: [Option<f64>; 5] = [Some(0.0), Some(1.0), None, Some(0.25), Some(1.0)];

    #[test]
    fn the_best_and_the_worst_make_a_pair_and_equal_ones_none() {
        let choice = choose(&group(&REWARDS), &stage(), false);
        assert_eq!((choice.used, choice.pairs), (vec![0, 1], vec![(1, 0, 0.0)]));
        assert_eq!(choose(&group(&[Some(0.5); 4]), &stage(), false), Choice::default());
        assert_eq!(choose(&group(&[None, Some(0.5)]), &stage(), false), Choice::default());
        // the first completion was cut off
        assert_eq!(choose(&group(&REWARDS), &stage(), true).used, [1, 3]);
    }

    #[test]
    fn all_ranked_takes_every_gap_of_at_least_the_least() {
        let all = PreferenceStage { select: Selection::AllRanked, ..stage() };
        let choice = choose(&group(&REWARDS), &all, false);
        assert_eq!(choice.used, [0, 1, 3, 4]);
        // 1 and 4 over 3, 3 over 0, 1 and 4 over 0
        assert_eq!(choice.pairs, [(1, 2, 0.0), (1, 0, 0.0), (3, 2, 0.0), (3, 0, 0.0), (2, 0, 0.0)]);
        let wide = PreferenceStage { min_gap: 0.5, ..all };
        assert_eq!(choose(&group(&REWARDS), &wide, false).pairs.len(), 4);
    }

    #[test]
    fn margins_follow_the_gap_and_other_components() {
        let gap = PreferenceStage { gap_margin: 0.2, ..stage() };
        assert_eq!(choose(&group(&REWARDS), &gap, false).pairs, [(1, 0, 0.4)]);
        let others = PreferenceStage {
            select: Selection::AllRanked,
            component_margins: [("long".to_string(), 0.1)].into(),
            ..stage()
        };
        // completion 1 lacks the component: its pairs have no margin and are left out
        let choice = choose(&group(&REWARDS), &others, false);
        assert_eq!(choice.used, [0, 3, 4]);
        assert_eq!(choice.pairs, [(2, 1, 0.2), (2, 0, 0.8), (1, 0, 0.6)]);
        let by_component = PreferenceStage { rank_by: Some("long".into()), ..stage() };
        assert_eq!(choose(&group(&REWARDS), &by_component, false).used, [0, 4]);
    }

    #[test]
    fn labels_split_at_the_groups_mean() {
        let kto = PreferenceStage { unpaired: Some(crate::loss::preference::UnpairedLoss::Kto), ..stage() };
        let choice = choose(&group(&REWARDS), &kto, false);
        assert_eq!((choice.used, choice.desirable), (vec![0, 1, 3, 4], vec![false, true, false, true]));
        assert_eq!(choose(&group(&[Some(0.1); 3]), &kto, false), Choice::default());
    }
}
