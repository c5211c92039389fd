//! A global allocator that asks for huge pages for large blocks.
//!
//! Weights, activations and gradients are hundreds of MiB that products walk with strides of several KiB: with pages of 4 KiB
//! the walk waits for address translation. Systems that hand out huge pages only to those who ask (`madvise`, the default of
//! most) are asked here, once for each block. Smaller blocks, and other systems, go to the system's allocator.
//!
//! The huge pages of a freed block wait for the next large block, whatever its size: they are moved to its addresses, which
//! costs microseconds where a new page costs most of a millisecond. So phases of a step that need much memory in turn (a KV cache, a
//! gradient) may free it and take it anew, and together hold what the larger one needs.

use std::alloc::{GlobalAlloc, Layout, System};

/// Bytes of a huge page.
const HUGE: usize = 2 << 20;

/// Blocks from this size on are mapped by themselves.
const LARGE: usize = HUGE / 4;

/// The allocator; a program names it with `#[global_allocator]`.
#[derive(Clone, Copy, Debug, Default)]
pub struct HugePages;

// SAFETY: large blocks come from `map` and go to `unmap`, which a layout's size alone decides; all others are the system's.
unsafe impl GlobalAlloc for HugePages {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if is_large(layout) {
            return system::map(layout.size(), false);
        }
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        if is_large(layout) {
            return system::map(layout.size(), true);
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
        if is_large(layout) && is_large(new) && system::are_alike(layout.size(), size) {
            return start;
        }
        if is_large(layout) && is_large(new) && system::recycles() {
            // SAFETY: the block was mapped with this size.
            return unsafe { system::remap(start, layout.size(), size) };
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

/// Gives the pages that wait for a new block back to the system.
pub fn release_pages() {
    system::release();
}

/// Bytes of memory that a block of `size` bytes holds once all of it was written to.
pub fn held_bytes(size: usize) -> usize {
    if cfg!(target_os = "linux") && size >= LARGE { size.max((size + HUGE / 4) / HUGE * HUGE) } else { size }
}

#[cfg(target_os = "linux")]
mod system {
    use std::cell::UnsafeCell;
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

    use super::HUGE;

    const READ_WRITE: i32 = 1 | 2;
    const PRIVATE_ANONYMOUS: i32 = 2 | 0x20;
    const ADVISE_HUGE: i32 = 14;
    const TO_FIXED_PLACE: i32 = 1 | 2;

    /// Most pages that wait.
    const MOST_WAITING: usize = 8192;

    /// Pages that are moved at a time.
    const BATCH: usize = 64;

    /// Above this many bytes in large blocks pages are not moved: each may be a mapping of its own, and systems allow some 65,000.
    const MOST_MOVED: usize = 32 << 30;

    unsafe extern "C" {
        fn mmap(at: *mut u8, len: usize, protection: i32, flags: i32, file: i32, offset: i64) -> *mut u8;
        fn munmap(start: *mut u8, len: usize) -> i32;
        fn madvise(start: *mut u8, len: usize, advice: i32) -> i32;
        fn mremap(start: *mut u8, len: usize, new_len: usize, flags: i32, ...) -> *mut u8;
    }

    /// Bytes in large blocks.
    static MAPPED: AtomicUsize = AtomicUsize::new(0);

    /// Huge pages of freed blocks, where those lay.
    struct Waiting {
        locked: AtomicBool,
        /// How many, and their addresses.
        pages: UnsafeCell<(usize, [usize; MOST_WAITING])>,
    }

    // SAFETY: `pages` is used under the lock alone.
    unsafe impl Sync for Waiting {}

    static WAITING: Waiting =
        Waiting { locked: AtomicBool::new(false), pages: UnsafeCell::new((0, [0; MOST_WAITING])) };

    impl Waiting {
        fn with<R>(&self, f: impl FnOnce(&mut usize, &mut [usize; MOST_WAITING]) -> R) -> R {
            while self.locked.swap(true, Ordering::Acquire) {
                std::thread::yield_now();
            }
            // SAFETY: the lock is held.
            let (count, pages) = unsafe { &mut *self.pages.get() };
            let result = f(count, pages);
            self.locked.store(false, Ordering::Release);
            result
        }

        /// Takes as many as there are, at most `out.len()`.
        fn take(&self, out: &mut [usize]) -> usize {
            self.with(|count, pages| {
                let taken = out.len().min(*count);
                *count -= taken;
                out[..taken].copy_from_slice(&pages[*count..*count + taken]);
                taken
            })
        }

        /// Keeps `more` pages from `start` on, as many as there is room for.
        fn put(&self, start: usize, more: usize) -> usize {
            self.with(|count, pages| {
                let kept = more.min(MOST_WAITING - *count);
                for (i, page) in pages[*count..*count + kept].iter_mut().enumerate() {
                    *page = start + i * HUGE;
                }
                *count += kept;
                kept
            })
        }
    }

    /// Whether pages are moved from block to block.
    pub(super) fn recycles() -> bool {
        MAPPED.load(Ordering::Relaxed) <= MOST_MOVED
    }

    /// Whether blocks of either size are the same to the system: a block's size says which of its pages wait when it is freed.
    pub(super) fn are_alike(size: usize, other: usize) -> bool {
        (mapped(size), advised(size)) == (mapped(other), advised(other))
    }

    /// Bytes that are mapped for a block.
    fn mapped(size: usize) -> usize {
        size.next_multiple_of(HUGE)
    }

    /// Bytes of a block that huge pages are asked for: at most a quarter of one is held in vain.
    fn advised(size: usize) -> usize {
        (size + HUGE / 4) / HUGE * HUGE
    }

    /// Memory that starts at a huge page, of waiting pages first; null where there is none.
    pub(super) fn map(size: usize, zeroed: bool) -> *mut u8 {
        let start = map_new(size);
        if start.is_null() {
            return start;
        }
        // SAFETY: the block was just made.
        if unsafe { fill(start, 0, advised(size), zeroed) } { start } else { std::ptr::null_mut() }
    }

    /// Zeroed memory that starts at a huge page; null where there is none.
    fn map_new(size: usize) -> *mut u8 {
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
            MAPPED.fetch_add(mapped(size), Ordering::Relaxed);
            start
        }
    }

    /// Puts waiting pages in place of a block's new ones, bytes `from..to`, as far as they go; false where memory has ended.
    ///
    /// # Safety
    /// Nothing was written there yet.
    unsafe fn fill(start: *mut u8, mut from: usize, to: usize, zeroed: bool) -> bool {
        let mut pages = [0; BATCH];
        while from < to && recycles() {
            let count = WAITING.take(&mut pages[..((to - from) / HUGE).min(BATCH)]);
            if count == 0 {
                break;
            }
            for page in &pages[..count] {
                let page = std::ptr::with_exposed_provenance_mut(*page);
                // SAFETY: a waiting page belongs to nobody else, its new place is the caller's.
                unsafe {
                    if !move_page(page, start.add(from)) {
                        return false;
                    }
                    if zeroed {
                        start.add(from).write_bytes(0, HUGE);
                    }
                }
                from += HUGE;
            }
        }
        true
    }

    /// # Safety
    /// Both are huge pages' addresses; nothing uses either from elsewhere, and `to` is lost.
    unsafe fn move_page(from: *mut u8, to: *mut u8) -> bool {
        // SAFETY: promised by the caller.
        unsafe { mremap(from, HUGE, HUGE, TO_FIXED_PLACE, to) == to }
    }

    /// The block with another size; null, and the block lost, where memory has ended.
    ///
    /// # Safety
    /// `start` is what `map(old)` gave, and nothing else uses it.
    pub(super) unsafe fn remap(start: *mut u8, old: usize, new: usize) -> *mut u8 {
        let to = map_new(new);
        if to.is_null() {
            return to;
        }
        let kept = advised(old).min(advised(new));
        // SAFETY: whole pages move, and what lies behind them is copied before it is given back.
        unsafe {
            for at in (0..kept).step_by(HUGE) {
                if !move_page(start.add(at), to.add(at)) {
                    return std::ptr::null_mut();
                }
            }
            if !fill(to, kept, advised(new), false) {
                return std::ptr::null_mut();
            }
            if old.min(new) > kept {
                to.add(kept).copy_from_nonoverlapping(start.add(kept), old.min(new) - kept);
            }
            give(start, kept, old);
        }
        to
    }

    /// # Safety
    /// `start` is what `map(size)` gave, and nothing uses it any more.
    pub(super) unsafe fn unmap(start: *mut u8, size: usize) {
        // SAFETY: promised by the caller.
        unsafe { give(start, 0, size) };
    }

    /// Lets a block's bytes from `from` on wait or go; those before have moved.
    ///
    /// # Safety
    /// As for `unmap`; `from` is a multiple of a huge page.
    unsafe fn give(start: *mut u8, from: usize, size: usize) {
        let (whole, end) = (advised(size), mapped(size));
        let count = if recycles() { (whole - from) / HUGE } else { 0 };
        MAPPED.fetch_sub(end, Ordering::Relaxed);
        // SAFETY: promised by the caller.
        unsafe {
            let kept = from + WAITING.put(start.add(from).expose_provenance(), count) * HUGE;
            if end > kept {
                munmap(start.add(kept), end - kept);
            }
        }
    }

    /// Gives all waiting pages back to the system.
    pub(super) fn release() {
        let mut pages = [0; BATCH];
        loop {
            let count = WAITING.take(&mut pages);
            if count == 0 {
                return;
            }
            for page in &pages[..count] {
                // SAFETY: a waiting page belongs to nobody else.
                unsafe { munmap(std::ptr::with_exposed_provenance_mut(*page), HUGE) };
            }
        }
    }
}

#[cfg(not(target_os = "linux"))]
mod system {
    pub(super) fn recycles() -> bool {
        false
    }

    pub(super) fn release() {}

    pub(super) fn are_alike(size: usize, other: usize) -> bool {
        size == other
    }

    pub(super) fn map(_: usize, _: bool) -> *mut u8 {
        std::ptr::null_mut()
    }

    pub(super) unsafe fn remap(_: *mut u8, _: usize, _: usize) -> *mut u8 {
        std::ptr::null_mut()
    }

    pub(super) unsafe fn unmap(_: *mut u8, _: usize) {}
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    /// Tests that look at the memory of the process run one after another.
    static ALONE: Mutex<()> = Mutex::new(());

    #[test]
    fn blocks_keep_their_bytes_through_every_change_of_size() {
        let _alone = ALONE.lock();
        let sizes = [100, LARGE - 1, LARGE, HUGE - 9, LARGE + 1, 3 * HUGE + 5, 4 * HUGE, LARGE, 10];
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

    /// Resident bytes of the process.
    #[cfg(target_os = "linux")]
    fn resident() -> usize {
        let statm = std::fs::read_to_string("/proc/self/statm").expect("statm");
        4096 * statm.split(' ').nth(1).and_then(|pages| pages.parse::<usize>().ok()).expect("a number")
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn a_freed_blocks_pages_are_the_next_blocks() {
        let _alone = ALONE.lock();
        let layout = |size| Layout::from_size_align(size, 64).expect("a layout");
        let sizes = [40 * HUGE, 9 * HUGE + 5, 12 * HUGE - 7];
        // SAFETY: each block is used within its size and freed with its layout.
        unsafe {
            let block = HugePages.alloc(layout(64 * HUGE));
            block.write_bytes(7, 64 * HUGE);
            let held = resident();
            HugePages.dealloc(block, layout(64 * HUGE));
            let parts = sizes.map(|size| HugePages.alloc_zeroed(layout(size)));
            for (part, size) in parts.into_iter().zip(sizes) {
                assert!(part.addr().is_multiple_of(HUGE));
                assert!(std::slice::from_raw_parts(part, size).iter().all(|&byte| byte == 0));
                part.write_bytes(1, size);
            }
            assert!(resident() < held + 8 * HUGE, "{} bytes above {held}", resident() - held);
            for (part, size) in parts.into_iter().zip(sizes) {
                HugePages.dealloc(part, layout(size));
            }
            let held = resident();
            release_pages();
            assert!(resident() + 50 * HUGE < held, "{} bytes were given back", held - resident());
        }
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn a_block_keeps_its_bytes_where_pages_move() {
        let _alone = ALONE.lock();
        let layout = |size| Layout::from_size_align(size, 64).expect("a layout");
        let (small, large) = (40 * HUGE + HUGE / 3, 41 * HUGE + 9);
        // SAFETY: as above.
        unsafe {
            let block = HugePages.alloc(layout(small));
            (0..small).for_each(|i| block.add(i).write((i % 251) as u8));
            let grown = HugePages.realloc(block, layout(small), large);
            assert!((0..small).all(|i| grown.add(i).read() == (i % 251) as u8));
            let shrunk = HugePages.realloc(grown, layout(large), HUGE + HUGE / 4);
            assert!((0..HUGE + HUGE / 4).all(|i| shrunk.add(i).read() == (i % 251) as u8));
            HugePages.dealloc(shrunk, layout(HUGE + HUGE / 4));
        }
    }
}
