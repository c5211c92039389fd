//! Memory that passes take by the number of their rows: what `Trainer` and `PagedDecoder` allocate, buffer by buffer.
//!
//! Lists of widths stand beside the structures they count (`LayerActs`, `LayerScratch`, the trainer's own buffers); the test of
//! `tests/memory.rs` holds their sum against the peak of whole runs.

use rft_kernels::held_bytes;

use crate::model::policy::Weights;
use crate::model::spec::LayerSpec;

/// Bytes a row beside its numbers: token, position, keys, targets, scores and their gradients.
const RECORD_BYTES: usize = 96;

/// Widths (f32 numbers a row) of one layer's `LayerActs`.
fn kept(w: &Weights, layer: &LayerSpec) -> Vec<usize> {
    let s = w.spec;
    let mut widths = vec![s.hidden, qkv(w), s.heads * s.head_dim, s.hidden];
    if s.sandwich_norms {
        widths.extend([s.hidden, s.hidden]);
    }
    match (&s.moe, layer.experts) {
        (Some(moe), true) => widths.extend([moe.per_token * 2 * moe.ffn, moe.experts, 3 * moe.per_token]),
        _ => widths.push(2 * s.ffn),
    }
    widths
}

fn qkv(w: &Weights) -> usize {
    (w.spec.heads + 2 * w.spec.kv_heads) * w.spec.head_dim
}

/// The widest input of a projection.
fn widest_input(w: &Weights) -> usize {
    let dense = w.spec.layer_specs.iter().any(|layer| !layer.experts);
    w.spec.hidden.max(w.spec.heads * w.spec.head_dim).max(if dense { w.spec.ffn } else { 0 })
}

/// Widths of what a forward pass of any layer works on: `LayerScratch` and the residual stream.
fn forward_scratch(w: &Weights) -> Vec<usize> {
    let s = w.spec;
    let mut widths = vec![s.hidden, s.hidden, qkv(w), s.hidden];
    if s.layer_specs.iter().any(|layer| !layer.experts) {
        widths.push(s.ffn);
    }
    if let Some(moe) = &s.moe {
        // activations, outputs and one expert's inputs
        widths.extend([moe.per_token * moe.ffn, moe.per_token * s.hidden, s.hidden]);
    }
    if w.base.matrix(w.slots.embed).bf16.is_some() {
        // rows packed for a product
        widths.push(widest_input(w) / 2);
    }
    if let Some(adapter) = w.adapter {
        let rank = adapter.config.rank;
        widths.extend([rank, widest_input(w).max(qkv(w))]);
        if adapter.config.dropout > 0.0 {
            widths.push(widest_input(w));
        }
    }
    // keys as tiles
    widths.push(s.kv_heads * s.head_dim);
    widths
}

/// Widths of what a backward pass adds to that: the normed end, gradients of everything that is live.
fn backward_scratch(w: &Weights) -> Vec<usize> {
    let s = w.spec;
    let mut widths = vec![s.hidden, s.hidden, s.hidden, s.hidden, s.heads * s.head_dim, qkv(w)];
    if s.sandwich_norms {
        widths.push(s.hidden);
    }
    if s.layer_specs.iter().any(|layer| !layer.experts) {
        widths.extend([s.ffn, 2 * s.ffn]);
    }
    if let Some(moe) = &s.moe {
        widths.extend([
            moe.per_token * s.hidden,
            moe.per_token * moe.ffn,
            moe.per_token * 2 * moe.ffn,
            moe.experts,
        ]);
    }
    if let Some(adapter) = w.adapter {
        widths.push(adapter.config.rank);
    }
    // values as tiles
    widths.push(s.kv_heads * s.head_dim);
    widths
}

fn buffers(widths: &[usize], rows: usize) -> usize {
    widths.iter().map(|width| held_bytes(4 * rows * width)).sum()
}

/// Bytes of a training pass over `rows` rows with the first `recompute` layers' activations made again.
pub fn training_bytes(w: &Weights, rows: usize, recompute: usize) -> usize {
    let recompute = recompute.min(w.spec.layers - 1);
    let layers =
        w.spec.layer_specs[recompute..].iter().map(|layer| buffers(&kept(w, layer), rows)).sum::<usize>();
    layers
        + recompute * buffers(&[w.spec.hidden], rows)
        + buffers(&forward_scratch(w), rows)
        + buffers(&backward_scratch(w), rows)
        + rows * RECORD_BYTES
}

/// Bytes that the input gradients of the embedding wait in until the end of an update of `rows` rows in all.
pub fn waiting_bytes(w: &Weights, rows: usize) -> usize {
    match w.base.grad_range(w.slots.embed) {
        Some(_) => buffers(&[w.spec.hidden, 1], rows),
        None => 0,
    }
}

/// Bytes of a rollout's pass over `rows` rows.
pub fn rollout_bytes(w: &Weights, rows: usize) -> usize {
    let layer = w.spec.layer_specs.iter().map(|layer| buffers(&kept(w, layer), rows)).max().unwrap_or(0);
    layer + buffers(&forward_scratch(w), rows)
}
