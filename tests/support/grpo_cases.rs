//! Cases of `losses/grpo.json`: options in the trainer's names, turned into this engine's settings.

use rft_engine::loss::correction::{OutOfBounds, SamplerCorrection, WeightLevel, entropy_threshold};
use rft_engine::loss::kl::{Gradient, KlConfig};
use rft_engine::loss::surrogate::{Cispo, Sapo, Surrogate, Vespo};
use rft_engine::loss::{
    Aggregation, BatchTotals, LossInputs, LossOutputs, Objective, RatioLevel, policy_loss,
};
use serde_json::Value;

use super::golden::{Tally, Tensors, number, numbers, optional, or};

const RTOL: f64 = 1e-4;
const ATOL: f64 = 2e-6;

/// Weight of each reward function; 1 where none is given.
pub fn weighted(weights: &Value, functions: usize) -> Vec<f64> {
    if weights.is_null() { vec![1.0; functions] } else { numbers(weights) }
}

/// Padded rows `[rows, columns]`, flat.
pub struct Batch {
    pub columns: usize,
    pub logps: Vec<f32>,
    pub old: Vec<f32>,
    pub reference: Vec<f32>,
    pub sampling: Option<Vec<f32>>,
    pub entropy: Vec<f32>,
    pub mask: Vec<bool>,
}

impl Batch {
    pub fn read(name: &str, tensors: &Tensors) -> Self {
        let get = |k: &str| tensors.get(&format!("batch.{name}.{k}"));
        Self {
            columns: get("logps").columns(),
            logps: get("logps").data.clone(),
            old: get("old").data.clone(),
            reference: get("ref").data.clone(),
            sampling: tensors.find(&format!("batch.{name}.sampling")).map(|t| t.data.clone()),
            entropy: get("entropy").data.clone(),
            mask: get("completion_mask").mask(),
        }
    }

    /// Leaves out completions that end neither with the end token (511) nor with padding (509).
    pub fn mask_truncated(&mut self, completions: &Value) {
        for (row, c) in completions.as_array().unwrap().iter().enumerate() {
            let last = c.as_array().unwrap().last().and_then(Value::as_u64);
            if !matches!(last, Some(509 | 511)) {
                self.mask[row * self.columns..(row + 1) * self.columns].fill(false);
            }
        }
    }

    pub fn offsets(&self, rows: usize) -> Vec<usize> {
        (0..=rows).map(|r| r * self.columns).collect()
    }
}

pub struct GrpoCase<'a> {
    pub id: String,
    pub options: &'a Value,
    resolved: &'a Value,
    pub batch_json: &'a Value,
    pub mask: Vec<bool>,
    is_gmpo: bool,
    batch: Batch,
    weights: Option<Vec<f32>>,
    correction: Option<SamplerCorrection>,
}

