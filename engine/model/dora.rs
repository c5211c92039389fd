//! Weight-decomposed adapters: the direction of `W + s B A` at a learned magnitude for each output.
//!
//! `y = m / |W + s B A| * (W x + s B A x)`, the norm row by row (DoRA, Liu et al. 2024, arXiv 2402.09353, eq. 5), and, as in its
//! section 4.3 and in peft, without a gradient through the norm. The norms are measured when weights change, not in passes: see
//! [`Policy::measure_adapter`].

use rft_kernels::{Pool, add_columns, unpack_panels};

use super::lora::{Adapter, LoraScratch};
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

    /// Gradients of the magnitudes, into `grads`, and in `s.dy` the gradient of what they multiply; `s.output` holds `W x`.
    #[allow(clippy::too_many_arguments)]
    pub(super) fn magnitude_backward(
        &self,
        pool: &Pool,
        layer: usize,
        projection: Projection,
        x: &[f32],
        m: usize,
        dy: &[f32],
        grads: &mut [f32],
        s: &mut DoraScratch,
        lora: &mut LoraScratch,
    ) {
        let width = dy.len() / m.max(1);
        s.dy.clear();
        s.dy.extend_from_slice(dy);
        for at in self.range(layer, projection) {
            let site = &self.sites[at];
            let Some(id) = site.magnitude else { continue };
            self.products(pool, at, x, m, None, lora);
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
