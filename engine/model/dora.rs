//! Weight-decomposed adapters: the direction of `W + s B A` at a learned magnitude for each output.
//!
//! `y = m / |W + s B A| * (W x + s B A x)`, the norm row by row (DoRA, Liu et al. 2024, arXiv 2402.09353, eq. 5), and, as in its
//! section 4.3 and in peft, without a gradient through the norm. The norms are measured when weights change, not in passes: see
//! [`Policy::measure_adapter`].
//!
//! With dropout the base's part of what the magnitude adds is of the dropped inputs too, as in peft (`lora/dora.py` and
//! `lora/variants.py`): `y = W x + (g - 1) W d + g s B A d` with `d = drop(x)` and `g = m / |W + s B A|`.

use rft_kernels::{Matrix, Pool, Write, add_columns, dropout, linear, linear_dx, unpack_panels};

use super::lora::{Adapter, DropKeys, LoraScratch};
use super::params::Shape;
use super::policy::{Policy, Projection};

/// Buffers of the backward pass.
#[derive(Debug, Default)]
pub(super) struct DoraScratch {
    /// `W x` and then `W x + s B A x`, `[m, n]`.
    pub(super) output: Vec<f32>,
    /// The gradient of that, `[m, n]`.
    pub(super) dy: Vec<f32>,
    columns: Vec<f32>,
}

impl Policy {
    /// Measures the norms that a DoRA adapter divides by: to be called when its weights or those below have changed.
    pub fn measure_adapter(&mut self, pool: &Pool) {
        if let Some(mut adapter) = self.adapter.take() {
            self.measure(pool, &mut adapter);
            self.adapter = Some(adapter);
        }
    }

    /// As [`Policy::measure_adapter`], of another adapter over these weights.
    pub fn measure(&self, pool: &Pool, adapter: &mut Adapter) {
        if !adapter.config.dora {
            return;
        }
        for (layer, slots) in self.slots.layers.iter().enumerate() {
            for projection in Projection::ALL {
                let Some(id) = slots.weight[projection as usize] else { continue };
                let Shape::Matrix { n, k } = self.base.slots()[id].shape else { continue };
                let mut rows = vec![0.0; n * k];
                match self.base.matrix_codes(id) {
                    Some(codes) => unpack_panels(&codes.panels(pool), n, k, &mut rows),
                    None => unpack_panels(self.base.values(id), n, k, &mut rows),
                }
                adapter.measure_rows(pool, layer, projection, &mut rows, k);
            }
        }
    }

    /// Takes a new adapter, which changes nothing: magnitudes are the norms.
    pub fn adopt(&mut self, pool: &Pool, adapter: Adapter) {
        self.adapter = Some(adapter);
        self.measure_adapter(pool);
        if let Some(adapter) = &mut self.adapter {
            adapter.reset_magnitudes();
        }
    }
}

impl Adapter {
    fn measure_rows(
        &mut self,
        pool: &Pool,
        layer: usize,
        projection: Projection,
        rows: &mut [f32],
        k: usize,
    ) {
        self.add_products(layer, projection, rows, k);
        for at in self.range(layer, projection) {
            let site = &mut self.sites[at];
            let own = &rows[site.offset * k..(site.offset + site.n) * k];
            site.norms.resize(site.n, 0.0);
            pool.map_chunks(&mut site.norms, 1, |i, norm| norm[0] = length(&own[i * k..(i + 1) * k]));
        }
    }

    fn reset_magnitudes(&mut self) {
        for site in &self.sites {
            if let Some(id) = site.magnitude {
                self.arena.values_mut(id).copy_from_slice(&site.norms);
            }
        }
    }

    /// What a site multiplies its outputs by; `None` for plain low-rank adapters.
    fn gains(&self, at: usize) -> Option<Vec<f32>> {
        let site = &self.sites[at];
        let magnitudes = self.arena.values(site.magnitude?);
        Some(magnitudes.iter().zip(&site.norms).map(|(m, norm)| m / norm).collect())
    }

    /// Multiplies a site's columns of `y [m, width]`.
    pub(super) fn scale(&self, pool: &Pool, at: usize, y: &mut [f32], width: usize) {
        let Some(gains) = self.gains(at) else { return };
        let offset = self.sites[at].offset;
        pool.map_chunks(y, width, |_, row| {
            row[offset..].iter_mut().zip(&gains).for_each(|(y, gain)| *y *= gain);
        });
    }

    /// Whether a pass with these keys drops inputs of a DoRA adapter.
    pub(super) fn drops_base(&self, drop: Option<DropKeys>) -> bool {
        self.config.dora && self.config.dropout > 0.0 && drop.is_some()
    }

