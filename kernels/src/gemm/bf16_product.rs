//! Products of packed bf16 factors: left tiles times right panels, cut into work items that stay in the caches.
//!
//! With AMX an item takes a block of rows that stays in L2 and walks over panels. A panel is taken in pieces of at most [`CHUNK`]
//! steps, so that the piece stays in L1 while the rows stream by; sums wait in a small buffer between pieces, the next panel is
//! fetched meanwhile, and large outputs are written past the caches. None of this changes the order of a sum.

#[cfg(target_arch = "x86_64")]
use std::mem::MaybeUninit;
use std::ops::Range;

use super::Write;
#[cfg(target_arch = "x86_64")]
use super::amx;
use super::bf16::{Bf16Rule, PAIRS, PANEL_STEP, STEP, TILE, TILE_ROWS, bf16_rule};
use super::bf16_pack::transpose;
use crate::panel::PANEL;
use crate::pool::Pool;
use crate::shared::{Block, Shared};
use crate::simd::{LANES, Simd, simd_fn};

/// Rows that are multiplied at a time.
const PAIR: usize = 2 * TILE_ROWS;

/// Most rows of a work item.
const MOST_ROWS: usize = 512;

/// Bytes of left tiles of a work item: they stay in a 2 MiB L2 beside panels and sums.
pub(super) const LEFT_BYTES: usize = 800 << 10;

/// Most steps of a piece of a panel: 18 KiB of it and as much of the left factor fit a 48 KiB L1.
const CHUNK: usize = 9;

/// Most rows of a product whose right factor may be transposed piece by piece: more rows are worth keeping it for.
pub(super) const FEW_ROWS: usize = 320;

/// Outputs from this size on are written past the caches.
const STREAM_BYTES: usize = 2 << 20;

/// Panels of pairs: [panel][pairs][32][2].
#[derive(Clone, Copy)]
pub(super) struct Right<'a> {
    pub panels: &'a [u16],
    pub pairs: usize,
}

/// y[m, n] (+)= left tiles · panels.
pub(super) fn multiply(
    pool: &Pool,
    left: &[u16],
    m: usize,
    right: Right,
    n: usize,
    y: Shared<f32>,
    write: Write,
) {
    let stream = write == Write::Set && size_of::<f32>() * m * n >= STREAM_BYTES;
    walk(pool, left, m, right, n, write, stream, 0, |rows, p| {
        let columns = PANEL.min(n - p * PANEL);
        // SAFETY: these rows and columns belong to one item.
        unsafe { y.block(rows.start * n + p * PANEL, n, rows.len(), columns) }
    });
}

/// dw[n, k] in panels += left tiles of k inputs · panels of n outputs.
pub(super) fn multiply_into_panels(
    pool: &Pool,
    left: &[u16],
    k: usize,
    right: Right,
    n: usize,
    dw: Shared<f32>,
) {
    let next = k * PANEL * size_of::<f32>();
    walk(pool, left, k, right, n, Write::Add, false, next, |inputs, p| {
        // SAFETY: these inputs of this panel belong to one item.
        unsafe { dw.block((p * k + inputs.start) * PANEL, PANEL, inputs.len(), PANEL) }
    });
}

/// Hands out blocks of rows times runs of panels; `output` gives the place of some rows' sums for a panel, which lie `next`
/// bytes before those for the next panel (0 where they are not worth fetching).
fn walk<'a>(
    pool: &Pool,
    left: &[u16],
    m: usize,
    right: Right,
    n: usize,
    write: Write,
    stream: bool,
    next: usize,
    output: impl Fn(Range<usize>, usize) -> Block<'a, f32> + Sync,
) {
    let panels = n.div_ceil(PANEL);
    let steps = right.pairs.div_ceil(PAIRS);
    // Equal blocks of whole pairs of tiles.
    let most = (LEFT_BYTES / (size_of::<u16>() * steps.max(1) * TILE / TILE_ROWS) / PAIR * PAIR)
        .clamp(2 * PAIR, MOST_ROWS);
    let blocks = m.div_ceil(most);
    let block = if blocks == 0 { 0 } else { m.div_ceil(blocks).next_multiple_of(PAIR) };
    let run = (panels * blocks / (pool.threads() * 8)).clamp(1, 16);
    let runs = panels.div_ceil(run);
    let rule = bf16_rule();
    pool.run(blocks * runs, |item| {
        let rows = item / runs * block..m.min((item / runs + 1) * block);
        if rows.is_empty() {
            return;
        }
        let left = &left[rows.start / TILE_ROWS * steps * TILE..];
        let some = item % runs * run..(item % runs * run + run).min(panels);
        #[cfg(target_arch = "x86_64")]
        if rule == Bf16Rule::Amx {
            // SAFETY: the rule is in use only where the machine has it.
            let tiles = unsafe { amx::Tiles::new() };
            for p in some.clone() {
                // Another thread may take the next run.
                let ahead = p + 1 < some.end || pool.threads() == 1;
                amx_panel(&tiles, left, steps, right, p, output(rows.clone(), p), write, stream, ahead, next);
            }
            if stream {
                amx::end_stream();
            }
            return;
        }
        let _ = (stream, next);
        for p in some {
            plain_panel(rule, left, steps, right, p, output(rows.clone(), p), write);
        }
    });
}

