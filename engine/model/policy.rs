//! The policy: one decoder's weights, adapters and version, and the linear projections both passes go through.
//!
//! [`Policy`] owns the numbers; [`Weights`] is the borrowed view that rollout, learner and reference all run on
//! (the reference is the same view with the adapter off, or over a frozen copy). Loading and naming follow the
//! Hugging Face layout of the family.

use std::borrow::Cow;

use rft_kernels::{
    Act, AttnShape, Code, Pool, Rope, Waiting, Write, add_bias, clear, linear, linear_dx, zeros,
};

use crate::config::{LoraConfig, ModelConfig, NewModelConfig, Precision, Quantize};
use crate::error::Result;
use crate::model::dora::DoraScratch;
use crate::model::experts::ExpertSlots;
use crate::model::freeze::{Candidate, trained_names};
use crate::model::lora::{Adapter, DropKeys, LoraScratch};
use crate::model::params::{Arena, Part, Shape, SlotId, WaitingRows};
use crate::model::rows::fill_slot;
use crate::model::source::ModelSource;
use crate::model::spec::{Activation, ModelSpec};
use crate::rng::{Purpose, Stream};
use crate::types::PolicyVersion;

/// The four linear projections of a layer, as the kernels see them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Projection {
    /// Queries, keys and values.
    Qkv,
    /// Attention output.
    O,
    /// Gate and up of the feed-forward layer.
    GateUp,
    /// Down of the feed-forward layer.
    Down,
}

impl Projection {
    /// In the order of the forward pass.
    pub const ALL: [Self; 4] = [Self::Qkv, Self::O, Self::GateUp, Self::Down];
}

/// Slots of one layer.
#[derive(Debug, Clone)]
pub struct LayerSlots {
    /// Norm before attention.
    pub attn_norm: SlotId,
    /// Norm of each query and key head.
    pub qk_norm: Option<(SlotId, SlotId)>,
    /// Norm of the attention output (sandwich norms).
    pub post_attn_norm: Option<SlotId>,
    /// Norm before the feed-forward layer.
    pub mlp_norm: SlotId,
    /// Norm of the feed-forward output (sandwich norms).
    pub post_mlp_norm: Option<SlotId>,
    /// Weights by [`Projection`]; a mixture has none of the feed-forward's.
    pub weight: [Option<SlotId>; 4],
    /// Biases by [`Projection`].
    pub bias: [Option<SlotId>; 4],
    /// The feed-forward's mixture, where it is one.
    pub experts: Option<ExpertSlots>,
}

impl LayerSlots {
    fn dense(&self, projection: Projection) -> SlotId {
        self.weight[projection as usize].expect("a mixture's layer has no dense feed-forward")
    }
}

/// Slots of the whole decoder.
#[derive(Debug, Clone)]
pub struct ModelSlots {
    /// Token embedding `[vocab, hidden]`.
    pub embed: SlotId,
    /// Layers in order.
    pub layers: Vec<LayerSlots>,
    /// Norm before the head.
    pub final_norm: SlotId,
    /// Head `[vocab, hidden]`; the embedding when tied.
    pub head: SlotId,
}

/// Cosines and sines of one rotary embedding, by position.
#[derive(Debug, Clone)]
pub struct RopeTable {
    cos: Vec<f32>,
    sin: Vec<f32>,
    rot: usize,
}

impl RopeTable {
    fn new(inv_freq: &[f64], factor: f64, positions: usize) -> Self {
        // f32 products, as where the model was trained
        let angle = |at: usize| inv_freq.iter().map(move |f| f64::from(at as f32 * *f as f32));
        let table =
            |f: fn(f64) -> f64| (0..positions).flat_map(angle).map(|a| (f(a) * factor) as f32).collect();
        Self { cos: table(f64::cos), sin: table(f64::sin), rot: inv_freq.len() * 2 }
    }

    fn view(&self) -> Rope<'_> {
        Rope { cos: &self.cos, sin: &self.sin, rot: self.rot }
    }
}

/// A decoder's weights with everything needed to run them.
#[derive(Debug, Clone)]
pub struct Policy {
    /// What the decoder is.
    pub spec: ModelSpec,
    /// Its own weights; frozen when there is an adapter.
    pub base: Arena,
    /// Low-rank adapters, if they are what trains.
    pub adapter: Option<Adapter>,
    /// Counts updates.
    pub version: PolicyVersion,
    /// How keys and values are kept; in bf16 every pass rounds them before it attends to them.
    pub kv_precision: Precision,
    pub(super) slots: ModelSlots,
    ropes: Vec<RopeTable>,
    positions: usize,
}