    /// Adds to `y [m, width]`, which holds `W x`, what an adapter adds in a pass that drops inputs.
    #[allow(clippy::too_many_arguments)]
    pub(super) fn dropped_forward(
        &self,
        pool: &Pool,
        layer: usize,
        projection: Projection,
        weight: Matrix,
        x: &[f32],
        m: usize,
        y: &mut [f32],
        drop: Option<DropKeys>,
        s: &mut DoraScratch,
        lora: &mut LoraScratch,
    ) {
        let width = weight.n;
        s.output.resize(y.len(), 0.0);
        for at in self.range(layer, projection) {
            let (site, gains) = (&self.sites[at], self.gains(at).unwrap_or_default());
            self.products(pool, at, x, m, drop, lora);
            linear(pool, &lora.dropped, m, weight, &mut s.output, Write::Set);
            let (base, low_rank) = (&s.output, &lora.high);
            pool.map_chunks(y, width, |row, y| {
                let base = &base[row * width + site.offset..][..site.n];
                let low_rank = &low_rank[row * site.n..][..site.n];
                for (i, y) in y[site.offset..][..site.n].iter_mut().enumerate() {
                    *y += (gains[i] - 1.0) * base[i] + gains[i] * (site.scaling * low_rank[i]);
                }
            });
        }
    }

    /// Adds to `dx [m, k]` the gradient through the base's product with the dropped inputs; `dy` is that of `y`.
    #[allow(clippy::too_many_arguments)]
    pub(super) fn dropped_backward(
        &self,
        pool: &Pool,
        layer: usize,
        projection: Projection,
        weight: Matrix,
        dy: &[f32],
        m: usize,
        dx: &mut [f32],
        drop: Option<DropKeys>,
        s: &mut DoraScratch,
        lora: &mut LoraScratch,
    ) {
        let width = weight.n;
        for at in self.range(layer, projection) {
            let (site, gains) = (&self.sites[at], self.gains(at).unwrap_or_default());
            let Some(keys) = self.mask(at, drop) else { continue };
            s.output.resize(dy.len(), 0.0);
            pool.map_chunks(&mut s.output, width, |row, d| {
                d.fill(0.0);
                let from = row * width + site.offset;
                for (i, d) in d[site.offset..][..site.n].iter_mut().enumerate() {
                    *d = (gains[i] - 1.0) * dy[from + i];
                }
            });
            lora.dropped.resize(dx.len(), 0.0);
            linear_dx(pool, &s.output, m, weight, &mut lora.dropped, Write::Set);
            dropout(pool, &lora.dropped, weight.k, self.config.dropout, &keys, dx, Write::Add);
        }
    }

    /// Gradients of the magnitudes, into `grads`, and in `s.dy` the gradient of what they multiply.
    #[allow(clippy::too_many_arguments)]
    pub(super) fn magnitude_backward(
        &self,
        pool: &Pool,
        layer: usize,
        projection: Projection,
        weight: Matrix,
        x: &[f32],
        m: usize,
        dy: &[f32],
        grads: &mut [f32],
        drop: Option<DropKeys>,
        s: &mut DoraScratch,
        lora: &mut LoraScratch,
    ) {
        let width = dy.len() / m.max(1);
        s.dy.clear();
        s.dy.extend_from_slice(dy);
        s.output.resize(dy.len(), 0.0);
        let dropped = self.drops_base(drop);
        if !dropped {
            linear(pool, x, m, weight, &mut s.output, Write::Set);
        }
        for at in self.range(layer, projection) {
            let site = &self.sites[at];
            let Some(id) = site.magnitude else { continue };
            self.products(pool, at, x, m, drop, lora);
            if dropped {
                linear(pool, &lora.dropped, m, weight, &mut s.output, Write::Set);
            }
            add_columns(pool, &mut s.output, width, site.offset, &lora.high, m, site.n, site.scaling);
            lora.high.resize(m * site.n, 0.0);
            pool.map_chunks(&mut lora.high, site.n, |row, d| {
                let from = row * width + site.offset;
                for (i, d) in d.iter_mut().enumerate() {
                    *d = dy[from + i] * s.output[from + i] / site.norms[i];
                }
            });
            self.arena.add_bias_gradient(pool, id, &lora.high, m, grads, &mut s.columns);
            self.scale(pool, at, &mut s.dy, width);
        }
    }

    /// Brings rows `[width, k]` of `W + s B A` to their magnitudes, for export.
    pub(super) fn scale_rows(&self, layer: usize, projection: Projection, rows: &mut [f32], k: usize) {
        for site in &self.sites[self.range(layer, projection)] {
            let Some(id) = site.magnitude else { continue };
            let own = rows.chunks_exact_mut(k).skip(site.offset);
            for (row, magnitude) in own.zip(self.arena.values(id)) {
                let gain = magnitude / length(row);
                row.iter_mut().for_each(|w| *w *= gain);
            }
        }
    }
}

/// Euclidean length of a row of weights; 1 for one of zeros, which has no direction.
fn length(row: &[f32]) -> f32 {
    match row.iter().map(|w| f64::from(*w).powi(2)).sum::<f64>().sqrt() as f32 {
        0.0 => 1.0,
        length => length,
    }
}
