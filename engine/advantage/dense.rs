//! Rewards within a completion: what each token earned, and how steps are compared within a group.

use std::ops::Range;

use super::{AdvantageConfig, Baseline, Scale, mean, std_dev};

/// Rewards of a completion's steps, as (token of the completion, reward).
pub type Steps = [(u32, f64)];

/// The part of a completion's reward that no step gave.
pub fn outcome_part(reward: f64, steps: &Steps) -> f64 {
    reward - steps.iter().map(|(_, r)| r).sum::<f64>()
}

/// Rewards by token, completions by `offsets`: each step's at its own token, the outcome's part at the last one. A
/// completion without a reward has none.
pub fn token_rewards(offsets: &[usize], rewards: &[Option<f64>], steps: &[&Steps]) -> Vec<f64> {
    let mut out = vec![0.0; offsets.last().copied().unwrap_or(0)];
    for (row, span) in offsets.windows(2).enumerate() {
        let (Some(reward), true) = (rewards[row], span[1] > span[0]) else { continue };
        for &(token, r) in steps[row] {
            out[span[0] + token as usize] += r;
        }
        out[span[1] - 1] += outcome_part(reward, steps[row]);
    }
    out
}

/// What the steps add to each token's advantage: the rewards of all steps of a group are normalised together,
/// `(r - mean) / (std + eps)`, and a token has the sum of those that end at it or later (Shao et al. 2024,
/// arXiv 2402.03300, section 4.1.3). `scale` says what divides: the deviation over the group's steps, over all of the
/// update's (`batch`), or nothing; `baseline = "zero"` subtracts nothing. Completions that are not `kept` have no part.
pub fn process(
    offsets: &[usize],
    groups: &[Range<usize>],
    steps: &[&Steps],
    kept: &[bool],
    config: &AdvantageConfig,
) -> Vec<f64> {
    let mut out = vec![0.0; offsets.last().copied().unwrap_or(0)];
    let of = |rows: Range<usize>| -> Vec<f64> {
        rows.filter(|&r| kept[r]).flat_map(|r| steps[r]).map(|(_, reward)| *reward).collect()
    };
    let batch_std = std_dev(&of(0..steps.len()));
    for group in groups {
        let all = of(group.clone());
        let centre = if config.baseline == Baseline::Zero { 0.0 } else { mean(&all) };
        let divisor = match config.scale {
            Scale::Group => std_dev(&all) + config.eps,
            Scale::Batch => batch_std + config.eps,
            Scale::None | Scale::Mean | Scale::NonZeroShare => 1.0,
        };
        for row in group.clone().filter(|&r| kept[r]) {
            let span = offsets[row]..offsets[row + 1];
            for &(token, reward) in steps[row] {
                let advantage = (reward - centre) / divisor;
                out[span.start..=span.start + token as usize].iter_mut().for_each(|a| *a += advantage);
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::advantage::groups_of;

    #[test]
    fn a_token_has_the_normalised_steps_from_it_on() {
        // two completions of 4 and 2 tokens; steps 1, 0 | 1: mean 2/3, std sqrt(1/3)
        let (offsets, steps): (_, [&Steps; 2]) = ([0, 4, 6], [&[(1, 1.0), (3, 0.0)], &[(1, 1.0)]]);
        let both = groups_of(2, 2);
        let config = AdvantageConfig { eps: 0.0, ..AdvantageConfig::default() };
        let out = process(&offsets, &both, &steps, &[true, true], &config);
        let (up, down) = (3f64.sqrt() / 3.0, -2.0 * 3f64.sqrt() / 3.0);
        let want = [up + down, up + down, down, down, up, up];
        assert!(out.iter().zip(want).all(|(a, b)| (a - b).abs() < 1e-12), "{out:?}");
        let alone = process(&offsets, &both, &steps, &[true, false], &config);
        assert_eq!(&alone[4..], [0.0, 0.0]);
        // mean 1/2 and deviation sqrt(1/2) of the steps that are left
        assert!((alone[3] + 0.5f64.sqrt()).abs() < 1e-12 && alone[0].abs() < 1e-12);
        let plain = AdvantageConfig { baseline: Baseline::Zero, scale: Scale::None, ..config };
        assert_eq!(process(&offsets, &both, &steps, &[true, true], &plain), [1.0, 1.0, 0.0, 0.0, 1.0, 1.0]);
    }

    #[test]
    fn rewards_stand_where_they_were_earned() {
        let steps: [&Steps; 3] = [&[(0, 0.25)], &[], &[(0, 1.0)]];
        let out = token_rewards(&[0, 3, 5, 6], &[Some(1.25), Some(0.5), None], &steps);
        assert_eq!(out, [0.25, 0.0, 1.0, 0.0, 0.5, 0.0]);
    }
}