/// dx[m, k] (+)= left tiles · W[from.., ..] over `steps` steps of outputs, for at most [`FEW_ROWS`] rows: pieces of panels of W
/// are transposed where they are used, in L1, the next one on its way to L2 meanwhile. A sum has the order of [`multiply`].
pub(super) fn multiply_transposed(
    pool: &Pool,
    left: &[u16],
    m: usize,
    w: &[u16],
    k: usize,
    from: usize,
    steps: usize,
    dx: Shared<f32>,
    write: Write,
) {
    assert!(m <= FEW_ROWS && m.div_ceil(TILE_ROWS) * steps * TILE <= left.len());
    let panels = k.div_ceil(PANEL);
    let run = (panels / (pool.threads() * 4)).max(1);
    let rule = bf16_rule();
    pool.run(panels.div_ceil(run), |item| {
        let mut sums = Aligned([0.0f32; FEW_ROWS * PANEL]);
        let mut piece = Aligned([0u16; CHUNK * PANEL_STEP]);
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the rule is in use only where the machine has AMX.
        let tiles = (rule == Bf16Rule::Amx).then(|| unsafe { amx::Tiles::new() });
        let end = (item * run + run).min(panels);
        for q in item * run..end {
            // SAFETY: these columns belong to one item.
            let y = unsafe { dx.block(q * PANEL, k, m, PANEL.min(k - q * PANEL)) };
            sums.0[..m.next_multiple_of(PAIR) * PANEL].fill(0.0);
            if write == Write::Add {
                y.read(0, m, &mut sums.0);
            }
            for first in (0..steps).step_by(CHUNK) {
                let count = CHUNK.min(steps - first);
                let piece = &mut piece.0[..count * PANEL_STEP];
                transpose(w, k, from + first * STEP, q, piece);
                #[cfg(target_arch = "x86_64")]
                if let Some(tiles) = &tiles {
                    let next = match first + count < steps {
                        true => Some((first + count, q)),
                        false => (q + 1 < end).then_some((0, q + 1)),
                    };
                    amx_piece(tiles, left, steps, first, m, piece, &mut sums.0, |lines| {
                        let row = k.div_ceil(2) * 2 * PANEL;
                        let at = next.map_or(0, |(step, q)| (from / PANEL + step) * row + q * PANEL_STEP);
                        amx::Ahead {
                            panel: w.as_ptr().wrapping_add(at).cast(),
                            lines: if next.is_some() { lines } else { 0 },
                            stride: size_of::<u16>() * row,
                            sums: std::ptr::null(),
                        }
                    });
                    continue;
                }
                for r in (0..m).step_by(PAIR) {
                    let rows = PAIR.min(m - r);
                    let left =
                        &left[r / TILE_ROWS * steps * TILE..][..rows.div_ceil(TILE_ROWS) * steps * TILE];
                    let c = sums.0[r * PANEL..][..PAIR * PANEL].as_mut_ptr();
                    plain_steps(
                        rule,
                        &Product {
                            left,
                            steps,
                            from: first,
                            count,
                            panel: piece,
                            c,
                            stride: PANEL,
                            rows,
                            write: Write::Add,
                        },
                    );
                }
            }
            y.write(0, m, &sums.0);
        }
    });
}

