//! Softmax attention of a few queries at a time against tiles of 16 keys.
//!
//! Queries whose tiles begin alike (heads of one row, neighbouring rows, samples of one prompt) are multiplied together with the
//! tiles they share, so that a key or value is loaded once for all of them.

use super::AttnShape;
use crate::math::{exp, tanh};
use crate::simd::{LANES, Simd, simd_fn};

/// A number as keys and values are stored.
pub(super) trait Element: Copy + Send + Sync + 'static {
    /// # Safety
    /// 16 elements are readable at `p`.
    unsafe fn read<S: Simd>(p: *const Self) -> S::V;

    fn wide(self) -> f32;

    /// [`attend_group`] on the instruction set in use.
    fn attend(shape: &AttnShape, group: &mut [Query<Self>], scores: &mut [f32], row: usize);
}

impl Element for f32 {
    #[inline(always)]
    unsafe fn read<S: Simd>(p: *const f32) -> S::V {
        // SAFETY: promised by the caller.
        unsafe { S::read(p) }
    }

    #[inline(always)]
    fn wide(self) -> f32 {
        self
    }

    fn attend(shape: &AttnShape, group: &mut [Query<f32>], scores: &mut [f32], row: usize) {
        simd_fn! {
            fn run<S>(shape: &AttnShape, group: &mut [Query<f32>], scores: &mut [f32], row: usize) {
                attend_group::<S, f32>(shape, group, scores, row);
            }
        }
        run(shape, group, scores, row);
    }
}

/// bf16.
impl Element for u16 {
    #[inline(always)]
    unsafe fn read<S: Simd>(p: *const u16) -> S::V {
        // SAFETY: promised by the caller.
        unsafe { S::read_bf16(p) }
    }

    #[inline(always)]
    fn wide(self) -> f32 {
        f32::from_bits(u32::from(self) << 16)
    }

    fn attend(shape: &AttnShape, group: &mut [Query<u16>], scores: &mut [f32], row: usize) {
        simd_fn! {
            fn run<S>(shape: &AttnShape, group: &mut [Query<u16>], scores: &mut [f32], row: usize) {
                attend_group::<S, u16>(shape, group, scores, row);
            }
        }
        run(shape, group, scores, row);
    }
}

/// Up to 16 consecutive positions of one key/value head.
#[derive(Clone, Copy)]
pub(super) struct KeyTile<'a, E = f32> {
    /// Position of the first key.
    pub(super) start: usize,
    /// Keys in the tile.
    pub(super) len: usize,
    /// [head_dim][16], transposed.
    pub(super) k: &'a [E],
    /// Values, `v_stride` apart.
    pub(super) v: &'a [E],
    pub(super) v_stride: usize,
}

/// One query, what it sees, and where its output goes.
pub(super) struct Query<'a, E = f32> {
    pub(super) q: &'a [f32],
    pub(super) out: &'a mut [f32],
    /// Positions seen.
    pub(super) from: usize,
    pub(super) to: usize,
    /// Ascending, from position 0 at least to the last one seen.
    pub(super) tiles: &'a [KeyTile<'a, E>],
}

/// Most queries that are worked on together: 6 × 4 sums and 4 values fill the 32 registers of AVX-512.
pub(super) const TOGETHER: usize = 6;

/// out = softmax(q·k)·v for every query; `scores` is scratch. `per_row` queries in a row belong to the same tiles.
pub(super) fn attend<E: Element>(
    shape: &AttnShape,
    queries: &mut [Query<E>],
    per_row: usize,
    scores: &mut Vec<f32>,
) {
    for group in queries.chunks_mut(together(per_row)) {
        let row = scores_len(group.iter().map(|query| query.to).max().unwrap_or(0));
        if scores.len() < row * TOGETHER {
            scores.resize(row * TOGETHER, 0.0);
        }
        E::attend(shape, group, scores, row);
    }
}

/// Whole rows of queries, as many as can be worked on together.
pub(super) fn together(per_row: usize) -> usize {
    if per_row > TOGETHER { TOGETHER } else { TOGETHER / per_row * per_row }
}

/// Room for the scores of positions 0..to, with whole lanes and a tile that starts at any of them.
pub(super) fn scores_len(to: usize) -> usize {
    to.next_multiple_of(LANES) + LANES
}

