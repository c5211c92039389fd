//! Rewards of groups to advantages: pure, slices in, numbers out.
//!
//! GRPO (Shao et al. 2024, arXiv 2402.03300, section 4.1.2) compares each completion with its group:
//! `A_i = (r_i - mean(r)) / (std(r) + eps)`. The other estimators differ in what is subtracted and what divides.
//! A completion whose verifiers all abstained has no reward: it is left out of the statistics and its advantage
//! is 0, so one failed script never turns a group into NaN. Token-level estimators are in [`returns`].

pub mod dense;
pub mod returns;

use std::ops::Range;

use serde::{Deserialize, Serialize};

/// What the centred reward is divided by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Scale {
    /// Standard deviation of the group (n − 1 in the denominator).
    #[default]
    Group,
    /// Standard deviation of all rewards of the step.
    Batch,
    /// Nothing (Dr.GRPO, Liu et al. 2025, arXiv 2503.20783).
    None,
    /// Mean of the group: with rewards of 0 and 1, the gradient of the log of the pass rate (MaxRL, arXiv 2602.02710).
    Mean,
    /// Share of the step's rewards that are not 0 (GPG, Chu et al. 2025, arXiv 2504.02546, eq. 7; verl).
    NonZeroShare,
}

/// What is subtracted from a reward.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Baseline {
    /// Mean of the group, the completion itself included (GRPO).
    #[default]
    GroupMean,
    /// Mean of the group's other completions (RLOO, Ahmadian et al. 2024, arXiv 2402.14740, eq. 6).
    LeaveOneOut,
    /// Mean of the step.
    BatchMean,
    /// Mean of the group weighted by completion length (OPO, Hao et al. 2025, arXiv 2505.23585, eq. 5).
    LengthWeighted,
    /// The second best of the group for the best one; the others get 0 (pass@k training, arXiv 2503.19595).
    SecondBest,
    /// The reward of a greedy completion of the same prompt (ReMax, Li et al. 2023, arXiv 2310.10505, eq. 4).
    Greedy,
    /// Nothing (REINFORCE).
    Zero,
}

/// How several reward functions become one advantage.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Combine {
    /// Weighted sum, then the advantage.
    #[default]
    SumThenNormalize,
    /// Each function normalised within the group, weighted sum, then normalised over the step (GDPO, arXiv 2601.05242).
    NormalizeThenSum,
}

/// Which tokens answer for which rewards. Without dense rewards and a discount, all three are the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CreditRule {
    /// The outcome is compared within the group; dense rewards are normalised over all of the group's, and a token has the
    /// sum of those from it on ([`dense::process`]; GRPO's process supervision, arXiv 2402.03300, section 4.1.3).
    #[default]
    Process,
    /// Each token has the discounted rewards from it on ([`returns::discounted_returns`]) less the completion's baseline.
    Returns,
    /// Every token has the whole completion's.
    Completion,
}

/// What is left of a group (GFPO).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FilterConfig {
    /// What decides.
    pub by: GroupFilter,
    /// Completions kept; at least 2 and fewer than the group has.
    pub keep: usize,
}

/// How rewards become advantages.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AdvantageConfig {
    /// What is subtracted.
    pub baseline: Baseline,
    /// What it is divided by.
    pub scale: Scale,
    /// Added to the standard deviation; TRL's value.
    pub eps: f64,
    /// Order of weighting and normalising several reward functions.
    pub combine: Combine,
    /// Whether the advantages are brought to mean 0 and deviation 1 over the step at the end.
    pub whiten: bool,
    /// Which tokens answer for which rewards.
    pub credit: CreditRule,
    /// Discount a token of `credit = "returns"`.
    pub gamma: f64,
    /// Keeps some completions of every group; the others have no part in its statistics and no advantage.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub filter: Option<FilterConfig>,
}

impl AdvantageConfig {
    /// Whether completions are held against their own group, so that a group of equal rewards teaches nothing.
    pub fn compares_in_group(&self) -> bool {
        let baseline = !matches!(self.baseline, Baseline::BatchMean | Baseline::Greedy | Baseline::Zero);
        baseline || matches!(self.scale, Scale::Group | Scale::Mean) || self.filter.is_some()
    }
}