/// What a forward or backward pass reads.
#[derive(Debug, Clone, Copy)]
pub struct Weights<'a> {
    /// What the decoder is.
    pub spec: &'a ModelSpec,
    /// Where its weights are.
    pub slots: &'a ModelSlots,
    /// Its weights.
    pub base: &'a Arena,
    /// Adapters, unless off.
    pub adapter: Option<&'a Adapter>,
    /// How keys and values are kept.
    pub kv_precision: Precision,
    ropes: &'a [RopeTable],
    positions: usize,
}

/// Gradient buffers of one policy: of its base and of its adapter (empty where frozen).
#[derive(Debug, Default)]
pub struct Grads {
    /// [`Arena::trainable_len`] numbers of the base.
    pub base: Vec<f32>,
    /// The same of the adapter.
    pub adapter: Vec<f32>,
    /// Rows that are not yet in `base`.
    pub base_waiting: WaitingRows,
    /// Rows that are not yet in `adapter`.
    pub adapter_waiting: WaitingRows,
}

/// Buffers of [`Weights::project`] and its backward.
#[derive(Debug, Default)]
pub struct ProjectScratch {
    /// With dropout: the update's number and the key of every row; `None` in every pass but training's.
    pub drop: Option<(u64, Vec<u64>)>,
    lora: LoraScratch,
    dora: DoraScratch,
    columns: Vec<f32>,
}

fn layout(spec: &ModelSpec) -> (Vec<(Shape, Vec<Part>)>, ModelSlots) {
    let mut slots: Vec<(Shape, Vec<Part>)> = Vec::new();
    let mut add = |shape: Shape, parts: Vec<(String, usize)>| {
        slots.push((shape, parts.into_iter().map(|(name, rows)| Part { name, rows }).collect()));
        slots.len() - 1
    };
    let (hidden, ffn) = (spec.hidden, spec.ffn);
    let (q, kv) = (spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim);
    let matrix = |n, k| Shape::Matrix { n, k };
    let embed = add(matrix(spec.vocab, hidden), vec![("model.embed_tokens.weight".into(), spec.vocab)]);
    let layers = (0..spec.layers)
        .map(|l| {
            let at = |name: &str| format!("model.layers.{l}.{name}");
            let one = |name: &str, rows| vec![(at(name), rows)];
            let mut norm = |name: &str, len| add(Shape::Vector(len), one(name, len));
            let attn_norm = norm("input_layernorm.weight", hidden);
            let qk_norm = spec.qk_norm.then(|| {
                (
                    norm("self_attn.q_norm.weight", spec.head_dim),
                    norm("self_attn.k_norm.weight", spec.head_dim),
                )
            });
            let (post_attn_norm, mlp_norm, post_mlp_norm) = if spec.sandwich_norms {
                (
                    Some(norm("post_attention_layernorm.weight", hidden)),
                    norm("pre_feedforward_layernorm.weight", hidden),
                    Some(norm("post_feedforward_layernorm.weight", hidden)),
                )
            } else {
                (None, norm("post_attention_layernorm.weight", hidden), None)
            };
            let qkv_parts = |what: &str| {
                if spec.fused_projections {
                    vec![(at(&format!("self_attn.qkv_proj.{what}")), q + 2 * kv)]
                } else {
                    ["q", "k", "v"]
                        .into_iter()
                        .zip([q, kv, kv])
                        .map(|(p, rows)| (at(&format!("self_attn.{p}_proj.{what}")), rows))
                        .collect()
                }
            };
            let gate_up_parts = |what: &str| {
                if spec.fused_projections {
                    vec![(at(&format!("mlp.gate_up_proj.{what}")), 2 * ffn)]
                } else {
                    ["gate", "up"].map(|p| (at(&format!("mlp.{p}_proj.{what}")), ffn)).to_vec()
                }
            };
            let moe = spec.moe.as_ref().filter(|_| spec.layer_specs[l].experts);
            let mut weight = [
                Some(add(matrix(q + 2 * kv, hidden), qkv_parts("weight"))),
                Some(add(matrix(hidden, q), one("self_attn.o_proj.weight", hidden))),
                None,
                None,
            ];
            if moe.is_none() {
                weight[2] = Some(add(matrix(2 * ffn, hidden), gate_up_parts("weight")));
                weight[3] = Some(add(matrix(hidden, ffn), one("mlp.down_proj.weight", hidden)));
            }
            let experts = moe.map(|moe| {
                let names = moe.names;
                let at = |e: usize, part: &str| at(&format!("{}.experts.{e}.{part}.weight", names.block));
                let router = format!("{}.gate.weight", names.block);
                let router = add(matrix(moe.experts, hidden), one(&router, moe.experts));
                let (mut gate_up, mut down) = (Vec::new(), Vec::new());
                for e in 0..moe.experts {
                    let parts = [names.gate, names.up].map(|part| (at(e, part), moe.ffn)).to_vec();
                    gate_up.push(add(matrix(2 * moe.ffn, hidden), parts));
                    down.push(add(matrix(hidden, moe.ffn), vec![(at(e, names.down), hidden)]));
                }
                ExpertSlots { router, gate_up, down }
            });
            let bias = [
                spec.qkv_bias.then(|| add(Shape::Vector(q + 2 * kv), qkv_parts("bias"))),
                spec.o_bias.then(|| add(Shape::Vector(hidden), one("self_attn.o_proj.bias", hidden))),
                spec.mlp_bias.then(|| add(Shape::Vector(2 * ffn), gate_up_parts("bias"))),
                spec.mlp_bias.then(|| add(Shape::Vector(hidden), one("mlp.down_proj.bias", hidden))),
            ];
            LayerSlots { attn_norm, qk_norm, post_attn_norm, mlp_norm, post_mlp_norm, weight, bias, experts }
        })
        .collect();
    let final_norm = add(Shape::Vector(hidden), vec![("model.norm.weight".into(), hidden)]);
    let head = if spec.tied {
        embed
    } else {
        add(matrix(spec.vocab, hidden), vec![("lm_head.weight".into(), spec.vocab)])
    };
    (slots, ModelSlots { embed, layers, final_norm, head })
}

