//! The stated distribution against recorded probabilities of transformers and vLLM.

#[path = "support/golden.rs"]
mod golden;

use golden::{Tally, Tensors, json, or};
use rft_kernels::{Warp, warp_row};
use serde_json::Value;

/// The row whose logits tie: which of equal tokens is left out is free, so it is compared sorted.
const TIED_ROW: usize = 3;

fn warp(o: &Value) -> Warp {
    Warp {
        temperature: or(&o["temperature"], 1.0) as f32,
        top_k: or(&o["top_k"], 0.0) as usize,
        top_p: or(&o["top_p"], 1.0) as f32,
        min_p: or(&o["min_p"], 0.0) as f32,
    }
}

/// Why a case describes another distribution than [`Warp`] can state.
fn out_of_scope(family: &str, o: &Value) -> Option<&'static str> {
    let is_set = |k: &str, off: f64| or(&o[k], off) != off;
    if is_set("repetition_penalty", 1.0)
        || is_set("presence_penalty", 0.0)
        || is_set("frequency_penalty", 0.0)
    {
        return Some("penalties");
    }
    // vLLM filters by min-p before top-p; here, as in transformers, after it
    (family == "vllm" && is_set("min_p", 0.0) && is_set("top_p", 1.0)).then_some("min-p before top-p")
}

fn sorted(x: &[f64]) -> Vec<f64> {
    let mut x = x.to_vec();
    x.sort_by(f64::total_cmp);
    x
}

fn check(family: &str) {
    let (file, tensors) = (json("sampling/warpers.json"), Tensors::open("sampling/warpers.safetensors"));
    let logits = tensors.get("logits");
    let mut t = Tally::new(&format!("warpers.json: {family}, rows of the distribution"));
    let mut skipped = Vec::new();
    for c in file[family].as_array().unwrap() {
        let (id, o) = (c["id"].as_str().unwrap(), &c["options"]);
        if let Some(why) = out_of_scope(family, o) {
            skipped.push(format!("{id} ({why})"));
            continue;
        }
        let probs = tensors.get(&format!("{family}.{id}.probs"));
        for (r, (row, want)) in
            logits.data.chunks(logits.columns()).zip(probs.data.chunks(probs.columns())).enumerate()
        {
            t.case(format!("{id} {o} row {r}"));
            let mut row = row.to_vec();
            let stats = warp_row(&mut row, &warp(o), &mut Vec::new());
            let mut got: Vec<f64> = row.iter().map(|x| f64::from(*x - stats.lse).exp()).collect();
            let mut want: Vec<f64> = want.iter().map(|p| f64::from(*p)).collect();
            let entropy: f64 = want.iter().filter(|p| **p > 0.0).map(|p| -p * p.ln()).sum();
            if r == TIED_ROW {
                (got, want) = (sorted(&got), sorted(&want));
            }
            t.values("probability", &got, &want, 1e-4, 1e-6);
            let same = got.iter().zip(&want).all(|(g, w)| (*g == 0.0) == (*w == 0.0));
            t.fact("keeps other tokens", same);
            t.value("entropy", f64::from(stats.entropy), entropy, 1e-4, 1e-5);
        }
    }
    println!("{family}: {} cases describe other distributions: {}", skipped.len(), skipped.join(", "));
    t.finish();
}

#[test]
fn parity_sampling_transformers() {
    check("transformers");
}

#[test]
fn parity_sampling_vllm() {
    check("vllm");
}
