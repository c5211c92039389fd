//! The training forward and backward: packed, prefix-shared sequences in, logprobs out, gradients back.
//!
//! A [`PackedBatch`] holds the tokens of whole groups: a group's prompt once, its completions behind it, each
//! seeing the prompt's keys and values. Per layer only what `LayerActs` lists is kept. The vocabulary
//! projection runs in chunks of targets, forward and again in the backward, so no `[tokens, vocab]` tensor exists.
//!
//! Shapes: m rows, t targets, h hidden, v vocab.

use rft_kernels::{
    Pool, RowStats, STEP, Segment, Warp, Write, glu, glu_backward, linear_dx, qk_rope, qk_rope_backward,
    rms_norm_backward, round_kv, row_backward, scatter_add_rows, segment_attention_backward, warp_row,
};

use crate::config::Precision;
use crate::model::decoder::{Attend, LayerActs, LayerScratch, layer_again, layer_forward};
use crate::model::experts::experts_backward;
use crate::model::params::SlotId;
use crate::model::policy::{Grads, Projection, Weights};
use crate::model::value_head::ValueHead;
use crate::types::TokenId;

/// A token whose logprob is wanted: `token` drawn from the distribution at `row`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Target {
    /// Row of the batch whose hidden state predicts it.
    pub row: usize,
    /// The token.
    pub token: TokenId,
}

/// Packed sequences of one micro-batch.
#[derive(Debug, Clone, Default)]
pub struct PackedBatch {
    /// Token of each row `[m]`.
    pub tokens: Vec<TokenId>,
    /// Position of each row in its own sequence `[m]`.
    pub positions: Vec<u32>,
    /// Which rows see which.
    pub segments: Vec<Segment>,
    /// Wanted logprobs `[t]`, in the order of the results.
    pub targets: Vec<Target>,
    /// Identity of each row `[m]`, the same in whatever micro-batch it is computed: the key of its dropout mask.
    pub row_keys: Vec<u64>,
    /// Updates before this one; `None` in a pass without dropout, as reference and old logprobs are.
    pub update: Option<u64>,
}

/// Logprobs (natural log) and entropies (nats) of a batch's targets, both `[t]`, under the stated distribution.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Scores {
    /// log p(token).
    pub logprobs: Vec<f32>,
    /// Entropy of the distribution that the token is drawn from.
    pub entropies: Vec<f32>,
}

/// Buffers of a training pass, kept between micro-batches.
#[derive(Debug, Default)]
pub struct Trainer {
    /// Layers, from the first, of which only the input is kept; the backward pass makes their activations again.
    pub recompute: usize,
    acts: Vec<LayerActs>,
    inputs: Vec<Vec<f32>>,
    h: Vec<f32>,
    final_normed: Vec<f32>,
    /// Gradient of `final_normed` that a critic left before the backward pass; else empty.
    d_normed: Vec<f32>,
    scratch: LayerScratch,
    back: BackScratch,
    logits: Vec<f32>,
    raw: Vec<f32>,
    chunk: Vec<f32>,
    d_chunk: Vec<f32>,
    embed_rows: Vec<f32>,
    embed_ids: Vec<u32>,
}

#[derive(Debug, Default)]
struct BackScratch {
    dh: Vec<f32>,
    dx: Vec<f32>,
    d_act: Vec<f32>,
    d_gate_up: Vec<f32>,
    d_attn: Vec<f32>,
    d_qkv: Vec<f32>,
    d_delta: Vec<f32>,
    columns: Vec<f32>,
}

/// Bytes that the chunk of logits may take; a chunk has at least 8 targets. Each chunk reads the head and its gradient once.
const LOGITS_CHUNK_BYTES: usize = 64 << 20;

/// Targets whose logits are alive at once.
pub(crate) fn chunk_targets(vocab: usize) -> usize {
    let targets = (LOGITS_CHUNK_BYTES / (4 * vocab)).clamp(8, 512);
    if targets > STEP { targets / STEP * STEP } else { targets }
}

