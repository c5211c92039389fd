//! The weights: one ordered f32 buffer in the kernels' panel layout, read by rollout and learner alike.
//!
//! A slot is one matrix or vector as the kernels use it; fused projections (q, k, v and gate, up) are one slot
//! made of several Hugging Face tensors stacked by rows. Which tensors train is one mask ([`Arena::train_only`]);
//! gradients and optimizer moments live in buffers of [`Arena::trainable_len`] numbers that hold the trained rows
//! in slot order, so every sum over parameters has one fixed order and what is frozen takes no room. In bf16
//! precision the matrices have a bf16 shadow, remade after each update. Frozen matrices may be held in 8 or 4 bits
//! instead ([`Arena::with_quantized`]).

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ops::Range;

use rft_kernels::{
    Buffer, Code, Matrix, PANEL, Pool, Quantized, Waiting, bf16_panels_len, bias_backward, linear_dw,
    pack_panels, panels_len, take_columns, to_bf16_panels, unpack_panels,
};

use crate::error::Result;

/// Index of a slot in its arena.
pub type SlotId = usize;

/// Shape of a slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shape {
    /// `[n outputs, k inputs]`, stored in panels.
    Matrix {
        /// Outputs.
        n: usize,
        /// Inputs.
        k: usize,
    },
    /// A vector of this length.
    Vector(usize),
}

impl Shape {
    /// Stored numbers, panel padding included.
    pub fn stored_len(self) -> usize {
        match self {
            Self::Matrix { n, k } => panels_len(n, k),
            Self::Vector(n) => n,
        }
    }

    /// Shape of a part in the checkpoint.
    pub fn of_part(self, part: &Part) -> Vec<usize> {
        match self {
            Self::Matrix { k, .. } => vec![part.rows, k],
            Self::Vector(_) => vec![part.rows],
        }
    }

    /// Parameters, without padding.
    pub fn count(self) -> usize {
        match self {
            Self::Matrix { n, k } => n * k,
            Self::Vector(n) => n,
        }
    }
}

/// Rows that wait for their block of a bf16 weight gradient, by where the gradient lies in its buffer.
pub type WaitingRows = BTreeMap<usize, Waiting>;

/// A Hugging Face tensor inside a slot.
#[derive(Debug, Clone)]
pub struct Part {
    /// Its name in the checkpoint.
    pub name: String,
    /// Its share of the slot's rows (matrix) or elements (vector).
    pub rows: usize,
}

/// One matrix or vector of the model.
#[derive(Debug, Clone)]
pub struct Slot {
    /// Shape of the whole slot.
    pub shape: Shape,
    /// The tensors it is made of, stacked by rows.
    pub parts: Vec<Part>,
    /// What of it receives gradients and updates, in row order; empty when it is frozen.
    pub trained: Vec<Trained>,
    start: usize,
    bf16_start: usize,
    /// Where it is in the arena's quantised matrices, if it is one.
    quantized: Option<usize>,
}

/// Rows of a slot that receive gradients and updates.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trained {
    /// The rows (elements of a vector), tensor by tensor.
    pub rows: Vec<Range<usize>>,
    /// The same widened to whole panels of a matrix: what the gradient covers.
    pub span: Range<usize>,
    /// Where the gradient of the span lies in a gradient buffer.
    pub grad: Range<usize>,
}

impl Slot {
    /// Stored numbers from the start of row `rows.start`, a panel's first, to the end of the last one's panel.
    fn stored(&self, rows: &Range<usize>) -> Range<usize> {
        match self.shape {
            Shape::Matrix { k, .. } => {
                let from = self.start + rows.start * k;
                from..from + panels_len(rows.len(), k)
            }
            Shape::Vector(_) => self.start + rows.start..self.start + rows.end,
        }
    }

