//! Kernels at SmolLM2-135M's shapes: products at 1 to 1,024 rows, attention, and what lies between.
//!
//! Throughput is in elements = floating-point operations for products and attention, bytes for the rest. The roofline of the machine
//! is printed first.

use std::hint::black_box;
use std::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use rft_kernels::*;

/// Outputs and inputs: qkv, attention output, gate and up, down, head.
const SHAPES: [(&str, usize, usize); 5] = [
    ("qkv", 960, 576),
    ("out", 576, 576),
    ("gate_up", 3072, 576),
    ("down", 576, 1536),
    ("head", 49_152, 576),
];

const ROWS: [usize; 6] = [1, 8, 32, 64, 256, 1024];

/// Largest output that a case may have: 128 MiB.
const LARGEST: usize = 32 << 20;

const SMOLLM2: AttnShape =
    AttnShape { heads: 9, kv_heads: 3, head_dim: 64, scale: 0.125, window: None, softcap: None };

fn pool() -> Pool {
    let threads = std::env::var("RFT_THREADS").ok().and_then(|threads| threads.parse().ok());
    Pool::new(threads.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, Into::into)))
}

fn numbers(n: usize) -> Vec<f32> {
    (0..n).map(|i| (i * 7919 % 1009) as f32 / 504.5 - 1.0).collect()
}

fn linear_layers(c: &mut Criterion) {
    let pool = pool();
    println!("{:?}, isa {:?}, bf16 rule {:?}", roofline(&pool), isa(), bf16_rule());
    for (name, n, k) in SHAPES {
        let mut panels = Buffer::<f32>::zeros(panels_len(n, k));
        pack_panels(&numbers(n * k), n, k, &mut panels);
        let mut low = Buffer::<u16>::zeros(bf16_panels_len(n, k));
        to_bf16_panels(&pool, &panels, n, k, &mut low);
        let mut dw = Buffer::<f32>::zeros(panels.len());
        for (precision, bf16) in [("f32", None), ("bf16", Some(&low[..]))] {
            let w = Matrix { n, k, f32: &panels, bf16, quantized: None };
            let mut group = c.benchmark_group(format!("linear/{name}/{precision}"));
            for m in ROWS.into_iter().filter(|m| m * n <= LARGEST) {
                let (x, mut y, mut dx) = (numbers(m * k), numbers(m * n), numbers(m * k));
                group.throughput(Throughput::Elements((2 * m * n * k) as u64));
                group.bench_function(BenchmarkId::new("forward", m), |b| {
                    b.iter(|| linear(&pool, black_box(&x), m, w, &mut y, Write::Set));
                });
                if m < 64 {
                    continue;
                }
                group.bench_function(BenchmarkId::new("dx", m), |b| {
                    b.iter(|| linear_dx(&pool, black_box(&y), m, w, &mut dx, Write::Set));
                });
                group.bench_function(BenchmarkId::new("dw", m), |b| {
                    b.iter(|| linear_dw(&pool, black_box(&y), &x, m, n, k, &mut dw, bf16.is_some()));
                });
            }
        }
    }
}

/// Multiply-adds of a causal block and of a full one, times two operations and two products.
fn attention_operations(rows: usize, before: usize) -> u64 {
    ((rows * before + rows * (rows + 1) / 2) * SMOLLM2.heads * SMOLLM2.head_dim * 4) as u64
}

fn decode(c: &mut Criterion) {
    let pool = pool();
    let mut group = c.benchmark_group("attention/decode");
    for (samples, prompts, prompt, own) in
        [(8, 1, 64, 128), (8, 8, 64, 128), (8, 8, 256, 64), (1, 64, 64, 128)]
    {
        let count = samples * prompts;
        let tables: Vec<Vec<u32>> = (0..count)
            .map(|s| {
                let shared = (0..prompt / BLOCK).map(|b| s / samples * (prompt / BLOCK) + b);
                let rest = (0..own / BLOCK).map(|b| prompts * (prompt / BLOCK) + s * (own / BLOCK) + b);
                shared.chain(rest).map(|block| block as u32).collect()
            })
            .collect();
        let blocks = prompts * (prompt / BLOCK) + count * (own / BLOCK);
        let cache = numbers(blocks * SMOLLM2.kv_heads * BLOCK * SMOLLM2.head_dim);
        let pages = KvPages::F32 { k: cache.clone(), v: cache };
        let qkv = numbers(count * SMOLLM2.stride());
        let mut out = numbers(count * SMOLLM2.heads * SMOLLM2.head_dim);
        let runs: Vec<PagedRun> = tables
            .iter()
            .enumerate()
            .map(|(row, table)| PagedRun { row, rows: 1, first_pos: prompt + own - 1, table })
            .collect();
        group.throughput(Throughput::Elements(count as u64 * attention_operations(1, prompt + own - 1)));
        group.bench_function(format!("{prompts}x{samples}, {prompt}+{own}"), |b| {
            b.iter(|| paged_attention(&pool, &SMOLLM2, black_box(&qkv), &runs, &pages, &mut out));
        });
    }
}