/// sums[m, 32] += steps `first..` of the left tiles · a piece of a panel. Meanwhile each group of 32 rows fetches its share of what
/// comes next: `ahead` is told how many lines of 64 bytes a step, from which the groups take turns.
#[cfg(target_arch = "x86_64")]
fn amx_piece(
    tiles: &amx::Tiles,
    left: &[u16],
    steps: usize,
    first: usize,
    m: usize,
    piece: &[u16],
    sums: &mut [f32],
    ahead: impl Fn(usize) -> amx::Ahead,
) {
    let count = piece.len() / PANEL_STEP;
    let groups = m.div_ceil(PAIR);
    assert!(m.div_ceil(TILE_ROWS) * steps * TILE <= left.len() && first + count <= steps);
    assert!(groups * PAIR * PANEL <= sums.len());
    let lines = PANEL.div_ceil(groups);
    for group in 0..groups {
        let rows = PAIR.min(m - group * PAIR);
        let mut ahead = ahead(lines);
        ahead.panel = ahead.panel.wrapping_add(group * lines * 64);
        // SAFETY: the asserts cover the tiles of these rows, which are two where there are more than 16 rows, and 32 rows of sums.
        unsafe {
            let left = left.as_ptr().add((2 * group * steps + first) * TILE).cast();
            let sums = sums.as_mut_ptr().add(group * PAIR * PANEL).cast();
            let sums = amx::Rows { start: sums, stride: 4 * PANEL };
            let half = rows <= TILE_ROWS;
            let panel = piece.as_ptr().cast();
            tiles.block(left, steps * amx::TILE, panel, count, Some(sums), sums, half, ahead);
        }
    }
}

/// A product without AMX.
fn plain_steps(rule: Bf16Rule, product: &Product) {
    match rule {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the rule is in use only where the machine has the instruction.
        Bf16Rule::Dot => unsafe { dot(product) },
        _ => fused(product),
    }
}

/// A short last step of a panel, padded with zeros, so that no rule reads beyond the panel.
fn padded_tail(panel: &[u16]) -> Aligned<[u16; PANEL_STEP]> {
    let mut tail = Aligned([0; PANEL_STEP]);
    let whole = panel.len() / PANEL_STEP * PANEL_STEP;
    tail.0[..panel.len() - whole].copy_from_slice(&panel[whole..]);
    tail
}

/// y (+)= left tiles · panel p.
#[cfg(target_arch = "x86_64")]
fn amx_panel(
    tiles: &amx::Tiles,
    left: &[u16],
    steps: usize,
    right: Right,
    p: usize,
    y: Block<f32>,
    write: Write,
    stream: bool,
    fetch: bool,
    next_sums: usize,
) {
    let panel = &right.panels[p * right.pairs * 2 * PANEL..][..right.pairs * 2 * PANEL];
    let whole = right.pairs / PAIRS;
    let tail = (whole < steps).then(|| padded_tail(panel));
    let groups = y.rows.div_ceil(PAIR);
    assert!(y.rows <= MOST_ROWS && y.rows.div_ceil(TILE_ROWS) * steps * TILE <= left.len());
    // Few rows use a panel once or twice: nothing to keep in L1.
    let cuts = if groups <= 2 { whole.min(1) } else { whole.div_ceil(CHUNK) };
    let pieces = (cuts + usize::from(tail.is_some())).max(1);
    let stream = stream
        && y.columns == PANEL
        && y.row_start(0).addr().is_multiple_of(64)
        && y.stride.is_multiple_of(LANES);
    let lines = if fetch { (PANEL / groups).max(4) } else { 0 };
    let mut waiting = MaybeUninit::<Aligned<[f32; MOST_ROWS * PANEL]>>::uninit();
    let waiting: *mut f32 = waiting.as_mut_ptr().cast();

    for piece in 0..pieces {
        let (from, count, part) = match &tail {
            Some(tail) if piece == cuts => (whole, steps - whole, tail.0.as_ptr()),
            _ if cuts == 0 => (0, 0, panel.as_ptr()),
            _ => {
                let from = piece * whole / cuts;
                (from, (piece + 1) * whole / cuts - from, panel[from * PANEL_STEP..].as_ptr())
            }
        };
        for group in 0..groups {
            let r = group * PAIR;
            let rows = PAIR.min(y.rows - r);
            // SAFETY: 32 rows of the buffer, which has as many as a work item has at most.
            let wait = amx::Rows { start: unsafe { waiting.add(r * PANEL) }.cast(), stride: 4 * PANEL };
            let place = amx::Rows { start: y.row_start(r).cast(), stride: 4 * y.stride };
            let whole_rows = y.columns == PANEL && rows == PAIR;
            let in_place = whole_rows && y.stride == PANEL;
            let between = if in_place { place } else { wait };
            let start = match (piece, write) {
                (0, Write::Set) => None,
                (0, Write::Add) if whole_rows => Some(place),
                (0, Write::Add) => {
                    // SAFETY: the rows of `wait`.
                    let sums = unsafe {
                        wait.start.write_bytes(0, 4 * PAIR * PANEL);
                        std::slice::from_raw_parts_mut(wait.start.cast::<f32>(), PAIR * PANEL)
                    };
                    y.read(r, rows, sums);
                    Some(wait)
                }
                _ => Some(between),
            };
            let last = piece + 1 == pieces;
            let direct = last && whole_rows && !stream;
            let at = group * lines;
            let ahead = amx::Ahead {
                panel: panel
                    .as_ptr()
                    .wrapping_add(panel.len())
                    .cast::<u8>()
                    .wrapping_add(from * 2 * amx::TILE + at * count * 64),
                lines: if at < PANEL { lines } else { 0 },
                stride: 0,
                sums: match next_sums {
                    0 => std::ptr::null(),
                    next => place.start.wrapping_add(next + from * 4 * PANEL),
                },
            };
            // SAFETY: the assert covers the left tiles of these rows, which are two where there are more than 16 rows; the piece
            // lies in the panel or is the padded step. Sums are rows of y or of the buffer.
            unsafe {
                let left = left.as_ptr().add((r / TILE_ROWS * steps + from) * TILE).cast();
                let to = if direct { place } else { between };
                let half = rows <= TILE_ROWS;
                tiles.block(left, steps * amx::TILE, part.cast(), count, start, to, half, ahead);
                if last && stream {
                    amx::stream(wait.start, place, rows);
                } else if last && !direct {
                    y.write(r, rows, std::slice::from_raw_parts(wait.start.cast::<f32>(), PAIR * PANEL));
                }
            }
        }
    }
}

