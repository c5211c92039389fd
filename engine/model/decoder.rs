//! The forward pass of a decoder layer, shared by rollout and learner, and the paged decoder of the rollouts.
//!
//! One function, `layer_forward`, runs a layer for both; only the source of keys and values differs
//! (`Attend`). Together with kernels whose sums do not depend on rows, pages or chunks, this makes the
//! sampler's and the learner's logprobs equal bit for bit.
//!
//! Shapes: m rows (tokens of any mix of sequences), hidden h, q = heads * head_dim, f = ffn.

use std::ops::Range;

use rft_kernels::{
    KvPages, PagedRun, Pool, QkNorm, Segment, Write, add_columns, add_rms_norm, gather_rows, glu, linear,
    paged_attention, qk_rope, rms_norm, rms_norm_kept, round_kv, segment_attention, store_kv,
};

use crate::config::Precision;
use crate::model::experts::{ExpertScratch, Routing, experts_forward};
use crate::model::params::SlotId;
use crate::model::policy::{ProjectScratch, Projection, Weights};
use crate::rollout::{KvCache, PagedBatch, PagedModel};

/// Where a layer's queries find their keys and values.
pub(super) enum Attend<'a> {
    /// In a KV cache, after this batch's own were stored at `slots`.
    Paged { runs: &'a [PagedRun<'a>], slots: &'a [u32], pages: &'a mut KvPages },
    /// In the batch itself: packed, prefix-shared sequences. Keys and values are rounded as a cache would round them.
    Segments(&'a [Segment]),
}

/// What the backward pass needs of a layer's forward; norms, rotations and gates are cheap and are recomputed.
#[derive(Debug, Default)]
pub(super) struct LayerActs {
    /// Residual stream at the layer's input `[m, h]`.
    pub h_in: Vec<f32>,
    /// Queries, keys and values before norm and rotation `[m, q + 2 kv]`.
    pub qkv: Vec<f32>,
    /// Attention output before its projection `[m, q]`.
    pub attn: Vec<f32>,
    /// Projected attention output before its sandwich norm `[m, h]` (empty without sandwich norms).
    pub o: Vec<f32>,
    /// Residual stream after attention `[m, h]`.
    pub h_mid: Vec<f32>,
    /// Gate and up `[m, 2 f]`; in a mixture one row for each pair of a token and an expert.
    pub gate_up: Vec<f32>,
    /// Which tokens went to which expert (unused without a mixture).
    pub routing: Routing,
    /// Feed-forward output before its sandwich norm `[m, h]` (empty without sandwich norms).
    pub down: Vec<f32>,
}

/// Buffers reused from layer to layer.
#[derive(Debug, Default)]
pub(super) struct LayerScratch {
    pub x: Vec<f32>,
    pub qkv: Vec<f32>,
    pub act: Vec<f32>,
    pub delta: Vec<f32>,
    pub project: ProjectScratch,
    pub experts: ExpertScratch,
}

impl<'a> Weights<'a> {
    pub(super) fn qk_norm(&self, layer: usize) -> Option<QkNorm<'a>> {
        self.slots.layers[layer].qk_norm.map(|(q, k)| QkNorm {
            q: self.base.values(q),
            k: self.base.values(k),
            eps: self.spec.norm_eps,
            offset: self.spec.norm_offset,
        })
    }

    pub(super) fn norm(&self, pool: &Pool, id: SlotId, x: &[f32], y: &mut Vec<f32>) {
        y.resize(x.len(), 0.0);
        rms_norm(pool, x, self.base.values(id), self.spec.norm_eps, self.spec.norm_offset, y);
    }

    /// Token embeddings `[m, h]`.
    pub(super) fn embed(&self, pool: &Pool, tokens: &[u32], h: &mut Vec<f32>) {
        let table = self.base.matrix(self.slots.embed);
        h.resize(tokens.len() * table.k, 0.0);
        gather_rows(pool, table.f32, table.n, table.k, tokens, h);
        if self.spec.embed_scale != 1.0 {
            h.iter_mut().for_each(|x| *x *= self.spec.embed_scale);
        }
    }

    /// Logits `[m, vocab]` of normed hidden states `[m, h]`.
    pub(super) fn logits(&self, pool: &Pool, hidden: &[f32], logits: &mut Vec<f32>) {
        let head = self.base.matrix(self.slots.head);
        let m = hidden.len() / head.k;
        logits.resize(m * head.n, 0.0);
        linear(pool, hidden, m, head, logits, Write::Set);
        if let Some(cap) = self.spec.final_softcap {
            pool.map_chunks(logits, head.n, |_, row| {
                row.iter_mut().for_each(|l| *l = cap * (*l / cap).tanh())
            });
        }
    }
}