#[inline(always)]
fn attend_group<S: Simd, E: Element>(
    shape: &AttnShape,
    group: &mut [Query<E>],
    scores: &mut [f32],
    row: usize,
) {
    score_group::<S, E>(shape.head_dim, group, scores, row);
    for (query, scores) in group.iter_mut().zip(scores.chunks_exact_mut(row)) {
        cap_scores::<S>(shape, query.from, query.to, scores);
        let share = S::splat(1.0 / softmax::<S>(query.from, query.to, scores));
        let seen = query.from / LANES * LANES..query.to.next_multiple_of(LANES);
        for lanes in scores[seen].chunks_exact_mut(LANES) {
            S::store(S::mul(S::load(lanes), share), lanes);
        }
        query.out.fill(0.0);
    }
    weigh_group::<S, E>(group, scores, row);
}

/// Tiles at the front that are the same for all queries.
fn shared_tiles<E>(group: &[Query<E>]) -> usize {
    let first = group[0].tiles;
    let same = |a: &[KeyTile<E>], b: &[KeyTile<E>]| a.as_ptr() == b.as_ptr();
    if group.iter().all(|query| same(query.tiles, first)) {
        return group.iter().map(|query| query.tiles.len()).min().unwrap_or(0);
    }
    let alike = |t: usize| {
        group.iter().all(|query| {
            query
                .tiles
                .get(t)
                .is_some_and(|tile| tile.k.as_ptr() == first[t].k.as_ptr() && tile.len == first[t].len)
        })
    };
    (0..first.len()).take_while(|&t| alike(t)).count()
}

/// Where the queries that walk the same list of tiles as the first one end.
fn row_end<E>(group: &[Query<E>]) -> usize {
    let first = group[0].tiles;
    let same = |query: &Query<E>| query.tiles.as_ptr() == first.as_ptr() && query.tiles.len() == first.len();
    group.iter().take_while(|query| same(query)).count()
}

/// Calls a function that is generic over the instruction set, the number of queries and, where named, the elements.
macro_rules! by_count {
    ($count:expr, $function:ident $(<$element:ty>)?, $args:tt) => {
        match $count {
            1 => $function::<S, 1 $(, $element)?> $args,
            2 => $function::<S, 2 $(, $element)?> $args,
            3 => $function::<S, 3 $(, $element)?> $args,
            4 => $function::<S, 4 $(, $element)?> $args,
            5 => $function::<S, 5 $(, $element)?> $args,
            6 => $function::<S, 6 $(, $element)?> $args,
            _ => unreachable!("1 to 6 queries are worked on together"),
        }
    };
}
pub(super) use by_count;

/// scores[query][position] = q·k, each one chain over the head dimension, for the tiles that any query of the group sees.
#[inline(always)]
pub(super) fn score_group<S: Simd, E: Element>(d: usize, group: &[Query<E>], scores: &mut [f32], row: usize) {
    let from = group.iter().map(|query| query.from).min().unwrap_or(0);
    let to = group.iter().map(|query| query.to).max().unwrap_or(0);
    let shared = shared_tiles(group);
    let seen = |tiles: &[KeyTile<E>], first: usize, last: usize| {
        let first = first.max(tiles.partition_point(|tile| tile.start + tile.len <= from));
        first..last.min(tiles.partition_point(|tile| tile.start < to)).max(first)
    };
    let tiles = &group[0].tiles[seen(group[0].tiles, 0, shared)];
    by_count!(group.len(), score_tiles<E>, (d, tiles, group, scores, row));
    let mut start = 0;
    while start < group.len() {
        let end = start + row_end(&group[start..]);
        let tiles = group[start].tiles;
        if tiles.len() > shared {
            let tiles = &tiles[seen(tiles, shared, tiles.len())];
            let scores = &mut scores[start * row..];
            by_count!(end - start, score_tiles<E>, (d, tiles, &group[start..end], scores, row));
        }
        start = end;
    }
}

#[inline(always)]
fn score_tiles<S: Simd, const R: usize, E: Element>(
    d: usize,
    tiles: &[KeyTile<E>],
    group: &[Query<E>],
    scores: &mut [f32],
    row: usize,
) {
    assert!(group.len() == R && scores.len() >= R * row && group.iter().all(|query| query.q.len() >= d));
    assert!(tiles.iter().all(|tile| tile.k.len() >= d * LANES && tile.start + LANES <= row));
    // Eight chains hide the latency of a multiply-add.
    let mut rest = tiles;
    while !rest.is_empty() {
        // SAFETY: the lengths are checked above.
        unsafe {
            rest = if S::MANY_REGISTERS && R <= 1 && rest.len() >= 8 {
                score_some::<S, R, 8, E>(d, rest, group, scores, row)
            } else if S::MANY_REGISTERS && R <= 3 && rest.len() >= 4 {
                score_some::<S, R, 4, E>(d, rest, group, scores, row)
            } else if S::MANY_REGISTERS && rest.len() >= 2 {
                score_some::<S, R, 2, E>(d, rest, group, scores, row)
            } else {
                score_some::<S, R, 1, E>(d, rest, group, scores, row)
            }
        }
    }
}

