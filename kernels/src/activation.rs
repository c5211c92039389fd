//! Gated activations of the feed-forward block: out = act(gate)·up, and the gradient.

use crate::math::sigmoid;
use crate::pool::Pool;
use crate::shared::Shared;
use crate::simd::{LANES, Simd, simd_fn};

/// The activation of the gate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Act {
    /// g·sigmoid(g) (SwiGLU).
    Silu,
    /// g/2·(1 + tanh(sqrt(2/π)·(g + 0.044715·g³))) (GeGLU; the tanh form).
    GeluTanh,
}

/// Rows of one work item.
const ROWS: usize = 4;

/// out[m, f] = act(gate)·up for rows gate_up[m, 2f] = [gate | up].
pub fn glu(pool: &Pool, gate_up: &[f32], m: usize, f: usize, act: Act, out: &mut [f32]) {
    assert_eq!(gate_up.len(), 2 * m * f, "gate_up is [m, 2f]");
    assert_eq!(out.len(), m * f, "out is [m, f]");
    let out = Shared::new(out);
    pool.run(m.div_ceil(ROWS), |item| {
        for r in item * ROWS..((item + 1) * ROWS).min(m) {
            // SAFETY: each row belongs to one item.
            let out = unsafe { out.part(r * f, f) };
            let (gate, up) = gate_up[2 * r * f..][..2 * f].split_at(f);
            glu_row(gate, up, act, out);
        }
    });
}

/// d_gate_up[m, 2f] = the gradient of [`glu`] for dout[m, f]; `out`, where wanted, becomes what [`glu`] gave, in the same pass.
pub fn glu_backward(
    pool: &Pool,
    gate_up: &[f32],
    m: usize,
    f: usize,
    act: Act,
    dout: &[f32],
    d_gate_up: &mut [f32],
    out: Option<&mut [f32]>,
) {
    assert_eq!(gate_up.len(), 2 * m * f, "gate_up is [m, 2f]");
    assert_eq!(d_gate_up.len(), 2 * m * f, "d_gate_up is [m, 2f]");
    assert_eq!(dout.len(), m * f, "dout is [m, f]");
    assert!(out.as_ref().is_none_or(|out| out.len() == m * f), "out is [m, f]");
    let d_gate_up = Shared::new(d_gate_up);
    let out = out.map(Shared::new);
    pool.run(m.div_ceil(ROWS), |item| {
        for r in item * ROWS..((item + 1) * ROWS).min(m) {
            // SAFETY: each row belongs to one item.
            let (d_gate, d_up) = unsafe { d_gate_up.part(2 * r * f, 2 * f) }.split_at_mut(f);
            // SAFETY: as above.
            let out = out.map(|out| unsafe { out.part(r * f, f) });
            let (gate, up) = gate_up[2 * r * f..][..2 * f].split_at(f);
            glu_row_backward(gate, up, act, &dout[r * f..][..f], d_gate, d_up, out);
        }
    });
}

simd_fn! {
    fn glu_row<S>(gate: &[f32], up: &[f32], act: Act, out: &mut [f32]) {
        for i in (0..gate.len()).step_by(LANES) {
            let g = S::load(&gate[i..]);
            let slope = S::mul(g, gate_share::<S>(g, act));
            S::store(S::mul(slope, S::load(&up[i..])), &mut out[i..]);
        }
    }
}

simd_fn! {
    fn glu_row_backward<S>(
        gate: &[f32], up: &[f32], act: Act, dout: &[f32], d_gate: &mut [f32], d_up: &mut [f32],
        out: Option<&mut [f32]>,
    ) {
        let (one, mut out) = (S::splat(1.0), out);
        for i in (0..gate.len()).step_by(LANES) {
            let (g, u, d) = (S::load(&gate[i..]), S::load(&up[i..]), S::load(&dout[i..]));
            let share = gate_share::<S>(g, act);
            let value = S::mul(g, share);
            // act = g·σ(z), so act' = σ + g·σ·(1 − σ)·z'.
            let steep = match act {
                Act::Silu => one,
                Act::GeluTanh => S::fma(S::mul(g, g), S::splat(GELU_SLOPE * 3.0 * 0.044_715), S::splat(GELU_SLOPE)),
            };
            let slope = S::fma(S::mul(value, S::sub(one, share)), steep, share);
            S::store(S::mul(S::mul(d, u), slope), &mut d_gate[i..]);
            S::store(S::mul(d, value), &mut d_up[i..]);
            if let Some(out) = &mut out {
                S::store(S::mul(value, u), &mut out[i..]);
            }
        }
    }
}

/// 2·sqrt(2/π): the tanh form of GELU is g·σ(z) with z = this·(g + 0.044715·g³).
const GELU_SLOPE: f32 = 1.595_769;

/// σ(z): what share of the gate passes.
#[inline(always)]
fn gate_share<S: Simd>(g: S::V, act: Act) -> S::V {
    match act {
        Act::Silu => sigmoid::<S>(g),
        Act::GeluTanh => {
            let cubic = S::fma(S::mul(g, g), S::splat(GELU_SLOPE * 0.044_715), S::splat(GELU_SLOPE));
            sigmoid::<S>(S::mul(g, cubic))
        }
    }
}