/// Runs one layer in place on the residual stream `h [m, hidden]`.
#[allow(clippy::too_many_arguments)]
pub(super) fn layer_forward(
    pool: &Pool,
    w: &Weights,
    layer: usize,
    positions: &[u32],
    attend: Attend,
    h: &mut [f32],
    acts: &mut LayerActs,
    s: &mut LayerScratch,
) {
    layer_activations(pool, w, layer, positions, attend, h, acts, s);
    let slots = &w.slots.layers[layer];
    let (m, hidden) = (positions.len(), w.spec.hidden);
    if slots.experts.is_none() {
        down(pool, w, layer, m, acts, s);
    }
    if let Some(norm) = slots.post_mlp_norm {
        w.norm(pool, norm, &acts.down, &mut s.delta);
    }
    add_columns(pool, h, hidden, 0, &s.delta, m, hidden, 1.0);
}

/// The dense feed-forward's output, from gate and up to `s.delta`; kept where a sandwich norm follows.
fn down(pool: &Pool, w: &Weights, layer: usize, m: usize, acts: &mut LayerActs, s: &mut LayerScratch) {
    s.act.resize(m * w.spec.ffn, 0.0);
    glu(pool, &acts.gate_up, m, w.spec.ffn, w.act(), &mut s.act);
    w.project(pool, layer, Projection::Down, &s.act, &mut s.delta, &mut s.project);
    if w.slots.layers[layer].post_mlp_norm.is_some() {
        acts.down.clone_from(&s.delta);
    }
}

/// Makes a layer's activations again from the residual stream at its input, which becomes that after attention: the same
/// kernels in the same order, so the same bits. What no backward pass reads is left out.
#[allow(clippy::too_many_arguments)]
pub(super) fn layer_again(
    pool: &Pool,
    w: &Weights,
    layer: usize,
    positions: &[u32],
    segments: &[Segment],
    h: &mut [f32],
    acts: &mut LayerActs,
    s: &mut LayerScratch,
) {
    layer_activations(pool, w, layer, positions, Attend::Segments(segments), h, acts, s);
    let slots = &w.slots.layers[layer];
    if slots.post_mlp_norm.is_some() && slots.experts.is_none() {
        down(pool, w, layer, positions.len(), acts, s);
    }
}