impl Default for AdvantageConfig {
    fn default() -> Self {
        Self {
            baseline: Baseline::GroupMean,
            scale: Scale::Group,
            eps: 1e-4,
            combine: Combine::SumThenNormalize,
            whiten: false,
            credit: CreditRule::Process,
            gamma: 1.0,
            filter: None,
        }
    }
}

/// Advantages of a step.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Advantages {
    /// One a completion, in the order of the rewards.
    pub values: Vec<f32>,
    /// Groups whose rewards are all equal (or fewer than two): they teach nothing.
    pub zero_variance_groups: usize,
    /// Mean of the rewards that exist; 0 when none does.
    pub reward_mean: f64,
    /// Standard deviation of the rewards that exist (n − 1 in the denominator), over the whole step.
    pub reward_std: f64,
}

/// Rewards and what some baselines need beside them.
#[derive(Debug, Clone, Copy, Default)]
pub struct Rewards<'a> {
    /// One a completion; `None` and non-finite values abstain.
    pub values: &'a [Option<f64>],
    /// Tokens of each completion; only [`Baseline::LengthWeighted`] reads them.
    pub lengths: &'a [usize],
    /// Reward of the greedy completion of each completion's prompt; only [`Baseline::Greedy`] reads them.
    pub greedy: &'a [f64],
}

/// Advantages of `rewards`, groups of `group_size` one after another; `None` and non-finite values abstain.
pub fn advantages(rewards: &[Option<f64>], group_size: usize, config: &AdvantageConfig) -> Advantages {
    assert!(group_size > 0 && rewards.len().is_multiple_of(group_size), "rewards come in whole groups");
    grouped(&Rewards { values: rewards, ..Rewards::default() }, &groups_of(rewards.len(), group_size), config)
}

/// The ranges of groups of `group_size` among `rows` completions.
pub fn groups_of(rows: usize, group_size: usize) -> Vec<Range<usize>> {
    (0..rows).step_by(group_size).map(|g| g..(g + group_size).min(rows)).collect()
}

/// Advantages of a reward matrix (`rows[completion][function]`, `None` = not scored) with a weight a function.
pub fn matrix_advantages(
    rows: &[Vec<Option<f64>>],
    weights: &[f64],
    groups: &[Range<usize>],
    config: &AdvantageConfig,
) -> Advantages {
    let sum = |row: &[Option<f64>]| {
        let scored = row.iter().zip(weights).filter_map(|(r, w)| finite(r).map(|r| r * w));
        row.iter().any(|r| finite(r).is_some()).then(|| scored.sum::<f64>())
    };
    let summed: Vec<Option<f64>> = rows.iter().map(|row| sum(row)).collect();
    let plain = grouped(&Rewards { values: &summed, ..Rewards::default() }, groups, config);
    if config.combine == Combine::SumThenNormalize {
        return plain;
    }
    let mut normalised = rows.to_vec();
    for group in groups {
        for f in 0..weights.len() {
            let present: Vec<f64> = group.clone().filter_map(|r| finite(&rows[r][f])).collect();
            let (mean, std) = (mean(&present), std_dev(&present));
            for r in group.clone() {
                normalised[r][f] = finite(&rows[r][f]).map(|x| (x - mean) / (std + config.eps));
            }
        }
    }
    let summed: Vec<Option<f64>> = normalised.iter().map(|row| sum(row)).collect();
    let over_step = AdvantageConfig { baseline: Baseline::BatchMean, scale: Scale::Batch, ..config.clone() };
    let values = grouped(&Rewards { values: &summed, ..Rewards::default() }, groups, &over_step).values;
    Advantages { values, ..plain }
}

/// A reward and what it is held against.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Compared {
    /// The reward.
    pub reward: f64,
    /// What is subtracted.
    pub baseline: f64,
    /// What divides.
    pub divisor: f64,
}

impl Compared {
    /// The advantage.
    pub fn value(self) -> f64 {
        (self.reward - self.baseline) / self.divisor
    }
}

