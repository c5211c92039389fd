//! `[stage.preference]`: which losses compare completions, and where the pairs come from.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::error::{EngineError, Result};
use crate::loss::preference::{KtoConfig, PairLoss, PreferenceConfig, Transform, UnpairedLoss};

/// Where the completions of a preference stage come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PairSource {
    /// The stage's `path`: rows with `chosen` and `rejected`, or with `completion` and `label`.
    #[default]
    Stored,
    /// Rollouts, compared by their rewards.
    Groups,
    /// The row's `demonstration` against each of the policy's own rollouts (SPIN, Chen et al. 2024, arXiv 2401.01335).
    Demonstrations,
}

/// Which pairs a scored group gives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Selection {
    /// The best completion and the worst.
    #[default]
    BestWorst,
    /// Every two completions whose rewards differ.
    AllRanked,
}

/// Settings of a preference stage.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PreferenceStage {
    /// Where completions come from.
    pub pairs: PairSource,
    /// Losses of pairs and their weights, added up; none means `{ sigmoid = 1.0 }` (DPO).
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub losses: BTreeMap<PairLoss, f64>,
    /// A loss of single completions in their place.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unpaired: Option<UnpairedLoss>,
    /// Inverse temperature.
    pub beta: f64,
    /// Assumed rate of swapped labels.
    pub label_smoothing: f64,
    /// What a log-ratio becomes before two of them are compared (f-divergences).
    pub divergence: Transform,
    /// Scores are means over tokens (SimPO, ORPO).
    pub length_normalised: bool,
    /// Margin between the scores of every pair; SimPO's gamma / beta.
    pub margin: f64,
    /// Weight of tokens past the length of the pair's shorter completion (LD-DPO).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ld_alpha: Option<f64>,
    /// Temperature of DiscoPOP's gate.
    pub discopop_tau: f64,
    /// Scores are plain logprobs (CPO, SimPO, ORPO): no reference is kept.
    pub reference_free: bool,
    /// Weight of desirable completions (`unpaired`).
    pub desirable_weight: f64,
    /// Weight of undesirable completions (`unpaired`).
    pub undesirable_weight: f64,
    /// Which pairs a group gives (`pairs = "groups"`).
    pub select: Selection,
    /// Least difference of rewards that makes a pair, or that sets a label apart from the group's mean.
    pub min_gap: f64,
    /// Rank by this reward component instead of the whole reward.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rank_by: Option<String>,
    /// Factor of the difference of rewards in a pair's margin: `z = beta * (…) - gap_margin * gap`.
    pub gap_margin: f64,
    /// Factors of the differences of reward components in a pair's margin (MODPO, Zhou et al. 2023, arXiv 2310.03708, eq. 7).
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub component_margins: BTreeMap<String, f64>,
}

impl Default for PreferenceStage {
    fn default() -> Self {
        let (pairs, labels) = (PreferenceConfig::default(), KtoConfig::default());
        Self {
            pairs: PairSource::Stored,
            losses: BTreeMap::new(),
            unpaired: None,
            beta: pairs.beta,
            label_smoothing: pairs.label_smoothing,
            divergence: pairs.transform,
            length_normalised: pairs.length_normalised,
            margin: pairs.margin,
            ld_alpha: pairs.ld_alpha,
            discopop_tau: pairs.discopop_tau,
            reference_free: false,
            desirable_weight: labels.desirable_weight,
            undesirable_weight: labels.undesirable_weight,
            select: Selection::BestWorst,
            min_gap: 0.0,
            rank_by: None,
            gap_margin: 0.0,
            component_margins: BTreeMap::new(),
        }
    }
}

impl PreferenceStage {
    /// The objective of pairs.
    pub fn of_pairs(&self) -> PreferenceConfig {
        let losses = match self.losses.is_empty() {
            true => vec![(PairLoss::Sigmoid, 1.0)],
            false => self.losses.iter().map(|(loss, weight)| (*loss, *weight)).collect(),
        };
        PreferenceConfig {
            losses,
            beta: self.beta,
            label_smoothing: self.label_smoothing,
            transform: self.divergence,
            length_normalised: self.length_normalised,
            margin: self.margin,
            ld_alpha: self.ld_alpha,
            discopop_tau: self.discopop_tau,
        }
    }

