//! Register tiles of f32 products: sums of R broadcast factors × 16·C lanes.

use std::ops::Range;

use super::Write;
use super::f32_pack::STRIP;
use crate::panel::PANEL;
use crate::shared::Block;
use crate::simd::{LANES, Simd, simd_fn};

/// Most steps of a piece of a panel: 24 KiB of it and a strip of as many steps fit a 48 KiB L1.
pub(super) const MOST_STEPS: usize = 192;

/// Calls a tile for a number of rows up to what the registers hold.
macro_rules! by_rows {
    ($rows:expr, $function:ident, $columns:literal, $args:tt) => {
        by_rows!($rows, $function, $columns, $args, 1 2 3 4 5 6 7 8 9 10 11 12)
    };
    ($rows:expr, $function:ident, $columns:literal, $args:tt, $($n:literal)+) => {
        match $rows {
            $($n if const { $n <= S::TILE_ROWS } => $function::<S, $n, $columns> $args,)+
            _ => unreachable!("tiles have 1 to 12 rows"),
        }
    };
}

/// Steps between two looks at what is to be fetched.
const GROUP: usize = 32;

/// Most lines that are asked for at a time.
const MOST_LINES: usize = 12;

/// What is fetched while a tile sums.
#[derive(Clone, Copy)]
struct Fetch {
    /// So many lines every [`GROUP`] steps.
    from: *const f32,
    lines: usize,
    /// Elements from the sums to those of the next tile, which are fetched too.
    next: usize,
}

simd_fn! {
    /// y[rows, ≤ 32] (+)= x[rows, steps]·panel[steps, 32], while the panel that follows is fetched.
    pub(super) fn forward_panel<S>(x: &[f32], panel: &[f32], next: &[f32], steps: usize, y: &Block<f32>, write: Write) {
        let rows = y.rows;
        assert!(rows * steps <= x.len() && steps * PANEL <= panel.len() && y.columns <= PANEL);
        let whole = y.columns == PANEL;
        let tiles = rows.div_ceil(S::TILE_ROWS);
        // One tile reads as fast as the memory gives; more lines at a time than can be under way would hold up the tile itself.
        let lines = if tiles > 1 { (2 * GROUP).div_ceil(tiles).min(MOST_LINES) } else { 0 };
        let mut part = [0.0; STRIP * PANEL];
        for t in 0..tiles {
            // Equal tiles: 13 rows are 7 + 6.
            let (r, end) = (t * rows / tiles, (t + 1) * rows / tiles);
            if !whole && write == Write::Add {
                y.read(r, end - r, &mut part);
            }
            // SAFETY: the asserts cover these rows of x and the panel; the block holds the rows of y.
            unsafe {
                let (c, c_row) = if whole { (y.row_start(r), y.stride) } else { (part.as_mut_ptr(), PANEL) };
                let from = next.as_ptr().wrapping_add(t * (steps / GROUP) * lines * LANES);
                // After the last tile the first one of the next panel.
                let below = if t + 1 < tiles { (end - r) * c_row } else { PANEL.wrapping_sub(r * c_row) };
                let fetch = Fetch { from, lines, next: below };
                let a = x.as_ptr().add(r * steps);
                by_rows!(end - r, direct, 2, (a, panel.as_ptr(), steps, c, c_row, write, fetch));
            }
            if !whole {
                y.write(r, end - r, &part);
            }
        }
    }
}

/// # Safety
/// R rows of `steps` are readable at `a`, `steps` rows of 32 at `b`, and R rows of 16·C at `c`, `c_row` apart, are the caller's.
#[inline(always)]
unsafe fn direct<S: Simd, const R: usize, const C: usize>(
    a: *const f32,
    b: *const f32,
    steps: usize,
    c: *mut f32,
    c_row: usize,
    write: Write,
    fetch: Fetch,
) {
    // SAFETY: promised by the caller.
    unsafe {
        let mut sums = [[S::splat(0.0); C]; R];
        if write == Write::Add {
            sums = read::<S, R, C>(c, c_row);
        }
        let (mut next, mut ahead) = (c.wrapping_add(fetch.next), fetch.from);
        let mut from = 0;
        while from < steps {
            // The next sums first, so that neither reading nor writing them waits.
            if from < R.div_ceil(2) * GROUP {
                for _ in 0..2 {
                    S::prefetch_write(next);
                    S::prefetch_write(next.wrapping_add((C - 1) * LANES));
                    next = next.wrapping_add(c_row);
                }
            }
            for line in 0..fetch.lines {
                S::prefetch_far(ahead.wrapping_add(line * LANES));
            }
            ahead = ahead.wrapping_add(fetch.lines * LANES);
            let to = steps.min(from + GROUP);
            for t in from..to {
                step::<S, R, C>(a.add(t), steps, b.add(t * PANEL), &mut sums);
            }
            from = to;
        }
        store::<S, R, C>(&sums, c, c_row);
    }
}

simd_fn! {
    /// sums[inputs, 32] += strips[inputs, steps]·panel[steps, 32] for strips of 12 inputs, [steps][12].
    pub(super) fn gradient_panel<S>(strips: &[f32], panel: &[f32], steps: usize, sums: &Block<f32>) {
        assert!(sums.rows.div_ceil(STRIP) * STRIP * steps <= strips.len() && steps * PANEL <= panel.len());
        assert!(sums.columns == PANEL && sums.stride == PANEL);
        for first in (0..sums.rows).step_by(STRIP) {
            let rows = STRIP.min(sums.rows - first);
            let tiles = rows.div_ceil(S::TILE_ROWS);
            for t in 0..tiles {
                let (r, end) = (t * rows / tiles, (t + 1) * rows / tiles);
                // SAFETY: the asserts cover strips and panel; the block holds the sums.
                unsafe {
                    let a = strips.as_ptr().add(first * steps + r);
                    by_rows!(end - r, along, 2, (a, panel.as_ptr(), steps, sums.row_start(first + r)));
                }
            }
        }
    }
}