    /// Where the shadow of a run lies, if it is laid out as its numbers are and no frozen row is among them.
    fn shadow(&self, run: &Trained) -> Option<Range<usize>> {
        let Shape::Matrix { k, .. } = self.shape else { return None };
        let rows: usize = run.rows.iter().map(Range::len).sum();
        (k.is_multiple_of(2) && rows == run.span.len()).then(|| {
            let from = self.bf16_start + run.span.start * k;
            from..from + panels_len(run.span.len(), k)
        })
    }

    fn outputs(&self) -> usize {
        match self.shape {
            Shape::Matrix { n, .. } | Shape::Vector(n) => n,
        }
    }

    /// f32 numbers held.
    fn stored_len(&self) -> usize {
        if self.quantized.is_some() { 0 } else { self.shape.stored_len() }
    }

    /// The runs of trained rows for a choice of tensors, their gradients from `at` on.
    fn runs(&self, trains: &impl Fn(&str) -> bool, mut at: usize) -> Vec<Trained> {
        if self.quantized.is_some() {
            return Vec::new();
        }
        let (panel, k) = match self.shape {
            Shape::Matrix { k, .. } => (PANEL, k),
            Shape::Vector(_) => (1, 1),
        };
        let mut runs: Vec<Trained> = Vec::new();
        let mut row = 0;
        for part in &self.parts {
            let rows = row..row + part.rows;
            row = rows.end;
            if !trains(&part.name) {
                continue;
            }
            let span = rows.start / panel * panel..rows.end.next_multiple_of(panel).min(self.outputs());
            match runs.last_mut() {
                Some(last)
                    if span.start < last.span.end.next_multiple_of(panel) || span.start == last.span.end =>
                {
                    last.span.end = span.end;
                    match last.rows.last_mut() {
                        Some(before) if before.end == rows.start => before.end = rows.end,
                        _ => last.rows.push(rows),
                    }
                }
                _ => runs.push(Trained { rows: vec![rows], span, grad: 0..0 }),
            }
        }
        for run in &mut runs {
            let len = run.span.len().next_multiple_of(panel) * k;
            run.grad = at..at + len;
            at += len;
        }
        runs
    }
}

/// A run of trained rows, for an update.
#[derive(Debug)]
pub struct TrainedMut<'a> {
    /// Its weights, in whole panels.
    pub weights: &'a mut [f32],
    /// Their bf16 shadow, where it is laid out alike.
    pub shadow: Option<&'a mut [u16]>,
    /// Where its gradient and moments lie.
    pub grad: Range<usize>,
    /// Matrices decay, vectors do not.
    pub decays: bool,
}

/// An ordered set of slots over one buffer.
#[derive(Debug, Clone)]
pub struct Arena {
    slots: Vec<Slot>,
    data: Vec<f32>,
    /// Starts at a cache line, as tile loads that straddle two cost twice.
    bf16: Buffer<u16>,
    quantized: Vec<Quantized>,
    trainable_len: usize,
}

impl Arena {
    /// Zero-filled slots in the given order.
    pub fn new(layout: Vec<(Shape, Vec<Part>)>, trainable: bool) -> Self {
        let mut arena = Self::with_quantized(layout, None, |_| false);
        arena.train_only(|_| trainable);
        arena
    }

    /// Frozen slots in the given order; the matrices whose tensors `which` says yes to, by name, are held in `code`.
    pub fn with_quantized(
        layout: Vec<(Shape, Vec<Part>)>,
        code: Option<Code>,
        which: impl Fn(&str) -> bool,
    ) -> Self {
        let (mut start, mut quantized) = (0, Vec::new());
        let mut slots = Vec::with_capacity(layout.len());
        for (shape, parts) in layout {
            let mut slot = Slot { shape, parts, trained: Vec::new(), start, bf16_start: 0, quantized: None };
            if let (Some(code), Shape::Matrix { n, k }) = (code, shape)
                && slot.parts.iter().all(|part| which(&part.name))
            {
                slot.quantized = Some(quantized.len());
                quantized.push(Quantized::zeros(n, k, code));
            }
            start += slot.stored_len();
            slots.push(slot);
        }
        Self { slots, data: vec![0.0; start], bf16: Buffer::default(), quantized, trainable_len: 0 }
    }

