//! A global allocator that asks for huge pages for large blocks.
//!
//! Weights, activations and gradients are hundreds of MiB that products walk with strides of several KiB: with pages of 4 KiB
//! the walk waits for address translation. Systems that hand out huge pages only to those who ask (`madvise`, the default of
//! most) are asked here, once for each block. Smaller blocks, and other systems, go to the system's allocator.

use std::alloc::{GlobalAlloc, Layout, System};

/// Bytes of a huge page.
const HUGE: usize = 2 << 20;

/// Blocks from this size on are mapped by themselves.
const LARGE: usize = HUGE / 2;

/// The allocator; a program names it with `#[global_allocator]`.
#[derive(Clone, Copy, Debug, Default)]
pub struct HugePages;

// SAFETY: large blocks come from `map` and go to `unmap`, which a layout's size alone decides; all others are the system's.
unsafe impl GlobalAlloc for HugePages {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if is_large(layout) {
            return system::map(layout.size());
        }
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        if is_large(layout) {
            return system::map(layout.size());
        }
        // SAFETY: the caller's promise.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, start: *mut u8, layout: Layout) {
        if is_large(layout) {
            // SAFETY: such a block was mapped with this size.
            return unsafe { system::unmap(start, layout.size()) };
        }
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(start, layout) }
    }

    unsafe fn realloc(&self, start: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: the caller promises a size that is not zero and does not overflow when rounded up.
        let new = unsafe { Layout::from_size_align_unchecked(size, layout.align()) };
        if !is_large(layout) && !is_large(new) {
            // SAFETY: the caller's promise; the block is the system's and stays so.
            return unsafe { System.realloc(start, layout, size) };
        }
        if is_large(layout) && is_large(new) && system::mapped(layout.size()) == system::mapped(size) {
            return start;
        }
        // SAFETY: both blocks hold the bytes that are copied, and are not the same.
        unsafe {
            let to = self.alloc(new);
            if !to.is_null() {
                to.copy_from_nonoverlapping(start, layout.size().min(size));
                self.dealloc(start, layout);
            }
            to
        }
    }
}

fn is_large(layout: Layout) -> bool {
    cfg!(target_os = "linux") && layout.size() >= LARGE && layout.align() <= HUGE
}

/// Bytes of memory that a block of `size` bytes holds once all of it was written to.
pub fn held_bytes(size: usize) -> usize {
    if cfg!(target_os = "linux") && size >= LARGE { size.max((size + HUGE / 2) / HUGE * HUGE) } else { size }
}

#[cfg(target_os = "linux")]
mod system {
    use super::HUGE;

    const READ_WRITE: i32 = 1 | 2;
    const PRIVATE_ANONYMOUS: i32 = 2 | 0x20;
    const ADVISE_HUGE: i32 = 14;

    unsafe extern "C" {
        fn mmap(at: *mut u8, len: usize, protection: i32, flags: i32, file: i32, offset: i64) -> *mut u8;
        fn munmap(start: *mut u8, len: usize) -> i32;
        fn madvise(start: *mut u8, len: usize, advice: i32) -> i32;
    }

    /// Bytes that are mapped for a block.
    pub(super) fn mapped(size: usize) -> usize {
        size.next_multiple_of(HUGE)
    }

    /// Bytes of a block that huge pages are asked for: at most half of one is held in vain.
    fn advised(size: usize) -> usize {
        (size + HUGE / 2) / HUGE * HUGE
    }

    /// Zeroed memory that starts at a huge page; null where there is none.
    pub(super) fn map(size: usize) -> *mut u8 {
        let Some(len) = size.checked_next_multiple_of(HUGE).and_then(|len| len.checked_add(HUGE)) else {
            return std::ptr::null_mut();
        };
        // SAFETY: a new mapping touches no memory of ours; its ends outside the aligned part are given back.
        unsafe {
            let start = mmap(std::ptr::null_mut(), len, READ_WRITE, PRIVATE_ANONYMOUS, -1, 0);
            if start.addr() == usize::MAX {
                return std::ptr::null_mut();
            }
            let before = start.align_offset(HUGE);
            if before > 0 {
                munmap(start, before);
            }
            if HUGE > before {
                munmap(start.add(before + mapped(size)), HUGE - before);
            }
            let start = start.add(before);
            // A refusal costs speed alone.
            madvise(start, advised(size), ADVISE_HUGE);
            start
        }
    }

    /// # Safety
    /// `start` is what `map(size)` gave, and nothing uses it any more.
    pub(super) unsafe fn unmap(start: *mut u8, size: usize) {
        // SAFETY: promised by the caller.
        unsafe { munmap(start, mapped(size)) };
    }
}

#[cfg(not(target_os = "linux"))]
mod system {
    pub(super) fn mapped(size: usize) -> usize {
        size
    }

    pub(super) fn map(_: usize) -> *mut u8 {
        std::ptr::null_mut()
    }

    pub(super) unsafe fn unmap(_: *mut u8, _: usize) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_keep_their_bytes_through_every_change_of_size() {
        let sizes = [100, LARGE - 1, LARGE, LARGE + 1, 3 * HUGE + 5, 4 * HUGE, LARGE, 10];
        let mut layout = Layout::from_size_align(1000, 64).expect("a layout");
        // SAFETY: each block is used within its size and freed with its layout.
        unsafe {
            let mut block = HugePages.alloc_zeroed(layout);
            assert!(!block.is_null());
            for size in sizes {
                for i in (0..layout.size()).step_by(997) {
                    block.add(i).write((i % 251) as u8);
                }
                block = HugePages.realloc(block, layout, size);
                let kept = layout.size().min(size);
                layout = Layout::from_size_align(size, 64).expect("a layout");
                assert!(!block.is_null() && block.addr().is_multiple_of(64));
                for i in (0..kept).step_by(997) {
                    assert_eq!(block.add(i).read(), (i % 251) as u8, "byte {i} of {size}");
                }
            }
            HugePages.dealloc(block, layout);
            let layout = Layout::from_size_align(LARGE + 3, 4096).expect("a layout");
            let block = HugePages.alloc_zeroed(layout);
            assert!(block.addr().is_multiple_of(4096));
            assert!((0..layout.size()).step_by(511).all(|i| block.add(i).read() == 0));
            HugePages.dealloc(block, layout);
        }
    }
}