/// Scores of R queries against the first T tiles; returns the other tiles.
///
/// # Safety
/// Queries and keys hold `d` dimensions, `scores` R rows that reach 16 lanes beyond each tile's start.
#[inline(always)]
unsafe fn score_some<'a, 'b, S: Simd, const R: usize, const T: usize, E: Element>(
    d: usize,
    tiles: &'a [KeyTile<'b, E>],
    group: &[Query<E>],
    scores: &mut [f32],
    row: usize,
) -> &'a [KeyTile<'b, E>] {
    let (now, rest) = tiles.split_at(T);
    let mut sums = [[S::splat(0.0); T]; R];
    let q: [*const f32; R] = std::array::from_fn(|r| group[r].q.as_ptr());
    let k: [*const E; T] = std::array::from_fn(|t| now[t].k.as_ptr());
    // A tile is about a page; the hardware's own prefetch stops at its end.
    let next: [*const E; T] = std::array::from_fn(|t| rest.get(t).unwrap_or(&now[t]).k.as_ptr());
    for i in 0..d {
        for t in 0..T {
            // SAFETY: promised by the caller.
            let k = unsafe { E::read::<S>(k[t].add(i * LANES)) };
            S::prefetch(next[t].wrapping_add(i * LANES).cast());
            for r in 0..R {
                // SAFETY: promised by the caller.
                sums[r][t] = S::fma(S::splat(unsafe { *q[r].add(i) }), k, sums[r][t]);
            }
        }
    }
    for t in 0..T {
        for r in 0..R {
            // Ascending, so that what lies beyond a short tile is overwritten by the next.
            // SAFETY: promised by the caller.
            unsafe { S::write(sums[r][t], scores.as_mut_ptr().add(r * row + now[t].start)) };
        }
    }
    rest
}

/// Scales scores from..to, caps them, and writes −inf around them up to the lanes' edges.
#[inline(always)]
pub(super) fn cap_scores<S: Simd>(shape: &AttnShape, from: usize, to: usize, scores: &mut [f32]) {
    let first = from / LANES * LANES;
    let last = to.next_multiple_of(LANES);
    let scale = S::splat(shape.scale);
    for lanes in scores[first..last].chunks_exact_mut(LANES) {
        let mut s = S::mul(S::load(lanes), scale);
        if let Some(cap) = shape.softcap {
            s = S::mul(S::splat(cap), tanh::<S>(S::div(s, S::splat(cap))));
        }
        S::store(s, lanes);
    }
    scores[first..from].fill(f32::NEG_INFINITY);
    scores[to..last].fill(f32::NEG_INFINITY);
}

/// scores = exp(scores − their maximum) over the lanes that hold from..to; returns their sum.
#[inline(always)]
pub(super) fn softmax<S: Simd>(from: usize, to: usize, scores: &mut [f32]) -> f32 {
    let scores = &mut scores[from / LANES * LANES..to.next_multiple_of(LANES)];
    let mut largest = S::splat(f32::NEG_INFINITY);
    for lanes in scores.chunks_exact(LANES) {
        largest = S::max(S::load(lanes), largest);
    }
    let largest = S::splat(S::largest(largest));
    let mut sum = S::splat(0.0);
    for lanes in scores.chunks_exact_mut(LANES) {
        let e = exp::<S>(S::sub(S::load(lanes), largest));
        sum = S::add(sum, e);
        S::store(e, lanes);
    }
    S::sum(sum)
}

/// out += Σ weights[query][position]·v[position] over the positions seen, ascending.
///
/// Positions that all queries of the group, then of a row, see in shared tiles are taken together; the few others alone.
#[inline(always)]
pub(super) fn weigh_group<S: Simd, E: Element>(group: &mut [Query<E>], weights: &[f32], row: usize) {
    let mut done = [0; TOGETHER];
    for (done, query) in done.iter_mut().zip(group.iter()) {
        *done = query.from;
    }
    let shared = shared_tiles(group);
    let reach = shared.checked_sub(1).map_or(0, |t| group[0].tiles[t].start + group[0].tiles[t].len);
    weigh_common::<S, E>(group, &mut done, weights, row, reach);
    let mut start = 0;
    while start < group.len() {
        let end = start + row_end(&group[start..]);
        weigh_common::<S, E>(
            &mut group[start..end],
            &mut done[start..end],
            &weights[start * row..],
            row,
            usize::MAX,
        );
        start = end;
    }
    for (r, query) in group.iter_mut().enumerate() {
        let to = query.to;
        weigh_range::<S, 1, E>(std::slice::from_mut(query), &weights[r * row..], row, done[r], to);
    }
}

