//! A growable slice that starts at a cache line, for weights and packed factors.
//!
//! Tile and vector loads that straddle two lines cost twice; an ordinary allocation of this size starts 16 bytes into a page.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ops::{Deref, DerefMut};

/// Bytes that a buffer is aligned to.
const LINE: usize = 64;

/// Numbers whose all-zero bytes are a value.
///
/// # Safety
/// All-zero bytes are a valid value, and the type needs no drop.
pub unsafe trait Zeroed: Copy {}
// SAFETY: plain numbers.
unsafe impl Zeroed for f32 {}
// SAFETY: plain numbers.
unsafe impl Zeroed for u16 {}
// SAFETY: plain numbers.
unsafe impl Zeroed for u32 {}

/// A slice of numbers that starts at a cache line.
pub struct Buffer<T: Zeroed> {
    start: *mut T,
    len: usize,
}

impl<T: Zeroed> Buffer<T> {
    /// `len` zeros.
    pub fn zeros(len: usize) -> Buffer<T> {
        if len == 0 {
            return Buffer::default();
        }
        let layout = Self::layout(len);
        // SAFETY: the layout is not empty.
        let start: *mut T = unsafe { alloc_zeroed(layout) }.cast();
        if start.is_null() {
            handle_alloc_error(layout);
        }
        Buffer { start, len }
    }

    /// Makes the buffer at least `len` long; its contents are then arbitrary numbers.
    pub fn reserve(&mut self, len: usize) {
        if len > self.len {
            *self = Buffer::zeros(len);
        }
    }

    fn layout(len: usize) -> Layout {
        let layout = Layout::array::<T>(len).and_then(|layout| layout.align_to(LINE));
        layout.expect("a buffer is smaller than the address space")
    }
}

impl<T: Zeroed> Default for Buffer<T> {
    fn default() -> Self {
        Buffer { start: std::ptr::without_provenance_mut(LINE), len: 0 }
    }
}

impl<T: Zeroed> Drop for Buffer<T> {
    fn drop(&mut self) {
        if self.len > 0 {
            // SAFETY: allocated in `zeros` with this layout.
            unsafe { dealloc(self.start.cast(), Self::layout(self.len)) };
        }
    }
}

impl<T: Zeroed> std::fmt::Debug for Buffer<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Buffer").field("len", &self.len).finish_non_exhaustive()
    }
}

impl<T: Zeroed> Deref for Buffer<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        // SAFETY: `len` initialised elements, or none at an aligned address.
        unsafe { std::slice::from_raw_parts(self.start, self.len) }
    }
}

impl<T: Zeroed> DerefMut for Buffer<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as above, borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.start, self.len) }
    }
}

impl<T: Zeroed> Clone for Buffer<T> {
    fn clone(&self) -> Self {
        let mut copy = Buffer::zeros(self.len);
        copy.copy_from_slice(self);
        copy
    }
}

// SAFETY: owns its numbers like a Vec.
unsafe impl<T: Zeroed + Send> Send for Buffer<T> {}
// SAFETY: as above.
unsafe impl<T: Zeroed + Sync> Sync for Buffer<T> {}
