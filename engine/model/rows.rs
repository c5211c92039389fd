//! Stored tensors, read by rows: a piece of the file is mapped, widened to f32 where it is wanted, and let go.
//!
//! Nothing is held twice: what is mapped at a time is [`BATCH_BYTES`] or one tensor whose rows change places, and
//! [`fill_slot`] packs rows into the kernels' panels as it widens them.

use std::cell::RefCell;
use std::fs::File;
use std::ops::Range;

use memmap2::Mmap;
use rft_kernels::{PANEL, Pool, pack_panels};

use super::gguf::{GgmlType, dequantise_into};
use super::params::{Arena, Shape, SlotId};
use super::source::{ModelSource, map_range};
use crate::error::Result;

/// Bytes of a file that are mapped at a time.
const BATCH_BYTES: usize = 8 << 20;

/// Which stored row is which row of the tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum RowOrder {
    /// The same one.
    Same,
    /// Rows of each head are stored as (pair, half) and wanted as (half, pair).
    Unrotate {
        /// Rows of a head.
        head: usize,
    },
}

impl RowOrder {
    fn stored(self, row: usize) -> usize {
        match self {
            Self::Same => row,
            Self::Unrotate { head } => {
                let (first, at) = (row / head * head, row % head);
                first + at % (head / 2) * 2 + at / (head / 2)
            }
        }
    }
}

/// Where and how a tensor is stored.
#[derive(Debug)]
pub(super) struct Place {
    pub(super) kind: GgmlType,
    pub(super) bytes: Range<usize>,
    /// Its shape, slowest dimension first.
    pub(super) shape: Vec<usize>,
    pub(super) order: RowOrder,
    /// Added to every number.
    pub(super) add: f32,
}

/// A tensor in an open file; a vector is one row.
pub(super) struct StoredRows<'a> {
    pub(super) file: &'a File,
    pub(super) place: Place,
}

/// Some rows of a tensor, mapped.
pub(super) struct MappedRows<'a> {
    place: &'a Place,
    map: Option<Mmap>,
    first: usize,
}

impl Place {
    /// Rows and numbers of a row.
    pub(super) fn rows(&self) -> (usize, usize) {
        match self.shape.as_slice() {
            [] => (1, 1),
            [n] => (1, *n),
            [rows @ .., width] => (rows.iter().product(), *width),
        }
    }

    fn row_bytes(&self) -> usize {
        self.bytes.len() / self.rows().0.max(1)
    }
}

impl StoredRows<'_> {
    /// Maps these rows, or all of them where they lie elsewhere.
    pub(super) fn map(&self, rows: Range<usize>) -> std::io::Result<MappedRows<'_>> {
        let all = 0..self.place.rows().0;
        let rows = if self.place.order == RowOrder::Same { rows } else { all };
        let (start, len) = (self.place.bytes.start, self.place.row_bytes());
        let bytes = start + rows.start * len..start + rows.end * len;
        let map = if bytes.is_empty() { None } else { Some(map_range(self.file, bytes)?) };
        Ok(MappedRows { place: &self.place, map, first: rows.start })
    }

    /// All numbers, row after row.
    pub(super) fn read(&self) -> std::io::Result<Vec<f32>> {
        let (rows, width) = self.place.rows();
        let mut out = vec![0.0; rows * width];
        let mapped = self.map(0..rows)?;
        for (row, out) in out.chunks_exact_mut(width.max(1)).enumerate() {
            mapped.read(row, out);
        }
        Ok(out)
    }
}

impl MappedRows<'_> {
    /// One of the mapped rows, counted from the tensor's first.
    pub(super) fn read(&self, row: usize, out: &mut [f32]) {
        let Some(map) = &self.map else { return };
        let (place, len) = (self.place, self.place.row_bytes());
        let vector = place.shape.len() < 2;
        let at = if vector { row } else { place.order.stored(row) } - self.first;
        dequantise_into(place.kind, &map[at * len..(at + 1) * len], out);
        if vector && place.order != RowOrder::Same {
            let stored = out.to_vec();
            out.iter_mut().enumerate().for_each(|(i, x)| *x = stored[place.order.stored(i)]);
        }
        if place.add != 0.0 {
            out.iter_mut().for_each(|x| *x += place.add);
        }
    }
}

/// Fills a slot of f32 numbers from its tensors: a matrix panel by panel, on all threads.
///
/// # Errors
/// A missing or misshapen tensor, or a storage type that is not read, by name.
pub(super) fn fill_slot(pool: &Pool, source: &ModelSource, arena: &mut Arena, id: SlotId) -> Result<()> {
    thread_local! {
        static ROWS: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
    }
    let slot = &arena.slots()[id];
    let (shape, mut parts, mut row) = (slot.shape, Vec::new(), 0);
    for part in &slot.parts {
        let stored = match shape {
            Shape::Matrix { k, .. } => source.rows(&part.name, &[part.rows, k])?,
            Shape::Vector(_) => source.rows(&part.name, &[part.rows])?,
        };
        parts.push((row..row + part.rows, stored));
        row += part.rows;
    }
    let io = |e| source.read_error(e);
    let row_bytes = parts.iter().map(|(_, stored)| stored.place.row_bytes()).max().unwrap_or(0);
    let batch = (BATCH_BYTES / (row_bytes * PANEL).max(1)).max(1);
    if let (Shape::Matrix { n, k }, Some(quantized)) = (shape, arena.quantized_mut(id)) {
        let mut rows = Vec::new();
        for first in (0..n).step_by(batch * PANEL) {
            let some = first..(first + batch * PANEL).min(n);
            rows.resize(some.len() * k, 0.0);
            for (of, stored) in &parts {
                let (from, to) = (of.start.max(some.start), of.end.min(some.end));
                if from < to {
                    let mapped = stored.map(from - of.start..to - of.start).map_err(io)?;
                    pool.map_chunks(&mut rows[(from - first) * k..(to - first) * k], k, |r, row| {
                        mapped.read(from - of.start + r, row);
                    });
                }
            }
            quantized.set_rows(pool, first, &rows);
        }
        return Ok(());
    }
    let values = arena.values_mut(id);
    let Shape::Matrix { n, k } = shape else {
        for (at, stored) in &parts {
            stored.map(0..1).map_err(io)?.read(0, &mut values[at.clone()]);
        }
        return Ok(());
    };
    for (b, values) in values.chunks_mut((batch * PANEL * k).max(1)).enumerate() {
        let rows = b * batch * PANEL..((b + 1) * batch * PANEL).min(n);
        let mut mapped = Vec::new();
        for (of, stored) in &parts {
            let (from, to) = (of.start.max(rows.start), of.end.min(rows.end));
            if from < to {
                mapped.push((of, stored.map(from - of.start..to - of.start).map_err(io)?));
            }
        }
        pool.map_chunks(values, PANEL * k, |p, panel| {
            ROWS.with_borrow_mut(|buffer| {
                let first = rows.start + p * PANEL;
                let lanes = PANEL.min(n - first);
                buffer.resize(PANEL * k, 0.0);
                for (row, out) in (first..first + lanes).zip(buffer.chunks_exact_mut(k)) {
                    let (of, part) =
                        mapped.iter().find(|(of, _)| of.contains(&row)).expect("parts are stacked");
                    part.read(row - of.start, out);
                }
                pack_panels(&buffer[..lanes * k], lanes, k, panel);
            });
        });
    }
    Ok(())
}
