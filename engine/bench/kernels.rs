//! Kernels alone at the model's shapes: products forward and backward, attention, norms.
//!
//! Products walk through as many copies of a matrix as the model has layers, so that a decode-sized product reads its weights from
//! where they are in a real pass. The best of many short windows counts.

use std::time::{Duration, Instant};

use clap::Args;
use rft_kernels::{
    BLOCK, Buffer, KvPages, Matrix, PagedRun, Segment, Span, Write, bf16_panels_len, linear, linear_dw,
    linear_dx, paged_attention, panels_len, rms_norm, segment_attention, segment_attention_backward,
    store_kv, to_bf16_panels,
};
use serde_json::Map;

use super::{CommonArgs, Machine, Measurement, Report, round, spread};
use crate::config::Precision;
use crate::error::Result;
use crate::model::policy::Policy;

/// Flags of `bench kernels`.
#[derive(Debug, Clone, Args)]
pub struct KernelArgs {
    #[command(flatten)]
    #[allow(missing_docs)]
    pub common: CommonArgs,
    /// Rows of the products, one case each.
    #[arg(long, value_delimiter = ',', default_values_t = [1, 4, 8, 32, 64, 256, 1024])]
    pub rows: Vec<usize>,
    /// Milliseconds for each case.
    #[arg(long, default_value_t = 150)]
    pub budget_ms: u64,
}

/// Outputs of a case at most, in numbers: 128 MiB.
const LARGEST: usize = 32 << 20;

/// Weights that a walk over copies reads at most, in numbers: 64 Mi.
const WALK: usize = 64 << 20;

pub(super) fn run(args: &KernelArgs, machine: &mut Machine, report: Report) -> Result<()> {
    let policy = machine.policy(0, 512)?;
    let spec = &policy.spec;
    let (q, kv) = (spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim);
    let shapes = [
        ("qkv", q + 2 * kv, spec.hidden),
        ("out", spec.hidden, q),
        ("gate_up", 2 * spec.ffn, spec.hidden),
        ("down", spec.hidden, spec.ffn),
        ("head", spec.vocab, spec.hidden),
    ];
    for (name, n, k) in shapes {
        let copies = (WALK / (n * k)).clamp(1, spec.layers);
        let weights: Vec<Weights> = (0..copies).map(|_| Weights::new(machine, n, k)).collect();
        for &m in args.rows.iter().filter(|m| **m * n <= LARGEST) {
            products(args, machine, name, &weights, (m, n, k), report);
        }
    }
    attention(args, machine, &policy, report);
    Ok(())
}

struct Weights {
    f32: Buffer<f32>,
    bf16: Option<Buffer<u16>>,
    n: usize,
    k: usize,
}

impl Weights {
    fn new(machine: &Machine, n: usize, k: usize) -> Self {
        let mut f32 = Buffer::zeros(panels_len(n, k));
        f32.iter_mut().enumerate().for_each(|(i, w)| *w = (i * 7919 % 1009) as f32 / 504.5 - 1.0);
        let bf16 = (machine.precision == Precision::Bf16).then(|| {
            let mut low = Buffer::zeros(bf16_panels_len(n, k));
            to_bf16_panels(&machine.pool, &f32, n, k, &mut low);
            low
        });
        Self { f32, bf16, n, k }
    }

    fn matrix(&self) -> Matrix<'_> {
        Matrix { n: self.n, k: self.k, f32: &self.f32, bf16: self.bf16.as_deref(), quantized: None }
    }
}

fn numbers(n: usize) -> Vec<f32> {
    (0..n).map(|i| (i * 7919 % 1009) as f32 / 504.5 - 1.0).collect()
}

/// Seconds of each call of `work(i)` within the budget; the first call is a warm-up.
fn windows(args: &KernelArgs, mut work: impl FnMut(usize)) -> Vec<f64> {
    work(0);
    let (budget, clock) = (Duration::from_millis(args.budget_ms), Instant::now());
    let mut seconds = Vec::new();
    while seconds.len() < 3 || clock.elapsed() < budget {
        let start = Instant::now();
        work(seconds.len() + 1);
        seconds.push(start.elapsed().as_secs_f64());
    }
    seconds
}

/// The best window as a rate; `bound` is the least seconds of the work.
fn rate(work: String, seconds: Vec<f64>, operations: f64, bytes: f64, bound: f64) -> Measurement {
    let (median, (best, worst)) = spread(seconds);
    let mut more = Map::new();
    more.insert("median_gflops".into(), round(operations / median / 1e9).into());
    more.insert("gb_per_s".into(), round(bytes / best / 1e9).into());
    more.insert("microseconds".into(), round(best * 1e6).into());
    Measurement {
        work,
        value: operations / best / 1e9,
        unit: "GFLOP/s",
        range: (operations / worst / 1e9, operations / best / 1e9),
        roofline_share: Some(bound / best),
        more,
    }
}

