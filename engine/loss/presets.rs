//! The named algorithms: each is a few settings of one objective.
//!
//! | name | what it sets | source | proof (`tests/fixtures/losses`) |
//! | --- | --- | --- | --- |
//! | `grpo` | completion mean, k3 in the loss | arXiv 2402.03300 eq. 3 | grpo.json, loss_type grpo |
//! | `dr_grpo` | constant normaliser, no scaling by the deviation | arXiv 2503.20783 | grpo.json, loss_type dr_grpo |
//! | `dapo` | token mean, clip-higher 0.28 | arXiv 2503.14476 eq. 8 | grpo.json, loss_type dapo |
//! | `bnpo` | token mean of the update's own tokens | TRL `loss_type="bnpo"` | grpo.json, loss_type bnpo |
//! | `gspo` | sequence ratio, clip 3e-4 / 4e-4 | arXiv 2507.18071 eq. 5–7 | grpo.json, level sequence; ppo.json gspo |
//! | `gspo_token` | its value, gradients by token advantage | arXiv 2507.18071 eq. 14 | ppo.json gspo |
//! | `cispo` | detached capped ratio times log p | arXiv 2506.13585 eq. 4 | grpo.json, loss_type cispo; ppo.json cispo |
//! | `sapo` | soft gate, 1.0 / 1.05 | arXiv 2511.20347 eq. 6 | grpo.json, loss_type sapo; ppo.json sapo |
//! | `luspo` | sequence ratio, sum over tokens | TRL `loss_type="luspo"` | grpo.json, loss_type luspo |
//! | `vespo` | gamma weights of the completion | TRL `get_gamma_weights` | grpo.json, loss_type vespo |
//! | `gmpo` | geometric mean of clipped ratios, 0.4 | arXiv 2507.20673 eq. 4 | grpo.json, trainer GMPOTrainer; ppo.json geo_mean |
//! | `dppo_tv`, `dppo_kl` | probability-move mask | arXiv 2602.04879 | ppo.json dppo_tv, dppo_kl |
//! | `rloo` | leave-one-out, completion ratio, k1 in the reward | arXiv 2402.14740 eq. 6 | rloo.json |
//! | `ppo` | critic, generalised advantages, dual clip 3, k1 in the tokens' rewards | arXiv 1707.06347 eq. 7, 1506.02438 eq. 16 | ppo.json vanilla, gae, value_loss |
//! | `reinforce_pp` | returns whitened over the step's tokens, k1 in the tokens' rewards | arXiv 2501.03262 | ppo.json reinforce_plus_plus |
//! | `reinforce_pp_baseline` | group mean, whitened over the step's tokens, k2 in the loss | arXiv 2501.03262 | ppo.json reinforce_plus_plus_baseline |
//! | `gdpo` | each reward normalised, then summed | arXiv 2601.05242 | advantages.json normalize_then_sum |
//! | `gpg` | plain policy gradient, scaled by informative rewards | arXiv 2504.02546 | ppo.json gpg |
//! | `opo` | length-weighted baseline, plain policy gradient | arXiv 2505.23585 eq. 5 | ppo.json opo |
//! | `remax` | greedy baseline | arXiv 2310.10505 eq. 4 | ppo.json remax |
//! | `pass_at_k` | best minus second best | arXiv 2503.19595 | ppo.json grpo_passk |
//! | `maxrl` | divided by the group's mean | arXiv 2602.02710 | unit test in `advantage.rs` |
//! | `gfpo`, `gfpo_efficiency` | the 4 shortest, or most rewarded a token, of each group | arXiv 2508.09726 section 3 | unit test in `advantage.rs` |
//! | `kl_cov` | no clip, penalty on the tokens of greatest covariance | arXiv 2505.22617 eq. 11 | ppo.json kl_cov |
//! | `clip_cov` | a share of the tokens of great covariance left out | arXiv 2505.22617 eq. 10 | unit test in `correction.rs` |

use super::correction::Covariance;
use super::kl::{Estimator, Gradient, KlConfig, Placement};
use super::surrogate::{Cispo, Divergence, Dppo, Sapo, Surrogate, Vespo};
use super::value::CriticConfig;
use super::{Aggregation, Objective, RatioLevel};
use crate::advantage::{AdvantageConfig, Baseline, Combine, CreditRule, FilterConfig, GroupFilter, Scale};

/// Names that [`preset`] knows, in the order of the table above.
pub const NAMES: [&str; 27] = [
    "grpo",
    "dr_grpo",
    "dapo",
    "bnpo",
    "gspo",
    "gspo_token",
    "cispo",
    "sapo",
    "luspo",
    "vespo",
    "gmpo",
    "dppo_tv",
    "dppo_kl",
    "rloo",
    "ppo",
    "reinforce_pp",
    "reinforce_pp_baseline",
    "gdpo",
    "gpg",
    "opo",
    "remax",
    "pass_at_k",
    "maxrl",
    "gfpo",
    "gfpo_efficiency",
    "kl_cov",
    "clip_cov",
];

