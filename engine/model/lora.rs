//! Low-rank adapters: where they sit, their forward and backward, and their PEFT names.
//!
//! An adapter adds `scaling * (drop(x) A^T) B^T` to a projection's output (Hu et al. 2021, arXiv 2106.09685, eq. 3).
//! Fused projections carry one adapter per Hugging Face projection, on its own columns. A starts as
//! Kaiming-uniform noise and B as zero, as in peft, so a new adapter changes nothing.

use rft_kernels::{Pool, Write, add_columns, dropout, linear, linear_dx, take_columns};

use crate::config::LoraConfig;
use crate::error::{EngineError, Result};
use crate::model::params::{Arena, Part, Shape, SlotId, WaitingRows};
use crate::model::policy::Projection;
use crate::model::spec::ModelSpec;
use crate::rng::{Purpose, Stream};

/// Adapters of every layer.
#[derive(Debug, Clone)]
pub struct Adapter {
    /// A and B matrices, all trainable.
    pub arena: Arena,
    /// Factor of the low-rank product, where no pattern says otherwise.
    pub scaling: f32,
    /// The settings they were made with.
    pub config: LoraConfig,
    /// Key of the dropout masks.
    pub seed: u64,
    pub(super) sites: Vec<Site>,
    /// `sites` of layer l, projection p: `ranges[l * 4 + p]`.
    ranges: Vec<std::ops::Range<usize>>,
}

/// One adapter: `[n, r] x [r, k]` on columns `offset..offset + n` of a projection's output.
#[derive(Debug, Clone)]
pub(super) struct Site {
    a: SlotId,
    b: SlotId,
    /// Of a DoRA adapter: the learned magnitudes, and the norms of `W + s B A` when they were last measured.
    pub(super) magnitude: Option<SlotId>,
    pub(super) norms: Vec<f32>,
    pub(super) offset: usize,
    pub(super) n: usize,
    pub(super) scaling: f32,
}

/// What decides dropout masks beside the adapter's seed: the update, and the identity of every row.
#[derive(Debug, Clone, Copy)]
pub struct DropKeys<'a> {
    /// Updates before this one.
    pub step: u64,
    /// One key a row, the same wherever the row is computed.
    pub rows: &'a [u64],
}

/// Reusable buffers of the adapter's small products.
#[derive(Debug, Default)]
pub struct LoraScratch {
    pub(super) dropped: Vec<f32>,
    low: Vec<f32>,
    pub(super) high: Vec<f32>,
    d_low: Vec<f32>,
    columns: Vec<f32>,
}

/// (name, projection, first column, columns, inputs) of every adaptable projection of a layer.
fn projections(spec: &ModelSpec) -> Vec<(&'static str, Projection, usize, usize, usize)> {
    let (q, kv) = (spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim);
    let (hidden, ffn) = (spec.hidden, spec.ffn);
    let o = ("self_attn.o_proj", Projection::O, 0, hidden, q);
    let down = ("mlp.down_proj", Projection::Down, 0, hidden, ffn);
    if spec.fused_projections {
        return vec![
            ("self_attn.qkv_proj", Projection::Qkv, 0, q + 2 * kv, hidden),
            o,
            ("mlp.gate_up_proj", Projection::GateUp, 0, 2 * ffn, hidden),
            down,
        ];
    }
    vec![
        ("self_attn.q_proj", Projection::Qkv, 0, q, hidden),
        ("self_attn.k_proj", Projection::Qkv, q, kv, hidden),
        ("self_attn.v_proj", Projection::Qkv, q + kv, kv, hidden),
        o,
        ("mlp.gate_proj", Projection::GateUp, 0, ffn, hidden),
        ("mlp.up_proj", Projection::GateUp, ffn, ffn, hidden),
        down,
    ]
}

/// Whether a target names a module: its whole path or the end of it, as in peft.
pub(super) fn targets(target: &str, module: &str) -> bool {
    target == ALL_LINEAR || module == target || module.ends_with(&format!(".{target}"))
}

/// The target that stands for every projection.
pub const ALL_LINEAR: &str = "all-linear";

/// Where the adapters of a config sit, before anything of their size exists.
pub struct Plan {
    /// Shape and PEFT names of every matrix.
    pub layout: Vec<(Shape, Vec<Part>)>,
    sites: Vec<Site>,
    ranges: Vec<std::ops::Range<usize>>,
}

