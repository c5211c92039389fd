//! A mixture of expert feed-forwards: router, dispatch, the experts' forward and backward.
//!
//! A softmax over the experts' logits chooses `per_token` experts for every token; the block's output is the sum of
//! their outputs, weighted by their probabilities (Shazeer et al. 2017, arXiv 1701.06538; as transformers'
//! `MixtralSparseMoeBlock` and `Qwen3MoeSparseMoeBlock`). Rows are grouped by expert, so that each expert multiplies
//! once; a token's sum runs over its own experts in ascending order, so it does not depend on the company that it
//! keeps. No token is dropped: experts have no capacity limit.
//!
//! Shapes: m rows, e experts, t experts a token, p = m * t pairs of (row, expert), h hidden, f an expert's width.

use std::ops::Range;

use rft_kernels::{Pool, Write, glu, glu_backward, linear, linear_dx};

use crate::model::params::SlotId;
use crate::model::policy::{Grads, Weights};
use crate::model::spec::MoeSpec;

/// Where transformers 5 keeps an expert's tensor in memory: all experts in one, gate above up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Stacked {
    /// Name of the stack `[e, 2 f, h]` or `[e, h, f]`.
    pub name: String,
    /// Which expert.
    pub expert: usize,
    /// Which half of the rows; `None` for all of them.
    pub half: Option<usize>,
}

/// The stack that would hold an expert's tensor.
pub(super) fn stacked(name: &str) -> Option<Stacked> {
    let (layer, rest) = name.split_once(".mlp.").or_else(|| name.split_once(".block_sparse_moe."))?;
    let (expert, part) = rest.strip_prefix("experts.")?.strip_suffix(".weight")?.split_once('.')?;
    let expert = expert.parse().ok()?;
    let (stack, half) = match part {
        "gate_proj" | "w1" => ("gate_up_proj", Some(0)),
        "up_proj" | "w3" => ("gate_up_proj", Some(1)),
        "down_proj" | "w2" => ("down_proj", None),
        _ => return None,
    };
    Some(Stacked { name: format!("{layer}.mlp.experts.{stack}"), expert, half })
}

/// Slots of one layer's mixture.
#[derive(Debug, Clone)]
pub struct ExpertSlots {
    /// Router `[e, h]`.
    pub router: SlotId,
    /// Gate and up `[2 f, h]` of each expert.
    pub gate_up: Vec<SlotId>,
    /// Down `[h, f]` of each expert.
    pub down: Vec<SlotId>,
}

/// Which rows went to which expert, and with what weight.
#[derive(Debug, Default)]
pub(super) struct Routing {
    /// Softmax of the router's logits `[m, e]`.
    probs: Vec<f32>,
    /// Rows of the pairs `[p]`, by expert and then by row.
    rows: Vec<u32>,
    /// Weight of each pair `[p]`.
    weights: Vec<f32>,
    /// Pairs of expert i: `starts[i]..starts[i + 1]`.
    starts: Vec<usize>,
    /// Pairs of row r in ascending order of experts: `of_row[r * t..(r + 1) * t]`.
    of_row: Vec<u32>,
    /// Experts of row r, ascending: `chosen[r * t..(r + 1) * t]`.
    chosen: Vec<u32>,
    /// All experts, the most likely first; reused from row to row.
    order: Vec<u32>,
    /// Where an expert's next pair goes.
    next: Vec<usize>,
}

/// Buffers reused from layer to layer.
#[derive(Debug, Default)]
pub(super) struct ExpertScratch {
    /// Inputs of one expert `[rows, h]`.
    x: Vec<f32>,
    /// Outputs of the pairs `[p, h]`.
    y: Vec<f32>,
    /// Gradients with respect to them, before the weights `[p, h]`.
    d_y: Vec<f32>,
    /// Gradient of the activations `[p, f]`.
    d_act: Vec<f32>,
    /// Gradient of gate and up `[p, 2 f]`.
    d_gate_up: Vec<f32>,
    /// Gradients of the pairs' weights `[p]`.
    d_weights: Vec<f32>,
    /// Gradient of the router's logits `[m, e]`.
    d_logits: Vec<f32>,
    columns: Vec<f32>,
}

impl Routing {
    fn range(&self, expert: usize) -> Range<usize> {
        self.starts[expert]..self.starts[expert + 1]
    }

