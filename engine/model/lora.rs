//! Low-rank adapters: where they sit, their forward and backward, and their PEFT names.
//!
//! An adapter adds `scaling * (x A^T) B^T` to a projection's output (Hu et al. 2021, arXiv 2106.09685, eq. 3).
//! Fused projections carry one adapter per Hugging Face projection, on its own columns. A starts as
//! Kaiming-uniform noise and B as zero, as in peft, so a new adapter changes nothing.

use rft_kernels::{Pool, Write, add_columns, linear, linear_dx, take_columns};

use crate::config::LoraConfig;
use crate::error::{EngineError, Result};
use crate::model::params::{Arena, Part, Shape, SlotId};
use crate::model::policy::Projection;
use crate::model::spec::ModelSpec;
use crate::rng::{Purpose, Stream};

/// Adapters of every layer.
#[derive(Debug, Clone)]
pub struct Adapter {
    /// A and B matrices, all trainable.
    pub arena: Arena,
    /// Factor of the low-rank product.
    pub scaling: f32,
    /// The settings they were made with.
    pub config: LoraConfig,
    sites: Vec<Site>,
    /// `sites` of layer l, projection p: `ranges[l * 4 + p]`.
    ranges: Vec<std::ops::Range<usize>>,
}

/// One adapter: `[n, r] x [r, k]` on columns `offset..offset + n` of a projection's output.
#[derive(Debug, Clone)]
struct Site {
    a: SlotId,
    b: SlotId,
    offset: usize,
    n: usize,
}

/// Reusable buffers of the adapter's small products.
#[derive(Debug, Default)]
pub struct LoraScratch {
    low: Vec<f32>,
    high: Vec<f32>,
    d_low: Vec<f32>,
    transpose: Vec<f32>,
    columns: Vec<f32>,
}