impl Adapter {
    /// New adapters: A ~ U(-1/sqrt(k), 1/sqrt(k)) (Kaiming with a = sqrt 5, as peft), B = 0.
    ///
    /// # Errors
    /// A target or pattern that names no projection of this decoder; settings that exclude each other.
    pub fn new(spec: &ModelSpec, config: &LoraConfig, seed: u64) -> Result<Self> {
        Ok(Self::planned(Self::plan(spec, config)?, config, seed))
    }

    /// Where adapters sit and how large they are.
    ///
    /// # Errors
    /// As [`Adapter::new`].
    pub fn plan(spec: &ModelSpec, config: &LoraConfig) -> Result<Plan> {
        let all = projections(spec);
        let mut patterns = Patterns::new(config)?;
        let experts = |t: &&String| {
            matches!(t.rsplit('.').next(), Some("gate_proj" | "up_proj" | "down_proj" | ALL_LINEAR))
        };
        if let Some(target) = config.targets.iter().find(experts).filter(|_| spec.moe.is_some()) {
            return Err(EngineError::Config(format!(
                "model.lora.targets: `{target}` lies in the experts of a {}, and adapters on experts are not supported\n\
                 hint: targets = [\"q_proj\", \"k_proj\", \"v_proj\", \"o_proj\"]",
                spec.architecture
            )));
        }
        let mut hit = vec![false; config.targets.len()];
        let (mut layout, mut sites, mut ranges) = (Vec::new(), Vec::new(), Vec::new());
        for layer in 0..spec.layers {
            for projection in Projection::ALL {
                let first = sites.len();
                for &(name, _, offset, n, k) in all.iter().filter(|p| p.1 == projection) {
                    let module = format!("model.layers.{layer}.{name}");
                    let mut chosen = false;
                    for (hit, target) in hit.iter_mut().zip(&config.targets) {
                        let matches = targets(target, &module);
                        (*hit, chosen) = (*hit || matches, chosen || matches);
                    }
                    if !chosen {
                        continue;
                    }
                    let (rank, alpha) = patterns.of(&module)?;
                    let part = |which: &str, rows| {
                        vec![Part { name: format!("base_model.model.{module}.{which}"), rows }]
                    };
                    let a = layout.len();
                    layout.push((Shape::Matrix { n: rank, k }, part("lora_A.weight", rank)));
                    layout.push((Shape::Matrix { n, k: rank }, part("lora_B.weight", n)));
                    let magnitude = config.dora.then(|| {
                        layout.push((Shape::Vector(n), part("lora_magnitude_vector", n)));
                        a + 2
                    });
                    let scaling = scaling(alpha, rank, config.rslora);
                    sites.push(Site { a, b: a + 1, magnitude, norms: Vec::new(), offset, n, scaling });
                }
                ranges.push(first..sites.len());
            }
        }
        if let Some(at) = hit.iter().position(|hit| !hit) {
            let valid: Vec<&str> = all.iter().map(|p| p.0.rsplit('.').next().unwrap_or(p.0)).collect();
            return Err(EngineError::Config(format!(
                "model.lora.targets: no projection `{}`; valid: {}, or {ALL_LINEAR}",
                config.targets[at],
                valid.join(", ")
            )));
        }
        patterns.all_used()?;
        Ok(Plan { layout, sites, ranges })
    }

    /// New adapters of a plan.
    pub fn planned(plan: Plan, config: &LoraConfig, seed: u64) -> Self {
        let Plan { layout, sites, ranges } = plan;
        let mut arena = Arena::new(layout, true);
        for site in &sites {
            let Shape::Matrix { n, k } = arena.slots()[site.a].shape else { unreachable!("A is a matrix") };
            let mut noise = Stream::new(seed, Purpose::Init, &[site.a as u64]);
            let bound = 1.0 / (k as f64).sqrt();
            let rows: Vec<f32> =
                (0..n * k).map(|_| ((2.0 * noise.next_f64() - 1.0) * bound) as f32).collect();
            rft_kernels::pack_panels(&rows, n, k, arena.values_mut(site.a));
        }
        let scaling = scaling(config.alpha, config.rank, config.rslora);
        Self { arena, scaling, config: config.clone(), seed, sites, ranges }
    }