    /// The objective of single completions, where the stage has one.
    pub fn of_labels(&self) -> Option<KtoConfig> {
        Some(KtoConfig {
            loss: self.unpaired?,
            beta: self.beta,
            desirable_weight: self.desirable_weight,
            undesirable_weight: self.undesirable_weight,
        })
    }

    /// Whether logprobs are compared with those of a reference policy.
    pub fn needs_reference(&self) -> bool {
        let only_likelihood = || self.of_pairs().losses.iter().all(|(loss, _)| *loss == PairLoss::Sft);
        !self.reference_free && (self.unpaired.is_some() || !only_likelihood())
    }

    /// Whether completions are drawn from the policy.
    pub fn draws(&self) -> bool {
        self.pairs != PairSource::Stored
    }

    /// Refuses settings that no loss can work with; `at` is the stage as errors call it.
    pub(super) fn validate(&self, at: &str) -> Result<()> {
        let fail = |message: String| Err(EngineError::Config(format!("{at}.preference{message}")));
        let finite = [
            ("margin", self.margin),
            ("gap_margin", self.gap_margin),
            ("desirable_weight", self.desirable_weight),
            ("undesirable_weight", self.undesirable_weight),
        ];
        if let Some((key, value)) = finite.iter().find(|(_, v)| !v.is_finite()) {
            return fail(format!(".{key} must be a finite number, got {value}"));
        }
        if let Some((name, value)) = self.component_margins.iter().find(|(_, v)| !v.is_finite()) {
            return fail(format!(".component_margins.{name} must be a finite number, got {value}"));
        }
        for (key, value) in [("beta", self.beta), ("discopop_tau", self.discopop_tau)] {
            if !(value > 0.0 && value.is_finite()) {
                return fail(format!(".{key} must be positive, got {value}"));
            }
        }
        if !(self.min_gap >= 0.0 && self.min_gap.is_finite()) {
            return fail(format!(".min_gap must be 0 or more, got {}", self.min_gap));
        }
        if !(0.0..0.5).contains(&self.label_smoothing) {
            return fail(format!(
                ".label_smoothing is the share of swapped labels and must be in [0, 0.5), got {}",
                self.label_smoothing
            ));
        }
        if let Some(alpha) = self.ld_alpha
            && !(0.0..=1.0).contains(&alpha)
        {
            return fail(format!(".ld_alpha must be in [0, 1], got {alpha}"));
        }
        if let Transform::Power { rate } = self.divergence
            && (rate == 0.0 || !rate.is_finite())
        {
            return fail(format!(
                ".divergence: the rate of a power must be a number other than 0, got {rate}. hint: \"identity\" is its limit at 0"
            ));
        }
        if self.unpaired.is_some() {
            if !self.losses.is_empty() {
                return fail(
                    ": `losses` compare pairs and `unpaired` judges single completions; drop one of the two"
                        .into(),
                );
            }
            if self.reference_free {
                return fail(
                    ".reference_free: an unpaired loss is the distance from a reference. hint: remove it"
                        .into(),
                );
            }
        }
        for (loss, weight) in self.of_pairs().losses {
            let name = serde_json::to_value(loss).ok();
            let name = name.as_ref().and_then(|n| n.as_str()).unwrap_or_default().to_string();
            if !weight.is_finite() {
                return fail(format!(".losses.{name} must be a finite number, got {weight}"));
            }
            if self.reference_free && loss.needs_reference() {
                return fail(format!(
                    ".reference_free: the loss `{name}` is a distance from the reference. hint: remove reference_free, or take \
                     sigmoid, hinge, ipo or odds_ratio"
                ));
            }
            if loss == PairLoss::OddsRatio && !(self.reference_free && self.length_normalised) {
                return fail(
                    ".losses.odds_ratio compares mean probabilities (ORPO). hint: set reference_free = true and \
                     length_normalised = true"
                        .into(),
                );
            }
        }
        if self.pairs == PairSource::Demonstrations && self.unpaired.is_some() {
            return fail(".unpaired: demonstrations against own rollouts are pairs. hint: remove it".into());
        }
        let ranks = self.rank_by.is_some()
            || self.gap_margin != 0.0
            || !self.component_margins.is_empty()
            || self.min_gap != 0.0
            || self.select != Selection::default();
        if self.pairs != PairSource::Groups && ranks {
            return fail(
                ": select, min_gap, rank_by, gap_margin and component_margins read rewards, which only pairs = \"groups\" \
                 has. hint: stored rows may have a `margin` each"
                    .into(),
            );
        }
        Ok(())
    }
}