impl Trainer {
    /// Makes room for batches of up to `rows` rows with the activations of `kept` layers: buffers that grow from batch to batch would
    /// come to hold up to twice as much.
    fn reserve(&mut self, w: &Weights, rows: usize, kept: usize) {
        let s = w.spec;
        let (hidden, attn) = (rows * s.hidden, rows * s.heads * s.head_dim);
        let qkv = attn + 2 * rows * s.kv_heads * s.head_dim;
        let experts = s.moe.as_ref().map_or(0, |moe| moe.per_token * 2 * moe.ffn);
        self.acts.resize_with(self.acts.len().max(kept), LayerActs::default);
        for (acts, layer) in self.acts[..kept].iter_mut().rev().zip(s.layer_specs.iter().rev()) {
            let gate_up = if layer.experts { experts } else { 2 * s.ffn };
            make_room(&mut acts.h_in, hidden);
            make_room(&mut acts.qkv, qkv);
            make_room(&mut acts.attn, attn);
            make_room(&mut acts.h_mid, hidden);
            make_room(&mut acts.gate_up, rows * gate_up);
            if s.sandwich_norms {
                make_room(&mut acts.o, hidden);
                make_room(&mut acts.down, hidden);
            }
        }
        self.inputs.iter_mut().for_each(|h| make_room(h, hidden));
        let scratch = [&mut self.scratch.x, &mut self.scratch.delta, &mut self.h, &mut self.final_normed];
        scratch.into_iter().for_each(|x| make_room(x, hidden));
        make_room(&mut self.scratch.qkv, qkv);
        make_room(&mut self.logits, chunk_targets(s.vocab).min(rows) * s.vocab);
        let dense = if s.layer_specs.iter().any(|layer| !layer.experts) { rows * s.ffn } else { 0 };
        make_room(&mut self.scratch.act, dense);
    }

    /// As [`Trainer::forward`] and [`Trainer::backward`] will need it, for batches of up to `rows` rows, `all` together.
    pub fn reserve_training(&mut self, w: &Weights, rows: usize, all: usize) {
        let s = w.spec;
        let again = self.recomputed(w);
        self.inputs.resize_with(again, Vec::new);
        self.reserve(w, rows, s.layers - again);
        let b = &mut self.back;
        let attn = rows * s.heads * s.head_dim;
        for x in [&mut self.d_normed, &mut b.dh, &mut b.dx] {
            make_room(x, rows * s.hidden);
        }
        make_room(&mut b.d_attn, attn);
        make_room(&mut b.d_qkv, attn + 2 * rows * s.kv_heads * s.head_dim);
        if s.layer_specs.iter().any(|layer| !layer.experts) {
            make_room(&mut b.d_act, rows * s.ffn);
            make_room(&mut b.d_gate_up, 2 * rows * s.ffn);
        }
        if w.base.grad_range(w.slots.embed).is_some() {
            make_room(&mut self.embed_rows, all * s.hidden);
        }
    }

    /// As [`Trainer::score`] will need it.
    pub fn reserve_scoring(&mut self, w: &Weights, rows: usize) {
        self.reserve(w, rows, 1);
    }

    /// Gives all buffers back.
    pub fn rest(&mut self) {
        *self = Self { recompute: self.recompute, ..Self::default() };
    }

    /// Logprobs and entropies of the batch's targets; activations are kept for [`Trainer::backward`].
    pub fn forward(&mut self, pool: &Pool, w: &Weights, batch: &PackedBatch, warp: &Warp) -> Scores {
        let again = self.recomputed(w);
        self.run(pool, w, batch, again, true);
        self.head_forward(pool, w, batch, warp)
    }