impl Policy {
    fn with_spec(spec: ModelSpec, trainable: bool, quantize: Option<Quantize>) -> Self {
        let (layout, slots) = layout(&spec);
        let base = match quantize {
            None => Arena::new(layout, trainable),
            Some(code) => {
                let code = if code == Quantize::Int8 { Code::Int8 } else { Code::Nf4 };
                // routers are small and decide much
                let linear =
                    |name: &str| name.starts_with("model.layers.") && !name.ends_with(".gate.weight");
                Arena::with_quantized(layout, Some(code), linear)
            }
        };
        let (version, kv_precision) = (PolicyVersion(0), Precision::F32);
        Self { spec, base, adapter: None, version, kv_precision, slots, ropes: Vec::new(), positions: 0 }
    }

    /// Loads a model's weights; with `lora`, they are frozen and new adapters train.
    ///
    /// # Errors
    /// Missing or misshapen tensors by name; an adapter target that does not exist.
    pub fn load(source: &ModelSource, lora: Option<&LoraConfig>, seed: u64) -> Result<Self> {
        Self::load_on(&Pool::new(1), source, lora, seed)
    }

    /// As [`Policy::load`], on all threads of a pool.
    ///
    /// # Errors
    /// As [`Policy::load`].
    pub fn load_on(pool: &Pool, source: &ModelSource, lora: Option<&LoraConfig>, seed: u64) -> Result<Self> {
        let mut policy = Self::load_base(pool, source, lora.is_none(), None)?;
        if let Some(config) = lora {
            let adapter = Adapter::new(&policy.spec, config, seed)?;
            policy.adopt(pool, adapter);
        }
        Ok(policy)
    }