/// Advantages of groups of any sizes.
pub fn grouped(rewards: &Rewards, groups: &[Range<usize>], config: &AdvantageConfig) -> Advantages {
    let (mut out, compared) = compare(rewards, groups, config);
    let mut values: Vec<Option<f64>> = compared.iter().map(|c| c.map(Compared::value)).collect();
    if config.whiten {
        let present: Vec<f64> = values.iter().filter_map(|v| *v).collect();
        let (mean, std) = (mean(&present), std_dev(&present));
        values.iter_mut().flatten().for_each(|v| *v = (*v - mean) / (std + config.eps));
    }
    out.values = values.into_iter().map(|v| v.unwrap_or(0.0) as f32).collect();
    out
}

/// Every reward with its baseline and divisor, `None` where it abstains, and the statistics; no whitening, no values.
pub fn compare(
    rewards: &Rewards,
    groups: &[Range<usize>],
    config: &AdvantageConfig,
) -> (Advantages, Vec<Option<Compared>>) {
    let all: Vec<f64> = rewards.values.iter().filter_map(finite).collect();
    let (batch_mean, batch_std) = (mean(&all), std_dev(&all));
    let non_zero = all.iter().filter(|r| **r != 0.0).count().max(1) as f64 / all.len().max(1) as f64;
    let mut out = Advantages { reward_mean: batch_mean, reward_std: batch_std, ..Advantages::default() };
    let mut compared = vec![None; rewards.values.len()];
    for group in groups {
        let scored: Vec<(usize, f64)> =
            group.clone().filter_map(|r| Some((r, finite(&rewards.values[r])?))).collect();
        let present: Vec<f64> = scored.iter().map(|(_, r)| *r).collect();
        let (n, mean, std) = (present.len(), mean(&present), std_dev(&present));
        if std == 0.0 {
            out.zero_variance_groups += 1;
        }
        let divisor = match config.scale {
            Scale::Group => std + config.eps,
            Scale::Batch => batch_std + config.eps,
            Scale::None => 1.0,
            Scale::Mean => mean.abs() + config.eps,
            Scale::NonZeroShare => non_zero,
        };
        let best = scored.iter().fold(None, |best: Option<(usize, f64)>, x| match best {
            Some(b) if b.1 >= x.1 => Some(b),
            _ => Some(*x),
        });
        for &(row, reward) in &scored {
            let baseline = match config.baseline {
                Baseline::GroupMean => mean,
                Baseline::LeaveOneOut if n > 1 => (mean * n as f64 - reward) / (n - 1) as f64,
                Baseline::LeaveOneOut => reward,
                Baseline::BatchMean => batch_mean,
                Baseline::LengthWeighted => {
                    let tokens: usize = scored.iter().map(|(i, _)| rewards.lengths[*i]).sum();
                    let weighted = scored.iter().map(|(i, r)| r * rewards.lengths[*i] as f64).sum::<f64>();
                    weighted / tokens.max(1) as f64
                }
                Baseline::SecondBest if best.is_some_and(|b| b.0 == row) && n > 1 => scored
                    .iter()
                    .filter(|(i, _)| *i != row)
                    .map(|(_, r)| *r)
                    .fold(f64::NEG_INFINITY, f64::max),
                Baseline::SecondBest => reward,
                Baseline::Greedy => rewards.greedy[row],
                Baseline::Zero => 0.0,
            };
            compared[row] = Some(Compared { reward, baseline, divisor });
        }
    }
    (out, compared)
}

/// By what GFPO keeps completions of a group (Shrivastava et al. 2025, arXiv 2508.09726, section 3).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GroupFilter {
    /// The shortest.
    Shortest,
    /// Those with the most reward a token.
    RewardPerToken,
}

/// Rewards with all but the `keep` best completions of each group turned into abstentions, so that neither the
/// statistics nor the gradient sees them; ties keep the earlier completion.
pub fn filter_groups(
    rewards: &[Option<f64>],
    lengths: &[usize],
    groups: &[Range<usize>],
    filter: GroupFilter,
    keep: usize,
) -> Vec<Option<f64>> {
    let mut out = vec![None; rewards.len()];
    let rank = |&r: &usize| match filter {
        GroupFilter::Shortest => lengths[r] as f64,
        GroupFilter::RewardPerToken => -rewards[r].unwrap_or(f64::NEG_INFINITY) / lengths[r].max(1) as f64,
    };
    for group in groups {
        let mut rows: Vec<usize> = group.clone().filter(|&r| finite(&rewards[r]).is_some()).collect();
        rows.sort_by(|a, b| rank(a).total_cmp(&rank(b)));
        for &r in rows.iter().take(keep) {
            out[r] = rewards[r];
        }
    }
    out
}