    /// As [`Trainer::forward`], keeping nothing: for reference logprobs.
    pub fn score(&mut self, pool: &Pool, w: &Weights, batch: &PackedBatch, warp: &Warp) -> Scores {
        self.run(pool, w, batch, w.spec.layers - 1, false);
        self.head_forward(pool, w, batch, warp)
    }

    /// As [`Trainer::forward`] for a critic alone: no logits. With `keep`, a backward pass may follow.
    pub fn forward_hidden(&mut self, pool: &Pool, w: &Weights, batch: &PackedBatch, keep: bool) {
        match keep {
            true => self.run(pool, w, batch, self.recomputed(w), true),
            false => self.run(pool, w, batch, w.spec.layers - 1, false),
        }
    }

    /// The value of each target's row, after any forward pass of the same batch.
    pub fn values(&self, batch: &PackedBatch, head: &ValueHead) -> Vec<f32> {
        let hidden = head.weights.len() - 1;
        batch.targets.iter().map(|t| head.value(&self.final_normed[t.row * hidden..][..hidden])).collect()
    }

    /// Adds the head's gradient of `sum(d_values * values)` to `grad`, targets in order; the hidden states' share waits
    /// for [`Trainer::backward`] of the same batch.
    pub fn values_backward(
        &mut self,
        batch: &PackedBatch,
        head: &ValueHead,
        d_values: &[f32],
        grad: &mut [f32],
    ) {
        let hidden = head.weights.len() - 1;
        self.d_normed.clear();
        self.d_normed.resize(self.final_normed.len(), 0.0);
        for (target, &d) in batch.targets.iter().zip(d_values) {
            let row = target.row * hidden..(target.row + 1) * hidden;
            head.backward(&self.final_normed[row.clone()], d, &mut self.d_normed[row], grad);
        }
    }

    /// Layers to make again in the backward pass: the last one's activations are always there.
    fn recomputed(&self, w: &Weights) -> usize {
        self.recompute.min(w.spec.layers - 1)
    }

    /// Runs all layers. The first `passing` share a set of activations, of which at most their `inputs` are kept. Leaves the
    /// final norm's output.
    fn run(&mut self, pool: &Pool, w: &Weights, batch: &PackedBatch, passing: usize, inputs: bool) {
        self.acts.resize_with(self.acts.len().max(w.spec.layers - passing), LayerActs::default);
        if inputs {
            self.inputs.resize_with(passing, Vec::new);
        }
        self.scratch.project.drop = batch.update.map(|update| (update, batch.row_keys.clone()));
        w.embed(pool, &batch.tokens, &mut self.h);
        for layer in 0..w.spec.layers {
            let attend = Attend::Segments(&batch.segments);
            let acts = &mut self.acts[layer.saturating_sub(passing)];
            if inputs && layer < passing {
                self.inputs[layer].clone_from(&self.h);
            }
            layer_forward(pool, w, layer, &batch.positions, attend, &mut self.h, acts, &mut self.scratch);
        }
        self.d_normed.clear();
        w.norm(pool, w.slots.final_norm, &self.h, &mut self.final_normed);
    }

    /// Adds the gradients of `sum(d_logprobs * logprobs + d_entropies * entropies)` to `grads`, after
    /// [`Trainer::forward`] of the same batch, and of what [`Trainer::values_backward`] left. Both slices are empty
    /// where only that is wanted. The embedding's share waits for [`Trainer::finish`].
    #[allow(clippy::too_many_arguments)]
    pub fn backward(
        &mut self,
        pool: &Pool,
        w: &Weights,
        batch: &PackedBatch,
        warp: &Warp,
        d_logprobs: &[f32],
        d_entropies: &[f32],
        grads: &mut Grads,
    ) {
        self.head_backward(pool, w, batch, warp, d_logprobs, d_entropies, grads);
        let again = self.recomputed(w);
        for layer in (w.lowest_trained_layer()..w.spec.layers).rev() {
            let (acts, scratch) = (&mut self.acts[layer.saturating_sub(again)], &mut self.scratch);
            if layer < again {
                let h = &mut self.inputs[layer];
                layer_again(pool, w, layer, &batch.positions, &batch.segments, h, acts, scratch);
            }
            layer_backward(pool, w, layer, batch, acts, scratch, &mut self.back, grads);
        }
        if w.base.grad_range(w.slots.embed).is_some() {
            let scale = w.spec.embed_scale;
            self.embed_rows.extend(self.back.dh.iter().map(|d| d * scale));
            self.embed_ids.extend_from_slice(&batch.tokens);
        }
    }

