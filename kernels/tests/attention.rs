//! Attention: decode = chunked prefill = training forward, bit for bit; the gradient against finite differences.

mod common;

use common::*;
use proptest::prelude::*;
use rft_kernels::*;

/// Scores sum to one over at most a few hundred positions, values are below 1: a few dozen roundings of 6e-8.
const TOLERANCE: f64 = 5e-6;

fn shape(heads: usize, kv_heads: usize, head_dim: usize, window: usize, cap: bool) -> AttnShape {
    let window = (window > 0).then_some(window);
    AttnShape { heads, kv_heads, head_dim, scale: 0.7, window, softcap: cap.then_some(2.5) }
}

/// A prompt followed by completions that share it; the prompt is a segment of its own.
fn group(first_row: usize, prompt: usize, completions: &[usize]) -> Vec<Segment> {
    let span = Span { row: first_row, len: prompt };
    let mut segs = vec![Segment { rows: span, prefix: None }];
    let mut row = first_row + prompt;
    for &len in completions {
        segs.push(Segment { rows: Span { row, len }, prefix: Some(span) });
        row += len;
    }
    segs
}

fn rows(segs: &[Segment]) -> usize {
    segs.iter().map(|seg| seg.rows.row + seg.rows.len).max().unwrap_or(0)
}

fn packed(shape: &AttnShape, qkv: &[f32], segs: &[Segment], threads: usize) -> Vec<f32> {
    let mut out = vec![f32::NAN; rows(segs) * shape.heads * shape.head_dim];
    segment_attention(&Pool::new(threads), shape, qkv, segs, &mut out);
    out
}

/// Runs the same sequences through a paged cache: prompts in chunks, completions `chunk` rows at a time, side by side.
fn paged(
    shape: &AttnShape,
    qkv: &[f32],
    segs: &[Segment],
    threads: usize,
    chunk: usize,
    seed: u64,
    bf16: bool,
) -> Vec<f32> {
    let pool = Pool::new(threads);
    let (stride, width) = (shape.stride(), shape.heads * shape.head_dim);
    let total = rows(segs);
    // Pages are handed out in an order that the seed shuffles.
    let blocks: usize =
        segs.iter().map(|s| (s.prefix.map_or(0, |p| p.len) + s.rows.len).div_ceil(BLOCK)).sum();
    let step = [1, 3, 5, 7].into_iter().find(|s| !(blocks + 1).is_multiple_of(*s) || *s == 1).unwrap_or(1);
    let mut ids = (0..blocks).map(|b| ((b * step + seed as usize) % (blocks + 1)) as u32);
    let mut pages = KvPages::new(blocks + 1, shape.kv_heads, shape.head_dim, bf16);
    match &mut pages {
        KvPages::F32 { k, v } => [k, v].map(|x| x.fill(f32::NAN)),
        KvPages::Bf16 { k, v } => [k, v].map(|x| x.fill(0x7fc0)),
    };
    let mut tables: Vec<Vec<u32>> = Vec::new();
    for seg in segs {
        let prefix = seg.prefix.map_or(0..0, |p| p.row..p.row + p.len);
        let len = prefix.len() + seg.rows.len;
        // Samples of a prompt share the pages that it fills, and own the rest.
        let sibling = segs[..tables.len()].iter().rposition(|s| s.prefix.is_some() && s.prefix == seg.prefix);
        let shared = sibling.map_or(0, |_| prefix.len() / BLOCK);
        let mut table: Vec<u32> = sibling.map_or(Vec::new(), |s| tables[s][..shared].to_vec());
        table.extend(ids.by_ref().take(len.div_ceil(BLOCK) - shared));
        let fused: Vec<f32> = prefix.clone().flat_map(|row| qkv[row * stride..][..stride].to_vec()).collect();
        let slots: Vec<u32> = (0..prefix.len()).map(|p| table[p / BLOCK] * 16 + (p % BLOCK) as u32).collect();
        store_kv(&pool, shape, &fused, &slots, &mut pages);
        tables.push(table);
    }
    let mut out = vec![f32::NAN; total * width];
    let longest = segs.iter().map(|seg| seg.rows.len).max().unwrap_or(0);
    for from in (0..longest).step_by(chunk) {
        let (mut fused, mut slots, mut runs, mut places) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for (seg, table) in segs.iter().zip(&tables) {
            let count = chunk.min(seg.rows.len.saturating_sub(from));
            let first_pos = seg.prefix.map_or(0, |p| p.len) + from;
            runs.push(PagedRun { row: places.len(), rows: count, first_pos, table });
            for i in 0..count {
                let row = seg.rows.row + from + i;
                fused.extend_from_slice(&qkv[row * stride..][..stride]);
                slots.push(table[(first_pos + i) / BLOCK] * 16 + ((first_pos + i) % BLOCK) as u32);
                places.push(row);
            }
        }
        store_kv(&pool, shape, &fused, &slots, &mut pages);
        let mut part = vec![f32::NAN; places.len() * width];
        paged_attention(&pool, shape, &fused, &runs, &pages, &mut part);
        for (row, part) in places.iter().zip(part.chunks(width)) {
            out[row * width..][..width].copy_from_slice(part);
        }
    }
    out
}