impl<'a> GrpoCase<'a> {
    pub fn read(case: &'a Value, batches: &'a Value, tensors: &Tensors) -> Self {
        let (o, name) = (&case["options"], case["batch"].as_str().unwrap());
        let mut batch = Batch::read(name, tensors);
        let batch_json = &batches[name];
        if o["mask_truncated_completions"].as_bool() == Some(true) {
            batch.mask_truncated(&batch_json["completions"]);
        }
        // tokens of a truncated completion count as padding, tokens of the environment do not
        let own = batch.mask.clone();
        if let Some(rows) = batch_json["env_mask"].as_array() {
            for (r, row) in rows.iter().enumerate() {
                for (i, keep) in numbers(row).into_iter().enumerate() {
                    batch.mask[r * batch.columns + i] &= keep != 0.0;
                }
            }
        }
        for (x, keep) in [&mut batch.logps, &mut batch.old, &mut batch.reference, &mut batch.entropy]
            .into_iter()
            .flat_map(|v| v.iter_mut().zip(&own))
        {
            *x = if *keep { *x } else { 0.0 };
        }
        let uses_sampler = o["use_vllm"].as_bool() == Some(true);
        let correction = (uses_sampler && o["vllm_importance_sampling_correction"].as_bool() != Some(false))
            .then(|| {
                let mode = o["vllm_importance_sampling_mode"].as_str().unwrap_or("sequence_mask");
                let max = &o["vllm_importance_sampling_clip_max"];
                let is_given = o.as_object().unwrap().contains_key("vllm_importance_sampling_clip_max");
                SamplerCorrection {
                    level: if mode.starts_with("sequence") {
                        WeightLevel::Sequence
                    } else {
                        WeightLevel::Token
                    },
                    out_of_bounds: if mode.ends_with("truncate") {
                        OutOfBounds::Truncate
                    } else {
                        OutOfBounds::Mask
                    },
                    min: optional(&o["vllm_importance_sampling_clip_min"]),
                    max: if is_given { optional(max) } else { Some(3.0) },
                }
            });
        if !uses_sampler {
            batch.sampling = None;
        }
        let rows = batch.mask.len() / batch.columns;
        let weights = correction.map(|c| {
            c.weights(&batch.offsets(rows), &batch.old, batch.sampling.as_deref().unwrap(), &batch.mask)
        });
        Self {
            id: case["id"].as_str().unwrap().into(),
            options: o,
            resolved: &case["resolved"],
            batch_json,
            mask: batch.mask.clone(),
            is_gmpo: case["trainer"] == "GMPOTrainer",
            batch,
            weights,
            correction,
        }
    }

    pub fn resolved(&self, key: &str) -> usize {
        number(&self.resolved[key]) as usize
    }

    pub fn reward_weights(&self) -> Vec<f64> {
        weighted(&self.options["reward_weights"], self.batch_json["rewards"][0].as_array().unwrap().len())
    }

    fn objective(&self) -> Objective {
        let (o, d) = (self.options, Objective::default());
        let (low, high) = (number(&self.resolved["epsilon_low"]), number(&self.resolved["epsilon_high"]));
        let is_weighted = o["use_bias_correction_kl"].as_bool() != Some(false) && !self.is_gmpo;
        let kl = KlConfig {
            coefficient: or(&o["beta"], 0.0),
            gradient: if is_weighted { Gradient::Weighted } else { Gradient::Plain },
            ..KlConfig::default()
        };
        let is_sequence = o["importance_sampling_level"].as_str() == Some("sequence");
        let common = Objective {
            ratio: if is_sequence { RatioLevel::Sequence } else { RatioLevel::Token },
            clip_low: low,
            clip_high: high,
            delta: optional(&o["delta"]),
            top_entropy: or(&o["top_entropy_quantile"], 1.0),
            off_policy_limit: optional(&o["off_policy_mask_threshold"]),
            kl,
            ..d
        };
        if self.is_gmpo {
            return Objective { ratio: RatioLevel::Geometric, aggregation: Aggregation::Sequence, ..common };
        }
        let (aggregation, surrogate) = match o["loss_type"].as_str().unwrap_or("dapo") {
            "grpo" => (Aggregation::Sequence, Surrogate::Clip),
            "bnpo" | "dapo" => (Aggregation::Token, Surrogate::Clip),
            "dr_grpo" => (Aggregation::Constant, Surrogate::Clip),
            "luspo" => (Aggregation::SequenceSum, Surrogate::Clip),
            "cispo" => (Aggregation::Token, Surrogate::Cispo(Cispo { min: 0.0, max: high })),
            "sapo" => {
                let s = Sapo::default();
                let tau_pos = or(&o["sapo_temperature_pos"], s.tau_pos);
                let tau_neg = or(&o["sapo_temperature_neg"], s.tau_neg);
                (Aggregation::Sequence, Surrogate::Sapo(Sapo { tau_pos, tau_neg }))
            }
            "vespo" => {
                let v = Vespo::default();
                let v = Vespo {
                    k_pos: or(&o["vespo_k_pos"], v.k_pos),
                    lambda_pos: or(&o["vespo_lambda_pos"], v.lambda_pos),
                    k_neg: or(&o["vespo_k_neg"], v.k_neg),
                    lambda_neg: or(&o["vespo_lambda_neg"], v.lambda_neg),
                };
                (Aggregation::Token, Surrogate::Vespo(v))
            }
            other => panic!("unknown loss_type {other}"),
        };
        Objective { aggregation, surrogate, ..common }
    }