    /// Trains the tensors that `trains` says yes to, by name, and freezes the others.
    pub fn train_only(&mut self, trains: impl Fn(&str) -> bool) {
        let mut at = 0;
        for slot in &mut self.slots {
            slot.trained = slot.runs(&trains, at);
            at = slot.trained.last().map_or(at, |run| run.grad.end);
        }
        self.trainable_len = at;
    }

    /// All slots, in order.
    pub fn slots(&self) -> &[Slot] {
        &self.slots
    }

    /// Numbers in a gradient or moment buffer.
    pub fn trainable_len(&self) -> usize {
        self.trainable_len
    }

    /// Parameters, without padding.
    pub fn count(&self) -> usize {
        self.slots.iter().map(|s| s.shape.count()).sum()
    }

    /// Parameters that train.
    pub fn trainable_count(&self) -> usize {
        let trained = |slot: &Slot| {
            let rows: usize = slot.trained.iter().flat_map(|run| &run.rows).map(Range::len).sum();
            match slot.shape {
                Shape::Matrix { k, .. } => rows * k,
                Shape::Vector(_) => rows,
            }
        };
        self.slots.iter().map(trained).sum()
    }

    /// Bytes held: f32 weights, the bf16 shadow, quantised matrices.
    pub fn bytes(&self) -> usize {
        let quantized: usize = self.quantized.iter().map(Quantized::bytes).sum();
        self.data.len() * 4 + self.bf16.len() * 2 + quantized
    }

    /// Whether a slot is held in 8 or 4 bits: then only [`Arena::matrix`] gives it.
    pub fn is_quantized(&self, id: SlotId) -> bool {
        self.slots[id].quantized.is_some()
    }

    /// A slot's codes, if it is held in 8 or 4 bits.
    pub fn matrix_codes(&self, id: SlotId) -> Option<&Quantized> {
        self.slots[id].quantized.map(|at| &self.quantized[at])
    }

    /// As [`Arena::matrix_codes`], writable.
    pub fn quantized_mut(&mut self, id: SlotId) -> Option<&mut Quantized> {
        self.slots[id].quantized.map(|at| &mut self.quantized[at])
    }

    /// Keeps a bf16 copy of every matrix from now on.
    pub fn enable_bf16(&mut self, pool: &Pool) {
        let mut len = 0;
        self.quantized.iter_mut().for_each(Quantized::use_bf16);
        for slot in self.slots.iter_mut().filter(|slot| slot.quantized.is_none()) {
            if let Shape::Matrix { n, k } = slot.shape {
                slot.bf16_start = len;
                len += bf16_panels_len(n, k);
            }
        }
        self.bf16 = Buffer::zeros(len);
        self.refresh(pool);
    }

    /// Remakes the bf16 shadow; call after every change of the weights.
    pub fn refresh(&mut self, pool: &Pool) {
        self.refresh_where(pool, |_| true);
    }

    /// Remakes the bf16 shadow of what trains, but for those that [`Arena::trainable_mut`] gave where the update made them.
    pub fn refresh_trained(&mut self, pool: &Pool, made: bool) {
        self.refresh_where(pool, |slot| slot.trained.iter().any(|run| !made || slot.shadow(run).is_none()));
    }

    fn refresh_where(&mut self, pool: &Pool, which: impl Fn(&Slot) -> bool) {
        if self.bf16.is_empty() {
            return;
        }
        for slot in self.slots.iter().filter(|slot| slot.quantized.is_none() && which(slot)) {
            if let Shape::Matrix { n, k } = slot.shape {
                let out = &mut self.bf16[slot.bf16_start..slot.bf16_start + bf16_panels_len(n, k)];
                to_bf16_panels(pool, &self.data[slot.start..slot.start + slot.shape.stored_len()], n, k, out);
            }
        }
    }