/// A layer up to gate and up; a mixture up to its output, in `s.delta`.
#[allow(clippy::too_many_arguments)]
fn layer_activations(
    pool: &Pool,
    w: &Weights,
    layer: usize,
    positions: &[u32],
    attend: Attend,
    h: &mut [f32],
    acts: &mut LayerActs,
    s: &mut LayerScratch,
) {
    let slots = &w.slots.layers[layer];
    let shape = w.attention(layer);
    let (m, hidden) = (positions.len(), w.spec.hidden);
    let copy = |from: &[f32], to: &mut Vec<f32>| {
        to.clear();
        to.extend_from_slice(from);
    };

    let (eps, offset) = (w.spec.norm_eps, w.spec.norm_offset);
    s.x.resize(m * hidden, 0.0);
    acts.h_in.resize(m * hidden, 0.0);
    rms_norm_kept(pool, h, w.base.values(slots.attn_norm), eps, offset, &mut s.x, &mut acts.h_in);
    w.project(pool, layer, Projection::Qkv, &s.x, &mut acts.qkv, &mut s.project);
    s.qkv.resize(acts.qkv.len(), 0.0);
    qk_rope(pool, &shape, &acts.qkv, w.qk_norm(layer), w.rope(layer), positions, &mut s.qkv);
    acts.attn.resize(m * shape.heads * shape.head_dim, 0.0);
    match attend {
        Attend::Paged { runs, slots, pages } => {
            store_kv(pool, &shape, &s.qkv, slots, pages);
            paged_attention(pool, &shape, &s.qkv, runs, pages, &mut acts.attn);
        }
        Attend::Segments(segments) => {
            if w.kv_precision == Precision::Bf16 {
                round_kv(pool, &shape, &mut s.qkv);
            }
            segment_attention(pool, &shape, &s.qkv, segments, &mut acts.attn);
        }
    }
    w.project(pool, layer, Projection::O, &acts.attn, &mut s.delta, &mut s.project);
    if let Some(norm) = slots.post_attn_norm {
        copy(&s.delta, &mut acts.o);
        w.norm(pool, norm, &acts.o, &mut s.delta);
    }
    acts.h_mid.resize(m * hidden, 0.0);
    let norm = w.base.values(slots.mlp_norm);
    add_rms_norm(pool, h, &s.delta, norm, eps, offset, &mut s.x, &mut acts.h_mid);
    if let (Some(experts), Some(moe)) = (&slots.experts, &w.spec.moe) {
        let (routing, gate_up) = (&mut acts.routing, &mut acts.gate_up);
        let (act, y) = (&mut s.act, &mut s.delta);
        experts_forward(pool, w, experts, moe, &s.x, routing, gate_up, act, y, &mut s.experts);
        if slots.post_mlp_norm.is_some() {
            copy(&s.delta, &mut acts.down);
        }
    } else {
        w.project(pool, layer, Projection::GateUp, &s.x, &mut acts.gate_up, &mut s.project);
    }
}

/// Runs a policy over a paged KV cache, for rollouts.
pub struct PagedDecoder<'a> {
    weights: Weights<'a>,
    h: Vec<f32>,
    selected: Vec<f32>,
    normed: Vec<f32>,
    acts: LayerActs,
    scratch: LayerScratch,
}

impl<'a> PagedDecoder<'a> {
    /// A decoder over these weights.
    pub fn new(weights: Weights<'a>) -> Self {
        Self {
            weights,
            h: Vec::new(),
            selected: Vec::new(),
            normed: Vec::new(),
            acts: LayerActs::default(),
            scratch: LayerScratch::default(),
        }
    }
}

impl PagedModel for PagedDecoder<'_> {
    fn vocab(&self) -> usize {
        self.weights.spec.vocab
    }

    fn max_positions(&self) -> usize {
        self.weights.positions()
    }

    fn new_cache(&self, blocks: usize) -> KvCache {
        let shape = self.weights.attention(0);
        let bf16 = self.weights.kv_precision == Precision::Bf16;
        KvCache::new(self.weights.spec.layers, blocks, shape.kv_heads, shape.head_dim, bf16)
    }

    fn forward(&mut self, pool: &Pool, cache: &mut KvCache, batch: &PagedBatch) {
        let w = &self.weights;
        w.embed(pool, batch.tokens, &mut self.h);
        for layer in 0..w.spec.layers {
            let attend =
                Attend::Paged { runs: batch.runs, slots: batch.slots, pages: &mut cache.layers[layer] };
            layer_forward(
                pool,
                w,
                layer,
                batch.positions,
                attend,
                &mut self.h,
                &mut self.acts,
                &mut self.scratch,
            );
        }
        self.selected.clear();
        for &row in batch.select {
            self.selected.extend_from_slice(&self.h[row * w.spec.hidden..(row + 1) * w.spec.hidden]);
        }
        w.norm(pool, w.slots.final_norm, &self.selected, &mut self.normed);
    }

    fn logits(&mut self, pool: &Pool, rows: Range<usize>, logits: &mut Vec<f32>) {
        let hidden = self.weights.spec.hidden;
        self.weights.logits(pool, &self.normed[rows.start * hidden..rows.end * hidden], logits);
    }
}