fn finite(reward: &Option<f64>) -> Option<f64> {
    reward.filter(|x| x.is_finite())
}

/// Exactly the value itself where all are equal, so that an equal group's advantages are exactly 0.
fn mean(values: &[f64]) -> f64 {
    match values {
        [] => 0.0,
        [first, rest @ ..] if rest.iter().all(|v| v == first) => *first,
        _ => values.iter().sum::<f64>() / values.len() as f64,
    }
}

/// Sample standard deviation; 0 for fewer than two values, exactly 0 for equal ones.
fn std_dev(values: &[f64]) -> f64 {
    if values.len() < 2 || values.iter().all(|v| *v == values[0]) {
        return 0.0;
    }
    let mean = mean(values);
    (values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / (values.len() - 1) as f64).sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn some(values: &[f64]) -> Vec<Option<f64>> {
        values.iter().copied().map(Some).collect()
    }

    #[test]
    fn a_group_is_centred_and_scaled() {
        // mean 0.5, std sqrt(1/3): (1 - 0.5) / (0.57735 + 1e-4) = 0.86588
        let a = advantages(&some(&[1.0, 0.0, 1.0, 0.0]), 4, &AdvantageConfig::default());
        assert!((a.values[0] - 0.865_876).abs() < 1e-5 && (a.values[1] + 0.865_876).abs() < 1e-5, "{a:?}");
    }

    #[test]
    fn an_abstained_row_is_left_out_and_gets_nothing() {
        let rewards = [Some(1.0), None, Some(0.0), Some(f64::NAN)];
        let config = AdvantageConfig { scale: Scale::None, ..Default::default() };
        let a = advantages(&rewards, 4, &config);
        assert_eq!(a.values, [0.5, 0.0, -0.5, 0.0]);
        assert_eq!(a.reward_mean, 0.5);
        assert_eq!(advantages(&[None, None], 2, &config).values, [0.0, 0.0]);
    }

    #[test]
    fn equal_rewards_are_counted_and_teach_nothing() {
        // 0.1 three times does not sum to 0.3 in floating point; the group must still count as equal
        let a = advantages(&some(&[0.1, 0.1, 0.1, 1.0, 0.0, 0.5]), 3, &AdvantageConfig::default());
        assert_eq!((a.zero_variance_groups, &a.values[..3]), (1, &[0.0; 3][..]));
    }

    #[test]
    fn leave_one_out_is_the_mean_scaled_by_n_over_n_minus_one() {
        let rewards = some(&[1.0, 2.0, 6.0]);
        let config =
            |baseline| AdvantageConfig { baseline, scale: Scale::None, eps: 0.0, ..Default::default() };
        let mean = advantages(&rewards, 3, &config(Baseline::GroupMean)).values;
        let loo = advantages(&rewards, 3, &config(Baseline::LeaveOneOut)).values;
        for (m, l) in mean.iter().zip(&loo) {
            assert!((l - m * 1.5).abs() < 1e-6);
        }
    }

    #[test]
    fn a_filtered_group_is_its_own_statistics() {
        let rewards = some(&[1.0, 0.0, 1.0, 0.0]);
        let kept = filter_groups(&rewards, &[9, 2, 3, 8], &groups_of(4, 4), GroupFilter::Shortest, 2);
        assert_eq!(kept, [None, Some(0.0), Some(1.0), None]);
        let a = advantages(&kept, 4, &AdvantageConfig { scale: Scale::None, ..Default::default() });
        assert_eq!(a.values, [0.0, -0.5, 0.5, 0.0]);
        let kept = filter_groups(&rewards, &[9, 2, 3, 8], &groups_of(4, 4), GroupFilter::RewardPerToken, 1);
        assert_eq!(kept, [None, None, Some(1.0), None]);
    }

    #[test]
    fn scaling_by_the_mean_weighs_rare_successes_more() {
        let config = AdvantageConfig { scale: Scale::Mean, eps: 0.0, ..Default::default() };
        assert_eq!(advantages(&some(&[1.0, 0.0, 0.0, 0.0]), 4, &config).values, [3.0, -1.0, -1.0, -1.0]);
    }
}