    /// Loads a model's weights without an adapter; with `quantize`, those of the layers' linear parts are held in 8 or
    /// 4 bits, and nothing trains.
    ///
    /// # Errors
    /// As [`Policy::load`].
    pub fn load_base(
        pool: &Pool,
        source: &ModelSource,
        trainable: bool,
        quantize: Option<Quantize>,
    ) -> Result<Self> {
        // a config that lies about sizes must not decide how much is allocated
        let mut names = Vec::new();
        for (shape, parts) in layout(source.spec()).0 {
            for part in parts {
                match shape {
                    Shape::Matrix { k, .. } => source.expect(&part.name, &[part.rows, k])?,
                    Shape::Vector(_) => source.expect(&part.name, &[part.rows])?,
                }
                names.push(part.name);
            }
        }
        source.refuse_unused(&names)?;
        let mut policy = Self::with_spec(source.spec().clone(), trainable, quantize);
        for id in 0..policy.base.slots().len() {
            fill_slot(pool, source, &mut policy.base, id)?;
        }
        Ok(policy)
    }

    /// A new model with random weights: normal matrices of standard deviation `0.5 / sqrt(hidden)` (0.02 at the width
    /// of GPT-2 small, Radford et al. 2019), projections into the residual stream scaled by 1/sqrt(2 layers) as there,
    /// norms at their neutral value.
    pub fn init(spec: ModelSpec, seed: u64) -> Self {
        let mut policy = Self::with_spec(spec, true, None);
        let width = policy.spec.hidden as f64;
        let residual = 1.0 / (2.0 * policy.spec.layers as f64).sqrt();
        let into_residual: Vec<SlotId> = policy
            .slots
            .layers
            .iter()
            .flat_map(|l| {
                let dense = [l.weight[Projection::O as usize], l.weight[Projection::Down as usize]];
                let experts = l.experts.iter().flat_map(|e| e.down.iter().copied());
                dense.into_iter().flatten().chain(experts)
            })
            .collect();
        let biases: Vec<SlotId> =
            policy.slots.layers.iter().flat_map(|l| l.bias.into_iter().flatten()).collect();
        for id in 0..policy.base.slots().len() {
            let std = width.sqrt().recip() * 0.5 * if into_residual.contains(&id) { residual } else { 1.0 };
            let mut noise = Stream::new(seed, Purpose::Init, &[id as u64]);
            match policy.base.slots()[id].shape {
                Shape::Matrix { n, k } => {
                    let rows: Vec<f32> = (0..n * k).map(|_| (noise.normal() * std) as f32).collect();
                    rft_kernels::pack_panels(&rows, n, k, policy.base.values_mut(id));
                }
                Shape::Vector(_) => {
                    let neutral = if biases.contains(&id) { 0.0 } else { 1.0 - policy.spec.norm_offset };
                    policy.base.values_mut(id).fill(neutral);
                }
            }
        }
        policy
    }

    /// Freezes the weights and adds new adapters, which train instead.
    ///
    /// # Errors
    /// An adapter target that does not exist.
    pub fn with_adapter(self, config: &LoraConfig, seed: u64) -> Result<Self> {
        let mut frozen = Self::with_spec(self.spec.clone(), false, None);
        for id in 0..self.base.slots().len() {
            frozen.base.values_mut(id).copy_from_slice(self.base.values(id));
        }
        let adapter = Adapter::new(&frozen.spec, config, seed)?;
        frozen.adopt(&Pool::new(1), adapter);
        Ok(frozen)
    }

    /// Prepares for sequences of up to `positions` tokens and for `precision`.
    pub fn prepare(&mut self, pool: &Pool, positions: usize, precision: Precision) {
        self.positions = positions;
        self.ropes = self
            .spec
            .ropes
            .iter()
            .map(|rope| {
                let (inv_freq, factor) = rope.inv_freq(positions);
                RopeTable::new(&inv_freq, factor, positions)
            })
            .collect();
        if precision == Precision::Bf16 {
            self.base.enable_bf16(pool);
            if let Some(adapter) = &mut self.adapter {
                adapter.arena.enable_bf16(pool);
            }
        }
    }