fn gradient(shape: &AttnShape, qkv: &[f32], segs: &[Segment], dout: &[f32], threads: usize) -> Vec<f32> {
    let out = packed(shape, qkv, segs, threads);
    let mut dqkv = vec![f32::NAN; qkv.len()];
    segment_attention_backward(&Pool::new(threads), shape, qkv, segs, &out, dout, &mut dqkv);
    dqkv
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 20, failure_persistence: None, ..Default::default() })]

    #[test]
    fn decode_prefill_and_training_give_the_same_bits(
        (heads, kv_heads) in prop::sample::select(vec![(1usize, 1usize), (9, 3), (4, 1), (7, 1), (8, 1), (4, 2)]),
        head_dim in prop::sample::select(vec![8usize, 24, 64, 80]),
        window in prop::sample::select(vec![0usize, 1, 5, 20]), cap in any::<bool>(),
        prompt in 1usize..50, completions in prop::collection::vec(1usize..40, 0..4),
        threads in prop::sample::select(vec![1usize, 2, 3, 8]), chunk in 1usize..40, seed in 0u64..100,
    ) {
        let shape = shape(heads, kv_heads, head_dim, window, cap);
        let segs = group(0, prompt, &completions);
        let qkv = numbers(rows(&segs) * shape.stride(), seed);
        let trained = packed(&shape, &qkv, &segs, 1);
        assert_close("out", &trained, &reference::attention(&shape, &reference::wide(&qkv), &segs), TOLERANCE);
        prop_assert_eq!(bits(&trained), bits(&packed(&shape, &qkv, &segs, threads)));
        prop_assert_eq!(bits(&trained), bits(&paged(&shape, &qkv, &segs, threads, chunk, seed, false)));
        prop_assert_eq!(bits(&trained), bits(&paged(&shape, &qkv, &segs, threads, 1, seed + 1, false)));
        // a bf16 cache gives what rounded keys and values give in place
        let mut rounded = qkv.clone();
        round_kv(&Pool::new(threads), &shape, &mut rounded);
        let trained = packed(&shape, &rounded, &segs, threads);
        prop_assert!(rounded != qkv);
        prop_assert_eq!(bits(&trained), bits(&paged(&shape, &qkv, &segs, threads, chunk, seed, true)));
    }

    #[test]
    fn a_sequence_alone_has_the_bits_it_has_behind_a_shared_prefix(
        head_dim in prop::sample::select(vec![16usize, 40, 64]), prompt in 1usize..40, own in 1usize..40, seed in 0u64..100,
    ) {
        let shape = shape(6, 2, head_dim, 0, false);
        let segs = group(0, prompt, &[own]);
        let qkv = numbers(rows(&segs) * shape.stride(), seed);
        let whole = [Segment { rows: Span { row: 0, len: prompt + own }, prefix: None }];
        prop_assert_eq!(bits(&packed(&shape, &qkv, &segs, 2)), bits(&packed(&shape, &qkv, &whole, 2)));
    }

    #[test]
    fn a_groups_gradient_does_not_depend_on_the_rest_of_the_batch(
        (heads, kv_heads) in prop::sample::select(vec![(9usize, 3usize), (4, 1), (7, 1)]),
        head_dim in prop::sample::select(vec![8usize, 24, 64]), window in prop::sample::select(vec![0usize, 7]), cap in any::<bool>(),
        prompt in 1usize..30, completions in prop::collection::vec(1usize..20, 1..4),
        threads in prop::sample::select(vec![1usize, 2, 3, 8]),
    ) {
        let shape = shape(heads, kv_heads, head_dim, window, cap);
        let alone = group(0, prompt, &completions);
        let count = rows(&alone);
        let mut both = group(count, 21, &[3, 18]);
        both.splice(1..1, alone.iter().copied());
        let qkv = numbers(rows(&both) * shape.stride(), 1);
        let dout = numbers(rows(&both) * heads * head_dim, 2);
        let one = gradient(&shape, &qkv[..count * shape.stride()], &alone, &dout[..count * heads * head_dim], 1);
        let all = gradient(&shape, &qkv, &both, &dout, threads);
        prop_assert_eq!(bits(&one), bits(&all[..one.len()]));
    }
}