/// The settings of a named algorithm; `None` for a name that is not in [`NAMES`].
///
/// KL coefficients are those of the papers where they use one and 0 elsewhere.
pub fn preset(name: &str) -> Option<(Objective, AdvantageConfig)> {
    let plain = Objective::default();
    let completion_mean = Objective { aggregation: Aggregation::Sequence, ..plain.clone() };
    let in_reward = KlConfig {
        coefficient: 0.05,
        estimator: Estimator::K1,
        placement: Placement::Reward,
        ..KlConfig::default()
    };
    let group = AdvantageConfig::default();
    let unscaled = AdvantageConfig { scale: Scale::None, ..group.clone() };
    let whitened = AdvantageConfig { whiten: true, credit: CreditRule::Returns, ..unscaled.clone() };
    let filtered = |by| AdvantageConfig { filter: Some(FilterConfig { by, keep: 4 }), ..group.clone() };
    let with_baseline = |baseline| AdvantageConfig { baseline, ..unscaled.clone() };
    let with_surrogate = |surrogate| Objective { surrogate, ..plain.clone() };
    let gspo =
        Objective { ratio: RatioLevel::Sequence, clip_low: 3e-4, clip_high: 4e-4, ..completion_mean.clone() };
    let dppo = |divergence, bound| Objective {
        clip_low: bound,
        clip_high: bound,
        ..with_surrogate(Surrogate::Dppo(Dppo { divergence, ..Dppo::default() }))
    };
    Some(match name {
        "grpo" => {
            let kl = KlConfig { coefficient: 0.04, ..KlConfig::default() };
            (Objective { kl, ..completion_mean }, group)
        }
        "dr_grpo" => (Objective { aggregation: Aggregation::Constant, ..plain }, unscaled),
        "dapo" => (Objective { clip_high: 0.28, ..plain }, group),
        "bnpo" => (plain, group),
        "gspo" => (gspo, group),
        "gspo_token" => (Objective { ratio: RatioLevel::SequenceToken, ..gspo }, group),
        "cispo" => (with_surrogate(Surrogate::Cispo(Cispo::default())), group),
        "sapo" => (Objective { surrogate: Surrogate::Sapo(Sapo::default()), ..completion_mean }, group),
        "luspo" => (Objective { aggregation: Aggregation::SequenceSum, ..gspo }, group),
        "vespo" => (with_surrogate(Surrogate::Vespo(Vespo::default())), group),
        "gmpo" => {
            let ratio = RatioLevel::Geometric;
            (Objective { ratio, clip_low: 0.4, clip_high: 0.4, ..completion_mean }, group)
        }
        "dppo_tv" => (dppo(Divergence::Tv, 0.2), group),
        "dppo_kl" => (dppo(Divergence::Kl, 0.05), group),
        "rloo" => {
            let objective = Objective { ratio: RatioLevel::Product, kl: in_reward, ..completion_mean };
            (objective, with_baseline(Baseline::LeaveOneOut))
        }
        "ppo" => (Objective { dual_clip: Some(3.0), kl: in_reward, ..plain }, unscaled),
        "reinforce_pp" => {
            let advantage = AdvantageConfig { baseline: Baseline::Zero, ..whitened };
            (Objective { kl: in_reward, ..plain }, advantage)
        }
        "reinforce_pp_baseline" => {
            let kl = KlConfig {
                coefficient: 0.01,
                estimator: Estimator::K2,
                gradient: Gradient::Plain,
                ..KlConfig::default()
            };
            (Objective { kl, ..plain }, whitened)
        }
        "gdpo" => (plain, AdvantageConfig { combine: Combine::NormalizeThenSum, ..group }),
        "gpg" => {
            let scale = Scale::NonZeroShare;
            (with_surrogate(Surrogate::Reinforce), AdvantageConfig { scale, ..group })
        }
        "opo" => (with_surrogate(Surrogate::Reinforce), with_baseline(Baseline::LengthWeighted)),
        "remax" => (with_surrogate(Surrogate::Reinforce), with_baseline(Baseline::Greedy)),
        "pass_at_k" => (plain, AdvantageConfig { baseline: Baseline::SecondBest, ..group }),
        "maxrl" => (plain, AdvantageConfig { scale: Scale::Mean, ..group }),
        "gfpo" => (plain, filtered(GroupFilter::Shortest)),
        "gfpo_efficiency" => (plain, filtered(GroupFilter::RewardPerToken)),
        "kl_cov" => {
            let covariance = Some(Covariance::Kl { share: 2e-4, coefficient: 1.0 });
            (Objective { clip_low: 1.0, clip_high: f64::INFINITY, covariance, ..plain }, group)
        }
        "clip_cov" => {
            let covariance = Some(Covariance::Clip { share: 2e-4, low: 1.0, high: 5.0 });
            (Objective { covariance, ..plain }, group)
        }
        _ => return None,
    })
}

/// The critic of a named algorithm that has one.
pub fn critic(name: &str) -> Option<CriticConfig> {
    (name == "ppo").then(CriticConfig::default)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_has_settings_that_survive_a_recipe() {
        for name in NAMES {
            let (objective, advantage) = preset(name).unwrap();
            let text = toml::to_string(&objective).unwrap();
            assert_eq!(toml::from_str::<Objective>(&text).unwrap(), objective, "{name}\n{text}");
            let text = toml::to_string(&advantage).unwrap();
            assert_eq!(toml::from_str::<AdvantageConfig>(&text).unwrap(), advantage, "{name}\n{text}");
        }
        assert_eq!(preset("no such"), None);
    }

    #[test]
    fn every_name_is_in_the_table() {
        let source = include_str!("presets.rs");
        for name in NAMES {
            assert!(
                source.lines().any(|l| l.starts_with("//! | ") && l.contains(&format!("`{name}`"))),
                "{name}"
            );
        }
    }
}