    /// The weights as they are trained and sampled.
    pub fn weights(&self) -> Weights<'_> {
        self.view(&self.base, self.adapter.as_ref())
    }

    /// The weights with the adapter off.
    pub fn base_weights(&self) -> Weights<'_> {
        self.view(&self.base, None)
    }

    /// This decoder over another copy of its base weights.
    pub fn weights_over<'a>(&'a self, base: &'a Arena) -> Weights<'a> {
        self.view(base, None)
    }

    /// This decoder with another adapter over its base weights.
    pub fn weights_with<'a>(&'a self, adapter: &'a Adapter) -> Weights<'a> {
        self.view(&self.base, Some(adapter))
    }

    fn view<'a>(&'a self, base: &'a Arena, adapter: Option<&'a Adapter>) -> Weights<'a> {
        Weights {
            spec: &self.spec,
            slots: &self.slots,
            base,
            adapter,
            kv_precision: self.kv_precision,
            ropes: &self.ropes,
            positions: self.positions,
        }
    }

    /// The arena that trains: the adapter's, or the base.
    pub fn trainable(&self) -> &Arena {
        self.adapter.as_ref().map_or(&self.base, |a| &a.arena)
    }

    /// As [`Policy::trainable`], writable.
    pub fn trainable_mut(&mut self) -> &mut Arena {
        self.adapter.as_mut().map_or(&mut self.base, |a| &mut a.arena)
    }

    /// Freezes what the recipe wants frozen in a stage.
    ///
    /// # Errors
    /// Patterns that match nothing, or leave nothing to train.
    pub fn choose_trained(&mut self, config: &ModelConfig, seed: u64, stage: usize) -> Result<()> {
        let parts = self.trainable().slots().iter().flat_map(|slot| {
            let matrix = matches!(slot.shape, Shape::Matrix { .. });
            slot.parts.iter().map(move |part| Candidate { name: part.name.clone(), matrix })
        });
        let names = trained_names(&parts.collect::<Vec<_>>(), config, seed, stage)?;
        self.trainable_mut().train_only(|name| names.contains(name));
        Ok(())
    }

    /// Zeroed gradient buffers.
    pub fn new_grads(&self) -> Grads {
        Grads {
            base: vec![0.0; self.base.trainable_len()],
            adapter: vec![0.0; self.adapter.as_ref().map_or(0, |a| a.arena.trainable_len())],
            ..Grads::default()
        }
    }

    /// Parameters that train.
    pub fn trainable_count(&self) -> usize {
        self.trainable().trainable_count()
    }

    /// Every tensor under its Hugging Face name, adapters merged; row-major f32. Those of a quantised base are
    /// what their codes stand for (see [`Policy::merged_from`]).
    pub fn merged_tensors(&self) -> impl Iterator<Item = (String, Vec<usize>, Vec<f32>)> + '_ {
        (0..self.base.slots().len()).flat_map(move |id| {
            let values = match self.base.matrix_codes(id) {
                Some(codes) => Cow::Owned(codes.panels(&Pool::new(1))),
                None => Cow::Borrowed(self.base.values(id)),
            };
            self.merge_slot(id, &values)
        })
    }

    /// As [`Policy::merged_tensors`], with the source's own numbers in place of quantised ones. One slot is held at a
    /// time; the first failure to read ends the tensors and is left in `failed`.
    pub fn merged_from<'a>(
        &'a self,
        pool: &'a Pool,
        source: &'a ModelSource,
        failed: &'a mut Result<()>,
    ) -> impl Iterator<Item = (String, Vec<usize>, Vec<f32>)> + 'a {
        let slots = (0..self.base.slots().len()).map_while(move |id| {
            if !self.base.is_quantized(id) {
                return Some(self.merge_slot(id, self.base.values(id)));
            }
            let slot = &self.base.slots()[id];
            let mut own = Arena::new(vec![(slot.shape, slot.parts.clone())], false);
            *failed = fill_slot(pool, source, &mut own, 0);
            failed.is_ok().then(|| self.merge_slot(id, own.values(0)))
        });
        slots.flatten()
    }

    /// The tensors of a slot whose stored numbers are `values`, adapters merged.
    fn merge_slot(&self, id: SlotId, values: &[f32]) -> Vec<(String, Vec<usize>, Vec<f32>)> {
        match (&self.adapter, self.projection_of(id), self.base.slots()[id].shape) {
            (Some(adapter), Some((layer, projection)), Shape::Matrix { n, k }) => {
                let mut rows = vec![0.0; n * k];
                rft_kernels::unpack_panels(values, n, k, &mut rows);
                adapter.merge_into(layer, projection, &mut rows, k);
                let mut panels = vec![0.0; values.len()];
                rft_kernels::pack_panels(&rows, n, k, &mut panels);
                self.base.tensors_of(id, &panels)
            }
            _ => self.base.tensors_of(id, values),
        }
    }

    fn projection_of(&self, id: SlotId) -> Option<(usize, Projection)> {
        self.slots.layers.iter().enumerate().find_map(|(layer, slots)| {
            let at = slots.weight.iter().position(|&w| w == Some(id))?;
            Some((layer, Projection::ALL[at]))
        })
    }
}