    pub fn check_sampler_weights(&self, t: &mut Tally, metrics: &Value, tensors: &Tensors) {
        let (Some(weights), Some(correction)) = (&self.weights, self.correction) else { return };
        let want = tensors.get(&format!("{}.importance_sampling_ratio", self.id));
        let got: Vec<f32> = match want.columns() {
            1 => weights.iter().step_by(self.batch.columns).copied().collect(),
            _ => weights.clone(),
        };
        t.values("sampler weights", &got, &want.data, RTOL, ATOL);
        let counted: Vec<f64> = match correction.level {
            WeightLevel::Sequence => got.iter().map(|w| f64::from(*w)).collect(),
            WeightLevel::Token => {
                got.iter().zip(&self.mask).filter(|(_, m)| **m).map(|(w, _)| f64::from(*w)).collect()
            }
        };
        let mean = counted.iter().sum::<f64>() / counted.len() as f64;
        t.value("mean weight", mean, number(&metrics["sampling/importance_sampling_ratio/mean"]), RTOL, ATOL);
        let max = counted.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        t.value(
            "greatest weight",
            max,
            number(&metrics["sampling/importance_sampling_ratio/max"]),
            RTOL,
            ATOL,
        );
    }

    pub fn check_losses(
        &self,
        t: &mut Tally,
        advantages: &[f32],
        loss: &Value,
        metrics: &Value,
        tensors: &Tensors,
    ) {
        let (mut losses, mut d_new, mut d_entropy) = (vec![], vec![], vec![]);
        let objective = self.objective();
        for m in 0..self.resolved("steps_per_generation") {
            let (out, scale) = self.micro_batch(m, advantages, &objective);
            losses.push(out.sums.loss * scale);
            d_new.extend(out.d_new.iter().map(|d| f64::from(*d) * scale));
            d_entropy.extend(out.d_entropy.iter().map(|d| f64::from(*d) * scale));
            self.check_metrics(t, &out, scale, &objective, &metrics[m]);
        }
        t.values("loss", &losses, &numbers(loss), RTOL, ATOL);
        t.values("gradient", &d_new, &tensors.get(&format!("{}.grad_logps", self.id)).data, RTOL, ATOL);
        if let Some(want) = tensors.find(&format!("{}.grad_entropy", self.id)) {
            t.values("entropy gradient", &d_entropy, &want.data, RTOL, ATOL);
        }
    }

    /// Tokens are averaged over the whole generation batch; the other losses per micro-batch.
    fn is_averaged_over_all(&self) -> bool {
        !self.is_gmpo && matches!(self.options["loss_type"].as_str(), Some("dapo" | "cispo" | "vespo") | None)
    }