#[test]
fn the_gradient_is_the_slope_of_the_f64_twin() {
    for (heads, kv_heads, head_dim, window, cap) in
        [(2, 1, 8, 5, true), (3, 1, 64, 0, false), (4, 2, 20, 0, true)]
    {
        let shape = shape(heads, kv_heads, head_dim, window, cap);
        let mut segs = group(0, 5, &[3, 4]);
        segs.push(Segment { rows: Span { row: 12, len: 18 }, prefix: None });
        let qkv = numbers(rows(&segs) * shape.stride(), 5);
        let dout = numbers(rows(&segs) * heads * head_dim, 6);
        let grad = gradient(&shape, &qkv, &segs, &dout, 2);
        let mut x = reference::wide(&qkv);
        let picked: Vec<usize> = (0..qkv.len()).step_by(11).collect();
        let want: Vec<f64> = picked
            .iter()
            .map(|&i| slope(&mut x, i, |x| weighted(&reference::attention(&shape, x, &segs), &dout)))
            .collect();
        let got: Vec<f32> = picked.iter().map(|&i| grad[i]).collect();
        // Sums of up to 40 terms of magnitude 1 with f32 roundings.
        assert_close("dqkv", &got, &want, 1e-5);
    }
}

#[test]
fn bits_are_the_same_on_every_instruction_set() {
    let shape = shape(9, 3, 64, 20, true);
    let segs = group(0, 19, &[20, 3]);
    let qkv = numbers(rows(&segs) * shape.stride(), 8);
    let dout = numbers(rows(&segs) * 9 * 64, 9);
    let results = on_every_isa(|_| {
        let paged = [false, true].map(|bf16| bits(&paged(&shape, &qkv, &segs, 2, 3, 1, bf16)));
        (bits(&packed(&shape, &qkv, &segs, 2)), paged, bits(&gradient(&shape, &qkv, &segs, &dout, 2)))
    });
    for (isa, got) in &results {
        assert_eq!(got, &results[0].1, "{isa:?}");
    }
}

#[test]
fn nan_reaches_what_sees_it_and_nothing_else() {
    let shape = shape(3, 1, 16, 0, false);
    let segs = group(0, 10, &[6, 6]);
    let mut qkv = numbers(22 * shape.stride(), 4);
    let clean = packed(&shape, &qkv, &segs, 2);
    // The key of the first completion's row 2.
    qkv[12 * shape.stride() + shape.heads * 16] = f32::NAN;
    let dirty = packed(&shape, &qkv, &segs, 2);
    for (row, (a, b)) in clean.chunks(48).zip(dirty.chunks(48)).enumerate() {
        if (12..16).contains(&row) {
            assert!(b.iter().all(|x| x.is_nan()), "row {row}");
        } else {
            assert_eq!(bits(a), bits(b), "row {row}");
        }
    }
}

#[test]
fn a_copied_block_answers_like_its_source() {
    let shape = shape(2, 1, 8, 0, false);
    let pool = Pool::new(1);
    let qkv = numbers(4 * shape.stride(), 3);
    let mut pages = KvPages::new(3, 1, 8, false);
    store_kv(&pool, &shape, &qkv, &[16, 17, 18, 19], &mut pages);
    pages.copy_block(8 * BLOCK, 1, 2);
    let answers = [1, 2].map(|block| {
        let mut out = vec![0.0; 16];
        let runs = [PagedRun { row: 0, rows: 1, first_pos: 3, table: &[block] }];
        paged_attention(&pool, &shape, &qkv[3 * shape.stride()..], &runs, &pages, &mut out);
        bits(&out)
    });
    assert_eq!(answers[0], answers[1]);
}
