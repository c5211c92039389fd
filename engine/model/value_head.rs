//! The critic's head: a linear layer from the final normed hidden state to one number, the value of a state.
//!
//! It stands beside the decoder's arenas, so that loading, export and the reference never meet it. Its sums run over
//! one row at a time and rows in order, like every other's.

/// Weights `[hidden]` and a bias, in one vector; all zero at the start, so that a first value is 0.
#[derive(Debug, Clone, PartialEq)]
pub struct ValueHead {
    /// The weights, then the bias.
    pub weights: Vec<f32>,
}

impl ValueHead {
    /// A head that says 0 everywhere.
    pub fn new(hidden: usize) -> Self {
        Self { weights: vec![0.0; hidden + 1] }
    }

    /// The value of a row `[hidden]`.
    pub fn value(&self, row: &[f32]) -> f32 {
        let (weights, bias) = self.weights.split_at(row.len());
        let sum: f64 = row.iter().zip(weights).map(|(x, w)| f64::from(*x) * f64::from(*w)).sum();
        (sum + f64::from(bias[0])) as f32
    }

    /// Adds `d_value` times the value's gradient by the row to `d_row`, and by the head to `grad`.
    pub fn backward(&self, row: &[f32], d_value: f32, d_row: &mut [f32], grad: &mut [f32]) {
        for (d, w) in d_row.iter_mut().zip(&self.weights) {
            *d += d_value * w;
        }
        for (g, x) in grad.iter_mut().zip(row.iter().chain(&[1.0])) {
            *g += d_value * x;
        }
    }
}