fn packed(c: &mut Criterion) {
    let pool = pool();
    let mut group = c.benchmark_group("attention/learner");
    for (prompts, samples, prompt, own) in [(16, 1, 64, 128), (4, 8, 256, 64)] {
        let mut segs = Vec::new();
        let (mut row, mut operations) = (0, 0);
        for _ in 0..prompts {
            let span = Span { row, len: prompt };
            segs.push(Segment { rows: span, prefix: None });
            row += prompt;
            operations += attention_operations(prompt, 0);
            for _ in 0..samples {
                segs.push(Segment { rows: Span { row, len: own }, prefix: Some(span) });
                row += own;
                operations += attention_operations(own, prompt);
            }
        }
        let qkv = numbers(row * SMOLLM2.stride());
        let dout = numbers(row * SMOLLM2.heads * SMOLLM2.head_dim);
        let (mut out, mut dqkv) = (dout.clone(), qkv.clone());
        let name = format!("{prompts}x{samples}, {prompt}+{own}");
        group.throughput(Throughput::Elements(operations));
        group.bench_function(BenchmarkId::new("forward", &name), |b| {
            b.iter(|| segment_attention(&pool, &SMOLLM2, black_box(&qkv), &segs, &mut out));
        });
        group.throughput(Throughput::Elements(operations * 5 / 2));
        group.bench_function(BenchmarkId::new("backward", &name), |b| {
            b.iter(|| {
                segment_attention_backward(&pool, &SMOLLM2, black_box(&qkv), &segs, &out, &dout, &mut dqkv)
            });
        });
    }
}

fn between(c: &mut Criterion) {
    let pool = pool();
    let mut group = c.benchmark_group("between");
    let m = 512;
    let (x, w, mut y) = (numbers(m * 576), numbers(576), numbers(m * 576));
    group.throughput(Throughput::Bytes((2 * m * 576 * 4) as u64));
    group.bench_function("rms_norm", |b| b.iter(|| rms_norm(&pool, black_box(&x), &w, 1e-5, 0.0, &mut y)));
    let (gate_up, mut out) = (numbers(m * 3072), numbers(m * 1536));
    group.throughput(Throughput::Bytes((m * 4608 * 4) as u64));
    group.bench_function("swiglu", |b| {
        b.iter(|| glu(&pool, black_box(&gate_up), m, 1536, Act::Silu, &mut out))
    });
    let logits = numbers(49_152);
    let (mut row, mut scratch) = (logits.clone(), Vec::new());
    group.throughput(Throughput::Bytes(49_152 * 4));
    for (name, top_k, top_p) in [("plain", 0, 1.0), ("top_k", 50, 1.0), ("top_p", 0, 0.9)] {
        let warp = Warp { temperature: 0.8, top_k, top_p, min_p: 0.0 };
        group.bench_function(BenchmarkId::new("warp_and_draw", name), |b| {
            b.iter(|| {
                row.copy_from_slice(&logits);
                let stats = warp_row(&mut row, &warp, &mut scratch);
                draw(&row, stats.lse, 0.7)
            });
        });
    }
    let n = 1 << 22;
    let (mut w, g, mut m, mut v) = (numbers(n), numbers(n), vec![0.0; n], vec![0.0; n]);
    let step = AdamwStep {
        lr: 1e-5,
        beta1: 0.9,
        beta2: 0.999,
        eps: 1e-8,
        weight_decay: 0.0,
        step: 3,
        grad_scale: 1.0,
    };
    group.throughput(Throughput::Bytes((7 * n * 4) as u64));
    group.bench_function("adamw", |b| b.iter(|| adamw(&pool, &mut w, black_box(&g), &mut m, &mut v, &step)));
}

criterion_group! {
    name = kernels;
    config = Criterion::default()
        .sample_size(20)
        .warm_up_time(Duration::from_millis(100))
        .measurement_time(Duration::from_millis(400));
    targets = linear_layers, decode, packed, between
}
criterion_main!(kernels);