    pub(super) fn range(&self, layer: usize, projection: Projection) -> std::ops::Range<usize> {
        self.ranges[layer * Projection::ALL.len() + projection as usize].clone()
    }

    /// Keys of a site's mask, row by row; `None` without dropout.
    pub(super) fn mask(&self, site: usize, drop: Option<DropKeys>) -> Option<Vec<u64>> {
        let keys = drop.filter(|_| self.config.dropout > 0.0)?;
        let stream = Stream::new(self.seed, Purpose::Dropout, &[keys.step, site as u64]);
        Some(keys.rows.iter().map(|&row| stream.at(row)).collect())
    }

    /// Applies the adapters of a projection to its output `y [m, width]` for inputs `x [m, k]`.
    #[allow(clippy::too_many_arguments)]
    pub fn forward(
        &self,
        pool: &Pool,
        layer: usize,
        projection: Projection,
        x: &[f32],
        m: usize,
        y: &mut [f32],
        drop: Option<DropKeys>,
        scratch: &mut LoraScratch,
    ) {
        let width = y.len() / m.max(1);
        for at in self.range(layer, projection) {
            let site = &self.sites[at];
            self.products(pool, at, x, m, drop, scratch);
            add_columns(pool, y, width, site.offset, &scratch.high, m, site.n, site.scaling);
            self.scale(pool, at, y, width);
        }
    }

    /// Leaves `drop(x) A^T` in `scratch.low`, its product with B in `scratch.high` and, with dropout, `drop(x)` in
    /// `scratch.dropped`.
    pub(super) fn products(
        &self,
        pool: &Pool,
        at: usize,
        x: &[f32],
        m: usize,
        drop: Option<DropKeys>,
        scratch: &mut LoraScratch,
    ) {
        let site = &self.sites[at];
        let (a, b) = (self.arena.matrix(site.a), self.arena.matrix(site.b));
        let x = match self.mask(at, drop) {
            Some(keys) => {
                scratch.dropped.resize(x.len(), 0.0);
                dropout(pool, x, a.k, self.config.dropout, &keys, &mut scratch.dropped, Write::Set);
                &scratch.dropped
            }
            None => x,
        };
        scratch.low.resize(m * a.n, 0.0);
        linear(pool, x, m, a, &mut scratch.low, Write::Set);
        scratch.high.resize(m * site.n, 0.0);
        linear(pool, &scratch.low, m, b, &mut scratch.high, Write::Set);
    }

    /// Gradients of the low-rank products: into `grads` (laid out as the arena's trainable slots) and added to
    /// `dx [m, k]`.
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
        waiting: &mut WaitingRows,
        drop: Option<DropKeys>,
        scratch: &mut LoraScratch,
    ) {
        for at in self.range(layer, projection) {
            let site = &self.sites[at];
            let (a, b) = (self.arena.matrix(site.a), self.arena.matrix(site.b));
            self.products(pool, at, x, m, drop, scratch);
            let mask = self.mask(at, drop);
            let x = if mask.is_some() { &scratch.dropped } else { x };
            take_columns(pool, dy, dy.len() / m, site.offset, m, site.n, site.scaling, &mut scratch.high);
            let columns = &mut scratch.columns;
            let (low, high) = (&scratch.low, &scratch.high);
            self.arena.add_weight_gradient(pool, site.b, high, low, m, grads, waiting, columns);
            scratch.d_low.resize(m * a.n, 0.0);
            linear_dx(pool, &scratch.high, m, b, &mut scratch.d_low, Write::Set);
            self.arena.add_weight_gradient(pool, site.a, &scratch.d_low, x, m, grads, waiting, columns);
            match mask {
                Some(keys) => {
                    let d = &mut scratch.dropped;
                    linear_dx(pool, &scratch.d_low, m, a, d, Write::Set);
                    dropout(pool, d, a.k, self.config.dropout, &keys, dx, Write::Add);
                }
                None => linear_dx(pool, &scratch.d_low, m, a, dx, Write::Add),
            }
        }
    }

    /// Applies the adapters to a projection's weight `rows [width, k]`, for export.
    pub fn merge_into(&self, layer: usize, projection: Projection, rows: &mut [f32], k: usize) {
        self.add_products(layer, projection, rows, k);
        self.scale_rows(layer, projection, rows, k);
    }

    /// Adds `scaling * B A` to a projection's weight `rows [width, k]`.
    pub(super) fn add_products(&self, layer: usize, projection: Projection, rows: &mut [f32], k: usize) {
        let mut sum = vec![0.0f64; k];
        for site in &self.sites[self.range(layer, projection)] {
            let r = self.arena.matrix(site.a).n;
            let (mut a, mut b) = (vec![0.0; r * k], vec![0.0; site.n * r]);
            rft_kernels::unpack_panels(self.arena.values(site.a), r, k, &mut a);
            rft_kernels::unpack_panels(self.arena.values(site.b), site.n, r, &mut b);
            for (row, b_row) in rows.chunks_exact_mut(k).skip(site.offset).zip(b.chunks_exact(r)) {
                sum.fill(0.0);
                for (b, a_row) in b_row.iter().zip(a.chunks_exact(k)) {
                    sum.iter_mut().zip(a_row).for_each(|(sum, a)| *sum += f64::from(*b) * f64::from(*a));
                }
                row.iter_mut().zip(&sum).for_each(|(w, sum)| *w += (f64::from(site.scaling) * sum) as f32);
            }
        }
    }
}