/// y (+)= left tiles · panel p without AMX, 32 rows at a time.
fn plain_panel(
    rule: Bf16Rule,
    left: &[u16],
    steps: usize,
    right: Right,
    p: usize,
    y: Block<f32>,
    write: Write,
) {
    let panel = &right.panels[p * right.pairs * 2 * PANEL..][..right.pairs * 2 * PANEL];
    let whole = right.pairs / PAIRS;
    let tail = padded_tail(panel);
    let mut part = Aligned([0.0f32; PAIR * PANEL]);
    for r in (0..y.rows).step_by(PAIR) {
        let rows = PAIR.min(y.rows - r);
        let left = &left[r / TILE_ROWS * steps * TILE..][..rows.div_ceil(TILE_ROWS) * steps * TILE];
        let in_place = y.columns == PANEL && rows == PAIR;
        if !in_place && write == Write::Add {
            y.read(r, rows, &mut part.0);
        }
        let (c, stride) = if in_place { (y.row_start(r), y.stride) } else { (part.0.as_mut_ptr(), PANEL) };
        let mut write = write;
        for (from, count, panel) in [(0, whole, panel), (whole, steps - whole, &tail.0)] {
            if count == 0 && (from > 0 || steps > 0) {
                continue;
            }
            plain_steps(rule, &Product { left, steps, from, count, panel, c, stride, rows, write });
            write = Write::Add;
        }
        if !in_place {
            y.write(r, rows, &part.0);
        }
    }
}

/// Steps `from..from + count` of up to 32 rows times 32 columns.
struct Product<'a> {
    /// One or two row tiles of `steps` steps.
    left: &'a [u16],
    steps: usize,
    from: usize,
    count: usize,
    /// From step `from` on.
    panel: &'a [u16],
    /// Rows of 32 elements that belong to the product: `rows` of them, or 32 where stride is [`PANEL`].
    c: *mut f32,
    stride: usize,
    rows: usize,
    write: Write,
}