/// # Safety
/// `a` is readable at `12·t + i` for i < R, t < steps, `b` for `steps` rows of 32, and R rows of 32 at `c` are the caller's.
#[inline(always)]
unsafe fn along<S: Simd, const R: usize, const C: usize>(
    a: *const f32,
    b: *const f32,
    steps: usize,
    c: *mut f32,
) {
    // SAFETY: promised by the caller.
    unsafe {
        let mut sums = read::<S, R, C>(c, PANEL);
        // The next sums first, so that neither reading nor writing them waits.
        let next = c.wrapping_add(R * PANEL);
        let first = steps.min(R * C);
        for t in 0..first {
            S::prefetch_write(next.wrapping_add(t * LANES));
            step::<S, R, C>(a.add(t * STRIP), 1, b.add(t * PANEL), &mut sums);
        }
        for t in first..steps {
            step::<S, R, C>(a.add(t * STRIP), 1, b.add(t * PANEL), &mut sums);
        }
        store::<S, R, C>(&sums, c, PANEL);
    }
}

/// # Safety
/// R rows of 16·C elements, `row` apart, are readable at `c`.
#[inline(always)]
unsafe fn read<S: Simd, const R: usize, const C: usize>(c: *const f32, row: usize) -> [[S::V; C]; R] {
    let mut sums = [[S::splat(0.0); C]; R];
    for i in 0..R {
        for j in 0..C {
            // SAFETY: promised by the caller.
            sums[i][j] = unsafe { S::read(c.add(i * row + j * LANES)) };
        }
    }
    sums
}

/// # Safety
/// As [`read`], for writing.
#[inline(always)]
unsafe fn store<S: Simd, const R: usize, const C: usize>(sums: &[[S::V; C]; R], c: *mut f32, row: usize) {
    for i in 0..R {
        for j in 0..C {
            // SAFETY: promised by the caller.
            unsafe { S::write(sums[i][j], c.add(i * row + j * LANES)) };
        }
    }
}

/// # Safety
/// R factors at `a + i·a_row` and 16·C lanes at `b` are readable.
#[inline(always)]
unsafe fn step<S: Simd, const R: usize, const C: usize>(
    a: *const f32,
    a_row: usize,
    b: *const f32,
    sums: &mut [[S::V; C]; R],
) {
    // SAFETY: promised by the caller.
    unsafe {
        let mut lanes = [S::splat(0.0); C];
        for j in 0..C {
            lanes[j] = S::read(b.add(j * LANES));
        }
        for i in 0..R {
            let a = S::splat(*a.add(i * a_row));
            for j in 0..C {
                sums[i][j] = S::fma(a, lanes[j], sums[i][j]);
            }
        }
    }
}

simd_fn! {
    /// sums[input][row] += Σ over `steps` outputs of w[output, input]·packed[output][row], with w in panels of k inputs that start
    /// with the first output.
    ///
    /// Strip `turn.0` of `turn.1` fetches its share of the weights that the next outputs need.
    pub(super) fn across_panels<S>(
        w: &[f32], k: usize, inputs: Range<usize>, packed: &[f32], steps: usize, rows: usize,
        sums: &mut [f32], turn: (usize, usize),
    ) {
        let panels = steps.div_ceil(PANEL);
        assert!(inputs.end <= k && w.len() >= panels * PANEL * k && packed.len() >= steps * PANEL);
        assert!(sums.len() >= inputs.len() * PANEL && rows <= PANEL);
        let tiles = inputs.len().div_ceil(S::TILE_ROWS);
        let stride = k * PANEL;
        for t in 0..tiles {
            let (r, end) = (t * inputs.len() / tiles, (t + 1) * inputs.len() / tiles);
            // SAFETY: the asserts cover all of it.
            unsafe {
                let a = w.as_ptr().add((inputs.start + r) * PANEL);
                let c = sums.as_mut_ptr().add(r * PANEL);
                let b = packed.as_ptr();
                if rows > LANES {
                    by_rows!(end - r, across, 2, (a, stride, b, steps, c, turn));
                } else {
                    by_rows!(end - r, across, 1, (a, stride, b, steps, c, turn));
                }
            }
        }
    }
}

/// # Safety
/// R rows of 32 steps are readable at `a`, `a + a_panel` …, `steps` rows of 32 at `b`, and R rows of 32 at `c` are the caller's.
#[inline(always)]
unsafe fn across<S: Simd, const R: usize, const C: usize>(
    a: *const f32,
    a_panel: usize,
    b: *const f32,
    steps: usize,
    c: *mut f32,
    turn: (usize, usize),
) {
    // SAFETY: promised by the caller.
    unsafe {
        let mut sums = read::<S, R, C>(c, PANEL);
        for p in 0..steps.div_ceil(PANEL) {
            let (a, b) = (a.add(p * a_panel), b.add(p * PANEL * PANEL));
            let near = a.wrapping_add(a_panel);
            let far = if p % turn.1 == turn.0 {
                a.wrapping_add(steps.div_ceil(PANEL) * a_panel)
            } else {
                c.wrapping_add(R * PANEL).cast_const()
            };
            for t in 0..PANEL.min(steps - p * PANEL) {
                S::prefetch(near.wrapping_add(t * R));
                S::prefetch_far(far.wrapping_add(t * R));
                step::<S, R, C>(a.add(t), PANEL, b.add(t * PANEL), &mut sums);
            }
        }
        store::<S, R, C>(&sums, c, PANEL);
    }
}