impl Grads {
    /// Zeros for what trains in `policy`, in the same buffers where they fit.
    pub fn begin(&mut self, pool: &Pool, policy: &Policy) {
        let adapter = policy.adapter.as_ref().map_or(0, |a| a.arena.trainable_len());
        for (grads, len) in [(&mut self.base, policy.base.trainable_len()), (&mut self.adapter, adapter)] {
            if grads.len() == len {
                clear(pool, grads);
            } else {
                // the old buffer goes before the new one comes
                *grads = Vec::new();
                *grads = zeros(pool, len);
            }
        }
        self.clear_waiting();
    }

    /// Back to zero.
    pub fn clear(&mut self, pool: &Pool) {
        clear(pool, &mut self.base);
        clear(pool, &mut self.adapter);
        self.clear_waiting();
    }

    fn clear_waiting(&mut self) {
        self.base_waiting.values_mut().chain(self.adapter_waiting.values_mut()).for_each(Waiting::clear);
    }
}

impl<'a> Weights<'a> {
    /// Positions that were prepared for.
    pub fn positions(&self) -> usize {
        self.positions
    }

    /// The first layer that has something to train at it or below: a backward pass may stop above it.
    pub fn lowest_trained_layer(&self) -> usize {
        if self.adapter.is_some() || self.base.grad_range(self.slots.embed).is_some() {
            return 0;
        }
        let trains = |layer: &LayerSlots| {
            let norms =
                [Some(layer.attn_norm), layer.post_attn_norm, Some(layer.mlp_norm), layer.post_mlp_norm];
            let head_norms = layer.qk_norm.into_iter().flat_map(|(q, k)| [q, k]);
            let experts =
                layer.experts.iter().flat_map(|e| e.gate_up.iter().chain(&e.down).copied().chain([e.router]));
            let dense = norms.into_iter().chain(layer.bias).chain(layer.weight).flatten();
            dense.chain(head_norms).chain(experts).any(|id| self.base.grad_range(id).is_some())
        };
        self.slots.layers.iter().position(trains).unwrap_or(self.spec.layers)
    }

    /// Geometry of a layer's attention.
    pub fn attention(&self, layer: usize) -> AttnShape {
        AttnShape {
            heads: self.spec.heads,
            kv_heads: self.spec.kv_heads,
            head_dim: self.spec.head_dim,
            scale: self.spec.attn_scale,
            window: self.spec.layer_specs[layer].window,
            softcap: self.spec.attn_softcap,
        }
    }