    /// Adds what the micro-batches since the last call have left: rows of unfinished blocks (bf16), then the embedding's input
    /// gradients, rows in order, after all of the head's: so weights sum in the same order however the batch was split.
    pub fn finish(&mut self, pool: &Pool, w: &Weights, grads: &mut Grads) {
        w.base.finish_weight_gradients(pool, &mut grads.base, &mut grads.base_waiting);
        if let Some(adapter) = w.adapter {
            let (grads, waiting) = (&mut grads.adapter, &mut grads.adapter_waiting);
            adapter.arena.finish_weight_gradients(pool, grads, waiting);
        }
        if let Some(range) = w.base.grad_range(w.slots.embed) {
            let table = w.base.matrix(w.slots.embed);
            scatter_add_rows(
                pool,
                &self.embed_rows,
                &self.embed_ids,
                table.n,
                table.k,
                &mut grads.base[range],
            );
        }
        self.embed_rows.clear();
        self.embed_ids.clear();
        w.base.clear_frozen(&mut grads.base);
        if let Some(adapter) = w.adapter {
            adapter.arena.clear_frozen(&mut grads.adapter);
        }
    }

    fn gather_chunk(&mut self, targets: &[Target], hidden: usize) {
        self.chunk.clear();
        for target in targets {
            self.chunk.extend_from_slice(&self.final_normed[target.row * hidden..(target.row + 1) * hidden]);
        }
    }

    fn head_forward(&mut self, pool: &Pool, w: &Weights, batch: &PackedBatch, warp: &Warp) -> Scores {
        let (hidden, vocab) = (w.spec.hidden, w.spec.vocab);
        let mut scores = Scores::default();
        for targets in batch.targets.chunks(chunk_targets(vocab)) {
            self.gather_chunk(targets, hidden);
            w.logits(pool, &self.chunk, &mut self.logits);
            for (stats, logit) in warp_rows(pool, &mut self.logits, vocab, targets, warp) {
                scores.logprobs.push(logit - stats.lse);
                scores.entropies.push(stats.entropy);
            }
        }
        scores
    }