impl Product<'_> {
    fn check(&self) {
        assert!(self.rows.div_ceil(TILE_ROWS) * self.steps * TILE <= self.left.len());
        assert!(self.from + self.count <= self.steps && self.count * PANEL_STEP <= self.panel.len());
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bf16")]
fn dot(product: &Product) {
    use std::arch::x86_64::*;

    /// R rows × 32 columns in registers.
    ///
    /// # Safety
    /// As for [`Product`]; `left` is the first of R rows of a tile.
    #[target_feature(enable = "avx512f,avx512bf16")]
    unsafe fn rows<const R: usize>(product: &Product, left: *const u32, c: *mut f32) {
        // SAFETY: promised by the caller.
        unsafe {
            let mut sums = [[_mm512_setzero_ps(); 2]; R];
            if product.write == Write::Add {
                for (i, sum) in sums.iter_mut().enumerate() {
                    let c = c.add(i * product.stride);
                    *sum = [_mm512_loadu_ps(c), _mm512_loadu_ps(c.add(LANES))];
                }
            }
            let panel: *const i32 = product.panel.as_ptr().cast();
            for step in 0..product.count {
                let left = left.add((product.from + step) * TILE_ROWS * PAIRS);
                for pair in 0..PAIRS {
                    let w = panel.add((step * PAIRS + pair) * PANEL);
                    let w0: __m512bh = std::mem::transmute(_mm512_loadu_si512(w.cast()));
                    let w1: __m512bh = std::mem::transmute(_mm512_loadu_si512(w.add(LANES).cast()));
                    for (i, sum) in sums.iter_mut().enumerate() {
                        let x = _mm512_set1_epi32(*left.add(i * PAIRS + pair) as i32);
                        let x: __m512bh = std::mem::transmute(x);
                        *sum = [_mm512_dpbf16_ps(sum[0], x, w0), _mm512_dpbf16_ps(sum[1], x, w1)];
                    }
                }
            }
            for (i, sum) in sums.into_iter().enumerate() {
                let c = c.add(i * product.stride);
                _mm512_storeu_ps(c, sum[0]);
                _mm512_storeu_ps(c.add(LANES), sum[1]);
            }
        }
    }

    product.check();
    for r in (0..product.rows).step_by(8) {
        let left: *const u32 = product.left[r / TILE_ROWS * product.steps * TILE..].as_ptr().cast();
        // SAFETY: sizes are checked; rows r.. of c are the product's.
        unsafe {
            let left = left.add(r % TILE_ROWS * PAIRS);
            let c = product.c.add(r * product.stride);
            match (product.rows - r).min(8) {
                1 => rows::<1>(product, left, c),
                2 => rows::<2>(product, left, c),
                3 => rows::<3>(product, left, c),
                4 => rows::<4>(product, left, c),
                5 => rows::<5>(product, left, c),
                6 => rows::<6>(product, left, c),
                7 => rows::<7>(product, left, c),
                _ => rows::<8>(product, left, c),
            }
        }
    }
}

simd_fn! {
    fn fused<S>(product: &Product) {
        product.check();
        for r in (0..product.rows).step_by(2) {
            let left = product.left[r / TILE_ROWS * product.steps * TILE..].as_ptr();
            // SAFETY: sizes are checked; rows r.. of c are the product's.
            unsafe {
                let left: *const u32 = left.cast::<u32>().add(r % TILE_ROWS * PAIRS);
                let c = product.c.add(r * product.stride);
                if product.rows - r >= 2 {
                    fused_rows::<S, 2>(product, left, c);
                } else {
                    fused_rows::<S, 1>(product, left, c);
                }
            }
        }
    }
}

/// R rows × 32 columns in registers.
///
/// # Safety
/// As for [`Product`]; `left` is the first of R rows of a tile.
#[inline(always)]
unsafe fn fused_rows<S: Simd, const R: usize>(product: &Product, left: *const u32, c: *mut f32) {
    // SAFETY: promised by the caller.
    unsafe {
        let mut sums = [[S::splat(0.0); 2]; R];
        if product.write == Write::Add {
            for (i, sum) in sums.iter_mut().enumerate() {
                let c = c.add(i * product.stride);
                *sum = [S::read(c), S::read(c.add(LANES))];
            }
        }
        let panel: *const f32 = product.panel.as_ptr().cast();
        for step in 0..product.count {
            let left = left.add((product.from + step) * TILE_ROWS * PAIRS);
            for pair in 0..PAIRS {
                let w = panel.add((step * PAIRS + pair) * PANEL);
                for half in 0..2 {
                    let w = S::read(w.add(half * LANES));
                    let (even, odd) = (S::bf16_low(w), S::bf16_high(w));
                    for (i, sum) in sums.iter_mut().enumerate() {
                        let x = *left.add(i * PAIRS + pair);
                        let sum = &mut sum[half];
                        *sum = S::fma(S::splat(f32::from_bits(x & 0xffff_0000)), odd, *sum);
                        *sum = S::fma(S::splat(f32::from_bits(x << 16)), even, *sum);
                    }
                }
            }
        }
        for (i, sum) in sums.into_iter().enumerate() {
            let c = c.add(i * product.stride);
            S::write(sum[0], c);
            S::write(sum[1], c.add(LANES));
        }
    }
}

/// Starts at a cache line.
#[repr(align(64))]
struct Aligned<T>(T);
