//! A mutable slice that several work items write to in disjoint places.

use std::marker::PhantomData;

/// A `&mut [T]` that can be handed to work items; each takes the part that only it writes.
#[derive(Clone, Copy)]
pub(crate) struct Shared<'a, T> {
    start: *mut T,
    len: usize,
    life: PhantomData<&'a mut [T]>,
}

// SAFETY: parts are handed out by an unsafe method whose callers promise that they don't overlap.
unsafe impl<T: Send> Send for Shared<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Shared<'_, T> {}

impl<'a, T> Shared<'a, T> {
    pub(crate) fn new(slice: &'a mut [T]) -> Self {
        Shared { start: slice.as_mut_ptr(), len: slice.len(), life: PhantomData }
    }

    /// Elements `from..from + len`; panics if they lie outside.
    ///
    /// # Safety
    /// No two parts that are alive at the same time overlap.
    #[allow(clippy::mut_from_ref)]
    pub(crate) unsafe fn part(&self, from: usize, len: usize) -> &'a mut [T] {
        assert!(from <= self.len && len <= self.len - from, "part {from}+{len} of {}", self.len);
        // SAFETY: inside the slice, and not aliased by the promise above.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(from), len) }
    }

    /// The rectangle of `rows` × `columns` whose rows start at `from`, `from + stride` …; panics if it reaches outside.
    ///
    /// # Safety
    /// No two blocks or parts that are alive at the same time overlap.
    pub(crate) unsafe fn block(
        &self,
        from: usize,
        stride: usize,
        rows: usize,
        columns: usize,
    ) -> Block<'a, T> {
        let reach = if rows == 0 { 0 } else { (rows - 1) * stride + columns };
        assert!(from <= self.len && reach <= self.len - from, "block {from}+{reach} of {}", self.len);
        // SAFETY: inside the slice.
        let start = unsafe { self.start.add(from) };
        Block { start, stride, rows, columns, life: PhantomData }
    }
}

/// A rectangle of a row-major matrix that only its holder reads and writes.
pub(crate) struct Block<'a, T> {
    start: *mut T,
    pub(crate) stride: usize,
    pub(crate) rows: usize,
    pub(crate) columns: usize,
    life: PhantomData<&'a mut [T]>,
}

impl<T: Copy> Block<'_, T> {
    /// Where row r starts; it is good for `columns` elements.
    pub(crate) fn row_start(&self, r: usize) -> *mut T {
        assert!(r < self.rows);
        // SAFETY: inside the rectangle.
        unsafe { self.start.add(r * self.stride) }
    }

    /// Some elements of row r.
    pub(crate) fn row_part(&self, r: usize, from: usize, len: usize) -> &[T] {
        assert!(from + len <= self.columns);
        // SAFETY: inside the row, which no other item touches.
        unsafe { std::slice::from_raw_parts(self.row_start(r).add(from), len) }
    }

    /// As [`Block::row_part`], to be written.
    ///
    /// # Safety
    /// No other part of the same elements is alive.
    #[allow(clippy::mut_from_ref)]
    pub(crate) unsafe fn row_part_mut(&self, r: usize, from: usize, len: usize) -> &mut [T] {
        assert!(from + len <= self.columns);
        // SAFETY: inside the row, which no other item touches.
        unsafe { std::slice::from_raw_parts_mut(self.row_start(r).add(from), len) }
    }

    /// Copies rows `r..r + rows` to the first columns of `to`, whose rows are a panel wide.
    pub(crate) fn read(&self, r: usize, rows: usize, to: &mut [T]) {
        for (i, to) in to.chunks_exact_mut(crate::panel::PANEL).take(rows).enumerate() {
            // SAFETY: a row of the rectangle, which no other item touches.
            to[..self.columns]
                .copy_from_slice(unsafe { std::slice::from_raw_parts(self.row_start(r + i), self.columns) });
        }
    }

    /// The reverse of [`Block::read`].
    pub(crate) fn write(&self, r: usize, rows: usize, from: &[T]) {
        for (i, from) in from.chunks_exact(crate::panel::PANEL).take(rows).enumerate() {
            // SAFETY: a row of the rectangle, which no other item touches.
            unsafe { std::slice::from_raw_parts_mut(self.row_start(r + i), self.columns) }
                .copy_from_slice(&from[..self.columns]);
        }
    }
}