fn products(
    args: &KernelArgs,
    machine: &Machine,
    name: &str,
    weights: &[Weights],
    (m, n, k): (usize, usize, usize),
    report: Report,
) {
    let pool = &machine.pool;
    let operations = 2.0 * (m * n * k) as f64;
    let bytes = machine.weight_bytes() * (n * k) as f64;
    let label = |what: &str| format!("{what} {name} {} [{m}, {k}] x [{n}, {k}]", machine.precision_name());
    let (x, mut y, mut dx) = (numbers(m * k), numbers(m * n), numbers(m * k));
    let seconds = windows(args, |i| {
        linear(pool, &x, m, weights[i % weights.len()].matrix(), &mut y, Write::Set);
    });
    report(rate(label("forward"), seconds, operations, bytes, machine.bound(operations, bytes)));
    if m < 64 {
        return;
    }
    let seconds = windows(args, |i| {
        linear_dx(pool, &y, m, weights[i % weights.len()].matrix(), &mut dx, Write::Set);
    });
    report(rate(label("dX"), seconds, operations, bytes, machine.bound(operations, bytes)));
    let mut dw = Buffer::<f32>::zeros(panels_len(n, k));
    let bf16 = machine.precision == Precision::Bf16;
    let seconds = windows(args, |_| linear_dw(pool, &y, &x, m, n, k, &mut dw, bf16));
    let moved = 8.0 * (n * k) as f64;
    report(rate(label("dW"), seconds, operations, moved, machine.bound(operations, 0.0)));
}

fn attention(args: &KernelArgs, machine: &Machine, policy: &Policy, report: Report) {
    let (pool, shape) = (&machine.pool, policy.weights().attention(0));
    let width = shape.heads * shape.head_dim;
    let bound = |operations: f64, bytes: f64| {
        (operations / (machine.roof.f32_gflops * 1e9)).max(bytes / (machine.roof.read_gb_per_s * 1e9))
    };
    let cases = [(1, 8, 64, 128), (8, 8, 64, 128), (64, 1, 64, 128), (32, 1, 64, 1984)];
    for ((prompts, samples, prompt, own), bf16) in cases.into_iter().flat_map(|c| [(c, false), (c, true)]) {
        let (shared, rest, count) = (prompt / BLOCK, own / BLOCK, prompts * samples);
        let table = |s: usize| -> Vec<u32> {
            let first = (0..shared).map(|b| s / samples * shared + b);
            first.chain((0..rest).map(|b| prompts * shared + s * rest + b)).map(|b| b as u32).collect()
        };
        let tables: Vec<Vec<u32>> = (0..count).map(table).collect();
        let blocks = prompts * shared + count * rest;
        let mut pages = KvPages::new(blocks, shape.kv_heads, shape.head_dim, bf16);
        let slots: Vec<u32> = (0..(blocks * BLOCK) as u32).collect();
        store_kv(pool, &shape, &numbers(slots.len() * shape.stride()), &slots, &mut pages);
        let (qkv, mut out) = (numbers(count * shape.stride()), numbers(count * width));
        let run = |(row, table): (usize, &'_ Vec<u32>)| (row, table.clone());
        let owned: Vec<(usize, Vec<u32>)> = tables.iter().enumerate().map(run).collect();
        let runs: Vec<PagedRun> = owned
            .iter()
            .map(|(row, table)| PagedRun { row: *row, rows: 1, first_pos: prompt + own - 1, table })
            .collect();
        let operations = 4.0 * (count * (prompt + own) * width) as f64;
        let elements = 2 * blocks * BLOCK * shape.kv_heads * shape.head_dim;
        let bytes = if bf16 { 2.0 } else { 4.0 } * elements as f64;
        let seconds = windows(args, |_| paged_attention(pool, &shape, &qkv, &runs, &pages, &mut out));
        let kept = if bf16 { "bf16" } else { "f32" };
        let work = format!("decode attention {prompts}x{samples}, {prompt}+{own}, {kept} cache");
        report(rate(work, seconds, operations, bytes, bound(operations, bytes)));
    }
    let (prompt, own, groups, samples) = (64, 128, 8, 1);
    let (mut segments, mut row) = (Vec::new(), 0);
    for _ in 0..groups {
        let span = Span { row, len: prompt };
        segments.push(Segment { rows: span, prefix: None });
        row += prompt;
        for _ in 0..samples {
            segments.push(Segment { rows: Span { row, len: own }, prefix: Some(span) });
            row += own;
        }
    }
    let (qkv, dout) = (numbers(row * shape.stride()), numbers(row * width));
    let (mut out, mut dqkv) = (dout.clone(), qkv.clone());
    let seen = prompt * (prompt + 1) / 2 + samples * (own * prompt + own * (own + 1) / 2);
    let operations = 4.0 * (groups * seen * width) as f64;
    let seconds = windows(args, |_| segment_attention(pool, &shape, &qkv, &segments, &mut out));
    let work = format!("training attention forward {groups}x({prompt}+{own})");
    report(rate(work, seconds, operations, 0.0, bound(operations, 0.0)));
    let seconds =
        windows(args, |_| segment_attention_backward(pool, &shape, &qkv, &segments, &out, &dout, &mut dqkv));
    let work = format!("training attention backward {groups}x({prompt}+{own})");
    report(rate(work, seconds, 2.5 * operations, 0.0, bound(2.5 * operations, 0.0)));
    let rows = 1024;
    let hidden = policy.spec.hidden;
    let (x, w, mut y) = (numbers(rows * hidden), numbers(hidden), numbers(rows * hidden));
    let seconds = windows(args, |_| rms_norm(pool, &x, &w, 1e-5, 0.0, &mut y));
    let (operations, bytes) = (4.0 * (rows * hidden) as f64, 8.0 * (rows * hidden) as f64);
    report(rate(
        format!("RMS norm [{rows}, {hidden}]"),
        seconds,
        operations,
        bytes,
        bound(operations, bytes),
    ));
}