    /// Chooses the experts of each row from the probabilities. Ties go to the lower index.
    fn choose(&mut self, moe: &MoeSpec) {
        let (e, t) = (moe.experts, moe.per_token);
        let m = self.probs.len() / e;
        let (chosen, order) = (&mut self.chosen, &mut self.order);
        chosen.clear();
        for probs in self.probs.chunks_exact(e) {
            order.clear();
            order.extend(0..e as u32);
            let by_probability =
                |a: &u32, b: &u32| probs[*b as usize].total_cmp(&probs[*a as usize]).then(a.cmp(b));
            if t < e {
                order.select_nth_unstable_by(t - 1, by_probability);
            }
            order[..t].sort_unstable();
            chosen.extend_from_slice(&order[..t]);
        }
        self.starts.clear();
        self.starts.resize(e + 1, 0);
        for &expert in chosen.iter() {
            self.starts[expert as usize + 1] += 1;
        }
        for i in 0..e {
            self.starts[i + 1] += self.starts[i];
        }
        self.next.clone_from(&self.starts);
        self.rows.resize(m * t, 0);
        self.weights.resize(m * t, 0.0);
        self.of_row.resize(m * t, 0);
        for (row, chosen) in chosen.chunks_exact(t).enumerate() {
            let probs = &self.probs[row * e..(row + 1) * e];
            let norm = scale(moe, chosen.iter().map(|&i| probs[i as usize]));
            for (rank, &expert) in chosen.iter().enumerate() {
                let pair = self.next[expert as usize];
                self.next[expert as usize] += 1;
                self.rows[pair] = row as u32;
                self.weights[pair] = probs[expert as usize] / norm;
                self.of_row[row * t + rank] = pair as u32;
            }
        }
    }
}

/// What the chosen probabilities are divided by.
fn scale(moe: &MoeSpec, chosen: impl Iterator<Item = f32>) -> f32 {
    if moe.renormalise { chosen.sum() } else { 1.0 }
}

/// `to[i]` = row `rows[i]` of `from [m, width]`.
fn gather(pool: &Pool, from: &[f32], rows: &[u32], width: usize, to: &mut Vec<f32>) {
    to.resize(rows.len() * width, 0.0);
    pool.map_chunks(to, width, |i, to| {
        to.copy_from_slice(&from[rows[i] as usize * width..][..width]);
    });
}

/// The block's output `y [m, h]` for inputs `x [m, h]`; keeps the routing and `gate_up [p, 2 f]` for the backward pass.
#[allow(clippy::too_many_arguments)]
pub(super) fn experts_forward(
    pool: &Pool,
    w: &Weights,
    slots: &ExpertSlots,
    moe: &MoeSpec,
    x: &[f32],
    routing: &mut Routing,
    gate_up: &mut Vec<f32>,
    act: &mut Vec<f32>,
    y: &mut Vec<f32>,
    s: &mut ExpertScratch,
) {
    let (h, e, t, f) = (w.spec.hidden, moe.experts, moe.per_token, moe.ffn);
    let m = x.len() / h;
    routing.probs.resize(m * e, 0.0);
    linear(pool, x, m, w.base.matrix(slots.router), &mut routing.probs, Write::Set);
    pool.map_chunks(&mut routing.probs, e, |_, row| softmax(row));
    routing.choose(moe);

    gate_up.resize(m * t * 2 * f, 0.0);
    act.resize(m * t * f, 0.0);
    s.y.resize(m * t * h, 0.0);
    for expert in 0..e {
        let pairs = routing.range(expert);
        let n = pairs.len();
        if n == 0 {
            continue;
        }
        gather(pool, x, &routing.rows[pairs.clone()], h, &mut s.x);
        let gate_up = &mut gate_up[pairs.start * 2 * f..pairs.end * 2 * f];
        linear(pool, &s.x, n, w.base.matrix(slots.gate_up[expert]), gate_up, Write::Set);
        let act = &mut act[pairs.start * f..pairs.end * f];
        glu(pool, gate_up, n, f, w.act(), act);
        let y = &mut s.y[pairs.start * h..pairs.end * h];
        linear(pool, act, n, w.base.matrix(slots.down[expert]), y, Write::Set);
    }
    y.resize(m * h, 0.0);
    pool.map_chunks(y, h, |row, y| {
        y.fill(0.0);
        for &pair in &routing.of_row[row * t..(row + 1) * t] {
            let weight = routing.weights[pair as usize];
            let from = &s.y[pair as usize * h..][..h];
            y.iter_mut().zip(from).for_each(|(y, v)| *y += weight * v);
        }
    });
}