    /// Leaves the gradient of the residual stream in `back.dh`.
    #[allow(clippy::too_many_arguments)]
    fn head_backward(
        &mut self,
        pool: &Pool,
        w: &Weights,
        batch: &PackedBatch,
        warp: &Warp,
        d_logprobs: &[f32],
        d_entropies: &[f32],
        grads: &mut Grads,
    ) {
        let (hidden, vocab) = (w.spec.hidden, w.spec.vocab);
        let head = w.base.matrix(w.slots.head);
        // what a critic left stays
        self.d_normed.resize(self.h.len(), 0.0);
        let step = chunk_targets(vocab);
        // one gradient a target, or none at all
        for (c, targets) in batch.targets[..d_logprobs.len()].chunks(step).enumerate() {
            self.gather_chunk(targets, hidden);
            w.logits(pool, &self.chunk, &mut self.logits);
            if w.spec.final_softcap.is_some() {
                self.raw.clone_from(&self.logits);
            }
            let stats = warp_rows(pool, &mut self.logits, vocab, targets, warp);
            let (raw, cap) = (&self.raw, w.spec.final_softcap);
            pool.map_chunks(&mut self.logits, vocab, |i, row| {
                let (at, token) = (c * step + i, targets[i].token);
                row_backward(row, &stats[i].0, warp.temperature, token, d_logprobs[at], d_entropies[at]);
                if let Some(cap) = cap {
                    for (d, capped) in row.iter_mut().zip(&raw[i * vocab..]) {
                        *d *= 1.0 - (capped / cap).powi(2);
                    }
                }
            });
            self.d_chunk.resize(self.chunk.len(), 0.0);
            linear_dx(pool, &self.logits, targets.len(), head, &mut self.d_chunk, Write::Set);
            let (base, waiting) = (&mut grads.base, &mut grads.base_waiting);
            let (d_logits, columns) = (&self.logits, &mut self.back.columns);
            w.base.add_weight_gradient(
                pool,
                w.slots.head,
                d_logits,
                &self.chunk,
                targets.len(),
                base,
                waiting,
                columns,
            );
            for (target, d_row) in targets.iter().zip(self.d_chunk.chunks_exact(hidden)) {
                let sum = &mut self.d_normed[target.row * hidden..(target.row + 1) * hidden];
                sum.iter_mut().zip(d_row).for_each(|(a, b)| *a += b);
            }
        }
        self.back.dh.clear();
        self.back.dh.resize(self.h.len(), 0.0);
        norm_backward(pool, w, w.slots.final_norm, &self.h, &self.d_normed, &mut self.back.dh, grads);
    }
}

/// Capacity for `len` numbers; what the buffer holds is lost where it is too small.
fn make_room(x: &mut Vec<f32>, len: usize) {
    if x.capacity() < len {
        // the old buffer goes before the new one comes
        *x = Vec::new();
        x.reserve_exact(len);
    }
}

/// Warps the rows of a chunk of logits; gives each row's statistics and its target's warped logit.
fn warp_rows(
    pool: &Pool,
    logits: &mut [f32],
    vocab: usize,
    targets: &[Target],
    warp: &Warp,
) -> Vec<(RowStats, f32)> {
    pool.map_chunks(logits, vocab, |i, row| {
        let stats = warp_row(row, warp, &mut Vec::new());
        (stats, row[targets[i].token as usize])
    })
}

/// `dx +=` the gradient of an RMS norm, and its weight's gradient where it trains.
fn norm_backward(
    pool: &Pool,
    w: &Weights,
    id: SlotId,
    x: &[f32],
    dy: &[f32],
    dx: &mut [f32],
    grads: &mut Grads,
) {
    let (eps, offset) = (w.spec.norm_eps, w.spec.norm_offset);
    let dw = w.base.grad_range(id).map(|range| &mut grads.base[range]);
    rms_norm_backward(pool, x, w.base.values(id), eps, offset, dy, dx, dw);
}