/// (name, projection, first column, columns, inputs) of every adaptable projection of a layer.
fn projections(spec: &ModelSpec) -> [(&'static str, Projection, usize, usize, usize); 7] {
    let (q, kv) = (spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim);
    [
        ("self_attn.q_proj", Projection::Qkv, 0, q, spec.hidden),
        ("self_attn.k_proj", Projection::Qkv, q, kv, spec.hidden),
        ("self_attn.v_proj", Projection::Qkv, q + kv, kv, spec.hidden),
        ("self_attn.o_proj", Projection::O, 0, spec.hidden, q),
        ("mlp.gate_proj", Projection::GateUp, 0, spec.ffn, spec.hidden),
        ("mlp.up_proj", Projection::GateUp, spec.ffn, spec.ffn, spec.hidden),
        ("mlp.down_proj", Projection::Down, 0, spec.hidden, spec.ffn),
    ]
}

impl Adapter {
    /// New adapters: A ~ U(-1/sqrt(k), 1/sqrt(k)) (Kaiming with a = sqrt 5, as peft), B = 0.
    ///
    /// # Errors
    /// A target that names no projection of this decoder.
    pub fn new(spec: &ModelSpec, config: &LoraConfig, seed: u64) -> Result<Self> {
        let all = projections(spec);
        let short = |name: &str| name.rsplit('.').next().unwrap_or(name).to_string();
        if let Some(bad) = config.targets.iter().find(|t| !all.iter().any(|p| short(p.0) == **t)) {
            let valid: Vec<String> = all.iter().map(|p| short(p.0)).collect();
            return Err(EngineError::Config(format!(
                "model.lora.targets: no projection `{bad}`; valid: {}",
                valid.join(", ")
            )));
        }
        let experts = |t: &&String| matches!(t.as_str(), "gate_proj" | "up_proj" | "down_proj");
        if let Some(target) = config.targets.iter().find(experts).filter(|_| spec.moe.is_some()) {
            return Err(EngineError::Config(format!(
                "model.lora.targets: `{target}` lies in the experts of a {}, and adapters on experts are not supported\n\
                 hint: targets = [\"q_proj\", \"k_proj\", \"v_proj\", \"o_proj\"]",
                spec.architecture
            )));
        }
        let r = config.rank;
        let (mut layout, mut sites, mut ranges) = (Vec::new(), Vec::new(), Vec::new());
        for layer in 0..spec.layers {
            for projection in Projection::ALL {
                let first = sites.len();
                for (name, at, offset, n, k) in all {
                    if at != projection || !config.targets.contains(&short(name)) {
                        continue;
                    }
                    let stem = format!("base_model.model.model.layers.{layer}.{name}");
                    let part =
                        |which: &str, rows| vec![Part { name: format!("{stem}.{which}.weight"), rows }];
                    sites.push(Site { a: layout.len(), b: layout.len() + 1, offset, n });
                    layout.push((Shape::Matrix { n: r, k }, part("lora_A", r)));
                    layout.push((Shape::Matrix { n, k: r }, part("lora_B", n)));
                }
                ranges.push(first..sites.len());
            }
        }
        let mut arena = Arena::new(layout, true);
        for site in &sites {
            let Shape::Matrix { n, k } = arena.slots()[site.a].shape else { unreachable!("A is a matrix") };
            let mut noise = Stream::new(seed, Purpose::Init, &[site.a as u64]);
            let bound = 1.0 / (k as f64).sqrt();
            let rows: Vec<f32> =
                (0..n * k).map(|_| ((2.0 * noise.next_f64() - 1.0) * bound) as f32).collect();
            rft_kernels::pack_panels(&rows, n, k, arena.values_mut(site.a));
        }
        let rank = r as f32;
        let scaling = config.alpha / if config.rslora { rank.sqrt() } else { rank };
        Ok(Self { arena, scaling, config: config.clone(), sites, ranges })
    }

    fn at(&self, layer: usize, projection: Projection) -> &[Site] {
        &self.sites[self.ranges[layer * Projection::ALL.len() + projection as usize].clone()]
    }

    /// Adds the adapters of a projection to its output `y [m, width]` for inputs `x [m, k]`.
    #[allow(clippy::too_many_arguments)]
    pub fn forward(
        &self,
        pool: &Pool,
        layer: usize,
        projection: Projection,
        x: &[f32],
        m: usize,
        y: &mut [f32],
        scratch: &mut LoraScratch,
    ) {
        for site in self.at(layer, projection) {
            let (a, b) = (self.arena.matrix(site.a), self.arena.matrix(site.b));
            scratch.low.resize(m * a.n, 0.0);
            linear(pool, x, m, a, &mut scratch.low, Write::Set);
            scratch.high.resize(m * site.n, 0.0);
            linear(pool, &scratch.low, m, b, &mut scratch.high, Write::Set);
            let width = y.len() / m;
            add_columns(pool, y, width, site.offset, &scratch.high, m, site.n, self.scaling);
        }
    }

    /// Gradients of [`Adapter::forward`]: into `grads` (laid out as the arena's trainable slots) and added to `dx [m, k]`.
    #[allow(clippy::too_many_arguments)]
    pub fn backward(
        &self,
        pool: &Pool,
        layer: usize,
        projection: Projection,
        x: &[f32],
        m: usize,
        dy: &[f32],
        dx: &mut [f32],
        grads: &mut [f32],
        scratch: &mut LoraScratch,
    ) {
        for site in self.at(layer, projection) {
            let (a, b) = (self.arena.matrix(site.a), self.arena.matrix(site.b));
            scratch.low.resize(m * a.n, 0.0);
            linear(pool, x, m, a, &mut scratch.low, Write::Set);
            scratch.high.resize(m * site.n, 0.0);
            take_columns(pool, dy, dy.len() / m, site.offset, m, site.n, self.scaling, &mut scratch.high);
            let columns = &mut scratch.columns;
            self.arena.add_weight_gradient(pool, site.b, &scratch.high, &scratch.low, m, grads, columns);
            scratch.d_low.resize(m * a.n, 0.0);
            linear_dx(pool, &scratch.high, m, b, &mut scratch.d_low, Write::Set, &mut scratch.transpose);
            self.arena.add_weight_gradient(pool, site.a, &scratch.d_low, x, m, grads, columns);
            linear_dx(pool, &scratch.d_low, m, a, dx, Write::Add, &mut scratch.transpose);
        }
    }

    /// Adds `scaling * B A` to a projection's weight `rows [width, k]`, for export.
    pub fn merge_into(&self, layer: usize, projection: Projection, rows: &mut [f32], k: usize) {
        for site in self.at(layer, projection) {
            let r = self.config.rank;
            let (mut a, mut b) = (vec![0.0; r * k], vec![0.0; site.n * r]);
            rft_kernels::unpack_panels(self.arena.values(site.a), r, k, &mut a);
            rft_kernels::unpack_panels(self.arena.values(site.b), site.n, r, &mut b);
            for (row, b_row) in rows.chunks_exact_mut(k).skip(site.offset).zip(b.chunks_exact(r)) {
                for (j, w) in row.iter_mut().enumerate() {
                    let sum: f64 = (0..r).map(|i| f64::from(b_row[i]) * f64::from(a[i * k + j])).sum();
                    *w += (f64::from(self.scaling) * sum) as f32;
                }
            }
        }
    }
}