    /// The matrix in a slot.
    pub fn matrix(&self, id: SlotId) -> Matrix<'_> {
        let slot = &self.slots[id];
        let Shape::Matrix { n, k } = slot.shape else { unreachable!("slot {id} is a vector") };
        if let Some(at) = slot.quantized {
            return Matrix { n, k, f32: &[], bf16: None, quantized: Some(&self.quantized[at]) };
        }
        let bf16 = (!self.bf16.is_empty())
            .then(|| &self.bf16[slot.bf16_start..slot.bf16_start + bf16_panels_len(n, k)]);
        Matrix {
            n,
            k,
            f32: &self.data[slot.start..slot.start + slot.shape.stored_len()],
            bf16,
            quantized: None,
        }
    }

    /// The stored numbers of a slot: a vector, or a matrix's panels; none of a quantised one.
    pub fn values(&self, id: SlotId) -> &[f32] {
        let slot = &self.slots[id];
        &self.data[slot.start..slot.start + slot.stored_len()]
    }

    /// As [`Arena::values`], writable. [`Arena::refresh`] afterwards.
    pub fn values_mut(&mut self, id: SlotId) -> &mut [f32] {
        let slot = &self.slots[id];
        &mut self.data[slot.start..slot.start + slot.stored_len()]
    }

    /// Where the gradient of a slot's trained rows lies in a gradient buffer; `None` for a frozen slot.
    pub fn grad_range(&self, id: SlotId) -> Option<Range<usize>> {
        let trained = &self.slots[id].trained;
        Some(trained.first()?.grad.start..trained.last()?.grad.end)
    }

    /// Adds the gradient of a matrix's trained rows, `dy [m, n]` transposed times `x [m, k]`, to a gradient buffer.
    /// Frozen rows cost nothing, except those that share a panel with trained ones (see [`Arena::clear_frozen`]). In bf16 rows of an
    /// unfinished block wait for [`Arena::finish_weight_gradients`].
    #[allow(clippy::too_many_arguments)]
    pub fn add_weight_gradient(
        &self,
        pool: &Pool,
        id: SlotId,
        dy: &[f32],
        x: &[f32],
        m: usize,
        grads: &mut [f32],
        waiting: &mut WaitingRows,
        scratch: &mut Vec<f32>,
    ) {
        let slot = &self.slots[id];
        let Shape::Matrix { n, k } = slot.shape else { unreachable!("slot {id} is a vector") };
        let bf16 = !self.bf16.is_empty();
        for run in &slot.trained {
            let dy = columns(pool, dy, m, n, &run.span, scratch);
            let (rows, dw) = (run.span.len(), &mut grads[run.grad.clone()]);
            if bf16 {
                let waiting = waiting.entry(run.grad.start).or_insert_with(|| Waiting::new(rows, k));
                waiting.linear_dw(pool, dy, x, m, dw);
            } else {
                linear_dw(pool, dy, x, m, rows, k, dw, false);
            }
        }
    }

    /// Adds the rows that [`Arena::add_weight_gradient`] left waiting.
    pub fn finish_weight_gradients(&self, pool: &Pool, grads: &mut [f32], waiting: &mut WaitingRows) {
        for run in self.slots.iter().flat_map(|slot| &slot.trained) {
            if let Some(waiting) = waiting.get_mut(&run.grad.start) {
                waiting.finish(pool, &mut grads[run.grad.clone()]);
            }
        }
    }

    /// Most bytes that waiting rows take in bf16.
    pub fn waiting_bytes(&self) -> usize {
        let runs = self.slots.iter().flat_map(|slot| slot.trained.iter().map(move |run| (slot.shape, run)));
        let bytes = runs.map(|(shape, run)| match shape {
            Shape::Matrix { k, .. } => Waiting::most_bytes(run.span.len(), k),
            Shape::Vector(_) => 0,
        });
        bytes.sum()
    }

    /// Adds the gradient of a bias's trained elements, the sum of the rows of `dy [m, n]`.
    pub fn add_bias_gradient(
        &self,
        pool: &Pool,
        id: SlotId,
        dy: &[f32],
        m: usize,
        grads: &mut [f32],
        scratch: &mut Vec<f32>,
    ) {
        let slot = &self.slots[id];
        for run in &slot.trained {
            let dy = columns(pool, dy, m, slot.outputs(), &run.span, scratch);
            bias_backward(pool, dy, m, &mut grads[run.grad.clone()]);
        }
    }

    /// Zeroes the gradients of frozen rows that share a panel with trained ones.
    pub fn clear_frozen(&self, grads: &mut [f32]) {
        for slot in &self.slots {
            for run in &slot.trained {
                for (_, at) in frozen_lanes(slot, run) {
                    grads[at] = 0.0;
                }
            }
        }
    }

    /// The weights of frozen rows that share a panel with trained ones, by place; for [`Arena::put_back`] after an
    /// update of whole panels.
    pub fn frozen_beside_trained(&self) -> Vec<(usize, f32)> {
        let runs = self.slots.iter().flat_map(|slot| slot.trained.iter().map(move |run| (slot, run)));
        runs.flat_map(|(slot, run)| frozen_lanes(slot, run)).map(|(at, _)| (at, self.data[at])).collect()
    }

    /// Writes back what [`Arena::frozen_beside_trained`] gave.
    pub fn put_back(&mut self, weights: &[(usize, f32)]) {
        for &(at, weight) in weights {
            self.data[at] = weight;
        }
    }

    /// Fills a slot from its tensors, fetched by name and shape.
    ///
    /// # Errors
    /// Whatever `fetch` reports: a missing or misshapen tensor.
    pub fn load_slot(
        &mut self,
        id: SlotId,
        mut fetch: impl FnMut(&str, &[usize]) -> Result<Vec<f32>>,
    ) -> Result<()> {
        let slot = self.slots[id].clone();
        match slot.shape {
            Shape::Vector(_) => {
                let mut at = slot.start;
                for part in &slot.parts {
                    self.data[at..at + part.rows].copy_from_slice(&fetch(&part.name, &[part.rows])?);
                    at += part.rows;
                }
            }
            Shape::Matrix { n, k } => {
                let mut rows = fetch(&slot.parts[0].name, &[slot.parts[0].rows, k])?;
                for part in &slot.parts[1..] {
                    rows.extend_from_slice(&fetch(&part.name, &[part.rows, k])?);
                }
                match self.quantized_mut(id) {
                    Some(quantized) => quantized.set_rows(&Pool::new(1), 0, &rows),
                    None => pack_panels(&rows, n, k, self.values_mut(id)),
                }
            }
        }
        Ok(())
    }

    /// Every Hugging Face tensor of a slot as (name, shape, row-major values), from `values` laid out as the slot.
    pub fn tensors_of(&self, id: SlotId, values: &[f32]) -> Vec<(String, Vec<usize>, Vec<f32>)> {
        let slot = &self.slots[id];
        let (rows, width) = match slot.shape {
            Shape::Vector(_) => (values.to_vec(), None),
            Shape::Matrix { n, k } => {
                let mut rows = vec![0.0; n * k];
                unpack_panels(values, n, k, &mut rows);
                (rows, Some(k))
            }
        };
        if let [part] = &slot.parts[..] {
            let shape = std::iter::once(part.rows).chain(width).collect();
            return vec![(part.name.clone(), shape, rows)];
        }
        let mut at = 0;
        slot.parts
            .iter()
            .map(|part| {
                let len = part.rows * width.unwrap_or(1);
                let shape = std::iter::once(part.rows).chain(width).collect();
                let tensor = (part.name.clone(), shape, rows[at..at + len].to_vec());
                at += len;
                tensor
            })
            .collect()
    }

    /// All f32 weights, slot after slot.
    pub fn stored_values(&self) -> &[f32] {
        &self.data
    }

    /// As [`Arena::stored_values`], writable. [`Arena::refresh`] afterwards.
    pub fn stored_values_mut(&mut self) -> &mut [f32] {
        &mut self.data
    }

    /// Where the gradients of each run of trained rows lie, in order.
    pub fn trained_runs(&self) -> impl Iterator<Item = Range<usize>> + '_ {
        self.slots.iter().flat_map(|slot| slot.trained.iter().map(|run| run.grad.clone()))
    }

    /// As [`Arena::trainable_values`], where they lie.
    pub fn trainable_parts(&self) -> Vec<&[f32]> {
        if self.trainable_len == self.data.len() {
            return vec![&self.data];
        }
        let runs = self.slots.iter().flat_map(|slot| slot.trained.iter().map(move |run| (slot, run)));
        runs.map(|(slot, run)| &self.data[slot.stored(&run.span)]).collect()
    }

    /// The trainable slots' values, in slot order, as the optimizer and the checkpoints lay them out.
    pub fn trainable_values(&self) -> Cow<'_, [f32]> {
        if self.trainable_len == self.data.len() {
            return Cow::Borrowed(&self.data);
        }
        Cow::Owned(self.trainable_parts().concat())
    }

    /// The inverse of [`Arena::trainable_values`].
    pub fn set_trainable_values(&mut self, values: &[f32]) {
        assert_eq!(values.len(), self.trainable_len, "values must cover the trained rows");
        for slot in &self.slots {
            for run in &slot.trained {
                self.data[slot.stored(&run.span)].copy_from_slice(&values[run.grad.clone()]);
            }
        }
    }

    /// The trained runs of rows, in order.
    pub fn trainable_mut(&mut self) -> impl Iterator<Item = TrainedMut<'_>> {
        let (mut rest, mut shadows): (&mut [f32], &mut [u16]) = (&mut self.data, &mut self.bf16);
        let (mut at, mut shadow_at) = (0, 0);
        let bf16 = !shadows.is_empty();
        let runs = self.slots.iter().flat_map(|slot| slot.trained.iter().map(move |run| (slot, run)));
        runs.map(move |(slot, run)| {
            let stored = slot.stored(&run.span);
            let (weights, tail) = std::mem::take(&mut rest)[stored.start - at..].split_at_mut(stored.len());
            (rest, at) = (tail, stored.end);
            let shadow = slot.shadow(run).filter(|_| bf16).map(|place| {
                let (shadow, tail) =
                    std::mem::take(&mut shadows)[place.start - shadow_at..].split_at_mut(place.len());
                (shadows, shadow_at) = (tail, place.end);
                shadow
            });
            let decays = matches!(slot.shape, Shape::Matrix { .. });
            TrainedMut { weights, shadow, grad: run.grad.clone(), decays }
        })
    }
}