    /// A layer's rotary embedding, unless it has none.
    pub fn rope(&self, layer: usize) -> Option<Rope<'a>> {
        self.spec.layer_specs[layer].rope.map(|index| self.ropes[index].view())
    }

    /// The feed-forward gate's activation.
    pub fn act(&self) -> Act {
        match self.spec.activation {
            Activation::Silu => Act::Silu,
            Activation::GeluTanh => Act::GeluTanh,
        }
    }

    /// `y [m, n] = x [m, k] W^T + bias`, adapters included.
    pub fn project(
        &self,
        pool: &Pool,
        layer: usize,
        projection: Projection,
        x: &[f32],
        y: &mut Vec<f32>,
        scratch: &mut ProjectScratch,
    ) {
        let slots = &self.slots.layers[layer];
        let weight = self.base.matrix(slots.dense(projection));
        let m = x.len() / weight.k;
        y.resize(m * weight.n, 0.0);
        linear(pool, x, m, weight, y, Write::Set);
        let bias = slots.bias[projection as usize].map(|id| self.base.values(id));
        // A magnitude multiplies what comes before the bias.
        let scaled = self.adapter.is_some_and(|a| a.config.dora);
        if let Some(bias) = bias.filter(|_| !scaled) {
            add_bias(pool, y, m, bias);
        }
        if let Some(adapter) = self.adapter {
            let ProjectScratch { lora, drop, dora, .. } = scratch;
            let drop = drop.as_ref().map(|(step, rows)| DropKeys { step: *step, rows });
            match adapter.drops_base(drop) {
                true => {
                    adapter.dropped_forward(pool, layer, projection, weight, x, m, y, drop, dora, lora);
                }
                false => adapter.forward(pool, layer, projection, x, m, y, drop, lora),
            }
        }
        if let Some(bias) = bias.filter(|_| scaled) {
            add_bias(pool, y, m, bias);
        }
    }

    /// Gradients of [`Weights::project`]: `dx [m, k]` is overwritten, parameters' gradients are added.
    #[allow(clippy::too_many_arguments)]
    pub fn project_backward(
        &self,
        pool: &Pool,
        layer: usize,
        projection: Projection,
        x: &[f32],
        dy: &[f32],
        dx: &mut Vec<f32>,
        grads: &mut Grads,
        scratch: &mut ProjectScratch,
    ) {
        let slots = &self.slots.layers[layer];
        let weight = self.base.matrix(slots.dense(projection));
        let m = x.len() / weight.k;
        dx.resize(m * weight.k, 0.0);
        let ProjectScratch { dora, lora, drop, columns } = scratch;
        let drop = drop.as_ref().map(|(step, rows)| DropKeys { step: *step, rows });
        let whole = dy;
        let dropping = self.adapter.filter(|a| a.drops_base(drop));
        let dy = match self.adapter.filter(|a| a.config.dora) {
            Some(adapter) => {
                let grads = &mut grads.adapter;
                adapter
                    .magnitude_backward(pool, layer, projection, weight, x, m, dy, grads, drop, dora, lora);
                &dora.dy
            }
            None => dy,
        };
        let kept = if dropping.is_some() { whole } else { dy };
        linear_dx(pool, kept, m, weight, dx, Write::Set);
        self.base_gradient(pool, layer, projection, x, dy, grads, columns);
        if let Some(adapter) = self.adapter {
            let (grads, waiting) = (&mut grads.adapter, &mut grads.adapter_waiting);
            adapter.backward(pool, layer, projection, x, m, dy, dx, grads, waiting, drop, lora);
        }
        if let Some(adapter) = dropping {
            adapter.dropped_backward(pool, layer, projection, weight, whole, m, dx, drop, dora, lora);
        }
    }

    /// As [`Weights::project_backward`] without adapters, where `x` is made between the two products, from `dx`.
    #[allow(clippy::too_many_arguments)]
    pub(super) fn project_backward_around(
        &self,
        pool: &Pool,
        layer: usize,
        projection: Projection,
        x: &mut Vec<f32>,
        dy: &[f32],
        dx: &mut Vec<f32>,
        grads: &mut Grads,
        scratch: &mut ProjectScratch,
        make_x: impl FnOnce(&[f32], &mut Vec<f32>),
    ) {
        assert!(self.adapter.is_none(), "adapters need x for dx");
        let weight = self.base.matrix(self.slots.layers[layer].dense(projection));
        let m = dy.len() / weight.n;
        dx.resize(m * weight.k, 0.0);
        linear_dx(pool, dy, m, weight, dx, Write::Set);
        make_x(dx, x);
        self.base_gradient(pool, layer, projection, x, dy, grads, &mut scratch.columns);
    }

    /// Adds a projection's gradients of weight and bias.
    #[allow(clippy::too_many_arguments)]
    fn base_gradient(
        &self,
        pool: &Pool,
        layer: usize,
        projection: Projection,
        x: &[f32],
        dy: &[f32],
        grads: &mut Grads,
        columns: &mut Vec<f32>,
    ) {
        let slots = &self.slots.layers[layer];
        let id = slots.dense(projection);
        let m = x.len() / self.base.matrix(id).k;
        let (base, waiting) = (&mut grads.base, &mut grads.base_waiting);
        self.base.add_weight_gradient(pool, id, dy, x, m, base, waiting, columns);
        if let Some(bias) = slots.bias[projection as usize] {
            self.base.add_bias_gradient(pool, bias, dy, m, &mut grads.base, columns);
        }
    }
}

/// The spec of a new model: Qwen3 architecture, tied embeddings.
pub fn new_model_spec(shape: &NewModelConfig, vocab: usize, eos: u32, positions: usize) -> Result<ModelSpec> {
    ModelSpec::from_config_json(&serde_json::json!({
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": vocab,
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "intermediate_size": shape.ffn,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "max_position_embeddings": positions,
        "tie_word_embeddings": true,
        "attention_bias": false,
        "eos_token_id": eos,
        "torch_dtype": "float32",
    }))
}
