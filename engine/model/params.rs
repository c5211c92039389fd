//! The weights: one ordered f32 buffer in the kernels' panel layout, read by rollout and learner alike.
//!
//! A slot is one matrix or vector as the kernels use it; fused projections (q, k, v and gate, up) are one slot
//! made of several Hugging Face tensors stacked by rows. Gradients and optimizer moments live in buffers of
//! [`Arena::trainable_len`] numbers that hold the trainable slots in slot order, so every sum over parameters
//! has one fixed order. In bf16 precision the matrices have a bf16 shadow, remade after each update.

use std::borrow::Cow;
use std::ops::Range;

use rft_kernels::{Matrix, Pool, bf16_panels_len, pack_panels, panels_len, to_bf16_panels, unpack_panels};

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

    /// Parameters, without padding.
    pub fn count(self) -> usize {
        match self {
            Self::Matrix { n, k } => n * k,
            Self::Vector(n) => n,
        }
    }
}

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
    /// Receives gradients and updates.
    pub trainable: bool,
    start: usize,
    grad_start: usize,
    bf16_start: usize,
}

/// An ordered set of slots over one buffer.
#[derive(Debug, Clone)]
pub struct Arena {
    slots: Vec<Slot>,
    data: Vec<f32>,
    bf16: Vec<u16>,
    trainable_len: usize,
}

impl Arena {
    /// Zero-filled slots in the given order.
    pub fn new(layout: Vec<(Shape, Vec<Part>)>, trainable: bool) -> Self {
        let (mut start, mut grad_start) = (0, 0);
        let slots = layout
            .into_iter()
            .map(|(shape, parts)| {
                let slot = Slot { shape, parts, trainable, start, grad_start, bf16_start: 0 };
                start += shape.stored_len();
                grad_start += if trainable { shape.stored_len() } else { 0 };
                slot
            })
            .collect();
        Self { slots, data: vec![0.0; start], bf16: Vec::new(), trainable_len: grad_start }
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

    /// Bytes held: f32 weights and the bf16 shadow.
    pub fn bytes(&self) -> usize {
        self.data.len() * 4 + self.bf16.len() * 2
    }

    /// Keeps a bf16 copy of every matrix from now on.
    pub fn enable_bf16(&mut self, pool: &Pool) {
        let mut len = 0;
        for slot in &mut self.slots {
            if let Shape::Matrix { n, k } = slot.shape {
                slot.bf16_start = len;
                len += bf16_panels_len(n, k);
            }
        }
        self.bf16 = vec![0; len];
        self.refresh(pool);
    }

    /// Remakes the bf16 shadow; call after every change of the weights.
    pub fn refresh(&mut self, pool: &Pool) {
        if self.bf16.is_empty() {
            return;
        }
        for slot in &self.slots {
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
        let bf16 = (!self.bf16.is_empty())
            .then(|| &self.bf16[slot.bf16_start..slot.bf16_start + bf16_panels_len(n, k)]);
        Matrix { n, k, f32: &self.data[slot.start..slot.start + slot.shape.stored_len()], bf16 }
    }

    /// The stored numbers of a slot: a vector, or a matrix's panels.
    pub fn values(&self, id: SlotId) -> &[f32] {
        let slot = &self.slots[id];
        &self.data[slot.start..slot.start + slot.shape.stored_len()]
    }

    /// As [`Arena::values`], writable. [`Arena::refresh`] afterwards.
    pub fn values_mut(&mut self, id: SlotId) -> &mut [f32] {
        let slot = &self.slots[id];
        &mut self.data[slot.start..slot.start + slot.shape.stored_len()]
    }

    /// Where a trainable slot's gradient lies in a gradient buffer; `None` for a frozen one.
    pub fn grad_range(&self, id: SlotId) -> Option<Range<usize>> {
        let slot = &self.slots[id];
        slot.trainable.then(|| slot.grad_start..slot.grad_start + slot.shape.stored_len())
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
                pack_panels(&rows, n, k, self.values_mut(id));
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

    /// The trainable slots' values, in slot order, as the optimizer and the checkpoints lay them out.
    pub fn trainable_values(&self) -> Cow<'_, [f32]> {
        if self.trainable_len == self.data.len() {
            return Cow::Borrowed(&self.data);
        }
        let mut out = Vec::with_capacity(self.trainable_len);
        for slot in self.slots.iter().filter(|s| s.trainable) {
            out.extend_from_slice(&self.data[slot.start..slot.start + slot.shape.stored_len()]);
        }
        Cow::Owned(out)
    }

    /// The inverse of [`Arena::trainable_values`].
    pub fn set_trainable_values(&mut self, values: &[f32]) {
        assert_eq!(values.len(), self.trainable_len, "values must cover the trainable slots");
        for slot in self.slots.iter().filter(|s| s.trainable) {
            let len = slot.shape.stored_len();
            self.data[slot.start..slot.start + len]
                .copy_from_slice(&values[slot.grad_start..slot.grad_start + len]);
        }
    }

    /// The trainable slots as (weights, gradient range, decays): matrices decay, vectors do not.
    pub fn trainable_mut(&mut self) -> impl Iterator<Item = (&mut [f32], Range<usize>, bool)> {
        let mut rest: &mut [f32] = &mut self.data;
        self.slots.iter().filter_map(move |slot| {
            let (here, tail) = std::mem::take(&mut rest).split_at_mut(slot.shape.stored_len());
            rest = tail;
            let range = slot.grad_start..slot.grad_start + slot.shape.stored_len();
            slot.trainable.then_some((here, range, matches!(slot.shape, Shape::Matrix { .. })))
        })
    }
}