    /// Loss of a micro-batch, and the factor by which the trainer's accumulation differs.
    fn micro_batch(&self, m: usize, advantages: &[f32], objective: &Objective) -> (LossOutputs, f64) {
        let b = &self.batch;
        let rows = self.resolved("micro_batch");
        let span = m * rows * b.columns..(m + 1) * rows * b.columns;
        let (new, mask) = (&b.logps[span.clone()], &b.mask[span.clone()]);
        let is_old_used = self.resolved["old_logps_used"].as_bool() == Some(true);
        let old = if is_old_used { &b.old[span.clone()] } else { new };
        let entropy = &b.entropy[span.clone()];
        let threshold = (objective.top_entropy < 1.0)
            .then(|| entropy_threshold(entropy, mask, objective.top_entropy))
            .flatten();
        let count = |mask: &[bool]| mask.iter().filter(|m| **m).count();
        let uncertain =
            entropy.iter().zip(mask).filter(|(e, m)| **m && threshold.is_none_or(|h| **e >= h)).count();
        let accumulation = self.resolved("gradient_accumulation_steps") as f64;
        let (tokens, scale) = if self.is_averaged_over_all() {
            (count(&b.mask), self.resolved("steps_per_generation") as f64 / accumulation)
        } else {
            (count(mask), 1.0 / accumulation)
        };
        let by_token: Vec<f32> =
            (m * rows..(m + 1) * rows).flat_map(|r| vec![advantages[r]; b.columns]).collect();
        let inputs = LossInputs {
            offsets: &b.offsets(rows),
            new,
            old,
            reference: (objective.kl.coefficient != 0.0).then(|| &b.reference[span.clone()]),
            sampler: b.sampling.as_deref().map(|s| &s[span.clone()]),
            entropy,
            advantages: &by_token,
            mask,
            weights: self.weights.as_deref().map(|w| &w[span.clone()]),
            drift: None,
            entropy_threshold: threshold,
            totals: BatchTotals {
                tokens,
                entropy_tokens: uncertain,
                completions: rows,
                max_new_tokens: self.resolved("max_completion_length"),
            },
            kl_coefficient: objective.kl.coefficient,
            entropy_coefficient: or(&self.options["entropy_coef"], 0.0) / accumulation / scale,
        };
        (policy_loss(&inputs, objective), scale)
    }

    fn check_metrics(
        &self,
        t: &mut Tally,
        out: &LossOutputs,
        scale: f64,
        objective: &Objective,
        want: &Value,
    ) {
        let s = &out.sums;
        let tokens = s.tokens.max(1) as f64;
        t.value("entropy", s.entropy / tokens, number(&want["entropy"]), RTOL, ATOL);
        if objective.kl.coefficient != 0.0 {
            t.value("kl", s.kl / tokens, number(&want["kl"]), RTOL, ATOL);
        }
        if !want["policy_loss"].is_null() {
            let scale = if self.is_averaged_over_all() { scale } else { 1.0 };
            let policy = (s.loss - s.entropy_bonus) * scale;
            t.value("policy_loss", policy, number(&want["policy_loss"]), RTOL, ATOL);
        }
        let is_sequence = objective.ratio == RatioLevel::Sequence;
        let mean = |all: usize, rows: usize| {
            if is_sequence { rows as f64 / out.rows.len() as f64 } else { all as f64 / tokens }
        };
        let (low, high) = (
            mean(s.clipped_low, out.rows.iter().filter(|r| r.clipped_low > 0).count()),
            mean(s.clipped_high, out.rows.iter().filter(|r| r.clipped_high > 0).count()),
        );
        if let Some(clip) = optional(&want["cispo_clip_ratio"]) {
            t.value("cispo_clip_ratio", high, clip, RTOL, 1e-6);
        }
        if let Some(phi) = optional(&want["vespo/phi_seq_mean"]) {
            let mean = out.rows.iter().map(|r| r.phi).sum::<f64>() / out.rows.len() as f64;
            t.value("phi", mean, phi, RTOL, ATOL);
        }
        if want["clip_ratio/low_mean"].is_null() {
            return;
        }
        let share = |clipped: usize, tokens: usize| match (is_sequence, tokens) {
            (true, _) => Some(f64::from(u8::from(clipped > 0))),
            (false, 0) => None,
            (false, n) => Some(clipped as f64 / n as f64),
        };
        let low_min =
            out.rows.iter().filter_map(|r| share(r.clipped_low, r.tokens)).fold(f64::INFINITY, f64::min);
        let high_max = out.rows.iter().filter_map(|r| share(r.clipped_high, r.tokens)).fold(0.0, f64::max);
        t.value("clip low", low, number(&want["clip_ratio/low_mean"]), RTOL, 1e-6);
        t.value("clip high", high, number(&want["clip_ratio/high_mean"]), RTOL, 1e-6);
        t.value("clip region", low + high, number(&want["clip_ratio/region_mean"]), RTOL, 1e-6);
        t.value("clip low_min", low_min, number(&want["clip_ratio/low_min"]), RTOL, 1e-6);
        t.value("clip high_max", high_max, number(&want["clip_ratio/high_max"]), RTOL, 1e-6);
    }
}