/// Takes the positions that all queries have before them and see, below `reach`.
#[inline(always)]
fn weigh_common<S: Simd, E: Element>(
    group: &mut [Query<E>],
    done: &mut [usize],
    weights: &[f32],
    row: usize,
    reach: usize,
) {
    let from = *done[..group.len()].iter().max().unwrap_or(&0);
    let to = group.iter().map(|query| query.to).min().unwrap_or(0).min(reach);
    if from >= to {
        return;
    }
    for (r, query) in group.iter_mut().enumerate() {
        weigh_range::<S, 1, E>(std::slice::from_mut(query), &weights[r * row..], row, done[r], from);
        done[r] = to;
    }
    by_count!(group.len(), weigh_range<E>, (group, weights, row, from, to));
}

/// out += Σ weights[j]·v[j] for j in from..to, R queries at a time; the tiles are the first query's.
#[inline(always)]
fn weigh_range<S: Simd, const R: usize, E: Element>(
    group: &mut [Query<E>],
    weights: &[f32],
    row: usize,
    from: usize,
    to: usize,
) {
    if from >= to {
        return;
    }
    let tiles = group[0].tiles;
    let first = tiles.partition_point(|tile| tile.start + tile.len <= from);
    let last = tiles.partition_point(|tile| tile.start < to);
    let tiles = &tiles[first..last];
    let d = group[0].out.len();
    assert!(
        group.len() == R && weights.len() >= (R - 1) * row + to && group.iter().all(|q| q.out.len() == d)
    );
    for tile in tiles {
        let used = tile.len.min(to - tile.start);
        assert!((used - 1) * tile.v_stride + d <= tile.v.len());
    }
    let mut i = 0;
    // SAFETY: the asserts cover d elements of the values of all positions, of the outputs, and the weights.
    unsafe {
        while S::MANY_REGISTERS && d - i >= 4 * LANES {
            weigh_columns::<S, R, 4, E>(tiles, group, weights, row, from, to, i);
            i += 4 * LANES;
        }
        while d - i >= LANES {
            weigh_columns::<S, R, 1, E>(tiles, group, weights, row, from, to, i);
            i += LANES;
        }
    }
    if i == d {
        return;
    }
    for (r, query) in group.iter_mut().enumerate() {
        for tile in tiles {
            for j in from.max(tile.start)..to.min(tile.start + tile.len) {
                let v = &tile.v[(j - tile.start) * tile.v_stride..][..d];
                for c in i..d {
                    query.out[c] = weights[r * row + j].mul_add(v[c].wide(), query.out[c]);
                }
            }
        }
    }
}

/// # Safety
/// Columns `at..at + 16·C` exist in outputs and values, positions from..to in tiles and in R rows of weights.
#[inline(always)]
unsafe fn weigh_columns<S: Simd, const R: usize, const C: usize, E: Element>(
    tiles: &[KeyTile<E>],
    group: &mut [Query<E>],
    weights: &[f32],
    row: usize,
    from: usize,
    to: usize,
    at: usize,
) {
    // SAFETY: promised by the caller.
    unsafe {
        let mut sums = [[S::splat(0.0); C]; R];
        for (sums, query) in sums.iter_mut().zip(group.iter()) {
            for (c, sum) in sums.iter_mut().enumerate() {
                *sum = S::read(query.out.as_ptr().add(at + c * LANES));
            }
        }
        for (t, tile) in tiles.iter().enumerate() {
            let first = from.max(tile.start);
            let last = to.min(tile.start + tile.len);
            // A tile is about a page; the hardware's own prefetch stops at its end.
            let ahead = tiles.get(t + 1).map_or(0, |next| {
                (next.v.as_ptr() as usize).wrapping_sub(tile.v.as_ptr() as usize) / size_of::<E>()
            });
            let mut v = tile.v.as_ptr().add((first - tile.start) * tile.v_stride + at);
            let mut weight = weights.as_ptr().add(first);
            for _ in first..last {
                let mut values = [S::splat(0.0); C];
                for c in 0..C {
                    values[c] = E::read::<S>(v.add(c * LANES));
                    S::prefetch(v.wrapping_add(ahead + c * LANES).cast());
                }
                for r in 0..R {
                    let w = S::splat(*weight.add(r * row));
                    for c in 0..C {
                        sums[r][c] = S::fma(w, values[c], sums[r][c]);
                    }
                }
                v = v.wrapping_add(tile.v_stride);
                weight = weight.add(1);
            }
        }
        for (sums, query) in sums.into_iter().zip(group.iter_mut()) {
            for (c, sum) in sums.into_iter().enumerate() {
                S::write(sum, query.out.as_mut_ptr().add(at + c * LANES));
            }
        }
    }
}