/// Gradients of [`experts_forward`]: `dx [m, h]` is overwritten, parameters' gradients are added.
#[allow(clippy::too_many_arguments)]
pub(super) fn experts_backward(
    pool: &Pool,
    w: &Weights,
    slots: &ExpertSlots,
    moe: &MoeSpec,
    x: &[f32],
    routing: &Routing,
    gate_up: &[f32],
    act: &mut Vec<f32>,
    dy: &[f32],
    dx: &mut Vec<f32>,
    grads: &mut Grads,
    s: &mut ExpertScratch,
) {
    let (h, e, t, f) = (w.spec.hidden, moe.experts, moe.per_token, moe.ffn);
    let (m, pairs) = (x.len() / h, gate_up.len() / (2 * f));
    act.resize(pairs * f, 0.0);
    glu(pool, gate_up, pairs, f, w.act(), act);
    s.d_act.resize(pairs * f, 0.0);
    gather(pool, dy, &routing.rows, h, &mut s.d_y);
    for expert in 0..e {
        let of = routing.range(expert);
        if of.is_empty() {
            continue;
        }
        let d_act = &mut s.d_act[of.start * f..of.end * f];
        let d_y = &s.d_y[of.start * h..of.end * h];
        let down = w.base.matrix(slots.down[expert]);
        linear_dx(pool, d_y, of.len(), down, d_act, Write::Set);
    }
    // The output is weight * down(act): the weight's gradient is the product of act and its gradient without the weight.
    s.d_weights = pool.map_chunks(&mut s.d_act, f, |pair, d| {
        let slope: f32 = d.iter().zip(&act[pair * f..]).map(|(d, a)| d * a).sum();
        d.iter_mut().for_each(|d| *d *= routing.weights[pair]);
        slope
    });
    pool.map_chunks(&mut s.d_y, h, |pair, d| d.iter_mut().for_each(|d| *d *= routing.weights[pair]));
    s.d_gate_up.resize(gate_up.len(), 0.0);
    glu_backward(pool, gate_up, pairs, f, w.act(), &s.d_act, &mut s.d_gate_up, None);
    s.y.resize(pairs * h, 0.0);
    for expert in 0..e {
        let of = routing.range(expert);
        if of.is_empty() {
            continue;
        }
        let n = of.len();
        let (d_y, act) = (&s.d_y[of.start * h..of.end * h], &act[of.start * f..of.end * f]);
        let d_gate_up = &s.d_gate_up[of.start * 2 * f..of.end * 2 * f];
        let down = slots.down[expert];
        let (base, waiting, columns) = (&mut grads.base, &mut grads.base_waiting, &mut s.columns);
        w.base.add_weight_gradient(pool, down, d_y, act, n, base, waiting, columns);
        let gate_up = slots.gate_up[expert];
        if w.base.grad_range(gate_up).is_some() {
            gather(pool, x, &routing.rows[of.clone()], h, &mut s.x);
            w.base.add_weight_gradient(pool, gate_up, d_gate_up, &s.x, n, base, waiting, columns);
        }
        let matrix = w.base.matrix(gate_up);
        let d_x = &mut s.y[of.start * h..of.end * h];
        linear_dx(pool, d_gate_up, n, matrix, d_x, Write::Set);
    }

    s.d_logits.resize(m * e, 0.0);
    let d_weights = &s.d_weights;
    pool.map_chunks(&mut s.d_logits, e, |row, d| {
        let pairs = &routing.of_row[row * t..(row + 1) * t];
        router_row_backward(moe, routing, row, pairs, d_weights, d);
    });
    let (base, waiting, columns) = (&mut grads.base, &mut grads.base_waiting, &mut s.columns);
    w.base.add_weight_gradient(pool, slots.router, &s.d_logits, x, m, base, waiting, columns);
    dx.resize(m * h, 0.0);
    linear_dx(pool, &s.d_logits, m, w.base.matrix(slots.router), dx, Write::Set);
    pool.map_chunks(dx, h, |row, dx| {
        for &pair in &routing.of_row[row * t..(row + 1) * t] {
            let from = &s.y[pair as usize * h..][..h];
            dx.iter_mut().zip(from).for_each(|(dx, d)| *dx += d);
        }
    });
}

/// From the gradients of a row's weights to those of its router logits `d [e]`.
fn router_row_backward(
    moe: &MoeSpec,
    routing: &Routing,
    row: usize,
    pairs: &[u32],
    d_weights: &[f32],
    d: &mut [f32],
) {
    let e = moe.experts;
    let probs = &routing.probs[row * e..(row + 1) * e];
    let expert_of = |pair: u32| routing.starts.partition_point(|&start| start <= pair as usize) - 1;
    let norm = scale(moe, pairs.iter().map(|&pair| probs[expert_of(pair)]));
    let shared: f32 = if moe.renormalise {
        pairs.iter().map(|&pair| d_weights[pair as usize] * routing.weights[pair as usize]).sum()
    } else {
        0.0
    };
    d.fill(0.0);
    for &pair in pairs {
        d[expert_of(pair)] = (d_weights[pair as usize] - shared) / norm;
    }
    let mean: f32 = d.iter().zip(probs).map(|(d, p)| d * p).sum();
    d.iter_mut().zip(probs).for_each(|(d, p)| *d = p * (*d - mean));
}

/// In place, over one row in order.
fn softmax(row: &mut [f32]) {
    let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut sum = 0.0;
    for x in row.iter_mut() {
        *x = (*x - max).exp();
        sum += *x;
    }
    row.iter_mut().for_each(|x| *x /= sum);
}
