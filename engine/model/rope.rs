//! Rotary position embeddings: frequencies and their scalings.
//!
//! Every scaling gives the frequencies of transformers' `modeling_rope_utils` (v5): `default`, `linear`,
//! `llama3`, `yarn`, `longrope`. `dynamic` is refused: its frequencies change with the length of a batch,
//! which no cached key survives.

use std::f64::consts::PI;

use serde_json::{Map, Value, json};

/// One rotary embedding; layers point at it by index.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeSpec {
    /// Base of the geometric series of wavelengths.
    pub theta: f64,
    /// Leading dimensions of a head that rotate (even, at most `head_dim`); the rest pass through.
    pub rotary_dim: usize,
    /// How the series is stretched for long contexts.
    pub scaling: RopeScaling,
}

/// The stretching of a [`RopeSpec`].
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    /// The plain series.
    None,
    /// Every frequency divided by `factor`.
    Linear {
        /// Stretch of the context.
        factor: f64,
    },
    /// Llama 3.1: long wavelengths divided by `factor`, short ones kept, a ramp between.
    Llama3 {
        /// Stretch of the context.
        factor: f64,
        /// Wavelengths above `original_positions / low_freq_factor` are stretched fully.
        low_freq_factor: f64,
        /// Wavelengths below `original_positions / high_freq_factor` are kept.
        high_freq_factor: f64,
        /// Context length of the original training.
        original_positions: f64,
    },
    /// YaRN (arXiv:2309.00071).
    Yarn {
        /// Stretch of the context.
        factor: f64,
        /// Context length of the original training.
        original_positions: f64,
        /// Rotations above which a dimension is kept.
        beta_fast: f64,
        /// Rotations below which a dimension is interpolated.
        beta_slow: f64,
        /// Scale of cos and sin.
        attention_factor: f64,
        /// Whether the bounds of the ramp are rounded outwards to whole dimensions.
        truncate: bool,
    },
    /// LongRoPE (arXiv:2402.13753): one factor a dimension, a short and a long list.
    LongRope {
        /// Factors for contexts up to `original_positions`; `rotary_dim / 2` of them.
        short: Vec<f64>,
        /// Factors for longer contexts; `rotary_dim / 2` of them.
        long: Vec<f64>,
        /// Context length of the original training.
        original_positions: usize,
        /// Scale of cos and sin.
        attention_factor: f64,
    },
}

