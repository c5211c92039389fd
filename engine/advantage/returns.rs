//! Advantages by token: discounted returns, generalised advantage estimation, whitening.
//!
//! Rows by `offsets` (rows + 1 numbers) into flat slices. Masked-out tokens (a tool's answer inside a completion) are
//! skipped: what follows them is carried over them, neither discounted nor counted (as in verl,
//! `verl/trainer/ppo/core_algos.py`).

/// Advantages and value targets.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct TokenAdvantages {
    /// By token, not whitened; a masked-out token repeats its successor's.
    pub advantages: Vec<f64>,
    /// `advantages + values`.
    pub returns: Vec<f64>,
}

/// Generalised advantage estimation (Schulman et al. 2016, arXiv 1506.02438, eq. 16).
pub fn gae(
    offsets: &[usize],
    rewards: &[f64],
    values: &[f32],
    mask: &[bool],
    gamma: f64,
    lambda: f64,
) -> TokenAdvantages {
    let mut out = TokenAdvantages { advantages: vec![0.0; rewards.len()], returns: vec![0.0; rewards.len()] };
    for row in offsets.windows(2) {
        let (mut next_value, mut carried) = (0.0, 0.0);
        for t in (row[0]..row[1]).rev() {
            let value = f64::from(values[t]);
            if mask[t] {
                carried = rewards[t] + gamma * next_value - value + gamma * lambda * carried;
                next_value = value;
            }
            out.advantages[t] = carried;
            out.returns[t] = carried + value;
        }
    }
    out
}

/// Sum of the rewards from each token on, discounted by `gamma` a token (REINFORCE++, Hu et al. 2025, arXiv 2501.03262).
/// A masked-out token has 0.
pub fn discounted_returns(offsets: &[usize], rewards: &[f64], mask: &[bool], gamma: f64) -> Vec<f64> {
    let mut out = vec![0.0; rewards.len()];
    for row in offsets.windows(2) {
        let mut running = 0.0;
        for t in (row[0]..row[1]).rev().filter(|&t| mask[t]) {
            running = rewards[t] + gamma * running;
            out[t] = running;
        }
    }
    out
}

/// Brings `values` to mean 0 and deviation 1 over the masked-in tokens (n − 1 in the variance, 1e-8 added to it).
/// Masked-out values are shifted and scaled alike.
pub fn whiten(values: &mut [f64], mask: &[bool]) {
    let present: Vec<f64> = values.iter().zip(mask).filter(|(_, m)| **m).map(|(v, _)| *v).collect();
    if present.len() < 2 {
        return;
    }
    let n = present.len() as f64;
    let mean = present.iter().sum::<f64>() / n;
    let variance = present.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / (n - 1.0);
    let scale = 1.0 / (variance + 1e-8).sqrt();
    values.iter_mut().for_each(|v| *v = (*v - mean) * scale);
}

/// One number a completion, repeated for each of its tokens; 0 where masked out.
pub fn by_token(offsets: &[usize], values: &[f32], mask: &[bool]) -> Vec<f64> {
    let rows = offsets.windows(2).zip(values);
    let spread = rows.flat_map(|(row, &v)| (row[0]..row[1]).map(move |t| (t, f64::from(v))));
    spread.map(|(t, v)| if mask[t] { v } else { 0.0 }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lambda_one_is_the_return_minus_the_value() {
        let (rewards, values) = ([0.0, 0.5, 1.0], [0.2f32, 0.4, 0.1]);
        let out = gae(&[0, 3], &rewards, &values, &[true; 3], 1.0, 1.0);
        assert!((out.returns[0] - 1.5).abs() < 1e-7 && (out.advantages[0] - 1.3).abs() < 1e-7);
    }

    #[test]
    fn a_masked_token_neither_discounts_nor_counts() {
        let mask = [true, false, true];
        assert_eq!(discounted_returns(&[0, 3], &[0.0, 9.0, 1.0], &mask, 0.5), [0.5, 0.0, 1.0]);
        let out = gae(&[0, 3], &[0.0, 9.0, 1.0], &[0.0; 3], &mask, 0.5, 1.0);
        assert_eq!(out.advantages, [0.5, 1.0, 1.0]);
    }

    #[test]
    fn whitening_is_over_the_mask() {
        let mut v = vec![1.0, 100.0, 3.0];
        whiten(&mut v, &[true, false, true]);
        assert!((v[0] + v[2]).abs() < 1e-12 && (v[2] - 0.5f64.sqrt()).abs() < 1e-6);
    }
}