/// Turns `back.dh`, the gradient of a layer's output, into that of its input.
#[allow(clippy::too_many_arguments)]
fn layer_backward(
    pool: &Pool,
    w: &Weights,
    layer: usize,
    batch: &PackedBatch,
    acts: &LayerActs,
    s: &mut LayerScratch,
    b: &mut BackScratch,
    grads: &mut Grads,
) {
    let slots = &w.slots.layers[layer];
    let shape = w.attention(layer);
    let m = batch.tokens.len();

    w.norm(pool, slots.mlp_norm, &acts.h_mid, &mut s.x);
    let d_down = through_sandwich(pool, w, slots.post_mlp_norm, &acts.down, &b.dh, &mut b.d_delta, grads);
    if let (Some(experts), Some(moe)) = (&slots.experts, &w.spec.moe) {
        let (x, act, dx) = (&s.x, &mut s.act, &mut b.dx);
        let (routing, gate_up) = (&acts.routing, &acts.gate_up);
        experts_backward(pool, w, experts, moe, x, routing, gate_up, act, d_down, dx, grads, &mut s.experts);
    } else {
        let (f, act, gate_up) = (w.spec.ffn, w.act(), &acts.gate_up);
        let (d_act, d_gate_up, project) = (&mut b.d_act, &mut b.d_gate_up, &mut s.project);
        d_gate_up.resize(gate_up.len(), 0.0);
        if w.adapter.is_some() {
            s.act.resize(m * f, 0.0);
            glu(pool, gate_up, m, f, act, &mut s.act);
            w.project_backward(pool, layer, Projection::Down, &s.act, d_down, d_act, grads, project);
            glu_backward(pool, gate_up, m, f, act, d_act, d_gate_up, None);
        } else {
            // the activation, made again in the pass that makes its gradient
            let make = |d_act: &[f32], x: &mut Vec<f32>| {
                x.resize(m * f, 0.0);
                glu_backward(pool, gate_up, m, f, act, d_act, d_gate_up, Some(x));
            };
            let down = Projection::Down;
            w.project_backward_around(pool, layer, down, &mut s.act, d_down, d_act, grads, project, make);
        }
        let (d_gate_up, dx) = (&b.d_gate_up, &mut b.dx);
        w.project_backward(pool, layer, Projection::GateUp, &s.x, d_gate_up, dx, grads, &mut s.project);
    }
    norm_backward(pool, w, slots.mlp_norm, &acts.h_mid, &b.dx, &mut b.dh, grads);

    let d_o = through_sandwich(pool, w, slots.post_attn_norm, &acts.o, &b.dh, &mut b.d_delta, grads);
    w.project_backward(pool, layer, Projection::O, &acts.attn, d_o, &mut b.d_attn, grads, &mut s.project);
    s.qkv.resize(acts.qkv.len(), 0.0);
    qk_rope(pool, &shape, &acts.qkv, w.qk_norm(layer), w.rope(layer), &batch.positions, &mut s.qkv);
    if w.kv_precision == Precision::Bf16 {
        // as the forward pass; the gradient goes through the rounding as if it were not there (straight through)
        round_kv(pool, &shape, &mut s.qkv);
    }
    b.d_qkv.resize(acts.qkv.len(), 0.0);
    segment_attention_backward(pool, &shape, &s.qkv, &batch.segments, &acts.attn, &b.d_attn, &mut b.d_qkv);
    // queries' norm stands before keys' in the arena
    let (mut dq_norm, mut dk_norm) = (None, None);
    if let Some((q, k)) = slots.qk_norm {
        let (q, k) = (w.base.grad_range(q), w.base.grad_range(k));
        let keys_from = k.as_ref().map_or(grads.base.len(), |k| k.start);
        let (low, high) = grads.base.split_at_mut(keys_from);
        dq_norm = q.map(|q| &mut low[q]);
        dk_norm = k.map(|k| &mut high[..k.len()]);
    }
    let (norm, rope) = (w.qk_norm(layer), w.rope(layer));
    qk_rope_backward(pool, &shape, &acts.qkv, norm, rope, &batch.positions, &mut b.d_qkv, dq_norm, dk_norm);
    w.norm(pool, slots.attn_norm, &acts.h_in, &mut s.x);
    w.project_backward(pool, layer, Projection::Qkv, &s.x, &b.d_qkv, &mut b.dx, grads, &mut s.project);
    norm_backward(pool, w, slots.attn_norm, &acts.h_in, &b.dx, &mut b.dh, grads);
}

/// The gradient below a sandwich norm, or `dh` itself where there is none.
fn through_sandwich<'a>(
    pool: &Pool,
    w: &Weights,
    norm: Option<SlotId>,
    x: &[f32],
    dh: &'a [f32],
    out: &'a mut Vec<f32>,
    grads: &mut Grads,
) -> &'a [f32] {
    let Some(id) = norm else { return dh };
    out.clear();
    out.resize(dh.len(), 0.0);
    norm_backward(pool, w, id, x, dh, out, grads);
    out
}