fn scaling(alpha: f32, rank: usize, rslora: bool) -> f32 {
    alpha / if rslora { (rank as f32).sqrt() } else { rank as f32 }
}

/// `rank_pattern` and `alpha_pattern`: settings of modules that a regular expression names.
struct Patterns<'a> {
    config: &'a LoraConfig,
    ranks: Vec<(regex::Regex, usize, bool)>,
    alphas: Vec<(regex::Regex, f32, bool)>,
}

impl<'a> Patterns<'a> {
    fn new(config: &'a LoraConfig) -> Result<Self> {
        // as peft's get_pattern_key: the pattern may be the end of the module's path
        let compile = |key: &str, pattern: &str| {
            regex::Regex::new(&format!(r"^(?:.*\.)?(?:{pattern})$")).map_err(|e| {
                EngineError::Config(format!("model.lora.{key}: `{pattern}` is no regular expression: {e}"))
            })
        };
        let ranks = config.rank_pattern.iter();
        let alphas = config.alpha_pattern.iter();
        Ok(Self {
            config,
            ranks: ranks.map(|(p, &r)| Ok((compile("rank_pattern", p)?, r, false))).collect::<Result<_>>()?,
            alphas: alphas
                .map(|(p, &a)| Ok((compile("alpha_pattern", p)?, a, false)))
                .collect::<Result<_>>()?,
        })
    }

    /// Rank and alpha of a module.
    fn of(&mut self, module: &str) -> Result<(usize, f32)> {
        let rank = pick(&mut self.ranks, "rank_pattern", module)?.unwrap_or(self.config.rank);
        let alpha = pick(&mut self.alphas, "alpha_pattern", module)?.unwrap_or(self.config.alpha);
        Ok((rank, alpha))
    }

    /// Reports a pattern that named nothing.
    fn all_used(&self) -> Result<()> {
        let ranks = self.ranks.iter().map(|(p, _, used)| ("rank_pattern", p, used));
        let alphas = self.alphas.iter().map(|(p, _, used)| ("alpha_pattern", p, used));
        match ranks.chain(alphas).find(|(_, _, used)| !**used) {
            Some((key, pattern, _)) => Err(EngineError::Config(format!(
                "model.lora.{key}: `{pattern}` names none of the adapted modules. hint: modules are called \
                 `model.layers.0.self_attn.q_proj`"
            ))),
            None => Ok(()),
        }
    }
}

/// The value of the pattern that names the module. peft takes the first; which that is cannot be told from a sorted
/// table, so two that differ are refused.
fn pick<T: Copy + PartialEq>(
    patterns: &mut [(regex::Regex, T, bool)],
    key: &str,
    module: &str,
) -> Result<Option<T>> {
    let mut found = None;
    for (pattern, value, used) in patterns.iter_mut().filter(|p| p.0.is_match(module)) {
        *used = true;
        if found.is_some_and(|f| f != *value) {
            return Err(EngineError::Config(format!(
                "model.lora.{key}: several patterns name `{module}` (one is `{pattern}`). hint: make them exclude each other"
            )));
        }
        found = Some(*value);
    }
    Ok(found)
}