/// Columns `span` of `src [m, n]`, side by side: `src` itself where they are all of them.
fn columns<'a>(
    pool: &Pool,
    src: &'a [f32],
    m: usize,
    n: usize,
    span: &Range<usize>,
    scratch: &'a mut Vec<f32>,
) -> &'a [f32] {
    if span.len() == n {
        return src;
    }
    scratch.resize(m * span.len(), 0.0);
    take_columns(pool, src, n, span.start, m, span.len(), 1.0, scratch);
    scratch
}

/// Places (in the arena, in a gradient buffer) of the frozen rows inside a run's span.
fn frozen_lanes<'a>(slot: &'a Slot, run: &'a Trained) -> impl Iterator<Item = (usize, usize)> + 'a {
    let k = match slot.shape {
        Shape::Matrix { k, .. } => k,
        Shape::Vector(_) => 0,
    };
    let frozen = run.span.clone().filter(move |row| !run.rows.iter().any(|rows| rows.contains(row)));
    let stored = slot.stored(&run.span);
    frozen.flat_map(move |row| {
        let (panel, lane) = ((row - run.span.start) / PANEL, (row - run.span.start) % PANEL);
        let at = move |j: usize| (panel * k + j) * PANEL + lane;
        let starts = (stored.start, run.grad.start);
        (0..k).map(move |j| (starts.0 + at(j), starts.1 + at(j)))
    })
}