impl RopeSpec {
    /// The `rotary_dim / 2` angular frequencies (radians a position) and the factor on cos and sin, for
    /// sequences of at most `positions` tokens (only LongRoPE looks at it).
    pub fn inv_freq(&self, positions: usize) -> (Vec<f64>, f64) {
        let dim = self.rotary_dim as f64;
        // Exponents, powers and quotients are rounded to f32, as torch rounds them when a model is trained: a frequency that
        // is closer to the truth turns a late position by another angle than the model has learned.
        let f32_of = |x: f64| f64::from(x as f32);
        let powers: Vec<f64> = (0..self.rotary_dim / 2)
            .map(|i| f32_of(self.theta.powf(f64::from((2 * i) as f32 / self.rotary_dim as f32))))
            .collect();
        let plain: Vec<f64> = powers.iter().map(|p| f32_of(1.0 / p)).collect();
        match &self.scaling {
            RopeScaling::None => (plain, 1.0),
            RopeScaling::Linear { factor } => (plain.iter().map(|f| f / factor).collect(), 1.0),
            &RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_positions } => {
                let stretch = |f: f64| {
                    let wavelength = 2.0 * PI / f;
                    if wavelength < original_positions / high_freq_factor {
                        f
                    } else if wavelength > original_positions / low_freq_factor {
                        f / factor
                    } else {
                        let smooth = (original_positions / wavelength - low_freq_factor)
                            / (high_freq_factor - low_freq_factor);
                        (1.0 - smooth) * f / factor + smooth * f
                    }
                };
                (plain.into_iter().map(stretch).collect(), 1.0)
            }
            &RopeScaling::Yarn {
                factor,
                original_positions,
                beta_fast,
                beta_slow,
                attention_factor,
                truncate,
            } => {
                let dimension = |rotations: f64| {
                    dim * (original_positions / (rotations * 2.0 * PI)).ln() / (2.0 * self.theta.ln())
                };
                let (mut low, mut high) = (dimension(beta_fast), dimension(beta_slow));
                if truncate {
                    (low, high) = (low.floor(), high.ceil());
                }
                (low, high) = (low.max(0.0), high.min(dim - 1.0));
                if low == high {
                    high += 0.001;
                }
                let stretch = |(i, f): (usize, f64)| {
                    let interpolated = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
                    f / factor * interpolated + f * (1.0 - interpolated)
                };
                (plain.into_iter().enumerate().map(stretch).collect(), attention_factor)
            }
            RopeScaling::LongRope { short, long, original_positions, attention_factor } => {
                let factors = if positions > *original_positions { long } else { short };
                let stretch = |(p, by): (&f64, &f64)| f32_of(1.0 / f32_of(f32_of(*by) * p));
                (powers.iter().zip(factors).map(stretch).collect(), *attention_factor)
            }
        }
    }

    /// Reads a `rope_parameters` (or older `rope_scaling`) object; errors are phrases that name the key.
    ///
    /// `original` is the top-level `original_max_position_embeddings`, which wins over the one inside.
    pub(crate) fn from_json(
        params: &Map<String, Value>,
        default_theta: f64,
        head_dim: usize,
        default_partial: f64,
        max_positions: usize,
        original: Option<usize>,
    ) -> Result<Self, String> {
        let number = |key: &str| match params.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(v) => match v.as_f64() {
                Some(x) if x.is_finite() => Ok(Some(x)),
                _ => Err(format!("rope parameter `{key}`: expected a number, found {v}")),
            },
        };
        let theta = number("rope_theta")?.unwrap_or(default_theta);
        if theta <= 1.0 || !(theta as f32).is_normal() {
            return Err(format!("rope_theta: expected more than 1 and at most 3.4e38, found {theta}"));
        }
        let partial = number("partial_rotary_factor")?.unwrap_or(default_partial);
        let rotary_dim = (head_dim as f64 * partial) as usize;
        if rotary_dim == 0 || !rotary_dim.is_multiple_of(2) || rotary_dim > head_dim {
            return Err(format!(
                "partial_rotary_factor: {partial} of head_dim {head_dim} gives {rotary_dim} rotary dimensions; expected an even number from 2 to {head_dim}"
            ));
        }
        let kind = params
            .get("rope_type")
            .or_else(|| params.get("type"))
            .and_then(Value::as_str)
            .unwrap_or("default");
        let known: &[&str] = match kind {
            "default" => &[],
            "linear" => &["factor"],
            "llama3" => &["factor", "low_freq_factor", "high_freq_factor"],
            "yarn" => &[
                "factor",
                "beta_fast",
                "beta_slow",
                "attention_factor",
                "mscale",
                "mscale_all_dim",
                "truncate",
            ],
            "longrope" | "su" => {
                &["factor", "short_factor", "long_factor", "attention_factor", "short_mscale", "long_mscale"]
            }
            other => {
                return Err(format!(
                    "rope_type: `{other}` is not supported (known: default, linear, llama3, yarn, longrope)"
                ));
            }
        };
        const COMMON: [&str; 5] =
            ["rope_theta", "rope_type", "type", "partial_rotary_factor", "original_max_position_embeddings"];
        for (key, value) in params {
            if !COMMON.contains(&key.as_str()) && !known.contains(&key.as_str()) && !value.is_null() {
                return Err(format!("rope parameter `{key}` is not supported for rope_type `{kind}`"));
            }
        }
        let positive = |key: &str| match number(key)? {
            Some(x) if x > 0.0 => Ok(x),
            Some(x) => Err(format!("rope parameter `{key}`: expected more than 0, found {x}")),
            None => Err(format!("rope parameter `{key}` is missing for rope_type `{kind}`")),
        };
        let original_positions = match original {
            Some(n) => n as f64,
            None => number("original_max_position_embeddings")?.unwrap_or(max_positions as f64),
        };
        if original_positions < 1.0 {
            return Err(format!(
                "original_max_position_embeddings: expected 1 or more, found {original_positions}"
            ));
        }
        let scaling = match kind {
            "default" => RopeScaling::None,
            "linear" => RopeScaling::Linear { factor: positive("factor")? },
            "llama3" => {
                let (low, high) = (positive("low_freq_factor")?, positive("high_freq_factor")?);
                if high <= low {
                    return Err(format!("high_freq_factor ({high}) must be above low_freq_factor ({low})"));
                }
                RopeScaling::Llama3 {
                    factor: positive("factor")?,
                    low_freq_factor: low,
                    high_freq_factor: high,
                    original_positions,
                }
            }
            "yarn" => {
                let factor = match number("factor")? {
                    Some(_) => positive("factor")?,
                    None => max_positions as f64 / original_positions,
                };
                let mscale = |by: f64| if factor <= 1.0 { 1.0 } else { 0.1 * by * factor.ln() + 1.0 };
                let attention_factor =
                    match (number("attention_factor")?, number("mscale")?, number("mscale_all_dim")?) {
                        (Some(a), _, _) => a,
                        (None, Some(m), Some(all)) if m != 0.0 && all != 0.0 => mscale(m) / mscale(all),
                        _ => mscale(1.0),
                    };
                let truncate = params.get("truncate").and_then(Value::as_bool).unwrap_or(true);
                RopeScaling::Yarn {
                    factor,
                    original_positions,
                    beta_fast: number("beta_fast")?.filter(|b| *b > 0.0).unwrap_or(32.0),
                    beta_slow: number("beta_slow")?.filter(|b| *b > 0.0).unwrap_or(1.0),
                    attention_factor,
                    truncate,
                }
            }
            _ => {
                let list = |key: &str| -> Result<Vec<f64>, String> {
                    let items: Option<Vec<f64>> = params
                        .get(key)
                        .and_then(Value::as_array)
                        .and_then(|a| a.iter().map(|v| v.as_f64().filter(|x| *x > 0.0)).collect());
                    match items {
                        Some(items) if items.len() == rotary_dim / 2 => Ok(items),
                        Some(items) => Err(format!(
                            "rope parameter `{key}`: expected {} numbers, found {}",
                            rotary_dim / 2,
                            items.len()
                        )),
                        None => Err(format!(
                            "rope parameter `{key}`: expected {} numbers above 0",
                            rotary_dim / 2
                        )),
                    }
                };
                for key in ["short_mscale", "long_mscale"] {
                    if params.get(key).is_some_and(|v| !v.is_null()) {
                        return Err(format!("rope parameter `{key}` is not supported"));
                    }
                }
                let factor = number("factor")?.unwrap_or(max_positions as f64 / original_positions);
                let attention_factor = match number("attention_factor")? {
                    Some(a) => a,
                    None if factor <= 1.0 => 1.0,
                    None => (1.0 + factor.ln() / original_positions.ln()).sqrt(),
                };
                RopeScaling::LongRope {
                    short: list("short_factor")?,
                    long: list("long_factor")?,
                    original_positions: original_positions as usize,
                    attention_factor,
                }
            }
        };
        Ok(Self { theta, rotary_dim, scaling })
    }

    /// The `rope_parameters` object that [`RopeSpec::from_json`] reads back.
    pub(crate) fn to_json(&self, head_dim: usize) -> Map<String, Value> {
        let mut out = match &self.scaling {
            RopeScaling::None => json!({"rope_type": "default"}),
            RopeScaling::Linear { factor } => json!({"rope_type": "linear", "factor": factor}),
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_positions } => json!({
                "rope_type": "llama3", "factor": factor, "low_freq_factor": low_freq_factor,
                "high_freq_factor": high_freq_factor, "original_max_position_embeddings": *original_positions as u64,
            }),
            RopeScaling::Yarn {
                factor,
                original_positions,
                beta_fast,
                beta_slow,
                attention_factor,
                truncate,
            } => {
                json!({
                    "rope_type": "yarn", "factor": factor, "original_max_position_embeddings": *original_positions as u64,
                    "beta_fast": beta_fast, "beta_slow": beta_slow, "attention_factor": attention_factor,
                    "truncate": truncate,
                })
            }
            RopeScaling::LongRope { short, long, original_positions, attention_factor } => json!({
                "rope_type": "longrope", "short_factor": short, "long_factor": long,
                "original_max_position_embeddings": original_positions, "attention_factor": attention_factor,
            }),
        };
        let mut out = out.as_object_mut().map(std::mem::take).unwrap_or_default();
        out.insert("rope_theta".into(), json!(self.theta));
        if self.rotary_dim != head_dim {
            out.insert("partial_rotary_factor".into(), json!(self.rotary_dim as f64 / head_dim as f64));
        }
        out
    }
}
